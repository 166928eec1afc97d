"""How a cost grows with the number of layers or samples: CPU seconds at each size, and their ratio to the size before.

What grows in proportion doubles at most with twice the size; what walks the whole graph once for each layer comes near
four times. Networks have random weights; ResNets see images of 64 x 64, BERTs of width 128 sequences of 32.

Run: python benchmarks/scaling.py [cost ...] [--sizes 50 100 200 400] [--rounds 2]
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from models import cnn
from torch import nn

import fxprune

# prepares a network of so many layers, or so many samples; what it returns is called once, timed
Cost = Callable[[int], Callable[[], object]]


def chain(layers: int) -> nn.Sequential:
    """So many linear layers of width 8, one after another."""
    return nn.Sequential(*(nn.Linear(8, 8) for _ in range(layers)))


def captured(layers: int) -> fxprune.TracedModule:
    """The chain, traced in both modes."""
    return fxprune.trace(chain(layers), (torch.randn(2, 8),))


def saved(traced: fxprune.TracedModule) -> Path:
    """The module in a file of its own, without graphs."""
    path = Path(tempfile.mkdtemp()) / "model.fxp"
    fxprune.save(traced, path, programs=False)
    return path


def load_masks(layers: int) -> Callable[[], object]:
    """A checkpoint with a mask on every weight, into the dense model."""
    path = saved(fxprune.prune.l1_unstructured(captured(layers), "*.weight", amount=0.5))
    return lambda: fxprune.load(path, chain(layers))


def load_masks_traced(layers: int) -> Callable[[], object]:
    """The same into the traced dense model: without the time of the capture."""
    traced = captured(layers)
    path = saved(fxprune.prune.l1_unstructured(captured(layers), "*.weight", amount=0.5))
    return lambda: fxprune.load(path, traced)


def load_carried(layers: int) -> Callable[[], object]:
    """A finalized checkpoint into a model that carries a mask on every weight, which is folded first."""
    path = saved(fxprune.finalize(captured(layers), shrink=False, verify=False))
    traced = fxprune.prune.l1_unstructured(captured(layers), "*.weight", amount=0.5)
    return lambda: fxprune.load(path, traced)


def load_norms(layers: int) -> Callable[[], object]:
    """A checkpoint with a weight norm on every weight, into the traced dense model."""
    traced, dense = captured(layers), captured(layers)
    for i in range(layers):
        fxprune.weight_norm(traced, f"{i}.weight")
    path = saved(traced)
    return lambda: fxprune.load(path, dense)


def convolutions(layers: int) -> fxprune.TracedModule:
    """So many convolutions of width 8 with a batch norm each, traced in both modes."""
    blocks = (nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.ReLU()) for _ in range(layers))
    return fxprune.trace(nn.Sequential(*blocks).eval(), (torch.randn(2, 8, 4, 4),))


def insert_masks(layers: int) -> Callable[[], object]:
    """A mask on every weight of a copy, by one call."""
    traced = captured(layers)
    return lambda: fxprune.prune.l1_unstructured(copy.deepcopy(traced), "*.weight", amount=0.5)


def remove_masks(layers: int) -> Callable[[], object]:
    """The masks of every weight of a copy made permanent, by one call."""
    traced = fxprune.prune.l1_unstructured(captured(layers), "*.weight", amount=0.5)
    return lambda: fxprune.prune.remove(copy.deepcopy(traced), "*.weight")


def fold_batch_norms(layers: int) -> Callable[[], object]:
    """Every batch norm folded into the convolution before it, in a copy."""
    traced = convolutions(layers)
    return lambda: fxprune.passes.FoldBatchNorm()(copy.deepcopy(traced))


def prune_channels(layers: int) -> Callable[[], object]:
    """Half of all channels masked, in a copy: the analysis of groups, scores, and the masks of all parameters."""
    traced = convolutions(layers)
    return lambda: fxprune.prune.channels(copy.deepcopy(traced), amount=0.5)


def encoder(layers: int) -> nn.Module:
    """A BERT's of so many layers."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(hidden_size=128, num_hidden_layers=layers, num_attention_heads=4, intermediate_size=512)
    return States(BertModel(config, add_pooling_layer=False).encoder.eval())


def bert(layers: int, samples: int) -> tuple[fxprune.TracedModule, list[torch.Tensor]]:
    """An encoder of so many layers, and batches of embedded sequences."""
    model = encoder(layers)
    data = torch.randn(samples, 32, 128)
    return fxprune.trace(model, (data[:2],), modes=("eval",)), list(data.split(32))


