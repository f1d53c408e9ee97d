"""What in a store does no run need, and how is it deleted while other runs go on?

A run's record (`runs/<name>.json`) names the stage outputs that it uses and, from its start on,
those that it has begun. What no record names is left over, and so is what nobody reads inside a
complete stage: staging areas, and files of attempts that came second. Two things keep a running
run safe:

- its record, which it writes before it uses anything;
- the clock: what was written to in the last hours stays, whoever wrote it.

A run may also begin while outputs that it would use are being deleted. On a local disk a directory
is therefore first taken away, by one rename, and then the records are read again: either one names
it by now, and it is put back, or the run that begins finds nothing there and starts from nothing.
An object store renames no directories: there the manifest goes first, and the rest after a second
look.
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
from pipeline.stage_list import STAGE_NAMES
from schemas.errors import ConfigError, DataError
from schemas.manifest import Counts, Manifest
from stages.score.reuse import REFERENCES
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
"""Where directories lie between being taken away and being gone."""
_YOUNG = "written "
_ATTEMPT = re.compile(r"[0-9a-f]{12}(\.[1-9][0-9]*)?")


@dataclass(frozen=True, kw_only=True)
class Leftover:
    """Something in a store that no run needs."""

    path: str
    """Below the store."""
    kind: Literal["stage", "folder", "file", "pruned"]
    """The output of a stage; a folder or a file inside one, or beside them; or what an earlier
    deletion took away and did not delete."""
    why: str
    num_files: int
    num_bytes: int
    modified: datetime | None
    """UTC, when the newest of its files was written; None where the storage does not say."""
    kept_because: str = ""
    """Empty where it goes."""


@dataclass(frozen=True, kw_only=True)
class Leftovers:
    """What was found in a store."""

    store: Folder
    found: list[Leftover]
    dropped: Sequence[str]
    """Runs that are treated as gone."""
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
) -> Leftovers:
    """List what no run of a store needs.

    Args:
        store: where the outputs of all stages lie.
        dropped: names of runs to treat as gone: their records and pages are left over as well.
        keeps_scores: whether log-probs that later runs could reuse stay.
        min_age_hours: what was written to since then stays: a shard is minutes of work.
    Raises:
        ConfigError: it is no store, or has no run of a name that was given.
        DataError: a record cannot be read, so that nobody knows what it names.
    """
    names = list_runs(store)
    if not names:
        raise ConfigError(
            f"{store.uri} has no runs/*.json: either it is no store, or nothing in it would stay. "
            "Give the store that the recipe names, or delete the folder yourself."
        )
    for name in dropped:
        if name not in names:
            raise ConfigError(f"{name}: no run is called so. Runs: {', '.join(names)}.")
    named = _find_named(store, dropped)
    listed = [
        *_list_stages(store, named, keeps_scores=keeps_scores),
        *_list_unread(store, named),
        *_list_beside(store, named),
    ]
    found = [_keep_if_young(leftover, min_age_hours) for leftover in listed]
    young = {one.path for one in found if one.kept_because.startswith(_YOUNG)}
    return Leftovers(
        store=store,
        found=[*_list_records(store, dropped, young), *found],
        dropped=dropped,
        num_runs=len(names) - len(dropped),
    )


def delete_leftovers(leftovers: Leftovers) -> list[Leftover]:
    """Delete what goes, unless a run has named it meanwhile, and give what was deleted."""
    store, deleted = leftovers.store, []
    for leftover in leftovers.going:
        if leftover.kind == "stage":
            if not _delete_stage(store, leftover.path, leftovers.dropped):
                continue
        elif leftover.kind == "pruned":
            _finish_deletion(store, leftover.path, leftovers.dropped)
        elif leftover.kind == "folder":
            store.delete_folder(leftover.path)
        elif store.exists(leftover.path):
            store.delete_file(leftover.path)
        deleted.append(leftover)
    return deleted


# --- what nobody needs --------------------------------------------------------------------------


def _find_named(store: Folder, dropped: Sequence[str]) -> set[str]:
    """Give the stage directories that runs name, as `<stage>/<attempt>`, and what those read."""
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


def _list_stages(store: Folder, named: set[str], *, keeps_scores: bool) -> Iterator[Leftover]:
    """List outputs of stages that no run names, and what an earlier deletion left."""
    for stage in STAGE_NAMES:
        for attempt in store.list_folders(stage):
            path = f"{stage}/{attempt}"
            if path in named or not _ATTEMPT.fullmatch(attempt):
                continue
            why, has_values = _describe_stage(_open(store, path))
            kept_because = "--keep-scores" if has_values and keeps_scores else ""
            if store.is_local and os.path.islink(store.file(path)):
                kept_because = "it is a link"
            yield _add_up(store, path, "stage", why, kept_because=kept_because)
    for name in store.list_folders(_PRUNED):
        yield _add_up(store, f"{_PRUNED}/{name}", "pruned", "the rest of an interrupted prune")


def _describe_stage(folder: Folder) -> tuple[str, bool]:
    """Say how far a stage came, and whether it holds values that later runs could reuse."""
    stage_dir = StageDir(folder=folder, footer={})
    try:
        manifest = stage_dir.manifest()
        shards = manifest.shards if manifest else list(stage_dir.committed().values())
    except (DataError, msgspec.DecodeError):
        return "damaged; no run names it", False
    state = "complete" if manifest else f"not finished, {len(shards):,} shards done"
    counted = Counts.total(shard.counts for shard in shards).more
    num_scored = counted.get("num_sequences_scored", 0)
    if not num_scored:
        return f"{state}; no run names it", False
    hours = sum(shard.seconds for shard in shards) / 3600
    return (
        f"{state}; no run names it, but later ones could reuse the log-probs of {num_scored:,} "
        f"sequences, {hours:.1f} hours of a worker",
        True,
    )


def _list_unread(store: Folder, named: set[str]) -> Iterator[Leftover]:
    """List what nobody reads inside the complete stages that runs name."""
    for path in sorted(named):
        manifest = read_manifest(_open(store, path))
        if manifest is None:  # Somebody may be at work in it.
            continue
        for name in sorted({STAGING, WORK} & set(store.list_folders(path))):
            yield _add_up(store, f"{path}/{name}", "folder", "unfinished work of a complete stage")
        is_unread = _make_filter(manifest)
        for file in store.walk(path):
            if is_half_written(file.name) or is_unread(file.name.removeprefix(f"{path}/")):
                yield _one_file(file)


def _make_filter(manifest: Manifest) -> Callable[[str], bool]:
    """Tell files that shards could have written, and that no record names."""
    answered_for = {file.name for file in list_files(manifest)}
    of_shards = {file.name for shard in manifest.shards for file in shard.files.values()}
    roles = {name.split("/")[0] for name in of_shards}
    return lambda name: name.split("/")[0] in roles and name not in answered_for


def _list_beside(store: Folder, named: set[str]) -> Iterator[Leftover]:
    """List entries of references that lead nowhere, and half-written files beside the stages."""
    for file in [*store.walk(REFERENCES), *store.walk(_RUNS)]:
        score = f"score/{os.path.basename(file.name).removesuffix('.json')}"
        is_entry = file.name.startswith(f"{REFERENCES}/")
        if is_half_written(file.name):
            yield _one_file(file)
        elif is_entry and score not in named and not _open(store, score).walk():
            yield _one_file(file, why="says that values are in a score stage that is gone")


def _list_records(store: Folder, dropped: Sequence[str], young: set[str]) -> Iterator[Leftover]:
    """List records and pages of dropped runs; a run of which something stays keeps its record."""
    files = {file.name: file for file in store.walk(_RUNS)}
    for name in dropped:
        still_there = sorted(
            young & _find_named(store, [run for run in list_runs(store) if run != name])
        )
        because = f"{still_there[0]} was written lately" if still_there else ""
        for path in (f"{_RUNS}/{name}.json", f"{_RUNS}/{name}.html"):
            if path in files:
                record = _one_file(files[path], why="of a run that is dropped")
                yield dataclasses.replace(record, kept_because=because)


def _one_file(file: StoredFile, *, why: str = "of an attempt that did not count") -> Leftover:
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
    """Keep what somebody may be at work in, by the clock."""
    if leftover.kept_because or not leftover.num_files or not min_age_hours:
        return leftover
    because = ""
    if leftover.modified is None:
        because = "its storage does not say how old it is: --min-age-hours 0"
    elif leftover.modified > datetime.now(UTC) - timedelta(hours=min_age_hours):
        because = f"{_YOUNG}{_age(leftover.modified)} ago"
    return dataclasses.replace(leftover, kept_because=because)


def _age(modified: datetime) -> str:
    hours = (datetime.now(UTC) - modified).total_seconds() / 3600
    if hours < 48:
        return f"{hours:.1f} hours" if hours >= 1 else f"{hours * 60:.0f} minutes"
    return f"{hours / 24:.0f} days"


# --- how it goes --------------------------------------------------------------------------------


def _delete_stage(store: Folder, path: str, dropped: Sequence[str]) -> bool:
    """Delete a stage's directory, and say whether it went: a run may have named it meanwhile."""
    if store.is_local:
        pruned = f"{_PRUNED}/{uuid.uuid4().hex}"
        _open(store, f"{pruned}/{os.path.dirname(path)}").create()
        store.move(path, f"{pruned}/{path}")
        is_gone = _finish_deletion(store, pruned, dropped)
    else:
        is_gone = _delete_objects(store, path, dropped)
    if is_gone and path.startswith("score/"):
        entry = f"{os.path.basename(path)}.json"
        for file in store.walk(REFERENCES):
            if os.path.basename(file.name) == entry:
                store.delete_file(file.name)
    return is_gone


