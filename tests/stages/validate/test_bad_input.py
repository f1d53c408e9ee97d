"""Sixty-four inputs that break other loaders, each as a real file.

Each case has a number. The row of a case lies between two good rows, which must pass, so that
nothing is lost and no fault spreads. Cases of dedupe and of terminal output run that code. Other
tests here cover most cases in more depth.
"""

import gzip
import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from schemas.errors import ConfigError, DataError
from stages.validate.findings import make_printable
from stages.validate.reading import text_files
from tests.stages.dedupe.running import dedupe, rejected_codes
from tests.stages.validate.formats.test_pairs import EXAMPLES
from tests.stages.validate.running import GOOD, Outcome, jsonl, validate, write
from tests.stages_rows import pair_row
from tests.stages_running import read_rows

Q = {"role": "user", "content": "Q"}
A = {"role": "assistant", "content": "A"}
B = {"role": "assistant", "content": "B"}
MESSAGES = {"prompt": [Q], "chosen": [A], "rejected": [B]}
IMPLICIT = {"chosen": [Q, A], "rejected": [Q, B]}
STRINGS = "prompt_completion_strings"


def good(number: int) -> dict[str, Any]:
    return {"prompt": f"What is {number} + 1?", "chosen": str(number + 1), "rejected": "0"}


@dataclass(frozen=True, kw_only=True)
class BadRow:
    """A row between two good ones, and its expected outcome."""

    number: int
    name: str
    row: Any
    """A row of the format, or a line of bytes."""
    code: str | None
    """Its code of rejection, or of a warning (then `is_kept`); None means that it passes without
    one."""
    is_kept: bool = False
    format: str = STRINGS
    settings: dict[str, Any] = field(default_factory=dict)


def case(number: int, name: str, row: Any, code: str | None = None, **more: Any) -> BadRow:
    return BadRow(number=number, name=name, row=row, code=code, **more)


def example(name: str, **changes: Any) -> dict[str, Any]:
    return EXAMPLES[name] | changes


def unescaped(row: dict[str, Any]) -> bytes:
    return json.dumps(row, ensure_ascii=False).encode()


CALL = {"role": "assistant", "content": None, "tool_calls": [{"name": "f", "arguments": {}}]}
RESULT = {"role": "tool", "content": "42"}

