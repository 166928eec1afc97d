"""Every operator that the channel analysis knows, between two layers: what is dead goes, or stays as the table says."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._ops import OpOverload, OpOverloadPacket

import fxprune
from fxprune.channels import analyze, remove
from fxprune.channels.registry import REGISTRY
from tests.fxprune.channels.exactness import EXACT, error
from tests.fxprune.channels.operator_samples import (
    ARITHMETIC,
    CHANNELS,
    CREATION,
    DEAD,
    FLAG,
    SAMPLES,
    SHAPES,
    SIZE,
    UNREACHED,
    VALUE,
    Sample,
)

INPUTS = {
    "image": (3, 6, 6), "sequence": (3, 6), "volume": (3, 4, 4, 4), "tokens": (6, 3), "matrix": (3,)
}  # fmt: skip
LAYERS: dict[str, Any] = {
    "image": lambda n, m: nn.Conv2d(n, m, 1), "sequence": lambda n, m: nn.Conv1d(n, m, 1),
    "volume": lambda n, m: nn.Conv3d(n, m, 1), "tokens": nn.Linear, "matrix": nn.Linear,
}  # fmt: skip


class Between(nn.Module):
    """A layer with dead rows, the sample's operator, and a layer that reads what it gives."""

    def __init__(self, sample: Sample) -> None:
        super().__init__()
        self.call = sample.call
        self.first = LAYERS[sample.over](3, 8)
        with torch.no_grad():
            self.first.weight[list(DEAD)] = 0
            self.first.bias[list(DEAD)] = 0
        self.count = len(sample.parameters)
        for i, build in enumerate(sample.parameters):
            value = build()
            if isinstance(value, nn.Module | nn.Parameter):
                setattr(self, f"own{i}", value)
            else:
                self.register_buffer(f"own{i}", value)
        self.double().eval()
        with torch.no_grad():
            width = self.middle(torch.randn(2, *INPUTS[sample.over]).double()).shape[CHANNELS[sample.over]]
        self.last = LAYERS[sample.over](width, 2).double()

    def middle(self, x: Tensor) -> Tensor:
        return self.call(self.first(x), *(getattr(self, f"own{i}") for i in range(self.count)))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.middle(x))


def label(target: Any) -> str:
    """The name of an operator or of a Python function: an overload's has its own after a dot."""
    packet = getattr(target, "overloadpacket", None)
    return str(target.__name__) if packet is None else f"{packet.__name__}.{target._overloadname}"


def captured(sample: Sample, free: bool = False) -> tuple[Between, fxprune.TracedModule]:
    model = Between(sample)
    x = torch.randn(2, *INPUTS[sample.over]).double()
    return model, fxprune.trace(model, (x,), modes=("eval",), dynamic_shapes="batch" if free else None)


def names(traced: fxprune.TracedModule) -> set[str]:
    """The names of the called operators, with and without their overload."""
    labels = {label(node.target) for node in traced.graph.nodes if node.op == "call_function"}
    return labels | {name.partition(".")[0] for name in labels}


def assert_kept(model: Between, traced: fxprune.TracedModule, sample: Sample, free: bool = False) -> None:
    plan = remove(traced, analyze(traced, align=1))
    assert len(plan.kept["first.weight"][0]) == sample.kept, plan.explain()
    assert_same(model, traced, sample, free)


def assert_same(model: Between, traced: fxprune.TracedModule, sample: Sample, free: bool) -> None:
    for batch in (1, 3) if free else (2,):
        x = torch.randn(batch, *INPUTS[sample.over]).double()
        with torch.no_grad():
            assert error(model(x), traced(x)) < EXACT


def assert_same_with_constants(model: Between, traced: fxprune.TracedModule, sample: Sample, free: bool) -> None:
    """Nothing that a rule takes for constant changes, however much or little goes."""
    with torch.no_grad():
        for bias in (model.first.bias, traced.get_parameter("first.bias")):
            bias[list(DEAD)] = torch.tensor([0.5, -1.25, 2.0, 0.75]).double()
    remove(traced, analyze(traced, align=1))
    assert_same(model, traced, sample, free)


# a free batch is written among the arguments of those that take sizes; for the others it is tried with the slow tests
FREE = [name for name, sample in SAMPLES.items() if sample.free]
SIZED = {*CREATION, *SHAPES}.intersection(FREE)
CASES = [
    *((name, name in SIZED) for name in SAMPLES),
    *(pytest.param(name, True, marks=pytest.mark.slow) for name in FREE if name not in SIZED),
]


@pytest.mark.parametrize(("name", "free"), CASES)
def test_dead_channels_go_through_an_operator_or_are_pinned(name: str, free: bool) -> None:
    model, traced = captured(SAMPLES[name], free)
    assert name in names(traced), f"torch.export wrote {sorted(names(traced))} for the sample of {name}"
    copied = copy.deepcopy(traced)
    assert_kept(model, traced, SAMPLES[name], free)
    assert_same_with_constants(model, copied, SAMPLES[name], free)


@pytest.mark.parametrize("name", ARITHMETIC)
def test_arithmetic_on_sizes_holds_no_channel(name: str) -> None:
    model, traced = captured(Sample(torch.relu))
    target, arguments = ARITHMETIC[name]
    graph = traced.graphs["eval"]
    value = graph.find_nodes(op="placeholder")[0]
    with graph.inserting_before(graph.output_node()):
        size = graph.call_function(torch.ops.aten.sym_size.int, (value, 0))
        flag = graph.call_function(torch.ops.aten.any.default, (value,))
        places = {id(SIZE): size, id(VALUE): value, id(FLAG): flag}

        def placed(argument: Any) -> Any:
            return [placed(a) for a in argument] if isinstance(argument, list) else places.get(id(argument), argument)

        node = graph.call_function(target, tuple(map(placed, arguments)))
    flag.meta["val"] = torch.ops.aten.any.default(value.meta["val"])
    size.meta["val"] = node.meta["val"] = value.meta["val"].shape[0]
    assert label(target).partition(".")[0] == name
    assert_kept(model, traced, Sample(torch.relu))


@pytest.mark.parametrize("name", UNREACHED)
def test_an_operator_that_export_writes_otherwise_stays_unreached(name: str) -> None:
    reason, call = UNREACHED[name]
    assert name not in names(captured(Sample(call))[1]), f"{name} is no longer {reason}; give it a sample"


def test_every_operator_with_a_rule_has_a_sample_or_a_reason() -> None:
    known = {label(target): target for target, _ in REGISTRY}
    functions = {n for n, target in known.items() if not isinstance(target, OpOverload | OpOverloadPacket)}
    told = {name for name, (target, _) in ARITHMETIC.items() if not isinstance(target, OpOverload)}
    assert functions == {*told, "getitem"}
    assert known.keys() - functions - {*SAMPLES, *ARITHMETIC, *UNREACHED} == set()
    assert UNREACHED.keys() <= known.keys()
