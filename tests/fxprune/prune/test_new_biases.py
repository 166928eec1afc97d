"""Biases that repair makes where a layer has none: against least squares, and in all that follows."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import fxprune
from fxprune.errors import ArgumentTypeError, PruningError, WriteBackError
from tests.repairs import Chain, chain, dense_fit, masked


class Multiplied(nn.Module):
    """A product with a parameter."""

    def __init__(self, equation: str = "") -> None:
        super().__init__()
        self.equation, self.table = equation, nn.Parameter(torch.randn(6, 3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum(self.equation, x, self.table) if self.equation else x @ self.table


class Added(Multiplied):
    """A product with a parameter, to which another one is added."""

    def __init__(self) -> None:
        super().__init__()
        self.offset = nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.offset + x @ self.table


BARE: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(6, 3, bias=False), lambda: nn.Linear(6, 3), ()),
    "matmul": (Multiplied, lambda: nn.Linear(6, 3), ()),
    "einsum": (lambda: Multiplied("nc,cd->nd"), lambda: nn.Linear(6, 3), ()),
    "padded": (lambda: nn.Conv2d(6, 3, 3, padding=1, bias=False), lambda: nn.Conv2d(6, 3, 3, padding=1), (5, 4)),
    "grouped": (lambda: nn.Conv2d(6, 4, 2, groups=2, bias=False), lambda: nn.Conv2d(6, 4, 2, groups=2), (5, 5)),
    "conv1d": (lambda: nn.Conv1d(6, 3, 3, bias=False), lambda: nn.Conv1d(6, 3, 3), (9,)),
    "transposed": (
        lambda: nn.ConvTranspose2d(6, 4, 3, stride=2, padding=1, groups=2, bias=False),
        lambda: nn.ConvTranspose2d(6, 4, 3, stride=2, padding=1, groups=2),
        (4, 3),
    ),
}


def gone(reader: nn.Module, weight: Tensor) -> Tensor:
    """The weights that read something when the channels 1 and 4 of six are gone."""
    live = torch.ones_like(weight, dtype=torch.bool).unflatten(0, (getattr(reader, "groups", 1), -1))
    by_input = live if isinstance(reader, nn.ConvTranspose2d) else live.transpose(1, 2)
    for channel in (1, 4):
        by_input[channel // by_input.shape[1], channel % by_input.shape[1]] = False
    return live.flatten(0, 1)


def shifted_chain(reader: nn.Module, space: tuple[int, ...]) -> tuple[nn.Module, Tensor]:
    """A network whose hidden values that go are far from zero on average."""
    model, x = chain(reader, space, 6)
    model.first.bias.data[[1, 4]] += 2.0
    return model.requires_grad_(False), x


@pytest.mark.parametrize("kind", BARE)
def test_a_layer_without_a_bias_gets_the_one_of_least_squares(kind: str) -> None:
    torch.manual_seed(0)
    build, build_twin, space = BARE[kind]
    model, x = shifted_chain(build(), space)
    twin = build_twin().double()
    (own,) = model.reader.parameters()
    twin.weight.data = own.detach().T.clone() if isinstance(model.reader, Multiplied) else own.detach().clone()
    twin.bias.data.zero_()
    hidden = torch.tanh(model.first(x))
    hidden[:, [1, 4]] = 0
    target = model(x)
    live = gone(twin, twin.weight)
    expected = dense_fit(twin.requires_grad_(False), hidden, target, live)
    traced = masked(model, x)
    report = fxprune.reconstruct(traced, x, damping=0.0)
    name = "reader.table_bias" if isinstance(model.reader, Multiplied) else "reader.bias"
    assert report.new_biases == (name,)
    assert f"no optimizer holds yet: {name}" in str(report)
    torch.testing.assert_close(traced.get_parameter(name).detach(), expected["bias"], rtol=1e-7, atol=1e-9)
    fitted = functional_call(twin, expected | {"weight": expected["weight"] * live}, hidden)
    torch.testing.assert_close(traced(x), fitted)
    torch.testing.assert_close(fxprune.finalize(traced)(x), fitted)
    without = masked(model, x)
    assert not fxprune.reconstruct(without, x, damping=0.0, new_biases=False).new_biases
    assert [*without.state_dict()] == [key for key in traced.state_dict() if key != name]
    assert (without(x) - target).square().sum() > 1.01 * (fitted - target).square().sum()


def test_a_parameter_that_is_added_behind_a_product_is_its_bias() -> None:
    torch.manual_seed(0)
    model, x = shifted_chain(Added(), ())
    twin = nn.Linear(6, 3).double()
    twin.weight.data, twin.bias.data = model.reader.table.T.clone(), model.reader.offset.clone()
    hidden = torch.tanh(model.first(x))
    hidden[:, [1, 4]] = 0
    expected = dense_fit(twin.requires_grad_(False), hidden, model(x), gone(twin, twin.weight))
    traced = masked(model, x)
    report = fxprune.reconstruct(traced, x, damping=0.0)
    assert not report.new_biases
    torch.testing.assert_close(traced.get_parameter("reader.offset"), expected["bias"])
    small = fxprune.write_back(fxprune.finalize(traced, align=1), model)
    torch.testing.assert_close(small(x), traced(x))


def test_no_bias_is_made_where_it_does_not_help() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6, bias=False), nn.Linear(6, 3, bias=False)).double().eval()
    x = torch.randn(400, 6, dtype=torch.float64)
    x = torch.cat([x, -x]).reshape(2, 40, 10, 6).transpose(1, 2).reshape(-1, 6)  # the mean of all values is zero
    traced = fxprune.trace(model, x[:2], modes=["eval"])
    fxprune.prune.ln_structured(traced, "0.weight", 2, n=2, dim=0)
    report = fxprune.reconstruct(traced, x)
    assert report.refitted == ["1.weight"]
    assert not report.new_biases
    assert "no bias takes the mean shift" in report.table()


def test_only_the_layers_whose_mean_nothing_takes_up_get_a_bias() -> None:
    """A batch norm behind takes it up; two names for one weight, and a name that is taken, leave no place."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(3, 6)
            self.normed, self.norm = nn.Linear(6, 4, bias=False), nn.BatchNorm1d(4)
            self.one, self.other = nn.Linear(6, 4, bias=False), nn.Linear(6, 4, bias=False)
            self.other.weight = self.one.weight
            self.taken = Multiplied()
            self.taken.table_bias = nn.Parameter(torch.ones(2))

        def forward(self, x: Tensor) -> Tensor:
            hidden = torch.relu(self.first(x))
            return torch.cat([
                self.norm(self.normed(hidden)), self.one(hidden), self.other(-hidden), self.taken(hidden),
                hidden[:, :2] * self.taken.table_bias,
            ], 1)  # fmt: skip

    torch.manual_seed(0)
    model, x = Net().eval(), torch.randn(200, 3)
    traced = masked(model, x)
    report = fxprune.reconstruct(traced, x)
    assert {"normed.weight", "one.weight", "taken.table"} <= {*report.refitted}
    assert not report.new_biases


