"""Masks: `torch.nn.utils.prune` on traced modules, methods that torch lacks, channels under a budget, schedules."""

from fxprune.calling import is_no_function
from fxprune.prune.budgeted_channels import channels
from fxprune.prune.channel_report import ChannelReport
from fxprune.prune.methods import BlockStructured, NMStructured
from fxprune.prune.mirror import (
    apply,
    block_structured,
    custom_from_mask,
    global_unstructured,
    identity,
    is_pruned,
    l1_unstructured,
    ln_structured,
    nm_structured,
    random_structured,
    random_unstructured,
    remove,
)

__all__ = [
    "BlockStructured",
    "ChannelReport",
    "NMStructured",
    "apply",
    "block_structured",
    "channels",
    "custom_from_mask",
    "global_unstructured",
    "identity",
    "is_pruned",
    "l1_unstructured",
    "ln_structured",
    "nm_structured",
    "random_structured",
    "random_unstructured",
    "remove",
]

is_no_function(
    __name__,
    "Masks are made by its functions: fxprune.prune.channels(traced, macs=0.5) for whole channels, "
    "fxprune.prune.l1_unstructured(traced, 'conv1.weight', amount=0.3) for entries.",
)
