"""`TracedModule`: a captured model, two graphs over one set of parameters."""

from __future__ import annotations

import copy
import keyword
import re
import weakref
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx, nn
from torch.fx.graph import PythonCode

from fxprune.errors import ArtifactError, CaptureError
from fxprune.graph.arguments import InputCheck
from fxprune.graph.plan import ChannelPlan
from fxprune.graph.snapshot import preserved
from fxprune.torch_internals import PyTreeCodeGen, state_of_generated_code

_KEYWORD_ATTRIBUTE = re.compile(r"\.(" + "|".join(k for k in keyword.kwlist if k.isidentifier()) + r")\b")


class CodeGen(PyTreeCodeGen):
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


# torch's names of the state of a norm: by its legacy hook, and as a parametrization
_SPELLINGS = (("_g", "original0"), ("_v", "original1"), ("_orig", "original"), ("_u", "0._u"), ("_v", "0._v"))


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
    input_check: InputCheck

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
                "input_check": InputCheck.of(self._graph, self.example_args, self.example_kwargs),
                **state_of_generated_code(self),
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

    # ---- running

    def check_inputs(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Raise InputError unless the current mode's graph holds for this call."""
        self.input_check(args, kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the graph of the current mode on inputs of the captured structure, shapes and dtypes."""
        if not torch.compiler.is_compiling():
            self.check_inputs(args, kwargs)
        # torch.compile learns of the mode by this read: train and eval are two functions under one name
        assert self.training in (True, False)
        return super().__call__(*args, **kwargs)

    def run_example(self, mode: str = "eval") -> list[Any]:
        """The flat outputs of one mode's graph on the sample inputs, without gradients; leaves no trace.

        Mode, buffers and the random generator are as before afterwards.
        """
        with preserved(self), torch.no_grad():
            torch.manual_seed(0)
            return pytree.tree_leaves(self.train(mode == "train")(*self.example_args, **self.example_kwargs))

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
