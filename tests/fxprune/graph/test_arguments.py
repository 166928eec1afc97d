"""How calls bind to the arguments of a capture, and which calls are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import fxprune
from fxprune.errors import InputError
from fxprune.graph.arguments import InputCheck, Signature


class Attends(nn.Module):
    """Takes a tensor, a pair, and keywords."""

    def forward(self, x: torch.Tensor, pair: tuple[torch.Tensor, int], *, mask: torch.Tensor, scale: float) -> Any:
        return (x + pair[0] * pair[1]) * mask * scale


@pytest.fixture(scope="module")
def traced() -> fxprune.TracedModule:
    x = torch.randn(2, 3)
    args, kwargs = (x, (torch.randn(2, 3), 4)), {"mask": torch.ones(2, 3), "scale": 0.5}
    return fxprune.trace(Attends().eval(), args, kwargs, modes=("eval",))


def test_the_signature_has_the_names_of_forward(traced: fxprune.TracedModule) -> None:
    signature = Signature.of(traced.graph)
    assert signature.names == ("x", "pair", "mask", "scale")
    assert signature.positional == 2


def test_arguments_bind_by_position_and_by_name(traced: fxprune.TracedModule) -> None:
    signature = Signature.of(traced.graph)
    wanted = {"x": 1, "pair": 2, "mask": 3, "scale": 4}
    assert signature.bind((1, 2), {"scale": 4, "mask": 3}) == wanted
    assert signature.bind((1, 2, 3, 4), {}) == wanted
    assert list(signature.bind((), {"scale": 4, "mask": 3, "pair": 2, "x": 1}) or ()) == list(wanted)
    assert signature.arrange((1,), {"scale": 4, "pair": 2, "mask": 3}) == ((1, 2), {"mask": 3, "scale": 4})


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [((1, 2), {"mask": 3}), ((1, 2, 3, 4, 5), {}), ((1, 2), {"mask": 3, "gain": 4}), ((1, 2), {"x": 3, "scale": 4})],
)
def test_other_arguments_do_not_bind(traced: fxprune.TracedModule, args: Any, kwargs: Any) -> None:
    signature = Signature.of(traced.graph)
    assert signature.bind(args, kwargs) is None
    assert signature.arrange(args, kwargs) is None


def _call(**changed: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    x, y = torch.randn(5, 3), torch.randn(5, 3)
    given = {"x": x, "pair": (y, 4), "mask": torch.ones(5, 3), "scale": 0.5} | changed
    return (given.pop("x"), given.pop("pair")), given


def test_a_fitting_call_computes_what_eager_does(traced: fxprune.TracedModule) -> None:
    args, kwargs = _call()
    traced.check_inputs(args, kwargs)
    assert torch.equal(traced(*args, **kwargs), Attends()(*args, **kwargs))
    assert torch.equal(traced(args[0], pair=args[1], **kwargs), Attends()(*args, **kwargs))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"extra": 1}, "called with 2 positional, mask=, scale=, extra=; captured with (x, pair, mask, scale)"),
        ({"pair": [torch.ones(5, 3), 4]}, "inputs have the structure"),
        ({"scale": 0.25}, "is 0.25; the capture holds for 0.5 only"),
        ({"pair": (torch.ones(5, 3), 3)}, "is 3; the capture holds for 4 only"),
        ({"x": 1.0}, "is a float; captured was a tensor"),
        ({"x": torch.ones(5, 3).double()}, "is torch.float64 on cpu; captured was torch.float32 on cpu"),
        ({"x": torch.ones(5, 4)}, "has shape (5, 4); captured was"),
        ({"x": torch.ones(4, 3)}, "the same name the same size"),
        ({"x": torch.ones(5)}, "has shape (5,)"),
    ],
)
def test_a_call_that_does_not_fit_is_refused_by_name(
    traced: fxprune.TracedModule, changed: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError) as caught:
        traced(*_call(**changed)[0], **_call(**changed)[1])
    assert message in str(caught.value)


def test_inputs_that_were_one_tensor_stay_one() -> None:
    class Sum(nn.Module):
        def forward(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
            return left + right

    x = torch.randn(2, 3)
    traced = fxprune.trace(Sum(), (x, x), modes=("eval",))
    check = InputCheck.of(traced.graph, (x, x), {})
    assert [entry.alias for entry in check.inputs] == [0, 0]
    y = torch.randn(2, 3)
    assert torch.equal(traced(y, y), y + y)
    with pytest.raises(InputError, match="were one tensor at the capture and are two now"):
        traced(y, y.clone())
