"""Finding the integers of the user's modules by trying: each module's results are compared with those in the graph."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn

from fxprune.artifacts.attribute_reads import Reads
from fxprune.artifacts.effort import Effort
from fxprune.artifacts.rehearsal import Rehearsal
from fxprune.artifacts.repeated_calls import RepeatedCall
from fxprune.artifacts.slots import Slot, candidates, combinations, derived, slots_by_module
from fxprune.artifacts.working_copy import WorkingCopy
from fxprune.artifacts.zero_channels import Channels, ZeroChannels, ways_to_fill_up
from fxprune.channels.registry import REGISTRY
from fxprune.errors import WriteBackError
from fxprune.graph.equality import close
from fxprune.graph.kept_tensors import forget_kept_tensors
from fxprune.graph.metadata import module_calls, module_path
from fxprune.graph.names import tensors_of

_SPLITS = ("aten.split_with_sizes.default", "aten.chunk.default", "aten.split.Tensor")
_SIZED = ("aten.split_with_sizes.default", "aten.split.Tensor", "aten.view.default", "aten.reshape.default")
_TRIES = 100  # of values for the integers of one module
_LIKELY = 16  # of them, for each way to take channels back, before the rest is tried
_CALLS = 10_000  # of modules altogether: those that contain each other try for each other
Shapes = tuple[torch.Size, ...]
Setting = list[tuple[Slot, int]]


class Search:
    """The integers of a copy's modules, and the search for the values with which it computes what the graph does."""

    def __init__(self, copy: WorkingCopy, rehearsal: Rehearsal, reads: Reads, usual_work: float) -> None:
        """`reads`: the attributes that forward reads. `usual_work`: of the model as it is, as `Effort.largest`."""
        self.copy, self.rehearsal, self.zeros = copy, rehearsal, ZeroChannels(copy)
        self.slots = slots_by_module(copy.root)
        self.calls_left = _CALLS
        self.disagreeing: nn.Module | None = None
        self.filling_up: set[nn.Module] = set()
        self._reads, self._usual_work = reads, usual_work
        self._sized = [node for node in rehearsal.graph.nodes if str(node.target) in _SIZED]
        self._values: Mapping[nn.Module, list[Tensor]] = {}

    def run(self) -> None:
        """Run the copy; each module settles its integers when it is called.

        `disagreeing` is afterwards the first module that runs, but with no result that is in the graph.

        Raises:
            WriteBackError: the copy runs with no values.
        """
        modules = [module for module in self.copy.root.modules() if self.choices(module)]
        try:
            self._run(modules)
        except WriteBackError:
            if not self.run_wider():
                raise

    def begin_again(self) -> None:
        """Undo what was found."""
        self.zeros.give_up()
        self.filling_up.clear()
        self.calls_left = _CALLS

    def run_wider(self) -> bool:
        """Run the copy again, modules on trial too that cut tensors into parts; False where there are none of them.

        Raises:
            WriteBackError: as `run`.
        """
        modules = [m for m in self.copy.root.modules() if self.choices(m) or self._takes_parts(m)]
        if all(self.choices(module) for module in modules):
            return False
        self.zeros.give_up()
        self._run(modules)
        return True

    def is_smaller(self) -> bool:
        """Whether any tensor of the copy is smaller than in the model."""
        now, before = tensors_of(self.copy.root), self.copy.shapes
        return any(now[name].numel() < math.prod(shape) for name, shape in before.items() if name in now)

    def _run(self, modules: list[nn.Module]) -> None:
        """Run the copy, these modules on trial."""
        self.disagreeing = None
        self._values = self._graph_values(modules)
        trials = {module: Trial(self, module) for module in modules}
        with _stand_ins(trials), by_its_parts(), Effort(self._usual_work):
            self.rehearsal.run_copy(self.rehearsal.inputs)

    def _takes_parts(self, module: nn.Module) -> bool:
        """Whether a module cuts tensors into parts, which may have to be equal, as by `chunk`."""
        paths = self.copy.paths(module)
        return any(str(node.target) in _SPLITS and module_path(node) in paths for node in self.rehearsal.graph.nodes)

    def choices(self, module: nn.Module) -> list[tuple[Slot, list[int]]]:
        """The integers that forward reads and that could follow from a size, with the values to try."""
        changes, read = self.copy.changes(module), self._read(module)
        said = self._written(module)
        found = [(slot, candidates(slot.before, changes, said)) for slot in self._free(module) if slot in read]
        return [(slot, values) for slot, values in found if len(values) > 1]

    def _written(self, module: nn.Module) -> set[int]:
        """The sizes that calls of a module itself have among their arguments in the graph."""
        paths = self.copy.paths(module)
        calls = [node for node in self._sized if module_path(node) in paths]
        return {size for node in calls for size in pytree.tree_leaves(node.args[1]) if type(size) is int}

    def unread_choices(self, module: nn.Module) -> list[tuple[Slot, list[int]]]:
        """The integers that forward does not read and that could follow from a size, with the values to try."""
        changes, read, said = self.copy.changes(module), self._read(module), self._written(module)
        found = [(slot, candidates(slot.before, changes, said)) for slot in self._free(module) if slot not in read]
        return [(slot, values) for slot, values in found if len(values) > 1]

    def settings(self, module: nn.Module) -> Iterator[Setting]:
        """What the integers of a module could be with the sizes that its tensors have, the likeliest first."""
        choices = self.choices(module)
        for values in itertools.islice(combinations([values for _, values in choices]), _TRIES):
            chosen = {slot: value for (slot, _), value in zip(choices, values, strict=True)}
            yield [(slot, chosen.get(slot, slot.before)) for slot in self._free(module)]

    def ways_to_fill_up(self, module: nn.Module) -> Iterator[Channels]:
        """The channels that a module could take back as zeros."""
        head_sizes = [slot.before for slot in self.slots[module] if slot.before > 1]
        path, chosen = self.copy.paths(module)[0], self.copy.plan.chosen
        zeros, in_parts = self.zeros, self._takes_parts(module)
        yield from ways_to_fill_up(
            path, zeros.kept, self.copy.shapes, head_sizes, zeros.numbers, chosen, in_parts=in_parts
        )

    def not_in_graph(self, module: nn.Module, outputs: Any, given: Sequence[Tensor]) -> int:
        """How many of a module's results are no value that it has in the graph, nor one that it was given.

        A result that nothing reads is not in the graph.
        """
        return not_among(outputs, [*self._values[module], *given], self.rehearsal.tolerance)

    def derive(self) -> None:
        """Set the integers that forward does not read, where the others leave one value."""
        for module in self.copy.root.modules():
            changes, read = self.copy.nearest_changes(module), self._read(module)
            for slot in self._free(module):
                if slot not in read and slot.names_a_size():
                    slot.write(derived(slot, changes, read))

    def _free(self, module: nn.Module) -> list[Slot]:
        """The integers of a module that do not follow from its own parameters, as those of torch's layers do."""
        known = REGISTRY.module_sizes(module)
        return [slot for slot in self.slots[module] if slot.name not in known]

    def _read(self, module: nn.Module) -> list[Slot]:
        """The integers that forward reads; of objects that the module holds it may read any."""
        return [slot for slot in self.slots[module] if slot.holder is not module or (module, slot.name) in self._reads]

    def _graph_values(self, modules: list[nn.Module]) -> Mapping[nn.Module, list[Tensor]]:
        """By module, what the graph computes inside of it and uses outside."""
        by_path = {path: module for module in modules for path in self.copy.paths(module)}
        values: dict[nn.Module, list[Tensor]] = {module: [] for module in modules}

        def watch(node: fx.Node, value: Any) -> None:
            if not isinstance(value, Tensor):
                return
            for path in _paths(node) & by_path.keys():
                if any(path not in _paths(user) for user in node.users):
                    values[by_path[path]].append(value.clone())  # what runs later may write into it

        self.rehearsal.run_graph(self.rehearsal.inputs, watch)
        return values


