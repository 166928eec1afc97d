"""Readers that several calls use: fitted once, to all of their calls; their moments are those of all calls."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.errors import PruningError
from fxprune.passes import InsertMask
from fxprune.prune.repair.batches import Batches
from fxprune.prune.repair.finding import find
from fxprune.prune.repair.input_moments import InputMoments
from tests.repairs import masked

GONE, LEFT = [1, 4], [0, 2, 3, 5]


class Levels(nn.Module):
    """One layer reads two maps of different sizes, of which one misses channels."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.first, self.shared = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 4, 3, padding=1, bias=bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = torch.tanh(self.first(x))
        return self.shared(hidden), self.shared(torch.relu(hidden[:, :, ::2, 1:]))


class Twice(nn.Module):
    """A layer reads, by its second call, what its first one gave."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.shared, self.last = nn.Linear(3, 6), nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.shared(torch.tanh(self.shared(torch.tanh(self.first(x)))))))


def least_squares(inputs: list[Tensor], targets: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The weight and bias, for the channels that are left, that fit all calls at once."""
    design = torch.cat([torch.cat([rows, torch.ones(len(rows), 1, dtype=rows.dtype)], 1) for rows in inputs])
    found = torch.linalg.lstsq(design, torch.cat(targets)).solution
    return found[:-1].T, found[-1]


def windows(data: Tensor) -> Tensor:
    """What a kernel of 3 x 3 reads of the channels that are left, [positions, columns]."""
    return nn.functional.unfold(data[:, LEFT], 3, padding=1).transpose(1, 2).flatten(0, 1)


def rows(output: Tensor) -> Tensor:
    return output.movedim(1, -1).flatten(0, -2)


def test_a_layer_of_two_calls_is_fitted_to_the_rows_of_both() -> None:
    torch.manual_seed(0)
    model, x = Levels().double().eval().requires_grad_(False), torch.randn(40, 3, 6, 4, dtype=torch.float64)
    traced = masked(model, x)
    report = fxprune.reconstruct(traced, x, damping=0.0)
    assert report.refitted == ["shared.weight"]
    assert report.readers["shared.weight"].rows == 32 * (6 * 4 + 3 * 3)
    hidden = torch.tanh(model.first(x))
    inputs = [windows(hidden), windows(torch.relu(hidden[:, :, ::2, 1:]))]
    weight, bias = least_squares(inputs, [rows(output) for output in model(x)])
    found = traced.get_parameter("shared.weight").detach()
    torch.testing.assert_close(found[:, LEFT].flatten(1), weight)
    torch.testing.assert_close(found[:, GONE], model.shared.weight[:, GONE])
    torch.testing.assert_close(traced.get_parameter("shared.bias").detach(), bias)


def test_a_layer_that_reads_what_it_gave_is_fitted_to_both_calls_with_the_weights_that_are_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("fxprune.prune.repair.sweep._MOST_ROUNDS", 1)
    torch.manual_seed(0)
    model, x = Twice().double().eval().requires_grad_(False), torch.randn(200, 3, dtype=torch.float64)
    traced = masked(model, x)
    before = (traced(x) - model(x)).square().sum()
    report = fxprune.reconstruct(traced, x, damping=0.0)
    assert report.refitted == ["shared.weight", "last.weight"]
    dense = torch.tanh(model.first(x))
    own = dense.clone()
    own[:, GONE] = 0
    inputs = [own, torch.tanh(model.shared(own))]
    middle = model.shared(dense)
    weight, bias = least_squares(inputs, [middle, model.shared(torch.tanh(middle))])
    torch.testing.assert_close(traced.get_parameter("shared.weight").detach(), weight)
    torch.testing.assert_close(traced.get_parameter("shared.bias").detach(), bias)
    own = torch.tanh(torch.tanh(own @ weight.T + bias) @ weight.T + bias)  # the last layer reads what they give now
    weight, bias = least_squares([own], [model(x)])
    torch.testing.assert_close(traced(x), own @ weight.T + bias, rtol=1e-6, atol=1e-6)
    assert (traced(x) - model(x)).square().sum() < before
    torch.testing.assert_close(fxprune.finalize(traced)(x), traced(x))


@pytest.mark.parametrize("kind", ["nm", "channels"])
def test_a_layer_of_two_calls_with_a_mask_of_its_own_is_repaired(kind: str) -> None:
    torch.manual_seed(0)
    layers = nn.Linear(8, 8)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), layers, nn.Tanh(), layers, nn.Tanh(), nn.Linear(8, 2)).eval()
    x = torch.randn(200, 4)
    traced = fxprune.trace(copy.deepcopy(model), x[:2])
    if kind == "nm":
        fxprune.prune.nm_structured(traced, "2.weight", 2, 4)
    else:
        fxprune.prune.channels(traced, 0.25, round_to=1)
    traced.eval()
    masks = {name: mask.clone() for name, mask in traced.named_buffers()}
    before = (traced(x) - model(x)).square().sum()
    report = fxprune.reconstruct(traced, x)
    assert "2.weight" in report.refitted
    assert (traced(x) - model(x)).square().sum() < 0.5 * before
    assert all(torch.equal(mask, masks[name]) for name, mask in traced.named_buffers())
    torch.testing.assert_close(fxprune.finalize(traced)(x), traced(x), rtol=1e-4, atol=1e-5)


