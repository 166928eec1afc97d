"""Values written into parameters and buffers, which can be taken back, and what stood there before."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn
from torch.autograd.graph import increment_version

from fxprune.errors import PruningError
from fxprune.graph.masks import masked_views
from fxprune.graph.names import tensor_at
from fxprune.graph.traced import TracedModule
from fxprune.reports import first_of

_REFITTED = "version_at_repair"  # an attribute of a tensor: how often it had been written to when it was last repaired


class Changes:
    """What was changed, with the values before the first change, and what the network stands for."""

    def __init__(self) -> None:
        self._before: dict[int, tuple[Tensor, Tensor]] = {}
        self._meant: dict[int, Tensor] = {}

    def set(self, tensor: Tensor, values: Tensor) -> None:
        """Write values into a tensor, which stays the same object."""
        if id(tensor) not in self._before:
            self._before[id(tensor)] = tensor, tensor.detach().clone()
        tensor.data.copy_(values)  # what is taken back shall not count as written

    def restate(self, tensor: Tensor, values: Tensor) -> None:
        """Write other values that mean the same: no change of what the unmasked network computes."""
        self.set(tensor, values)
        self._meant[id(tensor)] = tensor.detach().clone()

    def before(self, tensor: Tensor) -> Tensor:
        """The values of a tensor before any change of its meaning."""
        if id(tensor) in self._meant:
            return self._meant[id(tensor)]
        return self.first(tensor)

    def first(self, tensor: Tensor) -> Tensor:
        """The values of a tensor before any change."""
        return self._before[id(tensor)][1] if id(tensor) in self._before else tensor

    def undo(self) -> None:
        """Write back what stood there."""
        for tensor, values in self._before.values():
            tensor.data.copy_(values)
        self._before.clear()
        self._meant.clear()

    def keep(self) -> None:
        """Let the changes be final: autograd, and who asks whether masked weights were changed, is told of them."""
        increment_version([tensor for tensor, _ in self._before.values()])
        for tensor, _ in self._before.values():
            vars(tensor)[_REFITTED] = tensor._version


def refitted_since(module: nn.Module) -> list[str]:
    """The parameters whose last change is that of a repair, whichever module it was made on."""
    return [name for name, each in module.named_parameters() if vars(each).get(_REFITTED) == each._version]


def mark_refitted(module: nn.Module, names: Iterable[str]) -> None:
    """Say of parameters that their last change is that of a repair."""
    for name in names:
        tensor = tensor_at(module, name)
        vars(tensor)[_REFITTED] = tensor._version


def require_unchanged(traced: TracedModule) -> None:
    """Raise PruningError where the module without its masks is not what it was before pruning."""
    if changed := [found.name for found in masked_views(traced) if found.changed_since_masked]:
        raise PruningError(
            f"{first_of(changed)} changed since they were masked, so that the module without its masks is no "
            "reference. Give one: reference=, a copy of the module from before pruning."
        )
    if changed := refitted_since(traced):
        raise PruningError(
            f"{first_of(changed)} were refitted by an earlier reconstruction, to masks of that time, so that the "
            "module without its masks is no reference. Give one: reference=, a copy of the module from before pruning. "
            "Trace a copy of a model to keep the model as it is: a traced module has its parameters."
        )
