"""Which rows of a network's weights can go, found without fxprune.

What belongs together is found by changing rows (oracle_structure.py). What is dead is found by watching: columns are
observed over inputs of several sizes, in the masked network and in others with the same zeros. One that never changes
is of no use to who reads it, one that is zero is of no use to a norm either. Rows are dead where no weight of a row
that lives reads what belongs to them: the greatest such set. Of these some must stay for the same operators to run on
the rest:

- an axis keeps one index; a parameter of several axes, and an axis that is viewed as several, keep a box;
- groups that stay, of a convolution or a norm, keep equally many;
- zeros around a constant make a border that no bias has: who pads, or is transposed, keeps one of its constants, or as
  many as calls of the layer see independent ones.

The others are free.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from oracle_products import Product
from oracle_structure import Inputs, Places, Row, Structure, Watch, spread, structure
from torch import Tensor, nn

DRAWS = 12  # networks with the same zeros


def constants(model: nn.Module, inputs: Inputs) -> tuple[list[Tensor], list[Tensor]]:
    """By call of a product the value of each column, NaN where it changes; by call of a norm the zero channels."""
    columns: list[Tensor] = []
    zeros: list[Tensor] = []
    for draw in range(DRAWS):
        other, runs = copy.deepcopy(model), []
        with torch.no_grad():
            for p in other.parameters() if draw else ():
                p.copy_(torch.where(p == 0, p, torch.randn_like(p)))
            for number, scale in enumerate((1.0, 0.1, 10.0, -3.0, 100.0, 1.0)):
                x = inputs(3)
                if number % 2:  # images and sentences of another size
                    x = {4: torch.randn(3, 3, 12, 12, dtype=torch.double), 2: torch.randint(11, (3, 9))}.get(x.dim(), x)
                if x.is_floating_point():
                    x = spread(x) if number == 5 else x * scale
                with Watch(other) as run:
                    other(x)
                runs.append(run)
        found = []
        for calls in zip(*(run.products for run in runs), strict=True):
            values = torch.cat([_laid(call.data, call.columns) for call in calls], 1)
            same = (values - values[:, :1]).abs().amax(1) <= 1e-12 * (1 + values.abs().amax(1))
            found.append(torch.where(same, values[:, 0], torch.nan))
        if not draw:
            columns = found
            norms = zip(*(run.norms for run in runs), strict=True)
            zeros = [(torch.cat([_laid(x, [axis]) for x, axis, _ in calls], 1) == 0).all(1) for calls in norms]
        columns = [torch.where(one.isnan(), one, own) for own, one in zip(columns, found, strict=True)]
    return columns, zeros


def _laid(tensor: Tensor, axes: Sequence[int]) -> Tensor:
    """[indices of the axes, row-major; everything else]"""
    if not axes:
        return torch.zeros(0, 1)
    tensor = tensor.movedim([axis % tensor.dim() for axis in axes], [*range(len(axes))])
    return tensor.flatten(0, len(axes) - 1).flatten(1)


class Search:
    """The least classes of rows that must live; see the head of the file."""

    def __init__(self, model: nn.Module, inputs: Inputs) -> None:
        self.found: Structure = structure(model, inputs)
        self.constants, self.zeros = constants(model, inputs)
        with torch.no_grad(), Watch(model) as run:
            model(inputs(1))
        self.calls: list[Product] = run.products
        self.norm_groups = [groups for *_, groups in run.norms]
        find = self.found.of.find
        self.rows = [(name, row) for name, layer in self.found.layers.items() for row in range(len(layer.table))]
        self.sizes = Counter(map(find, self.rows))
        self.alive = {find("output")}
        self.sides: dict[str, tuple[Places, Places]] = {}
        for name, layer in self.found.layers.items():
            columns = [{find((name, "column", i))} & self.sizes.keys() for i in range(layer.table.shape[1])]
            self.sides[name] = [{find((name, row))} for row in range(len(layer.table))], columns

    def dead(self) -> set[Row]:
        return {row for row in self.rows if self.found.of.find(row) not in self.alive}

    def settle(self, rules: Sequence[Callable[[], set[Any]]]) -> None:
        """Let live what the first rule asks for that asks for anything, until none does."""
        while fresh := next((fresh for rule in rules if (fresh := rule() - self.alive)), None):
            self.alive |= fresh

    def _there(self, places: Places) -> Tensor:
        return torch.tensor([not seen or not self.alive.isdisjoint(seen) for seen in places], dtype=torch.bool)

    def read(self) -> set[Any]:
        """What changes and is read, by a row that lives; what is not zero under a norm of which anything lives."""
        fresh: set[Any] = set()
        for call, constant in zip(self.calls, self.constants, strict=True):
            rows, columns = self.sides[call.name]
            needed = call.layer.table[self._there(rows)].any(0) & constant.isnan()
            fresh |= set().union(*(columns[i] for i in needed.nonzero().flatten().tolist()))
        for places, zero, groups in zip(self.found.norms, self.zeros, self.norm_groups, strict=True):
            some = self._there(places).view(groups, -1).any(1, keepdim=True)
            needed = (some & ~zero.view(groups, -1)).flatten()
            fresh |= set().union(*(places[i] for i in needed.nonzero().flatten().tolist()))
        return fresh

    def boxes(self) -> set[Any]:
        """A place is there where its index of every axis is."""
        boxes = [*self.found.boxes]
        for name, layer in self.found.layers.items():
            boxes += zip(self.sides[name], (layer.row_shape, layer.column_shape), strict=True)
        fresh = set()
        for places, shape in boxes:
            if len(shape) > 1:
                there, box = self._there(places).view(shape), torch.ones(shape, dtype=torch.bool)
                for axis in range(len(shape)):
                    box &= there.amax([i for i in range(len(shape)) if i != axis], keepdim=True)
                fresh |= {self._cheapest(places[i]) for i in (box & ~there).flatten().nonzero().flatten().tolist()}
        return fresh

    def equal(self) -> set[Any]:
        """Groups that are there have equally many places."""
        fresh = set()
        for sides, groups in self._grouped():
            there = [self._there(places).view(groups, -1) for places in sides]
            some = torch.stack([side.any(1) for side in there]).any(0).nonzero().flatten().tolist()
            for places, side in zip(sides, there, strict=True):
                most, width = max(1, int(side.sum(1).max())), side.shape[1]
                for group in some:
                    away = [group * width + i for i in (~side[group]).nonzero().flatten().tolist()]
                    away = sorted(away, key=lambda i: self.sizes[self._cheapest(places[i])])
                    fresh |= {self._cheapest(places[i]) for i in away[: max(0, most - int(side[group].sum()))]}
        return fresh

    def _grouped(self) -> Iterator[tuple[Sequence[Places], int]]:
        yield from (([places], n) for places, n in zip(self.found.norms, self.norm_groups, strict=True) if n > 1)
        yield from ((self.sides[name], layer.groups) for name, layer in self.found.layers.items() if layer.groups > 1)

    def stand_ins(self) -> set[Any]:
        """Who pads keeps constants that span those it reads, by group; the class that serves most comes first."""
        wanted: Counter[Any] = Counter()
        for name, layer in self.found.layers.items():
            rows, columns = self.sides[name]
            calls = [own for call, own in zip(self.calls, self.constants, strict=True) if call.name == name]
            values, constant = torch.stack(calls).nan_to_num(nan=0.0), ~torch.stack(calls).isnan().any(0)
            there, used = self._there(columns), layer.table[self._there(rows)].any(0)
            for group in range(layer.groups if layer.pads else 0):
                inside = constant & (torch.arange(len(columns)) * layer.groups // len(columns) == group)
                have = values[:, inside & there]
                if _rank(have) < _rank(values[:, inside & (there | used)]):
                    others = (inside & ~there).nonzero().flatten().tolist()
                    more = [i for i in others if _rank(torch.cat([have, values[:, i : i + 1]], 1)) > _rank(have)]
                    wanted.update({self._cheapest(columns[i]) for i in more})
        return {max(wanted, key=lambda root: (wanted[root], -self._price(root)))} if wanted else set()

    def nonempty(self) -> set[Any]:
        """Every weight has a row and a column."""
        for places in (places for sides in self.sides.values() for places in sides):
            if places and not self._there(places).any():
                return {min(map(self._cheapest, places), key=self._price)}
        return set()

    def _cheapest(self, seen: set[Any]) -> Any:
        return min(seen, key=self._price)

    def _price(self, root: Any) -> int:
        """How much lives with a class: what it reads, and its rows."""
        reads = 0
        for call, constant in zip(self.calls, self.constants, strict=True):
            rows, columns = self.sides[call.name]
            needed = call.layer.table[torch.tensor([root in seen for seen in rows])].any(0) & constant.isnan()
            reads += sum(self.alive.isdisjoint(columns[i]) for i in needed.nonzero().flatten().tolist() if columns[i])
        return 1000 * reads + self.sizes[root]


def _rank(vectors: Tensor) -> int:
    """Of columns, whatever their size."""
    lengths = vectors.norm(dim=0).clamp_min(1e-300)
    return int(torch.linalg.matrix_rank(vectors / lengths)) if vectors.numel() else 0


def search(model: nn.Module, inputs: Inputs) -> tuple[Structure, set[Row], set[Row]]:
    """What belongs together in a network, its dead rows, and those of them that are free."""
    one = Search(model, inputs)
    one.settle([one.read])
    dead = one.dead()
    one.settle([one.read, one.boxes, one.equal, one.stand_ins, one.nonempty])
    return one.found, dead, one.dead()
