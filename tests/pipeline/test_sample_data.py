"""Tests that the sample data matches its README, and that its script still writes it.

The rows are read with a few lines of plain Python that share no code with the pipeline or the
script: an oracle for the numbers that both report.
"""

import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pyarrow.parquet as pq
import pytest

SAMPLE = Path(__file__).parents[2] / "pipeline" / "sample"
README = (SAMPLE / "README.md").read_text(encoding="utf-8")
PARQUET = "question_system.parquet"

Turns = tuple[tuple[str, str], ...]
Pair = tuple[Turns, str, str]


def raw_rows(path: Path) -> list[bytes]:
    """Read the rows of a file, each as a line of JSON."""
    if path.suffix == ".parquet":
        return [json.dumps(row).encode() for row in pq.read_table(path).to_pylist()]
    return path.read_bytes().split(b"\n")[:-1]


def sample_files() -> list[Path]:
    """List all data files."""
    return sorted([*SAMPLE.glob("*.jsonl"), *SAMPLE.glob("*.parquet")])


def turns(messages: list[dict[str, str]]) -> Turns:
    """Convert messages to plain tuples."""
    return tuple((message["role"], message["content"]) for message in messages)


def transcript(text: str) -> Turns:
    """Parse an HH transcript into plain tuples."""
    roles = {"Human": "user", "Assistant": "assistant"}
    _, *parts = re.split(r"\n\n(Human|Assistant):", text)
    return tuple(
        (roles[role], content.strip())
        for role, content in zip(parts[::2], parts[1::2], strict=True)
    )


def split_sides(chosen: Turns, rejected: Turns) -> Pair | str:
    """Make a pair of two whole conversations."""
    if chosen[:-1] != rejected[:-1]:
        return "PROMPT_MISMATCH"
    return chosen[:-1], chosen[-1][1], rejected[-1][1]


def read_pair(line: bytes) -> Pair | str:
    """Read a row of any of the six formats as a pair, or return the code of its fault."""
    try:
        row = json.loads(line.decode())
    except UnicodeDecodeError:
        return "ENCODING_INVALID"
    except json.JSONDecodeError:
        return "JSON_INVALID"
    match row:
        case list():
            return "JSON_NOT_OBJECT"
        case {"score_chosen": high, "score_rejected": low} if high <= low:
            return "TIE" if high == low else "SCORE_CONTRADICTS_LABEL"
        case {"messages": _, "chosen": chosen, "rejected": rejected}:
            return split_sides(turns(chosen), turns(rejected))
        case {"source": _, "prompt": prompt, "chosen": [chosen], "rejected": [rejected]}:
            return turns(prompt), chosen["content"], rejected["content"]
        case {"input": {"messages": prompt}, "preferred_output": [chosen]}:
            if "non_preferred_output" not in row:
                return "SCHEMA_MISMATCH"
            return turns(prompt), chosen["content"], row["non_preferred_output"][0]["content"]
        case {"prompt": prompt, "preferred": chosen, "dispreferred": rejected}:
            return (("user", prompt),), chosen, rejected
        case {"system": system, "question": question, "chosen": chosen, "rejected": rejected}:
            prompt = (("system", system), ("user", question))
            return (prompt if system else prompt[1:]), chosen, rejected
        case {"chosen": chosen, "rejected": rejected}:
            return split_sides(transcript(chosen), transcript(rejected))
    raise AssertionError(f"no known format: {row}")


def find_fault(pair: Pair) -> str | None:
    """Find the code of what is wrong with the content of a pair."""
    prompt, chosen, rejected = pair
    roles = [role for role, _ in prompt]
    spoken = [role for role in roles if role != "system"]
    faults = {
        "PROMPT_EMPTY": not prompt[-1][1].strip(),
        "CHOSEN_EMPTY": not chosen.strip(),
        "REJECTED_EMPTY": not rejected.strip(),
        "CHOSEN_EQ_REJECTED": chosen.strip() == rejected.strip(),
        "ROLE_UNKNOWN": not {*roles} <= {"system", "user", "assistant"},
        "SYSTEM_NOT_FIRST": "system" in roles[1:],
        "PROMPT_LAST_ROLE": roles[-1] == "assistant",
        "ROLE_ORDER": any(a == b for a, b in pairwise(spoken)),
    }
    found = [code for code, is_found in faults.items() if is_found]
    assert len(found) <= 1, f"{found}: a row should show one fault only"
    return found[0] if found else None


