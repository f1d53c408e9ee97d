"""The command line: runs preference-tuning recipes and shows what they made."""

import atexit
import codecs
import contextlib
import io
import logging
import os
import signal
import sys
import threading
from types import FrameType
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

if TYPE_CHECKING:
    from pipeline.plan import Plan, Selection

# The commands import the pipeline themselves, so that --help answers at once.

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="""Offline DPO: compute reference log-probs once, into Parquet, and train from the file.

    A recipe is a YAML file; pipeline/recipes/ has examples. It runs in stages:
    validate → dedupe → encode → score → train → evaluate. A complete stage never runs again:
    after a change of a key, only the stages that depend on the key run.

    Start with `plan RECIPE`, which shows what would run and why, then `run RECIPE`.

    Exit codes: 0 done, 1 the run failed, 2 a mistake in the recipe or the options, 130
    interrupted, 143 terminated.""",
)

RecipePath = Annotated[str, typer.Argument(metavar="RECIPE", help="The recipe, a YAML file.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", help="Change a key, such as stages.train.loss.beta=0.2. Repeatable."),
]
Store = Annotated[
    str | None, typer.Option(help="Path or URI of the store, instead of the recipe's.")
]
RayAddress = Annotated[
    str | None,
    typer.Option(
        envvar="RAY_ADDRESS",
        help="Ray cluster to use, such as auto or ray://host:10001. Default: start one here.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for other programs.")]


@app.command()
def plan(
    recipe: RecipePath,
    overrides: Overrides = None,
    again: Annotated[str | None, typer.Option(help="Plan as if this stage ran again.")] = None,
    estimate: Annotated[
        bool,
        typer.Option("--estimate", help="Estimate hours, GPU-hours and bytes of what would run."),
    ] = False,
    assume: Annotated[
        list[str] | None,
        typer.Option(
            help="Assume for the estimate: num_pairs=1e8, num_gpus=64, gpu=h100, …. Repeatable."
        ),
    ] = None,
    store: Store = None,
    ray_address: RayAddress = None,
    as_json: Json = False,
) -> None:
    """Show which stages are done, which would run, and why. Writes nothing."""
    from pipeline.commands.estimate import (
        estimate_to_dict,
        make_estimate,
        parse_assumptions,
        show_estimate,
    )
    from pipeline.commands.show import plan_to_dict, show_plan
    from pipeline.plan import Selection
    from pipeline.ray.session import find_capacity

    assumed = parse_assumptions(assume or ())
    made = _make_plan(recipe, overrides, store, ray_address, Selection(again=again))
    if not estimate:
        _print(plan_to_dict(made) if as_json else show_plan(made))
        return
    found = make_estimate(made, find_capacity(ray_address, is_local=False), assumed)
    _print(estimate_to_dict(found) if as_json else show_estimate(found))


@app.command()
def run(
    recipe: RecipePath,
    only: Annotated[str | None, typer.Option(help="Run only this stage.")] = None,
    first: Annotated[
        str | None, typer.Option("--from", help="Run this stage and those after it.")
    ] = None,
    last: Annotated[
        str | None, typer.Option("--until", help="Run the stages up to this one.")
    ] = None,
    again: Annotated[
        str | None,
        typer.Option(help="Run this stage and those after it again, beside the old output."),
    ] = None,
    overrides: Overrides = None,
    name: Annotated[
        str | None, typer.Option(help="Name of the run. Default: recipe and fingerprint.")
    ] = None,
    store: Store = None,
    ray_address: RayAddress = None,
    local: Annotated[
        bool, typer.Option("--local", help="Run everything in this process, without Ray.")
    ] = False,
    verbose: Annotated[bool, typer.Option(help="Log details and tracebacks.")] = False,
) -> None:
    """Run the stages that are not complete, then print a summary and write a report."""
    from pipeline.commands.show import show_nothing_to_do, show_run
    from pipeline.execute import execute_plan
    from pipeline.plan import Selection
    from pipeline.ray.session import find_capacity
    from pipeline.report import write_report
    from pipeline.runs import open_record

    if verbose:
        logging.getLogger().setLevel(logging.DEBUG)
    selection = Selection(only=only, first=first, last=last, again=again)
    made = _make_plan(recipe, overrides, store, ray_address, selection, is_local=local)
    was_done = not made.todo
    record = execute_plan(
        made,
        capacity=find_capacity(ray_address, is_local=local),
        ray_address=ray_address,
        is_local=local,
        run_name=name,
    )
    opened = open_record(made.store, record)
    page = made.store.locate(f"runs/{record.name}.html")
    is_finished = made.stages[-1].name in opened.outputs
    if is_finished and not (was_done and made.store.exists(f"runs/{record.name}.html")):
        page = write_report([opened], made.store)
    if was_done:
        _print(show_nothing_to_do(made))
    _print(show_run(opened, made.recipe.stage_list, report=page if is_finished else None))


