"""Means over space that no input changes, and constants of phases: who reads these alone reads a constant."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxprune
from fxprune.channels.positions import Spread
from fxprune.errors import EvalConstantWarning
from tests.fxprune.channels.exactness import EXACT, error
from tests.fxprune.channels.layers import Net, norm, zero_rows


def left(model: nn.Module, *sizes: tuple[int, int]) -> int:
    """How many rows of `first` stay; the network computes the same at other sizes of batch and space, free with any."""
    model = model.double().eval()
    x = torch.randn(2, 3, 8, 8).double()
    free: Any = ((dict.fromkeys((0, 2, 3), torch.export.Dim.AUTO),),) if sizes else "batch"
    final = fxprune.finalize(fxprune.trace(model, (x,), modes=("eval",), dynamic_shapes=free), align=1)
    with torch.no_grad():
        for batch, (height, width) in ((1, (8, 8)), (3, (8, 8)), *((2, size) for size in sizes)):
            other = 7 * torch.randn(batch, 3, height, width).double() + 3
            assert error(model(other), final(other)) < EXACT
    return len(dict(final.named_parameters()).get("first.weight", ()))


def shifted(layer: Any) -> Any:
    """A norm with a random gain and shift."""
    nn.init.uniform_(layer.weight, 0.5, 1.5)
    nn.init.normal_(layer.bias)
    return layer


def beside_it(call: Callable[..., Tensor], **modules: Any) -> nn.Module:
    """`call` on the normalized channels of one convolution, whose result a layer reads; another one reads the image."""
    torch.manual_seed(0)
    own = {"first": nn.Conv2d(3, 8, 3, padding=1), "norm": shifted(nn.InstanceNorm2d(8, affine=True))}
    return Net(
        lambda s, x: s.head(call(s, s.norm(s.first(x)))) + s.other(x.mean((2, 3))),
        **{**own, "head": nn.Linear(8, 5), "other": nn.Linear(3, 5), **modules},
    )


MEANS: dict[str, Callable[..., nn.Module]] = {
    "mean": lambda: beside_it(lambda s, x: x.mean((2, 3))),
    "mean of the last axes": lambda: beside_it(lambda s, x: x.mean((-1, -2), keepdim=True).flatten(1)),
    "pooling": lambda: beside_it(lambda s, x: F.adaptive_avg_pool2d(x, 1).flatten(1)),
    "without gain and shift": lambda: beside_it(lambda s, x: x.mean((2, 3)), norm=nn.InstanceNorm2d(8)),
    "times and plus": lambda: beside_it(
        lambda s, x: ((x - s.shift) * s.gain / 2 + 1).mean((2, 3)),
        gain=nn.Parameter(torch.randn(8, 1, 1)), shift=nn.Parameter(torch.randn(1, 8, 1, 1)),
    ),
    "sum with itself": lambda: beside_it(lambda s, x: (x + x.add(x, alpha=3)).mean((2, 3))),
    "a layer of one tap": lambda: beside_it(
        lambda s, x: s.second(s.between(x)).mean((2, 3)), between=nn.Conv2d(8, 6, 1, groups=2), second=norm(6),
        head=nn.Linear(6, 5),
    ),
    "batch norm": lambda: beside_it(lambda s, x: s.second(x).mean((2, 3)), second=norm(8)),
}  # fmt: skip


GROUPS: dict[str, Callable[..., nn.Module]] = {
    "channels first": lambda: beside_it(lambda s, x: s.groups(x).mean((2, 3))),
    "channels last": lambda: beside_it(lambda s, x: s.groups(x.flatten(2)).transpose(1, 2).mean(1)),
    "space in front": lambda: beside_it(lambda s, x: s.groups(x).permute(2, 3, 0, 1).mean((1, 0))),
}


@pytest.mark.parametrize("kind", GROUPS)
def test_so_is_that_of_a_norm_whose_groups_hold_one_channel(kind: str) -> None:
    model = GROUPS[kind]()
    model.norm, model.groups = nn.Identity(), shifted(nn.GroupNorm(8, 8))
    assert left(model, (5, 9)) == 0


def over_tokens(call: Callable[..., Tensor], **modules: Any) -> nn.Module:
    """`call` on queries, keys and values of positions that are normalized; queries are zero."""
    model = beside_it(
        lambda s, x: call(s, *(f(s.groups(x.flatten(2)).transpose(1, 2)) for f in (s.q, s.k, s.v))),
        norm=nn.Identity(), groups=shifted(nn.GroupNorm(8, 8)),
        **{**{name: nn.Linear(8, 8) for name in "qkv"}, **modules},
    )  # fmt: skip
    zero_rows(model.q, *range(8), bias=True)
    return model


def heads(x: Tensor) -> Tensor:
    return x.view(x.shape[0], x.shape[1], 2, 4).transpose(1, 2)


def by_hand(s: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.softmax(heads(q) @ heads(k).transpose(-1, -2) / 2, -1)
    return (weights @ heads(v)).transpose(1, 2).flatten(2)[:, 3]


def by_torch(s: Any, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    attended = F.scaled_dot_product_attention(heads(q), heads(k), heads(v), **options)
    return attended.transpose(1, 2).flatten(2)[:, 3]


TOKENS: dict[str, Callable[..., nn.Module]] = {
    "mean of a linear layer": lambda: over_tokens(lambda s, q, k, v: v.mean(1)),
    "attention by hand": lambda: over_tokens(by_hand),
    "attention": lambda: over_tokens(by_torch),
}


@pytest.mark.parametrize("kind", TOKENS)
def test_who_weights_all_positions_alike_reads_the_mean(kind: str) -> None:
    assert left(TOKENS[kind]()) == 0


def test_parts_of_channels_have_means_of_their_own() -> None:
    model = beside_it(
        lambda s, x: s.last(s.all(s.groups(x.flatten(2)).transpose(1, 2)).chunk(2, -1)[1]).mean(1),
        norm=nn.Identity(), groups=shifted(nn.GroupNorm(8, 8)), all=nn.Linear(8, 8), last=nn.Linear(4, 8),
    )  # fmt: skip
    assert left(model) == 0


def one_query(s: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A head whose queries are not zero."""
    return by_hand(s, q + s.gain * k, k, v)


