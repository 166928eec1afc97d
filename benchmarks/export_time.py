"""`to_onnx` beside `torch.onnx.export(dynamo=True)` of the dense model: CPU seconds, in turns, ratio of medians.

Llamas of width 256 with random weights; batch and length are free in both files. The traced module is written without
its verification, then with it; what verification adds is its own column.

Run: python benchmarks/export_time.py [--layers 4 16 32] [--rounds 3] [--pruned]
"""

from __future__ import annotations

import argparse
import contextlib
import io
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from command import declare_torchvision
from torch import nn

import fxprune


def llama(layers: int) -> nn.Module:
    """A decoder of width 256 with grouped heads, without its cache."""
    declare_torchvision()
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        use_cache=False,
    )
    return LlamaForCausalLM(config).eval()


def seconds(call: Callable[[], object]) -> float:
    """CPU time of this process: the machine may have other work."""
    start = time.process_time()
    call()
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, nargs="+", default=(4, 16, 32))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--pruned", action="store_true", help="write what finalize leaves at half of the MACs")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp())
    inputs = {"input_ids": torch.randint(0, 1000, (2, 16))}
    batch, length = torch.export.Dim("batch", max=64), torch.export.Dim("length", max=512)
    shapes = {"input_ids": {0: batch, 1: length}}
    print("layers  torch s  to_onnx s  ratio  verification s")
    for layers in options.layers:
        model = llama(layers)
        traced = fxprune.trace(model, (), inputs, dynamic_shapes=shapes, modes=("eval",))
        if options.pruned:
            traced = fxprune.finalize(fxprune.prune.channels(traced, macs=0.5))

        def torchs(model: nn.Module = model) -> None:
            with contextlib.redirect_stdout(io.StringIO()):
                program = torch.onnx.export(model, (), kwargs=inputs, dynamic_shapes=shapes, dynamo=True, verbose=False)
            assert program is not None
            program.save(folder / "torch.onnx")

        def ours(verify: bool, traced: fxprune.TracedModule = traced) -> None:
            fxprune.export.to_onnx(traced, folder / "ours.onnx", verify=verify)

        calls = (torchs, lambda: ours(False), lambda: ours(True))
        for call in calls:
            call()  # imports, and what torch does once in a process
        rows = [[seconds(call) for call in calls] for _ in range(options.rounds)]
        theirs, plain, verified = (statistics.median(column) for column in zip(*rows, strict=True))
        print(f"{layers:6} {theirs:8.2f} {plain:10.2f} {plain / theirs:6.2f} {verified - plain:15.2f}", flush=True)


if __name__ == "__main__":
    main()
