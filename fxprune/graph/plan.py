"""The channel plan: which indices of which parameters stay, as data."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fxprune.errors import ArtifactError

FORMAT = 1


@dataclass
class ChannelPlan:
    """What `finalize` removed, what stayed and why.

    Attributes:
        kept: qualified name -> {axis: int64 indices that stay}, for every parameter and buffer. The weight of a
            grouped convolution has a matrix [groups left, indices within the group] for axis 1.
        groups: qualified name -> (groups before, groups after), for the weights of grouped convolutions.
        shapes: qualified name -> shape before.
        dropped: names of parameters and buffers that nothing reads any more.
        added: names of biases that were created for folded constants -> name of the layer's weight.
        folded: layer -> how many constant channels went into its bias.
        merged: layer -> how many constant channels went into representative columns.
        constants: (node, its reader, whether it is zero) of values that never change and left the graph.
        stayed: (parameter, axis, dead indices, reason) for what is dead and stayed.
        macs, parameters: (before, after); MACs of one sample, by `torch.utils.flop_counter`, while the outputs were
            compared; (0, 0) where they were not.
        eval_only: module of a batch norm -> its channels that went, and were constant in eval mode alone: in train mode
            they were another constant, or none.
        sample: what MACs are counted for, "one sample of 3x224x224"; empty where they are not.

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
    stayed: list[tuple[str, int, list[int], str]] = field(default_factory=list)
    macs: tuple[int, int] = (0, 0)
    parameters: tuple[int, int] = (0, 0)
    sample: str = ""
    eval_only: dict[str, list[int]] = field(default_factory=dict)

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
        """Cut a tensor of the shape that `name` had before (an optimizer's state, a gradient) to what is kept."""
        for axis, index in sorted(self.kept.get(name, {}).items()):
            if index.dim() == 2:
                tensor = self._slice_grouped(name, axis, index, tensor)
            elif len(index) != tensor.shape[axis]:
                tensor = tensor.index_select(axis, index.to(tensor.device))
        return tensor.contiguous()

    def _slice_grouped(self, name: str, axis: int, index: Tensor, tensor: Tensor) -> Tensor:
        """Each remaining group takes its own columns; axis 0 is cut already."""
        index = index.to(tensor.device)
        per_group = tensor.reshape(len(index), -1, *tensor.shape[1:])
        view = index.view(len(index), 1, -1, *[1] * (tensor.dim() - 2))
        return per_group.gather(2, view.expand(-1, per_group.shape[1], -1, *tensor.shape[2:])).flatten(0, 1)

    def explain(self) -> str:
        """What went, what stayed and why, as text."""
        (m0, m1), (p0, p1) = self.macs, self.parameters
        lines = [f"MACs {m0:,} -> {m1:,} ({m1 / max(m0, 1):.3f}), parameters {p0:,} -> {p1:,} ({p1 / max(p0, 1):.3f})"]
        lines += [f"  MACs for {self.sample}"] if self.sample else []
        removed = self.removed
        for name, axes in removed.items():
            if name.rpartition(".")[2].startswith(("weight", "in_proj")) and name not in self.dropped:
                text = ", ".join(
                    f"axis {a}: {self.shapes[name][a] - n} of {self.shapes[name][a]} kept" for a, n in axes.items()
                )
                lines.append(f"  {name}: {text}")
        lines += [f"  {layer}: {n} constant channels folded into its bias" for layer, n in self.folded.items()]
        lines += [f"  {layer}: {n} constant channels merged into representatives" for layer, n in self.merged.items()]
        lines += [
            f"  {node}: always {'zero' if zero else 'the same'}, its layers left the graph"
            for node, _, zero in self.constants
        ]
        lines += [
            f"  {norm}: {len(index)} ({_short(index)}) constant in eval mode alone; train mode changes (finalize has "
            "keep_for_training)"
            for norm, index in self.eval_only.items()
        ]
        if self.dropped:
            lines.append(f"  dropped, nothing reads them: {', '.join(self.dropped)}")
        if self.stayed:
            lines.append("dead, but stayed:")
        for name, axis, index, reason in self.stayed:
            lines.append(f"  {name}, axis {axis}, {len(index)} ({_short(index)}): {reason}")
        return "\n".join(lines) + "\n"

    def to_json(self) -> str:
        """The plan as JSON text; `from_json` restores it."""
        kept = {
            name: {str(a): _pack(i, self.shapes[name][a]) for a, i in axes.items()} for name, axes in self.kept.items()
        }
        return json.dumps(
            {
                "format": FORMAT, "kept": kept, "groups": self.groups, "shapes": self.shapes, "dropped": self.dropped,
                "added": self.added, "folded": self.folded, "merged": self.merged, "constants": self.constants,
                "stayed": self.stayed, "macs": self.macs, "parameters": self.parameters, "sample": self.sample,
                "eval_only": self.eval_only,
            }
        )  # fmt: skip

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
            return plan
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise ArtifactError(f"not a channel plan: {error!r}. Store it with `ChannelPlan.to_json`.") from error


def _pack(index: Tensor, full: int) -> Any:
    return None if index.dim() == 1 and len(index) == full else index.tolist()


def _unpack(stored: Any, full: int) -> Tensor:
    return torch.arange(full) if stored is None else torch.tensor(stored, dtype=torch.int64)


def _short(index: Sequence[int]) -> str:
    return ", ".join(map(str, index[:6])) + (", ..." if len(index) > 6 else "")
