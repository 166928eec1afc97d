"""Which share of the dead channels goes, counted on Torch-Pruning's groups: a structure that was found independently.

Half of the rows of every layer are zero, the same ones in every layer. A channel of a group is dead when every layer
that writes it has a row of zeros for it, and no layer that reads it sees it differ between two images: the indices that
Torch-Pruning gives behind nested concatenations do not always belong together.

Run: python benchmarks/completeness.py [network ...]
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch_pruning
from command import names, prepare
from models import cnn
from torch import nn

import fxprune

LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.Linear)
FAMILIES = (
    "resnet18", "resnet50", "bn_vgg16", "mobilenet_w1", "mobilenetv2_w1", "densenet121", "preresnet18",
    "resnext50_32x4d", "seresnet18", "senet16", "squeezenet_v1_0", "mnasnet_b1", "ghostnet", "mobilenetv3_large_w1",
    "efficientnet_b0", "darknet53", "alexnet", "peleenet", "inceptionv3", "inceptionresnetv2", "xception",
    "hrnet_w18_small_v1", "vovnet27s", "selecsls42b", "dla34", "regnetx002", "regnety002", "cbam_resnet18",
    "hardnet39ds", "ibn_resnet50", "scnet50", "bninception",
)  # fmt: skip


def mask(model: nn.Module) -> None:
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.3)
        if isinstance(module, LAYERS) and module.weight.shape[0] > 1:
            module.weight.data[: module.weight.shape[0] // 2] = 0


class Reference:
    """Torch-Pruning's groups of a masked model, and what is alive in them."""

    def __init__(self, model: nn.Module, x: torch.Tensor) -> None:
        self.layers = {name: m for name, m in model.named_modules() if isinstance(m, LAYERS)}
        self.names = {module: name for name, module in self.layers.items()}
        self.varies: dict[nn.Module, torch.Tensor] = {}
        handles = [m.register_forward_pre_hook(self._watch) for m in self.layers.values()]
        with torch.no_grad():
            model(x)
        for handle in handles:
            handle.remove()
        self.graph = torch_pruning.DependencyGraph().build_dependency(model, x)

    def _watch(self, layer: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        difference = (inputs[0][0] - inputs[0][1]).abs()
        self.varies[layer] = difference.flatten(1).amax(1) > 0 if difference.dim() > 1 else difference > 0

    def _members(self, group: torch_pruning.Group) -> Iterator[tuple[int, str, int, bool]]:
        """(index of the root, name of a layer that writes or "", index, whether it is alive there)"""
        for item in group:
            dependency, idxs = item
            layer = dependency.target.module
            if isinstance(layer, LAYERS):
                writes = self.graph.is_out_channel_pruning_fn(dependency.handler)
                live = layer.weight.flatten(1).any(1) if writes else self.varies[layer]
                for i, root in zip(idxs, item.root_idxs, strict=True):
                    if i < len(live):
                        yield root, self.names[layer] if writes else "", i, bool(live[i])

    def dead(self) -> set[tuple[str, int]]:
        """(layer, row) of the channels that are dead in every layer of their group."""
        found = set()
        for group in self.graph.get_all_groups(root_module_types=list(LAYERS)):
            members = list(self._members(group))
            alive = {root for root, _, _, live in members if live}
            found |= {(name, i) for root, name, i, _ in members if name and root not in alive}
        return found

    def is_dead(self, name: str, index: int) -> bool:
        """As `dead` for one channel: exact where several indices of a group belong together, and slower."""
        layer = self.layers[name]
        prune = self.graph.get_pruner_of_module(layer).prune_out_channels
        return not any(live for *_, live in self._members(self.graph.get_pruning_group(layer, prune, [index])))


def main() -> None:
    prepare()
    total = [0, 0]
    for name in names(FAMILIES):
        model = cnn(name).eval().double()
        x = torch.randn(2, 3, *model.in_size).double()  # type: ignore[arg-type]
        mask(model)
        reference = Reference(model, x)
        rows = {(layer, i) for layer, i in reference.dead() if layer != list(reference.layers)[-1]}  # the outputs
        final = fxprune.finalize(fxprune.trace(model, (x,), modes=("eval",)), align=1)
        kept = final.plan.kept
        gone = {(n, i) for n, i in rows if f"{n}.weight" not in kept or i not in kept[f"{n}.weight"][0]}
        rows = gone | {(n, i) for n, i in rows - gone if reference.is_dead(n, i)}
        left = {f"{n}.weight" for n, i in rows} & {entry[0] for entry in final.plan.stayed}
        reasons = sorted({why for layer, _, _, why in final.plan.stayed if layer in left})
        total = [total[0] + len(rows), total[1] + len(gone)]
        before, after = final.plan.macs
        share = f"{len(gone)} of {len(rows)} ({len(gone) / max(len(rows), 1):.4f})"
        print(f"{name}: {share}; MACs left {after / before:.3f}", flush=True)
        for why in reasons[:6]:
            print(f"    stayed: {why}")
    print(f"all: {total[1]} of {total[0]} ({total[1] / max(total[0], 1):.4f})")


if __name__ == "__main__":
    main()
