"""Trains the digits network of `fxprune demo`, prunes it, and writes both files and the test images beside the page.

    python docs/demo/make.py

needs scikit-learn (`pip install 'fxprune[demo]'`) and about a minute. A seed gives the same files on one machine.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

import fxprune
from fxprune.demo.data import load_split
from fxprune.demo.network import DigitNet
from fxprune.demo.training import train
from fxprune.demo.variants import VARIANTS

FOLDER = Path(__file__).parent
EPOCHS, CALIBRATION, MACS = 20, 512, 0.3


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    training, test = load_split(0)
    model = DigitNet()
    traced = fxprune.trace(model, training.images[:2])
    train(traced, training, VARIANTS[0], 0, EPOCHS, lambda text, done, total: None)
    traced.eval()
    dense = fxprune.finalize(traced, fold_batch_norm=True)
    batches = list(training.images[:CALIBRATION].split(64))
    fxprune.prune.channels(traced, macs=MACS, importance="obs", loader=batches)
    fxprune.reconstruct(traced, batches)
    pruned = fxprune.finalize(traced, fold_batch_norm=True)
    told = {}
    for name, module in (("dense", dense), ("pruned", pruned)):
        path = FOLDER / f"{name}.onnx"
        fxprune.export.to_onnx(module, path, inputs=test.images[:8])
        with torch.no_grad():
            accuracy = float((module(test.images).argmax(1) == test.labels).float().mean())
        contents = fxprune.export.inspect(path)
        told[name] = {"bytes": path.stat().st_size, "macs": contents.macs, "parameters": contents.parameters}
        print(f"{name}: {told[name]}, accuracy {accuracy:.4f}")
    images = [[round(16 * value) for value in image.flatten().tolist()] for image in test.images]
    packed = ["".join(f"{value:x}" if value < 16 else "g" for value in image) for image in images]
    record = {"networks": told, "labels": test.labels.tolist(), "images": packed}
    (FOLDER / "digits.json").write_text(json.dumps(record) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
