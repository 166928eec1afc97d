"""`write_back`: the sizes and values of a finalized graph, put back into the user's own class."""

from __future__ import annotations

import copy
import itertools
import os
import re
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize, prune, remove_spectral_norm, remove_weight_norm

from fxprune.errors import ArgumentTypeError, WriteBackError
from fxprune.graph.arguments import fixed_size
from fxprune.graph.equality import close, error
from fxprune.graph.interpretation import run
from fxprune.graph.names import ModulePaths, locate, tensor_at
from fxprune.graph.plan import ChannelPlan
from fxprune.graph.reparametrizations import hook_tensor, original_order, reparametrized
from fxprune.graph.traced import TracedModule

_REMOVE: dict[str, Callable[..., Any]] = {
    "prune": prune.remove,
    "weight_norm": remove_weight_norm,
    "spectral_norm": remove_spectral_norm,
}
_OWN = (str(Path(torch.__file__).parent) + os.sep, __file__)
_TRIES = 100  # of values for the attributes of one module
_NAMES: dict[Any, tuple[str, ...]] = {
    nn.Linear: ("out_features", "in_features"),
    nn.Bilinear: ("out_features", "in1_features", "in2_features"),
    nn.Embedding: ("num_embeddings", "embedding_dim"),
    nn.EmbeddingBag: ("num_embeddings", "embedding_dim"),
    nn.PReLU: ("num_parameters",),
}
# names of attributes that hold a size, for those that forward does not read
_SIZE = re.compile(r"channels|features|planes|filters|hidden|embed|inner|width|units|heads?$|head_|dim|size|^n[fx]$")
_NO_SIZE = re.compile(r"kernel|patch|image|window|vocab|chunk|pad|max_|layer|step|dim$(?<!_dim)")


def write_back(final: TracedModule, model: nn.Module) -> nn.Module:
    """The user's own module, shrunk: a copy of `model` with the parameters, buffers and sizes of `final`.

    The copy has the class, the submodules, the mode and the flags `requires_grad` of `model`, and carries no masks,
    norms or parametrizations, whether `model` does or not. Sizes that torch's own layers keep as attributes
    (`in_channels`, `groups`, `num_features`, `normalized_shape` and the like) follow from the parameters. The integers
    of the user's modules (also in lists, and in a configuration object that one module alone holds) that could follow
    from a size are found by trying: each module's results are compared with the values in the graph. The whole is then
    run in eval mode on the sample inputs, at another batch size where that is free, and compared with `final`; in
    train mode it must run, where `final` has that graph.

    A bias that finalize created for folded constants becomes a parameter: a key that `model` has not. Where the class
    has one size for several (the heads of queries, keys and values), the channels that it cannot go without come back
    as zeros, so a layer can be larger than in `final`; whole heads (`kinds` of `fxprune.prune.channels`) always fit.
    A layer that left the graph is still called by the class: it keeps what its neighbours' sizes leave of it. A
    folded batch norm becomes the identity.

    Args:
        final: what `fxprune.finalize` returned, shrunk or not.
        model: the eager module that was traced, or one of the same architecture; stays as it is.

    Returns:
        A new module of `model`'s class, independent of both.

    Raises:
        WriteBackError: `model` has other parameters than `final` comes from, its class has no place for a bias, or
            fixes a size in its code; names module, class and line.
        ArgumentTypeError: `final` is no traced module, or `model` no eager one.

    Example:
        >>> small = fxprune.write_back(fxprune.finalize(traced), model)
        >>> small.conv1.out_channels, model.conv1.out_channels
        (8, 16)
    """
    if not isinstance(final, TracedModule) or not isinstance(model, nn.Module) or isinstance(model, fx.GraphModule):
        raise ArgumentTypeError(
            f"write_back was given a {type(final).__name__} and a {type(model).__name__}; it takes what "
            "fxprune.finalize returns, and the eager module that was traced."
        )
    if "eval" not in final.graphs or (left := reparametrized(final)):
        raise WriteBackError(
            'the eval graph is needed; trace the model with modes=("train", "eval").'
            if "eval" not in final.graphs
            else f"{', '.join(left[:5])}: still reparametrized. Give what fxprune.finalize returns."
        )
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        work = _copied(model)
        modes = [(module, module.training) for module in work.modules()]
        work.eval()  # a spectral norm's value in train mode would be another
        for module, _ in reversed(modes):  # a mask on the original of a parametrization goes before it
            _make_plain(module)
        flags = {name: p.requires_grad for name, p in model.named_parameters(remove_duplicate=False)}
        _Writing(final, work, flags).run()
    for module, training in modes:
        module.training = training
    return work


