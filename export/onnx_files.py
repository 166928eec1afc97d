"""ONNX files on disk: one file, or weights beside it where they are too large for one."""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Callable
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError
from torch.onnx import ONNXProgram

from .node_values import ORIGIN
from .verification import Draft

SINGLE_FILE_BYTES = 1536 * 2**20  # weights beyond it go to a file beside: protobuf ends at 2 GiB


def save(program: ONNXProgram, file: Path) -> None:
    """Write what torch made."""
    constants = [value.const_value for value in program.model.graph.initializers.values()]
    external = sum(constant.nbytes for constant in constants if constant is not None) > SINGLE_FILE_BYTES
    # the exporter calls the side file like the main one; a fresh name keeps an older pair whole until it is replaced
    draft = file.with_name(_fresh(file, ".onnx")) if external else file
    program.save(draft, external_data=external)
    draft.rename(file)


def rewrite(draft: Draft, change: Callable[[onnx.ModelProto], onnx.ModelProto]) -> None:
    """Replace a file by what `change` makes of it; its metadata, and what its nodes say of their origin, stay."""
    model = onnx.load(draft.file)
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    origins = {
        value: entry
        for node in model.graph.node
        for entry in node.metadata_props
        for value in node.output
        if entry.key == ORIGIN
    }
    changed = change(model)
    for node in changed.graph.node:
        if not node.metadata_props:  # what the quantizer puts in its place has none
            node.metadata_props.extend(origins[value] for value in node.output if value in origins)
    onnx.helper.set_model_props(changed, metadata)
    for part in draft.parts:
        part.unlink()
    external = sum(len(tensor.raw_data) for tensor in changed.graph.initializer) > SINGLE_FILE_BYTES
    onnx.save(changed, draft.file, save_as_external_data=external, location=_fresh(draft.file, ".onnx.data"))


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
