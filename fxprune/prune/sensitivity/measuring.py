"""`fxprune.sensitivity`, and the importance "obs"."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor, fx

from fxprune import driver
from fxprune.calling import named_arguments
from fxprune.channels.computed_weights import with_plain_weights
from fxprune.channels.groups import ChannelGroup, Grouping
from fxprune.errors import ArgumentError, ArgumentTypeError, PruningError
from fxprune.graph.calls import each_call
from fxprune.graph.requirements import require_eval
from fxprune.graph.seeding import seeded
from fxprune.graph.spread_modules import lent_to_first
from fxprune.graph.traced import TracedModule
from fxprune.prune.channel_request import chosen_among
from fxprune.prune.importance_registry import IMPORTANCES, Evidence, Importance
from fxprune.prune.repair.batches import Batches
from fxprune.prune.repair.stacks import in_single_layers
from fxprune.prune.sensitivity.analysis import measure
from fxprune.prune.sensitivity.distances import Distance, OutputDistance
from fxprune.prune.sensitivity.report import Sensitivity, sensitivity_of

# Of a group's units; the more groups there are, the fewer shares, and samples, each is measured at: so the number of
# runs over the network stays as it is, and costs grow with its depth alone.
_SHARES = {5: (0.1, 0.25, 0.5, 0.7, 0.9), 4: (0.1, 0.3, 0.6, 0.9), 3: (0.2, 0.5, 0.85), 2: (0.25, 0.7)}
_MOST_MEASURED, _MOST_RUNS = 160, 288
_FEWEST_SAMPLES, _MOST_SAMPLES = 8, 32


@named_arguments
@lent_to_first("batches")
def sensitivity(
    traced: TracedModule,
    batches: Any,
    *,
    distance: str | Distance = "auto",
    weight: Callable[..., Tensor] | None = None,
    targets: str | Iterable[str] | None = None,
    ignore: str | Iterable[str] = (),
    kinds: str | Iterable[str] | None = None,
    shares: Iterable[float] | None = None,
    max_samples: int | None = None,
) -> Sensitivity:
    """Measure what the output loses with the channels of each group, when what reads them makes up for it.

    For each group of channels: its units are ordered by what their readers lose, after the best that is left can do
    (the optimal brain surgeon on second moments of the inputs; heads in the basis that `reconstruct` gives them), and
    by how far the output moves with that (second moments of gradients of the readers' outputs; no parameter's). The
    order is cut at several shares, the readers' weights are made up for what is gone, and the outputs are compared
    with those of the module as it is, on samples that no moment was made from. Nothing is changed. The weights that
    make up are not kept: after pruning, `fxprune.reconstruct` finds them for all groups together.

    Sources: the order, Kurtic et al., "ZipLM" (2023), https://arxiv.org/abs/2302.04089, after Hassibi and Stork,
    "Second order derivatives for network pruning: Optimal Brain Surgeon" (1993),
    https://proceedings.neurips.cc/paper/1992/hash/303ed4c69846ab36c2904d3ba8573050; how far the output moves, Martens
    and Grosse, "Optimizing Neural Networks with Kronecker-factored Approximate Curvature" (2015),
    https://arxiv.org/abs/1503.05671.

    Args:
        traced: the module; its eval graph is what runs, in whichever mode it is. What is masked counts as zero.
        batches: inputs without labels: a tensor, a tuple of positional arguments, a dict of keyword arguments, a
            `fxprune.Call` of both, or a list, loader or generator of these. At least two samples: one in five is held
            back, for the curves.
        distance: of outputs to those of the module as it is: "divergence" (Kullback-Leibler, of outputs that are
            logits), "error" (squared, relative to their spread), "cosine" (1 - cosine similarity along the last axis),
            "auto": divergence for outputs of a softmax, a linear layer or a convolution, else error; where an output
            has positions beside its classes, each counts for log(classes) at most, and the error of the logits,
            relative to their size, is added, since a few samples tell little by divergence alone; or a function
            `(outputs, outputs as they are) -> scalar`, larger for outputs further off, a number or a tensor of one.
        weight: called as the module is, gives the rows that count: a tensor [samples], or [samples, positions], zero
            for padding. Outputs that begin with other sizes count as a whole.
        targets, ignore, kinds: the groups to measure, as for `fxprune.prune.channels`; all that a budget may cut.
        shares: of the units of a group, above 0 and below 1, at which its curve is measured. None takes five, from 0.1
            to 0.9, and fewer, at least two, where there are more than 32 groups.
        max_samples: how many samples curves are measured on, at most, of those held back. None takes 32, and fewer, at
            least 8, where there are more than 9 groups; not of divergences of one row a sample, which differ much.

    Returns:
        A `Sensitivity`, which prints as a summary, has `table()`, and is an importance for `fxprune.prune.channels`.

    Raises:
        InputError: batches hold labels, or inputs of another form.
        ArgumentError, ArgumentTypeError: fewer than two samples, or an unusable option.
        NameLookupError: a pattern matches nothing.
        PruningError: nothing may be pruned, or NaN or inf come up; the message has the node.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 4)).eval()
        >>> batches = [torch.randn(32, 8) for _ in range(8)]
        >>> traced = fxprune.trace(model, batches[0])
        >>> sensitivity = fxprune.sensitivity(traced, batches)
        >>> print(sensitivity.table())
        >>> report = fxprune.prune.channels(traced, macs=0.5, importance=sensitivity)
        >>> repair = fxprune.reconstruct(traced, batches)
    """
    require_eval(traced, "sensitivity", PruningError)
    grouping = Grouping(with_plain_weights(driver.plain_view(traced)))
    groups = chosen_among(grouping.groups, targets, ignore, kinds)
    graph = in_single_layers(grouping.plain.graphs["eval"])
    far = OutputDistance(graph, distance)
    given = None if shares is None else _shares(shares)
    most = None if max_samples is None else _count(max_samples, "max_samples")
    return _measured(traced, grouping, graph, groups, batches, far, weight, given, most)


def measured_for_choice(
    traced: TracedModule, grouping: Grouping, groups: Sequence[ChannelGroup], evidence: Evidence
) -> Sensitivity:
    """The curves behind `importance="obs"`.

    Raises:
        ArgumentError: there is no loader.
    """
    require_eval(traced, 'importance="obs"', PruningError)
    if evidence.loader is None:
        raise ArgumentError(
            'importance="obs" looks at data: give loader=, batches of inputs without labels, such as a list of tensors.'
        )
    graph = in_single_layers(grouping.plain.graphs["eval"])
    far = OutputDistance(graph, "auto" if evidence.loss is None else evidence.loss, "loss")
    batches = evidence.loader
    if evidence.max_batches is not None:
        batches = itertools.islice(each_call(batches), _count(evidence.max_batches, "max_batches"))
    return _measured(traced, grouping, graph, groups, batches, far, evidence.weight)


def _measured(
    traced: TracedModule,
    grouping: Grouping,
    graph: fx.Graph,
    groups: Sequence[ChannelGroup],
    batches: Any,
    far: OutputDistance,
    weight: Callable[..., Tensor] | None,
    shares: Sequence[float] | None = None,
    samples: int | None = None,
) -> Sensitivity:
    start = time.perf_counter()
    if shares is None:
        shares = _SHARES[min(max(_MOST_MEASURED // len(groups), min(_SHARES)), max(_SHARES))]
    if samples is None:
        fewest = _MOST_SAMPLES if far.is_one_row_of_classes else _FEWEST_SAMPLES
        samples = min(max(_MOST_RUNS // len(groups), fewest), _MOST_SAMPLES)
    with seeded(traced):
        found = measure(grouping, graph, groups, Batches(traced, graph, batches, weight), far, shares, samples)
    return sensitivity_of(found.curves, groups, str(far), found.samples, time.perf_counter() - start)


def _shares(shares: Any) -> tuple[float, ...]:
    given = tuple(shares) if isinstance(shares, Iterable) and not isinstance(shares, str) else (shares,)
    for share in given:
        if isinstance(share, bool) or not isinstance(share, int | float):
            raise ArgumentTypeError(f"shares={shares!r}: numbers from 0 to 1 are needed.")
        if not (math.isfinite(share) and 0 < share < 1):
            raise ArgumentError(f"shares={shares!r}: numbers above 0 and below 1 are needed.")
    if not given:
        raise ArgumentError("shares is empty: at least one number is needed.")
    return tuple(sorted(given))


def _count(count: Any, option: str) -> int:
    if isinstance(count, bool) or not isinstance(count, int):
        raise ArgumentTypeError(f"{option}={count!r}: an integer is needed.")
    if count < 1:
        raise ArgumentError(f"{option}={count}: 1 or more are needed.")
    return count


IMPORTANCES.add("obs", Importance(curves=measured_for_choice))
