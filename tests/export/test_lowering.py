"""What is rewritten before torch translates it computes what eager does, in onnxruntime."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.nn import functional

import fxprune

SOME = torch.ones(5, 5).tril().bool()
EMPTIED = SOME.index_fill(0, torch.tensor(2), False)  # row 2 sees nothing
MASKS = {
    "boolean": SOME,
    "boolean, a row emptied": EMPTIED,
    "added": torch.randn(5, 5, generator=torch.Generator().manual_seed(0)),
    "added, a row emptied": torch.zeros(5, 5).masked_fill(~EMPTIED, -torch.inf),
}


def attention(x: Tensor, rank: int, mask: Tensor | None = None, few: bool = False, **options: Any) -> Tensor:
    """Attention over 5 positions of x [batch, 5, 24], on operands of `rank` axes."""
    q, k, v = x.chunk(3, -1)
    if rank == 2:
        q, k, v = q[0], k[0], v[0]
    elif rank > 3:
        q, k, v = (t.unflatten(-1, (*[2] * (rank - 3), -1)).movedim(1, -2) for t in (q, k, v))
    if few:
        k, v = k[:, :1], v[:, :1]
    return functional.scaled_dot_product_attention(q, k, v, mask, enable_gqa=few, **options)


class EveryMask(nn.Module):
    """Attention of one rank with masks of every kind: on three axes with all of them, on others with one of each."""

    def __init__(self, rank: int, few: bool) -> None:
        super().__init__()
        self.rank, self.few = rank, few
        self.names = tuple(MASKS) if rank == 3 else ("boolean, a row emptied", "added")
        masks = [MASKS[name] for name in self.names]
        self.masks = nn.Buffer(torch.stack([mask for mask in masks if mask.dtype == torch.bool]))
        self.added = nn.Buffer(torch.stack([mask for mask in masks if mask.dtype != torch.bool]))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        masks = dict(zip(self.names, [*self.masks, *self.added], strict=True))
        data = {2: x[0], 4: x[:, None]}.get(self.rank, x[:1, :1])
        masks["of data"] = data.sum(-1, keepdim=True) > 0
        found = {name: attention(x, self.rank, mask, self.few) for name, mask in masks.items()}
        found["none"] = attention(x, self.rank, None, self.few, scale=0.3)
        return found | {"causal": attention(x, self.rank, None, self.few, is_causal=True)}


def exported(model: nn.Module, x: Tensor, path: Path, **options: int) -> onnxruntime.InferenceSession:
    fxprune.export.to_onnx(fxprune.trace(model.eval(), (x,), modes=("eval",)), path, **options)
    return onnxruntime.InferenceSession(path)


def operators(path: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(path).graph.node)


RANKS = [
    *((3, False), (4, True)),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in ((2, False), (4, False), (5, False))),
]


@pytest.mark.parametrize(("rank", "few"), RANKS)
def test_attention_of_any_rank_and_mask_equals_eager(rank: int, few: bool, tmp_path: Path) -> None:
    model = EveryMask(rank, few).eval()
    batch = 1 if rank == 2 else 3
    free = rank == 3  # a batch that is free costs three times as much
    traced = fxprune.trace(
        model, (torch.randn(batch, 5, 24),), modes=("eval",), dynamic_shapes="batch" if free else None
    )
    fxprune.export.to_onnx(traced, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    x = torch.randn(7 if free else batch, 5, 24)
    names = [value.name for value in session.get_outputs()]
    for name, found, expected in zip(names, session.run(None, {"x": x.numpy()}), model(x).values(), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6, err_msg=name)


class Heads(nn.Module):
    """Attention without a mask, or with one for any batch that hides nothing, as transformers makes it."""

    def __init__(self, masked: bool = False) -> None:
        super().__init__()
        self.masked = masked

    def forward(self, x: Tensor) -> Tensor:
        mask = (torch.arange(5)[None, None, :, None] >= 0).expand(x.shape[0], -1, -1, 5)
        return attention(x, 4, mask if self.masked else None)


def test_a_mask_that_hides_nothing_costs_nothing(tmp_path: Path) -> None:
    for masked in (False, True):
        exported(Heads(masked), torch.randn(2, 5, 24), tmp_path / f"{masked}.onnx")
    assert operators(tmp_path / "True.onnx") == operators(tmp_path / "False.onnx")
    assert operators(tmp_path / "True.onnx").keys().isdisjoint({"Where", "IsNaN", "Add"})


class Prompted(nn.Module):
    """A parameter is what attention and a linear layer act on."""

    def __init__(self) -> None:
        super().__init__()
        self.prompt = nn.Parameter(torch.randn(1, 5, 8))
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return (
            functional.scaled_dot_product_attention(self.prompt, self.prompt, self.prompt) + self.layer(self.prompt) + x
        )


def test_a_masked_parameter_may_be_the_data(tmp_path: Path) -> None:
    traced = fxprune.trace(Prompted(), (torch.randn(2, 5, 8),), modes=("eval",))
    fxprune.prune.l1_unstructured(traced, "prompt", 0.5)
    assert fxprune.export.to_onnx(traced, tmp_path / "model.onnx").comparison.ok


def test_attention_is_one_operator_where_onnx_has_it(tmp_path: Path) -> None:
    exported(Heads(), torch.randn(2, 5, 24), tmp_path / "model.onnx", opset=23)
    assert operators(tmp_path / "model.onnx")["Attention"] == 1


@pytest.mark.parametrize(
    ("free", "expected"),
    [("batch", {"Reshape", "Gemm"}), (None, {"Reshape", "Gemm"}), (({0: Dim("b"), 1: Dim("t")},), {"MatMul", "Add"})],
)
def test_linear_layers_act_on_matrices_where_the_shape_can_be_inferred(
    free: Any, expected: set[str], tmp_path: Path
) -> None:
    traced = fxprune.trace(nn.Linear(8, 6), (torch.randn(2, 5, 8),), dynamic_shapes=free, modes=("eval",))
    assert fxprune.export.to_onnx(traced, tmp_path / "linear.onnx").comparison.ok
    assert operators(tmp_path / "linear.onnx").keys() == expected


@pytest.mark.parametrize(
    "options",
    [{}, {"num_layers": 2, "bidirectional": True, "bias": False}],
    ids=["one", "both ways"],
)
def test_a_recurrent_layer_with_projections_becomes_one_without_and_products(
    options: dict[str, Any], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    layer = nn.LSTM(6, 8, proj_size=4, batch_first=True, **options)
    x = torch.randn(2, 5, 6)
    session = exported(layer, x, tmp_path / "model.onnx")
    output, (hidden, cell) = layer(x)
    for want, got in zip(
        (output, hidden, cell), session.run(None, {session.get_inputs()[0].name: x.numpy()}), strict=True
    ):
        np.testing.assert_allclose(got, want.detach().numpy(), rtol=1e-4, atol=1e-6)
    assert operators(tmp_path / "model.onnx")["LSTM"] == layer.num_layers


class Continued(nn.Module):
    """A recurrent layer with projections that goes on from a state."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.LSTM(6, 8, proj_size=4)

    def forward(self, x: Tensor, hidden: Tensor, cell: Tensor) -> Tensor:
        return self.layer(x, (hidden, cell))[0]