def bare(*, norm: bool = False) -> tuple[nn.Module, Tensor]:
    """Layers without biases, whose hidden values are far from zero on average; and inputs."""
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(3, 16, 3, padding=1, bias=False), *([nn.BatchNorm2d(16)] if norm else []), nn.Sigmoid(),
        nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.Sigmoid(), nn.Flatten(), nn.Linear(16 * 25, 8, bias=False),
        nn.Sigmoid(), nn.Linear(8, 4),
    ]  # fmt: skip
    return nn.Sequential(*layers).eval(), torch.randn(300, 3, 5, 5)


def repaired(model: nn.Module, x: Tensor) -> tuple[fxprune.TracedModule, tuple[str, ...]]:
    """The model with half of its channels masked, in both modes, and the biases that its repair made."""
    traced = fxprune.trace(copy.deepcopy(model), x[:2]).eval()
    fxprune.prune.channels(traced, 0.5, round_to=1)
    report = fxprune.reconstruct(traced, x)
    assert report.new_biases
    return traced, report.new_biases


def test_outputs_that_are_masked_have_a_mask_on_the_new_bias_and_go_with_it() -> None:
    model, x = bare()
    traced, made = repaired(model, x)
    assert "2.bias" in made
    dead = traced.get_buffer("2.weight_mask").flatten(1).sum(1) == 0
    assert bool(dead.any())
    assert torch.equal(traced.get_buffer("2.bias_mask") == 0, dead)
    final = fxprune.finalize(traced, align=1)
    assert final.get_parameter("2.bias").shape == (int((~dead).sum()),)
    torch.testing.assert_close(final(x), traced(x), rtol=1e-4, atol=1e-5)


