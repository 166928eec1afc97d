"""The walk over a graph: which channel ids every axis carries, and which entries do not depend on the input.

An axis is a row-major product of factors. A factor either carries a vector of ids or is opaque (batch, space, time).
What is known about a value is kept in reduced form, one entry per combination of ids and none for opaque factors,
so that an operator applied to the reduced values is the operator applied to the constant channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import sympy
import torch
from torch import Tensor, fx

from fxprune.channels.ids import Classes, Ids, Mask, Vector
from fxprune.channels.registry import rule_of
from fxprune.graph.mutation import is_mutating, written
from fxprune.graph.text import describe

Size: TypeAlias = Any
Floats: TypeAlias = np.ndarray[Any, np.dtype[np.float64]]
Factor: TypeAlias = tuple[Size, Vector | None]
Axis: TypeAlias = tuple[Factor, ...]
Known: TypeAlias = Tensor | bool


@dataclass
class Val:
    """A tensor value: its axes, and where `known` (True: everywhere, False: nowhere) its reduced `value`.

    `border` marks known entries that are surrounded by zeros or averaged with them (a constant channel after zero
    padding): multiples of one map over space, the same for every channel; `sums` that
    the last axis holds weights which sum to one; `source` the parameter that the value is.
    """

    axes: tuple[Axis, ...]
    known: Known = False
    value: Tensor | None = None
    border: Tensor | None = None
    sums: bool = False
    source: str | None = None

    def mask(self) -> Tensor:
        """`known` as a tensor of the reduced shape."""
        if isinstance(self.known, Tensor):
            return self.known
        return torch.full([length(a) for a in self.axes], self.known, dtype=torch.bool)

    def inner(self) -> Tensor:
        """`known` without borders."""
        return self.mask() if self.border is None else self.mask() & ~self.border

    def sizes(self) -> list[Size]:
        return [size(a) for a in self.axes]


@dataclass
class Reader:
    """A contraction: it needs column i (ids `columns[g, i]`) while a row with a non-zero weight there is alive.

    Attributes:
        rows: output ids, [groups, rows]; None where the output always needs the columns.
        columns: input ids, [groups, columns].
        used: [groups, rows, columns], weights that are not zero.
        soft: [groups, columns], columns that are not needed: they are zero, fold or merge.
        constant: [groups, columns], value of the known input channels, NaN elsewhere.
        folds, merges: [groups, columns], non-zero constants that go into the bias, into a representative column.
        table: the weight as a view [groups, rows, columns, taps].
        source: name of the parameter that `table` is a view of.
        bias: position of the bias in the node's arguments, -1 where the operator has none.
        key: the same for the same layer in every graph.
    """

    node: fx.Node
    rows: Vector | None
    columns: Vector
    used: Mask
    soft: Mask | None = None
    constant: Floats | None = None
    folds: Mask | None = None
    merges: Mask | None = None
    table: Tensor | None = None
    source: str | None = None
    bias: int = -1
    key: Any = None


@dataclass
class Balance:
    """Groups of a convolution: each remaining group keeps equally many inputs [G, n] and outputs [G, m]."""

    node: fx.Node
    inputs: Vector
    outputs: Vector
    weight: str
    transposed: bool


def size(axis: Axis) -> Size:
    return math.prod((f[0] for f in axis), start=1)


def length(axis: Axis) -> int:
    """The axis' length in reduced form."""
    return math.prod(len(f[1]) for f in axis if f[1] is not None)


def carries(axis: Axis) -> bool:
    return any(f[1] is not None for f in axis)


def opaque(extent: Size) -> Axis:
    return () if type(extent) is int and extent == 1 else ((extent, None),)


def same(a: Size, b: Size) -> bool:
    if type(a) is int and type(b) is int:
        return a == b
    return bool(_expression(a) == _expression(b))


def quotient(a: Size, b: Size) -> Size | None:
    """a / b where that is a whole number (or a whole multiple of a symbol), else None."""
    if type(a) is int and type(b) is int:
        return a // b if b and a % b == 0 else None
    ratio = sympy.cancel(_expression(a) / _expression(b))
    if sympy.denom(ratio) != 1:
        return None
    return int(ratio) if ratio.is_Integer else ratio


def _expression(extent: Size) -> Any:
    return sympy.Integer(extent) if type(extent) is int else getattr(getattr(extent, "node", None), "expr", extent)


