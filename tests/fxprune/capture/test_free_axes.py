"""Free axes that a model fixes: `Dim.AUTO` warns, a named dimension is an error, and both say which line did it."""

from __future__ import annotations

import inspect
import re
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ShapesCollection

import fxprune
from fxprune.capture.free_axes import free_axes
from fxprune.capture.sample import Sample
from fxprune.errors import ArgumentError, BatchSpecializedWarning, CaptureError, EvalOnlyWarning, FixedSizeWarning

X = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(0))


class Positions(nn.Module):
    """Adds a table of six positions, in a module of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(6, 8))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.table  # the table has six rows


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.positions, self.layer = Positions(), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.positions(x))


class Reads(nn.Module):
    def forward(this, x: Tensor) -> Tensor:
        length = int(x.shape[1])
        return x * torch.ones(length, 1) if length == 6 else x


class Thirds(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.unflatten(1, (3, -1))  # in three


class Longer(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] > 4:
            return x * 2
        return x


class Pair(nn.Module):
    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        return x + other  # of one length


class Nested(nn.Module):
    def forward(self, batch: dict[str, Any]) -> Tensor:
        return batch["ids"][0].view(2, 6) + 1


class TrainFixes(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.ones(6, 8) if self.training else x


def line_of(kind: type, text: str) -> str:
    """The file and the number of the line in the code of a class that holds a text."""
    lines, start = inspect.getsourcelines(kind)
    return f"{inspect.getfile(kind)}:{next(i for i, line in enumerate(lines, start) if text in line)}: "


FIXED: dict[str, tuple[type[nn.Module], str, str]] = {
    "a table in a module below": (Network, "at positions (Positions)", line_of(Positions, "six rows")),
    "a size as a number": (Reads, "at the root module (Reads)", line_of(Reads, "int(x")),
}


@pytest.mark.parametrize("case", FIXED.values(), ids=FIXED)
def test_an_axis_left_to_torch_that_stays_fixed_warns_with_input_axis_size_and_line(case: Any) -> None:
    kind, where, line = case
    with pytest.warns(FixedSizeWarning) as caught:
        traced = fxprune.trace(kind(), X, dynamic_shapes={"x": {0: Dim.AUTO, 1: Dim.AUTO}})
    ((message, source),) = ((str(warning.message), warning.filename) for warning in caught)
    assert message.startswith("axis 1 of input `x` was left to Dim.AUTO; in eval mode it is fixed to 6 ")
    assert where in message
    assert line in message
    assert source == __file__
    with pytest.raises(fxprune.errors.InputError):
        traced(torch.randn(2, 7, 8))
    assert traced(torch.randn(5, 6, 8)).shape[0] == 5


@pytest.mark.parametrize("case", FIXED.values(), ids=FIXED)
@pytest.mark.parametrize("dimension", [Dim("length"), Dim.DYNAMIC], ids=["named", "dynamic"])
def test_a_dimension_that_is_fixed_is_an_error_that_names_the_line(case: Any, dimension: Any) -> None:
    kind, where, line = case
    model = kind()
    before = dict(vars(model))
    with pytest.raises(CaptureError) as caught:
        fxprune.trace(model, X, dynamic_shapes={"x": {1: dimension}})
    message = str(caught.value)
    name = " (length)" if dimension is not Dim.DYNAMIC else ""
    assert f"axis 1 of input `x`{name} is fixed to 6 {where}, {line}" in message
    assert "leave the axis out of `dynamic_shapes`" in message
    assert "TORCH_LOGS" not in message
    assert vars(model) == before


def test_an_axis_that_stays_free_is_captured_without_a_word() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for shapes in ({"x": {1: Dim.AUTO}}, {"x": {1: Dim("n", min=5)}}, ({0: Dim.AUTO, 1: Dim.AUTO},), None):
            traced = fxprune.trace(Longer(), X, dynamic_shapes=shapes)
            assert shapes is None or traced(torch.randn(2, 9, 8)).shape[1] == 9


@pytest.mark.parametrize("axis", [2, -1, "1"])
@pytest.mark.parametrize("dimension", [Dim("length"), Dim.DYNAMIC, Dim.AUTO], ids=["named", "dynamic", "auto"])
def test_an_axis_that_the_input_does_not_have_is_an_error(axis: Any, dimension: Any) -> None:
    with pytest.raises(ArgumentError, match=rf"axis {axis} of input `input`.* \(3, 8\): an axis from 0 to 1 is needed"):
        fxprune.trace(nn.Linear(8, 2), torch.randn(3, 8), dynamic_shapes={"input": {axis: dimension}})


def test_a_sample_of_size_one_is_said_to_be_the_reason() -> None:
    x = X[:, :1]
    with pytest.warns(FixedSizeWarning, match=r"fixed to 1, the size in the sample.*give a sample of size 2 or more"):
        fxprune.trace(nn.Linear(8, 2), x, dynamic_shapes={"input": {1: Dim.AUTO}})
    with pytest.raises(CaptureError, match=r"axis 1 of input `input` \(n\) is fixed to 1, the size in the sample"):
        fxprune.trace(nn.Linear(8, 2), x, dynamic_shapes={"input": {1: Dim("n")}})


@pytest.mark.parametrize(
    ("model", "args", "shapes", "says", "line", "cure"),
    [
        (Thirds(), (X,), {"x": {1: Dim("n")}}, "the model asks of n that", line_of(Thirds, "in three"), r"n = 3\*_n"),
        (Longer(), (X,), {"x": {1: Dim("n")}}, "that 5 <= n.", line_of(Longer, "> 4"), r"n = Dim\('n', min=5\)"),
        (Pair(), (X, X + 1), {"x": {1: Dim("n")}, "other": {1: Dim("m")}}, "values of m and n must always be equal",
         line_of(Pair, "of one length"), "m = n"),
    ],
    ids=["multiples", "a range", "equal"],
)  # fmt: skip
def test_a_dimension_that_must_meet_a_condition_names_it_the_line_and_what_torch_suggests(
    model: nn.Module, args: Any, shapes: Any, says: str, line: str, cure: str
) -> None:
    with pytest.raises(CaptureError) as caught:
        fxprune.trace(model, args, dynamic_shapes=shapes)
    message = str(caught.value)
    assert says in message
    assert line in message
    assert re.search(f"torch.export suggests: .*{cure}", message), message


def test_an_axis_that_one_mode_fixes_is_told_of_once_with_the_mode() -> None:
    with pytest.warns(FixedSizeWarning, match="in train mode it is fixed to 6") as caught:
        fxprune.trace(TrainFixes(), X, dynamic_shapes={"x": {1: Dim.AUTO}})
    assert len(caught) == 1
    with pytest.warns(EvalOnlyWarning, match=r"axis 1 of input `x` \(n\) is fixed to 6"):
        fxprune.trace(TrainFixes(), X, dynamic_shapes={"x": {1: Dim("n")}})


def test_nested_inputs_and_collections_of_shapes_are_understood() -> None:
    batch = {"ids": [torch.zeros(12)], "rest": torch.ones(3)}
    shapes = {"batch": {"ids": [{0: Dim.AUTO}], "rest": None}}
    with pytest.warns(FixedSizeWarning, match=r"axis 0 of input `batch.ids\[0\]` was.*view\(2, 6\)"):
        fxprune.trace(Nested(), (batch,), dynamic_shapes=shapes)
    collection = ShapesCollection()
    collection[X] = {1: Dim.AUTO}
    with pytest.warns(FixedSizeWarning, match="axis 1 of input `x`"):
        fxprune.trace(Network(), X, dynamic_shapes=collection)


def test_only_what_is_to_be_free_counts() -> None:
    sample = Sample((X, X), {})
    n = Dim("n")
    for shapes, wanted in (
        ({"x": {0: Dim.STATIC, 1: n}, "other": {0: 2, 1: None}}, [("x", 1, "n", False)]),
        (((Dim.AUTO, None, n), None), [("x", 0, "", True), ("x", 2, "n", False)]),
        ({"x": {1: 2 * n}}, [("x", 1, "2*n", False)]),
        ("batch", []),
        (None, []),
    ):
        found = [(a.name, a.axis, a.dimension, a.is_auto) for a in free_axes(Pair(), sample, shapes)]
        assert found == wanted


def test_a_batch_that_the_model_fixes_is_told_with_the_line() -> None:
    class Fixed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.view(2, 48)  # of two

    with pytest.warns(
        BatchSpecializedWarning, match="the batch is fixed by the model at the root module .*: `return x.v"
    ):
        fxprune.trace(Fixed(), X)


def test_a_free_batch_that_fails_is_fixed_then_and_nothing_of_it_stays_on_the_inputs() -> None:
    class Looks(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * {2: 3.0}[x.shape[0]]  # a free size is no key

    x = X.clone()
    with pytest.warns(BatchSpecializedWarning, match="the batch cannot be free"):
        traced = fxprune.trace(Looks(), x, modes=("eval",))
    assert torch.equal(traced(x), x * 3)
    with pytest.raises(CaptureError, match="unhashable"):
        fxprune.trace(Looks(), x, dynamic_shapes={"x": {0: Dim.AUTO}}, modes=("eval",))
    assert not x.__dict__
    torch._dynamo.mark_dynamic(x, 1)
    marked = {name: set(mark) for name, mark in x.__dict__.items() if isinstance(mark, set)}
    fxprune.trace(nn.ReLU(), x, modes=("eval",))
    assert {name: mark for name, mark in x.__dict__.items() if isinstance(mark, set)} == marked
