"""Models that are built from a configuration, as those of transformers: which of its numbers gives which size.

What a class makes of its configuration is found by building it: on the meta device, with one number changed.
"""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

from fxprune.graph.names import tensors_of

Shapes = dict[str, tuple[int, ...]]
# name of a tensor, axis
Axis = tuple[str, int]
# path of a module, name of an attribute of it that is an integer
Attribute = tuple[str, str]
_WAYS = 1000  # of numbers that are tried together
_UNSAID = "head_dim"  # which many classes read, if it is there


@dataclass(frozen=True)
class Built:
    """What a class makes of numbers: the sizes of tensors, and the integers that modules keep as attributes."""

    shapes: Shapes
    integers: dict[Attribute, int]

    @classmethod
    def of(cls, model: nn.Module) -> Built:
        """Those of a model."""
        modules = model.named_modules()
        integers = {
            (path, name): value
            for path, module in modules
            for name, value in vars(module).items()
            if type(value) is int
        }
        return cls(sizes_of(model), integers)


class Configuration:
    """The configuration of a model, and the sizes that the model has with other numbers in it.

    Attributes:
        model: an instance of a class that is built from `config` alone.
        shapes: of its parameters and buffers.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.shapes: Shapes = sizes_of(model)
        self._built: dict[tuple[tuple[str, int], ...], Built | None] = {}

    @classmethod
    def of(cls, model: nn.Module) -> Configuration | None:
        """That of a model; None where it has none from which it can be built."""
        config = getattr(model, "config", None)
        if getattr(type(model), "config_class", None) is None or not hasattr(config, "to_dict"):
            return None
        found = cls(model)
        return found if found.built({}) == found.shapes else None

    @cached_property
    def numbers(self) -> dict[str, int]:
        """The numbers from which a size could follow, by name, "text_config.hidden_size" for one further down.

        One that is not said, and follows from others, is among them where it can be said.
        """
        found: dict[str, int] = {}
        unsaid: list[str] = []
        for name, value in _entries(self.model.config):
            if type(value) is int and value > 1:
                found[name] = value
            elif value is None:
                unsaid.append(name)
        sizes = sorted({size for shape in self.shapes.values() for size in shape if size > 1})
        heads = _numbers_called(self.model, _UNSAID)
        for name in unsaid:
            candidates = heads if name.endswith(_UNSAID) else sizes
            said = next((size for size in candidates if self._says(name, size)), None)
            if said is not None:
                found[name] = said
        return found

    @cached_property
    def _unsaid(self) -> dict[str, int]:
        """The numbers that are not said, as they are."""
        entries = dict(_entries(self.model.config))
        return {name: number for name, number in self.numbers.items() if entries[name] is None}

    def _says(self, name: str, size: int) -> bool:
        """Whether a number that is not said could be said so, and sizes follow from it."""
        return self.built({name: size}) == self.shapes and self.built({name: 2 * size}) not in (None, self.shapes)

    def built(self, numbers: Mapping[str, int]) -> Shapes | None:
        """The sizes of a model with some numbers in its configuration; None where there is no such model."""
        made = self.made(numbers)
        return None if made is None else made.shapes

    def made(self, numbers: Mapping[str, int]) -> Built | None:
        """What the class makes of some numbers in its configuration; None where it makes nothing."""
        key = tuple(sorted(numbers.items()))
        if key not in self._built:
            self._built[key] = self._build(numbers)
        return self._built[key]

    def _build(self, numbers: Mapping[str, int]) -> Built | None:
        config = copy.deepcopy(self.model.config)
        try:
            put_numbers(config, numbers)
            with torch.device("meta"), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return Built.of(type(self.model)(config))
        except Exception:  # the library's code may raise anything for numbers that do not fit
            return None

    @cached_property
    def _with_another(self) -> dict[str, Built]:
        """By number, what the class makes where that one is another."""
        found: dict[str, Built] = {}
        for name, number in self.numbers.items():
            for other in (2 * number, number // 2 if number % 2 == 0 else number + 1, number + 1):
                made = self.made(self._unsaid | {name: other})
                if made is not None and made.shapes.keys() == self.shapes.keys():
                    found[name] = made
                    break
        return found

    @cached_property
    def followers(self) -> dict[str, frozenset[Axis]]:
        """By number, the axes whose sizes follow from it."""
        return {name: frozenset(differing(self.shapes, made.shapes)) for name, made in self._with_another.items()}

    @cached_property
    def following_integers(self) -> dict[str, frozenset[Attribute]]:
        """By number, the attributes of modules that follow from it."""
        as_it_is = self.made(self._unsaid)
        before = {} if as_it_is is None else as_it_is.integers
        return {
            name: frozenset(key for key, value in before.items() if made.integers.get(key, value) != value)
            for name, made in self._with_another.items()
        }

    def expressing(self, wanted: Shapes, path: str = "") -> Iterator[dict[str, int]]:
        """The numbers with which a model has these sizes, those first that change the fewest; nothing where none do.

        Each gets the values of a size that it stands for. With the path of a module, only the sizes within it count.
        """
        wanted = _within(wanted, path)
        if wanted.keys() != _within(self.shapes, path).keys():
            return
        choices = [
            (name, [self.numbers[name], *values])
            for name, found in self._candidates(wanted).items()
            if (values := [value for value in found if value != self.numbers[name]])
        ]
        ways = itertools.islice(itertools.product(*(values for _, values in choices)), _WAYS)
        changed = [{name: v for (name, values), v in zip(choices, way, strict=True) if v != values[0]} for way in ways]
        for numbers in sorted(changed, key=len):
            if self._gives(self._unsaid | numbers, wanted, path):
                yield self._said(self._unsaid | numbers, wanted, path)

    def _gives(self, numbers: Mapping[str, int], wanted: Shapes, path: str) -> bool:
        shapes = self.built(numbers)
        return shapes is not None and _within(shapes, path) == wanted

    def _said(self, numbers: dict[str, int], wanted: Shapes, path: str) -> dict[str, int]:
        """Without what follows from the others, as it did before."""
        for name in self._unsaid:
            rest = {key: value for key, value in numbers.items() if key != name}
            if self._gives(rest, wanted, path):
                numbers = rest
        return numbers

    def _candidates(self, wanted: Shapes) -> dict[str, list[int]]:
        """By number, what it may be, by how the sizes that follow from it changed."""
        found: dict[str, list[int]] = {}
        for name, axes in self.followers.items():
            number = self.numbers[name]
            ratios = {(self.shapes[tensor][axis], wanted[tensor][axis]) for tensor, axis in axes if tensor in wanted}
            values = {number * new // old for old, new in ratios if old and number * new % old == 0}
            found[name] = sorted(values - {0})
        return found


def differing(shapes: Shapes, others: Shapes) -> Iterator[Axis]:
    """The axes that are of another size."""
    for name, shape in shapes.items():
        other = others[name]
        if len(shape) != len(other):
            yield name, 0
            continue
        yield from ((name, axis) for axis in range(len(shape)) if shape[axis] != other[axis])


def _within(shapes: Shapes, path: str) -> Shapes:
    """Those of the tensors of a module and of the modules in it."""
    return {name: shape for name, shape in shapes.items() if is_within(name, path)}


def is_within(tensor: str, path: str) -> bool:
    """Whether a tensor is one of a module, or of the modules in it."""
    return not path or tensor.startswith(f"{path}.")


# an object of a configuration, the name of a number in it, whether it had one of that name, and what it was
Before = tuple[Any, str, bool, Any]


def put_numbers(config: Any, numbers: Mapping[str, int]) -> list[Before]:
    """Set numbers of a configuration, by their names; returns what they were, for `put_back`."""
    before: list[Before] = []
    for name, value in numbers.items():
        *path, last = name.split(".")
        holder = config
        for part in path:
            holder = getattr(holder, part)
        before.append((holder, last, last in vars(holder), vars(holder).get(last)))
        setattr(holder, last, value)
    return before


def put_back(before: Sequence[Before]) -> None:
    """Undo `put_numbers`."""
    for holder, name, was_there, value in before:
        if was_there:
            setattr(holder, name, value)
        else:
            delattr(holder, name)


def _entries(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    entries = {_UNSAID: None} | vars(config)
    for name, value in entries.items():
        if name.startswith("_"):
            continue
        if hasattr(value, "to_dict"):
            yield from _entries(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _numbers_called(model: nn.Module, name: str) -> list[int]:
    values = {vars(module).get(name) for module in model.modules()}
    return sorted(value for value in values if type(value) is int)


def sizes_of(model: nn.Module) -> Shapes:
    """The sizes of a model's tensors, by every name."""
    return {name: tuple(tensor.shape) for name, tensor in tensors_of(model).items()}
