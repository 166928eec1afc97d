"""A module run in wider types: in float64, by which the rounding of both sides of a comparison is measured."""

from __future__ import annotations

import contextlib
import copy
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import nn
from torch.overrides import TorchFunctionMode

from fxprune.graph.calls import Call, cloned
from fxprune.graph.traced import TracedModule
from fxprune.torch_internals import TorchDispatchMode

from .runners import ModuleRunner, Runner

_default_dtype_lock = threading.RLock()

Widths = Mapping[torch.dtype, torch.dtype]  # what takes the place of a type
_FLOAT64: Widths = {torch.float32: torch.float64}
UPCAST: Widths = {torch.bfloat16: torch.float32}

MOST_BYTES_COPIED = 2**30  # of parameters that are copied for the sake of a report alone


def copied_bytes(runner: Runner) -> int:
    """What the parameters that a module computes with in float32 take in memory; 0 of a file."""
    if not isinstance(runner, ModuleRunner):
        return 0
    return sum(own.numel() * 4 for own in runner.module.parameters() if own.dtype in _float64_of(runner))


class WidenedRunner(ModuleRunner):
    """A module in eval mode, computed in wider types.

    Parameters are widened where operators read them. Where some operator does not take its own in another type than its
    input, as those of recurrent layers, all of them are copied in the wider one.

    Args:
        module: it is left as it is. widths: what takes the place of a type.
    """

    def __init__(self, module: nn.Module, widths: Widths) -> None:
        self.source, self.widths, self._is_shared = module, widths, True
        super().__init__(module, "eval")
        self.module = self._copied(shared=True)

    def _call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        args, kwargs = self.widened(Call(args, kwargs))
        if self._is_shared:
            drawn = torch.get_rng_state()
            try:
                return self._widening(*cloned((args, kwargs)))
            except Exception:  # whatever an operator raises of types; what it raises of all else, it raises again
                self.module, self._is_shared = self._copied(shared=False).eval(), False
                torch.set_rng_state(drawn)
        return self._widening(args, kwargs)

    def _copied(self, *, shared: bool) -> nn.Module:
        """What is run: a copy, with the parameters of the module where `shared`."""
        return _widened_copy(self.source, self.widths, shared=shared)

    def _widening(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with self.widening():
            return super()._call(args, kwargs)

    @contextlib.contextmanager
    def widening(self) -> Iterator[None]:
        """Within, operators compute in the wider types."""
        with _default_widened(self.widths), _WideningConvolutions(self.widths), _Widening(self.widths):
            yield

    def widened(self, call: Call) -> Call:
        """A call with inputs of the wider types."""
        return Call(*_widened(tuple(call), self.widths))


class Float64Runner(WidenedRunner):
    """A module in eval mode, computed in float64."""

    def __init__(self, module: nn.Module, widths: Widths = _FLOAT64) -> None:
        super().__init__(module, widths)


def float64_runner(runner: Runner) -> tuple[Float64Runner | None, str]:
    """A float64 copy of what a runner runs, if that is a module with float32 parameters; and why there is none."""
    if not isinstance(runner, ModuleRunner):
        return None, ""
    widths = _float64_of(runner)
    if all(own.dtype not in widths for own in runner.module.parameters()):
        return None, ""
    try:
        return Float64Runner(runner.source if isinstance(runner, WidenedRunner) else runner.module, widths), ""
    except Exception as error:  # whatever the model's own copying raises
        return None, f"{type(error).__name__}: {error}"


def _float64_of(runner: ModuleRunner) -> Widths:
    """What becomes float64: what a runner computes in float32."""
    if not isinstance(runner, WidenedRunner):
        return _FLOAT64
    return {**_FLOAT64, **{own: torch.float64 for own, wide in runner.widths.items() if wide == torch.float32}}


class _Widening(TorchDispatchMode):
    """Wider types wherever the code says others."""

    def __init__(self, widths: Widths) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._widths = widths

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*_widened(args, self._widths), **_widened(kwargs or {}, self._widths))


class _WideningConvolutions(TorchFunctionMode):
    """Wider operands of convolutions: they compare the types of input and bias before a dispatch mode sees them."""

    def __init__(self, widths: Widths) -> None:
        super().__init__()
        self._widths = widths

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "").startswith("conv"):
            args, kwargs = _widened(args, self._widths), _widened(kwargs or {}, self._widths)
        return func(*args, **(kwargs or {}))


def _widened(values: Any, widths: Widths) -> Any:
    def wide(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.to(widths[value.dtype]) if value.dtype in widths else value
        return widths.get(value, value) if isinstance(value, torch.dtype) else value

    return pytree.tree_map(wide, values)


def _widened_copy(module: nn.Module, widths: Widths, *, shared: bool) -> nn.Module:
    """A copy in wider types; its parameters are the module's own values where `shared`, without gradients."""
    attributes = [value for part in module.modules() for value in part.__dict__.values()]
    computed = [value for value in attributes if isinstance(value, torch.Tensor) and value.grad_fn]
    # torch refuses to copy what was computed; hooks compute these again
    memo: dict[int, Any] = {id(value): value.detach() for value in computed}
    if shared:
        memo |= {id(own): nn.Parameter(own.detach(), requires_grad=False) for own in module.parameters()}
    else:
        memo |= {
            id(own): nn.Parameter(_widened(own.detach(), widths), own.requires_grad) for own in module.parameters()
        }
    memo |= {id(own): _widened(own.detach().clone(), widths) for own in module.buffers()}
    wide = copy.deepcopy(module, memo)
    if isinstance(wide, TracedModule):
        wide.set_examples(*_widened((wide.example_args, wide.example_kwargs), widths))
    return wide


@contextlib.contextmanager
def _default_widened(widths: Widths) -> Iterator[None]:
    """Let new tensors be of the wider type.

    torch's default dtype belongs to the whole process: what other threads create meanwhile is wider too. A lock
    keeps two of these blocks from restoring each other's.
    """
    with _default_dtype_lock:
        before = torch.get_default_dtype()
        torch.set_default_dtype(widths.get(before, before))
        try:
            yield
        finally:
            torch.set_default_dtype(before)
