"""Canaries of the private parts of transformers that stages/policy/transformers_compat.py uses."""

from collections.abc import Callable
from copy import deepcopy

import pytest
from transformers import PreTrainedModel

from stages.policy.transformers_compat import attention_name


@pytest.mark.parametrize("name", ["sdpa", "eager"])
def test_config_attn_implementation_is_what_set_attn_implementation_set(
    tiny_model: Callable[[str], PreTrainedModel], name: str
) -> None:
    model = deepcopy(tiny_model("llama"))
    model.set_attn_implementation(name)
    assert attention_name(model) == name
