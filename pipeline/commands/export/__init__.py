"""Exports scored pairs and reference log-probs to a folder that another trainer reads."""

import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import polars as pl

from pipeline.commands.export.datasets import DatasetsWriter
from pipeline.commands.export.open_instruct import OpenInstructWriter
from pipeline.plan import Plan
from schemas.errors import ConfigError, DataError
from schemas.manifest import Manifest
from stages.store.shards import StageOutput, read_file

_STAGES = ("dedupe", "encode", "score")
_COLUMNS = {
    "dedupe": ["pair_id", "prompt_id", "prompt", "chosen", "rejected", "tools", "split"],
    "encode": [
        *("pair_id", "prompt_ids", "chosen_ids", "rejected_ids", "truncated"),
        *("chosen_loss_mask", "rejected_loss_mask", "num_prompt_tokens"),
    ],
    "score": [
        *("pair_id", "chosen_sequence_id", "rejected_sequence_id"),
        *("ref_chosen_logp", "ref_rejected_logp"),
        *("ref_chosen_token_logps", "ref_rejected_token_logps"),
    ],
}


class ExportWriter(Protocol):
    """Writes one format of export into a folder of its own."""

    def write(self, index: int, rows: pl.DataFrame) -> Mapping[str, int]:
        """Write those of a shard's scored pairs that the format can hold.

        Args:
            index: the shard's number.
            rows: columns of dedupe, encode and score, without pairs that have a loss mask.
        Returns:
            Number of pairs written, by split.
        """
        ...

    def finish(self, facts: Mapping[str, str]) -> None:
        """Write the files that describe the whole export."""
        ...


_WRITERS: dict[str, Callable[[Path], ExportWriter]] = {
    "datasets": DatasetsWriter,
    "open-instruct": OpenInstructWriter,
}


@dataclass(frozen=True, kw_only=True)
class Export:
    """Summary of an export."""

    folder: str
    num_train: int
    num_eval: int
    num_left_out: int
    """Scored pairs that the format cannot hold; the folder's README says which those are."""


def export_logps(plan: Plan, folder: Path, *, form: str = "datasets") -> Export:
    """Write the scored pairs of a recipe with tokens and reference log-probs, shard by shard.

    Args:
        plan: of the recipe; score must be complete.
        folder: to write to; it appears when all of it is written.
        form: datasets or open-instruct.
    Raises:
        ConfigError: score is not complete, `folder` exists, or there is no such format.
    """
    if form not in _WRITERS:
        raise ConfigError(f"--format {form}: no such format. Formats: {', '.join(_WRITERS)}.")
    outputs = {name: _open_output(plan, name) for name in _STAGES}
    folder = folder.absolute()
    if folder.exists():
        raise ConfigError(f"{folder} exists already. Remove it, or name another folder with --out.")
    staging = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    num_written = {"train": 0, "eval": 0}
    num_scored = 0
    try:
        staging.mkdir(parents=True)
        writer = _WRITERS[form](staging)
        for index, rows in enumerate(_read_shards(outputs)):
            num_scored += rows.height
            # Other trainers have no loss mask.
            plain = rows.filter(
                pl.col("chosen_loss_mask").is_null() & pl.col("rejected_loss_mask").is_null()
            )
            for split, number in writer.write(index, plain).items():
                num_written[split] += number
        writer.finish(_describe(outputs))
        staging.rename(folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return Export(
        folder=str(folder),
        num_train=num_written["train"],
        num_eval=num_written["eval"],
        num_left_out=num_scored - sum(num_written.values()),
    )


def _open_output(plan: Plan, name: str) -> StageOutput:
    stage = plan.stage(name)
    manifest = stage.out.manifest()
    if manifest is None:
        raise ConfigError(
            f"{name} is not complete ({stage.why}). Run it first: "
            f"python run.py run {plan.recipe.path} --until score"
        )
    return StageOutput(folder=stage.out.folder, manifest=manifest)


def _read_shards(outputs: dict[str, StageOutput]) -> Iterator[pl.DataFrame]:
    """Join shard after shard of pairs, tokens and log-probs; the three are 1:1.

    Raises:
        DataError: a scored pair has no text or no tokens.
    """
    for records in zip(*(outputs[name].manifest.shards for name in _STAGES), strict=True):
        frames = []
        for name, record in zip(_STAGES, records, strict=True):
            file = record.files["data"]
            frame = pl.from_arrow(read_file(outputs[name].folder, file, columns=_COLUMNS[name]))
            assert isinstance(frame, pl.DataFrame)
            frames.append(frame)
        pairs, encoded, scores = frames
        joined = pairs.join(encoded, on="pair_id", maintain_order="left")
        joined = joined.join(scores, on="pair_id", maintain_order="left")
        if joined.height != scores.height:
            raise DataError(
                f"Shard {records[-1].index} of score holds {scores.height} pairs, but only "
                f"{joined.height} of them are in dedupe and encode. "
                "Run `python run.py verify RECIPE`."
            )
        yield joined


def _describe(outputs: dict[str, StageOutput]) -> dict[str, str]:
    """Collect the facts for the README about how the values were computed."""
    encode, score = (outputs[name].manifest for name in ("encode", "score"))
    return {
        **_describe_reference(score),
        "max_length": str(encode.config["max_length"]),
    }


def _describe_reference(score: Manifest) -> dict[str, str]:
    settings, config = score.settings, score.config
    adapter = (
        f", with the adapter {settings['adapter']} merged into it" if config["adapter"] else ""
    )
    return {
        "model": f"{settings['model']}{adapter}",
        "weights": config["model"]["weights"],
        "engine": config["backend"],
        "dtype": config["dtype"],
        "reference": score.summary["reference"],
    }
