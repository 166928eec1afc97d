"""A network, the ways to spread it over processes, and what is asked of it in one process and in several."""

from __future__ import annotations

import copy
import gc
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import Placement
from torch.nn.utils import prune as torch_prune

import fxprune
from fxprune import borrowing
from fxprune.checkpoints import in_parts
from fxprune.graph import spread_modules
from fxprune.graph.spread_modules import hollow_copy
from fxprune.serving import Counts
from fxprune.sharding import whole


class Network(nn.Module):
    """Convolutions with channels that no number of processes divides, a batch norm, a residual, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 10, 3, padding=1)
        self.norm = nn.BatchNorm2d(10)
        self.inner = nn.Conv2d(10, 7, 3, padding=1)
        self.outer = nn.Conv2d(7, 10, 1)
        self.head = nn.Linear(10, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.norm(self.stem(x)).relu()
        hidden = hidden + self.outer(self.inner(hidden).relu())
        return self.head(hidden.relu().mean((2, 3)))


def inputs(seed: int = 1) -> torch.Tensor:
    """A batch of images."""
    return torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(seed))


def traced() -> fxprune.TracedModule:
    """The network with the same values everywhere; some entries are zero, some equal."""
    torch.manual_seed(0)
    model = Network()
    with torch.no_grad():
        model.inner.weight[:, :3] = 0.125
        model.outer.weight[2] = 0.0
    return fxprune.trace(model.train(), (inputs(),))


def plain(module: fxprune.TracedModule) -> fxprune.TracedModule:
    """One process: nothing is spread."""
    return module


def by_fsdp(module: fxprune.TracedModule) -> fxprune.TracedModule:
    """FSDP2 over all processes."""
    fully_shard(module, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    return module


def by_replicas(module: fxprune.TracedModule) -> fxprune.TracedModule:
    """FSDP2 on a mesh of two dimensions: copies of shards."""
    fully_shard(module, mesh=init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("copy", "shard")))
    return module


def data_and_tensor() -> DeviceMesh:
    """A mesh of two dimensions, two processes along the second."""
    return init_device_mesh("cpu", (dist.get_world_size() // 2, 2), mesh_dim_names=("data", "tensor"))


def distribute(
    module: fxprune.TracedModule, mesh: DeviceMesh, ways: Callable[[str, torch.Tensor], Sequence[Placement] | None]
) -> None:
    """Spread parameters over a mesh by hand, in place: from a name and a parameter its placements, None for none."""
    for path, owner in module.named_modules():
        for key, parameter in list(owner._parameters.items()):
            if parameter is not None and (placements := ways(f"{path}.{key}", parameter)) is not None:
                owner._parameters[key] = nn.Parameter(distribute_tensor(parameter.detach(), mesh, placements))


def by_tensor_parallel(module: fxprune.TracedModule) -> fxprune.TracedModule:
    """Shards of weights along their input axes, sharded again by FSDP2 along their first."""
    mesh = data_and_tensor()
    distribute(module, mesh["tensor"], lambda _, own: [Shard(1 if own.dim() > 1 and own.shape[1] % 2 == 0 else 0)])
    fully_shard(module, mesh=mesh["data"])
    return module


class Odd(torch_prune.BasePruningMethod):
    """A method of one's own: every other entry of those that are left."""

    PRUNING_TYPE = "unstructured"

    def compute_mask(self, t: torch.Tensor, default_mask: torch.Tensor) -> torch.Tensor:
        mask = default_mask.clone()
        mask.view(-1)[::2] = 0
        return mask


def _twice(module: fxprune.TracedModule) -> None:
    fxprune.prune.l1_unstructured(module, "inner.weight", 0.3)
    fxprune.prune.ln_structured(module, "inner.weight", 2, 2, 1)
    fxprune.prune.global_unstructured(module, "*.weight", torch_prune.L1Unstructured, amount=0.4)


def _scored(module: fxprune.TracedModule) -> None:
    scores = fxprune.importance.scores(module, "*.weight", "l2")
    fxprune.prune.global_unstructured(module, "*.weight", torch_prune.L1Unstructured, scores, amount=0.6)