class Trial:
    """Stands in for the forward of one module and settles its integers at the first call.

    Values are tried, and channels taken back as zeros, until the results are among those in the graph; where they never
    are, the first values stay with which forward ran. What contains the module may try again: with the sizes that were
    settled, forward is called as it is, and sizes that failed before fail at once.
    """

    def __init__(self, search: Search, module: nn.Module) -> None:
        self._search, self._module, self._forward = search, module, module.forward
        self._settled: Shapes | None = None
        self._failures: dict[Shapes, Exception] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call forward, with the integers settled for the present sizes."""
        if self._settled == self._shapes():
            return self._forward(*args, **kwargs)
        call = RepeatedCall(self._forward, args, kwargs)
        situation = (*call.shapes, *self._shapes())
        if situation in self._failures:
            raise self._failures[situation]
        return self._settle(call, situation)

    def _settle(self, call: RepeatedCall, situation: Shapes) -> Any:
        """The outputs with the first setting that agrees with the graph, else with that which comes nearest to it."""
        search, zeros, module = self._search, self._search.zeros, self._module
        first_failure: Exception | None = None
        nearest: tuple[int, Channels, Setting] | None = None
        for channels, first, last in self._turns():
            with zeros.taken_back(channels) as filled:
                for setting in itertools.islice(search.settings(module), first, last):
                    if search.calls_left < 0 and first_failure is not None:
                        break
                    search.calls_left -= 1
                    _write(setting)
                    forget_kept_tensors(module)
                    with zeros.taken_back({}) as filled_inside:
                        try:
                            outputs = call()
                        except Exception as failure:  # a size that does not fit makes the user's code raise anything
                            if isinstance(failure, MemoryError | torch.OutOfMemoryError):
                                raise
                            first_failure = first_failure or failure
                            continue
                        foreign = search.not_in_graph(module, outputs, call.given)
                        if not foreign:
                            filled.keep()
                            filled_inside.keep()
                            self._note(channels)
                            self._settled = self._shapes()
                            return outputs
                        if nearest is None or foreign < nearest[0]:
                            nearest = foreign, channels, setting
        if nearest is None:
            assert first_failure is not None
            self._failures[situation] = first_failure
            raise first_failure
        return self._settle_for(call, *nearest[1:])

    def _turns(self) -> Iterator[tuple[Channels, int, int]]:
        """Channels to take back, with the first and last of the settings to try then.

        None at first with all settings; then every way with the likely ones, before any with the others.
        """
        yield {}, 0, _TRIES
        ways = list(self._search.ways_to_fill_up(self._module))
        for first, last in ((0, _LIKELY), (_LIKELY, _TRIES)):
            yield from ((channels, first, last) for channels in ways)

    def _settle_for(self, call: RepeatedCall, channels: Channels, setting: Setting) -> Any:
        """The outputs with a setting that runs, though it does not agree with the graph."""
        with self._search.zeros.taken_back(channels) as filled:
            filled.keep()
            self._note(channels)
            _write(setting)
            forget_kept_tensors(self._module)
            self._settled = self._shapes()
            self._search.disagreeing = self._search.disagreeing or self._module
            return call()

    def _note(self, channels: Channels) -> None:
        """Note whether the module took channels back."""
        if channels:
            self._search.filling_up.add(self._module)

    def _shapes(self) -> Shapes:
        return tuple(tensor.shape for tensor in tensors_of(self._module).values())


def _write(setting: Setting) -> None:
    for slot, value in setting:
        slot.write(value)


@contextlib.contextmanager
def by_its_parts() -> Iterator[None]:
    """Have layers of torch call those within them, which they leave out where they have a fused path."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextlib.contextmanager