NO_TOKENS: dict[str, Callable[..., nn.Module]] = {
    "in order": lambda: over_tokens(lambda s, q, k, v: by_torch(s, q, k, v, is_causal=True)),
    "some positions": lambda: over_tokens(
        lambda s, q, k, v: by_torch(s, q, k, v, attn_mask=s.mask), mask=nn.Parameter(torch.randn(64, 64))
    ),
    "part of the positions": lambda: over_tokens(lambda s, q, k, v: by_torch(s, q[:, :9], k[:, :9], v[:, :9])),
    "positions for channels": lambda: over_tokens(lambda s, q, k, v: v.mean(2), head=nn.Linear(64, 5)),
    "queries that are not zero": lambda: over_tokens(one_query, gain=nn.Parameter(torch.randn(8))),
    "written to": lambda: over_tokens(lambda s, q, k, v: v.relu_().mean(1)),
    "written to through a part": lambda: over_tokens(
        lambda s, q, k, v: (lambda parts: (v.relu_(), parts[0].mean(1))[1])(v.tensor_split(2, -1)), head=nn.Linear(4, 5)
    ),
}


QUICK = ("in order", "queries that are not zero", "written to through a part")


@pytest.mark.parametrize(
    "kind", [*QUICK, *(pytest.param(kind, marks=pytest.mark.slow) for kind in NO_TOKENS if kind not in QUICK)]
)
def test_other_weights_of_positions_keep_them(kind: str) -> None:
    assert left(NO_TOKENS[kind]()) == 8


NOT_SPACE: dict[str, Callable[..., nn.Module]] = {
    "two channels a group": lambda: beside_it(lambda s, x: F.group_norm(x, 4).mean((2, 3))),
    "a part of space": lambda: beside_it(lambda s, x: x.mean(2).amax(2)),
    "channels for space": lambda: beside_it(lambda s, x: x.transpose(1, 2).mean((2, 3)), head=nn.LazyLinear(5)),
}


@pytest.mark.parametrize("kind", NOT_SPACE)
def test_other_means_depend_on_the_input(kind: str) -> None:
    model, x = NOT_SPACE[kind](), torch.randn(2, 3, 8, 8)
    model(x)
    assert left(model) == 8


@pytest.mark.parametrize("kind", MEANS)
def test_the_mean_of_an_instance_norm_is_its_shift_and_its_layers_go(kind: str) -> None:
    assert left(MEANS[kind](), (5, 9)) == 0


