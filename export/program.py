"""Writing a traced module as a file of `torch.export` or TorchScript, verified before it gets its name."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx
from torch.export import ExportedProgram

from fxprune.calling import named_arguments
from fxprune.capture.asserted_sizes import as_asserted
from fxprune.capture.caches import is_cache
from fxprune.files import atomic, check_suffix
from fxprune.graph.calls import Call
from fxprune.graph.spread_modules import written_by_first
from fxprune.graph.traced import TracedModule
from fxprune.progress import shown
from fxprune.torch_internals import OpOverload

from .flattening import check_source, flatten
from .metadata import metadata
from .runners import ModuleRunner, ProgramRunner
from .translation import translating
from .verification import Draft, FileReport, Proof, other_sizes, verified


@named_arguments
@written_by_first
@shown("write program")
def to_program(
    final: TracedModule,
    path: str | os.PathLike[str],
    *,
    verify: bool = True,
    inputs: Any = None,
    rtol: float | None = None,
    atol: float | None = None,
) -> FileReport:
    """Write the eval graph as a `torch.export` program, which `torch.export.load` reads without the model's code.

    Free axes stay free; the state dict's keys are those of `final`, but for an underscore at Python's keywords; outputs
    in classes of the model's own come as dicts. Caches of transformers are inputs still, for readers that have imported
    it; sample inputs are left out then. The file is loaded, run on the sample inputs and at other sizes, and compared
    with `final`; only then it is renamed to `path`. `fxprune.json` inside has what `to_onnx` puts into the metadata.

    Args:
        final: a traced module with an eval graph, finalized or not. path: the file to write, `.pt2`.
        verify: False skips the run. inputs: more inputs to verify on, in the forms that `compare` takes; None: none.
        rtol, atol: as for `compare`.

    Raises:
        ExportError: torch cannot store the graph, the path cannot be written, or the file computes something else.
        SuffixError: the path ends otherwise. ArgumentTypeError: `final` is no traced module.

    Example:
        >>> fxprune.export.to_program(final, "model.pt2").comparison.ok
        True
    """
    check_source(final, "to_program")
    check_suffix(path, ".pt2", what="written by to_program")
    proof = Proof.of(verify, inputs, rtol, atol)
    module = flatten(final, structured=True).module
    with atomic(path) as file:
        draft = Draft(file, path)
        with translating("write the model as .pt2"):
            program = _exported(module, final)
            for node in program.graph.nodes:
                node.meta.pop("stack_trace", None)  # absolute paths of this machine's sources
            if any(map(is_cache, pytree.tree_leaves(program.example_inputs, is_leaf=is_cache))):
                program.example_inputs = None  # torch would pickle the caches among them
            with as_asserted(program):
                torch.export.save(program, file, extra_files={"fxprune.json": json.dumps(metadata(final))})
        return _reported(draft, final, program, proof)


@named_arguments
@written_by_first
@shown("write TorchScript")
def to_torchscript(
    final: TracedModule,
    path: str | os.PathLike[str],
    *,
    verify: bool = True,
    inputs: Any = None,
    rtol: float | None = None,
    atol: float | None = None,
) -> FileReport:
    """Write the eval graph as TorchScript, frozen and with its batch norms folded, for `torch.jit.load`.

    The program takes the tensor inputs in the order of the capture, nested ones flattened, and returns one tensor or
    a tuple of all output tensors. It is verified as `to_program` does. torch has deprecated TorchScript; it still runs.
    `torch.jit.optimize_for_inference` is for the reader to call: what it makes of a program, in layouts of the machine
    it runs on, torch cannot store.

    Args:
        final: a traced module with an eval graph, finalized or not. path: the file to write, `.pt`.
        verify: False skips the run. inputs: more inputs to verify on, in the forms that `compare` takes; None: none.
        rtol, atol: as for `compare`.

    Raises:
        ExportError: torch cannot script the graph, the path cannot be written, or the file computes something else.
        SuffixError: the path ends otherwise. ArgumentTypeError: `final` is no traced module.

    Example:
        >>> fxprune.export.to_torchscript(final, "model.pt").comparison.ok
        True
    """
    check_source(final, "to_torchscript")
    check_suffix(path, ".pt", what="written by to_torchscript")
    proof = Proof.of(verify, inputs, rtol, atol)
    module = flatten(final).module
    with atomic(path) as file:
        draft = Draft(file, path)
        with translating("write the model as .pt"):
            program = _exported(module, final)
            _frozen_script(_scriptable(module, final)).save(os.fspath(file))
        return _reported(draft, final, program, proof)


def _exported(module: fx.GraphModule, final: TracedModule) -> ExportedProgram:
    sample = final.example_args, final.example_kwargs
    return torch.export.export(module, *sample, dynamic_shapes=final.dynamic_shapes, strict=False)


def _scriptable(module: fx.GraphModule, final: TracedModule) -> fx.GraphModule:
    """The module over its tensor inputs alone, in operators that TorchScript has."""
    graph = module.graph
    leaves = pytree.tree_leaves((final.example_args, final.example_kwargs))
    for node, leaf in zip(graph.find_nodes(op="placeholder"), leaves, strict=True):
        if not isinstance(leaf, torch.Tensor):
            graph.erase_node(node)
    (outputs,) = graph.output_node().args
    assert isinstance(outputs, tuple)
    graph.output_node().args = (outputs[0] if len(outputs) == 1 else outputs,)
    graph.set_codegen(fx.graph.CodeGen())
    for node in graph.nodes:
        if node.target is torch.ops.aten.sym_size.int:
            node.target = torch.ops.aten.size
        elif isinstance(node.target, OpOverload):
            node.target = node.target.overloadpacket  # TorchScript chooses the overload by the arguments
    return fx.GraphModule(module, graph).eval()


def _frozen_script(module: fx.GraphModule) -> torch.jit.ScriptModule:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`torch.jit", category=DeprecationWarning)
        warnings.filterwarnings("ignore", message="The TorchScript type system doesn't support instance-level")
        script: torch.jit.ScriptModule = torch.jit.freeze(torch.jit.script(module))
    return script


def _reported(draft: Draft, final: TracedModule, program: ExportedProgram, proof: Proof) -> FileReport:
    """What was written, verified as was asked for."""
    if not proof.is_wanted:
        return FileReport(Path(draft.target), draft.size, None, ())
    sample = Call(final.example_args, final.example_kwargs)
    with draft.usable():
        others = other_sizes(program, sample, final)
        calls = [sample, *others.calls, *proof.calls]
        comparison = verified(draft, ModuleRunner(final, "eval"), ProgramRunner(draft.file), calls, proof.tolerance)
    return FileReport(Path(draft.target), draft.size, comparison, tuple(others.notes))
