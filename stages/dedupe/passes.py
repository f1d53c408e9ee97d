"""The passes of the stage: each function writes one shard of its pass from files of earlier ones.

A pass takes its task first and everything else by keyword, so that `functools.partial` makes a
worker of it that pickles.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from schemas.manifest import Counts, ShardRecord
from schemas.rows import PAIR, REJECTED, Column, RowSchema
from stages.dedupe.clusters import (
    GROUPED_EDGES,
    GROUPED_NODES,
    NODES,
    ROOTS,
    VERDICTS,
    UnionFind,
    describe_nodes,
    reject_leaks_and_contaminated,
    resolve_clusters,
)
from stages.dedupe.config import DUP_EXACT, PROMPT_CAP, DedupeConfig
from stages.dedupe.contamination import (
    BenchmarkFiles,
    BenchmarkIndex,
    find_contaminated,
    hash_benchmark,
)
from stages.dedupe.exact import (
    DROPS,
    KEYS,
    WARNINGS,
    compute_keys,
    decide_exact,
    sort_best_first,
)
from stages.dedupe.minhash import (
    BANDS,
    CANDIDATES,
    SIGNED_COLUMNS,
    pair_prompts,
    pair_rows,
    sign_rows,
    unite_candidates,
)
from stages.dedupe.partitions import (
    PLACE,
    ROW_ORDER,
    HashRange,
    Pass,
    ids_within,
    make_refs,
    number_copies,
    numbers_within,
    read_range,
    refs_within,
    size_row_groups,
    split_refs,
    take_rows,
)
from stages.dedupe.similarity import (
    PAIR_EDGES,
    PROMPT_EDGES,
    SKETCH_ROWS_PER_GROUP,
    SKETCHES,
    measure_pairs,
    measure_prompts,
    read_sketches,
)
from stages.dedupe.text import U64
from stages.stage import ShardWorker
from stages.store.filesystems import Folder
from stages.store.shards import StageDir, read_file

CONTAMINATED = RowSchema(
    "dedupe-contaminated",
    1,
    (
        Column("ref", pa.uint64(), "The row, as shard and position.", nullable=False),
        Column("detail", pa.string(), "The benchmark it contains, and where.", nullable=False),
    ),
)
"""Contaminated rows, as the pass *sign* writes them."""


@dataclass(frozen=True, kw_only=True)
class InputShard:
    """A shard of validate."""

    index: int
    record: ShardRecord

    @property
    def description(self) -> str:
        return f"validate/{self.record.files['data'].name}"


def spread(task: InputShard, *, source: Folder, num_ranges: int, out: StageDir) -> ShardRecord:
    """Sort an input shard by prompt, and compute the keys of its rows.

    Args:
        task: the input shard.
        source: the folder of its files.
        num_ranges: the number of tasks that will each read a part of the files written here.
        out: the directory of this pass.
    """
    rows = read_file(source, task.record.files["data"])
    rows = rows.sort_by([(name, "ascending") for name in ROW_ORDER[:-1]])
    keys = pa.concat_tables([KEYS.arrow.empty_table(), *compute_keys(number_copies(rows))])
    num_eval = pc.sum(pc.equal(rows["split"], "eval")).as_py() or 0
    roles = {"rows": PAIR, "keys": KEYS}
    row_groups = dict.fromkeys(roles, size_row_groups(rows.num_rows, num_ranges))
    with out.write_shard(task.index, roles, rows_per_group=row_groups) as shard:
        shard.write("rows", rows)
        shard.write("keys", keys.sort_by("talk_key"))
        counts = Counts(num_in=rows.num_rows, num_out=rows.num_rows, more={"num_eval": num_eval})
        return shard.commit(counts)


def decide(
    task: HashRange, *, config: DedupeConfig, spread_out: Pass, out: StageDir
) -> ShardRecord:
    """List exact duplicates, label conflicts, equal prompts in both splits, and cycles."""
    keys = _frame(spread_out.read("keys", where=ids_within("talk_key", task)))
    drops, warnings = decide_exact(
        keys,
        source_priority=config.source_priority,
        conflict_policy=config.conflict_policy,
        seeks_leaks=config.leaks is not None,
    )
    with out.write_shard(task.index, {"drops": DROPS, "warnings": WARNINGS}) as shard:
        shard.write("drops", drops.to_arrow())
        shard.write("warnings", warnings.to_arrow())
        return shard.commit(Counts(num_in=keys.height, num_out=drops.height))


FindContaminated = Callable[[pa.Table, pa.Table], dict[int, str]]
"""`find_contaminated`, bound to the benchmarks."""


def make_sign_worker(
    *,
    config: DedupeConfig,
    spread_out: Pass,
    decided: Pass,
    benchmarks: BenchmarkFiles,
    seeks_leaks: bool,
    out: StageDir,
) -> ShardWorker[HashRange]:
    """Bind `sign` to its arguments, with the benchmarks loaded once for all tasks of a worker."""
    find: FindContaminated | None = None
    if benchmarks.files:
        hashed = pa.concat_tables([hash_benchmark(file) for file in benchmarks.files])
        find = partial(
            find_contaminated,
            prompts=BenchmarkIndex.prompts_of(hashed),
            answers=BenchmarkIndex.answers_of(hashed),
        )
    return partial(
        sign,
        config=config,
        spread_out=spread_out,
        decided=decided,
        find=find,
        seeks_leaks=seeks_leaks,
        out=out,
    )


def sign(
    task: HashRange,
    *,
    config: DedupeConfig,
    spread_out: Pass,
    decided: Pass,
    find: FindContaminated | None,
    seeks_leaks: bool,
    out: StageDir,
) -> ShardRecord:
    """Compute the sketches, bands and nodes of one range's rows, and find contaminated rows."""
    found = read_range(spread_out, decided, task, columns=SIGNED_COLUMNS)
    rows = take_rows(found.rows, found.left)
    nodes = describe_nodes(rows)
    details = {} if find is None else find(rows, nodes)
    signed = sign_rows(
        rows,
        source_priority=config.source_priority,
        seeks_near=config.near is not None,
        seeks_leaks=seeks_leaks,
    )
    roles = {
        "sketches": SKETCHES,
        "nodes": NODES,
        "bands": BANDS,
        "prompt_bands": BANDS,
        "contaminated": CONTAMINATED,
    }
    row_groups = {
        "sketches": SKETCH_ROWS_PER_GROUP,
        "bands": size_row_groups(len(signed.bands), task.num_ranges),
        "prompt_bands": size_row_groups(len(signed.prompt_bands), task.num_ranges),
    }
    with out.write_shard(task.index, roles, rows_per_group=row_groups) as shard:
        shard.write("sketches", signed.sketches)
        shard.write("nodes", nodes)
        shard.write("bands", signed.bands)
        shard.write("prompt_bands", signed.prompt_bands)
        refs = make_refs(task.index, np.array(sorted(details), np.int64))
        columns = [pa.array(refs), pa.array([details[k] for k in sorted(details)], pa.string())]
        shard.write("contaminated", pa.table(columns, schema=CONTAMINATED.arrow))
        return shard.commit(Counts(num_in=rows.num_rows, num_out=len(signed.bands)))


