"""Train and eval mode of one module below a traced one, and its numbers, as edits of the graphs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn

from fxprune.errors import ArgumentError, CaptureError
from fxprune.graph.metadata import module_path
from fxprune.graph.provenance import Provenance, provenance_of, set_provenance

aten = torch.ops.aten
_MODES = ("training", "train", "use_input_stats")  # what schemas call it
_SHARE = ("dropout_p",)
_OPTIONS = ("p", "momentum", "eps")
_DROPOUTS = (
    aten.dropout, aten.dropout_, aten.feature_dropout, aten.feature_dropout_, aten.alpha_dropout, aten.alpha_dropout_,
    aten.feature_alpha_dropout, aten.feature_alpha_dropout_,
)  # fmt: skip
_DEPENDENT = (
    nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, nn.Dropout, nn.Dropout1d, nn.Dropout2d,
    nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout,
)  # fmt: skip
_FROZEN, _SET = "frozen", "set"  # among the options of a provenance, which checkpoints keep


def is_frozen(module: nn.Module | Provenance) -> bool:
    """Whether a part was switched to eval mode by itself."""
    return _FROZEN in _options(module)


@dataclass(frozen=True)
class Selection:
    """A part and all below it.

    Attributes:
        paths: their names, all of each.
        modules: the modules.
        name: the part's first name.
    """

    paths: frozenset[str]
    modules: tuple[nn.Module, ...]
    name: str

    @classmethod
    def of(cls, root: nn.Module, part: nn.Module, *, below: bool = True) -> Selection:
        """What belongs to `part`, where it stands below `root`; without `below` the part alone."""
        modules = tuple(part.modules()) if below else (part,)
        ids = {id(module) for module in modules}
        named = list(root.named_modules(remove_duplicate=False))
        paths = frozenset(path for path, module in named if id(module) in ids)
        name = next((path for path, module in named if module is part), "")
        return cls(paths, modules, name)

    def nodes(self, graph: fx.Graph) -> Iterator[fx.Node]:
        """The calls that were captured in these modules, not in what they call elsewhere."""
        for node in graph.nodes:
            if node.op == "call_function" and _owner(node) in self.paths:
                yield node


def switch(root: nn.Module, graphs: Mapping[str, fx.Graph], part: nn.Module, mode: bool) -> None:
    """Let the train graph compute a part as in train mode or as in eval mode; see `TracedModule.switch`.

    Raises:
        CaptureError: the train graph cannot express it. Nothing has changed then.
    """
    chosen = Selection.of(root, part)
    graph = graphs.get("train")
    if graph is None:
        if mode:
            raise CaptureError(f"{chosen.name!r} was to be in train mode, which was not captured.")
        return
    nodes = list(chosen.nodes(graph))
    if not nodes and issubclass(provenance_of(part).source_class, _DEPENDENT):
        raise _inexpressible(chosen, mode, "the train graph has no call of it that is known as such")
    before = [(node, node.args, node.kwargs) for node in nodes]
    shares = _dropped_shares(chosen)
    for node in nodes:
        if (share := _switch_call(node, mode, shares)) is not None:
            shares[node.name] = share
    if not mode and (difference := _difference(chosen, graphs)):
        for node, args, kwargs in before:
            node.args, node.kwargs = args, kwargs
        raise _inexpressible(chosen, mode, difference)
    for module in chosen.modules:
        known = provenance_of(module)
        options = {name: value for name, value in known.options.items() if name != _FROZEN}
        set_provenance(module, replace(known, options=options if mode else options | {_FROZEN: shares}))


def _dropped_shares(chosen: Selection) -> dict[str, float]:
    """By call what attention dropped before it was switched off."""
    shares: dict[str, float] = {}
    for module in chosen.modules:
        shares |= provenance_of(module).options.get(_FROZEN, {})
    return shares


def set_option(root: nn.Module, graphs: Mapping[str, fx.Graph], part: nn.Module, name: str, value: Any) -> None:
    """Set the share that a dropout drops, or the momentum or epsilon of a norm, in every graph.

    Raises:
        CaptureError: the part has no such number in the graphs. ArgumentError: the value is none for it.
    """
    chosen = Selection.of(root, part, below=False)
    nodes = [node for graph in graphs.values() for node in chosen.nodes(graph)] if name in _OPTIONS else []
    nodes = [node for node in nodes if _position(node, (name,)) is not None]
    if not nodes:
        raise CaptureError(
            f"{chosen.name}.{name} was to be set on a traced module, whose graphs have what was captured. Set it on "
            "the eager model before fxprune.trace. What acts on the graphs: p of dropouts, momentum and eps of norms, "
            "train(), eval(), requires_grad_() and values of parameters and buffers."
        )
    if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0 or (name == "p" and value > 1):
        wanted = "a number from 0 to 1" if name == "p" else "a number that is not negative"
        raise ArgumentError(f"{chosen.name}.{name}={value!r}: {wanted} is needed.")
    for node in nodes:
        _set(node, (name,), float(value))
    known = provenance_of(part)
    present = known.options.get(_SET, {})
    set_provenance(part, replace(known, options={**known.options, _SET: {**present, name: float(value)}}))


def read_option(root: nn.Module, graphs: Mapping[str, fx.Graph], part: nn.Module, name: str) -> float | None:
    """The number that `set_option` sets; None where the graphs have none, or several."""
    if name not in _OPTIONS:
        return None
    chosen = Selection.of(root, part, below=False)
    values = (_get(node, name) for graph in graphs.values() for node in chosen.nodes(graph))
    found = {value for value in values if value is not None}
    return float(found.pop()) if len(found) == 1 else None


def set_options(module: nn.Module | Provenance) -> Mapping[str, float]:
    """The numbers that were set on a part since the capture."""
    found: Mapping[str, float] = _options(module).get(_SET, {})
    return found


def _options(module: nn.Module | Provenance) -> Mapping[str, Any]:
    return (module if isinstance(module, Provenance) else provenance_of(module)).options


def _inexpressible(chosen: Selection, mode: bool, why: str) -> CaptureError:
    return CaptureError(
        f"{chosen.name!r} was to be in {'train' if mode else 'eval'} mode by itself, which its train graph cannot "
        f"express: {why}. Put the module into that mode for good before fxprune.trace (a train method that does "
        "nothing, or forward without its mode), and trace again."
    )


def _switch_call(node: fx.Node, mode: bool, shares: Mapping[str, float]) -> float | None:
    """Let one call compute as in train mode or as in eval mode; returns the share that attention no longer drops."""
    if node.target is aten.add_.Tensor:
        if _counts_batches(node):
            node.update_arg(1, int(mode))
    elif _position(node, _MODES) is not None:
        if _needs_no_batch(node):
            _set(node, _MODES, mode)
    elif _position(node, _SHARE) is not None and (not mode or node.name in shares):
        dropped = float(_set(node, _SHARE, shares.get(node.name, 0.0) if mode else 0.0))
        return dropped if dropped and not mode else None
    return None


def _counts_batches(node: fx.Node) -> bool:
    counter = node.args[0]
    return isinstance(counter, fx.Node) and str(counter.target).rpartition(".")[2] == "num_batches_tracked"


def _needs_no_batch(node: fx.Node) -> bool:
    """Whether a call has statistics of its own for eval mode, or needs none."""
    position = _position(node, ("running_mean",))
    return position is None or isinstance(node.args[position], fx.Node)


def _difference(chosen: Selection, graphs: Mapping[str, fx.Graph]) -> str:
    """In what the train graph of a part that was switched off differs from its eval graph; empty where in nothing."""
    if "eval" not in graphs:
        return ""
    trained, evaluated = ([_call(n) for n in chosen.nodes(graphs[mode]) if _acts(n)] for mode in ("train", "eval"))
    for (node, found), (_, wanted) in zip(trained, evaluated, strict=False):
        if found != wanted:
            return f"{node.format_node()} does not depend on the mode alone"
    if len(trained) != len(evaluated):
        return "its forward runs other operators in train mode"
    return ""


def _acts(node: fx.Node) -> bool:
    """Whether a call changes a value: counters and dropouts that are off do not."""
    if node.target is aten.add_.Tensor and _counts_batches(node):
        return False
    is_dropout = getattr(node.target, "overloadpacket", None) in _DROPOUTS
    return not (is_dropout and not node.args[2])


def _call(node: fx.Node) -> tuple[fx.Node, Any]:
    """A call, and what is comparable of it between two graphs."""
    schema = getattr(node.target, "_schema", None)
    given: dict[Any, Any] = {**dict(enumerate(node.args)), **node.kwargs}
    if schema is not None:  # one may be given as it is by default
        names = {argument.name: position for position, argument in enumerate(schema.arguments)}
        given = {names.get(key, key): value for key, value in given.items()}
        defaults = {i: a.default_value for i, a in enumerate(schema.arguments) if a.has_default_value()}
        given = {key: value for key, value in given.items() if key not in defaults or defaults[key] != value}
    return node, (node.target, fx.node.map_arg(given, lambda operand: operand.op))


def batch_norms(graph: fx.Graph) -> list[str]:
    """The paths of the batch norms with running statistics, in order."""
    found = (node for node in graph.nodes if node.target is aten.batch_norm.default)
    return list(dict.fromkeys(_owner(node) for node in found if isinstance(node.args[3], fx.Node)))


def _owner(node: fx.Node) -> str:
    """The path of the module that a node belongs to: that of its statistics, where it has some."""
    for operand in node.all_input_nodes if node.target in (aten.batch_norm.default, aten.add_.Tensor) else ():
        owner, _, tensor = str(operand.target).rpartition(".")
        if operand.op == "get_attr" and tensor in ("running_mean", "num_batches_tracked"):
            return owner
    return module_path(node)


def _position(node: fx.Node, names: Iterable[str]) -> int | None:
    """Where a call has an argument of one of these names, None where it has none."""
    schema = getattr(node.target, "_schema", None)
    for position, argument in enumerate(() if schema is None else schema.arguments):
        if argument.name in names:
            return position
    return None


def _get(node: fx.Node, name: str) -> float | None:
    """The number that a call has under this name; None where it has none."""
    position = _position(node, (name,))
    if position is None:
        return None
    argument = node.target._schema.arguments[position]  # type: ignore[union-attr]
    value = node.args[position] if position < len(node.args) else node.kwargs.get(name, argument.default_value)
    return value if isinstance(value, int | float) else None


def _set(node: fx.Node, names: Iterable[str], value: Any) -> Any:
    """Give a call another argument; returns the one it had."""
    position = _position(node, names)
    assert position is not None
    argument = node.target._schema.arguments[position]  # type: ignore[union-attr]
    if position < len(node.args):
        old = node.args[position]
        node.update_arg(position, value)
        return old
    old = node.kwargs.get(argument.name, argument.default_value)
    node.update_kwarg(argument.name, value)
    return old
