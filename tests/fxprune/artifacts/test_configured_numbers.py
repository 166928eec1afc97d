"""Numbers of configurations in other forms: lists, ratios, numbers that change together, and what a class builds."""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

import fxprune
from fxprune.graph.configuration_numbers import entries, put_back, put_numbers
from fxprune.graph.configurations import Builds, Configuration


class Config:
    """A configuration of the numbers that are given."""

    def __init__(self, **numbers: Any) -> None:
        vars(self).update(numbers)

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))


class Configured(nn.Module):
    config_class: ClassVar[type] = Config

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config: Any = config


def back_again(model: Configured, x: Tensor, **request: Any) -> Configured:
    """The model pruned for its class, built from the configuration that comes back; it computes what the masks say."""
    traced = fxprune.trace(model.eval(), x, modes=("eval",))
    fxprune.prune.channels(traced, runnable=model, **request)
    small = fxprune.write_back(fxprune.finalize(traced), model)
    built = type(model)(copy.deepcopy(small.config)).eval()
    built.load_state_dict(small.state_dict())
    torch.testing.assert_close(built(x), traced(x))
    assert sum(p.numel() for p in built.parameters()) < sum(p.numel() for p in model.parameters())
    return built


class Stages(Configured):
    """Blocks of two widths, whose inner widths are a ratio of theirs."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        widths = self.config.widths
        inner = [int(width * self.config.ratio) for width in widths]
        self.stem = nn.Conv2d(3, widths[0], 1)
        self.up = nn.ModuleList(nn.Linear(width, more) for width, more in zip(widths, inner, strict=True))
        self.down = nn.ModuleList(nn.Linear(more, width) for width, more in zip(widths, inner, strict=True))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for width in widths)
        self.merge = nn.Linear(widths[0], widths[1])
        self.head = nn.Linear(widths[1], 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x).flatten(2).transpose(1, 2)
        for i in range(2):
            y = y + self.down[i](self.up[i](self.norms[i](y)).relu())
            y = self.merge(y) if i == 0 else y
        return self.head(y.mean(1))


def test_widths_of_several_lengths_that_one_ratio_gives_lose_the_same_fraction() -> None:
    model = Stages(Config(widths=[8, 16], ratio=4.0))
    built = back_again(model, torch.randn(2, 3, 4, 4), amount=0.3, round_to=1)
    assert isinstance(built.config.ratio, float)
    first, second = (layer.out_features for layer in built.up)
    assert 2 * first == second < 64


def test_a_whole_ratio_keeps_multiples_of_the_width_that_it_multiplies() -> None:
    class Whole(Stages):
        def __init__(self, config: Config) -> None:
            if type(config.ratio) is not int:  # type: ignore[attr-defined]
                raise TypeError("a whole ratio is needed")
            super().__init__(config)

    built = back_again(Whole(Config(widths=[8, 16], ratio=4)), torch.randn(2, 3, 4, 4), amount=0.3, round_to=1)
    assert built.config.ratio in (2, 3)
    assert [layer.out_features for layer in built.up] == [8 * built.config.ratio, 16 * built.config.ratio]


class Grouped(Configured):
    """Convolutions of four groups."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.up = nn.Conv1d(8, self.config.inner, 1, groups=4)
        self.down = nn.Conv1d(self.config.inner, 8, 1, groups=4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(x).relu())


def test_a_width_that_groups_of_a_convolution_divide_keeps_multiples_of_them() -> None:
    built = back_again(Grouped(Config(inner=32)), torch.randn(2, 8, 5), amount=0.4, round_to=1)
    assert built.config.inner == 20 == built.up.out_channels


