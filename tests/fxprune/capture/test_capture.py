"""`trace` and `TracedModule`: faithful capture, refusals with reasons, the source model left alone."""

from __future__ import annotations

import copy
import pickle
import random
import re
import warnings
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import nn

import fxprune
from fxprune.errors import (
    ArgumentError,
    ArtifactError,
    BatchSpecializedWarning,
    CaptureError,
    EvalOnlyWarning,
    InputError,
)
from tests.networks import Residual, mlp


@dataclass
class Result:
    logits: torch.Tensor
    count: int = 3


class Pair(NamedTuple):
    left: torch.Tensor
    right: torch.Tensor


class Outputs(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.layer, self.kind = nn.Linear(3, 3), kind

    def forward(self, x: torch.Tensor) -> Any:
        y = self.layer(x)
        match self.kind:
            case "tuple":
                return y, (y * 2, None, 5)
            case "dict":
                return {"y": y, "more": [y + 1, {"z": y - 1}]}
            case "dataclass":
                return Result(y)
            case _:
                return Pair(y, y * 3)


@pytest.mark.parametrize("kind", ["tuple", "dict", "dataclass", "namedtuple"])
def test_nested_outputs_come_back_in_eagers_structure(kind: str) -> None:
    model = Outputs(kind)
    x = torch.randn(4, 3)
    want, got = model(x), fxprune.trace(model, (torch.randn(2, 3),))(x)
    assert type(want) is type(got)
    torch.testing.assert_close(
        want.__dict__ if kind == "dataclass" else want, got.__dict__ if kind == "dataclass" else got, rtol=0, atol=0
    )


def test_hugging_face_outputs_keep_their_class(transformers: Any) -> None:
    config = transformers.BertConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24
    )
    model = transformers.BertModel(config).eval()
    ids = torch.randint(32, (3, 5))
    traced = fxprune.trace(model, kwargs={"input_ids": ids}, modes=("eval",))
    want, got = model(input_ids=ids), traced(input_ids=ids)
    assert type(want) is type(got)
    assert torch.equal(want.last_hidden_state, got.last_hidden_state)
    assert torch.equal(want.pooler_output, got.pooler_output)


class Arguments(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, a: torch.Tensor, b: dict[str, torch.Tensor], *, scale: torch.Tensor, flag: bool = True) -> Any:
        y = self.layer(a) + b["u"] * scale
        return y if flag else -y


def test_positional_nested_and_keyword_inputs_are_taken_as_eager_takes_them() -> None:
    model = Arguments()
    a, u, scale = torch.randn(2, 3), torch.randn(2, 3), torch.randn(3)
    traced = fxprune.trace(model, (a, {"u": u}), {"scale": scale})
    assert torch.equal(model(a, {"u": u}, scale=scale), traced(a, {"u": u}, scale=scale))
    assert torch.equal(model(a=a, b={"u": u}, scale=scale), traced(a=a, b={"u": u}, scale=scale))
    with pytest.raises(InputError, match="captured with"):
        traced(a, {"u": u}, scale=scale, flag=False)
    flagged = fxprune.trace(model, (a, {"u": u}), {"flag": False, "scale": scale})
    assert torch.equal(model(a, {"u": u}, scale=scale, flag=False), flagged(a, {"u": u}, scale=scale, flag=False))
    with pytest.raises(InputError, match="captured|holds for"):
        flagged(a, {"u": u}, scale=scale, flag=True)


def test_parameters_and_buffers_are_the_models_own_objects_and_later_updates_are_seen() -> None:
    model = Residual()
    traced = fxprune.trace(model, (torch.randn(2, 3, 6, 6),))
    assert all(a is b for a, b in zip(model.parameters(), traced.parameters(), strict=True))
    x = torch.randn(3, 3, 6, 6)
    with torch.no_grad():
        model.stem.weight.mul_(2)
        model.norm.running_mean.add_(1)
    assert torch.equal(model.eval()(x), traced.eval()(x))