def test_a_gate_that_is_a_constant_passes_means_on() -> None:
    first = nn.Conv2d(3, 8, 3, padding=1)
    zero_rows(first, 4, 5, 6)
    model = beside_it(lambda s, x: F.glu(x, 1).mean((2, 3)), first=first, head=nn.Linear(4, 5))
    assert left(model, (5, 9)) == 2


NO_MEANS: dict[str, Callable[..., nn.Module]] = {
    "an activation": lambda: beside_it(lambda s, x: F.leaky_relu(x).mean((2, 3))),
    "a square": lambda: beside_it(lambda s, x: (x * x).mean((2, 3))),
    "a quotient by it": lambda: beside_it(lambda s, x: (1 / (x + 30)).mean((2, 3))),
    "a quotient by itself": lambda: beside_it(lambda s, x: ((x + 30) / (x + 30) * x).mean((2, 3))),
    "one axis": lambda: beside_it(lambda s, x: x.mean(2).amax(2)),
    "a maximum": lambda: beside_it(lambda s, x: x.amax((2, 3))),
    "a layer of more taps": lambda: beside_it(
        lambda s, x: s.between(x).mean((2, 3)), between=nn.Conv2d(8, 8, 3, padding=1)
    ),
    "a layer in steps": lambda: beside_it(lambda s, x: s.between(x).mean((2, 3)), between=nn.Conv2d(8, 8, 1, stride=2)),
    "a layer behind zeros": lambda: beside_it(
        lambda s, x: s.between(x).mean((2, 3)), between=nn.Conv2d(8, 8, 1, padding=1)
    ),
    "several windows": lambda: beside_it(lambda s, x: F.adaptive_avg_pool2d(x, 2).flatten(1), head=nn.Linear(32, 5)),
    "part of space": lambda: beside_it(lambda s, x: x[:, :, 1:].mean((2, 3))),
    "written to": lambda: beside_it(lambda s, x: x.relu_().mean((2, 3))),
    "written to through a view": lambda: beside_it(lambda s, x: (x.detach()[:, 2:5].relu_().sum() + x).mean((2, 3))),
}


@pytest.mark.parametrize("kind", NO_MEANS)
def test_what_is_not_the_mean_of_an_instance_norm_keeps_its_channels(kind: str) -> None:
    assert left(NO_MEANS[kind]()) == 8


def of_pixels(after: Callable[..., Tensor], edge: int = 2, outputs: int = 6, **modules: Any) -> nn.Module:
    """A convolution with the rows of two pixels dead, the shuffle, and what a layer reads of it."""
    torch.manual_seed(0)
    first = nn.Conv2d(3, outputs * edge**2, 1)
    zero_rows(first, *range(edge**2, 3 * edge**2))
    return Net(
        lambda s, x: s.head(after(s, F.pixel_shuffle(s.first(x), edge))),
        **{"first": first, "head": nn.Conv2d(outputs, 5, 1), **modules},
    )


PIXELS: dict[str, Callable[..., nn.Module]] = {
    "pooling": lambda: of_pixels(lambda s, x: F.avg_pool2d(x, 2)),
    "pooling of more": lambda: of_pixels(lambda s, x: F.avg_pool2d(x, 4, 4)),
    "pooling of an edge of its own": lambda: of_pixels(lambda s, x: F.avg_pool2d(x, (3, 6)), edge=3),
    "mean": lambda: of_pixels(lambda s, x: x.mean((2, 3), keepdim=True)),
    "norm between": lambda: of_pixels(lambda s, x: F.avg_pool2d(s.second(x), 2), second=norm(6)),
    "activation between": lambda: of_pixels(lambda s, x: F.avg_pool2d(F.gelu(x) * 2, 2)),
    "one of each": lambda: of_pixels(lambda s, x: F.gelu(x), head=nn.Conv2d(6, 5, 1, stride=2)),
    "one of some": lambda: of_pixels(lambda s, x: F.pad(x, (0, 0, 0, 0)), head=nn.Conv2d(6, 5, 1, stride=(4, 2))),
}


@pytest.mark.parametrize("kind", PIXELS)
def test_pixels_that_are_constants_go_where_their_mean_is_read(kind: str) -> None:
    model = PIXELS[kind]()
    rows = len(model.get_parameter("first.weight"))
    assert left(model, (4, 16)) == rows * 2 // 3


