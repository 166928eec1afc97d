"""Budgets of channels land: what was asked for is what the finalized module has, at once, in steps, by a schedule."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxprune
from fxprune.errors import PruningError
from tests.budget_networks import FAMILIES, network
from tests.random_networks import network as random_network

SHARES = [0.9, 0.7, 0.5, 0.3]
EVERY = [(family, width) for family in FAMILIES for width in (16, 64, 128)]
WIDE = [("cnn", 512), ("cnn", 1024), ("single", 2048), ("transformer", 512), ("depthwise", 256)]


def _traced(family: str, width: int) -> fxprune.TracedModule:
    model, inputs = network(family, width)
    return fxprune.trace(model, inputs, modes=("eval",), dynamic_shapes=None)


def _masks(traced: fxprune.TracedModule) -> dict[str, torch.Tensor]:
    return {name: value for name, value in traced.named_buffers() if name.endswith("_mask")}


def _check(traced: fxprune.TracedModule, report: Any, budget: str, share: float, unit: int) -> None:
    """The report is the finalized module's, and the budget is kept and used up to 2 %, or to a unit."""
    plan = fxprune.finalize(traced).plan
    assert plan is not None
    assert (plan.macs, plan.parameters) == (report.macs, report.parameters)
    before, after = getattr(report, budget)
    assert after <= share * before
    assert after >= 0.98 * share * before or after + unit > share * before


def _reached(traced: fxprune.TracedModule, budget: str, share: float, round_to: Any) -> Any:
    """The report, None where the network cannot be cut so far, which the error says with the best that it can."""
    try:
        return fxprune.prune.channels(traced, round_to=round_to, **{budget: share})
    except PruningError:
        return None


def _units(traced: fxprune.TracedModule, budget: str) -> list[int]:
    return [getattr(group, budget) for group in fxprune.channel_groups(traced) if group.reason is None]


def _smallest_group(traced: fxprune.TracedModule) -> int:
    return min(group.size for group in fxprune.channel_groups(traced) if group.reason is None)


def _in_every_way(dense: fxprune.TracedModule, budget: str, share: float, round_to: Any) -> None:
    """At once, in five steps, and again after training."""
    if isinstance(round_to, int) and round_to > _smallest_group(dense):
        return
    once, steps, unit = copy.deepcopy(dense), copy.deepcopy(dense), max(_units(dense, budget))
    if (report := _reached(once, budget, share, round_to)) is None:
        return
    _check(once, report, budget, share, unit)
    for step in [1 - (1 - share) * part for part in (0.13, 0.31, 0.5, 0.77)] + [share]:
        stepped = fxprune.prune.channels(steps, round_to=round_to, **{budget: step})
    assert stepped.removed == report.removed
    assert (stepped.macs, stepped.parameters) == (report.macs, report.parameters)
    found = _masks(steps)
    assert all(torch.equal(mask, found[name]) for name, mask in _masks(once).items())


@pytest.mark.parametrize(
    ("family", "budget"),
    [*((family, "macs") for family in FAMILIES), ("cnn", "parameters"), ("transformer", "parameters")],
)
def test_a_budget_lands_at_once_and_in_steps(family: str, budget: str) -> None:
    _in_every_way(_traced(family, 32), budget, 0.5, "auto")


@pytest.mark.slow
@pytest.mark.parametrize("round_to", ["auto", 1, 8, 16])
@pytest.mark.parametrize("budget", ["macs", "parameters"])
@pytest.mark.parametrize(("family", "width"), EVERY + WIDE)
def test_every_budget_lands_in_every_rounding(family: str, width: int, budget: str, round_to: Any) -> None:
    dense = _traced(family, width)
    for share in SHARES:
        _in_every_way(dense, budget, share, round_to)


