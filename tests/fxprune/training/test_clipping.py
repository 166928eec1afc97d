"""Clipping around an optimizer's step, against torch's own functions called by hand in the loop."""

from __future__ import annotations

import copy
import doctest
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, clip_grad_value_

from fxprune.errors import ArgumentError, ArgumentTypeError, FxpruneError
from fxprune.training import clipping
from fxprune.training.clipping import clip_gradients

LIMITS: list[dict[str, float]] = [{"max_norm": 0.5}, {"clip_value": 0.1}, {"max_norm": 2.0, "clip_value": 0.1}]
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "sgd-fused": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "adagrad-fused": lambda p: torch.optim.Adagrad(p, lr=0.01, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5),
}
FUSED = [name for name in OPTIMIZERS if name.endswith("fused")]


class Run:
    """A small network and its optimizer; two runs built alike draw the same weights and batches."""

    def __init__(self, name: str = "sgd", dtype: torch.dtype = torch.float32) -> None:
        generator = torch.Generator().manual_seed(0)
        self.model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).to(dtype)
        for p in self.model.parameters():
            p.data.copy_(torch.randn(p.shape, generator=generator))
        self.batches = [10 * torch.randn(4, 5, generator=generator).to(dtype) for _ in range(4)]
        self.optimizer = OPTIMIZERS[name](self.model.parameters())

    def loss(self, batch: Tensor) -> Tensor:
        return self.model(batch).square().sum()

    def train(self, clip: Callable[[], object] = lambda: None) -> Run:
        for batch in self.batches:
            self.optimizer.zero_grad()
            self.loss(batch).backward()
            clip()
            self.optimizer.step()
        return self

    def by_hand(self, max_norm: float | None = None, clip_value: float | None = None, **options: Any) -> Tensor | None:
        total = None if max_norm is None else clip_grad_norm_(self.model.parameters(), max_norm, **options)
        if clip_value is not None:
            clip_grad_value_(self.model.parameters(), clip_value, options.get("foreach"))
        return total

    def assert_same(self, other: Run) -> None:
        for p, q in zip(self.model.parameters(), other.model.parameters(), strict=True):
            assert torch.equal(p, q)


def leaf(*gradient: float) -> nn.Parameter:
    p = nn.Parameter(torch.zeros(len(gradient)))
    p.grad = torch.tensor(gradient)
    return p


@pytest.mark.parametrize("foreach", [None, True, False])
@pytest.mark.parametrize("norm_type", [2.0, 1, 0, 0.5, 1.5, 4, -1.0, "inf", float("inf")])
def test_every_norm_type_is_bit_equal_to_torch(norm_type: float | str, foreach: bool | None) -> None:
    ours, theirs, norms = Run(), Run(), []
    clip = clip_gradients(ours.optimizer, max_norm=0.5, norm_type=norm_type, foreach=foreach)
    ours.train()
    theirs.train(lambda: norms.append(theirs.by_hand(0.5, norm_type=norm_type, foreach=foreach)))
    ours.assert_same(theirs)
    assert torch.equal(clip.total_norm, norms[-1])
    assert not clip.total_norm.requires_grad


@pytest.mark.parametrize("limits", LIMITS, ids=str)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_is_bit_equal_to_clipping_by_hand(name: str, limits: dict[str, float]) -> None:
    ours, theirs, free = Run(name), Run(name), Run(name).train()
    clip_gradients(ours.optimizer, **limits)
    ours.train().assert_same(theirs.train(lambda: theirs.by_hand(**limits)))
    assert not torch.equal(ours.model[0].weight, free.model[0].weight)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_precisions_are_bit_equal(dtype: torch.dtype) -> None:
    ours, theirs = Run(dtype=dtype), Run(dtype=dtype)
    clip_gradients(ours.optimizer, max_norm=0.5)
    ours.train().assert_same(theirs.train(lambda: theirs.by_hand(0.5)))


