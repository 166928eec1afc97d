"""The functions that run passes: `finalize`, and the norms inserted and removed by name."""

from __future__ import annotations

import contextlib
import copy
import tempfile
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from fxprune.channels import ChannelPlan
from fxprune.channels.groups import ChannelGroup, Grouping
from fxprune.errors import ArgumentTypeError, FinalizeError, NonFiniteWarning, PruningError
from fxprune.graph.containers import provenance_of, set_provenance
from fxprune.graph.equality import error
from fxprune.graph.masks import masked
from fxprune.graph.names import canonical, has_parametrization, locate, one_name
from fxprune.graph.reparametrizations import reparametrized
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
from fxprune.passes.insert_parametrization import InsertParametrization


def run(traced: TracedModule, *pipeline: Pass) -> None:
    """Run passes on a traced module in place."""
    if not isinstance(traced, TracedModule):
        raise ArgumentTypeError(f"a traced module is needed, got {type(traced).__name__}. Call fxprune.trace first.")
    run_passes(traced, pipeline)


def insert_masks(traced: TracedModule, masks: Mapping[str, torch.Tensor]) -> None:
    """Insert or replace the masks of several parameters."""
    run(traced, InsertMasks(masks))


def insert_norms(traced: TracedModule, steps: Sequence[InsertParametrization]) -> None:
    """Insert several norms. Each leaves its options, by which a checkpoint inserts it again."""
    run(traced, *steps)
    for step in steps:
        owner, tensor = locate(traced, step.parameter)
        holder = owner.get_submodule(f"parametrizations.{tensor}")
        options = {name: value for name, value in vars(step).items() if name != "parameter"}
        set_provenance(holder, replace(provenance_of(holder), options={"kind": step.name} | options))


def fold(traced: TracedModule, *names: str) -> None:
    """Make reparametrized parameters plain, in place."""
    run(traced, FoldReparametrizations(names))


def _parameter_names(traced: TracedModule) -> list[str]:
    return [name for name, _ in traced.named_parameters(remove_duplicate=False)]


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


def _parametrize(traced: TracedModule, name: str, build: Callable[[str], InsertParametrization]) -> TracedModule:
    name = canonical(traced, name) if isinstance(traced, TracedModule) and isinstance(name, str) else name
    if isinstance(traced, TracedModule) and name in reparametrized(traced):
        _, tensor = locate(traced, name)
        raise PruningError(
            f"{name!r} already carries a reparametrization; its parameters are "
            f"{', '.join(n for n in _parameter_names(traced) if tensor in n and n.startswith(name[: -len(tensor)]))}. "
            "Name one of these, or remove the present one first."
        )
    step = build(one_name(_parameter_names(traced), name) if isinstance(traced, TracedModule) else name)
    insert_norms(traced, [step])
    return traced


def remove_weight_norm(traced: TracedModule, name: str) -> TracedModule:
    """Fold a weight norm (torch's legacy or parametrized one) into a plain parameter; outputs stay the same bits.

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
    return _remove_norm(traced, name, "weight norm", ("original0",), ("_g", "_v"))


def remove_spectral_norm(traced: TracedModule, name: str) -> TracedModule:
    """Fold a spectral norm into a plain parameter: the value that eval mode computes, to the bit.

    torch's own removal in train mode runs one more power iteration first; this one does not.

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
    return _remove_norm(traced, name, "spectral norm", ("original", "0"), ("_orig", "_u"))


def _remove_norm(
    traced: TracedModule, name: str, what: str, new: tuple[str, ...], old: tuple[str, ...]
) -> TracedModule:
    found = one_name(reparametrized(traced) or ["(none)"], canonical(traced, name), "reparametrized parameter")
    owner, tensor = locate(traced, found)
    holds = False
    if has_parametrization(owner, tensor):
        holder = owner.get_submodule(f"parametrizations.{tensor}")
        holds = all(hasattr(holder, n) for n in new)
    held = {n.removesuffix("_mask") for n in (*owner._parameters, *owner._buffers)}
    if not holds and not all(tensor + suffix in held for suffix in old):
        raise PruningError(f"{name!r} carries no {what}. Reparametrized: {', '.join(reparametrized(traced))}.")
    fold(traced, found)
    return traced


def plain_view(traced: TracedModule) -> TracedModule:
    """The module with every reparametrization folded, to be read only: what none stands on is shared, not copied."""
    _require_eval(traced)
    names = reparametrized(traced)
    if not names:
        return traced
    owners = {locate(traced, name)[0] for name in names}
    busy = {module for owner in owners for module in owner.modules()}
    shared = [t for m in traced.modules() if m not in busy for t in (*m._parameters.values(), *m._buffers.values())]
    copied = copy.deepcopy(traced, {id(t): t for t in shared if t is not None})
    plain = run_passes(copied, FINALIZE).graph_module
    assert isinstance(plain, TracedModule)
    return plain


