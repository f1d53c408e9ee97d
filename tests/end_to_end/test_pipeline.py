"""The whole pipeline from raw JSONL to an exported model: accounting, reuse and equal bytes."""

from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline import open_run
from pipeline.commands.verify import find_faults
from pipeline.plan import make_plan
from pipeline.stage_list import STAGE_NAMES
from schemas.errors import ConfigError
from schemas.manifest import Manifest, decode_record, encode_record
from schemas.rows import STAGE_TABLES
from tests.end_to_end.conftest import (
    BROKEN_LINES,
    NUM_PAIRS,
    assert_values_agree,
    list_contents,
    plan_recipe,
    run_recipe,
    write_pairs,
)

TO_SCORE = ("validate", "dedupe", "encode", "score")


def states(path: Path, *overrides: str, **selection: Any) -> dict[str, str]:
    """Map each stage to its state in a plan."""
    plan = plan_recipe(path, *overrides, **selection)
    return {stage.name: stage.state for stage in plan.stages}


def test_every_input_row_is_accounted_for_down_to_the_trained_pairs(finished: Path) -> None:
    run = run_recipe(finished)
    counts = {stage: run.manifest(stage).counts for stage in TO_SCORE}
    assert counts["validate"].num_in == NUM_PAIRS + 1 + len(BROKEN_LINES)
    assert counts["validate"].num_rejected == len(BROKEN_LINES)
    assert counts["dedupe"].reasons == {"DUP_EXACT": 1}
    assert counts["score"].num_out == NUM_PAIRS
    verdict = find_faults(plan_recipe(finished))
    assert verdict.faults == []
    assert verdict.missing == []
    splits = dict(run.scan("encode").group_by("split").len().collect().iter_rows())
    assert splits["eval"] == run.manifest("evaluate").counts.num_out > 0
    steps = run.scan("train", "metrics").collect()
    assert steps["num_pairs"].sum() == 2 * splits["train"]


def test_polars_reads_every_stage_with_the_documented_columns(finished: Path) -> None:
    plan = plan_recipe(finished)
    for stage in plan.stages:
        glob = "metrics.parquet" if stage.name == "train" else "data/*.parquet"
        found = pl.scan_parquet(f"{stage.out.folder.uri}/{glob}").collect_schema().names()
        assert found == [column.name for column in STAGE_TABLES[stage.name].columns]
    assert pl.read_parquet(f"{plan.stage('score').out.folder.uri}/rejected/*.parquet").is_empty()


def test_first_loss_is_ln_2_and_rewards_follow_from_the_files(finished: Path) -> None:
    """Recompute evaluate's rewards from its log-probs, and those from the exported model."""
    run = open_run(str(finished.parent / "store"), "tiny")
    metrics = run.scan("train", "metrics").collect()
    assert metrics["loss"][0] == pytest.approx(0.6931471805599453, abs=1e-5)
    rows = run.scan("evaluate").collect()
    expected = 0.1 * (rows["policy_chosen_logp"] - rows["ref_chosen_logp"])
    assert (rows["reward_chosen"] - expected).abs().to_numpy().max() < 1e-9
    encoded = run.scan("encode").join(run.scan("evaluate"), on="pair_id", how="semi").collect()
    model = AutoModelForCausalLM.from_pretrained(
        run.outputs["train"].folder.uri + "/model", dtype=torch.float32
    )
    for row in encoded.to_dicts():
        ids = torch.tensor([row["prompt_ids"] + row["chosen_ids"]])
        logps = model(ids).logits.log_softmax(-1)[0, :-1].gather(-1, ids[0, 1:, None])[:, 0]
        found = rows.filter(pl.col("pair_id") == row["pair_id"])["policy_chosen_logp"][0]
        assert found == pytest.approx(logps[-len(row["chosen_ids"]) :].sum().item(), abs=1e-3)


def test_the_exported_model_answers_in_transformers(finished: Path) -> None:
    folder = open_run(str(finished.parent / "store"), "tiny").outputs["train"].folder.uri
    model = AutoModelForCausalLM.from_pretrained(f"{folder}/model")
    tokenizer = AutoTokenizer.from_pretrained(f"{folder}/model")
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], add_generation_prompt=True, return_tensors="pt"
    )
    ids = asked if isinstance(asked, torch.Tensor) else asked["input_ids"]
    assert model.generate(ids, max_new_tokens=3).shape[1] > ids.shape[1]


def test_a_second_run_has_nothing_to_do(finished: Path) -> None:
    assert set(states(finished).values()) == {"done"}


def test_changing_beta_reuses_the_scores(finished: Path) -> None:
    found = states(finished, "stages.train.loss.beta=0.2")
    assert [name for name, state in found.items() if state != "done"] == ["train", "evaluate"]
    why = plan_recipe(finished, "stages.train.loss.beta=0.2").stage("train").why
    assert "loss.beta: 0.1 -> 0.2" in why


def test_changing_the_template_redoes_encode_and_what_follows(finished: Path) -> None:
    found = states(finished, "stages.encode.template=none")
    assert [name for name, state in found.items() if state == "done"] == ["validate", "dedupe"]


@pytest.mark.parametrize(
    ("override", "first"),
    [
        ("stages.validate.eval_fraction=0.4", "validate"),
        ("stages.dedupe.rows_per_shard=8", "dedupe"),
        ("stages.encode.max_length=100", "encode"),
        ("stages.score.dtype=bfloat16", "score"),
        ("stages.train.seed=7", "train"),
        ("stages.evaluate.num_generations=3", "evaluate"),
    ],
)
def test_a_changed_key_redoes_its_stage_and_what_follows(
    finished: Path, override: str, first: str
) -> None:
    found = states(finished, override)
    redone = list(STAGE_NAMES[STAGE_NAMES.index(first) :])
    assert [name for name, state in found.items() if state != "done"] == redone