class Tied(nn.Module):
    """Two layers with one weight, and a bias each."""

    def __init__(self, other: nn.Linear | None = None) -> None:
        super().__init__()
        self.first, self.one, self.two = nn.Linear(3, 6), nn.Linear(6, 4), other or nn.Linear(6, 4, bias=False)
        self.two.weight = self.one.weight
        if self.two.bias is None:
            self.one.bias = None

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(x))
        return torch.cat([self.one(hidden), self.two(hidden.square())], 1)


def test_tied_weights_are_fitted_to_both_layers() -> None:
    torch.manual_seed(0)
    model, x = Tied().double().eval().requires_grad_(False), torch.randn(200, 3, dtype=torch.float64)
    traced = masked(model, x)
    report = fxprune.reconstruct(traced, x, damping=0.0)
    assert report.refitted == ["one.weight"]
    assert not report.new_biases  # each layer would have its own
    hidden = torch.tanh(model.first(x))[:, LEFT]
    target = model(x)
    design = torch.cat([hidden, hidden.square()])
    fitted = torch.linalg.lstsq(design, torch.cat([target[:, :4], target[:, 4:]])).solution.T
    torch.testing.assert_close(traced.get_parameter("one.weight").detach()[:, LEFT], fitted)
    assert traced.get_parameter("two.weight") is traced.get_parameter("one.weight")


@pytest.mark.parametrize("same", [True, False])
def test_tied_weights_with_masks_are_fitted_where_these_are_the_same(same: bool) -> None:
    torch.manual_seed(0)
    model, x = Tied().double().eval().requires_grad_(False), torch.randn(200, 3, dtype=torch.float64)
    traced = fxprune.trace(copy.deepcopy(model), x[:2], modes=["eval"])
    mask = (torch.rand(4, 6) > 0.4).double()
    fxprune.prune.custom_from_mask(traced, "one.weight", mask)
    fxprune.prune.custom_from_mask(traced, "two.weight", mask if same else mask.flip(0))
    before = (traced(x) - model(x)).square().sum()
    if same:
        report = fxprune.reconstruct(traced, x)
        assert report.refitted == ["one.weight"]
        assert (traced(x) - model(x)).square().sum() < before
        torch.testing.assert_close(fxprune.finalize(traced)(x), traced(x))
    else:
        with pytest.raises(PruningError, match=r"one\.weight: its weight is used by 2 calls, which are not"):
            fxprune.reconstruct(traced, x)


def test_a_weight_whose_calls_have_biases_of_their_own_is_left_alone() -> None:
    torch.manual_seed(0)
    model, x = Tied(nn.Linear(6, 4)).eval(), torch.randn(100, 3)
    traced = masked(model, x)
    weight = traced.get_parameter("one.weight").clone()
    with pytest.raises(PruningError, match=r"one\.weight: its weight is used by 2 calls, which are not alike"):
        fxprune.reconstruct(traced, x)
    assert torch.equal(traced.get_parameter("one.weight"), weight)


def test_a_layer_of_two_calls_gets_one_bias_that_both_add() -> None:
    torch.manual_seed(0)
    model, x = Levels(bias=False).double().eval(), torch.randn(40, 3, 6, 4, dtype=torch.float64)
    model.first.bias.data[GONE] += 2
    model.requires_grad_(False)
    traced = masked(model, x)
    assert fxprune.reconstruct(traced, x, damping=0.0).new_biases == ("shared.bias",)
    hidden = torch.tanh(model.first(x))
    inputs = [windows(hidden), windows(torch.relu(hidden[:, :, ::2, 1:]))]
    weight, bias = least_squares(inputs, [rows(output) for output in model(x)])
    torch.testing.assert_close(traced.get_parameter("shared.bias").detach(), bias)
    for own, read in zip(traced(x), inputs, strict=True):
        torch.testing.assert_close(rows(own), read @ weight.T + bias)
    final = fxprune.finalize(traced, align=1)
    for own, result in zip(traced(x), final(x), strict=True):
        torch.testing.assert_close(result, own)
    small = fxprune.write_back(final, model)
    torch.testing.assert_close(small(x)[1], traced(x)[1])


class Recurring(nn.Module):
    """One layer of a transformer, used several times, between layers of its own."""

    def __init__(self, times: int = 4) -> None:
        super().__init__()
        self.times, self.into = times, nn.Linear(8, 16)
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.out = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        states = self.into(x)
        for _ in range(self.times):
            states = self.layer(states)
        return self.out(states)


