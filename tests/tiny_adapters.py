"""Random LoRA adapters on tiny models, saved by peft, for tests that merge them."""

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM


def make_tiny_adapter(folder: Path, base: Path, *, seed: int = 0, **settings: Any) -> Path:
    """Write a LoRA adapter with random weights throughout, as a trained one has.

    Args:
        folder: created when missing.
        base: folder of the base model.
        seed: of the weights.
        settings: passed to peft's LoraConfig; by default rank 4 on all linear layers.
    Returns:
        The folder.
    """
    model = AutoModelForCausalLM.from_pretrained(base)
    wanted = {"target_modules": "all-linear", "r": 4, "lora_alpha": 8, **settings}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **wanted))
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.data += 0.05 * torch.randn_like(parameter)
    adapted.save_pretrained(str(folder))
    return folder
