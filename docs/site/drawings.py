"""The drawings of the concepts page, as SVG: `python docs/site/drawings.py` writes them into docs/drawings.

Each is drawn from numbers that plain Python computes, so that every machine writes the same bytes.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from xml.sax.saxutils import escape

FOLDER = Path(__file__).parents[1] / "drawings"
# Okabe and Ito's colours, which the colour-blind tell apart: https://jfly.uni-koeln.de/color/
LIVE, DEAD, OTHER, THIRD = "#0072b2", "#d55e00", "#009e73", "#cc79a7"
_STYLE = """
.panel { fill: #f7f9f9 } .ink { fill: #20302f } .line { stroke: #20302f; fill: none } .faint { fill: #e3e9e8 }
text { font-family: system-ui, sans-serif; font-size: 13px } .small { font-size: 11px } .mono { font-family: monospace }
@media (prefers-color-scheme: dark) {
  .panel { fill: #262b33 } .ink { fill: #e4e9ea } .line { stroke: #e4e9ea } .faint { fill: #3a424d }
}
"""


@dataclass
class Picture:
    """An SVG that grows by shapes; sizes are in pixels.

    Attributes:
        title: what a screen reader says. width, height: of the picture. parts: the shapes so far.
    """

    title: str
    width: int
    height: int
    parts: list[str] = field(default_factory=list)

    def cell(self, x: float, y: float, size: float, fill: str | None) -> None:
        """A square of a matrix; one without a fill is empty."""
        colour = f'fill="{fill}"' if fill else 'class="faint"'
        self.parts.append(f'<rect x="{x:g}" y="{y:g}" width="{size - 2:g}" height="{size - 2:g}" rx="2" {colour}/>')

    def box(self, x: float, y: float, width: float, text: str, fill: str | None = None) -> None:
        colour = f'fill="{fill}"' if fill else 'class="faint"'
        self.parts.append(f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="34" rx="5" {colour}/>')
        ink = 'fill="#ffffff"' if fill else 'class="ink"'
        self.parts.append(
            f'<text x="{x + width / 2:g}" y="{y + 22:g}" text-anchor="middle" {ink}>{escape(text)}</text>'
        )

    def text(self, x: float, y: float, text: str, style: str = "ink", anchor: str = "start") -> None:
        self.parts.append(f'<text x="{x:g}" y="{y:g}" class="{style}" text-anchor="{anchor}">{escape(text)}</text>')

    def arrow(self, x: float, y: float, to_x: float, to_y: float) -> None:
        self.parts.append(
            f'<path d="M{x:g} {y:g} L{to_x:g} {to_y:g}" class="line" stroke-width="1.5" marker-end="url(#tip)"/>'
        )

    def line(self, points: Sequence[tuple[float, float]], colour: str, dashed: bool = False) -> None:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        dashes = ' stroke-dasharray="5 4"' if dashed else ""
        self.parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"{dashes}/>')

    def dot(self, x: float, y: float, colour: str) -> None:
        self.parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}"/>')

    def svg(self) -> str:
        tip = '<path d="M0 0 L8 4 L0 8 z" class="ink"/>'
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" role="img" '
            f'width="{self.width}" height="{self.height}">\n'
            f"<title>{escape(self.title)}</title>\n<style>{_STYLE}</style>\n"
            '<defs><marker id="tip" markerWidth="9" markerHeight="9" refX="7" refY="4" orient="auto">'
            f"{tip}</marker></defs>\n"
            f'<rect class="panel" width="{self.width}" height="{self.height}" rx="8"/>\n'
        )
        return head + "\n".join(self.parts) + "\n</svg>\n"


def masks() -> Picture:
    """A weight, its mask and their product: entries, whole rows, and two of every four."""
    picture = Picture("A weight times a mask, for three kinds of masks", 640, 212)
    generator = random.Random(3)
    weight = [[generator.uniform(0.15, 1.0) for _ in range(8)] for _ in range(6)]
    flat = sorted(value for row in weight for value in row)
    rows = sorted(range(6), key=lambda index: sum(value * value for value in weight[index]))[:3]

    def keeps_pair(row: list[float], column: int) -> bool:
        four = row[column // 4 * 4 : column // 4 * 4 + 4]
        return row[column] in sorted(four)[2:]

    kinds = [
        ("half of the entries", [[value > flat[len(flat) // 2 - 1] for value in row] for row in weight]),
        ("half of the rows", [[index not in rows] * 8 for index in range(6)]),
        ("two of every four (2:4)", [[keeps_pair(row, column) for column in range(8)] for row in weight]),
    ]
    for number, (name, mask) in enumerate(kinds):
        left = 24 + number * 204
        picture.text(left, 30, name)
        for index, row in enumerate(weight):
            for column, value in enumerate(row):
                x, y = left + column * 22, 44 + index * 22
                picture.cell(x, y, 22, None)
                if mask[index][column]:
                    # the larger an entry, the larger its square
                    size = 6 + 14 * value
                    picture.cell(x + (20 - size) / 2, y + (20 - size) / 2, size + 2, LIVE)
        zeros = sum(not kept for row in mask for kept in row)
        picture.text(left, 196, f"{zeros} of 48 are zero", "ink small")
    return picture


def groups() -> Picture:
    """Channels that an addition ties together."""
    picture = Picture("Layers whose outputs are added share their channels", 640, 156)
    columns = [(40, "conv1"), (190, "conv2"), (340, "conv3"), (520, "linear")]
    for x, name in columns:
        picture.box(x, 40, 88, name)
    for (x, _), (after, _) in itertools.pairwise(columns):
        picture.arrow(x + 88, 57, after - 4, 57)
    picture.parts.append(
        '<path d="M150 57 C150 6 470 6 470 50" class="line" stroke-width="1.5" marker-end="url(#tip)"/>'
    )
    picture.text(463, 80, "+", "ink")
    shared, inner = [True, False, True, True, False], [True, True, False, True]
    for x, kept, name in [(48, shared, "a"), (198, inner, "b"), (348, shared, "a")]:
        for index, alive in enumerate(kept):
            picture.cell(x + index * 16, 104, 16, (OTHER if name == "a" else LIVE) if alive else DEAD)
        picture.text(x, 138, f"rows of group {name}", "ink small")
    for index, alive in enumerate(shared):
        picture.cell(528 + index * 16, 104, 16, OTHER if alive else DEAD)
    picture.text(520, 138, "columns of group a", "ink small")
    return picture


def exactness() -> Picture:
    """A dead channel that still gives a constant."""
    picture = Picture("The constant of a dead channel moves into the next bias", 640, 188)
    picture.text(24, 30, "masked")
    picture.box(24, 44, 150, "row 2 of W is zero", DEAD)
    picture.arrow(174, 61, 212, 61)
    picture.box(216, 44, 170, "ReLU(0 · x + b₂) = c")
    picture.arrow(386, 61, 424, 61)
    picture.box(428, 44, 180, "V · (…, c, …) + d")
    picture.text(24, 116, "finalized")
    picture.box(24, 130, 150, "row 2 is gone", LIVE)
    picture.arrow(174, 147, 212, 147)
    picture.box(216, 130, 170, "ReLU of the others")
    picture.arrow(386, 147, 424, 147)
    picture.box(428, 130, 180, "V' · (…) + (d + c · v₂)", LIVE)
    return picture


def repair() -> Picture:
    """A reader that lost one of two inputs, before and after least squares."""
    picture = Picture("What is left is refitted to the outputs of the dense network", 640, 262)
    generator = random.Random(5)
    points = []
    for _ in range(40):
        kept = generator.gauss(0, 1)
        gone = 0.8 * kept + 0.35 * generator.gauss(0, 1)
        points.append((kept, 0.5 * kept + 0.9 * gone))
    fitted = sum(x * y for x, y in points) / sum(x * x for x, _ in points)
    errors = [sum((y - slope * x) ** 2 for x, y in points) / sum(y * y for _, y in points) for slope in (0.5, fitted)]
    for number, (name, slope) in enumerate([("masked only", 0.5), ("repaired", fitted)]):
        left = 30 + number * 305
        middle_x, middle_y = left + 140, 130
        picture.text(left, 30, name)
        picture.arrow(left, middle_y, left + 276, middle_y)
        picture.arrow(middle_x, 222, middle_x, 40)
        for x, y in points:
            picture.dot(middle_x + 50 * x, middle_y - 32 * y, LIVE)
        ends = [(middle_x + 50 * x, middle_y - 32 * slope * x) for x in (-2.2, 2.2)]
        picture.line(ends, DEAD if number == 0 else OTHER, dashed=number == 0)
        picture.text(
            left, 246, f"output = {slope:.2f} · what is left; of the output {errors[number]:.2f} is lost", "ink small"
        )
    return picture


DRAWINGS = (masks, groups, exactness, repair)


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for drawing in DRAWINGS:
        (FOLDER / f"{drawing.__name__}.svg").write_text(drawing().svg(), encoding="utf-8")


if __name__ == "__main__":
    main()
