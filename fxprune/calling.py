"""Calls that do not fit a function's arguments: what was given, what is meant, the form of the call, old names."""

from __future__ import annotations

import functools
import inspect
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any, NoReturn, ParamSpec, TypeVar, cast

from fxprune.errors import ArgumentTypeError, FxpruneError
from fxprune.progress import take_work, working

Given = ParamSpec("Given")
Result = TypeVar("Result")
Called = TypeVar("Called", bound=Callable[..., Any])
_STARS: Mapping[object, str] = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
_SHOWN = 6  # of the options of a function
_CURE = "__when_called__"


def named_arguments(function: Callable[Given, Result]) -> Callable[Given, Result]:
    """A decorator: where Python cannot bind a call, ArgumentTypeError says how the function is called.

    Example:
        >>> @named_arguments
        ... def clip(optimizer, *, max_norm=None): ...
        >>> clip(optimizer, 1.0)
        Traceback (most recent call last):
        fxprune.errors.ArgumentTypeError: clip was called with 2 arguments by position: too many positional arguments.
        It is called clip(optimizer, *, max_norm=None).
    """
    return _checked(function)


def renamed(old: str, new: str, converted: Callable[[Any], Any] = lambda value: value) -> Callable[[Called], Called]:
    """As `named_arguments`, of a function or a class that takes the option `new` under its name of before, too.

    Code that uses the old name runs on, without a warning that it would end in.

    Args:
        old: the name of before, which the signature does not show.
        new: the name that the function has.
        converted: from a value as it was given to the value that is taken now.

    The function raises ArgumentTypeError where it is given both.

    Example:
        >>> @renamed("check", "verify")
        ... def remove(traced, *, verify=True): ...
    """

    def decorate(target: Called) -> Called:
        if isinstance(target, type):
            target.__init__ = _checked(target.__init__, current)  # type: ignore[misc]
            return target
        return cast(Called, _checked(target, current))

    def current(name: str, kwargs: dict[str, Any]) -> None:
        if old in kwargs:
            if new in kwargs:
                name = name.rpartition(".")[2]
                raise ArgumentTypeError(f"{name} was given {new} and {old}, its name of before. Leave {old} out.")
            kwargs[new] = converted(kwargs.pop(old))

    return decorate


def _checked(
    function: Callable[Given, Result], current: Callable[[str, dict[str, Any]], None] = lambda name, kwargs: None
) -> Callable[Given, Result]:
    """The function with `named_arguments`; `current` brings the options of a call to their names of now."""
    signature = inspect.signature(function)
    name = function.__qualname__.removesuffix(".__init__")
    work = take_work(function)

    @functools.wraps(function)
    def call(*args: Given.args, **kwargs: Given.kwargs) -> Result:
        current(name, kwargs)
        try:
            if work is None:
                return function(*args, **kwargs)
            with working(work):
                return function(*args, **kwargs)
        except FxpruneError:
            raise
        except TypeError as error:
            if told := _misfit(name, signature, args, kwargs):
                raise ArgumentTypeError(told) from error
            raise

    return call


def spelled(function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
    """A call as text, of the options that text says, numbers, names and classes; without those of their default.

    The first argument, what names a file, and what is or holds data are left out: processes have their own.

    Example:
        >>> spelled(fxprune.prune.l1_unstructured, (traced, "0.weight"), {"amount": 0.3})
        "l1_unstructured(name='0.weight', amount=0.3)"
    """
    signature = inspect.signature(function)
    try:
        bound = signature.bind(*args, **kwargs).arguments
    except TypeError:  # which the function says itself
        return function.__name__
    given: dict[Any, Any] = {}
    for name, value in [*bound.items()][1:]:
        parameter = signature.parameters[name]
        given |= value if parameter.kind is inspect.Parameter.VAR_KEYWORD else {name: value}
    defaults = {name: _said(parameter.default) for name, parameter in signature.parameters.items()}
    said = {name: _said(value) for name, value in given.items() if name != "path"}
    said = {name: text for name, text in said.items() if text is not None and text != defaults.get(name)}
    return f"{function.__name__}({', '.join(f'{name}={text}' for name, text in said.items())})"


def _said(value: object) -> str | None:
    """A value as text that is the same in every process; None where there is none."""
    if isinstance(value, bool | int | float | complex | str):
        return repr(value)
    if isinstance(value, type):
        return value.__qualname__
    if isinstance(value, Mapping):
        said = {key: text for key, own in value.items() if (text := _said(own)) is not None}
        return f"{{{', '.join(f'{key}: {text}' for key, text in said.items())}}}" if said else None
    if isinstance(value, list | tuple | set | frozenset):
        each = [_said(own) for own in value]
        known = [own for own in each if own is not None]
        in_order = sorted(known) if isinstance(value, set | frozenset) else known
        return f"[{', '.join(in_order)}]" if known and len(known) == len(each) else None
    return None


def _misfit(name: str, signature: inspect.Signature, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
    """What is wrong with a call; empty where its arguments fit."""
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        parameters = [p for p in signature.parameters.values() if p.name != "self"]
        count = len(args) - ("self" in signature.parameters)
        given = [f"{count} argument{'' if count == 1 else 's'} by position", *(f"{key}=" for key in kwargs)]
        return (
            f"{name} was called with {', '.join(given)}: {error}.{_meant(parameters, kwargs)} "
            f"It is called {name}({_form(parameters)})."
        )
    return ""


def _meant(parameters: Sequence[inspect.Parameter], kwargs: Mapping[str, Any]) -> str:
    """The names that were meant by those that there are not."""
    names = [parameter.name for parameter in parameters]
    near = ([name for name in names if _is_near(key, name)] for key in kwargs if key not in names)
    meant = [found[0] for found in near if found]
    return f" Did you mean {', '.join(meant)}?" if meant else ""


def _is_near(key: str, name: str) -> bool:
    """Whether one name is within the other, begins as it does, or is the same but for a letter or two."""
    is_within = min(len(key), len(name)) >= 3 and (key in name or name in key)
    return is_within or key[:4] == name[:4] or bool(get_close_matches(key, [name], 1, 0.8))


def _form(parameters: Sequence[inspect.Parameter]) -> str:
    """The arguments of a function without their types; options behind the first few are left out."""
    parts: list[str] = []
    behind_star = False
    options = 0
    for parameter in parameters:
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
            if not behind_star and not any(part.startswith("*") for part in parts):
                parts.append("*")
            behind_star = True
            options += 1
            if options > _SHOWN:
                return ", ".join([*parts, "..."])
        star = _STARS.get(parameter.kind, "")
        default = "" if parameter.default is inspect.Parameter.empty else f"={parameter.default!r}"
        parts.append(f"{star}{parameter.name}{default}")
    return ", ".join(parts)


class Room(types.ModuleType):
    """A module that has the name of what is done in it, and is called for one of its functions by mistake."""

    def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raises ArgumentTypeError, which says what to call."""
        raise ArgumentTypeError(f"{self.__name__} was called, which is a module. {vars(self)[_CURE]}")


def is_no_function(name: str, cure: str) -> None:
    """Let a module say what to call where it is called itself.

    Args:
        name: its `__name__`.
        cure: the sentence to say.
    """
    module = sys.modules[name]
    vars(module)[_CURE] = cure
    module.__class__ = Room
