"""Budgets of channels: which choice of units keeps one and uses it up, and what to say where none does."""

from __future__ import annotations

import abc
import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from fxprune.channels.groups import ChannelGroup, Grouping, Kind
from fxprune.channels.ids import Mask, Vector
from fxprune.channels.stairs import Limit, Steps
from fxprune.errors import ArgumentError, BudgetError
from fxprune.prune.channel_request import ChannelRequest

SPENT = 0.98  # share of a budget that counts as all of it
MARGIN = 1.02  # another process measures a little more or less
NEAR = 1.03  # a measured speedup that is more by this factor at most uses its budget up


@dataclass(frozen=True)
class Choice:
    """The units that go.

    Attributes:
        units: their classes.
        speedup: how many times faster the rest was measured to be (None: it was not).
        for_speed: whether units go that sizes did not ask for.
    """

    units: Vector
    speedup: float | None = None
    for_speed: bool = False


def limit_of(value: float, dense: int) -> float:
    """What may be left of a dense model's size: a fraction (float), a hair more so that a count's share gives it."""
    return value * dense * (1 + 1e-12) if isinstance(value, float) else value


def share_of(left: float, limit: float) -> float:
    """The share of a limit that is left."""
    if limit:
        return left / limit
    return math.inf if left else 0.0


class Budget(abc.ABC):
    """A limit on what is left.

    Attributes:
        roundings: how the channels of convolutions are rounded where the caller leaves it open, one after the other:
            whole blocks run fastest; what they leave is cut finer.
        timed: whether groups whose MACs take long end a multiple lower, those whose take little one higher.
    """

    roundings: ClassVar[Sequence[int | str]] = ("auto", "fine", 1)
    timed: ClassVar[bool] = False

    @abc.abstractmethod
    def fit(self, stairs: Steps) -> Choice | None:
        """The choice that keeps the budget and uses it up, None where none keeps it."""

    @abc.abstractmethod
    def refusal(self, request: ChannelRequest) -> BudgetError:
        """What to raise when no choice that was tried kept the budget, as it was asked for."""


class Amount(Budget):
    """So many of the units: a fraction (float) or a count (int).

    Args:
        groups: those to cut.
        alive: from a choice of units to the classes that are left.
        value: what goes.
    """

    roundings: ClassVar[Sequence[int | str]] = ("fine", 1)

    def __init__(self, groups: Sequence[ChannelGroup], alive: Callable[[Vector], Mask], value: float) -> None:
        self.alive, self.value = alive, value
        self.units = np.concatenate([group.units for group in groups])
        self.together = 0

    def left(self, units: Vector) -> int:
        """How many units stay without these."""
        return int(self.alive(units)[self.units].sum())

    def fit(self, stairs: Steps) -> Choice | None:
        total = len(self.units)
        if self.value > total:
            raise ArgumentError(f"amount={self.value}: there are {total} units that may be pruned.")
        if self.value and not len(stairs):
            return None
        wanted = math.floor(self.value * total + 1e-9) if isinstance(self.value, float) else self.value
        everything = stairs.units(len(stairs))
        if self.left(everything) > total - wanted:
            return Choice(everything)
        units = stairs.land(Limit(self.left, total - wanted, spent=1.0))
        assert units is not None
        if self.left(units) < total - wanted:  # a step of several units: one step fewer
            units = stairs.units(max(0, self._fewest(stairs, total - wanted) - 1))
        if wanted and self.left(units) == total:
            self.together = total - self.left(stairs.units(1))
            return None
        return Choice(units)

    def _fewest(self, stairs: Steps, limit: int) -> int:
        height = stairs.search(lambda units: self.left(units) < limit)
        return len(stairs) if height is None else height

    def refusal(self, request: ChannelRequest) -> BudgetError:
        if self.together:
            return BudgetError(
                f"amount={self.value} of {len(self.units)} units cannot be reached: the fewest that go together are "
                f"{self.together}. Raise it, or leave out groups with `ignore`."
            )
        return BudgetError(
            f"amount={self.value} cannot be reached: max_per_group={request.max_per_group} and "
            f"at_least={request.at_least} leave nothing to mask."
        )


