"""A checkpoint brought into its model: the plan carried out, masks and norms inserted, then the tensors."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import nn

from fxprune import driver
from fxprune.capture.front_end import trace
from fxprune.checkpoints.header import Header
from fxprune.checkpoints.reading import Checkpoint
from fxprune.errors import ArtifactError, CaptureError, FixedSizeWarning, FxpruneError
from fxprune.graph.masks import mask_name, masked, named_by_mask, named_by_original, original_name
from fxprune.graph.names import exists, join, tensor_at, tensors_of
from fxprune.graph.provenance import Provenance
from fxprune.graph.reparametrizations import computed_names, reparametrized
from fxprune.graph.switching import is_frozen, set_options
from fxprune.graph.traced import TracedModule
from fxprune.passes import FoldReparametrizations, InsertSpectralNorm, InsertWeightNorm
from fxprune.passes.insert_parametrization import InsertParametrization
from fxprune.prune.repair.new_biases import make_biases
from fxprune.reports import first_of

_NORMS: dict[str, type[InsertParametrization]] = {kind.name: kind for kind in (InsertWeightNorm, InsertSpectralNorm)}


def refitted(checkpoint: Checkpoint, model: nn.Module) -> TracedModule:
    """The model, traced where it is not, with everything that the file has; `model` stays as it is.

    Raises:
        ArtifactError: the file belongs to another model. CaptureError: the model cannot be traced.
    """
    _check_dtypes(checkpoint, model)
    with torch.random.fork_rng(devices=[]):  # norms draw their first vectors, which are then overwritten
        traced = _traced(checkpoint, model)
        try:
            traced = _rebuilt(checkpoint, traced)
        except ArtifactError:
            raise
        except FxpruneError as error:
            raise ArtifactError(
                f"the file's plan, masks or norms do not fit the model: {error} Give the dense model, as it was "
                "traced. A module that was finalized more than once is restored without a model only."
            ) from error
    _check_same_tensors(checkpoint, traced)
    _switch(checkpoint, traced)
    for stored in checkpoint.header.modules:
        if stored.is_first:
            checkpoint.fill(traced.get_submodule(stored.path), stored)
    traced.record(traced.plan)
    traced.decide(checkpoint.header.decided)
    traced.make(checkpoint.header.made_biases)
    return traced.train(checkpoint.header.training)


def _traced(checkpoint: Checkpoint, model: nn.Module) -> TracedModule:
    """A traced copy of the model, which shares nothing with it."""
    if not isinstance(model, TracedModule):
        args, kwargs = checkpoint.inputs
        shapes = checkpoint.dynamic_shapes
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FixedSizeWarning)  # said when the module was traced that was saved
            try:
                model = trace(model, args, kwargs, dynamic_shapes=shapes, modes=checkpoint.header.modes)
            except CaptureError as error:
                if lacking := _lacking(checkpoint, model):
                    raise ArtifactError(
                        f"the file belongs to another model: {type(model).__name__} has no {first_of(lacking)}, and "
                        f"cannot be captured with the inputs of the file. {error}"
                    ) from error
                raise
    return copy.deepcopy(model)


def _lacking(checkpoint: Checkpoint, model: nn.Module) -> list[str]:
    """The tensors in the file, by their plain names, that a model does not have."""
    there = tensors_of(model)
    plain = dict.fromkeys(named_by_original(name) or named_by_mask(name) or name for name in checkpoint.state)
    return [name for name in plain if name not in there and "parametrizations." not in name]


def _rebuilt(checkpoint: Checkpoint, traced: TracedModule) -> TracedModule:
    """The architecture of the file: its plan carried out, its masks and norms in place of those that there are."""
    header = checkpoint.header
    if checkpoint.plan is not None:
        _make_biases(checkpoint, traced, checkpoint.plan.shapes)
        traced = driver.finalize(traced, plan=checkpoint.plan, verify=False)
    if alien := [name for name in reparametrized(traced) if name not in header.reparametrized]:
        driver.fold(traced, *alien)
    if alien := [name for name in computed_names(traced) if name not in _normed(header)]:
        driver.run(traced, FoldReparametrizations(tuple(alien), keep_masks=True))
    _make_biases(checkpoint, traced, header.made_biases)
    _insert(checkpoint, traced)
    return traced


def _make_biases(checkpoint: Checkpoint, traced: TracedModule, among: Collection[str]) -> None:
    """The biases that repair made and the file has, as zeros, unless they are there; those alone that are `among`."""
    there = {*tensors_of(traced), *masked(traced)}
    made = {
        weight: torch.zeros(())
        for name, weight in checkpoint.header.made_biases.items()
        if name in among and name not in there and not {name, original_name(name)}.isdisjoint(checkpoint.state)
    }
    make_biases(traced, made)


def _switch(checkpoint: Checkpoint, traced: TracedModule) -> None:
    """Modes and numbers that were set on modules below by themselves; parents stand before their children."""
    for stored in (stored for stored in checkpoint.header.modules if stored.is_first and stored.path):
        part, wanted = traced.get_submodule(stored.path), Provenance(options=stored.options)
        if is_frozen(wanted) != is_frozen(part):
            traced.switch(part, not is_frozen(wanted))
        for name, value in set_options(wanted).items():
            traced.set_option(part, name, value)


def _insert(checkpoint: Checkpoint, traced: TracedModule) -> None:
    """Insert the masks and norms that the module lacks, in rounds: one may stand on what another one made."""
    header = checkpoint.header
    options = {stored.path: stored.options for stored in header.modules}
    norms = _normed(header).difference(computed_names(traced))
    masks = set(header.masked).difference(masked(traced))
    while norms or masks:
        plain = {name for name in norms | masks if _is_parameter(traced, name)}
        normed = plain & norms
        ready = (plain & masks - norms) | masks.intersection(computed_names(traced))
        if not normed and not ready:
            raise ArtifactError(
                f"the model has no parameter {', '.join(sorted(norms | masks))}, which the file changes."
            )
        driver.insert_masks(traced, {name: checkpoint.state[mask_name(name)] for name in sorted(ready)})
        driver.insert_norms(traced, [_norm(name, options) for name in sorted(normed)])
        norms, masks = norms - normed, masks - ready


def _normed(header: Header) -> set[str]:
    """The names of what norms and parametrizations compute in the file."""
    beside_masks = {join(stored.path, name) for stored in header.modules if stored.is_first for name in stored.masked}
    return set(header.reparametrized).difference(header.masked) | beside_masks


def _is_parameter(traced: TracedModule, name: str) -> bool:
    return exists(traced, name) and isinstance(tensor_at(traced, name), nn.Parameter)


def _norm(name: str, options: dict[str, dict[str, Any]]) -> InsertParametrization:
    path, _, tensor = name.rpartition(".")
    chosen = dict(options.get(join(path, f"parametrizations.{tensor}"), {}))
    if not chosen:
        raise ArtifactError(
            f"{name!r} carries a parametrization of the model's own, which cannot be inserted. Build the model "
            "with it, as it was when it was traced, or load without a model."
        )
    return _NORMS[chosen.pop("kind")](name, **chosen)


# ---- checks


def _check_dtypes(checkpoint: Checkpoint, model: nn.Module) -> None:
    for name, value in tensors_of(model).items():
        stored = checkpoint.state.get(name)
        if stored is not None and stored.dtype != value.dtype:
            raise ArtifactError(f"{name!r} is {stored.dtype} in the file and {value.dtype} in the model.")


def _check_same_tensors(checkpoint: Checkpoint, traced: TracedModule) -> None:
    differences = [*_differences(checkpoint, traced), *_other_modes(checkpoint.header, traced)]
    if differences:
        more = "; and so on" if len(differences) > 12 else ""
        raise ArtifactError(
            f"the file belongs to another model: {'; '.join(differences[:12])}{more}. Build "
            "the model as it was when it was traced, or load without one."
        )


def _differences(checkpoint: Checkpoint, traced: TracedModule) -> Iterable[str]:
    found = {name: tuple(value.shape) for name, value in tensors_of(traced).items()}
    wanted = {name: tuple(value.shape) for name, value in checkpoint.state.items()}
    yield from (f"missing in the file: {name}" for name in found if name not in wanted)
    yield from (f"missing in the model: {name}" for name in wanted if name not in found)
    for name, shape in found.items():
        if name in wanted and wanted[name] != shape:
            yield f"{name} is {wanted[name]} in the file, {shape} in the model"


def _other_modes(header: Header, traced: TracedModule) -> Iterable[str]:
    if set(header.modes) != set(traced.modes):
        yield f"captured in {list(header.modes)} and {list(traced.modes)}"
