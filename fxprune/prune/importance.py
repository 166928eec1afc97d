"""Importance scores of single entries, for unstructured masks and as what scores of whole channels sum up.

A score is a tensor of its parameter's shape, larger where more is lost by masking the entry; a masked entry scores 0.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset

from fxprune import driver
from fxprune.borrowing import Borrowed, lent_as
from fxprune.calling import is_no_function, renamed
from fxprune.errors import ArgumentError, ArgumentTypeError, FxpruneError, InputError, PruningError
from fxprune.graph.arguments import Signature
from fxprune.graph.calls import as_call
from fxprune.graph.masks import view
from fxprune.graph.snapshot import preserved
from fxprune.graph.traced import TracedModule
from fxprune.graph.values import masked_value
from fxprune.prune.importance_registry import (
    IMPORTANCES,
    SCORES,
    Evidence,
    Importance,
    Score,
    UnitScore,
    register,
)
from fxprune.prune.mirror import find_all
from fxprune.prune.scores_of_all import scored_for_all
from fxprune.prune.slice_sums import SliceSums

__all__ = ["IMPORTANCES", "SCORES", "Evidence", "Importance", "alive", "register", "scores", "value"]


@renamed("batches", "max_batches")
@scored_for_all
def scores(
    traced: TracedModule,
    names: str | Iterable[str],
    importance: str | Score = "l1",
    *,
    loader: Iterable[Any] | None = None,
    loss: Callable[[Any, Any], torch.Tensor] | None = None,
    max_batches: int | None = None,
    seed: int | None = None,
) -> dict[str, torch.Tensor]:
    """Scores of every entry of the named parameters, for `importance_scores` of the functions of `fxprune.prune`.

    - "l1", "l2": |w| and w²; summed over a slice they give its norms (Li et al., "Pruning Filters for Efficient
      ConvNets", 2017, https://arxiv.org/abs/1608.08710).
    - "random": uniform draws from [0, 1).
    - "taylor": |w ∂L/∂w|, the first-order change of the loss when w is set to 0, averaged over batches; Molchanov et
      al., "Importance Estimation for Neural Network Pruning" (2019), https://arxiv.org/abs/1906.10771. Gradients are
      those of eval mode (of train mode where only that was captured); buffers, `.grad` and the random generator stay
      as they are.

    Where a norm or a parametrization computes a weight, its entries are those of what is computed, and gradients are
    with respect to these: functions get a copy in which such weights are plain parameters, under the masks they have.

    Args:
        traced: the module; it is not changed.
        names: qualified names or patterns.
        importance: a key of `SCORES` (`register` adds one), or a function
            `(traced, names, evidence) -> {name: tensor}`.
        loader: for "taylor", batches: pairs (inputs, target), or mappings of keyword arguments. Inputs are a tensor, a
            tuple of positional arguments, a dict of keyword arguments, or a `fxprune.Call` of both.
        loss: for "taylor", `(outputs, target) -> scalar`; for a mapping the target is the mapping itself.
        max_batches: how many batches to take; None takes all of them.
        seed: of the draws of "random"; None draws from the global generator.

    Returns:
        By name a tensor of the parameter's shape, on its device.

    Raises:
        ArgumentError, ArgumentTypeError: unknown importance, loader or loss missing, too few batches.
        NameLookupError: a name matches nothing.
        PruningError: a gradient is missing, or scores are NaN or of a wrong shape.

    Example:
        >>> given = scores(traced, "*.weight", "taylor", loader=[(x, y)], loss=torch.nn.functional.mse_loss)
        >>> method = torch.nn.utils.prune.L1Unstructured
        >>> fxprune.prune.global_unstructured(traced, given, method, given, amount=0.5)
    """
    found = find_all(traced, names)
    traced = driver.without_norms(traced, found)
    if not callable(importance) and (not isinstance(importance, str) or importance not in SCORES):
        raise ArgumentError(f"importance={importance!r}: one of {', '.join(SCORES)} is needed, or a function.")
    score = importance if callable(importance) else SCORES[importance]
    given = score(traced, found, Evidence(loader, loss, max_batches, seed))
    if not isinstance(given, Mapping) or not given.keys() >= set(found):
        what = f"keys {', '.join(given)}" if isinstance(given, Mapping) else type(given).__name__
        raise ArgumentTypeError(f"importance={importance!r} gave {what}; tensors for {', '.join(found)} are needed.")
    for name in found:
        shape = view(traced, name).shape
        score_of = given[name]
        if not isinstance(score_of, torch.Tensor) or score_of.shape != shape:
            what = getattr(score_of, "shape", type(score_of).__name__)
            raise PruningError(f"{importance!r} gave {what} for {name!r}, whose shape is {tuple(shape)}.")
        if score_of.isnan().any():
            raise PruningError(f"{importance!r} scores of {name!r} hold NaN. Check its values, and the loss.")
    return {name: given[name] for name in found}


def value(traced: TracedModule, name: str) -> torch.Tensor:
    """The values of a parameter as the graph computes with them, times its mask; detached."""
    return masked_value(traced, view(traced, name))


def alive(traced: TracedModule, name: str, score: torch.Tensor) -> torch.Tensor:
    """A score of a parameter's entries, 0 where they are masked."""
    mask = view(traced, name).mask
    return score if mask is None else score.where(mask != 0, 0)


def _original(traced: TracedModule, name: str) -> nn.Parameter:
    """The parameter as the optimizer sees it, before its mask; norms are folded, where entries are scored."""
    parameter = view(traced, name).original
    assert parameter is not None, name
    return parameter


def _magnitude(power: int) -> Score:
    def score(traced: TracedModule, names: Sequence[str], evidence: Evidence) -> dict[str, torch.Tensor]:
        return {name: alive(traced, name, _original(traced, name).detach().abs() ** power) for name in names}

    return score


def _random(traced: TracedModule, names: Sequence[str], evidence: Evidence) -> dict[str, torch.Tensor]:
    generator = _generator(evidence)
    parameters = {name: _original(traced, name) for name in names}
    draws = {name: torch.rand(p.shape, generator=generator).to(p.device) for name, p in parameters.items()}
    return {name: alive(traced, name, draw) for name, draw in draws.items()}


def _generator(evidence: Evidence) -> torch.Generator | None:
    # on the CPU, so that a seed means the same on every device
    return None if evidence.seed is None else torch.Generator().manual_seed(evidence.seed)


def _taylor(traced: TracedModule, names: Sequence[str], evidence: Evidence) -> dict[str, torch.Tensor]:
    loader, loss, most = evidence.loader, evidence.loss, evidence.max_batches
    if isinstance(loss, type):
        raise ArgumentTypeError(f"loss is the class {loss.__name__}; give an object of it: loss={loss.__name__}().")
    if isinstance(loader, Dataset) and not isinstance(loader, Iterable):
        raise ArgumentError(
            f"loader is a {type(loader).__name__}, whose items are single samples; batches are needed: "
            "torch.utils.data.DataLoader(dataset, batch_size=32)."
        )
    if loader is None or loss is None or not isinstance(loader, Iterable) or not callable(loss):
        raise ArgumentError(
            f'"taylor" needs an iterable loader and a loss function; got loader={loader!r}, loss={loss!r}. Batches are '
            "pairs (inputs, target), as a torch.utils.data.DataLoader gives them; loss takes outputs and target."
        )
    if most is not None and (not isinstance(most, int) or most < 1):
        raise ArgumentError(
            f"max_batches={most!r}: a count of 1 or more is needed, or None for the whole loader, which holds the data."
        )
    # for a masked parameter w_orig * dL/dw_orig is w * dL/dw, as w = mask * w_orig
    parameters = [_original(traced, name) for name in names]
    totals = [torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for p in parameters]
    count = 0
    with preserved(traced), torch.enable_grad():
        traced.train("eval" not in traced.modes)
        for batch in itertools.islice(loader, most):
            gradients = _gradients(traced, names, parameters, loss, batch)
            for total, parameter, gradient in zip(totals, parameters, gradients, strict=True):
                total += (parameter.detach() * gradient).abs()
            count += 1
    if count < (most or 1):
        raise ArgumentError(f"the loader yielded {count} batches; {most or 'at least 1'} were asked for.")
    return {name: alive(traced, name, total / count) for name, total in zip(names, totals, strict=True)}


def _gradients(
    traced: TracedModule,
    names: Sequence[str],
    parameters: Sequence[torch.Tensor],
    loss: Callable[[Any, Any], torch.Tensor],
    batch: Any,
) -> tuple[torch.Tensor, ...]:
    outputs, target = _outputs(traced, batch)
    try:
        value = loss(outputs, target)
    except FxpruneError:
        raise
    except Exception as error:  # whatever the caller's function raises
        raise ArgumentError(
            f"the loss failed: {type(error).__name__}: {str(error).partition(chr(10))[0].rstrip('.')}. It is called as "
            f"loss(outputs, target), here with {_described(outputs)} and {_described(target)}."
        ) from error
    if not isinstance(value, torch.Tensor) or value.numel() != 1:
        raise ArgumentError(f"the loss is no scalar tensor: {getattr(value, 'shape', type(value).__name__)}.")
    asked = [p for p in parameters if p.requires_grad]
    lent = [p for p in asked if isinstance(p, Borrowed)]
    hooks = [p.register_hook(partial(lent_as, reference=p)) for p in lent]  # type: ignore[no-untyped-call]
    try:
        given = torch.autograd.grad(value, asked, allow_unused=True) if value.requires_grad and asked else ()
    finally:
        for hook in hooks:
            hook.remove()
    gradients = dict(zip(map(id, asked), given, strict=bool(given)))
    missing = [name for name, p in zip(names, parameters, strict=True) if gradients.get(id(p)) is None]
    if missing:
        raise PruningError(
            f"the loss gives no gradient to {', '.join(missing)}. Unfreeze them (requires_grad), leave them out, or "
            "take a loss that depends on them."
        )
    return tuple(gradients[id(p)] for p in parameters)


def _outputs(traced: TracedModule, batch: Any) -> tuple[Any, Any]:
    """What the module gives for a batch, and the batch's target."""
    if isinstance(batch, Mapping):
        taken = Signature.of(traced.graph).names
        if strange := [name for name in batch if name not in taken]:
            raise InputError(
                f"the loader yielded a mapping with {', '.join(strange)}; the model takes ({', '.join(taken)}). Labels "
                "are no input: give pairs (inputs, target), in which the inputs may be a mapping."
            )
        return traced(**batch), batch
    if not isinstance(batch, list | tuple) or len(batch) != 2:
        length = f" of {len(batch)}" if isinstance(batch, list | tuple) else ""
        raise ArgumentError(
            f"the loader yielded a {type(batch).__name__}{length}; "
            "a pair (inputs, target) or a mapping is needed. For one batch, loader=[(inputs, target)]; several inputs "
            "stand in a tuple, ((x, mask), target)."
        )
    inputs, target = batch
    if not isinstance(inputs, tuple | Mapping | torch.Tensor):
        inputs = tuple(inputs) if isinstance(inputs, list) else (inputs,)
    call = as_call(inputs)
    return traced(*call.args, **call.kwargs), target


def _described(value: object) -> str:
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    return f"a {type(value).__name__}"


def _distances(values: torch.Tensor, axes: tuple[int, ...]) -> torch.Tensor:
    """How far each slice is from the others, in sum."""
    filters = values.flatten(axes[0]).flatten(0, -2)
    return torch.cdist(filters, filters).sum(1)


def _draws(evidence: Evidence) -> UnitScore:
    generator = _generator(evidence)
    return lambda group: torch.rand(group.size, generator=generator, dtype=torch.float64)


IMPORTANCES.add("l1", Importance(entries=_magnitude(1), slices=SliceSums(1.0), relative=True))
IMPORTANCES.add("l2", Importance(entries=_magnitude(2), slices=SliceSums(2.0), relative=True))
IMPORTANCES.add("linf", Importance(slices=SliceSums(torch.inf), relative=True))
IMPORTANCES.add("random", Importance(entries=_random, units=_draws, relative=True))
IMPORTANCES.add("bn", Importance(slices=SliceSums(1.0), reads="gains", relative=True))
IMPORTANCES.add("fpgm", Importance(slices=_distances, reads="filters", relative=True))
IMPORTANCES.add("taylor", Importance(entries=_taylor, relative=True))

is_no_function(
    __name__,
    "Scores are given by fxprune.importance.scores(traced, '*.weight', 'l1'), a score of one's own by "
    "fxprune.importance.register('name', function).",
)
