"""What nodes say of themselves: the parameter whose value they compute, and the calls of modules they belong to."""

from __future__ import annotations

from typing import Any

from torch import fx

_TAG = "fxprune"
_STACK = "nn_module_stack"  # torch.export's name


def tag(node: fx.Node, origin: dict[str, str]) -> None:
    """Say that a node computes the value of a parameter; `origin` has the keys "pass" (who says so) and "parameter"."""
    node.meta[_TAG] = origin


def tag_of(node: fx.Node) -> dict[str, str] | None:
    """What `tag` said of a node, None for all others."""
    found: dict[str, str] | None = node.meta.get(_TAG)
    return found


def untag(node: fx.Node) -> None:
    """Let a node be one like any other."""
    node.meta.pop(_TAG, None)


def parameter_of(node: fx.Node) -> str | None:
    """The parameter whose value a node computes, None where it is tagged with none."""
    found = tag_of(node)
    return None if found is None else found["parameter"]


def tagged(graph: fx.Graph, name: str | None = None) -> list[fx.Node]:
    """The nodes that compute the parameter `name`; all that compute one without it."""
    found = [(node, parameter_of(node)) for node in graph.nodes]
    return [node for node, parameter in found if parameter is not None and name in (None, parameter)]


def tagged_names(graph: fx.Graph) -> set[str]:
    """The parameters that nodes of the graph compute."""
    return {parameter for node in graph.nodes if (parameter := parameter_of(node)) is not None}


def module_calls(node: fx.Node) -> dict[str, tuple[str, Any]]:
    """The calls of modules that a node was captured in, the outermost first: a key a call -> (path, class)."""
    return dict(node.meta.get(_STACK) or {})


def set_module_calls(node: fx.Node, calls: dict[str, tuple[str, Any]]) -> None:
    """Say which calls of modules a node belongs to."""
    node.meta[_STACK] = calls


def module_path(node: fx.Node) -> str:
    """The path of the source module that a node was captured in, '' at the root or where it is not known."""
    calls = module_calls(node)
    return str(list(calls.values())[-1][0]) if calls else ""
