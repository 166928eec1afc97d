"""Masked parameters: one view of a parameter and its mask, and the names that torch gives to both.

A masked `conv.weight` is stored as the parameter `conv.weight_orig` and the buffer `conv.weight_mask`, as
`torch.nn.utils.prune` stores it. Where a norm or a parametrization computes the weight, the mask multiplies what it
computes: the buffer stands beside the state of the norm (`conv.weight_g`, `conv.parametrizations.weight.original0`),
and the module's provenance says that it is a mask. No other file knows these suffixes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import nn

from fxprune.graph.computed import NORM_SUFFIXES, legacy_norms, parametrized
from fxprune.graph.expanded import by_vectors, is_expanded
from fxprune.graph.names import join, locate
from fxprune.graph.provenance import provenance_of, set_provenance
from fxprune.graph.vectors import noted
from fxprune.sharding import by_parts, equal, is_sharded, spread, whole

_ORIGINAL, _MASK = "_orig", "_mask"
_VERSION = "version_at_mask"  # an attribute of the parameter: how often it had been written to when it was masked
_COMPUTED_VERSION = "version_at_mask_of_computed"  # the same, of what a masked tensor is computed from


def original_name(name: str) -> str:
    """The name under which the unmasked values of a masked parameter are stored; qualified or not, as `name` is."""
    return name + _ORIGINAL


def mask_name(name: str) -> str:
    """The name under which the mask of a parameter is stored; qualified or not, as `name` is."""
    return name + _MASK


def named_by_original(stored: str) -> str | None:
    """The parameter of which `stored` names the unmasked values, None where it ends otherwise."""
    return stored.removesuffix(_ORIGINAL) if stored.endswith(_ORIGINAL) else None


def named_by_mask(stored: str) -> str | None:
    """The parameter of which `stored` names the mask, None where it ends otherwise.

    Example:
        >>> named_by_mask("conv.weight_mask")
        'conv.weight'
    """
    return stored.removesuffix(_MASK) if stored.endswith(_MASK) else None


class MasksOnDemand(Mapping[str, torch.Tensor]):
    """Masks by the names of parameters, each made anew whenever it is asked for, so that they are never all held.

    Args:
        names: of the parameters.
        make: gives the mask of one.

    Example:
        >>> MasksOnDemand(["0.weight"], lambda name: torch.ones(2))["0.weight"]
        tensor([1., 1.])
    """

    def __init__(self, names: Iterable[str], make: Callable[[str], torch.Tensor]) -> None:
        self._names, self._make = dict.fromkeys(names), make

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._make(name)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


@dataclass(frozen=True, eq=False)
class ParameterView:
    """A parameter as it is stored, with its mask or without.

    Attributes:
        name: the qualified name of the parameter, "conv.weight", masked or not.
        owner: the module that holds it. attribute: its name there, "weight".
        original: what the optimizer sees, before the mask; None where the module has no such parameter, or a norm or a
            parametrization computes it.
        mask: the buffer, of the parameter's shape and dtype; None without one.
        original_is_computed: whether a norm or a parametrization computes what the mask acts on, or would act on.
    """

    name: str
    owner: nn.Module
    attribute: str
    original: nn.Parameter | None
    mask: torch.Tensor | None
    original_is_computed: bool

    @property
    def original_name(self) -> str:
        """The qualified name under which the optimizer's parameter is stored."""
        return self.name if self.mask is None else original_name(self.name)

    @property
    def mask_name(self) -> str:
        """The qualified name under which the mask is stored, or would be."""
        return mask_name(self.name)

    @property
    def shape(self) -> torch.Size:
        """The parameter's shape, which a mask has, too; not known of an unmasked one that is computed."""
        known = self.original if self.mask is None else self.mask
        assert known is not None, self.name
        return known.shape

    @property
    def identity(self) -> Hashable:
        """Equal for names that stand for the same values under the same mask."""
        values = (id(self.owner), self.attribute) if self.original is None else id(self.original)
        return values, None if self.mask is None else id(self.mask)

    @property
    def computed_from(self) -> torch.Tensor | None:
        """A parameter of the same shape that a norm or a parametrization computes the values from, None without one."""
        known = _computing(self.owner, self.attribute)
        shape = (
            self.mask.shape
            if self.mask is not None
            else max((each.shape for each in known), key=math.prod, default=None)
        )
        return next((each for each in known if each.shape == shape), None)

    def value(self) -> torch.Tensor:
        """The masked values, detached: the product that a masked graph computes; the parameter itself without mask."""
        assert self.original is not None, self.name
        if self.mask is None:
            return self.original.detach()
        return by_parts(lambda mask, values: mask.to(values.dtype) * values, self.mask, self.original)

    @property
    def changed_since_masked(self) -> bool:
        """Whether the values were written to since the mask was inserted; False where that is not known.

        It is not known of copies and of what was loaded. What a norm or a parametrization computes changes with what it
        is computed from.
        """
        if self.mask is None:
            return False
        if self.original is None:
            return any(_is_written(each, _COMPUTED_VERSION) for each in _computing(self.owner, self.attribute))
        return _is_written(self.original, _VERSION)

    def insert_mask(self, values: torch.Tensor, *, compact: bool = False) -> None:
        """Store the parameter, which carries no mask, as a masked one, the same object; graphs are the caller's.

        One that is computed gets the mask beside what it is computed from. With `compact` values that are an expanded
        vector are stored as one; not those of what is computed.
        """
        assert self.mask is None, self.name
        if self.original_is_computed:
            known = provenance_of(self.owner)
            self.owner.register_buffer(mask_name(self.attribute), self._as_computed(values).detach().clone())
            set_provenance(self.owner, replace(known, masked=(*known.masked, self.attribute)))
            for each in _computing(self.owner, self.attribute):
                vars(each)[_COMPUTED_VERSION] = each._version
            return
        assert self.original is not None, self.name
        del self.owner._parameters[self.attribute]
        self.owner.register_parameter(original_name(self.attribute), self.original)
        self.owner.register_buffer(mask_name(self.attribute), _like(self.original, values, compact))
        vars(self.original)[_VERSION] = self.original._version

    def replace_mask(self, values: torch.Tensor, *, compact: bool = False) -> bool:
        """Give the masked parameter another mask, a new tensor, as above; returns whether any value changed."""
        assert self.mask is not None, self.name
        like = self.original if is_expanded(self.mask) and self.original is not None else self.mask
        replacement = _like(like, values, compact and self.original is not None)
        self.owner._buffers[mask_name(self.attribute)] = replacement
        return not equal(self.mask, replacement)

    def _as_computed(self, values: torch.Tensor) -> torch.Tensor:
        """A mask of what a norm computes, spread as what it computes this from."""
        alike = (each for each in _computing(self.owner, self.attribute) if each.shape == values.shape)
        return next((spread(values, each) for each in alike), whole(values))


