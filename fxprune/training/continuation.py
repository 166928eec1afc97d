"""Training on after `finalize`: an optimizer for the smaller module, its state cut as the parameters were."""

from __future__ import annotations

import copy
import inspect
import math
import warnings
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import nn

from fxprune.calling import named_arguments
from fxprune.channels import ChannelPlan
from fxprune.errors import ArgumentError, ArgumentTypeError, FxpruneWarning
from fxprune.graph.names import join
from fxprune.graph.reparametrizations import computed_from
from fxprune.graph.spread_modules import failing_together
from fxprune.graph.traced import TracedModule
from fxprune.sharding import is_sharded, spread, whole


@named_arguments
@failing_together
def optimizer_after(final: TracedModule, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """An optimizer of the same class, groups and options on `final`'s parameters, that goes on where `optimizer` is.

    Every tensor of the state that has its parameter's shape (momentum, moments, maxima) is cut by `final.plan`, all
    else is copied. A parameter stands in the group of the one it was made from; those that left the model leave the
    groups. A bias that `finalize` or `reconstruct` made joins its layer's weight, with fresh state. For channels that
    were masked as whole groups (`fxprune.prune.channels`) and all removed (`align=1`), training goes on step for step
    as with masks.

    Hooks on `optimizer` (`clip_gradients`) and schedulers stay with it: make them anew for the result.

    Args:
        final: what `finalize` returned, in this process.
        optimizer: over parameters of the module that was finalized; unchanged.

    Returns:
        A new optimizer.

    Raises:
        ArgumentTypeError: an argument is of another type.
        ArgumentError: `final` does not know what it was made from (it was loaded, or traced), the optimizer holds other
            parameters, or its class cannot be built from its options.

    Warns:
        FxpruneWarning: training goes on differently, and why: a live constant was folded away (names the layers),
            channels went that were constant in eval mode alone, or dead by ranges of values alone, masked entries
            stayed and have no mask now, or a parameter that a norm computed starts with fresh state.

    Example:
        >>> final = fxprune.finalize(traced)
        >>> optimizer = fxprune.optimizer_after(final.train(), optimizer)
    """
    if not isinstance(final, TracedModule) or not isinstance(optimizer, torch.optim.Optimizer):
        raise ArgumentTypeError(
            "optimizer_after takes what fxprune.finalize returned and a torch optimizer, got "
            f"{type(final).__name__} and {type(optimizer).__name__}."
            f"{_way_to_an_optimizer(final, optimizer)}"
        )
    if final.origin is None:
        raise ArgumentError(
            "the module does not know the parameters it was made from: it does not come from fxprune.finalize in this "
            "process. Call optimizer_after on finalize's result, then save both."
        )
    plan, references = final.origin.plan, final.origin.sources
    sources = {name: p for name, reference in references.items() if (p := reference()) is not None}
    group_of = _group_of(optimizer, sources.values(), set(map(id, final.parameters())))
    heirs = _heirs(final, sources, plan)
    optimized = [
        heir for heir in heirs if any(id(p) in group_of for p in heir.origins)
    ]  # others are frozen, or left out
    members: list[list[_Heir]] = [[] for _ in optimizer.param_groups]
    for heir in optimized:
        members[next(group_of[id(p)] for p in heir.origins if id(p) in group_of)].append(heir)
    state = _state(optimizer, optimized, plan)
    if texts := _changes(final, plan, sources, heirs, optimized, state):
        message = f"training does not go on step for step as with masks. {'; '.join(texts)}."
        warnings.warn(message, FxpruneWarning, stacklevel=3)
    return _build(optimizer, members, state)


def _way_to_an_optimizer(final: object, optimizer: object) -> str:
    if isinstance(final, torch.optim.Optimizer):
        return " They are swapped."
    if isinstance(optimizer, torch.optim.lr_scheduler.LRScheduler):
        return " Give the scheduler's optimizer."
    if isinstance(optimizer, type):
        return " Give the optimizer that trained, not its class."
    return ""


@dataclass(frozen=True)
class _Heir:
    """A parameter of the finalized module, and where it comes from.

    Attributes:
        name: the first of its names that the module before had, else its first.
        source: the parameter that it was cut from, None where it was computed.
        origins: the parameters whose group it joins: its source, or those that it was computed from.
    """

    name: str
    parameter: nn.Parameter
    source: nn.Parameter | None
    origins: tuple[nn.Parameter, ...]


def _heirs(final: TracedModule, sources: dict[str, nn.Parameter], plan: ChannelPlan | None) -> list[_Heir]:
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in final.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    found = []
    for parameter, aliases in names.items():
        name = next((alias for alias in aliases if alias in sources), aliases[0])
        source = sources.get(name)
        origins = _computed_from(sources, name, plan) if source is None else [source]
        if plan is not None and name in plan.held:  # it is another tensor than its source, of whose group it is
            source = None
        if (layer := final.made_biases.get(name)) in sources:  # made after the optimizer, it may be
            origins.append(sources[layer])
        found.append(_Heir(name, parameter, source, tuple(origins)))
    return found


def _group_of(optimizer: torch.optim.Optimizer, sources: Collection[nn.Parameter], own: set[int]) -> dict[int, int]:
    """By the identity of a parameter the index of its group; raises ArgumentError for one of another module.

    `own` are the identities of the finalized module's parameters.
    """
    known = set(map(id, sources))
    held = [(i, p) for i, group in enumerate(optimizer.param_groups) for p in group["params"]]
    if strange := [p for _, p in held if id(p) not in known]:
        if {id(p) for p in strange} <= own:
            raise ArgumentError(
                "the optimizer holds parameters of the finalized module, none of the module that was finalized: use it "
                "as it is. optimizer_after takes the one that trained the module before, to carry its state over."
            )
        raise ArgumentError(
            f"{len(strange)} of the optimizer's {len(held)} parameters, such as one of shape "
            f"{tuple(strange[0].shape)}, are none of the module that was finalized. Give the optimizer that trained it."
        )
    return {id(p): i for i, p in held}


def _computed_from(sources: dict[str, nn.Parameter], name: str, plan: ChannelPlan | None) -> list[nn.Parameter]:
    """The parameters whose group a parameter without a source of its own joins."""
    if plan and name in plan.added:
        layer = plan.added[name]
        if layer not in sources:  # a call of a shared layer
            layer = join(name.rpartition(".")[0], "weight")
        return [sources[layer]] if layer in sources else _computed_from(sources, layer, None)
    return [sources[source] for source in computed_from(sources, name)]


def _state(
    optimizer: torch.optim.Optimizer, heirs: Sequence[_Heir], plan: ChannelPlan | None
) -> dict[nn.Parameter, dict[str, Any]]:
    """The state of those that keep it."""
    found = {}
    for heir in heirs:
        if heir.source is not None:
            cut = _cut(optimizer.state.get(heir.source, {}), heir.source, heir.parameter, heir.name, plan)
            if cut is not None:
                found[heir.parameter] = cut
    return found


def _cut(
    old: dict[str, Any], source: nn.Parameter, parameter: nn.Parameter, name: str, plan: ChannelPlan | None
) -> dict[str, Any] | None:
    """The state of one parameter, None where something in it has neither its parameter's shape nor none."""
    shapes = {v.shape for v in pytree.tree_leaves(old) if isinstance(v, torch.Tensor) and v.dim()}
    odd = shapes - {source.shape}
    if odd and (source.shape != parameter.shape or max(map(math.prod, odd)) > source.numel()):
        return None

    def move(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return copy.deepcopy(value)
        if is_sharded(value) and not parameter.is_meta:  # else the first process alone has values
            kept = whole(value)
            return spread(plan.slice(name, kept) if plan and kept.shape == source.shape else kept, parameter)
        if value.dim() and value.shape == source.shape and plan:
            value = plan.slice(name, whole(value))
        return value.clone()

    new: dict[str, Any] = pytree.tree_map(move, dict(old))
    cut = [v for v in pytree.tree_leaves(new) if isinstance(v, torch.Tensor) and v.dim()]
    return new if source.shape == parameter.shape or all(v.shape == parameter.shape for v in cut) else None


def _changes(
    final: TracedModule,
    plan: ChannelPlan | None,
    sources: dict[str, nn.Parameter],
    heirs: Sequence[_Heir],
    optimized: Sequence[_Heir],
    state: dict[nn.Parameter, dict[str, Any]],
) -> list[str]:
    """What makes the steps to come differ from those of the module with masks: names, and why."""
    added = {} if plan is None else plan.added
    fresh = [h.name for h in optimized if h.parameter not in state and not (h.source is None and h.name in added)]
    reasons = {
        "fresh state, since a norm computed it or its state has another shape": fresh,
        "one parameter before, two now": _split(optimized),
        "what masks held at zero stayed, and is free to move (align=1 removes all dead channels; masks can be put on "
        "again)": [heir.name for heir in optimized if _is_loose(heir, plan)],
        "batch norms were folded into weights, which changed their scale": _folded_norms(final, plan, sources, heirs),
        "constant in eval mode alone, so that train mode computes something else without them (finalize has "
        "keep_for_training=True)": [] if plan is None or "train" not in final.graphs else list(plan.eval_only),
        "dead by the range of what comes in, from where training could have brought them back (finalize has "
        "keep_for_training=True)": [] if plan is None else list(plan.by_range),
        "constants that training would have changed were folded into biases": _live_constants(plan),
    }
    return [f"{', '.join(names)}: {why}" for why, names in reasons.items() if names]


def _split(heirs: Sequence[_Heir]) -> list[str]:
    """The names of parameters that were one."""
    first: dict[int, str] = {}
    found = []
    for heir in heirs:
        if heir.source is not None and first.setdefault(id(heir.source), heir.name) != heir.name:
            found.append(f"{first[id(heir.source)]} and {heir.name}")
    return found


def _is_loose(heir: _Heir, plan: ChannelPlan | None) -> bool:
    """Whether a mask held entries of a parameter at zero that stayed."""
    if heir.source is None:
        return False
    before, after = whole(heir.source), whole(heir.parameter)
    kept = before if plan is None else plan.slice(heir.name, before)
    return kept.shape == after.shape and not after.is_meta and bool(((after == 0) & (kept.to(after.device) != 0)).any())


def _folded_norms(
    final: TracedModule, plan: ChannelPlan | None, sources: dict[str, nn.Parameter], heirs: Sequence[_Heir]
) -> list[str]:
    """The parameters that went without the plan's taking them: those of batch norms, where the train graph went too."""
    if "train" in final.graphs:
        return []
    inherited = {id(p) for heir in heirs for p in heir.origins}
    dropped = () if plan is None else plan.dropped
    left = {id(p): name for name, p in sources.items() if name not in dropped and id(p) not in inherited}
    return list(left.values())


def _live_constants(plan: ChannelPlan | None) -> list[str]:
    """The layers that constants were folded into, and the values other than zero that never change."""
    if plan is None:
        return []
    live = [node for node, _, zero in plan.constants if not zero]
    layers = [name.rpartition(".")[0] for name in plan.positions]
    return list(dict.fromkeys([*plan.folded, *plan.merged, *plan.added.values(), *layers, *live]))


def _build(
    optimizer: torch.optim.Optimizer,
    members: Sequence[Sequence[_Heir]],
    state: dict[nn.Parameter, dict[str, Any]],
) -> torch.optim.Optimizer:
    groups = []
    for group, heirs in zip(optimizer.param_groups, members, strict=True):
        options = {k: copy.deepcopy(v) for k, v in group.items() if k not in ("params", "param_names")}
        named = "param_names" in group
        entries = [(heir.name, heir.parameter) if named else heir.parameter for heir in heirs]
        groups.append({"params": entries, **options})
    accepted = inspect.signature(type(optimizer)).parameters
    options = {k: copy.deepcopy(v) for k, v in optimizer.defaults.items() if k in accepted}
    try:
        new = type(optimizer)(groups, **options)
    except Exception as error:
        raise ArgumentError(
            f"{type(optimizer).__name__} cannot be built from its options {options}: {type(error).__name__}: {error}."
        ) from error
    for parameter, values in state.items():
        new.state[parameter] = values
    return new
