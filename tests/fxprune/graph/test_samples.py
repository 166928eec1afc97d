"""Sample inputs at other sizes."""

from __future__ import annotations

import torch

from fxprune.graph.samples import stretched


def test_entries_are_repeated_in_turns_along_each_axis() -> None:
    x = torch.arange(6).reshape(2, 3)
    (found,) = stretched([x], {(0, 0): 3, (0, 1): 2})
    assert found.tolist() == [[0, 1], [3, 4], [0, 1]]


def test_what_was_one_tensor_stays_one_and_the_rest_is_untouched() -> None:
    x, y = torch.ones(2), torch.ones(4)
    first, number, second, other = stretched([x, 3, x, y], {(0, 0): 5, (2, 0): 5})
    assert first is second
    assert (first.shape[0], number) == (5, 3)
    assert other is y
    assert x.shape == (2,)
