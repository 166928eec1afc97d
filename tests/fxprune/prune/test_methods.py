"""N:M and block masks: on eager modules through torch's own `apply`, in containers, and on traced modules."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune

import fxprune
from fxprune.errors import ArgumentError, FxpruneError, PruningError
from fxprune.prune.methods import BlockStructured, NMStructured


def _nm_reference(t: torch.Tensor, mask: torch.Tensor, n: int, m: int, dim: int) -> torch.Tensor:
    """Entry by entry: of each block the n largest survivors stay, the earlier one first among equals."""
    rows, result = t.abs().movedim(dim, -1), mask.clone()
    view = result.movedim(dim, -1)
    for index in itertools.product(*map(range, rows.shape[:-1])):
        for start in range(0, rows.shape[-1], m):
            places = [i for i in range(start, min(start + m, rows.shape[-1])) if view[index][i] != 0]
            for i in sorted(places, key=lambda i: (-float(rows[index][i]), i))[n:]:
                view[index][i] = 0
    return result


def _blocks(shape: tuple[int, ...], lengths: tuple[int, ...]) -> list[tuple[slice, ...]]:
    axes = [[slice(i, i + b) for i in range(0, size, b)] for size, b in zip(shape, lengths, strict=True)]
    return list(itertools.product(*axes))


@given(
    seed=st.integers(0, 2**31),
    shape=st.lists(st.integers(1, 9), min_size=2, max_size=4),
    pattern=st.sampled_from([(1, 2), (2, 4), (4, 8), (3, 5)]),
    dim=st.integers(-2, 1),
    levels=st.sampled_from([2, 1000]),
    pruned=st.booleans(),
)
def test_nm_equals_the_entrywise_definition(
    seed: int, shape: list[int], pattern: tuple[int, int], dim: int, levels: int, pruned: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    t = torch.randint(-levels, levels + 1, shape, generator=generator).float()
    mask = torch.randint(0, 2, shape, generator=generator).float() if pruned else torch.ones(shape)
    got = NMStructured(*pattern, dim).compute_mask(t, mask)
    assert torch.equal(got, _nm_reference(t, mask, *pattern, dim))
    # valid N:M where the last block is short
    along = got.movedim(dim, -1)
    assert all(int((part != 0).sum(-1).max()) <= pattern[0] for part in along.split(pattern[1], -1))


@given(
    seed=st.integers(0, 2**31),
    shape=st.lists(st.integers(1, 6), min_size=2, max_size=4),
    block=st.sampled_from([(4, 1), (1, 3), (2, 2), (3, -1), (-1, 2), (1,)]),
    n=st.sampled_from([1, 2, 3.5, float("inf")]),
    fraction=st.floats(0, 1),
    pruned=st.booleans(),
)
def test_blocks_equal_a_loop_over_blocks(
    seed: int, shape: list[int], block: tuple[int, ...], n: float, fraction: float, pruned: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    t = torch.randn(shape, generator=generator, dtype=torch.float64)
    mask = torch.randint(0, 2, shape, generator=generator).double() if pruned else torch.ones(shape).double()
    got = BlockStructured(fraction, block, n).compute_mask(t, mask)
    padded = (*block, *[1] * len(shape))
    lengths = tuple(size if b == -1 else b for b, size in zip(padded, shape, strict=False))
    blocks = _blocks(tuple(shape), lengths)
    alive = [b for b in blocks if mask[b].any()]

    def score(b: tuple[slice, ...]) -> float:
        values = (t * mask)[b].abs()
        return float(values.max() if n == float("inf") else values.pow(n).mean() ** (1 / n))

    want = mask.clone()
    for b in sorted(alive, key=score)[: round(fraction * len(alive))]:
        want[b] = 0
    assert torch.equal(got, want)


def test_a_short_block_at_the_edge_scores_by_its_mean() -> None:
    t = torch.tensor([[1.0], [1.0], [1.0], [1.0], [2.0]])
    mask = BlockStructured(1).compute_mask(t, torch.ones(5, 1))
    assert mask.flatten().tolist() == [0, 0, 0, 0, 1]


@pytest.mark.parametrize("scale", [1e-38, 1e30])
def test_powers_of_tiny_and_huge_weights_do_not_vanish_or_overflow(scale: float) -> None:
    t = torch.tensor([[1.0, 2.0, 3.0, 4.0]]) * scale
    mask = BlockStructured(2, (1, 1), n=4).compute_mask(t, torch.ones(1, 4))
    assert mask.flatten().tolist() == [0, 0, 1, 1]


def test_nan_and_ties() -> None:
    t = torch.tensor([[float("nan"), 1.0, -1.0, 1.0]])
    assert NMStructured().compute_mask(t, torch.ones(1, 4)).tolist() == [[1, 1, 0, 0]]
    assert BlockStructured(2, (1, 1)).compute_mask(t, torch.ones(1, 4)).tolist() == [[1, 0, 0, 1]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_masks_of_eager_and_traced_modules_agree_and_compose(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Conv2d(6, 10, 3), nn.ReLU(), nn.Conv2d(10, 5, 1)).to(dtype)
    x = torch.randn(2, 6, 5, 5, dtype=dtype)
    traced = fxprune.trace(copy.deepcopy(model), (x,), modes=("eval",))
    prune.l1_unstructured(model[0], "weight", 0.3)
    NMStructured.apply(model[0], "weight", n=2, m=4)
    BlockStructured.apply(model[0], "weight", amount=0.25, block=(4, 1, -1, -1))
    fxprune.prune.l1_unstructured(traced, "0.weight", 0.3)
    before = traced.get_buffer("0.weight_mask").clone()
    fxprune.prune.nm_structured(traced, "0.weight")
    fxprune.prune.block_structured(traced, "0.weight", 0.25, (4, 1, -1, -1))
    mask = traced.get_buffer("0.weight_mask")
    assert torch.equal(mask, model[0].weight_mask)
    assert mask.dtype == dtype
    assert not ((mask != 0) & (before == 0)).any()
    assert torch.equal(model.eval()(x), traced.eval()(x))
    assert torch.equal(fxprune.finalize(traced)(x), traced(x))


def test_amount_counts_blocks_that_survive_in_a_container() -> None:
    linear = nn.Linear(6, 8)
    for dead in (6, 9, 11, 11):  # of 12 blocks; half of 3 rounds to 2, half of 1 to 0
        BlockStructured.apply(linear, "weight", amount=0.5)
        assert sum(int((part == 0).all(0).sum()) for part in linear.weight_mask.split(4)) == dead
    hook = next(iter(linear._forward_pre_hooks.values()))
    assert isinstance(hook, prune.PruningContainer)


def test_scores_choose_and_values_stay() -> None:
    linear = nn.Linear(4, 2)
    scores = torch.tensor([[4.0, 3, 2, 1], [1, 2, 3, 4]])
    NMStructured.apply(linear, "weight", n=1, m=2, importance_scores=scores)
    assert linear.weight_mask.tolist() == [[1, 0, 1, 0], [0, 1, 0, 1]]
    traced = fxprune.trace(nn.Linear(4, 2), (torch.randn(2, 4),), modes=("eval",))
    fxprune.prune.nm_structured(traced, "weight", 1, 2, importance_scores=scores)
    assert torch.equal(traced.get_buffer("weight_mask"), linear.weight_mask)


def test_the_input_axis_is_found_for_transposed_convolutions_under_a_pattern() -> None:
    model = nn.Sequential(nn.Conv2d(8, 6, 1), nn.ConvTranspose2d(6, 8, 1))
    traced = fxprune.trace(model, (torch.randn(2, 8, 3, 3),), modes=("eval",))
    fxprune.prune.nm_structured(traced, "*.weight", 2, 4)
    for name, dim in (("0.weight", 1), ("1.weight", 0)):
        mask = traced.get_buffer(f"{name}_mask")
        assert [int(part.sum(dim).max()) for part in mask.split(4, dim)] == [2, 2]


@pytest.mark.parametrize(
    ("build", "error"),
    [
        (lambda: NMStructured(4, 4), ArgumentError),
        (lambda: NMStructured(0, 4), ArgumentError),
        (lambda: NMStructured(2.0, 4), ArgumentError),  # type: ignore[arg-type]
        (lambda: BlockStructured(1.5), ValueError),
        (lambda: BlockStructured("half"), TypeError),  # type: ignore[arg-type]
        (lambda: BlockStructured(0.5, (4, 0)), ArgumentError),
        (lambda: BlockStructured(0.5, 4), ArgumentError),  # type: ignore[arg-type]
        (lambda: BlockStructured(0.5, n=0), ArgumentError),
        (lambda: BlockStructured(0.5, n=float("nan")), ArgumentError),
    ],
)
def test_bad_arguments_are_refused(build: object, error: type[Exception]) -> None:
    with pytest.raises(error):
        build()  # type: ignore[operator]


def test_what_does_not_fit_the_parameter_is_refused_and_changes_nothing() -> None:
    traced = fxprune.trace(nn.Linear(6, 8), (torch.randn(2, 6),), modes=("eval",))
    for request, match in (
        (lambda: fxprune.prune.nm_structured(traced, "*"), r"axis 1 of a tensor of shape \(8,\)"),
        (lambda: fxprune.prune.block_structured(traced, "weight", 13), "13.*=12"),
        (lambda: fxprune.prune.block_structured(traced, "bias", 1), r"\(4, 1\) on a tensor of shape \(8,\)"),
    ):
        with pytest.raises(PruningError, match=match) as caught:
            request()
        assert isinstance(caught.value, FxpruneError)
    with pytest.raises(ArgumentError):
        fxprune.prune.block_structured(traced, "weight", 1.5)
    assert not fxprune.prune.is_pruned(traced)
