"""The registry of operators: what the compiler knows about a call, one class an operator or family of operators.

A class is registered for operators by `register`. It parses a call once, into a frozen record whose fields are the
operator's arguments, and answers everything that the compiler asks: how the call relates channel ids and what stays
constant through it (`relate`), what it costs (`costs`, `traffic`), which operands scale and shift channels (`gain`,
`shift`), and what the torch module that owns its parameters keeps of their sizes (`module_sizes`). What removal
changes in the call and which channels it reads are recorded on the walk by `relate`, as data (`Edit`, `Reader`).
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import inspect
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self, TypeAlias, TypeVar

import torch
from torch import fx, nn

from fxprune.calling import named_arguments
from fxprune.channels.arguments import bound
from fxprune.channels.axes import Axis
from fxprune.channels.evaluation import exactly
from fxprune.channels.ids import Vector
from fxprune.channels.ranges import ranged
from fxprune.channels.walk import Result, Walk
from fxprune.errors import AnalysisWarning, ArgumentError, ArgumentTypeError, FxpruneError, FxpruneWarning
from fxprune.graph.text import describe
from fxprune.torch_internals import (
    OpOverload,
    OpOverloadPacket,
    functional_twin,
    overload_of_custom_operator,
    schema_of,
)

# an overload, all overloads of an operator, or a Python function
Operator: TypeAlias = Any


@dataclass(frozen=True, eq=False)
class Cost:
    """Multiply-accumulates at the sizes of `sizes_of`, proportional to how many indices of each axis there are.

    Attributes:
        macs: their number.
        axes: what they are proportional to; None where they are not, as for a cost that was measured.
    """

    macs: float
    axes: tuple[Axis, ...] | None

    @property
    def ids(self) -> list[Vector] | None:
        """The ids of each factor of the axes that carries any."""
        if self.axes is None:
            return None
        return [factor.ids for axis in self.axes for factor in axis if factor.ids is not None]

    def scaled(self, share: float) -> Cost:
        """The cost of a share of the batch."""
        return dataclasses.replace(self, macs=self.macs * share)


@dataclass(frozen=True)
class Traffic:
    """Numbers of elements that a layer writes and reads."""

    output: float
    data: float
    weight: float

    def scaled(self, share: float) -> Traffic:
        """The traffic of a share of the batch: all of the weight is read for it."""
        return Traffic(self.output * share, self.data * share, self.weight)


# the schemas' names of what a call acts on
_ALIASES: Mapping[str, tuple[str, ...]] = {"data": ("self", "input")}


@dataclass(frozen=True, eq=False)
class OperatorCall(abc.ABC):
    """One call of an operator; the fields of a subclass are arguments by the names that the schema gives them.

    A field `data` is the argument "self" or "input"; `aliases` says so of others. A field that a schema does not have
    keeps its default.
    """

    node: fx.Node

    # names of arguments that a field may have in the schemas, first match first
    aliases: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    # the torch modules that call it, which `module_sizes` describes
    modules: ClassVar[tuple[type[nn.Module], ...]] = ()
    # whether the operator acts on every element by itself
    is_pointwise: ClassVar[bool] = False

    @classmethod
    def parse(cls, node: fx.Node) -> Self:
        """The record of a call."""
        given = bound(node)
        return cls(node, **{field: given[name] for field, name in _arguments_of(cls, tuple(given))})

    @classmethod
    def names_of(cls, field: str) -> tuple[str, ...]:
        """The names of arguments that a field stands for, first match first."""
        return cls.aliases.get(field) or _ALIASES.get(field) or (field,)

    @classmethod
    def missing(cls, arguments: Collection[str]) -> list[str]:
        """For each field without default that none of these arguments fills, the names that would."""
        needed = [item for item in dataclasses.fields(cls)[1:] if item.default is dataclasses.MISSING]
        names = [cls.names_of(item.name) for item in needed]
        return [" or ".join(map(repr, each)) for each in names if set(each).isdisjoint(arguments)]

    @abc.abstractmethod
    def relate(self, walk: Walk) -> Result:
        """Relate the ids of operands and result, record readers and edits on the walk; returns the result."""

    def costs(self, env: Mapping[fx.Node, Result]) -> Sequence[Cost]:
        """What the call computes, by torch's formulas; elementwise work does not count."""
        return ()

    @property
    def traffic(self) -> Traffic | None:
        """The elements that the call moves, None where they do not count beside its arithmetic."""
        return None

    @property
    def gain(self) -> fx.Node | None:
        """The operand that scales normalized channels."""
        return None

    @property
    def shift(self) -> fx.Node | None:
        """The operand that is added to the result's channels and multiplies nothing: a bias, a norm's shift."""
        return None

    @classmethod
    def module_sizes(cls, module: nn.Module) -> Mapping[str, Any]:
        """The sizes that one of `modules` keeps as attributes, as its parameters have them."""
        return {}


