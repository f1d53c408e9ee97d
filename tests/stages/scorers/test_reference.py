"""Identity of a reference, and the number of its positions."""

import json
from pathlib import Path
from typing import Any

import pytest

from stages.models.resolve import pin_model
from stages.scorers.reference import count_positions, identify_reference, list_ropes
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
    model = make_tiny_model(tmp_path)
    config = json.loads((model / "config.json").read_bytes())
    (model / "config.json").write_text(json.dumps({**config, "rope_parameters": rope}))
    pin = pin_model(str(model))
    short, long = (
        identify_reference(pin, engine="vllm", dtype="float32", max_length=max_length).fingerprint
        for max_length in (1024, 2048)
    )
    assert (short != long) == depends
