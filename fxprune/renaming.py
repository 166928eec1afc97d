"""Options that have another name now: code that uses the old one runs on, without a warning that it would end in."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

from fxprune.errors import ArgumentTypeError

Called = TypeVar("Called", bound=Callable[..., Any])


def renamed(old: str, new: str, converted: Callable[[Any], Any] = lambda value: value) -> Callable[[Called], Called]:
    """A decorator of a function or a class that takes the option `new` under its name of before, too.

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
            target.__init__ = wrapped(target.__init__, target.__name__)  # type: ignore[misc]
            return target
        called: Called = wrapped(target, target.__name__)
        return called

    def wrapped(function: Any, name: str) -> Any:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if old in kwargs:
                if new in kwargs:
                    raise ArgumentTypeError(f"{name} was given {new} and {old}, its name of before. Leave {old} out.")
                kwargs[new] = converted(kwargs.pop(old))
            return function(*args, **kwargs)

        return call

    return decorate
