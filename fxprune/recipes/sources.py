"""Models and functions by the names that a command line or a recipe has for them."""

from __future__ import annotations

import importlib
import importlib.util
import operator
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import nn

from fxprune.checkpoints.checkpoint import load
from fxprune.errors import ArgumentError
from fxprune.reports import first_of

KINDS = (
    "package.module:factory, timm:NAME, transformers:NAME, a folder with config.json, ultralytics:NAME.yaml, or a "
    "file: .fxp, .pt2"
)


def function(name: str, what: str) -> Callable[..., Any]:
    """The function that package.module:function names; modules of the current folder are found too.

    Args:
        name: of it.
        what: it is to be called for, as in "a model".

    Raises:
        ArgumentError: there is none.

    Example:
        >>> function("math:sqrt", "a root")(4.0)
        2.0
    """
    module, colon, attribute = name.partition(":")
    if not (module and colon and attribute):
        raise ArgumentError(f"'{name}' was to be called for {what}. Name it package.module:function.")
    sys.path.insert(0, "")
    try:
        found = operator.attrgetter(attribute)(importlib.import_module(module))
    except (ImportError, AttributeError) as error:
        raise ArgumentError(
            f"'{name}' was to be called for {what}: {error}. Name it package.module:function."
        ) from error
    finally:
        sys.path.remove("")
    if isinstance(found, nn.Module) or not callable(found):
        raise ArgumentError(f"'{name}' is a {type(found).__name__}; a function is needed, to be called for {what}.")
    called: Callable[..., Any] = found
    return called


def model(source: str, weights: str | None = None) -> nn.Module:
    """The model that a source names.

    Args:
        source: package.module:factory; timm:NAME; transformers:NAME, or a folder with config.json;
            ultralytics:NAME.yaml; a file of `fxprune.save`, or an exported program.
        weights: a .safetensors file that is loaded into it; all its names and all the model's must agree.

    Raises:
        ArgumentError: there is no such model, its library is not installed, or the weights are another model's.
        ArtifactError: a file that cannot be loaded.

    Example:
        >>> model("nets:trained")
    """
    found = _built(source)
    if not isinstance(found, nn.Module):
        raise ArgumentError(f"'{source}' returns a {type(found).__name__}; a torch.nn.Module is needed.")
    if weights is not None:
        _load(found, weights)
    return found


def is_timm(source: str) -> bool:
    """Whether a model is one of timm, which says how images are prepared."""
    return source.startswith("timm:")


def folder_of(source: str) -> str:
    """The name or folder of a model of transformers, which has its tokenizer beside it."""
    return source.removeprefix("transformers:")


def _built(source: str) -> Any:
    owner, colon, name = source.partition(":")
    if Path(source).suffix in (".fxp", ".pt2"):
        return load(source)
    if Path(source).suffix in (".pt", ".pth", ".ckpt", ".bin"):
        raise ArgumentError(
            f"'{source}' was to be read as a model. Such a file is a pickle, which runs what it says when it is read. "
            "Name a function that builds the model, package.module:factory, and give its weights as .safetensors."
        )
    if Path(source, "config.json").is_file() or owner == "transformers":
        return _of_transformers(folder_of(source))
    if owner == "timm" and colon:
        return library("timm", source).create_model(name)
    if owner == "ultralytics" and colon:
        if Path(name).suffix not in (".yaml", ".yml"):
            raise ArgumentError(f"'{source}': ultralytics models are built from a NAME.yaml; weights are .safetensors.")
        os.environ.setdefault("YOLO_OFFLINE", "1")
        return library("ultralytics", source).YOLO(name).model
    if not colon:
        found = "is a folder without config.json" if Path(source).is_dir() else "is no such model"
        raise ArgumentError(f"'{source}' {found}; one of these is needed: {KINDS}.")
    return function(source, "a model")()


def _of_transformers(name: str) -> nn.Module:
    transformers = library("transformers", name)
    config = transformers.AutoConfig.from_pretrained(name)
    if not config.architectures:
        raise ArgumentError(
            f"'{name}': its config.json names no architecture. Name a function: package.module:factory."
        )
    built: nn.Module = getattr(transformers, config.architectures[0]).from_pretrained(name)
    return built


def library(name: str, source: str) -> Any:
    """A library that a source needs.

    Raises:
        ArgumentError: it is not installed.

    Example:
        >>> library("timm", "timm:resnet18").create_model("resnet18")
    """
    if importlib.util.find_spec(name) is None:
        raise ArgumentError(f"'{source}' needs {name}, which is not installed: pip install {name}.")
    return importlib.import_module(name)


def _load(into: nn.Module, weights: str) -> None:
    if Path(weights).suffix != ".safetensors":
        raise ArgumentError(f"'{weights}' was to be loaded as weights; a .safetensors file is needed.")
    try:
        state = safetensors.torch.load_file(weights)
    except Exception as error:  # of the file system or of the format, whose classes share no base
        raise ArgumentError(f"'{weights}' was to be loaded as weights: {error}.") from error
    own = into.state_dict(keep_vars=True)
    lacking = [name for name in own if name not in state]
    tied = {id(own[name]) for name in own if name in state}
    lacking = [name for name in lacking if id(own[name]) not in tied]  # a tensor of two names is stored once
    foreign = [name for name in state if name not in own]
    other = [name for name in state if name in own and state[name].shape != own[name].shape]
    if lacking or foreign or other:
        told = {"lacks": lacking, "has besides": foreign, "has in other shapes": other}
        raise ArgumentError(
            f"'{weights}' is no state of this {type(into).__name__}: it "
            + "; it ".join(f"{how} {first_of(names)}" for how, names in told.items() if names)
            + ". Give the weights of this model."
        )
    into.load_state_dict(state, strict=False)
