"""`torch.export` of a model in each mode, with a free batch where the model allows it."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, OutputKind

from fxprune.capture.carried_state import changes_noted, check_calls
from fxprune.capture.explaining import asks_for_values, eager_failure, explained, unfixed
from fxprune.capture.free_axes import FreeAxis, SizeLog, fixed_axes, free_axes
from fxprune.capture.gradients import check_gradients, own_gradients
from fxprune.capture.protection import (
    Reads,
    attributes_kept,
    counted_reads,
    exports_asked_about,
    forget_kept_shapes,
    generators_kept,
    markers_kept,
    quiet,
    untied,
    weights_reread,
)
from fxprune.capture.sample import Sample
from fxprune.capture.stand_ins import is_stood_in
from fxprune.capture.structures import outputs_registered
from fxprune.capture.unrecorded import refuse_exchanges, unrecorded
from fxprune.errors import ArgumentError, BatchSpecializedWarning, CaptureError, EvalOnlyWarning, FixedSizeWarning
from fxprune.graph.kept_tensors import forget_kept_tensors
from fxprune.graph.mutation import memory_of, written
from fxprune.graph.traced import MODES
from fxprune.torch_internals import (
    any_recurrent_length,
    conversions_checked,
    distributions_unchecked,
    indices_recorded,
    values_known,
)

aten = torch.ops.aten
_PRODUCTS = (
    aten.linear.default, aten.matmul.default, aten.mm.default, aten.bmm.default, aten.addmm.default,
    aten.baddbmm.default,
)  # fmt: skip
_FEW = 4096  # entries of a constant that a capture computes with
_ASSIGNED = re.compile(r"The tensor attributes? (.*?) (?:was|were) assigned during export")


@dataclass(frozen=True, eq=False)
class Exported:
    """One mode of a model.

    Attributes:
        program: what torch captured.
        assigned: the plain attributes that the forward assigned tensors to.
        reads: how often the forward read each attribute.
        sizes: what was learned of free sizes, and where.
    """

    program: ExportedProgram
    assigned: frozenset[str]
    reads: Reads
    sizes: SizeLog


def export_modes(
    model: nn.Module, sample: Sample, dynamic_shapes: Any, modes: Sequence[str]
) -> tuple[dict[str, Exported], Sample]:
    """The model in each of the modes, and the sample that they were captured with, which says what is free.

    With `dynamic_shapes="batch"` the batch is free in every mode, or in none.

    Raises:
        CaptureError: no mode can be captured, or eval mode cannot; SampleError where eager fails on the sample too.

    Warns:
        BatchSpecializedWarning, FixedSizeWarning, EvalOnlyWarning: as `trace`, whose caller they name.
    """
    if dynamic_shapes != "batch":
        return _export_each(model, sample, modes, dynamic_shapes), sample
    exported: dict[str, Exported] = {}
    current = sample.with_free_batch()
    for mode in _in_order(modes):
        try:
            found, why = _export_free(model, current, mode)
            if found is None:
                found = _export(model, sample, mode, None)
                message = f"captured for the sample's batch size alone; in {mode} mode the batch {why}"
                warnings.warn(message, BatchSpecializedWarning, stacklevel=4)
                for earlier in exported:
                    exported[earlier] = _export(model, sample, earlier, None)
                current = sample
            exported[mode] = found
        except CaptureError as error:
            failure = eager_failure(model, current, mode) and eager_failure(model, sample, mode)  # as it was given
            _tolerate(failure or error, exported, stacklevel=5)
    return exported, current


def _export_each(model: nn.Module, sample: Sample, modes: Sequence[str], shapes: Any) -> dict[str, Exported]:
    exported: dict[str, Exported] = {}
    axes = [] if shapes is None else free_axes(model, sample, shapes)
    _check_there(axes)
    for mode in _in_order(modes):
        try:
            exported[mode] = _export(model, sample, mode, shapes, sizes_given=shapes is not None)
        except CaptureError as error:
            _tolerate(eager_failure(model, sample, mode) or error, exported, stacklevel=6)
    _warn_of_fixed(axes, sample, exported, stacklevel=6)
    return exported


def _check_there(axes: Iterable[FreeAxis]) -> None:
    """Raise ArgumentError for an axis that its input does not have."""
    for axis in axes:
        rank = axis.tensor.dim()
        if axis.axis not in range(rank):
            raise ArgumentError(
                f"dynamic_shapes has {axis}, whose shape in the sample is {tuple(axis.tensor.shape)}: an axis from 0 "
                f"to {rank - 1} is needed."
            )


def _warn_of_fixed(axes: Sequence[FreeAxis], sample: Sample, exported: dict[str, Exported], *, stacklevel: int) -> None:
    """Say of the axes left to torch.export which ones it fixed, each once."""
    told: set[FreeAxis] = set()
    for mode, found in exported.items():
        for axis, size in fixed_axes([axis for axis in axes if axis.is_auto], found.program, sample).items():
            if axis in told:
                continue
            told.add(axis)
            why = found.sizes.why_fixed(axis) or f"to {size}"
            warnings.warn(
                f"{axis} was left to Dim.AUTO; in {mode} mode it is fixed {why}. The graph holds for that size alone. "
                f"To have it free, {unfixed(axis)}; to have it fixed, leave it out of `dynamic_shapes`.",
                FixedSizeWarning,
                stacklevel=stacklevel,
            )


def _in_order(modes: Sequence[str]) -> Iterable[str]:
    return (mode for mode in MODES if mode in modes)  # what eval cannot, train need not try


def _tolerate(error: CaptureError, exported: dict[str, Exported], *, stacklevel: int) -> None:
    """Do with eval mode alone, where that is captured; raise the error where nothing is."""
    if not exported:
        raise error
    warnings.warn(f"captured for eval mode alone. {error}", EvalOnlyWarning, stacklevel=stacklevel)


def _export_free(model: nn.Module, sample: Sample, mode: str) -> tuple[Exported | None, str]:
    """The model with its batch free, or None and why it cannot be; raises CaptureError where that is not to blame."""
    try:
        exported = _export(model, sample, mode, sample.dynamic_shapes(model))
    except CaptureError as error:
        if not sample.free:
            raise
        return None, f"cannot be free: {error}"
    if sample.free and sample.is_specialized(exported.program):
        axes = fixed_axes(free_axes(model, sample, sample.dynamic_shapes(model)), exported.program, sample)
        places = [place for axis in axes if (place := exported.sizes.place_fixed(axis))]
        return None, "is fixed by the model" + (f" at {places[0].quoted}" if places else "")
    return exported, ""


def _export(model: nn.Module, sample: Sample, mode: str, shapes: Any, *, sizes_given: bool = False) -> Exported:
    """The model in one mode, as eager computes it.

    Code that does something else in an export is captured as if there were none, where that can be and leaves as much
    free.
    """
    with exports_asked_about(answer=True) as asked:
        found = _with_constants(model, sample, mode, shapes, sizes_given=sizes_given)
    if not asked:
        return found
    try:
        with exports_asked_about(answer=False):
            as_eager = _with_constants(model, sample, mode, shapes, sizes_given=sizes_given)
    except CaptureError:
        return found
    axes = [] if shapes is None else free_axes(model, sample, shapes)
    fixed = fixed_axes(axes, as_eager.program, sample).keys() - fixed_axes(axes, found.program, sample).keys()
    return found if fixed else as_eager


def _with_constants(model: nn.Module, sample: Sample, mode: str, shapes: Any, *, sizes_given: bool) -> Exported:
    """The model in one mode; where values of tensors are asked for, with those of constants known.

    The graph holds for these values. They are small buffers of integers that no state dict holds and forward leaves
    alone, such as the strides of an audio codec.
    """
    try:
        return _captured(model, sample, mode, shapes, sizes_given=sizes_given)
    except CaptureError as error:
        constants = {} if is_stood_in(model) or not asks_for_values(error.__cause__) else _constants(model)
        if not constants:
            raise
        with values_known(constants):
            try:
                found = _captured(model, sample, mode, shapes, sizes_given=sizes_given)
            except CaptureError as later:
                raise (later if asks_for_values(later.__cause__) else error) from None
        if not constants.keys().isdisjoint(_written_buffers(found.program)):
            raise
        return found


def _written_buffers(program: ExportedProgram) -> set[str]:
    """The names of buffers that forward writes into, or assigns."""
    memory = set(map(str, memory_of(target for node in program.graph.nodes for target in written(node))))
    return {name for node, name in program.graph_signature.inputs_to_buffers.items() if node in memory}


def _constants(model: nn.Module) -> dict[str, Tensor]:
    return {
        f"{path}.{name}" if path else name: buffer
        for path, module in model.named_modules()
        for name, buffer in module._buffers.items()
        if name in module._non_persistent_buffers_set
        and buffer is not None
        and buffer.numel() <= _FEW
        and not (buffer.is_floating_point() or buffer.is_complex() or buffer.is_meta)
    }


def _captured(model: nn.Module, sample: Sample, mode: str, shapes: Any, *, sizes_given: bool) -> Exported:
    def export() -> ExportedProgram:
        kwargs = dict(sample.kwargs) or None
        return torch.export.export(model, sample.args, kwargs, dynamic_shapes=shapes, strict=False)

    with (
        attributes_kept(model),
        generators_kept() as drawn,
        quiet(),
        weights_reread(model),
        untied(model),
        counted_reads(model) as reads,
        changes_noted(model) as changed,
        own_gradients() as own,
        SizeLog.of(model) as sizes,
        outputs_registered(model),
        any_recurrent_length(),
        distributions_unchecked(),
        conversions_checked(),
        indices_recorded(),
        markers_kept(pytree.tree_leaves((sample.args, dict(sample.kwargs)))),
        warnings.catch_warnings(record=True) as caught,
        torch.enable_grad(),
    ):
        warnings.simplefilter("always")
        try:
            forget_kept_tensors(model)
            forget_kept_shapes(model)
            model.train(mode == "train")
            program = export()
            refuse_exchanges(program, model, mode, export)
        except CaptureError:
            raise
        except Exception as error:
            axes = free_axes(model, sample, shapes) if sizes_given else None
            raise (unrecorded(error, model, mode, export) or explained(error, model, mode, axes, sizes)) from error
        draws = drawn()
    if draws:
        raise CaptureError(
            f"{type(model).__name__} draws from Python's or numpy's random generator in {mode} mode; the graph would "
            "repeat the numbers drawn at the capture. Draw by torch inside forward, or pass the numbers as inputs."
        )
    if changed and not is_stood_in(model):
        check_calls(model, mode, sample, changed)
    if _returns_nothing(program):
        raise CaptureError(
            f"{type(model).__name__}.forward returns nothing in {mode} mode, so there is nothing to compute. Return "
            "the outputs."
        )
    if _mixes_dtypes(program.graph) and (failure := eager_failure(model, sample, mode)):
        raise failure
    if own and mode == "train" and is_stood_in(model):
        raise CaptureError(
            f"{type(model).__name__} computes gradients by functions of its own, and these are compared with eager's "
            "by values, which its parameters on the meta device have not. Load values first: "
            "model.load_state_dict(state, assign=True)."
        )
    if own and mode == "train":
        check_gradients(model, program, sample, own)
    return Exported(program, _assigned(caught), reads, sizes)


def _returns_nothing(program: ExportedProgram) -> bool:
    outputs = [spec.arg for spec in program.graph_signature.output_specs if spec.kind is OutputKind.USER_OUTPUT]
    return all(isinstance(output, ConstantArgument) and output.value is None for output in outputs)


def _mixes_dtypes(graph: fx.Graph) -> bool:
    """Whether a product is one of several dtypes: torch.export captures these, and torch refuses to run them."""
    for node in graph.nodes:
        if node.target in _PRODUCTS:
            values = (operand.meta.get("val") for operand in node.all_input_nodes)
            if len({value.dtype for value in values if isinstance(value, Tensor)}) > 1:
                return True
    return False


def _assigned(caught: list[warnings.WarningMessage]) -> frozenset[str]:
    """The attributes that torch warns of having been assigned tensors; other warnings of interest go on to the user."""
    names: set[str] = set()
    for warning in caught:
        if found := _ASSIGNED.search(str(warning.message)):
            names |= {name.removeprefix("self.") for name in found.group(1).split(", ")}
        elif not issubclass(warning.category, DeprecationWarning | FutureWarning):
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    return frozenset(names)
