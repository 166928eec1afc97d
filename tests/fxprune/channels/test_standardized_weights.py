"""Weights that are standardized in forward, as those of networks without normalization are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.errors import FxpruneWarning, PruningError, WriteBackError


class Standardized(nn.Conv2d):
    """Each row of its weight has mean zero and variance one."""

    def forward(self, x: Tensor) -> Tensor:
        rows = self.weight.flatten(1)[None]
        weight = nn.functional.batch_norm(rows, None, None, training=True, momentum=0.0)
        return nn.functional.conv2d(x, weight.reshape_as(self.weight), self.bias, padding=1)


class Scaled(nn.Conv2d):
    """The same with a gain for each row, and statistics taken in another way."""

    def __init__(
        self, columns: int, rows: int, kernel: int, stride: int = 1, padding: int = 1, groups: int = 1
    ) -> None:
        super().__init__(columns, rows, kernel, stride, padding, groups=groups)
        self.gain = nn.Parameter(torch.rand(rows, 1, 1, 1) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        variance, mean = torch.var_mean(self.weight, (1, 2, 3), keepdim=True, correction=0)
        weight = self.gain * (self.weight - mean) * torch.rsqrt(variance + 1e-5)
        return nn.functional.conv2d(x, weight, self.bias, self.stride, self.padding, groups=self.groups)


class Stream(nn.Module):
    """Branches of standardized convolutions added to one stream, as in networks without normalization."""

    def __init__(self, kind: type[nn.Conv2d]) -> None:
        super().__init__()
        self.stem, self.last = kind(3, 16, 3), nn.Linear(16, 4)
        self.outer = nn.ModuleList([kind(16, 24, 3), kind(16, 24, 3)])
        self.inner = nn.ModuleList([kind(24, 16, 3), kind(24, 16, 3)])

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        for outer, inner in zip(self.outer, self.inner, strict=True):
            y = y + 0.2 * inner(outer(y.relu()).relu())
        y = self.last(y.relu().mean((2, 3)))
        return y


@pytest.mark.parametrize(
    ("kind", "modes"),
    [
        (Standardized, ("eval",)),
        pytest.param(Scaled, ("eval",), marks=pytest.mark.slow),
        (Standardized, ("train", "eval")),
        (Scaled, ("train", "eval")),
    ],
)
def test_what_is_standardized_over_goes_once_the_values_stand_in_its_place(
    kind: type[nn.Conv2d], modes: tuple[str, ...], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model, x = Stream(kind).double().eval(), torch.randn(2, 3, 6, 6).double()
    free = {0: torch.export.Dim.AUTO, 2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO}
    traced = fxprune.trace(model, x, modes=modes, dynamic_shapes=(free,))
    report = fxprune.prune.channels(traced, macs=0.5, round_to=1)
    assert report.macs[1] <= 0.5 * report.macs[0]
    final = fxprune.finalize(traced.eval(), align=1)
    plan = final.plan
    assert plan is not None
    assert plan.macs == report.macs
    assert {"outer.0.weight", "inner.1.weight"} <= set(plan.held)
    assert "plain weights now" in plan.explain()
    assert type(plan).from_json(plan.to_json()).held == plan.held
    for size in (6, 9):
        x = torch.randn(3, 3, size, size).double()
        torch.testing.assert_close(final(x), traced(x), rtol=1e-9, atol=1e-9)
    if "train" in modes:
        torch.testing.assert_close(final.train()(x), traced.train()(x), rtol=1e-9, atol=1e-9)
    path = tmp_path / "file.fxp"
    fxprune.save(final, path)
    assert torch.equal(fxprune.load(path).eval()(x), final.eval()(x))
    small = fxprune.write_back(final.eval(), model)
    torch.testing.assert_close(small(x), traced.eval()(x), rtol=1e-9, atol=1e-9)
    assert type(small.inner[1]) is nn.Conv2d
    assert type(small.stem) is kind  # of which no input went
    again = fxprune.finalize(traced.eval(), plan=plan, verify=False)
    assert torch.equal(again.eval()(x), final.eval()(x))
    fxprune.export.to_onnx(final.float(), tmp_path / "file.onnx")


def test_groups_of_a_standardized_convolution_go() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Scaled(3, 16, 3), nn.ReLU(), Scaled(16, 16, 3, groups=4), nn.ReLU(), Scaled(16, 4, 3))
    model, x = model.double().eval(), torch.randn(2, 3, 6, 6).double()
    traced = fxprune.trace(model, x, modes=("eval",))
    report = fxprune.prune.channels(traced, macs=0.6, round_to=1)
    final = fxprune.finalize(traced, align=1)
    assert final.plan is not None
    assert final.plan.macs == report.macs
    torch.testing.assert_close(final(x), traced(x), rtol=1e-9, atol=1e-9)


def test_rows_of_groups_go_where_no_column_does() -> None:
    torch.manual_seed(0)
    layers = [Scaled(3, 16, 3), nn.ReLU(), Scaled(16, 16, 3, groups=2), nn.ReLU(), Scaled(16, 16, 3), nn.ReLU()]
    model, x = nn.Sequential(*layers, nn.Conv2d(16, 4, 3)).double().eval(), torch.randn(2, 3, 6, 6).double()
    traced = fxprune.trace(model, x, modes=("eval",))
    report = fxprune.prune.channels(traced, 0.5, targets=["2.weight"], round_to=1)
    final = fxprune.finalize(traced, align=1)
    assert final.plan is not None
    assert final.plan.removed["2.weight"] == {0: 8}
    assert final.plan.macs == report.macs
    torch.testing.assert_close(final(x), traced(x), rtol=1e-9, atol=1e-9)


def test_weights_stay_computed_where_nothing_goes_that_they_read() -> None:
    torch.manual_seed(0)
    model = Stream(Scaled).eval()
    traced = fxprune.trace(model, torch.randn(2, 3, 6, 6))
    final = fxprune.finalize(traced.eval())
    assert final.plan is not None
    assert not final.plan.held
    assert "outer.0.gain" in dict(final.named_parameters())


class Active(Standardized):
    """One that does more than a convolution."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


