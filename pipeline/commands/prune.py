"""Finds and deletes what no run of a store needs, while other runs go on.

A run's record (`runs/<name>.json`) names the stage outputs that it uses and, from its start on,
those that it has begun. What no record names is left over. So is what nobody reads inside a
complete stage: staging areas, and files of attempts that came second. Two things keep a running
run safe:

- its record, which it writes before it uses anything;
- the clock: what was written in the last hours stays, whoever wrote it.

A run may also begin while outputs that it would use are being deleted. On a local disk a directory
is therefore first moved away, by one rename, and then the records are read again. Either a record
names it by now and it is moved back, or the run that begins finds nothing there and starts from
nothing. An object store cannot rename directories: there the manifest is deleted first, and the
rest after the records were read again.
"""

import dataclasses
import os
import re
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

import msgspec
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from pipeline.runs import list_runs, read_record
from pipeline.stage_list import load_stages
from schemas.errors import ConfigError, DataError
from schemas.manifest import Counts, Manifest
from stages.stage import Reuse, Stage
from stages.store.filesystems import Folder, StoredFile, is_half_written
from stages.store.shards import (
    COMMITS,
    MANIFEST,
    STAGING,
    WORK,
    StageDir,
    list_files,
    read_manifest,
)

_RUNS = "runs"
_PRUNED = "_pruned"
"""Holds directories that were moved away and are about to be deleted."""
_YOUNG = "written "
_ATTEMPT = re.compile(r"[0-9a-f]{12}(\.[1-9][0-9]*)?")


@dataclass(frozen=True, kw_only=True)
class Leftover:
    """Something in a store that no run needs."""

    path: str
    """Below the store."""
    kind: Literal["stage", "folder", "file", "pruned"]
    """The output of a stage; a folder or a file inside an output or beside them; or what an earlier
    prune moved away and did not delete."""
    why: str
    num_files: int
    num_bytes: int
    modified: datetime | None
    """UTC, when the newest of its files was written; None where the storage does not say."""
    kept_because: str = ""
    """Why it stays; empty if it is to be deleted."""


@dataclass(frozen=True, kw_only=True)
class Leftovers:
    """What was found in a store."""

    store: Folder
    stages: Sequence[Stage[Any]]
    """The stages whose outputs were examined."""
    found: list[Leftover]
    dropped: Sequence[str]
    """Runs that are treated as deleted."""
    num_runs: int
    """Runs whose outputs stay."""

    @property
    def going(self) -> list[Leftover]:
        return [leftover for leftover in self.found if not leftover.kept_because]


def find_leftovers(
    store: Folder,
    *,
    dropped: Sequence[str] = (),
    keeps_scores: bool = False,
    min_age_hours: float,
    stage_list: Sequence[Stage[Any]] | None = None,
) -> Leftovers:
    """List what no run of a store needs.

    Args:
        store: holds the outputs of all stages.
        dropped: names of runs to treat as deleted: their records and pages are left over as well.
        keeps_scores: whether values that later runs could reuse stay.
        min_age_hours: what was written in these last hours stays, because a run may be at work.
        stage_list: the stages that there are, in order; the pipeline's own unless given.
    Raises:
        ConfigError: it is no store, or has no run with a given name.
        DataError: a record cannot be read, so what it names is unknown.
    """
    stages = stage_list or load_stages()
    names = list_runs(store)
    if not names:
        raise ConfigError(
            f"{store.uri} has no runs/*.json: either it is no store, or nothing in it would stay. "
            "Pass the store that the recipe names, or delete the folder yourself."
        )
    for name in dropped:
        if name not in names:
            raise ConfigError(f"{name}: no run has this name. Runs: {', '.join(names)}.")
    named = _find_named(store, dropped)
    listed = [
        *_list_outputs(store, stages, named, keeps_values=keeps_scores),
        *_list_unread(store, named),
        *_list_beside(store, stages, named),
    ]
    found = [_keep_if_young(leftover, min_age_hours) for leftover in listed]
    young = {one.path for one in found if one.kept_because.startswith(_YOUNG)}
    return Leftovers(
        store=store,
        stages=stages,
        found=[*_list_records(store, dropped, young), *found],
        dropped=dropped,
        num_runs=len(names) - len(dropped),
    )


