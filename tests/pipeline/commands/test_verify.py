"""Tests of verify and show: faults are found and repaired, and rows and pairs are counted."""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml
from rich.console import Console, RenderableType

from pipeline.commands.show import show_run, show_stage
from pipeline.commands.verify import find_faults, repair, show_verdict, verdict_to_dict
from pipeline.plan import Plan, PlannedStage
from pipeline.resolve import ResolvedStage
from pipeline.runs import Run
from schemas.errors import DataError
from schemas.fingerprint import stage_fingerprint
from schemas.manifest import Counts, Manifest, decode_record, encode_record
from stages.store.filesystems import Folder
from stages.store.shards import StageDir, StageOutput
from stages.validate import STAGE
from stages.validate.formats.pair_drafts import PairDraft
from stages.validate.formats.row_reader import RowReader
from tests.end_to_end.conftest import plan_recipe, run_recipe, tiny_recipe, write_pairs
from tests.stages.validate.running import jsonl, validate, write
from tests.stages_running import open_output

STRINGS = "prompt_completion_strings"


READ_ONE = RowReader.read


def read_several(_: RowReader, row: Mapping[str, Any]) -> list[PairDraft]:
    best, *others = row["answers"]
    pairs = ({"prompt": "Q", "chosen": best, "rejected": other} for other in others)
    return [draft for pair in pairs for draft in READ_ONE(RowReader(format=STRINGS), pair)]


@pytest.fixture
def output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StageOutput:
    """Three rows: one gives two pairs and drops a third, one gives one, one is rejected."""
    monkeypatch.setattr(RowReader, "read", read_several)
    rows = [{"answers": answers} for answers in (["A", "B", " ", "C"], ["D", "E"], ["F", "F"])]
    file = write(tmp_path / "a.jsonl", jsonl(rows))
    outcome = validate(tmp_path / "store", file, format=STRINGS)
    output = open_output(outcome.out, "validate", outcome.shards, summary=outcome.summary)
    outcome.out.finish(output.manifest)
    return output


def plan_for(output: StageOutput, manifest: Manifest) -> Plan:
    """Plan the single stage as if it had finished with this manifest."""
    output.folder.write_bytes("manifest.json", encode_record(manifest))
    planned = PlannedStage(
        resolved=ResolvedStage(stage=STAGE, config=None, pins={}, inputs=()),
        fingerprint=stage_fingerprint("validate", manifest.version, manifest.config, {}),
        attempt=1,
        inputs={},
        out=StageDir(folder=output.folder, footer={}),
        state="done",
        why="",
        is_selected=True,
    )
    return Plan(
        recipe=None,  # type: ignore[arg-type]
        settings=None,  # type: ignore[arg-type]
        store=Folder("."),
        stages=[planned],
        warnings=[],
    )


def rendered(shown: RenderableType) -> str:
    console = Console(width=200)
    with console.capture() as capture:
        console.print(shown)
    return " ".join(capture.get().split())


def test_rows_are_accounted_for_though_pairs_are_more(output: StageOutput) -> None:
    verdict = find_faults(plan_for(output, output.manifest))
    assert verdict.faults == []
    assert verdict_to_dict(verdict)["rows"] == {
        "validate": {"in": 3, "kept": 2, "rejected": {"CHOSEN_EQ_REJECTED": 1}, "written": 3}
    }
    assert "validate 3 2 1 = 3" in rendered(show_verdict(verdict))


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"num_in": 4}, "validate: 4 rows in, but 2 kept and 1 rejected."),
        ({"num_out": 4}, "validate: data/ holds 3 rows, counted were 4."),
        ({"more": {"num_rows_kept": 4}, "num_in": 5}, "validate: 4 rows kept gave only 3 pairs."),
    ],
)
def test_a_count_that_does_not_add_up_is_a_fault(
    change: dict[str, Any], fault: str, output: StageOutput
) -> None:
    [shard] = output.manifest.shards
    counts = msgspec.structs.replace(shard.counts, **change)
    changed = msgspec.structs.replace(shard, counts=counts)
    output.folder.write_bytes("_commits/part-00000.json", encode_record(changed))
    manifest = msgspec.structs.replace(output.manifest, shards=[changed], counts=counts)
    [found] = find_faults(plan_for(output, manifest)).faults
    assert found.sentence == fault


def test_a_forged_manifest_differs_from_what_was_committed(output: StageOutput) -> None:
    """Its checksum is valid, but the counts were changed, or a shard was left out."""
    counts = msgspec.structs.replace(output.manifest.counts, num_in=5)
    manifest = msgspec.structs.replace(output.manifest, counts=counts)
    [found] = find_faults(plan_for(output, manifest)).faults
    assert "its counts are not the sum of its shards'" in found.sentence
    manifest = msgspec.structs.replace(output.manifest, shards=[], counts=Counts())
    found, *strangers = find_faults(plan_for(output, manifest)).faults
    assert "part-00000.json belongs to no shard in it" in found.sentence
    assert len(strangers) == 3


def test_a_manifest_with_another_config_has_another_fingerprint(output: StageOutput) -> None:
    plan = plan_for(output, output.manifest)
    forged = msgspec.structs.replace(output.manifest, config={"min_margin": 1})
    output.folder.write_bytes("manifest.json", encode_record(forged))
    [found] = find_faults(plan).faults
    assert "describes a stage with fingerprint" in found.sentence


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


