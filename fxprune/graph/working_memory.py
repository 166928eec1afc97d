"""How much of a large tensor is worked on at once, so that what comes in between stays small and near."""

from __future__ import annotations

BYTES_AT_ONCE = 2**21


def slices_at_once(nbytes: int) -> int:
    """How many slices of a tensor are worked on at once, at least one; `nbytes`: of one of them.

    Example:
        >>> slices_at_once(torch.empty(4096, 1024)[:1].nbytes)
        512
    """
    return max(1, BYTES_AT_ONCE // max(1, nbytes))
