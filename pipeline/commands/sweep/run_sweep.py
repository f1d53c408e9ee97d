"""Runs a sweep: what its runs share once, then as many trainings at once as there is room for."""

import contextlib
import logging
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial

from pipeline.commands.sweep.halving import RUNGS, choose_survivors
from pipeline.commands.sweep.plan import SweepPlan, Trial, find_trained
from pipeline.commands.sweep.record import Rung, SweepRecord, read_sweep_record
from pipeline.execute import execute_plan
from pipeline.plan import Plan, Selection
from pipeline.progress import MakeProgress, open_display
from pipeline.ray.session import Capacity, open_session, resolve_resources
from schemas.errors import PipelineError, StageStopped

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.2


@dataclass(frozen=True, kw_only=True)
class Machines:
    """Where the runs of a sweep run."""

    capacity: Capacity
    ray_address: str | None
    is_local: bool
    max_concurrent: int | None = None

    def count_slots(self, sweep: SweepPlan) -> int:
        """Count the trainings that there is room for at once, at least one."""
        if self.is_local:
            return 1
        room = [self.max_concurrent or len(sweep.trials), len(sweep.trials)]
        for trial in sweep.trials:
            name = find_trained(trial.plan).name
            resources = resolve_resources(trial.plan.recipe.execution[name], self.capacity)
            for there, needed in (
                (self.capacity.num_cpus, resources.num_cpus),
                (self.capacity.num_gpus, resources.num_gpus),
            ):
                if needed:
                    room.append(int(there / (needed * resources.num_workers)))
        return max(1, min(room))


@dataclass(kw_only=True)
class Outcome:
    """How the runs of a sweep ended."""

    record: SweepRecord
    failures: dict[str, str] = field(default_factory=dict)
    """Causes, by run."""
    stopped: dict[str, Rung] = field(default_factory=dict)
    """The rung at which a run was stopped, by run."""


def run_sweep(sweep: SweepPlan, machines: Machines, *, is_halving: bool) -> Outcome:
    """Run every stage that is not done. What is done stays, and another call goes on.

    A run that fails in training or later does not stop the others.

    Raises:
        PipelineError: a stage that runs share failed.
    """
    store = sweep.trials[0].plan.store
    record = read_sweep_record(store, sweep.name, recipe=sweep.recipe)
    driver = _Driver(sweep=sweep, machines=machines, outcome=Outcome(record=record))
    with contextlib.ExitStack() as stack:
        if not machines.is_local and any(trial.plan.todo for trial in sweep.trials):
            stack.enter_context(open_session(machines.ray_address))
        driver.run_shared()
        left = driver.halve(sweep.trials) if is_halving else sweep.trials
        driver.train(left)
        driver.run_rest(left)
    return driver.outcome


