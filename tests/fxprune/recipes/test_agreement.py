"""How far outputs agree, against formulas written out in numpy."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from fxprune.recipes.agreement import agreement


def test_equal_outputs_agree_in_everything() -> None:
    outputs = [torch.randn(4, 3), torch.randn(2, 3)]
    found = agreement(outputs, [each.clone() for each in outputs])
    assert found == {"cosine": pytest.approx(1.0), "error": 0.0, "same_class": 1.0}


def test_the_figures_are_those_of_the_formulas_over_all_positions() -> None:
    generator = np.random.default_rng(0)
    dense, pruned = (generator.standard_normal((5, 7, 4)) for _ in range(2))
    found = agreement(torch.tensor(dense).split(2), torch.tensor(pruned).split(2))
    lengths = np.linalg.norm(dense, axis=2) * np.linalg.norm(pruned, axis=2)
    assert found["cosine"] == pytest.approx(((dense * pruned).sum(2) / lengths).mean(), abs=1e-12)
    assert found["error"] == pytest.approx(((dense - pruned) ** 2).sum() / (dense**2).sum(), abs=1e-12)
    assert found["same_class"] == (dense.argmax(2) == pruned.argmax(2)).mean()


def test_batches_count_by_their_samples() -> None:
    dense = [torch.tensor([[1.0, 0.0]] * 3), torch.tensor([[1.0, 0.0]])]
    pruned = [torch.tensor([[1.0, 0.0]] * 3), torch.tensor([[0.0, 1.0]])]
    assert agreement(dense, pruned)["same_class"] == 0.75


def test_a_scale_changes_the_error_and_neither_cosine_nor_class() -> None:
    outputs = [torch.tensor([[3.0, 4.0], [-1.0, 2.0]])]
    found = agreement(outputs, [2 * outputs[0]])
    assert found == {"cosine": pytest.approx(1.0), "error": pytest.approx(1.0), "same_class": 1.0}


@pytest.mark.parametrize(
    "wrap",
    [
        lambda tensor: {"labels": torch.tensor([1, 2]), "logits": tensor, "hidden": torch.zeros(2, 9)},
        lambda tensor: (torch.tensor([True, False]), [tensor, torch.zeros(3)]),
        lambda tensor: [None, tensor],
    ],
    ids=["mapping", "nested", "none"],
)
def test_the_first_output_of_floating_point_is_compared(wrap: Any) -> None:
    dense, pruned = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[0.0, 1.0], [0.0, 1.0]])
    assert agreement([wrap(dense)], [wrap(pruned)])["same_class"] == 0.5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_is_added_up_in_float64(dtype: torch.dtype) -> None:
    dense = torch.full((70_000, 1), 1.0, dtype=dtype)
    found = agreement([dense], [dense * 2])
    assert found["error"] == pytest.approx(1.0, abs=1e-12)


def test_scalars_are_positions_of_one_feature() -> None:
    found = agreement([torch.tensor(2.0), torch.tensor(4.0)], [torch.tensor(2.0), torch.tensor(2.0)])
    assert found["error"] == pytest.approx(4 / 20)


def test_outputs_of_zeros_give_no_division_by_zero() -> None:
    found = agreement([torch.zeros(2, 3)], [torch.zeros(2, 3)])
    assert all(math.isfinite(value) for value in found.values())
    assert found["error"] == 0.0


def test_gradients_are_not_needed() -> None:
    outputs = [torch.ones(2, 2, requires_grad=True)]
    assert agreement(outputs, outputs)["same_class"] == 1.0
