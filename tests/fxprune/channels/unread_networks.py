"""Small networks of which some channels are zero, or are read by nobody, behind every kind of selection and product.

`first` writes sixteen channels unless a case says otherwise; what stands between it and the readers is the case.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.fxprune.channels.layers import Net, zero_rows

EIGHT = range(8)
LOW = (0, 1, 4, 5, 8, 9, 12, 13)  # two of each four
LAYERS: dict[str, Any] = {"image": nn.Conv2d, "sequence": nn.Conv1d, "volume": nn.Conv3d}
TRANSPOSED: dict[str, Any] = {"image": nn.ConvTranspose2d, "sequence": nn.ConvTranspose1d, "volume": nn.ConvTranspose3d}
SHAPES = {"image": (3, 8, 8), "sequence": (3, 12), "volume": (3, 4, 4, 4), "vector": (6,), "tokens": (5, 6)}


@dataclass(frozen=True)
class Case:
    """A network, what it is called with, and how many indices of axes of its parameters stay.

    Attributes:
        build: the network, in float32.
        over: a key of `SHAPES`.
        left: by parameter and axis.
    """

    build: Callable[[], nn.Module]
    over: str
    left: dict[tuple[str, int], int]


def dead(layer: Any, rows: Sequence[int], bias: bool = True) -> Any:
    """A layer with rows of zeros, and zeros in its bias unless that is alive."""
    zero_rows(layer, *rows, bias=bias)
    return layer


def unread(layer: Any, columns: Sequence[int]) -> Any:
    """A layer that has no weight on some of its inputs."""
    with torch.no_grad():
        layer.weight[:, list(columns)] = 0
    return layer


def rising(layer: Any) -> Any:
    """A layer without negative weights: what is positive, it lifts above zero."""
    with torch.no_grad():
        layer.weight.abs_()
        layer.bias.abs_()
    return layer


def dead_outputs(layer: Any, outputs: Sequence[int]) -> Any:
    """A transposed convolution of which some outputs are zero."""
    with torch.no_grad():
        within = layer.weight.shape[1]
        weight = layer.weight.view(layer.groups, -1, *layer.weight.shape[1:])
        for output in outputs:
            weight[output // within, :, output % within] = 0
        layer.bias[list(outputs)] = 0
    return layer


def matrix(*shape: int, zero: Any) -> nn.Parameter:
    """A weight with zeros where `zero`, an index, says."""
    value = torch.randn(shape)
    value[zero] = 0
    return nn.Parameter(value)


def conv(inputs: int, outputs: int, kernel: int = 1, **more: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, **more)


def _image(name: str, middle: Callable[[Tensor], Tensor], first: Any, second: Any, left: int) -> tuple[str, Case]:
    """A convolution, what is done with its channels, and a convolution."""
    network = lambda: Net(lambda s, x: s.second(middle(F.relu(s.first(x)))), first=first(), second=second())  # noqa: E731
    return name, Case(network, "image", {("first.weight", 0): left})


def _selected(name: str, middle: Callable[[Tensor], Tensor], count: int) -> tuple[str, Case]:
    """All weights alive; `count` channels are read."""
    return _image(name, middle, lambda: conv(3, 16), lambda: conv(count, 4), count)


def _moved(name: str, middle: Callable[[Tensor], Tensor]) -> list[tuple[str, Case]]:
    """Six of sixteen channels without readers, or dead."""
    return [
        _image(f"{name}, unread", middle, lambda: conv(3, 16), lambda: unread(conv(16, 4), range(6)), 10),
        _image(f"{name}, dead", middle, lambda: dead(conv(3, 16), range(6)), lambda: conv(16, 4), 10),
    ]


def _shuffle(x: Tensor) -> Tensor:
    b, c, h, w = x.shape
    return x.view(b, c // 4, 2, 2, h, w).permute(0, 1, 4, 2, 5, 3).reshape(b, c // 4, 2 * h, 2 * w)


def _unshuffle(x: Tensor) -> Tensor:
    b, c, h, w = x.shape
    return x.view(b, c, h // 2, 2, w // 2, 2).permute(0, 1, 3, 5, 2, 4).reshape(b, 4 * c, h // 2, w // 2)


def _slices(x: Tensor) -> Tensor:
    return torch.cat([x[..., i::2, j::2] for j in range(2) for i in range(2)], 1)


class Looked(nn.Module):
    """Channels in the order of a buffer."""

    def __init__(self, order: list[int], rows: Sequence[int] = ()) -> None:
        super().__init__()
        self.first, self.second = dead(conv(3, 16), rows), conv(len(order), 4)
        self.register_buffer("order", torch.tensor(order))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.relu(self.first(x)).index_select(1, self.order))


SELECTIONS: dict[str, Case] = dict(
    [
        _selected("every second", lambda x: x[:, ::2], 8),
        _selected("every second from the second", lambda x: x[:, 1::2], 8),
        _selected("every third, which leaves a rest", lambda x: x[:, ::3], 6),
        _selected("every third of a window", lambda x: x[:, 1:13:3], 4),
        _selected("a window", lambda x: x[:, 4:9], 5),
        _selected("a window from the end", lambda x: x[:, -5:], 5),
        _selected("narrow", lambda x: x.narrow(1, 4, 5), 5),
        _selected("narrow from the end", lambda x: x.narrow(1, -5, 5), 5),
        _selected("two indices, stacked", lambda x: torch.stack([x[:, 3], x[:, -1]], 1), 2),
        _selected("a list of indices", lambda x: x[:, [1, 5, 9, 14]], 4),
        _selected("an index by arange", lambda x: x[:, 2 * torch.arange(8)], 8),
        _selected("index_select by arange", lambda x: x.index_select(1, torch.arange(15, 0, -3)), 5),
        _image(
            "an index that is computed, with repeats", lambda x: x[:, torch.arange(-4, 4).abs() + 3],
            lambda: conv(3, 16), lambda: conv(8, 4), 5,
        ),
        _selected("chunk", lambda x: x.chunk(2, 1)[1], 8),
        _selected("chunk with a rest", lambda x: x.chunk(3, 1)[2], 4),
        _selected("split", lambda x: x.split([3, 5, 8], 1)[1], 5),
        _selected("tensor_split", lambda x: x.tensor_split(3, 1)[1], 5),
        _image(
            "two of unbind, one of them twice", lambda x: torch.stack([x.unbind(1)[i] for i in (3, 9, 3)], 1),
            lambda: conv(3, 16), lambda: conv(3, 4), 2,
        ),
        _selected("some of unbind", lambda x: torch.stack(x.unbind(1)[::2], 1), 8),
        _selected("one of two of unbind", lambda x: x.unflatten(1, (2, 8)).unbind(1)[1], 8),
        _selected("one of two of unbind, interleaved", lambda x: x.unflatten(1, (8, 2)).unbind(2)[1], 8),
        _selected("one of two by an index", lambda x: x.unflatten(1, (2, 8))[:, 1], 8),
        *_moved("all of unbind", lambda x: torch.stack(x.unbind(1), 1)),
        *_moved("all of unbind, in reverse on another axis", lambda x: torch.stack(x.unbind(1)[::-1], 3).movedim(3, 1)),
        *_moved("single indices", lambda x: torch.stack([x[:, i] for i in range(16)], 1)),
        *_moved("flip", lambda x: x.flip(1)),
        *_moved("roll", lambda x: x.roll((-3, 1), (1, 2))),
        ("an index that is stored", Case(lambda: Looked([14, 5, 9, 1]), "image", {("first.weight", 0): 4})),
        ("an index with repeats", Case(lambda: Looked([1, 5, 5, 14]), "image", {("first.weight", 0): 3})),
        (
            "an index, some of it dead",
            Case(lambda: Looked([14, 5, 9, 1], [5, 1]), "image", {("first.weight", 0): 2, ("second.weight", 1): 2}),
        ),
        (
            "both of every two, some of one unread",
            Case(
                lambda: Net(
                    lambda s, x: s.second(F.relu(s.first(x))[:, ::2]) + s.third(F.relu(s.first(x))[:, 1::2]),
                    first=conv(3, 16), second=unread(conv(8, 4), range(4)), third=conv(8, 4),
                ),
                "image",
                {("first.weight", 0): 12, ("second.weight", 1): 4, ("third.weight", 1): 8},
            ),
        ),
        (
            "every second of features",
            Case(
                lambda: Net(
                    lambda s, x: s.second(F.relu(s.first(x))[..., ::2]), first=nn.Linear(6, 16), second=nn.Linear(8, 4)
                ),
                "tokens",
                {("first.weight", 0): 8},
            ),
        ),
    ]
)  # fmt: skip

SHUFFLES: dict[str, Case] = dict(
    case
    for name, shuffle, unshuffle in [("pixels", F.pixel_shuffle, F.pixel_unshuffle), ("by hand", None, None)]
    for up, down in [
        (_shuffle, _unshuffle)
        if shuffle is None
        else (lambda x: F.pixel_shuffle(x, 2), lambda x: F.pixel_unshuffle(x, 2))
    ]
    for case in [
        _image(f"{name}, unread", up, lambda: conv(3, 16), lambda: unread(conv(4, 4), [0, 2]), 8),
        _image(f"{name}, dead", up, lambda: dead(conv(3, 16), [0, 1, 2, 3, 8, 9, 10, 11]), lambda: conv(4, 4), 8),
        _image(f"{name} back, unread", down, lambda: conv(3, 16), lambda: unread(conv(64, 4), range(32)), 8),
        _image(f"{name} back, dead", down, lambda: dead(conv(3, 16), EIGHT), lambda: conv(64, 4), 8),
    ]
)
SHUFFLES |= dict([_image("slices, dead", _slices, lambda: dead(conv(3, 16), EIGHT), lambda: conv(64, 4), 8)])


def _vector(call: Callable[..., Tensor], left: dict[tuple[str, int], int], over: str = "vector", **more: Any) -> Case:
    """A linear layer with sixteen outputs and what `call` does with them; `more` builds what else there is."""
    return Case(
        lambda: Net(
            lambda s, x: call(s, F.relu(s.first(x))),
            **{"first": nn.Linear(6, 16)} | {name: make() for name, make in more.items()},
        ),
        over,
        left,
    )


_INPUTS, _OUTPUTS = {("first.weight", 0): 8, ("second.weight", 1): 12}, {("second.weight", 1): 7}


def _between(
    equation: str, shape: tuple[int, ...], zero: Any, left: dict[tuple[str, int], int], over: str = "vector"
) -> Case:
    """An equation with a weight, and a linear layer that reads the twelve outputs."""
    return _vector(
        lambda s, y: s.second(torch.einsum(equation, y, s.weight).flatten(-1)), left, over,
        weight=lambda: matrix(*shape, zero=zero), second=lambda: nn.Linear(12, 4),
    )  # fmt: skip


ALL = slice(None)
EQUATIONS: dict[str, Case] = {
    "bi,ih->bh": _between("bi,ih->bh", (16, 12), slice(8), _INPUTS),
    "bi,ih->bh, rows": _between("bi,ih->bh", (16, 12), (ALL, slice(5)), _OUTPUTS),
    "bi,hi->bh": _between("bi,hi->bh", (12, 16), (ALL, slice(8)), _INPUTS),
    "...i,ih->...h": _between("...i,ih->...h", (16, 12), slice(8), _INPUTS, "tokens"),
    "bi,ij": _between("bi,ij", (16, 12), slice(8), _INPUTS),
    "bti,ih->bh": _between("bti,ih->bh", (16, 12), slice(8), _INPUTS, "tokens"),
    "the weight first": _vector(
        lambda s, y: s.second(torch.einsum("ih,bi->bh", s.weight, y)), _INPUTS,
        weight=lambda: matrix(16, 12, zero=slice(8)), second=lambda: nn.Linear(12, 4),
    ),
    "the weight first, rows": _vector(
        lambda s, y: s.second(torch.einsum("ih,bi->bh", s.weight, y)), _OUTPUTS,
        weight=lambda: matrix(16, 12, zero=(ALL, slice(5))), second=lambda: nn.Linear(12, 4),
    ),
    "several summed": _vector(
        lambda s, y: s.second(torch.einsum("bij,ijh->bh", y.view(-1, 4, 4), s.weight)), {("first.weight", 0): 8},
        weight=lambda: matrix(4, 4, 12, zero=slice(2)), second=lambda: nn.Linear(12, 4),
    ),
    "several summed, in another order": _vector(
        lambda s, y: s.second(torch.einsum("bij,jih->bh", y.view(-1, 4, 4), s.weight)), {("first.weight", 0): 8},
        weight=lambda: matrix(4, 4, 12, zero=(ALL, slice(2))), second=lambda: nn.Linear(12, 4),
    ),
    "several summed, rows": _vector(
        lambda s, y: s.second(torch.einsum("bij,ijh->bh", y.view(-1, 4, 4), s.weight)), _OUTPUTS,
        weight=lambda: matrix(4, 4, 12, zero=(ALL, ALL, slice(5))), second=lambda: nn.Linear(12, 4),
    ),
    "heads": _vector(
        lambda s, y: s.second(torch.einsum("bi,ihd->bhd", y, s.weight).flatten(1)), _INPUTS,
        weight=lambda: matrix(16, 3, 4, zero=slice(8)), second=lambda: nn.Linear(12, 4),
    ),
    "heads, a dead one": _vector(
        lambda s, y: s.second(torch.einsum("bi,ihd->bhd", y, s.weight).flatten(1)), {("second.weight", 1): 8},
        weight=lambda: matrix(16, 3, 4, zero=(ALL, 1)), second=lambda: nn.Linear(12, 4),
    ),
    "heads joined": _vector(
        lambda s, y: torch.einsum("bhd,hdo->bo", y.view(-1, 4, 4), s.weight), {("first.weight", 0): 8},
        weight=lambda: matrix(4, 4, 5, zero=(ALL, slice(2))),
    ),
    "experts on one input": _vector(
        lambda s, y: torch.einsum("beh,eho->bo", F.relu(torch.einsum("bi,eih->beh", y, s.weight)), s.last),
        {("first.weight", 0): 8, ("weight", 2): 8},
        weight=lambda: matrix(3, 16, 8, zero=(ALL, slice(8))), last=lambda: nn.Parameter(torch.randn(3, 8, 4)),
    ),
    "experts, hidden units dead in all": _vector(
        lambda s, y: torch.einsum("beh,eho->beo", F.relu(torch.einsum("bi,eih->beh", y, s.weight)), s.last).sum(1),
        {("weight", 2): 4, ("last", 1): 4},
        weight=lambda: matrix(3, 16, 8, zero=(ALL, ALL, slice(4))), last=lambda: nn.Parameter(torch.randn(3, 8, 4)),
    ),
    "experts on inputs of their own": _vector(
        lambda s, y: torch.einsum(
            "ebh,eho->bo", F.relu(torch.einsum("ebi,eih->ebh", y.view(-1, 2, 8).transpose(0, 1), s.weight)), s.last
        ),
        {("weight", 2): 4, ("last", 1): 4},
        weight=lambda: matrix(2, 8, 8, zero=(ALL, ALL, slice(4))), last=lambda: nn.Parameter(torch.randn(2, 8, 4)),
    ),
    "experts by bmm": _vector(
        lambda s, y: torch.bmm(F.relu(torch.bmm(y.expand(3, -1, -1), s.weight)), s.last).sum(0),
        {("weight", 2): 4, ("last", 1): 4},
        weight=lambda: matrix(3, 16, 8, zero=(ALL, ALL, slice(4))), last=lambda: nn.Parameter(torch.randn(3, 8, 4)),
    ),
    "three operands": _vector(
        lambda s, y: torch.einsum("bi,ih,ho->bo", y, s.weight, s.last), {("first.weight", 0): 8, ("last", 0): 12},
        weight=lambda: matrix(16, 12, zero=slice(8)), last=lambda: nn.Parameter(torch.randn(12, 4)),
    ),
    "two activations": _vector(
        lambda s, y: s.second(torch.einsum("bij,bij->b", y.view(-1, 4, 4), F.relu(y.flip(0)).view(-1, 4, 4))[:, None]),
        {("first.weight", 0): 8},
        first=lambda: dead(nn.Linear(6, 16), EIGHT), second=lambda: nn.Linear(1, 4),
    ),
    "an outer product": _vector(
        lambda s, y: s.second(torch.einsum("bi,bj->bij", y, y[:, 8:]).flatten(1)), {("first.weight", 0): 8},
        first=lambda: dead(nn.Linear(6, 16), EIGHT), second=lambda: nn.Linear(128, 4),
    ),
    "a gain": _vector(
        lambda s, y: s.second(torch.einsum("bi,i->bi", y, s.gain)), {("first.weight", 0): 8, ("gain", 0): 8},
        gain=lambda: matrix(16, zero=slice(8)), second=lambda: nn.Linear(16, 4),
    ),
    "a single output": _vector(
        lambda s, y: torch.einsum("bi,i->b", y, s.weight), {("first.weight", 0): 8},
        weight=lambda: matrix(16, zero=slice(8)),
    ),
    "channels of an image": Case(
        lambda: Net(
            lambda s, x: s.second(torch.einsum("bchw,co->bohw", F.relu(s.first(x)), s.weight)),
            first=conv(3, 16), weight=matrix(16, 12, zero=slice(8)), second=conv(12, 4),
        ),
        "image", _INPUTS,
    ),
    "channels of an image, rows": Case(
        lambda: Net(
            lambda s, x: s.second(torch.einsum("bchw,co->bohw", F.relu(s.first(x)), s.weight)),
            first=conv(3, 16), weight=matrix(16, 12, zero=(ALL, slice(5))), second=conv(12, 4, 3),
        ),
        "image", _OUTPUTS,
    ),
    "channels of an image, constants": Case(
        lambda: Net(
            lambda s, x: s.second(torch.einsum("bchw,co->bohw", F.relu(s.first(x)), s.weight)),
            first=dead(conv(3, 16), EIGHT, bias=False), weight=nn.Parameter(torch.randn(16, 12)), second=conv(12, 4),
        ),
        "image", _INPUTS,
    ),
    "axes in another order": Case(
        lambda: Net(
            lambda s, x: s.second(torch.einsum("bchw->bhwc", F.relu(s.first(x)))),
            first=dead(conv(3, 16), EIGHT), second=nn.Linear(16, 4),
        ),
        "image", {("first.weight", 0): 8},
    ),
    "a sum over space": Case(
        lambda: Net(
            lambda s, x: s.second(torch.einsum("bchw->bc", F.relu(s.first(x)))),
            first=dead(conv(3, 16), EIGHT), second=nn.Linear(16, 4),
        ),
        "image", {("first.weight", 0): 8},
    ),
}  # fmt: skip

PRODUCTS: dict[str, Case] = {
    "a weight from the left": _vector(
        lambda s, y: s.second((s.weight @ y.t()).t()), _INPUTS,
        weight=lambda: matrix(12, 16, zero=(ALL, slice(8))), second=lambda: nn.Linear(12, 4),
    ),
    "a weight from the left of an image": Case(
        lambda: Net(
            lambda s, x: s.second((s.weight @ F.relu(s.first(x)).flatten(2)).unflatten(2, (8, 8))),
            first=conv(3, 16), weight=matrix(12, 16, zero=(ALL, slice(8))), second=conv(12, 4),
        ),
        "image", _INPUTS,
    ),
    "a weight from the left of an image, rows": Case(
        lambda: Net(
            lambda s, x: s.second((s.weight @ F.relu(s.first(x)).flatten(2)).unflatten(2, (8, 8))),
            first=conv(3, 16), weight=matrix(12, 16, zero=slice(5)), second=conv(12, 4),
        ),
        "image", _OUTPUTS,
    ),
    "a weight from the left of an image, constants": Case(
        lambda: Net(
            lambda s, x: s.second((s.weight @ F.relu(s.first(x)).flatten(2)).unflatten(2, (8, 8))),
            first=dead(conv(3, 16), EIGHT, bias=False), weight=nn.Parameter(torch.randn(12, 16)), second=conv(12, 4),
        ),
        "image", _INPUTS,
    ),
    "tensordot": _vector(
        lambda s, y: s.second(torch.tensordot(y, s.weight, 1)), _INPUTS,
        weight=lambda: matrix(16, 12, zero=slice(8)), second=lambda: nn.Linear(12, 4),
    ),
    "inner": _vector(
        lambda s, y: s.second(torch.inner(y, s.weight)), _INPUTS,
        weight=lambda: matrix(12, 16, zero=(ALL, slice(8))), second=lambda: nn.Linear(12, 4),
    ),
    "multiplied and summed": _vector(
        lambda s, y: s.second((y[..., None] * s.weight).sum(1)), {("first.weight", 0): 8},
        weight=lambda: matrix(16, 12, zero=slice(8)), second=lambda: nn.Linear(12, 4),
    ),
    "bilinear": _vector(
        lambda s, y: s.second(s.form(y, y[:, 8:])), {("first.weight", 0): 8, ("second.weight", 1): 9},
        first=lambda: dead(nn.Linear(6, 16), EIGHT), form=lambda: dead(nn.Bilinear(16, 8, 12), range(3)),
        second=lambda: nn.Linear(12, 4),
    ),
}  # fmt: skip


def _shared(call: Callable[[Any, Tensor], Tensor], left: int, **modules: Callable[[], nn.Module]) -> Case:
    return Case(
        lambda: Net(call, **{name: make() for name, make in modules.items()}), "image", {("first.weight", 0): left}
    )


def _twice(s: Any, x: Tensor) -> Tensor:
    """The same layers on an image and on another one."""
    one, other = (s.second(F.relu(s.middle(F.relu(s.first(y))))) for y in (x, x.flip(0)))
    return one + other


_DEAD16 = {"first": lambda: dead(conv(3, 16, 3), EIGHT), "second": lambda: conv(16, 4)}
SHARED: dict[str, Case] = {
    "dead": _shared(_twice, 8, middle=nn.Identity, **_DEAD16),
    "unread": _shared(
        _twice, 8, first=lambda: conv(3, 16, 3), middle=nn.Identity, second=lambda: unread(conv(16, 4), EIGHT)
    ),
    "constants": _shared(
        _twice, 8, first=lambda: dead(conv(3, 16), EIGHT, False), middle=nn.Identity, second=lambda: conv(16, 4)
    ),
    "depthwise": _shared(_twice, 8, middle=lambda: dead(conv(16, 16, 3, groups=16), EIGHT), **_DEAD16),
    "in groups": _shared(_twice, 8, middle=lambda: dead(conv(16, 16, 3, groups=4), EIGHT), **_DEAD16),
    "in groups, part of each": _shared(
        _twice, 8, first=lambda: dead(conv(3, 16), LOW), middle=lambda: dead(conv(16, 16, 3, groups=4), LOW),
        second=lambda: conv(16, 4),
    ),
    "one after the other": _shared(
        lambda s, x: s.second(F.relu(s.middle(F.relu(s.middle(F.relu(s.first(x))))))), 8,
        middle=lambda: dead(conv(16, 16), EIGHT), **_DEAD16,
    ),
    "over two inputs": _shared(
        lambda s, x: s.second(F.relu(s.first(x))) + s.second(F.relu(s.third(x))), 8,
        third=lambda: dead(conv(3, 16), EIGHT), **_DEAD16,
    ),
    "over two inputs, constants": _shared(
        lambda s, x: s.second(F.relu(s.first(x))) + s.second(F.relu(s.third(x))), 8,
        first=lambda: dead(conv(3, 16), EIGHT, False), third=lambda: dead(conv(3, 16), EIGHT, False),
        second=lambda: conv(16, 4),
    ),
}  # fmt: skip


def _chain(over: str, left: dict[tuple[str, int], int], *layers: Callable[[], nn.Module]) -> Case:
    """Convolutions with activations between them: first, second and third."""
    names = ("first", "second", "third")[: len(layers)]

    def call(s: Any, x: Tensor) -> Tensor:
        for name in names[:-1]:
            x = F.relu(getattr(s, name)(x))
        y: Tensor = getattr(s, names[-1])(x)
        return y

    return Case(lambda: Net(call, **{n: make() for n, make in zip(names, layers, strict=True)}), over, left)


def _convolutions(over: str) -> dict[str, Case]:
    layer, up = LAYERS[over], TRANSPOSED[over]

    def plain(inputs: int, outputs: int, kernel: int = 1, **more: Any) -> Any:
        return layer(inputs, outputs, kernel, padding=kernel // 2, **more)

    first, both = {("first.weight", 0): 8}, {("first.weight", 0): 8, ("second.weight", 0): 8}
    parts, split = (0, 1, 4, 5, 8, 9), {("second.weight", 1): 6}
    found = {
        "groups of the input": _chain(
            over, split, lambda: dead(layer(3, 12, 3, groups=3), parts), lambda: plain(12, 4)
        ),
        "transposed groups of the input": _chain(
            over, split, lambda: dead_outputs(up(3, 12, 3, groups=3), parts), lambda: plain(12, 4)
        ),
        "dead": _chain(over, first, lambda: dead(plain(3, 16, 3), EIGHT), lambda: plain(16, 4, 3, stride=2)),
        "unread": _chain(over, first, lambda: plain(3, 16, 3), lambda: unread(plain(16, 4, 3), EIGHT)),
        "constants under padding": _chain(
            over, {("first.weight", 0): 9}, lambda: dead(plain(3, 16, 3), EIGHT, False), lambda: plain(16, 4, 3)
        ),
        "depthwise": _chain(
            over, both, lambda: dead(plain(3, 16), EIGHT), lambda: dead(rising(plain(16, 16, 3, groups=16)), EIGHT),
            lambda: plain(16, 4),
        ),
        "part of each group": _chain(
            over, both, lambda: dead(plain(3, 16), LOW), lambda: dead(plain(16, 16, 3, groups=4), LOW),
            lambda: plain(16, 4),
        ),
        "whole groups unread": _chain(
            over, both, lambda: plain(3, 16), lambda: plain(16, 16, 3, groups=4), lambda: unread(plain(16, 4), EIGHT)
        ),
    }  # fmt: skip
    for extra in (0, 1):

        def wide(groups: int = 1, extra: int = extra) -> Any:
            return up(16, 16, 3, stride=2, padding=1, output_padding=extra, groups=groups)

        name = f"transposed, output padding {extra}"
        ends: tuple[Any, Any] = (lambda: plain(3, 16), lambda: plain(16, 4))
        outputs = {("second.bias", 0): 8, ("third.weight", 1): 8}
        found |= {
            f"{name}, outputs": _chain(over, outputs, ends[0], lambda w=wide: dead_outputs(w(), EIGHT), ends[1]),
            f"{name}, inputs": _chain(over, first, lambda: dead(plain(3, 16), EIGHT), wide, ends[1]),
            f"{name}, constants": _chain(
                over, {("first.weight", 0): 9}, lambda: dead(plain(3, 16), EIGHT, False), wide, ends[1]
            ),
            f"{name}, groups unread": _chain(
                over, first | outputs, ends[0], lambda w=wide: w(4), lambda: unread(plain(16, 4), EIGHT)
            ),
            f"{name}, part of each group": _chain(
                over, first | outputs, lambda: dead(plain(3, 16), LOW), lambda w=wide: dead_outputs(w(4), LOW), ends[1]
            ),
            f"{name}, depthwise": _chain(
                over, first | outputs, lambda: dead(plain(3, 16), EIGHT),
                lambda w=wide: dead_outputs(rising(w(16)), EIGHT), ends[1],
            ),
        }  # fmt: skip
    return found


CONVOLUTIONS = {f"{over}: {name}": case for over in LAYERS for name, case in _convolutions(over).items()}
