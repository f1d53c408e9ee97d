"""Check before a run that a model can be opened and has an adapter's layers, without its weights.

Run as ``python -m stages.models.layers MODEL``, ``… MODEL names NAME…`` or ``… MODEL adapter
ADAPTER``, with folders of which only the config and the adapter's files are read. It runs in a
process of its own because it needs torch and peft, which the pipeline's driver never imports.
"""

import logging
import os
import re
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from schemas.errors import ConfigError, PipelineError
from schemas.ids import digest
from stages.models.digest import ADAPTER_WEIGHTS, CONFIG, read_json
from stages.models.fetch import read_config
from stages.models.resolve import AdapterPin, ModelPin
from stages.models.sources import find_source, run_module
from stages.store.caches import user_cache

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

ALL_LINEAR = "all-linear"
"""In place of names: all linear layers except the output."""

_LORA_TENSOR = re.compile(r"(?:base_model\.model\.)?(?P<layer>.+?)\.lora_\w+(?:\.\w+)*")


def require_known(model: ModelPin, *, key: str) -> None:
    """Refuse a model whose architecture is code in its own folder: no such code is run.

    Many models name code and need none, because transformers has their architecture by now.

    Args:
        model: the model; only its config is read.
        key: the recipe's key that names the model.
    Raises:
        ConfigError: transformers has no such architecture.
    """
    if "auto_map" in read_config(model):
        _check_once(model, content="", key=key)


def require_layers(model: ModelPin, names: Sequence[str], *, key: str) -> None:
    """Refuse names of layers that a model does not have, or that cannot have an adapter.

    Args:
        model: the model; only its config is read.
        names: ends of the layers' names, such as q_proj, or ALL_LINEAR alone.
        key: the recipe's key that holds the names.
    Raises:
        ConfigError: names each such name, and the names that there are.
    """
    _check_once(model, "names", *names, content=list(names), key=key)


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
    _check_once(model, "adapter", adapter.spec, content=adapter.weights, key=key)


def _check_once(model: ModelPin, *arguments: str, content: str | Sequence[str], key: str) -> None:
    """Run this module, unless it has accepted the same content before: every plan asks for it."""
    versions = [version(package) for package in ("peft", "transformers")]
    accepted = user_cache() / "layers" / digest([model.config, content, versions])
    if accepted.exists():
        return
    folder = find_source(model.revised_spec, [CONFIG]).folder
    try:
        run_module("stages.models.layers", str(folder), *arguments)
    except ConfigError as error:
        raise ConfigError(f"{key}: {error}") from None
    accepted.parent.mkdir(parents=True, exist_ok=True)
    accepted.touch()


def open_skeleton(folder: Path) -> "PreTrainedModel":
    """Build a model's layers from its config, without memory for weights.

    Raises:
        ConfigError: transformers has no such architecture, or the model is none for text.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    if folder.joinpath(CONFIG).is_file() and "auto_map" in read_json(folder / CONFIG):
        advice = "It names code of its own (auto_map in config.json), and no such code is run. "
    else:
        advice = ""
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                config, trust_remote_code=False
            )
    except (ValueError, KeyError) as error:
        raise ConfigError(
            f"{folder} is no language model of an architecture that transformers has. {advice}Name "
            f"another model, or the same one in transformers' own format. It said: {error}"
        ) from error
    return model


def check_names(model: "PreTrainedModel", names: Sequence[str]) -> None:
    """Raise ConfigError unless each name matches layers, and only layers that LoRA can adapt."""
    from peft import LoraConfig, get_peft_model
    from peft.tuners.tuners_utils import BaseTunerLayer

    is_all = list(names) == [ALL_LINEAR]
    described = _describe_names(model)
    for name in () if is_all else names:
        if fault := _find_fault(model, name):
            raise ConfigError(f"{fault} {described}")
    targets = ALL_LINEAR if is_all else list(names)
    try:
        adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=targets))
    except ValueError as error:
        raise ConfigError(f"{error} {described}") from error
    for path, module in adapted.named_modules():
        if isinstance(module, BaseTunerLayer) and not _returns_tensor(module.get_base_layer()):
            kind = type(module.get_base_layer()).__name__
            name = path.rpartition(".")[2]
            raise ConfigError(
                f"{name} is of the kind {kind}, which LoRA cannot adapt. Name other layers. "
                f"{described}"
            )


def _find_fault(model: "PreTrainedModel", name: str) -> str:
    """Describe why a name cannot be adapted; empty if it can."""
    matching = [module for path, module in model.named_modules() if _ends_with(path, name)]
    unfit = sorted({type(module).__name__ for module in matching if not _is_adaptable(module)})
    if unfit:
        return f"{name} is of the kind {', '.join(unfit)}, which LoRA cannot adapt."
    if matching:
        return ""
    if any(_ends_with(path, name) for path, _ in model.named_parameters()):
        return f"{name} is one weight of a fused layer, which LoRA cannot adapt."
    return f"no layer is named {name}."


def _returns_tensor(layer: "nn.Module") -> bool:
    """Whether a layer computes what its class says; some routers are linear layers by name only."""
    import torch
    from torch import nn

    if not isinstance(layer, nn.Linear) or type(layer).forward is nn.Linear.forward:
        return True
    return isinstance(layer(torch.empty(1, layer.in_features, device="meta")), torch.Tensor)


def check_adapter(model: "PreTrainedModel", adapter: Path) -> None:
    """Raise ConfigError unless every LoRA tensor of an adapter's file has a layer in the model."""
    from safetensors import safe_open

    with safe_open(adapter / ADAPTER_WEIGHTS, framework="pt") as tensors:
        names = sorted(tensors.keys())
        shapes = {name: tuple(tensors.get_slice(name).get_shape()) for name in names}
    _refuse_other_shapes(model, adapter, shapes)
    modules = dict(model.named_modules())
    adapted = {match["layer"]: name for name in names if (match := _LORA_TENSOR.fullmatch(name))}
    if not adapted:
        raise ConfigError(f"{adapter / ADAPTER_WEIGHTS} holds no LoRA tensor, but {names[:3]}.")
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


def _refuse_other_shapes(
    model: "PreTrainedModel", adapter: Path, shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Raise ConfigError if an adapter holds a whole weight of the model in another shape."""
    own = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name, shape in shapes.items():
        plain = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
        if plain in own and own[plain] != shape:
            raise ConfigError(
                f"{adapter} does not fit its base model: it holds {plain} of shape {shape}, and "
                f"the base's has {own[plain]}. An adapter that was trained with added tokens needs "
                "a base that has them: merge it by hand, and name the result."
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
    _, folder, *rest = sys.argv
    try:
        model = open_skeleton(Path(folder))
        if rest and rest[0] == "names":
            check_names(model, rest[1:])
        elif rest:
            check_adapter(model, Path(rest[1]))
    except PipelineError as error:
        logger.error("%s", error)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
