"""Corners of removal: sizes of one, long graphs, operators of others, shared memory, plans that are the caller's."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import fxprune
from fxprune.channels import analyze
from tests.chains import lengthen
from tests.fxprune.channels.exactness import EXACT, error
from tests.fxprune.channels.layers import Net, zero_rows


@pytest.fixture(scope="module")
def flip_channels() -> Iterator[torch._ops.OpOverload]:
    """An operator of another library with the name of one of ATen's, which does not do what that one does."""
    library = torch.library.Library("helper", "DEF")
    library.define("contiguous(Tensor x) -> Tensor")
    library.impl("contiguous", lambda x: x.flip(1).clone(), "CPU")
    library.impl("contiguous", lambda x: torch.empty_like(x), "Meta")
    yield torch.ops.helper.contiguous.default
    library._destroy()


@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
def test_a_recurrent_layer_of_one_unit_is_finalized(kind: type[nn.RNN]) -> None:
    model = Net(
        lambda self, x: self.out(self.rnn(self.first(x))[0]), first=nn.Linear(3, 4), rnn=kind(4, 1), out=nn.Linear(1, 2)
    )
    zero_rows(model.first, 1, 3, bias=True)
    x = torch.randn(5, 2, 3).double()
    traced = fxprune.trace(model.double().eval(), (x,), modes=("eval",), dynamic_shapes=None)
    final = fxprune.finalize(traced, align=1)
    assert final.plan.kept["first.weight"][0].tolist() == [0, 2]
    with torch.no_grad():
        assert error(model(x), final(x)) < EXACT


def test_a_dead_branch_of_any_length_goes() -> None:
    model = Net(lambda self, x: self.out(x + self.dead(x).relu()), dead=nn.Linear(3, 3), out=nn.Linear(3, 2))
    zero_rows(model.dead, 0, 1, 2, bias=True)
    x = torch.randn(2, 3).double()
    traced = fxprune.trace(model.double().eval(), (x,), modes=("eval",), dynamic_shapes=None)
    lengthen(traced.graphs["eval"], torch.ops.aten.relu.default, 1200)
    final = fxprune.finalize(traced)
    assert "dead.weight" not in final.state_dict()
    with torch.no_grad():
        assert error(model(x), final(x)) < EXACT


def test_an_operator_of_another_library_pins_whatever_its_name(flip_channels: torch._ops.OpOverload) -> None:
    model = Net(
        lambda self, x: self.out(flip_channels(self.first(x))), first=nn.Conv2d(3, 4, 1), out=nn.Conv2d(4, 2, 1)
    )
    zero_rows(model.first, 0, bias=True)
    x = torch.randn(2, 3, 4, 4).double()
    final = fxprune.finalize(fxprune.trace(model.double().eval(), (x,), modes=("eval",)), align=1)
    assert len(final.plan.kept["first.weight"][0]) == 4
    assert "helper.contiguous" in final.plan.explain()
    with torch.no_grad():
        assert error(model(x), final(x)) < EXACT


def test_parameters_that_are_parts_of_one_vector_do_not_share_memory() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    zero_rows(model[0], 1, 4, bias=True)
    vector_to_parameters(parameters_to_vector(model.parameters()).detach(), model.parameters())
    assert len({p.untyped_storage().data_ptr() for p in model.parameters()}) == 1
    traced = fxprune.trace(model.eval(), (torch.randn(2, 4),), modes=("eval",))
    assert [group.name for group in fxprune.channel_groups(traced) if not group.reason] == ["0.weight"]
    assert fxprune.finalize(traced, align=1).plan.kept["0.weight"][0].tolist() == [0, 2, 3, 5]


def test_parameters_that_overlap_in_memory_keep_everything() -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.ReLU(), nn.Linear(4, 4, bias=False))
    memory = torch.randn(24)
    model[0].weight, model[2].weight = nn.Parameter(memory[:16].view(4, 4)), nn.Parameter(memory[8:].view(4, 4))
    with torch.no_grad():
        model[0].weight[1] = 0
    traced = fxprune.trace(model.eval(), (torch.randn(2, 4),), modes=("eval",))
    plan = analyze(traced, align=1).plan
    assert len(plan.kept["0.weight"][0]) == 4
    assert "share memory" in plan.explain()


def test_a_plan_that_is_passed_in_stays_as_it_is() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).eval()
    x = torch.randn(2, 4)
    dense = fxprune.trace(model, (x,), modes=("eval",))
    masked = fxprune.trace(model, (x,), modes=("eval",))
    fxprune.prune.ln_structured(masked, "0.weight", 0.5, 2, 0)
    plan = fxprune.finalize(masked, align=1).plan
    before = plan.to_json()
    final = fxprune.finalize(dense, plan=plan)
    assert plan.to_json() == before
    assert final.plan is not plan
    assert final.get_parameter("0.weight").shape == (3, 4)


def test_a_layer_loses_the_same_channels_written_as_linear_and_as_addmm() -> None:
    x = torch.randn(5, 6)
    layers = {"first": nn.Linear(6, 8), "second": nn.Linear(8, 8), "last": nn.Linear(8, 2)}

    def addmm(layer: nn.Linear, x: Tensor) -> Tensor:
        return torch.addmm(layer.bias, x, layer.weight.t())

    kept = []
    for call in (lambda layer, x: layer(x), addmm):
        model = Net(
            lambda self, x, call=call: call(self.last, call(self.second, call(self.first, x).relu()).relu()), **layers
        )
        traced = fxprune.trace(model.eval(), (x,), modes=("eval",))
        fxprune.prune.channels(traced, 0.5, round_to=1)
        final = fxprune.finalize(traced, align=1)
        kept.append({name: [i.tolist() for i in axes.values()] for name, axes in final.plan.kept.items()})
    assert kept[0] == kept[1]


@pytest.mark.parametrize(
    "cut",
    [
        lambda x: x.tensor_split(2, 1),
        lambda x: x.tensor_split((4,), 1),
        lambda x: x.unsafe_split(4, 1),
        lambda x: x.unsafe_split_with_sizes([4, 4], 1),
        lambda x: x.unsafe_chunk(2, 1),
    ],
    ids=["sections", "positions", "unsafe split", "unsafe sizes", "unsafe chunk"],
)
def test_parts_that_may_be_written_to_in_training_may_be_after_removal(cut: Callable[[Tensor], list[Tensor]]) -> None:
    def forward(self: Net, x: Tensor) -> Tensor:
        parts = cut(self.first(x))
        parts[0].mul_(3)
        return self.out(torch.cat(list(parts), 1))

    model = Net(forward, first=nn.Linear(3, 8), out=nn.Linear(8, 2)).double().eval()
    zero_rows(model.first, 1, 5, 6, bias=True)
    inputs = torch.randn(4, 3).double()
    final = fxprune.finalize(fxprune.trace(model, (inputs,), modes=("eval",)), align=1)
    assert final.get_parameter("first.weight").shape[0] < 8
    outputs, gradients = [], []
    for network in (model, final):
        x = inputs.clone().requires_grad_()
        output = network(x)
        outputs.append(output.detach())
        gradients += torch.autograd.grad(output.sum(), x)
    assert error(*outputs) < EXACT
    assert error(*gradients) < EXACT
