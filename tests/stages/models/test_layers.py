"""Names of an adapter's layers are checked against the model's config alone."""

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, PhimoeConfig

from schemas.errors import ConfigError
from stages.models import layers
from stages.models.layers import (
    check_adapter,
    check_names,
    open_skeleton,
    require_fit,
    require_known,
    require_layers,
)
from stages.models.resolve import pin_adapter, pin_model
from tests.tiny_adapters import make_tiny_adapter
from tests.tiny_models import GROUPED, make_tiny_model


def skeleton(folder: Path, architecture: str) -> Any:
    """Open a model from a folder that has only its config."""
    model = make_tiny_model(folder / architecture, architecture)
    (model / "model.safetensors").unlink()
    return open_skeleton(model)


@pytest.mark.parametrize(
    ("architecture", "names"),
    [
        ("llama", ["q_proj", "v_proj"]),
        ("llama", ["self_attn.q_proj", "embed_tokens", "lm_head"]),
        ("llama", ["model.layers.1.mlp.up_proj"]),
        ("gpt2", ["c_attn", "wte"]),
        ("mamba", ["x_proj", "in_proj"]),
        ("mixtral", ["q_proj"]),
        ("mixtral", ["all-linear"]),
        ("gpt2", ["all-linear"]),
        ("gemma3", ["embed_tokens"]),
    ],
)
def test_names_of_layers_are_accepted(tmp_path: Path, architecture: str, names: list[str]) -> None:
    check_names(skeleton(tmp_path, architecture), names)


@pytest.mark.parametrize(
    ("architecture", "names", "message"),
    [
        ("llama", ["q_proj", "v_porj"], "no layer is named v_porj. Layers .* here: down_proj, .*"),
        ("llama", ["roj"], "no layer is named roj"),
        ("llama", ["model.layers.9.mlp.up_proj"], "no layer is named model.layers.9.mlp.up_proj"),
        ("gpt2", ["q_proj"], r"no layer is named q_proj. .* c_attn, c_fc, c_proj, lm_head, wpe"),
        ("mixtral", ["gate_up_proj"], "gate_up_proj is one weight of a fused layer.* q_proj"),
        ("llama", ["q_proj", "norm"], "norm is of the kind LlamaRMSNorm, which LoRA cannot adapt"),
        ("llama", ["mlp"], "mlp is of the kind LlamaMLP"),
        ("mamba", ["all-linear"], "'out_proj' is incompatible with Mamba-based models"),
    ],
)
def test_names_without_a_layer_to_adapt_are_refused(
    tmp_path: Path, architecture: str, names: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        check_names(skeleton(tmp_path, architecture), names)


def test_a_router_that_is_a_linear_layer_by_name_only_is_refused(tmp_path: Path) -> None:
    """Its class derives from nn.Linear, but it returns scores and experts."""
    config = PhimoeConfig(**GROUPED, num_local_experts=4, num_experts_per_tok=2)
    config.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="router is of the kind PhimoeTopKRouter"):
        check_names(open_skeleton(tmp_path), ["all-linear"])
    check_names(open_skeleton(tmp_path), ["q_proj", "v_proj"])


@pytest.mark.parametrize(
    ("architecture", "settings"),
    [
        ("llama", {}),
        ("llama", {"use_dora": True, "bias": "none"}),
        ("llama", {"modules_to_save": ["lm_head"]}),
        ("llama", {"trainable_token_indices": [3, 5]}),
        ("llama", {"target_modules": ["embed_tokens"]}),
        ("llama", {"rank_pattern": {"q_proj": 2}}),
        ("gpt2", {"target_modules": ["c_attn"]}),
        ("mixtral", {"target_parameters": ["mlp.experts.gate_up_proj"]}),
    ],
)
def test_an_adapter_fits_the_model_that_it_was_made_on(
    tmp_path: Path, architecture: str, settings: dict[str, Any]
) -> None:
    base = make_tiny_model(tmp_path / "base", architecture)
    adapter = make_tiny_adapter(tmp_path / "adapter", base, **settings)
    check_adapter(open_skeleton(base), adapter)


