"""Shard a policy over workers with FSDP2, and handle parameters that may be sharded.

Each worker keeps some rows of every parameter, its gradient and its optimizer state. It gathers a
layer's other rows when the layer computes and frees them afterwards (Zhao et al. 2023,
arXiv:2304.11277). A sharded parameter is a DTensor.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from stages.models.fetch import fetch_model
from stages.models.resolve import ModelPin
from stages.policy.decoder_layers import find_layers
from stages.policy.model import load_model
from stages.policy.skeleton import Skeleton, open_skeleton
from stages.train.config import TrainConfig, TrainExecution
from stages.train.policy import Policy, list_trained, make_policy, open_policy, try_abilities
from stages.train.world import World


def open_sharded(
    config: TrainConfig,
    execution: TrainExecution,
    start: ModelPin,
    *,
    world: World,
    max_length: int,
) -> Policy:
    """Open the start in shards, as `open_policy` and `shard_policy` do.

    Several workers read their own rows only. The first one loads the first layers, too, and tries
    on them how rows can be laid out. With an adapter, or where the model's files cannot be read by
    rows, every worker opens the whole model, and keeps it whole if it is quantised.

    Args:
        max_length: tokens of the longest prompt with one completion.
    """
    reads_rows = world.size > 1 and config.lora is None
    skeleton = open_skeleton(fetch_model(start)) if reads_rows else None
    first_layers = skeleton and skeleton.first_layers()
    if skeleton is None or first_layers is None:
        policy = open_policy(config, execution, start, device=world.device, max_length=max_length)
        return policy if config.is_quantized else shard_policy(policy, world)
    abilities = None
    if world.is_first:
        few = load_model(
            str(skeleton.folder), dtype=torch.float32, device=world.device, config=first_layers
        )
        abilities = try_abilities(few, config, execution, max_length=max_length)
        del few
    policy = make_policy(
        skeleton.model,
        config,
        execution,
        max_length=max_length,
        abilities=world.from_first(abilities),
    )
    policy = shard_policy(policy, world)
    _fill(policy, skeleton, world.device)
    return policy


@torch.no_grad()
def _fill(policy: Policy, skeleton: Skeleton, device: torch.device) -> None:
    """Allocate the memory of a policy on the meta device, and read this worker's rows into it."""
    buffers = {name: buffer.clone() for name, buffer in policy.model.named_buffers()}
    policy.model.to_empty(device=device)
    for name, buffer in buffers.items():
        policy.model.get_buffer(name).copy_(buffer)
    for name, parameter in policy.model.named_parameters():
        own_rows(parameter).copy_(skeleton.read(name, own_range(parameter)))


def shard_policy(policy: Policy, world: World) -> Policy:
    """Shard every parameter by rows over the workers, in float32.

    Layers are gathered one at a time. Parameters outside the layers (embeddings, last norm, output
    layer) stay whole from the forward pass to the end of the backward pass. In bfloat16, weights
    are rounded as they are gathered and hidden states are bfloat16 between layers, as in a model
    that is loaded in bfloat16; gradients are summed in float32. Models that need autocast are
    gathered in float32. A single worker shards only for the rounded weights, which exist one layer
    at a time.

    Weights below an adapter are held and gathered in the policy's dtype. If that is bfloat16, the
    adapter's own, in float32, stay whole on every worker, because FSDP wants one dtype of what it
    gathers together; a single worker keeps such a policy as it is.

    Args:
        policy: the same on every worker. Its `model` is sharded in place.
        world: has a process group (`World.joined`).
    """
    if world.size == 1 and not policy.gathers_rounded:
        return policy
    mesh = init_device_mesh(world.device.type, (world.size,), mesh_dim_names=("workers",))
    precision = MixedPrecisionPolicy(
        param_dtype=policy.dtype if policy.gathers_rounded else None,
        reduce_dtype=torch.float32,
        cast_forward_inputs=policy.gathers_rounded,
    )
    has_other_dtype = policy.adapter is not None and policy.dtype != torch.float32
    whole = set(policy.trained_parameters.values()) if has_other_dtype else set()
    for module in (*find_layers(policy.model), policy.token_model):
        fully_shard(module, mesh=mesh, mp_policy=precision, ignored_params=whole)
    for module in policy.token_model.modules():
        if isinstance(module, FSDPModule):
            # The loss is divided by the whole batch's pairs, so gradients are summed, not averaged.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
            # Without this, an expert that gets no tokens on one worker makes the others hang.
            module.set_reduce_scatter_unused_params(True)
    return replace(policy, trained_parameters=list_trained(policy.model))


def holds_shards(policy: Policy) -> bool:
    """Whether this worker needs the others to compute a forward pass."""
    return isinstance(policy.token_model, FSDPModule)


def is_sharded(parameters: Mapping[str, nn.Parameter]) -> bool:
    """Whether this worker holds only some rows of the parameters."""
    return any(isinstance(parameter, DTensor) for parameter in parameters.values())


def own_rows(tensor: Tensor) -> Tensor:
    """Return a view of the rows that this worker holds: all rows of an unsharded tensor."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


def own_range(tensor: Tensor) -> range:
    """Return the indices of the rows that this worker holds: ceil(rows / workers) of them."""
    num_rows = tensor.shape[0] if tensor.ndim else 1
    if not isinstance(tensor, DTensor):
        return range(num_rows)
    num_each = -(-num_rows // tensor.device_mesh.size())
    first = min(tensor.device_mesh.get_local_rank() * num_each, num_rows)
    return range(first, min(first + num_each, num_rows))


@torch.no_grad()
def gather_rows(policy: Policy, *, into: Policy | None) -> None:
    """Gather the trained parameters of a policy, one at a time, into a whole policy.

    If it is sharded, every worker must call this; workers that need no result pass None.
    """
    for name, parameter in policy.trained_parameters.items():
        whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        if into is not None:
            into.trained_parameters[name].copy_(whole)


def free_gathered(policy: Policy) -> None:
    """Free gathered parameters, so that the next forward pass gathers the rows as they are now.

    Parameters outside the layers stay gathered after a forward pass without a backward pass, as an
    evaluation is. Rows that are then loaded from a checkpoint would not be seen.
    """
    for module in policy.token_model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def discard_pass(policy: Policy) -> None:
    """Discard a forward or backward pass that an exception ended, so that the next starts clean."""
    if isinstance(policy.token_model, FSDPModule):
        policy.token_model.reset_iter_state()


def clip_gradients(parameters: Iterable[nn.Parameter], *, max_norm: float) -> float:
    """Scale all gradients so that their global norm is at most max_norm; return the old norm."""
    parameters = list(parameters)
    norm = gradient_norm(parameters)
    torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, torch.as_tensor(norm))
    return norm


def gradient_norm(parameters: Iterable[nn.Parameter]) -> float:
    """Compute the global norm of all gradients, over the rows of all workers if sharded."""
    norm = torch.nn.utils.get_total_norm(p.grad for p in parameters if p.grad is not None)
    return float((norm.full_tensor() if isinstance(norm, DTensor) else norm).item())
