"""Plans a sweep: a run for each combination, and the outputs that the runs share."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from pipeline.commands.sweep.grid import Combination, list_combinations
from pipeline.execute import default_run_name
from pipeline.plan import Plan, PlannedStage, Selection, make_plan
from pipeline.recipe import load_recipe
from schemas.config import dump_config
from schemas.errors import ConfigError

_STATES = {"done": "done", "resume": "to resume", "run": "to run", "damaged": "damaged"}


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One run of a sweep."""

    combination: Combination
    plan: Plan
    """All of its stages, as they were when the sweep was planned."""

    @property
    def name(self) -> str:
        """Name of the run, the same as without a sweep."""
        return default_run_name(self.plan)


@dataclass(frozen=True, kw_only=True)
class SweepPlan:
    """The runs of a sweep, none of them equal to another."""

    recipe: str
    store: str | None
    has_gpus: bool
    trials: list[Trial]

    @cached_property
    def name(self) -> str:
        """Name of the sweep: the recipe's, and a digest of its runs."""
        names = "\n".join(sorted(trial.name for trial in self.trials))
        digest = hashlib.sha256(names.encode()).hexdigest()[:12]
        return f"{self.trials[0].plan.recipe.name}-{digest}"

    @cached_property
    def has_equal_losses(self) -> bool:
        """Whether values of the loss can be compared: one loss, of policies trained on one input.

        A loss of another kind or beta is another scale.
        """
        trained = [find_trained(trial.plan) for trial in self.trials]
        kinds = [(dump_config(s.resolved.config).get("loss"), s.inputs) for s in trained]
        return all(kind == kinds[0] for kind in kinds)

    def value_of(self, metrics: Mapping[str, float]) -> float:
        """Return what unfinished runs are compared by, lower is better.

        Args:
            metrics: of the held-out pairs, by name.
        """
        return metrics["loss"] if self.has_equal_losses else -metrics["rewards/accuracies"]

    def plan_again(
        self, trial: Trial, selection: Selection | None = None, *, stop_after: float | None = None
    ) -> Plan:
        """Plan a trial anew, after other runs may have completed some of its stages."""
        overrides = list(trial.combination.overrides)
        if stop_after is not None:
            name = find_trained(trial.plan).name
            overrides.append(f"execution.{name}.stop_after={stop_after}")
        recipe = load_recipe(self.recipe, overrides=overrides, store=self.store)
        return make_plan(recipe, selection, has_gpus=self.has_gpus)


def find_trained(plan: Plan) -> PlannedStage:
    """Find the stage that decides what a run makes: everything before it can be shared."""
    return next(stage for stage in plan.stages if stage.resolved.stage.names_runs)


def plan_sweep(
    recipe: str, overrides: Sequence[str], *, store: str | None, has_gpus: bool
) -> SweepPlan:
    """Load and plan every combination.

    Raises:
        ConfigError: an option cannot be read, a value is wrong (each is named once), two
            combinations would train the same, or their stores differ.
    """
    trials: list[Trial] = []
    mistakes: dict[str, None] = {}
    for combination in list_combinations(overrides):
        try:
            loaded = load_recipe(recipe, overrides=combination.overrides, store=store)
            plan = make_plan(loaded, has_gpus=has_gpus)
            trials.append(Trial(combination=combination, plan=plan))
        except ConfigError as error:
            mistakes |= dict.fromkeys(str(error).splitlines())
    if mistakes:
        raise ConfigError("\n".join(mistakes))
    if len({trial.plan.recipe.store for trial in trials}) > 1:
        raise ConfigError("The runs of a sweep share one store: pass one value of `store`.")
    by_ref: dict[str, Trial] = {}
    for trial in trials:
        first = by_ref.setdefault(find_trained(trial.plan).ref.folder, trial)
        if first is not trial:
            raise ConfigError(
                f"{first.combination.label} and {trial.combination.label} train the same model. "
                "Leave one out: a sweep varies what changes the training, by values that differ."
            )
    return SweepPlan(recipe=recipe, store=store, has_gpus=has_gpus, trials=trials)


def show_sweep_plan(sweep: SweepPlan, *, num_at_once: int) -> RenderableType:
    """Show how many outputs each stage has for how many runs, and how many of them are done."""
    table = Table(box=None, pad_edge=False)
    for heading in ("stage", "outputs", "state"):
        table.add_column(heading, overflow="fold")
    for name in dict.fromkeys(stage.name for trial in sweep.trials for stage in trial.plan.stages):
        stages = {
            stage.ref: stage
            for trial in sweep.trials
            for stage in trial.plan.stages
            if stage.name == name
        }
        states = [stage.state for stage in stages.values()]
        counts = [f"{states.count(s)} {words}" for s, words in _STATES.items() if s in states]
        table.add_row(name, str(len(stages)), ", ".join(counts))
    label = f"{len(sweep.trials)} runs, {num_at_once} training at a time"
    return Group(Text(label), table)
