"""The transformers scorer returns values of a plain forward pass, in the order of its input."""

from pathlib import Path

import numpy as np
import pytest

from stages.policy.groups import Group
from stages.scorers.opening import open_scorer
from stages.scorers.protocol import Scorer, ScorerSettings, ScoringExecution
from tests.stages.scorers.oracle import (
    group_of,
    largest_difference,
    plain_greedy,
    plain_logps,
    random_ids,
)
from tests.tiny_models import TOKEN_IDS, make_tiny_model

MAX_LENGTH = 128


def open_plain(folder: Path) -> Scorer:
    return open_scorer(
        str(folder),
        ScorerSettings(
            backend="transformers",
            dtype="float32",
            max_length=MAX_LENGTH,
            num_threads=2,
            execution=ScoringExecution(max_tokens_per_batch=256),
        ),
    )


def make_groups() -> list[Group]:
    """Unsorted lengths, one to five completions, and completions of one token."""
    rng = np.random.default_rng(0)
    shapes = [(40, (30, 2)), (1, (1,)), (90, (38, 5, 1)), (12, (60, 60, 60, 60, 7)), (3, (100,))]
    return [
        group_of(random_ids(rng, prompt), *(random_ids(rng, length) for length in lengths))
        for prompt, lengths in shapes
    ]


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2", "mamba"])
def test_values_are_those_of_a_plain_forward(architecture: str, tmp_path: Path) -> None:
    """llama and gpt2 share prompts; the window of gemma2 and the state of mamba rule that out."""
    folder = make_tiny_model(tmp_path, architecture)
    groups = make_groups()
    scorer = open_plain(folder)
    assert largest_difference(scorer.score(groups), plain_logps(folder, groups)) < 1e-4


def test_a_prompt_with_many_completions_is_cut_to_the_budget(tmp_path: Path) -> None:
    """12 + 109 + 109 + 109 + 109 + 6 tokens are read: rows of at most 256 hold 230 and 236."""
    folder = make_tiny_model(tmp_path)
    rng = np.random.default_rng(0)
    lengths = (110, 110, 110, 110, 7)
    group = group_of(random_ids(rng, 12), *(random_ids(rng, length) for length in lengths))
    scorer = open_plain(folder)
    found = scorer.score([group])
    assert largest_difference(found, plain_logps(folder, [group])) < 1e-4
    assert scorer.statistics.num_tokens_submitted == 5 * 12 + 4 * 110 + 7
    assert scorer.statistics.num_tokens_computed == 230 + 236


def test_values_do_not_depend_on_earlier_calls(tmp_path: Path) -> None:
    scorer = open_plain(make_tiny_model(tmp_path))
    groups = make_groups()
    first = scorer.score(groups)
    scorer.score(groups[:2])
    again = scorer.score(groups)
    for arrays, repeated in zip(first, again, strict=True):
        assert all(map(np.array_equal, arrays, repeated))


def test_greedy_answers_end_at_the_end_token_or_the_limit(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path)
    rng = np.random.default_rng(1)
    prompts = [random_ids(rng, length) for length in (5, 17, 40, MAX_LENGTH - 2)]
    wanted = [
        plain_greedy(folder, prompt, num_new=limit, stop=TOKEN_IDS["eos_token_id"])
        for prompt, limit in zip(prompts, (12, 12, 12, 3), strict=True)
    ]
    answers = open_plain(folder).generate(prompts, max_new_tokens=12)
    assert [answer.tolist() for answer in answers] == wanted
