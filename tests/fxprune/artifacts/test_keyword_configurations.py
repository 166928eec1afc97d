"""Models that are built by keywords, which they keep in a mapping, as those of diffusers: it says the new sizes."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.errors import ConfigurationWarning


class Frozen(OrderedDict[str, Any]):
    """A mapping that nothing may be written into, whose entries are attributes too."""

    def __init__(self, entries: Any = ()) -> None:
        super().__init__(entries)
        for name, value in self.items():
            setattr(self, name, value)

    def update(self, *args: Any, **kwargs: Any) -> None:  # type: ignore[override]
        raise RuntimeError("frozen")


class Coder(nn.Module):
    def __init__(self, widths: tuple[int, ...] = (8, 12), latent: int = 4, norm: int | None = None) -> None:
        super().__init__()
        self._kept = Frozen({"_version": 1})
        self.register_to_config(widths=widths, latent=latent, norm=norm, levels=len(widths))
        first, second = widths
        self.encoder = nn.Sequential(nn.Conv2d(3, first, 1), nn.ReLU(), nn.Conv2d(first, second, 1), nn.ReLU())
        self.latent, self.decoder = nn.Conv2d(second, latent, 1), nn.Conv2d(latent, 3, 1)
        self.norm = nn.GroupNorm(norm, second) if norm else nn.Identity()

    @property
    def config(self) -> Frozen:
        return self._kept

    def register_to_config(self, **entries: Any) -> None:
        self._kept = Frozen({**getattr(self, "_kept", {}), **entries})

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.latent(self.norm(self.encoder(x))))


def shrunk(model: Coder, **options: Any) -> tuple[Coder, Tensor, Tensor]:
    x = torch.randn(2, 3, 6, 6)
    traced = fxprune.trace(model.eval(), x, modes=("eval",))
    fxprune.prune.channels(traced, 0.5, scope="local", round_to=1, runnable=model, **options)
    small = fxprune.write_back(fxprune.finalize(traced), model)
    assert isinstance(small, Coder)
    return small, x, traced(x)


def test_the_keywords_follow_and_build_the_model_that_came_back() -> None:
    model = Coder()
    small, x, wanted = shrunk(model)
    assert (small.config["widths"], small.config.latent, small.config["levels"]) == ((4, 6), 2, 2)
    assert (model.config["widths"], model.config["latent"]) == ((8, 12), 4)
    built = Coder(**{name: small.config[name] for name in ("widths", "latent", "norm")}).eval()
    built.load_state_dict(small.state_dict())
    assert torch.equal(built(x), small(x))
    torch.testing.assert_close(built(x), wanted)


def test_sizes_that_no_keyword_says_come_back_with_a_warning() -> None:
    model = Coder(norm=4)  # which loses groups, so that another number of them is left
    with pytest.warns(ConfigurationWarning, match=r"of this Coder.*fxprune.save\(final, path\).*write_back") as caught:
        small, x, wanted = shrunk(model)
    assert "runnable" not in str(caught[0].message)
    assert small.config["widths"] == (8, 12)
    assert small.norm.num_groups == 2
    torch.testing.assert_close(small(x), wanted)
