"""The ridge least-squares fit of a reader's live weights, and the choice of its damping on rows that were held back."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fxprune.prune.repair.moments import Moments

# Where every output has a support of its own, the damping is chosen by this many of the supports.
_SUPPORTS_TRIED = 32
# An error of this share of the output's energy is the rounding of float32.
_ROUNDING = 1e-11


@dataclass(frozen=True, eq=False)
class Problem:
    """One reader to fit.

    Attributes:
        fit, held: moments of the rows to fit, and of those held back; `reader` is its number among their readers.
        support: [groups, outputs, columns], which weights can change.
        biased: [groups, outputs], whether the output has a bias to change.
        alive: [groups, outputs], which outputs count.
    """

    fit: Moments
    held: Moments
    reader: int
    support: Tensor
    biased: Tensor
    alive: Tensor
    _equations: dict[bool, tuple[Tensor, Tensor]] = field(init=False, default_factory=dict)

    def equations(self, centred: bool) -> tuple[Tensor, Tensor]:
        """X^T X and X^T E of the rows to fit, about the mean or about zero."""
        if centred not in self._equations:
            self._equations[centred] = self.fit.normal_equations(self.reader, centred)
        return self._equations[centred]

    def energy(self, change: Tensor, bias: Tensor, outputs: Tensor) -> float:
        """The held-back error of some outputs after a change."""
        return float(self.held.energy_after(self.reader, change, bias)[outputs].sum())


@dataclass(frozen=True, eq=False)
class Fit:
    """What fits best.

    Attributes:
        change: of the weights, [groups, outputs, columns]; bias: of the bias, [groups, outputs].
        damping: None where the weights are best left as they are.
        before, after: held-back errors, relative to the energy of the reference's output there.
    """

    change: Tensor
    bias: Tensor
    damping: float | None
    before: float
    after: float


def best_fit(problem: Problem, dampings: Sequence[float]) -> Fit:
    """The fit whose damping leaves the least error on held-back rows; no change where none leaves less than now.

    Once that is decided, the rows that were held back are fitted too.
    """
    shape = problem.support.shape
    none = torch.zeros(shape, dtype=torch.float64, device=problem.support.device)
    alive, still = problem.alive, none[..., 0]
    scale = float(problem.held.errors[problem.reader].output[alive].sum())
    before = problem.energy(none, still, alive)
    blocks = [*_blocks(problem)]
    tried = blocks if len(blocks) <= _SUPPORTS_TRIED else blocks[:: -(-len(blocks) // _SUPPORTS_TRIED)]
    damping = _damping(problem, tried, dampings) if before > _ROUNDING * scale else None
    if damping is not None:
        change, bias = _solution(problem, blocks, damping)
        after = problem.energy(change, bias, alive)
        if after < before:
            fit = copy.deepcopy(problem.fit)  # readers of the same input share it
            fit.join(problem.held)
            change, bias = _solution(replace(problem, fit=fit), blocks, damping)
            return Fit(change, bias, damping, share(before, scale), share(after, scale))
    return Fit(none, still, None, share(before, scale), share(before, scale))


def share(energy: float, scale: float) -> float:
    """An error relative to an energy."""
    if scale:
        return energy / scale
    return 0.0 if energy == 0 else float("inf")


def _damping(problem: Problem, blocks: Sequence[_Block], dampings: Sequence[float]) -> float | None:
    """The best of them for these outputs; None where none can be solved."""
    outputs = torch.zeros_like(problem.alive)
    for block in blocks:
        outputs[block.groups, block.outputs] = True
    outputs &= problem.alive
    best, least = None, float("inf")
    for damping in sorted(dampings, reverse=True):
        energy = problem.energy(*_solution(problem, blocks, damping), outputs)
        if energy < least:
            best, least = damping, energy
        elif energy > least:  # less damping fits the fitted rows more and more, the others less and less
            break
    return best


@dataclass(frozen=True, eq=False)
class _Block:
    """Outputs that share their support: their equations have one matrix.

    Attributes:
        groups, outputs: indices, or slices.
        columns: the support, [columns] of indices; of several groups a mask [groups, columns].
        centred: whether a bias takes up the mean.
    """

    groups: slice | int
    outputs: slice | Tensor
    columns: Tensor
    centred: bool


def _blocks(problem: Problem) -> Iterator[_Block]:
    support, alive, biased = problem.support, problem.alive, problem.biased
    common = support.any(1)
    one_support = bool((support == common[:, None])[alive].all())
    kinds = biased[alive].unique()
    if one_support and len(kinds) == 1:
        yield _Block(slice(None), slice(None), common, bool(kinds))
        return
    for group in range(len(support)):
        keys = torch.cat([support[group], biased[group, :, None]], 1)
        kinds, which = keys.unique(dim=0, return_inverse=True)
        for i, kind in enumerate(kinds):
            if kind[:-1].any():
                yield _Block(group, (which == i).nonzero()[:, 0], kind[:-1].nonzero()[:, 0], bool(kind[-1]))


def _solution(problem: Problem, blocks: Sequence[_Block], damping: float) -> tuple[Tensor, Tensor]:
    """The changes of weights and bias that the damped normal equations of these outputs give."""
    change = torch.zeros(problem.support.shape, dtype=torch.float64, device=problem.support.device)
    for block in blocks:
        square, cross = problem.equations(block.centred)
        if isinstance(block.groups, slice):
            change += _shared(square, cross, block.columns, damping).transpose(1, 2)
        else:
            columns = block.columns
            matrix = square[block.groups][columns[:, None], columns]
            right = cross[block.groups][columns][:, block.outputs]
            assert isinstance(block.outputs, Tensor)
            change[block.groups, block.outputs[:, None], columns] = _ridge(matrix[None], right[None], damping)[0].T
    change *= problem.alive[..., None]
    bias = problem.fit.mean_shift(problem.reader, change)
    return change, bias * (problem.alive & problem.biased)


def _shared(square: Tensor, cross: Tensor, common: Tensor, damping: float) -> Tensor:
    """All outputs of all groups, whose support is that of their group."""
    if len(common) == 1:
        columns = common[0].nonzero()[:, 0]
        if len(columns) == common.shape[1]:
            return _ridge(square, cross, damping)
        found = torch.zeros_like(cross)
        found[:, columns] = _ridge(square[:, columns[:, None], columns], cross[:, columns], damping)
        return found
    both = common[:, :, None] & common[:, None, :]
    matrix = torch.where(both, square, 0)
    matrix.diagonal(dim1=1, dim2=2)[~common] = 1  # equations of their own, whose solution is zero
    counts = common.sum(1).clamp(min=1)
    mean = torch.where(common, square.diagonal(dim1=1, dim2=2), 0).sum(1) / counts
    return _ridge(matrix, torch.where(common[..., None], cross, 0), damping, mean)


def _ridge(matrix: Tensor, right: Tensor, damping: float, mean: Tensor | None = None) -> Tensor:
    """Solve (matrix + damping * mean diagonal) x = right; what cannot be solved is left at zero."""
    if mean is None:
        mean = matrix.diagonal(dim1=1, dim2=2).mean(1)
    damped = matrix.clone()
    damped.diagonal(dim1=1, dim2=2).add_((damping * mean)[:, None])
    factor, failed = torch.linalg.cholesky_ex(damped)
    solved = torch.cholesky_solve(right, factor)
    is_usable = (failed == 0) & torch.isfinite(solved).flatten(1).all(1)
    return torch.where(is_usable[:, None, None], solved, 0)
