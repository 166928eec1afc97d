"""`fxprune.prune` on traced modules: names, patterns, refusals, and what an error leaves behind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch.nn.utils import prune

import fxprune
from fxprune.errors import (
    ArgumentError,
    ArgumentTypeError,
    FxpruneError,
    NameLookupError,
    NonFiniteWarning,
    PruningError,
)


def _snapshot(traced: fxprune.TracedModule) -> tuple[str, list[tuple[str, torch.Tensor]]]:
    code = "".join(str(graph) for graph in traced.graphs.values())
    return code, [(k, v.clone()) for k, v in traced.state_dict().items()]


def _same(left: Any, right: Any) -> bool:
    pairs = zip(left[1], right[1], strict=True)
    return left[0] == right[0] and all(a == b and torch.equal(s, t) for (a, s), (b, t) in pairs)


def test_a_pattern_prunes_each_matching_parameter_by_itself(traced: fxprune.TracedModule) -> None:
    fxprune.prune.l1_unstructured(traced, "*.weight", amount=0.5)
    for name in ("stem.weight", "norm.weight", "inner.weight", "inner_norm.weight", "head.weight"):
        mask = traced.state_dict()[name + "_mask"]
        assert int((mask == 0).sum()) == round(0.5 * mask.numel())
        assert fxprune.prune.is_pruned(traced, name)
    assert not fxprune.prune.is_pruned(traced, "head.bias")


def test_remove_keeps_the_parameter_object_and_the_order_of_the_unpruned_model(traced: fxprune.TracedModule) -> None:
    order = [name for name, _ in traced.named_parameters()]
    parameter = traced.get_submodule("stem").weight
    x = torch.randn(3, 3, 6, 6)
    fxprune.prune.ln_structured(traced, "stem.weight", amount=3, n=2, dim=0)
    want = traced.eval()(x)
    assert fxprune.prune.remove(traced, "stem.weight") is traced
    assert traced.get_submodule("stem").weight is parameter
    assert torch.equal(traced(x), want)
    assert [name for name, _ in traced.named_parameters()] == order
    assert not fxprune.prune.is_pruned(traced)


def test_remove_under_a_tie_leaves_the_other_use_alone() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    traced = fxprune.trace(model, (torch.randn(2, 3),))
    fxprune.prune.l1_unstructured(traced, "1.weight", amount=4)
    x = torch.randn(4, 3)
    want = traced(x)
    for other in (fxprune.finalize(traced), fxprune.prune.remove(traced, "1.weight")):
        assert torch.equal(other(x), want)
        assert (other.state_dict()["0.weight"] != 0).all()
        assert (other.state_dict()["1.weight"] == 0).sum() == 4


BAD: dict[str, tuple[Callable[[fxprune.TracedModule], Any], type[Exception], str]] = {
    "unknown name": (
        lambda t: fxprune.prune.l1_unstructured(t, "stm.weight", 0.5),
        NameLookupError,
        r"'stm\.weight'.*'stem\.weight'",
    ),
    "suffix of several names": (
        lambda t: fxprune.prune.l1_unstructured(t, "weight", 0.5),
        NameLookupError,
        "stem.weight.*head.weight",
    ),
    "module instead of parameter": (
        lambda t: fxprune.prune.l1_unstructured(t, "stem", 0.5),
        NameLookupError,
        "'stem.weight', 'stem.bias'",
    ),
    "several where one is needed": (lambda t: fxprune.prune.is_pruned(t, "*.bias"), NameLookupError, "ambiguous"),
    "no string": (lambda t: fxprune.prune.l1_unstructured(t, 3, 0.5), NameLookupError, "int"),
    "the original of one without a mask": (
        lambda t: fxprune.prune.l1_unstructured(t, "head.weight_orig", 0.5),
        NameLookupError,
        "no such name",
    ),
    "amount above one": (lambda t: fxprune.prune.l1_unstructured(t, "stem.weight", 1.5), ArgumentError, "1.5"),
    "negative amount": (lambda t: fxprune.prune.l1_unstructured(t, "stem.weight", -2), ArgumentError, "-2"),
    "amount of no number": (
        lambda t: fxprune.prune.l1_unstructured(t, "stem.weight", "half"),
        ArgumentTypeError,
        "half",
    ),
    "more than there is": (
        lambda t: fxprune.prune.l1_unstructured(t, "head.bias", 20),
        PruningError,
        r"'head.bias' of shape .*smaller than",
    ),
    "mask of a wrong shape": (
        lambda t: fxprune.prune.custom_from_mask(t, "head.weight", torch.ones(8, 5)),
        PruningError,
        r"head\.weight",
    ),
    "scores of a wrong shape": (
        lambda t: fxprune.prune.l1_unstructured(t, "head.weight", 1, torch.ones(2)),
        PruningError,
        r"\(2,\).*\(5, 8\)",
    ),
    "structured on one axis": (
        lambda t: fxprune.prune.ln_structured(t, "head.bias", 1, 2, 0),
        PruningError,
        "multidimensional",
    ),
    "dimension out of range": (
        lambda t: fxprune.prune.ln_structured(t, "head.weight", 1, 2, 5),
        PruningError,
        "Invalid index",
    ),
    "class instead of object": (
        lambda t: fxprune.prune.apply(t, "head.weight", prune.L1Unstructured),
        ArgumentTypeError,
        "class L1Unstructured",
    ),
    "remove without mask": (lambda t: fxprune.prune.remove(t, "head.weight"), PruningError, "no mask"),
    "structured globally": (
        lambda t: fxprune.prune.global_unstructured(t, ["head.weight"], prune.LnStructured, amount=1, n=2),
        ArgumentTypeError,
        "structured",
    ),
    "nothing globally": (
        lambda t: fxprune.prune.global_unstructured(t, iter(()), prune.L1Unstructured, amount=1),
        ArgumentError,
        "no names",
    ),
    "scores for another name": (
        lambda t: fxprune.prune.global_unstructured(
            t, ["head.weight"], prune.L1Unstructured, {"stem.weight": torch.ones(1)}, amount=1
        ),
        NameLookupError,
        "stem.weight",
    ),
    "no traced module": (lambda t: fxprune.prune.identity(nn.Linear(2, 2), "weight"), ArgumentTypeError, "trace first"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_requests_are_refused_and_change_nothing(traced: fxprune.TracedModule, case: str) -> None:
    request, error, message = BAD[case]
    fxprune.prune.l1_unstructured(traced, "inner.weight", 0.5)
    before = _snapshot(traced)
    with pytest.raises(error, match=message) as caught:
        request(traced)
    assert isinstance(caught.value, FxpruneError)
    assert _same(before, _snapshot(traced))


def test_a_failing_second_prune_keeps_the_first_mask(traced: fxprune.TracedModule) -> None:
    fxprune.prune.l1_unstructured(traced, "head.weight", 30)
    before = _snapshot(traced)
    with pytest.raises(PruningError, match="smaller than"):
        fxprune.prune.l1_unstructured(traced, "head.weight", 11)
    assert _same(before, _snapshot(traced))
    assert fxprune.prune.is_pruned(traced, "head.weight")


def test_a_failure_on_the_last_of_several_names_masks_none(traced: fxprune.TracedModule) -> None:
    before = _snapshot(traced)
    with pytest.raises(PruningError):
        fxprune.prune.l1_unstructured(traced, "*", amount=6)
    assert _same(before, _snapshot(traced))


def test_a_method_that_returns_no_mask_is_refused(traced: fxprune.TracedModule) -> None:
    class Broken(prune.BasePruningMethod):
        PRUNING_TYPE = "unstructured"

        def compute_mask(self, t: torch.Tensor, default_mask: torch.Tensor) -> torch.Tensor:
            return default_mask[:1]

    with pytest.raises(PruningError, match="head.weight"):
        fxprune.prune.apply(traced, "head.weight", Broken())


def test_nan_and_inf_are_carried_through_finalize_with_a_warning_that_names_them(traced: fxprune.TracedModule) -> None:
    with torch.no_grad():
        traced.get_submodule("inner").weight[0, 0, 0, 0] = float("nan")
    fxprune.prune.l1_unstructured(traced, "head.weight", 0.5)
    with pytest.warns(NonFiniteWarning, match="inner.weight"):
        final = fxprune.finalize(traced)
    assert final.get_submodule("inner").weight.isnan().sum() == 1


def test_finalize_leaves_its_argument_usable_and_shares_nothing_with_it(traced: fxprune.TracedModule) -> None:
    fxprune.prune.l1_unstructured(traced, "*.weight", 0.5)
    before = _snapshot(traced)
    final = fxprune.finalize(traced)
    with torch.no_grad():
        for parameter in final.parameters():
            parameter.add_(1)
    assert _same(before, _snapshot(traced))
    assert fxprune.prune.is_pruned(traced)
    assert not fxprune.prune.is_pruned(final)


def test_a_finalized_model_trains_and_can_be_traced_and_pruned_again(traced: fxprune.TracedModule) -> None:
    fxprune.prune.l1_unstructured(traced, "*.weight", 0.5)
    final = fxprune.finalize(traced)
    optimizer = torch.optim.SGD(final.parameters(), 0.1)
    x = torch.randn(4, 3, 6, 6)
    before = final.get_submodule("head").weight.detach().clone()
    final.train()(x).square().mean().backward()
    optimizer.step()
    assert not torch.equal(before, final.get_submodule("head").weight)
    again = fxprune.trace(final, (x,))
    fxprune.prune.l1_unstructured(again, "head.weight", 0.5)
    assert torch.equal(fxprune.finalize(again).eval()(x), again.eval()(x))


def test_many_parameters_are_masked_and_unmasked_by_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    traced = fxprune.trace(nn.Sequential(*(nn.Linear(4, 4) for _ in range(6))), (torch.randn(2, 4),))
    checked: list[fx.Graph] = []
    lint = fx.Graph.lint
    monkeypatch.setattr(fx.Graph, "lint", lambda graph: (checked.append(graph), lint(graph))[1])
    fxprune.prune.l1_unstructured(traced, "*.weight", 0.5)
    assert checked == list(traced.graphs.values())
    fxprune.prune.remove(traced, "*.weight")
    assert checked == 2 * list(traced.graphs.values())
    assert not fxprune.prune.is_pruned(traced)
