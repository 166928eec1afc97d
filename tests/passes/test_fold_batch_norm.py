"""Folding batch norm: equal to rounding, in float64 to 1e-12, and left alone where it cannot be folded."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fxprune
from fxprune.errors import ArgumentError, CaptureError, FinalizeError
from fxprune.passes import FoldBatchNorm


def _settle(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            if module.affine:
                nn.init.normal_(module.weight)
                nn.init.normal_(module.bias)
    return model.double()


FOLDABLE = {
    "conv1d": (nn.Sequential(nn.Conv1d(3, 4, 3, bias=False), nn.BatchNorm1d(4)), (3, 9)),
    "conv2d same padding": (nn.Sequential(nn.Conv2d(3, 4, 3, padding="same"), nn.BatchNorm2d(4)), (3, 6, 6)),
    "conv2d grouped": (nn.Sequential(nn.Conv2d(4, 6, 3, groups=2), nn.BatchNorm2d(6)), (4, 6, 6)),
    "conv3d": (nn.Sequential(nn.Conv3d(2, 4, 2), nn.BatchNorm3d(4, affine=False)), (2, 4, 4, 4)),
    "transposed": (nn.Sequential(nn.ConvTranspose2d(3, 4, 2, 2), nn.BatchNorm2d(4)), (3, 5, 5)),
    "transposed grouped": (
        nn.Sequential(nn.ConvTranspose2d(4, 6, 3, groups=2, bias=False), nn.BatchNorm2d(6)),
        (4, 5, 5),
    ),
    "linear": (nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4)), (5,)),
}


@pytest.mark.parametrize("case", FOLDABLE)
def test_the_folded_model_is_the_model_to_rounding_without_the_norm(case: str) -> None:
    model, shape = FOLDABLE[case]
    model = _settle(model).eval()
    traced = fxprune.trace(model, (torch.randn(2, *shape).double(),))
    assert FoldBatchNorm()(traced).modified
    x = torch.randn(3, *shape).double()
    torch.testing.assert_close(traced(x), model(x), rtol=1e-12, atol=1e-12)
    assert sorted(traced.state_dict()) == ["0.bias", "0.weight"]
    assert not FoldBatchNorm()(traced).modified
    with pytest.raises(CaptureError, match="captured: eval"):
        traced.train()
    traced.get_parameter("0.bias").data = torch.zeros(9).double()
    with pytest.raises(ArgumentError, match=r"'0.bias' of a traced module has shape \[9\]"):
        traced(x)


class Kept(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.conv, self.norm, self.kind = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), kind
        if kind == "no statistics":
            self.norm = nn.BatchNorm2d(3, track_running_stats=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x)
        if self.kind == "read twice":
            return self.norm(y) + y
        if self.kind == "weight shared":
            return self.norm(y) + self.conv(x + 1)
        return self.norm(y)


@pytest.mark.parametrize("kind", ["read twice", "weight shared", "no statistics"])
def test_a_norm_that_cannot_be_folded_stays(kind: str) -> None:
    model = _settle(Kept(kind)).eval()
    traced = fxprune.trace(model, (torch.randn(2, 3, 4, 4).double(),))
    before = copy.deepcopy(traced.state_dict())
    assert not FoldBatchNorm()(traced).modified
    assert list(before) == list(traced.state_dict())
    assert traced.modes == ("eval", "train") or traced.modes == ("train", "eval")


def test_a_module_without_an_eval_graph_is_refused() -> None:
    traced = fxprune.trace(FOLDABLE["linear"][0].double(), (torch.randn(3, 5).double(),), modes=("train",))
    with pytest.raises(FinalizeError, match="eval graph"):
        FoldBatchNorm()(traced)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_finalize_notices_a_wrong_fold_in_every_precision(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    layers = [part for _ in range(6) for part in (nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU())]
    model = _settle(nn.Sequential(*layers)).eval().to(dtype)
    traced = fxprune.trace(model, (torch.randn(4, 8, dtype=dtype),), modes=("eval",))
    assert not list(fxprune.finalize(traced, fold_batch_norm=True).graph.find_nodes(
        op="call_function", target=torch.ops.aten.batch_norm.default
    ))  # fmt: skip
    run = FoldBatchNorm.run

    def wrong(self: FoldBatchNorm, module: fxprune.TracedModule) -> bool:
        modified = run(self, module)
        module.get_parameter("15.weight").data.neg_()
        return modified

    monkeypatch.setattr(FoldBatchNorm, "run", wrong)
    with pytest.raises(FinalizeError, match="must not happen"):
        fxprune.finalize(traced, fold_batch_norm=True)
