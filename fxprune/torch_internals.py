"""Everything private of torch that the library relies on: one function or name each, one test each.

What belongs here: names with a leading underscore, in modules or on objects, and undocumented attributes. A release of
torch that changes one of them fails the test of that name in `tests/fxprune/test_torch_internals*.py`, which checks the
behaviour that is relied on. `_parameters`, `_buffers`, `_modules` and `_forward_pre_hooks` of modules, and
`torch.utils._pytree`, stay where they are used: torch's own extensions build on them.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import sympy
import torch
import torch.utils._pytree as pytree
from torch import fx, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo import _trace_wrapped_higher_order_op
from torch._export.verifier import TrainingIRVerifier
from torch._ops import OpOverload, OpOverloadPacket
from torch._subclasses import fake_tensor as fake_tensors
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam, ParamModuleInfo
from torch.distributed.tensor._dtensor_spec import DTensorSpec
from torch.distributions import Distribution
from torch.export import Dim, _trace
from torch.export.dynamic_shapes import _DerivedDim as DerivedDim
from torch.export.dynamic_shapes import _DimHint as DimHint
from torch.export.pt2_archive._package import _load_exported_programs as programs_in
from torch.fx.experimental.symbolic_shapes import TLS as guards_of_thread
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.fx.graph import _PyTreeCodeGen as PyTreeCodeGen
from torch.fx.graph import _PyTreeInfo as PyTreeInfo
from torch.nn.modules.batchnorm import _NormBase as NormBase
from torch.nn.modules.conv import _ConvNd as ConvNd
from torch.nn.modules.conv import _ConvTransposeNd as ConvTransposeNd
from torch.nn.utils.parametrizations import _Orthogonal as Orthogonal
from torch.nn.utils.parametrizations import _WeightNorm as WeightNormParametrization
from torch.nn.utils.prune import BasePruningMethod, PruningContainer
from torch.nn.utils.prune import _validate_pruning_amount_init as validate_pruning_amount
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._sympy import functions

__all__ = [
    "ASKED_BEFORE_BROADCAST",
    "LOGGERS_OF_FAILED_CAPTURES",
    "ConvNd",
    "ConvTransposeNd",
    "FakeTensor",
    "FakeTensorMode",
    "NormBase",
    "OpOverload",
    "OpOverloadPacket",
    "Orthogonal",
    "PyTreeCodeGen",
    "PyTreeInfo",
    "TorchDispatchMode",
    "TrainingIRVerifier",
    "WeightNormParametrization",
    "any_recurrent_length",
    "calls_kept",
    "conversions_checked",
    "decomposes_itself",
    "decompositions_set_aside",
    "derived_dimension",
    "dimension_hint",
    "distributions_unchecked",
    "fake_cpu_tensor",
    "fake_like",
    "fake_tensor",
    "flat_weight_names",
    "follow_parameters",
    "functional_twin",
    "functions_applied",
    "fuses_in_eval",
    "guards_ignored",
    "has_forward",
    "indices_recorded",
    "is_composite",
    "is_erased",
    "is_inside_step",
    "is_step_of_vmap",
    "name_pruning_method",
    "no_new_guards",
    "overload_of_custom_operator",
    "programs_in",
    "pruned_tensor",
    "pruning_methods",
    "pytree_info",
    "register_named_tuple",
    "replace_sizes",
    "schema_of",
    "sharding_options",
    "size_expression",
    "size_function",
    "sizes_watched",
    "spread_before",
    "state_of_generated_code",
    "step_pre_hooks",
    "storage_users",
    "symbol_ranges",
    "symbolic_square_root",
    "take_parameters",
    "untouched_by_torch_function",
    "validate_pruning_amount",
    "values_known",
    "weights_gathered_if",
]

# They print the stack of a capture that fails, which raises its error besides, and tell of sizes that were fixed.
LOGGERS_OF_FAILED_CAPTURES = (
    "torch._subclasses.fake_tensor", "torch.fx.experimental.symbolic_shapes", "torch._export.non_strict_utils",
)  # fmt: skip

# The attribute of a module that DistributedDataParallel looks for before it sends parameters and buffers to all.
ASKED_BEFORE_BROADCAST = "_ddp_params_and_buffers_to_ignore"


# ---- graphs


def schema_of(target: object) -> torch.FunctionSchema | None:
    """The schema of an operator overload, which tells names, aliases and writes; None of anything else."""
    return target._schema if isinstance(target, OpOverload) else None


def is_composite(target: OpOverload) -> bool:
    """Whether torch computes an operator by calling others, so that its schema does not say what shares memory."""
    return bool(target.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd))


def functional_twin(target: OpOverload) -> OpOverload | OpOverloadPacket | None:
    """What computes the value that an in-place operator writes, all its overloads where none fits; None for others."""
    name = target.overloadpacket.__name__
    if not name.endswith("_") or name.endswith("__"):
        return None
    packet = getattr(getattr(torch.ops, target.namespace), name[:-1], None)
    twin: OpOverload | OpOverloadPacket | None = getattr(packet, target._overloadname, packet)
    return twin


def overload_of_custom_operator(operator: Any) -> Any:
    """The overload behind what `torch.library.custom_op` returns; anything else as it is."""
    return getattr(operator, "_opoverload", operator)


# takes the root of a size in a graph
symbolic_square_root: Callable[..., Any] = torch._sym_sqrt  # type: ignore[attr-defined]


def pytree_info(graph: fx.Graph) -> PyTreeInfo:
    """What a captured graph's signature was: `orig_args` (names), `in_spec` and `out_spec` (structures)."""
    info: PyTreeInfo = graph._codegen.pytree_info  # type: ignore[attr-defined]
    return info


