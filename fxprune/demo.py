"""The demo: a residual network on scikit-learn's digits, dense and pruned, from training to onnxruntime."""

from __future__ import annotations

import contextlib
import copy
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.progress import Progress, TaskID
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations
from torch.nn.utils.prune import L1Unstructured, LnStructured
from torch.nn.utils.prune import custom_from_mask as eager_mask

import fxprune
from fxprune.errors import ArgumentError, ExportError, FxpruneError
from fxprune.files import atomic

EPOCHS, BATCH = 20, 64
POINT = 0.01  # how far below the dense accuracy a pruned one may be
FLOOR = 0.95  # below it the dense network has not learned, and a comparison with it says nothing
PRUNING = (0.1, 0.5)  # masks grow between these fractions of the epochs
ROUNDS = 100  # runs of each file in onnxruntime
COSTS = {  # the stage and the column that say them
    "MACs": ("finalized", "macs"), "parameters": ("finalized", "parameters"),
    "file size": ("onnx", "file_bytes"), "latency": ("onnx", "latency_ms"),
}  # fmt: skip

Step = Callable[[str, int, int], None]


class Block(nn.Module):
    """Two 3x3 convolutions with batch norm beside a 1x1 shortcut; [N, inputs, H, W] to [N, outputs, H/s, W/s]."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = functional.relu(self.bn1(self.conv1(x)))
        return functional.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class DigitNet(nn.Module):
    """A residual network, [N, 1, 8, 8] images to [N, 10] logits."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 32, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(32)
        self.block1 = Block(32, 32, 1)
        self.block2 = Block(32, 64, 2)
        self.head = nn.Linear(64, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = self.block2(self.block1(functional.relu(self.bn(self.stem(images)))))
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


@dataclass(frozen=True)
class Variant:
    """A way to treat the network; all go through the same stages and columns.

    Attributes:
        name: also of its file.
        prepare: called on the traced module before training.
        schedule: from the traced module, `start` and `stop` to the schedule that prunes it after each epoch.
        note: what the reader should know about the result.
    """

    name: str
    prepare: Callable[[Any], None] = lambda traced: None
    schedule: Callable[..., fxprune.Schedule] | None = None
    note: str = ""


def _insert_norms(traced: fxprune.TracedModule) -> None:
    fxprune.spectral_norm(traced, "stem.weight")
    fxprune.weight_norm(traced, "head.weight")


def _l1(traced: fxprune.TracedModule, **span: Any) -> fxprune.Schedule:
    names = ("block?.conv?.weight", "block?.shortcut.weight")
    return fxprune.Schedule(traced, names, L1Unstructured, 0.8, scope="global", **span)


def _rows(traced: fxprune.TracedModule, **span: Any) -> fxprune.Schedule:
    names = ("stem.weight", "block1.conv1.weight", "block2.conv1.weight")
    return fxprune.Schedule(traced, names, LnStructured, 0.5, n=2, dim=0, **span)


def _budget(traced: fxprune.TracedModule, **span: Any) -> fxprune.Schedule:
    return fxprune.Schedule(traced, None, lambda gone: fxprune.prune.channels(traced, macs=1 - gone), 0.5, **span)


VARIANTS = (
    Variant("dense"),
    Variant("unstructured", _insert_norms, _l1, "Unstructured zeros do not give speed; removing channels does."),
    Variant("rows", schedule=_rows, note="rows: half of the filters of three layers, by ln_structured."),
    Variant("budget", schedule=_budget, note="budget: coupled channels, to half of the MACs, in blocks that run fast."),
)


@dataclass
class Stage:
    """A row of the table: `variant` at `stage` (eager, traced, finalized, onnx); None where a column does not apply.

    accuracy is a fraction of the test images; parameters and zeros are counts of entries, macs of
    multiply-accumulates for 64 images; file_bytes and latency_ms
    (median, one thread, 64 images) are of the ONNX file; max_difference is the largest absolute difference of a logit
    from the eager stage, over the test images.
    """

    variant: str
    stage: str
    accuracy: float
    parameters: int | None = None
    zeros: int | None = None
    macs: int | None = None
    file_bytes: int | None = None
    latency_ms: float | None = None
    max_difference: float | None = None


@dataclass
class Result:
    """What the demo measured; without `failures` it succeeded.

    `layers` has the zeros of each weight by variant, `ratios` what is left of the dense network's costs.
    """

    seed: int
    epochs: int
    output: str
    stages: list[Stage] = field(default_factory=list)
    layers: dict[str, dict[str, int]] = field(default_factory=dict)
    ratios: dict[str, dict[str, float]] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=lambda: [variant.note for variant in VARIANTS if variant.note])
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """The result as plain JSON types."""
        return {"ok": not self.failures, **asdict(self)}

    def show(self, console: Console) -> None:
        """Print the tables, the notes and where the files are."""
        heads = "", "", "accuracy", "params", "zeros", "MACs", "kB", "ms", "diff"
        rows = Table(*heads, box=box.SIMPLE, show_edge=False, padding=(0, 1, 0, 0))
        layers = Table("zeros", *(variant.name for variant in VARIANTS), "of", box=box.SIMPLE, show_edge=False)
        for column in (*rows.columns[2:], *layers.columns[1:]):
            column.justify = "right"
        formats = ("{:.2%}", "{:,}", "{:.1%}", "{:.1f}M", "{:.0f}", "{:.3f}", "{:.2g}")
        for s in self.stages:
            share = None if s.zeros is None or not s.parameters else s.zeros / s.parameters
            macs = None if s.macs is None else s.macs / 1e6
            size = None if s.file_bytes is None else s.file_bytes / 1e3
            values = (s.accuracy, s.parameters, share, macs, size, s.latency_ms, s.max_difference)
            cells = ["" if v is None else text.format(v) for v, text in zip(values, formats, strict=True)]
            rows.add_row(s.variant, s.stage, *cells, end_section=s.stage == "onnx")
        for name, counts in self.layers.items():
            found = (counts.get(key) for key in (*(v.name for v in VARIANTS), "size"))
            layers.add_row(name, *("" if count is None else f"{count:,}" for count in found))
        console.print(rows, "", layers, "", sep="\n")
        for variant, left in self.ratios.items():
            text = ", ".join(f"{value:.2f} of the {what}" for what, value in left.items())
            console.print(f"{variant}, against dense: {text}.", highlight=False, soft_wrap=True)
        for line in (*self.notes, f"The files are in {self.output}. This took {self.seconds:.0f} s."):
            console.print(line, highlight=False, markup=False, soft_wrap=True)


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
    try:  # before the training, not after it
        output.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=output).close()
    except OSError as error:
        raise ExportError(f"the output folder '{output}' cannot be written: {error}. Choose another one.") from error
    result, began, threads = Result(seed, epochs, str(output)), time.perf_counter(), torch.get_num_threads()
    train, test = _digits(seed)
    try:
        torch.set_num_threads(1)  # more do not help a network of this size, and hurt on a busy machine
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            start = DigitNet()
            for variant in VARIANTS:
                torch.manual_seed(seed)
                _run(variant, copy.deepcopy(start), train, test, result, step)
            _compare_costs(result, test[0][:BATCH], step)
    finally:
        torch.set_num_threads(threads)
    _judge_accuracy(result)
    result.seconds = time.perf_counter() - began
    with atomic(output / "report.json") as name:
        name.write_text(json.dumps(result.to_dict(), indent=2) + "\n")
    return result


