"""Calls that do not fit a function's arguments: what was given, what is meant, and the form of the call."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any, ParamSpec, TypeVar

from fxprune.errors import ArgumentTypeError, FxpruneError

Given = ParamSpec("Given")
Result = TypeVar("Result")
_STARS: Mapping[object, str] = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
_SHOWN = 6  # of the options of a function


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
    signature = inspect.signature(function)

    @functools.wraps(function)
    def call(*args: Given.args, **kwargs: Given.kwargs) -> Result:
        try:
            return function(*args, **kwargs)
        except FxpruneError:
            raise
        except TypeError as error:
            if told := _misfit(function.__qualname__, signature, args, kwargs):
                raise ArgumentTypeError(told) from error
            raise

    return call


def _misfit(name: str, signature: inspect.Signature, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
    """What is wrong with a call; empty where its arguments fit."""
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        name = name.removesuffix(".__init__")
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
