"""Channels that come back as zeros: the ways that are worth trying, and taking back as blocks that can be undone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.artifacts.working_copy import WorkingCopy
from fxprune.artifacts.zero_channels import Channels, ZeroChannels, ways_to_fill_up

# an attention of four heads of four channels: two channels of each head are left of queries and keys, three of values
QUERIES, VALUES = [0, 1, 4, 5, 8, 9, 12, 13], [0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14]
SHAPES = {"a.query.weight": (16, 12), "a.key.weight": (16, 12), "a.value.weight": (16, 12), "a.out.weight": (12, 16)}


def kept(**axes: Any) -> Channels:
    return {f"a.{name}.weight": {axis: torch.tensor(list(there))} for name, (axis, there) in axes.items()}


def listed(channels: Channels) -> dict[str, dict[int, list[int]]]:
    return {name: {axis: there.tolist() for axis, there in axes.items()} for name, axes in channels.items()}


ATTENTION = kept(query=(0, QUERIES), key=(0, QUERIES), value=(0, VALUES), out=(1, VALUES))


def test_heads_get_one_size_then_are_as_they_were_then_everything_comes_back() -> None:
    ways = [listed(way) for way in ways_to_fill_up("a", ATTENTION, SHAPES, [4])]
    assert len(ways) == 3
    assert ways[0] == {  # three channels a head, as values have
        "a.query.weight": {0: [0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14]}, "a.key.weight": {0: VALUES},
        "a.value.weight": {0: VALUES}, "a.out.weight": {1: VALUES},
    }  # fmt: skip
    everything = list(range(16))
    for way in ways[1:]:
        assert {name: list(axes.values()) for name, axes in way.items()} == {name: [everything] for name in SHAPES}


def test_a_head_that_left_every_layer_stays_away() -> None:
    there = [i for i in QUERIES if i < 12], [i for i in VALUES if i < 12]
    three_heads = kept(query=(0, there[0]), key=(0, there[0]), value=(0, there[1]), out=(1, there[1]))
    first, as_they_were, everything = ways_to_fill_up("a", three_heads, SHAPES, [4])
    assert listed(first)["a.query.weight"] == {0: there[1]}
    assert listed(as_they_were)["a.query.weight"] == {0: list(range(12))}
    assert listed(everything)["a.query.weight"] == {0: list(range(16))}


def test_sizes_that_divide_no_layer_give_no_way_of_their_own() -> None:
    ways = list(ways_to_fill_up("a", ATTENTION, SHAPES, [5, 16, 32]))
    assert len(ways) == 1  # everything


def test_channels_go_back_within_a_module_and_its_siblings_alone() -> None:
    outside: Channels = {name: {0: torch.tensor([0, 1])} for name in ("m.b.inner.weight", "last.weight")}
    shapes = SHAPES | {"m.b.inner.weight": (16, 16), "last.weight": (16, 16)}
    for path in ("m.b.inner", "m.b", "c"):  # the last layer has the same channels, and is elsewhere
        assert not list(ways_to_fill_up(path, ATTENTION | outside, shapes, [4]))
    ways = list(ways_to_fill_up("a.query", ATTENTION | outside, shapes, [4]))
    assert ways
    assert not any(outside.keys() & way.keys() for way in ways)
    assert list(ways_to_fill_up("m", outside, shapes, []))  # to the root's other children it may


def test_nothing_was_removed_so_nothing_comes_back() -> None:
    assert not list(ways_to_fill_up("a", kept(query=(0, range(16))), SHAPES, [4]))


# ---- taking back


@pytest.fixture
def zeros() -> ZeroChannels:
    """A copy of an MLP whose inner channels 0 and 3 went."""
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    traced = fxprune.trace(model, (torch.randn(2, 3),), modes=("eval",))
    for name in ("0.weight", "0.bias"):
        mask = torch.ones_like(traced.get_parameter(name))
        mask[[0, 3]] = 0
        fxprune.prune.custom_from_mask(traced, name, mask)
    copy = WorkingCopy(model, fxprune.finalize(traced, align=1))
    for name, parameter in copy.final.named_parameters():
        model.get_parameter(name).data = parameter.data.clone()
    return ZeroChannels(copy)


def state(zeros: ZeroChannels) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in zeros.copy.root.state_dict().items()}


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return all(torch.equal(left[name], right[name]) for name in left)


ALL: Channels = {"0.weight": {0: torch.arange(4)}, "0.bias": {0: torch.arange(4)}, "2.weight": {1: torch.arange(4)}}
THREE: Channels = {n: {axis: torch.arange(3) for axis in axes} for n, axes in ALL.items()}


def test_what_is_taken_back_is_zero_and_goes_at_the_end(zeros: ZeroChannels) -> None:
    root, before, x = zeros.copy.root, state(zeros), torch.randn(5, 3)
    outputs = root(x)
    with torch.no_grad(), zeros.taken_back(ALL):
        assert root[0].weight.shape == (4, 3)
        assert torch.equal(root[0].weight[1:3], before["0.weight"])
        assert not root[0].weight[[0, 3]].any()
        assert (root[0].out_features, root[2].in_features) == (4, 4)
        torch.testing.assert_close(root(x), outputs)
    assert same(state(zeros), before)
    assert (root[0].out_features, root[2].in_features) == (2, 2)


def test_it_goes_after_an_error_too(zeros: ZeroChannels) -> None:
    before = state(zeros)
    with pytest.raises(ZeroDivisionError), zeros.taken_back(THREE), zeros.taken_back(ALL):
        raise ZeroDivisionError
    assert same(state(zeros), before)


def test_what_is_kept_inside_stays_with_what_is_kept_around_it(zeros: ZeroChannels) -> None:
    root, before = zeros.copy.root, state(zeros)
    with zeros.taken_back(THREE) as outer:
        with zeros.taken_back(ALL) as inner:
            inner.keep()
        assert len(root[0].weight) == 4
    assert same(state(zeros), before)  # the outer block was not kept
    with zeros.taken_back(THREE) as outer:
        with zeros.taken_back(ALL) as inner:
            inner.keep()
        outer.keep()
    assert len(root[0].weight) == 4
    assert zeros.kept["0.weight"][0].tolist() == [0, 1, 2, 3]
    zeros.give_up()
    assert same(state(zeros), before)
    assert zeros.kept["0.weight"][0].tolist() == [1, 2]


def test_layers_that_lost_the_same_are_told_apart_by_the_numbers_of_their_channels() -> None:
    there: Channels = {
        name: {axis: torch.tensor([0, 1])}
        for name, axis in (("a.in.weight", 0), ("a.out.weight", 1), ("m.b.in.weight", 0), ("a.norm.weight", 0))
    }
    shapes: dict[str, tuple[int, ...]] = {name: (4, 4) for name in there} | {"a.norm.weight": (4,)}
    ways = [listed(way) for way in ways_to_fill_up("a", there, shapes, [])]
    assert all("m.b.in.weight" in way for way in ways)
    numbers = {("a.in.weight", 0): 0, ("a.out.weight", 1): 0, ("m.b.in.weight", 0): 1}  # the norm left the graph
    everything = [listed(way) for way in ways_to_fill_up("a", there, shapes, [], numbers)][-1]
    assert everything == {
        "a.in.weight": {0: [0, 1, 2, 3]},
        "a.out.weight": {1: [0, 1, 2, 3]},
        "a.norm.weight": {0: [0, 1, 2, 3]},
    }
