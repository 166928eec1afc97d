"""`save` and `load`: everything comes back, with the model and without; bad files are named and change nothing."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import hashlib
import io
import json
import os
import pickle
import resource
import signal
import subprocess
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.nn.utils import parametrizations

import fxprune
from fxprune.errors import ArgumentError, ArgumentTypeError, ArtifactError, ExportError
from fxprune.graph.containers import provenance_of
from fxprune.graph.names import locate
from fxprune.graph.reparametrizations import reparametrized
from tests.networks import NETWORKS, Residual, mlp
from tests.systems import LAYERS, assert_same, assert_same_calls, assert_same_state, assert_same_training, call, sgd

ROADS = ("alone", "dense model", "traced model")
X = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(0))


def _load(path: Path, road: str, model: nn.Module, x: Any = None) -> fxprune.TracedModule:
    if road == "alone":
        return fxprune.load(path)
    return fxprune.load(path, model if road == "dense model" else fxprune.trace(model, (X if x is None else x,)))


def _assert_twin(loaded: fxprune.TracedModule, traced: fxprune.TracedModule, args: tuple[Any, ...] = (X,)) -> None:
    """Same state, same training mode, same bits in both modes, in training and after finalize."""
    assert loaded.training == traced.training
    assert reparametrized(loaded) == reparametrized(traced)
    assert (loaded.plan is None) == (traced.plan is None)
    assert str(loaded.dynamic_shapes) == str(traced.dynamic_shapes)
    for left, right in zip(loaded.modules(), traced.modules(), strict=True):
        assert provenance_of(left).parameter_order == provenance_of(right).parameter_order
        assert left._non_persistent_buffers_set == right._non_persistent_buffers_set
    traced = copy.deepcopy(traced)
    assert_same_state(loaded, traced, "loaded")
    modes = [mode for mode in ("eval", "train", "eval") if mode in traced.modes]
    assert_same_calls(loaded, traced, args, modes)
    if "train" in modes:
        assert_same_training(loaded, traced, args, sgd, 2)
    finals = [fxprune.finalize(module, verify=False) for module in (loaded, traced)]
    for got, want in zip(*(call(final, "eval", args) for final in finals), strict=True):
        assert_same(got, want, "finalized")


@pytest.fixture(scope="module")
def captured() -> fxprune.TracedModule:
    """Masks on a weight and a bias, weight norm, spectral norm, a frozen parameter; batch norm and dropout inside."""
    torch.manual_seed(0)
    traced = fxprune.trace(Residual(), (X,))
    fxprune.prune.l1_unstructured(traced, "stem.weight", amount=0.5)
    fxprune.prune.l1_unstructured(traced, "stem.bias", amount=0.5)
    fxprune.weight_norm(traced, "head.weight", dim=1)
    fxprune.spectral_norm(traced, "inner.weight", n_power_iterations=2)
    fxprune.prune.l1_unstructured(traced, "head.parametrizations.weight.original1", amount=0.3)
    traced.get_submodule("norm").bias.requires_grad_(False)
    return traced


@pytest.fixture
def traced(captured: fxprune.TracedModule) -> fxprune.TracedModule:
    return copy.deepcopy(captured)


@pytest.fixture(scope="module")
def shrunk() -> fxprune.TracedModule:
    torch.manual_seed(0)
    traced = fxprune.trace(Residual(), (X,))
    fxprune.prune.channels(traced, amount=0.5)
    return fxprune.finalize(traced, align=1)


@pytest.fixture
def path(tmp_path: Path, captured: fxprune.TracedModule) -> Path:
    fxprune.save(captured, tmp_path / "model.fxp")
    return tmp_path / "model.fxp"


# ---- what comes back


@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize("programs", [True, False])
def test_masks_norms_and_state_come_back(
    tmp_path: Path, traced: fxprune.TracedModule, road: str, programs: bool
) -> None:
    fxprune.save(traced, tmp_path / "m", programs=programs)
    if road == "alone" and not programs:
        with pytest.raises(ArgumentError, match="saved with programs=False: give load the model"):
            fxprune.load(tmp_path / "m")
        return
    loaded = _load(tmp_path / "m", road, Residual())
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
    _assert_twin(loaded, traced)


@pytest.mark.parametrize("key", NETWORKS)
def test_networks_without_their_code(tmp_path: Path, key: str) -> None:
    build, sample, names = NETWORKS[key]
    traced = fxprune.trace(build(), (sample(2),))
    for name in names:
        fxprune.prune.l1_unstructured(traced, name, amount=0.5)
    fxprune.save(traced, tmp_path / "m")
    loaded = fxprune.load(tmp_path / "m")
    inputs = [module.graphs["eval"].find_nodes(op="placeholder")[0].name for module in (loaded, traced)]
    assert inputs[0] == inputs[1]
    fxprune.save(loaded, tmp_path / "again")
    _assert_twin(loaded, traced, (sample(3),))
    _assert_twin(fxprune.load(tmp_path / "again"), traced, (sample(3),))


@pytest.mark.parametrize("layer", ["transposed2d", "lstm"])
def test_parametrizations_that_the_model_carries(tmp_path: Path, layer: str) -> None:
    plain, args, name = LAYERS[layer]

    def touched() -> nn.Module:
        model = plain()
        parametrizations.spectral_norm(*locate(model, name))
        return model

    traced = fxprune.trace(touched(), args)
    fxprune.save(traced, tmp_path / "m")
    _assert_twin(fxprune.load(tmp_path / "m"), traced, args)
    _assert_twin(fxprune.load(tmp_path / "m", touched()), traced, args)
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
    _assert_twin(loaded, traced)


def test_the_generator_stays_where_it_is(path: Path) -> None:
    model, before = Residual(), torch.get_rng_state()
    fxprune.load(path, model)
    fxprune.load(path)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("road", ["alone", "dense model"])
def test_finalized_modules(tmp_path: Path, shrunk: fxprune.TracedModule, road: str) -> None:
    final = copy.deepcopy(shrunk).eval()
    fxprune.save(final, tmp_path / "final")
    loaded = _load(tmp_path / "final", road, Residual())
    assert final.plan is not None
    assert loaded.plan.to_json() == final.plan.to_json()
    _assert_twin(loaded, final)
    fxprune.prune.l1_unstructured(final.train(), "head.weight", amount=0.5)  # pruned again
    fxprune.spectral_norm(final, "inner.weight")
    fxprune.save(final, tmp_path / "again")
    _assert_twin(_load(tmp_path / "again", road, Residual()), final)


def test_a_module_finalized_twice_needs_no_model_and_refuses_one(tmp_path: Path, shrunk: fxprune.TracedModule) -> None:
    once = copy.deepcopy(shrunk)
    fxprune.prune.channels(once, amount=0.5)
    twice = fxprune.finalize(once, align=1)
    fxprune.save(twice, tmp_path / "m")
    _assert_twin(fxprune.load(tmp_path / "m"), twice)
    with pytest.raises(ArtifactError, match="finalized more than once"):
        fxprune.load(tmp_path / "m", Residual())


def test_finalized_without_removal_and_with_batch_norms_folded(tmp_path: Path, traced: fxprune.TracedModule) -> None:
    final = fxprune.finalize(traced, shrink=False)
    fxprune.save(final, tmp_path / "m")
    for road in ROADS:
        _assert_twin(_load(tmp_path / "m", road, Residual()), final)
    carrying = Residual()
    parametrizations.weight_norm(carrying.head)  # folded here as there
    _assert_twin(fxprune.load(tmp_path / "m", carrying), final)
    final = fxprune.finalize(traced, fold_batch_norm=True)
    fxprune.save(final, tmp_path / "m")
    _assert_twin(fxprune.load(tmp_path / "m"), final)
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
    assert str(Path(__file__).parent).encode() not in (tmp_path / "one").read_bytes()


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


@dataclasses.dataclass
class Pair:
    left: Tensor
    right: Tensor


class Structured(nn.Module):
    def forward(self, x: Tensor, /, pair: Pair, *more: Tensor, times: int, cfg: dict[str, Any]) -> Any:
        return {"a": x * times + pair.left, "b": (more[0] + cfg["z"], None, 3)}


@pytest.mark.filterwarnings("ignore::fxprune.errors.BatchSpecializedWarning")
def test_structured_inputs_and_outputs(tmp_path: Path) -> None:
    x = torch.randn(2, 4)
    args, kwargs = (x, Pair(x, torch.ones(2)), x + 1), {"times": 3, "cfg": {"z": torch.randn(2, 4), "s": "text"}}
    traced = fxprune.trace(Structured(), args, kwargs)
    fxprune.save(traced, tmp_path / "m")
    loaded = fxprune.load(tmp_path / "m")
    assert loaded.example_args[0] is loaded.example_args[1].left  # one tensor at the capture, so one tensor now
    assert loaded.run_example()[0].tolist() == traced.run_example()[0].tolist()
    assert loaded(*args, **kwargs).keys() == {"a", "b"}
    assert loaded.run_example("train")[2:] == [None, 3]
    with pytest.raises(fxprune.FxpruneError, match="holds for 3 only"):
        loaded(*args, **(kwargs | {"times": 4}))


READER = """
import sys, torch, fxprune
loaded = fxprune.load(sys.argv[1])
assert torch.equal(loaded.eval()(torch.ones(5, 3, 6, 6)), torch.load(sys.argv[3]))
assert fxprune.prune.is_pruned(loaded) and not any(name.startswith("tests") for name in sys.modules)
try:
    fxprune.load(sys.argv[2])
