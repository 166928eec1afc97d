"""Taking channels out of a module and its graphs: parameters sliced, arguments set, what is dead dropped."""

from __future__ import annotations

import copy
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from fxprune.calling import renamed
from fxprune.channels.added_maps import add_zero_maps
from fxprune.channels.analysis import Analysis, fill_in
from fxprune.channels.cached_heads import cut_examples
from fxprune.channels.checking import Before, macs_verified
from fxprune.channels.computed_weights import held_values
from fxprune.channels.constants import Constant, place
from fxprune.channels.coupling import Coupling, coupling
from fxprune.channels.edits import Kept
from fxprune.channels.folding import Folding, add_zero_biases
from fxprune.channels.ids import Mask
from fxprune.channels.shapes import update_shapes
from fxprune.channels.statistics import apply_edits
from fxprune.channels.values import on_cpu
from fxprune.errors import FinalizeError
from fxprune.graph.batch import Batch
from fxprune.graph.editing import erase_dead
from fxprune.graph.mutation import is_mutating
from fxprune.graph.names import locate, parameter_count, tensors_of
from fxprune.graph.plan import ChannelPlan
from fxprune.graph.requirements import require_eval
from fxprune.graph.traced import TracedModule


@renamed("check", "verify")
def remove(
    traced: TracedModule, analysis: Analysis, *, verify: bool = True, lean: bool = False, hollow: bool = False
) -> ChannelPlan:
    """Take out, in place and from every graph, what `analysis` found; checked against the graph before.

    Args:
        traced: the module that was analyzed, unchanged since.
        analysis: what `analyze` returned for it.
        verify: whether to compare the outputs at the sample inputs, and count MACs.
        lean: let go of every weight as soon as it is cut; where outputs differ it cannot be told then which node does.
        hollow: give parameters and buffers their new shapes without values, on the device "meta".

    Returns:
        What was carried out; also in `traced.plan`.

    Raises:
        FinalizeError: the analysis is of another module, or the outputs would change. The module is then of no use.
            OutputsDifferError: the latter, where `lean`.
    """
    if analysis.traced is not traced:
        raise FinalizeError("the analysis is of another module. Call analyze on this one.")
    relations = analysis.coupling
    before = Before.of(traced.graphs["eval"], relations.tensors, traced) if verify else None
    left = Kept(relations.classes, analysis.alive)
    outputs = before.outputs(relations, left) if before is not None and lean else None
    folding = Folding(traced, relations, analysis.alive)
    with on_cpu():
        folding.run()
    plan = ChannelPlan(
        stayed=list(analysis.plan.stayed),
        eval_only=dict(analysis.plan.eval_only),
        by_range=dict(analysis.plan.by_range),
    )
    plan.refused = dict(analysis.plan.refused)
    if outputs is not None:
        before = None
        relations.forget_weights()
    how = _How(lean=outputs is not None, hollow=hollow)
    _carry_out(traced, relations, analysis.alive, analysis.plan, plan, folding.values, analysis.names, how)
    plan.folded, plan.merged, plan.added = folding.folded, folding.merged, folding.added
    plan.positions = folding.positions
    if before is not None:
        plan.macs = macs_verified(before, traced, relations, left)
        plan.sample = str(Batch.of(before.graph))
    elif outputs is not None:
        plan.macs, plan.sample = outputs.macs_of_equal(traced), outputs.sample
    return plan


@dataclass(frozen=True)
class _How:
    """How tensors are cut: as `lean` and `hollow` of `remove` say."""

    lean: bool = False
    hollow: bool = False


def impose(traced: TracedModule, plan: ChannelPlan) -> ChannelPlan:
    """Give a module, in place, the architecture of a plan that was made for another one of its kind.

    Sizes are those of the plan; no constants are folded, since these depend on values, and outputs are not compared.

    Args:
        traced: a module with an eval graph.
        plan: one that `remove` returned, or that was restored from JSON; it is left as it is.

    Returns:
        What was carried out; also in `traced.plan`.

    Raises:
        FinalizeError: the plan does not fit the module. The module is then of no use.
    """
    require_eval(traced, "removing channels")
    relations = coupling(traced, plan.refused)
    names = frozenset(relations.parameters)
    add_zero_biases(traced, relations, plan)
    add_zero_maps(traced, relations, plan)
    alive = _imposed(relations, plan)
    done = copy.deepcopy(plan)
    _carry_out(traced, relations, alive, plan, done, {}, names)
    return done


def _imposed(relations: Coupling, plan: ChannelPlan) -> Mask:
    """The classes that a stored plan keeps."""
    alive = relations.classes.pinned.copy()
    for name, axes in relations.parameters.items():
        if name not in plan.shapes:
            raise FinalizeError(f"the plan knows nothing of `{name}`: it belongs to another model.")
        for axis, ids in enumerate(axes):
            index = plan.kept[name][axis]
            if ids is None or index.dim() != 1:
                continue
            if len(ids) != plan.shapes[name][axis]:
                raise FinalizeError(
                    f"`{name}` has size {len(ids)} on axis {axis}; the plan was made for {plan.shapes[name][axis]}."
                )
            alive[relations.of(ids[index.numpy()])] = True
    _keep_in_groups(relations, plan, alive)
    relations.classes.close(alive)
    return alive


