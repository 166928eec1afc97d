"""`write_back` into classes that lay out channels in parts: chunks, splits by attributes, depthwise parts, encoders."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune import write_back
from fxprune.errors import WriteBackError


def zeroed(weight: Tensor, rows: list[int]) -> None:
    with torch.no_grad():
        weight[rows] = 0


def written(model: nn.Module, x: Tensor) -> tuple[fxprune.TracedModule, nn.Module]:
    """The finalized module and what comes back of it, which computes what the model does."""
    model = model.double().eval()
    final = fxprune.finalize(fxprune.trace(model, x), align=1)
    small = write_back(final, model)
    assert type(small) is type(model)
    with torch.no_grad():
        torch.testing.assert_close(small(x), model(x), rtol=0, atol=1e-9)
    return final, small


class Chunked(nn.Module):
    """Attention over positions whose queries, keys and values are chunks of one convolution, or of two."""

    def __init__(self, *, convolved: bool) -> None:
        super().__init__()
        self.qkv, self.out = nn.Conv2d(6, 24, 1, bias=False), nn.Conv2d(8, 6, 1)
        self.local = nn.Conv2d(24, 24, 3, padding=1, groups=24, bias=False) if convolved else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        chunks = self.local(self.qkv(x)).chunk(3, 1)
        q, k, v = (part.reshape(x.shape[0], 2, -1, x.shape[2] * x.shape[3]) for part in chunks)
        y = v @ (q.transpose(2, 3) @ k).softmax(-1).transpose(2, 3)
        return self.out(y.reshape(x.shape[0], -1, *x.shape[2:]))


@pytest.mark.parametrize("convolved", [False, True])
@pytest.mark.parametrize(
    ("rows", "left"),
    [([17, 18, 21, 22], 24), ([1, 5, 9, 13], 24), ([1, 5, 9, 13, 17, 21], 18)],
)
def test_chunks_behind_a_depthwise_layer_are_filled_up_with_its_groups(
    rows: list[int], left: int, convolved: bool
) -> None:
    model = Chunked(convolved=convolved)
    zeroed(model.qkv.weight, rows)
    final, small = written(model, torch.randn(2, 6, 4, 4, dtype=torch.float64))
    assert len(final.get_parameter("qkv.weight")) < 24
    if convolved:  # without, queries and keys may go by themselves
        assert len(small.qkv.weight) == left
        assert small.local.groups == small.local.in_channels == small.local.out_channels == left


def test_a_number_of_heads_in_the_code_is_refused_where_every_channel_would_have_to_come_back() -> None:
    model = Chunked(convolved=True).double().eval()
    zeroed(model.qkv.weight, [20, 21, 22, 23])
    final = fxprune.finalize(fxprune.trace(model, torch.randn(2, 6, 4, 4, dtype=torch.float64)), align=1)
    assert len(final.get_parameter("qkv.weight")) == 12
    with pytest.raises(WriteBackError, match="computes with a size that is no attribute"):
        write_back(final, model)


class ByAttributes(nn.Module):
    """Two parts of a layer, of sizes that are attributes; the first part's stays as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = 6, 10
        self.layer, self.first, self.second = nn.Linear(4, 16), nn.Linear(6, 3), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        a, b = torch.split(self.layer(x).relu(), [self.a, self.b], 1)
        return self.first(a) + self.second(b)


def test_a_split_by_attributes_gets_the_size_of_the_part_that_shrank() -> None:
    model = ByAttributes()
    zeroed(model.layer.weight, [8, 9, 12])
    zeroed(model.layer.bias, [8, 9, 12])
    _, small = written(model, torch.randn(2, 4, dtype=torch.float64))
    assert (small.a, small.b, small.layer.out_features) == (6, 7, 13)


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("heads", [[1], [0, 3]])
def test_the_same_heads_cut_in_every_layer_of_an_encoder_come_back(layers: int, heads: list[int]) -> None:
    layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
    for block in model.layers:
        with torch.no_grad():
            for head in heads:
                block.self_attn.out_proj.weight[:, 4 * head : 4 * head + 4] = 0
    final, small = written(model, torch.randn(2, 5, 16, dtype=torch.float64))
    rows = 48 - 12 * len(heads)
    assert {len(final.get_parameter(f"layers.{i}.self_attn.in_proj_weight")) for i in range(layers)} == {rows}
    assert small.layers[0].linear1.out_features == 32


def test_an_encoder_cut_to_a_budget_comes_back() -> None:
    layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False).double().eval()
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    traced = fxprune.trace(model, x)
    fxprune.prune.channels(traced, macs=0.6)
    small = write_back(fxprune.finalize(traced), model)
    torch.testing.assert_close(small(x), traced(x), rtol=0, atol=1e-9)
    assert max(block.linear1.out_features for block in small.layers) < 32


