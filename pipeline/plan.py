"""What is done already, what would run, and why: read from the store, writing nothing."""

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from pipeline.provenance import NUMERIC_PACKAGES, package_versions
from pipeline.recipe import Recipe
from pipeline.resolve import ResolvedStage, resolve_stages
from pipeline.stage_list import STAGE_NAMES, load_stages
from schemas.errors import ConfigError, DataError
from schemas.fingerprint import InputRef, attempt_folder, stage_fingerprint
from schemas.manifest import Manifest
from stages.score import find_reusable, pin_reference
from stages.score.reuse import EarlierScore
from stages.scorers.reference import identify_reference
from stages.store.filesystems import Folder
from stages.store.shards import LOCK, MANIFEST, StageDir, open_stage_dir, read_manifest
from stages.train.log import describe_step, read_progress

State = Literal["done", "resume", "run", "damaged"]


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Which stages the user asked for; all of them unless narrowed."""

    only: str | None = None
    first: str | None = None
    last: str | None = None
    again: str | None = None
    """The stage to run anew, and with it everything that depends on it."""

    def names(self) -> list[str]:
        """Give the selected stages in order.

        Raises:
            ConfigError: a word that is no stage, or a selection that holds none.
        """
        for name in (self.only, self.first, self.last, self.again):
            if name is not None and name not in STAGE_NAMES:
                raise ConfigError(f"{name}: no such stage. Stages: {', '.join(STAGE_NAMES)}.")
        if self.only is not None and (self.first or self.last):
            raise ConfigError("--only goes without --from and --until.")
        start = STAGE_NAMES.index(self.only or self.first or STAGE_NAMES[0])
        stop = STAGE_NAMES.index(self.only or self.last or STAGE_NAMES[-1])
        names = list(STAGE_NAMES[start : stop + 1])
        if not names:
            raise ConfigError(f"--from {self.first} lies behind --until {self.last}.")
        if self.again is not None and self.again not in names:
            raise ConfigError(f"--again {self.again} is not among the stages to run: {names}.")
        return names


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
    recipe: Recipe
    store: Folder
    stages: list[PlannedStage]
    warnings: list[str]
    earlier_scores: Sequence[EarlierScore] = ()
    """Those whose values score would reuse."""

    @property
    def todo(self) -> list[PlannedStage]:
        return [s for s in self.stages if s.is_selected and s.state != "done"]

    def stage(self, name: str) -> PlannedStage:
        if name not in STAGE_NAMES:
            raise ConfigError(f"{name}: no such stage. Stages: {', '.join(STAGE_NAMES)}.")
        for stage in self.stages:
            if stage.name == name:
                return stage
        raise ConfigError(_NOT_NEEDED.format(name))


_NOT_NEEDED = (
    "{}: nothing in this recipe reads it, so it is not run. Training reads score only where a loss "
    "compares with the reference."
)


def make_plan(recipe: Recipe, selection: Selection | None = None, *, has_gpus: bool) -> Plan:
    """Find out which stages of a recipe are complete in its store.

    Raises:
        ConfigError: the recipe or the selection is wrong, or a stage that is not selected is
            needed and not complete.
    """
    selection = selection or Selection()
    selected = selection.names()
    store = Folder(recipe.store)
    resolved = resolve_stages(recipe, load_stages(), has_gpus=has_gpus)
    planned: dict[str, PlannedStage] = {}
    for name, stage in resolved.items():
        planned[name] = _plan_stage(
            stage,
            store,
            planned,
            is_selected=name in selected,
            is_again=name == selection.again,
        )
    for word in (selection.only, selection.first, selection.last, selection.again):
        if word is not None and word not in planned:
            raise ConfigError(_NOT_NEEDED.format(word))
    warnings: list[str] = []
    earlier: list[EarlierScore] = []
    if "score" in planned:
        score = planned["score"]
        earlier = _find_earlier_scores(score, planned["encode"], store, recipe)
        warnings = _find_reused_versions(score, earlier)
        if earlier:
            why = f"{score.why}; equal sequences are reused from {len(earlier)} earlier"
            planned["score"] = dataclasses.replace(score, why=why)
    stages = list(planned.values())
    _check_inputs(stages)
    warnings = [*_find_mixed_versions(stages), *warnings]
    return Plan(
        recipe=recipe, store=store, stages=stages, warnings=warnings, earlier_scores=earlier
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
        begun = _describe_begun(out) if manifest is None and out.is_begun() else None
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


def _describe_begun(out: StageDir) -> str:
    """Say how far a stage is that has begun, and who works on it now, on whatever machine."""
    parts = ["begun"]
    if (layout := out.layout()) is not None:
        parts.append(f"{len(out.committed()):,} of {len(layout.shards):,} shards are done")
    else:
        # The log may be damaged, or be deleted meanwhile by the run that writes it.
        with contextlib.suppress(FileNotFoundError, msgspec.DecodeError):
            started, newest = read_progress(out.folder)
            if started is not None:
                step = f"step {newest.step if newest else started.step:,} of {started.num_steps:,}"
                parts.append(f"{step}: {describe_step(newest)}" if newest else step)
    if (holder := out.folder.holder(LOCK)) is not None:
        parts.append(f"{holder or 'a process'} works on it")
    return "; ".join(parts)


def _last_complete_attempt(store: Folder, stage: str, fingerprint: str) -> int:
    """Give the highest attempt that has a manifest, 0 if none."""
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
    """Say how this stage differs from the latest complete one in the store."""
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
        with contextlib.suppress(DataError):  # Of another run; this one only compares with it.
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


def _find_earlier_scores(
    score: PlannedStage, encode: PlannedStage, store: Folder, recipe: Recipe
) -> list[EarlierScore]:
    """List the scores whose values score would reuse; none when it is done, or imports all."""
    config = score.resolved.config
    if score.state in ("done", "damaged") or config.backend == "import":
        return []
    reference = identify_reference(
        pin_reference(score.resolved.pins),
        engine=config.backend,
        dtype=config.dtype,
        max_length=encode.resolved.config.max_length,
    )
    return find_reusable(
        store, reference, recipe.execution["score"], out=score.out, attempt=score.attempt
    )


def _find_reused_versions(score: PlannedStage, earlier: Sequence[EarlierScore]) -> list[str]:
    """Warn where values that score has reused, or would, were computed by other versions."""
    verb = "would reuse"
    versions_by_name = {each.folder.uri: each.versions for each in earlier}
    manifest = score.out.manifest() if score.state == "done" else None
    if manifest is not None:
        verb = "holds"
        versions_by_name = {"earlier scores": manifest.summary["reused_versions"]}
    now = package_versions()
    warnings = []
    for name, versions in versions_by_name.items():
        changed = sorted(
            {
                f"{package} {version} (now {now[package]})"
                for made_with in versions
                for package, version in made_with.items()
                if package in now and now[package] != version
            }
        )
        if changed:
            warnings.append(
                f"score {verb} values from {name} that {', '.join(changed)} computed; they may "
                "differ in the last digits from what would be computed now. `--again score` "
                "computes all anew."
            )
    return warnings


def _find_mixed_versions(stages: list[PlannedStage]) -> list[str]:
    """Warn where stages that stay were made with other versions of what decides their numbers."""
    now = package_versions()
    warnings = []
    for stage in stages:
        manifest = stage.out.manifest() if stage.state == "done" else None
        if manifest is None:
            continue
        changed = [
            f"{package} {manifest.versions[package]} (now {now[package]})"
            for package in NUMERIC_PACKAGES.get(stage.name, ())
            if manifest.versions.get(package) != now.get(package)
            and package in manifest.versions
            and package in now
        ]
        if changed:
            warnings.append(
                f"{stage.name} was made with {', '.join(changed)}; its numbers may differ in the "
                f"last digits from what would be computed now. `--again {stage.name}` redoes it."
            )
    return warnings
