"""Which operators write into what they are given, and which draw random numbers."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import fx

from fxprune.torch_internals import OpOverload, is_composite, schema_of

_aten = torch.ops.aten
# They update running statistics where this argument is true, which their schemas do not say.
_UNDECLARED = {
    _aten.batch_norm.default: "training",
    _aten.instance_norm.default: "use_input_stats",
}
# Composed of others, as views are; yet what they return is never memory of an operand.
_NEW_MEMORY = frozenset((
    _aten.linear.default, _aten.matmul.default, _aten.conv1d.default, _aten.conv2d.default, _aten.conv3d.default,
    _aten.conv1d.padding, _aten.conv2d.padding, _aten.conv3d.padding, _aten.conv_transpose1d.default,
    _aten.conv_transpose2d.input, _aten.conv_transpose3d.input, _aten.batch_norm.default, _aten.instance_norm.default,
    _aten.group_norm.default, _aten.layer_norm.default, _aten.rms_norm.default, _aten.softmax.int,
    _aten.log_softmax.int, _aten.scaled_dot_product_attention.default, _aten.max_pool1d.default,
    _aten.max_pool2d.default, _aten.max_pool3d.default, _aten.avg_pool1d.default,
    _aten.lstm.input, _aten.gru.input,
))  # fmt: skip


def is_mutating(node: fx.Node) -> bool:
    """Whether the operator declares that it writes into one of its arguments."""
    schema = schema_of(node.target)
    return schema is not None and bool(schema.is_mutable)


def may_write(node: fx.Node) -> bool:
    """Whether running the operator can change one of its arguments, declared or not."""
    return is_mutating(node) or _updates_statistics(node)


def _updates_statistics(node: fx.Node) -> bool:
    """Whether a norm may write running statistics."""
    schema = schema_of(node.target)
    if node.target not in _UNDECLARED or schema is None:
        return False
    at = [argument.name for argument in schema.arguments].index(_UNDECLARED[node.target])
    return node.kwargs.get(_UNDECLARED[node.target], node.args[at] if at < len(node.args) else None) is not False


def draws(node: fx.Node) -> bool:
    """Whether a call draws random numbers: one that can, and that is not off, as a dropout in eval mode is."""
    if torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ()):
        return False
    schema = schema_of(node.target)
    assert schema is not None, node
    given = {a.name: a.default_value for a in schema.arguments if a.has_default_value()}
    given |= dict(zip((a.name for a in schema.arguments), node.args, strict=False)) | dict(node.kwargs)
    is_off = given.get("train", given.get("training")) is False
    return not is_off and 0 not in (given.get("p"), given.get("dropout_p"))


def written(node: fx.Node) -> list[fx.Node]:
    """The argument nodes that a mutating operator writes into."""
    schema = schema_of(node.target)
    found: list[fx.Node] = []
    for i, argument in enumerate(schema.arguments if schema is not None else ()):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = node.args[i] if i < len(node.args) else node.kwargs.get(argument.name)
            found += [v for v in (value if isinstance(value, list | tuple) else [value]) if isinstance(v, fx.Node)]
    return found


def written_into(value: fx.Node) -> fx.Node:
    """The tensor that `value` is, through in-place operators, which return what they wrote into."""
    while _returns_what_it_wrote(value):
        value = written(value)[0]
    return value


def _returns_what_it_wrote(node: fx.Node) -> bool:
    schema = schema_of(node.target)
    results = schema.returns if schema is not None else []
    return len(results) == 1 and results[0].alias_info is not None and bool(results[0].alias_info.is_write)


def written_state(graph: fx.Graph) -> list[str]:
    """The names of the parameters and buffers that a graph may write into, through views as well."""
    memory = memory_of(target for node in graph.nodes for target in written(node))
    return [str(name) for name in dict.fromkeys(n.target for n in graph.nodes if n.op == "get_attr" and n in memory)]


def is_written_behind(node: fx.Node) -> bool:
    """Whether some node may write into the value of this one, through views of it as well."""
    seen, pending = {node}, [node]
    while pending:
        value = pending.pop()
        for user in value.users:
            if value in (written(user) or (user.all_input_nodes if may_write(user) else ())):
                return True
            if user not in seen and may_share_memory(user):
                seen.add(user)
                pending.append(user)
    return False


def memory_of(nodes: Iterable[fx.Node]) -> dict[fx.Node, list[fx.Node]]:
    """The nodes in whose memory the values of these may lie, these among them, each with those that it may have it of.

    What has it of none is where the memory comes from.
    """
    found: dict[fx.Node, list[fx.Node]] = {}
    pending = list(nodes)
    while pending:
        node = pending.pop()
        if node not in found:
            found[node] = memory_sources(node)
            pending += found[node]
    return found


def memory_sources(node: fx.Node) -> list[fx.Node]:
    """The operands in whose memory a node's value may lie."""
    return written(node) or (node.all_input_nodes if may_share_memory(node) else [])


def may_share_memory(node: fx.Node) -> bool:
    """Whether what a node gives may lie in the memory of an operand, as its schema says, or where that is not said.

    Operators that torch composes of others may give an operand back, as dropout does in eval mode.
    """
    if node.op != "call_function":
        return False
    if not isinstance(node.target, OpOverload):
        return True
    return _returns_memory_of_operand(node) or (is_composite(node.target) and node.target not in _NEW_MEMORY)


def _returns_memory_of_operand(node: fx.Node) -> bool:
    schema = schema_of(node.target)
    return schema is not None and bool(node.all_input_nodes) and any(result.alias_info for result in schema.returns)
