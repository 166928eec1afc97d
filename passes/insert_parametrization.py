"""Insert `torch.nn.utils.parametrize` parametrizations: the shared work of weight norm and spectral norm."""

from __future__ import annotations

import abc
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx, nn
from torch.nn.utils.parametrize import ParametrizationList

from fxprune.capture.front_end import trace
from fxprune.errors import ArgumentError, PruningError
from fxprune.graph.containers import Container, share_contents
from fxprune.graph.editing import erase_dead, splice
from fxprune.graph.mutation import is_mutating
from fxprune.graph.names import locate, tensors_of
from fxprune.graph.parameter_reads import ParameterReads, replace_reads
from fxprune.graph.provenance import provenance_of
from fxprune.graph.traced import TracedModule
from fxprune.sharding import is_sharded, same_draws, whole

from .base import Pass


@dataclass(frozen=True)
class InsertParametrization(Pass, abc.ABC):
    """Replace every read of `parameter` by a parametrization of torch's, captured in each mode.

    The parametrization is registered by torch itself on a module that holds this parameter alone: initial state,
    random draws, operators and their order are torch's. Each call of the owning module gets its own copy.
    """

    parameter: str

    @abc.abstractmethod
    def register(self, host: nn.Module, name: str, owner: Container | TracedModule) -> None:
        """Let torch parametrize `host`'s parameter `name`; `owner` is the container that it comes from.

        What is computed from the registered tensors depends on `options` and the class of `owner` alone.
        """

    @property
    def options(self) -> dict[str, Any]:
        """How the parametrization is to be, whatever the parameter."""
        return {name: value for name, value in vars(self).items() if name != "parameter"}

    def requires(self, traced: TracedModule) -> None:
        owner, name = locate(traced, self.parameter)
        if owner._parameters.get(name) is None:
            raise PruningError(
                f"{self.name} of {self.parameter!r}: it is no parameter. What is already masked or parametrized is "
                f"computed from others: name one of {', '.join(owner._parameters)} of that module."
            )

    def run(self, traced: TracedModule) -> bool:
        return _insert(traced, (self,))


@dataclass(frozen=True)
class InsertParametrizations(Pass):
    """Several parametrizations, none on what another one makes: one capture for all that differ in tensors alone.

    Args:
        steps: one for each parameter.

    Example:
        >>> InsertParametrizations((InsertWeightNorm("0.weight"), InsertWeightNorm("2.weight")))(traced).modified
        True
    """

    steps: tuple[InsertParametrization, ...]
    name: ClassVar[str] = "insert-parametrizations"

    def requires(self, traced: TracedModule) -> None:
        for step in self.steps:
            step.requires(traced)

    def run(self, traced: TracedModule) -> bool:
        return _insert(traced, self.steps)


def _insert(traced: TracedModule, steps: Sequence[InsertParametrization]) -> bool:
    """Insert parametrizations, with one walk over the graphs; returns whether there were any."""
    reads = {mode: ParameterReads(traced, graph) for mode, graph in traced.graphs.items()}
    captures: dict[Hashable, TracedModule] = {}
    for step in steps:
        owner, name = locate(traced, step.parameter)
        assert isinstance(owner, Container | TracedModule)
        listed = _registered(step, owner, name, traced.training)
        _refuse_another_draw(step, owner, listed)
        form = _form(step, owner, listed)
        if form not in captures:
            captures[form] = trace(listed, modes=traced.modes)
        path = _hold(owner, name, captures[form], listed, step.parameter)
        # eager evaluates a parametrization at every read; attention and recurrent layers have several a call
        count = provenance_of(owner).reads.get(name, 1)
        for mode, graph in traced.graphs.items():
            _replace(step, graph, reads[mode], captures[form].graphs[mode], path, count, needed=mode == "eval")
    for graph in traced.graphs.values():
        erase_dead(graph)
    traced.train(traced.training)
    return bool(steps)


