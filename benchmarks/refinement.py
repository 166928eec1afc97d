"""What refining a choice by curves is worth: shifts between groups judged on the whole, and exchanges within a group.

`fxprune.sensitivity` measures one group at a time, and units go greedily. Trained networks of `trained_networks.py`,
the same repair behind each choice, judged on samples that nobody has seen:

- slope: what stands, `fxprune.prune.channels` by the curves;
- shifts: from there, units of one group are exchanged for units of another that save as many MACs, 2 % of the dense
  ones at a time, then 1 and 0.5, where the outputs on held-back samples come nearer (Tyr-the-Pruner, 2025,
  https://arxiv.org/abs/2503.09657); every reader makes up at once for all that it misses, by the moments of the dense
  network (not where heads lose channels, whose bases say more);
- exchanges: at the counts of slope, a kept unit for a removed one where the readers then lose less, until no exchange
  of the six that would be worth most back lowers it (OSSCAR, 2024, https://arxiv.org/abs/2403.12983).

Run: python benchmarks/refinement.py [network ...]      (as for benchmarks/trained.py; scipy)
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterable, Sequence
from unittest import mock

import numpy as np
import torch
from allocation import Counts, Problem, masked
from command import names, prepare
from torch import Tensor
from trained_networks import Trained, built

import fxprune
from fxprune.channels.budget import masks
from fxprune.channels.ids import Mask
from fxprune.graph.names import tensor_at
from fxprune.prune.repair.batches import Batches
from fxprune.prune.repair.input_moments import InputMoments
from fxprune.prune.repair.layers import Reader
from fxprune.prune.sensitivity import analysis
from fxprune.prune.sensitivity.curves import Forks
from fxprune.prune.sensitivity.distances import OutputDistance
from fxprune.prune.sensitivity.elimination import Order, Part, removal_order
from fxprune.prune.sensitivity.readings import Reading, readings
from fxprune.prune.sensitivity.turns import Turns

BUDGETS = {"recognizer": (0.5, 0.3), "minilm": (0.7, 0.5)}
STEPS = (0.02, 0.01, 0.005)  # of the MACs of the dense network
MOST_SHIFTS, MOST_TRIED, JUDGED = 6, 6, 20
LEAST_GAIN = 1e-4  # of what the readers lose


class Whole:
    """A network without any choice of units, every reader of which makes up for what it misses."""

    def __init__(self, traced: fxprune.TracedModule, trained: Trained, problem: Problem) -> None:
        self._problem, self._plain = problem, problem.grouping.plain
        graph = self._plain.graphs["eval"]
        batches = Batches(traced, graph, trained.batches(), trained.weight)
        pieces = list(batches)
        fitted, held = ([piece for piece in pieces if piece.is_held is is_held] for is_held in (False, True))
        self._readings = [each for each in readings(problem.grouping) if isinstance(each.reader, Reader)]
        moments = InputMoments([each.reader for each in self._readings], sum(piece.samples for piece in fitted))
        with torch.no_grad():
            for piece in fitted:
                moments.add(graph, self._tensor, piece)
            judging = [batches.head(held[0], JUDGED)]
            self._forks = Forks(self._plain, graph, judging, OutputDistance(graph, "auto"))
        self._moments = moments.complete()
        self.runs = 0

    def _tensor(self, name: str) -> Tensor:
        return tensor_at(self._plain, name).detach()

    def loss(self, counts: Sequence[int]) -> float:
        """What the outputs lose without the first units of each order."""
        self.runs += 1
        with torch.no_grad():
            return self._forks.losses(self._tensors(self._problem.alive(counts)), 0)

    def _tensors(self, alive: Mask) -> dict[str, Tensor]:
        zeroed = masks(self._problem.grouping, alive)
        found = {name: self._tensor(name) * mask for name, mask in zeroed.items()}
        for reading in self._readings:
            dead = ~alive[reading.channels]
            if dead.any():
                found |= self._made_up(reading, dead, found)
        return {name: value * zeroed.get(name, 1) for name, value in found.items()}

    def _made_up(self, reading: Reading, dead: Mask, found: dict[str, Tensor]) -> dict[str, Tensor]:
        reader = reading.reader
        assert isinstance(reader, Reader)
        moments = self._moments[reader.key]
        is_centred = reader.moving_mean is not None or all(name is not None for name in reader.biases)
        squares = moments.normal_square(is_centred) / moments.count
        stored = [self._tensor(name) for name in reader.weights]
        table = reader.table(stored).double()
        change = torch.zeros_like(table)
        for group, gone in enumerate(np.repeat(dead, reading.taps, axis=1)):
            lost, left = (torch.from_numpy(each.nonzero()[0]) for each in (gone, ~gone))
            square = squares[group] + analysis.DAMPING * squares[group].diagonal().mean() * torch.eye(len(gone))
            change[group][:, lost] = -table[group][:, lost]
            cross = square[left[:, None], lost] @ table[group][:, lost].T
            factor = torch.linalg.cholesky(square[left[:, None], left])
            change[group][:, left] = torch.cholesky_solve(cross, factor).T
        values = reader.stored(table + change, stored)
        changed = {name: value.to(own.dtype) for name, value, own in zip(reader.weights, values, stored, strict=True)}
        mean = moments.total / moments.count + moments.shift
        shift = -torch.einsum("gk,grk->gr", mean, change).flatten()
        biases = [name for name in reader.biases if name is not None]
        parts = shift.split([len(self._tensor(name)) for name in biases]) if biases else ()
        for name, part in zip(biases, parts, strict=True):
            changed[name] = found.get(name, self._tensor(name)) + part.float()
        if not biases and reader.moving_mean is not None:
            changed[reader.moving_mean] = self._tensor(reader.moving_mean) - shift.float()
        return changed


def shifted(whole: Whole, problem: Problem, counts: Counts) -> tuple[Counts, float, float]:
    """Counts after shifts, and what was lost before and after them."""
    ties: dict[object, list[int]] = {}  # groups that lose equally many
    for place, group in enumerate(problem.groups):
        ties.setdefault(("block", group.block) if group.block >= 0 else place, []).append(place)

    def moved(counts: Sequence[int], places: Iterable[int], by: int) -> Counts | None:
        found = list(counts)
        for place in places:
            found[place] += by
        fits = all(0 <= count < group.size for count, group in zip(found, problem.groups, strict=True))
        return tuple(found) if fits else None

    first = least = whole.loss(counts)
    for step in STEPS:
        effects: dict[tuple[int, int], tuple[float, int]] = {}
        for number, places in enumerate(ties.values()):
            beside = moved(counts, places, 1) or moved(counts, places, -1)
            assert beside is not None
            units = max(1, round(step * problem.dense / abs(problem.macs(counts) - problem.macs(beside))))
            for sign in (-1, 1):
                if (other := moved(counts, places, sign * units)) is not None:
                    effects[number, sign] = whole.loss(other) - least, units
        pairs = [(back, more) for back, one in effects if one < 0 for more, two in effects if two > 0 and back != more]
        pairs.sort(key=lambda pair: effects[pair[0], -1][0] + effects[pair[1], 1][0])
        used, tried = set[int](), 0
        for back, more in pairs:
            if tried == MOST_SHIFTS or used & {back, more}:
                continue
            tried += 1
            found = moved(counts, [*ties.values()][back], -effects[back, -1][1])
            while found is not None and problem.macs(found) > problem.most:
                found = moved(found, [*ties.values()][more], 1)
            if found is not None and (loss := whole.loss(found)) < least:
                counts, least = found, loss
                used |= {back, more}
    return counts, first, least


class Swept:
    """A part, of which units go and come back: its matrix is swept over the columns that are kept.

    With K the columns that are kept and S the others, it holds -H_KK^-1, H_KK^-1 H_KS, and below these the weights that
    make up; at S what S adds to K: H_SS - H_SK H_KK^-1 H_KS, and how it goes with what is lost.
    """

    def __init__(self, part: Part) -> None:
        self._columns, self._energy, self._size = part.columns, part.energy, len(part.inverse)
        self._matrix = torch.cat([-part.inverse, part.weights])
        self.lost = 0.0

    def remove(self, units: Tensor) -> None:
        self._sweep(units, -1)

    def give_back(self, units: Tensor) -> None:
        self._sweep(units, 1)

    def _sweep(self, units: Tensor, sign: int) -> None:
        columns = self._columns[units].flatten()
        columns = columns[columns >= 0]
        own = self._matrix[:, columns].clone()
        inverse = torch.linalg.inv(own[columns])
        solved = own @ inverse
        self.lost -= float((own[self._size :] * solved[self._size :]).sum()) / self._energy
        self._matrix -= solved @ own[: self._size].T
        self._matrix[:, columns] = sign * solved
        self._matrix[columns] = sign * solved[: self._size].T
        self._matrix[columns[:, None], columns] = -inverse

    def worth(self, units: Tensor, with_unit: Tensor | None = None) -> Tensor:
        """What each unit takes off the loss by itself, negative for what is kept; as if another one came back."""
        columns = self._columns[units]
        square = self._matrix[columns[:, :, None], columns[:, None, :]]
        weights = self._matrix[self._size :][:, columns].permute(1, 0, 2)
        if with_unit is not None:
            own = self._columns[with_unit]
            across = self._matrix[:, own]
            solved = across @ torch.linalg.inv(across[own])
            square = square - solved[columns] @ across[columns].transpose(1, 2)
            weights = weights - torch.einsum("ow,ubw->uob", solved[self._size :], across[columns])
        grams = weights.transpose(1, 2) @ weights
        found: Tensor = torch.linalg.solve(square, grams).diagonal(dim1=1, dim2=2).sum(1) / self._energy
        return found


def exchanged(parts: Sequence[Part], order: Order, count: int) -> tuple[Order, float, float]:
    """An order whose first units are those after exchanges, and what the readers lose before and after."""
    swept = [Swept(part) for part in parts]
    gone, kept = order.units[:count].clone(), order.units[count:].clone()
    for each in swept:
        each.remove(gone)
    first = least = sum(each.lost for each in swept)
    while True:
        gains = torch.stack([each.worth(gone) for each in swept]).sum(0)
        best = (0.0, 0, 0)
        for back in gains.argsort(descending=True)[:MOST_TRIED].tolist():
            costs = -torch.stack([each.worth(kept, gone[back]) for each in swept]).sum(0)
            best = max(best, (float(gains[back] - costs.min()), back, int(costs.argmin())))
        gain, back, more = best
        if gain < LEAST_GAIN * least:
            return Order(torch.cat([gone, kept]), order.losses), first, least
        for each in swept:
            each.give_back(gone[back : back + 1])
            each.remove(kept[more : more + 1])
        gone[back], kept[more] = kept[more].clone(), gone[back].clone()
        least = sum(each.lost for each in swept)


def with_exchanges(traced: fxprune.TracedModule, trained: Trained, problem: Problem, counts: Counts) -> list[Order]:
    """The orders of the groups after exchanges at some counts; says what the readers lose."""
    wanted = {curve.order: count for curve, count in zip(problem.curves, counts, strict=True)}
    found: dict[tuple[int, ...], Order] = {}
    lost: list[tuple[float, float]] = []

    def ordered(parts: Sequence[Part], units: int, turns: Turns | None = None) -> Order:
        order = removal_order(parts, units, turns)
        count = wanted.get(tuple(order.units.tolist()), 0)
        if count and all(bool((part.columns >= 0).all()) for part in parts):
            found[tuple(order.units.tolist())], *both = exchanged(parts, order, count)
            lost.append((both[0], both[1]))
        return order

    with mock.patch.object(analysis, "removal_order", ordered):
        fxprune.sensitivity(traced, trained.batches(), weight=trained.weight, shares=(0.5,), max_samples=2)
    less = [1 - after / before for before, after in lost if before]
    print(
        f"  exchanges in {len(lost)} groups: readers lose {np.mean(less):.2%} less, at most {max(less):.2%}", flush=True
    )
    orders = [Order(torch.tensor(curve.order), torch.zeros(0)) for curve in problem.curves]
    return [found.get(curve.order, order) for curve, order in zip(problem.curves, orders, strict=True)]


def judged(network: Trained, candidate: fxprune.TracedModule) -> float:
    """The score after repair."""
    fxprune.reconstruct(candidate, network.batches(), weight=network.weight)
    return network.score(candidate.eval())


def main() -> None:
    prepare()
    for name in names(tuple(BUDGETS), position=1):
        network = built(name)
        if network is None:
            continue
        traced = fxprune.trace(copy.deepcopy(network.model), (), network.first(2), modes=("eval",))
        sensitivity = fxprune.sensitivity(traced, network.batches(), weight=network.weight)
        print(f"{name}: dense {network.score(network.model):.4f}", flush=True)
        for share in BUDGETS[name]:
            problem = Problem(traced, sensitivity, share)
            chosen = copy.deepcopy(traced)
            report = fxprune.prune.channels(chosen, macs=share, importance=sensitivity, round_to=1)
            counts = tuple(gone for gone, _ in report.removed.values())
            print(f"  {share}: slope, repaired {judged(network, chosen):.4f}; {counts}", flush=True)
            if not any(group.kind == "head channel" for group in problem.groups):
                whole, begin = Whole(traced, network, problem), time.process_time()
                found, before, after = shifted(whole, problem, counts)
                seconds = time.process_time() - begin
                score = judged(network, masked(traced, problem, found))
                print(f"  {share}: shifts, repaired {score:.4f}, before that the outputs lose {after:.4f} "
                      f"({before:.4f}), {whole.runs} runs, {seconds:.0f} CPU s; {found}", flush=True)  # fmt: skip
            orders = with_exchanges(traced, network, problem, counts)
            score = judged(network, masked(traced, problem, counts, [tuple(each.units.tolist()) for each in orders]))
            print(f"  {share}: exchanges, repaired {score:.4f}", flush=True)


if __name__ == "__main__":
    main()
