"""Models that are built from a configuration, as those of transformers and diffusers: which number gives which size.

What a class makes of its configuration is found by building it: on the meta device, with one number changed.
"""

from __future__ import annotations

import copy
import itertools
import math
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import fx, nn

from fxprune.graph.configuration_numbers import (
    TOGETHER,
    UNSAID,
    Keywords,
    Number,
    Numbers,
    build,
    configuration_of,
    entries,
    put_numbers,
    refusal,
)
from fxprune.graph.names import tensors_of

Shapes = dict[str, tuple[int, ...]]
# name of a tensor, axis
Axis = tuple[str, int]
# path of a module, name of an attribute of it that is an integer
Attribute = tuple[str, str]
_WAYS = 1000  # of numbers that are tried together
_DIRECTION = ".original1"  # of a weight norm, beside the magnitude ".original0"
_HALVINGS = 30  # of an interval in which a fraction is looked for
_ABOVE = 1 + 1e-9  # of a fraction whose product is rounded down


@dataclass(frozen=True)
class Built:
    """What a class makes of numbers: the sizes of tensors, and the numbers that modules keep as attributes.

    Attributes:
        shapes: of the tensors that count. unread: of those that no call reads. integers, floats: by attribute.
    """

    shapes: Shapes
    unread: Shapes
    integers: dict[Attribute, int]
    floats: dict[Attribute, float]

    @classmethod
    def of(cls, model: nn.Module, around: str = "") -> Built:
        """Those of a model, which is the module of a path in another one."""
        integers: dict[Attribute, int] = {}
        floats: dict[Attribute, float] = {}
        for path, module in model.named_modules(prefix=around):
            for name, value in vars(module).items():
                if type(value) is int:
                    integers[path, name] = value
                elif type(value) is float:
                    floats[path, name] = value
        return cls(_placed(sizes_of(model), around), {}, integers, floats)

    def without(self, unread: Collection[str]) -> Built:
        """With tensors that no call reads apart."""
        apart = {name: shape for name, shape in self.shapes.items() if name in unread}
        read = {name: shape for name, shape in self.shapes.items() if name not in apart}
        return Built(read, apart, self.integers, self.floats) if apart else self


class Builds:
    """What the class of one model made of numbers so far: building is slow, and each choice that is tried asks."""

    def __init__(self) -> None:
        self._made: dict[tuple[tuple[str, Number], ...], Built | None] = {}
        self._refused: dict[tuple[tuple[str, Number], ...], bool] = {}
        self._of_parts: dict[str, Builds] = {}

    def of_part(self, path: str) -> Builds:
        """What the class of the module of a path made."""
        return self._of_parts.setdefault(path, Builds()) if path else self

    def made(
        self, kind: type[nn.Module], own: Any, numbers: Mapping[str, Number], *, path: str, valid: bool
    ) -> Built | None:
        """What a class makes of its configuration `own` with some numbers in it; None where it makes nothing.

        With `valid`, nothing either of what could not be saved. `path` is that of the module in its model.
        """
        key = tuple(sorted(numbers.items()))
        try:
            if valid and self._is_refused(key, own):
                return None
            if key not in self._made:
                self._made[key] = None
                with torch.device("meta"), warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    self._made[key] = Built.of(build(kind, _with_numbers(own, key)), path)
        except Exception:  # the library's code may raise anything for numbers that do not fit
            return None
        return self._made[key]

    def _is_refused(self, key: tuple[tuple[str, Number], ...], own: Any) -> bool:
        if key not in self._refused:
            self._refused[key] = True  # where other numbers cannot be put in at all
            self._refused[key] = refusal(_with_numbers(own, key)) is not None
        return self._refused[key]


def _with_numbers(config: Any, numbers: Iterable[tuple[str, Number]]) -> Any:
    """A copy of a configuration with some numbers in it."""
    copied = copy.deepcopy(config)
    put_numbers(copied, dict(numbers))
    return copied


