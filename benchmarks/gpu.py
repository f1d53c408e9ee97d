"""Measure the training step on one GPU beside the layouts that other trainers use.

python -m benchmarks.gpu --out gpu.json

It needs torch, transformers, peft, pyarrow, safetensors, msgspec and pydantic, and no Ray, vLLM or
model: weights and tokens are random, which changes no speed. Each line is printed, and written to
--out, as soon as it is known, so that a run that is cut off still counts. It takes at most
--minutes. On a CPU, `--device cpu --quick` tries the same on a tiny model.

Rivals have the reference values at hand, too:

- padded: chosen and rejected in rows of their own, padded to the longest of a micro-batch, computed
  by plain transformers with SDPA under autocast, as in TRL's DPOTrainer; the fastest micro-batch of
  1 to 16 pairs counts.
- padding-free: the same rows one after another without padding, through our policy, so that only
  the prompt's second computation is left of the difference.
"""

import gc
import importlib
import json
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import typer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from benchmarks.measurement import Dtype, now, peak_memory_bytes
from benchmarks.shapes import SHAPES
from benchmarks.work import count_flops, measure_matmul_peak
from stages.policy.attention import unpack_rows
from stages.policy.batches import lay_out, plan_microbatches
from stages.policy.cuda.varlen import check_alignment
from stages.policy.groups import Group
from stages.policy.output_layer import MAX_LOGITS, target_logps
from stages.train.config import LoraSettings, TrainConfig, TrainExecution
from stages.train.losses import SigmoidLoss
from stages.train.microbatch import Layout, MicroBatch, StepBatch, lay_out_pairs
from stages.train.pairs import Pair
from stages.train.policy import Policy, make_optimizer, make_policy
from stages.train.sharding import shard_policy
from stages.train.step import take_step
from stages.train.world import World

TINY = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 500,
    "tie_word_embeddings": True,
}
LORA_ABOVE_WEIGHTS = 4e9
"""Models with more weights are trained through an adapter."""
MICRO_BATCH_SIZES = (1, 2, 4, 8, 16)
"""Pairs in a padded micro-batch."""
NUM_TIMED_STEPS = 3


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """Mean lengths of made-up pairs, in tokens."""

    name: str
    num_prompt: int
    num_completion: int


HH = Lengths(name="HH-like", num_prompt=200, num_completion=100)
ULTRAFEEDBACK = Lengths(name="UF-like", num_prompt=500, num_completion=400)
SHORT = Lengths(name="short", num_prompt=12, num_completion=8)


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Speed of one way to train."""

    pairs_per_second: float
    tflops: float
    """Useful operations a second, the same for each way: every prompt once, no padding."""
    peak_share: float
    """The same as a share of the matmul peak."""
    memory_gb: float
    step_seconds: list[float]


class Report:
    """Prints results, and writes all of them to a file after each."""

    def __init__(self, out: Path | None, *, minutes: float) -> None:
        self._out = out
        self._results: dict[str, Any] = {}
        self._deadline = time.monotonic() + 60 * minutes

    @property
    def is_late(self) -> bool:
        return time.monotonic() > self._deadline

    def add(self, name: str, value: Any) -> None:
        self._results[name] = value
        print(f"{name}: {json.dumps(value)}", flush=True)
        if self._out is not None:
            self._out.write_text(json.dumps(self._results, indent=1) + "\n")


def make_pairs(lengths: Lengths, *, num_pairs: int, num_token_ids: int, seed: int) -> list[Pair]:
    """Make pairs of random tokens; lengths vary log-normally, by about half of the mean.

    Reference values are 0, which is what the padded rival takes them for.
    """
    rng = np.random.default_rng(seed)

    def random_ids(mean: int) -> np.ndarray:
        length = int(np.clip(mean * rng.lognormal(-0.125, 0.5), 2, 4 * mean))
        return rng.integers(num_token_ids, size=length, dtype=np.int32)

    pairs = []
    for number in range(num_pairs):
        chosen, rejected = (random_ids(lengths.num_completion) for _ in range(2))
        pairs.append(
            Pair(
                pair_id=f"{number:032x}",
                group=Group(
                    prompt_ids=random_ids(lengths.num_prompt), completions=(chosen, rejected)
                ),
                ref_chosen_token_logps_C=np.zeros(len(chosen), np.float32),
                ref_rejected_token_logps_R=np.zeros(len(rejected), np.float32),
                chosen_loss_mask_C=np.ones(len(chosen), np.bool_),
                rejected_loss_mask_R=np.ones(len(rejected), np.bool_),
                weight=1.0,
            )
        )
    return pairs


def make_model(shape: dict[str, Any], config: TrainConfig, device: torch.device) -> PreTrainedModel:
    """Make a model with random weights, in bfloat16 where a training would freeze them in it."""
    shape = {**shape, "max_position_embeddings": 8192, "attn_implementation": "sdpa"}
    dtype = torch.bfloat16 if config.rounds_base else torch.float32
    torch.manual_seed(0)
    with device:
        model: PreTrainedModel = AutoModelForCausalLM.from_config(LlamaConfig(**shape), dtype=dtype)
    return model.eval()


def cut_step(pairs: Sequence[Pair], layout: Layout, device: torch.device) -> StepBatch:
    """Make the micro-batches of a step, as `read_batches` does from files."""
    num_tokens = np.array([pair.group.num_read for pair in pairs], np.int32)
    plans = plan_microbatches(num_tokens, max_tokens=layout.max_tokens, is_packed=layout.is_packed)
    return StepBatch(
        microbatches=[
            lay_out_pairs(
                [pairs[at] for at in plan],
                device=device,
                rows=layout.rows,
                places=plan.tolist(),
            )
            for plan in plans
        ],
        num_pairs=len(pairs),
        num_tokens=int(num_tokens.sum()),
        num_padded_tokens=int(num_tokens.sum()),
    )


def measure(step: Callable[[], None], *, num_pairs: int, num_flops: float, peak: float) -> Speed:
    """Time steps after a first one that warms up."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    step()
    seconds = []
    for _ in range(NUM_TIMED_STEPS):
        start = now()
        step()
        seconds.append(now() - start)
    best = float(np.median(seconds))
    return Speed(
        pairs_per_second=num_pairs / best,
        tflops=num_flops / best / 1e12,
        peak_share=num_flops / best / peak,
        memory_gb=peak_memory_bytes() / 1e9,
        step_seconds=seconds,
    )


