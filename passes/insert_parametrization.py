"""Insert a `torch.nn.utils.parametrize` parametrization: the shared work of weight norm and spectral norm."""

from __future__ import annotations

import abc
from dataclasses import dataclass

from torch import fx, nn
from torch.nn.utils.parametrize import ParametrizationList

from fxprune.capture.front_end import trace
from fxprune.errors import ArgumentError, PruningError
from fxprune.graph.containers import Container, provenance_of, share_contents
from fxprune.graph.editing import erase_dead, splice
from fxprune.graph.mutation import is_mutating
from fxprune.graph.names import locate
from fxprune.graph.parameter_reads import ParameterReads, replace_reads
from fxprune.graph.traced import TracedModule

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
        """Let torch parametrize `host`'s parameter `name`; `owner` is the container that it comes from."""

    def requires(self, traced: TracedModule) -> None:
        owner, name = locate(traced, self.parameter)
        if owner._parameters.get(name) is None:
            raise PruningError(
                f"{self.name} of {self.parameter!r}: it is no parameter. What is already masked or parametrized is "
                f"computed from others: name one of {', '.join(owner._parameters)} of that module."
            )

    def run(self, traced: TracedModule) -> bool:
        owner, name = locate(traced, self.parameter)
        assert isinstance(owner, Container | TracedModule)
        listed = self._registered(owner, name, traced.training)
        _refuse_another_draw(self, owner, listed)
        expression = trace(listed, modes=traced.modes)
        reads = {mode: ParameterReads(traced, graph) for mode, graph in traced.graphs.items()}
        path = _hold(owner, name, expression, self.parameter)
        for mode, graph in traced.graphs.items():
            # eager evaluates a parametrization at every read; attention and recurrent layers have several a call
            count = provenance_of(owner).reads.get(name, 1)
            self._replace(graph, reads[mode], expression.graphs[mode], path, count, needed=mode == "eval")
            erase_dead(graph)
        traced.train(traced.training)
        return True

    def _registered(self, owner: Container | TracedModule, name: str, training: bool) -> ParametrizationList:
        """The parametrization, registered on a module of its own."""
        host = nn.Module()
        host.register_parameter(name, owner._parameters[name])
        host.train(training)
        try:
            self.register(host, name, owner)
        except (TypeError, ValueError, IndexError, RuntimeError) as error:
            raise ArgumentError(f"{self.name} of {self.parameter!r}: {error}") from error
        listed = host.parametrizations[name]  # type: ignore[index]
        assert isinstance(listed, ParametrizationList)
        return listed

    def _replace(
        self, graph: fx.Graph, reads: ParameterReads, expression: fx.Graph, path: str, count: int, *, needed: bool
    ) -> None:
        """Replace the reads in one graph; `count` is how often eager evaluates the expression in a forward.

        `needed`: finalize needs the value, though the graph may not.
        """
        calls, nodes = reads.calls(self.parameter), reads.nodes(self.parameter)
        if count == sum(map(len, calls)):
            calls = [[user] for users in calls for user in users]
        repeats = max(1, count // max(1, len(calls))) if any(map(is_mutating, expression.nodes)) else 1
        if needed and not calls:
            calls = [[graph.output_node()]]

        def build(graph: fx.Graph) -> fx.Node:
            return [splice(graph, expression, lambda target: path + target)[0] for _ in range(repeats)][-1]

        replace_reads(graph, calls, nodes, build, self.origin(self.parameter), path[:-1])


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


def _hold(owner: nn.Module, name: str, expression: TracedModule, parameter: str) -> str:
    """Move the state of a captured parametrization to torch's place for it; returns the prefix of its names."""
    del owner._parameters[name]
    parametrizations = owner._modules.setdefault("parametrizations", Container())
    assert parametrizations is not None
    holder = Container()
    share_contents(holder, expression)
    parametrizations._modules[name] = holder
    return parameter.removesuffix(name) + f"parametrizations.{name}."
