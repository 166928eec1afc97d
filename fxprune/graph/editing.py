"""Reading and editing the graphs of a traced module: names, parameter reads, evaluation, regions, text."""

from __future__ import annotations

import contextlib
import difflib
import fnmatch
import operator
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import fx, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from fxprune.errors import FinalizeError, NameLookupError

_aten = torch.ops.aten


def locate(root: nn.Module, target: str) -> tuple[nn.Module, str]:
    """The module that holds `target` (a dotted path) and the last part of its name; raises AttributeError."""
    path, _, attribute = target.rpartition(".")
    return root.get_submodule(path), attribute


def tensor_at(root: nn.Module, target: str) -> torch.Tensor:
    """The parameter or buffer that a `get_attr` node with this target reads."""
    owner, attribute = locate(root, target)
    value = getattr(owner, attribute)
    assert isinstance(value, torch.Tensor), target
    return value


_held: ContextVar[dict[nn.Module, list[str]] | None] = ContextVar("names of modules", default=None)


@contextlib.contextmanager
def hold_names(root: nn.Module) -> Iterator[None]:
    """Look up once where the modules of `root` stand, for work on many parameters that moves no module."""
    names: dict[nn.Module, list[str]] = {}
    for name, module in root.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    token = _held.set(names)
    try:
        yield
    finally:
        _held.reset(token)


def names_of(root: nn.Module, owner: nn.Module) -> list[str]:
    """Every dotted path under which `owner` stands in `root` (a shared module has several)."""
    held = _held.get()
    if held and root in held and owner in held:
        return held[owner]
    return [name for name, module in root.named_modules(remove_duplicate=False) if module is owner]


def canonical(root: nn.Module, name: str) -> str:
    """The first of a parameter's dotted names where its module stands in several places; an unknown name as it is."""
    try:
        owner, attribute = locate(root, name)
    except AttributeError:
        return name
    path = names_of(root, owner)[0]
    return f"{path}.{attribute}" if path else attribute


def module_path(node: fx.Node) -> str:
    """The path of the source module that a node was captured in, '' at the root or where it is not known."""
    stack = node.meta.get("nn_module_stack")
    return str(list(stack.values())[-1][0]) if stack else ""


def describe(node: fx.Node) -> str:
    """A node as error messages name it: name, operator, module path."""
    where = module_path(node)
    return f"`{node.name}` ({node.target}{f' in {where}' if where else ''})"


def exists(root: nn.Module, target: str) -> bool:
    """Whether a parameter, buffer or module stands under this name."""
    try:
        owner, attribute = locate(root, target)
        getattr(owner, attribute)
    except AttributeError:
        return False
    return True


def match_names(names: Iterable[str], pattern: str, kind: str = "parameter") -> list[str]:
    """The names that `pattern` (exact, or with the wildcards * ? [seq]) stands for.

    Raises:
        NameLookupError: nothing matches; the message lists near names.
    """
    names = list(dict.fromkeys(names))
    if not isinstance(pattern, str):
        raise NameLookupError(f"a {kind} is named by a string such as 'conv1.weight', got {type(pattern).__name__}.")
    found = [name for name in names if name == pattern] or fnmatch.filter(names, pattern)
    if not found:
        near = [n for n in names if n.endswith("." + pattern) or n.startswith(pattern + ".")]
        near = near or difflib.get_close_matches(pattern, names, 5, 0.5) or names[:5]
        why = f"{len(near)} names end or begin with it" if len(near) > 1 else "no such name"
        raise NameLookupError(f"{kind} {pattern!r}: {why}. Did you mean {', '.join(map(repr, near[:8]))}?")
    return found


def one_name(names: Iterable[str], pattern: str, kind: str = "parameter") -> str:
    """The single name that `pattern` stands for; raises NameLookupError for none and for several."""
    found = match_names(names, pattern, kind)
    if len(found) > 1:
        raise NameLookupError(
            f"{kind} {pattern!r} is ambiguous here, it matches {len(found)}: {', '.join(found[:8])}. Name one of them."
        )
    return found[0]


