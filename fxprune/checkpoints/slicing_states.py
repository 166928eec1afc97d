"""State dicts of the dense model cut to the shrunk one: weights, and the adapters of PEFT that were trained on them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fxprune.calling import named_arguments
from fxprune.errors import ArgumentTypeError, StateDictError
from fxprune.graph.plan import ChannelPlan
from fxprune.graph.traced import TracedModule
from fxprune.reports import first_of

aten = torch.ops.aten
# what PEFT calls the parts of an adapter -> the axis of the part that is cut, and whether it goes with a layer's inputs
_PARTS = {
    "lora_A": (1, True),
    "lora_B": (0, False),
    "lora_embedding_A": (1, True),
    "lora_embedding_B": (0, False),
    "lora_magnitude_vector": (0, False),
}
# operators whose last operand is a weight of rows for inputs, [inputs, outputs]
_BY_INPUTS = (aten.addmm.default, aten.mm.default, aten.matmul.default)
_LOOKUPS = (aten.embedding.default,)


@named_arguments
def slice_state(final: TracedModule, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Cut a state dict of the dense model to the channels that `finalize` kept.

    Takes what was trained on the dense model to the shrunk one: weights of its shape, moving averages of them, and the
    LoRA adapters of PEFT as `get_peft_model_state_dict` gives them, whose parts stand beside the weights that they are
    added to. What goes is what a dense weight with the adapter added to it would lose.

    Args:
        final: what `fxprune.finalize` returned.
        state: tensors by name, of the shapes that the model had. Names may have a prefix, as "base_model.model."; parts
            of adapters are called "layer.lora_A.weight" or "layer.lora_A.default.weight".

    Returns:
        The tensors, cut, under the same names; those whose layer lost nothing are as they were.

    Raises:
        StateDictError: a name is none of the model's, or a tensor has another shape than the plan says; names them.
        ArgumentTypeError: `final` was not finalized, or `state` is no mapping.

    Example:
        >>> adapter = get_peft_model_state_dict(trained)
        >>> small = get_peft_model(fxprune.write_back(final, model), trained.peft_config["default"])
        >>> set_peft_model_state_dict(small, fxprune.slice_state(final, adapter))
    """
    if not isinstance(final, TracedModule) or final.plan is None:
        raise ArgumentTypeError(
            f"slice_state was given a {type(final).__name__}; it takes what fxprune.finalize returns, whose plan says "
            "what went."
        )
    if not isinstance(state, Mapping):
        raise ArgumentTypeError(f"state is a {type(state).__name__}; tensors by name are needed: a state_dict().")
    by_inputs = _weights_by_inputs(final)
    found: dict[str, Tensor] = {}
    unknown: list[str] = []
    for name, tensor in state.items():
        cut = _cut(final.plan, name, tensor, by_inputs)
        if cut is None:
            unknown.append(name)
        else:
            found[name] = cut
    if unknown:
        raise StateDictError(
            f"{first_of(unknown, 5)}: no tensor of the model that was finalized, and no LoRA part beside one, with the "
            "shape that it had before. Give a state of that model, or leave these out."
        )
    return found


def _cut(plan: ChannelPlan, name: str, tensor: Tensor, by_inputs: set[str]) -> Tensor | None:
    """The tensor as it is left; None where the plan knows no such tensor."""
    if name.rpartition(".")[2] == "num_batches_tracked":
        return tensor
    weight = _known(plan, name)
    if weight is not None:
        return plan.slice(weight, tensor) if tuple(tensor.shape) == plan.shapes[weight] else None
    layer, part = _part(name)
    weight = _known(plan, f"{layer}.weight") if part else None
    if weight is None:
        return None
    axis, is_input = _PARTS[part]
    of_weight = int(is_input) if weight not in by_inputs else int(not is_input)
    kept = plan.kept[weight].get(of_weight)
    if tensor.shape[axis] != plan.shapes[weight][of_weight] or (kept is not None and kept.dim() != 1):
        return None
    if kept is None or len(kept) == tensor.shape[axis]:
        return tensor
    return tensor.index_select(axis, kept.to(tensor.device))


def _known(plan: ChannelPlan, name: str) -> str | None:
    """The name that a tensor has in the plan, which may be without parts in front."""
    parts = name.split(".")
    names = (".".join(parts[i:]) for i in range(len(parts)))
    return next((candidate for candidate in names if candidate in plan.kept), None)


def _part(name: str) -> tuple[str, str]:
    """The layer of a part of an adapter, and what PEFT calls the part; two empty strings for other names."""
    steps = name.split(".")
    at = next((i for i, step in enumerate(steps) if step in _PARTS), None)
    return ("", "") if at is None else (".".join(steps[:at]), steps[at])


def _weights_by_inputs(final: TracedModule) -> set[str]:
    """The weights whose first axis is that of their inputs: factors on the right, and tables that are looked up."""
    found: set[str] = set()
    for node in final.graphs["eval"].nodes:
        place = -1 if node.target in _BY_INPUTS else 0 if node.target in _LOOKUPS else None
        if place is not None and getattr(node.args[place], "op", "") == "get_attr":
            found.add(str(node.args[place].target))
    return found
