"""A small network, data and a schedule that the tests of training loops share."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fxprune


def small_network() -> nn.Sequential:
    """Two convolutions with batch norms and a head, of the same values at each call."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        first = nn.Conv2d(1, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU()
        second = nn.Conv2d(16, 16, 3), nn.BatchNorm2d(16), nn.ReLU()
        return nn.Sequential(*first, *second, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4))


def examples(count: int = 32) -> tuple[Tensor, Tensor]:
    """Images [count, 1, 8, 8] and their classes."""
    numbers = torch.Generator().manual_seed(3)
    labels = torch.randint(4, (count,), generator=numbers)
    images = torch.randn(count, 1, 8, 8, generator=numbers)
    images[torch.arange(count), 0, labels] += 2.0
    return images, labels


def traced_network() -> fxprune.TracedModule:
    """The network, traced, in train mode."""
    return fxprune.trace(small_network(), examples(4)[0]).train()


def channel_schedule(traced: fxprune.TracedModule, stop: int = 12, **options: Any) -> fxprune.Schedule:
    """To half of the multiply-adds."""

    def request(gone: float) -> object:
        return fxprune.prune.channels(traced, macs=1 - gone, round_to=1)

    return fxprune.Schedule(traced, None, request, 0.5, start=2, stop=stop, every=5, **options)


def assert_same_state(found: nn.Module, wanted: nn.Module) -> None:
    """Names and bits of two state dicts are the same; there are masks among them."""
    ours, theirs = found.state_dict(), wanted.state_dict()
    assert ours.keys() == theirs.keys()
    assert any(name.endswith("_mask") for name in ours)
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name


def tensorboard_tags(folder: Path) -> set[str]:
    """The names of the figures in the event files below a folder: records of a length, its checksum, data, its own."""
    from tensorboardX.proto.event_pb2 import Event

    tags = set()
    for path in folder.rglob("events*"):
        content, start = path.read_bytes(), 0
        while start < len(content):
            (length,) = struct.unpack_from("<Q", content, start)
            event = Event.FromString(content[start + 12 : start + 12 + length])
            tags |= {value.tag for value in event.summary.value}
            start += length + 16
    return tags