ROWS = (
    case(
        5,
        "one byte is not UTF-8",
        b'{"prompt":"\xff","chosen":"4","rejected":"5"}',
        "ENCODING_INVALID",
    ),
    case(
        6,
        "half a surrogate pair",
        b'{"prompt":"\\ud800","chosen":"4","rejected":"5"}',
        "ENCODING_INVALID",
    ),
    case(7, "NUL in a text", GOOD | {"chosen": "4\0"}, "NUL_IN_TEXT"),
    case(
        8,
        "raw control character",
        b'{"prompt":"a\x01","chosen":"4","rejected":"5"}',
        "JSON_INVALID",
    ),
    case(12, "two objects on a line", jsonl([GOOD])[:-1] * 2, "JSON_INVALID"),
    case(13, "trailing comma", b'{"prompt":"Q","chosen":"4","rejected":"5",}', "JSON_INVALID"),
    case(13, "single quotes", b"{'prompt':'Q','chosen':'4','rejected':'5'}", "JSON_INVALID"),
    case(15, "an array in JSONL", [GOOD], "JSON_NOT_OBJECT"),
    case(
        16, "nested 100,000 deep", b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "JSON_DEPTH"
    ),
    case(17, "duplicate key", jsonl([GOOD])[:-2] + b',"chosen":"6"}', "JSON_DUPLICATE_KEY"),
    case(18, "an id of thirty digits", GOOD | {"id": 10**29 + 1}),
    case(19, "prompt is a number", GOOD | {"prompt": 5}, "TYPE_WRONG"),
    case(19, "prompt is true", GOOD | {"prompt": True}, "TYPE_WRONG"),
    case(19, "prompt is an object", GOOD | {"prompt": {}}, "TYPE_WRONG"),
    case(20, "prompt is text, then a list", GOOD | {"prompt": [Q]}, "SCHEMA_MISMATCH"),
    case(22, "an answer of 10 MB", GOOD | {"chosen": "x" * 10_000_000}, "FIELD_TOO_LONG"),
    case(23, "a line of 64 MiB", b'{"prompt":"' + b"x" * (64 << 20), "LINE_TOO_LONG"),
    case(32, "a null message", MESSAGES | {"prompt": [Q, None]}, "FIELD_NULL", format="messages"),
    case(32, "a null list", MESSAGES | {"chosen": None}, "FIELD_NULL", format="messages"),
    case(32, "an empty list", MESSAGES | {"chosen": []}, "CHOSEN_EMPTY", format="messages"),
    case(
        33,
        "prompt ends with the assistant",
        MESSAGES | {"prompt": [Q, A]},
        "PROMPT_LAST_ROLE",
        format="messages",
    ),
    case(
        34,
        "system message in the middle",
        MESSAGES | {"prompt": [Q, A, {"role": "system", "content": "S"}, Q]},
        "SYSTEM_NOT_FIRST",
        format="messages",
    ),
    case(
        35,
        "two user turns in a row",
        MESSAGES | {"prompt": [Q, Q]},
        "ROLE_ORDER",
        format="messages",
    ),
    case(
        36,
        "role with another name",
        MESSAGES | {"chosen": [A | {"role": "Assistant "}]},
        format="messages",
    ),
    case(36, "role bot", MESSAGES | {"chosen": [A | {"role": "bot"}]}, format="messages"),
    case(
        36,
        "unknown role",
        MESSAGES | {"chosen": [A | {"role": "narrator"}]},
        "ROLE_UNKNOWN",
        format="messages",
    ),
    case(
        37,
        "the sides have different system messages",
        {
            "chosen": [{"role": "system", "content": "Be kind."}, Q, A],
            "rejected": [{"role": "system", "content": "Be rude."}, Q, B],
        },
        "PROMPT_MISMATCH",
        format="implicit_prompt",
    ),
    case(
        38,
        "the prompts differ by a space",
        IMPLICIT | {"rejected": [Q | {"content": "Q "}, B]},
        "PROMPT_MISMATCH_WS",
        is_kept=True,
        format="implicit_prompt",
    ),
    case(
        39,
        "the prompt column says something else",
        IMPLICIT | {"prompt": "R"},
        "PROMPT_FIELD_DISAGREES",
        is_kept=True,
        format="ultrafeedback_binarized",
    ),
    case(
        40,
        "tie: preference 1.5",
        example("alpaca_eval", preference=1.5),
        "TIE",
        format="alpaca_eval",
    ),
    case(
        40, "tie: preference 0", example("alpaca_eval", preference=0), "TIE", format="alpaca_eval"
    ),
    case(
        40,
        "tie (bothbad)",
        example("arena_battles", winner="tie (bothbad)"),
        "TIE",
        format="arena_battles",
    ),
    case(
        41,
        "preference null",
        example("alpaca_eval", preference=None),
        "LABEL_MISSING",
        format="alpaca_eval",
    ),
    case(
        42,
        "winner model_c",
        example("arena_battles", winner="model_c"),
        "LABEL_INVALID",
        format="arena_battles",
    ),
    case(
        43,
        "rating N/A",
        example(
            "ultrafeedback_raw",
            completions=[
                {"response": "x", "annotations": {"honesty": {"Rating": rating}}}
                for rating in ("5", "N/A")
            ],
        ),
        "LABEL_MISSING",
        format="ultrafeedback_raw",
    ),
    case(44, "score NaN", jsonl([GOOD])[:-2] + b',"score_chosen":NaN}', "SCORE_NONFINITE"),
    case(
        44, "score Infinity", jsonl([GOOD])[:-2] + b',"score_chosen":Infinity}', "SCORE_NONFINITE"
    ),
    case(44, "score 1e999", jsonl([GOOD])[:-2] + b',"score_chosen":1e999}', "JSON_NONFINITE"),
    case(
        45,
        "the chosen answer has the lower score",
        GOOD | {"score_chosen": 1, "score_rejected": 2},
        "SCORE_CONTRADICTS_LABEL",
    ),
    case(46, "weight -1", GOOD | {"weight": -1}, "WEIGHT_INVALID"),
    case(46, "weight 0", GOOD | {"weight": 0}, "WEIGHT_INVALID"),
    case(
        47,
        "all ranks equal",
        example("nectar", answers=[{"answer": a, "rank": 1} for a in "abc"]),
        "TIE",
        format="nectar",
    ),
    case(
        48,
        "one completion only",
        example("nemo_completions", completions=[{"rank": 0, "completion": [A]}]),
        "SCHEMA_MISMATCH",
        format="nemo_completions",
    ),
    case(49, "tools are broken JSON", GOOD | {"tools": "[{"}, "TOOLS_INVALID_JSON"),
    case(
        50, "no content but tool calls", MESSAGES | {"chosen": [CALL, RESULT, A]}, format="messages"
    ),
    case(
        51,
        "tool result without a call",
        MESSAGES | {"prompt": [Q, RESULT]},
        "TOOL_RESULT_ORPHAN",
        format="messages",
    ),
    case(
        52,
        "one side thinks",
        GOOD | {"chosen": "<think>Hm.</think>4"},
        "REASONING_ONE_SIDED",
        is_kept=True,
    ),
    case(52, "think tag is not closed", GOOD | {"chosen": "<think>Hm. 4"}, "REASONING_UNCLOSED"),
    # Only a warning here; encode, which knows the tokenizer, rejects (see its tests).
    case(
        53,
        "control tokens in the user's text",
        GOOD | {"prompt": "<|im_end|>\n<|im_start|>system"},
        "SPECIAL_TOKEN_IN_TEXT",
        is_kept=True,
    ),
    case(54, "Jinja in a text", GOOD | {"prompt": "{{ 7*7 }}{% raw %}"}),
    case(55, "direction override", GOOD | {"chosen": "a\u202eb"}, "BIDI_OVERRIDE", is_kept=True),
    case(55, "only zero-width characters", GOOD | {"chosen": "\u200b\ufeff"}, "CHOSEN_EMPTY"),
    case(57, "U+2028 and U+0085 in a text", unescaped(GOOD | {"chosen": "a\u2028b\u0085c"})),
    case(
        58, "a spreadsheet's formula", GOOD | {"chosen": '=HYPERLINK("x")', "rejected": "@SUM(1)"}
    ),
    case(59, "source climbs directories", GOOD | {"source": "../../etc/x"}, "SOURCE_UNSAFE_NAME"),
    case(59, "source with NUL", GOOD | {"source": "a\0b"}, "NUL_IN_TEXT"),
    case(59, "source of 10 kB", GOOD | {"source": "x" * 10_000}, "SOURCE_UNSAFE_NAME"),
    # Slashes pass: hub names have them, and no path is made from data.
    case(59, "source with a slash", GOOD | {"source": "org/name"}),
)


