"""The functions that run passes: `finalize`, and the norms inserted and removed by name."""

from __future__ import annotations

import contextlib
import copy
import tempfile
import warnings
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from fxprune.borrowing import Loans
from fxprune.calling import named_arguments
from fxprune.channels import ChannelPlan
from fxprune.channels.computed_weights import with_plain_weights
from fxprune.channels.groups import ChannelGroups, Grouping
from fxprune.channels.registry import REPORT, failed_with
from fxprune.communication import agree
from fxprune.errors import (
    AnalysisWarning,
    ArgumentTypeError,
    EvalConstantWarning,
    FinalizeError,
    FxpruneWarning,
    NonFiniteWarning,
    OutputsDifferError,
    PassError,
    PruningError,
)
from fxprune.graph import spread_modules
from fxprune.graph.calls import Call
from fxprune.graph.copies import copied_parameters, read_directly
from fxprune.graph.equality import FOLDED_TOLERANCES, error, is_finite
from fxprune.graph.error_sites import node_of, step_of
from fxprune.graph.masks import masked_views, named_by_mask
from fxprune.graph.names import canonical, has_parametrization, locate, one_name, tensors_of
from fxprune.graph.on_demand import own_tensors
from fxprune.graph.provenance import provenance_of, set_provenance
from fxprune.graph.reparametrizations import computed_names, hook_state, reparametrized
from fxprune.graph.requirements import require_eval, require_flag, require_parameter, require_traced
from fxprune.graph.spread_modules import failing_together, hollow_copy, in_whole, is_spread
from fxprune.graph.spread_results import sources_of, spread_alike
from fxprune.graph.taking_back import taken_back
from fxprune.graph.text import describe
from fxprune.graph.traced import Origin, TracedModule
from fxprune.passes import (
    FINALIZE,
    FoldBatchNorm,
    FoldReparametrizations,
    InsertMasks,
    InsertSpectralNorm,
    InsertWeightNorm,
    RemoveChannels,
    run_passes,
)
from fxprune.passes.base import Callback, Pass
from fxprune.passes.insert_parametrization import InsertParametrization, InsertParametrizations
from fxprune.progress import shown
from fxprune.sharding import followed

# of nodes that are left alone one by one, before all are
_MOST_REFUSED = 8


@failing_together
def run(traced: TracedModule, *pipeline: Pass) -> None:
    """Run passes on a traced module in place."""
    require_traced(traced)
    pipeline[0].requires(traced)
    agree()  # what is refused on one process needs nothing taken back on another
    with followed(traced), taken_back(traced, (tensor for step in pipeline for tensor in step.written(traced))):
        run_passes(traced, pipeline)


def insert_masks(traced: TracedModule, masks: Mapping[str, torch.Tensor], *, compact: bool = False) -> None:
    """Insert or replace the masks of several parameters."""
    run(traced, InsertMasks(masks, compact))


def insert_norms(traced: TracedModule, steps: Sequence[InsertParametrization]) -> None:
    """Insert several norms. Each leaves its options, by which a checkpoint inserts it again."""
    run(traced, InsertParametrizations(tuple(steps)))
    for step in steps:
        _keep_options(traced, step)


def _keep_options(traced: TracedModule, step: InsertParametrization) -> None:
    owner, tensor = locate(traced, step.parameter)
    holder = owner.get_submodule(f"parametrizations.{tensor}")
    set_provenance(holder, replace(provenance_of(holder), options={"kind": step.name} | step.options))


def fold(traced: TracedModule, *names: str) -> None:
    """Make reparametrized parameters plain, in place."""
    run(traced, FoldReparametrizations(names))


def _parameter_names(traced: TracedModule) -> list[str]:
    return [name for name, _ in traced.named_parameters(remove_duplicate=False)]


@named_arguments
def weight_norm(traced: TracedModule, name: str, dim: int | None = 0) -> TracedModule:
    """Insert weight normalization on one parameter, as `torch.nn.utils.parametrizations.weight_norm` does in eager.

    Args:
        traced: the module, changed in place.
        name: qualified parameter name, "conv1.weight".
        dim: the dimension that keeps a norm for each index; None and -1 take one norm over all.

    Returns:
        `traced`.

    Raises:
        NameLookupError: no such parameter, or several.
        PruningError: the parameter is already reparametrized.
        ArgumentError: torch refuses `dim`.

    Example:
        >>> fxprune.weight_norm(traced, "0.weight")
    """
    return _parametrize(traced, name, lambda found: InsertWeightNorm(found, dim))


