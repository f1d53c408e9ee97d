"""Whole trainings: against a live reference, on several processes, killed and resumed."""

import gc
import hashlib
import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from torch import nn
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM, AutoTokenizer

from schemas.errors import ConfigError, DataError, StageFailed
from schemas.rows import EVAL_METRICS, METRICS, TIMINGS
from stages.policy.batches import Batch
from stages.policy.output_layer import TokenLogps
from stages.store.shards import StageOutput
from stages.train import STAGE, LoraSettings, TrainConfig, TrainExecution, trainer
from stages.train.config import TrainJob, read_outcome, read_stop
from stages.train.log import Line, MetricsLog, Stepped
from stages.train.order import order_epoch
from stages.train.policy import Policy
from stages.train.trainer import train
from stages.train.world import World
from tests.stages.train.made_data import (
    Row,
    load_plain,
    make_job,
    pin_start,
    plain_logps,
    score_rows,
    write_inputs,
)
from tests.stages.train.worker import start_workers
from tests.stages_running import QuietProgress, make_context, stage_dir

ALONE = World(device=torch.device("cpu"))
CONFIG = TrainConfig(
    dtype="float32",
    learning_rate=2e-3,
    lr_schedule="constant",
    num_epochs=2,
    global_batch_size=4,
    eval_every_steps=4,
)
"""17 training pairs: 5 steps per epoch, the last of one pair; 10 steps in all."""


@pytest.fixture(scope="session")
def straight(
    inputs: dict[str, StageOutput], reference: Path, tmp_path_factory: pytest.TempPathFactory
) -> TrainJob:
    """An uninterrupted training of CONFIG."""
    job = make_job(tmp_path_factory.mktemp("straight"), inputs, reference, CONFIG)
    train(job, ALONE)
    return job


def sha256s(job: TrainJob) -> dict[str, str]:
    """Hash every file that is promised to be reproducible."""
    outcome = read_outcome(job)
    assert outcome is not None
    folder = Path(job.out.folder.path)
    return {
        file.name: hashlib.sha256((folder / file.name).read_bytes()).hexdigest()
        for file in outcome.files
        if file.name != "timings.parquet"
    }


def resumes(job: TrainJob) -> list[dict[str, int]]:
    """Return the steps that a training resumed from, with the number of workers."""
    outcome = read_outcome(job)
    assert outcome is not None
    found: list[dict[str, int]] = outcome.summary["resumes"]
    return found


def read_metrics(job: TrainJob, name: str = "metrics") -> list[dict[str, float]]:
    rows: list[dict[str, float]] = pq.read_table(
        f"{job.out.folder.path}/{name}.parquet"
    ).to_pylist()
    return rows


