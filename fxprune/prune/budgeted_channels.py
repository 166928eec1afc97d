"""Masks on whole channels: coupled groups, scored, cut to a budget."""

from __future__ import annotations

import contextlib
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn

from fxprune import driver
from fxprune.calling import renamed
from fxprune.channels.groups import ChannelGroup, Kind
from fxprune.errors import ArgumentTypeError, PruningError
from fxprune.graph.masks import MasksOnDemand, view
from fxprune.graph.requirements import require_flag, require_list, require_traced
from fxprune.graph.traced import TracedModule
from fxprune.graph.values import unmasked
from fxprune.progress import shown
from fxprune.prune.channel_budgets import limit_of, share_of
from fxprune.prune.channel_choice import Candidates, Outcome, candidates, chosen, in_class
from fxprune.prune.channel_report import ChannelReport
from fxprune.prune.channel_request import (
    DEFAULT_AMOUNT,
    SIZES,
    ChannelRequest,
    Importance,
    asked_for,
    check_evidence,
    request_for,
)
from fxprune.prune.channels_of_all import chosen_for_all
from fxprune.prune.class_limits import ClassLimits
from fxprune.prune.decisions import record, undone
from fxprune.prune.group_record import numbered_labels
from fxprune.prune.importance_registry import Evidence
from fxprune.prune.latency import LatencyTable
from fxprune.prune.latency.measuring import Timing, check_prices
from fxprune.prune.sensitivity import Sensitivity
from fxprune.prune.whole_blocks import Choose, WholeBlocks, whole_blocks


