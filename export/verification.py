"""Files in the making: their names, their sizes, and the proof that they compute what they came from."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import onnx
import sympy
import torch
import torch.utils._pytree as pytree
from torch.export import ExportedProgram

from fxprune.errors import CompareError, ExportError, InputError
from fxprune.files import atomic
from fxprune.graph.calls import Call, as_calls
from fxprune.graph.requirements import require_flag
from fxprune.graph.samples import stretched
from fxprune.graph.traced import TracedModule
from fxprune.reports import Readable, counted, number, plain
from fxprune.torch_internals import size_expression

from .judging import Tolerance, judge
from .report import Report
from .runners import ModuleRunner, Runner


@dataclass(frozen=True, repr=False)
class FileReport(Readable):
    """What an export wrote; `str` says what and how it was verified, `table()` with every output.

    Attributes:
        path: the file. size: its bytes, external data included.
        comparison: the file against its source, per output; None when it was not asked for.
        notes: what the caller should know of the file.
    """

    path: Path
    size: int
    comparison: Report | None
    notes: tuple[str, ...]

    _runtime: ClassVar[str] = "torch"

    def __str__(self) -> str:
        head = ", ".join([f"{self.path}: {self.size:,} bytes", *self._kind()])
        return "\n".join([head, self._verdict(), *(f"note: {note}" for note in self.notes[:_NOTES_SHOWN])])

    def table(self) -> str:
        """The file, its comparison output by output, and what is to be known of it."""
        head = str(self).splitlines()[0] if self.comparison is not None else f"{self}"
        compared = [self.comparison.table()] if self.comparison is not None else []
        notes = [f"note: {note}" for note in (self.notes if self.comparison is not None else self.notes[_NOTES_SHOWN:])]
        return "\n".join([head, *compared, *notes])

    def to_dict(self) -> dict[str, Any]:
        """The report as plain JSON types; `size` is the same number as `size_bytes`."""
        found = {name: plain(value) for name, value in vars(self).items() if name != "comparison"}
        comparison = None if self.comparison is None else self.comparison.to_dict()
        sizes = {f"{name}_bytes": found[name] for name in ("size", "dense_size") if name in found}
        return found | sizes | {"comparison": comparison}

    def _kind(self) -> tuple[str, ...]:
        """What the file is, beside its size."""
        return ()

    def _verdict(self) -> str:
        """How it was verified, and what came out."""
        if self.comparison is None:
            return "not verified: it was not run"
        rows = self.comparison.rows
        calls = counted(len({row.call for row in rows}), "call")
        outputs = counted(len({row.output for row in rows}), "output")
        largest = max((row.max_rel or 0.0 for row in rows), default=0.0)
        difference = f"largest difference {number(largest)} of an output's largest value"
        return f"verified: run in {self._runtime} on {calls}, {outputs} compared with the module; {difference}"


_NOTES_SHOWN = 2  # of the notes of a file, where it is printed


@dataclass(frozen=True)
class Draft:
    """A file in the making.

    Attributes:
        file: where it is written, in a private folder. target: the path that it is to have, as the caller gave it.
    """

    file: Path
    target: str | os.PathLike[str]

    @property
    def parts(self) -> list[Path]:
        """The file and what lies beside it (external data)."""
        return list(self.file.parent.iterdir())

    @property
    def size(self) -> int:
        """Bytes, external data included."""
        return sum(part.stat().st_size for part in self.parts)

    def keep_aside(self) -> Path:
        """Move it to where it can be looked at, beside its target."""
        aside = Path(self.target).with_stem(f"{Path(self.target).stem}.mismatch")
        with atomic(aside) as kept:
            for part in self.parts:
                part.rename(kept if part.name == self.file.name else kept.with_name(part.name))
        return aside

    @contextlib.contextmanager
    def usable(self) -> Iterator[None]:
        """Raise what the file fails at as an ExportError that names the target."""
        try:
            yield
        except (onnx.checker.ValidationError, CompareError) as error:
            told = str(error).replace(os.fspath(self.file), os.fspath(self.target))
            raise ExportError(f"the exported file cannot be used: {told}") from error


@dataclass(frozen=True)
class Proof:
    """How a file is to be verified.

    Attributes:
        is_wanted: whether it is to be run at all.
        calls: those to run it on, beside the sample.
        tolerance: how near it must be.
    """

    is_wanted: bool
    calls: tuple[Call, ...]
    tolerance: Tolerance

    @classmethod
    def of(cls, verify: Any, inputs: Any, rtol: float | None, atol: float | None) -> Proof:
        """From the arguments of an export, of these names.

        Raises:
            ArgumentTypeError: `verify` or a tolerance is of another type. CompareError: `inputs` are none.
        """
        require_flag("verify", verify)
        given = inputs is not None and not (isinstance(inputs, tuple) and not inputs)
        calls = as_calls(inputs, error=CompareError) if given else ()
        return cls(verify, tuple(calls), Tolerance(rtol, atol))


def verified(draft: Draft, reference: Runner, candidate: Runner, calls: Sequence[Call], tolerance: Tolerance) -> Report:
    """Compare the file, run by `candidate`, with what it came from, run by `reference`.

    Raises:
        ExportError: it computes something else; it is kept aside.
    """
    comparison = judge([reference, candidate], calls, tolerance)
    if not comparison.ok:
        aside = draft.keep_aside()
        raise ExportError(
            f"the exported file computes something else than its source; kept as '{aside}'.\n{comparison.table()}"
        )
    return comparison


@dataclass(frozen=True)
class OtherSizes:
    """Calls at other sizes than the sample's.

    Attributes:
        calls: those that the source runs on. notes: what was left out and why.
    """

    calls: list[Call]
    notes: list[str]


def other_sizes(exported: ExportedProgram, call: Call, final: TracedModule) -> OtherSizes:
    """The call with every free size one larger, and with free batches of 1, as far as `final` runs on these."""
    keywords = exported.call_spec.in_spec.child(1).context  # in the order of the signature
    leaves, spec = pytree.tree_flatten((call.args, {name: call.kwargs[name] for name in keywords}))
    free = _free_axes(exported, len(leaves))
    calls, notes = [], []
    for sizes in _candidates(exported, free, leaves):
        axes = {place: int(size.subs(sizes)) for place, size in free.items() if size.subs(sizes).is_Integer}
        changed = Call(*pytree.tree_unflatten(stretched(leaves, axes), spec))
        try:
            ModuleRunner(final, "eval").run(*changed)
        except (CompareError, InputError) as error:
            told = ", ".join(f"{i}[{axis}]: {size}" for (i, axis), size in axes.items())
            notes.append(f"not verified at the sizes {{{told}}} (input[axis]), which the source cannot run: {error}")
        else:
            calls.append(changed)
    return OtherSizes(calls, notes)


def _free_axes(exported: ExportedProgram, inputs: int) -> dict[tuple[int, int], sympy.Expr]:
    """The sizes that are free, by input and axis; the last placeholders are the inputs."""
    placeholders = list(exported.graph.find_nodes(op="placeholder"))
    free: dict[tuple[int, int], sympy.Expr] = {}
    for i, node in enumerate(placeholders[len(placeholders) - inputs :]):
        value = node.meta["val"]
        if isinstance(value, torch.Tensor):
            for axis, size in enumerate(value.shape):
                if isinstance(size, torch.SymInt):
                    free[i, axis] = size_expression(size)
    return free


def _candidates(
    exported: ExportedProgram, free: dict[tuple[int, int], sympy.Expr], leaves: Sequence[Any]
) -> list[dict[sympy.Symbol, int]]:
    """Sizes by symbol: all one larger where that is allowed, and batches of 1; only where there are any."""
    sample: dict[sympy.Symbol, int] = {}
    for (i, axis), size in free.items():
        for symbol in size.free_symbols if size.is_polynomial() else ():  # those of `2 * Dim("half")` too
            solved, value = sympy.solve_linear(size, leaves[i].shape[axis], [symbol])
            if solved == symbol and value.is_Integer:
                sample.setdefault(symbol, int(value))
    batches = {size for (_, axis), size in free.items() if axis == 0}
    allowed = exported.range_constraints
    larger = {size: n + 1 if n + 1 <= allowed[size].upper else n for size, n in sample.items()}
    # torch.export gives 2 as the lowest size that it treats as free; 1 works too in most models
    single = {size: 1 for size in sample if size in batches and allowed[size].lower <= 2}
    return [sample | changed for changed in (larger, single) if changed]