class Holder(nn.Module):
    """Reads a plain tensor, a non-persistent buffer, a list of tensors, and assigns an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.plain = torch.arange(3.0)
        self.register_buffer("hidden", torch.ones(3), persistent=False)
        self.register_buffer("average", torch.zeros(3))
        self.last: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.layer(x) + self.plain + self.hidden + torch.tensor([1.0, 2.0, 3.0])
        if self.training:
            self.average.mul_(0.9).add_(y.detach().flatten(0, -2).mean(0), alpha=0.1)
        self.last = y
        return y - self.average


def test_plain_tensors_and_hidden_buffers_are_no_part_of_the_state_dict() -> None:
    model = Holder()
    traced = fxprune.trace(model, (torch.randn(2, 3),))
    assert list(traced.state_dict()) == list(model.state_dict())
    twin = copy.deepcopy(model)
    twin_traced = fxprune.trace(twin, (torch.randn(2, 3),))
    for training in (True, False, True):
        x = torch.randn(2, 3)
        assert torch.equal(model.train(training)(x), twin_traced.train(training)(x))
        assert torch.equal(model.average, twin.average)


def test_the_model_its_random_state_and_its_modes_are_left_as_they_were() -> None:
    model = nn.Sequential(Holder(), nn.Dropout(0.5), nn.LSTM(3, 3, batch_first=True))
    model[1].eval()
    torch.nn.utils.prune.l1_unstructured(model[0].layer, "weight", 0.5)
    torch.nn.utils.prune.l1_unstructured(model[2], "weight_hh_l0", 0.5)
    before = [(dict(m.__dict__), dict(m._parameters), dict(m._buffers)) for m in model.modules()]
    flat = list(model[2]._flat_weights)
    modes = [m.training for m in model.modules()]
    random = torch.get_rng_state()
    fxprune.trace(model, (torch.randn(5, 2, 3),))
    random_after = torch.get_rng_state()
    torch.set_rng_state(random)
    torch.randn(5, 2, 3)
    assert torch.equal(random_after, torch.get_rng_state())
    assert modes == [m.training for m in model.modules()]
    for (attributes, parameters, buffers), module in zip(before, model.modules(), strict=True):
        assert attributes.keys() == module.__dict__.keys()
        assert all(module.__dict__[k] is v for k, v in attributes.items())
        assert list(parameters.items()) == list(module._parameters.items())
        assert all(module._buffers[k] is v for k, v in buffers.items())
        assert not module._forward_hooks
    assert all(a is b for a, b in zip(flat, model[2]._flat_weights, strict=True))


def test_root_hooks_are_captured() -> None:
    model = nn.Linear(3, 3)
    model.register_forward_pre_hook(lambda module, args: (args[0] * 3,))
    model.register_forward_hook(lambda module, args, output: output + 1)
    x = torch.randn(2, 3)
    assert torch.equal(model(x), fxprune.trace(model, (x,))(x))


def test_modules_named_by_python_keywords_can_be_captured_copied_and_traced_again() -> None:
    model = nn.ModuleDict({"class": nn.ModuleDict({"lambda": nn.Linear(3, 3)}), "0": nn.Linear(3, 3)})
    model.forward = lambda x: model["0"](model["class"]["lambda"](x))  # type: ignore[method-assign, assignment]
    x = torch.randn(2, 3)
    traced = fxprune.trace(model, (x,))
    for other in (traced, copy.deepcopy(traced), fxprune.trace(traced, (x,))):
        assert torch.equal(model(x), other(x))
    assert list(traced.state_dict()) == list(model.state_dict())


def test_tied_parameters_stay_tied_and_each_name_has_its_own_reads() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    traced = fxprune.trace(model, (torch.randn(2, 3),))
    assert model[1].weight is model[0].weight
    assert traced.get_submodule("1").weight is traced.get_submodule("0").weight
    assert list(traced.state_dict()) == list(model.state_dict())
    assert len(list(traced.parameters())) == len(list(model.parameters()))
    targets = {n.target for n in traced.graph.find_nodes(op="get_attr")}
    assert targets == {"0.weight", "0.bias", "1.weight", "1.bias"}


def test_the_batch_is_free_also_for_a_sample_of_one_row() -> None:
    model = Residual().eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        traced = fxprune.trace(model, (torch.randn(1, 3, 6, 6),))
    for batch in (1, 2, 7):
        x = torch.randn(batch, 3, 6, 6)
        assert torch.equal(model(x), traced(x))


class Starred(nn.Module):
    """Takes any number of tensors, and gains by name."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 5)

    def forward(self, *inputs: torch.Tensor, **gains: torch.Tensor) -> torch.Tensor:
        total = sum(self.layer(x) for x in inputs)
        for gain in gains.values():
            total = total * gain
        return torch.relu(total)  # type: ignore[arg-type]


