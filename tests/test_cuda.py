"""The whole way on a GPU: what is computed there is what the CPU computes, and nothing is left on the other device."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import fxprune
from tests.networks import NETWORKS, Residual

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    # a deep copy of a recurrent layer has its weights apart
    pytest.mark.filterwarnings("ignore:RNN module weights are not part of single contiguous chunk:UserWarning"),
]


@pytest.fixture(autouse=True)
def _exact_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def residual() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return Residual().double().eval().cuda(), torch.randn(3, 3, 6, 6, device="cuda").double()


def error(want: Tensor, got: Tensor) -> float:
    assert want.shape == got.shape
    assert want.isfinite().all()
    want, got = want.detach().cpu(), got.detach().cpu()
    return float((want - got).abs().max() / want.abs().max())


def pruned() -> tuple[fxprune.TracedModule, Tensor]:
    model, x = residual()
    traced = fxprune.trace(model, (x,))
    fxprune.prune.channels(traced, macs=0.5, round_to=1)
    return traced, x


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_a_capture_equals_eager(name: str, mode: str) -> None:
    torch.manual_seed(0)
    build, sample, _ = NETWORKS[name]
    model, x = build().cuda(), sample(3).cuda()
    traced = fxprune.trace(model, (x,))
    results = []
    for module in (copy.deepcopy(model), traced):
        module.train(mode == "train")
        torch.manual_seed(1)
        results.append(module(x))
    assert torch.equal(*results)


def test_masks_are_those_of_the_cpu() -> None:
    torch.manual_seed(0)
    model, x = Residual(), torch.randn(3, 3, 6, 6)
    on_cpu = fxprune.trace(model, (x,), modes=("eval",))
    on_gpu = fxprune.trace(copy.deepcopy(model).cuda(), (x.cuda(),), modes=("eval",))
    for traced in (on_cpu, on_gpu):
        fxprune.prune.l1_unstructured(traced, "stem.weight", amount=0.3)
        fxprune.prune.ln_structured(traced, "inner.weight", amount=2, n=2, dim=0)
        fxprune.prune.global_unstructured(traced, "*.weight", prune.L1Unstructured, amount=0.4)
        fxprune.prune.nm_structured(traced, "head.weight", n=2, m=4)
    masks = {name: buffer for name, buffer in on_gpu.named_buffers() if name.endswith("_mask")}
    assert masks
    for name, mask in masks.items():
        assert mask.is_cuda
        assert torch.equal(mask.cpu(), on_cpu.get_buffer(name))


def test_channels_go_exactly_and_the_plan_is_that_of_the_cpu() -> None:
    traced, _ = pruned()
    final = fxprune.finalize(traced.eval(), align=1)
    assert final.plan is not None
    assert final.plan.macs[1] < final.plan.macs[0]
    assert all(tensor.is_cuda for tensor in (*final.parameters(), *final.buffers()))
    for batch in (1, 4):
        inputs = torch.randn(batch, 3, 6, 6, device="cuda").double()
        assert error(traced(inputs), final(inputs)) < 1e-9
    on_cpu = fxprune.finalize(copy.deepcopy(traced).cpu(), align=1)
    assert on_cpu.plan is not None
    assert {name: {a: i.tolist() for a, i in axes.items()} for name, axes in final.plan.kept.items()} == {
        name: {a: i.tolist() for a, i in axes.items()} for name, axes in on_cpu.plan.kept.items()
    }


def test_a_module_moves_to_the_gpu_after_it_was_traced() -> None:
    model, x = residual()
    traced = fxprune.trace(copy.deepcopy(model).cpu(), (x.cpu(),)).cuda().eval()
    assert error(model(x), traced(x)) < 1e-12
    final = fxprune.finalize(fxprune.prune.channels(traced, macs=0.6, round_to=1) and traced)
    assert error(traced(x), final(x)) < 1e-9


@pytest.mark.parametrize("norm", ["weight_norm", "spectral_norm"])
def test_norms_train_and_fold(norm: str) -> None:
    model, x = residual()
    traced = getattr(fxprune, norm)(fxprune.trace(model, (x,)), "inner.weight")
    optimizer = torch.optim.SGD(traced.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        traced.train()(x).square().mean().backward()
        optimizer.step()
    final = fxprune.finalize(traced.eval(), shrink=False)
    assert torch.equal(traced(x), final(x))


def test_scaled_gradients_are_clipped_and_training_goes_on_after_the_removal() -> None:
    traced, x = pruned()
    traced.train()
    optimizer = torch.optim.AdamW(traced.parameters(), lr=1e-2)
    clip = fxprune.clip_gradients(optimizer, max_norm=0.5)
    scaler = torch.amp.GradScaler("cuda", init_scale=1024.0)
    for _ in range(3):
        optimizer.zero_grad()
        scaler.scale(traced(x).square().sum()).backward()
        scaler.step(optimizer)
        scaler.update()
    assert clip.total_norm is not None
    assert clip.total_norm.is_cuda
    final = fxprune.finalize(traced, align=1).train()
    after = fxprune.optimizer_after(final, optimizer)
    final(x).sum().backward()
    after.step()
    assert all(p.isfinite().all() for p in final.parameters())


def test_gradients_score_channels() -> None:
    model, x = residual()
    traced = fxprune.trace(model, (x,))
    batches: list[Any] = [(x, torch.randint(5, (3,), device="cuda")) for _ in range(2)]
    report = fxprune.prune.channels(
        traced, macs=0.6, importance="taylor", loader=batches, loss=nn.functional.cross_entropy, round_to=1
    )
    assert report.macs[1] <= 0.6 * report.macs[0]


def test_checkpoints_come_back_on_the_cpu_and_on_the_models_device(tmp_path: Path) -> None:
    traced, x = pruned()
    fxprune.save(traced, tmp_path / "model.fxp")
    plain = fxprune.load(tmp_path / "model.fxp")
    assert not any(tensor.is_cuda for tensor in (*plain.parameters(), *plain.buffers()))
    assert error(traced.eval()(x), plain.eval()(x.cpu())) < 1e-12
    into = fxprune.load(tmp_path / "model.fxp", residual()[0])
    assert all(tensor.is_cuda for tensor in (*into.parameters(), *into.buffers()))
    assert torch.equal(into.eval()(x), traced(x))


def test_files_compute_what_the_gpu_computed(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Residual().eval().cuda(), torch.randn(3, 3, 6, 6, device="cuda")
    traced = fxprune.trace(model, (x,), modes=("eval",))
    fxprune.prune.channels(traced, macs=0.5, round_to=1)
    final = fxprune.finalize(traced)
    fxprune.export.to_onnx(final, tmp_path / "model.onnx")
    fxprune.export.to_program(final, tmp_path / "model.pt2")
    report = fxprune.compare(traced, final, tmp_path / "model.onnx", tmp_path / "model.pt2", inputs=(x,))
    assert report.ok, report.table()


def test_the_users_class_gets_the_sizes_back() -> None:
    traced, x = pruned()
    final = fxprune.finalize(traced.eval(), align=1)
    small = fxprune.write_back(final, residual()[0])
    assert all(parameter.is_cuda for parameter in small.parameters())
    assert error(final(x), small(x)) < 1e-9


class Attention(nn.Module):
    """Two heads over steps, and a layer behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(8, 8) for _ in range(4))
        self.up, self.down = nn.Linear(8, 24), nn.Linear(24, 4)

    def forward(self, x: Tensor) -> Tensor:
        heads = (each(x).unflatten(-1, (2, 4)).transpose(1, 2) for each in (self.query, self.key, self.value))
        mixed = nn.functional.scaled_dot_product_attention(*heads)
        return self.down(torch.tanh(self.up(self.out(mixed.transpose(1, 2).flatten(2)))))


@pytest.mark.parametrize("budget", [0.8, 0.5])
def test_channels_chosen_by_data_and_repaired_are_those_of_the_cpu(budget: float) -> None:
    torch.manual_seed(0)
    model, x = Attention().double().eval(), torch.randn(40, 5, 8, dtype=torch.float64)
    outputs = []
    for device in ("cpu", "cuda"):
        batches = [*x.to(device).split(10)]
        traced = fxprune.trace(copy.deepcopy(model).to(device), (batches[0],), modes=("eval",))
        fxprune.prune.channels(traced, macs=budget, importance="obs", loader=batches)
        fxprune.reconstruct(traced, batches)
        outputs.append(traced.eval()(x.to(device)).detach())
    assert error(*outputs) < 1e-6