def _registered(
    step: InsertParametrization, owner: Container | TracedModule, name: str, training: bool
) -> ParametrizationList:
    """The parametrization, registered on a module of its own."""
    host, parameter = nn.Module(), owner._parameters[name]
    assert parameter is not None
    if is_sharded(parameter):  # what torch computes from the whole takes its place, and is sharded again
        host.register_parameter(name, nn.Parameter(whole(parameter), parameter.requires_grad))
    else:
        host.register_parameter(name, parameter)
    host.train(training)
    try:
        with same_draws(parameter):
            step.register(host, name, owner)
    except (TypeError, ValueError, IndexError, RuntimeError) as error:
        raise ArgumentError(f"{step.name} of {step.parameter!r}: {error}") from error
    listed = host.parametrizations[name]  # type: ignore[index]
    assert isinstance(listed, ParametrizationList)
    return listed


def _form(step: InsertParametrization, owner: Container | TracedModule, listed: ParametrizationList) -> Hashable:
    """What the graphs of a parametrization depend on: they compute the same for all that have this in common."""
    tensors = tuple((name, *_layout(tensor)) for name, tensor in tensors_of(listed).items())
    return type(step), repr(step.options), provenance_of(owner).source_class, tensors


def _layout(tensor: torch.Tensor) -> tuple[Hashable, ...]:
    return type(tensor), tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor.requires_grad


def _replace(
    step: InsertParametrization,
    graph: fx.Graph,
    reads: ParameterReads,
    expression: fx.Graph,
    path: str,
    count: int,
    *,
    needed: bool,
) -> None:
    """Replace the reads in one graph; `count` is how often eager evaluates the expression in a forward.

    `needed`: finalize needs the value, though the graph may not.
    """
    calls, nodes = reads.calls(step.parameter), reads.nodes(step.parameter)
    if count == sum(map(len, calls)):
        calls = [[user] for users in calls for user in users]
    repeats = max(1, count // max(1, len(calls))) if any(map(is_mutating, expression.nodes)) else 1
    if needed and not calls:
        calls = [[graph.output_node()]]

    def build(graph: fx.Graph) -> fx.Node:
        return [splice(graph, expression, lambda target: path + target)[0] for _ in range(repeats)][-1]

    replace_reads(graph, calls, nodes, build, step.origin(step.parameter), path[:-1])


def _refuse_another_draw(
    step: InsertParametrization, owner: Container | TracedModule, listed: ParametrizationList
) -> None:
    """Refuse a second parametrization of a recurrent layer where either of them has state that a forward moves."""
    others, source = owner._modules.get("parametrizations"), provenance_of(owner).source_class
    if others is None or not issubclass(source, nn.RNNBase):
        return
    if others._modules and [*listed.buffers(), *others.buffers()]:
        raise PruningError(
            f"{step.name} of {step.parameter!r}: {', '.join(others._modules)} of this {source.__name__} "
            "is parametrized already, and how often eager then runs a power iteration depends on which name comes "
            "first. Parametrize the eager model, then trace it."
        )


def _hold(owner: nn.Module, name: str, captured: TracedModule, listed: ParametrizationList, parameter: str) -> str:
    """Put the state of a parametrization to torch's place for it; returns the prefix of its names."""
    del owner._parameters[name]
    parametrizations = owner._modules.setdefault("parametrizations", Container())
    assert parametrizations is not None
    parametrizations._modules[name] = holder = Container()
    _fill(holder, captured, listed)
    return parameter.removesuffix(name) + f"parametrizations.{name}."


def _fill(holder: Container, captured: nn.Module, registered: nn.Module) -> None:
    """Give a container what a captured parametrization holds, with the tensors of another one of its form."""
    share_contents(holder, captured)
    share_contents(holder, registered)
    for name, child in registered.named_children():
        known = captured.get_submodule(name)
        holder._modules[name] = part = Container(provenance_of(known))
        _fill(part, known, child)
