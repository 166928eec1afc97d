"""Caches of the transformers library (keys and values of attention) as inputs and outputs of a graph.

The library is never imported: what is registered with torch are classes that stand in the process already.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch.utils._pytree as pytree
from torch import Tensor

from fxprune.errors import SampleError

MODULE = "transformers.cache_utils"


@dataclass(frozen=True)
class _Kind:
    """What a class of cache layers holds beside keys and values.

    Attributes:
        options: what its constructor takes, by the attributes that hold it.
        numbers: attributes that hold what changes from call to call.
        derived: attributes that follow from keys and values: of which of the two, and the axis.
    """

    options: tuple[str, ...] = ()
    numbers: tuple[str, ...] = ()
    derived: Mapping[str, tuple[str, int]] | None = None


_SIZES = {"batch_size": ("keys", 0), "num_heads": ("keys", 1), "k_head_dim": ("keys", 3), "v_head_dim": ("values", 3)}
_KINDS = {
    "DynamicLayer": _Kind(),
    "DynamicSlidingWindowLayer": _Kind(("sliding_window",), ("cumulative_length",)),
    "StaticLayer": _Kind(("max_cache_len",), ("cumulative_length",), _SIZES),
    "StaticSlidingWindowLayer": _Kind(("max_cache_len",), ("cumulative_length", "cumulative_length_int"), _SIZES),
    "DummyLayer": _Kind(),
}


def is_cache(value: object) -> bool:
    """Whether a value is a cache of the transformers library."""
    library = sys.modules.get(MODULE)
    return library is not None and isinstance(value, library.Cache)


def register_cache(kind: type) -> None:
    """Make a class of caches known to torch, for the life of the process; one that is known stays as it is."""
    if kind in pytree.SUPPORTED_NODES:
        return
    library = sys.modules[MODULE]
    if issubclass(kind, library.EncoderDecoderCache):
        flatten, keyed, unflatten = _flatten_pair, _flatten_pair_with_keys, _pair_of
    else:
        flatten, keyed, unflatten = _flatten, _flatten_with_keys, _cache_of
    pytree.register_pytree_node(
        kind,
        flatten,
        lambda children, context: unflatten(kind, children, context),
        serialized_type_name=f"{kind.__module__}.{kind.__qualname__}",
        flatten_with_keys_fn=keyed,
    )


def without_foreign_caches(tree: Any) -> Any:
    """A structure with lists in place of caches whose class others have made known to torch.

    Theirs are built by code that makes tensors, which a graph would hold anew whenever torch traces it again.
    """

    def is_foreign(value: object) -> bool:
        node = pytree.SUPPORTED_NODES.get(type(value))
        return is_cache(value) and node is not None and node.flatten_fn not in (_flatten, _flatten_pair)

    def plain(value: Any) -> Any:
        if not is_foreign(value):
            return value
        return without_foreign_caches(list(pytree.SUPPORTED_NODES[type(value)].flatten_fn(value)[0]))

    return pytree.tree_map(plain, tree, is_leaf=is_foreign)


def register_library() -> None:
    """Make the library's caches and outputs known, which a file may name, where the process has imported it."""
    if "transformers" not in sys.modules:
        return
    library = importlib.import_module(MODULE)
    for name in ("DynamicCache", "StaticCache", "EncoderDecoderCache"):
        register_cache(getattr(library, name))
    importlib.import_module("transformers.modeling_outputs")  # its classes register themselves


class CachePath(str):
    """What a tensor of a cache is called in files, as in `past_key_values.0.key`."""

    __slots__ = ()


def cache_paths(cache: Any, path: str) -> list[CachePath]:
    """The names of what a cache at this path holds, flattened: by layer, as optimum and onnxruntime-genai have them.

    Example:
        >>> cache_paths(DynamicCache(...), "past_key_values")
        ['past_key_values.0.key', 'past_key_values.1.key', 'past_key_values.0.value', 'past_key_values.1.value']
    """
    if isinstance(cache, sys.modules[MODULE].EncoderDecoderCache):
        parts = {"decoder": cache.self_attention_cache, "encoder": cache.cross_attention_cache}
        return [found for part, inner in parts.items() for found in _layer_paths(inner, path, f".{part}")]
    return _layer_paths(cache, path, "")


