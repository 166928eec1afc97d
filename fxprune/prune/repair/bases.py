"""Changes of basis within attention heads: the same function, with what matters least in as few channels as can be.

Queries and keys of a head meet in q k^T alone, and its values reach a linear layer alone. An invertible matrix R and
its inverse can stand between: q R and k R^-T have the same products, v R and R^-1 of the layer's columns the same
output. With R from the singular vectors of C_q^(1/2) C_k^(1/2), or of C_v^(1/2) W, where C are second moments, the
channels are sorted by what they add to the logits, or to the layer's output; no other choice of as many channels has a
smaller error on average (Eckart and Young, "The approximation of one matrix by another of lower rank", 1936,
https://doi.org/10.1007/BF02288367; for logits over pairs of positions that are drawn independently). A softmax ignores
what is added to all logits of a query, so keys are taken about their mean.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fxprune.channels.registry import REGISTRY
from fxprune.channels.rules.attention import Attention
from fxprune.channels.rules.contractions import Contraction
from fxprune.graph.expressions import depending_on_inputs
from fxprune.graph.interpretation import Interpreter, run
from fxprune.prune.repair.layers import MatrixReader, Reader
from fxprune.prune.repair.moments import Moments

aten = torch.ops.aten

Tensors = Callable[[str], Tensor]

# they give entries of their operand, in other places
_MOVE = frozenset((
    aten.view.default, aten.reshape.default, aten.transpose.int, aten.permute.default, aten.contiguous.default,
    aten.clone.default, aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.flatten.using_ints,
    aten.unflatten.int, aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default, aten.unbind.int,
    aten.select.int, aten.slice.Tensor, aten.expand.default, aten.repeat_interleave.self_int, aten.t.default,
    aten.alias.default, aten.movedim.int, aten._unsafe_view.default, aten.numpy_T.default,
))  # fmt: skip
_SCALE = frozenset((aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar))
_EXACT = (torch.float32, torch.float64)
_SMALLEST = 1e-9  # eigenvalue of a second moment, relative to the largest
_MOST_CONDITION = 1e6  # of a basis that weights have been given before


@dataclass(frozen=True, eq=False)
class Path:
    """What lies between a node and one that reads its entries in other places.

    Attributes:
        start: the node. steps: the nodes behind it, in order; the last one has the entries.
    """

    start: fx.Node
    steps: tuple[fx.Node, ...]

    @property
    def nodes(self) -> frozenset[fx.Node]:
        """All of them."""
        return frozenset((self.start, *self.steps))

    def moved(self, values: Tensor, env: Mapping[fx.Node, Any], graph: fx.Graph) -> Tensor:
        """Entries of a value of the start, where the last node has them; scales are left out."""
        interpreter = Interpreter(graph, lambda _: None, keep=True)
        laid_out = torch.empty_like(env[self.start], dtype=values.dtype)  # views take it in the layout that it has
        interpreter.env = {**env, self.start: laid_out.copy_(values)}
        for step in self.steps:
            found = interpreter.env[_source(step)] if step.target in _SCALE else interpreter.run_node(step)
            interpreter.env[step] = found
        found = interpreter.env[self.steps[-1] if self.steps else self.start]
        assert isinstance(found, Tensor)
        return found


@dataclass(frozen=True, eq=False)
class Head:
    """One head: which outputs of a first reader meet which entries of a second.

    Attributes:
        first: [layers of entries, channels], outputs of the first reader; one row, or one for each query head that
            shares keys.
        second: [rows, channels], outputs of the second reader, or its columns.
    """

    first: Tensor
    second: Tensor


@dataclass(frozen=True, eq=False)
class Basis:
    """Heads whose basis can change.

    Attributes:
        first, second: the readers: of queries and of keys, or of values and the layer that reads them.
        heads: the heads. is_product: whether the outputs of both are multiplied, as queries and keys are.
        inside: the nodes whose values are in the basis of the heads.
    """

    first: MatrixReader
    second: MatrixReader
    heads: list[Head]
    is_product: bool
    inside: frozenset[fx.Node]

    @property
    def readers(self) -> tuple[MatrixReader, ...]:
        """Those whose input moments are needed."""
        return (self.first, self.second) if self.is_product else (self.second,)

    @property
    def parameters(self) -> list[str]:
        """The weights and biases of both, by name."""
        names = [*self.first.weights, *self.first.biases, *self.second.weights, *self.second.biases]
        return list(dict.fromkeys(name for name in names if name is not None))


def find_bases(graph: fx.Graph, readers: Sequence[Reader], tensors: Tensors, inputs: Sequence[Any]) -> list[Basis]:
    """The heads of a graph whose basis can change.

    Args:
        graph: the graph. readers: those of it that can be refitted. tensors: its parameters and buffers.
        inputs: of a run, one a placeholder, from which sizes are taken.
    """
    by_node = {reader.node: reader for reader in readers if type(reader) is MatrixReader and not reader.further}
    joined = [_Joined.of(product, by_node) for node in graph.nodes if (product := _product(node)) is not None]
    if not any(each.can_turn for each in joined):
        return []
    env = _values(graph, tensors, inputs)
    found = []
    for each in joined:
        if each.query is not None and each.key is not None:
            heads = _met(each.product, each.query, each.key, env, graph)
            inside = each.query.nodes | each.key.nodes
            found += [Basis(by_node[each.query.start], by_node[each.key.start], heads, True, inside)] if heads else []
        if each.value is not None:
            found += _passed(each.product, each.value, by_node, env, graph)
    return found


@dataclass(frozen=True, eq=False)
class Change:
    """Another basis for one head.

    Attributes:
        first, second: [channels, channels], what outputs of the first reader, and entries of the second, are
            multiplied with.
        energy: [channels], what each channel then adds, the most first.
    """

    first: Tensor
    second: Tensor
    energy: Tensor

    def arranged(self, dead: Tensor) -> Change:
        """The same with the channels that add least where `dead`, [channels], says so."""
        places = torch.argsort(dead.to(torch.int64), stable=True).to(self.first.device)  # live channels first
        first, second = (torch.empty_like(each).index_copy_(1, places, each) for each in (self.first, self.second))
        return Change(first, second, self.energy)


def sorted_bases(basis: Basis, moments: Mapping[object, Moments], tensors: Tensors) -> list[Change]:
    """For each head the basis whose channels are sorted by what they add.

    Args:
        basis: of which heads. moments: of the inputs of its readers, by their keys.
        tensors: gives weights by name, unmasked.
    """
    layers = _Layer.of(basis, tensors)
    change = _of_product if basis.is_product else _of_layer
    return [change(basis, head, moments, layers) for head in basis.heads]


def following(basis: Basis, changes: Sequence[Change], tensors: Tensors, references: Tensors) -> list[Change]:
    """What brings heads into the bases that changes give a reference, where they may have had another one before.

    Args:
        basis: of which heads. changes: those of the reference's heads. tensors, references: give weights by name.
    """
    if all(torch.equal(tensors(name), references(name)) for name in basis.parameters):
        return [*changes]
    own, others = (_Layer.of(basis, each)[basis.first.name] for each in (tensors, references))
    found = []
    for head, change in zip(basis.heads, changes, strict=True):
        square = torch.stack([others.both(rows) @ others.both(rows).T for rows in head.first]).sum(0)
        cross = torch.stack([others.both(rows) @ own.both(rows).T for rows in head.first]).sum(0)
        relative = torch.linalg.lstsq(square, cross).solution  # own = relative^T others, were nothing else changed
        if not float(torch.linalg.cond(relative)) < _MOST_CONDITION:
            found.append(change)
            continue
        first = torch.linalg.solve(relative, change.first)
        found.append(Change(first, torch.linalg.inv(first).T, change.energy))
    return found


def changed(basis: Basis, changes: Sequence[Change], tensors: Tensors) -> dict[str, Tensor]:
    """Weights and biases in other bases, by name."""
    layers = _Layer.of(basis, tensors)
    first, second = layers[basis.first.name], layers[basis.second.name]
    for head, change in zip(basis.heads, changes, strict=True):
        for rows in head.first:
            first.turn(rows, change.first)
        for rows in head.second:
            if basis.is_product:
                second.turn(rows, change.second)
            else:
                second.table[:, rows] = second.table[:, rows] @ change.second.to(second.table.device)
    return {name: values for layer in layers.values() for name, values in layer.stored(tensors).items()}


def only_exact(
    bases: Sequence[Basis],
    graph: fx.Graph,
    tensors: Tensors,
    inputs: Sequence[Any],
    name_of: Callable[[str], str] = str,
) -> list[Basis]:
    """Those whose change leaves all values outside of the heads as they are, tried in float64 with bases drawn.

    Weights of half precision stay: another basis would be rounded to three digits.

    Args:
        bases: those to try. graph, tensors: what computes the values.
        inputs: one a placeholder. name_of: from what a `get_attr` node reads to the name of a parameter.
    """
    bases = [each for each in bases if all(tensors(name).dtype in _EXACT for name in each.parameters)]
    if not bases:
        return []

    dense = _values(graph, tensors, inputs, torch.float64)
    moving = depending_on_inputs(graph)

    def is_exact(some: Sequence[Basis]) -> bool:
        overrides: dict[str, Tensor] = {}
        for basis in some:
            now = {name: value.double() for name, value in overrides.items()}
            turned = changed(basis, _drawn(basis), lambda name: now.get(name, tensors(name).double()))  # noqa: B023
            overrides |= turned
        inside = {node for basis in some for node in basis.inside}
        same = []

        def watch(node: fx.Node, value: Any) -> None:
            if node in moving and node not in inside:
                same.append(_is_close(value, dense[node]))

        run(graph, lambda target: overrides.get(name_of(target), tensors(target)), inputs, torch.float64, watch)
        return all(same)

    return [*bases] if is_exact(bases) else [basis for basis in bases if is_exact([basis])]


def _is_close(one: Any, other: Any) -> bool:
    if not isinstance(one, Tensor) or not one.is_floating_point() or not one.numel():
        return True
    most = float(other.nan_to_num(posinf=0, neginf=0).abs().max())
    return torch.allclose(one, other, rtol=0, atol=1e-8 * most, equal_nan=True)


def _drawn(basis: Basis) -> list[Change]:
    """A basis for each head that keeps neither lengths nor angles."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for head in basis.heads:
        size = head.first.shape[1]
        turn = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0]
        lengths = torch.linspace(0.5, 2, size, dtype=torch.float64)
        found.append(Change(turn * lengths, turn / lengths, turn.new_ones(size)))
    return found


