"""What a choice of channels masked, and what it leaves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fxprune.prune.latency.table import LatencyTable
from fxprune.reports import Readable, change, columns, counted, first_of, plain


@dataclass(frozen=True, repr=False)
class ChannelReport(Readable):
    """What `fxprune.prune.channels` masked; `str` has the sums, `table()` every group.

    Attributes:
        removed: by group, "name (kind)" -> (units masked, units in all).
        stayed: by group that was not considered, why.
        macs, parameters: (dense, as `finalize` leaves it by default); MACs of one sample.
        speedup: measured in onnxruntime, None where it was not asked for.
        sample: what MACs are counted for, "one sample of 3x224x224".
        budget: what was asked for: "amount", "macs", "parameters" or "speedup"; of several the one that binds.
        latencies: what losses were weighed by, where that is time; None where it is MACs, or nothing.
        blocks: the whole blocks that are masked, by their names. why_blocks: what channels alone came to.
        asked: by budget, what was asked for; `got` is what came of it. Reports of the same masks are equal.
    """

    removed: dict[str, tuple[int, int]]
    stayed: dict[str, str]
    macs: tuple[int, int]
    parameters: tuple[int, int]
    speedup: float | None = None
    sample: str = ""
    budget: str = "amount"
    latencies: LatencyTable | None = None
    asked: dict[str, float] = field(default_factory=dict, compare=False)
    blocks: tuple[str, ...] = ()
    why_blocks: str = field(default="", compare=False)

    @property
    def gone(self) -> float:
        """The share of the budget's own unit that is gone: units for "amount", MACs for "speedup"."""
        if self.budget == "amount":
            return self._masked / max(self._units, 1)
        before, after = self.parameters if self.budget == "parameters" else self.macs
        return 1 - after / max(before, 1)

    @property
    def got(self) -> dict[str, float]:
        """By budget what came of it, as it was asked for: a share, a count, or how many times faster."""
        found: dict[str, float] = {}
        for name, value in self.asked.items():
            if name == "speedup":
                found[name] = self.speedup or 1.0
                continue
            whole, part = (self._units, self._masked) if name == "amount" else getattr(self, name)
            found[name] = part / max(whole, 1) if isinstance(value, float) else part
        return found

    @property
    def _masked(self) -> int:
        return sum(masked for masked, _ in self.removed.values())

    @property
    def _units(self) -> int:
        return sum(units for _, units in self.removed.values())

    def __str__(self) -> str:
        sample = f", for {self.sample}" if self.sample else ""
        lines = [f"MACs {change(*self.macs)}, parameters {change(*self.parameters)}{sample}"]
        if self.blocks:
            why = f", since by channels {self.why_blocks}" if self.why_blocks else ""
            lines.append(f"whole blocks masked: {', '.join(self.blocks)}{why}")
        lines += [f"{self.speedup:.2f} times faster, as measured"] if self.speedup else []
        if len(self.asked) > 1:
            got = self.got
            each = [f"{name}={value} ({_short(got[name])})" for name, value in self.asked.items()]
            lines.append(f"budgets, and what is left or reached: {', '.join(each)}; {self.budget} binds")
        lines += [f"prices: {str(self.latencies).partition(chr(10))[0]}"] if self.latencies else []
        lines.append(
            f"{self._masked:,} of {counted(self._units, 'unit')} of {counted(len(self.removed), 'group')} masked"
        )
        if self.stayed:
            lines[-1] += f"; {counted(len(self.stayed), 'group')} left alone: {first_of(self.stayed, 3)}"
        return "\n".join(lines)

    def table(self) -> str:
        """The sums, then a line for each group: units masked, or why it was left alone."""
        rows = [("group", "masked", "units", "why it stays")]
        rows += [(group, str(masked), str(units), "") for group, (masked, units) in self.removed.items()]
        rows += [(group, "", "", why) for group, why in self.stayed.items()]
        return f"{self}\n\n{columns(rows)}"

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> ChannelReport:
        """The report that `to_dict` gave.

        Raises:
            AttributeError, LookupError, TypeError, ValueError: it is another dictionary.
        """
        given = {name: value for name, value in found.items() if name not in ("gone", "got")}
        for name in ("macs", "parameters"):
            before, after = given[name]
            given[name] = before, after
        given["removed"] = {group: (masked, units) for group, (masked, units) in given["removed"].items()}
        given["blocks"] = tuple(given.get("blocks", ()))
        if given.get("latencies") is not None:
            given["latencies"] = LatencyTable.from_dict(given["latencies"])
        return cls(**given)

    def to_dict(self) -> dict[str, Any]:
        """The report in JSON's types; `speedup` is how many times faster, `gone` a share of what the budget counts."""
        found: dict[str, Any] = plain(vars(self))
        return found | {"gone": self.gone, "got": self.got}


def _short(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.3f}"