def _by_draws(module: fxprune.TracedModule) -> None:
    P.l1_unstructured(module, "inner.weight", 0.3)
    scores = fxprune.importance.scores(module, "*.weight", "random")
    P.global_unstructured(module, "*.weight", torch_prune.L1Unstructured, scores, amount=0.4)


def _by_gradients(module: fxprune.TracedModule) -> None:
    scores = fxprune.importance.scores(
        module, "*.weight", "taylor", loader=_pairs(), loss=nn.functional.cross_entropy, max_batches=2
    )
    P.global_unstructured(module, "*.weight", torch_prune.L1Unstructured, scores, amount=0.4)


def _in_steps(module: fxprune.TracedModule) -> None:
    schedule = fxprune.Schedule(module, "*.weight", torch_prune.L1Unstructured, 0.8, stop=3, scope="global")
    for _ in range(4):
        schedule.step()


def _removed(module: fxprune.TracedModule) -> None:
    fxprune.prune.l1_unstructured(module, "*.weight", 0.3)
    fxprune.prune.remove(module, "*.weight")


P = fxprune.prune
MASKS: dict[str, Callable[[fxprune.TracedModule], Any]] = {
    "identity": lambda m: P.identity(m, "inner.weight"),
    "l1_unstructured": lambda m: P.l1_unstructured(m, "*.weight", 0.3),
    "random_unstructured": lambda m: P.random_unstructured(m, "*", 0.3),
    "random_structured": lambda m: P.random_structured(m, "inner.weight", 3, 1),
    "ln_structured rows": lambda m: P.ln_structured(m, "*er.weight", 0.3, 2, 0),
    "ln_structured columns": lambda m: P.ln_structured(m, "inner.weight", 0.3, 1, 1),
    "custom_from_mask": lambda m: P.custom_from_mask(m, "head.weight", torch.arange(60).view(6, 10) % 3),
    "nm_structured": lambda m: P.nm_structured(m, "inner.weight", 2, 4),
    "block_structured": lambda m: P.block_structured(m, "inner.weight", 0.5, (2, 1)),
    "of one's own": lambda m: P.apply(m, "*.weight", Odd()),
    "global l1": lambda m: P.global_unstructured(m, "*.weight", torch_prune.L1Unstructured, amount=0.5),
    "global l1, ties": lambda m: P.global_unstructured(m, "*", torch_prune.L1Unstructured, amount=150),
    "global random": lambda m: P.global_unstructured(m, "*.weight", torch_prune.RandomUnstructured, amount=0.5),
    "global, of one's own": lambda m: P.global_unstructured(m, "*.weight", Odd),
    "global by scores": _scored,
    "global by draws": _by_draws,
    "global by gradients": _by_gradients,
    "one after another": _twice,
    "a schedule": _in_steps,
    "removed": _removed,
}


def values(module: fxprune.TracedModule) -> dict[str, torch.Tensor]:
    """Every parameter and buffer, whole."""
    found = module.state_dict()
    return {name: getattr(value, "full_tensor", lambda value=value: value)().clone() for name, value in found.items()}


def masks(spread: Callable[[fxprune.TracedModule], fxprune.TracedModule]) -> dict[str, dict[str, torch.Tensor]]:
    """The state after each of MASKS, on a network of its own."""
    found, unspread = {}, traced()
    for what, mask in MASKS.items():
        module = spread(copy.deepcopy(unspread))
        torch.manual_seed(5 if not dist.is_initialized() else 5 + dist.get_rank())
        try:
            mask(module)
        except BaseException as error:
            error.add_note(what)
            raise
        found[what] = values(module)
    return found


def trained(spread: Callable[[fxprune.TracedModule], fxprune.TracedModule]) -> dict[str, dict[str, torch.Tensor]]:
    """The state after three steps with clipping, masked before the first and once more after the second."""
    module = spread(traced())
    fxprune.prune.l1_unstructured(module, "*er.weight", 0.3)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    clip = fxprune.clip_gradients(optimizer, max_norm=0.5)
    norms = []
    for step in range(3):
        optimizer.zero_grad()
        module(inputs(step)).square().mean().backward()
        optimizer.step()
        norms.append(clip.total_norm)
        if step == 1:
            fxprune.prune.global_unstructured(module, "*.weight", torch_prune.L1Unstructured, amount=0.5)
    return {"state": values(module), "norms": {str(i): norm for i, norm in enumerate(norms)}}


