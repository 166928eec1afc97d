"""The channel plan: which indices of which parameters stay, as data."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fxprune.errors import ArtifactError
from fxprune.reports import Readable, change, columns, counted, first_of, plain

FORMAT = 1


@dataclass(repr=False)
class ChannelPlan(Readable):
    """What `finalize` removed, what stayed and why; `explain()` and `table()` tell all, `str` the sums.

    Attributes:
        kept: qualified name -> {axis: int64 indices that stay}, for every parameter and buffer. The weight of a
            grouped convolution has a matrix [groups left, indices within the group] for axis 1.
        groups: qualified name -> (groups before, groups after), for the weights of grouped convolutions.
        shapes: qualified name -> shape before.
        dropped: names of parameters and buffers that nothing reads any more.
        added: names of biases that were created for folded constants -> name of the layer's weight.
        folded: layer -> how many constant channels went into its bias.
        merged: layer -> how many constant channels went into representative columns.
        positions: names of maps that were created for channels whose constants differ near the border -> name of the
            node that they are added to, name of the padded convolution, how many channels went into the map.
        constants: (node, its reader, whether it is zero) of values that never change and left the graph.
        stayed: (parameter, axis, dead indices, reason) for what is dead and stayed.
        macs, parameters: (before, after); MACs of one sample, by `torch.utils.flop_counter`, while the outputs were
            compared; (0, 0) where they were not.
        eval_only: module of a batch norm -> its channels that went, and were constant in eval mode alone: in train mode
            they were another constant, or none.
        by_range: parameter -> how many of its rows went only since what comes in lies between numbers, which the
            weights that there were made one number of.
        counting: module (or node outside of modules) -> (channels that its statistics count, those of them that there
            are): the others are zero.
        rescaled: gain of a normalization by the root mean square that counts channels which went -> (eps before,
            after); the gain has taken a factor up.
        refused: name of a node whose operator could not be analyzed -> what went wrong; its channels stayed.
        sample: what MACs are counted for, "one sample of 3x224x224"; empty where they are not.
        chosen: (parameter, axis) that a choice of channels masked; what others lost was dead by itself.
        cached: keys or values of a cache that the graph takes and returns -> {axis: (size before, indices that stay)},
            as in "past_key_values.0.key" -> {1: (8, [0, 1, 2, 5])}; axis 1 are heads, axis 3 channels.
        held: weights that hold what was computed from them, row by row from all of their columns, as standardized ones
            are, before columns went: the graph computes no more.

    Example:
        >>> plan = fxprune.finalize(traced).plan
        >>> plan.kept["conv1.weight"][0]
        tensor([0, 2, 5])
    """

    kept: dict[str, dict[int, Tensor]] = field(default_factory=dict)
    groups: dict[str, tuple[int, int]] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    dropped: tuple[str, ...] = ()
    added: dict[str, str] = field(default_factory=dict)
    folded: dict[str, int] = field(default_factory=dict)
    merged: dict[str, int] = field(default_factory=dict)
    constants: tuple[tuple[str, str, bool], ...] = ()
    positions: dict[str, tuple[str, str, int]] = field(default_factory=dict)
    stayed: list[tuple[str, int, list[int], str]] = field(default_factory=list)
    macs: tuple[int, int] = (0, 0)
    parameters: tuple[int, int] = (0, 0)
    sample: str = ""
    eval_only: dict[str, list[int]] = field(default_factory=dict)
    by_range: dict[str, int] = field(default_factory=dict)
    counting: dict[str, tuple[int, int]] = field(default_factory=dict)
    rescaled: dict[str, tuple[float, float]] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    chosen: tuple[tuple[str, int], ...] = ()
    cached: dict[str, dict[int, tuple[int, Tensor]]] = field(default_factory=dict)
    held: tuple[str, ...] = ()

    @property
    def removed(self) -> dict[str, dict[int, int]]:
        """Qualified name -> {axis: how many indices went}, where any did."""
        counts: dict[str, dict[int, int]] = {}
        for name, axes in self.kept.items():
            for axis, index in axes.items():
                full = self.shapes[name][axis]
                gone = full - (index.shape[-1] if index.dim() == 2 else len(index))
                if gone:
                    counts.setdefault(name, {})[axis] = gone
        return counts

    def slice(self, name: str, tensor: Tensor) -> Tensor:
        """Cut a tensor of the shape that `name` had before (an optimizer's state, a gradient) to what is kept.

        Keys and values in the cache of the module before are cut by their name, as in "past_key_values.0.key". A layout
        by channels last stays.
        """
        layout = _layout(tensor)
        for axis, (_, index) in sorted(self.cached.get(name, {}).items()):
            tensor = tensor.index_select(axis, index.to(tensor.device))
        for axis, index in sorted(self.kept.get(name, {}).items()):
            if index.dim() == 2:
                tensor = self._slice_grouped(name, axis, index, tensor)
            elif len(index) != tensor.shape[axis]:
                tensor = tensor.index_select(axis, index.to(tensor.device))
        return tensor.contiguous(memory_format=layout)

    def _slice_grouped(self, name: str, axis: int, index: Tensor, tensor: Tensor) -> Tensor:
        """Each remaining group takes its own columns; axis 0 is cut already."""
        index = index.to(tensor.device)
        per_group = tensor.reshape(len(index), -1, *tensor.shape[1:])
        view = index.view(len(index), 1, -1, *[1] * (tensor.dim() - 2))
        return per_group.gather(2, view.expand(-1, per_group.shape[1], -1, *tensor.shape[2:])).flatten(0, 1)

    def __str__(self) -> str:
        """MACs and parameters before and after, how much went, and how much stayed though it is dead."""
        macs = f"MACs {change(*self.macs)}" if any(self.macs) else "MACs not counted"
        lines = [f"{macs}, parameters {change(*self.parameters)}" + (f", for {self.sample}" if self.sample else "")]
        cut = [(self.shapes[name], axes.get(0)) for name, axes in self._cut_weights]
        rows = [(gone, shape[0]) for shape, gone in cut if gone and len(shape) > 1]
        gone, before = map(sum, zip(*rows, strict=True)) if rows else (0, 0)
        went = [f"{gone:,} of {before:,} rows of {counted(len(rows), 'weight')} removed" if rows else "no rows removed"]
        constants = (
            sum(self.folded.values()) + sum(self.merged.values()) + sum(n for _, _, n in self.positions.values())
        )
        went += [f"{counted(constants, 'constant channel')} folded or merged"] if constants else []
        went += [f"{counted(len(self.dropped), 'tensor')} dropped"] if self.dropped else []
        lines.append(", ".join(went))
        if self.cached:
            lines.append(f"smaller in the cache: {first_of(self.cached, 3)}")
        if self.eval_only:
            norms = first_of(self.eval_only, 3)
            lines.append(f"constant in eval mode alone, so that train mode changes: channels of {norms}")
        if self.refused:
            lines.append(f"could not be analyzed, so that channels stayed: {first_of(self.refused, 3)}")
        if self.stayed:
            dead = sum(len(index) for _, _, index, _ in self.stayed)
            lines.append(f"{counted(dead, 'dead slice')} stayed; explain() says why")
        return "\n".join(lines)

    def table(self) -> str:
        """Every axis that lost indices and every one that keeps dead ones, a line each, under the sums."""
        rows = [("parameter", "axis", "before", "kept", "why")]
        for name, axes in self.removed.items():
            for axis, gone in axes.items():
                full = self.shapes[name][axis]
                rows.append((name, str(axis), str(full), str(full - gone), "dropped" if name in self.dropped else ""))
        for name, axis, index, reason in self.stayed:
            size = self.shapes[name][axis] if name in self.shapes else len(index)
            rows.append((name, str(axis), str(size), f"{len(index)} dead", reason))
        return f"{self}\n\n{columns(rows)}" if len(rows) > 1 else str(self)

    @property
    def _cut_weights(self) -> list[tuple[str, dict[int, int]]]:
        """The weights that lost indices and are still read, and how many, by axis."""
        return [
            (name, axes)
            for name, axes in self.removed.items()
            if name.rpartition(".")[2].startswith(("weight", "in_proj")) and name not in self.dropped
        ]

    def explain(self) -> str:
        """What went, what stayed and why, as text."""
        lines = [f"MACs {change(*self.macs)}, parameters {change(*self.parameters)}"]
        lines += [f"  MACs for {self.sample}"] if self.sample else []
        for name, axes in self._cut_weights:
            sizes = self.shapes[name]
            text = ", ".join(f"axis {axis}: {sizes[axis] - gone} of {sizes[axis]} kept" for axis, gone in axes.items())
            lines.append(f"  {name}: {text}")
        for name, kept in self.cached.items():
            text = ", ".join(
                f"{len(index)} of {size} {'heads' if axis == 1 else 'channels'} kept"
                for axis, (size, index) in kept.items()
            )
            lines.append(f"  {name} in the cache: {text}")
        if self.held:
            lines.append(f"  plain weights now, standardized over all that was read: {first_of(self.held, 5)}")
        lines += [f"  {layer}: {n} constant channels folded into its bias" for layer, n in self.folded.items()]
        lines += [f"  {layer}: {n} constant channels merged into representatives" for layer, n in self.merged.items()]
        lines += [f"  {name}: {n} channels counted, {left} of them left" for name, (n, left) in self.counting.items()]
        lines += [f"  {gain}: scaled, eps {eps[0]:g} -> {eps[1]:g}" for gain, eps in self.rescaled.items()]
        lines += [
            f"  {name}: {n} channels, constant but for the border of {padded}, folded into a map that is added"
            for name, (_, padded, n) in self.positions.items()
        ]
        lines += [
            f"  {node}: always {'zero' if zero else 'the same'}, its layers left the graph"
            for node, _, zero in self.constants
        ]
        lines += [
            f"  {norm}: {len(index)} ({first_of(index)}) constant in eval mode alone; train mode changes (finalize has "
            "keep_for_training)"
            for norm, index in self.eval_only.items()
        ]
        lines += [
            f"  {name}: {n} dead by the range of what comes in; training could have revived them (finalize has "
            "keep_for_training)"
            for name, n in self.by_range.items()
        ]
        lines += [f"  {node}: channels stayed: {why}" for node, why in self.refused.items()]
        if self.dropped:
            lines.append(f"  dropped, nothing reads them: {', '.join(self.dropped)}")
        if self.stayed:
            lines.append("dead, but stayed:")
        for name, axis, index, reason in self.stayed:
            lines.append(f"  {name}, axis {axis}, {len(index)} ({first_of(index)}): {reason}")
        return "\n".join(lines) + "\n"

    def to_dict(self) -> dict[str, Any]:
        """The plan in JSON's types; kept indices are None where all of an axis stay."""
        kept = {
            name: {str(a): _pack(i, self.shapes[name][a]) for a, i in axes.items()} for name, axes in self.kept.items()
        }
        found: dict[str, Any] = plain(
            {
                "format": FORMAT, "kept": kept, "groups": self.groups, "shapes": self.shapes, "dropped": self.dropped,
                "added": self.added, "folded": self.folded, "merged": self.merged, "constants": self.constants,
                "stayed": self.stayed, "macs": self.macs, "parameters": self.parameters, "sample": self.sample,
                "eval_only": self.eval_only, "by_range": self.by_range, "counting": self.counting,
                "rescaled": self.rescaled, "positions": self.positions, "refused": self.refused, "chosen": self.chosen,
                "held": self.held,
                "cached": {
                    name: {str(a): [size, index.tolist()] for a, (size, index) in axes.items()}
                    for name, axes in self.cached.items()
                },
            }
        )  # fmt: skip
        return found

    def to_json(self) -> str:
        """`to_dict` as text; `from_json` restores the plan."""
        return json.dumps(self.to_dict())

    @classmethod
    def from_json(cls, text: str) -> ChannelPlan:
        """Restore a plan from `to_json`'s text.

        Raises:
            ArtifactError: the text is damaged, or of a later version.
        """
        try:
            data = json.loads(text)
            if data["format"] > FORMAT:
                raise ArtifactError(f"a channel plan of format {data['format']}; this version reads up to {FORMAT}.")
            shapes = {k: tuple(v) for k, v in data["shapes"].items()}
            kept = {
                name: {int(a): _unpack(i, shapes[name][int(a)]) for a, i in axes.items()}
                for name, axes in data["kept"].items()
            }
            plan = cls(kept, shapes=shapes, added=data["added"], folded=data["folded"], merged=data["merged"])
            plan.groups = {k: (v[0], v[1]) for k, v in data["groups"].items()}
            plan.dropped, plan.constants = tuple(data["dropped"]), tuple((a, b, z) for a, b, z in data["constants"])
            plan.stayed = [(name, axis, list(index), reason) for name, axis, index, reason in data["stayed"]]
            plan.macs, plan.parameters = tuple(data["macs"]), tuple(data["parameters"])
            plan.sample = data.get("sample", "")  # files of earlier versions have none of these
            plan.eval_only = {name: list(index) for name, index in data.get("eval_only", {}).items()}
            plan.by_range = dict(data.get("by_range", {}))
            plan.counting = {name: (n, left) for name, (n, left) in data.get("counting", {}).items()}
            plan.rescaled = {name: (old, new) for name, (old, new) in data.get("rescaled", {}).items()}
            plan.positions = {name: (a, b, n) for name, (a, b, n) in data.get("positions", {}).items()}
            plan.refused = dict(data.get("refused", {}))
            plan.chosen = tuple((name, axis) for name, axis in data.get("chosen", ()))
            plan.held = tuple(data.get("held", ()))
            plan.cached = {
                name: {int(a): (size, torch.tensor(index)) for a, (size, index) in axes.items()}
                for name, axes in data.get("cached", {}).items()
            }
            return plan
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise ArtifactError(f"not a channel plan: {error!r}. Store it with `ChannelPlan.to_json`.") from error


def _pack(index: Tensor, full: int) -> Any:
    return None if index.dim() == 1 and len(index) == full else index.tolist()


def _unpack(stored: Any, full: int) -> Tensor:
    return torch.arange(full) if stored is None else torch.tensor(stored, dtype=torch.int64)


def _layout(tensor: Tensor) -> torch.memory_format:
    """By channels last where a tensor is stored so, and not in the order of its axes as well."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    found = formats.get(tensor.dim(), torch.contiguous_format)
    is_other = not tensor.is_contiguous() and tensor.is_contiguous(memory_format=found)
    return found if is_other else torch.contiguous_format