@dataclass(kw_only=True)
class _Driver:
    """Runs the parts of a sweep; several threads train."""

    sweep: SweepPlan
    machines: Machines
    outcome: Outcome
    _lock: threading.Lock = field(default_factory=threading.Lock)
    """Held while a thread plans a run or writes the sweep's record."""

    def run_shared(self) -> None:
        """Run the stages before training, each distinct output once."""
        for trial in self.sweep.trials:
            names = [stage.name for stage in trial.plan.stages]
            before = names[: names.index(find_trained(trial.plan).name)]
            if not before:
                continue
            plan = self.sweep.plan_again(trial, Selection(last=before[-1]))
            if plan.todo:
                self._execute(trial, plan)

    def halve(self, trials: Sequence[Trial]) -> list[Trial]:
        """Train up to each rung, and leave the worse half out. Complete runs always stay."""
        left = list(trials)
        for fraction in RUNGS:
            competing = [trial for trial in left if self._competes(trial, fraction)]
            if len(competing) < 2:
                break
            self.train(
                [t for t in competing if self.outcome.record.find(t.name, fraction) is None],
                stop_after=fraction,
            )
            places = {t.name: self.outcome.record.find(t.name, fraction) for t in competing}
            values = {
                name: self.sweep.value_of(rung.metrics)
                for name, rung in places.items()
                if rung is not None
            }
            survivors = choose_survivors(values)
            complete = {t.name for t in competing if find_trained(t.plan).out.is_complete()}
            for name, rung in places.items():
                if rung is not None and name not in survivors | complete:
                    logger.info("%s: stopped at step %d of %d", name, rung.step, rung.num_steps)
                    self.outcome.stopped[name] = rung
            left = [trial for trial in left if trial.name not in self.outcome.stopped]
        return [trial for trial in left if trial.name not in self.outcome.failures]

    def train(self, trials: Sequence[Trial], *, stop_after: float | None = None) -> None:
        """Train those that are not complete, as many at once as there is room for."""
        trials = [t for t in trials if not find_trained(t.plan).out.is_complete()]
        num_slots = min(self.machines.count_slots(self.sweep), len(trials))
        if num_slots < 2:
            for trial in trials:
                self._train(trial, stop_after)
            return
        with open_display() as make_progress:
            calls = [partial(self._train, trial, stop_after, make_progress) for trial in trials]
            _call_in_threads(calls, num_threads=num_slots)

    def run_rest(self, trials: Sequence[Trial]) -> None:
        """Run the stages after training, each run with the whole cluster."""
        for trial in trials:
            if trial.name not in self.outcome.failures:
                with self._noted_failure(trial):
                    self._execute(trial, self.sweep.plan_again(trial))

    def _competes(self, trial: Trial, fraction: float) -> bool:
        """Whether a run has a place at a rung: it has been there, or is still to come there."""
        if trial.name in self.outcome.failures:
            return False
        been = self.outcome.record.find(trial.name, fraction) is not None
        return been or not find_trained(trial.plan).out.is_complete()

    def _train(
        self, trial: Trial, stop_after: float | None, make_progress: MakeProgress | None = None
    ) -> None:
        trained = find_trained(trial.plan).name
        with self._noted_failure(trial):
            with self._lock:
                plan = self.sweep.plan_again(trial, Selection(last=trained), stop_after=stop_after)
            try:
                self._execute(trial, plan, make_progress)
            except StageStopped:
                if stop_after is None:  # The recipe itself says so.
                    raise
                planned = plan.stage(trained)
                stop = planned.resolved.stage.read_stop(planned.out)
                assert stop is not None, f"{trained} has just been stopped"
                rung = Rung(
                    fraction=stop_after,
                    step=stop.step,
                    num_steps=stop.num_steps,
                    metrics=dict(stop.metrics),
                )
                with self._lock:
                    self.outcome.record.add(plan.store, trial.name, rung)

    def _execute(self, trial: Trial, plan: Plan, make_progress: MakeProgress | None = None) -> None:
        logger.info("%s: %s", trial.name, trial.combination.label)
        if make_progress is not None:
            make_progress = _label_progress(make_progress, trial.combination.label)
        execute_plan(
            plan,
            capacity=self.machines.capacity,
            ray_address=self.machines.ray_address,
            is_local=self.machines.is_local,
            run_name=trial.name,
            make_progress=make_progress,
        )

    @contextlib.contextmanager
    def _noted_failure(self, trial: Trial) -> Iterator[None]:
        # Ray Train raises a worker's own exception again; torch's are RuntimeErrors.
        try:
            yield
        except (PipelineError, OSError, RuntimeError) as error:
            logger.error("%s failed: %s", trial.name, error)
            logger.debug("traceback", exc_info=error)
            self.outcome.failures[trial.name] = str(error)


def _label_progress(make_progress: MakeProgress, label: str) -> MakeProgress:
    return lambda stage: make_progress(f"{label}: {stage}")


def _wait_for(done: "queue.SimpleQueue[Future[None]]") -> "Future[None]":
    """Wait for a call, a moment at a time.

    A signal that one of Ray's threads receives does not wake this one, so Ctrl-C would wait too.
    """
    while True:
        with contextlib.suppress(queue.Empty):
            return done.get(timeout=_POLL_SECONDS)


def _call_in_threads(calls: Sequence[Callable[[], None]], *, num_threads: int) -> None:
    """Make calls in a few threads, and wait for all of them.

    The threads are daemons: after Ctrl-C, Ray never answers those that wait for it, so the end of
    the process must not wait for them.

    Raises:
        Exception: that of a call; the calls that have begun go on until the process ends.
    """
    waiting = deque(calls)
    done: queue.SimpleQueue[Future[None]] = queue.SimpleQueue()

    def work() -> None:
        while waiting:
            with contextlib.suppress(IndexError):
                call = waiting.popleft()
                future: Future[None] = Future()
                try:
                    call()
                except BaseException as error:  # Raised again in the thread that waits.
                    future.set_exception(error)
                else:
                    future.set_result(None)
                done.put(future)

    for _ in range(num_threads):
        threading.Thread(target=work, daemon=True).start()
    try:
        for _ in calls:
            _wait_for(done).result()
    finally:
        waiting.clear()
