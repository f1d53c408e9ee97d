"""Tests of estimates: they reproduce what was measured, and name what is assumed."""

import json
from pathlib import Path

import pytest
import yaml

from pipeline.commands.estimate import (
    Assumptions,
    Estimate,
    make_estimate,
    parse_assumptions,
)
from pipeline.ray.session import Capacity
from schemas.errors import ConfigError
from stages.cost import size_model, train_flops
from tests.end_to_end.conftest import plan_recipe, run_recipe, tiny_recipe, write_pairs
from tests.test_run import call

HERE = Capacity(num_cpus=2, num_gpus=0, num_cpus_per_node=2)
ONE_SHARD = "stages.dedupe.rows_per_shard=100"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["num_pair=3"], "Did you mean 'num_pairs'"),
        (["num_pairs"], "write it as --assume num_pairs=1e8"),
        (["num_gpus=8"], "needs a kind"),
        (["gpu=h1"], "gpu"),
        (["utilisation=2"], "utilisation"),
    ],
)
def test_a_mistake_in_what_is_assumed_is_named(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_assumptions(words)


def test_what_is_assumed_is_read() -> None:
    assumed = parse_assumptions(["num_pairs=1e8", "gpu=h100", "num_gpus=64", "prompt_tokens=12.5"])
    assert (assumed.num_pairs, assumed.gpu, assumed.num_gpus) == (1e8, "h100", 64)
    assert (assumed.prompt_tokens, assumed.num_cpus) == (12.5, None)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    write_pairs(folder / "pairs.jsonl")
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny_recipe(folder, tiny_model)))
    run_recipe(path, ONE_SHARD)
    return path


def estimate(path: Path, *overrides: str, assumed: Assumptions | None = None) -> Estimate:
    plan = plan_recipe(path, ONE_SHARD, *overrides)
    return make_estimate(plan, HERE, assumed or Assumptions())


def test_what_is_done_takes_nothing(finished: Path) -> None:
    found = estimate(finished)
    assert [stage.hours for stage in found.stages] == [0.0] * 6
    assert found.num_pairs == 20


def test_the_estimate_of_what_was_measured_is_what_was_measured(finished: Path) -> None:
    """The same pairs at the same rates take the seconds of the manifests, up to the split."""
    plan = plan_recipe(finished, ONE_SHARD)
    found = estimate(finished, assumed=Assumptions(num_pairs=20))
    by_name = {stage.stage: stage for stage in found.stages}
    for name in ("encode", "score", "train"):
        manifest = plan.stage(name).out.manifest()
        assert manifest is not None
        assert by_name[name].hours * 3600 == pytest.approx(manifest.seconds, rel=0.2)
        assert f"as {name}/{manifest.fingerprint}" in by_name[name].basis
    twice = estimate(finished, assumed=Assumptions(num_pairs=40_000))
    longer = {stage.stage: stage.hours for stage in twice.stages}
    assert all(longer[name] > 3 * by_name[name].hours for name in ("encode", "score", "train"))


def test_bytes_a_row_are_measured_in_the_store(finished: Path) -> None:
    plan = plan_recipe(finished, ONE_SHARD)
    found = estimate(finished, assumed=Assumptions(num_pairs=20))
    for stage in found.stages[2:4]:
        folder = Path(plan.stage(stage.stage).out.folder.path)
        kinds = ("data", "rejected")
        stored = sum(path.stat().st_size for kind in kinds for path in (folder / kind).iterdir())
        assert stage.num_bytes == stored


def test_the_rows_of_training_are_stored(finished: Path) -> None:
    """Two more epochs are two more rows of 40 bytes for each of the 70 % that are trained on."""
    assumed = Assumptions(num_pairs=1e9)
    once, thrice = (
        estimate(finished, f"stages.train.num_epochs={epochs}", assumed=assumed)
        for epochs in (1, 3)
    )
    train = [next(s for s in found.stages if s.stage == "train") for found in (once, thrice)]
    assert train[1].num_bytes - train[0].num_bytes == pytest.approx(2 * 40 * 0.7e9)


def test_gpus_are_counted_by_their_peak(finished: Path) -> None:
    """A recipe with a batch of four pairs and four workers trains on four of 64 GPUs."""
    size = size_model(json.loads((_model(finished) / "config.json").read_text()))
    assumed = Assumptions(num_pairs=1e12, num_gpus=64, gpu="h100", utilisation=0.5)
    settings = ("execution.train.num_workers=4", "stages.train.num_epochs=3")
    found = estimate(finished, *settings, assumed=assumed)
    train = next(stage for stage in found.stages if stage.stage == "train")
    assert train.num_workers == 4
    assert train.gpu_hours == pytest.approx(4 * train.hours)
    lengths = found.lengths
    work = 3 * train_flops(size, lengths, 0.7e12, is_adapter=False, recomputes=False)
    assert train.hours * 3600 == pytest.approx(work / (4 * 0.5 * 989e12), rel=0.01)
    assert "50% of h100's peak" in train.basis


def _model(path: Path) -> Path:
    return Path(yaml.safe_load(path.read_text())["stages"]["score"]["model"])


def test_the_share_that_is_reused_is_looked_up(finished: Path, tmp_path: Path) -> None:
    """Twelve lines are scored, then all: the estimated share is what the run then reuses."""
    lines = (finished.parent / "pairs.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "half.jsonl").write_bytes(b"".join(lines[:12]))
    store = tmp_path / "store"
    half = f"stages.validate.inputs=[{tmp_path / 'half.jsonl'}]"
    run_recipe(finished, ONE_SHARD, half, store=store, last="score")
    run_recipe(finished, ONE_SHARD, store=store, last="encode")
    plan = plan_recipe(finished, ONE_SHARD, store=store)
    found = make_estimate(plan, HERE, Assumptions())
    run = run_recipe(finished, ONE_SHARD, store=store, last="score")
    counts = run.manifest("score").counts.more
    num_reused, num_scored = counts["num_sequences_reused"], counts["num_sequences_scored"]
    assert found.share_reused == num_reused / (num_reused + num_scored) > 0


def test_what_is_not_known_yet_is_asked_for(finished: Path, tmp_path: Path) -> None:
    plan = plan_recipe(finished, store=tmp_path / "empty")
    with pytest.raises(ConfigError, match="--assume num_pairs"):
        make_estimate(plan, HERE, Assumptions())
    with pytest.raises(ConfigError, match="prompt_tokens"):
        make_estimate(plan, HERE, Assumptions(num_pairs=100))
    lengths = Assumptions(num_pairs=100, prompt_tokens=9, chosen_tokens=3, rejected_tokens=4)
    found = make_estimate(plan, HERE, lengths)
    assert all("assumed" in stage.basis for stage in found.stages)


def test_the_command_prints_it_and_writes_nothing(finished: Path) -> None:
    store = finished.parent / "store"
    before = sorted(store.rglob("*"))
    options = ["--set", ONE_SHARD, "--set", "stages.train.seed=9"]
    shown = call("plan", finished, "--estimate", *options)
    assert shown.returncode == 0, shown.stderr
    assert "GPU-hours" in shown.stdout
    found = json.loads(call("plan", finished, "--estimate", "--json", *options).stdout)
    assert [stage["stage"] for stage in found["stages"] if stage["hours"]] == ["train", "evaluate"]
    assert sorted(store.rglob("*")) == before
