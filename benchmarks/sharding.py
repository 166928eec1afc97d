"""What processes send each other and hold while they work on one sharded module: counts of the code, and peaks.

Layers of one width, sharded by FSDP2 over processes of gloo on this machine. Bytes are told as multiples of those of
the module; peaks, of what a process holds alone beside what it held before, in MB: files that are mapped do not count,
and freed memory of 1 MB and more is given back at once. No more than two parameters are whole on the first process.

Run: PYTHONPATH=. python benchmarks/sharding.py [--processes 2 4 8] [--layers 24] [--width 256] [--only WORD ...]
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from memory import private_bytes
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.utils.prune import L1Unstructured

import fxprune
from fxprune import borrowing
from tests.sharded_networks import counted_loans

_MMAP_THRESHOLD = -3  # of mallopt, in glibc's malloc.h
Call = Callable[[fxprune.TracedModule, Path], Any]


def _by_taylor(module: fxprune.TracedModule, width: int) -> Any:
    generator = torch.Generator().manual_seed(dist.get_rank())
    batches = [(torch.randn(8, width, generator=generator), None) for _ in range(4 // min(4, dist.get_world_size()))]
    loader = batches if dist.get_rank() < 4 else []
    return fxprune.prune.channels(
        module, macs=0.5, importance="taylor", loader=loader, loss=lambda outputs, _: outputs.square().mean()
    )


def _by_moments(module: fxprune.TracedModule, width: int) -> Any:
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(80, width, generator=generator) for _ in range(8)]
    return fxprune.prune.channels(
        module, macs=0.5, importance="obs", loader=batches[dist.get_rank() :: dist.get_world_size()]
    )


def calls(width: int) -> dict[str, Call]:
    """What is measured, by what the tables call it."""
    export = fxprune.export
    return {
        "l1_unstructured of all weights": lambda module, _: fxprune.prune.l1_unstructured(module, "*.weight", 0.5),
        "global_unstructured of all weights": lambda module, _: fxprune.prune.global_unstructured(
            module, "*.weight", L1Unstructured, amount=0.5
        ),
        'prune.channels, "l2"': lambda module, _: fxprune.prune.channels(module, macs=0.5),
        'prune.channels, "taylor", 4 batches': lambda module, _: _by_taylor(module, width),
        'prune.channels, "obs", 640 samples': lambda module, _: _by_moments(module, width),
        "finalize at 0.4 of the MACs": lambda module, _: fxprune.finalize(module),
        "to_onnx": lambda module, folder: export.to_onnx(module, folder / "a.onnx"),
        "to_onnx, verify=False": lambda module, folder: export.to_onnx(module, folder / "b.onnx", verify=False),
        "to_onnx, captured once more, verify=False": lambda module, folder: export.to_onnx(
            module, folder / "c.onnx", verify=False, dynamic_shapes=None
        ),
        "to_onnx in int8, verify=False": lambda module, folder: export.to_onnx(
            module, folder / "d.onnx", verify=False, precision="int8"
        ),
        "to_program": lambda module, folder: export.to_program(module, folder / "b.pt2"),
        "to_torchscript": lambda module, folder: export.to_torchscript(module, folder / "b.pt"),
        "to_program, verify=False": lambda module, folder: export.to_program(module, folder / "a.pt2", verify=False),
        "save with parts=True": lambda module, folder: fxprune.save(module, folder / "parts", parts=True),
        "save in one file": lambda module, folder: fxprune.save(module, folder / "a.fxp"),
    }


@contextlib.contextmanager
def watched() -> Iterator[list[int]]:
    """The most that this process holds alone within, beyond that of before; in a list, when it is over."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    before, found, ended = private_bytes(), list[int](), threading.Event()
    samples = [before]

    def watch() -> None:
        while not ended.wait(0.005):
            samples.append(private_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield found
    finally:
        ended.set()
        watcher.join()
        found.append(max(samples) - before)


def process(rank: int, processes: int, layers: int, width: int, only: list[str], told: str) -> None:
    """Measure on one of the processes, and write down what it found."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    ctypes.CDLL("libc.so.6").mallopt(_MMAP_THRESHOLD, 2**20)
    dist.init_process_group("gloo", init_method=f"file://{told}/group", rank=rank, world_size=processes)
    borrowing.SMALL, borrowing.ROOM = 0, 2 * width * width * 4
    counts, found = counted_loans(), {}
    folder = Path(told, "files")
    for name, call in calls(width).items():
        if only and not any(word in name for word in only):
            continue
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers)))
        module = fxprune.trace(model.eval(), (torch.randn(2, width),), modes=("eval",))
        del model
        fully_shard(module, mesh=init_device_mesh("cpu", (processes,)))
        if name.startswith("finalize"):
            fxprune.prune.channels(module, macs=0.4)
        counts.clear()
        start = time.perf_counter()
        with watched() as held:
            call(module, folder)
        found[name] = [
            sum(each.gathered for each in counts), sum(each.sent for each in counts), held[0],
            time.perf_counter() - start,
        ]  # fmt: skip
    torch.save(found, Path(told, f"{rank}.pt"))
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--only", nargs="*", default=[], help="words of the names of what is measured")
    options = parser.parse_args()
    module = options.layers * options.width**2 * 4
    print(f"{options.layers} layers of {options.width} by {options.width}, {module / 1e6:.1f} MB")
    columns = "the first received", "it sent", "each other one sent", "it received", "MB on the first", "on others", "s"
    print(f"| call | processes | {' | '.join(columns)} |\n|{'---|' * (len(columns) + 2)}")
    for count in options.processes:
        with tempfile.TemporaryDirectory() as told:
            Path(told, "files").mkdir()
            arguments = (count, options.layers, options.width, options.only, told)
            # a forked process ends without Python's own end, which threads of gloo may disturb: they outlive
            # destroy_process_group, since caches of DTensor hold the mesh
            multiprocessing.start_processes(process, arguments, count, start_method="forkserver")
            results = [torch.load(Path(told, f"{rank}.pt")) for rank in range(count)]
        for name, (received, sent, held, seconds) in results[0].items():
            others = [result[name] for result in results[1:]]
            gave, got = (sum(each[i] for each in others) / len(others) / module for i in (0, 1))
            most = max(each[2] for each in others)
            figures = [received / module, sent / module, gave, got]
            texts = [f"{figure:.2f}" for figure in figures] + [f"{size / 1e6:.0f}" for size in (held, most)]
            print(f"| {name} | {count} | {' | '.join(texts)} | {seconds:.1f} |", flush=True)


if __name__ == "__main__":
    main()
