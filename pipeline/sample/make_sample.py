"""Writes the sample data from texts.yaml, the same bytes every time.

    python pipeline/sample/make_sample.py [--output FOLDER]

Every text is written by hand in texts.yaml. The seed decides which pair lands in which file, the
order of the rows, the scores, and which pairs are broken, repeated or contradicted on purpose.
"""

import argparse
import hashlib
import json
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

# DUPLICATES needs a pair of several lines in each file that it copies from; some seeds give none.
SEED = 20
HERE = Path(__file__).parent
Message: TypeAlias = dict[str, str]
Fields: TypeAlias = dict[str, object]
# A row before it is written; bytes are a line that no JSON writer would produce.
Row: TypeAlias = Fields | bytes
Break: TypeAlias = Callable[[Fields], Row]


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A question with a good and a bad answer, free of any file format."""

    topic: str
    system: str
    """Empty if there is no system message."""
    earlier: tuple[tuple[str, str], ...]
    """Turns before the question, as (role, text)."""
    ask: str
    good: str
    bad: str

    @property
    def prompt(self) -> list[Message]:
        """The messages that both answers reply to."""
        system = [("system", self.system)] if self.system else []
        return [message(*turn) for turn in (*system, *self.earlier, ("user", self.ask))]


Edit: TypeAlias = Callable[[Pair], Pair]


def message(role: str, content: str) -> Message:
    """Make a chat message."""
    return {"role": role, "content": content}


def read_pairs(path: Path) -> list[list[Pair]]:
    """Read the texts, as one list of pairs a question."""
    topics = yaml.safe_load(path.read_text(encoding="utf-8"))
    return [
        [
            Pair(
                topic=topic,
                system=entry.get("system", ""),
                earlier=tuple(entry.get("earlier", {}).items()),
                ask=entry["ask"],
                good=entry["good"],
                bad=bad,
            )
            for bad in entry["bad"].values()
        ]
        for topic, entries in topics.items()
        for entry in entries
    ]


# The formats: a pair as one row of each file.


def to_chat(pair: Pair, rng: random.Random) -> Fields:
    """Write a pair as three lists of messages."""
    return {
        "prompt": pair.prompt,
        "chosen": [message("assistant", pair.good)],
        "rejected": [message("assistant", pair.bad)],
        "source": pair.topic,
    }


def to_ultrafeedback(pair: Pair, rng: random.Random) -> Fields:
    """Write the prompt as text and inside both conversations, with scores from 1 to 10."""
    chosen = [message("user", pair.ask), message("assistant", pair.good)]
    return {
        "prompt": pair.ask,
        "prompt_id": hashlib.sha256(pair.ask.encode()).hexdigest(),
        "chosen": chosen,
        "rejected": [message("user", pair.ask), message("assistant", pair.bad)],
        "messages": chosen,
        "score_chosen": rng.randint(13, 19) / 2,
        "score_rejected": rng.randint(2, 10) / 2,
    }


def to_hh(pair: Pair, rng: random.Random) -> Fields:
    """Write a pair as two whole transcripts."""
    names = {"user": "Human", "assistant": "Assistant"}
    turns = (*pair.earlier, ("user", pair.ask))
    start = "".join(f"\n\n{names[role]}: {text}" for role, text in turns)
    return {
        "chosen": f"{start}\n\nAssistant: {pair.good}",
        "rejected": f"{start}\n\nAssistant: {pair.bad}",
    }


def to_openai(pair: Pair, rng: random.Random) -> Fields:
    """Write a pair in the format of OpenAI's preference fine-tuning."""
    return {
        "input": {"messages": pair.prompt},
        "preferred_output": [message("assistant", pair.good)],
        "non_preferred_output": [message("assistant", pair.bad)],
    }


def to_preferred(pair: Pair, rng: random.Random) -> Fields:
    """Write a pair as three texts."""
    return {"prompt": pair.ask, "preferred": pair.good, "dispreferred": pair.bad}


