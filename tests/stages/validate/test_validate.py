"""The whole stage loses no row, repeats itself exactly, and stops on bad data."""

import dataclasses
import gzip
import hashlib
import json
import pickle
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.config import parse_config
from schemas.errors import ConfigError, DataError
from schemas.rows import PAIR, REJECTED
from stages.validate import STAGE
from stages.validate.check_rows import choose_split
from stages.validate.config import ValidateConfig
from stages.validate.formats import FORMATS
from stages.validate.formats.row_reader import RowReader
from stages.validate.inputs import InputConfig, find_inputs
from stages.validate.messages import new_message
from stages.validate.reading import JSONL, whole_file
from stages.validate.shard_layout import ValidateTask
from tests.stages.validate.processes import TwoProcesses
from tests.stages.validate.running import GOOD, Row, find_files, jsonl, spoken, validate, write
from tests.stages_running import make_context, stage_dir

STRINGS = "prompt_completion_strings"


def good(number: int, prompt: str = "Q") -> Row:
    return {"prompt": prompt, "chosen": f"good {number}", "rejected": "bad", "id": number}


def file_hashes(folder: Path) -> list[str]:
    return sorted(
        f"{file.parent.name} {hashlib.sha256(file.read_bytes()).hexdigest()}"
        for file in folder.glob("**/part-*.parquet")
    )


