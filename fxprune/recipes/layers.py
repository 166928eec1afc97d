"""The layers of a network as rows of a picture: what they read, how wide they were and are, what is known of each."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from markupsafe import Markup

from fxprune.recipes.outcome import Outcome
from fxprune.reports import number

_MOST_ROWS = 1000
_MOST_LANES = 9  # further connections share the last one
_STEP, _NODE, _TURN = 12, 20, 36  # pixels: between lanes, from the top to a node, from the top to the end of a turn
_PICTURED = 128  # channels along an axis of what counts as a small layer
_SHARES = (0.2, 0.4, 0.6, 0.8, 0.999)
_RECURRENT = ("lstm", "gru", "rnn_tanh", "rnn_relu")


@dataclass(frozen=True)
class Tensor:
    """A tensor of a layer: its sizes before and after, and the indices that are kept along each axis that lost some."""

    name: str
    before: str
    after: str
    kept: list[tuple[int, str]]
    picture: Markup | None


@dataclass
class Row:
    """A row of the picture.

    Attributes:
        place: in the order of the run. name, kind: of the layer. reads: (place, name) of what it takes.
        lanes: its part of the drawing of connections.
        width: (before, after) of the channels that it gives; None where it has no weights.
        frame: how long the bar's frame is, in percent. left: the share of the entries of its weights. shade: 0 to 5.
        tensors: its weights. notes: (what, text) of all that is known of it.
    """

    place: int
    name: str
    kind: str
    reads: list[tuple[int, str]]
    lanes: Markup
    width: tuple[int, int] | None = None
    frame: float = 0.0
    left: float = 1.0
    shade: int = 5
    tensors: list[Tensor] = field(default_factory=list)
    notes: list[tuple[str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class Picture:
    """All rows, how wide the drawing of connections is, in pixels, and how many layers are left out."""

    rows: list[Row]
    gutter: int
    left_out: int

    @property
    def anchors(self) -> dict[str, str]:
        """By weight, the anchor of what is told of its layer."""
        return {tensor.name: f"d{row.place}" for row in self.rows if row.width for tensor in row.tensors}

    @property
    def masks(self) -> list[Tensor]:
        """The small weights whose rows and columns are drawn."""
        return [tensor for row in self.rows for tensor in row.tensors if tensor.picture is not None]


def picture(outcome: Outcome) -> Picture | None:
    """The network of an outcome as rows, None where it was not recorded.

    Args:
        outcome: of a run; what its stages did not come to is not told of the layers.

    Example:
        >>> [(row.name, row.width) for row in picture(outcome).rows]
        [('input', None), ('conv1', (16, 9)), ('output', None)]
    """
    record = outcome.stages.get("trace", {}).get("network")
    if not record:
        return None
    layers = record["layers"][:_MOST_ROWS]
    drawings, gutter = lanes([[read for read in layer["reads"] if read < len(layers)] for layer in layers])
    plan = outcome.stages.get("finalize", {}).get("plan", {})
    notes = _notes(outcome)
    rows = []
    for place, (layer, drawn) in enumerate(zip(layers, drawings, strict=True)):
        reads = [(read, layers[read]["name"]) for read in layer["reads"]]
        row = Row(place, layer["name"], layer["kind"], reads, drawn)
        if layer["weights"]:
            _tell(row, layer, record["shapes"], plan)
        for name in layer["weights"]:
            row.notes += notes.get(name, [])
        rows.append(row)
    widest = max((row.width[0] for row in rows if row.width), default=1)
    for row in rows:
        if row.width:
            row.frame = max(100 * (row.width[0] / widest) ** 0.5, 4.0)
    return Picture(rows, gutter, len(record["layers"]) - len(layers))


def _tell(row: Row, layer: dict[str, Any], shapes: dict[str, list[int]], plan: dict[str, Any]) -> None:
    """What is left of a layer's weights."""
    before = after = 0
    for place, name in enumerate(layer["weights"]):
        shape = plan.get("shapes", {}).get(name, shapes[name])
        left = shape_left(name, plan, shape)
        before, after = before + _entries(shape), after + _entries(left)
        kept = kept_indices(name, plan)
        told = [(axis, ranges(index)) for axis, index in kept.items()]
        row.tensors.append(Tensor(name, times(shape), times(left), told, _mask(shape, kept)))
        if place == (layer["kind"] in _RECURRENT):  # the second weight of these reads what they give
            axis = _output_axis(layer["kind"])
            row.width = (shape[axis], left[axis])
    row.left = after / max(before, 1)
    row.shade = sum(row.left > share for share in _SHARES)