@settings(deadline=None, max_examples=60)
@given(
    shapes=st.lists(st.lists(st.integers(0, 4), max_size=3), min_size=1, max_size=5),
    without_gradient=st.integers(0, 31),
    limit=st.one_of(st.just(0.0), st.just(float("inf")), st.floats(1e-3, 10.0)),
    norm_type=st.one_of(st.sampled_from([0.0, 1.0, 2.0, float("inf"), "inf", -1.0]), st.floats(0.3, 6.0)),
    foreach=st.sampled_from([None, True, False]),
    by_value=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_gradients_are_clipped_as_torch_does(
    shapes: list[list[int]],
    without_gradient: int,
    limit: float,
    norm_type: float | str,
    foreach: bool | None,
    by_value: bool,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    ours = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    for index, p in enumerate(ours):
        p.grad = None if without_gradient >> index & 1 else torch.randn_like(p)
    theirs = copy.deepcopy(ours)
    for p, q in zip(theirs, ours, strict=True):
        p.grad = None if q.grad is None else q.grad.clone()
    gradients = [p.grad for p in theirs if p.grad is not None]
    without_empty = float(norm_type) < 0 or float(norm_type) == float("inf")
    if without_empty and any(g.numel() == 0 for g in gradients):
        return  # torch has no such norm of an empty tensor
    optimizer = torch.optim.SGD([{"params": ours[:2]}, {"params": ours[2:]}], lr=0.0)
    limits: dict[str, float] = {"clip_value" if by_value else "max_norm": limit}
    clip = clip_gradients(optimizer, norm_type=norm_type, foreach=foreach, **limits)
    optimizer.step()
    if not by_value:
        torch.testing.assert_close(
            clip.total_norm, clip_grad_norm_(theirs, limit, norm_type, foreach=foreach), rtol=0, atol=0, equal_nan=True
        )
    elif gradients:
        clip_grad_value_(theirs, limit, foreach)
    for p, q in zip(ours, theirs, strict=True):
        assert (p.grad is None) == (q.grad is None)
        if q.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("keyword", [False, True])
@pytest.mark.parametrize("line_search", [None, "strong_wolfe"])
def test_lbfgs_gradients_are_clipped_after_every_evaluation_of_the_closure(
    line_search: str | None, keyword: bool
) -> None:
    def train(run: Run, clip: Callable[[], object] = lambda: None) -> int:
        evaluations = 0
        optimizer = torch.optim.LBFGS(run.model.parameters(), lr=0.5, max_iter=5, line_search_fn=line_search)
        handle = clip_gradients(optimizer, max_norm=0.5) if run is ours else None
        for batch in run.batches:

            def closure(batch: Tensor = batch) -> Tensor:
                nonlocal evaluations
                if handle is not None and evaluations:
                    assert clip_grad_norm_(run.model.parameters(), float("inf")) <= 0.50001
                optimizer.zero_grad()
                loss = run.loss(batch)
                loss.backward()
                clip()
                evaluations += 1
                return loss

            assert optimizer.step(**{"closure": closure}) if keyword else optimizer.step(closure)
        return evaluations

    ours, theirs, free = Run(), Run(), Run()
    assert train(ours) == train(theirs, lambda: theirs.by_hand(0.5)) > 2 * len(ours.batches)
    train(free)
    ours.assert_same(theirs)
    assert not torch.equal(ours.model[0].weight, free.model[0].weight)


@pytest.mark.parametrize("keyword", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_closures_of_other_optimizers_are_clipped_once(name: str, keyword: bool) -> None:
    ours, theirs = Run(name), Run(name)
    clip = clip_gradients(ours.optimizer, max_norm=0.5)
    for batch in ours.batches:

        def closure(batch: Tensor = batch) -> Tensor:
            ours.optimizer.zero_grad()
            loss = ours.loss(batch)
            loss.backward()
            return loss

        loss = ours.optimizer.step(**{"closure": closure}) if keyword else ours.optimizer.step(closure)
        assert isinstance(loss, Tensor)
    norms: list[Any] = []
    ours.assert_same(theirs.train(lambda: norms.append(theirs.by_hand(0.5))))
    assert torch.equal(clip.total_norm, norms[-1])


def test_a_closure_of_none_is_no_closure() -> None:
    p = leaf(3.0, 4.0)
    optimizer = torch.optim.SGD([p], lr=1.0)
    with clip_gradients(optimizer, max_norm=1.0):
        optimizer.step(closure=None)
        optimizer.step(None)
    assert p.grad.norm() <= 1.00001


def scaled_training(run: Run, scale: float, *, unscale: bool, clip: Callable[[], object] = lambda: None) -> Run:
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=2)
    for index, batch in enumerate(run.batches):
        run.optimizer.zero_grad()
        scaler.scale(run.loss(batch)).backward()
        if index == 1:
            run.model[0].weight.grad[0, 0] = float("inf")
        if unscale:
            scaler.unscale_(run.optimizer)
        clip()
        scaler.step(run.optimizer)
        scaler.update()
    return run


@pytest.mark.parametrize("scale", [65536.0, 1000.0])
@pytest.mark.parametrize("unscale", [False, True], ids=["scaler unscales", "user unscales"])
@pytest.mark.parametrize("limits", LIMITS[:2], ids=str)
@pytest.mark.parametrize("name", ["adamw", "sgd", *FUSED])
def test_amp_clips_between_unscaling_and_the_step(
    name: str, limits: dict[str, float], unscale: bool, scale: float
) -> None:
    ours, theirs, norms = Run(name), Run(name), []
    clip = clip_gradients(ours.optimizer, **limits)
    scaled_training(ours, scale, unscale=unscale)
    assert not hasattr(ours.optimizer, "grad_scale")
    scaled_training(theirs, scale, unscale=True, clip=lambda: norms.append(theirs.by_hand(**limits)))
    ours.assert_same(theirs)
    for p, q in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)
    if "max_norm" in limits:
        assert torch.equal(clip.total_norm, norms[-1])


@pytest.mark.parametrize("name", ["adamw", "adamw-fused"])
def test_a_step_that_amp_skips_changes_no_parameter_and_keeps_the_last_norm(name: str) -> None:
    run = Run(name)
    clip = clip_gradients(run.optimizer, max_norm=0.5, error_if_nonfinite=True)
    run.train()
    before, last = copy.deepcopy(run.model.state_dict()), clip.total_norm
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(run.loss(run.batches[0] * float("inf"))).backward()
    scaler.step(run.optimizer)
    assert clip.total_norm is last
    assert all(torch.equal(before[key], value) for key, value in run.model.state_dict().items())


def test_an_error_in_a_scaled_fused_step_leaves_gradients_and_the_next_step_right() -> None:
    p = leaf(1e30, 1e30)
    optimizer = torch.optim.SGD([p], lr=1.0, fused=True)
    clip = clip_gradients(optimizer, max_norm=1.0, error_if_nonfinite=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.ones(()))
    with pytest.raises(RuntimeError, match="non-finite"):  # finite gradients whose norm overflows
        scaler.step(optimizer)
    assert torch.equal(p.grad, torch.tensor([1e30, 1e30]))
    scaler.update()
    p.grad = 4 * torch.tensor([3.0, 4.0])
    scaler.step(optimizer)
    assert clip.total_norm == 5.0
    torch.testing.assert_close(p.data, -torch.tensor([0.6, 0.8]))


def test_a_scale_that_the_user_put_on_a_fused_optimizer_stays_there() -> None:
    p = leaf(6.0, 8.0)
    optimizer = torch.optim.SGD([p], lr=1.0, fused=True)
    optimizer.grad_scale = scale = torch.tensor(2.0)
    clip = clip_gradients(optimizer, max_norm=1.0)
    optimizer.step()
    assert optimizer.grad_scale is scale
    assert clip.total_norm == 5.0
    torch.testing.assert_close(p.data, -torch.tensor([0.6, 0.8]))


def test_a_step_that_raises_leaves_no_scale_behind_for_a_later_one() -> None:
    optimizer = torch.optim.SGD([leaf(6.0, 8.0)], lr=1.0, fused=True)
    optimizer.grad_scale = torch.tensor(2.0)
    clip_gradients(optimizer, max_norm=1.0)
    optimizer.param_groups[0]["lr"] = None
    with pytest.raises(TypeError):
        optimizer.step()
    del optimizer.grad_scale
    optimizer.param_groups[0]["lr"] = 1.0
    optimizer.step()
    assert not hasattr(optimizer, "grad_scale")


def test_accumulated_gradients_are_clipped_at_the_step_only() -> None:
    ours, theirs = Run(), Run()
    clip = clip_gradients(ours.optimizer, max_norm=0.5)
    for run in (ours, theirs):
        for batch in run.batches:
            run.loss(batch).backward()
        assert clip.total_norm is None or run is theirs
    for p, q in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)
    theirs.by_hand(0.5)
    ours.optimizer.step()
    theirs.optimizer.step()
    ours.assert_same(theirs)


