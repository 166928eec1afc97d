"""Recurrent layers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import fx, nn

from fxprune.channels.axes import sizes_of
from fxprune.channels.macs import measured_macs
from fxprune.channels.readers import Bias
from fxprune.channels.registry import Cost, OperatorCall, register
from fxprune.channels.rules.contractions import Layer, read_weight
from fxprune.channels.values import Value
from fxprune.channels.walk import Result, Walk

aten = torch.ops.aten


@register(aten.lstm.input, aten.gru.input, aten.rnn_tanh.input, aten.rnn_relu.input)
@dataclass(frozen=True, eq=False)
class Recurrent(OperatorCall):
    """The input is contracted; the hidden units are pinned, since they feed themselves."""

    data: fx.Node
    params: list[fx.Node]
    has_biases: bool
    num_layers: int
    bidirectional: bool
    modules: ClassVar = (nn.RNNBase,)

    @property
    def parameters_per_direction(self) -> int:
        return len(self.params) // (self.num_layers * (2 if self.bidirectional else 1))

    @property
    def first_layer(self) -> list[tuple[fx.Node, fx.Node | None]]:
        """The weight and the bias of the input, for each direction."""
        step = self.parameters_per_direction
        starts = [0, step] if self.bidirectional else [0]
        return [(self.params[i], self.params[i + 2] if self.has_biases else None) for i in starts]

    def relate(self, walk: Walk) -> Result:
        why = "hidden units of a recurrent layer"
        data = walk.value(self.data)
        data = walk.blur(self.node, data, range(data.rank - 1), "steps of a recurrent layer")
        data = walk.flat(self.node, data, data.rank - 1)
        contracted = {weight for weight, _ in self.first_layer}
        for operand in self.node.all_input_nodes:
            if operand is not self.data and operand not in contracted:
                walk.pin_operand(self.node, operand, why)
        for weight_node, bias_node in self.first_layer:
            weight = walk.value(weight_node)
            walk.pin_axis(self.node, weight.axes[0], why)
            axis = walk.join(self.node, [data.axes[-1], weight.axes[1]])
            if not data.axes[-1].is_one:
                data = data.relayout(data.rank - 1, axis)
            bias = None if bias_node is None else walk.value(bias_node)
            alone = bias is not None and walk.is_alone(bias.source)
            table = None if weight.facts is None else weight.facts.value.unsqueeze(0).unsqueeze(-1)
            rows, columns = walk.shape(weight_node)
            layer = Layer(
                self.node, data, data.rank - 1, replace(weight, source=None), table, weight.axes[0].ids, axis.ids, 1,
                rows, columns, folds=alone, bias=Bias(bias_node if alone else None), bias_value=bias,
            )  # fmt: skip
            read_weight(walk, layer)
        return walk.unknown(self.node)

    def costs(self, env: Mapping[fx.Node, Result]) -> Sequence[Cost]:
        """What reads the input is proportional to it, the rest to nothing that can go."""
        weight = self.first_layer[0][0]
        read = float(math.prod(sizes_of(self.data)[:-1]) * math.prod(sizes_of(weight)) * len(self.first_layer))
        data = env.get(self.data)
        axes = data.axes[-1:] if isinstance(data, Value) else ()
        return [Cost(measured_macs(self.node) - read, None), Cost(read, axes)]

    @classmethod
    def module_sizes(cls, module: nn.Module) -> dict[str, Any]:
        assert isinstance(module, nn.RNNBase)
        sizes = {name: tuple(tensor.shape) for name, tensor in module.named_parameters(recurse=False)}
        units = sizes["weight_hh_l0"][0] // {"LSTM": 4, "GRU": 3}.get(module.mode, 1)
        projected = {"proj_size": sizes["weight_hr_l0"][0]} if module.proj_size else {}
        return {"hidden_size": units, "input_size": sizes["weight_ih_l0"][1], **projected}
