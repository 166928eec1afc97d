"""How far a network's outputs are from those of the dense one."""

from __future__ import annotations

import inspect
import math
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
# they leave every entry where it is
_PLAIN = (
    aten.clone.default, aten.contiguous.default, aten.dropout.default, aten.alias.default, aten._to_copy.default,
    aten.to.dtype,
)  # fmt: skip
_MOST_ENTRIES = 2**22  # of outputs that are compared at once
_SOFTMAX = (aten.softmax.int, aten._softmax.default)
_LOG_SOFTMAX = (aten.log_softmax.int, aten._log_softmax.default)


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

    def sums(self) -> list[Tensor]:
        """Nothing added yet, for each output, or for the function of the user."""
        return [torch.zeros(6, dtype=torch.float64) for _ in ([None] if callable(self.given) else self.leaves)]

    def add(
        self,
        sums: list[Tensor],
        outputs: Sequence[Any],
        dense: Sequence[Any],
        counts: Tensor | None,
        structure: Callable[[Sequence[Any]], Any],
        samples: int,
    ) -> None:
        """Add the distance of flat outputs to the dense ones.

        Args:
            sums: of `sums`. outputs, dense: one value a leaf.
            counts: which samples or positions count, None for all.
            structure: from flat outputs to those of the module, for a function of the user.
            samples: how many there are.
        """
        if callable(self.given):
            value = _number(self.given(structure(outputs), structure(dense)), self._option)
            sums[0] += torch.tensor([value * samples, samples, 0, 0, 0, 0], dtype=torch.float64)
            return
        for place, (value, reference, (kind, axis)) in enumerate(zip(outputs, dense, self.kinds, strict=True)):
            if isinstance(value, Tensor) and value.is_floating_point() and value.dim():
                name = kind if self.given == "auto" else str(self.given)
                if self.given == "auto" and name.startswith("divergence") and value.dim() > 2:
                    sums[place] += _of_positions(name, axis, value, reference, counts)
                else:
                    sums[place] += _sums(name, axis, value, reference, counts)

    def mean(self, sums: Sequence[Tensor]) -> float:
        """The mean distance of what was added, over the outputs.

        Raises:
            PruningError: nothing could be compared.
        """
        found: list[float] = []
        for lost, count, total, squares, off, energy in (each.tolist() for each in sums):
            if count:
                spread = count if squares == 0 else max(squares - total**2 / count, 1e-30)
                found.append(lost / spread + off / max(energy, 1e-30))
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
    node = leaf
    while node.op == "call_function" and (node.target in _PLAIN or _keeps_features(node)):
        node = node.all_input_nodes[0]
    if node.target in (*_SOFTMAX, *_LOG_SOFTMAX):
        dim = int(bound(node)["dim"])
        if dim in (-1, len(node.meta["val"].shape) - 1) or node.meta["val"].shape == leaf.meta["val"].shape:
            return ("divergence" if node.target in _LOG_SOFTMAX else "divergence of probabilities"), dim
        return "error", -1
    call = REGISTRY.call(node) if node.op == "call_function" else None
    if isinstance(call, Contraction) and _has_classes(leaf, -1):
        return "divergence", -1
    if isinstance(call, Convolution):
        return ("divergence" if _has_classes(leaf, 1) and _same_rank(leaf, node) else "error"), 1
    return "error", -1


def _keeps_features(node: fx.Node) -> bool:
    """Whether a node lays out positions anew, and leaves the last axis as it is."""
    if node.target not in (aten.view.default, aten.reshape.default, aten._unsafe_view.default):
        return False
    before, after = (each.meta["val"].shape[-1:] for each in (node.all_input_nodes[0], node))
    return bool(before == after)


def _same_rank(one: fx.Node, other: fx.Node) -> bool:
    return len(one.meta["val"].shape) == len(other.meta["val"].shape)


