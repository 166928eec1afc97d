"""A traced module as the header and the tensors of a checkpoint."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx, nn

from fxprune.borrowing import fills_its_memory
from fxprune.checkpoints.dimensions import dimension_to_data
from fxprune.checkpoints.header import Header, StoredModule, StoredTensor, StoredTree
from fxprune.checkpoints.stored_graphs import stored_graph
from fxprune.graph.masks import masked
from fxprune.graph.names import tensors_of
from fxprune.graph.provenance import provenance_of
from fxprune.graph.reparametrizations import reparametrized
from fxprune.graph.traced import TracedModule
from fxprune.version import __version__

Tensors = dict[str, Tensor]


def described(traced: TracedModule) -> tuple[Header, Tensors]:
    """Everything about a module but its graphs: the header, still without digests, and what it names as tensors."""
    tensors, blobs = _stored_tensors(traced)
    inputs, samples = _stored_inputs(traced)
    header = Header(
        version=__version__,
        training=traced.training,
        modes=traced.modes,
        graphs={mode: stored_graph(graph) for mode, graph in traced.graphs.items()},
        modules=_stored_modules(traced),
        tensors=tensors,
        masked=masked(traced),
        reparametrized=reparametrized(traced),
        inputs=inputs,
        dynamic_shapes=StoredTree.of(_dynamic_shapes(traced), dimension_to_data),
        plan=None if traced.plan is None else traced.plan.to_json(),
        sha256={},
        decided=tuple(sorted(traced.decided)),
        made_biases=dict(traced.made_biases),
        hollow={
            name: (list(value.shape), str(value.dtype).removeprefix("torch."))
            for name, value in tensors_of(traced).items()
            if value.is_meta
        },
    )
    return header, blobs | samples


def _stored_tensors(traced: TracedModule) -> tuple[dict[str, StoredTensor], Tensors]:
    objects: dict[int, str] = {}  # the first name of each
    places: dict[Any, str] = {}
    stored, blobs = {}, {}
    for name, value in tensors_of(traced).items():
        place = (value.data_ptr() or id(value), value.dtype, value.shape, value.stride())
        if place not in places and not value.is_meta:
            blobs[f"state:{name}"] = _plain(value)
        stored[name] = StoredTensor(
            object=objects.setdefault(id(value), name),
            data=places.setdefault(place, name),
            parameter=isinstance(value, nn.Parameter),
            trained=value.requires_grad,
            stride=value.stride() if fills_its_memory(value) and not value.is_contiguous() else None,
        )
    return stored, blobs


def _plain(value: Tensor) -> Tensor:
    """On the CPU and contiguous; a copy only where it is not."""
    return value.detach().cpu().contiguous()


def _stored_modules(traced: TracedModule) -> list[StoredModule]:
    first_paths: dict[nn.Module, str] = {}
    stored = []
    for path, module in traced.named_modules(remove_duplicate=False):
        if path and isinstance(module, fx.GraphModule):  # the branches of control flow belong to the programs
            continue
        known = provenance_of(module)
        stored.append(
            StoredModule(
                path=path,
                same=first_paths.setdefault(module, path),
                kind=_kind(known.source_class),
                order=known.parameter_order,
                reads=dict(known.reads),
                options=dict(known.options),
                loose=sorted(module._non_persistent_buffers_set),
                parameters={name: value is not None for name, value in module._parameters.items()},
                buffers={name: value is not None for name, value in module._buffers.items()},
                masked=known.masked,
            )
        )
    return stored


def _kind(source_class: type[nn.Module]) -> str:
    """The nearest class of `torch.nn` that the eager module's class derives from."""
    names = (kind.__name__ for kind in source_class.__mro__ if kind is getattr(nn, kind.__name__, None))
    return next(names, "Module")


def _stored_inputs(traced: TracedModule) -> tuple[StoredTree, Tensors]:
    """The sample inputs: a list of one name stands for a tensor, the same for one that is given twice."""
    names: dict[int, str] = {}
    blobs: Tensors = {}

    def leaf(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        name = names.setdefault(id(value), f"input:{len(names)}")
        blobs[name] = _plain(value)
        return [name]

    return StoredTree.of((traced.example_args, traced.example_kwargs), leaf), blobs


def _dynamic_shapes(traced: TracedModule) -> Any:
    shapes = traced.dynamic_shapes
    if hasattr(shapes, "dynamic_shapes"):  # torch.export's collections
        return shapes.dynamic_shapes(traced, traced.example_args, traced.example_kwargs)
    return shapes
