"""Constants of positions: channels that zero padding makes a map of, folded into one that is added, at every size."""

from __future__ import annotations

import copy
import itertools
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.channels.positions import Window, inside
from fxprune.errors import WriteBackError
from tests.fxprune.channels.exactness import EXACT, error

ACTIVATIONS = nn.ReLU, nn.ReLU6, nn.Hardswish, nn.SiLU, nn.Sigmoid, nn.Identity
CONVOLUTIONS = nn.Conv1d, nn.Conv2d, nn.Conv3d
NORMS = nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d


def _separable(seed: int) -> tuple[nn.Module, int]:
    """A 1x1 convolution with half of its rows zero, a padded depthwise one and a 1x1, and the axes of space."""
    torch.manual_seed(seed)
    draw = torch.Generator().manual_seed(seed)

    def pick(*options: Any) -> Any:
        return options[int(torch.randint(len(options), (), generator=draw))]

    space, channels = pick(1, 2, 2, 3), pick(8, 16, 32)
    kernel = pick(2, 3) if space == 3 else pick(2, 3, 3, 5)
    stride, dilation = pick(1, 1, 2, 3), pick(1, 1, 2)
    padding = pick("same", kernel // 2, 1, dilation * (kernel - 1))
    convolution, norm = CONVOLUTIONS[space - 1], NORMS[space - 1]
    middle: dict[str, Any] = {"padding": padding, "dilation": dilation, "bias": pick(True, False)}
    middle |= {} if padding == "same" else {"stride": stride}
    normed = pick(True, False)
    layers: list[nn.Module] = [convolution(3, channels, 1, bias=not normed)]
    layers += [norm(channels)] if normed else []
    layers += [
        pick(*ACTIVATIONS)(),
        convolution(channels, channels, kernel, groups=pick(channels, channels, 4), **middle),
    ]
    layers += [norm(channels)] if pick(True, False) else []
    outputs = pick(1, 4, 12)
    layers += [pick(*ACTIVATIONS)(), convolution(channels, outputs, 1, bias=pick(True, False))]
    layers += [norm(outputs)] if pick(True, False) else []
    model = nn.Sequential(*layers).double().eval()
    for module in model:
        if isinstance(module, NORMS):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    with torch.no_grad():
        model[0].weight[: channels // 2] = 0
    return model, space


def _free(space: int) -> tuple[dict[int, Any], ...]:
    return ({axis: torch.export.Dim.AUTO for axis in (0, *range(2, space + 2))},)


def _sizes(space: int) -> list[tuple[int, ...]]:
    lengths = (1, 2, 3, 4, 7) if space < 3 else (1, 2, 5)
    return [(batch, 3, *size) for size in itertools.product(lengths, repeat=space) for batch in (1, 3)]


def _difference(model: nn.Module, final: nn.Module, inputs: Tensor) -> float | None:
    """None where the model does not take such inputs."""
    with torch.no_grad():
        try:
            expected = model(inputs)
        except RuntimeError:
            return None
        return error(expected, final(inputs))


@pytest.mark.parametrize("seed", [*range(12), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(12, 150))])
@pytest.mark.filterwarnings("ignore")
def test_channels_of_random_separable_convolutions_go_exactly_at_every_size(seed: int) -> None:
    model, space = _separable(seed)
    sample = torch.randn(2, 3, *[9] * space).double()
    modes = ("train", "eval") if seed % 4 == 0 else ("eval",)
    traced = fxprune.trace(model, sample, modes=modes, dynamic_shapes=_free(space)).eval()
    final = fxprune.finalize(traced, align=1)
    found = [_difference(model, final, torch.randn(*size).double()) for size in _sizes(space)]
    assert max(one for one in found if one is not None) < EXACT
    middle = next(module for module in model if isinstance(module, CONVOLUTIONS) and module.kernel_size[0] > 1)
    if middle.groups == middle.in_channels:  # rows of others read live channels as well
        # of the others those go as well that an activation lets nothing through of, whatever the input
        assert final.get_parameter("0.weight").shape[0] <= middle.in_channels // 2


def test_a_window_has_as_many_values_as_there_are_pairs_of_taps_outside() -> None:
    window = Window(taps=3, stride=1, dilation=1, before=1, after=1)
    assert window.inside().tolist() == [[1, 1, 1], [1, 1, 0], [0, 1, 1], [0, 1, 0]]
    assert Window(taps=3, stride=2, dilation=2, before=4, after=0).inside().sum(1).tolist() == [3, 2, 1]
    assert inside([window, window]).shape == (16, 9)


def _biased(train: bool = False) -> tuple[nn.Module, fxprune.TracedModule, Tensor]:
    """Half of 16 channels are constant, and positive: they read zeros at the border."""
    torch.manual_seed(0)
    last = nn.Conv2d(16, 8, 1)
    model = nn.Sequential(nn.Conv2d(8, 16, 1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.ReLU(), last)
    with torch.no_grad():
        model[0].weight[:8] = 0
        model[0].bias[:8].uniform_(0.5, 1)
        model[2].weight.abs_()
    inputs = torch.randn(2, 8, 6, 7)
    modes = ("train", "eval") if train else ("eval",)
    return model.eval(), fxprune.trace(model, inputs, modes=modes).eval(), inputs


def test_half_of_a_separable_convolution_goes_with_its_positive_constants() -> None:
    model, traced, inputs = _biased()
    final = fxprune.finalize(traced, align=1)
    plan = final.plan
    assert plan is not None
    assert plan.parameters[1] <= 0.55 * plan.parameters[0]
    assert [count for _, _, count in plan.positions.values()] == [8]
    assert "constant but for the border of conv2d_1" in plan.explain()
    assert "8 constant channels folded" in str(plan)
    assert error(model(inputs).detach(), final(inputs).detach()) < 1e-5


def test_both_graphs_add_the_map_and_the_train_graph_trains() -> None:
    model, traced, inputs = _biased(train=True)
    final = fxprune.finalize(traced, align=1)
    for mode in (False, True):
        assert error(model(inputs).detach(), final.train(mode)(inputs).detach()) < 1e-5
    final.train()(inputs).sum().backward()
    assert all(parameter.grad is not None for parameter in final.parameters())


def test_a_map_survives_files_plans_and_another_finalize(tmp_path: Path) -> None:
    model, traced, inputs = _biased()
    final, path = fxprune.finalize(traced, align=1), tmp_path / "model.fxp"
    expected = final(inputs)
    fxprune.save(final, path)
    for other in (fxprune.load(path), fxprune.load(path, model), copy.deepcopy(final), fxprune.finalize(final)):
        assert torch.equal(other(inputs), expected)
    dense = fxprune.trace(model, inputs, modes=("eval",))
    again = fxprune.finalize(dense, plan=fxprune.channels.ChannelPlan.from_json(final.plan.to_json()))
    again.load_state_dict(final.state_dict())
    assert torch.equal(again(inputs), expected)


def test_a_smaller_one_is_pruned_further_and_its_map_is_cut_with_it() -> None:
    model, traced, inputs = _biased()
    head = nn.Sequential(model, nn.ReLU(), nn.Conv2d(8, 2, 1)).eval()
    traced = fxprune.trace(head, inputs, modes=("eval",))
    final = fxprune.finalize(traced, align=1)
    fxprune.prune.channels(final, 3, targets="0.4", round_to=1)
    smaller = fxprune.finalize(final, align=1)
    assert len(smaller.get_buffer("0.4.positions")) == 5
    assert error(final(inputs).detach(), smaller(inputs).detach()) < 1e-5


def test_the_users_class_has_no_place_for_a_map_and_channels_stay_where_that_is_asked_for() -> None:
    model, traced, inputs = _biased()
    with pytest.raises(WriteBackError, match="map to the result of 4, .*keep_for_write_back=True"):
        fxprune.write_back(fxprune.finalize(traced, align=1), model)
    final = fxprune.finalize(traced, align=1, keep_for_write_back=True)
    assert final.plan is not None
    assert not final.plan.positions
    small = fxprune.write_back(final, model)
    assert error(model(inputs).detach(), small(inputs).detach()) < 1e-5


def test_a_map_by_running_statistics_is_named_and_kept_for_training() -> None:
    torch.manual_seed(0)
    middle = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8), nn.ReLU()
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), *middle, nn.Conv2d(8, 4, 1)).eval()
    with torch.no_grad():
        model[0].weight[:4] = 0
        model[0].bias[:4] = 1
    inputs = torch.randn(4, 3, 6, 6)
    traced = fxprune.trace(model, inputs).eval()
    with pytest.warns(fxprune.errors.EvalConstantWarning, match="4 of 3"):
        final = fxprune.finalize(traced, align=1)
    assert final.plan is not None
    assert final.plan.eval_only == {"3": [0, 1, 2, 3]}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kept = fxprune.finalize(traced, align=1, keep_for_training=True)
    for mode in (False, True):
        assert error(model.train(mode)(inputs).detach(), kept.train(mode)(inputs).detach()) < 1e-5


