"""What is private of torch, and changed while a capture runs, still behaves as the library relies on."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo import _trace_wrapped_higher_order_op
from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex
from torch._subclasses import fake_tensor
from torch.distributions import Distribution, Normal

import fxprune
from fxprune import torch_internals as internals
from fxprune.errors import CaptureError


class Router(nn.Module):
    """Converts a layer of its own before it calls it, as routers of experts do."""

    def __init__(self, kind: torch.dtype) -> None:
        super().__init__()
        self.layer = nn.Sequential(nn.Linear(4, 3, dtype=kind), nn.BatchNorm1d(3, dtype=kind))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.layer = self.layer.to(torch.float32)
        return torch.softmax(self.layer(x.float()), -1)


def test_conversions_checked_lets_pass_what_changes_nothing_and_names_what_changes() -> None:
    layer, before = nn.Linear(2, 2), nn.Module._apply
    with internals.conversions_checked():
        assert layer.to("cpu").float() is layer
        with pytest.raises(TypeError, match=r"'weight' of a Linear from torch.float32 on cpu to torch.float64 on cpu"):
            layer.double()
    assert nn.Module._apply is before
    assert layer.weight.dtype == torch.float32
    assert layer.double().weight.dtype == torch.float64


def test_a_layer_that_forward_converts_to_what_it_is_keeps_its_parameters_and_trains() -> None:
    model, x = Router(torch.float32), torch.randn(5, 4)
    parameters = list(model.parameters())
    traced = fxprune.trace(model, x)
    assert all(one is other for one, other in zip(traced.parameters(), parameters, strict=True))
    assert torch.equal(traced.eval()(x), model.eval()(x))
    small = fxprune.write_back(fxprune.finalize(traced), model)
    assert torch.equal(small(x), model(x))
    assert torch.equal(traced.train()(x), model.train()(x))


def test_a_layer_that_forward_converts_to_another_dtype_is_named_and_stays() -> None:
    model, x = Router(torch.bfloat16).eval(), torch.randn(5, 4)
    with pytest.raises(CaptureError, match=r"'0.weight' of a Sequential from torch.bfloat16 .* one run of the model"):
        fxprune.trace(model, x)
    assert model.layer[0].weight.dtype == torch.bfloat16
    expected = model(x)
    assert torch.equal(fxprune.trace(model, x).eval()(x), expected)


@pytest.mark.filterwarnings("ignore:.*were assigned during export:UserWarning")
@pytest.mark.filterwarnings("ignore:LSTM with projections:UserWarning")
@pytest.mark.parametrize(
    "layer", [nn.LSTM(4, 3, 2, bidirectional=True), nn.GRU(4, 3), nn.RNN(4, 3), nn.LSTM(4, 5, proj_size=3)]
)
def test_any_recurrent_length_leaves_the_length_free_and_torch_as_it_was(layer: nn.RNNBase) -> None:
    operators = (torch.ops.aten.lstm.input, torch.ops.aten.gru.input, torch.ops.aten.rnn_tanh.input)
    before = [dict(operator.py_kernels) for operator in operators]
    free = ({0: torch.export.Dim.DYNAMIC},)
    with internals.any_recurrent_length():
        program = torch.export.export(layer, (torch.randn(7, 2, 4),), dynamic_shapes=free, strict=False)
    assert [dict(operator.py_kernels) for operator in operators] == before
    x = torch.randn(9, 2, 4)
    expected, found = layer(x), program.module()(x)
    assert torch.equal(found[0], expected[0])
    (result,) = [node.meta["val"] for node in program.graph.nodes if node.name == "getitem"]
    assert isinstance(result.shape[0], torch.SymInt)


def test_functions_applied_hears_of_functions_by_class_and_by_a_method_taken_before() -> None:
    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x * 2

        @staticmethod
        def backward(ctx: Any, gradient: Any) -> Any:
            return gradient * 2

    heard: list[type] = []
    kind: Any = Doubled
    apply, x = kind.apply, torch.ones(2, requires_grad=True)
    with internals.functions_applied(heard.append):
        apply(x)
        kind.apply(x)
    kind.apply(x)
    assert heard == [Doubled, Doubled]


@pytest.mark.parametrize("before", [True, False])
def test_distributions_unchecked_look_at_no_values_and_then_do_as_before(before: bool) -> None:
    standard = Distribution._validate_args
    Distribution.set_default_validate_args(before)
    try:
        with internals.distributions_unchecked():
            Normal(0.0, torch.tensor(-1.0))
            with pytest.raises(ValueError, match="constraint"):
                Normal(0.0, torch.tensor(-1.0), validate_args=True)
        assert Distribution._validate_args is before
    finally:
        Distribution.set_default_validate_args(standard)


def test_indices_recorded_of_a_tensor_that_vmap_reads_for_a_mask_are_operators(tmp_path: Path) -> None:
    class Masked(nn.Module):
        """Position 0 is seen by all; else a position sees its own kind, as transformers builds such masks."""

        def forward(self, x: torch.Tensor, kinds: torch.Tensor) -> torch.Tensor:
            def sees(row: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
                return (key < 1) | (kinds[row, query] == kinds[row, key])

            for axes in ((None, None, 0), (None, 0, None), (0, None, None)):
                sees = torch.vmap(sees, in_dims=axes)
            with TransformGetItemToIndex():
                mask = sees(torch.arange(x.shape[0]), torch.arange(x.shape[1]), torch.arange(x.shape[1]))
            return F.scaled_dot_product_attention(x, x, x, attn_mask=mask)

    x, kinds = torch.randn(2, 5, 4), torch.tensor([[0, 1, 1, 2, 2], [0, 0, 1, 1, 0]])
    model, before = Masked().eval(), _trace_wrapped_higher_order_op.mod_index
    traced = fxprune.trace(model, (x, kinds), modes=("eval",))
    assert _trace_wrapped_higher_order_op.mod_index is before
    for rows in ([0, 1], [1, 0, 1]):
        assert torch.equal(traced(x[rows], kinds[rows]), model(x[rows], kinds[rows]))
    report = fxprune.export.to_onnx(fxprune.finalize(traced), tmp_path / "masked.onnx")
    assert report.inputs == ("x", "kinds")


class Repeated(nn.Module):
    """Repeats what it is given as often as a buffer says."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("times", torch.tensor(3), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x] * int(self.times))