@named_arguments
def spectral_norm(
    traced: TracedModule, name: str, n_power_iterations: int = 1, eps: float = 1e-12, dim: int | None = None
) -> TracedModule:
    """Insert spectral normalization on one parameter, as `torch.nn.utils.parametrizations.spectral_norm` does.

    Args:
        traced: the module, changed in place; in train mode its buffers advance as torch's do.
        name: qualified parameter name.
        n_power_iterations: power iterations for each forward in train mode, at least 1.
        eps: added to norms.
        dim: the dimension of outputs; None takes 1 for transposed convolutions, else 0.

    Returns:
        `traced`.

    Raises:
        NameLookupError, PruningError, ArgumentError: as for `weight_norm`.

    Example:
        >>> fxprune.spectral_norm(traced, "0.weight", n_power_iterations=2)
    """
    return _parametrize(traced, name, lambda found: InsertSpectralNorm(found, n_power_iterations, eps, dim))


@failing_together
def _parametrize(traced: TracedModule, name: str, build: Callable[[str], InsertParametrization]) -> TracedModule:
    require_traced(traced)
    name = canonical(traced, name) if isinstance(name, str) else name
    if name in reparametrized(traced):
        _, tensor = locate(traced, name)
        prefix = name.removesuffix(tensor)
        near = [n for n in _parameter_names(traced) if tensor in n and n.startswith(prefix)]
        raise PruningError(
            f"{name!r} already carries a reparametrization; its parameters are {', '.join(near)}. "
            "Name one of these, or remove the present one first."
        )
    require_parameter(traced, name)
    step = build(one_name(_parameter_names(traced), name))
    run(traced, step)
    _keep_options(traced, step)
    return traced


def remove_weight_norm(traced: TracedModule, name: str) -> TracedModule:
    """Fold a weight norm (torch's legacy or parametrized one) into a plain parameter; outputs stay the same bits.

    A mask on what the norm computes stays, on the plain parameter; masks on its own parameters are folded with it.

    Args:
        traced: the module, changed in place.
        name: qualified name of the normalized parameter, "conv1.weight".

    Returns:
        `traced`.

    Raises:
        PruningError: there is no weight norm on it.

    Example:
        >>> fxprune.remove_weight_norm(traced, "0.weight")
    """
    return _remove_norm(traced, name, _WEIGHT_NORM)


def remove_spectral_norm(traced: TracedModule, name: str) -> TracedModule:
    """Fold a spectral norm into a plain parameter: the value that eval mode computes, to the bit.

    torch's own removal in train mode runs one more power iteration first; this one does not. Masks are as in
    `remove_weight_norm`.

    Args:
        traced: the module, changed in place.
        name: qualified name of the normalized parameter.

    Returns:
        `traced`.

    Raises:
        PruningError: there is no spectral norm on it.

    Example:
        >>> fxprune.remove_spectral_norm(traced, "0.weight")
    """
    return _remove_norm(traced, name, _SPECTRAL_NORM)


@failing_together
def _remove_norm(traced: TracedModule, name: str, norm: _Norm) -> TracedModule:
    require_traced(traced)
    there = reparametrized(traced)
    if not there:
        raise PruningError(f"{name!r} carries no {norm.name} to remove: no parameter is reparametrized.")
    found = one_name(there, canonical(traced, name), "reparametrized parameter")
    if not norm.stands_on(*locate(traced, found)):
        raise PruningError(f"{name!r} carries no {norm.name}. Reparametrized: {', '.join(there)}.")
    run(traced, FoldReparametrizations((found,), keep_masks=True))
    return traced