class Size(Budget):
    """MACs or parameters that may be left: a fraction of the dense model's (float) or a count (int).

    Args:
        grouping: of the module.
        alive: from a choice of units to the classes that are left.
        name: "macs" or "parameters".
        value: what may be left.
        added: what `finalize` adds to what is left.
    """

    def __init__(
        self, grouping: Grouping, alive: Callable[[Vector], Mask], name: str, value: float, added: int = 0
    ) -> None:
        self.grouping, self.alive, self.name, self.value, self.added = grouping, alive, name, value, added
        self.dense = grouping.dense[("macs", "parameters").index(name)]
        self.limit = limit_of(value, self.dense)
        self.least = self.dense

    @property
    def whole(self) -> float:
        """The share of the limit that the dense model is."""
        return share_of(self.dense, self.limit)

    @property
    def limits(self) -> tuple[float]:
        """What may be left."""
        return (self.limit,)

    def at(self, part: float) -> Size:
        """With a limit that is so much of the dense model."""
        return self.limited_to(limit_of(part, self.dense))

    def limited_to(self, limit: float) -> Size:
        """With another limit."""
        other = copy.copy(self)
        other.limit = limit
        return other

    def left(self, units: Vector) -> int:
        """What is left without the units."""
        count = self.grouping.macs if self.name == "macs" else self.grouping.parameters
        return count(self.alive(units)) + self.added

    def used(self, units: Vector) -> float:
        """The share of the limit that is left without the units."""
        return share_of(self.left(units), self.limit)

    def fit(self, stairs: Steps) -> Choice | None:
        units = stairs.land(Limit(self.left, self.limit, SPENT))
        if units is None:
            self.least = self.left(stairs.units(len(stairs)))
            return None
        return Choice(units)

    def refusal(self, request: ChannelRequest) -> BudgetError:
        stays = [group for group in self.grouping.groups if group.reason]
        stays.sort(key=lambda group: -getattr(group, self.name) * group.size)
        why = "; ".join(dict.fromkeys(f"{group.name!r}: {group.reason}" for group in stays[:3]))
        is_percentage = isinstance(self.value, int) and 1 <= self.value <= 100
        count = f" An integer is a count; for {self.value} % give {self.value / 100}." if is_percentage else ""
        wide = sum(g.size for g in self.grouping.groups if g.reason is None and g.kind == Kind.WIDTH)
        hint = f'{wide} units of the kind "width" were left alone: kinds=... takes them where it has "width". '
        left = hint if wide and request.kinds is None and request.targets is None else ""
        bounds = [f"{name}={value}" for name, value in request.bounds.items()]
        advice = " or loosen ".join([f"Raise {self.name}", " and ".join(bounds)] if bounds else [f"Raise {self.name}"])
        return BudgetError(
            f"{self.name}={self.value} cannot be reached: at most {self.limit:,.0f} of {self.dense:,} were asked for, "
            f"the best is {self.least:,} ({self.least / max(self.dense, 1):.3f}). "
            f"{advice}.{count} {left}"
            "What must stay (`fxprune.channel_groups`, or `fxprune groups` in a shell, has all): "
            f"{why or 'a unit of each'}.",
            {self.name: self.least},
        )


class Macs(Size):
    """`Size`, where what takes more time than its MACs tell goes first if the rounding leaves it open."""

    timed: ClassVar[bool] = True


