"""An outcome as one page of HTML that needs no network and no scripts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape

from fxprune.recipes.charts import budget_chart, can_draw, repair_chart, sensitivity_chart
from fxprune.recipes.layers import all_tensors, kept_indices, picture, ranges
from fxprune.recipes.outcome import Outcome
from fxprune.reports import number

_SHORT = 60  # characters of kept indices, up to which they are written out again


@dataclass(frozen=True)
class Figure:
    """One of the verdict's: before and after, as text, and the share that is left, None where it is no share."""

    name: str
    before: str
    after: str
    left: float | None = None


@dataclass(frozen=True)
class Operator:
    """What an operator takes in onnxruntime, before and after: nodes and milliseconds, and its bars in percent."""

    name: str
    nodes: tuple[int, int]
    milliseconds: tuple[float, float]
    bars: tuple[float, float]


class Indices:
    """Sets of kept indices, written out where they come first, and linked from there on."""

    def __init__(self) -> None:
        self._first: dict[str, tuple[str, str]] = {}

    def told(self, owner: str, axis: int, text: str) -> tuple[str, str | None, str | None]:
        """The indices as text, and the anchor of this place; or the name of the place to look at, and its anchor."""
        if len(text) <= _SHORT:
            return text, None, None
        if text in self._first:
            name, anchor = self._first[text]
            return name, None, anchor
        anchor = f"k{len(self._first)}"
        self._first[text] = f"{owner}, axis {axis}", anchor
        return text, anchor, None


def page(outcome: Outcome) -> str:
    """The page: the verdict, the network as a picture, sensitivity, budgets, repair, latency, the recipe and versions.

    Charts need the extra `report`; without it the tables say the same. Names are escaped.

    Args:
        outcome: of a run, finished or with a budget that was out of reach.

    Example:
        >>> Path("report.html").write_text(page(outcome), encoding="utf-8")
    """
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters["dotted"] = dotted
    template = environment.from_string(Path(__file__).with_name("report.html.jinja").read_text(encoding="utf-8"))
    stages = outcome.stages
    choice = stages.get("choose", {})
    curves = choice.get("sensitivity", {}).get("curves", [])
    readers = stages.get("repair", {}).get("repair", {}).get("readers", {})
    plan = stages.get("finalize", {}).get("plan", {})
    comparison = stages.get("export", {}).get("onnx", {}).get("comparison") or {}
    budgets = choice.get("budgets", [])
    drawn = picture(outcome)
    anchors = {} if drawn is None else drawn.anchors
    shares = {f"{point['macs']:.3f}": f"b{place}" for place, point in enumerate(budgets)}
    return template.render(
        failure=outcome.failure,
        model=outcome.recipe["model"]["source"],
        figures=list(_figures(outcome)),
        picture=drawn,
        anchors=anchors,
        indices=Indices(),
        tensors=[(*told, _kept(plan, told[0])) for told in all_tensors(plan)],
        groups=choice.get("channels", {}).get("removed", {}),
        stayed=choice.get("channels", {}).get("stayed", {}),
        dead=plan.get("stayed", []),
        curves=[(curve["name"], curve["kind"], curve["size"], _losses(curve)) for curve in curves],
        sensitivity_chart=_drawn(sensitivity_chart, curves, anchors),
        readers=[(name, number(each["before"]), number(each["after"]), each["note"]) for name, each in readers.items()],
        repair_chart=_drawn(repair_chart, readers, anchors),
        charts_missing=bool((curves or readers or budgets) and not can_draw()),
        budgets=budgets,
        budget_chart=_drawn(budget_chart, budgets, shares),
        operators=list(_operators(stages.get("compare", {}).get("operators"))),
        own_class=stages.get("export", {}).get("own_class"),
        comparison=[
            (row["output"], "×".join(map(str, row["shape"])), number(row["max_abs"]), number(row["max_rel"]))
            for row in comparison.get("rows", [])
        ],
        agrees=comparison.get("ok"),
        difference=comparison.get("first_divergence"),
        seconds={name: stage["seconds"] for name, stage in stages.items()},
        recipe=list(_entries(outcome.recipe)),
        versions=outcome.versions,
    )


def dotted(name: str) -> Markup:
    """A name that may be broken after its dots.

    Example:
        >>> dotted("a.<b>")
        Markup('a.<wbr>&lt;b&gt;')
    """
    return Markup(".<wbr>").join(escape(part) for part in name.split("."))


def _drawn(chart: Any, data: Any, anchors: dict[str, str]) -> Markup | None:
    """A chart, whose renderer escapes what it writes; None where there is nothing to see."""
    drawn = chart(data, anchors) if data and can_draw() else None
    return None if drawn is None else Markup(drawn)


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


def _kept(plan: dict[str, Any], name: str) -> list[tuple[int, str]]:
    return [(axis, ranges(index)) for axis, index in kept_indices(name, plan).items()]


def _operators(profiles: list[dict[str, Any]] | None) -> Iterator[Operator]:
    """The operators of the dense file and of the pruned one, what takes longest first."""
    if not profiles:
        return
    dense, pruned = (profile["operators"] for profile in profiles)
    none = {"nodes": 0, "ms": 0.0}
    pairs = {name: (dense.get(name, none), pruned.get(name, none)) for name in {**dense, **pruned}}
    longest = max((each["ms"] for pair in pairs.values() for each in pair), default=0.0) or 1.0
    for name, (before, after) in sorted(pairs.items(), key=lambda item: -max(each["ms"] for each in item[1])):
        times = before["ms"], after["ms"]
        bars = 100 * times[0] / longest, 100 * times[1] / longest
        yield Operator(name, (before["nodes"], after["nodes"]), times, bars)


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