def _digits(seed: int) -> list[tuple[Tensor, Tensor]]:
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise FxpruneError("the demo's data come with scikit-learn: pip install 'fxprune[demo]'") from error
    images, labels = load_digits(return_X_y=True)
    x, x_test, y, y_test = train_test_split(images, labels, test_size=1 / 3, stratify=labels, random_state=seed)
    return [(torch.tensor(a).float().reshape(-1, 1, 8, 8) / 16, torch.tensor(b)) for a, b in ((x, y), (x_test, y_test))]


def _run(
    variant: Variant, model: nn.Module, train: tuple[Tensor, ...], test: tuple[Tensor, ...], result: Result, step: Step
) -> None:
    name, (images, labels) = variant.name, test
    traced = fxprune.trace(model, (images[:BATCH],))
    variant.prepare(traced)
    _train(traced, train, variant, result, step)
    step(f"{name}: deploy", 0, 1)
    final = fxprune.finalize(traced.eval())
    stages: dict[str, nn.Module | Path] = {"eager": _twin(traced, model).eval(), "traced": traced, "finalized": final}
    path = Path(result.output, f"{name}.onnx")
    try:
        fxprune.export.to_onnx(final, path)
        stages["onnx"] = path
    except FxpruneError as error:
        result.failures.append(f"export: {name}: {error}")
    zeros = {key: int((p == 0).sum()) for key, p in final.named_parameters()}
    for key, parameter in final.named_parameters():
        if parameter.dim() > 1:
            result.layers.setdefault(key, {"size": parameter.numel()})[name] = zeros[key]
    eager, *others = stages.values()
    # one call with one output: a row for each candidate, in order
    compared = fxprune.compare(eager, *others, inputs=(images,)).rows
    for (stage, item), row in zip(stages.items(), (None, *compared), strict=True):
        found = Stage(name, stage, _accuracy(item, images, labels), max_difference=row.max_abs if row else None)
        if isinstance(item, Path):
            found.file_bytes = item.stat().st_size
        else:
            found.parameters = sum(p.numel() for p in item.parameters())
            found.zeros = sum(zeros.values()) if item is final else None
            if final.plan is not None and stage in ("eager", "finalized"):
                found.macs = final.plan.macs[stage == "finalized"]
        result.stages.append(found)
        # onnxruntime and a smaller network sum in another order; elsewhere the bits are the same
        rounds = stage == "onnx" or (stage == "finalized" and final.plan is not None and bool(final.plan.removed))
        if row and not (row.ok and (rounds or row.max_abs == 0)):
            result.failures.append(f"equality: {name}: {stage} differs from eager by {row.max_abs} {row.note}".rstrip())
    step(f"{name}: deploy", 1, 1)