def test_all_groups_share_one_norm_and_later_groups_are_seen() -> None:
    first, second, third = leaf(2.0), leaf(3.0), leaf(6.0)
    optimizer = torch.optim.SGD([{"params": [first]}, {"params": [second], "lr": 2.0}], lr=1.0)
    clip = clip_gradients(optimizer, max_norm=100.0)
    optimizer.add_param_group({"params": [third]})
    optimizer.step()
    assert clip.total_norm == 7.0


def test_a_parameter_listed_twice_is_counted_and_scaled_once() -> None:
    p, q = leaf(30.0), leaf(40.0)
    with pytest.warns(UserWarning, match="duplicate"):
        optimizer = torch.optim.SGD([p, q, p], lr=0.0)
    clip = clip_gradients(optimizer, max_norm=5.0)
    optimizer.step()
    assert clip.total_norm == 50.0
    torch.testing.assert_close([p.grad, q.grad], [torch.tensor([3.0]), torch.tensor([4.0])])


@pytest.mark.parametrize("limits", LIMITS, ids=str)
def test_a_step_without_any_gradient_proceeds_with_norm_zero(limits: dict[str, float]) -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=1.0)
    clip = clip_gradients(optimizer, **limits)
    optimizer.step()
    assert torch.equal(clip.total_norm, torch.tensor(0.0))


