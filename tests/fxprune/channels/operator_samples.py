"""For each operator that the channel analysis knows, a tiny use of it between two layers, and how many rows then stay.

A name is that of an operator, with the overload where the analysis knows this one alone.

The first layer has eight rows, of which the second, third, sixth and seventh are zero (bias included): the halves lose
the same. Four rows stay where the operator lets dead channels go, eight where it pins them.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

aten = torch.ops.aten
DEAD = (1, 2, 5, 6)
WENT, PINNED = 4, 8
CHANNELS = {"image": 1, "sequence": 1, "volume": 1, "tokens": 2, "matrix": 1}


@dataclass(frozen=True)
class Sample:
    """`call` stands between the layers and takes what the first gives, and `parameters` of its own.

    Attributes:
        over: what the layers work on: images [N, 8, 6, 6], sequences [N, 8, 6], volumes [N, 8, 4, 4, 4], tokens
            [N, 6, 8] or a matrix [N, 8].
        kept: how many rows of the first layer stay.
        free: whether the batch can be captured as a free size.
    """

    call: Callable[..., Any]
    over: str = "image"
    kept: int = WENT
    parameters: tuple[Callable[[], nn.Module | Tensor], ...] = ()
    free: bool = True


def image(call: Callable[..., Any], *parameters: Callable[[], Any], kept: int = WENT) -> Sample:
    return Sample(call, "image", kept, parameters)


def sequence(call: Callable[..., Any], *parameters: Callable[[], Any], kept: int = WENT) -> Sample:
    return Sample(call, "sequence", kept, parameters)


def volume(call: Callable[..., Any], *parameters: Callable[[], Any], kept: int = WENT) -> Sample:
    return Sample(call, "volume", kept, parameters)


def tokens(call: Callable[..., Any], *parameters: Callable[[], Any], kept: int = WENT) -> Sample:
    return Sample(call, "tokens", kept, parameters)


def matrix(call: Callable[..., Any], *parameters: Callable[[], Any], kept: int = WENT) -> Sample:
    return Sample(call, "matrix", kept, parameters)


def tensor(*shape: int) -> Callable[[], Tensor]:
    return lambda: nn.Parameter(torch.rand(shape).double() + 0.5)


def buffer(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.rand(shape).double() + 0.5


def heads(x: Tensor) -> Tensor:
    """Two heads of four."""
    return x.view(x.shape[0], x.shape[1], 2, 4).transpose(1, 2)


def joined(x: Tensor) -> Tensor:
    return x.transpose(1, 2).reshape(x.shape[0], x.shape[2], 8)


def bits(x: Tensor) -> Tensor:
    return (x * 8).to(torch.int32)


def shape_of(x: Tensor) -> tuple[int, ...]:
    return (x.shape[0], 8, 6, 6)


def each(names: str, sample: Callable[[Callable[..., Any]], Sample]) -> dict[str, Sample]:
    """One sample for each of these functions of torch."""
    return {name: sample(getattr(torch, name)) for name in names.split()}


# pointwise operators that carry no tag (in some version of torch), and one that does
POINTWISE = {
    "leaky_relu": image(F.leaky_relu),
    "hardswish": image(F.hardswish),
    "log_sigmoid": image(F.logsigmoid),
    "nan_to_num": image(torch.nan_to_num),
    "copy": image(lambda x: aten.copy.default(torch.zeros_like(x), x)),
    "__and__": image(lambda x: (bits(x) & 3).to(x.dtype)),
    "__or__": image(lambda x: (bits(x) | 4).to(x.dtype)),
    "__xor__": image(lambda x: (bits(x) ^ 4).to(x.dtype)),
    "bitwise_not": image(lambda x: bits(x).bitwise_not().to(x.dtype)),
    "relu": image(F.relu),
    "neg": image(torch.neg),
    **each("add sub mul", lambda f: image(lambda x: f(x, x.flip(1).flip(1) + 0.5))),
    "pow": image(lambda x: x**2),
    **each("eq ne lt le gt ge", lambda f: image(lambda x: x * f(x, 0.1).to(x.dtype))),
    "prelu": image(F.prelu, tensor(8)),
    "glu": image(lambda x: F.glu(x, 1)),
}
COPIES = {
    "clone": image(torch.clone),
    "contiguous": image(lambda x: x.transpose(2, 3).contiguous()),
    "detach": image(lambda x: x + x.detach()),
    "alias": image(aten.alias.default),
    "to": image(lambda x: x.to(torch.float32).to(torch.float64)),
    "_to_copy": image(lambda x: aten._to_copy.default(x, dtype=torch.float64)),
    "type_as": image(lambda x: x.type_as(x.relu())),
    "lift_fresh_copy": image(lambda x: x + torch.tensor(1.0, dtype=torch.float64)),
    "positive": image(torch.positive),
    "dropout": image(lambda x: F.dropout(x, 0.5, False)),
    "feature_dropout": image(lambda x: torch.feature_dropout(x, 0.5, False)),
    "alpha_dropout": image(lambda x: torch.alpha_dropout(x, 0.5, False)),
    "feature_alpha_dropout": image(lambda x: torch.feature_alpha_dropout(x, 0.5, False)),
}
CREATION = {
    "zeros": image(lambda x: x + torch.zeros(shape_of(x), dtype=x.dtype)),
    "ones": image(lambda x: x * torch.ones(shape_of(x), dtype=x.dtype)),
    "full": image(lambda x: x + torch.full(shape_of(x), 2.0, dtype=x.dtype)),
    "empty": image(lambda x: torch.where(x == x, x, torch.empty(shape_of(x), dtype=x.dtype)), kept=PINNED),
    "rand": image(lambda x: x + 0 * torch.rand(shape_of(x), dtype=x.dtype), kept=PINNED),
    "randn": image(lambda x: x * (torch.randn(shape_of(x), dtype=x.dtype) < 99), kept=PINNED),
    "new_zeros": image(lambda x: x + x.new_zeros(shape_of(x))),
    "new_ones": image(lambda x: x * x.new_ones(shape_of(x))),
    "new_full": image(lambda x: x + x.new_full(shape_of(x), 2.0)),
    "new_empty": image(lambda x: torch.where(x == x, x, x.new_empty(shape_of(x))), kept=PINNED),
    "zeros_like": image(lambda x: x + torch.zeros_like(x)),
    "ones_like": image(lambda x: x * torch.ones_like(x)),
    "full_like": image(lambda x: x + torch.full_like(x, 2.0)),
    "empty_like": image(lambda x: torch.where(x == x, x, torch.empty_like(x)), kept=PINNED),
    "rand_like": image(lambda x: x * (torch.rand_like(x) < 2), kept=PINNED),
    "randn_like": image(lambda x: x * (torch.randn_like(x) < 99), kept=PINNED),
    "bernoulli": image(lambda x: x * (torch.bernoulli(x.sigmoid()) < 2), kept=PINNED),
    "arange": image(lambda x: x + torch.arange(6, dtype=x.dtype), kept=PINNED),
    "scalar_tensor": image(lambda x: x + torch.scalar_tensor(2.0, dtype=x.dtype), kept=PINNED),
    "linspace": image(lambda x: x + torch.linspace(0, 1, 6, dtype=x.dtype), kept=PINNED),
    "eye": image(lambda x: x * torch.eye(6, dtype=x.dtype)),
    "tril_indices": image(lambda x: x + torch.tril_indices(6, 6)[0, :6], kept=PINNED),
    "triu_indices": image(lambda x: x + torch.triu_indices(6, 6)[0, :6], kept=PINNED),
}
SHAPES = {
    "getitem": image(lambda x: x.split(4, 1)[1], kept=2),
    "view.default": image(lambda x: x.view(x.shape[0], 2, 4, 6, 6).view(x.shape[0], 8, 6, 6)),
    "reshape": image(lambda x: x.reshape(x.shape[0], 2, 4, 36).reshape(x.shape[0], 8, 6, 6)),
    "_unsafe_view": image(lambda x: aten._unsafe_view.default(x, (x.shape[0], 8, 36)).view(x.shape[0], 8, 6, 6)),
    "flatten.using_ints": image(lambda x: x.flatten(2).view(x.shape[0], 8, 6, 6)),
    "unflatten.int": image(lambda x: x.unflatten(1, (2, 4)).flatten(1, 2)),
    "view_as": image(lambda x: x.flatten(2).view_as(x)),
    "view_as_complex": image(lambda x: torch.view_as_complex(x.unflatten(3, (3, 2))).abs()),
    **each("real imag", lambda f: image(lambda x: f(torch.view_as_complex(x.unflatten(3, (3, 2)))))),
    "view_as_real": image(
        lambda x: torch.view_as_real(
            torch.view_as_complex(x.unflatten(3, (3, 2))) * torch.polar(x.new_ones(3), x.new_ones(3))
        ).flatten(3)
    ),
    "reshape_as": image(lambda x: x.flatten(2).reshape_as(x)),
    "permute": image(lambda x: x.permute(0, 2, 3, 1).permute(0, 3, 1, 2)),
    "transpose.int": image(lambda x: x.transpose(1, 2).transpose(2, 1)),
    "t": matrix(lambda x: x.t().relu().t()),
    "swapaxes": image(lambda x: x.swapaxes(1, 2).swapaxes(1, 2)),
    "swapdims": image(lambda x: x.swapdims(1, 2).swapdims(1, 2)),
    "numpy_T": matrix(lambda x: x.T.relu().T),
    "mT": tokens(lambda x: x.mT.relu().mT),
    "adjoint": tokens(lambda x: x.adjoint().relu().adjoint()),
    "movedim": image(lambda x: x.movedim(1, 3).movedim(3, 1)),
    "moveaxis": image(lambda x: x.moveaxis(1, 3).moveaxis(3, 1)),
    "unsqueeze": image(lambda x: x.unsqueeze(1)[:, 0]),
    "squeeze": image(lambda x: x.mean(3, keepdim=True).squeeze(3).unsqueeze(3)),
    "expand": image(lambda x: x.mean(3, keepdim=True).expand(x.shape[0], 8, 6, 6)),
    "broadcast_to": image(lambda x: x.mean(3, keepdim=True).broadcast_to(x.shape[0], 8, 6, 6)),
    "expand_as": image(lambda x: x.mean(3, keepdim=True).expand_as(x)),
    "repeat": image(lambda x: x.repeat(1, 2, 1, 1)),
    "tile": image(lambda x: x.tile(1, 2, 1, 1)),
    "repeat_interleave.self_int": image(lambda x: x.repeat_interleave(2, 1, output_size=16)),
    "repeat_interleave.self_Tensor": image(
        lambda x, counts: torch.repeat_interleave(x, counts, 1, output_size=16),
        lambda: torch.full((8,), 2),
        kept=PINNED,
    ),
    "slice.Tensor": image(lambda x: x[:, 4:], kept=2),
    "narrow": image(lambda x: x.narrow(1, 4, 4), kept=2),
    "select.int": image(lambda x: x.unflatten(1, (2, 4)).select(1, 1), kept=2),
    "split": image(lambda x: x.split(4, 1)[0] + x.split(4, 1)[1]),
    "split_with_sizes": image(lambda x: x.split([2, 6], 1)[1], kept=3),
    "chunk": image(lambda x: torch.cat(x.chunk(2, 1)[::-1], 1)),
    "unsafe_split": image(lambda x: x.unsafe_split(4, 1)[1], kept=2),
    "unsafe_split_with_sizes": image(lambda x: x.unsafe_split_with_sizes([2, 6], 1)[1], kept=3),
    "unsafe_chunk": image(lambda x: x.unsafe_chunk(2, 1)[1], kept=2),
    "tensor_split": image(lambda x: x.tensor_split(2, 1)[1], kept=2),
    "unbind": image(lambda x: torch.add(*x.unflatten(1, (2, 4)).unbind(1))),
    "cat": image(lambda x: torch.cat([x, x.relu()], 1)),
    "concat": image(lambda x: torch.concat([x, x.relu()], 1)),
    "concatenate": image(lambda x: torch.concatenate([x, x.relu()], 1)),
    "stack": image(lambda x: torch.stack([x, x.relu()], 2).flatten(2, 3)),
    "flip": image(lambda x: x.flip(1)),
    "roll": image(lambda x: x.roll(3, 1)),
    "pad": image(lambda x: F.pad(x, (1, 1, 1, 1, 1, 2))),
    "constant_pad_nd": image(lambda x: aten.constant_pad_nd.default(x, (1, 1, 1, 1))),
    "reflection_pad1d": sequence(lambda x: aten.reflection_pad1d.default(x, (1, 1))),
    "reflection_pad2d": image(lambda x: aten.reflection_pad2d.default(x, (1, 1, 1, 1))),
    "reflection_pad3d": volume(lambda x: aten.reflection_pad3d.default(x, (1, 1, 1, 1, 1, 1))),
    "replication_pad1d": sequence(lambda x: aten.replication_pad1d.default(x, (1, 1))),
    "replication_pad2d": image(lambda x: aten.replication_pad2d.default(x, (1, 1, 1, 1))),
    "replication_pad3d": volume(lambda x: aten.replication_pad3d.default(x, (1, 1, 1, 1, 1, 1))),
    "_pad_circular": image(lambda x: aten._pad_circular.default(x, (1, 1, 1, 1))),
    "index.Tensor": image(lambda x, order: x[:, order], lambda: torch.tensor([3, 2, 1, 0, 7, 6, 5, 4])),
    "index_copy": image(
        lambda x, order: x.index_copy(3, order, x[..., ::2].sigmoid() - 0.5), lambda: torch.tensor([5, 0, 2])
    ),
    "index_select": image(lambda x, order: x.index_select(1, order), lambda: torch.tensor([3, 2, 1, 0, 7, 6, 5, 4])),
    "embedding": tokens(lambda x, table: x + F.embedding(torch.arange(6), table), tensor(6, 8), kept=PINNED),
    "pixel_shuffle": image(lambda x: F.pixel_shuffle(x, 2), kept=PINNED),
    "pixel_unshuffle": image(lambda x: F.pixel_unshuffle(x, 2)),
    "channel_shuffle": image(lambda x: F.channel_shuffle(x, 2)),
    "native_channel_shuffle": Sample(lambda x: torch.native_channel_shuffle(x, 2), free=False),
    "im2col": image(lambda x: F.unfold(x, 2).unsqueeze(3)),
    "col2im": image(lambda x: F.fold(F.unfold(x, 2, padding=1), (6, 6), 2, padding=1)),
    "unfold": image(lambda x: x.unfold(2, 2, 2).flatten(3)),
}
REDUCTIONS = {
    **each("mean sum nansum amax amin", lambda f: image(lambda x: f(x, 3, keepdim=True))),
    **each(
        "var std logsumexp prod argmax argmin any all",
        lambda f: image(lambda x: f(x, 3, keepdim=True).to(x.dtype), kept=PINNED),
    ),
    "max.dim": image(lambda x: x.max(3, keepdim=True)[0], kept=PINNED),
    "max.default": image(lambda x: x + x.max(), kept=PINNED),
    "where.Scalar": image(lambda x: x + torch.where(x > 0, 1.0, 2.0)),
    "where.ScalarOther": image(lambda x: torch.where(x > -9, x, 2.0)),
    "where.ScalarSelf": image(lambda x: torch.where(x > 9, 2.0, x)),
    "max.other": image(lambda x: torch.max(x, x.relu() + 0.5)),
    "min.dim": image(lambda x: x.min(3, keepdim=True)[0], kept=PINNED),
    "min.default": image(lambda x: x + x.min(), kept=PINNED),
    "min.other": image(lambda x: torch.min(x, x.relu() + 0.5)),
    "var_mean": image(lambda x: torch.var_mean(x, 3, keepdim=True)[1], kept=PINNED),
    "std_mean": image(lambda x: torch.std_mean(x, 3, keepdim=True)[1], kept=PINNED),
    "linalg_vector_norm": image(lambda x: torch.linalg.vector_norm(x, 2, 3, True)),
    "norm": image(lambda x: aten.norm.ScalarOpt_dim(x, 2, [3], True)),
    "median": image(lambda x: x.median(3, keepdim=True)[0], kept=PINNED),
    "topk": image(lambda x: x.topk(2, 3)[0], kept=PINNED),
    "sort": image(lambda x: x.sort(3)[0], kept=PINNED),
    "argsort": image(lambda x: x.argsort(3).to(x.dtype), kept=PINNED),
    "kthvalue": image(lambda x: x.kthvalue(2, 3, True)[0], kept=PINNED),
    "count_nonzero": image(lambda x: x.count_nonzero(3).unsqueeze(3).to(x.dtype), kept=PINNED),
    "softmax": image(lambda x: x.softmax(3)),
    "log_softmax": image(lambda x: x.log_softmax(3), kept=PINNED),
    "_softmax": image(lambda x: aten._softmax.default(x, 3, False)),
    "_log_softmax": image(lambda x: aten._log_softmax.default(x, 3, False), kept=PINNED),
    "_safe_softmax": image(lambda x: aten._safe_softmax.default(x, 3), kept=PINNED),
    "cumsum": image(lambda x: x.cumsum(3), kept=PINNED),
    "cumprod": image(lambda x: x.cumprod(3), kept=PINNED),
    "logcumsumexp": image(lambda x: x.logcumsumexp(3), kept=PINNED),
    "tril": image(torch.tril, kept=PINNED),
    "triu": image(torch.triu, kept=PINNED),
    "diff": image(lambda x: x.diff(dim=3), kept=PINNED),
    "gather": image(lambda x: x.gather(3, x.argsort(3)), kept=PINNED),
}
POOLS = {
    "max_pool1d": sequence(lambda x: F.max_pool1d(x, 2)),
    "max_pool2d": image(lambda x: F.max_pool2d(x, 2)),
    "max_pool3d": volume(lambda x: F.max_pool3d(x, 2)),
    "avg_pool1d": sequence(lambda x: F.avg_pool1d(x, 2)),
    "avg_pool2d": image(lambda x: F.avg_pool2d(x, 2)),
    "avg_pool3d": volume(lambda x: F.avg_pool3d(x, 2)),
    "adaptive_avg_pool1d": sequence(lambda x: F.adaptive_avg_pool1d(x, 2)),
    "adaptive_avg_pool2d": image(lambda x: F.adaptive_avg_pool2d(x, 2)),
    "adaptive_avg_pool3d": volume(lambda x: F.adaptive_avg_pool3d(x, 2)),
    "_adaptive_avg_pool2d": image(lambda x: aten._adaptive_avg_pool2d.default(x, (2, 2))),
    "adaptive_max_pool1d": sequence(lambda x: F.adaptive_max_pool1d(x, 2)),
    "adaptive_max_pool2d": image(lambda x: F.adaptive_max_pool2d(x, 2)),
    "adaptive_max_pool3d": volume(lambda x: F.adaptive_max_pool3d(x, 2)),
    "max_pool1d_with_indices": sequence(lambda x: F.max_pool1d(x, 2, return_indices=True)[0]),
    "max_pool2d_with_indices": image(lambda x: F.max_pool2d(x, 2, return_indices=True)[0]),
    "max_pool3d_with_indices": volume(lambda x: F.max_pool3d(x, 2, return_indices=True)[0]),
    "upsample_nearest1d": sequence(lambda x: F.interpolate(x, scale_factor=2)),
    "upsample_nearest2d": image(lambda x: F.interpolate(x, scale_factor=2)),
    "upsample_nearest3d": volume(lambda x: F.interpolate(x, scale_factor=2)),
    "upsample_linear1d": sequence(lambda x: F.interpolate(x, scale_factor=2, mode="linear")),
    "upsample_bilinear2d": image(lambda x: F.interpolate(x, scale_factor=2, mode="bilinear")),
    "upsample_trilinear3d": volume(lambda x: F.interpolate(x, scale_factor=2, mode="trilinear")),
    "upsample_bicubic2d": image(lambda x: F.interpolate(x, scale_factor=2, mode="bicubic")),
    "_upsample_nearest_exact1d": sequence(lambda x: F.interpolate(x, scale_factor=2, mode="nearest-exact")),
    "_upsample_nearest_exact2d": image(lambda x: F.interpolate(x, scale_factor=2, mode="nearest-exact")),
    "_upsample_nearest_exact3d": volume(lambda x: F.interpolate(x, scale_factor=2, mode="nearest-exact")),
    "_upsample_bilinear2d_aa": image(lambda x: F.interpolate(x, scale_factor=0.5, mode="bilinear", antialias=True)),
    "_upsample_bicubic2d_aa": image(lambda x: F.interpolate(x, scale_factor=0.5, mode="bicubic", antialias=True)),
}
AFFINE = (tensor(8), tensor(8))
STATISTICS = (*AFFINE, buffer(8), buffer(8))
NORMS = {
    "batch_norm": image(lambda x, g, b, m, v: F.batch_norm(x, m, v, g, b), *STATISTICS),
    "_native_batch_norm_legit_no_training": image(
        lambda x, g, b, m, v: aten._native_batch_norm_legit_no_training.default(x, g, b, m, v, 0.1, 1e-5)[0],
        *STATISTICS,
    ),
    "native_batch_norm": image(
        lambda x, g, b, m, v: aten.native_batch_norm.default(x, g, b, m, v, False, 0.1, 1e-5)[0], *STATISTICS
    ),
    "_batch_norm_no_update": image(
        lambda x, g, b, m, v: aten._batch_norm_no_update.default(x, g, b, m, v, 0.1, 1e-5)[0], *STATISTICS
    ),
    "instance_norm": image(lambda x, g, b: F.instance_norm(x, weight=g, bias=b), *AFFINE),
    "layer_norm": tokens(lambda x, g, b: F.layer_norm(x, (8,), g, b), *AFFINE, kept=PINNED),
    "native_layer_norm": tokens(
        lambda x, g, b: aten.native_layer_norm.default(x, [8], g, b, 1e-5)[0], *AFFINE, kept=PINNED
    ),
    "rms_norm": tokens(lambda x, g: F.rms_norm(x, (8,), g), tensor(8)),
    "_fused_rms_norm": tokens(lambda x, g: aten._fused_rms_norm.default(x, [8], g, 1e-5)[0], tensor(8)),
    "group_norm": image(lambda x, g, b: F.group_norm(x, 2, g, b), *AFFINE, kept=PINNED),
    "native_group_norm": image(
        lambda x, g, b: aten.native_group_norm.default(x, g, b, x.shape[0], 8, 36, 2, 1e-5)[0], *AFFINE, kept=PINNED,
    ),
}  # fmt: skip
CONTRACTIONS = {
    "conv1d": sequence(lambda x, w, b: F.conv1d(x, w, b), tensor(6, 8, 3), tensor(6)),
    "conv2d": image(lambda x, w, b: F.conv2d(x, w, b), tensor(6, 8, 3, 3), tensor(6)),
    "conv3d": volume(lambda x, w, b: F.conv3d(x, w, b), tensor(6, 8, 2, 2, 2), tensor(6)),
    "conv_transpose1d": sequence(lambda x, w, b: F.conv_transpose1d(x, w, b), tensor(8, 6, 3), tensor(6)),
    "conv_transpose2d": image(lambda x, w, b: F.conv_transpose2d(x, w, b), tensor(8, 6, 3, 3), tensor(6)),
    "conv_transpose3d": volume(lambda x, w, b: F.conv_transpose3d(x, w, b), tensor(8, 6, 2, 2, 2), tensor(6)),
    "convolution": image(
        lambda x, w, b: aten.convolution.default(x, w, b, [1, 1], [0, 0], [1, 1], False, [0, 0], 1),
        tensor(6, 8, 3, 3), tensor(6),
    ),
    "linear": tokens(lambda x, w, b: F.linear(x, w, b), tensor(6, 8), tensor(6)),
    "addmm": matrix(lambda x, w, b: torch.addmm(b, x, w), tensor(8, 6), tensor(6)),
    "mm": matrix(lambda x, w: torch.mm(x, w), tensor(8, 6)),
    "matmul": tokens(lambda x, w: torch.matmul(x, w), tensor(8, 6)),
    "bmm": tokens(lambda x: torch.bmm(x, x.transpose(1, 2).softmax(-1)) @ x),
    "linalg_solve_triangular": tokens(
        lambda x: torch.linalg.solve_triangular(x @ x.transpose(1, 2), x, upper=False, unitriangular=True)
    ),
    "baddbmm": tokens(lambda x: torch.baddbmm(x.new_zeros(1, 6, 6), x, x.transpose(1, 2))),
    "mv": matrix(lambda x, w: torch.mv(x, w)[:, None], tensor(8)),
    "inner": tokens(lambda x, w: torch.inner(x, w), tensor(6, 8)),
    "tensordot": tokens(lambda x, w: torch.tensordot(x, w, ([2], [0])), tensor(8, 6)),
    "bilinear": tokens(lambda x, w, b: F.bilinear(x, x.flip(1), w, b), tensor(6, 8, 8), tensor(6)),
    "einsum": tokens(lambda x, w: torch.einsum("btc,dc->btd", x, w), tensor(6, 8)),
    "scaled_dot_product_attention": tokens(
        lambda x: joined(F.scaled_dot_product_attention(heads(x), heads(x), heads(x)))
    ),
    "lstm.input": tokens(lambda x, layer: layer(x)[0], lambda: nn.LSTM(8, 5, batch_first=True)),
    "gru.input": tokens(lambda x, layer: layer(x)[0], lambda: nn.GRU(8, 5, batch_first=True)),
    "rnn_tanh.input": tokens(lambda x, layer: layer(x)[0], lambda: nn.RNN(8, 5, batch_first=True)),
    "rnn_relu.input": tokens(lambda x, layer: layer(x)[0], lambda: nn.RNN(8, 5, batch_first=True, nonlinearity="relu")),
    "lstm_cell": matrix(lambda x, cell: torch.cat(cell(x), 1), lambda: nn.LSTMCell(8, 5)),
    "gru_cell": matrix(lambda x, cell: cell(x), lambda: nn.GRUCell(8, 5)),
    "rnn_tanh_cell": matrix(lambda x, cell: cell(x), lambda: nn.RNNCell(8, 5)),
    "rnn_relu_cell": matrix(lambda x, cell: cell(x), lambda: nn.RNNCell(8, 5, nonlinearity="relu")),
}  # fmt: skip
SAMPLES: dict[str, Sample] = {
    **POINTWISE, **COPIES, **CREATION, **SHAPES, **REDUCTIONS, **POOLS, **NORMS, **CONTRACTIONS
}  # fmt: skip

# What `torch.export` writes otherwise, and why; one that is reached after all needs a sample.
UNREACHED: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "lift_fresh": ("written as lift_fresh_copy", lambda x: aten.lift_fresh.default(x)),
}

# Arithmetic on sizes, which no channel passes: the operator and its arguments, where SIZE is a size of the graph and
# VALUE a tensor in it, and FLAG one with a single truth value.
SIZE, VALUE, FLAG = object(), object(), object()
ARITHMETIC: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
    "sym_size": (aten.sym_size.int, (VALUE, 0)),
    "sym_numel": (aten.sym_numel.default, (VALUE,)),
    "sym_stride": (aten.sym_stride.int, (VALUE, 0)),
    "sym_storage_offset": (aten.sym_storage_offset.default, (VALUE,)),
    "sym_max": (torch.sym_max, (SIZE, 1)),
    "sym_min": (torch.sym_min, (SIZE, 1)),
    "sym_int": (torch.sym_int, (SIZE,)),
    "sym_float": (torch.sym_float, (SIZE,)),
    "_sym_sqrt": (torch._sym_sqrt, (SIZE,)),
    "sym_not": (torch.sym_not, (False,)),
    "sym_sum": (torch.sym_sum, ([SIZE, SIZE],)),
    "sym_ite": (torch.sym_ite, (True, SIZE, 1)),
    "sym_constrain_range": (aten.sym_constrain_range.default, (SIZE,)),
    "sym_constrain_range_for_size": (aten.sym_constrain_range_for_size.default, (SIZE,)),
    "_assert_scalar": (aten._assert_scalar.default, (True, "a size")),
    "_assert_async": (aten._assert_async.msg, (FLAG, "a value")),
    "_assert_tensor_metadata": (aten._assert_tensor_metadata.default, (VALUE, None, None, torch.float64)),
    **{
        name: (getattr(operator, name), (SIZE, 2))
        for name in ("add", "sub", "mul", "floordiv", "truediv", "mod", "pow", "eq", "ne", "lt", "le", "gt", "ge",
                     "and_", "or_", "is_", "is_not")
    },
    "neg": (operator.neg, (SIZE,)),
    "not_": (operator.not_, (SIZE,)),
    "contains": (operator.contains, ([1, 2], SIZE)),
    "max": (max, (SIZE, 2)),
    "min": (min, (SIZE, 2)),
    "int": (int, (SIZE,)),
    "float": (float, (SIZE,)),
}  # fmt: skip
