"""Where two computations part: the first node whose values differ, and a script that shows it alone."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save

from fxprune.files import atomic
from fxprune.graph.calls import Call
from fxprune.reports import Readable, columns, plain

from .node_values import NodeValues, Piece, node_values
from .runners import Runner


@dataclass(frozen=True, repr=False)
class Divergence(Readable):
    """The first node whose value differs by more than the tolerance.

    Attributes:
        candidate, call: which candidate, on which of the inputs. node: the name that both sides know it by.
        operator, module: of the reference; `found_operator`: of the candidate. shape: of the value.
        index: where the difference is largest; reference, found: both values there.
        pieces: of the reference and of the candidate, what `reproduce` writes.
    """

    candidate: str
    call: int
    node: str
    operator: str
    found_operator: str
    module: str
    shape: tuple[int, ...]
    index: tuple[int, ...]
    reference: float
    found: float
    pieces: tuple[Piece, ...] = field(default=(), repr=False, compare=False)

    def __str__(self) -> str:
        where = f" in {self.module}" if self.module else ""
        return (
            f"first difference of {self.candidate}: node `{self.node}` ({self.operator}{where}; there "
            f"{self.found_operator}), shape {list(self.shape)}, at {list(self.index)}: {self.reference:.9g} in the "
            f"reference, {self.found:.9g} here"
        )

    def table(self) -> str:
        """The node, and the values on both sides, a line each."""
        return columns([(name.replace("_", " "), str(value)) for name, value in self.to_dict().items()])

    def to_dict(self) -> dict[str, Any]:
        """The node and the values in JSON's types."""
        return {name: plain(value) for name, value in vars(self).items() if name != "pieces"}

    def reproduce(self, path: str | os.PathLike[str]) -> None:
        """Write a script of the smallest subgraph that differs; its inputs and weights go beside it."""
        target = Path(path)
        sides: list[str] = []
        models: dict[Path, bytes] = {}
        tensors: dict[str, torch.Tensor] = {}
        for side, piece in zip(("reference", "candidate"), self.pieces, strict=True):
            named = {name.replace("SIDE", side, 1): value for name, value in piece.tensors.items()}
            tensors |= named
            if piece.model:
                models[target.with_name(f"{target.stem}.{side}.onnx")] = piece.model
            call = ", ".join(f"tensors[{name!r}]" for name in named)
            sides.append(f"\n\n{piece.code.replace('SIDE', side)}\n\n{side}_value = {side}({call}).double()\n")
        data = target.with_suffix(".safetensors")
        stored = save({name: value.contiguous().clone() for name, value in tensors.items()})
        script = _SCRIPT.format(what=self, data=data.name, sides="".join(sides)).encode()
        for name, content in (models | {data: stored, target: script}).items():
            with atomic(name) as draft:
                draft.write_bytes(content)


_SCRIPT = '''"""{what}."""

from pathlib import Path

import onnxruntime
import torch
from safetensors.torch import load_file
from torch import device, inf, nan

here = Path(__file__).parent
tensors = load_file(here / "{data}")
{sides}
difference = (candidate_value - reference_value).abs()
print(f"largest difference {{difference.max():.3e}}, largest value {{reference_value.abs().max():.3e}}")
'''


@dataclass(frozen=True)
class Search:
    """What a search for the first difference gave.

    Attributes:
        found: the node; None where one side has no nodes, no names are shared, or all values agree.
        failure: why the nodes could not be compared, '' where they could.
    """

    found: Divergence | None = None
    failure: str = ""


def find(
    reference: Runner,
    candidate: Runner,
    call: Call,
    index: int,
    agrees: Callable[[torch.Tensor, torch.Tensor], bool],
) -> Search:
    """The first node, in the reference's order, of which `agrees(reference value, candidate value)` is false.

    Args:
        reference, candidate: what runs the two sides. call: the inputs; index: their number.
    """
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            left, right = node_values(reference, call), node_values(candidate, call)
    except Exception as error:  # a search that fails, in whichever way, must not hide what it was to explain
        told = next(iter(str(error).splitlines()), "")
        return Search(failure=f"{type(error).__name__}: {told}")
    if left is None or right is None:
        return Search()
    agreeing: set[str] = set()
    for name in left.computed:
        if name not in left.values or name not in right.values:
            continue
        expected, found = left.values[name], right.values[name].to(left.values[name].dtype)
        if expected.shape != found.shape:
            continue
        if not agrees(expected, found):
            return Search(_divergence(candidate.name, index, name, left, right, agreeing))
        agreeing.add(name)
    return Search()


def _divergence(
    candidate: str, index: int, name: str, left: NodeValues, right: NodeValues, agreeing: set[str]
) -> Divergence:
    expected, found = left.values[name], right.values[name].to(left.values[name].dtype)
    distance = (expected.double() - found.double()).abs().nan_to_num(nan=torch.inf)
    place = tuple(int(i) for i in np.unravel_index(int(distance.argmax()), expected.shape))
    shared = {name: left.values[name] for name in agreeing}
    return Divergence(
        candidate,
        index,
        name,
        operator=left.computed[name].operator,
        found_operator=right.computed[name].operator,
        module=left.computed[name].module,
        shape=tuple(expected.shape),
        index=place,
        reference=float(expected[place]),
        found=float(found[place]),
        pieces=(left.piece(name, shared), right.piece(name, shared)),
    )
