"""What `fxprune.sensitivity` returns: curves as data and as a table, and an importance for channels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fxprune.channels.groups import ChannelGroup
from fxprune.errors import PruningError
from fxprune.prune.group_record import numbered_labels, record_of
from fxprune.prune.sensitivity.curve import Curve
from fxprune.reports import Readable, columns, counted, first_of, number

_SHOWN = (0.1, 0.25, 0.5, 0.75)


@dataclass(frozen=True, repr=False)
class Sensitivity(Readable):
    """What the output loses with the units of each group, one group at a time.

    It is an importance: `fxprune.prune.channels(traced, macs=0.5, importance=sensitivity)` minimizes the sum of the
    losses under the budget, whichever budget it is, without another look at data. It holds for the module that was
    measured, and for others of the same graph.

    Attributes:
        curves: one a group, in the order of the network. distance: how losses were measured.
        sample: what MACs are counted for, as in "one sample of 3x224x224".
        macs, parameters: multiply-adds and parameters that one unit of each group saves, by the order of `curves`.
        samples: how many moments were made from, and how many curves were measured on.
        seconds: of the whole.

    Example:
        >>> sensitivity = fxprune.sensitivity(traced, batches)
        >>> print(sensitivity.table(), sensitivity.fragile()[0])
        >>> losses = {curve.name: curve.losses() for curve in sensitivity.curves}
        >>> report = fxprune.prune.channels(traced, parameters=0.7, importance=sensitivity)
    """

    curves: tuple[Curve, ...]
    distance: str
    sample: str
    macs: tuple[int, ...]
    parameters: tuple[int, ...]
    samples: tuple[int, int]
    seconds: float

    def curve_of(self, group: ChannelGroup) -> Curve:
        """The curve of a group.

        Raises:
            PruningError: it was not measured, or had other units then.
        """
        found = record_of(self.curves, group)
        if found is not None:
            return found
        there = first_of(f"{curve.name} ({curve.kind}, {curve.size})" for curve in self.curves)
        raise PruningError(
            f"the sensitivity has no curve of {group.name!r} ({group.kind}, {group.size} units); it has "
            f"{there}. Measure the module that is pruned: "
            " fxprune.sensitivity(traced, batches), or leave the group out by `ignore` or `kinds`."
        )

    def __call__(self, group: ChannelGroup) -> torch.Tensor:
        """What is lost with each unit of a group, [units], when those before it in the order of removal are gone."""
        return torch.from_numpy(self.curve_of(group).slopes())

    def fragile(self) -> list[str]:
        """The groups by what the output loses when half of the units go, the most first."""
        half = [float(curve.losses()[curve.size // 2]) for curve in self.curves]
        labels = dict(zip(numbered_labels(self.curves), half, strict=True))
        return sorted(labels, key=lambda label: -labels[label])

    def __str__(self) -> str:
        fitted, judged = self.samples
        fragile = self.fragile()
        return (
            f"{counted(len(self.curves), 'group')} measured in {self.seconds:.1f} s, moments of "
            f"{counted(fitted, 'sample')}, losses ({self.distance}) on {judged:,} others\n"
            f"most is lost with half of {first_of(fragile, 3)}; least with half of {first_of(fragile[::-1], 3)}"
        )

    def table(self) -> str:
        """A line for each group, in the order of the network: losses when a share of its units goes."""
        heads = [f"{share:.0%} gone" for share in _SHOWN]
        rows = [("group", "kind", "units", *heads, "MACs each", "parameters each")]
        for curve, macs, parameters in zip(self.curves, self.macs, self.parameters, strict=True):
            losses = curve.losses()
            shown = [number(float(losses[min(round(share * curve.size), curve.size - 1)])) for share in _SHOWN]
            rows.append((curve.name, curve.kind, f"{curve.size:,}", *shown, f"{macs:,}", f"{parameters:,}"))
        return f"{self}\n\n{columns(rows)}"


def sensitivity_of(
    curves: Sequence[Curve],
    groups: Sequence[ChannelGroup],
    distance: str,
    samples: tuple[int, int],
    seconds: float,
) -> Sensitivity:
    """The curves of groups, which stand in the same order."""
    return Sensitivity(
        tuple(curves), distance, groups[0].sample, tuple(group.macs for group in groups),
        tuple(group.parameters for group in groups), samples, seconds,
    )  # fmt: skip
