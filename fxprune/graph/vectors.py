"""Masks that hold one vector, expanded: what it was is noted on them, as a write into one entry changes many."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fxprune.errors import ArgumentError
from fxprune.graph.expanded import by_vectors, is_expanded, vector_of
from fxprune.graph.names import join, locate

# Attributes of the mask, of types that a pickle of weights alone may hold. Values tell what torch's counter does not:
# writes into `.data`, and those into what a copy was made from. The counter saves reading them at each forward.
_VALUES, _VERSION = "vector_noted", "version_of_vector"


def noted(mask: Tensor) -> Tensor:
    """The mask itself; where it is an expanded vector that no note is on, what the vector is now is noted on it.

    Example:
        >>> mask = noted(torch.ones(1, 3).expand(2, 3))
        >>> is_written(mask), mask[0].zero_().sum().item(), is_written(mask)
        (False, 0.0, True)
    """
    if is_expanded(mask) and _VALUES not in vars(mask):
        vars(mask).update({_VALUES: _copied(vector_of(mask)), _VERSION: _version(mask)})
    return mask


def _copied(vector: Tensor) -> Tensor:
    """A copy; of zeros and ones as flags, which take a byte each."""
    flags = vector != 0
    return flags if not vector.is_meta and torch.equal(flags.to(vector.dtype), vector) else vector.clone()


def converted(function: Callable[[Tensor], Tensor], mask: Tensor) -> Tensor:
    """An expanded vector of other type or place, as `function` gives it, with the note that was on it, so converted."""
    result: Tensor = by_vectors(function, mask)
    if _VALUES in vars(mask):
        vars(result).update({_VALUES: function(vars(mask)[_VALUES]), _VERSION: None})
    return result


def is_written(mask: Tensor) -> bool:
    """Whether an expanded vector has other values than are noted on it."""
    values = vars(mask).get(_VALUES)
    if values is None or not is_expanded(mask) or mask.device.type == "meta":
        return False
    version = _version(mask)
    if not torch.equal(vector_of(mask), values.to(mask.dtype)):
        return True
    vars(mask)[_VERSION] = version
    return False


def check_vectors(root: nn.Module) -> None:
    """Raise ArgumentError where a mask of a module that holds one vector was written into, and take back what was."""
    for path, module in root.named_modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and is_written(buffer):
                _refuse(join(path, name), buffer)


def _refuse(name: str, mask: Tensor) -> None:
    values = vars(mask)[_VALUES]
    changed = int((vector_of(mask) != values).sum())
    with torch.inference_mode():  # where tensors of that mode may be written into, too
        vector_of(mask).copy_(values)
    raise ArgumentError(
        f"the mask {name!r} of a traced module was written into. It holds {values.numel()} values, "
        f"expanded to the shape {list(mask.shape)}: an entry that is written changes all that share its memory. "
        f"{changed} of them changed, and have what they had again. For masks to write into, choose channels with "
        "compact_masks=False, or give fxprune.prune.custom_from_mask a mask of the whole shape."
    )


def _version(mask: Tensor) -> int | None:
    """How often a tensor was written into; None where that is not counted."""
    return None if mask.is_inference() else mask._version


@dataclass(frozen=True)
class VectorCheck:
    """Masks that one graph reads, and that may hold one vector; a call takes 0.15 microseconds for each.

    Attributes:
        names: qualified names of these buffers.
        places: for each the dictionary that holds it, and its key there.
    """

    names: Sequence[str]
    places: Sequence[tuple[Mapping[str, Tensor | None], str]]

    @classmethod
    def of(cls, root: nn.Module, names: Iterable[str]) -> VectorCheck:
        """The check of buffers of `root`."""
        found = {name: locate(root, name) for name in names}
        return cls([*found], [(owner._buffers, key) for owner, key in found.values()])

    def __call__(self) -> None:
        """As `check_vectors`, of masks that torch counted a write into."""
        for i, (held, key) in enumerate(self.places):
            mask = held.get(key)
            if mask is None:
                continue
            known = vars(mask)
            if _VALUES in known and known[_VERSION] != _version(mask) and is_written(mask):
                _refuse(self.names[i], mask)