def _stand_ins(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Call these in place of the modules' own forward inside the block."""
    before = {module: vars(module).get("forward") for module in forwards}
    for module, forward in forwards.items():
        vars(module)["forward"] = forward
    try:
        yield
    finally:
        for module, own in before.items():
            if own is None:
                del vars(module)["forward"]
            else:
                vars(module)["forward"] = own


def not_among(outputs: Any, values: Sequence[Tensor], tolerance: float | None) -> int:
    """How many floating-point tensors of the outputs are not among the values, to rounding.

    Channels of zeros in the last axis, which a class may need, are not counted.
    """
    tensors = [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    return sum(not any(_agree(value, tensor, tolerance) for value in values) for tensor in tensors)


def _agree(value: Tensor, output: Tensor, tolerance: float | None) -> bool:
    if output.shape == value.shape:
        return close(value, output, tolerance)
    if not (output.dim() == value.dim() > 1 and output.shape[-1] > value.shape[-1]):
        return False
    narrow_value, narrow_output = _without_zeros(value), _without_zeros(output)
    return narrow_value.shape == narrow_output.shape and close(narrow_value, narrow_output, tolerance)


def _without_zeros(tensor: Tensor) -> Tensor:
    return tensor[..., tensor.reshape(-1, tensor.shape[-1]).any(0)]


def _paths(node: fx.Node) -> set[str]:
    """The modules that a node was captured in."""
    return {str(path) for path, _ in module_calls(node).values()}
