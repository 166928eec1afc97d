"""The optimal brain surgeon for whole units: in which order columns go, and what is left makes up for them.

A part is one contraction, or one group of one, seen by a group of channels: H, the second moment of its inputs, and W,
its weights. Without the columns S of some units, the best that the others can do loses tr(W_S (H^-1_SS)^-1 W_S^T);
their weights change by -W_S (H^-1_SS)^-1 H^-1_S,: . Units go one after the other, the cheapest first, by H^-1 without
the columns that went, so that what two units both carry is lost with the second one. Where groups of convolutions have
to stay equal, some units of each cell take a turn.

Where the network's output moves with what a reader gives by a metric G = L L^T, the loss is that of L^T W.

Sources: Hassibi and Stork, "Second order derivatives for network pruning: Optimal Brain Surgeon" (1993),
https://proceedings.neurips.cc/paper/1992/hash/303ed4c69846ab36c2904d3ba8573050; for whole structures Kurtic et al.,
"ZipLM" (2023), https://arxiv.org/abs/2302.04089.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from fxprune.channels.ids import Vector
from fxprune.prune.sensitivity.turns import Turns

# Losses of all units are computed this often; between two times, the cheapest go among this many more, in this many
# steps at most. Groups of fewer units than both multiplied lose one at a time.
_CHUNKS, _CANDIDATES, _STEPS = 48, 10, 8
_LEAST_FULL = 0.75  # of a matrix, what is left; of less a smaller one is made


@dataclass(frozen=True, eq=False)
class Part:
    """A contraction that reads the units of a group.

    Attributes:
        inverse: [columns, columns], H^-1, float64.
        weights: [outputs, columns], W, float64.
        columns: [units, width], the columns of each unit; -1 where it has fewer than others.
        energy: by which losses are divided: tr(W H W^T); inf where inputs never change: they say nothing.
    """

    inverse: Tensor
    weights: Tensor
    columns: Tensor
    energy: float

    def seen_through(self, metric: Tensor) -> Part:
        """The same where an error E of the weights costs tr(G E H E^T), `metric` L [outputs, outputs], G = L L^T."""
        return replace(self, weights=metric.T @ self.weights, energy=1.0)

    def change(self, units: Tensor) -> Tensor:
        """What the weights change by, [outputs, columns], when units go; the columns of these become zero."""
        gone = self.columns[units].flatten()
        gone = gone[gone >= 0]
        factor = torch.linalg.cholesky(self.inverse[gone[:, None], gone])
        found = -torch.cholesky_solve(self.weights[:, gone].T, factor).T @ self.inverse[gone]
        found[:, gone] = -self.weights[:, gone]
        return found


class _Rest:
    """What is left of a part: the columns of the units that are left, unit by unit.

    Matrices are changed where they stand, and hold what went as well until that is a share of them: to write them
    anew takes several times as long as the products.

    Args:
        inverse: [units * width, units * width]. weights: [outputs, units * width]. width: columns of a unit.
        energy: by which losses are divided.
    """

    def __init__(self, inverse: Tensor, weights: Tensor, width: int, energy: float) -> None:
        self._inverse, self._weights, self._energy = inverse, weights, energy
        self._columns = torch.arange(len(inverse), device=inverse.device).view(-1, width)  # of each unit that is left

    @classmethod
    def of(cls, part: Part) -> _Rest:
        flat = part.columns.flatten()
        there = (flat >= 0).to(part.inverse.device)
        inverse = part.inverse[flat.clamp(min=0)[:, None], flat.clamp(min=0)]
        if not bool(there.all()):  # columns that are not there cost nothing and change nothing
            inverse = inverse * (there[:, None] & there)
            inverse.diagonal()[~there] = 1.0
        weights = part.weights[:, flat.clamp(min=0)] * there
        return cls(inverse, weights, part.columns.shape[1], part.energy)

    def losses(self) -> Tensor:
        """What each unit's removal loses, relative to the energy of the output."""
        columns = self._columns
        weights = self._weights[:, columns.T]  # [outputs, width, units]
        if columns.shape[1] == 1:
            lost = weights[:, 0].square().sum(0) / self._inverse.diagonal()[columns[:, 0]]
        else:
            blocks = self._inverse[columns[:, :, None], columns[:, None]]
            each = weights.permute(2, 1, 0)
            lost = torch.linalg.solve(blocks, each @ each.transpose(1, 2)).diagonal(dim1=1, dim2=2).sum(1)
        return lost / self._energy

    def only(self, units: Tensor) -> _Rest:
        """The same for some of the units, which are chosen among."""
        flat = self._of(units)
        width = self._columns.shape[1]
        return _Rest(self._inverse[flat[:, None], flat], self._weights[:, flat], width, self._energy)

    def drop(self, units: Tensor, rest: Tensor) -> None:
        """Let some units go, whose work is done by the rest of them, which is given too."""
        gone = self._of(units)
        rows = self._inverse[gone]
        solved = torch.linalg.solve(rows[:, gone], rows)
        self._weights.addmm_(self._weights[:, gone], solved, alpha=-1)
        self._inverse.addmm_(rows.T, solved, alpha=-1)
        left = self._of(rest)
        self._columns = left.view(len(rest), -1)
        if len(left) < _LEAST_FULL * len(self._inverse):
            self._inverse, self._weights = self._inverse[left[:, None], left], self._weights[:, left]
            self._columns = torch.arange(len(left), device=left.device).view(len(rest), -1)

    def _of(self, units: Tensor) -> Tensor:
        return self._columns[units.to(self._columns.device)].flatten()


