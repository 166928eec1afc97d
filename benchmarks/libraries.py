"""Models of timm, transformers, ultralytics and diffusers through fxprune, and back into their own classes.

Each of `library_models.py` gets random weights, and batch norms that are not at their start; it is traced in eval
mode, `prune.channels(macs=0.7)` masks, `finalize` removes, `to_onnx` exports, `write_back` returns to the class.
Whatever a step raises is its result. A model is a process of its own, with a limit of five minutes of the CPU's time;
each adds a line to a file, and models that have one there are not run again.

| column | holds |
|---|---|
| trace | "equal": the outputs are eager's, bit for bit |
| budget | the MACs left, or why the budget is refused |
| finalize | the largest relative error against the masked module, at batch 2 and 3, in float64 |
| onnx | the largest relative error of the file in onnxruntime against the finalized module, in float32 |
| back | that of the shrunk module of the own class against the masked module; "runnable": chosen for the class |
| pretrained | with `runnable=model`, through `save_pretrained` and `from_pretrained`: that error again |
| Torch-Pruning | the MACs that it leaves, and "equal" or how far its result is from the model with zeros instead |

Run: PYTHONPATH=. python benchmarks/libraries.py results.jsonl [part of a name ...]
     PYTHONPATH=. python benchmarks/libraries.py results.jsonl --peer [part of a name ...]   (the last column alone)
     PYTHONPATH=. python benchmarks/libraries.py results.jsonl --table
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import multiprocessing
import os
import re
import resource
import signal
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
import torch.utils._pytree as pytree
from command import declare_torchvision
from library_models import entries
from torch import Tensor, nn

import fxprune
from fxprune.errors import CaptureError, ConfigurationWarning, PassError, WriteBackError
from fxprune.graph.equality import error
from fxprune.graph.interpretation import run
from fxprune.graph.names import tensor_at

LIMIT, PEER_LIMIT = 300, 120  # seconds of the CPU's time
PEER_MEMORY = 16  # GB of addresses
STEPS = ("trace", "budget", "finalize", "onnx", "back", "pretrained")
PEER = "Torch-Pruning"
PEER_REACHED = re.compile(r"0\.([0-6]\d\d|700), equal")  # a model that it left whole counts for nothing
REFUSED = ("PruningError", "BudgetError")
# larger errors are wrong results: in float64, and in float32
EXACT, ROUNDED = 1e-9, 2e-4


def settle(model: nn.Module) -> nn.Module:
    """Batch norms as after training, and gains and scales that start at zero away from it."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            nn.init.normal_(module.running_mean, 0, 0.3)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            if module.affine:
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, 0, 0.2)
    for parameter in model.parameters():
        if parameter.is_floating_point() and parameter.numel() and parameter.abs().max() < 1e-3:
            nn.init.normal_(parameter, 0, 0.1)
    return model.eval()


def tensors_in(value: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(_plain(value)) if isinstance(leaf, Tensor)]


