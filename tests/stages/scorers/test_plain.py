"""Plain transformers gives each sequence the values that it has alone."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from stages.policy.groups import Group
from stages.scorers import plain
from stages.scorers.opening import open_plain
from stages.scorers.plain import PlainModel, PlainSequence
from tests.stages.scorers.oracle import group_of, largest_difference, plain_logps, random_ids
from tests.tiny_architectures import make_tiny_architecture


def make_groups() -> list[Group]:
    """Long before short: a rope that keeps the longest length would give the rest away."""
    rng = np.random.default_rng(0)
    return [
        group_of(random_ids(rng, prompt), random_ids(rng, completion))
        for prompt, completion in ((90, 38), (1, 1), (80, 30), (40, 30))
    ]


def compute(model: PlainModel, groups: Sequence[Group]) -> list[list[np.ndarray]]:
    sequences = {
        str(number): PlainSequence(prompt_ids=group.prompt_ids, completion_ids=group.completions[0])
        for number, group in enumerate(groups)
    }
    return [[values] for values in model.compute(sequences).values()]


@pytest.mark.parametrize(
    "architecture", ["llama", "gemma2", "phimoe", "llama-dynamic", "phi3-longrope", "falcon-alibi"]
)
def test_values_are_those_of_a_fresh_model(architecture: str, tmp_path: Path) -> None:
    """gemma2 has soft caps, which the default attention would leave out."""
    folder = make_tiny_architecture(tmp_path, architecture)
    groups = make_groups()
    model = open_plain(str(folder), num_threads=1)
    wanted = plain_logps(folder, groups)
    assert largest_difference(compute(model, groups), wanted) < 1e-5
    assert largest_difference(compute(model, groups[2:]), wanted[2:]) < 1e-5
    model.close()


def test_a_minute_affords_fewer_tokens_of_a_larger_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two operations a weight and token: 1e13 of them are 5,000 tokens of 1e9 weights."""
    model = open_plain(str(tmp_path), num_threads=1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(plain, "count_weights", lambda path: 10**9)
    monkeypatch.setattr(plain, "count_free_bytes", lambda: 4 * 10**9)
    assert model.count_affordable_tokens() == 5000
    monkeypatch.setattr(plain, "count_free_bytes", lambda: None)
    assert model.count_affordable_tokens() == 5000


def test_a_model_without_room_in_memory_is_not_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = open_plain(str(tmp_path), num_threads=1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(plain, "count_weights", lambda path: 10**9)
    monkeypatch.setattr(plain, "count_free_bytes", lambda: 4 * 10**9 - 1)
    assert model.count_affordable_tokens() == 0
    assert "scores are not compared with plain transformers" in caplog.text