class States(nn.Module):
    """The last hidden states alone."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        states: torch.Tensor = self.encoder(x).last_hidden_state
        return states


def resnet(layers: int) -> tuple[fxprune.TracedModule, list[torch.Tensor]]:
    """ResNet-18, 50 or 152, and batches of 64 images."""
    model, data = cnn(f"resnet{layers}").eval(), torch.randn(64, 3, 64, 64)
    model.features.final_pool = nn.AdaptiveAvgPool2d(1)
    return fxprune.trace(model, (data[:2],), modes=("eval",)), list(data.split(32))


def measuring(given: tuple[fxprune.TracedModule, list[torch.Tensor]]) -> Callable[[], object]:
    """The curves of all groups."""
    return lambda: fxprune.sensitivity(*given)


def repairing(given: tuple[fxprune.TracedModule, list[torch.Tensor]]) -> Callable[[], object]:
    """The repair of a copy with half of its multiply-accumulates."""
    traced, batches = given
    fxprune.prune.channels(traced, macs=0.5)
    return lambda: fxprune.reconstruct(copy.deepcopy(traced), batches)


def finalize_width(layers: int) -> Callable[[], object]:
    """A BERT between two linear layers, narrowed to three quarters of its width."""
    model = nn.Sequential(nn.Linear(16, 128), encoder(layers), nn.Linear(128, 3)).eval()
    traced = fxprune.trace(model, (torch.randn(2, 32, 16),), modes=("eval",))
    fxprune.prune.channels(traced, 0.25, kinds="width", round_to=1)
    return lambda: fxprune.finalize(traced, align=1)


def sensitivity_bert(layers: int) -> Callable[[], object]:
    """Curves of BERTs, 128 samples."""
    return measuring(bert(layers, 128))


def reconstruct_bert(layers: int) -> Callable[[], object]:
    """Repair of BERTs, 128 samples."""
    return repairing(bert(layers, 128))


def sensitivity_resnet(layers: int) -> Callable[[], object]:
    """Curves of ResNets."""
    return measuring(resnet(layers))


def reconstruct_resnet(layers: int) -> Callable[[], object]:
    """Repair of ResNets."""
    return repairing(resnet(layers))


def sensitivity_samples(samples: int) -> Callable[[], object]:
    """Curves of a BERT of four layers."""
    return measuring(bert(4, samples))


def reconstruct_samples(samples: int) -> Callable[[], object]:
    """Repair of a BERT of four layers."""
    return repairing(bert(4, samples))


SIZES = {
    **dict.fromkeys(("finalize_width", "sensitivity_bert", "reconstruct_bert"), (2, 4, 8, 16, 24)),
    **dict.fromkeys(("sensitivity_resnet", "reconstruct_resnet"), (18, 50, 152)),
    **dict.fromkeys(("sensitivity_samples", "reconstruct_samples"), (64, 128, 256, 512)),
}
COSTS: dict[str, Cost] = {
    cost.__name__: cost
    for cost in (
        load_masks,
        load_masks_traced,
        load_carried,
        load_norms,
        insert_masks,
        remove_masks,
        fold_batch_norms,
        prune_channels,
        finalize_width,
        sensitivity_bert,
        reconstruct_bert,
        sensitivity_resnet,
        reconstruct_resnet,
        sensitivity_samples,
        reconstruct_samples,
    )
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("costs", nargs="*", choices=[*COSTS, []], default=[])
    parser.add_argument("--sizes", type=int, nargs="+", help="numbers of layers or samples")
    parser.add_argument("--rounds", type=int, default=2, help="of which the fastest counts")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for name in options.costs or COSTS:
        before = None
        unit = "samples" if name.endswith("samples") else "layers"
        for size in options.sizes or SIZES.get(name, (50, 100, 200, 400)):
            call, seconds = COSTS[name](size), []
            for _ in range(options.rounds):
                start = time.process_time()  # of this process alone: the machine may have other work
                call()
                seconds.append(time.process_time() - start)
            ratio = f"  x {min(seconds) / before:.2f}" if before else ""
            before = min(seconds)
            print(f"{name:20} {size:5} {unit} {before:8.3f} s{ratio}", flush=True)


if __name__ == "__main__":
    main()
