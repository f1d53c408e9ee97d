"""A merged folder computes what base and adapter compute; unfit adapters are refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from schemas.errors import ConfigError
from stages.models.merge_adapter import merge_adapter
from tests.tiny_adapters import make_tiny_adapter
from tests.tiny_models import make_tiny_model

LORA_A, LORA_B = "lora_A.weight", "lora_B.weight"


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=torch.arange(40)[None]).logits
    return found.float()


def unmerged(base: Path, adapter: Path) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return logits(PeftModel.from_pretrained(model, str(adapter)).eval())


def merged(folder: Path) -> Tensor:
    return logits(AutoModelForCausalLM.from_pretrained(folder))


def in_bfloat16(folder: Path) -> Path:
    """Round a model to bfloat16, the dtype of most releases."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


def test_every_weight_is_the_bases_plus_the_scaled_product(tmp_path: Path) -> None:
    """The oracle is W + alpha / r * B A in float64; every other tensor is the base's, widened.

    A bfloat16 result would be off by up to 2^-9 of a weight: about 4e-4 for a weight of 0.2.
    """
    base = in_bfloat16(make_tiny_model(tmp_path / "base"))
    adapter = make_tiny_adapter(tmp_path / "adapter", base)
    merge_adapter(base, adapter, tmp_path / "merged")
    old, found = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "merged"))
    given = load_file(adapter / "adapter_model.safetensors")
    assert set(found) == set(old)
    num_changed = 0
    for name, tensor in old.items():
        expected = tensor.double()
        key = f"base_model.model.{name.removesuffix('weight')}"
        if key + LORA_A in given:
            product = given[key + LORA_B].double() @ given[key + LORA_A].double()
            expected = expected + 8 / 4 * product
            num_changed += 1
        assert found[name].dtype == torch.float32
        assert (found[name].double() - expected).abs().max() < 1e-6, name
    assert num_changed == len(given) / 2 == 14  # 7 linear layers in each of 2 blocks


KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "rank-stabilised": ("qwen2", {"use_rslora": True}),
    "ranks by layer": ("llama", {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 32}}),
    "DoRA": ("llama", {"use_dora": True}),
    "with biases": ("qwen2", {"bias": "all"}),
    "with a layer of its own": ("llama-untied", {"modules_to_save": ["lm_head"]}),
    "on the output layer": ("llama-untied", {"target_modules": ["lm_head"]}),
    "with new tokens' embeddings": ("llama", {"trainable_token_indices": [3, 5]}),
    "on transposed layers": ("gpt2", {"target_modules": ["c_attn", "c_proj"]}),
    "on experts": ("mixtral", {}),
    "on the output side of tied embeddings": ("llama", {"target_modules": ["lm_head"]}),
    "on the input side of tied embeddings": ("llama", {"target_modules": ["embed_tokens"]}),
    "on both sides of a tie": ("gpt2", {"target_modules": ["wte", "lm_head"]}),
    "with its own half of a tie": ("llama", {"modules_to_save": ["lm_head"]}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_merged_model_computes_what_base_and_adapter_do(tmp_path: Path, kind: str) -> None:
    """The oracle is peft's own unmerged forward; without the adapter the logits differ clearly."""
    architecture, settings = KINDS[kind]
    base = make_tiny_model(tmp_path / "base", architecture)
    adapter = make_tiny_adapter(tmp_path / "adapter", base, **settings)
    merge_adapter(base, adapter, tmp_path / "merged")
    wanted = unmerged(base, adapter)
    assert (merged(tmp_path / "merged") - wanted).abs().max() < 1e-4
    assert (merged(base) - wanted).abs().max() > 1e-2


@pytest.mark.parametrize("side", ["embed_tokens", "lm_head"])
def test_half_of_a_tie_makes_an_untied_model(tmp_path: Path, side: str) -> None:
    """Its config says so, because vLLM believes that; the other side stays the base's matrix."""
    base = make_tiny_model(tmp_path / "base")
    adapter = make_tiny_adapter(tmp_path / "adapter", base, target_modules=[side])
    merge_adapter(base, adapter, tmp_path / "merged")
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    shared = load_file(base / "model.safetensors")["model.embed_tokens.weight"]
    found = load_file(tmp_path / "merged" / "model.safetensors")
    names = {"embed_tokens": "model.embed_tokens.weight", "lm_head": "lm_head.weight"}
    changed = found[names.pop(side)]
    [other] = names.values()
    assert torch.equal(found[other], shared)
    assert (changed - shared).abs().max() > 1e-2


def test_generation_settings_that_transformers_refuses_to_save_are_copied(tmp_path: Path) -> None:
    base = make_tiny_model(tmp_path / "base")
    settings = {"do_sample": False, "temperature": 0.6, "eos_token_id": 2}
    (base / "generation_config.json").write_text(json.dumps(settings))
    adapter = make_tiny_adapter(tmp_path / "adapter", make_tiny_model(tmp_path / "plain"))
    merge_adapter(base, adapter, tmp_path / "merged")
    found = tmp_path / "merged" / "generation_config.json"
    assert json.loads(found.read_text()) == settings


def test_the_folder_is_a_model_of_its_own(tmp_path: Path) -> None:
    """Config (except the dtype), tokenizer and licence are the base's; nothing else remains."""
    base = in_bfloat16(make_tiny_model(tmp_path / "base"))
    (base / "LICENSE").write_text("Do good.")
    adapter = make_tiny_adapter(tmp_path / "adapter", base)
    merge_adapter(base, adapter, tmp_path / "out" / "merged")
    found = tmp_path / "out" / "merged"
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["merged"]
    old, new = (json.loads((folder / "config.json").read_text()) for folder in (base, found))
    assert (old.pop("dtype"), new.pop("dtype")) == ("bfloat16", "float32")
    assert new == old
    for name in ("LICENSE", "tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (found / name).read_bytes() == (base / name).read_bytes()


def test_an_adapters_own_tokenizer_is_the_merged_models(tmp_path: Path) -> None:
    base = make_tiny_model(tmp_path / "base")
    adapter = make_tiny_adapter(tmp_path / "adapter", base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = "{{ messages[0].content }}"
    tokenizer.save_pretrained(adapter)
    merge_adapter(base, adapter, tmp_path / "merged")
    found = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert found.chat_template == "{{ messages[0].content }}"


def on_another_base(folder: Path) -> tuple[Path, Path]:
    adapter = make_tiny_adapter(folder / "adapter", make_tiny_model(folder / "other", "gpt2"))
    return make_tiny_model(folder / "base"), adapter


def of_other_sizes(folder: Path) -> tuple[Path, Path]:
    adapter = make_tiny_adapter(folder / "adapter", make_tiny_model(folder / "other"))
    base = make_tiny_model(folder / "base", "mistral")
    config = adapter / "adapter_config.json"
    config.write_text(config.read_text().replace('"r": 4', '"r": 2'))
    return base, adapter


def with_a_missing_tensor(folder: Path) -> tuple[Path, Path]:
    base = make_tiny_model(folder / "base")
    adapter = make_tiny_adapter(folder / "adapter", base)
    tensors = load_file(adapter / "adapter_model.safetensors")
    tensors.pop(sorted(tensors)[0])
    save_file(tensors, adapter / "adapter_model.safetensors")
    return base, adapter


def with_added_tokens(folder: Path) -> tuple[Path, Path]:
    """After resize_token_embeddings, peft saves the whole larger embedding with the adapter."""
    base = make_tiny_model(folder / "base")
    larger = AutoModelForCausalLM.from_pretrained(base)
    larger.resize_token_embeddings(330)
    larger.save_pretrained(folder / "larger")
    shutil.copy(base / "tokenizer.json", folder / "larger")
    adapter = make_tiny_adapter(
        folder / "adapter", folder / "larger", modules_to_save=["embed_tokens"]
    )
    return base, adapter


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (on_another_base, "does not fit its base model"),
        (of_other_sizes, "does not fit its base model.*size mismatch"),
        (with_a_missing_tensor, "0 of its tensors have no place there, and 1 that it should hold"),
        (with_added_tokens, "does not fit its base model.*added tokens"),
    ],
)
def test_an_unfit_adapter_is_refused_and_leaves_nothing(
    tmp_path: Path, make: Any, message: str
) -> None:
    base, adapter = make(tmp_path)
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        merge_adapter(base, adapter, tmp_path / "out" / "merged")
    assert list((tmp_path / "out").iterdir()) == []
