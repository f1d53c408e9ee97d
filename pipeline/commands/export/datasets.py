"""Writes pairs, tokens and log-probs as a folder for `datasets` and for `backend: import`.

The columns are those that TRL's DPOTrainer (1.16) passes to its own collator and loss. It has no
option to take them from a data set, so the folder's README has the few lines that make it do so.
"""

from collections.abc import Mapping
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from schemas.rows import EXPORTED

_FOLDERS = {"train": "train", "eval": "test"}
"""Folder by split, named as `datasets` names splits."""
_ROWS_PER_GROUP = 1000


class DatasetsWriter:
    """Writes a Parquet file for each shard and split."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        for name in _FOLDERS.values():
            (folder / name).mkdir()

    def write(self, index: int, rows: pl.DataFrame) -> Mapping[str, int]:
        sums = {f"ref_{side}_logp": f"ref_{side}_logps" for side in ("chosen", "rejected")}
        renamed = rows.rename(sums)
        num_written = {}
        for split, name in _FOLDERS.items():
            part = renamed.filter(pl.col("split") == split)
            num_written[split] = part.height
            if part.height:
                _write(part, self._folder / name / f"part-{index:05d}.parquet")
        return num_written

    def finish(self, facts: Mapping[str, str]) -> None:
        columns = "\n".join(f"| `{column.name}` | {column.doc} |" for column in EXPORTED.columns)
        text = _README.format(columns=columns, **facts)
        (self._folder / "README.md").write_text(text, encoding="utf-8")


def _write(rows: pl.DataFrame, path: Path) -> None:
    table: pa.Table = rows.select(EXPORTED.arrow.names).to_arrow().cast(EXPORTED.arrow)
    pq.write_table(table, path, compression="zstd", row_group_size=_ROWS_PER_GROUP)


_README = """# Preference pairs with reference log-probs

Computed by offline-dpo: {model} (weights {weights}), {engine}, {dtype}; reference {reference}.

| column | meaning |
|---|---|
{columns}

A log-prob is the sum over all of `chosen_ids` or `rejected_ids`, given `prompt_ids`. It is valid
for these tokens only: train on the ids, not on newly tokenised texts, and start the policy from the
model above. Pairs with a loss mask are left out.

## TRL

DPOTrainer of TRL 1.16 always computes its own log-probs; this subclass takes tokens and log-probs
from the data set:

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

## offline-dpo

    stages:
      score: {{backend: import, table: THIS FOLDER, model: THE MODEL ABOVE, dtype: {dtype}}}
"""