@pytest.mark.parametrize(
    "override",
    [
        "execution.score.num_workers=3",
        "execution.train.max_tokens_per_microbatch=999",
        "execution.validate.num_cpus_per_worker=0.5",
    ],
)
def test_execution_settings_redo_nothing(finished: Path, override: str) -> None:
    assert set(states(finished, override).values()) == {"done"}


def test_changed_data_redoes_everything(finished: Path, tmp_path: Path, tiny_model: Path) -> None:
    other = tmp_path / "pairs.jsonl"
    write_pairs(other, NUM_PAIRS + 1)
    found = states(finished, f"stages.validate.inputs=[{other}]")
    assert "done" not in found.values()


def test_again_runs_beside_the_old_output_and_all_that_follows_uses_it(
    recipe_path: Path,
) -> None:
    """dedupe runs a second time into `<fingerprint>.2`, which the next encode reads."""
    before = run_recipe(recipe_path, last="encode")
    after = run_recipe(recipe_path, again="dedupe", last="encode")
    assert after.manifest("dedupe").attempt == 2
    assert after.manifest("dedupe").fingerprint == before.manifest("dedupe").fingerprint
    assert after.manifest("encode").fingerprint != before.manifest("encode").fingerprint
    assert after.outputs["dedupe"].folder.uri.endswith(".2")
    assert states(recipe_path, last="encode")["encode"] == "done"
    contents = [
        {name.split("/", 1)[1]: sha for name, sha in list_contents(run, ["dedupe"]).items()}
        for run in (before, after)
    ]
    names = [sorted(name.rsplit("-", 1)[0] for name in found) for found in contents]
    assert names[0] == names[1]


def test_a_stage_whose_input_is_missing_says_what_to_run(recipe_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"score needs encode.*--from encode"):
        plan_recipe(recipe_path, only="score")


def test_planning_writes_nothing(recipe_path: Path) -> None:
    plan_recipe(recipe_path)
    assert not (recipe_path.parent / "store").exists()


@pytest.mark.ray
@pytest.mark.slow
def test_one_worker_and_two_under_ray_and_none_give_the_same_bytes(
    ray_cluster: None, finished: Path, tmp_path: Path
) -> None:
    ways = {
        "in process": open_run(str(finished.parent / "store"), "tiny"),
        "ray, one": run_recipe(
            finished,
            *(f"execution.{stage}.num_workers=1" for stage in TO_SCORE),
            store=tmp_path / "b",
            is_local=False,
            last="score",
        ),
        "ray, two": run_recipe(
            finished,
            *(f"execution.{stage}.num_workers=2" for stage in TO_SCORE),
            *(f"execution.{stage}.num_cpus_per_worker=1" for stage in TO_SCORE),
            store=tmp_path / "c",
            is_local=False,
            last="score",
        ),
    }
    contents = {way: list_contents(run, TO_SCORE) for way, run in ways.items()}
    assert contents["in process"] == contents["ray, one"] == contents["ray, two"]
    assert len(contents["in process"]) > 2 * len(TO_SCORE)


@pytest.mark.long
@pytest.mark.vllm
@pytest.mark.ray
@pytest.mark.slow
def test_two_replicas_of_vllm_give_the_values_of_one_other_engine(
    ray_cluster: None, recipe_path: Path, tmp_path: Path
) -> None:
    write_pairs(recipe_path.parent / "pairs.jsonl", num_pairs=200)
    expected = run_recipe(recipe_path, store=tmp_path / "transformers", last="score")
    scored = run_recipe(
        recipe_path,
        "stages.score.backend=vllm",
        "execution.score.num_workers=2",
        "execution.score.num_cpus_per_worker=1",
        "execution.score.kv_cache_gib=0.0625",
        is_local=False,
        last="score",
    )
    assert len({shard.writer for shard in scored.manifest("score").shards}) == 2
    assert_values_agree(scored, expected)


@pytest.mark.ray
def test_the_whole_pipeline_runs_under_ray(
    ray_cluster: None, finished: Path, tmp_path: Path
) -> None:
    """The metrics of Ray Train equal those of training in process, to rounding."""
    run = run_recipe(finished, store=tmp_path / "store", is_local=False)
    assert list(run.outputs) == list(STAGE_NAMES)
    here = open_run(str(finished.parent / "store"), "tiny").scan("train", "metrics").collect()
    there = run.scan("train", "metrics").collect()
    for name in ("loss", "rewards/margins", "grad_norm"):
        assert (here[name] - there[name]).abs().to_numpy().max() < 1e-4


def test_mixed_versions_are_warned_of(finished: Path) -> None:
    """A score manifest that names another transformers is warned of, and no other one is."""
    folder = Path(plan_recipe(finished).stage("score").out.folder.uri)
    original = (folder / "manifest.json").read_bytes()
    manifest = decode_record(original, Manifest)
    manifest.versions["transformers"] = "0.0.1"
    (folder / "manifest.json").write_bytes(encode_record(manifest))
    try:
        [warning] = plan_recipe(finished).warnings
    finally:
        (folder / "manifest.json").write_bytes(original)
    assert "score was made with transformers 0.0.1" in warning
    assert "--again score" in warning
    assert make_plan(plan_recipe(finished).recipe, has_gpus=False).warnings == []
