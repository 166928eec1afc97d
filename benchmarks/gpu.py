"""Latency on a GPU: dense, masked and finalized modules in eager mode, compiled, as CUDA graphs, and in onnxruntime.

For each network of `gpu_networks.py`, half of its MACs are left by `fxprune.prune.channels(macs=0.5)`; Torch-Pruning's
model has as many, by magnitude, where that package is installed. "2:4" has two of every four weights of the dense
network, as `torch.sparse.to_sparse_semi_structured` runs them. Everything is measured in float32 (without TF32),
float16 and bfloat16, with batches of 1 and 32: milliseconds by the device's clock, candidates in turns, medians.

It stops by itself within the minutes that it is given, the dearest last (what is compiled), and says what it did not
reach. Each result is compared with that of the masked network in float32 before it is timed; a finalized network that
differs there by more than 1e-3 of the largest output ends with exit code 1.

Run: python benchmarks/gpu.py [--minutes 7.5] [--networks NAME ...]
     python benchmarks/gpu.py --small      (small networks, also on a CPU, in a minute: that the script runs)
"""

from __future__ import annotations

import argparse
import copy
import functools
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from gpu_networks import Network, networks
from models import macs
from torch import Tensor, nn

import fxprune
from fxprune import export
from fxprune.graph.equality import error

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
SHARE = 0.5  # of the MACs
WRONG = 1e-3  # of the largest output, in float32
Runner = Callable[[Tensor], Any]
Cell = tuple[str, int]  # dtype, batch


@dataclass(frozen=True)
class Extent:
    """How much is measured.

    Attributes:
        batches: their sizes. compiled: dtypes, in that order. files: precisions of ONNX files.
        rounds: of which medians are.
        least_seconds: of a candidate's turn in a round, so that the clock's grain does not count.
    """

    batches: tuple[int, ...]
    compiled: tuple[str, ...]
    files: tuple[Literal["float32", "float16"], ...]
    rounds: int
    least_seconds: float


WHOLE = Extent((1, 32), ("bfloat16", "float16", "float32"), ("float32", "float16"), 11, 0.02)
SMALL = Extent((3,), ("bfloat16",), ("float32",), 2, 0.0)


@dataclass
class Table:
    """What was measured of one network.

    Attributes:
        name: of the network. macs: by candidate, the share left. seconds: by candidate and way, by cell.
        errors: by candidate, by dtype: against the masked network in float32.
        remarks: what was not measured, and why.
    """

    name: str
    macs: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, dict[Cell, float]] = field(default_factory=dict)
    errors: dict[str, dict[str, float]] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)

    def text(self) -> str:
        """As Markdown: milliseconds, and their ratio to those of the dense network in eager mode."""
        dense = self.seconds["dense"]
        cells = list(dense)
        lines = [
            f"### {self.name}",
            "",
            "| | MACs | " + " | ".join(f"{dtype}, {batch}" for dtype, batch in cells) + " |",
            "|---" * (len(cells) + 2) + "|",
        ]
        for way, measured in self.seconds.items():
            told = [self._told(measured.get(cell), dense.get(cell)) for cell in cells]
            share = self.macs.get(way.partition(",")[0])
            lines.append(f"| {way} | {'' if share is None else f'{share:.3f}'} | {' | '.join(told)} |")
        for name, errors in self.errors.items():
            lines += ["", f"{name} against masked in float32: " + ", ".join(f"{k} {v:.1e}" for k, v in errors.items())]
        return "\n".join([*lines, *(f"\n{remark}" for remark in self.remarks)])

    @staticmethod
    def _told(seconds: float | None, dense: float | None) -> str:
        if seconds is None:
            return ""
        return f"{1e3 * seconds:.3f}" if not dense else f"{1e3 * seconds:.3f} ({seconds / dense:.2f})"


class Clock:
    """Seconds that a device takes, and how many of the run are left."""

    def __init__(self, device: str, minutes: float, extent: Extent) -> None:
        self.device, self.extent, self.end = device, extent, time.monotonic() + 60 * minutes

    @property
    def is_over(self) -> bool:
        return time.monotonic() > self.end

    def seconds(self, run: Callable[[], object], calls: int) -> float:
        """Of one call, by many in a row."""
        if self.device == "cpu":
            begin = time.perf_counter()
            for _ in range(calls):
                run()
            return (time.perf_counter() - begin) / calls
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(calls):
            run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / calls

    def race(self, runs: Mapping[str, Callable[[], object]]) -> dict[str, float]:
        """The median of each, in turns."""
        calls = {}
        for name, run in runs.items():
            self.seconds(run, 3)  # until it is warm
            calls[name] = max(1, round(self.extent.least_seconds / self.seconds(run, 3)))
        found: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(self.extent.rounds):
            for name, run in runs.items():
                found[name].append(self.seconds(run, calls[name]))
        return {name: statistics.median(values) for name, values in found.items()}


