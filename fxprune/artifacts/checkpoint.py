"""Checkpoints: one file with every tensor, the plan and the graphs, written whole, read without unpickling objects."""

from __future__ import annotations

import copy
import hashlib
import io
import json
import os
import warnings
import zipfile
from collections.abc import Callable
from typing import Any

import safetensors.torch
import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn
from torch._export.verifier import TrainingIRVerifier
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.export import Dim, ExportedProgram, exported_program, graph_signature

from fxprune import driver
from fxprune.capture.front_end import trace, unlift
from fxprune.capture.programs import from_program, read_members, read_program, refuse_code
from fxprune.channels import ChannelPlan
from fxprune.errors import ArgumentError, ArgumentTypeError, ArtifactError, FxpruneError
from fxprune.files import atomic
from fxprune.graph.editing import erase_dead
from fxprune.graph.masks import masked
from fxprune.graph.names import exists, tensor_at
from fxprune.graph.reparametrizations import reparametrized
from fxprune.graph.traced import Container, TracedModule
from fxprune.version import __version__

FORMAT = 1
_HEADER, _TENSORS = "fxprune.json", "tensors.safetensors"
_INSERT: dict[str, Callable[..., TracedModule]] = {
    "insert-weight-norm": driver.weight_norm,
    "insert-spectral-norm": driver.spectral_norm,
}
_CPU = torch.device("cpu")
Json = dict[str, Any]
Tensors = dict[str, Tensor]


def save(traced: TracedModule, path: str | os.PathLike[str], *, programs: bool = True) -> None:
    """Write a traced or finalized module to one file, whole or not at all; `load` restores it.

    The file is an uncompressed zip archive: `fxprune.json` (names, order, masks and norms, plan, training mode,
    digests), `tensors.safetensors` (parameters, buffers, sample inputs), and for each mode a `torch.export` program
    without weights. An optimizer's state, schedulers and random generators are torch's own to save, beside it.

    Args:
        traced: what `trace`, `finalize` or `load` returned; unchanged.
        path: the file to write, any name.
        programs: whether to store the graphs. Without, the file is written faster, and `load` needs the model.

    Raises:
        ArgumentTypeError: `traced` is no traced module.
        ArtifactError: something in it has no stored form; names it.
        ExportError: the path cannot be written. What stood there before is unchanged.

    Example:
        >>> fxprune.save(traced, "model.fxp")
        >>> traced = fxprune.load("model.fxp")
    """
    if not isinstance(traced, TracedModule):
        raise ArgumentTypeError(f"save takes a traced module, got {type(traced).__name__}. Call fxprune.trace first.")
    blobs: Tensors = {}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch deprecates what it calls itself
            header = _describe(traced, blobs)
            members = {_TENSORS: safetensors.torch.save(blobs)}
            members |= {f"{mode}.pt2": _program(traced, mode) for mode in traced.modes if programs}
        header["sha256"] = {name: hashlib.sha256(content).hexdigest() for name, content in members.items()}
        members = {_HEADER: json.dumps(header).encode()} | members
    except Exception as error:  # whatever torch raises
        raise ArtifactError(
            f"the module cannot be stored: {type(error).__name__}: {str(error).partition(chr(10))[0]} Where a graph is "
            "the reason, programs=False stores everything else."
        ) from error
    with atomic(path) as name, zipfile.ZipFile(name, "w") as archive:
        for member, content in members.items():
            archive.writestr(zipfile.ZipInfo(member), content)  # without a date: equal modules give equal files


