"""Carrying a recipe out, stage by stage; what was killed goes on from the last finished stage."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

from fxprune.checkpoints.checkpoint import load, save
from fxprune.errors import ArgumentError, BudgetError, FxpruneError
from fxprune.files import atomic
from fxprune.graph.masks import hold_as_vectors
from fxprune.graph.traced import TracedModule
from fxprune.prune.budgeted_channels import are_vectors
from fxprune.recipes.outcome import Outcome
from fxprune.recipes.page import page
from fxprune.recipes.recipe import Recipe, parsed
from fxprune.recipes.stages import FILES, Record, seeded, stages
from fxprune.recipes.work import Work
from fxprune.reports import plain
from fxprune.version import __version__

Step = Callable[[str, int, int], None]  # name of the stage, its place, how many there are
_STATE = ".stages"


def run(
    recipe: Recipe, folder: str | os.PathLike[str], *, step: Step | None = None, overwrite: bool = False
) -> Outcome:
    """Carry a recipe out, and write its files into a folder.

    These are `model.fxp` (`fxprune.load` restores it), `model.onnx`, the shrunk model of the own class as
    `model.safetensors` or `pretrained/`, `report.json` with the recipe, the versions and what each stage did, and
    `report.html`, which shows it. After each stage its result is kept in `.stages/` until all are done: the same recipe
    goes on from there, with the same result to the bit on the CPU.

    Args:
        recipe: what is done.
        folder: empty, or not there; or of the same recipe, which was not finished.
        step: told of each stage that begins.
        overwrite: whether files of another recipe, or of the same one that was finished, may be replaced.

    Returns:
        What came of it. With a budget that cannot be reached, `failure` says so, and only the report is written.

    Raises:
        ArgumentError: the folder has other files, or cannot be written; a name in the recipe names nothing.
        FxpruneError: as the functions that the stages call.

    Example:
        >>> run(read("recipe.toml"), "out").macs
        (9204, 4602)
    """
    folder = Path(folder)
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    _prepare(folder, recipe, overwrite)
    work = Work(recipe, folder)
    planned = list(stages(work))
    outcome = _so_far(folder, recipe)
    done = len(outcome.stages)
    if done:
        work.traced = _loaded(folder / _STATE / f"{planned[done - 1][0]}.fxp", recipe)
    for place, (name, stage) in enumerate(planned):
        if place < done:
            continue
        if step is not None:
            step(name, place, len(planned))
        begin = time.perf_counter()
        try:
            record = seeded(stage, work, place)
        except BudgetError as problem:
            outcome.failure = str(problem)
            _report(folder, outcome)
            return outcome
        except Exception:
            if not outcome.stages:  # nothing to go on from
                shutil.rmtree(folder / _STATE)
                with contextlib.suppress(OSError):  # something else is there now
                    for each in missing:
                        each.rmdir()
            raise
        outcome.stages[name] = plain(record | {"seconds": time.perf_counter() - begin})
        kept = folder / _STATE / f"{name}.fxp"
        save(work.now, kept)
        # as a run that goes on has it: graphs that were read have other names of nodes
        work.traced = _loaded(kept, recipe)
        _write(folder / _STATE / "state.json", outcome.to_dict())
        if place:
            (folder / _STATE / f"{planned[place - 1][0]}.fxp").unlink(missing_ok=True)
    _report(folder, outcome)
    shutil.rmtree(folder / _STATE)
    return outcome


def _loaded(path: Path, recipe: Recipe) -> TracedModule:
    """A module as a stage left it."""
    traced = load(path)
    if are_vectors(traced, recipe.choose.compact_masks):
        hold_as_vectors(traced)
    return traced


def versions() -> dict[str, str]:
    """Of everything that a result depends on."""
    libraries = {name: metadata.version(name) for name in ("torch", "onnx", "onnxscript", "onnxruntime")}
    return {"fxprune": __version__, **libraries, "python": platform.python_version(), "machine": platform.machine()}


def _prepare(folder: Path, recipe: Recipe, overwrite: bool) -> None:
    """Make the folder, with nothing of another recipe in it."""
    if folder.exists() and not folder.is_dir():
        raise ArgumentError(f"'{folder}' was to be the folder for the files; it is a file. Name another.")
    try:
        present = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    except OSError as error:
        raise ArgumentError(f"'{folder}' was to be the folder for the files; it cannot be read: {error}") from error
    if _STATE in present and not (folder / _STATE / "state.json").exists():
        present.remove(_STATE)  # of a run that was killed before its first stage was finished
    if present and _recipe_of(folder / _STATE / "state.json") != recipe:
        foreign = [name for name in present if name not in (*FILES, _STATE)]
        if foreign or not overwrite:
            cure = "Name another folder" + ("." if foreign else ", or ask to overwrite it.")
            raise ArgumentError(f"'{folder}' is not empty: {', '.join(present[:6])}. {cure}")
        for name in present:
            path = folder / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    try:
        (folder / _STATE).mkdir(parents=True, exist_ok=True)
        with atomic(folder / _STATE / "writable"):
            pass
    except (OSError, FxpruneError) as error:
        raise ArgumentError(f"'{folder}' was to be the folder for the files; it cannot be written: {error}") from error


def _recipe_of(path: Path) -> Recipe | None:
    """The recipe whose stages a folder keeps, None where there are none, or other versions made them."""
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        return parsed(state["recipe"]) if state["versions"] == versions() else None
    except (OSError, ValueError, LookupError, TypeError, ArgumentError):
        return None


def _so_far(folder: Path, recipe: Recipe) -> Outcome:
    """What is finished of a recipe."""
    path = folder / _STATE / "state.json"
    kept: dict[str, Record] = {}
    if _recipe_of(path) == recipe:
        kept = json.loads(path.read_text(encoding="utf-8"))["stages"]
    return Outcome(recipe.model_dump(), versions(), kept)


def _report(folder: Path, outcome: Outcome) -> None:
    _write(folder / "report.json", outcome.to_dict())
    with atomic(folder / "report.html") as temporary:
        temporary.write_text(page(outcome), encoding="utf-8")


def _write(path: Path, value: dict[str, Any]) -> None:
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2), encoding="utf-8")