@pytest.mark.parametrize(("family", "round_to"), [("cnn", "auto"), ("branches", 1)])
@pytest.mark.parametrize("amount", [0.3, 0.5, 0.75, 7])
def test_an_amount_is_masked_to_the_unit(family: str, amount: float, round_to: Any) -> None:
    traced = _traced(family, 16)
    report = fxprune.prune.channels(traced, amount, round_to=round_to)
    gone, size = map(sum, zip(*report.removed.values(), strict=True))
    assert gone == (int(amount * size) if isinstance(amount, float) else amount)
    assert report.gone == gone / size
    plan = fxprune.finalize(traced).plan
    assert plan is not None
    assert (plan.macs, plan.parameters) == (report.macs, report.parameters)


def _train(traced: fxprune.TracedModule, inputs: torch.Tensor, steps: int) -> None:
    optimizer = torch.optim.SGD(traced.parameters(), lr=0.01, momentum=0.9, weight_decay=0.01)
    traced.train()
    for _ in range(steps):
        optimizer.zero_grad()
        traced(inputs).square().mean().backward()
        optimizer.step()
    traced.eval()


@pytest.mark.parametrize(
    ("family", "budget"),
    [("cnn", "macs"), ("depthwise", "parameters"), pytest.param("transformer", "macs", marks=pytest.mark.slow)],
)
def test_a_budget_lands_again_after_training(family: str, budget: str) -> None:
    model, inputs = network(family, 32)
    traced = fxprune.trace(model, inputs, dynamic_shapes=None)
    unit = max(_units(traced, budget))
    for share in (0.8, 0.5):
        report = fxprune.prune.channels(traced, **{budget: share})
        _train(traced, inputs, 10)
        _check(traced, report, budget, share, unit)
    again = fxprune.prune.channels(traced, **{budget: 0.5})
    assert again.removed == report.removed


@pytest.mark.parametrize(("budget", "share"), [("macs", 0.7), ("parameters", 0.7)])
def test_large_steps_of_one_group_are_exchanged_for_small_ones_of_another(budget: str, share: float) -> None:
    torch.manual_seed(0)
    first = nn.Linear(10, 256), nn.ReLU(), nn.Unflatten(1, (16, 4, 4)), nn.ConvTranspose2d(16, 32, 4, 2, 1), nn.ReLU()
    grouped = nn.ConvTranspose2d(32, 16, 4, 2, 1, groups=2), nn.ReLU(), nn.Conv2d(16, 3, 3, padding=1)
    model = nn.Sequential(*first, *grouped).eval()
    traced = fxprune.trace(model, torch.randn(2, 10), modes=("eval",), dynamic_shapes=None)
    report = fxprune.prune.channels(traced, round_to=8 if budget == "macs" else 1, **{budget: share})
    before, after = getattr(report, budget)
    assert 0.98 * share <= after / before <= share


@pytest.mark.parametrize(("share", "round_to"), [(0.9, 1), (0.5, 8)])
def test_several_large_steps_are_exchanged_where_one_leaves_too_little(share: float, round_to: int) -> None:
    torch.manual_seed(0)
    grouped = nn.Conv3d(16, 32, 3, padding=1, groups=2), nn.BatchNorm3d(32), nn.ReLU(), nn.MaxPool3d(2)
    last = nn.Conv3d(32, 32, (1, 3, 3)), nn.ReLU(), nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(32, 4)
    model = nn.Sequential(nn.Conv3d(1, 16, 3, padding=1), nn.BatchNorm3d(16), nn.ReLU(), *grouped, *last).eval()
    traced = fxprune.trace(model, torch.randn(2, 1, 8, 8, 8), modes=("eval",), dynamic_shapes=None)
    _check(traced, fxprune.prune.channels(traced, macs=share, round_to=round_to), "macs", share, unit=0)


@pytest.mark.parametrize(
    ("widths", "budget", "value"),
    [((16, 64), "macs", 0.7), ((48, 16), "parameters", 0.5), ((16, 16, 32), "macs", 0.9), ((16, 48), "amount", 9)],
)
def test_convolutions_stay_in_their_layout_where_another_choice_lands(
    widths: tuple[int, ...], budget: str, value: float
) -> None:
    torch.manual_seed(0)
    layers = [(nn.Conv2d(inputs, outputs, 3), nn.ReLU()) for inputs, outputs in zip((3, *widths), widths, strict=False)]
    model = nn.Sequential(*(module for layer in layers for module in layer), nn.Conv2d(widths[-1], 4, 1)).eval()
    traced = fxprune.trace(model, torch.randn(2, 3, 9, 9), modes=("eval",), dynamic_shapes=None)
    report = fxprune.prune.channels(traced, **{budget: value})
    left = [size - masked for masked, size in report.removed.values()]
    assert all(count <= 16 or count % 4 == 0 for count in left)
    if budget == "amount":
        assert sum(left) == sum(widths) - value
    else:
        _check(traced, report, budget, value, unit=0)


