"""Integers that may follow from a size: which ones there are, and the values to try, without a model being run."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fxprune.artifacts.slots import Slot, candidates, combinations, derived, slots_by_module


class Config:
    def __init__(self) -> None:
        self.width, self.name, self.dropout = 8, "net", 0.5


class Block(nn.Module):
    def __init__(self, private: Any, shared: Any) -> None:
        super().__init__()
        self.heads, self.sizes, self.strides, self.is_on = 4, (16, 8), [1, 2], True
        self.private, self.shared, self.layer = private, shared, nn.Identity()
        self.activation, self.mixed = torch.relu, (3, "x", 2.0)


def test_integers_of_modules_and_of_what_they_alone_hold_are_slots() -> None:
    shared = Config()
    root = nn.Sequential(Block(Config(), shared), Block(Config(), shared))
    found = [
        (type(slot.holder).__name__, slot.name, slot.entry, slot.before) for slot in slots_by_module(root)[root[0]]
    ]
    assert found == [
        ("Block", "heads", None, 4), ("Block", "sizes", 0, 16), ("Block", "sizes", 1, 8), ("Block", "strides", 0, 1),
        ("Block", "strides", 1, 2), ("Block", "mixed", 0, 3), ("Config", "width", None, 8),
    ]  # fmt: skip


@pytest.mark.parametrize("kind", [tuple, list])
def test_an_entry_is_written_into_a_new_container(kind: type) -> None:
    holder = Config()
    holder.sizes = before = kind((16, 8))
    slot = Slot(holder, "sizes", 1, 8)
    slot.write(6)
    assert holder.sizes == kind((16, 6))
    assert slot.read() == 6
    assert before == kind((16, 8))  # another module may hold the same one


@pytest.mark.parametrize(
    ("before", "changes", "wanted"),
    [
        (16, {(16, 12)}, [12, 16]),  # what the size became
        (16, {(16, 12), (16, 16)}, [16, 12]),  # one of that size stayed: likeliest that one
        (16, {(8, 6)}, [16, 12, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 13, 14, 15]),  # twice another one
        (4, {(16, 12)}, [4, 3, 1, 2]),  # a number of heads
        (4, {(16, 10)}, [4, 1, 2, 3]),  # no multiple
        (5, {(16, 12)}, [5]),  # not related
        (16, {(16, 16)}, [16]),  # nothing changed
        (0, {(16, 12)}, [0]),
        (-1, {(16, 12)}, [-1]),
    ],
)
def test_candidates_stand_in_the_order_of_likelihood(before: int, changes: set[Any], wanted: list[int]) -> None:
    assert candidates(before, changes) == wanted


def test_sizes_that_are_written_in_calls_stand_behind_those_that_follow_and_before_small_numbers() -> None:
    assert candidates(32, {(128, 80)}, {16, 40, 72, 2}) == [32, 20, 16, *range(1, 16)]
    assert candidates(32, {(128, 128)}, {16}) == [32]


@given(st.lists(st.lists(st.integers(), min_size=1, max_size=4, unique=True), max_size=4))
def test_combinations_are_all_choices_those_of_small_places_first(options: list[list[int]]) -> None:
    found = list(combinations(options))
    assert len(found) == len(set(found))
    assert set(found) == set(itertools.product(*options))
    ranks = [sum(values.index(value) for values, value in zip(options, choice, strict=True)) for choice in found]
    assert ranks == sorted(ranks)


def test_what_forward_does_not_read_follows_where_one_value_is_left() -> None:
    holder = Config()
    holder.width = 16
    width = Slot(holder, "width", None, 16)
    assert derived(width, [{(16, 12), (8, 8)}], []) == 12
    assert derived(width, [{(16, 12), (16, 10)}], []) == 16  # two are possible
    assert derived(width, [{(8, 4)}], []) == 16  # none


def test_of_sizes_that_became_several_the_nearest_counts() -> None:
    holder = Config()
    holder.width = 16
    width = Slot(holder, "width", None, 16)
    assert derived(width, [{(8, 8)}, {(16, 12), (8, 8)}, {(16, 10)}], []) == 12
    assert derived(width, [{(16, 12), (16, 11)}, {(16, 10)}], []) == 16


def test_the_number_of_heads_follows_from_their_size() -> None:
    holder = Config()
    holder.head_dim = 4
    heads, size = Slot(holder, "width", None, 8), Slot(holder, "head_dim", None, 4)
    assert derived(heads, [{(32, 24)}], [size]) == 6
    holder.head_dim = 3
    assert derived(heads, [{(32, 24)}], [size]) == 8
    assert derived(heads, [{(32, 20)}], [size]) == 8  # 20 is no multiple of 3: it stays


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("hidden_size", True), ("num_heads", True), ("out_channels", True), ("head_dim", True), ("nx", True),
        ("kernel_size", False), ("patch_size", False), ("vocab_size", False), ("dim", False), ("count", False),
        ("num_hidden_layers", False),
    ],
)  # fmt: skip
def test_names_tell_sizes_from_other_integers(name: str, wanted: bool) -> None:
    assert Slot(object(), name, None, 1).names_a_size() is wanted