def _output_axis(kind: str) -> int:
    """The axis of a layer's weight along which what it gives lies."""
    if kind.startswith("conv_transpose") or kind in _RECURRENT:
        return 1
    return 0 if kind.startswith(("conv", "linear")) else -1


def shape_left(name: str, plan: dict[str, Any], shape: Sequence[int]) -> list[int]:
    """The sizes of a tensor after removal; none are left of one that nothing reads any more."""
    if name in plan.get("dropped", ()):
        return [0] * len(shape)
    kept = kept_indices(name, plan)
    return [_count(kept[axis]) if axis in kept else size for axis, size in enumerate(shape)]


def kept_indices(name: str, plan: dict[str, Any]) -> dict[int, list[Any]]:
    """By axis the indices that a tensor keeps, of axes that lost some; a list for each group of a grouped weight."""
    axes = plan.get("kept", {}).get(name, {})
    return {int(axis): index for axis, index in axes.items() if index is not None}


def _count(index: Sequence[Any]) -> int:
    return len(index[0]) if index and isinstance(index[0], list) else len(index)


def _entries(shape: Sequence[int]) -> int:
    found = 1
    for size in shape:
        found *= size
    return found


def times(shape: Sequence[int]) -> str:
    """A shape as text.

    Example:
        >>> times([16, 3, 3, 3])
        '16×3×3×3'
    """
    return "×".join(map(str, shape))


_LISTED = 400  # ranges of kept indices that are written out


def ranges(index: Sequence[Any]) -> str:
    """Ascending integers as ranges; of lists of them, one for each group, those of every group.

    Example:
        >>> ranges([0, 1, 2, 5, 7, 8])
        '0-2, 5, 7-8'
    """
    if index and isinstance(index[0], list):
        if all(each == index[0] for each in index):
            return f"{ranges(index[0])} of each group"
        told = (f"group {place}: {ranges(each)}" for place, each in enumerate(index[:_LISTED]))
        return "; ".join(told) + ("; ..." if len(index) > _LISTED else "")
    runs = _runs(index)
    told = (str(first) if first == last else f"{first}-{last}" for first, last in runs[:_LISTED])
    return ", ".join(told) + (", ..." if len(runs) > _LISTED else "")


def _runs(index: Sequence[int]) -> list[list[int]]:
    found: list[list[int]] = []
    for i in index:
        if found and found[-1][1] == i - 1:
            found[-1][1] = i
        else:
            found.append([i, i])
    return found


