"""`optimizer_after`: training the small module goes on as the masked one would have, step for step."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import fxprune
from fxprune.errors import ArgumentError, ArgumentTypeError
from tests.networks import Residual, mlp

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, weight_decay=1e-3),
    "nesterov": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, nesterov=True, weight_decay=1e-2),
    "adam": lambda p: torch.optim.Adam(p, 0.01, weight_decay=1e-3),
    "amsgrad": lambda p: torch.optim.Adam(p, 0.01, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.01, centered=True, momentum=0.5),
    # biases before a batch norm and of keys have a gradient of zero but for rounding, which the default eps blows up
    "adagrad": lambda p: torch.optim.Adagrad(p, 0.05, lr_decay=0.01, eps=1e-6),
}


class Depthwise(nn.Module):
    """Depthwise and grouped convolutions between plain ones."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12)
        self.depth, self.depth_norm = nn.Conv2d(12, 12, 3, padding=1, groups=12), nn.BatchNorm2d(12)
        self.point = nn.Conv2d(12, 16, 1)
        self.grouped = nn.Conv2d(16, 8, 3, groups=4)
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.stem(x)).relu()
        x = self.point(self.depth_norm(self.depth(x)).relu()).relu()
        return self.head(self.grouped(x).relu().mean((2, 3)))


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.out = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.layer(self.embed(x)).mean(1))


class Plain(Residual):
    """Without random numbers, which the smaller activations would draw fewer of."""

    def __init__(self) -> None:
        super().__init__()
        self.drop.p = 0.0


NETS: dict[str, tuple[type[nn.Module], tuple[int, ...]]] = {
    "residual": (Plain, (3, 6, 6)),
    "depthwise": (Depthwise, (3, 6, 6)),
    "transformer": (Transformer, (4, 6)),
}


@pytest.fixture(scope="module")
def pruned() -> dict[str, fxprune.TracedModule]:
    """Captured in float64 and masked by whole groups."""
    found = {}
    for key, (build, shape) in NETS.items():
        torch.manual_seed(0)
        found[key] = fxprune.trace(build().double(), (torch.randn(4, *shape).double(),))
        fxprune.prune.channels(found[key], amount=0.5, round_to=1)
    return found