def _keep_in_groups(relations: Coupling, plan: ChannelPlan, alive: Mask) -> None:
    """Keep what the plan keeps within the groups of convolutions: no other parameter need have these channels."""
    for walk in relations.walks.values():
        for balance in walk.balances:
            index = plan.kept[balance.weight][1].numpy()
            outer, within = balance.outputs, balance.inputs
            if balance.transposed:
                outer, within = within, outer
            left = alive[relations.of(outer)].any(1)
            if index.ndim == 2 and len(index) == left.sum():
                alive[relations.of(np.take_along_axis(within[left], index, 1))] = True


def _carry_out(
    traced: TracedModule, relations: Coupling, alive: Mask, wanted: ChannelPlan, plan: ChannelPlan,
    values: dict[str, Tensor], names: Collection[str], how: _How = _How(),
) -> None:  # fmt: skip
    """Change the module and its graphs to what `plan` keeps, and complete it.

    Args:
        traced, relations, alive: the module, its relations, and the classes that stay.
        wanted: has the constants that leave the graphs.
        plan: shapes and kept indices are filled in; the rest is here.
        values: new values of parameters, before they are cut.
        names: the parameters and buffers that there were before constants were folded.
        how: tensors are cut.
    """
    kept = Kept(relations.classes, alive)
    computing = _computing_modules(relations, names)
    counted = apply_edits(relations.walks.values(), kept)
    plan.counting = counted.counting
    plan.rescaled = {name: rescaled.eps for name, rescaled in counted.rescaled.items()}
    values = values | {
        name: values.get(name, relations.tensors[name].detach()) * rescaled.factor
        for name, rescaled in counted.rescaled.items()
    }
    plan.constants = tuple(place(traced, relations, kept, [Constant(*constant) for constant in wanted.constants]))
    fill_in(relations, alive, plan)
    _slice(traced, relations, plan, values | _shifted_indices(relations, kept), how)
    plan.dropped = tuple(sorted({*wanted.dropped, *_drop(traced, relations, computing, names)}))
    tensors = tensors_of(traced)
    for walk in relations.walks.values():
        update_shapes(walk, kept, tensors)
        walk.graph.lint()
    plan.cached = {
        name: {dim: (relations.cached.sizes(name)[dim], index) for dim, index in axes.items()}
        for name, axes in relations.cached.kept(kept).items()
    }
    plan.held = tuple(held_values(traced.graphs["eval"]))
    cut_examples(traced, traced.graphs["eval"], relations.cached, kept)
    traced.recompile()
    plan.parameters = (wanted.parameters[0], parameter_count(traced))
    traced.record(plan)


def _shifted_indices(relations: Coupling, kept: Kept) -> dict[str, Tensor]:
    """Stored indices into axes whose indices shift."""
    found = {}
    for walk in relations.walks.values():
        for reindex in walk.reindexed:
            shift = torch.from_numpy(np.cumsum(kept.alive(reindex.ids)) - 1)
            old = relations.tensors[reindex.name]
            found[reindex.name] = shift[reindex.order].to(old.dtype).reshape(old.shape)
    return found


def _slice(
    traced: TracedModule, relations: Coupling, plan: ChannelPlan, values: dict[str, Tensor], how: _How
) -> None:  # fmt: skip
    """Cut every parameter and buffer; tied ones stay tied."""
    replaced: dict[int, Tensor] = {}  # all that are asked for were there from the start, so no number is used again
    for name in relations.parameters:
        old = relations.tensors[name]
        if id(old) not in replaced:
            value = values.pop(name, None) if how.lean else values.get(name)
            is_new, value = value is not None, old.detach() if value is None else value
            new = plan.slice(
                name, torch.empty(value.shape, dtype=value.dtype, device="meta") if how.hollow else value.to(old.device)
            )
            if not is_new and not how.hollow and new.shape == old.shape:
                continue
            replaced[id(old)] = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
        _install(traced, name, replaced[id(old)])
        if how.lean:
            relations.tensors[name] = replaced[id(old)]
        del old


def _install(traced: TracedModule, name: str, value: Tensor) -> None:
    owner, attribute = locate(traced, name)
    if isinstance(value, nn.Parameter):
        owner._parameters[attribute] = value
    else:
        owner._buffers[attribute] = value


def _drop(traced: TracedModule, relations: Coupling, computing: set[str], names: Collection[str]) -> list[str]:
    """Erase dead nodes, then the parameters and buffers that no graph reads; returns their names."""
    before = tensors_of(traced)
    for graph in traced.graphs.values():
        erase_dead(graph)
    lost = computing - _computing_modules(relations, names)
    for graph in traced.graphs.values():
        erase_dead(graph, lambda target: target.rpartition(".")[0] in lost)  # counters of a layer that left
    read = {str(node.target) for graph in traced.graphs.values() for node in graph.find_nodes(op="get_attr")}
    alive = {id(tensor) for name, tensor in before.items() if name in read}
    gone = [name for name, tensor in before.items() if id(tensor) not in alive]
    for name in gone:
        owner, attribute = locate(traced, name)
        owner._parameters.pop(attribute, None)
        owner._buffers.pop(attribute, None)
        owner._non_persistent_buffers_set.discard(attribute)
    return gone


def _computing_modules(relations: Coupling, names: Collection[str]) -> set[str]:
    """The modules of which something computes with one of these parameters or buffers."""
    reads = [node for walk in relations.walks.values() for node in walk.graph.find_nodes(op="get_attr")]
    return {
        str(node.target).rpartition(".")[0]
        for node in reads
        if node.target in names and not all(map(is_mutating, node.users))
    }
