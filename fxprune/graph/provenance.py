"""What is known of the modules that the containers of a captured model come from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

_KEY = "fxprune.provenance"  # no name of a child, a parameter or a buffer has a dot


@dataclass(frozen=True)
class Provenance:
    """What is known of the eager module that a container stands for.

    Attributes:
        source_class: its class.
        parameter_order: its parameters as they are without reparametrizations, so that removing a mask or a norm
            restores the order that optimizers and `parameters_to_vector` go by.
        reads: by parameter, how often one forward read it, in train mode where that was captured.
        attributes: what else it had, by name: numbers, texts and None as they were.
        options: how the parametrization that the container belongs to was inserted; what was set on a part since the
            capture (`fxprune.graph.switching`); empty for all others.
        masked: its tensors that a norm or a parametrization computes and a mask multiplies, by name. A buffer of the
            model's own may be called like such a mask.
    """

    source_class: type[nn.Module] = nn.Module
    parameter_order: tuple[str, ...] = ()
    reads: Mapping[str, int] = field(default_factory=dict)
    attributes: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)
    options: Mapping[str, Any] = field(default_factory=dict)
    masked: tuple[str, ...] = ()

    def __deepcopy__(self, memo: dict[int, Any]) -> Provenance:
        return self


def provenance_of(module: nn.Module) -> Provenance:
    """What is known of the module that a container or a traced module stands for; defaults for any other module."""
    known: Provenance = vars(module).get(_KEY) or Provenance()
    return known


def set_provenance(module: nn.Module, provenance: Provenance) -> None:
    """Say what a container or a traced module stands for."""
    vars(module)[_KEY] = provenance
