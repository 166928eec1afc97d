"""Queries that know nothing of the input: constants of every batch size, of which one stays where several meet."""

from __future__ import annotations

from typing import cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

import fxprune


class Decoder(nn.Module):
    """A layer of a decoder whose queries start at zero, beside places that are learned, as DETR has it."""

    def __init__(self) -> None:
        super().__init__()
        self.places, self.norm = nn.Embedding(6, 8), nn.LayerNorm(8)
        self.q, self.k, self.v, self.query, self.key, self.value, self.out = (nn.Linear(8, 8) for _ in range(7))

    def heads(self, x: Tensor) -> Tensor:
        return x.view(x.shape[0], x.shape[1], -1, 4).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        places = self.places.weight.unsqueeze(0).repeat(x.shape[0], 1, 1)
        start = torch.zeros_like(places)
        q, k, v = (self.heads(f(y)) for f, y in ((self.q, start + places), (self.k, start + places), (self.v, start)))
        first = self.norm(start + scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        q, k, v = self.heads(self.query(first + places)), self.heads(self.key(x)), self.heads(self.value(x))
        return self.out(first + scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def test_where_two_constants_are_added_the_batch_stays() -> None:
    model = Decoder().double().eval()
    nn.init.normal_(model.norm.bias)
    with torch.no_grad():
        model.value.weight[4:], model.value.bias[4:] = 0, 0  # a head that adds nothing
    final = fxprune.finalize(fxprune.trace(model, torch.randn(2, 5, 8).double(), modes=("eval",)), align=1)
    for batch in (1, 2, 3):
        x = torch.randn(batch, 5, 8).double()
        torch.testing.assert_close(final(x), model(x), rtol=0, atol=1e-9)


class Pool(nn.Module):
    """Attention by queries that are made of a parameter, one for every sample, as timm's pooling by latents has it."""

    def __init__(self, *, biased: bool) -> None:
        super().__init__()
        self.latent = nn.Parameter(torch.randn(1, 1, 12))
        self.q, self.k, self.out = nn.Linear(12, 12, biased), nn.Linear(12, 12), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        queries = self.q(self.latent.expand(x.shape[0], -1, -1))
        return cast(Tensor, self.out((queries @ self.k(x).transpose(1, 2)).softmax(-1)))


@pytest.mark.parametrize("biased", [False, True])
def test_masked_queries_of_a_parameter_fold_into_the_bias_of_their_own_layer(biased: bool) -> None:
    torch.manual_seed(0)
    model = Pool(biased=biased).eval()
    traced = fxprune.trace(model, torch.randn(2, 5, 12), modes=("eval",))
    report = fxprune.prune.channels(traced, macs=0.7)
    final = fxprune.finalize(traced)
    assert final.plan is not None
    assert (final.plan.macs, final.plan.parameters) == (report.macs, report.parameters)
    assert final.plan.folded == {"q": 11}
    x = torch.randn(3, 5, 12)
    torch.testing.assert_close(final(x), traced(x), rtol=0, atol=1e-6)
    if biased:
        small = fxprune.write_back(final, model)
        torch.testing.assert_close(small(x), final(x), rtol=0, atol=1e-6)