def is_erased(node: fx.Node) -> bool:
    """Whether the node has been taken out of its graph."""
    return bool(node._erased)


def state_of_generated_code(module: fx.GraphModule) -> dict[str, Any]:
    """What `recompile` has set on a module beside its class's `forward`: the graph, its code and structures."""
    names = ("_graph", "_code", "_in_spec", "_out_spec", "_lineno_map", "_prologue_start")
    return {name: module.__dict__[name] for name in names if name in module.__dict__}


@contextlib.contextmanager
def calls_kept(module: fx.GraphModule) -> Iterator[None]:
    """Within, code is generated for a module, whose class FSDP may have replaced by a subclass of it.

    `recompile` gives the class of its object a `__call__` that goes on with that of the class above: were there two in
    a row, they would call each other for ever.
    """
    kind = type(module)
    goes_on = any("_wrapped_call" in vars(above) for above in kind.__mro__[1:])
    yield
    if goes_on and "_wrapped_call" in vars(kind):
        del kind._wrapped_call, kind.__call__  # type: ignore[attr-defined]


def fake_tensor(like: FakeTensor, empty: torch.Tensor) -> FakeTensor:
    """A fake tensor of the mode and device of `like`, with the sizes and strides of `empty`, which is on "meta"."""
    return FakeTensor(like.fake_mode, empty, like.fake_device)


# ---- tensors whose values are elsewhere

# as `__torch_function__` of a class of tensors: operators go on to `__torch_dispatch__`
untouched_by_torch_function = torch._C._disabled_torch_function_impl


def storage_users(tensor: torch.Tensor) -> int:
    """How many other tensors and arrays share the memory of one."""
    return torch._C._storage_Use_Count(tensor.untyped_storage()._cdata) - 2  # itself, and what asks


# ---- exported programs


def fake_cpu_tensor(mode: FakeTensorMode, like: torch.Tensor) -> FakeTensor:
    """A fake tensor of this mode on the CPU, with the sizes, strides, dtype and `requires_grad` of `like`."""
    empty = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device="meta")
    return FakeTensor(mode, empty.requires_grad_(like.requires_grad), torch.device("cpu"))


