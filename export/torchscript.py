"""Writing a traced module as a TorchScript file, verified before it gets its name."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import torch
from torch import fx
from torch.export import ExportedProgram

from fxprune.traced import TracedModule

from .program import write
from .source import FileReport, check_source


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
    check_source(final, "to_torchscript")

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

    return write(final, path, ".pt", save, structured=False)
