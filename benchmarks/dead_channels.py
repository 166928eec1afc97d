"""How much goes of what can go, in random networks, by an oracle that knows nothing of fxprune (oracle.py).

Printed are the networks, those whose results differ in float64, the dead rows, how many of them are free, how many
went, and how many stay without a reason in the plan; then why free ones stay, as the plan says. Masks make some
networks constants, whatever comes in: all is dead in these, and they have lines of their own.

Run: PYTHONPATH=. python benchmarks/dead_channels.py [networks of each family [first seed]]
"""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Callable, Sequence

import torch
from command import argument, prepare
from oracle import search
from oracle_structure import Inputs
from torch import nn

import fxprune
from tests.fxprune.channels.exactness import EXACT, error
from tests.random_networks import network
from tests.random_recurrent import recurrent_network
from tests.random_streams import ByHand, streams
from tests.selection_networks import SelectionNetwork

UNTOLD = "no reason"
FAMILIES: dict[str, Callable[[int], tuple[nn.Module, Inputs]]] = {
    "images": network,
    "selections": lambda seed: network(seed, kind=SelectionNetwork),
    "tokens": lambda seed: network(seed, words=True),
    "streams": streams,
    "recurrent": recurrent_network,
}


def units(model: nn.Module, final: nn.Module) -> tuple[int, int]:
    """Hidden units whose candidate is zero: how many can go, and went; as many of every layer and direction.

    They are the same ones where the mean of the last states of all is read.
    """
    sizes, free, gone = {name: len(p) for name, p in final.named_parameters()}, 0, 0
    for name, module in model.named_modules():
        owner = model.get_submodule(name.rpartition(".")[0])
        begins = getattr(owner, "start", "none") in ("none", "zeros")
        if not isinstance(module, nn.RNNBase) or module.proj_size or not begins:
            continue
        count, gates = module.hidden_size, len(module.weight_hh_l0) // module.hidden_size
        rows, found = slice(2 * count, 3 * count) if gates > 1 else slice(count), []
        for suffix in [n.removeprefix("weight_ih") for n, _ in module.named_parameters() if n.startswith("weight_ih")]:
            parts = [getattr(module, kind + suffix, None) for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
            found.append(torch.cat([p[rows].reshape(count, -1) for p in parts if p is not None], 1).any(1))
        live = torch.stack(found)
        live = live.any(0, keepdim=True) if getattr(owner, "reads", "all") == "mean" else live
        least = min(count - 1, int((~live).sum(1).min()))
        free, gone = free + least, gone + min(least, count - sizes.get(f"{name}.weight_ih_l0", 0) // gates)
    return free, gone


def measure(family: str, seed: int) -> tuple[Counter[str], Counter[str]]:
    """One network: counts, and why free rows stay."""
    model, inputs = FAMILIES[family](seed)
    for module in model.eval().modules():
        if isinstance(module, ByHand):
            module.form = torch.overrides.wrap_torch_function(lambda x, w, b: (x,))(module.form)
    traced = fxprune.trace(
        copy.deepcopy(model), inputs(2), modes=("eval",), dynamic_shapes=None if seed % 3 else "batch"
    )
    final = fxprune.finalize(traced, align=1)
    assert final.plan is not None
    samples = [inputs(batch) for batch in ((2, 2) if seed % 3 else (1, 2, 5))]
    with torch.no_grad():
        wrong = any(error(model(x), final(x)) > EXACT for x in samples)
    found, dead, can_go = search(model, inputs)
    free, gone = units(model, final)
    whys: Counter[str] = Counter()
    untold = 0
    for name, layer in found.layers.items():
        rows = {row for other, row in dead if other == name}
        can = sum(other == name for other, _ in can_go)
        left = _left(final, name, layer.row_axes, layer.row_shape, rows)
        went = min(can, len(rows) - len(left))
        free, gone = free + can, gone + went
        told = [_reason(final.plan, name, layer.row_axes, layer.row_shape, row) for row in left]
        untold += told.count(UNTOLD)
        told.sort(key=lambda why: (why != UNTOLD, why))
        whys.update(told[: can - went])  # which of the rows that stay are the free ones is a matter of choice
    return Counter(networks=1, wrong=wrong, dead=len(dead), free=free, gone=gone, untold=untold), whys


def _left(
    final: fxprune.TracedModule, name: str, axes: Sequence[int], shape: Sequence[int], rows: set[int]
) -> list[int]:
    """Which of some rows a finalized network still has."""
    assert final.plan is not None
    if name not in dict(final.named_parameters()):
        return []
    if name not in final.plan.kept:
        return sorted(rows)
    if not axes:  # of a transposed convolution in groups
        (read,) = [node for node in final.graphs["eval"].nodes if node.op == "get_attr" and node.target == name]
        gone = shape[0] - int(next(iter(read.users)).meta["val"].shape[1])
        return sorted(rows)[gone:]  # which ones is not known
    stay = torch.zeros(list(shape), dtype=torch.bool)
    stay[torch.meshgrid(*(final.plan.kept[name][axis].cpu() for axis in axes), indexing="ij")] = True
    return [row for row in sorted(rows) if stay.flatten()[row]]


def _reason(plan: fxprune.ChannelPlan, name: str, axes: Sequence[int], shape: Sequence[int], row: int) -> str:
    """Why a row stays, by the plan: a row of several axes stays where its index of any of them does."""
    if not axes:
        whys = {why for other, _, _, why in plan.stayed if other == name}
    else:
        index = dict(zip(axes, torch.unravel_index(torch.tensor(row), tuple(shape)), strict=True))
        whys = {why for other, axis, at, why in plan.stayed if other == name and index.get(axis, -1) in at}
    return re.sub(r"`.*?` \((\S+).*?\)", r"\1", min(whys)) if whys else UNTOLD


def main() -> None:
    prepare()
    count, first = int(argument(1, 20)), int(argument(2, 0))
    total: Counter[str] = Counter()
    for family in FAMILIES:
        counts: dict[str, Counter[str]] = {family: Counter(), f"{family}, constants": Counter()}
        reasons: dict[str, Counter[str]] = {name: Counter() for name in counts}
        for seed in range(first, first + count):
            one, whys = measure(family, seed)
            name = f"{family}, constants" if is_constant(family, seed) else family
            counts[name], reasons[name], total = counts[name] + one, reasons[name] + whys, total + one
        for name in counts:
            print(_row(name, counts[name]), flush=True)
            for why, times in reasons[name].most_common():
                print(f"    {times} stayed: {why}")
    print(_row("all", total))


def is_constant(family: str, seed: int) -> bool:
    """Whether a network gives the same whatever comes in."""
    model, inputs = FAMILIES[family](seed)
    with torch.no_grad():
        first, second = (model.eval()(inputs(8)) for _ in range(2))
    return bool((first - second).abs().max() <= 1e-12)


def _row(name: str, counts: Counter[str]) -> str:
    share = counts["gone"] / max(counts["free"], 1)
    numbers = ", ".join(f"{counts[key]} {key}" for key in ("networks", "wrong", "dead", "free", "gone", "untold"))
    return f"{name}: {numbers} ({share:.4f})"


if __name__ == "__main__":
    main()
