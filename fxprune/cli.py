"""The command line: every command reads its arguments, calls the library, and prints."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

import fxprune
from fxprune import demo as demo_

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


def _version(asked: bool) -> None:
    if asked:
        print(fxprune.__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    """A compiler for pruned PyTorch models."""


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Folder for the ONNX files and report.json.")] = Path("fxprune-demo"),
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of data split, weights and batches.")] = 0,
    epochs: Annotated[int, typer.Option(min=1, help="For each network; few leave accuracy behind.")] = demo_.EPOCHS,
    quiet: Annotated[bool, typer.Option("--quiet", help="Show no progress.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON, all else to stderr.")] = False,
) -> None:
    """Train, prune, finalize, export and compare a residual network on scikit-learn's digits.

    Exits with 1 when accuracy, equality or export fail.
    """
    errors = Console(stderr=True)
    with demo_.progress(errors, quiet) as step:
        result = demo_.run(output, seed=seed, epochs=epochs, step=step)
    if as_json:
        print(json.dumps(result.to_dict(), indent=2))
    else:
        result.show(Console())
    for failure in result.failures:
        _complain(f"failed: {failure}")
    raise typer.Exit(bool(result.failures))


def _complain(text: str) -> None:
    print(f"fxprune: {text}", file=sys.stderr)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; exits with 0, with 1 on a failure, with 2 on wrong usage."""
    try:
        app(arguments)
    except fxprune.FxpruneError as error:
        _complain(str(error))
        sys.exit(1)


if __name__ == "__main__":
    main()
