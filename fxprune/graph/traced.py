"""`TracedModule`: a captured model, two graphs over one set of parameters."""

from __future__ import annotations

import copy
import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn
from torch.fx.graph import PythonCode

from fxprune.errors import ArgumentError, ArtifactError, CaptureError, ExportError, FxpruneWarning
from fxprune.graph.arguments import InputCheck
from fxprune.graph.attributes import absent, check_unseen
from fxprune.graph.calls import cloned
from fxprune.graph.containers import Container, ReadByName, share_contents
from fxprune.graph.names import join
from fxprune.graph.parts import adopt, refuse_replacement
from fxprune.graph.plan import ChannelPlan
from fxprune.graph.provenance import provenance_of, set_provenance
from fxprune.graph.shape_check import ShapeCheck
from fxprune.graph.snapshot import preserved
from fxprune.graph.spellings import respelled
from fxprune.graph.states import check_state
from fxprune.graph.switching import is_frozen, read_option, set_option, switch
from fxprune.sharding import gathered, is_managed, spread_state
from fxprune.torch_internals import calls_kept, state_of_generated_code

# The order in which graphs are kept and worked on: what is decided by the eval graph, the train graph follows.
MODES = ("eval", "train")


@dataclass(frozen=True)
class Origin:
    """What one call of `finalize` did, for whoever carries something over to its result.

    Attributes:
        plan: the channel plan that it carried out, None where nothing was removed.
        sources: by the name that it has in the result, each parameter of the module that was finalized.
    """

    plan: ChannelPlan | None
    sources: Mapping[str, weakref.ref[nn.Parameter]]


@dataclass(frozen=True)
class _Generated:
    """What was generated for one mode: code, the class's forward, the check of inputs, and torch's own attributes."""

    code: PythonCode
    forward: Callable[..., Any]
    input_check: InputCheck
    shape_check: ShapeCheck
    attributes: Mapping[str, Any]


