"""Private of torch: graphs, their operators and generated code, tensors without values, and exported programs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx
from torch._ops import OpOverload, OpOverloadPacket
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.graph import _PyTreeInfo as PyTreeInfo


def schema_of(target: object) -> torch.FunctionSchema | None:
    """The schema of an operator overload, which tells names, aliases and writes; None of anything else."""
    return target._schema if isinstance(target, OpOverload) else None


def is_composite(target: OpOverload) -> bool:
    """Whether an operator is written in others, whatever it runs on: its schema does not say what shares memory."""
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


# as `__torch_function__` of a class of tensors: operators go on to `__torch_dispatch__`
untouched_by_torch_function = torch._C._disabled_torch_function_impl


def storage_users(tensor: torch.Tensor) -> int:
    """How many other tensors and arrays share the memory of one."""
    return torch._C._storage_Use_Count(tensor.untyped_storage()._cdata) - 2  # itself, and what asks


def fake_cpu_tensor(mode: FakeTensorMode, like: torch.Tensor) -> FakeTensor:
    """A fake tensor of this mode on the CPU, with the sizes, strides, dtype and `requires_grad` of `like`."""
    empty = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device="meta")
    return FakeTensor(mode, empty.requires_grad_(like.requires_grad), torch.device("cpu"))


def fake_like(mode: FakeTensorMode, like: torch.Tensor) -> torch.Tensor:
    """A fake tensor of this mode with the device, sizes, strides and dtype of `like`, all sizes fixed."""
    return mode.from_tensor(like, static_shapes=True)


def register_named_tuple(kind: type) -> None:
    """Give a class of named tuples a name in stored specifications, where it has none yet."""
    if kind not in pytree.SUPPORTED_NODES:
        pytree._register_namedtuple(kind, serialized_type_name=f"{kind.__module__}.{kind.__qualname__}")


def is_step_of_vmap(target: Any) -> bool:
    """Whether a function of a graph is one of those that torch.vmap runs in; some act, and return nothing."""
    return getattr(target, "__module__", None) == "torch._functorch.predispatch"