def refusals() -> dict[str, str]:
    """What is said of a model that is sharded before it is traced, and of masks that differ between processes."""
    found = {}
    model = fully_shard(Network(), mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    module = by_fsdp(traced())
    own = torch.full((6, 10), 1.0 + dist.get_rank())
    for what, call in {
        "trace": lambda: fxprune.trace(model, (inputs(),)),
        "masks": lambda: fxprune.prune.custom_from_mask(module, "head.weight", own),
    }.items():
        try:
            call()
        except fxprune.FxpruneError as error:
            found[what] = f"{type(error).__name__}: {error}"
    found["masked"] = str(fxprune.prune.is_pruned(module))
    return found


def mine(every: list[Any]) -> list[Any]:
    """Those of this process, every other one for two."""
    return every if not dist.is_initialized() else every[dist.get_rank() :: dist.get_world_size()]


def batches() -> list[torch.Tensor]:
    """Four of them."""
    return [inputs(seed) for seed in range(10, 14)]


def _pairs() -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(x, torch.arange(4) % 6) for x in batches()]


C: dict[str, Callable[..., Any]] = {
    "l2": lambda m, mine: P.channels(m, macs=0.5),
    "l1, units": lambda m, mine: P.channels(m, 0.3, importance="l1", scope="local", round_to=1),
    "parameters": lambda m, mine: P.channels(m, parameters=0.6, importance="fpgm", round_to=1),
    "bn": lambda m, mine: P.channels(m, 0.5, importance="bn", round_to=1),
    "random": lambda m, mine: P.channels(m, macs=0.6, importance="random", seed=3),
    "taylor": lambda m, mine: P.channels(
        m, macs=0.5, importance="taylor", loader=mine(_pairs()), loss=nn.functional.cross_entropy
    ),
    "obs": lambda m, mine: P.channels(m, macs=0.5, importance="obs", loader=mine(batches())),
}


def keep_nothing_whole() -> None:
    """Let the first process drop every whole tensor as soon as another one is read, however small they are."""
    borrowing.SMALL = borrowing.ROOM = 0


def channels(
    spread: Callable[[fxprune.TracedModule], fxprune.TracedModule], importances: Collection[str] = tuple(C)
) -> dict[str, Any]:
    """By importance the state, and the report; batches are divided among the processes, every other one for two."""

    found: dict[str, Any] = {}
    unspread = traced()
    if dist.is_initialized():
        keep_nothing_whole()
    for what in importances:
        module = spread(copy.deepcopy(unspread))
        report = C[what](module, mine)
        found[what] = values(module) | {"MACs": torch.tensor(report.macs), "decided": torch.tensor(len(module.decided))}
    module = spread(copy.deepcopy(unspread))
    P.channels(module, macs=0.7)
    P.channels(module, macs=0.5)
    found["twice"] = values(module)
    module = spread(copy.deepcopy(unspread))
    P.l1_unstructured(module, "*er.weight", 0.3)
    P.channels(module, macs=0.7)
    P.channels(module, macs=0.5)
    found["twice, over masks"] = values(module)
    module = spread(copy.deepcopy(unspread))
    try:
        P.channels(module, macs=0.001)
    except fxprune.errors.PruningError as error:
        found["refused"] = {str(error): torch.zeros(()), **values(module)}
    found["groups"] = {str(fxprune.channel_groups(module)): torch.zeros(())}
    return found


def finalized(spread: Callable[[fxprune.TracedModule], fxprune.TracedModule], how: str, folder: str) -> dict[str, Any]:
    """What is left of a network whose channels were chosen after a step of Adam, trained on, and written."""
    module = spread(traced())
    if dist.is_initialized():
        keep_nothing_whole()
    optimizer = torch.optim.Adam(module.parameters(), lr=0.01)
    module(inputs(0)).square().mean().backward()
    optimizer.step()
    P.channels(module, macs=0.5)
    options: dict[str, Any] = {"keep_for_training": True} if how == "spread" else {"whole": how == "whole"}
    final = fxprune.finalize(module, **options)
    found: dict[str, Any] = {"plan": {str(final.plan.parameters if final.plan else None): torch.zeros(())}}
    if how == "whole":
        found["device"] = {str({p.device.type for p in final.parameters()}): torch.zeros(())}
        if dist.is_initialized() and dist.get_rank():
            return found
        return found | {"final": values(final), "output": {"": final.eval()(inputs(2))}}
    found["final"] = values(final)
    optimizer = fxprune.optimizer_after(final.train(), optimizer)
    for step in range(2):
        optimizer.zero_grad()
        final(inputs(step)).square().mean().backward()
        optimizer.step()
    found["trained"] = values(final)
    report = fxprune.export.to_onnx(final.eval(), f"{folder}/network.onnx")
    found["report"] = {str(report.comparison and report.comparison.ok): torch.zeros(())}
    fxprune.save(final, f"{folder}/network.fxp")
    found["loaded"] = values(fxprune.load(f"{folder}/network.fxp"))
    return found


