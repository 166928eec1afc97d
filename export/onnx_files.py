"""ONNX files on disk: one file, or weights beside it where they are too large for one."""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import onnx
import onnx_ir
from google.protobuf.message import DecodeError
from torch.onnx import ONNXProgram

from fxprune.borrowing import Borrowed

from .node_values import ORIGIN
from .verification import Draft
from .weights import Dense, Sparse, place, write, write_beside
from .wire import read

SINGLE_FILE_BYTES = 1536 * 2**20  # weights beyond it go to a file beside: protobuf ends at 2 GiB
MAPPED_BYTES = 32 * 2**20  # the same of a sharded module, which no process is to hold whole


def is_sharded(program: ONNXProgram) -> bool:
    """Whether its weights are those of a module that is spread over processes."""
    constants = [value.const_value for value in program.model.graph.initializers.values()]
    return any(isinstance(getattr(constant, "raw", None), Borrowed) for constant in constants)


def save(program: ONNXProgram, file: Path) -> None:
    """Write what torch made, and check it; of the weights one at a time is held.

    Raises:
        onnx.checker.ValidationError: it is no valid model.
    """
    constants = [value.const_value for value in program.model.graph.initializers.values()]
    most = MAPPED_BYTES if is_sharded(program) else SINGLE_FILE_BYTES
    if sum(constant.nbytes for constant in constants if constant is not None) <= most:
        _save_in_one_file(program, file)
        return
    # the exporter calls the side file like the main one; a fresh name keeps an older pair whole until it is replaced
    draft = file.with_name(_fresh(file, ".onnx"))
    program.save(draft, external_data=True)
    onnx.checker.check_model(os.fspath(draft))
    draft.rename(file)


def _save_in_one_file(program: ONNXProgram, file: Path) -> None:
    """Write a model whose weights are within."""
    model, weights = _without_numbers(program)
    heads = [*model.graph.initializer]
    model.graph.ClearField("initializer")
    write(
        model,
        [Dense(head, weight.nbytes, _written_by(weight)) for head, weight in zip(heads, weights, strict=True)],
        file,
    )


def _written_by(weight: onnx_ir.TensorProtocol) -> Callable[[BinaryIO], None]:
    return weight.tofile  # type: ignore[attr-defined, no-any-return]  # from where it is, without a copy


def _without_numbers(program: ONNXProgram) -> tuple[onnx.ModelProto, list[onnx_ir.TensorProtocol]]:
    """The model as a message whose initializers have no values, and these."""
    values = [(value, value.const_value) for value in program.model.graph.initializers.values()]
    known = [(value, weight) for value, weight in values if weight is not None]
    try:
        for value, weight in known:
            value.const_value = onnx_ir.ExternalTensor(
                "elsewhere", 0, weight.nbytes, weight.dtype, shape=onnx_ir.Shape(weight.shape.numpy()),
                name=str(weight.name), doc_string=weight.doc_string, metadata_props=dict(weight.metadata_props),
            )  # fmt: skip
        model = program.model_proto
    finally:
        for value, weight in known:
            value.const_value = weight
    for head in model.graph.initializer:
        head.ClearField("external_data")
        head.ClearField("data_location")
    return model, [weight for _, weight in known]


def rewrite(draft: Draft, change: Callable[[onnx.ModelProto], onnx.ModelProto]) -> None:
    """Replace a file by what `change` makes of it; its metadata, and what its nodes say of their origin, stay.

    Of the weights one at a time is held.

    Args:
        draft: the file.
        change: of a model as `wire.read` gives it. Where it leaves a weight in the file that it is in, the type that it
            gives it says what is made of it; so does a sparse one whose values are those of a dense one there.
    """
    model = read(draft.file)
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    origins = {
        value: entry
        for node in model.graph.node
        for entry in node.metadata_props
        for value in node.output
        if entry.key == ORIGIN
    }
    types = {place(weight): weight.data_type for weight in model.graph.initializer if weight.external_data}
    changed = change(model)
    for node in changed.graph.node:
        if not node.metadata_props:  # what the quantizer puts in its place has none
            node.metadata_props.extend(origins[value] for value in node.output if value in origins)
    onnx.helper.set_model_props(changed, metadata)
    folder, before = draft.file.parent, draft.parts
    dense = [Dense.of(weight, types, folder) for weight in changed.graph.initializer]
    there = [weight for weight in changed.graph.sparse_initializer if weight.values.external_data]
    sparse = [Sparse.of(weight, folder) for weight in there]
    for weight in there:
        changed.graph.sparse_initializer.remove(weight)
    changed.graph.ClearField("initializer")
    fresh = draft.file.with_name(_fresh(draft.file, ".onnx"))
    if sum(weight.size for weight in dense) > SINGLE_FILE_BYTES:
        write_beside(changed, [*dense, *sparse], fresh)
    else:
        write(changed, [*dense, *sparse], fresh)
    for part in before:
        part.unlink()
    fresh.rename(draft.file)


def _fresh(file: Path, suffix: str) -> str:
    return f"{file.stem}-{secrets.token_hex(4)}{suffix}"


def side_files(path: str | os.PathLike[str]) -> list[Path]:
    """External data of a file that stands at `path`, as far as `save` and `rewrite` have named it."""
    target = Path(os.path.realpath(path))
    own = re.compile(re.escape(target.stem) + r"-[0-9a-f]{8}\.onnx\.data")
    found = [item for item in target.parent.iterdir() if own.fullmatch(item.name)]
    if not found or not target.is_file():
        return []
    try:
        tensors = onnx.load(os.fspath(target), load_external_data=False).graph.initializer
    except DecodeError:  # what stands there is not ONNX: nothing of it is known to be ours
        return []
    used = {entry.value for tensor in tensors for entry in tensor.external_data}
    return [item for item in found if item.name in used]
