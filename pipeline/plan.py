"""Plans a recipe: finds which stages are done and which would run, and why. Writes nothing."""

import contextlib
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from pipeline.provenance import package_versions
from pipeline.recipe import Recipe
from pipeline.resolve import ResolvedStage, Resolver, resolve_stages
from schemas.errors import ConfigError, DataError
from schemas.fingerprint import InputRef, attempt_folder, stage_fingerprint
from schemas.manifest import Manifest
from stages.stage import EarlierOutput, RecipeView, Stage, StageView
from stages.store.filesystems import Folder
from stages.store.locks import find_lock_holder
from stages.store.shards import LOCK, MANIFEST, StageDir, open_stage_dir, read_manifest

State = Literal["done", "resume", "run", "damaged"]


@dataclass(frozen=True, kw_only=True)
class Selection:
    """The stages that the user asked for; all of them unless narrowed."""

    only: str | None = None
    first: str | None = None
    last: str | None = None
    again: str | None = None
    """The stage to run anew, and with it everything that depends on it."""

    @property
    def words(self) -> list[str]:
        """The stages that were named."""
        named = (self.only, self.first, self.last, self.again)
        return [name for name in named if name is not None]

    def names(self, stage_list: Sequence[Stage[Any]]) -> list[str]:
        """List the names of the selected stages, in order.

        Raises:
            ConfigError: a word is no stage, or nothing is selected.
        """
        known = [stage.name for stage in stage_list]
        for name in self.words:
            _find_record(stage_list, name)
        if self.only is not None and (self.first or self.last):
            raise ConfigError("--only cannot be combined with --from or --until.")
        start = known.index(self.only or self.first or known[0])
        stop = known.index(self.only or self.last or known[-1])
        names = known[start : stop + 1]
        if not names:
            raise ConfigError(f"--from {self.first} comes after --until {self.last}.")
        if self.again is not None and self.again not in names:
            raise ConfigError(f"--again {self.again} is not among the stages to run: {names}.")
        return names


def _find_record(stage_list: Sequence[Stage[Any]], name: str) -> Stage[Any]:
    for stage in stage_list:
        if stage.name == name:
            return stage
    names = ", ".join(stage.name for stage in stage_list)
    raise ConfigError(f"{name}: no such stage. Stages: {names}.")


def _refuse_unneeded(stage: Stage[Any]) -> ConfigError:
    said = f"{stage.name}: nothing in this recipe reads it, so it is not run. {stage.needed_when}"
    return ConfigError(said.strip())


