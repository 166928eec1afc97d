"""What the demo measured: records, judgement, tables."""

from __future__ import annotations

import io
from dataclasses import asdict, dataclass, field
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from fxprune.reports import Readable, counted

POINT = 0.01  # how far below the dense accuracy a pruned one may be
FLOOR = 0.95  # below it the dense network has not learned, and a comparison with it says nothing
COSTS = {  # the stage and the column that say them
    "MACs": ("finalized", "macs"), "parameters": ("finalized", "parameters"),
    "file size": ("onnx", "file_bytes"), "latency": ("onnx", "latency_ms"),
}  # fmt: skip


@dataclass(frozen=True)
class Stage:
    """A row of the table: `variant` at `stage` (eager, traced, finalized, onnx); None where a column does not apply.

    Attributes:
        accuracy: a fraction of the test images. parameters, zeros: counts of entries. macs: multiply-accumulates of
            one image. file_bytes, latency_ms (median, one thread, 64 images): of the ONNX file.
        max_difference: the largest absolute difference of a logit from the eager stage, over the test images.
    """

    variant: str
    stage: str
    accuracy: float
    parameters: int | None = None
    zeros: int | None = None
    macs: int | None = None
    file_bytes: int | None = None
    latency_ms: float | None = None
    max_difference: float | None = None


@dataclass(frozen=True)
class Milestone:
    """What a variant of the trained dense network computes after a step.

    Attributes:
        variant, after: its name, and the step's. accuracy: of the finalized module, a fraction of the test images.
        macs: multiply-accumulates of one image that it takes.
    """

    variant: str
    after: str
    accuracy: float
    macs: int


@dataclass(repr=False)
class Result(Readable):
    """What the demo measured; without `failures` it succeeded.

    Attributes:
        milestones: of the variants that start from the trained dense network, before they are trained on and after.
        layers: the zeros of each weight by variant, and its size. ratios: what is left of the dense network's costs.
    """

    seed: int
    epochs: int
    output: str
    stages: list[Stage] = field(default_factory=list)
    milestones: list[Milestone] = field(default_factory=list)
    layers: dict[str, dict[str, int]] = field(default_factory=dict)
    ratios: dict[str, dict[str, float]] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def variants(self) -> list[str]:
        """The names of the variants, in the order in which they ran."""
        return list(dict.fromkeys(stage.variant for stage in self.stages))

    def __str__(self) -> str:
        outcome = "; ".join(self.failures) or "all stages agree"
        lines = [f"{counted(len(self.variants), 'variant')} in {self.output}, {self.seconds:.0f} s: {outcome}"]
        lines += [f"{each.variant}, {each.after}: accuracy {each.accuracy:.2%}" for each in self.milestones]
        for variant, left in self.ratios.items():
            lines.append(f"{variant}: " + ", ".join(f"{value:.2f} of the {what}" for what, value in left.items()))
        return "\n".join(lines)

    def table(self) -> str:
        """What `show` prints, as text."""
        text = io.StringIO()
        self.show(Console(file=text, width=120))
        return text.getvalue()

    def to_dict(self) -> dict[str, Any]:
        """The result as plain JSON types."""
        return {"ok": not self.failures, **asdict(self)}

    def show(self, console: Console) -> None:
        """Print the tables, the notes and where the files are."""
        console.print(self._stage_table(), "", sep="\n")
        if self.milestones:
            console.print(self._milestone_table(), "", sep="\n")
        console.print(self._layer_table(), "", sep="\n")
        for variant, left in self.ratios.items():
            text = ", ".join(f"{value:.2f} of the {what}" for what, value in left.items())
            console.print(f"{variant}, against dense: {text}.", highlight=False, soft_wrap=True)
        for line in (*self.notes, f"The files are in {self.output}. This took {self.seconds:.0f} s."):
            console.print(line, highlight=False, markup=False, soft_wrap=True)

    def _stage_table(self) -> Table:
        heads = "", "", "accuracy", "params", "zeros", "MACs", "kB", "ms", "diff"
        table = Table(*heads, box=box.SIMPLE, show_edge=False, padding=(0, 1, 0, 0))
        for column in table.columns[2:]:
            column.justify = "right"
        for stage in self.stages:
            share = None if stage.zeros is None or not stage.parameters else stage.zeros / stage.parameters
            table.add_row(
                stage.variant,
                stage.stage,
                _cell("{:.2%}", stage.accuracy),
                _cell("{:,}", stage.parameters),
                _cell("{:.1%}", share),
                _cell("{:.1f}M", stage.macs, 1e6),
                _cell("{:.0f}", stage.file_bytes, 1e3),
                _cell("{:.3f}", stage.latency_ms),
                _cell("{:.2g}", stage.max_difference),
                end_section=stage.stage == "onnx",
            )
        return table

    def _milestone_table(self) -> Table:
        """The way of the trained dense network; the last step's is the file's latency."""
        heads = "", "step", "accuracy", "MACs", "ms"
        table = Table(*heads, box=box.SIMPLE, show_edge=False, padding=(0, 1, 0, 0))
        for column in table.columns[2:]:
            column.justify = "right"
        rows = {(stage.variant, stage.stage): stage for stage in self.stages}
        dense = self.stages[0]
        begin = Milestone(dense.variant, "trained", dense.accuracy, dense.macs or 0)
        ways = [begin, *self.milestones]
        for way, later in zip(ways, [*ways[1:], None], strict=True):
            is_last = later is None or later.variant != way.variant
            file = rows.get((way.variant, "onnx")) if is_last else None
            table.add_row(
                way.variant,
                way.after,
                _cell("{:.2%}", way.accuracy),
                _cell("{:.1f}M", way.macs, 1e6),
                _cell("{:.3f}", file.latency_ms if file else None),
            )
        return table

    def _layer_table(self) -> Table:
        table = Table("zeros", *self.variants, "of", box=box.SIMPLE, show_edge=False)
        for column in table.columns[1:]:
            column.justify = "right"
        for name, counts in self.layers.items():
            table.add_row(name, *(_cell("{:,}", counts.get(key)) for key in (*self.variants, "size")))
        return table


def _cell(form: str, value: float | None, unit: float | None = None) -> str:
    if value is None:
        return ""
    return form.format(value if unit is None else value / unit)


def cost_ratios(stages: list[Stage]) -> dict[str, dict[str, float]]:
    """What is left of the dense network's costs, by variant and cost, as far as both are known."""
    rows = {(stage.variant, stage.stage): asdict(stage) for stage in stages}
    ratios: dict[str, dict[str, float]] = {}
    for variant in dict.fromkeys(stage.variant for stage in stages):
        if variant == "dense":
            continue
        ratios[variant] = {}
        for what, (stage, column) in COSTS.items():
            own, dense = (rows.get((name, stage), {}).get(column) for name in (variant, "dense"))
            if own and dense:
                ratios[variant][what] = own / dense
    return ratios


def accuracy_failures(stages: list[Stage]) -> list[str]:
    """What is wrong with the accuracies; the first stage is the dense eager one."""
    dense = stages[0].accuracy
    failures = []
    if dense < FLOOR:
        failures.append(f"accuracy: dense has {dense:.2%}, below {FLOOR:.0%}: train for more epochs")
    for name in dict.fromkeys(stage.variant for stage in stages if stage.variant != "dense"):
        worst = min((stage for stage in stages if stage.variant == name), key=lambda stage: stage.accuracy)
        if worst.accuracy < dense - POINT:
            found = f"{worst.accuracy:.2%} ({worst.stage}), more than a point below the dense {dense:.2%}"
            failures.append(f"accuracy: {name} has {found}")
    return failures