def match(task: HashRange, *, signed: Pass, out: StageDir) -> ShardRecord:
    """Pair up the rows that share a band, for one range of band keys."""
    bands = _read_bands(signed, "bands", task)
    prompt_bands = _read_bands(signed, "prompt_bands", task)
    pairs = _candidates(*pair_rows(*bands))
    prompts = _candidates(*pair_prompts(*prompt_bands))
    roles = {"pairs": CANDIDATES, "prompts": CANDIDATES}
    row_groups = {
        "pairs": size_row_groups(len(pairs), task.num_ranges),
        "prompts": size_row_groups(len(prompts), task.num_ranges),
    }
    with out.write_shard(task.index, roles, rows_per_group=row_groups) as shard:
        shard.write("pairs", pairs)
        shard.write("prompts", prompts)
        num_found = len(pairs) + len(prompts)
        num_read = len(bands[0]) + len(prompt_bands[0])
        return shard.commit(Counts(num_in=num_read, num_out=num_found))


def _read_bands(signed: Pass, role: str, task: HashRange) -> tuple[U64, U64, U64]:
    """Read keys, priorities and refs."""
    inside = numbers_within("band_key", task.first_number, task.last_number)
    none = np.zeros(0, np.uint64)
    columns = [(none, none, none)]
    for shard in signed.shards:
        bands = signed.read(role, where=inside, only=shard.index)
        refs = make_refs(shard.index, bands["position"].to_numpy())
        columns.append((bands["band_key"].to_numpy(), bands["priority"].to_numpy(), refs))
    keys, priorities, refs = (np.concatenate(c) for c in zip(*columns, strict=True))
    return keys, priorities, refs


