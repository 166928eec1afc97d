"""Measuring a trained variant at every stage, from the eager model to the file in onnxruntime."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils.prune import custom_from_mask as eager_mask

import fxprune

from .data import Digits
from .results import Stage

ROUNDS = 100  # runs of each file in onnxruntime


def eager_twin(traced: fxprune.TracedModule, model: nn.Module) -> nn.Module:
    """The eager model with torch's own hooks and parametrizations in place of the graph's nodes, and their state."""
    twin, state = copy.deepcopy(model), traced.state_dict()
    for key, value in state.items():
        path, _, tensor = key.removesuffix("_orig").rpartition(".")
        if tensor == "bias" and twin.get_submodule(path).bias is None:  # the repair has made it
            twin.get_submodule(path).bias = nn.Parameter(torch.zeros_like(value))
    for key, value in state.items():
        path, _, tensor = key.partition(".parametrizations.")
        if tensor.endswith("._u"):
            parametrizations.spectral_norm(twin.get_submodule(path), tensor.partition(".")[0])
        elif tensor.endswith(".original1"):
            parametrizations.weight_norm(twin.get_submodule(path), tensor.partition(".")[0])
        elif key.endswith("_mask"):
            path, _, tensor = key.removesuffix("_mask").rpartition(".")
            eager_mask(twin.get_submodule(path), tensor, value)
    twin.load_state_dict(state)
    return twin


def count_zeros(module: nn.Module) -> dict[str, int]:
    """The zeros of each parameter."""
    return {name: int((parameter == 0).sum()) for name, parameter in module.named_parameters()}


def measure(
    variant: str, items: Mapping[str, nn.Module | Path], final: fxprune.TracedModule, test: Digits
) -> tuple[list[Stage], list[str]]:
    """A row for each stage, and what differs from the first one.

    Args:
        items: by stage, the eager model first. final: the finalized one among them.
    """
    eager, *others = items.values()
    # one call with one output: a row for each candidate, in order
    compared = fxprune.compare(eager, *others, inputs=(test.images,)).rows
    stages, failures = [], []
    for (name, item), row in zip(items.items(), (None, *compared), strict=True):
        found = _costs(Stage(variant, name, accuracy(item, test)), item, final)
        stages.append(found if row is None else replace(found, max_difference=row.max_abs))
        if row and not (row.ok and (row.max_abs == 0 or _rounds(name, final))):
            difference = f"{name} differs from eager by {row.max_abs} {row.note}".rstrip()
            failures.append(f"equality: {variant}: {difference}")
    return stages, failures


def _costs(stage: Stage, item: nn.Module | Path, final: fxprune.TracedModule) -> Stage:
    if isinstance(item, Path):
        return replace(stage, file_bytes=item.stat().st_size)
    stage = replace(stage, parameters=sum(parameter.numel() for parameter in item.parameters()))
    if item is final:
        stage = replace(stage, zeros=sum(count_zeros(final).values()))
    if final.plan is not None and stage.stage in ("eager", "finalized"):
        before, after = final.plan.macs
        stage = replace(stage, macs=after if stage.stage == "finalized" else before)
    return stage


def _rounds(stage: str, final: fxprune.TracedModule) -> bool:
    """Whether sums run in another order: in onnxruntime, and in a smaller network; elsewhere the bits are the same."""
    return stage == "onnx" or (stage == "finalized" and final.plan is not None and bool(final.plan.removed))


def accuracy(item: nn.Module | Path, test: Digits) -> float:
    """The fraction of the test images that a module or a file gets right."""
    if isinstance(item, Path):
        (logits,) = fxprune.export.Session(item).run(test.images).values()
    else:
        with torch.no_grad():
            logits = item(test.images)
    return (logits.argmax(1) == test.labels).double().mean().item()


def with_latencies(stages: list[Stage], files: Mapping[str, Path], batch: Tensor) -> list[Stage]:
    """The stages, with the latencies of those that are files, by variant; measured in turns."""
    if not files:
        return stages
    measured = fxprune.export.bench(list(files.values()), inputs=(batch,), rounds=ROUNDS)
    medians = {variant: latency.median for variant, latency in zip(files, measured, strict=True)}
    return [replace(stage, latency_ms=medians[stage.variant]) if stage.stage == "onnx" else stage for stage in stages]
