"""Channels chosen so that a class can take its own statistics over what is left."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import fxprune
from fxprune.errors import PruningError, WriteBackError


class Residual(nn.Module):
    """As the blocks of diffusion networks: group norms before convolutions, and a skip connection that is joined."""

    def __init__(self, width: int = 32, groups: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.norm1, self.conv1 = nn.GroupNorm(groups, width), nn.Conv2d(width, 2 * width, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(groups, 2 * width), nn.Conv2d(2 * width, width, 3, padding=1)
        self.norm3, self.head = nn.GroupNorm(groups, 2 * width), nn.Conv2d(2 * width, 3, 1)
        for norm in (self.norm1, self.norm2, self.norm3):
            nn.init.normal_(norm.weight)
            nn.init.normal_(norm.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.conv1(functional.silu(self.norm1(x)))
        y = x + self.conv2(functional.silu(self.norm2(y)))
        return self.head(functional.silu(self.norm3(torch.cat([y, x], 1))))


@pytest.mark.parametrize("importance", ["l2", "obs"])
def test_channels_that_are_normalized_together_go_together(importance: str) -> None:
    torch.manual_seed(0)
    model = Residual().eval()
    traced = fxprune.trace(model, torch.randn(2, 3, 8, 8), modes=("eval",))
    data = {} if importance == "l2" else {"loader": [torch.randn(4, 3, 8, 8)]}
    report = fxprune.prune.channels(traced, macs=0.6, importance=importance, runnable=model, **data)
    assert 0.45 < report.macs[1] / report.macs[0] <= 0.6
    final = fxprune.finalize(traced)
    assert not final.plan.counting
    small = fxprune.write_back(final, model)
    assert small.norm2.num_groups < 8
    assert small.norm2.num_channels == small.norm2.num_groups * 8 == small.conv1.out_channels
    assert (small.norm1.num_groups, small.norm1.num_channels) == (small.stem.out_channels // 4, small.stem.out_channels)
    x = torch.randn(3, 3, 8, 8).double()
    torch.testing.assert_close(small.double()(x), traced.double()(x), rtol=1e-9, atol=1e-9)


class Normed(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(6, 16), norm, nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.first(x)).relu())


class OverChannels(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(-1, keepdim=True)


@pytest.mark.parametrize("norm", [nn.LayerNorm(16), nn.GroupNorm(1, 16), OverChannels()])
def test_channels_that_a_class_counts_stay_and_say_why(norm: nn.Module) -> None:
    model = Normed(norm).eval()
    traced = fxprune.trace(model, torch.randn(2, 6), modes=("eval",))
    with pytest.raises(PruningError, match="its class takes statistics over them"):
        fxprune.prune.channels(traced, 0.5, targets="first", runnable=model)
    fxprune.prune.channels(traced, 0.5, targets="first", round_to=1)
    assert len(fxprune.finalize(traced).get_parameter("first.weight")) == 8


def test_channels_of_a_norm_by_the_root_mean_square_go_where_its_gain_counts_them() -> None:
    model = Normed(nn.RMSNorm(16, eps=1e-5)).eval()
    x = torch.randn(2, 6)
    traced = fxprune.trace(model, x, modes=("eval",))
    fxprune.prune.channels(traced, 0.5, targets="first", round_to=1, runnable=model)
    small = fxprune.write_back(fxprune.finalize(traced), model)
    assert small.first.out_features == 8
    torch.testing.assert_close(small(x), traced(x))


class Attention(nn.Module):
    """As attention of diffusers: the size of a head from the keys, and no scale."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = 2
        self.q, self.k, self.v = (nn.Linear(6, 16) for _ in range(3))
        self.out, self.up, self.down = nn.Linear(16, 6), nn.Linear(6, 32), nn.Linear(32, 6)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q(x), self.k(x), self.v(x)
        size = k.shape[-1] // self.heads
        q, k, v = (each.view(x.shape[0], -1, self.heads, size).transpose(1, 2) for each in (q, k, v))
        y = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.out(y)
        return x + self.down(self.up(x).relu())


def test_queries_and_keys_of_attention_without_a_scale_stay_and_the_rest_goes() -> None:
    model = Attention().eval()
    x = torch.randn(2, 5, 6)
    traced = fxprune.trace(model, x, modes=("eval",))
    fxprune.prune.channels(traced, macs=0.7, round_to=1, runnable=model)
    small = fxprune.write_back(fxprune.finalize(traced), model)
    assert small.q.out_features % 8 == 0  # whole heads alone
    assert small.up.out_features < 32
    torch.testing.assert_close(small(x), traced(x))
    with pytest.raises(PruningError, match="scales by how many"):
        fxprune.prune.channels(traced, 0.5, targets="q", kinds="head channel", runnable=model)