def verify(
    task: HashRange, *, config: DedupeConfig, signed: Pass, matched: Pass, out: StageDir
) -> ShardRecord:
    """Compute the exact similarity of candidates whose member lies in one range."""
    inside = refs_within("member", task.index)
    pairs, prompts = (
        unite_candidates(matched.read(role, where=inside)) for role in ("pairs", "prompts")
    )
    read = partial(read_sketches, signed)
    edges, leaks = PAIR_EDGES.arrow.empty_table(), PROMPT_EDGES.arrow.empty_table()
    if config.near is not None:
        edges = measure_pairs(
            *pairs,
            read,
            threshold=config.near.threshold,
            answer_threshold=config.near.answer_threshold,
        )
    if config.leaks is not None:
        leaks = measure_prompts(*prompts, read, threshold=config.leaks.threshold)
    with out.write_shard(task.index, {"pairs": PAIR_EDGES, "prompts": PROMPT_EDGES}) as shard:
        shard.write("pairs", edges)
        shard.write("prompts", leaks)
        num_compared = len(pairs[0]) + len(prompts[0])
        return shard.commit(Counts(num_in=num_compared, num_out=len(edges) + len(leaks)))


def group(task: HashRange, *, signed: Pass, verified: Pass, out: StageDir) -> ShardRecord:
    """Find the connected components of similar rows; a single task for the whole data."""
    groups = UnionFind([shard.counts.num_in for shard in signed.shards])
    num_edges = 0
    for shard in verified.shards:
        edges = verified.read("pairs", only=shard.index, columns=["member", "leader"])
        groups.join(edges["member"].to_numpy(), edges["leader"].to_numpy())
        num_edges += edges.num_rows
    with out.write_shard(task.index, {"roots": ROOTS}) as shard_out:
        for roots in groups.roots():
            shard_out.write("roots", roots)
        num_rows = shard_out.num_rows("roots")
        return shard_out.commit(Counts(num_in=num_edges, num_out=num_rows))


def assign(
    task: HashRange, *, signed: Pass, verified: Pass, grouped: Pass, out: StageDir
) -> ShardRecord:
    """Reject leaking and contaminated rows; label other similar rows with the root of their group.

    The root names the range that resolves the group.
    """
    nodes = _frame(signed.read("nodes", only=task.index))
    positions = np.arange(nodes.height)
    nodes = nodes.with_columns(ref=pl.Series(make_refs(task.index, positions)))
    contaminated = _frame(signed.read("contaminated", only=task.index))
    prompt_edges = _frame(verified.read("prompts", only=task.index))
    leaks = _list_leaks(prompt_edges, nodes, task.index, signed)
    verdicts = reject_leaks_and_contaminated(leaks, contaminated)

    roots = _frame(grouped.read("roots", where=refs_within("ref", task.index)))
    found = nodes.join(roots, on="ref").join(verdicts, on="ref", how="anti")
    edges = _frame(verified.read("pairs", only=task.index))
    edges = edges.join(roots.rename({"ref": "member"}), on="member")
    roles = {"verdicts": VERDICTS, "nodes": GROUPED_NODES, "edges": GROUPED_EDGES}
    row_groups = {
        "nodes": size_row_groups(found.height, task.num_ranges),
        "edges": size_row_groups(edges.height, task.num_ranges),
    }
    with out.write_shard(task.index, roles, rows_per_group=row_groups) as shard:
        shard.write("verdicts", verdicts.to_arrow())
        shard.write("nodes", found.sort("root", "ref").to_arrow())
        shard.write("edges", edges.sort("root", "member", "leader").to_arrow())
        return shard.commit(Counts(num_in=nodes.height, num_out=found.height))


