"""`torch.nn.utils.prune` on traced modules: the same functions, methods and masks, on qualified parameter names.

The mask methods are torch's own classes, or the user's subclasses of `BasePruningMethod`; what they compute becomes a
mask-multiply node. Names may hold the wildcards `*`, `?` and `[seq]`: each matching parameter is then pruned by itself.
Of a weight under a norm or a parametrization, methods see what that computes, and the mask multiplies it. An error
leaves every earlier mask in place.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Hashable, Iterable, Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from torch.nn.utils import prune as torch_prune
from torch.nn.utils.prune import BasePruningMethod, PruningContainer

from fxprune import driver
from fxprune.calling import named_arguments
from fxprune.errors import ArgumentError, ArgumentTypeError, FxpruneError, NameLookupError, PruningError
from fxprune.graph.masks import ParameterView, masked, masked_views, named_by_original, original_name, view
from fxprune.graph.names import ModulePaths, canonical, locate, match_names, one_name
from fxprune.graph.provenance import provenance_of
from fxprune.graph.reparametrizations import computed_from, computed_names, reparametrized
from fxprune.graph.requirements import require_parameter, require_traced
from fxprune.graph.spread_modules import failing_together
from fxprune.graph.traced import TracedModule
from fxprune.graph.values import unmasked
from fxprune.progress import shown
from fxprune.prune.methods import BlockStructured, NMStructured
from fxprune.prune.selection import keep_largest
from fxprune.sharding import agreed, by_parts, count, is_sharded, part, same_draws, spread, whole
from fxprune.torch_internals import ConvTransposeNd, name_pruning_method, pruning_methods


@named_arguments
@failing_together
def apply(
    traced: TracedModule, name: str, method: BasePruningMethod, importance_scores: torch.Tensor | None = None
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
    driver.insert_masks(traced, computed(traced, dict.fromkeys(find(traced, name), method), importance_scores))
    return traced


def computed(
    traced: TracedModule, methods: Mapping[str, BasePruningMethod], importance_scores: torch.Tensor | None = None
) -> dict[str, torch.Tensor]:
    """The masks that `apply` would insert, one method for each qualified name; changes nothing."""
    masks = {}
    for name, method in methods.items():
        _check_method(method)
        found = view(traced, name)
        reference = _sharded(found)
        values, mask = whole(unmasked(traced, found)), None if found.mask is None else whole(found.mask)
        scores = whole(importance_scores) if isinstance(importance_scores, torch.Tensor) else importance_scores
        with same_draws(reference):
            mask = _after_all(name, method, values, mask, scores)
        if reference is not None:
            agreed(mask, reference, f"the mask that {type(method).__name__} gave for {name!r}")
        masks[name] = mask if reference is None else spread(mask, reference)  # one whole mask at a time
    return masks


def _after_all(
    name: str,
    method: BasePruningMethod,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    importance_scores: torch.Tensor | None,
) -> torch.Tensor:
    """The mask of a method, or of a container of some, one after the other."""
    for step in pruning_methods(method):
        _check_amount(step)
        mask = _mask(name, step, values, mask, importance_scores)
    assert mask is not None, "an empty container"
    return mask


def _sharded(found: ParameterView) -> torch.Tensor | None:
    """What the mask of a parameter is spread as, or what this is computed from; None where that is plain."""
    held = found.original if found.original is not None else found.computed_from
    return held if is_sharded(held) else None


def _check_method(method: object) -> None:
    """Raise unless this is an object of a method whose result is a mask."""
    if not isinstance(method, BasePruningMethod):
        found = f"class {method.__name__}" if isinstance(method, type) else type(method).__name__
        raise ArgumentTypeError(
            f"an instance of BasePruningMethod is needed, got {found}. Give one such as "
            "torch.nn.utils.prune.L1Unstructured(amount=0.3)."
        )
    if type(method).apply_mask is not BasePruningMethod.apply_mask:
        raise PruningError(
            f"{type(method).__name__} overrides apply_mask, so its result is more than a mask-multiply. Write it "
            "as a parametrization and trace the model with it."
        )


@failing_together
def identity(traced: TracedModule, name: str) -> TracedModule:
    """Install a mask of ones; see `apply`.

    Example:
        >>> fxprune.prune.identity(traced, "0.weight")
    """
    return apply(traced, name, constructed(torch_prune.Identity))


@named_arguments
@failing_together
def random_unstructured(traced: TracedModule, name: str, amount: float) -> TracedModule:
    """Mask random entries; `amount` is a fraction (float) or a count (int) of those not masked yet; see `apply`.

    Example:
        >>> fxprune.prune.random_unstructured(traced, "0.weight", amount=0.5)
    """
    return apply(traced, name, constructed(torch_prune.RandomUnstructured, amount))


@named_arguments
@failing_together
def l1_unstructured(
    traced: TracedModule, name: str, amount: float, importance_scores: torch.Tensor | None = None
) -> TracedModule:
    """Mask the entries of smallest magnitude; `amount` as in `random_unstructured`; see `apply`.

    Example:
        >>> fxprune.prune.l1_unstructured(traced, "*.weight", amount=0.3)
    """
    return apply(traced, name, constructed(torch_prune.L1Unstructured, amount), importance_scores)


@named_arguments
@failing_together
def random_structured(traced: TracedModule, name: str, amount: float, dim: int) -> TracedModule:
    """Mask random channels along `dim`; `amount` is a fraction or a count of those alive; see `apply`.

    Example:
        >>> fxprune.prune.random_structured(traced, "0.weight", amount=1, dim=0)
    """
    return apply(traced, name, constructed(torch_prune.RandomStructured, amount, dim))


@named_arguments
@failing_together
def ln_structured(
    traced: TracedModule, name: str, amount: float, n: Any, dim: int, importance_scores: torch.Tensor | None = None
) -> TracedModule:
    """Mask the channels of smallest `n`-norm along `dim`; `n` as in `torch.norm`; see `apply`.

    Example:
        >>> fxprune.prune.ln_structured(traced, "0.weight", amount=0.5, n=2, dim=0)
    """
    return apply(traced, name, constructed(torch_prune.LnStructured, amount, n, dim), importance_scores)


@named_arguments
@failing_together
def custom_from_mask(traced: TracedModule, name: str, mask: torch.Tensor) -> TracedModule:
    """Multiply the parameter's mask by `mask` (its shape; any dtype; values other than 0 and 1 scale); see `apply`.

    Example:
        >>> fxprune.prune.custom_from_mask(traced, "0.weight", torch.ones(2, 4).bool())
    """
    if not isinstance(mask, torch.Tensor):
        raise ArgumentTypeError(
            f"mask is a {type(mask).__name__}; a tensor of the parameter's shape is needed: torch.as_tensor(mask)."
        )
    if not part(mask).isfinite().all():
        raise PruningError(
            f"the mask for {name!r} holds NaN or inf, which would take the place of weights. Give 0 and 1."
        )
    for found in find(traced, name):
        if (shape := unmasked(traced, view(traced, found)).shape) != mask.shape:
            raise PruningError(
                f"the mask has shape {tuple(mask.shape)}, and {found!r} has {tuple(shape)}. Give a mask of that shape, "
                "as in mask.expand_as(parameter)."
            )
        if (reference := _sharded(view(traced, found))) is not None and not is_sharded(mask):
            agreed(mask, reference, f"the mask for {found!r}")
    return apply(traced, name, constructed(torch_prune.CustomFromMask, whole(mask)))


@named_arguments
@failing_together
def nm_structured(
    traced: TracedModule,
    name: str,
    n: int = 2,
    m: int = 4,
    dim: int | None = None,
    importance_scores: torch.Tensor | None = None,
) -> TracedModule:
    """Keep `n` of every `m` entries along `dim`, None for the input axis of the layer; see `NMStructured`, `apply`.

    Example:
        >>> fxprune.prune.nm_structured(traced, "0.weight", 2, 4)
    """
    methods = {}
    for found in find(traced, name):
        source_class = provenance_of(locate(traced, found)[0]).source_class
        inputs = 0 if issubclass(source_class, ConvTransposeNd) else 1
        methods[found] = constructed(NMStructured, n, m, inputs if dim is None else dim)
    driver.insert_masks(traced, computed(traced, methods, importance_scores))
    return traced


@named_arguments
@failing_together
def block_structured(
    traced: TracedModule,
    name: str,
    amount: float,
    block: Sequence[int] = (4, 1),
    n: float = 2,
    importance_scores: torch.Tensor | None = None,
) -> TracedModule:
    """Mask the blocks of smallest mean magnitude; `amount` counts blocks; see `BlockStructured`, `apply`.

    Example:
        >>> fxprune.prune.block_structured(traced, "0.weight", amount=0.5, block=(2, 1))
    """
    return apply(traced, name, constructed(BlockStructured, amount, block, n), importance_scores)


@named_arguments
@failing_together
def remove(traced: TracedModule, name: str) -> TracedModule:
    """Make masks permanent: the product takes the parameter's name and place, outputs stay the same bits.

    The Parameter object stays the same one, as in torch, unless another name holds it too: then only this name gets
    the masked values, where torch would change both.

    Raises:
        PruningError: the parameter carries no mask, or one on what a norm or a parametrization computes, which cannot
            be written into what that is computed from.

    Example:
        >>> fxprune.prune.remove(traced, "0.weight")
    """
    available = [*_names(traced), *reparametrized(traced)]
    if name not in available:
        require_parameter(traced, name)
    matched = match_names(available, name)
    names = dict.fromkeys(map(ModulePaths(traced).canonical, matched))
    there = masked(traced)
    found = names.keys() & set(there)
    bare = [n for n in names if n not in found]
    if bare and (not found or name in bare):
        raise PruningError(f"{bare[0]!r} carries no mask to remove. Masked: {', '.join(there) or 'none'}.")
    if normed := [n for n in computed_names(traced) if n in found]:
        sources = computed_from(_names(traced), normed[0])
        raise PruningError(
            f"the mask on {normed[0]!r} multiplies what is computed from {', '.join(sources)}, and cannot be written "
            "into these. fxprune.remove_weight_norm and fxprune.remove_spectral_norm take the norm away and leave the "
            "mask, which can be removed then; fxprune.finalize folds both."
        )
    driver.fold(traced, *(n for n in names if n in found))
    return traced


def is_pruned(traced: TracedModule, name: str | None = None) -> bool:
    """Whether any parameter carries a mask, or with `name` whether this one does.

    Example:
        >>> fxprune.prune.is_pruned(traced, "0.weight")
        False
    """
    require_traced(traced, values=False)
    if name is None:
        return bool(masked(traced))
    return canonical(traced, one_name([*_names(traced), *reparametrized(traced)], name)) in masked(traced)


@named_arguments
@failing_together
@shown("choose entries")
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
    found = find_all(traced, names)
    if not (isinstance(pruning_method, type) and issubclass(pruning_method, BasePruningMethod)):
        raise ArgumentTypeError(
            f"pruning_method={pruning_method!r}: a subclass of BasePruningMethod is needed. Give the class, and its "
            "arguments by name: (traced, names, torch.nn.utils.prune.L1Unstructured, amount=0.5)."
        )
    if not isinstance(importance_scores, Mapping | None):
        raise ArgumentTypeError(
            f"importance_scores is a {type(importance_scores).__name__}; tensors by name are needed. The method's "
            "arguments have names: amount=0.5."
        )
    method = constructed(pruning_method, **kwargs)
    kind = getattr(method, "PRUNING_TYPE", "of no type")
    if kind != "unstructured":
        raise ArgumentTypeError(
            f"{pruning_method.__name__} is {kind}; a global selection needs an unstructured method. "
            "Use fxprune.prune.channels for channels."
        )
    paths = ModulePaths(traced)
    given = {one_name(found, paths.canonical(n)): s for n, s in (importance_scores or {}).items()}
    tensors = _tensors(traced, found)
    values = [_scores_of(unmasked(traced, view(traced, names[0])), names, given) for names in tensors]
    masks = [view(traced, names[0]).mask for names in tensors]
    if pruning_method is torch_prune.L1Unstructured and all(value.is_floating_point() for value in values):
        parts = keep_largest(values, masks, vars(method)["amount"])
    else:
        parts = _selected(", ".join(found), method, values, masks)
    new = {}
    for names, new_mask, mask in zip(tensors, parts, masks, strict=True):
        new.update(dict.fromkeys(names, new_mask if mask is None else _again(new_mask, mask)))
    driver.insert_masks(traced, new)
    return traced


def _tensors(traced: TracedModule, names: Iterable[str]) -> list[list[str]]:
    """The names by the tensor that they stand for: tied names with the same mask are one."""
    groups: dict[Hashable, list[str]] = {}
    for name in names:
        groups.setdefault(view(traced, name).identity, []).append(name)
    return list(groups.values())


def _scores_of(values: torch.Tensor, names: Sequence[str], given: Mapping[str, torch.Tensor]) -> torch.Tensor:
    score = next((given[name] for name in names if name in given), values)
    if not isinstance(score, torch.Tensor) or score.shape != values.shape:
        shape = tuple(score.shape) if isinstance(score, torch.Tensor) else type(score).__name__
        raise PruningError(f"scores of {names[0]!r} have shape {shape}; its shape is {tuple(values.shape)}.")
    if is_sharded(values) and not is_sharded(score):
        agreed(score, values, f"the importance of {names[0]!r}")
    return spread(score, values)


def _selected(
    name: str, method: BasePruningMethod, values: Sequence[torch.Tensor], masks: Sequence[torch.Tensor | None]
) -> list[torch.Tensor]:
    """The masks that a method computes on all values in one tensor, as torch's own function does."""
    references = [value if is_sharded(value) else None for value in values]
    values, masks = list(map(whole, values)), [None if mask is None else whole(mask) for mask in masks]
    present = [torch.ones_like(v) if mask is None else mask for v, mask in zip(values, masks, strict=True)]
    scores, default = (torch.cat([t.reshape(-1) for t in tensors]) for tensors in (values, present))
    reference = next((reference for reference in references if reference is not None), None)
    with same_draws(reference):
        computed = _compute(name, method, scores, default, container=True)
    if reference is not None:
        agreed(computed, reference, f"the mask that {type(method).__name__} gave for {name}")
    parts = computed.split([value.numel() for value in values])
    shaped = [part.view(value.shape) for part, value in zip(parts, values, strict=True)]
    return [own if ref is None else spread(own, ref) for own, ref in zip(shaped, references, strict=True)]


