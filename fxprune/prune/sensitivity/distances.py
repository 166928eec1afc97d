"""How far a network's outputs are from those of the dense one."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx

from fxprune.channels.arguments import bound
from fxprune.channels.registry import REGISTRY
from fxprune.channels.rules.contractions import Contraction
from fxprune.channels.rules.convolutions import Convolution
from fxprune.errors import ArgumentError, ArgumentTypeError, PruningError

aten = torch.ops.aten

Distance = Callable[[Any, Any], Any]
NAMES = ("auto", "divergence", "error", "cosine")
_KEEP_VALUES = (
    aten.view.default, aten.reshape.default, aten.transpose.int, aten.permute.default, aten.clone.default,
    aten.contiguous.default, aten.squeeze.dim, aten.unsqueeze.default, aten.dropout.default, aten.alias.default,
    aten.flatten.using_ints, aten._to_copy.default, aten.to.dtype,
)  # fmt: skip


class OutputDistance:
    """The mean distance of a graph's outputs to others, over samples.

    Args:
        graph: of the network. name: one of `NAMES`, or a function `(outputs, dense outputs) -> scalar`.
        option: under which it was given.
    """

    def __init__(self, graph: fx.Graph, name: str | Distance, option: str = "distance") -> None:
        self.given, self._option = name, option
        if callable(name):
            _check_function(name, option)
        elif name not in NAMES:
            raise ArgumentError(f"{option}={name!r}: one of {', '.join(NAMES)} is needed, or a function.")
        (output,) = graph.find_nodes(op="output")
        self.leaves = [each for each in pytree.tree_leaves(output.args) if isinstance(each, fx.Node)]
        self.kinds = [_kind(leaf) for leaf in self.leaves]

    @property
    def is_one_row_of_classes(self) -> bool:
        """Whether a sample is one row of logits somewhere, whose divergence differs much from sample to sample."""
        kinds = [kind for kind, _ in self.kinds] if self.given == "auto" else [self.given] * len(self.leaves)
        return any(
            str(kind).startswith("divergence") and len(leaf.meta["val"].shape) == 2
            for kind, leaf in zip(kinds, self.leaves, strict=True)
        )

    def __str__(self) -> str:
        if callable(self.given):
            return getattr(self.given, "__name__", type(self.given).__name__)
        kinds = dict.fromkeys(kind for kind, _ in self.kinds) if self.given == "auto" else [self.given]
        return " and ".join(kinds)

    def __call__(self, outputs: Sequence[Any], dense: Sequence[Any], counts: Tensor | None, structure: Any) -> float:
        """The distance of flat outputs to the dense ones.

        Args:
            outputs, dense: one value a leaf. counts: which samples or positions count, None for all.
            structure: from flat outputs to those of the module, for a function of the user.
        """
        if callable(self.given):
            return _number(self.given(structure(outputs), structure(dense)), self._option)
        found = []
        for value, reference, (kind, axis) in zip(outputs, dense, self.kinds, strict=True):
            if not isinstance(value, Tensor) or not value.is_floating_point() or not value.dim():
                continue
            name = kind if self.given == "auto" else str(self.given)
            found.append(_distance(name, axis, value, reference, counts))
        if not found:
            raise PruningError(
                f"the module returns no floating-point tensor to compare. Give a function as {self._option}."
            )
        return sum(found) / len(found)


def _check_function(function: Distance, option: str) -> None:
    """Raise ArgumentTypeError unless a function can be called with two outputs."""
    if isinstance(function, type):
        raise ArgumentTypeError(
            f"{option} is the class {function.__name__}; give an object of it: {function.__name__}()."
        )
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # of what is not written in Python
        return
    try:
        signature.bind(None, None)
    except TypeError:
        raise ArgumentTypeError(
            f"{option} takes ({', '.join(signature.parameters)}); a function of two is needed: of the outputs, and of "
            "the outputs of the module as it is."
        ) from None


def _number(value: Any, option: str) -> float:
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ArgumentError(
            f"{option} gave a {type(value).__name__}; a number is needed, larger for outputs further off."
        )
    return float(value)


def _kind(leaf: fx.Node) -> tuple[str, int]:
    """How an output is compared, and its axis of classes or features."""
    node, axis = leaf, -1
    while node.op == "call_function" and node.target in _KEEP_VALUES and node.target not in _MOVE:
        node = node.all_input_nodes[0]
    if node.target in (aten.log_softmax.int, aten._log_softmax.default, aten.softmax.int, aten._softmax.default):
        is_log = "log" in str(node.target)
        return ("divergence" if is_log else "divergence of probabilities"), int(bound(node)["dim"])
    while node.op == "call_function" and node.target in _KEEP_VALUES:
        node = node.all_input_nodes[0]
    call = REGISTRY.call(node) if node.op == "call_function" else None
    if (isinstance(call, Contraction) and node is leaf) or isinstance(call, Contraction):
        return ("divergence" if _has_classes(leaf, -1) else "error"), -1
    if isinstance(call, Convolution):
        axis = 1 if node is leaf else axis
        return ("divergence" if node is leaf and _has_classes(leaf, 1) else "error"), axis
    return "error", -1


_MOVE = (aten.transpose.int, aten.permute.default, aten.view.default, aten.reshape.default, aten.flatten.using_ints)


def _has_classes(leaf: fx.Node, axis: int) -> bool:
    shape = leaf.meta["val"].shape
    return len(shape) > 1 and isinstance(shape[axis], int) and shape[axis] > 1


def _distance(kind: str, axis: int, value: Tensor, reference: Tensor, counts: Tensor | None) -> float:
    value, reference = (each.movedim(axis, -1).double() for each in (value, reference))  # small ones count
    if kind.startswith("divergence"):
        first, second = (
            (each.clamp(min=1e-12).log() if "probabilities" in kind else each.log_softmax(-1))
            for each in (reference, value)
        )
        each = torch.where(first.isneginf(), 0, first.exp() * (first - second)).sum(-1).clamp(min=0)
        return float(_counted(each, counts).mean())
    if bool(reference.isneginf().any()):  # what is masked out says nothing
        value, reference = (torch.where(reference.isneginf(), 0, each) for each in (value, reference))
    if kind == "cosine":
        return float(1 - _counted(torch.cosine_similarity(value, reference, -1), counts).mean())
    lacking = _counted((value - reference).square().sum(-1), counts).sum()
    spread = _counted((reference - reference.mean()).square().sum(-1), counts).sum()
    return float(lacking / spread.clamp(min=1e-30))


def _counted(each: Tensor, counts: Tensor | None) -> Tensor:
    if counts is None or tuple(counts.shape) != tuple(each.shape[: counts.dim()]):
        return each.flatten()
    return each[counts].flatten()