def _plain(value: Any) -> Any:
    """Outputs of a library's own class as a dict."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _parts(value: Tensor) -> Tensor:
    """Complex numbers as files take them, as their parts."""
    return torch.view_as_real(value) if value.is_complex() else value


def widest(wanted: Any, found: Any) -> float:
    first, second = tensors_in(wanted), tensors_in(found)
    if len(first) != len(second):
        return float("inf")
    return max((error(want, got) for want, got in zip(first, second, strict=True)), default=float("inf"))


def first_line(problem: BaseException) -> str:
    return f"{type(problem).__name__}: {' '.join(str(problem).split())[:600]}"


class Steps:
    """The way of one model; `row` has what each step gave."""

    def __init__(self, name: str) -> None:
        torch.manual_seed(0)
        self.row: dict[str, Any] = {"model": name}
        self.model, self.args, self.kwargs = entries()[name].build()
        settle(self.model)

    def peer(self) -> dict[str, Any]:
        """What Torch-Pruning makes of the model."""
        from libraries_peer import by_torch_pruning  # needs Torch-Pruning, which the other columns do not

        self._step(PEER, lambda: by_torch_pruning(self.model, self.args, self.kwargs, tensors_in))
        return self.row

    def run(self) -> dict[str, Any]:
        """Steps in order; what needs a step that failed is left out."""
        self._step("trace", self.trace)
        if hasattr(self, "traced"):
            self._step("budget", self.budget)
            self._step("finalize", self.finalize)
        if hasattr(self, "final"):
            self._step("onnx", self.onnx)
            self._step("back", self.back)
        if hasattr(self, "traced") and hasattr(self.model, "save_pretrained"):
            self._step("pretrained", self.pretrained)
        return self.row

    def _step(self, name: str, step: Callable[[], str]) -> None:
        start = time.process_time()
        try:
            with warnings.catch_warnings(), torch.no_grad():
                warnings.simplefilter("ignore")
                self.row[name] = step()
        except Exception as problem:  # whatever is raised is the result
            self.row[name] = first_line(problem)
        self.row.setdefault("seconds", {})[name] = round(time.process_time() - start, 1)

    def trace(self) -> str:
        self.eager = copy.deepcopy(self.model(*copy.deepcopy(self.args), **copy.deepcopy(self.kwargs)))
        self.traced = fxprune.trace(self.model, self.args, self.kwargs, modes=("eval",))
        found = self.traced(*self.args, **self.kwargs)
        pairs = list(zip(tensors_in(self.eager), tensors_in(found), strict=True))
        return "equal" if all(torch.equal(*pair) for pair in pairs) else f"differs by {widest(self.eager, found):.1e}"

    def budget(self) -> str:
        report = fxprune.prune.channels(self.traced, macs=0.7)
        return f"{report.macs[1] / report.macs[0]:.3f}"

    def finalize(self) -> str:
        self.final = fxprune.finalize(self.traced)
        assert self.final.plan is not None
        left = f"{self.final.plan.macs[1] / max(self.final.plan.macs[0], 1):.3f}"
        if self.row["budget"][:2] == "0." and left != self.row["budget"]:
            raise AssertionError(f"{left} of the MACs are left, not {self.row['budget']}")
        try:
            masked, final = copy.deepcopy(self.traced).double(), fxprune.finalize(copy.deepcopy(self.traced).double())
            calls = self.calls(torch.float64)
            errors = [widest(masked(*args, **kwargs), final(*args, **kwargs)) for args, kwargs in calls]
        except (CaptureError, PassError, RuntimeError):  # it computes in float32 whatever it is given
            # what is folded was rounded to that
            return f"{max(self._error_of_graphs(*call) for call in self.calls(None)):.1e} (float32)"
        return f"{max(errors):.1e}"

    def _error_of_graphs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float:
        """How far the graphs are apart, computed in float64 node by node, where that can be."""
        inputs = pytree.tree_leaves((args, kwargs))

        def outputs(dtype: torch.dtype | None) -> list[Any]:
            modules = self.traced, self.final
            return [run(m.graphs["eval"], functools.partial(tensor_at, m), inputs, dtype) for m in modules]

        try:
            return widest(*outputs(torch.float64))
        except RuntimeError:  # so does control flow
            return widest(*outputs(None))

    def calls(self, dtype: torch.dtype | None) -> Iterable[tuple[Any, Any]]:
        """The sample, and one of three where the batch is free, in a dtype."""
        (batch, *_) = [len(value) for value in tensors_in((self.args, self.kwargs)) if value.dim()]
        free = "Dim" in repr(self.traced.dynamic_shapes) and batch == 2  # torch.export takes 1 for a constant
        for size in (2, 3) if free else (batch,):

            def shaped(value: Any, size: int = size) -> Any:
                if not isinstance(value, Tensor):
                    return value
                more = torch.cat([value, value.flip(0)])[:size] if value.dim() and len(value) == batch else value
                return more.to(dtype) if dtype is not None and value.is_floating_point() else more

            yield pytree.tree_map(shaped, (self.args, self.kwargs))

    def onnx(self) -> str:
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "model.onnx")
            fxprune.export.to_onnx(self.final, path)
            session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
            given = [_parts(value) for value in tensors_in((self.args, self.kwargs))]
            names = [item.name for item in session.get_inputs()]
            feeds = self._feeds(names, given)
            found = [torch.from_numpy(np.asarray(each)) for each in session.run(None, feeds)]
        wanted = tensors_in(self.final(*self.args, **self.kwargs))
        return f"{max(error(want, got) for want, got in zip(wanted, found, strict=True)):.1e}"

    def _feeds(self, names: list[str], given: list[Tensor]) -> dict[str, np.ndarray]:
        """Inputs by their names; those that the graph does not read are not in the file."""
        if len(names) == len(given):
            return {name: value.numpy() for name, value in zip(names, given, strict=True)}
        named = {name: value for name, value in self.kwargs.items() if isinstance(value, Tensor)}
        return {name: _parts(named[name]).numpy() for name in names}

    def back(self) -> str:
        try:
            return self._back(self.traced, self.final)
        except WriteBackError:
            traced = fxprune.trace(self.model, self.args, self.kwargs, modes=("eval",))
            fxprune.prune.channels(traced, macs=0.7, runnable=self.model)
            return f"{self._back(traced, fxprune.finalize(traced))} (runnable)"

    def _back(self, traced: fxprune.TracedModule, final: fxprune.TracedModule) -> str:
        small = fxprune.write_back(final, self.model)
        assert type(small) is type(self.model)
        if sum(p.numel() for p in small.parameters()) >= sum(p.numel() for p in self.model.parameters()):
            raise WriteBackError("everything came back as zeros")
        return f"{widest(traced(*self.args, **self.kwargs), small(*self.args, **self.kwargs)):.1e}"

    def pretrained(self) -> str:
        """With channels chosen for the class, through a folder as the library has it."""
        traced = fxprune.trace(self.model, self.args, self.kwargs, modes=("eval",))
        fxprune.prune.channels(traced, macs=0.7, runnable=self.model)
        with warnings.catch_warnings():
            warnings.simplefilter("error", ConfigurationWarning)  # that no configuration says the sizes
            small: Any = fxprune.write_back(fxprune.finalize(traced), self.model)
        with tempfile.TemporaryDirectory() as folder:
            small.save_pretrained(folder)
            again = type(small).from_pretrained(folder).eval()
        return f"{widest(traced(*self.args, **self.kwargs), again(*self.args, **self.kwargs)):.1e}"


# ---- the runner


def run_all(out: Path, wanted: list[str], *, peer: bool) -> None:
    """Run what has no line yet, one process a model; its line is added to those that are there."""
    import_all()
    key = PEER if peer else "trace"
    done = {row["model"] for row in rows(out) if key in row}
    for name in entries():
        if name in done or (wanted and not any(part in name for part in wanted)):
            continue
        start = time.perf_counter()
        row = in_a_process(name, peer=peer)
        row["wall"] = round(time.perf_counter() - start, 1)
        with out.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(
            f"{row['wall']:6.1f} s",
            *(str(row[key])[:100] for key in ("model", *STEPS, PEER) if key in row),
            sep=" | ",
            flush=True,
        )


def import_all() -> None:
    """Import what an export needs, in the process that others are forked from."""
    traced = fxprune.trace(nn.Linear(2, 2), torch.randn(2, 2), modes=("eval",))
    with tempfile.TemporaryDirectory() as folder:
        fxprune.export.to_onnx(fxprune.finalize(traced), os.path.join(folder, "model.onnx"), verify=False)


def in_a_process(name: str, *, peer: bool) -> dict[str, Any]:
    """What one model gives, in a process that is forked from this one, which has imported everything."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    limit = PEER_LIMIT if peer else LIMIT

    def work() -> None:
        resource.setrlimit(resource.RLIMIT_CPU, (limit, limit))
        if peer:
            resource.setrlimit(resource.RLIMIT_AS, (PEER_MEMORY * 10**9, PEER_MEMORY * 10**9))
        steps = Steps(name)
        sender.send(steps.peer() if peer else steps.run())

    process = context.Process(target=work)
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        process.join()
        killed = process.exitcode in (-signal.SIGXCPU, -signal.SIGKILL)
        first = PEER if peer else "trace"
        return {"model": name, first: f"over {limit} s" if killed else f"ended with {process.exitcode}"}
    finally:
        process.kill()
        process.join()


