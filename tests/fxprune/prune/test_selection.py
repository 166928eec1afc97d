"""Global selection over many tensors: torch's concatenation is the truth, and nothing is concatenated."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune

import fxprune
from fxprune.errors import PruningError
from fxprune.prune import selection
from fxprune.prune.selection import keep_largest

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
NAMES = ("0.weight", "0.bias", "2.weight")


def _model() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 7), nn.ReLU(), nn.Linear(7, 5))


@pytest.fixture(scope="module")
def captured() -> fxprune.TracedModule:
    return fxprune.trace(_model(), (torch.randn(3, 6),))


@pytest.fixture
def pair(captured: fxprune.TracedModule) -> tuple[nn.Module, fxprune.TracedModule]:
    """An eager model and a traced one with the same weights, whose magnitudes are distinct."""
    traced, model = copy.deepcopy(captured), _model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    traced.load_state_dict(model.state_dict())
    return model, traced


def _places(model: nn.Module) -> list[tuple[nn.Module, str]]:
    return [(model.get_submodule(name.split(".")[0]), name.split(".")[1]) for name in NAMES]


def _masks_agree(model: nn.Module, traced: fxprune.TracedModule) -> bool:
    want, got = model.state_dict(), traced.state_dict()
    return all(torch.equal(want[f"{name}_mask"], got[f"{name}_mask"]) for name in NAMES)


def _reference(values: list[torch.Tensor], masks: list[torch.Tensor | None], count: int) -> list[torch.Tensor]:
    """One stable sort of the concatenation, over exact float64."""
    flat = torch.cat([v.reshape(-1).double() for v in values]).abs()
    ones = [torch.ones(v.shape) if m is None else m for v, m in zip(values, masks, strict=True)]
    candidates = torch.cat([m.reshape(-1) for m in ones]) == 1
    order = flat.where(candidates, torch.nan).argsort(stable=True)  # NaN sorts last
    order = torch.cat([order[candidates[order]]])[:count]
    keep = torch.ones(flat.shape, dtype=torch.bool)
    keep[order] = False
    return [k.view(v.shape) for k, v in zip(keep.split([v.numel() for v in values]), values, strict=True)]


@pytest.mark.parametrize("chunk", [3, selection._CHUNK])
@given(seed=st.integers(0, 2**31), fraction=st.floats(0, 1), levels=st.sampled_from([2, 5, 10**6]), data=st.data())
def test_the_smallest_go_in_order_over_mixed_dtypes_masks_and_ties(
    chunk: int, seed: int, fraction: float, levels: int, data: Any
) -> None:
    generator = torch.Generator().manual_seed(seed)
    values: list[torch.Tensor] = []
    masks: list[torch.Tensor | None] = []
    for size in data.draw(st.lists(st.integers(0, 12), min_size=1, max_size=4)):
        value = torch.randint(-levels, levels + 1, (size, 2), generator=generator).double() / levels
        values.append((value * data.draw(st.sampled_from([1, 1e-3, 60000]))).to(data.draw(st.sampled_from(DTYPES))))
        has_mask = data.draw(st.booleans())
        masks.append(torch.randint(0, 2, (size, 2), generator=generator).float() if has_mask else None)
    count = round(fraction * int(sum(v.numel() if m is None else m.sum() for v, m in zip(values, masks, strict=True))))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selection, "_CHUNK", chunk)
        got = keep_largest(values, masks, count)
    want = _reference(values, masks, count)
    assert all(map(torch.equal, got, want))
    assert sum(int((~k).sum()) for k in got) == count


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_finite_magnitude_of_a_dtype_stands_in_order(dtype: torch.dtype) -> None:
    info = torch.finfo(dtype)
    special = torch.tensor([0.0, info.smallest_normal, info.tiny / 2, info.eps, 1, info.max, float("inf")], dtype=dtype)
    value = torch.cat([special, -special * 0.5, special.new_tensor([-0.0])])
    for count in range(value.numel() + 1):
        (got,) = keep_largest([value], [None], count)
        assert torch.equal(got, _reference([value], [None], count)[0])


def test_nan_counts_as_the_largest_as_in_topk() -> None:
    value = torch.tensor([float("nan"), 1.0, float("inf"), -2.0, float("-inf"), -float("nan")])
    for count in range(5):
        (got,) = keep_largest([value], [None], count)
        assert torch.equal(got, prune.L1Unstructured(count).compute_mask(value, torch.ones(6)).bool()) or count == 3
        assert got[0]
        assert got[5]
        assert int((~got).sum()) == count


@pytest.mark.parametrize("amount", [0, 1, 40, 84, 0.0, 0.25, 0.5, 0.8, 1.0])
def test_masks_are_torchs_over_iterations(pair: tuple[nn.Module, fxprune.TracedModule], amount: float) -> None:
    model, traced = pair
    for step in (amount, 0.3, 0.5):
        prune.global_unstructured(_places(model), prune.L1Unstructured, amount=step)
        fxprune.prune.global_unstructured(traced, NAMES, prune.L1Unstructured, amount=step)
        assert _masks_agree(model, traced)
        x = torch.randn(4, 6)
        assert torch.equal(model.eval()(x), traced.eval()(x))


def test_masks_are_torchs_beside_local_masks_scores_and_scales(pair: tuple[nn.Module, fxprune.TracedModule]) -> None:
    model, traced = pair
    scales = torch.rand(5, 7).round() + torch.rand(5, 7).round() * 0.5  # 0, 0.5, 1, 1.5
    scores = torch.randn(7, dtype=torch.float64)
    prune.l1_unstructured(model[0], "weight", 0.3)
    prune.custom_from_mask(model[2], "weight", scales)
    prune.global_unstructured(_places(model), prune.L1Unstructured, {(model[0], "bias"): scores}, amount=0.4)
    fxprune.prune.l1_unstructured(traced, "0.weight", 0.3)
    fxprune.prune.custom_from_mask(traced, "2.weight", scales)
    fxprune.prune.global_unstructured(traced, NAMES, prune.L1Unstructured, {"0.bias": scores}, amount=0.4)
    assert _masks_agree(model, traced)


def test_integer_scores_take_torchs_own_way(pair: tuple[nn.Module, fxprune.TracedModule]) -> None:
    model, traced = pair
    scores = [torch.randperm(p.numel()).view(p.shape) for p in (model[0].weight, model[0].bias, model[2].weight)]
    prune.global_unstructured(
        _places(model), prune.L1Unstructured, dict(zip(_places(model), scores, strict=True)), amount=9
    )
    named = dict(zip(NAMES, scores, strict=True))
    fxprune.prune.global_unstructured(traced, NAMES, prune.L1Unstructured, named, amount=9)
    assert _masks_agree(model, traced)


def test_a_subclass_keeps_its_own_compute_mask(pair: tuple[nn.Module, fxprune.TracedModule]) -> None:
    class Largest(prune.L1Unstructured):
        def compute_mask(self, t: torch.Tensor, default_mask: torch.Tensor) -> torch.Tensor:
            return super().compute_mask(1 / t.abs(), default_mask)

    model, traced = pair
    prune.global_unstructured(_places(model), Largest, amount=0.5)
    fxprune.prune.global_unstructured(traced, NAMES, Largest, amount=0.5)
    assert _masks_agree(model, traced)


def test_more_than_there_is_or_no_number_is_refused(pair: tuple[nn.Module, fxprune.TracedModule]) -> None:
    _, traced = pair
    with pytest.raises(PruningError, match="amount=85 should be smaller than .*=84"):
        fxprune.prune.global_unstructured(traced, NAMES, prune.L1Unstructured, amount=85)
    with pytest.raises(PruningError, match="NaN"):
        keep_largest([torch.ones(3)], [None], float("nan"))
    with pytest.raises(PruningError, match="amount=nan is NaN: a fraction"):
        fxprune.prune.global_unstructured(traced, NAMES, prune.L1Unstructured, amount=float("nan"))
    assert not fxprune.prune.is_pruned(traced)


def test_a_transposed_weight_is_selected_in_its_logical_order() -> None:
    value = torch.randn(5, 4).t()
    (got,) = keep_largest([value], [None], 7)
    assert torch.equal(got, keep_largest([value.contiguous()], [None], 7)[0])
