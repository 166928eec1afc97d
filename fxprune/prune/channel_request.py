"""What `fxprune.prune.channels` was asked for, checked, and the groups that the request is about."""

from __future__ import annotations

import fnmatch
import inspect
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from numbers import Integral, Real
from typing import Any

import torch
from torch.nn.utils.prune import BasePruningMethod

from fxprune.channels.groups import ChannelGroup, Kind
from fxprune.errors import ArgumentError, ArgumentTypeError, NameLookupError, PruningError
from fxprune.prune.importance_registry import IMPORTANCES, Evidence

Importance = str | Callable[[ChannelGroup], torch.Tensor]


class UnaskedAmount(float):
    """An amount that nobody gave: what a signature has as its default, told from the same number given by a caller."""


DEFAULT_AMOUNT = UnaskedAmount(0.5)

SIZES = ("macs", "parameters")  # budgets that count what is left


@dataclass(frozen=True)
class ChannelRequest:
    """Options that can be used together; as the arguments of `channels`.

    Attributes:
        budgets: what is asked for, by name: "amount", "macs", "parameters" or "speedup", and its value: a fraction
            (float), a count (int), or a factor for "speedup". All but "amount" may be there together.
        targets, ignore, kinds: each several, None for all.
        runnable: whether the class of the model is to run with what is left.
    """

    budgets: tuple[tuple[str, float], ...]
    importance: Importance
    scope: str
    round_to: int | str
    max_per_group: float
    at_least: int
    normalize: bool | None = None
    targets: tuple[str, ...] | None = None
    ignore: tuple[str, ...] = ()
    kinds: tuple[str, ...] | None = None
    runnable: bool = False

    def __post_init__(self) -> None:
        for name, value in self.budgets:
            _check_budget(name, value)
        if isinstance(self.importance, type | BasePruningMethod) or not isinstance(self.importance, str | Callable):
            raise ArgumentTypeError(
                f"importance is a {_kind(self.importance)}: one of {', '.join(IMPORTANCES)} is needed, or a function "
                "from a ChannelGroup to a tensor [units]. Scores of entries are given by a function under a name: "
                "fxprune.importance.register."
            )
        if not callable(self.importance) and (
            not isinstance(self.importance, str) or self.importance not in IMPORTANCES
        ):
            raise ArgumentError(
                f"importance={self.importance!r}: one of {', '.join(IMPORTANCES)} or a function is needed."
            )
        if callable(self.importance):
            _check_function(self.importance)
        if self.normalize not in (None, True, False):
            raise ArgumentError(f"normalize={self.normalize!r}: True, False or None is needed.")
        if self.scope not in ("global", "local"):
            raise ArgumentError(f'scope={self.scope!r}: "global" or "local" is needed.')
        if self.round_to != "auto" and not _is_count(self.round_to):
            raise ArgumentError(f'round_to={self.round_to!r}: "auto" or a positive integer is needed.')
        if isinstance(self.max_per_group, bool) or not isinstance(self.max_per_group, int | float):
            raise ArgumentTypeError(f"max_per_group={self.max_per_group!r}: a fraction from 0 to 1 is needed.")
        if not 0 <= self.max_per_group <= 1 or not _is_count(self.at_least):
            raise ArgumentError(
                f"max_per_group={self.max_per_group}, at_least={self.at_least}: 0 to 1, and 1 or more, are needed."
            )

    def asks_for(self, budget: str) -> bool:
        """Whether this is one of the budgets."""
        return budget in dict(self.budgets)

    @property
    def bounds(self) -> dict[str, float]:
        """What bounds the units that a group loses, by option, beyond what always does."""
        free = {"max_per_group": 1, "at_least": 1}
        return {name: getattr(self, name) for name, value in free.items() if getattr(self, name) != value}

    @property
    def sizes(self) -> list[str]:
        """The budgets of MACs and of parameters."""
        return [name for name, _ in self.budgets if name in SIZES]

    @property
    def of_channels(self) -> ChannelRequest:
        """The same of channels alone."""
        if self.kinds is None:
            return self
        return replace(self, kinds=tuple(kind for kind in self.kinds if kind != Kind.BLOCK))

    @property
    def may_take_blocks(self) -> bool:
        """Whether whole blocks may go where channels cannot keep the budgets: those of sizes, of no other kinds."""
        return self.is_of_sizes and (self.kinds is None or Kind.BLOCK in self.kinds)

    @property
    def is_of_sizes(self) -> bool:
        """Whether the budgets are of MACs or parameters."""
        return len(self.sizes) == len(self.budgets)


