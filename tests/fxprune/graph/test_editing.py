"""Edits of graphs: what is dead goes, however long, and what has an effect stays."""

from __future__ import annotations

import pytest
import torch
from torch import fx

from fxprune.graph.editing import erase_dead
from fxprune.graph.text import text

aten = torch.ops.aten


def _graph(build: list[tuple[object, tuple[object, ...]]]) -> tuple[fx.Graph, fx.Node]:
    graph = fx.Graph()
    x = graph.placeholder("x")
    node = graph.get_attr("counter")
    for target, rest in build:
        node = graph.call_function(target, (node, *rest))  # type: ignore[arg-type]
    graph.output(x)
    return graph, node


def test_a_dead_branch_of_any_length_goes() -> None:
    graph, _ = _graph([(aten.neg.default, ())] * 1200)
    assert erase_dead(graph)
    assert [node.op for node in graph.nodes] == ["placeholder", "output"]
    assert not erase_dead(graph)


def test_a_write_through_a_long_chain_of_views_counts_as_one_to_the_buffer() -> None:
    graph, _ = _graph([(aten.alias.default, ())] * 1200 + [(aten.relu_.default, ())])
    before = text(graph)
    assert not erase_dead(graph, lambda target: target == "other")
    assert text(graph) == before
    assert erase_dead(graph, lambda target: target == "counter")
    assert [node.op for node in graph.nodes] == ["placeholder", "output"]


def test_a_write_to_an_input_stays_and_one_to_a_fresh_value_goes() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.call_function(aten.relu_.default, (graph.call_function(aten.alias.default, (x,)),))
    graph.call_function(aten.relu_.default, (graph.call_function(aten.zeros.default, ([2],)),))
    graph.output(None)
    assert erase_dead(graph)
    assert [str(node.target) for node in graph.nodes] == ["x", "aten.alias.default", "aten.relu_.default", "output"]


@pytest.mark.parametrize(
    "view", [(aten.slice.Tensor, (1, 0, 2)), (aten.dropout.default, (0.5, False)), (aten.alias.default, ())]
)
def test_a_write_to_a_fresh_value_that_is_read_stays(view: tuple[object, tuple[object, ...]]) -> None:
    graph = fx.Graph()
    fresh = graph.call_function(aten.zeros.default, ([2, 4],))
    part = graph.call_function(view[0], (fresh, *view[1]))  # type: ignore[arg-type]
    graph.call_function(aten.add_.Tensor, (part, 1.0))
    graph.output(graph.call_function(aten.neg.default, (fresh,)))
    before = text(graph)
    assert not erase_dead(graph)
    assert text(graph) == before


def test_a_value_computed_from_a_removed_buffer_keeps_what_is_written_to_it() -> None:
    graph = fx.Graph()
    value = graph.call_function(aten.linear.default, (graph.get_attr("queries"), graph.get_attr("weight")))
    graph.call_function(aten.relu_.default, (graph.call_function(aten.slice.Tensor, (value, 1, 0, 2)),))
    graph.output(value)
    assert not erase_dead(graph, lambda target: target == "queries")


@pytest.mark.parametrize("removed", [True, False])
def test_a_random_value_goes_with_the_buffer_it_is_drawn_for(removed: bool) -> None:
    graph, _ = _graph([(aten.rand_like.default, ())])
    assert erase_dead(graph, lambda target: removed) == removed
    assert len(graph.nodes) == (2 if removed else 4)


def test_the_value_of_a_reparametrized_parameter_stays() -> None:
    graph, node = _graph([(aten.neg.default, ())])
    node.meta["fxprune"] = {"pass": "insert-mask", "parameter": "weight"}
    assert not erase_dead(graph)
