"""Runs the stages of a plan and writes their manifests and the run's record."""

import contextlib
import logging
import time
from typing import Any

from pipeline.plan import Plan, PlannedStage
from pipeline.progress import MakeProgress, open_progress
from pipeline.provenance import host_name, package_versions, utc_now
from pipeline.ray.mapper import open_mapper
from pipeline.ray.session import Capacity, resolve_resources
from schemas.config import dump_config
from schemas.errors import ConfigError, DataError
from schemas.manifest import Counts, Manifest, RunRecord, encode_record
from stages.stage import ShardMapper, Stage, StageContext, StageResult
from stages.store.locks import hold_lock
from stages.store.shards import LOCK, StageDir, StageOutput

logger = logging.getLogger(__name__)


def execute_plan(
    plan: Plan,
    *,
    capacity: Capacity,
    ray_address: str | None = None,
    is_local: bool = False,
    run_name: str | None = None,
    make_progress: MakeProgress | None = None,
) -> RunRecord:
    """Run the stages of a plan that are not done, in order, and record what the run used.

    Args:
        make_progress: of a display that other runs share; each stage opens its own unless given.
    Raises:
        ConfigError: the run's name cannot be a file's name.
        PipelineError: a stage failed, which ends the run; what is committed stays.
    """
    run_name = run_name or default_run_name(plan)
    if "/" in run_name or run_name.startswith("."):
        raise ConfigError(f"{run_name}: a run's name is a word without slashes.")
    _refuse_damaged(plan)
    # Before the run uses anything, because prune may delete what no run names.
    write_run_record(plan, run_name)
    _refuse_deleted(plan)
    with contextlib.ExitStack() as stack:
        mapper: ShardMapper | None = None
        for stage in plan.stages:
            if not stage.is_selected:
                continue
            if stage.state == "done":
                logger.info("%s: done, %s", stage.name, stage.out.folder.uri)
                continue
            if mapper is None:
                mapper = stack.enter_context(
                    open_mapper(ray_address, is_local=is_local, store=plan.store)
                )
            manifest = _run_stage(
                stage, plan, mapper, capacity, is_local=is_local, make_progress=make_progress
            )
            _log_counts(stage, manifest)
            write_run_record(plan, run_name)
    return write_run_record(plan, run_name)


def default_run_name(plan: Plan) -> str:
    """Name a run after its recipe and the stage that decides what the run makes."""
    naming = [stage for stage in plan.stages if stage.resolved.stage.names_runs] or plan.stages
    return f"{plan.recipe.name}-{naming[-1].ref.folder}"


def write_run_record(plan: Plan, run_name: str) -> RunRecord:
    """Record under `runs/` in the store which stage outputs a run uses and which it has begun."""
    complete = {s.name: s.ref for s in plan.stages if s.out.is_complete()}
    begun = {s.name: s.ref for s in plan.stages if s.is_selected and s.name not in complete}
    record = RunRecord(name=run_name, recipe=plan.recipe.path, stages=complete, begun=begun)
    content = encode_record(record)
    runs = plan.store.child("runs")
    runs.create()
    if not runs.exists(f"{run_name}.json") or runs.read_bytes(f"{run_name}.json") != content:
        runs.write_bytes(f"{run_name}.json", content)
    return record


def _refuse_damaged(plan: Plan) -> None:
    """Refuse to begin a run whose stages have records that cannot be read.

    Raises:
        DataError: names each such record, and how to go on.
    """
    damaged = [stage.why for stage in plan.stages if stage.state == "damaged"]
    if damaged:
        raise DataError("\n".join(damaged))


def _refuse_deleted(plan: Plan) -> None:
    """Refuse to begin a run whose finished stages were deleted between its plan and its record.

    `prune` moves a directory away and then reads the records again. Together, the two checks make
    sure that either the run or prune notices the other.

    Raises:
        DataError: a stage that the plan counts as done no longer exists.
    """
    for stage in plan.stages:
        if stage.state == "done" and not stage.out.is_complete():
            raise DataError(
                f"{stage.out.folder.uri} was deleted while this run began. Run it again."
            )


def read_output(stage: PlannedStage) -> StageOutput:
    """Return a complete stage's output."""
    manifest = stage.out.manifest()
    assert manifest is not None, f"{stage.name} is not complete"
    return StageOutput(folder=stage.out.folder, manifest=manifest)


