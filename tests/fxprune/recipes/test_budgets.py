"""What other budgets would lose: against curves and choices that are made by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fxprune
from fxprune.graph.sharing_copies import sharing_copy
from fxprune.prune.budgeted_channels import reports_under
from fxprune.recipes.budgets import losses_of_budgets
from fxprune.recipes.outcome import Outcome
from fxprune.recipes.page import page
from tests.recipe_networks import batches, images, network


@pytest.fixture(scope="module")
def traced() -> fxprune.TracedModule:
    return fxprune.trace(network(), images(4))


@pytest.fixture(scope="module")
def sensitivity(traced: fxprune.TracedModule) -> fxprune.Sensitivity:
    return fxprune.sensitivity(traced, batches())


def test_losses_are_those_of_the_same_choice_and_the_module_stays_as_it_is(
    traced: fxprune.TracedModule, sensitivity: fxprune.Sensitivity
) -> None:
    before = {name: tensor.clone() for name, tensor in traced.state_dict().items()}
    masked = sharing_copy(traced)
    report = fxprune.prune.channels(masked, macs=0.55, importance=sensitivity)
    points = losses_of_budgets(traced, sensitivity, report, {})
    assert list(traced.state_dict()) == list(before)
    assert all(torch.equal(tensor, before[name]) for name, tensor in traced.state_dict().items())

    assert [point["macs"] for point in points] == sorted((point["macs"] for point in points), reverse=True)
    chosen = [point for point in points if point["chosen"]]
    assert [point["macs"] for point in chosen] == [report.macs[1] / report.macs[0]]
    by_name = {f"{curve.name} ({curve.kind})": curve for curve in sensitivity.curves}
    wanted = sum(by_name[group].losses()[count] for group, (count, _) in report.removed.items())
    assert chosen[0]["loss"] == pytest.approx(wanted)
    for share in (0.8, 0.5):
        again = fxprune.prune.channels(sharing_copy(traced), macs=share, importance=sensitivity)
        loss = sum(by_name[group].losses()[count] for group, (count, _) in again.removed.items())
        assert {"macs": again.macs[1] / again.macs[0], "loss": pytest.approx(loss), "chosen": False} in points


def test_the_chosen_budget_stands_once(traced: fxprune.TracedModule, sensitivity: fxprune.Sensitivity) -> None:
    report = fxprune.prune.channels(sharing_copy(traced), macs=0.5, importance=sensitivity)
    points = losses_of_budgets(traced, sensitivity, report, {})
    shares = [point["macs"] for point in points]
    assert shares.count(report.macs[1] / report.macs[0]) == 1
    assert [point["chosen"] for point in points].count(True) == 1


def test_budgets_that_cannot_be_reached_are_left_out(
    traced: fxprune.TracedModule, sensitivity: fxprune.Sensitivity
) -> None:
    options = {"ignore": ["0.weight"], "max_per_group": 0.5}
    report = fxprune.prune.channels(sharing_copy(traced), macs=0.9, importance=sensitivity, **options)
    points = losses_of_budgets(traced, sensitivity, report, options)
    assert 1 < len(points) < 9
    assert min(point["macs"] for point in points) > 0.5


@pytest.mark.parametrize("in_class", [False, True])
def test_budgets_that_are_looked_at_together_are_those_of_calls_on_their_own(
    traced: fxprune.TracedModule, sensitivity: fxprune.Sensitivity, in_class: bool
) -> None:
    options: dict[str, Any] = {"runnable": network() if in_class else None, "round_to": 1}
    shares = (0.9, 0.6, 0.3)
    together = reports_under(traced, sensitivity, shares, **options)
    for share, report in zip(shares, together, strict=True):
        alone = fxprune.prune.channels(sharing_copy(traced), macs=share, importance=sensitivity, **options)
        assert report.to_dict() == alone.to_dict()


def test_the_page_says_which_budget_was_chosen() -> None:
    budgets = [{"macs": 0.8, "loss": 0.001, "chosen": False}, {"macs": 0.5, "loss": 0.25, "chosen": True}]
    outcome = Outcome({"model": {"source": "m:f"}}, {}, {"choose": {"budgets": budgets, "seconds": 0.0}})
    html = page(outcome)
    for text in ("Budget and loss", "0.500", "2.50e-01", "<td>chosen</td>"):
        assert text in html
