"""`TracedModule`: a captured model, two graphs over one set of parameters."""

from __future__ import annotations

import copy
import keyword
import re
import weakref
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
import torch.utils._pytree as pytree
from torch import fx, nn
from torch.fx.graph import PythonCode, _PyTreeCodeGen

from fxprune.errors import ArtifactError, CaptureError, InputError
from fxprune.graph.plan import ChannelPlan

_KEYWORD_ATTRIBUTE = re.compile(r"\.(" + "|".join(k for k in keyword.kwlist if k.isidentifier()) + r")\b")


class CodeGen(_PyTreeCodeGen):
    """torch's pytree code generator, with attribute paths that contain Python keywords made legal."""

    def __deepcopy__(self, memo: dict[int, Any]) -> CodeGen:
        # it is never changed in place, and copying torch's tree specifications warns
        return CodeGen(self.pytree_info)

    def _gen_python_code(self, *args: Any, **kwargs: Any) -> PythonCode:
        code: PythonCode = super()._gen_python_code(*args, **kwargs)
        lines = code.src.split("\n")
        for i, line in enumerate(lines):
            # only a read of an attribute path can hold a keyword after a dot; its codegen is `name = self.a.b.c`
            target, equals, value = line.partition(" = ")
            if equals and (value.startswith(("self.", "getattr("))):
                path, semicolon, rest = value.partition(";")
                while match := _KEYWORD_ATTRIBUTE.search(path):
                    path = f'getattr({path[: match.start()]}, "{match.group(1)}"){path[match.end() :]}'
                lines[i] = f"{target}{equals}{path}{semicolon}{rest}"
        code.src = "\n".join(lines)
        return code


def fixed_size(size: int | torch.SymInt) -> int | None:
    """The size as an integer, None where it is free; a capture can fix a free size by a constraint."""
    found = size if isinstance(size, int) else size.node.maybe_as_int()
    return None if found is None else int(found)


# torch's names of the state of a norm: by its legacy hook, and as a parametrization
_SPELLINGS = (("_g", "original0"), ("_v", "original1"), ("_orig", "original"), ("_u", "0._u"), ("_v", "0._v"))
_GENERATED = ("_graph", "_code", "_in_spec", "_out_spec", "_lineno_map", "_prologue_start")


class _Input(NamedTuple):
    """What a flattened input must be: `sizes` is None for what is no tensor, `alias` the first input it is one with."""

    name: str
    sample: Any
    sizes: tuple[int | str, ...] | None
    alias: int


class Container(nn.Module):
    """Holds the parameters, buffers and children that stand under one name of the captured model.

    `parameter_order` lists the parameters as the model without reparametrizations has them, so that removing a
    mask or a norm restores the order that optimizers and `parameters_to_vector` go by. `source_class` is eager's class,
    and `_reads` how often one forward in train mode read each parameter. `options` say how the parametrization that it
    belongs to was inserted.
    """

    parameter_order: tuple[str, ...] = ()
    source_class: type[nn.Module] = nn.Module
    _reads: Mapping[str, int] = MappingProxyType({})
    options: Mapping[str, Any] = MappingProxyType({})

    def restore_order(self) -> None:
        """Sort the parameters by `parameter_order`; those it does not list keep their place at the end."""
        rank = {name: i for i, name in enumerate(self.parameter_order)}
        items = sorted(self._parameters.items(), key=lambda item: rank.get(item[0], len(rank)))
        self._parameters.clear()
        self._parameters.update(items)