def test_a_layer_of_a_transformer_that_recurs_is_repaired() -> None:
    torch.manual_seed(0)
    model, x = Recurring().eval(), torch.randn(120, 5, 8)
    traced = fxprune.trace(copy.deepcopy(model), x[:2], modes=["eval"])
    fxprune.prune.channels(traced, macs=0.8, round_to=1)
    before = (traced(x) - model(x))[100:].square().sum()
    report = fxprune.reconstruct(traced, x[:100])
    assert {"layer.linear2.weight", "layer.self_attn.out_proj.weight"} <= {*report.refitted}
    assert (traced(x) - model(x))[100:].square().sum() < 0.3 * before
    assert all(repair.after <= repair.before for repair in report.readers.values())
    torch.testing.assert_close(fxprune.finalize(traced)(x), traced(x), rtol=1e-4, atol=1e-5)
    again = fxprune.trace(copy.deepcopy(model), x[:2], modes=["eval"])
    fxprune.prune.channels(again, macs=0.8, round_to=1)
    fxprune.reconstruct(again, [*x[:100].split(7)])
    torch.testing.assert_close(again(x), traced(x), rtol=1e-3, atol=1e-4)


def test_values_that_are_not_finite_are_found_between_two_calls() -> None:
    class Log(Twice):
        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.shared(torch.log(self.shared(torch.tanh(self.first(x))))))

    torch.manual_seed(0)
    model, x = Log().eval(), torch.randn(40, 3)
    traced = masked(model, x)
    before = {name: value.clone() for name, value in traced.state_dict().items()}
    with pytest.raises(PruningError, match="NaN or inf come up in .* at `log`"):
        fxprune.reconstruct(traced, x)
    assert all(torch.equal(value, before[name]) for name, value in traced.state_dict().items())


def test_moments_are_those_of_all_calls() -> None:
    torch.manual_seed(0)
    model, x = Levels().double().eval().requires_grad_(False), torch.randn(10, 3, 6, 4, dtype=torch.float64)
    traced = fxprune.trace(model, x[:2], modes=["eval"])
    graph = traced.graphs["eval"]
    reader = next(each for each in find(traced, graph)[0] if each.name == "shared.weight")
    moments = InputMoments([reader], len(x))
    for piece in Batches(traced, graph, x, None):
        moments.add(graph, traced.get_parameter, piece)
    found = moments.complete()[reader.key]
    hidden = torch.tanh(model.first(x))
    design = torch.cat([
        nn.functional.unfold(each, 3, padding=1).transpose(1, 2).flatten(0, 1)
        for each in (hidden, torch.relu(hidden[:, :, ::2, 1:]))
    ])  # fmt: skip
    torch.testing.assert_close(found.normal_square(centred=False)[0], design.T @ design)


def test_channels_that_a_layer_of_two_calls_reads_are_chosen_by_what_both_lose() -> None:
    """The first call never reads the unit that the second one needs most."""

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.shared = nn.Linear(4, 4, bias=False), nn.Linear(4, 3)

        def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            return self.shared(self.first(x)), self.shared(self.first(y))

    torch.manual_seed(0)
    model = Both().double().eval().requires_grad_(False)
    model.first.weight.copy_(torch.eye(4))
    model.shared.weight.copy_(torch.ones(3, 4))
    x, y = (torch.randn(100, 4, dtype=torch.float64) * torch.tensor(scale) for scale in ([1, 0, 1, 1], [0.1, 9, 0, 0]))
    traced = fxprune.trace(model, (x[:2], y[:2]), modes=["eval"])
    curve = fxprune.sensitivity(traced, [(x, y)], distance="error").curves[0]
    assert curve.order[-1] == 1


def test_masks_on_a_module_of_several_names_fold_under_any_of_them() -> None:
    torch.manual_seed(0)
    shared = nn.Linear(4, 4)
    model, x = nn.Sequential(shared, nn.Tanh(), shared).eval(), torch.randn(3, 4)
    traced = fxprune.trace(model, x, modes=["eval"])
    InsertMask("2.weight", torch.eye(4))(traced)
    expected = traced(x)
    final = fxprune.finalize(traced, shrink=False)
    assert torch.equal(final(x), expected)
    assert final.get_parameter("0.weight") is final.get_parameter("2.weight")


def test_calls_by_one_weight_stay_where_operators_write_into_what_others_read() -> None:
    class Written(Twice):
        def forward(self, x: Tensor) -> Tensor:
            hidden = torch.tanh(self.first(x))
            view = hidden[:, :3]
            given = self.shared(hidden)
            view.mul_(2)
            return self.last(torch.tanh(self.shared(torch.tanh(given + hidden))))

    torch.manual_seed(0)
    model, x = Written().double().eval(), torch.randn(100, 3, dtype=torch.float64)
    traced = masked(model, x)
    before = (traced(x) - model(x)).square().sum()
    report = fxprune.reconstruct(traced, x)
    assert report.refitted == ["last.weight"]
    assert "operators write into what others read" in report.alone["shared.weight"]
    assert (traced(x) - model(x)).square().sum() < before
