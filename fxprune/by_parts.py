"""What each process computes from its own part of a tensor, so that the whole need not come together.

Entry by entry, with operators whose results do not depend on where an entry stands: one that is here is exact, or
rounds once, as IEEE 754 says. Those that approximate, such as exponentials, are left out: in vectors and in the rest at
the end of a tensor they may round differently, so that a part need not have the bits of the whole.
"""

from __future__ import annotations

import functools
import math
import operator
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fxprune.sharding import part, spread

aten = torch.ops.aten

ALIKE = {aten.empty_like.default, aten.zeros_like.default, aten.ones_like.default, aten.full_like.default}
_CONVERTING = {aten._to_copy.default}
_ENTRIES = {
    *(aten.abs.default, aten.neg.default, aten.sign.default, aten.sqrt.default, aten.logical_not.default),
    *(aten.isnan.default, aten.isinf.default, aten.bitwise_not.default, aten.pow.Tensor_Scalar),
    aten.masked_fill.Scalar,
    *(getattr(getattr(aten, name), kind)
      for name in ("add", "sub", "mul", "div", "eq", "ne", "lt", "le", "gt", "ge") for kind in ("Tensor", "Scalar")),
    *(aten.where.self, aten.maximum.default, aten.minimum.default),
    *(aten.logical_and.default, aten.logical_or.default, aten.logical_xor.default),
    *(aten.bitwise_and.Tensor, aten.bitwise_or.Tensor),
}  # fmt: skip
_WRITES = {
    *(aten.copy_.default, aten.zero_.default, aten.fill_.Scalar),
    *(getattr(getattr(aten, name), kind) for name in ("add_", "sub_", "mul_", "div_") for kind in ("Tensor", "Scalar")),
}  # fmt: skip


def is_by_entries(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Whether a call computes each entry by itself, with the same bits wherever it stands."""
    if func in ALIKE:
        return kwargs.get("device") is None and not kwargs.get("pin_memory")
    if func in _CONVERTING:
        return set(kwargs) == {"dtype"}
    if func is aten.pow.Tensor_Scalar:
        return bool(args[1] == 2)
    # no `alpha`, which a kernel may multiply and add at once
    most = 3 if func in (aten.where.self, aten.masked_fill.Scalar) else 2
    return func in _ENTRIES | _WRITES and not kwargs and len(args) <= most


def is_writing(func: Any) -> bool:
    """Whether such a call writes to its first argument, all entries of it."""
    return func in _WRITES


@dataclass(frozen=True)
class Held:
    """In the place of a tensor that processes hold parts of: its number."""

    number: int


@dataclass(frozen=True)
class Product:
    """In the place of a plain tensor that is the same along some axes, or a product of vectors: these.

    Attributes:
        factors: of as many axes as the tensor, of size 1 where they are the same.
    """

    factors: tuple[Tensor, ...]

    @property
    def nbytes(self) -> int:
        """Of what is sent."""
        return sum(each.nbytes for each in self.factors)

    def as_part_of(self, reference: Tensor) -> Tensor:
        """What belongs to this process's part of a tensor."""
        # each is cut before they are multiplied, so that nobody has the whole
        spread_out = (each.to(reference.device).broadcast_to(reference.shape) for each in self.factors)
        own = [part(spread(each, reference)) for each in spread_out]
        return own[0] if len(own) == 1 else functools.reduce(operator.and_, own)


def as_product(tensor: Tensor, shape: torch.Size) -> Product | None:
    """A plain operand that is broadcast to a shape, in small factors; None where it takes as many entries as that."""
    plain = tensor.detach().cpu()
    aligned = plain[(None,) * (len(shape) - plain.dim())]
    once = aligned[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in aligned.stride())].clone()
    if once.numel() < shape.numel() or once.numel() < 2:
        return Product((once,))
    if once.dtype != torch.bool or once.dim() < 2:
        return None
    axes = range(once.dim())
    factors = tuple(once.amax([d for d in axes if d != axis], keepdim=True) for axis in axes)
    return Product(factors) if torch.equal(functools.reduce(operator.and_, factors), once) else None


def name_of(func: Any) -> tuple[str, str, str]:
    """An operator as it is sent to other processes."""
    return func.namespace, func.overloadpacket.__name__, func._overloadname


def _found(name: tuple[str, str, str]) -> Any:
    return functools.reduce(getattr, name, torch.ops)


def called(name: tuple[str, str, str], args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor:
    """What the operator of a name gives for parts; a new tensor, also of one that writes."""
    func = _found(name)
    given = [args[0].clone(), *args[1:]] if is_writing(func) else args
    with torch.no_grad():
        found: Tensor = func(*given, **kwargs)
    return found


# what reduces all entries to one, in any order, and how results of parts become that of the whole, by output
_REDUCING = {
    aten.all.default: (aten.all.default,),
    aten.any.default: (aten.any.default,),
    aten.aminmax.default: (aten.amin.default, aten.amax.default),
}


def is_reducing(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Whether a call of one tensor gives the same bits when it is applied to parts, and then to their results."""
    return func in _REDUCING and len(args) == 1 and not kwargs


def reduced_part(name: tuple[str, str, str], own: Tensor, start: int) -> tuple[Tensor, ...]:
    """What such an operator gives for a part."""
    found = _found(name)(own)
    return tuple(each.cpu() for each in ((found,) if isinstance(found, Tensor) else found))


def reduced(func: Any, found: Sequence[tuple[Tensor, ...]]) -> Any:
    """What such an operator gives for the whole, from what it gave for parts."""
    results = [again(torch.stack(own)) for again, own in zip(_REDUCING[func], zip(*found, strict=True), strict=True)]
    return results[0] if len(results) == 1 else tuple(results)


Bits = tuple[tuple[int, ...], np.ndarray[Any, Any]]


def nonzero_bits(own: Tensor, start: int) -> Bits:
    """The shape of a part, and a bit for each of its entries that is not zero."""
    return tuple(own.shape), np.packbits((own != 0).cpu().numpy())


def from_bits(found: Sequence[Bits]) -> Tensor:
    """A boolean for each entry of parts, one below the other."""
    parts = [
        torch.from_numpy(np.unpackbits(bits, count=math.prod(shape)).view(bool)).reshape(shape) for shape, bits in found
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def checksum(own: Tensor, start: int) -> int:
    """The CRC-32 of a part's bytes."""
    return zlib.crc32(own.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
