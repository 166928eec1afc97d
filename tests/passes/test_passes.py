"""Golden tests of the passes: input and output graphs as text, idempotence, provenance, errors."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import nn

import fxprune
from fxprune.errors import ArgumentError, FinalizeError, PassError, PruningError
from fxprune.graph.text import text
from fxprune.passes import (
    EliminateDeadCode,
    FoldBatchNorm,
    FoldReparametrizations,
    InsertMask,
    InsertMasks,
    InsertSpectralNorm,
    InsertWeightNorm,
    Pass,
    RemoveChannels,
    run_passes,
    visit,
    working_on,
)
from tests.passes.rewrites import assert_golden, assert_rewrites


class Twice(nn.Module):
    """Calls one layer twice, so that an expression is needed for each call."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.head = nn.Linear(3, 2, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.layer(self.layer(x).relu()))


@pytest.fixture(scope="module")
def captured() -> fxprune.TracedModule:
    torch.manual_seed(0)
    return fxprune.trace(Twice(), (torch.randn(2, 3),))


@pytest.fixture
def traced(captured: fxprune.TracedModule) -> fxprune.TracedModule:
    return copy.deepcopy(captured)


def test_capture_gives_the_golden_graphs(traced: fxprune.TracedModule) -> None:
    assert_golden(traced, "capture")


def test_a_mask_is_multiplied_at_each_call_of_the_layer(traced: fxprune.TracedModule) -> None:
    mask = torch.tensor([[1.0, 0, 1], [0, 1, 1], [1, 1, 0]])
    x = torch.randn(2, 3)
    assert_rewrites(traced, InsertMask("layer.weight", mask), "insert-mask")
    assert not InsertMask("layer.weight", mask)(traced).modified
    assert InsertMask("layer.weight", 1 - mask)(traced).modified
    layer = traced.get_submodule("layer")
    weight = ((1 - mask) * layer.weight_orig).T
    want = (x @ weight + layer.bias).relu() @ weight + layer.bias
    torch.testing.assert_close(traced(x), want @ traced.get_submodule("head").weight.T)


def test_weight_norm_is_computed_at_each_call_of_the_layer(traced: fxprune.TracedModule) -> None:
    assert_rewrites(traced, InsertWeightNorm("layer.weight"), "insert-weight-norm")
    with pytest.raises(PruningError, match="no parameter"):
        InsertWeightNorm("layer.weight")(traced)


def test_spectral_norm_writes_its_buffers_by_nodes_of_the_train_graph_alone(traced: fxprune.TracedModule) -> None:
    assert_rewrites(traced, InsertSpectralNorm("head.weight"), "insert-spectral-norm")
    buffers = {"head.parametrizations.weight.0._u", "head.parametrizations.weight.0._v"}
    for mode, graph in traced.graphs.items():
        written = {str(n.kwargs["out"].target) for n in graph.nodes if "out" in n.kwargs}
        assert written == (buffers if mode == "train" else set())


def test_folding_gives_back_the_captured_graphs(traced: fxprune.TracedModule) -> None:
    x = torch.randn(2, 3)
    InsertMask("layer.bias", torch.tensor([1.0, 0, 1]))(traced)
    InsertWeightNorm("layer.weight", dim=1)(traced)
    InsertSpectralNorm("head.weight")(traced)
    InsertMask("head.parametrizations.weight.original", torch.tensor([[1.0, 0, 1], [0, 1, 1]]))(traced)
    want = traced.eval()(x)
    assert FoldReparametrizations()(traced).modified
    assert torch.equal(traced(x), want)
    assert not FoldReparametrizations()(traced).modified
    operators = [[n.target for n in g.nodes if n.op == "call_function"] for g in traced.graphs.values()]
    aten = torch.ops.aten
    assert operators == [[aten.linear.default, aten.relu.default, aten.linear.default, aten.linear.default]] * 2


def test_a_mask_multiplies_what_a_norm_computes_at_each_of_its_calls(traced: fxprune.TracedModule) -> None:
    InsertSpectralNorm("layer.weight")(traced)
    assert_rewrites(traced, InsertMask("layer.weight", torch.eye(3)), "insert-mask-over-spectral-norm")
    assert not InsertMask("layer.weight", torch.eye(3))(traced).modified
    for graph in traced.graphs.values():
        marked = [node.meta["fxprune"] for node in graph.nodes if "fxprune" in node.meta]
        assert marked == [{"pass": "insert-mask", "parameter": "layer.weight"}] * 2


