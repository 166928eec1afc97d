"""Charts of a report as SVG, by Vega-Lite (Satyanarayan et al., 2017, https://doi.org/10.1109/TVCG.2016.2599030)."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

_WIDTH = 380  # with its labels a chart is as wide as a phone lets one read
_FONT = 13
_ROUNDING = 1e-9  # smaller errors are none, and would take up the scale
_MOST_READERS = 24
_MOST = 7  # lines that are told apart by colour and dash
# Okabe and Ito's colours, that people with any colour vision tell apart
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#888888")
_DASHES = ([1, 0], [6, 3], [2, 2], [8, 3, 2, 3], [10, 4], [4, 2, 1, 2], [3, 5])
_POWERS = {"format": ".0e", "tickCount": 5}
_TEXT = "currentColor"  # of the page, light or dark
# how an anchor of the page is linked to: Vega puts an address of its own before it, and every point would be a stop of
# the Tab key, where the tables below the charts say the same
_LINK = re.compile(r'<a xlink:href="[^"#]*#(\w+)"')


def can_draw() -> bool:
    """Whether Vega-Lite's renderer is installed, as the extra `report` does."""
    return importlib.util.find_spec("vl_convert") is not None


def sensitivity_chart(curves: Sequence[dict[str, Any]], anchors: Mapping[str, str]) -> str | None:
    """What the output loses with a share of a group's units, for the groups that lose most, as SVG; None if none.

    Args:
        curves: as `fxprune.Sensitivity.to_dict` has them: `name`, `size`, `counts` and `measured`.
        anchors: by name of a curve, the anchor of the page that its line leads to.

    Example:
        >>> sensitivity_chart(sensitivity.to_dict()["curves"], {"conv1.weight": "d1"})
        '<svg ...'
    """
    by_loss = sorted(curves, key=lambda curve: -max(curve["measured"], default=0.0))[:_MOST]
    names = labels([curve["name"] for curve in by_loss])
    rows = [
        {
            "group": name,
            "gone": count / curve["size"],
            "loss": max(float(loss), _ROUNDING),
            **_leading_to(curve["name"], anchors),
        }
        for name, curve in zip(names, by_loss, strict=True)
        for count, loss in zip(curve["counts"], curve["measured"], strict=True)
        if count
    ]
    if all(row["loss"] <= _ROUNDING for row in rows):
        return None
    scale = {"domain": names, "range": list(_COLOURS[: len(names)])}
    dashes = {"domain": names, "range": list(_DASHES[: len(names)])}
    legend = {"title": "group", "labelLimit": 240, "columns": 2, "symbolType": "stroke", "symbolSize": 400}
    return _svg(
        {
            "mark": {"type": "line", "point": {"size": 60}, "strokeWidth": 2},
            "data": {"values": rows},
            "encoding": {
                "x": {
                    "field": "gone", "type": "quantitative", "title": "share of the units gone",
                    "axis": {"format": "%"},
                },
                "y": {
                    "field": "loss", "type": "quantitative", "title": "lost of the output", "scale": {"type": "log"},
                    "axis": _POWERS,
                },
                "color": {"field": "group", "type": "nominal", "scale": scale, "legend": legend},
                "strokeDash": {"field": "group", "type": "nominal", "scale": dashes, "legend": legend},
                **_LEADS,
            },
        }
    )  # fmt: skip


def repair_chart(readers: dict[str, dict[str, Any]], anchors: Mapping[str, str]) -> str | None:
    """The error of each reader before and after it was refitted, largest first, as SVG; None without errors.

    Args:
        readers: as `fxprune.ReconstructionReport.to_dict` has them: `before` and `after`.
        anchors: by name of a reader, the anchor of the page that its points lead to.

    Example:
        >>> repair_chart(report.to_dict()["readers"], {"conv1.weight": "d1"})
        '<svg ...'
    """
    wrong = [(name, reader) for name, reader in readers.items() if reader["before"] > _ROUNDING]
    if not wrong:
        return None
    largest = sorted(wrong, key=lambda item: -item[1]["before"])[:_MOST_READERS]
    rows = [
        {"reader": label, "when": when, "error": max(float(reader[when]), _ROUNDING), **_leading_to(name, anchors)}
        for label, (name, reader) in zip(labels([name for name, _ in largest]), largest, strict=True)
        for when in ("before", "after")
    ]
    return _svg(
        {
            "width": _WIDTH - 150,
            "mark": {"type": "point", "filled": True, "size": 70, "opacity": 1},
            "data": {"values": rows},
            "encoding": {
                "y": {"field": "reader", "type": "nominal", "sort": None, "title": None, "axis": {"labelLimit": 180}},
                "x": {"field": "error", "type": "quantitative", "title": "error, relative", "scale": {"type": "log"},
                      "axis": _POWERS},
                "color": {"field": "when", "type": "nominal", "title": "repair",
                          "scale": {"domain": ["before", "after"], "range": list(_COLOURS[1::-1])}},
                "shape": {"field": "when", "type": "nominal", "title": "repair",
                          "scale": {"domain": ["before", "after"], "range": ["square", "circle"]}},
                **_LEADS,
            },
        }
    )  # fmt: skip


