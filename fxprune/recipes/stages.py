"""The stages of a recipe: each takes what the last one left, and returns a record of what it did in JSON's types."""

from __future__ import annotations

import copy
import shutil
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import safetensors.torch
import torch

from fxprune import driver, export, prune
from fxprune.artifacts.writing_back import write_back
from fxprune.checkpoints.checkpoint import save
from fxprune.errors import ConfigurationWarning, FxpruneError
from fxprune.files import atomic
from fxprune.graph.names import parameter_count
from fxprune.graph.sharing_copies import sharing_copy
from fxprune.graph.traced import TracedModule
from fxprune.prune.repair import reconstruct
from fxprune.prune.sensitivity import Sensitivity, sensitivity
from fxprune.recipes import sources
from fxprune.recipes.agreement import agreement
from fxprune.recipes.budgets import losses_of_budgets
from fxprune.recipes.network import network
from fxprune.recipes.work import Work

Record = dict[str, Any]
Stage = Callable[[Work], Record]
FILES = ("model.fxp", "model.onnx", "model.safetensors", "pretrained", "report.json", "report.html")


def traced(work: Work) -> Record:
    """Capture the model as graphs."""
    modes = ("train", "eval") if work.recipe.train else ("eval",)
    work.traced = work.capture(modes)
    parameters = parameter_count(work.model)
    told = {"class": type(work.model).__name__, "modes": sorted(work.now.graphs), "parameters": parameters}
    return told | {"network": network(work.now)}


def reparametrized(work: Work) -> Record:
    """Put norms on weights."""
    for norm in work.recipe.reparametrize:
        getattr(driver, norm.kind)(work.now, norm.names)
    return {"norms": [norm.model_dump() for norm in work.recipe.reparametrize]}


def chosen(work: Work) -> Record:
    """Mask the channels that the budget does without."""
    choose, record = work.recipe.choose, Record()
    names: dict[str, Any] = {"targets": choose.targets or None, "ignore": choose.ignore, "kinds": choose.kinds or None}
    options: dict[str, Any] = names | {
        "round_to": choose.round_to,
        "max_per_group": choose.max_per_group,
        "runnable": work.model if choose.runnable else None,
        "seed": work.recipe.seed,
    }
    importance: Any = choose.importance
    if importance == "obs":
        # the curves are wanted too, which a choice by the name alone does not return
        found = work.samples
        importance = sensitivity(work.now, found.batches, distance=choose.distance, weight=found.weight, **names)
        record["sensitivity"] = importance.to_dict()
    elif work.recipe.data is not None:
        options["loader"] = work.samples.batches
    dense = sharing_copy(work.now) if isinstance(importance, Sensitivity) else None
    masks = {"compact_masks": choose.compact_masks}
    report = prune.channels(work.now, importance=importance, **options, **masks, **choose.budgets)
    if dense is not None:
        record["budgets"] = losses_of_budgets(dense, importance, report, options)
    return record | {"channels": report.to_dict()}


def repaired(work: Work) -> Record:
    """Refit what is left to do the work of what went."""
    found = work.samples
    report = reconstruct(work.now, found.batches, weight=found.weight, new_biases=work.recipe.repair.new_biases)
    return {"repair": report.to_dict()}


def trained(work: Work) -> Record:
    """Have the user's function train the masked module."""
    assert work.recipe.train is not None
    name = work.recipe.train.function
    sources.function(name, "training")(work.now.train())
    work.now.eval()
    return {"function": name}


def finalized(work: Work) -> Record:
    """Take the masked channels out."""
    final = driver.finalize(work.now, fold_batch_norm=work.recipe.finalize.fold_batch_norm)
    work.traced = final
    return {"plan": final.plan.to_dict() if final.plan is not None else {}}


def exported(work: Work) -> Record:
    """Write the files, each whole or not at all."""
    recipe, record = work.recipe.export, Record()
    save(work.now, work.folder / "model.fxp")
    if recipe.onnx:
        report = export.to_onnx(
            work.now,
            work.folder / "model.onnx",
            precision=recipe.precision,
            opset=recipe.opset,
            calibration=work.samples.batches if recipe.precision == "int8" else None,
        )
        record["onnx"] = report.to_dict() | {"path": "model.onnx"}
    if recipe.own_class and not isinstance(work.model, TracedModule):
        record["own_class"] = _own_class(work)
    return record


def _own_class(work: Work) -> Record:
    """Write the shrunk model of the user's class, or say why there is none."""
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always", ConfigurationWarning)
            small = write_back(work.now, work.model)
    except FxpruneError as problem:
        return {"written": False, "why": str(problem)}
    told = [str(each.message) for each in said if issubclass(each.category, ConfigurationWarning)]
    pretrained = getattr(small, "save_pretrained", None)
    if pretrained is not None and not told:
        shutil.rmtree(work.folder / "pretrained", ignore_errors=True)  # of a run that was killed here
        with atomic(work.folder / "pretrained") as path:
            pretrained(path)
        return {"written": True, "files": ["pretrained"]}
    with atomic(work.folder / "model.safetensors") as path:
        safetensors.torch.save_model(small, str(path))
        path.chmod(0o644)  # it is written for its owner alone
    return {"written": True, "files": ["model.safetensors"], "warnings": told}


def compared(work: Work) -> Record:
    """Compare with the dense network: size, MACs, outputs, the user's score, latency."""
    recipe, final, record = work.recipe.compare, work.now, Record()
    record["parameters"] = [parameter_count(each) for each in (work.model, final)]
    if work.judged is not None:
        outputs = (work.outputs(module, work.judged) for module in (work.model, final))
        record["agreement"] = agreement(*outputs)
        record["judged"] = {"samples": work.judged.count, "calibration": recipe.data is None}
    if recipe.score is not None:
        score = sources.function(recipe.score, "a score")
        record["score"] = [float(score(copy.deepcopy(module))) for module in (work.model, final)]
    if recipe.latency and work.recipe.export.onnx:
        record |= _latency(work)
    return record


def _latency(work: Work) -> Record:
    """Size, latency, and time by operator of the dense and of the pruned ONNX file."""
    pruned, dense = work.folder / "model.onnx", work.folder / ".stages" / "dense.onnx"
    export.to_onnx(driver.finalize(work.capture(), shrink=False), dense, verify=False, opset=work.recipe.export.opset)
    rounds = work.recipe.compare.rounds
    return {
        "bytes": [path.stat().st_size for path in (dense, pruned)],
        "latency": [each.to_dict() for each in export.bench([dense, pruned], rounds=rounds)],
        "operators": [export.profile(path, rounds=rounds).to_dict() for path in (dense, pruned)],
    }


def stages(work: Work) -> Iterator[tuple[str, Stage]]:
    """The stages of a recipe by name, in order."""
    recipe = work.recipe
    yield "trace", traced
    if recipe.reparametrize:
        yield "reparametrize", reparametrized
    yield "choose", chosen
    if recipe.repair.enabled:
        yield "repair", repaired
    if recipe.train is not None:
        yield "train", trained
    yield "finalize", finalized
    yield "export", exported
    yield "compare", compared


def seeded(stage: Stage, work: Work, place: int) -> Record:
    """What a stage gives, with random numbers that depend on the recipe and the stage's place alone."""
    with torch.random.fork_rng():
        torch.manual_seed(work.recipe.seed + place)
        return stage(work)
