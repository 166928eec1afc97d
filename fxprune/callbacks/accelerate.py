"""Pruning in a loop of Accelerate."""

from __future__ import annotations

from typing import Any

from fxprune.callbacks.ending import Finished
from fxprune.callbacks.libraries import library
from fxprune.callbacks.loop import Pruning
from fxprune.errors import ArgumentTypeError
from fxprune.prune.schedule import Schedule

_accelerate = library("accelerate", extra="accelerate")


class AcceleratedPruning(Pruning):
    """`Pruning` in a loop of `accelerate.Accelerator`.

    `step()` belongs after `optimizer.step()`, and counts where the optimizer made one: batches whose gradients are
    accumulated do not. `save_state` and `load_state` of the accelerator take this object along. Figures go to its
    trackers.

    Args:
        accelerator: that prepares the module and the optimizer.
        schedule: made for the traced module.
        **options: of `fxprune.callbacks.Pruning`: finalize, folder, onnx, compare, name.

    Raises:
        ArgumentError, ArgumentTypeError: as `Pruning`, or it is no accelerator.

    Example:
        >>> accelerator = accelerate.Accelerator(gradient_accumulation_steps=2)
        >>> model, optimizer, batches = accelerator.prepare(traced, optimizer, batches)
        >>> pruning = AcceleratedPruning(accelerator, schedule)
        >>> for inputs, labels in batches:
        ...     with accelerator.accumulate(model):
        ...         accelerator.backward(loss(model(inputs), labels))
        ...         optimizer.step()
        ...         pruning.step()
        ...         optimizer.zero_grad()
        >>> pruning.finish()
    """

    def __init__(self, accelerator: Any, schedule: Schedule, **options: Any) -> None:
        if not isinstance(accelerator, _accelerate.Accelerator):
            raise ArgumentTypeError(
                f"accelerator is a {type(accelerator).__name__}; an accelerate.Accelerator is needed."
            )
        super().__init__(schedule, **options)
        self.accelerator = accelerator
        accelerator.register_for_checkpointing(self)

    def step(self) -> float:
        """Prune after a step of the optimizer, where it made one, and log; returns what is gone."""
        if not self.accelerator.sync_gradients or self.accelerator.optimizer_step_was_skipped:
            return self.schedule.reached
        reached = super().step()
        self._log()
        return reached

    def finish(self, *, write: bool = True) -> Finished | None:
        """As `Pruning.finish`; the main process writes."""
        finished = super().finish(write=write and self.accelerator.is_main_process)
        self._log()
        return finished

    def _log(self) -> None:
        if self.accelerator.trackers:
            self.accelerator.log(self.metrics(), step=self.schedule.state_dict()["calls"])
