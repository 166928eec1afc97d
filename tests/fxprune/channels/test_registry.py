"""The registry of operators: what is registered is analyzed, what is not keeps its channels and says what to do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor, fx, nn

import fxprune
from fxprune.channels import ChannelPlan, OperatorCall, analyze, remove
from fxprune.channels.registry import REGISTRY
from fxprune.channels.values import Value
from fxprune.channels.walk import Result, Walk
from fxprune.errors import ArgumentError, ArgumentTypeError
from fxprune.graph.text import text
from tests.fxprune.channels.exactness import error, shrink

DEAD = [1, 4, 5]


@torch.library.custom_op("registered::swish", mutates_args=())
def swish(x: Tensor) -> Tensor:
    """x * sigmoid(x), as `aten.silu` computes it."""
    return x * x.sigmoid()


@torch.library.custom_op("registered::scaled", mutates_args=())
def scaled(x: Tensor, factor: float = 2.0) -> Tensor:
    """Each element times a number."""
    return x * factor


@torch.library.custom_op("registered::contiguous", mutates_args=())
def contiguous(input: Tensor) -> Tensor:
    """The channels in reverse order, under the name of an operator of ATen that keeps them."""
    return input.flip(1)


@torch.library.custom_op("registered::halved", mutates_args=())
def halved(input: Tensor) -> Tensor:
    """Images of half the height and width, as `aten.max_pool2d` computes them."""
    return nn.functional.max_pool2d(input, 2)


swish.register_fake(torch.empty_like)
contiguous.register_fake(torch.empty_like)


@halved.register_fake
def _(input: Tensor) -> Tensor:
    return nn.functional.max_pool2d(input, 2)


@scaled.register_fake
def _(x: Tensor, factor: float = 2.0) -> Tensor:
    return torch.empty_like(x)


@pytest.fixture
def registering() -> Iterator[Callable[..., None]]:
    """`fxprune.register_operator`, undone after the test."""
    before = dict(REGISTRY)
    yield fxprune.register_operator
    for operator in dict(REGISTRY).keys() - before.keys():
        REGISTRY.remove(operator)


class Between(nn.Module):
    """An operator between two convolutions, of which the first has dead rows."""

    def __init__(self, middle: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)
        self.middle = lambda x: middle(x)  # an operator of torch.library cannot be copied with the module
        with torch.no_grad():
            self.first.weight[DEAD] = 0

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.middle(self.first(x)))


def kept(middle: Callable[[Tensor], Tensor]) -> tuple[list[int], ChannelPlan]:
    """The rows of the first layer that stay; outputs are compared with eager's, in float64."""
    model = Between(middle).double().eval()
    traced, plan = shrink(model, torch.randn(2, 3, 8, 8).double())
    x = torch.randn(5, 3, 8, 8).double()
    with torch.no_grad():
        assert error(model(x), traced(x)) < 1e-9
    return plan.kept["first.weight"][0].tolist(), plan


ALL = list(range(8))
ALIVE = [row for row in ALL if row not in DEAD]


@pytest.mark.parametrize("operator", [swish, torch.ops.registered.swish, torch.ops.registered.swish.default])
@pytest.mark.parametrize("like", [torch.ops.aten.silu, torch.ops.aten.silu.default])
def test_channels_go_through_an_operator_that_is_registered_like_a_pointwise_one(
    registering: Callable[..., None], operator: object, like: object
) -> None:
    registering(operator, like)
    assert kept(swish)[0] == ALIVE


@pytest.mark.parametrize("operator", [halved, torch.ops.registered.halved])
@pytest.mark.parametrize("like", [torch.ops.aten.max_pool2d, torch.ops.aten.max_pool2d.default])
def test_channels_go_through_an_operator_that_is_registered_like_a_pooling_of_images(
    registering: Callable[..., None], operator: object, like: object
) -> None:
    registering(operator, like)
    assert kept(halved)[0] == ALIVE


def test_an_operator_that_is_not_registered_keeps_its_channels_and_the_plan_shows_the_call_to_make() -> None:
    rows, plan = kept(swish)
    assert rows == ALL
    assert "fxprune.register_operator(torch.ops.registered.swish.default, ...)" in plan.explain()
    assert [indices for name, axis, indices, _ in plan.stayed if (name, axis) == ("first.weight", 0)] == [DEAD]


def test_the_call_that_the_plan_shows_is_accepted(registering: Callable[..., None]) -> None:
    text = kept(swish)[1].explain()
    shown = text[text.index("fxprune.register_operator(") :].partition(")")[0] + ")"
    eval(shown.replace("...", "torch.ops.aten.silu"), {"fxprune": fxprune, "torch": torch})
    assert kept(swish)[0] == ALIVE


def test_an_analysis_leaves_the_graphs_and_parameters_as_they_are() -> None:
    traced = fxprune.trace(Between(lambda x: x.view(-1, 8, 6, 6)).eval(), (torch.randn(2, 3, 8, 8),))

    def contents() -> tuple[dict[str, str], dict[str, list[float]]]:
        graphs = {mode: text(graph) for mode, graph in traced.graphs.items()}
        return graphs, {name: value.tolist() for name, value in traced.state_dict().items()}

    before = contents()
    analysis = analyze(traced, align=1)
    edits = analysis.coupling.walks["eval"].edits
    assert "8 scaled to what is kept" in str(edits[0])
    assert contents() == before
    remove(traced, analysis)
    assert "[-1, 5, 6, 6]" in contents()[0]["eval"]


