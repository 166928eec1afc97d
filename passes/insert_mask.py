"""Insert a mask-multiply on a parameter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from fxprune.errors import PruningError
from fxprune.graph.editing import locate, read_groups, reads, replace_reads
from fxprune.graph.traced import TracedModule

from .base import Pass


@dataclass(frozen=True, eq=False)
class InsertMask(Pass):
    """Replace every read of `parameter` by `parameter_mask * parameter_orig`, as `torch.nn.utils.prune` names them.

    Cases: (1) the parameter has no mask: it is renamed, the same object, the mask becomes a buffer, each call of its
    module gets a product; (2) it has one: the mask's values are replaced, the graph stays.

    Args:
        parameter: qualified name, such as "conv1.weight".
        mask: tensor of the parameter's shape; kept in the parameter's dtype.

    Example:
        >>> InsertMask("0.weight", torch.ones(2, 4))(traced).modified
        True
    """

    parameter: str
    mask: torch.Tensor
    name: ClassVar[str] = "insert-mask"

    def requires(self, traced: TracedModule) -> None:
        owner, name = locate(traced, self.parameter)
        target = owner._parameters.get(f"{name}_orig" if f"{name}_mask" in owner._buffers else name)
        if target is None or target.shape != self.mask.shape:
            found = "no such parameter" if target is None else f"the parameter's shape is {tuple(target.shape)}"
            raise PruningError(f"a mask of shape {tuple(self.mask.shape)} for {self.parameter!r}: {found}.")

    def run(self, traced: TracedModule) -> bool:
        owner, name = locate(traced, self.parameter)
        original, kept = self.parameter + "_orig", self.parameter + "_mask"
        if f"{name}_mask" in owner._buffers:  # (2)
            previous = owner._buffers[f"{name}_mask"]
            assert previous is not None
            owner._buffers[f"{name}_mask"] = mask = torch.empty_like(previous).copy_(self.mask.detach())
            return not torch.equal(previous, mask)
        parameter = owner._parameters[name]  # (1)
        assert parameter is not None
        found = [
            (graph, read_groups(traced, graph, self.parameter), reads(traced, graph, self.parameter))
            for graph in traced.graphs.values()
        ]
        del owner._parameters[name]
        owner.register_parameter(f"{name}_orig", parameter)
        # in the memory format of the parameter, which decides that of the product
        mask = torch.empty_like(parameter, requires_grad=False).copy_(self.mask.detach())
        owner.register_buffer(f"{name}_mask", mask)

        def product(graph: fx.Graph) -> fx.Node:
            # the order of the operands is torch's, gradients are then equal to the bit
            return graph.call_function(torch.ops.aten.mul.Tensor, (graph.get_attr(kept), graph.get_attr(original)))

        for graph, groups, nodes in found:
            replace_reads(graph, groups, nodes, product, self.origin(self.parameter))
        return True