def _like(tensor: torch.Tensor, values: torch.Tensor, compact: bool = False) -> torch.Tensor:
    if compact and is_expanded(values) and not is_sharded(tensor):
        return noted(by_vectors(lambda part: part.to(tensor, copy=True), values.detach()))
    # in the memory format of the parameter, which decides that of the product
    return by_parts(lambda own, mask: torch.empty_like(own).copy_(mask), tensor, values.detach())


def _is_written(parameter: nn.Parameter, since: str) -> bool:
    """Whether a parameter was written to since an attribute was set to its version; False without one."""
    return vars(parameter).get(since) not in (None, parameter._version)


def _computing(owner: nn.Module, attribute: str) -> list[nn.Parameter]:
    """The parameters that a norm or a parametrization computes a tensor of `owner` from."""
    names = [attribute + suffix for suffixes in NORM_SUFFIXES.values() for suffix in suffixes]
    stored = (owner._parameters.get(each) for name in names for each in (name, original_name(name)))
    holder = owner._modules.get("parametrizations")
    inner = holder._modules.get(attribute) if holder is not None else None
    return [*(each for each in stored if each is not None), *(inner.parameters() if inner is not None else ())]


def view(root: nn.Module, name: str) -> ParameterView:
    """The parameter of this qualified name, masked or not; raises AttributeError where its module does not exist."""
    owner, attribute = locate(root, name)
    return _view(name, owner, attribute)


