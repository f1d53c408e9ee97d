"""Do both engines compute every kind of model as a plain float32 forward does?

docs/explanation/scoring.md has the table.
"""

import json
from pathlib import Path

import numpy as np
import pytest

from stages.policy.groups import Group
from stages.scorers.opening import open_scorer
from stages.scorers.protocol import Backend, ScorerSettings, ScoringExecution
from tests.stages.scorers.oracle import group_of, largest_difference, plain_logps, random_ids
from tests.tiny_models import CONFIGS, make_tiny_model

MAX_LENGTH = 128

SERVED = (
    *("llama-untied", "qwen2", "qwen3", "mistral", "gemma2", "phi", "gpt2", "gpt-neox"),
    *("mixtral", "granite"),
)
"""One of each kind, four seconds each; llama is in test_vllm_scorer.py."""


def make_groups() -> list[Group]:
    """More than a block of 32 tokens is shared, a prompt of whole blocks, and single tokens."""
    rng = np.random.default_rng(0)
    shapes = [(40, (30, 2)), (1, (1,)), (90, (38, 5, 1)), (64, (20, 33))]
    return [
        group_of(random_ids(rng, prompt), *(random_ids(rng, length) for length in lengths))
        for prompt, lengths in shapes
    ]


def let_vllm_look_at_the_model_here(folder: Path) -> None:
    """Else it starts a process for each kind of model that it has not seen on this machine, which
    takes ten seconds, and remembers in the user's cache what it saw."""
    from vllm import ModelRegistry

    for name in json.loads((folder / "config.json").read_bytes())["architectures"]:
        ModelRegistry.register_model(name, ModelRegistry.models[name].load_model_cls())


def largest_error(backend: Backend, folder: Path) -> float:
    """Of a token, in nats.

    The oracle comes first: vLLM changes transformers' classes of models that it has none for.
    """
    groups = make_groups()
    wanted = plain_logps(folder, groups)
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
    return largest_difference(found, wanted)


@pytest.mark.parametrize("architecture", sorted(CONFIGS))
def test_transformers_computes_every_architecture(architecture: str, tmp_path: Path) -> None:
    assert largest_error("transformers", make_tiny_model(tmp_path, architecture)) < 1e-4


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.parametrize("architecture", SERVED)
def test_vllm_computes_every_architecture_that_it_serves(architecture: str, tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path, architecture)
    let_vllm_look_at_the_model_here(folder)
    assert largest_error("vllm", folder) < 1e-4