def delete_leftovers(leftovers: Leftovers) -> list[Leftover]:
    """Delete what does not stay, unless a run names it by now, and list what was deleted."""
    store, deleted = leftovers.store, []
    for leftover in leftovers.going:
        if leftover.kind == "stage":
            if not _delete_output(leftovers, leftover.path):
                continue
        elif leftover.kind == "pruned":
            _finish_deletion(store, leftover.path, leftovers.dropped)
        elif leftover.kind == "folder":
            store.delete_folder(leftover.path)
        elif store.exists(leftover.path):
            store.delete_file(leftover.path)
        deleted.append(leftover)
    return deleted


# --- what no run needs --------------------------------------------------------------------------


def _find_named(store: Folder, dropped: Sequence[str]) -> set[str]:
    """List the outputs that runs name, as `<stage>/<attempt>`, and the outputs that those read."""
    named: set[str] = set()
    for name in list_runs(store):
        if name in dropped:
            continue
        record = read_record(store, name)  # If it cannot be read, nothing can be deleted.
        refs = [*record.stages.items(), *record.begun.items()]
        named.update(f"{stage}/{ref.folder}" for stage, ref in refs)
    waiting = list(named)
    while waiting:
        manifest = read_manifest(_open(store, waiting.pop()))
        for stage, ref in manifest.inputs.items() if manifest else ():
            if (path := f"{stage}/{ref.folder}") not in named:
                named.add(path)
                waiting.append(path)
    return named


def _list_outputs(
    store: Folder, stages: Sequence[Stage[Any]], named: set[str], *, keeps_values: bool
) -> Iterator[Leftover]:
    """List outputs of stages that no run names, and the rest of an interrupted deletion."""
    for stage in stages:
        for attempt in store.list_folders(stage.name):
            path = f"{stage.name}/{attempt}"
            if path in named or not _ATTEMPT.fullmatch(attempt):
                continue
            why, has_values = _describe_output(_open(store, path), stage.reuse)
            kept_because = "--keep-scores" if has_values and keeps_values else ""
            if store.is_local and os.path.islink(store.file(path)):
                kept_because = "it is a link"
            yield _add_up(store, path, "stage", why, kept_because=kept_because)
    for name in store.list_folders(_PRUNED):
        yield _add_up(store, f"{_PRUNED}/{name}", "pruned", "the rest of an interrupted prune")


def _describe_output(folder: Folder, reuse: Reuse | None) -> tuple[str, bool]:
    """Describe how far an output is, and whether it holds values that later runs could reuse."""
    stage_dir = StageDir(folder=folder, footer={})
    try:
        manifest = stage_dir.manifest()
        shards = manifest.shards if manifest else list(stage_dir.committed().values())
    except (DataError, msgspec.DecodeError):
        return "damaged; no run names it", False
    state = "complete" if manifest else f"not finished, {len(shards):,} shards done"
    value = reuse.describe_value(Counts.total(shard.counts for shard in shards)) if reuse else ""
    if not value:
        return f"{state}; no run names it", False
    hours = sum(shard.seconds for shard in shards) / 3600
    return (
        f"{state}; no run names it, but later ones could reuse {value}, "
        f"{hours:.1f} hours of a worker",
        True,
    )


def _list_unread(store: Folder, named: set[str]) -> Iterator[Leftover]:
    """List what nobody reads inside the complete outputs that runs name."""
    for path in sorted(named):
        manifest = read_manifest(_open(store, path))
        if manifest is None:  # A run may be at work in it.
            continue
        for name in sorted({STAGING, WORK} & set(store.list_folders(path))):
            yield _add_up(store, f"{path}/{name}", "folder", "unfinished work of a complete stage")
        is_unread = _make_filter(manifest)
        for file in store.walk(path):
            if is_half_written(file.name) or is_unread(file.name.removeprefix(f"{path}/")):
                yield _one_file(file)


