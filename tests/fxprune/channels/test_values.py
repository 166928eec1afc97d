"""What is known of a value in reduced form, against the full tensor that it stands for."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from fxprune.channels.axes import ONE, Axis, Factor, quotient, same_size
from fxprune.channels.ids import Ids
from fxprune.channels.values import Known, Value, settled
from fxprune.graph import working_memory


def grid(where: Tensor, value: Tensor) -> Value:
    """A value whose only axis is two channels times three positions times two channels."""
    ids = Ids()
    axis = Axis((Factor(2, ids.fresh(2)), Factor(3), Factor(2, ids.fresh(2))))
    return Value((axis,), Known(value, where))


def full(value: Value) -> tuple[Tensor, Tensor]:
    """The facts with every factor at its full size: where, and the values there."""
    assert value.facts is not None
    merged = value.relayout(0, Axis.carrying(12, np.arange(12)))
    assert merged.facts is not None
    return merged.facts.where, torch.where(merged.facts.where, merged.facts.value, 0)


@pytest.mark.parametrize("bytes_at_once", [1, 30, 2**22])
def test_what_is_the_same_along_an_axis_is_found_in_parts(bytes_at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(working_memory, "BYTES_AT_ONCE", bytes_at_once)
    table = torch.tensor([[1.0, 2.0, torch.nan], [1.0, 2.0, torch.nan], [1.0, 5.0, torch.nan], [1.0, 2.0, torch.nan]])
    ids = Ids()
    rows, columns = Axis.carrying(4, ids.fresh(4)), Axis.carrying(3, ids.fresh(3))
    for dim, axes, expected in ((0, (rows, columns), [True, False, False]), (1, (columns, rows), [True, False, False])):
        stored = Value(axes, Known.tensor(table if dim == 0 else table.t()))
        blurred = stored.relayout(dim, axes[dim].opaque())
        assert blurred.facts is not None
        assert blurred.facts.where.flatten().tolist() == expected


def test_merging_factors_repeats_what_is_known_over_opaque_ones() -> None:
    where, value = full(grid(torch.tensor([True, False, True, True]), torch.tensor([1.0, 2.0, 3.0, 4.0])))
    assert where.tolist() == [True, False] * 3 + [True, True] * 3
    assert value.tolist() == [1, 0] * 3 + [3, 4] * 3


def test_a_factor_that_turns_opaque_keeps_what_is_the_same_along_it() -> None:
    value = grid(torch.ones(4, dtype=torch.bool), torch.tensor([1.0, 2.0, 1.0, 4.0]))
    (outer, space, inner) = value.axes[0].factors
    blurred = value.relayout(0, Axis((outer.opaque(), space, inner)))
    assert blurred.facts is not None
    assert blurred.facts.where.tolist() == [True, False]
    assert blurred.facts.value[0] == 1


def test_a_border_is_lost_where_a_factor_turns_opaque() -> None:
    value = grid(torch.ones(4, dtype=torch.bool), torch.ones(4))
    assert value.facts is not None
    bordered = Value(value.axes, Known(value.facts.value, value.facts.where, torch.tensor([True, False, False, False])))
    (outer, space, inner) = value.axes[0].factors
    blurred = bordered.relayout(0, Axis((outer.opaque(), space, inner)))
    assert blurred.facts is not None
    assert blurred.facts.border is None
    assert blurred.facts.where.tolist() == [False, True]


def test_a_parameter_stays_stored_when_it_is_moved_and_not_when_it_is_merged() -> None:
    ids = Ids()
    weight = Value((Axis.of(ids.fresh(2)), Axis.of(ids.fresh(3))), Known.tensor(torch.randn(2, 3)), source="weight")
    turned = weight.moved(weight.axes[::-1], lambda tensor: tensor.t())
    assert turned.stored
    assert turned.source is None
    assert not weight.relayout(0, weight.axes[0].opaque()).stored


def test_zeros_have_the_reduced_shape_whether_or_not_anything_is_known() -> None:
    axes = (Axis.of(Ids().fresh(3)), Axis.plain(7), ONE)
    assert Value(axes).zeros.shape == (3, 1, 1)
    known = settled(axes, torch.tensor([True, True, False]).view(3, 1, 1), torch.tensor([0.0, 1.0, 0.0]).view(3, 1, 1))
    assert known.zeros.flatten().tolist() == [True, False, False]


def test_a_cut_of_the_last_axis_no_longer_sums_to_one() -> None:
    attention = Value((Axis.plain(4), Axis.plain(6)), sums=True)
    assert not attention.cut(1, Axis.plain(3)).sums
    assert attention.cut(0, Axis.plain(3)).sums


@pytest.mark.parametrize(("dividend", "divisor", "result"), [(12, 4, 3), (12, 5, None), (12, 0, None)])
def test_quotients_are_whole_or_none(dividend: int, divisor: int, result: int | None) -> None:
    assert quotient(dividend, divisor) == result


def test_symbolic_sizes_compare_and_divide_as_expressions() -> None:
    batch = torch.export.export(
        torch.nn.Flatten(0, 1), (torch.randn(2, 4),), dynamic_shapes={"input": {0: torch.export.Dim.AUTO}}
    )
    node = next(node for node in batch.graph.nodes if node.op == "call_function")
    size = node.meta["val"].shape[0]
    assert same_size(size, size)
    assert not same_size(size, 4)
    assert str(quotient(size, 4)) == str(node.all_input_nodes[0].meta["val"].shape[0])
