"""The part of a training loop that prunes, whatever the loop: its steps, its state, its figures and its end."""

from __future__ import annotations

import os
import warnings
from typing import Any

from torch import Tensor

from fxprune.callbacks.ending import Ending, Finished, Options
from fxprune.callbacks.states import masks_from_states, order_kept
from fxprune.calling import named_arguments
from fxprune.errors import ArgumentTypeError, ArtifactError, FxpruneWarning
from fxprune.graph.masks import masked_views
from fxprune.graph.names import parameter_count
from fxprune.graph.traced import TracedModule
from fxprune.prune.schedule import Schedule
from fxprune.reports import Readable
from fxprune.sharding import count


class Pruning(Readable):
    """A schedule within a training loop: `step()` after each step of the optimizer, `finish()` at the end.

    Its state and that of the module are all that is needed to go on to the same bits: `state_dict()` is JSON's types,
    and from now on state dicts that are loaded into the module bring their masks (`masks_from_states`). Load the
    module's state first, then this one's. Parameters keep their order when they are masked, by which optimizers number
    them, and trainers add up norms of gradients. The adapters are of this class, or hold one as `pruning`.

    Args:
        schedule: made for the module that is trained.
        finalize: whether `finish` makes the small module; a dictionary has options of `fxprune.finalize`.
        folder: where `finish` writes it, as `model.fxp`; None writes nothing.
        onnx: whether `finish` writes `model.onnx` there, too; a dictionary has options of `fxprune.export.to_onnx`.
        compare: inputs that `finish` compares masked and small module on, and the ONNX file; True: the sample inputs.
        name: that figures start with, and that trainers store the state under; another for a second schedule.

    Attributes:
        finished: what `finish` made last; None before.

    Raises:
        ArgumentError, ArgumentTypeError: an option that cannot be used, or without another that it needs.

    Example:
        >>> pruning = Pruning(fxprune.Schedule(traced, "*.weight", torch.nn.utils.prune.L1Unstructured, 0.9, stop=100))
        >>> for inputs, labels in batches:
        ...     optimizer.zero_grad()
        ...     loss(traced(inputs), labels).backward()
        ...     optimizer.step()
        ...     pruning.step()
        >>> final = pruning.finish().final
    """

    finished: Finished | None

    @named_arguments
    def __init__(
        self,
        schedule: Schedule,
        *,
        finalize: Options = True,
        folder: str | os.PathLike[str] | None = None,
        onnx: Options = False,
        compare: Any = None,
        name: str = "fxprune",
    ) -> None:
        if not isinstance(schedule, Schedule):
            cure = " Make one for it: fxprune.Schedule(traced, ...)." if isinstance(schedule, TracedModule) else ""
            raise ArgumentTypeError(f"schedule is a {type(schedule).__name__}; a fxprune.Schedule is needed.{cure}")
        if not isinstance(name, str) or not name:
            raise ArgumentTypeError(f"name={name!r}: a text is needed.")
        self.schedule, self.name, self.finished = schedule, name, None
        self._ending = Ending.of(finalize, folder, onnx, compare)
        self._masks: list[tuple[Tensor, int]] = []
        self._masked_entries = self._most_masked = 0
        masks_from_states(self.traced)

    @property
    def traced(self) -> TracedModule:
        """The module that is trained and pruned."""
        return self.schedule.traced

    @named_arguments
    def step(self) -> float:
        """After a step of the optimizer: prune as far as the schedule asks for; returns what is gone.

        Raises:
            PruningError: as `Schedule.step`.
        """
        with order_kept(self.traced):
            reached = self.schedule.step()
        self._most_masked = max(self._most_masked, self.masked_entries)
        return reached

    @property
    def masked_entries(self) -> int:
        """How many entries of parameters masks hold at zero."""
        masks = {id(found.mask): found.mask for found in masked_views(self.traced) if found.mask is not None}
        now = [(mask, mask._version) for mask in masks.values()]
        known = len(now) == len(self._masks) and all(
            mask is other and version == before
            for (mask, version), (other, before) in zip(now, self._masks, strict=True)
        )
        if not known:
            self._masked_entries = sum(count(mask, lambda entries: entries == 0) for mask, _ in now)
            self._masks = now
        return self._masked_entries

    def metrics(self) -> dict[str, float]:
        """The figures of now, each under the name and a slash.

        target and reached: the share that the schedule asks to be gone by now, and that is gone, of what it counts.
        density: the share of the entries of all parameters that no mask holds at zero. macs, parameters: the share of
        the dense module's that is left in the small one, of schedules of channels, and of all once `finish` was called.
        """
        entries = parameter_count(self.traced)
        found = {
            "target": self.schedule.amount,
            "reached": self.schedule.reached,
            "density": 1 - self.masked_entries / max(entries, 1),
        }
        if self.finished is not None:
            found |= self.finished.shares
        elif reports := self.schedule.reports:
            sizes = {"macs": reports[-1].macs, "parameters": reports[-1].parameters}
            found |= {name: after / max(before, 1) for name, (before, after) in sizes.items()}
        return {f"{self.name}/{name}": float(value) for name, value in found.items()}

    def state_dict(self) -> dict[str, Any]:
        """All but the module's own state, in JSON's types."""
        decided = [[name, axis] for name, axis in sorted(self.traced.decided)]
        return {"schedule": self.schedule.state_dict(), "decided": decided, "masked": self.masked_entries}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was asked for; the module's own state is loaded before.

        Raises:
            ArtifactError: it is no such state, or the module has fewer masked entries than it had; nothing changed.
        """
        try:
            schedule, masked = state["schedule"], int(state["masked"])
            decided = [(str(name), int(axis)) for name, axis in state["decided"]]
        except (LookupError, TypeError, ValueError) as error:
            raise ArtifactError(
                f"no state of a pruning, which holds {', '.join(self.state_dict())}: {error}"
            ) from error
        if self.masked_entries < masked:
            raise ArtifactError(
                f"the state of a pruning is of a module with {masked:,} masked entries; there are "
                f"{self.masked_entries:,}. Load the state dict of the module that was saved with it first."
            )
        self.schedule.load_state_dict(schedule)
        self.traced.decide(decided, self.traced.decided_by)
        self._most_masked = masked

    @named_arguments
    def finish(self, *, write: bool = True) -> Finished | None:
        """Make the small module of the masked one, which stays as it is, and the files that were asked for.

        Args:
            write: whether this process writes files and compares.

        Returns:
            What was made, in `finished` too; None with `finalize=False`.

        Raises:
            FxpruneError: as `fxprune.finalize`, `save`, `export.to_onnx` and `compare`.

        Warns:
            FxpruneWarning: the schedule is not done, or masks are missing that were there.
        """
        if not self.schedule.done:
            warnings.warn(f"training ended before the schedule: {self.schedule}.", FxpruneWarning, stacklevel=3)
        if self.masked_entries < self._most_masked:
            warnings.warn(
                f"{self._most_masked:,} entries were masked, and {self.masked_entries:,} are: weights of an earlier "
                "time were loaded, as trainers do that take the best. What is left is larger than the schedule says.",
                FxpruneWarning,
                stacklevel=3,
            )
        self.finished = self._ending.carried_out(self.traced, write=write)
        return self.finished

    def __str__(self) -> str:
        return str(self.schedule) if self.finished is None else f"{self.schedule}\n{self.finished}"

    def table(self) -> str:
        """That of the schedule, and of what was made at the end."""
        return self.schedule.table() if self.finished is None else f"{self.schedule.table()}\n\n{self.finished.table()}"

    def to_dict(self) -> dict[str, Any]:
        """The schedule, the figures of now, and what was made at the end, in JSON's types."""
        finished = None if self.finished is None else self.finished.to_dict()
        return {"schedule": self.schedule.to_dict(), "metrics": self.metrics(), "finished": finished}
