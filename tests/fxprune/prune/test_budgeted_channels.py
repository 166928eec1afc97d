"""`channel_groups` and `prune.channels`: coupled groups, budgets that are kept, masks that finalize removes exactly."""

from __future__ import annotations

import copy
from typing import Any, cast

import pytest
import torch
from torch import nn

import fxprune
from fxprune import driver
from fxprune.errors import ArgumentError, ArgumentTypeError, FxpruneError, NameLookupError, PruningError
from fxprune.prune import channel_choice
from tests.random_networks import network


class Net(nn.Module):
    """A residual stream, a depthwise layer and a head; the stream's writers stand or fall together."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.norm = nn.BatchNorm2d(32)
        self.inner = nn.Conv2d(32, 48, 1)
        self.depthwise = nn.Conv2d(48, 48, 3, padding=1, groups=48)
        self.back = nn.Conv2d(48, 32, 1, bias=False)
        self.head = nn.Linear(32, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.stem(x)).relu()
        x = x + self.back(self.depthwise(self.inner(x)).sigmoid())
        return self.head(x.mean((2, 3)))


@pytest.fixture(scope="module")
def captured() -> fxprune.TracedModule:
    torch.manual_seed(0)
    return fxprune.trace(Net().double().eval(), (torch.randn(2, 3, 6, 6).double(),))


@pytest.fixture
def traced(captured: fxprune.TracedModule) -> fxprune.TracedModule:
    return copy.deepcopy(captured)


def _check(traced: fxprune.TracedModule) -> fxprune.TracedModule:
    final = fxprune.finalize(traced, align=1)
    x = torch.randn(3, 3, 6, 6).double()
    want = traced(x)
    assert (want - final(x)).abs().max() <= 1e-9 * want.abs().max()
    return final


def _close_to_finalized(traced: fxprune.TracedModule, x: torch.Tensor) -> None:
    want, final = traced(x), fxprune.finalize(traced, align=1)
    assert final.plan.removed
    assert (want - final(x)).abs().max() <= 1e-9 * want.abs().max()


def test_groups_name_what_is_masked_together_and_why_some_may_not(traced: fxprune.TracedModule) -> None:
    groups = fxprune.channel_groups(traced)
    found = {g.name: {(m.parameter, m.axis, m.role) for m in g.members} for g in groups if g.reason is None}
    assert found["stem.weight"] == {
        ("stem.weight", 0, "writer"),
        ("stem.bias", 0, "writer"),
        ("norm.weight", 0, "writer"),
        ("norm.bias", 0, "writer"),
        ("back.weight", 0, "writer"),
        ("inner.weight", 1, "reader"),
        ("head.weight", 1, "reader"),
    }
    assert ("depthwise.weight", 0, "writer") in found["inner.weight"]
    (last,) = [g for g in groups if g.name == "head.weight"]
    assert "the model returns it" in str(last.reason)


def test_a_group_counts_the_elements_that_layers_move_for_it(traced: fxprune.TracedModule) -> None:
    (group,) = (g for g in fxprune.channel_groups(traced) if g.name == "stem.weight")
    image, weights = 6 * 6, 27 + 48 + 48 + 5  # of the stem, both 1 x 1 layers and the head
    assert group.traffic == 3 * image + 1 + weights


@pytest.mark.parametrize("budget", ["macs", "parameters"])
@pytest.mark.parametrize("share", [0.7, 0.5, 0.3])
@pytest.mark.parametrize("scope", ["global", "local"])
def test_a_budget_is_kept_exactly_as_predicted(
    traced: fxprune.TracedModule, budget: str, share: float, scope: str
) -> None:
    report = fxprune.prune.channels(traced, scope=scope, round_to=1, **{budget: share})
    final = _check(traced)
    assert (final.plan.macs, final.plan.parameters) == (report.macs, report.parameters)
    before, after = getattr(report, budget)
    unit = max(getattr(group, budget) for group in fxprune.channel_groups(final) if group.reason is None)
    assert min(0.98 * share * before, share * before - unit) <= after <= share * before


@pytest.mark.parametrize("importance", ["l1", "l2", "linf", "random", "fpgm", lambda group: torch.arange(group.size)])
def test_every_importance_prunes_exactly_removable_channels(traced: fxprune.TracedModule, importance: Any) -> None:
    report = fxprune.prune.channels(traced, amount=0.5, importance=importance, seed=1)
    assert _check(traced).plan.macs == report.macs
    assert report.macs[1] < report.macs[0]


@pytest.mark.parametrize(("importance", "power"), [("l1", 1), ("l2", 2)])
def test_units_with_the_least_mean_over_their_slices_of_weights_go(importance: str, power: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 24, 3), nn.ReLU(), nn.Conv2d(24, 2, 1))
    slices = model[0].weight.flatten(1), model[2].weight[:, :, 0, 0].T
    score = sum(s.double().abs().pow(power).sum(1) for s in slices)
    traced = fxprune.trace(model, (torch.randn(2, 3, 9, 9),), modes=("eval",))
    fxprune.prune.channels(traced, 10, importance=importance, round_to=1)
    gone = (traced.state_dict()["0.bias_mask"] == 0).nonzero().flatten()
    assert gone.tolist() == sorted(score.argsort()[:10].tolist())


class Dense(nn.Module):
    """Two layers, written as a linear layer, as a product added to a bias, or as such products in batches."""

    def __init__(self, form: str, layers: list[nn.Linear]) -> None:
        super().__init__()
        self.form = form
        self.weights = nn.ParameterList([layer.weight.detach().clone() for layer in layers])
        self.biases = nn.ParameterList([layer.bias.detach().clone() for layer in layers])

    def layer(self, i: int, x: torch.Tensor) -> torch.Tensor:
        weight, bias = self.weights[i], self.biases[i]
        if self.form == "linear":
            return nn.functional.linear(x, weight, bias)
        if self.form == "addmm":
            return torch.addmm(bias, x, weight.t())
        return torch.baddbmm(bias, x[None], weight.t()[None])[0]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(1, self.layer(0, x).relu())


@pytest.mark.parametrize("importance", ["l1", "l2", "linf", "fpgm"])
@pytest.mark.parametrize("form", ["addmm", "baddbmm"])
def test_biases_do_not_score_in_whatever_form_a_layer_is_written(form: str, importance: str) -> None:
    torch.manual_seed(0)
    layers = [nn.Linear(4, 8).double(), nn.Linear(8, 3).double()]
    with torch.no_grad():
        layers[0].bias.copy_(torch.tensor([9.0, 0, 0, 0, 0, 9, 9, 9]))  # would keep 0, 5, 6 and 7, did they score
    found = {}
    for written in ("linear", form):
        traced = fxprune.trace(Dense(written, layers), (torch.randn(2, 4).double(),), modes=("eval",))
        fxprune.prune.channels(traced, 4, importance=importance, round_to=1)
        found[written] = (traced.state_dict()["biases.0_mask"] == 0).nonzero().flatten().tolist()
        _close_to_finalized(traced, torch.randn(3, 4).double())
    assert found["linear"] == found[form]
    assert set(found["linear"]) != {1, 2, 3, 4}


def test_what_stays_is_rounded_to_multiples(traced: fxprune.TracedModule) -> None:
    fxprune.prune.channels(traced, amount=0.4, round_to=8)
    final = _check(traced)
    for name in ("stem", "inner", "back"):
        assert final.get_submodule(name).weight.shape[0] % 8 == 0


@pytest.mark.parametrize(
    ("budget", "kept"),
    [
        ({"macs": 0.6}, (32, 24)),
        ({"macs": 0.25}, (16, 16)),
        ({"amount": 0.4}, (16, 32)),
    ],
)
def test_convolutions_keep_whole_blocks_as_long_as_a_budget_allows(
    traced: fxprune.TracedModule, budget: dict[str, Any], kept: tuple[int, int]
) -> None:
    report = fxprune.prune.channels(traced, **budget)
    final = fxprune.finalize(traced)
    assert (final.stem.weight.shape[0], final.inner.weight.shape[0]) == kept
    if "macs" in budget:
        assert final.plan.macs == report.macs
        assert report.macs[1] <= budget["macs"] * report.macs[0]


@pytest.mark.parametrize(("share", "kept"), [(0.6, (16, 16)), (0.5, (16, 13)), (0.3, (9, 14)), (0.2, (7, 11))])
def test_a_budget_that_whole_blocks_cannot_keep_is_cut_finer(share: float, kept: tuple[int, int]) -> None:
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.ReLU(), nn.Conv2d(32, 4, 1)
    traced = fxprune.trace(nn.Sequential(*layers), (torch.randn(2, 3, 9, 9),), modes=("eval",))
    report = fxprune.prune.channels(traced, macs=share)
    final = fxprune.finalize(traced)
    assert final.plan.macs == report.macs
    assert (final.get_submodule("0").weight.shape[0], final.get_submodule("2").weight.shape[0]) == kept


@pytest.mark.parametrize(("rounding", "kept"), [("auto", (160, 96)), (16, (144, 112))])
def test_slow_macs_go_first_where_the_rounding_is_free(rounding: Any, kept: tuple[int, int]) -> None:
    """A depthwise layer moves much memory for few MACs, a pointwise one the other way round."""
    torch.manual_seed(0)
    light = nn.Conv2d(3, 192, 1), nn.Conv2d(192, 192, 3, groups=192), nn.ReLU()
    heavy = nn.Conv2d(192, 256, 1), nn.ReLU(), nn.Conv2d(256, 64, 1)
    traced = fxprune.trace(nn.Sequential(*light, *heavy), (torch.randn(2, 3, 9, 9),), modes=("eval",))
    report = fxprune.prune.channels(traced, macs=0.4, scope="local", round_to=rounding)
    final = fxprune.finalize(traced)
    assert 0.37 < final.plan.macs[1] / final.plan.macs[0] == report.macs[1] / report.macs[0] <= 0.4
    assert (final.get_submodule("3").weight.shape[0], final.get_submodule("0").weight.shape[0]) == kept


class Encoder(nn.Module):
    """Attention of four heads and an MLP around a normalized stream, which must stay."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.qkv = nn.Linear(16, 96)
        self.out = nn.Linear(32, 16)
        self.up = nn.Linear(16, 40)
        self.down = nn.Linear(40, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4).unbind(0)
        y = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.out(y)
        return x + self.down(self.up(self.norm(x)).relu())


