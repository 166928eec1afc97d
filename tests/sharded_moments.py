"""What is measured of networks by moments that several processes take side by side, and in one."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

import fxprune
from fxprune.prune.repair import batches as pieces
from fxprune.prune.repair.input_moments import InputMoments
from tests import sharded_networks as networks
from tests.sharded_networks import mine
from tests.sharded_repairs import Spread


class Attending(nn.Module):
    """Tokens: tied layers, queries and keys that are multiplied, a bias that is missing."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(30, 12)
        self.mixed = nn.Linear(12, 36)
        self.inner, self.outer = nn.Linear(12, 20), nn.Linear(20, 12, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embedding(tokens)
        for _ in range(2):
            query, key, value = self.mixed(hidden).unflatten(-1, (3, 2, 6)).permute(2, 0, 3, 1, 4)
            hidden = hidden + functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
            hidden = hidden + self.outer(self.inner(hidden).relu())
        return hidden @ self.embedding.weight.T


def tokens(seed: int, samples: int = 6) -> Tensor:
    """A batch of them."""
    return torch.randint(0, 30, (samples, 7), generator=torch.Generator().manual_seed(seed))


def attending() -> fxprune.TracedModule:
    """The network for eval mode, with the same values everywhere."""
    torch.manual_seed(0)
    return fxprune.trace(Attending(), (tokens(0),), modes=("eval",))


NETWORKS = {
    "images": (networks.traced, [networks.inputs(seed) for seed in range(10, 17)]),
    "tokens": (attending, [tokens(seed, 3 + seed) for seed in range(7)]),
    "one piece": (attending, [tokens(3, 5)]),
}


def measured(spread: Spread, what: str) -> tuple[dict[str, Tensor], list[bool]]:
    """The curves, and of the pieces that this process has run whether each was counted."""
    added: list[bool] = []
    if dist.is_initialized():
        networks.keep_nothing_whole()

    def add(self: InputMoments, *args: Any, is_counted: bool = True) -> None:
        added.append(is_counted)
        taken(self, *args, is_counted=is_counted)

    make, batches = NETWORKS[what]
    module, taken = spread(make()), InputMoments.add
    with mock.patch.object(InputMoments, "add", add), mock.patch.object(pieces, "_MOST_SAMPLES", 4):
        found = fxprune.sensitivity(module, mine(batches))
    curves = {f"{curve.name} {at}": torch.tensor(getattr(curve, at)) for curve in found.curves
              for at in ("order", "measured")}  # fmt: skip
    return curves, added


def not_finite(is_own: bool) -> str:
    """What is said of a batch with NaN on the last process, or of a process that fails."""
    pieces._MOST_SAMPLES = 4
    networks.keep_nothing_whole()
    module, batches = networks.by_fsdp(networks.traced()), NETWORKS["images"][1]
    is_last = dist.get_rank() == dist.get_world_size() - 1
    if is_last and not is_own:
        batches[-2] = torch.full_like(batches[-2], torch.nan)
    if is_last and is_own:
        InputMoments._join = _fail  # type: ignore[method-assign]
    try:
        fxprune.sensitivity(module, mine(batches))
    except fxprune.FxpruneError as error:
        text = f"{type(error).__name__}: {error}"
    except MemoryError as error:
        text = f"MemoryError: {error}"
    assert fxprune.prune.channels(module, macs=0.5).macs[1]  # all go on together
    return text


def _fail(*_: Any) -> None:
    raise MemoryError("no room")


class Branching(nn.Module):
    """Control flow."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer, self.last = nn.Linear(8, 24), nn.Linear(24, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.outer(self.inner(x).relu())
        return torch.cond(hidden.sum() > 0, lambda each: self.last(each) + 1, lambda each: each * 2, (hidden,))


class Stacked(nn.Module):
    """Recurrent layers, one on the other."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.last = nn.LSTM(8, 16, 2, batch_first=True), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.layers(x)[0])


class Standardized(nn.Module):
    """Convolutions by weights that are standardized row by row."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Conv2d(3, 12, 3), nn.Conv2d(12, 10, 3), nn.Conv2d(10, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.first, self.second):
            weight = layer.weight
            weight = (weight - weight.mean((1, 2, 3), keepdim=True)) / (weight.std((1, 2, 3), keepdim=True) + 1e-5)
            x = functional.conv2d(x, weight, layer.bias).relu()
        return self.last(x)


def normed() -> nn.Module:
    """A weight norm on rows, which has as many axes as what it computes."""
    first = nn.utils.parametrizations.weight_norm(nn.Linear(8, 24))
    return nn.Sequential(first, nn.Dropout(0.5), nn.ReLU(), nn.Linear(24, 8))


OTHERS = {
    "control flow": (Branching, (8,)), "recurrent": (Stacked, (4, 8)), "standardized": (Standardized, (3, 8, 8)),
    "normed": (normed, (8,)),
}  # fmt: skip


def chosen(spread: Spread, what: str) -> dict[str, Any]:
    """Curves, what a choice by them and its repair leave, and the outputs of that."""
    torch.manual_seed(0)
    make, shape = OTHERS[what]
    batches = [torch.randn(6, *shape) for _ in range(5)]
    if dist.is_initialized():
        networks.keep_nothing_whole()
    module = spread(fxprune.trace(make(), (batches[0],), modes=("eval",)))
    found = fxprune.sensitivity(module, mine(batches))
    fxprune.prune.channels(module, macs=0.6, importance=found, round_to=1)
    fxprune.reconstruct(module, mine(batches))
    final = fxprune.finalize(module, align=1)
    return {"curves": [(curve.order, curve.measured) for curve in found.curves], "output": final(batches[0]).detach()}
