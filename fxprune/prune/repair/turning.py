"""Heads that lose channels are given a basis in which these matter least, before anything is refitted."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx

from fxprune.graph.masks import named_by_original, view
from fxprune.graph.traced import TracedModule
from fxprune.prune.repair.bases import Basis, Head, changed, find_bases, following, only_exact, sorted_bases
from fxprune.prune.repair.batches import Batches, Piece
from fxprune.prune.repair.changes import Changes
from fxprune.prune.repair.input_moments import InputMoments
from fxprune.prune.repair.layers import MatrixReader, Reader
from fxprune.prune.repair.pieces import Pieces
from fxprune.prune.repair.references import References


class Turning:
    """What of the heads of a masked module can turn.

    Args:
        traced: the masked module. graph: its eval graph. readers: those that can be refitted.
        references: the network to approach. batches: they cut pieces.
    """

    def __init__(
        self, traced: TracedModule, graph: fx.Graph, readers: Sequence[Reader], references: References, batches: Batches
    ) -> None:
        self._traced, self._graph, self._references = traced, graph, references
        self._batches = batches
        self._readers = [reader for reader in readers if isinstance(reader, MatrixReader)]

    def bases(self, piece: Piece) -> list[Basis]:
        """The heads that lose some of their channels, and can turn."""
        if not any(view(self._traced, reader.name).mask is not None for reader in self._readers):
            return []
        inputs = self._batches.head(piece, 2).inputs
        found = find_bases(self._graph, self._readers, self._references.unmasked, inputs)
        found = [basis for basis in found if self._loses(basis)]
        return only_exact(found, self._graph, self._references.unmasked, inputs, _name_of)

    def turn(self, bases: Sequence[Basis], pieces: Pieces, changes: Changes) -> None:
        """Turn heads, of the masked module and of its reference, by moments of what the reference computes."""
        moments = InputMoments([reader for basis in bases for reader in basis.readers], pieces.samples[0])
        for piece in pieces:
            if not piece.is_held:
                moments.add(self._graph, self._references.unmasked, piece)
        inputs = moments.complete()
        for basis in bases:
            found = sorted_bases(basis, inputs, self._references.value)
            turned = [change.arranged(self._dead(basis, head)) for change, head in zip(found, basis.heads, strict=True)]
            own_changes = following(basis, turned, self._original, self._references.value)
            own = changed(basis, own_changes, self._original)
            if not self._references.is_own:
                for name, values in changed(basis, turned, self._references.value).items():
                    self._references.restate(name, values)
            for name, values in own.items():
                original = view(self._traced, name).original
                assert original is not None
                changes.restate(original, values)

    def _original(self, name: str) -> Tensor:
        original = view(self._traced, name).original
        assert original is not None
        return original.detach()

    def _loses(self, basis: Basis) -> bool:
        """Whether a head has dead channels beside live ones, and masks take whole outputs and columns alone."""
        if not all(self._is_even(reader) for reader in (basis.first, basis.second)):
            return False
        dead = [self._dead(basis, head) for head in basis.heads]
        return any(bool(each.any()) and not bool(each.all()) for each in dead)

    def _is_even(self, reader: MatrixReader) -> bool:
        live = self._live(reader)
        return bool((live == live.any(1)[:, None] & live.any(0)).all())

    def _live(self, reader: MatrixReader) -> Tensor:
        found = view(self._traced, reader.name)
        if found.mask is None:
            return torch.ones(reader.sizes[1:], dtype=torch.bool, device=found.value().device)
        return reader.table([found.mask])[0] != 0

    def _dead(self, basis: Basis, head: Head) -> Tensor:
        first = ~self._live(basis.first).any(1)
        second = ~self._live(basis.second).any(1 if basis.is_product else 0)
        found: Tensor = first[head.first].any(0) | second[head.second].any(0)
        return found


def _name_of(target: str) -> str:
    return named_by_original(target) or target