@pytest.mark.parametrize("kinds", ["attention head", ("attention head", "MLP unit"), "head channel", None])
def test_kinds_choose_groups(kinds: Any) -> None:
    torch.manual_seed(0)
    traced = fxprune.trace(Encoder().double(), (torch.randn(2, 5, 16).double(),), modes=("eval",))
    report = fxprune.prune.channels(traced, amount=0.5, scope="local", kinds=kinds)
    chosen = {name.split("(")[1].split(")")[0] for name, (gone, _) in report.removed.items() if gone}
    every = {"attention head", "head channel", "MLP unit"}
    assert chosen == (every if kinds is None else {kinds} if isinstance(kinds, str) else set(kinds))
    final, x = fxprune.finalize(traced), torch.randn(3, 5, 16).double()
    assert final.plan.macs == report.macs
    assert (traced(x) - final(x)).abs().max() <= 1e-9


def test_what_is_masked_in_other_groups_counts_too() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).double().eval()
    traced = fxprune.trace(layer, (torch.randn(2, 4, 8).double(),), modes=("eval",))
    for kind in ("attention head", "head channel"):
        report = fxprune.prune.channels(traced, 0.5, kinds=kind, round_to=1)
        assert fxprune.finalize(traced, align=1).plan.macs == report.macs