def to_question(pair: Pair, rng: random.Random) -> Fields:
    """Write a pair as four columns; an empty system text means that there is none."""
    return {"system": pair.system, "question": pair.ask, "chosen": pair.good, "rejected": pair.bad}


@dataclass(frozen=True, kw_only=True)
class Format:
    """One file of the sample."""

    to_row: Callable[[Pair, random.Random], Fields]
    share: int
    """Weight of this file when the pairs are spread over the files."""
    holds_system: bool = False
    holds_earlier: bool = False

    def holds(self, pair: Pair) -> bool:
        """Return whether the format can hold all parts of a pair."""
        return (self.holds_system or not pair.system) and (self.holds_earlier or not pair.earlier)


CHAT = "chat.jsonl"
ULTRAFEEDBACK = "ultrafeedback_style.jsonl"
HH = "hh_transcripts.jsonl"
OPENAI = "openai_preference.jsonl"
PREFERRED = "preferred_dispreferred.jsonl"
QUESTION = "question_system.parquet"
FORMATS = {
    CHAT: Format(to_row=to_chat, share=80, holds_system=True, holds_earlier=True),
    ULTRAFEEDBACK: Format(to_row=to_ultrafeedback, share=65),
    HH: Format(to_row=to_hh, share=65, holds_earlier=True),
    OPENAI: Format(to_row=to_openai, share=55, holds_system=True, holds_earlier=True),
    PREFERRED: Format(to_row=to_preferred, share=45),
    QUESTION: Format(to_row=to_question, share=45, holds_system=True),
}


# Edits that break a good row on purpose.


def to_line(value: object) -> bytes:
    """Encode a line of a JSONL file."""
    return json.dumps(value, ensure_ascii=False).encode() + b"\n"


def with_prompt(edit: Callable[[list[Message]], list[Message]]) -> Break:
    """Break a chat row by an edit of its prompt."""

    def break_row(row: Fields) -> Row:
        prompt = row["prompt"]
        assert isinstance(prompt, list)
        return row | {"prompt": edit(prompt)}

    return break_row


def with_field(key: str, value: object) -> Break:
    """Set one field."""
    return lambda row: row | {key: value}


def with_copy(*, of: str, into: str) -> Break:
    """Copy the value of one field into another."""
    return lambda row: row | {into: row[of]}


def without_field(key: str) -> Break:
    """Remove one field."""
    return lambda row: {name: value for name, value in row.items() if name != key}


def with_scores_swapped(row: Fields) -> Row:
    """Swap the scores, so that the chosen side has the lower one."""
    scores = {"score_chosen": row["score_rejected"], "score_rejected": row["score_chosen"]}
    return row | scores


def with_other_question(row: Fields) -> Row:
    """Make the rejected transcript answer another question than the chosen one."""
    answer = str(row["rejected"]).rpartition("\n\nAssistant: ")[2]
    return row | {"rejected": f"\n\nHuman: May I ask something else?\n\nAssistant: {answer}"}


def with_empty_answer(row: Fields) -> Row:
    """End the chosen transcript before the answer."""
    start, tag, _ = str(row["chosen"]).rpartition("\n\nAssistant:")
    return row | {"chosen": start + tag}


def with_latin1_letter(row: Fields) -> Row:
    """Insert one letter in another encoding."""
    return to_line(row).replace(b"Assistant: ", "Assistant: Voilà! ".encode("latin-1"), 1)


def as_list(row: Fields) -> Row:
    """Write the values without their names."""
    return to_line(list(row.values()))