def _list_leaks(
    prompt_edges: pl.DataFrame, nodes: pl.DataFrame, index: int, signed: Pass
) -> pl.DataFrame:
    """List the rows of leaking prompts, each with the held-out pair of the most similar prompt.

    Returns:
        Columns ref, kept_pair_id, similarity.
    """
    nearest = (
        prompt_edges.sort(["similarity", "leader"], descending=[True, False])
        .group_by("member")
        .first()
    )
    nearest = nearest.join(_read_pair_ids(nearest["leader"], signed), on="leader")
    firsts = nodes.select("ref", member=pl.Series(make_refs(index, nodes["first"].to_numpy())))
    return firsts.join(nearest, on="member").select("ref", "kept_pair_id", "similarity")


def _read_pair_ids(leaders: pl.Series, signed: Pass) -> pl.DataFrame:
    """Read the ids of held-out rows of any range, as `kept_pair_id` by `leader`."""
    refs = leaders.unique().sort()
    shards, positions = split_refs(refs.to_numpy())
    ids = [
        signed.read("nodes", only=int(shard), columns=["pair_id"])["pair_id"].take(
            pa.array(positions[shards == shard])
        )
        for shard in np.unique(shards)
    ]
    names = pa.chunked_array([chunk for each in ids for chunk in each.chunks], pa.string())
    return _frame(pa.table({"leader": refs.to_arrow(), "kept_pair_id": names}))


def resolve(task: HashRange, *, config: DedupeConfig, assigned: Pass, out: StageDir) -> ShardRecord:
    """Choose the surviving rows of the groups whose root lies in one range."""
    inside = refs_within("root", task.index)
    nodes, edges = (_frame(assigned.read(role, where=inside)) for role in ("nodes", "edges"))
    verdicts = resolve_clusters(
        edges,
        nodes,
        source_priority=config.source_priority,
        conflict_policy=config.conflict_policy,
        puts_held_out_first=config.leaks is not None,
    )
    row_groups = {"verdicts": size_row_groups(verdicts.height, task.num_ranges)}
    with out.write_shard(task.index, {"verdicts": VERDICTS}, rows_per_group=row_groups) as shard:
        shard.write("verdicts", verdicts.to_arrow())
        return shard.commit(Counts(num_in=edges.height, num_out=verdicts.height))


def gather(
    task: HashRange,
    *,
    config: DedupeConfig,
    spread_out: Pass,
    decided: Pass,
    judged: Sequence[Pass],
    out: StageDir,
) -> ShardRecord:
    """Write the kept and the rejected rows of one range of prompt_id.

    Args:
        task: the range.
        config: the stage's config.
        spread_out: the pass that wrote the rows.
        decided: the pass that compared keys.
        judged: the passes that wrote verdicts on similar rows, if similar rows were sought.
        out: the stage's own directory.
    """
    found = read_range(spread_out, decided, task)
    inside = refs_within("ref", task.index)
    verdicts = pa.concat_tables(
        [
            VERDICTS.arrow.empty_table(),
            *(each.read("verdicts", where=inside) for each in judged),
        ]
    )
    verdicts_here = _frame(verdicts).with_columns(
        position=pl.Series(split_refs(verdicts["ref"].to_numpy())[1])
    )
    places = _frame(found.rows.select([*ROW_ORDER, "source", "margin"]))
    places = places.with_row_index("row")
    left = places[found.left].with_columns(position=pl.int_range(pl.len()))

    dropped = left.join(verdicts_here.filter("is_drop"), on="position")
    left = left.join(dropped, on="position", how="anti")
    capped = _find_capped(left, config)
    left = left.join(capped, on="position", how="anti").sort("row")
    rejected = _describe_rejected(_frame(found.drops), dropped, capped)
    warnings = _list_warnings(left, verdicts_here, _frame(found.warnings))

    kept = take_rows(found.rows, left["row"].to_numpy())
    with out.write_shard(task.index, {"data": PAIR, "rejected": REJECTED}) as shard:
        shard.write("data", _add_warnings(kept, warnings))
        shard.write("rejected", rejected)
        counts = Counts(
            num_in=found.rows.num_rows,
            num_out=kept.num_rows,
            reasons=dict(sorted(Counter(rejected["code"].to_pylist()).items())),
            warnings=dict(sorted(Counter(c for w in warnings.values() for c in w).items())),
        )
        assert counts.num_in == counts.num_out + counts.num_rejected
        return shard.commit(counts)


