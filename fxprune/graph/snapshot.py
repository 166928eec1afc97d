"""Running a module without leaving a trace in it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from fxprune.graph.expanded import by_vectors


@contextlib.contextmanager
def preserved(module: nn.Module) -> Iterator[None]:
    """Leave a module as it is found: modes of all submodules, values and objects of buffers, dtypes of
    parameters, and random generators.

    A buffer that is given another size meanwhile keeps what it is given.

    The generators are torch's of the CPU and of the CUDA devices that the module's tensors are on; seed them inside.

    Example:
        >>> with preserved(model):
        ...     outputs = model.train()(x)
    """
    modes = [(part, part.training) for part in module.modules()]
    slots = [
        (part._buffers, name, b) for part in module.modules() for name, b in part._buffers.items() if b is not None
    ]
    values = {id(buffer): by_vectors(torch.clone, buffer.detach()) for _, _, buffer in slots}
    contents = [(parameter, parameter.data) for parameter in module.parameters()]
    devices = {t.device.index for t in (*module.parameters(), *module.buffers()) if t.is_cuda}
    with torch.random.fork_rng(devices=sorted(devices)):
        try:
            yield
        finally:
            for parameter, content in contents:
                if parameter.dtype != content.dtype:  # a forward has converted the module
                    parameter.data = content
            for buffers, name, buffer in slots:
                buffers[name] = buffer
                if buffer.shape != values[id(buffer)].shape:  # who runs it has given it another size, as trials do
                    continue
                if not torch.equal(buffer, values[id(buffer)]):  # else it need not look changed to autograd
                    with torch.no_grad():
                        buffer.copy_(values[id(buffer)])
            _restore(modes)


def _restore(modes: list[tuple[nn.Module, bool]]) -> None:
    for part, training in modes:  # parents come first
        if part.training != training and type(part).train is not nn.Module.train:
            part.train(training)  # a traced module selects its graph here
    for part, training in modes:
        part.training = training
