"""Which calls of a graph are readers that can be refitted, and why the others are left alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxprune.channels.arguments import bound
from fxprune.channels.registry import REGISTRY, OperatorCall
from fxprune.channels.rules.contractions import Contraction
from fxprune.channels.rules.convolutions import Convolution
from fxprune.channels.rules.recurrent import Recurrent, RecurrentCell
from fxprune.graph.masks import named_by_mask, named_by_original, view
from fxprune.graph.names import ModulePaths, exists, tensor_at
from fxprune.graph.traced import TracedModule
from fxprune.prune.repair.layers import (
    CellReader,
    ConvolutionReader,
    MatrixReader,
    NormalizationReader,
    Reader,
    ReaderCall,
    RecurrentReader,
    TransposedReader,
)

aten = torch.ops.aten


@dataclass(frozen=True, eq=False)
class Stream:
    """What a reader's output is added to.

    Attributes:
        other: the other operand. norm: a batch norm that the output passes on the way. sum: the node that adds them.
    """

    other: fx.Node
    norm: fx.Node | None
    sum: fx.Node


@dataclass(frozen=True)
class Why:
    """Why a call is no reader to refit."""

    text: str


class Weights:
    """How the calls of a graph read parameters: plain or masked, permuted, once or several times."""

    def __init__(self, root: nn.Module, graph: fx.Graph) -> None:
        self.root = root
        self.paths = ModulePaths(root)
        self._readers: dict[int, set[fx.Node]] = {}
        for node in graph.find_nodes(op="get_attr"):
            if exists(root, str(node.target)):
                self._readers.setdefault(id(tensor_at(root, str(node.target))), set()).update(self.consumers(node))

    def consumers(self, node: fx.Node) -> Iterator[fx.Node]:
        """What reads a node's values, masked or with their axes in another order."""
        for user in node.users:
            if _permutation(user) is not None or mask_product(self.root, user) is not None:
                yield from self.consumers(user)
            else:
                yield user

    def readers(self, name: str) -> set[fx.Node]:
        """The calls that read a parameter, under whichever of its names."""
        return self._readers.get(id(view(self.root, name).original), set())

    def find_own(self, node: fx.Node, what: str) -> tuple[str, list[int]] | Why:
        """As `find`, of a parameter that one call alone reads."""
        found = self.find(node, what)
        if not isinstance(found, Why) and (count := len(self.readers(found[0]))) > 1:
            return Why(f"its {what} is used by {count} calls")
        return found

    def find(self, node: fx.Node, what: str) -> tuple[str, list[int]] | Why:
        """The parameter that a call reads by `node`, and the axes of it that the node's axes are."""
        order = list(range(len(node.meta["val"].shape)))
        while (permutation := _permutation(node)) is not None:
            order = [permutation[axis] for axis in order]
            node = node.all_input_nodes[0]
        product = mask_product(self.root, node)
        node = node if product is None else product
        if node.op != "get_attr" or not isinstance(tensor_at(self.root, str(node.target)), nn.Parameter):
            return Why(f"its {what} is computed{self._how(node)}")
        stored = str(node.target)
        name = stored if product is None else named_by_original(stored)
        if name is None:
            return Why(f"its {what} is masked and computed")
        return self.paths.canonical(name), order

    def _how(self, node: fx.Node) -> str:
        """Why a fit cannot be stored in what a value is computed from, where that is parameters alone."""
        pending = [node]
        while pending:
            node = pending.pop()
            if node.op == "placeholder":
                return ""
            pending += node.all_input_nodes
        return ", and not every fit can be computed so"


def mask_product(root: nn.Module, node: fx.Node) -> fx.Node | None:
    """The operand that a node multiplies with the mask of a parameter; None where it does not."""
    if node.target is not aten.mul.Tensor or len(node.all_input_nodes) != 2:
        return None
    for mask, operand in (node.all_input_nodes, reversed(node.all_input_nodes)):
        name = named_by_mask(str(mask.target)) if mask.op == "get_attr" else None
        if name is not None and view(root, name).mask is not None:
            return operand
    return None


