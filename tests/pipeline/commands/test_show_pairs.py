"""Tests of pairs printed on a terminal: text beside numbers, escaped."""

from pathlib import Path

import msgspec
import polars as pl
import pytest
from rich.console import Console, Group

from pipeline.commands.show_pairs import show_pairs
from pipeline.runs import Run
from stages.store.filesystems import Folder
from tests.pipeline.report.made_store import MadeRun


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return MadeRun(store=Folder(str(tmp_path_factory.mktemp("store"))), name="made").write()


def show(run: Run, stage: str, num_pairs: int = 2) -> str:
    output = run.outputs[stage]
    console = Console(width=200)
    with console.capture() as capture:
        console.print(Group(*show_pairs(output.folder, output.manifest, num_pairs=num_pairs)))
    return capture.get()


def test_scores_stand_beside_the_text_of_their_pair(run: Run) -> None:
    shown = " ".join(show(run, "score").split())
    second = run.pairs().head(2).collect().row(1, named=True)
    assert f"pair 2 pair_id {second['pair_id']} source facts split train" in shown
    question = second["prompt"][0]["content"].strip()
    assert f"prompt {question} ({second['num_prompt_tokens']} tokens)" in shown
    assert "chosen Because of 1. rejected Who cares about 1? tokens reference log-prob" in shown
    for side in ("chosen", "rejected"):
        tokens, logp = second[f"num_{side}_tokens"], second[f"ref_{side}_logp"]
        assert f"{side} {tokens} {logp:.3f}" in shown
    assert f"difference {second['ref_margin']:.3f}" in shown
    assert "pair 3" not in shown


def test_evaluated_pairs_are_held_out_and_have_policy_values(run: Run) -> None:
    shown = " ".join(show(run, "evaluate").split())
    first = run.pairs().filter(pl.col("split") == "eval").head(1).collect().row(0, named=True)
    assert shown.startswith(f"pair 1 pair_id {first['pair_id']}")
    assert shown.count("split eval") == 2
    assert f"correct {'yes' if first['correct'] else 'no'} displaced" in shown
    assert (
        f"rejected {first['num_rejected_tokens']} {first['ref_rejected_logp']:.3f} "
        f"{first['policy_rejected_logp']:.3f} {first['reward_rejected']:.3f}" in shown
    )
    assert f"{first['policy_margin']:.3f} {first['reward_margin']:.3f}" in shown


def test_hostile_text_is_shortened_and_safe_to_print(run: Run) -> None:
    """Escape codes and direction overrides are shown as symbols."""
    shown = show(run, "score", num_pairs=1)
    assert not set("\x00\x07\x1b\u202e\r") & set(shown)
    assert "␛[31mred␛[0m␀␇⟨U+202E⟩gnitirw" in shown
    assert "(2 messages, " in shown
    assert "averylongword" not in shown


def test_the_last_message_of_the_user_is_shown(run: Run) -> None:
    """Even if a tool's answer follows it."""
    shown = show(run, "evaluate")
    assert "Look it up. (3 messages, " in shown
    assert "Nothing found." not in shown


def test_a_reference_free_evaluation_has_no_reference_column(run: Run) -> None:
    output = run.outputs["evaluate"]
    inputs = {name: ref for name, ref in output.manifest.inputs.items() if name == "encode"}
    manifest = msgspec.structs.replace(output.manifest, inputs=inputs)
    shown = Group(*show_pairs(output.folder, manifest, num_pairs=1))
    console = Console(width=200)
    with console.capture() as capture:
        console.print(shown)
    assert "policy log-prob" in capture.get()
    assert "reference log-prob" not in capture.get()


def test_nothing_is_shown_without_the_text(tmp_path: Path) -> None:
    """For stages without pairs, or if dedupe's output was deleted, `show` prints plain rows."""
    run = MadeRun(store=Folder(str(tmp_path)), name="made", num_pairs=10).write()
    train = run.outputs["train"]
    assert show_pairs(train.folder, train.manifest, num_pairs=1) == []
    (Path(run.outputs["dedupe"].folder.path) / "manifest.json").unlink()
    score = run.outputs["score"]
    assert show_pairs(score.folder, score.manifest, num_pairs=1) == []