def _mask(shape: Sequence[int], kept: dict[int, list[Any]]) -> Markup | None:
    """Rows and columns of a small weight as a picture: what went is light."""
    if (
        len(shape) < 2
        or max(shape[:2]) > _PICTURED
        or any(index and isinstance(index[0], list) for index in kept.values())
    ):
        return None
    rows, columns = shape[:2]
    if not kept or not rows or not columns:
        return None
    gone = [
        _runs(sorted(set(range(size)) - set(kept.get(axis, range(size))))) for axis, size in enumerate((rows, columns))
    ]
    bands = "".join(f"M0 {a}h{columns}v{b - a + 1}h-{columns}z" for a, b in gone[0])
    bands += "".join(f"M{a} 0h{b - a + 1}v{rows}h-{b - a + 1}z" for a, b in gone[1])
    scale = max(1, min(6, 192 // max(rows, columns)))
    size = f'width="{columns * scale}" height="{rows * scale}" viewBox="0 0 {columns} {rows}"'
    label = f"{rows - _covered(gone[0])} of {rows} rows and {columns - _covered(gone[1])} of {columns} columns are kept"
    return Markup(
        f'<svg class="mask" {size} role="img" aria-label="{label}" preserveAspectRatio="none">'
        f'<rect class="in" width="{columns}" height="{rows}"/><path class="out" d="{bands}"/></svg>'
    )


def _covered(runs: list[list[int]]) -> int:
    return sum(last - first + 1 for first, last in runs)


def _notes(outcome: Outcome) -> dict[str, list[tuple[str, str]]]:
    """By weight what the stages say of it."""
    found: dict[str, list[tuple[str, str]]] = defaultdict(list)
    choice = outcome.stages.get("choose", {}).get("channels", {})
    for group, (masked, units) in choice.get("removed", {}).items():
        found[_weight_of(group)].append((f"group {group}", f"{masked} of {units} units masked"))
    for group, why in choice.get("stayed", {}).items():
        found[_weight_of(group)].append(("stayed", why))
    for name, axis, index, why in outcome.stages.get("finalize", {}).get("plan", {}).get("stayed", []):
        found[name].append((f"axis {axis}: {len(index)} masked, but stayed", why))
    for name, each in outcome.stages.get("repair", {}).get("repair", {}).get("readers", {}).items():
        errors = f"{number(each['before'])} before repair, {number(each['after'])} after"
        found[name].append(("error, relative", f"{errors}; {each['note']}" if each["note"] else errors))
    for name, why in outcome.stages.get("repair", {}).get("repair", {}).get("alone", {}).items():
        found[name].append(("not repaired", why))
    return found


def _weight_of(group: str) -> str:
    """The weight that a group of channels is named by, "conv1.weight (channel)"."""
    return group.rpartition(" (")[0] or group


def lanes(reads: Sequence[Sequence[int]]) -> tuple[list[Markup], int]:
    """The connections, drawn row by row, and how many pixels wide that is.

    What the next row reads goes straight down; other values go down in a lane of their own, to all that read them.

    Args:
        reads: by row, the rows that it reads.

    Example:
        >>> lanes([[], [0]])
        ([Markup('<path d=""/><line x1="8" x2="8" y1="20" y2="100%"/>'), Markup('<path d="M8 0V20"/>')], 28)
    """
    last = {source: row for row, sources in enumerate(reads) for source in sources if source < row - 1}
    beside: dict[int, int] = {}  # by place, the row whose value goes down there
    drawn, widest = [], 0
    for row, sources in enumerate(reads):
        paths = [f"M8 0V{_NODE}"] if row - 1 in sources else []
        for place, source in beside.items():
            if source in sources and source != row - 1:
                paths.append(f"M{_x(place)} 0C{_x(place)} {_NODE // 2} 8 {_NODE // 2} 8 {_NODE}")
        beside = {place: source for place, source in beside.items() if last[source] > row}
        lines = [(_x(place), 0) for place in beside]
        if row in last:
            place = next(place for place in range(len(beside) + 1) if place not in beside)
            beside[place] = row
            paths.append(f"M8 {_NODE}C8 {_TURN - 8} {_x(place)} {_NODE + 8} {_x(place)} {_TURN}")
            lines.append((_x(place), _TURN))
        if row + 1 < len(reads) and row in reads[row + 1]:
            lines.append((8, _NODE))
        widest = max([widest, *beside])
        down = "".join(f'<line x1="{x}" x2="{x}" y1="{y}" y2="100%"/>' for x, y in dict.fromkeys(lines))
        drawn.append(Markup(f'<path d="{"".join(paths)}"/>{down}'))
    return drawn, _x(min(widest, _MOST_LANES)) + 8


def _x(place: int) -> int:
    return 8 + _STEP * (min(place, _MOST_LANES) + 1)


def all_tensors(plan: dict[str, Any]) -> Iterator[tuple[str, str, str, float]]:
    """Name, sizes before and after, and the share left of every tensor that lost indices."""
    for name in plan.get("kept", {}):
        kept = kept_indices(name, plan)
        if kept:
            shape = plan["shapes"][name]
            left = shape_left(name, plan, shape)
            yield name, times(shape), times(left), _entries(left) / max(_entries(shape), 1)