def tidy(text: str) -> str:
    """Remove the differences that do not make another pair."""
    return text.replace("\r\n", "\n").rstrip()


@pytest.fixture(scope="module")
def codes_and_pairs() -> tuple[Counter[str], list[Pair]]:
    """Count the rows by fault, and collect the pairs of all other rows."""
    codes: Counter[str] = Counter()
    pairs: list[Pair] = []
    for line in (line for path in sample_files() for line in raw_rows(path)):
        pair = read_pair(line)
        code = pair if isinstance(pair, str) else find_fault(pair)
        if code is not None:
            codes[code] += 1
        elif not isinstance(pair, str):
            pairs.append((pair[0], tidy(pair[1]), tidy(pair[2])))
    return codes, pairs


def readme_table(row: str) -> Iterator[tuple[str, ...]]:
    """Return the groups of every line of the README that matches `row`."""
    return (match.groups() for match in re.finditer(row, README, re.MULTILINE))


def test_script_writes_the_committed_bytes(tmp_path: Path) -> None:
    """Parquet files name the version of their writer, so only their rows are compared."""
    command = [sys.executable, str(SAMPLE / "make_sample.py"), "--output", str(tmp_path)]
    subprocess.run(command, check=True)

    assert sorted(path.name for path in tmp_path.iterdir()) == [p.name for p in sample_files()]
    for committed in sample_files():
        if committed.suffix == ".jsonl":
            assert (tmp_path / committed.name).read_bytes() == committed.read_bytes()
    assert pq.read_table(tmp_path / PARQUET).equals(pq.read_table(SAMPLE / PARQUET))


def test_readme_counts_the_rows_of_each_file() -> None:
    stated = {name: int(rows) for name, rows in readme_table(r"^\| `([\w.]+)` \|.*\| (\d+) \|$")}
    assert stated == {path.name: len(raw_rows(path)) for path in sample_files()}


def test_readme_counts_the_broken_rows(
    codes_and_pairs: tuple[Counter[str], list[Pair]],
) -> None:
    stated = {code: int(rows) for code, rows in readme_table(r"^\| `([A-Z_]+)` \| (\d+) \|")}
    assert codes_and_pairs[0] == stated


def test_duplicates_and_conflicts_are_counted(
    codes_and_pairs: tuple[Counter[str], list[Pair]],
) -> None:
    """386 rows without 24 broken ones: 346 pairs, 12 repeated, 4 with swapped labels."""
    pairs = codes_and_pairs[1]
    different = set(pairs)
    swapped = {pair for pair in different if (pair[0], pair[2], pair[1]) in different}
    left = different - swapped

    assert len(pairs) == 362
    assert len(pairs) - len(different) == 12
    assert len(swapped) == 8
    assert len(left) == 342
    assert len({prompt for prompt, _, _ in left}) == 291


def test_broken_rows_stay_below_the_default_limit(
    codes_and_pairs: tuple[Counter[str], list[Pair]],
) -> None:
    """A run stops when a tenth of all rows is faulty; the demo must stay far below that."""
    codes, pairs = codes_and_pairs
    assert codes.total() / (codes.total() + len(pairs)) < 0.08


def test_length_does_not_tell_chosen_from_rejected(
    codes_and_pairs: tuple[Counter[str], list[Pair]],
) -> None:
    """Otherwise the model could learn to be brief or wordy instead of kind."""
    pairs = codes_and_pairs[1]
    longer = sum(len(chosen) > len(rejected) for _, chosen, rejected in pairs) / len(pairs)
    assert 0.4 < longer < 0.6