@renamed("batches", "max_batches")
@renamed("provider", "providers", lambda provider: (provider,))
@chosen_for_all
@shown("choose channels")
def channels(
    traced: TracedModule,
    amount: float | None = DEFAULT_AMOUNT,
    *,
    importance: Importance = "l2",
    scope: str = "global",
    targets: str | Iterable[str] | None = None,
    ignore: str | Iterable[str] = (),
    kinds: str | Iterable[str] | None = None,
    round_to: int | str = "auto",
    max_per_group: float = 1.0,
    at_least: int = 1,
    normalize: bool | None = None,
    macs: float | None = None,
    parameters: float | None = None,
    speedup: float | None = None,
    seed: int | None = None,
    loader: Iterable[Any] | None = None,
    loss: Callable[[Any, Any], Any] | None = None,
    weight: Callable[..., torch.Tensor] | None = None,
    max_batches: int | None = None,
    threads: int = 1,
    batch: int = 1,
    providers: Sequence[str] = ("CPUExecutionProvider",),
    prices: str | LatencyTable = "auto",
    runnable: nn.Module | None = None,
    compact_masks: bool | None = None,
) -> ChannelReport:
    """Mask whole channels, by groups of slices that stand or fall together, so that `finalize` removes them exactly.

    The score of a unit is the mean over the slices that belong to it, of writers and readers alike, biases aside; for
    the global scope it is divided by its group's mean, so that layers of different scale compare (`normalize`). Both
    are the defaults of DepGraph (Fang et al., "DepGraph: Towards Any Structural Pruning", 2023,
    https://arxiv.org/abs/2301.12900). Rows of weights, biases, gains and shifts of normalizations are masked, and the
    columns that read them; training can go on, `finalize` makes it smaller.

    What is left is what `finalize` leaves by default: it rounds the counts of these channels no further. A budget is
    never exceeded, and used up to 2 % or, where units are larger, to a unit. A unit that is masked already counts, and
    goes first: called again with a smaller budget, the function masks more. As long as neither weights nor masks have
    changed, more of the same budget, by scores of weights alone, is chosen anew: steps end where one call does.

    Args:
        traced: the module, changed in place.
        amount: share of the units that goes (float) or their number (int); 0.5 where none of the budgets below takes
            its place. Of these, one can be given, or several: then all are kept, and the one that binds is used up.
        importance: "l1", "l2", "linf" (norms of a slice, for l2 its square, as DepGraph takes it), "random", "bn"
            (gains of batch norm: Liu et al., "Network Slimming", 2017, https://arxiv.org/abs/1708.06519), "fpgm"
            (distance to the other filters: He et al., 2019, https://arxiv.org/abs/1811.00250), "taylor" (Molchanov et
            al., 2019, https://arxiv.org/abs/1906.10771; needs `loader` and `loss`), a name that was given to a score
            of entries by `fxprune.importance.register`, or a function from a `ChannelGroup` to a tensor [units]. "bn"
            leaves groups without a batch norm alone, and "fpgm" looks at the weights that write a group. For trained
            networks, "obs": what the output loses when what is left makes up for the channels that went (Kurtic et al.,
            "ZipLM", 2023, https://arxiv.org/abs/2302.04089; `fxprune.sensitivity`, whose result is an importance, too);
            needs `loader`, and counts on `fxprune.reconstruct` afterwards, as masks alone make up for nothing.
        scope: "global" compares units of all groups; "local" takes the same share of every group.
        targets: patterns of parameter or module names; groups that write one of these are pruned, None prunes all.
        ignore: patterns; groups with a member of such a name are left alone.
        kinds: the kinds of groups to prune, as in `ChannelGroup.kind`: "attention head", "MLP unit", ...; None: all.
            "block" are whole residual blocks, modules of a list that are the identity where their branches are zero:
            alone, or beside other kinds where these do not reach a budget of MACs or parameters.
        round_to: what stays of a group (of each conv group or head, where it has these) is a multiple of it. "auto"
            takes 16 for convolutions, as onnxruntime computes them in blocks, and 1 for matrix products. Where a budget
            is not used up to 2 % by whole multiples, one to three groups are cut by multiples of 8, 4 or 1, in the way
            that costs the least latency, and a budget that multiples cannot reach is cut finer: with "auto" groups with
            fewer than 32 and 16 channels to multiples of 8 and 4 (under `amount` from the start), at last all as they
            fall. Under a budget of MACs or speed,
            "auto" takes a multiple less where memory traffic makes MACs slow, and one more elsewhere.
        max_per_group: largest share of a group that goes. at_least: units that every group keeps.
        normalize: whether scores are divided by their group's mean for the global scope. None does so for the built-in
            names; what a function gives, or was registered, is compared across groups as it is.
        macs, parameters: what may be left, as a fraction of the dense model or as a count, of MACs for one sample.
        speedup: how many times faster in onnxruntime than `traced` finalized as it is, measured on this machine.
        seed: for "random"; None draws from the global generator.
        loader, loss, max_batches: for "taylor" and what is registered, as for `fxprune.importance.scores`. For "obs",
            `loader` is batches of inputs without labels, as for `fxprune.sensitivity`, and `loss` its distance, a
            function `(outputs, outputs as they are) -> scalar`; None is "auto".
        weight: for "obs": called as the module is, gives the rows that count, a tensor [samples] or [samples,
            positions], zero for padding.
        threads, batch, providers: of the measurement for `speedup`; a batch that is not free is the sample's, providers
            are onnxruntime's, a list in order of preference.
        prices: for `speedup`, and losses of the output ("obs", a `fxprune.Sensitivity`): what these are weighed by:
            "macs", what a unit saves of them; "latency", what it saves in time, measured first as by
            `fxprune.latency_table`; such a table, which costs nothing. "auto" is "macs". The speed itself is measured
            in any case.
        runnable: the model that was traced: channels are chosen so that its class runs with what is left, for
            `fxprune.write_back`. Parts by `chunk` stay equal, group norms lose whole groups; of a model that is built
            from a configuration, as those of transformers are, what follows from one number changes alike, and what
            the configuration cannot say stays, with that as its reason, so that `from_pretrained` takes what comes
            back. What is chosen is then written back for a trial: where the class
            does not run with it, or needs zeros in its place, the module that fails gets less freedom, and channels
            are chosen again. Where none of that reaches a budget of MACs or parameters, whole blocks go, too, as few as
            are needed, if a configuration can say fewer layers; `report.blocks` names them.
        compact_masks: whether a mask of rows or of columns alone holds one vector, expanded to the shape of the
            parameter, in place of an entry for each of the parameter's; of the rows and columns of a convolution, one
            value a kernel. None: where the module is traced for eval mode
            alone, so that nothing is trained, and is not spread over processes. Names, shapes, types and values are the
            same. Such a mask is not to be written into: torch refuses most of that, and what it lets pass the next call
            takes back, and raises an ArgumentError. `load_state_dict` and `DistributedDataParallel(traced)` first let
            it have all entries. For a module in one process.

    Returns:
        A `ChannelReport`, which prints as a summary.

    Raises:
        ArgumentError, ArgumentTypeError: contradictory, missing or unusable options.
        NameLookupError: a pattern matches nothing.
        PruningError: nothing may be pruned, a budget cannot be reached (the message has the best value), or scores
            are NaN. No mask is inserted then.

    Example:
        >>> report = fxprune.prune.channels(traced, macs=0.5)
        >>> final = fxprune.finalize(traced)

        A trained network, with a list of batches of inputs:

        >>> report = fxprune.prune.channels(traced, macs=0.5, importance="obs", loader=batches)
        >>> repair = fxprune.reconstruct(traced, batches)
    """
    require_traced(traced)
    require_list("providers", providers)
    request = request_for(
        asked_for(amount, macs=macs, parameters=parameters, speedup=speedup), importance, scope=scope,
        round_to=round_to, max_per_group=max_per_group, at_least=at_least, normalize=normalize, targets=targets,
        ignore=ignore, kinds=kinds, runnable=runnable is not None,
    )  # fmt: skip
    if runnable is not None and (not isinstance(runnable, nn.Module) or isinstance(runnable, fx.GraphModule)):
        raise ArgumentTypeError(f"runnable is a {type(runnable).__name__}: the eager module that was traced is needed.")
    if runnable is not None and isinstance(loader, Iterator):  # it may be read more than once
        loader = list(itertools.islice(loader, max_batches))
    evidence = Evidence(loader, loss, max_batches, seed, weight)
    check_evidence(importance, evidence)
    if compact_masks is not None:
        require_flag("compact_masks", compact_masks)
    timing = Timing(threads, batch, tuple(providers))
    check_prices(prices, request, timing)
    before, earlier = undone(traced, request)

    def choose(module: TracedModule, asked: ChannelRequest, model: nn.Module | None) -> Outcome:
        limits = None if model is None else ClassLimits(model)
        if limits is not None and _is_costly(asked, evidence, prices):
            _without_data(module, _cheap(asked), limits)
        with contextlib.ExitStack() as stack:
            measure = None
            if asked.asks_for("speedup"):
                measure = stack.enter_context(
                    driver.stopwatch(module, threads=threads, batch=batch, providers=providers)
                )
            return in_class(
                module,
                limits,
                lambda: chosen(candidates(module, asked, evidence, limits, prices, timing), asked, measure),
            )

    found, decided, report = _channels_or_blocks(before, request, evidence, runnable, choose)
    earlier = {**{name: view(before, name).mask for name in found}, **earlier}
    wanted = MasksOnDemand(earlier, lambda name: found[name] if name in found else _mask_or_ones(before, name))
    driver.insert_masks(traced, wanted, compact=are_vectors(traced, compact_masks))
    record(traced, request, decided, earlier)
    return report


