"""What is asked of a network that every process has whole, under DDP, and of one that FSDP2 keeps on the CPU."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

import fxprune
from fxprune.sharding import whole
from tests import sharded_networks as networks

P = fxprune.prune


def by_offload(module: fxprune.TracedModule) -> fxprune.TracedModule:
    """FSDP2 that keeps what it does not gather on the CPU."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    fully_shard(module, mesh=mesh, offload_policy=CPUOffloadPolicy(pin_memory=False))
    return module


def by_mixed_precision(module: fxprune.TracedModule) -> fxprune.TracedModule:
    """FSDP2 that computes in bfloat16, and keeps and adds up in float32."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    fully_shard(module, mesh=init_device_mesh("cpu", (dist.get_world_size(),)), mp_policy=policy)
    return module


def masked_in_mixed_precision(is_mixed: bool) -> dict[str, torch.Tensor]:
    """Outputs and gradients of layers masked before and after they are sharded, one under a norm, and what is left.

    Args:
        is_mixed: whether FSDP2 computes in bfloat16; else one process does with the whole module.
    """
    torch.manual_seed(0)
    x = torch.randn(4, 3, 6, 6)
    layers = nn.Sequential(nn.Conv2d(3, 10, 3), nn.ReLU(), nn.Conv2d(10, 7, 3), nn.ReLU(), nn.Conv2d(7, 2, 1))
    nn.utils.parametrizations.weight_norm(layers[2])
    module = fxprune.trace(layers.train(), (x,))
    P.l1_unstructured(module, "0.weight", 0.3)
    module = by_mixed_precision(module) if is_mixed else module
    found = {}
    for step in range(2):  # the masks are plain before the first call of a function that masks
        lower = module if is_mixed else copy.deepcopy(module).bfloat16()
        output = lower(x if is_mixed else x.bfloat16())
        output.float().square().mean().backward()
        found[f"output {step}"] = output.detach()
        for name, own in lower.named_parameters():
            assert own.grad is not None
            found[f"gradient {step} of {name}"] = whole(own.grad).float()
            own.grad = None
        P.l1_unstructured(module, "*.weight", 0.2)
    P.channels(module, macs=0.6)
    final = fxprune.finalize(module)
    return found | {f"final {name}": value for name, value in networks.values(final).items()}


def _wrapped(module: fxprune.TracedModule) -> nn.Module:
    return DistributedDataParallel(module) if dist.is_initialized() else module


def masks() -> dict[str, dict[str, torch.Tensor]]:
    """The state after each way to mask, of entries and of channels."""
    found, unmasked = {}, networks.traced()
    for what, mask in networks.MASKS.items():
        module = copy.deepcopy(unmasked)
        _wrapped(module)
        torch.manual_seed(5)
        mask(module)
        found[what] = networks.values(module)
    for what, choose in networks.C.items():
        module = copy.deepcopy(unmasked)
        _wrapped(module)
        report = choose(module, lambda every: every)
        found[f"channels, {what}"] = networks.values(module) | {"MACs": torch.tensor(report.macs)}
    return found


def whole_way(folder: str) -> dict[str, dict[str, torch.Tensor]]:
    """Masks, three steps with clipping on a part of the batch each, finalize, and what is written."""
    module = networks.traced()
    P.l1_unstructured(module, "inner.weight", 0.3)
    wrapped = _wrapped(module.eval())  # statistics of a part of a batch are others
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    clip = fxprune.clip_gradients(optimizer, max_norm=0.5)
    norms = {}
    for step in range(3):
        own = networks.inputs(step)
        if dist.is_initialized():
            own = own.chunk(dist.get_world_size())[dist.get_rank()]
        optimizer.zero_grad()
        wrapped(own).square().mean().backward()
        optimizer.step()
        norms[str(step)] = torch.as_tensor(clip.total_norm)
        if step == 1:
            P.channels(module, macs=0.6)
    found = {"norms": norms, "trained": networks.values(module)}
    final = fxprune.finalize(module)
    found["final"] = networks.values(final)
    rank = dist.get_rank() if dist.is_initialized() else 0
    report = fxprune.export.to_onnx(final.eval(), f"{folder}/{rank}.onnx")
    fxprune.save(final, f"{folder}/{rank}.fxp")
    assert report.comparison is not None
    found["written"] = {"ok": torch.tensor(report.comparison.ok)}
    found["loaded"] = networks.values(fxprune.load(f"{folder}/{rank}.fxp"))
    return found


def all_ways(folder: str) -> dict[str, Any]:
    """Both."""
    return {"masks": masks(), "way": whole_way(folder)}


def all_ways_offloaded(folder: str) -> dict[str, Any]:
    """The same where FSDP2 offloads to the CPU."""
    return {
        "masks": networks.masks(by_offload),
        "channels": networks.channels(by_offload),
        "trained": networks.trained(by_offload),
        "final": networks.finalized(by_offload, "spread", folder),
    }