def test_norm_type_zero_counts_tensors_as_torch_does() -> None:
    p, q = leaf(1.0, 2.0, 3.0), leaf(0.0)
    optimizer = torch.optim.SGD([p, q], lr=0.0)
    clip = clip_gradients(optimizer, max_norm=1.0, norm_type=0)
    optimizer.step()
    assert clip.total_norm == 1.0


def test_limits_of_zero_and_infinity_are_allowed() -> None:
    for limits, expected in (({"max_norm": 0}, 0.0), ({"max_norm": float("inf")}, 7.0), ({"clip_value": 0}, 0.0)):
        p = leaf(7.0)
        optimizer = torch.optim.SGD([p], lr=0.0)
        with clip_gradients(optimizer, **limits):
            optimizer.step()
        assert p.grad == expected


def test_value_clipping_reports_the_norm_before_it_and_comes_after_the_norm() -> None:
    p = leaf(3.0, 4.0)
    optimizer = torch.optim.SGD([p], lr=0.0)
    with clip_gradients(optimizer, clip_value=2.0) as clip:
        optimizer.step()
    assert clip.total_norm == 5.0
    assert p.grad.tolist() == [2.0, 2.0]
    p.grad = torch.tensor([3.0, 4.0])
    with clip_gradients(optimizer, max_norm=2.5, clip_value=1.75):
        optimizer.step()
    torch.testing.assert_close(p.grad, torch.tensor([1.5, 1.75]))


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
@pytest.mark.parametrize("limits", LIMITS[:2], ids=str)
def test_error_if_nonfinite_raises_before_any_gradient_changes(limits: dict[str, float], bad: float) -> None:
    p, q = leaf(3.0, 4.0), leaf(bad)
    optimizer = torch.optim.SGD([p, q], lr=1.0)
    clip_gradients(optimizer, error_if_nonfinite=True, **limits)
    with pytest.raises(RuntimeError, match="non-finite"):
        optimizer.step()
    assert p.grad.tolist() == [3.0, 4.0]
    assert p.tolist() == [0.0, 0.0]


