"""Axes of which a class says the sizes with the same numbers: they keep equally many channels."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn

from fxprune.channels.axes import Axis
from fxprune.channels.groups import Grouping
from fxprune.channels.ids import Vector
from fxprune.channels.values import Value
from fxprune.channels.walk import Walk
from fxprune.graph.interpretation import run
from fxprune.graph.names import tensor_at, tensors_of
from fxprune.graph.said_sizes import Origin, SaidSize, SaidSizes, said_sizes


@dataclass
class AlikeSizes:
    """What a class needs for what it says of sizes.

    Attributes:
        rows: the classes of axes that keep equally many channels, [axes, n].
        heads: of such axes that hold channels of several heads, the classes of these, which then all stay.
    """

    rows: list[Vector] = field(default_factory=list)
    heads: list[Vector] = field(default_factory=list)


def alike_sizes(grouping: Grouping, model: nn.Module) -> AlikeSizes:
    """The axes that one attribute sizes, or that the size of another axis does.

    Which number a class writes where is found by a run of it; the axes are those of the same values in the graph.

    Args:
        grouping: of the model's graphs.
        model: that was traced.
    """
    found = AlikeSizes()
    plain = grouping.plain
    inputs = (plain.example_args, plain.example_kwargs)
    said = said_sizes(_with_tensors_of(plain, model), inputs)
    if not said.axes:
        return found
    walk = grouping.found.walks["eval"]
    nodes = _nodes(walk.graph, plain, inputs, [size.tensor for size in said.axes] + list(said.tensors.values()))
    for same in _by_origin(said):
        axes = [axis for size in same if (axis := _axis(walk, nodes.get(id(size.tensor)), size)) is not None]
        distinct = {ids.tobytes(): ids for axis in axes if (ids := _classes(grouping, walk, axis)) is not None}
        if len(distinct) > 1 and len({len(ids) for ids in distinct.values()}) == 1:
            found.rows.append(np.stack(list(distinct.values())))
            heads = (axis.ids for axis in axes if len(axis) == 2)
            found.heads += [grouping.found.of(ids) for ids in heads if ids is not None]
    return found


def _with_tensors_of(plain: nn.Module, model: nn.Module) -> nn.Module:
    """A copy of a model in eval mode, with the values of what was traced, masks included."""
    copied = copy.deepcopy(model).eval()
    now = tensors_of(plain)
    for name, tensor in tensors_of(copied).items():
        if name in now and now[name].shape == tensor.shape:
            tensor.data = now[name].detach().clone()
    return copied


def _by_origin(said: SaidSizes) -> Iterable[list[SaidSize]]:
    """Sizes that are the same by what they were computed from, each with the axis that is read, if it is one's size."""
    found: dict[Origin, list[SaidSize]] = {}
    for size in said.axes:
        found.setdefault(size.origin, []).append(size)
    for origin, sizes in found.items():
        if origin[0] == "size":
            sizes.append(SaidSize(said.tensors[origin[1]], origin[2], origin))
    return [sizes for sizes in found.values() if len(sizes) > 1]


def _nodes(graph: fx.Graph, plain: nn.Module, inputs: Any, wanted: list[Tensor]) -> dict[int, fx.Node]:
    """By the identity of a tensor, the first node that has its value."""
    by_shape: dict[torch.Size, list[Tensor]] = {}
    for tensor in wanted:
        by_shape.setdefault(tensor.shape, []).append(tensor)
    found: dict[int, fx.Node] = {}

    def watch(node: fx.Node, value: Any) -> None:
        for tensor in by_shape.get(value.shape, []) if isinstance(value, Tensor) else []:
            if id(tensor) not in found and torch.equal(tensor, value):
                found[id(tensor)] = node

    run(graph, lambda name: tensor_at(plain, name), pytree.tree_leaves(inputs), None, watch)
    return found


def _axis(walk: Walk, node: fx.Node | None, size: SaidSize) -> Axis | None:
    value = None if node is None else walk.env.get(node)
    return value.axes[size.axis] if isinstance(value, Value) else None


def _classes(grouping: Grouping, walk: Walk, axis: Axis) -> Vector | None:
    """The classes of an axis, of one factor or of heads and the channels in each; None where it carries none."""
    vectors = [factor.ids for factor in axis]
    if not 0 < len(vectors) < 3 or any(ids is None for ids in vectors):
        return None
    ids: Any = vectors[0] if len(vectors) == 1 else walk.ids.product(*vectors)  # type: ignore[arg-type]
    return (
        None if ids.max() >= len(grouping.found.classes.of) else grouping.found.of(ids)
    )  # else nothing reads it whole