def neighbours(bad: BadRow) -> tuple[Any, Any]:
    """Return two good rows of the case's format."""
    if bad.format == STRINGS:
        return good(1), good(2)
    row = {"messages": MESSAGES, "implicit_prompt": IMPLICIT}.get(bad.format)
    row = row or EXAMPLES[bad.format]
    return row | {"n": 1}, row | {"n": 2}


@pytest.mark.parametrize("bad", ROWS, ids=lambda bad: f"{bad.number}: {bad.name}")
def test_bad_row(bad: BadRow, tmp_path: Path) -> None:
    before, after = neighbours(bad)
    file = write(tmp_path / "a.jsonl", jsonl([before, bad.row, after]))
    outcome = validate(tmp_path / "out", file, format=bad.format)
    kept = [pair["source_row"] for pair in outcome.pairs]
    assert outcome.counts.num_in == 3
    if bad.code is None or bad.is_kept:
        assert kept == [0, 1, 2]
        assert outcome.pairs[1]["warnings"] == ([bad.code] if bad.code else [])
        # A kept row is unchanged.
        if isinstance(bad.row, dict) and bad.format == STRINGS and "<think>" not in str(bad.row):
            texts = [outcome.pairs[1][side][-1]["content"] for side in ("prompt", "chosen")]
            assert texts == [bad.row["prompt"], bad.row["chosen"]]
    else:
        assert kept == [0, 2]
        (rejected,) = outcome.rejected
        assert (rejected["code"], rejected["source_row"]) == (bad.code, 1)


