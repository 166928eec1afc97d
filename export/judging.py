"""Whether outputs agree: every candidate against the reference, and both against float64."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from fxprune.errors import ArgumentError, ArgumentTypeError, CompareError
from fxprune.graph.calls import Call
from fxprune.graph.equality import TOLERANCES, difference

from .divergence import Search, find
from .float64 import MOST_BYTES_COPIED, Float64Runner, copied_bytes, float64_runner
from .report import Report, Row
from .runners import ModuleRunner, Runner
from .values import dtype_name

_ROUNDING = 2.0  # times the reference's own error that a candidate's may be, where no tolerance is asked for


@dataclass(frozen=True)
class Tolerance:
    """How far values may differ: `atol + rtol * max |reference|`; None: as far as their dtype needs, and 0.

    Attributes:
        rtol: relative to the largest magnitude of the reference. atol: absolute.
    """

    rtol: float | None = None
    atol: float | None = None

    def __post_init__(self) -> None:
        for name, value in (("rtol", self.rtol), ("atol", self.atol)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
                raise ArgumentTypeError(f"{name}={value!r}: a number is needed, or None for that of the dtype.")
            if value is not None and not value >= 0:
                raise ArgumentError(f"{name}={value!r}: 0 or more is needed, or None for that of the dtype.")

    @property
    def is_default(self) -> bool:
        """Whether nobody asked for one."""
        return self.rtol is None and self.atol is None

    def of(self, runner: Runner) -> Tolerance:
        """With the tolerance of a runner's own where none was asked for."""
        return replace(self, rtol=runner.rtol if self.rtol is None else self.rtol)

    def limit(self, dtype: torch.dtype, scale: float) -> float:
        """The largest difference allowed for values of a dtype whose largest magnitude is `scale`."""
        return (self.atol or 0.0) + (TOLERANCES[dtype] if self.rtol is None else self.rtol) * scale

    def agrees(self, reference: torch.Tensor, value: torch.Tensor) -> bool:
        """Whether `value` is as near to `reference` as this asks."""
        return verdict(reference, value, self).ok


class Verdict(NamedTuple):
    """Whether a value agrees and how far it is away, in the fields of a `Row`."""

    max_abs: float | None
    max_rel: float | None
    ok: bool
    note: str


def verdict(reference: torch.Tensor, value: torch.Tensor, tolerance: Tolerance) -> Verdict:
    """How far `value` is from `reference`, both of any shape and dtype, and whether the tolerance allows it.

    Complex numbers may come as ONNX files have them, as real and imaginary parts in an axis more.
    """
    if reference.is_complex() and value.is_floating_point() and value.shape == (*reference.shape, 2):
        value = torch.view_as_complex(value.contiguous())
    if reference.shape != value.shape or reference.dtype != value.dtype:
        return Verdict(None, None, False, f"is {dtype_name(value)} of shape {list(value.shape)}")
    found = difference(reference, value)
    if found.misplaced:
        return Verdict(None, None, False, f"NaN or inf differ at {found.misplaced} of {reference.numel()} places")
    relative = found.relative if math.isfinite(found.relative) else None
    if not (reference.is_floating_point() or reference.is_complex()):
        return Verdict(found.largest, relative, found.equal, "")
    limit = tolerance.limit(reference.dtype, found.scale)
    agrees = found.largest <= limit
    return Verdict(found.largest, relative, agrees, "" if agrees else f"limit {limit:.1e}")


class Outcome(NamedTuple):
    """What one call gives: outputs by path, and buffers by name where the call is in train mode."""

    outputs: dict[str, torch.Tensor]
    buffers: dict[str, torch.Tensor]


def _outcome(runner: Runner, call: Call, mode: str) -> Outcome:
    if mode == "train" and isinstance(runner, ModuleRunner):
        return Outcome(*runner.run_with_buffers(*call))
    return Outcome(runner.run(*call), {})


