"""Which inputs and outputs of a captured graph are keys and values that it keeps for its own next call."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch.utils._pytree as pytree
from torch import fx

from fxprune.capture.caches import MODULE
from fxprune.graph.arguments import Arguments
from fxprune.graph.plan import ChannelPlan
from fxprune.graph.traced import TracedModule
from fxprune.torch_internals import pytree_info


@dataclass(frozen=True)
class CachedTensor:
    """Keys or values of a layer, [batch, heads, positions, channels], that a graph returns, or takes and returns.

    Attributes:
        name: as in `past_key_values.0.key`; as in `present.0.key` where the graph takes none.
        taken, returned: its places among the flat inputs and outputs; None where it is not taken.
        is_crossed: whether attention reads an encoder by it.
    """

    name: str
    taken: int | None
    returned: int
    is_crossed: bool = False


def cached_tensors(graph: fx.Graph) -> list[CachedTensor]:
    """The keys and values that a captured graph returns for its own next call, in the order of the outputs.

    What an encoder-decoder keeps of its encoder is among them: a call that takes it returns it as it was.

    Example:
        >>> cached_tensors(traced.graphs["eval"])[0]
        CachedTensor(name='past_key_values.0.key', taken=3, returned=1)
    """
    if MODULE not in sys.modules:
        return []
    try:
        info = pytree_info(graph)
    except AttributeError:  # a graph that has no signature
        return []
    assert info.in_spec is not None
    assert info.out_spec is not None
    by_position, by_name = info.in_spec.children()
    names = info.orig_args
    given = list(_caches_in(by_position, 0, names[: by_position.num_children]))
    given += _caches_in(by_name, by_position.num_leaves, names[by_position.num_children :])
    found = []
    for cache, twin in _paired(given, list(_caches_in(info.out_spec, 0, ()))):
        own = [None] * len(cache.layers) if twin is None else twin.places
        path = cache.path if twin is None else twin.path
        found += [
            CachedTensor(f"{path}.{layer}", taken, returned, cache.is_crossed)
            for layer, taken, returned in zip(cache.layers, own, cache.places, strict=True)
        ]
    return found


def dense_examples(final: TracedModule, plan: ChannelPlan) -> Arguments:
    """The sample inputs of a finalized module with zeros for the heads and channels that left its caches."""
    if not plan.cached:
        return final.example_args, final.example_kwargs
    leaves, structure = pytree.tree_flatten((final.example_args, final.example_kwargs))
    for cached in cached_tensors(final.graph):
        if cached.taken is None:
            continue
        for axis, (size, index) in plan.cached.get(cached.name, {}).items():
            small = leaves[cached.taken]
            whole = small.new_zeros([size if dim == axis else s for dim, s in enumerate(small.shape)])
            leaves[cached.taken] = whole.index_copy(axis, index.to(small.device), small)
    args, kwargs = pytree.tree_unflatten(leaves, structure)
    return args, kwargs


@dataclass(frozen=True)
class _Cache:
    """A cache in a structure.

    Attributes:
        kind: its class. path: what it is called.
        layers: what it holds, as in `0.key`. places: where that stands among the leaves.
        is_crossed: whether attention reads from an encoder by it.
    """

    kind: type
    path: str
    layers: tuple[str, ...]
    places: list[int]
    is_crossed: bool


def _paired(given: Sequence[_Cache], returned: Sequence[_Cache]) -> Iterator[tuple[_Cache, _Cache | None]]:
    """Each cache that is returned with the one of its form that was given; none where all that were are empty."""
    if not any(cache.layers for cache in given):
        yield from ((cache, None) for cache in returned)
    elif [(c.kind, c.layers, c.is_crossed) for c in given] == [(c.kind, c.layers, c.is_crossed) for c in returned]:
        yield from zip(returned, given, strict=True)


def _caches_in(
    spec: pytree.TreeSpec, start: int, names: Sequence[str], part: str = "", is_crossed: bool = False
) -> Iterator[_Cache]:
    """The caches of a structure whose first leaf has the place `start`, and whose children are called `names`."""
    library = sys.modules[MODULE]
    is_cache = isinstance(spec.type, type) and issubclass(spec.type, library.Cache)
    is_pair = is_cache and issubclass(spec.type, library.EncoderDecoderCache)
    if is_cache and not is_pair:
        layers = _layers(spec, part)
        yield _Cache(
            spec.type, names[0] if names else "present", layers, [*range(start, start + len(layers))], is_crossed
        )
        return
    for number, child in enumerate(spec.children()):
        own = names[number : number + 1] if len(names) == spec.num_children and not is_pair else names[:1]
        if is_pair:
            part, is_crossed = (".decoder", ".encoder")[number], number == 1
        yield from _caches_in(child, start, own, part, is_crossed)
        start += child.num_leaves


def _layers(spec: pytree.TreeSpec, part: str) -> tuple[str, ...]:
    """What a cache holds: keys by layer, then values; layers without entries hold none."""
    count = spec.child(0).num_leaves if spec.num_children else 0
    described = spec.context if isinstance(spec.context, list) else []
    filled = [i for i, each in enumerate(described) if isinstance(each, list | tuple) and each[-1] is True]
    numbers = filled if len(filled) == count else [*range(count)]
    return tuple(f"{number}{part}.{kind}" for kind in ("key", "value") for number in numbers)
