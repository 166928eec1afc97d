"""`save` and `load`: everything comes back, with the model and without, and trains on as if nothing had happened."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import fxprune
from fxprune.errors import ArgumentError, ArtifactError
from fxprune.graph.names import locate
from fxprune.graph.text import text
from tests.fxprune.checkpoints.twins import ROADS, X, assert_twin, loaded_by
from tests.networks import NETWORKS, Residual
from tests.systems import LAYERS, assert_same, assert_same_calls, assert_same_state, call


def test_a_file_without_graphs_needs_the_model(
    tmp_path: Path, traced: fxprune.TracedModule, dense: fxprune.TracedModule
) -> None:
    fxprune.save(traced, tmp_path / "m", programs=False)
    with pytest.raises(ArgumentError, match="saved with programs=False: give load the model"):
        fxprune.load(tmp_path / "m")
    assert_twin(fxprune.load(tmp_path / "m", dense), traced)


@pytest.mark.parametrize("road", ROADS)
def test_masks_norms_and_state_come_back(
    path: Path, traced: fxprune.TracedModule, dense: fxprune.TracedModule, road: str
) -> None:
    loaded = loaded_by(road, path, dense)
    if road == "alone":  # also with its text, names of nodes and all
        for mode, graph in traced.graphs.items():
            nodes = [[n for n in g.nodes if n.op != "get_attr"] for g in (loaded.graphs[mode], graph)]
            for got, want in zip(*nodes, strict=True):
                assert (got.name, got.target, got.meta.get("fxprune")) == (
                    want.name,
                    want.target,
                    want.meta.get("fxprune"),
                )
                assert str(got.meta.get("nn_module_stack")) == str(want.meta.get("nn_module_stack"))
    assert_twin(loaded, traced)


# "residual" is `captured`, and recurrent layers come with parametrizations below
@pytest.mark.parametrize("key", ["mlp", "encoder", "embedding", pytest.param("lstm", marks=pytest.mark.slow)])
def test_networks_without_their_code(tmp_path: Path, key: str) -> None:
    build, sample, names = NETWORKS[key]
    free = key in ("mlp", "embedding")  # a fixed batch is captured in half of the time
    traced = fxprune.trace(build(), (sample(2),), dynamic_shapes="batch" if free else None)
    for name in names:
        fxprune.prune.l1_unstructured(traced, name, amount=0.5)
    fxprune.save(traced, tmp_path / "m")
    loaded = fxprune.load(tmp_path / "m")
    inputs = [module.graphs["eval"].find_nodes(op="placeholder")[0].name for module in (loaded, traced)]
    assert inputs[0] == inputs[1]
    fxprune.save(loaded, tmp_path / "again")
    again = fxprune.load(tmp_path / "again")
    assert {mode: text(graph) for mode, graph in again.graphs.items()} == {
        mode: text(graph) for mode, graph in loaded.graphs.items()
    }
    assert_same_state(again, traced, "loaded twice")
    assert_twin(loaded, traced, (sample(3 if free else 2),))


@pytest.mark.parametrize("layer", ["transposed2d", "lstm"])
def test_parametrizations_that_the_model_carries(tmp_path: Path, layer: str) -> None:
    plain, args, name = LAYERS[layer]

    def touched() -> nn.Module:
        model = plain()
        parametrizations.spectral_norm(*locate(model, name))
        return model

    traced = fxprune.trace(touched(), args, dynamic_shapes="batch" if layer == "transposed2d" else None)
    fxprune.save(traced, tmp_path / "m")
    assert_twin(fxprune.load(tmp_path / "m"), traced, args)
    loaded = fxprune.load(tmp_path / "m", touched())
    assert_same_state(loaded, traced, "into the model")
    assert_same_calls(loaded, copy.deepcopy(traced), args)
    with pytest.raises(ArtifactError, match=f"'{name}' carries a parametrization of the model's own"):
        fxprune.load(tmp_path / "m", plain())


def test_loaded_masks_and_norms_are_found_changed_and_removed(path: Path, traced: fxprune.TracedModule) -> None:
    loaded = fxprune.load(path)
    for module in (loaded, traced):
        assert fxprune.prune.is_pruned(module)
        fxprune.prune.remove(module, "stem.weight")
        fxprune.remove_weight_norm(module, "head.weight")
        fxprune.remove_spectral_norm(module, "inner.weight")
        fxprune.prune.l1_unstructured(module, "stem.bias", amount=0.5)
        fxprune.prune.ln_structured(module, "inner.weight", amount=0.5, n=2, dim=0)
        fxprune.weight_norm(module, "head.weight")
    assert_twin(loaded, traced)


def test_the_generator_stays_where_it_is(path: Path) -> None:
    model, before = Residual(), torch.get_rng_state()
    fxprune.load(path, model)
    fxprune.load(path)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("road", ["alone", "dense model"])
def test_finalized_modules(
    tmp_path: Path, shrunk: fxprune.TracedModule, road: str, dense: fxprune.TracedModule
) -> None:
    final = copy.deepcopy(shrunk).eval()
    fxprune.save(final, tmp_path / "final")
    loaded = loaded_by(road, tmp_path / "final", dense)
    assert final.plan is not None
    assert loaded.plan.to_json() == final.plan.to_json()
    assert_twin(loaded, final)
    fxprune.prune.l1_unstructured(final.train(), "head.weight", amount=0.5)  # pruned again
    fxprune.spectral_norm(final, "inner.weight")
    fxprune.save(final, tmp_path / "again")
    assert_twin(loaded_by("alone" if road == "alone" else "traced model", tmp_path / "again", dense), final)


def test_a_module_finalized_twice_needs_no_model_and_refuses_one(tmp_path: Path, shrunk: fxprune.TracedModule) -> None:
    once = copy.deepcopy(shrunk)
    fxprune.prune.channels(once, amount=0.5)
    twice = fxprune.finalize(once, align=1)
    fxprune.save(twice, tmp_path / "m")
    assert_twin(fxprune.load(tmp_path / "m"), twice)
    with pytest.raises(ArtifactError, match="finalized more than once"):
        fxprune.load(tmp_path / "m", Residual())


def test_finalized_without_removal_and_with_batch_norms_folded(
    tmp_path: Path, traced: fxprune.TracedModule, dense: fxprune.TracedModule
) -> None:
    final = fxprune.finalize(traced, shrink=False)
    fxprune.save(final, tmp_path / "m")
    for road in ROADS:
        assert_twin(loaded_by(road, tmp_path / "m", dense), final)
    carrying = Residual()
    parametrizations.weight_norm(carrying.head)  # folded here as there
    assert_twin(fxprune.load(tmp_path / "m", carrying), final)
    final = fxprune.finalize(traced, fold_batch_norm=True)
    fxprune.save(final, tmp_path / "m")
    assert_twin(fxprune.load(tmp_path / "m"), final)
    with pytest.raises(ArtifactError, match="missing in the file: norm.weight"):
        fxprune.load(tmp_path / "m", Residual())


def test_the_file_holds_each_tensor_once_and_is_the_same_for_the_same_module(tmp_path: Path) -> None:
    traced = fxprune.trace(nn.Sequential(nn.Linear(300, 300), nn.ReLU(), nn.Linear(300, 300)), (torch.randn(2, 300),))
    for name in ("one", "two"):
        fxprune.save(traced, tmp_path / name)
    fxprune.save(traced, tmp_path / "quick", programs=False)
    stored = sum(t.nbytes for t in (*traced.parameters(), *traced.buffers(), traced.example_args[0]))
    assert stored < (tmp_path / "quick").stat().st_size < stored + 5_000
    assert (tmp_path / "one").stat().st_size < stored + 40_000
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


class Kinds(nn.Module):
    """Shared modules, tied parameters, one memory under two parameters, every kind of buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(4, 4)
        self.same = self.one
        self.tied = nn.Linear(4, 4)
        self.tied.weight = self.one.weight
        self.memory = nn.Linear(4, 4)
        self.memory.weight = nn.Parameter(self.one.weight.detach())
        self.conv = nn.Conv2d(4, 4, 2).to(memory_format=torch.channels_last)
        self.short = nn.Parameter(torch.randn(3).bfloat16())
        self.none = nn.Linear(4, 4, bias=False)
        self.none.weight.requires_grad_(False)
        self.register_buffer("wave", torch.randn(4, dtype=torch.complex64))
        self.register_buffer("loose", torch.arange(4), persistent=False)
        self.register_buffer("empty", torch.empty(0, 3))
        self.register_buffer("wide", torch.ones(1, 4).expand(3, 4))
        self.register_buffer("absent", None)
        self.unread = nn.Parameter(torch.randn(2, dtype=torch.float16))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.none(self.memory(self.tied(self.same(self.one(x).relu()).relu())))
        y = self.conv(x[:, :, None, None].expand(-1, -1, 3, 3)).flatten(1)
        return y.sum(1) + self.short.sum() + self.wide.sum() + self.empty.sum(), (self.wave * x).abs() + self.loose


