"""Blocks of which nothing is left: they leave the lists that the user's class holds them in.

Where the weights and biases that end the branches of a residual block are masked, the block is the identity, and the
graph has nothing of it. A class that is built from a configuration can have one less then.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace

from torch import nn

from fxprune.artifacts.following_configurations import outputs_of, same_outputs
from fxprune.artifacts.plain_copy import deep_copy
from fxprune.capture.cached_tensors import dense_examples
from fxprune.graph.arguments import Arguments
from fxprune.graph.configuration_numbers import build
from fxprune.graph.depths import Gone, Renaming, Shallower, follow_depth, shallower
from fxprune.graph.metadata import module_calls, set_module_calls
from fxprune.graph.names import join, tensors_of
from fxprune.graph.plan import ChannelPlan
from fxprune.graph.sharing_copies import sharing_copy
from fxprune.graph.snapshot import preserved
from fxprune.graph.traced import TracedModule


def without_gone_blocks(final: TracedModule, model: nn.Module) -> tuple[TracedModule, nn.Module] | None:
    """The model and its finalized module without the blocks of which nothing is left; None where there are none.

    Args:
        final: what `finalize` returned. model: of the class that was traced; both stay as they are.

    Returns:
        A copy of each; what is behind such blocks has other names in both. None too where no configuration says such
        a model, or its class makes of it one that computes something else.
    """
    gone = dict(_gone(final, model))
    if not gone:
        return None
    inputs = dense_examples(final, final.plan or ChannelPlan())
    small = deep_copy(model)
    found = shallower(small, _called(small, gone, inputs))
    if found is None:
        return None
    follow_depth(small, found)
    if not _is_made(small, found, inputs):
        return None
    return renamed(final, Renaming(found.gone)), small


def _gone(final: TracedModule, model: nn.Module) -> Iterator[tuple[str, frozenset[int]]]:
    """The paths of lists of modules, and the entries that have tensors, of which none is left."""
    there = set(tensors_of(final))
    for path, module in model.named_modules():
        children = module._modules
        if list(children) != [str(i) for i in range(len(children))]:
            continue
        names = {i: [join(path, f"{i}.{name}") for name in tensors_of(c)] for i, c in enumerate(module.children())}
        left = frozenset(i for i, own in names.items() if own and there.isdisjoint(own))
        if left and len(left) < len(children):
            yield path, left


def _called(model: nn.Module, gone: Gone, inputs: Arguments) -> dict[str, frozenset[int]]:
    """Those that a call on the inputs runs: others are there for other calls."""
    ran: set[nn.Module] = set()
    entries = {(path, i): model.get_submodule(join(path, str(i))) for path, own in gone.items() for i in own}
    handles = [module.register_forward_pre_hook(lambda module, _: ran.add(module)) for module in entries.values()]
    try:
        with preserved(model):
            outputs_of(model.eval(), inputs)
    except Exception:  # what the user's code raises, write_back names
        return {}
    finally:
        for handle in handles:
            handle.remove()
    found = {path: frozenset(i for i in own if entries[path, i] in ran) for path, own in gone.items()}
    return {path: own for path, own in found.items() if own}


def _is_made(small: nn.Module, found: Shallower, inputs: Arguments) -> bool:
    """Whether classes make the same model of the configurations, given the weights."""
    try:
        made = deep_copy(small)
        for part in found.parts:
            own = small.get_submodule(part.path)
            parameter = next(own.parameters())
            rebuilt = build(type(own), copy.deepcopy(part.config))
            rebuilt.to(dtype=parameter.dtype, device=parameter.device)
            missing, unexpected = rebuilt.load_state_dict(own.state_dict(), strict=False)
            if unexpected or not part.more.issuperset(missing):
                return False
            if part.path:
                made.set_submodule(part.path, rebuilt)
            else:
                made = rebuilt
        with preserved(small):
            return same_outputs(outputs_of(small.eval(), inputs), outputs_of(made.eval(), inputs))
    except Exception:  # the user's code may raise anything
        return False


def renamed(final: TracedModule, names: Renaming) -> TracedModule:
    """A finalized module whose modules have other names; it shares its tensors with the one that it comes from."""
    found = sharing_copy(final)
    for path in sorted(names.gone, key=len, reverse=True):
        try:
            container = found.get_submodule(path)
        except AttributeError:  # nothing is left in the list
            continue
        children = {f"{path}.{key}": child for key, child in container._modules.items()}
        container._modules.clear()
        for old, child in children.items():
            new = names(old)
            if new is not None:
                container._modules[new.rpartition(".")[2]] = child
    for graph in found.graphs.values():
        for node in graph.nodes:
            if node.op == "get_attr":
                node.target = names(str(node.target)) or node.target
            calls = {key: (names(str(path)), kind) for key, (path, kind) in module_calls(node).items()}
            set_module_calls(node, {key: (path, kind) for key, (path, kind) in calls.items() if path is not None})
    found.record(None if final.plan is None else _renamed_plan(final.plan, names))
    found.decide((new, axis) for name, axis in final.decided if (new := names(name)))
    found.make({new: names(weight) or weight for b, weight in final.made_biases.items() if (new := names(b))})
    found.recompile()
    return found


def _renamed_plan(plan: ChannelPlan, names: Renaming) -> ChannelPlan:
    return replace(
        plan,
        kept=names.of_keys(plan.kept), groups=names.of_keys(plan.groups), shapes=names.of_keys(plan.shapes),
        dropped=names.of_names(plan.dropped),
        added={new: names(weight) or weight for name, weight in plan.added.items() if (new := names(name))},
        folded=names.of_keys(plan.folded), merged=names.of_keys(plan.merged), positions=names.of_keys(plan.positions),
        stayed=[(new, axis, index, why) for name, axis, index, why in plan.stayed if (new := names(name))],
        eval_only=names.of_keys(plan.eval_only), by_range=names.of_keys(plan.by_range),
        counting=names.of_keys(plan.counting), rescaled=names.of_keys(plan.rescaled),
        chosen=tuple((new, axis) for name, axis in plan.chosen if (new := names(name))),
        held=names.of_names(plan.held),
    )  # fmt: skip
