"""What "auto" compares outputs of many positions by, and that a few samples say by it what many say."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import fxprune
from fxprune.prune.sensitivity import distances
from fxprune.prune.sensitivity.distances import OutputDistance


class Ends(nn.Module):
    """A linear layer, and what makes outputs of its logits."""

    def __init__(self, end: Any) -> None:
        super().__init__()
        self.head, self.end = nn.Linear(4, 6), end

    def forward(self, x: Tensor) -> Any:
        return self.end(self.head(x))


def masked(logits: Tensor) -> Tensor:
    return functional.log_softmax(logits.index_fill(-1, torch.tensor(2), -math.inf), -1)


ENDS = {
    "logits": lambda logits: logits,
    "logarithms": lambda logits: functional.log_softmax(logits, -1),
    "probabilities": lambda logits: logits.softmax(-1),
    "classes first": lambda logits: functional.log_softmax(logits.transpose(1, 2), 1),
    "a class that is never there": masked,
}


def compared(end: Any, shape: tuple[int, ...], name: str, *pairs: tuple[Tensor, Tensor], **options: Any) -> float:
    """The distance of outputs to others, added pair by pair."""
    graph = fxprune.trace(Ends(end).eval(), (torch.randn(*shape, 4),), modes=("eval",)).graphs["eval"]
    distance = OutputDistance(graph, name)
    sums = distance.sums()
    for value, dense in pairs:
        counts = options["counts"](value) if "counts" in options else None
        distance.add(sums, [end(value)], [end(dense)], counts, lambda flat: flat[0], len(value))
    return distance.mean(sums)


def logits(*shape: int, apart: float) -> tuple[Tensor, Tensor]:
    dense = 3 * torch.randn(*shape, 6, dtype=torch.float64)
    return dense + apart * torch.randn(*shape, 6, dtype=torch.float64), dense


def lost(value: Tensor, dense: Tensor) -> Tensor:
    """The divergence of each row."""
    first, second = dense.log_softmax(-1), value.log_softmax(-1)
    return functional.kl_div(second, first, reduction="none", log_target=True).sum(-1)


def of_positions(value: Tensor, dense: Tensor) -> float:
    """By the definition, of rows of logits."""
    value, dense = (each - each.mean(-1, keepdim=True) for each in (value, dense))
    error = (value - dense).square().sum() / dense.square().sum()
    return float(lost(value, dense).clamp(max=math.log(value.shape[-1])).mean() + error)


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("apart", [0.1, 5.0])
def test_of_many_positions_none_counts_for_more_than_one_of_which_nothing_is_known(
    end: str, apart: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    value, dense = logits(7, 5, apart=apart)
    known = [0, 1, 3, 4, 5] if end == "a class that is never there" else [*range(6)]
    found = compared(ENDS[end], (2, 5), "auto", (value, dense))
    rows = value[..., known].flatten(0, 1), dense[..., known].flatten(0, 1)
    assert bool((lost(*rows) > math.log(6)).any()) == (apart == 5)
    if end != "a class that is never there" or apart < 1:  # there are six classes, of which one is never there
        assert found == pytest.approx(of_positions(*rows), rel=1e-6)
    pairs = (value[:3], dense[:3]), (value[3:], dense[3:])
    monkeypatch.setattr(distances, "_MOST_ENTRIES", 13)
    assert compared(ENDS[end], (2, 5), "auto", *pairs) == pytest.approx(found, rel=1e-9)


def test_positions_that_do_not_count_say_nothing() -> None:
    torch.manual_seed(0)
    value, dense = logits(7, 5, apart=1.0)
    counts = torch.rand(7, 5) < 0.5
    found = compared(ENDS["logits"], (2, 5), "auto", (value, dense), counts=lambda _: counts)
    assert found == pytest.approx(of_positions(value[counts], dense[counts]), rel=1e-9)
    first = compared(ENDS["logits"], (2, 5), "auto", (value, dense), counts=lambda _: counts[:, 0])
    assert first == pytest.approx(of_positions(value[counts[:, 0]], dense[counts[:, 0]]), rel=1e-9)


@pytest.mark.parametrize(("shape", "name"), [((7,), "auto"), ((7,), "divergence"), ((7, 5), "divergence")])
def test_of_one_row_a_sample_and_by_its_name_the_divergence_is_that_of_kullback_and_leibler(
    shape: tuple[int, ...], name: str
) -> None:
    torch.manual_seed(0)
    value, dense = logits(*shape, apart=8.0)
    assert float(lost(value, dense).max()) > math.log(6)
    found = compared(ENDS["logits"], (2, *shape[1:]), name, (value, dense))
    assert found == pytest.approx(float(lost(value, dense).mean()), rel=1e-9)


class Seldom(nn.Module):
    """Classes of positions; one in forty has something that half of the hidden units see, and says it loudly."""

    def __init__(self) -> None:
        super().__init__()
        self.seldom, self.often, self.head = nn.Linear(4, 32), nn.Linear(4, 32), nn.Linear(64, 5)
        with torch.no_grad():
            self.seldom.bias.zero_()
            self.seldom.weight *= 3
            self.head.weight *= torch.tensor([30.0, 4.0]).repeat_interleave(32)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.cat([self.seldom(x[..., :4]).relu(), self.often(x[..., 4:]).relu()], -1))


def sequences(samples: int, seed: int) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, 20, 8, generator=draw)
    x[..., :4] *= torch.rand(samples, 20, 1, generator=draw) < 1 / 40
    return x


def test_few_samples_say_of_a_group_that_seldom_counts_what_many_say() -> None:
    torch.manual_seed(0)
    traced = fxprune.trace(Seldom().eval(), sequences(2, 0), modes=("eval",))

    def measured(samples: int, seed: int, judged: int, distance: str) -> list[float]:
        x = sequences(samples, seed)
        found = fxprune.sensitivity(traced, x, distance=distance, max_samples=judged, shares=0.75)
        assert [curve.name for curve in found.curves] == ["seldom.weight", "often.weight"]
        return [curve.measured[0] for curve in found.curves]

    spread, wrong = {}, {}
    for distance in ("auto", "divergence"):
        many = measured(4000, 99, 800, distance)
        few = np.array([measured(200, seed, 8, distance) for seed in range(1, 9)])
        assert many[0] > many[1]
        spread[distance] = np.log(few[:, 0] / many[0]).std()
        wrong[distance] = int((few[:, 0] < few[:, 1]).sum())
    assert spread["auto"] < 0.75 * spread["divergence"]
    assert wrong["auto"] < wrong["divergence"]