def open_ours(
    values: dict[str, Any], config: TrainConfig, execution: TrainExecution, device: torch.device
) -> Policy:
    """Make the policy as a training does."""
    policy = make_policy(make_model(values, config, device), config, execution, max_length=4096)
    world = World(device=device)
    return shard_policy(policy, world) if execution.shards(device.type) else policy


def open_rival(values: dict[str, Any], config: TrainConfig, device: torch.device) -> Policy:
    """Make the same model as plain transformers computes it, with a whole copy of its weights."""
    execution = TrainExecution(parallelism="ddp")
    policy = make_policy(make_model(values, config, device), config, execution, max_length=4096)
    unpack_rows(policy.model)
    return policy


def ours(
    policy: Policy, optimizer: torch.optim.Optimizer, batch: StepBatch, config: TrainConfig
) -> Callable[[], None]:
    world = World(device=policy.model.device)

    def step() -> None:
        take_step(policy, optimizer, batch, config, step=1, learning_rate=0.0, world=world)

    return step


def padded(
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    pairs: Sequence[Pair],
    config: TrainConfig,
    *,
    micro_batch_size: int,
) -> Callable[[], None]:
    """Make a step like TRL's: all logits of rows that are padded to the longest."""
    model, device = policy.model, policy.model.device
    microbatches = [
        pad_rows(pairs[start : start + micro_batch_size], device)
        for start in range(0, len(pairs), micro_batch_size)
    ]
    loss_of_pairs = SigmoidLoss()

    def step() -> None:
        for input_ids_RL, attention_mask_RL, loss_mask_RL in microbatches:
            with torch.autocast(device.type, policy.dtype, enabled=policy.dtype != torch.float32):
                logits_RLV = model(
                    input_ids=input_ids_RL, attention_mask=attention_mask_RL, use_cache=False
                ).logits[:, :-1]
            targets_RL1 = input_ids_RL[:, 1:, None]
            # As trl.trainer.utils.selective_log_softmax does, row by row to save memory.
            chosen_RL = torch.stack(
                [
                    row.gather(-1, targets)[:, 0] - row.logsumexp(-1)
                    if row.dtype == torch.float32
                    else row.log_softmax(-1).gather(-1, targets)[:, 0]
                    for row, targets in zip(logits_RLV, targets_RL1, strict=True)
                ]
            )
            logps_R = (chosen_RL * loss_mask_RL[:, 1:]).sum(-1)
            chosen, rejected = logps_R.float().chunk(2)
            losses = -nn.functional.logsigmoid(loss_of_pairs.beta * (chosen - rejected))
            (losses.sum() / len(pairs)).backward()
        torch.nn.utils.clip_grad_norm_(policy.trained_parameters.values(), config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def pad_rows(pairs: Sequence[Pair], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Lay out all chosen rows, then all rejected ones: ids, attention mask and loss mask."""
    groups = [pair.group for pair in pairs]
    rows = [(one.prompt_ids, one.completions[side]) for side in (0, 1) for one in groups]
    ids = [torch.from_numpy(np.concatenate(row).astype(np.int64)) for row in rows]
    masks = [torch.ones(len(row)) for row in ids]
    scored = [
        torch.arange(len(row)) >= len(prompt) for row, (prompt, _) in zip(ids, rows, strict=True)
    ]
    return (
        pad_sequence(ids, batch_first=True).to(device),
        pad_sequence(masks, batch_first=True).to(device).long(),
        pad_sequence(scored, batch_first=True).to(device),
    )


def padding_free(pairs: Sequence[Pair], layout: Layout, device: torch.device) -> StepBatch:
    """Cut a step in which each completion has a prompt of its own."""
    num_tokens = np.array([sum(_row_lengths(pair)) for pair in pairs], np.int32)
    microbatches = []
    for plan in plan_microbatches(num_tokens, max_tokens=layout.max_tokens, is_packed=True):
        chosen = [pairs[at] for at in plan]
        split = [single for pair in chosen for single in pair.group.split()]
        microbatches.append(
            replace(
                lay_out_pairs(chosen, device=device, rows="packed"),
                batch=lay_out(split, device=device, rows="packed"),
            )
        )
    return StepBatch(
        microbatches=microbatches,
        num_pairs=len(pairs),
        num_tokens=int(num_tokens.sum()),
        num_padded_tokens=int(num_tokens.sum()),
    )


def _row_lengths(pair: Pair) -> list[int]:
    return [single.num_read for single in pair.group.split()]


def compare_with_float32(
    policy: Policy, plain: Policy, batch: StepBatch, pairs: Sequence[Pair]
) -> dict[str, Any]:
    """Compare a step's log-probs and gradients with plain float32 passes, one sequence at a time.

    The third value is what plain transformers under autocast loses itself.

    Args:
        plain: from open_rival, with the policy's weights.
    """

    def compute_alone(dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
        sums = []
        for single in [single for pair in pairs for single in pair.group.split()]:
            ids = np.concatenate([single.prompt_ids, single.completions[0]]).astype(np.int64)
            input_ids = torch.from_numpy(ids).to(plain.model.device)
            first = len(single.prompt_ids)
            with autocast(plain, dtype):
                output = plain.model(input_ids=input_ids[None], use_cache=False)
            logps = output.logits[0, first - 1 : -1].float().log_softmax(-1)
            logp = logps.gather(1, input_ids[first:, None]).sum() / len(ids)
            logp.backward()
            sums.append(logp.detach())
        return torch.stack(sums), take_gradients(plain)

    sums = []
    for microbatch in batch.microbatches:
        tokens = policy.completion_tokens(microbatch.batch)
        singles = [single for at in microbatch.places for single in pairs[at].group.split()]
        parts = tokens.logps_N.split([len(single.completions[0]) for single in singles])
        means = torch.stack(
            [part.sum() / one.num_tokens for part, one in zip(parts, singles, strict=True)]
        )
        means.sum().backward()
        sums.append(means.detach())
    found_logps, found = torch.cat(sums), take_gradients(policy)
    order = [
        at
        for one in batch.microbatches
        for place in one.places
        for at in (2 * place, 2 * place + 1)
    ]
    wanted_logps, wanted = compute_alone(torch.float32)
    _, rounded = compute_alone(plain.dtype)
    return {
        "largest difference of a mean log-prob, nats": float(
            (found_logps - wanted_logps[order]).abs().max()
        ),
        "gradient, relative": relative_difference(found, wanted),
        "gradient of plain transformers, relative": relative_difference(rounded, wanted),
    }


def take_gradients(policy: Policy) -> list[Tensor]:
    """Take the gradients of all trained parameters, whole, and leave none."""
    gradients = []
    for parameter in policy.trained_parameters.values():
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        gradients.append(gradient.full_tensor() if isinstance(gradient, DTensor) else gradient)
        parameter.grad = None
    return gradients


def relative_difference(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    difference = sum(
        float((a - b).double().square().sum()) for a, b in zip(found, wanted, strict=True)
    )
    return float(np.sqrt(difference / sum(float(b.double().square().sum()) for b in wanted)))


def time_parts(
    policy: Policy, optimizer: torch.optim.Optimizer, microbatch: MicroBatch
) -> dict[str, float]:
    """Milliseconds of the parts of one micro-batch, each the median of several."""
    batch = microbatch.batch

    def forward() -> None:
        with torch.no_grad():
            policy.completion_tokens(batch)

    def with_backward() -> None:
        policy.completion_tokens(batch).logps_N.sum().backward()

    parts = {
        "forward": time_once(forward),
        "forward and backward": time_once(with_backward),
        "optimizer": time_once(optimizer.step),
    }
    optimizer.zero_grad(set_to_none=True)
    return {**parts, "tokens": batch.input_ids_RL.numel()}


def autocast(policy: Policy, dtype: torch.dtype) -> torch.autocast:
    return torch.autocast(policy.model.device.type, dtype, enabled=dtype != torch.float32)


def time_once(work: Callable[[], Any]) -> float:
    work()
    times = []
    for _ in range(NUM_TIMED_STEPS):
        start = now()
        work()
        times.append(1000 * (now() - start))
    return float(np.median(times))


LogpsOf = Callable[[Tensor, nn.Linear, Tensor], Tensor]
"""Log-probs of targets [N] from hidden states [N, D] and an output layer, differentiable."""


def open_output_layers(config: LlamaConfig) -> dict[str, LogpsOf]:
    """Ways to compute an output layer: ours, plain torch, and libraries that are installed."""

    class Model:
        """What `target_logps` reads of a model."""

        def __init__(self, layer: nn.Linear) -> None:
            self.config, self.layer = config, layer

        def get_output_embeddings(self) -> nn.Linear:
            return self.layer

    def compute_ours(hidden_ND: Tensor, layer: nn.Linear, targets_N: Tensor) -> Tensor:
        max_logits = MAX_LOGITS[hidden_ND.device.type]
        tokens = target_logps(Model(layer), hidden_ND, targets_N, max_logits=max_logits)  # type: ignore[arg-type]
        return tokens.logps_N

    def compute_plainly(hidden_ND: Tensor, layer: nn.Linear, targets_N: Tensor) -> Tensor:
        return -nn.functional.cross_entropy(layer(hidden_ND).float(), targets_N, reduction="none")

    ways: dict[str, LogpsOf] = {"ours": compute_ours, "plain torch": compute_plainly}
    with suppress(ImportError):
        cut = importlib.import_module("cut_cross_entropy")
        ways["cut-cross-entropy"] = lambda hidden, layer, targets: (
            -cut.linear_cross_entropy(hidden, layer.weight, targets, reduction="none")
        )
    with suppress(ImportError):
        liger = importlib.import_module("liger_kernel.transformers.functional")
        ways["liger-kernel"] = lambda hidden, layer, targets: (
            -(
                liger.liger_fused_linear_cross_entropy(
                    hidden, layer.weight, targets, reduction="none", accum_dtype=torch.float32
                )
            )
        )
    return ways


def compare_output_layers(
    values: dict[str, Any], report: Report, *, name: str, dtype: torch.dtype, device: torch.device
) -> None:
    """Measure forward and backward pass of output layers alone, and their gradient's error."""
    num_positions = 256 if device.type == "cpu" else 4096
    config = LlamaConfig(**values)
    torch.manual_seed(0)
    with device:
        layer = nn.Linear(config.hidden_size, config.vocab_size, bias=False, dtype=dtype)
        hidden_ND = torch.randn(num_positions, config.hidden_size, dtype=dtype)
        targets_N = torch.randint(config.vocab_size, (num_positions,))

    def differentiate(compute: LogpsOf, layer: nn.Linear) -> tuple[Tensor, Tensor]:
        hidden = hidden_ND.to(layer.weight.dtype).requires_grad_()
        layer.weight.grad = None
        compute(hidden, layer, targets_N).sum().backward()
        assert hidden.grad is not None
        assert layer.weight.grad is not None
        return hidden.grad, layer.weight.grad

    ways = open_output_layers(config)
    exact = nn.Linear(config.hidden_size, config.vocab_size, bias=False, device=device)
    with torch.no_grad():
        exact.weight.copy_(layer.weight)
    wanted = differentiate(ways["plain torch"], exact)
    for way, compute in ways.items():
        found = differentiate(compute, layer)
        errors = [
            relative_difference([one.float()], [other])
            for one, other in zip(found, wanted, strict=True)
        ]
        milliseconds = time_once(lambda compute=compute: differentiate(compute, layer))
        result = dict(zip(("hidden states", "weights"), errors, strict=True))
        report.add(f"{name}, output layer, {way}", {"ms": milliseconds, "relative errors": result})
    free_memory(device)


def measure_ours(
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    config: TrainConfig,
    pairs: Sequence[Pair],
    report: Report,
    *,
    name: str,
    layout: Layout,
    peak: float,
) -> dict[str, Speed]:
    """Measure our step, and the same without shared prompts."""
    device = policy.model.device
    batch = cut_step(pairs, layout, device)
    num_flops = count_flops(policy.model, batch)
    timed = partial(measure, num_pairs=len(pairs), num_flops=num_flops, peak=peak)
    parts = time_parts(policy, optimizer, batch.microbatches[0])
    report.add(f"{name}, parts of a micro-batch, ms", parts)
    speeds = {"ours": timed(ours(policy, optimizer, batch, config))}
    report.add(f"{name}, ours", asdict(speeds["ours"]))
    if layout.is_packed:
        free = padding_free(pairs, layout, device)
        speeds["padding-free"] = timed(ours(policy, optimizer, free, config))
        report.add(f"{name}, padding-free", asdict(speeds["padding-free"]))
    return speeds


def measure_padded(
    rival: Policy,
    optimizer: torch.optim.Optimizer,
    config: TrainConfig,
    pairs: Sequence[Pair],
    report: Report,
    *,
    name: str,
    peak: float,
) -> dict[str, Speed]:
    """Measure padded rows, from small micro-batches to the first that has no room."""
    device = rival.model.device
    layout = Layout(max_tokens=1, rows="packed")
    num_flops = count_flops(rival.model, cut_step(pairs, layout, device))
    timed = partial(measure, num_pairs=len(pairs), num_flops=num_flops, peak=peak)
    speeds: dict[str, Speed] = {}
    for size in MICRO_BATCH_SIZES:
        if report.is_late or size > len(pairs):
            break
        way = f"padded {size}"
        try:
            speeds[way] = timed(padded(rival, optimizer, pairs, config, micro_batch_size=size))
        except torch.OutOfMemoryError:
            report.add(f"{name}, {way}", "out of memory")
            optimizer.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
            break
        report.add(f"{name}, {way}", asdict(speeds[way]))
    return speeds


def report_ratio(report: Report, name: str, speeds: dict[str, Speed]) -> None:
    """Compare ours with the fastest rival."""
    rivals = {way: speed for way, speed in speeds.items() if way != "ours"}
    if "ours" not in speeds or not rivals:
        return
    best = max(rivals, key=lambda way: rivals[way].pairs_per_second)
    report.add(
        f"{name}, ratio",
        {
            "best rival": best,
            "times as fast": speeds["ours"].pairs_per_second / rivals[best].pairs_per_second,
            "times its memory": speeds["ours"].memory_gb / rivals[best].memory_gb,
        },
    )


def measure_lengths(
    policy: Policy,
    config: TrainConfig,
    all_pairs: dict[str, list[Pair]],
    report: Report,
    measure_way: Callable[..., dict[str, Speed]],
    *,
    shape: str,
) -> dict[str, dict[str, Speed]]:
    """Measure one policy on pairs of all lengths, by their names."""
    optimizer = make_optimizer(policy, config)
    speeds: dict[str, dict[str, Speed]] = {lengths: {} for lengths in all_pairs}
    for lengths, pairs in all_pairs.items():
        name = f"{shape} {lengths}"
        if report.is_late:
            report.add(f"{name}, left out", "no time")
            continue
        try:
            speeds[lengths] = measure_way(policy, optimizer, config, pairs, report, name=name)
        except torch.OutOfMemoryError as error:
            report.add(f"{name}, out of memory", str(error))
            optimizer.zero_grad(set_to_none=True)
    return speeds


def measure_shape(
    shape: str,
    values: dict[str, Any],
    all_pairs: dict[str, list[Pair]],
    report: Report,
    *,
    config: TrainConfig,
    device: torch.device,
    peak: float,
) -> None:
    """Measure one size of model: ours on all lengths first, then padded rows, then the ratios."""
    execution = TrainExecution()
    policy = open_ours(values, config, execution, device)
    layout = Layout(max_tokens=execution.tokens_per_microbatch(device.type), rows=policy.rows)
    report.add(f"{shape}, rows", policy.rows)
    if config.lora is None:
        few = next(iter(all_pairs.values()))[:4]
        plain = open_rival(values, config, device)
        found = compare_with_float32(policy, plain, cut_step(few, layout, device), few)
        report.add(f"{shape}, beside plain float32", found)
        del plain
    mine = measure_lengths(
        policy,
        config,
        all_pairs,
        report,
        partial(measure_ours, layout=layout, peak=peak),
        shape=shape,
    )
    del policy
    free_memory(device)
    rival = open_rival(values, config, device)
    rivals = measure_lengths(
        rival, config, all_pairs, report, partial(measure_padded, peak=peak), shape=shape
    )
    del rival
    free_memory(device)
    for lengths in all_pairs:
        report_ratio(report, f"{shape} {lengths}", mine[lengths] | rivals[lengths])


def measure_compiled(
    shape: str,
    values: dict[str, Any],
    all_pairs: dict[str, list[Pair]],
    report: Report,
    *,
    config: TrainConfig,
    device: torch.device,
    peak: float,
) -> None:
    """Measure our step with compiled layers."""
    execution = TrainExecution(compile_layers=True)
    policy = open_ours(values, config, execution, device)
    layout = Layout(max_tokens=execution.tokens_per_microbatch(device.type), rows=policy.rows)
    optimizer = make_optimizer(policy, config)
    for lengths, pairs in all_pairs.items():
        if report.is_late:
            break
        batch = cut_step(pairs, layout, device)
        speed = measure(
            ours(policy, optimizer, batch, config),
            num_pairs=len(pairs),
            num_flops=count_flops(policy.model, batch),
            peak=peak,
        )
        report.add(f"{shape} {lengths}, ours compiled", asdict(speed))
    del policy, optimizer
    free_memory(device)


def free_memory(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def main(
    device: Annotated[Literal["cuda", "cpu"], typer.Option(help="Device to measure.")] = "cuda",
    quick: Annotated[bool, typer.Option(help="A tiny model and few pairs.")] = False,
    minutes: Annotated[float, typer.Option(help="After this time, start no further row.")] = 7.0,
    out: Annotated[Path | None, typer.Option(help="JSON file for the results.")] = None,
    shape: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(SHAPES)}.")] = None,
) -> None:
    """Measure the training step beside other layouts, on random weights."""
    if device == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("torch finds no GPU here. Use --device cpu --quick to try it.")
    where = torch.device(device)
    report = Report(out, minutes=minutes)
    dtype: Dtype = "bfloat16" if device == "cuda" else "float32"
    report.add(
        "machine",
        {
            "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
            "torch": torch.__version__,
            "dtype": dtype,
        },
    )
    if device == "cuda":
        check_alignment(where)
        report.add("attention aligns queries with the last keys", True)
    peak = measure_matmul_peak(dtype, size=8192 if device == "cuda" else 1024)
    report.add("matmul peak, TFLOP/s", peak / 1e12)
    shapes = {"tiny": TINY} if quick else {name: SHAPES[name] for name in shape or SHAPES}
    lengths_measured = (SHORT,) if quick else (HH, ULTRAFEEDBACK)
    for name, values in shapes.items():
        compare_output_layers(values, report, name=name, dtype=getattr(torch, dtype), device=where)
    with World(device=where).joined():
        for measure_one in (measure_shape, measure_compiled):
            for name, values in shapes.items():
                lora = LoraSettings() if count_weights(values) > LORA_ABOVE_WEIGHTS else None
                all_pairs = {
                    lengths.name: make_pairs(
                        lengths,
                        num_pairs=4 if quick else 32,
                        num_token_ids=values["vocab_size"],
                        seed=0,
                    )
                    for lengths in lengths_measured
                }
                measure_one(
                    name,
                    values,
                    all_pairs,
                    report,
                    config=TrainConfig(dtype=dtype, lora=lora),
                    device=where,
                    peak=peak,
                )


def count_weights(values: dict[str, Any]) -> int:
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**values))
    return sum(weight.numel() for weight in model.parameters())


if __name__ == "__main__":
    typer.run(main)
