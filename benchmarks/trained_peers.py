"""Torch-Pruning's importances and onnxsim's structured pruning with its refit, to a share of the multiply-accumulates.

Each cuts a copy of a trained network. Of Torch-Pruning's global and local ranking the one counts that has the lower
loss on calibration samples; heads of attention go whole, as in its examples for transformers. Recurrent layers and
those that give the outputs stay. Its importances that take gradients get them from `Trained.evidence`; Hessian and
OBD-C get squared gradients of samples summed here, since in 1.6.1 `accumulate_grad` keeps the last sample alone, and
the hooks of OBD-C cannot be placed.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from models import macs
from torch import Tensor, nn
from trained_networks import Network, Trained, rows

import fxprune

NEAR = 0.002  # of a budget
SAMPLES = 32  # of a batch, or whose loss decides
ALONE = 16  # samples whose gradients are taken one by one


class NotPossible(Exception):
    """A peer cannot do it; the message says why."""


@dataclass(frozen=True)
class Cut:
    """A pruned network, its share of the multiply-accumulates, and whether it can be trained."""

    network: Any
    share: float

    @property
    def is_trainable(self) -> bool:
        return isinstance(self.network, nn.Module)


def bisected(cut: Callable[[float], Cut], budget: float, tries: int = 12) -> Cut:
    """The network cut at the ratio that comes nearest to a budget from below.

    Raises:
        NotPossible: no ratio reaches it.
    """
    low, high = 0.0, 1.0
    best, least = None, math.inf
    for _ in range(tries):
        middle = (low + high) / 2
        found = cut(middle)
        least = min(least, found.share)
        if found.share > budget:
            low = middle
            continue
        high = middle
        if best is None or found.share > best.share:
            best = found
        if best.share > budget - NEAR:
            break
    if best is None:
        raise NotPossible(f"reaches {least:.3f} of the MACs")
    return best


class TorchPruning:
    """One of its importances on one network; gradients are taken once for all budgets."""

    def __init__(self, name: str, trained: Trained) -> None:
        import torch_pruning

        self._trained = trained
        classes = {
            "magnitude": "GroupMagnitudeImportance", "LAMP": "LAMPImportance", "FPGM": "FPGMImportance",
            "BN scale": "BNScaleImportance", "Taylor": "GroupTaylorImportance", "Hessian": "GroupHessianImportance",
            "OBD-C": "OBDCImportance",
        }  # fmt: skip
        make = getattr(torch_pruning.pruner.importance, classes[name])
        options = {"num_classes": -1} if name == "OBD-C" else {}
        self._model, self._importance = copy.deepcopy(trained.model), make(**options)
        names = {id(module): name for name, module in trained.model.named_modules()}
        self._kept = [self._model.get_submodule(names[id(each)]) for each in trained.kept]
        self._dense = macs(self._model, trained.first(1))
        if name == "Taylor":
            self._take_gradients()
        elif name in ("Hessian", "OBD-C"):
            self._give(name, self._squared_gradients())

    def cut(self, budget: float) -> Cut:
        """The network at a budget."""
        found, reasons = [], []
        for is_global in (True, False):

            def cut(ratio: float, is_global: bool = is_global) -> Cut:
                return self._cut(ratio, is_global)

            try:
                found.append(bisected(cut, budget))
            except NotPossible as reason:
                reasons.append(reason)
        if not found:
            raise reasons[0]
        return min(found, key=lambda each: self._loss(each.network))

    def _losses(self, losses: Callable[[Tensor, Tensor], Tensor], network: Network, which: Tensor) -> Tensor:
        return losses(network(**rows(self._trained.inputs, which)), self._trained.targets[which])

    def _loss(self, network: Network) -> float:
        with torch.no_grad():
            return float(self._losses(self._trained.loss, network, torch.arange(SAMPLES)).mean())

    def _take_gradients(self) -> None:
        for which in torch.arange(len(self._trained.targets)).split(SAMPLES):
            self._losses(self._trained.evidence, self._model, which).sum().backward()

    def _squared_gradients(self) -> dict[Tensor, Tensor]:
        """Of samples one by one, summed; the last one's gradients stay, which the importances ask for."""
        found: dict[Tensor, Tensor] = {}
        for loss in self._losses(self._trained.evidence, self._model, torch.arange(ALONE)):
            self._model.zero_grad()
            loss.backward(retain_graph=True)
            for parameter in self._model.parameters():
                if parameter.grad is not None:
                    found[parameter] = found.get(parameter, 0) + parameter.grad.square()
        return found

    def _give(self, name: str, squared: dict[Tensor, Tensor]) -> None:
        if name == "Hessian":
            self._importance._accu_grad, self._importance._counter = squared, dict.fromkeys(squared, ALONE)
            return
        layers = [each for each in self._model.modules() if isinstance(each, nn.Conv2d | nn.Linear)]
        self._importance.Fisher = {each: squared[each.weight].flatten(1) for each in layers if each.weight in squared}
        self._importance.steps = ALONE

    def _pruner(self, model: nn.Module, importance: Any, kept: list[nn.Module], ratio: float, is_global: bool) -> Any:
        import torch_pruning

        attentions = [each for each in model.modules() if hasattr(each, "num_attention_heads")]
        heads = {layer: each.num_attention_heads for each in attentions for layer in (each.query, each.key, each.value)}
        return torch_pruning.pruner.BasePruner(
            model, self._trained.first(2), importance=importance, pruning_ratio=ratio, head_pruning_ratio=ratio,
            global_pruning=is_global, ignored_layers=kept, num_heads=heads, prune_num_heads=True,
            prune_head_dims=False, max_pruning_ratio=0.95, forward_fn=lambda network, inputs: network(**inputs),
            output_transform=lambda output: output.sum(),
        )  # fmt: skip

    def _cut(self, ratio: float, is_global: bool) -> Cut:
        # one copy of all, so that what the importance holds of parameters and layers is of the copy
        model, importance, kept = copy.deepcopy((self._model, self._importance, self._kept))
        for own, copied in zip(self._model.parameters(), model.parameters(), strict=True):
            copied.grad = None if own.grad is None else own.grad.clone()
        pruner = self._pruner(model, importance, kept, ratio, is_global)
        try:
            pruner.step()
        except (RuntimeError, AttributeError, KeyError, ValueError, IndexError, TypeError) as error:
            raise NotPossible(f"{type(error).__name__}: {_first_line(error)}") from error
        for attention in _attentions(model):
            attention.num_attention_heads = pruner.num_heads[attention.query]
            attention.all_head_size = attention.num_attention_heads * attention.attention_head_size
        model.zero_grad()
        return Cut(model, macs(model, self._trained.first(1)) / self._dense)