def _again(new: torch.Tensor, default: torch.Tensor) -> torch.Tensor:
    # torch's global selection starts from the mask so far and multiplies by it once more, which scales (neither 0 nor
    # 1) show; where there are none, the boolean result saves memory
    if new.dtype is not torch.bool:
        return by_parts(torch.mul, new, default)
    if not count(default, lambda mask: (mask != 0) & (mask != 1)):
        return by_parts(lambda kept, mask: kept.logical_and_(mask != 0), new, default)
    return by_parts(lambda kept, mask: kept * mask * mask, new, default)


def _names(traced: TracedModule) -> list[str]:
    """The names of the parameters that the optimizer sees, masked ones under the names that they had before."""
    require_traced(traced)
    there = list(masked_views(traced))
    hidden = {found.original_name for found in there if found.original is not None}
    stored = [n for n, _ in traced.named_parameters(remove_duplicate=False) if n not in hidden]
    return stored + [found.name for found in there]


def find(traced: TracedModule, pattern: str) -> list[str]:
    """The parameters that a name or a pattern stands for, those among them that norms and parametrizations compute.

    A pattern that stands for what one is computed from as well, such as "*", leaves that one out: a mask then acts
    on either side, never on both.

    Raises:
        NameLookupError: it stands for none.
    """
    names = _names(traced)
    if pattern not in names:
        require_parameter(traced, pattern)
        _refuse_original(traced, pattern)
    pattern = canonical(traced, pattern) if isinstance(pattern, str) else pattern
    computed = find_computed(traced)
    matched = match_names(dict.fromkeys((*names, *computed)), pattern)
    matched = [n for n in matched if n == pattern or n not in computed or not computed_from(matched, n)]
    return list(dict.fromkeys(map(ModulePaths(traced).canonical, matched)))


