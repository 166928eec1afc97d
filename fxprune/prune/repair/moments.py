"""Second moments of a reader's inputs, and of the errors that it is to make up for, summed over rows as they come."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

_LEAST_SPLIT = 512  # columns: of fewer, the product as a whole is as fast


def first_shift(inputs: Tensor) -> Tensor:
    """From what the rows of an input, [groups, rows, columns], are counted: what never changes is zero behind it."""
    constant = (inputs == inputs[:, :1]).all(1)
    return torch.where(constant, inputs[:, 0], inputs.mean(1))


def add_products(square: Tensor, rows: Tensor) -> None:
    """Add X^T X of X, [groups, rows, columns]: what stands above the diagonal stands below it, and is computed once."""
    columns = rows.shape[2]
    if columns < _LEAST_SPLIT:
        square += rows.transpose(1, 2) @ rows
        return
    half = columns // 2
    first, second = rows[..., :half], rows[..., half:]
    across = first.transpose(1, 2) @ second
    square[:, :half, half:] += across
    square[:, half:, :half] += across.transpose(1, 2)
    add_products(square[:, :half, :half], first)
    add_products(square[:, half:, half:], second)


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

    def with_those_of(self, other: Errors) -> Errors:
        """The sums over the rows of both."""
        return Errors(
            self.cross + other.cross, self.total + other.total, self.energy + other.energy, self.output + other.output
        )


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

    def add(self, inputs: Tensor, errors: list[Tensor], outputs: list[Tensor], shift: Tensor) -> None:
        """Add rows: inputs [groups, rows, columns], for each reader errors and outputs [groups, rows, outputs]."""
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
        self.total += shifted.sum(1)
        add_products(self.square, shifted)
        for found, error, output in zip(self.errors, errors, outputs, strict=True):
            found.cross += transposed @ error
            found.total += error.sum(1)
            found.energy += error.square().sum(1)
            found.output += output.square().sum(1)

    def with_those_of(self, other: Moments) -> Moments:
        """The sums over the rows of both, which are counted from the same shift."""
        found = Moments(self.readers, self.count + other.count)
        found.shift, found.total = self.shift, self.total + other.total
        found.square = self.square + other.square
        found.errors = [one.with_those_of(another) for one, another in zip(self.errors, other.errors, strict=True)]
        return found

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
