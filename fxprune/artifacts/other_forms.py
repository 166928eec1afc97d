"""Methods that compute what forward does in another form, such as `forward_split`: integers that only they read."""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch.utils._pytree as pytree
from torch import Tensor, nn

from fxprune.artifacts.slots import combinations
from fxprune.artifacts.trial import Search
from fxprune.graph.equality import close

_TRIES = 100  # of values for the integers of one module


@dataclass(frozen=True)
class OtherForm:
    """A method that gives what forward gives."""

    module: nn.Module
    method: str

    def agrees(self, args: tuple[Any, ...], kwargs: dict[str, Any], wanted: list[Tensor]) -> bool:
        """Whether it gives these results for these arguments."""
        try:
            found = _tensors(getattr(self.module, self.method)(*copy.deepcopy(args), **copy.deepcopy(kwargs)))
        except Exception:  # a size that does not fit makes the user's code raise anything
            return False
        return [t.shape for t in found] == [t.shape for t in wanted] and all(map(close, wanted, found))


def other_forms(root: nn.Module, run: Callable[[], Any]) -> list[OtherForm]:
    """The methods called forward_... that give in one run of a model what forward gives.

    Args:
        root: the model as it is. run: runs it.
    """
    forms = [
        OtherForm(module, name)
        for module in root.modules()
        for name in dict.fromkeys(itertools.chain.from_iterable(map(vars, type(module).__mro__)))
        if name.startswith("forward_") and callable(getattr(module, name))
    ]
    found: list[OtherForm] = []

    def check(form: OtherForm, args: Any, kwargs: Any, wanted: list[Tensor]) -> None:
        if form.agrees(args, kwargs, wanted):
            found.append(form)

    _watch_calls(forms, run, check)
    return list(dict.fromkeys(found))


def follow_other_forms(search: Search, forms: list[OtherForm], run: Callable[[], Any]) -> None:
    """Give integers that forward does not read values with which other forms of it give what it gives.

    Args:
        search: that found the others. forms: of the copy, before sizes changed. run: runs the copy.
    """

    def settle(form: OtherForm, args: Any, kwargs: Any, wanted: list[Tensor]) -> None:
        if form.agrees(args, kwargs, wanted):
            return
        choices = search.unread_choices(form.module)
        before = [slot.read() for slot, _ in choices]
        for values in itertools.islice(combinations([values for _, values in choices]), _TRIES):
            for (slot, _), value in zip(choices, values, strict=True):
                slot.write(value)
            if form.agrees(args, kwargs, wanted):
                return
        for (slot, _), value in zip(choices, before, strict=True):
            slot.write(value)

    _watch_calls(forms, run, settle)


def _watch_calls(
    forms: list[OtherForm], run: Callable[[], Any], found: Callable[[OtherForm, Any, Any, list[Tensor]], None]
) -> None:
    """Run a model; `found` is called with a form, and the arguments and results of its module, at the first call."""
    if not forms:
        return
    waiting = list(forms)

    def after(module: nn.Module, args: Any, kwargs: Any, outputs: Any) -> None:
        for form in [form for form in waiting if form.module is module]:
            waiting.remove(form)
            found(form, args, kwargs, _tensors(outputs))

    with _hooks({form.module for form in forms}, after):
        run()


@contextlib.contextmanager
def _hooks(modules: set[nn.Module], after: Callable[..., None]) -> Iterator[None]:
    handles = [module.register_forward_hook(after, with_kwargs=True) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _tensors(outputs: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor)]
