"""Counts and rates of the score stage, for its progress line and its manifest."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from schemas.manifest import Counts, ShardRecord
from stages.score.reuse import EarlierScore, Found, ScoreEntry, merge_versions

logger = logging.getLogger(__name__)

REUSED_FROM = "num_sequences_reused from "
REFUSED_IN = "num_files_refused in "
"""Prefixes of the counts by earlier score stage."""


def count_found(found: Found) -> dict[str, int]:
    """Count reused sequences, in total and by origin, and the files that were refused."""
    return {
        "num_sequences_reused": len(found.logps),
        **{f"{REUSED_FROM}{name}": number for name, number in found.num_by_score.items()},
        **{f"{REFUSED_IN}{name}": number for name, number in found.num_refused.items()},
    }


@dataclass(kw_only=True)
class Pace:
    """Rate and shares for the progress line, over all shards done so far in this run."""

    num_workers: int
    _shards: list[ShardRecord] = field(default_factory=list)

    def describe(self, shard: ShardRecord) -> str:
        """Describe pairs a second, the share of tokens from shared prompts and the share reused."""
        self._shards.append(shard)
        done = summarize_shards(self._shards, num_workers=self.num_workers)
        num_reused, num_scored = (done[f"num_sequences_{what}"] for what in ("reused", "scored"))
        notes = []
        if num_scored:
            share = 1 - done["num_tokens_computed"] / done["num_tokens_submitted"]
            notes += [
                f"{done['pairs_per_second']:.1f} pairs/s",
                f"{max(share, 0.0):.0%} of tokens from shared prompts",
            ]
        if num_reused:
            notes.append(f"{num_reused / (num_reused + num_scored):.0%} reused")
        return ", ".join(notes)


def summarize_reuse(
    shards: Sequence[ShardRecord], earlier: Sequence[EarlierScore], entry: ScoreEntry
) -> dict[str, Any]:
    """Count reused sequences by earlier score, and list the versions that computed them."""
    counted = Counts.total(shard.counts for shard in shards).more
    reused_from = {
        name.removeprefix(REUSED_FROM): number
        for name, number in counted.items()
        if name.startswith(REUSED_FROM)
    }
    refused_in = {
        name.removeprefix(REFUSED_IN): number
        for name, number in counted.items()
        if name.startswith(REFUSED_IN)
    }
    for name, number in refused_in.items():
        logger.warning(
            "score: %d files of %s are damaged or gone; their sequences were scored", number, name
        )
    known = {score.name: score.versions for score in earlier}
    # An interrupted attempt may have reused a score that has been deleted since.
    versions = [known.get(name, entry.inherited) for name in reused_from]
    return {
        "reused_from": reused_from,
        "refused_in": refused_in,
        "reused_versions": merge_versions(*versions),
    }


def summarize_shards(shards: Sequence[ShardRecord], *, num_workers: int) -> dict[str, Any]:
    """Add up the counts, and compute the pairs a second of all workers together, without start-up.

    The rate covers scored sequences only: fully reused shards are left out, and the pairs of the
    others are weighted by the share of their sequences that was scored.
    """
    counts = Counts.total(shard.counts for shard in shards)
    busy = [shard for shard in shards if shard.counts.more["num_sequences_scored"]]
    num_pairs = sum(count_scored_pairs(shard.counts) for shard in busy)
    seconds = sum(shard.seconds for shard in busy)
    num_busy = min(num_workers, len(busy))
    return {
        "pairs_per_second": round(num_pairs * num_busy / max(seconds, 1e-3), 3),
        **{
            name: number
            for name, number in counts.more.items()
            if not name.startswith((REUSED_FROM, REFUSED_IN))
        },
    }


def count_scored_pairs(counts: Counts) -> float:
    """Count a shard's pairs, weighted by the share of their sequences that was scored."""
    num_scored, num_reused = (counts.more[f"num_sequences_{what}"] for what in ("scored", "reused"))
    return counts.num_in * num_scored / (num_scored + num_reused)
