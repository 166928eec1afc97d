"""Masks on whole channels: coupled groups, scored, cut to a budget."""

from __future__ import annotations

import fnmatch
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import fx

from fxprune import driver
from fxprune.channels.budget import Staircase, ladders, masks, slice_scores
from fxprune.channels.groups import ChannelGroup, Grouping, Scores
from fxprune.channels.ids import Mask, Vector
from fxprune.errors import ArgumentError, ArgumentTypeError, NameLookupError, PruningError
from fxprune.graph.masks import masked
from fxprune.graph.names import locate
from fxprune.graph.traced import TracedModule
from fxprune.prune.importance import scores

Importance = str | Callable[[ChannelGroup], torch.Tensor]
NORMS = {"l1": 1.0, "l2": 2.0, "linf": torch.inf}
MARGIN = 1.02  # another process measures a little more or less
SPENT = 0.98  # share of a budget that counts as all of it
BIASED = ("conv", "linear", "batch_norm", "instance_norm")  # have a bias or a shift as third argument
KNOWN = (*NORMS, "random", "bn", "fpgm", "taylor")


@dataclass(frozen=True)
class ChannelReport:
    """What `fxprune.prune.channels` masked.

    Attributes:
        removed: by group, "name (kind)" -> (units masked, units in all).
        stayed: by group that was not considered, why.
        macs, parameters: (dense, after exact removal without alignment); MACs at the sample inputs.
        speedup: measured in onnxruntime, None where it was not asked for.
    """

    removed: dict[str, tuple[int, int]]
    stayed: dict[str, str]
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
    kinds: str | Iterable[str] | None = None,
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
    batch: int = 1,
    provider: str = "CPUExecutionProvider",
) -> ChannelReport:
    """Mask whole channels, by groups of slices that stand or fall together, so that `finalize` removes them exactly.

    The score of a unit is the mean over the slices that belong to it, of writers and readers alike, biases aside; for
    the global scope it is divided by its group's mean, so that layers of different scale compare. Both are the
    defaults of DepGraph (Fang et al., "DepGraph: Towards Any Structural Pruning", 2023, https://arxiv.org/abs/2301.12900).
    Rows of weights, biases, gains and shifts of normalizations are masked, and the columns that read them; training
    can go on, `finalize` makes it smaller. A unit that is masked already counts: called again with a smaller budget,
    the function masks more.

    Args:
        traced: the module, changed in place.
        amount: share of the units (float) or their number (int); one of the budgets below takes its place.
        importance: "l1", "l2", "linf" (norms of a slice, for l2 its square, as DepGraph takes it), "random", "bn"
            (gains of batch norm: Liu et al., "Network Slimming", 2017, https://arxiv.org/abs/1708.06519), "fpgm"
            (distance to the other filters: He et al., 2019, https://arxiv.org/abs/1811.00250), "taylor" (Molchanov et
            al., 2019, https://arxiv.org/abs/1906.10771; needs `loader` and `loss`), or a function from a
            `ChannelGroup` to a tensor [units]. "bn" leaves groups without a batch norm alone, and "fpgm" looks at the
            weights that write a group.
        scope: "global" compares units of all groups; "local" takes the same share of every group.
        targets: patterns of parameter or module names; groups that write one of these are pruned, None prunes all.
        ignore: patterns; groups with a member of such a name are left alone.
        kinds: the kinds of groups to prune, as in `ChannelGroup.kind`: "attention head", "MLP unit", ...; None: all.
        round_to: what stays of a group (of each conv group or head, where it has these) is rounded to the nearest
            multiple; "auto" takes 16 for convolutions, as onnxruntime computes them in blocks, and 1 for matrix
            products. Convolutions with fewer than 32 and 16 channels are cut to multiples of 8 and 4 where a budget
            cannot be kept else, and where `amount` is given; at last all are cut as they fall. Under a budget of MACs
            or speed, "auto" takes a multiple less where memory traffic makes MACs slow, and one more elsewhere.
        max_per_group: largest share of a group that goes. at_least: units that every group keeps.
        macs, parameters: what may be left, as a fraction of the dense model or as a count. Where whole blocks would
            not use 2 % of it, the last one may be of another group whose score is at most half as much more.
        speedup: how many times faster in onnxruntime than `traced` finalized as it is, measured on this machine.
        seed: for "random"; None draws from the global generator.
        loader, loss, batches: for "taylor", as for `fxprune.importance.scores`.
        threads, batch, provider: of the measurement for `speedup`; a batch that is not free is the sample's.

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
    given = {k: v for k, v in (("macs", macs), ("parameters", parameters), ("speedup", speedup)) if v is not None}
    name, value = _check(amount, given, importance, scope, round_to, max_per_group, at_least)
    grouping = Grouping(driver.plain_view(traced))
    if round_to == "auto" and name in ("macs", "parameters"):
        grouping.repair.align("auto")  # what finalize will keep counts against the budget
    picked = _targets(grouping, targets, [ignore] if isinstance(ignore, str) else list(ignore), kinds)
    labels = _labels(grouping.groups)
    stayed = {labels[id(g)]: g.reason for g in grouping.groups if g.reason}
    if importance == "bn":
        gains = _operands(grouping, 1, ("batch_norm",))
        without = [g for g in picked if gains.isdisjoint(m.parameter for m in g.members)]
        stayed |= {labels[id(g)]: "no batch norm has its gain" for g in without}
        picked = [g for g in picked if g not in without and not any(g.block == w.block >= 0 for w in without)]
        if not picked:
            raise PruningError('importance="bn" needs batch norms with a gain; no group that may be pruned has one.')
    scored = _scores(traced, grouping, picked, importance, seed, {"loader": loader, "loss": loss, "batches": batches})
    gone = [np.zeros(g.size, bool) for g in picked]
    if masked(traced):
        gone = [s == 0 for s in _scores(traced, grouping, picked, "linf", None, {})]
        grouping.gone = np.concatenate([g.units[dead] for g, dead in zip(picked, gone, strict=True)])
    if scope == "global":
        means = [s.mean(where=~dead) if not dead.all() else 0.0 for s, dead in zip(scored, gone, strict=True)]
        scored = [s / mean if mean > 0 else s for s, mean in zip(scored, means, strict=True)]
    lowest = min(float(s.min()) for s in scored) - 1  # what is gone counts first
    scored = [np.where(dead, lowest, s) for s, dead in zip(scored, gone, strict=True)]
    for group, score in zip(picked, scored, strict=True):  # where a choice is left, the highest scores stay
        grouping.repair.cost[group.units] = 1 - np.argsort(np.argsort(score, kind="stable")) / len(score)
    # whole blocks run fastest; a budget that they cannot keep is cut finer
    roundings: Sequence[int | str] = ("fine",) if name == "amount" else ("auto", "fine", 1)
    roundings = roundings if round_to == "auto" else (round_to,)
    timings = {"macs": (True, False), "speedup": (True,)}.get(name, (False,))
    measured = None
    for rounding in roundings:
        choices = (
            Staircase(ladders(picked, scored, rounding, max_per_group, at_least, timed), scope)
            for timed in (timings if isinstance(rounding, str) else (False,))
        )
        try:
            if name == "speedup":
                with driver.stopwatch(traced, threads=threads, batch=batch, provider=provider) as measure:
                    units, measured = _fastest(traced, grouping, next(choices), value, measure)
            else:
                units = _fit(grouping, choices, name, value)
            break
        except PruningError:
            if rounding == roundings[-1]:
                raise
    alive = grouping.alive(units)
    driver.insert_masks(traced, _requests(traced, grouping, alive))
    removed = {labels[id(g)]: (int((~alive[g.units]).sum()), g.size) for g in picked}
    (m, p, _), left, kept = grouping.dense, grouping.macs(alive), grouping.parameters(alive)
    return ChannelReport(removed, stayed, (m, left), (p, kept), measured)


def _labels(groups: Sequence[ChannelGroup]) -> dict[int, str]:
    found, seen = dict[int, str](), Counter[str]()
    for g in groups:
        seen[label := f"{g.name} ({g.kind})"] += 1
        found[id(g)] = label if seen[label] == 1 else f"{label} {seen[label]}"
    return found


def _fit(grouping: Grouping, choices: Iterator[Staircase], name: str, value: float) -> Vector:
    """The fewest units within the budget, of the first choice that uses it up, else of the one that uses most."""
    if name == "amount":
        stairs = next(choices)
        if value > stairs.total:
            raise ArgumentError(f"amount={value}: there are {stairs.total} units that may be pruned.")
        if value and not len(stairs):
            raise PruningError(f"amount={value} cannot be reached: max_per_group and at_least leave nothing to mask.")
        return stairs.units(stairs.count(value * stairs.total if isinstance(value, float) else value))
    count, dense = (grouping.macs, grouping.dense[0]) if name == "macs" else (grouping.parameters, grouping.dense[1])
    limit = value * dense * (1 + 1e-12) if isinstance(value, float) else value  # a count's share gives the count

    def left(units: Vector) -> int:
        return count(grouping.alive(units))

    def fits(units: Vector) -> bool:
        return left(units) <= limit

    best, found = -1, None
    for stairs in choices:
        if (height := stairs.search(fits)) is None:
            continue
        units = stairs.units(height)
        if left(units) < SPENT * limit:
            units = stairs.fill(height, left, limit)
        if (spent := left(units)) > best:
            best, found = spent, units
        if best >= SPENT * limit:
            break
    if found is None:
        least = left(stairs.units(len(stairs)))
        stays = sorted((g for g in grouping.groups if g.reason), key=lambda g: -getattr(g, name) * g.size)
        why = "; ".join({f"{g.name!r}: {g.reason}": None for g in stays[:3]})
        raise PruningError(
            f"{name}={value} cannot be reached: at most {limit:,.0f} of {dense:,} were asked for, the best is "
            f"{least:,} ({least / max(dense, 1):.3f}). Raise it, or max_per_group, or cut finer (round_to=1, and "
            f"align=1 in finalize). What must stay (`fxprune.channel_groups` has all): {why or 'a unit of each'}."
        )
    return found


def _fastest(
    traced: TracedModule, grouping: Grouping, stairs: Staircase, wanted: float, measure: Callable[[Any], float]
) -> tuple[Vector, float]:
    """The fewest units, to 1/32 of the MACs, that were measured to be fast enough, and how fast they are."""
    slow, fast, share, best = 1.0, 0.0, 1 / wanted, 0.0
    found: tuple[Vector, float] | None = None
    for _ in range(10):
        limit = share * grouping.dense[0]
        height = stairs.search(lambda units, limit=limit: grouping.macs(grouping.alive(units)) <= limit)  # type: ignore[misc]
        units = stairs.units(len(stairs) if height is None else height)
        reached = measure(_requests(traced, grouping, grouping.alive(units)))
        best = max(best, reached)
        if reached >= wanted * MARGIN:
            found, fast = (units, reached), share
        elif height is None:
            break
        else:
            slow = share
        if found is not None and slow - fast < 1 / 32:
            break
        share = (slow + fast) / 2 if found is not None else share * min(0.95, reached / wanted)
    if found is None:
        raise PruningError(
            f"speedup={wanted} cannot be reached: the best that was measured is {best:.2f}. No mask was inserted."
        )
    return found


def _check(
    amount: float | None, given: dict[str, float], importance: Importance, scope: str, round_to: Any,
    max_per_group: float, at_least: int,
) -> tuple[str, float]:  # fmt: skip
    """The budget's name and value; refuses options that cannot be used."""
    if len(given) > 1:
        raise ArgumentError(f"one budget at a time: {' and '.join(f'{k}={v}' for k, v in given.items())} were given.")
    if not given and amount is None:
        raise ArgumentError("no budget: give amount, macs, parameters or speedup.")
    name, value = next(iter(given.items()), ("amount", amount))
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ArgumentTypeError(f"{name}={value!r}: a number is needed.")
    whole = isinstance(value, int) and name != "speedup"
    if not (value > 1 if name == "speedup" else value >= 0 if whole else 0 <= value <= 1) or value == np.inf:
        raise ArgumentError(f"{name}={value}: a fraction from 0 to 1 or a count is needed; a speedup is above 1.")
    if not callable(importance) and importance not in KNOWN:
        raise ArgumentError(f"importance={importance!r}: one of {', '.join(KNOWN)} or a function is needed.")
    if scope not in ("global", "local"):
        raise ArgumentError(f'scope={scope!r}: "global" or "local" is needed.')
    if round_to != "auto" and (isinstance(round_to, bool) or not isinstance(round_to, int) or round_to < 1):
        raise ArgumentError(f'round_to={round_to!r}: "auto" or a positive integer is needed.')
    if not 0 <= max_per_group <= 1 or isinstance(at_least, bool) or not isinstance(at_least, int) or at_least < 1:
        raise ArgumentError(f"max_per_group={max_per_group}, at_least={at_least}: 0 to 1, and 1 or more, are needed.")
    return name, value