def _permutation(node: fx.Node) -> list[int] | None:
    """The axes of its operand that those of a node are, where all that it does is to reorder them."""
    if node.op != "call_function" or len(node.all_input_nodes) != 1:
        return None
    axes = list(range(len(node.meta["val"].shape))) if isinstance(node.meta.get("val"), torch.Tensor) else []
    if node.target in (aten.t.default, aten.numpy_T.default):
        return axes[::-1]
    if node.target is aten.permute.default:
        return [axes[int(dim)] for dim in bound(node)["dims"]]
    if node.target is aten.transpose.int:
        first, second = (axes[int(bound(node)[name])] for name in ("dim0", "dim1"))
        axes[first], axes[second] = axes[second], axes[first]
        return axes
    return None


@dataclass(frozen=True)
class LeftAlone:
    """A call that is not refitted: by which name it goes, and why."""

    name: str
    why: str


def find(traced: TracedModule, graph: fx.Graph) -> tuple[list[Reader], dict[fx.Node, LeftAlone]]:
    """The readers of a graph in its order, and why others are left alone."""
    weights = Weights(traced, graph)
    readers: list[Reader] = []
    alone: dict[fx.Node, LeftAlone] = {}
    for node in graph.nodes:
        if node.target in _NORMALIZE:
            gain = _normalization(weights, node)
            readers += [] if gain is None else [gain]
            continue
        call = REGISTRY.call(node) if node.op == "call_function" else None
        if not isinstance(call, Contraction | Convolution | Recurrent | RecurrentCell) or not has_weight(call):
            continue
        reader = _reader(weights, call)
        if isinstance(reader, Why):
            alone[node] = LeftAlone(node.name, reader.text)
            continue
        if view(traced, reader.name).value().is_complex():
            alone[node] = LeftAlone(reader.name, "its weight is complex")
            continue
        readers.append(reader)
        if isinstance(call, Recurrent) and call.num_layers > 1:
            alone[node] = LeftAlone(f"{node.name} above its first layer", "what it reads stays within the call")
    return joined(weights, readers, alone), alone


def joined(weights: Weights, readers: Sequence[Reader], alone: dict[fx.Node, LeftAlone]) -> list[Reader]:
    """The readers, calls by the same weights as one; those of which not all can be refitted are left alone, named."""
    by_node = {reader.node: reader for reader in readers}
    found: list[Reader] = []
    done = set[fx.Node]()
    for reader in readers:
        if reader.node in done:
            continue
        if isinstance(reader, NormalizationReader | RecurrentReader):
            found.append(reader)
            continue
        calls = sorted(weights.readers(reader.name))
        others = [by_node[call] for call in calls if call in by_node and call is not reader.node]
        ends = {call.end for each in (reader, *others) for call in each.calls}
        adding = ends if reader.biases[0] is None else weights.readers(reader.biases[0])
        if len(others) + 1 < len(calls) or not all(_is_alike(weights.root, reader, other) for other in others):
            why = f"its weight is used by {len(calls)} calls, which are not alike"
            alone[reader.node] = LeftAlone(reader.name, why)
        elif adding != ends:
            alone[reader.node] = LeftAlone(reader.name, f"its bias is used by {len(adding)} calls")
        elif others:
            further = tuple(ReaderCall(other.node, other.data, other.added, other.state) for other in others)
            found.append(replace(reader, moving_mean=None, further=further))
            done.update(calls)
        else:
            found.append(reader)
    return found


def _is_alike(root: nn.Module, one: Reader, other: Reader) -> bool:
    """Whether two calls compute the same of what they read."""
    differing = ("node", "data", "weights", "biases", "moving_mean", "added", "further", "state")
    if type(one) is not type(other) or any(
        getattr(one, each.name) != getattr(other, each.name) for each in fields(one) if each.name not in differing
    ):
        return False
    names, others = (*one.weights, *one.biases), (*other.weights, *other.biases)
    return all(_is_same(root, name, another) for name, another in zip(names, others, strict=True))