class Residual(Configured):
    """Two stages; the first has a shortcut of its own where its width is not the stem's."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        stem, first, second = self.config.stem, *self.config.widths
        self.stem, self.norm = nn.Conv2d(3, stem, 3, padding=1), nn.BatchNorm2d(stem)
        self.one = nn.Conv2d(stem, first, 3, padding=1)
        self.shortcut = nn.Identity() if stem == first else nn.Conv2d(stem, first, 1)
        self.two, self.last = nn.Conv2d(first, second, 3, padding=1), nn.BatchNorm2d(second)
        self.head = nn.Linear(second, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        x = (self.one(x) + self.shortcut(x)).relu()
        return self.head(self.last(self.two(x)).relu().mean((2, 3)))


def test_numbers_of_a_list_and_numbers_that_change_together_follow() -> None:
    model = Residual(Config(stem=12, widths=[12, 24]))
    found = Configuration.of(model)
    assert found is not None
    assert "stem and widths.0" in found.numbers
    assert ("last.running_mean", 0) in found.followers["widths.1"]
    built = back_again(model, torch.randn(2, 3, 8, 8), amount=0.5, round_to=1)
    assert built.config.stem == built.config.widths[0] < 12
    assert built.config.widths[1] < 24


def test_more_than_two_numbers_of_which_none_changes_alone_follow_together() -> None:
    class Three(Residual):
        def __init__(self, config: Config) -> None:
            super().__init__(config)
            first, second = self.config.widths
            self.second = nn.Identity() if first == second else nn.Conv2d(first, second, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.norm(self.stem(x)).relu()
            x = (self.one(x) + self.shortcut(x)).relu()
            x = self.last(self.two(x)) + self.second(x)
            return self.head(x.relu().mean((2, 3)))

    model = Three(Config(stem=12, widths=[12, 12], classes=12))
    found = Configuration.of(model)
    assert found is not None
    assert "stem and widths.0 and widths.1" in found.followers
    built = back_again(model, torch.randn(2, 3, 8, 8), amount=0.5, round_to=1)
    assert built.config.stem == built.config.widths[0] == built.config.widths[1] == 6
    assert built.config.classes == 12


def test_ratios_of_which_products_are_rounded_to_eight_lose_what_suits_all_widths() -> None:
    class Rounded(Stages):
        def __init__(self, config: Config) -> None:
            super().__init__(config)
            widths = self.config.widths
            inner = [int(width * self.config.ratio + 4) // 8 * 8 for width in widths]
            self.up = nn.ModuleList(nn.Linear(width, more) for width, more in zip(widths, inner, strict=True))
            self.down = nn.ModuleList(nn.Linear(more, width) for width, more in zip(widths, inner, strict=True))

    built = back_again(Rounded(Config(widths=[8, 16], ratio=4.0)), torch.randn(2, 3, 4, 4), macs=0.6)
    assert built.config.ratio in (2.0, 1.0)
    assert [layer.out_features for layer in built.up] == [8 * built.config.ratio, 16 * built.config.ratio]


class Rounding(Configured):
    """An inner width that is a product, rounded up to a multiple."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        multiple = self.config.multiple
        inner = -(-int(8 * self.config.ratio) // multiple) * multiple
        self.up, self.down = nn.Linear(8, inner), nn.Linear(inner, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).relu())


def test_a_width_that_is_rounded_up_keeps_what_the_number_can_say() -> None:
    built = back_again(Rounding(Config(ratio=3.5, multiple=16)), torch.randn(2, 8), macs=0.7)
    assert built.up.out_features == 16
    assert built.config.multiple == 16


class Scaled(Configured):
    """Attention whose width one number says, with what it scales by, then two layers of another width."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.scale = float(self.config.inner) ** -0.5
        self.q, self.k, self.v = (nn.Linear(8, self.config.inner) for _ in range(3))
        self.out = nn.Linear(self.config.inner, 8)
        self.up, self.down = nn.Linear(8, self.config.hidden), nn.Linear(self.config.hidden, 8)

    def bounded(self, x: Tensor) -> Tensor:
        return x

    def forward(self, x: Tensor) -> Tensor:
        scores = self.bounded(self.q(x)) * self.scale @ self.bounded(self.k(x)).transpose(1, 2)
        x = x + self.out(scores.softmax(-1) @ self.v(x))
        return self.down(self.up(x).relu())


class ScaledBehind(Scaled):
    """The same behind a function that no weight scales through."""

    def bounded(self, x: Tensor) -> Tensor:
        return x.tanh()


def test_what_a_number_scales_by_follows_and_a_weight_makes_up_for_it() -> None:
    built = back_again(Scaled(Config(inner=16, hidden=48)), torch.randn(2, 5, 8), macs=0.4, round_to=1)
    assert built.config.inner < 16
    assert built.scale == built.config.inner**-0.5


def test_a_number_that_scales_what_is_computed_stays_where_others_suffice() -> None:
    built = back_again(ScaledBehind(Config(inner=16, hidden=48)), torch.randn(2, 5, 8), macs=0.7, round_to=1)
    assert built.config.inner == 16
    assert built.config.hidden < 48


class Pyramid(Configured):
    """A layer that reads a normalized stream beside two branches, whose width is a number of its own."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        width, branch = self.config.width, self.config.branch
        self.stem, self.norm = nn.Linear(6, width), nn.LayerNorm(width)
        self.branches = nn.ModuleList(nn.Linear(width, branch) for _ in range(2))
        self.merge, self.head = nn.Linear(width + 2 * branch, branch), nn.Linear(branch, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x))
        return self.head(self.merge(torch.cat([x, *(branch(x).relu() for branch in self.branches)], -1)).relu())


