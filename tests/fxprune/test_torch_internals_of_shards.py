"""What is private of FSDP2 still behaves as the library relies on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch._dispatch.python import enable_python_dispatcher

from fxprune import torch_internals as internals


@pytest.fixture
def sharded() -> Iterator[nn.Sequential]:
    from torch.distributed.fsdp import fully_shard

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield fully_shard(nn.Sequential(nn.Linear(3, 2)), mesh=torch.distributed.init_device_mesh("cpu", (1,)))
    torch.distributed.destroy_process_group()


def test_follow_parameters_lets_fsdp_gather_one_under_its_new_name(sharded: nn.Sequential) -> None:
    layer, x = sharded[0], torch.randn(5, 3)
    want = sharded(x)
    sharded.reshard()  # type: ignore[operator]
    before = list(sharded.parameters())
    layer.weight_orig = layer._parameters.pop("weight")
    layer.forward = lambda x: nn.functional.linear(x, layer.weight_orig, layer.bias)
    internals.follow_parameters(sharded, before)
    assert torch.equal(sharded(x), want)


def test_follow_parameters_shards_what_takes_the_place_of_one(sharded: nn.Sequential) -> None:
    from torch.distributed.tensor import DTensor

    layer, x = sharded[0], torch.randn(5, 3)
    sharded(x)
    sharded.reshard()  # type: ignore[operator]
    before = list(sharded.parameters())
    layer._parameters["weight"] = nn.Parameter(torch.ones(2, 3))
    internals.follow_parameters(sharded, before)
    assert isinstance(layer.weight, DTensor)
    assert torch.allclose(sharded(x) - layer.bias, x.sum(1, keepdim=True).expand(5, 2))


def test_follow_parameters_shards_what_is_new(sharded: nn.Sequential) -> None:
    from torch.distributed.tensor import DTensor

    before = list(sharded.parameters())
    sharded[0].scale = nn.Parameter(torch.ones(2))
    internals.follow_parameters(sharded, before)
    assert isinstance(sharded[0].scale, DTensor)
    assert [each.shape for each in sharded.parameters()] == [(2, 3), (2,), (2,)]


def test_sharding_options_shard_another_module_alike(sharded: nn.Sequential) -> None:
    from torch.distributed.fsdp import fully_shard

    options = internals.sharding_options(sharded)
    other = fully_shard(nn.Linear(3, 2), **options)
    assert (other.weight.device_mesh, other.weight.placements) == (
        sharded[0].weight.device_mesh,
        sharded[0].weight.placements,
    )


def test_forget_sharding_takes_off_what_fully_shard_leaves_on_a_module_that_takes_no_hooks(
    sharded: nn.Sequential,
) -> None:
    from torch.distributed.fsdp import fully_shard

    class Refusing(nn.Linear):
        def register_forward_pre_hook(self, *given: object, **options: object) -> None:  # type: ignore[override]
            raise LookupError

    layer = Refusing(3, 2)
    before = dict(layer.__dict__)
    with pytest.raises(LookupError):
        fully_shard(layer)
    assert layer.__dict__.keys() != before.keys()
    internals.forget_sharding(layer)
    assert layer.__dict__.keys() == before.keys()
    whole = fully_shard(nn.Sequential(layer))
    assert whole(torch.randn(1, 3)).shape == (1, 2)


def test_dtype_of_calls_is_that_of_the_mixed_precision_that_a_module_was_sharded_with(sharded: nn.Sequential) -> None:
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    assert internals.dtype_of_calls(sharded) is None
    layer, policy = nn.Linear(3, 2), MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    assert internals.dtype_of_calls(fully_shard(layer, mp_policy=policy)) is torch.bfloat16
    assert layer(torch.randn(1, 3)).dtype is torch.bfloat16


def test_spread_before_has_what_was_tensor_parallel_before_it_was_sharded(sharded: nn.Sequential) -> None:
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard, distribute_tensor

    assert internals.spread_before(sharded) == []
    mesh = torch.distributed.init_device_mesh("cpu", (1, 1), mesh_dim_names=("data", "tensor"))
    layer = nn.Linear(3, 2)
    layer.weight = nn.Parameter(distribute_tensor(layer.weight.detach(), mesh["tensor"], [Shard(1)]))
    fully_shard(layer, mesh=mesh["data"])
    ((parameter, spec),) = internals.spread_before(layer)
    assert parameter is layer.weight
    assert (spec.mesh, spec.placements) == (mesh["tensor"], (Shard(1),))


def test_take_parameters_lets_fsdp_gather_what_stands_under_the_name_of_one(sharded: nn.Sequential) -> None:
    layer, x = sharded[0], torch.randn(5, 3)
    sharded(x)
    sharded.reshard()  # type: ignore[operator]
    layer._parameters["weight"] = nn.Parameter(torch.ones_like(layer.weight))
    internals.take_parameters(sharded)
    assert torch.allclose(sharded(x) - layer.bias, x.sum(1, keepdim=True).expand(5, 2))


def test_ASKED_BEFORE_BROADCAST_is_looked_for_before_buffers_are_written() -> None:
    class Asked(nn.Linear):
        def __getattr__(self, name: str) -> Any:
            if name == internals.ASKED_BEFORE_BROADCAST:
                self.register_buffer("shared", self.shared.clone())  # else torch refuses to write
            return super().__getattr__(name)

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        layers = [Asked(2, 2), nn.Linear(2, 2)]
        for layer in layers:
            layer.register_buffer("shared", torch.ones(2, 1).expand(2, 3))
        nn.parallel.DistributedDataParallel(layers[0])
        with pytest.raises(RuntimeError, match="single memory location"):
            nn.parallel.DistributedDataParallel(layers[1])
    finally:
        torch.distributed.destroy_process_group()


def test_decompositions_set_aside_are_there_again_afterwards() -> None:
    key = torch._C.DispatchKey.PythonDispatcher
    with enable_python_dispatcher():
        with internals.decompositions_set_aside():
            assert not torch._C._dispatch_tls_is_dispatch_key_included(key)
            assert torch.ones(2).sum() == 2
        assert torch._C._dispatch_tls_is_dispatch_key_included(key)
    assert not torch._C._dispatch_tls_is_dispatch_key_included(key)
