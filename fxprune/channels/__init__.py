"""Which channels can go, exactly, and how to take them out.

`analyze` finds them, `remove` takes them out of both graphs, `coupling` gives the groups that stand or fall together.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor, fx

from fxprune.channels import constants, rules
from fxprune.channels.coupling import Coupling, couple
from fxprune.channels.ids import Mask
from fxprune.channels.liveness import Liveness
from fxprune.channels.reasons import Reason
from fxprune.channels.rewrite import Kept, added, carry_out, fold, keep, verify
from fxprune.errors import FinalizeError
from fxprune.graph.plan import ChannelPlan
from fxprune.graph.traced import TracedModule

__all__ = ["ChannelPlan", "Coupling", "analyze", "coupling", "remove", "rules"]


def coupling(traced: TracedModule) -> Coupling:
    """The coupling of a traced module's channels, constants not considered."""
    return couple(traced, traced.graphs, facts=False)


def analyze(traced: TracedModule, *, align: str | int = "auto") -> ChannelPlan:
    """Find the channels whose removal does not change what the eval graph computes.

    Args:
        traced: a module with an eval graph; masks folded into its parameters.
        align: "auto" keeps dead channels where counts at convolutions then run faster; an integer n, multiples of n.

    Returns:
        The plan; `remove` carries it out on the same module.

    Raises:
        FinalizeError: there is no eval graph.

    Example:
        >>> plan = analyze(traced, align=1)
        >>> plan.removed
        {'0.weight': {0: 3}, '0.bias': {0: 3}, '2.weight': {1: 3}}
    """
    _require_eval(traced)
    found = couple(traced, traced.graphs)
    fixed, reached = constants.find(found)
    live = Liveness(found, align, reached)
    plan = ChannelPlan(parameters=(_parameters(traced), 0), state=(traced, found, live.alive))
    plan.constants = tuple(fixed)
    keep(found, live.alive, plan)
    _reasons(found, live, plan)
    return plan


def remove(traced: TracedModule, plan: ChannelPlan, *, check: bool = True) -> None:
    """Take out, in place and from every graph, what `plan` does not keep; checked against the graph before.

    A plan that was analyzed on another module (or restored from JSON) gives the same architecture: sizes are those of
    the plan, and no constants are folded. Without `check` the outputs are not compared and MACs not counted.

    Raises:
        FinalizeError: the plan does not fit the module, or the outputs would change. The module is then of no use.
    """
    _require_eval(traced)
    state, plan.state = plan.state, None
    if state is not None and state[0] is traced:
        _, found, alive = state
    else:
        found = couple(traced, traced.graphs, facts=False)
        added(traced, found, plan)
        alive = _imposed(found, plan)
        state = None
    check = check and state is not None
    before = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    if check:
        before.output(before.graph_copy(traced.graphs["eval"], copies))
    old = {name: tensor.detach() for name, tensor in found.tensors.items()}
    values: dict[str, Tensor] = {}
    kept = Kept(found, alive)
    if state is not None:
        fold(traced, found, alive, plan, values)
    for walk in found.walks.values():
        for edit in walk.edits:
            edit(kept)
    plan.constants = tuple(constants.place(traced, found, kept, [constants.Constant(*c) for c in plan.constants]))
    if state is not None:
        keep(found, alive, plan)
    carry_out(traced, found, kept, plan, values)
    plan.parameters = (plan.parameters[0], _parameters(traced))
    if check:
        verify(before, {copied: node for node, copied in copies.items()}, old, traced, found, alive, plan)
    traced.record(plan)


def _require_eval(traced: TracedModule) -> None:
    if "eval" not in traced.graphs:
        raise FinalizeError('removing channels needs the eval graph; trace the model with modes=("train", "eval").')


def _parameters(traced: TracedModule) -> int:
    return sum(p.numel() for p in traced.parameters())


def _imposed(found: Coupling, plan: ChannelPlan) -> Mask:
    """The classes that a stored plan keeps."""
    alive = found.classes.pinned.copy()
    for name, axes in found.parameters.items():
        if name not in plan.shapes:
            raise FinalizeError(f"the plan knows nothing of `{name}`: it belongs to another model.")
        for a, v in enumerate(axes):
            index = plan.kept[name][a]
            if v is not None and index.dim() == 1:
                if len(v) != plan.shapes[name][a]:
                    raise FinalizeError(
                        f"`{name}` has size {len(v)} on axis {a}; the plan was made for {plan.shapes[name][a]}."
                    )
                alive[found.of(v[index.numpy()])] = True
    found.classes.close(alive)
    return alive


def _reasons(found: Coupling, live: Liveness, plan: ChannelPlan) -> None:
    """Why rows of weights that are entirely zero stayed."""
    texts: dict[Reason, str] = {}
    for reader in live.readers:
        if reader.source is None or reader.rows is None:
            continue
        rows = found.of(reader.rows.reshape(-1))
        dead = np.flatnonzero(~reader.used.any(-1).reshape(-1) & live.alive[rows])
        axis = 1 if "transpose" in str(reader.node.target) else 0
        grouped: dict[str, list[int]] = {}
        for i in dead:
            why = live.why(int(rows[i]))
            if why not in texts:
                texts[why] = why.text()
            grouped.setdefault(texts[why], []).append(int(i))
        plan.stayed += [(reader.source, axis, index, reason) for reason, index in grouped.items()]
