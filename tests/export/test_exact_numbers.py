"""Numbers beside float64 tensors are written as they are, not as float32 holds them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import torch
from torch import Tensor, nn
from torch.nn import functional

import fxprune


class Numbers(nn.Module):
    """Numbers that float32 cannot hold, in every place where there is an operator with a tensor for them."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        lowest = torch.finfo(x.dtype).min
        filled = torch.full((4,), 0.3, dtype=x.dtype)
        masks = {"masked_fill": x.masked_fill(x > 0, lowest), "where": torch.where(x > 0, 0.3, x)}
        pairs = {"both": torch.where(x > 0, 0.3, 2.0) * x, "full": x + filled, "full_like": torch.full_like(x, 0.3) * x}
        powers = {"pow": x.abs() ** 0.3, "of": 0.3**x, "root": x.abs() ** 0.5}
        bounds = {"clamp": x.clamp(-0.3, 2), "least": x.clamp_min(0.3), "most": x.clamp(max=0.3)}
        sums = {"mul": x * 0.3, "add": x + 0.3, "sub": x - 0.3, "rsub": 0.3 - x, "div": x / 0.3, "over": 0.3 / x}
        # the row that sees nothing
        seen = torch.ones(5, 5, dtype=torch.bool).tril(-1)
        attended = functional.scaled_dot_product_attention(x[:, :3], x[:, :3], x[:, :3], seen)
        return masks | pairs | powers | bounds | sums | {"attention": attended}


def test_numbers_beside_float64_are_exact(tmp_path: Path) -> None:
    model, x = Numbers().eval(), torch.randn(5, 4, dtype=torch.float64)
    traced = fxprune.trace(model, x, modes=("eval",), dynamic_shapes=None)
    fxprune.export.to_onnx(traced, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    wanted = model(x)
    for name, value in zip([o.name for o in session.get_outputs()], session.run(None, {"x": x.numpy()}), strict=True):
        np.testing.assert_allclose(value, wanted[name].numpy(), rtol=1e-12, atol=0, err_msg=name)
