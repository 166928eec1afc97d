"""Running graphs node by node: in a chosen precision, with tensors from anywhere, every value watched."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn

from fxprune.graph.mutation import is_mutating, is_written_behind, written
from fxprune.wrapper_tensors import WrapperTensor

Watch = Callable[[fx.Node, Any], None]


_HALVES = (torch.float16, torch.bfloat16)


def converted(value: Any, dtype: torch.dtype | None, *, halves: bool = False) -> Any:
    """A float32 or float64 tensor as `dtype`, the constant `torch.float32` as well; everything else as it is.

    With `halves`, so are tensors of 16 bits, and the constants of these types.
    """
    if dtype is None:
        return value
    narrow = (torch.float32, *_HALVES) if halves else (torch.float32,)
    if isinstance(value, Tensor):
        return value.to(dtype) if value.dtype in (torch.float64, *narrow) else value
    return dtype if isinstance(value, torch.dtype) and value in narrow else value


class Interpreter(fx.Interpreter):
    """torch's interpreter, which computes what is float32 or float64 as `dtype`: what is stored, where it is read.

    What a node writes into is a copy: the tensors that it reads, and the inputs, stay as they are.

    Args:
        graph: what to run.
        tensors: gives the value of a `get_attr` node by its target.
        dtype: the precision; None leaves every value as it is.
        watch: called with each node and its value.
        keep: whether values stay in `env` when no node needs them any more.
        halves: whether what has 16 bits is computed as `dtype`, too.
    """

    def __init__(
        self,
        graph: fx.Graph,
        tensors: Callable[[str], Any],
        dtype: torch.dtype | None = None,
        watch: Watch | None = None,
        *,
        keep: bool = False,
        halves: bool = False,
    ) -> None:
        super().__init__(nn.Module(), garbage_collect_values=not keep, graph=graph)
        self.extra_traceback = False  # errors are the operators' own
        self.tensors, self.dtype, self.watch, self.halves = tensors, dtype, watch, halves

    def fetch_attr(self, target: str) -> Any:
        """The value of a `get_attr` node."""
        return self.tensors(target)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        """An operator on converted arguments."""
        args, kwargs = pytree.tree_map(self._converted, (args, kwargs))
        if any(
            isinstance(each, nn.Module) for each in pytree.tree_leaves(args)
        ):  # control flow takes plain tensors alone
            args = pytree.tree_map_only(WrapperTensor, lambda tensor: tensor.whole(), args)
        return super().call_function(target, args, kwargs)

    def _converted(self, value: Any) -> Any:
        return converted(value, self.dtype, halves=self.halves)

    def run_node(self, n: fx.Node) -> Any:
        """One node; what came from outside is converted."""
        value = super().run_node(n)
        is_written = n.op in ("get_attr", "placeholder") and is_written_behind(n)
        # what is stored each reader converts, so that it is not all converted at once; unless `env` is to have it
        is_shared = n.op == "get_attr" and (is_written or not self.garbage_collect_values)
        if n.op in ("placeholder", "output") or is_shared:
            value = pytree.tree_map(self._converted, value)
        if is_written and isinstance(value, Tensor):
            value = value.clone()
        if self.watch is not None:
            self.watch(n, value)
        return value

    def run_apart(self, node: fx.Node) -> None:
        """One node, its value into `env`; what it writes into is a copy, and stays as it is there."""
        kept = {operand: self.env[operand] for operand in (written(node) if is_mutating(node) else [])}
        self.env.update({operand: value.clone() for operand, value in kept.items()})
        self.env[node] = self.run_node(node)
        self.env.update(kept)


def run(
    graph: fx.Graph,
    tensors: Callable[[str], Any],
    inputs: Sequence[Any],
    dtype: torch.dtype | None = None,
    watch: Watch | None = None,
    *,
    halves: bool = False,
) -> list[Any]:
    """Run a graph without gradients on its flat inputs; returns its flat outputs. The arguments are `Interpreter`'s."""
    # torch's counter of operations hangs hooks on what is given to branches of control flow and requires a gradient
    interpreter = Interpreter(graph, lambda name: without_gradient(tensors(name)), dtype, watch, halves=halves)
    with torch.no_grad():
        return pytree.tree_leaves(interpreter.run(*map(without_gradient, inputs), enable_io_processing=False))


def without_gradient(value: Any) -> Any:
    """A tensor apart from what it is computed from; everything else as it is."""
    return value.detach() if isinstance(value, Tensor) and value.requires_grad else value


def run_nodes(nodes: Sequence[fx.Node], tensors: Callable[[str], Any]) -> dict[fx.Node, Any]:
    """The values of nodes that read nothing but each other and `tensors`, given in graph order; without gradients."""
    interpreter = Interpreter(nodes[0].graph, tensors, keep=True)
    with torch.no_grad():
        for node in nodes:
            interpreter.env[node] = interpreter.run_node(node)
    return interpreter.env