def test_branches_go_from_what_reads_them_beside_a_stream_that_stays() -> None:
    built = back_again(Pyramid(Config(width=8, branch=12)), torch.randn(2, 6), macs=0.7, round_to=1)
    branch = built.config.branch
    assert branch < 12
    assert built.merge.in_features == 8 + 2 * branch
    assert built.config.width == 8


class Mixed(Configured):
    """Rows of one layer for a normalized width, and for two factors of a product, as state space models have them."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.width, self.state = self.config.width, self.config.state
        self.into = nn.Linear(6, self.width + 2 * self.state)
        self.norm, self.out = nn.LayerNorm(self.width), nn.Linear(self.width, 3)

    def forward(self, x: Tensor) -> Tensor:
        y, b, c = self.into(x).split([self.width, self.state, self.state], -1)
        return self.out(self.norm(c @ b.transpose(1, 2) @ y))


def test_a_part_of_the_rows_of_a_layer_goes_where_the_rest_stays() -> None:
    built = back_again(Mixed(Config(width=4, state=16)), torch.randn(2, 5, 6), macs=0.7, round_to=1)
    assert built.config.state < 16
    assert built.into.out_features == 4 + 2 * built.config.state


def test_numbers_with_which_the_class_has_other_tensors_say_no_sizes() -> None:
    model = Residual(Config(stem=12, widths=[16, 24]))
    found = Configuration.of(model)
    assert found is not None
    assert found.built({"widths.0": 12}) is None  # without the shortcut
    narrow = Configuration(Residual(Config(stem=10, widths=[14, 20]))).shapes
    assert next(found.expressing(narrow)) == {"stem": 10, "widths.0": 14, "widths.1": 20}
    without = narrow | {"shortcut.weight": (12, 12, 1, 1), "shortcut.bias": (12,)}
    assert not list(found.expressing(without))


class Heads(Configured):
    """Attention whose widths two numbers say as well with others."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.heads = self.config.heads
        self.head_dim = getattr(config, "head_dim", None) or self.config.width // self.heads
        self.qkv = nn.Linear(self.config.width, 3 * self.heads * self.head_dim)
        self.out = nn.Linear(self.heads * self.head_dim, self.config.width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, -1, self.head_dim).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        return self.out(y.reshape(*x.shape[:2], -1))


def test_of_numbers_that_say_the_same_sizes_those_are_taken_that_compute_the_same() -> None:
    model = Heads(Config(width=32, heads=4))
    nn.init.normal_(model.qkv.weight, 0, 0.02)  # attention hardly differs, whatever the heads are
    built = back_again(model, torch.randn(2, 5, 32), amount=0.25, kinds="attention head", round_to=1)
    assert (built.config.heads, built.config.head_dim) == (3, 8)


