"""The attributes in which torch's own layers keep the sizes of their parameters."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fxprune.torch_internals import ConvNd, NormBase

# attributes that are the sizes of `weight`, by axis
_AXES: dict[type[nn.Module], tuple[str, ...]] = {
    nn.Linear: ("out_features", "in_features"),
    nn.Bilinear: ("out_features", "in1_features", "in2_features"),
    nn.Embedding: ("num_embeddings", "embedding_dim"),
    nn.EmbeddingBag: ("num_embeddings", "embedding_dim"),
    nn.PReLU: ("num_parameters",),
}
_GATES = {"LSTM": 4, "GRU": 3}


def layer_attributes(module: nn.Module) -> dict[str, Any]:
    """By name, what the sizes that a layer of torch keeps must be with the parameters that it has now.

    The groups of a convolution do not show in its parameters: they are taken as they are. Modules of other classes
    have no such attributes.

    Example:
        >>> layer_attributes(nn.Linear(4, 2))
        {'out_features': 2, 'in_features': 4}
    """
    if isinstance(module, NormBase):
        return _batch_norm(module)
    if isinstance(module, nn.RNNBase):
        return _recurrent(module)
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        return {}
    if isinstance(module, ConvNd):
        return _convolution(module, weight)
    if isinstance(module, nn.GroupNorm):
        channels = len(weight)
        return {"num_channels": channels, "num_groups": module.num_groups * channels // module.num_channels}
    if isinstance(module, nn.LayerNorm | nn.RMSNorm):
        return {"normalized_shape": tuple(weight.shape)}
    for kind, names in _AXES.items():
        if isinstance(module, kind):
            return dict(zip(names, weight.shape, strict=False))
    return {}


def follow_parameters(module: nn.Module) -> None:
    """Set the attributes of a layer to what its parameters have."""
    vars(module).update(layer_attributes(module))


def _batch_norm(module: NormBase) -> dict[str, Any]:
    of_channels = module.weight if module.weight is not None else module.running_mean
    return {} if of_channels is None else {"num_features": len(of_channels)}


def _convolution(module: ConvNd, weight: Tensor) -> dict[str, Any]:
    rows, columns = weight.shape[0], weight.shape[1] * module.groups
    inputs, outputs = (rows, columns) if module.transposed else (columns, rows)
    return {"in_channels": inputs, "out_channels": outputs, "groups": module.groups}


def _recurrent(module: nn.RNNBase) -> dict[str, Any]:
    shapes = {name: tuple(parameter.shape) for name, parameter in module.named_parameters(recurse=False)}
    rows = shapes["weight_hh_l0"][0] // _GATES.get(module.mode, 1)
    projected = {"proj_size": shapes["weight_hr_l0"][0]} if module.proj_size else {}
    return {"hidden_size": rows, "input_size": shapes["weight_ih_l0"][1], **projected}