def load(path: str | os.PathLike[str], model: nn.Module | None = None) -> TracedModule:
    """Restore what `save` wrote: graphs, masks, norms, plan, training mode, every tensor; or an exported `.pt2`.

    No objects are unpickled and no code of the file runs: archives that would make torch do so are refused. The result
    is on the CPU, or on the device of `model`, and shares nothing with it.

    Args:
        path: a file of `save`, or a `.pt2` of `fxprune.export.to_program` or `torch.export.save` (its eval graph).
        model: None restores the graphs from the file, without the model's code. Else the dense model, which is traced
            with the stored sample inputs, or a `TracedModule` of it: the plan is carried out, masks and norms are
            inserted, then the tensors are loaded. It is left as it is.

    Returns:
        A new `TracedModule`.

    Raises:
        ArtifactError: the file is missing, damaged, of a later version, could run code, or belongs to another model
            (missing, unexpected and differing names are listed).
        ArgumentTypeError: `model` is no module. ArgumentError: the file needs a model, or must not get one.
        CaptureError: `model` cannot be traced.

    Example:
        >>> fxprune.save(traced, "model.fxp")
        >>> again = fxprune.load("model.fxp", model)  # for the same model, dense
    """
    if model is not None and not isinstance(model, nn.Module):
        raise ArgumentTypeError(f"load takes an nn.Module to load into, got {type(model).__name__}.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            members = read_members(path)
            if any(name.endswith("/archive_format") for name in members):
                if model is not None:
                    raise ArgumentError(f"'{path}' is a program, which is restored without a model: leave it out.")
                return from_program(read_program(path))
            header, blobs = _open(members)
            if model is None:
                if "eval.pt2" not in members and "train.pt2" not in members:
                    raise ArgumentError(f"'{path}' was saved with programs=False: give load the model, too.")
                return _from_file(header, members, blobs)
        return _from_model(header, blobs, model)
    except FxpruneError as error:
        error.add_note(f"while loading '{path}'")
        raise
    except OSError as error:
        raise ArtifactError(f"'{path}' was to be loaded and cannot be read: {error}.") from error
    except Exception as error:  # whatever damage makes torch, zipfile and json raise
        raise ArtifactError(
            f"'{path}' cannot be restored: {type(error).__name__}: {error}. A file that is truncated or altered must "
            "be written again; classes of its inputs and outputs must be imported first, and registered with "
            "torch.export.register_dataclass."
        ) from error


# ---- writing


def _describe(traced: TracedModule, blobs: Tensors) -> Json:
    """Everything about a module but its graphs; the tensors go to `blobs`."""

    def store(key: str, value: Tensor) -> None:
        blobs[key] = value.detach().cpu().clone(memory_format=torch.contiguous_format)

    first: dict[Any, str] = {}  # name of an object, and of a place in memory
    tensors: Json = {}
    for name, value in _state(traced):
        place = (value.data_ptr() or id(value), value.dtype, value.shape, value.stride())
        if place not in first:
            store(f"state:{name}", value)
        dense = value.untyped_storage().nbytes() == value.nbytes and not value.is_contiguous()
        tensors[name] = {
            "object": first.setdefault(id(value), name), "data": first.setdefault(place, name),
            "parameter": isinstance(value, nn.Parameter), "trained": value.requires_grad,
            "stride": value.stride() if dense else None,
        }  # fmt: skip
    paths: dict[nn.Module, str] = {}
    modules = []
    for path, module in traced.named_modules(remove_duplicate=False):
        if not isinstance(module, fx.GraphModule) or not path:  # the branches of control flow belong to the programs
            kinds = (c.__name__ for c in module.source_class.__mro__ if c is getattr(nn, c.__name__, None))  # type: ignore[union-attr]
            modules.append({
                "path": path, "same": paths.setdefault(module, path), "class": next(kinds, "Module"),
                "order": module.parameter_order, "reads": dict(module._reads),
                "options": dict(getattr(module, "options", {})), "loose": sorted(module._non_persistent_buffers_set),
                "parameters": {name: value is not None for name, value in module._parameters.items()},
                "buffers": {name: value is not None for name, value in module._buffers.items()},
            })  # fmt: skip
    inputs: dict[int, str] = {}

    def leaf(value: Any) -> Any:
        if isinstance(value, Tensor):
            store(name := inputs.setdefault(id(value), f"input:{len(inputs)}"), value)
            return [name]
        return value

    shapes = traced.dynamic_shapes
    if hasattr(shapes, "dynamic_shapes"):  # torch.export's collections
        shapes = shapes.dynamic_shapes(traced, traced.example_args, traced.example_kwargs)

    return {
        "format": FORMAT, "version": __version__, "training": traced.training, "modes": traced.modes,
        "graphs": {mode: _notes(graph) for mode, graph in traced.graphs.items()}, "modules": modules,
        "tensors": tensors, "masked": masked(traced), "reparametrized": reparametrized(traced),
        "inputs": _flattened((traced.example_args, traced.example_kwargs), leaf),
        "dynamic_shapes": _flattened(shapes, _dimension),
        "plan": traced.plan and traced.plan.to_json(),
    }  # fmt: skip


def _state(traced: nn.Module) -> list[tuple[str, Tensor]]:
    return [*traced.named_parameters(remove_duplicate=False), *traced.named_buffers(remove_duplicate=False)]


def _flattened(tree: Any, leaf: Callable[[Any], Any]) -> Json:
    leaves, spec = pytree.tree_flatten(tree)
    return {"spec": pytree.treespec_dumps(spec), "leaves": [leaf(value) for value in leaves]}


def _dimension(dim: Any) -> Any:
    """An entry of `torch.export`'s dynamic shapes as data."""
    if dim is None or isinstance(dim, int | str):
        return dim
    if hasattr(dim, "root"):  # a multiple of another one, plus a number
        return [_dimension(dim.root), dim.fn(1) - dim.fn(0), dim.fn(0)]
    name = {"hint": dim.type.name} if isinstance(dim, type(Dim.AUTO)) else {"name": dim.__name__}
    return name | {"min": dim.min, "max": dim.max if isinstance(dim.max, int) else None}


def _notes(graph: fx.Graph) -> Json:
    """What torch's programs do not keep: the names of the inputs, and which nodes stand for parameters."""
    origins = {_key(node): node.meta["fxprune"] for node in graph.nodes if "fxprune" in node.meta}
    inputs = [node.name for node in graph.find_nodes(op="placeholder")]
    return {"arguments": graph._codegen.pytree_info.orig_args, "inputs": inputs, "origins": origins}  # type: ignore[attr-defined]


def _key(node: fx.Node) -> str:
    return str(node.target) if node.op == "get_attr" else f"%{node.name}"


def _program(traced: TracedModule, mode: str) -> bytes:
    """One mode's graph as a `torch.export` program on the CPU, its weights replaced by single zeros."""
    info = traced.graphs[mode]._codegen.pytree_info  # type: ignore[attr-defined]
    graph, root = copy.deepcopy(traced.graphs[mode]), nn.Module()
    fakes = [node.meta["val"] for node in graph.nodes if isinstance(node.meta.get("val"), FakeTensor)]
    tensor, constant = graph_signature.TensorArgument, graph_signature.ConstantArgument
    fake: Any = fakes[0].fake_mode if fakes else FakeTensorMode()
    state, reads, ranges = Tensors(), dict[str, fx.Node](), dict[Any, Any]()

    def moved(value: Tensor) -> FakeTensor:
        empty = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
        return FakeTensor(fake, empty.requires_grad_(value.requires_grad), _CPU)

    def strip(nodes: fx.graph._node_list) -> None:  # the rest is of no use, and has paths of this machine's sources
        for node in nodes:
            meta = {k: v for k, v in node.meta.items() if k in ("val", "nn_module_stack", "unbacked_bindings")}
            node.meta = pytree.tree_map_only(FakeTensor, moved, meta)
            node.args, node.kwargs = pytree.tree_map_only(torch.device, lambda _: _CPU, (node.args, node.kwargs))

    strip(graph.nodes)
    for node in reversed(graph.find_nodes(op="get_attr")):
        target = str(node.target)
        if isinstance(body := getattr(traced, target, None), fx.GraphModule):
            node.target = target.removeprefix(f"_{mode}_")
            root.add_module(node.target, body := copy.deepcopy(body))
            for part in body.modules():
                strip(part.graph.nodes)  # type: ignore[union-attr, arg-type]
            continue
        if target not in reads:
            value = tensor_at(traced, target).detach()
            with graph.inserting_before():  # in front of the inputs
                reads[target] = graph.placeholder(f"p{len(reads)}")
            reads[target].meta["val"] = moved(value)
            zero = torch.zeros((1,) * value.dim(), dtype=value.dtype)
            state[target] = zero.expand(value.shape) if value.numel() else value.cpu()
        node.replace_all_uses_with(reads[target])
        graph.erase_node(node)
    targets = {node: target for target, node in reads.items()}
    buffer, given = graph_signature.InputKind.BUFFER, graph_signature.InputKind.USER_INPUT
    inputs = []
    for node in graph.find_nodes(op="placeholder"):
        value, source = node.meta.get("val"), targets.get(node)
        argument = tensor(node.name) if isinstance(value, Tensor) else constant(node.name, value)
        inputs.append(graph_signature.InputSpec(buffer if source else given, argument, source, bool(source) or None))
        for size in value.shape if isinstance(value, Tensor) else ():
            if isinstance(size, torch.SymInt):
                ranges |= {symbol: fake.shape_env.var_to_range[symbol] for symbol in size.node.expr.free_symbols}
    leaves: Any = graph.output_node().args[0]
    results = [tensor(leaf.name) if isinstance(leaf, fx.Node) else constant("", leaf) for leaf in leaves]
    outputs = [graph_signature.OutputSpec(graph_signature.OutputKind.USER_OUTPUT, r, None) for r in results]
    call = exported_program.ModuleCallSignature([], [], info.in_spec, info.out_spec)
    program = ExportedProgram(
        root, graph, graph_signature.ExportGraphSignature(inputs, outputs), state, ranges,
        [exported_program.ModuleCallEntry("", call)],
        verifiers=[TrainingIRVerifier],
    )  # fmt: skip
    torch.export.save(program, file := io.BytesIO())
    return file.getvalue()


# ---- reading


def _open(members: dict[str, bytes]) -> tuple[Json, Tensors]:
    """The header and the stored tensors, after every check that needs no model."""
    if odd := [name for name in members if name not in (_HEADER, _TENSORS, "train.pt2", "eval.pt2")]:
        raise ArtifactError(f"the archive has members that no checkpoint has: {', '.join(map(repr, odd[:5]))}.")
    header = json.loads(members[_HEADER])
    if header["format"] > FORMAT:
        raise ArtifactError(
            f"a checkpoint of format {header['format']}, written by fxprune {header['version']}; this version reads up "
            f"to {FORMAT}. Update fxprune."
        )
    for name, digest in header["sha256"].items():
        if hashlib.sha256(members.get(name, b"")).hexdigest() != digest:
            raise ArtifactError(f"{name} is not what was written: {'altered' if name in members else 'missing'}.")
    refuse_code([header[part]["spec"] for part in ("inputs", "dynamic_shapes")])
    return header, safetensors.torch.load(members[_TENSORS])


def _tensors(header: Json, blobs: Tensors, device: torch.device) -> Tensors:
    """Parameters and buffers by name, shared as they were."""
    data, objects = Tensors(), Tensors()
    for entry in header["tensors"].values():
        if entry["data"] not in data:
            data[entry["data"]] = value = blobs[f"state:{entry['data']}"].to(device)
            if entry["stride"] is not None:
                empty = torch.empty_strided(value.shape, entry["stride"], dtype=value.dtype, device=device)
                data[entry["data"]] = empty.copy_(value)
        if entry["object"] not in objects:
            value = data[entry["data"]].detach()
            objects[entry["object"]] = nn.Parameter(value, entry["trained"]) if entry["parameter"] else value
    return {name: objects[entry["object"]] for name, entry in header["tensors"].items()}


def _sample(header: Json, blobs: Tensors, device: torch.device) -> tuple[Any, Any, Any]:
    """The sample inputs, by position and by name, and the dynamic shapes."""
    inputs = {name: value.to(device) for name, value in blobs.items() if name.startswith("input:")}
    dims: Json = {}

    def dimension(stored: Any) -> Any:
        if isinstance(stored, list):
            return dimension(stored[0]) * stored[1] + stored[2]
        if not isinstance(stored, dict):
            return stored
        bounds = {"min": stored["min"], "max": stored["max"]}
        if "name" in stored:
            return dims.setdefault(stored["name"], Dim(stored["name"], **bounds))
        hint = getattr(Dim, stored["hint"])
        return hint if bounds == {"min": None, "max": None} else hint(**bounds)

    def unflattened(stored: Json, leaf: Callable[[Any], Any]) -> Any:
        return pytree.tree_unflatten(map(leaf, stored["leaves"]), pytree.treespec_loads(stored["spec"]))

    args, kwargs = unflattened(header["inputs"], lambda leaf: inputs[leaf[0]] if isinstance(leaf, list) else leaf)
    return args, kwargs, unflattened(header["dynamic_shapes"], dimension)


def _fill(module: nn.Module, entry: Json, state: Tensors) -> None:
    """Give a module its parameters and buffers, in the order of the file."""
    prefix = f"{entry['path']}." if entry["path"] else ""
    for kind, names in ((module._parameters, entry["parameters"]), (module._buffers, entry["buffers"])):
        kind.clear()
        kind.update({name: state[prefix + name] if present else None for name, present in names.items()})


def _from_file(header: Json, members: dict[str, bytes], blobs: Tensors) -> TracedModule:
    containers: dict[str, Container] = {}
    state, graphs = _tensors(header, blobs, _CPU), {}
    for entry in header["modules"]:
        path = entry["path"]
        if entry["same"] == path:
            containers[path] = new = Container()
            new.parameter_order, new._reads, new.options = tuple(entry["order"]), entry["reads"], entry["options"]
            new.source_class = getattr(nn, entry["class"])
            new._non_persistent_buffers_set.update(entry["loose"])
            _fill(new, entry, state)
        if path:
            parent, _, name = path.rpartition(".")
            containers[path] = containers[parent]._modules[name] = containers[entry["same"]]
    for mode in header["modes"]:
        notes = header["graphs"][mode]
        program = read_program(io.BytesIO(members[f"{mode}.pt2"]))
        graphs[mode] = graph = unlift(program, containers[""], mode, notes["arguments"], lambda value, name: name)
        for node, name in zip(graph.find_nodes(op="placeholder"), notes["inputs"], strict=True):
            node.name = node.target = name
        nodes = {_key(node): node for node in graph.nodes}
        for key, origin in notes["origins"].items():
            nodes[key].meta["fxprune"] = origin
        erase_dead(graph)
    traced = TracedModule(containers[""], graphs, *_sample(header, blobs, _CPU), training=header["training"])
    traced.plan = ChannelPlan.from_json(header["plan"]) if header["plan"] else None
    return traced


def _from_model(header: Json, blobs: Tensors, model: nn.Module) -> TracedModule:
    device = next((p.device for p in model.parameters()), _CPU)
    state = _tensors(header, blobs, device)
    for name, value in _state(model):
        if name in state and value.dtype != state[name].dtype:
            raise ArtifactError(f"{name!r} is {state[name].dtype} in the file and {value.dtype} in the model.")
    with torch.random.fork_rng(devices=[]):  # norms draw their first vectors, which are then overwritten
        if not isinstance(model, TracedModule):
            args, kwargs, shapes = _sample(header, blobs, device)
            model = trace(model, args, kwargs, dynamic_shapes=shapes, modes=header["modes"])
        traced = copy.deepcopy(model)
        try:
            if header["plan"]:
                traced = driver.finalize(traced, plan=ChannelPlan.from_json(header["plan"]), verify=False)
            while alien := [name for name in reparametrized(traced) if name not in header["reparametrized"]]:
                driver.fold(traced, alien[0])
            _insert(traced, header, state)
        except ArtifactError:
            raise
        except FxpruneError as error:
            raise ArtifactError(
                f"the file's plan, masks or norms do not fit the model: {error} A module that was finalized more than "
                "once is restored without a model only."
            ) from error
    found = {name: tuple(value.shape) for name, value in _state(traced)}
    wanted = {name: tuple(value.shape) for name, value in state.items()}
    differ = [f"missing in the file: {n}" for n in found if n not in wanted]
    differ += [f"missing in the model: {n}" for n in wanted if n not in found]
    differ += [f"{n} is {wanted[n]} in the file, {s} in the model" for n, s in found.items() if wanted.get(n, s) != s]
    differ += [f"captured in {header['modes']} and {list(traced.modes)}"] * (set(header["modes"]) != set(traced.modes))
    if differ:
        raise ArtifactError(
            f"the file belongs to another model: {'; '.join(differ[:12])}{'; and so on' * (len(differ) > 12)}. Build "
            "the model as it was when it was traced, or load without one."
        )
    for entry in header["modules"]:
        _fill(traced.get_submodule(entry["same"]), entry | {"path": entry["same"]}, state)
    traced.origin = None
    return traced.train(header["training"])


def _insert(traced: TracedModule, header: Json, state: Tensors) -> None:
    """Insert the masks and norms of the file that the module lacks; one may stand on what another one made."""
    options = {entry["path"]: entry["options"] for entry in header["modules"]}
    left = set(header["reparametrized"]) - set(reparametrized(traced))
    while left:
        ready = [n for n in left if exists(traced, n) and isinstance(tensor_at(traced, n), nn.Parameter)]
        if not ready:
            raise ArtifactError(f"the model has no parameter {', '.join(sorted(left))}, which the file changes.")
        for name in sorted(ready):
            path, _, tensor = name.rpartition(".")
            chosen = dict(options.get(f"{path}.parametrizations.{tensor}".removeprefix("."), {}))
            if name in header["masked"]:
                driver.insert_masks(traced, {name: state[f"{name}_mask"]})
            elif chosen:
                _INSERT[chosen.pop("kind")](traced, name, **chosen)
            else:
                raise ArtifactError(
                    f"{name!r} carries a parametrization of the model's own, which cannot be inserted. Build the model "
                    "with it, as it was when it was traced, or load without a model."
                )
        left -= set(ready)
