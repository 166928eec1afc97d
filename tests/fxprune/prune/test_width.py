"""The width of a network: what is normalized together is a group, cut where it is asked for, and written back."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxprune
from fxprune.errors import BudgetError, PruningError, WriteBackError
from tests.architectures import ARCHITECTURES, transformer
from tests.fxprune.channels.exactness import EXACT, error

QUICK = ("Bert", "GPT2", "Llama", "ViT")
OTHERS = ("DistilBert", "Gemma", "T5", "Bart", "Whisper", "Swin", "ConvNext", "Segformer", "Dinov2", "DebertaV2")


class Headed(nn.Module):
    """An architecture below a layer that reads its last hidden state, or the pooled one."""

    def __init__(self, model: nn.Module, inputs: dict[str, Tensor]) -> None:
        super().__init__()
        self.model, self.axis = model, 1 if "pixel_values" in inputs and model(**inputs)[0].dim() == 4 else -1
        self.head = nn.Linear(model(**inputs)[0].shape[self.axis], 3)

    def forward(self, **inputs: Tensor) -> Tensor:
        return self.head(self.model(**inputs)[0].movedim(self.axis, -1))


class InFloat64(nn.Module):
    """A root mean square norm of transformers, which computes in float32, without its casts."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.weight = norm.weight
        self.shift = 1.0 if "Gemma" in type(norm).__name__ else 0.0

    def forward(self, x: Tensor) -> Tensor:
        return (self.weight + self.shift) * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


def prepared(name: str, transformers: Any) -> tuple[nn.Module, dict[str, Tensor]]:
    """An architecture below a head in float64, and its inputs."""
    model, inputs = transformer(name, transformers)
    headed = Headed(model, inputs).double().eval()
    for path, module in list(headed.named_modules()):
        if type(module).__name__ in ("LlamaRMSNorm", "GemmaRMSNorm", "T5LayerNorm"):
            headed.set_submodule(path, InFloat64(module))
    return headed, {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)])
@pytest.mark.filterwarnings("ignore")
def test_three_quarters_of_the_width_are_exact(name: str, transformers: Any) -> None:
    assert name in ARCHITECTURES
    model, inputs = prepared(name, transformers)
    traced = fxprune.trace(model, (), inputs, modes=("eval",))
    report = fxprune.prune.channels(traced, 0.25, kinds="width", scope="local", round_to=1)
    assert all(gone * 4 == size for gone, size in report.removed.values())
    final = fxprune.finalize(traced, align=1)
    assert final.plan is not None
    assert final.plan.stayed == []
    assert final.plan.parameters[1] <= 0.78 * final.plan.parameters[0]
    for given in (inputs, {key: value.flip(0, -1) for key, value in inputs.items()}):
        with torch.no_grad():
            assert error(traced(**given), final(**given)) < EXACT


