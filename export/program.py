"""Writing a traced module as a file of `torch.export` or TorchScript, verified before it gets its name."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import fx
from torch.export import ExportedProgram

from fxprune.errors import ExportError
from fxprune.files import atomic
from fxprune.graph.traced import TracedModule

from .comparison import Call, ModuleRunner, ProgramRunner
from .source import FileReport, check_source, flat, metadata, resized, size_of, translating, verifying


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

    def save(name: Path, module: fx.GraphModule, program: ExportedProgram) -> None:
        for node in program.graph.nodes:
            node.meta.pop("stack_trace", None)  # absolute paths of this machine's sources
        torch.export.save(program, name, extra_files={"fxprune.json": json.dumps(metadata(final))})

    return _write(final, path, ".pt2", save, structured=True)


def to_torchscript(final: TracedModule, path: str | os.PathLike[str]) -> FileReport:
    """Write the eval graph as TorchScript, frozen and with its batch norms folded, for `torch.jit.load`.

    The program takes the tensor inputs in the order of the capture, nested ones flattened, and returns one tensor or
    a tuple of all output tensors. It is verified as `to_program` does. torch has deprecated TorchScript; it still runs.
    `torch.jit.optimize_for_inference` is for the reader to call: what it makes of a program, in layouts of the machine
    it runs on, torch cannot store.

    Args:
        final: a traced module with an eval graph, finalized or not. path: the file to write, `.pt`.

    Raises:
        ExportError: torch cannot script the graph, the path cannot be written, or the file computes something else.
        ArgumentTypeError: `final` is no traced module.

    Example:
        >>> fxprune.export.to_torchscript(final, "model.pt").comparison.ok
        True
    """

    def save(name: Path, module: fx.GraphModule, program: ExportedProgram) -> None:
        graph = module.graph
        leaves = torch.utils._pytree.tree_leaves((final.example_args, final.example_kwargs))
        inputs = dict(zip(graph.find_nodes(op="placeholder"), leaves, strict=True))
        for node, leaf in inputs.items():
            if not isinstance(leaf, torch.Tensor):
                graph.erase_node(node)
        (result,) = graph.output_node().args
        assert isinstance(result, tuple)
        graph.output_node().args = (result[0] if len(result) == 1 else result,)
        graph.set_codegen(fx.graph.CodeGen())
        for node in graph.nodes:
            if node.target is torch.ops.aten.sym_size.int:
                node.target = torch.ops.aten.size
            elif isinstance(node.target, torch._ops.OpOverload):
                node.target = node.target.overloadpacket  # TorchScript chooses the overload by the arguments
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="`torch.jit", category=DeprecationWarning)
            warnings.filterwarnings("ignore", message="The TorchScript type system doesn't support instance-level")
            scripted = torch.jit.script(fx.GraphModule(module, graph).eval())
            torch.jit.freeze(scripted).save(os.fspath(name))

    return _write(final, path, ".pt", save, structured=False)


def _write(
    final: TracedModule,
    path: str | os.PathLike[str],
    suffix: str,
    save: Callable[[Path, fx.GraphModule, ExportedProgram], None],
    *,
    structured: bool,
) -> FileReport:
    """Let `save` write a file of the flat module or its program, and verify the file."""
    check_source(final, "to_program" if structured else "to_torchscript")
    if Path(path).suffix != suffix:
        raise ExportError(
            f"'{path}' was to be written; the name must end in {suffix}, by which readers know the format."
        )
    module, *_ = flat(final, structured)
    sample = Call(final.example_args, final.example_kwargs)
    with atomic(path) as name:
        with translating(f"write the model as {suffix}"):
            program = torch.export.export(module, *sample, dynamic_shapes=final.dynamic_shapes, strict=False)
            save(name, module, program)
        with verifying(name, path) as check:
            calls = [sample, *resized(program, sample, final)]
            comparison = check([ModuleRunner(final, "eval"), ProgramRunner(name)], calls, None, None)
        return FileReport(Path(path), size_of(name), comparison)