def test_folding_under_masks_leaves_the_masks_alone(traced: fxprune.TracedModule) -> None:
    x = torch.randn(2, 3)
    InsertWeightNorm("layer.weight")(traced)
    InsertMask("layer.parametrizations.weight.original1", torch.ones(3, 3).triu())(traced)
    InsertMask("layer.weight", torch.eye(3))(traced)
    InsertMask("head.weight", torch.ones(2, 3))(traced)
    want = traced.eval()(x)
    assert FoldReparametrizations(keep_masks=True)(traced).modified
    assert torch.equal(traced(x), want)
    assert set(traced.state_dict()) == {
        "layer.bias", "layer.weight_orig", "layer.weight_mask", "head.weight_orig", "head.weight_mask",
    }  # fmt: skip
    assert not FoldReparametrizations(keep_masks=True)(traced).modified
    assert FoldReparametrizations()(traced).modified
    assert torch.equal(traced(x), want)


def test_folding_one_name_leaves_the_others(traced: fxprune.TracedModule) -> None:
    InsertMask("layer.weight", torch.ones(3, 3))(traced)
    InsertMask("head.weight", torch.ones(2, 3))(traced)
    FoldReparametrizations(("layer.weight",))(traced)
    assert list(traced.state_dict()) == ["layer.weight", "layer.bias", "head.weight_orig", "head.weight_mask"]


def test_an_expression_of_an_input_is_not_folded(traced: fxprune.TracedModule) -> None:
    graph = traced.graphs["eval"]
    node = next(n for n in graph.nodes if n.target is torch.ops.aten.relu.default)
    node.meta["fxprune"] = {"pass": "test", "parameter": "layer.weight"}
    with pytest.raises(FinalizeError, match="depends on `x`"):
        FoldReparametrizations()(traced)


def test_dead_code_goes_and_writes_stay(traced: fxprune.TracedModule) -> None:
    graph = traced.graphs["train"]
    bias = next(n for n in graph.nodes if n.target == "layer.bias")
    with graph.inserting_before(next(iter(graph.find_nodes(op="output")))):
        graph.call_function(torch.ops.aten.neg.default, (bias,))
        graph.call_function(torch.ops.aten.add_.Tensor, (bias, 1))
        graph.call_function(torch.ops.aten.dropout.default, (bias, 0.5, True))
        graph.call_function(torch.ops.aten.feature_dropout.default, (bias, 0.5, False))  # which draws nothing
    assert EliminateDeadCode()(traced).modified
    targets = [n.target for n in graph.nodes]
    assert torch.ops.aten.neg.default not in targets
    assert torch.ops.aten.feature_dropout.default not in targets
    assert torch.ops.aten.dropout.default in targets
    assert torch.ops.aten.add_.Tensor in targets
    assert not EliminateDeadCode()(traced).modified


def test_inserted_nodes_name_their_pass_and_parameter(traced: fxprune.TracedModule) -> None:
    InsertMask("head.weight", torch.ones(2, 3))(traced)
    for graph in traced.graphs.values():
        (node,) = [n for n in graph.nodes if "fxprune" in n.meta]
        assert node.meta["fxprune"] == {"pass": "insert-mask", "parameter": "head.weight"}
        assert "val" in node.meta


def test_the_callback_sees_every_pass_in_order(traced: fxprune.TracedModule) -> None:
    seen = []
    pipeline = (InsertMask("head.weight", torch.ones(2, 3)), EliminateDeadCode())
    result = run_passes(traced, pipeline, lambda step, module, modified, seconds: seen.append((step.name, modified)))
    assert seen == [("insert-mask", True), ("eliminate-dead-code", False)]
    assert result.modified
    assert result.graph_module is traced


