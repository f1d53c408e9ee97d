"""Training dynamics: every pair's log-probs, margin, loss and gradient share, as it is trained on.

The rows of all workers go to the first one, which writes them in parts of bounded size, so that no
process holds an epoch. Each checkpoint names the parts of the steps before it: a resumed training
continues from exactly those. In the end the parts become one table, whose bytes depend on the rows
alone: neither on the workers nor on where a part ends.

Shape suffixes: B pairs of a micro-batch, N pairs of a part, T tokens of the longest completion of a
side.
"""

import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from schemas.manifest import FileRecord
from schemas.rows import DYNAMICS, EVAL_DYNAMICS, RowSchema
from stages.store.shards import StageDir, read_file, write_long_table, write_table
from stages.train.config import CHECKPOINTS
from stages.train.losses import Loss, PairLogps
from stages.train.microbatch import MicroBatch
from stages.train.world import World

ROWS_PER_PART = 1 << 16
"""Rows, of all workers, that are kept in memory until they are written; also of a row group."""

_VALUES = ("policy_chosen_logp", "policy_rejected_logp", "margin", "loss", "gradient_norm")
_ROW = np.dtype(
    [
        ("position", np.int64),
        ("pair_id", "S32"),
        ("step", np.int64),
        ("epoch", np.int32),
        *((name, np.float32) for name in _VALUES),
    ]
)
"""A row on its way to the first worker. `position` is its place in the order of training."""
Rows = NDArray[Any]


def gradient_norms(logps: PairLogps) -> Tensor:
    """Compute the norm of each pair's gradient by its two summed log-probs: float32 [B].

    The derivative by a side's summed log-prob is the mean, over the side's scored tokens, of the
    derivatives by their log-probs. These are all equal unless the loss weights tokens. For DPO the
    norm is √2 · weight · β · sigmoid(-β Δ), up to the factor that all pairs of a batch have in
    common.

    Args:
        logps: after the backward pass, with the gradients of the tokens' log-probs kept. A side
            that the loss does not depend on has none, and counts as 0.
    """
    squares_B = torch.zeros_like(logps.chosen.num_tokens_B)
    for side in (logps.chosen, logps.rejected):
        gradients_BT = side.policy_token_logps_BT.grad
        if gradients_BT is not None:
            squares_B += ((gradients_BT * side.loss_mask_BT).sum(-1) / side.num_tokens_B) ** 2
    return squares_B.sqrt()


