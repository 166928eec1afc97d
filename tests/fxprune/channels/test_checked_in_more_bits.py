"""Removal of channels from networks of 16 bits is checked in more: their own rounding tells nothing of a wrong cut."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

import fxprune
from fxprune.channels import checking


class _Deep(nn.Module):
    """Blocks with a buffer of float32 between them, as rotary embeddings have one."""

    def __init__(self, count: int = 4) -> None:
        super().__init__()
        self.rise = nn.ModuleList(nn.Linear(64, 1024) for _ in range(count))
        self.fall = nn.ModuleList(nn.Linear(1024, 64) for _ in range(count))
        self.register_buffer("scale", torch.full((64,), 1.1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for rise, fall in zip(self.rise, self.fall, strict=True):
            x = x + (fall(rise(x).relu()).float() * self.scale).to(x.dtype)
        return x


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("most", [1e9, 0])
def test_networks_of_16_bits_lose_what_a_budget_chose(
    dtype: torch.dtype, most: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checking, "_MOST_MACS_IN_FLOAT64", most)
    torch.manual_seed(0)
    model = _Deep()
    for layers in (model.rise, model.fall):
        layers.to(dtype)
    x = torch.randn(1024, 64, dtype=dtype)
    traced = fxprune.trace(model, (x,), modes=("eval",))
    report = fxprune.prune.channels(traced, macs=0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no channel is left for a difference
        final = fxprune.finalize(traced)
    assert not final.plan.refused
    assert final.plan.macs[1] == report.macs[1] <= 0.5 * report.macs[0]
    wide, cut = (module.state_dict() for module in (traced, final))
    exact = _computed({name: value.double() for name, value in _masked(wide).items()}, x.double())
    assert torch.allclose(_computed({name: value.double() for name, value in cut.items()}, x.double()), exact)


class _Steep(nn.Module):
    """Its outputs turn with the last bits of what is summed in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.rise, self.fall = nn.Linear(64, 512), nn.Linear(512, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sin(1e7 * self.fall(nn.functional.relu(self.rise(x), inplace=True)))


def test_what_float32_cannot_tell_in_large_networks_is_compared_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checking, "_MOST_MACS_IN_FLOAT64", 0)
    torch.manual_seed(0)
    x = torch.randn(32, 64)
    traced = fxprune.trace(_Steep(), (x,), modes=("eval",))
    report = fxprune.prune.channels(traced, macs=0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        final = fxprune.finalize(traced)
    assert final.plan.macs[1] == report.macs[1]
    assert (final(x) - traced(x)).abs().max() > 0.1  # rounding alone
    assert torch.allclose(final.double()(x.double()), traced.double()(x.double()))


def _masked(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A state dict with masks multiplied in."""
    found = {name.removesuffix("_orig"): value for name, value in state.items() if not name.endswith("_mask")}
    return {name: value * state.get(f"{name}_mask", torch.ones((), dtype=value.dtype)) for name, value in found.items()}


def _computed(state: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """The network by its formula."""
    for block in range(4):
        hidden = nn.functional.linear(x, state[f"rise.{block}.weight"], state[f"rise.{block}.bias"]).relu()
        x = (
            x
            + nn.functional.linear(hidden, state[f"fall.{block}.weight"], state[f"fall.{block}.bias"]) * state["scale"]
        )
    return x
