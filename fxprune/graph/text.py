"""Graphs and nodes as text: for golden tests, digests and error messages."""

from __future__ import annotations

from torch import fx

from fxprune.graph.metadata import module_path, tag_of


def describe(node: fx.Node) -> str:
    """A node as error messages name it: name, operator, module path."""
    where = module_path(node)
    return f"`{node.name}` ({node.target}{f' in {where}' if where else ''})"


def text(graph: fx.Graph) -> str:
    """A graph as stable text, one node a line: `%name = operator(arguments)`; what a pass inserted says so."""
    return "".join(f"{_line(node)}\n" for node in graph.nodes)


def _line(node: fx.Node) -> str:
    if node.op == "output":
        return f"return {node.args[0]}"
    origin = tag_of(node)
    note = f"  # {origin['pass']}: {origin['parameter']}" if origin else ""
    if node.op in ("placeholder", "get_attr"):
        return f"%{node.name} = {node.op}[{node.target}]{note}"
    arguments = [str(a) for a in node.args] + [f"{k}={v}" for k, v in node.kwargs.items()]
    return f"%{node.name} = {node.target}({', '.join(arguments)}){note}"
