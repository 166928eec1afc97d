"""What a model's own class asked for when choices of channels were tried in it: parts alike, and channels that stay.

A class computes sizes in its own ways, and nothing says how but running it. So a choice is finalized and written back;
where that fails, the module that fails, and all of its kind, get less freedom, and channels are chosen again. So do
modules that run with zeros in place of channels alone, by the first two steps. Freedom goes step by step:

(1) parts of one place and size that calls in the module cut axes into, or else groups of one size within it, lose
    equally many channels: an attribute may say the size of all of them;
(2) groups within it stay as they are;
(3) so do those that it shares with others, as the width of a stream;
(4) the same for the module around it.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import fx, nn

from fxprune import driver
from fxprune.artifacts.writing_back import written_with_zeros
from fxprune.channels.groups import ChannelGroup, Grouping
from fxprune.channels.ids import Vector
from fxprune.channels.values import Value
from fxprune.errors import ConfigurationWarning, PruningError, WriteBackError
from fxprune.graph.configurations import Builds
from fxprune.graph.metadata import module_path
from fxprune.graph.names import parameter_count
from fxprune.graph.traced import TracedModule
from fxprune.prune.configured_levels import Level
from fxprune.prune.trials import masked_copy
from fxprune.reports import first_of

_WHY = "{} ({}) does not run, or computes something else, with fewer of them"
_TIE, _HOLD, _HOLD_SHARED = range(3)
_SPLITS = ("aten.chunk.default", "aten.split.Tensor", "aten.split_with_sizes.default")


def parts_of_axes(grouping: Grouping) -> Iterator[tuple[fx.Node, list[Vector]]]:
    """The calls that cut an axis of channels into parts, and the classes of each part."""
    walk = grouping.found.walks["eval"]
    for node in walk.graph.nodes:
        if str(node.target) not in _SPLITS:
            continue
        values = walk.env[node]
        dim = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim", 0)
        if not isinstance(values, list) or not all(isinstance(value, Value) for value in values):
            continue
        axes = [value.axes[dim] for value in values if isinstance(value, Value)]
        ids = [axis.ids for axis in axes if len(axis) == 1]
        classes = [grouping.found.of(own) for own in ids if own is not None]
        if len(classes) == len(values):
            yield node, classes


def failure_in_class(
    traced: TracedModule,
    masks: Mapping[str, torch.Tensor],
    decided: Collection[tuple[str, int]],
    limits: ClassLimits,
) -> WriteBackError | None:
    """Why the class of a model does not run with what these masks leave, None where it does."""
    model = limits.model
    candidate = masked_copy(traced, masks, decided)
    with warnings.catch_warnings(record=True) as said:  # what they say is said again when it is done
        warnings.simplefilter("always")
        try:
            final = driver.finalize(candidate)
            written, filling_up, cause = written_with_zeros(final, model, limits.builds)
        except WriteBackError as failure:
            return failure
    if not filling_up:
        unsaid = [str(each.message) for each in said if issubclass(each.category, ConfigurationWarning)]
        return WriteBackError(unsaid[0], runs=True) if unsaid and limits.is_configured else None
    if parameter_count(written) >= parameter_count(model) > parameter_count(final):
        return WriteBackError("everything came back as zeros.", [*cause, *filling_up])
    return WriteBackError(f"{first_of(filling_up, 3)} took channels back as zeros.", filling_up, runs=True)


@dataclass
class ClassLimits:
    """What is known of a class so far.

    Attributes:
        model: of that class.
        alike: classes [rows, n] of which every choice leaves each row equally many.
        staying: by axis of a parameter, why its channels stay.
        levels: the only choices that there are, where its configuration says all widths by one number.
        is_configured: whether its configuration is to say what is left.
        doubtful: numbers of it that may not say all that is chosen, in the order in which they are left out.
        left_out: numbers of it that are to stay.
        builds: what the class made of other configurations.
    """

    model: nn.Module
    alike: list[Vector] = field(default_factory=list)
    staying: dict[tuple[str, int], str] = field(default_factory=dict)
    levels: list[Level] = field(default_factory=list)
    is_configured: bool = False
    doubtful: list[str] = field(default_factory=list)
    left_out: set[str] = field(default_factory=set)
    builds: Builds = field(default_factory=Builds)
    _taken: set[tuple[tuple[str, ...], int]] = field(default_factory=set)

    def limited(self, groups: Sequence[ChannelGroup]) -> list[ChannelGroup]:
        """The groups, those that must stay with the reason, and last."""
        reasons = [self._reason(group) for group in groups]
        blocks = {g.block: why for g, why in zip(groups, reasons, strict=True) if why and g.block >= 0}
        found = [
            g if g.reason else replace(g, reason=why or blocks.get(g.block))
            for g, why in zip(groups, reasons, strict=True)
        ]
        return sorted(found, key=lambda group: group.reason is not None)

    def _reason(self, group: ChannelGroup) -> str | None:
        return next((why for m in group.members if (why := self.staying.get((m.parameter, m.axis)))), None)

    def learn(self, grouping: Grouping, picked: Sequence[ChannelGroup], failure: WriteBackError) -> None:
        """Take the next step for the module that failed; `picked` are the groups that were to be pruned.

        Where the configuration cannot say what was chosen, a number that may be the cause is left out.

        Raises:
            PruningError: nothing is left that could be asked for.
        """
        if failure.runs and not failure.places and self.doubtful:  # it runs as it is
            self.left_out.add(self.doubtful[0])
            return
        for place in failure.places if failure.runs else self._outwards(failure.places):
            kin = self._kin(place)
            for step in (_TIE, _HOLD) if failure.runs else (_TIE, _HOLD, _HOLD_SHARED):
                if (kin, step) in self._taken:
                    continue
                self._taken.add((kin, step))
                if self._take(step, kin, grouping, picked):
                    return
        raise PruningError(
            f"no channels were found without which {type(self.model).__name__} runs: {failure} Leave runnable out "
            "where the model need not come back into its class."
        ) from failure

    def _outwards(self, places: Sequence[str]) -> Iterator[str]:
        """The paths of modules, then those around them."""
        current = dict.fromkeys(places)
        while current:
            yield from current
            current = dict.fromkeys(path.rpartition(".")[0] for path in current if path)

    def _kin(self, place: str) -> tuple[str, ...]:
        """The paths of the modules of one kind: of the class, those of torch also of the same name and surroundings."""
        kind = self._kind(place)
        paths = [path for path, _ in self.model.named_modules(remove_duplicate=False)]
        return tuple(path for path in paths if self._kind(path) == kind)

    def _kind(self, path: str) -> tuple[object, ...]:
        module = self.model.get_submodule(path)
        bases = [base for base in type(module).__mro__ if base not in (nn.Module, object)]
        if not path or not any(base.__module__.startswith("torch.") for base in bases):
            return (type(module),)
        around, _, name = path.rpartition(".")
        return type(module), type(self.model.get_submodule(around)), "" if name.isdigit() else name

    def _take(self, step: int, kin: Sequence[str], grouping: Grouping, picked: Sequence[ChannelGroup]) -> bool:
        """Ask for less freedom of some modules; returns whether any of it was there."""
        taken, parts = False, list(parts_of_axes(grouping)) if step == _TIE else []
        for path in kin:
            prefix = f"{path}." if path else ""
            below = [g for g in picked if all(member.parameter.startswith(prefix) for member in g.members)]
            touching = [g for g in picked if any(member.parameter.startswith(prefix) for member in g.members)]
            if step == _TIE:
                inside = [classes for node, classes in parts if f"{module_path(node)}.".startswith(prefix)]
                taken |= self._tie(_of_one_place(inside) or _of_one_size(below))
            else:
                groups = below if step == _HOLD else touching
                why = _WHY.format(path or "the model", type(self.model.get_submodule(path)).__name__)
                self.staying |= {(m.parameter, m.axis): why for group in groups for m in group.members}
                taken |= bool(groups)
        return taken

    def _tie(self, alike: Iterable[list[Vector]]) -> bool:
        """Let all of each list lose equally many."""
        rows = [np.stack(vectors) for vectors in alike if len(vectors) > 1]
        self.alike += rows
        return bool(rows)


def _of_one_place(parts: Iterable[list[Vector]]) -> list[list[Vector]]:
    """Parts of the same place among those of a call, and of one length, where there are several."""
    found: dict[tuple[int, int], dict[bytes, Vector]] = {}
    for classes in parts:
        for place, own in enumerate(classes):
            found.setdefault((place, len(own)), {})[own.tobytes()] = own
    return [list(vectors.values()) for vectors in found.values() if len(vectors) > 1]


def _of_one_size(groups: Iterable[ChannelGroup]) -> list[list[Vector]]:
    """The units of groups of one kind and size."""
    found: dict[tuple[str, int], list[Vector]] = {}
    for group in groups:
        found.setdefault((group.kind, group.size), []).append(group.units)
    return list(found.values())
