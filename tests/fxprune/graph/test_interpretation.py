"""Graphs run node by node, against the module that they are captured from."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import fx, nn

import fxprune
from fxprune.errors import FinalizeError
from fxprune.graph.expressions import closure, evaluate
from fxprune.graph.interpretation import run, run_nodes
from fxprune.graph.metadata import tagged
from fxprune.graph.names import tensor_at


class Mixed(nn.Module):
    """float32 parameters, an integer input, and float32 written into its code."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.norm = nn.BatchNorm1d(4)

    def forward(self, index: torch.Tensor) -> torch.Tensor:
        values = self.norm(self.embedding(index))
        return values * torch.arange(4, dtype=torch.float32)


def test_a_graph_runs_in_float64_whatever_its_code_says() -> None:
    model = Mixed().eval()
    index = torch.tensor([1, 2, 4])
    traced = fxprune.trace(model, (index,))
    (found,) = run(traced.graphs["eval"], lambda name: tensor_at(traced, name), [index], torch.float64)
    wide = copy.deepcopy(model).double()
    wanted = wide.norm(wide.embedding(index)) * torch.arange(4, dtype=torch.float64)
    assert found.dtype == torch.float64
    assert torch.allclose(found, wanted, rtol=1e-13, atol=0)


def test_without_a_precision_outputs_are_the_same_bits_and_buffers_stay() -> None:
    model = Mixed().train()
    index = torch.tensor([1, 2, 4])
    traced = fxprune.trace(model, (index,))
    buffers = {name: value.clone() for name, value in traced.named_buffers()}
    (found,) = run(traced.graphs["train"], lambda name: tensor_at(traced, name), [index])
    assert all(torch.equal(value, buffers[name]) for name, value in traced.named_buffers())
    assert torch.equal(found, model(index))
    assert not torch.equal(model.norm.running_mean, buffers["norm.running_mean"])  # eager does write them


def test_every_node_is_watched_with_its_value() -> None:
    traced = fxprune.trace(nn.Sequential(nn.Linear(3, 2), nn.ReLU()).eval(), (torch.randn(4, 3),))
    x = torch.randn(5, 3)
    seen: dict[str, torch.Tensor] = {}
    outputs = run(
        traced.graph,
        lambda name: tensor_at(traced, name),
        [x],
        watch=lambda node, value: seen.update({node.name: value}),
    )
    assert list(seen) == [node.name for node in traced.graph.nodes]
    assert torch.equal(seen["relu"], outputs[0])
    assert torch.equal(
        seen["linear"], nn.functional.linear(x, traced.get_parameter("0.weight"), traced.get_parameter("0.bias"))
    )


def test_an_expression_over_parameters_has_eagers_value() -> None:
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)).eval()
    traced = fxprune.trace(nn.Sequential(layer), (torch.randn(2, 4),))
    (node,) = tagged(traced.graphs["eval"], "0.weight")
    assert torch.equal(evaluate(traced, node), layer.weight)
    steps = closure(node)
    assert steps == [n for n in traced.graphs["eval"].nodes if n in set(steps)]  # in graph order
    values = run_nodes(steps, lambda name: tensor_at(traced, name))
    assert set(values) == set(steps)


def test_what_depends_on_an_input_has_no_constant_value() -> None:
    traced = fxprune.trace(nn.Sequential(nn.Linear(4, 3)).eval(), (torch.randn(2, 4),))
    (linear,) = traced.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)
    with pytest.raises(FinalizeError, match="depends on `input"):
        evaluate(traced, linear)


@pytest.mark.parametrize("build", ["random", "writes"])
def test_what_is_random_or_writes_has_no_constant_value(build: str) -> None:
    graph, aten = fx.Graph(), torch.ops.aten
    buffer = graph.get_attr("scale")
    node = graph.call_function(aten.rand_like.default if build == "random" else aten.relu_.default, (buffer,))
    root = nn.Module()
    root.register_buffer("scale", torch.tensor([-1.0]))
    with pytest.raises(FinalizeError, match=f"depends on `{node.name}`"):
        evaluate(root, graph.call_function(aten.neg.default, (node,)))
    assert root.scale.item() == -1.0


def test_the_cost_of_an_expression_is_its_own_and_not_the_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = fx.Graph()
    for i in range(3000):
        last = graph.call_function(torch.ops.aten.neg.default, (graph.get_attr(f"p{i}"),))
    monkeypatch.setattr(fx.Graph, "nodes", property(lambda self: pytest.fail("the whole graph was walked")))
    assert len(closure(last)) == 2
    root = nn.Module()
    root.p2999 = nn.Parameter(torch.ones(1))
    assert evaluate(root, last).item() == -1.0