NO_PIXELS: dict[str, Callable[..., nn.Module]] = {
    "other windows": lambda: of_pixels(lambda s, x: F.avg_pool2d(x, 3)),
    "windows that overlap": lambda: of_pixels(lambda s, x: F.avg_pool2d(x, 2, 1)),
    "zeros around": lambda: of_pixels(lambda s, x: F.avg_pool2d(x, 2, padding=1)),
    "another divisor": lambda: of_pixels(lambda s, x: F.avg_pool2d(x, 2, divisor_override=3)),
    "nothing": lambda: of_pixels(lambda s, x: x),
    "steps": lambda: of_pixels(lambda s, x: x, head=nn.Conv2d(6, 5, 1, stride=3)),
    "steps of more taps": lambda: of_pixels(lambda s, x: x, head=nn.Conv2d(6, 5, 2, stride=2)),
    "steps behind zeros": lambda: of_pixels(lambda s, x: x, head=nn.Conv2d(6, 5, 1, stride=2, padding=1)),
}


@pytest.mark.parametrize("kind", NO_PIXELS)
def test_pixels_that_are_constants_stay_where_something_else_is_read(kind: str) -> None:
    assert left(NO_PIXELS[kind]()) == 24


def transposed(step: int, **options: Any) -> nn.Module:
    """A transposed convolution in two groups, of which one reads constants; `step` is that of who reads it."""
    torch.manual_seed(0)
    first = nn.Conv2d(3, 8, 1)
    zero_rows(first, 0, 1, 2, 3)
    spread = nn.ConvTranspose2d(8, 8, **{"kernel_size": 3, "stride": 2, "padding": 1, "groups": 2, **options})
    last = nn.Conv2d(8, 5, 1, stride=step)
    return Net(lambda s, x: s.last(F.silu(s.norm(s.spread(F.gelu(s.first(x)))))), first=first, spread=spread,
               norm=norm(8), last=last)  # fmt: skip


@pytest.mark.parametrize(
    "options",
    [{"output_padding": 1}, {}, {"kernel_size": 4}, {"kernel_size": 2, "padding": 0}, {"bias": False}, {"dilation": 3}],
    ids=str,
)
def test_what_a_transposed_convolution_makes_of_constants_goes_where_steps_meet_one_phase(options: Any) -> None:
    # of four taps, or of three that are further apart, some fall on the border in every phase
    steps = set[int]() if "dilation" in options or options.get("kernel_size") == 4 else {2}
    for step in (1, 2, 3):
        assert left(transposed(step, **options), (1, 1), (2, 5), (9, 4)) == (4 if step in steps else 8)


@pytest.mark.parametrize("seed", range(40))
def test_a_transposed_convolution_meets_the_taps_that_are_listed_in_each_phase(seed: int) -> None:
    draw = random.Random(seed)
    taps, stride, dilation = draw.randint(1, 5), draw.randint(1, 4), draw.randint(1, 3)
    padding, extra = draw.randint(0, dilation * (taps - 1)), draw.randint(0, max(stride, dilation) - 1)
    spread = Spread(taps, stride, dilation, padding, extra)
    numbers = 2.0 ** torch.arange(taps).double()
    listed = set(zip(spread.phases, (spread.inside() @ numbers).tolist(), strict=True))
    found = set()
    for size in range(1, 40):
        if (size - 1) * stride + dilation * (taps - 1) + 1 + extra <= 2 * padding:
            continue
        x = torch.ones(1, 1, size).double()
        y = F.conv_transpose1d(x, numbers.view(1, 1, -1), None, stride, padding, extra, 1, dilation)
        found |= {(position % stride, value) for position, value in enumerate(y.flatten().tolist())}
    assert found == listed
    assert spread.count == len(listed)


def test_what_is_such_a_mean_in_eval_mode_alone_is_named_and_stays_on_request() -> None:
    torch.manual_seed(0)
    first = nn.Conv2d(3, 24, 1)
    zero_rows(first, *range(4, 12))
    model = nn.Sequential(first, norm(24), nn.PixelShuffle(2), nn.AvgPool2d(2), nn.Conv2d(6, 5, 1)).double()
    x = torch.randn(4, 3, 6, 6).double()
    traced = fxprune.trace(model, (x,))
    with pytest.warns(EvalConstantWarning):
        final = fxprune.finalize(traced, align=1)
    assert final.plan is not None
    assert final.plan.removed["0.weight"] == {0: 8}
    assert final.plan.eval_only == {"1": [*range(4, 12)]}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kept = fxprune.finalize(traced, align=1, keep_for_training=True)
    for mode in (True, False):
        assert error(traced.train(mode)(x).detach(), kept.train(mode)(x).detach()) < EXACT