def counted_loans() -> list[Counts]:
    """The counts of all loans that are made from here on."""
    counts = list[Counts]()

    class Watched(borrowing.Loans):
        def __init__(self, *given: Any) -> None:
            super().__init__(*given)
            counts.append(self.counts)

    spread_modules.Loans = Watched  # type: ignore[misc]
    return counts


def saved_in_one(spread: Callable[[fxprune.TracedModule], fxprune.TracedModule], path: str) -> tuple[int, list[Counts]]:
    """Write a masked network to one file; the bytes of its tensors, and what was borrowed meanwhile."""
    module = spread(traced())
    P.l1_unstructured(module, "*.weight", 0.3)
    keep_nothing_whole()
    counts = counted_loans()
    fxprune.save(module, path)
    return sum(tensor.nbytes for tensor in module.state_dict().values()), counts


def pruned(spread: Callable[[fxprune.TracedModule], fxprune.TracedModule]) -> fxprune.TracedModule:
    """A network with masks of channels and of entries, and what an optimizer's step makes of it."""
    module = spread(traced())
    P.l1_unstructured(module, "inner.weight", 0.3)
    P.channels(module, macs=0.6)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    module(inputs(0)).square().mean().backward()
    optimizer.step()
    return module


def saved_in_parts(
    spread: Callable[[fxprune.TracedModule], fxprune.TracedModule], folder: str
) -> dict[str, dict[str, torch.Tensor]]:
    """The state of a network and of what was finalized of it, each written in parts, the first in many files."""
    module = pruned(spread)
    in_parts.FILE_BYTES = 2**9
    fxprune.save(module, f"{folder}/masked", parts=True)
    in_parts.FILE_BYTES = 2**25
    final = fxprune.finalize(module, keep_for_training=True)
    fxprune.save(final, f"{folder}/final", parts=True)
    fxprune.save(final, f"{folder}/final", parts=True)  # in the place of the first
    return {"masked": values(module), "final": values(final)}


def loaded_in_parts(
    spread: Callable[[fxprune.TracedModule], fxprune.TracedModule], folder: str
) -> dict[str, dict[str, torch.Tensor]]:
    """What is loaded in parts, and what it gives after one more mask, for a batch."""
    found = {}
    for name in ("masked", "final"):
        module = fxprune.load(f"{folder}/{name}", spread=spread)
        found[name] = values(module)
        module.eval()(inputs(3))
        P.l1_unstructured(module, "inner.weight", 2)
        found[f"{name}, output"] = {"": module.eval()(inputs(3)).detach()}
    return found


def failures(calls: dict[str, Callable[[], Any]]) -> dict[str, str]:
    """What each call raises."""
    found = {}
    for what, call in calls.items():
        try:
            call()
            found[what] = "nothing"
        except fxprune.FxpruneError as error:
            found[what] = f"{type(error).__name__}: {error}"
    return found


def other_folders(folder: str) -> dict[str, str]:
    """What is raised where processes see other checkpoints under one name, none, and parts that were cut short."""
    own = f"{folder}/{dist.get_rank()}"
    module = by_fsdp(traced())
    for number in range(dist.get_world_size()):
        fxprune.save(module, f"{folder}/{number}", parts=True)
        P.l1_unstructured(module, "head.weight", 0.3)
    return failures(
        {
            "others": lambda: fxprune.load(own, spread=by_fsdp),
            "none": lambda: fxprune.load(folder if dist.get_rank() else own, spread=by_fsdp),
        }
    )


