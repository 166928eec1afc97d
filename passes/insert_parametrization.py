"""Insert a `torch.nn.utils.parametrize` parametrization: the shared work of weight norm and spectral norm."""

from __future__ import annotations

import abc
from dataclasses import dataclass

from torch import fx, nn
from torch.nn.utils.parametrize import ParametrizationList

from fxprune.capture.front_end import trace
from fxprune.errors import ArgumentError, PruningError
from fxprune.graph.editing import erase_dead, is_mutating, locate, read_groups, reads, replace_reads, splice
from fxprune.graph.traced import Container, TracedModule

from .base import Pass


@dataclass(frozen=True)
class InsertParametrization(Pass, abc.ABC):
    """Replace every read of `parameter` by a parametrization of torch's, captured in each mode.

    The parametrization is registered by torch itself on a module that holds this parameter alone: initial state,
    random draws, operators and their order are torch's. Each call of the owning module gets its own copy.
    """

    parameter: str

    @abc.abstractmethod
    def register(self, host: nn.Module, name: str, owner: Container) -> None:
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
        parameter = owner._parameters[name]
        host = nn.Module()
        host.register_parameter(name, parameter)
        host.train(traced.training)
        try:
            self.register(host, name, owner)  # type: ignore[arg-type]
        except (TypeError, ValueError, IndexError, RuntimeError) as error:
            raise ArgumentError(f"{self.name} of {self.parameter!r}: {error}") from error
        listed = host.parametrizations[name]  # type: ignore[index]
        assert isinstance(listed, ParametrizationList)
        others, source = owner._modules.get("parametrizations") or Container(), owner.source_class
        if issubclass(source, nn.RNNBase) and others._modules and [*listed.buffers(), *others.buffers()]:  # type: ignore[arg-type]
            raise PruningError(
                f"{self.name} of {self.parameter!r}: {', '.join(others._modules)} of this {source.__name__} "  # type: ignore[union-attr]
                "is parametrized already, and how often eager then runs a power iteration depends on which name comes "
                "first. Parametrize the eager model, then trace it."
            )
        expression = trace(listed, modes=traced.modes)
        found = {
            mode: (read_groups(traced, graph, self.parameter), reads(traced, graph, self.parameter))
            for mode, graph in traced.graphs.items()
        }
        # eager evaluates a parametrization at every read, of which attention and recurrent layers have several a call
        count = owner._reads.get(name, 1)  # type: ignore[union-attr, operator]
        del owner._parameters[name]
        if "parametrizations" not in owner._modules:
            owner._modules["parametrizations"] = Container()
        holder = Container()
        for field in ("_parameters", "_buffers", "_non_persistent_buffers_set", "_modules"):
            getattr(holder, field).update(getattr(expression, field))
        owner._modules["parametrizations"]._modules[name] = holder  # type: ignore[union-attr]
        path = self.parameter[: -len(name)] + f"parametrizations.{name}."
        for mode, graph in traced.graphs.items():
            part, (groups, nodes) = expression.graphs[mode], found[mode]
            if count == sum(map(len, groups)):
                groups = [[user] for group in groups for user in group]
            repeats = max(1, count // max(1, len(groups))) if any(map(is_mutating, part.nodes)) else 1

            def build(graph: fx.Graph, part: fx.Graph = part, repeats: int = repeats) -> fx.Node:
                return [splice(graph, part, lambda target: path + target)[0] for _ in range(repeats)][-1]

            if mode == "eval" and not groups:  # finalize needs the value, though this mode does not
                groups = [[graph.output_node()]]
            replace_reads(graph, groups, nodes, build, self.origin(self.parameter), path[:-1])
            erase_dead(graph)
        traced.train(traced.training)
        return True