class WithMore(nn.Module):
    """Attention that gives a second result, which nothing reads, with its heads in an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = 4
        self.qkv, self.out = nn.Linear(6, 48), nn.Linear(16, 6)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = (
            each.reshape(x.shape[0], x.shape[1], self.heads, -1).transpose(1, 2) for each in self.qkv(x).chunk(3, -1)
        )
        y = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.out(y), y.relu()


class ReadsOne(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.last = WithMore(), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(x + self.attention(x)[0])


def test_a_result_that_nothing_reads_does_not_hide_the_right_number_of_heads() -> None:
    model = ReadsOne().eval()
    x = torch.randn(2, 5, 6)
    traced = fxprune.trace(model, x, modes=("eval",))
    fxprune.prune.channels(traced, 0.5, kinds="attention head", round_to=1, runnable=model)
    small = fxprune.write_back(fxprune.finalize(traced), model)
    assert (small.attention.heads, small.attention.out.in_features) == (2, 8)
    torch.testing.assert_close(small(x), traced(x))


class ResponseNorm(nn.Module):
    """Woo et al., "ConvNeXt V2", 2023: what a channel has over space, by the mean of that over channels."""

    def __init__(self, width: int, *, keeps_eps: bool = True) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(width)), nn.Parameter(torch.randn(width))
        self.keeps_eps = keeps_eps
        if keeps_eps:
            self.eps = 1e-3

    def forward(self, x: Tensor) -> Tensor:
        eps = self.eps if self.keeps_eps else 1e-3
        over_space = x.norm(p=2, dim=(2, 3), keepdim=True)
        normed = over_space / (over_space.mean(dim=1, keepdim=True) + eps)
        return x + torch.addcmul(self.bias.view(1, -1, 1, 1), self.weight.view(1, -1, 1, 1), x * normed)


def responding(**options: bool) -> nn.Module:
    torch.manual_seed(0)
    norm = ResponseNorm(24, **options)
    return nn.Sequential(
        nn.Conv2d(3, 24, 1), nn.GELU(), norm, nn.Conv2d(24, 6, 1), nn.ReLU(), nn.Conv2d(6, 2, 1)
    ).eval()


@pytest.mark.parametrize("modes", [("eval",), ("train", "eval")])
def test_a_response_norm_counts_channels_that_went_by_its_gain_and_eps(modes: tuple[str, ...]) -> None:
    model = responding()
    traced = fxprune.trace(model, torch.randn(2, 3, 5, 5), modes=modes)
    fxprune.prune.channels(traced, 0.5, targets="0", round_to=1)
    final = fxprune.finalize(traced)
    assert final.plan is not None
    assert final.plan.rescaled == {"2.weight": (1e-3, 2e-3)}
    assert not final.plan.counting
    small = fxprune.write_back(final, model).double()
    assert (small[0].out_channels, small[2].eps) == (12, 2e-3)
    traced, x = traced.double(), torch.randn(3, 3, 5, 5).double()
    torch.testing.assert_close(fxprune.finalize(traced)(x), traced(x), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(small(x), traced(x), rtol=1e-5, atol=1e-6)


def test_a_response_norm_whose_class_has_its_eps_in_its_code_keeps_what_it_counts() -> None:
    model = responding(keeps_eps=False)
    traced = fxprune.trace(model, torch.randn(2, 3, 5, 5), modes=("eval",))
    fxprune.prune.channels(traced, 0.4, round_to=1, runnable=model)
    small = fxprune.write_back(fxprune.finalize(traced), model)
    assert small[0].out_channels == 24
    x = torch.randn(3, 3, 5, 5)
    torch.testing.assert_close(small(x), traced(x), rtol=1e-5, atol=1e-6)


class Averaging(nn.Module):
    """A gate by the mean over channels, which the class takes over those that it has."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        return self.head(x * x.mean(1, keepdim=True).sigmoid()).mean((2, 3))


def test_a_class_with_a_mean_over_channels_that_went_is_refused_with_their_counts() -> None:
    model = Averaging().double().eval()
    x = torch.randn(2, 3, 8, 8).double()
    traced = fxprune.trace(model, x, modes=("eval",))
    fxprune.prune.channels(traced, 0.5, round_to=1)
    final = fxprune.finalize(traced, align=1)
    torch.testing.assert_close(final(x), traced(x), rtol=1e-9, atol=1e-9)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(WriteBackError, match=r"Statistics count channels that went.*: mean \(4 of 8\)"):
        fxprune.write_back(final, model)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