@app.command()
def sweep(
    recipe: RecipePath,
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="Values of a key, separated by commas: stages.train.loss.beta=0.05,0.1. Each is "
            "YAML; brackets, braces and quotes protect commas: "
            "'stages.train.loss={kind: ipo, beta: 0.1},{kind: hinge}'. One value is common to all "
            "runs. Repeatable: every combination is a run.",
        ),
    ] = None,
    halving: Annotated[
        bool,
        typer.Option(
            "--halving",
            help="Stop the worse half of the runs after 1/4 of their steps, and again after 1/2; "
            "the others end as they would have without it. Worse is a higher held-out loss, or a "
            "lower accuracy if losses or betas differ: their values are on different scales.",
        ),
    ] = False,
    max_concurrent: Annotated[
        int | None,
        typer.Option(
            min=1, help="Trainings at once, at most. Default: as many as the cluster has room for."
        ),
    ] = None,
    store: Store = None,
    ray_address: RayAddress = None,
    local: Annotated[
        bool, typer.Option("--local", help="Run everything in this process, without Ray.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Run every combination of the given values, and rank the runs by held-out accuracy.

    Each combination is an ordinary run of the recipe, so that show, verify, report and prune work
    with it. Stages that runs have in common run once. After Ctrl-C, the same command goes on.

    Example: sweep RECIPE --set stages.train.loss.beta=0.05,0.1,0.3 --set
    stages.train.learning_rate=1e-6,5e-6
    """
    from rich.console import Console

    from pipeline.commands.sweep.plan import plan_sweep, show_sweep_plan
    from pipeline.commands.sweep.ranking import rank_runs, ranking_to_dict, show_ranking
    from pipeline.commands.sweep.run_sweep import Machines, run_sweep
    from pipeline.ray.session import find_capacity

    capacity = find_capacity(ray_address, is_local=local)
    made = plan_sweep(recipe, overrides or (), store=store, has_gpus=capacity.num_gpus > 0)
    for warning in dict.fromkeys(line for trial in made.trials for line in trial.plan.warnings):
        logging.getLogger("pipeline").warning(warning)
    machines = Machines(
        capacity=capacity,
        ray_address=ray_address,
        is_local=local,
        max_concurrent=max_concurrent,
    )
    num_at_once = machines.count_slots(made)
    Console(stderr=True).print(show_sweep_plan(made, num_at_once=num_at_once))
    outcome = run_sweep(made, machines, is_halving=halving)
    ranking = rank_runs(made, outcome)
    _print(ranking_to_dict(ranking) if as_json else show_ranking(ranking))
    if outcome.failures:
        failed = "\n".join(f"  {name}: {why}" for name, why in outcome.failures.items())
        print(f"error: {len(outcome.failures)} runs failed:\n{failed}", file=sys.stderr)
        raise typer.Exit(code=1)


@app.command()
def path(
    recipe: RecipePath,
    stage: Annotated[str, typer.Argument(help="The stage, such as score.")],
    overrides: Overrides = None,
    store: Store = None,
    ray_address: RayAddress = None,
) -> None:
    """Print a stage's directory, for polars: pl.scan_parquet(f"{path}/data/*.parquet")."""
    made = _make_plan(recipe, overrides, store, ray_address)
    _print(made.stage(stage).out.folder.uri)


@app.command()
def show(
    recipe: RecipePath,
    stage: Annotated[str | None, typer.Argument(help="Show this stage in detail.")] = None,
    overrides: Overrides = None,
    store: Store = None,
    ray_address: RayAddress = None,
    as_json: Json = False,
) -> None:
    """Show the state and counts of all stages; of one stage also reasons, quantiles and rows."""
    from pipeline.commands.show import show_stage, show_state, stage_to_dict, state_to_dict

    made = _make_plan(recipe, overrides, store, ray_address)
    if stage is None:
        _print(state_to_dict(made) if as_json else show_state(made))
    else:
        planned = made.stage(stage)
        _print(stage_to_dict(planned) if as_json else show_stage(planned))


@app.command()
def verify(
    recipe: RecipePath,
    overrides: Overrides = None,
    store: Store = None,
    ray_address: RayAddress = None,
    mend: Annotated[
        bool,
        typer.Option("--repair", help="Delete what is damaged; the next run makes it again."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Check every file against its hash and account for every row. Exit code 1 on any fault."""
    from pipeline.commands.verify import find_faults, repair, show_verdict, verdict_to_dict

    made = _make_plan(recipe, overrides, store, ray_address)
    verdict = find_faults(made)
    redone = repair(made, verdict) if mend else None
    if as_json:
        _print(verdict_to_dict(verdict, redone=redone))
    else:
        _print(show_verdict(verdict, redone=redone))
    raise typer.Exit(code=1 if verdict.faults else 0)


@app.command()
def report(
    runs: Annotated[
        list[str], typer.Argument(help="A recipe or names of runs; several runs are compared.")
    ],
    store: Store = None,
    output: Annotated[str | None, typer.Option(help="File to write the page to.")] = None,
    ray_address: RayAddress = None,
) -> None:
    """Write one self-contained HTML page with charts of a run, or of several side by side."""
    from pipeline.execute import default_run_name
    from pipeline.report import write_report
    from pipeline.runs import open_run
    from stages.store.filesystems import Folder

    opened = []
    for name in runs:
        if name.endswith((".yaml", ".yml")):
            made = _make_plan(name, None, store, ray_address)
            store = store or made.recipe.store
            name = default_run_name(made)
        opened.append(open_run(store or "./store", name))
    _print(write_report(opened, Folder(store or "./store"), output=output))


@app.command()
def prune(
    store: Annotated[str, typer.Argument(metavar="STORE", help="Path or URI of the store.")],
    yes: Annotated[bool, typer.Option("--yes", help="Delete what is listed.")] = False,
    drop: Annotated[
        list[str] | None,
        typer.Option(help="Also delete this run: its record, page and own outputs. Repeatable."),
    ] = None,
    keep_scores: Annotated[
        bool, typer.Option("--keep-scores", help="Keep log-probs that later runs could reuse.")
    ] = False,
    min_age_hours: Annotated[
        float, typer.Option(min=0, help="Keep what was written in these last hours.")
    ] = 24.0,
    as_json: Json = False,
) -> None:
    """List what no run in a store needs, and delete it with --yes."""
    from pipeline.commands.prune import (
        delete_leftovers,
        find_leftovers,
        leftovers_to_dict,
        show_leftovers,
    )
    from stages.store.filesystems import Folder

    leftovers = find_leftovers(
        Folder(store), dropped=drop or (), keeps_scores=keep_scores, min_age_hours=min_age_hours
    )
    deleted = delete_leftovers(leftovers) if yes else None
    if as_json:
        _print(leftovers_to_dict(leftovers, deleted=deleted or ()))
    else:
        _print(show_leftovers(leftovers, deleted=deleted))


@app.command()
def export_logps(
    recipe: RecipePath,
    out: Annotated[str, typer.Option(help="Folder to write; must not exist yet.")],
    form: Annotated[
        str, typer.Option("--format", help="datasets (also for TRL), or open-instruct.")
    ] = "datasets",
    overrides: Overrides = None,
    store: Store = None,
    ray_address: RayAddress = None,
    as_json: Json = False,
) -> None:
    """Write the scored pairs, with tokens and reference log-probs, for another trainer."""
    from dataclasses import asdict
    from pathlib import Path

    from pipeline.commands.export import export_logps as export

    made = _make_plan(recipe, overrides, store, ray_address)
    done = export(made, Path(out), form=form)
    left_out = f"; {done.num_left_out:,} left out, see its README" if done.num_left_out else ""
    summary = f"{done.num_train:,} pairs to train on, {done.num_eval:,} held out{left_out}"
    _print(asdict(done) if as_json else f"{done.folder}: {summary}")


@app.command()
def hash_prompts(
    files: Annotated[
        list[str],
        typer.Argument(help="Benchmark files: lines of .txt, rows of .jsonl or .parquet."),
    ],
    out: Annotated[str, typer.Option(help="File to write the list to, NAME.parquet.")],
) -> None:
    """Write hashes of benchmark prompts, without their text, for stages.dedupe.benchmarks."""
    from stages.dedupe.contamination import write_hash_list

    _print(f"{write_hash_list(files, out):,} prompts and answers in {out}")


def _make_plan(
    recipe: str,
    overrides: list[str] | None,
    store: str | None,
    ray_address: str | None,
    selection: "Selection | None" = None,
    *,
    is_local: bool = False,
) -> "Plan":
    from pipeline.plan import make_plan
    from pipeline.ray.session import find_capacity
    from pipeline.recipe import load_recipe

    loaded = load_recipe(recipe, overrides=overrides or (), store=store)
    capacity = find_capacity(ray_address, is_local=is_local)
    made = make_plan(loaded, selection, has_gpus=capacity.num_gpus > 0)
    for warning in made.warnings:
        logging.getLogger("pipeline").warning(warning)
    return made


def _print(result: object) -> None:
    """Print a result on stdout: text, a renderable of rich, or JSON."""
    if isinstance(result, str):
        print(result)
        return
    if isinstance(result, dict | list):
        import json

        import msgspec

        print(json.dumps(msgspec.to_builtins(result), indent=2))  # In ASCII, for any stdout.
        return
    from rich.console import Console

    Console().print(result)


_PLAIN = {"→": "->", "✓": "+", "✗": "x", "…": "...", "–": "-", "·": "-", "×": "x"}  # noqa: RUF001


def _write_plainly(error: UnicodeError) -> tuple[str, int]:
    """Replace characters that a stream's encoding lacks; a handler for codecs.register_error."""
    assert isinstance(error, UnicodeEncodeError)
    found = error.object[error.start : error.end]
    plain = "".join(_PLAIN.get(c, c.encode("ascii", "backslashreplace").decode()) for c in found)
    return plain, error.end


def _accept_any_encoding() -> None:
    """Make stdout and stderr accept characters that their encoding does not have."""
    codecs.register_error("plain", _write_plainly)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="plain")


class Interrupts:
    """Handles Ctrl-C and a scheduler's SIGTERM: the first stops in order, the second at once."""

    def __init__(self) -> None:
        self.received: int | None = None

    def listen(self) -> None:
        signal.signal(signal.SIGINT, self._stop)
        signal.signal(signal.SIGTERM, self._stop)
        sys.unraisablehook = self._send_again

    @property
    def exit_code(self) -> int:
        """Exit code that shells give a process ended by a signal."""
        assert self.received is not None
        return 128 + self.received

    def _stop(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            os._exit(self.exit_code)
        self.received = number
        raise KeyboardInterrupt

    def _send_again(self, ignored: "sys.UnraisableHookArgs") -> None:
        """Send the signal once more if it came inside a finalizer, where Python ignores it."""
        if self.received is None or not isinstance(ignored.exc_value, KeyboardInterrupt):
            sys.__unraisablehook__(ignored)
            return
        number, self.received = self.received, None
        threading.Timer(0.01, os.kill, (os.getpid(), number)).start()


class Ending:
    """Ends the process with its exit code, after Python's own cleanup.

    It skips the destructors of C++ libraries: one that waits for Python's lock in another thread
    aborts the process, with exit code 134 in place of its own.
    """

    def __init__(self) -> None:
        self.exit_code = 1
        """That of an exception that nobody expects."""
        # Registered before any other library's cleanup is, so it comes after all of them.
        atexit.register(self._end)

    def _end(self) -> None:
        logging.shutdown()
        if sys.stdout is not None:  # As it is where the process was started without one.
            with contextlib.suppress(OSError):  # Such as a closed pipe.
                sys.stdout.flush()
        os._exit(self.exit_code)


def main() -> NoReturn:
    """Run the command line; a user's mistake gets one clear message and no traceback."""
    ending = Ending()
    _accept_any_encoding()
    ending.exit_code = _run_app()
    sys.exit(ending.exit_code)


def _run_app() -> int:
    """Run the command line and return the exit code."""
    from schemas.errors import ConfigError, PipelineError

    interrupts = Interrupts()
    interrupts.listen()

    logging.basicConfig(
        stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S"
    )
    # botocore's debug log names the access key, which must not be in any log.
    for noisy in ("botocore", "urllib3", "httpx", "filelock", "ray", "transformers", "matplotlib"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        app()
    except BaseException as error:
        if interrupts.received is not None:  # However libraries have wrapped it.
            print("Interrupted. What is committed stays; run again to go on.", file=sys.stderr)
            return interrupts.exit_code
        if isinstance(error, SystemExit) and isinstance(error.code, int):  # As typer leaves.
            return error.code
        if isinstance(error, PipelineError | OSError):  # Such as a full disk.
            logging.getLogger("pipeline").debug("traceback", exc_info=error)
            print(f"error: {error}", file=sys.stderr)
            return 2 if isinstance(error, ConfigError) else 1
        raise
    raise AssertionError("typer leaves by SystemExit")


if __name__ == "__main__":
    main()
