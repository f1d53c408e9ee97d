"""Are vLLM's values those of a plain forward pass, whatever stands in its prefix cache?"""

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from schemas.errors import DataError
from stages.policy.groups import Group
from stages.scoring.protocol import Scorer, ScorerSettings, ScoringExecution, open_scorer
from stages.scoring.vllm_scorer import (
    Request,
    ask_for_completion,
    check_cached_tokens,
    find_cache_traps,
    rows_of_completion,
)
from tests.stages.scoring.oracle import (
    group_of,
    largest_difference,
    plain_greedy,
    plain_logps,
    random_ids,
)
from tests.tiny_models import MAX_POSITIONS, TOKEN_IDS, make_tiny_model, shard_weights

BLOCK = 32
"""Tokens in a block of the cache, on a CPU."""


def ids(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def find_traps(*sequences: tuple[list[int], list[int]], block_size: int = 2) -> list[bool]:
    requests = [Request(prompt_ids=ids(*p), completion_ids=ids(*c)) for p, c in sequences]
    return find_cache_traps(requests, block_size=block_size)


def test_siblings_share_a_prompt_that_ends_inside_a_block() -> None:
    """Blocks of 2: the prompt's first two tokens can come from the cache, its third is computed."""
    assert find_traps(([1, 2, 3], [4, 5]), ([1, 2, 3], [6, 7])) == [False, False]


def test_a_prompt_of_whole_blocks_is_a_trap_for_all_but_the_first() -> None:
    """Its last token predicts the first completion token and would come from the cache."""
    sequences = [([1, 2], [3, 4]), ([1, 2], [5]), ([1, 2], [6])]
    assert find_traps(*sequences) == [False, True, True]


def test_equal_leading_completion_tokens_that_fill_a_block_are_a_trap() -> None:
    """1 2 | 3 4 is in the cache when the second sibling comes, and 4 is one of its completion."""
    assert find_traps(([1, 2, 3], [4, 5]), ([1, 2, 3], [4, 6])) == [False, True]


def test_any_earlier_sibling_can_have_filled_the_cache() -> None:
    sequences = [([1, 2, 3], [4, 5]), ([1, 2, 3], [6, 7]), ([1, 2, 3], [6, 8])]
    assert find_traps(*sequences) == [False, False, True]


def test_a_conversation_that_went_on_is_a_trap_for_its_beginning() -> None:
    """The first pair's prompt holds the second pair's prompt and its answer."""
    assert find_traps(([1, 2, 3, 4, 5], [6]), ([1, 2, 3], [4])) == [False, True]
    assert find_traps(([1, 2, 3], [4]), ([1, 2, 3, 4, 5], [6])) == [False, False]


def test_cached_completion_tokens_are_refused() -> None:
    request = Request(prompt_ids=ids(1, 2, 3), completion_ids=ids(4))
    check_cached_tokens(request, 2)
    for num_cached_tokens in (3, 4, None):
        with pytest.raises(DataError, match="would not have been"):
            check_cached_tokens(request, num_cached_tokens)


@pytest.mark.vllm
def test_model_runner_v2_is_asked_for_completion_tokens_only() -> None:
    """No GPU is at hand here, but vLLM's own checks of its parameters are.

    Row i belongs to token prompt_logprob_start + i + 1; with start 2, row 0 to token 3, the first
    of the completion; there must be 5 - 1 - 2 rows. -inf in the answer would mark padding.
    """
    request = Request(prompt_ids=ids(1, 2, 3), completion_ids=ids(4, 5))
    asked = ask_for_completion(request, skips_cache=False, gives_token_logprobs=True)
    assert asked.prompt_logprob_token_ids.tolist() == [[4], [5]]
    assert asked.prompt_logprob_start == 2
    assert asked.prompt_logprobs is None
    assert asked.skip_reading_prefix_cache is False
    answer = np.array([[-0.5], [-1.5]], np.float32)
    assert rows_of_completion(answer).tolist() == [-0.5, -1.5]
    assert len(rows_of_completion(None)) == 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Beside its files lie another model's in Mistral's layout, which vLLM prefers if it may."""
    folder = shard_weights(make_tiny_model(tmp_path_factory.mktemp("llama")))
    other = make_tiny_model(tmp_path_factory.mktemp("other"), seed=1)
    shutil.copy(other / "model.safetensors", folder / "consolidated.safetensors")
    (folder / "params.json").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def scorer(folder: Path) -> Iterator[Scorer]:
    """The one engine of all tests here; max_length is all that the model has positions for."""
    opened = open_scorer(
        str(folder),
        ScorerSettings(
            backend="vllm",
            dtype="float32",
            max_length=MAX_POSITIONS,
            num_threads=2,
            execution=ScoringExecution(max_tokens_per_batch=512, kv_cache_gib=0.125),
        ),
    )
    yield opened
    opened.close()


def trapped_groups() -> list[Group]:
    """A prompt of whole blocks, equal beginnings of answers, a conversation that goes on."""
    rng = np.random.default_rng(0)
    whole, inside = random_ids(rng, 2 * BLOCK), random_ids(rng, BLOCK + 20)
    opening = random_ids(rng, 50)
    answers = [np.concatenate([opening, random_ids(rng, length)]) for length in (30, 1, 70)]
    longer = np.concatenate([inside, answers[0], random_ids(rng, 9)])
    return [
        group_of(longer, random_ids(rng, 3), random_ids(rng, 40)),
        group_of(inside, *answers),
        group_of(whole, random_ids(rng, 1), random_ids(rng, 33), random_ids(rng, 64)),
    ]


@pytest.mark.vllm
def test_values_are_those_of_a_plain_forward(scorer: Scorer, folder: Path) -> None:
    """Single tokens on both sides, a sequence longer than a batch, and one of max_length tokens."""
    rng = np.random.default_rng(1)
    shapes = [(40, (30, 2)), (1, (1,)), (90, (38, 5, 1)), (700, (300, 12)), (2000, (48, 1))]
    groups = [
        group_of(random_ids(rng, prompt), *(random_ids(rng, length) for length in lengths))
        for prompt, lengths in shapes
    ]
    assert largest_difference(scorer.score(groups), plain_logps(folder, groups)) < 1e-4


@pytest.mark.vllm
def test_values_are_right_where_the_cache_holds_completion_tokens(
    scorer: Scorer, folder: Path
) -> None:
    groups = trapped_groups()
    wanted = plain_logps(folder, groups)
    for _ in range(2):
        assert largest_difference(scorer.score(groups), wanted) < 1e-4


@pytest.mark.vllm
def test_only_trapped_requests_compute_their_prompt_again(scorer: Scorer) -> None:
    """Worked out by hand, in blocks of 32 tokens.

    longer (52 + 80 + 9 = 141 prompt tokens): the second sibling takes 4 blocks from the cache.
    inside (52): the first answer lies in the first group's prompt, the others begin like it, so
    all three are trapped. whole (64 = 2 blocks): the second and third sibling are trapped.
    """
    before = scorer.statistics
    groups = trapped_groups()
    scorer.score(groups)
    done = scorer.statistics.since(before)
    num_submitted = sum(single.num_tokens for group in groups for single in group.split())
    assert done.num_tokens_submitted == num_submitted
    assert done.num_tokens_computed == num_submitted - 4 * BLOCK


@pytest.mark.vllm
def test_values_do_not_depend_on_earlier_calls(scorer: Scorer) -> None:
    groups = trapped_groups()
    first = scorer.score(groups)
    scorer.score(groups[1:])
    again = scorer.score(groups)
    for arrays, repeated in zip(first, again, strict=True):
        assert all(map(np.array_equal, arrays, repeated))


@pytest.mark.vllm
def test_greedy_answers_end_at_the_end_token_or_the_limit(scorer: Scorer, folder: Path) -> None:
    rng = np.random.default_rng(1)
    prompts = [random_ids(rng, length) for length in (5, 17, 40, MAX_POSITIONS - 2)]
    wanted = [
        plain_greedy(folder, prompt, num_new=limit, stop=TOKEN_IDS["eos_token_id"])
        for prompt, limit in zip(prompts, (12, 12, 12, 3), strict=True)
    ]
    answers = scorer.generate(prompts, max_new_tokens=12)
    assert [answer.tolist() for answer in answers] == wanted