class Walk:
    """Walks one graph. `facts=False` relates ids only, for a graph that shares its parameters with an analyzed one.

    Attributes:
        env: what is known of every node: a `Val`, a list of them, or None.
        readers, balances: the contractions met.
        edits: how to rewrite nodes once it is known which ids stay.
        parameters: qualified name -> ids of each axis, shared between the walks of one module.
        aligned: the id vectors of each convolution, and whether it is depthwise.
        nonempty: id vectors of which something must remain.
        uses: how often each parameter is read.
    """

    def __init__(
        self,
        graph: fx.Graph,
        ids: Ids,
        parameters: dict[str, list[Vector | None]],
        tensors: dict[str, Tensor],
        facts: bool,
    ) -> None:
        self.graph, self.ids, self.facts, self._tensors = graph, ids, facts, tensors
        self.env: dict[fx.Node, Any] = {}
        self.readers: list[Reader] = []
        self.balances: list[Balance] = []
        self.edits: list[Callable[[Any], None]] = []
        self.parameters = parameters
        self.aligned: list[tuple[list[Vector], bool]] = []
        self.nonempty: list[Vector] = []
        self.uses: dict[str, int] = {}
        self._alias: dict[fx.Node, fx.Node] = {}
        self._bases: set[fx.Node] = set()
        self._mutated = self._written_targets()
        for read in graph.find_nodes(op="get_attr"):
            self.uses[str(read.target)] = self.uses.get(str(read.target), 0) + len(read.users)
        for node in graph.nodes:
            if node.op == "placeholder":
                self.env[node] = self.unknown(node)
            elif node.op == "get_attr":
                self.env[node] = self._parameter(node)
            elif node.op == "output":
                for value in node.all_input_nodes:
                    self.pin(node, value, "the model returns it")
            elif node.op == "call_function":
                rule = rule_of(node.target)
                self.env[node] = rule(self, node) if rule else self.refuse(node)
                if is_mutating(node):
                    self._mutate(node)

    # ---- what rules use

    def val(self, argument: Any) -> Val:
        """The value of a tensor argument."""
        value = self.env[argument]
        assert isinstance(value, Val), argument
        return value

    def shape(self, node: fx.Node) -> Sequence[Size]:
        """Of a node's value, or of the first of several."""
        value = node.meta["val"]
        return tuple((value[0] if isinstance(value, list | tuple) else value).shape)

    def pin(self, node: fx.Node, what: Any, why: str, dims: Sequence[int] | None = None) -> None:
        """Pin ids: of a vector, of an axis, or of (some axes of) the value of a node."""
        if isinstance(what, fx.Node):
            what = self.env.get(what)
        if isinstance(what, list):
            for item in what:
                self.pin(node, item, why)
        elif isinstance(what, Val):
            for d, axis in enumerate(what.axes):
                if dims is None or d in dims or d - len(what.axes) in dims:
                    self.pin(node, axis, why)
        elif isinstance(what, tuple):
            for factor in what:
                if factor[1] is not None:
                    self.pin(node, factor[1], why)
        elif isinstance(what, np.ndarray):
            self.ids.pin(what, lambda: f"{describe(node)}: {why}")

    def refuse(self, node: fx.Node, why: str = "no rule for this operator") -> Any:
        """Pin everything that `node` touches; nothing is known of its results."""
        for value in node.all_input_nodes:
            self.pin(node, value, why)
        return self.unknown(node)

    def unknown(self, node: fx.Node) -> Any:
        """Opaque values in the shapes that the node has."""

        def unknown(value: Any) -> Any:
            if isinstance(value, Tensor):
                return Val(tuple(opaque(s) for s in value.shape))
            return [unknown(v) for v in value] if isinstance(value, list | tuple) else None

        return unknown(node.meta.get("val"))

    def vector(self, node: fx.Node, axis: Axis) -> Vector | None:
        """The ids of an axis, one per index; None for an opaque one. Pins ids that merge with a symbolic factor."""
        if len(axis) == 1:
            return axis[0][1]
        if not carries(axis):
            return None
        if not all(type(f[0]) is int for f in axis):
            self.pin(node, axis, "merged with an axis of free size")
            return None
        whole: Vector | None = None
        outer = 1
        for extent, ids in reversed(axis):
            if whole is None:
                whole, outer = (None, outer * extent) if ids is None else (np.repeat(ids, outer), 0)
            else:
                whole = np.tile(whole, extent) if ids is None else self.ids.product(ids, whole)
        return whole

    def flat(self, node: fx.Node, val: Val, dim: int) -> Val:
        """`val` with the factors of one axis merged into one."""
        axis = val.axes[dim]
        if len(axis) <= 1:
            return val
        ids = self.vector(node, axis)
        return self.relayout(val, dim, ((size(axis), ids),))

    def merged(self, node: fx.Node, val: Val, dim: int) -> tuple[Val, Vector | None]:
        """`val` with the factors of one axis merged, and the ids of this axis."""
        val = self.flat(node, val, dim)
        return val, val.axes[dim][0][1] if val.axes[dim] else None

    def relayout(self, val: Val, dim: int, target: Axis) -> Val:
        """`val` with an axis described as `target`: the same factors or one merged one, some of them now opaque."""
        axis = val.axes[dim]
        dim %= len(val.axes)
        axes = (*val.axes[:dim], target, *val.axes[dim + 1 :])
        if val.known is False or not axis or axis is target:
            return replace(val, axes=axes)
        if not carries(target):
            target = tuple((f[0], None) for f in axis)
        if len(target) == len(axis) and all(
            t[1] is not None or f[1] is None for f, t in zip(axis, target, strict=True)
        ):
            return replace(val, axes=axes)
        known, value, border = val.mask(), val.value, val.border
        assert value is not None
        shape = known.shape
        parts = [1 if f[1] is None else len(f[1]) for f in axis]
        split = (*shape[:dim], *parts, *shape[dim + 1 :])
        if len(target) == len(axis):
            lost = [
                dim + i for i, (f, t) in enumerate(zip(axis, target, strict=True)) if t[1] is None and f[1] is not None
            ]
            known, value = known.reshape(split), value.reshape(split)
            if border is not None:
                known = known & ~border.reshape(split)
            for d in lost:
                first = value.narrow(d, 0, 1)
                known = known.all(d, keepdim=True) & (value == first).all(d, keepdim=True)
                value = first
            border = None
        else:
            full = (*shape[:dim], *(f[0] for f in axis), *shape[dim + 1 :])
            known, value = known.reshape(split).expand(full), value.reshape(split).expand(full)
            border = None if border is None else border.reshape(split).expand(full)
        final = (*shape[:dim], length(axes[dim]), *shape[dim + 1 :])
        return Val(
            axes,
            known.reshape(final),
            value.reshape(final),
            None if border is None else border.reshape(final),
            val.sums,
        )

    def blur(self, node: fx.Node, val: Val, dims: Sequence[int], why: str) -> Val:
        """`val` with the given axes opaque: their ids pinned, only what is uniform along them known."""
        for d in dims:
            if carries(val.axes[d]):
                self.pin(node, val.axes[d], why)
                val = self.relayout(val, d, tuple((f[0], None) for f in val.axes[d]))
        return val

    def join(self, node: fx.Node, axes: Sequence[Axis]) -> Axis:
        """Unify axes that broadcast against each other."""
        live = [a for a in axes if a]
        if len(live) <= 1:
            return live[0] if live else ()
        if not any(map(carries, live)):
            return live[0]
        if all(len(a) == len(live[0]) and all(same(f[0], g[0]) for f, g in zip(a, live[0], strict=True)) for a in live):
            out = []
            for factors in zip(*live, strict=True):
                vectors = [f[1] for f in factors]
                if any(v is None for v in vectors):
                    for v in vectors:
                        self.pin(node, v, "meets an axis that carries no channels")
                    out.append((factors[0][0], None))
                    continue
                for v in vectors[1:]:
                    self.ids.unify(vectors[0], v)
                out.append(factors[0])
            return tuple(out)
        return self.join(node, [((size(a), self.vector(node, a)),) for a in live])

    def broadcast(self, node: fx.Node, vals: Sequence[Val]) -> tuple[tuple[Axis, ...], list[Val]]:
        """Joined axes of values that broadcast against each other, and the values laid out that way."""
        rank = max((len(v.axes) for v in vals), default=0)
        padded = [v if len(v.axes) == rank else self.lead(v, rank - len(v.axes)) for v in vals]
        out = []
        for d in range(rank):
            axis = self.join(node, [v.axes[d] for v in padded])
            out.append(axis)
            padded = [v if v.axes[d] is axis or not v.axes[d] else self.relayout(v, d, axis) for v in padded]
        return tuple(out), padded

    def lead(self, val: Val, count: int) -> Val:
        """`val` with leading axes of size one."""
        if val.known is False:
            return Val(((),) * count + val.axes)
        index = (None,) * count
        return replace(
            val,
            axes=((),) * count + val.axes,
            known=val.known[index] if isinstance(val.known, Tensor) else val.known,
            value=None if val.value is None else val.value[index],
            border=None if val.border is None else val.border[index],
            source=None,
        )

    def shared_storage(self, result: fx.Node, base: fx.Node) -> None:
        """`result` may be a view of `base`."""
        self._alias[result] = self._alias.get(base, base)
        self._bases.add(self._alias[result])

    def is_view(self, node: fx.Node) -> bool:
        """Whether `node` may share its memory with another value."""
        return node in self._alias or node in self._bases

    # ---- internal

    def _parameter(self, node: fx.Node) -> Val | None:
        name = str(node.target)
        if name not in self.parameters:
            return self.unknown(node)  # type: ignore[no-any-return]
        tensor = self._tensors[name]
        axes = tuple(
            opaque(s) if v is None else ((s, v),) for s, v in zip(tensor.shape, self.parameters[name], strict=True)
        )
        if name in self._mutated:
            self.pin(node, Val(axes), "a buffer that the graph writes to")
            return Val(axes)
        if not self.facts:
            return Val(axes, source=name)
        return Val(axes, True, tensor.detach(), source=name)

    def _written_targets(self) -> set[str]:
        found = set()
        for node in self.graph.nodes:
            stack = _overwritten(node)
            while stack:
                base = stack.pop()
                if base.op == "get_attr":
                    found.add(str(base.target))
                elif base.op == "call_function":
                    stack += base.all_input_nodes[:1]
        return found

    def _mutate(self, node: fx.Node) -> None:
        for target in _overwritten(node):
            root = self._alias.get(target, target)
            for other in [root, *(n for n, r in self._alias.items() if r is root)]:
                value = self.env.get(other)
                if other is not node and isinstance(value, Val):
                    self.env[other] = Val(value.axes)
            if isinstance(self.env[node], Val) and len(self.env[node].axes) == len(self.shape(target)):
                self.env[target] = replace(self.env[node], source=None)


