"""Private of torch: what a capture does while it runs, and what it records of free sizes."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import sympy
import torch
from torch import nn
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo import _trace_wrapped_higher_order_op
from torch._subclasses import fake_tensor as fake_tensors
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributions import Distribution
from torch.export import Dim, _trace
from torch.export.dynamic_shapes import _DerivedDim as DerivedDim
from torch.export.dynamic_shapes import _DimHint as DimHint
from torch.fx.experimental.symbolic_shapes import TLS as guards_of_thread
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._sympy import functions

# They print the stack of a capture that fails, which raises its error besides, and tell of sizes that were fixed.
LOGGERS_OF_FAILED_CAPTURES = (
    "torch._subclasses.fake_tensor", "torch.fx.experimental.symbolic_shapes", "torch._export.non_strict_utils",
)  # fmt: skip


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
