"""Models that are built from a configuration: channels that it can say, and one that says them afterwards."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.errors import ArgumentTypeError, ConfigurationWarning
from fxprune.graph.configurations import Configuration


class Numbers:
    """A configuration as libraries have it."""

    def __init__(self, width: int = 12, inner: int | None = None, heads: int = 4, head_dim: int | None = None) -> None:
        self.width, self.inner, self.heads, self.head_dim = width, inner, heads, head_dim
        self.layers, self.length = 3, 16

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))


class Layer(nn.Module):
    def __init__(self, config: Numbers) -> None:
        super().__init__()
        self.head_dim = config.head_dim or config.width // config.heads
        size = config.heads * self.head_dim
        inner = config.inner or 4 * config.width
        self.query, self.key, self.value = (nn.Linear(config.width, size) for _ in range(3))
        self.out = nn.Linear(size, config.width)
        self.up, self.down = nn.Linear(config.width, inner), nn.Linear(inner, config.width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            f(x).view(*x.shape[:2], -1, self.head_dim).transpose(1, 2) for f in (self.query, self.key, self.value)
        )
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + self.out(y.transpose(1, 2).reshape(*x.shape[:2], -1))
        return x + self.down(self.up(x).relu())


class Model(nn.Module):
    config_class: ClassVar[type] = Numbers

    def __init__(self, config: Numbers) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("places", torch.arange(config.length), persistent=False)
        self.words, self.positions = nn.Embedding(20, config.width), nn.Embedding(config.length, config.width)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.head = nn.Linear(config.width, 5)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids) + self.positions(self.places[: ids.shape[1]])
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


IDS = torch.randint(20, (2, 7))


def test_which_sizes_follow_from_which_number_is_found_by_building() -> None:
    found = Configuration.of(Model(Numbers()))
    assert found is not None
    assert found.numbers["inner"] == 48  # which is not said, and could be
    assert found.numbers["head_dim"] == 3
    assert ("layers.2.down.weight", 1) in found.followers["inner"]
    assert ("layers.0.up.weight", 1) not in found.followers["inner"]
    assert ("layers.0.query.weight", 0) in found.followers["heads"] & found.followers["head_dim"]
    wanted = {
        name: tuple(value.shape) for name, value in Model(Numbers(inner=20, heads=3, head_dim=3)).state_dict().items()
    }
    wanted["places"] = (16,)
    assert next(found.expressing(wanted)) == {"inner": 20, "heads": 3, "head_dim": 3}
    assert not list(found.expressing(wanted | {"layers.0.up.bias": (19,)}))
    assert Configuration.of(nn.Linear(2, 2)) is None


def test_what_is_chosen_for_a_class_is_built_by_it_from_the_configuration_that_comes_back() -> None:
    model = Model(Numbers()).eval()
    traced = fxprune.trace(model, IDS, modes=("eval",))
    report = fxprune.prune.channels(traced, macs=0.6, runnable=model)
    assert 0.5 < report.macs[1] / report.macs[0] <= 0.6
    final = fxprune.finalize(traced)
    assert {len(final.get_parameter(f"layers.{i}.up.weight")) for i in range(3)} == {
        len(final.get_parameter("layers.0.up.weight"))
    }
    small = fxprune.write_back(final, model)
    assert small.config is not model.config
    assert (model.config.inner, model.config.heads) == (None, 4)
    built = Model(copy.deepcopy(small.config)).eval()
    built.load_state_dict(small.state_dict())
    longer = torch.randint(20, (3, 11))  # places that the sample had not
    assert torch.equal(built(longer), small(longer))
    torch.testing.assert_close(built(IDS), traced(IDS))
    assert sum(p.numel() for p in built.parameters()) < sum(p.numel() for p in model.parameters())


def test_a_width_for_each_layer_comes_back_with_a_warning_that_says_how_to_store_it(tmp_path: Path) -> None:
    model = Model(Numbers()).eval()
    traced = fxprune.trace(model, IDS, modes=("eval",))
    fxprune.prune.channels(traced, 0.5, targets="layers.1.up.weight")
    final = fxprune.finalize(traced)
    with pytest.warns(ConfigurationWarning, match=r"inner gives layers.*fxprune.save\(final, path\)"):
        small = fxprune.write_back(final, model)
    assert small.config.inner is None
    fxprune.save(final, tmp_path / "small.fxp")
    with pytest.warns(ConfigurationWarning):
        again = fxprune.write_back(fxprune.load(tmp_path / "small.fxp"), model)
    assert torch.equal(again(IDS), small(IDS))


def test_a_part_of_what_one_number_says_is_left_alone() -> None:
    model = Model(Numbers()).eval()
    traced = fxprune.trace(model, IDS, modes=("eval",))
    with pytest.raises(fxprune.errors.PruningError, match="follows from the configuration of Model, together with"):
        fxprune.prune.channels(traced, 0.5, targets="layers.1.up.weight", runnable=model)
    with pytest.raises(ArgumentTypeError, match="runnable is a Numbers: the eager module"):
        fxprune.prune.channels(traced, 0.5, runnable=model.config)  # type: ignore[arg-type]
    assert not fxprune.prune.is_pruned(traced)


class Halves(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Conv2d(3, 32, 1), nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(48, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        parts = list(self.first(x).relu().chunk(2, 1))
        parts.append(self.middle(parts[-1]).relu())
        return self.last(torch.cat(parts, 1))


def test_halves_by_chunk_are_chosen_equal_so_that_nothing_comes_back_as_zeros() -> None:
    model = Halves().eval()
    nn.init.constant_(model.first.weight[:16], 0.01)  # the first half would go alone
    traced = fxprune.trace(model, torch.randn(2, 3, 6, 6))
    fxprune.prune.channels(traced, 0.5, targets="first", round_to=1, runnable=model)
    final = fxprune.finalize(traced)
    small = fxprune.write_back(final, model)
    kept = final.plan.kept["first.weight"][0]
    assert int((kept < 16).sum()) * 2 == len(kept) < 32
    assert small.first.out_channels == len(kept)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["Bert", "Llama", "GPT2", "T5"])
def test_models_of_transformers_go_through_from_pretrained(name: str, tmp_path: Path, transformers: Any) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    gpt = {"n_embd": 32, "n_layer": 2, "n_head": 4, "use_cache": False}
    t5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    kind, config = {
        "Bert": ("BertForSequenceClassification", transformers.BertConfig(**sizes, vocab_size=99)),
        "Llama": (
            "LlamaForCausalLM",
            transformers.LlamaConfig(**sizes, vocab_size=99, num_key_value_heads=2, use_cache=False),
        ),
        "GPT2": ("GPT2LMHeadModel", transformers.GPT2Config(**gpt, vocab_size=99)),
        "T5": ("T5EncoderModel", transformers.T5Config(**t5, vocab_size=99)),
    }[name]
    model = getattr(transformers, kind)(config).eval()
    ids = torch.randint(5, 90, (2, 9))
    traced = fxprune.trace(model, (), {"input_ids": ids}, modes=("eval",))
    fxprune.prune.channels(traced, macs=0.7, runnable=model)
    small = fxprune.write_back(fxprune.finalize(traced), model)
    small.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert loaded.num_parameters() < model.num_parameters()
    torch.testing.assert_close(loaded(ids)[0], traced(input_ids=ids)[0])


class Fused(nn.Module):
    """Attention that reads how many heads there are from the configuration which all layers share."""

    def __init__(self, config: Numbers) -> None:
        super().__init__()
        self.config = config
        self.head_dim = config.head_dim or config.width // config.heads
        self.qkv = nn.Linear(config.width, 3 * config.heads * self.head_dim)
        self.out = nn.Linear(config.heads * self.head_dim, config.width)

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        parts = self.qkv(x).split(self.config.heads * self.head_dim, -1)
        q, k, v = (part.view(*x.shape[:2], -1, self.head_dim).transpose(1, 2) for part in parts)
        y = nn.functional.scaled_dot_product_attention(q * scale, k, v)
        return x + self.out(y.transpose(1, 2).reshape(*x.shape[:2], -1))


class Scaled(nn.Module):
    """A model with one number that heads follow from, and another that a table of fixed length follows from too."""

    config_class: ClassVar[type] = Numbers

    def __init__(self, config: Numbers) -> None:
        super().__init__()
        self.config = config
        self.words = nn.Embedding(20, config.width)
        size = config.head_dim or config.width // config.heads
        self.register_buffer("scale", torch.linspace(0.5, 1.5, size), persistent=False)
        self.layers = nn.ModuleList(Fused(config) for _ in range(config.layers))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids)
        for layer in self.layers:
            x = layer(x, self.scale)
        return x.sum(-1)


def test_heads_go_where_their_own_number_says_how_many_and_their_size_stays() -> None:
    model = Scaled(Numbers(heads=4, head_dim=6)).eval()
    traced = fxprune.trace(model, IDS, modes=("eval",))
    report = fxprune.prune.channels(traced, 0.5, kinds="attention head", round_to=1, runnable=model)
    assert list(report.removed.values()) == [(2, 4)] * 3
    small = fxprune.write_back(fxprune.finalize(traced), model)
    assert (small.config.heads, small.config.head_dim, model.config.heads) == (2, 6, 4)
    assert small.layers[1].qkv.out_features == 3 * 2 * 6
    built = Scaled(copy.deepcopy(small.config)).eval()
    built.load_state_dict(small.state_dict())
    torch.testing.assert_close(built(IDS), traced(IDS))


def test_a_number_that_all_layers_read_from_their_configuration_follows_without_being_asked_for() -> None:
    model = Scaled(Numbers(heads=4)).eval()
    traced = fxprune.trace(model, IDS, modes=("eval",))
    fxprune.prune.channels(traced, 0.5, kinds="attention head", scope="local", round_to=1)
    small = fxprune.write_back(fxprune.finalize(traced), model)
    assert small.config.heads == 2
    assert small.layers[0].qkv.out_features == 3 * 2 * 3
    torch.testing.assert_close(small(IDS), traced(IDS))