def _find_capped(left: pl.DataFrame, config: DedupeConfig) -> pl.DataFrame:
    """Select the rows beyond max_pairs_per_prompt."""
    limit = config.max_pairs_per_prompt
    if limit is None:
        return left.clear()
    ordered = sort_best_first(left, config.source_priority)
    is_above = pl.int_range(pl.len()).over("prompt_id") >= limit
    return ordered.filter(is_above).with_columns(
        detail=pl.lit(f"{limit} better pairs of this prompt stay")
    )


def _describe_rejected(exact: pl.DataFrame, near: pl.DataFrame, capped: pl.DataFrame) -> pa.Table:
    """Return the columns of REJECTED for all rejected rows, in the order of the range."""
    is_copy = pl.col("code") == DUP_EXACT
    no_name, no_number = pl.lit(None, dtype=pl.String), pl.lit(None, dtype=pl.Float64)
    columns = [*ROW_ORDER, "code", "detail", "kept_pair_id", "similarity"]
    if "detail" not in capped.columns:
        capped = capped.with_columns(detail=pl.lit(""))
    parts = [
        exact.with_columns(similarity=pl.when(is_copy).then(1.0)),
        near,
        capped.with_columns(code=pl.lit(PROMPT_CAP), kept_pair_id=no_name, similarity=no_number),
    ]
    rows = pl.concat([part.select(columns) for part in parts]).sort(ROW_ORDER)
    rows = rows.with_columns(
        codes=pl.concat_list("code"),
        field=no_name,
        raw=pl.lit(None, dtype=pl.Binary),
        raw_sha256=no_name,
    )
    return rows.select(REJECTED.arrow.names).to_arrow().cast(REJECTED.arrow)


def _list_warnings(
    left: pl.DataFrame, verdicts: pl.DataFrame, cycles: pl.DataFrame
) -> dict[int, list[str]]:
    """Return the warning codes of kept rows, by position among the kept."""
    kept = left.select(*PLACE, "position").with_row_index("place")
    near = kept.join(verdicts.filter(~pl.col("is_drop")), on="position")
    found = pl.concat(
        [
            kept.join(cycles.select(*PLACE, "code"), on=list(PLACE)).select("place", "code"),
            near.select("place", "code"),
        ]
    )
    codes: dict[int, list[str]] = {}
    for place, code in found.sort("place", "code").iter_rows():
        codes.setdefault(place, []).append(code)
    return codes


def _add_warnings(kept: pa.Table, warnings: dict[int, list[str]]) -> pa.Table:
    """Append the codes to the column `warnings`."""
    if not warnings:
        return kept
    column = kept["warnings"].to_pylist()
    for place, codes in warnings.items():
        column[place] = [*column[place], *codes]
    index = kept.column_names.index("warnings")
    return kept.set_column(index, "warnings", pa.array(column, kept["warnings"].type))


def _frame(table: pa.Table) -> pl.DataFrame:
    frame = pl.from_arrow(table)
    assert isinstance(frame, pl.DataFrame)
    return frame


def _candidates(members: U64, leaders: U64) -> pa.Table:
    return pa.table([pa.array(members), pa.array(leaders)], schema=CANDIDATES.arrow)