def _is_same(root: nn.Module, name: str | None, other: str | None) -> bool:
    """Whether two names stand for the same parameter with the same mask."""
    if name is None or other is None or name == other:
        return name == other
    one, another = view(root, name), view(root, other)
    if one.original is not another.original or (one.mask is None) != (another.mask is None):
        return False
    return one.mask is None or another.mask is None or torch.equal(one.mask, another.mask)


# the axis of the channels
_NORMALIZE: dict[Any, int] = {
    aten.layer_norm.default: -1,
    aten.rms_norm.default: -1,
    aten.batch_norm.default: 1,
    aten.group_norm.default: 1,
}


def _normalization(weights: Weights, node: fx.Node) -> NormalizationReader | None:
    """The gain of a normalization over one axis, None where it has none of its own, or is left alone."""
    given = bound(node)
    gain, shift, data = given["weight"], given.get("bias"), given["input"]
    if (
        gain is None
        or len(gain.meta["val"].shape) != 1
        or given.get("training")
        or given.get("use_input_stats") is False
    ):
        return None
    found = weights.find_own(gain, "gain")
    if isinstance(found, Why) or view(weights.root, found[0]).value().is_complex():
        return None
    count = view(weights.root, found[0]).value().numel()
    bias = bias_of(weights, shift, count)
    if isinstance(bias, Why) or (bias is not None and len(weights.readers(bias)) > 1):
        return None

    def normalized(values: Tensor) -> Tensor:
        return _called_bare(weights.root, node, given, values)

    return NormalizationReader(
        node, data, (found[0],), (bias,), (count, 1, 1), None, _NORMALIZE[node.target], normalized
    )


def _called_bare(root: nn.Module, node: fx.Node, given: Mapping[str, Any], data: Tensor) -> Tensor:
    """A normalization without gain and shift."""
    arguments = {**given, "input": data, "weight": None}
    if "bias" in arguments:
        arguments["bias"] = None
    for name in ("running_mean", "running_var"):
        buffer = arguments.get(name)
        if isinstance(buffer, fx.Node):
            arguments[name] = tensor_at(root, str(buffer.target))
    return node.target(**arguments)  # type: ignore[operator, no-any-return]


def has_weight(call: OperatorCall) -> bool:
    """Whether the second operand depends on no input."""
    if isinstance(call, Recurrent | RecurrentCell):
        return True
    pending = [call.right if isinstance(call, Contraction) else call.weight]  # type: ignore[attr-defined]
    while pending:
        node = pending.pop()
        if node.op == "placeholder":
            return False
        pending += node.all_input_nodes
    return True


def _reader(weights: Weights, call: Contraction | Convolution | Recurrent | RecurrentCell) -> Reader | Why:
    if isinstance(call, RecurrentCell):
        return cell_reader(CellReader, weights, call, call.w_ih, call.b_ih)
    if isinstance(call, Recurrent):
        return _recurrent(weights, call)
    if isinstance(call, Contraction):
        return _matrix(weights, call)
    return _convolution(weights, call)


def bias_of(weights: Weights, node: fx.Node | None, outputs: int) -> str | Why | None:
    """The parameter that is added to the outputs, None where nothing is."""
    if node is None:
        return None
    if tuple(node.meta["val"].shape) != (outputs,):
        return Why("what is added to it is no bias")
    found = weights.find(node, "bias")
    return found if isinstance(found, Why) else found[0]


def _moving_mean(weights: Weights, node: fx.Node, bias: str | None) -> str | None:
    """The running mean of a batch norm that alone reads a node, where there is no bias."""
    if bias is not None or len(node.users) != 1:
        return None
    (user,) = node.users
    mean = bound(user)["running_mean"] if is_fixed_norm(user) and _normalizes_outputs(node) else None
    if not isinstance(mean, fx.Node) or mean.op != "get_attr" or len(mean.users) != 1:
        return None
    return str(mean.target)


