"""What a checkpoint says of a module beside its tensors and graphs: records, and their form as JSON."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch.utils._pytree as pytree

FORMAT = 1
HEADER, TENSORS = "fxprune.json", "tensors.safetensors"  # the members of a file, beside its programs
Json = dict[str, Any]


def program_member(mode: str) -> str:
    """The member that holds the graph of a mode."""
    return f"{mode}.pt2"


@dataclass(frozen=True)
class StoredTensor:
    """A parameter or buffer under one of its names.

    `object` is the first name of the same object, `data` the first name of the same place in memory, under which the
    values are stored. `stride` is None for what is contiguous.
    """

    object: str
    data: str
    parameter: bool
    trained: bool
    stride: tuple[int, ...] | None


@dataclass(frozen=True)
class StoredModule:
    """A container under one of its paths; `same` is the first path of the same one.

    `kind` is the nearest class of `torch.nn` to the eager module's, `loose` the buffers that state dicts leave out.
    `parameters` and `buffers` say, in order, which names there are and whether they hold a tensor. The others are
    attributes of its provenance; `masked` is left out where there are none.
    """

    path: str
    same: str
    kind: str
    order: tuple[str, ...]
    reads: dict[str, int]
    options: Json
    loose: list[str]
    parameters: dict[str, bool]
    buffers: dict[str, bool]
    masked: tuple[str, ...] = ()

    @property
    def is_first(self) -> bool:
        """Whether this is the path that the container is built under."""
        return self.path == self.same

    def to_json(self) -> Json:
        """The record as JSON holds it."""
        fields = {"class" if name == "kind" else name: value for name, value in asdict(self).items()}
        if not self.masked:
            del fields["masked"]
        return fields

    @classmethod
    def from_json(cls, entry: Json) -> StoredModule:
        """Read what `to_json` gave."""
        fields = {"kind" if name == "class" else name: value for name, value in entry.items()}
        return cls(**fields | {"order": tuple(fields["order"]), "masked": tuple(fields.get("masked", ()))})


@dataclass(frozen=True)
class StoredGraph:
    """What torch's programs do not keep of a graph.

    `arguments` are the names of what the module is called with, `inputs` those of the nodes. `origins` says which nodes
    stand for a parameter, by `node_key`.
    """

    arguments: list[str]
    inputs: list[str]
    origins: dict[str, dict[str, str]]


@dataclass(frozen=True)
class StoredTree:
    """Nested inputs or sizes: torch's description of the structure, and the leaves as data."""

    spec: str
    leaves: list[Any]

    @classmethod
    def of(cls, tree: Any, leaf: Callable[[Any], Any]) -> StoredTree:
        """Flatten a tree; `leaf` makes data of a leaf."""
        leaves, spec = pytree.tree_flatten(tree)
        return cls(pytree.treespec_dumps(spec), [leaf(value) for value in leaves])

    def tree(self, leaf: Callable[[Any], Any]) -> Any:
        """The tree again; `leaf` is the way back from the data."""
        return pytree.tree_unflatten(map(leaf, self.leaves), pytree.treespec_loads(self.spec))


@dataclass(frozen=True)
class Header:
    """All that a checkpoint says of a module beside its tensors and graphs.

    `masked` and `reparametrized` are names of parameters, `plan` is the JSON text of a channel plan, and `sha256` has
    the digest of every other member of the file. `decided` are axes of parameters and `made_biases` parameters, as in
    `TracedModule`; they are left out where there are none. `hollow` has the shapes and types of tensors whose values
    stand elsewhere.
    """

    version: str
    training: bool
    modes: tuple[str, ...]
    graphs: dict[str, StoredGraph]
    modules: list[StoredModule]
    tensors: dict[str, StoredTensor]
    masked: list[str]
    reparametrized: list[str]
    inputs: StoredTree
    dynamic_shapes: StoredTree
    plan: str | None
    sha256: dict[str, str]
    decided: tuple[tuple[str, int], ...] = ()
    made_biases: dict[str, str] = field(default_factory=dict)
    hollow: dict[str, tuple[list[int], str]] = field(default_factory=dict)

    def to_json(self) -> str:
        """The header as JSON text."""
        modules = [module.to_json() for module in self.modules]
        fields = {"format": FORMAT} | asdict(self) | {"modules": modules}
        for name in ("decided", "made_biases", "hollow"):
            if not fields[name]:
                del fields[name]
        return json.dumps(fields)

    @classmethod
    def from_json(cls, data: Json) -> Header:
        """Read the parsed text of `to_json`; raises KeyError, TypeError or AttributeError where it is damaged."""
        fields = {name: value for name, value in data.items() if name != "format"}
        return cls(
            **fields
            | {
                "modes": tuple(data["modes"]),
                "graphs": {mode: StoredGraph(**graph) for mode, graph in data["graphs"].items()},
                "modules": [StoredModule.from_json(module) for module in data["modules"]],
                "tensors": {name: StoredTensor(**tensor) for name, tensor in data["tensors"].items()},
                "inputs": StoredTree(**data["inputs"]),
                "dynamic_shapes": StoredTree(**data["dynamic_shapes"]),
                "decided": tuple((name, int(axis)) for name, axis in data.get("decided", ())),
            }
        )