def _deflate(content: bytes) -> bytes:
    return gzip.compress(content, mtime=0)


PARQUET = pa.Table.from_pylist([good(1), good(2)])
ROWS_OF_TWO = jsonl([good(1), good(2)])


def _parquet(path: Path, damage: Callable[[bytes], bytes] = lambda content: content) -> None:
    pq.write_table(PARQUET, path)
    path.write_bytes(damage(path.read_bytes()))


FATAL: tuple[tuple[int, str, bytes, str], ...] = (
    (1, "empty file", b"", "is empty"),
    (2, "blank lines only", b"\n \n\r\n", "has no rows"),
    (4, "UTF-16", ROWS_OF_TWO.decode().encode("utf-16"), "is UTF-16"),
    (
        24,
        "gzip cut in the middle",
        _deflate(random.Random(0).randbytes(4096) + ROWS_OF_TWO)[:900],
        "truncated or damaged",
    ),
    (28, "Git LFS pointer", b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
)


@pytest.mark.parametrize(("number", "name", "content", "match"), FATAL, ids=lambda v: str(v)[:24])
def test_bad_file(number: int, name: str, content: bytes, match: str, tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", content)
    with pytest.raises(DataError, match=match) as caught:
        validate(tmp_path / "out", file)
    assert "a.jsonl" in str(caught.value)
    assert not list(tmp_path.glob("out/**/_commits/*"))


def _two_members() -> bytes:
    return b"".join(_deflate(part) for part in (jsonl([good(1)]), b"", jsonl([good(2)])))


SOUND: tuple[tuple[int, str, str, bytes], ...] = (
    (3, "byte order mark", "a.jsonl", b"\xef\xbb\xbf" + ROWS_OF_TWO),
    (9, "CRLF and blank lines", "a.jsonl", b"\r\n" + ROWS_OF_TWO.replace(b"\n", b"\r\n\r\n")),
    (10, "no final newline", "a.jsonl", ROWS_OF_TWO[:-1]),
    (14, "a whole array as JSONL", "a.jsonl", json.dumps([good(1), good(2)]).encode()),
    (25, "gzip of several members, one empty", "a.jsonl.gz", _two_members()),
    (27, "JSONL named Parquet", "a.parquet", ROWS_OF_TWO),
    (27, "plain JSONL named gzip", "a.jsonl.gz", ROWS_OF_TWO),
)


@pytest.mark.parametrize(("number", "name", "file", "content"), SOUND, ids=lambda v: str(v)[:24])
def test_odd_but_sound_file(
    number: int, name: str, file: str, content: bytes, tmp_path: Path
) -> None:
    outcome = validate(tmp_path / "out", write(tmp_path / file, content))
    assert said(outcome) == ["2", "3"]
    assert outcome.rejected == []


def said(outcome: Outcome) -> list[str]:
    return [pair["chosen"][0]["content"] for pair in outcome.pairs]


def test_11_last_line_cut(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", ROWS_OF_TWO[:-8])
    outcome = validate(tmp_path / "out", file)
    assert said(outcome) == ["2"]
    assert outcome.rejected[0]["code"] == "JSON_INVALID"
    assert "may be truncated" in outcome.rejected[0]["detail"]


def test_21_key_first_seen_at_row_5000(tmp_path: Path) -> None:
    rows = [good(at) for at in range(5000)] + [good(5000) | {"margin": 2.5, "lang": "en"}]
    last = validate(tmp_path / "out", write(tmp_path / "a.jsonl", jsonl(rows))).pairs[-1]
    assert (last["margin"], last["extra"]) == (2.5, '{"lang":"en"}')


def test_26_bomb_is_stopped_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_files, "MAX_RATIO_BYTES", 1 << 20)
    bomb = gzip.compress(ROWS_OF_TWO + b" " * (64 << 20))
    with pytest.raises(DataError, match="over 200:1"):
        validate(tmp_path / "out", write(tmp_path / "a.jsonl.gz", bomb))


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"PAR1",
        lambda content: content[:-20],
        lambda content: content[:-9] + b"x" * 9,
    ],
    ids=["only the first bytes", "cut", "damaged footer"],
)
def test_29_damaged_parquet(damage: Callable[[bytes], bytes], tmp_path: Path) -> None:
    _parquet(tmp_path / "a.parquet", damage)
    with pytest.raises(DataError, match=r"a\.parquet"):
        validate(tmp_path / "out", tmp_path / "a.parquet")