class StructuredWanda:
    """onnxsim's `apply_structured_wanda_pruning`, then `apply_pruning_finetune`, on the exported network."""

    def __init__(self, trained: Trained, folder: Path) -> None:
        import onnx

        traced = fxprune.trace(copy.deepcopy(trained.model), (), trained.first(2), modes=("eval",))
        plan = fxprune.finalize(traced).plan
        assert plan is not None
        self._dense = plan.macs[0]
        path = folder / "dense.onnx"
        fxprune.export.to_onnx(fxprune.finalize(traced, shrink=False), path)
        self._file, self._folder = onnx.load(path), folder
        self._data = [{name: each[name].numpy() for name in each} for each in trained.batches()]
        self._counted = _onnx_macs(self._file)

    def cut(self, budget: float) -> Cut:
        """The file at a budget, of the multiply-accumulates of the whole network."""
        import onnx
        import onnxsim

        found = bisected(self._cut, budget)
        fitted = onnxsim.apply_pruning_finetune(self._file, found.network, calibration_data=self._data)
        path = self._folder / f"{budget}.onnx"
        onnx.save(fitted, path)
        session = fxprune.export.Session(path)

        def run(**inputs: Tensor) -> Tensor:
            (output,) = session.run(inputs).values()
            return output

        return Cut(run, found.share)

    def _cut(self, ratio: float) -> Cut:
        import onnxsim

        found = onnxsim.apply_structured_wanda_pruning(self._file, calibration_data=self._data, sparsity=ratio)
        return Cut(found, 1 - (self._counted - _onnx_macs(found)) / self._dense)


def _attentions(model: nn.Module) -> list[Any]:
    return [each for each in model.modules() if hasattr(each, "num_attention_heads")]


def _onnx_macs(file: Any) -> float:
    """Multiply-accumulates of one sample, those of recurrent layers aside, by onnxsim's counter."""
    from onnxsim.model_info import ModelInfo

    counted = ModelInfo(file).macs
    symbols: set[Any] = getattr(counted, "free_symbols", set())  # of a batch of any size
    return float(counted.subs(dict.fromkeys(symbols, 1)) if symbols else counted)


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
