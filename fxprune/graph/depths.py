"""Models that are built from a configuration, with fewer modules in their lists: what of the configuration says that.

As for sizes, what a class makes of numbers is found by building it on the meta device.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import nn

from fxprune.graph.configuration_numbers import Keywords, build, configuration_of, refusal
from fxprune.graph.configurations import Shapes, is_within, sizes_of
from fxprune.graph.names import join

# path of a list of modules -> the numbers of entries that leave it
Gone: TypeAlias = "Mapping[str, frozenset[int]]"
_BY_LAYER = ("layer", "block")  # in the names of lists that have an entry for each


@dataclass(frozen=True)
class Renaming:
    """The names of what is left, where entries of lists of modules left and those behind them count anew.

    Example:
        >>> Renaming({"layers": frozenset({1})})("layers.2.weight")
        'layers.1.weight'
    """

    gone: Gone

    def __call__(self, name: str) -> str | None:
        """The new name of a module or of what it has; None for what left."""
        path, parts = "", []
        for part in name.split("."):
            left = self.gone.get(path, frozenset()) if part.isdecimal() else frozenset()
            if left and int(part) in left:
                return None
            parts.append(str(int(part) - sum(other < int(part) for other in left)) if left else part)
            path = f"{path}.{part}" if path else part
        return ".".join(parts)

    def of_keys(self, entries: Mapping[str, Any]) -> dict[str, Any]:
        """A mapping by names, by their new ones."""
        return {new: value for name, value in entries.items() if (new := self(name)) is not None}

    def of_names(self, names: Collection[str]) -> tuple[str, ...]:
        """The new names of what is left of these."""
        return tuple(new for name in names if (new := self(name)) is not None)


@dataclass(frozen=True)
class _Change:
    """A value of a configuration that counts the modules of a list, or a list of an entry for each.

    Attributes:
        path: of the object within the configuration that has it. name: of the value.
        entry: of a list of counts. is_list: whether the value is a list of an entry for each module.
    """

    path: tuple[str, ...]
    name: str
    entry: int | None = None
    is_list: bool = False

    def carried_out(self, config: Any, gone: frozenset[int]) -> None:
        """Change a configuration."""
        holder = config
        for part in self.path:
            holder = getattr(holder, part)
        value = vars(holder)[self.name]
        if self.is_list:
            value = type(value)(each for i, each in enumerate(value) if i not in gone)
        elif self.entry is None:
            value -= len(gone)
        else:
            value = type(value)(each - len(gone) * (i == self.entry) for i, each in enumerate(value))
        setattr(holder, self.name, value)


@dataclass(frozen=True)
class ShallowerPart:
    """What one class makes of its configuration with fewer modules.

    Attributes:
        path: of the module of this class in the model.
        gone: the entries that left lists within it. config: the configuration.
        before, made: modules on the meta device, of the configuration as it was and of `config`.
        more: the names of tensors that the class makes, and the module has not, as those of a pooler left out.
    """

    path: str
    gone: dict[str, frozenset[int]]
    config: Any
    before: nn.Module
    made: nn.Module
    more: frozenset[str]


@dataclass(frozen=True)
class Shallower:
    """What classes make of their configurations with fewer modules.

    Attributes:
        gone: the entries that left. parts: of each module that is built from a configuration and loses some.
    """

    gone: dict[str, frozenset[int]]
    parts: tuple[ShallowerPart, ...]


def shallower(model: nn.Module, gone: Gone) -> Shallower | None:
    """Configurations with which classes leave entries out of their lists, of these as many as can be.

    All else that a class makes has the sizes of before. Entries of a list leave together or not at all.

    Args:
        model: of a class that is built from its configuration, or with such modules in it.
        gone: by the path of a list, which entries leave it.

    Returns:
        None where none can be left out.
    """
    parts: list[ShallowerPart] = []
    outer: list[str] = []
    for path, module in model.named_modules() if gone else ():
        if any(is_within(path, other) for other in outer) or configuration_of(module) is None:
            continue
        outer.append(path)
        start = f"{path}." if path else ""
        own = {name.removeprefix(start): left for name, left in gone.items() if name.startswith(start)}
        part = _shallower_part(path, module, own) if own else None
        parts += [] if part is None else [part]
    found = {join(part.path, name): left for part in parts for name, left in part.gone.items()}
    return Shallower(found, tuple(parts)) if parts else None


def _shallower_part(path: str, model: nn.Module, gone: Gone) -> ShallowerPart | None:
    config, shapes = configuration_of(model), sizes_of(model)
    if isinstance(config, Keywords):
        return None
    before = _made(type(model), config)
    made = {} if before is None else sizes_of(before)
    if before is None or {name: shape for name, shape in made.items() if name in shapes} != shapes:
        return None
    found = ShallowerPart(path, {}, config, before, before, frozenset(made.keys() - shapes.keys()))
    alike: dict[tuple[int, frozenset[int]], list[str]] = {}
    for name, own in gone.items():
        found = _without(type(model), made, found, {name: own}) or found
        if name not in found.gone:  # one number may say it of several lists
            alike.setdefault((len(model.get_submodule(name)._modules), own), []).append(name)
    for (_, own), names in alike.items():
        if len(names) > 1:
            found = _without(type(model), made, found, dict.fromkeys(names, own)) or found
    return found if found.gone else None


def _without(kind: type[nn.Module], shapes: Shapes, found: ShallowerPart, more: Gone) -> ShallowerPart | None:
    """With more entries left out."""
    path, own = next(iter(more.items()))
    gone = {**found.gone, **more}
    wanted = Renaming(gone).of_keys(shapes)
    count = len(found.before.get_submodule(path)._modules)
    for changes in _ways(found.config, count):
        config = copy.deepcopy(found.config)
        try:
            for change in changes:
                change.carried_out(config, own)
            config = _reread(config)
        except Exception:  # the library's code may raise anything for numbers that do not fit
            continue
        made = None if refusal(config) is not None else _made(kind, config)
        if made is not None and sizes_of(made) == wanted:
            return replace(found, gone=gone, config=config, made=made)
    return None


def _ways(config: Any, count: int) -> Iterator[Sequence[_Change]]:
    """What could say that a list has so many modules, lists of an entry for each first."""
    for path, holder in _holders(config):
        numbers, lists = [], []
        for name, value in vars(holder).items():
            if name.startswith("_"):
                continue
            if type(value) is int and value == count:
                numbers.append(_Change(path, name))
            elif isinstance(value, list | tuple):
                numbers += [
                    _Change(path, name, i) for i, each in enumerate(value) if type(each) is int and each == count
                ]
                if len(value) == count:
                    lists.append(_Change(path, name, is_list=True))
        likely = [each for each in lists if any(part in each.name for part in _BY_LAYER)]
        ways = [[]] if not lists else [likely, lists, []] if likely else [[], lists]
        yield from ([number, *way] for number in numbers for way in ways)
        yield from ([*numbers, *way] for way in ways if len(numbers) > 1)
        yield from (way for way in ways if way)


def _reread(config: Any) -> Any:
    """A configuration as it comes back from a file."""
    read = getattr(type(config), "from_dict", None)
    return config if read is None else read(config.to_dict())


def _holders(config: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """A configuration and those within it."""
    yield path, config
    for name, value in vars(config).items():
        if not name.startswith("_") and hasattr(value, "to_dict"):
            yield from _holders(value, (*path, name))


def _made(kind: type[nn.Module], config: Any) -> nn.Module | None:
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return build(kind, copy.deepcopy(config))
    except Exception:  # the library's code may raise anything for numbers that do not fit
        return None


# ---- the attributes of modules


def follow_depth(model: nn.Module, found: Shallower) -> None:
    """Give a model of which entries left the names, the configuration and the attributes that its class gives then.

    Attributes are those that say how many modules a list has, or which of them a module is, and what follows from it:
    what the class makes of both configurations otherwise, and what is in the model as it makes it of the first.

    Args:
        model: a copy of the model, changed in place. found: what its class makes of it.
    """
    for part in found.parts:
        inner = model.get_submodule(part.path)
        modules = (dict(m.named_modules(remove_duplicate=False)) for m in (inner, part.before, part.made))
        own, before, made = modules
        renaming = Renaming(part.gone)
        for path, module in own.items():
            new = renaming(path)
            if new is not None and path in before and new in made:
                _follow(module, before[path], made[new])
        for path, left in part.gone.items():
            container = own[path]
            rest = [child for name, child in container._modules.items() if int(name) not in left]
            container._modules.clear()
            container._modules.update({str(i): child for i, child in enumerate(rest)})


def _follow(own: object, before: object, made: object) -> None:
    """Give an object's attributes the values that changed, where they had those of before."""
    mine, earlier = vars(own), vars(before)
    for name, value in vars(made).items():
        if name not in mine or name not in earlier or name.startswith("__"):
            continue
        if all(hasattr(each, "to_dict") for each in (mine[name], earlier[name], value)):
            _follow(mine[name], earlier[name], value)
        elif all(map(_is_plain, (mine[name], earlier[name], value))) and value != earlier[name] == mine[name]:
            mine[name] = copy.deepcopy(value)


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or type(value) in (bool, int, float, str)
