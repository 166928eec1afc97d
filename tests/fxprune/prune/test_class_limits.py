"""Channels chosen by trying what the class of a model runs with."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.errors import PruningError, WriteBackError


class FirstHalf(nn.Module):
    """A convolution of the first channels alone; where they end is a number in its code."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(16, 16, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.conv(x[:, :16]), x[:, 16:]], 1)


class Partial(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 32, 1), nn.ReLU(), FirstHalf(), nn.Conv2d(32, 64, 1), nn.ReLU(), nn.Conv2d(64, 32, 1),
            FirstHalf(), nn.Conv2d(32, 5, 1),
        )  # fmt: skip


class Cascade(nn.Module):
    """Heads one after the other, each a layer of its own; all have the sizes that two attributes say."""

    def __init__(self, key: int = 16, value: int = 16) -> None:
        super().__init__()
        self.key, self.value = key, value
        self.heads = nn.ModuleList(nn.Linear(6, 2 * key + value) for _ in range(3))
        self.project = nn.Linear(3 * value, 4)

    def forward(self, x: Tensor) -> Tensor:
        found = []
        for head in self.heads:
            query, key, value = head(x).split([self.key, self.key, self.value], -1)
            found.append((query @ key.transpose(-1, -2)).relu() @ value)
        return self.project(torch.cat(found, -1))


class OneWidth(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        if x.shape[-1] != 16:
            raise ValueError("16 units are needed")
        return self.last(x)


class ByRoot(nn.Module):
    """Products that are divided by the root of a number of channels, which the class reads where it is run."""

    def __init__(self) -> None:
        super().__init__()
        self.size = 24
        self.other = nn.Linear(24, self.size)

    def forward(self, x: Tensor) -> Tensor:
        other = self.other(x).unflatten(2, (1, self.size))
        products = torch.einsum("bnhc,bmhc->bnm", x.unflatten(2, (1, self.size)), other)
        return x * (products / self.size**0.5).amax(2, keepdim=True).sigmoid()


class AroundRoot(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.root, self.last = nn.Linear(6, 24), ByRoot(), nn.Linear(32, 4)
        self.second, self.other, self.width = nn.Linear(24, 32), nn.Linear(6, 32), 32

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(self.root(self.first(x).relu())) + self.other(x)
        return self.last(y.relu().unflatten(2, (1, self.width)).flatten(2))


def test_only_what_computes_something_else_stays_where_all_would_come_back_as_zeros() -> None:
    torch.manual_seed(0)
    model, x = AroundRoot(), torch.randn(2, 5, 6)
    traced, small = cut(model, x, macs=0.6)
    assert small.root.other.out_features == 24
    assert small.second.out_features == small.width < 32
    assert_same(traced, small, x)


def cut(model: nn.Module, x: Tensor, **options: object) -> tuple[fxprune.TracedModule, nn.Module]:
    """The traced model with its masks, and the model of its class that is left."""
    traced = fxprune.trace(model.eval(), x, modes=("eval",))
    options = {"round_to": 1, "runnable": model, **options}
    fxprune.prune.channels(traced, **options)  # type: ignore[arg-type]
    return traced, fxprune.write_back(fxprune.finalize(traced), model)


def assert_same(traced: fxprune.TracedModule, small: nn.Module, x: Tensor) -> None:
    x = torch.cat([x, x.flip(0)]).double()
    torch.testing.assert_close(small.double()(x), traced.double()(x), rtol=1e-9, atol=1e-9)


def test_channels_that_a_number_in_the_code_counts_stay_and_the_others_go() -> None:
    torch.manual_seed(0)
    model, x = Partial(), torch.randn(2, 3, 6, 6)
    traced = fxprune.trace(model.eval(), x, modes=("eval",))
    fxprune.prune.channels(traced, 0.5, round_to=1)
    with pytest.raises(WriteBackError) as plain:
        fxprune.write_back(fxprune.finalize(traced), model)
    assert plain.value.places
    traced, small = cut(model, x, macs=0.7)
    assert small[2].conv.weight.shape == (16, 16, 3, 3)
    assert small[3].out_channels < 64
    assert_same(traced, small, x)


def test_layers_that_one_attribute_sizes_lose_equally_many() -> None:
    torch.manual_seed(0)
    model, x = Cascade(), torch.randn(2, 5, 6)
    traced, small = cut(model, x, macs=0.6)
    assert (small.key, small.value) < (16, 16)
    assert len({head.out_features for head in small.heads}) == 1
    assert_same(traced, small, x)


def test_a_class_that_runs_with_no_other_size_is_refused_with_the_module() -> None:
    model, x = nn.Sequential(OneWidth()), torch.randn(2, 6)
    traced = fxprune.trace(model.eval(), x, modes=("eval",))
    with pytest.raises(PruningError, match=r"0 \(OneWidth\) does not run, or computes something else, with fewer"):
        fxprune.prune.channels(traced, 0.5, round_to=1, runnable=model)
    assert not [name for name in traced.state_dict() if name.endswith("_mask")]


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.scale = nn.Linear(6, 16), nn.Linear(16, 3), 1.0

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).relu() * self.scale)


