"""The sample inputs of a capture, and which of their axes are free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, ShapesCollection
from torch.export.graph_signature import InputKind

from fxprune.graph.arguments import fixed_size


@dataclass(frozen=True, eq=False)
class Sample:
    """The arguments of one call, and the flat indices of the tensors whose axis 0 is free."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    free: tuple[int, ...] = ()

    def rebuilt(self) -> Sample:
        """The same tensors in containers of its own: a cache among them goes on to grow in the caller's hands."""
        args, kwargs = pytree.tree_map(lambda leaf: leaf, (self.args, dict(self.kwargs)))
        return Sample(args, kwargs, self.free)

    def with_free_batch(self) -> Sample:
        """The sample with a free axis 0 where that has the size of the first tensor's.

        A batch of 1 is doubled, since `torch.export` takes a size of 1 as a constant.
        """
        leaves, structure = pytree.tree_flatten((self.args, dict(self.kwargs)))
        sizes = [len(leaf) if isinstance(leaf, Tensor) and leaf.dim() else None for leaf in leaves]
        batch = next((size for size in sizes if size is not None), 0)
        if not batch:
            return self
        free = tuple(i for i, size in enumerate(sizes) if size == batch)
        if batch == 1:
            # by identity: inputs that were one tensor stay one
            doubled = {id(leaves[i]): torch.cat([leaves[i], leaves[i]]).detach() for i in free}
            leaves = [doubled.get(id(leaf), leaf) for leaf in leaves]
        args, kwargs = pytree.tree_unflatten(leaves, structure)
        return Sample(args, kwargs, free)

    def dynamic_shapes(self, module: nn.Module) -> Any:
        """`torch.export`'s structure of the free axes for the module's signature, None where none is free."""
        if not self.free:
            return None
        leaves = self._leaves()
        collection = ShapesCollection()
        for i in self.free:
            collection[leaves[i]] = {0: Dim.AUTO}
        return collection.dynamic_shapes(module, self.args, self.kwargs)

    def is_specialized(self, program: ExportedProgram) -> bool:
        """Whether the capture fixed an axis that was free."""
        specs = zip(program.graph.find_nodes(op="placeholder"), program.graph_signature.input_specs, strict=True)
        captured = [node.meta["val"] for node, spec in specs if spec.kind is InputKind.USER_INPUT]
        leaves = self._leaves()
        freed = {id(leaves[i]) for i in self.free}
        given = pytree.tree_leaves((self.args, self.in_order(program)))
        pairs = zip(given, captured, strict=True)
        return any(id(leaf) in freed and fixed_size(value.shape[0]) is not None for leaf, value in pairs)

    def in_order(self, program: ExportedProgram) -> dict[str, Any]:
        """The keyword arguments in the order in which the program takes them."""
        return {name: self.kwargs[name] for name in program.call_spec.in_spec.child(1).context}

    def _leaves(self) -> list[Any]:
        return pytree.tree_leaves((self.args, dict(self.kwargs)))
