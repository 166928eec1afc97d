"""Which axes the caller wants free, which of them a capture fixed, and the lines of the model that did."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.export import AdditionalInputs, ExportedProgram, ShapesCollection

from fxprune.capture.caches import is_cache
from fxprune.capture.places import Place, module_names, place_now
from fxprune.capture.programs import input_nodes
from fxprune.capture.sample import Sample
from fxprune.graph.arguments import fixed_size
from fxprune.torch_internals import dimension_hint, sizes_watched


@dataclass(frozen=True, eq=False)
class FreeAxis:
    """An axis of an input that is to be free.

    Attributes:
        tensor: the sample input.
        name: of the input, as in `x`, `batch.ids`.
        axis: which.
        dimension: the name of its `torch.export.Dim`, "" where it has none.
        is_auto: whether torch.export may fix it.
        source: how torch.export calls its size, as in "L['x'].size()[1]".
    """

    tensor: Tensor
    name: str
    axis: int
    dimension: str
    is_auto: bool
    source: str

    @property
    def size(self) -> int:
        """In the sample."""
        return self.tensor.shape[self.axis]

    @property
    def is_constant(self) -> bool:
        """Whether torch.export cannot free it for this sample: it takes 0 and 1 for constants."""
        return self.size < 2

    def __str__(self) -> str:
        return f"axis {self.axis} of input `{self.name}`" + (f" ({self.dimension})" if self.dimension else "")


def free_axes(model: nn.Module, sample: Sample, shapes: Any) -> list[FreeAxis]:
    """The axes that a structure of dynamic shapes, in torch.export's terms, leaves free.

    What does not fit the inputs is left out: torch.export says what is wrong with it.
    """
    kwargs = dict(sample.kwargs)
    if isinstance(shapes, ShapesCollection | AdditionalInputs):
        try:
            shapes = shapes.dynamic_shapes(model, sample.args, kwargs)  # type: ignore[no-untyped-call]
        except ValueError:  # of tensors that are no inputs, which torch.export says too
            return []
    bound: Mapping[str, Any] = inspect.signature(model.forward).bind(*sample.args, **kwargs).arguments
    if isinstance(shapes, tuple | list):
        shapes = dict(zip(bound, shapes, strict=False))
    if not isinstance(shapes, Mapping):
        return []
    pairs = ((value, shapes.get(name), name, f"L[{name!r}]") for name, value in bound.items())
    return [axis for pair in pairs for axis in _axes(*pair)]


def _axes(value: Any, shapes: Any, name: str, source: str) -> Iterator[FreeAxis]:
    if isinstance(value, Tensor):
        yield from _axes_of_tensor(value, shapes, name, source)
    elif isinstance(value, Mapping) and isinstance(shapes, Mapping):
        for key in (key for key in value if key in shapes):
            yield from _axes(value[key], shapes[key], f"{name}.{key}", f"{source}[{key!r}]")
    elif is_cache(value) and isinstance(shapes, list | tuple):
        children, _ = pytree.SUPPORTED_NODES[type(value)].flatten_with_keys_fn(value)  # type: ignore[misc]
        for (key, child), inner in zip(children, shapes, strict=False):
            yield from _axes(child, inner, f"{name}.{str(key).strip('[].').strip(chr(39))}", f"{source}{key}")
    elif isinstance(value, list | tuple) and isinstance(shapes, list | tuple):
        for i, (entry, inner) in enumerate(zip(value, shapes, strict=False)):
            yield from _axes(entry, inner, f"{name}[{i}]", f"{source}[{i}]")


def _axes_of_tensor(value: Tensor, shapes: Any, name: str, source: str) -> Iterator[FreeAxis]:
    given: Mapping[Any, Any] = dict(enumerate(shapes)) if isinstance(shapes, list | tuple) else shapes or {}
    for axis, dimension in given.items() if isinstance(given, Mapping) else ():
        hint = dimension_hint(dimension)
        if dimension is None or isinstance(dimension, int) or hint == "STATIC":
            continue
        called = "" if hint else str(getattr(dimension, "__name__", dimension))
        yield FreeAxis(value, name, axis, called, hint == "AUTO", f"{source}.size()[{axis}]")


@dataclass
class SizeLog:
    """What a capture learned of free sizes, and where.

    Attributes:
        fixed: by the name of a size, the number that it was fixed to first, and where.
        conditions: by the name of a size, where it had to be equal to another one, or to meet a condition; in order.
    """

    fixed: dict[str, tuple[int, Place | None]] = field(default_factory=dict)
    conditions: dict[str, dict[Place, None]] = field(default_factory=dict)

    @classmethod
    @contextlib.contextmanager
    def of(cls, model: nn.Module) -> Iterator[SizeLog]:
        """A log that is kept as long as the context lasts."""
        log, names = cls(), module_names(model)

        def seen(sources: list[str], value: int | None) -> None:
            place = place_now(names)
            for source in sources:
                if value is not None:
                    log.fixed.setdefault(source, (value, place))
                elif place is not None:
                    log.conditions.setdefault(source, {}).setdefault(place)

        with sizes_watched(seen):
            yield log

    def place_fixed(self, axis: FreeAxis) -> Place | None:
        """The line that fixed an axis, None where it is not known."""
        return self.fixed[axis.source][1] if axis.source in self.fixed else None

    def why_fixed(self, axis: FreeAxis) -> str | None:
        """What fixed an axis, as the end of a sentence; None where it is not known to be fixed."""
        if axis.is_constant:
            return f"to {axis.size}, the size in the sample, which torch.export takes for a constant"
        if axis.source not in self.fixed:
            return None
        value, place = self.fixed[axis.source]
        return f"to {value}" + (f" at {place.quoted}" if place else "")

    def where_conditioned(self, axes: Sequence[FreeAxis]) -> str:
        """The lines that ask something of the sizes of these axes; '' where none is known."""
        places = dict.fromkeys(place for axis in axes for place in self.conditions.get(axis.source, ()))
        return "; ".join(place.quoted for place in list(places)[:3])


def fixed_axes(axes: Sequence[FreeAxis], program: ExportedProgram, sample: Sample) -> dict[FreeAxis, int]:
    """The axes that a capture fixed, and the sizes that they were fixed to."""
    leaves = pytree.tree_leaves((sample.args, sample.in_order(program)))
    shapes: dict[int, torch.Size] = {}
    for leaf, node in zip(leaves, input_nodes(program), strict=True):
        if isinstance(leaf, Tensor):
            shapes.setdefault(id(leaf), node.meta["val"].shape)
    found = {axis: fixed_size(shapes[id(axis.tensor)][axis.axis]) for axis in axes if id(axis.tensor) in shapes}
    return {axis: size for axis, size in found.items() if size is not None}
