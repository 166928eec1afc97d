"""CPU seconds of each step, a node of the graph, as networks get deeper: what grows faster than the graph shows.

ResNets of pytorchcv see images of 64 x 64, BERTs and Llamas of width 128 sequences of 32, U-Nets of width 16 (two
levels; a block is a convolution, a group norm and SiLU) images of 32 x 32. Weights are random. Each step runs once on
each size, since none of them is short; `channels` asks for 0.7 of the multiply-accumulates.

Run: python benchmarks/steps_time.py [resnet bert llama unet] [--profile STEP] [--smallest]
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from command import declare_torchvision
from models import cnn
from torch import nn

import fxprune

Built = tuple[nn.Module, torch.Tensor]
STEPS = ("trace", "channels", "finalize", "compare")


def resnet(layers: int) -> Built:
    """ResNet-50, 101 or 152."""
    model = cnn(f"resnet{layers}").eval()
    model.features.final_pool = nn.AdaptiveAvgPool2d(1)
    return model, torch.randn(2, 3, 64, 64)


def bert(layers: int) -> Built:
    """An encoder with its embeddings."""
    declare_torchvision()
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    sizes: dict[str, Any] = dict(hidden_size=128, num_attention_heads=4, intermediate_size=512, vocab_size=1000)
    return BertModel(BertConfig(num_hidden_layers=layers, **sizes)).eval(), torch.randint(1, 1000, (2, 32))


def llama(layers: int) -> Built:
    """A decoder without its cache."""
    declare_torchvision()
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes: dict[str, Any] = dict(hidden_size=128, num_attention_heads=4, num_key_value_heads=2, intermediate_size=384)
    config = LlamaConfig(num_hidden_layers=layers, vocab_size=1000, use_cache=False, **sizes)
    return LlamaForCausalLM(config).eval(), torch.randint(1, 1000, (2, 32))


class Blocks(nn.Module):
    """Residual blocks of one width."""

    def __init__(self, width: int, count: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.GroupNorm(4, width), nn.SiLU())
            for _ in range(count)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


class UNet(nn.Module):
    """Blocks on the way down and up, joined by concatenation at each level."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        width = 16
        self.enter = nn.Conv2d(3, width, 3, padding=1)
        self.down = nn.ModuleList(Blocks(width, blocks // 4) for _ in range(2))
        self.halve = nn.ModuleList(nn.Conv2d(width, width, 3, stride=2, padding=1) for _ in range(2))
        self.join = nn.ModuleList(nn.Conv2d(2 * width, width, 1) for _ in range(2))
        self.up = nn.ModuleList(Blocks(width, blocks // 4) for _ in range(2))
        self.leave = nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x, kept = self.enter(x), list[torch.Tensor]()
        for blocks, halve in zip(self.down, self.halve, strict=True):
            kept.append(blocks(x))
            x = halve(kept[-1])
        for blocks, join in zip(self.up, self.join, strict=True):
            x = nn.functional.interpolate(x, scale_factor=2.0)
            x = blocks(join(torch.cat([x, kept.pop()], 1)))
        result: torch.Tensor = self.leave(x)
        return result


def unet(blocks: int) -> Built:
    """So many blocks of four nodes."""
    torch.manual_seed(0)
    return UNet(blocks).eval(), torch.randn(2, 3, 32, 32)


FAMILIES: Mapping[str, tuple[Callable[[int], Built], tuple[int, ...]]] = {
    "resnet": (resnet, (50, 101, 152)),
    "bert": (bert, (6, 12, 24)),
    "llama": (llama, (8, 16, 32)),
    "unet": (unet, (64, 128, 256)),
}


def measure(built: Built, profiled: str | None) -> tuple[int, dict[str, float]]:
    """The nodes of the eval graph, and the CPU seconds of each step."""
    model, x = built
    seconds: dict[str, float] = {}

    def timed(step: str, call: Callable[[], Any]) -> Any:
        profile = cProfile.Profile() if step == profiled else None
        start = time.process_time()
        result = profile.runcall(call) if profile else call()
        seconds[step] = time.process_time() - start
        if profile:
            pstats.Stats(profile).sort_stats("cumulative").print_stats(45)
        return result

    traced = timed("trace", lambda: fxprune.trace(model, (x,), modes=("eval",)))
    timed("channels", lambda: fxprune.prune.channels(traced, macs=0.7))
    final = timed("finalize", lambda: fxprune.finalize(traced))
    timed("compare", lambda: fxprune.compare(traced, final, inputs=x))
    return len(traced.graphs["eval"].nodes), seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("families", nargs="*", choices=[*FAMILIES, []], default=[])
    parser.add_argument("--profile", choices=STEPS, help="print where this step spends its time")
    parser.add_argument("--smallest", action="store_true", help="the smallest of each family alone")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for family in options.families or FAMILIES:
        build, sizes = FAMILIES[family]
        before: dict[str, float] = {}
        measure(build(sizes[0]), None)  # what is imported and filled once counts for none
        for size in sizes[:1] if options.smallest else sizes:
            nodes, seconds = measure(build(size), options.profile)
            a_node = {step: 1e3 * value / nodes for step, value in seconds.items()}
            cells = [
                f"{step} {seconds[step]:.1f} s, {a_node[step]:.2f} ms a node"
                + (f" x {a_node[step] / before[step]:.2f}" if before else "")
                for step in STEPS
            ]
            print(f"{family} {size}, {nodes} nodes: {'; '.join(cells)}", flush=True)
            before = before or a_node


if __name__ == "__main__":
    main()