@dataclass(frozen=True)
class _Norm:
    """A norm of torch's: the kind of its legacy hook, and what its parametrization holds."""

    name: str
    hook: str
    parametrization: tuple[str, ...]

    def stands_on(self, owner: nn.Module, tensor: str) -> bool:
        if has_parametrization(owner, tensor):
            holder = owner.get_submodule(f"parametrizations.{tensor}")
            if all(hasattr(holder, name) for name in self.parametrization):
                return True
        held = {named_by_mask(name) or name for name in (*owner._parameters, *owner._buffers)}
        return held.issuperset(hook_state(self.hook, tensor))


_WEIGHT_NORM = _Norm("weight norm", "weight_norm", ("original0",))
_SPECTRAL_NORM = _Norm("spectral norm", "spectral_norm", ("original", "0"))


def plain_view(traced: TracedModule) -> TracedModule:
    """The module with every reparametrization folded, to be read only: what none stands on is shared, not copied.

    What masks alone change is computed whenever it is read, so that it is never all held.

    Parameters are read where they are, and not from copies, so that their channels are the same before and after.
    """
    require_eval(traced, "the analysis of channels", values=False)
    names = reparametrized(traced)
    if not names and not any(map(copied_parameters, traced.graphs.values())):
        return traced
    plain = run_passes(_sharing_tensors(traced), _finalize_anew(on_demand=True)).graph_module
    assert isinstance(plain, TracedModule)
    for graph in plain.graphs.values():
        read_directly(graph)
    plain.recompile()
    return plain


def _sharing_tensors(traced: TracedModule) -> TracedModule:
    """A copy of the module with the same parameters and buffers, which are only to be read."""
    return copy.deepcopy(traced, {id(tensor): tensor for tensor in tensors_of(traced).values()})


def _finalize_anew(*, on_demand: bool = False) -> list[Pass]:
    """The passes of `FINALIZE` for a module that shares its tensors."""
    fold = FoldReparametrizations(anew=True, on_demand=on_demand)
    return [fold if isinstance(step, FoldReparametrizations) else step for step in FINALIZE]


def without_norms(traced: TracedModule, names: Collection[str]) -> TracedModule:
    """The module with plain parameters where norms and parametrizations compute some, masks on these as they are.

    To be read only: tensors of other modules are shared, and the module itself is given where there is no such name.
    """
    normed = tuple(name for name in computed_names(traced) if name in names)
    normed += tuple(own.original_name for own in masked_views(traced) if own.name in names and own.original is None)
    if not normed:
        return traced
    folded = run_passes(_copied_around(traced, normed), (FoldReparametrizations(normed, keep_masks=True),)).graph_module
    assert isinstance(folded, TracedModule)
    return folded


def _copied_around(traced: TracedModule, names: Collection[str]) -> TracedModule:
    """A copy of the module for changes of what reparametrizes some parameters; shares the tensors of other modules."""
    owners = {locate(traced, name)[0] for name in names}
    busy = {module for owner in owners for module in owner.modules()}
    shared = [t for m in traced.modules() if m not in busy for t in (*m._parameters.values(), *m._buffers.values())]
    return copy.deepcopy(traced, {id(t): t for t in shared if t is not None})


@contextlib.contextmanager
def stopwatch(
    traced: TracedModule, *, threads: int, batch: int, providers: Sequence[str]
) -> Iterator[Callable[[Mapping[str, torch.Tensor]], float]]:
    """Yields a function from masks to how many times faster `traced`, finalized with them, runs in onnxruntime.

    Each candidate is exported and timed in turns with `traced` as it is; what is slower than that is no plan.
    """
    from fxprune import export  # it needs onnxruntime, and nothing else here does

    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, "dense.onnx"), Path(folder, "pruned.onnx")]

        def write(module: TracedModule, path: Path) -> None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", EvalConstantWarning)  # nobody trains it on
                export.to_onnx(in_whole(finalize(module, verify=False)), path, verify=False)

        def measure(masks: Mapping[str, torch.Tensor]) -> float:
            candidate = copy.deepcopy(traced)
            insert_masks(candidate, masks)
            write(candidate, files[1])
            return 1 / export.bench(files, threads=threads, batch=batch, providers=providers)[1].ratio

        write(traced, files[0])
        yield measure


