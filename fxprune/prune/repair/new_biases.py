"""Biases made for layers that have none: a parameter under torch's name, which every graph reads."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence

import torch
from torch import Tensor, fx, nn

from fxprune import driver
from fxprune.channels.arguments import set_argument
from fxprune.channels.registry import REGISTRY
from fxprune.channels.rules.contractions import Contraction
from fxprune.channels.shapes import resized
from fxprune.errors import PruningError
from fxprune.graph.masks import masked_attributes, original_name, view
from fxprune.graph.names import join, locate
from fxprune.graph.traced import TracedModule
from fxprune.prune.repair.finding import find
from fxprune.prune.repair.layers import CellReader, ConvolutionReader, MatrixReader, Reader, RecurrentReader
from fxprune.sharding import whole


def biasable(traced: TracedModule, readers: Iterable[Reader]) -> frozenset[str]:
    """Of readers of the eval graph, the weights of those that have no bias and can get one in every graph."""
    others = [_by_weight(traced, graph) for mode, graph in traced.graphs.items() if mode != "eval"]
    holders = Counter(id(each) for module in traced.modules() for each in module._parameters.values())
    return frozenset(
        reader.name
        for reader in readers
        if _lacks_bias(reader)
        and reader.moving_mean is None
        and holders[id(view(traced, reader.name).original)] == 1  # a layer tied to another one has its own bias
        and all(reader.name in found and _lacks_bias(found[reader.name]) for found in others)
        and _free_name(traced, reader.name) is not None
    )


def make_biases(traced: TracedModule, values: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Give layers without a bias one, in every graph; outputs that are masked get a mask on it.

    Args:
        traced: the module, changed in place.
        values: by the weight of a layer that has no bias, its bias [outputs], or one number for all.

    Returns:
        The names of the biases.

    Raises:
        PruningError: a layer has no place for one; nothing has changed then.
    """
    if not values:
        return ()
    by_graph = [_by_weight(traced, graph) for graph in traced.graphs.values()]
    readers = {weight: [found[weight] for found in by_graph if weight in found] for weight in values}
    names = {weight: _free_name(traced, weight) if found else None for weight, found in readers.items()}
    for weight, found in readers.items():
        if names[weight] is None or not all(map(_lacks_bias, found)):
            raise PruningError(f"{weight!r} has no place for a bias, or has one. Give the model that was traced.")
    with torch.inference_mode(False):  # what is made trains on
        _make(traced, {str(name): (readers[weight], values[weight]) for weight, name in names.items()})
    made = {str(name): weight for weight, name in names.items()}
    traced.make({**traced.made_biases, **made})
    return tuple(made)


def _make(traced: TracedModule, biases: Mapping[str, tuple[Sequence[Reader], Tensor]]) -> None:
    """Register biases by name, and let the readers of every graph add them."""
    dead: dict[str, Tensor] = {}
    for name, (readers, value) in biases.items():
        first = readers[0]
        owner, attribute = locate(traced, name)
        like = view(traced, first.name).original
        assert like is not None
        value = value.to(like.device, like.dtype).expand(math.prod(first.sizes[:2]))
        owner.register_parameter(attribute, nn.Parameter(value.clone(), like.requires_grad))
        for node in (call.node for reader in readers for call in reader.calls):
            _read(node, name, len(value))
        alive = _alive(traced, first)
        if not bool(alive.all()):
            dead[name] = alive.to(like.dtype)
    traced.recompile()
    if dead:
        driver.insert_masks(traced, dead)


def _by_weight(traced: TracedModule, graph: fx.Graph) -> dict[str, Reader]:
    return {reader.name: reader for reader in find(traced, graph)[0]}


def _lacks_bias(reader: Reader) -> bool:
    is_plain = not isinstance(reader, RecurrentReader | CellReader)
    has_place = isinstance(reader, MatrixReader | ConvolutionReader) and is_plain
    return has_place and reader.biases == (None,)


def _free_name(traced: TracedModule, weight: str) -> str | None:
    """The name that torch gives to the bias of a layer; None where something else is called so."""
    owner, attribute = locate(traced, weight)
    name = attribute.replace("weight", "bias") if "weight" in attribute else f"{attribute}_bias"
    held: Collection[str] = [
        *(each for each, value in (*owner._parameters.items(), *owner._buffers.items()) if value is not None),
        *owner._modules, *masked_attributes(owner),
    ]  # fmt: skip
    return None if name in held or original_name(name) in held else join(weight.rpartition(".")[0], name)


def _read(node: fx.Node, name: str, size: int) -> None:
    """Let a call add a bias."""
    graph = node.graph
    with graph.inserting_before(node):
        read = graph.get_attr(name)
    read.meta["val"] = resized(node.meta["val"], (size,))
    call = REGISTRY.call(node)
    argument = call.bias_argument if isinstance(call, Contraction) else "bias"
    if argument is not None:
        set_argument(node, argument, read)
        return
    with graph.inserting_after(node):  # the outputs of a product are its last axis
        total = graph.call_function(torch.ops.aten.add.Tensor, (node, read))
    total.meta = dict(node.meta)
    node.replace_all_uses_with(total, delete_user_cb=lambda user: user is not total)


def _alive(traced: TracedModule, reader: Reader) -> Tensor:
    """[outputs], which of them have a weight."""
    found = [view(traced, name) for name in reader.weights]
    masks = [torch.ones(each.shape) if each.mask is None else whole(each.mask) for each in found]
    return (reader.table(masks) != 0).any(-1).flatten()
