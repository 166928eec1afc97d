"""All variants from the same start through the same stages."""

from __future__ import annotations

import contextlib
import copy
import json
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

import fxprune
from fxprune.errors import ArgumentError, EvalConstantWarning, ExportError, FxpruneError
from fxprune.files import atomic

from .data import Digits, load_split
from .measuring import accuracy, count_zeros, eager_twin, measure, with_latencies
from .network import DigitNet
from .progress import Step
from .results import Milestone, Result, accuracy_failures, cost_ratios
from .training import BATCH, train
from .variants import VARIANTS, Variant

EPOCHS = 20
CALIBRATION = 512  # images, without labels, by which a trained network is pruned and repaired


def run(output: Path, *, seed: int = 0, epochs: int = EPOCHS, step: Step = lambda text, done, total: None) -> Result:
    """Train every variant, export it, and measure all stages.

    All start from the same weights and train for the same number of epochs, but those that prune the trained dense
    network: they go on for a quarter of these, and are measured after each step until then.

    Runs in one thread, so that a seed gives the same result; torch's threads and random state are restored.

    Args:
        output: the folder for the ONNX files and `report.json`; made if it is missing.
        seed: of the data split, the initial weights and the order of the batches.
        epochs: for each variant that starts untrained, at least 1.
        step: called with what is being done, how much of it is done and how much there is.

    Returns:
        The result; `failures` says what did not hold of: accuracy within a point of dense, all stages equal, export.

    Raises:
        FxpruneError: scikit-learn is missing, or a step failed that the others need.
        ExportError: `output` cannot be written.

    Example:
        >>> run(Path("fxprune-demo"), epochs=20).failures
        []
    """
    if epochs < 1:
        raise ArgumentError(f"epochs={epochs} was asked for; train for at least 1.")
    _check_writable(output)  # before the training, not after it
    began = time.perf_counter()
    result = Result(seed, epochs, str(output), notes=[variant.note for variant in VARIANTS if variant.note])
    train_digits, test_digits = load_split(seed)
    with _one_thread(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        start = DigitNet()
        dense = copy.deepcopy(start)  # trained by the first variant
        for variant in VARIANTS:
            torch.manual_seed(seed)
            model = dense if variant is VARIANTS[0] else copy.deepcopy(dense if variant.steps else start)
            _carry_out(variant, model, train_digits, test_digits, result, step)
        step("latency", 0, 1)
        files = {stage.variant: _file(result, stage.variant) for stage in result.stages if stage.stage == "onnx"}
        result.stages = with_latencies(result.stages, files, test_digits.images[:BATCH])
        step("latency", 1, 1)
    result.ratios = cost_ratios(result.stages)
    result.failures += accuracy_failures(result.stages)
    result.seconds = time.perf_counter() - began
    with atomic(output / "report.json") as name:
        name.write_text(json.dumps(result.to_dict(), indent=2) + "\n")
    return result


def _check_writable(output: Path) -> None:
    try:
        output.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=output).close()
    except OSError as error:
        raise ExportError(f"the output folder '{output}' cannot be written: {error}. Choose another one.") from error


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """More do not help a network of this size, and hurt on a busy machine; the number is the whole process's."""
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        yield
    finally:
        torch.set_num_threads(threads)


def _file(result: Result, variant: str) -> Path:
    return Path(result.output, f"{variant}.onnx")


def _carry_out(
    variant: Variant, model: nn.Module, train_digits: Digits, test_digits: Digits, result: Result, step: Step
) -> None:
    """Train, finalize, export and measure one variant; what is found joins the result."""
    traced = fxprune.trace(model, (test_digits.images[:BATCH],))
    variant.prepare(traced)
    for name, carry_out in variant.steps:
        step(f"{variant.name}: {name}", 0, 1)
        carry_out(traced.eval(), [*train_digits.images[:CALIBRATION].split(BATCH)])
        result.milestones.append(_milestone(variant, name, _finalized(traced), test_digits))
        step(f"{variant.name}: {name}", 1, 1)
    train(traced, train_digits, variant, result.seed, result.epochs, step)
    step(f"{variant.name}: deploy", 0, 1)
    final = _finalized(traced.eval())
    if variant.steps:
        result.milestones.append(_milestone(variant, "trained on", final, test_digits))
    items: dict[str, nn.Module | Path] = {
        "eager": eager_twin(traced, model).eval(), "traced": traced, "finalized": final
    }  # fmt: skip
    try:
        fxprune.export.to_onnx(final, _file(result, variant.name))
        items["onnx"] = _file(result, variant.name)
    except FxpruneError as error:
        result.failures.append(f"export: {variant.name}: {error}")
    zeros = count_zeros(final)
    for name, parameter in final.named_parameters():
        if parameter.dim() > 1:
            result.layers.setdefault(name, {"size": parameter.numel()})[variant.name] = zeros[name]
    stages, failures = measure(variant.name, items, final, test_digits)
    result.stages += stages
    result.failures += failures
    step(f"{variant.name}: deploy", 1, 1)


def _finalized(traced: fxprune.TracedModule) -> fxprune.TracedModule:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", EvalConstantWarning)  # it is deployed, and not trained on
        return fxprune.finalize(traced)


def _milestone(variant: Variant, after: str, final: fxprune.TracedModule, test_digits: Digits) -> Milestone:
    assert final.plan is not None
    return Milestone(variant.name, after, accuracy(final, test_digits), final.plan.macs[1])