class Clock:
    """Tells how long modules take in onnxruntime; made by `clock`.

    Args:
        folder: for files. threads, batch, providers: as for `fxprune.export.bench`.
    """

    def __init__(self, folder: Path, threads: int, batch: int, providers: Sequence[str]) -> None:
        from fxprune import export  # it needs onnxruntime, and nothing else here does

        self._export, self._folder = export, folder
        self._threads, self._batch, self._providers = threads, batch, providers

    def whole(self, traced: TracedModule) -> float:
        """The seconds that a module takes, finalized as it is."""
        path = self._folder / "whole.onnx"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", EvalConstantWarning)  # nobody trains it on
            self._export.to_onnx(in_whole(finalize(traced, verify=False)), path, verify=False)
        rounds = self._export.time_in_turns(
            [path], None, lambda rounds: False, threads=self._threads, batch=self._batch, providers=self._providers
        )
        return float(np.quantile(rounds, 0.25))

    def parts(self, sets: Sequence[Sequence[TracedModule]], is_sure: Callable[[np.ndarray], bool]) -> list[np.ndarray]:
        """For each set of finalized modules their seconds in rounds, [rounds, modules]; those of a set run in turns.

        Args:
            sets: the modules, as they stand: at the sizes of their sample inputs.
            is_sure: from such seconds whether they tell enough.
        """
        paths = self._export.to_onnx_files([in_whole(module) for each in sets for module in each], self._folder)
        found, start = [], 0
        for each in sets:
            own = paths[start : start + len(each)]
            start += len(each)
            calls = [Call(module.example_args, {}) for module in each]
            found.append(
                self._export.time_in_turns(own, calls, is_sure, threads=self._threads, providers=self._providers)
            )
        return found


@contextlib.contextmanager
def clock(*, threads: int, batch: int, providers: Sequence[str]) -> Iterator[Clock]:
    """Yields a clock of onnxruntime."""
    with tempfile.TemporaryDirectory() as folder:
        yield Clock(Path(folder), threads, batch, providers)


@named_arguments
@shown("find channel groups")
def channel_groups(traced: TracedModule) -> ChannelGroups:
    """The groups of slices that must be masked together, those that may be pruned first; changes nothing.

    Args:
        traced: a module with an eval graph.

    Returns:
        A list of `ChannelGroup` objects: kind, size, members, what a unit saves, and why it may not be pruned; its
        `table()` has one a line, its `to_dict()` the same as data.

    Raises:
        FinalizeError: there is no eval graph.

    Example:
        >>> [(g.name, g.kind, g.size) for g in fxprune.channel_groups(traced)]
        [('0.weight', 'channel', 16), ('2.weight', 'channel', 10)]
    """
    readable = hollow_copy(traced) if is_spread(traced) else traced  # relations ask for no values
    return ChannelGroups(Grouping(with_plain_weights(plain_view(readable))).groups)


