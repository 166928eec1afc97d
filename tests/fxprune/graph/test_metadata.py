"""Tags of nodes, and the calls of modules that nodes belong to."""

from __future__ import annotations

import torch
from torch import fx, nn

import fxprune
from fxprune.graph.editing import splice
from fxprune.graph.metadata import (
    module_calls,
    module_path,
    parameter_of,
    set_module_calls,
    tag,
    tag_of,
    tagged,
    tagged_names,
    untag,
)


class Twice(nn.Module):
    """Calls one layer twice."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(2, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(self.inner(x))


def test_a_tag_is_found_until_it_is_taken_away() -> None:
    graph = fx.Graph()
    node, other = graph.get_attr("w"), graph.get_attr("v")
    tag(node, {"pass": "insert-mask", "parameter": "weight"})
    assert tag_of(node) == {"pass": "insert-mask", "parameter": "weight"}
    assert parameter_of(node) == "weight"
    assert tag_of(other) is parameter_of(other) is None
    assert tagged(graph) == tagged(graph, "weight") == [node]
    assert tagged(graph, "bias") == []
    assert tagged_names(graph) == {"weight"}
    untag(node)
    untag(other)
    assert tagged(graph) == []


def test_a_copied_expression_is_tagged_with_the_new_name() -> None:
    source, target = fx.Graph(), fx.Graph()
    value = source.call_function(torch.neg, (source.get_attr("w"),))
    tag(value, {"pass": "weight-norm", "parameter": "w"})
    source.output(value)
    (copied,) = splice(target, source, lambda name: f"layer.{name}")
    assert tag_of(copied) == {"pass": "weight-norm", "parameter": "layer.w"}
    assert tag_of(value) == {"pass": "weight-norm", "parameter": "w"}
    assert [str(node.target) for node in target.find_nodes(op="get_attr")] == ["layer.w"]


def test_each_call_of_a_module_is_told_apart() -> None:
    traced = fxprune.trace(Twice(), (torch.randn(3, 2),), modes=("eval",))
    first, second = traced.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)
    assert module_path(first) == module_path(second) == "inner.0"
    assert [path for path, _ in module_calls(first).values()][-2:] == ["inner", "inner.0"]
    assert list(module_calls(first)) != list(module_calls(second))
    set_module_calls(second, module_calls(first))
    assert module_calls(second) == module_calls(first)
    placeholder = next(iter(traced.graph.nodes))
    assert module_path(fx.Graph().placeholder("x")) == ""
    assert module_path(placeholder) == ""