def train_plainly(
    start: Path, reference: Path, rows: list[Row], config: TrainConfig
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Train by textbook DPO: both models in memory, every sequence alone, plain AdamW."""
    policy, ref = load_plain(start), load_plain(reference)
    optimizer = torch.optim.AdamW(
        policy.parameters(), lr=config.learning_rate, weight_decay=0.0, fused=False
    )
    sizes = [sum(row["split"] == "train" for row in half) for half in (rows[:11], rows[11:])]
    pairs = [row for row in rows if row["split"] == "train"]
    losses = []
    for epoch in range(config.num_epochs):
        order = order_epoch(sizes, [0, 0], seed=config.seed, epoch=epoch, window_bytes=1).pairs_P
        for begin in range(0, len(order), config.global_batch_size):
            batch = [pairs[number] for number in order[begin : begin + config.global_batch_size]]
            total = torch.zeros(())
            for row in batch:
                margin = torch.zeros(())
                for side, sign in (("chosen", 1), ("rejected", -1)):
                    with torch.no_grad():
                        ref_logps = plain_logps(ref, row, side)
                    mask = torch.tensor(row[f"{side}_loss_mask"] or [True] * len(ref_logps))
                    margin = (
                        margin + sign * (plain_logps(policy, row, side) - ref_logps)[mask].sum()
                    )
                total = total - row["weight"] * logsigmoid(0.1 * margin)
            loss = total / len(batch)
            optimizer.zero_grad()
            loss.backward()
            norm = torch.cat([p.grad.flatten() for p in policy.parameters()]).norm()
            for parameter in policy.parameters():
                parameter.grad *= min(1.0, config.max_grad_norm / (norm.item() + 1e-6))
            optimizer.step()
            losses.append(loss.item())
    return losses, dict(policy.named_parameters())


def test_trajectory_equals_that_of_a_live_reference(
    straight: TrainJob, encoded: list[Row], reference: Path
) -> None:
    losses, weights = train_plainly(reference, reference, encoded, CONFIG)
    assert [row["loss"] for row in read_metrics(straight)] == pytest.approx(losses, abs=1e-5)
    assert losses[-1] < 0.75 * losses[0], "something must have been learned"
    trained = AutoModelForCausalLM.from_pretrained(f"{straight.out.folder.path}/model")
    for name, parameter in trained.named_parameters():
        torch.testing.assert_close(parameter, weights[name], atol=2e-4, rtol=0)


def test_tables_of_a_training(straight: TrainJob) -> None:
    folder = Path(straight.out.folder.path)
    for name, schema in (
        ("metrics", METRICS),
        ("eval_metrics", EVAL_METRICS),
        ("timings", TIMINGS),
    ):
        assert pq.read_schema(folder / f"{name}.parquet").equals(schema.arrow)
    steps = read_metrics(straight)
    assert [row["step"] for row in steps] == list(range(1, 11))
    assert [row["num_pairs"] for row in steps] == [4, 4, 4, 4, 1] * 2
    assert [row["epoch"] for row in steps[:5]] == pytest.approx(
        [4 / 17, 8 / 17, 12 / 17, 16 / 17, 1]
    )
    evaluations = read_metrics(straight, "eval_metrics")
    assert [row["step"] for row in evaluations] == [0, 4, 8, 10]
    assert {row["num_pairs"] for row in evaluations} == {5}
    outcome = read_outcome(straight)
    assert outcome is not None
    assert outcome.summary["num_steps"] == 10
    assert outcome.summary["eval_before"]["rewards/margins"] == pytest.approx(0, abs=1e-5)
    assert outcome.summary["first"]["loss"] == steps[0]["loss"]
    assert outcome.summary["drift"]["is_reference"]


def test_first_loss_is_ln_2(inputs: dict[str, StageOutput], straight: TrainJob) -> None:
    """Times the mean weight, because some pairs have weight 0.5."""
    (first, *_) = read_metrics(straight, "eval_metrics")
    weights = [1.0 if number % 3 else 0.5 for number in range(5)]
    assert first["loss"] == pytest.approx(math.log(2) * sum(weights) / 5, abs=1e-6)


def test_training_again_gives_the_same_bytes(
    inputs: dict[str, StageOutput], reference: Path, straight: TrainJob, tmp_path: Path
) -> None:
    job = make_job(tmp_path, inputs, reference, CONFIG, checkpoint_every_steps=3)
    train(job, ALONE)
    assert sha256s(job) == sha256s(straight)


@pytest.mark.parametrize(
    "die_at",
    [
        "step:7",
        pytest.param("commit:6", marks=pytest.mark.slow),
        pytest.param("export", marks=pytest.mark.slow),
    ],
)
def test_a_killed_training_resumes_to_the_same_bits(
    die_at: str,
    inputs: dict[str, StageOutput],
    reference: Path,
    straight: TrainJob,
    tmp_path: Path,
) -> None:
    """Checkpoints are due after steps 2, 4, 6, 8; the one being written at death is incomplete."""
    job = make_job(tmp_path, inputs, reference, CONFIG, checkpoint_every_steps=2)
    (worker,) = start_workers(job, scratch=tmp_path / "scratch", die_at=die_at)
    assert worker.wait(timeout=100) == -9
    assert read_outcome(job) is None
    train(job, ALONE)
    assert sha256s(job) == sha256s(straight)
    outcome = read_outcome(job)
    assert outcome is not None
    resumed_at = {"step:7": 6, "commit:6": 4, "export": 8}[die_at]
    assert outcome.summary["resumes"] == [{"step": resumed_at, "num_workers": 1}]


def test_a_training_stopped_on_purpose_goes_on_to_the_same_bits(
    inputs: dict[str, StageOutput], reference: Path, straight: TrainJob, tmp_path: Path
) -> None:
    """0.45 of 10 steps is step 5, where nothing is evaluated or saved otherwise.

    Stopping there again takes no step and measures the same, as does asking for an earlier stop.
    """
    stops = []
    for fraction in (0.45, 0.45, 0.3):
        job = make_job(tmp_path, inputs, reference, CONFIG, stop_after=fraction)
        train(job, ALONE)
        stops.append(read_stop(job.out))
        assert read_outcome(job) is None
    assert stops[0] is not None
    assert (stops[0].step, stops[0].num_steps) == (5, 10)
    assert stops[0] == stops[1] == stops[2]
    train(make_job(tmp_path, inputs, reference, CONFIG), ALONE)
    assert sha256s(job) == sha256s(straight)


def interrupt(job: TrainJob, monkeypatch: pytest.MonkeyPatch) -> None:
    """Train until the export fails."""

    def fail(*_: object, **__: object) -> None:
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "export_model", fail)
        with pytest.raises(OSError, match="No space"):
            train(job, ALONE)


@pytest.mark.parametrize(
    ("damage", "resumed_at"),
    [("truncate weights", 6), ("remove optimizer", 6), ("change metrics", 6), ("remove all", None)],
)
def test_damaged_checkpoints_are_passed_over(
    damage: str,
    resumed_at: int | None,
    inputs: dict[str, StageOutput],
    reference: Path,
    straight: TrainJob,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    job = make_job(tmp_path, inputs, reference, CONFIG, checkpoint_every_steps=2)
    interrupt(job, monkeypatch)
    checkpoints = Path(job.out.folder.path) / "checkpoints"
    saved = sorted(path.name for path in checkpoints.glob("step-*"))
    assert saved == ["step-000006", "step-000008"]
    action, what = damage.split()
    if what == "all":
        shutil.rmtree(checkpoints)
    else:
        (file,) = (checkpoints / "step-000008").glob(f"{what}-*")
        content = file.read_bytes()
        if action == "remove":
            file.unlink()
        else:
            file.write_bytes(content[:-1] + (b"?" if action == "change" else b""))
    train(job, ALONE)
    assert sha256s(job) == sha256s(straight)
    outcome = read_outcome(job)
    assert outcome is not None
    assert [resume["step"] for resume in outcome.summary["resumes"]] == (
        [resumed_at] if resumed_at else []
    )


def compare_metrics(found: TrainJob, wanted: TrainJob) -> None:
    for name in ("dynamics", "eval_dynamics"):
        tables = [pq.read_table(f"{job.out.folder.path}/{name}.parquet") for job in (found, wanted)]
        for column in tables[0].column_names:
            values, wanted_values = (table[column].to_pylist() for table in tables)
            if isinstance(values[0], float):
                wanted_values = pytest.approx(wanted_values, rel=2e-4, abs=2e-4)
            assert values == wanted_values, (name, column)
    for name in ("metrics", "eval_metrics"):
        pairs = zip(read_metrics(found, name), read_metrics(wanted, name), strict=True)
        for row, wanted_row in pairs:
            for key, value in wanted_row.items():
                # Before the first step, these depend on the sign of rounding errors.
                is_sign = key == "rewards/accuracies" or key.startswith("displacement/")
                if value is None:
                    assert row[key] is None, (name, key)
                elif row["step"] > 1 or not is_sign:
                    assert row[key] == pytest.approx(value, rel=2e-4, abs=2e-4), (name, key)


@pytest.mark.parametrize("max_tokens", [1, 10_000])
def test_microbatches_change_only_rounding(
    max_tokens: int,
    inputs: dict[str, StageOutput],
    reference: Path,
    straight: TrainJob,
    tmp_path: Path,
) -> None:
    job = make_job(
        tmp_path,
        inputs,
        reference,
        CONFIG,
        max_tokens_per_microbatch=max_tokens,
        max_logits=320 * 7,
    )
    train(job, ALONE)
    compare_metrics(job, straight)


def test_micro_batches_without_memory_are_halved_before_the_first_step(
    inputs: dict[str, StageOutput],
    reference: Path,
    straight: TrainJob,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Memory for 170 tokens: of 640, 320 and 160 the last fits. A fixed number fails as before."""
    tried = []

    def rehearse(policy: Policy, batch: Batch) -> None:
        tried.append(batch.input_ids_RL.numel())
        if tried[-1] > 170:
            raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(trainer, "rehearse", rehearse)
    job = make_job(tmp_path / "auto", inputs, reference, CONFIG, max_tokens_per_microbatch="auto")
    train(job, ALONE)
    assert max(tried) > 170
    assert 1 < tried[-1] <= 160
    compare_metrics(job, straight)
    fixed = make_job(tmp_path / "fixed", inputs, reference, CONFIG, max_tokens_per_microbatch=640)
    with pytest.raises(StageFailed, match="Out of memory"):
        train(fixed, ALONE)


@pytest.mark.slow
def test_two_processes_change_only_rounding(
    inputs: dict[str, StageOutput], reference: Path, straight: TrainJob, tmp_path: Path
) -> None:
    """An epoch's last batch has one pair, so one process has only a filler."""
    job = make_job(tmp_path, inputs, reference, CONFIG, max_tokens_per_microbatch=60)
    workers = start_workers(job, scratch=tmp_path / "scratch", size=2)
    assert [worker.wait(timeout=100) for worker in workers] == [0, 0]
    compare_metrics(job, straight)
    models = [
        AutoModelForCausalLM.from_pretrained(f"{each.out.folder.path}/model")
        for each in (job, straight)
    ]
    for found, wanted in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(found, wanted, atol=2e-4, rtol=0)


def test_small_windows_train_on_every_pair(
    inputs: dict[str, StageOutput], reference: Path, tmp_path: Path
) -> None:
    config = TrainConfig(dtype="float32", global_batch_size=4, shuffle_window_bytes=1)
    job = make_job(tmp_path, inputs, reference, config)
    train(job, ALONE)
    assert sum(row["num_pairs"] for row in read_metrics(job)) == 17


def test_no_second_model_is_in_the_process(
    inputs: dict[str, StageOutput],
    reference: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """During training, the live parameters are exactly those of one model."""
    size = sum(parameter.numel() for parameter in load_plain(reference).parameters())
    gc.collect()
    before = {id(obj) for obj in gc.get_objects() if type(obj) is nn.Parameter}
    alive = []
    append = MetricsLog.append

    def count_and_append(log: MetricsLog, line: Line) -> None:
        if isinstance(line, Stepped):
            parameters = [o for o in gc.get_objects() if type(o) is nn.Parameter]
            alive.append(sum(p.numel() for p in parameters if id(p) not in before))
        append(log, line)

    monkeypatch.setattr(MetricsLog, "append", count_and_append)
    train(make_job(tmp_path, inputs, reference, CONFIG), ALONE)
    assert set(alive) == {size}


def test_scores_of_another_function_stop_the_training(
    encoded: list[Row], scored: list[Row], reference: Path, tmp_path: Path
) -> None:
    shifted = [
        {**row, "ref_chosen_token_logps": [logp + 0.01 for logp in row["ref_chosen_token_logps"]]}
        for row in scored
    ]
    inputs = write_inputs(tmp_path, encoded, shifted, reference=reference)
    with pytest.raises(ConfigError, match=r"maximum 0\.01"):
        train(make_job(tmp_path, inputs, reference, CONFIG), ALONE)


def test_another_start_is_recorded_and_trained(
    inputs: dict[str, StageOutput], other_model: Path, tmp_path: Path
) -> None:
    job = make_job(tmp_path, inputs, other_model, TrainConfig(dtype="float32"))
    train(job, ALONE)
    outcome = read_outcome(job)
    assert outcome is not None
    assert not outcome.summary["drift"]["is_reference"]
    assert outcome.summary["drift"]["median"] > 0.1
    assert outcome.summary["start_model"]["spec"] == str(other_model)


def test_too_little_memory_is_known_before_the_first_step(
    tmp_path: Path,
    inputs: dict[str, StageOutput],
    reference: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It shows before any pair is compared with the reference or evaluated."""

    def compute(policy: Policy, batch: Batch, with_log_collision: bool = False) -> TokenLogps:
        assert torch.is_grad_enabled(), "the rehearsal must come first"
        assert all(p.grad is not None for p in policy.trained_parameters.values())
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(Policy, "completion_tokens", compute)
    monkeypatch.setattr(trainer, "take_step", None)
    with pytest.raises(StageFailed, match=r"Out of memory \(no room\): .*microbatch"):
        train(make_job(tmp_path, inputs, reference, CONFIG), ALONE)


def test_having_no_pairs_to_train_on_is_an_error(
    encoded: list[Row], scored: list[Row], reference: Path, tmp_path: Path
) -> None:
    held_out = [{**row, "split": "eval"} for row in encoded]
    inputs = write_inputs(tmp_path, held_out, scored, reference=reference)
    with pytest.raises(DataError, match="nothing to train on"):
        train(make_job(tmp_path, inputs, reference, CONFIG), ALONE)


def test_training_without_held_out_pairs(
    encoded: list[Row], scored: list[Row], reference: Path, tmp_path: Path
) -> None:
    everything = [{**row, "split": "train"} for row in encoded]
    inputs = write_inputs(tmp_path, everything, scored, reference=reference)
    job = make_job(tmp_path, inputs, reference, TrainConfig(dtype="float32"))
    train(job, ALONE)
    assert read_metrics(job, "eval_metrics") == []
    outcome = read_outcome(job)
    assert outcome is not None
    assert outcome.summary["eval_after"] is None
    with pytest.raises(DataError, match="judged by held-out pairs, but no pair is held out"):
        train(make_job(tmp_path, inputs, reference, CONFIG, stop_after=0.5), ALONE)


def test_exported_model_is_complete(straight: TrainJob, reference: Path) -> None:
    model = Path(straight.out.folder.path) / "model"
    for name in ("generation_config.json", "tokenizer.json", "chat_template.jinja"):
        assert (model / name).read_bytes() == (reference / name).read_bytes()
    configs = [json.loads((folder / "config.json").read_bytes()) for folder in (model, reference)]
    assert configs[0] == {**configs[1], "dtype": "float32"}
    messages = [{"role": "user", "content": "Why is the sky blue?"}]
    assert AutoTokenizer.from_pretrained(model).apply_chat_template(
        messages, tokenize=False
    ) == AutoTokenizer.from_pretrained(reference).apply_chat_template(messages, tokenize=False)
    card = (model / "README.md").read_text()
    for fact in ("17 pairs", "learning_rate: 0.002", "10 steps", straight.start.weights):
        assert fact in card
    assert str(reference) not in card


def test_export_is_the_policy_that_was_trained_and_not_rounded(
    encoded: list[Row], reference: Path, tmp_path: Path
) -> None:
    """With a low learning rate from a bfloat16 release, rounding would undo the changes."""
    start = tmp_path / "start"
    load_plain(reference).to(torch.bfloat16).save_pretrained(start)
    AutoTokenizer.from_pretrained(reference).save_pretrained(start)
    scored = score_rows(encoded, start)
    inputs = write_inputs(tmp_path, encoded, scored, reference=start)
    config = TrainConfig(dtype="float32", learning_rate=5e-5, num_epochs=4)
    job = make_job(tmp_path, inputs, start, config)
    train(job, ALONE)
    outcome = read_outcome(job)
    assert outcome is not None
    exported = AutoModelForCausalLM.from_pretrained(f"{job.out.folder.path}/model", dtype="auto")
    assert exported.dtype == torch.float32

    def reward(row: Row, side: str) -> float:
        mask = torch.tensor(row[f"{side}_loss_mask"] or [True] * row[f"num_{side}_tokens"])
        ref = next(other for other in scored if other["pair_id"] == row["pair_id"])
        gained = plain_logps(exported, row, side) - torch.tensor(ref[f"ref_{side}_token_logps"])
        return 0.1 * gained[mask].sum().item()

    with torch.no_grad():
        held_out = [row for row in encoded if row["split"] == "eval"]
        margins = [reward(row, "chosen") - reward(row, "rejected") for row in held_out]
    found = outcome.summary["eval_after"]["rewards/margins"]
    assert abs(found) > 1e-4
    assert sum(margins) / len(margins) == pytest.approx(found, abs=1e-6)


def test_lora_exports_the_adapter_and_the_merged_model(
    inputs: dict[str, StageOutput], encoded: list[Row], reference: Path, tmp_path: Path
) -> None:
    from peft import PeftModel

    config = TrainConfig(
        dtype="float32", learning_rate=1e-2, global_batch_size=4, lora=LoraSettings(rank=4)
    )
    job = make_job(tmp_path, inputs, reference, config)
    train(job, ALONE)
    folder = job.out.folder.path
    merged = load_plain(Path(folder) / "model")
    adapted = PeftModel.from_pretrained(load_plain(reference), f"{folder}/adapter")
    base = load_plain(reference)
    with torch.no_grad():
        for side in ("chosen", "rejected"):
            wanted = plain_logps(adapted, encoded[6], side)
            torch.testing.assert_close(
                plain_logps(merged, encoded[6], side), wanted, atol=1e-4, rtol=0
            )
            assert (plain_logps(base, encoded[6], side) - wanted).abs().max() > 1e-2


def test_lora_with_dropout_resumes_to_the_same_bits(
    inputs: dict[str, StageOutput],
    reference: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = TrainConfig(
        dtype="float32",
        learning_rate=1e-2,
        global_batch_size=4,
        lora=LoraSettings(rank=4, dropout=0.3),
    )
    straight = make_job(tmp_path / "straight", inputs, reference, config)
    train(straight, ALONE)
    resumed = make_job(tmp_path / "resumed", inputs, reference, config, checkpoint_every_steps=2)
    interrupt(resumed, monkeypatch)
    train(resumed, ALONE)
    assert sha256s(resumed) == sha256s(straight)
    outcome = read_outcome(resumed)
    assert outcome is not None
    assert outcome.summary["resumes"][0]["step"] == 4


def run_stage(
    folder: Path, inputs: Mapping[str, StageOutput], start: Path
) -> tuple[TrainJob, QuietProgress]:
    context = make_context(
        stage_dir(folder, "train"),
        inputs,
        pins=pin_start(start),
        execution=TrainExecution(max_tokens_per_microbatch=200, checkpoint_every_steps=4),
    )
    result = STAGE.run(CONFIG, context)
    assert {file.name for file in result.files} >= {"metrics.parquet", "model/model.safetensors"}
    assert isinstance(context.progress, QuietProgress)
    return make_job(folder, inputs, start, CONFIG), context.progress


def test_stage_in_this_process(
    inputs: dict[str, StageOutput], reference: Path, straight: TrainJob, tmp_path: Path
) -> None:
    job, progress = run_stage(tmp_path, inputs, reference)
    assert sha256s(job) == sha256s(straight)
    assert (progress.done, progress.total) == (10, 10)
    for name in ("loss", "margin", "accuracy", "tokens/s", "pairs/s"):
        assert name in progress.notes[-1]
    left = {path.name for path in Path(job.out.folder.path).iterdir()}
    assert left == {
        "model",
        "metrics.parquet",
        "eval_metrics.parquet",
        "timings.parquet",
        "dynamics.parquet",
        "eval_dynamics.parquet",
        "_work",
    }
    # A run killed before it writes the manifest does not train again.
    weights = Path(job.out.folder.path) / "model" / "model.safetensors"
    written_at = weights.stat().st_mtime_ns
    run_stage(tmp_path, inputs, reference)
    assert weights.stat().st_mtime_ns == written_at


def test_a_store_that_is_not_local(
    inputs: dict[str, StageOutput],
    reference: Path,
    straight: TrainJob,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from dataclasses import replace

    from stages.store.filesystems import Folder

    job = make_job(Path("unused"), inputs, reference, CONFIG, checkpoint_every_steps=4)
    job = replace(job, out=replace(job.out, folder=Folder("memory://store/train/0123")))
    interrupt(job, monkeypatch)
    assert job.out.folder.exists("checkpoints/step-000008/commit.json")
    train(job, ALONE)
    wanted = sha256s(straight)
    assert {name: job.out.folder.sha256(name) for name in wanted} == wanted