def fake_like(mode: FakeTensorMode, like: torch.Tensor) -> torch.Tensor:
    """A fake tensor of this mode with the device, sizes, strides and dtype of `like`, all sizes fixed."""
    return mode.from_tensor(like, static_shapes=True)


@contextlib.contextmanager
def no_new_guards(mode: FakeTensorMode) -> Iterator[None]:
    """Raise where a question about the free sizes of a capture has no known answer, within `guards_ignored` too."""
    ignored = ShapeEnv._suppress_guards_tls()
    guards_of_thread.suppress_guards = False  # answers that were given while guards are ignored are remembered apart
    try:
        with contextlib.nullcontext() if mode.shape_env is None else mode.shape_env.error_on_new_guards():
            yield
    finally:
        guards_of_thread.suppress_guards = ignored


@contextlib.contextmanager
def guards_ignored(mode: FakeTensorMode) -> Iterator[None]:
    """Answer questions about the free sizes of a capture for the sample's, and learn nothing of it."""
    with contextlib.nullcontext() if mode.shape_env is None else mode.shape_env.suppress_guards():
        yield


def replace_sizes(sizes: ShapeEnv, replacements: dict[Any, Any]) -> dict[Any, Any]:
    """Let symbols of a capture stand for these wherever sizes are recorded; returns what they stood for before."""
    before, sizes.replacements = sizes.replacements, replacements
    sizes._version_counter += 1  # what is remembered is forgotten
    sizes._replacements_version_counter += 1
    return before


@contextlib.contextmanager
def distributions_unchecked() -> Iterator[None]:
    """Let distributions not look at the values of their parameters, where nobody asks for it: that only raises."""
    before = Distribution._validate_args
    Distribution.set_default_validate_args(False)
    try:
        yield
    finally:
        Distribution.set_default_validate_args(before)


@contextlib.contextmanager
def indices_recorded() -> Iterator[None]:
    """Let captures record by its operator what torch.vmap reads by index, which a graph else calls as a function."""
    before = _trace_wrapped_higher_order_op.mod_index
    _trace_wrapped_higher_order_op.mod_index = torch.ops.aten.index.Tensor
    try:
        yield
    finally:
        _trace_wrapped_higher_order_op.mod_index = before


