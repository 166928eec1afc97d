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
from .measuring import count_zeros, eager_twin, measure, with_latencies
from .network import DigitNet
from .progress import Step
from .results import Result, accuracy_failures, cost_ratios
from .training import BATCH, train
from .variants import VARIANTS, Variant

EPOCHS = 20


def run(output: Path, *, seed: int = 0, epochs: int = EPOCHS, step: Step = lambda text, done, total: None) -> Result:
    """Train every variant from the same start for the same number of epochs, export it, and measure all stages.

    Runs in one thread, so that a seed gives the same result; torch's threads and random state are restored.

    Args:
        output: the folder for the ONNX files and `report.json`; made if it is missing.
        seed: of the data split, the initial weights and the order of the batches.
        epochs: for each variant, at least 1.
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
        for variant in VARIANTS:
            torch.manual_seed(seed)
            _carry_out(variant, copy.deepcopy(start), train_digits, test_digits, result, step)
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
    train(traced, train_digits, variant, result.seed, result.epochs, step)
    step(f"{variant.name}: deploy", 0, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", EvalConstantWarning)  # it is deployed, and not trained on
        final = fxprune.finalize(traced.eval())
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