@pytest.mark.parametrize("road", ["alone", "dense model"])
def test_sharing_dtypes_and_memory_formats(tmp_path: Path, road: str) -> None:
    args = (torch.randn(3, 4),)
    traced = fxprune.trace(Kinds(), args)
    fxprune.prune.l1_unstructured(traced, "one.bias", amount=0.5)
    fxprune.save(traced, tmp_path / "m")
    loaded = fxprune.load(tmp_path / "m") if road == "alone" else fxprune.load(tmp_path / "m", Kinds())
    get = loaded.get_submodule
    assert get("same") is get("one")
    assert get("tied").weight is get("one").weight is not get("memory").weight
    assert get("memory").weight.data_ptr() == get("one").weight.data_ptr()
    assert get("conv").weight.is_contiguous(memory_format=torch.channels_last)
    assert (loaded.short.dtype, loaded.unread.dtype, loaded.wave.dtype) == (
        torch.bfloat16,
        torch.float16,
        torch.complex64,
    )
    assert "loose" not in loaded.state_dict()
    assert loaded.absent is None
    assert loaded.wide.shape == (3, 4)
    assert not get("none").weight.requires_grad
    assert [n for n, _ in loaded.named_parameters()] == [n for n, _ in traced.named_parameters()]
    assert {n: v.tolist() for n, v in loaded.state_dict().items()} == {
        n: v.tolist() for n, v in traced.state_dict().items()
    }
    for mode in ("eval", "train"):
        for got, want in zip(*(call(module, mode, (args[0][:2],)) for module in (loaded, traced)), strict=True):
            assert_same(got, want, mode)


