"""Insert mask-multiplies on parameters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from fxprune.errors import PruningError
from fxprune.graph.masks import mask_name, original_name, view
from fxprune.graph.names import exists
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
            stored = view(traced, parameter)
            target = stored.original
            if target is None or target.shape != mask.shape:
                found = "no such parameter" if target is None else f"the parameter's shape is {tuple(target.shape)}"
                raise PruningError(f"a mask of shape {tuple(mask.shape)} for {parameter!r}: {found}.")
            taken = [name for name in (mask_name(parameter), original_name(parameter)) if exists(traced, name)]
            if stored.mask is None and taken:
                raise PruningError(
                    f"a mask for {parameter!r} would replace {', '.join(taken)}, which the model has for something "
                    "else. Rename it there, then trace the model."
                )

    def run(self, traced: TracedModule) -> bool:
        reads: list[tuple[fx.Graph, ParameterReads]] = []
        modified = False
        for parameter, mask in self.masks.items():
            found = view(traced, parameter)
            if found.mask is not None:  # (2)
                modified |= found.replace_mask(mask)
                continue
            reads = reads or [(graph, ParameterReads(traced, graph)) for graph in traced.graphs.values()]  # (1)
            found.insert_mask(mask)
            for graph, own in reads:
                self._multiply(graph, own, parameter)
            modified = True
        return modified

    def _multiply(self, graph: fx.Graph, reads: ParameterReads, parameter: str) -> None:
        def product(graph: fx.Graph) -> fx.Node:
            # the order of the operands is torch's, gradients are then equal to the bit
            operands = graph.get_attr(mask_name(parameter)), graph.get_attr(original_name(parameter))
            return graph.call_function(torch.ops.aten.mul.Tensor, operands)

        replace_reads(graph, reads.calls(parameter), reads.nodes(parameter), product, self.origin(parameter))


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