@dataclass(frozen=True, eq=False)
class _Layer:
    """The weight and bias of a reader, float64: [outputs, columns] and [outputs]."""

    reader: MatrixReader
    table: Tensor
    shift: Tensor | None

    @classmethod
    def of(cls, basis: Basis, tensors: Tensors) -> dict[str, _Layer]:
        """By name, copies."""
        found = {}
        for reader in (basis.first, basis.second):
            bias = None if reader.biases[0] is None else tensors(reader.biases[0]).double().clone()
            found[reader.name] = cls(reader, reader.table([tensors(reader.name)])[0].double().clone(), bias)
        return found

    def both(self, rows: Tensor) -> Tensor:
        """Weights and biases of some outputs, [outputs, columns]."""
        return self.table[rows] if self.shift is None else torch.cat([self.table[rows], self.shift[rows, None]], 1)

    def turn(self, rows: Tensor, basis: Tensor) -> None:
        """Give some outputs another basis."""
        basis = basis.to(self.table.device)
        self.table[rows] = basis.T @ self.table[rows]
        if self.shift is not None:
            self.shift[rows] = basis.T @ self.shift[rows]

    def stored(self, tensors: Tensors) -> dict[str, Tensor]:
        """As they are stored, by name."""
        like = tensors(self.reader.name)
        found = {self.reader.name: self.reader.stored(self.table[None], [like])[0].to(like.dtype)}
        bias = self.reader.biases[0]
        if bias is not None and self.shift is not None:
            found[bias] = self.shift.to(tensors(bias).dtype)
        return found


