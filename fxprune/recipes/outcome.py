"""What came of a recipe."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fxprune.reports import Readable, change, columns


@dataclass(repr=False)
class Outcome(Readable):
    """What a recipe's stages did; `str` says what is left, `table()` each stage.

    Attributes:
        recipe: as tables. versions: of everything that a result depends on.
        stages: by name, in order, what each did, with its `seconds`.
        failure: why the budget cannot be reached; None where it was.
    """

    recipe: dict[str, Any]
    versions: dict[str, str]
    stages: dict[str, dict[str, Any]]
    failure: str | None = None

    @property
    def macs(self) -> tuple[int, int] | None:
        """Multiply-accumulates of one sample, dense and left; None before channels are chosen."""
        return self._sizes("macs")

    @property
    def parameters(self) -> tuple[int, int] | None:
        """Parameters, dense and left; None before channels are chosen."""
        return self._sizes("parameters")

    def _sizes(self, name: str) -> tuple[int, int] | None:
        found = self.stages.get("finalize", {}).get("plan", {}).get(name)
        found = found or self.stages.get("choose", {}).get("channels", {}).get(name)
        return None if found is None else (int(found[0]), int(found[1]))

    def __str__(self) -> str:
        if self.failure is not None:
            return self.failure
        compared = self.stages.get("compare", {})
        lines = [
            f"{name} {change(*sizes)}"
            for name, sizes in (("MACs", self.macs), ("parameters", self.parameters))
            if sizes
        ]
        if "bytes" in compared:
            lines.append(f"bytes of the ONNX file {change(*compared['bytes'])}")
        if "latency" in compared:
            dense, pruned = (each["median_ms"] for each in compared["latency"])
            lines.append(f"latency {dense:.3f} -> {pruned:.3f} ms ({pruned / dense:.3f})")
        if "score" in compared:
            lines.append("score {:.4f} -> {:.4f}".format(*compared["score"]))
        if "agreement" in compared:
            judged = compared["judged"]
            where = "calibration samples" if judged["calibration"] else "samples"
            told = ", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in compared["agreement"].items())
            lines.append(f"outputs on {judged['samples']} {where}, against the dense network: {told}")
        written = self.stages.get("export", {}).get("own_class")
        if written is not None:
            files = ", ".join(written.get("files", []))
            lines.append(f"own class: {files}" if written["written"] else f"not in its own class: {written['why']}")
        return "\n".join(lines)

    def table(self) -> str:
        """What is left, then a line for each stage."""
        rows = [("stage", "seconds")] + [(name, f"{each['seconds']:.1f}") for name, each in self.stages.items()]
        return f"{self}\n\n{columns(rows)}"
