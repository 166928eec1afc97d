"""Mask methods that torch lacks: N:M and blocks. They serve eager modules through torch's `apply` as well.

Their `PRUNING_TYPE` is "global": a `PruningContainer` then hands over the whole tensor with its mask, and the methods
themselves leave masked entries masked and choose among the others.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral, Real

import torch
from torch.nn import functional
from torch.nn.utils.prune import BasePruningMethod

from fxprune.errors import ArgumentError, PruningError
from fxprune.torch_internals import validate_pruning_amount


class NMStructured(BasePruningMethod):
    """Keep at most `n` entries, those of largest magnitude, of every `m` consecutive ones along an axis.

    The pattern of sparse tensor cores for 2:4: Mishra et al., "Accelerating Sparse Deep Neural Networks" (2021),
    https://arxiv.org/abs/2104.08378. Blocks start at multiples of `m`. A short last block is one that zeros fill up:
    it keeps at most `n`, so the mask stays valid under padding. Masked entries count among the zeros of their block.
    Of equal magnitudes the earlier entry stays; NaN counts as the largest.

    Args:
        n: how many of `m` may stay, 1 to m - 1.
        m: length of a block, at least 2.
        dim: the axis along which blocks run; 1 is the input axis, except for transposed convolutions, where 0 is.

    Raises:
        ArgumentError: n or m out of range; when it is applied, PruningError: the tensor has no such axis.

    Example:
        >>> NMStructured.apply(linear, "weight", n=2, m=4)
    """

    PRUNING_TYPE = "global"

    def __init__(self, n: int = 2, m: int = 4, dim: int = 1) -> None:
        if not all(isinstance(v, Integral) and not isinstance(v, bool) for v in (n, m, dim)) or not 0 < n < m:
            raise ArgumentError(
                f"n={n!r}, m={m!r}, dim={dim!r}: integers with 0 < n < m are needed, such as 2:4 or 4:8."
            )
        self.n, self.m, self.dim = n, m, dim

    def compute_mask(self, t: torch.Tensor, default_mask: torch.Tensor) -> torch.Tensor:
        """The new mask, given the values or scores `t` and the mask so far, both of the parameter's shape."""
        if not -t.dim() <= self.dim < t.dim():
            raise PruningError(
                f"{self.n}:{self.m} along axis {self.dim} of a tensor of shape {tuple(t.shape)}, which has no such "
                "axis. Name weights alone, such as 'fc.weight', or give another dim."
            )
        # -1 stands below every magnitude
        scores = t.abs().where(default_mask != 0, -1).movedim(self.dim, -1)
        size = scores.shape[-1]
        blocks = functional.pad(scores, (0, -size % self.m), value=-1).unflatten(-1, (-1, self.m))
        order = blocks.argsort(dim=-1, descending=True, stable=True)
        keep = torch.ones_like(blocks, dtype=torch.bool).scatter_(-1, order[..., self.n :], False)
        return default_mask * keep.flatten(-2)[..., :size].movedim(-1, self.dim)


class BlockStructured(BasePruningMethod):
    """Mask the blocks of smallest mean magnitude; blocks tile the tensor, those at its edges may be short.

    (4, 1) masks four consecutive output rows of one input column together, as CPU kernels for sparse matrices want it
    (Elsen et al., "Fast Sparse ConvNets", 2020, https://arxiv.org/abs/1911.09723); (N, 1, -1, -1) is the 1xN pattern
    of convolutions (Lin et al., 2022, https://arxiv.org/abs/2105.14713). A block's score is the power mean
    (mean |w|^n)^(1/n) over its entries inside the tensor, masked ones as zeros. Of equal scores the earlier block goes;
    a block that holds NaN stays.

    Args:
        amount: fraction (float, rounded half to even) or count (int) of the blocks that still have an unmasked entry.
        block: length of a block along each leading axis; 1 along the axes it leaves out, -1 for a whole axis.
        n: exponent of the mean, above 0; inf takes the maximum.

    Raises:
        ArgumentError, ValueError, TypeError: an argument out of range; when it is applied, PruningError: more axes than
            the tensor has, or more blocks than there are.

    Example:
        >>> BlockStructured.apply(linear, "weight", amount=0.5, block=(4, 1))
    """

    PRUNING_TYPE = "global"

    def __init__(self, amount: float, block: Sequence[int] = (4, 1), n: float = 2) -> None:
        validate_pruning_amount(amount)
        if not isinstance(block, Sequence) or not all(isinstance(b, Integral) and (b > 0 or b == -1) for b in block):
            raise ArgumentError(
                f"block={block!r}: lengths along the leading axes are needed, 1 or more, or -1 for all."
            )
        if not isinstance(n, Real) or not n > 0:
            raise ArgumentError(f"n={n!r}: the exponent of a mean must be above 0.")
        self.amount: float = amount
        self.block: tuple[int, ...] = tuple(block)
        self.n: float = float(n)

    def compute_mask(self, t: torch.Tensor, default_mask: torch.Tensor) -> torch.Tensor:
        """The new mask, given the values or scores `t` and the mask so far, both of the parameter's shape."""
        if len(self.block) > t.dim():
            raise PruningError(
                f"blocks of shape {self.block} on a tensor of shape {tuple(t.shape)}, which has fewer axes. Name "
                "weights alone, such as 'fc.weight', or give a shorter block."
            )
        lengths = [b if b > 0 else size for b, size in zip((*self.block, *[1] * t.dim()), t.shape, strict=False)]
        alive = default_mask != 0
        magnitude = t.abs().to(torch.promote_types(t.dtype, torch.float32)).where(alive, 0)
        if math.isinf(self.n):
            score = _tiles(magnitude, lengths).amax(-1)
        else:
            entries = _tiles(torch.ones_like(magnitude), lengths).sum(-1)
            # the scale keeps the powers of tiny and huge weights representable
            scale = magnitude.nan_to_num(0, 0).amax().clamp_min(torch.finfo(magnitude.dtype).tiny)
            score = _tiles((magnitude / scale) ** self.n, lengths).sum(-1) / entries
        candidates = _tiles(alive, lengths).any(-1)
        size = int(candidates.sum())
        count = int(self.amount) if isinstance(self.amount, Integral) else round(self.amount * size)
        if count > size:
            raise PruningError(f"amount={count} should be smaller than the number of blocks to prune={size}.")
        places = candidates.flatten().nonzero().flatten()
        keep = torch.ones_like(candidates)
        keep.view(-1)[places[score.flatten()[places].argsort(stable=True)[:count]]] = False
        for axis, (length, size) in enumerate(zip(lengths, t.shape, strict=True)):
            keep = keep.repeat_interleave(length, axis).narrow(axis, 0, size)
        return default_mask * keep


def _tiles(t: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
    """`t` cut into blocks, filled up by zeros: one axis for each of its own, and a last one over a block's entries."""
    fill = [amount for size, length in zip(t.shape, lengths, strict=True) for amount in (-size % length, 0)]
    t = functional.pad(t, fill[::-1])
    for axis, length in enumerate(lengths):
        t = t.unflatten(2 * axis, (-1, length))
    order = (*range(0, t.dim(), 2), *range(1, t.dim(), 2))
    return t.permute(order).flatten(len(lengths))