def _of_product(basis: Basis, head: Head, moments: Mapping[object, Moments], layers: Mapping[str, _Layer]) -> Change:
    """By what each channel adds to the logits."""
    own, other = layers[basis.first.name], layers[basis.second.name]
    queries = torch.stack([_output_moment(moments[basis.first.key], own, rows, centred=False) for rows in head.first])
    keys = torch.stack([_output_moment(moments[basis.second.key], other, rows, centred=True) for rows in head.second])
    (first, first_inverse), (second, second_inverse) = _roots(queries.sum(0)), _roots(keys.sum(0))
    left, values, right = torch.linalg.svd(first @ second)
    scale = values.clamp(min=max(float(values.max()) * _SMALLEST, 1e-30)).sqrt()
    # R_q R_k^T = C_q^(-1/2) U S V^T C_k^(-1/2) = 1
    return Change(first_inverse @ left * (values / scale), second_inverse @ right.T * scale, values.square())


def _of_layer(basis: Basis, head: Head, moments: Mapping[object, Moments], layers: Mapping[str, _Layer]) -> Change:
    """By what each channel adds to the output of the layer that reads them."""
    found = moments[basis.second.key]
    square = found.normal_square(basis.second.biases[0] is not None)[0] / found.count
    root, inverse = _roots(torch.stack([square[rows[:, None], rows] for rows in head.second]).sum(0))
    columns = torch.cat([layers[basis.second.name].table[:, rows].T for rows in head.second], 1)
    left, values, _ = torch.linalg.svd(root @ columns)
    values = torch.cat([values, values.new_zeros(len(root) - len(values))])
    scale = values.clamp(min=max(float(values.max()) * _SMALLEST, 1e-30)).sqrt()
    return Change(inverse @ left * scale, root @ left / scale, values.square())