def _make_filter(manifest: Manifest) -> Callable[[str], bool]:
    """Build a filter for files that shards could have written and that no record names."""
    named = {file.name for file in list_files(manifest)}
    of_shards = {file.name for shard in manifest.shards for file in shard.files.values()}
    roles = {name.split("/")[0] for name in of_shards}
    return lambda name: name.split("/")[0] in roles and name not in named


def _list_beside(
    store: Folder, stages: Sequence[Stage[Any]], named: set[str]
) -> Iterator[Leftover]:
    """List index entries whose output is gone, and half-written files beside the outputs."""
    for stage in stages:
        if stage.reuse is None:
            continue
        for entry in store.walk(stage.reuse.index):
            output = f"{stage.name}/{_name_output(entry)}"
            if is_half_written(entry.name):
                yield _one_file(entry)
            elif output not in named and not _open(store, output).walk():
                yield _one_file(entry, why=f"names values of a {stage.name} output that is gone")
    for file in store.walk(_RUNS):
        if is_half_written(file.name):
            yield _one_file(file)


def _name_output(entry: StoredFile) -> str:
    """Name the output that an index entry, `<key>/<output>.json`, is about."""
    return os.path.basename(entry.name).removesuffix(".json")


def _list_records(store: Folder, dropped: Sequence[str], young: set[str]) -> Iterator[Leftover]:
    """List records and pages of dropped runs; a run keeps its record while an output stays."""
    files = {file.name: file for file in store.walk(_RUNS)}
    for name in dropped:
        still_there = sorted(
            young & _find_named(store, [run for run in list_runs(store) if run != name])
        )
        because = f"{still_there[0]} was written recently" if still_there else ""
        for path in (f"{_RUNS}/{name}.json", f"{_RUNS}/{name}.html"):
            if path in files:
                record = _one_file(files[path], why="record or page of a dropped run")
                yield dataclasses.replace(record, kept_because=because)


def _one_file(file: StoredFile, *, why: str = "written by an attempt that came second") -> Leftover:
    return Leftover(
        path=file.name,
        kind="file",
        why=why,
        num_files=1,
        num_bytes=file.num_bytes,
        modified=file.modified,
    )


def _add_up(
    store: Folder,
    path: str,
    kind: Literal["stage", "folder", "pruned"],
    why: str,
    *,
    kept_because: str = "",
) -> Leftover:
    files = store.walk(path)
    times = [file.modified for file in files if file.modified]
    return Leftover(
        path=path,
        kind=kind,
        why=why,
        num_files=len(files),
        num_bytes=sum(file.num_bytes for file in files),
        modified=max(times) if len(times) == len(files) and times else None,
        kept_because=kept_because,
    )


def _keep_if_young(leftover: Leftover, min_age_hours: float) -> Leftover:
    """Keep what was written so recently that a run may be at work in it."""
    if leftover.kept_because or not leftover.num_files or not min_age_hours:
        return leftover
    because = ""
    if leftover.modified is None:
        because = "its age is unknown to the storage; --min-age-hours 0 deletes it"
    elif leftover.modified > datetime.now(UTC) - timedelta(hours=min_age_hours):
        because = f"{_YOUNG}{_age(leftover.modified)} ago"
    return dataclasses.replace(leftover, kept_because=because)


def _age(modified: datetime) -> str:
    hours = (datetime.now(UTC) - modified).total_seconds() / 3600
    if hours < 48:
        return f"{hours:.1f} hours" if hours >= 1 else f"{hours * 60:.0f} minutes"
    return f"{hours / 24:.0f} days"


# --- how it is deleted --------------------------------------------------------------------------


