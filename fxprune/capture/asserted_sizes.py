"""Sizes that come of values, of which a graph asserts that they are a number."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import sympy
import torch
from torch import fx
from torch.export import ExportedProgram

from fxprune.torch_internals import replace_sizes

_ASSERTION = torch.ops.aten._assert_scalar.default


@contextlib.contextmanager
def as_asserted(program: ExportedProgram) -> Iterator[None]:
    """Within, sizes of which a graph asserts that they are a number are that number where they are recorded.

    torch's reader knows it, looks for the step that such a size comes of, and finds none. The assertions stay.
    """
    found = [_asserted(node) for node in program.graph.find_nodes(op="call_function", target=_ASSERTION)]
    asserted = {equation.lhs: equation.rhs for equation, _ in found if equation is not None}
    sizes = next((sizes for equation, sizes in found if equation is not None), None)
    if sizes is None:
        yield
        return
    ranges, before = dict(program.range_constraints), replace_sizes(sizes, {**sizes.replacements, **asserted})
    try:
        for symbol in asserted:
            program.range_constraints.pop(symbol, None)
        yield
    finally:
        replace_sizes(sizes, before)
        program.range_constraints.update(ranges)


def _asserted(node: fx.Node) -> tuple[Any, Any]:
    """What an assertion says, if it says which number a symbol is, and the sizes of that capture."""
    condition = node.args[0]
    value = condition.meta.get("val") if isinstance(condition, fx.Node) else None
    if not isinstance(value, torch.SymBool):
        return None, None
    equation = value.node.expr
    if not isinstance(equation, sympy.Eq) or not (equation.lhs.is_Symbol and equation.rhs.is_Integer):
        return None, None
    return equation, value.node.shape_env
