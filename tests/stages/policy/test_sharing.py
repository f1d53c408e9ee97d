"""The trial finds the densest row layout that a model computes correctly."""

from collections.abc import Callable
from copy import deepcopy

import pytest
import torch
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from stages.policy import sharing
from stages.policy.attention import PACKED_ATTENTION, packed_attention_forward
from stages.policy.decoder_layers import few_layers
from stages.policy.sharing import choose_probe_length, choose_rows
from stages.policy.transformers_compat import attention_name
from tests.tiny_architectures import SHORT_POSITIONS
from tests.tiny_models import CONFIGS

OpenTinyModel = Callable[[str], PreTrainedModel]

WITHOUT_PACKING = ("gemma2", "mamba")


@pytest.mark.parametrize("architecture", sorted(CONFIGS.keys() - {*WITHOUT_PACKING}))
def test_attention_packs_with_a_window_or_without(
    tiny_model: OpenTinyModel, architecture: str
) -> None:
    assert choose_rows(tiny_model(architecture), max_length=64) == "packed"
    assert choose_rows(tiny_model(architecture), max_length=2) == "packed"


@pytest.mark.parametrize("window", [8, 60])
@pytest.mark.parametrize("architecture", ["gemma2", "mistral"])
def test_with_a_dense_mask_a_window_shares_up_to_its_length(
    tiny_model: OpenTinyModel, monkeypatch: pytest.MonkeyPatch, architecture: str, window: int
) -> None:
    """The last token predicts nothing, so a sequence may be one longer than the window."""
    model = tiny_model(architecture)
    monkeypatch.setattr(model.config, "sliding_window", window)
    monkeypatch.setattr(sharing, "pack_rows", lambda _: False)
    assert choose_rows(model, max_length=window + 1) == "shared"
    assert choose_rows(model, max_length=window + 2) == "separate"
    assert choose_rows(model, max_length=4 * window) == "separate"


def test_attention_that_ignores_the_spans_is_not_packed(tiny_model: OpenTinyModel) -> None:
    """It computes a packed row as one sequence, so the second group sees the first."""

    def attend_to_all(module, query, key, value, mask, **kwargs):  # type: ignore[no-untyped-def]
        dense = mask if mask is not None and mask.is_floating_point() else None
        return sdpa_attention_forward(module, query, key, value, dense, **kwargs)

    AttentionInterface.register(PACKED_ATTENTION, attend_to_all)
    try:
        assert choose_rows(tiny_model("llama"), max_length=64) == "shared"
    finally:
        AttentionInterface.register(PACKED_ATTENTION, packed_attention_forward)


@pytest.mark.parametrize("architecture", ["phi3-longrope", "llama-dynamic"])
def test_positions_that_depend_on_the_longest_row_are_computed_alone(
    tiny_model: OpenTinyModel, architecture: str
) -> None:
    """Up to their short length, positions do not depend on it. The last token counts as well."""
    model = tiny_model(architecture)
    assert choose_rows(model, max_length=SHORT_POSITIONS) == "packed"
    assert choose_rows(model, max_length=SHORT_POSITIONS + 32) == "alone"
    assert attention_name(model) == "sdpa"


def test_attention_that_replaces_another_is_compared_with_that(
    tiny_model: OpenTinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A layer that knows "sdpa" by name computes something else under any other name."""
    model = deepcopy(tiny_model("llama"))
    model.set_attn_implementation("sdpa")
    attend = model.model.layers[0].self_attn.forward

    def attend_by_name(hidden_states, **kwargs):  # type: ignore[no-untyped-def]
        output, weights = attend(hidden_states, **kwargs)
        return (output if attention_name(model) == "sdpa" else 2 * output), weights

    monkeypatch.setattr(model.model.layers[0].self_attn, "forward", attend_by_name)
    assert choose_rows(model, max_length=64) == "shared"
    assert attention_name(model) == "sdpa"


@pytest.mark.parametrize(
    ("values", "max_length", "wanted"),
    [
        ({}, 2048, 80),
        ({}, 30, 30),
        ({"sliding_window": 512}, 2048, 528),
        ({"sliding_window": 4096}, 2048, 80),
        ({"sliding_window": [128, None, 1024]}, 1030, 1030),
        ({"rope_parameters": {"original_max_position_embeddings": 256}}, 2048, 272),
    ],
)
def test_the_trial_is_just_longer_than_what_the_config_limits(
    values: dict[str, object], max_length: int, wanted: int
) -> None:
    config = PreTrainedConfig(max_position_embeddings=8192, **values)
    assert choose_probe_length(config, max_length=max_length) == wanted


@pytest.mark.parametrize(
    ("num_layers", "layer_types", "num_run"),
    [(6, None, 2), (6, ["full_attention", "full_attention", "sliding_attention"] * 2, 3)],
)
def test_the_trial_runs_one_layer_of_each_kind(
    num_layers: int, layer_types: list[str] | None, num_run: int
) -> None:
    model = AutoModelForCausalLM.from_config(CONFIGS["gemma3"]())
    config = model.config
    config.num_hidden_layers, config.layer_types = num_layers, layer_types or ["x"] * num_layers
    layers = torch.nn.ModuleList([deepcopy(model.model.layers[0]) for _ in range(num_layers)])
    model.model.layers = layers
    with few_layers(model):
        assert list(model.model.layers) == list(layers)[:num_run]
    assert model.model.layers is layers


def test_recurrence_does_not_share(tiny_model: OpenTinyModel) -> None:
    assert choose_rows(tiny_model("mamba"), max_length=64) == "separate"


def test_low_precision_is_judged_in_float32_and_left_as_it_was(tiny_model: OpenTinyModel) -> None:
    """bfloat16 rounding is far above the tolerance, so only a trial in float32 can pass."""
    model = tiny_model("llama")
    wanted = {name: weight.bfloat16() for name, weight in model.state_dict().items()}
    with torch.no_grad():
        original = {name: weight.clone() for name, weight in model.state_dict().items()}
        model.bfloat16()
        answer = choose_rows(model, max_length=64)
        found = dict(model.state_dict())
        model.float().load_state_dict(original)
    assert answer == "packed"
    for name, weight in wanted.items():
        assert found[name].dtype == torch.bfloat16
        assert found[name].equal(weight)
