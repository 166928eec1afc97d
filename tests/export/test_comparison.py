"""`compare`: what it calls equal, what it says of the rest, and that it leaves everything as it was."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn
from torch.nn.utils import parametrizations, prune

import fxprune
from fxprune.errors import ArgumentError, CaptureError, CompareError, InputError
from fxprune.export import Call, Report, compare, judging
from fxprune.export.float64 import float64_runner


class Returns(nn.Module):
    """Returns what it was built with, whatever it is called with."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output

    def forward(self, *_: torch.Tensor) -> Any:
        return self.output


def against(reference: Any, candidate: Any, **options: Any) -> Report:
    return compare(Returns(reference), Returns(candidate), inputs=(), **options)


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.5)
        self.head = parametrizations.spectral_norm(nn.Linear(4, 3))
        prune.l1_unstructured(self.conv, "weight", 0.5)

    def forward(self, x: torch.Tensor, scale: float = 1.0) -> dict[str, Any]:
        features = self.drop(self.norm(self.conv(x)).relu().mean((2, 3)))
        return {"logits": self.head(features) * scale, "pair": (features, None)}


@pytest.fixture
def network() -> Network:
    torch.manual_seed(0)
    return Network()


@pytest.fixture(scope="module")
def pair() -> tuple[Network, fxprune.TracedModule]:
    torch.manual_seed(0)
    model = Network()
    return model, fxprune.trace(model, X)


X = torch.randn(4, 2, 6, 6)


