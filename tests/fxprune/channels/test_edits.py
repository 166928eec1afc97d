"""Edits are data: they print, and set arguments to what is kept."""

from __future__ import annotations

import operator

import numpy as np
import torch
from torch import fx

from fxprune.channels.arguments import bound, set_argument
from fxprune.channels.axes import Axis, Factor
from fxprune.channels.edits import Count, Extent, Kept, ReplaceCall, SetArguments
from fxprune.channels.ids import Ids, Mask

aten = torch.ops.aten


def kept_of(ids: Ids, alive: list[bool]) -> Kept:
    mask: Mask = np.array(alive)
    return Kept(ids.solve(), mask)


def call(target: object, *args: object, **kwargs: object) -> fx.Node:
    graph = fx.Graph()
    x = graph.placeholder("x")
    return graph.call_function(target, (x, *args), kwargs)  # type: ignore[arg-type]


def test_arguments_are_bound_by_the_names_of_the_schema_with_its_defaults() -> None:
    node = call(aten.slice.Tensor, 1, end=5)
    assert bound(node) == {"self": node.args[0], "dim": 1, "start": None, "end": 5, "step": 1}


def test_an_argument_is_set_where_it_stands_behind_the_last_or_by_name() -> None:
    node = call(aten.slice.Tensor, 1, end=5)
    set_argument(node, "dim", 2)
    set_argument(node, "start", 3)
    set_argument(node, "end", 4)
    set_argument(node, "step", 2)
    assert (node.args[1:], dict(node.kwargs)) == ((2, 3), {"end": 4, "step": 2})


def test_counts_become_numbers() -> None:
    ids = Ids()
    channels = ids.fresh(6)
    node = call(aten.slice.Tensor, 1, 2, 6)
    edit = SetArguments(node, {"start": Count(channels[:2]), "end": Count(channels)})
    assert str(edit) == "slice_tensor: start = kept of 2, end = kept of 6"
    edit.apply(kept_of(ids, [True, False, True, True, False, True]))
    assert node.args[1:] == (1, 1, 4)


def test_a_call_is_replaced_with_lists_of_counts() -> None:
    ids = Ids()
    first, second = ids.fresh(2), ids.fresh(3)
    node = call(aten.chunk.default, 2, 1)
    edit = ReplaceCall(node, aten.split_with_sizes.default, (node.args[0], [Count(first), Count(second)], 1))
    edit.apply(kept_of(ids, [True, False, True, True, False]))
    assert node.target is aten.split_with_sizes.default
    assert node.args[1:] == ([1, 2], 1)


def test_an_extent_scales_numbers_leaves_minus_one_and_computes_with_symbols() -> None:
    ids = Ids()
    heads = ids.fresh(4)
    axis = Axis((Factor(4, heads), Factor(8)))
    kept = kept_of(ids, [True, False, True, True])
    node = call(aten.view.default, [32, -1])
    assert Extent(32, axis).resolve(kept, node) == 24
    assert Extent(-1, axis).resolve(kept, node) == -1
    size = node.graph.placeholder("size")
    size.meta["val"] = 64
    result = Extent(size, axis).resolve(kept, node)
    assert result.target is operator.floordiv
    assert result.meta["val"] == 48


def test_groups_stay_where_an_input_or_an_output_does() -> None:
    ids = Ids()
    inputs, outputs = ids.fresh(6).reshape(3, 2), ids.fresh(3).reshape(3, 1)
    node = call(aten.conv2d.default)
    dead_in_both, alive_in_inputs = [False, False], [False, True]
    alive = [*dead_in_both, *alive_in_inputs, *dead_in_both, False, False, True]
    groups = Count(np.concatenate([inputs, outputs], axis=1))
    assert str(groups) == "kept of 3 groups"
    assert groups.resolve(kept_of(ids, alive), node) == 2