def is_fixed_norm(node: fx.Node) -> bool:
    """Whether a node is a batch norm by running statistics."""
    return node.target is aten.batch_norm.default and not bound(node)["training"]


def _normalizes_outputs(node: fx.Node) -> bool:
    """Whether axis 1, which batch norms normalize, is that of a reader's outputs."""
    return isinstance(REGISTRY.call(node), Convolution) or len(node.meta["val"].shape) == 2


def _matrix(weights: Weights, call: Contraction) -> Reader | Why:
    labels = call.labels
    if labels is None or len(labels.right) != 2 or labels.left[-1] != labels.contracted:
        return Why("a product of another form than inputs times a matrix")
    if len(labels.left) < 2:
        return Why("its input has no batch")
    if labels.out != labels.left[:-1] + labels.inner or not _is_plain_sum(call.node):
        return Why("a product whose parts are scaled or permuted")
    found = weights.find(call.right, "weight")
    if isinstance(found, Why):
        return found
    name, order = found
    outputs, columns = (order[labels.right.index(label)] for label in (labels.inner, labels.contracted))
    shape = view(weights.root, name).value().shape
    bias, added = bias_of(weights, call.bias_operand, shape[outputs]), None
    if isinstance(bias, Why):
        return bias
    if call.bias_operand is None:
        bias, added = _bias_behind(weights, call.node, shape[outputs])
    return MatrixReader(
        call.node, call.left, (name,), (bias,), (1, shape[outputs], shape[columns]),
        _moving_mean(weights, call.node, bias), (outputs, columns), added=added,
    )  # fmt: skip


def _bias_behind(weights: Weights, node: fx.Node, outputs: int) -> tuple[str | None, fx.Node | None]:
    """The parameter that alone is added to what a call gives, and where."""
    stream = stream_of(node)
    if stream is None or stream.norm is not None or stream.sum not in node.users:
        return None, None
    bias = bias_of(weights, stream.other, outputs)
    return (bias, stream.sum) if isinstance(bias, str) else (None, None)


def _is_plain_sum(node: fx.Node) -> bool:
    """Whether product and bias are added as they are (`addmm` can scale both)."""
    given = bound(node)
    return all(given.get(name, 1) == 1 for name in ("alpha", "beta"))


def own_weights_and_biases(
    weights: Weights, directions: Iterable[tuple[fx.Node, fx.Node | None]]
) -> tuple[tuple[str, ...], tuple[str | None, ...], list[torch.Size]] | Why:
    """The names of a weight of each direction of a layer and of its bias, which no other call reads; and the shapes.

    Args:
        weights: of the graph. directions: for each the weight, and what is added to its product.
    """
    names, biases, shapes = list[str](), list[str | None](), list[torch.Size]()
    for weight, added in directions:
        found = _with_bias(weights, weights.find_own(weight, "weight"), added)
        if isinstance(found, Why):
            return found
        name, bias, shape = found
        if bias is not None and (count := len(weights.readers(bias))) > 1:
            return Why(f"its bias is used by {count} calls")
        names.append(name)
        biases.append(bias)
        shapes.append(shape)
    return tuple(names), tuple(biases), shapes


def _with_bias(
    weights: Weights, found: tuple[str, list[int]] | Why, added: fx.Node | None
) -> tuple[str, str | None, torch.Size] | Why:
    """The name of a weight that was found, of the bias that is added to its product, and its shape."""
    if isinstance(found, Why):
        return found
    name, _ = found
    shape = view(weights.root, name).value().shape
    bias = bias_of(weights, added, shape[0])
    return bias if isinstance(bias, Why) else (name, bias, shape)