def test_the_batch_is_free_where_arguments_are_taken_by_star() -> None:
    model = Starred()
    traced = fxprune.trace(model, (torch.randn(3, 6), torch.randn(3, 6)), {"gain": torch.randn(3, 5)})
    x, y, gain = torch.randn(7, 6), torch.randn(7, 6), torch.randn(7, 5)
    assert torch.equal(model(x, y, gain=gain), traced(x, y, gain=gain))
    assert "forward" not in vars(model)
    again = fxprune.trace(model, (x, y), {"gain": gain}, dynamic_shapes=traced.dynamic_shapes)
    assert torch.equal(model(x[:2], y[:2], gain=gain[:2]), again(x[:2], y[:2], gain=gain[:2]))


def test_free_axes_of_arguments_by_star_are_given_by_the_names_of_the_arguments() -> None:
    model, auto = Starred(), {0: torch.export.Dim.AUTO}
    shapes = {"inputs": (auto,), "gains": {"gain": auto}}
    traced = fxprune.trace(model, (torch.randn(3, 6),), {"gain": torch.randn(3, 5)}, dynamic_shapes=shapes)
    x, gain = torch.randn(4, 6), torch.randn(4, 5)
    assert torch.equal(model(x, gain=gain), traced(x, gain=gain))


def test_other_free_axes_are_given_as_torch_export_takes_them() -> None:
    model = nn.Conv1d(2, 3, 3).eval()
    shapes = ({0: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC},)
    traced = fxprune.trace(model, (torch.randn(2, 2, 9),), dynamic_shapes=shapes)
    x = torch.randn(5, 2, 13)
    assert torch.equal(model(x), traced(x))


class FixedBatch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x.reshape(4, 3)) * int(x.shape[0])


def test_a_model_bound_to_its_batch_is_captured_for_it_with_a_named_warning() -> None:
    x = torch.randn(4, 3)
    with pytest.warns(BatchSpecializedWarning, match="batch"):
        traced = fxprune.trace(FixedBatch(), (x,))
    assert traced(x).shape == (4, 3)
    assert traced.dynamic_shapes is None
    with pytest.raises(InputError, match=r"shape \(2, 3\).*\[4, 3\]"):
        traced(torch.randn(2, 3))


class TrainBranch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.layer(x)
        if self.training and y.sum().item() > 0:
            y = -y
        return y


def test_a_train_mode_that_cannot_be_captured_leaves_eval_with_a_named_warning() -> None:
    with pytest.warns(EvalOnlyWarning, match="train mode"):
        traced = fxprune.trace(TrainBranch(), (torch.randn(2, 3),))
    assert traced.modes == ("eval",)
    assert not traced.training
    with pytest.raises(CaptureError, match="train mode was asked for; captured: eval"):
        traced.train()


class Branch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = TrainBranch()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) if x.sum() > 0 else x


