"""The entries of smallest magnitude among any number of tensors, exactly, without concatenating them.

For floating-point numbers without their sign, the order of the values is the order of their bits read as integers. So
the k-th smallest magnitude is found digit by digit, as in a radix selection: one histogram of the leading 16 bits over
all tensors tells which value of these bits holds it, the next pass counts the following 16 bits of that bin alone.
Every pass streams the tensors in chunks that fit the processor's cache.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from numbers import Integral

import torch

from fxprune.errors import PruningError

_CHUNK = 1 << 17
_DIGIT = 16


def keep_largest(
    values: Sequence[torch.Tensor], masks: Sequence[torch.Tensor | None], amount: float
) -> list[torch.Tensor]:
    """Which entries stay when the smallest magnitudes over all tensors go; `L1Unstructured` over a concatenation.

    Mixed dtypes compare after promotion; NaN counts as the largest; of equal magnitudes the earlier entry goes first
    (torch leaves open which). Beyond the result, memory for one chunk is needed.

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
    pairs = list(zip(values, masks, strict=True))
    size = sum(value.numel() if mask is None else int((mask == 1).sum()) for value, mask in pairs)
    try:
        count = int(amount) if isinstance(amount, Integral) else round(amount * size)
    except ValueError as error:
        raise PruningError(f"amount={amount}: {error}.") from error
    if count > size:
        raise PruningError(f"amount={amount} should be smaller than the number of parameters to prune={size}.")
    keep = [torch.ones(value.shape, dtype=torch.bool, device=value.device) for value in values]
    if count:
        dtype = functools.reduce(torch.promote_types, (value.dtype for value in values), torch.float32)
        threshold, ties = _threshold(pairs, dtype, count)
        for (value, mask), kept in zip(pairs, keep, strict=True):
            for (key, candidates), part in zip(_keys(value, mask, dtype), kept.view(-1).split(_CHUNK), strict=True):
                torch.ge(key, threshold, out=part)
                if ties:
                    equal = key == threshold
                    first = (equal if candidates is None else equal & candidates).nonzero()[:ties]
                    part[first] = False
                    ties -= len(first)
                if candidates is not None:
                    part.logical_or_(~candidates)
    return keep


def _keys(
    value: torch.Tensor, mask: torch.Tensor | None, dtype: torch.dtype
) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
    """Chunk by chunk the bits of the magnitudes as integers, and which entries are candidates (None: all)."""
    integer = torch.int64 if dtype is torch.float64 else torch.int32
    chunks = value.detach().reshape(-1).split(_CHUNK)
    candidates = [None] * len(chunks) if mask is None else mask.reshape(-1).split(_CHUNK)
    for chunk, among in zip(chunks, candidates, strict=True):
        yield chunk.to(dtype).view(integer) & torch.iinfo(integer).max, None if among is None else among == 1


def _threshold(
    pairs: Sequence[tuple[torch.Tensor, torch.Tensor | None]], dtype: torch.dtype, count: int
) -> tuple[int, int]:
    """The bits of the `count`-th smallest magnitude, and how many of the `count` smallest are equal to it."""
    prefix = 0
    width = torch.finfo(dtype).bits
    for shift in range(width - _DIGIT, -1, -_DIGIT):
        histogram = torch.zeros(1 << _DIGIT, dtype=torch.int64)
        for value, mask in pairs:
            for key, candidates in _keys(value, mask, dtype):
                if candidates is not None:
                    key = key[candidates]
                if shift + _DIGIT < width:
                    key = key[key >> (shift + _DIGIT) == prefix]
                digit = key >> shift & (1 << _DIGIT) - 1
                found = torch.bincount(digit).cpu()
                histogram[: len(found)] += found
        below = histogram.cumsum(0)
        bin_ = int(torch.searchsorted(below, count))
        count -= int(below[bin_] - histogram[bin_])
        prefix = prefix << _DIGIT | bin_
    return prefix, count