def rows(out: Path) -> list[dict[str, Any]]:
    """The lines of a file; of a model that has several, the last, and the last of Torch-Pruning."""
    by_model: dict[str, dict[str, Any]] = {}
    for row in map(json.loads, out.read_text().splitlines() if out.exists() else []):
        before = by_model.get(row["model"], {})
        by_model[row["model"]] = before | row if PEER in row else row | {k: before[k] for k in (PEER,) if k in before}
    return list(by_model.values())


def verdict(step: str, text: str) -> str:
    """What of a step's result stands in the table: "yes" or a number, "refused", "WRONG" or "failed"."""
    if step == PEER:
        if text.startswith("MemoryError"):
            return f"over {PEER_MEMORY} GB"
        return text if text[:2] in ("0.", "1.") or text.startswith("over") else text.split(":")[0]
    if step == "trace":
        return (
            "yes"
            if text == "equal"
            else "WRONG"
            if text.startswith("differs")
            else text
            if text.startswith("over")
            else "refused"
            if text.startswith("CaptureError")
            else "failed"
        )
    if step == "budget":
        return text if text[:2] == "0." else "refused" if text.startswith(REFUSED) else "failed"
    if text.startswith(REFUSED):
        return "refused"
    limit = EXACT if step == "finalize" and "float32" not in text else ROUNDED
    try:
        good = "runnable" if "(runnable)" in text else "yes"
        return good if float(text.split()[0]) < limit else f"WRONG ({text})"
    except ValueError:
        return "refused" if text.startswith(("WriteBackError", "ConfigurationWarning")) else "failed"