def are_vectors(traced: TracedModule, asked: bool | None) -> bool:
    """Whether masks of channels hold vectors where that is asked for so; None: where nothing is trained."""
    return traced.modes == ("eval",) if asked is None else asked


def _channels_or_blocks(
    before: TracedModule, request: ChannelRequest, evidence: Evidence, model: nn.Module | None, choose: Choose
) -> tuple[Mapping[str, torch.Tensor], frozenset[tuple[str, int]], ChannelReport]:
    """The masks to insert, the axes that they decide, and the report: of channels, or of blocks where these must go."""
    refusal: PruningError | None = None
    if request.kinds != (Kind.BLOCK,):
        try:
            outcome = choose(before, request.of_channels, model)
            return outcome.masks, outcome.among.decided, _report(outcome, request)
        except PruningError as error:
            if not request.may_take_blocks or (Kind.BLOCK not in (request.kinds or ()) and model is None):
                raise
            refusal = error
    try:
        whole = whole_blocks(before, request, evidence, model, None if refusal is None else choose, refusal)
    except PruningError as error:
        if refusal is None:
            raise
        raise type(refusal)(f"{refusal} Whole blocks were tried, too: {error}") from error
    return whole.masks, whole.decided, _report_of_blocks(whole, request, refusal)


def reports_under(
    traced: TracedModule,
    sensitivity: Sensitivity,
    shares: Iterable[float],
    *,
    runnable: nn.Module | None = None,
    **options: Any,
) -> Iterator[ChannelReport]:
    """What `channels` would report for several budgets of MACs; what they have in common is computed once.

    Args:
        traced: the module; it stays as it is. sensitivity: the curves. shares: of the MACs, what may be left.
        runnable: as of `channels`. options: as of `fxprune.prune.channel_request.request_for`.

    Raises:
        PruningError: as of `channels`, once it is a budget's turn.
    """
    common: Candidates | None = None
    for share in shares:
        request = request_for((("macs", share),), sensitivity, runnable=runnable is not None, **options)
        before, _ = undone(traced, request)
        if runnable is None and before is traced:
            common = common or candidates(traced, request, Evidence(None))
            outcome = chosen(common, request)
        else:  # what the class asks for, and what was chosen before, differs by the budget
            outcome = _without_data(before, request, None if runnable is None else ClassLimits(runnable))
        yield _report(outcome, request)