PLANTED: list[tuple[str, Callable[[Path], None]]] = [
    ("validate/*/data/part-00000-*", flip_a_bit),
    ("validate/*/overview/part-00000-*", cut_short),
    ("dedupe/*/data/part-00001-*", cut_short),
    ("dedupe/*/rejected/part-00000-*", flip_a_bit),
    ("encode/*/data/part-00002-*", Path.unlink),
    ("encode/*/_commits/part-00001.json", cut_short),
    ("encode/*/_layout.json", cut_short),
    ("score/*/data/part-00000-*", flip_a_bit),
    ("score/*/manifest.json", flip_a_bit),
    ("train/*/model/model.safetensors", flip_a_bit),
    ("train/*/metrics.parquet", cut_short),
    ("evaluate/*/generations.parquet", flip_a_bit),
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A recipe that has run to its end."""
    folder = tmp_path_factory.mktemp("finished")
    write_pairs(folder / "pairs.jsonl")
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny_recipe(folder, tiny_model)))
    run_recipe(path)
    return path


def test_every_corruption_is_found_named_and_repaired(finished: Path, tmp_path: Path) -> None:
    """Twelve at once, in every stage, and an extra file; a repair restores the bytes."""
    store = tmp_path / "store"
    shutil.copytree(finished.parent / "store", store)
    before = {
        path.relative_to(store): path.read_bytes()
        for path in store.rglob("*")
        if path.is_file() and not {"_commits", "runs", "checks", "reference"} & set(path.parts)
    }
    victims = []
    for pattern, plant in PLANTED:
        [victim] = store.glob(pattern)
        plant(victim)
        victims.append(victim)
    stranger = next(store.glob("train/*/model")) / "pytorch_model.bin"
    stranger.write_bytes(b"a pickle")
    plan = plan_recipe(finished, store=store)
    assert plan.stage("score").state == "damaged"
    with pytest.raises(DataError, match="verify RECIPE --repair"):
        run_recipe(finished, store=store)
    verdict = find_faults(plan)
    sentences = "\n".join(fault.sentence for fault in verdict.faults)
    assert [str(victim) for victim in [*victims, stranger] if str(victim) not in sentences] == []
    redone = repair(plan, verdict)
    assert redone == [
        "validate: _commits/part-00000.json",
        "dedupe: _commits/part-00000.json, _commits/part-00001.json",
        "encode: _commits/part-00001.json, _commits/part-00002.json, _layout.json",
        "score: _commits/part-00000.json",
        "train and evaluate",
    ]
    run_recipe(finished, store=store)
    assert find_faults(plan_recipe(finished, store=store)).faults == []
    after = {name: (store / name).read_bytes() for name in before}
    provenance = {"manifest.json", "timings.parquet"}
    differ = {str(name) for name in before if after[name] != before[name]}
    assert {name for name in differ if Path(name).name not in provenance} == set()
    assert not stranger.exists()


def test_what_a_training_keeps_besides_is_no_fault(finished: Path, tmp_path: Path) -> None:
    """No record names checkpoints that stay and files of trackers."""
    shutil.copytree(finished.parent / "store", tmp_path / "store")
    overrides = (
        "stages.train.seed=1",
        "execution.train.keep_checkpoints=true",
        "execution.train.trackers=[tensorboard]",
    )
    run_recipe(finished, *overrides, store=tmp_path / "store")
    plan = plan_recipe(finished, *overrides, store=tmp_path / "store")
    names = {Path(file.name).parts[0] for file in plan.stage("train").out.folder.walk()}
    assert {"checkpoints", "tensorboard"} <= names
    assert find_faults(plan).faults == []


def test_the_digest_changes_with_any_manifest(finished: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    shutil.copytree(finished.parent / "store", store)
    before = find_faults(plan_recipe(finished, store=store))
    [path] = store.glob("evaluate/*/manifest.json")
    manifest = decode_record(path.read_bytes(), Manifest)
    manifest.summary["accuracy"] = 0.99
    path.write_bytes(encode_record(manifest))
    after = find_faults(plan_recipe(finished, store=store))
    assert after.faults == []  # A writer of the store can forge records that agree with each other.
    assert after.digest != before.digest


def test_show_tells_rows_from_pairs(output: StageOutput) -> None:
    [planned] = plan_for(output, output.manifest).stages
    text = rendered(show_stage(planned))
    assert "3 rows in, 2 as 3 pairs kept, 1 shards" in text
    assert "findings.num_pairs 3" in text
    assert "num_pairs_dropped 1" in text
    run = Run(name="made", outputs={"validate": output})
    assert "2 as 3 pairs kept, 1 rejected" in rendered(show_run(run, [STAGE]))


def test_show_says_what_is_notable_and_what_to_do(tmp_path: Path) -> None:
    rows = [
        {"prompt": "Q", "chosen": f"A{at}", "rejected": "B", "source": "x" if at else "y"}
        for at in range(10)
    ]
    outcome = validate(tmp_path / "store", write(tmp_path / "a.jsonl", jsonl(rows)))
    output = open_output(outcome.out, "validate", outcome.shards, summary=outcome.summary)
    [planned] = plan_for(output, output.manifest).stages
    text = rendered(show_stage(planned))
    assert "largest sources pairs share x 9 90.0% y 1 10.0%" in text
    assert "SOURCE_SKEW 90.0% of the pairs are from x. Noted where" in text
    assert "Take fewer rows of the large one" in text
