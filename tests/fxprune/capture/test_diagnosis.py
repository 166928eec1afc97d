"""`diagnose` names torch's own faults, one by one, and finds none in sound models."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

import fxprune
from fxprune.errors import ArgumentTypeError
from tests.systems import LAYERS, MASKS, NORMS, mlp


def found(model, kind):
    return [fault.parameter for fault in fxprune.diagnose(model) if fault.kind == kind]


def tied():
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    model[1].weight = model[0].weight
    return model


@pytest.mark.parametrize("system", [*MASKS, *NORMS])
def test_sound_models_have_no_faults(system):
    model = mlp()
    {**MASKS, **NORMS}[system][0](model[0], "weight")
    faults = fxprune.diagnose(model)
    assert faults == ()
    assert str(faults) == "no faults found"


@pytest.mark.parametrize("layer", [name for name in LAYERS if name not in ("attention", "encoder layer")])
def test_plain_layers_have_no_faults(layer):
    assert fxprune.diagnose(LAYERS[layer][0]()) == ()


@pytest.mark.parametrize(
    ("touch", "parameter"),
    [
        (lambda m: prune.l1_unstructured(weight_norm(m), "weight_v", 0.5), "0.weight_v"),
        (lambda m: prune.l1_unstructured(spectral_norm(m), "weight_orig", 0.5), "0.weight_orig"),
        (lambda m: weight_norm(prune.l1_unstructured(m, "weight", 0.5), "weight_orig"), "0.weight_orig"),
        (lambda m: spectral_norm(prune.l1_unstructured(m, "weight", 0.5), "weight_orig"), "0.weight_orig"),
    ],
)
def test_stacked_hooks_that_lag(touch, parameter):
    model = mlp()
    touch(model[0])
    assert found(model, "stacked hooks") == [parameter]


def test_hooks_that_never_run():
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    prune.l1_unstructured(model.self_attn.out_proj, "weight", 0.5)
    prune.l1_unstructured(model.self_attn, "in_proj_weight", 0.5)
    assert found(model, "hook never runs") == ["self_attn.out_proj.weight"]
    listed = nn.Sequential(nn.ParameterList([nn.Parameter(torch.ones(3))]))
    prune.l1_unstructured(listed[0], "0", 1)
    assert found(listed, "hook never runs") == ["0.0"]


def test_tied_weights_with_one_side_changed():
    assert fxprune.diagnose(tied()) == ()
    model = tied()
    prune.l1_unstructured(model[0], "weight", 0.5)
    assert found(model, "tied and reparametrized") == ["0.weight"]
    model = tied()
    parametrizations.spectral_norm(model[1])
    assert found(model, "tied and reparametrized") == ["1.weight"]


def test_left_over_of_a_failed_second_pruning():
    model = mlp()
    prune.l1_unstructured(model[0], "weight", 40)
    with pytest.raises(ValueError, match="smaller than"):
        prune.l1_unstructured(model[0], "weight", 20)
    assert found(model, "no hook left") == ["0.weight"]


@pytest.mark.parametrize("touch", [lambda m: prune.l1_unstructured(m, "weight", 0.5), weight_norm, spectral_norm])
def test_stale_value_after_a_load(touch):
    model, other = mlp(), mlp()
    for m in (model, other):
        touch(m[0])
        m.eval()(torch.randn(2, 6))
    assert found(model, "stale value") == []
    model.load_state_dict(other.state_dict())
    assert found(model, "stale value") == ["0.weight"]
    model(torch.randn(2, 6))
    assert found(model, "stale value") == []


def test_weight_that_the_legacy_norm_unfroze():
    model = mlp()
    model[0].requires_grad_(False)
    weight_norm(model[0])
    assert found(model, "unfrozen") == ["0.weight"]
    model[0].requires_grad_(False)
    assert found(model, "unfrozen") == []


def test_orthogonal_in_half_precision():
    model = parametrizations.orthogonal(nn.Linear(4, 4), orthogonal_map="cayley").half()
    assert found(model, "half precision") == ["weight"]
    with pytest.raises(RuntimeError, match="lu_cpu"):
        model(torch.ones(1, 4, dtype=torch.half))
    assert found(parametrizations.orthogonal(nn.Linear(4, 4)).half(), "half precision") == []


def test_order_that_removal_permuted():
    model = mlp()
    prune.l1_unstructured(model[0], "weight", 0.5)
    assert found(model, "parameter order") == []
    prune.remove(model[0], "weight")
    assert found(model, "parameter order") == ["0.weight"]


def test_fused_inference_differs_from_the_capture_and_is_named():
    model, x = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval(), torch.randn(2, 5, 8)
    assert found(model, "fused inference") == ["TransformerEncoderLayer", "self_attn"]
    traced = fxprune.trace(model, x, modes=("eval",))
    with torch.no_grad():
        torch.testing.assert_close(traced(x), model(x))
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        assert found(model, "fused inference") == []
        with torch.no_grad():
            assert torch.equal(traced(x), model(x))
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def test_faults_are_data_and_print_cause_and_cure():
    model = mlp()
    prune.l1_unstructured(weight_norm(model[0]), "weight_v", 0.5)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    faults = fxprune.diagnose(model)
    assert {field for field in vars(faults[0])} == {"kind", "parameter", "cause", "cure"}
    assert str(faults).startswith("0.weight_v: stacked hooks\n    cause: ")
    assert "\n    cure:  " in str(faults)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_something_else_than_a_module_is_refused():
    with pytest.raises(ArgumentTypeError, match="nn.Module"):
        fxprune.diagnose(torch.relu)