def test_training_goes_on_with_the_new_biases_in_the_train_graph() -> None:
    model, x = bare(norm=True)
    traced, made = repaired(model, x)
    assert all(any(node.target.startswith(name) for node in graph.find_nodes(op="get_attr"))
               for name in made for graph in traced.graphs.values())  # fmt: skip
    optimizer = torch.optim.SGD(traced.parameters(), 0.01)
    before = {name: value.clone() for name, value in traced.named_parameters()}
    traced.train()(x[:32]).square().sum().backward()
    optimizer.step()
    name = next(name for name in before if name.removesuffix("_orig") in made)
    assert not torch.equal(before[name], traced.get_parameter(name))
    traced.eval()
    torch.testing.assert_close(fxprune.finalize(traced)(x), traced(x), rtol=1e-4, atol=1e-5)


def test_an_optimizer_that_is_older_goes_on_and_takes_the_new_biases_in_after_finalize() -> None:
    model, x = bare()
    traced = fxprune.trace(copy.deepcopy(model), x[:2]).eval()
    fxprune.prune.channels(traced, 0.5, round_to=1)
    optimizer = torch.optim.Adam(traced.parameters(), 0.01)
    made = fxprune.reconstruct(traced, x).new_biases
    traced.train()(x[:32]).square().sum().backward()
    optimizer.step()
    final = fxprune.finalize(traced.eval(), align=1)
    after = fxprune.optimizer_after(final.train(), optimizer)
    held = {id(parameter) for group in after.param_groups for parameter in group["params"]}
    assert {id(final.get_parameter(name)) for name in made} <= held


def test_pruning_and_repair_alternate_with_biases_that_the_reference_has_not() -> None:
    model, x = bare()
    traced = fxprune.trace(copy.deepcopy(model), x[:2], modes=("eval",))
    for amount in (0.25, 0.5):
        fxprune.prune.channels(traced, amount, round_to=1)
        before = (traced(x) - model(x)).square().mean()
        report = fxprune.reconstruct(traced, x, reference=model)
        assert (traced(x) - model(x)).square().mean() < 0.5 * before
    assert report.refitted
    assert traced.made_biases["2.bias"] == "2.weight"
    torch.testing.assert_close(fxprune.finalize(traced)(x), traced(x), rtol=1e-4, atol=1e-5)


def test_one_sensitivity_serves_after_biases_were_made() -> None:
    model, x = bare()
    traced = fxprune.trace(copy.deepcopy(model), x[:2], modes=("eval",))
    sensitivity = fxprune.sensitivity(traced, x)
    for macs in (0.7, 0.4):
        report = fxprune.prune.channels(traced, macs=macs, importance=sensitivity)
        assert fxprune.reconstruct(traced, x, reference=model).new_biases or macs == 0.4
    assert report.macs[1] <= 0.4 * report.macs[0]


@pytest.mark.parametrize("finalized", [False, True])
@pytest.mark.parametrize("alone", [False, True])
def test_checkpoints_keep_new_biases_with_and_without_the_model(tmp_path: Path, finalized: bool, alone: bool) -> None:
    model, x = bare()
    traced, made = repaired(model, x)
    traced = fxprune.finalize(traced) if finalized else traced
    fxprune.save(traced, tmp_path / "model.fxp")
    again = fxprune.load(tmp_path / "model.fxp", None if alone else model)
    assert torch.equal(again(x), traced(x))
    assert again.made_biases == traced.made_biases
    assert {*made} == {*again.made_biases}
    assert [*again.state_dict()] == [*traced.state_dict()]


def test_the_models_class_gets_the_new_biases_where_it_has_a_place_for_them() -> None:
    model, x = bare()
    traced, made = repaired(model, x)
    small = fxprune.write_back(fxprune.finalize(traced, align=1), model)
    assert isinstance(small[2].bias, nn.Parameter)
    assert {*made} <= {name for name, _ in small.named_parameters()}
    assert model[2].bias is None
    torch.testing.assert_close(small(x), traced(x), rtol=1e-4, atol=1e-5)


