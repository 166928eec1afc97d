"""Small networks to repair: a layer whose outputs go, and the reader of them."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

import fxprune

SAMPLES = 40
HELD = torch.arange(SAMPLES) % 5 == 1


class Product(nn.Module):
    """A product with a matrix that is stored [columns, outputs], as some models write a linear layer."""

    def __init__(self, columns: int, outputs: int, transposed: bool) -> None:
        super().__init__()
        self.transposed = transposed
        self.weight = nn.Parameter(torch.randn(outputs, columns) if transposed else torch.randn(columns, outputs))
        self.bias = None if transposed else nn.Parameter(torch.randn(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T if self.transposed else torch.addmm(self.bias, x, self.weight)


READERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(6, 3), ()),
    "addmm": (lambda: Product(6, 3, transposed=False), ()),
    "matmul without bias": (lambda: Product(6, 3, transposed=True), ()),
    "conv": (lambda: nn.Conv2d(6, 3, 3, padding=1), (5, 4)),
    "strided and dilated": (lambda: nn.Conv2d(6, 3, (2, 3), stride=(2, 1), padding=(1, 2), dilation=(1, 2)), (6, 5)),
    "same padding": (lambda: nn.Conv2d(6, 2, 3, padding="same", dilation=(1, 2)), (4, 4)),
    "grouped": (lambda: nn.Conv2d(6, 4, 2, groups=2), (5, 5)),
    "depthwise": (lambda: nn.Conv2d(6, 12, 3, groups=6, bias=False), (6, 5)),
    "conv1d": (lambda: nn.Conv1d(6, 3, 3, stride=2), (9,)),
    "conv3d": (lambda: nn.Conv3d(6, 2, 2), (3, 3, 4)),
    "transposed": (lambda: nn.ConvTranspose2d(6, 3, 3, stride=2, padding=1, output_padding=1), (4, 3)),
    "transposed in groups": (
        lambda: nn.ConvTranspose2d(6, 4, 2, stride=(1, 3), padding=(2, 0), dilation=(2, 1), groups=2, bias=False),
        (4, 4),
    ),
    "transposed 1d": (lambda: nn.ConvTranspose1d(6, 2, 3, dilation=2), (6,)),
}


class Chain(nn.Module):
    """A layer whose outputs go, and the reader of them."""

    def __init__(self, first: nn.Module, reader: nn.Module) -> None:
        super().__init__()
        self.first, self.reader = first, reader

    def forward(self, x: Tensor) -> Tensor:
        return self.reader(torch.tanh(self.first(x)))


def chain(reader: nn.Module, space: tuple[int, ...], channels: int) -> tuple[nn.Module, Tensor]:
    convolution = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)[len(space)]
    first = convolution(3, channels, *([1] if space else []))
    model = Chain(first, reader).double().eval()
    return model, torch.randn(SAMPLES, 3, *space, dtype=torch.float64)


def masked(model: nn.Module, x: Tensor, *, rows: tuple[int, ...] = (1, 4)) -> fxprune.TracedModule:
    """The model, traced, without some outputs of its first layer."""
    traced = fxprune.trace(copy.deepcopy(model), (x[:2],), modes=("eval",))
    for name in ("first.weight", "first.bias"):
        mask = torch.ones_like(traced.get_parameter(name))
        mask[list(rows)] = 0
        fxprune.prune.custom_from_mask(traced, name, mask)
    return traced


def mlp(batches: int = SAMPLES) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = Chain(nn.Linear(3, 6), nn.Linear(6, 4)).double().eval()
    return model, torch.randn(batches, 3, dtype=torch.float64)


def dense_fit(reader: nn.Module, inputs: Tensor, target: Tensor, live: Tensor) -> dict[str, Tensor]:
    """The parameters that torch.linalg.lstsq finds, towards those that there are, from one run for every entry."""
    parameters = {name: tensor.detach() for name, tensor in reader.named_parameters()}
    bias = parameters.get("bias")
    zeros = {name: torch.zeros_like(tensor) for name, tensor in parameters.items()}
    weight = parameters["weight"]
    count = int(live.sum())
    basis = torch.zeros(count, *weight.shape, dtype=torch.float64)
    basis[(torch.arange(count), *live.nonzero(as_tuple=True))] = 1
    columns = [vmap(lambda entry: functional_call(reader, zeros | {"weight": entry}, inputs))(basis)]
    if bias is not None:
        units = torch.eye(len(bias), dtype=torch.float64)
        columns.append(vmap(lambda entry: functional_call(reader, zeros | {"bias": entry}, inputs))(units))
    design = torch.cat(columns).flatten(1).T
    lack = target - functional_call(reader, parameters | {"weight": weight * live}, inputs)
    found = torch.linalg.lstsq(design, lack.flatten()[:, None]).solution[:, 0]
    fitted = {"weight": weight.clone()}
    fitted["weight"][live] += found[:count]
    return fitted if bias is None else fitted | {"bias": bias + found[count:]}
