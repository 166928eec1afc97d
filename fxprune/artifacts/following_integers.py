"""Integers of a shrunk model's modules that no traced call shows: its class says what they are with these sizes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Mapping
from typing import Any

from torch import nn

from fxprune.channels.registry import REGISTRY
from fxprune.graph.configuration_numbers import Number
from fxprune.graph.configurations import Attribute, Configuration, Shapes, differing, is_within

_TRIED = 3  # ways to say the same sizes of a module


class Integers:
    """The integers of a shrunk model's modules that its class computes from its configuration.

    How many query heads share a key-value head, say, is read with a mask alone. Only integers are set that are in the
    model what its class makes of its configuration, and only where the model computes afterwards what it did.
    """

    def __init__(self, written: nn.Module, configuration: Configuration, is_unchanged: Callable[[], bool]) -> None:
        """`written`: the shrunk model. `is_unchanged`: whether it still computes what it did, found by running it."""
        self._configuration, self._is_unchanged = configuration, is_unchanged
        self._modules = dict(written.named_modules())
        self._before = self._as_the_class_makes_them()

    def _as_the_class_makes_them(self) -> dict[Attribute, int]:
        """Those that follow from a number, but for those of torch's layers, with their values in the model."""
        made = self._configuration.made({})
        dense, following = self._configuration.modules, self._configuration.following_integers.values()
        return {
            (path, name): value
            for (path, name), value in ({} if made is None else made.integers).items()
            if path in dense.keys() & self._modules.keys()
            and vars(dense[path]).get(name) == value
            and any((path, name) in attributes for attributes in following)
            and name not in REGISTRY.module_sizes(dense[path])
        }

    def agree_with(self, numbers: Mapping[str, Number]) -> bool:
        """Set them to what the class makes of these numbers, where the model computes what it should then."""
        return self._configuration.made(numbers) is not None and self._hold(self._new(numbers, self._modules))

    def follow_in_parts(self, wanted: Shapes) -> list[str]:
        """Set those of each module to what its class makes of numbers that say the sizes within it.

        Returns:
            The attributes that may follow from sizes that changed where no numbers say these, nor a call shows them.
        """
        before = self._configuration.shapes
        wanted = {name: wanted.get(name, shape) for name, shape in before.items()}  # a bias that is new says nothing
        changed = set(differing(before, wanted))
        unknown: list[Attribute] = []
        for path in dict.fromkeys(path for path, _ in self._before):
            within = {axis for axis in changed if is_within(axis[0], path)}
            following = {
                attribute
                for number, attributes in self._configuration.following_integers.items()
                if self._configuration.followers[number] & within
                for attribute in attributes & self._before.keys()
                if attribute[0] == path
            }
            if not following:
                continue
            ways = itertools.islice(self._configuration.expressing(wanted, path), _TRIED)
            if not any(self._set(numbers, {path}) for numbers in ways):
                stayed = {size for name, shape in wanted.items() if is_within(name, path) for size in shape}
                unknown += sorted(key for key in following if self._before[key] not in stayed and self._is_open(key))
        return [".".join(filter(None, attribute)) for attribute in unknown]

    def _set(self, numbers: Mapping[str, Number], paths: Collection[str]) -> bool:
        """Give those of some modules the values for some numbers; False, and none of them, where results change."""
        new = {key: value for key, value in self._new(numbers, paths).items() if value != self._value(key)}
        return self._configuration.made(numbers) is not None and (not new or self._hold(new))

    def _new(self, numbers: Mapping[str, Number], paths: Collection[str]) -> dict[Attribute, int]:
        """What the class makes of those of some modules with some numbers."""
        made = self._configuration.made(numbers)
        integers = {} if made is None else made.integers
        return {key: integers[key] for key in self._before if key[0] in paths and key in integers}

    def _hold(self, new: Mapping[Attribute, int]) -> bool:
        """Give integers these values; False, and those of before, where the model computes something else then."""
        kept = {key: self._value(key) for key in new}
        for key, value in new.items():
            self._put(key, value)
        if self._computes_the_same():
            return True
        for key, value in kept.items():
            self._put(key, value)
        return False

    def _is_open(self, attribute: Attribute) -> bool:
        """Whether an integer is as it was, and could be another one for all that the call shows."""
        value = self._value(attribute)
        if value != self._before[attribute]:
            return False
        self._put(attribute, 2 * value + 1)
        is_open = self._computes_the_same()
        self._put(attribute, value)
        return is_open

    def _computes_the_same(self) -> bool:
        try:
            return self._is_unchanged()
        except Exception:  # the user's code may raise anything for numbers that do not fit
            return False

    def _value(self, attribute: Attribute) -> Any:
        path, name = attribute
        return vars(self._modules[path]).get(name)

    def _put(self, attribute: Attribute, value: Any) -> None:
        path, name = attribute
        setattr(self._modules[path], name, value)
