"""The ways in which the demo treats its network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn.utils.prune import L1Unstructured, LnStructured

import fxprune


@dataclass(frozen=True)
class Variant:
    """A way to treat the network; all go through the same stages and columns.

    Attributes:
        name: also of its file.
        prepare: called on the traced module before training.
        schedule: from the traced module, `start` and `stop` to the schedule that prunes it after each epoch.
        steps: by name, what is done to the trained dense network, from which the variant then starts; called with the
            traced module and batches of images without labels. A few epochs of training follow.
        note: what the reader should know about the result.
    """

    name: str
    prepare: Callable[[fxprune.TracedModule], None] = lambda traced: None
    schedule: Callable[..., fxprune.Schedule] | None = None
    steps: tuple[tuple[str, Callable[[fxprune.TracedModule, Sequence[Tensor]], object]], ...] = ()
    note: str = ""


def _insert_norms(traced: fxprune.TracedModule) -> None:
    fxprune.spectral_norm(traced, "stem.weight")
    fxprune.weight_norm(traced, "head.weight")


def _l1(traced: fxprune.TracedModule, **span: Any) -> fxprune.Schedule:
    names = ("block?.conv?.weight", "block?.shortcut.weight")
    return fxprune.Schedule(traced, names, L1Unstructured, 0.8, scope="global", **span)


def _rows(traced: fxprune.TracedModule, **span: Any) -> fxprune.Schedule:
    names = ("stem.weight", "block1.conv1.weight", "block2.conv1.weight")
    return fxprune.Schedule(traced, names, LnStructured, 0.5, n=2, dim=0, **span)


def _half_of_the_macs(traced: fxprune.TracedModule, batches: Sequence[Tensor]) -> fxprune.ChannelReport:
    return fxprune.prune.channels(traced, macs=0.5, importance="obs", loader=batches)


VARIANTS = (
    Variant("dense"),
    Variant("unstructured", _insert_norms, _l1, note="Unstructured zeros do not give speed; removing channels does."),
    Variant("rows", schedule=_rows, note="rows: half of the filters of three layers, by ln_structured."),
    Variant(
        "budget",
        steps=(("pruned", _half_of_the_macs), ("repaired", fxprune.reconstruct)),
        note="budget: the trained dense network, coupled channels to half of the MACs, in blocks that run fast.",
    ),
)