def _finish_deletion(store: Folder, pruned: str, dropped: Sequence[str]) -> bool:
    """Delete what was taken away, or put back what a run names by now; say whether all went."""
    is_gone = True
    for path in _find_named(store, dropped):
        files = store.walk(f"{pruned}/{path}")
        for file in sorted(files, key=_by_meaning):
            is_gone = False
            home = file.name.removeprefix(f"{pruned}/")
            _open(store, os.path.dirname(home)).create()
            if not store.exists(home):
                store.move(file.name, home)
    store.delete_folder(pruned)
    return is_gone


def _by_meaning(file: StoredFile) -> tuple[bool, bool]:
    """Order files so that none is there before what it names: commit records, then the manifest."""
    return file.name.endswith(f"/{MANIFEST}"), f"/{COMMITS}/" in file.name


def _delete_objects(store: Folder, path: str, dropped: Sequence[str]) -> bool:
    """Delete a stage's objects, so that it is never complete without all of them."""
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


# --- how it looks -------------------------------------------------------------------------------


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
    """Show what was found: what goes, and what stays and why. `deleted` is None for a list only."""
    table = Table(box=None, pad_edge=False)
    for heading in ("path", "size", "why", ""):
        table.add_column(heading, overflow="fold")
    for leftover in leftovers.found:
        state = f"stays: {leftover.kept_because}" if leftover.kept_because else "goes"
        if deleted is not None and not leftover.kept_because:
            state = "deleted" if leftover in deleted else "stays: a run names it by now"
        table.add_row(Text(leftover.path), _size([leftover]), Text(leftover.why), Text(state))
    gone = leftovers.going if deleted is None else deleted
    said = f"{len(gone)} leftovers, {_size(gone)}"
    advice = f"{said} deleted." if deleted is not None else f"{said}. Add --yes to delete them."
    runs = f"{leftovers.num_runs} runs name what they need."
    if not leftovers.found:
        return Text(f"Nothing is left over. {runs}")
    return Group(table, Text(f"\n{runs} {advice if gone else 'Nothing goes.'}"))


def _size(leftovers: Sequence[Leftover]) -> str:
    return f"{sum(leftover.num_bytes for leftover in leftovers) / 1e6:,.1f} MB"
