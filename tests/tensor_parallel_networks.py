"""Other ways to spread weights than FSDP2 alone, and what layers give that are trained and finalized so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import DataParallelMeshDims, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import fxprune
from tests import sharded_networks as networks


def by_hand(module: fxprune.TracedModule) -> fxprune.TracedModule:
    """DTensors on a mesh of two dimensions, without FSDP: parts of rows, of which each has some of the columns."""
    networks.distribute(
        module, networks.data_and_tensor(), lambda _, own: [Shard(0), Shard(1) if own.dim() > 1 else Replicate()]
    )
    return module


def by_partly_tensor_parallel(module: fxprune.TracedModule) -> fxprune.TracedModule:
    """As torch's styles do it: two layers are tensor-parallel, one by columns and one by rows, all else is FSDP2's."""
    mesh = networks.data_and_tensor()
    ways = {"inner.weight": [Shard(0)], "inner.bias": [Shard(0)], "head.weight": [Shard(1)]}
    networks.distribute(module, mesh["tensor"], lambda name, _: ways.get(name.removesuffix("_orig")))
    fully_shard(module, mesh=mesh["data"])
    return module


def _cut_layers(module: fxprune.TracedModule, mesh: DeviceMesh) -> None:
    """One layer by its rows, and the one that reads it by its columns."""
    ways = {"1.weight": [Shard(0)], "1.bias": [Shard(0)], "3.weight": [Shard(1)]}
    networks.distribute(module, mesh, lambda name, _: ways.get(name))


def by_layers(module: fxprune.TracedModule) -> fxprune.TracedModule:
    """The same over two axes; all else is FSDP2's alone."""
    mesh = networks.data_and_tensor()
    _cut_layers(module, mesh["tensor"])
    fully_shard(module, mesh=mesh["data"])
    return module


def by_four(module: fxprune.TracedModule) -> fxprune.TracedModule:
    """Layers that four processes have parts of, one by columns and one by rows."""
    mesh = init_device_mesh("cpu", (1, dist.get_world_size()), mesh_dim_names=("data", "tensor"))
    _cut_layers(module, mesh["tensor"])
    fully_shard(module, mesh=mesh["data"])
    return module


def by_named_axes(module: fxprune.TracedModule) -> fxprune.TracedModule:
    """DTensors on a whole mesh, of which FSDP2 shards over an axis that it is told by its name."""
    mesh = networks.data_and_tensor()
    networks.distribute(module, mesh, lambda name, _: [Replicate(), Shard(1 if name == "3.weight" else 0)])
    fully_shard(module, mesh=mesh, dp_mesh_dims=DataParallelMeshDims(shard="data"), reshard_after_forward=True)
    return module


def by_copies_of_shards(module: fxprune.TracedModule) -> fxprune.TracedModule:
    """Tensor-parallel layers, of which there are copies: three axes."""
    mesh = init_device_mesh("cpu", (dist.get_world_size() // 2, 1, 2), mesh_dim_names=("copy", "data", "tensor"))
    _cut_layers(module, mesh["tensor"])
    fully_shard(module, mesh=mesh["copy", "data"])
    return module


def layers_over_tensor_parallel(
    spread: Callable[[fxprune.TracedModule], fxprune.TracedModule],
    *,
    as_dtensors: bool = False,
    amount: float = 0.4,
    groups: int = 1,
) -> dict[str, Any]:
    """Layers before and after `finalize`, each trained a step, and how a weight of what is left is cut.

    Args:
        spread: into tensor-parallel weights; or `networks.plain`.
        as_dtensors: whether the inputs are DTensors, so that the operators are, too.
        amount: of the channels that go.
        groups: of processes, each of which has a part of the batch.
    """
    torch.manual_seed(0)
    x = torch.randn(4, 6)
    own = x.chunk(groups)[dist.get_rank() * groups // dist.get_world_size()] if dist.is_initialized() else x
    layers = nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 10), nn.GELU(), nn.Linear(10, 6))
    module = spread(fxprune.trace(layers.train(), (x,)))
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    clip = fxprune.clip_gradients(optimizer, max_norm=0.5)
    fxprune.prune.channels(module, amount, round_to=1)
    _step(module, optimizer, own, as_dtensors)
    final = fxprune.finalize(module, align=1).train()
    optimizer = fxprune.optimizer_after(final, optimizer)
    _step(final, optimizer, own, as_dtensors)
    weight = final.get_parameter("1.weight")
    return {
        "trained": networks.values(module) | {"norm": clip.total_norm},
        "final": networks.values(final),
        "cut": str(weight.placements) if isinstance(weight, DTensor) else "",
    }


def _step(module: fxprune.TracedModule, optimizer: torch.optim.Optimizer, x: torch.Tensor, as_dtensors: bool) -> None:
    if as_dtensors:
        x = distribute_tensor(x, networks.data_and_tensor()["tensor"], [Replicate()])
    found = module(x)
    assert isinstance(found, DTensor) == as_dtensors
    getattr(found, "full_tensor", lambda: found)().square().mean().backward()
    optimizer.step()


def over_unrelated_meshes() -> dict[str, str]:
    """What is raised where some of a module lies on processes that are no axis of the mesh of the rest."""
    module = networks.by_fsdp(networks.traced())
    pairs = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("one", "two"))["two"]
    weight = module.get_parameter("head.weight")
    assert isinstance(weight, DTensor)
    spread = distribute_tensor(weight.detach().full_tensor(), pairs, [Shard(0)])  # type: ignore[attr-defined]
    module.get_submodule("head")._parameters["weight"] = nn.Parameter(spread)
    return networks.failures(
        {
            "channels": lambda: fxprune.prune.channels(module, macs=0.5),
            "finalize": lambda: fxprune.finalize(module),
        }
    )
