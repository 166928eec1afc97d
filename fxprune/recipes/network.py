"""A network's layers and how they follow each other, as a record for the report's picture."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fxprune.graph.names import tensor_at
from fxprune.graph.traced import TracedModule

Record = dict[str, Any]
Place = int  # of a layer in the record


class _Layers:
    """Layers as they are found: inputs, nodes with weights, and nodes at which several values meet."""

    def __init__(self, traced: TracedModule) -> None:
        self.found: list[Record] = []
        self.shapes: dict[str, list[int]] = {}
        self._traced = traced
        self._behind: dict[fx.Node, list[Place]] = {}
        self._parameters: dict[fx.Node, list[str]] = {}

    def visit(self, node: fx.Node) -> None:
        """Find the layers that a node's value comes from; the node may be one itself."""
        if node.op == "get_attr":
            self._parameters[node] = [str(node.target)]
            return
        if node.op == "placeholder":
            self._add(node, node.name, "input", [], [])
            return
        reads = [place for each in node.all_input_nodes if not _is_size(each) for place in self._behind.get(each, [])]
        reads = list(dict.fromkeys(reads))
        used = [name for each in node.all_input_nodes for name in self._parameters.get(each, [])]
        weights = self._weights(used)
        if node.op == "output":
            self._add(node, "output", "output", reads, [])
        elif not reads:
            self._parameters[node] = used  # follows from parameters alone, as a normed weight does
        elif weights:
            self._add(node, weights[0].rpartition(".")[0] or weights[0], _kind(node), reads, weights)
        elif len(reads) > 1:
            self._add(node, node.name, _kind(node), reads, [])
        else:
            self._behind[node] = reads

    def _add(self, node: fx.Node, name: str, kind: str, reads: list[Place], weights: list[str]) -> None:
        self._behind[node] = [len(self.found)]
        self.found.append({"name": name, "kind": kind, "reads": reads, "weights": weights})

    def _weights(self, names: list[str]) -> list[str]:
        """Those of the parameters that have more than one axis."""
        found = []
        for name in dict.fromkeys(names):
            tensor = tensor_at(self._traced, name)
            if isinstance(tensor, torch.nn.Parameter) and tensor.dim() > 1:
                self.shapes[name] = list(tensor.shape)
                found.append(name)
        return found


def network(traced: TracedModule) -> Record:
    """The layers of a module's eval graph, in the order in which they run.

    What takes one value and has no weights of more than one axis (an activation, a pooling, a norm) belongs to the
    layer before it.

    Returns:
        layers: each with its `name`, its `kind` (the operator, "input" or "output"), `reads`, the places of the layers
        whose values it takes, and its `weights`, parameters of more than one axis. shapes: of these weights.

    Example:
        >>> [layer["name"] for layer in network(traced)["layers"]]
        ['input', 'conv1', 'conv2', 'add', 'fc', 'output']
    """
    layers = _Layers(traced)
    for node in traced.graphs["eval"].nodes:
        layers.visit(node)
    return {"layers": layers.found, "shapes": layers.shapes}


def _is_size(node: fx.Node) -> bool:
    """Whether a node is a size of a value, not a value."""
    return isinstance(node.meta.get("val"), int | torch.SymInt)


def _kind(node: fx.Node) -> str:
    schema = getattr(node.target, "_schema", None)
    name = node.target if schema is None else schema.name
    return str(getattr(name, "__name__", name)).rpartition("::")[2]
