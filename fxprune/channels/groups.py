"""Channel groups: what must be masked together so that it can be removed, and what removing it saves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.utils._pytree as pytree
from numpy.typing import NDArray
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from fxprune.channels import coupling
from fxprune.channels.coupling import Val, carries
from fxprune.channels.ids import Classes, Ids, Mask, Vector
from fxprune.graph import flop_counter
from fxprune.traced import TracedModule


@dataclass(frozen=True)
class Member:
    """One axis of a parameter that a group cuts.

    Attributes:
        parameter, axis: which.
        role: "writer" (rows of a weight, biases, gains: they are masked) or "reader" (columns, which go with them).
    """

    parameter: str
    axis: int
    role: str


@dataclass(frozen=True)
class ChannelGroup:
    """Channels that are alike; each of its units is a set of slices that is masked, and removed, as a whole.

    Attributes:
        name: the first weight that writes it.
        kind: "channel", "attention head", "head channel" or "MLP unit".
        size: number of units.
        members: the parameter axes involved, writers first.
        macs, parameters: multiply-accumulates (at the sample inputs) and parameters that one unit saves.
        reason: why it may not be pruned, None where it may.
        aligned: whether a convolution has these channels.
    """

    name: str
    kind: str
    size: int
    members: tuple[Member, ...]
    macs: int
    parameters: int
    reason: str | None
    aligned: bool
    units: Vector = field(repr=False, compare=False)
    bundles: Vector = field(repr=False, compare=False)


class _Segments:
    """Many class vectors as one array, so that what is left of each is found at once."""

    def __init__(self, vectors: Sequence[Vector]) -> None:
        self._sizes = np.array([len(v) for v in vectors], np.int64)
        self._joined = np.concatenate(vectors) if vectors else np.zeros(0, np.int64)
        self._starts = np.cumsum([0, *self._sizes[:-1]]) if len(vectors) else np.zeros(0, np.int64)

    def fractions(self, left: Mask) -> NDArray[np.float64]:
        """The alive fraction of each vector."""
        if not len(self._sizes):
            return np.zeros(0)
        return np.add.reduceat(left[self._joined].astype(np.int64), self._starts) / self._sizes


class Grouping:
    """The groups of a module without reparametrizations, and what a choice of units leaves of it.

    Attributes:
        groups: those that may be pruned first, then those that may not.
        axes: (parameter, axis, class of each index), of every parameter axis that carries channels.
        readers: the axes that a contraction sums over.
        positions: pairs (unit, class of a grid position that it is a factor of).
    """

    def __init__(self, plain: TracedModule) -> None:
        self.plain, self.found = plain, coupling(plain)
        classes = self.found.classes
        self._fixed: Mask = classes.pinned.copy()
        classes.close(self._fixed)
        self._tied = _entangled(classes)
        unit, grid = _factors(classes.whole, classes.left, classes.right)
        others = np.flatnonzero(self._tied != np.arange(classes.count))
        pairs = np.unique(
            np.stack([np.concatenate([self._tied[unit], self._tied[others]]), np.concatenate([grid, others])]), axis=1
        )
        self.positions = self._unit, self._grid = pairs[0], pairs[1]
        self._parameters = dict(plain.named_parameters(remove_duplicate=False))
        vectors = self.found.parameters.items()
        self.axes = [
            (name, a, self.found.of(v))
            for name, axes in vectors
            for a, v in enumerate(axes)
            if v is not None and name in self._parameters
        ]
        self.readers = self._reader_axes()
        costs = self._contractions()
        self._full = np.ones(classes.count, bool)
        self._cost = np.array([cost for cost, _ in costs])
        self._cost_of = np.repeat(np.arange(len(costs)), [len(vectors) for _, vectors in costs])
        self._contracted = _Segments([v for _, vectors in costs for v in vectors])
        first = {name: i for i, (name, _) in enumerate(plain.named_parameters())}
        self._sizes = np.array([float(p.numel()) for p in plain.parameters()])
        counted = [(first[name], v) for name, _, v in self.axes if name in first]
        self._size_of = np.array([i for i, _ in counted], np.int64)
        self._counted = _Segments([v for _, v in counted])
        self._members = _Segments([v for _, _, v in self.axes])
        self.groups = self._group()

    def alive(self, dead: Vector) -> Mask:
        """The classes that are left when the units `dead` are masked."""
        left = self._full.copy()
        left[self.expand(dead)] = False
        self.found.classes.close(left)  # a position that another grid keeps brings back what it depends on
        return left

    def expand(self, units: Vector) -> Vector:
        """The units, and every grid position that one of them is a factor of."""
        chosen = np.zeros(self.found.classes.count, bool)
        chosen[units] = True
        chosen[self._grid[chosen[self._unit]]] = True
        return np.flatnonzero(chosen)

    def macs(self, alive: Mask | None = None) -> int:
        """Multiply-accumulates at the sample inputs of what is left."""
        shares = np.ones(len(self._cost))
        if alive is not None:
            np.multiply.at(shares, self._cost_of, self._contracted.fractions(alive))
        return round(float((self._cost * shares).sum()))

    def parameters(self, alive: Mask | None = None) -> int:
        """The parameters that are left."""
        shares = np.ones(len(self._sizes))
        if alive is not None:
            np.multiply.at(shares, self._size_of, self._counted.fractions(alive))
        return round(float((self._sizes * shares).sum()))

    def _reader_axes(self) -> set[tuple[str, int]]:
        """The axes of weights that a contraction sums over."""
        found = set()
        for walk in self.found.walks.values():
            for reader in walk.readers:
                rows = None if reader.rows is None else self.found.of(reader.rows.reshape(-1))
                for argument in reader.node.all_input_nodes:
                    value = walk.env.get(argument)
                    if rows is None or not isinstance(value, Val) or value.source is None or len(value.axes) < 2:
                        continue
                    for a, v in enumerate(self.found.parameters[value.source]):
                        if v is not None and not np.array_equal(self.found.of(v), rows):
                            found.add((value.source, a))
        return found

    def _contractions(self) -> list[tuple[float, list[Vector]]]:
        """The cost of each contraction, and the class vectors whose alive fractions it is proportional to."""
        walk = self.found.walks["eval"]
        costs = []
        for node, cost in _macs_by_node(self.plain).items():
            values = [walk.env.get(argument) for argument in node.all_input_nodes]
            weight = next((v.source for v in values if isinstance(v, Val) and v.source and len(v.axes) > 1), None)
            if weight is not None:
                vectors = [v for v in self.found.parameters[weight] if v is not None]
            else:
                out = walk.env[node]
                axes = out.axes if isinstance(out, Val) else ()
                vectors = [f[1] for axis in axes if carries(axis) for f in axis if f[1] is not None]
                vectors += [r.columns.reshape(-1) for r in walk.readers if r.node is node]
            costs.append((cost, [self.found.of(v) for v in vectors]))
        return costs

    def _group(self) -> list[ChannelGroup]:
        classes = self.found.classes
        kind = np.zeros(classes.count, np.uint64)  # 0 plain, 1 outer and 2 inner factor of a grid, 3 position of one
        for code, members in ((2, classes.right), (1, classes.left), (3, classes.whole)):
            kind[members] = code
        # units are alike that the same weights write: equal sums of one random number a weight
        random, signature = np.random.default_rng(0), np.zeros(classes.count, np.uint64)
        for name, a, vector in self.axes:
            if (name, a) not in self.readers and self._parameters[name].dim() > 1:
                present = np.zeros(classes.count, bool)
                present[vector] = True
                present[self._unit[present[self._grid]]] = True
                signature[present] += random.integers(2**62, dtype=np.uint64)
        kind[self._tied != np.arange(classes.count)] = 3
        extent = np.bincount(self._unit, minlength=classes.count)
        candidates = np.flatnonzero((kind != 3) & (signature != 0))
        if not len(candidates):
            return []
        keys = (signature, kind, extent.astype(np.uint64), self._fixed.astype(np.uint64))
        key = np.stack([k[candidates] for k in keys])
        of = np.unique(key, axis=1, return_inverse=True)[1].reshape(-1)
        found = [self._describe(candidates[of == g], int(kind[candidates[of == g][0]])) for g in range(of.max() + 1)]
        order = {name: i for i, (name, _, _) in enumerate(self.axes)}
        return sorted(found, key=lambda g: (g.reason is not None, order[g.name], g.kind))

    def _describe(self, units: Vector, grid: int) -> ChannelGroup:
        classes, every = self.found.classes, ~self.alive(units)
        members = [
            Member(name, a, "reader" if (name, a) in self.readers else "writer")
            for (name, a, _), share in zip(self.axes, self._members.fractions(every), strict=True)
            if share
        ]
        members.sort(key=lambda m: (m.role == "reader", self._parameters[m.parameter].dim() < 2))
        spatial = any(self._parameters[m.parameter].dim() > 2 for m in members)
        sums = sum(m.role == "reader" for m in members)
        kind = "MLP unit" if not spatial and sums == 1 and len(members) <= 5 else "channel"
        if grid:
            kind = ("attention head", "head channel")[grid - 1] if not spatial else "channel"
        reason = None
        if self._fixed[units[0]]:
            pinned = np.flatnonzero(classes.pinned & every)
            reason = classes.reasons[classes.reason[pinned[0]]]() if len(pinned) else "part of a grid that stays"
        one = self.alive(units[:1])
        return ChannelGroup(
            members[0].parameter, kind, len(units), tuple(members), self.macs() - self.macs(one),
            self.parameters() - self.parameters(one), reason, spatial, units, self._bundles(units),
        )  # fmt: skip

    def _bundles(self, units: Vector) -> Vector:
        """The units as a matrix [groups of a convolution, units], whose rows must keep equally many."""
        for walk in self.found.walks.values():
            for balance in walk.balances:
                for ids in (balance.inputs, balance.outputs):
                    matrix = self.found.of(ids)
                    if matrix.size == len(units) and np.array_equal(np.sort(matrix, axis=None), np.sort(units)):
                        return matrix
        return units[None]


def _entangled(classes: Classes) -> Vector:
    """For each class the unit that stands for it.

    A position of several grids (a shuffle after a shuffle) dies with a factor of each of them: their inner factors
    are one unit.
    """
    ids = Ids()
    ids.fresh(classes.count)
    order = np.argsort(classes.whole, kind="stable")
    same = classes.whole[order[1:]] == classes.whole[order[:-1]]
    ids.unify(classes.right[order[1:][same]], classes.right[order[:-1][same]])
    of = ids.solve().of
    first = np.full(of.max(initial=0) + 1, classes.count, np.int64)
    np.minimum.at(first, of, np.arange(classes.count))
    return first[of]


def _factors(whole: Vector, left: Vector, right: Vector) -> tuple[Vector, Vector]:
    """Pairs (factor, grid position), also of grids whose factors are positions of a smaller grid."""
    pairs = np.unique(np.stack([np.concatenate([left, right]), np.concatenate([whole, whole])]), axis=1)
    while pairs.shape[1]:
        inner = pairs[:, np.isin(pairs[1], pairs[0])]
        order = np.argsort(pairs[0], kind="stable")
        start = np.searchsorted(pairs[0][order], inner[1], "left")
        stop = np.searchsorted(pairs[0][order], inner[1], "right")
        further = [(f, pairs[1][order[i]]) for f, a, b in zip(inner[0], start, stop, strict=True) for i in range(a, b)]
        longer = np.unique(np.concatenate([pairs, np.array(further, np.int64).reshape(-1, 2).T], axis=1), axis=1)
        if longer.shape[1] == pairs.shape[1]:
            break
        pairs = longer
    return pairs[0], pairs[1]


def _macs_by_node(traced: TracedModule) -> dict[fx.Node, float]:
    """Multiply-accumulates of every node of the eval graph, by torch's formulas, on tensors without storage."""
    costs: dict[fx.Node, float] = {}

    class Count(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            before = counter.get_total_flops()
            result = super().run_node(n)
            if cost := counter.get_total_flops() - before:
                costs[n] = cost / 2
            return result

    leaves = pytree.tree_leaves((traced.example_args, traced.example_kwargs))
    counter = flop_counter()
    with FakeTensorMode(allow_non_fake_inputs=True) as fake, torch.no_grad(), counter:
        inputs = [fake.from_tensor(t) if isinstance(t, torch.Tensor) else t for t in leaves]
        Count(traced, graph=traced.graphs["eval"]).run(*inputs, enable_io_processing=False)
    return costs


def table(groups: Sequence[ChannelGroup]) -> str:
    """The groups as text, one a line."""
    lines = [f"{'group':40} {'kind':15} {'units':>6} {'MACs each':>12} {'parameters':>11}  members, or why it stays"]
    for g in groups:
        members = (f"{m.parameter}[{m.axis}]{'' if m.role == 'writer' else ' read'}" for m in g.members)
        what = g.reason or ", ".join(members)
        lines.append(f"{g.name:40} {g.kind:15} {g.size:6} {g.macs:12,} {g.parameters:11,}  {what}")
    return "\n".join(lines) + "\n"
