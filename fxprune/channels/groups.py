"""Channel groups: what must be masked together so that it can be removed, and what removing it saves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fxprune.channels.costs import moved, node_costs
from fxprune.channels.coupling import coupling
from fxprune.channels.ids import Ids, Mask, Vector
from fxprune.channels.liveness import Consistency
from fxprune.channels.readers import Balance
from fxprune.graph.text import describe
from fxprune.graph.traced import TracedModule

Scores = NDArray[np.float64]
Balanced = tuple[Vector, Vector]
Term = tuple[float, Sequence[Vector], Balanced | None]


@dataclass(frozen=True)
class Member:
    """One axis of a parameter that a group cuts.

    Attributes:
        parameter, axis: which.
        role: "writer" (rows of a weight, biases, gains) or "reader" (columns, which a contraction sums over).
    """

    parameter: str
    axis: int
    role: str


@dataclass(frozen=True)
class ChannelGroup:
    """Channels that are alike; each of its units is a set of slices that is masked, and removed, as a whole.

    Attributes:
        name: the first weight that writes it.
        kind: "channel", "attention head", "key-value group", "head channel", "MLP unit" or "conv group".
        size: number of units.
        members: the parameter axes involved, writers first.
        macs, parameters: multiply-accumulates (at the sample inputs) and parameters that one unit saves.
        traffic: elements that convolutions and linear layers then neither read nor write (at the sample inputs).
        reason: why it may not be pruned, None where it may.
        aligned: whether a convolution has these channels.
    """

    name: str
    kind: str
    size: int
    members: tuple[Member, ...]
    macs: int
    parameters: int
    traffic: int
    reason: str | None
    aligned: bool
    units: Vector = field(repr=False, compare=False)
    cells: Vector = field(repr=False, compare=False)
    share: Vector = field(repr=False, compare=False)
    block: int = field(repr=False, compare=False)


class _Products:
    """A sum of terms, each in proportion to the alive shares of class vectors, for some within groups of channels."""

    def __init__(self, terms: Sequence[Term]) -> None:
        index: dict[bytes, int] = {}
        vectors: list[Vector] = []
        self._values = np.array([value for value, _, _ in terms])
        self._at, term = [], []
        for i, (_, own, _) in enumerate(terms):
            for vector in own:
                k = index.setdefault(vector.tobytes(), len(vectors))
                vectors += [vector] * (k == len(vectors))
                self._at.append(k)
                term.append(i)
        self._term, self._flat = np.array(term, np.int64), _flatten(vectors)[0]
        lengths = np.array([len(v) for v in vectors])
        self._lengths, self._starts = lengths, np.cumsum([0, *lengths[:-1]]).astype(np.int64)
        self._within = [(i, within) for i, (_, _, within) in enumerate(terms) if within is not None]

    def __call__(self, alive: Mask) -> int:
        """The sum that is left."""
        shares = np.ones(len(self._values))
        if len(self._flat):
            left = np.add.reduceat(alive[self._flat].astype(np.int64), self._starts) / self._lengths
            np.multiply.at(shares, self._term, left[self._at])
        for i, (inputs, outputs) in self._within:
            shares[i] /= max((alive[inputs].any(1) | alive[outputs].any(1)).mean(), 1e-9)
        return round(float(self._values @ shares))


class Grouping:
    """The groups of a module without reparametrizations, and what a choice of units leaves of it.

    A unit is named by a class of ids, the factor of a grid or a channel of its own; masking it kills `killed` classes.

    Attributes:
        groups: those that may be pruned first, then those that may not.
        axes: (parameter, axis, index of its class vector), of every parameter axis that carries channels.
        vectors: the class vectors of these axes.
        readers: the axes that a contraction sums over.
        grouped: for the weights of grouped convolutions the classes of axis 1, [groups, channels within each].
        consistency: what every choice keeps.
        macs, parameters, traffic: what is left, by the classes that are alive; `dense` has all of the whole model.
    """

    def __init__(self, plain: TracedModule) -> None:
        self.plain, self.found = plain, coupling(plain)
        classes = self.found.classes
        self.consistency = Consistency.of(self.found, {n for g in plain.graphs.values() for n in g.nodes})
        self._fixed: Mask = classes.pinned.copy()
        classes.close(self._fixed)
        self._parameters = dict(plain.named_parameters(remove_duplicate=False))
        self._eval = self.found.walks["eval"]
        balances = {b.weight: b for walk in self.found.walks.values() for b in walk.balances}
        self.grouped = {
            name: self.found.of(b.outputs if b.transposed else b.inputs)
            for name, b in balances.items()
            if name in self._parameters
        }
        distinct: dict[bytes, int] = {}
        self.vectors: list[Vector] = []
        self.axes: list[tuple[str, int, int]] = []
        for name in self._parameters:
            for a, ids in enumerate(self.found.parameters.get(name, ())):
                grouped = a == 1 and name in self.grouped
                if ids is not None or grouped:
                    vector = self.grouped[name].reshape(-1) if grouped else self.found.of(ids)  # type: ignore[arg-type]
                    index = distinct.setdefault(vector.tobytes(), len(distinct))
                    self.vectors += [vector] * (index == len(self.vectors))
                    self.axes.append((name, a, index))
        self.readers = {
            (r.source, a)
            for walk in self.found.walks.values()
            for r in walk.readers
            if r.source is not None and r.rows is not None
            for a, v in enumerate(self.found.parameters[r.source])
            if not np.array_equal(v, r.rows.reshape(-1))  # type: ignore[arg-type]
        } - {(name, 1) for name, b in balances.items() if b.transposed}
        self._tied, self._convolutions = self._tie()
        factor, position = _factors(classes.left, classes.right, classes.whole)
        every = np.arange(classes.count)
        unit, dies = np.concatenate([self._tied[factor], self._tied]), np.concatenate([position, every])
        self._unit, self._dies = np.unique(np.stack([unit, dies]), axis=1)
        order = np.argsort(self._dies, kind="stable")
        self._class, self._killer = self._dies[order], self._unit[order]
        everything = np.ones(classes.count, bool)
        contractions, traffic = self._contractions()
        self.macs, self.traffic = _Products(contractions), _Products(traffic)
        own: dict[str, list[Vector]] = {name: [] for name, _ in plain.named_parameters()}
        for name, _, v in self.axes:
            own.get(name, []).append(self.vectors[v])
        within = {name: (self.found.of(b.inputs), self.found.of(b.outputs)) for name, b in balances.items()}
        self.parameters = _Products([(float(self._parameters[n].numel()), v, within.get(n)) for n, v in own.items()])
        self.dense = self.macs(everything), self.parameters(everything), self.traffic(everything)
        self.groups = self._group()

    def killed(self, units: Vector) -> Mask:
        """The classes that die with `units`."""
        chosen = np.zeros(self.found.classes.count, bool)
        chosen[units] = True
        dead = np.zeros_like(chosen)
        dead[self._dies[chosen[self._unit]]] = True
        return dead

    def repair(
        self, gone: Vector | None = None, ranks: Sequence[tuple[ChannelGroup, Scores]] = (), align: int | str = 1
    ) -> Repair:
        """What makes choices consistent.

        Args:
            gone: units that are masked whatever is chosen.
            ranks: groups with scores of their units; where a choice is left, those with high scores stay.
            align: as in `finalize`.
        """
        costs = np.zeros(self.found.classes.count)
        for group, scores in ranks:
            costs[group.units] = 1 - np.argsort(np.argsort(scores, kind="stable")) / len(scores)
        gone = np.zeros(0, np.int64) if gone is None else gone
        return Repair(self, self.consistency.aligned(align), gone, costs)

    def slices(self, name: str, axis: int, tensor: torch.Tensor) -> tuple[torch.Tensor, list[int]]:
        """A view of a tensor of a parameter's shape, and its axes that are not those of the class vector."""
        first = 1
        if axis == 1 and name in self.grouped:
            tensor, first = tensor.unflatten(0, (len(self.grouped[name]), -1)).transpose(1, 2), 2
        else:
            tensor = tensor.movedim(axis, 0)
        tensor = tensor.unsqueeze(-1)
        return tensor, list(range(first, tensor.dim()))

    def mask(self, name: str, axis: int, mask: torch.Tensor, alive: Mask) -> None:
        """Clear what is dead along an axis of a mask."""
        shape = [-1 if d == axis else 1 for d in range(mask.dim())]
        if axis == 1 and name in self.grouped:
            groups, width = self.grouped[name].shape
            mask, shape = mask.view(groups, -1, *mask.shape[1:]), [groups, 1, width, *shape[2:]]
        mask *= torch.from_numpy(alive).to(mask).reshape(shape)

    def unit_sums(self, values: Scores) -> Scores:
        """For each unit the sum over the classes that die with it."""
        sums: Scores = np.bincount(self._unit, values[self._dies], self.found.classes.count).astype(np.float64)
        return sums

    # ---- internal

    def _tie(self) -> tuple[Vector, Vector]:
        """For each class the unit that stands for it, and the classes that stand for groups of convolutions.

        (1) A position of several grids dies with a factor of each: the factors of grids that are alike (the heads of
        keys and of values), or the finest ones (a shuffle after a shuffle), are one unit. (2) The channels of one of
        many narrow groups of a convolution are one unit.
        """
        classes, ids = self.found.classes, Ids()
        ids.fresh(classes.count)
        extent = np.bincount(np.concatenate([classes.left, classes.right]), minlength=classes.count)
        finer = np.where(extent[classes.left] < extent[classes.right], classes.left, classes.right)
        order = np.argsort(classes.whole, kind="stable")
        same = classes.whole[order[1:]] == classes.whole[order[:-1]]
        one, two = order[:-1][same], order[1:][same]
        alike = _bijective(classes.left[one], classes.left[two]) & _bijective(classes.right[one], classes.right[two])
        for side, where in ((classes.left, alike), (classes.right, alike), (finer, ~alike)):
            ids.unify(side[one[where]], side[two[where]])  # (1)
        used = np.bincount(_flatten([m.reshape(-1) for pair in self.consistency.balances for m in pair])[0])
        positions = np.zeros(classes.count, bool)
        positions[classes.whole] = True
        grouped = []
        for inputs, outputs in self.consistency.balances:
            both = np.concatenate([inputs, outputs], axis=1)
            narrow = min(inputs.shape[1], outputs.shape[1]) == 1
            alone = len(both) >= both.shape[1] // 2 and (used[both] == 1).all()
            if (narrow or alone) and not self._fixed[both].any() and not positions[both].any():  # (2)
                ids.unify(np.repeat(both[:, :1], both.shape[1], axis=1).reshape(-1), both.reshape(-1))
                if not narrow:
                    grouped.append(both[:, 0])
        of = ids.solve().of
        first = np.full(int(of.max(initial=-1)) + 1, classes.count, np.int64)
        np.minimum.at(first, of, np.arange(classes.count))
        tied = first[of]
        return tied, tied[np.concatenate(grouped)] if grouped else np.zeros(0, np.int64)

    def _contractions(self) -> tuple[list[Term], list[Term]]:
        """MACs of the eval graph's nodes and elements that its layers move, and which channels these go with."""
        walk, of = self._eval, self.found.of
        readers = {r.node: r for r in walk.readers if r.rows is not None}
        costs: dict[Any, Term] = {}
        traffic: list[Term] = []
        for node in walk.graph.nodes:
            for macs, ids in node_costs(node, walk.env) if node.op == "call_function" else ():
                reader, within = readers.get(node), None
                if reader is not None and reader.rows is not None and ids is not None:
                    rows, columns = of(reader.rows), of(reader.columns)
                    vectors = [rows.reshape(-1), columns.reshape(-1)]
                    within = (columns, rows) if len(rows) > 1 else None
                    for elements, own in zip(moved(node) or (), ([0], [1], [0, 1]), strict=False):
                        traffic.append((float(elements), [vectors[i] for i in own], within if len(own) > 1 else None))
                else:
                    vectors = list({v.tobytes(): v for v in map(of, ids or ())}.values())
                key = (0 if within is None else len(within[0]), *(v.tobytes() for v in vectors))
                costs[key] = (macs + (costs[key][0] if key in costs else 0.0), vectors, within)
        return list(costs.values()), traffic

    def _group(self) -> list[ChannelGroup]:
        classes = self.found.classes
        count = classes.count
        flat, index = _flatten(self.vectors)
        at, unit = _join(self._class, self._killer, flat)
        touched = np.unique(np.stack([index[at], unit]), axis=1)  # (class vector, unit that cuts it)
        # units are alike that the same weights write: equal sums of one random number a weight
        random, alike = np.random.default_rng(0), np.zeros(count, np.uint64)
        number = np.zeros(len(self.vectors), np.uint64)
        for name, a, v in self.axes:
            if (name, a) not in self.readers and self._parameters[name].dim() > 1:
                number[v] ^= random.integers(2**63, dtype=np.uint64)
        np.add.at(alike, touched[1], number[touched[0]])
        kind = np.zeros(count, np.int64)  # 0 plain, 1 outer and 2 inner factor of a grid, 3 outer factor of outer ones
        kind[classes.right], kind[classes.left] = 2, 1
        outer = np.isin(classes.whole, classes.left)
        kind[classes.left[outer]], kind[classes.right[outer]] = 3, 1
        kind[self._convolutions] = 4
        fixed = np.zeros(count, bool)
        fixed[self._unit[self._fixed[self._dies]]] = True
        whole, index = _flatten(self.consistency.axes)  # units without which an axis would be empty
        at, unit = _join(self._class, self._killer, whole)
        pairs, counts = np.unique(np.stack([index[at], unit]), axis=1, return_counts=True)
        lone = pairs[1][counts == np.bincount(index)[pairs[0]]]
        position = np.zeros(count, bool)
        position[classes.whole] = True
        usable = (self._tied == np.arange(count)) & ~position & (alike != 0)
        candidates = np.flatnonzero(usable)
        if not len(candidates):
            return []
        block, cell, share = self._blocks(usable & ~fixed)
        self._block = block
        empties = np.zeros(count, bool)
        empties[lone] = True
        keys = (alike, kind, np.bincount(self._unit, minlength=count), block + 1, fixed, empties & ~fixed)
        key = np.stack([np.asarray(k, np.uint64)[candidates] for k in keys])
        of = np.unique(key, axis=1, return_inverse=True)[1].reshape(-1)
        group_of = np.full(count, -1, np.int64)
        group_of[candidates] = of
        inside = touched[:, group_of[touched[1]] >= 0]
        cut = np.unique(np.stack([group_of[inside[1]], inside[0]]), axis=1)
        vectors: list[set[int]] = [set() for _ in range(int(of.max()) + 1)]
        for g, v in cut.T.tolist():
            vectors[g].add(v)
        found = []
        for g, own in enumerate(vectors):
            units = candidates[of == g]
            members = [
                Member(n, a, "reader" if (n, a) in self.readers else "writer") for n, a, v in self.axes if v in own
            ]
            members.sort(key=lambda m: (m.role == "reader", self._parameters[m.parameter].dim() < 2))
            one = ~self.killed(units[:1])
            left = self.macs(one), self.parameters(one), self.traffic(one)
            macs, parameters, traffic = (dense - rest for dense, rest in zip(self.dense, left, strict=True))
            found.append(
                ChannelGroup(
                    members[0].parameter, self._kind(int(kind[units[0]]), members), len(units), tuple(members),
                    macs, parameters, traffic,
                    self._reason(units, fixed, empties), self._spatial(members), units, cell[units], share[units],
                    int(block[units[0]]),
                )
            )  # fmt: skip
        order = {name: i for i, name in reversed(list(enumerate(n for n, _, _ in self.axes)))}
        found.sort(key=lambda g: (order[g.name], g.kind))
        return self._checked(found)

    def _spatial(self, members: Sequence[Member]) -> bool:
        return any(self._parameters[m.parameter].dim() > 2 for m in members)

    def _kind(self, code: int, members: Sequence[Member]) -> str:
        if code == 4:
            return "conv group"
        if self._spatial(members):
            return "channel"
        if code:
            return ("attention head", "head channel", "key-value group")[code - 1]
        sums = sum(m.role == "reader" for m in members)
        return "MLP unit" if sums == 1 and len(members) <= 5 else "channel"

    def _reason(self, units: Vector, fixed: Mask, empties: Mask) -> str | None:
        classes = self.found.classes
        if fixed[units[0]]:
            pinned = np.flatnonzero(classes.pinned & self.killed(units))
            return classes.reasons[classes.reason[pinned[0]]]() if len(pinned) else "part of a grid that stays"
        return "the only channels of an axis" if empties[units[0]] else None

    def _blocks(self, usable: Mask) -> tuple[Vector, Vector, Vector]:
        """Units that the groups of convolutions tie: by class its block (-1: none), its cell, and its cell's share.

        Units of a cell take the same part of every group; groups stay equal where each cell of a block loses its share
        at a time. (1) A unit that takes as much from every group, or is a whole group, is free. Else (2) the fewest
        cells that take as much from every group when each loses one unit are a block, and (3) of other cells that hang
        together each loses the same fraction.
        """
        count = self.found.classes.count
        block, cell, share = np.full(count, -1, np.int64), np.zeros(count, np.int64), np.ones(count, np.int64)
        sides = [m for pair in self.consistency.balances for m in pair]
        if not sides:
            return block, cell, share
        groups, width = (np.array([m.shape[d] for m in sides]) for d in (0, 1))
        first = np.cumsum([0, *groups[:-1]])
        flat, side = _flatten([m.reshape(-1) for m in sides])
        rows = np.concatenate([f + np.repeat(np.arange(len(m)), m.shape[1]) for f, m in zip(first, sides, strict=True)])
        at, unit = _join(self._class, self._killer, flat)
        (unit, row), lost = np.unique(np.stack([unit, rows[at]]), axis=1, return_counts=True)
        side = np.repeat(np.arange(len(sides)), groups)[row]
        pair, of = np.unique(np.stack([unit, side]), axis=1, return_inverse=True)
        of = of.reshape(-1)
        low, high, touched = np.full(pair.shape[1], 1 << 60), np.zeros(pair.shape[1], np.int64), np.bincount(of)
        np.minimum.at(low, of, lost)
        np.maximum.at(high, of, lost)
        key, full = pair[0] * len(sides) + pair[1], low == width[pair[1]]
        partner = np.isin(pair[0] * len(sides) + (pair[1] ^ 1), key[full])
        bound = ~((touched == groups[pair[1]]) & (low == high)) & ~(full & partner)  # (1)
        ids = Ids()
        ids.fresh(count + len(sides))
        ids.unify(pair[0][bound], count + pair[1][bound])
        block[pair[0][bound]] = ids.solve().of[pair[0][bound]]
        random = np.random.default_rng(1).integers(2**62, size=int(groups.sum()), dtype=np.int64)
        np.add.at(cell, unit[bound[of]], (random[row] * lost)[bound[of]])
        for b in np.unique(block[usable & (block >= 0)]):
            own = np.flatnonzero(usable & (block == b))
            _, example, where, sizes = np.unique(cell[own], return_index=True, return_inverse=True, return_counts=True)
            losses = np.zeros((len(sizes), int(groups.sum())), np.int64)
            at, entry = _join(unit, np.arange(len(unit)), own[example])
            losses[at, row[entry]] = lost[entry]
            rest = np.ones(len(sizes), bool)
            for picked in _even(losses, first) if len(sizes) <= 12 else ():  # (2)
                if rest[picked].all() and sizes[picked].min() > 1:
                    rest[picked] = False
                    block[own[picked[where]]] = count + block.max()
            if rest.any():  # (3)
                left = own[rest[where]]
                share[left] = (sizes // np.gcd.reduce(sizes[rest]))[where[rest[where]]]
        return block, cell, share

    def _checked(self, found: list[ChannelGroup]) -> list[ChannelGroup]:
        """The groups in order, those of a block that cannot lose channels evenly with a reason."""
        out = []
        bad: dict[int, str] = {}
        for block in {g.block for g in found if g.reason is None and g.block >= 0}:
            matrix = steps_of([g for g in found if g.block == block and g.reason is None])
            few = self.killed(matrix[:1].reshape(-1))
            if len(matrix) < 2 or (self.consistency.settle(~few) & few).any():
                nodes = (b.node for b in self._eval.balances if block in self._block[self._killers(b)])
                bad[block] = f"the groups of {describe(next(nodes))} cannot lose channels evenly"
        for g in found:
            out.append(g if g.reason or g.block not in bad else ChannelGroup(**{**vars(g), "reason": bad[g.block]}))
        return sorted(out, key=lambda g: g.reason is not None)

    def _killers(self, balance: Balance) -> Vector:
        both = self.found.of(np.concatenate([balance.inputs, balance.outputs], axis=1))
        killers: Vector = self._killer[np.isin(self._class, both)]
        return killers


@dataclass(frozen=True)
class Repair:
    """Brings back what cannot go without others. Attributes as the arguments of `Grouping.repair`."""

    grouping: Grouping
    consistency: Consistency
    gone: Vector
    costs: Scores

    def alive(self, units: Vector) -> Mask:
        """The classes that are left when `units` are masked."""
        return self.consistency.settle(~self.grouping.killed(np.concatenate([units, self.gone])), self.costs)


def steps_of(groups: Sequence[ChannelGroup], scores: Sequence[Scores] | None = None) -> Vector:
    """The units of groups that lose channels together, the lowest scores first: a row is what one step removes."""
    units = np.concatenate([g.units for g in groups])
    values = np.zeros(len(units)) if scores is None else np.concatenate(scores)
    cells, share = np.concatenate([g.cells for g in groups]), np.concatenate([g.share for g in groups])
    parts = [np.flatnonzero(cells == c) for c in np.unique(cells)]
    steps = min(len(part) // int(share[part[0]]) for part in parts)
    lowest = [part[np.argsort(values[part], kind="stable")][: steps * share[part[0]]] for part in parts]
    rows: Vector = units[np.concatenate([part.reshape(steps, -1) for part in lowest], axis=1)]
    return rows


def _bijective(a: Vector, b: Vector) -> Mask:
    """Where a value of `a` stands for one value of `b` alone, and the other way round."""
    pairs = np.unique(np.stack([a, b]), axis=1)
    few = [np.bincount(p, minlength=1) == 1 for p in pairs]
    return few[0][a] & few[1][b] if len(a) else np.zeros(0, bool)


def _even(losses: Vector, starts: Vector) -> Mask:
    """The sets of cells that take as much from every group when each loses one unit, small sets first."""
    sets = (np.arange(1, 1 << len(losses))[:, None] >> np.arange(len(losses))) & 1
    sets = sets[np.argsort(sets.sum(1), kind="stable")]
    sums = sets @ losses
    even = np.maximum.reduceat(sums, starts, axis=1) == np.minimum.reduceat(sums, starts, axis=1)
    chosen: Mask = sets[even.all(1)].astype(bool)
    return chosen


def _flatten(vectors: Sequence[Vector]) -> tuple[Vector, Vector]:
    """Vectors in one, and the number of the vector that each entry comes from."""
    if not vectors:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    return np.concatenate(vectors), np.repeat(np.arange(len(vectors)), [len(v) for v in vectors])


def _join(keys: Vector, values: Vector, queries: Vector) -> tuple[Vector, Vector]:
    """Every (index of a query, value) whose key is the query; `keys` are sorted."""
    start, stop = np.searchsorted(keys, queries, "left"), np.searchsorted(keys, queries, "right")
    count = stop - start
    at = np.repeat(np.arange(len(queries)), count)
    return at, values[np.arange(len(at)) + np.repeat(start - np.cumsum(count) + count, count)]


def _factors(left: Vector, right: Vector, whole: Vector) -> Vector:
    """Pairs (factor, grid position), also of grids whose factors are positions of a smaller grid."""
    pairs = np.unique(np.stack([np.concatenate([left, right]), np.concatenate([whole, whole])]), axis=1)
    while True:
        at, further = _join(pairs[0], pairs[1], pairs[1])
        longer = np.unique(np.concatenate([pairs, np.stack([pairs[0][at], further])], axis=1), axis=1)
        if longer.shape[1] == pairs.shape[1]:
            return pairs
        pairs = longer


def table(groups: Sequence[ChannelGroup]) -> str:
    """The groups as text, one a line."""
    lines = [f"{'group':40} {'kind':15} {'units':>6} {'MACs each':>12} {'parameters':>11}  members, or why it stays"]
    for g in groups:
        members = (f"{m.parameter}[{m.axis}]{'' if m.role == 'writer' else ' read'}" for m in g.members)
        what = g.reason or ", ".join(members)
        lines.append(f"{g.name:40} {g.kind:15} {g.size:6} {g.macs:12,} {g.parameters:11,}  {what}")
    return "\n".join(lines) + "\n"