def _layer_paths(cache: Any, path: str, part: str) -> list[CachePath]:
    filled = [(i, layer) for i, layer in enumerate(cache.layers) if layer.keys is not None]
    names = [*("key" for _ in filled), *("value" for _ in filled)]
    names += [number for _, layer in filled for number in _KINDS[type(layer).__name__].numbers]
    layers = [i for i, _ in filled] * 2 + [i for i, layer in filled for _ in _KINDS[type(layer).__name__].numbers]
    return [CachePath(f"{path}.{i}{part}.{name}") for i, name in zip(layers, names, strict=True)]


# ---- caches of layers


def _flatten(cache: Any) -> tuple[list[Any], list[Any]]:
    """The tensors of a cache in lists, as the library's own registrations have them; and what each layer is."""
    if getattr(cache, "offloading", False):
        raise SampleError(f"a {type(cache).__name__} is offloaded, which no graph can do. Make it without offloading.")
    described = [_described(layer) for layer in cache.layers]
    filled = [layer for layer in cache.layers if layer.keys is not None]
    children = [[layer.keys for layer in filled], [layer.values for layer in filled]]
    numbers = [getattr(layer, name) for layer in filled for name in _KINDS[type(layer).__name__].numbers]
    return [*children, numbers] if numbers else children, described


def _described(layer: Any) -> list[Any]:
    """A layer's class, what it was made with, and whether it holds keys and values."""
    name = type(layer).__name__
    if name not in _KINDS or getattr(layer, "record_past", False):
        what = f"a layer of class {name}" if name not in _KINDS else "a layer that records what leaves its window"
        raise SampleError(
            f"a cache holds {what}; of the library's layers {', '.join(_KINDS)} can be inputs and outputs of a graph. "
            "Give a DynamicCache() or a StaticCache, or trace with use_cache=False."
        )
    return [name, {option: getattr(layer, option) for option in _KINDS[name].options}, layer.keys is not None]


_PARTS = ("key_cache", "value_cache", "lengths")


def _flatten_with_keys(cache: Any) -> tuple[list[tuple[pytree.KeyEntry, Any]], list[Any]]:
    children, context = _flatten(cache)
    return [(pytree.MappingKey(name), child) for name, child in zip(_PARTS, children, strict=False)], context


def _cache_of(kind: type, children: Iterable[Any], context: Sequence[Any]) -> Any:
    library = sys.modules[MODULE]
    keys, values, numbers = (iter(part) for part in (*children, [])[:3])
    cache: Any = object.__new__(kind)
    dynamic = None if issubclass(kind, library.StaticCache) else library.DynamicLayer
    layers = [_layer_of(name, options, is_filled, keys, values, numbers) for name, options, is_filled in context]
    vars(cache).update(layers=layers, layer_class_to_replicate=dynamic, offloading=False)
    return cache


def _layer_of(name: str, options: Mapping[str, Any], is_filled: bool, keys: Any, values: Any, numbers: Any) -> Any:
    kind = _KINDS[name]
    more = {"sliding_window": options["max_cache_len"]} if name == "StaticSlidingWindowLayer" else {}
    layer = getattr(sys.modules[MODULE], name)(**options, **more)
    if not is_filled:
        return layer
    layer.keys, layer.values, layer.is_initialized = next(keys), next(values), True
    for number in kind.numbers:
        setattr(layer, number, next(numbers))
    if isinstance(layer.keys, Tensor):  # torch also builds structures of other leaves
        layer.dtype, layer.device = layer.keys.dtype, layer.keys.device
        for attribute, (part, axis) in (kind.derived or {}).items():
            setattr(layer, attribute, getattr(layer, part).shape[axis])
    return layer


# ---- a decoder's two caches: of what it has written, and of what it reads from the encoder


def _flatten_pair(cache: Any) -> tuple[list[Any], list[Any]]:
    for part in (cache.self_attention_cache, cache.cross_attention_cache):
        register_cache(type(part))
    updated = [[layer, bool(is_updated)] for layer, is_updated in cache.is_updated.items()]
    return [cache.self_attention_cache, cache.cross_attention_cache], updated


def _flatten_pair_with_keys(cache: Any) -> tuple[list[tuple[pytree.KeyEntry, Any]], list[Any]]:
    children, context = _flatten_pair(cache)
    names = ("self_attention_cache", "cross_attention_cache")
    return [(pytree.GetAttrKey(name), child) for name, child in zip(names, children, strict=True)], context


def _pair_of(kind: type, children: Iterable[Any], context: Sequence[Any]) -> Any:
    cache: Any = object.__new__(kind)
    own, crossed = children
    vars(cache).update(self_attention_cache=own, cross_attention_cache=crossed, is_updated=dict(context))
    return cache