def _targets(
    grouping: Grouping, targets: str | Iterable[str] | None, ignore: Sequence[str], kinds: str | Iterable[str] | None
) -> list[ChannelGroup]:
    """The groups to prune; those that lose channels together are picked together."""
    wanted = None if targets is None else [targets] if isinstance(targets, str) else list(targets)
    names = {m.parameter for g in grouping.groups for m in g.members}

    def matches(pattern: str, name: str) -> bool:
        return any(fnmatch.fnmatchcase(name, p) for p in (pattern, f"{pattern}.*"))

    for pattern in [*(wanted or ()), *ignore]:
        if not isinstance(pattern, str) or not any(matches(pattern, name) for name in names):
            near = ", ".join(sorted(names)[:6])
            raise NameLookupError(f"{pattern!r} matches no parameter that carries channels. There are {near}, ...")
    there = {g.kind for g in grouping.groups}
    allowed = there if kinds is None else {kinds} if isinstance(kinds, str) else set(kinds)
    if unknown := allowed - there:
        raise NameLookupError(f"kinds={sorted(unknown)}: the groups are of the kinds {', '.join(sorted(there))}.")
    usable = [g for g in grouping.groups if g.reason is None and g.size > 1 and g.kind in allowed]

    def named(g: ChannelGroup, patterns: Sequence[str], roles: Sequence[str]) -> bool:
        return any(matches(p, m.parameter) for p in patterns for m in g.members if m.role in roles)

    into = [g for g in usable if wanted is None or named(g, wanted, ["writer"])]
    left = [g for g in usable if named(g, ignore, ["writer", "reader"])]
    kept = {g.block for g in left} - {-1}
    blocks = {g.block for g in into} - {-1}
    picked = [g for g in usable if (g in into or g.block in blocks) and g.block not in kept and g not in left]
    if not picked:
        reasons = "; ".join(sorted({g.reason for g in grouping.groups if g.reason})[:3]) or "there are no groups"
        raise PruningError(f"no group is left to prune: {len(usable)} may be pruned at all. {reasons}.")
    return picked