@pytest.mark.parametrize(
    "last",
    [
        nn.Conv2d(16, 8, 3),
        nn.Conv2d(16, 8, 1, stride=2),
        nn.Conv2d(16, 8, 1, padding=1),
        nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(16, 8, 1)),
        nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(16, 8, 1)),
        nn.Sequential(nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.Conv2d(16, 8, 1)),
        nn.Sequential(nn.Flatten(), nn.Linear(16 * 42, 3)),
        nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(16, 8, 1)),
        nn.Sequential(nn.PReLU(16), nn.Conv2d(16, 8, 1)),
        nn.Sequential(nn.InstanceNorm2d(16), nn.Conv2d(16, 8, 1)),
        nn.ConvTranspose2d(16, 8, 1),
    ],
    ids=str,
)
def test_what_reads_a_map_otherwise_keeps_its_channels(last: nn.Module) -> None:
    model, _, inputs = _biased()
    model[4] = last
    traced = fxprune.trace(model.eval(), inputs, modes=("eval",))
    final = fxprune.finalize(traced, align=1)
    assert final.plan is not None
    assert not final.plan.positions
    assert final.get_parameter("0.weight").shape[0] == 16
    assert error(model(inputs).detach(), final(inputs).detach()) < 1e-5


class _Flipped(nn.Module):
    def __init__(self, change: Any) -> None:
        super().__init__()
        self.change = change

    def forward(self, x: Tensor) -> Tensor:
        changed: Tensor = self.change(x)
        return changed


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.flip(2), lambda x: x.roll(1, 3), lambda x: x[:, :, 1:], lambda x: x.transpose(2, 3),
        lambda x: x.relu_() + x.flip(3), lambda x: x.half().to(x.dtype), lambda x: x * x[:, :1],
        lambda x: x.flatten(2).view(x.shape), lambda x: nn.functional.pad(x, (1, 1)),
    ],
)  # fmt: skip
def test_what_moves_positions_or_meets_others_is_right(change: Any) -> None:
    model, _, inputs = _biased()
    model[3] = _Flipped(change)
    traced = fxprune.trace(model.eval(), inputs, modes=("eval",))
    final = fxprune.finalize(traced, align=1)
    assert error(model(inputs).detach(), final(inputs).detach()) < 1e-5