def _overwritten(node: fx.Node) -> list[fx.Node]:
    """The arguments whose values a node changes; `detach_` counts as writing and changes none."""
    return [] if node.target is torch.ops.aten.detach_.default else written(node)


@dataclass
class Coupling:
    """The relations of all graphs of a module, resolved.

    Attributes:
        walks: by mode; the eval walk also holds what is constant.
        parameters: qualified name -> ids of each axis (None: size one).
        classes: what the ids resolve to.
        shared: for a tensor with several names, all of them under the first.
        tensors: the parameters and buffers that the graphs read.
    """

    ids: Ids
    walks: dict[str, Walk]
    parameters: dict[str, list[Vector | None]]
    classes: Classes
    shared: dict[str, list[str]]
    tensors: dict[str, Tensor]

    def of(self, ids: Vector) -> Vector:
        return self.classes.of[ids]


def couple(root: torch.nn.Module, graphs: dict[str, fx.Graph], facts: bool = True) -> Coupling:
    """Walk every graph over one set of ids; facts are taken from the eval graph."""
    ids = Ids()
    stored: dict[str, Tensor] = dict(root.named_parameters(remove_duplicate=False))
    stored |= dict(root.named_buffers(remove_duplicate=False))
    read = {str(node.target): None for graph in graphs.values() for node in graph.find_nodes(op="get_attr")}
    tensors = {name: stored[name] for name in read if name in stored and stored[name].numel()}
    parameters, shared = _tie(tensors, ids)
    with torch.no_grad():
        walks = {
            mode: Walk(graphs[mode], ids, parameters, tensors, facts and mode == "eval") for mode in sorted(graphs)
        }
    return Coupling(ids, walks, parameters, ids.solve(), shared, tensors)


def _tie(tensors: dict[str, Tensor], ids: Ids) -> tuple[dict[str, list[Vector | None]], dict[str, list[str]]]:
    """Give one set of ids to the names of one tensor; pin tensors that overlap in memory without being the same."""
    parameters: dict[str, list[Vector | None]] = {}
    owners: dict[int, list[str]] = {}
    for name, tensor in tensors.items():
        names = owners.setdefault(tensor.untyped_storage().data_ptr(), [])
        first = next((n for n in names if tensors[n] is tensor), None)
        parameters[name] = parameters[first] if first else [ids.fresh(s) if s != 1 else None for s in tensor.shape]
        if first is None and names:
            for vector in (v for other in (name, names[0]) for v in parameters[other] if v is not None):
                ids.pin(vector, lambda a=name, b=names[0]: f"`{a}` and `{b}` share memory")  # type: ignore[misc]
        names.append(name)
    return parameters, {names[0]: names for names in owners.values() if len(names) > 1}
