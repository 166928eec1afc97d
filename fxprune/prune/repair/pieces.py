"""Pieces of batches whose inputs lie on a shelf, to be gone through several times."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from fxprune.prune.repair.batches import Piece
from fxprune.prune.repair.shelf import Shelf


class Pieces:
    """Pieces in their order; at most one has its inputs in memory beside those that fit on the shelf.

    Args:
        shelf: where inputs lie; nothing else may be on it.

    Attributes:
        bare: the pieces without their inputs.
    """

    def __init__(self, shelf: Shelf) -> None:
        self._shelf = shelf
        self.bare: list[Piece] = []

    def add(self, piece: Piece) -> None:
        """Keep one more."""
        self._shelf.put(len(self.bare), {"inputs": piece.inputs})
        self.bare.append(replace(piece, inputs=[]))

    def __len__(self) -> int:
        return len(self.bare)

    def take(self, number: int) -> Piece:
        """A piece with its inputs, which are kept no longer."""
        return replace(self.bare[number], inputs=self._shelf.take(number)["inputs"])

    def __iter__(self) -> Iterator[Piece]:
        """The pieces with their inputs, which stay on the shelf."""
        for number in range(len(self.bare)):
            piece = self.take(number)
            self._shelf.put(number, {"inputs": piece.inputs})
            yield piece

    @property
    def samples(self) -> tuple[int, int]:
        """How many samples are to be fitted, and how many held back."""
        fitted, held = (sum(piece.samples for piece in self.bare if piece.is_held == held) for held in (False, True))
        return fitted, held