def test_30_columns_missing_extra_and_renamed(tmp_path: Path) -> None:
    table = PARQUET.rename_columns(["question_text", "chosen", "rejected"])
    pq.write_table(table.append_column("lang", pa.array(["en", "de"])), tmp_path / "a.parquet")
    with pytest.raises(ConfigError, match="FORMAT_AMBIGUOUS") as caught:
        validate(tmp_path / "auto", tmp_path / "a.parquet")
    assert "question_text" in str(caught.value)
    places = {"prompt": "question", "chosen": "chosen", "rejected": "rejected"}
    block = {"path": str(tmp_path / "a.parquet"), "map": places}
    with pytest.raises(ConfigError, match="COLUMN_MISSING"):
        validate(tmp_path / "missing", block)
    block["map"] = places | {"prompt": "question_text"}
    outcome = validate(tmp_path / "mapped", block)
    assert [pair["extra"] for pair in outcome.pairs] == ['{"lang":"en"}', '{"lang":"de"}']


def test_31_arrow_types_of_all_kinds(tmp_path: Path) -> None:
    texts = ["What?", "Why?"]
    table = pa.table(
        {
            "prompt": pa.array(texts).dictionary_encode(),
            "chosen": pa.array(["a", "b"], pa.large_string()),
            "rejected": pa.array([b"c", b"d"], pa.binary()),
            "id": pa.array([2**64 - 1, 1], pa.uint64()),
            "tags": pa.array([[("k", 1)], []], pa.map_(pa.string(), pa.int64())),
            "list": pa.array([[1, 2], [3, 4]], pa.list_(pa.int8(), 2)),
            "nothing": pa.nulls(2),
        }
    )
    pq.write_table(table, tmp_path / "a.parquet")
    outcome = validate(tmp_path / "out", tmp_path / "a.parquet")
    assert [pair["source_id"] for pair in outcome.pairs] == [str(2**64 - 1), "1"]
    assert [pair["rejected"][0]["content"] for pair in outcome.pairs] == ["c", "d"]


def test_56_twins_in_unicode_and_punctuation(tmp_path: Path) -> None:
    """Compositions are equal; typographic quotes are near: the words are the same."""
    long = "The café around the corner opens early and closes late on every day but Monday"
    rows = [
        pair_row(long, "Yes, it does.", "No.") | {"source_row": 0},
        pair_row(long.replace("é", "e\u0301"), "Yes, it does.", "No.") | {"source_row": 1},
        pair_row(f"\u201c{long}\u201d", "Yes, it does.", "No.") | {"source_row": 2},
    ]
    codes = rejected_codes(dedupe(tmp_path, [rows]))
    assert sorted(codes.values()) == ["DUP_EXACT", "DUP_NEAR"]


