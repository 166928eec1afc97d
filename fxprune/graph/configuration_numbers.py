"""The numbers of a configuration by their names: reading them, and putting others in their place."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import nn

Number: TypeAlias = "int | float"
Numbers: TypeAlias = "dict[str, Number]"
# an object of a configuration, the name of a value in it, whether it had one of that name, and what it was
Before = tuple[Any, str, bool, Any]
UNSAID = "head_dim"  # which many classes read, if it is there
TOGETHER = " and "  # between the names of numbers that change together


class Keywords:
    """The keywords that a class was called with, which its instances keep in a mapping, as those of diffusers do."""

    def __init__(self, config: Mapping[str, Any], names: Collection[str]) -> None:
        """`config`: what instances keep. `names`: of the parameters of the class."""
        vars(self).update({name: copy.deepcopy(value) for name, value in config.items() if name in names})


def configuration_of(model: nn.Module) -> Any:
    """A copy of what a model was built from: its configuration, or the keywords; None where neither is known."""
    config = getattr(model, "config", None)
    if getattr(type(model), "config_class", None) is not None and hasattr(config, "to_dict"):
        return copy.deepcopy(config)
    if isinstance(config, Mapping) and hasattr(model, "register_to_config"):
        return Keywords(config, inspect.signature(type(model).__init__).parameters)
    return None


def build(kind: type[nn.Module], config: Any) -> nn.Module:
    """A model of a class from what `configuration_of` gives."""
    return kind(**vars(config)) if isinstance(config, Keywords) else kind(config)


def refusal(config: Any) -> str | None:
    """Why transformers neither saves nor loads a configuration, or one within it; None where it does."""
    parts = [config, *(value for value in vars(config).values() if hasattr(value, "to_dict"))]
    checks = [getattr(part, "validate_architecture", None) for part in parts]
    try:
        for check in filter(callable, checks):
            check()
    except (TypeError, ValueError, AttributeError) as error:  # numbers that do not fit
        return str(error).strip().rstrip(".")
    return None


def put_into(model: Any, numbers: Mapping[str, Number]) -> Callable[[], None]:
    """Set numbers of a model's configuration, by their names; returns what undoes it."""
    config = configuration_of(model)
    if not isinstance(config, Keywords):
        before = put_numbers(model.config, numbers)
        return lambda: put_back(before)
    put_numbers(config, numbers)
    earlier = dict(model.config)
    with torch.device("meta"):
        made: Any = build(type(model), config)
    changed = {name: value for name, value in made.config.items() if value != earlier.get(name)}
    model.register_to_config(**changed)

    def undo() -> None:
        model.register_to_config(**earlier)

    return undo


def entries(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The values of a configuration and of those within it by name, lists of other things than numbers left out."""
    unsaid = {} if hasattr(config, UNSAID) else {UNSAID: None}  # else it is there under another name
    for name, value in (unsaid | vars(config)).items():
        if name.startswith("_"):
            continue
        if hasattr(value, "to_dict"):
            yield from entries(value, f"{prefix}{name}.")
        elif not isinstance(value, list | tuple) or all(type(entry) in (int, float) for entry in value):
            yield f"{prefix}{name}", value


def put_numbers(config: Any, numbers: Mapping[str, Number]) -> list[Before]:
    """Set numbers of a configuration, by their names; returns what they were, for `put_back`."""
    before: list[Before] = []
    for name, value in ((name, value) for names, value in numbers.items() for name in names.split(TOGETHER)):
        *path, last = name.split(".")
        entry = int(last) if last.isdecimal() else None  # of a list
        last = last if entry is None else path.pop()
        holder = config
        for part in path:
            holder = getattr(holder, part)
        own = vars(holder).get(last)
        before.append((holder, last, last in vars(holder), own))
        if entry is not None:
            assert isinstance(own, list | tuple)
            setattr(holder, last, type(own)(value if i == entry else other for i, other in enumerate(own)))
        else:
            setattr(holder, last, value)
    return before


def put_back(before: Sequence[Before]) -> None:
    """Undo `put_numbers`."""
    for holder, name, was_there, value in reversed(before):
        if was_there:
            setattr(holder, name, value)
        else:
            delattr(holder, name)
