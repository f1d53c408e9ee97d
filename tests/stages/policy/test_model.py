"""A loaded model computes what its files specify, and nothing else."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from schemas.errors import ConfigError
from stages.policy.decoder_layers import checkpoint_layers
from stages.policy.memory import ALIGNMENT_BYTES, align_parameters
from stages.policy.model import load_model
from stages.scorers.plain import load_plain_model
from tests.tiny_architectures import make_tiny_architecture
from tests.tiny_models import VOCAB_SIZE, make_tiny_model

CPU = torch.device("cpu")
TOKENS = torch.randint(VOCAB_SIZE, (1, 20), generator=torch.Generator().manual_seed(0))


def change_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@torch.no_grad()
def test_soft_cap_on_attention_is_kept(tmp_path: Path) -> None:
    """SDPA has no soft cap, and transformers silently leaves it out."""
    folder = make_tiny_model(tmp_path, "gemma2")
    eager = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    sdpa = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa")
    wanted = eager(TOKENS).logits
    found = load_model(str(folder), dtype=torch.float32, device=CPU)(TOKENS).logits
    assert torch.equal(found, wanted)
    assert not torch.allclose(sdpa(TOKENS).logits, wanted, atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("architecture", ["phimoe", "mixtral", "gpt2"])
def test_a_model_is_loaded_as_shipped(tmp_path: Path, architecture: str) -> None:
    """phimoe's router reads a rate of noise at inference: with 0 it picks other experts."""
    folder = make_tiny_architecture(tmp_path, architecture)
    change_config(folder, router_jitter_noise=0.5, resid_pdrop=0.5)
    plain = AutoModelForCausalLM.from_pretrained(folder).eval()
    model = load_model(str(folder), dtype=torch.float32, device=CPU)
    assert model.config.to_dict() == plain.config.to_dict()
    assert torch.equal(model(TOKENS).logits, plain(TOKENS).logits)


@torch.no_grad()
def test_a_forward_pass_leaves_the_weights_as_they_were(tmp_path: Path) -> None:
    """RWKV divides the weights of later layers in evaluation mode, and its states to match.

    The constant in its layer norms is not divided, hence the tolerance.
    """
    folder = make_tiny_architecture(tmp_path, "rwkv")
    change_config(folder, rescale_every=1)
    plain = AutoModelForCausalLM.from_pretrained(folder).eval()
    model = load_model(str(folder), dtype=torch.float32, device=CPU)
    found, wanted = model(TOKENS).logits, plain(TOKENS).logits
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-3)
    weights = load_file(folder / "model.safetensors")
    name = "rwkv.blocks.1.feed_forward.value.weight"
    assert model.get_parameter(name).equal(weights[name])
    assert not plain.get_parameter(name).equal(weights[name])


def test_layers_can_be_recomputed_only_where_the_architecture_marks_them(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path)
    model = load_model(str(folder), dtype=torch.float32, device=CPU)
    with pytest.raises(ConfigError, match=r"Linear has no layers that can be recomputed"):
        checkpoint_layers(model.get_output_embeddings())


def test_missing_weights_are_refused(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path)
    weights = load_file(folder / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"lacks weights .* model\.norm\.weight \(1 in all\)"):
        load_model(str(folder), dtype=torch.float32, device=CPU)


def test_a_model_with_unknown_scaling_of_logits_is_refused(tmp_path: Path) -> None:
    """Llama ignores logit_scale, so applying it gives other logits than the model's own."""
    folder = make_tiny_model(tmp_path)
    change_config(folder, logit_scale=0.5)
    with pytest.raises(ConfigError, match="LlamaForCausalLM computes its logits in a way"):
        load_model(str(folder), dtype=torch.float32, device=CPU)


def test_weights_have_the_dtype_asked_for(tmp_path: Path) -> None:
    model = load_model(str(make_tiny_model(tmp_path)), dtype=torch.bfloat16, device=CPU)
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}


def test_loading_writes_nothing_to_the_terminal(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """transformers would show a progress bar."""
    folder = make_tiny_model(tmp_path)
    capfd.readouterr()
    load_model(str(folder), dtype=torch.float32, device=CPU)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("architecture", ["llama", "llama-untied", "gpt2"])
def test_weights_are_aligned_and_tied_ones_share_memory(tmp_path: Path, architecture: str) -> None:
    """Memory-mapped safetensors start at 8 modulo 64, which the plain loader shows."""
    folder = make_tiny_model(tmp_path, architecture)
    mapped = AutoModelForCausalLM.from_pretrained(folder)
    model = load_model(str(folder), dtype=torch.float32, device=CPU)
    assert any(weight.data_ptr() % ALIGNMENT_BYTES for weight in mapped.parameters())
    for name, weight in model.named_parameters():
        assert weight.data_ptr() % ALIGNMENT_BYTES == 0, name
        assert weight.equal(mapped.get_parameter(name)), name
    embedding, output_layer = model.get_input_embeddings(), model.get_output_embeddings()
    is_shared = embedding.weight.data_ptr() == output_layer.weight.data_ptr()
    assert is_shared == (architecture != "llama-untied")


def test_parameters_over_the_same_memory_still_share_it_once_aligned() -> None:
    """Two parameters that are views of one tensor, 4 bytes after the start of its memory."""
    values = torch.arange(13.0)[1:]
    module = torch.nn.Module()
    module.first, module.second = torch.nn.Parameter(values), torch.nn.Parameter(values)
    align_parameters(module)
    assert module.first.data_ptr() == module.second.data_ptr()
    assert module.first.data_ptr() % ALIGNMENT_BYTES == 0
    assert module.first.tolist() == list(range(1, 13))


def test_float32_stays_float32_where_other_code_chose_less(tmp_path: Path) -> None:
    """By both loaders: the one that trains and scores, and the plain one beside it."""
    folder = str(make_tiny_model(tmp_path))
    device = torch.device("cpu")
    for load in (
        partial(load_model, dtype=torch.float32, device=device),
        partial(load_plain_model, device=device),
    ):
        torch.set_float32_matmul_precision("medium")
        torch.backends.cudnn.allow_tf32 = True
        load(folder)
        assert torch.get_float32_matmul_precision() == "highest"
        assert not torch.backends.cudnn.allow_tf32
