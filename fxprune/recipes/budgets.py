"""What the output would lose at other budgets than the one that was asked for."""

from __future__ import annotations

from typing import Any

from fxprune.errors import BudgetError
from fxprune.graph.traced import TracedModule
from fxprune.prune.budgeted_channels import reports_under
from fxprune.prune.channel_report import ChannelReport
from fxprune.prune.sensitivity import Sensitivity

_SHARES = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2)


def losses_of_budgets(
    traced: TracedModule, sensitivity: Sensitivity, chosen: ChannelReport, options: dict[str, Any]
) -> list[dict[str, Any]]:
    """The estimated loss of budgets from 0.9 to 0.2 of the MACs, and of the one that was chosen, the largest first.

    Each is chosen as the one that was asked for is, by the same options; its loss is what the curves of the groups add
    up to, before repair. Budgets that cannot be reached are left out.

    Args:
        traced: before the choice; it stays as it is. sensitivity: the curves. chosen: what was masked.
        options: those of `fxprune.prune.channels`, without its budgets.

    Returns:
        By budget its `macs`, the share that is left, its `loss`, and whether it is the one `chosen`.

    Example:
        >>> losses_of_budgets(traced, sensitivity, report, {})[-1]
        {'macs': 0.2, 'loss': 0.31, 'chosen': False}
    """
    found = [_point(sensitivity, chosen, True)]
    asked = {name: value for name, value in options.items() if name != "seed"}  # curves draw nothing
    try:
        for report in reports_under(traced, sensitivity, _SHARES, **asked):
            if report.removed != chosen.removed:
                found.append(_point(sensitivity, report, False))
    except BudgetError:  # nor can smaller ones be reached
        pass
    return sorted(found, key=lambda point: -float(point["macs"]))


def _point(sensitivity: Sensitivity, report: ChannelReport, chosen: bool) -> dict[str, Any]:
    masked = {group: count for group, (count, _) in report.removed.items()}
    counts = ((curve, masked.get(f"{curve.name} ({curve.kind})", 0)) for curve in sensitivity.curves)
    loss = sum(float(curve.losses()[count]) for curve, count in counts)
    return {"macs": report.macs[1] / max(report.macs[0], 1), "loss": loss, "chosen": chosen}
