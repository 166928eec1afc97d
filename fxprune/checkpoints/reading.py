"""A checkpoint's members decoded and checked: everything that needs no model."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from fxprune.capture.archives import refuse_code
from fxprune.checkpoints.dimensions import dimension_from_data
from fxprune.checkpoints.header import FORMAT, HEADER, TENSORS, Header, Json, StoredModule, program_member
from fxprune.errors import ArtifactError
from fxprune.graph.names import join
from fxprune.graph.plan import ChannelPlan

_PROGRAMS = [program_member(mode) for mode in ("train", "eval")]
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Checkpoint:
    """What a file of `save` holds.

    `state` are the parameters and buffers by every name, shared as they were. `inputs` are the sample inputs, by
    position and by name; `programs` the members with graphs, as they are in the file, by mode.
    """

    header: Header
    state: dict[str, Tensor]
    inputs: tuple[tuple[Any, ...], dict[str, Any]]
    dynamic_shapes: Any
    plan: ChannelPlan | None
    programs: dict[str, bytes]

    def fill(self, module: nn.Module, stored: StoredModule) -> None:
        """Give a module its parameters and buffers, in the order of the file."""
        for held, names in ((module._parameters, stored.parameters), (module._buffers, stored.buffers)):
            held.clear()
            for name, is_there in names.items():
                held[name] = self.state[join(stored.path, name)] if is_there else None  # type: ignore[assignment]


def read_checkpoint(members: dict[str, bytes], device: torch.device = CPU) -> Checkpoint:
    """Decode the members of a file, tensors on `device`.

    Raises:
        ArtifactError: a member is missing, altered or does not belong, the format is a later one, or something could
            run code. What json, safetensors and torch raise for damaged members comes as it is.
    """
    header = _checked_header(members)
    tensors = safetensors.torch.load(members[TENSORS])
    samples = {name: value.to(device) for name, value in tensors.items() if name.startswith("input:")}
    named: dict[str, Any] = {}
    return Checkpoint(
        header=header,
        state=_shared_state(header, tensors, device),
        inputs=header.inputs.tree(lambda leaf: samples[leaf[0]] if isinstance(leaf, list) else leaf),
        dynamic_shapes=header.dynamic_shapes.tree(lambda leaf: dimension_from_data(leaf, named)),
        plan=ChannelPlan.from_json(header.plan) if header.plan else None,
        programs={mode: members[name] for mode in header.modes if (name := program_member(mode)) in members},
    )


def _checked_header(members: dict[str, bytes]) -> Header:
    if strangers := [name for name in members if name not in (HEADER, TENSORS, *_PROGRAMS)]:
        raise ArtifactError(f"the archive has members that no checkpoint has: {', '.join(map(repr, strangers[:5]))}.")
    data: Json = json.loads(members[HEADER])
    if data["format"] > FORMAT:
        raise ArtifactError(
            f"a checkpoint of format {data['format']}, written by fxprune {data['version']}; this version reads up "
            f"to {FORMAT}. Update fxprune."
        )
    header = Header.from_json(data)
    for name, digest in header.sha256.items():
        if hashlib.sha256(members.get(name, b"")).hexdigest() != digest:
            raise ArtifactError(f"{name} is not what was written: {'altered' if name in members else 'missing'}.")
    refuse_code([header.inputs.spec, header.dynamic_shapes.spec])
    return header


def _shared_state(header: Header, tensors: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Parameters and buffers by name: one object, or one memory, where there was one."""
    places: dict[str, Tensor] = {}
    objects: dict[str, Tensor] = {}
    for name, stored in header.tensors.items():
        if stored.data not in places:
            value = (
                _hollow(*header.hollow[name]) if name in header.hollow else tensors[f"state:{stored.data}"].to(device)
            )
            places[stored.data] = _strided(value, stored.stride)
        if stored.object not in objects:
            value = places[stored.data].detach()
            objects[stored.object] = nn.Parameter(value, stored.trained) if stored.parameter else value
    return {name: objects[stored.object] for name, stored in header.tensors.items()}


def _hollow(shape: list[int], dtype: str) -> Tensor:
    return torch.empty(shape, dtype=getattr(torch, dtype), device="meta")


def _strided(value: Tensor, stride: tuple[int, ...] | None) -> Tensor:
    if stride is None:
        return value
    return torch.empty_strided(value.shape, stride, dtype=value.dtype, device=value.device).copy_(value)
