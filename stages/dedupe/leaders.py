"""Which of the rows that resemble others stay?

Whoever decides about a row sees its whole group (groups.py), and nothing of the other groups.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa

from schemas.rows import Column, RowSchema
from stages.dedupe.codes import (
    DUP_NEAR,
    EVAL_CONTAMINATED,
    LABEL_CONFLICT,
    NEAR_DUP_KEPT,
    SPLIT_LEAK,
)
from stages.dedupe.config import ConflictPolicy
from stages.dedupe.hashing import I64
from stages.dedupe.order import order_survivors

VERDICTS = RowSchema(
    "dedupe-verdicts",
    1,
    (
        Column("ref", pa.uint64(), "The row, as shard and position.", nullable=False),
        Column("code", pa.string(), "What was found.", nullable=False),
        Column("is_drop", pa.bool_(), "Whether the row goes; else a warning.", nullable=False),
        Column("kept_pair_id", pa.string(), "The pair that stays instead."),
        Column("similarity", pa.float64(), "Jaccard similarity to it."),
        Column("detail", pa.string(), "What it was found similar to.", nullable=False),
    ),
)

Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Graph:
    """Similarities among N rows that are numbered in the order of survivors."""

    earlier: I64
    later: I64
    similarity: npt.NDArray[np.float64]
    is_swapped: Bools

    def among(self, is_there: Bools) -> "Graph":
        """Keep the edges between rows that are still there."""
        return self.where(is_there[self.earlier] & is_there[self.later])

    def where(self, chosen: Bools) -> "Graph":
        return Graph(
            self.earlier[chosen],
            self.later[chosen],
            self.similarity[chosen],
            self.is_swapped[chosen],
        )


def resolve(
    edges: pl.DataFrame,
    nodes: pl.DataFrame,
    *,
    source_priority: Sequence[str],
    conflict_policy: ConflictPolicy,
    puts_held_out_first: bool,
) -> pl.DataFrame:
    """Decide about the rows of some groups.

    First goes what label conflicts lose, then near-duplicates: a row goes only if it is similar to
    a row that stays.

    Args:
        edges: columns of PAIR_EDGES; every pair of rows once.
        nodes: columns of NODES and `ref`, for all rows that occur in edges and are not gone yet.
        source_priority: names of sources, the best first.
        conflict_policy: which direction of a conflict stays.
        puts_held_out_first: whether a held-out row stays before any for training.
    Returns:
        Columns of VERDICTS, sorted by ref; a row that goes has exactly one.
    """
    verdicts = []
    nodes = _order_nodes(nodes, source_priority, puts_held_out_first=puts_held_out_first)
    for end in ("member", "leader"):
        edges = edges.join(nodes.select(pl.col("ref").alias(end)), on=end, how="semi")
    graph, guarded = _number_edges(edges, nodes["ref"])

    is_left = np.ones(nodes.height, np.bool_)
    leader, edge = choose_leaders(len(is_left), graph)
    losers, kept = _settle_conflicts(leader, edge, graph, nodes, conflict_policy)
    conflicts = pl.DataFrame(
        {
            "ref": nodes["ref"].gather(losers),
            "kept_pair_id": _names(nodes, kept),
            "detail": pl.Series(
                ["similar answers to a similar prompt stand with opposite labels elsewhere"]
                * len(losers),
                dtype=pl.String,
            ),
        }
    )
    verdicts.append(_give_verdicts(conflicts, LABEL_CONFLICT))
    is_left[losers] = False

    graph = graph.among(is_left)
    graph = graph.where(~graph.is_swapped)
    leader, edge = choose_leaders(len(is_left), graph)
    copies = np.flatnonzero(leader >= 0)
    near = pl.DataFrame(
        {
            "ref": nodes["ref"].gather(copies),
            "kept_pair_id": _names(nodes, leader[copies]),
            "similarity": graph.similarity[edge[copies]],
        }
    ).with_columns(detail=pl.format("similar to the kept pair ({})", pl.col("similarity").round(3)))
    verdicts.append(_give_verdicts(near, DUP_NEAR))
    is_left[copies] = False

    guarded = guarded.among(is_left)
    doubtful = np.unique(np.concatenate([guarded.earlier, guarded.later]))
    kept_rows = pl.DataFrame({"ref": nodes["ref"].gather(doubtful)}).with_columns(
        detail=pl.lit("nearly the same as another kept pair")
    )
    verdicts.append(_give_verdicts(kept_rows, NEAR_DUP_KEPT, is_drop=False))
    return pl.concat(verdicts).sort("ref")


def judge_outside(leaks: pl.DataFrame, contaminated: pl.DataFrame) -> pl.DataFrame:
    """Decide about rows that resemble a held-out prompt or a benchmark: they go in any case.

    Args:
        leaks: `ref` (each row that is for training), `kept_pair_id` and `similarity`.
        contaminated: `ref` and `detail`.
    Returns:
        Columns of VERDICTS, sorted by ref; contaminated rows are not said to leak.
    """
    leaking = leaks.join(contaminated, on="ref", how="anti").with_columns(
        detail=pl.format("prompt similar to a held-out one ({})", pl.col("similarity").round(3))
    )
    verdicts = [
        _give_verdicts(contaminated, EVAL_CONTAMINATED),
        _give_verdicts(leaking, SPLIT_LEAK),
    ]
    return pl.concat(verdicts).sort("ref")


def choose_leaders(num_rows: int, graph: Graph) -> tuple[I64, I64]:
    """Find for each row the first of its neighbours that stays, if one does.

    A row stays if no earlier neighbour does: the greedy maximal independent set. It is found in
    rounds, each of which decides all rows whose earlier neighbours are decided, so that the work is
    that of a few passes over the edges.

    Returns:
        For each row its leader's number and the edge between the two, or -1 where it stays.
    """
    stays = np.zeros(num_rows, np.bool_)
    goes = np.zeros(num_rows, np.bool_)
    earlier, later = graph.earlier, graph.later
    while True:
        is_open = ~(stays | goes)
        if not is_open.any():
            break
        is_live = is_open[later] & ~goes[earlier]
        earlier, later = earlier[is_live], later[is_live]
        waits = np.zeros(num_rows, np.bool_)
        waits[later] = True
        stays |= is_open & ~waits
        goes[later[stays[earlier]]] = True
    leader = np.full(num_rows, -1, np.int64)
    edge = np.full(num_rows, -1, np.int64)
    joins = np.flatnonzero(stays[graph.earlier] & goes[graph.later])
    joins = joins[np.lexsort((graph.earlier[joins], graph.later[joins]))][::-1]
    leader[graph.later[joins]] = graph.earlier[joins]
    edge[graph.later[joins]] = joins
    return leader, edge


def _settle_conflicts(
    leader: I64, edge: I64, graph: Graph, nodes: pl.DataFrame, policy: ConflictPolicy
) -> tuple[I64, I64]:
    """Find the rows that lose in clusters with both directions.

    Returns:
        Their numbers, and for each the first row of the direction that stays, or -1.
    """
    rows = np.arange(len(leader))
    cluster = np.where(leader >= 0, leader, rows)
    is_swapped = np.zeros(len(leader), np.bool_)
    is_swapped[leader >= 0] = graph.is_swapped[edge[leader >= 0]]
    frame = pl.DataFrame({"row": rows, "cluster": cluster, "is_swapped": is_swapped})
    frame = frame.with_columns(size=nodes["margin"].abs())
    swapped, straight = pl.col("is_swapped"), ~pl.col("is_swapped")
    in_conflict = frame.filter(swapped.any().over("cluster"))
    if policy == "drop_all":
        return in_conflict["row"].to_numpy(), np.full(in_conflict.height, -1)
    if policy == "majority":
        strength = straight.sum().over("cluster"), swapped.sum().over("cluster")
    else:
        strength = (
            pl.col("size").filter(straight).max().over("cluster"),
            pl.col("size").filter(swapped).max().over("cluster"),
        )
    wins = pl.when(swapped).then(strength[1] > strength[0]).otherwise(strength[0] > strength[1])
    judged = in_conflict.with_columns(wins=wins.fill_null(False))
    winners = judged.filter("wins").group_by("cluster").agg(kept=pl.col("row").min())
    losers = judged.filter(~pl.col("wins")).join(winners, on="cluster", how="left")
    losers = losers.with_columns(pl.col("kept").fill_null(-1)).sort("row")
    return losers["row"].to_numpy(), losers["kept"].to_numpy()


def _order_nodes(
    nodes: pl.DataFrame, source_priority: Sequence[str], *, puts_held_out_first: bool
) -> pl.DataFrame:
    ordered = order_survivors(nodes, source_priority)
    if puts_held_out_first:
        ordered = ordered.sort("is_held_out", descending=True, maintain_order=True)
    return ordered


def _number_edges(edges: pl.DataFrame, refs: pl.Series) -> tuple[Graph, Graph]:
    """Turn refs into numbers, and separate what must not be merged."""
    by_ref = np.argsort(refs.to_numpy())
    sorted_refs = refs.to_numpy()[by_ref]
    one, other = (
        by_ref[np.searchsorted(sorted_refs, edges[name].to_numpy())]
        for name in ("member", "leader")
    )
    graph = Graph(
        np.minimum(one, other),
        np.maximum(one, other),
        edges["similarity"].to_numpy(),
        edges["is_swapped"].to_numpy(),
    )
    is_guarded = edges["is_guarded"].to_numpy()
    return graph.where(~is_guarded), graph.where(is_guarded)


def _names(nodes: pl.DataFrame, numbers: I64) -> pl.Series:
    """Give pair_ids, null for -1."""
    wanted = pl.Series(numbers, dtype=pl.Int64)
    return nodes["pair_id"].gather(wanted.set(wanted < 0, None))


def _give_verdicts(rows: pl.DataFrame, code: str, *, is_drop: bool = True) -> pl.DataFrame:
    given = set(rows.columns)
    absent = {
        name: pl.lit(None, dtype=kind)
        for name, kind in (("kept_pair_id", pl.String), ("similarity", pl.Float64))
        if name not in given
    }
    rows = rows.with_columns(code=pl.lit(code), is_drop=pl.lit(is_drop), **absent)
    return rows.select(column.name for column in VERDICTS.columns)