@dataclass(frozen=True, eq=False)
class Scaled(OperatorCall):
    """Each element times a number; what is zero stays zero."""

    data: fx.Node
    factor: float
    aliases: ClassVar = {"data": ("x",)}

    def relate(self, walk: Walk) -> Result:
        value = walk.value(self.data)
        return value.moved(value.axes, lambda tensor: tensor * self.factor if tensor.is_floating_point() else tensor)


@pytest.mark.parametrize(
    ("middle", "factor"),
    [(lambda x: scaled(x, 3.0), 3.0), (lambda x: scaled(x), 2.0), (lambda x: scaled(x, factor=0.5), 0.5)],
    ids=["by position", "left out", "by name"],
)
def test_a_class_is_given_the_arguments_by_the_names_of_the_schema(
    registering: Callable[..., None], middle: Callable[[Tensor], Tensor], factor: float
) -> None:
    seen = []

    @dataclass(frozen=True, eq=False)
    class Noted(Scaled):
        def relate(self, walk: Walk) -> Result:
            seen.append(self.factor)
            return super().relate(walk)

    registering(scaled, Noted)
    assert kept(middle)[0] == ALIVE
    assert set(seen) == {factor}


def test_an_operator_of_the_name_of_one_of_aten_does_not_get_its_rule() -> None:
    rows, plan = kept(contiguous)
    assert rows == ALL
    assert "fxprune.register_operator(torch.ops.registered.contiguous.default, ...)" in plan.explain()


def test_a_rule_that_relates_the_wrong_channels_is_found_by_the_comparison(registering: Callable[..., None]) -> None:
    registering(contiguous, torch.ops.aten.contiguous)
    with pytest.raises(fxprune.errors.FinalizeError, match="first node that differs"):
        kept(contiguous)


def test_an_operator_whose_arguments_have_other_names_than_the_rule_needs_is_refused(
    registering: Callable[..., None],
) -> None:
    with pytest.raises(ArgumentError, match=r"takes 'x'; its rule Copy needs an argument 'self' or 'input'\."):
        registering(swish, torch.ops.aten.contiguous)
    with pytest.raises(ArgumentError, match=r"takes 'x', 'factor'; its rule Glu needs .*'input', and one 'dim'"):
        registering(torch.ops.registered.scaled, torch.ops.aten.glu)


def test_a_class_that_parses_the_call_itself_may_name_its_fields_freely(registering: Callable[..., None]) -> None:
    @dataclass(frozen=True, eq=False)
    class Parsed(Scaled):
        aliases: ClassVar = {}

        @classmethod
        def parse(cls, node: fx.Node) -> Parsed:
            return cls(node, *node.args)  # type: ignore[arg-type]

    registering(scaled, Parsed)
    assert kept(lambda x: scaled(x, 3.0))[0] == ALIVE


def test_a_field_that_would_hide_something_of_every_rule_is_refused(registering: Callable[..., None]) -> None:
    @dataclass(frozen=True, eq=False)
    class Hiding(Scaled):
        gain: float = 2.0  # type: ignore[assignment]

    with pytest.raises(ArgumentError, match=r"Hiding has a field 'gain', .* in `aliases`\."):
        registering(scaled, Hiding)


def test_an_operator_that_has_a_rule_is_refused(registering: Callable[..., None]) -> None:
    registering(swish, torch.ops.aten.silu)
    with pytest.raises(ArgumentError, match=r"registered\.swish\S* already has a rule: Pointwise"):
        registering(swish, torch.ops.aten.relu)
    with pytest.raises(ArgumentError, match=r"aten\.glu already has a rule: Glu"):
        registering(torch.ops.aten.glu, torch.ops.aten.silu)


@pytest.mark.parametrize("operator", [torch.relu, nn.ReLU(), "aten::relu", None])
def test_what_is_no_operator_of_torch_is_refused(registering: Callable[..., None], operator: object) -> None:
    with pytest.raises(ArgumentTypeError, match=r"is no operator of torch\. Define one by torch\.library\.custom_op"):
        registering(operator, torch.ops.aten.silu)


@pytest.mark.parametrize("rule", ["aten.silu", torch.nn.functional.silu, Value, None])
def test_a_rule_that_is_neither_an_operator_nor_a_class_is_refused(
    registering: Callable[..., None], rule: object
) -> None:
    with pytest.raises(ArgumentTypeError, match="an operator that is known, or a class of OperatorCall, is needed"):
        registering(swish, rule)


def test_an_operator_is_not_like_one_without_a_rule(registering: Callable[..., None]) -> None:
    with pytest.raises(ArgumentError, match=r"aten\.cdist has no rule either, so registered\.swish"):
        registering(swish, torch.ops.aten.cdist)
    assert kept(swish)[0] == ALL