def find_computed(traced: TracedModule) -> list[str]:
    """The parameters that norms and parametrizations compute and masks can act on, masked or not.

    The unmasked values of a masked parameter are none of them, though a norm may compute these.
    """
    outer = [found.name for found in masked_views(traced) if found.original is None]
    hidden = set(map(original_name, outer)).difference(outer)
    return list(dict.fromkeys([*(n for n in computed_names(traced) if n not in hidden), *outer]))


def _refuse_original(traced: TracedModule, name: str) -> None:
    """Raise NameLookupError where a name is that of the unmasked values of a parameter."""
    if isinstance(name, str) and (plain := named_by_original(name)) in masked(traced):
        raise NameLookupError(f"{name!r} belongs to the masked parameter {plain!r}. Name that.")


def find_all(traced: TracedModule, names: str | Iterable[str]) -> list[str]:
    """The parameters that several names or patterns stand for, each once; raises ArgumentError where none is given."""
    require_traced(traced)
    if not isinstance(names, str | Iterable):
        raise ArgumentTypeError(f"names is a {type(names).__name__}; names of parameters, or patterns, are needed.")
    patterns = [names] if isinstance(names, str) else list(names)
    if not patterns:
        raise ArgumentError("no names were given. Name at least one parameter.")
    return list(dict.fromkeys(found for pattern in patterns for found in find(traced, pattern)))