def _train(
    module: fxprune.TracedModule, data: tuple[Tensor, ...], variant: Variant, result: Result, step: Step
) -> None:
    images, labels = data
    generator = torch.Generator().manual_seed(result.seed)
    batches, (start, stop) = len(images) // BATCH, (max(int(share * result.epochs) - 1, 0) for share in PRUNING)
    pruning = variant.schedule(module, start=start, stop=stop) if variant.schedule else None
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=result.epochs * batches, pct_start=0.2)
    module.train()
    with fxprune.clip_gradients(optimizer, max_norm=1.0):
        for epoch in range(1, result.epochs + 1):
            for batch in torch.randperm(len(images), generator=generator)[: batches * BATCH].split(BATCH):
                optimizer.zero_grad()
                functional.cross_entropy(module(images[batch]), labels[batch]).backward()
                optimizer.step()
                rates.step()
            if pruning:
                pruning.step()
            step(f"{variant.name}: train", epoch, result.epochs)
    module.eval()


def _twin(traced: fxprune.TracedModule, model: nn.Module) -> nn.Module:
    """The eager model with torch's own hooks and parametrizations in place of the graph's nodes, and their state."""
    twin, state = copy.deepcopy(model), traced.state_dict()
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


def _accuracy(item: nn.Module | Path, images: Tensor, labels: Tensor) -> float:
    if isinstance(item, Path):
        (logits,) = fxprune.export.Session(item).run((images,), {}).values()
    else:
        with torch.no_grad():
            logits = item(images)
    return (logits.argmax(1) == labels).double().mean().item()


def _compare_costs(result: Result, batch: Tensor, step: Step) -> None:
    files = {Path(result.output, f"{s.variant}.onnx"): s for s in result.stages if s.stage == "onnx"}
    step("latency", 0, 1)
    measured = fxprune.export.bench(list(files), inputs=(batch,), rounds=ROUNDS) if files else []
    for stage, latency in zip(files.values(), measured, strict=True):
        stage.latency_ms = latency.median
    step("latency", 1, 1)
    found = {(s.variant, s.stage, what): value for s in result.stages for what, value in asdict(s).items() if value}
    for variant in VARIANTS[1:]:
        result.ratios[variant.name] = {
            what: found[variant.name, *cost] / found["dense", *cost]
            for what, cost in COSTS.items()
            if {(variant.name, *cost), ("dense", *cost)} <= found.keys()
        }


def _judge_accuracy(result: Result) -> None:
    dense = result.stages[0].accuracy
    if dense < FLOOR:
        result.failures.append(f"accuracy: dense has {dense:.2%}, below {FLOOR:.0%}: train for more epochs")
    for name in dict.fromkeys(s.variant for s in result.stages if s.variant != "dense"):
        worst = min((s for s in result.stages if s.variant == name), key=lambda s: s.accuracy)
        if worst.accuracy < dense - POINT:
            found = f"{worst.accuracy:.2%} ({worst.stage}), more than a point below the dense {dense:.2%}"
            result.failures.append(f"accuracy: {name} has {found}")


@contextlib.contextmanager
def progress(console: Console, quiet: bool) -> Iterator[Step]:
    """A `step` for `run` that shows bars on a terminal, plain lines elsewhere, and nothing if `quiet`."""
    tasks: dict[str, TaskID] = {}
    with Progress(console=console, disable=quiet or not console.is_terminal) as bars:

        def step(text: str, done: int, total: int) -> None:
            if text not in tasks:
                tasks[text] = bars.add_task(text, total=total)
            bars.update(tasks[text], completed=done)
            if bars.disable and not quiet and (done == total or done % -(-total // 4) == 0 < done):
                console.print(f"{text} {done}/{total}", highlight=False)

        yield step