@contextlib.contextmanager
def stopwatch(
    traced: TracedModule, *, threads: int, batch: int, provider: str
) -> Iterator[Callable[[Mapping[str, torch.Tensor]], float]]:
    """Yields a function from masks to how many times faster `traced`, finalized with them, runs in onnxruntime.

    Each candidate is exported and timed in turns with `traced` as it is; what is slower than that is no plan.
    """
    from fxprune import export  # it needs onnxruntime, and nothing else here does

    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, "dense.onnx"), Path(folder, "pruned.onnx")]

        def write(module: TracedModule, path: Path) -> None:
            export.to_onnx(finalize(module, verify=False), path, verify=False)

        def measure(masks: Mapping[str, torch.Tensor]) -> float:
            candidate = copy.deepcopy(traced)
            insert_masks(candidate, masks)
            write(candidate, files[1])
            return 1 / export.bench(files, threads=threads, batch=batch, provider=provider)[1].ratio

        write(traced, files[0])
        yield measure


def channel_groups(traced: TracedModule) -> list[ChannelGroup]:
    """The groups of slices that must be masked together, those that may be pruned first; changes nothing.

    Args:
        traced: a module with an eval graph.

    Returns:
        `ChannelGroup` objects: kind, size, members, what a unit saves, and why it may not be pruned. As text:
        `fxprune.channels.groups.table(groups)`.

    Raises:
        FinalizeError: there is no eval graph.

    Example:
        >>> [(g.name, g.kind, g.size) for g in fxprune.channel_groups(traced)]
        [('0.weight', 'channel', 16), ('2.weight', 'channel', 10)]
    """
    return Grouping(plain_view(traced)).groups


def _require_eval(traced: TracedModule) -> None:
    if not isinstance(traced, TracedModule):
        raise ArgumentTypeError(f"a traced module is needed, got {type(traced).__name__}. Call fxprune.trace first.")
    if "eval" not in traced.modes:
        raise FinalizeError('the eval graph is needed; trace the model with modes=("train", "eval").')


def finalize(
    traced: TracedModule,
    *,
    shrink: bool = True,
    align: str | int = "auto",
    fold_batch_norm: bool = False,
    plan: ChannelPlan | None = None,
    verify: bool = True,
    after: Callback | None = None,
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
        align: "auto" keeps dead channels so that counts at convolutions are multiples of 4, next to depthwise ones of
            16 where that concerns no other layer (8 and 4 for fewer than 32 and 16 channels), which onnxruntime runs
            faster; 1 removes all, an integer n keeps multiples of n.
        fold_batch_norm: scale the layers before batch norms instead of running these; the result has no train graph.
        plan: a stored plan to carry out instead of an analysis: the result has its architecture.
        verify: compare the outputs on the sample inputs in eval mode, and count MACs on the way.
        after: called after each pass with (pass, module, modified, seconds).

    Returns:
        A new `TracedModule`; `.plan` says what was removed.

    Raises:
        FinalizeError: an expression has no constant value, the plan does not fit, or the check failed.
        ArgumentError: `align` cannot be used.

    Warns:
        NonFiniteWarning: a parameter holds NaN or inf.

    Example:
        >>> final = fxprune.finalize(traced)
        >>> print(final.plan.explain())
    """
    _require_eval(traced)
    steps: list[Pass] = [*FINALIZE]
    if shrink or plan is not None:
        steps.append(RemoveChannels(align, plan, verify))
    if fold_batch_norm:
        steps.append(FoldBatchNorm())
    final = run_passes(copy.deepcopy(traced), tuple(steps), after).graph_module
    assert isinstance(final, TracedModule)
    plain = {f"{name}_orig": name for name in masked(traced)}
    sources = {plain.get(n, n): weakref.ref(p) for n, p in traced.named_parameters(remove_duplicate=False)}
    final.record(final.plan, Origin(None if final.plan is traced.plan else final.plan, sources))
    broken = [name for name, p in final.named_parameters() if p.is_floating_point() and not p.isfinite().all()]
    if broken:
        warnings.warn(f"NaN or inf in {', '.join(broken)}; it is carried through.", NonFiniteWarning, stacklevel=2)
    removed = final.plan is not None and bool(final.plan.removed)  # the removal has compared the outputs itself
    if verify and plan is None and (fold_batch_norm or not removed):
        verify_equal(traced, final, exact=not fold_batch_norm)
    return final


def verify_equal(traced: TracedModule, final: TracedModule, *, exact: bool) -> None:
    """Raise FinalizeError unless both compute the same on the sample inputs in eval mode, to the bit or to rounding."""
    for i, (want, got) in enumerate(zip(traced.run_example(), final.run_example(), strict=True)):
        rounds = not exact and isinstance(want, torch.Tensor) and want.is_floating_point()
        # the rounding of a deep network's sums in another order, as measured in units of the output's own rounding
        if (difference := error(want, got)) > (1e4 * torch.finfo(want.dtype).eps if rounds else 0):
            raise FinalizeError(
                f"output {i} of the finalized model differs from the masked one's by {difference:.1e} relative to the "
                "largest value, which must not happen. The masked model is unharmed; please report the model."
            )