def test_pair_row_is_what_the_schema_says(tmp_path: Path) -> None:
    """All columns are written by hand; ids come from the formula, with json and hashlib alone."""
    row = {
        "prompt": "Q?",
        "chosen": " yes",
        "rejected": "no",
        "id": 7,
        "source": "made",
        "score_chosen": 3,
        "score_rejected": 1.5,
        "weight": 0.5,
        "tools": [{"name": "f"}],
        "lang": "en",
    }
    file = write(tmp_path / "pairs.jsonl", b"\n" + jsonl([row]))
    outcome = validate(tmp_path / "out", file)

    def id_of(value: object) -> str:
        text = json.dumps(value, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    def side(role: str, text: str) -> list[Row]:
        return [{"role": role, "content": text}]

    def whole(role: str, text: str) -> list[Row]:
        absent = dict.fromkeys(("reasoning", "tool_calls", "tool_call_id", "name"))
        return [{"role": role, "content": text, **absent}]

    tools = '[{"name":"f"}]'
    prompt, chosen, rejected = (
        side("user", "Q?"),
        side("assistant", " yes"),
        side("assistant", "no"),
    )
    assert outcome.pairs == [
        {
            "pair_id": id_of([prompt, chosen, rejected, tools]),
            "prompt_id": id_of([prompt, tools]),
            "prompt": whole("user", "Q?"),
            "chosen": whole("assistant", " yes"),
            "rejected": whole("assistant", "no"),
            "tools": tools,
            "score_chosen": 3.0,
            "score_rejected": 1.5,
            "margin": 1.5,
            "weight": 0.5,
            "source": "made",
            "source_file": file.as_posix(),
            "source_row": 1,
            "source_id": "7",
            "split": "train",
            "warnings": [],
            "extra": '{"lang":"en"}',
        }
    ]
    assert STAGE.version == 4  # Raise it when the row above changes.


def test_rejected_row_is_what_the_schema_says(tmp_path: Path) -> None:
    line = json.dumps(GOOD | {"prompt": "", "chosen": None}).encode()
    outcome = validate(tmp_path / "out", write(tmp_path / "a.jsonl", line), format=STRINGS)
    assert outcome.rejected == [
        {
            "code": "FIELD_NULL",
            "codes": ["FIELD_NULL"],
            "field": "chosen",
            "detail": "null",
            "source_file": (tmp_path / "a.jsonl").as_posix(),
            "source_row": 0,
            "pair_id": None,
            "kept_pair_id": None,
            "similarity": None,
            "raw": line,
            "raw_sha256": hashlib.sha256(line).hexdigest(),
        }
    ]


def test_source_is_the_file_stem_unless_the_row_says(tmp_path: Path) -> None:
    rows = [good(0), good(1) | {"dataset": "mine"}, good(2) | {"source": ""}]
    outcome = validate(tmp_path / "out", write(tmp_path / "hh.jsonl", jsonl(rows)))
    assert [pair["source"] for pair in outcome.pairs] == ["hh", "mine", "hh"]


def test_files_of_several_formats_are_read_in_the_order_given(tmp_path: Path) -> None:
    talk = {"prompt": [{"role": "user", "content": "Q"}]}
    sides = {side: [{"role": "assistant", "content": side}] for side in ("chosen", "rejected")}
    second = write(tmp_path / "a.jsonl", jsonl([talk | sides]))
    first = tmp_path / "b.parquet"
    pq.write_table(pa.Table.from_pylist([good(0)]), first)
    outcome = validate(tmp_path / "out", first, second)
    assert outcome.summary["formats"] == {first.as_posix(): STRINGS, second.as_posix(): "messages"}
    assert [pair["source"] for pair in outcome.pairs] == ["b", "a"]


def test_cutting_changes_shards_and_never_rows(tmp_path: Path) -> None:
    rows = [good(at) if at % 5 else b"{" if at % 2 else b"" for at in range(40)]
    file = write(tmp_path / "a.jsonl", jsonl(rows))
    whole = validate(tmp_path / "whole", file)
    assert len(whole.shards) == 1
    assert [row["source_row"] for row in whole.rejected] == [5, 15, 25, 35]
    for split_bytes in (250, 1000):
        cut = validate(tmp_path / str(split_bytes), file, split_bytes=split_bytes)
        assert len(cut.shards) > 1
        assert (cut.pairs, cut.rejected) == (whole.pairs, whole.rejected)


def test_two_processes_write_the_same_bytes_as_one(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", jsonl([good(at) if at % 9 else b"{" for at in range(60)]))
    config = ValidateConfig(
        inputs=[InputConfig(path=str(file))], split_bytes=1000, max_reject_fraction=1.0
    )
    inputs = find_inputs(config.inputs)
    for name, mapper in (("one", None), ("two", TwoProcesses())):
        ctx = make_context(stage_dir(tmp_path / name, "validate"), {}, pins={"inputs": inputs})
        if mapper is not None:
            ctx = dataclasses.replace(ctx, mapper=mapper)
        STAGE.run(config, ctx)
    assert file_hashes(tmp_path / "one") == file_hashes(tmp_path / "two")
    assert len(file_hashes(tmp_path / "one")) > 6


def test_resuming_does_only_what_is_missing(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", jsonl([good(at) for at in range(40)]))
    whole = validate(tmp_path / "out", file, split_bytes=500)
    before = file_hashes(tmp_path / "out")
    commits = sorted(tmp_path.glob("out/validate/*/_commits/*.json"))
    assert len(commits) == len(whole.shards)
    commits[1].unlink()
    others = [commit.stat().st_mtime_ns for commit in commits if commit.exists()]
    assert validate(tmp_path / "out", file, split_bytes=500).pairs == whole.pairs
    assert file_hashes(tmp_path / "out") == before
    assert [c.stat().st_mtime_ns for c in commits if c != commits[1]] == others


@pytest.mark.parametrize("max_pairs", [1, 4, 5, 6, 11, 99])
@pytest.mark.parametrize("split_bytes", [20, 1 << 20])
def test_max_pairs_takes_the_first_rows_across_files(
    max_pairs: int, split_bytes: int, tmp_path: Path
) -> None:
    """Five rows of JSONL (one broken, one line blank), five of gzip, five of Parquet."""
    lines = [b"", *(good(at) for at in range(3)), b"{", good(4)]
    files = [
        write(tmp_path / "a.jsonl", jsonl(lines)),
        write(tmp_path / "b.jsonl.gz", gzip.compress(jsonl([good(at) for at in range(5, 10)]))),
        tmp_path / "c.parquet",
    ]
    table = pa.Table.from_pylist([good(at) for at in range(10, 15)])
    pq.write_table(table, files[2], row_group_size=2)
    config = {"format": STRINGS, "split_bytes": split_bytes}
    outcome = validate(tmp_path / "out", *files, max_pairs=max_pairs, **config)
    expected = [str(at) for at in range(min(max_pairs, 15)) if at != 3]
    assert [pair["source_id"] for pair in outcome.pairs] == expected
    assert outcome.counts.num_in == min(max_pairs, 15)
    assert len(outcome.summary["formats"]) == -(-min(max_pairs, 15) // 5)


def test_max_pairs_reads_no_further_than_it_must(tmp_path: Path) -> None:
    """The bytes after the wanted and sampled rows may be unreadable."""
    first = write(tmp_path / "a.jsonl", jsonl([good(0)]))
    second = write(tmp_path / "b.jsonl", b"version https://git-lfs.github.com/spec/v1\n")
    assert len(validate(tmp_path / "out", first, second, max_pairs=1).pairs) == 1
    with pytest.raises(DataError):
        validate(tmp_path / "more", first, second, max_pairs=2)


def test_all_pairs_of_a_prompt_share_its_split(tmp_path: Path) -> None:
    """File, white space, Unicode composition and system message make no difference."""
    prompts = [f"Café {at}" for at in range(40)]
    variants = [f"Cafe\u0301  {at}\r\n" for at in range(40)]
    first = write(tmp_path / "a.jsonl", jsonl([good(at, p) for at, p in enumerate(prompts)]))
    second = write(
        tmp_path / "b.jsonl",
        jsonl([good(at, p) | {"system": "Be kind."} for at, p in enumerate(variants)]),
    )
    outcome = validate(tmp_path / "out", first, second, eval_fraction=0.5)
    splits = [pair["split"] for pair in outcome.pairs]
    assert splits[:40] == splits[40:]
    assert set(splits) == {"train", "eval"}
    assert outcome.counts.more["num_eval"] == splits.count("eval")


@pytest.mark.parametrize("variant", ["a  b", " a b", "a b ", "a\u00a0b", "a\tb", "a\u2028\x1cb"])
def test_white_space_does_not_move_a_prompt_to_the_other_split(variant: str) -> None:
    for seed in range(20):
        plain, other = (
            choose_split([new_message("user", text)], eval_fraction=0.5, seed=seed)
            for text in ("a b", variant)
        )
        assert plain == other


def test_the_space_is_the_only_printable_white_space() -> None:
    """The fast path of choose_split relies on it."""
    spaces = [chr(code) for code in range(0x110000) if chr(code).isspace()]
    assert [space for space in spaces if space.isprintable()] == [" "]


def test_eval_share_is_near_its_fraction_and_grows_by_adding() -> None:
    """1,000 prompts at 0.2: 200 expected, four standard deviations are 51."""

    def held_out(fraction: float, seed: int) -> set[int]:
        prompts = {at: [new_message("user", f"Prompt {at}")] for at in range(1000)}
        return {
            at
            for at, prompt in prompts.items()
            if choose_split(prompt, eval_fraction=fraction, seed=seed) == "eval"
        }

    small, large, other = held_out(0.2, 0), held_out(0.4, 0), held_out(0.2, 1)
    assert 149 <= len(small) <= 251
    assert small < large
    assert small != other
    assert held_out(0.0, 0) == set()
    assert len(held_out(1.0, 0)) == 1000


def test_too_many_faults_end_the_stage_with_what_is_wrong(tmp_path: Path) -> None:
    rows = [good(at) for at in range(7)] + [b"{", b"[]", GOOD | {"chosen": " "}]
    file = write(tmp_path / "a.jsonl", jsonl(rows))
    with pytest.raises(DataError) as caught:
        validate(tmp_path / "out", file, max_reject_fraction=0.29)
    message = str(caught.value)
    assert "3 of 10 rows have faults (30.0%; allowed are 29.0%)" in message
    assert "CHOSEN_EMPTY: 1 row. The chosen answer has no visible text." in message
    assert "a.jsonl row 9, chosen: found ' '" in message
    assert "\nstages: {validate: {max_reject_fraction: 0.3}}" in message
    assert "whose level can be set" not in message
    assert len(validate(tmp_path / "more", file, max_reject_fraction=0.3).pairs) == 7


def test_too_many_faults_show_how_a_rule_could_be_softened(tmp_path: Path) -> None:
    rows = [good(0), GOOD | {"rejected": "4"}, GOOD | {"rejected": "4"}, b"{", b"{", b"["]
    file = write(tmp_path / "a.jsonl", jsonl(rows))
    with pytest.raises(DataError) as caught:
        validate(tmp_path / "out", file, max_reject_fraction=0.5)
    message = str(caught.value)
    assert "\nstages: {validate: {max_reject_fraction: 0.84}}" in message  # 5 of 6 are 83.3 %.
    assert "\nstages: {validate: {rules: {CHOSEN_EQ_REJECTED: warn}}}" in message


def test_ties_are_no_faults(tmp_path: Path) -> None:
    rows = [good(0), *(good(at) | {"score_chosen": 5, "score_rejected": 5} for at in range(9))]
    file = write(tmp_path / "a.jsonl", jsonl(rows))
    outcome = validate(tmp_path / "out", file, max_reject_fraction=0.0)
    assert outcome.counts.reasons == {"TIE": 9}


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({}, "stages.validate.inputs: this key is required."),
        ({"inputs": []}, "stages.validate.inputs: "),
        (
            {"inputs": ["a"], "format": "hh"},
            "stages.validate.format: no such format; known are auto",
        ),
        ({"inputs": ["a"], "eval_fraction": 1.5}, "stages.validate.eval_fraction: "),
        ({"inputs": ["a"], "max_pairs": 0}, "stages.validate.max_pairs: "),
        ({"inputs": ["a"], "split_bytes": 0}, "stages.validate.split_bytes: "),
    ],
)
def test_mistake_in_the_config_is_named(settings_: Row, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(ValidateConfig, settings_, path="stages.validate")
    assert message in str(caught.value)


def test_description_of_a_shard_says_what_it_holds(tmp_path: Path) -> None:
    """It is part of the store's layout: a resumed run must find it unchanged."""
    (file,) = find_files(write(tmp_path / "a.jsonl", b"{}\n"))
    task = ValidateTask(index=0, split=whole_file(file, JSONL), reader=RowReader(format="messages"))
    assert task.description == f"{file.name} (jsonl, bytes 0 to 3) as messages"
    assert pickle.loads(pickle.dumps(task)) == task


TEXTS = st.sampled_from(["", " ", "a", "b", "\0", "\u202e", "é", "\n\nHuman: a\n\nAssistant: b"])
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | TEXTS
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "tool", "system", "x"]), "content": TEXTS},
        optional={"tool_calls": SCALARS, "name": SCALARS, "thinking": TEXTS},
    )
    | SCALARS,
    max_size=4,
)
COLUMN_NAMES = sorted({name for format_ in FORMATS.values() for name in format_.columns})
VALUES = TEXTS | MESSAGES | SCALARS | st.fixed_dictionaries({"messages": MESSAGES})
ROWS = st.dictionaries(
    st.sampled_from([*COLUMN_NAMES, "score_chosen", "score_rejected", "weight", "tools", "id"]),
    VALUES,
    max_size=7,
)
SHAPED_ROWS = st.fixed_dictionaries({"prompt": VALUES, "chosen": VALUES, "rejected": VALUES}) | ROWS
LINES = st.binary(max_size=30).map(lambda b: b.replace(b"\n", b"")) | SHAPED_ROWS.map(
    lambda row: json.dumps(row).encode()
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(lines=st.lists(LINES, max_size=12), format_name=st.sampled_from(sorted(FORMATS)))
def test_every_row_becomes_one_pair_or_one_rejected_row(
    tmp_path_factory: pytest.TempPathFactory, lines: list[bytes], format_name: str
) -> None:
    """For any bytes in a line: no row is lost or counted twice, and nothing crashes."""
    folder = tmp_path_factory.mktemp("rows")
    content = b"\n".join([b'{"first": 1}', *lines])
    outcome = validate(folder / "out", write(folder / "a.jsonl", content), format=format_name)
    numbers = [row["source_row"] for row in (*outcome.pairs, *outcome.rejected)]
    wanted = [at for at, line in enumerate(content.split(b"\n")) if line.strip()]
    assert sorted(numbers) == wanted
    raw = {row["source_row"]: row["raw"] for row in outcome.rejected}
    assert all(line == raw.get(at, line) for at, line in enumerate(content.split(b"\n")))
    assert outcome.counts.num_in == len(wanted)
    assert outcome.counts.reasons == Counter(row["code"] for row in outcome.rejected)
    for pair in outcome.pairs:
        assert spoken(pair["chosen"])[-1][0] == spoken(pair["rejected"])[-1][0] == "assistant"
        assert pair["chosen"] != pair["rejected"]


def test_files_have_the_documented_columns(tmp_path: Path) -> None:
    outcome = validate(tmp_path / "out", write(tmp_path / "a.jsonl", jsonl([GOOD])))
    (record,) = outcome.shards
    for role, schema in (("data", PAIR), ("rejected", REJECTED)):
        read = pq.read_schema(outcome.out.folder.file(record.files[role].name))
        assert read.remove_metadata() == schema.arrow
