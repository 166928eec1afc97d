"""Files of other formats than `load` reads, told by their name and their first bytes, and where they are to go."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

from fxprune.errors import ArtifactError

_READS = "load reads files of fxprune.save, and .pt2 programs"
_ONNX = (b"\x12", b"\x3a", b"\x42", b"\x1a")  # the fields that follow the version in a file of ONNX


def refuse_strangers(path: str | os.PathLike[str]) -> None:
    """Raise ArtifactError where a file is of a known format that holds no traced module.

    What is neither known nor readable is left to the reader, as are missing files.
    """
    if found := _stranger(path):
        raise ArtifactError(f"'{path}' {found}")


def _stranger(path: str | os.PathLike[str]) -> str | None:
    suffix = Path(path).suffix.lower()
    with open(path, "rb") as file:
        head = file.read(16)
    if not head:
        return "is empty. A file that is truncated or altered must be written again."
    if zipfile.is_zipfile(path):
        return _torch_archive(path)
    if suffix == ".onnx" or (head[:1] == b"\x08" and head[2:3] in _ONNX):
        return (
            f"is an ONNX file, which holds no traced module; {_READS}. Save the module beside it with fxprune.save; "
            "to run the file, use onnxruntime or fxprune.compare."
        )
    if suffix == ".safetensors" or head[8:10] == b'{"':
        return _weights("of safetensors")
    return None


def _torch_archive(path: str | os.PathLike[str]) -> str | None:
    """What an archive of torch is that is no program; None for all others."""
    with zipfile.ZipFile(path) as archive:
        members = {name.partition("/")[2]: name for name in archive.namelist()}
    if "data.pkl" not in members:
        return None
    if "constants.pkl" in members:
        return f"is TorchScript, which holds no traced module; {_READS}. Run it with torch.jit.load."
    return _weights(f"of torch.save (it holds {members['data.pkl']})")


def _weights(kind: str) -> str:
    return (
        f"is a file {kind}, without graphs; {_READS}. Build the model, load the weights into it with load_state_dict, "
        "and trace it."
    )
