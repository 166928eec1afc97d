"""Models of transformers in use after they were pruned: generation, pipelines, larger vocabularies, other dtypes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.errors import CaptureError, ConfigurationWarning, InputError, WriteBackError
from tests.decoders import decoder, tokens

pytestmark = pytest.mark.filterwarnings("ignore")
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
IDS = torch.randint(5, 40, (2, 8))
ONE_LAYER = SIZES | {"num_hidden_layers": 1}  # where nothing is asked of how layers agree
WORDS = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}


def pruned(model: nn.Module, inputs: dict[str, Any], **request: Any) -> tuple[fxprune.TracedModule, Any]:
    """The masked module, and the model of the same class that is written back."""
    traced = fxprune.trace(model, inputs, modes=("eval",))
    fxprune.prune.channels(traced, **({"macs": 0.7} | request), runnable=model)
    return traced, fxprune.write_back(fxprune.finalize(traced), model)


def with_zeros(model: nn.Module, traced: fxprune.TracedModule) -> Any:
    """A copy of the model in which what is masked is zero."""
    dense, state = copy.deepcopy(model), dict(traced.state_dict())
    for name, parameter in dense.named_parameters():
        if f"{name}_mask" in state:
            parameter.data = state[f"{name}_orig"] * state[f"{name}_mask"]
    return dense


@pytest.mark.parametrize("name", ["Llama", "Phi3", "GPT2", "Bart", pytest.param("T5", marks=pytest.mark.slow)])
def test_the_pruned_model_generates_with_its_cache_what_the_masked_one_does(name: str, transformers: Any) -> None:
    model: Any = decoder(name, transformers)
    inputs: dict[str, Any] = {**WORDS, "use_cache": False}
    if name in ("T5", "Bart"):
        inputs["decoder_input_ids"] = tokens(2, 4)
        model.config.decoder_start_token_id = model.generation_config.decoder_start_token_id = 1
    traced, small = pruned(model, inputs)
    prompt = tokens(3, 5)
    options = {
        "attention_mask": torch.ones_like(prompt),
        "do_sample": False,
        "max_new_tokens": 12,
        "min_new_tokens": 12,
    }
    found = small.generate(prompt, **options)
    assert torch.equal(found, with_zeros(model, traced).generate(prompt, **options))
    assert torch.equal(found, small.generate(prompt, use_cache=False, **options))
    assert small.num_parameters() < model.num_parameters()


def test_whole_key_value_groups_leave_a_cache_of_as_many_heads(transformers: Any) -> None:
    model: Any = decoder("Phi3", transformers)
    traced, small = pruned(model, {**WORDS, "use_cache": False}, macs=None, amount=0.5, kinds="key-value group")
    assert (small.config.num_attention_heads, small.config.num_key_value_heads) == (2, 1)
    cache = transformers.DynamicCache()
    with torch.no_grad():
        found = small(**WORDS, past_key_values=cache).logits
    assert cache.layers[0].keys.shape == (2, 1, 8, 8)
    torch.testing.assert_close(found, traced(**WORDS, use_cache=False).logits)


def _tokenizer(transformers: Any) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers

    marks = {"pad_token": "[PAD]", "unk_token": "[UNK]", "mask_token": "[MASK]"}
    words = [*marks.values(), *(f"w{i}" for i in range(37))]
    rules = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    rules.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=rules, model_max_length=16, **marks)


def test_pipelines_take_the_pruned_model_from_its_folder(transformers: Any, tmp_path: Path) -> None:
    tokenizer = _tokenizer(transformers)
    model = transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=40, **ONE_LAYER)).eval()
    traced, small = pruned(model, WORDS)
    small.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    fill = transformers.pipeline("fill-mask", str(tmp_path), device="cpu")
    found = fill("w3 w4 [MASK] w7 w8 w9 w1 w2", top_k=1)[0]
    ids = torch.tensor([tokenizer.encode("w3 w4 [MASK] w7 w8 w9 w1 w2")] * 2)
    scores = traced(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, 2].softmax(-1)
    assert found["token"] == int(scores.argmax())
    assert found["score"] == pytest.approx(float(scores.max()), rel=1e-5)

    features = transformers.pipeline("feature-extraction", model=small.bert, tokenizer=tokenizer, device="cpu")
    wanted = with_zeros(model, traced).bert(ids[:1])[0]
    torch.testing.assert_close(torch.tensor(features("w3 w4 [MASK] w7 w8 w9 w1 w2")), wanted)

    classifier = transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=40, **ONE_LAYER)).eval()
    traced, small = pruned(classifier, WORDS)
    judge = transformers.pipeline("text-classification", model=small, tokenizer=tokenizer, device="cpu")
    wanted = traced(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0].softmax(-1)
    assert judge("w3 w4 [MASK] w7 w8 w9 w1 w2")[0]["score"] == pytest.approx(float(wanted.max()), rel=1e-5)


def test_a_tied_vocabulary_can_grow_after_the_way_back(transformers: Any) -> None:
    model = transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=40, **ONE_LAYER)).eval()
    _, small = pruned(model, WORDS)
    before = small(**WORDS).logits
    small.resize_token_embeddings(48, mean_resizing=False)
    assert small.get_output_embeddings().weight is small.get_input_embeddings().weight
    torch.testing.assert_close(small(**WORDS).logits[..., :40], before)
    traced, smaller = pruned(small, WORDS, macs=0.95)
    torch.testing.assert_close(smaller(**WORDS).logits, traced(**WORDS).logits)
    assert smaller.config.vocab_size == 48


def test_a_model_in_bfloat16_comes_back_in_it(transformers: Any, tmp_path: Path) -> None:
    model = transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=40, **ONE_LAYER))
    traced, small = pruned(model.to(torch.bfloat16).eval(), WORDS)
    assert torch.equal(small(**WORDS).logits, traced(**WORDS).logits)
    small.save_pretrained(tmp_path)
    again = type(small).from_pretrained(tmp_path).eval()
    assert again.dtype == torch.bfloat16
    assert torch.equal(again(**WORDS).logits, small(**WORDS).logits)


@pytest.mark.parametrize("name", ["Bert", "Llama"])
def test_gradient_checkpointing_that_is_on_stays_on_and_changes_nothing(name: str, transformers: Any) -> None:
    kind, more = ("ForSequenceClassification", {}) if name == "Bert" else ("ForCausalLM", {"use_cache": False})
    config = getattr(transformers, f"{name}Config")(vocab_size=40, pad_token_id=0, **ONE_LAYER, **more)
    model = getattr(transformers, name + kind)(config)
    plain = copy.deepcopy(model)
    model.gradient_checkpointing_enable()
    traced = fxprune.trace(model, WORDS)
    assert set(traced.graphs) == {"eval", "train"}
    torch.manual_seed(1)
    found = traced.train()(**WORDS).logits
    torch.manual_seed(1)
    torch.testing.assert_close(found, plain.train()(**WORDS).logits)
    fxprune.prune.channels(traced, macs=0.7, runnable=model)
    small = fxprune.write_back(fxprune.finalize(traced), model)
    assert small.is_gradient_checkpointing
    small.train()(**WORDS).logits.sum().backward()
    assert all(p.grad is not None for p in small.parameters() if p.requires_grad)


def test_a_cache_where_none_was_captured_is_refused_by_name(transformers: Any) -> None:
    model = decoder("Llama", transformers)
    traced = fxprune.trace(model, {**WORDS, "use_cache": False}, modes=("eval",))
    with pytest.raises(InputError, match=r"Not captured: past_key_values.*must be there when it is traced"):
        traced(**WORDS, use_cache=False, past_key_values=transformers.DynamicCache())
    with pytest.raises(InputError, match=r"`use_cache` is True; the capture holds for False only. Trace again"):
        traced(**WORDS, use_cache=True)


class Scaled(nn.Module):
    """A linear layer of whole numbers and their scales, as quantizers leave it."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        scale = layer.weight.detach().abs().amax(1, keepdim=True) / 127
        self.weight = nn.Parameter((layer.weight.detach() / scale).round().to(torch.int8), requires_grad=False)
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale)


