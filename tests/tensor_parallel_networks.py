"""Other ways to spread weights than FSDP2 alone, and what layers give that are trained and finalized so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import fxprune
from tests import sharded_networks as networks


def by_hand(module: fxprune.TracedModule) -> fxprune.TracedModule:
    """DTensors on a mesh of two dimensions, without FSDP: parts of rows, of which each has some of the columns."""
    mesh = init_device_mesh("cpu", (dist.get_world_size() // 2, 2), mesh_dim_names=("data", "tensor"))
    for owner in module.modules():
        for name, parameter in list(owner._parameters.items()):
            assert parameter is not None
            placements = [Shard(0), Shard(1) if parameter.dim() > 1 else Replicate()]
            owner._parameters[name] = nn.Parameter(distribute_tensor(parameter.detach(), mesh, placements))
    return module


def by_partly_tensor_parallel(module: fxprune.TracedModule) -> fxprune.TracedModule:
    """As torch's styles do it: two layers are tensor-parallel, one by columns and one by rows, all else is FSDP2's."""
    mesh = init_device_mesh("cpu", (dist.get_world_size() // 2, 2), mesh_dim_names=("data", "tensor"))
    for name, placement in {"inner.weight": Shard(0), "inner.bias": Shard(0), "head.weight": Shard(1)}.items():
        owner, _, key = name.rpartition(".")
        parameter = distribute_tensor(module.get_parameter(name).detach(), mesh["tensor"], [placement])
        module.get_submodule(owner)._parameters[key] = nn.Parameter(parameter)
    fully_shard(module, mesh=mesh["data"])
    return module


def layers_over_tensor_parallel(
    spread: Callable[[fxprune.TracedModule], fxprune.TracedModule], as_dtensors: bool
) -> dict[str, Any]:
    """Layers before and after `finalize`, each trained a step, and how a weight of what is left is cut.

    Args:
        spread: into tensor-parallel weights; or `networks.plain`.
        as_dtensors: whether the inputs are DTensors, so that the operators are, too.
    """
    torch.manual_seed(0)
    x = torch.randn(4, 6)
    layers = nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 10), nn.GELU(), nn.Linear(10, 6))
    module = spread(fxprune.trace(layers.train(), (x,)))
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    clip = fxprune.clip_gradients(optimizer, max_norm=0.5)
    fxprune.prune.channels(module, 0.4, round_to=1)
    _step(module, optimizer, x, as_dtensors)
    final = fxprune.finalize(module, align=1).train()
    optimizer = fxprune.optimizer_after(final, optimizer)
    _step(final, optimizer, x, as_dtensors)
    weight = final.get_parameter("1.weight")
    return {
        "trained": networks.values(module) | {"norm": clip.total_norm},
        "final": networks.values(final),
        "cut": str(weight.placements) if isinstance(weight, DTensor) else "",
    }


def _step(module: fxprune.TracedModule, optimizer: torch.optim.Optimizer, x: torch.Tensor, as_dtensors: bool) -> None:
    if as_dtensors:
        mesh = init_device_mesh("cpu", (dist.get_world_size() // 2, 2), mesh_dim_names=("data", "tensor"))["tensor"]
        x = distribute_tensor(x, mesh, [Replicate()])
    found = module(x)
    assert isinstance(found, DTensor) == as_dtensors
    getattr(found, "full_tensor", lambda: found)().square().mean().backward()
    optimizer.step()