class Levels(nn.Module):
    """A head that two levels share, with a batch norm each."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head, self.last = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 6, 1), nn.Conv2d(6, 3, 1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(6) for _ in range(2))

    def forward(self, x: Tensor) -> list[Tensor]:
        y = self.stem(x).relu()
        levels = y, nn.functional.avg_pool2d(y, 2)
        return [self.last(norm(self.head(z)).relu()) for norm, z in zip(self.norms, levels, strict=True)]


class Shared(nn.Module):
    """A layer on both halves of another."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.shared = nn.Conv2d(3, 8, 1), nn.Conv2d(4, 5, 1)

    def forward(self, x: Tensor) -> list[Tensor]:
        return [self.shared(half) for half in self.first(x).relu().split([4, 4], 1)]


@pytest.mark.parametrize(("kind", "layer", "rows"), [(Levels, "head", [1, 3]), (Shared, "first", [1, 5])])
def test_a_layer_that_several_places_share_is_loaded_with_the_biases_that_hold_their_constants(
    kind: type[nn.Module], layer: str, rows: list[int], tmp_path: Path
) -> None:
    model, x = kind().eval(), torch.randn(2, 3, 8, 8)
    for norm in getattr(model, "norms", ()):
        nn.init.uniform_(norm.running_mean)
        nn.init.uniform_(norm.bias, 0.5, 1.0)
    traced = fxprune.trace(model, x, modes=("eval",))
    mask = torch.ones_like(model.get_parameter(f"{layer}.weight"))
    mask[rows] = 0
    fxprune.prune.custom_from_mask(traced, f"{layer}.weight", mask)
    final = fxprune.finalize(traced, align=1)
    assert any("folded_bias" in name for name in final.state_dict())
    fxprune.save(final, tmp_path / "model.fxp")
    for given in (None, kind().eval(), model):
        loaded = fxprune.load(tmp_path / "model.fxp", given)
        for found, wanted in zip(loaded(x), final(x), strict=True):
            assert torch.equal(found, wanted)


class Heads(nn.Module):
    """Attention without what follows it, as in models whose output layer is a sibling."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.size = 4, 8
        self.query, self.key, self.value = (nn.Linear(12, 32) for _ in range(3))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (f(x).view(*x.shape[:2], -1, self.size).transpose(1, 2) for f in (self.query, self.key, self.value))
        weights = (q @ k.transpose(2, 3)).masked_fill(~mask, -10.0).softmax(-1)
        return (weights @ v).transpose(1, 2).reshape(*x.shape[:2], -1)


class HeadsAndOutput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.output = Heads(), nn.Linear(32, 12)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return x + self.output(self.attention(x, mask))


class Looked(nn.Module):
    """Layers of attention whose mask is looked up by sample, so that its batch has a name of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(HeadsAndOutput() for _ in range(2))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        samples, places = torch.arange(x.shape[0])[:, None, None, None], torch.arange(x.shape[1])
        looked_up = mask.bool()[samples, places]
        for layer in self.layers:
            x = layer(x, looked_up)
        return x


def test_heads_that_lose_unequally_many_channels_come_back_with_an_output_layer_beside_them() -> None:
    model = Looked().double().eval()
    x, mask = torch.randn(2, 5, 12, dtype=torch.float64), torch.ones(2, 5, dtype=torch.int64)
    mask[1, 3:] = 0
    traced = fxprune.trace(model, (x, mask))
    with torch.no_grad():
        for i in range(2):
            for number, name in ((2, "query"), (2, "key"), (3, "value")):
                rows = [8 * head + channel for head in range(4) for channel in range(number)]
                for kind in ("weight", "bias"):
                    parameter = model.get_parameter(f"layers.{i}.attention.{name}.{kind}")
                    parameter[rows] = 0
    final = fxprune.finalize(traced, align=1)
    sizes = [len(final.get_parameter(f"layers.0.attention.{name}.weight")) for name in ("query", "value")]
    assert sizes == [24, 20]
    small = write_back(final, model)
    assert [layer.attention.size for layer in small.layers] == [6, 6]
    for batch in (2, 3):
        with torch.no_grad():
            inputs = torch.randn(batch, 5, 12, dtype=torch.float64), torch.ones(batch, 5, dtype=torch.int64)
            torch.testing.assert_close(small(*inputs), model(*inputs), rtol=0, atol=1e-9)


