"""Does an opened model compute what its files say, and nothing else?"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from schemas.errors import ConfigError
from stages.policy.model import load_model
from tests.tiny_models import VOCAB_SIZE, make_tiny_model

CPU = torch.device("cpu")
TOKENS = torch.randint(VOCAB_SIZE, (1, 20), generator=torch.Generator().manual_seed(0))


def change_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@torch.no_grad()
def test_soft_cap_on_attention_is_kept(tmp_path: Path) -> None:
    """SDPA knows no soft cap; transformers leaves it out without a word."""
    folder = make_tiny_model(tmp_path, "gemma2")
    eager = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    sdpa = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa")
    wanted = eager(TOKENS).logits
    found = load_model(str(folder), dtype=torch.float32, device=CPU)(TOKENS).logits
    assert torch.equal(found, wanted)
    assert not torch.allclose(sdpa(TOKENS).logits, wanted, atol=1e-3)


@torch.no_grad()
def test_dropout_is_off_while_training(tmp_path: Path) -> None:
    """GPT-2's own rates are 0.1."""
    folder = make_tiny_model(tmp_path, "gpt2")
    model = load_model(str(folder), dtype=torch.float32, device=CPU)
    wanted = model(TOKENS).logits
    assert torch.equal(model.train()(TOKENS).logits, wanted)


def test_missing_weights_are_refused(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path)
    weights = load_file(folder / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"lacks weights .* model\.norm\.weight \(1 in all\)"):
        load_model(str(folder), dtype=torch.float32, device=CPU)


def test_unknown_way_to_logits_is_refused(tmp_path: Path) -> None:
    """A Llama never looks at logit_scale: reading the key as if it did gives other logits."""
    folder = make_tiny_model(tmp_path)
    change_config(folder, logit_scale=0.5)
    with pytest.raises(ConfigError, match="LlamaForCausalLM computes its logits in a way"):
        load_model(str(folder), dtype=torch.float32, device=CPU)


def test_weights_have_the_dtype_asked_for(tmp_path: Path) -> None:
    model = load_model(str(make_tiny_model(tmp_path)), dtype=torch.bfloat16, device=CPU)
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}


def test_nothing_is_written_between_the_lines_of_a_run(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """transformers would show a bar of its own."""
    folder = make_tiny_model(tmp_path)
    capfd.readouterr()
    load_model(str(folder), dtype=torch.float32, device=CPU)
    assert capfd.readouterr() == ("", "")
