"""Insert mask-multiplies on parameters."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from fxprune.errors import PruningError
from fxprune.graph.error_sites import working_on
from fxprune.graph.masks import ParameterView, looks_normed, mask_name, original_name, view
from fxprune.graph.metadata import module_calls, set_module_calls, tag, untag
from fxprune.graph.names import exists, join, names_of
from fxprune.graph.parameter_reads import ParameterReads, replace_reads
from fxprune.graph.traced import TracedModule
from fxprune.graph.values import computing_nodes, unmasked

from .base import Pass


@dataclass(frozen=True, eq=False)
class InsertMasks(Pass):
    """Replace every read of each parameter by `parameter_mask * parameter_orig`, as `torch.nn.utils.prune` names them.

    Cases: (1) the parameter has no mask: it is renamed, the same object, the mask becomes a buffer, each call of its
    module gets a product; (2) it has one: the mask's values are replaced, the graph stays; (3) a norm or a
    parametrization computes it: the mask becomes a buffer, what is computed is multiplied by it at each read. What the
    norm itself does with its result, such as a power iteration, sees the result without the mask.

    Args:
        masks: by qualified name, such as "conv1.weight", a tensor of the parameter's shape; kept in its dtype.
        compact: whether masks that are expanded vectors (`Tensor.expand`) are stored as such; else, and where a norm
            computes the parameter, each has an entry of memory for each of the parameter's, as torch's have.

    Example:
        >>> InsertMasks({"0.weight": torch.ones(2, 4)})(traced).modified
        True
    """

    masks: Mapping[str, torch.Tensor]
    compact: bool = False
    name: ClassVar[str] = "insert-mask"

    def requires(self, traced: TracedModule) -> None:
        for parameter, mask in self.masks.items():
            stored = view(traced, parameter)
            shape = _shape(traced, stored)
            if shape != mask.shape:
                found = "no such parameter" if shape is None else f"the parameter's shape is {tuple(shape)}"
                raise PruningError(f"a mask of shape {tuple(mask.shape)} for {parameter!r}: {found}.")
            names = [mask_name(parameter)] + [original_name(parameter)] * (not stored.original_is_computed)
            taken = [name for name in names if exists(traced, name)]
            if stored.mask is None and taken:
                raise PruningError(
                    f"a mask for {parameter!r} would replace {', '.join(taken)}, which the model has for something "
                    "else. Rename it there, then trace the model."
                )
            if stored.mask is None and stored.original is not None and looks_normed(stored.owner, stored.attribute):
                raise PruningError(
                    f"a mask for {parameter!r}: with buffers called like the vectors of a spectral norm, {parameter}_u "
                    f"and {parameter}_v, it would be taken for one. Rename them in the model, then trace it."
                )

    def run(self, traced: TracedModule) -> bool:
        reads: list[tuple[fx.Graph, ParameterReads]] = []
        modified = False
        for parameter, mask in self.masks.items():
            found = view(traced, parameter)
            if found.mask is not None:  # (2)
                modified |= found.replace_mask(mask, compact=self.compact)
                continue
            modified = True
            if found.original_is_computed:  # (3)
                found.insert_mask(mask.to(unmasked(traced, found)))
                for graph in traced.graphs.values():
                    self._multiply_computed(traced, graph, parameter)
                continue
            reads = reads or [(graph, ParameterReads(traced, graph)) for graph in traced.graphs.values()]  # (1)
            found.insert_mask(mask, compact=self.compact)
            for graph, own in reads:
                self._multiply(graph, own, parameter)
        return modified

    def _multiply(self, graph: fx.Graph, reads: ParameterReads, parameter: str) -> None:
        nodes = reads.nodes(parameter)

        def product(graph: fx.Graph) -> fx.Node:
            # the order of the operands is torch's, gradients are then equal to the bit
            operands = _read(graph, mask_name(parameter), nodes[0]), _read(graph, original_name(parameter), nodes[0])
            return graph.call_function(torch.ops.aten.mul.Tensor, operands)

        replace_reads(graph, reads.calls(parameter), nodes, product, self.origin(parameter))

    def _multiply_computed(self, traced: TracedModule, graph: fx.Graph, parameter: str) -> None:
        found = view(traced, parameter)
        parts = {join(path, f"parametrizations.{found.attribute}") for path in names_of(traced, found.owner)}
        for node in computing_nodes(traced, graph, found):
            users = [user for user in sorted(node.users) if not _is_within(user, parts)]
            untag(node)
            with working_on(node), graph.inserting_before(users[0] if users else node.next):
                mask = _read(graph, mask_name(parameter), node)
                product = graph.call_function(torch.ops.aten.mul.Tensor, (mask, node))
            product.meta["val"] = node.meta.get("val")
            for inserted in (product, product.prev):
                set_module_calls(inserted, module_calls(users[0]) if users else {})
            tag(product, self.origin(parameter))
            for user in users:
                user.replace_input_with(node, product)


def _read(graph: fx.Graph, name: str, like: fx.Node) -> fx.Node:
    """A read of a tensor whose shape is that of another node, by which calls are checked."""
    read = graph.get_attr(name)
    read.meta["val"] = like.meta.get("val")
    return read


def _shape(traced: TracedModule, stored: ParameterView) -> torch.Size | None:
    """The shape of a parameter, None where there is none."""
    if stored.mask is not None or stored.original is not None:
        return stored.shape
    return unmasked(traced, stored).shape if stored.original_is_computed else None


def _is_within(node: fx.Node, parts: Collection[str]) -> bool:
    """Whether a node belongs to a call of a module that stands under one of the paths."""
    return any(path == part or path.startswith(f"{part}.") for path, _ in module_calls(node).values() for part in parts)


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
