"""What is told to be the same for every input is."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn

import fxprune
from fxprune.channels.coupling import couple
from fxprune.channels.dependence import fixed_nodes
from tests.random_recurrent import recurrent_network


def leave_biases(model: nn.Module, seed: int) -> None:
    """Zero the weights of half of the hidden units of each block, and in most blocks what reads the others."""
    r = random.Random(seed)
    blocks: Any = model.get_submodule("blocks")
    with torch.no_grad():
        for block in blocks:
            units = r.sample(range(block.units), block.units // 2)
            for name, p in block.named_parameters():
                if "weight_ih" in name or "weight_hh" in name:
                    p.view(-1, block.units, p.shape[1])[:, units] = 0
            if r.random() < 0.7:
                block.out.weight[:, [i for i in range(block.out.in_features) if i % block.units not in units]] = 0


def values(traced: fxprune.TracedModule, graph: fx.Graph, x: Tensor) -> dict[fx.Node, Any]:
    """Of every node, for one input."""
    run = fx.Interpreter(traced, garbage_collect_values=False, graph=graph)
    with torch.no_grad():
        run.run(x)
    return run.env


@pytest.mark.parametrize("first", [0, pytest.param(6, marks=pytest.mark.slow)])
def test_fixed_nodes_of_random_recurrent_networks_give_the_same_for_other_inputs(first: int) -> None:
    found = 0
    for seed in range(first, first + (6 if first == 0 else 90)):
        model, inputs = recurrent_network(seed)
        leave_biases(model, seed)
        traced = fxprune.trace(model, inputs(2), modes=("eval",), dynamic_shapes=None)
        coupling = couple(traced, traced.graphs)
        graph = coupling.walks["eval"].graph
        one, other = (values(traced, graph, inputs(2)) for _ in range(2))
        for node in fixed_nodes(coupling.walks["eval"], coupling.of):
            for was, now in zip(pytree.tree_leaves(one[node]), pytree.tree_leaves(other[node]), strict=True):
                assert not isinstance(was, Tensor) or torch.allclose(was, now, rtol=1e-12, atol=1e-12), (seed, node)
            found += node.op == "call_function"
    assert found
