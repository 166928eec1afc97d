"""Calls of modules whose parameters and buffers are spread over processes: what a graph reads of them meanwhile.

FSDP gathers its shards before a call. What is a DTensor still was spread before that, as by tensor parallel. Where the
inputs are plain, it comes whole for the call, and its gradient goes back in parts; where they are DTensors, it stays as
it is, and what is plain counts as copies: the operators are those of `torch.distributed.tensor` then.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from torch.distributed.tensor.experimental import implicit_replication

from fxprune.communication import communicating
from fxprune.sharding import is_managed
from fxprune.torch_internals import dtype_of_calls, spread_before


def is_spread_by_hand(module: nn.Module) -> bool:
    """Whether FSDP does not manage a module of which parameters are spread."""
    if torch.compiler.is_compiling() or not (dist.is_available() and dist.is_initialized()):
        return False
    return any(isinstance(parameter, DTensor) for parameter in module.parameters())


@contextlib.contextmanager
def gathered(
    module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], is_mask: Callable[[str], bool]
) -> Iterator[None]:
    """Within a call, parameters and buffers that the operators can work on; a collective where they are spread.

    Masks have the dtype to which FSDP's mixed precision brings parameters: their products have that, too.

    Args:
        module: one that FSDP manages, its parameters gathered, or one whose parameters are spread by hand.
        args, kwargs: of the call.
        is_mask: whether a buffer is one, by the name that its module has for it.
    """
    dtype = dtype_of_calls(module) if is_managed(module) else None
    inputs = (each for each in pytree.tree_leaves((args, kwargs)) if isinstance(each, DTensor))
    mesh = next((each.device_mesh for each in inputs), None)
    before: list[tuple[dict[str, Any], str, Tensor]] = []
    made: dict[int, Tensor] = {}
    try:
        for owner in module.modules():
            held: Any
            for held in (owner._parameters, owner._buffers):
                for name, tensor in held.items():
                    is_cast = dtype is not None and held is owner._buffers and is_mask(name)
                    if tensor is None or (mesh is None and not isinstance(tensor, DTensor) and not is_cast):
                        continue
                    if id(tensor) not in made:
                        with communicating("gathering for a call"):
                            found = _whole(tensor) if mesh is None else _on(mesh, module, tensor)
                        made[id(tensor)] = found.to(dtype) if is_cast and found.is_floating_point() else found
                    before.append((held, name, tensor))
                    held[name] = made[id(tensor)]
        with contextlib.nullcontext() if mesh is None else implicit_replication():
            yield
    finally:
        for held, name, tensor in before:
            held[name] = tensor


def note_mixed_precision(error: RuntimeError, module: nn.Module, graph: fx.Graph) -> None:
    """Add to what a call raised that the graph has another dtype written into it than FSDP computes in, if so."""
    computed = dtype_of_calls(module) if is_managed(module) else None
    if computed is None:
        return
    for node in graph.nodes:
        for leaf in pytree.tree_leaves((node.args, node.kwargs)):
            if isinstance(leaf, torch.dtype) and leaf.is_floating_point and leaf != computed:
                error.add_note(
                    f"FSDP's mixed precision brings parameters and inputs to {computed}, and node {node.format_node()} "
                    f"has {leaf} written into the graph, as it was captured. Call the module under torch.autocast in "
                    f"place of the policy, or trace the model in {computed}."
                )
                return


def _whole(tensor: Tensor) -> Tensor:
    """All of a tensor; the gradient of it is the same on every process that has a part."""
    if not isinstance(tensor, DTensor):
        return tensor
    found: Tensor = tensor.full_tensor()
    return found


def _on(mesh: DeviceMesh, module: nn.Module, tensor: Tensor) -> Tensor:
    """A tensor over a mesh: a mask as the parameter that it is for, and what is plain as copies, of the same memory."""
    if isinstance(tensor, DTensor) and not isinstance(tensor, nn.Parameter):
        tensor = _gathered_like(module, tensor)
    if isinstance(tensor, DTensor):
        return tensor
    return DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim, run_check=False)


def _gathered_like(module: nn.Module, mask: DTensor) -> Tensor:
    """A mask as FSDP gathers for a call what it is for: as that was before it was sharded; else as it is."""
    for own, spec in spread_before(module):
        if (own.device_mesh, own.placements) == (mask.device_mesh, mask.placements):  # type: ignore[attr-defined]
            return distribute_tensor(_whole(mask), spec.mesh, spec.placements, src_data_rank=None)
    return _whole(mask) if is_managed(module) else mask
