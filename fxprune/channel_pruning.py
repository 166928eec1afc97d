"""Masks on whole channels: coupled groups, scored, cut to a budget."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import fx

from fxprune import driver
from fxprune.channels.budget import Ladder, Scores, choose, ladders, masks, slice_scores
from fxprune.channels.groups import ChannelGroup, Grouping
from fxprune.channels.ids import Vector
from fxprune.errors import ArgumentError, ArgumentTypeError, NameLookupError, PruningError
from fxprune.graph import locate
from fxprune.reparametrize import masked
from fxprune.traced import TracedModule

Importance = str | Callable[[ChannelGroup], torch.Tensor]


@dataclass(frozen=True)
class ChannelReport:
    """What `fxprune.prune.channels` masked.

    Attributes:
        removed: by group, "name (kind)" -> (units masked, units in all).
        macs, parameters: (before, after), after exact removal without alignment; MACs at the sample inputs.
        speedup: measured in onnxruntime, None where it was not asked for.
    """

    removed: dict[str, tuple[int, int]]
    macs: tuple[int, int]
    parameters: tuple[int, int]
    speedup: float | None = None


def channels(
    traced: TracedModule,
    amount: float | None = 0.5,
    *,
    importance: Importance = "l2",
    scope: str = "global",
    targets: str | Iterable[str] | None = None,
    ignore: str | Iterable[str] = (),
    round_to: int | str = "auto",
    max_per_group: float = 1.0,
    at_least: int = 1,
    macs: float | None = None,
    parameters: float | None = None,
    speedup: float | None = None,
    seed: int | None = None,
    loader: Iterable[Any] | None = None,
    loss: Callable[[Any, Any], torch.Tensor] | None = None,
    batches: int | None = None,
    threads: int = 1,
    batch: int | None = None,
    providers: Sequence[str] = ("CPUExecutionProvider",),
) -> ChannelReport:
    """Mask whole channels, by groups of slices that stand or fall together, so that `finalize` removes them exactly.

    The score of a unit is the mean over the slices that belong to it, of writers and readers alike; for the global
    scope it is divided by its group's mean, so that layers of different scale compare. Both are the defaults of
    DepGraph (Fang et al., "DepGraph: Towards Any Structural Pruning", 2023, https://arxiv.org/abs/2301.12900).
    Rows of weights, biases and gains of normalizations are masked; training can go on, `finalize` makes it smaller.

    Args:
        traced: the module, changed in place.
        amount: share of the units (float) or their number (int); one of the budgets below takes its place.
        importance: "l1", "l2", "linf" (norms of a slice), "random", "bn" (gains of batch norm: Liu et al., "Network
            Slimming", 2017, https://arxiv.org/abs/1708.06519), "fpgm" (distance to the other filters: He et al., 2019,
            https://arxiv.org/abs/1811.00250), "taylor" (Molchanov et al., 2019, https://arxiv.org/abs/1906.10771; needs
            `loader` and `loss`), or a function from a `ChannelGroup` to a tensor [units].
        scope: "global" compares units of all groups; "local" takes the same share of every group.
        targets: patterns of parameter or module names; groups that write one of these are pruned, None prunes all.
        ignore: patterns; groups with a member of such a name are left alone.
        round_to: what stays of a group is rounded to the nearest multiple; "auto" takes 16 for convolutions (4 for
            those with fewer than 32 channels), as onnxruntime computes them in blocks, and 1 for matrix products.
        max_per_group: largest share of a group that goes. at_least: units that every group keeps.
        macs, parameters: what may be left, as a fraction of the dense model or as a count.
        speedup: how many times faster in onnxruntime than the dense model, measured on this machine.
        seed: for "random"; None draws from the global generator.
        loader, loss, batches: for "taylor", as for `fxprune.importance.scores`.
        threads, batch, providers: of the measurement for `speedup`; `batch` None takes the sample's.

    Returns:
        A `ChannelReport`.

    Raises:
        ArgumentError, ArgumentTypeError: contradictory, missing or unusable options.
        NameLookupError: a pattern matches nothing.
        PruningError: nothing may be pruned, a budget cannot be reached (the message has the best value), or scores
            are NaN. No mask is inserted then.

    Example:
        >>> report = fxprune.prune.channels(traced, macs=0.5)
        >>> final = fxprune.finalize(traced)
    """
    budgets = {"macs": macs, "parameters": parameters, "speedup": speedup}
    given = {name: value for name, value in budgets.items() if value is not None}
    _check(amount, given, scope, round_to, max_per_group, at_least)
    grouping = Grouping(driver.plain_copy(traced))
    picked = _targets(grouping, targets, [ignore] if isinstance(ignore, str) else list(ignore))
    evidence = {"loader": loader, "loss": loss, "batches": batches}
    scored = _scores(traced, grouping, picked, importance, seed, evidence)
    if scope == "global":
        scored = [s / s.mean() if s.mean() > 0 else s for s in scored]
    steps = ladders(picked, scored, round_to, max_per_group, at_least)
    measured = None
    if speedup is not None:
        units, measured = driver.search_speedup(
            traced, speedup, lambda share: _requests(traced, grouping, choose(steps, scope, None, share, "")),
            lambda share: choose(steps, scope, None, share, ""), threads=threads, batch=batch, providers=providers,
        )  # fmt: skip
    else:
        name, value = next(iter(given.items()), ("amount", amount))
        units = _fit(grouping, steps, scope, name, value)
    driver.insert_masks(traced, _requests(traced, grouping, units))
    left = grouping.alive(units)
    chosen = np.isin
    removed = {f"{g.name} ({g.kind})": (int(chosen(g.units, units).sum()), g.size) for g in picked}
    return ChannelReport(
        removed, (grouping.macs(), grouping.macs(left)), (grouping.parameters(), grouping.parameters(left)), measured
    )


def _fit(grouping: Grouping, steps: list[Ladder], scope: str, name: str, value: Any) -> Vector:
    if name == "amount":
        return choose(steps, scope, None, value, "amount")
    count = grouping.macs if name == "macs" else grouping.parameters
    limit = value * count() if isinstance(value, float) else value
    most = np.concatenate([ladder.units[:, : ladder.removed(ladder.steps)].reshape(-1) for ladder in steps])
    best = count(grouping.alive(most))
    what = f"{name}={value} (at most {limit:,.0f} of {count():,}; the best is {best:,}, {best / max(count(), 1):.3f})"
    return choose(steps, scope, lambda units: count(grouping.alive(units)) <= limit, 0.0, what)


def _check(
    amount: float | None, given: dict[str, float], scope: str, round_to: Any, max_per_group: float, at_least: int
) -> None:
    if len(given) > 1:
        raise ArgumentError(f"one budget at a time: {' and '.join(f'{k}={v}' for k, v in given.items())} were given.")
    if not given and amount is None:
        raise ArgumentError("no budget: give amount, macs, parameters or speedup.")
    for name, value in given.items() if given else [("amount", amount)]:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ArgumentTypeError(f"{name}={value!r}: a number is needed.")
        high = np.inf if isinstance(value, int) or name == "speedup" else 1.0
        low = 1.0 if name == "speedup" else 0
        if not low <= value <= high:
            raise ArgumentError(f"{name}={value}: a fraction from 0 to 1 or a count is needed; a speedup is above 1.")
    if scope not in ("global", "local"):
        raise ArgumentError(f'scope={scope!r}: "global" or "local" is needed.')
    if round_to != "auto" and (isinstance(round_to, bool) or not isinstance(round_to, int) or round_to < 1):
        raise ArgumentError(f'round_to={round_to!r}: "auto" or a positive integer is needed.')
    if not 0 <= max_per_group <= 1 or at_least < 1:
        raise ArgumentError(f"max_per_group={max_per_group}, at_least={at_least}: 0 to 1, and 1 or more, are needed.")


def _targets(
    grouping: Grouping, targets: str | Iterable[str] | None, ignore: Sequence[str]
) -> list[ChannelGroup]:
    wanted = None if targets is None else [targets] if isinstance(targets, str) else list(targets)
    names = {m.parameter for g in grouping.groups for m in g.members}

    def matches(pattern: str, name: str) -> bool:
        return fnmatch.fnmatchcase(name, pattern) or name.startswith(f"{pattern}.") or fnmatch.fnmatchcase(name, f"{pattern}.*")

    for pattern in [*(wanted or ()), *ignore]:
        if not any(matches(pattern, name) for name in names):
            near = ", ".join(sorted(names)[:6])
            raise NameLookupError(f"{pattern!r} matches no parameter that carries channels. There are {near}, ...")
    open_groups = [g for g in grouping.groups if g.reason is None and g.size > 1]
    picked = [
        g
        for g in open_groups
        if (wanted is None or any(matches(p, m.parameter) for p in wanted for m in g.members if m.role == "writer"))
        and not any(matches(p, m.parameter) for p in ignore for m in g.members)
    ]
    if not picked:
        reasons = "; ".join(sorted({g.reason for g in grouping.groups if g.reason})[:3]) or "there are no channel groups"
        raise PruningError(f"no group is left to prune: {len(open_groups)} may be pruned at all. {reasons}.")
    return picked


def _scores(
    traced: TracedModule, grouping: Grouping, picked: Sequence[ChannelGroup], importance: Importance,
    seed: int | None, evidence: dict[str, Any],
) -> list[Scores]:  # fmt: skip
    def tensor(name: str, role: str) -> torch.Tensor | None:
        return grouping.plain.get_parameter(name)

    if callable(importance):
        found = []
        for group in picked:
            value = torch.as_tensor(importance(group)).detach().double().cpu()
            if value.shape != (group.size,):
                raise PruningError(f"importance gave shape {tuple(value.shape)} for {group.name!r}: ({group.size},) is needed.")
            found.append(value.numpy())
        return found
    if importance == "random":
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        return [torch.rand(g.size, generator=generator, dtype=torch.float64).numpy() for g in picked]
    norms = {"l1": 1.0, "l2": 2.0, "linf": torch.inf}
    of = tensor

    def reduce(t: torch.Tensor, axis: int) -> torch.Tensor:
        others = [d for d in range(t.dim()) if d != axis]
        t = t if t.dtype in (torch.float32, torch.float64) else t.float()
        return torch.linalg.vector_norm(t, norms.get(importance, 1.0), dim=others) if others else t.abs()

    if importance in norms:
        pass
    elif importance == "bn":
        gains = _gains(grouping)
        of = lambda name, role: tensor(name, role) if name in gains else None  # noqa: E731
    elif importance == "fpgm":
        of = lambda name, role: tensor(name, role) if role == "writer" and _rank(grouping, name) > 1 else None  # noqa: E731

        def reduce(t: torch.Tensor, axis: int) -> torch.Tensor:
            filters = t.movedim(axis, 0).flatten(1).float()
            return torch.cdist(filters, filters).sum(1)
    elif importance == "taylor":
        from fxprune import importance as elementwise

        names = sorted({m.parameter for g in picked for m in g.members if m.role == "writer"} & _plain_names(traced))
        given = elementwise.scores(traced, names, "taylor", seed=seed, **evidence)
        of = lambda name, role: given.get(name)  # noqa: E731
    else:
        known = (*norms, "random", "bn", "fpgm", "taylor")
        raise ArgumentError(f"importance={importance!r}: one of {', '.join(known)} or a function is needed.")
    index = {id(g): i for i, g in enumerate(grouping.groups)}
    every = slice_scores(grouping, reduce, of)
    return [every[index[id(g)]] for g in picked]


def _rank(grouping: Grouping, name: str) -> int:
    return grouping.plain.get_parameter(name).dim()


def _gains(grouping: Grouping) -> set[str]:
    nodes = [n for n in grouping.plain.graphs["eval"].nodes if "batch_norm" in str(n.target)]
    found = {str(n.args[1].target) for n in nodes if isinstance(n.args[1], fx.Node)}
    if not found:
        raise PruningError('importance="bn" needs batch norms with a gain; the model has none.')
    return found


def _plain_names(traced: TracedModule) -> set[str]:
    return {name for name, _ in traced.named_parameters(remove_duplicate=False)} | set(masked(traced))


def _requests(traced: TracedModule, grouping: Grouping, units: Vector) -> dict[str, torch.Tensor]:
    """The masks to insert: those of the units, times what is there."""
    wanted = masks(grouping, units)
    if hidden := sorted(wanted.keys() - _plain_names(traced)):
        raise PruningError(
            f"{', '.join(hidden[:5])} of a chosen group is computed by a parametrization, which a channel mask would "
            "act on. Remove it first (fxprune.remove_weight_norm, fxprune.finalize), or name it in `ignore`."
        )
    found = {}
    for name, mask in wanted.items():
        owner, attribute = locate(traced, name)
        present = owner._buffers.get(f"{attribute}_mask")
        found[name] = mask if present is None else mask.to(present) * present
    return found
