"""A recipe: what is done to a model, from its source to its files, as a TOML file says it or the command line."""

from __future__ import annotations

import difflib
import os
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
from pydantic import BaseModel, ConfigDict, Field

from fxprune.errors import ArgumentError

VERSION = 1
Share = Annotated[float, Field(gt=0, lt=1)]
Names = list[str]


class _Table(BaseModel):
    """A table of a recipe; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Model(_Table):
    """The model, and what it is traced with."""

    source: str
    """package.module:factory; timm:NAME; transformers:NAME or a folder with config.json; ultralytics:NAME.yaml; a file
    of fxprune.save (.fxp), or an exported program (.pt2)."""
    weights: str | None = None
    """A .safetensors file that is loaded into it."""
    inputs: Names = []
    """What it is traced with, as in "2x3x32x32" or "ids=2x16:int64"; empty: the first samples of the data."""


class Data(_Table):
    """Samples without labels: of calibration, or those that the result is judged on."""

    source: str
    """A folder of images, a file of tensors (.npz, .safetensors; samples along the first axis), a file of text lines
    (.txt), or package.module:function, which returns batches."""
    samples: Annotated[int, Field(ge=2)] = 512
    """How many are taken, evenly spaced; of a function's batches, all."""
    batch: Annotated[int, Field(ge=1)] = 32
    """Samples in a batch."""
    shape: list[int] | None = None
    """Of an image: channels (1 or 3), height and width; None: what timm or the model's folder says."""
    mean: list[float] | None = None
    """Taken from each channel of an image, whose values are 0 to 1; None: what the model's library says, else 0.5."""
    std: list[float] | None = None
    """Each channel of an image is divided by; None: what the model's library says, else 0.5."""
    tokenizer: str | None = None
    """A folder with a tokenizer of transformers, for text; None: the model's."""
    length: Annotated[int, Field(ge=2)] = 64
    """Tokens of a line, padded or cut."""


class Reparametrization(_Table):
    """A norm that is put on weights."""

    kind: Literal["weight_norm", "spectral_norm"]
    """Which one."""
    names: str
    """The weights, as in "*.conv?.weight"."""


class Choose(_Table):
    """Which channels go: at least one budget."""

    amount: Share | None = None
    """The share of the channels that goes."""
    macs: Share | None = None
    """The share of the multiply-accumulates that stays."""
    parameters: Share | None = None
    """The share of the parameters that stays."""
    speedup: Annotated[float, Field(gt=1)] | None = None
    """How many times faster in onnxruntime."""
    importance: str = "obs"
    """By what channels are chosen: "obs" measures on the data what the output loses; "l2", "l1", "taylor", ..."""
    distance: str = "auto"
    """How "obs" compares outputs: "divergence", "error" or "cosine"."""
    targets: Names = []
    """Groups with these weights alone; empty: all."""
    ignore: Names = []
    """Groups that stay."""
    kinds: Names = []
    """Kinds of groups, as "channel", "head", "width"; empty: those of the default."""
    round_to: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """Channel counts are multiples of it."""
    max_per_group: Annotated[float, Field(gt=0, le=1)] = 1.0
    """The largest share of a group that goes."""
    runnable: bool = False
    """Leave what the model's own class can have."""
    compact_masks: bool | None = None
    """Hold one vector for a mask of rows or of columns alone, for a network that fills the memory; training must not
    write into masks. None: where nothing is trained."""

    @pydantic.model_validator(mode="after")
    def _has_a_budget(self) -> Choose:
        if not self.budgets:
            raise ValueError("a budget is needed: macs, parameters, speedup or amount")
        if self.distance != "auto" and self.importance != "obs":
            raise ValueError(f'distance is for importance "obs"; it is {self.importance!r}')
        return self

    @property
    def budgets(self) -> dict[str, float]:
        """Those that are given, by name."""
        given = {name: getattr(self, name) for name in ("amount", "macs", "parameters", "speedup")}
        return {name: value for name, value in given.items() if value is not None}


class Repair(_Table):
    """Whether what is left is refitted to do the work of what went."""

    enabled: bool = True
    """False leaves the weights as they are."""
    new_biases: bool = True
    """Give layers without a bias one, where it helps."""


class Train(_Table):
    """Training of the masked network."""

    function: str
    """package.module:function, called with the traced module in train mode; it trains in place."""


class Finalize(_Table):
    """How masked channels are taken out."""

    fold_batch_norm: bool = False
    """Fold batch norms into the layers before them."""


