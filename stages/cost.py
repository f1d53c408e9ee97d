"""Cost model of the stages: floating-point operations, sequence lengths, and measured rates.

A token that passes through a transformer with N multiplying parameters takes 2 N operations forward
and 4 N backward (Kaplan et al. 2020, arXiv:2001.08361, table 1). Attention takes 4 L D t forward
for L layers of width D and t tokens of context (Chowdhery et al. 2022, arXiv:2204.02311, appendix
B); attention is causal, so t is half of the sequence. The output layer counts only where a
completion token is predicted, and the prompt of a pair counts once, as both are computed here.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from schemas.errors import ConfigError, DataError
from schemas.manifest import Manifest
from stages.models.fetch import read_config
from stages.models.resolve import ModelPin, pin_model
from stages.store.filesystems import Folder
from stages.store.shards import StageOutput, read_manifest

FLOPS_PER_CORE = 5e10
"""Assumed rate of a CPU core in float32: a third of what matrix products alone reach."""
_MAX_SAMPLED_SHARDS = 4


@dataclass(frozen=True, kw_only=True)
class ModelSize:
    """Multiplying parameters of a transformer."""

    body: float
    """In its layers."""
    head: float
    """In its output layer: vocabulary times width."""
    depth_width: float
    """Layers times width of attention."""


def size_model(config: Mapping[str, Any]) -> ModelSize:
    """Count the parameters of a model from its config.json, without biases and norms.

    Args:
        config: of a model with gated layers after attention, such as Llama, Mistral, Qwen or Gemma.
    Raises:
        ConfigError: the model has another layout.
    """
    try:
        width, layers = config["hidden_size"], config["num_hidden_layers"]
        heads, inner = config["num_attention_heads"], config["intermediate_size"]
        vocabulary = config["vocab_size"]
    except KeyError as error:
        raise ConfigError(
            f"The size of a model of type {config.get('model_type')} is unknown: its config.json "
            f"has no {error}. Estimates support Llama and models with the same layout."
        ) from error
    head_width = config.get("head_dim") or width // heads
    groups = config.get("num_key_value_heads") or heads
    attention = 2 * width * heads * head_width + 2 * width * groups * head_width
    return ModelSize(
        body=layers * (attention + 3 * width * inner),
        head=vocabulary * width,
        depth_width=layers * heads * head_width,
    )


def size_pinned_model(pin: ModelPin) -> ModelSize:
    """Count the parameters of a pinned model."""
    return size_model(read_config(pin))


def size_named_model(spec: str) -> ModelSize:
    """Count the parameters of a model given by name, as a recipe names it."""
    return size_pinned_model(pin_model(spec))


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """Mean lengths of the pairs, in tokens."""

    prompt: float
    chosen: float
    rejected: float
    prompts_per_pair: float
    """Distinct prompts over pairs, at most 1."""
    source: str
    """Where the numbers come from, such as encode/0123456789ab."""

    @property
    def answers(self) -> float:
        return self.chosen + self.rejected


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Amount of data that a stage's cost is computed for."""

    num_pairs: float
    """Pairs to score and train on."""
    lengths: Lengths
    share_reused: float
    """Share of the stage's sequences whose values are taken from earlier outputs, 0 to 1."""
    num_shards: int | None
    """Shards of the stage where it is complete; None where it is not."""

    @property
    def num_tokens(self) -> float:
        """Tokens of all prompts and answers, a prompt counted once a pair."""
        return self.num_pairs * (self.lengths.prompt + self.lengths.answers)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Measurements of a complete stage, used to estimate other runs of it."""

    rate: float
    """Work a second of one worker: rows, or floating-point operations."""
    start_seconds: float
    """Seconds before and after its shards or steps."""
    bytes_per_pair: float | None
    """Bytes stored a pair; None where the size does not grow with the pairs."""
    source: str
    """Which output was measured, such as score/0123456789ab."""


@dataclass(frozen=True, kw_only=True)
class TokenCount:
    """Tokens that a stage computes, and those that it saves by computing a prompt once a pair."""

    num_computed: float = 0.0
    num_prompt_tokens_saved: float = 0.0


def forward_flops(
    size: ModelSize, lengths: Lengths, *, num_prompts: float, num_pairs: float
) -> float:
    """Count the operations of one forward pass over pairs, with each prompt computed once."""
    num_completion_tokens = num_pairs * lengths.answers
    num_tokens = num_prompts * lengths.prompt + num_completion_tokens
    context = (lengths.prompt + lengths.answers / 2) / 2
    per_token = 2 * size.body + 4 * size.depth_width * context
    return num_tokens * per_token + num_completion_tokens * 2 * size.head


def score_flops(size: ModelSize, lengths: Lengths, num_pairs: float) -> float:
    """Count the operations of scoring pairs; pairs with one prompt share its computation."""
    num_prompts = num_pairs * lengths.prompts_per_pair
    return forward_flops(size, lengths, num_prompts=num_prompts, num_pairs=num_pairs)


def train_flops(
    size: ModelSize, lengths: Lengths, num_pairs: float, *, is_adapter: bool, recomputes: bool
) -> float:
    """Count the operations of training on pairs.

    Args:
        size: of the policy.
        lengths: of the pairs.
        num_pairs: over all epochs.
        is_adapter: the base has no gradients, so backward costs as much as forward, not twice.
        recomputes: gradient checkpointing adds another forward pass.
    """
    forward = forward_flops(size, lengths, num_prompts=num_pairs, num_pairs=num_pairs)
    return forward * (1 + recomputes + (1 if is_adapter else 2))


def count_shards(num_pairs: float, rows_per_shard: int) -> int:
    """Count the shards of a stage that is laid out by rows, at least 1."""
    return max(1, math.ceil(num_pairs / rows_per_shard))


def measure_shards(
    manifest: Manifest,
    *,
    work: float,
    busy_seconds: float | None = None,
    stores_rows: bool = True,
) -> Measured | None:
    """Measure a complete stage by the seconds of its shards.

    Args:
        manifest: of the stage.
        work: what its shards did in all: rows, or floating-point operations.
        busy_seconds: of all workers together; the sum over the shards unless given.
        stores_rows: its files grow with the pairs.
    Returns:
        None where there was no work to measure.
    """
    if busy_seconds is None:
        busy_seconds = sum(shard.seconds for shard in manifest.shards)
    if busy_seconds <= 0 or work <= 0:
        return None
    num_bytes = sum(file.num_bytes for shard in manifest.shards for file in shard.files.values())
    return Measured(
        rate=work / busy_seconds,
        start_seconds=max(0.0, manifest.seconds - busy_seconds / count_workers(manifest)),
        bytes_per_pair=num_bytes / max(1, manifest.counts.num_out) if stores_rows else None,
        source=f"{manifest.stage}/{manifest.fingerprint}",
    )


def measure_rows(manifest: Manifest, store: Folder) -> Measured | None:
    """Measure a complete stage in rows a second."""
    return measure_shards(manifest, work=manifest.counts.num_in)


def count_workers(manifest: Manifest) -> int:
    """Count the processes that wrote the shards of a complete stage, at least 1."""
    return len({shard.writer for shard in manifest.shards}) or 1


def read_input_lengths(manifest: Manifest, store: Folder) -> Lengths:
    """Measure the lengths of the encoded pairs that a complete stage has read.

    Raises:
        DataError: the encoded pairs were deleted.
    """
    folder = store.child("encode").child(manifest.inputs["encode"].folder)
    encoded = read_manifest(folder)
    if encoded is None:
        raise DataError(f"{folder.uri} does not exist any more.")
    return measure_lengths(StageOutput(folder=folder, manifest=encoded))


def measure_lengths(encoded: StageOutput) -> Lengths:
    """Measure the lengths of encoded pairs on up to four shards.

    A shard is a range of prompt_id, which is a hash, so it is a random sample of the prompts.

    Raises:
        DataError: there are no pairs.
    """
    names = [f"num_{what}_tokens" for what in ("prompt", "chosen", "rejected")]
    shards = encoded.manifest.shards[:_MAX_SAMPLED_SHARDS]
    tables = [
        encoded.read(shard, columns=["prompt_id", *names], is_checked=False) for shard in shards
    ]
    rows = pa.concat_tables(tables)
    if not rows.num_rows:
        raise DataError(f"{encoded.folder.uri} holds no pairs.")
    prompt, chosen, rejected = (float(pc.mean(rows[name]).as_py()) for name in names)
    return Lengths(
        prompt=prompt,
        chosen=chosen,
        rejected=rejected,
        prompts_per_pair=len(rows["prompt_id"].unique()) / rows.num_rows,
        source=f"encode/{encoded.manifest.fingerprint}",
    )
