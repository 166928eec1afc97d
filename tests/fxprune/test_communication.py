"""Calls that processes make together, in a group of one process; in several, `test_sharding_failures` has them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from fxprune import communication
from fxprune.calling import spelled
from fxprune.communication import agree, communicating, led_by_first, together
from fxprune.errors import ShardingError


@pytest.fixture
def spread() -> Iterator[DTensor]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield distribute_tensor(torch.ones(4), init_device_mesh("cpu", (1,)), [Shard(0)])
    dist.destroy_process_group()


def test_an_error_of_this_process_is_told_once_and_raised_as_it_is(
    spread: DTensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[BaseException | None] = []
    real = communication._tell

    def tell(call: Any, failure: BaseException | None, what: str) -> None:
        told.append(failure)
        real(call, failure, what)

    monkeypatch.setattr(communication, "_tell", tell)
    error = LookupError("a defect")
    with pytest.raises(LookupError) as raised, together(spread), together(spread):
        with communicating("sending"):
            pass
        with communicating("computing", sends=False), led_by_first():
            agree()  # the first one tells
        raise error
    assert raised.value is error
    assert told == [None, error]


def test_what_stops_in_the_midst_of_sending_tells_nobody(spread: DTensor, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[BaseException | None] = []
    monkeypatch.setattr(communication, "_tell", lambda call, failure, what: told.append(failure))
    with pytest.raises(KeyboardInterrupt), together(spread), communicating("sending"):
        raise KeyboardInterrupt
    with pytest.raises(ShardingError, match="RuntimeError: closed"), together(spread), communicating("sending"):
        raise RuntimeError("closed")
    assert told == [None, None]  # before it was sent


def test_without_a_spread_tensor_or_a_group_nothing_is_told() -> None:
    with together(None), together(torch.ones(2)):
        agree()
    with pytest.raises(ShardingError, match="there is none"), communicating("sending"):
        pass


def test_calls_are_spelled_by_what_is_the_same_in_every_process() -> None:
    def cut(
        traced: object, amount: float, *, names: object = (), loader: object = None, path: str = "", **more: Any
    ) -> None:
        """Takes what functions of fxprune take."""

    assert spelled(cut, (None, 0.5), {}) == "cut(amount=0.5)"
    assert (
        spelled(cut, (), {"traced": 1, "names": ["a", ("b", 2)], "amount": 1}) == "cut(amount=1, names=['a', ['b', 2]])"
    )
    own = {"loader": [torch.ones(1)], "path": "of process 1", "names": iter(["a"]), "loss": lambda x: x}
    assert spelled(cut, (None, 0.5), own) == "cut(amount=0.5)"
    of_sets = {"kind": torch.nn.Linear, "names": {"b", "a"}, "table": {"a": 1, "b": torch.ones(1)}}
    assert spelled(cut, (None, 0.5), of_sets) == "cut(amount=0.5, names=['a', 'b'], kind=Linear, table={a: 1})"
    assert spelled(cut, (None,), {"names": ()}) == "cut"  # which the function refuses itself
