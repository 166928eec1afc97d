"""The models of transformers of `benchmarks/libraries.py`: families, heads and tasks in small configurations."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

Inputs: TypeAlias = "Callable[[], dict[str, Any]]"

_BERT = {
    "vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
    "max_position_embeddings": 40, "num_labels": 3,
}  # fmt: skip
_WIDE = _BERT | {"intermediate_size": 128}  # as much wider as published ones are
_DISTIL = {"vocab_size": 60, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64, "num_labels": 3}
_LLAMA = _BERT | {
    "num_key_value_heads": 2, "use_cache": False, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "head_dim": 8,
}  # fmt: skip
_GPT = {
    "vocab_size": 60, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 40, "use_cache": False,
    "pad_token_id": 0, "num_labels": 3,
}  # fmt: skip
_VISION = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "image_size": 32,
    "patch_size": 8, "num_labels": 3,
}  # fmt: skip
_STAGES = {"hidden_sizes": [16, 32], "depths": [1, 1], "num_labels": 3}
_SWIN = {
    "image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4,
    "num_labels": 3,
}  # fmt: skip
_BART = {
    "vocab_size": 60, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 40,
    "use_cache": False, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 2,
    "num_labels": 3,
}  # fmt: skip
_T5 = {
    "vocab_size": 60, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "use_cache": False,
    "pad_token_id": 0, "decoder_start_token_id": 0,
}  # fmt: skip
_WAV2VEC = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 20,
    "conv_dim": (16, 16, 16), "conv_stride": (5, 2, 2), "conv_kernel": (10, 3, 3), "num_feat_extract_layers": 3,
    "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4, "feat_extract_norm": "group", "num_labels": 3,
}  # fmt: skip
_WHISPER = _BART | {"num_mel_bins": 8, "max_source_positions": 12, "max_target_positions": 40}
_RESNET = {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1], "layer_type": "basic"}
_MOBILE = {"num_labels": 3, "depth_multiplier": 0.35}
_DETR = {
    "use_timm_backbone": False, "use_pretrained_backbone": False, "backbone": None, "d_model": 32, "encoder_layers": 1,
    "decoder_layers": 1, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64, "num_queries": 6, "num_labels": 3,
}  # fmt: skip


def words(length: int = 12, **more: Callable[[], Tensor]) -> Inputs:
    """Identifiers and a mask that ends early in the second row, and what else is named."""

    def inputs() -> dict[str, Any]:
        mask = torch.ones(2, length, dtype=torch.int64)
        mask[1, length - 3 :] = 0
        ids = torch.randint(3, 60, (2, length))
        return {"input_ids": ids, "attention_mask": mask} | {name: value() for name, value in more.items()}

    return inputs


def _ended() -> dict[str, Any]:
    """Identifiers of which each row has one end."""
    ids = torch.randint(3, 60, (2, 12))
    ids[:, -1] = 2
    return {"input_ids": ids, "attention_mask": torch.ones(2, 12, dtype=torch.int64)}


def _choices() -> dict[str, Any]:
    return {"input_ids": torch.randint(3, 60, (2, 3, 8)), "attention_mask": torch.ones(2, 3, 8, dtype=torch.int64)}


def _pixels(side: int = 32) -> Inputs:
    return lambda: {"pixel_values": torch.randn(2, 3, side, side)}


def _both(side: int = 32, length: int = 12) -> Inputs:
    return lambda: {
        "input_ids": torch.randint(3, 60, (2, length)), "pixel_values": torch.randn(2, 3, side, side),
    }  # fmt: skip


def _sound(length: int = 1600) -> Inputs:
    return lambda: {"input_values": torch.randn(2, length)}


def _one_label() -> Tensor:
    return torch.randint(0, 3, (2,))


def _token_labels() -> Tensor:
    return torch.randint(0, 3, (2, 12))


def _places() -> Tensor:
    return torch.randint(0, 12, (2,))


def _next_words() -> Tensor:
    return torch.randint(3, 60, (2, 12))


def _short() -> Tensor:
    return torch.randint(3, 60, (2, 5))


_READ = {"decoder_input_ids": _short}

# name in the table -> configuration's class, configuration, inputs; the model's class is the name up to a comma
TRANSFORMERS: dict[str, tuple[str, Mapping[str, Any], Inputs]] = {
    # encoders of text
    "BertModel": ("BertConfig", _BERT, words()),
    "BertForSequenceClassification, labels": ("BertConfig", _BERT, words(labels=_one_label)),
    "BertForTokenClassification": ("BertConfig", _BERT, words()),
    "BertForMaskedLM": ("BertConfig", _BERT, words()),
    "BertForQuestionAnswering, labels": (
        "BertConfig", _BERT | {"num_labels": 2}, words(start_positions=_places, end_positions=_places)),
    "BertForMultipleChoice": ("BertConfig", _BERT, _choices),
    "BertForPreTraining": ("BertConfig", _BERT, words()),
    "BertLMHeadModel": ("BertConfig", _BERT | {"is_decoder": True, "use_cache": False}, words()),
    "RobertaForSequenceClassification": ("RobertaConfig", _BERT, words()),
    "RobertaForTokenClassification, labels": ("RobertaConfig", _BERT, words(labels=_token_labels)),
    "RobertaForMaskedLM": ("RobertaConfig", _BERT, words()),
    "XLMRobertaForQuestionAnswering": ("XLMRobertaConfig", _BERT | {"num_labels": 2}, words()),
    "CamembertForSequenceClassification": ("CamembertConfig", _BERT, words()),
    "DistilBertForSequenceClassification": ("DistilBertConfig", _DISTIL, words()),
    "DistilBertForQuestionAnswering": ("DistilBertConfig", _DISTIL | {"num_labels": 2}, words()),
    "DistilBertForMaskedLM, labels": ("DistilBertConfig", _DISTIL, words(labels=_next_words)),
    "ElectraForSequenceClassification": ("ElectraConfig", _BERT | {"embedding_size": 32}, words()),
    "ElectraForPreTraining": ("ElectraConfig", _BERT | {"embedding_size": 16}, words()),
    "AlbertForSequenceClassification": ("AlbertConfig", _BERT | {"embedding_size": 16}, words()),
    "AlbertForMaskedLM": ("AlbertConfig", _BERT | {"embedding_size": 16}, words()),
    "MPNetForMaskedLM": ("MPNetConfig", _BERT, words()),
    "MPNetForSequenceClassification": ("MPNetConfig", _BERT, words()),
    "DebertaV2ForSequenceClassification": (
        "DebertaV2Config", _WIDE | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]}, words()),
    "DebertaForTokenClassification": (
        "DebertaConfig", _WIDE | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]}, words()),
    "ModernBertForSequenceClassification": ("ModernBertConfig", _BERT | {"pad_token_id": 0}, words()),
    "SqueezeBertForSequenceClassification": ("SqueezeBertConfig", _WIDE | {"embedding_size": 32}, words()),
    "MobileBertForSequenceClassification": (
        "MobileBertConfig", _BERT | {"embedding_size": 16, "intra_bottleneck_size": 16}, words()),
    "ConvBertForSequenceClassification": ("ConvBertConfig", _BERT | {"embedding_size": 32}, words()),
    "RoFormerForSequenceClassification": ("RoFormerConfig", _BERT | {"embedding_size": 32}, words()),
    "FNetForSequenceClassification": (
        "FNetConfig", _BERT, lambda: {"input_ids": torch.randint(3, 60, (2, 12))}),
    "XLNetForSequenceClassification": (
        "XLNetConfig", {"vocab_size": 60, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64, "num_labels": 3,
                        "use_mems_eval": False}, words()),
    "LayoutLMForTokenClassification": ("LayoutLMConfig", _BERT | {"max_2d_position_embeddings": 64}, words()),
    # decoders of text
    "GPT2LMHeadModel": ("GPT2Config", _GPT, words()),
    "GPT2ForSequenceClassification": ("GPT2Config", _GPT, words()),
    "GPTNeoForCausalLM": (
        "GPTNeoConfig",
        {"vocab_size": 60, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "intermediate_size": 64,
         "max_position_embeddings": 40, "attention_types": [[["global", "local"], 1]], "window_size": 8,
         "use_cache": False}, words()),
    "GPTJForCausalLM": ("GPTJConfig", _GPT | {"rotary_dim": 8}, words()),
    "GPTNeoXForCausalLM": ("GPTNeoXConfig", _BERT | {"use_cache": False}, words()),
    "GPTBigCodeForCausalLM": ("GPTBigCodeConfig", _GPT, words()),
    "BloomForCausalLM": (
        "BloomConfig", {"vocab_size": 60, "hidden_size": 32, "n_layer": 2, "n_head": 4, "use_cache": False}, words()),
    "FalconForCausalLM": ("FalconConfig", _BERT | {"use_cache": False}, words()),
    "OPTForCausalLM": (
        "OPTConfig",
        {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 64,
         "max_position_embeddings": 40, "word_embed_proj_dim": 32, "use_cache": False}, words()),
    "LlamaForCausalLM": ("LlamaConfig", _LLAMA, words()),
    "LlamaForCausalLM, labels": ("LlamaConfig", _LLAMA, words(labels=_next_words)),
    "LlamaForSequenceClassification": ("LlamaConfig", _LLAMA, words()),
    "LlamaForTokenClassification": ("LlamaConfig", _LLAMA, words()),
    "MistralForCausalLM": ("MistralConfig", _LLAMA, words()),
    "MistralForSequenceClassification": ("MistralConfig", _LLAMA, words()),
    "MixtralForCausalLM": ("MixtralConfig", _LLAMA | {"num_local_experts": 2, "num_experts_per_tok": 1}, words()),
    "Qwen2ForCausalLM": ("Qwen2Config", _LLAMA, words()),
    "Qwen2ForTokenClassification": ("Qwen2Config", _LLAMA, words()),
    "Qwen3ForCausalLM": ("Qwen3Config", _LLAMA, words()),
    "GemmaForCausalLM": ("GemmaConfig", _LLAMA, words()),
    "Gemma2ForCausalLM": ("Gemma2Config", _LLAMA, words()),
    "Gemma3ForCausalLM": ("Gemma3TextConfig", _LLAMA, words()),
    "PhiForCausalLM": ("PhiConfig", _BERT | {"use_cache": False}, words()),
    "Phi3ForCausalLM": ("Phi3Config", _LLAMA, words()),
    "StableLmForCausalLM": ("StableLmConfig", _LLAMA, words()),
    "Starcoder2ForCausalLM": ("Starcoder2Config", _LLAMA, words()),
    "Olmo2ForCausalLM": ("Olmo2Config", _LLAMA, words()),
    "CohereForCausalLM": ("CohereConfig", _LLAMA, words()),
    "GraniteForCausalLM": ("GraniteConfig", _LLAMA, words()),
    "SmolLM3ForCausalLM": ("SmolLM3Config", _LLAMA, words()),
    "MambaForCausalLM": (
        "MambaConfig",
        {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4, "use_cache": False},
        lambda: {"input_ids": torch.randint(3, 60, (2, 12))}),
    "RwkvForCausalLM": (
        "RwkvConfig",
        {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "attention_hidden_size": 32, "use_cache": False},
        lambda: {"input_ids": torch.randint(3, 60, (2, 12))}),
    # encoders and decoders
    "T5ForConditionalGeneration": ("T5Config", _T5, words(**_READ)),
    "T5ForConditionalGeneration, gated": (
        "T5Config", _T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}, words(**_READ)),
    "T5EncoderModel": ("T5Config", _T5, words()),
    "MT5ForConditionalGeneration": ("MT5Config", _T5, words(**_READ)),
    "BartForConditionalGeneration": ("BartConfig", _BART, words(**_READ)),
    "BartForSequenceClassification": ("BartConfig", _BART, _ended),
    "MBartForConditionalGeneration": ("MBartConfig", _BART, words(**_READ)),
    "PegasusForConditionalGeneration": ("PegasusConfig", _BART, words(**_READ)),
    "MarianMTModel": ("MarianConfig", _BART, words(**_READ)),
    "M2M100ForConditionalGeneration": ("M2M100Config", _BART, words(**_READ)),
    "BlenderbotForConditionalGeneration": ("BlenderbotConfig", _BART, words(**_READ)),
    # sound
    "WhisperForConditionalGeneration": (
        "WhisperConfig", _WHISPER, lambda: {"input_features": torch.randn(2, 8, 24), "decoder_input_ids": _short()}),
    "WhisperForAudioClassification": (
        "WhisperConfig", _WHISPER | {"classifier_proj_size": 16}, lambda: {"input_features": torch.randn(2, 8, 24)}),
    "Wav2Vec2ForCTC": ("Wav2Vec2Config", _WAV2VEC, _sound()),
    "Wav2Vec2ForSequenceClassification": (
        "Wav2Vec2Config",
        _WAV2VEC | {"classifier_proj_size": 16, "feat_extract_norm": "layer", "intermediate_size": 128}, _sound()),
    "HubertForCTC": ("HubertConfig", _WAV2VEC, _sound()),
    "HubertForSequenceClassification": ("HubertConfig", _WAV2VEC, _sound()),
    "WavLMForSequenceClassification": ("WavLMConfig", _WAV2VEC, _sound()),
    "ASTForAudioClassification": (
        "ASTConfig",
        {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "patch_size": 8,
         "max_length": 32, "num_mel_bins": 16, "num_labels": 3, "frequency_stride": 8, "time_stride": 8},
        lambda: {"input_values": torch.randn(2, 32, 16)}),
    # images
    "ViTForImageClassification": ("ViTConfig", _VISION, _pixels()),
    "ViTForImageClassification, labels": (
        "ViTConfig", _VISION, lambda: {"pixel_values": torch.randn(2, 3, 32, 32), "labels": _one_label()}),
    "ViTForMaskedImageModeling": ("ViTConfig", _VISION | {"encoder_stride": 8}, _pixels()),
    "DeiTForImageClassification": ("DeiTConfig", _VISION, _pixels()),
    "DeiTForImageClassificationWithTeacher": ("DeiTConfig", _VISION, _pixels()),
    "BeitForImageClassification": ("BeitConfig", _VISION, _pixels()),
    "Data2VecVisionForImageClassification": ("Data2VecVisionConfig", _VISION, _pixels()),
    "Dinov2ForImageClassification": ("Dinov2Config", _VISION, _pixels()),
    "YolosForObjectDetection": (
        "YolosConfig", _VISION | {"image_size": [32, 32], "num_detection_tokens": 5}, _pixels()),
    "DPTForDepthEstimation": (
        "DPTConfig",
        _VISION | {"num_hidden_layers": 4, "backbone_out_indices": [0, 1, 2, 3], "neck_hidden_sizes": [8, 16, 16, 32],
                   "fusion_hidden_size": 16, "is_hybrid": False}, _pixels()),
    "SwinForImageClassification": ("SwinConfig", _SWIN, _pixels()),
    "Swinv2ForImageClassification": ("Swinv2Config", _SWIN, _pixels()),
    "ConvNextForImageClassification": ("ConvNextConfig", _STAGES | {"num_stages": 2}, _pixels()),
    "ConvNextV2ForImageClassification": ("ConvNextV2Config", _STAGES | {"num_stages": 2}, _pixels()),
    "ResNetForImageClassification": ("ResNetConfig", _STAGES | {"embedding_size": 16}, _pixels()),
    "RegNetForImageClassification": (
        "RegNetConfig", _STAGES | {"embedding_size": 16, "groups_width": 8}, _pixels()),
    "MobileNetV1ForImageClassification": ("MobileNetV1Config", _MOBILE, _pixels(64)),
    "MobileNetV2ForImageClassification": ("MobileNetV2Config", _MOBILE, _pixels(64)),
    "MobileNetV2ForSemanticSegmentation": ("MobileNetV2Config", _MOBILE, _pixels(64)),
    "MobileViTForImageClassification": (
        "MobileViTConfig",
        {"image_size": 64, "hidden_sizes": [16, 24, 32], "neck_hidden_sizes": [8, 8, 16, 16, 24, 24, 32],
         "num_attention_heads": 4, "num_labels": 3}, _pixels(64)),
    "PoolFormerForImageClassification": (
        "PoolFormerConfig", {"hidden_sizes": [8, 16, 16, 32], "depths": [1, 1, 1, 1], "num_labels": 3}, _pixels(64)),
    "PvtForImageClassification": (
        "PvtConfig",
        {"image_size": 64, "hidden_sizes": [8, 16, 16, 32], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 2, 2, 4],
         "num_labels": 3}, _pixels(64)),
    "LevitForImageClassification": (
        "LevitConfig",
        {"image_size": 64, "hidden_sizes": [32, 48, 64], "num_attention_heads": [2, 3, 4], "depths": [1, 1, 1],
         "key_dim": [8, 8, 8], "num_labels": 3}, _pixels(64)),
    "SegformerForSemanticSegmentation": (
        "SegformerConfig",
        {"hidden_sizes": [8, 16, 16, 32], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 2, 2, 4],
         "decoder_hidden_size": 32, "num_labels": 3}, _pixels(64)),
    "SegformerForImageClassification": (
        "SegformerConfig",
        {"hidden_sizes": [8, 16, 16, 32], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 2, 2, 4],
         "num_labels": 3}, _pixels(64)),
    "DetrForObjectDetection": ("DetrConfig", _DETR | {"backbone_config": ("ResNetConfig", _RESNET)}, _pixels(64)),
    # images and text
    "CLIPModel": (
        "CLIPConfig",
        {"text_config": _BERT | {"eos_token_id": 2}, "vision_config": _VISION, "projection_dim": 24}, _both()),
    "CLIPTextModelWithProjection": (
        "CLIPTextConfig", _BERT | {"eos_token_id": 2, "projection_dim": 24}, words()),
    "CLIPVisionModelWithProjection": ("CLIPVisionConfig", _VISION | {"projection_dim": 24}, _pixels()),
    "CLIPForImageClassification": (
        "CLIPConfig",
        {"text_config": _BERT, "vision_config": _VISION, "projection_dim": 24, "num_labels": 3}, _pixels()),
    "SiglipModel": ("SiglipConfig", {"text_config": _BERT, "vision_config": _VISION}, _both()),
    "SiglipForImageClassification": (
        "SiglipConfig", {"text_config": _BERT, "vision_config": _VISION, "num_labels": 3}, _pixels()),
    "ViltForQuestionAnswering": ("ViltConfig", _VISION | _BERT, _both()),
}  # fmt: skip


def build(name: str) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """A model of the table with random weights, the arguments and the keyword arguments of a call."""
    import transformers

    kind, options, inputs = TRANSFORMERS[name]

    def made(value: Any) -> Any:
        """A configuration within another."""
        return getattr(transformers, value[0])(**value[1]) if _is_configuration(value) else value

    config = getattr(transformers, kind)(**{key: made(value) for key, value in options.items()})
    return getattr(transformers, name.partition(",")[0])(config), (), inputs()


def _is_configuration(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and isinstance(value[1], dict)
