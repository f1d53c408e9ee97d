"""How do other trainers get the reference's log-probs? A folder that `datasets` loads.

The columns are those that TRL's DPOTrainer (1.16) gives to its own collator and loss. It offers no
way to bring them along, so the folder's README has the few lines that do.
"""

import shutil
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.plan import Plan
from schemas.errors import ConfigError, DataError
from schemas.manifest import Manifest
from schemas.rows import EXPORTED
from stages.shards import StageOutput, read_file

_STAGES = ("dedupe", "encode", "score")
_FOLDERS = {"train": "train", "eval": "test"}
"""By split: the folder whose name `datasets` takes for a split's."""
_ROWS_PER_GROUP = 1000


@dataclass(frozen=True, kw_only=True)
class Export:
    """What was written."""

    folder: str
    num_train: int
    num_eval: int
    num_left_out: int
    """Scored pairs with a loss mask, which other trainers do not know."""


def export_logps(plan: Plan, folder: Path) -> Export:
    """Write the scored pairs of a recipe with tokens and reference log-probs, shard by shard.

    Args:
        plan: of the recipe; score must be complete.
        folder: where to; it appears when all of it is written.
    Raises:
        ConfigError: score is not complete, or there is something at `folder`.
    """
    outputs = {name: _open_output(plan, name) for name in _STAGES}
    folder = folder.absolute()
    if folder.exists():
        raise ConfigError(f"{folder} exists already. Remove it, or name another folder with --out.")
    staging = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    num_rows = dict.fromkeys(_FOLDERS, 0)
    try:
        for split in _FOLDERS.values():
            (staging / split).mkdir(parents=True)
        num_left_out = 0
        for index, rows in enumerate(_read_shards(outputs)):
            kept = rows.filter(
                pl.col("chosen_loss_mask").is_null() & pl.col("rejected_loss_mask").is_null()
            )
            num_left_out += rows.height - kept.height
            for split, name in _FOLDERS.items():
                part = kept.filter(pl.col("split") == split)
                num_rows[split] += part.height
                if part.height:
                    _write(part, staging / name / f"part-{index:05d}.parquet")
        (staging / "README.md").write_text(_describe(outputs), encoding="utf-8")
        staging.rename(folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return Export(
        folder=str(folder),
        num_train=num_rows["train"],
        num_eval=num_rows["eval"],
        num_left_out=num_left_out,
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
    columns = {
        "dedupe": ["pair_id", "prompt", "chosen", "rejected", "split"],
        "encode": [
            *("pair_id", "prompt_ids", "chosen_ids", "rejected_ids"),
            *("chosen_loss_mask", "rejected_loss_mask"),
        ],
        "score": ["pair_id", "ref_chosen_logp", "ref_rejected_logp"],
    }
    for records in zip(*(outputs[name].manifest.shards for name in _STAGES), strict=True):
        frames = []
        for name, record in zip(_STAGES, records, strict=True):
            file = record.files["data"]
            table = read_file(outputs[name].folder, file, columns=columns[name])
            frame = pl.from_arrow(table)
            assert isinstance(frame, pl.DataFrame)
            frames.append(frame)
        pairs, encoded, scores = frames
        joined = pairs.join(encoded, on="pair_id", maintain_order="left")
        joined = joined.join(scores, on="pair_id", maintain_order="left")
        if joined.height != scores.height:
            raise DataError(
                f"Shard {records[-1].index} of score holds {scores.height} pairs, of which "
                f"{joined.height} are in dedupe and encode. Run `python run.py verify RECIPE`."
            )
        yield joined.rename(
            {f"ref_{side}_logp": f"ref_{side}_logps" for side in ("chosen", "rejected")}
        )


def _write(rows: pl.DataFrame, path: Path) -> None:
    table: pa.Table = rows.select(EXPORTED.arrow.names).to_arrow().cast(EXPORTED.arrow)
    pq.write_table(table, path, compression="zstd", row_group_size=_ROWS_PER_GROUP)


def _describe(outputs: dict[str, StageOutput]) -> str:
    """Write the folder's README: what the values are, and how TRL takes them."""
    encode, score = (outputs[name].manifest for name in ("encode", "score"))
    columns = "\n".join(f"| `{column.name}` | {column.doc} |" for column in EXPORTED.columns)
    return _README.format(
        columns=columns,
        max_length=encode.config["max_length"],
        **_describe_reference(score),
    )


def _describe_reference(score: Manifest) -> dict[str, str]:
    return {
        "model": score.settings["model"],
        "weights": score.config["model"]["weights"],
        "engine": score.config["backend"],
        "dtype": score.config["dtype"],
        "reference": score.summary["reference"],
    }


_README = """# Preference pairs with reference log-probs

Computed by offline-dpo: {model} (weights {weights}), {engine}, {dtype}; reference {reference}.

| column | meaning |
|---|---|
{columns}

A log-prob is the sum over all of `chosen_ids` or `rejected_ids`, behind `prompt_ids`. It holds for
these tokens only: train on the ids, not on the texts tokenised anew, and start the policy from the
model above.

## TRL

DPOTrainer of TRL 1.16 always computes its own; this one takes tokens and log-probs as they are:

```python
from datasets import load_dataset
from trl import DPOConfig, DPOTrainer


class OfflineDPOTrainer(DPOTrainer):
    def _prepare_dataset(self, dataset, *args, **kwargs):
        return dataset

    def _precompute_ref_logps(self, dataset, *args, **kwargs):
        return dataset


data = load_dataset("parquet", data_files={{"train": "train/*.parquet"}})["train"]
config = DPOConfig(precompute_ref_log_probs=True, max_length={max_length})
```
"""
