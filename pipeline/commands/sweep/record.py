"""The record of a sweep: how each run did at each rung of its halving."""

import msgspec

from schemas.errors import DataError
from schemas.manifest import decode_record, encode_record
from stages.store.filesystems import Folder

SWEEPS = "sweeps"
"""Folder of a store with the record and the page of each sweep."""


class Rung(msgspec.Struct, frozen=True, kw_only=True):
    """A run's place at one rung. Rungs decide what goes on, never what a run computes."""

    fraction: float
    """Of the run's steps."""
    step: int
    num_steps: int
    metrics: dict[str, float]
    """Of the held-out pairs after the step, by name."""


class SweepRecord(msgspec.Struct, kw_only=True):
    """`sweeps/<name>.json`: the rungs that each run has reached, by its name."""

    name: str
    recipe: str
    rungs: dict[str, list[Rung]] = {}

    def find(self, run: str, fraction: float) -> Rung | None:
        """Find how a run did at a rung; None if it was not stopped there."""
        return next((r for r in self.rungs.get(run, ()) if r.fraction == fraction), None)

    def add(self, store: Folder, run: str, rung: Rung) -> None:
        """Add a rung, and write the record."""
        self.rungs[run] = [*self.rungs.get(run, ()), rung]
        folder = store.child(SWEEPS)
        folder.create()
        folder.write_bytes(f"{self.name}.json", encode_record(self))


def read_sweep_record(store: Folder, name: str, *, recipe: str) -> SweepRecord:
    """Read a sweep's record, or begin one.

    Raises:
        DataError: the record is damaged.
    """
    path = f"{SWEEPS}/{name}.json"
    if not store.exists(path):
        return SweepRecord(name=name, recipe=recipe)
    try:
        return decode_record(store.read_bytes(path), SweepRecord)
    except msgspec.DecodeError as error:
        raise DataError(
            f"{store.uri}/{path} cannot be read ({error}). Delete it: unfinished runs then meet at "
            "the rungs again."
        ) from error