def constructed(kind: type[BasePruningMethod], *args: Any, **kwargs: Any) -> BasePruningMethod:
    """A method object; what its constructor raises becomes ArgumentError or ArgumentTypeError."""
    try:
        method = kind(*args, **kwargs)
    except FxpruneError:
        raise
    except TypeError as error:
        amount = kwargs.get("amount", args[0] if args else None)
        if str(error).startswith("Invalid type for amount"):
            raise ArgumentTypeError(
                f"{kind.__name__}: amount={amount!r}: a fraction (float) or a count (int) is needed."
                f"{_amount_of_another_type(amount)}"
            ) from error
        missing = ". Give it by name: amount=0.3." if re.search("missing .*'amount'", str(error)) else ""
        raise ArgumentTypeError(f"{kind.__name__}: {error}{missing}") from error
    except Exception as error:
        raise ArgumentError(f"{kind.__name__}: {error}{_amount_out_of_range(kwargs, args)}") from error
    _check_amount(method)
    return method


def _amount_of_another_type(amount: object) -> str:
    if isinstance(amount, torch.Tensor):
        return " Give its number: amount.item()."
    if not isinstance(amount, str):
        return ""
    try:
        float(amount)
    except ValueError:
        return (
            " The traced module comes first, then the qualified name, then the amount: (traced, 'conv1.weight', 0.3);"
            " torch's pair (module, 'weight') is one name here."
        )
    return f" Give it without quotes: amount={amount}."


