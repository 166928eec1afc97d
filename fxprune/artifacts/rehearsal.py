"""Running the copy and the finalized graph on the same inputs, and comparing their outputs."""

from __future__ import annotations

import copy
import os
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from fxprune.artifacts.working_copy import WorkingCopy
from fxprune.capture.cached_tensors import cached_tensors, dense_examples
from fxprune.channels.cached_heads import CHANNELS, HEADS
from fxprune.errors import WriteBackError
from fxprune.graph.arguments import Arguments, fixed_size
from fxprune.graph.equality import close, error
from fxprune.graph.interpretation import Watch, run
from fxprune.graph.kept_tensors import forget_kept_tensors
from fxprune.graph.names import tensor_at, tensors_of
from fxprune.graph.samples import stretched
from fxprune.graph.snapshot import preserved

_FOREIGN = tuple(str(Path(file).parent) + os.sep for file in (torch.__file__, __file__))  # code that is not the user's
_WIDE_TOLERANCE = 1e-5  # some code rounds to float32 in any case
Result = TypeVar("Result")


class Rehearsal:
    """Runs of a copy and of its finalized graph, in the model's own precision or, where it works, in float64.

    Rounding in float32 would hide a wrong attribute.
    """

    def __init__(self, copied: WorkingCopy) -> None:
        self.copy, self.graph = copied, copied.final.graphs["eval"]
        self.inputs: Arguments = (copied.final.example_args, copied.final.example_kwargs)
        self.dense_inputs: Arguments = dense_examples(copied.final, copied.plan)
        self._dtypes = {name: tensor.dtype for name, tensor in tensors_of(copied.root).items()}
        self._wide = False
        self._cached = {cached.returned for cached in cached_tensors(self.graph)}

    # ---- precision

    def in_best_precision(self, first_run: Callable[[], Result]) -> Result:
        """Go over to float64 where the model is in float32, and its graph and `first_run` work so."""
        if any(dtype == torch.float32 for dtype in self._dtypes.values()):
            self._wide = True
            self.convert_tensors()
            try:
                self.run_graph(self.inputs)
                return first_run()
            except (WriteBackError, RuntimeError):  # a dtype in the code or the graph, or not enough memory
                self.return_to_own_precision()
        return first_run()

    def return_to_own_precision(self) -> bool:
        """Leave float64; returns whether it was in use."""
        was_wide, self._wide = self._wide, False
        if was_wide:
            self.convert_tensors()
        return was_wide

    def convert_tensors(self) -> None:
        """Give the tensors of the copy that are float32 in the model the precision in use."""
        new = torch.float32 if torch.float32 in self._dtypes.values() else torch.float64  # of biases that are new
        for name, tensor in tensors_of(self.copy.root).items():
            if self._dtypes.get(name, new) == torch.float32:
                tensor.data = tensor.data.to(torch.float64 if self._wide else torch.float32)
        forget_kept_tensors(self.copy.root)

    @property
    def tolerance(self) -> float | None:
        """What counts as rounding, relative; None: that of each tensor's own dtype."""
        return _WIDE_TOLERANCE if self._wide else None

    # ---- runs

    def run_graph(self, inputs: Arguments, watch: Watch | None = None) -> list[Any]:
        """The flat outputs of the finalized graph in eval mode."""
        dtype = torch.float64 if self._wide else None
        leaves = pytree.tree_leaves(inputs)
        return run(self.graph, lambda name: tensor_at(self.copy.final, name), leaves, dtype, watch)

    def run_copy(self, inputs: Arguments, *, train: bool = False, instead: nn.Module | None = None) -> Any:
        """The outputs of the copy, or another module, on copies of the inputs; in train mode those of a copy of it.

        What the model writes into its buffers is taken back.

        Raises:
            WriteBackError: it fails; names module, class and line.
        """
        root = self.copy.root if instead is None else instead
        root = copy.deepcopy(root).train() if train else root
        args, kwargs = self._fresh(inputs)
        try:
            with preserved(root):
                return root(*args, **kwargs)
        except Exception as failure:  # the user's code may raise anything
            place, said = _place(root, failure)
            raise WriteBackError(
                f"{type(root).__name__} does not run with the sizes of the finalized model: it fails in "
                f"{said}: {type(failure).__name__}: {str(failure).strip()}. Where a size is a "
                "number there, take it from the tensors or keep it in an attribute.",
                [place],
            ) from failure

    def _fresh(self, inputs: Arguments) -> Arguments:
        """The inputs in the precision in use, each tensor copied once."""
        copies: dict[int, Tensor] = {}

        def fresh(tensor: Tensor) -> Tensor:
            if id(tensor) not in copies:
                dtype = torch.float64 if self._wide and tensor.dtype == torch.float32 else tensor.dtype
                copies[id(tensor)] = tensor.detach().to(dtype, copy=True)
            return copies[id(tensor)]

        args, kwargs = pytree.tree_map_only(Tensor, fresh, inputs)
        return args, kwargs

    # ---- comparison

    def difference(self, instead: nn.Module | None = None) -> float:
        """How much outputs differ beyond rounding, relative to the largest, at two batch sizes; 0.0 where none does.

        Those of the copy, or of another module.
        """
        return max(self._difference(inputs, instead) for inputs in (self.inputs, self._larger_batch()))

    def difference_on_samples(self) -> float:
        """The same on the sample inputs alone."""
        return self._difference(self.inputs)

    def _difference(self, inputs: Arguments, instead: nn.Module | None = None) -> float:
        wanted = self._compared(self.run_graph(inputs))
        found = self._compared(self.run_copy(inputs, instead=instead))
        if [tensor.shape for tensor in wanted] != [tensor.shape for tensor in found]:
            return float("inf")
        pairs = list(zip(wanted, found, strict=True))
        return max((error(a, b) for a, b in pairs if not close(a, b, self.tolerance)), default=0.0)

    def _compared(self, outputs: Any) -> list[Tensor]:
        """The tensors of outputs: a class that takes channels back as zeros writes zeros for them into its cache."""
        leaves = enumerate(pytree.tree_leaves(outputs))
        tensors = ((place, leaf) for place, leaf in leaves if isinstance(leaf, Tensor))
        return [_without_zeros(tensor) if place in self._cached else tensor for place, tensor in tensors]

    def _larger_batch(self) -> Arguments:
        """The sample inputs with one more in the batch, where that is free: the first free size is the batch's.

        Graphs that look rows up, as they do in masks, let inputs have free sizes of different names.
        """
        leaves, structure = pytree.tree_flatten(self.inputs)
        batch: int | None = None
        larger: dict[tuple[int, int], int] = {}
        for i, node in enumerate(self.graph.find_nodes(op="placeholder")):
            sizes = getattr(node.meta.get("val"), "shape", ())
            if not sizes or not isinstance(leaves[i], Tensor) or fixed_size(sizes[0]) is not None:
                continue
            batch = leaves[i].shape[0] if batch is None else batch
            if leaves[i].shape[0] == batch:
                larger[i, 0] = batch + 1
        args, kwargs = pytree.tree_unflatten(stretched(leaves, larger), structure)
        return args, kwargs


def _without_zeros(cached: Tensor) -> Tensor:
    """Keys or values without the heads and channels that are zero everywhere."""
    for axis in (HEADS, CHANNELS):
        filled = (cached != 0).movedim(axis, 0).flatten(1).any(1)
        cached = cached.index_select(axis, filled.nonzero().flatten())
    return cached


def _place(root: nn.Module, failure: Exception) -> tuple[str, str]:
    """The path of the innermost module in which the user's code fails, and what to say of it: with its class and line.

    The line is torch's where no code is the user's.
    """
    paths = {module: path for path, module in root.named_modules()}
    owner, line = root, ""
    for frame, number in traceback.walk_tb(failure.__traceback__):
        file, inner = frame.f_code.co_filename, frame.f_locals.get("self")
        is_foreign = file.startswith(_FOREIGN)
        if is_foreign and line:
            continue
        if isinstance(inner, nn.Module) and inner in paths:
            owner = inner
        if not is_foreign:
            line = f", {file}:{number}"
    return paths[owner], f"{paths[owner] or 'the root module'} ({type(owner).__name__}){line}"
