"""Tensors that a model reads and that are neither its parameters nor its buffers."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from fxprune.errors import CaptureError
from fxprune.graph.containers import Container


@dataclass(frozen=True, eq=False)
class ConstantKeeper:
    """Holds such tensors as buffers that are no part of the state dict, where `unlift` then reads them.

    Attributes:
        model: the model that was captured. root: what holds them.
        mode: the mode of the graph, which tells apart what has no name in the model.
        computed: the names of plain attributes that forwards compute: what they hold now is out of date.
    """

    model: nn.Module
    root: Container
    mode: str
    computed: frozenset[str]

    def __call__(self, value: Tensor, name: str) -> str:
        """Hold a tensor that the capture calls `name`; returns the name it has from now on.

        Raises:
            CaptureError: an earlier forward computed it, so it would be out of date.
        """
        if value.grad_fn is not None or name in self.computed:
            raise CaptureError(
                f"{name!r} is read as a plain tensor that an earlier forward computed: a hook that computes it runs "
                "too late or never, or forward keeps state in an attribute. What it holds now would be frozen into the "
                "graph. `fxprune.diagnose(model)` says more; remove the reparametrization, or register the state as a "
                "buffer."
            )
        path, _, attribute = name.rpartition(".")
        try:
            owner = self.root.get_submodule(path)
            own = getattr(self.model.get_submodule(path), attribute)
        except AttributeError:
            name = f"_{self.mode}_{name.replace('.', '_')}"
            self.root.register_buffer(name, value, persistent=False)
            return name
        assert isinstance(own, Tensor)
        owner.register_buffer(attribute, own, persistent=False)
        return name
