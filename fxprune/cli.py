"""The command line: every command reads its arguments, calls the library, and prints."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from torch import nn

import fxprune
from fxprune import demo as demo_
from fxprune import progress
from fxprune.commands import pruning
from fxprune.errors import ArgumentError
from fxprune.files import check_suffix
from fxprune.recipes import sources
from fxprune.recipes.inputs import call_of_texts

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)
app.add_typer(pruning.app)


def _version(asked: bool) -> None:
    if asked:
        print(fxprune.__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
    traceback: Annotated[bool, typer.Option("--traceback", help="Show where an error was raised.")] = False,
) -> None:
    """A compiler for pruned PyTorch models."""


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Folder for the ONNX files and report.json.")] = Path("fxprune-demo"),
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of data split, weights and batches.")] = 0,
    epochs: Annotated[int, typer.Option(min=1, help="For each network; few leave accuracy behind.")] = demo_.EPOCHS,
    quiet: _Quiet = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON, all else to stderr.")] = False,
) -> None:
    """Train, prune, finalize, export and compare a residual network on scikit-learn's digits.

    Exits with 1 when accuracy, equality or export fail.

    Example: fxprune demo --output fxprune-demo
    """
    errors = Console(stderr=True)
    with demo_.progress(errors, quiet) as step:
        result = demo_.run(output, seed=seed, epochs=epochs, step=step)
    if as_json:
        _print_json(result.to_dict())
    else:
        result.show(Console())
    for failure in result.failures:
        _complain(f"failed: {failure}")
    raise typer.Exit(bool(result.failures))


_Inputs = Annotated[
    list[str],
    typer.Option(
        help="A shape, as in 2x3x32x32, x=2x3x32x32 or ids=2x16:int64 (normal numbers, ones for integers), or a file "
        "of tensors by name, .npz or .safetensors. Repeat it for several inputs."
    ),
]
_Quiet = Annotated[bool, typer.Option("--quiet", help="Show no progress.")]
_Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
_Model = Annotated[str, typer.Argument(help="package.module:factory, or a file: .onnx, .pt2, .pt.")]


@app.command()
def compare(
    reference: _Model,
    candidates: Annotated[list[str], typer.Argument(help="One or more of the same.")],
    inputs: _Inputs,
    rtol: Annotated[float | None, typer.Option(help="Relative to an output's largest value.")] = None,
    atol: Annotated[float | None, typer.Option()] = None,
    reproduce: Annotated[Path | None, typer.Option(help="Write a script that shows the first difference.")] = None,
    quiet: _Quiet = False,
    as_json: _Json = False,
) -> None:
    """Run models and files on the same inputs and compare all outputs. Exits with 1 when they differ.

    Example: fxprune compare nets:trained small.onnx --inputs 2x1x8x8
    """
    items = [_model_or_file(name) for name in (reference, *candidates)]
    with progress.quiet(quiet):
        report = fxprune.compare(*items, inputs=call_of_texts(inputs), rtol=rtol, atol=atol)
    if as_json:
        _print_json(report.to_dict())
    else:
        print(report.table())
    if reproduce and not report.ok:
        report.reproduce(reproduce)
    raise typer.Exit(not report.ok)


@app.command()
def export(
    model: Annotated[str, typer.Argument(help="package.module:factory, a function that returns a module.")],
    output: Annotated[Path, typer.Argument(help="The file to write: .onnx, .pt2 or .pt.")],
    inputs: _Inputs,
    precision: Annotated[str | None, typer.Option(help="float32, float16 or int8 (ONNX).")] = None,
    calibration: Annotated[list[str] | None, typer.Option(help="For int8: a file of one batch; repeat it.")] = None,
    sparse: Annotated[bool, typer.Option(help="Store masked weights sparse (ONNX).")] = False,
    opset: Annotated[int | None, typer.Option(help="ONNX operator set.")] = None,
    quiet: _Quiet = False,
    as_json: _Json = False,
) -> None:
    """Trace a model, finalize it, write it as a file, and verify the file.

    Example: fxprune export nets:trained dense.onnx --inputs 2x1x8x8
    """
    source = _model_or_file(model)
    if isinstance(source, Path):
        raise ArgumentError(f"'{model}' is a file; export takes package.module:factory.")
    writers: dict[str, Callable[..., fxprune.export.FileReport]] = {
        ".onnx": fxprune.export.to_onnx, ".pt2": fxprune.export.to_program, ".pt": fxprune.export.to_torchscript
    }  # fmt: skip
    check_suffix(output, *writers, what="written")
    options = _onnx_options(precision, calibration, sparse, opset)
    if options and output.suffix != ".onnx":
        raise ArgumentError(f"'{output}': precision, calibration, sparse and opset are for files that end in .onnx.")
    with progress.quiet(quiet):
        final = fxprune.finalize(fxprune.trace(source.eval(), call_of_texts(inputs), modes=("eval",)))
        report = writers[output.suffix](final, output, **options)
    assert report.comparison is not None
    if as_json:
        _print_json(report.to_dict())
    else:
        print(f"{output}: {report.size:,} bytes\n{report.comparison.table()}")


def _onnx_options(
    precision: str | None, calibration: list[str] | None, sparse: bool, opset: int | None
) -> dict[str, Any]:
    """The options that were given and ask for something else than the default."""
    options: dict[str, Any] = {}
    if precision not in (None, "", "float32"):
        options["precision"] = precision
    if calibration:
        options["calibration"] = [call_of_texts([batch]) for batch in calibration]
    if sparse:
        options["sparse"] = True
    if opset:
        options["opset"] = opset
    return options


@app.command()
def inspect(file: Annotated[Path, typer.Argument(help=".onnx or .pt2")], as_json: _Json = False) -> None:
    """Show a file's tensors and their zeros, its multiply-adds, operators and plan.

    Example: fxprune inspect small.onnx
    """
    contents = fxprune.export.inspect(file)
    if as_json:
        _print_json(contents.to_dict())
    else:
        print(contents.table())


@app.command()
def bench(
    files: Annotated[list[Path], typer.Argument(help=".onnx files; ratios are to the first.")],
    inputs: Annotated[list[str] | None, _Inputs.__metadata__[0]] = None,
    batch: Annotated[int, typer.Option(help="Of random inputs.")] = 1,
    threads: Annotated[int, typer.Option(help="Within operators.")] = 1,
    provider: Annotated[str, typer.Option(help="onnxruntime's execution provider.")] = "CPUExecutionProvider",
    rounds: Annotated[int, typer.Option(help="Runs of each file that count.")] = 50,
    quiet: _Quiet = False,
    as_json: _Json = False,
) -> None:
    """Measure the latency of ONNX files in onnxruntime, in turns.

    Example: fxprune bench dense.onnx small.onnx
    """
    with progress.quiet(quiet):
        latencies = fxprune.export.bench(
            files,
            inputs=call_of_texts(inputs) if inputs else None,
            batch=batch,
            threads=threads,
            providers=[provider],
            rounds=rounds,
        )
    if as_json:
        options = {"batch": batch, "threads": threads, "provider": provider}
        # `median` and `quartiles` are keys of earlier versions
        _print_json(options | {"files": [asdict(latency) | latency.to_dict() for latency in latencies]})
    else:
        print(latencies.table())


def _model_or_file(name: str) -> nn.Module | Path:
    """The model that package.module:factory returns, or the path of a file."""
    return sources.model(name) if ":" in name and not Path(name).exists() else Path(name)


def _print_json(value: dict[str, Any]) -> None:
    print(json.dumps(value, indent=2))


def _complain(message: str) -> None:
    print(f"fxprune: {message}", file=sys.stderr)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; exits with 0, with 1 on a failure, with 2 on wrong usage."""
    try:
        app(arguments)
    except fxprune.FxpruneError as error:
        if "--traceback" in (sys.argv if arguments is None else arguments):
            raise
        _complain(str(error))
        sys.exit(1)


if __name__ == "__main__":
    main()
