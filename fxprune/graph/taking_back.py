"""What is changed in a module that several processes share, taken back on all of them where it fails on one."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fxprune.communication import agree
from fxprune.graph.provenance import provenance_of, set_provenance
from fxprune.graph.spread_modules import is_spread
from fxprune.graph.traced import TracedModule
from fxprune.sharding import part


@contextlib.contextmanager
def taken_back(traced: TracedModule, written: Iterable[Tensor] = ()) -> Iterator[None]:
    """Within, what fails on one process changes nothing on any; a collective for a module that is spread, else nothing.

    What is kept are graphs, and which parameters, buffers and modules stand where, not their values.

    Args:
        traced: the module. written: those of its tensors whose values are written into; of these each process keeps
            its part.
    """
    if not is_spread(traced):
        yield
        return
    places = [(module, _contents(module), provenance_of(module)) for module in traced.modules()]
    graphs = {mode: copy.deepcopy(graph) for mode, graph in traced.graphs.items()}
    values = [(tensor, part(tensor).clone(), _marks(tensor)) for tensor in written]
    try:
        yield
        agree("changing a module")
    except BaseException:
        for module, contents, provenance in places:
            _put_back(module, contents)
            set_provenance(module, provenance)
        with torch.no_grad():
            for tensor, value, marks in values:
                part(tensor).copy_(value)
                _mark(tensor, marks)
        for graph in graphs.values():
            graph.owning_module = traced
        traced.graphs.update(graphs)
        traced.recompile()
        raise


_MARK = "version_at_"  # how attributes begin that say how often a tensor had been written to when something was done


def _marks(tensor: Tensor) -> dict[str, bool]:
    """By attribute, whether nothing was written into a tensor since."""
    return {name: said == tensor._version for name, said in vars(tensor).items() if name.startswith(_MARK)}


def _mark(tensor: Tensor, marks: dict[str, bool]) -> None:
    for name in _marks(tensor):
        del vars(tensor)[name]
    vars(tensor).update({name: tensor._version if is_last else -1 for name, is_last in marks.items()})


_FIELDS = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")


def _contents(module: nn.Module) -> list[Any]:
    return [getattr(module, field).copy() for field in _FIELDS]


def _put_back(module: nn.Module, contents: Iterable[Any]) -> None:
    for field, before in zip(_FIELDS, contents, strict=True):
        held = getattr(module, field)
        held.clear()
        held.update(before)
