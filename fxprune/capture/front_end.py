"""The front end: `trace`, from an eager model to a traced module."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx, nn

from fxprune.calling import named_arguments
from fxprune.capture.constants import ConstantKeeper
from fxprune.capture.exporting import Exported, export_modes
from fxprune.capture.protection import Reads, one_at_a_time
from fxprune.capture.sample import Sample
from fxprune.capture.sample_checks import check_batch, check_model, checked_sample
from fxprune.capture.stand_ins import stand_ins
from fxprune.capture.structures import by_argument, keywords_named, register_classes, spread
from fxprune.capture.tagging import tag_results
from fxprune.capture.unlifting import unlift
from fxprune.errors import ArgumentError, CaptureError
from fxprune.graph.attributes import attributes_of
from fxprune.graph.containers import Container, share_contents
from fxprune.graph.editing import erase_dead, splice
from fxprune.graph.metadata import tagged_names
from fxprune.graph.names import join
from fxprune.graph.provenance import Provenance, provenance_of
from fxprune.graph.reparametrizations import Carried, carried, hook_tensor, original_order, reparametrized
from fxprune.graph.traced import MODES, TracedModule
from fxprune.progress import shown
from fxprune.sharding import is_managed, is_sharded

_RESERVED = {n for n in dir(TracedModule) if not hasattr(nn.Module, n)} | {*TracedModule.__annotations__, "training"}


@named_arguments
@shown("trace")
def trace(
    model: nn.Module,
    args: tuple[Any, ...] | torch.Tensor | Mapping[str, Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_shapes: Any = "batch",
    modes: Sequence[str] = ("train", "eval"),
) -> TracedModule:
    """Capture `model` as a graph module that computes what it computes, bit for bit, in every captured mode.

    The capture is `torch.export.export(strict=False)` (https://pytorch.org/docs/stable/export.html), once per mode.
    The model is neither copied nor changed; its parameters and buffers are shared, so later updates are seen.
    Arguments left at their default are part of the graph. Where eager has a fused inference path that it takes
    without gradients only (`nn.TransformerEncoderLayer`, `nn.MultiheadAttention`), the graph is the path with them.
    Captures in several threads wait for each other; no thread may run the model meanwhile.

    Args:
        model: any `nn.Module`. One whose parameters are all on the device "meta" can be planned with
            (`channel_groups`); all else needs `traced.load_state_dict(state, assign=True)` first.
        args: sample inputs of one call: a tensor, a tuple of positional arguments, a dict of keyword arguments, or a
            `fxprune.Call` of both; any dtype and device that the model takes. Only shapes and dtypes matter.
        kwargs: sample keyword inputs beside these.
        dynamic_shapes: "batch" frees axis 0 of every tensor whose size there is that of the first tensor input; None
            fixes every size; anything else goes to `torch.export.export` as it is, but that one dict of axes for a
            cache of the transformers library stands for all its tensors.
        modes: which of "train" and "eval" to capture; one mode costs half.

    Returns:
        A `TracedModule` in the model's mode, where that was captured.

    Raises:
        CaptureError: the model cannot be captured faithfully; names module and line, also where a size that is to be
            free is fixed.
        SampleError: the model does not run on the sample: labels, arrays or a loader among it, other shapes, none.
        ArgumentError: `modes` or `dynamic_shapes` are not usable.

    Warns:
        BatchSpecializedWarning: the graph holds for the sample's batch size only.
        FixedSizeWarning: an axis left to `Dim.AUTO` is fixed; names input, axis, size and the line that did it.
        EvalOnlyWarning: train mode cannot be captured; `.train()` will raise.
        FxpruneWarning: the parameters have no values.

    Example:
        >>> traced = fxprune.trace(nn.Sequential(nn.Linear(4, 2), nn.ReLU()), (torch.randn(3, 4),))
        >>> traced(torch.randn(8, 4)).shape
        torch.Size([8, 2])
    """
    check_model(model, args)
    _refuse_sharded(model)
    _check(model, dynamic_shapes, modes)
    call = checked_sample(model, args, kwargs)
    if isinstance(dynamic_shapes, str):
        check_batch(call)
    sample = Sample(*call)
    with one_at_a_time(), stand_ins(model) as hollow:
        register_classes((sample.args, sample.kwargs))
        dynamic_shapes = spread(model, dynamic_shapes, sample.args, sample.kwargs)
        sample = sample.rebuilt()
        shapes = by_argument(model, dynamic_shapes)
        with keywords_named(model, sample.kwargs):
            exported, sample = export_modes(model, sample, shapes, modes)
        first = exported["train" if "train" in exported else "eval"]
        root = _containers(model, first.reads)
        graphs = {mode: _graph(model, root, mode, found) for mode, found in exported.items()}
        if "eval" in graphs:
            _compute_all_carried(model, graphs["eval"])
        keywords = sample.in_order(first.program)
        traced = TracedModule(root, graphs, sample.args, keywords, dynamic_shapes, training=model.training)
        hollow(traced)
    if dynamic_shapes == "batch":
        traced.dynamic_shapes = sample.dynamic_shapes(traced)
    return traced


def _refuse_sharded(model: nn.Module) -> None:
    if is_managed(model) or any(map(is_sharded, model.parameters())):
        raise CaptureError(
            f"{type(model).__name__} is sharded already, and a capture would hold for the shards alone. Trace first, "
            "then shard: traced = fxprune.trace(model, ...); torch.distributed.fsdp.fully_shard(traced)."
        )


def _check(model: nn.Module, dynamic_shapes: Any, modes: Sequence[str]) -> None:
    """Refuse what cannot be captured, and options out of range."""
    if isinstance(model, TracedModule) and (left := reparametrized(model)):
        raise CaptureError(
            f"the traced module has masks or norms ({', '.join(left)}), which a second trace would not tell from the "
            "rest of the graph. Finalize it first, trace the eager model again, or copy it with copy.deepcopy."
        )
    if isinstance(modes, str) or not isinstance(modes, Iterable) or not modes or not set(modes) <= set(MODES):
        raise ArgumentError(f'modes={modes!r}: a tuple out of "train" and "eval" is needed.')
    if isinstance(dynamic_shapes, bool | int) or (isinstance(dynamic_shapes, str) and dynamic_shapes != "batch"):
        raise ArgumentError(f'dynamic_shapes={dynamic_shapes!r}: "batch", None or torch.export\'s structure is needed.')
    clash = [n for n in (*model._modules, *model._parameters, *model._buffers) if n in _RESERVED]
    if clash:
        raise CaptureError(f"the model's {clash[0]!r} has the name of an attribute of torch.fx.GraphModule. Rename it.")


def _containers(model: nn.Module, reads: Reads) -> Container:
    """The tree of containers for a model's tree of modules, those that stand in several places once."""
    built: dict[int, Container] = {}

    def build(module: nn.Module) -> Container:
        if id(module) not in built:
            built[id(module)] = container = Container(_provenance(module, reads))
            share_contents(container, module)
            for name, child in module._modules.items():
                container._modules[name] = None if child is None else build(child)
        return built[id(module)]

    return build(model)


def _provenance(module: nn.Module, reads: Reads) -> Provenance:
    is_captured = isinstance(module, Container | TracedModule)
    known = provenance_of(module) if is_captured else Provenance(type(module), attributes=attributes_of(module))
    counts = {name: reads[id(vars(module)), name] for name in module._parameters}
    return Provenance(known.source_class, original_order(module), counts, known.attributes)


def _graph(model: nn.Module, root: Container, mode: str, exported: Exported) -> fx.Graph:
    """One mode's graph over the tensors in `root`, with the values of reparametrized parameters marked."""
    names = _argument_names(model, exported.program.call_spec.in_spec)
    computed = exported.assigned | {join(item.path, item.tensor) for item in carried(model)}
    graph = unlift(exported.program, root, mode, names, ConstantKeeper(model, root, mode, computed))
    tag_results(graph, model)
    erase_dead(graph)
    return graph


def _argument_names(model: nn.Module, in_spec: pytree.TreeSpec) -> list[str]:
    count = in_spec.child(0).num_children
    names: list[str] = []
    for parameter in inspect.signature(model.forward).parameters.values():
        if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
            names += [f"{parameter.name}_{i}" for i in range(count - len(names))]
        elif parameter.kind in (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD):
            names.append(parameter.name)
    return names[:count] + list(in_spec.child(1).context)


def _compute_all_carried(model: nn.Module, graph: fx.Graph) -> None:
    """Add the value of every reparametrized parameter that the eval graph does not read: finalize needs it."""
    computed = tagged_names(graph)
    for item in carried(model):
        if item.parameter in computed:
            continue
        value = trace(_Value(item), modes=("eval",)).graphs["eval"]
        path = item.parameter.rpartition(".")[0]
        with graph.inserting_before(graph.output_node()):
            splice(graph, value, lambda name, path=path: join(path, name.removeprefix("owner.")))  # type: ignore[misc]
        computed = tagged_names(graph)


class _Value(nn.Module):
    """Reads one tensor of a module, after the hooks that compute it."""

    def __init__(self, item: Carried) -> None:
        super().__init__()
        self.owner, self.tensor = item.owner, item.tensor

    def forward(self) -> Any:
        for hook in self.owner._forward_pre_hooks.values():
            if hook_tensor(hook):
                hook(self.owner, ())
        return getattr(self.owner, self.tensor)
