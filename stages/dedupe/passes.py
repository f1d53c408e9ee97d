"""The workers of each pass: what one shard of it reads, and what it writes."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from schemas.manifest import Counts, ShardRecord
from schemas.rows import PAIR, REJECTED, Column, RowSchema
from stages.dedupe.candidates import CANDIDATES, link_buckets, link_prompts, unite
from stages.dedupe.config import DedupeConfig
from stages.dedupe.contamination import (
    BenchmarkFiles,
    BenchmarkIndex,
    find_contaminated,
    hash_benchmark,
)
from stages.dedupe.exact import decide_exact
from stages.dedupe.groups import ROOTS, Groups
from stages.dedupe.hashing import U64
from stages.dedupe.keys import DROPS, KEYS, ROW_ORDER, WARNINGS, number_copies, take_keys
from stages.dedupe.leaders import VERDICTS, judge_outside, resolve
from stages.dedupe.order import order_survivors
from stages.dedupe.outcome import add_warnings, describe_rejected, list_warnings
from stages.dedupe.ranges import (
    HashRange,
    Pass,
    ids_within,
    make_refs,
    numbers_within,
    read_range,
    refs_within,
    size_groups,
    split_refs,
    take_rows,
)
from stages.dedupe.signing import (
    BANDS,
    GROUPED_NODES,
    NODES,
    SIGNED_COLUMNS,
    SKETCH_ROWS_PER_GROUP,
    SKETCHES,
    describe_nodes,
    sign_rows,
)
from stages.dedupe.similarity import (
    GROUPED_EDGES,
    PAIR_EDGES,
    PROMPT_EDGES,
    measure_pairs,
    measure_prompts,
    read_sketches,
)
from stages.stage import ShardWorker
from stages.store.filesystems import Folder
from stages.store.shards import StageDir, read_file

CONTAMINATED = RowSchema(
    "dedupe-contaminated",
    1,
    (
        Column("ref", pa.uint64(), "The row, as shard and position.", nullable=False),
        Column("detail", pa.string(), "Which benchmark it holds, and where.", nullable=False),
    ),
)
"""What the pass *sign* finds besides."""


@dataclass(frozen=True, kw_only=True)
class InputShard:
    """A shard of validate."""

    index: int
    record: ShardRecord

    @property
    def description(self) -> str:
        return f"validate/{self.record.files['data'].name}"


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Makes the worker that sorts an input shard by prompt and takes the keys of its rows."""

    source: Folder
    num_ranges: int
    """As many as will read from its files, each a part."""
    out: StageDir

    def __call__(self) -> ShardWorker[InputShard]:
        return self._spread

    def _spread(self, task: InputShard) -> ShardRecord:
        rows = read_file(self.source, task.record.files["data"])
        rows = rows.sort_by([(name, "ascending") for name in ROW_ORDER[:-1]])
        keys = pa.concat_tables([KEYS.arrow.empty_table(), *take_keys(number_copies(rows))])
        num_eval = pc.sum(pc.equal(rows["split"], "eval")).as_py() or 0
        roles = {"rows": PAIR, "keys": KEYS}
        groups = dict.fromkeys(roles, size_groups(rows.num_rows, self.num_ranges))
        with self.out.write_shard(task.index, roles, rows_per_group=groups) as shard:
            shard.write("rows", rows)
            shard.write("keys", keys.sort_by("talk_key"))
            counts = Counts(
                num_in=rows.num_rows, num_out=rows.num_rows, more={"num_eval": num_eval}
            )
            return shard.commit(counts)


@dataclass(frozen=True, kw_only=True)
class Decide:
    """Makes the worker that lists what reads the same, from the keys of one range of prompts."""

    config: DedupeConfig
    spread: Pass
    out: StageDir

    def __call__(self) -> ShardWorker[HashRange]:
        return self._decide

    def _decide(self, task: HashRange) -> ShardRecord:
        keys = _frame(self.spread.read("keys", where=ids_within("talk_key", task)))
        drops, warnings = decide_exact(
            keys,
            source_priority=self.config.source_priority,
            conflict_policy=self.config.conflict_policy,
            seeks_leaks=self.config.leaks is not None,
        )
        with self.out.write_shard(task.index, {"drops": DROPS, "warnings": WARNINGS}) as shard:
            shard.write("drops", drops.to_arrow())
            shard.write("warnings", warnings.to_arrow())
            return shard.commit(Counts(num_in=keys.height, num_out=drops.height))


