"""Integers of a model's modules that the traced call does not read: other calls of the class do."""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

import fxprune
from fxprune.errors import ConfigurationWarning

IDS = torch.randint(5, 90, (2, 9))
MASK = torch.ones(2, 9, dtype=torch.int64)
MASK[0, :3] = 0


def llama(transformers: Any) -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=4,
        eos_token_id=None,
    )
    return transformers.LlamaForCausalLM(config).eval()


def without_cut_heads(model: nn.Module, final: fxprune.TracedModule) -> nn.Module:
    """The dense model, with zeros where the output projections read heads that went."""
    truth = copy.deepcopy(model)
    for name, parameter in truth.named_parameters():
        kept = final.plan.kept.get(name, {}).get(1) if final.plan is not None else None
        if name.endswith("o_proj.weight") and kept is not None:
            gone = torch.ones(parameter.shape[1], dtype=torch.bool)
            gone[kept] = False
            parameter.data[:, gone] = 0
    return truth


@pytest.mark.parametrize("layers", [(0, 1), (1,)])
@pytest.mark.filterwarnings("ignore")
def test_a_llama_that_lost_query_heads_takes_masks_and_generates(layers: tuple[int, ...], transformers: Any) -> None:
    model = llama(transformers)
    free = {"input_ids": {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}, "use_cache": None}
    traced = fxprune.trace(model, (IDS,), {"use_cache": False}, modes=("eval",), dynamic_shapes=free)
    for i in layers:
        fxprune.prune.channels(traced, 0.5, targets=f"*.layers.{i}.self_attn.q_proj.weight", kinds=["attention head"])
    final = fxprune.finalize(traced)
    small = fxprune.write_back(final, model)
    groups = [layer.self_attn.num_key_value_groups for layer in small.model.layers]
    assert groups == [1 if i in layers else 2 for i in range(2)]
    assert small.model.layers[1].self_attn.q_proj.out_features == 32
    assert (small.config.num_attention_heads == 4) == (len(layers) == 2)
    truth = without_cut_heads(model, final)
    masked = fxprune.finalize(
        fxprune.trace(truth, (IDS,), {"attention_mask": MASK, "use_cache": False}, modes=("eval",))
    )
    found = small(IDS, attention_mask=MASK, use_cache=False).logits
    torch.testing.assert_close(found[MASK.bool()], masked(IDS, attention_mask=MASK, use_cache=False)[0][MASK.bool()])
    torch.testing.assert_close(found[MASK.bool()], truth(IDS, attention_mask=MASK).logits[MASK.bool()])
    for inputs in ({}, {"attention_mask": MASK}):
        settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
        assert torch.equal(small.generate(IDS, **inputs, **settings), truth.generate(IDS, **inputs, **settings))
    tokens = IDS
    for _ in range(5):
        tokens = torch.cat([tokens, final(tokens, use_cache=False)[0][:, -1:].argmax(-1)], 1)
    assert torch.equal(small.generate(IDS, max_new_tokens=5, do_sample=False, pad_token_id=0), tokens)


class Numbers:
    def __init__(self) -> None:
        self.width, self.heads, self.shared = 12, 4, 2

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))


class Attention(nn.Module):
    """Reads how many query heads share a key-value head only where the call has a bias."""

    def __init__(self, config: Numbers) -> None:
        super().__init__()
        self.head_size, self.ratio, self.twice = 3, config.heads // config.shared, 2 * config.heads
        self.calls = 0
        self.query = nn.Linear(config.width, config.heads * 3)
        self.key, self.value = (nn.Linear(config.width, config.shared * 3) for _ in range(2))
        self.out = nn.Linear(config.heads * 3, config.width)

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        q, k, v = (f(x).view(*x.shape[:2], -1, 3).transpose(1, 2) for f in (self.query, self.key, self.value))
        if bias is None:
            y = nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        else:
            k, v = k.repeat_interleave(self.ratio, 1), v.repeat_interleave(self.ratio, 1)
            y = nn.functional.scaled_dot_product_attention(q, k, v, bias)
        return x + self.out(y.transpose(1, 2).flatten(2))


class Model(nn.Module):
    config_class: ClassVar[type] = Numbers

    def __init__(self, config: Numbers) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(Attention(config) for _ in range(2))
        self.head = nn.Linear(config.width, 5)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        for layer in self.layers:
            x = layer(x, bias)
        return self.head(x)


@pytest.mark.filterwarnings("ignore::fxprune.errors.ConfigurationWarning")
@pytest.mark.parametrize("targets", ["*.query.weight", "layers.1.query.weight"])
def test_integers_that_another_call_reads_are_what_the_class_makes_of_the_sizes(targets: str) -> None:
    model = Model(Numbers()).eval()
    model.layers[0].calls = 7  # of this instance alone
    x, bias = torch.randn(2, 6, 12), torch.randn(6, 6)
    traced = fxprune.trace(model, x, modes=("eval",))
    fxprune.prune.channels(traced, 0.5, targets=targets, kinds=["attention head"])
    small = fxprune.write_back(fxprune.finalize(traced), model)
    numbers = [(layer.ratio, layer.twice, layer.calls) for layer in small.layers]
    assert numbers == [(1, 4, 7) if targets[0] == "*" else (2, 8, 7), (1, 4, 0)]
    assert [(layer.ratio, layer.twice) for layer in model.layers] == [(2, 8), (2, 8)]
    torch.testing.assert_close(small(x, torch.zeros(6, 6)), traced(x))
    assert small(x, bias).shape == (2, 6, 5)


class InFours(Model):
    """A class that takes heads in fours only: no numbers give two."""

    def __init__(self, config: Numbers) -> None:
        if config.heads % 4:
            raise ValueError("heads come in fours")
        super().__init__(config)


def test_integers_that_nothing_says_are_named() -> None:
    model = InFours(Numbers()).eval()
    x = torch.randn(2, 6, 12)
    traced = fxprune.trace(model, x, modes=("eval",))
    fxprune.prune.channels(traced, 0.5, targets="layers.1.query.weight", kinds=["attention head"])
    final = fxprune.finalize(traced)
    with pytest.warns(
        ConfigurationWarning,
        match=r"can say\. layers\.1\.ratio, layers\.1\.twice may have to change with the sizes there",
    ):
        small = fxprune.write_back(final, model)
    torch.testing.assert_close(small(x), traced(x))
