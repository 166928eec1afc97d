"""Everything that is changed for the time of a capture, each by its own context manager that puts it back.

Captures patch the model, `nn.Module` and the interpreter's standard streams, so two never run at once: `one_at_a_time`.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import random
import sys
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fxprune.torch_internals import LOGGERS_OF_FAILED_CAPTURES, flat_weight_names, weights_gathered_if

_DYNAMIC_MARKERS = {
    "_dynamo_weak_dynamic_indices", "_dynamo_dynamic_indices", "_dynamo_dynamic_range", "_dynamo_static_indices",
    "_dynamo_unbacked_indices", "_dynamo_propagated_dynamic_indices", "_has_dynamo_dim_marking",
}  # fmt: skip

_MAKES_MASKS = "transformers.masking_utils"
_ONE_CAPTURE = threading.RLock()  # reentrant: a capture may capture a part of the model


@contextlib.contextmanager
def one_at_a_time() -> Iterator[None]:
    """Wait for captures in other threads. Who runs modules without capturing them is not kept out."""
    with _ONE_CAPTURE:
        yield


@contextlib.contextmanager
def attributes_kept(model: nn.Module) -> Iterator[None]:
    """Leave the attributes of every submodule as they were, and the entries of their dictionaries, lists and sets.

    Nothing of the containers' own classes is called: a configuration may refuse to be copied, or to be changed.
    """
    saved = [(module, dict(vars(module)), _containers(module)) for module in model.modules()]
    try:
        yield
    finally:
        for module, attributes, containers in saved:
            vars(module).clear()
            vars(module).update(attributes)
            for name, entries in containers.items():
                _refill(attributes[name], entries)


def forget_kept_shapes(model: nn.Module) -> None:
    """Have modules take the next call for the first one, where they keep the shape of the last.

    Such an attribute is None in the class. Detectors of ultralytics compare it with the shape of the next input, which
    would fix the batch.
    """
    for module in model.modules():
        own = vars(module)
        kept = [name for name, value in own.items() if isinstance(value, torch.Size)]
        for name in kept:
            if getattr(type(module), name, 0) is None:
                del own[name]


def _containers(module: nn.Module) -> dict[str, list[Any]]:
    return {name: _entries(value) for name, value in vars(module).items() if isinstance(value, dict | list | set)}


def _entries(container: Any) -> list[Any]:
    """The entries of a container, as pairs where it is a dictionary."""
    if isinstance(container, OrderedDict):
        return [(key, dict.__getitem__(container, key)) for key in OrderedDict.keys(container)]
    if isinstance(container, dict):
        return list(dict.items(container))
    return list((list if isinstance(container, list) else set).__iter__(container))


def _refill(container: Any, entries: list[Any]) -> None:
    if isinstance(container, dict):
        base: Any = OrderedDict if isinstance(container, OrderedDict) else dict
        base.clear(container)
        for key, value in entries:
            base.__setitem__(container, key, value)
    elif isinstance(container, list):
        list.clear(container)
        list.extend(container, entries)
    else:
        set.clear(container)
        set.update(container, entries)


@contextlib.contextmanager
def untied(model: nn.Module) -> Iterator[None]:
    """Give tied parameters one object a name, on the same memory.

    The graph then tells which of a tied pair a node reads, as masks on one side need.
    """
    seen: set[int] = set()
    ties: list[tuple[nn.Module, str, nn.Parameter]] = []
    try:
        for module in model.modules():
            for name, parameter in list(module._parameters.items()):
                if parameter is not None and id(parameter) in seen:
                    ties.append((module, name, parameter))
                    setattr(module, name, nn.Parameter(parameter.detach(), parameter.requires_grad))
                seen.add(id(parameter))
        yield
    finally:
        for module, name, parameter in ties:
            setattr(module, name, parameter)


@contextlib.contextmanager
def weights_reread(model: nn.Module) -> Iterator[None]:
    """Let recurrent layers read their weights at each forward, as eager does where weights are computed anew."""
    with contextlib.ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, nn.RNNBase):
                stack.enter_context(weights_gathered_if(module, partial(_reread, module)))
        yield


def _reread(layer: nn.RNNBase) -> bool:
    """Read the weights as eager's search for one that changed: up to the first that is computed, which always did."""
    for name in flat_weight_names(layer):
        if hasattr(layer, name) and getattr(layer, name) is not None and parametrize.is_parametrized(layer, name):
            break
    return True