class Measurement:
    """Everything that is measured of one network."""

    def __init__(self, name: str, network: Network, clock: Clock) -> None:
        self.network, self.clock, self.table = network, clock, Table(name)
        torch.manual_seed(0)
        self.model = network.build().eval().to(clock.device)
        self.modules = self._modules()
        reference = self.modules["masked"]
        dense = macs(self.model, self.sample(1))
        for each, module in self.modules.items():
            self.table.macs[each] = 1.0 if each in ("masked", "2:4") else macs(module, self.sample(1)) / dense
        self.wanted = self.call(reference, self.sample(2))

    def sample(self, batch: int, dtype: torch.dtype = torch.float32) -> Tensor:
        torch.manual_seed(batch)
        return self.network.sample(batch).to(self.clock.device, dtype)

    @staticmethod
    def call(module: Runner, x: Tensor) -> Any:
        with torch.no_grad():
            return module(x)

    def _modules(self) -> dict[str, nn.Module]:
        """The candidates in float32; the values of "2:4" are dense still."""
        traced = fxprune.trace(copy.deepcopy(self.model), (self.sample(2),), modes=("eval",)).eval()
        sparse = copy.deepcopy(traced)
        fxprune.prune.channels(traced, macs=SHARE)
        found: dict[str, nn.Module] = {"dense": self.model, "masked": traced, "finalized": fxprune.finalize(traced)}
        names = [
            f"{name}.weight"
            for name, module in self.model.named_modules()
            if isinstance(module, nn.Linear) and module.out_features != 1000
        ]
        for name in names:
            fxprune.prune.nm_structured(sparse, name)
        if names:
            found["2:4"] = fxprune.finalize(sparse)
        try:
            found["Torch-Pruning"] = self._peer()
        except Exception as problem:  # whatever the peer raises is the result
            self.table.remarks.append(f"Torch-Pruning: {type(problem).__name__}: {problem}")
        return found

    def _peer(self) -> nn.Module:
        """Torch-Pruning's model with at most as many MACs, the same share of every layer, found by bisection."""
        from peers import classifiers, magnitude_pruner

        dense, x = macs(self.model, self.sample(1)), self.sample(1)
        few, many, found = 0.0, 0.95, None
        for _ in range(6):
            ratio, model = (few + many) / 2, copy.deepcopy(self.model)
            layers = {m: self.network.heads[name] for path, m in model.named_modules()
                      if (name := path.rpartition(".")[2]) in self.network.heads}  # fmt: skip
            streams = [m for path, m in model.named_modules() if path.endswith(("out", "down", "patches"))]
            options: dict[str, Any] = {"num_heads": layers, "prune_num_heads": True, "prune_head_dims": False}
            options = options | {"head_pruning_ratio": ratio} if layers else {}
            magnitude_pruner(model, x, ratio, [*classifiers(model), *streams], **options).step()
            if macs(model, x) <= SHARE * dense:
                many, found = ratio, model
            else:
                few = ratio
        if found is None:
            raise RuntimeError("no ratio reaches the MACs")
        return found

    def cast(self, dtype: torch.dtype) -> Iterator[tuple[str, nn.Module]]:
        """The candidates in a dtype, with their errors noted."""
        label = str(dtype).removeprefix("torch.")
        for name, module in self.modules.items():
            if name == "2:4" and (dtype == torch.float32 or self.clock.device == "cpu"):
                continue
            made = copy.deepcopy(module).to(dtype)
            if name == "2:4":
                made = semi_structured(made)
            if name in ("masked", "finalized"):
                worst = error(self.wanted, self.call(made, self.sample(2, dtype)).float())
                self.table.errors.setdefault(name, {})[label] = worst
            yield name, made

    def note(self, way: str, cell: Cell, measured: Mapping[str, float]) -> None:
        for name, seconds in measured.items():
            self.table.seconds.setdefault(f"{name}, {way}" if way else name, {})[cell] = seconds

    def eager(self) -> None:
        """Every candidate as it is, and as a CUDA graph."""
        for label, dtype in DTYPES.items():
            modules = dict(self.cast(dtype))
            for batch in self.clock.extent.batches:
                if self.clock.is_over:
                    self.table.remarks.append(f"{label}, {batch}: not reached")
                    continue
                x = self.sample(batch, dtype)
                runs = {name: functools.partial(self.call, module, x) for name, module in modules.items()}
                self.note("", (label, batch), self.clock.race(runs))
                if self.clock.device == "cuda":
                    graphs = {name: graphed(run) for name, run in runs.items()}
                    self.note("CUDA graph", (label, batch), self.clock.race(graphs))

    def compiled(self, label: str) -> None:
        """Every candidate through `torch.compile`; those that matter most first."""
        backend = "inductor" if self.clock.device == "cuda" else "aot_eager"
        modules = dict(self.cast(DTYPES[label]))
        for batch in self.clock.extent.batches:
            x, runs = self.sample(batch, DTYPES[label]), {}
            for name in sorted(modules, key=["dense", "finalized", "Torch-Pruning", "2:4", "masked"].index):
                if self.clock.is_over:
                    self.table.remarks.append(f"{name}, compiled, {label}, {batch}: not reached")
                    continue
                torch.compiler.reset()
                runs[name] = functools.partial(
                    self.call, torch.compile(modules[name], dynamic=False, backend=backend), x
                )
                worst = error(self.call(modules[name], x).float(), runs[name]().float())
                if worst > (WRONG if label == "float32" else 0.1):
                    self.table.remarks.append(f"{name}, compiled, {label}, {batch}: differs by {worst:.1e}")
            self.note("compiled", (label, batch), self.clock.race(runs))

    def onnxruntime(self, folder: Path) -> None:
        """Files of the dense, the finalized and the peer's network, inputs and outputs on the device."""
        import onnxruntime

        provider = "CUDAExecutionProvider" if self.clock.device == "cuda" else "CPUExecutionProvider"
        if provider not in onnxruntime.get_available_providers():
            self.table.remarks.append(f"onnxruntime {onnxruntime.__version__} has no {provider}")
            return
        for label in self.clock.extent.files:
            paths = {}
            for name in ("dense", "finalized", "Torch-Pruning"):
                if name in self.modules:
                    module = copy.deepcopy(self.modules[name]).cpu()
                    traced = module if isinstance(module, fxprune.TracedModule) else fxprune.trace(
                        module, (self.sample(2).cpu(),), modes=("eval",)
                    )  # fmt: skip
                    paths[name] = folder / f"{name}.{label}.onnx"
                    export.to_onnx(traced, paths[name], precision=label, keep_io=False, verify=False)
            sessions = {name: onnxruntime.InferenceSession(path, providers=[provider]) for name, path in paths.items()}
            for batch in self.clock.extent.batches:
                if self.clock.is_over:
                    self.table.remarks.append(f"onnxruntime, {label}, {batch}: not reached")
                    continue
                x = self.sample(batch, DTYPES[label])
                runs = {name: bound(session, x) for name, session in sessions.items()}
                self.note("onnxruntime", (label, batch), self.clock.race(runs))


