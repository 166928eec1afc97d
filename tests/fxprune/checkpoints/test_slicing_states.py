"""States of the dense model, cut to the shrunk one: weights, their averages, and adapters that were trained on them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.errors import ArgumentTypeError, StateDictError


class Network(nn.Module):
    """A table, a convolution, a linear layer, and one whose weight has a row for each input."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(20, 12)
        self.conv = nn.Conv1d(12, 16, 3, padding=1)
        self.norm = nn.BatchNorm1d(16)
        self.up = nn.Linear(16, 16)
        self.down = nn.Parameter(torch.randn(16, 5) / 4)
        self.bias = nn.Parameter(torch.zeros(5))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.norm(self.conv(self.words(ids).transpose(1, 2))).relu().mean(2)
        return torch.addmm(self.bias, self.up(x).relu(), self.down)


def adapted(module: nn.Module, adapter: dict[str, Tensor], prefix: str) -> nn.Module:
    """A copy with the products of an adapter's parts added to its weights."""
    module = copy.deepcopy(module)
    a = {name.removeprefix(prefix).removesuffix(".weight"): value for name, value in adapter.items()}
    with torch.no_grad():
        module.words.weight += (a["words.lora_embedding_B"] @ a["words.lora_embedding_A"]).T
        first, second = a["conv.lora_A"], a["conv.lora_B"]
        module.conv.weight += torch.einsum("or,rik->oik", second[..., 0], first)
        module.up.weight += a["up.lora_B"] @ a["up.lora_A"]
    return module


@pytest.fixture
def model() -> Network:
    model = Network().eval()
    nn.init.normal_(model.norm.running_mean, 0, 0.2)
    return model.double()


@pytest.fixture
def final(model: Network) -> fxprune.TracedModule:
    traced = fxprune.trace(model, torch.randint(20, (2, 7)), modes=("eval",))
    fxprune.prune.channels(traced, 0.5, round_to=1)
    return fxprune.finalize(traced)


def test_an_adapter_of_the_dense_model_is_cut_as_the_weights_that_it_is_added_to(
    model: Network, final: fxprune.TracedModule
) -> None:
    prefix = "base_model.model."
    shapes = {
        "words.lora_embedding_A": (2, 20), "words.lora_embedding_B": (12, 2), "conv.lora_A.weight": (2, 12, 3),
        "conv.lora_B.weight": (16, 2, 1), "up.lora_A.weight": (2, 16), "up.lora_B.weight": (16, 2),
    }  # fmt: skip
    adapter = {prefix + name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}
    cut = fxprune.slice_state(final, adapter)
    assert list(cut) == list(adapter)
    assert cut[f"{prefix}up.lora_B.weight"].shape[0] < 16
    assert cut[f"{prefix}words.lora_embedding_A"] is adapter[f"{prefix}words.lora_embedding_A"]

    small = fxprune.write_back(final, model)
    dense = adapted(model, adapter, prefix)
    wanted = copy.deepcopy(small)
    wanted.load_state_dict({**small.state_dict(), **fxprune.slice_state(final, {
        name: value for name, value in dense.state_dict().items() if name.endswith("weight")
    })})  # fmt: skip
    ids = torch.randint(20, (3, 9))
    torch.testing.assert_close(adapted(small, cut, prefix)(ids), wanted(ids), rtol=1e-12, atol=1e-12)


def test_averages_of_weights_become_those_of_the_shrunk_model(model: Network, final: fxprune.TracedModule) -> None:
    state = {f"module.{name}": value for name, value in model.state_dict().items()}
    cut = fxprune.slice_state(final, state)
    small = fxprune.write_back(final, model)
    shapes = {name.removeprefix("module."): value.shape for name, value in cut.items()}
    assert shapes == {name: value.shape for name, value in small.state_dict().items()}
    assert torch.equal(cut["module.conv.weight"], small.conv.weight)


