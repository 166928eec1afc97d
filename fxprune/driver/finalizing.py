"""`finalize`: a copy without masks, norms and dead channels, by one process or for all."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from fxprune.borrowing import Loans
from fxprune.calling import named_arguments
from fxprune.channels import ChannelPlan
from fxprune.channels.registry import REPORT, failed_with
from fxprune.driver.running import finalize_anew
from fxprune.errors import (
    AnalysisWarning,
    ArgumentTypeError,
    EvalConstantWarning,
    FinalizeError,
    FxpruneWarning,
    NonFiniteWarning,
    OutputsDifferError,
    PassError,
)
from fxprune.graph import spread_modules
from fxprune.graph.equality import FOLDED_TOLERANCES, error, is_finite
from fxprune.graph.error_sites import node_of, step_of
from fxprune.graph.names import tensors_of
from fxprune.graph.on_demand import own_tensors
from fxprune.graph.requirements import require_eval, require_flag
from fxprune.graph.sharing_copies import sharing_copy
from fxprune.graph.spread_modules import failing_together, hollow_copy, in_whole, is_spread
from fxprune.graph.spread_results import sources_of, spread_alike
from fxprune.graph.text import describe
from fxprune.graph.traced import Origin, TracedModule
from fxprune.passes import FoldBatchNorm, RemoveChannels, run_passes
from fxprune.passes.base import Callback, Pass
from fxprune.progress import shown

# of nodes that are left alone one by one, before all are
_MOST_REFUSED = 8


@named_arguments
@shown("finalize")
@failing_together
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
    steps = finalize_anew(on_demand=cuts and after is None)  # `after` may keep what it sees
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
                final = run_passes(sharing_copy(traced), tried, after).graph_module
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