def mixed(ignoring: bool = True) -> dict[str, dict[str, torch.Tensor]]:
    """What is masked, chosen, trained and left of a module of which a parameter is no shard, but whole everywhere."""
    module = traced()
    if ignoring:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        fully_shard(module, mesh=mesh, ignored_params={module.get_parameter("head.weight")})
    P.l1_unstructured(module, "*er.weight", 0.3)
    P.channels(module, macs=0.6)
    found = {"masked": values(module)}
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    clip = fxprune.clip_gradients(optimizer, max_norm=0.5, clip_value=0.01)
    module(inputs()).square().mean().backward()
    optimizer.step()
    found["trained"] = values(module) | {"norm": clip.total_norm}
    final = fxprune.finalize(module, keep_for_training=True)
    assert not isinstance(final.get_parameter("head.weight"), DTensor)
    return found | {"final": values(final)}


def some_without_values() -> dict[str, str]:
    """What is raised where one process, the last, has no values of a parameter."""
    module, hollow = by_fsdp(traced()), by_fsdp(hollow_copy(traced()))
    if dist.get_rank() == dist.get_world_size() - 1:
        module = hollow
    return failures({"channels": lambda: P.channels(module, macs=0.5), "finalize": lambda: fxprune.finalize(module)})


def late() -> dict[str, str]:
    """What a process raises that waits for one which does something else, longer than the time-out."""
    module = by_fsdp(traced())
    if dist.get_rank():
        time.sleep(20)
        return {}
    return failures({"late": lambda: P.global_unstructured(module, "*.weight", torch_prune.L1Unstructured, amount=0.3)})


def wrong_input(folder: str) -> dict[str, str]:
    """What is raised for what cannot be worked on, by every process; the module is used for all."""
    module = by_fsdp(traced())
    partial = by_fsdp(traced())
    weight = partial.get_submodule("head")._parameters["weight"]
    assert isinstance(weight, DTensor)
    summed = DTensor.from_local(weight.full_tensor(), weight.device_mesh, [Partial()])
    partial.get_submodule("head")._parameters["weight"] = nn.Parameter(summed)
    hollow = by_fsdp(hollow_copy(traced()))
    is_first = not dist.get_rank()
    unwritable = f"{folder}/missing/parts" if is_first else f"{folder}/parts"
    state = {name: value + dist.get_rank() for name, value in values(module).items()}
    method = torch_prune.L1Unstructured
    found = failures(
        {
            "partial sums": lambda: P.global_unstructured(partial, "*.weight", method, amount=0.3),
            "one loader fails": lambda: P.channels(module, importance="obs", loader=_failing(is_first)),
            "no folder": lambda: fxprune.save(module, unwritable, parts=True),
            "other states": lambda: module.load_state_dict(state),
            "write_back": lambda: fxprune.write_back(module, Network()),
            "reconstruct": lambda: fxprune.reconstruct(module, batches(), reference=hollow),
            "no values, reconstruct": lambda: fxprune.reconstruct(hollow, batches()),
            "no parts": lambda: fxprune.load(folder),
            "nothing": lambda: P.channels(module, targets="strange"),
            "no values, masks": lambda: P.l1_unstructured(hollow, "*.weight", 0.3),
            "no values, global": lambda: P.global_unstructured(hollow, "*.weight", method, amount=0.3),
            "no values, channels": lambda: P.channels(hollow, macs=0.5),
            "no values, finalize": lambda: fxprune.finalize(hollow),
        }
    )
    dist.destroy_process_group()
    return found | failures(
        {
            "no group, masks": lambda: P.l1_unstructured(module, "head.weight", 0.3),
            "no group, channels": lambda: P.channels(module, macs=0.5),
            "no group, finalize": lambda: fxprune.finalize(module),
            "no group, save": lambda: fxprune.save(module, f"{folder}/network.fxp"),
        }
    )


def _failing(fails: bool) -> Iterator[torch.Tensor]:
    yield inputs()
    if fails:
        raise OSError("no such picture")


