"""What the stages of a recipe work on: the model, its samples, and the traced module as the last stage left it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from fxprune.capture.front_end import trace
from fxprune.errors import ArgumentError, SampleError
from fxprune.graph.calls import Call
from fxprune.graph.traced import TracedModule
from fxprune.recipes import sources
from fxprune.recipes.inputs import call_of_texts
from fxprune.recipes.recipe import Recipe
from fxprune.recipes.samples import TENSOR_FILES, Samples, names_of_file, samples

_TRACED_WITH = 2  # samples: one alone would let the batch look like a constant


@dataclass
class Work:
    """What a stage takes and leaves.

    Attributes:
        recipe: that is carried out. folder: for the files.
        traced: as the last stage left it; before the first, nothing.
    """

    recipe: Recipe
    folder: Path
    traced: TracedModule | None = None

    @cached_property
    def model(self) -> nn.Module:
        """The dense model, in eval mode; it stays as it is."""
        torch.manual_seed(self.recipe.seed)
        return sources.model(self.recipe.model.source, self.recipe.model.weights).eval()

    @cached_property
    def samples(self) -> Samples:
        """Those of calibration.

        Raises:
            ArgumentError: the recipe has none.
        """
        if self.recipe.data is None:
            raise ArgumentError("this needs samples; the recipe has no [data].")
        return samples(self.recipe.data, self.recipe.model)

    @cached_property
    def judged(self) -> Samples | None:
        """Those that the result is judged on, None where there are none."""
        if self.recipe.compare.data is not None:
            return samples(self.recipe.compare.data, self.recipe.model)
        return None if self.recipe.data is None else self.samples

    @cached_property
    def call(self) -> Call:
        """What the model is traced with."""
        if self.recipe.model.inputs:
            return call_of_texts(self.recipe.model.inputs)
        if self.recipe.data is None:
            raise ArgumentError('the model is traced with samples: give data, or inputs as in "2x3x32x32".')
        first = self.samples.batches[0]
        if isinstance(self.model, TracedModule):
            return first
        return Call(*pytree.tree_map_only(Tensor, lambda tensor: tensor[:_TRACED_WITH], tuple(first)))

    @property
    def now(self) -> TracedModule:
        """The traced module as it is."""
        assert self.traced is not None
        return self.traced

    def capture(self, modes: Sequence[str] = ("eval",)) -> TracedModule:
        """A copy of the dense model as graphs, in eval mode; repair may change its parameters."""
        model = copy.deepcopy(self.model)
        if isinstance(model, TracedModule):
            return model
        try:
            return trace(model, self.call.args, self.call.kwargs, modes=modes).eval()
        except SampleError as error:
            source = None if self.recipe.data is None or self.recipe.model.inputs else self.recipe.data.source
            if source is None or not source.endswith(TENSOR_FILES):
                raise
            raise SampleError(f"{error} {names_of_file(source)}") from error

    def outputs(self, module: nn.Module, found: Samples) -> list[Any]:
        """What a module gives for each batch of samples."""
        with torch.no_grad():
            return [module(*call.args, **call.kwargs) for call in found.batches]