def state(model: nn.Module) -> list[Any]:
    flags = [module.training for module in model.modules()]
    return [flags, {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()]


def assert_same_state(before: list[Any], after: list[Any]) -> None:
    assert before[0] == after[0]
    assert before[1].keys() == after[1].keys()
    assert all(torch.equal(v, after[1][k]) for k, v in before[1].items())
    assert torch.equal(before[2], after[2])


# ---- what agrees


@pytest.mark.parametrize(
    ("dtype", "within", "beyond"),
    [
        (torch.float64, 5e-10, 2e-9),
        (torch.float32, 5e-5, 2e-4),
        (torch.float16, 5e-3, 2e-2),
        (torch.bfloat16, 3e-2, 0.1),
    ],
)
def test_default_tolerance_by_dtype(dtype: torch.dtype, within: float, beyond: float) -> None:
    one = torch.ones(3, dtype=dtype)
    assert against(one, one + within).ok
    assert not against(one, one + beyond).ok


def test_an_error_is_judged_against_the_largest_value_of_its_output() -> None:
    reference = torch.tensor([100.0, 0.0, 1.0])
    report = against(reference, reference + torch.tensor([0.0, 5e-3, 0.0]))
    assert report.ok
    assert report.rows[0].max_abs == pytest.approx(5e-3)
    assert report.rows[0].max_rel == pytest.approx(5e-5)
    assert not against((reference, torch.zeros(1)), (reference, torch.full((1,), 5e-3))).ok


def test_tolerances_can_be_given() -> None:
    one = torch.ones(2)
    assert against(one, one + 1, rtol=1.0).ok
    assert against(one, one + 1, atol=1.0, rtol=0).ok
    assert not against(one, one * (1 + 1e-6), rtol=0, atol=0).ok
    assert against(one, one.clone(), rtol=0, atol=0).ok
    assert against(torch.zeros(2), torch.full((2,), 1e-9), atol=1e-8).ok
    assert not against(torch.zeros(2), torch.full((2,), 1e-30)).ok


@pytest.mark.parametrize("value", [torch.tensor([True, False]), torch.tensor([2**53, 5])])
def test_integers_and_booleans_agree_when_equal(value: torch.Tensor) -> None:
    other = value.clone()
    other[0] = not value[0] if value.dtype == torch.bool else 2**53 + 1  # float64 cannot tell these two apart
    assert against(value, value.clone()).ok
    assert not against(value, other, rtol=1.0, atol=1.0).ok


@pytest.mark.parametrize("odd", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_inf_must_stand_at_the_same_places(odd: float) -> None:
    with_odd, other = torch.tensor([1.0, odd, 3.0]), torch.tensor([1.0, 2.0, 3.0])
    assert against(with_odd, with_odd.clone()).ok
    for report in (
        against(with_odd, other),
        against(other, with_odd),
        against(with_odd, torch.tensor([1.0, -odd, odd])),
    ):
        assert not report.ok
        assert "NaN or inf differ at" in report.table()
    assert not against(with_odd, torch.tensor([1.0, odd, 3.1])).ok


@pytest.mark.parametrize(
    ("candidate", "says"),
    [
        (torch.ones(3), "is float32 of shape [3]"),
        (torch.ones(2, dtype=torch.float64), "is float64 of shape [2]"),
        ((torch.ones(2), torch.ones(2)), "has 2 outputs ['[0]', '[1]'], the reference 1 ['output']"),
    ],
)
def test_shape_dtype_and_number_of_outputs_must_agree(candidate: Any, says: str) -> None:
    report = against(torch.ones(2), candidate)
    assert not report.ok
    assert says in report.table()


def test_empty_scalar_and_complex_outputs() -> None:
    assert against(torch.ones(0, 3), torch.ones(0, 3)).ok
    assert against(torch.tensor(1.0), torch.tensor(1.0)).ok
    assert against(3, 3).ok
    assert not against(3, 4).ok
    assert against(torch.tensor([1 + 1j]), torch.tensor([1 + 1.00001j])).ok
    assert not against(torch.tensor([1 + 1j]), torch.tensor([1 + 1.1j])).ok


# ---- the report


@dataclass
class Output:
    logits: torch.Tensor
    hidden: tuple[torch.Tensor, None]


def test_report_names_outputs_by_path_and_calls_by_number() -> None:
    output = Output(torch.ones(2, 3), (torch.ones(1), None))
    wrong = Output(torch.zeros(2, 3), (torch.ones(1), None))
    report = compare(Returns(output), Returns(output), Returns(wrong), inputs=[(), {}], names=("a", "b", "c"))
    assert [(r.candidate, r.call, r.output) for r in report.rows[:4]] == [
        ("b", 0, "logits"), ("b", 0, "hidden[0]"), ("c", 0, "logits"), ("c", 0, "hidden[0]"),
    ]  # fmt: skip
    assert [row.ok for row in report.rows] == [True, True, False, True] * 2
    assert report.first_divergence is None
    text = report.table().splitlines()
    assert text[0] == "against a, eval mode"
    assert len(text) == 2 + 4 + 1
    assert text[6].startswith("the nodes could not be compared: ")  # what it returns is no computation
    assert report.no_search in text[6]
    assert text[4].split() == ["c", "0", "logits", "2x3", "float32", "1.0e+00", "1.0e+00", "NO", "limit", "1.0e-04"]
    again = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert again["ok"] is False
    assert again["rows"][2]["max_abs"] == 1.0


def test_names_of_equal_classes_are_numbered(network: Network) -> None:
    report = compare(network, network, inputs=X)
    assert (report.reference, report.rows[0].candidate) == ("Network (0)", "Network (1)")


# ---- inputs


@pytest.mark.parametrize(
    "inputs", [X, (X,), (X, 2.0), {"x": X}, {"scale": 2.0, "x": X}, Call((X,), {"scale": 2.0}), [X, (X,), {"x": X}]]
)
def test_forms_of_inputs(network: Network, inputs: Any) -> None:
    report = compare(network, network, inputs=inputs)
    assert report.ok
    assert len(report.rows) == 2 * (len(inputs) if isinstance(inputs, list) else 1)


class Doubles(nn.Module):
    def forward(self, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, bool]:
        return a.mul_(2), a is b


def test_inputs_are_not_written_to_and_keep_their_identity() -> None:
    x = torch.ones(2)
    report = compare(Doubles(), Doubles(), Returns((torch.full((2,), 2.0), True)), inputs=(x, x))
    assert report.ok
    assert torch.equal(x, torch.ones(2))


# ---- modules stay as they are


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("training", [True, False])
def test_modules_are_left_as_they_were(network: Network, mode: Any, training: bool) -> None:
    network.train(training)
    network.norm.eval()  # a frozen layer
    before = state(network)
    assert compare(network, network, inputs=[X, X], mode=mode, rtol=0, atol=0).ok
    assert_same_state(before, state(network))
    assert all(p.grad is None for p in network.parameters())


def test_a_module_that_fails_is_left_as_it_was(network: Network) -> None:
    wrong = torch.randn(2, 5, 6, 6)
    before = state(network.train())
    with pytest.raises(CompareError):
        compare(network, network, inputs=wrong, mode="train")
    assert_same_state(before, state(network))


class Replaces(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.steps = self.steps + 1
        return x * self.steps


def test_a_buffer_that_forward_replaces_comes_back() -> None:
    model = Replaces()
    kept = model.steps
    assert compare(model, model, inputs=[X, X]).ok
    assert model.steps is kept
    assert kept == 0


def test_modules_run_with_gradients_recorded() -> None:
    class Recorded(nn.Module):
        def forward(self, x: torch.Tensor) -> int:
            return int(torch.is_grad_enabled())

    with torch.no_grad():
        assert compare(Recorded(), Returns(1), inputs=X).ok


# ---- train mode


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_traced_equals_eager_and_keeps_its_mode(pair: tuple[Network, fxprune.TracedModule], mode: Any) -> None:
    model, traced = pair
    for training in (True, False):
        before, graph = state(traced.train(training)), traced.graph
        report = compare(model, traced, model, inputs=[X, X[:2]], mode=mode, rtol=0, atol=0)
        assert report.ok, report.table()
        assert_same_state(before, state(traced))
        assert traced.graph is graph
    buffers = {row.output for row in report.rows if row.output.startswith("buffer ")}
    assert ("buffer norm.running_mean" in buffers) == (mode == "train")


def test_train_mode_compares_what_the_call_makes_of_the_buffers(network: Network) -> None:
    class Frozen(nn.BatchNorm2d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.batch_norm(x, None, None, self.weight, self.bias, True)

    candidate, norm = Network(), Frozen(4)
    candidate.load_state_dict(network.state_dict())
    norm.load_state_dict(network.norm.state_dict())
    candidate.norm = norm
    report = compare(network, candidate, inputs=X, mode="train")
    wrong = {"buffer norm.running_mean", "buffer norm.running_var", "buffer norm.num_batches_tracked"}
    assert {row.output for row in report.rows if not row.ok} == wrong
    assert compare(network, candidate, inputs=X, mode="eval").rows[0].output == "logits"


def test_train_mode_is_for_modules_that_have_one(network: Network, tmp_path: Path) -> None:
    traced = fxprune.trace(nn.Linear(2, 2), (torch.ones(2, 2),), modes=("eval",))
    with pytest.raises(CaptureError, match="train mode was asked for"):
        compare(nn.Linear(2, 2), traced, inputs=torch.ones(2, 2), mode="train")
    with pytest.raises(CompareError, match="has no train mode"):
        compare(network, tmp_path / "model.onnx", inputs=X, mode="train")


# ---- files


@pytest.fixture(scope="module")
def linear(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[nn.Linear, Path]]:
    """A linear layer, and an ONNX file of it whose bias is off by `error`."""

    def build(error: float = 0.0) -> tuple[nn.Linear, Path]:
        torch.manual_seed(0)
        layer = nn.Linear(3, 2)
        weights = [layer.weight.detach(), layer.bias.detach() + error]
        ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n", s]) for n, s in (("input", 3), ("y", 2))]
        tensors = [onnx.numpy_helper.from_array(w.numpy(), n) for w, n in zip(weights, "wb", strict=True)]
        node = helper.make_node("Gemm", ["input", "w", "b"], ["y"], transB=1)
        graph = helper.make_graph([node], "linear", ends[:1], ends[1:], tensors)
        path = tmp_path_factory.mktemp("linear") / "linear.onnx"
        onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
        return layer, path

    return build


def test_files_and_modules_in_any_role(linear: Callable[..., tuple[nn.Linear, Path]]) -> None:
    layer, path = linear()
    report = compare(layer, path, str(path), layer, inputs=[torch.randn(5, 3), {"input": torch.randn(1, 3)}])
    assert report.ok
    assert [row.candidate for row in report.rows[:3]] == ["linear.onnx (1)", "linear.onnx (2)", "Linear (3)"]
    report = compare(path, layer, inputs=torch.randn(5, 3))
    assert (report.ok, report.reference, report.rows[0].output) == (True, "linear.onnx", "y")


def test_a_file_with_one_wrong_weight_is_told_apart(linear: Callable[..., tuple[nn.Linear, Path]]) -> None:
    layer, path = linear(error=0.01)
    report = compare(layer, path, inputs=torch.randn(5, 3))
    assert not report.ok
    assert report.rows[0].max_abs == pytest.approx(0.01, rel=1e-3)


def test_a_file_that_cannot_be_run_is_named(linear: Callable[..., tuple[nn.Linear, Path]], tmp_path: Path) -> None:
    layer, path = linear()
    cut, text = tmp_path / "cut.onnx", tmp_path / "text.onnx"
    cut.write_bytes(path.read_bytes()[:-20])
    text.write_text("no model")
    x = torch.randn(2, 3)
    for bad, says in ((cut, "cut.onnx' .* cannot be loaded"), (text, "text.onnx' .* cannot be loaded"),
                      (tmp_path, "end in .onnx"), (tmp_path / "no.onnx", "there is nothing of that name")):  # fmt: skip
        with pytest.raises(CompareError, match=says):
            compare(layer, bad, inputs=x)
    with pytest.raises(CompareError, match="'linear.onnx' cannot run these inputs"):
        compare(Returns(torch.ones(2, 2)), path, inputs=torch.randn(2, 4))


# ---- what cannot be compared


def test_wrong_inputs_are_named(network: Network, pair: tuple[Network, fxprune.TracedModule]) -> None:
    with pytest.raises(CompareError, match=r"Network cannot run these inputs: RuntimeError: .*float32\[2, 5, 6, 6\]"):
        compare(network, network, inputs=torch.randn(2, 5, 6, 6))
    with pytest.raises(InputError, match="has shape"):
        compare(Returns(1), pair[1], inputs=torch.randn(2, 5, 6, 6))


def test_bad_arguments(network: Network) -> None:
    with pytest.raises(ArgumentError, match="0 candidates"):
        compare(network, inputs=X)
    with pytest.raises(ArgumentError, match="0 inputs"):
        compare(network, network, inputs=[])
    with pytest.raises(ArgumentError, match="mode is 'test'"):
        compare(network, network, inputs=X, mode="test")  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="1 names were given"):
        compare(network, network, inputs=X, names=["a"])
    with pytest.raises(CompareError, match="inputs hold a str"):
        compare(network, network, inputs="x")
    with pytest.raises(CompareError, match="a OrderedDict was given to compare"):
        compare(network, network.state_dict(), inputs=X)  # type: ignore[arg-type]
    with pytest.raises(CompareError, match="Returns returns a str at 'output'"):
        compare(network, Returns("text"), inputs=X)


def test_many_parameters_are_copied_to_float64_only_where_an_output_does_not_agree(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    copies = []
    monkeypatch.setattr(judging, "MOST_BYTES_COPIED", 15)
    monkeypatch.setattr(judging, "float64_runner", lambda runner: copies.append(runner) or float64_runner(runner))
    model, x = nn.Linear(2, 2), torch.randn(3, 2)
    agrees = fxprune.compare(model, copy.deepcopy(model), inputs=x)
    assert agrees.ok
    assert not copies
    assert agrees.rows[0].error is None
    assert "copied only where an output does not agree" in agrees.no_float64
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.weight += 1
    differs = fxprune.compare(model, other, inputs=[(x,), (x,)])
    assert not differs.ok
    assert len(copies) == 1
    assert differs.rows[0].error is not None
    assert differs.no_float64 == ""