@named_arguments
@shown("finalize")
def finalize(
    traced: TracedModule,
    *,
    shrink: bool = True,
    align: str | int = "auto",
    fold_batch_norm: bool = False,
    plan: ChannelPlan | None = None,
    verify: bool = True,
    keep_for_training: bool = False,
    keep_for_write_back: bool = False,
    after: Callback | None = None,
    whole: bool = False,
) -> TracedModule:
    """A copy of `traced` without masks, norms, parametrizations and dead channels, that computes the same.

    Every expression over parameters alone becomes a plain parameter under its original name, in the order of the
    model before any of it. Then every channel goes that masks or exact zeros have made dead, in both graphs; what
    stayed, and why, is in `final.plan`. In eval mode the outputs are the same bits where only folding happened, and
    equal to rounding where channels went. The copy shares nothing with `traced`, which stays as it is; it trains on,
    and can be traced again.

    Args:
        traced: a traced module with an eval graph.
        shrink: whether to remove dead channels.
        align: "auto" takes out all that `fxprune.prune.channels` chose; of what others masked it keeps dead channels so
            that counts at convolutions are multiples of 4, next to depthwise ones of 16 where that concerns no other
            layer (8 and 4 for fewer than 32 and 16 channels), which onnxruntime runs faster, and channels that are
            constant but for the border of zero padding, whose map would be added apart, and those that only
            ranges of values make constant; 1 removes all, an integer n keeps multiples of n.
        fold_batch_norm: scale the layers before batch norms instead of running these; the result has no train graph.
        plan: a stored plan to carry out instead of an analysis: the result has its architecture.
        verify: compare the outputs on the sample inputs in eval mode, and count MACs on the way.
        keep_for_training: whether channels stay that are constant in eval mode alone, so that train mode computes the
            same, too: behind a batch norm, whose running statistics make a constant of a masked row that its statistics
            of a batch make another one of. Those stay as well that only ranges of values make constant.
        keep_for_write_back: whether channels stay that are constant but for the border that zero padding makes, as they
            do with `align="auto"`. Without them a map is added to the result of the layer that read them, for which a
            class has no place: `write_back` refuses it.
        after: called after each pass with (pass, module, modified, seconds).
        whole: for a module that is spread over processes: whether the first one gets the whole result, the others one
            without values, on the device "meta". Else the result is spread as the module is.

    Returns:
        A new `TracedModule`; `.plan` says what was removed.

    Raises:
        FinalizeError: an expression has no constant value, the plan does not fit, or the check failed.
        ArgumentError: `align` cannot be used.

    Warns:
        AnalysisWarning: what was found of an operator is wrong: channels that it touches stay, as the plan says.
        FxpruneWarning: a `Schedule` of the module was never stepped.
        NonFiniteWarning: a parameter holds NaN or inf.
        EvalConstantWarning: channels went that are constant in eval mode alone, and there is a train graph, which
            computes something else without them. `final.plan.eval_only` has them.

    Example:
        >>> final = fxprune.finalize(traced)
        >>> print(final.plan.explain())
    """
    require_eval(traced, "finalize")
    flags: dict[str, Any] = {"shrink": shrink, "fold_batch_norm": fold_batch_norm, "verify": verify}
    keep = {"keep_for_training": keep_for_training, "keep_for_write_back": keep_for_write_back}
    if is_spread(traced):
        options = flags | keep | {"align": align, "plan": plan, "after": after}
        return _finalized_by_first(traced, options, whole=whole)  # which checks them
    for name, value in (flags | keep | {"whole": whole}).items():
        require_flag(name, value)
    if plan is not None and not isinstance(plan, ChannelPlan):
        raise ArgumentTypeError(
            f"plan is a {type(plan).__name__}; a ChannelPlan is needed: final.plan, or ChannelPlan.from_json of a text."
        )
    if after is not None and not callable(after):
        raise ArgumentTypeError(f"after={after!r}: a function of (pass, module, modified, seconds) is needed.")
    for text in traced.told_unused():
        warnings.warn(text, FxpruneWarning, stacklevel=3)
    cuts = shrink or plan is not None
    steps = _finalize_anew(on_demand=cuts and after is None)  # `after` may keep what it sees
    if cuts:
        steps.append(RemoveChannels(align, plan, verify, keep_for_training, keep_for_write_back, lean=True))
    if fold_batch_norm:
        steps.append(FoldBatchNorm())
    final = _run_or_refuse(traced, steps, after)
    final.decide(())  # of masks that are folded
    carried_out = final.plan
    if carried_out is not None and carried_out is not traced.plan and plan is None:
        carried_out.chosen = tuple(sorted(traced.decided))
    final.record(carried_out, Origin(None if carried_out is traced.plan else carried_out, _sources(traced)))
    if broken := [name for name, parameter in final.named_parameters() if not is_finite(parameter)]:
        warnings.warn(f"NaN or inf in {', '.join(broken)}; it is carried through.", NonFiniteWarning, stacklevel=3)
    if plan is None and final.plan is not None and final.plan.eval_only and "train" in final.graphs:
        warnings.warn(_text_of(final.plan.eval_only), EvalConstantWarning, stacklevel=3)
    # what was removed, the removal has compared itself
    removed = final.plan is not None and bool(final.plan.removed or final.plan.constants or final.plan.dropped)
    if verify and plan is None and (fold_batch_norm or not removed):
        verify_equal(traced, final, exact=not fold_batch_norm)
    return final


