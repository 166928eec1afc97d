"""Peak memory of each step above what was there before it, over the bytes of the parameters, on a Llama of any size.

A process beside reads the memory that no other has, every 5 ms, whatever this one is at; files that are mapped do not
count. Weights are random. With `--plot` the memory over time is drawn as SVG, a mark at the start of each step. A file
of bfloat16 is verified in float32, and not run as it is: onnxruntime has no kernels for that on the CPU.

Run: python benchmarks/memory.py [--width 1024] [--layers 8] [--vocabulary 16000] [--dtype float32]
    [--no-compact-masks] [--plot FILE]
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import os
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from command import declare_torchvision
from torch import nn

import fxprune

_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 720, 280, 56, 64


def llama(width: int, layers: int, vocabulary: int, dtype: torch.dtype) -> nn.Module:
    """A decoder with grouped heads of 64 features, without its cache."""
    declare_torchvision()
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=width * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 256,
        use_cache=False,
        tie_word_embeddings=False,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)


def private_bytes(process: int | str = "self") -> int:
    """What a process holds alone, in bytes: pages that it wrote, not those of files."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024


# of the process beside: (time, bytes) for each sample, in the clock that all processes share
_SAMPLES = """
import sys, time
while True:
    with open(f"/proc/{sys.argv[1]}/status") as status:
        held = next(int(line.split()[1]) for line in status if line.startswith("RssAnon"))
    print(time.perf_counter(), held * 1024, flush=True)
    time.sleep(0.005)
"""


@dataclass
class Watch:
    """The memory of the process over time, as (seconds, bytes), and the start of each step."""

    samples: list[tuple[float, int]] = field(default_factory=list)
    steps: list[tuple[float, str]] = field(default_factory=list)
    start: float = field(default_factory=time.perf_counter)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Sample while the block runs; a thread would see nothing of calls that hold the interpreter's lock."""
        with tempfile.TemporaryFile("w+") as told:
            sampler = subprocess.Popen([sys.executable, "-c", _SAMPLES, str(os.getpid())], stdout=told)
            try:
                yield
            finally:
                sampler.kill()
                sampler.wait()
                told.seek(0)
                pairs = (line.split() for line in told.read().splitlines(keepends=True) if line.endswith("\n"))
                self.samples += [(float(at) - self.start, int(held)) for at, held in pairs]

    def step(self, name: str, call: Callable[[], Any], weights: int) -> Any:
        """The result of a call, whose peak and time are printed."""
        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        before, start, first = private_bytes(), time.perf_counter(), len(self.samples)
        worked = time.process_time()
        self.steps.append((start - self.start, name))
        with self.running():
            result = call()
        worked = time.process_time() - worked
        took = time.perf_counter() - start
        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        peak = max((held for _, held in self.samples[first:]), default=before)
        left = private_bytes()
        print(
            f"{name:22} {took:8.1f} s, of the CPU {worked:7.1f}  peak {(peak - before) / weights:6.2f}"
            f"  left {(left - before) / weights:6.2f}  held {left / 2**30:6.2f} GiB",
            flush=True,
        )
        return result


def drawn(watch: Watch, title: str) -> str:
    """The memory over time as SVG."""
    end = max(at for at, _ in watch.samples)
    top = max(held for _, held in watch.samples)

    def place(at: float, held: float) -> str:
        across = _LEFT + at / end * (_WIDTH - _LEFT - 12)
        return f"{across:.1f},{24 + (1 - held / top) * (_HEIGHT - 24 - _BOTTOM):.1f}"

    every = max(1, len(watch.samples) // 600)
    line = " ".join(place(at, held) for at, held in watch.samples[::every])
    marks = []
    for at, name in watch.steps:
        across, _ = place(at, 0).split(",")
        marks.append(f'<path d="M{across} 24V{_HEIGHT - _BOTTOM}" stroke="#bbb"/>')
        angle, anchor = (-30, "end") if float(across) > _WIDTH - 120 else (30, "start")  # those at the right fit, too
        foot = f"{across} {_HEIGHT - _BOTTOM + 12}"
        turned = f'text-anchor="{anchor}" transform="translate({foot}) rotate({angle})"'
        marks.append(f"<text {turned}>{name}</text>")
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" font-family="sans-serif" '
            'font-size="11">',
            f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="#fff"/>',
            f'<text x="{_LEFT}" y="14">{title}, {end:.0f} s</text>',
            f'<text x="4" y="30">{top / 1e9:.1f} GB</text><text x="4" y="{_HEIGHT - _BOTTOM}">0</text>',
            *marks,
            f'<polyline points="{line}" fill="none" stroke="#246" stroke-width="1.3"/>',
            "</svg>\n",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vocabulary", type=int, default=16000)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--macs", type=float, default=0.7)
    parser.add_argument("--compact-masks", action=argparse.BooleanOptionalAction, help="as of fxprune.prune.channels")
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    folder = Path(tempfile.mkdtemp())
    fxprune.trace(nn.Linear(2, 2), torch.ones(2, 2))  # what torch loads once in a process
    model = llama(options.width, options.layers, options.vocabulary, getattr(torch, options.dtype))
    weights = sum(parameter.nbytes for parameter in model.parameters())
    count = sum(parameter.numel() for parameter in model.parameters())
    title = f"{count / 1e6:.0f} million parameters in {options.dtype}"
    print(f"{title}, {weights / 2**30:.2f} GiB; memory in multiples of these")
    ids = torch.randint(0, options.vocabulary, (2, 16))
    shapes = {"input_ids": {0: torch.export.Dim("batch", max=64), 1: torch.export.Dim("length", max=512)}}
    watch = Watch()
    watch.steps.clear()
    sample: dict[str, Any] = {"dynamic_shapes": shapes, "modes": ("eval",)}
    traced = watch.step("trace", partial(fxprune.trace, model, (), {"input_ids": ids}, **sample), weights)
    choose = partial(fxprune.prune.channels, traced, macs=options.macs, compact_masks=options.compact_masks)
    watch.step("channels", choose, weights)
    final = watch.step("finalize", partial(fxprune.finalize, traced), weights)
    del traced, model, choose
    kept = sum(parameter.nbytes for parameter in final.parameters())
    print(f"  {kept / weights:.2f} of the parameters' bytes are left; {final.plan.explain().splitlines()[0]}")
    watch.step("save", partial(fxprune.save, final, folder / "model.fxp"), weights)
    runs = options.dtype == "float32"
    write = partial(fxprune.export.to_onnx, final, folder / "model.onnx")
    report = watch.step("to_onnx, verified", write, weights)
    print("\n".join(f"  {line}" for line in str(report).splitlines()[1:]))
    if runs:
        session = watch.step("onnxruntime", partial(onnxruntime.InferenceSession, folder / "model.onnx"), weights)
        (name,) = (value.name for value in session.get_inputs())
        watch.step("one run", partial(session.run, None, {name: np.asarray(ids)}), weights)
    for file in sorted(folder.iterdir()):
        print(f"  {file.stat().st_size:15,} bytes  {file.suffix}")
    shutil.rmtree(folder)
    if options.plot is not None:
        options.plot.write_text(drawn(watch, title))


if __name__ == "__main__":
    main()
