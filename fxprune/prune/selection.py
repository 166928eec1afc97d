"""The entries of smallest magnitude among any number of tensors, exactly, without concatenating them.

For floating-point numbers without their sign, the order of the values is the order of their bits read as integers. So
the k-th smallest magnitude is found digit by digit, as in a radix selection: one histogram of the leading 16 bits over
all tensors tells which value of these bits holds it, the next pass counts the following 16 bits of that bin alone.
Every pass streams the tensors in chunks that fit the processor's cache.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from numbers import Integral

import torch

from fxprune.communication import together
from fxprune.errors import PruningError
from fxprune.sharding import Sums, as_parts, is_sharded, part, spread, total, whole

_CHUNK = 1 << 17
_DIGIT = 16


def keep_largest(
    values: Sequence[torch.Tensor], masks: Sequence[torch.Tensor | None], amount: float
) -> list[torch.Tensor]:
    """Which entries stay when the smallest magnitudes over all tensors go; `L1Unstructured` over a concatenation.

    Mixed dtypes compare after promotion; NaN counts as the largest; of equal magnitudes the earlier entry goes first
    (torch leaves open which). Beyond the result, memory for one chunk is needed. Of tensors that are spread over
    processes each process reads its part: histograms are added up, 0.5 MB for each pass, and one tensor's map of
    entries that are equal to the threshold is gathered where some of these stay.

    Args:
        values: floating-point tensors of any shapes.
        masks: for each tensor a mask of its shape, or None; only entries where it equals 1 are candidates.
        amount: fraction (float, rounded half to even) or count (int) of the candidates that goes.

    Returns:
        A boolean tensor of each tensor's shape: False where an entry goes, True elsewhere and for what is no candidate.

    Raises:
        PruningError: `amount` is larger than the number of candidates, or no number.

    Example:
        >>> keep_largest([torch.tensor([3.0, -1.0]), torch.tensor([[2.0]])], [None, None], amount=2)
        [tensor([ True, False]), tensor([[False]])]
    """
    with together(next(filter(is_sharded, values), None)):
        return _largest(values, masks, amount)


def _largest(values: Sequence[torch.Tensor], masks: Sequence[torch.Tensor | None], amount: float) -> list[torch.Tensor]:
    parts = [_Part.of(value, mask) for value, mask in zip(values, masks, strict=True)]
    candidates = Sums()
    for each in parts:
        candidates.add(torch.tensor(each.candidates, device=each.own.device), each.value)
    size = int(candidates.total()) if parts else 0
    try:
        count = int(amount) if isinstance(amount, Integral) else round(amount * size)
    except ValueError as error:
        raise PruningError(f"amount={amount}: {error}.") from error
    if count > size:
        raise PruningError(f"amount={amount} should be smaller than the number of parameters to prune={size}.")
    keep = [torch.ones(each.own.shape, dtype=torch.bool, device=each.own.device) for each in parts]
    if count:
        dtype = functools.reduce(torch.promote_types, (value.dtype for value in values), torch.float32)
        threshold, ties = _threshold(parts, dtype, count)
        for each, kept in zip(parts, keep, strict=True):
            cut = _cut if not is_sharded(each.value) else _cut_of_parts
            ties = cut(each, kept, dtype, threshold, ties)
    return [as_parts(kept, value) for kept, value in zip(keep, values, strict=True)]


@dataclass(frozen=True)
class _Part:
    """What this process has of a tensor, and of its mask."""

    value: torch.Tensor
    own: torch.Tensor
    mask: torch.Tensor | None

    @classmethod
    def of(cls, value: torch.Tensor, mask: torch.Tensor | None) -> _Part:
        return cls(value, part(value), None if mask is None else part(spread(mask, value)))

    @property
    def candidates(self) -> int:
        """How many of its entries may go."""
        return self.own.numel() if self.mask is None else int((self.mask == 1).sum())


def _cut(each: _Part, kept: torch.Tensor, dtype: torch.dtype, threshold: int, ties: int) -> int:
    """Write which entries stay; returns how many that are equal to the threshold are left to go from later tensors."""
    for (key, candidates), chunk in zip(_keys(each.own, each.mask, dtype), kept.view(-1).split(_CHUNK), strict=True):
        torch.ge(key, threshold, out=chunk)
        if ties:
            equal = key == threshold
            first = (equal if candidates is None else equal & candidates).nonzero()[:ties]
            chunk[first] = False
            ties -= len(first)
        if candidates is not None:
            chunk.logical_or_(~candidates)
    return ties


def _cut_of_parts(each: _Part, kept: torch.Tensor, dtype: torch.dtype, threshold: int, ties: int) -> int:
    """The same for this process's part of a tensor: which of the equal entries are first, all processes decide."""
    equal = torch.zeros_like(kept)
    chunks = kept.view(-1).split(_CHUNK), equal.view(-1).split(_CHUNK)
    for (key, candidates), chunk, tied in zip(_keys(each.own, each.mask, dtype), *chunks, strict=True):
        torch.ge(key, threshold, out=chunk)
        torch.eq(key, threshold, out=tied)
        if candidates is not None:
            chunk.logical_or_(~candidates)
            tied.logical_and_(candidates)
    if not ties:
        return 0
    found = int(total(equal.sum(), each.value))
    if found <= ties:
        kept.logical_and_(~equal)
        return ties - found
    everywhere = whole(as_parts(equal, each.value))
    going = torch.zeros_like(everywhere)
    going.view(-1)[everywhere.reshape(-1).nonzero()[:ties]] = True
    kept.logical_and_(~part(spread(going, each.value)))
    return 0


def _keys(
    value: torch.Tensor, mask: torch.Tensor | None, dtype: torch.dtype
) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
    """Chunk by chunk the bits of the magnitudes as integers, and which entries are candidates (None: all)."""
    integer = torch.int64 if dtype is torch.float64 else torch.int32
    chunks = value.detach().reshape(-1).split(_CHUNK)
    candidates = [None] * len(chunks) if mask is None else mask.reshape(-1).split(_CHUNK)
    for chunk, among in zip(chunks, candidates, strict=True):
        yield chunk.to(dtype).view(integer) & torch.iinfo(integer).max, None if among is None else among == 1


def _threshold(parts: Sequence[_Part], dtype: torch.dtype, count: int) -> tuple[int, int]:
    """The bits of the `count`-th smallest magnitude, and how many of the `count` smallest are equal to it."""
    prefix = 0
    width = torch.finfo(dtype).bits
    for shift in range(width - _DIGIT, -1, -_DIGIT):
        histogram = _counted(parts, dtype, shift, prefix).total()
        below = histogram.cumsum(0)
        bin_ = int(torch.searchsorted(below, count))
        count -= int(below[bin_] - histogram[bin_])
        prefix = prefix << _DIGIT | bin_
    return prefix, count


def _counted(parts: Sequence[_Part], dtype: torch.dtype, shift: int, prefix: int) -> Sums:
    """How often each digit stands behind a prefix, as far as this process has the entries."""
    width = torch.finfo(dtype).bits
    histograms = Sums()
    for each in parts:
        own = torch.zeros(1 << _DIGIT, dtype=torch.int64, device=each.own.device)
        for key, candidates in _keys(each.own, each.mask, dtype):
            if candidates is not None:
                key = key[candidates]
            if shift + _DIGIT < width:
                key = key[key >> (shift + _DIGIT) == prefix]
            digit = key >> shift & (1 << _DIGIT) - 1
            found = torch.bincount(digit)
            own[: len(found)] += found
        histograms.add(own, each.value)
    return histograms