@contextlib.contextmanager
def values_known(values: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Let captures compute with the values of these buffers where values are asked for; writing changes copies."""
    tracing: Any = _trace
    make, limit = tracing._fakify_params_buffers, fake_tensors.CONSTANT_NUMEL_LIMIT

    def made(mode: FakeTensorMode, module: nn.Module) -> Any:
        found: Any = make(mode, module)
        for name, value in values.items():
            found[name].constant = value.detach().clone()
            mode.fake_tensor_converter.add_constant_storage_mapping(found[name])
        return found

    tracing._fakify_params_buffers = made
    fake_tensors.CONSTANT_NUMEL_LIMIT = max(value.numel() for value in values.values())
    try:
        yield
    finally:
        tracing._fakify_params_buffers, fake_tensors.CONSTANT_NUMEL_LIMIT = make, limit


@contextlib.contextmanager
def any_recurrent_length() -> Iterator[None]:
    """Let captures say by the sizes of their inputs what recurrent layers give.

    torch itself runs over the positions of the sample one by one, which fixes how many there are.
    """
    aten = torch.ops.aten
    sizes = {
        aten.lstm.input: _recurrent_sizes,
        aten.gru.input: _recurrent_sizes,
        aten.rnn_tanh.input: _recurrent_sizes,
        aten.rnn_relu.input: _recurrent_sizes,
    }
    before = {operator: dict(operator.py_kernels) for operator in sizes}
    keys = (torch._C.DispatchKey.Autograd, torch._C.DispatchKey.CompositeImplicitAutograd)
    try:
        for operator, kernel in sizes.items():
            operator.py_kernels |= dict.fromkeys(keys, kernel)
            operator._dispatch_cache.clear()
        with enable_python_dispatcher():
            yield
    finally:
        for operator, kernels in before.items():
            operator.py_kernels = kernels
            operator._dispatch_cache.clear()


def _recurrent_sizes(data: torch.Tensor, start: Any, *options: Any) -> tuple[torch.Tensor, ...]:
    """Of a layer without packed sequences: its outputs [..., units of all directions], and its last states."""
    states = (start,) if isinstance(start, torch.Tensor) else tuple(start)
    is_bidirectional = bool(options[5])
    width = states[0].shape[-1] * (2 if is_bidirectional else 1)
    return data.new_empty((*data.shape[:-1], width)), *map(torch.empty_like, states)


def decomposes_itself(target: OpOverload) -> bool:
    """Whether an operator is written in others, whatever it runs on."""
    return target.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd)


def symbol_ranges(mode: FakeTensorMode, sizes: Iterable[int | torch.SymInt]) -> dict[Any, Any]:
    """The symbols in these sizes and the range of each, which an `ExportedProgram` states."""
    symbols = [symbol for size in sizes if isinstance(size, torch.SymInt) for symbol in size.node.expr.free_symbols]
    known = mode.shape_env.var_to_range if mode.shape_env is not None else {}
    return {symbol: known[symbol] for symbol in symbols if symbol in known}


def size_function(name: str, otherwise: Any = None) -> Any:
    """What torch takes a name for where it parses the expression of a size, beside sympy's own names."""
    return getattr(functions, name, otherwise)


def derived_dimension(dimension: Any) -> tuple[Dim, int, int] | None:
    """The root, factor and offset of a `torch.export.Dim` that is computed from another one; None of any other."""
    if not isinstance(dimension, DerivedDim):
        return None
    offset = dimension.fn(0)
    return dimension.root, dimension.fn(1) - offset, offset


def dimension_hint(dimension: Any) -> str | None:
    """Which of `torch.export.Dim`'s hints this is, such as "AUTO" or "DYNAMIC"; None of a named dimension."""
    return str(dimension.type.name) if isinstance(dimension, DimHint) else None


@contextlib.contextmanager
def sizes_watched(seen: Callable[[list[str], int | None], None]) -> Iterator[None]:
    """Call `seen` whenever a capture learns something of free sizes, with the model's frames on the stack.

    It gets the names of the sizes, as in "L['x'].size()[1]", and the number that the first is fixed to; None where they
    must be equal, or must meet some other condition.
    """
    environment: Any = ShapeEnv
    replace, condition = environment._set_replacement, environment._log_guard

    def sources(env: Any, symbols: Iterable[Any]) -> list[str]:
        found = (source.name for symbol in symbols for source in env.var_to_sources.get(symbol, ()))
        return [name if isinstance(name, str) else name() for name in found]

    def replaced(env: Any, symbol: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
        seen(sources(env, [symbol, *value.free_symbols]), int(value) if value.is_Integer else None)
        return replace(env, symbol, value, *args, **kwargs)

    def conditioned(env: Any, prefix: str, guard: Any, *args: Any, **kwargs: Any) -> Any:
        seen(sources(env, guard.free_symbols), None)
        return condition(env, prefix, guard, *args, **kwargs)

    environment._set_replacement, environment._log_guard = replaced, conditioned
    try:
        yield
    finally:
        environment._set_replacement, environment._log_guard = replace, condition


@contextlib.contextmanager
def functions_applied(seen: Callable[[type], None]) -> Iterator[None]:
    """Call `seen` with the class of every `torch.autograd.Function` that is applied, however its `apply` is reached."""
    module: Any = torch.autograd.function
    defined = module._is_setup_context_defined

    def noted(method: Any) -> Any:
        if isinstance(kind := sys._getframe(1).f_locals.get("cls"), type):  # of `apply`, which asks this first
            seen(kind)
        return defined(method)

    module._is_setup_context_defined = noted
    try:
        yield
    finally:
        module._is_setup_context_defined = defined


def size_expression(size: torch.SymInt) -> sympy.Expr:
    """The expression of a free size over the symbols of its capture."""
    return size.node.expr


def register_named_tuple(kind: type) -> None:
    """Give a class of named tuples a name in stored specifications, where it has none yet."""
    if kind not in pytree.SUPPORTED_NODES:
        pytree._register_namedtuple(kind, serialized_type_name=f"{kind.__module__}.{kind.__qualname__}")


# ---- optimizers


def step_pre_hooks(optimizer: object) -> dict[int, Callable[..., Any]] | None:
    """What runs before each step of an optimizer, None where its step runs no hooks."""
    found: dict[int, Callable[..., Any]] | None = getattr(optimizer, "_optimizer_step_pre_hooks", None)
    return found


def is_inside_step(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the hook that asks runs in a step that another step of the same optimizer makes, by `super().step()`.

    Only the stack tells: a step that raises runs no hook after it, so a flag could not be told from one left behind.
    """
    step = sys._getframe(2)  # torch's wrapper around a step, which runs the hooks
    outer = step.f_back
    while outer is not None:
        if outer.f_code is step.f_code and outer.f_locals.get("self") is optimizer:
            return True
        outer = outer.f_back
    return False


# ---- pruning methods


def pruned_tensor(method: BasePruningMethod) -> str:
    """The name of the tensor that a pruning method acts on."""
    return method._tensor_name


def name_pruning_method(method: BasePruningMethod, tensor: str) -> None:
    """Say which tensor a method acts on, as `apply` does, so that it may join a container."""
    method._tensor_name = tensor


def pruning_methods(method: BasePruningMethod) -> tuple[BasePruningMethod, ...]:
    """The methods of a container in order, and the method itself where it is none."""
    return tuple(method._pruning_methods) if isinstance(method, PruningContainer) else (method,)


# ---- modules


@contextlib.contextmanager
def decompositions_set_aside() -> Iterator[None]:
    """Let operators run as outside of a decomposition; in one, DTensors wait where other processes go on."""
    with torch._C._DisablePythonDispatcher():
        yield


@contextlib.contextmanager
def conversions_checked() -> Iterator[None]:
    """Let `module.to(...)` and its kin do nothing in a capture where no tensor changes, which torch.export refuses.

    Where one changes, they raise TypeError, which names it.
    """
    before = nn.Module._apply

    def apply(module: nn.Module, convert: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
        for name, tensor in [*module.named_parameters(recurse=recurse), *module.named_buffers(recurse=recurse)]:
            with _disable_current_modes():
                plain = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
                converted = convert(plain)
            if converted is not plain:
                kinds = [f"{each.dtype} on {each.device}" for each in (plain, converted)]
                raise TypeError(f"forward converts {name!r} of a {type(module).__name__} from {' to '.join(kinds)}")
        return module

    nn.Module._apply = apply  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module._apply = before  # type: ignore[method-assign]


def flat_weight_names(module: nn.Module) -> list[str]:
    """The names of a recurrent layer's weights in the order of its kernels; none for other modules."""
    return list(getattr(module, "_flat_weights_names", None) or ())


@contextlib.contextmanager
def weights_gathered_if(module: nn.RNNBase, changed: Callable[[], bool]) -> Iterator[None]:
    """Let `changed` say, at each forward, whether a recurrent layer gathers its weights anew."""
    before = vars(module).get("_weights_have_changed")
    vars(module)["_weights_have_changed"] = changed
    try:
        yield
    finally:
        del vars(module)["_weights_have_changed"]
        if before is not None:
            vars(module)["_weights_have_changed"] = before


def has_forward(module: nn.Module) -> bool:
    """Whether the module's class defines a forward."""
    return "_forward_unimplemented" not in getattr(module.forward, "__qualname__", "")


def fuses_in_eval(module: nn.MultiheadAttention) -> bool:
    """Whether the shapes of an attention let eager take its fused kernel in eval mode without gradients."""
    return bool(module.batch_first and module._qkv_same_embed_dim and module.num_heads % 2 == 0)


# ---- parameters that FSDP shards


def _groups(module: nn.Module) -> Iterator[Any]:
    """The groups of parameters that FSDP gathers together."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            state: Any = part._get_fsdp_state()
            groups = getattr(state, "_fsdp_param_groups", None)
            yield from (state._fsdp_param_group,) if groups is None else groups


def follow_parameters(module: nn.Module, before: Iterable[nn.Parameter]) -> None:
    """Tell FSDP which parameters a module has now, and where.

    Args:
        module: one that FSDP shards; its parameters are sharded.
        before: those that it had before, sharded; new ones are sharded as those whose place they take.
    """
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    parameters: dict[int, nn.Parameter] = {}
    for owner in module.modules():
        for name, parameter in owner._parameters.items():
            if parameter is not None:
                places.setdefault(id(parameter), []).append((owner, name))
                parameters[id(parameter)] = parameter
    fresh = [key for key in parameters if key not in set(map(id, before))]
    for group in filter(None, _groups(module)):
        gone = [each for each in group.fsdp_params if id(each.sharded_param) not in places]
        for each in group.fsdp_params:
            if each not in gone:
                _put(each._module_info, places[id(each.sharded_param)])
        if not gone and not fresh:
            continue
        for each in gone:
            each._post_load_hook_handle.remove()
        like = (gone or group.fsdp_params)[0]
        made = [_sharded(parameters[key], places[key], like, group) for key in fresh]
        fresh = []
        group.fsdp_params = [each for each in group.fsdp_params if each not in gone] + made
        if hasattr(like, "param_dtype"):  # it has been run
            group._init_mp_dtypes()


def _put(info: ParamModuleInfo, places: list[tuple[nn.Module, str]]) -> None:
    (info.module, info.param_name), *others = places
    info.shared_modules, info.shared_param_names = [owner for owner, _ in others], [name for _, name in others]


def _sharded(parameter: nn.Parameter, places: list[tuple[nn.Module, str]], like: FSDPParam, group: Any) -> FSDPParam:
    info = ParamModuleInfo(*places[0])
    _put(info, places)
    return FSDPParam(
        parameter, info, like.mesh_info, group.post_forward_mesh_info, group.device, None, group.mp_policy,
        group.offload_policy,
    )  # fmt: skip


def is_step_of_vmap(target: Any) -> bool:
    """Whether a function of a graph is one of those that torch.vmap runs in; some act, and return nothing."""
    return getattr(target, "__module__", None) == "torch._functorch.predispatch"


def sharding_options(module: nn.Module) -> dict[str, Any]:
    """The arguments of `fully_shard` with which a module was sharded."""
    group, state = next(filter(None, _groups(module))), module._get_fsdp_state()  # type: ignore[operator]
    info, after = group.mesh_info, group.post_forward_mesh_info
    is_whole = getattr(info, "is_spmd_mesh", False)  # with axes that are not FSDP's
    mesh = {"mesh": info.spmd_mesh, "dp_mesh_dims": info.dp_mesh_dims} if is_whole else {"mesh": info.mesh}
    again = (
        None if state._auto_reshard_after_forward else after is info or (after is not None and after.shard_mesh_size)
    )
    policies = {"mp_policy": group.mp_policy, "offload_policy": group.offload_policy}
    return mesh | policies | {"reshard_after_forward": again}


def take_parameters(module: nn.Module) -> None:
    """Let FSDP shard what stands under the names of its parameters now, DTensors that are spread alike."""
    for group in filter(None, _groups(module)):
        for each in group.fsdp_params:
            each.reset_sharded_param()


def spread_before(module: nn.Module) -> list[tuple[nn.Parameter, DTensorSpec]]:
    """Parameters that FSDP shards and that were spread before, and how, as they are again for a call."""
    given = [each for group in filter(None, _groups(module)) for each in group.fsdp_params if each.is_dtensor]
    return [(each.sharded_param, getattr(each, "_unsharded_dtensor_spec", None) or each._tp_spec) for each in given]
