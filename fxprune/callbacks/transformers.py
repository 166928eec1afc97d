"""Pruning as a callback of the Trainer of transformers."""

from __future__ import annotations

import warnings
from typing import Any, Self

from fxprune.callbacks.libraries import check_holds, library
from fxprune.callbacks.loop import Pruning
from fxprune.callbacks.states import states_that_share_nothing
from fxprune.errors import FxpruneWarning
from fxprune.prune.schedule import Schedule

_TrainerCallback = library("transformers", extra="transformers").TrainerCallback


class FxpruneCallback(_TrainerCallback):  # type: ignore[misc, valid-type]
    """Prunes while `transformers.Trainer` trains a traced module, or one that holds it; the small module at the end.

    The schedule advances once for each step of the optimizer, so a batch whose gradients are accumulated does not
    count. Figures join what the trainer logs: its history, and its reports. The trainer's checkpoints have the masks
    and the schedule: `train(resume_from_checkpoint=...)` goes on to the same bits as without a stop. With
    `load_best_model_at_end` the small module is that of the best weights and their masks.

    Args:
        schedule: made for the traced module.
        **options: of `fxprune.callbacks.Pruning`: finalize, folder, onnx, compare, name.

    Attributes:
        pruning: the schedule in this loop; `pruning.finished.final` is the small module.

    Raises:
        ArgumentError, ArgumentTypeError: as `Pruning`; when training begins, of a schedule for another module.

    Warns:
        FxpruneWarning: when training begins: reports are made before this callback is asked (use `attach`), or the
            checkpoint has no state of it.

    Example:
        >>> traced = fxprune.trace(model, kwargs=batch)
        >>> trainer = transformers.Trainer(traced, arguments, train_dataset=dataset)
        >>> callback = FxpruneCallback(fxprune.Schedule(traced, None, request, 0.5, stop=100, every=10)).attach(trainer)
        >>> trainer.train()
        >>> final = callback.pruning.finished.final
    """

    def __init__(self, schedule: Schedule, **options: Any) -> None:
        super().__init__()
        self.pruning = Pruning(schedule, **options)
        self._is_first = False
        states_that_share_nothing(self.pruning.traced)

    def attach(self, trainer: Any) -> Self:
        """Join a trainer in front of its other callbacks, so that its reports (TensorBoard, MLflow) have the figures.

        Returns:
            This callback.
        """
        trainer.callback_handler.callbacks.insert(0, self)
        self._is_first = True
        return self

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Take up what the checkpoint has, whose weights the trainer has loaded before."""
        check_holds(model, self.pruning.traced, "the Trainer's model")
        if args.report_to and not self._is_first:
            warnings.warn(
                f"reports to {', '.join(args.report_to)} are made before the callback is asked, without its figures: "
                "leave it out of callbacks=[...], and call callback.attach(trainer).",
                FxpruneWarning,
                stacklevel=2,
            )
        kept = state.stateful_callbacks.get(self.pruning.name)
        if kept is not None:
            self.pruning.load_state_dict(kept)
        elif state.global_step:
            warnings.warn(
                f"the checkpoint of step {state.global_step} has no state of {self.pruning.name!r}: it was written "
                "without this callback. The schedule begins with its first call.",
                FxpruneWarning,
                stacklevel=2,
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Prune after a step of the optimizer; a checkpoint that follows has the state."""
        self.pruning.step()
        state.stateful_callbacks[self.pruning.name] = self.pruning.state_dict()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Add the figures to what is logged."""
        if logs is None or not state.log_history:
            return
        logs.update(self.pruning.metrics())
        state.log_history[-1].update(self.pruning.metrics())

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Make the small module."""
        self.pruning.finish(write=state.is_world_process_zero)
