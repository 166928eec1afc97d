"""What is left of a module that is spread over processes, spread again as that one is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import Placement

from fxprune.borrowing import Loans
from fxprune.communication import communicating
from fxprune.graph.masks import masked_views
from fxprune.graph.names import tensors_of
from fxprune.graph.reparametrizations import computed_from
from fxprune.graph.spread_modules import filled, reference_of
from fxprune.graph.traced import TracedModule
from fxprune.sharding import is_managed, is_sharded, sent, spread, spread_by_hand
from fxprune.torch_internals import sharding_options

_Spread = tuple[DeviceMesh, Sequence[Placement]]


def sources_of(traced: TracedModule) -> dict[str, nn.Parameter]:
    """The parameters of a module, masked ones under the names that they have without a mask, as in what is left."""
    plain = {own.original_name: own.name for own in masked_views(traced) if own.original is not None}
    parameters = traced.named_parameters(remove_duplicate=False)
    return {plain.get(name, name): parameter for name, parameter in parameters}


def spread_alike(
    hollow: TracedModule, traced: TracedModule, values: Mapping[str, Tensor] | None, numbers: Mapping[str, int],
    loans: Loans,
) -> TracedModule:  # fmt: skip
    """A module without values, spread as another one is, with the values that the first process has; a collective.

    Args:
        hollow: on the device "meta", alike on every process; used up.
        traced: the other one, of which it is what `finalize` leaves.
        values: by name; looked at on the first process alone.
        numbers: of those that processes hold parts of already.
        loans: where these are.
    """
    first = reference_of(traced)
    assert first is not None
    with communicating("sharding what is left", sends=False):
        _distribute(hollow, traced)
        if is_managed(traced):
            fully_shard(hollow, ignored_params=_ignored(hollow, traced), **sharding_options(traced))
    names = {id(tensor): name for name, tensor in reversed(tensors_of(hollow).items())}

    def value_of(tensor: Tensor) -> Tensor:
        reference = tensor if is_sharded(tensor) else torch.empty_like(tensor, device=first.device)
        name = names[id(tensor)]
        if name in numbers:
            return spread(loans.part(numbers[name]), reference)
        return sent(None if values is None else values[name], reference)

    return filled(hollow, value_of)


def _distribute(hollow: TracedModule, traced: TracedModule) -> None:
    """Spread every parameter as that it comes from, by hand, which FSDP may shard again; new ones as copies."""
    before: dict[int, _Spread] = {id(own): (mesh, ways) for own, mesh, ways in spread_by_hand(traced)}
    if not before:
        return
    sources, made = sources_of(traced), dict[int, nn.Parameter]()
    for name, parameter in hollow.named_parameters(remove_duplicate=False):
        origins = [name] if name in sources else computed_from(sources, name)
        origin = sources[origins[-1]] if origins else None  # of a norm the last one has the shape
        if id(parameter) in made or (origin is not None and id(origin) not in before):  # which was plain
            continue
        mesh, placements = next(iter(before.values())) if origin is None else before[id(origin)]
        if origin is None or not _fits(parameter.shape, mesh, placements, is_managed(traced)):
            placements = [Replicate()] * mesh.ndim
        value = distribute_tensor(parameter.detach(), mesh, placements, src_data_rank=None)
        made[id(parameter)] = nn.Parameter(value, parameter.requires_grad)
    for module in hollow.modules():
        for name, own in module._parameters.items():
            if own is not None:
                module._parameters[name] = made.get(id(own), own)


def _ignored(hollow: TracedModule, traced: TracedModule) -> set[nn.Parameter]:
    """Parameters that come from such as FSDP was to leave alone."""
    plain = {name for name, source in sources_of(traced).items() if not is_sharded(source)}
    return {own for name, own in hollow.named_parameters(remove_duplicate=False) if name in plain}


def _fits(shape: torch.Size, mesh: DeviceMesh, placements: Sequence[Placement], is_managed: bool) -> bool:
    """Whether a tensor can be cut so; FSDP needs something of it on every process of the mesh."""
    for axis, placement in enumerate(placements):
        if isinstance(placement, Shard):
            if placement.dim >= len(shape):
                return False
            size, count = shape[placement.dim], mesh.size(axis)
            if is_managed and size and -(-size // -(-size // count)) < count:
                return False
    return True