class Sizes(Budget):
    """Several of `Size`: all of them are kept, and the one that binds is used up.

    Args:
        sizes: of MACs and of parameters.
    """

    timed: ClassVar[bool] = True

    def __init__(self, sizes: Sequence[Size]) -> None:
        self.sizes = sizes
        self.unreached = sizes[0]

    @property
    def whole(self) -> float:
        """The share of its limit that the dense model is, of the size that binds."""
        return max(size.whole for size in self.sizes)

    @property
    def limits(self) -> tuple[float, ...]:
        """What may be left of each."""
        return tuple(size.limit for size in self.sizes)

    def at(self, part: float) -> Sizes:
        """With limits of the same proportion, of which the one that binds is so much of the dense model."""
        return Sizes([size.limited_to(size.limit * part * self.whole) for size in self.sizes])

    def fit(self, stairs: Steps) -> Choice | None:
        units = stairs.land(Limit(self.used, 1.0, SPENT))
        if units is None:
            everything = stairs.units(len(stairs))
            self.unreached = max(self.sizes, key=lambda size: size.used(everything))
            self.unreached.least = self.unreached.left(everything)
            return None
        return Choice(units)

    def used(self, units: Vector) -> float:
        """The share of its limit that is left without the units, of the size that binds."""
        return max(size.used(units) for size in self.sizes)

    def refusal(self, request: ChannelRequest) -> BudgetError:
        return self.unreached.refusal(request)


class Speed(Budget):
    """How many times faster in onnxruntime.

    Args:
        grouping: of the module.
        alive: from a choice of units to the classes that are left.
        wanted: the factor, above 1.
        measure: from a choice of units to how many times faster the module then runs.
        start: the share of the MACs that is tried first; None: as many times less as is wanted.
        sizes: that every choice keeps as well.
    """

    timed: ClassVar[bool] = True

    def __init__(
        self,
        grouping: Grouping,
        alive: Callable[[Vector], Mask],
        wanted: float,
        measure: Callable[[Vector], float],
        start: float | None = None,
        sizes: Size | Sizes | None = None,
    ) -> None:
        self.grouping, self.alive, self.wanted, self.measure, self.sizes = grouping, alive, wanted, measure, sizes
        self.start = 1 / wanted if start is None else start
        self.best = 0.0

    def fit(self, stairs: Steps) -> Choice | None:
        """The fewest units measured to be fast enough: by at most `NEAR` more, or to 1/64 of the MACs left."""
        self.best = 0.0
        if self.sizes is None:
            return self._searched(stairs, self.start, 1.0)
        choice = self.sizes.fit(stairs)
        if choice is None:
            return None
        self.best = self.measure(choice.units)
        if self.best >= self.wanted * MARGIN:
            return replace(choice, speedup=self.best)
        most = self._macs(choice.units) / max(self.grouping.dense[0], 1)
        found = self._searched(stairs, most * min(0.95, self.best / self.wanted), most)
        return None if found is None else replace(found, for_speed=True)

    def _searched(self, stairs: Steps, share: float, too_slow: float) -> Choice | None:
        """From a first share of the MACs, and one that is known to be too slow."""
        fast_enough, found = 0.0, None
        for _ in range(10):
            units, within = self._cut(stairs, share)
            reached = self.measure(units)
            self.best = max(self.best, reached)
            if reached >= self.wanted * MARGIN:
                found, fast_enough = Choice(units, reached), share
            elif not within:
                break
            else:
                too_slow = share
            if found is None:
                share *= min(0.95, reached / self.wanted)
                continue
            is_near = found.speedup is None or found.speedup <= self.wanted * NEAR
            if is_near or too_slow - fast_enough < fast_enough / 64:
                break
            share = (too_slow + fast_enough) / 2
        return found

    def _macs(self, units: Vector) -> int:
        return self.grouping.macs(self.alive(units))

    def _cut(self, stairs: Steps, share: float) -> tuple[Vector, bool]:
        """The fewest units that leave a share of the MACs and keep the sizes, else all, and whether they do."""
        limit, sizes = share * self.grouping.dense[0], self.sizes
        if sizes is None:
            units = stairs.land(Limit(self._macs, limit, SPENT))
        else:
            used, macs = sizes.used, self._macs
            units = stairs.land(Limit(lambda units: max(used(units), share_of(macs(units), limit)), 1.0, SPENT))
        return (stairs.units(len(stairs)), False) if units is None else (units, True)

    def refusal(self, request: ChannelRequest) -> BudgetError:
        if self.sizes is not None and not self.best:
            return self.sizes.refusal(request)
        return BudgetError(
            f"speedup={self.wanted} cannot be reached: the best that was measured is {self.best:.2f}. No mask was "
            "inserted."
        )