def _copied(model: nn.Module) -> nn.Module:
    memo: dict[int, Any] = {}
    for module in model.modules():
        for leaf in pytree.tree_leaves(vars(module)):
            if isinstance(leaf, Tensor) and not leaf.is_leaf:  # what a hook computed, which torch does not copy
                memo[id(leaf)] = leaf.detach().clone()
    return copy.deepcopy(model, memo)


def _make_plain(module: nn.Module) -> None:
    """Remove hooks and parametrizations of torch.nn.utils; the parameters get the order they had before."""
    order = original_order(module)
    for hook in reversed(list(module._forward_pre_hooks.values())):
        if found := hook_tensor(hook):
            _REMOVE[found[1]](module, found[0])
    if parametrize.is_parametrized(module):
        # torch's function would delete the property from the class, which the given model shares
        plain = parametrize.type_before_parametrizations(module)
        holders = module._modules.pop("parametrizations")
        assert isinstance(holders, nn.ModuleDict)
        module.__class__ = plain
        for tensor, holder in holders.items():
            if any(True for _ in holder.parameters(recurse=False)):
                module.register_parameter(tensor, nn.Parameter(holder()))
            else:
                module.register_buffer(tensor, holder())
    for name in sorted(module._parameters, key=lambda n: order.index(n) if n in order else len(order)):
        module._parameters[name] = module._parameters.pop(name)


class _Slot(NamedTuple):
    """An integer that may follow from a size: an attribute of `holder` or an entry of one."""

    holder: Any
    name: str
    entry: int | None
    before: int

    def read(self) -> int:
        value = vars(self.holder)[self.name]
        return int(value if self.entry is None else value[self.entry])

    def write(self, value: int) -> None:
        old = vars(self.holder)[self.name]
        new = value if self.entry is None else type(old)(value if i == self.entry else v for i, v in enumerate(old))
        vars(self.holder)[self.name] = new


