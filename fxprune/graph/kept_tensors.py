"""Tensors that modules keep from one call to the next in dictionaries, computed from their parameters."""

from __future__ import annotations

from torch import Tensor, nn


def forget_kept_tensors(root: nn.Module) -> None:
    """Have modules drop what they keep, in their own way: those that do override `train`, and let go there.

    A module that keeps its positional biases for eval mode would go on with those of other parameters, or of another
    precision. The modes of all modules stay.
    """
    for module in root.modules():
        if type(module).train is nn.Module.train or not _keeps_tensors(module):
            continue
        modes = [(each, each.training) for each in module.modules()]
        for mode in (True, False):  # one of them lets go; what is returned is not looked at
            module.train(mode)
        for each, training in modes:
            each.training = training


def _keeps_tensors(module: nn.Module) -> bool:
    held = (value for name, value in vars(module).items() if name not in ("_parameters", "_buffers"))
    return any(isinstance(entry, Tensor) for value in held if type(value) is dict for entry in value.values())