def request_for(
    budgets: tuple[tuple[str, float], ...],
    importance: Importance,
    *,
    scope: str = "global",
    targets: str | Iterable[str] | None = None,
    ignore: str | Iterable[str] = (),
    kinds: str | Iterable[str] | None = None,
    round_to: int | str = "auto",
    max_per_group: float = 1.0,
    at_least: int = 1,
    normalize: bool | None = None,
    runnable: bool = False,
) -> ChannelRequest:
    """The request for budgets, with options as callers give them to `channels`."""
    return ChannelRequest(
        budgets, importance, scope, plain_number(round_to), plain_number(max_per_group), plain_number(at_least),
        normalize, None if targets is None else _listed(targets), _listed(ignore),
        None if kinds is None else _listed(kinds), runnable,
    )  # fmt: skip


def _check_function(importance: Callable[..., object]) -> None:
    """Raise ArgumentTypeError unless a function can be called with a group alone."""
    try:
        signature = inspect.signature(importance)
    except (TypeError, ValueError):  # of what is not written in Python
        return
    try:
        signature.bind(None)
    except TypeError:
        name = getattr(importance, "__name__", type(importance).__name__)
        raise ArgumentTypeError(
            f"importance is {name}, which takes ({', '.join(signature.parameters)}); a function from a ChannelGroup "
            "alone to a tensor [units] is needed. A function that scores entries is given by the name under which "
            "fxprune.importance.register put it."
        ) from None


def _kind(value: object) -> str:
    return f"class, {value.__name__}" if isinstance(value, type) else type(value).__name__


def check_evidence(importance: Importance, evidence: Evidence) -> None:
    """Raise where data is given to an importance that looks at none, or a seed is no integer."""
    if evidence.seed is not None and (isinstance(evidence.seed, bool) or not isinstance(evidence.seed, int)):
        raise ArgumentTypeError(f"seed={evidence.seed!r}: an integer is needed, or None.")
    given = [name for name in ("loader", "loss", "max_batches", "weight") if getattr(evidence, name) is not None]
    blind = callable(importance) or importance == "random" or IMPORTANCES[importance].slices is not None
    measures = isinstance(importance, str) and IMPORTANCES[importance].curves is not None
    if evidence.weight is not None and not blind and not measures:
        raise ArgumentError(f'weight would be ignored by "{importance}": it says which inputs count for "obs".')
    if given and blind:
        name = "a function of a ChannelGroup" if callable(importance) else f'"{importance}"'
        raise ArgumentError(
            f"{' and '.join(given)} would be ignored: {name} looks at no data. Leave them out, or ask for an "
            'importance that does, such as "taylor".'
        )


def asked_for(
    amount: float | None, *, macs: float | None, parameters: float | None, speedup: float | None
) -> tuple[tuple[str, float], ...]:
    """The budgets that are given, by name and value: an amount, or others; `DEFAULT_AMOUNT` where none is."""
    budgets = {"macs": macs, "parameters": parameters, "speedup": speedup}
    given = {name: value for name, value in budgets.items() if value is not None}
    if given and amount is not None and not isinstance(amount, UnaskedAmount):
        name, value = next(iter(given.items()))
        raise ArgumentError(
            f"one budget at a time: amount={amount} and {name}={value} were given. amount is the share of the units "
            f"that goes, {name} {'how many times faster' if name == 'speedup' else 'what stays'}: give one of them."
        )
    if given:
        return tuple((name, plain_number(value)) for name, value in given.items())
    if amount is None:
        raise ArgumentError("no budget: give amount, macs, parameters or speedup.")
    return (("amount", float(amount) if isinstance(amount, UnaskedAmount) else plain_number(amount)),)


def plain_number(value: Any) -> Any:
    """A number of numpy's as Python's own; what is no number as it is."""
    if isinstance(value, bool | int | float):
        return value
    return int(value) if isinstance(value, Integral) else float(value) if isinstance(value, Real) else value


