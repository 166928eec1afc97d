"""Carrying a plan out: constants into biases, parameters sliced, literals fixed, shapes and outputs checked."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor

from fxprune.channels.constraints import representative
from fxprune.channels.coupling import Axis, Coupling, Reader, Val, Walk, carries
from fxprune.channels.ids import Mask, Vector
from fxprune.channels.registry import operator_name
from fxprune.errors import FinalizeError
from fxprune.graph.editing import erase_dead
from fxprune.graph.equality import close, error
from fxprune.graph.expressions import evaluate
from fxprune.graph.interpretation import run
from fxprune.graph.macs import flop_counter
from fxprune.graph.mutation import is_mutating
from fxprune.graph.names import locate, tensor_at
from fxprune.graph.plan import ChannelPlan
from fxprune.graph.text import describe
from fxprune.graph.traced import TracedModule

Tensors = dict[str, Tensor]
_DOUBLE_MACS = 2e9  # above, the check in float64 would cost more than the capture


class Kept:
    """Answers the questions that the rules' edits ask once it is known which classes are alive."""

    def __init__(self, coupling: Coupling, alive: Mask) -> None:
        self.coupling, self._alive = coupling, alive
        self.names = set(coupling.parameters)
        self.modules = computing(coupling, self.names)
        self.reindexed: dict[str, tuple[Vector, Tensor]] = {}

    def alive(self, ids: Vector) -> Mask:
        return self._alive[self.coupling.of(ids)]

    def count(self, ids: Vector) -> int:
        return int(self.alive(ids).sum())

    def resize(self, node: fx.Node | None, extent: Any, axis: Axis) -> Any:
        """The literal (or computed) size of an axis after removal."""
        old = new = 1
        for _, ids in axis:
            if ids is not None:
                old, new = old * len(ids), new * self.count(ids)
        if old == new or (isinstance(extent, int) and extent < 0):
            return extent
        if node is None or isinstance(extent, int):
            return extent // old * new
        with node.graph.inserting_before(node):
            scaled = node.graph.call_function(operator.mul, (extent, new))
            scaled.meta["val"] = extent.meta["val"] * new
            result = node.graph.call_function(operator.floordiv, (scaled, old))
            result.meta["val"] = scaled.meta["val"] // old
        return result

    def reindex(self, name: str, ids: Vector, order: Tensor) -> None:
        """A constant index into an axis whose indices shift."""
        self.reindexed[name] = (ids, order)


def fold(traced: TracedModule, coupling: Coupling, alive: Mask, plan: ChannelPlan, tensors: Tensors) -> None:
    """Put the constants of removed channels into biases and representative columns; `tensors` gets the new values."""
    eval_walk = coupling.walks["eval"]
    twins = _pairs(coupling)
    for reader in eval_walk.readers:
        if reader.constant is None or reader.folds is None or reader.merges is None or reader.table is None:
            continue
        gone = ~alive[coupling.of(reader.columns)]
        assert reader.rows is not None
        layer = reader.source.rpartition(".")[0] if reader.source else reader.node.name
        folds = reader.folds & gone & reader.used.any(1)
        if folds.any():
            delta = torch.zeros(reader.rows.shape).double()
            for g in np.flatnonzero(folds.any(1)):
                columns = torch.from_numpy(np.flatnonzero(folds[g]))
                constant = torch.from_numpy(reader.constant[g][folds[g]])
                delta[g] = reader.table[g][:, columns].double().sum(-1) @ constant
            if delta.count_nonzero():
                _into_bias(traced, coupling, reader, twins.get(id(reader)), delta.reshape(-1), plan, tensors)
                plan.folded[layer] = plan.folded.get(layer, 0) + int(folds.sum())
        merges = reader.merges & gone & reader.used.any(1)
        if merges.any():
            assert reader.source is not None
            for g in np.flatnonzero(merges.any(1)):
                rep = representative(reader, int(g), ~gone[g])
                if rep is None:  # no row that is alive reads them
                    continue
                weight = tensors.get(reader.source)
                if weight is None:
                    weight = tensors[reader.source] = coupling.tensors[reader.source].detach().clone()
                table = _like(reader.table, coupling.tensors[reader.source], weight)
                index = torch.from_numpy(np.flatnonzero(merges[g]))
                ratio = torch.from_numpy(reader.constant[g][merges[g]] / reader.constant[g][rep])
                sum_ = (reader.table[g][:, index].double() * ratio[None, :, None]).sum(1)
                table[g, :, rep] = (table[g, :, rep].double() + sum_).to(table.dtype)
                plan.merged[layer] = plan.merged.get(layer, 0) + len(index)