def test_a_model_that_is_no_longer_what_was_traced_is_refused_with_what_write_back_says() -> None:
    torch.manual_seed(0)
    model, x = Scaled(), torch.randn(2, 6)
    traced = fxprune.trace(model.eval(), x, modes=("eval",))
    model.scale = 2.0
    with pytest.raises(PruningError, match="another model than the one that was traced") as refusal:
        fxprune.prune.channels(traced, 0.5, round_to=1, runnable=model)
    assert isinstance(refusal.value.__cause__, WriteBackError)
    assert str(refusal.value.__cause__) in str(refusal.value)
    assert not [name for name in traced.state_dict() if name.endswith("_mask")]


def test_data_is_read_once_more_after_the_class_was_tried() -> None:
    torch.manual_seed(0)
    model, x = Partial(), torch.randn(2, 3, 6, 6)
    batches = [torch.randn(4, 3, 6, 6) for _ in range(2)]
    reads = 0

    class Batches:
        def __iter__(self) -> Iterator[Tensor]:
            nonlocal reads
            reads += 1
            return iter(batches)

    traced, small = cut(model, x, macs=0.7, importance="obs", loader=Batches())
    once = reads
    assert_same(traced, small, x)
    assert once <= 2


class Biased(nn.Module):
    """Attention whose biases by position are looked up once for eval mode, and kept."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.project = nn.Linear(8, 96), nn.Linear(32, 8)
        self.biases = nn.Parameter(torch.randn(4, 5))
        self.register_buffer("distances", (torch.arange(5)[:, None] - torch.arange(5)).abs())
        self.kept: dict[str, Tensor] = {}

    def train(self, mode: bool = True) -> Biased:
        if mode:
            self.kept = {}
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        if "biases" not in self.kept or self.training:
            self.kept["biases"] = self.biases[:, self.distances]
        query, key, value = self.qkv(x).unflatten(-1, (4, 24)).transpose(1, 2).chunk(3, -1)
        weights = (query @ key.transpose(-1, -2) + self.kept["biases"]).softmax(-1)
        return self.project((weights @ value).transpose(1, 2).flatten(2))


def test_what_a_module_keeps_for_eval_mode_is_computed_anew() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), Biased()).eval(), torch.randn(2, 5, 6)
    with torch.no_grad():
        model(x)
        before = model[2].kept["biases"]
        traced = fxprune.trace(model, x, modes=("eval",))
        assert model[2].kept["biases"] is before
        model[2].biases.mul_(2)
        assert torch.equal(traced(x), model.train().eval()(x))
    fxprune.prune.channels(traced, 0.5, targets="0", round_to=1, runnable=model)
    small = fxprune.write_back(fxprune.finalize(traced), model)
    assert small[0].out_features == 4
    with torch.no_grad():
        assert_same(traced, small, x)
