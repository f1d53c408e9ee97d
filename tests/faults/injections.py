"""The faults: how each is injected, and how a run that meets it may end."""

import contextlib
import dataclasses
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil

from pipeline.stage_list import STAGE_NAMES
from tests.faults.arena import (
    Arena,
    StartedRun,
    call_verify,
    copy_stages,
    count_done,
    marked_processes,
    stages_before,
    start_run,
    wait_until,
)

SHARDED = ("validate", "dedupe", "encode", "score", "evaluate")
SCORING = ("score", "evaluate")


@dataclasses.dataclass(kw_only=True)
class Round:
    """One disturbed run: its inputs, and what the fault did to it."""

    arena: Arena
    stage: str
    """The stage to hit, which is the last one that the run executes."""
    random: random.Random
    store: Path
    mark: str
    uses_ray: bool = False
    said: list[str] = dataclasses.field(default_factory=list)
    """What was done and how the run ended, in the words of the table."""

    @property
    def stage_dir(self) -> Path:
        return self.arena.stage_dir(self.store, self.stage)

    def start(self, **environment: str) -> StartedRun:
        """Start the run on the store, in which all earlier stages are complete."""
        return start_run(
            self.arena,
            self.store,
            self.stage,
            is_local=not self.uses_ray,
            environment=environment,
            mark=self.mark,
        )

    def wait_for_moment(self, run: StartedRun) -> bool:
        """Wait until a random part of the stage is done, and up to 50 ms more."""
        total = count_done(self.arena.stage_dir(self.arena.undisturbed, self.stage))
        if self.stage == "train":
            total = 60
        wanted = self.random.randrange(max(1, 2 * total // 3))
        pause_s = self.random.uniform(0, 0.05)

        def is_time() -> bool:
            return self.stage_dir.exists() and count_done(self.stage_dir) >= wanted

        if not wait_until(run, is_time):
            self.said.append("the run was faster")
            return False
        time.sleep(pause_s)
        unit = "steps" if self.stage == "train" else "records"
        self.said.append(f"after {count_done(self.stage_dir)} {unit}")
        return True

    def expect(self, run: StartedRun, *codes: int, words: str = "") -> None:
        """Wait until a run ends, and check its exit code and its last message."""
        code = run.wait()
        ending = _describe_ending(run, code)
        self.said.append(ending)
        assert code in codes, f"{ending}, expected {codes}: {run.errors()[-3000:]}"
        if words and code > 0:
            assert words in run.errors(), run.errors()[-3000:]
        if code in (1, 2):
            assert "Traceback" not in run.errors(), run.errors()[-3000:]


def _describe_ending(run: StartedRun, code: int) -> str:
    ending = f"exit code {code}" if code >= 0 else signal.Signals(-code).name
    return f"{ending}: {_shorten(run.last_words())}" if code > 0 else ending


def _shorten(text: str) -> str:
    return text if len(text) <= 160 else f"{text[:120]} … {text[-35:]}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fault:
    """A fault that can be injected."""

    title: str
    stages: tuple[str, ...]
    """The stages that it can hit."""
    inject: Callable[[Round], None]
    uses_ray: bool = False
    needs: Callable[[], str] = lambda: ""
    """Returns why this machine cannot inject it, or an empty text."""


# --- signals ------------------------------------------------------------------------------------


def kill_driver(this: Round) -> None:
    run = this.start()
    this.wait_for_moment(run)
    _signal(run, signal.SIGKILL)
    this.expect(run, -signal.SIGKILL, 0)


def interrupt_driver(this: Round) -> None:
    run = this.start()
    this.wait_for_moment(run)
    _signal(run, signal.SIGINT)
    this.expect(run, 130, 0)


def terminate_driver(this: Round) -> None:
    run = this.start()
    this.wait_for_moment(run)
    _signal(run, signal.SIGTERM)
    this.expect(run, 143, 0)


def stop_driver(this: Round) -> None:
    run = this.start()
    if this.wait_for_moment(run):
        _pause(run.process.pid, this.random.uniform(0.5, 2))
        this.said.append("stopped for a while")
    this.expect(run, 0)


def _signal(run: StartedRun, number: int) -> None:
    if run.is_running():
        os.kill(run.process.pid, number)


def _pause(pid: int, seconds: float) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGSTOP)
        time.sleep(seconds)
        os.kill(pid, signal.SIGCONT)


def _wait_for_worker(this: Round, run: StartedRun, *names: str) -> psutil.Process | None:
    """Wait until a Ray worker works on the stage, and return it; None if the run ends before."""
    this.wait_for_moment(run)
    found: list[psutil.Process] = []

    def is_there() -> bool:
        found[:] = [
            process for process in marked_processes(this.mark) if _name(process).startswith(names)
        ]
        return bool(found)

    return this.random.choice(found) if wait_until(run, is_there) else None


def _name(process: psutil.Process) -> str:
    try:
        return process.cmdline()[0] if process.cmdline() else ""
    except psutil.NoSuchProcess:
        return ""


def kill_actor(this: Round) -> None:
    run = this.start()
    worker = _wait_for_worker(this, run, "ray::_WorkerHost")
    if worker is not None:
        with contextlib.suppress(psutil.NoSuchProcess):
            worker.kill()
            this.said.append("its actor killed")
    this.expect(run, 0)


def stop_actor(this: Round) -> None:
    run = this.start()
    worker = _wait_for_worker(this, run, "ray::_WorkerHost")
    if worker is not None:
        _pause(worker.pid, this.random.uniform(1, 3))
        this.said.append("its actor stopped for a while")
    this.expect(run, 0)


def kill_train_worker(this: Round) -> None:
    run = this.start()
    worker = _wait_for_worker(this, run, "ray::RayTrainWorker")
    if worker is not None:
        with contextlib.suppress(psutil.NoSuchProcess):
            worker.kill()
            this.said.append("its worker killed")
    this.expect(run, 0)


def kill_raylet(this: Round) -> None:
    """Kill the only node of the run's cluster: the run cannot go on and must not hang."""
    run = this.start()
    raylet = _wait_for_worker(this, run, "/")
    raylets = [each for each in marked_processes(this.mark) if each.name() == "raylet"]
    if raylet is not None and raylets:
        raylets[0].kill()
        this.said.append("the raylet killed")
    this.expect(run, 1, 0)


def kill_ray_driver(this: Round) -> None:
    run = this.start()
    this.wait_for_moment(run)
    _signal(run, signal.SIGKILL)
    this.expect(run, -signal.SIGKILL, 0)


# --- disks --------------------------------------------------------------------------------------


@contextlib.contextmanager
def _small_disk(this: Round) -> Iterator[Path]:
    """Move the store to a disk of its own during the block, and back afterwards."""
    disk = this.store.with_name("disk")
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", disk], check=True)
    home, this.store = this.store, disk / "store"
    try:
        shutil.copytree(home, this.store, dirs_exist_ok=True)
        yield disk
    finally:
        subprocess.run(["mount", "-o", "remount,rw,size=64m", disk], check=True)
        shutil.rmtree(home, ignore_errors=True)
        if this.store.exists():
            shutil.copytree(this.store, home)
        subprocess.run(["umount", disk], check=True)
        disk.rmdir()
        this.store = home


def fill_disk(this: Round) -> None:
    with _small_disk(this) as disk:
        needed = _pages(this.arena.stage_dir(this.arena.undisturbed, this.stage))
        room = int(_pages(this.store) + this.random.uniform(0.1, 1.0) * needed) + 8
        subprocess.run(["mount", "-o", f"remount,size={4 * room}k", disk], check=True)
        this.said.append(f"{4 * (room - _pages(this.store))} KiB left at its start")
        this.expect(this.start(), 1, 0, words="No space left on device")


def _pages(folder: Path) -> int:
    sizes = (path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return sum(-(-size // 4096) for size in sizes)


def make_disk_read_only(this: Round) -> None:
    with _small_disk(this) as disk:
        run = this.start()
        this.wait_for_moment(run)
        while run.is_running():  # A file that is open for writing makes the remount fail.
            done = subprocess.run(["mount", "-o", "remount,ro", disk], capture_output=True)
            if done.returncode == 0:
                break
        this.expect(run, 1, 0, words="Read-only file system")


def deny_writing(this: Round) -> None:
    """Make one of the run's directories unwritable."""
    choices = {
        "before it begins": this.store / this.stage,
        "in the midst of it": this.stage_dir / ("checkpoints" if this.stage == "train" else "data"),
        "for run records": this.store / "runs",
    }
    when = this.random.choice(sorted(choices))
    folder = choices[when]
    this.said.append(f"{when}, {folder.relative_to(this.store)}")
    if when != "in the midst of it":
        folder.mkdir(parents=True, exist_ok=True)
        _deny(folder)
    run = this.start()
    if when == "in the midst of it" and wait_until(run, folder.exists):
        _deny(folder)
    try:
        this.expect(run, 1, 0)
    finally:
        _allow(folder)


def _deny(folder: Path) -> None:
    if os.geteuid() == 0:  # Permissions do not stop root.
        subprocess.run(["chattr", "+i", folder], check=True)
    else:
        folder.chmod(0o500)


def _allow(folder: Path) -> None:
    if folder.exists() and os.geteuid() == 0:
        subprocess.run(["chattr", "-i", folder], check=True)
    elif folder.exists():
        folder.chmod(0o700)


def hide_input(this: Round) -> None:
    path = this.random.choice(this.arena.inputs)
    hidden = path.with_suffix(".hidden")
    run = this.start()
    try:
        this.wait_for_moment(run)
        path.rename(hidden)
        this.said.append(f"{path.name} gone")
        this.expect(run, 0, 1, 2, words=path.name)
    finally:
        hidden.rename(path)


# --- damage -------------------------------------------------------------------------------------


def damage_complete_store(this: Round) -> None:
    run = this.start()
    assert run.wait() == 0, run.errors()
    victims = [path for path in this.store.rglob("*") if _is_part_of_run(this, path)]
    _damage(this, this.random.choice(sorted(victims)))


def damage_unfinished_store(this: Round) -> None:
    """Kill a run, then damage one of the files that it committed."""
    run = this.start()
    this.wait_for_moment(run)
    _signal(run, signal.SIGKILL)
    this.expect(run, -signal.SIGKILL, 0)
    committed = [
        path
        for path in this.stage_dir.rglob("*")
        if _is_part_of_run(this, path)
        and not {"_staging", "_work", "checkpoints"} & set(path.parts)
    ]
    records = {path.name[:10] for path in committed if path.parent.name == "_commits"}
    victims = [path for path in committed if path.name[:10] in records]
    if victims:
        _damage(this, this.random.choice(sorted(victims)))
    else:
        this.said.append("nothing was committed yet")


def _is_part_of_run(this: Round, path: Path) -> bool:
    """Return whether a file is a stage's output; losing any other file costs only time."""
    top = path.relative_to(this.store).parts[0]
    return path.is_file() and top in STAGE_NAMES and path.stat().st_size > 0


def _damage(this: Round, path: Path) -> None:
    """Flip a bit in a file or truncate it; `verify --repair` must name it and repair the store."""
    content = bytearray(path.read_bytes())
    if this.random.random() < 0.5:
        place = this.random.randrange(8 * len(content))
        content[place // 8] ^= 1 << place % 8
        how = f"bit {place} flipped"
    else:
        del content[this.random.randrange(len(content)) :]
        how = f"cut to {len(content)} bytes"
    path.write_bytes(content)
    name = str(path.relative_to(this.store))
    verdict = call_verify(this.arena, this.store, repair=True)
    named = [fault for fault in verdict["faults"] if name in fault or path.name in fault]
    this.said.append(f"{name} {how}; verify: {_shorten(named[0] if named else 'not found')}")
    assert named, f"{name} {how} is not among {verdict['faults']}"


# --- the rest -----------------------------------------------------------------------------------


def jump_clock(this: Round) -> None:
    """Start a run with a wrong wall clock, and set the clock again while it runs."""
    library, offset = this.arena.folder / "clock.so", this.arena.folder / f"offset-{this.mark}"
    if not library.exists():
        source = Path(__file__).with_name("clock.c")
        subprocess.run(["cc", "-O1", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    jumps = [
        this.random.choice((-1, 1)) * this.random.randrange(3600, 10 * 365 * 86400) for _ in "ab"
    ]
    offset.write_text(str(jumps[0]))
    run = this.start(LD_PRELOAD=str(library), FAULTS_CLOCK_OFFSET=str(offset))
    this.wait_for_moment(run)
    offset.write_text(str(jumps[1]))
    this.said.append("by {:+,} and then {:+,} hours".format(*(jump // 3600 for jump in jumps)))
    this.expect(run, 0)


def run_twice_at_once(this: Round) -> None:
    first = this.start()
    time.sleep(this.random.choice((0, 0.1, 1)))
    second = this.start()
    for run in (first, second):
        this.expect(run, 0)


def exhaust_memory(this: Round) -> None:
    """Limit the process, while it runs, to less memory than it already has."""
    run = this.start()
    if this.wait_for_moment(run):
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(run.process.pid)
            limit = process.memory_info().vms // 2
            process.rlimit(psutil.RLIMIT_AS, (limit, limit))
    code = run.wait()
    this.said.append(_describe_ending(run, code))
    assert "Traceback" not in run.errors() or code not in (1, 2), run.errors()[-3000:]


def _lacks_root() -> str:
    return "" if os.geteuid() == 0 else "needs root to mount a disk"


def _lacks_compiler() -> str:
    return "" if shutil.which("cc") else "needs a C compiler for the clock"


FAULTS: dict[str, Fault] = {
    "kill driver": Fault(title="SIGKILL of the run", stages=STAGE_NAMES, inject=kill_driver),
    "interrupt": Fault(title="Ctrl-C", stages=STAGE_NAMES, inject=interrupt_driver),
    "terminate": Fault(title="SIGTERM", stages=STAGE_NAMES, inject=terminate_driver),
    "stop driver": Fault(
        title="SIGSTOP of the run, then SIGCONT", stages=STAGE_NAMES, inject=stop_driver
    ),
    "full disk": Fault(title="disk full", stages=STAGE_NAMES, inject=fill_disk, needs=_lacks_root),
    "read-only disk": Fault(
        title="disk turns read-only",
        stages=STAGE_NAMES,
        inject=make_disk_read_only,
        needs=_lacks_root,
    ),
    "permission": Fault(
        title="a directory may not be written to", stages=STAGE_NAMES, inject=deny_writing
    ),
    "vanished input": Fault(
        title="an input file vanishes", stages=("validate",), inject=hide_input
    ),
    "damage": Fault(
        title="a file of a complete run is damaged",
        stages=STAGE_NAMES,
        inject=damage_complete_store,
    ),
    "damage unfinished": Fault(
        title="SIGKILL, then a committed file is damaged",
        stages=SHARDED,
        inject=damage_unfinished_store,
    ),
    "clock": Fault(
        title="the wall clock jumps", stages=STAGE_NAMES, inject=jump_clock, needs=_lacks_compiler
    ),
    "two runs": Fault(title="two runs at once", stages=STAGE_NAMES, inject=run_twice_at_once),
    "memory": Fault(title="out of memory", stages=STAGE_NAMES, inject=exhaust_memory),
    "kill actor": Fault(
        title="SIGKILL of a Ray actor", stages=SHARDED, inject=kill_actor, uses_ray=True
    ),
    "stop actor": Fault(
        title="SIGSTOP of a Ray actor, then SIGCONT",
        stages=SHARDED,
        inject=stop_actor,
        uses_ray=True,
    ),
    "kill train worker": Fault(
        title="SIGKILL of a Ray Train worker",
        stages=("train",),
        inject=kill_train_worker,
        uses_ray=True,
    ),
    "kill raylet": Fault(
        title="SIGKILL of the raylet", stages=SHARDED, inject=kill_raylet, uses_ray=True
    ),
    "kill Ray driver": Fault(
        title="SIGKILL of a run over Ray",
        stages=STAGE_NAMES,
        inject=kill_ray_driver,
        uses_ray=True,
    ),
}

__all__ = ["FAULTS", "SCORING", "Fault", "Round", "copy_stages", "stages_before"]