@dataclass(frozen=True, eq=False)
class Order:
    """In which order the units of a group go.

    Attributes:
        units: [units], the first to go first. losses: what each adds to the sum over the parts of their relative
            losses; those that were not reached have the last one's.
    """

    units: Tensor
    losses: Tensor


def removal_order(parts: Sequence[Part], units: int, turns: Turns | None = None) -> Order:
    """The order in which units go, by the sum of what all parts lose; what no turn takes stays, and comes last.

    Args:
        parts: the readers of the units, on one device. units: how many there are.
        turns: which can go together; None for each by itself.
    """
    turns = Turns.one_by_one(units) if turns is None else turns
    rests = [_Rest.of(part) for part in parts]
    left = torch.arange(units)
    order: list[int] = []
    losses: list[float] = []
    for some in _portions(turns.counts, max(1, units // _CHUNKS)):
        cells, quotas = turns.cells[left.numpy()], some.sum(0)
        candidates = _candidates(_summed(rests), cells, quotas)
        chosen, costs = _cheapest([rest.only(candidates) for rest in rests], cells[candidates.numpy()], quotas)
        gone = candidates[chosen]
        places = Turns(turns.cells, some).arranged(left[gone])
        order += left[gone][places].tolist()
        losses += torch.tensor(costs)[places].tolist()
        stays = torch.ones(len(left), dtype=torch.bool)
        stays[gone] = False
        rest_units = stays.nonzero()[:, 0]
        for rest in rests:
            rest.drop(gone, rest_units)
        left = left[rest_units]
    order += left.tolist()
    losses += [losses[-1] if losses else 0.0] * len(left)
    return Order(torch.tensor(order), torch.tensor(losses, dtype=torch.float64))


def _portions(counts: Vector, least: int) -> Iterator[Vector]:
    """The turns, as many at once as take so many units."""
    begin, gone = 0, counts.sum(1)
    for end in range(1, len(counts) + 1):
        if gone[begin:end].sum() >= least or end == len(counts):
            yield counts[begin:end]
            begin = end


def _summed(rests: Sequence[_Rest]) -> Tensor:
    return torch.stack([rest.losses() for rest in rests]).sum(0).clamp(min=0)


def _candidates(costs: Tensor, cells: Vector, quotas: Vector) -> Tensor:
    """The cheapest units of each cell, among which those are chosen that go."""
    order = costs.argsort(stable=True).cpu().numpy()
    factor = 1 + _CANDIDATES if quotas.sum() > 1 else 1
    among = [order[cells[order] == cell][: quota * factor] for cell, quota in enumerate(quotas)]
    chosen = np.isin(order, np.concatenate(among))
    return torch.from_numpy(order[chosen])


def _cheapest(rests: Sequence[_Rest], cells: Vector, quotas: Vector) -> tuple[list[int], list[float]]:
    """Which of the candidates go, so many of each cell, one after the other or some at a time; and what each costs."""
    left = np.arange(len(cells))
    quotas, count = quotas.copy(), int(quotas.sum())
    found: list[int] = []
    losses: list[float] = []
    while True:
        costs = _summed(rests)
        most = min(max(1, count // _STEPS), count - len(found))
        places = _first_of(costs.argsort(stable=True).cpu().numpy(), cells[left], quotas, most)
        losses += costs[places].tolist()
        found += left[places].tolist()
        if len(found) == count:
            return found, losses
        quotas -= np.bincount(cells[left[places]], minlength=len(quotas))
        stays = np.ones(len(left), bool)
        stays[places] = False
        left = left[stays]
        for rest in rests:
            rest.drop(torch.from_numpy(places), torch.from_numpy(stays.nonzero()[0]))


def _first_of(order: Vector, cells: Vector, quotas: Vector, most: int) -> Vector:
    """Of units in an order the first ones, no more of a cell than its quota, and `most` in all."""
    within = [own[:quota] for cell, quota in enumerate(quotas) for own in [np.flatnonzero(cells[order] == cell)]]
    found: Vector = order[np.sort(np.concatenate(within))[:most]]
    return found
