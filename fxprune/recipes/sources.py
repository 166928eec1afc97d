"""Models and functions by the names that a command line or a recipe has for them."""

from __future__ import annotations

import contextlib
import difflib
import importlib
import importlib.util
import operator
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import nn

from fxprune.checkpoints.checkpoint import load
from fxprune.errors import ArgumentError, FxpruneWarning
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

    Warns where a library gives the model random weights, and none are named.

    Args:
        source: package.module:factory; timm:NAME, with the weights of timm's where it has their tag, as in
            timm:resnet18.a1_in1k; transformers:NAME, or a folder with config.json; ultralytics:NAME.yaml; a file of
            `fxprune.save`, or an exported program.
        weights: a .safetensors file that is loaded into it; all its names and all the model's must agree.

    Raises:
        ArgumentError: there is no such model, its library is not installed or cannot build it, or the weights are
            another model's.
        ArtifactError: a file that cannot be loaded.

    Example:
        >>> model("nets:trained")
    """
    found = _built(source, weights is None)
    if not isinstance(found, nn.Module):
        raise ArgumentError(f"'{source}' returns a {type(found).__name__}; a torch.nn.Module is needed.")
    if weights is not None:
        _load(found, weights)
    return found


def is_of(library: str, source: str) -> bool:
    """Whether a model is one of a library by its name, as in timm:resnet18."""
    return source.startswith(f"{library}:")


def folder_of(source: str) -> str:
    """The name or folder of a model of transformers, which has its tokenizer beside it."""
    return source.removeprefix("transformers:")


def _built(source: str, is_whole: bool) -> Any:
    """The model, with weights where there are to be no others."""
    owner, colon, name = source.partition(":")
    if Path(source).suffix in (".fxp", ".pt2"):
        return load(source)
    if Path(source).suffix in (".pt", ".pth", ".ckpt", ".bin"):
        raise ArgumentError(
            f"'{source}' was to be read as a model. Such a file is a pickle, which runs what it says when it is read. "
            "Name a function that reads it, package.module:factory, or store its weights as .safetensors."
        )
    if Path(source, "config.json").is_file() or owner == "transformers":
        return _of_transformers(source)
    if owner == "timm" and colon:
        return _of_timm(source, name, is_whole)
    if owner == "ultralytics" and colon:
        if Path(name).suffix not in (".yaml", ".yml"):
            raise ArgumentError(f"'{source}': ultralytics models are built from a NAME.yaml; weights are .safetensors.")
        os.environ.setdefault("YOLO_OFFLINE", "1")
        with _building("ultralytics", source):
            built = library("ultralytics", source).YOLO(name).model
        if is_whole:
            _warn_of_random(source)
        return built
    if not colon:
        found = "is a folder without config.json" if Path(source).is_dir() else "is no such model"
        raise ArgumentError(f"'{source}' {found}; one of these is needed: {KINDS}.")
    return function(source, "a model")()


def _of_transformers(source: str) -> Any:
    name, transformers = folder_of(source), library("transformers", source)
    with _building("transformers", source):
        config = transformers.AutoConfig.from_pretrained(name)
    if not config.architectures:
        raise ArgumentError(
            f"'{name}': its config.json names no architecture. Name a function: package.module:factory."
        )
    with _building("transformers", source):
        return getattr(transformers, config.architectures[0]).from_pretrained(name)


def _of_timm(source: str, name: str, is_whole: bool) -> Any:
    timm = library("timm", source)
    architecture, tag = timm.models.split_model_name_tag(name)
    if "/" not in name and not timm.is_model(architecture):
        near = difflib.get_close_matches(architecture, timm.list_models(), 3)
        raise ArgumentError(
            f"'{source}': timm has no {architecture}" + (f"; it has {', '.join(near)}." if near else ".")
        )
    if is_whole and not tag:
        _warn_of_random(source, f", or a tag of timm's: {source}.TAG")
    with _building("timm", source):
        return timm.create_model(name, pretrained=is_whole and bool(tag))


@contextlib.contextmanager
def _building(name: str, source: str) -> Iterator[None]:
    """An error of a library, whatever it is, tells of the source."""
    try:
        yield
    except ArgumentError:
        raise
    except Exception as error:
        raise ArgumentError(
            f"'{source}' cannot be built by {name}: {type(error).__name__}: {first_of(str(error).splitlines())}. Name "
            "a model or a file that is there."
        ) from error


def _warn_of_random(source: str, others: str = "") -> None:
    warnings.warn(
        f"'{source}' has random weights: what is chosen of it says nothing of a trained network. Give its weights as a "
        f".safetensors file{others}.",
        FxpruneWarning,
        stacklevel=4,
    )


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
