"""What is changed for a capture is put back, whether it succeeds or not, and captures do not disturb each other."""

from __future__ import annotations

import logging
import random
import sys
import threading
from collections import OrderedDict, defaultdict
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import fxprune
from fxprune.capture import protection
from fxprune.errors import CaptureError
from fxprune.torch_internals import LOGGERS_OF_FAILED_CAPTURES


class Tied(nn.Module):
    """Two layers over one weight, and attributes of several kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
        self.second.weight = self.first.weight
        self.calls: list[int] = []
        self.cache: dict[str, Any] = {"size": 1}
        self.last: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls.append(1)
        self.cache["size"] = 2
        return self.second(self.first(x).relu())


class Branches(nn.Module):
    """Branches on a value, which no capture can follow."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.LSTM(2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        values, _ = self.layer(x)
        return values if values.sum() > 0 else -values


def test_attributes_and_their_entries_come_back() -> None:
    model = Tied()
    calls, before = model.calls, dict(vars(model))
    with pytest.raises(ZeroDivisionError), protection.attributes_kept(model):
        model(torch.randn(3, 2))
        model.extra, model.last = 1, torch.ones(1)  # type: ignore[assignment]
        model.cache.clear()
        model.first.register_buffer("found", torch.ones(1))
        del model.calls
        raise ZeroDivisionError
    assert vars(model).keys() == before.keys()
    assert model.calls is calls
    assert calls == []
    assert model.cache == {"size": 1}
    assert model.last is None
    assert "found" not in model.first._buffers