def _like(view: Tensor, base: Tensor, copy: Tensor) -> Tensor:
    """The view of `copy` that `view` is of `base`."""
    return copy.as_strided(
        view.shape, view.stride(), view.storage_offset() - base.storage_offset() + copy.storage_offset()
    )


def _pairs(coupling: Coupling) -> dict[int, Reader]:
    """For each reader of the eval graph the same layer's reader in the train graph, by parameters and order."""
    if "train" not in coupling.walks:
        return {}
    found: dict[Any, list[Reader]] = {}
    for reader in coupling.walks["train"].readers:
        if reader.key is not None:
            found.setdefault(reader.key, []).append(reader)
    pairs = {}
    for reader in coupling.walks["eval"].readers:
        if reader.key is not None and found.get(reader.key):
            pairs[id(reader)] = found[reader.key].pop(0)
    return pairs


def _into_bias(
    traced: TracedModule,
    coupling: Coupling,
    reader: Reader,
    twin: Reader | None,
    delta: Tensor,
    plan: ChannelPlan,
    tensors: Tensors,
) -> None:
    node, at = reader.node, reader.bias
    bias = _argument(node, at)
    name = str(bias.target) if isinstance(bias, fx.Node) and bias.op == "get_attr" else ""
    if name and coupling.walks["eval"].uses[name] == 1 and len(coupling.shared.get(name, ())) < 2:
        old = tensors.get(name, coupling.tensors[name]).detach()
        tensors[name] = (old.double() + delta).to(old.dtype)
        return
    assert reader.table is not None
    name = _free_name(traced, reader)
    plan.added[name] = reader.source or node.name
    value = delta if bias is None else delta + evaluate(traced, bias).double()
    _add(traced, coupling, [r for r in (reader, twin) if r is not None], name, value.to(reader.table.dtype))


def _argument(node: fx.Node, at: Any) -> Any:
    if isinstance(at, fx.Node):
        return at
    return node.args[at] if 0 <= at < len(node.args) else node.kwargs.get("bias") if at >= 0 else None


def added(traced: TracedModule, coupling: Coupling, plan: ChannelPlan) -> None:
    """Create the biases that a stored plan lists, as zeros: what is folded into them depends on the values."""
    twins = _pairs(coupling)
    for name, layer in plan.added.items():
        for reader in coupling.walks["eval"].readers:
            if layer in (reader.source, reader.node.name) and reader.rows is not None:
                weight = coupling.tensors[reader.source] if reader.source else reader.node.meta["val"]
                bias = _argument(reader.node, reader.bias)
                value = (
                    torch.zeros(reader.rows.size, dtype=weight.dtype)
                    if bias is None
                    else evaluate(traced, bias).clone()
                )
                _add(traced, coupling, [r for r in (reader, twins.get(id(reader))) if r is not None], name, value)
                break