def _output_moment(moments: Moments, layer: _Layer, rows: Tensor, *, centred: bool) -> Tensor:
    """The second moment of some outputs of a reader, about their mean or about zero."""
    square, table = moments.normal_square(True)[0] / moments.count, layer.table[rows]
    found = table @ square @ table.T
    if centred:
        return found
    mean = table @ (moments.total[0] / moments.count + moments.shift[0])
    mean = mean if layer.shift is None else mean + layer.shift[rows]
    return found + torch.outer(mean, mean)


def _roots(square: Tensor) -> tuple[Tensor, Tensor]:
    """The square root of a second moment, and its inverse."""
    values, vectors = torch.linalg.eigh(square)
    values = values.clamp(min=max(float(values.max()) * _SMALLEST, 1e-30))
    return (vectors * values.sqrt()) @ vectors.T, (vectors / values.sqrt()) @ vectors.T


@dataclass(frozen=True, eq=False)
class _Product:
    """Where heads meet.

    Attributes:
        node: the call. query, key, value: what it reads as such.
        shared: whether each key-value head may stand for several query heads.
        orders: of the axes of queries, keys, values and the result, so that heads are followed by positions and
            channels; None where they stand so.
    """

    node: fx.Node
    query: fx.Node
    key: fx.Node
    value: fx.Node
    shared: bool = False
    orders: tuple[list[int], ...] | None = None

    def ordered(self, values: Tensor, place: int) -> Tensor:
        """What stands at a place of `orders`, [heads, positions, channels]."""
        return values if self.orders is None else values.permute(self.orders[place])

    def stored(self, result: Tensor) -> Tensor:
        """An ordered result as the call gives it."""
        if self.orders is None:
            return result
        axes = self.orders[-1]
        return result.permute([axes.index(axis) for axis in range(len(axes))])


def _product(node: fx.Node) -> _Product | None:
    """A call in which queries meet keys, or weights values."""
    call = REGISTRY.call(node) if node.op == "call_function" else None
    if isinstance(call, Attention):
        return _Product(node, call.query, call.key, call.value, call.enable_gqa)
    if not isinstance(call, Contraction) or call.labels is None or call.bias_operand is not None:
        return None
    labels = call.labels
    batch, outer, inner, contracted = labels.batch, labels.outer, labels.inner, labels.contracted
    if not (batch and len(outer) == len(inner) == len(contracted) == 1) or not {*batch} <= {*labels.left} & {
        *labels.right
    }:
        return None
    orders = (
        (labels.left, outer + contracted), (labels.right, inner + contracted), (labels.right, contracted + inner),
        (labels.out, outer + inner),
    )  # fmt: skip
    axes = tuple([names.index(label) for label in batch + last] for names, last in orders)
    return _Product(node, call.left, call.right, call.right, orders=axes)


@dataclass(frozen=True, eq=False)
class _Joined:
    """A product, and the ways from readers to its operands; None where there is none."""

    product: _Product
    query: Path | None
    key: Path | None
    value: Path | None

    @classmethod
    def of(cls, product: _Product, readers: Mapping[fx.Node, Any]) -> _Joined:
        return cls(product, *(_path(each, readers) for each in (product.query, product.key, product.value)))

    @property
    def can_turn(self) -> bool:
        return self.value is not None or (self.query is not None and self.key is not None)


def _source(node: fx.Node) -> fx.Node:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    return source


