"""`reconstruct` against dense algebra: every kind of reader and of mask, streams, order, and what is held back."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

import fxprune
from fxprune.errors import ArgumentError, PruningError
from tests.repairs import HELD, READERS, SAMPLES, Chain, chain, dense_fit, masked, mlp


@pytest.mark.parametrize("kind", READERS)
def test_the_refit_of_every_kind_of_reader_is_that_of_dense_algebra(kind: str) -> None:
    torch.manual_seed(0)
    build, space = READERS[kind]
    model, x = chain(build(), space, 6)
    model.requires_grad_(False)
    traced = masked(model, x, rows=() if kind == "depthwise" else (1, 4))
    live = torch.ones_like(model.reader.weight, dtype=torch.bool)
    hidden = torch.tanh(model.first(x))
    if kind == "depthwise":  # what a channel loses no other one makes up for: mask taps
        live[:, :, 1, 1] = False
        fxprune.prune.custom_from_mask(traced, "reader.weight", live)
    else:
        hidden[:, [1, 4]] = 0
        live = live.unflatten(0, (getattr(model.reader, "groups", 1), -1))
        by_input = live if "transposed" in kind or kind == "addmm" else live.transpose(1, 2)
        for channel in (1, 4):
            by_input[channel // by_input.shape[1], channel % by_input.shape[1]] = False
        live = live.flatten(0, 1)
    target = model(x)
    expected = dense_fit(model.reader, hidden, target, live)
    judged = dense_fit(model.reader, hidden[~HELD], target[~HELD], live)
    before = (traced(x) - target)[HELD].square().sum()
    repair = fxprune.reconstruct(traced, x, damping=0.0, new_biases=False).readers["reader.weight"]
    assert repair.damping == 0
    for name, tensor in expected.items():
        stored = f"reader.{name}{'_orig' if kind == 'depthwise' else ''}"
        torch.testing.assert_close(traced.get_parameter(stored), tensor, rtol=1e-7, atol=1e-9)
    energy = target[HELD].square().sum()
    assert repair.before == pytest.approx(float(before / energy))
    judged["weight"] = judged["weight"] * live
    after = functional_call(model.reader, judged, hidden[HELD]) - target[HELD]
    assert repair.after == pytest.approx(float(after.square().sum() / energy))
    assert repair.after < repair.before


NORMS: dict[str, Callable[[], nn.Module]] = {
    "layer": lambda: nn.LayerNorm(6),
    "root mean square": lambda: nn.RMSNorm(6),
    "batch": lambda: nn.BatchNorm1d(6),
    "group": lambda: nn.GroupNorm(2, 6),
}


@pytest.mark.parametrize("kind", NORMS)
def test_gains_and_shifts_of_normalizations_are_refitted(kind: str) -> None:
    torch.manual_seed(0)
    model, x = chain(NORMS[kind](), (), 6)
    for tensor in [*model.reader.parameters(), *model.reader.buffers()]:
        if tensor.is_floating_point():
            tensor.detach().uniform_(0.5, 2)
    model.requires_grad_(False)
    traced = masked(model, x)
    hidden = torch.tanh(model.first(x))
    hidden[:, [1, 4]] = 0
    bare = {
        name: torch.ones_like(each) if name == "weight" else 0 * each for name, each in model.reader.named_parameters()
    }
    normalized, target = functional_call(model.reader, bare, hidden), model(x)
    before = (traced(x) - target).square().sum()
    report = fxprune.reconstruct(traced, x, damping=0.0)
    assert (traced(x) - target).square().sum() < before
    assert "reader.weight" in report.refitted
    for channel in (0, 2, 3, 5):
        columns = [normalized[:, channel], torch.ones(len(x), dtype=torch.float64)][: len(bare)]
        fitted = torch.linalg.lstsq(torch.stack(columns, 1), target[:, channel, None]).solution[:, 0]
        found = [traced.get_parameter(f"reader.{name}")[channel] for name in bare]
        torch.testing.assert_close(torch.stack(found).detach(), fitted)


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_the_input_weights_of_recurrent_layers_are_refitted_for_all_gates_and_directions(kind: str) -> None:
    torch.manual_seed(0)

    class Steps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.reader = nn.Linear(3, 6), getattr(nn, kind)(6, 2, bidirectional=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.reader(torch.tanh(self.first(x)).transpose(0, 1))[0]

    model, x = Steps().double().eval(), torch.randn(SAMPLES, 4, 3, dtype=torch.float64)
    traced = masked(model, x)
    report = fxprune.reconstruct(traced, x, damping=0.0)
    assert report.refitted == ["reader.weight_ih_l0"]
    with torch.no_grad():
        hidden = torch.tanh(model.first(x)).flatten(0, 1)
        now = hidden[:, [0, 2, 3, 5]]
        design = torch.cat([now, torch.ones(len(now), 1)], 1)
        for end in ("", "_reverse"):
            weight, bias = (getattr(model.reader, f"{name}_ih_l0{end}") for name in ("weight", "bias"))
            fitted = torch.linalg.lstsq(design, hidden @ weight.T + bias).solution.T
            found = traced.get_parameter(f"reader.weight_ih_l0{end}")
            torch.testing.assert_close(found[:, [0, 2, 3, 5]], fitted[:, :-1])
            torch.testing.assert_close(found[:, [1, 4]], weight[:, [1, 4]])
            torch.testing.assert_close(traced.get_parameter(f"reader.bias_ih_l0{end}").detach(), fitted[:, -1])


def test_damping_is_relative_to_the_mean_of_the_diagonal_and_towards_the_weights_that_were_there() -> None:
    model, x = mlp()
    traced = masked(model, x)
    fxprune.reconstruct(traced, x, damping=0.05)
    with torch.no_grad():
        dense = torch.tanh(model.first(x))
        now = dense[:, [0, 2, 3, 5]]
        weight = model.reader.weight[:, [0, 2, 3, 5]]
        centred, lack = now - now.mean(0), dense[:, [1, 4]] @ model.reader.weight[:, [1, 4]].T
        square = centred.T @ centred
        damped = square + 0.05 * square.diagonal().mean() * torch.eye(4)
        expected = weight + torch.linalg.solve(damped, centred.T @ (lack - lack.mean(0))).T
    torch.testing.assert_close(traced.get_parameter("reader.weight")[:, [0, 2, 3, 5]], expected)


def test_each_output_has_the_support_of_its_own_mask_and_masked_entries_stay() -> None:
    model, x = mlp()
    traced = fxprune.trace(copy.deepcopy(model), (x[:2],), modes=("eval",))
    fxprune.prune.random_unstructured(traced, "reader.weight", 0.4)
    fxprune.prune.random_unstructured(traced, "reader.bias", 1)
    live, biased = (traced.get_buffer(f"reader.{name}_mask").bool() for name in ("weight", "bias"))
    fxprune.reconstruct(traced, x, damping=0.0)
    found = traced.get_parameter("reader.weight_orig").detach()
    assert torch.equal(found[~live], model.reader.weight[~live])
    with torch.no_grad():
        hidden = torch.tanh(model.first(x))
        for row in range(4):
            constant = torch.ones(len(hidden), int(biased[row]), dtype=torch.float64)
            target = hidden @ model.reader.weight[row] + model.reader.bias[row]
            design = torch.cat([hidden[:, live[row]], constant], 1)
            fitted = torch.linalg.lstsq(design, target[:, None]).solution[:, 0]
            torch.testing.assert_close(found[row, live[row]], fitted[: int(live[row].sum())])
    final = fxprune.finalize(traced)
    torch.testing.assert_close(final(x), traced(x))


@pytest.mark.parametrize("how", ["nm", "block", "channels"])
def test_masks_of_all_kinds_are_repaired_and_stay_as_they_are(how: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 2)).double().eval()
    x = torch.randn(SAMPLES, 3, dtype=torch.float64)
    traced = fxprune.trace(model, (x[:2],), modes=("eval",))
    target = traced(x).detach()
    if how == "nm":
        fxprune.prune.nm_structured(traced, "2.weight", 2, 4)
    elif how == "block":
        fxprune.prune.block_structured(traced, "2.weight", 0.5, (4, 2))
    else:
        fxprune.prune.channels(traced, 0.5, round_to=1)
    masks = {name: buffer.clone() for name, buffer in traced.named_buffers()}
    before = (traced(x) - target).square().mean()
    report = fxprune.reconstruct(traced, x)
    assert (traced(x) - target).square().mean() < 0.3 * before
    assert report.refitted
    assert all(torch.equal(buffer, masks[name]) for name, buffer in traced.named_buffers())
    torch.testing.assert_close(fxprune.finalize(traced)(x), traced(x))


class Block(nn.Module):
    """A convolution, a batch norm, and an addition in place."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        stream = torch.tanh(self.first(x))
        y = self.norm(self.inner(stream))
        y += stream
        return functional.relu_(y)