class Export(_Table):
    """The files."""

    onnx: bool = True
    """Write model.onnx; without it nothing is said of its precision and opset."""
    precision: Literal["float32", "float16", "int8"] = "float32"
    """Of the ONNX file; "int8" is calibrated with the data."""
    opset: int | None = None
    """ONNX operator set; None: that of torch's exporter."""
    own_class: bool = True
    """Write the shrunk model of the model's own class, where that can have it."""

    @pydantic.model_validator(mode="after")
    def _is_whole(self) -> Export:
        if not self.onnx and (self.precision != "float32" or self.opset is not None):
            raise ValueError("precision and opset are those of model.onnx, which onnx = false leaves out")
        return self


class Compare(_Table):
    """What is compared with the dense network."""

    data: Data | None = None
    """Samples to judge on; None: those of calibration."""
    score: str | None = None
    """package.module:function, called with a module; returns a number, the larger the better."""
    latency: bool = True
    """Run the dense and the pruned ONNX file in turns."""
    rounds: Annotated[int, Field(ge=1)] = 30
    """Runs of each that count."""


class Recipe(_Table):
    """All that is done, in the order of its tables."""

    version: Literal[1] = 1
    """Of the recipe's format."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Of every stage's random numbers."""
    model: Model
    data: Data | None = None
    """Needed by "obs", by repair and by int8."""
    reparametrize: list[Reparametrization] = []
    """Norms that are put on weights first."""
    choose: Choose
    repair: Repair = Repair()
    train: Train | None = None
    finalize: Finalize = Finalize()
    export: Export = Export()
    compare: Compare = Compare()

    @pydantic.model_validator(mode="after")
    def _has_data_where_needed(self) -> Recipe:
        if self.data is None and (self.choose.importance == "obs" or self.repair.enabled):
            raise ValueError(
                'data is needed: importance "obs" and repair look at samples. Without any, choose importance = "l2" '
                "and set enabled = false in [repair]"
            )
        if self.data is None and self.export.precision == "int8":
            raise ValueError("data is needed: int8 is calibrated with samples")
        return self


def read(path: str | os.PathLike[str]) -> Recipe:
    """The recipe of a TOML file; paths in it are relative to the folder that the process is in.

    Raises:
        ArgumentError: it is no TOML, of a newer version, or has keys or values that no recipe has; all are named.

    Example:
        >>> read("recipe.toml").choose.macs
        0.5
    """
    try:
        tables = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ArgumentError(f"'{path}' was to be read as a recipe: {error.strerror}.") from error
    except ValueError as error:  # of TOML or of UTF-8
        raise ArgumentError(f"'{path}' was to be read as a recipe; it is no TOML: {error}.") from error
    return parsed(tables, f"'{path}'")


def parsed(tables: dict[str, Any], what: str = "the recipe") -> Recipe:
    """The recipe that tables say.

    Raises:
        ArgumentError: as `read`.
    """
    version = tables.get("version", VERSION)
    if isinstance(version, int) and version > VERSION:
        raise ArgumentError(
            f"{what} is of version {version}; this fxprune reads version {VERSION}. Install a newer one."
        )
    try:
        return Recipe.model_validate(tables)
    except pydantic.ValidationError as error:
        raise ArgumentError(f"{what} cannot be used: {'; '.join(_told(error))}.") from error


def _told(error: pydantic.ValidationError) -> Iterator[str]:
    for each in error.errors():
        path = [str(part) for part in each["loc"]]
        where = ".".join(path)
        if each["type"] == "extra_forbidden":
            known = _keys_at([part for part in each["loc"][:-1] if isinstance(part, str)])
            near = difflib.get_close_matches(path[-1], known, 1)
            yield f"{where} is unknown" + (f" (did you mean {near[0]}?)" if near else f" (known: {', '.join(known)})")
        elif each["type"] == "missing":
            yield f"{where} is missing"
        else:
            message = each["msg"].removeprefix("Value error, ")
            given = f" (given: {each['input']!r})" if where and not isinstance(each["input"], dict) else ""
            yield f"{where + ': ' if where else ''}{message}{given}"


def _keys_at(path: list[str]) -> list[str]:
    """The keys of a table of recipes."""
    schema = Recipe.model_json_schema()
    table = schema
    for part in path:
        table = table["properties"][part]
        table = table.get("items", table)
        for choice in (table, *table.get("anyOf", [])):
            if "$ref" in choice:
                table = schema["$defs"][choice["$ref"].rpartition("/")[2]]
    return list(table.get("properties", {}))


def schema() -> dict[str, Any]:
    """The JSON schema of recipes, for editors.

    Example:
        >>> json.dumps(schema())
    """
    return Recipe.model_json_schema() | {"$schema": "https://json-schema.org/draft/2020-12/schema"}
