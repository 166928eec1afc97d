"""A checkpoint restored without its model: containers, tensors and graphs as the file has them."""

from __future__ import annotations

from torch import nn

from fxprune.checkpoints.header import StoredModule
from fxprune.checkpoints.reading import Checkpoint
from fxprune.checkpoints.stored_graphs import read_graph
from fxprune.graph.containers import Container
from fxprune.graph.provenance import Provenance
from fxprune.graph.traced import TracedModule


def restored(checkpoint: Checkpoint) -> TracedModule:
    """The module that a file with graphs holds, on the CPU.

    Raises:
        ArtifactError: a graph could run code. What torch raises for a damaged program comes as it is.
    """
    header, root = checkpoint.header, _containers(checkpoint)
    graphs = {mode: read_graph(checkpoint.programs[mode], root, mode, header.graphs[mode]) for mode in header.modes}
    args, kwargs = checkpoint.inputs
    traced = TracedModule(root, graphs, args, kwargs, checkpoint.dynamic_shapes, training=header.training)
    traced.record(checkpoint.plan)
    traced.decide(header.decided)
    traced.make(header.made_biases)
    return traced


def _containers(checkpoint: Checkpoint) -> Container:
    """The tree of modules, those in several places once; parents stand before their children in a file."""
    built: dict[str, Container] = {}
    for stored in checkpoint.header.modules:
        if stored.is_first:
            built[stored.path] = _container(stored)
            checkpoint.fill(built[stored.path], stored)
        if stored.path:
            parent, _, name = stored.path.rpartition(".")
            built[stored.path] = built[parent]._modules[name] = built[stored.same]
    return built[""]


def _container(stored: StoredModule) -> Container:
    container = Container(
        Provenance(getattr(nn, stored.kind), stored.order, stored.reads, options=stored.options, masked=stored.masked)
    )
    container._non_persistent_buffers_set.update(stored.loose)
    return container