def test_projections_from_a_given_state_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    states = torch.randn(1, 2, 4), torch.randn(1, 2, 8)
    traced = fxprune.trace(Continued().eval(), (torch.randn(5, 2, 6), *states), modes=("eval",), dynamic_shapes=None)
    with pytest.raises(
        fxprune.errors.ExportError, match=r"in layer\) has projections \(proj_size\) and an initial state"
    ):
        fxprune.export.to_onnx(traced, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


class Squeezed(nn.Module):
    """Squeezes of axes that are of size one, and of others."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        one = x[:, :, :1]
        every = one[:, :1].squeeze().reshape(-1, 1, 1) + x
        return x.squeeze(1) + 1, one.squeeze((1, 2)), x.squeeze(-2) * 2, x[0, 0, 0].squeeze(0) + x, every


@pytest.mark.parametrize("batch", [1, 3])
def test_squeezes_of_axes_that_are_of_another_size_do_nothing(batch: int, tmp_path: Path) -> None:
    session = exported(Squeezed(), torch.randn(2, 4, 5), tmp_path / "model.onnx")
    x = torch.randn(batch, 4, 5)
    found = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    for want, got in zip(Squeezed()(x), found, strict=True):
        np.testing.assert_array_equal(got, want.numpy())


class Extremes(nn.Module):
    """The largest and smallest numbers so far along axes."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        whole = (8 * x).long()
        return x.cummax(1)[0], x.cummin(-1).values, whole.cummax(2)[0], x[:, :, :1].cummax(-1)[0]


def test_the_largest_and_smallest_numbers_so_far(tmp_path: Path) -> None:
    session = exported(Extremes(), torch.randn(2, 4, 7), tmp_path / "model.onnx")
    x = torch.randn(3, 4, 7)
    x[0, 1, 2] = torch.nan
    for want, got in zip(Extremes()(x), session.run(None, {session.get_inputs()[0].name: x.numpy()}), strict=True):
        np.testing.assert_array_equal(got, want.numpy())


class Hashes(nn.Module):
    """Sums of whole numbers that are products, beyond 2^53 and 2^63."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        large = x * 1000000007 ** torch.arange(5)
        cubes = (x + 3000000) ** 3
        sums = large.sum(-1) % 30000, large.sum((0, 2), keepdim=True), large[0].sum(), (large**5).sum(1), x.sum(-1)
        return cubes, *sums


def test_whole_numbers_of_64_bits_are_exact(tmp_path: Path) -> None:
    x = torch.randint(0, 60, (2, 3, 5))
    session = exported(Hashes(), x, tmp_path / "model.onnx")
    x = torch.randint(0, 60, (4, 3, 5))
    for want, got in zip(Hashes()(x), session.run(None, {session.get_inputs()[0].name: x.numpy()}), strict=True):
        np.testing.assert_array_equal(got, want.numpy())


class Differences(nn.Module):
    """Numbers less tensors of other kinds, as masks are turned around."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: Tensor, mask: Tensor) -> dict[str, Tensor]:
        y = self.layer(x)
        return {
            "hidden": y * (1.0 - mask),
            "whole": 1 - mask,
            "added": (1.0 - mask.to(y.dtype)) * -1e4 + y,
            "twice": torch.rsub(mask, 2.5, alpha=2) * y,
        }


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.float32])
def test_a_number_less_a_tensor_equals_eager_whatever_kinds_they_are_of(dtype: torch.dtype, tmp_path: Path) -> None:
    model, x, mask = Differences().eval(), torch.randn(4, 3), torch.tensor([[1], [0], [1], [1]], dtype=dtype)
    traced = fxprune.trace(model, (x, mask), modes=("eval",))
    fxprune.export.to_onnx(traced, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    found = session.run(None, {"x": x[:3].numpy(), "mask": mask[:3].numpy()})
    for value, wanted in zip(found, model(x[:3], mask[:3]).values(), strict=True):
        np.testing.assert_allclose(value, wanted.detach().numpy(), rtol=1e-5, atol=1e-6)
        assert value.dtype == wanted.detach().numpy().dtype


class _ManyClamps(nn.Module):
    """One value between several pairs of bounds, which are buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.bounds = nn.Buffer(torch.tensor([0.1, 0.2, 0.3]))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = self.linear(x)
        return tuple(torch.clamp(y, -bound, bound) for bound in self.bounds)


def test_a_value_that_is_clamped_several_times_has_the_bounds_of_each(tmp_path: Path) -> None:
    model = _ManyClamps().eval()
    traced = fxprune.trace(model, torch.randn(2, 4), modes=("eval",))
    fxprune.export.to_onnx(traced, tmp_path / "clamps.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "clamps.onnx", providers=["CPUExecutionProvider"])
    x = torch.randn(5, 4)
    for found, wanted in zip(session.run(None, {"x": x.numpy()}), model(x), strict=True):
        np.testing.assert_allclose(found, wanted.detach().numpy(), rtol=1e-5, atol=1e-6)


class Ratio(nn.Module):
    """A quotient that something next to zero keeps from being none, as linear attention has it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x).relu()
        return y / (y.sum(1, keepdim=True) + 1e-15)


