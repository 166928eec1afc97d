"""Second moments of what readers receive, against dense algebra."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import fxprune
from fxprune.errors import PruningError
from fxprune.graph.names import tensor_at
from fxprune.prune.repair.batches import Batches
from fxprune.prune.repair.finding import find
from fxprune.prune.repair.input_moments import InputMoments, in_passes
from fxprune.prune.repair.moments import Moments, Origin
from fxprune.prune.repair.products import Product
from tests.repairs import HELD


def images() -> tuple[nn.Sequential, Tensor]:
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 4, 1), nn.Tanh(), nn.Conv2d(4, 6, 3, 2, padding=1, groups=2), nn.Flatten(), nn.Linear(54, 2)
    return nn.Sequential(*layers).double().eval(), torch.randn(40, 3, 5, 5, dtype=torch.float64) + 3


def moments(model: nn.Module, x: Tensor, batches: object) -> InputMoments:
    traced = fxprune.trace(copy.deepcopy(model), (x[:2],), modes=("eval",))
    graph = traced.graphs["eval"]
    found = InputMoments(find(traced, graph)[0], int((~HELD).sum()))
    for piece in Batches(traced, graph, batches, None):
        if not piece.is_held:
            found.add(graph, lambda name: tensor_at(traced, name), piece)
    return found


@torch.no_grad()
def test_they_are_those_of_dense_algebra_however_samples_are_batched() -> None:
    model, x = images()
    found = [*moments(model, x, x).complete().values()]
    first, second, third = found
    y = torch.tanh(model[0](x[~HELD]))
    windows = functional.unfold(y, 3, padding=1, stride=2).transpose(1, 2).flatten(0, 1)
    for group in range(2):
        rows = windows[:, group * 18 : group * 18 + 18]
        torch.testing.assert_close(second.normal_square(False)[group], rows.T @ rows)
        centred = rows - rows.mean(0)
        torch.testing.assert_close(second.normal_square(True)[group], centred.T @ centred)
        torch.testing.assert_close(second.total[group] / second.count + second.shift[group], rows.mean(0))
    rows = x[~HELD].movedim(1, -1).flatten(0, -2)
    torch.testing.assert_close(first.normal_square(False)[0], rows.T @ rows)
    rows = model[2](y).flatten(1)
    torch.testing.assert_close(third.normal_square(False)[0], rows.T @ rows)
    for batches in ([*x.split(7)], (each for each in x.split(1)), [x[:3], x[3:]], {"input": x}):
        for one, other in zip(found, moments(model, x, batches).complete().values(), strict=True):
            assert one.count == other.count
            torch.testing.assert_close(one.normal_square(True), other.normal_square(True))
    for one, again in zip(found, moments(model, x, x).complete().values(), strict=True):
        assert torch.equal(one.square, again.square)


@pytest.mark.parametrize("columns", [1, 5, 1100])
def test_wide_inputs_are_summed_in_parts_to_the_same(columns: int) -> None:
    torch.manual_seed(0)
    rows, shift = torch.randn(2, 30, columns, dtype=torch.float64) + 2, torch.randn(2, columns, dtype=torch.float64)
    found = Moments([])
    for part in rows.split(11, 1):
        found.add(part, [], [], shift)
    shifted = rows - shift[:, None]
    torch.testing.assert_close(found.square, shifted.transpose(1, 2) @ shifted)
    torch.testing.assert_close(found.mean_squares, rows.square().mean(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("columns", [7, 600])
def test_sums_have_the_same_bits_in_whatever_order_rows_are_added_up(columns: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    scales = 10.0 ** torch.randint(-6, 6, (columns,)).double()
    rows = ((torch.randn(2, 240, columns, dtype=torch.float64) + 3) * scales).to(dtype)
    rows[:, :30, 2] = 5.0  # which changes later alone
    pieces = [*rows.split(30, 1)]
    origin = Origin.of(pieces[0])

    def summed(order: list[int]) -> Moments:
        found = Moments([])
        for number in order:
            found.add(pieces[number], [], [], origin.shift, origin.steps)
        return found

    want, others = summed([*range(8)]), [summed([5, 2, 7, 0, 1, 6, 3, 4]), summed([0, 1, 2])]
    others[1].join(summed([*range(3, 8)]))
    for other in others:
        assert torch.equal(want.square, other.square)
        assert torch.equal(want.total, other.total)
    exact = Moments([])
    exact.add(rows.double(), [], [], origin.shift.double())
    lengths = exact.square.diagonal(dim1=1, dim2=2).sqrt()
    error = (want.square - exact.square).abs() / (lengths[:, :, None] * lengths[:, None, :])
    assert error.max() < (1e-11 if dtype == torch.float64 else 1e-6)
    mean = (want.total / want.count + origin.shift) / scales
    assert torch.allclose(mean, rows.double().mean(1) / scales, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("heads", [2, 4])
def test_a_product_adds_up_what_each_channel_adds_to_it(heads: int) -> None:
    torch.manual_seed(0)
    left, right = (torch.randn(3, count, 5, 6, dtype=torch.float64) for count in (4, heads))
    product = Product(None, (None, (0, 1, 2, 3)), (None, (0, 1, 2, 3)))  # type: ignore[arg-type]
    shared = right.repeat_interleave(4 // heads, 1)
    each = torch.einsum("bhid,bhjd->dbhij", left, shared).flatten(1)
    torch.testing.assert_close(product.gram([left, right]), each @ each.T)
    half = product.gram([left.bfloat16(), right.bfloat16()])
    exact = product.gram([left.bfloat16().double(), right.bfloat16().double()])
    torch.testing.assert_close(half, exact, rtol=1e-5, atol=1e-5)


def test_positions_that_do_not_count_add_nothing_to_a_product() -> None:
    torch.manual_seed(0)
    left, right = (torch.randn(3, 2, 5, 6, dtype=torch.float64) for _ in range(2))
    product = Product(None, (None, (0, 1, 2, 3)), (None, (0, 1, 2, 3)))  # type: ignore[arg-type]
    counts = torch.arange(5) < torch.tensor([5, 3, 0])[:, None]
    padded = [torch.where(counts[:, None, :, None], each, 99.0) for each in (left, right)]
    zeroed = [torch.where(counts[:, None, :, None], each, 0.0) for each in (left, right)]
    torch.testing.assert_close(product.gram(padded, counts), product.gram(zeroed))
    of_samples = torch.tensor([True, False, True])
    some = product.gram([left[of_samples], right[of_samples]])
    torch.testing.assert_close(product.gram([left, right], of_samples), some)


def test_products_name_the_node_that_is_nan() -> None:
    class Met(nn.Module):
        def forward(self, q: Tensor, k: Tensor) -> Tensor:
            return (q.log() @ k.transpose(1, 2)).softmax(-1)

    q, k = torch.rand(6, 5, 4), torch.rand(6, 5, 4)
    traced = fxprune.trace(Met(), (q, k), modes=("eval",))
    graph = traced.graphs["eval"]
    (node,) = graph.find_nodes(op="call_function", target=torch.ops.aten.matmul.default)
    found = InputMoments([Product(node, (node.args[0], (0, 1, 2)), (node.args[1], (0, 2, 1)))], 6)
    q[0] = -1
    with pytest.raises(PruningError, match="NaN or inf come up at `log`"):
        for piece in Batches(traced, graph, (q, k), None):
            found.add(graph, lambda name: tensor_at(traced, name), piece)


def test_readers_are_taken_in_as_many_passes_as_their_moments_need(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = images()
    traced = fxprune.trace(model, (x[:2],), modes=("eval",))
    readers = find(traced, traced.graphs["eval"])[0]
    assert [*in_passes(readers)] == [readers]
    expected = [curve.measured for curve in fxprune.sensitivity(traced, x).curves]
    monkeypatch.setattr("fxprune.prune.repair.input_moments.MOST_MOMENTS", 700)
    assert [*in_passes(readers)] == [readers[:2], readers[2:]]
    assert [curve.measured for curve in fxprune.sensitivity(traced, x).curves] == expected
