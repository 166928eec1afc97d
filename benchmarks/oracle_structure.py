"""Which channels of a network belong together, found without fxprune: by changing them and watching who sees it.

Every product with a weight is replaced by noise, and one of its rows by other noise; the columns of weights that see it
belong to the row. Norms pass on what they get. The networks are some like it whose weights have no zeros: one has its
other weights, the others none of them, since what a ReLU hides behind some weights shows behind others. Where two rows
act on each other through what is not looked into (products of activations, recurrent layers) they count as one.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from oracle_products import Layer, Product, product
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tests.random_streams import FORMS

Row: TypeAlias = tuple[str, int]  # name of a weight, number of an output
Places: TypeAlias = list[set[Any]]  # by index the classes that are seen there
Inputs: TypeAlias = Callable[[int], Tensor]

# axis of the channels, by the name of the function
NORMS = {"layer_norm": -1, "rms_norm": -1, "group_norm": 1} | {form.__name__: -1 for form in FORMS}
VIEWS = ("view", "reshape", "unflatten", "channel_shuffle")
REDRAWN = 3  # networks with other weights
SCALES = (1.0, 30.0, 1.0, 5.0, 0.3, 1.0, 100.0, 1.0)  # of the noise; each finds who the others miss behind a ReLU


class Watch(TorchFunctionMode):
    """What a run of a network does.

    Attributes:
        products: the calls of products with weights, in order. results: what they gave.
        norms: the calls of norms: (operand, axis, groups).
        views: the axes that are viewed as several: (operand, axis, sizes).
        fixed: what the products are to give, norms passing on what they get; None to compute both.
    """

    def __init__(self, model: nn.Module, fixed: Sequence[Tensor] | None = None) -> None:
        super().__init__()
        self._names = {id(p): name for name, p in model.named_parameters()}
        self.products: list[Product] = []
        self.results: list[Tensor] = []
        self.norms: list[tuple[Tensor, int, int]] = []
        self.views: list[tuple[Tensor, int, tuple[int, ...]]] = []
        self.fixed = fixed

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        if name in NORMS:
            self.norms.append((args[0].detach().clone(), NORMS[name], int(args[1]) if name == "group_norm" else 1))
            return func(*args, **kwargs) if self.fixed is None else args[0] * 1
        found = product(name, args, kwargs, self._names)
        if found is None:
            result = func(*args, **kwargs)
            if name in VIEWS:
                self._note_view(name, args, result)
            return result
        self.products.append(found)
        self.results.append(func(*args, **kwargs) if self.fixed is None else self.fixed[len(self.results)])
        return self.results[-1].clone()

    def _note_view(self, name: str, args: Sequence[Any], result: Tensor) -> None:
        old, new = list(args[0].shape), list(result.shape)
        if "shuffle" in name:
            new[1:2] = [int(args[1]), new[1] // int(args[1])]
        at = 0
        for axis, size in enumerate(old):
            end, found = at + 1, new[at] if at < len(new) else 0
            while found < size and end < len(new):
                found, end = found * new[end], end + 1
            if found != size:
                return  # axes that merge keep no box
            if end - at > 1:
                self.views.append((args[0].detach().clone(), axis, tuple(new[at:end])))
            at = end


class Together:
    """Rows that act on one another, by union and find; "output" is one of them."""

    def __init__(self) -> None:
        self._parent: dict[Any, Any] = {}

    def find(self, item: Any) -> Any:
        self._parent.setdefault(item, item)
        while self._parent[item] != item:
            self._parent[item] = item = self._parent[self._parent[item]]
        return item

    def join(self, one: Any, other: Any) -> None:
        self._parent[self.find(one)] = self.find(other)


@dataclass
class Structure:
    """What belongs together; a place is there while one of the classes that it sees is.

    Attributes:
        layers: by the name of the weight.
        of: the classes of rows, (name of the weight, row), and of columns, (name, "column", column).
        norms: by call the places of the channels.
        boxes: places that are viewed as several axes, and the sizes of these.
    """

    layers: dict[str, Layer]
    of: Together
    norms: list[Places]
    boxes: list[tuple[Places, tuple[int, ...]]]


def by_sample(tensor: Tensor, samples: int, axes: Sequence[int]) -> Tensor:
    """[indices of the axes, samples, everything else]; samples stand in the one axis whose size they divide."""
    axes = [axis % tensor.dim() for axis in axes]
    batch = next(i for i, size in enumerate(tensor.shape) if size % samples == 0 and i not in axes)
    tensor = tensor.unflatten(batch, (samples, -1))
    axes = [axis + (axis > batch) for axis in axes]
    rest = [i for i in range(tensor.dim()) if i not in (*axes, batch)]
    return tensor.permute([*axes, batch, *rest]).reshape(math.prod(tensor.shape[i] for i in axes), samples, -1)


@dataclass
class Seen:
    """By place the rows whose change is seen there: in the output, in columns, norms and views by call."""

    output: list[set[Row]]
    columns: list[list[set[Row]]]
    norms: list[list[set[Row]]]
    views: list[list[set[Row]]]

    def add(self, other: Seen) -> None:
        """What is seen in another network as well."""
        pairs = [(self.columns, other.columns), (self.norms, other.norms), (self.views, other.views)]
        for one, two in [([self.output], [other.output]), *pairs]:
            for places, more in zip(one, two, strict=True):
                for place, rows in zip(places, more, strict=True):
                    place |= rows


def structure(model: nn.Module, inputs: Inputs) -> Structure:
    """What belongs together in a network."""
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for p in twin.parameters():
            p.copy_(torch.where(p == 0, torch.randn_like(p), p))
        with Watch(twin) as run:
            twin(inputs(1))
    layers = {found.name: found.layer for found in run.products}
    rows = [(name, row) for name, layer in layers.items() for row in range(len(layer.table))]
    changes = [(row, scale) for row in rows for scale in SCALES]  # a sample each, a prime number of them
    samples = next(n for n in range(max(101, len(changes)), 10**6) if all(n % k for k in range(2, 32)))
    x = inputs(samples)
    seen, run = _seen(twin, x, changes, samples)
    for _ in range(REDRAWN):
        with torch.no_grad():
            for p in twin.parameters():
                p.copy_(torch.randn_like(p))
        seen.add(_seen(twin, x, changes, samples)[0])

    of = Together()
    for row in seen.output[0]:
        of.join(row, "output")
    for product_, columns in zip(run.products, seen.columns, strict=True):
        for column, seen_by in enumerate(columns):
            for row in seen_by:
                of.join(row, (product_.name, "column", column))

    def places(sets: Iterable[set[Row]]) -> Places:
        return [{of.find(row) for row in seen_by} for seen_by in sets]

    views = zip(seen.views, run.views, strict=True)
    boxes = [(places(sets), shape) for sets, (x, axis, shape) in views if x.shape[axis] % samples]
    return Structure(layers, of, [places(sets) for sets in seen.norms], boxes)


def _seen(twin: nn.Module, x: Tensor, changes: Sequence[tuple[Row, float]], samples: int) -> tuple[Seen, Watch]:
    """Who sees the changes of rows, a sample each, and what the run without changes did."""
    with torch.no_grad():
        with Watch(twin) as run:
            twin(x)
        fixed = [spread(result) for result in run.results]
        changed = [
            _with_changes(found, result, changes, samples) for found, result in zip(run.products, fixed, strict=True)
        ]
        with Watch(twin, fixed) as before:
            was = twin(x)
        with Watch(twin, changed) as after:
            now = twin(x)

    def seers(one: Tensor, other: Tensor, *axes: int) -> list[set[Row]]:
        differs = (by_sample(one, samples, axes) != by_sample(other, samples, axes)).any(-1)
        return [{changes[sample][0] for sample in place.nonzero().flatten().tolist()} for place in differs]

    products = zip(before.products, after.products, strict=True)
    views = zip(before.views, after.views, strict=True)
    seen = Seen(
        seers(was, now),
        [seers(one.data, two.data, *one.columns) if one.columns else [] for one, two in products],
        [seers(a, b, axis) for (a, axis, _), (b, *_) in zip(before.norms, after.norms, strict=True)],
        [seers(a, b, axis) if a.shape[axis] % samples else [] for (a, axis, _), (b, *_) in views],
    )
    return seen, before


def spread(like: Tensor) -> Tensor:
    """Noise with entries of every size: what a norm and a clamp hide of even noise shows in some of it."""
    return torch.randn_like(like) * 10 ** torch.empty_like(like).uniform_(-1, 2)


def _with_changes(found: Product, result: Tensor, changes: Sequence[tuple[Row, float]], samples: int) -> Tensor:
    """The result of a product in which each sample has other noise in one row."""
    places = by_sample(torch.arange(result.numel()).view(result.shape), samples, found.rows)
    flat = result.clone().flatten()
    for sample, ((name, row), scale) in enumerate(changes):
        if name == found.name:
            at = places[row, sample]
            flat[at] += scale * spread(flat[at])
    return torch.empty_like(result).copy_(flat.view(result.shape))