def _step(module: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    optimizer.zero_grad()
    out = module(x)
    nn.functional.cross_entropy(out, y).backward()
    optimizer.step()
    return out.detach()


def _batches(shape: tuple[int, ...], count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(torch.randn(8, *shape).double(), torch.randint(5, (8,))) for _ in range(count)]


def _value(traced: fxprune.TracedModule, name: str) -> torch.Tensor:
    state = traced.state_dict()
    return state[f"{name}_orig"] * state[f"{name}_mask"] if f"{name}_mask" in state else state[name]


def _assert_close(got: torch.Tensor, want: torch.Tensor) -> None:
    assert got.shape == want.shape
    assert (got - want).abs().max() <= 1e-9 * want.abs().max()


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("key", NETS)
def test_steps_after_finalize_equal_those_of_the_masked_module(
    pruned: dict[str, fxprune.TracedModule], key: str, kind: str
) -> None:
    traced, shape = copy.deepcopy(pruned[key]).train(), NETS[key][1]
    optimizer = OPTIMIZERS[kind](traced.parameters())
    for x, y in _batches(shape, 3):
        _step(traced, optimizer, x, y)
    final = fxprune.finalize(traced, align=1)
    after = fxprune.optimizer_after(final, optimizer)
    assert type(after) is type(optimizer)
    assert sum(p.numel() for p in final.parameters()) < 0.8 * sum(p.numel() for p in traced.parameters())
    for x, y in _batches(shape, 6):
        _assert_close(_step(final, after, x, y), _step(traced, optimizer, x, y))
    for name, value in final.state_dict().items():
        _assert_close(value.double(), final.plan.slice(name, _value(traced, name)).double())
    assert after.state_dict()["state"].keys() == optimizer.state_dict()["state"].keys()


def test_groups_options_and_names_are_kept(pruned: dict[str, fxprune.TracedModule]) -> None:
    traced = copy.deepcopy(pruned["residual"]).train()
    frozen = traced.get_submodule("head").bias
    frozen.requires_grad_(False)
    weights = [(n, p) for n, p in traced.named_parameters() if p.dim() > 1]
    others = [(n, p) for n, p in traced.named_parameters() if p.dim() == 1 and p is not frozen]
    optimizer = torch.optim.AdamW(
        [{"params": weights, "weight_decay": 0.3, "initial_lr": 0.5}, {"params": others, "lr": 0.2}], 0.1
    )
    after = fxprune.optimizer_after(final := fxprune.finalize(traced, align=1), optimizer)
    names = {p: n for n, p in final.named_parameters()}
    for group, old in zip(after.param_groups, optimizer.param_groups, strict=True):
        assert {k: v for k, v in group.items() if "param" not in k} == {
            k: v for k, v in old.items() if "param" not in k
        }
        assert group["param_names"] == [n.removesuffix("_orig") for n in old["param_names"]]
        assert [names[p] for p in group["params"]] == group["param_names"]
    assert after.defaults == optimizer.defaults
    assert not final.get_submodule("head").bias.requires_grad


def test_the_old_optimizer_stays_as_it_was(pruned: dict[str, fxprune.TracedModule]) -> None:
    traced = copy.deepcopy(pruned["residual"]).train()
    optimizer = OPTIMIZERS["adam"](traced.parameters())
    _step(traced, optimizer, *_batches((3, 6, 6), 1)[0])
    before = copy.deepcopy(optimizer.state_dict())
    final = fxprune.finalize(traced, align=1)
    after = fxprune.optimizer_after(final, optimizer)
    _step(final, after, *_batches((3, 6, 6), 1)[0])
    for index, state in optimizer.state_dict()["state"].items():
        assert all(torch.equal(value, before["state"][index][key]) for key, value in state.items())


def test_a_tensor_as_learning_rate_and_state_of_its_own_are_copied(pruned: dict[str, fxprune.TracedModule]) -> None:
    traced = copy.deepcopy(pruned["residual"])
    optimizer = torch.optim.SGD(traced.parameters(), torch.tensor(0.1), momentum=0.9, foreach=False)
    source = traced.get_submodule("stem").weight_orig
    optimizer.state[source] = {"note": ["kept"], "scalar": torch.tensor(3.0), "like": torch.ones_like(source)}
    final = fxprune.finalize(traced, align=1)
    after = fxprune.optimizer_after(final, optimizer)
    weight = final.get_submodule("stem").weight
    assert after.state[weight]["like"].shape == weight.shape != source.shape
    assert after.state[weight]["note"] == ["kept"]
    assert after.state[weight]["note"] is not optimizer.state[source]["note"]
    assert after.state[weight]["scalar"] == 3
    assert after.param_groups[0]["lr"] is not optimizer.param_groups[0]["lr"]


def test_live_constants_that_were_folded_are_named_and_the_new_bias_joins_its_layer() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Sigmoid(), nn.Linear(8, 4, bias=False)).double()
    traced = fxprune.trace(model, (torch.randn(2, 6).double(),))
    fxprune.prune.ln_structured(traced, "0.weight", amount=0.5, n=2, dim=0)  # biases live: constants after the sigmoid
    first, second = traced.get_submodule("0"), traced.get_submodule("2")
    optimizer = torch.optim.SGD([{"params": first.parameters()}, {"params": second.parameters(), "lr": 0.3}], 0.1, 0.9)
    _step(traced, optimizer, torch.randn(5, 6).double(), torch.randint(4, (5,)))
    final = fxprune.finalize(traced, align=1)
    assert final.plan.added == {"2.bias": "2.weight"}
    with pytest.warns(fxprune.FxpruneWarning, match=r"2, 2.weight: constants that training would have changed"):
        after = fxprune.optimizer_after(final, optimizer)
    assert [len(group["params"]) for group in after.param_groups] == [2, 2]
    bias = final.get_submodule("2").bias
    assert after.param_groups[1]["params"][1] is bias
    assert bias not in after.state
    _step(final, after, torch.randn(5, 6).double(), torch.randint(4, (5,)))


