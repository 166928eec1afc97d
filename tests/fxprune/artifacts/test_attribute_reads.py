"""Reads of attributes are recorded inside a block, for the modules of one model; nn.Module is as before afterwards."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor, nn

from fxprune.artifacts.attribute_reads import recorded_reads


class Sizes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.width, self.shape, self.unread, self.label = 4, (2, 2), 7, "x"

    def forward(self, x: Tensor) -> Tensor:
        return x.view(-1, *self.shape) if self.label else x.view(-1, self.width)


def test_integers_tuples_and_lists_that_forward_reads_are_recorded() -> None:
    model, other = nn.Sequential(Sizes()), Sizes()
    with recorded_reads(model) as reads:
        model(torch.ones(1, 4))
        other(torch.ones(1, 4))
    own = {name for module, name in reads if module is model[0]}
    assert "shape" in own
    assert own.isdisjoint({"unread", "label", "width"})
    assert not any(module is other for module, _ in reads)


def test_the_class_is_as_before_after_an_error() -> None:
    before = nn.Module.__getattribute__
    with pytest.raises(ZeroDivisionError), recorded_reads(nn.Identity()):
        assert nn.Module.__getattribute__ is not before
        raise ZeroDivisionError
    assert nn.Module.__getattribute__ is before
    assert "__getattribute__" not in vars(nn.Module)


def test_other_threads_work_and_wait_for_their_turn() -> None:
    model, other = Sizes(), Sizes()
    entered, found = threading.Event(), []

    def second() -> None:
        assert other(torch.ones(1, 4)).shape == (1, 2, 2)  # works while the class is patched
        entered.set()
        with recorded_reads(other) as reads:
            other(torch.ones(1, 4))
        found.append({name for _, name in reads} & {"shape", "width"})

    thread = threading.Thread(target=second)
    with recorded_reads(model) as reads:
        thread.start()
        assert entered.wait(10)
        thread.join(0.2)
        assert thread.is_alive()  # waits for this block to end
        model(torch.ones(1, 4))
    thread.join(10)
    assert found == [{"shape"}]
    assert {module for module, _ in reads} == {model}
    assert "__getattribute__" not in vars(nn.Module)
