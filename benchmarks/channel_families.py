"""Half of the MACs by channel groups, on many architectures: what fxprune reaches, and what Torch-Pruning does.

fxprune: `prune.channels(macs=0.5)`, `finalize`, `export.to_onnx`, which checks the file in onnxruntime; the errors are
the largest difference by the largest value, masked against finalized in float64 and finalized against onnxruntime.
Torch-Pruning: half of the channels of every layer; right if its model equals the one whose channels are zero instead
(batch norms shift nothing here, so that zero stays zero).

Run: PYTHONPATH=. python benchmarks/channel_families.py [network ...]
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree
from command import names, prepare
from models import cnn
from peers import magnitude_pruner
from torch import nn

import fxprune
from fxprune.graph import equality
from tests.architectures import ARCHITECTURES, FAMILIES, inputs_of, plain_transformer

LIMIT = 120  # seconds for Torch-Pruning, which does not return on some


def load(name: str) -> tuple[nn.Module, dict[str, Any]]:
    if name not in ARCHITECTURES:
        model = cnn(name).eval()
        return model, {"x": torch.randn(2, 3, *model.in_size)}  # type: ignore[misc]
    import transformers

    return plain_transformer(name, transformers).eval(), inputs_of(name)


def outputs(value: Any) -> list[torch.Tensor]:
    if hasattr(value, "to_tuple"):
        value = value.to_tuple()
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()]


def error(expected: Any, got: Any) -> float:
    """The largest difference of an output, relative to its largest value."""
    return max(equality.difference(a, b).relative for a, b in zip(outputs(expected), outputs(got), strict=True))


def ours(model: nn.Module, inputs: dict[str, Any]) -> str:
    args = tuple(inputs.values()) if "x" in inputs else ()
    kwargs = {} if args else inputs
    traced = fxprune.trace(model, args, kwargs, modes=("eval",))
    report = fxprune.prune.channels(traced, macs=0.5)
    final = fxprune.finalize(traced)
    before, after = final.plan.macs
    wide = fxprune.finalize(copy.deepcopy(traced), shrink=False, verify=False), copy.deepcopy(final)
    doubled = pytree.tree_map_only(torch.Tensor, lambda t: t.double() if t.is_floating_point() else t, (args, kwargs))
    try:
        with torch.no_grad():
            difference = f"{error(*(m.double()(*doubled[0], **doubled[1]) for m in wide)):.0e}"
    except fxprune.FxpruneError:  # a literal type in the graph
        with torch.no_grad():
            difference = f"{error(*(m.float()(*args, **kwargs) for m in wide)):.0e} (float32)"
    with tempfile.TemporaryDirectory() as folder:
        written = fxprune.export.to_onnx(final, Path(folder, "model.onnx"))
    worst = max(r.max_rel or 0.0 for r in written.comparison.rows) if written.comparison else float("nan")
    kept = "" if report.macs[1] == after else f" (predicted {report.macs[1] / before:.3f})"
    return f"{after / before:.3f}{kept} | {difference} | {worst:.0e}"


@contextlib.contextmanager
def limited() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise TimeoutError(f"not done after {LIMIT} s")

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(LIMIT)
    try:
        yield
    finally:
        signal.alarm(0)


def peers(model: nn.Module, inputs: dict[str, Any]) -> str:
    """Torch-Pruning's verdict."""
    model, zeroed = model, copy.deepcopy(model)
    example = tuple(inputs.values()) if "x" in inputs else inputs
    call = (lambda m: m(*example)) if isinstance(example, tuple) else (lambda m: m(**example))
    names = {module: name for name, module in model.named_modules()}
    twins = dict(zeroed.named_modules())
    last = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)][-1:]
    size = sum(p.numel() for p in model.parameters())
    try:
        with limited(), contextlib.redirect_stdout(io.StringIO()):
            pruner = magnitude_pruner(model, example, 0.5, last, output_transform=lambda out: outputs(out))
            for group in pruner.step(interactive=True):
                for dependency, idxs in group:
                    layer = dependency.target.module
                    writes = pruner.DG.is_out_channel_pruning_fn(dependency.handler)
                    if writes and layer in names and isinstance(layer, nn.Linear | nn.modules.conv._ConvNd):
                        twin = twins[names[layer]]
                        twin.weight.data[idxs] = 0
                        if twin.bias is not None:
                            twin.bias.data[idxs] = 0
                group.prune()
    except Exception as reason:
        return f"{'stalls' if isinstance(reason, TimeoutError) else 'crashes'} ({type(reason).__name__})"
    if sum(p.numel() for p in model.parameters()) == size:
        return "prunes nothing"
    try:
        with torch.no_grad():
            return "right" if (found := error(call(zeroed), call(model))) < 1e-3 else f"wrong ({found:.0e})"
    except Exception as reason:
        return f"its model fails ({type(reason).__name__})"


def main() -> None:
    prepare()
    logging.disable(logging.WARNING)
    print("| architecture | MACs left | masked to finalized | finalized to onnxruntime | Torch-Pruning |")
    print("|---|---|---|---|---|", flush=True)
    for name in names((*FAMILIES, *ARCHITECTURES)):
        model, inputs = load(name)
        try:
            own = ours(model, inputs)
        except fxprune.FxpruneError as reason:
            own = f"{type(reason).__name__}: {str(reason).splitlines()[0][:150]} | | "
        print(f"| {name} | {own} | {peers(load(name)[0], inputs)} |", flush=True)


if __name__ == "__main__":
    main()
