"""Check before a run that an adapter's layers exist in its model, without the model's weights.

Run as ``python -m stages.models.adapter_layers MODEL names NAME…`` or ``… MODEL adapter ADAPTER``,
with folders of which only the config and the adapter's files are read. It runs in a process of its
own because it needs torch and peft, which the pipeline's driver never imports.
"""

import logging
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from schemas.errors import ConfigError, PipelineError
from stages.models.digest import ADAPTER_WEIGHTS, CONFIG
from stages.models.resolve import AdapterPin, ModelPin
from stages.models.sources import find_source, run_module

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

_LORA_TENSOR = re.compile(r"(?:base_model\.model\.)?(?P<layer>.+?)\.lora_\w+(?:\.\w+)*")


def require_layers(model: ModelPin, names: Sequence[str], *, key: str) -> None:
    """Refuse names of layers that a model does not have, or that cannot have an adapter.

    Args:
        model: the model; only its config is read.
        names: ends of the layers' names, such as q_proj.
        key: the recipe's key that holds the names.
    Raises:
        ConfigError: names each such name, and the names that there are.
    """
    folder = find_source(model.revised_spec, [CONFIG]).folder
    _run(key, str(folder), "names", *names)


def require_fit(model: ModelPin, adapter: AdapterPin, *, key: str) -> None:
    """Refuse an adapter whose layers do not exist in a model; on the hub, merging finds that.

    Args:
        model: the base; only its config is read.
        adapter: the adapter; its tensors' names are read.
        key: the recipe's key that names the adapter.
    Raises:
        ConfigError: names a tensor without a place, and the names that there are.
    """
    if adapter.commit is not None:
        return
    folder = find_source(model.revised_spec, [CONFIG]).folder
    _run(key, str(folder), "adapter", adapter.spec)


def _run(key: str, *arguments: str) -> None:
    try:
        run_module("stages.models.adapter_layers", *arguments)
    except ConfigError as error:
        raise ConfigError(f"{key}: {error}") from None


def open_skeleton(folder: Path) -> "PreTrainedModel":
    """Build a model's layers from its config, without memory for weights.

    Raises:
        ConfigError: transformers has no such architecture.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                config, trust_remote_code=False
            )
    except ValueError as error:
        raise ConfigError(f"{folder} is no model that transformers can open: {error}") from error
    return model


def check_names(model: "PreTrainedModel", names: Sequence[str]) -> None:
    """Raise ConfigError unless each name matches layers, and only layers that LoRA can adapt."""
    for name in names:
        matching = [module for path, module in model.named_modules() if _ends_with(path, name)]
        unfit = sorted({type(module).__name__ for module in matching if not _is_adaptable(module)})
        if matching and not unfit:
            continue
        if unfit:
            fault = f"{name} is of the kind {', '.join(unfit)}, which LoRA cannot adapt."
        elif any(_ends_with(path, name) for path, _ in model.named_parameters()):
            fault = f"{name} is one weight of a fused layer, which LoRA cannot adapt."
        else:
            fault = f"no layer is named {name}."
        raise ConfigError(f"{fault} {_describe_names(model)}")


def check_adapter(model: "PreTrainedModel", adapter: Path) -> None:
    """Raise ConfigError unless every LoRA tensor of an adapter's file has a layer in the model."""
    from safetensors import safe_open

    with safe_open(adapter / ADAPTER_WEIGHTS, framework="pt") as tensors:
        names = sorted(tensors.keys())
    modules = dict(model.named_modules())
    adapted = {match["layer"]: name for name in names if (match := _LORA_TENSOR.fullmatch(name))}
    homeless = {
        layer: name
        for layer, name in adapted.items()
        if layer.replace(".base_layer", "") not in modules
    }
    if homeless:
        raise ConfigError(
            f"{adapter} does not fit its base model: {len(homeless)} of the {len(adapted)} layers "
            f"that it adapts do not exist there, such as {next(iter(homeless))} (of the tensor "
            f"{next(iter(homeless.values()))}). Name the base that it was trained on. "
            f"{_describe_names(model)}"
        )


def _ends_with(path: str, name: str) -> bool:
    return path == name or path.endswith(f".{name}")


def _is_adaptable(module: "nn.Module") -> bool:
    """Whether peft's LoRA has a layer for it."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, nn.Linear | nn.Embedding | nn.Conv1d | Conv1D)


def _describe_names(model: "nn.Module") -> str:
    adaptable = [path for path, module in model.named_modules() if _is_adaptable(module)]
    names = {path.rpartition(".")[2] for path in adaptable}
    return f"Layers that can have an adapter here: {', '.join(sorted(names))}."


def main() -> int:
    """Check the folders and names on the command line; exit code 2 means a mistake of the user."""
    logging.basicConfig(level=logging.ERROR, format="%(message)s")
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    _, folder, what, *rest = sys.argv
    try:
        model = open_skeleton(Path(folder))
        if what == "names":
            check_names(model, rest)
        else:
            check_adapter(model, Path(rest[0]))
    except PipelineError as error:
        logger.error("%s", error)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
