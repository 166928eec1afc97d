"""Comparing what modules and exported files compute."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, Literal

from torch import nn

from fxprune.calling import named_arguments
from fxprune.errors import ArgumentError, ArgumentTypeError, CompareError
from fxprune.graph.calls import as_calls
from fxprune.graph.traced import TracedModule
from fxprune.graph.vectors import check_vectors
from fxprune.progress import shown

from .judging import Tolerance, judge
from .report import Report
from .runners import runner_of


@named_arguments
@shown("compare")
def compare(
    reference: nn.Module | str | os.PathLike[str],
    *candidates: nn.Module | str | os.PathLike[str],
    inputs: Any = None,
    rtol: float | None = None,
    atol: float | None = None,
    mode: Literal["eval", "train"] = "eval",
    names: Sequence[str] | None = None,
) -> Report:
    """Run the reference and every candidate on the same inputs and compare all outputs.

    Modules are called as they are, with gradients recorded (without them attention layers take another path), and
    are left as they were: mode of every submodule, buffers, random state. Every one starts from the same random
    state. In train mode the buffers after the call are compared too, where both have one of that name and shape.

    An output agrees when its shape and dtype do, NaN and inf stand at the same places, and the largest
    |candidate - reference| is at most `atol + rtol * max |reference|`, the maximum taken over the whole output: an
    element near zero in an output of size 10 carries the rounding of numbers of size 10. Integers and booleans
    agree when equal.

    In eval mode a float64 copy of the reference, where it can be made, tells the error of each side. By default a
    candidate beyond the tolerance agrees too when its error is at most twice the reference's own: then the
    difference is the rounding of the reference. When outputs disagree, the nodes are compared, by the names that an
    export keeps: see `Report.first_divergence`.

    Args:
        reference: a module (eager or traced), or the path of an .onnx, .pt2 (torch.export) or .pt (TorchScript) file.
        candidates: one or more of the same.
        inputs: needed. A tensor, a tuple of positional arguments, a dict of keyword arguments, a `Call` of both, or
            a list, a loader or another iterable of these, each of which is compared. Labels are none of them.
        rtol: relative tolerance; None: 1e-9 for float64, 1e-4 for float32, 1e-2 for float16, 5e-2 for bfloat16.
        atol: absolute tolerance; None: 0. With both 0, values must be equal.
        mode: "eval" or "train" (modules only).
        names: what the report calls the reference and the candidates; None: class and file names.

    Raises:
        SuffixError: a file of another format. CompareError: one of them cannot be run, or not on these inputs.
        ArgumentError: no candidate, no inputs, an unknown mode, or another number of names. ArgumentTypeError: without
            `inputs`.

    Example:
        >>> layer = torch.nn.Linear(2, 2)
        >>> compare(layer, layer, inputs=torch.ones(1, 2)).ok
        True
    """
    if mode not in ("eval", "train"):
        raise ArgumentError(f"mode is {mode!r}; it can be 'eval' or 'train'.")
    if inputs is None:
        raise ArgumentTypeError(
            "compare was given no inputs; they have a name: compare(reference, candidate, inputs=(x,))."
        )
    if isinstance(inputs, nn.Module | str | os.PathLike):
        raise CompareError(
            f"inputs hold a {type(inputs).__name__}. Models and files come before, by position: "
            "compare(reference, candidate, inputs=x)."
        )
    calls = as_calls(inputs, error=CompareError)
    if not candidates or not calls:
        raise ArgumentError(f"{len(candidates)} candidates and {len(calls)} inputs were given; at least one of each.")
    if isinstance(names, str):
        raise ArgumentTypeError(f"names={names!r}: a list is needed, a name for each model.")
    if names is not None and len(names) != len(candidates) + 1:
        raise ArgumentError(f"{len(names)} names were given for 1 reference and {len(candidates)} candidates.")
    for item in (reference, *candidates):
        if isinstance(item, nn.Module):
            check_vectors(item)
        if isinstance(item, TracedModule):
            item.check_values()
    runners = [runner_of(item, mode) for item in (reference, *candidates)]
    return judge(runners, calls, Tolerance(rtol, atol), mode, names)