except fxprune.FxpruneError as error:
    print(error)
"""


@pytest.mark.filterwarnings("ignore::fxprune.errors.BatchSpecializedWarning")
def test_a_process_without_the_models_code(path: Path, captured: fxprune.TracedModule) -> None:
    class Twice(nn.Module):
        def forward(self, pair: Pair) -> Tensor:
            return pair.left * pair.right

    fxprune.save(fxprune.trace(Twice(), (Pair(torch.ones(2), torch.ones(2)),)), path.with_name("own class"))
    torch.save(copy.deepcopy(captured).eval()(torch.ones(5, 3, 6, 6)).detach(), path.with_name("want"))
    found = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", READER, path, path.with_name("own class"), path.with_name("want")],
        check=True, capture_output=True, text=True, cwd=path.parent,
        env=os.environ | {"PYTHONPATH": str(Path(fxprune.__file__).parent.parent)},
    )  # fmt: skip
    assert "test_checkpoint.Pair in pytree is not registered" in found.stdout
    assert "torch.export.register_dataclass" in found.stdout


def test_what_has_no_form_as_data_is_named(tmp_path: Path) -> None:
    traced = fxprune.trace(Residual(), (X,))
    traced.register_buffer("sparse", torch.eye(3).to_sparse())
    with pytest.raises(ArtifactError, match="the module cannot be stored: .*programs=False stores everything else"):
        fxprune.save(traced, tmp_path / "m")
    assert not list(tmp_path.iterdir())


class Sizes(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.cat([x, x], 1)[:, :, None] + y[:, :, None].cumsum(0).relu() * y.shape[0]


N, B = Dim("n", min=3, max=50), Dim("b")


@pytest.mark.parametrize(
    "shapes",
    [
        "batch",
        None,
        {"x": {0: B, 1: N}, "y": {0: B, 1: 2 * N}},
        {"x": (Dim.AUTO, Dim.DYNAMIC(min=2, max=40)), "y": (Dim.AUTO, Dim.AUTO)},
    ],
)
@pytest.mark.parametrize("road", ["alone", "dense model"])
def test_dynamic_axes_come_back(tmp_path: Path, shapes: Any, road: str) -> None:
    traced = fxprune.trace(Sizes(), (torch.randn(4, 5), torch.randn(4, 10)), dynamic_shapes=shapes)
    fxprune.save(traced, tmp_path / "m")
    loaded = fxprune.load(tmp_path / "m") if road == "alone" else fxprune.load(tmp_path / "m", Sizes())
    sizes = [(4, 5)] + [(7, 5)] * (shapes is not None) + [(6, 9)] * (shapes not in (None, "batch"))
    for batch, width in sizes:
        inputs = torch.randn(batch, width), torch.randn(batch, 2 * width)
        assert torch.equal(loaded(*inputs), traced(*inputs))
    refused = torch.randn(9, 60), torch.randn(9, 120)
    for module in (loaded, traced):
        assert [i.sizes for i in module.input_check.inputs] == [
            i.sizes for i in traced.input_check.inputs
        ] or road != "alone"
        if shapes in (None, "batch"):
            with pytest.raises(fxprune.FxpruneError):
                module(*refused)
    report = fxprune.export.to_program(loaded, tmp_path / "m.pt2")
    assert report.comparison is not None
    assert report.comparison.ok


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(4, 4)
        self.table = [torch.randn(4)]

    def forward(self, x: Tensor) -> Tensor:
        x = self.lin(x) + self.table[0]
        return torch.cond(x.sum() > 0, lambda v: v.sin() * 2, lambda v: (v - 1).cos(), (x,))


def test_control_flow_and_constants(tmp_path: Path) -> None:
    traced = fxprune.trace(Branches(), (torch.randn(2, 4),), dynamic_shapes=None)
    fxprune.prune.l1_unstructured(traced, "lin.weight", amount=0.5)
    fxprune.save(traced, tmp_path / "m")
    fxprune.save(fxprune.load(tmp_path / "m"), tmp_path / "again")
    loaded = fxprune.load(tmp_path / "again")
    for scale in (-9, 9):
        x = torch.full((2, 4), 1.0 * scale)
        for mode in (True, False):
            assert torch.equal(loaded.train(mode)(x), traced.train(mode)(x))


def test_transformers_with_the_package_imported(tmp_path: Path, transformers: Any) -> None:
    config = transformers.BertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=50
    )
    ids = torch.randint(50, (2, 7))
    traced = fxprune.trace(transformers.BertModel(config).eval(), (ids,), modes=("eval",))
    fxprune.save(traced, tmp_path / "m")
    loaded = fxprune.load(tmp_path / "m")
    assert type(loaded(ids)) is type(traced(ids))
    _assert_twin(loaded, traced, (torch.randint(50, (3, 7)),))


def test_a_module_of_one_mode(tmp_path: Path) -> None:
    traced = fxprune.trace(Residual(), (X,), modes=("eval",))
    fxprune.save(traced, tmp_path / "m")
    for road in ("alone", "dense model"):
        loaded = _load(tmp_path / "m", road, Residual())
        assert loaded.modes == ("eval",)
        _assert_twin(loaded, traced)


# ---- training on


def _run(
    traced: fxprune.TracedModule, optimizer: torch.optim.Optimizer, data: list[tuple[Tensor, Tensor]]
) -> Iterator[float]:
    for x, y in data:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(traced(x), y)
        loss.backward()
        optimizer.step()
        yield loss.item()


@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize("finalized", [False, True])
@pytest.mark.parametrize("make", [torch.optim.Adam, lambda p: torch.optim.SGD(p, 0.05, momentum=0.9)])
def test_save_load_train_on_equals_an_uninterrupted_run(
    tmp_path: Path,
    traced: fxprune.TracedModule,
    shrunk: fxprune.TracedModule,
    road: str,
    finalized: bool,
    make: Callable[[Any], torch.optim.Optimizer],
) -> None:
    module = copy.deepcopy(shrunk) if finalized else traced
    module.train()
    data = [(torch.randn(8, 3, 6, 6), torch.randint(5, (8,))) for _ in range(10)]
    optimizer = make(module.parameters())
    fxprune.clip_gradients(optimizer, max_norm=0.5)
    first = list(_run(module, optimizer, data[:4]))
    fxprune.save(module, tmp_path / "m", programs=road == "alone")
    torch.save(
        {"optimizer": optimizer.state_dict(), "generator": torch.get_rng_state(), "losses": first}, tmp_path / "o"
    )
    want = list(_run(module, optimizer, data[4:]))
    del module, optimizer
    torch.manual_seed(99)
    loaded, rest = _load(tmp_path / "m", road, Residual()), torch.load(tmp_path / "o")
    optimizer = make(loaded.parameters())
    fxprune.clip_gradients(optimizer, max_norm=0.5)
    optimizer.load_state_dict(rest["optimizer"])
    torch.set_rng_state(rest["generator"])
    assert list(_run(loaded, optimizer, data[4:])) == want
    assert len({*rest["losses"], *want}) == 10


# ---- the given model


@pytest.mark.parametrize("wrap", [lambda m: m, lambda m: fxprune.trace(m, (X,))], ids=["dense", "traced"])
def test_the_given_model_is_left_as_it_is(path: Path, wrap: Callable[[nn.Module], nn.Module]) -> None:
    model = wrap(Residual().eval())
    before, objects = copy.deepcopy(model.state_dict()), list(model.parameters())
    loaded = fxprune.load(path, model)
    damaged = path.with_name("bad")
    damaged.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(ArtifactError):
        fxprune.load(damaged, model)
    assert not model.training
    assert all(a is b for a, b in zip(model.parameters(), objects, strict=True))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    shared = {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in loaded.parameters()}
    assert not shared


def test_another_model_is_refused_by_names_and_shapes(path: Path, shrunk: fxprune.TracedModule) -> None:
    with pytest.raises(ArtifactError, match="no parameter .*stem.weight"):
        fxprune.load(path, fxprune.trace(mlp(), (torch.randn(2, 6),)))

    class Wider(Residual):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(8, 6)
            self.extra = nn.Parameter(torch.ones(1))

    with pytest.raises(ArtifactError, match=r"do not fit the model: a mask of shape \(5, 8\) for 'head.parametriz"):
        fxprune.load(path, Wider())
    fxprune.save(fxprune.trace(Residual(), (X,)), dense := path.with_name("dense"))
    with pytest.raises(ArtifactError, match="missing in the file: extra") as caught:
        fxprune.load(dense, Wider())
    assert "head.bias is (5,) in the file, (6,) in the model" in str(caught.value)
    del (smaller := Residual()).head.bias
    smaller.head.register_parameter("bias", None)
    with pytest.raises(ArtifactError, match="missing in the model: head.bias"):
        fxprune.load(dense, smaller)
    fxprune.save(shrunk, path)
    with pytest.raises(ArtifactError, match="plan, masks or norms do not fit the model"):
        fxprune.load(path, fxprune.trace(mlp(), (torch.randn(2, 6),)))
    with pytest.raises(ArtifactError, match="is torch.float32 in the file and torch.float64 in the model"):
        fxprune.load(path, Residual().double())
    with pytest.raises(ArtifactError, match=r"captured in \['eval', 'train'\] and \['eval'\]"):
        fxprune.load(path, fxprune.trace(Residual(), (X,), modes=("eval",)))
    with pytest.raises(ArgumentTypeError, match="into, got dict"):
        fxprune.load(path, {})  # type: ignore[arg-type]
    with pytest.raises(ArgumentTypeError, match="got Residual"):
        fxprune.save(Residual(), path)  # type: ignore[arg-type]


# ---- bad files


def _rewritten(path: Path, edit: Callable[[dict[str, bytes]], None]) -> Path:
    """A copy of an archive with other members, valid as an archive."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    edit(members)
    bad = path.with_name(f"bad{path.suffix}")
    with zipfile.ZipFile(bad, "w") as archive:
        for name, content in members.items():
            archive.writestr(zipfile.ZipInfo(name), content)
    return bad


