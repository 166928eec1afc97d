"""`fxprune prune`, `run`, `sensitivity`, `groups`, `finalize` and `load`: from a model's name to its files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from fxprune import driver, export, progress, recipes
from fxprune.checkpoints.checkpoint import load as load_
from fxprune.checkpoints.checkpoint import save
from fxprune.errors import ArgumentError
from fxprune.progress_bars import Bars
from fxprune.prune.sensitivity import sensitivity as measured
from fxprune.recipes import sources
from fxprune.recipes.recipe import Recipe
from fxprune.recipes.work import Work
from fxprune.reports import Readable, columns

app = typer.Typer()
UNREACHED = 2  # exit code where a budget cannot be reached

Source = Annotated[str, typer.Argument(metavar="MODEL", help=f"{sources.KINDS}.")]
Weights = Annotated[Path | None, typer.Option(help="A .safetensors file that is loaded into the model.")]
_TRACED_WITH = (
    "What the model is traced with: a shape, as in 2x3x32x32, x=2x3x32x32 or ids=2x16:int64, or a file; repeat it."
)
Inputs = Annotated[list[str] | None, typer.Option(help=f"{_TRACED_WITH} Else the first samples of the data.")]
DataSource = Annotated[
    str | None,
    typer.Option(
        help="Samples without labels: a folder of images, .npz, .safetensors, .txt, or package.module:function."
    ),
]
Count = Annotated[int, typer.Option(min=2, help="How many of them are taken.")]
Batch = Annotated[int, typer.Option(min=1, help="Samples in a batch.")]
Shape = Annotated[str | None, typer.Option(help="Of images: channels, height, width, as in 3x224x224.")]
Mean = Annotated[list[float] | None, typer.Option(help="Taken from images, of values 0 to 1; repeat it for channels.")]
Std = Annotated[list[float] | None, typer.Option(help="Images are divided by it; repeat it for channels.")]
Tokenizer = Annotated[str | None, typer.Option(help="Folder of a tokenizer, for text; else the model's.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Show no progress.")]
Out = Annotated[Path, typer.Option(help="Folder for the files, empty or new.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the files of an earlier run.")]


@app.command()
def prune(
    model: Source,
    macs: Annotated[float | None, typer.Option(help="Share of the multiply-accumulates that stays.")] = None,
    parameters: Annotated[float | None, typer.Option(help="Share of the parameters that stays.")] = None,
    speedup: Annotated[float | None, typer.Option(help="How many times faster in onnxruntime.")] = None,
    amount: Annotated[float | None, typer.Option(help="Share of the channels that goes.")] = None,
    importance: Annotated[str | None, typer.Option(help="obs (with data), l2, l1, taylor, ...")] = None,
    distance: Annotated[str, typer.Option(help="How obs compares outputs: divergence, error, cosine.")] = "auto",
    repair: Annotated[bool | None, typer.Option(help="Refit what is left; with data it is the default.")] = None,
    runnable: Annotated[bool, typer.Option("--runnable", help="Leave what the model's own class can have.")] = False,
    ignore: Annotated[list[str] | None, typer.Option(help="Weights whose groups stay, as in 'head.*'.")] = None,
    max_per_group: Annotated[float | None, typer.Option(help="Largest share of a group that goes.")] = None,
    compact_masks: Annotated[
        bool | None,
        typer.Option(
            "--compact-masks/--no-compact-masks", help="Hold masks as vectors; the default, as nothing is trained."
        ),
    ] = None,
    data: DataSource = None,
    samples: Count = 512,
    batch: Batch = 32,
    shape: Shape = None,
    mean: Mean = None,
    std: Std = None,
    tokenizer: Tokenizer = None,
    score: Annotated[str | None, typer.Option(help="package.module:function of a module; returns a number.")] = None,
    weights: Weights = None,
    inputs: Inputs = None,
    out: Out = Path("fxprune-out"),
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of everything random.")] = 0,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Prune a model to a budget, and write what is left: a checkpoint, an ONNX file, its own class, a report.

    Exits with 2 where the budget cannot be reached; the report says what can.

    Example: fxprune prune nets:trained --data digits.npz --macs 0.5 --out small
    """
    tables = {
        "seed": seed,
        "model": _given(source=model, weights=weights and str(weights), inputs=inputs),
        "data": _data(data, samples, batch, shape, mean, std, tokenizer),
        "choose": _given(
            amount=amount, macs=macs, parameters=parameters, speedup=speedup, distance=distance, ignore=ignore,
            importance=importance or ("l2" if data is None else "obs"), runnable=runnable,
            max_per_group=max_per_group, compact_masks=compact_masks,
        ),
        "repair": {"enabled": data is not None if repair is None else repair},
        "compare": _given(score=score),
    }  # fmt: skip
    _carry_out(recipes.parsed(_given(**tables), "the command"), out, overwrite, quiet, as_json)