def _delete_output(leftovers: Leftovers, path: str) -> bool:
    """Delete an output, unless a run names it by now; return whether it was deleted."""
    store, dropped = leftovers.store, leftovers.dropped
    if store.is_local:
        pruned = f"{_PRUNED}/{uuid.uuid4().hex}"
        _open(store, f"{pruned}/{os.path.dirname(path)}").create()
        store.move(path, f"{pruned}/{path}")
        is_gone = _finish_deletion(store, pruned, dropped)
    else:
        is_gone = _delete_objects(store, path, dropped)
    if is_gone:
        _delete_entries(leftovers, path)
    return is_gone


def _delete_entries(leftovers: Leftovers, path: str) -> None:
    """Delete the index entries of an output that is gone."""
    stage_name, output = path.split("/")
    for stage in leftovers.stages:
        if stage.name == stage_name and stage.reuse is not None:
            for entry in leftovers.store.walk(stage.reuse.index):
                if _name_output(entry) == output:
                    leftovers.store.delete_file(entry.name)


def _finish_deletion(store: Folder, pruned: str, dropped: Sequence[str]) -> bool:
    """Delete what was moved away, or move back what a run names by now; return whether all went."""
    is_gone = True
    for path in _find_named(store, dropped):
        files = store.walk(f"{pruned}/{path}")
        for file in sorted(files, key=_order_of_meaning):
            is_gone = False
            home = file.name.removeprefix(f"{pruned}/")
            _open(store, os.path.dirname(home)).create()
            if not store.exists(home):
                store.move(file.name, home)
    store.delete_folder(pruned)
    return is_gone


def _order_of_meaning(file: StoredFile) -> tuple[bool, bool]:
    """Sort files behind what they name: data, then commit records, then the manifest."""
    return file.name.endswith(f"/{MANIFEST}"), f"/{COMMITS}/" in file.name


def _delete_objects(store: Folder, path: str, dropped: Sequence[str]) -> bool:
    """Delete an output's objects, so that it is never complete without all of them."""
    manifest = f"{path}/{MANIFEST}"
    content = store.read_bytes(manifest) if store.exists(manifest) else None
    if content is not None:
        store.delete_file(manifest)
    if path in _find_named(store, dropped):
        if content is not None:
            store.write_bytes(manifest, content)
        return False
    store.delete_folder(f"{path}/{COMMITS}")
    store.delete_folder(path)
    return True


def _open(store: Folder, path: str) -> Folder:
    for name in path.split("/"):
        store = store.child(name)
    return store


# --- how it is shown ----------------------------------------------------------------------------


def leftovers_to_dict(leftovers: Leftovers, *, deleted: Sequence[Leftover]) -> dict[str, Any]:
    return {
        "store": leftovers.store.uri,
        "num_runs": leftovers.num_runs,
        "leftovers": [
            {**msgspec.to_builtins(leftover), "is_deleted": leftover in deleted}
            for leftover in leftovers.found
        ],
    }


def show_leftovers(leftovers: Leftovers, *, deleted: Sequence[Leftover] | None) -> RenderableType:
    """Show what was found and why it stays; `deleted` is None if nothing was to be deleted."""
    table = Table(box=None, pad_edge=False)
    for heading in ("path", "size", "why", ""):
        table.add_column(heading, overflow="fold")
    for leftover in leftovers.found:
        state = f"stays: {leftover.kept_because}" if leftover.kept_because else "to be deleted"
        if deleted is not None and not leftover.kept_because:
            state = "deleted" if leftover in deleted else "stays: a run names it now"
        table.add_row(Text(leftover.path), _size([leftover]), Text(leftover.why), Text(state))
    gone = leftovers.going if deleted is None else deleted
    total = f"{len(gone)} leftovers, {_size(gone)}"
    advice = f"{total} deleted." if deleted is not None else f"{total}. Add --yes to delete them."
    runs = f"{leftovers.num_runs} runs name what they need."
    if not leftovers.found:
        return Text(f"Nothing is left over. {runs}")
    return Group(table, Text(f"\n{runs} {advice if gone else 'Nothing is deleted.'}"))


def _size(leftovers: Sequence[Leftover]) -> str:
    return f"{sum(leftover.num_bytes for leftover in leftovers) / 1e6:,.1f} MB"
