"""The importances that have a name: what `fxprune.importance.scores` and `fxprune.prune.channels` take as a string."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from fxprune.calling import named_arguments
from fxprune.channels.groups import ChannelGroup
from fxprune.errors import ArgumentError, ArgumentTypeError
from fxprune.graph.traced import TracedModule


class Evidence(NamedTuple):
    """What a score may look at beside the parameters; the arguments of `fxprune.importance.scores`."""

    loader: Iterable[Any] | None = None
    loss: Callable[[Any, Any], torch.Tensor] | None = None
    max_batches: int | None = None
    seed: int | None = None
    weight: Callable[..., torch.Tensor] | None = None

    @property
    def batches(self) -> int | None:
        """`max_batches` under its name of before."""
        return self.max_batches


Score = Callable[[TracedModule, Sequence[str], Evidence], Mapping[str, torch.Tensor]]
SliceScore = Callable[[torch.Tensor, tuple[int, ...]], torch.Tensor]
UnitScore = Callable[[ChannelGroup], torch.Tensor]


@dataclass(frozen=True)
class Importance:
    """One way to tell what matters. Larger scores stay; of the fields below one at least is given.

    Attributes:
        entries: `(traced, names, evidence) -> {name: tensor}`, a score of each entry of the named parameters. Alone, it
            scores a channel too: by the mean over its slices of the sum over a slice's entries.
        slices: `(values, axes) -> tensor`, a score of each slice of one parameter, in float32 or float64: `axes` are
            those within a slice, the result has one value for each index of the others. The mean over a unit's slices
            scores the unit.
        units: from the evidence to a function of a `ChannelGroup` that scores each of its units, a tensor [units].
        curves: from module, grouping, groups and evidence to what the output loses with the units of each group, an
            object with `curve_of(group)` (`fxprune.Sensitivity`).
        reads: the parameters that `slices` looks at: "weights" (all but biases), "filters" (weights of two and more
            axes where they write a group) or "gains" (those of batch norms; groups without one are left alone).
        relative: whether units of different groups compare by their scores divided by the group's mean, where the
            caller of `fxprune.prune.channels` leaves that open; else by the scores as they are.
    """

    entries: Score | None = None
    slices: SliceScore | None = None
    units: Callable[[Evidence], UnitScore] | None = None
    curves: Callable[[TracedModule, Any, Sequence[ChannelGroup], Evidence], Any] | None = None
    reads: str = "weights"
    relative: bool = False


class Registry(Mapping[str, Importance]):
    """Importances by name, in order of registration. A name is given once: `add` refuses one that is taken."""

    def __init__(self) -> None:
        self._found: dict[str, Importance] = {}

    def __getitem__(self, name: str) -> Importance:
        return self._found[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)

    def add(self, name: str, importance: Importance) -> None:
        """Register an importance; raises ArgumentError where the name is taken."""
        if name in self._found:
            raise ArgumentError(f"importance {name!r} is registered already. Choose another name, or remove it first.")
        self._found[name] = importance

    def remove(self, name: str) -> None:
        """Take a name away; raises KeyError where it is not there."""
        del self._found[name]


class EntryScores(MutableMapping[str, Score]):
    """The registered importances that score single entries, as a mapping from names to these functions."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    def __getitem__(self, name: str) -> Score:
        score = self._registry[name].entries
        if score is None:
            raise KeyError(name)
        return score

    def __setitem__(self, name: str, score: Score) -> None:
        self._registry.add(name, Importance(entries=score))

    def __delitem__(self, name: str) -> None:
        self[name]
        self._registry.remove(name)

    def __iter__(self) -> Iterator[str]:
        return (name for name, importance in self._registry.items() if importance.entries is not None)

    def __len__(self) -> int:
        return sum(1 for _ in self)


IMPORTANCES = Registry()
SCORES = EntryScores(IMPORTANCES)


@named_arguments
def register(name: str) -> Callable[[Score], Score]:
    """Give a function of entries a name, under which `scores` and `fxprune.prune.channels` take it.

    Args:
        name: a name that is not taken.

    Returns:
        A decorator of a function `(traced, names, evidence) -> {name: tensor}`, as `scores` takes it.

    Raises:
        ArgumentError: the name is taken. ArgumentTypeError: it is no string, at once.

    Example:
        >>> @fxprune.importance.register("deviation")
        ... def deviation(traced, names, evidence):
        ...     values = {name: fxprune.importance.value(traced, name) for name in names}
        ...     return {name: (value - value.mean()).abs() for name, value in values.items()}
        >>> fxprune.prune.channels(traced, amount=0.5, importance="deviation")
    """

    if not isinstance(name, str):
        raise ArgumentTypeError(
            f"an importance is registered under a name, a string; got {type(name).__name__}. As a decorator: "
            '@fxprune.importance.register("deviation").'
        )

    def decorate(score: Score) -> Score:
        SCORES[name] = score
        return score

    return decorate
