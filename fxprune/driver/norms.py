"""Norms inserted and removed by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from torch import nn

from fxprune.calling import named_arguments
from fxprune.driver.running import run
from fxprune.errors import PruningError
from fxprune.graph.masks import named_by_mask
from fxprune.graph.names import canonical, has_parametrization, locate, one_name
from fxprune.graph.provenance import provenance_of, set_provenance
from fxprune.graph.reparametrizations import hook_state, reparametrized
from fxprune.graph.requirements import require_parameter, require_traced
from fxprune.graph.spread_modules import failing_together
from fxprune.graph.traced import TracedModule
from fxprune.passes import FoldReparametrizations, InsertSpectralNorm, InsertWeightNorm
from fxprune.passes.insert_parametrization import InsertParametrization, InsertParametrizations


def insert_norms(traced: TracedModule, steps: Sequence[InsertParametrization]) -> None:
    """Insert several norms. Each leaves its options, by which a checkpoint inserts it again."""
    run(traced, InsertParametrizations(tuple(steps)))
    for step in steps:
        _keep_options(traced, step)


def _keep_options(traced: TracedModule, step: InsertParametrization) -> None:
    owner, tensor = locate(traced, step.parameter)
    holder = owner.get_submodule(f"parametrizations.{tensor}")
    set_provenance(holder, replace(provenance_of(holder), options={"kind": step.name} | step.options))


def _parameter_names(traced: TracedModule) -> list[str]:
    return [name for name, _ in traced.named_parameters(remove_duplicate=False)]


@named_arguments
@failing_together
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
@failing_together
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


@failing_together
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


@failing_together
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
