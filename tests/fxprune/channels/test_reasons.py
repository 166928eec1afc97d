"""Whatever is dead and stays has a reason in the plan, and the reason is true."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxprune
from fxprune.channels import ChannelPlan
from fxprune.channels.coupling import couple
from fxprune.channels.dependence import fixed_nodes
from tests.fxprune.channels.exactness import EXACT, error
from tests.fxprune.channels.layers import Net, zero_rows
from tests.random_networks import Attention, ImageNetwork, TokenNetwork, network
from tests.selection_networks import SelectionNetwork

KINDS: dict[str, Callable[[random.Random], nn.Module]] = {
    "images": ImageNetwork, "tokens": TokenNetwork, "selections": SelectionNetwork
}  # fmt: skip


def finalized(model: nn.Module, x: Tensor) -> ChannelPlan:
    final = fxprune.finalize(fxprune.trace(model, (x,), modes=("eval",), dynamic_shapes=None), align=1)
    with torch.no_grad():
        assert error(model(x), final(x)) < EXACT
    assert final.plan is not None
    return final.plan


def layers(model: nn.Module) -> Iterator[tuple[str, int, Any]]:
    """The layers whose outputs are an axis of their weight: path, axis, module."""
    for path, layer in model.named_modules():
        if isinstance(layer, nn.Conv2d | nn.Conv1d | nn.Linear):
            yield path, 0, layer
        elif isinstance(layer, nn.Embedding) or (isinstance(layer, nn.ConvTranspose2d) and layer.groups == 1):
            yield path, 1, layer


def zero_slices(model: nn.Module) -> dict[str, Tensor]:
    """Which outputs of layers are zero but for a bias."""
    return {path: (layer.weight == 0).movedim(axis, 0).flatten(1).all(1) for path, axis, layer in layers(model)}


def unneeded_slices(model: nn.Module, inputs: Callable[[int], Tensor]) -> dict[str, Tensor]:
    """Which outputs of layers change no result: no gradient gets there, in this network and others with its zeros.

    Layers of one width may write to one stream, of which a channel is there for all of them or for none; and so may
    queries, keys and values that stand on an axis of their own.
    """
    other = copy.deepcopy(model)
    found = {path: torch.ones(layer.weight.shape[axis], dtype=torch.bool) for path, axis, layer in layers(model)}
    results: list[tuple[str, Tensor]] = []

    def watched(path: str) -> Callable[..., Tensor]:
        def hook(layer: nn.Module, args: Any, result: Tensor) -> Tensor:
            results.append((path, result))
            return result.clone()  # what follows may write into it

        return hook

    for path, _, layer in layers(other):
        layer.register_forward_hook(watched(path))
    for draw in range(12):
        with torch.no_grad():
            for p in other.parameters() if draw else ():
                p.copy_(torch.where(p == 0, p, torch.randn_like(p)))
        x = inputs(16)
        if x.is_floating_point():  # entries of every size: what a clamp hides of one shows in another
            x = x * 10 ** torch.empty_like(x).uniform_(-1, 1)
        results.clear()
        y = other(x)
        grads = torch.autograd.grad(y, [each for _, each in results], torch.randn_like(y), allow_unused=True)
        for (path, each), grad in zip(results, grads, strict=True):
            if grad is not None:
                channels = 1 if each.dim() == 4 or isinstance(other.get_submodule(path), nn.Conv1d) else -1
                found[path] &= (grad == 0).movedim(channels, 0).flatten(1).all(1)
    for path, attention in model.named_modules():
        if isinstance(attention, Attention) and attention.form == "unbind":
            rows = found[f"{path}.qkv"].view(3, -1)
            rows[:] = rows.all(0)
    together = {len(rows): torch.ones_like(rows) for rows in found.values()}
    for rows in found.values():
        together[len(rows)] &= rows
    return {path: together[len(rows)] for path, rows in found.items()}


def become_constant(model: nn.Module, seed: int) -> None:
    """Mask all rows of one layer or two: what follows them is the same for every input, or nothing needs the rest."""
    r = random.Random(seed)
    with torch.no_grad():
        for _, _, layer in r.sample(list(layers(model)), min(2, len(list(layers(model))))):
            layer.weight.zero_()


def assert_told(kind: str, seed: int, constant: bool = False, *, unneeded: bool = True) -> None:
    """What stays is told, of slices that are zero, and of those that nothing needs where `unneeded`."""
    model, inputs = network(seed, kind == "tokens", KINDS[kind])
    if constant:
        become_constant(model, seed)
    plan = finalized(model, inputs(2))
    told: dict[tuple[str, int], set[int]] = {}
    for name, axis, indices, why in plan.stayed:
        assert why
        told.setdefault((name, axis), set()).update(indices)
    dead = zero_slices(model)
    if unneeded:
        dead = {path: rows | dead[path] for path, rows in unneeded_slices(model, inputs).items()}
    for path, axis, _ in layers(model):
        name = f"{path}.weight"
        if name in plan.kept and name not in plan.dropped and plan.shapes[name][axis] > 1:
            stays = {*plan.kept[name][axis].tolist()} & {*dead[path].nonzero().flatten().tolist()}
            assert stays <= told.get((name, axis), set()), f"{kind} {seed}: {name}\n{plan.explain()}"


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_dead_stays_without_a_reason(kind: str) -> None:
    for seed in range(6):
        assert_told(kind, seed)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_stays_without_a_reason_of_networks_in_which_whole_layers_are_masked(kind: str) -> None:
    for seed in range(4):
        assert_told(kind, seed, constant=True)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("first", range(6, 106, 20))
def test_nothing_dead_stays_without_a_reason_in_many_more(kind: str, first: int) -> None:
    for seed in range(first, first + 20):  # shared layers tie slices that nothing needs to others
        assert_told(kind, seed, unneeded=not shares(kind, seed))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("first", range(4, 104, 20))
def test_nothing_stays_without_a_reason_of_many_more_with_whole_layers_masked(kind: str, first: int) -> None:
    for seed in range(first, first + 20):
        assert_told(kind, seed, constant=True, unneeded=not shares(kind, seed))


def shares(kind: str, seed: int) -> bool:
    """Whether a network calls one of its layers several times."""
    model, inputs = network(seed, kind == "tokens", KINDS[kind])
    calls: list[str] = []
    for path, _, layer in layers(model):
        layer.register_forward_hook(lambda *_, path=path: calls.append(path))
    model(inputs(2))
    return len(calls) > len(set(calls))


def why(call: Callable[..., Any], parameter: str = "first.weight", **modules: Any) -> list[str]:
    """The reasons for what stays of a parameter of a network over images."""
    torch.manual_seed(0)
    plan = finalized(Net(call, **modules).double().eval(), torch.randn(2, 3, 6, 6).double())
    return [text for name, _, _, text in plan.stayed if name == parameter]


def dead(layer: Any, *rows: int, bias: bool = False) -> Any:
    """A layer with rows of zeros, whose biases are ones unless `bias`."""
    with torch.no_grad():
        layer.bias.fill_(1.0)
    zero_rows(layer, *rows, bias=bias)
    return layer


def test_a_constant_that_a_layer_has_no_place_for_is_called_one() -> None:
    def twice(s: Any, x: Tensor) -> Tensor:
        return s.second(F.relu(s.first(x))) + s.second(F.relu(s.third(x)))

    # a padded layer that is called with two constants: its columns cannot merge for both
    found = why(
        twice, first=dead(nn.Conv2d(3, 8, 1), 1, 2), third=dead(nn.Conv2d(3, 8, 1), 1, 2),
        second=nn.Conv2d(8, 4, 3, padding=1),
    )  # fmt: skip
    assert found
    assert all("a constant there for which it has no place" in text for text in found)


def test_a_product_of_two_activations_reads_what_is_not_zero() -> None:
    found = why(
        lambda s, x: torch.einsum("bchw,bchw->bhw", F.relu(s.first(x)), F.relu(s.second(x))),
        first=dead(nn.Conv2d(3, 8, 1), 1, 2), second=nn.Conv2d(3, 8, 1),
    )  # fmt: skip
    assert found
    assert all("it is not always zero there" in text for text in found)


def test_what_depends_on_the_input_is_called_not_constant() -> None:
    found = why(
        lambda s, x: s.second(F.relu(s.first(x) + x.mean(1, keepdim=True))), first=dead(nn.Conv2d(3, 8, 1), 1, 2),
        second=nn.Conv2d(8, 4, 1),
    )  # fmt: skip
    assert found
    assert all("reads it, and it is not constant there" in text for text in found)


def test_a_live_row_that_nothing_reads_and_that_fills_a_group_is_told() -> None:
    second = nn.Conv2d(8, 8, 1, groups=2)
    third = nn.Conv2d(8, 4, 1)
    with torch.no_grad():
        third.weight[:, [0, 1]] = 0  # two of the four outputs of the first group
    found = why(
        lambda s, x: s.third(F.relu(s.second(F.relu(s.first(x))))), "second.weight",
        first=nn.Conv2d(3, 8, 1), second=second, third=third,
    )  # fmt: skip
    assert found == ["kept so that groups of channels stay equal"]


def test_a_live_row_that_completes_the_groups_of_a_shuffle_is_told() -> None:
    second = nn.Conv2d(8, 4, 1)
    with torch.no_grad():
        second.weight[:, [0, 2, 3, 4, 5]] = 0  # reads rows 4, 3 and 7: two of four places in two groups, less one
    model = Net(lambda s, x: s.second(s.shuffle(F.relu(s.first(x)))), first=nn.Conv2d(3, 8, 1), second=second)
    model.shuffle = nn.ChannelShuffle(2)
    plan = finalized(model.double().eval(), torch.randn(2, 3, 6, 6).double())
    assert plan.stayed == [("first.weight", 0, [0], "part of a grid whose other channels stay")]


def test_what_consecutive_shuffles_of_pixels_read_is_not_told() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.PixelShuffle(2), nn.AvgPool2d(2), nn.Conv2d(2, 8, 3), nn.PixelShuffle(2),
        nn.Conv2d(2, 4, 1),
    )  # fmt: skip
    assert finalized(model.double().eval(), torch.randn(2, 3, 6, 6).double()).stayed == []


def test_diagonals_are_refused_by_name() -> None:
    found = why(
        lambda s, x: torch.einsum("bchh->bc", F.relu(s.first(x))), first=dead(nn.Conv2d(3, 8, 1), 1, 2, bias=True)
    )
    assert found
    assert all("an equation with a diagonal" in text for text in found)


def test_what_a_result_that_is_the_same_for_every_input_reads_is_called_that() -> None:
    torch.manual_seed(0)
    first, rnn, last = nn.Linear(3, 6), nn.RNN(6, 5, batch_first=True), nn.Linear(5, 4)
    with torch.no_grad():
        rnn.weight_ih_l0.zero_()  # other states at every step, the same whatever comes in
    model = Net(lambda s, x: s.last(s.rnn(s.first(x))[0]), first=first, rnn=rnn, last=last).double().eval()
    plan = finalized(model, torch.randn(2, 7, 3).double())
    found = {why for name, *_, why in plan.stayed if name.startswith("rnn")}
    assert found
    assert all(
        text.endswith("; what it gives is the same for every input, which is not followed further") for text in found
    )


def test_what_leads_to_batch_norms_whose_results_nothing_needs_is_told() -> None:
    torch.manual_seed(0)
    last = nn.Linear(4, 5)
    with torch.no_grad():
        last.weight.zero_()

    def attend(s: Any, x: Tensor) -> Tensor:
        y = torch.softmax(s.q(x) @ s.k(x).transpose(1, 2), -1) @ s.v(x)
        return s.last(s.norm(y.transpose(1, 2)).transpose(1, 2))  # type: ignore[no-any-return]

    model = Net(attend, q=nn.Linear(3, 4), k=nn.Linear(3, 4), v=nn.Linear(3, 4), norm=nn.BatchNorm1d(4), last=last)
    plan = finalized(model.double().eval(), torch.randn(2, 5, 3).double())
    told = {(name, i) for name, axis, indices, _ in plan.stayed if axis == 0 for i in indices}
    assert {(f"{name}.weight", i) for name in "qk" for i in plan.kept["q.weight"][0].tolist()} <= told


@pytest.mark.parametrize(
    ("kind", "reads"),
    [*((kind, reads) for kind in ("lstm", "gru", "rnn") for reads in ("all", "mean", "both")), ("cell", "last")],
)
def test_what_hidden_units_give_that_only_biases_move_is_called_the_same_for_every_input(kind: str, reads: str) -> None:
    torch.manual_seed(0)
    layers = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}
    both, options = reads == "both", {"num_layers": 2, "batch_first": True}
    rnn: Any = nn.GRUCell(6, 5) if kind == "cell" else layers[kind](6, 5, bidirectional=both, **options)
    with torch.no_grad():
        for name, p in rnn.named_parameters():
            if "weight" in name:
                units = p.view(-1, 5, p.shape[1])
                units[:, 2:] = 0  # a unit of an RNN is another number at every step where it reads another one
                if "hh" in name:
                    units[:, 2, 3] = units[:, 3, 4] = units[:, 4, 3] = 0.5
    width = 10 if both else 5
    between, last = nn.Linear(width, 4), nn.Linear(4, 3)
    with torch.no_grad():
        between.weight.view(4, -1, 5)[..., :2] = 0

    def read(s: Any, x: Tensor) -> Tensor:
        y = s.first(x)
        if kind == "cell":
            state = y.new_zeros(2, 5)
            for step in y.unbind(1):
                state = s.rnn(step, state)
            return state
        output, states = s.rnn(y)
        states = states[0] if kind == "lstm" else states
        if reads == "both":
            return torch.cat([states[-2], states[-1]], -1)
        result: Tensor = output if reads == "all" else states.mean(0)
        return result

    model = Net(
        lambda s, x: s.last(s.between(read(s, x)).relu()),
        first=nn.Linear(3, 6), rnn=rnn, between=between, last=last,
    ).double().eval()  # fmt: skip
    plan = finalized(model, torch.randn(2, 7, 3).double())
    told = {(name, i) for name, axis, indices, _ in plan.stayed if axis == 0 for i in indices}
    assert {("between.weight", i) for i in range(4)} <= told


def test_a_query_of_a_head_whose_key_is_zero_is_told_though_its_head_and_its_channel_are_needed() -> None:
    torch.manual_seed(0)
    q, k, v, out = (nn.Linear(6, 6) for _ in range(4))
    zero_rows(k, 4, bias=True)  # channel 1 of the second of two heads

    def heads(y: Tensor) -> Tensor:
        return y.view(2, 5, 2, 3).transpose(1, 2)

    def attend(s: Any, x: Tensor) -> Tensor:
        y = torch.softmax(heads(s.q(x)) @ heads(s.k(x)).transpose(-1, -2), -1) @ heads(s.v(x))
        return s.out(y.transpose(1, 2).reshape(2, 5, 6))

    plan = finalized(Net(attend, q=q, k=k, v=v, out=out).double().eval(), torch.randn(2, 5, 6).double())
    grid = "part of a grid whose other channels stay"
    assert plan.stayed == [("q.weight", 0, [4], grid), ("k.weight", 0, [4], grid)]


def test_cells_of_a_weight_with_two_axes_of_rows_are_told_by_both() -> None:
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(8, 2, 4))
    with torch.no_grad():
        weight[:, 0, [1, 2]] = 0
    model = Net(
        lambda s, x: s.last(torch.einsum("bchw,cgo->bgohw", s.first(x), s.weight).flatten(1, 2)),
        first=nn.Conv2d(3, 8, 1), weight=weight, last=nn.Conv2d(8, 4, 1),
    ).double()  # fmt: skip
    plan = finalized(model.eval(), torch.randn(2, 3, 6, 6).double())
    assert plan.stayed == [("weight", 2, [1, 2], "part of a grid whose other channels stay, at 0 of axis 1")]


def test_what_is_random_or_written_over_is_not_the_same_for_every_input() -> None:
    torch.manual_seed(0)

    def noisy(s: Any, x: Tensor) -> Tensor:
        return s.last(F.dropout(s.first(x) * 0 + s.shift, training=True) * s.first(x))

    def over(s: Any, x: Tensor) -> Tensor:
        y = s.shift.expand(2, 6).clone()
        y[:, 1:3] += s.first(x)[:, 1:3]
        return s.last(y)

    for call in (noisy, over):
        model = Net(call, first=nn.Linear(3, 6), last=nn.Linear(6, 4), shift=nn.Parameter(torch.randn(6)))
        traced = fxprune.trace(
            model.double().eval(), (torch.randn(2, 3).double(),), modes=("eval",), dynamic_shapes=None
        )
        coupling = couple(traced, traced.graphs)
        walk = coupling.walks["eval"]
        (last,) = next(node for node in walk.graph.nodes if node.op == "output").all_input_nodes
        assert last not in fixed_nodes(walk, coupling.of)


def test_columns_of_an_embedding_that_stay_are_told() -> None:
    words = nn.Embedding(11, 6)
    with torch.no_grad():
        words.weight[:, [2, 4]] = 0
    model = Net(lambda s, x: s.words(x), words=words).double().eval()
    plan = finalized(model, torch.randint(11, (2, 5)))
    assert plan.stayed == [("words.weight", 1, [2, 4], "pinned by `output` (output): the model returns it")]
