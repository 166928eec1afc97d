"""Second moments of a reader's inputs, and of the errors that it is to make up for, summed over rows as they come.

Sums that several processes share have the same bits in whatever order they are added up: what is added is rounded first
to multiples of a step, a power of two, so that no addition rounds (Demmel and Nguyen, "Fast Reproducible Floating-Point
Summation", 2013, https://doi.org/10.1109/ARITH.2013.9). Steps are 2^-42 of the first products: far below what products
in float32 round by themselves, and sums stay exact up to 2^11 times as large as these.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

_LEAST_SPLIT = 512  # columns: of fewer, the product as a whole is as fast
_BITS = 21  # of a column's length below which it is rounded, half of those of a product
_MORE_BITS = 15  # of a sum of rows


def first_shift(inputs: Tensor) -> Tensor:
    """From what the rows of an input, [groups, rows, columns], are counted: what never changes is zero behind it."""
    constant = (inputs == inputs[:, :1]).all(1)
    return torch.where(constant, inputs[:, 0], inputs.mean(1))


def add_products(square: Tensor, rows: Tensor, steps: Tensor | None = None) -> None:
    """Add X^T X of X, [groups, rows, columns]: what stands above the diagonal stands below it, and is computed once.

    With steps, [groups, columns], multiples of the products of two.
    """
    columns = rows.shape[2]
    if columns < _LEAST_SPLIT:
        square += _in_steps(rows.transpose(1, 2) @ rows, steps, steps)
        return
    half = columns // 2
    first, second = rows[..., :half], rows[..., half:]
    left, right = (None, None) if steps is None else (steps[:, :half], steps[:, half:])
    across = _in_steps(first.transpose(1, 2) @ second, left, right)
    square[:, :half, half:] += across
    square[:, half:, :half] += across.transpose(1, 2)
    add_products(square[:, :half, :half], first, left)
    add_products(square[:, half:, half:], second, right)


def _in_steps(products: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
    if left is None or right is None:
        return products
    return _multiples(products.double(), left[:, :, None] * right[:, None, :])


def _multiples(values: Tensor, steps: Tensor) -> Tensor:
    """Values rounded to multiples of steps; float64, the memory of the values may be taken."""
    return values.div_(steps).round_().mul_(steps)


@dataclass(frozen=True)
class Origin:
    """What the rows of an input are counted from, and in.

    Attributes:
        shift: [groups, columns]. steps: [groups, columns], powers of two, float64.
    """

    shift: Tensor
    steps: Tensor

    @classmethod
    def of(cls, inputs: Tensor) -> Origin:
        """That of the first rows, [groups, rows, columns].

        What never changes there is taken to be as large as it is, and zeros as large as the other columns.
        """
        shift = first_shift(inputs)
        size = (inputs - shift[:, None]).double().square().sum(1).sqrt()
        size = torch.where(size > 0, size, shift.double().abs() * inputs.shape[1] ** 0.5)
        typical = size[size > 0].median() if bool((size > 0).any()) else size.new_ones(())
        return cls(shift, torch.where(size > 0, size, typical).log2().ceil().clamp(min=-400).sub(_BITS).exp2())


@dataclass
class Errors:
    """What one reader's output lacks, row by row summed up.

    Attributes:
        cross: [groups, columns, outputs], the sum of shifted inputs times errors.
        total, energy: [groups, outputs], sums of the errors and of their squares.
        output: [groups, outputs], the sum of squares of what the reference computes.
    """

    cross: Tensor
    total: Tensor
    energy: Tensor
    output: Tensor

    @classmethod
    def zeros(cls, groups: int, columns: int, outputs: int, device: torch.device) -> Errors:
        """Nothing summed yet."""

        def of(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        return cls(of(groups, columns, outputs), of(groups, outputs), of(groups, outputs), of(groups, outputs))

    @property
    def sums(self) -> list[Tensor]:
        """All of them."""
        return [self.cross, self.total, self.energy, self.output]


@dataclass
class Moments:
    """Sums over the rows of one input, shared by the readers of it; float64, of products in the inputs' own precision.

    Inputs are counted from a fixed shift, about their mean: sums of squares of what is far from zero lose digits.

    Attributes:
        readers: how many outputs each reader of this input has, in each group.
        count: rows summed.
        shift: [groups, columns]; total: the sum of shifted inputs; square: [groups, columns, columns], of their
            products.
        errors: one a reader.
    """

    readers: list[int]
    count: int = 0
    shift: Tensor = field(init=False)
    total: Tensor = field(init=False)
    square: Tensor = field(init=False)
    errors: list[Errors] = field(init=False)

    def add(
        self,
        inputs: Tensor,
        errors: list[Tensor],
        outputs: list[Tensor],
        shift: Tensor,
        steps: Tensor | None = None,
    ) -> None:
        """Add rows: inputs [groups, rows, columns], for each reader errors and outputs [groups, rows, outputs].

        With steps, [groups, columns], what is added is rounded as above; errors are not.
        """
        groups, rows, columns = inputs.shape
        if not self.count:
            device = inputs.device
            self.shift = shift.double()
            self.total = torch.zeros(groups, columns, dtype=torch.float64, device=device)
            self.square = torch.zeros(groups, columns, columns, dtype=torch.float64, device=device)
            self.errors = [Errors.zeros(groups, columns, count, device) for count in self.readers]
        shifted = inputs - shift[:, None]
        transposed = shifted.transpose(1, 2)
        self.count += rows
        total = shifted.sum(1)
        self.total += total if steps is None else _multiples(total.double(), steps / 2**_MORE_BITS)
        add_products(self.square, shifted, steps)
        for found, error, output in zip(self.errors, errors, outputs, strict=True):
            found.cross += transposed @ error
            found.total += error.sum(1)
            found.energy += error.square().sum(1)
            found.output += output.square().sum(1)

    def join(self, other: Moments) -> None:
        """Add the sums over other rows, which are counted from the same shift."""
        self.count += other.count
        for own, others in zip(self._sums, other._sums, strict=True):
            own += others

    @property
    def _sums(self) -> list[Tensor]:
        return [self.total, self.square, *(each for found in self.errors for each in found.sums)]

    @property
    def is_finite(self) -> bool:
        """Whether no NaN or inf was among what was added."""
        sums = [self.total, *(each for found in self.errors for each in (found.energy, found.output))]
        return all(bool(torch.isfinite(each).all()) for each in sums)

    @property
    def mean_squares(self) -> Tensor:
        """[groups, columns], the mean of each input's square: about zero."""
        shifted = self.square.diagonal(dim1=1, dim2=2) + 2 * self.total * self.shift
        return shifted / self.count + self.shift.square()

    def normal_square(self, centred: bool) -> Tensor:
        """X^T X, about the mean or about zero."""
        if centred:
            return self.square - self.total[:, :, None] * self.total[:, None, :] / self.count
        mixed = self.total[:, :, None] * self.shift[:, None, :]
        square = self.square + mixed + mixed.transpose(1, 2)
        return square + self.count * self.shift[:, :, None] * self.shift[:, None, :]

    def normal_equations(self, reader: int, centred: bool) -> tuple[Tensor, Tensor]:
        """X^T X and X^T E of a reader, about the mean or about zero."""
        errors = self.errors[reader]
        if centred:
            cross = errors.cross - self.total[:, :, None] * errors.total[:, None, :] / self.count
        else:
            cross = errors.cross + self.shift[:, :, None] * errors.total[:, None, :]
        return self.normal_square(centred), cross

    def mean_shift(self, reader: int, change: Tensor) -> Tensor:
        """What a bias adds, [groups, outputs], so that the mean of the error is zero after a change of the weights."""
        mean = self.total / self.count + self.shift
        return self.errors[reader].total / self.count - torch.einsum("gk,grk->gr", mean, change)

    def energy_after(self, reader: int, change: Tensor, bias: Tensor) -> Tensor:
        """The error's sum of squares, [groups, outputs], after weights [groups, outputs, columns] and bias changed."""
        errors = self.errors[reader]
        constant = torch.einsum("gk,grk->gr", self.shift, change) + bias
        linear = torch.einsum("grk,gkr->gr", change, errors.cross) + constant * errors.total
        quadratic = torch.einsum("grk,grk->gr", change @ self.square, change)
        mixed = constant * torch.einsum("gk,grk->gr", self.total, change)
        found = errors.energy - 2 * linear + quadratic + 2 * mixed + self.count * constant.square()
        return found.clamp(min=0)
