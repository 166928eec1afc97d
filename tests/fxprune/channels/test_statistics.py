"""Statistics over channels that are zero: these go, and are counted still, in both graphs and in the file."""

from __future__ import annotations

import copy
import math
import operator
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxprune
from tests.fxprune.channels.exactness import EXACT, count, error
from tests.fxprune.channels.layers import Net
from tests.random_streams import ByHand, by_deviation, by_variance, centred, rms, rms_around_one
from tests.slow import slow

aten = torch.ops.aten
HALF = tuple(range(8))


def over_channels(norm: nn.Module) -> nn.Module:
    """A norm of axis 1 over the last one."""
    return Net(lambda self, x: self.norm(x.transpose(1, 2)).transpose(1, 2), norm=norm)


class NativeLayerNorm(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return torch.native_layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)[0]


class NativeRMSNorm(nn.RMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return aten._fused_rms_norm(x, self.normalized_shape, self.weight, self.eps)[0]


class NativeGroupNorm(nn.GroupNorm):
    def forward(self, x: Tensor) -> Tensor:
        batch, channels, *space = x.shape
        args = (batch, channels, math.prod(space), self.num_groups, self.eps)
        return torch.native_group_norm(x.contiguous(), self.weight, self.bias, *args)[0]


NORMS: dict[str, Callable[[], nn.Module]] = {
    "LayerNorm": lambda: nn.LayerNorm(16),
    "RMSNorm": lambda: nn.RMSNorm(16, eps=1e-3),
    "RMSNorm without eps": lambda: nn.RMSNorm(16),
    "RMSNorm without gain": lambda: nn.RMSNorm(16, eps=1e-3, elementwise_affine=False),
    "GroupNorm of one group": lambda: over_channels(nn.GroupNorm(1, 16)),
    "GroupNorm, whole groups": lambda: over_channels(nn.GroupNorm(4, 16)),
    "GroupNorm, each channel alone": lambda: over_channels(nn.GroupNorm(16, 16)),
    "native_layer_norm": lambda: NativeLayerNorm(16),
    "_fused_rms_norm": lambda: NativeRMSNorm(16, eps=1e-3),
    "_fused_rms_norm without eps": lambda: NativeRMSNorm(16),
    "native_group_norm of one group": lambda: over_channels(NativeGroupNorm(1, 16)),
    "native_group_norm, whole groups": lambda: over_channels(NativeGroupNorm(4, 16)),
    "rms by hand": lambda: ByHand(rms, 16, 1.0),
    "rms around one by hand": lambda: ByHand(rms_around_one, 16, 1.0),
    "variance by hand": lambda: ByHand(centred, 16, 1.0),
    "std": lambda: ByHand(by_deviation, 16, 1.0),
    "var_mean": lambda: ByHand(by_variance, 16, 1.0),
}


class Stream(nn.Module):
    """A residual stream of width 16, normalized before each reader."""

    def __init__(self, norm: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.first, self.norm1, self.norm2 = nn.Linear(6, 16), norm(), norm()
        self.up, self.down, self.last = nn.Linear(16, 20), nn.Linear(20, 16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = x + self.down(F.gelu(self.up(self.norm1(x))))
        return self.last(self.norm2(x))


def zero(dead: Sequence[int], *layers: nn.Module) -> None:
    """Rows of every parameter of some layers."""
    with torch.no_grad():
        for layer in layers:
            for parameter in layer.parameters():
                parameter[list(dead)] = 0


def narrowed(norm: Callable[[], nn.Module], dead: Sequence[int] = HALF) -> Stream:
    """A stream of which some channels are zero everywhere."""
    model = Stream(norm)
    with torch.no_grad():
        for parameter in (*model.norm1.parameters(), *model.norm2.parameters()):
            parameter.uniform_(0.5, 1.5)
    zero(dead, model.first, model.norm1, model.down, model.norm2)
    return model


def finalized(model: nn.Module, *shape: int, **options: Any) -> fxprune.TracedModule:
    """The model finalized, both graphs compared with it in float64 at three batch sizes."""
    model.double().eval()
    traced = fxprune.trace(copy.deepcopy(model), (torch.randn(2, *shape).double(),))
    final = fxprune.finalize(traced, align=1, **options)
    for train in (False, True):
        model.train(train)
        final.train(train)
        for batch in (1, 2, 5):
            x = torch.randn(batch, *shape).double()
            with torch.no_grad():
                assert error(model(x), final(x)) < EXACT
    model.eval()
    return final.eval()


def targets(final: fxprune.TracedModule) -> list[Any]:
    return [node.target for node in final.graphs["eval"].nodes]


@pytest.mark.parametrize("name", NORMS)
def test_a_stream_narrows_although_it_is_normalized(name: str) -> None:
    model = narrowed(NORMS[name])
    final = finalized(model, 7, 6)
    assert count(final) <= 0.55 * count(model)
    assert final.plan is not None
    assert final.plan.stayed == []
    again = fxprune.finalize(final, align=1)
    assert str(again.graphs["eval"]) == str(final.graphs["eval"])


# what removal makes of these is what it makes of the others
_ALIKE = ("RMSNorm without eps", "native_layer_norm", "_fused_rms_norm without eps", "native_group_norm of one group")


@pytest.mark.parametrize("name", slow(NORMS, _ALIKE))
def test_a_narrowed_stream_is_written_to_onnx(name: str, tmp_path: Path) -> None:
    model = narrowed(NORMS[name]).eval()
    final = fxprune.finalize(fxprune.trace(model, (torch.randn(2, 7, 6),), modes=("eval",)), align=1)
    report = fxprune.export.to_onnx(final, tmp_path / "narrow.onnx", inputs=[(torch.randn(5, 7, 6),)])
    assert report.comparison.ok


def test_dead_channels_of_groups_that_stay_are_counted() -> None:
    dead = (0, 1, 2, 3, 8, 9, 10, 11)
    final = finalized(narrowed(lambda: over_channels(nn.GroupNorm(2, 16)), dead), 7, 6)
    assert len(final.get_parameter("first.weight")) == 8
    dead = (0, 1, 2, 8)  # of each group that is left equally many stay
    final = finalized(narrowed(lambda: over_channels(nn.GroupNorm(2, 16)), dead), 7, 6)
    assert len(final.get_parameter("first.weight")) == 14


def test_groups_that_nobody_reads_go_though_they_are_not_zero() -> None:
    model = Net(
        lambda self, x: self.last(self.norm(self.first(x))),
        first=nn.Conv2d(3, 16, 3), norm=nn.GroupNorm(4, 16), last=nn.Conv2d(16, 4, 1),
    )  # fmt: skip
    with torch.no_grad():
        model.last.weight[:, 4:12] = 0
        model.last.weight[:, 0] = 0
    final = finalized(model, 3, 6, 6)
    assert final.get_parameter("first.weight").shape[0] == 8


@pytest.mark.parametrize("affine", [True, False])
def test_groups_of_constants_are_constants_and_go_whole(affine: bool) -> None:
    model = Net(
        lambda self, x: self.last(F.gelu(self.norm(self.first(x)))),
        first=nn.Conv2d(3, 16, 3), norm=nn.GroupNorm(4, 16, affine=affine), last=nn.Conv2d(16, 4, 1),
    )  # fmt: skip
    with torch.no_grad():
        model.first.weight[[0, 1, 2, 3, 6, 8, 9, 10, 11]] = 0  # the first and the third group, their biases alive
        for parameter in model.norm.parameters():
            parameter.uniform_(0.5, 1.5)
    final = finalized(model, 3, 6, 6)
    assert final.get_parameter("first.weight").shape[0] == 8
    assert final.plan is not None
    assert final.plan.folded == {"last": 8}


def test_a_gain_behind_which_a_result_is_overwritten_is_not_written_to() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.last(self.up(self.gain * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-3))).relu_())

    model = Net(forward, first=nn.Linear(6, 16), up=nn.Linear(16, 8), last=nn.Linear(8, 4))
    model.gain = nn.Parameter(torch.rand(16) + 0.5)
    zero(HALF, model.first)
    final = finalized(model, 7, 6)
    assert len(final.get_parameter("first.weight")) == 8


def test_a_root_mean_square_stays_one_operator_with_its_gain_and_eps_scaled() -> None:
    model = narrowed(NORMS["RMSNorm"])
    final = finalized(model, 7, 6)
    assert aten.constant_pad_nd.default not in targets(final)
    (norm, _) = [node for node in final.graphs["eval"].nodes if node.target is aten.rms_norm.default]
    assert norm.args[1] == [8]
    assert norm.args[3] == pytest.approx(2e-3)
    assert torch.allclose(final.get_parameter("norm1.weight"), model.norm1.weight[8:] * 2**0.5)
    final = finalized(narrowed(NORMS["rms by hand"]), 7, 6)
    assert targets(final).count(aten.mul.Tensor) == 4


def test_a_gain_that_is_read_elsewhere_is_not_scaled() -> None:
    model = narrowed(NORMS["RMSNorm"])
    model.norm2 = model.norm1
    final = finalized(model, 7, 6)
    assert count(final) <= 0.55 * count(model)
    assert torch.equal(final.get_parameter("norm1.weight"), model.norm1.weight[8:])


@pytest.mark.parametrize("name", ["LayerNorm", "RMSNorm", "rms by hand", "variance by hand"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_eps_and_gain(name: str, dtype: torch.dtype) -> None:
    model = narrowed(NORMS[name]).to(dtype).eval()
    if hasattr(model.norm1, "eps"):
        model.norm1.eps = model.norm2.eps = 6e-8
    x = torch.randn(3, 7, 6).to(dtype)
    final = fxprune.finalize(fxprune.trace(copy.deepcopy(model), (x,), modes=("eval",)), align=1)
    stays = name == "variance by hand" and dtype == torch.float16  # means over fewer could overflow
    assert len(final.get_parameter("first.weight")) == (16 if stays else 8)
    assert torch.equal(final.get_parameter("norm1.weight"), model.norm1.weight[0 if stays else 8 :])
    assert (model(x) - final(x)).abs().max() <= 4 * torch.finfo(dtype).eps * model(x).abs().max()


def grn(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    norm = x.norm(p=2, dim=1, keepdim=True)
    return x + torch.addcmul(b, w, x * (norm / (norm.mean(-1, keepdim=True) + 1e-6)))


def test_a_global_response_norm_lets_dead_units_go() -> None:
    model = Net(
        lambda self, x: self.down(self.norm(F.gelu(self.up(x)))),
        up=nn.Linear(6, 24), norm=ByHand(grn, 24, 1.0), down=nn.Linear(24, 6),
    )  # fmt: skip
    zero(range(12), model.up, model.norm)
    assert count(finalized(model, 7, 6)) <= 0.6 * count(model)


class Cbam(nn.Module):
    """Woo et al., "CBAM: Convolutional Block Attention Module", 2018."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 4, 1)
        self.squeeze, self.excite, self.space = nn.Conv2d(16, 4, 1), nn.Conv2d(4, 16, 1), nn.Conv2d(2, 1, 7, padding=3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x))
        pooled = F.adaptive_avg_pool2d(x, 1), F.adaptive_max_pool2d(x, 1)
        x = x * torch.sigmoid(sum(self.excite(F.relu(self.squeeze(each))) for each in pooled))
        across = torch.cat([torch.max(x, 1)[0].unsqueeze(1), torch.mean(x, 1).unsqueeze(1)], 1)
        return self.last(x * torch.sigmoid(self.space(across)))


def test_attention_by_mean_and_maximum_over_channels_lets_dead_ones_go() -> None:
    model = Cbam()
    zero(HALF, model.first)
    assert count(finalized(model, 3, 6, 6)) <= 0.6 * count(model)


REDUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda x: x.mean(-1, keepdim=True),
    "sum": lambda x: x.sum(-1, keepdim=True),
    "amax": lambda x: (-x.abs()).amax(-1, keepdim=True),
    "amin": lambda x: x.abs().amin(-1, keepdim=True),
    "max": lambda x: (-x.abs()).max(-1, keepdim=True).values,
    "min": lambda x: x.abs().min(-1, keepdim=True).values,
    "maximum of all": lambda x: (-x.abs()).max(),
    "var": lambda x: x.var(-1, keepdim=True),
    "var of N": lambda x: x.var(-1, keepdim=True, unbiased=False),
    "std": lambda x: x.std(-1, keepdim=True),
    "std_mean": lambda x: operator.add(*torch.std_mean(x, -1, keepdim=True)),
    "logsumexp": lambda x: x.logsumexp(-1, keepdim=True),
    "norm": lambda x: torch.linalg.vector_norm(x, 3, -1, True),
    "norm of all": lambda x: x.norm(),
    "largest": lambda x: torch.linalg.vector_norm(x, float("inf"), -1, True),
    "mean of all": lambda x: x.mean(),
    "mean of squares": lambda x: x.square().mean(-1, keepdim=True),
    "instance norm": lambda x: F.instance_norm(x),
    "normalize": lambda x: F.normalize(x, dim=-1),
    "distance": lambda x: (x - x.mean(-1, keepdim=True)).square().mean(-1, keepdim=True),
}


def reduced(name: str) -> Net:
    """Half of the channels are zero, reduced, and read by nobody else."""
    model = Net(lambda self, x: self.last(self.first(x) * REDUCTIONS[name](self.first(x))),
                first=nn.Linear(6, 16), last=nn.Linear(16, 4))  # fmt: skip
    zero(HALF, model.first)
    with torch.no_grad():
        model.last.weight[:, list(HALF)] = 0
    return model


@pytest.mark.parametrize("name", REDUCTIONS)
def test_a_reduction_counts_the_zeros_that_went(name: str) -> None:
    final = finalized(reduced(name), 7, 6)
    assert len(final.get_parameter("first.weight")) == 8, final.plan.explain() if final.plan else ""


STAYS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "smallest norm": (lambda x: torch.linalg.vector_norm(x, -1.0, -1, True), "a reduction over it"),
    "place": (lambda x: x.argmax(-1, keepdim=True).double(), "a reduction over it"),
    "maximum and place": (lambda x: operator.add(*x.max(-1, keepdim=True)), "a reduction over it"),
    "nearly a variance": (lambda x: (x - 2 * x.mean(-1, keepdim=True)).square().mean(-1, keepdim=True), "counts it"),
    "another mean": (lambda x: (x - x.mean(1, keepdim=True)).square().mean(-1, keepdim=True), ""),
    "softmax": (lambda x: x.softmax(-1), "softmax over it"),
    "constants": (lambda x: (x + 0.5).mean(-1, keepdim=True), "counts it, and it is not zero there"),
}


@pytest.mark.parametrize("name", STAYS)
def test_what_no_rule_rewrites_stays_exact_and_says_why(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    function, why = STAYS[name]
    monkeypatch.setitem(REDUCTIONS, name, function)
    final = finalized(reduced(name), 7, 6)
    assert final.plan is not None
    if why:
        assert len(final.get_parameter("first.weight")) == 16
        assert why in final.plan.explain()


def test_a_variance_of_what_was_overwritten_since_is_no_variance() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        hidden = self.first(x) + 1.0
        distance = hidden - hidden.mean(-1, keepdim=True)
        hidden.copy_(self.first(x))
        return self.last(hidden * distance.square().mean(-1, keepdim=True))

    model = Net(forward, first=nn.Linear(6, 16), last=nn.Linear(16, 4))
    zero(HALF, model.first)
    finalized(model, 7, 6)


def test_a_stream_that_is_returned_stays() -> None:
    model = Net(
        lambda self, x: self.last(self.norm(self.first(x))) + self.first(x).mean(-1, keepdim=True),
        first=nn.Linear(6, 16), norm=nn.LayerNorm(16), last=nn.Linear(16, 16),
    )  # fmt: skip
    zero(HALF, model.first, model.norm)
    final = finalized(model, 7, 6)
    assert len(final.get_parameter("first.weight")) == 8
    returned = Net(lambda self, x: self.norm(self.first(x)), first=nn.Linear(6, 16), norm=nn.LayerNorm(16))
    zero(HALF, returned.first, returned.norm)
    final = finalized(returned, 7, 6)
    assert len(final.get_parameter("first.weight")) == 16
    assert final.plan is not None
    assert "the model returns it" in final.plan.explain()


def test_channels_that_are_not_zero_everywhere_stay() -> None:
    model = narrowed(NORMS["LayerNorm"])
    with torch.no_grad():
        model.down.bias[:4] = 0.5
    final = finalized(model, 7, 6)
    assert len(final.get_parameter("first.weight")) == 12
    assert final.plan is not None
    assert "counts it, and it is not zero there" in final.plan.explain()


@pytest.mark.parametrize("native", [torch.native_layer_norm, aten._fused_rms_norm])
def test_channels_of_a_norm_whose_statistics_are_read_stay(native: Any) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        affine = tuple(self.norm.parameters())
        normed, *statistics = native(self.first(x), [16], *affine, 1e-5)
        return self.last(normed) + statistics[-1]

    norm = nn.LayerNorm(16) if native is torch.native_layer_norm else nn.RMSNorm(16)
    model = Net(forward, first=nn.Linear(6, 16), norm=norm, last=nn.Linear(16, 4))
    zero(HALF, model.first, model.norm)
    final = finalized(model, 7, 6)
    assert len(final.get_parameter("first.weight")) == 16
    assert final.plan is not None
    assert "normalized together, and the statistics are read" in final.plan.explain()


@pytest.mark.parametrize("name", NORMS)
def test_of_what_is_normalized_something_stays(name: str) -> None:
    model = narrowed(NORMS[name], range(16))
    sample = torch.randn(2, 7, 6).double()
    final = fxprune.finalize(fxprune.trace(copy.deepcopy(model).double().eval(), sample, modes=("eval",)))
    x = torch.randn(5, 7, 6).double()
    with torch.no_grad():
        assert error(model.double().eval()(x), final(x)) < EXACT


def test_zeros_in_eval_mode_alone_are_named() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        hidden = F.relu(self.norm(self.first(x)))
        return self.last(hidden * hidden.mean(1, keepdim=True))

    layers = {"first": nn.Conv2d(3, 8, 1), "norm": nn.BatchNorm2d(8), "last": nn.Conv2d(8, 4, 1)}
    model = Net(forward, **layers).double().train()
    zero((0, 1, 2), model.first)
    with torch.no_grad():
        model.norm.bias.fill_(1.0)
        model.norm.running_mean.fill_(3.0)  # so the constant is negative in eval mode, and 1 in train mode
        model.last.weight[:, :3] = 0
    x = torch.randn(4, 3, 5, 5).double()
    traced = fxprune.trace(copy.deepcopy(model), (x,))
    with pytest.warns(UserWarning, match="constant in eval mode alone"):
        final = fxprune.finalize(traced, align=1)
    assert final.plan is not None
    assert final.plan.eval_only == {"norm": [0, 1, 2]}
    kept = fxprune.finalize(traced, align=1, keep_for_training=True).train()
    with torch.no_grad():
        assert error(model(x), kept(x)) < EXACT


@pytest.mark.parametrize("norm", [nn.LayerNorm(8), nn.LayerNorm(8, bias=False), nn.RMSNorm(8, eps=1e-3)])
@pytest.mark.parametrize("biased", [False, True])
def test_a_norm_over_constants_alone_is_a_constant_and_goes(norm: nn.Module, biased: bool) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dead, self.norm, self.last, self.beside = nn.Linear(6, 8), norm, nn.Linear(8, 3), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.last(self.norm(self.dead(x))) + self.beside(x)
            return y

    torch.manual_seed(0)
    model = Net().double().eval()
    with torch.no_grad():
        model.dead.weight.zero_()
        model.dead.bias.mul_(biased)
        for p in norm.parameters():
            p.uniform_(0.5, 1.5)
    x = torch.randn(4, 5, 6).double()
    final = fxprune.finalize(fxprune.trace(model, x, modes=("eval",)), align=1)
    with torch.no_grad():
        assert error(model(x), final(x)) < 1e-9
    assert not [name for name, _ in final.named_parameters() if name.startswith(("dead", "norm"))]