def test_an_adapter_of_another_architecture_is_refused(tmp_path: Path) -> None:
    other = make_tiny_model(tmp_path / "other", "gpt2")
    adapter = make_tiny_adapter(tmp_path / "adapter", other)
    with pytest.raises(ConfigError) as raised:
        check_adapter(skeleton(tmp_path, "llama"), adapter)
    said = str(raised.value)
    assert "8 of the 8 layers that it adapts do not exist there" in said
    assert "transformer.h.0.attn.c_attn" in said
    assert "down_proj, embed_tokens" in said


@pytest.mark.slow
def test_the_checks_run_in_a_process_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = make_tiny_model(tmp_path / "base")
    pin = pin_model(str(base))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    require_layers(pin, ["q_proj"], key="stages.train.lora.target_modules")
    with pytest.raises(
        ConfigError, match=r"^stages.train.lora.target_modules: no layer is named x"
    ):
        require_layers(pin, ["q_proj", "x"], key="stages.train.lora.target_modules")
    # Names that were accepted once are not checked again.
    monkeypatch.setattr(layers, "run_module", None)
    require_layers(pin, ["q_proj"], key="stages.train.lora.target_modules")
    monkeypatch.undo()
    other = make_tiny_model(tmp_path / "other", "gpt2")
    adapter = pin_adapter(str(make_tiny_adapter(tmp_path / "adapter", other)))
    with pytest.raises(ConfigError, match=r"^stages.score.adapter: .* does not fit its base"):
        require_fit(pin, adapter, key="stages.score.adapter")
    # Of an adapter on the hub, the plan downloads no weights.
    require_fit(pin, msgspec.structs.replace(adapter, commit="0" * 40), key="stages.score.adapter")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "unheard-of"}, "no language model of an architecture"),
        (
            {"model_type": "unheard-of", "auto_map": {"AutoConfig": "own.Config"}},
            r"names code of its own \(auto_map in config.json\), and no such code is run",
        ),
        ({"model_type": "vit"}, "no language model of an architecture"),
    ],
)
def test_an_unknown_architecture_is_no_model(
    tmp_path: Path, config: dict[str, Any], message: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=message):
        open_skeleton(tmp_path)


def test_only_a_config_that_names_code_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Opening one takes seconds."""
    asked: list[str] = []
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(layers, "run_module", lambda module, folder: asked.append(folder))
    plain, custom = (make_tiny_model(tmp_path / name) for name in ("plain", "custom"))
    config = json.loads((custom / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "own.Model"}
    (custom / "config.json").write_text(json.dumps(config))
    for folder in (plain, custom):
        require_known(pin_model(str(folder)), key="stages.score.model")
    assert asked == [str(custom)]


def test_an_adapter_with_added_tokens_needs_a_base_that_has_them(tmp_path: Path) -> None:
    base = make_tiny_model(tmp_path / "base")
    larger = AutoModelForCausalLM.from_pretrained(base)
    larger.resize_token_embeddings(330)
    larger.save_pretrained(tmp_path / "larger")
    adapter = make_tiny_adapter(
        tmp_path / "adapter", tmp_path / "larger", modules_to_save=["embed_tokens"]
    )
    with pytest.raises(ConfigError, match=r"embed_tokens.*\(330, 64\).*\(320, 64\).*added tokens"):
        check_adapter(open_skeleton(base), adapter)


def test_an_adapter_without_lora_tensors_is_refused(tmp_path: Path) -> None:
    base = make_tiny_model(tmp_path / "base")
    save_file({"a.weight": torch.ones(1)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ConfigError, match=r"holds no LoRA tensor, but \['a.weight'"):
        check_adapter(open_skeleton(base), tmp_path)