Rule: TypeAlias = type[OperatorCall]


@functools.cache
def _arguments_of(rule: Rule, names: tuple[str, ...]) -> list[tuple[str, str]]:
    """For each field of a rule the argument that it is, of those with these names."""
    found = []
    for field in dataclasses.fields(rule)[1:]:
        present = [name for name in rule.names_of(field.name) if name in names]
        found += [(field.name, present[0])] if present else []
    return found


_Class = TypeVar("_Class", bound=Rule)


class Registry:
    """Operators and the classes that know them, by the operator objects themselves."""

    def __init__(self) -> None:
        self._rules: dict[Operator, Rule] = {}
        self._named: dict[str, Rule] = {}
        self._models: dict[Operator, Operator] = {}
        self._pointwise: Rule | None = None

    def add(self, operator: Operator, rule: Rule, model: Operator | None = None) -> None:
        """Raises ArgumentError where the operator has a rule; `model` is the operator that it is to be like."""
        if operator in self._rules:
            raise ArgumentError(f"{operator} already has a rule: {self._rules[operator].__name__}.")
        self._rules[operator] = rule
        if model is not None:
            self._models[operator] = self.model(model)

    def add_named(self, name: str, rule: Rule) -> None:
        """The rule of a library's operator, "library.name", which is there once the library is imported."""
        self._named[name] = rule

    def set_pointwise(self, rule: Rule) -> None:
        """The rule of operators that torch tags as pointwise and that have no other."""
        self._pointwise = rule

    def remove(self, operator: Operator) -> None:
        del self._rules[operator]
        self._models.pop(operator, None)

    def model(self, target: Operator) -> Operator:
        """The operator that one was registered to be like; itself where there is none."""
        packet = getattr(target, "overloadpacket", None)
        return self._models.get(target) or self._models.get(packet) or target

    def __iter__(self) -> Iterator[tuple[Operator, Rule]]:
        return iter(self._rules.items())

    def rule(self, target: Operator) -> Rule | None:
        """The rule of an operator: its own, its packet's, its functional twin's, or that of pointwise ones."""
        if target in self._rules:
            return self._rules[target]
        packet = getattr(target, "overloadpacket", None)
        if packet is None:
            return None
        twin = functional_twin(target)
        for operator in (packet, twin, getattr(twin, "overloadpacket", None)):
            if operator is not None and operator in self._rules:
                return self._rules[operator]
        if str(packet) in self._named:
            return self._named[str(packet)]
        if torch.Tag.pointwise in {*target.tags, *getattr(twin, "tags", ())}:
            return self._pointwise
        return None

    def module_sizes(self, module: nn.Module) -> dict[str, Any]:
        """By name, what the sizes that a layer of torch keeps must be with the parameters that it has now.

        The groups of a convolution do not show in its parameters: they are taken as they are. Modules of other classes
        have no such attributes.

        Example:
            >>> REGISTRY.module_sizes(nn.Linear(4, 2))
            {'out_features': 2, 'in_features': 4}
        """
        for rule in dict.fromkeys(self._rules.values()):
            if rule.modules and isinstance(module, rule.modules):
                return dict(rule.module_sizes(module))
        return {}

    def call(self, node: fx.Node) -> OperatorCall | None:
        """The record of a node's call, None where there is no rule."""
        rule = self.rule(node.target)
        return None if rule is None else rule.parse(node)

    def calls(self, graph: fx.Graph) -> Iterator[OperatorCall]:
        """The records of all calls of a graph that have a rule, in order."""
        for node in graph.nodes:
            if node.op == "call_function" and (call := self.call(node)) is not None:
                yield call


REGISTRY = Registry()

REPORT = "Its channels stay, the rest shrinks. Please report the model."


def failed_with(error: BaseException) -> str:
    """Why channels stay that an operator touches: its analysis raised `error`."""
    return f"the analysis of this operator failed with {type(error).__name__}: {str(error).rstrip('.')}"


def register(*operators: Operator) -> Callable[[_Class], _Class]:
    """Register a class for operators: overloads, whole packets (`torch.ops.aten.relu`) or Python functions."""

    def decorate(rule: _Class) -> _Class:
        for operator in operators:
            REGISTRY.add(operator, rule)
        return rule

    return decorate


def register_named(name: str) -> Callable[[_Class], _Class]:
    """Register a class for an operator that a library defines when it is imported, "library.name"."""

    def decorate(rule: _Class) -> _Class:
        REGISTRY.add_named(name, rule)
        return rule

    return decorate


