"""Which axes of the sample inputs are free."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.export import Dim

from fxprune.capture.sample import Sample


class Two(nn.Module):
    """Takes a tensor and a keyword."""

    def forward(self, x: torch.Tensor, *, table: torch.Tensor) -> torch.Tensor:
        return x @ table


def test_the_batch_is_the_first_tensors_and_every_tensor_of_that_size_has_it() -> None:
    x, y = torch.ones(4, 2), torch.ones(4)
    sample = Sample((3, x, torch.tensor(1.0)), {"y": y, "table": torch.ones(2, 4)}).with_free_batch()
    assert sample.free == (1, 3)  # the flat order of the arguments
    assert sample.args[1] is x
    assert sample.kwargs["y"] is y


def test_a_single_row_is_doubled_and_one_tensor_stays_one() -> None:
    x = torch.randn(1, 2)
    sample = Sample((x, x), {}).with_free_batch()
    assert torch.equal(sample.args[0], torch.cat([x, x]))
    assert sample.args[0] is sample.args[1]
    assert sample.free == (0, 1)


@pytest.mark.parametrize("args", [(), (3,), (torch.tensor(1.0),), (torch.ones(0, 2),)])
def test_without_a_batch_nothing_is_free(args: tuple[object, ...]) -> None:
    sample = Sample(args, {}).with_free_batch()
    assert sample.free == ()
    assert sample.dynamic_shapes(Two()) is None


def test_the_shapes_are_those_of_the_modules_signature() -> None:
    sample = Sample((torch.ones(4, 2),), {"table": torch.ones(2, 3)}).with_free_batch()
    assert sample.dynamic_shapes(Two()) == {"x": {0: Dim.AUTO}, "table": None}


def test_a_size_that_the_model_fixes_is_noticed() -> None:
    class Fixed(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.reshape(4, -1)

    class Free(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.reshape(x.shape[0], -1)

    sample = Sample((torch.ones(4, 2, 2),), {}).with_free_batch()
    for model, fixed in ((Fixed(), True), (Free(), False)):
        shapes = sample.dynamic_shapes(model)
        program = torch.export.export(model, sample.args, dynamic_shapes=shapes, strict=False)
        assert sample.is_specialized(program) == fixed
