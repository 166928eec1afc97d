"""Constants of removed channels: into biases, into representative columns."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, fx, nn

from fxprune.channels.added_maps import add_map
from fxprune.channels.arguments import set_argument
from fxprune.channels.axes import ONE, Axis
from fxprune.channels.constraints import representative
from fxprune.channels.coupling import Coupling
from fxprune.channels.ids import Mask, Vector
from fxprune.channels.positions import PositionMaps
from fxprune.channels.readers import Reader
from fxprune.channels.shapes import resized
from fxprune.channels.values import Value
from fxprune.channels.walk import Result
from fxprune.errors import FinalizeError
from fxprune.graph.error_sites import working_on
from fxprune.graph.expressions import evaluate
from fxprune.graph.names import join, locate
from fxprune.graph.plan import ChannelPlan
from fxprune.graph.traced import TracedModule


@dataclass(frozen=True)
class Folding:
    """What is folded where.

    Attributes:
        traced, coupling: the module and its relations; biases are made in both.
        alive: the classes that stay.
        values: new values of parameters by name.
        added: names of biases that were made -> name of the layer's weight, or of its node.
        folded, merged: layer -> how many constant channels went into its bias, into representative columns.
        positions: as in `ChannelPlan.positions`.
    """

    traced: TracedModule
    coupling: Coupling
    alive: Mask
    values: dict[str, Tensor] = field(default_factory=dict)
    added: dict[str, str] = field(default_factory=dict)
    folded: dict[str, int] = field(default_factory=dict)
    merged: dict[str, int] = field(default_factory=dict)
    positions: dict[str, tuple[str, str, int]] = field(default_factory=dict)

    def run(self) -> None:
        """Fold the constants of every reader of the eval graph; values are computed on the CPU."""
        twins = {reader.node: None if twin is None else twin.node for reader, twin in self.coupling.readers()}
        for reader, twin in self.coupling.readers():
            if reader.constant is None or reader.folds is None or reader.merges is None or reader.table is None:
                continue
            gone = ~self.alive[self.coupling.of(reader.columns)] & reader.used.columns_of_rows()
            layer = reader.source.rpartition(".")[0] if reader.source else reader.node.name
            with working_on(reader.node):
                self._fold(reader, twin, reader.folds & gone, layer)
                self._merge(reader, reader.merges & gone, layer)
                if reader.mapped is not None and reader.maps is not None:
                    self._add_map(reader, twin, reader.mapped & gone, reader.maps, twins.get(reader.maps.source))

    def _fold(self, reader: Reader, twin: Reader | None, folds: Mask, layer: str) -> None:
        """Add to the bias what the columns `folds` [groups, columns] contribute."""
        if not folds.any():
            return
        assert reader.rows is not None
        assert reader.table is not None
        assert reader.constant is not None
        delta = torch.zeros(reader.rows.shape).double()
        for group in np.flatnonzero(folds.any(1)):
            columns = torch.from_numpy(np.flatnonzero(folds[group]))
            constant = torch.from_numpy(reader.constant[group][folds[group]])
            delta[group] = reader.table[group][:, columns].double().sum(-1) @ constant
        if delta.count_nonzero():
            self._into_bias(reader, twin, delta.reshape(-1))
            self.folded[layer] = self.folded.get(layer, 0) + int(folds.sum())

    def _merge(self, reader: Reader, merges: Mask, layer: str) -> None:
        """Add the columns `merges` [groups, columns] to that of their representative, in proportion."""
        for group in np.flatnonzero(merges.any(1)):
            assert reader.source is not None
            assert reader.table is not None
            assert reader.constant is not None
            alive = self.alive[self.coupling.of(reader.columns[group])]
            chosen = representative(reader, int(group), alive)
            if chosen is None:  # no row that is alive reads them
                continue
            stored = self.coupling.tensors[reader.source].detach().cpu()
            if reader.source not in self.values:
                self.values[reader.source] = stored.clone()
            table = _like(reader.table, stored, self.values[reader.source])
            index = torch.from_numpy(np.flatnonzero(merges[group]))
            ratio = torch.from_numpy(reader.constant[group][merges[group]] / reader.constant[group][chosen])
            addition = (reader.table[group][:, index].double() * ratio[None, :, None]).sum(1)
            table[group, :, chosen] = (table[group, :, chosen].double() + addition).to(table.dtype)
            self.merged[layer] = self.merged.get(layer, 0) + len(index)

    def _add_map(
        self, reader: Reader, twin: Reader | None, mapped: Mask, maps: PositionMaps, source: fx.Node | None
    ) -> None:
        """Add what the columns `mapped` [groups, columns] contribute at each position; `source` is that of the twin."""
        assert reader.rows is not None
        assert reader.table is not None
        values = maps.values.view(len(maps.values), *mapped.shape)
        delta = torch.zeros(*reader.rows.shape, len(values)).double()
        for group in np.flatnonzero(mapped.any(1)):
            columns = torch.from_numpy(np.flatnonzero(mapped[group]))
            delta[group] = reader.table[group][:, columns].double().sum(-1) @ values[:, group, columns].T
        if not delta.count_nonzero():
            return
        assert maps.border is not None  # of other maps no reader has any
        name = _free_name(self.traced, reader, "positions")
        result = reader.node.meta["val"]
        value = delta.reshape(reader.rows.size, *(window.count for window in maps.border))
        self.positions[name] = reader.node.name, maps.source.name, int(mapped.sum())
        add_map(
            self.traced,
            self.coupling,
            reader,
            twin,
            name,
            value.to(result.device, result.dtype),
            maps.border,
            maps.source,
            source,
        )

    def _into_bias(self, reader: Reader, twin: Reader | None, delta: Tensor) -> None:
        bias = reader.bias.node
        walk = self.coupling.walks["eval"]
        name = str(bias.target) if bias is not None and bias.op == "get_attr" else None
        if name is not None and walk.is_alone(name):
            old = self.values.get(name, self.coupling.tensors[name]).detach().cpu()
            self.values[name] = (old.double() + delta).to(old.dtype)
            return
        assert reader.table is not None
        name = _free_name(self.traced, reader, "bias")
        # calls of a shared layer each have a bias of their own
        shared = reader.source is None or len(_readers_of(self.coupling, reader.source)) > 1
        self.added[name] = reader.node.name if shared else str(reader.source)
        value = delta.reshape(_shape_of_bias(reader))
        value = value if bias is None else value + evaluate(self.traced, bias).double().cpu()
        result = reader.node.meta["val"]
        add_bias(self.traced, self.coupling, reader, twin, name, value.to(result.device, result.dtype))


def _like(view: Tensor, base: Tensor, copy: Tensor) -> Tensor:
    """The view of `copy` that `view` is of `base`."""
    offset = view.storage_offset() - base.storage_offset() + copy.storage_offset()
    return copy.as_strided(view.shape, view.stride(), offset)


def _free_name(traced: TracedModule, reader: Reader, wanted: str) -> str:
    """The name of a bias, or of a map of positions, that the layer does not have yet."""
    path = reader.source.rpartition(".")[0] if reader.source else ""
    owner = traced.get_submodule(path)
    attribute, number = wanted, 0
    while getattr(owner, attribute, None) is not None:
        number += 1
        attribute = f"folded_{wanted}_{number}"
    return join(path, attribute)


def add_zero_biases(traced: TracedModule, coupling: Coupling, plan: ChannelPlan) -> None:
    """Create the biases that a stored plan lists, as zeros: what is folded into them depends on the values.

    Raises:
        FinalizeError: it cannot be told to which call of a shared layer one of them belongs.
    """
    layers: dict[str, list[tuple[Reader, Reader | None]]] = {}
    for reader, twin in coupling.readers():
        for layer in {reader.source, reader.node.name} - {None}:
            if reader.rows is not None:
                layers.setdefault(str(layer), []).append((reader, twin))
    wanted: dict[str, list[str]] = {}
    for name, layer in plan.added.items():
        wanted.setdefault(layer, []).append(name)
    for name, layer in plan.added.items():
        if layer not in layers:
            continue
        if len(layers[layer]) not in (1, len(wanted[layer])):
            raise FinalizeError(
                f"`{name}` belongs to one of {len(layers[layer])} calls of `{layer}`, and the plan does not say to "
                "which. Load the file without the model, or save it again."
            )
        reader, twin = layers[layer][wanted[layer].index(name) if len(layers[layer]) > 1 else 0]
        like = coupling.tensors[reader.source] if reader.source else reader.node.meta["val"]
        bias = reader.bias.node
        zeros = torch.zeros(_shape_of_bias(reader), dtype=like.dtype, device=like.device)
        value = zeros if bias is None else evaluate(traced, bias)
        add_bias(traced, coupling, reader, twin, name, value.clone())


def add_bias(
    traced: TracedModule, coupling: Coupling, reader: Reader, twin: Reader | None, name: str, value: Tensor
) -> None:
    """Give a layer the bias `value`, held under `name`, in every graph."""
    owner, attribute = locate(traced, name)
    parameter = nn.Parameter(value)
    owner.register_parameter(attribute, parameter)
    coupling.tensors[name] = parameter
    coupling.parameters[name] = _ids_of_bias(reader)
    axes = tuple(ONE if ids is None else Axis.of(ids) for ids in _ids_of_bias(reader))
    for each in (reader, twin):
        if each is not None:
            walk = next(walk for walk in coupling.walks.values() if walk.graph is each.node.graph)
            _read_bias(each, name, walk.env, Value(axes), tuple(value.shape))


def _ids_of_bias(reader: Reader) -> list[Vector | None]:
    """The ids of the axes of what a reader's rows can be added to."""
    if reader.bias.ids is not None:
        return list(reader.bias.ids)
    assert reader.rows is not None
    return [reader.rows.reshape(-1) if reader.rows.size > 1 else None]


def _shape_of_bias(reader: Reader) -> list[int]:
    return [1 if ids is None else len(ids) for ids in _ids_of_bias(reader)]


def _readers_of(coupling: Coupling, source: str) -> list[Reader]:
    """The readers of a parameter in the eval graph."""
    return [reader for reader in coupling.walks["eval"].readers if reader.source == source]


def _read_bias(reader: Reader, name: str, env: dict[fx.Node, Result], value: Value, shape: tuple[int, ...]) -> None:
    """Let the call of a reader add the parameter `name`."""
    node = reader.node
    with node.graph.inserting_before(node):
        read = node.graph.get_attr(name)
    read.meta["val"], env[read] = resized(node.meta["val"], shape), value
    if reader.bias.argument is not None:
        set_argument(node, reader.bias.argument, read)
        return
    # only products of matrices have no place for a bias
    with node.graph.inserting_after(node):
        total = node.graph.call_function(torch.ops.aten.add.Tensor, (node, read))
    total.meta, env[total] = dict(node.meta), env[node]
    node.replace_all_uses_with(total, delete_user_cb=lambda user: user is not total)
