"""A rule that fails, or finds what is wrong, leaves the channels that its operator touches; the rest still shrinks."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import fxprune
from fxprune.channels import ChannelPlan, OperatorCall
from fxprune.channels.edits import Edit, Kept
from fxprune.channels.registry import REGISTRY
from fxprune.channels.walk import Result, Walk
from fxprune.errors import AnalysisWarning

DEAD = [1, 4, 5]


@torch.library.custom_op("failing::gate", mutates_args=())
def gate(x: Tensor) -> Tensor:
    """The cosine: 1 where x is 0."""
    return x.cos()


gate.register_fake(torch.empty_like)


class Network(nn.Module):
    """Three hidden widths with dead units; the operator stands on the second."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.last = nn.Linear(8, 3)
        for layer in (self.first, self.second, self.third):
            for parameter in layer.parameters():
                with torch.no_grad():
                    parameter[DEAD] = 0

    def forward(self, x: Tensor) -> Any:
        hidden = torch.ops.failing.gate(self.second(self.first(x).relu()))
        return self.last(self.third(hidden).relu())


@dataclass(frozen=True, eq=False)
class Raises(OperatorCall):
    """Fails after it has recorded something."""

    x: fx.Node

    def relate(self, walk: Walk) -> Result:
        walk.edits.append(Broken(self.node))
        walk.nonempty.append(torch.arange(3).numpy())
        raise AssertionError("five is no width")


@dataclass(frozen=True, eq=False)
class Broken(Edit):
    """A change that cannot be made."""

    node: fx.Node

    def apply(self, kept: Kept) -> None:
        raise IndexError("no such place")


@dataclass(frozen=True, eq=False)
class RaisesLater(OperatorCall):
    """Records a change that fails."""

    x: fx.Node

    def relate(self, walk: Walk) -> Result:
        walk.edits.append(Broken(self.node))
        return walk.value(self.x).without_source()


@dataclass(frozen=True, eq=False)
class SaysTooMuch(OperatorCall):
    """Says that zeros stay zero, which they do not."""

    x: fx.Node

    def relate(self, walk: Walk) -> Result:
        return walk.value(self.x).without_source()


@pytest.fixture
def rule() -> Iterator[Callable[[type[OperatorCall]], None]]:
    """Gives the operator a rule, until the end of the test."""
    operator = torch.ops.failing.gate.default

    def given(kind: type[OperatorCall]) -> None:
        fxprune.register_operator(operator, kind)

    yield given
    if operator in dict(REGISTRY):
        REGISTRY.remove(operator)


def final_with(traced: fxprune.TracedModule) -> fxprune.TracedModule:
    with pytest.warns(AnalysisWarning, match=r"(gate|linear_2).*Its channels stay, the rest shrinks"):
        return fxprune.finalize(traced, align=1)


@pytest.mark.parametrize(
    ("kind", "node", "widths", "reason"),
    [(Raises, "gate", (5, 8, 5), "AssertionError: five is no width"),
     (RaisesLater, "gate", (5, 8, 5), "IndexError: no such place"),
     (SaysTooMuch, "linear_2", (5, 8, 8), "FinalizeError: removing channels was to leave the outputs as they are")],
    ids=["in the rule", "in a change that it asked for", "by a wrong result"],
)  # fmt: skip
def test_what_fails_keeps_its_channels_and_the_plan_says_so(
    rule: Any, kind: Any, node: str, widths: tuple[int, int, int], reason: str
) -> None:
    rule(kind)
    model = Network().double().eval()
    x = torch.randn(5, 4, dtype=torch.float64)
    traced = fxprune.trace(model, x)
    before = copy.deepcopy(traced.state_dict())
    final = final_with(traced)
    assert final.plan is not None
    assert tuple(final.get_parameter(f"{name}.weight").shape[0] for name in ("first", "second", "third")) == widths
    assert torch.allclose(final(x), model(x), rtol=0, atol=1e-12)
    assert list(final.plan.refused) == [node]
    why = final.plan.refused[node]
    assert reason in why
    assert why in final.plan.explain()
    assert any(name == "second.weight" and index == DEAD for name, _, index, _ in final.plan.stayed)
    assert all(torch.equal(value, before[name]) for name, value in traced.state_dict().items())


def test_a_plan_with_operators_that_failed_travels_as_json(rule: Any) -> None:
    rule(RaisesLater)
    traced = fxprune.trace(Network().eval(), torch.randn(5, 4))
    plan = final_with(traced).plan
    assert plan is not None
    stored = ChannelPlan.from_json(plan.to_json())
    assert stored.refused == plan.refused
    again = fxprune.finalize(fxprune.trace(Network().eval(), torch.randn(5, 4)), plan=stored)
    assert again.get_parameter("third.weight").shape == (5, 8)


def test_a_budget_is_reached_by_the_rest(rule: Any) -> None:
    rule(Raises)
    traced = fxprune.trace(Network().eval(), torch.randn(5, 4))
    with pytest.warns(AnalysisWarning, match="five is no width"):
        report = fxprune.prune.channels(traced, macs=0.8, round_to=1)
    assert report.macs[1] <= 0.8 * report.macs[0]
    assert any("five is no width" in reason for reason in report.stayed.values())


def test_a_change_that_fails_while_parameters_are_counted_leaves_its_channels(rule: Any) -> None:
    rule(RaisesLater)
    model = Network().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter)  # nothing is dead by itself, so that choices are counted by their relations
    traced = fxprune.trace(model, torch.randn(5, 4))
    fxprune.prune.l1_unstructured(traced, "third.weight", amount=0.3)
    report = fxprune.prune.channels(traced, parameters=0.75, round_to=1)
    final = final_with(traced)
    assert final.plan is not None
    assert "no such place" in final.plan.refused["gate"]
    assert report.parameters[1] == final.plan.parameters[1] <= 0.75 * report.parameters[0]


def test_where_no_operator_can_be_named_every_channel_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any) -> None:
        raise ValueError("out of nowhere")

    model = Network().eval()
    fxprune.register_operator(torch.ops.failing.gate.default, torch.ops.aten.cos)
    try:
        traced, x = fxprune.trace(model, torch.randn(5, 4)), torch.randn(5, 4)
        monkeypatch.setattr("fxprune.channels.removal._shifted_indices", Once(fails))
        with pytest.warns(AnalysisWarning, match="an unknown operator: .*out of nowhere"):
            final = fxprune.finalize(traced, align=1)
    finally:
        REGISTRY.remove(torch.ops.failing.gate.default)
    assert final.plan is not None
    assert not final.plan.removed
    assert torch.allclose(final(x), model(x), atol=1e-6)


class Once:
    """Fails when it is called first; then there is nothing."""

    def __init__(self, fails: Callable[..., None]) -> None:
        self.fails, self.called = fails, False

    def __call__(self, *args: Any) -> dict[str, Tensor]:
        if not self.called:
            self.called = True
            self.fails()
        return {}