class Normed(nn.Module):
    """A layer with a batch norm, and one whose masked rows are dead."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm, self.head = nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.layer(x)))


@pytest.fixture(scope="module")
def normed_capture() -> fxprune.TracedModule:
    torch.manual_seed(0)
    return fxprune.trace(Normed().eval(), (torch.randn(2, 3),))


@pytest.fixture
def normed(normed_capture: fxprune.TracedModule) -> fxprune.TracedModule:
    return copy.deepcopy(normed_capture)


def _dead_node(traced: fxprune.TracedModule) -> None:
    for graph in traced.graphs.values():
        with graph.inserting_before(graph.output_node()):
            graph.call_function(torch.ops.aten.neg.default, (graph.output_node().args[0][0],))


def _dead_row(traced: fxprune.TracedModule) -> None:
    with torch.no_grad():
        for name in ("layer.weight", "layer.bias"):
            traced.get_parameter(name)[1] = 0


def _masked(traced: fxprune.TracedModule) -> None:
    InsertMask("layer.weight", torch.ones(4, 3))(traced)


def _contents(traced: fxprune.TracedModule) -> tuple[str, dict[str, list[float]]]:
    graphs = "".join(f"{mode}:\n{text(graph)}" for mode, graph in sorted(traced.graphs.items()))
    return graphs, {name: value.tolist() for name, value in traced.state_dict().items()}


REPEATABLE = {
    "masks": (lambda traced: None, InsertMasks({"layer.weight": torch.eye(4, 3), "head.bias": torch.ones(2)})),
    "new values of a mask": (_masked, InsertMask("layer.weight", torch.eye(4, 3))),
    "fold": (_masked, FoldReparametrizations()),
    "fold by name": (_masked, FoldReparametrizations(("layer.weight",))),
    "dead code": (_dead_node, EliminateDeadCode()),
    "batch norm": (lambda traced: None, FoldBatchNorm()),
    "channels": (_dead_row, RemoveChannels(align=1)),
}


@pytest.mark.parametrize("case", REPEATABLE)
def test_a_pass_says_whether_it_changed_anything(normed: fxprune.TracedModule, case: str) -> None:
    prepare, step = REPEATABLE[case]
    prepare(normed)
    before = _contents(normed)
    assert step(normed).modified
    after = _contents(normed)
    assert before != after
    assert not step(normed).modified
    assert _contents(normed) == after


@pytest.mark.parametrize("step", [InsertWeightNorm("layer.weight"), InsertSpectralNorm("layer.weight")])
def test_a_norm_is_a_change_and_is_not_inserted_twice(normed: fxprune.TracedModule, step: Pass) -> None:
    assert step(normed).modified
    after = _contents(normed)
    with pytest.raises(PruningError, match="no parameter"):
        step(normed)
    assert _contents(normed) == after


@dataclass(frozen=True)
class _Failing(Pass):
    name: ClassVar[str] = "failing"

    def run(self, traced: fxprune.TracedModule) -> bool:
        for node in visit(traced.graph):
            if node.op == "call_function":
                raise KeyError("lost")
        return False


@dataclass(frozen=True)
class _FailingAtOneNode(Pass):
    name: ClassVar[str] = "failing"

    def run(self, traced: fxprune.TracedModule) -> bool:
        for node in traced.graph.nodes:
            with working_on(node):
                if node.op == "call_function":
                    raise KeyError("lost")
        return False


@dataclass(frozen=True)
class _FailingAtNoNode(Pass):
    name: ClassVar[str] = "failing"

    def run(self, traced: fxprune.TracedModule) -> bool:
        assert list(visit(traced.graph))
        raise KeyError("lost")


@pytest.mark.parametrize("step", [_Failing(), _FailingAtOneNode()])
def test_an_error_in_a_pass_names_the_pass_those_before_it_and_the_node(
    traced: fxprune.TracedModule, step: Pass
) -> None:
    with pytest.raises(PassError, match=r"'failing' \(before it: eliminate-dead-code\), at node `linear` .*KeyError"):
        run_passes(traced, (EliminateDeadCode(), step))


def test_an_error_outside_of_any_node_names_none_of_an_earlier_pass(traced: fxprune.TracedModule) -> None:
    with pytest.raises(PassError):
        run_passes(traced, (_Failing(),))
    with pytest.raises(PassError, match=r"in pass 'failing'[^`]*: KeyError"):
        run_passes(traced, (_FailingAtNoNode(),))


def _wrong_statistics(traced: fxprune.TracedModule) -> None:
    traced.get_submodule("norm").running_var = torch.ones(4, device="meta")


def _wrong_mask(traced: fxprune.TracedModule) -> None:
    InsertMask("layer.weight", torch.ones(4, 3))(traced)
    traced.get_submodule("layer").weight_mask = torch.ones(7)


def _other_stacks(traced: fxprune.TracedModule) -> None:
    for graph in traced.graphs.values():
        for node in graph.nodes:
            node.meta["nn_module_stack"] = {"call": ("layer",)}  # without the class, which torch.export notes


def _call_of_nothing(traced: fxprune.TracedModule) -> None:
    _dead_node(traced)
    for graph in traced.graphs.values():
        node = graph.output_node().prev
        node.op, node.target = "call_module", "nowhere"


BROKEN = {
    "eliminate-dead-code": (_call_of_nothing, EliminateDeadCode(), "neg_default"),
    "insert-mask": (_other_stacks, InsertMask("layer.weight", torch.ones(4, 3)), "linear"),
    "insert-weight-norm": (_other_stacks, InsertWeightNorm("layer.weight"), "linear"),
    "insert-spectral-norm": (_other_stacks, InsertSpectralNorm("layer.weight"), "linear"),
    "fold-reparametrizations": (_wrong_mask, FoldReparametrizations(), "mul_tensor"),
    "fold-batch-norm": (_wrong_statistics, FoldBatchNorm(), "batch_norm"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_an_error_in_each_pass_names_the_node_it_worked_on(normed: fxprune.TracedModule, name: str) -> None:
    break_it, step, node = BROKEN[name]
    break_it(normed)
    message = rf"in pass '{name}' \(before it: nothing\), at node `{node}` \(.*\): [A-Z]\w+Error: "
    with pytest.raises(PassError, match=message):
        run_passes(normed, (_Nothing(), step))


@dataclass(frozen=True)
class _Nothing(Pass):
    name: ClassVar[str] = "nothing"

    def run(self, traced: fxprune.TracedModule) -> bool:
        return False


def test_a_refusal_inside_a_pipeline_keeps_its_class_and_gains_a_note(traced: fxprune.TracedModule) -> None:
    with pytest.raises(PruningError) as caught:
        run_passes(traced, (EliminateDeadCode(), InsertMask("head.weight", torch.ones(1))))
    assert "in pass 'insert-mask' (before it: eliminate-dead-code)" in caught.value.__notes__[0]


def test_a_refusal_at_a_node_notes_the_node(traced: fxprune.TracedModule) -> None:
    graph = traced.graphs["eval"]
    node = next(n for n in graph.nodes if n.target is torch.ops.aten.relu.default)
    node.meta["fxprune"] = {"pass": "test", "parameter": "layer.weight"}
    with pytest.raises(FinalizeError) as caught:
        FoldReparametrizations()(traced)
    (note,) = caught.value.__notes__
    assert note.startswith("in pass 'fold-reparametrizations' (before it: none), at node `relu` (aten.relu.default")


def test_one_mask_that_does_not_fit_inserts_none(traced: fxprune.TracedModule) -> None:
    before = _contents(traced)
    with pytest.raises(PruningError, match="'head.weight'"):
        InsertMasks({"layer.weight": torch.ones(3, 3), "head.weight": torch.ones(1)})(traced)
    assert _contents(traced) == before


def test_what_passes_before_an_error_did_stays_and_runs(traced: fxprune.TracedModule) -> None:
    x = torch.randn(2, 3)
    want = traced(x)
    with pytest.raises(PassError):
        run_passes(traced, (InsertMask("head.weight", torch.ones(2, 3)), _Failing()))
    assert torch.equal(traced(x), want)
    assert "head_weight_mask" in traced.code


@dataclass(frozen=True)
class _Checked(Pass):
    """Negates what the head gives; its conditions see the module before and the result."""

    given: fxprune.TracedModule
    allowed: bool = True
    name: ClassVar[str] = "negate"
    in_place: ClassVar[bool] = False

    def requires(self, traced: fxprune.TracedModule) -> None:
        assert traced is self.given
        if not self.allowed:
            raise ArgumentError("not allowed")

    def run(self, traced: fxprune.TracedModule) -> bool:
        with torch.no_grad():
            traced.get_parameter("head.weight").neg_()
        return True

    def ensures(self, traced: fxprune.TracedModule) -> None:
        assert torch.equal(traced.get_parameter("head.weight"), -self.given.get_parameter("head.weight"))


def test_a_pass_that_is_not_in_place_leaves_its_argument_and_gives_a_copy(traced: fxprune.TracedModule) -> None:
    x, before = torch.randn(2, 3), _contents(traced)
    result = run_passes(traced, (_Checked(traced), EliminateDeadCode()))
    assert result.modified
    assert result.graph_module is not traced
    assert _contents(traced) == before
    assert torch.equal(result.graph_module(x), -traced(x))


def test_a_pass_does_not_run_where_its_requirement_fails(traced: fxprune.TracedModule) -> None:
    before = _contents(traced)
    with pytest.raises(ArgumentError, match="not allowed"):
        _Checked(traced, allowed=False)(traced)
    assert _contents(traced) == before


@dataclass(frozen=True)
class _Idle(_Checked):
    name: ClassVar[str] = "idle"

    def run(self, traced: fxprune.TracedModule) -> bool:
        return True


def test_a_result_that_is_not_what_a_pass_ensures_is_an_error(traced: fxprune.TracedModule) -> None:
    with pytest.raises(PassError, match=r"in pass 'idle' \(before it: none\): AssertionError"):
        _Idle(traced)(traced)


@pytest.mark.parametrize("taken", ["weight_mask", "weight_orig"])
def test_a_mask_does_not_replace_what_the_model_has_under_its_name(taken: str) -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)
            self.layer.register_buffer(taken, torch.full((3,), 7.0))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x) + getattr(self.layer, taken)

    model, x = Own(), torch.randn(2, 3)
    traced = fxprune.trace(model, (x,))
    with pytest.raises(PruningError, match=f"would replace layer.{taken}"):
        fxprune.prune.l1_unstructured(traced, "layer.weight", amount=2)
    assert torch.equal(traced(x), model(x))