def semi_structured(module: nn.Module) -> nn.Module:
    """A module whose 2:4 weights are kept as pairs of values and indices, in place."""
    for owner in list(module.modules()):
        for name, parameter in list(owner.named_parameters(recurse=False)):
            if parameter.dim() == 2 and two_of_four(parameter):
                sparse = torch.sparse.to_sparse_semi_structured(parameter.detach())
                setattr(owner, name, nn.Parameter(sparse, requires_grad=False))
    return module


def two_of_four(weight: Tensor) -> bool:
    """Whether at most two of every four entries along rows are not zero, and the shape is one that kernels take."""
    rows, columns = weight.shape
    return not (rows % 64 or columns % 64) and bool((weight.view(rows, -1, 4).count_nonzero(-1) <= 2).all())


def graphed(run: Callable[[], object]) -> Callable[[], object]:
    """A call as a CUDA graph, of the inputs that it was made with."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def bound(session: Any, x: Tensor) -> Callable[[], object]:
    """A run of a session that copies nothing between devices."""
    binding, kind = session.io_binding(), x.device.type
    name, output = session.get_inputs()[0].name, session.get_outputs()[0].name
    element = {torch.float32: np.float32, torch.float16: np.float16}[x.dtype]
    binding.bind_input(name, kind, 0, element, tuple(x.shape), x.data_ptr())
    binding.bind_output(output, kind)

    def run() -> None:
        session.run_with_iobinding(binding)

    run.input = x  # type: ignore[attr-defined]  # its memory is bound
    return run


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=7.5)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--networks", nargs="+", choices=networks(False), default=list(networks(False)))
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not options.small:
        parser.error("no GPU was found; with --small it runs on a CPU")
    warnings.simplefilter("ignore")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    clock = Clock(device, options.minutes, SMALL if options.small else WHOLE)
    chosen = networks(options.small)
    what = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    print(f"{what}, torch {torch.__version__}, milliseconds of a call and (share of the dense network in eager mode)\n")
    measured = [Measurement(name, chosen[name], clock) for name in options.networks]
    for each in measured:
        each.eager()
    with tempfile.TemporaryDirectory() as folder:
        for each in measured:
            each.onnxruntime(Path(folder))
    for label in clock.extent.compiled:
        for each in measured:
            each.compiled(label)
    for each in measured:
        print(each.table.text(), end="\n\n")
    wrong = [each.table.name for each in measured if each.table.errors["finalized"]["float32"] > WRONG]
    if wrong:
        print(f"finalize computes something else: {', '.join(wrong)}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
