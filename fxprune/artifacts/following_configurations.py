"""The configuration of a model that was written back: numbers that say the sizes which it has now."""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch.utils._pytree as pytree
from torch import Tensor, nn

from fxprune.artifacts.following_integers import Integers
from fxprune.errors import ConfigurationWarning
from fxprune.graph.arguments import Arguments
from fxprune.graph.configurations import Axis, Configuration, Shapes, put_back, put_numbers, sizes_of
from fxprune.graph.equality import close
from fxprune.reports import first_of

_TRIED = 3  # ways to say the same sizes


def sizes_as_configured(written: nn.Module, configuration: Configuration, difference: Callable[[], float]) -> bool:
    """Give the configuration of a shrunk model, and its modules' integers, numbers that say the sizes which it has now.

    What modules read from a configuration that they share is found in no other way.

    Args:
        written: the shrunk model, in eval mode. configuration: of the model as it was.
        difference: between outputs of `written` and those wanted, found by running it; 0.0 where there is none.

    Returns:
        Whether it computes what it should then; else it is as it was.
    """
    now = sizes_of(written)
    wanted = {name: now.get(name, shape) for name, shape in configuration.shapes.items()}  # a new bias says nothing
    if wanted == configuration.shapes:
        return False
    integers = Integers(written, configuration, lambda: not difference())
    for numbers in itertools.islice(configuration.expressing(wanted), _TRIED):
        before = put_numbers(written.config, numbers)
        if integers.agree_with(numbers):
            return True
        put_back(before)
    return False


def follow_configuration(written: nn.Module, found: Configuration, inputs: Arguments) -> None:
    """Give the configuration of a shrunk model the numbers that its class makes the same model of.

    The integers of its modules that the class computes from these numbers follow, whether a call with these inputs
    reads them or not.

    Args:
        written: the shrunk model, in eval mode. found: of the model as it was. inputs: of a call.

    Warns:
        ConfigurationWarning: there are none, or the model that is built with them computes something else.
    """
    wanted, model = sizes_of(written), found.model
    if wanted == found.shapes:
        return
    outputs = _outputs(written, inputs)
    integers = Integers(written, found, lambda: _same(outputs, _outputs(written, inputs)))
    ways = list(itertools.islice(found.expressing(wanted), _TRIED))
    if not ways:
        _warn(written, _unsaid(found, wanted), integers.follow_in_parts(wanted))
        return
    numbers = next((way for way in ways if _same(outputs, _outputs(_rebuilt(written, model, way), inputs))), None)
    if numbers is None:
        said = ", ".join(f"{name}={value}" for name, value in ways[0].items())
        why = f"with {said} its class makes a model of these sizes that computes something else"
        _warn(written, why, integers.follow_in_parts(wanted))
        return
    before = put_numbers(written.config, numbers)
    if not _same(outputs, _outputs(written, inputs)):  # a number that forward reads, and that is another one there
        put_back(before)
        why = "its forward reads numbers of the configuration that would have to change"
        _warn(written, why, integers.follow_in_parts(wanted))
        return
    integers.follow(numbers)


def _rebuilt(written: nn.Module, model: nn.Module, numbers: Mapping[str, int]) -> nn.Module:
    """A model of the configuration with other numbers, and with the weights of what was written back."""
    config: Any = copy.deepcopy(model.config)
    put_numbers(config, numbers)
    rebuilt: nn.Module = type(written)(config)
    parameter = next(written.parameters())
    rebuilt.to(dtype=parameter.dtype, device=parameter.device)
    rebuilt.load_state_dict(written.state_dict())
    return rebuilt.eval()


def _outputs(model: nn.Module, inputs: Arguments) -> list[Tensor]:
    args, kwargs = copy.deepcopy(inputs)
    return [leaf for leaf in pytree.tree_leaves(model(*args, **kwargs)) if isinstance(leaf, Tensor)]


def _same(wanted: list[Tensor], found: list[Tensor]) -> bool:
    if [tensor.shape for tensor in wanted] != [tensor.shape for tensor in found]:
        return False
    return all(close(a, b) for a, b in zip(wanted, found, strict=True))


def _unsaid(found: Configuration, wanted: Shapes) -> str:
    """Which sizes no number says: those that one number gives and that became unequal, and those that none does."""
    told = []
    changed = {
        (name, axis)
        for name, shape in found.shapes.items()
        for axis, size in enumerate(shape)
        if wanted.get(name, shape)[axis] != size
    }
    for number, axes in found.followers.items():
        ratios = {axis: wanted[axis[0]][axis[1]] / found.shapes[axis[0]][axis[1]] for axis in axes}
        if axes & changed and len(set(ratios.values())) > 1:
            told.append(f"{number} gives {_two(ratios, wanted)}")
    return first_of(told, 2) if told else f"no number of it gives {first_of(sorted({name for name, _ in changed}), 2)}"


def _two(ratios: dict[Axis, float], wanted: Shapes) -> str:
    """Two axes that should have changed alike."""
    least, most = (pick(sorted(ratios), key=lambda axis: ratios[axis]) for pick in (min, max))
    return " and ".join(f"{name} ({wanted[name][axis]} in axis {axis})" for name, axis in (least, most))


def _warn(written: nn.Module, why: str, unknown: list[str]) -> None:
    attributes = ""
    if unknown:
        attributes = (
            f" {first_of(unknown, 3)} may have to change with the sizes there, and nothing says to what: calls of "
            "another form than the one that was traced could fail."
        )
    warnings.warn(
        f"config cannot say the sizes of this {type(written).__name__}: {why}. It runs, and trains on, but "
        "from_pretrained could not build it: store the module that finalize returned by fxprune.save(final, path), and "
        "restore the model by fxprune.write_back(fxprune.load(path), model). Channels chosen with "
        f"fxprune.prune.channels(traced, ..., runnable=model) keep to what a configuration can say.{attributes}",
        ConfigurationWarning,
        stacklevel=4,
    )