def _path(node: fx.Node | None, ends: Mapping[fx.Node, Any]) -> Path | None:
    """The way back from a node to one of `ends`, None where something else lies between."""
    steps: list[fx.Node] = []
    while node is not None and node not in ends:
        moves = node.target in _MOVE or _is_item(node)
        scales = node.target in _SCALE and len(node.all_input_nodes) == 1
        if node.op != "call_function" or not (moves or scales) or not isinstance(node.args[0], fx.Node):
            return None
        steps.append(node)
        node = node.args[0]
    return None if node is None else Path(node, tuple(reversed(steps)))


def _is_item(node: fx.Node) -> bool:
    return getattr(node.target, "__name__", "") == "getitem" and isinstance(node.args[1], int)


def _values(
    graph: fx.Graph, tensors: Tensors, inputs: Sequence[Any], dtype: torch.dtype | None = None
) -> dict[fx.Node, Any]:
    interpreter = Interpreter(graph, tensors, dtype, keep=True)
    interpreter.run(*inputs, enable_io_processing=False)
    return interpreter.env


def _numbered(node: fx.Node, env: Mapping[fx.Node, Any]) -> Tensor:
    """A tensor of the shape of a node's value, that holds the number of each output."""
    shape = env[node].shape
    return torch.arange(shape[-1], dtype=torch.float64).expand(shape)


def _rows(values: Tensor) -> Tensor:
    """The channels of every matrix of a stack, [matrices, channels]; the same for all positions."""
    return values.flatten(0, -3)[:, 0].long()


def _met(product: _Product, query: Path, key: Path, env: Mapping[fx.Node, Any], graph: fx.Graph) -> list[Head]:
    """The heads of a product of queries and keys."""
    first = _rows(product.ordered(query.moved(_numbered(query.start, env), env, graph), 0))
    second = _rows(product.ordered(key.moved(_numbered(key.start, env), env, graph), 1))
    if product.shared and len(first) != len(second):
        second = second.repeat_interleave(len(first) // len(second), 0)
    if first.shape != second.shape:
        return []
    heads: dict[tuple[int, ...], dict[tuple[int, ...], None]] = {}
    for own, other in zip(first.tolist(), second.tolist(), strict=True):
        heads.setdefault(tuple(other), {})[tuple(own)] = None
    return _distinct([Head(torch.tensor([*firsts]), torch.tensor([one])) for one, firsts in heads.items()])


def _passed(
    product: _Product, value: Path, by_node: Mapping[fx.Node, MatrixReader], env: Mapping[fx.Node, Any], graph: fx.Graph
) -> Iterator[Basis]:
    """The heads of values that one linear layer reads."""
    ends = {product.node: None}
    behind = [(reader, path) for reader in by_node.values() if (path := _path(reader.data, ends)) is not None]
    if len(behind) != 1:
        return
    (reader, path) = behind[0]
    rows = _rows(product.ordered(value.moved(_numbered(value.start, env), env, graph), 2))
    output = product.ordered(env[product.node], 3)
    matrices = output.shape[:-2].numel()
    if product.shared and matrices != len(rows):
        rows = rows.repeat_interleave(matrices // len(rows), 0)
    if len(rows) != matrices or rows.shape[1] != output.shape[-1]:
        return
    marked = rows.double().reshape(*output.shape[:-2], 1, -1).expand(output.shape)
    columns = path.moved(product.stored(marked), env, graph)
    read = columns.reshape(-1, columns.shape[-1])[0].long()
    heads: dict[tuple[int, ...], Head] = {}
    for own in {tuple(each) for each in rows.tolist()}:
        places = [(read == row).nonzero()[:, 0] for row in own]
        if len({len(each) for each in places}) != 1 or not len(places[0]):
            return
        heads[own] = Head(torch.tensor([own]), torch.stack(places, 1))
    found = _distinct([heads[own] for own in sorted(heads)])
    if found and sum(head.second.numel() for head in found) == reader.sizes[2]:
        yield Basis(by_node[value.start], reader, found, False, value.nodes | path.nodes)


def _distinct(heads: list[Head]) -> list[Head]:
    """The heads, none where an output belongs to several."""
    for side in ("first", "second"):
        numbers = torch.cat([getattr(head, side).flatten() for head in heads])
        if len(numbers.unique()) != len(numbers):
            return []
    return heads
