"""Running a masked network without computing what its masks make zero."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fxprune.graph.interpretation import Interpreter
from fxprune.torch_internals import schema_of

aten = torch.ops.aten

_CONVOLUTIONS = (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)
_LEAST_DEAD = 0.2  # of a weight, from which on it takes less time to leave it out


class AliveInterpreter(Interpreter):
    """Convolutions whose weight has channels of zeros alone run without these."""

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        """An operator."""
        if target not in _CONVOLUTIONS or self.dtype is not None:
            return super().call_function(target, args, kwargs)
        schema = schema_of(target)
        assert schema is not None
        names = [argument.name for argument in schema.arguments]
        given = dict(zip(names, args, strict=False)) | kwargs
        if given.get("groups", 1) != 1 or given["input"].dim() != given["weight"].dim():
            return super().call_function(target, args, kwargs)
        outputs, inputs = (given["weight"].transpose(0, dim).flatten(1).any(1) for dim in (0, 1))
        if not bool(outputs.any() & inputs.any()) or float(outputs.double().mean() * inputs.double().mean()) > (
            1 - _LEAST_DEAD
        ):
            return super().call_function(target, args, kwargs)
        return convolved(target, given, outputs, inputs)


def convolved(target: Any, given: dict[str, Any], outputs: Tensor, inputs: Tensor) -> Tensor:
    """A convolution by the channels that are alive, masks [channels]; the other outputs are the bias alone."""
    weight, bias = given["weight"][outputs][:, inputs], given.get("bias")
    data = given["input"] if bool(inputs.all()) else given["input"][:, inputs]
    own = None if bias is None else bias[outputs]
    found: Tensor = target(**{**given, "input": data, "weight": weight, "bias": own})
    if bool(outputs.all()):
        return found
    whole = found.new_empty(len(found), len(outputs), *found.shape[2:])
    whole[:, outputs] = found
    still = 0.0 if bias is None else bias[~outputs].reshape(-1, *[1] * (found.dim() - 2))
    whole[:, ~outputs] = still
    return whole