def _run_stage(
    planned: PlannedStage,
    plan: Plan,
    mapper: ShardMapper,
    capacity: Capacity,
    *,
    is_local: bool,
    make_progress: MakeProgress | None,
) -> Manifest:
    """Run a stage, or take its output if another run has completed it in the meantime."""
    folder = planned.out.folder
    logger.info("%s: %s (%s)", planned.name, planned.why, folder.uri)

    def log_holder(holder: str) -> None:
        logger.info("%s: waiting for %s, which works on it", planned.name, holder or "a process")

    with hold_lock(folder, LOCK, on_wait=log_holder):
        done = planned.out.manifest()
        return done or _work_on_stage(
            planned, plan, mapper, capacity, is_local=is_local, make_progress=make_progress
        )


def _work_on_stage(
    planned: PlannedStage,
    plan: Plan,
    mapper: ShardMapper,
    capacity: Capacity,
    *,
    is_local: bool,
    make_progress: MakeProgress | None,
) -> Manifest:
    stage, config = planned.resolved.stage, planned.resolved.config
    started_at, started = utc_now(), time.perf_counter()
    execution = plan.recipe.execution[stage.name]
    with contextlib.ExitStack() as stack:
        if make_progress is None:
            progress = stack.enter_context(open_progress(planned.name))
        else:
            progress = make_progress(planned.name)
        context = StageContext(
            inputs={name: read_output(plan.stage(name)) for name in planned.inputs},
            pins=planned.resolved.pins,
            out=planned.out,
            store=plan.store,
            attempt=planned.attempt,
            versions=package_versions(),
            started_at=started_at,
            execution=execution,
            resources=resolve_resources(execution, capacity),
            mapper=mapper,
            progress=progress,
            is_local=is_local,
        )
        try:
            result: StageResult = stage.run(config, context)
        finally:
            mapper.release()
    counts = Counts.total(shard.counts for shard in result.shards)
    if any(stage.name in reader.inputs for reader in plan.stages):
        _refuse_nothing_kept(stage, counts, planned.out)
    manifest = Manifest(
        stage=stage.name,
        version=stage.version,
        fingerprint=planned.fingerprint,
        attempt=planned.attempt,
        inputs=dict(planned.inputs),
        config=planned.resolved.identity,
        settings=dump_config(config),
        shards=list(result.shards),
        files=list(result.files),
        counts=counts,
        summary=dict(result.summary),
        versions=package_versions(),
        host=host_name(),
        started_at=started_at,
        seconds=round(time.perf_counter() - started, 3),
    )
    planned.out.finish(manifest)
    return manifest


def _refuse_nothing_kept(stage: Stage[Any], counts: Counts, out: StageDir) -> None:
    """Refuse to go on after a stage that kept no row, because later ones would run on nothing.

    Raises:
        DataError: names the most frequent codes of the rejected rows.
    """
    if counts.num_out or not (counts.num_in or stage.reads_every_row):
        return
    codes = sorted(counts.reasons.items(), key=lambda item: -item[1])[:5]
    lines = [f"\n  {code}: {count:,}. {stage.codes.get(code, '')}" for code, count in codes]
    raise DataError(
        f"{stage.name} kept none of {counts.num_in:,} rows, so that nothing is left to go on with."
        + ("".join([" The most frequent codes:", *lines]) if lines else "")
        + f"\nThe rejected rows are in {out.folder.uri}/rejected/."
    )


def _log_counts(planned: PlannedStage, manifest: Manifest) -> None:
    stage, counts = planned.resolved.stage, manifest.counts
    rejected = ", ".join(
        f"{code} {count:,}"
        for code, count in sorted(counts.reasons.items(), key=lambda item: -item[1])
    )
    rows = ""
    if manifest.shards:
        rows = f"{counts.num_in:,} rows in, {stage.describe_kept(counts)}"
        rows += f", {counts.num_rejected:,} rejected ({rejected})" if rejected else ", 0 rejected"
        rows += "; "
    if stage.reuse is not None and (reused := stage.reuse.describe_reused(counts)):
        rows += f"{reused} reused; "
    logger.info("%s: %s%.1f s, %s", stage.name, rows, manifest.seconds, planned.out.folder.uri)