def test_what_was_dead_by_the_values_of_weights_is_named_and_can_be_kept() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Sigmoid(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2)).double()
    with torch.no_grad():
        model[2].weight[0], model[2].bias[0] = -0.01, -0.001
    x = torch.randn(8, 4).double()
    traced = fxprune.trace(model, x)
    optimizer = torch.optim.SGD(traced.parameters(), lr=0.1, momentum=0.9)
    traced(x).sum().backward()
    optimizer.step()
    optimizer.state[model[2].bias]["momentum_buffer"][0] = -1.0  # brings it back
    gone = fxprune.finalize(traced, align=1)
    assert gone.plan is not None
    assert set(gone.plan.by_range) == {"2.weight", "2.bias"}
    assert fxprune.ChannelPlan.from_json(gone.plan.to_json()).by_range == gone.plan.by_range
    with pytest.warns(fxprune.FxpruneWarning, match=r"2\.weight, 2\.bias: dead by the range"):
        fxprune.optimizer_after(gone, optimizer)
    final = fxprune.finalize(traced, align=1, keep_for_training=True).train()
    after = fxprune.optimizer_after(final, optimizer)
    for _ in range(3):
        for module, its in ((traced, optimizer), (final, after)):
            its.zero_grad()
            module(x).square().sum().backward()
            its.step()
    assert torch.equal(traced(x), final(x))
    assert traced(x).ne(gone(x)).any()


def test_masked_entries_that_stay_are_named_and_go_on_under_the_same_masks(
    pruned: dict[str, fxprune.TracedModule],
) -> None:
    traced = copy.deepcopy(pruned["residual"]).train()
    fxprune.prune.l1_unstructured(traced, "head.weight", amount=0.3)
    optimizer = OPTIMIZERS["adam"](traced.parameters())
    first, *rest = _batches((3, 6, 6), 5)
    _step(traced, optimizer, *first)
    final = fxprune.finalize(traced, shrink=False)
    with pytest.warns(fxprune.FxpruneWarning, match=r"stem.weight.*head.weight.*: what masks held at zero stayed"):
        after = fxprune.optimizer_after(final, optimizer)
    masks = {name.removesuffix("_mask"): mask for name, mask in traced.named_buffers() if name.endswith("_mask")}
    for x, y in rest:
        _assert_close(_step(final, after, x, y), _step(traced, optimizer, x, y))
        with torch.no_grad():
            for name, parameter in final.named_parameters():
                parameter.mul_(masks.get(name, 1))


def test_a_module_finalized_twice_goes_on_by_the_second_plan(pruned: dict[str, fxprune.TracedModule]) -> None:
    once = fxprune.finalize(pruned["residual"], align=1).train()
    optimizer = OPTIMIZERS["adam"](once.parameters())
    _step(once, optimizer, *_batches((3, 6, 6), 1)[0])
    twice = fxprune.finalize(once, shrink=False)  # its plan is still the first one, and nothing is to be cut by it
    assert twice.plan is once.plan
    after = fxprune.optimizer_after(twice, optimizer)
    assert all(s["exp_avg"].shape == p.shape for p, s in after.state.items())
    fxprune.prune.channels(once, amount=0.5, round_to=1)
    optimizer = OPTIMIZERS["adam"](once.parameters())
    for x, y in _batches((3, 6, 6), 2):
        _step(once, optimizer, x, y)
    final = fxprune.finalize(once, align=1)
    after = fxprune.optimizer_after(final, optimizer)
    for x, y in _batches((3, 6, 6), 3):
        _assert_close(_step(final, after, x, y), _step(once, optimizer, x, y))


def test_what_a_norm_computes_starts_with_fresh_state_and_is_named() -> None:
    traced = fxprune.trace(mlp(), (torch.randn(4, 6),))
    fxprune.weight_norm(traced, "0.weight")
    optimizer = torch.optim.SGD(traced.parameters(), 0.1, 0.9)
    _step(traced, optimizer, torch.randn(8, 6), torch.randint(4, (8,)))
    final = fxprune.finalize(traced)
    with pytest.warns(fxprune.FxpruneWarning, match=r"0.weight: fresh state"):
        after = fxprune.optimizer_after(final, optimizer)
    weight = final.get_submodule("0").weight
    assert [p for p in after.param_groups[0]["params"] if p is weight] == [weight]
    assert weight not in after.state
    assert len(after.state) == len(optimizer.state) - 2


