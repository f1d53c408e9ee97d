"""Identity of a reference, and the number of its positions."""

import json
from pathlib import Path
from typing import Any

import pytest

from schemas.errors import ConfigError
from stages.models.resolve import ModelPin, pin_model
from stages.scorers.reference import (
    count_positions,
    identify_reference,
    list_ropes,
    require_fixed_rope,
)
from tests.tiny_models import make_tiny_model


@pytest.mark.parametrize(
    ("config", "num_positions"),
    [
        ({"max_position_embeddings": 8192}, 8192),
        ({"n_positions": 1024}, 1024),
        ({"text_config": {"max_position_embeddings": 4096}}, 4096),
        ({"max_position_embeddings": 4096, "rope_scaling": {"type": "yarn", "factor": 4.0}}, 16384),
        ({"max_position_embeddings": 4096, "rope_scaling": None}, 4096),
        ({"state_size": 16}, None),
    ],
)
def test_positions_are_read_from_the_config(
    config: dict[str, Any], num_positions: int | None
) -> None:
    assert count_positions(config) == num_positions


STATIC = {"rope_type": "yarn", "factor": 4.0}
LONG = {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [4.0]}


@pytest.mark.parametrize(
    ("config", "kinds"),
    [
        ({"rope_theta": 1e4}, set()),
        ({"rope_scaling": None}, set()),
        ({"rope_parameters": STATIC}, {"yarn"}),
        ({"rope_scaling": {"type": "su"}}, {"su"}),
        ({"text_config": {"rope_parameters": LONG}}, {"longrope"}),
        ({"rope_parameters": {"full": STATIC, "sliding": LONG}}, {"yarn", "longrope"}),
    ],
)
def test_kinds_of_rope_are_found_at_every_level(config: dict[str, Any], kinds: set[str]) -> None:
    assert set(list_ropes(config)) == kinds


@pytest.mark.parametrize(
    ("rope", "max_length", "advice"),
    [
        ({**LONG, "original_max_position_embeddings": 96}, 96, "max_length below 96"),
        ({**LONG, "original_max_position_embeddings": 96}, 2048, "max_length below 96"),
        ({"type": "su", "long_factor": [4.0]}, 2048, "transformers, which computes"),
        (LONG, 2048, "transformers, which computes each sequence alone."),
        ({"rope_type": "dynamic", "factor": 2.0}, 16, "transformers, which computes"),
        ({"full": STATIC, "sliding": {"type": "dynamic"}}, 16, "transformers, which computes"),
    ],
)
def test_vllm_is_refused_for_positions_that_depend_on_each_sequence(
    tmp_path: Path, rope: dict[str, Any], max_length: int, advice: str
) -> None:
    """vLLM's engine holds one token more than the longest sequence."""
    pin = pin_with_rope(tmp_path, rope)
    with pytest.raises(ConfigError, match=advice):
        require_fixed_rope(pin, backend="vllm", max_length=max_length)
    require_fixed_rope(pin, backend="transformers", max_length=max_length)


@pytest.mark.parametrize(
    ("rope", "max_length"),
    [
        ({**LONG, "original_max_position_embeddings": 96}, 95),
        (STATIC, 4096),
        ({"rope_type": "llama3", "factor": 8.0}, 4096),
        ({"rope_type": "dynamic", "alpha": 1000.0}, 4096),
        (None, 4096),
    ],
)
def test_vllm_is_accepted_for_positions_that_all_sequences_share(
    tmp_path: Path, rope: dict[str, Any] | None, max_length: int
) -> None:
    require_fixed_rope(pin_with_rope(tmp_path, rope), backend="vllm", max_length=max_length)


def pin_with_rope(folder: Path, rope: dict[str, Any] | None) -> ModelPin:
    model = make_tiny_model(folder)
    config = json.loads((model / "config.json").read_bytes())
    (model / "config.json").write_text(json.dumps({**config, "rope_parameters": rope}))
    return pin_model(str(model))


@pytest.mark.parametrize(
    ("rope", "depends"),
    [
        (None, False),
        ({"rope_type": "llama3", "factor": 8.0}, False),
        ({"rope_type": "linear", "factor": 2.0}, False),
        ({"rope_type": "dynamic", "factor": 2.0}, True),
        (LONG, True),
        ({"type": "invented next year"}, True),
    ],
)
def test_max_length_is_part_of_a_reference_whose_positions_depend_on_it(
    tmp_path: Path, rope: dict[str, Any] | None, depends: bool
) -> None:
    """In vLLM, Phi-3's longrope rotates every position differently once the engine is opened for
    more than the original length. Unknown kinds count as dependent on the length."""
    pin = pin_with_rope(tmp_path, rope)
    short, long = (
        identify_reference(pin, engine="vllm", dtype="float32", max_length=max_length).fingerprint
        for max_length in (1024, 2048)
    )
    assert (short != long) == depends