def normed(spread: Callable[[fxprune.TracedModule], fxprune.TracedModule]) -> dict[str, dict[str, torch.Tensor]]:
    """Norms inserted, masked, trained a step, removed and finalized."""
    found = {}
    module = spread(traced())
    torch.manual_seed(5 if not dist.is_initialized() else 5 + dist.get_rank())
    fxprune.weight_norm(module, "inner.weight")
    fxprune.spectral_norm(module, "head.weight")
    found["inserted"] = values(module)
    P.l1_unstructured(module, "head.weight", 0.3)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    for step in range(2):
        optimizer.zero_grad()
        module(inputs(step)).square().mean().backward()
        optimizer.step()
    found["trained"] = values(module)
    scores = fxprune.importance.scores(module, ["inner.weight", "head.weight"], "l1")
    found["scores"] = {name: whole(score) for name, score in scores.items()}
    final = fxprune.finalize(module)
    found["final"] = values(final)
    fxprune.remove_weight_norm(module, "inner.weight")
    fxprune.remove_spectral_norm(module, "head.weight")
    found["removed"] = values(module)
    found["output"] = {"": module.eval()(inputs(3)).detach()}
    return found


def largest_held() -> dict[str, int]:
    """How many whole parameters live at once, at the most, while twelve layers are masked; and bytes of the last."""
    size = 64
    model = nn.Sequential(*(nn.Linear(size, size, bias=False) for _ in range(12)))
    module = by_fsdp(fxprune.trace(model, (torch.randn(2, size),), modes=("eval",)))
    del model
    most = 0

    class Watch(torch_prune.L1Unstructured):
        def compute_mask(self, t: torch.Tensor, default_mask: torch.Tensor) -> torch.Tensor:
            nonlocal most
            gc.collect()
            own = (each for each in gc.get_objects() if type(each) is torch.Tensor and each.dim())
            storages = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in own}
            most = max(most, sum(size >= t.nbytes for size in storages.values()))
            return super().compute_mask(t, default_mask)

    P.apply(module, "*.weight", Watch(0.5))
    mask, weight = module.get_buffer("11.weight_mask"), module.get_parameter("11.weight_orig")
    assert isinstance(mask, DTensor)
    assert isinstance(weight, DTensor)
    part = mask.to_local()
    return {
        "whole tensors at once": most,
        "of its mask": part.untyped_storage().nbytes(),
        "of its part": weight.to_local().nbytes,
    }


class Wide(nn.Module):
    """Layers of odd widths, a convolution and a grouped one, in which columns are sums over rows of all processes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 75, 3, padding=1, bias=False)
        self.grouped = nn.Conv2d(75, 135, 3, padding=1, groups=15)
        self.inner, self.outer, self.head = nn.Linear(135, 257), nn.Linear(257, 131), nn.Linear(131, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.grouped(self.stem(x).relu()).relu().mean((2, 3))
        return self.head(self.outer(self.inner(hidden).relu()).relu())


def wide() -> fxprune.TracedModule:
    """The wide network, with weights of such different magnitudes that sums depend on their order."""
    torch.manual_seed(0)
    model = Wide()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 10.0 ** torch.randint(-3, 4, parameter.shape)
    return fxprune.trace(model.train(), (inputs(),))


def chosen_by_sums(
    spread: Callable[[fxprune.TracedModule], fxprune.TracedModule], importances: Collection[str]
) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, tuple[float, float]]]:
    """By importance the state of the wide network, masked; and what the first process got and sent, in its size."""
    found, sent, unspread = dict[str, dict[str, torch.Tensor]](), dict[str, tuple[float, float]](), wide()
    counts = counted_loans()
    if dist.is_initialized():
        keep_nothing_whole()
    size = sum(parameter.nbytes for parameter in unspread.parameters())
    for importance in importances:
        module = spread(copy.deepcopy(unspread))
        data: dict[str, Any] = {}
        if importance == "taylor":
            data = {"loader": [(x, torch.arange(4) % 3) for x in batches()], "loss": nn.functional.cross_entropy}
        P.channels(module, macs=0.5, importance=importance, round_to=1, **data)
        found[importance] = values(module)
        sent[importance] = (counts[-1].gathered / size, counts[-1].sent / size) if counts else (0.0, 0.0)
        P.l1_unstructured(module, "outer.weight", 0.2)
        P.channels(module, macs=0.3, importance=importance, round_to=1, **data)
        found[f"{importance}, more"] = values(module)
    return found, sent
