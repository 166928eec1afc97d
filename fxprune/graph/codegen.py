"""Python code for captured graphs."""

from __future__ import annotations

import contextlib
import keyword
from collections.abc import Iterable, Iterator
from typing import Any

from torch import fx
from torch.fx.graph import PythonCode

from fxprune.torch_internals import PyTreeCodeGen


class CodeGen(PyTreeCodeGen):
    """torch's generator of code for pytree signatures, for attribute paths that may contain Python keywords.

    A model may hold a child called `class` (by `add_module`, or in a `ModuleDict`). Its name is a key of the state
    dict, so it stays, but `self.class.weight` is no Python. torch reads a part of a path by `getattr` when that part
    is no identifier; while code is generated, keywords are none either.
    """

    def __deepcopy__(self, memo: dict[int, Any]) -> CodeGen:
        # it is never changed in place, and copying torch's tree specifications warns
        return CodeGen(self.pytree_info)

    def _gen_python_code(self, nodes: Any, *args: Any, **kwargs: Any) -> PythonCode:
        with _keywords_are_no_identifiers(nodes):
            code: PythonCode = super()._gen_python_code(nodes, *args, **kwargs)
        return code


class _Part(str):
    """One name of a path."""

    __slots__ = ()

    def isidentifier(self) -> bool:
        return super().isidentifier() and not keyword.iskeyword(self)


class _Path(str):
    """A dotted path whose parts know that keywords are no identifiers."""

    __slots__ = ()

    def split(self, *args: Any, **kwargs: Any) -> list[str]:
        return [_Part(part) for part in super().split(*args, **kwargs)]


@contextlib.contextmanager
def _keywords_are_no_identifiers(nodes: Iterable[fx.Node]) -> Iterator[None]:
    reads = [(node, str(node.target)) for node in nodes if node.op == "get_attr"]
    reads = [(node, target) for node, target in reads if any(map(keyword.iskeyword, target.split(".")))]
    try:
        for node, target in reads:
            node.target = _Path(target)
        yield
    finally:
        for node, target in reads:
            node.target = target