def test_nonfinite_gradients_go_through_as_in_torch_when_not_refused() -> None:
    ours, theirs = [leaf(3.0, float("inf")), leaf(1.0)], [leaf(3.0, float("inf")), leaf(1.0)]
    optimizer = torch.optim.SGD(ours, lr=0.0)
    with clip_gradients(optimizer, max_norm=1.0) as clip:
        optimizer.step()
    assert clip.total_norm == clip_grad_norm_(theirs, 1.0) == float("inf")
    torch.testing.assert_close([p.grad for p in ours], [p.grad for p in theirs], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("limits", LIMITS[:2], ids=str)
def test_sparse_gradients_are_refused_by_name_before_any_gradient_changes(limits: dict[str, float]) -> None:
    p, embedding = leaf(3.0, 4.0), nn.Embedding(5, 3, sparse=True)
    embedding(torch.tensor([1, 2])).sum().backward()
    optimizer = torch.optim.SGD([p, embedding.weight], lr=1.0)
    clip_gradients(optimizer, **limits)
    with pytest.raises(FxpruneError, match=r"shape \(5, 3\).*sparse") as caught:
        optimizer.step()
    assert isinstance(caught.value, NotImplementedError)  # what torch raises
    assert p.grad.tolist() == [3.0, 4.0]


def test_a_learning_rate_scheduler_before_or_after_changes_nothing() -> None:
    for scheduler_first in (True, False):
        ours, theirs = Run(), Run()
        for run in (ours, theirs):
            schedulers = [torch.optim.lr_scheduler.StepLR(run.optimizer, 1)] if scheduler_first else []
            if run is ours:
                clip_gradients(run.optimizer, max_norm=0.5)
            schedulers += [torch.optim.lr_scheduler.StepLR(run.optimizer, 1)] if not scheduler_first else []
            for batch in run.batches:
                run.optimizer.zero_grad()
                run.loss(batch).backward()
                if run is theirs:
                    run.by_hand(0.5)
                run.optimizer.step()
                schedulers[0].step()
        ours.assert_same(theirs)


def test_state_dict_is_unaffected_and_a_copy_of_the_optimizer_is_unclipped() -> None:
    run = Run("adamw")
    keys = list(run.optimizer.state_dict())
    clip_gradients(run.optimizer, max_norm=0.5)
    run.train()
    state = run.optimizer.state_dict()
    assert list(state) == keys
    assert set(state["state"][0]) == {"step", "exp_avg", "exp_avg_sq"}
    run.optimizer.load_state_dict(state)
    assert not copy.deepcopy(run.optimizer)._optimizer_step_pre_hooks


def test_a_step_that_calls_its_parents_step_is_clipped_once() -> None:
    class Wrapped(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            loss = None if closure is None else closure()
            super().step()
            return loss

    def gradients() -> float:
        p.grad = torch.tensor([3.0, 4.0])
        return 1.0

    p = leaf(3.0, 4.0)
    torch.optim.SGD([p])  # torch adds the hooks to a class at its first instance
    optimizer = Wrapped([p], lr=1.0)
    clip = clip_gradients(optimizer, max_norm=1.0)
    for arguments in ((), (gradients,)):
        gradients()
        optimizer.step(*arguments)
        reference = leaf(3.0, 4.0)
        clip_grad_norm_(reference, 1.0)
        assert clip.total_norm == 5.0
        assert torch.equal(p.grad, reference.grad)
    with pytest.raises(ZeroDivisionError):
        optimizer.step(lambda: 1 / 0)
    gradients()
    optimizer.step()
    assert p.grad.norm() <= 1.00001  # a step that raised does not count as still running


def test_norm_and_value_handles_run_in_the_order_of_registration() -> None:
    for kinds, expected in ((("max_norm", "clip_value"), [0.6, 0.7]), (("clip_value", "max_norm"), [0.7, 0.7])):
        p = leaf(3.0, 4.0)
        optimizer = torch.optim.SGD([p], lr=0.0)
        limits = {"max_norm": 1.0, "clip_value": 0.7}
        for kind in kinds:
            clip_gradients(optimizer, **{kind: limits[kind]})
        optimizer.step()
        torch.testing.assert_close(p.grad, torch.tensor(expected))


def test_the_same_kind_of_clipping_twice_is_refused_until_the_first_is_removed() -> None:
    optimizer = torch.optim.SGD([leaf(3.0, 4.0)], lr=0.0)
    first = clip_gradients(optimizer, max_norm=1.0)
    with pytest.raises(ArgumentError, match=r"already clipped.*max_norm=1\.0.*remove\(\).*max_norm=2\.0"):
        clip_gradients(optimizer, max_norm=2.0, clip_value=1.0)
    assert len(optimizer._optimizer_step_pre_hooks) == 1
    first.remove()
    clip_gradients(optimizer, max_norm=2.0, clip_value=1.0)


def test_removing_is_idempotent_and_leaving_the_context_removes() -> None:
    p = leaf(3.0, 4.0)
    optimizer = torch.optim.SGD([p], lr=0.0)
    with pytest.raises(KeyError), clip_gradients(optimizer, max_norm=1.0) as clip:
        raise KeyError
    clip.remove()
    clip.remove()
    optimizer.step()
    assert p.grad.tolist() == [3.0, 4.0]
    assert clip.total_norm is None
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


@pytest.fixture
def mesh() -> Iterator[Any]:
    from torch.distributed.tensor import init_device_mesh

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def test_sharded_gradients_share_one_norm_that_is_a_plain_tensor(mesh: Any) -> None:
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    for norm_type in (1, 2, 3, "inf"):
        full = [nn.Parameter(torch.zeros(4, 3)), nn.Parameter(torch.zeros(5))]
        for p in full:
            p.grad = torch.randn_like(p)
        sharded = [nn.Parameter(distribute_tensor(p.data, mesh, [Shard(0)])) for p in full]
        for p, q in zip(sharded, full, strict=True):
            p.grad = distribute_tensor(q.grad, mesh, [Shard(0)])
        optimizer = torch.optim.AdamW(sharded)
        clip = clip_gradients(optimizer, max_norm=0.3, norm_type=norm_type, clip_value=0.1, error_if_nonfinite=True)
        optimizer.step()
        reference = clip_grad_norm_(full, 0.3, norm_type)
        clip_grad_value_(full, 0.1)
        assert not isinstance(clip.total_norm, DTensor)
        assert torch.equal(clip.total_norm, reference)
        for p, q in zip(sharded, full, strict=True):
            assert torch.equal(p.grad.full_tensor(), q.grad)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, ArgumentError, "max_norm, clip_value or both"),
        ({"max_norm": -1.0}, ArgumentError, r"max_norm must be a number >= 0.*-1\.0"),
        ({"max_norm": float("nan")}, ArgumentError, "max_norm.*nan"),
        ({"max_norm": True}, ArgumentTypeError, "max_norm.*bool"),
        ({"max_norm": [1.0]}, ArgumentTypeError, "max_norm.*list"),
        ({"max_norm": torch.ones(2)}, ArgumentError, "max_norm.*tensor"),
        ({"clip_value": -0.5}, ArgumentError, "clip_value.*-0.5"),
        ({"clip_value": float("nan")}, ArgumentError, "clip_value.*nan"),
        ({"clip_value": 10**400}, ArgumentError, "clip_value"),
        ({"max_norm": 1.0, "norm_type": "fro"}, ArgumentError, "norm_type.*fro"),
        ({"max_norm": 1.0, "norm_type": float("nan")}, ArgumentError, "norm_type.*nan"),
        ({"max_norm": 1.0, "norm_type": None}, ArgumentTypeError, "norm_type.*NoneType"),
        ({"max_norm": 1.0, "foreach": "yes"}, ArgumentTypeError, "foreach.*yes"),
        ({"max_norm": 1.0, "error_if_nonfinite": None}, ArgumentTypeError, "error_if_nonfinite"),
    ],
    ids=str,
)
def test_unusable_options_are_refused_and_nothing_is_registered(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    optimizer = torch.optim.SGD([leaf(1.0)], lr=0.0)
    with pytest.raises(error, match=message) as caught:
        clip_gradients(optimizer, **options)
    assert isinstance(caught.value, FxpruneError)
    assert isinstance(caught.value, TypeError if error is ArgumentTypeError else ValueError)
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


def test_an_optimizer_without_parameters_is_refused() -> None:
    with pytest.raises(ArgumentError, match=r"SGD without parameters.*2 group\(s\)"):
        clip_gradients(torch.optim.SGD([{"params": []}, {"params": []}], lr=0.1), max_norm=1.0)


def test_what_is_no_optimizer_with_hooks_is_refused() -> None:
    class Wrapper(torch.optim.Optimizer):
        def __init__(self, optimizer: torch.optim.Optimizer) -> None:
            self.optimizer = optimizer

    for wrong in (nn.Linear(2, 2), [leaf(1.0)], None, Wrapper(torch.optim.SGD([leaf(1.0)]))):
        with pytest.raises(ArgumentTypeError, match=r"torch\.optim\.Optimizer with step hooks, got"):
            clip_gradients(wrong, max_norm=1.0)


def test_the_example_in_the_docstring_runs() -> None:
    assert doctest.testmod(clipping).failed == 0