def _without_data(before: TracedModule, request: ChannelRequest, limits: ClassLimits | None) -> Outcome:
    return in_class(before, limits, lambda: chosen(candidates(before, request, Evidence(None), limits), request))


def _is_costly(request: ChannelRequest, evidence: Evidence, prices: str | LatencyTable) -> bool:
    """Whether a choice needs data or measurements, so that it had better not be made again and again."""
    return evidence.loader is not None or request.asks_for("speedup") or prices == "latency"


def _cheap(request: ChannelRequest) -> ChannelRequest:
    """A request for a choice that is alike, by weights alone."""
    budgets = request.budgets if request.is_of_sizes else (("amount", 0.5),)
    return replace(request, importance="l2", normalize=None, budgets=budgets)


def _mask_or_ones(traced: TracedModule, name: str) -> torch.Tensor:
    own = view(traced, name)
    if own.mask is not None:
        return own.mask
    values = unmasked(traced, own)
    return torch.ones((), dtype=values.dtype, device=values.device).expand(values.shape)


def _binding(outcome: Outcome, request: ChannelRequest) -> str:
    """The budget that more goes for than for the others: of sizes, that of which the largest share is left."""
    if outcome.for_speed or not request.sizes:
        return request.budgets[-1][0]
    left = {"macs": outcome.macs, "parameters": outcome.parameters}
    dense = dict(zip(SIZES, outcome.among.grouping.dense, strict=False))
    asked = dict(request.budgets)
    used = {name: share_of(left[name], limit_of(asked[name], dense[name])) for name in request.sizes}
    return max(request.sizes, key=lambda name: used[name])


def _report_of_blocks(whole: WholeBlocks, request: ChannelRequest, refusal: PruningError | None) -> ChannelReport:
    gone = Counter(block.path for block in whole.blocks)
    blocks = {f"{path} ({Kind.BLOCK})": (count, whole.of[path]) for path, count in gone.items()}
    names = tuple(block.name for block in whole.blocks)
    why = "" if refusal is None else str(refusal).partition(". ")[0]
    macs, parameters = zip(whole.dense, whole.left, strict=True)
    asked, sizes = dict(request.budgets), dict(zip(SIZES, (macs, parameters), strict=True))
    used = {name: share_of(sizes[name][1], limit_of(asked[name], sizes[name][0])) for name in request.sizes}
    binding = max(used, key=lambda name: used[name]) if used else "amount"
    rest = ChannelReport({}, {}, macs, parameters)
    if whole.outcome is not None:
        groups = whole.outcome.among.grouping.groups
        rest = _report(whole.outcome, request, [replace(g, name=whole.names.get(g.name, g.name)) for g in groups])
    return replace(
        rest, removed=blocks | rest.removed, macs=macs, parameters=parameters, sample=whole.sample, budget=binding,
        asked=asked, blocks=names, why_blocks=why,
    )  # fmt: skip


def _report(outcome: Outcome, request: ChannelRequest, named: Sequence[ChannelGroup] | None = None) -> ChannelReport:
    """What was chosen; `named` are the groups under other names."""
    grouping, picked = outcome.among.grouping, outcome.among.picked
    labels = dict(zip(map(id, grouping.groups), numbered_labels(named or grouping.groups), strict=True))
    stayed = {labels[id(group)]: group.reason for group in grouping.groups if group.reason}
    stayed |= {labels[id(group)]: "no batch norm has its gain" for group in outcome.among.lacking}
    removed = {labels[id(group)]: (int((~outcome.alive[group.units]).sum()), group.size) for group in picked}
    macs, parameters, _ = grouping.dense
    sizes = (macs, outcome.macs), (parameters, outcome.parameters)
    return ChannelReport(
        removed, stayed, *sizes, outcome.speedup, grouping.sample, _binding(outcome, request), outcome.among.table,
        asked=dict(request.budgets),
    )  # fmt: skip
