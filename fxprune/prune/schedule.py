"""Pruning that grows over the steps of a training loop."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterable, Mapping
from numbers import Integral, Real
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch.nn.utils.prune import BasePruningMethod

from fxprune import driver
from fxprune.calling import named_arguments
from fxprune.communication import together
from fxprune.errors import ArgumentError, ArgumentTypeError, ArtifactError, PruningError
from fxprune.graph.masks import ParameterView, view
from fxprune.graph.requirements import require_traced
from fxprune.graph.spread_modules import reference_of
from fxprune.graph.traced import TracedModule
from fxprune.graph.values import unmasked
from fxprune.prune.channel_report import ChannelReport
from fxprune.prune.mirror import computed, constructed, find_all, find_computed, global_unstructured, is_pruned
from fxprune.reports import Readable, columns, counted
from fxprune.sharding import by_parts, count

__all__ = ["CURVES", "Schedule"]

# progress from `start` (0) to `stop` (1), initial and final amount -> amount
CURVES: Mapping[str, Callable[[float, float, float], float]] = MappingProxyType(
    {
        "one-shot": lambda progress, initial, final: final,
        "linear": lambda progress, initial, final: final + (initial - final) * (1 - progress),
        "cubic": lambda progress, initial, final: final + (initial - final) * (1 - progress) ** 3,
        "exponential": lambda progress, initial, final: 1 - (1 - initial) * ((1 - final) / (1 - initial)) ** progress,
    }
)


class _Plan(NamedTuple):
    amount: float
    curve: str
    start: int
    stop: int
    every: int
    initial: float

    def at(self, call: int) -> float:
        """The fraction asked for as of a call."""
        if call < self.start:
            return 0.0
        if call >= self.stop:  # the given number, which a formula would round
            return self.amount
        progress = (call - self.start) // self.every * self.every / (self.stop - self.start)
        return CURVES[self.curve](progress, self.initial, self.amount)


def _checked(amount: Any, curve: Any, start: Any, stop: Any, every: Any, initial: Any) -> _Plan:
    for name, value in (("amount", amount), ("initial", initial)):
        if isinstance(value, Integral) or not isinstance(value, Real):
            raise ArgumentTypeError(f"{name}={value!r}: a float is needed, the fraction of entries that is masked.")
    if not 0 <= initial <= amount <= 1:
        raise ArgumentError(f"amount={amount}, initial={initial}: 0 <= initial <= amount <= 1 is needed.")
    if not isinstance(curve, str) or curve not in CURVES:
        raise ArgumentError(f"curve={curve!r}: one of {', '.join(CURVES)} is needed.")
    if curve == "exponential" and amount == 1:
        raise ArgumentError("an exponential curve never reaches amount=1.0. Use a lower amount or another curve.")
    if not all(isinstance(c, Integral) for c in (start, stop, every)) or not 0 <= start <= stop or every < 1:
        raise ArgumentError(
            f"start={start!r}, stop={stop!r}, every={every!r}: integers are needed, 0 <= start <= stop, every >= 1."
        )
    return _Plan(float(amount), curve, int(start), int(stop), int(every), float(initial))


class Schedule(Readable):
    """Prunes parameters step by step until a fraction of their entries is masked; the training loop calls `step()`.

    Call number `start` (the first call is number 0) brings the masked fraction to `initial`, call number `stop` to
    `amount`, and between them every `every`-th call follows the curve:

    - "one-shot": everything at `start`;
    - "linear";
    - "cubic": fast first, slow towards the end; Zhu and Gupta, "To prune, or not to prune" (2017),
      https://arxiv.org/abs/1710.01878;
    - "exponential": each time the same fraction of what is left, as in iterative magnitude pruning; Frankle and
      Carbin, "The Lottery Ticket Hypothesis" (2019), https://arxiv.org/abs/1803.03635.

    Amounts are fractions of all entries, masked or not. torch's methods count survivors; what they are asked for at a
    call is worked out from how many entries are masked by then, so roundings do not add up, and nothing happens where
    more is masked already than the curve asks for. A masked entry never comes back: momentum and weight decay move
    values under the mask, selections go among the others, and a request that unmasks an entry is refused.

    Args:
        traced: the module that is pruned.
        names: qualified names or patterns of the parameters over which the fraction is taken; None leaves it to the
            function what the amounts are fractions of.
        request: a subclass of `BasePruningMethod` whose constructor takes `amount`, or a function `(fraction)`, called
            with the fraction of the surviving entries that is to go, which prunes by itself; with names=None, called
            with what the curve asks for, as in `lambda gone: fxprune.prune.channels(traced, macs=1 - gone)`.
        amount: fraction of entries masked at the end, a float from 0.0 to 1.0.
        curve: a key of `CURVES`.
        start, stop: numbers of the first and the last call that prunes; `stop` defaults to `start`: one call prunes.
        every: calls from one pruning to the next, at least 1.
        initial: fraction masked at `start`, at most `amount`.
        scope: for a class, "local": each parameter by itself; "global": one selection over all of them.
        **kwargs: further arguments of the class, such as `n` and `dim`.

    Raises:
        ArgumentError, ArgumentTypeError, NameLookupError: an argument that cannot be used.

    Example:
        >>> method = torch.nn.utils.prune.L1Unstructured
        >>> schedule = fxprune.Schedule(traced, "*.weight", method, 0.9, start=100, stop=1000, every=10)
        >>> schedule.step()
        0.0
    """

    @named_arguments
    def __init__(
        self,
        traced: TracedModule,
        names: str | Iterable[str] | None,
        request: type[BasePruningMethod] | Callable[[float], object],
        amount: float,
        *,
        curve: str = "cubic",
        start: int = 0,
        stop: int | None = None,
        every: int = 1,
        initial: float = 0.0,
        scope: str = "local",
        **kwargs: Any,
    ) -> None:
        require_traced(traced)
        if callable(names):
            raise ArgumentTypeError(
                f"names is {_called(names)}: the names come first, None for a function that needs none, then the "
                "method or the function: fxprune.Schedule(traced, names, request, amount)."
            )
        self.traced, self.request, self.scope, self.kwargs = traced, request, scope, kwargs
        self._whole, self.names = names is None, find_all(traced, "*" if names is None else names)
        self._class = request if isinstance(request, type) and issubclass(request, BasePruningMethod) else None
        if scope not in ("local", "global"):
            raise ArgumentError(f'scope={scope!r}: "local" or "global" is needed.')
        if not self._class:
            _check_function(request)
        if self._class and self._whole:
            raise ArgumentError(
                f"names=None is for functions; {self._class.__name__} needs names, such as '*.weight', or in its place "
                "a function: lambda gone: fxprune.prune.channels(traced, macs=1 - gone)."
            )
        if self._class and scope == "global" and getattr(request, "PRUNING_TYPE", None) != "unstructured":
            raise ArgumentTypeError(f"{self._class.__name__} is not unstructured; a global selection needs that.")
        if not self._class and (kwargs or scope != "local"):
            raise ArgumentError(f"scope={scope!r} and {kwargs} are for a method class; the function decides by itself.")
        self._plan = _checked(amount, curve, start, start if stop is None else stop, every, initial)
        if stop is None:
            _check_single(self._plan)
        self._calls, self._is_stepped = 0, False
        self._reports: list[ChannelReport] = []
        if self._class:
            # a parameter that the class cannot prune shows now, and draws no random numbers
            with torch.random.fork_rng(devices=[]), together(reference_of(traced), self._spelled(amount)):
                computed(traced, dict.fromkeys(self.names, self._with(0.0)))
        traced.expect_use(weakref.WeakMethod(self.unused))

    @property
    def amount(self) -> float:
        """The fraction that the curve asks for as of the last call of `step`, 0.0 before the first."""
        return self._plan.at(self._calls - 1)

    @property
    def reports(self) -> list[ChannelReport]:
        """What `fxprune.prune.channels` returned, by the calls that pruned with it."""
        return list(self._reports)

    @property
    def reached(self) -> float:
        """What is gone now: with reports, of what they are a budget of (MACs, parameters, units), as the last one says.

        Else the fraction of the entries that is masked; tied parameters with one mask count once.
        """
        if self._reports:
            return self._reports[-1].gone
        views = (view(self.traced, name) for name in self.names)
        counts = {found.identity: _counts(self.traced, found) for found in views}
        dense, zeros = map(sum, zip(*counts.values(), strict=True))
        return zeros / dense if dense else 0.0

    @property
    def done(self) -> bool:
        """Whether call number `stop` has been made: no later call prunes."""
        return self._calls > self._plan.stop

    @named_arguments
    def step(self) -> float:
        """Prune as far as the curve asks for at this call; returns `reached`.

        Raises:
            PruningError: the request failed, or would unmask an entry. Masks and the count of calls are as before.
        """
        plan, call = self._plan, self._calls
        self._is_stepped = True
        if plan.start <= call <= plan.stop and ((call - plan.start) % plan.every == 0 or call == plan.stop):
            self._prune(plan.at(call))
        self._calls += 1
        return self.reached

    def _prune(self, total: float) -> None:
        # a function may mask what norms compute, whose names "*" does not stand for
        watched = dict.fromkeys([*self.names, *(find_computed(self.traced) if self._whole else ())])
        before = {name: view(self.traced, name) for name in watched}
        decided, decided_by = self.traced.decided, self.traced.decided_by
        try:
            with together(reference_of(self.traced), self._spelled(total)):
                report = self._asked(total, before)
        except BaseException:
            pruned = [found for name, found in before.items() if is_pruned(self.traced, name)]
            driver.insert_masks(self.traced, {found.name: _mask_or_ones(self.traced, found) for found in pruned})
            self.traced.decide(decided, decided_by)
            raise
        if isinstance(report, ChannelReport):
            self._reports.append(report)

    def _spelled(self, amount: float) -> str:
        """A call as text, which is to be the same in all processes that prune one module."""
        asked = ", ".join(self.names) if self._class is None else f"{self._class.__name__} of {', '.join(self.names)}"
        return f"Schedule, {self.scope} amount={amount}: {asked}"

    def _asked(self, total: float, before: Mapping[str, ParameterView]) -> object:
        """Let the request prune to so many masked entries; returns what a function returned."""
        report = self._request(total, {name: _counts(self.traced, before[name]) for name in self.names})
        if not isinstance(report, ChannelReport):  # which chooses anew where weights have not changed
            for name, found in before.items():
                _refuse_revival(name, found.mask, view(self.traced, name).mask)
        elif report.gone and not is_pruned(self.traced):
            raise PruningError(
                "the function pruned another module than that of the schedule, of which nothing is masked. Let it "
                "prune the module that the schedule was given, not a copy of it or one that was traced again."
            )
        return report

    def _request(self, total: float, counts: Mapping[str, tuple[int, int]]) -> object:
        """Ask for so many masked entries, given by name how many entries there are and how many are masked.

        Returns what a function returned.
        """
        if self._class and self.scope == "local":
            fractions = {name: _increment(total, *found) for name, found in counts.items()}
            methods = {name: self._with(fraction) for name, fraction in fractions.items() if fraction}
            driver.insert_masks(self.traced, computed(self.traced, methods))
            return None
        dense, zeros = map(sum, zip(*counts.values(), strict=True))
        fraction = _increment(total, dense, zeros)
        if self._class and fraction:
            global_unstructured(self.traced, self.names, self._class, amount=fraction, **self.kwargs)
        elif self._whole:
            return self.request(total)  # type: ignore[call-arg]
        elif fraction:
            return self.request(fraction)  # type: ignore[call-arg]
        return None

    def _with(self, fraction: float) -> BasePruningMethod:
        assert self._class
        return constructed(self._class, amount=fraction, **self.kwargs)

    def unused(self) -> str:
        """What `finalize` warns of: that no call of `step` was made, or that nothing came of them; else nothing."""
        if self._is_stepped and self._class is None and self.amount and not is_pruned(self.traced):
            return (
                f"a schedule asked its function for {self.amount:g}, and nothing of the module is masked: the function "
                "prunes nothing, or another module."
            )
        if self._is_stepped:
            return ""
        return (
            f"a schedule to {self._plan.amount:g} was made for the module, and its step() was never called, so nothing "
            "is masked by it. Call it after each step of the optimizer."
        )

    def __str__(self) -> str:
        plan, ends = self._plan, "done" if self.done else f"ends with call {self._plan.stop}"
        where = f"after {counted(self._calls, 'call')}: {self.amount:.3f} asked for, {self.reached:.3f} reached"
        return f"{plan.curve} to {plan.amount:g}, {where}; {ends}"

    def table(self) -> str:
        """The sums, then a line for each report: what is gone of the budget's own unit, and what is left."""
        rows = [("report", "budget", "gone", "MACs", "parameters")]
        for i, report in enumerate(self._reports):
            macs, parameters = report.macs[1], report.parameters[1]
            rows.append((str(i), report.budget, f"{report.gone:.3f}", f"{macs:,}", f"{parameters:,}"))
        return f"{self}\n\n{columns(rows)}" if self._reports else str(self)

    def to_dict(self) -> dict[str, Any]:
        """The options and the count of calls, what is asked for, reached and done, and the reports."""
        return self.state_dict() | {"asked_for": self.amount, "reached": self.reached, "done": self.done}

    def state_dict(self) -> dict[str, Any]:
        """The count of calls, the curve's options and the reports, in JSON's types; masks are the module's state."""
        reports = [report.to_dict() for report in self._reports]
        return {"calls": self._calls, **self._plan._asdict(), "reports": reports}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the count of calls, the curve and the reports where `state_dict` left them.

        Raises:
            ArtifactError: `state` is no state of a schedule; this one is as before.
        """
        try:
            calls, options = state["calls"], {n: value for n, value in state.items() if n not in ("calls", "reports")}
            plan = _checked(**options)
            reports = [ChannelReport.from_dict(report) for report in state.get("reports", ())]
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            raise ArtifactError(
                f"no state of a schedule, which holds {', '.join(self.state_dict())}: {error}"
            ) from error
        if not isinstance(calls, int) or calls < 0:
            raise ArtifactError(f"the state of a schedule has calls={calls!r}; a count is needed.")
        self._calls, self._plan, self._reports, self._is_stepped = calls, plan, reports, calls > 0


def _check_single(plan: _Plan) -> None:
    """Raise ArgumentError where a schedule of one call has options for several."""
    options = {"every": (plan.every, 1), "initial": (plan.initial, 0.0)}
    given = [f"{name}={value}" for name, (value, default) in options.items() if value != default]
    given += [f"curve={plan.curve!r}"] if plan.curve in ("linear", "exponential") else []
    if given:
        raise ArgumentError(
            f"{', '.join(given)} without stop: all would be masked at once, by call {plan.start}. Give stop, the "
            "number of the last call that prunes."
        )


def _check_function(request: object) -> None:
    """Raise ArgumentTypeError unless the request, which is no method class, is a function of one number."""
    needed = "a subclass of BasePruningMethod or a function is needed."
    if isinstance(request, BasePruningMethod):
        name = type(request).__name__
        raise ArgumentTypeError(
            f"request is an object of {name}, whose amount is fixed; {needed} Give the class, {name}, and its other "
            "arguments by name: the schedule makes an object at each step."
        )
    if not callable(request) or isinstance(request, type):
        short = repr(request) if len(repr(request)) < 80 else f"a {type(request).__name__}"
        raise ArgumentTypeError(
            f"request={short}: {needed} A function is given, not called: lambda gone: "
            "fxprune.prune.channels(traced, macs=1 - gone)."
        )
    try:
        signature = inspect.signature(request)
    except (TypeError, ValueError):  # of what is not written in Python
        return
    first = next(iter(signature.parameters), None)
    try:
        signature.bind(0.5)
    except TypeError:
        fits = False
    else:
        fits = first not in ("traced", "module", "model")
    if not fits:
        raise ArgumentTypeError(
            f"request is {_called(request)}, called with ({_arguments(signature)}); a function of the fraction alone "
            "is needed, such as lambda gone: fxprune.prune.channels(traced, macs=1 - gone), or a class such as "
            "torch.nn.utils.prune.L1Unstructured."
        )


def _arguments(signature: inspect.Signature) -> str:
    names = list(signature.parameters)
    return ", ".join(names[:3] + ["..."] * (len(names) > 3))


def _called(function: object) -> str:
    return str(getattr(function, "__name__", type(function).__name__))


def _refuse_revival(name: str, before: torch.Tensor | None, after: torch.Tensor | None) -> None:
    if before is None or after is None:
        return
    revival = by_parts(lambda new, old: (new != 0) & (old == 0), after, before)
    if revived := count(revival, lambda here: here):
        raise PruningError(
            f"the request would unmask {revived} entries of {name!r}. A method multiplies by its default_mask."
        )


def _counts(traced: TracedModule, found: ParameterView) -> tuple[int, int]:
    """How many entries a parameter has, and how many of them are masked."""
    if found.mask is None:
        return unmasked(traced, found).numel(), 0
    size = found.mask.numel()
    return size, count(found.mask, lambda mask: mask == 0)


def _mask_or_ones(traced: TracedModule, found: ParameterView) -> torch.Tensor:
    return torch.ones_like(unmasked(traced, found)) if found.mask is None else found.mask


def _increment(total: float, dense: int, masked: int) -> float:
    """The fraction of the survivors that brings the masked entries to `total` of the dense count."""
    wanted = round(total * dense)
    return (wanted - masked) / (dense - masked) if wanted > masked else 0.0
