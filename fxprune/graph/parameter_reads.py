"""Where the graphs read parameters: looked up once for work on many of them, and replaced by expressions."""

from __future__ import annotations

from collections.abc import Callable

from torch import fx, nn

from fxprune.graph.error_sites import working_on
from fxprune.graph.metadata import module_calls, set_module_calls, tag
from fxprune.graph.names import locate


class ParameterReads:
    """The `get_attr` nodes of one graph by the tensor they read, under whichever of its names.

    One walk over modules and nodes serves any number of parameters. What is looked up is as of construction, so the
    reads of a parameter whose nodes were replaced are gone from the graph; those of the others are as they were.

    Args:
        root: the module whose tensors the graph reads.
        graph: the graph.

    Example:
        >>> ParameterReads(traced, traced.graph).nodes("0.weight")
        [_0_weight]
    """

    def __init__(self, root: nn.Module, graph: fx.Graph) -> None:
        self._root = root
        self._paths: dict[nn.Module, set[str]] = {}
        for path, module in root.named_modules(remove_duplicate=False):
            self._paths.setdefault(module, set()).add(path)
        owners = {path: module for module, paths in self._paths.items() for path in paths}
        self._nodes: dict[tuple[nn.Module, str], list[fx.Node]] = {}
        for node in graph.find_nodes(op="get_attr"):
            path, _, attribute = str(node.target).rpartition(".")
            if path in owners:
                self._nodes.setdefault((owners[path], attribute), []).append(node)

    def nodes(self, target: str) -> list[fx.Node]:
        """The nodes that read the tensor of this name, in graph order."""
        return self._nodes.get(locate(self._root, target), [])

    def calls(self, target: str) -> list[list[fx.Node]]:
        """The users of a parameter, one list for each call of the module that holds it, in graph order.

        Eager evaluates a reparametrization once per call of its module; users that the capture places outside the
        module's own calls count as one read.
        """
        owner, _ = locate(self._root, target)
        paths = self._paths[owner]
        found: dict[str, list[fx.Node]] = {}
        for user in sorted({user for read in self.nodes(target) for user in read.users}):
            with working_on(user):
                stack = module_calls(user)
                call = next((key for key, (path, _) in reversed(stack.items()) if path in paths), "")
            found.setdefault(call, []).append(user)
        return list(found.values())


def replace_reads(
    graph: fx.Graph,
    calls: list[list[fx.Node]],
    found: list[fx.Node],
    build: Callable[[fx.Graph], fx.Node],
    origin: dict[str, str],
    inner: str = "",
) -> None:
    """Let the users of each call read a newly built expression instead of the `get_attr` nodes in `found`.

    The expression stands before the call's first user, which is where eager computes it. `origin` marks its result;
    `inner` is the path of the module that the expression is a call of, where it is one.
    """
    for users in calls:
        with working_on(users[0]):
            _read_expression(graph, users, found, build, origin, inner)
    for read in found:
        graph.erase_node(read)


def _read_expression(
    graph: fx.Graph,
    users: list[fx.Node],
    found: list[fx.Node],
    build: Callable[[fx.Graph], fx.Node],
    origin: dict[str, str],
    inner: str,
) -> None:
    last = users[0].prev
    with graph.inserting_before(users[0]):
        result = build(graph)
    stack = module_calls(users[0])
    if inner:
        stack[f"{next(reversed(stack), '')}.{inner}"] = (inner, "torch.nn.utils.parametrize.ParametrizationList")
    while (last := last.next) is not users[0]:
        set_module_calls(last, stack)
    tag(result, origin)
    if found:
        result.meta["val"] = found[0].meta.get("val")
    for user in users:
        for read in found:
            user.replace_input_with(read, result)