@dataclass(frozen=True, kw_only=True)
class PlannedStage:
    """One stage of a plan."""

    resolved: ResolvedStage
    fingerprint: str
    attempt: int
    inputs: Mapping[str, InputRef]
    out: StageDir
    state: State
    why: str
    is_selected: bool

    @property
    def name(self) -> str:
        return self.resolved.stage.name

    @property
    def ref(self) -> InputRef:
        return InputRef(self.fingerprint, self.attempt)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The stages that a recipe needs, in order, with their state in its store."""

    recipe: Recipe
    settings: RecipeView
    """The settings of all stages, needed or not."""
    store: Folder
    stages: list[PlannedStage]
    warnings: list[str]
    reusable: Mapping[str, Sequence[EarlierOutput]] = field(default_factory=dict)
    """Earlier outputs from which a stage that is not done would take values, by its name."""

    @property
    def todo(self) -> list[PlannedStage]:
        return [s for s in self.stages if s.is_selected and s.state != "done"]

    def stage(self, name: str) -> PlannedStage:
        """Return a stage by its name.

        Raises:
            ConfigError: there is no such stage, or the recipe does not need it.
        """
        for stage in self.stages:
            if stage.name == name:
                return stage
        raise _refuse_unneeded(_find_record(self.recipe.stage_list, name))

    def view(self, stage: PlannedStage) -> StageView:
        """Build the view of a stage that its own functions are given."""
        return _view_stage(stage, self.recipe, self.settings, self.store)


def _view_stage(
    stage: PlannedStage, recipe: Recipe, settings: RecipeView, store: Folder
) -> StageView:
    return StageView(
        config=stage.resolved.config,
        execution=recipe.execution[stage.name],
        pins=stage.resolved.pins,
        out=stage.out,
        store=store,
        attempt=stage.attempt,
        recipe=settings,
    )


def make_plan(recipe: Recipe, selection: Selection | None = None, *, has_gpus: bool) -> Plan:
    """Find out which stages of a recipe are complete in its store.

    Raises:
        ConfigError: the recipe or the selection is wrong, or a stage that is not selected is
            needed and not complete.
    """
    selection = selection or Selection()
    selected = selection.names(recipe.stage_list)
    store = Folder(recipe.store)
    settings = Resolver(recipe, has_gpus=has_gpus)
    planned: dict[str, PlannedStage] = {}
    for name, stage in resolve_stages(recipe, settings).items():
        planned[name] = _plan_stage(
            stage,
            store,
            planned,
            is_selected=name in selected,
            is_again=name == selection.again,
        )
    for word in selection.words:
        if word not in planned:
            raise _refuse_unneeded(_find_record(recipe.stage_list, word))
    for to_check in planned.values():
        if to_check.is_selected and to_check.state == "run":
            view = _view_stage(to_check, recipe, settings, store)
            to_check.resolved.stage.check(view)
    versions = package_versions()
    reusable: dict[str, Sequence[EarlierOutput]] = {}
    warnings: list[str] = []
    for name, planned_stage in planned.items():
        reuse = planned_stage.resolved.stage.reuse
        if reuse is None:
            continue
        view = _view_stage(planned_stage, recipe, settings, store)
        is_open = planned_stage.state not in ("done", "damaged")
        reusable[name] = earlier = reuse.find(view) if is_open else ()
        warnings += _find_reused_versions(planned_stage, earlier, versions)
        if earlier:
            why = f"{planned_stage.why}; equal {reuse.unit} are reused from {len(earlier)} earlier"
            planned[name] = dataclasses.replace(planned_stage, why=why)
    stages = list(planned.values())
    _check_inputs(stages)
    return Plan(
        recipe=recipe,
        settings=settings,
        store=store,
        stages=stages,
        warnings=[*_find_mixed_versions(stages, versions), *warnings],
        reusable=reusable,
    )


def _plan_stage(
    resolved: ResolvedStage,
    store: Folder,
    before: Mapping[str, PlannedStage],
    *,
    is_selected: bool,
    is_again: bool,
) -> PlannedStage:
    stage = resolved.stage
    inputs = {name: before[name].ref for name in resolved.inputs}
    fingerprint = stage_fingerprint(stage.name, stage.version, resolved.identity, inputs)
    last = _last_complete_attempt(store, stage.name, fingerprint)
    attempt = last + 1 if is_again else max(last, 1)
    out = open_stage_dir(
        store,
        stage.name,
        fingerprint,
        attempt,
        inputs={name: ref.folder for name, ref in inputs.items()},
    )
    state: State
    try:
        manifest = out.manifest()
        begun = _describe_begun(stage, out) if manifest is None and out.is_begun() else None
    except DataError as error:
        manifest, begun, damage = None, None, str(error)
    else:
        damage = ""
    if damage:
        state, why = "damaged", damage
    elif manifest is not None:
        state, why = "done", f"finished {manifest.started_at}"
    elif begun is not None:
        state, why = "resume", begun
    elif is_again:
        state, why = "run", "asked for by --again"
    else:
        state, why = "run", _explain(resolved, store, inputs, before)
    return PlannedStage(
        resolved=resolved,
        fingerprint=fingerprint,
        attempt=attempt,
        inputs=inputs,
        out=out,
        state=state,
        why=why,
        is_selected=is_selected,
    )


def _describe_begun(stage: Stage[Any], out: StageDir) -> str:
    """Describe how far a stage has come that has begun, and which process works on it now."""
    parts = ["begun"]
    if (layout := out.layout()) is not None:
        parts.append(f"{len(out.committed()):,} of {len(layout.shards):,} shards are done")
    elif progress := stage.display.describe_progress(out.folder):
        parts.append(progress)
    if (holder := find_lock_holder(out.folder, LOCK)) is not None:
        parts.append(f"{holder or 'a process'} works on it")
    return "; ".join(parts)


def _last_complete_attempt(store: Folder, stage: str, fingerprint: str) -> int:
    """Find the highest attempt that has a manifest; 0 if there is none."""
    last = attempt = 0
    stage_folder = store.child(stage)
    existing = set(stage_folder.list_folders())
    while attempt_folder(fingerprint, attempt + 1) in existing:
        attempt += 1
        if stage_folder.exists(f"{attempt_folder(fingerprint, attempt)}/{MANIFEST}"):
            last = attempt
    return last


def _check_inputs(stages: list[PlannedStage]) -> None:
    by_name = {stage.name: stage for stage in stages}
    for stage in stages:
        if not stage.is_selected or stage.state == "done":
            continue
        for name in stage.inputs:
            needed = by_name[name]
            if needed.state != "done" and not needed.is_selected:
                raise ConfigError(
                    f"{stage.name} needs {name}, which is not complete ({needed.why}). "
                    f"Run it too: --from {name}."
                )


def _explain(
    resolved: ResolvedStage,
    store: Folder,
    inputs: Mapping[str, InputRef],
    before: Mapping[str, PlannedStage],
) -> str:
    """Explain how this stage differs from the latest complete one in the store."""
    latest = _latest_manifest(store, resolved.stage.name)
    if latest is None:
        return "not run yet"
    if latest.version != resolved.stage.version:
        return f"stage version {latest.version} -> {resolved.stage.version}"
    changes = list(_differences(latest.config, resolved.identity))
    for name, ref in inputs.items():
        if latest.inputs.get(name) != ref:
            again = before[name].attempt > 1
            changes.append(f"{name} {'runs again' if again else 'changed'}")
    return ", ".join(changes) or "not run yet"


def _latest_manifest(store: Folder, stage: str) -> Manifest | None:
    folder = store.child(stage)
    complete = []
    for name in folder.list_folders():
        with contextlib.suppress(
            DataError
        ):  # A damaged output of another run is not compared with.
            complete.append(read_manifest(folder.child(name)))
    found = [manifest for manifest in complete if manifest is not None]
    return max(found, key=lambda manifest: manifest.started_at, default=None)


def _differences(old: Any, new: Any, path: str = "") -> list[str]:
    """List the keys that differ between two identity configs, with short values."""
    if isinstance(old, dict) and isinstance(new, dict):
        changes = []
        for key in sorted(set(old) | set(new)):
            dotted = f"{path}.{key}" if path else str(key)
            changes += _differences(old.get(key), new.get(key), dotted)
        return changes
    if old == new:
        return []
    if isinstance(old, list) or isinstance(new, list):
        return [f"{path} changed"]
    return [f"{path}: {_shorten(old)} -> {_shorten(new)}"]


def _shorten(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 24 else f"{text[:12]}…"


def _find_reused_versions(
    stage: PlannedStage, earlier: Sequence[EarlierOutput], now: Mapping[str, str]
) -> list[str]:
    """Warn where other versions computed the values that a stage has reused or would reuse."""
    reuse = stage.resolved.stage.reuse
    assert reuse is not None
    verb = "would reuse"
    versions_by_source = {each.folder.uri: each.versions for each in earlier}
    manifest = stage.out.manifest() if stage.state == "done" else None
    if manifest is not None:
        verb, versions_by_source = "holds", {"earlier outputs": reuse.read_versions(manifest)}
    warnings = []
    for source, versions in versions_by_source.items():
        pairs = [pair for made_with in versions for pair in made_with.items()]
        if changed := _describe_changes(sorted(set(pairs)), now):
            warnings.append(
                f"{stage.name} {verb} values from {source} that {changed} computed; they may "
                f"differ in the last digits from what would be computed now. `--again "
                f"{stage.name}` computes all of them anew."
            )
    return warnings


def _find_mixed_versions(stages: Sequence[PlannedStage], now: Mapping[str, str]) -> list[str]:
    """Warn where a finished stage was made with other versions of its numeric packages."""
    warnings = []
    for stage in stages:
        manifest = stage.out.manifest() if stage.state == "done" else None
        if manifest is None:
            continue
        packages = stage.resolved.stage.numeric_packages
        made_with = [(p, manifest.versions[p]) for p in packages if p in manifest.versions]
        if changed := _describe_changes(made_with, now):
            warnings.append(
                f"{stage.name} was made with {changed}; its numbers may differ in the last digits "
                f"from what would be computed now. `--again {stage.name}` redoes it."
            )
    return warnings


def _describe_changes(made_with: Iterable[tuple[str, str]], now: Mapping[str, str]) -> str:
    """Describe the packages whose version differs now; packages that are absent do not count."""
    return ", ".join(
        f"{package} {version} (now {now[package]})"
        for package, version in made_with
        if package in now and now[package] != version
    )
