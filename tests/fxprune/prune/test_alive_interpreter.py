"""Convolutions of masked networks run without their channels of zeros, and give what they give with them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import fxprune
from fxprune.graph.interpretation import run
from fxprune.graph.names import tensors_of
from fxprune.prune.repair.alive import AliveInterpreter

INPUTS = {1: (3, 8, 20), 2: (3, 8, 9, 7), 3: (2, 8, 5, 6, 4)}
MASKS = ["outputs", "inputs", "both", "all outputs", "none", "entries"]


def masked(weight: Tensor, which: str) -> None:
    if which in ("outputs", "both"):
        weight[::2] = 0
    if which in ("inputs", "both"):
        weight[:, 1::2] = 0
    if which == "all outputs":
        weight.zero_()
    if which == "entries":
        weight[torch.rand(weight.shape) < 0.7] = 0


@pytest.mark.parametrize("which", MASKS)
@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize(
    "options",
    [{}, {"bias": False}, {"stride": 2, "padding": 1}, {"dilation": 2, "padding": "same"}, {"groups": 2}],
    ids=str,
)
def test_results_are_those_of_the_whole_convolution(dims: int, which: str, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    layer = getattr(nn, f"Conv{dims}d")(8, 10, 3, **options).double().eval().requires_grad_(False)
    masked(layer.weight, which)
    x = torch.randn(INPUTS[dims], dtype=torch.float64)
    traced = fxprune.trace(layer, x, modes=("eval",), dynamic_shapes=None)
    graph, tensors = traced.graphs["eval"], tensors_of(traced)
    (expected,) = run(graph, tensors.__getitem__, [x])
    found = AliveInterpreter(graph, tensors.__getitem__).run(x, enable_io_processing=False)
    (found,) = found if isinstance(found, tuple | list) else (found,)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(found, layer(x), rtol=0, atol=1e-12)


def test_fewer_channels_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = nn.Conv2d(8, 10, 3).eval().requires_grad_(False)
    masked(layer.weight, "both")
    x = torch.randn(INPUTS[2])
    traced = fxprune.trace(layer, x, modes=("eval",), dynamic_shapes=None)
    shapes = list[tuple[int, ...]]()

    def counted(target: Any, given: dict[str, Any], outputs: Tensor, inputs: Tensor) -> Tensor:
        shapes.append((int(outputs.sum()), int(inputs.sum())))
        return target(**given)  # type: ignore[no-any-return]

    monkeypatch.setattr("fxprune.prune.repair.alive.convolved", counted)
    AliveInterpreter(traced.graphs["eval"], tensors_of(traced).__getitem__).run(x, enable_io_processing=False)
    assert shapes == [(5, 4)]


def test_an_image_without_a_batch_isconvolved_as_it_is() -> None:
    graph = fx.Graph()
    x, weight = graph.placeholder("x"), graph.get_attr("weight")
    graph.output(graph.call_function(torch.ops.aten.conv2d.default, (x, weight)))
    values = torch.randn(10, 8, 3, 3)
    masked(values, "both")
    image = torch.randn(8, 9, 7)
    found = AliveInterpreter(graph, {"weight": values}.__getitem__).run(image, enable_io_processing=False)
    torch.testing.assert_close(found, nn.functional.conv2d(image, values))
