"""Torch-Pruning on a model of `libraries.py`: cut to about 0.7 of the MACs, run, and compared with what it was.

Its pruner by the L2 norm is used as its readme has it: all layers compared, but those whose results are the outputs.
It goes in steps until few enough MACs are left. What it cut is set to zero in a copy of the dense model, entry by
entry, and both are run in float64: exact removal computes the same.

Where that fails, it is told what its transformer examples tell it by hand: how many heads the layers before an
attention have; and the sizes of heads that modules keep as numbers are set to what is left.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.utils._pytree as pytree
import torch_pruning
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fxprune.graph.equality import error

SHARE = 0.7
RAN = re.compile(r", (equal|differs by \S+)$")
STEPS = 16  # to a ratio of 0.8, until the MACs are few enough
LAYERS = (nn.Linear, nn.modules.conv._ConvNd)
HEADS = ("num_attention_heads", "num_heads", "n_heads", "n_head", "heads", "nb_heads")
SHARED_HEADS = ("num_key_value_heads", "num_kv_heads", "kv_heads")
QUERIES = {"q", "query", "q_proj", "to_q", "q_lin", "wq", "query_proj", "qkv", "query_key_value", "qkv_proj", "to_qkv"}
KEYS = {
    "k",
    "v",
    "key",
    "value",
    "k_proj",
    "v_proj",
    "to_k",
    "to_v",
    "k_lin",
    "v_lin",
    "wk",
    "wv",
    "key_proj",
    "value_proj",
}
HEAD_SIZES = ("attention_head_size", "head_dim", "head_size", "dim_per_head", "d_kv", "key_value_proj_dim", "dim_head")
INNER_SIZES = (
    "all_head_size",
    "inner_dim",
    "attn_dim",
    "embed_dim",
    "hidden_size",
    "dim",
    "split_size",
    "attention_dim",
)
Tensors = Callable[[Any], list[Tensor]]


def by_torch_pruning(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], tensors_in: Tensors) -> str:
    """The MACs left and whether the outputs are those of the dense model with zeros, or what it fails with.

    Args:
        model: in eval mode; stays as it is. args, kwargs: of a call.
        tensors_in: the tensors of outputs.
    """
    plain = _result(_Peer(model, args, kwargs, tensors_in))
    if RAN.search(plain) or not _heads(model):
        return plain
    told = _result(_Peer(model, args, kwargs, tensors_in, heads_told=True))
    return f"{told} (heads told)" if RAN.search(told) else plain


def _result(peer: _Peer) -> str:
    with torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return peer.run()
        except Exception as problem:  # whatever the peer raises is the result
            return f"{peer.at}{type(problem).__name__}: {' '.join(str(problem).split())[:200]}"


def _heads(model: nn.Module) -> dict[nn.Linear, int]:
    """By layer that makes queries, keys or values the heads that they have, as modules name them."""
    found: dict[nn.Linear, int] = {}
    for module in model.modules():
        heads = _number(module, HEADS)
        shared = _number(module, SHARED_HEADS) or heads
        for name, child in module.named_children():
            if heads and isinstance(child, nn.Linear) and name in QUERIES | KEYS:
                found[child] = heads if name in QUERIES else shared
    return found


def _number(module: nn.Module, names: tuple[str, ...]) -> int:
    """The first whole number that a module, or its configuration, keeps under one of these names; 0 without one."""
    for holder in (module, getattr(module, "config", None)):
        for name in names:
            if isinstance(value := getattr(holder, name, None), int) and value > 0:
                return value
    return 0


class _Peer:
    def __init__(
        self,
        model: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        tensors_in: Tensors,
        heads_told: bool = False,
    ) -> None:
        self.model, self.args, self.kwargs, self.tensors_in = model, args, kwargs, tensors_in
        self.heads_told = heads_told
        self.at = ""  # how far it came

    def run(self) -> str:
        small, zeroed = copy.deepcopy(self.model).double(), copy.deepcopy(self.model).double()
        pruner, whole, left = self._pruner(small), self._macs(small), 1.0
        before = {layer: layer.out_features for layer in _heads(small)}
        for _ in range(STEPS):
            for group in pruner.step(interactive=True):
                group.prune()
            if self.heads_told:
                before = self._resized(small, before)
            self.at = "cut, "
            left = self._macs(small) / whole
            self.at = f"{left:.3f}, "
            if left <= SHARE:
                break
        for name, left_of_it in self._left(pruner.DG.pruning_history()).items():
            zeroed.get_parameter(name).data.mul_(left_of_it)
        wanted, found = (self.tensors_in(self._call(each)) for each in (zeroed, small))
        if [each.shape for each in wanted] != [each.shape for each in found]:
            return f"{left:.3f}, outputs of other shapes"
        worst = max(error(want, got) for want, got in zip(wanted, found, strict=True))
        return f"{left:.3f}, {'equal' if worst < 1e-9 else f'differs by {worst:.1e}'}"

    def _resized(self, model: nn.Module, before: dict[nn.Linear, int]) -> dict[nn.Linear, int]:
        """Sizes of heads that modules keep as numbers become those of their layers; these are returned."""
        after = {layer: layer.out_features for layer in before}
        heads = _heads(model)
        for module in model.modules():
            changed = [
                (before[child], after[child], heads[child], 3 if "qkv" in name or name == "query_key_value" else 1)
                for name, child in module.named_children()
                if child in before and name in QUERIES and before[child] != after[child]
            ]
            for was, now, count, parts in changed:
                for name in (*HEAD_SIZES, *INNER_SIZES):
                    share = parts * (count if name in HEAD_SIZES else 1)
                    if getattr(module, name, None) == was // share:
                        setattr(module, name, now // share)
        return after

    def _left(self, history: Any) -> dict[str, Tensor]:
        """By parameter, which of its entries are left: the same cuts, on a model whose entries are numbers."""
        numbered = copy.deepcopy(self.model).double()
        sizes = {name: each.shape for name, each in numbered.named_parameters()}
        cut = self._pruner(numbered)
        with torch.no_grad():
            for each in numbered.parameters():
                each.copy_(torch.arange(each.numel()).reshape(each.shape))
        cut.DG.load_pruning_history(history)
        left = {name: each.detach().long().flatten() for name, each in numbered.named_parameters()}
        return {
            name: torch.zeros(shape.numel()).index_fill_(0, left[name], 1).reshape(shape)
            for name, shape in sizes.items()
        }

    def _pruner(self, model: nn.Module) -> torch_pruning.pruner.BasePruner:
        importance = torch_pruning.importance.MagnitudeImportance(p=2)
        return torch_pruning.pruner.MagnitudePruner(
            model,
            self._inputs(),
            importance=importance,
            global_pruning=True,
            pruning_ratio=0.8,
            iterative_steps=STEPS,
            ignored_layers=list(self._output_layers(model)),
            num_heads=_heads(model) if self.heads_told else {},
            forward_fn=lambda model, inputs: model(*copy.deepcopy(inputs[0]), **copy.deepcopy(inputs[1])),
            output_transform=lambda outputs: [each for each in self.tensors_in(outputs) if each.requires_grad],
        )

    def _output_layers(self, model: nn.Module) -> Iterator[nn.Module]:
        """Layers of which an output comes without another layer between."""
        owners = {id(p): m for m in model.modules() if isinstance(m, LAYERS) for p in m.parameters(recurse=False)}
        pending = [each.grad_fn for each in self.tensors_in(self._call(model))]
        seen = set()
        while pending:
            node = pending.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            behind = [each for each, _ in node.next_functions if each is not None]
            near = [*behind, *(each for one in behind if one.name() == "TBackward0" for each, _ in one.next_functions)]
            owned = [owners[id(leaf)] for one in near if (leaf := getattr(one, "variable", None)) is not None
                     and id(leaf) in owners]  # fmt: skip
            yield from owned
            pending += [] if owned else behind

    def _macs(self, model: nn.Module) -> int:
        with FlopCounterMode(display=False) as counter:
            self._call(model)
        return int(counter.get_total_flops())

    def _call(self, model: nn.Module) -> Any:
        args, kwargs = self._inputs()
        return model(*args, **kwargs)

    def _inputs(self) -> Any:
        def fresh(value: Any) -> Any:
            return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value

        return copy.deepcopy(pytree.tree_map(fresh, (self.args, self.kwargs)))
