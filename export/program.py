"""Writing a traced module as a .pt2 file of `torch.export`, verified before it gets its name."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import fx
from torch.export import ExportedProgram

from fxprune.errors import CompareError, ExportError
from fxprune.files import atomic
from fxprune.traced import TracedModule

from .compare import Call, ModuleRunner, ProgramRunner, judge
from .metadata import metadata
from .source import FileReport, causes, check_source, flat, keep_aside, quiet, resized


def to_program(final: TracedModule, path: str | os.PathLike[str]) -> FileReport:
    """Write the eval graph as a `torch.export` program, which `torch.export.load` reads without the model's code.

    Free axes stay free; the state dict's keys are those of `final`, but for an underscore at Python's keywords; outputs
    in classes of the model's own come as dicts. The file is loaded, run on the sample inputs and at other sizes, and
    compared with `final`; only then it is renamed to `path`. `fxprune.json` inside has what `to_onnx` puts into the
    metadata.

    Args:
        final: a traced module with an eval graph, finalized or not. path: the file to write, `.pt2`.

    Raises:
        ExportError: torch cannot store the graph, the path cannot be written, or the file computes something else.
        ArgumentTypeError: `final` is no traced module.

    Example:
        >>> fxprune.export.to_program(final, "model.pt2").comparison.ok
        True
    """
    check_source(final, "to_program")

    def save(name: Path, module: fx.GraphModule, program: ExportedProgram) -> None:
        for node in program.graph.nodes:
            node.meta.pop("stack_trace", None)  # absolute paths of this machine's sources
        torch.export.save(program, name, extra_files={"fxprune.json": json.dumps(metadata(final))})

    return write(final, path, ".pt2", save, structured=True)


def write(
    final: TracedModule,
    path: str | os.PathLike[str],
    suffix: str,
    save: Callable[[Path, fx.GraphModule, ExportedProgram], None],
    *,
    structured: bool,
) -> FileReport:
    """Let `save` write a file of the flat module or its program, and verify the file."""
    if Path(path).suffix != suffix:
        raise ExportError(
            f"'{path}' was to be written; the name must end in {suffix}, by which readers know the format."
        )
    module, *_ = flat(final, structured)
    sample = Call(final.example_args, final.example_kwargs)
    with atomic(path) as name:
        try:
            with quiet(), fx.traceback.preserve_node_meta():
                program = torch.export.export(module, *sample, dynamic_shapes=final.dynamic_shapes, strict=False)
                save(name, module, program)
        except OSError:
            raise
        except Exception as error:  # whatever torch raises
            raise ExportError(f"torch cannot write the model as {suffix}: {causes(error)}") from error
        try:
            calls = [sample, *resized(program, sample, final)]
            comparison = judge([ModuleRunner(final, "eval"), ProgramRunner(name)], calls, None, None)
        except CompareError as error:
            raise ExportError(f"the exported file cannot be used: {error}".replace(str(name), str(path))) from error
        if not comparison.ok:
            raise ExportError(
                f"the exported file computes something else than its source; kept as "
                f"'{keep_aside(name, Path(path))}'.\n{comparison.table()}"
            )
        size = name.stat().st_size
    return FileReport(Path(path), size, comparison)