@dataclass(kw_only=True)
class DynamicsLog:
    """The growing table of one split's pairs. Every worker keeps its own pairs' rows until they
    are gathered; all of them call the same methods in the same order."""

    schema: RowSchema
    stage_dir: StageDir
    """The train stage's."""
    world: World
    parts: list[FileRecord] = field(default_factory=list)
    """Of the rows so far, named below the folder of the checkpoints; empty on other workers."""
    _step: int = 0
    _epoch: int = 0
    _num_before: int = 0
    """Pairs of all workers in the batches that ended."""
    _num_waiting: int = 0
    """Rows of all workers that no part holds yet."""
    _batch: list[tuple[MicroBatch, Tensor]] = field(default_factory=list)
    _waiting: list[Rows] = field(default_factory=list)

    def begin_step(self, step: int, *, epoch: int = 0) -> None:
        """Name the step, and its epoch in training, that the next pairs belong to."""
        self._step, self._epoch = step, epoch

    def add(
        self,
        microbatch: MicroBatch,
        logps: PairLogps,
        losses_B: Tensor,
        *,
        loss: Loss,
        gradient_norms_B: Tensor | None = None,
    ) -> None:
        """Add the pairs of a micro-batch.

        Args:
            microbatch: not a filler.
            logps: the log-probs of its pairs, detached.
            losses_B: the weighted loss of each pair.
            loss: the loss that defines the rewards.
            gradient_norms_B: as of `gradient_norms`; None in an evaluation.
        """
        chosen_B, rejected_B = loss.rewards(logps)
        values_B = [
            logps.chosen.policy_logp_B,
            logps.rejected.policy_logp_B,
            chosen_B - rejected_B,
            losses_B,
            torch.zeros_like(losses_B) if gradient_norms_B is None else gradient_norms_B,
        ]
        self._batch.append((microbatch, torch.stack(values_B)))

    def end_batch(self, num_pairs: int) -> None:
        """Move the batch's values out of the device, and write a part if enough rows wait.

        Args:
            num_pairs: of the whole batch, over all workers.
        """
        self._waiting += [self._make_rows(*of_microbatch) for of_microbatch in self._batch]
        self._batch.clear()
        self._num_before += num_pairs
        self._num_waiting += num_pairs
        if self._num_waiting >= ROWS_PER_PART:
            self.flush()

    def flush(self) -> None:
        """Gather the waiting rows of all workers, and write them as a part."""
        if not self._num_waiting:
            return
        own = np.concatenate([np.empty(0, _ROW), *self._waiting])
        rows = np.concatenate(self.world.gather(own))
        self._waiting.clear()
        self._num_waiting = 0
        if self.world.is_first:
            # Unique to the attempt: a dying process of an earlier one may still write.
            name = f"{self.schema.name}/part-{len(self.parts):06d}-{uuid.uuid4().hex[:8]}.parquet"
            table = _make_table(rows, self.schema)
            self.parts.append(write_table(self._parts_dir, name, table, self.schema))

    def replace(self, parts: Sequence[FileRecord]) -> None:
        """Continue from a checkpoint's parts, and delete all others."""
        self.parts = list(parts)
        if not self.world.is_first:
            return
        folder = self._parts_dir.folder
        known = {part.name for part in parts}
        for base in folder.list_files(self.schema.name):
            if f"{self.schema.name}/{base}" not in known:
                folder.delete_file(f"{self.schema.name}/{base}")

    def write_table(self) -> FileRecord:
        """Join the parts into the stage's table."""
        return write_long_table(
            self.stage_dir,
            f"{self.schema.name}.parquet",
            self._read_parts(),
            self.schema,
            rows_per_group=ROWS_PER_PART,
        )

    def _read_parts(self) -> Iterator[pa.Table]:
        for part in self.parts:
            yield read_file(self._parts_dir.folder, part)

    @property
    def _parts_dir(self) -> StageDir:
        return replace(self.stage_dir, folder=self.stage_dir.folder.child(CHECKPOINTS))

    def _make_rows(self, microbatch: MicroBatch, values: Tensor) -> Rows:
        rows = np.zeros(len(microbatch.pair_ids), _ROW)
        rows["position"] = self._num_before + np.asarray(microbatch.places)
        rows["pair_id"] = microbatch.pair_ids
        rows["step"], rows["epoch"] = self._step, self._epoch
        for name, values_B in zip(_VALUES, values.cpu().numpy(), strict=True):
            rows[name] = values_B
        return rows


def open_dynamics(stage_dir: StageDir, world: World) -> Mapping[str, DynamicsLog]:
    """Open the logs of both splits, by split."""
    return {
        split: DynamicsLog(schema=schema, stage_dir=stage_dir, world=world)
        for split, schema in (("train", DYNAMICS), ("eval", EVAL_DYNAMICS))
    }


def _make_table(rows: Rows, schema: RowSchema) -> pa.Table:
    """Sort the rows of whole batches into the order of training, and make the stored columns."""
    rows = rows[np.argsort(rows["position"], kind="stable")]
    columns = {name: rows[name] for name in _ROW.names or ()}
    columns["pair_id"] = rows["pair_id"].astype(str)
    columns["gradient_share"] = _share_by_step(rows["step"], rows["gradient_norm"])
    return pa.table({name: pa.array(columns[name]) for name in schema.arrow.names})


def _share_by_step(steps_N: NDArray[np.int64], norms_N: NDArray[np.float32]) -> NDArray[np.float32]:
    """Divide each norm by the sum over its step, 0 where that is 0."""
    _, places_N = np.unique(steps_N, return_inverse=True)
    sums_N = np.bincount(places_N, weights=norms_N)[places_N]
    shares_N = np.divide(norms_N, sums_N, out=np.zeros(len(norms_N)), where=sums_N > 0)
    return shares_N.astype(np.float32)
