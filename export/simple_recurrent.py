"""Layers of `nn.RNN` as one ONNX operator each: torch's exporter writes them position by position, for one length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from onnxscript import opset18

op: Any = opset18


def simple_recurrent(activation: str) -> Callable[..., Any]:
    """What writes `aten.rnn_tanh.input` or `aten.rnn_relu.input`, by ONNX's name of the activation.

    Gates, directions and layers lie as torch's operator takes them (https://onnx.ai/onnx/operators/onnx__RNN.html).
    """

    def write(
        data: Any,
        start: Any,
        params: Sequence[Any],
        has_biases: bool,
        num_layers: int,
        dropout: float,
        train: bool,
        bidirectional: bool,
        batch_first: bool,
    ) -> Any:
        """Outputs, data [positions, batch, features] or batch first, and the last states [layers x directions, ...]."""
        directions, parts = (2 if bidirectional else 1), (4 if has_biases else 2)
        first, last_states = op.Constant(value_ints=[0]), []
        if batch_first:
            data = op.Transpose(data, perm=[1, 0, 2])
        for layer in range(num_layers):
            places = range(layer * directions, (layer + 1) * directions)
            own = [params[place * parts : (place + 1) * parts] for place in places]
            inputs = [op.Concat(*(op.Unsqueeze(each[i], first) for each in own), axis=0) for i in (0, 1)]
            biases = [op.Unsqueeze(op.Concat(each[2], each[3], axis=0), first) for each in own if has_biases]
            between = (op.Constant(value_ints=[places.start]), op.Constant(value_ints=[places.stop]))
            results, last = op.RNN(
                data,
                *inputs,
                op.Concat(*biases, axis=0) if biases else None,
                None,
                op.Slice(start, *between, first),
                hidden_size=int(start.shape[2]),
                direction="bidirectional" if bidirectional else "forward",
                activations=[activation] * directions,
            )
            data = op.Reshape(op.Transpose(results, perm=[0, 2, 1, 3]), op.Constant(value_ints=[0, 0, -1]))
            last_states.append(last)
        if batch_first:
            data = op.Transpose(data, perm=[1, 0, 2])
        return data, op.Concat(*last_states, axis=0)

    return write