@dataclass(frozen=True, kw_only=True)
class Sign:
    """Makes the worker that turns the rows of one range into what is compared."""

    config: DedupeConfig
    spread: Pass
    decided: Pass
    benchmarks: BenchmarkFiles
    seeks_leaks: bool
    out: StageDir

    def __call__(self) -> ShardWorker[HashRange]:
        files = self.benchmarks.files
        if not files:
            return partial(self._sign, prompts=None, answers=None)
        hashed = pa.concat_tables([hash_benchmark(file) for file in files])
        return partial(
            self._sign,
            prompts=BenchmarkIndex.prompts_of(hashed),
            answers=BenchmarkIndex.answers_of(hashed),
        )

    def _sign(
        self,
        task: HashRange,
        *,
        prompts: BenchmarkIndex | None,
        answers: BenchmarkIndex | None,
    ) -> ShardRecord:
        found = read_range(self.spread, self.decided, task, columns=SIGNED_COLUMNS)
        rows = take_rows(found.rows, found.left)
        nodes = describe_nodes(rows)
        details: dict[int, str] = {}
        if prompts is not None and answers is not None:
            details = find_contaminated(rows, nodes, prompts=prompts, answers=answers)
        signed = sign_rows(
            rows,
            source_priority=self.config.source_priority,
            seeks_near=self.config.near is not None,
            seeks_leaks=self.seeks_leaks,
        )
        roles = {
            "sketches": SKETCHES,
            "nodes": NODES,
            "bands": BANDS,
            "prompt_bands": BANDS,
            "contaminated": CONTAMINATED,
        }
        groups = {
            "sketches": SKETCH_ROWS_PER_GROUP,
            "bands": size_groups(len(signed.bands), task.num_ranges),
            "prompt_bands": size_groups(len(signed.prompt_bands), task.num_ranges),
        }
        with self.out.write_shard(task.index, roles, rows_per_group=groups) as shard:
            shard.write("sketches", signed.sketches)
            shard.write("nodes", nodes)
            shard.write("bands", signed.bands)
            shard.write("prompt_bands", signed.prompt_bands)
            refs = make_refs(task.index, np.array(sorted(details), np.int64))
            columns = [pa.array(refs), pa.array([details[k] for k in sorted(details)], pa.string())]
            shard.write("contaminated", pa.table(columns, schema=CONTAMINATED.arrow))
            return shard.commit(Counts(num_in=rows.num_rows, num_out=len(signed.bands)))


@dataclass(frozen=True, kw_only=True)
class Match:
    """Makes the worker that pairs up the rows which share a band, for one range of bands."""

    signed: Pass
    out: StageDir

    def __call__(self) -> ShardWorker[HashRange]:
        return self._match

    def _match(self, task: HashRange) -> ShardRecord:
        bands = self._read("bands", task)
        prompt_bands = self._read("prompt_bands", task)
        pairs = _candidates(*link_buckets(*bands))
        prompts = _candidates(*link_prompts(*prompt_bands))
        roles = {"pairs": CANDIDATES, "prompts": CANDIDATES}
        groups = {
            "pairs": size_groups(len(pairs), task.num_ranges),
            "prompts": size_groups(len(prompts), task.num_ranges),
        }
        with self.out.write_shard(task.index, roles, rows_per_group=groups) as shard:
            shard.write("pairs", pairs)
            shard.write("prompts", prompts)
            num_found = len(pairs) + len(prompts)
            num_read = len(bands[0]) + len(prompt_bands[0])
            return shard.commit(Counts(num_in=num_read, num_out=num_found))

    def _read(self, role: str, task: HashRange) -> tuple[U64, U64, U64]:
        """Read keys, priorities and refs."""
        inside = numbers_within("band_key", task.first_number, task.last_number)
        none = np.zeros(0, np.uint64)
        columns = [(none, none, none)]
        for shard in self.signed.shards:
            bands = self.signed.read(role, where=inside, only=shard.index)
            refs = make_refs(shard.index, bands["position"].to_numpy())
            columns.append((bands["band_key"].to_numpy(), bands["priority"].to_numpy(), refs))
        keys, priorities, refs = (np.concatenate(c) for c in zip(*columns, strict=True))
        return keys, priorities, refs


