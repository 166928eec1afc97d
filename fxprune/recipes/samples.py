"""Batches of samples from the sources that a command line or a recipe names."""

from __future__ import annotations

import importlib.util
import json
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from fxprune.errors import ArgumentError
from fxprune.graph.calls import Call, as_calls
from fxprune.recipes import sources
from fxprune.recipes.recipe import Data, Model
from fxprune.reports import counted, first_of

NAMELESS = "arr_"  # as numpy begins the name of an array without one
TENSOR_FILES = (".npz", ".safetensors")
IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".ppm", ".pgm")


@dataclass(frozen=True)
class Samples:
    """Batches, and which of their rows count.

    Attributes:
        batches: the inputs of calls. weight: as `fxprune.sensitivity` takes it; None: all rows count.
    """

    batches: list[Call]
    weight: Callable[..., Tensor] | None = None

    @property
    def count(self) -> int:
        """How many samples there are."""
        return sum(_length(call) for call in self.batches)


def samples(data: Data, model: Model) -> Samples:
    """The samples of a source.

    Args:
        data: says which, how many, and how they are prepared.
        model: whose library may say how.

    Raises:
        ArgumentError: there are none, or not as many along all inputs; a file or package is missing.

    Example:
        >>> samples(Data(source="digits.npz"), Model(source="nets:trained")).batches[0]
    """
    path = Path(data.source)
    if ":" in data.source and not path.exists():
        found = Samples(as_calls(sources.function(data.source, "batches")(), error=ArgumentError))
    elif path.is_dir():
        found = Samples(_cut({f"{NAMELESS}0": _images(path, data, model)}, data))
    elif path.suffix in TENSOR_FILES:
        found = Samples(_cut(tensors_of_file(data.source), data))
    elif path.suffix == ".txt" and path.is_file():
        found = Samples(_cut(_tokens(path, data, model), data), _attention_mask)
    else:
        raise ArgumentError(
            f"'{data.source}' was to give samples; there is {'a file' if path.is_file() else 'nothing'} of that name. "
            "A folder of images, an .npz, .safetensors or .txt file, or package.module:function is needed."
        )
    if not found.batches or found.count < 2:
        raise ArgumentError(f"'{data.source}' gives {counted(found.count, 'sample')}; at least two are needed.")
    return found


def tensors_of_file(path: str) -> dict[str, Tensor]:
    """The tensors of an .npz or .safetensors file by name.

    Raises:
        ArgumentError: it is not there, or no such file.
    """
    try:
        if path.endswith(".safetensors"):
            return safetensors.torch.load_file(path)
        with np.load(path, allow_pickle=False) as arrays:
            return {name: torch.from_numpy(array) for name, array in arrays.items()}
    except (OSError, ValueError, TypeError, zipfile.BadZipFile, safetensors.SafetensorError) as error:
        raise ArgumentError(f"'{path}' was to hold tensors; it cannot be read: {error}") from error


def names_of_file(path: str) -> str:
    """A sentence for errors: which tensors an .npz or .safetensors file has, and how they are given to a model."""
    return (
        f"'{path}' holds {', '.join(tensors_of_file(path))}: tensors are given by these names, those that begin with "
        f"{NAMELESS}, as numpy calls arrays without a name, by position. Save inputs alone, under the model's names."
    )


def call_of(tensors: dict[str, Tensor]) -> Call:
    """A call with tensors of numpy's own names by position, all others by name."""
    args = tuple(tensor for name, tensor in tensors.items() if name.startswith(NAMELESS))
    return Call(args, {name: tensor for name, tensor in tensors.items() if not name.startswith(NAMELESS)})


def _attention_mask(*args: Tensor, **kwargs: Tensor) -> Tensor:
    return kwargs["attention_mask"]


def _length(call: Call) -> int:
    first = [value for value in (*call.args, *call.kwargs.values()) if isinstance(value, Tensor) and value.dim()]
    return len(first[0]) if first else 0


def _cut(tensors: dict[str, Tensor], data: Data) -> list[Call]:
    """Evenly spaced samples, in batches."""
    counts = {name: len(tensor) if tensor.dim() else 0 for name, tensor in tensors.items()}
    if len(set(counts.values())) != 1:
        told = ", ".join(f"{name} {count}" for name, count in counts.items())
        raise ArgumentError(f"'{data.source}' holds {told or 'no tensors'}; as many samples of each are needed.")
    chosen = torch.tensor(_spaced(next(iter(counts.values())), data.samples))
    return [call_of({name: each[part] for name, each in tensors.items()}) for part in chosen.split(data.batch)]