def budget_chart(budgets: Sequence[dict[str, Any]], anchors: Mapping[str, str]) -> str | None:
    """The estimated loss by the share of the MACs that is left, and the chosen budget, as SVG; None without losses.

    Args:
        budgets: each with its `macs`, its `loss`, and whether it is the one `chosen`.
        anchors: by `macs` as text, of three digits, the anchor of the page that its point leads to.

    Example:
        >>> budget_chart([{"macs": 0.5, "loss": 0.01, "chosen": True}], {"0.500": "b0"})
        '<svg ...'
    """
    rows = [
        {
            "macs": point["macs"],
            "loss": max(float(point["loss"]), _ROUNDING),
            "budget": "chosen" if point["chosen"] else "other",
            **_leading_to(f"{point['macs']:.3f}", anchors),
        }
        for point in budgets
    ]
    if all(row["loss"] <= _ROUNDING for row in rows):
        return None
    position = {
        "x": {"field": "macs", "type": "quantitative", "title": "share of the MACs left",
              "axis": {"format": "%", "tickCount": 5}, "scale": {"reverse": True, "zero": False}},
        "y": {"field": "loss", "type": "quantitative", "title": "lost, estimated", "scale": {"type": "log"},
              "axis": _POWERS},
    }  # fmt: skip
    domain = ["chosen", "other"]
    marks = {
        "color": {"field": "budget", "type": "nominal", "title": "budget",
                  "scale": {"domain": domain, "range": list(_COLOURS[1::-1])}},
        "shape": {"field": "budget", "type": "nominal", "title": "budget",
                  "scale": {"domain": domain, "range": ["diamond", "circle"]}},
        "size": {"field": "budget", "type": "nominal", "title": "budget",
                 "scale": {"domain": domain, "range": [220, 60]}},
    }  # fmt: skip
    line = {"mark": {"type": "line", "strokeWidth": 2, "color": _COLOURS[0]}, "encoding": position}
    points = {"mark": {"type": "point", "filled": True, "opacity": 1}, "encoding": position | marks | _LEADS}
    return _svg({"data": {"values": rows}, "layer": [line, points]})


_LEADS = {
    "href": {"condition": {"test": "datum.anchor", "field": "anchor"}},
    "description": {"field": "leads", "type": "nominal"},
}


def _leading_to(name: str, anchors: Mapping[str, str]) -> dict[str, str]:
    """Where a mark leads to, with the name that it is read by."""
    return {"leads": name} | ({"anchor": f"#{anchors[name]}"} if name in anchors else {})


def _svg(spec: dict[str, Any]) -> str:
    import vl_convert

    sizes = {"labelFontSize": _FONT, "titleFontSize": _FONT}
    text = sizes | {
        "labelColor": _TEXT,
        "titleColor": _TEXT,
        "domainColor": _TEXT,
        "tickColor": _TEXT,
        "gridColor": "#8884",
    }
    config = {
        "axis": text, "legend": sizes | {"labelColor": _TEXT, "titleColor": _TEXT, "orient": "bottom"},
        "view": {"stroke": None}, "font": "sans-serif",
    }  # fmt: skip
    whole = {"background": None, "width": _WIDTH, "config": config} | spec
    return _LINK.sub(r'<a href="#\1" tabindex="-1"', vl_convert.vegalite_to_svg(whole))


def labels(names: Sequence[str], most: int = 26) -> list[str]:
    """Names short enough for an axis, and still different where they were: ends that tell them apart.

    Example:
        >>> labels(["net.a.conv.weight", "net.b.conv.weight"])
        ['a.conv', 'b.conv']
    """
    cut = [name.removesuffix(".weight") for name in names]
    told = cut if len(set(cut)) == len(set(names)) else names
    found: list[str] = []
    for name in told:
        others = [other for other in told if other != name]
        label = next((end for end in _ends(name) if not any(f".{other}".endswith(f".{end}") for other in others)), name)
        if len(label) > most:
            label = f"{label[: most // 3]}...{label[3 - most + most // 3 :]}"
        same = sum(other == label or other.startswith(f"{label} #") for other in found)
        found.append(f"{label} #{same + 1}" if same else label)
    return found


def _ends(name: str) -> Iterator[str]:
    """The last two parts of a dotted name, its last three, ..., the whole."""
    parts = name.split(".")
    for count in range(2, len(parts)):
        yield ".".join(parts[-count:])
    yield name
