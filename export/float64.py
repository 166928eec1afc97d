"""A module run in float64: the truth that the rounding of both sides of a comparison is measured by."""

from __future__ import annotations

import contextlib
import copy
import threading
from collections.abc import Iterator
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import nn

from fxprune.graph.calls import cloned
from fxprune.graph.traced import TracedModule
from fxprune.torch_internals import TorchDispatchMode

from .runners import ModuleRunner, Runner

_default_dtype_lock = threading.RLock()


MOST_BYTES_COPIED = 2**30  # of parameters that are copied for the sake of a report alone


def copied_bytes(runner: Runner) -> int:
    """What the float32 parameters of a module that is run take in memory; 0 of a file."""
    if not isinstance(runner, ModuleRunner):
        return 0
    return sum(parameter.nbytes for parameter in runner.module.parameters() if parameter.dtype == torch.float32)


class Float64Runner(ModuleRunner):
    """A module in eval mode, computed in float64.

    Parameters are widened where operators read them. Where some operator does not take its own in another type than its
    input, as those of recurrent layers, all of them are copied in float64.
    """

    def __init__(self, module: nn.Module) -> None:
        self._source: nn.Module | None = module
        super().__init__(_float64_copy(module, shared=True), "eval")

    def _call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        args, kwargs = pytree.tree_map(_widened, (args, kwargs))
        if self._source is not None:
            drawn = torch.get_rng_state()
            try:
                return self._widening(*cloned((args, kwargs)))
            except Exception:  # whatever an operator raises of types; what it raises of all else, it raises again
                self.module, self._source = _float64_copy(self._source, shared=False).eval(), None
                torch.set_rng_state(drawn)
        return self._widening(args, kwargs)

    def _widening(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with _default_float64(), _Widening():  # type: ignore[no-untyped-call]
            return super()._call(args, kwargs)


def float64_runner(runner: Runner) -> tuple[Float64Runner | None, str]:
    """A float64 copy of what a runner runs, if that is a module with float32 parameters; and why there is none."""
    if not isinstance(runner, ModuleRunner) or all(p.dtype != torch.float32 for p in runner.module.parameters()):
        return None, ""
    try:
        return Float64Runner(runner.module), ""
    except Exception as error:  # whatever the model's own copying raises
        return None, f"{type(error).__name__}: {error}"


class _Widening(TorchDispatchMode):
    """float64 wherever the code says float32."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*pytree.tree_map(_widened, args), **pytree.tree_map(_widened, kwargs or {}))


def _widened(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.double() if value.dtype == torch.float32 else value
    return torch.float64 if value is torch.float32 else value


def _float64_copy(module: nn.Module, *, shared: bool) -> nn.Module:
    """A copy in float64; its parameters are the module's own values where `shared`, without gradients."""
    attributes = [value for part in module.modules() for value in part.__dict__.values()]
    computed = [value for value in attributes if isinstance(value, torch.Tensor) and value.grad_fn]
    # torch refuses to copy what was computed; hooks compute these again
    memo: dict[int, Any] = {id(value): value.detach() for value in computed}
    if shared:
        memo |= {id(own): nn.Parameter(own.detach(), requires_grad=False) for own in module.parameters()}
    else:
        memo |= {id(own): nn.Parameter(_widened(own.detach()), own.requires_grad) for own in module.parameters()}
    memo |= {id(own): _widened(own.detach().clone()) for own in module.buffers()}
    wide = copy.deepcopy(module, memo)
    if isinstance(wide, TracedModule):
        wide.set_examples(*pytree.tree_map(_widened, (wide.example_args, wide.example_kwargs)))
    return wide


@contextlib.contextmanager
def _default_float64() -> Iterator[None]:
    """Let new tensors be float64.

    torch's default dtype belongs to the whole process: what other threads create meanwhile is float64 too. A lock
    keeps two of these blocks from restoring each other's.
    """
    with _default_dtype_lock:
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(before)