@pytest.mark.parametrize("amount", [8, 16])
def test_channels_of_a_grouped_convolution_stay_in_their_layout_where_another_choice_lands(amount: int) -> None:
    torch.manual_seed(0)
    grouped = nn.Conv2d(16, 32, 3, padding=1, groups=2), nn.ReLU()
    model = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), *grouped, nn.Conv2d(32, 4, 3)).eval()
    traced = fxprune.trace(model, torch.randn(2, 3, 9, 9), modes=("eval",), dynamic_shapes=None)
    report = fxprune.prune.channels(traced, amount)
    left = [size - masked for masked, size in report.removed.values()]
    assert sum(left) == 48 - amount
    assert all(count <= 16 or count % 4 == 0 for count in left)


@pytest.mark.parametrize("share", [0.5, pytest.param(0.3, marks=pytest.mark.slow)])
def test_stages_that_go_together_lose_few_channels_at_a_time(pytorchcv_model: Any, share: float) -> None:
    model = pytorchcv_model("shufflenet_g2_w1").eval()  # a quarter of the channels, where cells lose equal fractions
    traced = fxprune.trace(model, torch.randn(1, 3, 224, 224), modes=("eval",), dynamic_shapes=None)
    _check(traced, fxprune.prune.channels(traced, parameters=share), "parameters", share, unit=0)


@pytest.mark.parametrize(("width", "share"), [(16, 0.3), (64, 0.5)])
def test_grouped_convolutions_stay_in_their_layout_where_three_groups_can_be_cut(width: int, share: float) -> None:
    torch.manual_seed(0)
    grouped = nn.Conv3d(width, 2 * width, 3, padding=1, groups=2), nn.BatchNorm3d(2 * width), nn.ReLU()
    last = nn.Conv3d(2 * width, 2 * width, (1, 3, 3)), nn.ReLU(), nn.AdaptiveAvgPool3d(1), nn.Flatten()
    first = nn.Conv3d(1, width, 3, padding=1), nn.BatchNorm3d(width), nn.ReLU()
    model = nn.Sequential(*first, *grouped, nn.MaxPool3d(2), *last, nn.Linear(2 * width, 4)).eval()
    generator = torch.Generator().manual_seed(0)
    for norm in (model[1], model[4]):
        torch.randn(2, len(norm.weight), generator=generator)
        nn.init.uniform_(norm.weight, 0.5, 1.5, generator=generator)
    traced = fxprune.trace(model, torch.randn(2, 1, 6, 8, 8), modes=("eval",), dynamic_shapes=None)
    report = fxprune.prune.channels(traced, macs=share)
    _check(traced, report, "macs", share, unit=0)
    first_left, second_left, _ = (size - masked for masked, size in report.removed.values())
    assert all(count <= 16 or count % 4 == 0 for count in (first_left, second_left))


def test_the_first_to_be_given_back_is_what_stands_in_for_the_last_stair() -> None:
    torch.manual_seed(0)
    first = nn.Linear(10, 256), nn.ReLU(), nn.Unflatten(1, (16, 4, 4)), nn.ConvTranspose2d(16, 32, 4, 2, 1)
    grouped = nn.BatchNorm2d(32), nn.ReLU(), nn.ConvTranspose2d(32, 16, 4, 2, 1, groups=2), nn.ReLU()
    model = nn.Sequential(*first, *grouped, nn.Conv2d(16, 3, 3, padding=1)).eval()
    traced = fxprune.trace(model, torch.randn(2, 10), modes=("eval",), dynamic_shapes=None)
    scores = {"0.weight": 1.2, "3.weight": 1.0, "6.weight": 2.0}

    def by_group(group: fxprune.ChannelGroup) -> torch.Tensor:
        return torch.full((group.size,), scores[group.name])

    report = fxprune.prune.channels(traced, macs=0.9, round_to=8, importance=by_group)
    _check(traced, report, "macs", 0.9, unit=0)


