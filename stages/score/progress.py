"""How does the driver know how far a shard is? Its worker leaves notes in the stage's directory."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import msgspec

from stages.scorers.protocol import ScoreStatistics
from stages.stage import Progress
from stages.store.filesystems import Folder
from stages.store.shards import WORK, StageDir
from stages.store.worker_logs import polling

PARTS = f"{WORK}/parts"
"""Deleted with the rest of the work when the stage is finished."""
_POLL_SECONDS = 5.0


class PartDone(msgspec.Struct, frozen=True, kw_only=True):
    """How far a worker is with one shard."""

    num_pairs: int
    """Of the whole shard."""
    num_pairs_done: int
    num_pairs_scored: int
    """Of those that are done, without what was reused."""
    seconds: float
    """Since scoring them began."""
    statistics: ScoreStatistics


def report_part(out: StageDir, index: int, part: PartDone) -> None:
    """Say how far a shard is, in place of what was said before."""
    out.folder.child(PARTS).create()
    out.folder.write_bytes(f"{PARTS}/{index}.json", msgspec.json.encode(part))


def forget_part(out: StageDir, index: int) -> None:
    """Take back what was said of a shard, when it is committed or has failed."""
    name = f"{PARTS}/{index}.json"
    if out.folder.exists(name):
        out.folder.delete_file(name)


@contextmanager
def shown_parts(out: StageDir, progress: Progress) -> Iterator[None]:
    """Show how far unfinished shards are while the block maps over them."""
    out.folder.delete_folder(PARTS)  # Of a run that was killed.

    def show() -> None:
        if parts := read_parts(out.folder):
            progress.show_parts(
                sum(part.num_pairs_done / part.num_pairs for part in parts),
                describe_parts(parts),
            )

    with polling(show, every_seconds=_POLL_SECONDS):
        yield


def read_parts(folder: Folder) -> list[PartDone]:
    """Read what the workers say; a shard that is done meanwhile has nothing more to say."""
    parts = []
    for name in folder.list_files(PARTS):
        if name.startswith("."):  # On its way to its own name.
            continue
        try:
            parts.append(msgspec.json.decode(folder.read_bytes(f"{PARTS}/{name}"), type=PartDone))
        except FileNotFoundError:
            continue
    return parts


def describe_parts(parts: Sequence[PartDone]) -> str:
    """Say how far the unfinished shards are, and how fast all workers are together."""
    num_done, num_pairs = (
        sum(getattr(part, name) for part in parts) for name in ("num_pairs_done", "num_pairs")
    )
    speed = sum(part.num_pairs_scored / max(part.seconds, 1e-3) for part in parts)
    computed = sum(part.statistics.num_tokens_computed for part in parts)
    submitted = sum(part.statistics.num_tokens_submitted for part in parts)
    share = max(0.0, 1 - computed / max(submitted, 1))
    return (
        f"{num_done:,} of {num_pairs:,} pairs of unfinished shards, {speed:.1f} pairs/s, "
        f"{share:.0%} of tokens from shared prompts"
    )
