"""The Trainer of transformers with the callback: checkpoints, precision, reports, and the small module at the end."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxprune
from fxprune.errors import ArgumentError, FxpruneWarning
from tests.training_runs import assert_same_state, channel_schedule, examples, tensorboard_tags

pytest.importorskip("accelerate")
# what a library warns of is its own
pytestmark = pytest.mark.filterwarnings("ignore")

images, labels = examples()


@pytest.fixture
def callback_class(transformers: Any) -> Any:
    from fxprune.callbacks.transformers import FxpruneCallback

    return FxpruneCallback


class Classifier(nn.Module):
    """As the library's models: called with names, gives the loss first."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(7)
        first = nn.Conv2d(1, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU()
        second = nn.Conv2d(16, 16, 3), nn.BatchNorm2d(16), nn.ReLU()
        self.layers = nn.Sequential(*first, *second, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4))

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.layers(pixel_values)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


class Rows(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """What the Trainer takes, with a column that no model has."""

    def __len__(self) -> int:
        return len(images)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {"pixel_values": images[i], "labels": labels[i], "number": torch.tensor(i)}


def traced_classifier() -> fxprune.TracedModule:
    return fxprune.trace(Classifier(), kwargs={"pixel_values": images[:4], "labels": labels[:4]}).train()


def trainer_of(transformers: Any, traced: nn.Module, folder: Path, callbacks: Any, **options: Any) -> Any:
    settings = {
        "output_dir": str(folder), "use_cpu": True, "num_train_epochs": 4, "per_device_train_batch_size": 8,
        "learning_rate": 1e-2, "report_to": "none", "save_strategy": "no", "logging_steps": 1, "disable_tqdm": True,
        "seed": 5,
    }  # fmt: skip
    arguments = transformers.TrainingArguments(**(settings | options))
    return transformers.Trainer(traced, arguments, train_dataset=Rows(), eval_dataset=Rows(), callbacks=callbacks)


def prepared(
    transformers: Any, callback_class: Any, folder: Path, stop: int = 12, **options: Any
) -> tuple[Any, Any, Any]:
    traced = traced_classifier()
    callback = callback_class(channel_schedule(traced, stop), finalize=options.pop("finalize", False))
    return traced, callback, trainer_of(transformers, traced, folder, [callback], **options)


@pytest.mark.parametrize(
    "options",
    [{}, {"bf16": True}, {"gradient_accumulation_steps": 2}, {"restore_callback_states_from_checkpoint": True}],
    ids=["plain", "bf16", "accumulated", "callbacks restored"],
)
def test_four_epochs_are_two_and_two_more_after_a_checkpoint(
    transformers: Any, callback_class: Any, tmp_path: Path, options: dict[str, Any]
) -> None:
    """Shuffled, with the scheduler of the learning rate that the Trainer makes, and its AdamW in two groups."""
    stop = 6 if "gradient_accumulation_steps" in options else 12
    whole, told, trainer = prepared(
        transformers, callback_class, tmp_path / "whole", stop, save_strategy="epoch", **options
    )
    trainer.train()
    steps = trainer.state.global_step
    assert steps == 16 // options.get("gradient_accumulation_steps", 1)
    kept = tmp_path / "whole" / f"checkpoint-{steps // 2}"
    again, retold, trainer = prepared(transformers, callback_class, tmp_path / "again", stop, **options)
    trainer.train(resume_from_checkpoint=str(kept))
    assert_same_state(again, whole)
    assert retold.pruning.state_dict() == told.pruning.state_dict()
    assert told.pruning.schedule.done
    assert ("forward" in vars(whole)) is ("bf16" in options)  # accelerate's, of mixed precision
    assert told.pruning.schedule.state_dict()["calls"] == steps
    batch = {"pixel_values": images, "labels": labels}
    assert torch.equal(again.eval()(**batch)["logits"], whole.eval()(**batch)["logits"])
    masked = copy.deepcopy(whole).eval()(**batch)["logits"]
    assert torch.allclose(whole(**batch)["logits"], masked, atol=0.1)  # not the graph that was there at the start


def test_the_end_makes_the_small_module_and_the_file_of_save_model_loads(
    transformers: Any, callback_class: Any, tmp_path: Path
) -> None:
    traced, callback, trainer = prepared(transformers, callback_class, tmp_path, finalize=True)
    trainer.train()
    batch = {"pixel_values": images, "labels": labels}
    wanted = copy.deepcopy(traced).eval()(**batch)
    assert torch.allclose(callback.pruning.finished.final(**batch)["logits"], wanted["logits"], atol=1e-5)
    assert 0.4 < callback.pruning.finished.shares["macs"] <= 0.5
    trainer.save_model(str(tmp_path / "saved"))
    import safetensors.torch

    again = fxprune.callbacks.masks_from_states(traced_classifier())
    again.load_state_dict(safetensors.torch.load_file(tmp_path / "saved" / "model.safetensors"))
    assert_same_state(again, traced)


def test_history_has_the_figures_and_evaluation_uses_the_masked_eval_graph(
    transformers: Any, callback_class: Any, tmp_path: Path
) -> None:
    traced, callback, trainer = prepared(transformers, callback_class, tmp_path, eval_strategy="epoch")
    trainer.train()
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(history) == 16
    shares = [entry["fxprune/macs"] for entry in history if "fxprune/macs" in entry]
    assert shares == sorted(shares, reverse=True)
    assert 1 - shares[-1] == callback.pruning.schedule.reached
    assert {"fxprune/target", "fxprune/reached", "fxprune/density", "fxprune/parameters"} <= history[-1].keys()
    json.dumps(trainer.state.log_history)
    wanted = copy.deepcopy(traced).eval()(pixel_values=images, labels=labels)["loss"]
    evaluated = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert evaluated[-1] == pytest.approx(float(wanted), abs=1e-5)


@pytest.mark.parametrize("is_attached", [True, False])
def test_reports_have_the_figures_of_a_callback_that_is_attached(
    transformers: Any, callback_class: Any, tmp_path: Path, is_attached: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorboardX")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    traced = traced_classifier()
    callback = callback_class(channel_schedule(traced), finalize=False)
    given = [] if is_attached else [callback]
    trainer = trainer_of(transformers, traced, tmp_path, given, report_to="tensorboard")
    if is_attached:
        assert callback.attach(trainer) is callback
        trainer.train()
    else:
        with pytest.warns(FxpruneWarning, match=r"reports to tensorboard .* call callback.attach"):
            trainer.train()
    tags = tensorboard_tags(tmp_path)
    assert ("train/fxprune/macs" in tags) is is_attached
    assert "train/loss" in tags


def test_the_best_weights_come_with_their_masks(transformers: Any, callback_class: Any, tmp_path: Path) -> None:
    traced, callback, trainer = prepared(
        transformers, callback_class, tmp_path, save_strategy="epoch", eval_strategy="epoch", finalize=True,
        load_best_model_at_end=True, metric_for_best_model="epoch_of_eval", greater_is_better=False, num_train_epochs=4,
        learning_rate=0.0,
    )  # fmt: skip
    trainer.compute_metrics = None
    evaluate, calls = trainer.evaluate, iter(range(4))
    trainer.evaluate = lambda *args, **kwargs: evaluate(*args, **kwargs) | {"eval_epoch_of_eval": next(calls)}
    with pytest.warns(FxpruneWarning, match="weights of an earlier time were loaded"):
        trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-4")
    assert callback.pruning.finished.shares["macs"] > 0.6
    batch = {"pixel_values": images, "labels": labels}
    wanted = copy.deepcopy(traced).eval()(**batch)["logits"]
    assert torch.allclose(callback.pruning.finished.final(**batch)["logits"], wanted, atol=1e-5)


def test_a_schedule_for_another_module_and_a_checkpoint_without_it_are_told(
    transformers: Any, callback_class: Any, tmp_path: Path
) -> None:
    stranger = callback_class(channel_schedule(traced_classifier()))
    with pytest.raises(ArgumentError, match="Make the schedule for the traced module that it has: itself"):
        trainer_of(transformers, traced_classifier(), tmp_path, [stranger]).train()
    plain = trainer_of(transformers, traced_classifier(), tmp_path, [], save_strategy="epoch", num_train_epochs=1)
    plain.train()
    _, _, trainer = prepared(transformers, callback_class, tmp_path / "again")
    with pytest.warns(FxpruneWarning, match="the checkpoint of step 4 has no state of 'fxprune'"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