def test_what_is_masked_in_a_group_that_is_not_asked_for_counts_and_stays_as_it_is(
    traced: fxprune.TracedModule,
) -> None:
    fxprune.prune.channels(traced, 0.5, targets="inner", round_to=1)
    fxprune.prune.remove(traced, "depthwise.bias")
    with torch.no_grad():
        traced.get_parameter("depthwise.bias").fill_(1.0)  # of masked units too: constants, which finalize folds
    mask = traced.get_buffer("depthwise.weight_mask").clone()
    report = fxprune.prune.channels(traced, macs=0.4, targets="stem", round_to=1)
    assert report.macs[1] <= 0.4 * report.macs[0]
    assert list(report.removed) == ["stem.weight (channel)"]
    assert not fxprune.prune.is_pruned(traced, "depthwise.bias")
    assert torch.equal(traced.get_buffer("depthwise.weight_mask"), mask)
    assert _check(traced).plan.macs == report.macs


class GroupedQueries(nn.Module):
    """Eight query heads that share two key-value heads, in the ways models write it."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        self.q, self.k, self.v, self.out = nn.Linear(16, 32), nn.Linear(16, 8), nn.Linear(16, 8), nn.Linear(32, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (layer(x).unflatten(2, (-1, 4)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        if self.form == "repeat":
            k, v = k.repeat_interleave(4, 1), v.repeat_interleave(4, 1)
        elif self.form == "expand":
            k, v = (t[:, :, None].expand(-1, -1, 4, -1, -1).flatten(1, 2) for t in (k, v))
        y = nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=self.form == "gqa")
        return x + self.out(y.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("form", ["repeat", "expand", "gqa"])
@pytest.mark.parametrize(
    ("kind", "q", "kv"), [("key-value group", 16, 4), ("attention head", 16, 8), ("head channel", 16, 4)]
)
def test_heads_that_share_keys_and_values_go_in_every_way(form: str, kind: str, q: int, kv: int) -> None:
    torch.manual_seed(0)
    traced = fxprune.trace(GroupedQueries(form).double(), (torch.randn(2, 5, 16).double(),), modes=("eval",))
    report = fxprune.prune.channels(traced, amount=0.5, kinds=kind, scope="local")
    final, x = fxprune.finalize(traced), torch.randn(3, 5, 16).double()
    assert final.plan.macs == report.macs
    assert (final.q.weight.shape[0], final.k.weight.shape[0], final.v.weight.shape[0]) == (q, kv, kv)
    assert (traced(x) - final(x)).abs().max() <= 1e-9


@pytest.mark.filterwarnings("ignore::fxprune.errors.EvalConstantWarning")
@pytest.mark.parametrize("words", [False, True])
@pytest.mark.parametrize("seed", [*range(3), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(3, 40))])
def test_what_is_chosen_in_a_random_network_goes_as_predicted(seed: int, words: bool) -> None:
    model, sample = network(seed, words)
    with torch.no_grad():
        for p in model.parameters():  # it comes with rows of zeros
            p += 0.1 * torch.randn_like(p)
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0  # a smaller tensor draws other numbers
    traced = fxprune.trace(model, (sample(2),))
    dense = fxprune.finalize(traced, align=1).plan.macs
    report = fxprune.prune.channels(traced, amount=0.5, round_to=1, scope="global" if seed % 2 else "local")
    final = fxprune.finalize(traced, align=1)
    if dense[0] == dense[1]:  # else finalize finds more, such as channels that are padded with zeros
        assert (final.plan.macs, final.plan.parameters) == (report.macs, report.parameters)
    assert final.plan.macs[1] <= report.macs[1] < report.macs[0]
    for batch, training in ((1, False), (3, False), (4, not final.plan.eval_only)):
        x = sample(batch)
        want, got = (m.train(training)(x) for m in (traced, final))
        assert (want - got).abs().max() <= 1e-9 * want.abs().max()


@pytest.mark.parametrize("importance", ["l2", "random", "fpgm", "bn"])
@pytest.mark.parametrize(("first", "then"), [(0.7, 0.4), (0.4, 0.7)])
def test_what_is_masked_already_counts(
    traced: fxprune.TracedModule, importance: str, first: float, then: float
) -> None:
    before = fxprune.prune.channels(traced, macs=first, importance=importance, round_to=1, seed=0)
    report = fxprune.prune.channels(traced, macs=then, importance=importance, round_to=1, seed=1)
    assert report.macs == before.macs if then > first else report.macs[1] <= then * report.macs[0]
    assert all(gone >= before.removed[name][0] for name, (gone, _) in report.removed.items())
    assert _check(traced).plan.macs == report.macs


def test_groups_compare_by_what_is_left_of_them() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Conv2d(64 if i else 1, 64, 1, bias=False) for i in range(5)))
    traced = fxprune.trace(model, (torch.randn(2, 1, 2, 2),), modes=("eval",))
    for amount, targets in ((24, "1"), (0.5, None)):
        report = fxprune.prune.channels(traced, amount, targets=targets, round_to=1)
    assert sum(gone for gone, _ in report.removed.values()) == 128
    assert report.removed["1.weight (channel)"][0] > 32  # 24, did the mean of its scores count what is gone


def _two_scales() -> fxprune.TracedModule:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    return fxprune.trace(model, torch.randn(2, 4), modes=("eval",))


@pytest.mark.parametrize(("normalize", "gone"), [(None, (7, 1)), (False, (7, 1)), (True, (4, 4))])
def test_a_function_is_compared_across_groups_as_it_is(normalize: bool | None, gone: tuple[int, int]) -> None:
    def importance(group: fxprune.channels.groups.ChannelGroup) -> torch.Tensor:
        return torch.arange(1.0, 1 + group.size) * (1 if group.name == "0.weight" else 100)

    report = fxprune.prune.channels(_two_scales(), 8, importance=importance, normalize=normalize)
    assert tuple(n for n, _ in report.removed.values()) == gone


@pytest.mark.parametrize(("normalize", "even"), [(None, True), (True, True), (False, False)])
def test_norms_are_divided_by_the_mean_of_their_group(normalize: bool | None, even: bool) -> None:
    traced = _two_scales()
    with torch.no_grad():
        traced.get_parameter("4.weight").mul_(100)
    report = fxprune.prune.channels(traced, 7, importance="l1", normalize=normalize)
    counts = [n for n, _ in report.removed.values()]
    assert (min(counts) > 0) == even


def test_targets_and_ignore_choose_groups(traced: fxprune.TracedModule) -> None:
    fxprune.prune.channels(traced, amount=0.5, targets="inner", round_to=1)
    assert fxprune.prune.is_pruned(traced, "inner.weight")
    assert not fxprune.prune.is_pruned(traced, "stem.weight")
    fxprune.prune.channels(traced, amount=0.25, ignore=["depthwise"], round_to=1)
    assert fxprune.prune.is_pruned(traced, "stem.weight")
    _check(traced)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"amount": 0.5, "speedup": 2.0}, ArgumentError, "one budget at a time.*amount=0.5 and speedup=2.0"),
        ({"macs": 0.5, "speedup": 0.5}, ArgumentError, "speedup=0.5: a speedup is a factor"),
        ({"macs": 0.5, "parameters": 1.5}, ArgumentError, "parameters=1.5"),
        ({"macs": 0.9, "parameters": 0.0001}, PruningError, "parameters=0.0001 cannot be reached.*best"),
        ({"macs": 0.0001, "parameters": 0.9}, PruningError, "macs=0.0001 cannot be reached.*best"),
        ({"amount": None}, ArgumentError, "no budget"),
        ({"amount": "half"}, ArgumentTypeError, "half"),
        ({"macs": 1.5}, ArgumentError, "macs"),
        ({"importance": "luck"}, ArgumentError, "luck"),
        ({"importance": lambda group: torch.full((group.size,), torch.nan)}, PruningError, "NaN"),
        ({"importance": lambda group: None}, PruningError, "NoneType"),
        ({"importance": "taylor"}, FxpruneError, "loader"),
        ({"amount": 0.5, "at_least": 100}, PruningError, "at_least"),
        ({"targets": "nothing.*"}, NameLookupError, "nothing"),
        ({"ignore": ["stem", "inner"]}, PruningError, "group"),
        ({"macs": 0.0001}, PruningError, r"best is .*\. Raise macs\. What must stay .*fxprune groups"),
        ({"macs": 0.5, "max_per_group": 0.1}, PruningError, r"Raise macs or loosen max_per_group=0\.1\."),
        ({"macs": 0.01, "max_per_group": 0.9, "at_least": 3}, PruningError, "max_per_group=0.9 and at_least=3"),
        ({"kinds": ("channel", "head")}, NameLookupError, "head.*channel"),
        ({"normalize": "group"}, ArgumentError, "normalize"),
        ({"round_to": 64}, ArgumentError, "64"),
        ({"scope": "some"}, ArgumentError, "scope"),
    ],
)
def test_bad_requests_are_refused_and_insert_no_mask(
    traced: fxprune.TracedModule, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        fxprune.prune.channels(traced, **options)
    assert not fxprune.prune.is_pruned(traced)


def test_what_a_choice_leaves_is_counted_without_another_copy_of_the_weights(
    captured: fxprune.TracedModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    traced = copy.deepcopy(captured)
    own = {id(parameter) for parameter in traced.parameters()}
    before = {name: value.clone() for name, value in traced.named_parameters()}
    counted = []
    finalize = driver.finalize

    def watched(module: fxprune.TracedModule) -> fxprune.TracedModule:
        counted.append({id(parameter) for parameter in module.parameters()} == own)
        return finalize(module)

    monkeypatch.setattr(driver, "finalize", watched)
    monkeypatch.setattr(channel_choice, "classes_left", lambda *_: None)  # it cannot be said by the graphs alone
    report = fxprune.prune.channels(copy.deepcopy(traced), macs=0.5)
    assert not counted  # shapes tell it
    monkeypatch.setattr(channel_choice, "sizes_left", lambda *_, **__: None)  # nor by an analysis of them
    assert fxprune.prune.channels(traced, macs=0.5).to_dict() == report.to_dict()
    assert counted
    assert all(counted)
    for name, value in before.items():
        held = traced.get_parameter(name if name in dict(traced.named_parameters()) else f"{name}_orig")
        assert torch.equal(held, value)


class Returned(nn.Module):
    """Everything is returned, and the rows of a table are looked up."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.layers = nn.Embedding(9, 4), nn.ModuleList(nn.Linear(4, 5) for _ in range(2))

    def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x = self.table(ids)
        return x, *(layer(x) for layer in self.layers)


def test_a_refusal_says_first_why_most_groups_stay() -> None:
    traced = fxprune.trace(Returned(), torch.randint(9, (2, 3)), modes=("eval",))
    with pytest.raises(PruningError, match=r"`output` .*returns it; `embedding` .*by data\.$"):
        fxprune.prune.channels(traced, 0.5)


class _Unread(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.aside = nn.Linear(8, 32), nn.Linear(32, 4), nn.Linear(20, 20)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return cast(torch.Tensor, self.down(self.up(x).relu()))


@pytest.mark.parametrize("budget", [{"macs": 0.5}, {"parameters": 0.3}, {"parameters": 0.9}])
def test_parameters_that_nothing_reads_are_gone_in_the_report_as_in_the_result(budget: dict[str, float]) -> None:
    traced = fxprune.trace(_Unread().eval(), torch.randn(2, 8), modes=("eval",))
    report = fxprune.prune.channels(traced, round_to=1, **budget)
    plan = fxprune.finalize(traced).plan
    assert plan is not None
    assert (plan.macs, plan.parameters) == (report.macs, report.parameters)
    assert report.parameters[0] == 8 * 32 + 32 + 32 * 4 + 4 + 20 * 20 + 20