@failing_together
def _finalized_by_first(traced: TracedModule, options: dict[str, Any], *, whole: bool) -> TracedModule:
    """The result of a module that is spread: made by the first process, its architecture by the others."""
    require_flag("whole", whole)

    def work(copied: TracedModule) -> TracedModule:
        final = finalize(copied, **options)
        return in_whole(final) if whole else final

    def told(final: TracedModule, loans: Loans) -> Any:
        return final.plan, _shapes(final), spread_modules.numbers_of(tensors_of(final), loans)

    (plan, shapes, numbers), made, loans = spread_modules.by_loans(traced, work, told)
    if not made:
        imposed = {"plan": plan} if options["shrink"] or options["plan"] is not None else {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the first process has said it
            final = finalize(hollow_copy(traced), **(options | imposed | {"verify": False, "after": None}))
        final.record(plan)
    else:
        final = made[0] if whole else hollow_copy(made[0])
    spread_modules.all_alike(traced, _shapes(final) == shapes, "the architecture that finalize gives")
    if not whole:
        final = spread_alike(final, traced, tensors_of(made[0]) if made else None, numbers, loans)
    final.record(plan, Origin(None if plan is traced.plan else plan, _sources(traced)))
    return final


def _shapes(final: TracedModule) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors_of(final).items()}


def _run_or_refuse(traced: TracedModule, steps: Sequence[Pass], after: Callback | None) -> TracedModule:
    """The passes run on a copy; where the removal fails at a node, again with the channels left that this touches.

    Where it cannot be told which node it is, or where leaving some did not help, all channels stay. The copy shares
    tensors with the module until it has others, and weights are let go as they are cut: only where outputs differ the
    removal is done again with all that tells where.
    """
    refused: dict[str, str] = {}
    lean = True
    while True:
        tried = [
            replace(step, refused=refused, lean=lean) if isinstance(step, RemoveChannels) else step for step in steps
        ]
        try:
            with torch.inference_mode(False):  # what is made trains on
                final = run_passes(_sharing_tensors(traced), tried, after).graph_module
                assert isinstance(final, TracedModule)
                own_tensors(final, traced)
        except OutputsDifferError:
            lean = False
            continue
        except (PassError, FinalizeError) as problem:
            analyzed = any(isinstance(step, RemoveChannels) and step.plan is None for step in steps)
            everything = {node.name for node in traced.graphs["eval"].nodes if node.op == "call_function"}
            if not analyzed or step_of(problem) != RemoveChannels.name or everything <= refused.keys():
                raise
            node, why = node_of(problem), failed_with(problem.__cause__ or problem)
            told = node is not None and node.name not in refused and len(refused) < _MOST_REFUSED
            refused = refused | dict.fromkeys([node.name] if told and node is not None else sorted(everything), why)
            where = describe(node) if node is not None else "an unknown operator"
            warnings.warn(f"{where}: {why}. {REPORT}", AnalysisWarning, stacklevel=4)
            continue
        return final


def _text_of(eval_only: Mapping[str, Sequence[int]]) -> str:
    """What to say of channels that went and are constant in eval mode alone."""
    first = ", ".join(f"{len(index)} of {norm}" for norm, index in list(eval_only.items())[:5])
    more = ", ..." if len(eval_only) > 5 else ""
    return (
        f"channels that went are constant in eval mode alone, by running statistics: {first}{more}. In train mode the "
        "result computes something else than the masked module. To train on, use finalize(..., "
        "keep_for_training=True); for inference nothing is to be done."
    )


def _sources(traced: TracedModule) -> dict[str, weakref.ref[nn.Parameter]]:
    """The parameters that an optimizer holds, masked ones under the names that they have without a mask."""
    return {name: weakref.ref(parameter) for name, parameter in sources_of(traced).items()}


def verify_equal(traced: TracedModule, final: TracedModule, *, exact: bool) -> None:
    """Raise FinalizeError unless both compute the same on the sample inputs in eval mode, to the bit or to rounding."""
    for i, (want, got) in enumerate(zip(traced.run_example(), final.run_example(), strict=True)):
        rounds = not exact and isinstance(want, torch.Tensor) and want.is_floating_point()
        if (difference := error(want, got)) > (FOLDED_TOLERANCES[want.dtype] if rounds else 0):
            raise FinalizeError(
                f"output {i} of the finalized model differs from the masked one's by {difference:.1e} relative to the "
                "largest value, which must not happen. The masked model is unharmed; please report the model."
            )
