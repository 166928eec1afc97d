"""Insert mask-multiplies on parameters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx, nn

from fxprune.errors import PruningError
from fxprune.graph.names import locate
from fxprune.graph.parameter_reads import ParameterReads, replace_reads
from fxprune.graph.traced import TracedModule

from .base import Pass


@dataclass(frozen=True, eq=False)
class InsertMasks(Pass):
    """Replace every read of each parameter by `parameter_mask * parameter_orig`, as `torch.nn.utils.prune` names them.

    Cases: (1) the parameter has no mask: it is renamed, the same object, the mask becomes a buffer, each call of its
    module gets a product; (2) it has one: the mask's values are replaced, the graph stays.

    Args:
        masks: by qualified name, such as "conv1.weight", a tensor of the parameter's shape; kept in its dtype.

    Example:
        >>> InsertMasks({"0.weight": torch.ones(2, 4)})(traced).modified
        True
    """

    masks: Mapping[str, torch.Tensor]
    name: ClassVar[str] = "insert-mask"

    def requires(self, traced: TracedModule) -> None:
        for parameter, mask in self.masks.items():
            owner, name = locate(traced, parameter)
            target = owner._parameters.get(f"{name}_orig" if f"{name}_mask" in owner._buffers else name)
            if target is None or target.shape != mask.shape:
                found = "no such parameter" if target is None else f"the parameter's shape is {tuple(target.shape)}"
                raise PruningError(f"a mask of shape {tuple(mask.shape)} for {parameter!r}: {found}.")

    def run(self, traced: TracedModule) -> bool:
        reads: list[tuple[fx.Graph, ParameterReads]] = []
        modified = False
        for parameter, mask in self.masks.items():
            owner, name = locate(traced, parameter)
            if f"{name}_mask" in owner._buffers:  # (2)
                modified |= _replaced(owner, f"{name}_mask", mask)
                continue
            reads = reads or [(graph, ParameterReads(traced, graph)) for graph in traced.graphs.values()]  # (1)
            _rename(owner, name, mask)
            for graph, found in reads:
                self._multiply(graph, found, parameter)
            modified = True
        return modified

    def _multiply(self, graph: fx.Graph, found: ParameterReads, parameter: str) -> None:
        def product(graph: fx.Graph) -> fx.Node:
            # the order of the operands is torch's, gradients are then equal to the bit
            operands = graph.get_attr(f"{parameter}_mask"), graph.get_attr(f"{parameter}_orig")
            return graph.call_function(torch.ops.aten.mul.Tensor, operands)

        replace_reads(graph, found.calls(parameter), found.nodes(parameter), product, self.origin(parameter))


class InsertMask(InsertMasks):
    """`InsertMasks` on one parameter.

    Args:
        parameter: qualified name, such as "conv1.weight".
        mask: tensor of the parameter's shape.

    Example:
        >>> InsertMask("0.weight", torch.ones(2, 4))(traced).modified
        True
    """

    def __init__(self, parameter: str, mask: torch.Tensor) -> None:
        super().__init__({parameter: mask})


def _replaced(owner: nn.Module, buffer: str, mask: torch.Tensor) -> bool:
    """Give a mask that is there new values, in a new tensor; returns whether they differ."""
    previous = owner._buffers[buffer]
    assert previous is not None
    owner._buffers[buffer] = new = torch.empty_like(previous).copy_(mask.detach())
    return not torch.equal(previous, new)


def _rename(owner: nn.Module, name: str, mask: torch.Tensor) -> None:
    """Let the parameter stand beside its mask under torch's names."""
    parameter = owner._parameters.pop(name)
    assert parameter is not None
    owner.register_parameter(f"{name}_orig", parameter)
    # in the memory format of the parameter, which decides that of the product
    owner.register_buffer(f"{name}_mask", torch.empty_like(parameter, requires_grad=False).copy_(mask.detach()))