def _mask_entries(traced: fxprune.TracedModule) -> int:
    return sum(int((mask == 0).sum()) for mask in _masks(traced).values())


def test_budgets_of_two_kinds_hold_together() -> None:
    traced = _traced("cnn", 32)
    fxprune.prune.channels(traced, macs=0.4)
    before = {name: mask.clone() for name, mask in _masks(traced).items()}
    report = fxprune.prune.channels(traced, parameters=0.35)
    assert report.parameters[1] <= 0.35 * report.parameters[0]
    assert report.macs[1] <= 0.4 * report.macs[0]
    assert all((mask <= before[name]).all() for name, mask in _masks(traced).items() if name in before)


def test_a_larger_budget_brings_nothing_back() -> None:
    traced = _traced("cnn", 32)
    fxprune.prune.channels(traced, macs=0.4)
    before = _mask_entries(traced)
    report = fxprune.prune.channels(traced, macs=0.8)
    assert _mask_entries(traced) == before
    assert report.macs[1] <= 0.4 * report.macs[0]


def test_groups_that_were_cut_before_stay_cut_when_others_are() -> None:
    traced = _traced("cnn", 32)
    first = fxprune.prune.channels(traced, 0.25, targets="0*")
    second = fxprune.prune.channels(traced, 0.25, targets="1*")
    assert first.removed.keys().isdisjoint(second.removed)
    assert fxprune.finalize(traced).get_parameter("0.0.weight").shape[0] == 24


def _flip_in_data(traced: fxprune.TracedModule, name: str) -> None:
    weight = traced.get_parameter(name)
    weight.data.copy_(weight.detach().flip(0))


def _flip_by_a_state(traced: fxprune.TracedModule, name: str) -> None:
    traced.load_state_dict({**traced.state_dict(), name: traced.get_parameter(name).detach().flip(0)})


def _flip_in_numpy(traced: fxprune.TracedModule, name: str) -> None:
    weight = traced.get_parameter(name).detach().numpy()
    weight[:] = weight[::-1].copy()


@pytest.mark.parametrize("flip", [_flip_in_data, _flip_by_a_state, _flip_in_numpy])
def test_what_is_masked_stays_masked_while_weights_change_places(
    flip: Callable[[fxprune.TracedModule, str], None],
) -> None:
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 4, 3)).requires_grad_(False)
    model[0].weight.copy_((torch.arange(16) + 1).view(-1, 1, 1, 1).expand(16, 3, 3, 3) / 64)  # every sum is exact
    model[2].weight.fill_(0.5)
    traced = fxprune.trace(model, torch.randn(2, 3, 8, 8), modes=("eval",))
    fxprune.prune.channels(traced, macs=0.8, round_to=1)
    before = traced.get_buffer("0.weight_mask").clone()
    flip(traced, "0.weight_orig")
    fxprune.prune.channels(traced, macs=0.5, round_to=1)
    after = traced.get_buffer("0.weight_mask")
    assert after.sum() < before.sum()
    assert not after[before == 0].any()


def test_masks_of_the_user_stay_when_a_budget_is_chosen_anew() -> None:
    traced = _traced("cnn", 32)
    fxprune.prune.channels(traced, macs=0.9)
    fxprune.prune.l1_unstructured(traced, "1.0.weight", 0.5)
    zeros = traced.get_submodule("1.0").weight_mask == 0
    fxprune.prune.channels(traced, macs=0.6)
    fxprune.prune.channels(traced, macs=0.5)
    assert (traced.get_submodule("1.0").weight_mask[zeros] == 0).all()