class _Writing:
    """One way back: `work` is the plain copy, in eval mode, that gets the sizes and values of `final`."""

    def __init__(self, final: TracedModule, work: nn.Module, flags: dict[str, bool]) -> None:
        self.final, self.work, self.flags = final, work, flags
        self.paths = ModulePaths(work)
        self.plan, self.graph = final.plan or ChannelPlan(), final.graphs["eval"]
        self.inputs = (final.example_args, final.example_kwargs)
        self.left: list[tuple[Tensor, Tensor]] = []  # tensors of layers that are not in the graph, their values
        self.shapes = {name: tuple(tensor.shape) for name, tensor in _tensors(work).items()}
        self.kept = {name: dict(axes) for name, axes in self.plan.kept.items() if name in self.shapes}
        self.dtypes = {name: tensor.dtype for name, tensor in _tensors(work).items()}
        self.float = torch.float32 if torch.float32 in self.dtypes.values() else torch.float64  # of biases that are new
        self.dtype: torch.dtype | None = None  # to compute in, None: the model's own
        self.padded: list[tuple[Tensor, Tensor, str, dict[int, Tensor]]] = []
        self.shared = Counter(id(value) for module in work.modules() for value in vars(module).values())
        self.budget = 10_000  # of calls of modules, since those that contain each other try for each other

    def run(self) -> None:
        self._check()
        self.seen = self._widen()
        self._write()
        self.slots = {module: list(_slots(module, self.shared)) for module in self.work.modules()}
        for attempt in range(3 if self.left else 1):
            self._unpad(0)
            for tensor, value in self.left:  # (0) as it is in the model, (1) without weights, (2) without anything
                gone = value.is_floating_point() and (attempt == 2 or (attempt == 1 and value.dim() > 1))
                tensor.copy_(torch.zeros_like(value) if gone else value)
            culprit = self._resolve()
            for module in self.work.modules():
                self._derive(module)
            worst = max(self._difference(inputs) for inputs in (self.inputs, self._other_batch()))
            if not worst:
                break
        else:
            where = f" first at {culprit}," if culprit else ""
            raise WriteBackError(
                f"{type(self.work).__name__} runs with the sizes of the finalized model, but an output differs,{where} "
                f"by {worst:.1e} relative. Its code computes with a size that is no attribute, or it is another model "
                "than the one that was traced."
            )
        if self.dtype is not None:
            self.dtype = None
            self._cast()
            if worst := self._difference(self.inputs):
                raise WriteBackError(f"an output differs by {worst:.1e} relative in the model's own precision.")
        if "train" in self.final.graphs:
            self._call(copy.deepcopy(self.work).train(), self.inputs)

    # ---- tensors

    def _check(self) -> None:
        stored = _tensors(self.final)
        for name, shape in self.shapes.items():
            want = self.plan.shapes.get(name, tuple(stored[name].shape) if name in stored else shape)
            if shape != want:
                raise WriteBackError(f"{name!r} has shape {shape} in the given model; the traced one's had {want}.")
        added = {*self.plan.added, *(name for name in stored if name.endswith("bias"))}
        lost = [name for name, _ in self.final.named_parameters() if name not in self.shapes and name not in added]
        if lost:
            raise WriteBackError(f"the given {type(self.work).__name__} has no {', '.join(lost[:5])}: another model.")

    def _widen(self) -> set[tuple[nn.Module, str]]:
        """Go over to float64 where the model is in float32 and runs in it: rounding would hide a wrong attribute."""
        if any(tensor.dtype == torch.float32 for tensor in _tensors(self.work).values()):
            self.dtype = torch.float64
            self._cast()
            try:
                self._graph_outputs(self.inputs)
                return self._reads()
            except (WriteBackError, RuntimeError):
                self.dtype = None
                self._cast()
        return self._reads()

    def _cast(self) -> None:
        for name, tensor in _tensors(self.work).items():
            if self.dtypes.get(name, self.float) == torch.float32:
                tensor.data = tensor.data.to(self.dtype or torch.float32)

    def _reads(self) -> set[tuple[nn.Module, str]]:
        """Run the model as it is; returns the integers, tuples and lists that its forward reads."""
        seen = set()

        def read(module: nn.Module, name: str) -> Any:
            value = object.__getattribute__(module, name)
            if type(value) in (int, tuple, list):
                seen.add((module, name))
            return value

        nn.Module.__getattribute__ = read  # type: ignore[method-assign, assignment]
        try:
            self._call(self.work, self.inputs)
        finally:
            del nn.Module.__getattribute__
        return seen

    def _write(self) -> None:
        """Put the values of the graph in."""
        own, stored, plan = _tensors(self.work), _tensors(self.final), self.plan
        made: dict[int, Tensor] = {}
        for name, value in stored.items():
            try:
                owner, attribute = locate(self.work, name)
            except AttributeError:
                continue  # a constant that the graph alone names
            if attribute in owner._parameters:
                flag = self.flags.get(name, value.requires_grad)
                new = made.setdefault(id(value), nn.Parameter(value.detach().clone(), flag))
            elif attribute in owner._buffers or isinstance(vars(owner).get(attribute), Tensor):
                new = made.setdefault(id(value), value.detach().clone())
            elif name in plan.added or isinstance(value, nn.Parameter):
                raise WriteBackError(
                    f"{_where(self.work, owner)} has no place for {attribute!r}, into which finalize folded constants."
                )
            else:
                continue
            setattr(owner, attribute, new)
        self._cast()
        for name, old in own.items():
            owner, attribute = locate(self.work, name)
            if name not in stored and name in plan.kept:
                # where no channel is left, the layer keeps what it had
                kept = {a: i if i.numel() else torch.arange(old.shape[a]) for a, i in plan.kept[name].items()}
                value = ChannelPlan({name: kept}).slice(name, old.detach()).clone()
                if name not in plan.dropped and isinstance(owner, nn.modules.batchnorm._NormBase):  # folded: identity
                    one = {"weight": 1.0, "running_var": 1 - owner.eps}
                    value.fill_(one.get(attribute, 0.0))
                else:
                    self.left.append((value, value.clone()))
                new = nn.Parameter(value, old.requires_grad) if isinstance(old, nn.Parameter) else value
                setattr(owner, attribute, made.setdefault(id(old), new))
                if attribute == "weight" and isinstance(owner, nn.modules.conv._ConvNd):
                    owner.groups = plan.groups.get(name, (0, 0))[1] or max(owner.groups * len(value) // len(old), 1)
        for node in self.graph.nodes:
            arguments = [a.name for a in node.target._schema.arguments] if hasattr(node.target, "_schema") else []
            if "groups" in arguments and node.args[1].op == "get_attr":
                at = arguments.index("groups")
                owner, _ = locate(self.work, str(node.args[1].target))
                owner.groups = node.args[at] if at < len(node.args) else 1  # type: ignore[assignment]
        for module in self.work.modules():
            vars(module).update(_layer(module))

    # ---- attributes

    def _sizes(self, module: nn.Module) -> set[tuple[int, int]]:
        """(before, after) of the tensors below a module, or below the next one around it that has any."""
        path, tensors = self.paths.of(module)[0], _tensors(module)
        while path and not tensors:
            path = path.rpartition(".")[0]
            tensors = _tensors(self.work.get_submodule(path))
        pairs = {self.plan.groups.get(f"{path}.{name}".strip("."), (0, 0)) for name in tensors}
        for name, tensor in tensors.items():
            pairs.update(zip(self.shapes.get(f"{path}.{name}".strip("."), tensor.shape), tensor.shape, strict=True))
        return pairs

    def _choices(self, module: nn.Module) -> list[tuple[_Slot, list[int]]]:
        """The integers that forward reads and could follow from a size, with possible values, likeliest first."""
        sizes, known, found = self._sizes(module), _layer(module), []
        changed = sorted((pair for pair in sizes if pair[0] != pair[1]), reverse=True)
        for slot in self.slots[module]:
            v = slot.before
            if slot.name in known or v < 1 or (slot.holder is module and (module, slot.name) not in self.seen):
                continue
            exact = [new for old, new in changed if old == v]
            near = [(old, new) for old, new in changed if v != old and 0 in (v % old, old % v)]
            ratio = [v * new // old for old, new in near if v * new % old == 0]
            # how many heads share one, say, is a ratio of two counts
            odd = list(range(1, min(v, 16))) if near else []
            options = list(dict.fromkeys([*([v] if (v, v) in sizes else []), *exact, v, *ratio, *odd]))
            if len(options) > 1:
                found.append((slot, options))
        return found

    def _resolve(self) -> str:
        """Run the model: each module tries values for its integers until its results are those in the graph.

        Returns the first module of which none were, "" where there is none.
        """
        trying = [module for module in self.work.modules() if self._choices(module)]
        names = {name: module for module in trying for name in self.paths.of(module)}
        values: dict[nn.Module, list[Tensor]] = {module: [] for module in trying}
        culprits: list[str] = []

        def watch(node: fx.Node, value: Any) -> None:
            for path in _paths(node) & names.keys() if isinstance(value, Tensor) else ():
                if any(path not in _paths(user) for user in node.users):
                    values[names[path]].append(value.clone())  # what runs later may write into it

        def wrapped(module: nn.Module) -> Callable[..., Any]:
            forward, failed = module.forward, dict[Any, Exception]()
            done: Any = None

            def call(*args: Any, **kwargs: Any) -> Any:
                nonlocal done
                if done == [t.shape for t in _tensors(module).values()]:
                    return forward(*args, **kwargs)
                given = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
                saved = [t.clone() for t in given]
                failure: Exception | None = None
                ran: Any = None
                start = len(self.padded)
                # what contains the module may try again: the same sizes fail the same way
                sizes = tuple(t.shape for t in (*given, *_tensors(module).values()))
                if sizes in failed:
                    raise failed[sizes]
                for padding in itertools.chain([{}], self._paddings(module)):
                    self._pad(padding)
                    for slot in self.slots[module]:
                        slot.write(slot.before)
                    choices = self._choices(module)
                    for order in itertools.islice(_orders([len(options) for _, options in choices]), _TRIES):
                        if self.budget < 0 and failure is not None:
                            break
                        self.budget -= 1
                        for tensor, old in zip(given, saved, strict=True):
                            tensor.copy_(old)
                        for (slot, options), i in zip(choices, order, strict=True):
                            slot.write(options[i])
                        inner = len(self.padded)
                        try:
                            outputs = forward(*args, **kwargs)
                        except Exception as error:
                            failure = failure or error
                            self._unpad(inner)
                            continue
                        if _among([*values[module], *given], outputs, self._tolerance()):
                            done = [t.shape for t in _tensors(module).values()]
                            return outputs
                        ran = ran or (padding, [(slot, slot.read()) for slot in self.slots[module]])
                        self._unpad(inner)
                    self._unpad(start)
                if ran is None:
                    assert failure is not None
                    failed[sizes] = failure
                    raise failure
                self._pad(ran[0])
                for slot, value in ran[1]:
                    slot.write(value)
                for tensor, old in zip(given, saved, strict=True):
                    tensor.copy_(old)
                done = [t.shape for t in _tensors(module).values()]
                culprits.append(_where(self.work, module))
                return forward(*args, **kwargs)

            return call

        self._graph_outputs(self.inputs, watch)
        before = {module: vars(module).get("forward") for module in trying}
        for module in trying:
            vars(module)["forward"] = wrapped(module)
        try:
            self._call(self.work, self.inputs)
        finally:
            for module, forward in before.items():
                vars(module).pop("forward") if forward is None else vars(module).update(forward=forward)
        return culprits[0] if culprits else ""

    # ---- channels that a class cannot do without

    def _paddings(self, module: nn.Module) -> Iterator[dict[str, dict[int, Tensor]]]:
        """Ways to take removed channels back, as zeros: name -> axis -> indices.

        Only channels that stay within the module, or go from it to its siblings. First those that give all heads the
        same size, for each size that an integer of the module may mean, then heads as they were, then everything.
        """
        path = self.paths.of(module)[0]
        below, parent = f"{path}.".lstrip("."), f"{path.rpartition('.')[0]}.".lstrip(".")
        places: dict[tuple[int, tuple[int, ...]], list[tuple[str, int]]] = {}
        for name, axes in self.kept.items():
            for axis, index in axes.items():
                if index.dim() == 1 and 0 < len(index) < self.shapes[name][axis]:
                    places.setdefault((self.shapes[name][axis], tuple(index.tolist())), []).append((name, axis))
        own = {key: at for key, at in places.items() if any(name.startswith(below) for name, _ in at)}
        inner = {k: at for k, at in own.items() if all(name.startswith(parent) for name, _ in at)}
        for size in dict.fromkeys(slot.before for slot in self.slots[module] if slot.before > 1) if inner else ():
            keys = [key for key in own if key[0] % size == 0 and key[0] > size]
            heads = {full: sorted({i // size for f, kept in keys if f == full for i in kept}) for full, _ in keys}
            most = max((len({i % size for i in kept}) for _, kept in keys), default=size)
            for count in dict.fromkeys((most, size)):
                new: dict[str, dict[int, Tensor]] = {}
                for full, kept in inner.keys() & set(keys):
                    left = sorted({i % size for i in kept})
                    left = sorted([*left, *(i for i in range(size) if i not in left)][:count])
                    chosen = torch.tensor([h * size + i for h in heads[full] for i in left])
                    for name, axis in inner[full, kept]:
                        new.setdefault(name, {})[axis] = chosen
                if new:
                    yield new
        if inner:
            everything: dict[str, dict[int, Tensor]] = {}
            for (full, _), at in inner.items():
                for name, axis in at:
                    everything.setdefault(name, {})[axis] = torch.arange(full)
            yield everything

    def _pad(self, padding: dict[str, dict[int, Tensor]]) -> None:
        for name, axes in padding.items():
            tensor, owner = tensor_at(self.work, name), locate(self.work, name)[0]
            self.padded.append((tensor, tensor.data, name, self.kept[name]))
            value = tensor.data
            for axis, index in axes.items():
                shape = list(value.shape)
                if shape[axis] == len(index):  # under another of its names
                    continue
                shape[axis] = len(index)
                at = torch.searchsorted(index, self.kept[name][axis])
                value = value.new_zeros(shape).index_copy_(axis, at, value)
            tensor.data = value
            self.kept[name] = self.kept[name] | axes
            vars(owner).update(_layer(owner))

    def _unpad(self, to: int) -> None:
        while len(self.padded) > to:
            tensor, value, name, kept = self.padded.pop()
            owner, _ = locate(self.work, name)
            tensor.data, self.kept[name] = value, kept
            vars(owner).update(_layer(owner))

    def _derive(self, module: nn.Module) -> None:
        """Integers that forward does not read, where the others leave one value."""
        sizes, known = self._sizes(module), _layer(module)
        read = [s for s in self.slots[module] if s.holder is not module or (module, s.name) in self.seen]
        for slot in self.slots[module]:
            if slot in read or slot.name in known or not _SIZE.search(slot.name) or _NO_SIZE.search(slot.name):
                continue
            found = {new for old, new in sizes if old == slot.before}
            if not found:  # heads, from their size
                found = {
                    new // r.read()
                    for old, new in sizes
                    for r in read
                    if old != new and r.before * slot.before == old and new % r.read() == 0
                }
            slot.write(found.pop() if len(found) == 1 else slot.before)

    # ---- running

    def _graph_outputs(self, inputs: Any, watch: Callable[[fx.Node, Any], None] | None = None) -> list[Any]:
        return run(self.graph, lambda name: tensor_at(self.final, name), pytree.tree_leaves(inputs), self.dtype, watch)

    def _other_batch(self) -> Any:
        """The sample inputs with one more in the batch, where that is free."""
        leaves, spec = pytree.tree_flatten(self.inputs)
        free: list[Any] = []
        for i, node in enumerate(self.graph.find_nodes(op="placeholder")):
            sizes = getattr(node.meta.get("val"), "shape", ())
            if sizes and isinstance(leaves[i], Tensor) and fixed_size(sizes[0]) is None:
                free.append(str(sizes[0]))
                if free[0] == free[-1]:
                    n = leaves[i].shape[0]
                    leaves[i] = leaves[i][torch.arange(n + 1) % n]
        return pytree.tree_unflatten(leaves, spec)

    def _difference(self, inputs: Any) -> float:
        """How much the outputs differ beyond rounding, relative to the largest; 0 where they do not."""
        want = [t for t in self._graph_outputs(inputs) if isinstance(t, Tensor)]
        got = [t for t in pytree.tree_leaves(self._call(self.work, inputs)) if isinstance(t, Tensor)]
        if [t.shape for t in want] != [t.shape for t in got]:
            return float("inf")
        pairs = list(zip(want, got, strict=True))
        return max((error(a, b) for a, b in pairs if not close(a, b, self._tolerance())), default=0.0)

    def _tolerance(self) -> float | None:
        return None if self.dtype is None else 1e-5  # some code rounds to float32 in any case

    def _call(self, module: nn.Module, inputs: Any) -> Any:
        copies: dict[int, Tensor] = {}

        def fresh(t: Tensor) -> Tensor:
            dtype = self.dtype if self.dtype is not None and t.dtype == torch.float32 else t.dtype
            return copies.setdefault(id(t), t.detach().to(dtype, copy=True))

        args, kwargs = pytree.tree_map_only(Tensor, fresh, inputs)
        try:
            return module(*args, **kwargs)
        except Exception as error:
            owner, place = module, ""
            modules = set(module.modules())
            for frame, number in traceback.walk_tb(error.__traceback__):
                path, inner = frame.f_code.co_filename, frame.f_locals.get("self")
                foreign = path.startswith(_OWN)
                if not foreign or not place:
                    owner = inner if isinstance(inner, nn.Module) and inner in modules else owner
                    place = place if foreign else f", {path}:{number}"
            raise WriteBackError(
                f"{type(module).__name__} does not run with the sizes of the finalized model: it fails in "
                f"{_where(module, owner)}{place}: {type(error).__name__}: {str(error).strip()}. Where a size is a "
                "number there, take it from the tensors or keep it in an attribute."
            ) from error


def _slots(module: nn.Module, shared: Counter[int]) -> Iterator[_Slot]:
    private = [
        v for v in vars(module).values() if shared[id(v)] == 1 and isinstance(getattr(v, "__dict__", None), dict)
    ]
    for holder in (module, *(v for v in private if not isinstance(v, nn.Module | Tensor | type) and not callable(v))):
        for name, value in vars(holder).items():
            if type(value) is int:
                yield _Slot(holder, name, None, value)
            elif type(value) in (tuple, list):
                yield from (_Slot(holder, name, i, v) for i, v in enumerate(value) if type(v) is int)


def _among(values: list[Tensor], outputs: Any, tolerance: float | None) -> bool:
    """Whether each of the outputs is among the values, channels of zeros that a class needs not counted."""

    def narrow(tensor: Tensor) -> Tensor:
        return tensor[..., tensor.reshape(-1, tensor.shape[-1]).any(0)]

    leaves = [t for t in pytree.tree_leaves(outputs) if isinstance(t, Tensor) and t.is_floating_point()]
    return all(
        any(
            (t.shape == v.shape and close(v, t, tolerance))
            or (
                t.dim() == v.dim() > 1
                and t.shape[-1] > v.shape[-1]
                and (a := narrow(v)).shape == (b := narrow(t)).shape
                and close(a, b, tolerance)
            )
            for v in values
        )
        for t in leaves
    )


def _layer(module: nn.Module) -> dict[str, Any]:
    """What torch's own layers keep of their sizes, as their parameters have it."""
    weight = getattr(module, "weight", None)
    if isinstance(module, nn.modules.batchnorm._NormBase):
        norm = weight if weight is not None else module.running_mean
        return {} if norm is None else {"num_features": len(norm)}
    if isinstance(module, nn.RNNBase):
        sizes = {name: tuple(tensor.shape) for name, tensor in module.named_parameters(recurse=False)}
        rows = sizes["weight_hh_l0"][0] // {"LSTM": 4, "GRU": 3}.get(module.mode, 1)
        projected = {"proj_size": sizes["weight_hr_l0"][0]} if module.proj_size else {}
        return {"hidden_size": rows, "input_size": sizes["weight_ih_l0"][1], **projected}
    if not isinstance(weight, Tensor):
        return {}
    size = tuple(weight.shape)
    if isinstance(module, nn.modules.conv._ConvNd):
        groups = module.groups
        ends = (size[0], size[1] * groups) if module.transposed else (size[1] * groups, size[0])
        return {"in_channels": ends[0], "out_channels": ends[1], "groups": groups}
    if isinstance(module, nn.GroupNorm):
        return {"num_channels": size[0], "num_groups": module.num_groups * size[0] // module.num_channels}
    if isinstance(module, nn.LayerNorm | nn.RMSNorm):
        return {"normalized_shape": size}
    for kind, names in _NAMES.items():
        if isinstance(module, kind):
            return dict(zip(names, size, strict=False))
    return {}


def _orders(lengths: list[int]) -> Iterator[tuple[int, ...]]:
    """Every choice of one index below each length, those of small sum first."""

    def summing(rest: list[int], total: int) -> Iterator[tuple[int, ...]]:
        if not rest and not total:
            yield ()
        for i in range(min(rest[0], total + 1)) if rest else ():
            yield from ((i, *others) for others in summing(rest[1:], total - i))

    return itertools.chain.from_iterable(summing(lengths, total) for total in range(sum(lengths) + 1))


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }


def _paths(node: fx.Node) -> set[str]:
    return {str(path) for path, _ in (node.meta.get("nn_module_stack") or {}).values()}


def _where(root: nn.Module, module: nn.Module) -> str:
    name = next(name for name, m in root.named_modules() if m is module)
    return f"{name or 'the root module'} ({type(module).__name__})"
