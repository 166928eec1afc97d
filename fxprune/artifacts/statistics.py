"""Statistics over channels of which some went, in the user's own classes: which can count them, and how."""

from __future__ import annotations

from torch import nn

from fxprune.artifacts.working_copy import WorkingCopy
from fxprune.errors import WriteBackError
from fxprune.graph.names import locate
from fxprune.reports import first_of

# layers of torch that take as many channels as they have gains
_COUNTING_THEIRS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)


def check_statistics(copy: WorkingCopy) -> None:
    """Raise WriteBackError where a layer of torch would have to count channels that it has no more."""
    found = dict(copy.root.named_modules(remove_duplicate=False))
    norms = [path for path in copy.plan.counting if isinstance(found.get(path), _COUNTING_THEIRS)]
    if norms:
        layer = found[norms[0]]
        counted, left = copy.plan.counting[norms[0]]
        others = f" So do {len(norms) - 1} more layers." if len(norms) > 1 else ""
        raise WriteBackError(
            f"{copy.where(layer)} normalizes {counted} channels, of which {left} are left: a {type(layer).__name__} "
            f"takes statistics over those that it has.{others} Deploy what fxprune.finalize returned (to_onnx, "
            'to_program, save), or leave the width as it is: prune other kinds than "width".',
            norms,
        )


def counting(copy: WorkingCopy) -> str:
    """What to add to an error about results that differ: the statistics that count channels which went."""
    if not copy.plan.counting:
        return ""
    names = [f"{name} ({left} of {counted})" for name, (counted, left) in copy.plan.counting.items()]
    return f" Statistics count channels that went, which a class that takes its own does not: {first_of(names, 3)}."


def put_eps(copy: WorkingCopy) -> None:
    """Give RMS norms the eps that belongs to their gain.

    Raises:
        WriteBackError: the module holds none of that value.
    """
    for gain, (before, after) in copy.plan.rescaled.items():
        try:
            owner, _ = locate(copy.root, gain)
        except AttributeError:
            continue
        names = [name for name, value in vars(owner).items() if type(value) is float and value == before]
        if not names:
            raise WriteBackError(
                f"{copy.where(owner)} has no attribute that is {before:g}, its eps, which is {after:g} for the "
                "channels that are left. Keep it in an attribute.",
                copy.paths(owner)[:1],
            )
        for name in names:
            setattr(owner, name, after)
