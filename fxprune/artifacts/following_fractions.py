"""Fractions that a class computes from a size, and multiplies by: what they change goes into weights beside them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from torch import Tensor, nn

from fxprune.errors import WriteBackError
from fxprune.graph.configuration_numbers import Number
from fxprune.graph.configurations import Configuration


def follow_fractions(
    written: nn.Module, configuration: Configuration, numbers: Mapping[str, Number], is_unchanged: Callable[[], bool]
) -> Callable[[], None]:
    """Give modules the fractions that their class makes of numbers, where a layer of theirs can make up for it.

    Attention that scales by head_dim ** -0.5 scales otherwise where heads are built narrower. The layer is found by
    trying: its weight and bias times the ratio, the model computes what it did.

    Args:
        written: the shrunk model. configuration: of the model as it was. numbers: that say the sizes now.
        is_unchanged: whether the model computes what it should, found by running it.

    Returns:
        What undoes it.
    """
    modules, undo = dict(written.named_modules()), list[Callable[[], None]]()
    worked: dict[tuple[type[nn.Module], str], str] = {}
    before, made = configuration.made({}), configuration.made(numbers)
    for (path, name), value in {} if before is None or made is None else before.floats.items():
        module, new = modules.get(path), made.floats.get((path, name), value) if made else value
        if module is None or not value or not new or new == value or vars(module).get(name) != value:
            continue
        likely = worked.get((type(module), name))
        for child, layer in sorted(_layers(module), key=lambda each: each[0] != likely):
            back = _exchange(module, name, new, layer)
            if _holds(is_unchanged):
                worked[type(module), name] = child
                undo.append(back)
                break
            back()

    def take_back() -> None:
        for step in reversed(undo):
            step()

    return take_back


def _layers(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The layers with weights that a module holds itself."""
    for name, child in module.named_children():
        if isinstance(getattr(child, "weight", None), Tensor):
            yield name, child


def _exchange(module: nn.Module, name: str, new: float, layer: nn.Module) -> Callable[[], None]:
    """Set a fraction, and scale a layer by what it was over what it is; returns what undoes it."""
    value = vars(module)[name]
    held = [(parameter, parameter.data) for parameter in layer.parameters(recurse=False)]
    for parameter, data in held:
        parameter.data = data * (value / new)
    setattr(module, name, new)

    def back() -> None:
        setattr(module, name, value)
        for parameter, data in held:
            parameter.data = data

    return back


def _holds(is_unchanged: Callable[[], bool]) -> bool:
    try:
        return is_unchanged()
    except (RuntimeError, WriteBackError):
        return False