class Frozen(OrderedDict):  # type: ignore[type-arg]
    """A configuration that refuses to be copied and changed, and counts no entry read through it."""

    def refuse(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("a frozen dictionary was used")

    __copy__ = __deepcopy__ = __reduce_ex__ = clear = update = pop = setdefault = refuse
    __setitem__ = __delitem__ = __getitem__ = __eq__ = __len__ = items = keys = values = refuse


class FrozenList(list):  # type: ignore[type-arg]
    """A list that refuses all changes."""

    def refuse(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("a frozen list was used")

    __copy__ = __reduce_ex__ = __iter__ = __len__ = clear = extend = append = refuse


class FrozenSet(set):  # type: ignore[type-arg]
    """A set that refuses all changes."""

    def refuse(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("a frozen set was used")

    __copy__ = __reduce_ex__ = __iter__ = __len__ = clear = update = add = refuse


class Configured(nn.Linear):
    """A layer with strict attributes."""

    def __init__(self) -> None:
        super().__init__(3, 2)
        self.settings, self.names, self.kinds = Frozen(), FrozenList(), FrozenSet()
        OrderedDict.__setitem__(self.settings, "width", 2)
        OrderedDict.__setitem__(self.settings, "act", "relu")
        list.append(self.names, "a")
        set.add(self.kinds, "b")
        self.counts: defaultdict[str, int] = defaultdict(int, seen=1)


def test_a_model_with_frozen_attributes_is_captured_and_they_stay_the_same() -> None:
    model = Configured()
    before = {name: getattr(model, name) for name in ("settings", "names", "kinds", "counts")}
    x = torch.randn(4, 3)
    traced = fxprune.trace(model, x)
    assert torch.equal(traced(x), model(x))
    assert all(getattr(model, name) is value for name, value in before.items())
    assert list(OrderedDict.keys(model.settings)) == ["width", "act"]
    assert dict.__getitem__(model.settings, "width") == 2
    assert list.__getitem__(model.names, 0) == "a"
    assert set.__contains__(model.kinds, "b")
    assert model.counts == {"seen": 1}
    assert model.counts.default_factory is int


def test_entries_changed_by_base_class_calls_come_back_in_frozen_attributes() -> None:
    model = Configured()
    with protection.attributes_kept(model):
        OrderedDict.__setitem__(model.settings, "extra", 1)
        OrderedDict.move_to_end(model.settings, "width")
        list.append(model.names, "c")
        set.clear(model.kinds)
        model.counts["new"] += 1
    assert list(OrderedDict.keys(model.settings)) == ["width", "act"]
    assert list.__len__(model.names) == 1
    assert set.__contains__(model.kinds, "b")
    assert model.counts == {"seen": 1}


def test_tied_parameters_are_apart_on_the_same_memory_meanwhile() -> None:
    model = Tied()
    weight = model.first.weight
    with protection.untied(model):
        assert model.second.weight is not model.first.weight
        assert model.second.weight.data_ptr() == weight.data_ptr()
        assert model.second.weight.requires_grad
    assert model.second.weight is model.first.weight is weight


def test_reads_of_one_forward_are_counted() -> None:
    layer = parametrizations.weight_norm(nn.Linear(2, 2))
    model = nn.Sequential(layer, layer)
    original = nn.Module.__getattr__
    with protection.counted_reads(model) as reads:
        for _ in range(2):  # a later forward counts anew
            model(torch.randn(3, 2))
            assert nn.Module.__getattr__ is original
            assert reads[id(vars(layer)), "bias"] == 2
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


def test_counting_ends_where_forward_raises() -> None:
    model, original = nn.Sequential(nn.Linear(2, 2)), nn.Module.__getattr__
    with pytest.raises(RuntimeError), protection.counted_reads(model):
        model(torch.randn(3, 5))
    assert nn.Module.__getattr__ is original


def test_generators_come_back_and_draws_are_noticed() -> None:
    states = random.getstate(), str(np.random.get_state())  # noqa: NPY002
    with protection.generators_kept() as drawn:
        assert not drawn()
        np.random.rand()  # noqa: NPY002
        assert drawn()
    with protection.generators_kept() as drawn:
        random.random()
        assert drawn()
    assert states == (random.getstate(), str(np.random.get_state()))  # noqa: NPY002


@pytest.mark.parametrize("succeeds", [True, False])
def test_a_capture_leaves_process_and_model_as_they_were(succeeds: bool) -> None:
    model = (Tied() if succeeds else Branches()).eval()
    attributes = [dict(vars(module)) for module in model.modules()]
    levels = [logging.getLogger(name).level for name in LOGGERS_OF_FAILED_CAPTURES]
    getattribute, stream, generator = nn.Module.__getattr__, sys.stderr, torch.get_rng_state()
    if succeeds:
        fxprune.trace(model, (torch.ones(3, 2),))
    else:
        with pytest.raises(CaptureError):
            fxprune.trace(model, (torch.ones(3, 2),))
    assert nn.Module.__getattr__ is getattribute
    assert sys.stderr is stream
    assert torch.equal(torch.get_rng_state(), generator)
    assert [logging.getLogger(name).level for name in LOGGERS_OF_FAILED_CAPTURES] == levels
    for module, before in zip(model.modules(), attributes, strict=True):
        assert vars(module).keys() == before.keys()
        assert all(vars(module)[name] is value for name, value in before.items())


def test_captures_in_several_threads_wait_for_each_other() -> None:
    models = [nn.Sequential(parametrizations.weight_norm(nn.Linear(2, 3)), nn.BatchNorm1d(3)).eval() for _ in range(4)]
    x, original = torch.randn(5, 2), nn.Module.__getattr__
    found: dict[int, fxprune.TracedModule] = {}

    def capture(i: int) -> None:
        found[i] = fxprune.trace(models[i], (x,))

    threads = [threading.Thread(target=capture, args=(i,)) for i in range(len(models))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert nn.Module.__getattr__ is original
    assert sorted(found) == [0, 1, 2, 3]
    for i, model in enumerate(models):
        assert torch.equal(found[i](x), model(x))


class _Otherwise(nn.Module):
    """Computes the same in other steps while it is exported, or what only an export can hold."""

    def __init__(self, *, free: bool = True) -> None:
        super().__init__()
        self.layer, self.free = nn.Linear(6, 6), free

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_exporting():
            return (self.layer.weight @ x.mT).mT + self.layer.bias
        return self.layer(x) if self.free or x.sum() > 0 else x


class _OfTheSize(nn.Module):
    """Leaves out what does nothing at one size, but for exports, as timm does."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.compiler.is_exporting() and x.shape[1] == 6:
            return x * 2
        return x * 2 + 0 * x.shape[1]


def test_sizes_that_code_leaves_free_in_an_export_stay_free() -> None:
    free = {"x": {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}}
    traced = fxprune.trace(_OfTheSize(), torch.randn(3, 6), dynamic_shapes=free)
    x = torch.randn(2, 8)
    assert torch.equal(traced(x), x * 2)


def test_code_that_does_something_else_in_an_export_is_captured_as_in_eager() -> None:
    x, told = torch.randn(3, 6), torch.compiler.is_exporting
    traced = fxprune.trace(_Otherwise(), x)
    assert torch.compiler.is_exporting is told
    assert [node.target for node in traced.graphs["eval"].nodes if "linear" in str(node.target)]
    captured = fxprune.trace(model := _Otherwise(free=False).eval(), x.abs() + 1, modes=("eval",))
    torch.testing.assert_close(captured(x.abs() + 1), model(x.abs() + 1))
