"""The copy of the user's model that becomes the shrunk one, beside the finalized module that it follows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from fxprune.artifacts.slots import Change
from fxprune.channels.registry import REGISTRY
from fxprune.graph.names import ModulePaths, join, tensors_of
from fxprune.graph.plan import ChannelPlan
from fxprune.graph.traced import TracedModule


class WorkingCopy:
    """A plain copy of the model, in eval mode, on its way to the sizes and values of `final`.

    Attributes:
        root: the copy.
        final: the finalized module. plan: what finalize carried out, empty where there is none.
        shapes: of the copy's tensors before anything is written, by every name.
    """

    def __init__(self, root: nn.Module, final: TracedModule) -> None:
        self.root, self.final = root, final
        self.plan = _by_every_name(final.plan or ChannelPlan(), final)
        self.shapes = {name: tuple(tensor.shape) for name, tensor in tensors_of(root).items()}
        self._paths = ModulePaths(root)

    def paths(self, module: nn.Module) -> list[str]:
        """Every path of a module of the copy."""
        return self._paths.of(module)

    def where(self, module: nn.Module) -> str:
        """A module as error messages name it."""
        return f"{self.paths(module)[0] or 'the root module'} ({type(module).__name__})"

    def changes(self, module: nn.Module) -> set[Change]:
        """The sizes before and now of the tensors below a module, or below the next one around it that has any."""
        return set[Change]().union(*self.nearest_changes(module))

    def nearest_changes(self, module: nn.Module) -> list[set[Change]]:
        """The same, those first of tensors that lie the fewest modules below."""
        path, tensors = self.paths(module)[0], tensors_of(module)
        while path and not tensors:
            path = path.rpartition(".")[0]
            tensors = tensors_of(self.root.get_submodule(path))
        by_depth: dict[int, set[Change]] = {}
        for name, tensor in tensors.items():
            qualified, changes = join(path, name), by_depth.setdefault(name.count("."), set())
            changes.add(self.plan.groups.get(qualified, (0, 0)))
            changes.update(zip(self.shapes.get(qualified, tensor.shape), tensor.shape, strict=True))
        return [by_depth[depth] for depth in sorted(by_depth)]


def _by_every_name(plan: ChannelPlan, final: TracedModule) -> ChannelPlan:
    """A plan that says of tensors in shared modules what it says of the first of their names."""
    names: dict[int, list[str]] = {}
    for name, tensor in tensors_of(final).items():
        names.setdefault(id(tensor), []).append(name)
    alike = [same for same in names.values() if len(same) > 1]
    kept, shapes, groups = (_spread(entries, alike) for entries in (plan.kept, plan.shapes, plan.groups))
    return replace(plan, kept=kept, shapes=shapes, groups=groups)


def _spread(entries: Mapping[str, Any], alike: Sequence[Sequence[str]]) -> dict[str, Any]:
    """With an entry under each of the names of which one has one."""
    found = dict(entries)
    for names in alike:
        known = next((name for name in names if name in entries), None)
        if known is not None:
            found |= {name: entries[known] for name in names if name not in entries}
    return found


def follow_parameters(module: nn.Module) -> None:
    """Set the attributes in which a layer of torch keeps sizes to what its parameters have."""
    vars(module).update(REGISTRY.module_sizes(module))