def test_transformers_with_the_package_imported(tmp_path: Path, transformers: Any) -> None:
    config = transformers.BertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=50
    )
    ids = torch.randint(50, (2, 7))
    traced = fxprune.trace(transformers.BertModel(config).eval(), (ids,), modes=("eval",))
    fxprune.save(traced, tmp_path / "m")
    loaded = fxprune.load(tmp_path / "m")
    assert type(loaded(ids)) is type(traced(ids))
    assert_twin(loaded, traced, (torch.randint(50, (3, 7)),))


def test_a_module_of_one_mode(tmp_path: Path, dense: fxprune.TracedModule) -> None:
    traced = fxprune.trace(Residual(), (X,), modes=("eval",))
    fxprune.save(traced, tmp_path / "m")
    for road in ("alone", "dense model"):
        loaded = loaded_by(road, tmp_path / "m", dense)
        assert loaded.modes == ("eval",)
        assert_twin(loaded, traced)


# ---- training on


def momentum(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, 0.05, momentum=0.9)


def _run(
    traced: fxprune.TracedModule, optimizer: torch.optim.Optimizer, data: list[tuple[Tensor, Tensor]]
) -> Iterator[float]:
    for x, y in data:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(traced(x), y)
        loss.backward()
        optimizer.step()
        yield loss.item()


@pytest.mark.parametrize(
    ("make", "finalized"),
    [
        (torch.optim.Adam, False),
        (momentum, True),
        pytest.param(torch.optim.Adam, True, marks=pytest.mark.slow),
        pytest.param(momentum, False, marks=pytest.mark.slow),
    ],
)
def test_save_load_train_on_equals_an_uninterrupted_run(
    tmp_path: Path,
    traced: fxprune.TracedModule,
    shrunk: fxprune.TracedModule,
    dense: fxprune.TracedModule,
    finalized: bool,
    make: Callable[[Any], torch.optim.Optimizer],
) -> None:
    module = copy.deepcopy(shrunk) if finalized else traced
    module.train()
    data = [(torch.randn(8, 3, 6, 6), torch.randint(5, (8,))) for _ in range(10)]
    optimizer = make(module.parameters())
    fxprune.clip_gradients(optimizer, max_norm=0.5)
    first = list(_run(module, optimizer, data[:4]))
    fxprune.save(module, tmp_path / "m")
    torch.save({"optimizer": optimizer.state_dict(), "generator": torch.get_rng_state()}, tmp_path / "o")
    want = list(_run(module, optimizer, data[4:]))
    assert len({*first, *want}) == 10
    del module, optimizer
    for road in ("alone", "traced model"):  # the way into an eager model traces it and is then the same
        torch.manual_seed(99)
        loaded, rest = loaded_by(road, tmp_path / "m", dense), torch.load(tmp_path / "o")
        optimizer = make(loaded.parameters())
        fxprune.clip_gradients(optimizer, max_norm=0.5)
        optimizer.load_state_dict(rest["optimizer"])
        torch.set_rng_state(rest["generator"])
        assert list(_run(loaded, optimizer, data[4:])) == want, road


def test_a_size_that_was_fixed_at_the_trace_is_not_told_of_again_at_each_load(tmp_path: Path) -> None:
    class Fixes(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.ones(6)

    with pytest.warns(fxprune.errors.FixedSizeWarning, match="axis 1 of input `x`"):
        traced = fxprune.trace(Fixes(), torch.randn(2, 6), dynamic_shapes={"x": {1: torch.export.Dim.AUTO}})
    fxprune.save(traced, tmp_path / "m")
    x = torch.randn(2, 6)
    assert torch.equal(fxprune.load(tmp_path / "m", Fixes())(x), traced(x))
