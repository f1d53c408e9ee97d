"""How do workers share a policy that is too large for each of them? By FSDP2: a part of rows each.

Every worker keeps some rows of each parameter, of its gradient and of its optimizer state. The rest
is fetched from the others when a layer computes, and dropped after it (Zhao et al. 2023,
arXiv:2304.11277). A sharded parameter is a DTensor; what it is as a whole is asked here.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from stages.train.policy import Policy, list_trained
from stages.train.world import World


def shard_policy(policy: Policy, world: World) -> Policy:
    """Leave to each worker its rows of every parameter; alone, a worker keeps the whole.

    A layer of the model is fetched at a time. What stands outside of the layers (embeddings, last
    norm, output layer) is whole from the forward to the end of the backward pass. Weights travel in
    float32 and autocast rounds them afterwards, as it does where they are not sharded: fetched in
    bfloat16, norms would meet float32 inputs, which LayerNorm refuses.

    Args:
        policy: the same on every worker. Its `model` is sharded in place.
    """
    if world.size == 1:
        return policy
    mesh = init_device_mesh(world.device.type, (world.size,), mesh_dim_names=("workers",))
    keeps_dtypes = MixedPrecisionPolicy(cast_forward_inputs=False)
    for layer in find_layers(policy.model, policy.model._no_split_modules or ()):
        fully_shard(layer, mesh=mesh, mp_policy=keeps_dtypes)
    fully_shard(policy.token_model, mesh=mesh, mp_policy=keeps_dtypes)
    for module in policy.token_model.modules():
        if isinstance(module, FSDPModule):
            # The loss is divided by the pairs of the whole batch: gradients are sums, not means.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
            # Else an expert without tokens on one worker would make the others wait for ever.
            module.set_reduce_scatter_unused_params(True)
    return replace(
        policy, trained_parameters=list_trained(policy.model), keeps_rounded_weights=False
    )


def find_layers(module: nn.Module, names: Collection[str]) -> list[nn.Module]:
    """Find the outermost modules of the classes that an architecture says are not to be split."""
    if type(module).__name__ in names:
        return [module]
    return [layer for child in module.children() for layer in find_layers(child, names)]


def is_sharded(parameters: Mapping[str, nn.Parameter]) -> bool:
    """Whether this worker holds only some rows of the parameters."""
    return any(isinstance(parameter, DTensor) for parameter in parameters.values())


def own_rows(tensor: Tensor) -> Tensor:
    """Give the rows that this worker holds, as a view; of an unsharded tensor all of them."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


def own_range(tensor: Tensor) -> range:
    """Give the numbers of the rows that this worker holds: ceil(rows / workers) each."""
    num_rows = tensor.shape[0] if tensor.ndim else 1
    if not isinstance(tensor, DTensor):
        return range(num_rows)
    num_each = -(-num_rows // tensor.device_mesh.size())
    first = min(tensor.device_mesh.get_local_rank() * num_each, num_rows)
    return range(first, min(first + num_each, num_rows))


@torch.no_grad()
def gather_rows(policy: Policy, *, into: Policy | None) -> None:
    """Put the parameters of a sharded policy together, one at a time, into a whole policy.

    Every worker has to call this; those that want no result give None.
    """
    for name, parameter in policy.trained_parameters.items():
        assert isinstance(parameter, DTensor)
        whole = parameter.full_tensor()
        if into is not None:
            into.trained_parameters[name].copy_(whole)


def clip_gradients(parameters: Iterable[nn.Parameter], *, max_norm: float) -> float:
    """Scale all gradients so that their common norm is at most max_norm; give it as it was."""
    parameters = list(parameters)
    norm = gradient_norm(parameters)
    torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, torch.as_tensor(norm))
    return norm


def gradient_norm(parameters: Iterable[nn.Parameter]) -> float:
    """Give the norm of all gradients together, over the rows of all workers where sharded."""
    norm = torch.nn.utils.get_total_norm(p.grad for p in parameters if p.grad is not None)
    return float((norm.full_tensor() if isinstance(norm, DTensor) else norm).item())
