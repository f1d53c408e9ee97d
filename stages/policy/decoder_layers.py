"""A model's decoder layers: find, compile or recompute them, or leave most of them out."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import GradientCheckpointingLayer, PreTrainedModel

from schemas.errors import ConfigError
from stages.policy.torch_compat import skip_what_fails_to_compile

COMPILER = "inductor"
"""Backend of torch.compile."""

MIN_LAYERS = 2
"""Layers that `few_layers` keeps at least: in the second, tokens have seen each other."""

PLACE_NAMES = frozenset({"layer_idx", "layer_id", "layer_index", "layer_number", "idx"})
"""Attributes that hold a layer's place in its model."""


def find_layers(module: nn.Module) -> list[nn.Module]:
    """Find a model's layers: its outermost modules that support gradient checkpointing."""
    if isinstance(module, GradientCheckpointingLayer):
        return [module]
    return [layer for child in module.children() for layer in find_layers(child)]


def checkpoint_layers(model: PreTrainedModel) -> None:
    """Make each layer recompute its activations in the backward pass instead of storing them.

    transformers' own switch for this works in training mode only, which also turns on dropout.

    Raises:
        ConfigError: the architecture does not mark its layers.
    """
    layers = [one for one in model.modules() if isinstance(one, GradientCheckpointingLayer)]
    if not layers:
        raise ConfigError(
            f"{type(model).__name__} has no layers that can be recomputed. Turn "
            "execution.train.gradient_checkpointing off."
        )
    for layer in layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)


def compile_layers(model: PreTrainedModel) -> None:
    """Compile each layer for rows of any length, which fuses its element-wise operations.

    Packed attention is left out, and what the compiler fails at stays as it is, with torch's
    warning. Call it before `checkpoint_layers`: a compiled layer can be recomputed, but a layer
    that is recomputed cannot be compiled in parts.
    """
    skip_what_fails_to_compile()
    for layer in find_layers(model):
        layer.forward = torch.compile(layer.forward, dynamic=True, backend=COMPILER)


@contextmanager
def few_layers(model: PreTrainedModel) -> Iterator[None]:
    """Run a model with its first layers only, at least one of each kind, for a block.

    Two layers are of one kind if they have the same modules, of the same shapes and settings, and
    the same entry in the config's list of layer types. How attention sees other tokens is then the
    same in both. Models whose layers are not found in one list keep all of them.
    """
    place = _find_list(model)
    if place is None:
        yield
        return
    parent, name, layers = place
    setattr(parent, name, layers[: _count_first(model, layers)])
    try:
        yield
    finally:
        setattr(parent, name, layers)


def count_first_layers(model: PreTrainedModel) -> int | None:
    """Count the first layers that hold every kind; None where they are not found in one list."""
    place = _find_list(model)
    return None if place is None else _count_first(model, place[2])


def _find_list(model: PreTrainedModel) -> tuple[nn.Module, str, nn.ModuleList] | None:
    """Find the list that holds all of a model's layers, as its module, name and value."""
    layers = find_layers(model)
    for parent in model.modules():
        for name, child in parent.named_children():
            if isinstance(child, nn.ModuleList) and layers and list(child) == layers:
                return parent, name, child
    return None


def _count_first(model: PreTrainedModel, layers: nn.ModuleList) -> int:
    """Count the first layers that hold every kind."""
    types = model.config.get_text_config().to_dict().get("layer_types") or [None] * len(layers)
    kinds = [(type_, _describe_layer(layer)) for type_, layer in zip(types, layers, strict=False)]
    first_places = {kind: place for place, kind in reversed(list(enumerate(kinds)))}
    return max(MIN_LAYERS, max(first_places.values()) + 1)


def _describe_layer(layer: nn.Module) -> str:
    """Describe a layer's modules, their shapes and their settings, but not its place."""
    return "\n".join(
        f"{name} {type(module).__name__} {_describe_settings(module)} "
        f"{[tuple(weight.shape) for weight in module.parameters(recurse=False)]}"
        for name, module in layer.named_modules()
    )


def _describe_settings(module: nn.Module) -> str:
    settings = {
        name: value
        for name, value in sorted(vars(module).items())
        if isinstance(value, bool | int | str | None) and name not in PLACE_NAMES
    }
    return str(settings)