def _spaced(count: int, most: int) -> list[int]:
    taken = min(count, most)
    return [i * count // taken for i in range(taken)]


def _images(folder: Path, data: Data, model: Model) -> Tensor:
    if importlib.util.find_spec("PIL") is None:
        raise ArgumentError(f"'{folder}' is a folder of images, which pillow reads: pip install pillow.")
    from PIL import Image

    shape, mean, std = _preparation(data, model)
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGES)
    if not paths:
        raise ArgumentError(f"'{folder}' has no images ({', '.join(IMAGES)}), in it or in its folders.")
    channels, height, width = shape
    found = []
    for i in _spaced(len(paths), data.samples):
        try:
            with Image.open(paths[i]) as image:
                plain = image.convert("L" if channels == 1 else "RGB").resize((width, height), Image.Resampling.BICUBIC)
        except OSError as error:
            raise ArgumentError(f"'{paths[i]}' was to be read as an image: {error}.") from error
        found.append(torch.from_numpy(np.array(plain)).view(height, width, channels).permute(2, 0, 1))
    pixels = torch.stack(found).float() / 255
    return (pixels - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]


@dataclass(frozen=True)
class _Preparation:
    """What images are before a model sees them."""

    shape: Sequence[int] | None = None
    mean: Sequence[float] = (0.5,)
    std: Sequence[float] = (0.5,)


def _said_by_library(source: str) -> _Preparation:
    """How the library of a model prepares images."""
    if sources.is_of("timm", source):
        says = sources.library("timm", source).get_pretrained_cfg(source.partition(":")[2])
        return _Preparation() if says is None else _Preparation(says.input_size, says.mean, says.std)
    if sources.is_of("ultralytics", source):
        return _Preparation(None, (0.0,), (1.0,))
    path = Path(sources.folder_of(source), "preprocessor_config.json")
    if not path.is_file():
        return _Preparation()
    says = json.loads(path.read_text(encoding="utf-8"))
    size = says.get("crop_size") if says.get("do_center_crop") else says.get("size")
    side = (size or {}).get("shortest_edge")
    height, width = ((size or {}).get(name, side) for name in ("height", "width"))
    mean, std = says.get("image_mean") or (0.5,) * 3, says.get("image_std") or (0.5,) * 3
    shape = None if height is None or width is None else (len(mean), height, width)
    if not says.get("do_normalize", True):
        mean, std = (0.0,), (1.0,)
    return _Preparation(shape, mean, std)


def _preparation(data: Data, model: Model) -> tuple[Sequence[int], Sequence[float], Sequence[float]]:
    """The shape of images, and what is taken from them and what they are divided by, for each channel."""
    said = _said_by_library(model.source)
    shape, mean, std = data.shape or said.shape, data.mean or said.mean, data.std or said.std
    if shape is None or len(shape) != 3 or shape[0] not in (1, 3) or min(shape) < 1:
        raise ArgumentError(
            f"shape={shape}: images need the size that the model takes: channels (1 or 3), height and width, as in "
            "3x224x224."
        )
    for name, values in (("mean", mean), ("std", std)):
        if len(values) not in (1, shape[0]):
            raise ArgumentError(f"{name}={values}: one value is needed, or one for each of {shape[0]} channels.")
    return shape, mean, std


def _tokens(path: Path, data: Data, model: Model) -> dict[str, Tensor]:
    if importlib.util.find_spec("transformers") is None:
        raise ArgumentError(f"'{path}' is text, which a tokenizer of transformers reads: pip install transformers.")
    from transformers import AutoTokenizer

    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not lines:
        raise ArgumentError(f"'{path}' has no lines of text.")
    name = data.tokenizer or sources.folder_of(model.source)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ArgumentError(
            f"'{path}' is text; no tokenizer was found at '{name}': {first_of([error])}. Name its folder: tokenizer."
        ) from error
    given = tokenizer(lines, padding="max_length", max_length=data.length, truncation=True, return_tensors="pt")
    return dict(given)
