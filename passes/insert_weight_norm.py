"""Insert weight normalization."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn
from torch.nn.utils import parametrizations

from fxprune.errors import ShardingError
from fxprune.graph.containers import Container
from fxprune.graph.traced import TracedModule
from fxprune.sharding import is_managed

from .insert_parametrization import InsertParametrization


@dataclass(frozen=True)
class InsertWeightNorm(InsertParametrization):
    """Split `parameter` into magnitude `original0` and direction `original1`, as `parametrizations.weight_norm`.

    Method: Salimans and Kingma, "Weight Normalization" (2016), https://arxiv.org/abs/1602.07868.

    Args:
        parameter: qualified name.
        dim: the dimension that keeps a norm for each index; None and -1 take one norm over all, as in torch, which
            FSDP cannot shard.
    """

    dim: int | None = 0
    name: ClassVar[str] = "insert-weight-norm"

    def requires(self, traced: TracedModule) -> None:
        super().requires(traced)
        if self.dim in (None, -1) and is_managed(traced):
            raise ShardingError(
                f"a weight norm of {self.parameter!r} with dim={self.dim} makes one number of it, a parameter without "
                "an axis, which FSDP cannot shard. Take a norm for each output, dim=0, or leave that one as it is."
            )

    def register(self, host: nn.Module, name: str, owner: Container | TracedModule) -> None:
        parametrizations.weight_norm(host, name, self.dim)  # type: ignore[arg-type]
