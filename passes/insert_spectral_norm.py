"""Insert spectral normalization."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn
from torch.nn.utils import parametrizations

from fxprune.graph.containers import Container
from fxprune.graph.provenance import provenance_of
from fxprune.graph.traced import TracedModule

from .insert_parametrization import InsertParametrization

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True)
class InsertSpectralNorm(InsertParametrization):
    """Divide `parameter` by its largest singular value, as `parametrizations.spectral_norm`.

    Train mode runs the power iteration and writes the buffers `_u` and `_v` by nodes of its graph; eval mode reads
    them. Method: Miyato et al., "Spectral Normalization for GANs" (2018), https://arxiv.org/abs/1802.05957.

    Args:
        parameter: qualified name.
        n_power_iterations: power iterations for each forward in train mode.
        eps: added to norms, against division by zero.
        dim: the dimension of outputs; None takes 1 for transposed convolutions and 0 elsewhere, as in torch.
    """

    n_power_iterations: int = 1
    eps: float = 1e-12
    dim: int | None = None
    name: ClassVar[str] = "insert-spectral-norm"

    def register(self, host: nn.Module, name: str, owner: Container | TracedModule) -> None:
        dim = self.dim
        if dim is None:
            dim = 1 if issubclass(provenance_of(owner).source_class, _TRANSPOSED) else 0
        parametrizations.spectral_norm(host, name, self.n_power_iterations, self.eps, dim)
