"""What every test of removal asserts: the shrunk network computes what the masked one does, and as much went as can."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

import fxprune
from fxprune.channels import ChannelPlan, analyze, impose, remove
from tests.random_networks import network

EXACT = 1e-9  # relative, in float64


def error(expected: Any, got: Any) -> float:
    """The largest difference of two structures of outputs, relative to the scale of each tensor of the first.

    What is no floating-point tensor must be equal; shapes and dtypes must be, and every number finite.
    """
    worst = 0.0
    for want, value in zip(pytree.tree_leaves(expected), pytree.tree_leaves(got), strict=True):
        if not isinstance(want, Tensor):
            assert want == value
            continue
        assert (want.shape, want.dtype) == (value.shape, value.dtype)
        if not want.is_floating_point():
            assert torch.equal(want, value)
            continue
        assert want.isfinite().all(), "what is expected is not finite, so the comparison would say nothing"
        assert value.isfinite().all(), "the shrunk network's outputs are not finite"
        if want.numel():
            worst = max(worst, float((want - value).abs().max() / want.abs().max().clamp_min(1e-30)))
    return worst


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def shrink(
    model: nn.Module, *inputs: Tensor, align: Any = 1, modes: Sequence[str] = ("eval",), dynamic_shapes: Any = "batch"
) -> tuple[fxprune.TracedModule, ChannelPlan]:
    """Trace, analyze and remove on a copy, in eval mode."""
    copied = copy.deepcopy(model).eval()
    traced = fxprune.trace(copied, inputs, modes=modes, dynamic_shapes=dynamic_shapes).eval()
    return traced, remove(traced, analyze(traced, align=align))


def check_network(seed: int, words: bool) -> tuple[int, int]:
    """One random network: exact at every batch size it was captured for, trainable, and its plan gives the same again.

    The seed chooses, beside the network, what is captured: a free batch by every third (a fixed one costs half), and
    train mode as well by every eighth.

    Returns:
        How many parameters there were, and how many are left.
    """
    return check(seed, *network(seed, words))


def check(seed: int, model: nn.Module, inputs: Callable[[int], Tensor]) -> tuple[int, int]:
    """`check_network` of a network in float64 and eval mode, with its inputs by batch size."""
    free = seed % 3 == 0
    sizes = (1, 2, 5) if free else (2, 2)
    modes = ("train", "eval") if seed % 8 == 1 else ("eval",)
    traced = fxprune.trace(model, (inputs(2),), modes=modes, dynamic_shapes="batch" if free else None).eval()
    dense = copy.deepcopy(traced)
    plan = remove(traced, analyze(traced, align=1 if seed % 4 else "auto"))
    assert plan.parameters == (count(model), count(traced))
    for batch in sizes:
        x = inputs(batch)
        with torch.no_grad():
            assert error(model(x), traced(x)) < EXACT, f"seed {seed}, batch {batch}\n{plan.explain()}"
    impose(dense, ChannelPlan.from_json(plan.to_json()))
    dense.load_state_dict(traced.state_dict())
    x = inputs(sizes[-1])
    assert torch.equal(dense(x), traced(x))
    if len(modes) == 2:
        traced.train()
        traced(inputs(sizes[-1])).sum().backward()
        assert all(p.grad is None or p.grad.shape == p.shape for p in traced.parameters())
    return plan.parameters