def test_quantized_weights_are_refused_with_what_to_do() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
    told = "quantized weights, whose channels cannot be cut.*without quantization.*quantize what comes back"
    packed = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    with pytest.raises(CaptureError, match=f"^0, .*2.* of Sequential has {told}"):
        fxprune.trace(packed, torch.randn(2, 6))
    model.is_quantized = True  # as transformers marks what it has loaded so
    with pytest.raises(CaptureError, match=f"Sequential has {told}"):
        fxprune.trace(model, torch.randn(2, 6))


def test_whole_numbers_with_scales_in_plain_tensors_are_weights_that_are_computed() -> None:
    model = nn.Sequential(Scaled(nn.Linear(6, 8)), nn.ReLU(), nn.Linear(8, 4)).eval()
    traced = fxprune.trace(model, torch.randn(2, 6), modes=("eval",))
    fxprune.prune.channels(traced, 0.5, round_to=1)
    x = torch.randn(3, 6)
    torch.testing.assert_close(fxprune.finalize(traced)(x), traced(x))


def test_weights_that_accelerate_keeps_elsewhere_are_refused_and_its_hooks_on_one_device_are_not(
    transformers: Any, tmp_path: Path
) -> None:
    accelerate = pytest.importorskip("accelerate")
    model = transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=40, **ONE_LAYER)).eval()
    hooked = accelerate.dispatch_model(copy.deepcopy(model), {"": "cpu"}, force_hooks=True)
    traced, small = pruned(hooked, WORDS)
    torch.testing.assert_close(small(**WORDS).logits, traced(**WORDS).logits)
    accelerate.disk_offload(model, str(tmp_path), execution_device=torch.device("cpu"))
    with pytest.raises(CaptureError, match="they are offloaded, so load it with device_map=None"):
        fxprune.trace(model, WORDS)


