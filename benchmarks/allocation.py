"""How a budget of MACs is shared out among groups, by the same curves: what is left right after repair.

Trained networks of `trained_networks.py`; `fxprune.sensitivity` measures once, every way of sharing chooses how many
units of each group go, `fxprune.reconstruct` repairs, and the network is judged on samples that nobody has seen:

- slope: what stands, `fxprune.prune.channels`: units by loss for the MACs that one saves, with prices made anew;
- dense prices: the same with what a unit saves in the dense network, one round (a Lagrangian of separable costs);
- Lagrangian: group by group the count that minimizes loss + price * MACs of the whole, until nothing changes;
- dynamic programming: the least sum of losses for MACs that are saved of the dense network (SPDY, Frantar and Alistarh
  2022; ZipLM, Kurtic et al. 2023), whose target is moved until the MACs that are left fit;
- integer program: the same by scipy's milp.

Run: python benchmarks/allocation.py [network ...]      (scipy for the integer program)
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from command import names, prepare
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from trained_networks import built

import fxprune
from fxprune.channels.groups import Grouping

Counts = tuple[int, ...]  # of units that go, by group
SHARES = {"minilm": 0.7, "recognizer": 0.3}
STEPS = 2000  # of MACs, in dynamic programming


class Problem:
    """Curves of groups, and the MACs that counts of units leave."""

    def __init__(self, traced: fxprune.TracedModule, sensitivity: fxprune.Sensitivity, share: float) -> None:
        self.grouping = Grouping(traced)
        self.groups = [group for group in self.grouping.groups if group.reason is None and group.size > 1]
        self.curves = [sensitivity.curve_of(group) for group in self.groups]
        self.losses = [curve.losses() for curve in self.curves]
        self.dense = self.grouping.dense[0]
        self.most = share * self.dense
        self.saved = [group.macs for group in self.groups]  # by one unit of the dense network

    def alive(self, counts: Sequence[int]) -> NDArray[np.bool_]:
        """What lives without the first units of each order."""
        alive = np.ones(self.grouping.found.classes.count, bool)
        for group, curve, count in zip(self.groups, self.curves, counts, strict=True):
            if count:
                alive &= ~self.grouping.units.dead(group.units[list(curve.order[:count])])
        return alive

    def macs(self, counts: Sequence[int]) -> int:
        """The MACs that these leave."""
        return self.grouping.macs(self.alive(counts))

    def lost(self, counts: Sequence[int]) -> float:
        """The sum of the losses."""
        return float(sum(own[count] for own, count in zip(self.losses, counts, strict=True)))

    def filled(self, counts: Sequence[int]) -> Counts:
        """With units given back, those first that are worth most, as far as the budget goes."""
        found = list(counts)
        while True:
            options = []
            for place, own in enumerate(self.losses):
                fewer = [count - (i == place) for i, count in enumerate(found)]
                if fewer[place] >= 0 and self.macs(fewer) <= self.most:
                    options.append((own[found[place]] - own[fewer[place]], fewer))
            if not options:
                return tuple(found)
            found = max(options)[1]

    def reached(self, choose: Callable[[float], Counts], low: float, high: float) -> Counts:
        """What a function of a price or a target chooses where the MACs that are left just fit."""
        for _ in range(25):
            middle = (low + high) / 2
            low, high = (low, middle) if self.macs(choose(middle)) <= self.most else (middle, high)
        return self.filled(choose(high))


def lagrangian(problem: Problem) -> Counts:
    def choose(price: float) -> Counts:
        counts = [0] * len(problem.groups)
        for _ in range(20):
            before = tuple(counts)
            for place, own in enumerate(problem.losses):
                ends = [problem.macs([*counts[:place], end, *counts[place + 1 :]]) for end in (0, 1)]
                saves = (ends[0] - ends[1]) * np.arange(len(own) - 1)  # linear in one group
                counts[place] = int((own[:-1] - price * saves).argmin())
            if tuple(counts) == before:
                break
        return tuple(counts)

    return problem.reached(choose, 0.0, 1e3 / problem.dense)


def dense_prices(problem: Problem) -> Counts:
    def choose(price: float) -> Counts:
        return tuple(
            int((own[:-1] - price * saved * np.arange(len(own) - 1)).argmin())
            for own, saved in zip(problem.losses, problem.saved, strict=True)
        )

    return problem.reached(choose, 0.0, 1e3 / problem.dense)


def dynamic_programming(problem: Problem) -> Counts:
    unit = problem.dense / STEPS
    best: NDArray[np.float64] = np.full(STEPS + 1, np.inf)  # by what is saved at least
    best[0] = 0
    taken = []
    for own, saved in zip(problem.losses, problem.saved, strict=True):
        options = np.unique(np.linspace(0, len(own) - 2, 100).astype(int))
        after, choice = np.full(STEPS + 1, np.inf), np.zeros(STEPS + 1, int)
        for count in options:
            steps = min(int(count * saved / unit), STEPS)
            shifted = np.concatenate([np.full(steps, best[0]), best[: STEPS + 1 - steps]]) + own[count]
            choice = np.where(shifted < after, count, choice)
            after = np.minimum(shifted, after)
        best = after
        taken.append(choice)

    def choose(target: float) -> Counts:
        left, counts = int(target * STEPS), []
        if best[left] == np.inf:  # more than can be saved
            return tuple(len(own) - 2 for own in problem.losses)
        for choice, saved in zip(reversed(taken), reversed(problem.saved), strict=True):
            counts.append(int(choice[left]))
            left = max(0, left - int(counts[-1] * saved / unit))
        return tuple(reversed(counts))

    return problem.reached(choose, 0.0, 1.0)


def integer_program(problem: Problem) -> Counts:
    options = [np.unique(np.linspace(0, len(own) - 2, 60).astype(int)) for own in problem.losses]
    losses = np.concatenate([own[some] for own, some in zip(problem.losses, options, strict=True)])
    saves = np.concatenate([some * saved / problem.dense for some, saved in zip(options, problem.saved, strict=True)])
    which = np.repeat(np.arange(len(options)), list(map(len, options)))
    one_each = LinearConstraint((which == np.arange(len(options))[:, None]).astype(float), 1, 1)

    def choose(target: float) -> Counts:
        limits = [one_each, LinearConstraint(saves[None], target, np.inf)]
        found = milp(losses, constraints=limits, integrality=np.ones_like(losses), bounds=Bounds(0, 1),
                     options={"mip_rel_gap": 1e-4, "time_limit": 10})  # fmt: skip
        if found.x is None:  # more than can be saved
            return tuple(int(some[-1]) for some in options)
        return tuple(int(some[found.x[which == place].argmax()]) for place, some in enumerate(options))

    return problem.reached(choose, 0.0, 1.0)


def masked(
    traced: fxprune.TracedModule, problem: Problem, counts: Counts, orders: Sequence[Sequence[int]] | None = None
) -> fxprune.TracedModule:
    """A copy without the first units of each order, of the curves or of others."""
    orders = [curve.order for curve in problem.curves] if orders is None else orders
    ranks = {id(curve): np.argsort(order) for curve, order in zip(problem.curves, orders, strict=True)}
    going = {group.name + group.kind: count for group, count in zip(problem.groups, counts, strict=True)}
    curves = {group.name + group.kind: curve for group, curve in zip(problem.groups, problem.curves, strict=True)}

    def score(group: fxprune.ChannelGroup) -> torch.Tensor:
        label = group.name + group.kind
        rank = ranks[id(curves[label])]
        return torch.from_numpy((rank >= going[label]) + rank / group.size)

    found = copy.deepcopy(traced)
    report = fxprune.prune.channels(found, sum(counts), importance=score, round_to=1)
    assert tuple(gone for gone, _ in report.removed.values()) == counts
    return found


def main() -> None:
    prepare()
    for name in names(("minilm",), position=1):
        network = built(name)
        if network is None:
            continue
        share = SHARES[name]
        traced = fxprune.trace(copy.deepcopy(network.model), (), network.first(2), modes=("eval",))
        sensitivity = fxprune.sensitivity(traced, network.batches(), weight=network.weight)
        problem = Problem(traced, sensitivity, share)

        def slope(problem: Problem, traced: fxprune.TracedModule = traced, share: float = share) -> Counts:
            report = fxprune.prune.channels(copy.deepcopy(traced), macs=share, importance=sensitivity)  # noqa: B023
            return tuple(gone for gone, _ in report.removed.values())

        found: dict[Counts, float] = {}
        print(f"{name}: {share} of the MACs, dense {network.score(network.model):.4f}", flush=True)
        ways: dict[str, Callable[[Problem], Counts]] = {
            "slope": slope, "dense prices": dense_prices, "Lagrangian": lagrangian,
            "dynamic programming": dynamic_programming, "integer program": integer_program,
        }  # fmt: skip
        for way, choose in ways.items():
            begin = time.process_time()
            counts = choose(problem)
            seconds = time.process_time() - begin
            if counts not in found:
                candidate = masked(traced, problem, counts)
                fxprune.reconstruct(candidate, network.batches(), weight=network.weight)
                found[counts] = network.score(candidate.eval())
            left = problem.macs(counts) / problem.dense
            print(f"  {way}: left {left:.4f}, sum of losses {problem.lost(counts):.5f}, repaired {found[counts]:.4f}, "
                  f"{seconds:.1f} s to choose; {counts}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
