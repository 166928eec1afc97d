"""Width against heads and MLP units: latency in onnxruntime at equal MACs, in turns, one thread, CPU seconds.

Transformers with random weights, width 768, sequences of 128 (patches of an image for the ViT): a BERT, a ViT and a
GPT-2 (layer norms, which get their zeros back) and a Llama (root mean square norms, whose gain and eps change).

Run: python benchmarks/width.py [--layers 6] [--macs 0.75] [--rounds 15]
"""

from __future__ import annotations

import argparse
import tempfile
import time
import warnings
from pathlib import Path
from statistics import median
from typing import Any

import onnxruntime
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel, GPT2Config, GPT2Model, LlamaConfig, LlamaModel, ViTConfig, ViTModel

import fxprune

KINDS: dict[str, Any] = {
    "dense": None, "heads and MLP units": None, "MLP units": "MLP unit", "width": "width",
}  # fmt: skip


class Headed(nn.Module):
    """A transformer and a layer that reads its last hidden state."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.head = model, nn.Linear(768, 4)

    def forward(self, inputs: Tensor) -> Tensor:
        result: Tensor = self.head(self.model(inputs)[0])
        return result


def bert(layers: int) -> nn.Module:
    return Headed(BertModel(BertConfig(num_hidden_layers=layers, vocab_size=1000)))


def vit(layers: int) -> nn.Module:
    config = ViTConfig(num_hidden_layers=layers, image_size=(128, 256), patch_size=16)
    return Headed(ViTModel(config, add_pooling_layer=False))


def gpt2(layers: int) -> nn.Module:
    return Headed(GPT2Model(GPT2Config(n_layer=layers, vocab_size=1000, use_cache=False)))


def llama(layers: int) -> nn.Module:
    sizes = {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 2048, "vocab_size": 1000}
    return Headed(LlamaModel(LlamaConfig(num_hidden_layers=layers, use_cache=False, **sizes)))


def session(model: nn.Module, inputs: Tensor, name: str, macs: float) -> tuple[onnxruntime.InferenceSession, str]:
    """The model cut to a share of its MACs, as a session, and what is left of it."""
    traced = fxprune.trace(model, inputs, modes=("eval",))
    if name != "dense":
        fxprune.prune.channels(traced, macs=macs, kinds=KINDS[name])
    final = fxprune.finalize(traced)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        fxprune.export.to_onnx(final, path, verify=False)
        made = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    plan = final.plan
    return made, "" if plan is None else f"{plan.macs[1] / plan.macs[0]:.3f} of the MACs"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--macs", type=float, default=0.75)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    ids, images = torch.randint(999, (1, 128)), torch.randn(1, 3, 128, 256)
    for build in (bert, vit, gpt2, llama):
        model, inputs = build(options.layers).eval(), images if build is vit else ids
        found = {name: session(model, inputs, name, options.macs) for name in KINDS}
        seconds: dict[str, list[float]] = {name: [] for name in KINDS}
        for _ in range(options.rounds):
            for name, (made, _) in found.items():
                start = time.process_time()
                made.run(None, {made.get_inputs()[0].name: inputs.numpy()})
                seconds[name].append(time.process_time() - start)
        for name, (_, left) in found.items():
            print(f"{build.__name__:6} {name:20} {1e3 * median(seconds[name]):7.1f} ms  {left}", flush=True)


if __name__ == "__main__":
    main()