def test_values_known_of_buffers_are_computed_with_by_captures_and_only_then() -> None:
    model, x, before = Repeated(), torch.randn(2), fake_tensor.CONSTANT_NUMEL_LIMIT
    with internals.values_known({"times": model.times}):
        program = torch.export.export(model, (x,), strict=False)
    assert torch.equal(program.module()(x), x.repeat(3))
    assert before == fake_tensor.CONSTANT_NUMEL_LIMIT
    with pytest.raises(Exception, match="data-dependent"):
        torch.export.export(model, (x,), strict=False)


def test_sizes_watched_hears_of_sizes_that_are_fixed_or_conditioned_while_the_model_runs() -> None:
    heard: list[tuple[list[str], int | None]] = []

    class Asks(nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            before = len(heard)
            x = x.view(6) if y.shape[0] > 3 else x
            assert len(heard) > before, "while the line runs"
            return x

    class Added(nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return x + y

    with internals.sizes_watched(lambda sources, value: heard.append((sources, value))):
        shapes = {"x": {0: torch.export.Dim.AUTO}, "y": {0: torch.export.Dim.AUTO}}
        torch.export.export(Asks(), (torch.ones(6), torch.ones(4)), dynamic_shapes=shapes, strict=False)
    assert (["L['x'].size()[0]"], 6) in heard
    assert (["L['y'].size()[0]"], None) in heard
    count = len(heard)
    torch.export.export(Added(), (torch.ones(6), torch.ones(6)), dynamic_shapes=shapes, strict=False)
    assert len(heard) == count


def test_LOGGERS_OF_FAILED_CAPTURES_are_those_that_speak(caplog: pytest.LogCaptureFixture) -> None:
    class Branches(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if x.sum() > 0 else -x

    def said() -> list[str]:
        caplog.clear()
        with pytest.raises(Exception, match="data-dependent"):
            torch.export.export(Branches(), (torch.ones(2),), strict=False)
        return [record.name for record in caplog.records if record.levelno >= logging.WARNING]

    assert set(said()) & set(internals.LOGGERS_OF_FAILED_CAPTURES)
    levels = {logging.getLogger(name): logging.getLogger(name).level for name in internals.LOGGERS_OF_FAILED_CAPTURES}
    try:
        for logger in levels:
            logger.setLevel(logging.CRITICAL)
        assert said() == []
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)


def test_size_expression_is_over_the_symbols_of_the_capture() -> None:
    class Doubled(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cat([x, x])

    program = torch.export.export(Doubled(), (torch.ones(3, 2),), dynamic_shapes=({0: torch.export.Dim.AUTO},))
    (given,) = program.graph.find_nodes(op="placeholder")
    (result,) = program.graph.output_node().args[0]
    symbol = internals.size_expression(given.meta["val"].shape[0])
    assert symbol.is_Symbol
    assert symbol in program.range_constraints
    assert internals.size_expression(result.meta["val"].shape[0]).subs({symbol: 5}) == 10
