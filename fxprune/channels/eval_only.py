"""Channels that are constant in eval mode alone: batch norms take statistics of the batch in train mode."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import fx

from fxprune.channels.axes import reduced_shape
from fxprune.channels.constants import Constant
from fxprune.channels.coupling import Coupling, walked
from fxprune.channels.ids import Ids, Mask, Vector
from fxprune.channels.readers import Reader
from fxprune.channels.registry import REGISTRY
from fxprune.channels.rules.normalization import BatchNorm, InstanceNorm
from fxprune.channels.values import Value, on_cpu
from fxprune.channels.walk import Result, Walk

_RELATIVE, _ABSOLUTE = 1e-5, 1e-6  # running statistics approach those of a constant channel, and need not arrive


@dataclass(frozen=True)
class EvalOnly:
    """What was to be removed and is constant in eval mode alone.

    Attributes:
        channels: by the path of a normalization its channels.
        classes: what must stay for these to stay.
        constants: the reads that no buffer must replace.
    """

    channels: Mapping[str, list[int]] = field(default_factory=dict)
    classes: Vector = field(default_factory=lambda: np.zeros(0, np.int64))
    constants: tuple[Constant, ...] = ()


@dataclass(frozen=True)
class _Norm:
    """A normalization that takes statistics of the batch in train mode.

    Attributes:
        path: of its module.
        node: its call in the eval graph.
        classes: of its channels.
        differs: by channel, whether it is a constant in eval mode, and another one in train mode: the shift alone.
    """

    path: str
    node: fx.Node
    classes: Vector
    differs: Mask


def find(coupling: Coupling, alive: Mask, reached: Collection[fx.Node], constants: Collection[Constant]) -> EvalOnly:
    """The channels that go, and are another constant, or none, to whoever reads them in train mode.

    Args:
        coupling: with facts of the eval graph.
        alive: the classes that stay.
        reached: the nodes that stay in the graphs.
        constants: the reads that a buffer is to replace.
    """
    norms = [norm for norm in _norms(coupling) if norm.differs.any()]
    if not norms or (not constants and all(alive[norm.classes[norm.differs]].all() for norm in norms)):
        return EvalOnly()
    train = _walk_of_training(coupling)
    classes = coupling.classes
    suspects = np.zeros(classes.count, bool)
    suspects[np.concatenate([norm.classes[norm.differs] for norm in norms])] = True
    suspects[classes.left[suspects[classes.whole]]] = True  # channels of which it is some pixels
    suspects[classes.whole[suspects[classes.left] | suspects[classes.right]]] = True
    flagged = np.zeros(classes.count, bool)
    for reader, twin in replace(coupling, walks={"eval": coupling.walks["eval"], "train": train}).readers():
        if reader.node in reached:
            columns = coupling.of(reader.columns)
            wrong = columns[_read_differently(reader, twin) & suspects[columns] & ~alive[columns]]
            flagged[wrong] = True
    edges = [edge for edge in constants if not _same_in(edge, coupling.walks["eval"], train)]
    above = _ancestors(coupling.walks["eval"], {edge.node for edge in edges})
    parts = flagged.copy()
    parts[classes.left[flagged[classes.whole]]] = True
    parts[classes.right[flagged[classes.whole]]] = True
    parts[classes.whole[flagged[classes.left]]] = True
    channels: dict[str, set[int]] = {}
    for norm in norms:
        found = norm.differs & (parts[norm.classes] | (norm.node in above))
        channels.setdefault(norm.path, set()).update(np.flatnonzero(found).tolist())
    named = {path: sorted(indices) for path, indices in channels.items() if indices}
    replaced = tuple(edge for edge in edges if any(norm.node in _ancestors_of(coupling, edge) for norm in norms))
    return EvalOnly(named, np.flatnonzero(flagged), replaced)


def pinned(coupling: Coupling, found: EvalOnly) -> Coupling:
    """The relations with what was found pinned."""
    classes = coupling.classes
    reason = np.where(classes.pinned, classes.reason, len(classes.reasons) + 1)
    reason[found.classes] = np.minimum(reason[found.classes], len(classes.reasons))
    reasons = [*classes.reasons, lambda: "constant in eval mode alone, and kept for training"]
    pins = [*classes.pins, (found.classes, None)]
    return replace(coupling, classes=replace(classes, reason=reason, reasons=reasons, pins=pins))


def _norms(coupling: Coupling) -> Iterator[_Norm]:
    """The normalizations by running statistics in the eval graph, by those of the batch in the train graph."""
    if "train" not in coupling.walks:
        return
    over_batch = {name for norm, name in _calls(coupling.walks["train"]) if norm.over_input}
    walk = coupling.walks["eval"]
    for norm, name in _calls(walk):
        ids, value = coupling.parameters.get(name, [None])[0], walk.env[norm.node]
        if name in over_batch and not norm.over_input and ids is not None:
            differs = _differs(walk, norm, value, len(ids))
            if norm.node in walk.maps and len(walk.maps[norm.node].where) == len(ids):
                differs = differs | walk.maps[norm.node].where.numpy()
            if norm.node in walk.means and walk.means[norm.node].where.numel() == len(ids):
                differs = differs | walk.means[norm.node].where.reshape(-1).numpy()
            yield _Norm(name.rpartition(".")[0], norm.node, coupling.of(ids), differs)


def _calls(walk: Walk) -> Iterator[tuple[BatchNorm | InstanceNorm, str]]:
    """The normalizations with running statistics, and the name of their mean."""
    for call in REGISTRY.calls(walk.graph):
        if isinstance(call, BatchNorm | InstanceNorm) and call.running_mean is not None:
            yield call, str(call.running_mean.target)


def _differs(walk: Walk, norm: BatchNorm | InstanceNorm, value: Result, count: int) -> Mask:
    """Which channels are known, and not the shift."""
    if not isinstance(value, Value) or value.facts is None:
        return np.zeros(count, bool)
    shape = reduced_shape(value.axes)
    known, constant = value.facts.where.expand(shape), value.facts.value.expand(shape)
    if known.numel() != count:  # other axes carry channels too
        return np.zeros(count, bool)
    shift = torch.zeros(count, dtype=torch.float64, device="cpu")
    if norm.bias is not None and (facts := walk.value(norm.bias).facts) is not None:
        shift = facts.value.double()
    same = torch.isclose(constant.reshape(-1).double(), shift, rtol=_RELATIVE, atol=_ABSOLUTE)
    found: Mask = (known.reshape(-1) & ~same).numpy()
    return found


def _walk_of_training(coupling: Coupling) -> Walk:
    """The walk over the train graph, constants followed through what train mode does to them."""
    ids = Ids()
    ids.size = len(coupling.classes.of)  # others than those of parameters
    with torch.no_grad(), on_cpu():
        return walked(coupling.walks["train"].graph, ids, coupling.stored, coupling.cached, True, training=True)


def _read_differently(reader: Reader, twin: Reader | None) -> Mask:
    """Which columns [groups, columns] a reader knows, and the same layer in the train graph knows as something else."""
    if reader.constant is None or twin is None:
        return np.zeros(reader.columns.shape, bool)
    used = reader.used.columns_of_rows()
    known: Mask = ~np.isnan(reader.constant) & used
    if twin.constant is not None:
        known = known & ~np.isclose(reader.constant, twin.constant, _RELATIVE, _ABSOLUTE)
    if reader.mapped is None or reader.maps is None:
        return known
    differ = reader.mapped & used
    if twin.mapped is not None and twin.maps is not None:
        same = np.isclose(reader.maps.values.numpy(), twin.maps.values.numpy(), _RELATIVE, _ABSOLUTE).all(0)
        differ = differ & ~(twin.mapped & same.reshape(differ.shape))
    return known | differ


def _same_in(edge: Constant, walk: Walk, train: Walk) -> bool:
    """Whether the train graph reads the same constant."""
    values = [next((v for n, v in each.env.items() if n.name == edge.node), None) for each in (walk, train)]
    facts = [value.facts if isinstance(value, Value) else None for value in values]
    if facts[0] is None or facts[1] is None or not facts[1].where.all():
        return False
    first, second = torch.broadcast_tensors(facts[0].value.double(), facts[1].value.double())
    return bool(torch.isclose(first, second, rtol=_RELATIVE, atol=_ABSOLUTE).all())


def _ancestors_of(coupling: Coupling, edge: Constant) -> set[fx.Node]:
    return _ancestors(coupling.walks["eval"], {edge.node})


def _ancestors(walk: Walk, names: set[str]) -> set[fx.Node]:
    """The nodes of these names, and all that they are computed from."""
    found: set[fx.Node] = set()
    for node in reversed(walk.graph.nodes):
        if node.name in names or node in found:
            found.add(node)
            found.update(node.all_input_nodes)
    return found
