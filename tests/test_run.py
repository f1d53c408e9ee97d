"""Tests of the command line: output, streams and exit codes."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest

from tests.end_to_end.conftest import recipe_path, run_recipe

__all__ = ["recipe_path"]  # a fixture

ROOT = Path(__file__).parents[1]


def call(
    *arguments: str | Path, encoding: str = "utf-8", **variables: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "run.py", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        encoding=encoding,
        timeout=300,
        env={**os.environ, "COLUMNS": "200", **variables},
    )


def test_help_teaches_and_imports_nothing_heavy() -> None:
    done = call("--help")
    assert done.returncode == 0
    for word in ("plan", "run", "path", "show", "verify", "report", "Exit codes"):
        assert word in done.stdout
    code = (
        "import sys, run; "
        "print([m for m in ('torch', 'ray', 'vllm', 'polars', 'transformers') if m in sys.modules])"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "command", ["plan", "run", "path", "show", "verify", "report", "sweep", "export-logps"]
)
def test_every_command_explains_itself(command: str) -> None:
    done = call(command, "--help")
    assert done.returncode == 0
    assert "RECIPE" in done.stdout or "recipe" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plan", "absent.yaml"], "absent.yaml cannot be read"),
        (["plan", "RECIPE", "--set", "stages.train.loss.betta=1"], "Did you mean 'beta'?"),
        (["plan", "RECIPE", "--set", "stages.tain.seed=1"], "stages.tain: no such stage"),
        (["plan", "RECIPE", "--set", "nonsense"], "write it as --set stages.train.loss.beta=0.2"),
        (["plan", "RECIPE", "--set", "stages.score.model=./absent"], "absent is not a folder"),
        (["plan", "RECIPE", "--set", "stages.validate.inputs=[none.jsonl]"], "none.jsonl"),
        (["run", "RECIPE", "--only", "score"], "score needs encode"),
        (["run", "RECIPE", "--from", "train", "--until", "encode"], "comes after"),
        (["path", "RECIPE", "scor"], "no such stage"),
        (["export-logps", "RECIPE", "--out", "OUT"], "dedupe is not complete (not run yet)"),
        (["report", "no-such-run", "--store", "STORE"], "no run has this name"),
        (
            ["plan", "RECIPE", "--set", "stages.dedupe.benchmarks=[none.txt]"],
            "none.txt is not a file",
        ),
        (["hash-prompts", "none.txt", "--out", "list.parquet"], "none.txt is not a file"),
        (["hash-prompts", "run.py", "--out", "list.txt"], "must end in .parquet"),
    ],
)
def test_a_mistake_gets_one_clear_message_and_exit_code_2(
    recipe_path: Path, arguments: list[str], message: str
) -> None:
    places = {"RECIPE": str(recipe_path), "STORE": str(recipe_path.parent / "store")}
    done = call(*(places.get(argument, argument) for argument in arguments))
    assert done.returncode == 2
    assert done.stdout == ""
    assert message in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "exit_code"), [(["--help"], 0), (["plan", "absent.yaml"], 2), (["plan", "."], 2)]
)
def test_no_destructor_changes_the_exit_code(arguments: list[str], exit_code: int) -> None:
    """One of C++'s destructors aborts the process, after Python's own cleanup."""
    code = (
        "import ctypes, sys; libc = ctypes.CDLL(None); "
        "libc.__cxa_atexit(libc.abort, None, None); import run; "
        f"sys.argv[1:] = {arguments}; run.main()"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == exit_code
    assert done.stdout if exit_code == 0 else "cannot be read" in done.stderr


def test_a_process_without_stdout_ends_in_order(recipe_path: Path) -> None:
    command = f"exec {sys.executable} run.py plan {recipe_path} >&-"
    done = subprocess.run(["sh", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("encoding", ["latin-1", "ascii"])
def test_output_is_plain_where_stdout_lacks_the_characters(
    recipe_path: Path, encoding: str
) -> None:
    """A path of the user's own is written with escapes; the plan's arrow as two characters."""
    store = recipe_path.parent / "store-é-選好"
    options = ("--store", store)
    done = call("plan", recipe_path, *options, encoding=encoding, PYTHONIOENCODING=encoding)
    assert done.returncode == 0, done.stderr
    assert "-> run" in done.stdout
    assert r"-\u9078\u597d" in done.stdout
    as_json = call(
        "plan", recipe_path, "--json", *options, encoding=encoding, PYTHONIOENCODING=encoding
    )
    assert json.loads(as_json.stdout)[0]["directory"].startswith(str(store))


def test_hashed_prompts_are_a_list_that_dedupe_takes(recipe_path: Path) -> None:
    """The plan notices every change of the list's content."""
    text, out = recipe_path.parent / "quiz.txt", recipe_path.parent / "list.parquet"
    fingerprints = set()
    for content in ("What is 1 plus 1?\n", "What is 1 plus 1?\nWhat is 2 plus 2?\n"):
        text.write_text(content)
        done = call("hash-prompts", text, "--out", out)
        assert done.returncode == 0, done.stderr
        assert str(out) in done.stdout
        setting = f"stages.dedupe.benchmarks=[{out}]"
        fingerprints.add(call("path", recipe_path, "dedupe", "--set", setting).stdout)
    assert len(fingerprints) == 2


