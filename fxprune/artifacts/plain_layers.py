"""Layers of torch in the place of those that standardize their weights, with the values that these have."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx, nn

from fxprune.channels.arguments import bound
from fxprune.channels.computed_weights import mixed_weights
from fxprune.errors import WriteBackError
from fxprune.graph.arguments import fixed_size
from fxprune.graph.configuration_numbers import configuration_of
from fxprune.graph.metadata import module_path
from fxprune.graph.names import ModulePaths, locate
from fxprune.graph.plan import ChannelPlan
from fxprune.graph.traced import TracedModule

aten = torch.ops.aten
_CONVOLUTIONS: dict[Any, type[nn.Module]] = {
    aten.conv1d.default: nn.Conv1d,
    aten.conv2d.default: nn.Conv2d,
    aten.conv3d.default: nn.Conv3d,
    aten.conv1d.padding: nn.Conv1d,
    aten.conv2d.padding: nn.Conv2d,
    aten.conv3d.padding: nn.Conv3d,
}
_PADDINGS = aten.pad.default, aten.constant_pad_nd.default


def plain_in_class(plain: TracedModule, model: nn.Module) -> tuple[list[str], dict[tuple[str, int], str]]:
    """The computed weights whose module does no more than one of torch's layers, given the values.

    None of a model that a configuration builds, which would compute them again.

    Returns:
        Their names; and of the others the axes whose channels stay, with the reason: rows of grouped convolutions, as
        what is read goes with them.
    """
    found, staying, paths = list[str](), dict[tuple[str, int], str](), ModulePaths(model)
    weights = mixed_weights(plain)
    is_built = bool(weights) and configuration_of(model) is not None
    for weight in weights:
        calls = _users(weight.nodes["eval"])
        if not is_built and _layer(paths, weight.name, calls) is not None:
            found.append(weight.name)
        elif any(bound(call).get("groups", 1) != 1 for call in calls):
            staying[weight.name, 0] = f"{weight.name} is standardized over all that is read, in groups"
    return found, staying


def put_plain_layers(copied: nn.Module, final: TracedModule) -> None:
    """Give a copy of the model layers of torch, of the sizes before, where weights are plain ones in `final`.

    Raises:
        WriteBackError: a module does more than such a layer.
    """
    paths, plan = ModulePaths(copied), final.plan or ChannelPlan()
    reads = final.graphs["eval"].find_nodes(op="get_attr")
    for name in plan.held:
        layer = _layer(paths, name, _users([node for node in reads if node.target == name]))
        owner, _ = locate(copied, name)
        if layer is None:
            raise WriteBackError(
                f"{name.rpartition('.')[0] or 'the root module'} ({type(owner).__name__}) standardizes its weight over "
                "all that is read, of which some went: what it would compute from the rest is something else, and it "
                "does more than one of torch's layers, which could take its place. Choose channels with "
                "prune.channels(..., runnable=model), or store the finalized module: fxprune.save(final, path), and "
                "fxprune.load(path)."
            )
        for path in paths.of(owner):
            around, _, own = path.rpartition(".")
            setattr(copied.get_submodule(around), own, layer)


def _users(nodes: Sequence[fx.Node]) -> list[fx.Node]:
    return [user for node in nodes for user in node.users]


def _layer(paths: ModulePaths, name: str, calls: Sequence[fx.Node]) -> nn.Module | None:
    """The layer of torch that computes what the module does which holds a weight; None where it does more.

    Args:
        paths: of the model. name: of the weight. calls: that read it.
    """
    owner, attribute = locate(paths.root, name)
    weight = getattr(owner, attribute, None)
    own = paths.of(owner)
    if attribute != "weight" or not isinstance(weight, nn.Parameter) or "" in own or not calls:
        return None
    if owner._forward_hooks or owner._forward_pre_hooks or not isinstance(owner, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return None
    found = [_options(call, own) for call in calls]
    if found[0] is None or any(options != found[0] for options in found[1:]):
        return None
    kind, options = found[0]
    rows, columns, *kernel = weight.shape
    bias = owner._parameters.get("bias")
    options["groups"] = owner.groups  # of the model, where the calls are of what is left
    layer = kind(columns * owner.groups, rows, tuple(kernel), bias=bias is not None, device="meta", **options)
    layer._parameters["weight"], layer._parameters["bias"] = weight, bias
    return layer.train(owner.training)


def _options(call: fx.Node, paths: Sequence[str]) -> tuple[type[nn.Module], dict[str, Any]] | None:
    """The class of a layer and how it convolves, where a call is all that modules of these paths do."""
    kind = _CONVOLUTIONS.get(call.target)
    if kind is None or module_path(call) not in paths or any(_is_within(user, paths) for user in call.users):
        return None
    given = bound(call)
    added = given["bias"]
    if added is not None and (added.op != "get_attr" or str(added.target) not in [f"{path}.bias" for path in paths]):
        return None
    options = {name: _plain(given[name]) for name in ("stride", "padding", "dilation", "groups")}
    data = given["input"]
    if _is_within(data, paths):
        padding = _same_padding(data, call)
        if padding is None or _is_within(bound(data)["self"], paths) or any(options["padding"]):
            return None
        options["padding"] = padding
    return kind, options


def _same_padding(padded: fx.Node, call: fx.Node) -> tuple[int, ...] | None:
    """The zeros on either side of each axis, where a call pads by as many as let the size stay, at every size."""
    if padded.target not in _PADDINGS or any(step != 1 for step in bound(call)["stride"]):
        return None
    given = bound(padded)
    if given.get("mode", "constant") != "constant" or given["value"] not in (None, 0):
        return None
    amounts, data = given["pad"], given["self"]
    pairs = list(zip(amounts[::2], amounts[1::2], strict=True))[::-1]
    before, after = (node.meta["val"].shape[2:] for node in (data, call))
    if len(pairs) != len(before) or any(fixed_size(first) is None or first != last for first, last in pairs):
        return None
    same = all(str(one) == str(other) for one, other in zip(before, after, strict=True))
    return tuple(first for first, _ in pairs) if same else None


def _is_within(node: fx.Node, paths: Sequence[str]) -> bool:
    """Whether a node belongs to modules of these paths, or to what they contain."""
    inside = module_path(node)
    return any(inside == path or inside.startswith(f"{path}.") for path in paths)


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list | tuple) else value
