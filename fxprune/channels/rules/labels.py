"""Contractions in Einstein's notation, one letter an axis; every spelling of a product is brought to it."""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, eq=False)
class Labels:
    """A contraction of two operands as in Einstein's notation.

    Attributes:
        left, right, out: of the operands and the result. batch: those that both operands and the result share, or that
            one of them is broadcast along. contracted: those that both have and that are summed over.
    """

    left: str
    right: str
    out: str
    batch: str
    contracted: str

    @property
    def outer(self) -> str:
        """The left operand's own."""
        return "".join(c for c in self.left if c not in self.batch and c not in self.contracted)

    @property
    def inner(self) -> str:
        """The right operand's own."""
        return "".join(c for c in self.right if c not in self.batch and c not in self.contracted)

    @property
    def swapped(self) -> Labels:
        """The same with the operands exchanged."""
        return Labels(self.right, self.left, self.out, self.batch, self.contracted)

    @classmethod
    def of_terms(cls, left: str, right: str, out: str) -> Labels:
        """Those of two operands and a result; what one operand has alone and the result lacks is summed before."""
        batch = "".join(c for c in left if c in right and c in out)
        return cls(left, right, out, batch, "".join(c for c in left if c in right and c not in out))

    @classmethod
    def of_matmul(cls, left_rank: int, right_rank: int, transposed: bool) -> Labels:
        """Those of a product of (batches of) matrices or vectors, the right one `transposed` as in a linear layer."""
        batch = string.ascii_lowercase[: max(left_rank, right_rank, 2) - 2]
        rows, columns = "M" if left_rank > 1 else "", "N" if right_rank > 1 else ""
        left_batch, right_batch = (batch[len(batch) - max(rank - 2, 0) :] for rank in (left_rank, right_rank))
        right = columns + "K" if transposed else "K" + columns
        return cls(left_batch + rows + "K", right_batch + right, batch + rows + columns, batch, "K")

    @classmethod
    def of_inner(cls, left_rank: int, right_rank: int) -> Labels:
        """Those of a product over the last axes of both operands."""
        left, right = _letters(left_rank - 1), _letters(left_rank + right_rank - 2)[left_rank - 1 :]
        return cls.of_terms(left + "K", right + "K", left + right)

    @classmethod
    def of_tensordot(cls, ranks: Sequence[int], left_dims: Sequence[int], right_dims: Sequence[int]) -> Labels:
        """Those of a product over the given axes of both operands."""
        letters = _letters(sum(ranks))
        left, right = list(letters[: ranks[0]]), list(letters[ranks[0] :])
        for one, other in zip(left_dims, right_dims, strict=True):
            right[other % ranks[1]] = left[one % ranks[0]]
        out = [c for c in left if c not in right] + [c for c in right if c not in left]
        return cls.of_terms("".join(left), "".join(right), "".join(out))

    @classmethod
    def of_bilinear(cls, rank: int) -> tuple[Labels, Labels]:
        """Those of the first operand with the weight, and of what comes out with the second operand."""
        batch = _letters(rank - 1)
        return (
            cls.of_terms(batch + "I", "OIJ", batch + "OJ"),
            cls.of_terms(batch + "OJ", batch + "J", batch + "O"),
        )


def _letters(count: int) -> str:
    return string.ascii_lowercase[:count]


@dataclass(frozen=True)
class Equation:
    """An equation of `einsum` with any number of operands, its ellipses written out.

    Attributes:
        operands: the labels of each. out: of the result.

    Example:
        >>> Equation.parse("...i, ij -> ...j", [3, 2])
        Equation(operands=('01i', 'ij'), out='01j')
        >>> Equation.parse("bi,ij", [2, 2]).out  # without an arrow: what appears once, in alphabetical order
        'bj'
    """

    operands: tuple[str, ...]
    out: str

    @classmethod
    def parse(cls, equation: str, ranks: Sequence[int]) -> Equation | None:
        """The equation for operands of these ranks; None where an operand repeats a label, which takes a diagonal."""
        terms, arrow, out = equation.replace(" ", "").partition("->")
        operands = terms.split(",")
        hidden = [rank - len(term.replace("...", "")) for term, rank in zip(operands, ranks, strict=True)]
        if any(count > len(string.digits) for count in hidden):
            return None
        # ellipses are aligned at their last axes
        most = string.digits[: max(n if "..." in term else 0 for term, n in zip(operands, hidden, strict=True))]
        written = [term.replace("...", most[len(most) - n :]) for term, n in zip(operands, hidden, strict=True)]
        if any(len({*term}) < len(term) for term in written):
            return None
        if not arrow:
            letters = "".join(written)
            once = sorted(c for c in {*letters} if letters.count(c) == 1 and c not in most)
            return cls(tuple(written), most + "".join(once))
        return cls(tuple(written), out.replace("...", most))

    def in_pairs(self) -> list[Labels]:
        """The contractions, one after the other from the left: each of what is there so far and the next operand."""
        found, so_far = [], self.operands[0]
        for number, operand in enumerate(self.operands[1:], 2):
            later = {*"".join(self.operands[number:]), *self.out}
            kept = "".join(c for c in dict.fromkeys(so_far + operand) if c in later)
            out = self.out if number == len(self.operands) else kept
            found.append(Labels.of_terms(so_far, operand, out))
            so_far = out
        return found