class TracedModule(ReadByName, fx.GraphModule):
    """A model captured by `fxprune.trace`: a `torch.fx.GraphModule` that holds one graph per captured mode.

    Parameters and buffers keep eager's names and are the same objects as the source model's. `train()` and
    `eval()` select the graph; `graph` and `code` show the selected one.

    Attributes:
        graphs: the graphs by mode, "eval" and "train" in this order (those that were captured).
        dynamic_shapes: `torch.export`'s structure of the dynamic axes, None when every size is fixed.
    """

    graphs: dict[str, fx.Graph]
    dynamic_shapes: Any
    _python_code: PythonCode
    _selected: _Generated
    _generated: dict[str, _Generated]
    _examples: tuple[tuple[Any, ...], dict[str, Any]]
    _plan: ChannelPlan | None
    _origin: Origin | None
    _decided: frozenset[tuple[str, int]]
    _decided_by: object
    _made_biases: Mapping[str, str]
    _expected: list[Callable[[], Callable[[], str] | None]]

    def __init__(
        self,
        root: nn.Module,
        graphs: Mapping[str, fx.Graph],
        example_args: tuple[Any, ...],
        example_kwargs: Mapping[str, Any],
        dynamic_shapes: Any,
        *,
        training: bool,
    ) -> None:
        super().__init__(nn.Module(), fx.Graph(), "TracedModule")
        share_contents(self, root)
        set_provenance(self, provenance_of(root))
        self._generated, self._expected = {}, []
        self.graphs = {mode: graphs[mode] for mode in MODES if mode in graphs}
        for graph in self.graphs.values():
            graph.owning_module = self
        self._examples = (example_args, dict(example_kwargs))
        self.dynamic_shapes = dynamic_shapes
        self.record(None)
        self.decide(())
        self.make({})
        self.training = training
        adopt(self, self)
        self._select_any()

    @property
    def example_args(self) -> tuple[Any, ...]:
        """The sample inputs of the capture by position; `set_examples` replaces them."""
        return self._examples[0]

    @property
    def example_kwargs(self) -> dict[str, Any]:
        """The sample inputs of the capture by name, in the order of the captured signature."""
        return self._examples[1]

    def set_examples(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Replace the sample inputs by others of the captured structure, such as those of another dtype or device."""
        self._examples = (args, dict(kwargs))
        self.recompile()

    @property
    def plan(self) -> ChannelPlan | None:
        """What was removed by `finalize`, now or before this module was copied or loaded; None where nothing was."""
        return self._plan

    @property
    def origin(self) -> Origin | None:
        """What the call of `finalize` did that gave this very module; None for every other module."""
        return self._origin

    def record(self, plan: ChannelPlan | None, origin: Origin | None = None) -> None:
        """Say what was removed, and what the module comes from; for those who finalize and restore modules."""
        self._plan, self._origin = plan, origin

    @property
    def decided(self) -> frozenset[tuple[str, int]]:
        """Parameters and axes whose counts of channels were decided with their masks: `finalize` rounds no further."""
        return self._decided

    @property
    def decided_by(self) -> object:
        """What the last of them was decided by, for those who choose channels; None where that is not known."""
        return self._decided_by

    def decide(self, axes: Iterable[tuple[str, int]], by: object = None) -> None:
        """Say which counts of channels are decided, and by what, instead of what was said before."""
        self._decided, self._decided_by = frozenset(axes), by

    @property
    def made_biases(self) -> Mapping[str, str]:
        """By its name, each bias that `reconstruct` made for a layer that had none, and the weight of the layer."""
        return self._made_biases

    def make(self, biases: Mapping[str, str]) -> None:
        """Say which biases were made, instead of what was said before."""
        self._made_biases = dict(biases)

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
        for module in self.modules():
            vars(module)["training"] = mode and not is_frozen(module)
        self._select(name)
        return self

    def switch(self, part: nn.Module, mode: bool) -> None:
        """Let the train graph compute one module below as in eval mode, or as in train mode again.

        What `traced.bn.eval()` and `traced.bn.train()` do: a batch norm uses its running statistics and leaves them as
        they are, dropouts are off. It stays so, through `train()` and `eval()` of the whole, copies, `finalize`, `save`
        and `load`, until that module's own `train()`. Eval mode of the whole is eval mode of all.

        Raises:
            CaptureError: the graph cannot express it: the module's forward runs other operators in train mode; or train
                mode of one module was asked for while the whole is in eval mode. Nothing has changed then.
        """
        if mode and not self.training and not is_frozen(part):
            raise CaptureError(
                "one module of a traced one was to be in train mode while the whole is in eval mode. Call "
                "traced.train(), and eval() of the modules that are to stay in eval mode."
            )
        switch(self, self.graphs, part, mode)
        for module in part.modules():
            vars(module)["training"] = mode and self.training
        self.recompile()

    def set_option(self, part: nn.Module, name: str, value: Any) -> None:
        """Set a number of a module below in every graph: what `traced.drop.p = 0.1` does.

        `p` of dropouts, `momentum` and `eps` of norms.

        Raises:
            CaptureError: the graphs have no such number of it. ArgumentError: the value is none for it.
        """
        if isinstance(value, nn.Module) or isinstance(part._modules.get(name), nn.Module):
            path = next(path for path, module in self.named_modules() if module is part)
            refuse_replacement(join(path, name))
        set_option(self, self.graphs, part, name, value)
        self.recompile()

    def option_of(self, part: nn.Module, name: str) -> float:
        """A number of a module below, as its calls have it: what `traced.drop.p` does.

        Raises:
            NameLookupError: the graphs have none, or several.
        """
        value = read_option(self, self.graphs, part, name)
        if value is None:
            raise absent(self, part, name, provenance_of(part).attributes)
        return value

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or "_selected" not in vars(self):
                raise
        raise absent(self, self, name, provenance_of(self).attributes)

    def get_parameter(self, target: str) -> nn.Parameter:
        """As in torch; the NameLookupError that it raises is an AttributeError, and has the names that may be meant."""
        try:
            return super().get_parameter(target)
        except AttributeError as error:
            raise absent(self, self, target, {}) from error

    def __setattr__(self, name: str, value: Any) -> None:
        if "_selected" not in vars(self):
            super().__setattr__(name, value)
        elif name == "training":
            if value != self.training:
                self.train(value)
        elif isinstance(self._modules.get(name), nn.Module) and value is not self._modules[name]:
            refuse_replacement(name)
        else:
            if not hasattr(type(self), name) and name not in vars(self):
                check_unseen(provenance_of(self).attributes, name, value)
            super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        if isinstance(self._modules.get(name), Container) and self._reads_below(name):
            raise ArgumentError(
                f"the module {name!r} of a traced module was to be deleted, while its graphs read its parameters. "
                "Change the eager model, and trace that again."
            )
        super().__delattr__(name)

    def _reads_below(self, path: str) -> bool:
        reads = (node for graph in self.graphs.values() for node in graph.find_nodes(op="get_attr"))
        return any(str(node.target).startswith(f"{path}.") for node in reads)

    def expect_use(self, unused: Callable[[], Callable[[], str] | None]) -> None:
        """Let `finalize` ask whether what was made for this module was used.

        Args:
            unused: a weak reference to a function that gives what to say where it was not, else an empty text.
        """
        self._expected.append(unused)

    def told_unused(self) -> list[str]:
        """What was made for this module, still exists, and was not used."""
        told = (function() for reference in self._expected if (function := reference()))
        return [text for text in told if text]

    def keep_modes(self, *modes: str) -> None:
        """Drop the graphs of all other modes, and select one of those that are left."""
        self.graphs = {mode: graph for mode, graph in self.graphs.items() if mode in modes}
        self._generated = {mode: kept for mode, kept in self._generated.items() if mode in modes}
        self._select_any()

    def _select_any(self) -> None:
        """Select the mode that the module is in, another one where that has no graph."""
        mode = "train" if self.training else "eval"
        self.train((mode if mode in self.graphs else next(iter(self.graphs))) == "train")

    def _select(self, mode: str) -> None:
        if mode not in self._generated:
            self._graph = self.graphs[mode]
            with calls_kept(self):
                code = super().recompile()
            check = InputCheck.of(self._graph, *self._examples)
            shapes = ShapeCheck.of(self, self._graph)
            self._generated[mode] = _Generated(code, type(self).forward, check, shapes, state_of_generated_code(self))
        self._selected = selected = self._generated[mode]
        self._python_code = selected.code
        type(self).forward = selected.forward  # torch makes a class for each object
        vars(self).update(selected.attributes)

    def recompile(self) -> PythonCode:
        """Regenerate the code of every mode; call it after editing a graph."""
        if "graphs" not in self.__dict__:
            return super().recompile()
        adopt(self, self)
        self._generated.clear()
        self._select("train" if self.training else "eval")
        return self._python_code

    # ---- running

    def check_inputs(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Raise InputError unless the current mode's graph holds for this call."""
        self.input_check(args, kwargs)

    def check_shapes(self) -> None:
        """Raise ArgumentError where a parameter or buffer has another shape than the current mode's graph holds for."""
        ShapeCheck.of(self, self.graph)()  # graphs may have been edited since code was generated

    @property
    def input_check(self) -> InputCheck:
        """What the inputs of the current mode's graph must be."""
        return self._selected.input_check

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the graph of the current mode on inputs of the captured structure, shapes and dtypes."""
        if not torch.compiler.is_compiling():
            self.check_inputs(args, kwargs)
            self._selected.shape_check()
        # torch.compile learns of the mode by this read: train and eval are two functions under one name
        assert self.training in (True, False)
        if not is_managed(self):
            return super().__call__(*args, **kwargs)
        with gathered(self):
            return super().__call__(*args, **kwargs)

    def run_example(self, mode: str = "eval") -> list[Any]:
        """The flat outputs of one mode's graph on the sample inputs, without gradients; leaves no trace.

        Mode, buffers and the random generator are as before afterwards.
        """
        with preserved(self), torch.no_grad():
            torch.manual_seed(0)
            args, kwargs = cloned((self.example_args, self.example_kwargs))  # a model may write into its inputs
            return pytree.tree_leaves(self.train(mode == "train")(*args, **kwargs))

    # ---- copies, conversions, checkpoints

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As in torch; the keys of legacy norms (`weight_g`, `weight_v`) and parametrizations stand for each other.

        Raises:
            StateDictError: names or shapes differ; nothing was loaded then. ArgumentTypeError: it is no state dict.
            ShardingError: plain tensors for sharded ones are not the same on every process; nothing was loaded then.
        """
        own = self.state_dict()
        given = respelled(state_dict, own.keys()) if isinstance(state_dict, Mapping) else state_dict
        check_state(given, own, strict=strict, is_finalized=self.plan is not None)
        return super().load_state_dict(spread_state(given, own), strict, assign)

    def __deepcopy__(self, memo: dict[int, Any]) -> TracedModule:
        root = Container(provenance_of(self))
        for field in ("_parameters", "_buffers", "_non_persistent_buffers_set", "_modules"):
            getattr(root, field).update(copy.deepcopy(getattr(self, field), memo))
        graphs = {mode: copy.deepcopy(graph) for mode, graph in self.graphs.items()}
        clone = TracedModule(root, graphs, *self._examples, self.dynamic_shapes, training=self.training)
        clone.record(self.plan, self.origin)
        clone.decide(self.decided, self.decided_by)
        clone.make(self.made_biases)
        memo[id(self)] = clone
        return clone

    def __copy__(self) -> TracedModule:
        return copy.deepcopy(self)

    def __prepare_scriptable__(self) -> Any:
        raise ExportError(
            "a traced module was to be scripted by torch.jit.script, which reads no generated code. Write TorchScript "
            "by fxprune.export.to_torchscript(final, 'model.pt')."
        )

    def __reduce__(self) -> Any:
        raise ArtifactError(
            "a traced module was to be pickled; pickles are not supported, since loading one runs code. "
            "Store it with fxprune.save, or keep `state_dict()`."
        )

    def apply(self, fn: Callable[[nn.Module], None]) -> Any:
        """As in torch; the modules below are of none of torch's layers.

        Warns:
            FxpruneWarning: `fn` changed nothing, as one that asks for classes of layers.
        """
        before = self._touched()
        result = super().apply(fn)
        if self._touched() == before:
            warnings.warn(
                "apply changed nothing of a traced module. The modules below it are of no layer's class: what asks by "
                "isinstance is applied to the eager model before fxprune.trace, or by name, over named_parameters(); "
                "batch norms are frozen by fxprune.freeze_batch_norms.",
                FxpruneWarning,
                stacklevel=2,
            )
        return result

    def _touched(self) -> list[Any]:
        """What changes when a tensor is written to or replaced, or a mode or flag is set."""
        tensors = [*self.parameters(), *self.buffers()]
        modes = [module.training for module in self.modules()]
        return [*((id(t), t.data_ptr(), t._version, t.requires_grad) for t in tensors), modes]

    def _apply(self, fn: Any, recurse: bool = True) -> TracedModule:
        dtypes, devices = self._dtypes(), self._devices()
        for dtype in dtypes:
            self._refuse_written(dtype, fn(torch.empty(0, dtype=dtype)).dtype)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        has_moved = self._devices() != devices
        if has_moved and len(devices) == len(self._devices()) == 1:
            self._move_constants(devices.pop(), self._devices().pop())

        def converted(tensor: Tensor) -> Tensor:
            converted_tensor: Tensor = fn(tensor) if tensor.is_floating_point() or has_moved else tensor
            return converted_tensor

        self.set_examples(*pytree.tree_map_only(Tensor, converted, self._examples))
        return self

    def _dtypes(self) -> set[torch.dtype]:
        return {t.dtype for t in (*self.parameters(), *self.buffers()) if t.is_floating_point()}

    def _devices(self) -> set[torch.device]:
        return {t.device for t in (*self.parameters(), *self.buffers())}

    def _refuse_written(self, old: torch.dtype, new: torch.dtype) -> None:
        """Raise where a conversion from one dtype to another would leave the old one written in a graph."""
        for node in (node for graph in self.graphs.values() for node in graph.nodes if new != old):
            if old in pytree.tree_leaves((node.args, node.kwargs)):
                raise CaptureError(
                    f"the traced module was to be converted from {old} to {new}, but node {node.format_node()} "
                    f"has {old} written into the graph. Convert the model first, then trace it."
                )

    def _move_constants(self, old: torch.device, new: torch.device) -> None:
        """Write another device into the graphs."""

        def moved(argument: Any) -> Any:
            return new if isinstance(argument, torch.device) and argument == old else argument

        for node in (node for graph in self.graphs.values() for node in graph.nodes):
            node.args, node.kwargs = pytree.tree_map(moved, (node.args, node.kwargs))
