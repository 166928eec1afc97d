"""What a reconstruction refitted, what that was worth, and what it left alone."""

from __future__ import annotations

from dataclasses import dataclass

from fxprune.reports import Readable, columns, counted, first_of, number


@dataclass(frozen=True)
class ReaderRepair:
    """One reader.

    Attributes:
        before, after: error of its output on held-back samples, as a share of the energy (sum of squares) of what the
            reference computes there; above one where it also makes up for what a stream is missing.
        rows, held: how many rows were fitted, and how many judged the fit.
        unknowns: weights of one output that were fitted.
        damping: what was chosen, relative to the mean of the diagonal; None where the weights stayed as they were.
        corrects_stream: whether its target includes what the stream that it is added to is missing.
        seconds: what its fit took, and its share of running what lies before it.
        note: what else there is to say.
    """

    before: float
    after: float
    rows: int
    held: int
    unknowns: int
    damping: float | None
    corrects_stream: bool
    seconds: float
    note: str = ""


@dataclass(frozen=True, repr=False)
class ReconstructionReport(Readable):
    """What `fxprune.reconstruct` did; `str` has the sums, `table()` every reader.

    Attributes:
        readers: by weight, those that were looked at, in the order of the fits.
        alone: by weight, or by node, why others were left alone.
        samples: how many were fitted, and how many held back; batches where their size is fixed.
        seconds: of the whole.
        new_biases: parameters that were made; an optimizer that was made before does not hold them.
        output: error of the module's outputs on held-back samples, before and after, as a share of the energy of the
            reference's; those samples are fitted, too, once the fits are decided. Of several outputs the mean.
    """

    readers: dict[str, ReaderRepair]
    alone: dict[str, str]
    samples: tuple[int, int]
    seconds: float
    new_biases: tuple[str, ...] = ()
    output: tuple[float, float] | None = None

    @property
    def refitted(self) -> list[str]:
        """The readers whose weights changed."""
        return [name for name, repair in self.readers.items() if repair.damping is not None]

    def __str__(self) -> str:
        fitted, held = self.samples
        lines = [
            f"{len(self.refitted)} of {counted(len(self.readers), 'reader')} refitted in {self.seconds:.1f} s, on "
            f"{counted(fitted, 'sample')}; {held:,} held back"
        ]
        if self.readers:
            before, after = (
                sum(getattr(repair, name) for repair in self.readers.values()) / len(self.readers)
                for name in ("before", "after")
            )
            lines.append(f"mean error of a reader on held-back samples {number(before)} -> {number(after)}")
        if self.output is not None:
            lines.append("error of the outputs there {} -> {}".format(*map(number, self.output)))
        if few := [name for name, repair in self.readers.items() if repair.rows < repair.unknowns]:
            lines.append(f"fewer rows than unknowns, which damping makes up for: {first_of(few, 3)}; more samples help")
        if self.new_biases:
            lines.append(f"biases made, which no optimizer holds yet: {first_of(self.new_biases, 3)}")
        if self.alone:
            lines.append(f"{counted(len(self.alone), 'reader')} left alone: {first_of(self.alone, 3)}")
        return "\n".join(lines)

    def table(self) -> str:
        """The sums, then a line for each reader: its errors, rows, damping and time, or why it was left alone."""
        rows = [("reader", "before", "after", "rows", "unknowns", "damping", "seconds", "note")]
        rows += [(name, *_cells(repair)) for name, repair in self.readers.items()]
        rows += [(name, "", "", "", "", "", "", why) for name, why in self.alone.items()]
        return f"{self}\n\n{columns(rows)}"


def _cells(repair: ReaderRepair) -> tuple[str, str, str, str, str, str, str]:
    notes = [repair.note] if repair.note else []
    notes += ["with its stream"] if repair.corrects_stream else []
    damping = "none" if repair.damping is None else f"{repair.damping:g}"
    counts = f"{repair.rows:,}", f"{repair.unknowns:,}"
    errors = number(repair.before), number(repair.after)
    return *errors, *counts, damping, f"{repair.seconds:.2f}", "; ".join(notes)