def test_what_cannot_be_captured_is_refused_with_module_and_line() -> None:
    model = Branch()
    with pytest.raises(CaptureError, match=r"the root module \(Branch\), .*test_capture.py:\d+") as caught:
        fxprune.trace(model, (torch.randn(2, 3),))
    assert "torch.where" in str(caught.value)
    assert model(torch.ones(2, 3)) is not None
    with pytest.raises(CaptureError, match=r"at 1 \(TrainBranch\)"):
        fxprune.trace(nn.Sequential(nn.Linear(3, 3), TrainBranch()), (torch.randn(2, 3),), modes=("train",))


class Stateful(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.state = torch.zeros(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.state = self.state * 0.5 + x.mean(0)
        return x + self.state


def test_state_kept_in_a_plain_attribute_is_refused() -> None:
    with pytest.raises(CaptureError, match="'state'.*register the state as a buffer"):
        fxprune.trace(Stateful(), (torch.randn(2, 3),))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: (x.double(),), "float64"),
        (lambda x: (x[..., :4],), r"shape \(2, 3, 6, 4\)"),
        (lambda x: (x[0],), r"shape \(3, 6, 6\)"),
        (lambda x: (x, x), "2 positional"),
        (lambda x: (), "0 positional"),
        (lambda x: ([x],), "structure"),
        (lambda x: (3,), "int"),
    ],
)
def test_inputs_that_do_not_match_the_capture_are_refused(change: Any, message: str) -> None:
    traced = fxprune.trace(Residual(), (torch.randn(2, 3, 6, 6),), modes=("eval",))
    with pytest.raises(InputError, match=message):
        traced(*change(torch.randn(2, 3, 6, 6)))


def test_one_tensor_given_twice_at_the_capture_must_be_one_tensor_later() -> None:
    model = nn.MultiheadAttention(8, 2, batch_first=True)
    x = torch.randn(2, 3, 8)
    traced = fxprune.trace(model, (x, x, x), modes=("train",))
    y = torch.randn(4, 3, 8)
    assert torch.equal(model(y, y, y)[0], traced(y, y, y)[0])
    with pytest.raises(InputError, match="one tensor at the capture"):
        traced(y, y.clone(), y)


@pytest.mark.parametrize("bad", [{"modes": ()}, {"modes": "eval"}, {"modes": ("test",)}, {"dynamic_shapes": "all"}])
def test_options_out_of_range_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError, match="is needed"):
        fxprune.trace(mlp(), (torch.randn(2, 6),), **bad)


def test_no_module_and_reserved_names_are_refused() -> None:
    with pytest.raises(CaptureError, match="function"):
        fxprune.trace(torch.relu, (torch.randn(2),))  # type: ignore[arg-type]
    model = nn.Sequential(nn.Linear(2, 2))
    model.add_module("graph", nn.Linear(2, 2))
    with pytest.raises(CaptureError, match="'graph'"):
        fxprune.trace(model, (torch.randn(2, 2),))


def test_a_deep_copy_is_independent_and_has_both_graphs() -> None:
    traced = fxprune.trace(Residual(), (torch.randn(2, 3, 6, 6),))
    clone = copy.deepcopy(traced)
    x = torch.randn(2, 3, 6, 6)
    want = traced.eval()(x)
    with torch.no_grad():
        for parameter in clone.parameters():
            parameter.zero_()
    assert torch.equal(traced(x), want)
    assert clone.modes == traced.modes
    assert clone.train().training


def test_pickling_is_refused_by_name() -> None:
    traced = fxprune.trace(mlp(), (torch.randn(2, 6),), modes=("eval",))
    with pytest.raises(ArtifactError, match="pickle"):
        pickle.dumps(traced)


def test_conversion_to_float64_converts_parameters_and_accepted_inputs() -> None:
    model = Residual().eval()
    traced = fxprune.trace(copy.deepcopy(model), (torch.randn(2, 3, 6, 6),)).double()
    x = torch.randn(2, 3, 6, 6).double()
    assert torch.equal(model.double()(x), traced(x))


