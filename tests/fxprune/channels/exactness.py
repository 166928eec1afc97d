"""What every test of removal asserts: the shrunk network computes what the masked one does."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

import fxprune
from fxprune.channels import ChannelPlan, analyze, impose, remove


def error(a: Any, b: Any) -> float:
    """The largest difference of two structures of outputs, relative to the scale of the first."""
    worst = 0.0
    for x, y in zip(pytree.tree_leaves(a), pytree.tree_leaves(b), strict=True):
        if isinstance(x, Tensor) and x.is_floating_point():
            assert x.shape == y.shape
            worst = max(worst, float((x - y).abs().max() / x.abs().max().clamp_min(1e-30)))
    return worst


def shrink(
    model: nn.Module, *inputs: Tensor, align: Any = 1, modes: Sequence[str] = ("eval",), dynamic_shapes: Any = "batch"
) -> tuple[fxprune.TracedModule, ChannelPlan]:
    """Trace, analyze and remove on a copy, in eval mode."""
    copied = copy.deepcopy(model).eval()
    traced = fxprune.trace(copied, inputs, modes=modes, dynamic_shapes=dynamic_shapes).eval()
    return traced, remove(traced, analyze(traced, align=align))


def check_network(build: Callable[..., tuple[nn.Module, Callable[[int], Tensor]]], seed: int, words: bool) -> None:
    """One random network: exact at several batch sizes, trainable, and its plan gives the same architecture again."""
    model, inputs = build(seed, words)
    modes = ("train", "eval") if seed % 4 == 0 else ("eval",)
    traced, plan = shrink(model, inputs(2), align=1 if seed % 3 else "auto", modes=modes)
    for batch in (1, 2, 5):
        x = inputs(batch)
        with torch.no_grad():
            assert error(model(x), traced(x)) < 1e-9, f"seed {seed}, batch {batch}\n{plan.explain()}"
    if len(modes) == 2:
        traced.train()
        traced(inputs(4)).sum().backward()
        traced.eval()
    if seed % 8 == 1:
        dense = fxprune.trace(model, (inputs(2),), modes=("eval",))
        impose(dense, ChannelPlan.from_json(plan.to_json()))
        dense.load_state_dict(traced.state_dict())
        x = inputs(3)
        assert torch.equal(dense(x), traced(x))