def is_mutating(node: fx.Node) -> bool:
    """Whether the operator writes into one of its arguments."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def written(node: fx.Node) -> list[fx.Node]:
    """The argument nodes that a mutating operator writes into."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return []
    found = []
    for i, argument in enumerate(node.target._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = node.args[i] if i < len(node.args) else node.kwargs.get(argument.name)
            found += [v for v in (value if isinstance(value, list | tuple) else [value]) if isinstance(v, fx.Node)]
    return found


def closure(node: fx.Node) -> list[fx.Node]:
    """`node` and everything it is computed from, in graph order."""
    seen, stack = {node}, [node]
    while stack:
        fresh = [n for n in stack.pop().all_input_nodes if n not in seen]
        seen.update(fresh)
        stack += fresh
    return sorted(seen)


def evaluate(root: nn.Module, node: fx.Node) -> torch.Tensor:
    """The value of a node that depends on parameters and buffers alone.

    Raises:
        FinalizeError: the value depends on an input, on random numbers, or needs a buffer to be written.
    """
    values: dict[fx.Node, Any] = {}
    with torch.no_grad():
        for step in closure(node):
            if step.op == "get_attr":
                values[step] = tensor_at(root, str(step.target))
                continue
            tags = getattr(step.target, "tags", ())
            if step.op != "call_function" or is_mutating(step) or torch.Tag.nondeterministic_seeded in tags:
                raise FinalizeError(
                    f"{describe(node)} was to be folded into a parameter, but it depends on {describe(step)}, which is "
                    "an input, random, or writes a buffer. Such an expression has no constant value."
                )
            args, kwargs = fx.node.map_arg((step.args, step.kwargs), values.__getitem__)
            values[step] = step.target(*args, **kwargs)  # type: ignore[operator]
    result = values[node]
    assert isinstance(result, torch.Tensor)
    return result


def splice(graph: fx.Graph, source: fx.Graph, rename: Callable[[str], str]) -> list[fx.Node]:
    """Copy the nodes of `source` (a graph without inputs) to the insertion point; returns its flat outputs."""
    copied: dict[fx.Node, fx.Node] = {}
    for node in source.nodes:
        if node.op == "output":
            return [copied[out] for out in node.all_input_nodes]
        copied[node] = graph.node_copy(node, copied.__getitem__)
        if node.op == "get_attr":
            copied[node].target = rename(str(node.target))
        if origin := node.meta.get("fxprune"):
            copied[node].meta["fxprune"] = origin | {"parameter": rename(origin["parameter"])}
    raise AssertionError("a graph without output")


def inline_no_grad_regions(graph: fx.Graph, submodules: nn.Module) -> None:
    """Replace `wrap_with_set_grad_enabled` regions by their nodes, gradients cut by `detach` at the entry.

    Inside a region without gradients every value is detached from what it was computed from, so detaching what
    enters it is the same; buffers enter as they are, which keeps their updates visible as nodes that write them.
    """
    region = torch.ops.higher_order.wrap_with_set_grad_enabled
    for node in list(graph.find_nodes(op="call_function", target=region)):
        enabled, body, *operands = node.args
        inner = getattr(submodules, str(body.target))
        with graph.inserting_before(node):
            if not enabled:
                operands = [_detached(graph, operand, submodules) for operand in operands]
            values = dict(zip(inner.graph.find_nodes(op="placeholder"), operands, strict=True))
            for step in inner.graph.nodes:
                if step.op == "output":
                    outputs = fx.node.map_arg(step.args[0], values.__getitem__)
                elif step.op != "placeholder":
                    values[step] = graph.node_copy(step, values.__getitem__)
        for user in list(node.users):
            assert user.target is operator.getitem
            user.replace_all_uses_with(outputs[user.args[1]])
            graph.erase_node(user)
        graph.erase_node(node)
        if not body.users:
            graph.erase_node(body)


def _detached(graph: fx.Graph, operand: Any, root: nn.Module) -> Any:
    if not isinstance(operand, fx.Node) or not isinstance(operand.meta.get("val"), torch.Tensor):
        return operand
    if operand.op == "get_attr" and not operand.meta["val"].requires_grad:
        return operand
    detached = graph.call_function(_aten.detach.default, (operand,))
    detached.meta = dict(operand.meta)
    return detached


def erase_dead(graph: fx.Graph, removed: Callable[[str], bool] = lambda target: False) -> bool:
    """Erase nodes without users and without effect; a write to a buffer whose target is `removed` is no effect.

    The value of a reparametrized parameter stays, read or not: it is what the parameter folds to. What reads a removed
    target goes, random or not.
    """
    changed = False
    for node in reversed(list(graph.nodes)):
        if node.users or node.op in ("placeholder", "output") or "fxprune" in node.meta:
            continue
        if targets := written(node):
            dead = all(_root_buffer(t, removed) for t in targets)
        else:
            dead = not node.is_impure() or any(n.op == "get_attr" and removed(str(n.target)) for n in closure(node))
        if dead:
            graph.erase_node(node)
            changed = True
    return changed


def _root_buffer(node: fx.Node, removed: Callable[[str], bool]) -> bool:
    if node.op in ("get_attr", "placeholder"):
        return node.op == "get_attr" and removed(str(node.target))
    inputs = written(node) or (node.all_input_nodes[:1] if not is_mutating(node) else [])
    # a fresh value that only dead code sees may be written to as well
    return all(_root_buffer(n, removed) for n in inputs) if inputs else True


def flop_counter() -> FlopCounterMode:
    """torch's counter of floating-point operations, with the formula it lacks for attention on CPU."""

    def attention(q: Any, k: Any, v: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
        return int(sdpa_flop_count(q, k, v))

    return FlopCounterMode(display=False, custom_mapping={_aten._scaled_dot_product_flash_attention_for_cpu: attention})


def text(graph: fx.Graph) -> str:
    """A graph as stable text, one node a line: `%name = operator(arguments)`; what a pass inserted says so."""

    def lines() -> Iterator[str]:
        for node in graph.nodes:
            origin = node.meta.get("fxprune")
            note = f"  # {origin['pass']}: {origin['parameter']}" if origin else ""
            if node.op in ("placeholder", "get_attr"):
                yield f"%{node.name} = {node.op}[{node.target}]{note}"
            elif node.op == "output":
                yield f"return {node.args[0]}"
            else:
                arguments = [str(a) for a in node.args] + [f"{k}={v}" for k, v in node.kwargs.items()]
                yield f"%{node.name} = {node.target}({', '.join(arguments)}){note}"

    return "\n".join(lines()) + "\n"
