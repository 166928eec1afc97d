"""Capture: `torch.export` in train and in eval mode, un-lifted to graphs over one set of parameters."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import inspect
import io
import logging
import random
import re
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.utils._pytree as pytree
from torch import fx, nn
from torch.export import Dim, ExportedProgram, ShapesCollection
from torch.export.graph_signature import InputKind, OutputKind
from torch.nn.utils import parametrize

from fxprune.errors import ArgumentError, BatchSpecializedWarning, CaptureError, EvalOnlyWarning
from fxprune.graph.arguments import fixed_size
from fxprune.graph.codegen import CodeGen
from fxprune.graph.containers import Container, Provenance, provenance_of, share_contents
from fxprune.graph.editing import erase_dead, inline_no_grad_regions, splice
from fxprune.graph.names import join
from fxprune.graph.reparametrizations import carried, hook_tensor, original_order, reparametrized, tag_results, tagged
from fxprune.graph.traced import TracedModule
from fxprune.torch_internals import LOGGERS_OF_FAILED_CAPTURES, PyTreeInfo, flat_weight_names, let_weights_be_reread

MODES = ("train", "eval")
_Reads = Counter[tuple[int, str]]


def trace(
    model: nn.Module,
    args: tuple[Any, ...] | torch.Tensor = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_shapes: Any = "batch",
    modes: Sequence[str] = MODES,
) -> TracedModule:
    """Capture `model` as a graph module that computes what it computes, bit for bit, in every captured mode.

    The capture is `torch.export.export(strict=False)` (https://pytorch.org/docs/stable/export.html), once per mode.
    The model is neither copied nor changed; its parameters and buffers are shared, so later updates are seen.
    Arguments left at their default are part of the graph. Where eager has a fused inference path that it takes
    without gradients only (`nn.TransformerEncoderLayer`, `nn.MultiheadAttention`), the graph is the path with them.

    Args:
        model: any `nn.Module`.
        args: sample positional inputs, a tuple (a single tensor is taken as `(tensor,)`); any dtype and device that
            the model takes. Only shapes and dtypes matter.
        kwargs: sample keyword inputs.
        dynamic_shapes: "batch" frees axis 0 of every tensor whose size there is that of the first tensor input; None
            fixes every size; anything else goes to `torch.export.export` as it is.
        modes: which of "train" and "eval" to capture; one mode costs half.

    Returns:
        A `TracedModule` in the model's mode, where that was captured.

    Raises:
        CaptureError: the model cannot be captured faithfully; names module and line.
        ArgumentError: `modes` or `dynamic_shapes` are not usable.

    Warns:
        BatchSpecializedWarning: the graph holds for the sample's batch size only.
        EvalOnlyWarning: train mode cannot be captured; `.train()` will raise.

    Example:
        >>> traced = fxprune.trace(nn.Sequential(nn.Linear(4, 2), nn.ReLU()), (torch.randn(3, 4),))
        >>> traced(torch.randn(8, 4)).shape
        torch.Size([8, 2])
    """
    if not isinstance(model, nn.Module):
        raise CaptureError(f"trace takes an nn.Module, got {type(model).__name__}. Wrap the function in a module.")
    if isinstance(model, TracedModule) and (left := reparametrized(model)):
        raise CaptureError(
            f"the traced module has masks or norms ({', '.join(left)}), which a second trace would not tell from the "
            "rest of the graph. Finalize it first, trace the eager model again, or copy it with copy.deepcopy."
        )
    if isinstance(modes, str) or not modes or not set(modes) <= set(MODES):
        raise ArgumentError(f'modes={modes!r}: a tuple out of "train" and "eval" is needed.')
    if isinstance(dynamic_shapes, str) and dynamic_shapes != "batch":
        raise ArgumentError(f'dynamic_shapes={dynamic_shapes!r}: "batch", None or torch.export\'s structure is needed.')
    clash = [n for n in (*model._modules, *model._parameters, *model._buffers) if n in _RESERVED]
    if clash:
        raise CaptureError(f"the model's {clash[0]!r} has the name of an attribute of torch.fx.GraphModule. Rename it.")
    sample = _Sample((args,) if isinstance(args, torch.Tensor) else tuple(args), dict(kwargs or {}))
    reads: dict[str, _Reads] = {}
    programs, assigned = _export_modes(model, sample, dynamic_shapes, modes, reads)
    root = _containers(model, reads[min(programs, key=MODES.index)])
    graphs = {}
    for mode, program in programs.items():
        names = _argument_names(model, program.call_spec.in_spec)
        keep = partial(_keep_constant, model=model, root=root, mode=mode, assigned=assigned[mode])
        graphs[mode] = unlift(program, root, mode, names, keep)
        tag_results(graphs[mode], model)
        erase_dead(graphs[mode])
    for item in carried(model) if "eval" in graphs else ():  # finalize needs the value of those that eval does not read
        if not tagged(graphs["eval"], item.parameter):
            value = trace(_Value(item.owner, item.tensor), modes=("eval",)).graphs["eval"]
            prefix = item.parameter[: -len(item.tensor)]
            with graphs["eval"].inserting_before(graphs["eval"].output_node()):
                splice(graphs["eval"], value, lambda name, prefix=prefix: prefix + name.removeprefix("owner."))  # type: ignore[misc]
    order = next(iter(programs.values())).call_spec.in_spec.child(1).context
    kwargs = {name: sample.kwargs[name] for name in order}
    traced = TracedModule(root, graphs, sample.args, kwargs, dynamic_shapes, training=model.training)
    if dynamic_shapes == "batch":
        traced.dynamic_shapes = sample.shapes(traced) if sample.free else None
    return traced


_RESERVED = {n for n in dir(TracedModule) if not hasattr(nn.Module, n)} | {*TracedModule.__annotations__, "training"}
_ASSIGNED = re.compile(r"The tensor attributes? (.*?) (?:was|were) assigned during export")


class _Value(nn.Module):
    """Reads one tensor of a module, after the hooks that compute it."""

    def __init__(self, owner: nn.Module, tensor: str) -> None:
        super().__init__()
        self.owner, self.tensor = owner, tensor

    def forward(self) -> Any:
        for hook in self.owner._forward_pre_hooks.values():
            if hook_tensor(hook):
                hook(self.owner, ())
        return getattr(self.owner, self.tensor)


class _Sample:
    """The sample inputs, and which of their tensors have a free batch axis."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.args, self.kwargs = args, kwargs
        self.free: list[int] = []
        _register_dataclasses((args, kwargs))

    def free_batch(self) -> _Sample:
        """The sample with a free axis 0 where it has the batch's size, which is made 2 where it is 1.

        `torch.export` takes a size of 1 as a constant.
        """
        leaves, spec = pytree.tree_flatten((self.args, self.kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.dim()]
        if not tensors or not (batch := tensors[0].shape[0]):
            return self
        free = [i for i, leaf in enumerate(leaves) if any(leaf is t for t in tensors) and leaf.shape[0] == batch]
        if batch == 1:
            doubled = {id(leaves[i]): torch.cat([leaves[i], leaves[i]]).detach() for i in free}
            leaves = [doubled.get(id(leaf), leaf) for leaf in leaves]
        sample = _Sample(*pytree.tree_unflatten(leaves, spec))
        sample.free = free
        return sample

    def shapes(self, module: nn.Module) -> Any:
        """`torch.export`'s structure of the free axes, for `module`'s signature."""
        leaves = pytree.tree_leaves((self.args, self.kwargs))
        collection = ShapesCollection()
        for i in self.free:
            collection[leaves[i]] = {0: Dim.AUTO}
        return collection.dynamic_shapes(module, self.args, self.kwargs)

    def is_specialized(self, program: ExportedProgram) -> bool:
        """Whether the capture fixed a batch axis that was free."""
        specs = zip(program.graph.find_nodes(op="placeholder"), program.graph_signature.input_specs, strict=True)
        inputs = [node.meta["val"] for node, spec in specs if spec.kind is InputKind.USER_INPUT]
        leaves = pytree.tree_leaves(
            (self.args, {k: self.kwargs[k] for k in program.call_spec.in_spec.child(1).context})
        )
        marked = {id(pytree.tree_leaves((self.args, self.kwargs))[i]) for i in self.free}
        return any(
            id(leaf) in marked and fixed_size(v.shape[0]) is not None for leaf, v in zip(leaves, inputs, strict=True)
        )


def _export_modes(
    model: nn.Module, sample: _Sample, dynamic_shapes: Any, modes: Sequence[str], reads: dict[str, _Reads]
) -> tuple[dict[str, ExportedProgram], dict[str, set[str]]]:
    """One exported program a mode, and the plain attributes that the forward assigned tensors to."""
    programs: dict[str, ExportedProgram] = {}
    assigned: dict[str, set[str]] = {}
    fixed = _Sample(sample.args, sample.kwargs)
    if dynamic_shapes == "batch":
        free = sample.free_batch()
        sample.args, sample.kwargs, sample.free = free.args, free.kwargs, free.free
    shapes = sample.shapes(model) if sample.free else None if dynamic_shapes == "batch" else dynamic_shapes
    for mode in [m for m in ("eval", "train") if m in modes]:  # what eval cannot, train need not try
        try:
            try:
                programs[mode], assigned[mode] = _export(model, sample, mode, shapes, reads)
                why = "is fixed by the model" if sample.free and sample.is_specialized(programs[mode]) else ""
            except CaptureError as error:
                if not sample.free:
                    raise
                why = f"cannot be free: {error}"
            if why:
                programs[mode], assigned[mode] = _export(model, fixed, mode, None, reads)
                message = f"captured for the sample's batch size alone; in {mode} mode the batch {why}"
                warnings.warn(message, BatchSpecializedWarning, stacklevel=3)
                if mode == "train" and "eval" in programs:
                    programs["eval"], assigned["eval"] = _export(model, fixed, "eval", None, reads)
                sample.args, sample.kwargs, sample.free, shapes = fixed.args, fixed.kwargs, [], None
        except CaptureError as error:
            if mode != "train" or "eval" not in programs:
                raise
            warnings.warn(f"captured for eval mode alone. {error}", EvalOnlyWarning, stacklevel=3)
    return programs, assigned


def _export(
    model: nn.Module, sample: _Sample, mode: str, shapes: Any, reads: dict[str, _Reads]
) -> tuple[ExportedProgram, set[str]]:
    with (
        _undisturbed(model),
        _counted_reads(model) as reads[mode],
        warnings.catch_warnings(record=True) as caught,
        contextlib.redirect_stderr(io.StringIO()),  # torch prints the graph so far when it fails
        torch.enable_grad(),
    ):
        warnings.simplefilter("always")
        before = _global_generators()
        hook = model.register_forward_hook(lambda module, args, output: _register_dataclasses(output))
        try:
            model.train(mode == "train")
            program = torch.export.export(
                model, sample.args, sample.kwargs or None, dynamic_shapes=shapes, strict=False
            )  # fmt: skip
        except Exception as error:
            raise CaptureError(_explain(error, model, mode)) from error
        finally:
            hook.remove()
            after = _global_generators()
    if str(before) != str(after):
        raise CaptureError(
            f"{type(model).__name__} draws from Python's or numpy's random generator in {mode} mode; the graph would "
            "repeat the numbers drawn at the capture. Draw by torch inside forward, or pass the numbers as inputs."
        )
    assigned: set[str] = set()
    for warning in caught:
        if found := _ASSIGNED.search(str(warning.message)):
            assigned |= {name.removeprefix("self.") for name in found.group(1).split(", ")}
        elif not issubclass(warning.category, DeprecationWarning | FutureWarning):
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    return program, assigned


def _global_generators() -> tuple[Any, Any]:
    return random.getstate(), np.random.get_state()  # noqa: NPY002  models draw from the legacy generator


def _explain(error: Exception, model: nn.Module, mode: str) -> str:
    names = {id(module): name for name, module in model.named_modules()}
    where = ""
    for frame, line in traceback.walk_tb(error.__traceback__):
        owner = frame.f_locals.get("self")
        if (
            id(owner) in names
            and frame.f_code.co_name != "_call_impl"
            and not frame.f_code.co_name.startswith("_wrapped")
        ):
            name = names[id(owner)] or "the root module"
            where = f" at {name} ({type(owner).__name__}), {frame.f_code.co_filename}:{line}"
    reason = str(error).strip().split("\n")[0] or type(error).__name__
    return (
        f"{type(model).__name__} was to be captured in {mode} mode and cannot be{where}: {type(error).__name__}: "
        f"{reason}. Work around: compute what depends on tensor values by tensor operations (torch.where, torch.cond), "
        "keep `.item()`, `.numpy()` and Python branches on values out of forward, or trace the submodules around it."
    )


@contextlib.contextmanager
def _counted_reads(model: nn.Module) -> Iterator[_Reads]:
    """Count how often one forward reads each parameter: as often it would evaluate a parametrization of it."""
    counts = _Reads()
    getattributes = [nn.Module.__getattr__]  # torch.export replaces it before forward runs

    def enter(root: nn.Module, args: Any) -> None:
        def read(module: nn.Module, name: str) -> Any:
            counts[id(module.__dict__), name] += 1  # torch.export's proxy of a module has the module's dict
            return getattributes[-1](module, name)

        counts.clear()
        getattributes.append(nn.Module.__getattr__)
        nn.Module.__getattr__ = read  # type: ignore[method-assign]

    def leave(*ignored: Any) -> None:
        nn.Module.__getattr__ = getattributes.pop()  # type: ignore[method-assign]

    hooks = model.register_forward_pre_hook(enter), model.register_forward_hook(leave)
    try:
        yield counts
    finally:
        nn.Module.__getattr__ = getattributes[0]  # type: ignore[method-assign]
        for hook in hooks:
            hook.remove()


def _reread(module: nn.RNNBase) -> bool:
    """Read the weights as eager's `_weights_have_changed` does, in which the capture sees all of them changed."""
    for name in flat_weight_names(module):
        if hasattr(module, name) and getattr(module, name) is not None and parametrize.is_parametrized(module, name):
            break
    return True


@contextlib.contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Leave every attribute of the model as it was, and give tied parameters one object a name meanwhile.

    With an object for each name, the graph tells which of a tied pair a node reads, as masks on one side need.
    """
    saved: list[tuple[nn.Module, dict[str, Any], dict[str, Any]]] = []
    modules = list(model.modules())
    for module in modules:
        inner = {k: copy.copy(v) for k, v in module.__dict__.items() if isinstance(v, dict | list | set)}
        saved.append((module, dict(module.__dict__), inner))
    seen: set[int] = set()
    ties: list[tuple[nn.Module, str, nn.Parameter]] = []
    levels = {logger: logger.level for logger in map(logging.getLogger, LOGGERS_OF_FAILED_CAPTURES)}
    python, numpy = _global_generators()
    try:
        for logger in levels:
            logger.setLevel(logging.CRITICAL)  # the error is raised, it need not be logged besides
        for module in modules:
            if isinstance(module, nn.RNNBase):
                let_weights_be_reread(module, partial(_reread, module))
            for name, parameter in list(module._parameters.items()):
                if parameter is not None and id(parameter) in seen:
                    ties.append((module, name, parameter))
                    setattr(module, name, nn.Parameter(parameter.detach(), parameter.requires_grad))
                seen.add(id(parameter))
        yield
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
        for module, name, parameter in ties:
            setattr(module, name, parameter)
        for module, attributes, inner in saved:
            module.__dict__.clear()
            module.__dict__.update(attributes)
            for key, value in inner.items():
                current = attributes[key]
                if isinstance(current, list):
                    current[:] = value
                else:
                    current.clear()
                    current.update(value)


def _register_dataclasses(value: Any) -> None:
    for leaf in pytree.tree_leaves(value):
        if dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            kind = type(leaf)
            torch.export.register_dataclass(kind, serialized_type_name=f"{kind.__module__}.{kind.__qualname__}")
            _register_dataclasses(leaf)


def _provenance(module: nn.Module, reads: _Reads) -> Provenance:
    is_traced = isinstance(module, Container | TracedModule)
    source_class = provenance_of(module).source_class if is_traced else type(module)
    counts = {name: reads[id(vars(module)), name] for name in module._parameters}
    return Provenance(source_class, original_order(module), counts)


def _containers(model: nn.Module, reads: _Reads) -> Container:
    memo: dict[int, Container] = {}

    def build(module: nn.Module) -> Container:
        if id(module) not in memo:
            memo[id(module)] = container = Container(_provenance(module, reads))
            share_contents(container, module)
            for name, child in module._modules.items():
                container._modules[name] = None if child is None else build(child)
        return memo[id(module)]

    return build(model)


def unlift(
    program: ExportedProgram,
    root: Container,
    mode: str,
    names: list[str],
    keep_constant: Callable[[torch.Tensor, str], str],
) -> fx.Graph:
    """The graph of a program with its parameters and buffers read from `root` by `get_attr` nodes.

    `names` are those of the arguments; `keep_constant` holds a tensor that is neither in `root`, and returns its name.
    """
    graph: fx.Graph = program.graph
    signature = program.graph_signature
    for node, spec in zip(graph.find_nodes(op="placeholder"), signature.input_specs, strict=True):
        if spec.kind is InputKind.USER_INPUT:
            continue
        if spec.kind not in (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR):
            raise CaptureError(f"the model reads {spec.target!r} ({spec.kind.name}), which is no tensor.")
        target = str(spec.target)
        if spec.kind is InputKind.CONSTANT_TENSOR:
            target = keep_constant(program.constants[target], target)
        if node.users:
            with graph.inserting_before(node):
                read = graph.create_node("get_attr", target, name=target.replace(".", "_"))
            read.meta = dict(node.meta)
            node.replace_all_uses_with(read)
        graph.erase_node(node)
    if any(s.kind not in (OutputKind.USER_OUTPUT, OutputKind.BUFFER_MUTATION) for s in signature.output_specs):
        raise CaptureError("the model returns something else than tensors and constants.")
    inline_no_grad_regions(graph, program.graph_module)
    for node in graph.find_nodes(op="get_attr"):
        body = getattr(program.graph_module, str(node.target), None)
        if isinstance(body, fx.GraphModule):  # the branches of control flow
            node.target = f"_{mode}_{node.target}"
            root.add_module(node.target, body)
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten._assert_tensor_metadata.default):
        graph.erase_node(node)
    spec = program.call_spec
    graph.set_codegen(CodeGen(PyTreeInfo(names, spec.in_spec, spec.out_spec)))
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


def _keep_constant(
    value: torch.Tensor, name: str, model: nn.Module, root: Container, mode: str, assigned: set[str]
) -> str:
    """Hold a tensor that is neither parameter nor buffer as a non-persistent buffer; returns its name."""
    if value.grad_fn is not None or name in assigned or any(name == join(i.path, i.tensor) for i in carried(model)):
        raise CaptureError(
            f"{name!r} is read as a plain tensor that an earlier forward computed: a hook that computes it runs too "
            "late or never, or forward keeps state in an attribute. What it holds now would be frozen into the graph. "
            "`fxprune.diagnose(model)` says more; remove the reparametrization, or register the state as a buffer."
        )
    path, _, attribute = name.rpartition(".")
    owner: nn.Module = root
    try:
        owner = root.get_submodule(path)
        value = getattr(model.get_submodule(path), attribute)
        assert isinstance(value, torch.Tensor)
    except AttributeError:
        owner, name = root, f"_{mode}_{name.replace('.', '_')}"
        attribute = name
    owner.register_buffer(attribute, value, persistent=False)
    return name
