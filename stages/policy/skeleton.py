"""A model without weights, and the files from which its weights are read by rows.

Each worker of a sharded training reads only the rows that it keeps, so none holds the whole model.
"""

import json
import logging
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from stages.policy.decoder_layers import count_first_layers
from stages.policy.model import attention_implementation, keep_weights_unscaled

logger = logging.getLogger(__name__)

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"


@dataclass(frozen=True, kw_only=True)
class Skeleton:
    """A model on torch's meta device and the files that hold its weights."""

    model: PreTrainedModel
    """In evaluation mode; parameters are float32 and have no memory, buffers have their values."""
    folder: Path
    files: Mapping[str, str]
    """File of each parameter, by the parameter's name."""

    def read(self, name: str, rows: range) -> Tensor:
        """Read some rows of a parameter, in the dtype in which they are stored."""
        with safe_open(self.folder / self.files[name], framework="pt") as file:
            if not self.model.get_parameter(name).ndim:
                tensor: Tensor = file.get_tensor(name)
                return tensor
            part: Tensor = file.get_slice(name)[rows.start : rows.stop]
            return part

    def first_layers(self) -> PreTrainedConfig | None:
        """Make the config of the first layers, at least one of each kind.

        None means that the architecture does not keep its layers in one list.
        """
        num_layers = count_first_layers(self.model)
        if num_layers is None:
            return None
        config = deepcopy(self.model.config)
        text = config.get_text_config()
        text.num_hidden_layers = num_layers
        if types := text.to_dict().get("layer_types"):
            text.layer_types = types[:num_layers]
        return config


def open_skeleton(path: str) -> Skeleton | None:
    """Make a model without weights, or None where its files cannot be read by rows.

    That is so where parameters have other names or shapes than in the files, for example because
    transformers joins experts when it loads them, or where buffers are stored.

    Args:
        path: a Hugging Face folder with safetensors; code in it is not run.
    """
    folder = Path(path)
    config = AutoConfig.from_pretrained(path, trust_remote_code=False, local_files_only=True)
    keep_weights_unscaled(config)
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(
            config,
            dtype=torch.float32,
            attn_implementation=attention_implementation(config),
            trust_remote_code=False,
        )
    model.tie_weights()
    skeleton = Skeleton(model=model.eval(), folder=folder, files=_list_files(folder))
    reason = _find_obstacle(skeleton)
    if reason:
        logger.info("every worker opens the whole model: %s", reason)
        return None
    return skeleton


def _list_files(folder: Path) -> dict[str, str]:
    if (folder / _INDEX).exists():
        files: dict[str, str] = json.loads((folder / _INDEX).read_text())["weight_map"]
        return files
    with safe_open(folder / _SINGLE, framework="pt") as file:
        return dict.fromkeys(file.keys(), _SINGLE)


def _find_obstacle(skeleton: Skeleton) -> str:
    """Name the reason why a model's files cannot be read by rows; empty if they can."""
    model, files = skeleton.model, skeleton.files
    parameters = dict(model.named_parameters())
    if stored := sorted(
        model.state_dict().keys() - dict(model.named_parameters(remove_duplicate=False)).keys()
    ):
        return f"{stored[0]} is a stored buffer"
    if missing := sorted(parameters.keys() - files.keys()):
        return f"{missing[0]} is stored by another name"
    by_file: dict[str, list[str]] = {}
    for name in parameters:
        by_file.setdefault(files[name], []).append(name)
    for file_name, names in by_file.items():
        with safe_open(skeleton.folder / file_name, framework="pt") as file:
            for name in names:
                shape = tuple(file.get_slice(name).get_shape())
                if shape != tuple(parameters[name].shape):
                    return f"{name} is stored in another shape"
    return ""