def _check_budget(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        others = (
            " All but the amount is given by name: targets='conv1', loader=batches, ..." if name == "amount" else ""
        )
        if isinstance(value, torch.Tensor) and value.dim() == 0:
            others = f" Give the tensor's number: {name}={value.item():g}."
        raise ArgumentTypeError(f"{name}={value!r}: a number is needed.{others}")
    if name == "speedup":
        allowed = value > 1
    elif isinstance(value, int):
        allowed = value >= 0
    else:
        allowed = 0 <= value <= 1
    if not allowed or value == float("inf"):
        raise ArgumentError(f"{name}={value}: {_allowed(name, value)}")


def _allowed(name: str, value: float) -> str:
    if name == "speedup":
        inverse = f"; for {value:g} of the latency give {1 / value:g}" if 0 < value < 1 else ""
        return f"a speedup is a factor above 1, such as 1.5{inverse}."
    percent = f" For {value:g} % give {value / 100:g}." if isinstance(value, float) and 1 < value <= 100 else ""
    return f"a fraction from 0 to 1 (float) or a count (int) is needed.{percent}"


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def chosen_groups(groups: Sequence[ChannelGroup], request: ChannelRequest) -> list[ChannelGroup]:
    """The groups to prune; those that lose channels together are picked together.

    Raises:
        NameLookupError: a pattern matches nothing, or there is no such kind.
        PruningError: nothing is left to prune.
    """
    return chosen_among(groups, request.targets, request.ignore, request.kinds)


def chosen_among(
    groups: Sequence[ChannelGroup],
    targets: str | Iterable[str] | None,
    ignore: str | Iterable[str],
    kinds: str | Iterable[str] | None,
) -> list[ChannelGroup]:
    """The groups that may be pruned and are asked for, with options as callers give them to `channels`; as above."""
    wanted, unwanted = None if targets is None else _listed(targets), _listed(ignore)
    _check_patterns(groups, [*(wanted or ()), *unwanted])
    allowed = _kinds(groups, None if kinds is None else _listed(kinds))
    usable = [g for g in groups if g.reason is None and g.size > 1 and g.kind in allowed]
    asked = [g for g in usable if wanted is None or _matches(g, wanted, ("writer",))]
    if kinds is None:  # the width is cut where it is asked for, by its kind or by names that nothing else has
        narrower = [g for g in asked if g.kind != Kind.WIDTH]
        asked = narrower if wanted is None or narrower else asked
    ignored = [g for g in usable if _matches(g, unwanted, ("writer", "reader"))]
    asked_blocks, ignored_blocks = _blocks(asked), _blocks(ignored)
    taken, left = set(map(id, asked)), set(map(id, ignored))
    picked = [
        g
        for g in usable
        if (id(g) in taken or g.block in asked_blocks) and id(g) not in left and g.block not in ignored_blocks
    ]
    if not picked:
        meant = [g for g in groups if wanted is not None and _matches(g, wanted, ("writer",))]
        staying = Counter(g.reason for g in meant if g.reason) or Counter(g.reason for g in groups if g.reason)
        reasons = "; ".join(reason for reason, _ in staying.most_common(3)) or "there are no groups"
        wide = sum(g.kind == Kind.WIDTH for g in usable) if kinds is None and wanted is None else 0
        hint = f', {wide} of the kind "width", which kinds="width" asks for' if wide else ""
        raise PruningError(f"no group is left to prune: {len(usable)} may be pruned at all{hint}. {reasons}.")
    return picked


def _listed(patterns: str | Iterable[str]) -> tuple[str, ...]:
    """One or several names.

    Raises:
        ArgumentTypeError: they are neither.
    """
    if not isinstance(patterns, str | Iterable):
        raise ArgumentTypeError(
            f"a {type(patterns).__name__} was given for names; a string such as 'conv1.weight', or several, is needed."
        )
    return (patterns,) if isinstance(patterns, str) else tuple(patterns)


def _check_patterns(groups: Sequence[ChannelGroup], patterns: Sequence[object]) -> None:
    names = {member.parameter for group in groups for member in group.members}
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise NameLookupError(
                f"a parameter is named by a string such as 'conv1.weight', or a pattern; got {type(pattern).__name__}."
            )
        if not any(is_named(pattern, name) for name in names):
            near = ", ".join(sorted(names)[:6])
            raise NameLookupError(f"{pattern!r} matches no parameter that carries channels. There are {near}, ...")


def _kinds(groups: Sequence[ChannelGroup], kinds: Sequence[str] | None) -> set[str]:
    there = {group.kind for group in groups}
    allowed = there if kinds is None else set(kinds)
    if unknown := allowed - there:
        raise NameLookupError(f"kinds={sorted(unknown)}: the groups are of the kinds {', '.join(sorted(there))}.")
    return allowed


def is_named(pattern: str, name: str) -> bool:
    """Whether a pattern names a parameter, or the module it is in."""
    return fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name, f"{pattern}.*")


def _matches(group: ChannelGroup, patterns: Sequence[str], roles: Sequence[str]) -> bool:
    return any(is_named(pattern, m.parameter) for pattern in patterns for m in group.members if m.role in roles)


def _blocks(groups: Iterable[ChannelGroup]) -> set[int]:
    """The blocks of groups that must lose channels together; a group of its own is in none."""
    return {group.block for group in groups if group.block >= 0}