@named_arguments
def register_operator(operator: Operator, rule: Rule | Operator) -> None:
    """Tell the channel analysis about an operator that it does not know, such as one of `torch.library.custom_op`.

    Without a rule, every channel that an operator touches stays, and `final.plan.explain()` says so.

    Args:
        operator: an overload (`torch.ops.mylib.gate.default`), all its overloads (`torch.ops.mylib.gate`), or what
            `torch.library.custom_op` returned.
        rule: an operator that relates channels in the same way, with arguments of the same names where it has options:
            `torch.ops.aten.relu` for all that acts on every element by itself and broadcasts as torch does; or a
            subclass of `fxprune.channels.OperatorCall`.

    Raises:
        ArgumentError: the operator has a rule, the one it is to be like has none, or a field of the rule fits no
            argument of the operator, or has the name of something else in `OperatorCall`.
        ArgumentTypeError: `operator` is none of torch's operators, or `rule` is neither of the two.

    Example:
        >>> @torch.library.custom_op("mylib::gate", mutates_args=())
        ... def gate(x: torch.Tensor) -> torch.Tensor:
        ...     return x * x.sigmoid()
        >>> fxprune.register_operator(gate, torch.ops.aten.silu)
    """
    operator = overload_of_custom_operator(operator)
    if not isinstance(operator, OpOverload | OpOverloadPacket):
        raise ArgumentTypeError(f"{operator!r} is no operator of torch. Define one by torch.library.custom_op.")
    if isinstance(rule, type) and issubclass(rule, OperatorCall):
        _add(operator, rule)
        return
    if not isinstance(rule, OpOverload | OpOverloadPacket):
        raise ArgumentTypeError(f"rule={rule!r}: an operator that is known, or a class of OperatorCall, is needed.")
    overload = getattr(rule, rule.overloads()[0]) if isinstance(rule, OpOverloadPacket) else rule
    known = REGISTRY.rule(overload)
    if known is None:
        raise ArgumentError(f"{rule} has no rule either, so {operator} cannot be like it.")
    _add(operator, known, overload)


def _add(operator: Operator, rule: Rule, model: Operator | None = None) -> None:
    """Register a rule that finds its arguments in every overload of the operator, or parses them itself."""
    if taken := [item.name for item in dataclasses.fields(rule) if hasattr(OperatorCall, item.name)]:
        raise ArgumentError(
            f"{rule.__name__} has a field {taken[0]!r}, which is something else in every OperatorCall. Give it another "
            f"name, and that of the argument in `aliases`."
        )
    parses_itself = inspect.getattr_static(rule, "parse") is not inspect.getattr_static(OperatorCall, "parse")
    for overload in () if parses_itself else _overloads(operator):
        schema = schema_of(overload)
        arguments = [argument.name for argument in schema.arguments] if schema else []
        if missing := rule.missing(arguments):
            raise ArgumentError(
                f"{operator} takes {', '.join(map(repr, arguments))}; its rule {rule.__name__} needs an argument "
                f"{', and one '.join(missing)}. Name it so, or register a subclass of {rule.__name__} with `aliases`."
            )
    REGISTRY.add(operator, rule, model)


def _overloads(operator: Operator) -> list[OpOverload]:
    if isinstance(operator, OpOverload):
        return [operator]
    return [getattr(operator, name) for name in operator.overloads()]


def relate(walk: Walk, node: fx.Node) -> Result:
    """What a node computes, with everything that the walk needs to know of it.

    Without a rule all that it touches stays, and so it does where the rule raises something: the rest still shrinks.

    Warns:
        AnalysisWarning: the rule raised something, which is a defect of it.
    """
    if node.name in walk.parameters.refused:
        return walk.refuse(node, walk.parameters.refused[node.name])
    recorded = walk.recorded()
    try:
        return _related(walk, node)
    except Exception as error:
        if isinstance(error, FxpruneError | FxpruneWarning):
            raise
        why = failed_with(error)
        warnings.warn(f"{describe(node)}: {why}. {REPORT}", AnalysisWarning, stacklevel=2)
    walk.parameters.refused[node.name] = why
    walk.forget_since(recorded)
    return walk.refuse(node, why)


def _related(walk: Walk, node: fx.Node) -> Result:
    call = REGISTRY.call(node)
    if call is None:
        return walk.refuse(
            node, f"no rule for this operator; fxprune.register_operator({_spelled(node.target)}, ...) gives it one"
        )
    return ranged(walk, node, exactly(walk, node, call.relate(walk)))


def _spelled(target: Operator) -> str:
    return f"torch.ops.{target}" if hasattr(target, "overloadpacket") else getattr(target, "__name__", str(target))


def is_pointwise(target: Operator) -> bool:
    """Whether an operator acts on every element by itself."""
    rule = REGISTRY.rule(target)
    return rule is not None and rule.is_pointwise
