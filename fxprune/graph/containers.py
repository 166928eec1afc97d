"""What a captured model's parameters and buffers stand in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

from torch import nn

from fxprune.errors import ArgumentError, ArgumentTypeError, NameLookupError, PruningError
from fxprune.graph.masks import expanded_masks, hold_in_full, named_by_original
from fxprune.graph.parts import Part
from fxprune.graph.provenance import Provenance, provenance_of, set_provenance
from fxprune.graph.vectors import converted, noted


class ReadByName(nn.Module):
    """A module whose parameters the graphs read by their names, so that torch's functions cannot put others there.

    What `torch.nn.utils` computes in hooks and properties of a module, no graph would read: it is refused before
    anything has changed.
    """

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As in torch; raises ArgumentError for another shape.

        PruningError where `torch.nn.utils.prune` stores a parameter under its second name.
        """
        present = self._parameters.get(name)
        if present is not None and param is not None and present.shape != param.shape:
            raise ArgumentError(
                f"the parameter {name!r} of a traced module was to be replaced by one of shape {list(param.shape)}; "
                f"its graphs hold for {list(present.shape)}. Change the eager model, and trace that again; for fewer "
                "channels mask them, and call fxprune.finalize."
            )
        plain = named_by_original(name)
        if plain is not None and param is not None and self._parameters.get(plain) is param:
            raise PruningError(
                f"torch.nn.utils.prune was used on {plain!r} of a traced module, whose graphs run no hooks: the mask "
                "would be ignored. Use the function of the same name in fxprune.prune, with the whole traced module "
                f"and the qualified name: fxprune.prune.l1_unstructured(traced, 'conv1.{plain}', amount=0.3)."
            )
        super().register_parameter(name, param)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        hold_in_full(self, [name for name in expanded_masks(self) if prefix + name in state_dict])
        super()._load_from_state_dict(state_dict, prefix, *rest)
        for assigned in expanded_masks(self).values():
            noted(assigned)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        vectors = expanded_masks(self)
        self._buffers.update(dict.fromkeys(vectors))  # torch would give them all entries
        try:
            result = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
            vectors = {name: converted(fn, mask) for name, mask in vectors.items()}
        finally:
            self._buffers.update(vectors)
        return result

    def __len__(self) -> NoReturn:
        """Raises ArgumentTypeError: as for items."""
        raise ArgumentTypeError(
            "the length of a traced module or a module below it was asked for, which stand for no list or Sequential. "
            "Modules are counted by their names: len(dict(traced.named_children())); the eager model has its length."
        )

    def __bool__(self) -> bool:
        """True, as of every module that has no length."""
        return True

    def __getitem__(self, index: object) -> NoReturn:
        """Raises NameLookupError: what is below a traced module has names."""
        raise NameLookupError(
            f"item {index!r} was asked of a traced module or a module below it, which stand for no list or Sequential. "
            "Modules are found by their names, as in traced.get_submodule('layers.0'), parameters as in "
            "traced.get_parameter('layers.0.weight')."
        )

    def __delattr__(self, name: str) -> None:
        if name in self._parameters:
            raise ArgumentError(
                f"the parameter {name!r} of a traced module was to be deleted or parametrized by torch, while its "
                "graphs read it. For norms use fxprune.weight_norm and fxprune.spectral_norm; for all else change the "
                "eager model and trace it again."
            )
        super().__delattr__(name)


class Container(ReadByName, Part):
    """Holds the parameters, buffers and children that stand under one name of the captured model.

    It has no attributes of its own beside a module's, since a child may have any name.
    """

    def __init__(self, provenance: Provenance | None = None) -> None:
        super().__init__()
        set_provenance(self, provenance or Provenance())


def share_contents(target: nn.Module, source: nn.Module) -> None:
    """Let `target` hold the parameters, buffers and children of `source` too, the same objects."""
    target._parameters.update(source._parameters)
    target._buffers.update(source._buffers)
    target._non_persistent_buffers_set.update(source._non_persistent_buffers_set)
    target._modules.update(source._modules)


def restore_order(module: nn.Module) -> None:
    """Sort the parameters of a container as the eager module had them; those it had not keep their place at the end."""
    put_in_order(module, provenance_of(module).parameter_order)


def put_in_order(module: nn.Module, names: Sequence[str]) -> None:
    """Sort the parameters of a container by these names, within it; others come after them as they are."""
    rank = {name: i for i, name in enumerate(names)}
    items = sorted(module._parameters.items(), key=lambda item: rank.get(item[0], len(rank)))
    module._parameters.clear()
    module._parameters.update(items)
