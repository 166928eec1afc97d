"""Random networks of recurrent layers and cells with dead units, drawn from a seed."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

KINDS: dict[str, tuple[Any, Any, int, int]] = {  # layer, cell, gates, the candidate among them
    "lstm": (nn.LSTM, nn.LSTMCell, 4, 2),
    "gru": (nn.GRU, nn.GRUCell, 3, 2),
    "tanh": (nn.RNN, nn.RNNCell, 1, 0),
    "relu": (nn.RNN, nn.RNNCell, 1, 0),
}
STEPS, WIDTH = 4, 5


class Layers(nn.Module):
    """Layers over all steps: any number, directions, projections, initial states and ways to read the last ones."""

    def __init__(self, r: random.Random, inputs: int) -> None:
        super().__init__()
        self.kind = r.choice([*KINDS])
        self.units, self.count, self.both = r.choice([4, 6, 8]), r.choice([1, 1, 2]), r.random() < 0.4
        projected = 3 if self.kind == "lstm" and r.random() < 0.25 else 0
        options: dict[str, Any] = {"proj_size": projected} if projected else {}
        if self.kind == "relu":
            options["nonlinearity"] = "relu"
        self.rnn = KINDS[self.kind][0](
            inputs, self.units, self.count, bias=r.random() < 0.7, batch_first=True, bidirectional=self.both,
            dropout=0.1 if self.count > 1 else 0.0, **options,
        )  # fmt: skip
        self.states = projected or self.units
        self.rows = self.count * (2 if self.both else 1)
        self.start = r.choice(["none", "none", "zeros", "learned", "computed"])
        if self.start == "learned":
            self.first = nn.Parameter(torch.randn(self.rows, 1, self.states))
        if self.start == "computed":
            self.first_of = nn.Linear(inputs, self.states)
        self.reads = r.choice(["all", "all", "last", "mean", "cell"])
        width = self.states * (2 if self.both and self.reads in ("all", "last") else 1)
        width = self.units if self.reads == "cell" and self.kind == "lstm" else width
        self.out = nn.Linear(width, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        output, state = self.rnn(x, self.initial(x))
        hidden, cell = state if isinstance(state, tuple) else (state, state)
        if self.reads == "all":
            return self.out(output)
        if self.reads == "last":
            last = torch.cat([hidden[-2], hidden[-1]], -1) if self.both else hidden[-1]
        else:
            last = hidden.mean(0) if self.reads == "mean" else cell[-1]
        return self.out(last)[:, None] + x.new_zeros(1, STEPS, 1)

    def initial(self, x: Tensor) -> Any:
        if self.start == "none":
            return None
        shape = self.rows, x.shape[0], self.states
        if self.start == "zeros":
            hidden = x.new_zeros(shape)
        elif self.start == "learned":
            hidden = self.first.expand(shape)
        else:
            hidden = self.first_of(x[:, 0]).tanh().expand(shape)
        if x.is_cuda:  # cuDNN takes no expanded state
            hidden = hidden.contiguous()
        return (hidden, x.new_zeros(self.rows, x.shape[0], self.units)) if self.kind == "lstm" else hidden


class Steps(nn.Module):
    """A cell in a loop, or two that start with the same zeros."""

    def __init__(self, r: random.Random, inputs: int) -> None:
        super().__init__()
        self.kind, self.units = r.choice([*KINDS]), r.choice([4, 6, 8])
        options: dict[str, Any] = {"nonlinearity": "relu"} if self.kind == "relu" else {}
        options["bias"] = r.random() < 0.7
        cell = KINDS[self.kind][1]
        self.cells = nn.ModuleList([cell(inputs, self.units, **options)])
        if r.random() < 0.4:
            self.cells.append(cell(self.units, self.units, **options))
        self.out = nn.Linear(self.units, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        zeros = x.new_zeros(x.shape[0], self.units)
        states: list[Any] = [(zeros, zeros) if self.kind == "lstm" else zeros for _ in self.cells]
        seen = []
        for step in x.unbind(1):
            below = step
            for index, cell in enumerate(self.cells):
                states[index] = cell(below, states[index])
                below = states[index][0] if self.kind == "lstm" else states[index]
            seen.append(below)
        return self.out(torch.stack(seen, 1))


class Recurrence(nn.Module):
    """Blocks of layers and cells, one behind the other."""

    def __init__(self, r: random.Random) -> None:
        super().__init__()
        widths = [3, *[WIDTH] * r.choice([1, 2])]
        self.first = nn.Sequential(nn.Linear(3, 6), nn.ReLU())
        widths[0] = 6
        self.blocks = nn.Sequential(*[(Layers if r.random() < 0.7 else Steps)(r, width) for width in widths])

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(self.first(x))


def recurrent_network(seed: int) -> tuple[nn.Module, Callable[[int], Tensor]]:
    """A masked network in float64 and eval mode, and its inputs by batch size."""
    r = random.Random(seed)
    torch.manual_seed(seed)
    model = Recurrence(r)
    share = r.choice([0.3, 0.5, 0.7])
    with torch.no_grad():
        zero_rows(model.first[0], [i for i in range(6) if r.random() < 0.3])
        for block in model.blocks:
            kill(r, block, share)
    return model.double().eval(), lambda batch: torch.randn(batch, STEPS, 3).double()


def kill(r: random.Random, block: Any, share: float) -> None:
    """Zero the rows of units, in all gates or in the candidate, their biases or not, and what starts and reads them."""
    _, _, gates, candidate = KINDS[block.kind]
    together = [i for i in range(block.units) if r.random() < share] if r.random() < 0.5 else None
    for weight, layer, suffix in _directions(block):
        drawn = [i for i in range(block.units) if r.random() < share]
        units = drawn if together is None else together
        cut = [candidate] if r.random() < 0.4 else range(gates)
        rows = [gate * block.units + unit for gate in cut for unit in units]
        with_bias = r.random() < 0.8
        for name in ("weight_ih", "weight_hh", *(("bias_ih", "bias_hh") if with_bias else ())):
            if getattr(layer, name + suffix, None) is not None:
                getattr(layer, name + suffix)[rows] = 0
        if weight is not None and r.random() < 0.5:
            weight[[i for i in range(len(weight)) if r.random() < share]] = 0
        if r.random() < 0.2:
            getattr(layer, "weight_hh" + suffix)[:, [i for i in range(2) if r.random() < share]] = 0
    if together is not None and r.random() < 0.7:
        inside = [i for i in together if i < getattr(block, "states", 0)]
        if getattr(block, "start", "") == "learned":
            block.first[..., inside] = 0
        if getattr(block, "start", "") == "computed":
            zero_rows(block.first_of, inside)
    if r.random() < 0.3:
        block.out.weight[:, [i for i in range(block.out.in_features) if r.random() < share]] = 0


def _directions(block: Any) -> list[tuple[Tensor | None, nn.Module, str]]:
    """For each layer and direction the projection, the module and the suffix of its weights."""
    if isinstance(block, Steps):
        return [(None, cell, "") for cell in block.cells]
    ways: Sequence[str] = ("", "_reverse") if block.both else ("",)
    suffixes = [f"_l{layer}{way}" for layer in range(block.count) for way in ways]
    return [(getattr(block.rnn, f"weight_hr{suffix}", None), block.rnn, suffix) for suffix in suffixes]


def zero_rows(layer: Any, rows: list[int]) -> None:
    layer.weight[rows] = 0
    layer.bias[rows] = 0