class Normed(Configured):
    """A convolution that the class builds under a weight norm."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.first = nn.Conv1d(3, self.config.inner, 1)
        self.second = weight_norm(nn.Conv1d(self.config.inner, 6, 3, padding=1), dim=2)
        self.scale = nn.Parameter(torch.ones(6, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.second(self.first(x).relu())


def test_a_weight_norm_of_the_class_comes_back_so_that_the_class_reads_the_state() -> None:
    model = Normed(Config(inner=16))
    model.second.parametrizations.weight.original0.requires_grad_(False)
    built = back_again(model, torch.randn(2, 3, 8), amount=0.5, round_to=1)
    assert built.second.parametrizations.weight.original1.shape[1] == built.config.inner == 8
    small = fxprune.write_back(fxprune.finalize(fxprune.trace(model, torch.randn(2, 3, 8), modes=("eval",))), model)
    flags = [p.requires_grad for p in small.second.parametrizations.weight.parameters()]
    assert flags == [False, True]


class Biased(Configured):
    """Adds a network of a fixed table to its tokens; eval mode keeps what it gave, as some libraries do."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.register_buffer("table", -torch.rand(5, 2))
        self.positions = nn.Sequential(nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 6))
        self.up, self.down = nn.Linear(6, self.config.inner), nn.Linear(self.config.inner, 6)
        self.kept: dict[str, Tensor] = {}

    def train(self, mode: bool = True) -> Biased:
        if mode:
            self.kept = {}
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            added = self.positions(self.table)
        else:
            added = self.kept.setdefault("added", self.positions(self.table).detach())
        x = x + added
        return x + self.down(self.up(x).relu())


def test_units_that_nobody_chose_come_back_where_the_configuration_says_the_rest() -> None:
    model = Biased(Config(inner=24)).eval()
    nn.init.constant_(model.positions[0].weight[:20], 1.0)  # the table is negative: 20 units are never on
    nn.init.zeros_(model.positions[0].bias)
    x = torch.randn(2, 5, 6)
    model(x)
    traced = fxprune.trace(model, x, modes=("eval",))
    fxprune.prune.channels(traced, 0.5, targets="up", round_to=1, runnable=model)
    final = fxprune.finalize(traced)
    assert final.plan.chosen == (("up.bias", 0), ("up.weight", 0))
    assert fxprune.graph.plan.ChannelPlan.from_json(final.plan.to_json()).chosen == final.plan.chosen
    small = fxprune.write_back(final, model)
    assert (small.config.inner, small.positions[0].out_features) == (12, 64)
    assert not small.kept
    torch.testing.assert_close(small(x), traced(x))


@pytest.mark.parametrize("value", [0.5, 3])
def test_numbers_that_are_put_in_a_list_come_back_as_they_were(value: float) -> None:
    from fxprune.graph.configuration_numbers import put_back, put_numbers

    inner = Config(widths=(2, 4))
    config = Config(part=inner, same=5)
    before = put_numbers(config, {"part.widths.1": value, "part.widths.0": 1, "same and other": 7})
    assert (inner.widths, config.same, config.other) == ((1, value), 7, 7)  # type: ignore[attr-defined]
    put_back(before)
    assert vars(config) == {"part": inner, "same": 5}
    assert inner.widths == (2, 4)  # type: ignore[attr-defined]


def test_what_a_class_made_of_numbers_is_not_built_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Stages(Config(widths=[8, 16], ratio=2.0))
    kept = {"stem.weight"}
    alone = [Configuration.of(model), Configuration.of(model, kept, valid=True)]
    wanted = [(found.numbers, found.followers, found.proportional) for found in alone if found is not None]
    built: list[Configured] = []
    init = Configured.__init__

    def counted(self: Configured, config: Config) -> None:
        built.append(self)
        init(self, config)

    monkeypatch.setattr(Configured, "__init__", counted)
    builds = Builds()
    first = Configuration.of(model, builds=builds)
    assert first is not None
    assert (first.numbers, first.followers, first.proportional) == wanted[0]
    assert len(built) > 2
    before = len(built)
    second = Configuration.of(model, kept, valid=True, builds=builds)
    assert second is not None
    assert (second.numbers, second.followers, second.proportional) == wanted[1]
    assert wanted[0] != wanted[1]
    assert len(built) == before


def test_numbers_that_go_by_another_name_come_back_as_they_were() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.Zamba2Config(attention_head_dim=8)
    assert "head_dim" in config.attribute_map
    assert "head_dim" not in dict(entries(config))
    put_back(put_numbers(config, {name: 2 * value for name, value in entries(config) if name == "attention_head_dim"}))
    assert config.attention_head_dim == 8
