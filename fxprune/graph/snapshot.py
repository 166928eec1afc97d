"""Running a module without leaving a trace in it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import fx, nn

from fxprune.graph.expanded import by_vectors
from fxprune.graph.mutation import written_state
from fxprune.graph.seeding import generators_of
from fxprune.graph.vectors import check_vectors


@contextlib.contextmanager
def preserved(module: nn.Module, *, parameters: bool = False) -> Iterator[None]:
    """Leave a module as it is found: modes of all submodules, values and objects of buffers, dtypes of
    parameters, values of those that a graph writes into, and random generators.

    A buffer that is given another size meanwhile keeps what it is given.

    Args:
        module: any.
        parameters: whether the values of all its parameters are kept, at the cost of their memory: for code of the
            user's own, which may write into them.

    The generators are torch's of the CPU and of the CUDA devices that the module's tensors are on; seed them inside.

    Example:
        >>> with preserved(model):
        ...     outputs = model.train()(x)
    """
    check_vectors(module)  # what it had to take back in them could not be put back here
    modes = [(part, part.training) for part in module.modules() if hasattr(part, "training")]  # not frozen TorchScript
    slots = [
        (part._buffers, name, b) for part in module.modules() for name, b in part._buffers.items() if b is not None
    ]
    kept: list[torch.Tensor] = [buffer for _, _, buffer in slots]
    kept += module.parameters() if parameters else [p for part in module.modules() for p in _written(part)]
    values = {id(tensor): by_vectors(torch.clone, tensor.detach()) for tensor in kept}
    contents = [(parameter, parameter.data) for parameter in module.parameters()]
    with generators_of(module):
        try:
            yield
        finally:
            for parameter, content in contents:
                if parameter.dtype != content.dtype or (parameters and parameter.data_ptr() != content.data_ptr()):
                    parameter.data = content  # it was converted, or given other values
            for buffers, name, buffer in slots:
                buffers[name] = buffer
            for tensor in kept:
                if tensor.shape != values[id(tensor)].shape:  # who runs it has given it another size, as trials do
                    continue
                if not torch.equal(tensor, values[id(tensor)]):  # else it need not look changed to autograd
                    with torch.no_grad():
                        tensor.copy_(values[id(tensor)])
            _restore(modes)


def _written(part: nn.Module) -> list[nn.Parameter]:
    """The parameters that the graphs of a module write into."""
    graphs = getattr(part, "graphs", {"": part.graph}) if isinstance(part, fx.GraphModule) else {}
    names = {name for graph in graphs.values() for name in written_state(graph)}
    return [parameter for name, parameter in part.named_parameters() if name in names] if names else []


def _restore(modes: list[tuple[nn.Module, bool]]) -> None:
    for part, training in modes:  # parents come first
        if part.training != training and type(part).train is not nn.Module.train:
            part.train(training)  # a traced module selects its graph here
    for part, training in modes:
        part.training = training
