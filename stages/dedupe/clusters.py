"""Clusters of similar rows: connected components, and the choice of the rows that survive.

A component (group) is resolved as a whole and independently of the others. Within it, rows are
taken from the best to the worst: a row survives unless it is similar to a surviving better row, its
*leader*. A cluster is a leader and the rows that have it as theirs.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from schemas.rows import Column, RowSchema
from stages.dedupe.config import (
    DUP_NEAR,
    EVAL_CONTAMINATED,
    LABEL_CONFLICT,
    NEAR_DUP_KEPT,
    SPLIT_LEAK,
    ConflictPolicy,
)
from stages.dedupe.exact import sort_best_first
from stages.dedupe.partitions import PLACE, make_refs, split_refs, starts_of_runs
from stages.dedupe.similarity import PAIR_EDGES
from stages.dedupe.text import I64, U32, U64

Bools = npt.NDArray[np.bool_]

_NODE_COLUMNS = (
    Column("pair_id", pa.string(), "Identity of the pair.", nullable=False),
    Column("source", pa.string(), "Name of its data set.", nullable=False),
    Column("source_file", pa.string(), "Input file.", nullable=False),
    Column("source_row", pa.int64(), "Row in it.", nullable=False),
    Column("copy", pa.int64(), "Numbers equal pairs of one input row.", nullable=False),
    Column("margin", pa.float64(), "score_chosen - score_rejected."),
    Column("is_held_out", pa.bool_(), "Whether its split is eval.", nullable=False),
)

NODES = RowSchema(
    "dedupe-nodes",
    1,
    (
        *_NODE_COLUMNS,
        Column("first", pa.uint32(), "Position of the first row of its prompt.", nullable=False),
    ),
)
"""Row k belongs to position k of its range."""

GROUPED_NODES = RowSchema(
    "dedupe-grouped-nodes",
    1,
    (
        *_NODE_COLUMNS,
        Column("ref", pa.uint64(), "The row, as shard and position.", nullable=False),
        Column("root", pa.uint64(), "The first row of its group.", nullable=False),
    ),
)
"""Rows that are similar to another; sorted by root."""

GROUPED_EDGES = RowSchema(
    "dedupe-grouped-edges",
    1,
    (
        *PAIR_EDGES.columns,
        Column("root", pa.uint64(), "The first row of the group.", nullable=False),
    ),
)
"""Sorted by root."""

ROOTS = RowSchema(
    "dedupe-roots",
    1,
    (
        Column("ref", pa.uint64(), "A row similar to another, as shard and position.", False),
        Column("root", pa.uint64(), "The first row of its group.", False),
    ),
)

VERDICTS = RowSchema(
    "dedupe-verdicts",
    1,
    (
        Column("ref", pa.uint64(), "The row, as shard and position.", nullable=False),
        Column("code", pa.string(), "What was found.", nullable=False),
        Column(
            "is_drop", pa.bool_(), "Whether the row is dropped; else a warning.", nullable=False
        ),
        Column("kept_pair_id", pa.string(), "The pair that is kept instead."),
        Column("similarity", pa.float64(), "Jaccard similarity to it."),
        Column("detail", pa.string(), "The row or prompt that it resembles.", nullable=False),
    ),
)


def describe_nodes(rows: pa.Table) -> pa.Table:
    """Return the columns of NODES for the rows of a range."""
    ids = rows["prompt_id"].to_numpy()
    is_first = starts_of_runs(ids)
    first = np.flatnonzero(is_first)[np.cumsum(is_first) - 1] if len(ids) else np.zeros(0, "u4")
    nodes = rows.select([*PLACE, "source", "margin"])
    nodes = nodes.append_column("is_held_out", pc.equal(rows["split"], "eval"))
    return nodes.append_column("first", pa.array(first.astype(np.uint32)))


class UnionFind:
    """Union-find over all rows, with five bytes a row.

    A group is named by its root: its row with the smallest ref, whatever the order of joins.

    Args:
        num_rows: rows of each shard, in order.
    """

    def __init__(self, num_rows: Sequence[int]) -> None:
        self._starts = np.cumsum([0, *num_rows])
        assert self._starts[-1] < 1 << 32, "rows are numbered with 32 bits"
        # Each row points at an earlier one of its group, and the first one at itself.
        self._above: U32 = np.arange(self._starts[-1], dtype=np.uint32)
        self._is_joined = np.zeros(self._starts[-1], np.bool_)

    def join(self, members: U64, leaders: U64) -> None:
        """Unite the group of each member with that of its leader."""
        ones, others = self._number(members), self._number(leaders)
        self._is_joined[ones] = True
        self._is_joined[others] = True
        while len(ones):
            ones, others = self._find_first(ones), self._find_first(others)
            apart = ones != others
            earlier = np.minimum(ones[apart], others[apart])
            later = np.maximum(ones[apart], others[apart])
            # Where several writes to one `later` collide, one wins; the next round joins the rest.
            self._above[later] = earlier
            ones, others = earlier, later

    def roots(self) -> Iterator[pa.Table]:
        """Yield the columns of ROOTS for each shard, sorted by ref."""
        for shard, (start, end) in enumerate(zip(self._starts, self._starts[1:], strict=False)):
            positions = np.flatnonzero(self._is_joined[start:end])
            firsts = self._find_first((start + positions).astype(np.uint32)).astype(np.int64)
            shards = np.searchsorted(self._starts, firsts, side="right") - 1
            roots = make_refs(shards, firsts - self._starts[shards])
            columns = [pa.array(make_refs(shard, positions)), pa.array(roots)]
            yield pa.table(columns, schema=ROOTS.arrow)

    def _number(self, refs: U64) -> U32:
        shards, positions = split_refs(refs)
        return (self._starts[shards] + positions).astype(np.uint32)

    def _find_first(self, rows: U32) -> U32:
        """Follow the pointers to the root, and shorten the path for later look-ups."""
        firsts = self._above[rows]
        while True:
            further = self._above[firsts]
            if np.array_equal(further, firsts):
                break
            firsts = further
        self._above[rows] = firsts
        return firsts


@dataclass(frozen=True)
class Graph:
    """Similarities among N rows, numbered from the best to the worst."""

    earlier: I64
    later: I64
    similarity: npt.NDArray[np.float64]
    is_swapped: Bools

    def among(self, is_there: Bools) -> "Graph":
        """Return the edges between rows that are still there."""
        return self.where(is_there[self.earlier] & is_there[self.later])

    def where(self, chosen: Bools) -> "Graph":
        return Graph(
            self.earlier[chosen],
            self.later[chosen],
            self.similarity[chosen],
            self.is_swapped[chosen],
        )


def resolve_clusters(
    edges: pl.DataFrame,
    nodes: pl.DataFrame,
    *,
    source_priority: Sequence[str],
    conflict_policy: ConflictPolicy,
    puts_held_out_first: bool,
) -> pl.DataFrame:
    """Choose the surviving rows of some groups.

    Losers of label conflicts are dropped first, then near-duplicates; a row is dropped as a
    near-duplicate only if it is similar to a row that is kept.

    Args:
        edges: columns of PAIR_EDGES; each pair of rows once.
        nodes: columns of NODES and `ref`, for all rows in edges that are not yet dropped.
        source_priority: names of sources, the best first.
        conflict_policy: which direction of a conflict is kept.
        puts_held_out_first: whether held-out rows rank before training rows.
    Returns:
        Columns of VERDICTS, sorted by ref; each dropped row has exactly one.
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
            "kept_pair_id": _take_pair_ids(nodes, kept),
            "detail": pl.Series(
                ["similar answers to a similar prompt stand with opposite labels elsewhere"]
                * len(losers),
                dtype=pl.String,
            ),
        }
    )
    verdicts.append(_make_verdicts(conflicts, LABEL_CONFLICT))
    is_left[losers] = False

    graph = graph.among(is_left)
    graph = graph.where(~graph.is_swapped)
    leader, edge = choose_leaders(len(is_left), graph)
    copies = np.flatnonzero(leader >= 0)
    near = pl.DataFrame(
        {
            "ref": nodes["ref"].gather(copies),
            "kept_pair_id": _take_pair_ids(nodes, leader[copies]),
            "similarity": graph.similarity[edge[copies]],
        }
    ).with_columns(detail=pl.format("similar to the kept pair ({})", pl.col("similarity").round(3)))
    verdicts.append(_make_verdicts(near, DUP_NEAR))
    is_left[copies] = False

    guarded = guarded.among(is_left)
    doubtful = np.unique(np.concatenate([guarded.earlier, guarded.later]))
    kept_rows = pl.DataFrame({"ref": nodes["ref"].gather(doubtful)}).with_columns(
        detail=pl.lit("nearly the same as another kept pair")
    )
    verdicts.append(_make_verdicts(kept_rows, NEAR_DUP_KEPT, is_drop=False))
    return pl.concat(verdicts).sort("ref")


