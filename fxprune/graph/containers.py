"""What a captured model's parameters and buffers stand in, and what is known of the modules they come from."""

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
        options: how the parametrization that the container belongs to was inserted; empty for all others.
    """

    source_class: type[nn.Module] = nn.Module
    parameter_order: tuple[str, ...] = ()
    reads: Mapping[str, int] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)

    def __deepcopy__(self, memo: dict[int, Any]) -> Provenance:
        return self


class Container(nn.Module):
    """Holds the parameters, buffers and children that stand under one name of the captured model.

    It has no attributes of its own beside a module's, since a child may have any name.
    """

    def __init__(self, provenance: Provenance | None = None) -> None:
        super().__init__()
        set_provenance(self, provenance or Provenance())


def provenance_of(module: nn.Module) -> Provenance:
    """What is known of the module that a container or a traced module stands for; defaults for any other module."""
    known: Provenance = vars(module).get(_KEY) or Provenance()
    return known


def set_provenance(module: nn.Module, provenance: Provenance) -> None:
    """Say what a container or a traced module stands for."""
    vars(module)[_KEY] = provenance


def share_contents(target: nn.Module, source: nn.Module) -> None:
    """Let `target` hold the parameters, buffers and children of `source` too, the same objects."""
    target._parameters.update(source._parameters)
    target._buffers.update(source._buffers)
    target._non_persistent_buffers_set.update(source._non_persistent_buffers_set)
    target._modules.update(source._modules)


def restore_order(module: nn.Module) -> None:
    """Sort the parameters of a container as the eager module had them; those it had not keep their place at the end."""
    rank = {name: i for i, name in enumerate(provenance_of(module).parameter_order)}
    items = sorted(module._parameters.items(), key=lambda item: rank.get(item[0], len(rank)))
    module._parameters.clear()
    module._parameters.update(items)
