"""The same training with pruning in loops of libraries, in one process and under DDP in several."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, SequentialSampler, TensorDataset

import fxprune
from benchmarks.command import declare_torchvision
from fxprune.callbacks import Pruning
from tests.sharded_networks import by_fsdp, values
from tests.training_runs import channel_schedule, examples

EPOCHS, BATCH = 3, 8
images, labels = examples()
Found = dict[str, dict[str, Tensor]]


class Network(nn.Module):
    """Without batch norms, whose statistics of a part of a batch are others."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.first, self.second = nn.Conv2d(1, 16, 3), nn.Conv2d(16, 16, 3)
        self.head = nn.Linear(16, 4)

    def forward(self, pixels: Tensor) -> Tensor:
        hidden = self.second(self.first(pixels).relu()).relu()
        found: Tensor = self.head(hidden.mean((2, 3)))
        return found


class WithLoss(nn.Module):
    """As models of transformers: called with names, gives the loss first."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Network()

    def forward(self, pixels: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.net(pixels)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


class _Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
    def __len__(self) -> int:
        return len(images)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"pixels": images[i], "labels": labels[i]}


def _own_batch() -> int:
    """How many samples of a batch this process has; launched as by torchrun where there are several."""
    declare_torchvision()
    count, rank = dist.get_world_size(), dist.get_rank()
    if count > 1:
        given = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "GROUP_RANK": 0}
        os.environ |= {name: str(value) for name, value in given.items()}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500", "TORCHELASTIC_RUN_ID": "tests"}
    return BATCH // count


def _found(traced: fxprune.TracedModule, pruning: Any) -> Found:
    finished = pruning.finished
    inputs = (images,) if isinstance(traced.example_args, tuple) and traced.example_args else ()
    kwargs = {} if inputs else {"pixels": images, "labels": labels}
    output = finished.final(*inputs, **kwargs)
    return {
        "state": values(traced),
        "final": values(finished.final),
        "output": {"": (output["logits"] if isinstance(output, dict) else output).detach()},
        "figures": {"macs": torch.tensor(finished.shares["macs"]), "files": torch.tensor(len(finished.files))},
        "steps": {"": torch.tensor(pruning.schedule.state_dict()["calls"])},
    }


def by_lightning(folder: str) -> Found:
    """The Trainer of Lightning."""
    own = _own_batch()
    import lightning.pytorch as lightning

    from fxprune.callbacks.lightning import FxpruneCallback

    class Classifier(lightning.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.net = fxprune.trace(Network(), images[:4]).train()

        def training_step(self, batch: Any, index: int) -> Any:
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
            fxprune.clip_gradients(optimizer, max_norm=0.5)
            return optimizer

    module = Classifier()
    callback = FxpruneCallback(channel_schedule(module.net, 10), folder=Path(folder), onnx=True)
    several = {"strategy": "ddp", "devices": dist.get_world_size()} if dist.get_world_size() > 1 else {}
    trainer = lightning.Trainer(
        max_epochs=EPOCHS, accelerator="cpu", default_root_dir=folder, callbacks=[callback], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, **several,
    )  # fmt: skip
    data = TensorDataset(images, labels)
    sampler: Any = DistributedSampler(data, shuffle=False) if several else None  # Lightning's own shuffles
    trainer.fit(module, DataLoader(data, batch_size=own, sampler=sampler))
    return _found(module.net, callback.pruning)


def by_trainer(folder: str) -> Found:
    """The Trainer of transformers, with its own clipping."""
    own = _own_batch()
    import transformers

    from fxprune.callbacks.transformers import FxpruneCallback

    class InOrder(transformers.Trainer):  # type: ignore[misc]
        def _get_train_sampler(self, *given: Any) -> Any:
            return SequentialSampler(self.train_dataset)

    traced = fxprune.trace(WithLoss(), kwargs={"pixels": images[:4], "labels": labels[:4]}).train()
    arguments = transformers.TrainingArguments(
        folder, use_cpu=True, num_train_epochs=EPOCHS, per_device_train_batch_size=own, learning_rate=0.1,
        lr_scheduler_type="constant", optim="sgd", max_grad_norm=0.5, report_to="none", save_strategy="no",
        disable_tqdm=True,
    )  # fmt: skip
    trainer = InOrder(traced, arguments, train_dataset=_Rows())
    callback = FxpruneCallback(channel_schedule(traced, 10), folder=Path(folder), onnx=True).attach(trainer)
    trainer.train()
    return _found(traced, callback.pruning)


def by_accelerate(folder: str) -> Found:
    """A loop of Accelerate, with its clipping."""
    return _accelerated(folder, shards=False)


def by_accelerate_over_shards(folder: str) -> Found:
    """The same over a module that FSDP2 shards, which Accelerate is not given to prepare."""
    return _accelerated(folder, shards=dist.get_world_size() > 1)


def _accelerated(folder: str, *, shards: bool) -> Found:
    own = _own_batch()
    import accelerate

    from fxprune.callbacks.accelerate import AcceleratedPruning

    accelerator = accelerate.Accelerator(cpu=True)
    traced = fxprune.trace(Network(), images[:4]).train()
    if shards:
        by_fsdp(traced)
    optimizer = torch.optim.SGD(traced.parameters(), lr=0.1, momentum=0.9)
    batches = DataLoader(TensorDataset(images, labels), batch_size=own)
    optimizer, batches = accelerator.prepare(optimizer, batches)
    model = traced if shards else accelerator.prepare(traced)
    pruning = AcceleratedPruning(accelerator, channel_schedule(traced, 10), folder=Path(folder), onnx=True)
    for _ in range(EPOCHS):
        for inputs, wanted in batches:
            optimizer.zero_grad()
            accelerator.backward(nn.functional.cross_entropy(model(inputs), wanted))
            accelerator.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            pruning.step()
    pruning.finish()
    return _found(traced, pruning)


def by_shards(folder: str) -> Found:
    """A loop of one's own over a module that FSDP2 shards."""
    own, rank = _own_batch(), dist.get_rank()
    traced = fxprune.trace(Network(), images[:4]).train()
    if dist.get_world_size() > 1:
        by_fsdp(traced)
    optimizer = torch.optim.SGD(traced.parameters(), lr=0.1, momentum=0.9)
    fxprune.clip_gradients(optimizer, max_norm=0.5)
    pruning = Pruning(channel_schedule(traced, 10), folder=Path(folder), onnx=True)
    for _ in range(EPOCHS):
        for inputs, wanted in zip(images.split(BATCH), labels.split(BATCH), strict=True):
            optimizer.zero_grad()
            found = traced(inputs.split(own)[rank])
            nn.functional.cross_entropy(found, wanted.split(own)[rank]).backward()
            optimizer.step()
            pruning.step()
    pruning.finish()
    return _found(traced, pruning)