@dataclass(frozen=True, kw_only=True)
class Verify:
    """Makes the worker that compares exactly what was paired up, for the members of one range."""

    config: DedupeConfig
    signed: Pass
    matched: Pass
    out: StageDir

    def __call__(self) -> ShardWorker[HashRange]:
        return self._verify

    def _verify(self, task: HashRange) -> ShardRecord:
        inside = refs_within("member", task.index)
        pairs, prompts = (
            unite(self.matched.read(role, where=inside)) for role in ("pairs", "prompts")
        )
        read = partial(read_sketches, self.signed)
        edges, leaks = PAIR_EDGES.arrow.empty_table(), PROMPT_EDGES.arrow.empty_table()
        if self.config.near is not None:
            edges = measure_pairs(
                *pairs,
                read,
                threshold=self.config.near.threshold,
                answer_threshold=self.config.near.answer_threshold,
            )
        if self.config.leaks is not None:
            leaks = measure_prompts(*prompts, read, threshold=self.config.leaks.threshold)
        with self.out.write_shard(
            task.index, {"pairs": PAIR_EDGES, "prompts": PROMPT_EDGES}
        ) as shard:
            shard.write("pairs", edges)
            shard.write("prompts", leaks)
            num_compared = len(pairs[0]) + len(prompts[0])
            return shard.commit(Counts(num_in=num_compared, num_out=len(edges) + len(leaks)))


@dataclass(frozen=True, kw_only=True)
class Group:
    """Makes the worker that finds, in one piece, which similar rows hang together."""

    signed: Pass
    verified: Pass
    out: StageDir

    def __call__(self) -> ShardWorker[HashRange]:
        return self._group

    def _group(self, task: HashRange) -> ShardRecord:
        groups = Groups([shard.counts.num_in for shard in self.signed.shards])
        num_edges = 0
        for shard in self.verified.shards:
            edges = self.verified.read("pairs", only=shard.index, columns=["member", "leader"])
            groups.join(edges["member"].to_numpy(), edges["leader"].to_numpy())
            num_edges += edges.num_rows
        with self.out.write_shard(task.index, {"roots": ROOTS}) as shard_out:
            for roots in groups.roots():
                shard_out.write("roots", roots)
            num_rows = shard_out.num_rows("roots")
            return shard_out.commit(Counts(num_in=num_edges, num_out=num_rows))


@dataclass(frozen=True, kw_only=True)
class Assign:
    """Makes the worker that hands similar rows to the ranges which decide about their groups.

    Rows that resemble a held-out prompt or a benchmark go here already.
    """

    signed: Pass
    verified: Pass
    grouped: Pass
    out: StageDir

    def __call__(self) -> ShardWorker[HashRange]:
        return self._assign

    def _assign(self, task: HashRange) -> ShardRecord:
        nodes = _frame(self.signed.read("nodes", only=task.index))
        positions = np.arange(nodes.height)
        nodes = nodes.with_columns(ref=pl.Series(make_refs(task.index, positions)))
        contaminated = _frame(self.signed.read("contaminated", only=task.index))
        prompt_edges = _frame(self.verified.read("prompts", only=task.index))
        verdicts = judge_outside(self._list_leaks(prompt_edges, nodes, task.index), contaminated)

        roots = _frame(self.grouped.read("roots", where=refs_within("ref", task.index)))
        found = nodes.join(roots, on="ref").join(verdicts, on="ref", how="anti")
        edges = _frame(self.verified.read("pairs", only=task.index))
        edges = edges.join(roots.rename({"ref": "member"}), on="member")
        roles = {"verdicts": VERDICTS, "nodes": GROUPED_NODES, "edges": GROUPED_EDGES}
        groups = {
            "nodes": size_groups(found.height, task.num_ranges),
            "edges": size_groups(edges.height, task.num_ranges),
        }
        with self.out.write_shard(task.index, roles, rows_per_group=groups) as shard:
            shard.write("verdicts", verdicts.to_arrow())
            shard.write("nodes", found.sort("root", "ref").to_arrow())
            shard.write("edges", edges.sort("root", "member", "leader").to_arrow())
            return shard.commit(Counts(num_in=nodes.height, num_out=found.height))

    def _list_leaks(
        self, prompt_edges: pl.DataFrame, nodes: pl.DataFrame, index: int
    ) -> pl.DataFrame:
        """Give each row of a leaking prompt, and the held-out pair that its prompt resembles most.

        Returns:
            Columns ref, kept_pair_id, similarity.
        """
        nearest = (
            prompt_edges.sort(["similarity", "leader"], descending=[True, False])
            .group_by("member")
            .first()
        )
        nearest = nearest.join(self._read_pair_ids(nearest["leader"]), on="leader")
        firsts = nodes.select("ref", member=pl.Series(make_refs(index, nodes["first"].to_numpy())))
        return firsts.join(nearest, on="member").select("ref", "kept_pair_id", "similarity")

    def _read_pair_ids(self, leaders: pl.Series) -> pl.DataFrame:
        """Read the ids of held-out rows of any range, as `kept_pair_id` by `leader`."""
        refs = leaders.unique().sort()
        shards, positions = split_refs(refs.to_numpy())
        ids = [
            self.signed.read("nodes", only=int(shard), columns=["pair_id"])["pair_id"].take(
                pa.array(positions[shards == shard])
            )
            for shard in np.unique(shards)
        ]
        names = pa.chunked_array([chunk for each in ids for chunk in each.chunks], pa.string())
        return _frame(pa.table({"leader": refs.to_arrow(), "kept_pair_id": names}))