class Shifted(nn.Module):
    """Splits by an attribute, after a shift for each sample that it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.half = 8
        self.first, self.last = nn.Linear(6, 16), nn.Linear(8, 6)

    def forward(self, x: Tensor, shift: Tensor) -> Tensor:
        one, two = (self.first(x) + shift[:, None]).split(self.half, 1)
        return self.last(one.relu() * two.relu())


class OneShiftForAll(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.shifted = Shifted()

    def forward(self, x: Tensor, shift: Tensor) -> Tensor:
        return self.shifted(x, shift.expand(x.shape[0]))


def test_a_module_that_is_given_one_value_for_all_samples_is_tried_like_others() -> None:
    model, inputs = OneShiftForAll().eval(), (torch.randn(2, 6), torch.tensor(0.5))
    with torch.no_grad():
        for tensor in (model.shifted.first.weight, model.shifted.first.bias):
            tensor[[0, 3, 8, 11]] = 0
        model.shifted.last.weight[:, [0, 3]] = 0
    small = fxprune.write_back(fxprune.finalize(fxprune.trace(model, inputs, modes=("eval",)), align=1), model)
    assert (small.shifted.half, small.shifted.first.out_features) == (6, 12)
    torch.testing.assert_close(small(*inputs), model(*inputs))


class Balanced(nn.Module):
    """Two layers whose difference is weighed by what products of parameters alone say."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.other, self.down = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 3)
        self.first, self.second = nn.Parameter(torch.randn(5) / 4), nn.Parameter(torch.randn(5) / 4)

    def forward(self, x: Tensor) -> Tensor:
        balance = torch.exp((self.first * self.second).sum(-1)).type_as(x)
        y: Tensor = self.down(self.up(x).relu() - balance * self.other(x))
        return y


def test_parameters_that_make_a_constant_come_back_whole() -> None:
    torch.manual_seed(0)
    model = Balanced()
    for layer in (model.up, model.other):
        zeroed(layer.weight, [1, 4])
        zeroed(layer.bias, [1, 4])
    final, small = written(model, torch.randn(2, 6).double())
    assert final.plan is not None
    assert {"first", "second"} <= set(final.plan.dropped)
    assert torch.equal(small.first, model.first)
    assert small.up.out_features == 6


class Latents(nn.Module):
    """An autoencoder whose layer in the middle gives means and variances; nothing reads the variances."""

    def __init__(self) -> None:
        super().__init__()
        self.tile = 16  # a number that is none of a size, as of a configuration
        self.encode, self.moments = nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(32, 8, 1)
        self.decode, self.out = nn.Conv2d(4, 32, 3, padding=1), nn.Conv2d(32, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] > 4 * self.tile:
            x = x[..., : 4 * self.tile]
        means, _ = self.moments(self.encode(x).relu()).chunk(2, 1)
        y: Tensor = self.out(self.decode(means).relu())
        return y


def test_a_part_that_nothing_reads_comes_back_without_the_channels_of_other_layers() -> None:
    torch.manual_seed(0)
    model, x = Latents().double().eval(), torch.randn(2, 3, 8, 8).double()
    traced = fxprune.trace(model, x, modes=("eval",))
    fxprune.prune.channels(traced, macs=0.7, runnable=model, round_to=1)
    small = write_back(fxprune.finalize(traced, align=1), model)
    assert small.moments.out_channels == 8
    assert small.encode.out_channels + small.decode.out_channels < 50
    with torch.no_grad():
        torch.testing.assert_close(small(x), traced(x), rtol=0, atol=1e-9)


class Angles(nn.Module):
    """Positions turned by angles that are computed in float32, whatever the model is in."""

    def forward(self, x: Tensor) -> Tensor:
        angles = torch.arange(x.shape[1], dtype=torch.float32)[:, None] * 1e4 ** torch.linspace(0, 1, x.shape[2])
        return x * angles.cos().to(x.dtype)


class Turned(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.angles, self.first, self.second = Angles(), nn.Linear(8, 16), nn.Linear(16, 8)
        self.parts = 2

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(self.angles(x)).unflatten(2, (self.parts, -1)).relu()
        return self.second(x.flatten(2))


def test_code_that_rounds_to_float32_in_any_case_comes_back() -> None:
    torch.manual_seed(0)
    model, x = Turned().eval(), torch.randn(2, 50, 8)
    traced = fxprune.trace(model, x, modes=("eval",))
    fxprune.prune.channels(traced, 0.5, targets="first.*")
    final = fxprune.finalize(traced)
    small = write_back(final, model)
    assert small.first.out_features < 16
    torch.testing.assert_close(small(x), final(x), rtol=1e-5, atol=1e-5)