def test_a_class_without_a_place_for_a_new_bias_is_named() -> None:
    torch.manual_seed(0)
    model, x = shifted_chain(Multiplied(), ())
    traced = masked(model, x)
    assert fxprune.reconstruct(traced, x).new_biases == ("reader.table_bias",)
    final = fxprune.finalize(traced)
    with pytest.raises(WriteBackError, match=r"reader \(Multiplied\) has no place for 'table_bias'.*new_biases=False"):
        fxprune.write_back(final, model)


def test_an_exported_file_has_the_new_biases(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    model, x = bare()
    traced, _ = repaired(model, x)
    final = fxprune.finalize(traced)
    fxprune.export.to_onnx(final, tmp_path / "model.onnx")
    assert fxprune.compare(final, tmp_path / "model.onnx", inputs=x[:4]).ok


def test_an_error_leaves_no_bias() -> None:
    model, x = bare()
    traced = fxprune.trace(copy.deepcopy(model), x[:2], modes=("eval",))
    fxprune.prune.channels(traced, 0.5, round_to=1)
    before = {name: value.clone() for name, value in traced.state_dict().items()}
    code = traced.code
    traced.get_parameter("7.bias").data.fill_(torch.nan)
    before["7.bias"].fill_(torch.nan)
    with pytest.raises(PruningError, match="NaN or inf"):
        fxprune.reconstruct(traced, x)
    assert traced.code == code
    found = traced.state_dict()
    assert [*found] == [*before]
    assert all(torch.equal(found[name].nan_to_num(), before[name].nan_to_num()) for name in before)
    with pytest.raises(ArgumentTypeError, match="new_biases=1"):
        fxprune.reconstruct(traced, x, new_biases=1)


def test_new_biases_can_be_asked_not_to_be_made() -> None:
    assert inspect.signature(fxprune.reconstruct).parameters["new_biases"].default is True
    model, x = bare()
    traced = fxprune.trace(copy.deepcopy(model), x[:2], modes=("eval",))
    fxprune.prune.channels(traced, 0.5, round_to=1)
    names = [*traced.state_dict()]
    report = fxprune.reconstruct(traced, x, new_biases=False)
    assert not report.new_biases
    assert [*traced.state_dict()] == names


def test_a_bias_is_of_the_type_and_flag_of_its_layer() -> None:
    model = Chain(nn.Linear(3, 6), nn.Linear(6, 4, bias=False)).to(torch.bfloat16).eval()
    model.first.bias.data += 2
    model.reader.weight.requires_grad_(False)
    x = torch.randn(100, 3, dtype=torch.bfloat16)
    traced = masked(model, x)
    assert fxprune.reconstruct(traced, x).new_biases == ("reader.bias",)
    bias = traced.get_parameter("reader.bias")
    assert bias.dtype is torch.bfloat16
    assert not bias.requires_grad


def test_biases_that_are_made_without_gradients_train_on() -> None:
    model, x = bare()
    traced = fxprune.trace(copy.deepcopy(model), x[:2]).eval()
    fxprune.prune.channels(traced, 0.5, round_to=1)
    with torch.inference_mode():
        made = fxprune.reconstruct(traced, x).new_biases
    traced.train()(x[:32].clone()).square().sum().backward()
    parameters = dict(traced.named_parameters())
    assert all(parameters[name if name in parameters else f"{name}_orig"].grad is not None for name in made)


def test_a_schedule_goes_on_over_new_biases() -> None:
    model, x = bare()
    traced = fxprune.trace(copy.deepcopy(model), x[:2], modes=("eval",))

    def prune(amount: float) -> object:
        return fxprune.prune.channels(traced, amount, round_to=1)

    schedule = fxprune.Schedule(traced, None, prune, 0.5, start=0, stop=3, initial=0.2)
    made = []
    for _ in range(4):
        schedule.step()
        made += fxprune.reconstruct(traced, x, reference=model).new_biases
    assert made
    assert all(traced.get_buffer(f"{name}_mask").any() for name in ("0.weight", "2.weight"))
    for name in made:
        weight = traced.made_biases[name]
        dead = traced.get_buffer(f"{weight}_mask").flatten(1).sum(1) == 0
        assert not bool(traced.get_buffer(f"{name}_mask")[dead].any())
    torch.testing.assert_close(fxprune.finalize(traced)(x), traced(x), rtol=1e-4, atol=1e-5)