def test_steps_end_where_one_call_does_beside_masks_of_the_user() -> None:
    once = _traced("cnn", 32)
    fxprune.prune.l1_unstructured(once, "1.0.weight", 0.5)
    fxprune.prune.ln_structured(once, "1.0.weight", 5, 2, 0)
    steps = copy.deepcopy(once)
    report = fxprune.prune.channels(once, macs=0.5)
    for share in (0.9, 0.71, 0.5):
        stepped = fxprune.prune.channels(steps, macs=share)
    assert stepped.removed == report.removed
    found = _masks(steps)
    assert all(torch.equal(mask, found[name]) for name, mask in _masks(once).items())


def test_an_amount_that_is_less_than_what_goes_together_is_refused() -> None:
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 32, 1), nn.Conv2d(32, 32, 1, groups=4), nn.Conv2d(32, 4, 1)
    traced = fxprune.trace(nn.Sequential(*layers), torch.randn(2, 3, 4, 4), modes=("eval",), dynamic_shapes=None)
    with pytest.raises(PruningError, match="amount=1 of .* together are 4"):
        fxprune.prune.channels(traced, 1, targets="1")
    assert not _masks(traced)


@pytest.mark.parametrize("family", [pytest.param("cnn", marks=pytest.mark.slow), "branches"])
def test_what_is_masked_stays_masked_while_weights_change(family: str) -> None:
    model, inputs = network(family, 32)
    traced = fxprune.trace(model, inputs, dynamic_shapes=None)
    before: dict[str, torch.Tensor] = {}
    for share in (0.93, 0.81, 0.77, 0.64, 0.5):
        fxprune.prune.channels(traced, macs=share)
        after = {name: mask.clone() for name, mask in _masks(traced).items()}
        assert all((after[name] <= mask).all() for name, mask in before.items())
        before = after
        _train(traced, inputs, 2)


@pytest.mark.parametrize(
    ("curve", "budget"), [("cubic", "macs"), pytest.param("linear", "parameters", marks=pytest.mark.slow)]
)
def test_a_schedule_lands_and_keeps_its_reports(curve: str, budget: str) -> None:
    model, inputs = network("cnn", 32)
    traced = fxprune.trace(model, inputs, dynamic_shapes=None)
    unit = max(_units(traced, budget))
    schedule = fxprune.Schedule(
        traced, None, lambda gone: fxprune.prune.channels(traced, **{budget: 1 - gone}), 0.5, curve=curve, stop=5
    )
    assert schedule.reports == []
    for _ in range(6):
        reached = schedule.step()
        _train(traced, inputs, 2)
        assert reached == schedule.reached
        assert reached == schedule.reports[-1].gone
        assert reached >= schedule.amount
    assert schedule.done
    assert len(schedule.reports) == 6
    _check(traced, schedule.reports[-1], budget, 0.5, unit)
    before, after = getattr(schedule.reports[-1], budget)
    assert schedule.reached == 1 - after / before


@pytest.mark.filterwarnings("ignore::fxprune.errors.EvalConstantWarning")
@pytest.mark.parametrize("words", [False, True])
@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 40))])
def test_what_is_reported_of_a_random_network_is_what_finalize_leaves(seed: int, words: bool) -> None:
    model, sample = random_network(seed, words)  # it comes with rows of zeros, of which more than was chosen follows
    traced = fxprune.trace(model, (sample(2),), modes=("eval",), dynamic_shapes=None)
    budget, share = ("macs", "parameters")[seed % 2], SHARES[seed % 4]
    report = _reached(traced, budget, share, ("auto", 1)[seed // 4 % 2])
    if report is None:
        return
    plan = fxprune.finalize(traced).plan
    assert plan is not None
    assert (plan.macs, plan.parameters) == (report.macs, report.parameters)
    before, after = getattr(report, budget)
    assert after <= share * before


def _odd() -> fxprune.TracedModule:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Conv2d(16, 4, 1))
    traced = fxprune.trace(model, torch.randn(2, 3, 9, 9))
    fxprune.prune.ln_structured(traced, "2.weight", amount=3, n=2, dim=0)
    fxprune.prune.channels(traced, 3, targets="0", round_to=1)
    return traced


def _widths(final: fxprune.TracedModule) -> tuple[int, int]:
    return final.get_parameter("0.weight").shape[0], final.get_parameter("2.weight").shape[0]


def test_counts_that_were_decided_are_left_alone_and_others_rounded() -> None:
    traced = _odd()
    assert _widths(fxprune.finalize(traced)) == (13, 16)
    assert _widths(fxprune.finalize(traced, align=1)) == (13, 13)
    assert _widths(fxprune.finalize(traced, align=4)) == (16, 16)


def test_what_was_decided_survives_copies_modes_and_files(tmp_path: Path) -> None:
    traced, path = _odd(), tmp_path / "model.fxp"
    fxprune.save(traced, path)
    dense = fxprune.trace(
        nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Conv2d(16, 4, 1)),
        torch.randn(2, 3, 9, 9),
    )
    for other in (copy.deepcopy(traced), traced.train().eval(), fxprune.load(path), fxprune.load(path, dense)):
        assert other.decided == traced.decided == {("0.weight", 0), ("0.bias", 0)}
        assert _widths(fxprune.finalize(other)) == (13, 16)


