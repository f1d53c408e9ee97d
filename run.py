"""The command line: run a preference-tuning recipe, or look into what it made."""

import logging
import os
import signal
import sys
from types import FrameType
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

if TYPE_CHECKING:
    from pipeline.plan import Plan

# Imports of the pipeline stand inside the commands, so that --help answers at once.

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="""Offline DPO: reference log-probs once, into Parquet; then train from the file.

    A recipe is a YAML file; pipeline/recipes/ has examples. Its stages are
    validate → dedupe → encode → score → train → evaluate. What is complete is never done again:
    change a key, and only the stages that depend on it run.

    Exit codes: 0 done, 1 the run failed, 2 a mistake in what was given, 130 interrupted, 143
    terminated.""",
)

RecipePath = Annotated[str, typer.Argument(metavar="RECIPE", help="The recipe, a YAML file.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", help="Change a key: stages.train.loss.beta=0.2. Repeatable."),
]
Store = Annotated[
    str | None, typer.Option(help="Path or URI of the store, in place of the recipe's.")
]
RayAddress = Annotated[
    str | None,
    typer.Option(
        envvar="RAY_ADDRESS",
        help="Ray cluster to use, such as auto or ray://host:10001; else one is started here.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]


@app.command()
def plan(
    recipe: RecipePath,
    overrides: Overrides = None,
    again: Annotated[str | None, typer.Option(help="As if this stage were run again.")] = None,
    estimate: Annotated[
        bool, typer.Option("--estimate", help="Estimate hours, GPU-hours and bytes instead.")
    ] = False,
    assume: Annotated[
        list[str] | None,
        typer.Option(help="For the estimate: num_pairs=1e8, num_gpus=64, gpu=h100, …. Repeatable."),
    ] = None,
    store: Store = None,
    ray_address: RayAddress = None,
    as_json: Json = False,
) -> None:
    """Say what is done, what would run, and why; or what that takes. Writes nothing."""
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
    only: Annotated[str | None, typer.Option(help="Run this stage alone.")] = None,
    first: Annotated[str | None, typer.Option("--from", help="Run from this stage on.")] = None,
    last: Annotated[str | None, typer.Option("--until", help="Run up to this stage.")] = None,
    again: Annotated[
        str | None,
        typer.Option(help="Run this stage and what follows once more, beside the old output."),
    ] = None,
    overrides: Overrides = None,
    name: Annotated[str | None, typer.Option(help="Name of the run; else made from it.")] = None,
    store: Store = None,
    ray_address: RayAddress = None,
    local: Annotated[
        bool, typer.Option("--local", help="Everything in this process, without Ray.")
    ] = False,
    verbose: Annotated[bool, typer.Option(help="Log tracebacks and details.")] = False,
) -> None:
    """Run what is not complete yet, stage by stage, and end with a summary and a report."""
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
def path(
    recipe: RecipePath,
    stage: Annotated[str, typer.Argument(help="Such as score.")],
    overrides: Overrides = None,
    store: Store = None,
    ray_address: RayAddress = None,
) -> None:
    """Print the directory of a stage, for polars: pl.scan_parquet(f"{path}/data/*.parquet")."""
    made = _make_plan(recipe, overrides, store, ray_address)
    _print(made.stage(stage).out.folder.uri)


@app.command()
def show(
    recipe: RecipePath,
    stage: Annotated[str | None, typer.Argument(help="One stage in detail.")] = None,
    overrides: Overrides = None,
    store: Store = None,
    ray_address: RayAddress = None,
    as_json: Json = False,
) -> None:
    """Show state, counts, reasons, quantiles and a few rows."""
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
        typer.Option("--repair", help="Take away what is damaged: the next run does it again."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Check every file against its hash, and account for every row. Exit code 1 if any fails."""
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
        list[str], typer.Argument(help="A recipe, or names of runs; several are compared.")
    ],
    store: Store = None,
    output: Annotated[str | None, typer.Option(help="Where to write the page.")] = None,
    ray_address: RayAddress = None,
) -> None:
    """Write one self-contained HTML page with pictures about a run, or comparing several."""
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
        typer.Option(help="Also this run: its record, its page, what only it needs. Repeatable."),
    ] = None,
    keep_scores: Annotated[
        bool, typer.Option("--keep-scores", help="Keep log-probs that later runs could reuse.")
    ] = False,
    min_age_hours: Annotated[
        float, typer.Option(min=0, help="Keep what was written to since then.")
    ] = 24.0,
    as_json: Json = False,
) -> None:
    """List what no run in a store needs; delete it with --yes."""
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
    out: Annotated[str, typer.Option(help="A folder that does not exist yet.")],
    form: Annotated[
        str, typer.Option("--format", help="datasets (and so TRL), or open-instruct.")
    ] = "datasets",
    overrides: Overrides = None,
    store: Store = None,
    ray_address: RayAddress = None,
    as_json: Json = False,
) -> None:
    """Write the scored pairs with tokens and reference log-probs, for another trainer."""
    from dataclasses import asdict
    from pathlib import Path

    from pipeline.commands.export import export_logps as export

    made = _make_plan(recipe, overrides, store, ray_address)
    done = export(made, Path(out), form=form)
    left_out = f"; {done.num_left_out:,} left out, see its README" if done.num_left_out else ""
    said = f"{done.folder}: {done.num_train:,} pairs to train, {done.num_eval:,} held out{left_out}"
    _print(asdict(done) if as_json else said)


@app.command()
def hash_prompts(
    files: Annotated[
        list[str], typer.Argument(help="Benchmarks: .txt lines, or .jsonl or .parquet rows.")
    ],
    out: Annotated[str, typer.Option(help="Where to write the list, NAME.parquet.")],
) -> None:
    """Make a list of hashes of benchmark prompts, without their text, for dedupe.benchmarks."""
    from stages.dedupe.contamination import write_hash_list

    _print(f"{write_hash_list(files, out):,} prompts and answers in {out}")


def _make_plan(
    recipe: str,
    overrides: list[str] | None,
    store: str | None,
    ray_address: str | None,
    selection: object = None,
    *,
    is_local: bool = False,
) -> "Plan":
    from pipeline.plan import Selection, make_plan
    from pipeline.ray.session import find_capacity
    from pipeline.recipe import load_recipe

    loaded = load_recipe(recipe, overrides=overrides or (), store=store)
    capacity = find_capacity(ray_address, is_local=is_local)
    assert selection is None or isinstance(selection, Selection)
    made = make_plan(loaded, selection, has_gpus=capacity.num_gpus > 0)
    for warning in made.warnings:
        logging.getLogger("pipeline").warning(warning)
    return made


def _print(result: object) -> None:
    """Print a result on stdout: text, something that rich renders, or JSON."""
    if isinstance(result, str):
        print(result)
        return
    if isinstance(result, dict | list):
        import msgspec

        print(msgspec.json.format(msgspec.json.encode(result)).decode())
        return
    from rich.console import Console

    Console().print(result)


class Interrupts:
    """Ctrl-C, or the SIGTERM of a scheduler: the first stops in good order, the second at once."""

    def __init__(self) -> None:
        self.received: int | None = None

    def listen(self) -> None:
        signal.signal(signal.SIGINT, self._stop)
        signal.signal(signal.SIGTERM, self._stop)

    @property
    def exit_code(self) -> int:
        """What shells make of a process that a signal ended."""
        assert self.received is not None
        return 128 + self.received

    def _stop(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            os._exit(self.exit_code)
        self.received = number
        raise KeyboardInterrupt


def main() -> NoReturn:
    """Run the command line; a mistake gets one clear message, and no traceback."""
    from schemas.errors import ConfigError, PipelineError

    interrupts = Interrupts()
    interrupts.listen()

    logging.basicConfig(
        stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S"
    )
    # botocore's details name the access key, which belongs into no log.
    for noisy in ("botocore", "urllib3", "httpx", "filelock", "ray", "transformers", "matplotlib"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        app()
    except BaseException as error:
        if interrupts.received is not None:  # Whatever became of it on its way through libraries.
            print("Interrupted. What is committed stays; run again to go on.", file=sys.stderr)
            sys.exit(interrupts.exit_code)
        if isinstance(error, ConfigError):
            _complain(error, code=2)
        if isinstance(error, PipelineError | OSError):  # A full disk, a store that does not answer.
            _complain(error, code=1)
        raise
    raise AssertionError("typer leaves by SystemExit")


def _complain(error: Exception, *, code: int) -> NoReturn:
    logging.getLogger("pipeline").debug("traceback", exc_info=error)
    print(f"error: {error}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