def test_numbers_next_to_zero_are_added(tmp_path: Path) -> None:
    model = Ratio().eval()
    nn.init.constant_(model.layer.bias, -100.0)  # every sum is zero
    x = torch.randn(2, 3)
    session = exported(model, x, tmp_path / "model.onnx")
    np.testing.assert_array_equal(session.run(None, {"x": x.numpy()})[0], np.zeros((2, 3), np.float32))


class Choices(nn.Module):
    """Truth values chosen by truth values, as masks of attention are put together."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        positive, large = x > 0, x.abs() > 0.5
        row = large[:1]
        return (
            positive.masked_fill(large, True),
            positive.masked_fill(row, False),
            torch.where(row, positive, ~large),
            torch.where(large, x, positive),
            positive.masked_fill(large, x.sum() > 0),
            positive.masked_fill(large, x[0, 0]),
            positive.masked_fill(large, x.shape[0]),
            torch.where(large, positive, True),
            torch.where(row, False, positive),
            torch.where(large[:, :1], True, False),
        )


def test_truth_values_are_chosen(tmp_path: Path) -> None:
    model = Choices().eval()
    x = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    session = exported(model, x, tmp_path / "model.onnx")
    for found, wanted in zip(session.run(None, {"x": x.numpy()}), model(x), strict=True):
        assert len(np.unique(found)) > 1
        np.testing.assert_array_equal(found, wanted.numpy())


class Checked(nn.Module):
    """What it is given is checked by value, and written into: it is captured once more for its file."""

    def forward(self, x: Tensor) -> Tensor:
        torch._check_tensor_all(x.isfinite(), lambda: "infinite")
        y = x + 1
        y.add_(1)
        return y


def test_values_that_are_checked_leave_the_rest(tmp_path: Path) -> None:
    x = torch.randn(2, 3)
    session = exported(Checked(), x, tmp_path / "model.onnx")
    np.testing.assert_array_equal(session.run(None, {"x": x.numpy()})[0], (x + 2).numpy())


class Halves(nn.Module):
    """A batch cut into halves, as guidance without a classifier does, and three of them into parts."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        first, second = x.chunk(2)
        return first - second, *torch.cat([x.relu(), x, -x]).chunk(3), x.mT.chunk(2, dim=1)[1]


