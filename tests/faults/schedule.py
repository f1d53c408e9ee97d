"""A schedule of faults drawn from a seed, and the rounds that play it."""

import dataclasses
import os
import random
import re
import shutil
import time
from collections.abc import Sequence

from tests.faults.arena import (
    Arena,
    call_verify,
    copy_stages,
    find_differences,
    marked_processes,
    stages_before,
    start_run,
)
from tests.faults.injections import FAULTS, Round

ENDS_WITHIN_S = 60
"""Limit for Ray's daemons to notice that their driver is gone."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Appointment:
    """One round of the schedule."""

    number: int
    fault: str
    """Its name in FAULTS."""
    stage: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """The result of a round."""

    appointment: Appointment
    said: str
    seconds: float
    failures: tuple[str, ...]
    """Empty if no file was lost, doubled or changed and no process is left."""


def make_schedule(
    seed: int,
    num_rounds: int,
    *,
    faults: Sequence[str] | None = None,
    stages: Sequence[str] | None = None,
) -> list[Appointment]:
    """Draw a schedule: every fault once before any is repeated, each in a random stage."""
    chance = random.Random(seed)
    wanted = [
        name
        for name, fault in FAULTS.items()
        if name in (faults or FAULTS)
        and not fault.needs()
        and set(fault.stages) & set(stages or fault.stages)
    ]
    drawn: list[Appointment] = []
    while len(drawn) < num_rounds:
        for name in chance.sample(wanted, len(wanted)):
            usable = [stage for stage in FAULTS[name].stages if stage in (stages or (stage,))]
            drawn.append(
                Appointment(number=len(drawn) + 1, fault=name, stage=chance.choice(usable))
            )
    return drawn[:num_rounds]


def play_round(arena: Arena, seed: int, appointment: Appointment) -> Outcome:
    """Disturb a run, run it again, and compare the store with the undisturbed run's."""
    started = time.monotonic()
    fault = FAULTS[appointment.fault]
    store = arena.folder / f"round-{appointment.number}"
    this = Round(
        arena=arena,
        stage=appointment.stage,
        random=random.Random(f"{seed} {appointment.number}"),
        store=store,
        mark=f"{os.getpid()}-{seed}-{appointment.number}",
        uses_ray=fault.uses_ray,
    )
    copy_stages(arena, store, stages_before(this.stage))
    store.mkdir(exist_ok=True)
    failures: list[str] = []
    try:
        fault.inject(this)
        failures += _finish(this)
    except AssertionError as error:
        failures.append(str(error))
    finally:
        for process in marked_processes(this.mark):
            process.kill()
    if not failures:
        shutil.rmtree(store)
    return Outcome(
        appointment=appointment,
        said=_without_folder("; ".join(this.said), arena),
        seconds=time.monotonic() - started,
        failures=tuple(failures),
    )


def _without_folder(text: str, arena: Arena) -> str:
    """Make the paths in a text relative to the store."""
    return re.sub(rf"{re.escape(str(arena.folder))}/((round-\d+|disk/store)/)?", "", text)


def _finish(this: Round) -> list[str]:
    """Run the same command again; return all differences, faults and processes left behind."""
    failures = []
    again = start_run(
        this.arena, this.store, this.stage, is_local=not this.uses_ray, mark=this.mark
    )
    if again.wait() != 0:
        return [f"the second run failed: {again.errors()[-3000:]}"]
    failures += find_differences(this.arena, this.store, this.stage)
    verdict = call_verify(this.arena, this.store)
    failures += verdict["faults"]
    deadline = time.monotonic() + ENDS_WITHIN_S
    while (left := marked_processes(this.mark)) and time.monotonic() < deadline:
        time.sleep(0.2)
    failures += [f"process {process.name()} is left behind" for process in left]
    return failures