def test_a_finalized_module_has_nothing_decided() -> None:
    final = fxprune.finalize(_odd())
    assert final.decided == frozenset()
    fxprune.prune.ln_structured(final, "0.weight", amount=2, n=2, dim=0)
    assert _widths(fxprune.finalize(final))[0] == 12


def test_a_request_that_fails_decides_nothing() -> None:
    traced = _traced("cnn", 16)
    with pytest.raises(PruningError, match="cannot be reached"):
        fxprune.prune.channels(traced, macs=0.0001)
    assert traced.decided == frozenset()


@pytest.mark.parametrize("layer", [nn.Conv2d, nn.ConvTranspose2d])
def test_a_finalized_module_with_grouped_convolutions_is_cut_again(layer: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), layer(32, 32, 3, groups=4), nn.ReLU(), nn.Conv2d(32, 4, 1))
    images = torch.randn(2, 3, 9, 9)
    traced = fxprune.trace(model, images)
    first = fxprune.prune.channels(traced, macs=0.6, round_to=1)
    final = fxprune.finalize(traced)
    for graph in final.graphs.values():
        for node in graph.find_nodes(op="get_attr"):
            tensor = final.get_parameter(str(node.target))
            assert node.meta["val"].shape == tensor.shape
    assert all(group.macs > 0 for group in fxprune.channel_groups(final))
    second = fxprune.prune.channels(final, macs=0.6, round_to=1)
    assert second.macs[0] == first.macs[1]
    smaller = fxprune.finalize(final)
    assert smaller.plan is not None
    assert (smaller.plan.macs, smaller.plan.parameters) == (second.macs, second.parameters)
    assert torch.allclose(smaller(images), final(images), atol=1e-6)


@pytest.mark.parametrize(("wanted", "overhead"), [(1.5, 0.02), (4.0, 0.0), (4.0, 0.05), (6.0, 0.0)])
def test_a_speedup_is_used_up_where_the_clock_is_exact(
    monkeypatch: pytest.MonkeyPatch, wanted: float, overhead: float
) -> None:
    traced = _traced("cnn", 128)

    @contextlib.contextmanager
    def clock(dense: fxprune.TracedModule, **options: Any) -> Iterator[Callable[[dict[str, torch.Tensor]], float]]:
        def measure(masks: dict[str, torch.Tensor]) -> float:
            candidate = copy.deepcopy(dense)
            for name, mask in masks.items():
                fxprune.prune.custom_from_mask(candidate, name, mask)
            plan = fxprune.finalize(candidate, align=1).plan
            assert plan is not None
            return 1 / (overhead + (1 - overhead) * plan.macs[1] / plan.macs[0])

        yield measure

    monkeypatch.setattr("fxprune.driver.stopwatch", clock)
    speedup = fxprune.prune.channels(traced, speedup=wanted, round_to=1).speedup
    assert speedup is not None
    assert wanted <= speedup <= 1.03 * (1 + 1 / 64) * wanted