def test_a_batch_is_cut_into_parts(tmp_path: Path) -> None:
    x = torch.randn(4, 3, 8)
    traced = fxprune.trace(Halves(), x, dynamic_shapes=({0: 2 * Dim("half"), 1: Dim("rows", max=99)},), modes=("eval",))
    fxprune.export.to_onnx(traced, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    for data in (x, torch.randn(6, 2, 8)):
        for found, wanted in zip(session.run(None, {"x": data.numpy()}), Halves()(data), strict=True):
            np.testing.assert_array_equal(found, wanted.numpy())


class Batches(nn.Module):
    """Several batches at once, and what became of each."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return torch.cat([x.relu(), x, -x]).split(x.shape[0])


def test_several_batches_at_once_are_cut_apart(tmp_path: Path) -> None:
    session = exported(Batches(), torch.randn(2, 3), tmp_path / "model.onnx")
    for x in (torch.randn(1, 3), torch.randn(5, 3)):
        for found, wanted in zip(session.run(None, {"x": x.numpy()}), Batches()(x), strict=True):
            np.testing.assert_array_equal(found, wanted.numpy())


@pytest.mark.parametrize(
    ("pool", "free"),
    [
        (nn.AdaptiveMaxPool1d(3), {}),
        (nn.AdaptiveMaxPool2d((3, 5)), {}),
        (nn.AdaptiveMaxPool2d((4, 3)), {2: Dim.AUTO, 3: Dim.AUTO}),
        (nn.AdaptiveMaxPool3d((1, 3, 2)), {4: Dim.AUTO}),
    ],
)
def test_windows_of_several_sizes_are_pooled(tmp_path: Path, pool: nn.Module, free: dict[int, Any]) -> None:
    rank = int(type(pool).__name__[-2])
    x = torch.randn(2, 3, *[8] * rank)
    traced = fxprune.trace(pool, x, dynamic_shapes=({0: Dim.AUTO} | free,), modes=("eval",))
    fxprune.export.to_onnx(traced, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    for data in (x, torch.randn(3, 3, *(7 if dim in free else 8 for dim in range(2, rank + 2)))):
        (found,) = session.run(None, {session.get_inputs()[0].name: data.numpy()})
        np.testing.assert_array_equal(found, pool(data).numpy())


class OfNothing(nn.Module):
    """Attends to what it reads, and to none of it, as of images where no image is given."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        empty = self.layer(x[:, : x.shape[1] - 5])
        keys = torch.cat([empty, self.layer(x)], 1)
        x, keys, empty = (each.unflatten(-1, (2, 4)).transpose(1, 2) for each in (x, keys, empty))
        return sum(functional.scaled_dot_product_attention(x, each, each[..., :3]) for each in (keys, empty))


def test_what_is_empty_is_not_written(tmp_path: Path) -> None:
    model, x = OfNothing(), torch.randn(2, 5, 8)
    session = exported(model, x, tmp_path / "model.onnx")
    assert operators(tmp_path / "model.onnx")["Concat"] == 0
    for data in (x, torch.randn(3, 5, 8)):
        (found,) = session.run(None, {"x": data.numpy()})
        np.testing.assert_allclose(found, model(data).detach().numpy(), rtol=1e-5, atol=1e-6)


class Rotated(nn.Module):
    """Turned by angles, as by complex numbers of positions."""

    def forward(self, x: Tensor, angles: Tensor) -> tuple[Tensor, Tensor]:
        turns = torch.polar(torch.ones_like(angles), angles)
        numbers = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
        return tuple(torch.view_as_real(numbers * turns.unsqueeze(dim)).flatten(3) for dim in (1, -2))


def test_complex_numbers_get_an_axis(tmp_path: Path) -> None:
    x, angles = torch.randn(2, 3, 3, 8), torch.randn(2, 3, 4)
    traced = fxprune.trace(Rotated(), (x, angles), modes=("eval",))
    fxprune.export.to_onnx(traced, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    found = session.run(None, {"x": x.numpy(), "angles": angles.numpy()})
    wanted = Rotated()(x, angles)
    assert not torch.equal(*wanted)
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one, other.numpy(), rtol=1e-5, atol=1e-6)


class MovedNumbers(nn.Module):
    """Complex numbers of positions, a constant, moved by `move` before they turn what comes in."""

    def __init__(self, move: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.move = move
        self.register_buffer("turns", torch.polar(torch.ones(6, 4), torch.randn(6, 4)))

    def forward(self, x: Tensor) -> Tensor:
        numbers = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
        return torch.view_as_real(self.move(numbers * self.turns) * 2).flatten(-2)


@pytest.mark.parametrize(
    "move",
    [
        lambda z: torch.ops.aten.alias(z),
        lambda z: z.chunk(2, -1)[1],
        lambda z: z.split(4, -2)[0] * z.split([4, 2], 1)[1].sum(1, keepdim=True),
        lambda z: z.detach().contiguous(),
        lambda z: z[:, :, None].expand(-1, -1, 3, -1),
        lambda z: z.flatten(-2),
        lambda z: z[:, torch.tensor([2, 0])],
        lambda z: z.index_select(-1, torch.tensor([2, 0])),
        lambda z: z.repeat(1, 2, 3),
        lambda z: z.reshape(-1, 4),
        lambda z: z.select(-1, 1) + z[:, 1:2, 0],
        lambda z: z[..., :1].squeeze(-1),
        lambda z: z.sum(0)[:1].squeeze(),
        lambda z: z[:, :1].squeeze((1, -1)),
        lambda z: z.unbind(-1)[2],
        lambda z: z.unflatten(-1, (2, 2)),
    ],
)
def test_complex_numbers_are_moved(tmp_path: Path, move: Callable[[Tensor], Tensor]) -> None:
    model, x = MovedNumbers(move), torch.randn(2, 6, 8)
    traced = fxprune.trace(model, x, modes=("eval",))
    fxprune.export.to_onnx(traced, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    for data in (x, torch.randn(5, 6, 8)):
        (found,) = session.run(None, {"x": data.numpy()})
        np.testing.assert_allclose(found, model(data).numpy(), rtol=1e-5, atol=1e-6)


class Turned(nn.Module):
    """Turned by complex numbers that are given, as these or as their parts."""

    def __init__(self, gives_parts: bool) -> None:
        super().__init__()
        self.gives_parts, self.layer = gives_parts, nn.Linear(8, 8)

    def forward(self, x: Tensor, turns: Tensor) -> Tensor:
        turned = torch.view_as_complex(self.layer(x).unflatten(-1, (-1, 2))) * turns
        return torch.view_as_real(turned).flatten(-2) if self.gives_parts else turned


@pytest.mark.parametrize("gives_parts", [False, True])
def test_complex_inputs_and_outputs_are_their_parts_in_a_file(tmp_path: Path, gives_parts: bool) -> None:
    x, turns = torch.randn(2, 6, 8), torch.polar(torch.ones(2, 6, 4), torch.randn(2, 6, 4))
    model = Turned(gives_parts)
    traced = fxprune.trace(model, (x, turns), modes=("eval",))
    report = fxprune.export.to_onnx(traced, tmp_path / "model.onnx")
    assert report.comparison is not None
    assert all(row.error is not None for row in report.comparison.rows)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    (found,) = session.run(None, {"x": x.numpy(), "turns": torch.view_as_real(turns).numpy()})
    wanted = model(x, turns)
    wanted = wanted if gives_parts else torch.view_as_real(wanted)
    np.testing.assert_allclose(found, wanted.detach().numpy(), rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        model.layer.weight[0] += 0.1
    assert not fxprune.compare(model, tmp_path / "model.onnx", inputs=(x, turns)).ok


class _Triangular(nn.Module):
    """Systems with one matrix, as layers with a gated delta rule solve them."""

    def __init__(self, upper: bool, ones: bool) -> None:
        super().__init__()
        self.upper, self.ones = upper, ones

    def forward(self, matrix: Tensor, given: Tensor) -> tuple[Tensor, ...]:
        options = {"upper": self.upper, "unitriangular": self.ones}
        columns = torch.linalg.solve_triangular(matrix, given, **options)
        rows = torch.linalg.solve_triangular(matrix, given.mT.contiguous(), left=False, **options)
        return columns, rows


@pytest.mark.parametrize(
    ("size", "upper", "ones"), [(64, False, True), (64, True, False), (5, False, False), (1, True, True)]
)
def test_triangular_systems_are_solved_as_by_torch(size: int, upper: bool, ones: bool, tmp_path: Path) -> None:
    matrix = torch.ones(2, 4, size, size) + 0.01 * torch.randn(2, 4, size, size)  # its powers grow beyond float32
    given, model = torch.randn(2, 4, size, 8), _Triangular(upper, ones).eval()
    traced = fxprune.trace(model, (matrix, given), modes=("eval",))
    fxprune.export.to_onnx(traced, tmp_path / "systems.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "systems.onnx", providers=["CPUExecutionProvider"])
    matrix, given = matrix[[0, 1, 0]], given.flip(0)[[0, 1, 1]]
    found = session.run(None, {"matrix": matrix.numpy(), "given": given.numpy()})
    for value, wanted in zip(found, model(matrix.double(), given.double()), strict=True):
        np.testing.assert_allclose(value, wanted.numpy(), atol=1e-4)