def _other_activation(model: Any) -> Any:
    for layer in model.bert.encoder.layer:
        layer.intermediate.intermediate_act_fn = nn.Tanh()
    return model


def _renamed_layer(model: Any) -> Any:
    class Renamed(nn.Module):
        def __init__(self, before: Any) -> None:
            super().__init__()
            self.projection, self.act = before.dense, before.intermediate_act_fn

        def forward(self, states: Tensor) -> Tensor:
            return self.act(self.projection(states))

    model.bert.encoder.layer[0].intermediate = Renamed(model.bert.encoder.layer[0].intermediate)
    return model


def _more_layers(model: Any) -> Any:
    model.bert.encoder.layer.append(copy.deepcopy(model.bert.encoder.layer[0]))
    return model


@pytest.fixture(scope="module")
def final_bert(transformers: Any) -> tuple[Any, fxprune.TracedModule]:
    """A model, and what is left of it."""
    model = transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=40, **ONE_LAYER)).eval()
    traced = fxprune.trace(model, WORDS, modes=("eval",))
    fxprune.prune.channels(traced, macs=0.7, runnable=model)
    return model, fxprune.finalize(traced)


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        (_other_activation, "another model than the one that was traced"),
        (_renamed_layer, r"bert\.encoder\.layer\.0\.intermediate\.(dense|projection)"),
        (_more_layers, "another model than the one that was traced"),
    ],
)
def test_a_class_that_has_changed_since_is_refused(changed: Any, told: str, final_bert: Any) -> None:
    model, final = final_bert
    other = changed(copy.deepcopy(model))
    state = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    with pytest.raises(WriteBackError, match=told):
        fxprune.write_back(final, other)
    assert all(torch.equal(state[name], tensor) for name, tensor in other.state_dict().items())


def llama(transformers: Any, heads: int, groups: int) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        **SIZES | {"num_attention_heads": heads}, num_key_value_heads=groups, head_dim=8, vocab_size=40,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (8, 4)])
def test_heads_are_chosen_in_numbers_that_the_configuration_takes(
    heads: int, groups: int, tmp_path: Path, transformers: Any
) -> None:
    model = llama(transformers, heads, groups)
    kind = "attention head" if heads == groups else "key-value group"
    traced, small = pruned(model, {**WORDS, "use_cache": False}, macs=None, amount=0.5, kinds=kind)
    assert small.config.num_attention_heads == heads // 2
    small.save_pretrained(tmp_path)
    again = type(small).from_pretrained(tmp_path).eval()
    assert torch.equal(again(**WORDS, use_cache=False).logits, small(**WORDS, use_cache=False).logits)
    assert torch.allclose(small(**WORDS).logits, traced(**WORDS, use_cache=False).logits, atol=1e-6)


@pytest.mark.filterwarnings("default")
def test_heads_that_the_configuration_refuses_come_back_with_a_warning(tmp_path: Path, transformers: Any) -> None:
    model = llama(transformers, 4, 4)
    traced = fxprune.trace(model, {**WORDS, "use_cache": False}, modes=("eval",))
    for layer in ("model.layers.0.self_attn", "model.layers.1.self_attn"):
        for name in ("q_proj", "k_proj", "v_proj"):
            mask = torch.ones_like(traced.get_parameter(f"{layer}.{name}.weight"))
            mask[8:16] = 0
            fxprune.prune.custom_from_mask(traced, f"{layer}.{name}.weight", mask)
        fxprune.prune.custom_from_mask(
            traced, f"{layer}.o_proj.weight", torch.ones(32, 32).index_fill(1, torch.arange(8, 16), 0)
        )
    with pytest.warns(ConfigurationWarning, match=r"save_pretrained refuses .*32.* not a multiple .*heads"):
        small: Any = fxprune.write_back(fxprune.finalize(traced, align=1), model)
    assert small.config.num_attention_heads == 3
    assert torch.allclose(small(**WORDS).logits, traced(**WORDS, use_cache=False).logits, atol=1e-6)