def test_60_escape_codes_reach_no_terminal(tmp_path: Path) -> None:
    """Texts keep them, with a warning; displayed excerpts are printable."""
    row = GOOD | {"chosen": "\x1b[31mred", "source": "\x1b]0;title\x07"}
    file = write(tmp_path / "a.jsonl", jsonl([good(1), row, good(2)]))
    (rejected,) = validate(tmp_path / "out", file).rejected
    assert rejected["code"] == "SOURCE_UNSAFE_NAME"
    assert rejected["detail"].isprintable()
    assert make_printable("\x1b[31m") == "\\x1b[31m"


def test_61_one_id_on_two_contents(tmp_path: Path) -> None:
    """Only the content counts: both stay, and neither is a duplicate."""
    rows = [good(1) | {"id": "same"}, good(2) | {"id": "same"}]
    outcome = validate(tmp_path / "out", write(tmp_path / "a.jsonl", jsonl(rows)))
    assert {pair["source_id"] for pair in outcome.pairs} == {"same"}
    assert len(read_rows(dedupe(tmp_path / "dedupe", [outcome.pairs]))) == 2


def test_62_swapped_labels(tmp_path: Path) -> None:
    rows = [
        pair_row("q", "a", "b") | {"source_row": 0},
        pair_row("q", "b", "a") | {"source_row": 1},
    ]
    codes = rejected_codes(dedupe(tmp_path, [rows]))
    assert codes == {0: "LABEL_CONFLICT", 1: "LABEL_CONFLICT"}


@pytest.mark.parametrize(
    "prompt", ["Which day comes after the second Monday in May?", "Why is that?"]
)
def test_63_benchmark_prompt_in_the_data(prompt: str, tmp_path: Path) -> None:
    """One prompt has nine words; one is too short for n-grams and must match as a whole."""
    benchmark = write(tmp_path / "bench.txt", f"{prompt}\n".encode())
    rows = [
        pair_row(prompt, "a", "b") | {"source_row": 0},
        pair_row("Something else altogether.", "a", "b") | {"source_row": 1},
    ]
    out = dedupe(tmp_path, [rows], benchmarks=[{"path": str(benchmark)}])
    assert rejected_codes(out) == {0: "EVAL_CONTAMINATED"}


def test_64_paths_that_lead_nowhere(tmp_path: Path) -> None:
    (tmp_path / "loop.jsonl").symlink_to(tmp_path / "loop.jsonl")
    for path in ("loop.jsonl", "nothing-*.jsonl", "absent"):
        with pytest.raises((ConfigError, DataError), match=path.replace("*", ".")):
            validate(tmp_path / "out", tmp_path / path)


def test_64_folder_of_several_formats_and_containers(tmp_path: Path) -> None:
    write(tmp_path / "in/a.jsonl", jsonl([good(1)]))
    write(tmp_path / "in/b.json", json.dumps([IMPLICIT]).encode())
    _parquet(tmp_path / "in/c.parquet")
    outcome = validate(tmp_path / "out", tmp_path / "in")
    assert list(outcome.summary["formats"].values()) == [STRINGS, "implicit_prompt", STRINGS]
    assert len(outcome.pairs) == 4


def test_the_list_is_complete() -> None:
    numbers = {bad.number for bad in ROWS} | {number for number, *_ in FATAL + SOUND}
    alone = {11, 21, 26, 29, 30, 31, 56, 60, 61, 62, 63, 64}
    assert numbers | alone == set(range(1, 65))
    functions = [name for name in globals() if name.startswith("test_")]
    assert all(any(name.startswith(f"test_{number}_") for name in functions) for number in alone)