def test_conversion_is_refused_where_a_dtype_is_written_into_the_graph() -> None:
    class Cast(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * torch.zeros(3, dtype=torch.float32)

    model = nn.Sequential(nn.Linear(3, 3), Cast())
    traced = fxprune.trace(model, (torch.randn(2, 3),))
    with pytest.raises(CaptureError, match="Convert the model first"):
        traced.double()
    assert traced.get_submodule("0").weight.dtype is torch.float32


def test_torch_compile_runs_both_modes() -> None:
    model = Residual()
    model.drop.p = 0.0
    traced = fxprune.trace(model, (torch.randn(2, 3, 6, 6),))
    compiled = torch.compile(traced, backend="eager")
    x = torch.randn(4, 3, 6, 6)
    for training in (False, True, False):
        traced.train(training)
        model.train(training)
        state = copy.deepcopy(model.state_dict())
        want = model(x)
        model.load_state_dict(state)
        assert torch.equal(want, compiled(x))


def test_a_mode_switch_keeps_outputs_of_each_mode() -> None:
    model = mlp()
    traced = fxprune.trace(model, (torch.randn(2, 6),))
    x = torch.randn(5, 6)
    for training in (True, False, True, False):
        assert traced.train(training) is traced
        torch.manual_seed(3)
        state = copy.deepcopy(model.state_dict())
        want = model.train(training)(x)
        model.load_state_dict(state)
        torch.manual_seed(3)
        assert torch.equal(want, traced(x))
        assert re.search(rf"dropout.*, {training}\)", traced.code)


def test_numbers_drawn_outside_torch_are_refused_and_the_generators_left_alone() -> None:
    class Drawing(nn.Module):
        def __init__(self, draw: Any) -> None:
            super().__init__()
            self.layer, self.draw = nn.Linear(3, 3), draw

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x) * float(self.draw()) if self.training else self.layer(x)

    legacy = np.random.mtrand._rand
    for draw, state in ((random.random, random.getstate), (legacy.rand, lambda: str(legacy.get_state()))):
        before = state()
        with pytest.raises(CaptureError, match="random generator in train mode"):
            fxprune.trace(Drawing(draw), (torch.randn(2, 3),), modes=("train",))
        assert state() == before
        with pytest.warns(EvalOnlyWarning, match="random generator"):
            assert fxprune.trace(Drawing(draw), (torch.randn(2, 3),)).modes == ("eval",)


def test_a_refusal_prints_nothing_besides(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(CaptureError):
        fxprune.trace(Branch(), (torch.randn(2, 3),))
    assert capfd.readouterr() == ("", "")


class Likelihood(nn.Module):
    """A distribution of each step ahead, and how likely what came was."""

    def __init__(self) -> None:
        super().__init__()
        self.mean, self.scale = nn.Linear(3, 1), nn.Linear(3, 1)

    def forward(self, past: torch.Tensor, came: torch.Tensor) -> torch.Tensor:
        scale = nn.functional.softplus(self.scale(past))
        return -torch.distributions.Normal(self.mean(past), scale).log_prob(came)


def test_distributions_are_captured_and_eager_checks_their_values_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    # torch.compile turns these checks off for the rest of a process
    monkeypatch.setattr(torch.distributions.Distribution, "_validate_args", True)
    model = Likelihood()
    past, came = torch.randn(4, 3), torch.randn(4, 1)
    traced = fxprune.trace(model, (past, came))
    for mode in (True, False):
        assert torch.equal(traced.train(mode)(past, came), model.train(mode)(past, came))
    assert torch.equal(traced(past[:3], came[:3]), model(past[:3], came[:3]))
    with pytest.raises(ValueError, match="constraint"):
        model(past * torch.nan, came)


class Lengths(nn.Module):
    """Does something else where rows are of several lengths, as their mask says."""

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return x if len(set(mask.sum(1).tolist())) > 1 else x.relu()


def test_lengths_by_values_are_refused_as_values() -> None:
    with pytest.raises(CaptureError, match="unhashable type.*keep `.item.* on values out of forward"):
        fxprune.trace(Lengths(), (torch.randn(2, 3), torch.ones(2, 3, dtype=torch.long)), modes=("eval",))
