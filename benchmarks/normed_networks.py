"""Networks with norms on their weights, cut to half of the MACs: fxprune and Torch-Pruning.

A vocoder under weight norm and a discriminator under spectral norm, in both of torch's spellings. fxprune masks above
the norms, takes ten training steps, and removes; the error is that of the removal, in float64. Torch-Pruning gets a
third of the channels, after a forward without gradients, without which it cannot copy legacy norms; what it raises, in
cutting or at the next forward, is printed.

Run: PYTHONPATH=. python benchmarks/normed_networks.py
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch_pruning
from command import prepare
from torch import Tensor, nn
from torch.nn.utils import parametrizations, spectral_norm, weight_norm

import fxprune
from tests.normed_networks import Discriminator, Vocoder

NETWORKS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "vocoder, parametrized": (lambda: Vocoder(parametrizations.weight_norm), torch.randn(2, 8, 32)),
    "vocoder, legacy": (lambda: Vocoder(weight_norm), torch.randn(2, 8, 32)),
    "discriminator, parametrized": (lambda: Discriminator(parametrizations.spectral_norm), torch.randn(2, 3, 16, 16)),
    "discriminator, legacy": (lambda: Discriminator(spectral_norm), torch.randn(2, 3, 16, 16)),
}


def built(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return make().eval()


def by_fxprune(model: nn.Module, x: Tensor) -> str:
    traced = fxprune.trace(model, x)
    fxprune.prune.channels(traced, macs=0.5)
    optimizer = torch.optim.SGD(traced.train().parameters(), lr=1e-3)
    with fxprune.clip_gradients(optimizer, max_norm=1.0):
        for _ in range(10):
            optimizer.zero_grad()
            traced(x).square().mean().backward()
            optimizer.step()
    masked, x = copy.deepcopy(traced).double().eval(), x.double()
    final = fxprune.finalize(masked)
    assert final.plan is not None
    want = masked(x).detach()
    error = float((final(x).detach() - want).abs().max() / want.abs().max())
    return f"{final.plan.macs[1] / final.plan.macs[0]:.3f} of the MACs, error {error:.1e}"


def by_torch_pruning(model: nn.Module, x: Tensor) -> str:
    try:
        with torch.no_grad():
            model(x)
        importance = torch_pruning.importance.MagnitudeImportance(p=2)
        pruner = torch_pruning.pruner.MagnitudePruner(
            model, x, importance=importance, global_pruning=True, pruning_ratio=0.3
        )
        with torch.no_grad():
            model(x)
        before, _ = torch_pruning.utils.count_ops_and_params(model, x)
        pruner.step()
        model(x)
        left, _ = torch_pruning.utils.count_ops_and_params(model, x)
    except Exception as error:  # whatever the peer raises is the result
        return f"{type(error).__name__}: {str(error)[:70]}"
    return f"{left / before:.3f} of the MACs"


def main() -> None:
    prepare()
    for name, (make, x) in NETWORKS.items():
        print(f"{name}: fxprune {by_fxprune(built(make), x)}; Torch-Pruning {by_torch_pruning(built(make), x)}")


if __name__ == "__main__":
    main()
