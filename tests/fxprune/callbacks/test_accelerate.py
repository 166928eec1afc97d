"""A loop of Accelerate with pruning: accumulation, precision, its own states, its trackers."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fxprune.errors import ArgumentTypeError
from tests.training_runs import (
    assert_same_state,
    channel_schedule,
    examples,
    tensorboard_tags,
    traced_network,
)

# what a library warns of is its own
pytestmark = pytest.mark.filterwarnings("ignore")

images, labels = examples()


@pytest.fixture
def accelerate(_torchvision_operators: object) -> Iterator[Any]:
    """The package, as in a process of its own: an accelerator's options hold for all that come after it."""
    found = pytest.importorskip("accelerate")
    found.state.AcceleratorState._reset_state(reset_partial_state=True)
    yield found
    found.state.AcceleratorState._reset_state(reset_partial_state=True)


class Run:
    """A loop over the same batches, each twice in an epoch of eight."""

    def __init__(self, accelerate: Any, stop: int, **options: Any) -> None:
        from fxprune.callbacks.accelerate import AcceleratedPruning

        ending = options.pop("ending", {"finalize": False})
        self.accelerator = accelerate.Accelerator(cpu=True, **options)
        self.traced = traced_network()
        optimizer = torch.optim.AdamW(self.traced.parameters(), lr=1e-2)
        batches = DataLoader(TensorDataset(images, labels), batch_size=8)
        self.model, self.optimizer, self.batches = self.accelerator.prepare(self.traced, optimizer, batches)
        self.pruning = AcceleratedPruning(self.accelerator, channel_schedule(self.traced, stop), **ending)

    def epochs(self, count: int) -> Run:
        for _ in range(count):
            for inputs, wanted in self.batches:
                with self.accelerator.accumulate(self.model):
                    found = self.model.train()(inputs)
                    self.accelerator.backward(nn.functional.cross_entropy(found, wanted))
                    self.optimizer.step()
                    self.pruning.step()
                    self.optimizer.zero_grad()
        return self


@pytest.mark.parametrize(
    "options",
    [{}, {"mixed_precision": "bf16"}, {"gradient_accumulation_steps": 2}],
    ids=["plain", "bf16", "accumulated"],
)
def test_four_epochs_are_two_and_two_more_after_a_state(
    accelerate: Any, tmp_path: Path, options: dict[str, Any]
) -> None:
    stop = 6 if "gradient_accumulation_steps" in options else 12
    whole = Run(accelerate, stop, **options).epochs(4)
    Run(accelerate, stop, **options).epochs(2).accelerator.save_state(str(tmp_path / "half"))
    again = Run(accelerate, stop, **options)
    again.accelerator.load_state(str(tmp_path / "half"))
    again.epochs(2)
    assert_same_state(again.traced, whole.traced)
    assert again.pruning.state_dict() == whole.pruning.state_dict()
    assert whole.pruning.schedule.done
    assert whole.pruning.schedule.state_dict()["calls"] == 16 // options.get("gradient_accumulation_steps", 1)
    found = whole.model.eval()(images)
    wanted = copy.deepcopy(whole.traced)
    with torch.autocast("cpu", torch.bfloat16, enabled="mixed_precision" in options):
        assert torch.equal(found, wanted(images).float())  # of the graph of eval mode, with the masks of now


def test_the_end_is_judged_by_the_module_itself_not_by_its_forward_of_mixed_precision(
    accelerate: Any, tmp_path: Path
) -> None:
    ending = {"folder": tmp_path / "out", "onnx": True, "compare": True}
    run = Run(accelerate, 6, mixed_precision="bf16", ending=ending).epochs(4)
    finished = run.pruning.finish()
    assert finished is not None
    assert finished.comparison is not None
    assert finished.comparison.ok
    wanted = copy.deepcopy(run.traced).eval()(images)
    assert torch.allclose(finished.final(images), wanted, atol=1e-5)
    unwrapped = run.accelerator.unwrap_model(run.model, keep_fp32_wrapper=False)
    assert torch.equal(unwrapped.eval()(images), wanted)


def test_trackers_have_the_figures(accelerate: Any, tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX")
    run = Run(accelerate, 6, log_with="tensorboard", project_dir=str(tmp_path), ending={})
    run.accelerator.init_trackers("run")
    run.epochs(2)
    run.pruning.finish()
    run.accelerator.end_training()
    assert {"fxprune/macs", "fxprune/target", "fxprune/density"} <= tensorboard_tags(tmp_path)


def test_what_is_no_accelerator_is_refused(accelerate: Any) -> None:
    from fxprune.callbacks.accelerate import AcceleratedPruning

    with pytest.raises(ArgumentTypeError, match=r"accelerate.Accelerator is needed"):
        AcceleratedPruning("cpu", channel_schedule(traced_network()))
