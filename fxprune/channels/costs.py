"""What an operator costs in multiply-accumulates, and which channels that is proportional to."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from fxprune.channels.coupling import Val
from fxprune.channels.ids import Vector
from fxprune.channels.registry import operator_name, rule_of
from fxprune.graph.macs import flop_counter


def sizes(node: Any) -> list[int]:
    """The sizes of a node's value, symbolic ones as they are at the sample inputs."""
    return [s if isinstance(s, int) else int(s.node.hint) for s in node.meta["val"].shape]


def moved(node: fx.Node) -> tuple[int, int, int] | None:
    """Elements of the output, the input and the weight that a convolution or linear layer moves, None for others."""
    if not operator_name(node.target).startswith(("conv", "linear")):
        return None
    output, data, weight = (math.prod(sizes(n)) for n in (node, node.args[0], node.args[1]))
    return output, data, weight


def node_costs(node: fx.Node, env: dict[fx.Node, Any]) -> list[tuple[float, list[Vector] | None]]:
    """Multiply-accumulates by torch's formulas, in parts, each with the ids it is proportional to (None: constant)."""
    name, args = operator_name(node.target), node.args

    def ids(*picked: tuple[Any, int]) -> list[Vector]:
        vals = [(env[n], d) for n, d in picked if isinstance(env.get(n), Val)]
        return [f[1] for v, d in vals if -len(v.axes) <= d < len(v.axes) for f in v.axes[d] if f[1] is not None]

    def heads(n: Any, rank: int) -> list[tuple[Any, int]]:
        return [(n, d) for d in range(rank - 2)]

    if name.startswith("conv"):
        transposed = "transpose" in name or (name == "convolution" and bool(args[6]))
        weight, data = sizes(args[1]), sizes(args[0] if transposed else node)
        space = data[-(len(weight) - 2) :]
        batch = math.prod(data) // math.prod(space) // data[-len(weight) + 1]
        return [(float(math.prod(weight) * math.prod(space) * batch), [])]
    if name == "scaled_dot_product_attention":
        q, k, v = (sizes(n) for n in args[:3])
        scale, lead = math.prod(q[:-1]) * k[-2], heads(args[0], len(q))
        return [(float(scale * q[-1]), ids(*lead, (args[0], -1))), (float(scale * v[-1]), ids(*lead, (args[2], -1)))]
    if name in ("linear", "addmm", "mm", "matmul", "bmm", "mv", "baddbmm"):
        a, b = args[1:3] if name in ("addmm", "baddbmm") else args[:2]
        size, rank = float(math.prod(sizes(node)) * sizes(a)[-1]), len(sizes(node))
        return [(size, ids(*heads(node, rank), (a, -2), (a, -1), (b, -1)))]
    if str(node.target) in ("aten.lstm.input", "aten.gru.input", "aten.rnn_tanh.input", "aten.rnn_relu.input"):
        inputs, weights, both_ways = node.args[0], list[Any](args[2]), args[7]  # type: ignore[arg-type]
        read = float(math.prod(sizes(inputs)[:-1]) * math.prod(sizes(weights[0])) * (2 if both_ways else 1))
        return [(_measured(node) - read, None), (read, ids((inputs, -1)))]
    if rule_of(node.target):
        return []
    return [(cost, None)] if (cost := _measured(node)) else []


def _measured(node: fx.Node) -> float:
    """What torch's counter finds for an operator without a formula here, run on tensors without storage."""

    def empty(n: fx.Node) -> Any:
        value = n.meta.get("val")
        return torch.empty(sizes(n), dtype=value.dtype, device="meta") if isinstance(value, torch.Tensor) else value

    target: Callable[..., Any] = node.target  # type: ignore[assignment]
    with flop_counter() as counter, torch.no_grad():
        try:
            target(*fx.node.map_arg(node.args, empty), **fx.node.map_arg(dict(node.kwargs), empty))
        except (RuntimeError, TypeError, NotImplementedError):  # an operator whose sizes depend on data
            return 0.0
    return float(counter.get_total_flops()) / 2