class Rms(nn.Module):
    """Written as in Llama."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.rand(width) + 0.5), 1e-3

    def forward(self, x: Tensor) -> Tensor:
        variance = x.pow(2).mean(-1, keepdim=True)
        return self.weight * (x * torch.rsqrt(variance + self.variance_epsilon))


class Tokens(nn.Module):
    """An embedding, feed-forward layers around a stream, and a head that may be tied to the embedding."""

    def __init__(self, norm: Any = nn.LayerNorm, *, tied: bool = False) -> None:
        super().__init__()
        self.words = nn.Embedding(20, 16)
        self.norms = nn.ModuleList(norm(16) for _ in range(3))
        self.ups = nn.ModuleList(nn.Linear(16, 24) for _ in range(2))
        self.downs = nn.ModuleList(nn.Linear(24, 16) for _ in range(2))
        self.head = nn.Linear(16, 20, bias=False)
        if tied:
            self.head.weight = self.words.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids)
        for norm, up, down in zip(self.norms, self.ups, self.downs, strict=False):
            x = x + down(F.gelu(up(norm(x))))
        return self.head(self.norms[2](x))


IDS = torch.arange(14).reshape(2, 7)


def traced_tokens(model: nn.Module) -> fxprune.TracedModule:
    return fxprune.trace(copy.deepcopy(model).double(), (IDS,))


def test_the_width_is_listed_with_all_its_members() -> None:
    groups = fxprune.channel_groups(traced_tokens(Tokens()))
    (width,) = [group for group in groups if group.kind == "width"]
    assert (width.size, width.reason) == (16, None)
    members = {(member.parameter, member.axis): member.role for member in width.members}
    assert members == {
        ("words.weight", 1): "writer", ("downs.0.weight", 0): "writer", ("downs.0.bias", 0): "writer",
        ("downs.1.weight", 0): "writer", ("downs.1.bias", 0): "writer",
        **{(f"norms.{i}.{name}", 0): "writer" for i in range(3) for name in ("weight", "bias")},
        ("ups.0.weight", 1): "reader", ("ups.1.weight", 1): "reader", ("head.weight", 1): "reader",
    }  # fmt: skip


def test_the_width_stays_unless_it_is_asked_for() -> None:
    assert not any("words" in name for name in fxprune.prune.channels(traced_tokens(Tokens()), 0.5).removed)
    assert len(fxprune.prune.channels(traced_tokens(Tokens()), 0.5, targets="ups.*").removed) == 2
    for asked in ({"kinds": "width"}, {"targets": "words.weight"}, {"targets": "norms.*"}):
        (removed,) = fxprune.prune.channels(traced_tokens(Tokens()), 0.5, **asked).removed.items()
        assert removed == ("words.weight (width)", (8, 16))
    both = fxprune.prune.channels(traced_tokens(Tokens()), 0.5, kinds=("width", "MLP unit"))
    assert len(both.removed) == 3


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("norm", [nn.LayerNorm, Rms])
def test_a_budget_of_macs_is_kept_by_the_width_alone(norm: Any, tied: bool, tmp_path: Path) -> None:
    traced = traced_tokens(Tokens(norm, tied=tied))
    report = fxprune.prune.channels(traced, macs=0.6, kinds="width", round_to=1)
    final = fxprune.finalize(traced, align=1)
    assert final.plan is not None
    assert final.plan.macs == report.macs
    assert final.plan.macs[1] <= 0.6 * final.plan.macs[0]
    with torch.no_grad():
        for ids in (IDS, IDS[:1], IDS.T.contiguous().reshape(2, 7)):
            assert error(traced.train()(ids), final.train()(ids)) < EXACT
            assert error(traced.eval()(ids), final.eval()(ids)) < EXACT
    fxprune.save(final, tmp_path / "narrow.fxp")
    assert torch.equal(fxprune.load(tmp_path / "narrow.fxp").eval()(IDS), final(IDS))


def narrow(model: nn.Module) -> fxprune.TracedModule:
    traced = traced_tokens(model)
    fxprune.prune.channels(traced, 0.25, kinds="width", round_to=1)
    return fxprune.finalize(traced, align=1)


@pytest.mark.parametrize(
    ("norm", "eps"), [(Rms, "variance_epsilon"), (lambda width: nn.RMSNorm(width, eps=1e-3), "eps")]
)
def test_a_root_mean_square_is_written_back_with_its_eps(norm: Any, eps: str) -> None:
    model = Tokens(norm).double()
    final = narrow(model)
    small = fxprune.write_back(final, model)
    assert small.norms[0].weight.shape == (12,)
    assert getattr(small.norms[0], eps) == pytest.approx(1e-3 * 16 / 12)
    assert getattr(model.norms[0], eps) == 1e-3
    with torch.no_grad():
        assert error(final(IDS), small.eval()(IDS)) < EXACT


def test_a_layer_norm_of_a_narrowed_stream_is_refused_by_name() -> None:
    model = Tokens().double()
    with pytest.raises(WriteBackError, match=r"norms\.0 \(LayerNorm\) normalizes 16 channels, of which 12 are left"):
        fxprune.write_back(narrow(model), model)


def test_an_eps_in_the_code_is_refused_by_name() -> None:
    class Fixed(Rms):
        def forward(self, x: Tensor) -> Tensor:
            return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-4))

    model = Tokens(Fixed).double()
    with pytest.raises(WriteBackError, match=r"norms\.\d \(Fixed\) has no attribute that is 0\.0001, its eps"):
        fxprune.write_back(narrow(model), model)


def test_a_stream_that_is_returned_cannot_be_narrowed() -> None:
    model = Tokens()
    model.head = nn.Identity()
    with pytest.raises(PruningError, match="the model returns it"):
        fxprune.prune.channels(traced_tokens(model), 0.5, kinds="width")


def test_the_plan_says_what_counts_channels_that_went() -> None:
    final = narrow(Tokens())
    assert final.plan is not None
    assert final.plan.counting == {f"norms.{i}": (16, 12) for i in range(3)}
    assert "norms.0: 16 channels counted, 12 of them left" in final.plan.explain()
    assert fxprune.channels.ChannelPlan.from_json(final.plan.to_json()).counting == final.plan.counting
    plan = narrow(Tokens(Rms)).plan
    assert plan is not None
    assert plan.counting == {}
    assert plan.rescaled["norms.0.weight"] == (1e-3, pytest.approx(1e-3 * 16 / 12))


def test_where_only_widths_may_go_the_refusal_says_how_to_ask_for_them() -> None:
    model = nn.Sequential(nn.Linear(6, 16), nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, 3)).eval()
    traced = fxprune.trace(model, torch.randn(2, 6), modes=("eval",))
    with pytest.raises(PruningError, match='1 of the kind "width", which kinds="width" asks for'):
        fxprune.prune.channels(traced, 0.5)


def test_a_budget_that_the_width_alone_could_reach_says_so() -> None:
    model = Tokens()
    traced = traced_tokens(model)
    with pytest.raises(BudgetError, match='16 units of the kind "width" were left alone'):
        fxprune.prune.channels(traced, macs=0.15)
    kinds = sorted({group.kind for group in fxprune.channel_groups(traced) if group.reason is None})
    report = fxprune.prune.channels(traced, macs=0.15, kinds=kinds)
    assert report.macs[1] <= 0.15 * report.macs[0]
    with pytest.raises(BudgetError) as refusal:
        fxprune.prune.channels(traced_tokens(model), macs=0.001, kinds=kinds)
    assert "left alone" not in str(refusal.value)
