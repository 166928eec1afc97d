"""What the tests of every pass share: golden graphs, which are text files beside them."""

from __future__ import annotations

import difflib
from pathlib import Path

import fxprune
from fxprune.graph.names import tensor_at
from fxprune.graph.text import text
from fxprune.passes import Pass

GOLDEN = Path(__file__).parent / "golden"


def graphs(traced: fxprune.TracedModule) -> str:
    """The graphs of both modes as a golden file has them."""
    return "".join(f"{mode}:\n{text(graph)}\n" for mode, graph in sorted(traced.graphs.items()))


def assert_golden(traced: fxprune.TracedModule, golden: str) -> None:
    """The graphs are those in the golden file of this name; where there is none, it is written, and the test fails."""
    path = GOLDEN / f"{golden}.txt"
    found = graphs(traced)
    if not path.exists():
        path.write_text(found, encoding="utf-8")
        raise AssertionError(f"there was no {path}. It is written now: read it, and run again.")
    expected = path.read_text(encoding="utf-8")
    changes = difflib.unified_diff(expected.splitlines(), found.splitlines(), path.name, "the graphs", lineterm="", n=0)
    assert found == expected, "\n".join(changes)


def assert_rewrites(traced: fxprune.TracedModule, step: Pass, golden: str) -> None:
    """The pass works in place, says that it changed something, and gives the golden graphs, whose reads have shapes."""
    result = step(traced)
    assert result.modified
    assert result.graph_module is traced
    assert_golden(traced, golden)
    reads = [node for graph in traced.graphs.values() for node in graph.find_nodes(op="get_attr")]
    shapes = {str(node.target): node.meta["val"].shape for node in reads}  # by which calls are checked
    assert shapes == {name: tensor_at(traced, name).shape for name in shapes}
