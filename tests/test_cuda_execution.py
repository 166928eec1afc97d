"""How modules are run on a GPU: autocast, scaled steps, `torch.compile`, CUDA graphs, halves, one process of FSDP2."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, TensorDataset

import fxprune
from fxprune.graph.equality import error
from tests import random_networks, random_recurrent, random_streams
from tests.networks import NETWORKS, Residual
from tests.training_runs import channel_schedule, examples, small_network

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    # a deep copy of a recurrent layer has its weights apart
    pytest.mark.filterwarnings("ignore:RNN module weights are not part of single contiguous chunk:UserWarning"),
]
DEVICE = "cuda"
HALVES = (torch.float16, torch.bfloat16)


@pytest.fixture(autouse=True)
def _exact_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def images(batch: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(batch, 3, 6, 6, device=DEVICE).to(dtype)


def pruned(dtype: torch.dtype = torch.float64) -> tuple[fxprune.TracedModule, fxprune.TracedModule]:
    """A network at half of its multiply-adds, masked and finalized, in eval mode."""
    torch.manual_seed(0)
    traced = fxprune.trace(Residual().to(DEVICE, dtype), (images(3, dtype),))
    fxprune.prune.channels(traced, macs=0.5, round_to=1)
    return traced.eval(), fxprune.finalize(traced.eval(), align=1)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    "draw",
    [
        random_networks.network,
        lambda seed: random_networks.network(seed, words=True),
        random_recurrent.recurrent_network,
        random_streams.streams,
    ],
    ids=["images", "tokens", "recurrent", "streams"],
)
def test_dead_channels_of_random_networks_go_exactly(draw: Callable[[int], Any], seed: int) -> None:
    model, inputs = draw(seed)
    traced = fxprune.trace(model.to(DEVICE), (inputs(3).to(DEVICE),), modes=("eval",)).eval()
    final = fxprune.finalize(traced)
    for batch in (1, 4):
        x = inputs(batch).to(DEVICE)
        assert error(model(x), final(x)) < 1e-9


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", NETWORKS)
def test_autocast_does_to_a_capture_what_it_does_to_eager(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    build, sample, _ = NETWORKS[name]
    model, x = build().to(DEVICE), sample(4).to(DEVICE)
    traced = fxprune.trace(model, (x,))
    found = []
    for module in (copy.deepcopy(model), traced):
        torch.manual_seed(1)
        with torch.autocast(DEVICE, dtype):
            output = module.train()(x)
        output.float().square().mean().backward()
        found.append((output.detach(), *(each.grad for each in module.parameters())))
    assert found[0][0].dtype == found[1][0].dtype
    for want, got in zip(*found, strict=True):
        assert torch.equal(want, got)


def test_masked_and_finalized_modules_run_in_half_precision_and_by_channels_last() -> None:
    masked, final = pruned(torch.float32)
    for dtype in HALVES:
        for module in (masked, final):
            cast = copy.deepcopy(module).to(dtype=dtype, memory_format=torch.channels_last)
            x = images(4)
            assert error(masked(x), cast(x.to(dtype, memory_format=torch.channels_last)).float()) < 0.05


@pytest.mark.filterwarnings("ignore")  # of what torch.compile warns is its own
@pytest.mark.parametrize("which", [0, 1], ids=["masked", "finalized"])
def test_compiled_modules_compute_and_learn_the_same(which: int) -> None:
    module = pruned()[which]
    compiled = torch.compile(copy.deepcopy(module), dynamic=True)
    gradients = []
    for each in (module, compiled):
        for batch in (3, 5):
            torch.manual_seed(batch)
            each(images(batch, torch.float64)).square().mean().backward()
        gradients.append([p.grad for p in each.parameters()])
    for want, got in zip(*gradients, strict=True):
        assert error(want, got) < 1e-9


@pytest.mark.parametrize("which", [0, 1], ids=["masked", "finalized"])
def test_cuda_graphs_replay_new_inputs(which: int) -> None:
    module, fixed = pruned()[which], images(4, torch.float64)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side), torch.no_grad():
        module(fixed)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        output = module(fixed)
    for _ in range(2):
        x = images(4, torch.float64)
        fixed.copy_(x)
        graph.replay()
        assert error(module(x), output) < 1e-12


def test_moments_of_convolutions_choose_and_repair_as_on_the_cpu() -> None:
    torch.manual_seed(0)
    model, x = Residual().double().eval(), torch.randn(60, 3, 6, 6, dtype=torch.float64)
    outputs, kept = [], []
    for device in ("cpu", DEVICE):
        batches = [*x.to(device).split(20)]
        traced = fxprune.trace(copy.deepcopy(model).to(device), (batches[0],), modes=("eval",)).eval()
        fxprune.prune.channels(traced, macs=0.6, importance="obs", loader=batches, round_to=1)
        fxprune.reconstruct(traced, batches)
        kept.append({name: buffer.cpu() for name, buffer in traced.named_buffers() if name.endswith("_mask")})
        outputs.append(traced(x.to(device)).detach().cpu())
    assert kept[0].keys() == kept[1].keys()
    for name, mask in kept[0].items():
        assert torch.equal(mask, kept[1][name])
    assert error(*outputs) < 1e-6


def test_the_first_node_that_differs_is_found_on_the_device() -> None:
    masked, _ = pruned(torch.float32)
    other = copy.deepcopy(masked)
    with torch.no_grad():
        other.get_parameter("inner_norm.weight_orig").mul_(2)
    report = fxprune.compare(masked, other, inputs=(images(4),))
    assert not report.ok
    assert "inner" in report.table()


@pytest.fixture
def cuda_provider() -> tuple[str, ...]:
    import onnxruntime

    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        pytest.skip("onnxruntime has no CUDA provider")
    return ("CUDAExecutionProvider", "CPUExecutionProvider")


def test_files_run_on_the_gpu_in_onnxruntime_and_are_compared_there(
    cuda_provider: tuple[str, ...], tmp_path: Path
) -> None:
    masked, final = pruned(torch.float32)
    for module, name in ((masked, "masked"), (final, "final")):
        written = fxprune.export.to_onnx(module, tmp_path / f"{name}.onnx", providers=cuda_provider)
        assert written.comparison is not None
        assert written.comparison.ok, written.comparison.table()
    session = fxprune.export.Session(tmp_path / "final.onnx", cuda_provider)
    assert session.placement["CUDAExecutionProvider"] > 0
    x = images(5)
    (found,) = session.run(x).values()
    assert error(masked(x).cpu(), found) < 1e-5
    latencies = fxprune.export.bench([tmp_path / "masked.onnx", tmp_path / "final.onnx"], providers=cuda_provider)
    assert len(latencies) == 2


@pytest.mark.filterwarnings("ignore::fxprune.errors.FxpruneWarning")  # a network this small is hardly made faster
def test_a_budget_of_latency_is_measured_by_onnxruntime_on_the_gpu(cuda_provider: tuple[str, ...]) -> None:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 256, 3), nn.ReLU(), nn.Conv2d(256, 256, 3), nn.ReLU(), nn.Conv2d(256, 8, 3)]
    model, x = nn.Sequential(*layers).eval().to(DEVICE), torch.randn(8, 3, 40, 40, device=DEVICE)
    traced = fxprune.trace(model, (x,), modes=("eval",)).eval()
    report = fxprune.prune.channels(traced, speedup=1.3, providers=cuda_provider, batch=8)
    assert report.macs[1] < report.macs[0]


def test_vectors_of_parameters_stay_on_the_device() -> None:
    masked, _ = pruned()
    vector = nn.utils.parameters_to_vector(masked.parameters())
    assert vector.is_cuda
    nn.utils.vector_to_parameters(2 * vector, masked.parameters())
    assert torch.equal(nn.utils.parameters_to_vector(masked.parameters()), 2 * vector)


class Steps:
    """A loop that scales its loss, with autocast, as users write it."""

    def __init__(self) -> None:
        self.traced = fxprune.trace(small_network().to(DEVICE), (examples(4)[0].to(DEVICE),)).train()
        self.optimizer = torch.optim.AdamW(self.traced.parameters(), lr=1e-2)
        self.clip = fxprune.clip_gradients(self.optimizer, max_norm=1.0)
        self.schedule = channel_schedule(self.traced)
        self.scaler = torch.amp.GradScaler(DEVICE, init_scale=2.0**30)

    def run(self, epochs: int) -> list[float]:
        inputs, labels = (each.to(DEVICE) for each in examples())
        losses = []
        for batch in range(4 * epochs):
            rows = slice(8 * (batch % 4), 8 * (batch % 4) + 8)
            self.optimizer.zero_grad()
            with torch.autocast(DEVICE, torch.float16):
                loss = nn.functional.cross_entropy(self.traced(inputs[rows]), labels[rows])
            self.scaler.scale(loss).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.schedule.step()
            losses.append(float(loss.detach()))
        return losses


def test_steps_that_overflow_are_skipped_and_masks_and_clipping_go_on() -> None:
    steps = Steps()
    before = copy.deepcopy(steps.traced.state_dict())
    steps.run(1)
    assert steps.scaler.get_scale() < 2.0**30  # which overflows float16
    losses = steps.run(50)
    assert steps.schedule.done
    assert steps.clip.total_norm is not None
    assert steps.clip.total_norm.isfinite()
    assert sum(losses[-4:]) < sum(losses[:4])
    assert not torch.equal(before["7.weight"], steps.traced.state_dict()["7.weight"])
    final = fxprune.finalize(steps.traced.eval(), align=1)
    x = examples()[0].to(DEVICE)
    assert error(steps.traced(x), final(x)) < 1e-5
    assert final.plan is not None
    assert final.plan.macs[1] < 0.6 * final.plan.macs[0]


@pytest.fixture
def _group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("nccl", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("_group")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("importance", ["l2", "taylor", "obs"])
def test_a_module_that_one_process_has_sharded_is_pruned_as_one_that_is_whole(importance: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Residual().to(DEVICE).eval(), images(12)
    options: dict[str, Any] = {} if importance == "l2" else {"loader": [(x, torch.arange(12, device=DEVICE) % 5)]}
    if importance == "taylor":
        options["loss"] = nn.functional.cross_entropy
    if importance == "obs":
        options["loader"] = [*x.split(4)]
    found = []
    for spread in (False, True):
        traced = fxprune.trace(copy.deepcopy(model), (x[:3],)).eval()
        if spread:
            fully_shard(traced, mesh=init_device_mesh(DEVICE, (1,)))
        fxprune.prune.global_unstructured(traced, "*.weight", torch.nn.utils.prune.L1Unstructured, amount=0.2)
        fxprune.prune.channels(traced, macs=0.6, round_to=1, importance=importance, **options)
        if importance == "obs":
            fxprune.reconstruct(traced, options["loader"])
        whole, parts = (fxprune.finalize(traced, whole=each, align=1).eval() for each in (True, False))
        fxprune.save(parts, tmp_path / f"{spread}.fxp")
        loaded = fxprune.load(tmp_path / f"{spread}.fxp").eval()
        written = fxprune.export.to_onnx(parts, tmp_path / f"{spread}.onnx")
        assert written.comparison is not None
        assert written.comparison.ok
        found.append([whole.to(DEVICE)(x), parts(x), loaded.to(DEVICE)(x)])
    for output in (*found[0][1:], *found[1]):
        assert error(found[0][0].detach(), output.detach()) < 1e-5


@pytest.mark.usefixtures("_torchvision_operators")
def test_the_trainer_of_lightning_trains_in_halves(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning.pytorch")
    from fxprune.callbacks.lightning import FxpruneCallback

    class Classifier(lightning.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.net = fxprune.trace(small_network(), (examples(4)[0],)).train()

        def training_step(self, batch: Any, index: int) -> Any:
            return nn.functional.cross_entropy(self.net(batch[0]).float(), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=1e-2)

    module = Classifier()
    callback = FxpruneCallback(channel_schedule(module.net), finalize={"align": 1})
    trainer = lightning.Trainer(
        max_epochs=4, accelerator="gpu", devices=1, precision="16-mixed", default_root_dir=tmp_path,
        callbacks=[callback], logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False,
    )  # fmt: skip
    trainer.fit(module, DataLoader(TensorDataset(*examples()), batch_size=8))
    assert_ended(callback.pruning, module.net)


def test_the_trainer_of_transformers_trains_in_halves(tmp_path: Path, transformers: Any) -> None:
    pytest.importorskip("accelerate")
    from fxprune.callbacks.transformers import FxpruneCallback
    from tests.fxprune.callbacks.test_transformers import traced_classifier, trainer_of

    traced = traced_classifier()
    callback = FxpruneCallback(channel_schedule(traced), finalize={"align": 1})
    trainer_of(transformers, traced, tmp_path, [callback], use_cpu=False, fp16=True).train()
    assert_ended(callback.pruning, traced)


def assert_ended(pruning: Any, traced: fxprune.TracedModule) -> None:
    assert pruning.schedule.done
    assert all(parameter.isfinite().all() for parameter in traced.parameters())
    final = pruning.finished.final
    assert final.plan.macs[1] < 0.6 * final.plan.macs[0]
