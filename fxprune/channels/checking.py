"""Whether a graph computes after the removal what it did before; multiply-accumulates are counted on the way."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn

from fxprune.channels.axes import Axis
from fxprune.channels.cached_heads import CacheNodes, without_dead
from fxprune.channels.costs import layer_macs, macs_of_one_sample
from fxprune.channels.coupling import Coupling
from fxprune.channels.edits import Kept
from fxprune.channels.values import Stack, Value
from fxprune.errors import FinalizeError, OutputsDifferError
from fxprune.graph.batch import Batch
from fxprune.graph.equality import TOLERANCES, close, error
from fxprune.graph.error_sites import working_on
from fxprune.graph.interpretation import run
from fxprune.graph.macs import NodeMacs
from fxprune.graph.mutation import is_mutating
from fxprune.graph.names import tensor_at
from fxprune.graph.seeding import seeded
from fxprune.graph.text import describe
from fxprune.graph.traced import TracedModule
from fxprune.torch_internals import FakeTensorMode

# above, a run in float64 would cost more than the capture
_MOST_MACS_IN_FLOAT64 = 1e9
# of float32 networks that are compared in float64: the values computed for biases were rounded to float32
_ROUNDED_BIASES = 1e-5


@dataclass(frozen=True)
class Before:
    """A graph as it is before the removal, with its tensors.

    Attributes:
        graph: a copy. origin: its nodes -> those that the coupling knows.
        tensors: parameters and buffers by name.
        root: holds the bodies of control flow, which removal leaves as they are.
        inputs: the flat sample inputs.
        cached: the places of keys and values among the flat outputs.
    """

    graph: fx.Graph
    origin: dict[fx.Node, fx.Node]
    tensors: dict[str, Tensor]
    root: nn.Module
    inputs: list[Any]
    cached: frozenset[int]

    @classmethod
    def of(cls, graph: fx.Graph, tensors: dict[str, Tensor], root: TracedModule) -> Before:
        copied, nodes = fx.Graph(), dict[fx.Node, fx.Node]()
        copied.output(copied.graph_copy(graph, nodes))
        origin = {copy: node for node, copy in nodes.items()}
        inputs = pytree.tree_leaves((root.example_args, root.example_kwargs))
        cached = frozenset(CacheNodes.of(graph).returned)
        return cls(copied, origin, {name: tensor.detach() for name, tensor in tensors.items()}, root, inputs, cached)

    def read(self, name: str) -> Any:
        """What a `get_attr` node of the graph reads."""
        return self.tensors[name] if name in self.tensors else tensor_at(self.root, name)

    def outputs(self, coupling: Coupling, kept: Kept) -> Outputs:
        """What the graph gives at the sample inputs of the module, to be compared when its tensors are gone."""
        precision = _Precision.of(self)
        inputs = without_dead(self.inputs, coupling.walks["eval"].graph, coupling.cached, kept)
        try:
            found, macs = _counted(self.graph, self.read, inputs, precision, self.root)
        except RuntimeError:  # some operators have no float64
            if precision == _AS_IT_IS:
                raise
            precision = _AS_IT_IS
            found, macs = _counted(self.graph, self.read, inputs, precision, self.root)
        left = _what_stays_of_outputs(found, self, coupling, kept)
        return Outputs(left, macs, precision, str(Batch.of(self.graph)))


@dataclass(frozen=True)
class Outputs:
    """What a graph gave before the removal.

    Attributes:
        values: its flat outputs. macs: its multiply-accumulates of one sample.
        precision: what it was computed in.
        sample: the batch, as a plan says it.
    """

    values: list[Any]
    macs: int
    precision: _Precision
    sample: str

    def macs_of_equal(self, traced: TracedModule) -> tuple[int, int]:
        """The multiply-accumulates before and after.

        Raises:
            OutputsDifferError: the eval graph gives other outputs now.
        """
        read = partial(tensor_at, traced)
        found, macs = _counted(traced.graphs["eval"], read, _inputs(traced), self.precision, traced)
        if not all(close(want, got, self.precision.tolerance) for want, got in zip(self.values, found, strict=True)):
            raise OutputsDifferError("outputs differ; the removal that keeps what was there says where")
        return self.macs, macs


@dataclass(frozen=True)
class _Precision:
    """What outputs are compared in.

    Attributes:
        dtype: what is computed in, None: as it is. halves: whether what has 16 bits is, too.
        tolerance: within which outputs count as equal; None: that of their dtype.
    """

    dtype: torch.dtype | None = None
    tolerance: float | None = None
    halves: bool = False

    @classmethod
    def of(cls, before: Before) -> _Precision:
        """Float64 where that takes no long time; what has 16 bits rounds too much to tell anything, and is widened."""
        dtypes = {tensor.dtype for tensor in before.tensors.values()}
        is_small = layer_macs(before.graph) < _MOST_MACS_IN_FLOAT64
        if halves := dtypes & {torch.float16, torch.bfloat16}:
            # what was computed anew, as biases, was rounded to the types of parameters
            is_narrow = halves.issuperset(parameter.dtype for parameter in before.root.parameters())
            rounded = max(TOLERANCES[each] for each in halves) if is_narrow else _ROUNDED_BIASES if is_small else None
            return cls(torch.float64 if is_small else torch.float32, rounded, halves=True)
        if torch.float32 in dtypes and is_small:
            return cls(torch.float64, _ROUNDED_BIASES)
        return cls(torch.float64 if torch.float64 in dtypes else None)

    def in_float64(self) -> _Precision:
        """The same in float64, of parameters that are rounded."""
        return replace(self, dtype=torch.float64, tolerance=self.tolerance or _ROUNDED_BIASES)


_AS_IT_IS = _Precision()


def _has_rounded(before: Before) -> bool:
    """Whether some parameters are in float32 or less."""
    return any(tensor.dtype in (torch.float32, torch.float16, torch.bfloat16) for tensor in before.tensors.values())


def macs_without_values(traced: TracedModule) -> int:
    """The multiply-accumulates that the eval graph takes for one sample, from shapes and types alone.

    Whatever an operator raises that needs values is raised.
    """
    devices = [leaf.device for leaf in _inputs(traced) if isinstance(leaf, Tensor)]
    with FakeTensorMode(allow_non_fake_inputs=True):

        def empty(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            device = devices[0] if value.is_meta and devices else value.device
            return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)

        inputs = [empty(each) for each in _inputs(traced)]
        read = partial(tensor_at, traced)
        return _counted(traced.graphs["eval"], lambda name: empty(read(name)), inputs, _AS_IT_IS, traced)[1]


def _inputs(traced: TracedModule) -> list[Any]:
    return pytree.tree_leaves((traced.example_args, traced.example_kwargs))


def _counted(
    graph: fx.Graph, tensors: Callable[[str], Any], inputs: list[Any], precision: _Precision, root: nn.Module
) -> tuple[list[Any], int]:
    """The outputs of a graph, and its multiply-accumulates of one sample."""
    with seeded(root), NodeMacs() as counted:
        outputs = run(graph, tensors, inputs, precision.dtype, counted.watch, halves=precision.halves)
    return outputs, macs_of_one_sample(graph, counted.macs, Batch.of(graph))


@dataclass(frozen=True)
class _Runs:
    """The outputs of both graphs in one precision, and their multiply-accumulates."""

    before: list[Any]
    after: list[Any]
    macs: tuple[int, int]

    def agree(self, precision: _Precision) -> bool:
        """Whether the outputs are the same within the tolerance of what they were computed in."""
        return all(close(want, got, precision.tolerance) for want, got in zip(self.before, self.after, strict=True))


def macs_verified(before: Before, traced: TracedModule, coupling: Coupling, kept: Kept) -> tuple[int, int]:
    """Compare the outputs of the eval graph before and after at the sample inputs; returns both's MACs of a sample.

    Raises:
        FinalizeError: they differ; names the first node that does.
    """
    graph = traced.graphs["eval"]
    given, left = without_dead(before.inputs, graph, coupling.cached, kept), _inputs(traced)

    def tensors(name: str) -> Any:
        return tensor_at(traced, name)

    def both(precision: _Precision) -> _Runs:
        first = _counted(before.graph, before.read, given, precision, before.root)
        second = _counted(graph, tensors, left, precision, traced)
        return _Runs(_what_stays_of_outputs(first[0], before, coupling, kept), second[0], (first[1], second[1]))

    precision = _Precision.of(before)
    try:
        runs = both(precision)
    except RuntimeError:  # some operators have no float64
        if precision == _AS_IT_IS:
            raise
        precision = _AS_IT_IS
        runs = both(precision)
    if not runs.agree(precision) and precision.dtype != torch.float64 and _has_rounded(before):
        # what is next to a tie turns one way or the other by rounding: many MACs are computed once more
        with contextlib.suppress(RuntimeError):
            precise = precision.in_float64()
            runs, precision = both(precise), precise
    if runs.agree(precision):
        return runs.macs
    worst = max(error(want, got) for want, got in zip(runs.before, runs.after, strict=True))
    node = _first_difference(before, graph, tensors, (given, left), precision, coupling, kept)
    with working_on(node) if node is not None else contextlib.nullcontext():
        raise FinalizeError(
            f"removing channels was to leave the outputs as they are, but they differ by {worst:.1e} relative; the "
            f"first node that differs is {'the output' if node is None else describe(node)}. Nothing was changed; "
            "please report this model, and finalize with shrink=False."
        )


def _what_stays_of_outputs(outputs: Sequence[Any], before: Before, coupling: Coupling, kept: Kept) -> list[Any]:
    """Flat outputs, of whose keys and values those are left out that went."""
    found = list(outputs)
    env, nodes = coupling.walks["eval"].env, pytree.tree_leaves(before.graph.output_node().args)
    for place in before.cached:
        value = env.get(before.origin[nodes[place]])
        found[place] = _what_stays(found[place], value if isinstance(value, Value) else None, kept)
    return found


def _first_difference(
    before: Before, graph: fx.Graph, tensors: Callable[[str], Any], inputs: tuple[list[Any], list[Any]],
    precision: _Precision, coupling: Coupling, kept: Kept,
) -> fx.Node | None:  # fmt: skip
    """The first node of `graph` whose value is not what was left of it."""
    seen: dict[str, Any] = {}

    def keep(node: fx.Node, value: Any) -> None:
        is_written = isinstance(value, Tensor) and any(map(is_mutating, node.users))  # into, later
        seen[before.origin.get(node, node).name] = value.clone() if is_written else value

    with seeded(before.root):
        run(before.graph, before.read, inputs[0], precision.dtype, keep, halves=precision.halves)
    nodes = {node.name: node for node in before.origin.values()}
    differing: list[fx.Node] = []

    def compare(node: fx.Node, value: Any) -> None:
        # parameters take up constants: it is operators that show whether what was taken out is missing
        if differing or node.op != "call_function" or not isinstance(value, Tensor) or node.name not in nodes:
            return
        known = coupling.walks["eval"].env[nodes[node.name]]
        reference = _what_stays(seen[node.name], known if isinstance(known, Value) else None, kept)
        if not close(reference, value, precision.tolerance):
            differing.append(node)

    with seeded(before.root):
        run(graph, tensors, inputs[1], precision.dtype, compare, halves=precision.halves)
    return differing[0] if differing else None


def _what_stays(tensor: Tensor, value: Value | None, kept: Kept) -> Tensor:
    """What of a tensor before is left after, where that is a selection along its axes."""
    if isinstance(value, Stack):
        return torch.stack([_what_stays(each, part, kept) for each, part in zip(tensor, value.parts, strict=True)])
    for dim, axis in enumerate(value.axes if value is not None else ()):
        mask = _kept_indices(axis, kept)
        if len(mask) == tensor.shape[dim] and not mask.all():
            index = torch.from_numpy(mask).nonzero().squeeze(1)
            tensor = tensor.index_select(dim, index.to(tensor.device))
    return tensor


def _kept_indices(axis: Axis, kept: Kept) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Which indices of an axis stay; of another length where a factor has a free size."""
    whole = np.ones(1, bool)
    for factor in axis:
        if factor.ids is not None:
            mask = kept.alive(factor.ids)
        else:
            mask = np.ones(factor.size if type(factor.size) is int else 1, bool)
        whole = (whole[:, None] & mask[None]).reshape(-1)
    return whole
