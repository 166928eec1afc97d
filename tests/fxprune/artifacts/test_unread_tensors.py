"""Layers of a class that its traced call does not need: they keep nothing, and follow the configuration."""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.artifacts.unread_tensors import cut_unread
from fxprune.errors import ConfigurationWarning
from fxprune.graph.configurations import Configuration, unread_tensors


class Numbers:
    """A configuration as libraries have it."""

    def __init__(self, inner: int = 24) -> None:
        self.inner = inner

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))


class Model(nn.Module):
    """Two networks of one inner size, of which a call computes the second for nothing, and a layer that none calls."""

    config_class: ClassVar[type] = Numbers

    def __init__(self, config: Numbers) -> None:
        super().__init__()
        self.config = config
        self.up, self.down = nn.Linear(6, config.inner), nn.Linear(config.inner, 6)
        self.pooled = nn.Sequential(nn.Linear(6, config.inner), nn.ReLU(), nn.Linear(config.inner, 6))
        self.spare = nn.Conv1d(config.inner, config.inner, 3, groups=config.inner)
        self.also = self.spare
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.down(self.up(x).relu())
        self.pooled(x[:, 0])
        return self.head(x)


X = torch.randn(2, 5, 6)


def test_what_no_call_reads_follows_the_number_that_says_it_and_holds_back_nothing() -> None:
    model = Model(Numbers()).eval()
    traced = fxprune.trace(model, X)
    report = fxprune.prune.channels(traced, 0.5, targets="up", round_to=1, runnable=model)
    assert report.removed == {"up.weight (MLP unit)": (12, 24)}
    small = fxprune.write_back(fxprune.finalize(traced), model)
    assert small.config.inner == 12
    assert (small.pooled[0].out_features, small.spare.groups, small.spare.in_channels) == (12, 12, 12)
    assert small.also is small.spare
    assert torch.equal(small.pooled[0].weight, model.pooled[0].weight[:12])
    built = Model(copy.deepcopy(small.config)).eval()
    built.load_state_dict(small.state_dict())
    torch.testing.assert_close(built(X), traced.eval()(X))
    small.train()(X).sum().backward()


def test_where_no_number_says_the_sizes_it_stays_as_it_is() -> None:
    class Another(Model):
        def __init__(self, config: Numbers) -> None:
            super().__init__(config)
            self.more = nn.Linear(6, config.inner)

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + self.more(x).mean()

    model = Another(Numbers()).eval()
    traced = fxprune.trace(model, X, modes=("eval",))
    fxprune.prune.channels(traced, 0.5, targets="up", round_to=1)
    with pytest.warns(ConfigurationWarning, match="inner gives"):
        small = fxprune.write_back(fxprune.finalize(traced), model)
    assert (small.config.inner, small.pooled[0].out_features, small.spare.groups) == (24, 24, 24)


def test_what_was_cut_is_as_before_unless_it_is_kept() -> None:
    model = Model(Numbers()).eval()
    unread = unread_tensors(model, fxprune.trace(model, X).graphs.values())
    assert unread == {
        name
        for name, _ in model.named_parameters(remove_duplicate=False)
        if name.startswith(("pooled", "spare", "also"))
    }
    found = Configuration.of(model, unread)
    assert found is not None
    assert found.followers["inner"] == {("up.weight", 0), ("up.bias", 0), ("down.weight", 1)}
    state = copy.deepcopy(model.state_dict())
    with cut_unread(model, found, {"inner": 10}):
        assert (model.pooled[2].in_features, model.spare.groups) == (10, 10)
        assert model.up.out_features == 24
    with cut_unread(model, found, {"inner": 30}) as held:  # longer: there is nothing to put there
        held.keep()
    assert (model.pooled[2].in_features, model.spare.groups) == (24, 24)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


class Tables(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = nn.Linear(3, 3), nn.BatchNorm1d(3)
        self.register_buffer("table", torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def test_of_buffers_those_of_layers_with_parameters_are_unread_and_tables_are_not() -> None:
    model = Tables().eval()
    unread = unread_tensors(model, fxprune.trace(model, torch.randn(2, 3), modes=("eval",)).graphs.values())
    assert unread == {f"norm.{name}" for name in model.norm.state_dict()}


@pytest.mark.filterwarnings("ignore")
def test_heads_go_beside_a_table_of_their_size_that_only_another_length_reads(transformers: Any) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = transformers.MixtralConfig(
        **sizes, vocab_size=60, num_key_value_heads=2, head_dim=8, num_local_experts=2, use_cache=False
    )
    model = transformers.MixtralForCausalLM(config).eval()
    ids = {"input_ids": torch.randint(3, 60, (2, 7))}
    traced = fxprune.trace(model, ids, modes=("eval",))
    report = fxprune.prune.channels(traced, 0.5, round_to=1, runnable=model)
    assert set(report.removed.values()) == {(1, 2), (32, 64)}  # heads, and what is between the layers of each expert
    small = fxprune.write_back(fxprune.finalize(traced), model)
    assert (small.config.num_key_value_heads, small.config.head_dim) == (1, 8)
    assert small.config.intermediate_size == 32
