"""Whole residual blocks masked, where channels alone cannot keep a budget, or where they are asked for by their kind.

Those of the lowest scores go first, as few as the budget needs. Channels are then chosen in what is left: a copy of the
graph without them, in which what is behind them counts anew, as in the class of the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn

from fxprune import driver
from fxprune.artifacts.following_configurations import outputs_of, same_outputs
from fxprune.artifacts.gone_blocks import renamed
from fxprune.artifacts.plain_copy import deep_copy
from fxprune.channels.groups import ChannelGroup, Grouping, Kind
from fxprune.errors import ArgumentError, BudgetError, PruningError
from fxprune.graph.depths import Renaming, follow_depth, shallower
from fxprune.graph.masks import MasksOnDemand
from fxprune.graph.names import tensors_of
from fxprune.graph.snapshot import preserved
from fxprune.graph.traced import TracedModule
from fxprune.prune.channel_budgets import limit_of
from fxprune.prune.channel_choice import Outcome, finalized_sizes
from fxprune.prune.channel_request import SIZES, ChannelRequest, Importance, is_named
from fxprune.prune.channel_scores import is_relative, scorable, unit_scores
from fxprune.prune.importance_registry import Evidence
from fxprune.prune.losses import are_losses, losses
from fxprune.prune.residual_blocks import Block, residual_blocks, without
from fxprune.prune.sensitivity import Sensitivity

# a module, what is asked of it, and the model that its class is known by, to a choice of channels
Choose = Callable[[TracedModule, ChannelRequest, nn.Module | None], Outcome]


@dataclass(frozen=True)
class WholeBlocks:
    """Blocks that are masked, and what is chosen of the rest.

    Attributes:
        blocks: those that go. of: by the path of each list, how many there are.
        dense: MACs and parameters of the whole module. left: what `finalize` leaves of them.
        outcome: of the choice of channels in what is left, None where none was needed. names: of what is left there.
        masks: all that are to be inserted, made when they are asked for.
        decided: the axes of parameters whose counts are decided.
        sample: what MACs are counted for.
    """

    blocks: list[Block]
    of: dict[str, int]
    dense: tuple[int, int]
    left: tuple[int, int]
    outcome: Outcome | None
    names: Mapping[str, str]
    masks: Mapping[str, torch.Tensor]
    decided: frozenset[tuple[str, int]]
    sample: str


def whole_blocks(
    before: TracedModule,
    request: ChannelRequest,
    evidence: Evidence,
    model: nn.Module | None,
    choose: Choose | None = None,
    refusal: PruningError | None = None,
) -> WholeBlocks:
    """The blocks that go, and channels where these are needed.

    Args:
        before: the module, as it was before the choice.
        request: what was asked for. evidence: what scores may look at.
        model: of the class that is to run with what is left, None where none is.
        choose: chooses channels; None where blocks alone are asked for. refusal: what came of channels alone.

    Raises:
        PruningError: there is no block, or the budget is not kept without them, either.
    """
    plain = driver.plain_view(before)
    there = [block for block in residual_blocks(plain) if _is_asked_for(block, plain, request)]
    if not there:
        raise PruningError(_NO_BLOCKS)
    grouping = Grouping(plain)
    ordered = _by_score(before, grouping, there, request, evidence)
    budget = _Budget.of(request, grouping, len(there))
    smaller: _Smaller | None = None
    least, last = _Least.of(refusal, grouping.dense[:2]), None
    for block in ordered:
        taken = [] if smaller is None else smaller.blocks
        if budget.number is not None and len(taken) >= budget.number:
            break
        if not _may_go(block, taken, request):
            continue
        found = _Smaller.of(before, [*taken, block], model)
        if found is None:
            continue
        smaller = found
        if budget.is_kept(smaller.left):
            return smaller.alone(there, grouping)
        if choose is not None and least.may_be_kept(budget.limits, smaller.left):
            try:
                outcome = choose(smaller.module, smaller.request(request, budget, grouping), smaller.model)
            except PruningError as error:
                least, last = _Least.of(error, smaller.left), error
                continue
            return smaller.with_channels(outcome, there, grouping)
    if smaller is not None and budget.number is not None:
        return smaller.alone(there, grouping)
    raise _refusal(request, grouping, smaller, there, last)


_NO_BLOCKS = (
    "there are no residual blocks that could go: modules in a list, x + f(x), of which nothing but the sum is read "
    "outside, and whose branches end in layers of their own."
)


def _refusal(
    request: ChannelRequest,
    grouping: Grouping,
    smaller: _Smaller | None,
    there: Sequence[Block],
    last: PruningError | None,
) -> PruningError:
    names = ", ".join(block.name for block in there[:5])
    if smaller is None:
        return PruningError(
            f"none of the residual blocks ({names}) can go: the class of the model, or its configuration, makes no "
            f"model without one that computes the same, or max_per_group={request.max_per_group} and "
            f"at_least={request.at_least} keep them."
        )
    gone = ", ".join(block.name for block in smaller.blocks)
    told = "; ".join(
        f"{name}={dict(request.budgets)[name]} cannot be reached by whole blocks: without {gone} {part:,} of {whole:,} "
        f"({part / max(whole, 1):.3f}) are left"
        for name, whole, part in zip(SIZES, grouping.dense, smaller.left, strict=False)
        if name in request.sizes
    )
    also = f" Channels beside them: {str(last).partition('. ')[0]}." if last is not None else ""
    return BudgetError(f"{told}.{also}")


def _is_asked_for(block: Block, plain: TracedModule, request: ChannelRequest) -> bool:
    """Whether targets name all that ends its branches, and what is ignored none of its parameters."""
    inside = [name for name, _ in plain.named_parameters() if name.startswith(f"{block.name}.")]
    if any(is_named(pattern, name) for pattern in request.ignore for name in inside):
        return False
    wanted = request.targets
    return wanted is None or all(any(is_named(pattern, name) for pattern in wanted) for name in block.parameters)


def _may_go(block: Block, taken: Sequence[Block], request: ChannelRequest) -> bool:
    """Whether a list can lose one more; one within another that goes, or around it, cannot."""
    apart = all(
        not f"{one.name}.".startswith(f"{other.name}.")
        for each in taken
        for one, other in ((block, each), (each, block))
    )
    gone = 1 + sum(other.path == block.path for other in taken)
    most = min(block.of - request.at_least, math.floor(request.max_per_group * block.of + 1e-9))
    return apart and gone <= most


@dataclass(frozen=True)
class _Budget:
    """What may be left, as counts by name; or the number of blocks that go."""

    limits: dict[str, float]
    number: int | None

    @classmethod
    def of(cls, request: ChannelRequest, grouping: Grouping, blocks: int) -> _Budget:
        asked = dict(request.budgets)
        if "speedup" in asked:
            raise ArgumentError("blocks go for MACs, parameters or an amount: leave speedup out.")
        if "amount" in asked:
            amount = asked["amount"]
            number = math.floor(amount * blocks + 1e-9) if isinstance(amount, float) else int(amount)
            if number > blocks:
                raise ArgumentError(f"amount={amount}: there are {blocks} blocks that may go.")
            return cls({}, number)
        dense = dict(zip(SIZES, grouping.dense, strict=False))
        return cls({name: limit_of(asked[name], dense[name]) for name in request.sizes}, None)

    def is_kept(self, left: tuple[int, int]) -> bool:
        """Whether MACs and parameters are few enough."""
        if self.number is not None:
            return False
        found = dict(zip(SIZES, left, strict=True))
        return all(found[name] <= limit for name, limit in self.limits.items())


@dataclass(frozen=True)
class _Least:
    """The best that channels came to.

    Attributes:
        found: what that leaves of a size, by name. whole: MACs and parameters of what they were chosen in.
    """

    found: dict[str, int]
    whole: tuple[int, int]

    @classmethod
    def of(cls, refusal: PruningError | None, whole: tuple[int, int]) -> _Least:
        return cls(refusal.least if isinstance(refusal, BudgetError) else {}, whole)

    def may_be_kept(self, limits: Mapping[str, float], left: tuple[int, int]) -> bool:
        """Whether channels of what is left without more blocks could keep limits.

        With these blocks whole, such a choice would have been one before.
        """
        sizes = dict(zip(SIZES, zip(self.whole, left, strict=True), strict=True))
        gone = {name: whole - part for name, (whole, part) in sizes.items()}
        return all(least - gone[name] <= limits[name] for name, least in self.found.items() if name in limits)


@dataclass(frozen=True)
class _Smaller:
    """A module without some of its blocks.

    Attributes:
        before: the module. blocks: those that are left out.
        module: the rest, under the names that it has without them. model: of the same names, None without a class.
        names: from these names to those of the module. renaming: the reverse.
        left: MACs and parameters that `finalize` leaves.
    """

    before: TracedModule
    blocks: list[Block]
    module: TracedModule
    model: nn.Module | None
    names: dict[str, str]
    renaming: Renaming
    left: tuple[int, int]

    @classmethod
    def of(cls, before: TracedModule, blocks: list[Block], model: nn.Module | None) -> _Smaller | None:
        """Without some blocks; None where the class makes no model of that, or one that computes something else."""
        gone: dict[str, frozenset[int]] = {}
        for block in blocks:
            gone[block.path] = gone.get(block.path, frozenset()) | {block.number}
        small: nn.Module | None = None
        if model is not None:
            found = shallower(model, gone)
            if found is None or found.gone != gone:
                return None
            small = deep_copy(model)
            follow_depth(small, found)
        renaming = Renaming(gone)
        module = renamed(without(before, blocks), renaming)
        if small is not None and not _computes(small, module):
            return None
        names = {new: name for name in tensors_of(before) if (new := renaming(name)) is not None}
        left = finalized_sizes(module, {}, module.decided)
        return cls(before, blocks, module, small, names, renaming, left)

    def request(self, request: ChannelRequest, budget: _Budget, grouping: Grouping) -> ChannelRequest:
        """What is asked of the rest: counts, of names that it has."""
        budgets = tuple((name, math.floor(limit)) for name, limit in budget.limits.items())
        kinds = None if request.kinds is None else tuple(kind for kind in request.kinds if kind != Kind.BLOCK)
        there = {member.parameter for group in grouping.groups for member in group.members}

        def own(patterns: Sequence[str]) -> tuple[str, ...]:
            named = (name for name in sorted(there) if any(is_named(pattern, name) for pattern in patterns))
            return self.renaming.of_names([*named])

        targets = None if request.targets is None else own(request.targets)
        importance = self._importance(request.importance)
        return replace(
            request, budgets=budgets, kinds=kinds, targets=targets, ignore=own(request.ignore), importance=importance
        )

    def _importance(self, importance: Importance) -> Importance:
        """An importance that is asked by the names of the module."""
        if isinstance(importance, str):
            return importance
        if isinstance(importance, Sensitivity):
            curves = [replace(curve, name=new) for curve in importance.curves if (new := self.renaming(curve.name))]
            found = [replace(curve, members=self._members(curve.members)) for curve in curves]
            return replace(importance, curves=tuple(found))

        def score(group: ChannelGroup) -> torch.Tensor:
            return importance(self.restored(group))

        return score

    def _members(self, members: Sequence[str]) -> tuple[str, ...]:
        parts = ((parameter, mark + rest) for parameter, mark, rest in (m.partition("[") for m in members))
        return tuple(new + rest for parameter, rest in parts if (new := self.renaming(parameter)) is not None)

    def restored(self, group: ChannelGroup) -> ChannelGroup:
        """A group of the rest by the names of the module."""
        members = tuple(replace(m, parameter=self.names.get(m.parameter, m.parameter)) for m in group.members)
        return replace(group, name=self.names.get(group.name, group.name), members=members)

    def alone(self, there: Sequence[Block], grouping: Grouping) -> WholeBlocks:
        """Without channels."""
        return self._whole(there, grouping, None, self.left, {}, self.before.decided)

    def with_channels(self, outcome: Outcome, there: Sequence[Block], grouping: Grouping) -> WholeBlocks:
        """With a choice of channels in the rest."""
        masks = {self.names[name]: name for name in outcome.masks}
        decided = frozenset((self.names.get(name, name), axis) for name, axis in outcome.among.decided)
        left = outcome.macs, outcome.parameters
        return self._whole(there, grouping, outcome, left, masks, decided | self.before.decided)

    def _whole(
        self,
        there: Sequence[Block],
        grouping: Grouping,
        outcome: Outcome | None,
        left: tuple[int, int],
        masks: Mapping[str, str],
        decided: frozenset[tuple[str, int]],
    ) -> WholeBlocks:
        shapes = {name: grouping.plain.get_parameter(name).shape for b in self.blocks for name in b.parameters}

        def made(name: str) -> torch.Tensor:
            if name in shapes:
                return torch.zeros(shapes[name], dtype=torch.bool, device=grouping.plain.get_parameter(name).device)
            assert outcome is not None
            return outcome.masks[masks[name]]

        of = {block.path: block.of for block in there}
        dense = grouping.dense[0], grouping.dense[1]
        found = MasksOnDemand([*shapes, *masks], made)
        return WholeBlocks(self.blocks, of, dense, left, outcome, self.names, found, decided, grouping.sample)


def _computes(small: nn.Module, module: TracedModule) -> bool:
    """Whether a model computes what a module does, given its values; it keeps these."""
    plain = driver.plain_view(module)
    values = tensors_of(plain)
    inputs = (module.example_args, module.example_kwargs)
    try:
        for name, tensor in tensors_of(small).items():
            if name in values and values[name].shape == tensor.shape:
                tensor.data = values[name].detach()
        with torch.no_grad(), preserved(small), preserved(plain):
            return same_outputs(outputs_of(plain.eval(), inputs), outputs_of(small.eval(), inputs))
    except Exception:  # the user's code may raise anything
        return False


# ---- order


def _by_score(
    before: TracedModule, grouping: Grouping, blocks: Sequence[Block], request: ChannelRequest, evidence: Evidence
) -> list[Block]:
    """The blocks in the order in which they go: by the scores of the groups of channels within each.

    A block's score is the sum over its groups of what is lost with all of their units, or of the mean of their units'
    scores; where these compare within groups alone, relative to the mean of the blocks of its list. Where a block has
    no group that can be scored, all are ordered by the squares of their weights.
    """
    inside = {
        block.name: [g for g in grouping.groups if _is_within(g, block) and g.reason is None and g.size > 1]
        for block in blocks
    }
    groups = list({id(g): g for own in inside.values() for g in own}.values())
    found: dict[int, float] | None = None
    if all(inside.values()):
        try:
            found = _scores(before, grouping, groups, request.importance, evidence)
        except PruningError:  # it cannot score these
            found = None
    if found is None:
        weights = dict(grouping.plain.named_parameters())
        total = {
            block.name: float(
                np.mean([float(weights[name].detach().double().square().mean()) for name in block.parameters])
            )
            for block in blocks
        }
    else:
        total = {name: sum(found[id(group)] for group in own if id(group) in found) for name, own in inside.items()}
    if found is None or is_relative(request.importance):
        means: dict[str, list[float]] = {}
        for block in blocks:
            means.setdefault(block.path, []).append(total[block.name])
        total = {block.name: total[block.name] / (float(np.mean(means[block.path])) or 1.0) for block in blocks}
    return sorted(blocks, key=lambda block: total[block.name])


def _is_within(group: ChannelGroup, block: Block) -> bool:
    return all(member.parameter.startswith(f"{block.name}.") for member in group.members)


def _scores(
    before: TracedModule,
    grouping: Grouping,
    groups: Sequence[ChannelGroup],
    importance: Importance,
    evidence: Evidence,
) -> dict[int, float]:
    if are_losses(importance):
        curves = losses(importance, before, grouping, groups, evidence)
        return {id(group): float(curves.curve_of(group).losses()[-1]) for group in groups}
    picked, _ = scorable(grouping, groups, importance)
    scores = unit_scores(before, grouping, picked, importance, evidence)
    return {id(group): float(np.mean(score)) for group, score in zip(picked, scores, strict=True)}