def _view(name: str, owner: nn.Module, attribute: str) -> ParameterView:
    mask = _spread_mask(owner, attribute)
    if mask is not None and attribute in provenance_of(owner).masked:
        return ParameterView(name, owner, attribute, None, mask, True)
    if attribute in computed_attributes(owner):
        return ParameterView(name, owner, attribute, None, None, True)
    stored = original_name(attribute)
    is_computed = stored in parametrized(owner)
    if mask is None or not (is_computed or stored in owner._parameters):  # a buffer that happens to be called so
        return ParameterView(name, owner, attribute, owner._parameters.get(attribute), None, False)
    return ParameterView(name, owner, attribute, owner._parameters.get(stored), mask, is_computed)


def _spread_mask(owner: nn.Module, attribute: str) -> torch.Tensor | None:
    """What is stored as the mask of a tensor; one that was there before its parameter was sharded is spread alike."""
    mask, original = owner._buffers.get(mask_name(attribute)), owner._parameters.get(original_name(attribute))
    if original is None or mask is None or mask.shape != original.shape or is_sharded(mask) or not is_sharded(original):
        return mask
    owner._buffers[mask_name(attribute)] = found = spread(mask, original)
    return found


def computed_attributes(owner: nn.Module) -> list[str]:
    """The names, within `owner`, of the tensors that norms and parametrizations of torch's compute, masked or not."""
    parts = (name for stored in owner._buffers if (name := named_by_mask(stored)) is not None)
    inner = parametrized(owner)
    return [*legacy_norms(owner, {*owner._parameters, *parts, *inner}), *inner]


def looks_normed(owner: nn.Module, attribute: str) -> bool:
    """Whether a plain parameter would be taken for one under a legacy norm once it is stored under a mask."""
    norm = tuple(attribute + suffix for suffix in NORM_SUFFIXES["spectral_norm"])
    return owner._buffers.keys() >= set(norm[1:])


def forget_mask(owner: nn.Module, attribute: str) -> None:
    """Say that no mask multiplies what computes a tensor of `owner` any more."""
    known = provenance_of(owner)
    if attribute in known.masked:
        left = tuple(name for name in known.masked if name != attribute)
        set_provenance(owner, replace(known, masked=left))


def masked_attributes(owner: nn.Module) -> list[str]:
    """The names, within `owner`, of its own parameters that carry a mask."""
    names = [name for stored in owner._buffers if (name := named_by_mask(stored)) is not None]
    return [name for name in names if _view(name, owner, name).mask is not None]


def expanded_masks(owner: nn.Module) -> dict[str, torch.Tensor]:
    """The masks of a module's own parameters that are expanded vectors, by the names of their buffers."""
    buffers = {name: buffer for name, buffer in owner._buffers.items() if buffer is not None and is_expanded(buffer)}
    plain = {name: named_by_mask(name) for name in buffers}
    return {
        name: buffers[name]
        for name, attribute in plain.items()
        if attribute is not None and _view("", owner, attribute).mask is buffers[name]
    }


def hold_in_full(owner: nn.Module, names: Iterable[str]) -> None:
    """Let masks of a module's own parameters, by the names of their buffers, have an entry of memory for each."""
    for name in names:
        attribute = named_by_mask(name)
        assert attribute is not None, name
        own = _view("", owner, attribute)
        assert own.mask is not None, name
        owner._buffers[name] = _like(own.mask if own.original is None else own.original, own.mask)


def hold_as_vectors(root: nn.Module) -> None:
    """Let masks of rows or of columns alone, and the like along other axes, hold one vector, expanded."""
    for own in masked_views(root):
        mask = own.mask
        if mask is None or own.original is None or type(mask) is not torch.Tensor or is_expanded(mask):
            continue
        for axis in range(mask.dim() if mask.dim() > 1 and mask.numel() else 0):
            vector = mask[tuple(slice(None) if dim == axis else slice(0, 1) for dim in range(mask.dim()))]
            if bool((mask == vector).all()):
                own.owner._buffers[mask_name(own.attribute)] = noted(vector.clone().expand(mask.shape))
                break


def masked_views(root: nn.Module) -> Iterator[ParameterView]:
    """The parameters that carry a mask, each by the first of its names."""
    for path, module in root.named_modules():
        for attribute in masked_attributes(module):
            yield _view(join(path, attribute), module, attribute)


def masked(root: nn.Module) -> list[str]:
    """The qualified names of the parameters that carry a mask, each by the first of its names."""
    return [found.name for found in masked_views(root)]