def _amount_out_of_range(kwargs: Mapping[str, Any], args: Sequence[Any]) -> str:
    amount = kwargs.get("amount", args[0] if args else None)
    if isinstance(amount, float) and 1 < amount <= 100:
        return f". A float is a fraction: for {amount:g} % give {amount / 100:g}; a count is an int."
    return ""


def _check_amount(method: BasePruningMethod) -> None:
    """Raise where torch lets an amount pass that is none: True or False, which it takes as 1 or 0, and NaN."""
    amount = vars(method).get("amount")
    if isinstance(amount, bool):
        raise ArgumentTypeError(
            f"{type(method).__name__}: amount={amount}: a fraction (float) or a count (int) is needed, no bool."
        )
    if isinstance(amount, Real) and math.isnan(amount):
        raise PruningError(
            f"{type(method).__name__}: amount={amount} is NaN: a fraction from 0.0 to 1.0 or a count is needed."
        )


def _mask(
    name: str,
    method: BasePruningMethod,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    scores: torch.Tensor | None,
) -> torch.Tensor:
    if scores is None:
        scores = values if mask is None else mask.to(values.dtype) * values
    if not isinstance(scores, torch.Tensor):
        raise PruningError(f"importance scores of {name!r} are a {type(scores).__name__}; a tensor is needed.")
    if scores.shape != values.shape:
        shape = tuple(scores.shape)
        raise PruningError(f"importance scores of {name!r} have shape {shape}; its shape is {tuple(values.shape)}.")
    # torch's methods view the tensor as one dimension, which a channels_last weight does not allow
    default = torch.ones_like(values) if mask is None else mask
    default = default.detach().clone(memory_format=torch.contiguous_format)
    return _compute(name, method, scores.contiguous(), default, container=mask is not None)


def _compute(
    name: str, method: BasePruningMethod, scores: torch.Tensor, default: torch.Tensor, container: bool
) -> torch.Tensor:
    method = copy.copy(method)
    name_pruning_method(method, name)
    if container:
        # only the last method of a container computes: the mask so far carries what came before
        stacked = PruningContainer()
        name_pruning_method(stacked, name)
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
            f"{str(error).rstrip('.')}. The masks it had are still in place."
        ) from error
    if not isinstance(mask, torch.Tensor) or mask.shape != default.shape:
        found = tuple(mask.shape) if isinstance(mask, torch.Tensor) else type(mask).__name__
        raise PruningError(f"the method gave a mask of shape {found} for {name!r} of shape {tuple(default.shape)}.")
    return mask