@contextlib.contextmanager
def markers_kept(values: Iterable[Any]) -> Iterator[None]:
    """Put back what says of tensors which axes are free: a capture that fails leaves its own, which the next obeys."""

    def marks(tensor: Tensor) -> dict[str, Any]:
        return {name: copy.copy(mark) for name, mark in tensor.__dict__.items() if name in _DYNAMIC_MARKERS}

    before = [(value, marks(value)) for value in values if isinstance(value, Tensor)]
    try:
        yield
    finally:
        for tensor, marked in before:
            for name in marks(tensor):
                delattr(tensor, name)
            tensor.__dict__.update(marked)


@contextlib.contextmanager
def exports_asked_about(answer: bool) -> Iterator[list[str]]:
    """Answer code that asks `torch.compiler.is_exporting()`, and note the modules that do: it does something else then.

    torch's own is told the truth, and so is the one that makes masks for transformers, which are the same either way.
    """
    asked: list[str] = []
    told = torch.compiler.is_exporting

    def answered() -> bool:
        frame = sys._getframe(1)
        while frame.f_back is not None and "exporting" in frame.f_code.co_name:  # asks for others
            frame = frame.f_back
        name = str(frame.f_globals.get("__name__"))
        if name == _MAKES_MASKS or name.partition(".")[0] == "torch" or not told():
            return told()
        asked.append(name)
        return answer

    torch.compiler.is_exporting = answered
    try:
        yield asked
    finally:
        torch.compiler.is_exporting = told


Reads = Counter[tuple[int, str]]  # by the id of a module's __dict__ and the name that was read


@contextlib.contextmanager
def counted_reads(model: nn.Module) -> Iterator[Reads]:
    """Count how often one forward reads each attribute: as often it would evaluate a parametrization of it.

    torch.export puts its own `nn.Module.__getattr__` in place before forward runs; reads are counted on top of it.
    """
    counter, before = _ReadCounter(), nn.Module.__getattr__
    hooks = (
        model.register_forward_pre_hook(lambda module, args: counter.start()),
        model.register_forward_hook(lambda module, args, output: counter.stop()),
    )
    try:
        yield counter.counts
    finally:
        nn.Module.__getattr__ = before  # type: ignore[method-assign]  # where forward raised, nothing has stopped it
        for hook in hooks:
            hook.remove()


class _ReadCounter:
    """Counts reads of attributes of modules between `start` and `stop`; a later start counts anew."""

    def __init__(self) -> None:
        self.counts = Reads()
        self._replaced: list[Callable[[nn.Module, str], Any]] = []

    def start(self) -> None:
        original = nn.Module.__getattr__

        def read(module: nn.Module, name: str) -> Any:
            self.counts[id(vars(module)), name] += 1  # torch.export's proxy of a module has the module's dict
            return original(module, name)

        self.counts.clear()
        self._replaced.append(original)
        nn.Module.__getattr__ = read  # type: ignore[method-assign]

    def stop(self) -> None:
        nn.Module.__getattr__ = self._replaced.pop()  # type: ignore[method-assign]


@contextlib.contextmanager
def generators_kept() -> Iterator[Callable[[], bool]]:
    """Leave Python's and numpy's global generators as they are; yields whether either has been drawn from so far."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002  models draw from the legacy generator

    def drawn() -> bool:
        now = np.random.get_state()  # noqa: NPY002
        return random.getstate() != python or not all(map(np.array_equal, now, numpy))

    try:
        yield drawn
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without what torch logs and prints of a capture that fails: the error is raised, and says it."""
    levels = {logger: logger.level for logger in map(logging.getLogger, LOGGERS_OF_FAILED_CAPTURES)}
    try:
        for logger in levels:
            logger.setLevel(logging.CRITICAL)
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)