def _scores(
    traced: TracedModule, grouping: Grouping, picked: Sequence[ChannelGroup], importance: Importance,
    seed: int | None, evidence: dict[str, Any],
) -> list[Scores]:  # fmt: skip
    if callable(importance):
        found = []
        for group in picked:
            value = importance(group)
            if (shape := np.shape(value)) != (group.size,):
                told = f"{type(value).__name__} of shape {tuple(shape)}"
                raise PruningError(f"importance gave a {told} for {group.name!r}, not a tensor [{group.size}].")
            found.append(torch.as_tensor(value).detach().double().cpu().numpy())
        return found
    if importance == "random":
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        return [torch.rand(g.size, generator=generator, dtype=torch.float64).numpy() for g in picked]
    names = {m.parameter for g in picked for m in g.members} - _operands(grouping, 2, BIASED)
    if importance == "bn":
        names = _operands(grouping, 1, ("batch_norm",))
    given = {name: grouping.plain.get_parameter(name) for name in names}
    if importance == "taylor":
        given = scores(traced, sorted(names & _plain_names(traced)), "taylor", seed=seed, **evidence)  # type: ignore[assignment]

    def score(name: str, axis: int, role: str) -> torch.Tensor | None:
        if name not in given or (importance == "fpgm" and (role == "reader" or given[name].dim() < 2)):
            return None
        rows, across = grouping.slices(name, axis, given[name].detach())
        rows = rows if rows.dtype == torch.float64 else rows.float()
        if importance == "fpgm":
            filters = rows.flatten(across[0]).flatten(0, -2)
            return torch.cdist(filters, filters).sum(1)
        if importance == "taylor":
            return rows.sum(across).flatten()
        norms: torch.Tensor = torch.linalg.vector_norm(rows, NORMS.get(importance, 1.0), dim=across)
        return (norms.square() if importance == "l2" else norms).flatten()

    values = slice_scores(grouping, score)
    return [values[group.units] for group in picked]


def _operands(grouping: Grouping, position: int, operators: Sequence[str]) -> set[str]:
    """Parameters at a position of the operators: weights and gains at 1, biases and shifts at 2."""
    nodes = [n for n in grouping.plain.graphs["eval"].nodes if any(name in str(n.target) for name in operators)]
    found = [n.args[position] for n in nodes if len(n.args) > position]
    return {str(operand.target) for operand in found if isinstance(operand, fx.Node)}


def _plain_names(traced: TracedModule) -> set[str]:
    return {name for name, _ in traced.named_parameters(remove_duplicate=False)} | set(masked(traced))


def _requests(traced: TracedModule, grouping: Grouping, alive: Mask) -> dict[str, torch.Tensor]:
    """The masks to insert: those of what is dead, times what is there."""
    wanted = masks(grouping, alive)
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