def test_a_failed_run_has_exit_code_1_and_names_the_reasons(recipe_path: Path) -> None:
    done = call("run", recipe_path, "--local", "--set", "stages.validate.max_reject_fraction=0.01")
    assert done.returncode == 1
    assert "JSON_INVALID" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_commands_over_a_run(recipe_path: Path) -> None:
    """run, run again, plan, path, show, verify and report, as a user would type them."""
    done = call("run", recipe_path, "--local")
    assert done.returncode == 0, done.stderr
    for words in ("rows in", "DUP_EXACT 1", "pairs/s", "held-out preference accuracy", "report"):
        assert words in done.stdout
    store = recipe_path.parent / "store"
    [page] = (store / "runs").glob("*.html")
    assert str(page) in done.stdout

    again = call("run", recipe_path, "--local")
    assert again.returncode == 0
    assert "Nothing to do" in again.stdout

    planned = json.loads(call("plan", recipe_path, "--json", "--set", "stages.train.seed=5").stdout)
    assert [stage["state"] for stage in planned] == ["done"] * 4 + ["run"] * 2
    assert "seed: 0 -> 5" in call("plan", recipe_path, "--set", "stages.train.seed=5").stdout

    path = call("path", recipe_path, "score").stdout.strip()
    assert pl.read_parquet(f"{path}/data/*.parquet").height == 20

    shown = call("show", recipe_path, "validate")
    assert "JSON_INVALID" in shown.stdout
    assert "What is 0 plus" in shown.stdout
    shown = call("show", recipe_path, "dedupe")
    assert "Prompt and answers are the same as another pair's." in shown.stdout
    manifest = json.loads(call("show", recipe_path, "score", "--json").stdout)
    assert manifest["counts"]["num_out"] == 20
    for stage, heading in (("score", "reference log-prob"), ("evaluate", "policy log-prob")):
        shown = call("show", recipe_path, stage)
        assert "Who cares about" in shown.stdout
        assert heading in shown.stdout

    verified = call("verify", recipe_path)
    assert verified.returncode == 0
    assert "every row is accounted for" in verified.stdout

    written = call("report", page.stem, "--store", store, "--output", recipe_path.parent / "p.html")
    assert written.returncode == 0
    assert (recipe_path.parent / "p.html").read_text().startswith("<!")


def test_verify_finds_a_flipped_bit_and_names_the_file(recipe_path: Path) -> None:
    run = run_recipe(recipe_path, last="encode")
    output = run.outputs["encode"]
    victim = Path(output.paths()[1])
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    done = call("verify", recipe_path)
    assert done.returncode == 1
    assert victim.name in done.stdout.replace("\n", "")


def test_a_signal_inside_a_finalizer_still_stops_the_run() -> None:
    """Python ignores what a finalizer raises, so the first KeyboardInterrupt is lost there."""
    code = (
        "import os, signal, time\n"
        "from run import Interrupts\n"
        "class Closes:\n"
        "    def __del__(self):\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "        time.sleep(0.01)\n"
        "interrupts = Interrupts()\n"
        "interrupts.listen()\n"
        "closes = Closes()\n"
        "try:\n"
        "    del closes\n"
        "    time.sleep(60)\n"
        "except KeyboardInterrupt:\n"
        "    raise SystemExit(interrupts.exit_code)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 128 + signal.SIGTERM
    assert done.stderr == ""