class _Truth:
    """The reference in float64, as far as there is such a copy and it runs; `lacking` says why not.

    A copy of many parameters takes twice their memory: it is made once an output does not agree without it.
    """

    def __init__(self, reference: Runner, mode: str) -> None:
        self._reference = reference
        self._runner: Float64Runner | None = None
        self.lacking = ""
        self._is_open = mode == "eval"  # whether a copy may still be made
        size = copied_bytes(reference)
        if self._is_open and size > MOST_BYTES_COPIED:
            self.lacking = f"{size / 2**30:.1f} GiB of parameters are copied only where an output does not agree"
        else:
            self.make()

    def make(self) -> None:
        """Copy the reference, where that has not been tried."""
        if self._is_open:
            self._is_open = False
            self._runner, self.lacking = float64_runner(self._reference)

    def outputs(self, call: Call, expected: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The float64 outputs of a call by path, of those that are not float64 anyway."""
        if self._runner is None:
            return {}
        try:
            found = self._runner.run(*call)
        except CompareError as error:
            self._runner, self.lacking = None, str(error)
            return {}
        return {path: value for path, value in found.items() if value.dtype != expected[path].dtype}


def judge(
    runners: Sequence[Runner],
    calls: Sequence[Call],
    tolerance: Tolerance,
    mode: str = "eval",
    names: Sequence[str] | None = None,
) -> Report:
    """`compare` for runners that exist already; the first is the reference."""
    reference, *candidates = runners
    reference_name, *candidate_names = _distinct(names or [runner.name for runner in runners])
    truth = _Truth(reference, mode)
    rows: list[Row] = []
    search = Search()
    for index, call in enumerate(calls):
        expected = _outcome(reference, call, mode)
        outcomes = [_outcome(candidate, call, mode) for candidate in candidates]
        exact = truth.outputs(call, expected.outputs)
        for name, candidate, outcome in zip(candidate_names, candidates, outcomes, strict=True):
            own = tolerance.of(candidate)
            if len(outcome.outputs) != len(expected.outputs):
                rows.append(_other_outputs(name, index, expected, outcome))
                continue
            found = _rows(name, index, expected, outcome, exact, own)
            if not exact and not all(row.ok for row in found):
                truth.make()
                exact = truth.outputs(call, expected.outputs)
                found = _rows(name, index, expected, outcome, exact, own)
            rows += found
            if mode == "eval" and search.found is None and not all(row.ok for row in found):
                search = find(reference, candidate, call, index, own.agrees)
    return Report(reference_name, mode, tuple(rows), search.found, truth.lacking, search.failure)


def _distinct(names: Sequence[str]) -> list[str]:
    return [name if names.count(name) == 1 else f"{name} ({i})" for i, name in enumerate(names)]


def _other_outputs(candidate: str, index: int, expected: Outcome, found: Outcome) -> Row:
    wanted, given = list(expected.outputs), list(found.outputs)
    note = f"has {len(given)} outputs {given}, the reference {len(wanted)} {wanted}"
    return Row(candidate, index, "all", (), "", None, None, False, note)


def _rows(
    candidate: str,
    index: int,
    expected: Outcome,
    found: Outcome,
    exact: dict[str, torch.Tensor],
    tolerance: Tolerance,
) -> list[Row]:
    """A row for each output, in order, and for each buffer of one name and shape on both sides."""
    rows = []
    for (path, reference), value in zip(expected.outputs.items(), found.outputs.values(), strict=True):
        row = _row(candidate, index, path, reference, value, tolerance)
        rows.append(_against_float64(row, reference, value, exact[path], tolerance) if path in exact else row)
    for name, reference in expected.buffers.items():
        if name in found.buffers and found.buffers[name].shape == reference.shape:
            rows.append(_row(candidate, index, f"buffer {name}", reference, found.buffers[name], tolerance))
    return rows


def _row(
    candidate: str, index: int, output: str, reference: torch.Tensor, value: torch.Tensor, tolerance: Tolerance
) -> Row:
    found = verdict(reference, value, tolerance)
    return Row(candidate, index, output, tuple(reference.shape), dtype_name(reference), *found)


def _against_float64(
    row: Row, reference: torch.Tensor, value: torch.Tensor, exact: torch.Tensor, tolerance: Tolerance
) -> Row:
    """The row with the errors of both sides; what is no worse than the reference's own rounding agrees."""
    sides = (side.to(torch.promote_types(side.dtype, torch.float64)) for side in (value, reference))
    error, own = (verdict(exact, side, Tolerance()).max_rel for side in sides)
    row = replace(row, error=error, reference_error=own)
    if not row.ok and tolerance.is_default and error is not None and error <= _ROUNDING * (own or 0.0):
        return replace(row, ok=True, note="by the rounding of the reference")
    return row