def block() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = Block().double().eval()
    for name, tensor in model.norm.state_dict().items():
        if name != "num_batches_tracked":
            tensor.uniform_(0.5, 2)
    return model, torch.randn(SAMPLES, 3, 4, 4, dtype=torch.float64)


def test_the_target_includes_what_the_stream_is_missing_and_a_batch_norm_takes_the_mean_shift() -> None:
    model, x = block()
    traced = masked(model, x)
    report = fxprune.reconstruct(traced, x, damping=0.0)
    assert report.readers["inner.weight"].corrects_stream
    with torch.no_grad():
        dense = torch.tanh(model.first(x))
        now = dense.clone()
        now[:, [1, 4]] = 0
        scale = model.norm.weight / (model.norm.running_var + model.norm.eps).sqrt()
        lack = model.inner(dense - now) + (dense - now) / scale.view(-1, 1, 1)
        columns = functional.unfold(now, 3, padding=1).transpose(1, 2).flatten(0, 1)
        kept = columns.abs().sum(0) > 0
        design = torch.cat([columns[:, kept], torch.ones(len(columns), 1)], 1)
        fitted = torch.linalg.lstsq(design, lack.permute(0, 2, 3, 1).flatten(0, 2)).solution.T
        change = traced.get_parameter("inner.weight").flatten(1) - model.inner.weight.flatten(1)
        mean = traced.get_buffer("norm.running_mean") - model.norm.running_mean
    torch.testing.assert_close(change[:, kept], fitted[:, :-1], rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(mean, -fitted[:, -1], rtol=1e-6, atol=1e-9)


def test_the_reference_stays_what_it_was_while_running_means_change() -> None:
    torch.manual_seed(0)
    blocks = [Block() for _ in range(2)]
    blocks[1].first = nn.Conv2d(6, 6, 1)
    model = nn.Sequential(*blocks, nn.Conv2d(6, 4, 2)).double().eval().requires_grad_(False)
    x = torch.randn(SAMPLES, 3, 4, 4, dtype=torch.float64)
    traced = fxprune.trace(copy.deepcopy(model), (x[:2],), modes=("eval",))
    fxprune.prune.l1_unstructured(traced, "0.*.weight", 0.3)
    report = fxprune.reconstruct(traced, x)
    lack, energy = ((each[HELD].square().sum()) for each in (traced(x) - model(x), model(x)))
    # the report is of the fit before the samples that judged it were fitted too
    assert 1 <= report.readers["2.weight"].after / float(lack / energy) < 1.2


def test_a_reader_whose_fit_does_not_help_on_samples_held_back_keeps_its_weights() -> None:
    torch.manual_seed(0)
    model = Chain(nn.Linear(60, 60), nn.Linear(60, 3)).double().eval()
    nn.init.eye_(model.first.weight)  # inputs of the reader say nothing of each other, and there are few
    x = torch.randn(SAMPLES, 60, dtype=torch.float64)
    traced = masked(model, x, rows=(0,))
    report = fxprune.reconstruct(traced, x, damping=1e-9)
    repair = report.readers["reader.weight"]
    assert repair.damping is None
    assert repair.after == repair.before > 0
    assert "fewer rows than unknowns" in repair.note
    assert torch.equal(traced.get_parameter("reader.weight"), model.reader.weight)
    assert torch.equal(traced.get_parameter("reader.bias"), model.reader.bias)
    chosen = fxprune.reconstruct(traced, x, damping=[1e-9, 10.0]).readers["reader.weight"]
    assert chosen.damping == 10
    assert chosen.after < chosen.before


def test_readers_read_what_the_refitted_ones_before_them_give() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2)).double().eval()
    x = torch.randn(SAMPLES, 3, dtype=torch.float64)
    traced = fxprune.trace(copy.deepcopy(model), (x[:2],), modes=("eval",))
    mask = torch.ones(8, 3)
    mask[:3] = 0
    fxprune.prune.custom_from_mask(traced, "0.weight", mask)
    fxprune.reconstruct(traced, x, damping=0.0)
    with torch.no_grad():
        now = traced.get_parameter("2.weight") @ torch.tanh(
            (model[0].weight * mask) @ x.T + model[0].bias[:, None]
        ) + traced.get_parameter("2.bias")[:, None]  # fmt: skip
        design = torch.cat([torch.tanh(now).T, torch.ones(len(x), 1)], 1)
        fitted = torch.linalg.lstsq(design, model(x)).solution.T
    torch.testing.assert_close(traced.get_parameter("4.weight").detach(), fitted[:, :-1], rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(traced.get_parameter("4.bias").detach(), fitted[:, -1], rtol=1e-5, atol=1e-8)


def test_a_reader_of_too_many_inputs_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxprune.prune.repair.input_moments.MOST_COLUMNS", 5)
    model, x = mlp()
    with pytest.raises(PruningError, match=r"reader\.weight: 6 inputs of an output, more than 5"):
        fxprune.reconstruct(masked(model, x), x)


def generated(*inputs: Any) -> Iterator[Any]:
    yield from inputs


def test_results_depend_neither_on_how_samples_are_batched_nor_on_the_mode_nor_on_the_run() -> None:
    model, x = mlp()
    state = torch.random.get_rng_state()
    found = []
    for batches in (x, [x[:7], x[7:8], x[8:]], generated(*x.split(3)), [(each,) for each in x.split(13)], {"x": x}):
        traced = masked(model, x)
        fxprune.reconstruct(traced, batches)
        found.append(traced.get_parameter("reader.weight"))
    both = fxprune.trace(copy.deepcopy(model), (x[:2],))
    for name in ("first.weight", "first.bias"):
        mask = torch.ones_like(both.get_parameter(name))
        mask[[1, 4]] = 0
        fxprune.prune.custom_from_mask(both, name, mask)
    fxprune.reconstruct(both.train(), x)
    assert both.training
    for other in (*found[1:], both.get_parameter("reader.weight")):
        torch.testing.assert_close(other, found[0])
    assert torch.equal(state, torch.random.get_rng_state())


def test_of_many_positions_the_same_share_is_taken_of_every_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = block()
    monkeypatch.setattr("fxprune.prune.repair.rows._LEAST_POSITIONS", 64)
    monkeypatch.setattr("fxprune.prune.repair.rows._MOST_POSITIONS", 1)
    found = []
    for batches in (x, [*x.split(7)]):
        traced = masked(model, x)
        repair = fxprune.reconstruct(traced, batches).readers["inner.weight"]
        assert (repair.rows, repair.held) == (64, 16)  # 2 of the 16 positions of 32 and of 8 samples
        assert repair.after < repair.before
        found.append(traced.get_parameter("inner.weight"))
    torch.testing.assert_close(*found)


def test_single_precision_keeps_its_digits_where_inputs_are_far_from_zero() -> None:
    torch.manual_seed(0)
    model = Chain(nn.Linear(3, 6), nn.Linear(6, 4)).double().eval()
    x = torch.randn(200, 3, dtype=torch.float64)

    class Far(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.reader = copy.deepcopy(model.first), copy.deepcopy(model.reader)

        def forward(self, x: Tensor) -> Tensor:
            return self.reader(torch.tanh(self.first(x)) + 100)

    lacks = []
    for dtype in (torch.float64, torch.float32):
        network, inputs = Far().to(dtype).eval(), x.to(dtype)
        traced = masked(network, inputs)
        fxprune.reconstruct(traced, inputs, damping=1e-5)
        lacks.append((traced(inputs) - network(inputs)).double().square().mean().item())
    assert lacks[1] == pytest.approx(lacks[0], rel=1e-3)


def test_values_that_do_not_fit_in_memory_lie_on_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = block()
    in_memory, on_disk = masked(model, x), masked(model, x)
    fxprune.reconstruct(in_memory, [*x.split(10)])
    monkeypatch.setattr("fxprune.prune.repair.shelf.MOST_BYTES", 0)
    fxprune.reconstruct(on_disk, [*x.split(10)])
    for name, tensor in in_memory.state_dict().items():
        assert torch.equal(tensor, on_disk.state_dict()[name])


class Written(nn.Module):
    """In-place operators whose results others see, or the same without them."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.in_place = in_place
        self.first, self.inner, self.last = nn.Linear(3, 6), nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(x))
        seen = hidden.view(-1, 3, 2)
        if self.in_place:
            hidden.mul_(2)
            y = self.inner(hidden)
            seen.add_(1)
        else:
            hidden = hidden * 2
            y = self.inner(hidden)
            hidden = hidden + 1
        return self.last(torch.tanh(y + hidden))


def test_operators_that_write_into_what_others_read_run_in_their_order() -> None:
    torch.manual_seed(0)
    plain = Written(in_place=False).double().eval()
    in_place = Written(in_place=True).double().eval()
    in_place.load_state_dict(plain.state_dict())
    x = torch.randn(SAMPLES, 3, dtype=torch.float64)
    first, second = (masked(model, x) for model in (plain, in_place))
    reports = [fxprune.reconstruct(traced, x, damping=1e-3) for traced in (first, second)]
    assert reports[0].refitted == ["inner.weight", "last.weight"]
    for name, tensor in first.state_dict().items():
        torch.testing.assert_close(tensor, second.state_dict()[name])
    torch.testing.assert_close(*(report.readers["inner.weight"].before for report in reports))


def test_a_batch_of_fixed_size_is_held_back_as_a_whole() -> None:
    model, x = mlp()
    free, fixed = masked(model, x), fxprune.trace(copy.deepcopy(model), (x[:8],), dynamic_shapes=None, modes=("eval",))
    for name in ("first.weight", "first.bias"):
        fxprune.prune.custom_from_mask(fixed, name, free.get_buffer(f"{name}_mask"))
    report = fxprune.reconstruct(fixed, [*x.split(8)], damping=0.0)
    assert report.samples == (4, 1)
    assert (report.readers["reader.weight"].rows, report.readers["reader.weight"].held) == (32, 8)
    with pytest.raises(ArgumentError, match="1 batches of the captured size; at least 2"):
        fxprune.reconstruct(fixed, x[:8], reference=model)