def test_parts_of_a_weight_with_a_row_for_each_input_go_the_other_way() -> None:
    class Transposed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.randn(8))

        def forward(self, x: Tensor) -> Tensor:
            return torch.addmm(self.bias, x, self.weight)

    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), Transposed(), nn.ReLU(), nn.Linear(8, 3)).eval()
    traced = fxprune.trace(model, torch.randn(2, 4), modes=("eval",))
    fxprune.prune.channels(traced, 0.5, targets="0.weight", round_to=1)
    final = fxprune.finalize(traced, align=1)
    assert final.plan is not None
    kept = final.plan.kept["2.weight"][0]
    first, second = torch.randn(2, 8), torch.randn(8, 2)
    cut = fxprune.slice_state(final, {"2.lora_A.default.weight": first, "2.lora_B.default.weight": second})
    assert torch.equal(cut["2.lora_A.default.weight"], first[:, kept])
    assert torch.equal(cut["2.lora_B.default.weight"], second)


def test_a_state_of_another_model_is_refused_by_name(final: fxprune.TracedModule) -> None:
    with pytest.raises(StateDictError, match=r"other\.weight, up\.lora_A\.weight: no tensor of the model"):
        fxprune.slice_state(final, {"other.weight": torch.ones(3), "up.lora_A.weight": torch.ones(2, 7)})
    with pytest.raises(ArgumentTypeError, match="it takes what fxprune.finalize returns"):
        fxprune.slice_state(fxprune.trace(nn.Linear(2, 2), torch.ones(1, 2)), {})
    with pytest.raises(ArgumentTypeError, match="tensors by name are needed"):
        fxprune.slice_state(final, [torch.ones(2)])  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["Llama", "GPT2"])
def test_an_adapter_of_peft_goes_onto_the_written_back_model(name: str, transformers: Any) -> None:
    peft = pytest.importorskip("peft")
    from tests.decoders import decoder, tokens

    model = decoder(name, transformers, 1.0)
    names = ["c_attn", "c_fc", "mlp.c_proj"] if name == "GPT2" else ["q_proj", "v_proj", "up_proj", "down_proj"]
    config = peft.LoraConfig(r=3, target_modules=names, fan_in_fan_out=name == "GPT2", init_lora_weights=False)
    trained = peft.get_peft_model(copy.deepcopy(model), config).eval()
    inputs = {"input_ids": tokens(2, 6), "use_cache": False}
    traced = fxprune.trace(model, inputs, modes=("eval",))
    fxprune.prune.channels(traced, macs=0.7, runnable=model)
    final = fxprune.finalize(traced)
    small = peft.get_peft_model(fxprune.write_back(final, model), config)
    state = fxprune.slice_state(final, peft.get_peft_model_state_dict(trained))
    assert not peft.set_peft_model_state_dict(small, state).unexpected_keys
    wanted = fxprune.write_back(final, model)
    merged = fxprune.slice_state(final, trained.merge_and_unload().state_dict())
    wanted.load_state_dict({key: merged[key] for key in wanted.state_dict()})
    torch.testing.assert_close(small.eval()(**inputs).logits, wanted(**inputs).logits)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("merged", [False, True])
def test_adapters_that_are_there_at_the_capture_are_pruned_with_what_they_are_added_to(
    merged: bool, transformers: Any
) -> None:
    peft = pytest.importorskip("peft")
    from tests.decoders import decoder, tokens

    config = peft.LoraConfig(r=3, target_modules=["q_proj", "v_proj", "up_proj"], init_lora_weights=False)
    model = peft.get_peft_model(decoder("Llama", transformers, 1.0), config).eval()
    if merged:
        model.merge_adapter()
    inputs = {"input_ids": tokens(2, 6), "use_cache": False}
    with torch.no_grad():
        traced = fxprune.trace(model, inputs, modes=("eval",))
        assert torch.equal(traced(**inputs).logits, model(**inputs).logits)
        fxprune.prune.channels(traced, macs=0.7)
        small = fxprune.write_back(fxprune.finalize(traced), model)
        assert isinstance(small, peft.PeftModel)
        torch.testing.assert_close(small(**inputs).logits, traced(**inputs).logits)
