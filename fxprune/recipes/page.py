"""An outcome as one page of HTML that needs no network and no scripts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from fxprune.recipes.charts import can_draw, repair_chart, sensitivity_chart
from fxprune.recipes.outcome import Outcome
from fxprune.reports import number

_LISTED = 400  # ranges of kept indices that are written out


@dataclass(frozen=True)
class Figure:
    """One of the verdict's: before and after, as text, and the share that is left, None where it is no share."""

    name: str
    before: str
    after: str
    left: float | None = None


@dataclass(frozen=True)
class Layer:
    """A tensor of which entries went: its sizes before and after, what is kept along each axis, and the share left."""

    name: str
    before: str
    after: str
    kept: list[tuple[int, str]]
    left: float


def page(outcome: Outcome) -> str:
    """The page: the verdict, the layers, why something stayed, sensitivity, repair, the recipe and versions.

    Charts need the extra `report`; without it the tables say the same. Names are escaped.

    Args:
        outcome: of a run, finished or with a budget that was out of reach.

    Example:
        >>> Path("report.html").write_text(page(outcome), encoding="utf-8")
    """
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    template = environment.from_string(Path(__file__).with_name("report.html.jinja").read_text(encoding="utf-8"))
    stages = outcome.stages
    choice = stages.get("choose", {})
    curves = choice.get("sensitivity", {}).get("curves", [])
    readers = stages.get("repair", {}).get("repair", {}).get("readers", {})
    plan = stages.get("finalize", {}).get("plan", {})
    return template.render(
        failure=outcome.failure,
        model=outcome.recipe["model"]["source"],
        figures=list(_figures(outcome)),
        layers=list(_layers(plan)),
        groups=choice.get("channels", {}).get("removed", {}),
        stayed=choice.get("channels", {}).get("stayed", {}),
        dead=plan.get("stayed", []),
        curves=[(curve["name"], curve["kind"], curve["size"], _losses(curve)) for curve in curves],
        sensitivity_chart=_drawn(sensitivity_chart, curves),
        readers=[(name, number(each["before"]), number(each["after"]), each["note"]) for name, each in readers.items()],
        repair_chart=_drawn(repair_chart, readers),
        charts_missing=bool((curves or readers) and not can_draw()),
        own_class=stages.get("export", {}).get("own_class"),
        comparison=[
            (row["output"], "×".join(map(str, row["shape"])), number(row["max_abs"]), number(row["max_rel"]))
            for row in stages.get("export", {}).get("onnx", {}).get("comparison", {}).get("rows", [])
        ],
        seconds={name: stage["seconds"] for name, stage in stages.items()},
        recipe=list(_entries(outcome.recipe)),
        versions=outcome.versions,
    )


def _drawn(chart: Any, data: Any) -> Markup | None:
    """A chart, whose renderer escapes what it writes."""
    return Markup(chart(data)) if data and can_draw() else None


def _figures(outcome: Outcome) -> Iterator[Figure]:
    compared = outcome.stages.get("compare", {})
    counts = {"MACs of a sample": outcome.macs, "parameters": outcome.parameters}
    counts["bytes of the ONNX file"] = compared.get("bytes")
    for name, counted in counts.items():
        if counted:
            yield Figure(name, f"{counted[0]:,}", f"{counted[1]:,}", counted[1] / max(counted[0], 1))
    if "latency" in compared:
        dense, pruned = (each["median_ms"] for each in compared["latency"])
        yield Figure("latency in onnxruntime", f"{dense:.3f} ms", f"{pruned:.3f} ms", pruned / dense)
    if "score" in compared:
        dense_score, pruned_score = compared["score"]
        yield Figure("score", f"{dense_score:.4f}", f"{pruned_score:.4f}")
    if "agreement" in compared:
        judged, told = compared["judged"], compared["agreement"]
        where = f"{judged['samples']} {'calibration ' if judged['calibration'] else ''}samples"
        yield Figure(f"same class as the dense network, {where}", "1", f"{told['same_class']:.4f}")
        yield Figure(f"cosine to the dense outputs, {where}", "1", f"{told['cosine']:.4f}")


def _layers(plan: dict[str, Any]) -> Iterator[Layer]:
    for name, axes in plan.get("kept", {}).items():
        shape = plan["shapes"][name]
        kept = {int(axis): index for axis, index in axes.items() if index is not None}
        if not kept:
            continue
        after = [len(kept[axis]) if axis in kept else size for axis, size in enumerate(shape)]
        left = 1.0
        for axis, index in kept.items():
            left *= len(index) / max(shape[axis], 1)
        told = [(axis, ranges(index)) for axis, index in kept.items()]
        yield Layer(name, "×".join(map(str, shape)), "×".join(map(str, after)), told, left)


def ranges(index: Sequence[int]) -> str:
    """Ascending integers as ranges.

    Example:
        >>> ranges([0, 1, 2, 5, 7, 8])
        '0-2, 5, 7-8'
    """
    found: list[list[int]] = []
    for i in index:
        if found and found[-1][1] == i - 1:
            found[-1][1] = i
        else:
            found.append([i, i])
    told = [str(first) if first == last else f"{first}-{last}" for first, last in found[:_LISTED]]
    return ", ".join(told) + (", ..." if len(found) > _LISTED else "")


def _losses(curve: dict[str, Any]) -> str:
    pairs = zip(curve["counts"], curve["measured"], strict=True)
    return ", ".join(f"{number(float(loss))} at {count}" for count, loss in pairs if count)


def _entries(tables: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """The keys of a recipe that say something, with their values."""
    for name, value in tables.items():
        if isinstance(value, dict):
            yield from _entries(value, f"{prefix}{name}.")
        elif value not in (None, []):
            yield f"{prefix}{name}", str(value)
