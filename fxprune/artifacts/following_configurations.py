"""The configuration of a model that was written back: numbers that say the sizes which it has now."""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch.utils._pytree as pytree
from torch import Tensor, nn

from fxprune.artifacts.following_fractions import follow_fractions
from fxprune.artifacts.following_integers import Integers
from fxprune.artifacts.rehearsal import Rehearsal
from fxprune.artifacts.restoring_norms import without_weight_norms
from fxprune.artifacts.unread_tensors import cut_unread
from fxprune.artifacts.working_copy import WorkingCopy
from fxprune.artifacts.zero_channels import ZeroChannels, lost_by_themselves
from fxprune.errors import ConfigurationWarning, WriteBackError
from fxprune.graph.arguments import Arguments
from fxprune.graph.configuration_numbers import Number, build, configuration_of, put_into, put_numbers, refusal
from fxprune.graph.configurations import Axis, Configuration, Shapes, sizes_of
from fxprune.graph.equality import close
from fxprune.reports import first_of

_TRIED = 3  # ways to say the same sizes


def sizes_as_configured(
    copied: WorkingCopy, configuration: Configuration, zeros: ZeroChannels, rehearsal: Rehearsal
) -> bool:
    """Give the configuration of a shrunk model, and its modules' integers, numbers that say the sizes which it has now.

    What modules read from a configuration that they share is found in no other way. The class must make the same model
    of the numbers. Channels that nobody chose come back as zeros where numbers say the sizes then.

    Tensors that no call reads are cut to what the class makes of them.

    Args:
        copied: the shrunk model, in eval mode. configuration: of the model as it was.
        zeros: the channels of the copy. rehearsal: runs it.

    Returns:
        Whether there are such numbers; else it is as it was.
    """
    written = copied.root
    integers = Integers(written, configuration, lambda: not rehearsal.difference())
    unchosen = lost_by_themselves(zeros.kept, copied.shapes, zeros.numbers, copied.plan.chosen)
    for channels in ({}, unchosen) if unchosen and copied.plan.chosen else ({},):
        with zeros.taken_back(channels) as filled:
            now = sizes_of(written)
            wanted = {name: now.get(name, shape) for name, shape in configuration.shapes.items()}
            if wanted == configuration.shapes:
                return False
            for numbers in itertools.islice(configuration.expressing(wanted), _TRIED):
                undo = put_into(written.get_submodule(configuration.path), numbers)
                with cut_unread(written, configuration, numbers) as cut:
                    if integers.agree_with(numbers):
                        back = follow_fractions(written, configuration, numbers, lambda: not rehearsal.difference())
                        if _is_made(written, configuration, numbers, rehearsal):
                            filled.keep()
                            cut.keep()
                            return True
                        back()
                undo()
    return False


def _is_made(
    written: nn.Module, configuration: Configuration, numbers: Mapping[str, Number], rehearsal: Rehearsal
) -> bool:
    """Whether the class makes the same model of numbers, given the weights."""
    config = configuration_of(configuration.model)
    put_numbers(config, numbers)
    own = written.get_submodule(configuration.path)
    parameter = next(own.parameters())
    try:
        rebuilt = build(type(own), config)
        without_weight_norms(rebuilt)
        rebuilt.to(dtype=parameter.dtype, device=parameter.device)
        if rebuilt.load_state_dict(own.state_dict(), strict=False).unexpected_keys:
            return False
        if own is written:
            return not rehearsal.difference(rebuilt.eval())
        with _instead(written, own, rebuilt.eval()):
            return not rehearsal.difference()
    except (RuntimeError, WriteBackError):
        return False


@contextmanager
def _instead(written: nn.Module, own: nn.Module, other: nn.Module) -> Iterator[None]:
    """Have another module in the place of one inside the block, wherever that is held."""
    held = [(m, name) for m in written.modules() for name, child in m.named_children() if child is own]
    try:
        for module, name in held:
            setattr(module, name, other)
        yield
    finally:
        for module, name in held:
            setattr(module, name, own)


