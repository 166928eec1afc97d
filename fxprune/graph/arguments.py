"""The arguments of a captured graph: their names, how a call binds to them, and what each input must be."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx

from fxprune.errors import InputError
from fxprune.torch_internals import pytree_info

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def fixed_size(size: int | torch.SymInt) -> int | None:
    """The size as an integer, None where it is free; a capture can fix a free size by a constraint."""
    found = size if isinstance(size, int) else size.node.maybe_as_int()
    return None if found is None else int(found)


@dataclass(frozen=True)
class Signature:
    """The arguments that a graph was captured with.

    Attributes:
        names: of all arguments, those by position first.
        positional: how many are given by position.
        structure: torch's specification of the pair (args, kwargs).

    Example:
        >>> Signature.of(traced.graph).names
        ('x', 'mask')
    """

    names: tuple[str, ...]
    positional: int
    structure: pytree.TreeSpec

    @classmethod
    def of(cls, graph: fx.Graph) -> Signature:
        """The signature of a captured graph."""
        info = pytree_info(graph)
        return cls(tuple(info.orig_args), info.in_spec.child(0).num_children, info.in_spec)

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any] | None:
        """The arguments of a call by their captured names, None where the call gives others than the captured ones."""
        bound = dict(zip(self.names, args, strict=False)) | dict(kwargs)
        if len(args) + len(kwargs) != len(self.names) or bound.keys() != set(self.names):
            return None
        return {name: bound[name] for name in self.names}

    def arrange(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Arguments | None:
        """A call with each argument by position or by name as it was captured, None where it does not fit."""
        bound = self.bind(args, kwargs)
        if bound is None:
            return None
        by_position, by_name = self.names[: self.positional], self.names[self.positional :]
        return tuple(bound[name] for name in by_position), {name: bound[name] for name in by_name}


@dataclass(frozen=True)
class Input:
    """What one flattened input must be.

    Attributes:
        name: of its placeholder.
        sample: the value at the capture, a symbol where a number is free.
        sizes: of a tensor: numbers, and names of free sizes; None for what is no tensor.
        alias: the index of the first input that was the same object, its own index where none was.
    """

    name: str
    sample: Any
    sizes: tuple[int | str, ...] | None
    alias: int


@dataclass(frozen=True)
class InputCheck:
    """Whether a call is one that a graph holds for: names, structure, types, dtypes, devices, shapes and identities."""

    signature: Signature
    inputs: tuple[Input, ...]

    @classmethod
    def of(cls, graph: fx.Graph, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> InputCheck:
        """The check of a captured graph, whose sample inputs are `args` and `kwargs`."""
        leaves = pytree.tree_leaves((args, dict(kwargs)))
        placeholders = [node for node in graph.nodes if node.op == "placeholder"]
        first: dict[int, int] = {}
        inputs = []
        for i, (node, leaf) in enumerate(zip(placeholders, leaves, strict=True)):
            value = node.meta.get("val")
            sizes = None
            if isinstance(leaf, Tensor):
                shape = value.shape if isinstance(value, Tensor) else leaf.shape
                sizes = tuple(known if (known := fixed_size(size)) is not None else str(size) for size in shape)
                i = first.setdefault(id(leaf), i)
            elif isinstance(value, torch.SymInt | torch.SymFloat):
                leaf = value
            inputs.append(Input(node.name, leaf, sizes, i))
        return cls(Signature.of(graph), tuple(inputs))

    def __call__(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Raise InputError unless the call is one that the graph holds for."""
        leaves = self._leaves(args, kwargs)
        free: dict[str, int] = {}
        for i, (leaf, expected) in enumerate(zip(leaves, self.inputs, strict=True)):
            if expected.sizes is None:
                _check_constant(leaf, expected)
                continue
            _check_tensor(leaf, expected)
            if not _fits(leaf.shape, expected.sizes, free):
                raise InputError(
                    f"input `{expected.name}` has shape {tuple(leaf.shape)}; captured was {list(expected.sizes)} (a "
                    "name is a free size, the same name the same size). Trace again with these inputs, or with "
                    "`dynamic_shapes`."
                )
            if expected.alias != i and leaf is not leaves[expected.alias]:
                raise InputError(
                    f"inputs `{expected.name}` and `{self.inputs[expected.alias].name}` were one tensor at the capture "
                    "and are two now. Trace again with two tensors."
                )

    def _leaves(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
        """The flattened inputs of a call, in the order of the placeholders."""
        arranged = self.signature.arrange(args, kwargs)
        if arranged is None:
            raise InputError(self._misfit(args, kwargs))
        leaves, structure = pytree.tree_flatten(arranged)
        captured = self.signature.structure
        if structure != captured:
            raise InputError(self._other_structure(arranged, structure))
        return leaves

    def _other_structure(self, arranged: Arguments, structure: pytree.TreeSpec) -> str:
        """What is wrong with the nesting of a call's arguments: of one that should be a tensor, or of the whole."""
        captured = self.signature.structure
        specs = [child for part in range(2) for child in captured.child(part).children()]
        for name, value, spec in zip(self.signature.names, (*arranged[0], *arranged[1].values()), specs, strict=True):
            if spec.is_leaf() and isinstance(value, list | tuple | dict):
                form = f"a {type(value).__name__} of {len(value)}"
                cure = "traced(**batch)" if isinstance(value, dict) else "traced(inputs), labels aside"
                return f"input `{name}` is {form}; captured was another structure, one value. Unpack it: {cure}."
        return f"inputs have the structure {structure}; captured was {captured}. Pass the captured structure."

    def _misfit(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
        """What is wrong with the number or the names of a call's arguments, and what to do."""
        names = self.signature.names
        given = [f"{len(args)} positional", *(f"{k}=" for k in kwargs)]
        called = f"called with {', '.join(given)}; captured with ({', '.join(names)})."
        if len(args) > len(names) and not kwargs:
            if len(args) == len(names) + 1:
                called = f"{called} Labels are no input: of a batch (inputs, labels), give the inputs alone."
            return f"{called} A further argument of the model must be there when it is traced."
        if missing := [name for name in names[len(args) :] if name not in kwargs]:
            called = f"{called} Missing: {', '.join(missing)}."
        if strange := [name for name in kwargs if name not in names]:
            cure = "Give inputs by their captured names." if missing else "Labels are no input: leave them out."
            return (
                f"{called} Not captured: {', '.join(strange)}. {cure} A further argument of the model must be there "
                "when it is traced."
            )
        return (
            f"{called} Arguments left at their default at the capture are part of the graph: pass the captured ones, "
            "or trace again with the others."
        )


def _check_constant(leaf: Any, expected: Input) -> None:
    if not isinstance(expected.sample, torch.SymInt | torch.SymFloat) and leaf != expected.sample:
        raise InputError(
            f"input `{expected.name}` is {leaf!r}; the capture holds for {expected.sample!r} only. Trace again."
        )


def _check_tensor(leaf: Any, expected: Input) -> None:
    """Raise unless the input is a tensor of the captured dtype and kind of device."""
    sample = expected.sample
    if not isinstance(leaf, Tensor):
        kind = type(leaf).__name__
        cure = "Convert it: torch.from_numpy(array)." if kind == "ndarray" else "Give the tensor itself."
        raise InputError(
            f"input `{expected.name}` is a {kind}; captured was a tensor {list(expected.sizes or ())}. {cure}"
        )
    if leaf.dtype != sample.dtype or leaf.device.type != sample.device.type:
        raise InputError(
            f"input `{expected.name}` is {leaf.dtype} on {leaf.device}; captured was {sample.dtype} on "
            f"{sample.device}. Convert the input, or convert the model and trace again."
        )


def _fits(shape: torch.Size, sizes: tuple[int | str, ...], free: dict[str, int]) -> bool:
    """Whether a shape has the captured sizes; `free` holds the free sizes met so far, and takes the new ones."""
    if len(shape) != len(sizes):
        return False
    for size, known in zip(shape, sizes, strict=True):
        if isinstance(known, int):
            if size != known:
                return False
        elif known.isidentifier() and free.setdefault(known, size) != size:
            return False
    return True
