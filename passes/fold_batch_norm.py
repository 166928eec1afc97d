"""Fold batch normalization into the convolution or linear layer before it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import fx, nn

from fxprune.errors import FinalizeError
from fxprune.graph.editing import erase_dead, locate, reads, tensor_at
from fxprune.graph.traced import TracedModule

from .base import Pass, visit

_aten = torch.ops.aten
# position of the bias, and of the groups where the output channels are the weight's second axis
_LAYERS: dict[Any, tuple[int, int | None]] = {
    _aten.conv1d.default: (2, None),
    _aten.conv1d.padding: (2, None),
    _aten.conv2d.default: (2, None),
    _aten.conv2d.padding: (2, None),
    _aten.conv3d.default: (2, None),
    _aten.conv3d.padding: (2, None),
    _aten.linear.default: (2, None),
    _aten.conv_transpose1d.default: (2, 6),
    _aten.conv_transpose2d.input: (2, 6),
    _aten.conv_transpose3d.input: (2, 6),
}


@dataclass(frozen=True)
class FoldBatchNorm(Pass):
    """Scale the rows of a layer by what the batch norm behind it multiplies them with, in eval mode.

    The train graph is dropped, since it needs the two apart. Cases where both stay: (1) the layer's output has another
    user; (2) its weight or bias is read elsewhere, or is no parameter; (3) the norm has no running statistics; (4) the
    axes differ, as after a linear layer over sequences. Values are computed in float64 and rounded once.

    Source: Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
    Inference" (2018), section 3.2, https://arxiv.org/abs/1712.05877.

    Example:
        >>> FoldBatchNorm()(traced).modified
        True
    """

    name: ClassVar[str] = "fold-batch-norm"

    def requires(self, traced: TracedModule) -> None:
        if "eval" not in traced.modes:
            raise FinalizeError(f"fold-batch-norm needs the eval graph; captured: {', '.join(traced.modes)}.")

    def run(self, traced: TracedModule) -> bool:
        graph = traced.graphs["eval"]
        norms = [node for node in visit(graph) if node.target is _aten.batch_norm.default]
        pairs: list[tuple[fx.Node, Any]] = [(norm, norm.args[0]) for norm in norms]
        pairs = [(norm, layer) for norm, layer in pairs if self._foldable(traced, norm, layer)]
        if not pairs:
            return False
        traced.graphs = {"eval": graph}
        traced.eval()
        state = {str(a.target) for norm, _ in pairs for a in norm.args[1:5] if isinstance(a, fx.Node)}
        for norm, layer in pairs:
            self._fold(traced, norm, layer)
        erase_dead(graph)
        self._drop_unread(traced, state)
        return True

    def _foldable(self, traced: TracedModule, norm: fx.Node, layer: Any) -> bool:
        gain, shift, mean, variance, training = cast(tuple[Any, ...], norm.args[1:6])
        if not isinstance(layer, fx.Node) or layer.target not in _LAYERS or len(layer.users) > 1:  # (1)
            return False
        if training or not all(isinstance(a, fx.Node) and a.op == "get_attr" for a in (mean, variance)):  # (3)
            return False
        if any(a is not None and a.op != "get_attr" for a in (gain, shift)):
            return False
        if layer.target is _aten.linear.default and layer.meta["val"].dim() != 2:  # (4)
            return False
        own = [a for a in (layer.args[1], _bias(layer)) if a is not None]
        return all(  # (2)
            isinstance(a, fx.Node)
            and a.op == "get_attr"
            and sum(len(read.users) for read in reads(traced, norm.graph, str(a.target))) == 1
            and _holders(traced, str(a.target)) == 1
            for a in own
        )

    def _fold(self, traced: TracedModule, norm: fx.Node, layer: fx.Node) -> None:
        def value(argument: Any) -> torch.Tensor | None:
            return None if argument is None else tensor_at(traced, str(argument.target)).detach().double()

        gain, shift, mean, variance = (value(a) for a in norm.args[1:5])
        assert mean is not None and variance is not None  # noqa: PT018
        scale = torch.rsqrt(variance + float(norm.args[7])) * (1.0 if gain is None else gain)  # type: ignore[arg-type]
        target = str(layer.args[1].target)  # type: ignore[union-attr]
        parameter = tensor_at(traced, target)
        weight, bias = parameter.detach().double(), value(_bias(layer))
        at, grouped = _LAYERS[layer.target]
        if grouped is None:
            weight = weight * scale.view(-1, *[1] * (weight.dim() - 1))
        else:
            groups = cast(int, layer.args[grouped]) if len(layer.args) > grouped else 1
            split = weight.unflatten(0, (groups, -1))
            weight = (split * scale.view(groups, 1, -1, *[1] * (weight.dim() - 2))).flatten(0, 1)
        folded = (0 if bias is None else bias) * scale - mean * scale + (0 if shift is None else shift)
        owner, name = locate(traced, target)
        owner._parameters[name] = nn.Parameter(weight.to(parameter.dtype), parameter.requires_grad)
        read = _bias(layer)
        if read is None:
            name = "bias" if getattr(owner, "bias", None) is None else f"{name}_bias"
            with norm.graph.inserting_before(layer):
                owner._parameters[name] = nn.Parameter(folded.to(parameter.dtype), parameter.requires_grad)
                read = norm.graph.get_attr(_beside(target, name))
            layer.args = (*layer.args[:at], read, *layer.args[at + 1 :])
        else:
            owner, name = locate(traced, str(read.target))
            owner._parameters[name] = nn.Parameter(folded.to(parameter.dtype), parameter.requires_grad)
        norm.replace_all_uses_with(layer)

    def _drop_unread(self, traced: TracedModule, targets: set[str]) -> None:
        for target in targets:
            if not any(read.users for read in reads(traced, traced.graphs["eval"], target)):
                owner, name = locate(traced, target)
                for state in (owner._parameters, owner._buffers):
                    state.pop(name, None)
                owner._buffers.pop("num_batches_tracked", None)


def _bias(layer: fx.Node) -> Any:
    at = _LAYERS[layer.target][0]
    return layer.args[at] if len(layer.args) > at else layer.kwargs.get("bias")


def _holders(traced: TracedModule, target: str) -> int:
    tensor = tensor_at(traced, target)
    return sum(p is tensor for module in traced.modules() for p in module._parameters.values())


def _beside(target: str, name: str) -> str:
    path = target.rpartition(".")[0]
    return f"{path}.{name}" if path else name