def _header(change: Callable[[dict[str, Any]], None]) -> Callable[[dict[str, bytes]], None]:
    def edit(members: dict[str, bytes]) -> None:
        header = json.loads(members["fxprune.json"])
        change(header)
        members["fxprune.json"] = json.dumps(header).encode()

    return edit


def test_every_changed_byte_of_a_member_is_noticed(path: Path) -> None:
    content, bad = path.read_bytes(), path.with_name("bad")
    with zipfile.ZipFile(path) as archive:
        items = {item.filename: item for item in archive.infolist()}
    assert items.keys() == {"fxprune.json", "tensors.safetensors", "eval.pt2", "train.pt2"}
    for item in items.values():
        start, size = item.header_offset + 30 + len(item.filename), item.file_size
        for position in range(start, start + size, max(1, size // 40)):
            bad.write_bytes(content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :])
            with pytest.raises(ArtifactError, match="bad.*cannot be restored.*Bad CRC-32"):
                fxprune.load(bad)


def test_truncated_files_are_named(path: Path) -> None:
    content, bad = path.read_bytes(), path.with_name("bad")
    whole = len(content)
    inside = "what is left ends in another archive"  # that of the last program, which would be read instead
    for length, why in {0: "", 1: "", 100: "", whole // 2: "truncated", whole - 100: inside, whole - 1: ""}.items():
        bad.write_bytes(content[:length])
        with pytest.raises(ArtifactError, match=why or "truncated or altered must be written again"):
            fxprune.load(bad)


@pytest.mark.parametrize("member", ["tensors.safetensors", "eval.pt2"])
def test_members_of_another_file_are_noticed(path: Path, shrunk: fxprune.TracedModule, member: str) -> None:
    fxprune.save(shrunk, other := path.with_name("other"))
    with zipfile.ZipFile(other) as archive:
        content = archive.read(member)
    with pytest.raises(ArtifactError, match=f"{member} is not what was written: altered"):
        fxprune.load(_rewritten(path, lambda members: members.update({member: content})))
    with pytest.raises(ArtifactError, match=f"{member} is not what was written: missing"):
        fxprune.load(_rewritten(path, lambda members: members.pop(member)))


@pytest.mark.parametrize("name", ["../evil", "/etc/evil", "a/../../evil", "eval.pt2.pkl"])
def test_members_that_do_not_belong_are_refused(path: Path, name: str) -> None:
    with pytest.raises(ArtifactError, match=f"members that no checkpoint has: '{name}'"):
        fxprune.load(_rewritten(path, lambda members: members.update({name: b"x"})))
    assert not any("evil" in item.name for item in path.parent.iterdir())


def test_compressed_and_repeated_members_are_refused(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    with pytest.raises(ArtifactError, match="compressed"):
        fxprune.load(path)
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in [*members.items(), ("eval.pt2", b"another")]:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                archive.writestr(name, content)
    with pytest.raises(ArtifactError, match="members twice"):
        fxprune.load(path)


def test_later_versions_and_damaged_headers_are_named(path: Path) -> None:
    later = _header(lambda h: h.update(format=7, version="9.0"))
    with pytest.raises(ArtifactError, match="format 7, written by fxprune 9.0; this version reads up to 1"):
        fxprune.load(_rewritten(path, later))
    for damage in (
        lambda h: h.pop("tensors"),
        lambda h: h.update(format="x"),
        lambda h: h["tensors"].pop("stem.bias_mask"),
        lambda h: h["inputs"].update(leaves=[]),
        lambda h: h["modules"].pop(0),
        lambda h: h.update(plan="{}"),
        lambda h: h["graphs"]["eval"]["origins"].update(x={}),
    ):
        with pytest.raises(ArtifactError):
            fxprune.load(_rewritten(path, _header(damage)))


def test_what_is_no_checkpoint_is_named(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("hello")
    torch.save({"a": torch.ones(2)}, tmp_path / "state")
    for name, why in {
        "text": "not a zip",
        "state": "state/data.pkl",
        "no": "No such file",
        ".": "Is a directory",
    }.items():
        with pytest.raises(ArtifactError, match=why):
            fxprune.load(tmp_path / name)


# ---- programs of export


def test_an_exported_program_becomes_a_traced_module(tmp_path: Path, shrunk: fxprune.TracedModule) -> None:
    path = tmp_path / "model.pt2"
    fxprune.export.to_program(shrunk, path)
    loaded = fxprune.load(path)
    assert loaded.modes == ("eval",)
    for n in (1, 4, 7):
        x = torch.randn(n, 3, 6, 6)
        assert torch.equal(loaded(x), copy.deepcopy(shrunk).eval()(x))
    assert loaded.state_dict().keys() == {n for n in shrunk.state_dict() if "num_batches" not in n}
    fxprune.prune.channels(loaded, amount=0.5)
    final = fxprune.finalize(loaded, align=1)
    assert sum(p.numel() for p in final.parameters()) < sum(p.numel() for p in shrunk.parameters())
    fxprune.export.to_program(final, path)
    fxprune.save(fxprune.load(path), tmp_path / "m")
    assert torch.equal(fxprune.load(tmp_path / "m")(X), final(X))
    with pytest.raises(ArgumentError, match="restored without a model"):
        fxprune.load(path, Residual())


@pytest.mark.filterwarnings("ignore::fxprune.errors.BatchSpecializedWarning")
def test_an_exported_program_of_structured_inputs(tmp_path: Path) -> None:
    class Named(nn.Module):
        def forward(self, x: Tensor, pair: tuple[Tensor, Tensor], *, scale: Tensor) -> dict[str, Tensor]:
            return {"out": x * scale + pair[1]}

    x = torch.randn(3, 4)
    traced = fxprune.trace(Named(), (x, (x + 1, x + 2)), {"scale": x + 3}, modes=("eval",))
    fxprune.export.to_program(traced, tmp_path / "m.pt2")
    loaded, y = fxprune.load(tmp_path / "m.pt2"), torch.randn(5, 4)
    want = traced(y, (y + 1, y + 2), scale=y + 3)["out"]
    assert torch.equal(loaded(y, (y + 1, y + 2), scale=y + 3)["out"], want)
    sample = (x, (x + 1, x + 2)), {"scale": x + 3}
    again = fxprune.trace(loaded, *sample, dynamic_shapes=loaded.dynamic_shapes, modes=("eval",))
    assert torch.equal(again(y, (y + 1, y + 2), scale=y + 3)["out"], want)


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> Any:
        return Path.touch, (Path(self.path),)


@pytest.fixture
def program(tmp_path: Path) -> Path:
    traced = fxprune.trace(nn.Linear(3, 2), (torch.randn(2, 3),), modes=("eval",))
    return fxprune.export.to_program(traced, tmp_path / "model.pt2").path


def _crafted(kind: str, bomb: bytes, marker: Path) -> Callable[[dict[str, bytes]], None]:
    def edit(members: dict[str, bytes]) -> None:
        root = next(iter(members)).partition("/")[0]
        weights = f"{root}/data/weights/model_weights_config.json"
        model = f"{root}/models/model.json"
        if kind == "pickled weight":
            config = json.loads(members[weights])
            config["config"]["weight"].update(use_pickle=True)
            members[weights] = json.dumps(config).encode()
            members[f"{root}/data/weights/{config['config']['weight']['path_name']}"] = bomb
        elif kind == "sample inputs":
            members[f"{root}/data/sample_inputs/model.pt"] = bomb
        elif kind == "old weights":
            members[f"{root}/data/weights/model.pt"] = bomb
        elif kind == "object":
            constants = f"{root}/data/constants/model_constants_config.json"
            entry = {"path_name": "opaque_obj_0", "is_param": False, "use_pickle": True, "tensor_meta": None}
            members[constants] = json.dumps({"config": {"x": entry}}).encode()
            members[f"{root}/data/constants/opaque_obj_0"] = pickle.dumps(Bomb(marker))
        elif kind == "path outside":
            members[f"{root}/data/weights/../../../evil"] = b"x"
        elif kind == "library":
            members[f"{root}/data/aotinductor/model/evil.so"] = b"\x7fELF"
        elif kind == "expression":
            evil = f"__import__('pathlib').Path('{marker}').touch()"
            members[model] = members[model].replace(b"Symbol('s", f"{evil} or Symbol('s".encode(), 1)
        elif kind == "call":
            evil = f"open('{marker.name}', 'w')"
            members[model] = members[model].replace(b"Symbol('s", f"{evil} + Symbol('s".encode(), 1)
        elif kind == "enumeration":
            found = json.loads(members[model])
            signature = found["graph_module"]["module_call_graph"][0]["signature"]
            context = json.dumps({"__enum__": True, "fqn": "marker:X", "name": "Y"})
            signature["in_spec"] = json.dumps([1, {"type": "builtins.dict", "context": context, "children_spec": []}])
            members[model] = json.dumps(found).encode()
        elif kind == "function":
            members[model] = members[model].replace(b"torch.ops.aten.linear.default", b"torch.serialization.os.system")

    return edit


@pytest.mark.parametrize(
    ("kind", "runs"),
    [
        ("pickled weight", True),
        ("sample inputs", True),
        ("old weights", True),
        ("object", True),
        ("library", False),
        ("path outside", False),
        ("expression", True),
        ("call", True),
        ("enumeration", True),
        ("function", False),
    ],
)
def test_members_that_run_code_are_refused_before_torch_reads_them(
    program: Path, tmp_path: Path, kind: str, runs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    marker, buffer = tmp_path / "marker", io.BytesIO()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "marker.py").write_text("open('marker', 'w')\nclass X: pass")
    monkeypatch.syspath_prepend(tmp_path)
    torch.save(Bomb(marker), buffer)
    bad = _rewritten(program, _crafted(kind, buffer.getvalue(), marker))
    with pytest.raises(ArtifactError):
        fxprune.load(bad)
    assert not marker.exists()
    if runs:  # the file is as harmful as it is meant to be
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with contextlib.suppress(Exception):  # torch fails later, or not
                torch.export.load(bad)
        assert marker.exists()


def test_a_program_inside_a_checkpoint_is_checked_too(path: Path, tmp_path: Path) -> None:
    buffer = io.BytesIO()
    torch.save(Bomb(tmp_path / "marker"), buffer)

    def edit(members: dict[str, bytes]) -> None:
        inner = path.with_name("inner.pt2")
        inner.write_bytes(members["eval.pt2"])
        members["eval.pt2"] = _rewritten(
            inner, _crafted("sample inputs", buffer.getvalue(), tmp_path / "marker")
        ).read_bytes()
        header = json.loads(members["fxprune.json"])
        header["sha256"]["eval.pt2"] = hashlib.sha256(members["eval.pt2"]).hexdigest()
        members["fxprune.json"] = json.dumps(header).encode()

    with pytest.raises(ArtifactError, match="cannot be restored"):
        fxprune.load(_rewritten(path, edit))
    assert not (tmp_path / "marker").exists()


# ---- faults while writing


def _old(path: Path) -> Callable[[], None]:
    path.write_bytes(b"old")

    def check() -> None:
        assert path.read_bytes() == b"old"
        assert [item.name for item in path.parent.iterdir()] == [path.name]

    return check


def test_full_disk_and_read_only_folder_leave_the_old_file(
    tmp_path: Path, traced: fxprune.TracedModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = _old(tmp_path / "m")
    for limit in (100, 9_000, 30_000):  # inside the header, the tensors, a program
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
            with pytest.raises(ExportError, match="larger than the limit"):
                fxprune.save(traced, tmp_path / "m")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        check()
    monkeypatch.setattr(zipfile.ZipFile, "writestr", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(ExportError, match="the disk is full"):
        fxprune.save(traced, tmp_path / "m")
    check()
    monkeypatch.setattr(tempfile, "mkdtemp", lambda **_: (_ for _ in ()).throw(OSError(30, "Read-only")))
    with pytest.raises(ExportError, match="read-only"):
        fxprune.save(traced, tmp_path / "m")
    check()


def _child(work: Callable[[], object]) -> int:
    """Run in a process of its own; returns its id."""
    if not (process := os.fork()):
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    return process


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_killed_and_competing_writers(
    path: Path, captured: fxprune.TracedModule, shrunk: fxprune.TracedModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    fxprune.save(shrunk, other := path.with_name("other"))
    contents = path.read_bytes(), other.read_bytes()
    write = zipfile.ZipFile.writestr

    def killed(archive: zipfile.ZipFile, item: zipfile.ZipInfo, content: bytes) -> None:
        if item.filename == "eval.pt2":
            os.kill(os.getpid(), signal.SIGKILL)
        write(archive, item, content)

    with monkeypatch.context() as patch:
        patch.setattr(zipfile.ZipFile, "writestr", killed)
        process = _child(lambda: fxprune.save(shrunk, path))
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == -signal.SIGKILL
    assert path.read_bytes() == contents[0]  # the old one, though it was being replaced
    running = [_child(lambda m=m: [fxprune.save(m, path) for _ in range(8)]) for m in (captured, shrunk)]
    while running:
        assert path.read_bytes() in contents  # a reader sees one whole file
        for process in list(running):
            found, status = os.waitpid(process, os.WNOHANG)
            if found:
                assert os.waitstatus_to_exitcode(status) == 0
                running.remove(process)
    assert path.read_bytes() in contents
