"""Whether two tensors are equal to rounding: one measure of how far they are apart, one table of tolerances."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Relative to the largest magnitude of an output. Two orders of summation of n products differ by about sqrt(n)
# roundings, and a deep network multiplies that: float32 rounds at 6e-8, and 1e-4 leaves about three decimal orders
# for it, while a wrong weight shows well above. The other dtypes keep about the same distance, as far as they can.
TOLERANCES = {
    torch.float64: 1e-9, torch.complex128: 1e-9, torch.float32: 1e-4, torch.complex64: 1e-4,
    torch.float16: 1e-2, torch.bfloat16: 5e-2,
}  # fmt: skip

# Between a graph and the same graph without its dead channels: every sum is over fewer terms, and constants were added
# up elsewhere. Only networks too large to be run in float64 are compared in less than that.
REDUCED_TOLERANCES = TOLERANCES | {torch.float32: 2e-4, torch.complex64: 2e-4, torch.float16: 5e-2}

# Between layers in front of batch norms and the same layers with these folded in, where every weight is rounded anew.
# ResNets, MobileNetV2, DenseNet-121, EfficientNet-B0 and VGG-16 differ by up to 9e-6 in float32, 0.02 in float16 and
# 0.11 in bfloat16; an output of the wrong sign differs by 2.
FOLDED_TOLERANCES = TOLERANCES | {torch.float32: 1e-3, torch.float16: 0.1, torch.bfloat16: 0.25}
_COARSEST = max(TOLERANCES.values())


@dataclass(frozen=True)
class Difference:
    """How far a tensor is from a reference of its shape.

    Attributes:
        largest: the largest |value - reference| where the reference is finite.
        scale: the largest finite |reference|.
        misplaced: at how many places one has NaN or inf and the other something else.
        equal: whether all values are the same, NaN equal to NaN.
    """

    largest: float
    scale: float
    misplaced: int
    equal: bool

    @property
    def relative(self) -> float:
        """`largest` over `scale`, infinite where the two cannot be set off."""
        if self.misplaced:
            return float("inf")
        if self.largest == 0:
            return 0.0
        return self.largest / self.scale if self.scale else float("inf")


def difference(reference: Tensor, value: Tensor) -> Difference:
    """Compare two tensors of one shape, whatever their dtypes; computed in float64."""
    wide = torch.complex128 if reference.is_complex() else torch.float64
    a, b = reference.detach().to(wide), value.detach().to(wide)
    finite = torch.isfinite(a)
    same = (a == b) | (a.isnan() & b.isnan())
    misplaced = int((~finite & ~same | finite & ~torch.isfinite(b)).sum())
    a, b = a[finite], b[finite]
    largest = float((a - b).abs().max()) if a.numel() and not misplaced else 0.0
    scale = float(a.abs().max()) if a.numel() else 0.0
    is_exact = not (reference.is_floating_point() or reference.is_complex())  # float64 does not hold every int64
    equal = torch.equal(reference, value) if is_exact else bool(same.all())
    return Difference(largest, scale, misplaced, equal)


def error(reference: Any, value: Any) -> float:
    """The largest difference relative to the largest finite value of the reference; 0.0 for what is no tensor.

    Infinite where shapes differ, or NaN or inf stand elsewhere. Integers and booleans give 0.0 or 1.0.
    """
    if not isinstance(reference, Tensor):
        return 0.0
    if not isinstance(value, Tensor) or reference.shape != value.shape:
        return float("inf")
    if not (reference.is_floating_point() or reference.is_complex()):
        return 0.0 if torch.equal(reference, value) else 1.0
    return difference(reference, value).relative


def close(reference: Any, value: Any, tolerance: float | None = None) -> bool:
    """Whether two tensors differ by rounding alone: by a relative `tolerance`, None: that of the reference's dtype."""
    if tolerance is None:
        tolerance = REDUCED_TOLERANCES.get(getattr(reference, "dtype", torch.float64), _COARSEST)
    return error(reference, value) <= tolerance


def is_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or inf, as far as there are values; without a mark for each."""
    if not tensor.is_floating_point() or tensor.is_meta or not tensor.numel():
        return True
    return all(bool(end.isfinite()) for end in tensor.detach().aminmax())
