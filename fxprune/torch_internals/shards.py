"""Private of torch: parameters that FSDP shards, and what runs beside DTensors."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed._composable.contract import REGISTRY_KEY, STATE_KEY
from torch.distributed._composable_state import _module_state_mapping
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam, ParamModuleInfo
from torch.distributed.tensor._dtensor_spec import DTensorSpec

# The attribute of a module that DistributedDataParallel looks for before it sends parameters and buffers to all.
ASKED_BEFORE_BROADCAST = "_ddp_params_and_buffers_to_ignore"


@contextlib.contextmanager
def decompositions_set_aside() -> Iterator[None]:
    """Let operators run as outside of a decomposition; in one, DTensors wait where other processes go on."""
    with torch._C._DisablePythonDispatcher():
        yield


def _groups(module: nn.Module) -> Iterator[Any]:
    """The groups of parameters that FSDP gathers together."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            state: Any = part._get_fsdp_state()
            groups = getattr(state, "_fsdp_param_groups", None)
            yield from (state._fsdp_param_group,) if groups is None else groups


def follow_parameters(module: nn.Module, before: Iterable[nn.Parameter]) -> None:
    """Tell FSDP which parameters a module has now, and where.

    Args:
        module: one that FSDP shards; its parameters are sharded.
        before: those that it had before, sharded; new ones are sharded as those whose place they take.
    """
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    parameters: dict[int, nn.Parameter] = {}
    for owner in module.modules():
        for name, parameter in owner._parameters.items():
            if parameter is not None:
                places.setdefault(id(parameter), []).append((owner, name))
                parameters[id(parameter)] = parameter
    known = set(map(id, before))
    fresh = [key for key in parameters if key not in known]
    for group in filter(None, _groups(module)):
        gone = [each for each in group.fsdp_params if id(each.sharded_param) not in places]
        for each in group.fsdp_params:
            if each not in gone:
                _put(each._module_info, places[id(each.sharded_param)])
        if not gone and not fresh:
            continue
        for each in gone:
            each._post_load_hook_handle.remove()
        like = (gone or group.fsdp_params)[0]
        made = [_sharded(parameters[key], places[key], like, group) for key in fresh]
        fresh = []
        group.fsdp_params = [each for each in group.fsdp_params if each not in gone] + made
        if hasattr(like, "param_dtype"):  # it has been run
            group._init_mp_dtypes()


def _put(info: ParamModuleInfo, places: list[tuple[nn.Module, str]]) -> None:
    (info.module, info.param_name), *others = places
    info.shared_modules, info.shared_param_names = [owner for owner, _ in others], [name for _, name in others]


def _sharded(parameter: nn.Parameter, places: list[tuple[nn.Module, str]], like: FSDPParam, group: Any) -> FSDPParam:
    info = ParamModuleInfo(*places[0])
    _put(info, places)
    return FSDPParam(
        parameter, info, like.mesh_info, group.post_forward_mesh_info, group.device, None, group.mp_policy,
        group.offload_policy,
    )  # fmt: skip


def sharding_options(module: nn.Module) -> dict[str, Any]:
    """The arguments of `fully_shard` with which a module was sharded."""
    group, state = next(filter(None, _groups(module))), module._get_fsdp_state()  # type: ignore[operator]
    info, after = group.mesh_info, group.post_forward_mesh_info
    is_whole = getattr(info, "is_spmd_mesh", False)  # with axes that are not FSDP's
    mesh = {"mesh": info.spmd_mesh, "dp_mesh_dims": info.dp_mesh_dims} if is_whole else {"mesh": info.mesh}
    again = (
        None if state._auto_reshard_after_forward else after is info or (after is not None and after.shard_mesh_size)
    )
    policies = {"mp_policy": group.mp_policy, "offload_policy": group.offload_policy}
    return mesh | policies | {"reshard_after_forward": again}


def dtype_of_calls(module: nn.Module) -> torch.dtype | None:
    """The dtype in which FSDP gathers a module's parameters for a call, by its mixed precision; None for their own."""
    policies = [group.mp_policy for group in filter(None, _groups(module))]
    return next((policy.param_dtype for policy in policies if policy.param_dtype is not None), None)


def forget_sharding(module: nn.Module) -> None:
    """Take off what `fully_shard` and its kin leave on a module before they register the hooks that it refuses."""
    for key in (STATE_KEY, REGISTRY_KEY):
        module.__dict__.pop(key, None)
    _module_state_mapping.pop(module, None)


def take_parameters(module: nn.Module) -> None:
    """Let FSDP shard what stands under the names of its parameters now, DTensors that are spread alike."""
    for group in filter(None, _groups(module)):
        for each in group.fsdp_params:
            each.reset_sharded_param()


def spread_before(module: nn.Module) -> list[tuple[nn.Parameter, DTensorSpec]]:
    """Parameters that FSDP shards and that were spread before, and how, as they are again for a call."""
    given = [each for group in filter(None, _groups(module)) for each in group.fsdp_params if each.is_dtensor]
    return [(each.sharded_param, getattr(each, "_unsharded_dtensor_spec", None) or each._tp_spec) for each in given]