def table(out: Path) -> str:
    """The table of all models in a file, by library."""
    lines, found, columns = list[str](), rows(out), (*STEPS, PEER)
    for library in dict.fromkeys(row["model"].split("/")[0] for row in found):
        lines += [
            f"### {library}",
            "",
            "| model | " + " | ".join((*STEPS, PEER)) + " |",
            "|---" * (len(STEPS) + 2) + "|",
        ]
        passed: Counter[str] = Counter()
        mine = [row for row in found if row["model"].startswith(f"{library}/")]
        for row in mine:
            verdicts = {step: verdict(step, row[step]) if step in row else "" for step in columns}
            passed.update(step for step in STEPS if verdicts[step] in ("yes", "runnable") or verdicts[step][:2] == "0.")
            passed[PEER] += bool(PEER_REACHED.match(verdicts[PEER]))
            lines.append(f"| {row['model'].split('/')[1]} | " + " | ".join(verdicts.values()) + " |")
        lines += [f"| of {len(mine)} | " + " | ".join(str(passed[step]) for step in columns) + " |", ""]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("results", type=Path, help="the file of lines")
    parser.add_argument("names", nargs="*", metavar="NAME", help="parts of names; all models where there are none")
    parser.add_argument("--peer", action="store_true", help="run Torch-Pruning, the last column alone")
    parser.add_argument("--table", action="store_true", help="run nothing, print the file as a table")
    options = parser.parse_intermixed_args()
    if options.table:
        print(table(options.results))
        return
    torch.set_num_threads(1)
    declare_torchvision()
    os.environ.setdefault("YOLO_OFFLINE", "1")
    run_all(options.results, options.names, peer=options.peer)


if __name__ == "__main__":
    main()
