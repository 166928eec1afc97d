"""What fxprune inserts into a traced module is what torch does to the eager one: state, draws, outputs, training."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.nn.utils import prune as torch_prune

import fxprune
from fxprune import prune
from fxprune.errors import PruningError
from fxprune.graph.names import locate
from tests.systems import FREE, LAYERS, MASKS, NORMS, Parallel, X, assert_follows_eager, call, mlp, rows

SYSTEMS = {**MASKS, **NORMS}
VECTORS = ("bias", "layer norm", "batch norm")
# every layer under a system of each kind
ROWS = [
    (layer, system)
    for layer in LAYERS
    for system in (
        ("random", "weight norm", "spectral norm")
        if layer in VECTORS
        else ("container of three", "weight norm", "weight norm, dim 1", "spectral norm", "spectral norm, options")
    )
]


@pytest.mark.parametrize(("layer", "system"), rows(ROWS))
def test_inserted_system_follows_eager(layer, system):
    plain, args, name = LAYERS[layer]
    eager, traced = SYSTEMS[system]
    shapes = "batch" if layer in FREE else None
    assert_follows_eager(
        plain, lambda m: eager(*locate(m, name)), args, lambda t: traced(t, name), dynamic_shapes=shapes
    )


def assert_all_follow_eager(systems, dtype=torch.float32):
    """One model with a linear layer for each of the systems."""

    def touch(model):
        for layer, system in zip(model.layers, systems, strict=True):
            SYSTEMS[system][0](layer, "weight")

    def insert(traced):
        for i, system in enumerate(systems):
            SYSTEMS[system][1](traced, f"layers.{i}.weight")

    assert_follows_eager(lambda: Parallel(len(systems), dtype), touch, (X[0].to(dtype),), insert)


@pytest.mark.parametrize("systems", [MASKS, NORMS], ids=["masks", "norms"])
def test_every_inserted_system_follows_eager_beside_others(systems):
    assert_all_follow_eager(list(systems))


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)], ids=str
)
def test_inserted_systems_follow_eager_in_each_dtype(dtype):
    assert_all_follow_eager(["container of three", "weight norm", "spectral norm"], dtype)


def _channels_last():
    return nn.Sequential(nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Conv2d(6, 2, 1)).to(memory_format=torch.channels_last)


def _transposed():
    model = mlp()
    model[0].weight = nn.Parameter(torch.randn(6, 8).t())
    return model


@pytest.mark.parametrize(
    "system", ["ln structured", "weight norm", "spectral norm", pytest.param("bool mask", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize(
    ("plain", "args"), [(_channels_last, LAYERS["conv2d"][1]), (_transposed, X)], ids=["channels_last", "transposed"]
)
def test_memory_format_is_kept(plain, args, system):
    eager, traced = SYSTEMS[system]
    for insert in (None, lambda t: traced(t, "0.weight")):
        assert_follows_eager(plain, lambda m: eager(m[0], "weight"), args, insert)


def test_unstructured_methods_take_what_torch_cannot_view():
    traced = fxprune.trace(_channels_last(), LAYERS["conv2d"][1])
    prune.l1_unstructured(traced, "0.weight", 0.5)
    assert (traced.get_submodule("0").weight_mask == 0).sum() == 108


@pytest.mark.parametrize(
    ("eager", "traced"),
    [
        (
            lambda m: torch_prune.global_unstructured(
                [(m[0], "weight"), (m[2], "bias")], torch_prune.L1Unstructured, amount=0.5
            ),
            lambda t: prune.global_unstructured(t, ["0.weight", "2.bias"], torch_prune.L1Unstructured, amount=0.5),
        ),
        (
            lambda m: torch_prune.global_unstructured(
                [(m[0], "weight"), (m[2], "weight")], torch_prune.RandomUnstructured, amount=9
            ),
            lambda t: prune.global_unstructured(
                t, (n for n in ("0.weight", "2.weight")), torch_prune.RandomUnstructured, amount=9
            ),
        ),
        (
            lambda m: torch_prune.global_unstructured(
                [(m[0], "weight"), (m[2], "weight")],
                torch_prune.L1Unstructured,
                importance_scores={(m[0], "weight"): torch.rand(8, 6)},
                amount=0.5,
            ),
            lambda t: prune.global_unstructured(
                t,
                ["0.weight", "2.weight"],
                torch_prune.L1Unstructured,
                importance_scores={"0.weight": torch.rand(8, 6)},
                amount=0.5,
            ),
        ),
        (
            lambda m: (
                [
                    torch_prune.global_unstructured(
                        [(m[0], "weight"), (m[2], "weight")], torch_prune.L1Unstructured, amount=0.3
                    )
                    for _ in range(2)
                ]
                + [torch_prune.ln_structured(m[0], "weight", 1, 2, 0)]
            ),
            lambda t: (
                [prune.global_unstructured(t, "*.weight", torch_prune.L1Unstructured, amount=0.3) for _ in range(2)]
                + [prune.ln_structured(t, "0.weight", 1, 2, 0)]
            ),
        ),
    ],
    ids=["l1", "random, by a generator", "partial scores", "twice, then local"],
)
def test_global_pruning_follows_eager(eager, traced):
    assert_follows_eager(mlp, eager, X, traced)


def test_global_pruning_of_mixed_dtypes_follows_eager():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 4, dtype=torch.float64)

        def forward(self, x):
            return self.b(self.a(x).double())

    assert_follows_eager(
        Mixed,
        lambda m: torch_prune.global_unstructured(
            [(m.a, "weight"), (m.b, "weight")], torch_prune.L1Unstructured, amount=0.5
        ),
        X,
        lambda t: prune.global_unstructured(t, ["a.weight", "b.weight"], torch_prune.L1Unstructured, amount=0.5),
    )


def test_removal_and_another_pruning_follow_eager():
    def eager(model):
        torch_prune.l1_unstructured(model[0], "weight", 0.5)
        torch_prune.remove(model[0], "weight")
        torch_prune.l1_unstructured(model[0], "weight", 0.6)

    def traced(module):
        prune.l1_unstructured(module, "0.weight", 0.5)
        prune.remove(module, "0.weight")
        prune.l1_unstructured(module, "0.weight", 0.6)

    assert_follows_eager(mlp, eager, X, traced)


@pytest.mark.parametrize("system", NORMS)
def test_removal_of_a_norm_keeps_every_bit(system):
    traced = fxprune.trace(mlp(), X)
    NORMS[system][1](traced, "0.weight")
    call(traced, "train", X)
    before = call(traced, "eval", X)[0]
    (fxprune.remove_weight_norm if "weight" in system else fxprune.remove_spectral_norm)(traced, "0.weight")
    assert torch.equal(call(traced, "eval", X)[0], before)
    assert list(traced.state_dict()) == list(mlp().state_dict())


def test_failed_second_pruning_keeps_the_mask_and_the_draws_that_torch_makes():
    traced = fxprune.trace(mlp(), X)
    prune.l1_unstructured(traced, "0.weight", 40)
    state = {name: value.clone() for name, value in traced.state_dict().items()}
    before = call(traced, "eval", X)[0]
    for fail in (
        lambda: prune.l1_unstructured(traced, "0.weight", 20),
        lambda: prune.l1_unstructured(traced, "0.weight", 2, importance_scores=torch.ones(3)),
        lambda: prune.custom_from_mask(traced, "0.weight", torch.ones(2, 2)),
    ):
        with pytest.raises(PruningError):
            fail()
    assert prune.is_pruned(traced, "0.weight")
    assert all(torch.equal(value, state[name]) for name, value in traced.state_dict().items())
    assert torch.equal(call(traced, "eval", X)[0], before)


def test_mask_reaches_attention_output_weights_where_a_hook_does_not():
    plain, args, _ = LAYERS["attention"]
    traced = fxprune.trace(plain(), args)
    before = call(traced, "eval", args)[0]
    prune.l1_unstructured(traced, "attention.out_proj.weight", 1.0)
    after = call(traced, "eval", args)[0]
    assert not torch.equal(after, before)
    assert torch.equal(after, traced.get_parameter("attention.out_proj.bias").expand_as(after))


def test_second_norm_of_a_recurrent_layer_is_refused_where_eager_counts_otherwise():
    plain, args, name = LAYERS["lstm"]
    traced = fxprune.trace(plain(), args)
    fxprune.spectral_norm(traced, name)
    state = list(traced.state_dict())
    with pytest.raises(PruningError, match="depends on which name comes first"):
        fxprune.weight_norm(traced, "weight_ih_l0")
    assert list(traced.state_dict()) == state


def test_spectral_norm_state_is_in_buffers_that_train_mode_alone_moves():
    traced = fxprune.trace(mlp(), X)
    fxprune.spectral_norm(traced, "0.weight")
    buffers = dict(traced.named_buffers())
    assert list(buffers) == ["0.parametrizations.weight.0._u", "0.parametrizations.weight.0._v"]
    before = [b.clone() for b in buffers.values()]
    call(traced, "eval", X)
    assert all(map(torch.equal, before, buffers.values()))
    call(traced, "train", X)
    assert not any(map(torch.equal, before, buffers.values()))


def test_two_forwards_before_one_backward():
    torch.manual_seed(0)
    eager, source = mlp(), mlp()
    source.load_state_dict(eager.state_dict())
    traced = fxprune.trace(source, X).train()
    torch.manual_seed(1)
    parametrizations.spectral_norm(eager[0])
    torch.manual_seed(1)
    fxprune.spectral_norm(traced, "0.weight")
    gradients = []
    for model in (eager, traced):
        (model(X[0]).sum() * model(X[0] + 1).sum()).backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(map(torch.equal, *gradients))
