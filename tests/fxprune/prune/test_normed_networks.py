"""Networks with norms on their weights, pruned whole: budget, training under masks, removal, ONNX, the user's class."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, spectral_norm, weight_norm
from torch.nn.utils import prune as torch_prune

import fxprune
from fxprune import TracedModule, export, prune
from fxprune.graph.masks import masked_views
from fxprune.graph.names import locate
from fxprune.graph.reparametrizations import computed_names
from tests.masked_norms import SYSTEMS, add_mask
from tests.normed_networks import Discriminator, Vocoder
from tests.systems import assert_same

STEPS = 25
Build = Callable[[], nn.Module]


def _vocoder(norm: Any) -> Build:
    return lambda: Vocoder(norm)


def _discriminator(norm: Any) -> Build:
    return lambda: Discriminator(norm)


def _mels(samples: int, frames: int = 12) -> Tensor:
    return torch.randn(samples, 8, frames)


def _images(samples: int, size: int = 8) -> Tensor:
    return torch.randn(samples, 3, size, size)


_batch, _length = torch.export.Dim("batch", min=1), torch.export.Dim("length", min=8)
VOCODER = (_mels, {"mel": {0: _batch, 2: _length}}, [(1, 9), (3, 12), (2, 31)])
DISCRIMINATOR = (_images, "batch", [(1,), (5,)])
NETWORKS: dict[str, tuple[Build, tuple[Any, Any, Any]]] = {
    "vocoder": (_vocoder(parametrizations.weight_norm), VOCODER),
    "vocoder, legacy": (_vocoder(weight_norm), VOCODER),
    "discriminator": (_discriminator(parametrizations.spectral_norm), DISCRIMINATOR),
    "discriminator, legacy": (_discriminator(spectral_norm), DISCRIMINATOR),
}


def build(make: Build) -> nn.Module:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's on legacy norms
        model = make()
    return model


def mask_eager(model: nn.Module, traced: TracedModule) -> None:
    """Give an eager model the masks of a traced one, by what torch has for them."""
    computed = set(computed_names(traced))
    for found in masked_views(traced):
        assert found.mask is not None
        owner, tensor = locate(model, found.name)
        if found.name in computed:
            add_mask(owner, tensor, found.mask)
        else:
            torch_prune.custom_from_mask(owner, tensor, found.mask)


def train(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """The losses of clipped training steps."""
    # without decay, under which torch's orthogonal maps of matrices that are not square become zero
    optimizer = torch.optim.Adam(model.train().parameters(), lr=2e-3)
    losses = []
    with fxprune.clip_gradients(optimizer, max_norm=0.1) as clip:
        for x, target in batches:
            optimizer.zero_grad()
            loss = (model(x) - target).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
    assert clip.total_norm is not None
    return losses


def difference(got: Tensor, want: Tensor) -> float:
    return float(((got - want).abs().max() / want.abs().max()).detach())


@pytest.mark.parametrize("name", NETWORKS)
def test_normed_network_is_pruned_to_half_trained_shrunk_exported_and_written_back(name: str, tmp_path: Path) -> None:
    make, (sample, shapes, sizes) = NETWORKS[name]
    source, eager = build(make), build(make)
    traced = fxprune.trace(source, sample(2), dynamic_shapes=shapes)
    torch.manual_seed(1)
    inputs = [sample(2) for _ in range(STEPS)]
    batches = [(x, torch.randn(eager(x).shape) / 4) for x in inputs]
    eager.load_state_dict(traced.state_dict())  # the vectors of spectral norms have moved

    report = prune.channels(traced, macs=0.5)
    assert 0.45 < report.macs[1] / report.macs[0] <= 0.5
    mask_eager(eager.eval(), traced)
    for step, (got, want) in enumerate(zip(train(traced, batches), train(eager, batches), strict=True)):
        assert_same(got, want, f"loss {step}")
    x = sample(3)
    traced.eval(), eager.eval()
    assert_same(traced(x), eager(x), "trained")

    fxprune.save(traced, tmp_path / "masked.fxp")
    again = fxprune.load(tmp_path / "masked.fxp").eval()
    assert_same(again(x), traced(x), "loaded")

    final = fxprune.finalize(traced)
    assert final.plan is not None
    assert final.plan.macs == report.macs
    double, small = copy.deepcopy(traced).double(), fxprune.finalize(copy.deepcopy(traced).double())
    for size in sizes:
        wide = sample(*size).double()
        assert difference(small(wide), double(wide)) < 1e-9

    export.to_onnx(final, tmp_path / "small.onnx")
    session = export.Session(tmp_path / "small.onnx")
    written = fxprune.write_back(final, source).eval()
    assert not any(parameter.endswith(("original0", "weight_g", "weight_orig")) for parameter in written.state_dict())
    for size in sizes:
        x = sample(*size)
        want = traced(x)
        assert difference(final(x), want) < 1e-5
        assert difference(torch.as_tensor(next(iter(session.run(x).values()))), want) < 1e-4
        assert difference(written(x), want) < 1e-5


def masks_of(traced: TracedModule) -> dict[str, Tensor]:
    return {found.name: found.mask for found in masked_views(traced) if found.mask is not None}


def assert_same_masks(one: TracedModule, two: TracedModule) -> None:
    mine, others = masks_of(one), masks_of(two)
    for name in mine | others:
        if name in mine and name in others:
            assert_same(mine[name], others[name], name)
        else:  # a choice that was made anew leaves a mask of ones where nothing goes now
            assert bool(((mine | others)[name] == 1).all()), name


@pytest.mark.parametrize("name", ["vocoder", "discriminator, legacy"])
def test_choices_of_a_normed_network_are_those_of_its_folded_twin(name: str) -> None:
    make, (sample, shapes, _) = NETWORKS[name]
    traced = fxprune.trace(build(make).eval(), sample(2), dynamic_shapes=shapes)
    folded = fxprune.finalize(traced)
    names = [group.name for group in fxprune.channel_groups(folded)]
    assert [group.name for group in fxprune.channel_groups(traced)] == names
    loader = [(sample(2), 0.0)]
    for importance in ("l2", "fpgm", "taylor"):
        given = {"loader": loader, "loss": lambda out, _: out.square().mean()} if importance == "taylor" else {}
        modules = [copy.deepcopy(module) for module in (traced, folded)]
        reports = [prune.channels(module, macs=0.6, importance=importance, **given) for module in modules]
        assert reports[0].removed == reports[1].removed
        assert_same_masks(*modules)


def test_a_schedule_of_channels_prunes_more_of_a_normed_network_as_it_trains() -> None:
    make, (sample, shapes, sizes) = NETWORKS["vocoder"]
    traced = fxprune.trace(build(make), sample(2), dynamic_shapes=shapes)
    schedule = fxprune.Schedule(
        traced, None, lambda gone: prune.channels(traced, macs=1 - gone), 0.5, curve="linear", stop=4, every=2
    )
    left = []
    for _ in range(5):
        train(traced, [(x := sample(2), torch.zeros(2, 1, x.shape[2] * 8))])
        schedule.step()
        left.append(schedule.reports[-1].macs[1])
    assert left == sorted(left, reverse=True)
    double = copy.deepcopy(traced).double().eval()
    final = fxprune.finalize(double)
    assert final.plan is not None
    assert final.plan.macs[1] == left[-1] <= 0.5 * final.plan.macs[0]
    for size in sizes:
        x = sample(*size).double()
        assert difference(final(x), double(x)) < 1e-9


def test_a_smaller_budget_ends_where_one_call_does_unless_a_power_iteration_moved() -> None:
    make, (sample, *_) = NETWORKS["discriminator"]
    at_once = fxprune.trace(build(make), sample(2))
    traced = copy.deepcopy(at_once)
    prune.channels(at_once, macs=0.5)
    prune.channels(traced, macs=0.8)
    moved = copy.deepcopy(traced)
    prune.channels(traced, macs=0.5)
    assert_same_masks(traced, at_once)
    moved.train()(sample(2))
    assert moved.decided_by is not None
    before = masks_of(moved)
    prune.channels(moved, macs=0.5)
    after = masks_of(moved)
    assert all(bool((after[name] <= mask).all()) for name, mask in before.items())  # what was gone stays gone


@pytest.mark.parametrize(
    ("norm", "reason"),
    [
        (parametrizations.weight_norm, "it computes what the reference does"),
        (spectral_norm, "its weight is computed, and not every fit can be computed so"),
    ],
)
def test_repair_refits_what_it_can_in_networks_with_masked_normed_layers(norm: Any, reason: str) -> None:
    def make() -> nn.Module:
        first, second = norm(nn.Linear(8, 16)), norm(nn.Linear(16, 16))
        return nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.Linear(16, 4))

    model = build(make).eval()
    batches = [torch.randn(64, 8) for _ in range(4)]
    want = model(batches[0]).detach()
    traced = fxprune.trace(model, batches[0])
    prune.channels(traced, amount=0.5)
    before = difference(traced(batches[0]), want)
    by_model = copy.deepcopy(traced)
    report = fxprune.reconstruct(traced, batches)
    assert difference(traced(batches[0]), want) < 0.8 * before
    assert set(report.alone.values()) == {reason}
    fxprune.reconstruct(by_model, batches, reference=build(make).eval())
    torch.testing.assert_close(by_model(batches[0]), traced(batches[0]))


@pytest.mark.parametrize("system", ["orthogonal", "without inverse", "legacy weight norm", "spectral norm"])
def test_channels_of_convolutions_under_any_system_go_exactly(system: str) -> None:
    norm = SYSTEMS[system]

    def make() -> nn.Module:
        layers = [nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1, groups=4), nn.Linear(16, 4)]
        for layer in layers:
            norm(layer, "weight")
        first, second, head = layers
        pool = nn.AdaptiveAvgPool2d(1), nn.Flatten()
        return nn.Sequential(first, nn.BatchNorm2d(16), nn.ReLU(), second, nn.ReLU(), *pool, head).double()

    model = build(make)
    x = _images(4).double()
    traced = fxprune.trace(model, x)
    report = prune.channels(traced, macs=0.5)
    train(traced, [(_images(4).double(), torch.randn(4, 4).double()) for _ in range(5)])
    final = fxprune.finalize(traced.eval(), keep_for_training=True)
    assert final.plan is not None
    assert final.plan.macs == report.macs
    assert report.macs[1] <= 0.5 * report.macs[0]
    for samples in (1, 5):
        x = _images(samples).double()
        assert difference(final(x), traced(x)) < 1e-9
    assert type(fxprune.write_back(final, model)[0]) is nn.Conv2d


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_normed_layers_in_half_precision_lose_channels(dtype: torch.dtype) -> None:
    def make() -> nn.Module:
        first = parametrizations.weight_norm(nn.Linear(16, 64))
        second = parametrizations.spectral_norm(nn.Linear(64, 64))
        return nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.Linear(64, 8)).to(dtype)

    x = torch.randn(4, 16).to(dtype)
    traced = fxprune.trace(build(make).eval(), x)
    report = prune.channels(traced, macs=0.5)
    assert {mask.dtype for mask in masks_of(traced).values()} == {dtype}
    final = fxprune.finalize(traced)
    assert final.plan is not None
    assert final.plan.macs == report.macs
    assert difference(final(x), traced(x)) < 4 * torch.finfo(dtype).eps


class Tagger(nn.Module):
    """Words, a recurrent layer both ways and a head, every weight of which a norm computes."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.words, self.layer = nn.Embedding(20, 16), nn.LSTM(16, 24, bidirectional=True, batch_first=True)
        for name in [name for name, _ in self.layer.named_parameters() if name.startswith("weight")]:
            norm(self.layer, name)
        self.head = norm(nn.Linear(48, 5))

    def forward(self, words: Tensor) -> Tensor:
        return self.head(self.layer(self.words(words))[0])


@pytest.mark.parametrize("norm", [parametrizations.weight_norm, weight_norm])
def test_hidden_units_of_normed_recurrent_layers_go_exactly(norm: Any) -> None:
    model = build(lambda: Tagger(norm)).double()
    traced = fxprune.trace(model, torch.randint(20, (3, 7)))
    report = prune.channels(traced, macs=0.5)
    assert report.removed["layer.weight_ih_l0 (channel)"][0]
    train(traced, [(torch.randint(20, (3, 7)), torch.randn(3, 7, 5).double()) for _ in range(5)])
    final = fxprune.finalize(traced.eval())
    assert final.plan is not None
    assert final.plan.macs == report.macs
    words = torch.randint(20, (2, 7))
    written = fxprune.write_back(final, model).eval()
    for module in (final, written):
        assert difference(module(words), traced(words)) < 1e-9
    assert written.layer.hidden_size < 24