def _add(traced: TracedModule, coupling: Coupling, readers: list[Reader], name: str, value: Tensor) -> None:
    owner, attribute = locate(traced, name)
    coupling.tensors[name] = nn.Parameter(value)
    owner.register_parameter(attribute, coupling.tensors[name])  # type: ignore[arg-type]
    rows = readers[0].rows
    assert rows is not None
    coupling.parameters[name] = [rows.reshape(-1) if rows.size > 1 else None]
    axis: Axis = ((rows.size, rows.reshape(-1)),) if rows.size > 1 else ()
    for reader in readers:
        node, at = reader.node, reader.bias
        env = next(w.env for w in coupling.walks.values() if w.graph is node.graph)
        with node.graph.inserting_before(node):
            read = node.graph.get_attr(name)
        read.meta["val"], env[read] = resized(node.meta["val"], tuple(value.shape)), Val((axis,))
        if at >= 0:
            node.args = (*node.args[:at], *([None] * (at - len(node.args))), read, *node.args[at + 1 :])
            node.kwargs = {k: v for k, v in node.kwargs.items() if k != "bias"}
            continue
        # only products of matrices have no place for a bias: channels are last
        with node.graph.inserting_after(node):
            total = node.graph.call_function(torch.ops.aten.add.Tensor, (node, read))
        total.meta, env[total] = dict(node.meta), env[node]
        node.replace_all_uses_with(total, delete_user_cb=lambda user, total=total: user is not total)  # type: ignore[misc]


def _free_name(traced: TracedModule, reader: Reader) -> str:
    path = reader.source.rpartition(".")[0] if reader.source else ""
    owner = traced.get_submodule(path)
    attribute, n = "bias", 0
    while hasattr(owner, attribute) and getattr(owner, attribute) is not None:
        n += 1
        attribute = f"folded_bias_{n}"
    return f"{path}.{attribute}" if path else attribute


def keep(coupling: Coupling, alive: Mask, plan: ChannelPlan) -> None:
    """Fill in the plan's kept indices."""
    for name, axes in coupling.parameters.items():
        shape = tuple(coupling.tensors[name].shape)
        plan.shapes[name] = shape
        plan.kept[name] = {
            a: torch.arange(shape[a]) if v is None else torch.from_numpy(np.flatnonzero(alive[coupling.of(v)]))
            for a, v in enumerate(axes)
        }
    for walk in coupling.walks.values():
        for b in walk.balances:
            inputs, outputs = alive[coupling.of(b.inputs)], alive[coupling.of(b.outputs)]
            left = inputs.any(1) | outputs.any(1)
            own = inputs if not b.transposed else outputs
            index = np.flatnonzero(own[left].reshape(-1)).reshape(int(left.sum()), -1) % own.shape[1]
            plan.kept[b.weight][1] = torch.from_numpy(index)
            plan.groups[b.weight] = (left.size, int(left.sum()))


def carry_out(traced: TracedModule, coupling: Coupling, kept: Kept, plan: ChannelPlan, values: Tensors) -> None:
    """Slice every parameter and buffer, drop what is dead, and bring the recorded shapes up to date."""
    for name, (ids, order) in kept.reindexed.items():
        shift = torch.from_numpy(np.cumsum(kept.alive(ids)) - 1)
        old = coupling.tensors[name]
        values[name] = shift[order].to(old.dtype).reshape(old.shape)
    replaced: dict[int, Tensor] = {}
    for name in coupling.parameters:
        old = coupling.tensors[name]
        if id(old) not in replaced:
            value = values.get(name)
            new = plan.slice(name, old.detach() if value is None else value)
            if new is old or (value is None and new.shape == old.shape):
                continue
            replaced[id(old)] = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
        _install(traced, name, replaced[id(old)])
    drop(traced, coupling, kept, plan)
    for walk in coupling.walks.values():
        reshape(walk, kept)
        walk.graph.lint()
    traced.recompile()


def _install(traced: TracedModule, name: str, value: Tensor) -> None:
    owner, attribute = locate(traced, name)
    if attribute in owner._parameters:
        owner._parameters[attribute] = value  # type: ignore[assignment]
    else:
        owner._buffers[attribute] = value


