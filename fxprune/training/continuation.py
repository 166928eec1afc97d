"""Training on after `finalize`: an optimizer for the smaller module, its state cut as the parameters were."""

from __future__ import annotations

import copy
import inspect
import math
import warnings
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import nn

from fxprune.channels import ChannelPlan
from fxprune.errors import ArgumentError, ArgumentTypeError, FxpruneWarning
from fxprune.graph.traced import TracedModule


def optimizer_after(final: TracedModule, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """An optimizer of the same class, groups and options on `final`'s parameters, that goes on where `optimizer` is.

    Every tensor of the state that has its parameter's shape (momentum, moments, maxima) is cut by `final.plan`, all
    else is copied. A parameter stands in the group of the one it was made from; those that left the model leave the
    groups. A bias that `finalize` made joins its layer's weight, with fresh state. For channels that were masked as
    whole groups (`fxprune.prune.channels`) and all removed (`align=1`), training goes on step for step as with masks.

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
            masked entries stayed and have no mask now, or a parameter that a norm computed starts with fresh state.

    Example:
        >>> final = fxprune.finalize(traced)
        >>> optimizer = fxprune.optimizer_after(final.train(), optimizer)
    """
    if not isinstance(final, TracedModule) or not isinstance(optimizer, torch.optim.Optimizer):
        raise ArgumentTypeError(
            "optimizer_after takes what fxprune.finalize returned and a torch optimizer, got "
            f"{type(final).__name__} and {type(optimizer).__name__}."
        )
    if final.origin is None:
        raise ArgumentError(
            "the module does not know the parameters it was made from: it does not come from fxprune.finalize in this "
            "process. Call optimizer_after on finalize's result, then save both."
        )
    plan, references = final.origin.plan, final.origin.sources
    sources = {name: p for name, reference in references.items() if (p := reference()) is not None}
    group_of = {id(p): i for i, group in enumerate(optimizer.param_groups) for p in group["params"]}
    known = {id(p) for p in sources.values()}
    if strange := [p for group in optimizer.param_groups for p in group["params"] if id(p) not in known]:
        raise ArgumentError(
            f"{len(strange)} of the optimizer's {len(group_of)} parameters, such as one of shape "
            f"{tuple(strange[0].shape)}, are none of the module that was finalized. Give the optimizer that trained it."
        )
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in final.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    members: list[list[tuple[str, nn.Parameter]]] = [[] for _ in optimizer.param_groups]
    state: dict[nn.Parameter, dict[str, Any]] = {}
    fresh, split, loose = list[str](), list[str](), list[str]()
    used: dict[int, str] = {}
    left = {id(p): name for name, p in sources.items() if not (plan and name in plan.dropped)}
    for parameter, aliases in names.items():
        name, source = next(((n, sources[n]) for n in aliases if n in sources), (aliases[0], None))
        related = [source] if source is not None else _computed_from(sources, name, plan)
        for p in related:
            left.pop(id(p), None)
        groups = [group_of[id(p)] for p in related if id(p) in group_of]
        if not groups:  # frozen, or left out by its owner
            continue
        members[groups[0]].append((name, parameter))
        if source is None:
            fresh += [] if plan and name in plan.added else [name]
            continue
        if used.setdefault(id(source), name) != name:
            split.append(f"{used[id(source)]} and {name}")
        kept = source.detach() if plan is None else plan.slice(name, source.detach())
        if kept.shape == parameter.shape and bool(((parameter == 0) & (kept != 0)).any()):
            loose.append(name)
        old = optimizer.state.get(source, {})
        if (new := _cut(old, source, parameter, name, plan)) is None:
            fresh.append(name)
        else:
            state[parameter] = new
    _warn(final, plan, fresh, split, loose, [] if "train" in final.graphs else list(left.values()))
    return _build(optimizer, members, state)


def _computed_from(sources: dict[str, nn.Parameter], name: str, plan: ChannelPlan | None) -> list[nn.Parameter]:
    """The parameters whose group a parameter without a source of its own joins."""
    if plan and name in plan.added:
        layer = plan.added[name]
        return [sources[layer]] if layer in sources else _computed_from(sources, layer, None)
    prefix, _, tensor = name.rpartition(".")
    inner = f"{prefix}.parametrizations.{tensor}".removeprefix(".")
    legacy = (f"{name}_v", f"{name}_g", f"{name}_orig")
    return [p for n, p in sources.items() if n.startswith((f"{inner}.", f"{inner}_orig.")) or n in legacy]


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
        if value.dim() and value.shape == source.shape and plan:
            value = plan.slice(name, value)
        return value.clone()

    new: dict[str, Any] = pytree.tree_map(move, dict(old))
    cut = [v for v in pytree.tree_leaves(new) if isinstance(v, torch.Tensor) and v.dim()]
    return new if source.shape == parameter.shape or all(v.shape == parameter.shape for v in cut) else None


def _warn(final: TracedModule, plan: ChannelPlan | None, *changed: list[str]) -> None:
    """Say what makes the steps to come differ from those of the module with masks."""
    constants: list[str] = []
    if plan is not None:
        live = [node for node, _, zero in plan.constants if not zero]
        constants = list(dict.fromkeys([*plan.folded, *plan.merged, *plan.added.values(), *live]))
    reasons = (
        "fresh state, since a norm computed it or its state has another shape",
        "one parameter before, two now",
        "what masks held at zero stayed, and is free to move (align=1 removes all dead channels; masks can be put on "
        "again)",
        "batch norms were folded into weights, which changed their scale",
        "constants that training would have changed were folded into biases",
    )
    found = zip((*changed, constants), reasons, strict=True)
    if texts := [f"{', '.join(names)}: {why}" for names, why in found if names]:
        message = f"training does not go on step for step as with masks. {'; '.join(texts)}."
        warnings.warn(message, FxpruneWarning, stacklevel=3)


def _build(
    optimizer: torch.optim.Optimizer,
    members: list[list[tuple[str, nn.Parameter]]],
    state: dict[nn.Parameter, dict[str, Any]],
) -> torch.optim.Optimizer:
    groups = []
    for group, entries in zip(optimizer.param_groups, members, strict=True):
        options = {k: copy.deepcopy(v) for k, v in group.items() if k not in ("params", "param_names")}
        groups.append({"params": entries if "param_names" in group else [p for _, p in entries], **options})
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
