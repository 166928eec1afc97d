"""Blocks of which nothing is left leave a class that is built from a configuration."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.graph.depths import Renaming, shallower


class Numbers:
    """A configuration as libraries have it."""

    def __init__(self) -> None:
        self.width, self.inner, self.layers, self.readers = 12, 20, 4, 2
        self.layer_types = ["plain", "gated", "gated", "plain"]

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    @classmethod
    def from_dict(cls, found: dict[str, Any]) -> Numbers:
        read = cls()
        vars(read).update(found)
        if len(read.layer_types) != read.layers:
            raise ValueError("a type for each layer is needed.")
        return read


class Layer(nn.Module):
    def __init__(self, config: Numbers, index: int, *, is_gated: bool) -> None:
        super().__init__()
        self.index, self.is_gated = index, is_gated
        self.norm = nn.LayerNorm(config.width)
        self.up, self.down = nn.Linear(config.width, config.inner), nn.Linear(config.inner, config.width)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.up(self.norm(x))
        return x + self.down(inner * inner.sigmoid() if self.is_gated else inner.relu())


class Model(nn.Module):
    config_class: ClassVar[type] = Numbers

    def __init__(self, config: Numbers) -> None:
        super().__init__()
        self.config, self.count = config, config.layers
        self.words = nn.Embedding(20, config.width)
        self.layers = nn.ModuleList(self.layer(config, index) for index in range(config.layers))
        self.readers = nn.ModuleList(Layer(config, 0, is_gated=False) for _ in range(config.readers))
        self.unused = nn.ModuleList(nn.Linear(config.width, 2) for _ in range(3))
        self.head = nn.Linear(config.width, 5)

    def layer(self, config: Numbers, index: int) -> Layer:
        return Layer(config, index, is_gated=config.layer_types[index] == "gated")

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids)
        for index in range(self.count):
            x = self.layers[index](x)
        for reader in self.readers:
            x = reader(x)
        return self.head(x)


class Alternating(Model):
    """Which layers are gated follows from their numbers."""

    def layer(self, config: Numbers, index: int) -> Layer:
        return Layer(config, index, is_gated=index % 2 == 1)


class Skipping(Model):
    """Code names an entry by its number."""

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) + self.head(self.layers[3](self.words(ids)))


class Twins(nn.Module):
    config_class: ClassVar[type] = Numbers

    def __init__(self, config: Numbers) -> None:
        super().__init__()
        self.config = config
        self.layers, self.others = (
            nn.ModuleList(nn.Linear(4, 4) for _ in range(config.layers)) for _ in ("layers", "others")
        )


IDS = torch.randint(20, (3, 7))


def finalized(
    model: nn.Module, blocks: Iterable[str], prune: Callable[[fxprune.TracedModule], object] = lambda traced: None
) -> tuple[fxprune.TracedModule, fxprune.TracedModule]:
    """The traced model with masks on what ends these blocks, and what is left of it."""
    traced = fxprune.trace(model.eval(), (IDS,))
    for name in (f"{block}.down.{kind}" for block in blocks for kind in ("weight", "bias")):
        fxprune.prune.custom_from_mask(traced, name, torch.zeros_like(traced.get_parameter(name)))
    prune(traced)
    return traced, fxprune.finalize(traced)


def test_what_is_left_of_a_list_counts_anew_and_is_said_by_the_configuration() -> None:
    model = Model(Numbers())
    traced, final = finalized(model, ["layers.0", "layers.2"])
    small: Any = fxprune.write_back(final, model)
    assert torch.equal(small(IDS), final(IDS))
    torch.testing.assert_close(small(IDS), traced(IDS))
    assert len(small.layers) == small.count == small.config.layers == 2
    assert [(layer.index, layer.is_gated) for layer in small.layers] == [(0, True), (1, False)]
    assert torch.equal(small.layers[1].up.weight, model.layers[3].up.weight)
    assert small.config.layer_types == ["gated", "plain"]
    again = Model(Numbers.from_dict(small.config.to_dict())).eval()
    again.load_state_dict(small.state_dict())
    assert torch.equal(again(IDS), small(IDS))
    assert (len(model.layers), model.count, model.config.layers, model.layers[3].index) == (4, 4, 4, 3)
    assert len(small.unused) == 3  # calls of another form may run them


def test_lists_lose_blocks_by_numbers_of_their_own_and_channels_too() -> None:
    model = Model(Numbers())
    masks = ["layers.1", "readers.0"]
    traced, final = finalized(model, masks, lambda t: fxprune.prune.channels(t, macs=0.5, runnable=model))
    small: Any = fxprune.write_back(final, model)
    assert (len(small.layers), len(small.readers), small.config.layers, small.config.readers) == (3, 1, 3, 1)
    assert small.config.inner == small.layers[0].up.out_features < 20
    torch.testing.assert_close(small(IDS), traced(IDS))
    assert model.readers[0].down.weight.any()


def test_flags_modes_and_training_are_those_of_the_entries_that_are_left() -> None:
    model = Model(Numbers())
    model.layers[3].up.weight.requires_grad_(False)
    _, final = finalized(model, ["layers.1"])
    model.train()
    model.layers[3].norm.eval()
    small: Any = fxprune.write_back(final, model)
    assert [layer.up.weight.requires_grad for layer in small.layers] == [True, True, False]
    assert [layer.norm.training for layer in small.layers] == [True, True, False]
    small(IDS).sum().backward()
    assert small.layers[1].up.weight.grad is not None


@pytest.mark.parametrize("kind", [Alternating, Skipping])
def test_a_class_that_computes_something_else_then_keeps_all_with_zeros(kind: type[Model]) -> None:
    model = kind(Numbers())
    _, final = finalized(model, ["layers.1"])
    small: Any = fxprune.write_back(final, model)
    assert len(small.layers) == small.config.layers == 4
    torch.testing.assert_close(small(IDS), final(IDS))


def test_two_blocks_may_go_where_one_cannot() -> None:
    model = Alternating(Numbers())
    _, final = finalized(model, ["layers.1", "layers.2"])
    small: Any = fxprune.write_back(final, model)
    assert len(small.layers) == 2
    torch.testing.assert_close(small(IDS), final(IDS))


def test_a_module_without_a_configuration_keeps_all() -> None:
    layers = nn.Sequential(*(Layer(Numbers(), i, is_gated=False) for i in range(3)))
    model = nn.Sequential(nn.Embedding(20, 12), layers, nn.Linear(12, 2))
    _, final = finalized(model, ["1.1"])
    small: Any = fxprune.write_back(final, model)
    assert len(small[1]) == 3
    torch.testing.assert_close(small(IDS), final(IDS))


class Around(nn.Module):
    """A user's own module, with one of a library in it, which left out what its class makes."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Model(Numbers())
        del self.model.unused
        self.classes = nn.Linear(5, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.classes(self.model(ids).relu())


def test_a_model_within_another_one_and_without_all_that_its_class_makes() -> None:
    model = Around()
    traced, final = finalized(model, ["model.layers.0", "model.readers.1"])
    small: Any = fxprune.write_back(final, model)
    assert (len(small.model.layers), small.model.config.layers, small.model.config.readers) == (3, 3, 1)
    assert small.model.config.layer_types == ["gated", "gated", "plain"]
    torch.testing.assert_close(small(IDS), traced(IDS))


def test_one_number_that_says_several_lists_takes_the_same_from_all() -> None:
    twins = Twins(Numbers())
    assert shallower(twins, {"layers": frozenset({1})}) is None
    found = shallower(twins, {"layers": frozenset({1}), "others": frozenset({1})})
    assert found is not None
    assert found.parts[0].config.layers == 3


def test_names_within_lists_within_lists() -> None:
    names = Renaming({"stages": frozenset({0}), "stages.2.blocks": frozenset({1, 2})})
    assert names("stages.0.weight") is None
    assert names("stages.2.blocks.3.weight") == "stages.1.blocks.1.weight"
    assert names("stages.2.blocks.1") is None
    assert names("stages.1.blocks.1.bias") == "stages.0.blocks.1.bias"
    assert names("head.0.weight") == "head.0.weight"


@pytest.mark.filterwarnings("ignore")
def test_a_decoder_of_transformers_with_fewer_layers_is_saved_loaded_and_generates(
    tmp_path: Path, transformers: Any
) -> None:
    options = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    sliding = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2, "num_hidden_layers": 4}
    config = transformers.Qwen2Config(vocab_size=60, use_cache=False, pad_token_id=0, **options, **sliding)
    model = transformers.Qwen2ForCausalLM(config).eval()
    ids = torch.randint(3, 60, (2, 12))
    traced = fxprune.trace(model, (ids,), modes=("eval",))
    for name in ("model.layers.1.self_attn.o_proj.weight", "model.layers.1.mlp.down_proj.weight"):
        fxprune.prune.custom_from_mask(traced, name, torch.zeros_like(traced.get_parameter(name)))
    small = fxprune.write_back(fxprune.finalize(traced), model)
    small.save_pretrained(tmp_path)
    again = transformers.Qwen2ForCausalLM.from_pretrained(tmp_path).eval()
    assert again.config.layer_types == ["full_attention", "sliding_attention", "sliding_attention"]
    torch.testing.assert_close(again(ids).logits, traced(ids).logits)
    told = [again.generate(ids, max_new_tokens=6, use_cache=use, do_sample=False) for use in (True, False)]
    assert torch.equal(*told)