def drop(traced: TracedModule, coupling: Coupling, kept: Kept, plan: ChannelPlan) -> None:
    """Erase dead nodes, then the parameters and buffers that no graph reads."""
    before = _stored(traced)
    for graph in traced.graphs.values():
        erase_dead(graph)
    lost = kept.modules - computing(coupling, kept.names)
    for graph in traced.graphs.values():
        erase_dead(graph, lambda target: target.rpartition(".")[0] in lost)  # counters of a layer that left
    read = {str(n.target) for g in traced.graphs.values() for n in g.find_nodes(op="get_attr")}
    alive = {id(tensor) for name, tensor in before.items() if name in read}
    gone = [name for name, tensor in before.items() if id(tensor) not in alive]
    for name in gone:
        owner, attribute = locate(traced, name)
        owner._parameters.pop(attribute, None)
        owner._buffers.pop(attribute, None)
        owner._non_persistent_buffers_set.discard(attribute)
    plan.dropped = tuple(sorted({*plan.dropped, *gone}))


def computing(coupling: Coupling, names: set[str]) -> set[str]:
    """The modules of which something computes with one of these parameters or buffers."""
    nodes = (n for w in coupling.walks.values() for n in w.graph.find_nodes(op="get_attr"))
    return {str(n.target).rpartition(".")[0] for n in nodes if n.target in names and not all(map(is_mutating, n.users))}


def _stored(traced: TracedModule) -> Tensors:
    tensors: Tensors = dict(traced.named_parameters(remove_duplicate=False))
    return tensors | dict(traced.named_buffers(remove_duplicate=False))


def reshape(walk: Walk, kept: Kept) -> None:
    """Bring `node.meta["val"]` to the new shapes; they follow from the axes, so nothing is run."""

    empty: dict[Any, Tensor] = {}

    def renew(val: Any, meta: Any) -> Any:
        if isinstance(val, list) and isinstance(meta, list | tuple):
            return type(meta)(renew(v, m) for v, m in zip(val, meta, strict=False))
        if not isinstance(val, Val) or not isinstance(meta, FakeTensor) or len(val.axes) != meta.dim():
            return meta
        sizes = [
            kept.resize(None, s, axis) if carries(axis) else s for s, axis in zip(meta.shape, val.axes, strict=True)
        ]
        return meta if all(a is b for a, b in zip(sizes, meta.shape, strict=True)) else resized(meta, sizes, empty)

    for node, val in walk.env.items():
        if val is not None and node.op != "placeholder" and "val" in node.meta:
            new = renew(val, node.meta["val"])
            if new is not node.meta["val"]:
                if node.target is torch.ops.aten.view.default and not any(map(is_mutating, node.users)):
                    node.target = torch.ops.aten.reshape.default  # an axis that is left with one entry can bar a view
                node.meta["val"] = new
                node.meta.pop("tensor_meta", None)


def resized(meta: FakeTensor, sizes: Sequence[Any], cache: dict[Any, Tensor] | None = None) -> FakeTensor:
    """A fake tensor like `meta` with other sizes and the same order of axes in memory."""
    key = (meta.dtype, meta.requires_grad, *(s if type(s) is int else s.node.expr for s in (*sizes, *meta.stride())))
    if cache is not None and key in cache:
        return FakeTensor(meta.fake_mode, cache[key], meta.fake_device)
    strides = meta.stride()
    order = list(range(len(sizes)))
    if all(type(s) is int for s in strides):
        order.sort(key=lambda d: -strides[d])
    new: list[Any] = [1] * len(sizes)
    for outer, inner in zip(order[-2::-1], order[:0:-1], strict=True):
        new[outer] = new[inner] * sizes[inner]
    empty = torch.empty_strided(sizes, new, dtype=meta.dtype, device="meta").requires_grad_(meta.requires_grad)
    if cache is not None:
        cache[key] = empty
    return FakeTensor(meta.fake_mode, empty, meta.fake_device)