class Configuration:
    """The configuration of a model, and the sizes that the model has with other numbers in it.

    Attributes:
        model: an instance of a class that is built from its configuration alone.
        path: of that instance, where it is a module within another model, whose names are those of its tensors then.
        by_keywords: whether the class takes what is in it as keywords.
        unread: the names of its tensors that no call reads: they follow numbers, and say none.
        shapes: of its other parameters and buffers.
    """

    def __init__(
        self,
        model: nn.Module,
        unread: Collection[str] = (),
        *,
        valid: bool = False,
        builds: Builds | None = None,
        path: str = "",
    ) -> None:
        self.model, self.path, self._config = model, path, configuration_of(model)
        self._builds = (Builds() if builds is None else builds).of_part(path)
        self._valid = valid and self._config is not None and refusal(self._config) is None
        self.by_keywords = isinstance(self._config, Keywords)
        self.unread = frozenset(unread)
        self.shapes: Shapes = self.read(_placed(sizes_of(model), path))
        self._built: dict[tuple[tuple[str, Number], ...], Built | None] = {}

    @classmethod
    def of(
        cls,
        model: nn.Module,
        unread: Collection[str] = (),
        *,
        valid: bool = False,
        builds: Builds | None = None,
        path: str = "",
    ) -> Configuration | None:
        """That of a model; None where it has none from which it can be built.

        With `valid`, numbers with which it could not be saved make nothing, where it can be saved as it is. What was
        built for other configurations of the model, `builds`, is not built again.
        """
        found = cls(model, unread, valid=valid, builds=builds, path=path)
        return found if found._config is not None and found.built({}) == found.shapes else None

    @classmethod
    def all_of(
        cls, model: nn.Module, unread: Collection[str] = (), *, valid: bool = False, builds: Builds | None = None
    ) -> list[Configuration]:
        """That of a model; where it has none, those of the outermost modules in it that have one."""
        builds = Builds() if builds is None else builds
        found: dict[str, Configuration] = {}
        for path, module in model.named_modules():
            if not any(is_within(path, outer) for outer in found) and configuration_of(module) is not None:
                own = cls.of(module, unread, valid=valid, builds=builds, path=path)
                if own is not None:
                    found[path] = own
        return list(found.values())

    @property
    def modules(self) -> dict[str, nn.Module]:
        """Those of the model as it was, by their paths."""
        return dict(self.model.named_modules(prefix=self.path))

    def read(self, shapes: Shapes) -> Shapes:
        """Those of its model, without the tensors that no call reads."""
        return {name: shape for name, shape in _within(shapes, self.path).items() if name not in self.unread}

    @cached_property
    def numbers(self) -> dict[str, Number]:
        """The numbers from which a size could follow, by name, "text_config.hidden_size" for one further down.

        Those of a list have their place as name, "hidden_sizes.0". One that is not said, and follows from others, is
        among them where it can be said.
        """
        found: dict[str, Number] = {}
        unsaid: list[str] = []
        for name, value in entries(self._config):
            if isinstance(value, list | tuple):
                found |= self._listed(name, value)
            elif (type(value) is int and value > 1) or (type(value) is float and value > 0):
                found[name] = value
            elif value is None:
                unsaid.append(name)
        sizes = sorted({size for shape in self.shapes.values() for size in shape if size > 1})
        heads = _numbers_called(self.model, UNSAID)
        for name in [] if self.by_keywords else unsaid:
            candidates = heads if name.endswith(UNSAID) else sizes
            said = next((size for size in candidates if self._says(name, size)), None)
            if said is not None:
                found[name] = said
        return found | self._joint(found)

    def _joint(self, numbers: Numbers) -> Numbers:
        """Equal numbers of which none can change alone, as the two widths around a shortcut: pairs, or more."""
        fixed = [name for name, value in numbers.items() if type(value) is int and not self._can_be(name, 2 * value)]
        found = {
            f"{one}{TOGETHER}{other}": numbers[one]
            for one, other in itertools.islice(itertools.combinations(fixed, 2), _WAYS)
            if numbers[one] == numbers[other] and self._can_be(f"{one}{TOGETHER}{other}", 2 * numbers[one])
        }
        paired = {name for names in found for name in names.split(TOGETHER)}
        alike: dict[Number, list[str]] = {}
        for name in fixed:
            if name not in paired:
                alike.setdefault(numbers[name], []).append(name)
        joined = {TOGETHER.join(self._needed(names, value)): value for value, names in alike.items() if len(names) > 2}
        return found | {names: value for names, value in joined.items() if names}

    def _needed(self, names: Sequence[str], value: Number) -> list[str]:
        """Those of equal numbers that must change together for the class to make a model; none where all do not."""
        needed = list(names)
        if not self._can_be(TOGETHER.join(needed), 2 * value):
            return []
        for name in names:
            rest = [other for other in needed if other != name]
            if rest and self._can_be(TOGETHER.join(rest), 2 * value):
                needed = rest
        return needed

    def _can_be(self, name: str, value: Number) -> bool:
        """Whether the class makes a model of the same tensors where a number is another one."""
        made = self.made({name: value})
        return made is not None and made.shapes.keys() == self.shapes.keys()

    def _listed(self, name: str, values: Sequence[Number]) -> Numbers:
        """The numbers of a list, where anything follows from them."""
        found = {f"{name}.{i}": value for i, value in enumerate(values) if value > 0}
        doubled = {entry: 2 * value for entry, value in found.items()}
        return {} if not found or self.built(doubled) == self.shapes else found

    @cached_property
    def _unsaid(self) -> Numbers:
        """The numbers that are not said, as they are."""
        unsaid = {name for name, value in entries(self._config) if value is None}
        return {name: number for name, number in self.numbers.items() if name in unsaid}

    def _says(self, name: str, size: int) -> bool:
        """Whether a number that is not said could be said so, and sizes follow from it."""
        return self.built({name: size}) == self.shapes and self.built({name: 2 * size}) not in (None, self.shapes)

    def built(self, numbers: Mapping[str, Number]) -> Shapes | None:
        """The sizes of a model with some numbers in its configuration; None where none has the same tensors."""
        made = self.made(numbers)
        return None if made is None or made.shapes.keys() != self.shapes.keys() else made.shapes

    def made(self, numbers: Mapping[str, Number]) -> Built | None:
        """What the class makes of some numbers in its configuration; None where it makes nothing."""
        key = tuple(sorted(numbers.items()))
        if key not in self._built:
            made = self._made(numbers)
            self._built[key] = None if made is None else made.without(self.unread | self._more)
        return self._built[key]

    def _made(self, numbers: Mapping[str, Number]) -> Built | None:
        return self._builds.made(type(self.model), self._config, numbers, path=self.path, valid=self._valid)

    @cached_property
    def _more(self) -> frozenset[str]:
        """The tensors that the class makes of its configuration alone, and the model has not, as a pooler left out."""
        made = self._made({})
        return frozenset() if made is None else frozenset(made.shapes.keys() - self.shapes.keys())

    @cached_property
    def _with_another(self) -> dict[str, tuple[Number, Built]]:
        """By number, another one, and what the class makes of that."""
        found: dict[str, tuple[Number, Built]] = {}
        for name, number in self.numbers.items():
            half = number // 2 if isinstance(number, int) and number % 2 == 0 else number / 2
            for other in (2 * number, number + 1 if isinstance(number, int) and number % 2 else half, number + 1):
                made = self.made(self._unsaid | {name: other})
                if made is not None and made.shapes.keys() == self.shapes.keys():
                    found[name] = other, made
                    break
        return found

    @cached_property
    def followers(self) -> dict[str, frozenset[Axis]]:
        """By number, the axes whose sizes follow from it."""
        return {name: frozenset(differing(self.shapes, made.shapes)) for name, (_, made) in self._with_another.items()}

    @cached_property
    def following_integers(self) -> dict[str, frozenset[Attribute]]:
        """By number, the attributes of modules that follow from it."""
        as_it_is = self.made(self._unsaid)
        before = {} if as_it_is is None else as_it_is.integers
        return {
            name: frozenset(key for key, value in before.items() if made.integers.get(key, value) != value)
            for name, (_, made) in self._with_another.items()
        }

    @cached_property
    def scaling(self) -> frozenset[str]:
        """The numbers from which fractions follow that modules keep, as what attention scales by."""
        as_it_is = self.made(self._unsaid)
        before = {} if as_it_is is None else as_it_is.floats
        found = {name: made.floats for name, (_, made) in self._with_another.items()}
        return frozenset(
            name for name, floats in found.items() if any(floats.get(k, v) != v for k, v in before.items())
        )

    @cached_property
    def proportional(self) -> dict[str, frozenset[Axis]]:
        """By number, the axes whose sizes are multiples or fractions of it, the other numbers as they are."""
        return {
            name: frozenset(
                (tensor, axis)
                for tensor, axis in self.followers[name]
                if len(made.shapes[tensor]) == len(self.shapes[tensor])
                and made.shapes[tensor][axis] * self.numbers[name] == self.shapes[tensor][axis] * other
            )
            for name, (other, made) in self._with_another.items()
        }

    def changes_by_part(self, name: str, axis: Axis, part: int) -> bool:
        """Whether so many of an axis are a multiple of a number, and the rest of it stays with another number."""
        return self._part(name, axis) == part

    def is_divisible(self, name: str, axis: Axis, units: int, part: int | None = None) -> bool:
        """Whether a number can be what says an axis with one of so many units less, and its other multiples too.

        Units are those of a part of the axis, where only that follows from the number.
        """
        multiples = {
            (tensor, dim): self.shapes[tensor][dim] * (units - 1)
            for tensor, dim in self.proportional[name]
            if self.shapes[tensor][dim] % units == 0
        }
        tensor, dim = axis
        size = self._size(axis)
        multiples[axis] = size * units - (size if part is None else part)
        values = self._valued(name, (units - 1) / units * self.numbers[name])
        if axis not in self.proportional[name] and multiples[axis] % units == 0:
            less = list(self.shapes[tensor])
            less[dim] = multiples[axis] // units
            values += self._values(name, [axis], {}, self.shapes | {tensor: tuple(less)})
        for value in values:
            shapes = self.built(self._unsaid | {name: value})
            if shapes is None or not self.followers[name].issuperset(differing(self.shapes, shapes)):
                continue
            if all(shapes[tensor][dim] * units == size for (tensor, dim), size in multiples.items()):
                return True
        return False

    def are_divisible(self, names: Sequence[str], axis: Axis, units: int) -> bool:
        """Whether several numbers, each with one of so many units less, say that of an axis that has a part of each.

        Such are the heads of queries, and those of keys and values, in a joined layer.
        """
        if sum(self._part(name, axis) for name in names) != self._size(axis) or len(names) < 2:
            return False
        values = [self._valued(name, (units - 1) / units * self.numbers[name])[:1] for name in names]
        numbers = {name: value for name, found in zip(names, values, strict=True) for value in found}
        shapes = self.built(self._unsaid | numbers) if len(numbers) == len(names) else None
        tensor, dim = axis
        return shapes is not None and shapes[tensor][dim] * units == self._size(axis) * (units - 1)

    def _size(self, axis: Axis) -> int:
        tensor, dim = axis
        return self.shapes[tensor][dim]

    def _part(self, name: str, axis: Axis) -> float:
        """How much of an axis is a multiple of a number, by the change that another value makes."""
        other, made = self._with_another[name]
        (tensor, dim), number = axis, self.numbers[name]
        if len(made.shapes[tensor]) != len(self.shapes[tensor]):
            return math.nan
        return (made.shapes[tensor][dim] - self.shapes[tensor][dim]) * number / (other - number)

    def expressing(self, wanted: Shapes, path: str = "") -> Iterator[Numbers]:
        """The numbers with which a model has these sizes, nothing where none do.

        Those first that change the fewest, and fewest that the configuration does not say.

        A number that alone says a size, the others being known, is found from that size; of others all values are
        tried that a size which they say could stand for. With the path of a module, only the sizes within it count.
        """
        wanted = _within(wanted, path)
        if wanted.keys() != _within(self.shapes, path).keys():
            return
        known, unknown = self._told(wanted)
        choices = [
            (name, [self.numbers[name], *values])
            for name in unknown
            if (values := self._candidates(name, known, wanted))
        ]
        ways = itertools.islice(itertools.product(*(values for _, values in choices)), _WAYS)
        changed = [{name: v for (name, values), v in zip(choices, way, strict=True) if v != values[0]} for way in ways]
        for more in sorted(changed, key=lambda way: (len(way), len(way.keys() & self._unsaid.keys()))):
            numbers = self._unsaid | known | more
            if self._gives(numbers, wanted, path):
                yield self._said(numbers, wanted, path)

    def _gives(self, numbers: Numbers, wanted: Shapes, path: str) -> bool:
        shapes = self.built(numbers)
        return shapes is not None and _within(shapes, path) == wanted

    def _said(self, numbers: Numbers, wanted: Shapes, path: str) -> Numbers:
        """Without what follows from the others, as it did before."""
        for name in self._unsaid:
            rest = {key: value for key, value in numbers.items() if key != name}
            if self._gives(rest, wanted, path):
                numbers = rest
        return numbers

    def _told(self, wanted: Shapes) -> tuple[Numbers, list[str]]:
        """The numbers that changed and that sizes tell alone, one after the other; and those that are told by none."""
        known: Numbers = {}
        unknown = [name for name, axes in self.followers.items() if any(tensor in wanted for tensor, _ in axes)]
        while True:
            told = next(filter(None, (self._told_alone(name, unknown, known, wanted) for name in unknown)), None)
            if told is None:
                return known, unknown
            name, value = told
            unknown.remove(name)
            if value != self.numbers[name]:
                known[name] = value

    def _told_alone(
        self, name: str, unknown: Collection[str], known: Numbers, wanted: Shapes
    ) -> tuple[str, Number] | None:
        """A number with its value, where sizes that follow from no other unknown one are what it says."""
        others = frozenset[Axis]().union(*(self.followers[other] for other in unknown if other != name))
        alone = [(tensor, axis) for tensor, axis in sorted(self.followers[name] - others) if tensor in wanted]
        for value in self._values(name, alone[:1], known, wanted):
            shapes = self.built(self._unsaid | known | {name: value})
            if shapes and all(shapes[tensor][axis] == wanted[tensor][axis] for tensor, axis in alone):
                return name, value
        between = self._between(name, alone, known, wanted)
        return None if between is None else (name, between)

    def _between(self, name: str, axes: Sequence[Axis], known: Numbers, wanted: Shapes) -> Number | None:
        """A fraction that sizes are rounded products of, in as few digits as give them; found by halving."""
        if type(self.numbers[name]) is not float or not axes:
            return None

        def beyond(value: float) -> int:
            """Whether sizes are larger (1) than wanted, or smaller (-1)."""
            shapes = self.built(self._unsaid | known | {name: value})
            if shapes is None:
                return -1
            differences = [shapes[tensor][axis] - wanted[tensor][axis] for tensor, axis in axes]
            return 1 if max(differences) > 0 else -1 if min(differences) < 0 else 0

        low, high = 0.0, 2.0 * self.numbers[name]
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            side = beyond(middle)
            if side == 0:
                shorter = (round(middle, digits) for digits in range(2, 6))
                return next((value for value in shorter if value > 0 and beyond(value) == 0), middle)
            low, high = (low, middle) if side > 0 else (middle, high)
        return None

    def _candidates(self, name: str, known: Numbers, wanted: Shapes) -> list[Number]:
        """What a number may be, by how the sizes that follow from it changed."""
        axes = [axis for axis in self.followers[name] if axis[0] in wanted]
        return [value for value in self._values(name, axes, known, wanted) if value != self.numbers[name]]

    def _values(self, name: str, axes: Collection[Axis], known: Numbers, wanted: Shapes) -> list[Number]:
        """What a number would have to be for each of some axes, in proportion, and by the change that another makes."""
        number, (other, _) = self.numbers[name], self._with_another[name]
        base, changed = self.built(self._unsaid | known), self.built(self._unsaid | known | {name: other})
        if base is None or changed is None:
            return []
        steps = {(base[tensor][axis], changed[tensor][axis], wanted[tensor][axis]) for tensor, axis in axes}
        values = {number + (new - old) * (other - number) / (moved - old) for old, moved, new in steps if moved != old}
        values |= {number * new / old for old, moved, new in steps if moved != old}
        return sorted({found for value in values if value > 0 for found in self._valued(name, value)})

    def _valued(self, name: str, value: float) -> list[Number]:
        """A number as its class takes it: whole, or a fraction, or one a little larger, whose products are cut."""
        near = round(value)
        if abs(value - near) < 1e-9 * max(near, 1):
            return [near if type(self.numbers[name]) is int else float(near)] if near else []
        return [value, value * _ABOVE] if self._takes_fractions(name) else []

    def _takes_fractions(self, name: str) -> bool:
        """Whether a number may be a fraction."""
        return (
            type(self.numbers[name]) is float or self.built(self._unsaid | {name: self.numbers[name] + 0.5}) is not None
        )


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


