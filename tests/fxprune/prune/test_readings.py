"""Curves against networks built by hand: units zeroed, readers refitted by dense algebra, run by eager torch."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

import fxprune
from fxprune.prune.sensitivity.analysis import DAMPING
from tests.repairs import HELD, READERS, chain


def refitted(reader: nn.Module, inputs: Tensor, live: Tensor) -> dict[str, Tensor]:
    """The parameters that make up for the inputs of dead entries of the weight, by one column for each entry."""
    parameters = {name: tensor.detach() for name, tensor in reader.named_parameters()}
    zeros = {name: torch.zeros_like(tensor) for name, tensor in parameters.items()}
    weight = parameters["weight"]
    entries = torch.eye(weight.numel(), dtype=torch.float64).reshape(-1, *weight.shape)
    columns = vmap(lambda entry: functional_call(reader, zeros | {"weight": entry}, inputs))(entries)
    columns = columns.movedim(-1 if inputs.dim() == 2 else 2, 1).flatten(2)  # [entries, outputs, rows]
    means = columns.mean(2)
    owner = columns.abs().sum(2).argmax(1)  # the output that an entry belongs to
    own = columns[torch.arange(len(owner)), owner]
    own = own - own.mean(1, keepdim=True) if "bias" in parameters else own
    square = own @ own.T / own.shape[1] * (owner[:, None] == owner)
    changed = weight.flatten().clone()
    gone, kept = (~live.flatten()).nonzero()[:, 0], live.flatten().nonzero()[:, 0]
    for output in owner.unique():
        here = owner == output
        dead, rest = gone[here[gone]], kept[here[kept]]
        damped = square[rest[:, None], rest]
        damped = damped + DAMPING * square.diagonal()[here].mean() * torch.eye(len(rest), dtype=torch.float64)
        changed[rest] += torch.linalg.solve(damped, square[rest[:, None], dead] @ weight.flatten()[dead])
    changed[gone] = 0
    found = {"weight": changed.reshape(weight.shape)}
    if "bias" in parameters:
        found["bias"] = parameters["bias"] - (changed - weight.flatten()) @ means
    return found


def by_input(kind: str, live: Tensor, groups: int) -> Tensor:
    """A view of entries of a weight, [groups, inputs of each, ...]."""
    live = live.unflatten(0, (groups, -1))
    return live if "transposed" in kind or kind == "addmm" else live.transpose(1, 2)


def lost(own: Tensor, dense: Tensor) -> float:
    """The error relative to the spread."""
    return float((own - dense).square().sum() / (dense - dense.mean()).square().sum())


@pytest.mark.parametrize("kind", [kind for kind in READERS if kind != "depthwise"])
@torch.no_grad()
def test_curves_of_every_kind_of_reader_are_those_of_networks_built_by_dense_algebra(kind: str) -> None:
    torch.manual_seed(0)
    build, space = READERS[kind]
    model, x = chain(build(), space, 6)
    traced = fxprune.trace(copy.deepcopy(model), (x[:2],), modes=("eval",))
    (curve,) = fxprune.sensitivity(traced, x, distance="error", targets="first", shares=(0.2, 0.5)).curves
    assert len(curve.counts) == 2
    for count, measured in zip(curve.counts, curve.measured, strict=True):
        alive = torch.ones(6, dtype=torch.bool)
        alive[list(curve.order[:count])] = False
        built = copy.deepcopy(model)
        for tensor in built.first.parameters():
            tensor[~alive] = 0
        live = torch.ones_like(built.reader.weight, dtype=torch.bool)
        entries = by_input(kind, live, getattr(built.reader, "groups", 1))
        for channel in (~alive).nonzero()[:, 0].tolist():
            entries[channel // entries.shape[1], channel % entries.shape[1]] = False
        fitted = refitted(model.reader, torch.tanh(model.first(x[~HELD])), live)
        for name, tensor in built.reader.named_parameters():
            tensor.copy_(fitted[name])
        assert measured == pytest.approx(lost(built(x[HELD]), model(x[HELD])), rel=1e-6)