def reject_leaks_and_contaminated(leaks: pl.DataFrame, contaminated: pl.DataFrame) -> pl.DataFrame:
    """Drop rows that resemble a held-out prompt or contain a benchmark.

    Args:
        leaks: `ref` (training rows), `kept_pair_id` and `similarity`.
        contaminated: `ref` and `detail`.
    Returns:
        Columns of VERDICTS, sorted by ref; a row with both reasons is reported as contaminated.
    """
    leaking = leaks.join(contaminated, on="ref", how="anti").with_columns(
        detail=pl.format("prompt similar to a held-out one ({})", pl.col("similarity").round(3))
    )
    verdicts = [
        _make_verdicts(contaminated, EVAL_CONTAMINATED),
        _make_verdicts(leaking, SPLIT_LEAK),
    ]
    return pl.concat(verdicts).sort("ref")


def choose_leaders(num_rows: int, graph: Graph) -> tuple[I64, I64]:
    """Find each row's leader: the first of its neighbours that survives.

    A row survives if no earlier neighbour does, which gives the greedy maximal independent set.
    Each round settles all rows whose earlier neighbours are settled, so the work is a few passes
    over the edges.

    Returns:
        Each row's leader and the edge between the two, or -1 for rows that survive.
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
    """Find the losing rows of clusters that contain both directions.

    Returns:
        Their numbers, and for each the first row of the winning direction, or -1.
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
    ordered = sort_best_first(nodes, source_priority)
    if puts_held_out_first:
        ordered = ordered.sort("is_held_out", descending=True, maintain_order=True)
    return ordered


def _number_edges(edges: pl.DataFrame, refs: pl.Series) -> tuple[Graph, Graph]:
    """Number the rows in edges by their order in `refs`; return mergeable and guarded edges."""
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


def _take_pair_ids(nodes: pl.DataFrame, numbers: I64) -> pl.Series:
    """Return pair_ids, with null for -1."""
    wanted = pl.Series(numbers, dtype=pl.Int64)
    return nodes["pair_id"].gather(wanted.set(wanted < 0, None))


def _make_verdicts(rows: pl.DataFrame, code: str, *, is_drop: bool = True) -> pl.DataFrame:
    given = set(rows.columns)
    absent = {
        name: pl.lit(None, dtype=kind)
        for name, kind in (("kept_pair_id", pl.String), ("similarity", pl.Float64))
        if name not in given
    }
    rows = rows.with_columns(code=pl.lit(code), is_drop=pl.lit(is_drop), **absent)
    return rows.select(column.name for column in VERDICTS.columns)