# ---- checking


def verify(
    before: fx.Graph,
    origin: dict[fx.Node, fx.Node],
    old: Tensors,
    traced: TracedModule,
    coupling: Coupling,
    alive: Mask,
    plan: ChannelPlan,
) -> None:
    """Compare the outputs of the eval graph before and after at the sample inputs; count MACs on the way.

    `origin` maps the nodes of `before`, a copy, to those that the coupling knows.

    Raises:
        FinalizeError: they differ; names the first node that does.
    """
    inputs = pytree.tree_leaves((traced.example_args, traced.example_kwargs))
    after = traced.graphs["eval"]

    def new(name: str) -> Any:
        return tensor_at(traced, name)

    small = any(t.dtype == torch.float32 for t in old.values()) and _estimate(before) < _DOUBLE_MACS
    dtype = torch.float64 if small or any(t.dtype == torch.float64 for t in old.values()) else None
    single = dtype == torch.float64 and small  # the values computed for biases were rounded to float32
    pairs = [(before, old.__getitem__), (after, new)]
    results, macs = [], []
    for graph, tensors in pairs:
        with flop_counter() as counter:
            try:
                results.append(run(graph, tensors, inputs, dtype))
            except RuntimeError:
                if dtype is None:
                    raise
                dtype, single = None, False
                results.append(run(graph, tensors, inputs, dtype))
        macs.append(counter.get_total_flops() // 2)
    plan.macs = (macs[0], macs[1])
    tolerance = 1e-5 if single else None
    if all(close(a, b, tolerance) for a, b in zip(*results, strict=True)):
        return
    seen: dict[str, Any] = {}
    run(before, old.__getitem__, inputs, dtype, lambda node, value: seen.update({origin.get(node, node).name: value}))
    names = {node.name: node for node in origin.values()}
    differing: list[str] = []

    def compare(node: fx.Node, value: Any) -> None:
        if isinstance(value, Tensor) and node.name in names and not differing:
            reference = _cut(seen[node.name], coupling, alive, names[node.name])
            if reference.shape != value.shape or not close(reference, value, tolerance):
                differing.append(describe(node))

    run(after, new, inputs, dtype, compare)
    worst = max(error(a, b) for a, b in zip(*results, strict=True))
    raise FinalizeError(
        f"removing channels was to leave the outputs as they are, but they differ by {worst:.1e} relative; the first "
        f"node that differs is {differing[0] if differing else 'the output'}. Nothing was changed; please report this "
        "model, and finalize with shrink=False."
    )


def _cut(value: Tensor, coupling: Coupling, alive: Mask, node: fx.Node) -> Tensor:
    """What of a value before is left after, where that is a selection along its axes."""
    val = coupling.walks["eval"].env[node]
    for d, axis in enumerate(val.axes if isinstance(val, Val) else ()):
        whole = np.ones(1, bool)
        for extent, ids in axis:
            mask = (
                np.ones(extent, bool)
                if ids is None and type(extent) is int
                else alive[coupling.of(ids)]
                if ids is not None
                else whole
            )
            whole = (whole[:, None] & mask[None]).reshape(-1)
        if len(whole) == value.shape[d] and not whole.all():
            value = value.index_select(d, torch.from_numpy(whole).nonzero().squeeze(1))
    return value


def _estimate(graph: fx.Graph) -> float:
    """FLOPs of one sample in convolutions and linear layers."""
    total = 0.0
    for node in graph.nodes:
        name = operator_name(node.target) if node.op == "call_function" else ""
        if name == "linear" or "conv" in name:
            weight, out = node.args[1].meta.get("val"), node.meta.get("val")
            if weight is not None and out is not None:
                space = out.shape[1:-1] if name == "linear" else out.shape[2:]
                total += 2.0 * weight.numel() * math.prod(s for s in space if type(s) is int)
    return total
