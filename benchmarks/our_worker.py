"""One measurement of our training loop or scorers, from Parquet and without Ray."""

import time
from itertools import islice, pairwise

import torch

from benchmarks.measurement import (
    Measurement,
    Row,
    Setting,
    find_device,
    now,
    peak_memory_bytes,
    run_worker,
)
from benchmarks.pairs import read_encoded
from benchmarks.work import count_flops, measure_matmul_peak
from pipeline import open_run
from stages.models.resolve import pin_model
from stages.scorers.opening import open_scorer
from stages.scorers.pairs import SIDES, join_side, list_groups, score_sequences
from stages.scorers.protocol import ScorerSettings
from stages.store.shards import StageOutput
from stages.train import TrainConfig, TrainExecution
from stages.train.losses import SigmoidLoss
from stages.train.microbatch import (
    Layout,
    lay_out_blank,
    plan_epoch,
    prefetch,
    read_batches,
)
from stages.train.order import keep_order
from stages.train.pairs import index_pairs
from stages.train.policy import make_optimizer, open_policy
from stages.train.sharding import shard_policy
from stages.train.step import rehearse, take_step
from stages.train.world import World


def measure(setting: Setting, row: Row) -> Measurement:
    torch.set_num_threads(setting.num_threads)
    if row.work == "train":
        world = World(device=find_device())
        with world.joined():
            return measure_training(setting, row, world)
    assert row.backend is not None
    encode = open_run(setting.store, setting.run).outputs["encode"]
    settings = ScorerSettings(
        backend=row.backend,
        dtype=setting.dtype,
        max_length=encode.manifest.config["max_length"],
        num_threads=setting.num_threads,
    )
    return measure_scoring(encode, setting.model, settings)


def measure_training(setting: Setting, row: Row, world: World) -> Measurement:
    """Run the training loop with default execution settings, in the order of the store."""
    config = TrainConfig(
        loss=SigmoidLoss(beta=setting.beta),
        learning_rate=setting.learning_rate,
        lr_schedule="constant",
        global_batch_size=setting.global_batch_size,
        dtype=setting.dtype,
        lora=setting.lora,
    )
    execution = TrainExecution(gradient_checkpointing=row.gradient_checkpointing)
    outputs = open_run(setting.store, setting.run).outputs
    index = index_pairs(outputs)["train"]
    policy = open_policy(
        config,
        execution,
        pin_model(setting.model),
        device=world.device,
        max_length=index.max_sequence_length,
    )
    if execution.shards(world.device.type):
        policy = shard_policy(policy, world)
    optimizer = make_optimizer(policy, config)
    order = keep_order(index.num_pairs_S.tolist())
    layout = Layout(max_tokens=execution.tokens_per_microbatch(world.device.type), rows=policy.rows)
    cut = {"batch_size": config.global_batch_size, "layout": layout, "world": world}
    largest = plan_epoch(index, order, **cut).largest
    rehearse(policy, lay_out_blank(index, largest, layout=layout, device=world.device))
    batches = read_batches(index, order, **cut)
    startup_memory_bytes = peak_memory_bytes()
    began_at, times = time.time(), [now()]
    steps, num_tokens, model_flops = [], 0, 0.0
    for step, batch in enumerate(prefetch(islice(batches, setting.num_steps)), start=1):
        metrics = take_step(
            policy,
            optimizer,
            batch,
            config,
            step=step,
            learning_rate=config.learning_rate,
            world=world,
        )
        times.append(now())
        steps.append(metrics)
        num_tokens += batch.num_padded_tokens
        model_flops += count_flops(policy.model, batch)
    return Measurement(
        began_at=began_at,
        seconds=times[-1] - times[0],
        num_tokens_computed=num_tokens,
        startup_memory_bytes=startup_memory_bytes,
        peak_memory_bytes=peak_memory_bytes(),
        step_seconds=[end - start for start, end in pairwise(times)],
        step_tokens=[int(metrics["num_tokens"]) for metrics in steps],
        num_weights=sum(parameter.numel() for parameter in policy.model.parameters()),
        model_flops=model_flops,
        peak_flops_per_second=measure_matmul_peak(setting.dtype),
        losses=[metrics["loss"] for metrics in steps],
        logps=[[metrics["logps/chosen"], metrics["logps/rejected"]] for metrics in steps],
    )


def measure_scoring(encode: StageOutput, model: str, settings: ScorerSettings) -> Measurement:
    """Score all pairs like the score stage, after a first pair that triggers lazy loading."""
    encoded = read_encoded(encode)
    groups = list_groups(encoded)
    scorer = open_scorer(model, settings)
    score_sequences(scorer, groups[:1])
    before = scorer.statistics
    startup_memory_bytes = peak_memory_bytes()
    began_at, start, cpu_start = time.time(), now(), time.process_time()
    logps = score_sequences(scorer, groups)
    seconds, cpu_seconds = now() - start, time.process_time() - cpu_start
    done = scorer.statistics.since(before)
    sides = [join_side(encoded, side, logps).logps.tolist() for side in SIDES]
    return Measurement(
        began_at=began_at,
        seconds=seconds,
        num_tokens_computed=done.num_tokens_computed,
        num_tokens_submitted=done.num_tokens_submitted,
        cpu_seconds=cpu_seconds,
        startup_memory_bytes=startup_memory_bytes,
        peak_memory_bytes=peak_memory_bytes(),
        logps=[list(pair) for pair in zip(*sides, strict=True)],
    )


if __name__ == "__main__":
    run_worker(measure)