@app.command()
def run(
    recipe: Annotated[Path, typer.Argument(help="A TOML file; `fxprune schema` describes it.")],
    out: Out = Path("fxprune-out"),
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Carry out a recipe; one that was stopped goes on from its last finished stage.

    Exits with 2 where the budget cannot be reached.

    Example: fxprune run recipe.toml --out small
    """
    _carry_out(recipes.read(recipe), out, overwrite, quiet, as_json)


@app.command()
def schema() -> None:
    """Print the JSON schema of recipes, for editors.

    Example: fxprune schema
    """
    print(json.dumps(recipes.schema(), indent=2))


@app.command()
def sensitivity(
    model: Source,
    data: Annotated[str, typer.Option(help="Samples without labels, as for `prune`.")],
    distance: Annotated[str, typer.Option(help="How outputs are compared: divergence, error, cosine.")] = "auto",
    samples: Count = 512,
    batch: Batch = 32,
    shape: Shape = None,
    mean: Mean = None,
    std: Std = None,
    tokenizer: Tokenizer = None,
    weights: Weights = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Measure what the output loses with the channels of each group.

    Example: fxprune sensitivity nets:trained --data digits.npz
    """
    work = _work(model, weights, None, _data(data, samples, batch, shape, mean, std, tokenizer))
    with progress.quiet(quiet):
        found = measured(work.capture(), work.samples.batches, distance=distance, weight=work.samples.weight)
    _print(found, as_json)


@app.command()
def groups(
    model: Source,
    inputs: Annotated[list[str] | None, typer.Option(help=_TRACED_WITH)] = None,
    weights: Weights = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Show which channels stand or fall together, what they cost, and which must stay.

    Example: fxprune groups timm:resnet18 --inputs 2x3x224x224
    """
    if not inputs and Path(model).suffix not in (".fxp", ".pt2"):
        raise ArgumentError("the model is traced with samples: give --inputs, as in --inputs 2x3x32x32.")
    with progress.quiet(quiet):
        found = driver.channel_groups(_work(model, weights, inputs, None).capture())
    _print(found, as_json)


@app.command()
def finalize(
    file: Annotated[Path, typer.Argument(help="A masked module, as fxprune.save wrote it.")],
    output: Annotated[Path, typer.Argument(help="The file to write: .fxp, or .onnx.")],
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Take masked channels out of a saved module.

    Example: fxprune finalize masked.fxp small.onnx
    """
    with progress.quiet(quiet):
        final = driver.finalize(load_(file))
        if output.suffix == ".onnx":
            export.to_onnx(final, output)
        else:
            save(final, output)
    assert final.plan is not None
    if as_json:
        print(final.plan.to_json())
    else:
        print(final.plan.explain(), end="")


@app.command()
def load(
    file: Annotated[Path, typer.Argument(help="As fxprune.save wrote it, or .pt2.")], as_json: AsJson = False
) -> None:
    """Read a saved module, which checks it, and show its tensors.

    Example: fxprune load small.fxp
    """
    module = load_(file)
    shapes = {name: list(tensor.shape) for name, tensor in module.state_dict().items()}
    if as_json:
        print(json.dumps({"modes": sorted(module.graphs), "tensors": shapes}, indent=2))
        return
    rows = [("tensor", "shape"), *((name, "x".join(map(str, shape)) or "scalar") for name, shape in shapes.items())]
    print(f"{', '.join(sorted(module.graphs))}\n\n{columns(rows)}")


def _carry_out(recipe: Recipe, out: Path, overwrite: bool, quiet: bool, as_json: bool) -> None:
    console = Console(stderr=True)
    with progress.quiet(quiet), progress.bars(console) as bars:
        outcome = recipes.run(recipe, out, step=None if quiet else _stage_lines(console, bars), overwrite=overwrite)
    _print(outcome, as_json)
    raise typer.Exit(UNREACHED if outcome.failure else 0)


def _stage_lines(console: Console, bars: Bars | None) -> Callable[[str, int, int], None]:
    """A line for each stage as it begins, and on a terminal a bar of all below them."""
    task = None if bars is None else bars.add_task("stages")

    def step(name: str, place: int, count: int) -> None:
        console.print(f"{place + 1}/{count} {name}", highlight=False)
        if bars is not None and task is not None:
            bars.update(task, completed=place, total=count)

    return step


def _print(result: Readable, as_json: bool) -> None:
    print(json.dumps(result.to_dict(), indent=2) if as_json else result.table())


def _given(**values: Any) -> dict[str, Any]:
    """The values that were given."""
    return {name: value for name, value in values.items() if value is not None}


def _data(
    source: str | None, samples: int, batch: int, shape: str | None, mean: Any, std: Any, tokenizer: str | None
) -> dict[str, Any] | None:
    if source is None:
        unused = _given(shape=shape, mean=mean or None, std=std or None, tokenizer=tokenizer)
        if unused:
            raise ArgumentError(
                f"--{', --'.join(unused)} say how samples are prepared, and there are none: give --data."
            )
        return None
    sizes = None
    if shape is not None:
        try:
            sizes = [int(size) for size in shape.split("x")]
        except ValueError as error:
            raise ArgumentError(f"--shape {shape}: channels, height and width are needed, as in 3x224x224.") from error
    return _given(source=source, samples=samples, batch=batch, shape=sizes, mean=mean, std=std, tokenizer=tokenizer)


def _work(model: str, weights: Path | None, inputs: list[str] | None, data: dict[str, Any] | None) -> Work:
    """What is needed to trace a model, without a budget."""
    tables = {
        "model": _given(source=model, weights=weights and str(weights), inputs=inputs),
        "data": data,
        "choose": {"amount": 0.5, "importance": "l2"},
        "repair": {"enabled": False},
    }
    return Work(recipes.parsed(_given(**tables), "the command"), Path())