def test_state_that_spans_parameters_starts_afresh(pruned: dict[str, fxprune.TracedModule]) -> None:
    traced = copy.deepcopy(pruned["transformer"])
    optimizer = torch.optim.LBFGS(traced.parameters(), lr=0.1, max_iter=2)
    x, y = _batches((4, 6), 1)[0]

    def closure(module: nn.Module, optimizer: torch.optim.Optimizer) -> Callable[[], torch.Tensor]:
        def run() -> torch.Tensor:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(module(x), y)
            loss.backward()
            return loss

        return run

    optimizer.step(closure(traced, optimizer))
    final = fxprune.finalize(traced)
    with pytest.warns(fxprune.FxpruneWarning, match="fresh state"):
        after = fxprune.optimizer_after(final, optimizer)
    after.step(closure(final, after))
    assert isinstance(after, torch.optim.LBFGS)


def test_folded_batch_norms_are_named(pruned: dict[str, fxprune.TracedModule]) -> None:
    traced = copy.deepcopy(pruned["residual"])
    optimizer = OPTIMIZERS["sgd"](traced.parameters())
    final = fxprune.finalize(traced, fold_batch_norm=True)
    with pytest.warns(fxprune.FxpruneWarning, match="norm.weight, norm.bias.*batch norms were folded"):
        after = fxprune.optimizer_after(final, optimizer)
    assert sum(len(g["params"]) for g in after.param_groups) <= len(list(final.parameters()))


def test_a_tied_parameter_that_became_two_is_named() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
    model[2].weight = model[0].weight
    traced = fxprune.trace(model, (torch.randn(2, 6),))
    fxprune.prune.l1_unstructured(traced, "0.weight", amount=0.5)
    optimizer = OPTIMIZERS["sgd"](traced.parameters())
    with pytest.warns(
        fxprune.FxpruneWarning, match="0.weight and 2.weight: one parameter before, two now.*0.weight: w"
    ):
        fxprune.optimizer_after(fxprune.finalize(traced), optimizer)


def test_what_it_cannot_continue_is_refused(pruned: dict[str, fxprune.TracedModule]) -> None:
    traced = pruned["residual"]
    optimizer = OPTIMIZERS["sgd"](traced.parameters())
    final = fxprune.finalize(traced)
    with pytest.raises(ArgumentError, match="does not come from fxprune.finalize"):
        fxprune.optimizer_after(traced, optimizer)
    with pytest.raises(ArgumentTypeError, match="got Residual and SGD"):
        fxprune.optimizer_after(Residual(), optimizer)  # type: ignore[arg-type]
    with pytest.raises(ArgumentTypeError, match="got TracedModule and list"):
        fxprune.optimizer_after(final, [])  # type: ignore[arg-type]
    other = torch.optim.SGD(nn.Linear(3, 2).parameters(), 0.1)
    with pytest.raises(ArgumentError, match=r"2 of the optimizer's 2 parameters, such as one of shape \(2, 3\)"):
        fxprune.optimizer_after(final, other)
    with pytest.raises(ArgumentError, match="none of the module that was finalized: use it"):
        fxprune.optimizer_after(final, OPTIMIZERS["sgd"](final.parameters()))

    class Odd(torch.optim.SGD):
        def __init__(self, params: Any, secret: int) -> None:
            super().__init__(params, 0.1)

    with pytest.raises(ArgumentError, match=r"Odd cannot be built from its options \{\}"):
        fxprune.optimizer_after(final, Odd(traced.parameters(), 1))


def test_no_warning_where_masks_are_whole_groups(pruned: dict[str, fxprune.TracedModule]) -> None:
    traced = pruned["depthwise"]
    final = fxprune.finalize(traced, align=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fxprune.optimizer_after(final, OPTIMIZERS["adam"](traced.parameters()))