def _placed(shapes: Shapes, path: str) -> Shapes:
    """Those of the module of a path, by their names in the model."""
    return {f"{path}.{name}": shape for name, shape in shapes.items()} if path else shapes


def is_within(tensor: str, path: str) -> bool:
    """Whether a tensor is one of a module, or of the modules in it."""
    return not path or tensor.startswith(f"{path}.")


def _numbers_called(model: nn.Module, name: str) -> list[int]:
    values = {vars(module).get(name) for module in model.modules()}
    return sorted(value for value in values if type(value) is int)


def unread_tensors(model: nn.Module, graphs: Iterable[fx.Graph]) -> set[str]:
    """The names of a model's tensors that these graphs of it read under none of their names.

    Of buffers those of layers that have parameters too: tables of numbers are read in ways that no graph shows.
    """
    tensors = tensors_of(model)
    layers = {name.rpartition(".")[0] for name, _ in model.named_parameters(remove_duplicate=False)}
    read = {str(node.target) for graph in graphs for node in graph.find_nodes(op="get_attr")}
    same = {id(tensors[name]) for name in read & tensors.keys()}
    return {
        name
        for name in sizes_of(model)
        if name not in read and id(tensors.get(name)) not in same and name.rpartition(".")[0] in layers
    }


def sizes_of(model: nn.Module) -> Shapes:
    """The sizes of a model's tensors, by every name; of weights under weight norms those of the weights."""
    found = {name: tuple(tensor.shape) for name, tensor in tensors_of(model).items()}
    for name in list(found):
        if name.endswith(_DIRECTION) and name.removesuffix("1") + "0" in found:
            path, _, weight = name.removesuffix(_DIRECTION).rpartition("parametrizations.")
            del found[name.removesuffix("1") + "0"]
            found[path + weight] = found.pop(name)
    return found
