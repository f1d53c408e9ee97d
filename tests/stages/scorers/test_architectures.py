"""Both engines compute every architecture as a plain float32 forward pass does.

docs/explanation/scoring.md has the table.
"""

import json
from pathlib import Path

import numpy as np
import pytest

from schemas.errors import ConfigError
from stages.policy.groups import Group
from stages.scorers.opening import open_scorer
from stages.scorers.protocol import Backend, ScorerSettings, ScoringExecution
from tests.stages.scorers.oracle import group_of, largest_difference, plain_logps, random_ids
from tests.tiny_architectures import REFUSED, few_fast_ones, make_tiny_architecture
from tests.tiny_models import make_tiny_model

MAX_LENGTH = 128

QUICK = (
    *("llama", "gpt2", "gemma2", "gemma4", "mamba", "mistral", "phimoe", "diffllama"),
    *("llama-dynamic", "phi3-longrope"),
)
"""One architecture of each row layout, and those that were once computed differently."""

SERVED = (
    *("llama-untied", "qwen2", "qwen3", "mistral", "gemma2", "phi", "gpt2", "gpt-neox"),
    *("mixtral", "granite"),
)
"""One architecture of each kind, four seconds each; llama is in test_vllm_scorer.py."""


def make_groups() -> list[Group]:
    """Prompts longer than a block of 32 tokens, one of whole blocks, and single tokens."""
    rng = np.random.default_rng(0)
    shapes = [(40, (30, 2)), (1, (1,)), (90, (38, 5, 1)), (64, (20, 33))]
    return [
        group_of(random_ids(rng, prompt), *(random_ids(rng, length) for length in lengths))
        for prompt, lengths in shapes
    ]


def let_vllm_inspect_the_model_here(folder: Path) -> None:
    """Make vLLM inspect the model class in this process.

    By default it starts a process for each new class, which takes ten seconds, and remembers the
    result in the user's cache.
    """
    from vllm import ModelRegistry

    for name in json.loads((folder / "config.json").read_bytes())["architectures"]:
        ModelRegistry.register_model(name, ModelRegistry.models[name].load_model_cls())


def largest_error(backend: Backend, folder: Path) -> float:
    """Largest error of a token, in nats.

    The oracle runs last: vLLM changes transformers' classes of models that it lacks, and closing
    the scorer must undo that.
    """
    groups = make_groups()
    scorer = open_scorer(
        str(folder),
        ScorerSettings(
            backend=backend,
            dtype="float32",
            max_length=MAX_LENGTH,
            num_threads=2,
            execution=ScoringExecution(max_tokens_per_batch=512, kv_cache_gib=0.0625),
        ),
    )
    found = scorer.score(groups)
    scorer.close()
    return largest_difference(found, plain_logps(folder, groups))


@pytest.mark.parametrize("architecture", few_fast_ones(QUICK))
def test_transformers_computes_every_architecture(architecture: str, tmp_path: Path) -> None:
    folder = make_tiny_architecture(tmp_path, architecture)
    assert largest_error("transformers", folder) < 1e-4


@pytest.mark.parametrize("architecture", REFUSED)
def test_an_architecture_that_is_not_computed_is_refused_by_name(
    architecture: str, tmp_path: Path
) -> None:
    """Their output layer is not the last thing that they compute, or not apart from the rest."""
    folder = make_tiny_architecture(tmp_path, architecture)
    with pytest.raises(ConfigError, match=r"ForCausalLM .* another architecture"):
        largest_error("transformers", folder)


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.parametrize("architecture", SERVED)
def test_vllm_computes_every_architecture_that_it_serves(architecture: str, tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path, architecture)
    let_vllm_inspect_the_model_here(folder)
    assert largest_error("vllm", folder) < 1e-4