def test_the_result_of_one_border_is_added_to_that_of_another_without_a_map() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Conv2d(3, 8, 1)
            self.one, self.two = (nn.Conv2d(8, 8, k, padding=k // 2, groups=8) for k in (3, 5))
            self.last = nn.Conv2d(8, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x).relu()
            result: Tensor = self.last(self.one(y).relu() * self.two(y).sigmoid())
            return result

    torch.manual_seed(0)
    model = Two().double().eval()
    with torch.no_grad():
        model.first.weight[:4] = 0
        model.first.bias[:4] = 1
        model.one.weight.abs_()
    inputs = torch.randn(2, 3, 6, 6).double()
    final = fxprune.finalize(fxprune.trace(model, inputs, modes=("eval",)), align=1)
    assert final.get_parameter("first.weight").shape[0] == 8
    assert error(model(inputs).detach(), final(inputs).detach()) < EXACT


def test_the_file_has_the_map_and_runs_at_every_size(tmp_path: Path) -> None:
    model, _, inputs = _biased()
    free = ({0: torch.export.Dim("b"), 2: torch.export.Dim("h", min=2), 3: torch.export.Dim("w", min=2)},)
    traced = fxprune.trace(model, inputs, modes=("eval",), dynamic_shapes=free)
    final = fxprune.finalize(traced, align=1)
    path = tmp_path / "model.onnx"
    fxprune.export.to_onnx(final, path)
    for size in ((1, 8, 2, 2), (3, 8, 5, 9)):
        others = torch.randn(*size)
        assert fxprune.compare(model, path, inputs=others).ok


def test_by_default_these_channels_stay_with_the_reason_and_the_class_gets_its_network_back() -> None:
    model, traced, inputs = _biased()
    final = fxprune.finalize(traced)
    assert final.plan is not None
    assert not final.plan.positions
    assert "constant there but for the border" in final.plan.explain()
    small = fxprune.write_back(final, model)
    assert error(model(inputs).detach(), small(inputs).detach()) < 1e-5
