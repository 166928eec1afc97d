"""The values of the finalized graph put into the copy, and what layers get that are not in the graph."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor, nn

from fxprune.artifacts.same_channels import same_channels
from fxprune.artifacts.working_copy import WorkingCopy, follow_parameters
from fxprune.errors import WriteBackError
from fxprune.graph.names import locate, tensors_of
from fxprune.graph.plan import ChannelPlan
from fxprune.graph.traced import TracedModule
from fxprune.torch_internals import ConvNd, NormBase, schema_of


class LeftOut(Enum):
    """What a layer gets that left the graph, and that the class still calls."""

    AS_IN_THE_MODEL = "its own values, as far as its neighbours' sizes leave them"
    WITHOUT_WEIGHTS = "zeros in place of matrices"
    EMPTY = "zeros"
    WHOLE = "its own values and sizes, as parameters need from which the class computes a constant"


@dataclass(frozen=True)
class LeftOver:
    """A tensor of a layer that left the graph.

    Attributes:
        name, owner: what it is called, and the module that has it.
        tensor: the copy's.
        values, channels: what it has in the model, cut to its size, and what of each axis that is.
        whole: what it has in the model.
    """

    name: str
    owner: nn.Module
    tensor: Tensor
    values: Tensor
    channels: Mapping[int, Tensor]
    whole: Tensor

    @property
    def is_cut(self) -> bool:
        """Whether it has not the size that it has in the model."""
        return self.values.shape != self.whole.shape

    def channels_of(self, state: LeftOut) -> dict[int, Tensor]:
        """What of each axis it then has."""
        if state is LeftOut.WHOLE:
            return {axis: torch.arange(self.whole.shape[axis]) for axis in self.channels}
        return dict(self.channels)

    def set_to(self, state: LeftOut) -> None:
        """Give the tensor its values, or zeros."""
        is_weight = self.values.is_floating_point() and self.values.dim() > 1
        is_zero = (state is LeftOut.WITHOUT_WEIGHTS and is_weight) or (
            state is LeftOut.EMPTY and self.values.is_floating_point()
        )
        values = self.whole if state is LeftOut.WHOLE else self.values
        self.tensor.data = (torch.zeros_like(values) if is_zero else values.clone()).to(self.tensor.dtype)
        follow_parameters(self.owner)


def check_same_model(copy: WorkingCopy) -> None:
    """Raise WriteBackError unless the copy is of a model of the shapes and names that `final` comes from."""
    stored, plan = tensors_of(copy.final), copy.plan
    for name, shape in copy.shapes.items():
        wanted = plan.shapes.get(name, tuple(stored[name].shape) if name in stored else shape)
        if shape != wanted:
            raise WriteBackError(f"{name!r} has shape {shape} in the given model; the traced one's had {wanted}.")
    added = {*plan.added, *(name for name in stored if name.endswith("bias"))}
    lost = [name for name, _ in copy.final.named_parameters() if name not in copy.shapes and name not in added]
    if plan.positions:
        layers = ", ".join(name.rpartition(".")[0] for name in list(plan.positions)[:5])
        raise WriteBackError(
            f"finalize added a map to the result of {layers}, for channels that are constant but for the border of "
            "zero padding; a class has no place for it. Use finalize(..., keep_for_write_back=True)."
        )
    if lost:
        raise WriteBackError(f"the given {type(copy.root).__name__} has no {', '.join(lost[:5])}: another model.")


def put_values(copy: WorkingCopy, flags: dict[str, bool]) -> list[LeftOver]:
    """Give the copy's tensors the values and sizes of the finalized module, and torch's layers their attributes.

    Args:
        copy: what is written to.
        flags: by name, whether the model trains a parameter; one that is new trains as in `final`.

    Returns:
        The tensors of layers that left the graph, as in the model.

    Raises:
        WriteBackError: a layer has no place for a bias.
    """
    own = tensors_of(copy.root)
    made: dict[int, Tensor] = {}  # by the id of the tensor that it stands for: what is shared stays shared
    _put_stored(copy, own, flags, made)
    left_over = _cut_left_out(copy, own, made)
    _put_groups(copy)
    for module in copy.root.modules():
        follow_parameters(module)
    return left_over


def _put_stored(copy: WorkingCopy, own: dict[str, Tensor], flags: dict[str, bool], made: dict[int, Tensor]) -> None:
    for name, value in tensors_of(copy.final).items():
        try:
            owner, attribute = locate(copy.root, name)
        except AttributeError:
            continue  # a constant that the graph alone names
        if _is_cut_by_its_reads(copy, own.get(name), name, value):
            continue
        if attribute in owner._parameters:
            parameter = nn.Parameter(value.detach().clone(), flags.get(name, value.requires_grad))
            setattr(owner, attribute, made.setdefault(id(value), parameter))
        elif attribute in owner._buffers or isinstance(vars(owner).get(attribute), Tensor):
            setattr(owner, attribute, made.setdefault(id(value), value.detach().clone()))
        elif name in copy.plan.added or isinstance(value, nn.Parameter):
            raise WriteBackError(
                f"{copy.where(owner)} has no place for {attribute!r}, {_made(copy.final, name)}", copy.paths(owner)[:1]
            )


def _is_cut_by_its_reads(copy: WorkingCopy, own: Tensor | None, name: str, value: Tensor) -> bool:
    """Whether a buffer of numbers or flags is cut to what the graph reads of it, as positions are to the sample's.

    The class reads more of it for longer inputs. Axes that others share are channels, and numbers that shifted are
    those of channels.
    """
    kept = copy.plan.kept.get(name, {})
    if own is None or value.is_floating_point() or isinstance(value, nn.Parameter) or own.shape == value.shape:
        return False
    if not torch.equal(ChannelPlan({name: kept}).slice(name, own), value):
        return False
    numbers = same_channels(copy.final)
    others = {number for (other, _), number in numbers.items() if other != name}
    return all(numbers.get((name, axis)) not in others for axis in kept if own.shape[axis] != value.shape[axis])


def _made(final: TracedModule, bias: str) -> str:
    """Where a bias comes from that the model has not."""
    if bias in final.made_biases:
        return (
            "which reconstruct made. Give its class a bias that it adds, or repair without: "
            "fxprune.reconstruct(traced, batches, new_biases=False)."
        )
    return "into which finalize folded constants."


def _cut_left_out(copy: WorkingCopy, own: dict[str, Tensor], made: dict[int, Tensor]) -> list[LeftOver]:
    """Cut the tensors that are not in the graph to what the sizes of the neighbours leave of them."""
    stored, plan = tensors_of(copy.final), copy.plan
    left_over = []
    for name, old in own.items():
        if name in stored or name not in plan.kept:
            continue
        owner, attribute = locate(copy.root, name)
        values = _cut(plan, name, old)
        is_folded = isinstance(owner, NormBase) and name not in plan.dropped
        if isinstance(owner, NormBase) and is_folded:
            values.fill_(_identity(owner, attribute))
        new = nn.Parameter(values, old.requires_grad) if isinstance(old, nn.Parameter) else values
        new = made.setdefault(id(old), new)
        setattr(owner, attribute, new)
        if not is_folded:
            left_over.append(LeftOver(name, owner, new, values.clone(), plan.kept[name], old.detach()))
        if attribute == "weight" and isinstance(owner, ConvNd):
            _, groups = plan.groups.get(name, (0, 0))
            owner.groups = groups or max(owner.groups * len(values) // len(old), 1)
    return left_over


def _cut(plan: ChannelPlan, name: str, tensor: Tensor) -> Tensor:
    """The channels that are kept; where none is, the layer keeps what it had."""
    kept = {
        axis: channels if channels.numel() else torch.arange(tensor.shape[axis])
        for axis, channels in plan.kept[name].items()
    }
    return ChannelPlan({name: kept}).slice(name, tensor.detach()).clone()


def _identity(norm: NormBase, attribute: str) -> float:
    """The value with which a batch norm changes nothing."""
    return {"weight": 1.0, "running_var": 1 - norm.eps}.get(attribute, 0.0)


def _put_groups(copy: WorkingCopy) -> None:
    """Give convolutions the numbers of groups that they have in the graph."""
    for node in copy.final.graphs["eval"].nodes:
        schema = schema_of(node.target)
        names = [argument.name for argument in schema.arguments] if schema is not None else []
        if not {"weight", "groups"} <= set(names):  # a channel shuffle has groups, too
            continue
        if node.args[1].op == "get_attr":
            place = names.index("groups")
            owner, _ = locate(copy.root, str(node.args[1].target))
            owner.groups = node.args[place] if place < len(node.args) else 1  # type: ignore[assignment]


def set_left_over(left_over: Iterable[LeftOver], state: LeftOut) -> None:
    """Set the tensors of all layers that left the graph."""
    for tensor in left_over:
        tensor.set_to(state)