class TracedModule(fx.GraphModule):
    """A model captured by `fxprune.trace`: a `torch.fx.GraphModule` that holds one graph per captured mode.

    Parameters and buffers keep eager's names and are the same objects as the source model's. `train()` and
    `eval()` select the graph; `graph` and `code` show the selected one.

    Attributes:
        graphs: the graphs by mode, "train" and "eval" (those that were captured).
        example_args, example_kwargs: the sample inputs of the capture.
        dynamic_shapes: `torch.export`'s structure of the dynamic axes, None when every size is fixed.
        plan: the channel plan that `finalize` carried out, else None.
        origin: what `finalize` carried out just now, and the parameters of the module that it was given.
    """

    graphs: dict[str, fx.Graph]
    example_args: tuple[Any, ...]
    example_kwargs: dict[str, Any]
    dynamic_shapes: Any
    plan: ChannelPlan | None
    origin: tuple[ChannelPlan | None, dict[str, weakref.ref[nn.Parameter]]] | None
    _python_code: PythonCode
    _expected: list[_Input]

    def __init__(
        self,
        root: Container,
        graphs: Mapping[str, fx.Graph],
        example_args: tuple[Any, ...],
        example_kwargs: Mapping[str, Any],
        dynamic_shapes: Any,
        *,
        training: bool,
    ) -> None:
        super().__init__(nn.Module(), fx.Graph(), "TracedModule")
        self._parameters.update(root._parameters)
        self._buffers.update(root._buffers)
        self._non_persistent_buffers_set.update(root._non_persistent_buffers_set)
        self._modules.update(root._modules)
        self.parameter_order, self.source_class, self._reads = root.parameter_order, root.source_class, root._reads
        self._compiled: dict[str, dict[str, Any]] = {}
        self.graphs = dict(graphs)
        for graph in self.graphs.values():
            graph.owning_module = self
        self.example_args, self.example_kwargs = example_args, dict(example_kwargs)
        self.dynamic_shapes = dynamic_shapes
        self.plan = self.origin = None
        mode = "train" if training else "eval"
        self.train((mode if mode in self.graphs else next(iter(self.graphs))) == "train")

    restore_order = Container.restore_order

    @property
    def modes(self) -> tuple[str, ...]:
        """The captured modes."""
        return tuple(self.graphs)

    def train(self, mode: bool = True) -> TracedModule:
        """Select the graph of train mode (`mode=True`) or of eval mode.

        Raises:
            CaptureError: that mode was not captured.
        """
        name = "train" if mode else "eval"
        if name not in self.graphs:
            raise CaptureError(
                f"{name} mode was asked for; captured: {', '.join(self.graphs)}. Trace the model again with "
                f'modes=("train", "eval"), or stay in {next(iter(self.graphs))} mode.'
            )
        super().train(mode)
        self._select(name)
        return self

    def _select(self, mode: str) -> None:
        if mode not in self._compiled:
            self._graph = self.graphs[mode]
            code = super().recompile()
            self._compiled[mode] = {
                "python_code": code,
                "forward": type(self).forward,
                "_expected": self._input_checks(),
                **{k: v for k, v in self.__dict__.items() if k in _GENERATED},
            }
        state = dict(self._compiled[mode])
        self._python_code = state.pop("python_code")
        type(self).forward = state.pop("forward")
        self.__dict__.update(state)

    def recompile(self) -> PythonCode:
        """Regenerate the code of every mode; call it after editing a graph."""
        if "graphs" not in self.__dict__:
            return super().recompile()
        self._compiled.clear()
        self._select("train" if self.training else "eval")
        return self._python_code

    # ---- inputs

    def _input_checks(self) -> list[_Input]:
        leaves = pytree.tree_leaves((self.example_args, self.example_kwargs))
        placeholders = [node for node in self._graph.nodes if node.op == "placeholder"]
        first: dict[int, int] = {}
        expected = []
        for i, (node, leaf) in enumerate(zip(placeholders, leaves, strict=True)):
            value = node.meta.get("val")
            sizes = None
            if isinstance(leaf, torch.Tensor):
                shape = value.shape if isinstance(value, torch.Tensor) else leaf.shape
                sizes = tuple(known if (known := fixed_size(size)) is not None else str(size) for size in shape)
                i = first.setdefault(id(leaf), i)
            elif isinstance(value, torch.SymInt | torch.SymFloat):
                leaf = value
            expected.append(_Input(node.name, leaf, sizes, i))
        return expected

    def _check_inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        info = self._graph._codegen.pytree_info  # type: ignore[attr-defined]
        names, in_spec = info.orig_args, info.in_spec
        bound = dict(zip(names, args, strict=False)) | kwargs
        if len(args) + len(kwargs) != len(names) or bound.keys() != set(names):
            given = [f"{len(args)} positional", *(f"{k}=" for k in kwargs)]
            raise InputError(
                f"called with {', '.join(given)}; captured with ({', '.join(names)}). Arguments left at their default "
                "at the capture are part of the graph: pass the captured ones, or trace again with the others."
            )
        count = in_spec.child(0).num_children
        keywords = dict(zip(in_spec.child(1).context, (bound[n] for n in names[count:]), strict=True))
        leaves, spec = pytree.tree_flatten((tuple(bound[n] for n in names[:count]), keywords))
        if spec != in_spec:
            raise InputError(f"inputs have the structure {spec}; captured was {in_spec}. Pass the captured structure.")
        free: dict[str, int] = {}

        def fits(size: int, known: int | str) -> bool:
            if isinstance(known, int):
                return size == known
            return not known.isidentifier() or free.setdefault(known, size) == size

        for i, (leaf, want) in enumerate(zip(leaves, self._expected, strict=True)):
            if want.sizes is None:
                if not isinstance(want.sample, torch.SymInt | torch.SymFloat) and leaf != want.sample:
                    raise InputError(
                        f"input `{want.name}` is {leaf!r}; the capture holds for {want.sample!r} only. Trace again."
                    )
                continue
            if not isinstance(leaf, torch.Tensor):
                raise InputError(f"input `{want.name}` is a {type(leaf).__name__}; captured was a tensor {want.sizes}.")
            if leaf.dtype != want.sample.dtype or leaf.device.type != want.sample.device.type:
                raise InputError(
                    f"input `{want.name}` is {leaf.dtype} on {leaf.device}; captured was {want.sample.dtype} on "
                    f"{want.sample.device}. Convert the input, or convert the model and trace again."
                )
            if leaf.dim() != len(want.sizes) or not all(map(fits, leaf.shape, want.sizes)):
                raise InputError(
                    f"input `{want.name}` has shape {tuple(leaf.shape)}; captured was {list(want.sizes)} (a name is a "
                    "free size, the same name the same size). Trace again with these inputs, or with `dynamic_shapes`."
                )
            if want.alias != i and leaf is not leaves[want.alias]:
                raise InputError(
                    f"inputs `{want.name}` and `{self._expected[want.alias].name}` were one tensor at the capture and "
                    "are two now. Trace again with two tensors."
                )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the graph of the current mode on inputs of the captured structure, shapes and dtypes."""
        if not torch.compiler.is_compiling():
            self._check_inputs(args, kwargs)
        # torch.compile learns of the mode by this read: train and eval are two functions under one name
        assert self.training in (True, False)
        return super().__call__(*args, **kwargs)

    def run_example(self, mode: str = "eval") -> list[Any]:
        """The flat outputs of one mode's graph on the sample inputs, without gradients; leaves no trace.

        Mode, buffers and the random generator are as before afterwards.
        """
        training, buffers = self.training, {name: b.clone() for name, b in self.named_buffers()}
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                return pytree.tree_leaves(self.train(mode == "train")(*self.example_args, **self.example_kwargs))
        finally:
            self.train(training)
            for name, buffer in self.named_buffers():
                buffer.copy_(buffers[name])

    # ---- copies, conversions, checkpoints

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As in torch; the keys of legacy norms (`weight_g`, `weight_v`) and parametrizations stand for each other."""
        own, renamed = self.state_dict(), dict(state_dict)
        for name in own.keys() - renamed.keys():
            for hook, parametrization in _SPELLINGS:
                legacy = re.sub(rf"parametrizations\.([^.]+)\.{re.escape(parametrization)}$", rf"\1{hook}", name)
                current = re.sub(rf"([^.]+){hook}$", rf"parametrizations.\1.{parametrization}", name)
                for other in {legacy, current} & renamed.keys() - own.keys():
                    renamed[name] = renamed.pop(other)
        return super().load_state_dict(renamed, strict, assign)

    def __deepcopy__(self, memo: dict[int, Any]) -> TracedModule:
        root = Container()
        root.parameter_order, root.source_class, root._reads = self.parameter_order, self.source_class, self._reads
        for field in ("_parameters", "_buffers", "_non_persistent_buffers_set", "_modules"):
            getattr(root, field).update(copy.deepcopy(getattr(self, field), memo))
        clone = TracedModule(
            root,
            {mode: copy.deepcopy(graph) for mode, graph in self.graphs.items()},
            self.example_args,
            self.example_kwargs,
            self.dynamic_shapes,
            training=self.training,
        )
        clone.plan, clone.origin = self.plan, self.origin
        memo[id(self)] = clone
        return clone

    def __copy__(self) -> TracedModule:
        return copy.deepcopy(self)

    def __reduce__(self) -> Any:
        raise ArtifactError(
            "a traced module was to be pickled; pickles are not supported, since loading one runs code. "
            "Store it with fxprune.save, or keep `state_dict()`."
        )

    def _apply(self, fn: Any, recurse: bool = True) -> TracedModule:
        def kinds() -> tuple[set[torch.dtype], set[torch.device]]:
            tensors = [*self.parameters(), *self.buffers()]
            return {t.dtype for t in tensors if t.is_floating_point()}, {t.device for t in tensors}

        dtypes, devices = kinds()
        converts = {dtype: fn(torch.empty(0, dtype=dtype)).dtype for dtype in dtypes}
        for old, new in converts.items():
            for graph in self.graphs.values() if new != old else ():
                for node in graph.nodes:
                    if old in pytree.tree_leaves((node.args, node.kwargs)):
                        raise CaptureError(
                            f"the traced module was to be converted from {old} to {new}, but node {node.format_node()} "
                            f"has {old} written into the graph. Convert the model first, then trace it."
                        )
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        _, moved = kinds()
        if len(devices) == len(moved) == 1 and devices != moved:
            (old_device,), (new_device,) = devices, moved
            for graph in self.graphs.values():
                for node in graph.nodes:
                    node.args, node.kwargs = pytree.tree_map(
                        lambda a: new_device if isinstance(a, torch.device) and a == old_device else a,
                        (node.args, node.kwargs),
                    )
        self.example_args, self.example_kwargs = pytree.tree_map_only(
            torch.Tensor, lambda t: fn(t) if t.is_floating_point() or devices != moved else t,
            (self.example_args, self.example_kwargs),
        )  # fmt: skip
        self.recompile()
        return self