@dataclass(frozen=True, kw_only=True)
class Resolve:
    """Makes the worker that decides who of the similar rows stays, for groups that begin in one
    range."""

    config: DedupeConfig
    assigned: Pass
    out: StageDir

    def __call__(self) -> ShardWorker[HashRange]:
        return self._resolve

    def _resolve(self, task: HashRange) -> ShardRecord:
        inside = refs_within("root", task.index)
        nodes, edges = (
            _frame(self.assigned.read(role, where=inside)) for role in ("nodes", "edges")
        )
        verdicts = resolve(
            edges,
            nodes,
            source_priority=self.config.source_priority,
            conflict_policy=self.config.conflict_policy,
            puts_held_out_first=self.config.leaks is not None,
        )
        groups = {"verdicts": size_groups(verdicts.height, task.num_ranges)}
        with self.out.write_shard(
            task.index, {"verdicts": VERDICTS}, rows_per_group=groups
        ) as shard:
            shard.write("verdicts", verdicts.to_arrow())
            return shard.commit(Counts(num_in=edges.height, num_out=verdicts.height))


@dataclass(frozen=True, kw_only=True)
class Gather:
    """Makes the worker that writes one range of prompt_id, without what goes."""

    config: DedupeConfig
    spread: Pass
    decided: Pass
    judged: Sequence[Pass]
    """What was found by comparing for more than equality: passes with verdicts."""
    out: StageDir

    def __call__(self) -> ShardWorker[HashRange]:
        return self._gather

    def _gather(self, task: HashRange) -> ShardRecord:
        found = read_range(self.spread, self.decided, task)
        inside = refs_within("ref", task.index)
        verdicts = pa.concat_tables(
            [
                VERDICTS.arrow.empty_table(),
                *(each.read("verdicts", where=inside) for each in self.judged),
            ]
        )
        judged = _frame(verdicts).with_columns(
            position=pl.Series(split_refs(verdicts["ref"].to_numpy())[1])
        )
        places = _frame(found.rows.select([*ROW_ORDER, "source", "margin"]))
        places = places.with_row_index("row")
        left = places[found.left].with_columns(position=pl.int_range(pl.len()))

        dropped = left.join(judged.filter("is_drop"), on="position")
        left = left.join(dropped, on="position", how="anti")
        capped = self._find_capped(left)
        left = left.join(capped, on="position", how="anti").sort("row")
        rejected = describe_rejected(_frame(found.drops), dropped, capped)
        warnings = list_warnings(left, judged, _frame(found.warnings))

        kept = take_rows(found.rows, left["row"].to_numpy())
        with self.out.write_shard(task.index, {"data": PAIR, "rejected": REJECTED}) as shard:
            shard.write("data", add_warnings(kept, warnings))
            shard.write("rejected", rejected)
            counts = Counts(
                num_in=found.rows.num_rows,
                num_out=kept.num_rows,
                reasons=dict(sorted(Counter(rejected["code"].to_pylist()).items())),
                warnings=dict(sorted(Counter(c for w in warnings.values() for c in w).items())),
            )
            assert counts.num_in == counts.num_out + counts.num_rejected
            return shard.commit(counts)

    def _find_capped(self, left: pl.DataFrame) -> pl.DataFrame:
        """Give the rows that their prompt has too many of."""
        limit = self.config.max_pairs_per_prompt
        if limit is None:
            return left.clear()
        ordered = order_survivors(left, self.config.source_priority)
        is_above = pl.int_range(pl.len()).over("prompt_id") >= limit
        return ordered.filter(is_above).with_columns(
            detail=pl.lit(f"{limit} better pairs of this prompt stay")
        )


def _frame(table: pa.Table) -> pl.DataFrame:
    frame = pl.from_arrow(table)
    assert isinstance(frame, pl.DataFrame)
    return frame


def _candidates(members: U64, leaders: U64) -> pa.Table:
    return pa.table([pa.array(members), pa.array(leaders)], schema=CANDIDATES.arrow)
