"""Pairs that contain a benchmark's prompt or answer, found by text or by hashes."""

import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from schemas.errors import ConfigError, DataError
from stages.dedupe.config import BenchmarkConfig
from stages.dedupe.contamination import hash_benchmark, pin_benchmarks, write_hash_list
from tests.stages.dedupe.running import at, dedupe, kept_places, rejected_codes, say
from tests.stages_rows import message, pair_row
from tests.stages_running import read_rows

LONG, SHORT, ANSWER = say(20, 1), "who wrote Faust?", say(12, 2)


def pairs() -> list[dict[str, Any]]:
    """Return numbered pairs; those in HELD contain a benchmark's text."""
    words = LONG.split()
    turns = [message("user", "hi"), message("assistant", LONG), message("user", "go on")]
    earlier = [message("user", LONG), message("assistant", "yes"), message("user", "go on")]
    prompts: list[Any] = [
        LONG,
        f"Please: {LONG.upper()}! Thanks.",
        " ".join(words[:10]),
        " ".join(words[:9]),
        " ".join([*words[:8], "then", *words[8:16]]),
        " ".join([*words[:5], "then", *words[5:12]]),
        "Who wrote FAUST",
        "tell me who wrote Faust?",
        turns,
        earlier,
        f"unlike others {say(9, 3)}",
    ]
    rows = [pair_row(p, f"good {say(9, 50 + k)}", "bad") for k, p in enumerate(prompts)]
    rows.append(pair_row("what then?", f"well: {ANSWER}", "bad"))
    rows.append(pair_row("what else?", "bad", f"well: {ANSWER}"))
    return [at(place, row) for place, row in enumerate(rows)]


HELD = [0, 1, 2, 4, 6, 9, 11]
"""Ten of twenty consecutive words cover half, nine do not; two runs of eight cover 16; runs of
five and seven contain no 8-gram; a short prompt counts only as a whole turn; an assistant's turn is
not a prompt; an answer counts where it is chosen and has 8 words."""


@pytest.fixture
def jsonl(tmp_path: Path) -> Path:
    path = tmp_path / "quiz.jsonl"
    rows = [{"prompt": LONG, "answer": ANSWER}, {"prompt": SHORT, "answer": "bad"}]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return path


def test_pairs_that_contain_a_benchmark_are_rejected(tmp_path: Path, jsonl: Path) -> None:
    out = dedupe(tmp_path, [pairs()], benchmarks=[str(jsonl)], near=None)
    assert rejected_codes(out) == dict.fromkeys(HELD, "EVAL_CONTAMINATED")
    assert kept_places(out) == sorted(set(range(13)) - set(HELD))
    for row in read_rows(out, "rejected"):
        assert "quiz" in row["detail"]
        assert row["kept_pair_id"] is None
        assert not set(LONG.split()) & set(row["detail"].split())


def test_words_between_two_hits_are_not_covered(tmp_path: Path) -> None:
    """The first and the last 8 of 40 words cover 0.4; with the 8 before the last, 0.6."""
    path = tmp_path / "quiz.txt"
    path.write_text(say(40, 1))
    words = say(40, 1).split()
    rows = [
        at(place, pair_row(" ".join([*words[:8], "then", *words[start:]]), "good", "bad"))
        for place, start in enumerate((32, 24))
    ]
    out = dedupe(tmp_path, [rows], benchmarks=[str(path)])
    assert rejected_codes(out) == {1: "EVAL_CONTAMINATED"}


def test_a_list_of_hashes_finds_the_same_as_the_texts(tmp_path: Path, jsonl: Path) -> None:
    hashes = tmp_path / "hashes.parquet"
    assert write_hash_list([str(jsonl)], str(hashes)) == 4
    outs = {
        name: dedupe(tmp_path / name, [pairs()], benchmarks=[str(path)], rows_per_shard=5)
        for name, path in (("texts", jsonl), ("hashes", hashes))
    }
    found = {name: read_rows(out, "rejected") for name, out in outs.items()}
    assert found["texts"] == found["hashes"]
    assert len(found["texts"]) >= len(HELD)
    content = pl.read_parquet(hashes)
    assert content.columns == ["benchmark", "is_answer", "num_words", "whole", "grams"]
    assert content["num_words"].to_list() == [20, 3, 12, 1]
    assert content["grams"].list.len().to_list() == [13, 0, 5, 0]


def test_every_kind_of_file_is_read(tmp_path: Path) -> None:
    text = tmp_path / "lines.txt"
    text.write_text(f"{LONG}\n\n{SHORT}\n")
    parquet = tmp_path / "table.parquet"
    pl.DataFrame({"question": [LONG, SHORT]}).write_parquet(parquet)
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps({"text": LONG}) + "\n" + json.dumps({"text": SHORT}) + "\n")
    benchmarks: dict[str, Any] = {
        "text": str(text),
        "parquet": {"path": str(parquet), "prompt_column": "question", "name": "named"},
        "jsonl": str(other),
    }
    for name, benchmark in benchmarks.items():
        out = dedupe(tmp_path / name, [pairs()], benchmarks=[benchmark], near=None)
        assert sorted(rejected_codes(out)) == HELD[:-1], name


def test_a_contaminated_pair_rejects_no_near_duplicate(tmp_path: Path) -> None:
    """The two are near-duplicates; the better one contains the short prompt as a whole turn."""
    path = tmp_path / "quiz.txt"
    path.write_text(SHORT)
    long = [say(40, 5), say(40, 6), say(40, 7)]
    asked = [message("user", SHORT), message("assistant", long[0]), message("user", long[1])]
    other = [message("user", f"{SHORT} eh"), *asked[1:]]
    rows = [
        at(0, pair_row(asked, say(40, 8), say(40, 9)), margin=5.0),
        at(1, pair_row(other, say(40, 8), say(40, 9))),
    ]
    assert kept_places(dedupe(tmp_path / "without", [rows])) == [0]
    out = dedupe(tmp_path / "with", [rows], benchmarks=[str(path)])
    assert rejected_codes(out) == {0: "EVAL_CONTAMINATED"}


def test_a_benchmark_is_known_by_its_content(tmp_path: Path) -> None:
    def identity(path: Path) -> Any:
        return pin_benchmarks([BenchmarkConfig(path=str(path))]).identity()

    here, there = tmp_path / "a.txt", tmp_path / "sub" / "a.txt"
    there.parent.mkdir()
    here.write_text("one\n")
    there.write_text("one\n")
    assert identity(here) == identity(there)
    there.write_text("two\n")
    assert identity(here) != identity(there)


def test_a_benchmark_that_changed_since_it_was_planned_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "quiz.txt"
    path.write_text("one\n")
    [file] = pin_benchmarks([BenchmarkConfig(path=str(path))]).files
    path.write_text("two\n")
    with pytest.raises(DataError, match="has changed"):
        hash_benchmark(file)
    path.unlink()
    with pytest.raises(DataError, match="same path"):
        hash_benchmark(file)


@pytest.mark.parametrize(
    ("content", "message"),
    [('{"question": "q"}', "prompt_column"), ("[1]", "not an object"), ("{", "cannot be read")],
)
def test_a_row_without_a_prompt_is_named(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "quiz.jsonl"
    path.write_text(content)
    with pytest.raises(DataError, match=message):
        write_hash_list([str(path)], str(tmp_path / "list.parquet"))


def test_a_missing_benchmark_is_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"stages\.dedupe\.benchmarks.*none\.txt"):
        pin_benchmarks([BenchmarkConfig(path=str(tmp_path / "none.txt"))])
