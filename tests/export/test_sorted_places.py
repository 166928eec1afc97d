"""Places of values among sorted ones are written to ONNX, and are those of torch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import fxprune


class Places(nn.Module):
    """Places among rows of their own, and among boundaries."""

    def __init__(self, right: bool) -> None:
        super().__init__()
        self.right = right
        self.register_buffer("boundaries", torch.tensor([-1.0, 0.0, 0.0, 2.0]))

    def forward(self, rows: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rows = rows.sort(-1).values
        among = torch.searchsorted(rows, values, right=self.right, out_int32=True)
        flat = torch.searchsorted(self.boundaries, values, side="right" if self.right else "left")
        return among, flat, torch.bucketize(values, self.boundaries, right=self.right)


@pytest.mark.parametrize("right", [False, True])
def test_places_among_sorted_values_are_torchs_also_of_equal_ones_and_at_other_batches(
    right: bool, tmp_path: Path
) -> None:
    model = Places(right).eval()
    rows, values = torch.randint(-3, 3, (2, 7)).float(), torch.randint(-4, 4, (2, 5)).float()
    traced = fxprune.trace(model, (rows, values), modes=("eval",))
    fxprune.export.to_onnx(traced, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    for batch in (2, 5):
        rows, values = torch.randint(-3, 3, (batch, 7)).float(), torch.randint(-4, 4, (batch, 5)).float()
        found = session.run(None, {"rows": rows.numpy(), "values": values.numpy()})
        for got, wanted in zip(found, model(rows, values), strict=True):
            assert got.dtype == wanted.numpy().dtype
            np.testing.assert_array_equal(got, wanted.numpy())


class Special(nn.Module):
    """Knows some numbers, which torch finds by their places among sorted ones."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("special", torch.arange(40, 0, -3))

    def forward(self, ids: Tensor) -> Tensor:
        return torch.isin(ids, self.special)


def test_numbers_that_are_in_others_are_found_in_onnx(tmp_path: Path) -> None:
    model, ids = Special().eval(), torch.randint(0, 40, (2, 6))
    traced = fxprune.trace(model, ids, modes=("eval",))
    fxprune.export.to_onnx(traced, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    ids = torch.arange(42).view(7, 6)
    (found,) = session.run(None, {"ids": ids.numpy()})
    np.testing.assert_array_equal(found, model(ids).numpy())