def test_what_is_standardized_over_stays_where_no_layer_of_torch_does_the_same_and_refusals_say_so() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Active(3, 16, 3), Active(16, 16, 3), Active(16, 4, 3)).eval()
    traced = fxprune.trace(model, torch.randn(2, 3, 6, 6), modes=("eval",))
    with pytest.raises(PruningError, match="statistics over it"):
        fxprune.prune.channels(traced, macs=0.7, round_to=1, runnable=model)
    fxprune.prune.channels(traced, macs=0.7, round_to=1)
    with pytest.raises(WriteBackError, match=r"1 \(Active\) standardizes .* over all that is read.*runnable=model"):
        fxprune.write_back(fxprune.finalize(traced), model)


class Padded(Scaled):
    """One that pads what it reads, the same on both sides where its stride is one."""

    def __init__(self, columns: int, rows: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__(columns, rows, 3, stride, 0, groups)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(nn.functional.pad(x, (1, 1, 1, 1) if self.stride == (1, 1) else (0, 1, 0, 1)))


def test_channels_are_chosen_for_a_class_as_far_as_layers_of_torch_do_the_same() -> None:
    torch.manual_seed(0)
    layers = [Padded(3, 16), Padded(16, 16), Padded(16, 16, 2, 4), Padded(16, 16)]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(144, 4)).double().eval()
    x = torch.randn(2, 3, 6, 6).double()
    traced = fxprune.trace(model, x, modes=("eval",))
    fxprune.prune.channels(traced, macs=0.7, round_to=1, runnable=model)
    final = fxprune.finalize(traced)
    assert final.plan is not None
    assert final.plan.held == ("1.weight",)
    small = fxprune.write_back(final, model)
    assert [type(layer) for layer in small[:4]] == [Padded, nn.Conv2d, Padded, Padded]
    assert small[1].padding == (1, 1)
    torch.testing.assert_close(small(x), traced(x), rtol=1e-9, atol=1e-9)


def test_an_optimizer_goes_on_without_the_state_of_weights_that_are_others_now() -> None:
    torch.manual_seed(0)
    model, x = Stream(Scaled), torch.randn(2, 3, 6, 6)
    traced = fxprune.trace(model, x)
    fxprune.prune.channels(traced, macs=0.5, round_to=1)
    optimizer = torch.optim.Adam(traced.parameters())
    traced.train()(x).square().sum().backward()
    optimizer.step()
    final = fxprune.finalize(traced.eval(), align=1)
    with pytest.warns(FxpruneWarning, match="does not go on step for step"):
        after = fxprune.optimizer_after(final, optimizer)
    assert not after.state[final.get_parameter("outer.0.weight")]
    final.train()(x).square().sum().backward()
    after.step()


@pytest.mark.parametrize("modes", [("eval",), ("train", "eval")])
def test_budgets_count_what_finalize_leaves_beside_standardized_weights(modes: tuple[str, ...]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Standardized(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Conv2d(16, 4, 1))
    model, x = model.eval(), torch.randn(2, 3, 6, 6)
    traced = fxprune.trace(model, x, modes=modes)
    report = fxprune.prune.channels(traced, 0.5, scope="local", round_to=1)
    final = fxprune.finalize(traced.eval())
    assert final.plan is not None
    assert report.macs == final.plan.macs
    assert report.macs[1] < report.macs[0]
    x = torch.randn(3, 3, 6, 6).double()
    torch.testing.assert_close(final.double()(x), traced.double()(x), rtol=1e-9, atol=1e-9)
    small = fxprune.write_back(fxprune.finalize(traced), model.double())
    torch.testing.assert_close(small(x), traced(x), rtol=1e-9, atol=1e-9)
