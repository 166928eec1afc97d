"""Removal of dead channels: what goes, what stays and why, on networks small enough to say."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxprune
from fxprune.channels import ChannelPlan, analyze, impose, remove
from fxprune.channels.edits import SetArguments
from fxprune.channels.registry import REGISTRY
from fxprune.channels.rules.pointwise import Pointwise
from fxprune.channels.values import Value
from fxprune.channels.walk import Walk
from fxprune.errors import ArtifactError, FinalizeError
from tests.fxprune.channels.exactness import EXACT, error, shrink
from tests.fxprune.channels.layers import Net, norm, zero_rows

IMAGE = (2, 3, 8, 8)


def check(
    model: nn.Module, *inputs: Tensor, batches: tuple[int, ...] = (1, 2, 5), **options: Any
) -> tuple[fxprune.TracedModule, ChannelPlan]:
    model = model.double().eval()
    inputs = tuple(x.double() if x.is_floating_point() else x for x in inputs)
    traced, plan = shrink(model, *inputs, **options)
    for batch in batches:
        again = [torch.cat([x] * batch)[:batch] for x in inputs]
        again = [torch.randn_like(x) if x.is_floating_point() else x for x in again]
        with torch.no_grad():
            assert error(model(*again), traced(*again)) < EXACT, plan.explain()
    return traced, plan


def chain(*middle: nn.Module, padding: int = 1) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), *middle, nn.Conv2d(8, 6, 3, padding=padding), nn.Flatten(2)
    )


def test_masked_rows_go_and_constants_they_leave_fold_into_the_bias() -> None:
    model = chain(norm(8), nn.Sigmoid(), padding=0)
    zero_rows(model[0], 0, 3, 5)
    traced, plan = check(model, torch.randn(*IMAGE))
    assert plan.kept["0.weight"][0].tolist() == [1, 2, 4, 6, 7]
    assert plan.kept["1.running_var"][0].tolist() == [1, 2, 4, 6, 7]
    assert traced.get_parameter("3.weight").shape == (6, 5, 3, 3)
    assert plan.folded == {"3": 3}
    assert not plan.merged


def test_constants_that_a_zero_padding_layer_reads_merge_into_one_representative() -> None:
    model = chain(norm(8), nn.Sigmoid())
    zero_rows(model[0], 0, 3, 5)
    free = {axis: torch.export.Dim.DYNAMIC for axis in (0, 2, 3)}
    traced, plan = check(model, torch.randn(*IMAGE), dynamic_shapes={"input": free})
    assert len(plan.kept["0.weight"][0]) == 6
    assert plan.merged == {"3": 2}
    for size in (1, 2, 5, 11):
        x = torch.randn(2, 3, size, size + 1).double()
        with torch.no_grad():
            assert error(model(x), traced(x)) < EXACT


def test_a_constant_padded_by_hand_merges_as_well() -> None:
    model = chain(norm(8), nn.Sigmoid(), nn.ZeroPad2d(1), padding=0)
    zero_rows(model[0], 0, 3, 5)
    _, plan = check(model, torch.randn(*IMAGE))
    assert len(plan.kept["0.weight"][0]) == 6


def test_a_column_of_zeros_makes_its_producers_removable_through_any_depth() -> None:
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))
    with torch.no_grad():
        model[3].weight[:, 2] = 0
        for layer in (model[1], model[2]):
            layer.weight[:] = torch.diag(torch.rand(8) + 0.5)
    traced, plan = check(model, torch.randn(3, 8))
    assert traced.get_parameter("0.weight").shape == (7, 8)
    assert all(plan.kept[f"{i}.weight"][0].tolist() == [0, 1, 3, 4, 5, 6, 7] for i in range(3))


def test_negative_zero_is_dead_and_nan_is_not() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    with torch.no_grad():
        model[0].weight[0] = -0.0
        model[0].weight[1] = float("nan")
    traced = fxprune.trace(model.eval(), (torch.randn(2, 4),), modes=("eval",))
    analysis = analyze(traced, align=1)
    assert analysis.plan.kept["0.weight"][0].tolist() == [1, 2, 3]
    remove(traced, analysis)
    assert traced(torch.randn(3, 4)).isnan().all()


@pytest.mark.parametrize(
    ("layer", "why"),
    [(nn.LayerNorm((8, 8, 8)), "in 2) reads it"), (nn.GroupNorm(2, 8), "in 2) reads it"), (nn.Softmax(1), "softmax")],
)
def test_what_mixes_channels_keeps_them_and_says_so(layer: nn.Module, why: str) -> None:
    model = chain(layer)
    zero_rows(model[0], 0, 1)
    _, plan = check(model, torch.randn(*IMAGE))
    assert len(plan.kept["0.weight"][0]) == 8
    assert why in plan.explain()


def test_an_operator_without_a_rule_pins_what_it_touches_by_name() -> None:
    model = chain(Net(lambda self, x: torch.cdist(x, x)))
    zero_rows(model[0], 0, 1)
    _, plan = check(model, torch.randn(*IMAGE))
    assert len(plan.kept["0.weight"][0]) == 8
    assert "cdist" in plan.explain()
    assert "no rule for this operator" in plan.explain()


def heads(self: Any, x: Tensor) -> Tensor:
    q, k, v = (layer(x).view(*x.shape[:2], 4, 3).transpose(1, 2) for layer in (self.q, self.k, self.v))
    return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def attention() -> Net:
    return Net(heads, q=nn.Linear(6, 12), k=nn.Linear(6, 12), v=nn.Linear(6, 12), out=nn.Linear(12, 6))


def test_a_dead_head_goes_from_every_projection() -> None:
    model = attention()
    zero_rows(model.v, 3, 4, 5)
    traced, plan = check(model, torch.randn(2, 5, 6))
    assert all(traced.get_parameter(f"{n}.weight").shape == (9, 6) for n in "qkv")
    assert plan.folded == {"out": 3}


def test_dead_columns_of_every_head_go_and_the_scale_stays_that_of_the_original_size() -> None:
    model = attention()
    zero_rows(model.q, 1, 4, 7, 10, bias=True)
    traced, _ = check(model, torch.randn(2, 5, 6))
    assert traced.get_parameter("q.weight").shape == traced.get_parameter("k.weight").shape == (8, 6)
    node = next(n for n in traced.graph.nodes if "attention" in str(n.target))
    assert node.kwargs["scale"] == pytest.approx(3**-0.5)


def test_a_constant_key_shifts_every_logit_alike_and_goes() -> None:
    model = attention()
    zero_rows(model.k, 1, 4, 7, 10)
    traced, _ = check(model, torch.randn(2, 5, 6))
    assert traced.get_parameter("k.weight").shape == (8, 6)


def test_a_constant_value_stays_where_a_mask_may_leave_a_row_without_weights() -> None:
    def masked(self: Any, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (layer(x).view(*x.shape[:2], 4, 3).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return self.out(F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2))

    model = attention()
    model.call = masked
    zero_rows(model.v, 3, 4, 5)
    mask = torch.ones(2, 1, 5, 5, dtype=torch.bool)
    mask[0, 0, 1] = False
    _, plan = check(model, torch.randn(2, 5, 6), mask)
    assert len(plan.kept["v.weight"][0]) == 12


def test_groups_of_a_convolution_stay_equal_and_dead_ones_go() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1, groups=4), nn.Conv2d(8, 4, 1))
    zero_rows(model[1], 0, 1, 2, 4, 7, bias=True)
    traced, plan = check(model, torch.randn(*IMAGE))
    assert plan.groups == {"1.weight": (4, 3)}
    assert traced.get_parameter("1.weight").shape == (3, 2, 3, 3)


def test_a_branch_that_is_constant_leaves_both_graphs() -> None:
    def residual(self: Any, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head((x + F.relu_(self.norm(self.b(F.relu_(self.a(x)))))).relu().mean((2, 3)))

    model = Net(
        residual, stem=nn.Conv2d(3, 8, 1), a=nn.Conv2d(8, 8, 3, padding=1), b=nn.Conv2d(8, 8, 3, padding=1),
        norm=norm(8), head=nn.Linear(8, 4),
    )  # fmt: skip
    zero_rows(model.b, *range(8))
    traced, plan = check(model, torch.randn(*IMAGE), modes=("train", "eval"))
    assert {"a.weight", "b.weight", "norm.running_mean", "norm.num_batches_tracked"} <= set(plan.dropped)
    traced.train()
    traced(torch.randn(*IMAGE).double()).sum().backward()
    assert [n for n, _ in traced.named_parameters()] == ["stem.weight", "stem.bias", "head.weight", "head.bias"]


def test_a_parameter_of_a_pruned_and_an_unpruned_use_stays_exact() -> None:
    def shared(self: Any, x: Tensor) -> Tensor:
        return self.out(self.a(self.b(x).relu()).relu()) + self.out(self.a(x).relu())

    model = Net(shared, a=nn.Linear(6, 6), b=nn.Linear(6, 6), out=nn.Linear(6, 4))
    zero_rows(model.b, 0, 1)
    zero_rows(model.a, 2, 3)
    _, plan = check(model, torch.randn(3, 6))
    assert plan.kept["a.weight"][0].tolist() == [0, 1, 4, 5]
    assert len(plan.kept["b.weight"][0]) == 6


def test_tied_names_lose_what_is_dead_in_every_use() -> None:
    model = Net(
        lambda self, x: self.out(F.linear(self.b(self.a(x).relu()).relu(), self.tied.weight)),
        a=nn.Linear(6, 6), b=nn.Linear(6, 6), tied=nn.Linear(6, 6), out=nn.Linear(6, 2),
    )  # fmt: skip
    model.tied.weight = model.b.weight
    zero_rows(model.a, 0, 3, bias=True)
    zero_rows(model.b, 3, 4, bias=True)
    traced, plan = check(model, torch.randn(3, 6))
    assert plan.kept["a.weight"][0].tolist() == [0, 1, 2, 4, 5]
    assert all(plan.kept["b.weight"][axis].tolist() == [0, 1, 2, 4, 5] for axis in (0, 1))
    assert traced.get_parameter("b.weight") is traced.get_parameter("tied.weight")


def test_a_buffer_that_is_a_view_of_a_parameter_keeps_both_whole() -> None:
    model = Net(
        lambda self, x: self.b(self.a(x).relu()) + self.part.sum(), a=nn.Linear(6, 6), b=nn.Linear(6, 2)
    ).double()
    model.register_buffer("part", model.a.weight.detach()[2:4])
    zero_rows(model.a, 0, 1, bias=True)
    plan = analyze(fxprune.trace(model.eval(), (torch.randn(3, 6).double(),), modes=("eval",)), align=1).plan
    assert len(plan.kept["a.weight"][0]) == 6
    assert "share memory" in plan.explain()


def test_a_buffer_that_the_graph_writes_is_kept_whole() -> None:
    def counting(self: Any, x: Tensor) -> Tensor:
        x = self.a(x)
        self.seen.add_(x.detach().mean(0))
        return self.b(x)

    model = Net(counting, a=nn.Linear(4, 4), b=nn.Linear(4, 2))
    model.register_buffer("seen", torch.zeros(4))
    zero_rows(model.a, 0)
    _, plan = check(model, torch.randn(3, 4))
    assert len(plan.kept["seen"][0]) == 4


def test_single_precision_with_bilinear_upsampling_is_checked_too() -> None:
    model = Net(
        lambda m, x: m.last(F.interpolate(m.first(x), scale_factor=2, mode="bilinear")),
        first=nn.Conv2d(3, 8, 1), last=nn.Conv2d(8, 2, 1),
    ).float()  # fmt: skip
    zero_rows(model.first, 0, 1, 2, bias=True)
    x = torch.randn(*IMAGE).float()
    final = fxprune.finalize(fxprune.trace(model.eval(), (x,), modes=("eval",)), align=1)
    assert len(final.plan.kept["first.weight"][0]) == 5
    with torch.no_grad():
        assert error(model(x), final(x)) < 1e-5


@pytest.mark.parametrize(("align", "left"), [(1, (18, 18)), (4, (20, 20)), ("auto", (32, 32))])
def test_automatic_alignment_keeps_more_next_to_depthwise_convolutions(align: Any, left: tuple[int, int]) -> None:
    model = Net(
        lambda m, x: m.last(m.plain(m.depthwise(m.wide(x)))),
        wide=nn.Conv2d(3, 48, 1), depthwise=nn.Conv2d(48, 48, 3, padding=1, groups=48), plain=nn.Conv2d(48, 40, 1),
        last=nn.Conv2d(40, 2, 1),
    )  # fmt: skip
    zero_rows(model.wide, *range(18, 48), bias=True)
    zero_rows(model.depthwise, *range(18, 48), bias=True)
    zero_rows(model.plain, *range(18, 40), bias=True)
    _, plan = check(model, torch.randn(*IMAGE), align=align)
    assert tuple(len(plan.kept[f"{name}.weight"][0]) for name in ("depthwise", "plain")) == left


def test_automatic_alignment_does_not_spread_over_groups() -> None:
    model = Net(
        lambda m, x: m.last(m.second(m.first(x).relu())),
        first=nn.Conv2d(3, 24, 1), second=nn.Conv2d(24, 24, 1, groups=6), last=nn.Conv2d(24, 2, 1),
    )  # fmt: skip
    zero_rows(model.first, *range(1, 24, 4), *range(2, 24, 4), *range(3, 24, 4), bias=True)
    zero_rows(model.second, *range(1, 24, 4), *range(2, 24, 4), *range(3, 24, 4), bias=True)
    _, plan = check(model, torch.randn(*IMAGE), align="auto")
    assert [len(plan.kept[f"{name}.weight"][0]) for name in ("first", "second")] == [6, 6]


def test_heads_with_one_value_dimension_left_are_viewed_as_before() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        q, k, v = (part(x).view(-1, 5, 4, part.out_features // 4).transpose(1, 2) for part in (m.q, m.k, m.v))
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(-1, 5, 32)
        return torch.addmm(m.out.bias, out.view(-1, 32), m.out.weight.t())

    model = Net(forward, q=nn.Linear(8, 32), k=nn.Linear(8, 32), v=nn.Linear(8, 32), out=nn.Linear(32, 3))
    zero_rows(model.v, *(i for i in range(32) if i % 8), bias=True)
    _, plan = check(model, torch.randn(2, 5, 8))
    assert len(plan.kept["v.weight"][0]) == 4


@pytest.mark.parametrize(("align", "left"), [(1, 5), (4, 8), ("auto", 8), (3, 6), (16, 16)])
def test_alignment_keeps_dead_channels_up_to_a_multiple(align: Any, left: int) -> None:
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 4, 1))
    zero_rows(model[0], *range(11), bias=True)
    _, plan = check(model, torch.randn(*IMAGE), align=align)
    assert len(plan.kept["0.weight"][0]) == left


def test_the_same_plan_as_json_gives_a_dense_model_the_same_architecture() -> None:
    model = chain(norm(8), nn.Sigmoid(), padding=0).eval()
    model[3].bias = None
    x = torch.randn(*IMAGE)
    dense = fxprune.trace(model, (x,))
    masked = copy.deepcopy(model)
    zero_rows(masked[0], 0, 3, 5)
    traced, plan = shrink(masked, x, modes=("train", "eval"))
    impose(dense, ChannelPlan.from_json(plan.to_json()))
    assert {k: v.shape for k, v in dense.state_dict().items()} == {k: v.shape for k, v in traced.state_dict().items()}
    dense.load_state_dict(traced.state_dict())
    dense.eval()
    assert torch.equal(dense(x), traced(x))
    with pytest.raises(ArtifactError, match="not a channel plan"):
        ChannelPlan.from_json("{}")
    with pytest.raises(FinalizeError, match="another model"):
        impose(fxprune.trace(nn.Conv2d(3, 3, 1), (x,)), plan)


@pytest.mark.parametrize("layer", [nn.Conv2d, nn.ConvTranspose2d])
def test_a_plan_gives_channels_within_groups_that_no_other_parameter_has(layer: type[nn.Module]) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.last(self.grouped(F.pad(self.first(x).relu(), (0, 0, 0, 0, 0, 3))))

    parts = {"first": nn.Conv2d(3, 7, 1), "grouped": layer(10, 20, 3, groups=5), "last": nn.Conv2d(20, 4, 1)}
    model = Net(forward, **parts).double().eval()
    dense = fxprune.trace(copy.deepcopy(model), (torch.randn(*IMAGE).double(),))
    zero_rows(model.first, 0, 3, bias=True)
    with torch.no_grad():
        model.last.weight[:, 4:8] = 0
    x = torch.randn(*IMAGE).double()
    traced, plan = shrink(model, x, modes=("train", "eval"))
    assert plan.groups["grouped.weight"] == (5, 3)
    impose(dense, ChannelPlan.from_json(plan.to_json()))
    dense.load_state_dict(traced.state_dict())
    assert torch.equal(dense.eval()(x), traced(x))


@pytest.fixture
def _wrong_tanh() -> Iterator[None]:
    class Wrong(Pointwise):
        def relate(self, walk: Walk) -> Value:
            walk.edits.append(SetArguments(self.node, {"self": self.node.all_input_nodes[0].all_input_nodes[0]}))
            return super().relate(walk)

    REGISTRY.add(torch.ops.aten.tanh.default, Wrong)
    yield
    REGISTRY.remove(torch.ops.aten.tanh.default)


@pytest.mark.usefixtures("_wrong_tanh")
@pytest.mark.parametrize("inplace", [False, True])
def test_a_wrong_rule_is_caught_and_the_first_node_that_differs_named(inplace: bool) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Hardtanh(inplace=inplace), nn.Sigmoid(), nn.Tanh(), nn.Linear(4, 2))
    traced = fxprune.trace(model.eval(), (torch.randn(2, 4),), modes=("eval",))
    with pytest.raises(FinalizeError, match="first node that differs is `tanh`"):
        remove(traced, analyze(traced))


def test_the_plan_cuts_tensors_as_it_cuts_parameters() -> None:
    model = nn.Sequential(nn.Conv2d(4, 8, 1), nn.Conv2d(8, 8, 3, padding=1, groups=4), nn.Conv2d(8, 4, 1)).eval()
    zero_rows(model[1], 0, 1, 2, 4, bias=True)
    for layer in (model[0], model[2]):
        zero_rows(layer, 5 % layer.out_channels)
    traced, plan = shrink(model, torch.randn(2, 4, 8, 8))
    for name, p in model.named_parameters():
        assert plan.slice(name, p.detach()).shape == traced.get_parameter(name).shape
    assert torch.equal(plan.slice("1.weight", model[1].weight.detach()), traced.get_parameter("1.weight"))
