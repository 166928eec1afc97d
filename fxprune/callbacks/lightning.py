"""Pruning as a callback of Lightning."""

from __future__ import annotations

from typing import Any

from fxprune.callbacks.libraries import check_holds, library
from fxprune.callbacks.loop import Pruning
from fxprune.prune.schedule import Schedule

_Callback = library("lightning.pytorch", "pytorch_lightning", extra="lightning").Callback


class FxpruneCallback(_Callback):  # type: ignore[misc, valid-type]
    """Prunes while `lightning.Trainer` fits, and makes the small module at the end.

    The schedule advances with the trainer's steps: once for each step of the optimizer, after it, so a batch whose
    gradients are accumulated does not count. Figures are logged by `log_dict`, to all loggers of the trainer, and can
    be monitored by other callbacks. The trainer's checkpoints have the masks and the schedule: `fit(ckpt_path=...)`
    goes on to the same bits as without a stop, as far as the data do.

    Args:
        schedule: made for a traced module that the LightningModule holds, `fxprune.Schedule(module.net, ...)`.
        **options: of `fxprune.callbacks.Pruning`: finalize, folder, onnx, compare, name.

    Attributes:
        pruning: the schedule in this loop; `pruning.finished.final` is the small module.

    Raises:
        ArgumentError, ArgumentTypeError: as `Pruning`; when `fit` begins, of a schedule for another module.

    Example:
        >>> schedule = fxprune.Schedule(module.net, None, request, 0.5, stop=100, every=10)
        >>> callback = FxpruneCallback(schedule, folder="out")
        >>> lightning.Trainer(callbacks=[callback]).fit(module, loader)
        >>> final = callback.pruning.finished.final
    """

    def __init__(self, schedule: Schedule, **options: Any) -> None:
        super().__init__()
        self.pruning = Pruning(schedule, **options)
        self._steps = 0

    @property
    def state_key(self) -> str:
        """What checkpoints store the state under."""
        return f"{type(self).__qualname__}[{self.pruning.name}]"

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Raise where the schedule is for another module."""
        if stage == "fit":
            check_holds(pl_module, self.pruning.traced, "the LightningModule")

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Count from the step that the trainer begins with."""
        self._steps = trainer.global_step

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *batch: Any) -> None:
        """Prune after a step of the optimizer, and log."""
        if trainer.global_step == self._steps:
            return
        self._steps = trainer.global_step
        self.pruning.step()
        pl_module.log_dict(self.pruning.metrics(), on_step=True, on_epoch=False)

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Make the small module, when the last checkpoint is written, and log what is left."""
        if self.pruning.finish(write=trainer.is_global_zero) is None:
            return
        for logger in trainer.loggers:
            logger.log_metrics(self.pruning.metrics(), step=trainer.global_step)
            logger.save()

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps beside the module's state."""
        return self.pruning.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up what a checkpoint has; the trainer has loaded the module's state before."""
        self.pruning.load_state_dict(state_dict)
