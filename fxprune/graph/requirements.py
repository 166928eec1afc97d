"""What calls require of what they are given: the module first of all."""

from __future__ import annotations

from typing import Any

from torch import nn

from fxprune.errors import ArgumentTypeError, FinalizeError, FxpruneError, NameLookupError
from fxprune.graph.containers import Container
from fxprune.graph.masks import masked, named_by_mask
from fxprune.graph.names import tensors_of
from fxprune.graph.traced import TracedModule
from fxprune.sharding import rest


def require_traced(value: Any, *, values: bool = True) -> None:
    """Raise ArgumentTypeError unless the value is a traced module, ArgumentError where its tensors do not fit it.

    The same where a mask that holds one vector was written into. Parameters that FSDP has gathered for a forward are
    shards again afterwards. With `values`, parameters without any, of a model traced on the device "meta", are refused,
    too.
    """
    if not isinstance(value, TracedModule):
        raise ArgumentTypeError(f"a traced module is needed, got {type(value).__name__}. {_way_to_a_traced(value)}")
    rest(value)
    value.check_tensors()
    if values:
        value.check_values()


def require_flag(name: str, value: object) -> None:
    """Raise ArgumentTypeError where an option of this name is neither True nor False."""
    if not isinstance(value, bool):
        raise ArgumentTypeError(f"{name}={value!r}: True or False is needed.")


def require_list(name: str, value: object) -> None:
    """Raise ArgumentTypeError where one string stands for a list of them."""
    if isinstance(value, str):
        raise ArgumentTypeError(f"{name}={value!r}: a list is needed, [{value!r}].")


def _way_to_a_traced(value: Any) -> str:
    if isinstance(value, str):
        return "The traced module comes first, then the name."
    if isinstance(value, Container):
        return "Give the whole traced module, and the qualified name: (traced, 'conv1.weight')."
    if isinstance(value, type):
        return "Call fxprune.trace with an instance first."
    if isinstance(value, nn.Module) or not hasattr(value, "traced"):
        return "Call fxprune.trace first."
    return "Give its attribute `traced`."


def require_parameter(traced: TracedModule, name: Any) -> None:
    """Raise NameLookupError where a name is that of a tensor that is no parameter of its own; the message says which.

    Args:
        traced: the module.
        name: the name, or whatever was given for one; patterns and names of nothing pass.
    """
    if not isinstance(name, str):
        return
    there = tensors_of(traced)
    if name in there and (plain := named_by_mask(name)) in masked(traced):
        raise NameLookupError(f"{name!r} belongs to the masked parameter {plain!r}. Name that.")
    if name in there and not isinstance(there[name], nn.Parameter):
        prefix = name.rpartition(".")[0]
        near = [n for n, tensor in there.items() if isinstance(tensor, nn.Parameter) and n.rpartition(".")[0] == prefix]
        cure = f"Parameters beside it: {', '.join(near)}." if near else "Name a parameter."
        raise NameLookupError(f"{name!r} is a buffer, which is not trained and carries no mask or norm. {cure}")


def require_eval(traced: Any, what: str, error: type[FxpruneError] = FinalizeError, *, values: bool = True) -> None:
    """Raise unless a value is a traced module with an eval graph.

    Args:
        traced: the value.
        what: what needs the graph, as the message begins: "finalize".
        error: the class to raise where the graph is missing; ArgumentTypeError where the value is no traced module.
        values: whether parameters must have values.
    """
    require_traced(traced, values=values)
    if "eval" not in traced.modes:
        raise error(
            f"{what} needs the eval graph; captured: {', '.join(traced.modes)}. Trace the model with "
            'modes=("train", "eval").'
        )