def cut_off(row: Fields) -> Row:
    """Cut the line in half."""
    line = to_line(row)
    return line[: len(line) // 2].decode(errors="ignore").encode() + b"\n"


def as_python_text(row: Fields) -> Row:
    """Write the row as Python prints it, which is not JSON."""
    return f"{row}\n".encode()


HELLO = [message("user", "Hello!"), message("assistant", "Hello! How can I help you?")]
# (file, expected reason code, edit of a good row)
FAULTS: tuple[tuple[str, str, Break], ...] = (
    (CHAT, "ROLE_UNKNOWN", with_prompt(lambda p: [*p[:-1], p[-1] | {"role": "narrator"}])),
    (CHAT, "ROLE_ORDER", with_prompt(lambda p: [*p[:-1], message("user", "Hello?"), p[-1]])),
    (CHAT, "SYSTEM_NOT_FIRST", with_prompt(lambda p: [*HELLO, message("system", "Be kind."), *p])),
    (CHAT, "PROMPT_LAST_ROLE", with_prompt(lambda p: [*p, message("assistant", "Well,")])),
    (CHAT, "CHOSEN_EQ_REJECTED", with_copy(of="chosen", into="rejected")),
    (CHAT, "CHOSEN_EMPTY", with_field("chosen", [message("assistant", "")])),
    (CHAT, "JSON_NOT_OBJECT", as_list),
    (ULTRAFEEDBACK, "TIE", with_copy(of="score_chosen", into="score_rejected")),
    (ULTRAFEEDBACK, "TIE", with_copy(of="score_rejected", into="score_chosen")),
    (ULTRAFEEDBACK, "TIE", with_copy(of="score_chosen", into="score_rejected")),
    (ULTRAFEEDBACK, "SCORE_CONTRADICTS_LABEL", with_scores_swapped),
    (ULTRAFEEDBACK, "SCORE_CONTRADICTS_LABEL", with_scores_swapped),
    (HH, "PROMPT_MISMATCH", with_other_question),
    (HH, "PROMPT_MISMATCH", with_other_question),
    (HH, "CHOSEN_EMPTY", with_empty_answer),
    (HH, "ENCODING_INVALID", with_latin1_letter),
    (HH, "JSON_INVALID", cut_off),
    (OPENAI, "SCHEMA_MISMATCH", without_field("non_preferred_output")),
    (OPENAI, "REJECTED_EMPTY", with_field("non_preferred_output", [message("assistant", " ")])),
    (OPENAI, "JSON_INVALID", as_python_text),
    (PREFERRED, "CHOSEN_EQ_REJECTED", lambda row: row | {"dispreferred": f"{row['preferred']} "}),
    (PREFERRED, "REJECTED_EMPTY", with_field("dispreferred", "  \n")),
    (PREFERRED, "PROMPT_EMPTY", with_field("prompt", "")),
    (QUESTION, "CHOSEN_EQ_REJECTED", with_copy(of="chosen", into="rejected")),
)


# Rows that repeat a good pair, and rows that contradict one.


def unchanged(pair: Pair) -> Pair:
    """Repeat the pair unchanged."""
    return pair


def with_trailing_spaces(pair: Pair) -> Pair:
    """Add spaces after both answers."""
    return replace(pair, good=f"{pair.good}  ", bad=f"{pair.bad} ")


def with_windows_newlines(pair: Pair) -> Pair:
    """Replace LF by CRLF in both answers."""
    return replace(pair, good=pair.good.replace("\n", "\r\n"), bad=pair.bad.replace("\n", "\r\n"))


def with_swapped_labels(pair: Pair) -> Pair:
    """Prefer the bad answer to the good one."""
    return replace(pair, good=pair.bad, bad=pair.good)


# (file of the pair, file of the second row, how that row differs)
DUPLICATES: tuple[tuple[str, str, Edit], ...] = (
    (CHAT, CHAT, unchanged),
    (HH, HH, unchanged),
    (PREFERRED, PREFERRED, unchanged),
    (ULTRAFEEDBACK, ULTRAFEEDBACK, unchanged),
    (CHAT, OPENAI, unchanged),
    (QUESTION, CHAT, unchanged),
    (ULTRAFEEDBACK, PREFERRED, unchanged),
    (HH, QUESTION, unchanged),
    (OPENAI, PREFERRED, with_trailing_spaces),
    (PREFERRED, CHAT, with_trailing_spaces),
    (OPENAI, CHAT, with_windows_newlines),
    (CHAT, ULTRAFEEDBACK, with_windows_newlines),
)
CONFLICTS: tuple[tuple[str, str, Edit], ...] = (
    (HH, HH, with_swapped_labels),
    (CHAT, OPENAI, with_swapped_labels),
    (PREFERRED, ULTRAFEEDBACK, with_swapped_labels),
    (OPENAI, HH, with_swapped_labels),
)


def take_for_faults(spare: list[Pair]) -> list[Pair]:
    """Remove from `spare` one pair for each fault."""
    taken = []
    for name, _, _ in FAULTS:
        taken.append(next(pair for pair in spare if FORMATS[name].holds(pair)))
        spare.remove(taken[-1])
    return taken


def spread(pairs: list[Pair]) -> dict[str, list[Pair]]:
    """Assign each pair to the file that can hold it and is furthest behind its share."""
    pairs_of: dict[str, list[Pair]] = {name: [] for name in FORMATS}
    for pair in pairs:
        names = [name for name, form in FORMATS.items() if form.holds(pair)]
        pairs_of[min(names, key=lambda name: len(pairs_of[name]) / FORMATS[name].share)] += [pair]
    return pairs_of


def take_for_seconds(
    plan: tuple[tuple[str, str, Edit], ...], pairs_of: dict[str, list[Pair]], free: list[Pair]
) -> list[tuple[str, Pair]]:
    """Remove from `free` one pair for each entry of the plan; return the second rows."""
    seconds = []
    for origin, name, edit in plan:
        pair = next(
            pair
            for pair in free
            if pair in pairs_of[origin]
            and FORMATS[name].holds(pair)
            and (edit is unchanged or edit(pair) != pair)
        )
        free.remove(pair)
        seconds.append((name, edit(pair)))
    return seconds


def make_rows(questions: list[list[Pair]], rng: random.Random) -> dict[str, list[Row]]:
    """Spread the pairs over the files, and add the broken, repeated and contradicting rows."""
    rng.shuffle(questions)
    pairs = [pair for group in questions for pair in group]
    # Faults and conflicts take the second pair of a question, so that no question is lost.
    spare = [group[1] for group in questions if len(group) > 1]
    broken = take_for_faults(spare)
    good = [pair for pair in pairs if pair not in broken]
    pairs_of = spread(good)
    seconds = take_for_seconds(CONFLICTS, pairs_of, spare)
    contradicted = [with_swapped_labels(pair) for _, pair in seconds]
    free = [pair for pair in good if pair not in contradicted]
    seconds += take_for_seconds(DUPLICATES, pairs_of, free)

    rows: dict[str, list[Row]] = {name: [] for name in FORMATS}
    for name, members in pairs_of.items():
        rows[name] += [FORMATS[name].to_row(pair, rng) for pair in members]
    for name, pair in seconds:
        rows[name].append(FORMATS[name].to_row(pair, rng))
    for (name, _, break_row), pair in zip(FAULTS, broken, strict=True):
        rows[name].append(break_row(FORMATS[name].to_row(pair, rng)))
    for file_rows in rows.values():
        rng.shuffle(file_rows)
    return rows


def write_rows(path: Path, rows: list[Row]) -> None:
    """Write one file; its name decides between JSONL and Parquet."""
    if path.suffix == ".parquet":
        columns = ("system", "question", "chosen", "rejected")
        schema = pa.schema([(name, pa.string()) for name in columns])
        pq.write_table(pa.Table.from_pylist(rows, schema=schema), path, compression="zstd")
    else:
        path.write_bytes(b"".join(row if isinstance(row, bytes) else to_line(row) for row in rows))


def main() -> None:
    """Write all files to the folder named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=HERE, help="the folder to write to")
    output: Path = parser.parse_args().output
    output.mkdir(parents=True, exist_ok=True)
    rows = make_rows(read_pairs(HERE / "texts.yaml"), random.Random(SEED))
    for name, file_rows in rows.items():
        write_rows(output / name, file_rows)


if __name__ == "__main__":
    main()
