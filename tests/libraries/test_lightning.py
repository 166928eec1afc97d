"""Lightning's own Trainer with the callback: steps, checkpoints, precision, loggers, the small module at the end."""

from __future__ import annotations

import copy
import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fxprune
from fxprune.errors import ArgumentError
from tests.training_runs import assert_same_state, channel_schedule, examples, tensorboard_tags, traced_network

# what a library warns of is its own
pytestmark = pytest.mark.filterwarnings("ignore")

images, labels = examples()


@pytest.fixture
def lightning(_torchvision_operators: object) -> Any:
    """Lightning's package for PyTorch."""
    return pytest.importorskip("lightning.pytorch")


@pytest.fixture
def callback_class(lightning: Any) -> Any:
    from fxprune.callbacks.lightning import FxpruneCallback

    return FxpruneCallback


def classifier(lightning: Any) -> Any:
    """A LightningModule that holds the traced network, and makes its optimizer by itself."""

    class Classifier(lightning.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.net = traced_network()
            self.outputs: list[torch.dtype] = []

        def training_step(self, batch: Any, index: int) -> Any:
            found = self.net(batch[0])
            self.outputs.append(found.dtype)
            return nn.functional.cross_entropy(found.float(), batch[1])

        def validation_step(self, batch: Any, index: int) -> None:
            self.log("right", (self.net(batch[0]).argmax(1) == batch[1]).float().mean())

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.9)]

    return Classifier()


def loader() -> Any:
    return DataLoader(TensorDataset(images, labels), batch_size=8)


def fit(
    lightning: Any, callback_class: Any, folder: Path, epochs: int, resume: Any = None, stop: int = 12, **options: Any
) -> tuple[Any, Any, Any]:
    module = classifier(lightning)
    callback = callback_class(channel_schedule(module.net, stop), finalize=options.pop("finalize", False))
    extra = options.pop("callbacks", [])
    trainer = lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        default_root_dir=folder,
        callbacks=[callback, *extra],
        logger=options.pop("logger", False),
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(module, loader(), loader(), ckpt_path=resume)
    return module, callback, trainer


@pytest.mark.parametrize(
    "options",
    [{}, {"precision": "bf16-mixed"}, {"accumulate_grad_batches": 2}, {"gradient_clip_val": 0.5}],
    ids=["plain", "bf16", "accumulated", "clipped"],
)
def test_four_epochs_are_two_and_two_more_after_a_checkpoint(
    lightning: Any, callback_class: Any, tmp_path: Path, options: dict[str, Any]
) -> None:
    stop = 6 if "accumulate_grad_batches" in options else 12
    whole, told, _ = fit(
        lightning, callback_class, tmp_path / "whole", 4, stop=stop, enable_checkpointing=False, **options
    )
    saving = lightning.callbacks.ModelCheckpoint(tmp_path / "kept", filename="half", every_n_epochs=2)
    half, _, _ = fit(lightning, callback_class, tmp_path, 2, stop=stop, callbacks=[saving], **options)
    again, retold, trainer = fit(
        lightning,
        callback_class,
        tmp_path / "again",
        4,
        tmp_path / "kept" / "half.ckpt",
        stop,
        enable_checkpointing=False,
        **options,
    )
    assert_same_state(again, whole)
    assert not torch.equal(half.net.get_parameter("8.bias"), whole.net.get_parameter("8.bias"))
    assert retold.pruning.state_dict() == told.pruning.state_dict()
    calls = 16 // options.get("accumulate_grad_batches", 1)
    assert told.pruning.schedule.state_dict()["calls"] == calls == trainer.global_step
    assert told.pruning.schedule.done
    assert whole.outputs[-1] is (torch.bfloat16 if "precision" in options else torch.float32)


def test_the_end_makes_the_small_module_and_its_files(lightning: Any, callback_class: Any, tmp_path: Path) -> None:
    ending = {"keep_for_training": True}
    module, callback, trainer = fit(lightning, callback_class, tmp_path, 4, finalize=ending, enable_checkpointing=False)
    finished = callback.pruning.finished
    wanted = copy.deepcopy(module.net).eval()
    assert torch.allclose(finished.final(images), wanted(images), atol=1e-5)
    assert 0.4 < finished.shares["macs"] <= 0.5
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    fresh = classifier(lightning)
    fxprune.callbacks.masks_from_states(fresh.net)
    fresh.load_state_dict(torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"])
    assert_same_state(fresh, module)


def test_loggers_and_other_callbacks_get_the_figures(lightning: Any, callback_class: Any, tmp_path: Path) -> None:
    loggers = [lightning.loggers.CSVLogger(tmp_path, "figures", version=0)]
    best = lightning.callbacks.ModelCheckpoint(tmp_path / "best", monitor="fxprune/macs", filename="least")
    _, callback, trainer = fit(
        lightning, callback_class, tmp_path, 4, logger=loggers, log_every_n_steps=1, callbacks=[best], finalize=True
    )
    with (tmp_path / "figures" / "version_0" / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["fxprune/macs"]]
    assert [float(row["fxprune/target"]) for row in rows][4:6] == [0.0, pytest.approx(0.4375)]
    shares = [round(float(row["fxprune/macs"]), 5) for row in rows]
    assert shares == sorted(shares, reverse=True)
    assert shares[-1] == round(callback.pruning.finished.shares["macs"], 5)
    assert all(1 - float(row["fxprune/macs"]) >= float(row["fxprune/target"]) - 1e-6 for row in rows)
    assert all(0 < float(row["fxprune/density"]) <= 1 for row in rows)
    assert {"fxprune/parameters", "fxprune/reached"} <= trainer.logged_metrics.keys()
    assert (tmp_path / "best" / "least.ckpt").is_file()


def test_tensorboard_has_the_figures(lightning: Any, callback_class: Any, tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX")
    logger = lightning.loggers.TensorBoardLogger(tmp_path, "board", version=0)
    fit(lightning, callback_class, tmp_path, 4, logger=logger, log_every_n_steps=1, enable_checkpointing=False)
    assert {"fxprune/macs", "fxprune/target", "fxprune/density"} <= tensorboard_tags(tmp_path)


def test_a_schedule_for_another_module_is_refused_when_fit_begins(
    lightning: Any, callback_class: Any, tmp_path: Path
) -> None:
    module = classifier(lightning)
    callback = callback_class(channel_schedule(traced_network()))
    trainer = lightning.Trainer(
        max_epochs=1, accelerator="cpu", default_root_dir=tmp_path, callbacks=[callback], logger=False,
        enable_checkpointing=False, enable_progress_bar=False,
    )  # fmt: skip
    with pytest.raises(ArgumentError, match="Make the schedule for the traced module that it has: net"):
        trainer.fit(module, loader())


def test_two_callbacks_prune_two_modules_of_one(lightning: Any, callback_class: Any, tmp_path: Path) -> None:
    module = classifier(lightning)
    module.second = traced_network()
    callbacks = [
        callback_class(channel_schedule(net, 3), finalize=False, name=name)
        for net, name in ((module.net, "first"), (module.second, "second"))
    ]
    trainer = lightning.Trainer(
        max_steps=4, accelerator="cpu", default_root_dir=tmp_path, callbacks=callbacks, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, loader())
    assert all(callback.pruning.schedule.done for callback in callbacks)
    assert {"first/macs", "second/macs"} <= trainer.logged_metrics.keys()