def _has_classes(leaf: fx.Node, axis: int) -> bool:
    shape = leaf.meta["val"].shape
    return len(shape) > 1 and isinstance(shape[axis], int) and shape[axis] > 1


def _sums(kind: str, axis: int, value: Tensor, reference: Tensor, counts: Tensor | None) -> Tensor:
    """What is lost, over how many rows or entries; for squared errors also the sums of entries and of their squares."""
    if kind.startswith("divergence"):
        first, second = (_log_likelihoods(kind, axis, each) for each in (reference, value))
        return _rows_lost(_counted(_divergence(first, second), counts))
    value, reference = (each.movedim(axis, -1).double() for each in (value, reference))  # small ones count
    if bool(reference.isneginf().any()):  # what is masked out says nothing
        value, reference = (torch.where(reference.isneginf(), 0, each) for each in (value, reference))
    if kind == "cosine":
        return _rows_lost(1 - _counted(torch.cosine_similarity(value, reference, -1), counts))
    lost = _counted((value - reference).square().sum(-1), counts).sum()
    total, squares = (_counted(each.sum(-1), counts) for each in (reference, reference.square()))
    entries = len(total) * reference.shape[-1]
    found = [lost, lost.new_tensor(entries), total.sum(), squares.sum().clamp(min=1e-300)]
    return torch.stack([*found, *lost.new_zeros(2)]).cpu()


def _of_positions(kind: str, axis: int, value: Tensor, reference: Tensor, counts: Tensor | None) -> Tensor:
    """The divergence of outputs of many positions, and the error of their logits, which says more of few samples.

    Of positions where the dense network is sure, one in a hundred makes up nearly all of the divergence: those where
    the other one is sure of something else. So none counts for more than one of which nothing is known would, log of
    the number of classes. Logits move at all positions. They are counted from their mean, which says nothing.
    """
    outputs, found = [_rows(axis, each, counts) for each in (reference, value)], torch.zeros(6, dtype=torch.float64)
    for parts in zip(*(each.split(max(1, _MOST_ENTRIES // each.shape[-1])) for each in outputs), strict=True):
        first, second = (_log_likelihoods(kind, -1, each) for each in parts)
        found += _rows_lost(_divergence(first, second).clamp(max=math.log(first.shape[-1])))
        there = ~(first.isneginf() | second.isneginf())
        classes = there.sum(-1).clamp(min=1)
        for place, each in ((4, second - first), (5, first)):
            logits = torch.where(there, each, 0)
            found[place] += (logits.square().sum(-1) - logits.sum(-1).square() / classes).sum().clamp(min=0).cpu()
    return found


def _rows(axis: int, output: Tensor, counts: Tensor | None) -> Tensor:
    """The positions that count, [rows, classes]."""
    output = output.movedim(axis, -1)
    if counts is None or tuple(counts.shape) != tuple(output.shape[:-1][: counts.dim()]):
        return output.flatten(0, -2)
    return output[counts].flatten(0, -2)


def _log_likelihoods(kind: str, axis: int, output: Tensor) -> Tensor:
    """Of each class, which come last."""
    output = output.movedim(axis, -1).double()  # small ones count
    return output.clamp(min=1e-12).log() if "probabilities" in kind else output.log_softmax(-1)


def _divergence(first: Tensor, second: Tensor) -> Tensor:
    """That of Kullback and Leibler, a row at a time, of logarithms of what is likely."""
    return torch.where(first.isneginf(), 0, first.exp() * (first - second)).sum(-1).clamp(min=0)


def _rows_lost(rows: Tensor) -> Tensor:
    return torch.stack([rows.sum(), rows.new_tensor(len(rows)), *rows.new_zeros(4)]).cpu()


def _counted(each: Tensor, counts: Tensor | None) -> Tensor:
    if counts is None or tuple(counts.shape) != tuple(each.shape[: counts.dim()]):
        return each.flatten()
    return each[counts].flatten()