def _recurrent(weights: Weights, call: Recurrent) -> Reader | Why:
    found = own_weights_and_biases(weights, call.first_layer)
    if isinstance(found, Why):
        return found
    names, biases, shapes = found
    sizes = 1, sum(shape[0] for shape in shapes), shapes[0][1]
    return RecurrentReader(call.node, call.data, names, biases, sizes, None)


def cell_reader(
    kind: type[CellReader], weights: Weights, call: RecurrentCell, weight: fx.Node, added: fx.Node | None
) -> CellReader | Why:
    """The reader of one step of a cell, by one of its weights and what is added to that product."""
    found = _with_bias(weights, weights.find(weight, "weight"), added)
    if isinstance(found, Why):
        return found
    name, bias, shape = found
    if len(call.data.meta["val"].shape) != 2:
        return Why("its input has no batch")
    state = call.hx[0] if call.is_lstm else call.hx
    return kind(call.node, call.data, (name,), (bias,), (1, *shape), None, state=state)


def _convolution(weights: Weights, call: Convolution) -> Reader | Why:
    found = weights.find(call.weight, "weight")
    if isinstance(found, Why):
        return found
    given, space = bound(call.node), call.space
    if len(call.data.meta["val"].shape) != space + 2:
        return Why("its input has no batch")
    (name, _), (outputs, inputs) = found, call.counts
    weight = view(weights.root, name).value()
    kernel = tuple(weight.shape[2:])
    stride, dilation = _each(given["stride"] or 1, space), _each(given["dilation"], space)
    bias = bias_of(weights, call.bias, outputs * call.groups)
    if isinstance(bias, Why):
        return bias
    mean = _moving_mean(weights, call.node, bias)
    sizes = call.groups, outputs, inputs * weight[0, 0].numel()
    common = call.node, call.data, (name,), (bias,), sizes, mean, kernel
    reach = [gap * (size - 1) for gap, size in zip(dilation, kernel, strict=True)]
    if not call.is_transposed:
        return ConvolutionReader(*common, stride, dilation, _padding(call.padding, reach))
    behind = _each(given["output_padding"], space)
    pads = zip(reach, _each(call.padding, space), behind, strict=True)
    padding = tuple((span - cut, span - cut + more) for span, cut, more in pads)
    return TransposedReader(*common, (1,) * space, dilation, padding, stride)


def _each(value: int | list[int], space: int) -> tuple[int, ...]:
    """An option as one number an axis."""
    values = [value] if isinstance(value, int) else [*value]
    return tuple(values * space if len(values) == 1 else values)


def _padding(padding: str | int | list[int], reach: list[int]) -> tuple[tuple[int, int], ...]:
    if padding == "same":
        return tuple((span // 2, span - span // 2) for span in reach)
    if padding == "valid":
        return ((0, 0),) * len(reach)
    assert not isinstance(padding, str)
    return tuple((size, size) for size in _each(padding, len(reach)))


def stream_of(reader: fx.Node) -> Stream | None:
    """What a reader's output is added to, where that is all that is done with it.

    A batch norm, and what does nothing in eval mode, may lie between.
    """
    norm, node = None, reader
    while len(node.users) == 1:
        (user,) = node.users
        if user.target in (aten.add.Tensor, aten.add_.Tensor):
            operands = user.args[:2]
            others = [each for each in operands if each is not node]
            is_plain = len(others) == 1 and isinstance(others[0], fx.Node) and bound(user)["alpha"] == 1
            return Stream(others[0], norm, user) if is_plain else None  # type: ignore[arg-type]
        if is_fixed_norm(user) and norm is None and user.args[0] is node and _normalizes_outputs(reader):
            norm = user
        elif not _is_off(user):
            return None
        node = user
    return None


def _is_off(node: fx.Node) -> bool:
    """Whether a node gives what it reads."""
    if node.target in (aten.dropout.default, aten.dropout_.default):
        return not bound(node)["train"]
    return node.target in (aten.clone.default, aten.contiguous.default, aten.alias.default)
