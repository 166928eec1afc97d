"""`torch.nn.utils.prune` on traced modules: the same functions, methods and masks, on qualified parameter names.

The mask methods are torch's own classes, or the user's subclasses of `BasePruningMethod`; what they compute becomes a
mask-multiply node. Names may hold the wildcards `*`, `?` and `[seq]`: each matching parameter is then pruned by itself.
An error leaves every earlier mask in place.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.utils import prune as torch_prune
from torch.nn.utils.prune import BasePruningMethod, PruningContainer

from fxprune import driver
from fxprune.errors import ArgumentError, ArgumentTypeError, FxpruneError, PruningError
from fxprune.graph import canonical, locate, match_names, one_name
from fxprune.reparametrize import has_parametrization, masked, reparametrized
from fxprune.traced import TracedModule

__all__ = [
    "apply",
    "custom_from_mask",
    "global_unstructured",
    "identity",
    "is_pruned",
    "l1_unstructured",
    "ln_structured",
    "random_structured",
    "random_unstructured",
    "remove",
]


def apply(
    traced: TracedModule,
    name: str,
    method: BasePruningMethod,
    importance_scores: torch.Tensor | None = None,
) -> TracedModule:
    """Prune parameters by a method object; on a pruned parameter the masks compose as in `PruningContainer`.

    Args:
        traced: the module, changed in place.
        name: qualified parameter name, "conv1.weight", or a pattern.
        method: an instance of `BasePruningMethod`, such as `torch.nn.utils.prune.L1Unstructured(amount=0.3)`. A
            `PruningContainer` stands for its methods, one after another.
        importance_scores: tensor of the parameter's shape that replaces its values for the selection.

    Returns:
        `traced`.

    Raises:
        NameLookupError: nothing is called so.
        PruningError: the method fails on this parameter, or the parameter cannot be masked.

    Example:
        >>> fxprune.prune.apply(traced, "0.weight", torch.nn.utils.prune.L1Unstructured(amount=2))
    """
    if not isinstance(method, BasePruningMethod):
        found = f"class {method.__name__}" if isinstance(method, type) else type(method).__name__
        raise ArgumentTypeError(f"an instance of BasePruningMethod is needed, got {found}.")
    if type(method).apply_mask is not BasePruningMethod.apply_mask:
        raise PruningError(
            f"{type(method).__name__} overrides apply_mask, so its result is more than a mask-multiply. Write it as a "
            "parametrization and trace the model with it."
        )
    names = _find(traced, name)
    methods = method._pruning_methods if isinstance(method, PruningContainer) else (method,)
    masks = {}
    for found_name in names:
        original, mask = _state(traced, found_name)
        for step in methods:
            mask = _mask(found_name, original, mask, step, importance_scores)
        assert mask is not None, "an empty container"
        masks[found_name] = mask
    driver.insert_masks(traced, masks)
    return traced


def identity(traced: TracedModule, name: str) -> TracedModule:
    """Install a mask of ones; see `apply`.

    Example:
        >>> fxprune.prune.identity(traced, "0.weight")
    """
    return apply(traced, name, _method(torch_prune.Identity))


def random_unstructured(traced: TracedModule, name: str, amount: float) -> TracedModule:
    """Mask random entries; `amount` is a fraction (float) or a count (int) of those not masked yet; see `apply`.

    Example:
        >>> fxprune.prune.random_unstructured(traced, "0.weight", amount=0.5)
    """
    return apply(traced, name, _method(torch_prune.RandomUnstructured, amount))


def l1_unstructured(
    traced: TracedModule, name: str, amount: float, importance_scores: torch.Tensor | None = None
) -> TracedModule:
    """Mask the entries of smallest magnitude; `amount` as in `random_unstructured`; see `apply`.

    Example:
        >>> fxprune.prune.l1_unstructured(traced, "*.weight", amount=0.3)
    """
    return apply(traced, name, _method(torch_prune.L1Unstructured, amount), importance_scores)


def random_structured(traced: TracedModule, name: str, amount: float, dim: int) -> TracedModule:
    """Mask random channels along `dim`; `amount` is a fraction or a count of those alive; see `apply`.

    Example:
        >>> fxprune.prune.random_structured(traced, "0.weight", amount=1, dim=0)
    """
    return apply(traced, name, _method(torch_prune.RandomStructured, amount, dim))


def ln_structured(
    traced: TracedModule, name: str, amount: float, n: Any, dim: int, importance_scores: torch.Tensor | None = None
) -> TracedModule:
    """Mask the channels of smallest `n`-norm along `dim`; `n` as in `torch.norm`; see `apply`.

    Example:
        >>> fxprune.prune.ln_structured(traced, "0.weight", amount=0.5, n=2, dim=0)
    """
    return apply(traced, name, _method(torch_prune.LnStructured, amount, n, dim), importance_scores)


def custom_from_mask(traced: TracedModule, name: str, mask: torch.Tensor) -> TracedModule:
    """Multiply the parameter's mask by `mask` (its shape; any dtype; values other than 0 and 1 scale); see `apply`.

    Example:
        >>> fxprune.prune.custom_from_mask(traced, "0.weight", torch.ones(2, 4).bool())
    """
    return apply(traced, name, _method(torch_prune.CustomFromMask, mask))


def remove(traced: TracedModule, name: str) -> TracedModule:
    """Make masks permanent: the product takes the parameter's name and place, outputs stay the same bits.

    The Parameter object stays the same one, as in torch, unless another name holds it too: then only this name gets
    the masked values, where torch would change both.

    Raises:
        PruningError: the parameter carries no mask.

    Example:
        >>> fxprune.prune.remove(traced, "0.weight")
    """
    names = [canonical(traced, n) for n in match_names([*_names(traced), *reparametrized(traced)], name)]
    bare = [n for n in names if n not in masked(traced)]
    if bare and (len(names) == len(bare) or name in bare):
        raise PruningError(f"{bare[0]!r} carries no mask to remove. Masked: {', '.join(masked(traced)) or 'none'}.")
    for found in dict.fromkeys(n for n in names if n not in bare):
        driver.fold(traced, found)
    return traced


def is_pruned(traced: TracedModule, name: str | None = None) -> bool:
    """Whether any parameter carries a mask, or with `name` whether this one does.

    Example:
        >>> fxprune.prune.is_pruned(traced, "0.weight")
        False
    """
    if name is None:
        return bool(masked(traced))
    return canonical(traced, one_name([*_names(traced), *reparametrized(traced)], name)) in masked(traced)


def global_unstructured(
    traced: TracedModule,
    names: str | Iterable[str],
    pruning_method: type[BasePruningMethod],
    importance_scores: Mapping[str, torch.Tensor] | None = None,
    **kwargs: Any,
) -> TracedModule:
    """Prune several parameters by one selection over all their entries, as torch's function of this name.

    A parameter that is named twice, or under two tied names, is counted once; its mask goes to every name given.

    Args:
        traced: the module, changed in place.
        names: qualified names or patterns; any iterable.
        pruning_method: a class of unstructured methods, such as `torch.nn.utils.prune.L1Unstructured`.
        importance_scores: by name, tensors that replace a parameter's values for the selection; may be partial.
        **kwargs: arguments of the method's constructor, such as `amount`.

    Returns:
        `traced`.

    Raises:
        ArgumentTypeError: `pruning_method` is not an unstructured method.
        ArgumentError: no names, or arguments that the method refuses.
        PruningError: scores of a wrong shape, or the method fails.

    Example:
        >>> method = torch.nn.utils.prune.L1Unstructured
        >>> fxprune.prune.global_unstructured(traced, ["0.weight", "2.weight"], method, amount=0.5)
    """
    patterns = [names] if isinstance(names, str) else list(names)
    found = list(dict.fromkeys(n for pattern in patterns for n in _find(traced, pattern)))
    if not found:
        raise ArgumentError("global_unstructured: no names were given. Name at least one parameter.")
    if not (isinstance(pruning_method, type) and issubclass(pruning_method, BasePruningMethod)):
        raise ArgumentTypeError(f"pruning_method={pruning_method!r}: a subclass of BasePruningMethod is needed.")
    method = _method(pruning_method, **kwargs)
    kind = getattr(method, "PRUNING_TYPE", "of no type")
    if kind != "unstructured":
        raise ArgumentTypeError(
            f"{pruning_method.__name__} is {kind}; a global selection needs an unstructured method. "
            "Use fxprune.prune.channels for channels."
        )
    given = {one_name(found, canonical(traced, n)): s for n, s in (importance_scores or {}).items()}
    # tied names with the same mask are one tensor
    groups: dict[tuple[int, int], list[str]] = {}
    for name in found:
        original, mask = _state(traced, name)
        groups.setdefault((id(original), 0 if mask is None else id(mask)), []).append(name)
    scores, defaults, sizes = [], [], []
    for group in groups.values():
        original, mask = _state(traced, group[0])
        score = next((given[n] for n in group if n in given), None)
        value = _value(original, mask) if score is None else score
        if not isinstance(value, torch.Tensor) or value.shape != original.shape:
            shape = tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
            raise PruningError(f"scores of {group[0]!r} have shape {shape}; its shape is {tuple(original.shape)}.")
        scores.append(value.reshape(-1))
        defaults.append((torch.ones_like(original) if mask is None else mask).reshape(-1))
        sizes.append(original.numel())
    mask = _compute(", ".join(found), method, torch.cat(scores), torch.cat(defaults), container=True)
    masks = {}
    for group, part in zip(groups.values(), mask.split(sizes), strict=True):
        for name in group:
            original, default = _state(traced, name)
            custom = torch_prune.CustomFromMask(part.reshape(original.shape))
            masks[name] = _mask(name, original, default, custom, None)
    driver.insert_masks(traced, masks)
    return traced


def _names(traced: TracedModule) -> list[str]:
    if not isinstance(traced, TracedModule):
        raise ArgumentTypeError(f"a traced module is needed, got {type(traced).__name__}. Call fxprune.trace first.")
    hidden = {f"{name}_orig" for name in masked(traced)}
    names = [name for name, _ in traced.named_parameters(remove_duplicate=False) if name not in hidden]
    return names + masked(traced)


def _find(traced: TracedModule, pattern: str) -> list[str]:
    names = _names(traced)
    computed = [n for n in reparametrized(traced) if n not in names]
    pattern = canonical(traced, pattern) if isinstance(pattern, str) else pattern
    if pattern in computed:
        owner, tensor = locate(traced, pattern)
        prefix = pattern[: -len(tensor)]
        near = [n for n in names if n.startswith((f"{prefix}parametrizations.{tensor}.", f"{prefix}{tensor}_"))]
        kind = "a parametrization" if has_parametrization(owner, tensor) else "a norm"
        raise PruningError(f"{pattern!r} is computed by {kind}; prune what it is computed from: {', '.join(near)}.")
    return list(dict.fromkeys(canonical(traced, n) for n in match_names(names, pattern)))


def _state(traced: TracedModule, name: str) -> tuple[nn.Parameter, torch.Tensor | None]:
    owner, attribute = locate(traced, name)
    mask = owner._buffers.get(f"{attribute}_mask")
    if has_parametrization(owner, f"{attribute}_orig"):
        raise PruningError(f"{name!r} has a mask on top of a parametrization. Prune it before it is parametrized.")
    parameter = owner._parameters[attribute if mask is None else f"{attribute}_orig"]
    assert parameter is not None
    return parameter, mask


def _value(original: nn.Parameter, mask: torch.Tensor | None) -> torch.Tensor:
    return original.detach() if mask is None else mask.to(original.dtype) * original.detach()


def _method(kind: type[BasePruningMethod], *args: Any, **kwargs: Any) -> BasePruningMethod:
    try:
        return kind(*args, **kwargs)
    except FxpruneError:
        raise
    except TypeError as error:
        raise ArgumentTypeError(f"{kind.__name__}: {error}") from error
    except Exception as error:
        raise ArgumentError(f"{kind.__name__}: {error}") from error


def _mask(
    name: str,
    original: nn.Parameter,
    mask: torch.Tensor | None,
    method: BasePruningMethod,
    importance_scores: torch.Tensor | None,
) -> torch.Tensor:
    scores = _value(original, mask) if importance_scores is None else importance_scores
    if not isinstance(scores, torch.Tensor) or scores.shape != original.shape:
        found = tuple(scores.shape) if isinstance(scores, torch.Tensor) else type(scores).__name__
        raise PruningError(f"importance scores of {name!r} have shape {found}; its shape is {tuple(original.shape)}.")
    # torch's methods view the tensor as one dimension, which a channels_last weight does not allow
    default = torch.ones_like(original) if mask is None else mask
    default = default.detach().clone(memory_format=torch.contiguous_format)
    return _compute(name, method, scores.contiguous(), default, container=mask is not None)


def _compute(
    name: str, method: BasePruningMethod, scores: torch.Tensor, default: torch.Tensor, container: bool
) -> torch.Tensor:
    method = copy.copy(method)
    method._tensor_name = name
    if container:
        # only the last method of a container computes: the mask so far carries what came before
        stacked = PruningContainer()
        stacked._tensor_name = name
        stacked.add_pruning_method(method)
        method = stacked
    try:
        with torch.no_grad():
            mask = method.compute_mask(scores, default_mask=default)
    except FxpruneError:
        raise
    except Exception as error:
        raise PruningError(
            f"{name!r} of shape {tuple(scores.shape)} was to be pruned and cannot be: {type(error).__name__}: "
            f"{error} The masks it had are still in place."
        ) from error
    if not isinstance(mask, torch.Tensor) or mask.shape != default.shape:
        found = tuple(mask.shape) if isinstance(mask, torch.Tensor) else type(mask).__name__
        raise PruningError(f"the method gave a mask of shape {found} for {name!r} of shape {tuple(default.shape)}.")
    return mask