def warn_of_refusal(written: nn.Module, found: Configuration) -> None:
    """Warn that transformers does not save the configuration of a shrunk model, where it saves that of the model.

    Warns:
        ConfigurationWarning: it does not, or several modules have one configuration and other sizes.
    """
    own = written.get_submodule(found.path)
    if found.path and Configuration.of(own, found.unread, path=found.path) is None:
        _warn(found, "another module of other sizes has the same one", [])
    why = refusal(configuration_of(own))
    if why is not None and refusal(configuration_of(found.model)) is None:
        _warn(found, f"save_pretrained refuses the one that does ({why})", [])


def warn_of_sizes(written: nn.Module, found: Configuration, inputs: Arguments) -> None:
    """Warn that no configuration gives the sizes of a shrunk model, where they are others than before.

    Integers of modules follow where numbers say the sizes of one.

    Args:
        written: the shrunk model, in eval mode. found: of the model as it was. inputs: of a call.

    Warns:
        ConfigurationWarning: there are no numbers that say them, or the class makes another model of these.
    """
    wanted = found.read(sizes_of(written))
    if wanted == found.shapes:
        return
    outputs = outputs_of(written, inputs)
    integers = Integers(written, found, lambda: same_outputs(outputs, outputs_of(written, inputs)))
    way = next(found.expressing(wanted), None)
    if way is None:
        why = _unsaid(found, wanted)
    else:
        said = ", ".join(f"{name}={value}" for name, value in way.items())
        why = f"with {said} its class makes a model of these sizes that computes something else"
    _warn(found, why, integers.follow_in_parts(wanted))


def outputs_of(model: nn.Module, inputs: Arguments) -> list[Tensor]:
    """The tensors that a model returns for copies of inputs."""
    args, kwargs = copy.deepcopy(inputs)
    return [leaf for leaf in pytree.tree_leaves(model(*args, **kwargs)) if isinstance(leaf, Tensor)]


def same_outputs(wanted: list[Tensor], found: list[Tensor]) -> bool:
    """Whether tensors are the same, to rounding."""
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
        there = [axis for axis in axes if axis[0] in wanted]
        ratios = {axis: wanted[axis[0]][axis[1]] / found.shapes[axis[0]][axis[1]] for axis in there}
        if axes & changed and len(set(ratios.values())) > 1:
            told.append(f"{number} gives {_two(ratios, wanted)}")
    return first_of(told, 2) if told else f"no number of it gives {first_of(sorted({name for name, _ in changed}), 2)}"


def _two(ratios: dict[Axis, float], wanted: Shapes) -> str:
    """Two axes that should have changed alike."""
    least, most = (pick(sorted(ratios), key=lambda axis: ratios[axis]) for pick in (min, max))
    return " and ".join(f"{name} ({wanted[name][axis]} in axis {axis})" for name, axis in (least, most))


def _warn(found: Configuration, why: str, unknown: list[str]) -> None:
    attributes = ""
    if not found.by_keywords:
        attributes = (
            " Channels chosen with fxprune.prune.channels(traced, ..., runnable=model) keep to what a "
            "configuration can say."
        )
    if unknown:
        attributes += (
            f" {first_of(unknown, 3)} may have to change with the sizes there, and nothing says to what: calls of "
            "another form than the one that was traced could fail."
        )
    place = f" ({found.path})" if found.path else ""
    warnings.warn(
        f"config cannot say the sizes of this {type(found.model).__name__}{place}: {why}. It runs, and trains on, but "
        "from_pretrained could not build it: store the module that finalize returned by fxprune.save(final, path), and "
        "restore the model by fxprune.write_back(fxprune.load(path), model)."
        f"{attributes}",
        ConfigurationWarning,
        stacklevel=5,
    )
