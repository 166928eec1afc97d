"""Tensors that stay in parts with the processes act as plain ones, whatever reads and writes them."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from fxprune import borrowing
from fxprune.borrowing import Borrowed, Loans, asked, fills_its_memory, lent_as, nonzero, share_memory
from fxprune.by_parts import checksum
from fxprune.errors import ShardingError
from fxprune.sharding import Layout


@pytest.fixture(autouse=True)
def mesh(monkeypatch: pytest.MonkeyPatch) -> Iterator[DeviceMesh]:
    """One process, which keeps no whole tensor longer than it must."""
    monkeypatch.setattr(borrowing, "SMALL", 0)
    monkeypatch.setattr(borrowing, "ROOM", 0)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


VALUES = [torch.arange(12.0).reshape(3, 4) - 5, torch.ones(3, 4), torch.full((3, 4), 2.0), torch.zeros(3, 4)]


def lent(mesh: DeviceMesh) -> tuple[list[Borrowed], Loans]:
    loans = Loans([distribute_tensor(each.clone(), mesh, [Shard(0)]) for each in VALUES], 0)
    return [loans.lent(number) for number in range(len(VALUES))], loans


def use_others(tensors: list[Borrowed]) -> None:
    """Read others, so that nothing of the first is here any more."""
    for each in tensors[1:]:
        each.sum()
    assert tensors[0]._cell.held is None


def test_operators_give_what_they_give_of_plain_tensors(mesh: DeviceMesh) -> None:
    (own, ones, *_), _ = lent(mesh)
    want = VALUES[0]
    assert own.sum() == want.sum()
    assert torch.equal(own @ want.T, want @ want.T)
    assert torch.equal((own * 2 + ones).abs(), (want * 2 + 1).abs())
    assert torch.equal(own.movedim(1, 0)[1:].flatten(), want.movedim(1, 0)[1:].flatten())
    assert own.tolist() == want.tolist()
    assert np.array_equal(own.numpy(), want.numpy())
    assert np.array_equal(np.asarray(own), want.numpy())
    assert torch.equal(pickle.loads(pickle.dumps(own)), want)
    assert torch.equal(own.view(torch.int32).detach().whole(), want.view(torch.int32))


def test_what_is_as_large_as_a_parameter_is_lent_and_what_runs_through_a_network_is_not(mesh: DeviceMesh) -> None:
    (own, *_), _ = lent(mesh)
    assert isinstance(own.abs(), Borrowed)
    assert isinstance(own.double(), Borrowed)
    assert isinstance(torch.zeros_like(own), Borrowed)
    assert not isinstance(torch.nn.functional.linear(torch.ones(2, 4), own), Borrowed)
    assert isinstance(lent_as(torch.ones(5), own), Borrowed)
    assert not isinstance(lent_as(torch.ones(5), torch.ones(5)), Borrowed)


def test_writes_last_when_the_whole_went_in_between(mesh: DeviceMesh) -> None:
    tensors, _ = lent(mesh)
    own = tensors[0]
    want = VALUES[0].clone()
    own += 1
    use_others(tensors)
    own[1] = 7.0
    use_others(tensors)
    own.detach().t()[:, 2].mul_(3)
    use_others(tensors)
    own.data.clamp_(max=20)
    use_others(tensors)
    own.numpy()[0, 0] = 9.0
    use_others(tensors)
    want += 1
    want[1] = 7.0
    want.t()[:, 2].mul_(3)
    want.clamp_(max=20)
    want[0, 0] = 9.0
    assert torch.equal(own.whole(), want)
    own.data = tensors[2]
    assert torch.equal(own.whole(), VALUES[2])
    own.data = VALUES[3]
    assert torch.equal(own.whole(), VALUES[3])
    with pytest.raises(ShardingError, match="cannot become"):
        own.data = torch.ones(2)


def test_what_several_views_of_one_chunk_write_lasts(mesh: DeviceMesh) -> None:
    tensors, _ = lent(mesh)
    first, second = tensors[0].chunk(2)  # plain, and in use
    for each in tensors[1:]:
        each.sum()
    first.zero_()
    second.fill_(4.0)
    del first, second
    use_others(tensors)
    assert tensors[0].tolist() == [[0.0] * 4, [0.0] * 4, [4.0] * 4]


def test_copies_change_by_themselves_and_send_nothing_before(mesh: DeviceMesh) -> None:
    (own, *_), loans = lent(mesh)
    copies = [own.clone(), copy.deepcopy(own)]
    for each in copies:
        assert torch.equal(each.whole(), VALUES[0])
    assert loans.counts.sent == 0
    copies.append(copy.deepcopy(own[1:]))
    assert torch.equal(copies[2].whole(), VALUES[0][1:])
    for each in copies:
        each.zero_()
    assert torch.equal(own.whole(), VALUES[0])
    assert all(not each.any() for each in copies)


def test_the_tensors_that_were_lent_are_never_written_to(mesh: DeviceMesh) -> None:
    tensors, loans = lent(mesh)
    again = loans.lent(0)
    tensors[0].zero_()
    use_others(tensors)
    assert torch.equal(again.whole(), VALUES[0])
    assert torch.equal(loans.part(0).full_tensor(), VALUES[0])  # type: ignore[attr-defined]


def test_gradients_of_parameters_are_those_of_plain_ones(mesh: DeviceMesh) -> None:
    (own, *_), _ = lent(mesh)
    parameter, plain = nn.Parameter(own), nn.Parameter(VALUES[0].clone())
    assert isinstance(parameter, nn.Parameter)
    x = torch.randn(5, 4)
    for each in (parameter, plain):
        (torch.nn.functional.linear(x, each).relu() * each[0, 1]).sum().backward()
    assert torch.equal(parameter.grad, plain.grad)  # type: ignore[arg-type]


def test_one_whole_is_held_and_what_nothing_uses_is_dropped(mesh: DeviceMesh) -> None:
    tensors, loans = lent(mesh)
    for each in tensors:
        (each.abs() + 1).sum()
    assert loans.counts.wholes == VALUES[0].nbytes
    tensors[0].whole()
    assert loans.counts.parts <= 2 * VALUES[0].nbytes
    numbers = [loans.number_of(each * 2) for each in tensors]
    loans.end("told")
    for number, value in zip(numbers, VALUES, strict=True):
        assert torch.equal(loans.part(number).full_tensor(), value * 2)  # type: ignore[attr-defined]


def test_pointwise_operators_need_no_whole(mesh: DeviceMesh) -> None:
    (own, ones, twos, _), loans = lent(mesh)
    want, one, two = VALUES[:3]
    found = [
        own * ones / twos,
        own.abs() > 2,
        torch.where(own > 0, own, twos),
        own.double() * 0.1,
        (own == 1).logical_not(),
    ]
    assert loans.counts.wholes == 0
    assert all(isinstance(each, Borrowed) for each in found)
    expected = [want * one / two, want.abs() > 2, torch.where(want > 0, want, two), want.double() * 0.1, want != 1]
    for each, plain in zip(found, expected, strict=True):
        assert each.dtype == plain.dtype
        assert torch.equal(each.whole(), plain)
    own.add_(1)  # written on the first process, and not in the parts yet
    assert torch.equal((own * twos).whole(), (want + 1) * 2)
    own.numpy()[0, 0] = 7.0
    assert (own * twos)[0, 0] == 14
    with pytest.raises(RuntimeError, match="bitwise_not"):
        own.bitwise_not()
    assert torch.equal(own * want, own.whole() * want)


def test_a_lost_process_is_told_at_every_later_use(mesh: DeviceMesh, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, _ = lent(mesh)

    def lost(*given: object) -> None:
        raise ShardingError("a process is gone")

    with monkeypatch.context() as patch:
        patch.setattr(Layout, "collect", lost)
        with pytest.raises(ShardingError, match="gone"):
            tensors[0].sum()
    with pytest.raises(ShardingError, match="gone"):
        tensors[1].sum()


@pytest.mark.parametrize("made", ["outgoing", "incoming"])
def test_what_fails_before_others_wait_loses_nothing(
    mesh: DeviceMesh, monkeypatch: pytest.MonkeyPatch, made: str
) -> None:
    tensors, loans = lent(mesh)

    def full(*given: object) -> None:
        raise MemoryError("no room")

    here = tensors[0].whole()
    twice = tensors[0] * 2  # of what is here: made here, and sent later
    with monkeypatch.context() as patch:
        patch.setattr(Layout, made, full)
        with pytest.raises(MemoryError, match="no room"):
            (loans.number_of(twice), tensors[1].sum())
    assert not loans.are_lost
    assert torch.equal(here, VALUES[0])
    assert torch.equal(loans.part(loans.number_of(twice)).full_tensor(), VALUES[0] * 2)  # type: ignore[attr-defined]
    assert torch.equal(tensors[1].whole(), VALUES[1])


def test_what_parts_are_enough_for_brings_no_whole(mesh: DeviceMesh) -> None:
    (own, ones, twos, zeros), loans = lent(mesh)
    want = VALUES[0]
    rows, columns = torch.tensor([[True], [False], [True]]), torch.tensor([True, True, False, True])
    made = [
        (rows & columns) * own,
        rows.expand(3, 4) * own,
        (own.abs() ** 2 - ones) / twos,
        own.where(own > 0, 0),
        own.to(torch.bfloat16),
        torch.full_like(own, 3.0),
    ]
    total = torch.zeros_like(own)
    total += own
    total *= 2
    zeros.copy_(rows & columns)
    is_finite = own.isnan().any(), own.detach().aminmax(), bool((own == own).all())
    assert loans.counts.wholes == 0
    made.append(torch.empty_like(own).copy_(torch.arange(12.0).reshape(3, 4)))
    plain = [
        (rows & columns) * want,
        rows.expand(3, 4) * want,
        (want.abs() ** 2 - 1) / 2,
        want.where(want > 0, 0),
        want.to(torch.bfloat16),
        torch.full((3, 4), 3.0),
        torch.arange(12.0).reshape(3, 4),
    ]
    for found, value in zip([*made, total, zeros], [*plain, want * 2, (rows & columns).float()], strict=True):
        assert found.dtype == value.dtype
        assert torch.equal(found.whole(), value)
    assert (bool(is_finite[0]), [float(end) for end in is_finite[1]], is_finite[2]) == (False, [-5.0, 6.0], True)
    assert torch.equal(own.whole(), want)


def test_what_rounds_by_its_place_or_needs_all_is_computed_of_wholes(mesh: DeviceMesh) -> None:
    (own, ones, *_), loans = lent(mesh)
    for call in (lambda: own.exp(), lambda: torch.add(own, ones, alpha=3), lambda: own.t() * ones.t(), own.sum):
        loans.counts.wholes = 0
        call()
        use_others([own, own, *(loans.lent(number) for number in (1, 2, 3))])
        assert loans.counts.wholes > 0


def test_zeros_checksums_and_shared_memory_are_told_without_a_whole(mesh: DeviceMesh) -> None:
    (own, ones, *_), loans = lent(mesh)
    assert torch.equal(nonzero(own), VALUES[0] != 0)
    assert torch.equal(nonzero(own.t()[1:]), VALUES[0].t()[1:] != 0)
    assert torch.equal(nonzero(VALUES[0]), VALUES[0] != 0)
    before = asked(own, checksum)
    assert share_memory(own, own.t())
    assert not share_memory(own, ones)
    assert not share_memory(own, VALUES[0])
    assert fills_its_memory(own)
    assert not fills_its_memory(own[1:])
    assert loans.counts.wholes == 0
    assert before == asked(VALUES[0], checksum)
    own[0, 0] += 1
    assert before != asked(own, checksum)
