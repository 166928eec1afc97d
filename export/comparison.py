"""Comparing what modules and exported files compute."""

from __future__ import annotations

import contextlib
import copy
import math
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.utils._pytree as pytree
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fxprune.capture.programs import read_program
from fxprune.errors import ArgumentError, CompareError, FxpruneError
from fxprune.graph.traced import TracedModule

from .divergence import Divergence, find
from .session import Session, as_captured, match, tensors_of

# Relative to the largest magnitude of an output. Two orders of summation of n products differ by about sqrt(n)
# roundings, and a deep network multiplies that: float32 rounds at 6e-8, and 1e-4 leaves about three decimal orders
# for it, while a wrong weight shows well above. The other dtypes keep about the same distance, as far as they can.
RTOL = {
    torch.float64: 1e-9, torch.complex128: 1e-9, torch.float32: 1e-4, torch.complex64: 1e-4,
    torch.float16: 1e-2, torch.bfloat16: 5e-2,
}  # fmt: skip


class Call(NamedTuple):
    """The inputs of one call: `model(*args, **kwargs)`."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class Row:
    """One output of one candidate for one call, against the reference's.

    Attributes:
        candidate: its name. call: which of the given inputs, from 0. output: path of the output, as in `logits`,
        `[0]`, or of a buffer after a call in train mode, as in `buffer bn.running_mean`.
        shape, dtype: the reference's. max_abs: largest |candidate - reference|; max_rel: the same over the largest
        finite |reference|; both None where there is nothing to subtract. ok: within tolerance. note: what is wrong.
        error, reference_error: of the candidate and of the reference against a float64 copy of the reference, relative
        to its largest value; None where there is no such copy.
    """

    candidate: str
    call: int
    output: str
    shape: tuple[int, ...]
    dtype: str
    max_abs: float | None
    max_rel: float | None
    ok: bool
    note: str = ""
    error: float | None = None
    reference_error: float | None = None


@dataclass(frozen=True)
class Report:
    """What `compare` found: `ok`, `rows`, `table()`, `to_dict()` (plain JSON types).

    Attributes:
        first_divergence: the first node that differs, for the first output that does; None when all agree, or where
            the two have no names of nodes in common.
        no_float64: why there is no float64 copy of the reference, where one was tried.
    """

    reference: str
    mode: str
    rows: tuple[Row, ...]
    first_divergence: Divergence | None = None
    no_float64: str = ""

    @property
    def ok(self) -> bool:
        """Whether every output of every candidate agrees."""
        return all(row.ok for row in self.rows)

    def table(self) -> str:
        """The rows as text, one line an output: the worst of its calls."""
        head = ("candidate", "call", "output", "shape", "dtype", "max abs", "max rel", "agrees")
        worst: dict[tuple[str, str], Row] = {}
        for r in self.rows:
            key = r.candidate, r.output
            worst[key] = max(worst.get(key, r), r, key=lambda r: (not r.ok, r.max_abs or 0.0))
        lines: list[tuple[str, ...]] = [head]
        lines += [
            (r.candidate, str(r.call), r.output, "x".join(map(str, r.shape)) or "scalar", r.dtype, _number(r.max_abs),
             _number(r.max_rel), f"yes {r.note}".rstrip() if r.ok else f"NO {r.note}".rstrip())
            for r in worst.values()
        ]  # fmt: skip
        if any(r.error is not None for r in worst.values()):
            head64 = "error", "reference's"
            cells = [head64] + [(_number(r.error), _number(r.reference_error)) for r in worst.values()]
            lines = [(*line[:-1], *pair, line[-1]) for line, pair in zip(lines, cells, strict=True)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        text = ["  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines]
        if len(lines[0]) > len(head):
            text.append("error, reference's: relative to a float64 copy of the reference")
        if self.no_float64:
            text.append(f"there is no float64 copy of the reference: {self.no_float64}")
        if self.first_divergence:
            text.append(str(self.first_divergence))
        return "\n".join([f"against {self.reference}, {self.mode} mode", *text])

    def to_dict(self) -> dict[str, Any]:
        """The report as plain JSON types."""
        first = self.first_divergence and asdict(replace(self.first_divergence, pieces=()))
        return {"ok": self.ok, **asdict(replace(self, first_divergence=None)), "first_divergence": first}

    def reproduce(self, path: str | os.PathLike[str]) -> None:
        """Write a script that runs the smallest subgraph that differs on both sides; its tensors go beside it.

        Raises:
            CompareError: no node is known to differ. ExportError: the path cannot be written.
        """
        if self.first_divergence is None:
            raise CompareError("no node is known to differ: all outputs agree, or the two share no names of nodes.")
        self.first_divergence.reproduce(path)


def compare(
    reference: nn.Module | str | os.PathLike[str],
    *candidates: nn.Module | str | os.PathLike[str],
    inputs: Any,
    rtol: float | None = None,
    atol: float | None = None,
    mode: Literal["eval", "train"] = "eval",
    names: Sequence[str] | None = None,
) -> Report:
    """Run the reference and every candidate on the same inputs and compare all outputs.

    Modules are called as they are, with gradients recorded (without them attention layers take another path), and
    are left as they were: mode of every submodule, buffers, random state. Every one starts from the same random
    state. In train mode the buffers after the call are compared too, where both have one of that name and shape.

    An output agrees when its shape and dtype do, NaN and inf stand at the same places, and the largest
    |candidate - reference| is at most `atol + rtol * max |reference|`, the maximum taken over the whole output: an
    element near zero in an output of size 10 carries the rounding of numbers of size 10. Integers and booleans
    agree when equal.

    In eval mode a float64 copy of the reference, where it can be made, tells the error of each side. By default a
    candidate beyond the tolerance agrees too when its error is at most twice the reference's own: then the
    difference is the rounding of the reference. When outputs disagree, the nodes are compared, by the names that an
    export keeps: see `Report.first_divergence`.

    Args:
        reference: a module (eager or traced), or the path of an .onnx, .pt2 (torch.export) or .pt (TorchScript) file.
        candidates: one or more of the same.
        inputs: a tuple of positional arguments, a dict of keyword arguments, a `Call` of both, one tensor, or a list
            of several of these, each of which is compared.
        rtol: relative tolerance; None: 1e-9 for float64, 1e-4 for float32, 1e-2 for float16, 5e-2 for bfloat16.
        atol: absolute tolerance; None: 0. With both 0, values must be equal.
        mode: "eval" or "train" (modules only).
        names: what the report calls the reference and the candidates; None: class and file names.

    Raises:
        CompareError: one of them cannot be run, or not on these inputs.
        ArgumentError: no candidate, no inputs, an unknown mode, or another number of names.

    Example:
        >>> layer = torch.nn.Linear(2, 2)
        >>> compare(layer, layer, inputs=torch.ones(1, 2)).ok
        True
    """
    if mode not in ("eval", "train"):
        raise ArgumentError(f"mode is {mode!r}; it can be 'eval' or 'train'.")
    calls = as_calls(inputs)
    if not candidates or not calls:
        raise ArgumentError(f"{len(candidates)} candidates and {len(calls)} inputs were given; at least one of each.")
    if names is not None and len(names) != len(candidates) + 1:
        raise ArgumentError(f"{len(names)} names were given for 1 reference and {len(candidates)} candidates.")
    runners = [_runner(item, mode) for item in (reference, *candidates)]
    return judge(runners, calls, rtol, atol, mode, names)


def judge(
    runners: Sequence[Runner],
    calls: Sequence[Call],
    rtol: float | None,
    atol: float | None,
    mode: str = "eval",
    names: Sequence[str] | None = None,
) -> Report:
    """`compare` for runners that exist already; the first is the reference."""
    names = names or [r.name for r in runners]
    names = [n if names.count(n) == 1 else f"{n} ({i})" for i, n in enumerate(names)]
    rows: list[Row] = []
    first: Divergence | None = None
    wide, why = _wide(runners[0]) if mode == "eval" else (None, "")
    for index, call in enumerate(calls):
        expected, *found = (runner.run(*call) for runner in runners)
        exact: dict[str, torch.Tensor] = {}
        if wide:
            try:
                exact = {k: v for k, v in wide.run(*call).items() if v.dtype != expected[k].dtype}
            except CompareError as error:
                wide, why = None, str(error)
        wanted = {k: v for k, v in expected.items() if not k.startswith(_BUFFER)}
        for name, runner, outputs in zip(names[1:], runners[1:], found, strict=True):
            own = runner.rtol if rtol is None else rtol
            got = {k: v for k, v in outputs.items() if not k.startswith(_BUFFER)}
            if len(got) != len(wanted):
                note = f"has {len(got)} outputs {list(got)}, the reference {len(wanted)} {list(wanted)}"
                rows.append(Row(name, index, "all", (), "", None, None, False, note))
                continue
            pairs = [(k, v, w) for (k, v), w in zip(wanted.items(), got.values(), strict=True)]
            shared = [k for k in expected if k not in wanted and k in outputs]
            pairs += [(k, expected[k], outputs[k]) for k in shared if expected[k].shape == outputs[k].shape]
            for k, v, w in pairs:
                row = Row(name, index, k, tuple(v.shape), _dtype(v), *_errors(v, w, own, atol))
                if k in exact:
                    far, base = (_errors(exact[k], value.double(), None, None)[1] for value in (w, v))
                    row = replace(row, error=far, reference_error=base)
                    rounding = own is None and atol is None and far is not None and far <= 2 * (base or 0.0)
                    if rounding and not row.ok:
                        row = replace(row, ok=True, note="by the rounding of the reference")
                rows.append(row)
                if not row.ok and mode == "eval" and first is None:
                    first = find(runners[0], runner, call, index, lambda a, b: _errors(a, b, own, atol)[2])  # noqa: B023
    return Report(names[0], mode, tuple(rows), first, why)


_BUFFER = "buffer "


def _errors(
    reference: torch.Tensor, value: torch.Tensor, rtol: float | None, atol: float | None
) -> tuple[float | None, float | None, bool, str]:
    if reference.shape != value.shape or reference.dtype != value.dtype:
        return None, None, False, f"is {_dtype(value)} of shape {list(value.shape)}"
    exact = not (reference.is_floating_point() or reference.is_complex())
    wide = torch.complex128 if reference.is_complex() else torch.float64
    a, b = reference.to(wide), value.to(wide)
    finite = torch.isfinite(a)
    odd = int((~finite & ~torch.isclose(a, b, equal_nan=True) | finite & ~torch.isfinite(b)).sum())
    if odd:
        return None, None, False, f"NaN or inf differ at {odd} of {a.numel()} places"
    a, b = a[finite], b[finite]
    largest = float((a - b).abs().max()) if a.numel() else 0.0
    scale = float(a.abs().max()) if a.numel() else 0.0
    relative = largest / scale if scale else (0.0 if largest == 0 else None)
    if exact:  # float64 does not hold every int64
        return largest, relative, torch.equal(reference, value), ""
    rtol = RTOL[reference.dtype] if rtol is None else rtol
    limit = (atol or 0.0) + rtol * scale
    return largest, relative, largest <= limit, "" if largest <= limit else f"limit {limit:.1e}"


class ModuleRunner:
    rtol: float | None = None

    def __init__(self, module: nn.Module, mode: str) -> None:
        self.name, self.module, self._mode = type(module).__name__, module, mode

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, torch.Tensor]:
        copies: dict[int, torch.Tensor] = {}  # what was one tensor stays one

        def own(tensor: torch.Tensor) -> torch.Tensor:
            return copies.setdefault(id(tensor), tensor.detach().clone())

        args, kwargs = pytree.tree_map_only(torch.Tensor, own, (args, kwargs))
        borrowed = contextlib.nullcontext() if isinstance(self, ProgramRunner) else _borrowed(self.module, self._mode)
        with borrowed, torch.enable_grad():
            try:
                outputs = tensors_of(self.call(args, kwargs), self.name)
            except FxpruneError:
                raise
            except Exception as error:
                given = pytree.tree_map_only(torch.Tensor, lambda t: f"{_dtype(t)}{list(t.shape)}", (args, kwargs))
                raise CompareError(
                    f"{self.name} cannot run these inputs: {type(error).__name__}: {error}. Given were {given}."
                ) from error
            if self._mode == "train":
                outputs |= {_BUFFER + name: buffer for name, buffer in self.module.named_buffers()}
            return {name: value.detach().to("cpu", copy=True) for name, value in outputs.items()}

    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self.module(*args, **kwargs)


class _Double(TorchDispatchMode):
    """float64 wherever the code says float32."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*pytree.tree_map(_double, args), **pytree.tree_map(_double, kwargs or {}))


def _double(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.double() if value.dtype == torch.float32 else value
    return torch.float64 if value is torch.float32 else value


class _WideRunner(ModuleRunner):
    """A float64 copy of a module."""

    def __init__(self, module: nn.Module) -> None:
        computed = [
            v for m in module.modules() for v in m.__dict__.values() if isinstance(v, torch.Tensor) and v.grad_fn
        ]
        module = copy.deepcopy(module, {id(v): v.detach() for v in computed})  # hooks compute these again
        nn.Module._apply(module, _double)  # a traced module's own refuses types that its graph names
        if isinstance(module, TracedModule):
            module.example_args, module.example_kwargs = pytree.tree_map(
                _double, (module.example_args, module.example_kwargs)
            )
            module.recompile()
        super().__init__(module, "eval")

    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        default = torch.get_default_dtype()
        try:
            torch.set_default_dtype(torch.float64)
            with _Double():  # type: ignore[no-untyped-call]
                return super().call(*pytree.tree_map(_double, (args, kwargs)))
        finally:
            torch.set_default_dtype(default)


def _wide(runner: Runner) -> tuple[_WideRunner | None, str]:
    if type(runner) is not ModuleRunner or all(p.dtype != torch.float32 for p in runner.module.parameters()):
        return None, ""
    try:
        return _WideRunner(runner.module), ""
    except Exception as error:  # whatever the model's own copying raises
        return None, f"{type(error).__name__}: {error}"


class ProgramRunner(ModuleRunner):
    """A .pt2 file of torch.export, or one of TorchScript.

    Raises:
        CompareError: there is none of that name, or torch cannot load it.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.name, self._mode = Path(path).name, "eval"
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="`torch.jit", category=DeprecationWarning)
                if Path(path).suffix == ".pt2":
                    self.module = read_program(path).module()
                else:
                    self.module = script = torch.jit.load(os.fspath(path))
                    self._names = [a.name for a in script.forward.schema.arguments[1:]]
        except Exception as error:  # torch raises whatever its reader raises
            raise CompareError(f"'{path}' cannot be loaded by torch: {type(error).__name__}: {error}") from error

    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if isinstance(self.module, torch.jit.ScriptModule):
            return self.module(*match(self._names, args, kwargs).values())
        args, kwargs = as_captured(self.module.graph, args, kwargs)  # type: ignore[arg-type]
        return self.module(*args, **kwargs)


Runner = ModuleRunner | Session  # a name, a tolerance of its own, and a call that returns tensors by name, on the CPU


@contextlib.contextmanager
def _borrowed(module: nn.Module, mode: str) -> Iterator[None]:
    """Put the module in a mode, and leave it as it was found."""
    flags = [(m, m.training) for m in module.modules()]
    slots = [(m._buffers, name, b) for m in module.modules() for name, b in m._buffers.items() if b is not None]
    kept = {id(b): b.detach().clone() for _, _, b in slots}
    devices = {t.device.index for t in (*module.parameters(), *module.buffers()) if t.is_cuda}
    with torch.random.fork_rng(devices=sorted(devices)):
        try:
            module.train(mode == "train")
            yield
        finally:
            for owner, name, buffer in slots:
                owner[name] = buffer
                if not torch.equal(buffer, kept[id(buffer)]):
                    with torch.no_grad():
                        buffer.copy_(kept[id(buffer)])
            if module.training != flags[0][1]:
                module.train(flags[0][1])  # a traced module selects its graph here
            for owner_module, flag in flags:
                owner_module.training = flag


def _runner(item: Any, mode: str) -> Runner:
    if isinstance(item, nn.Module):
        return ModuleRunner(item, mode)
    if not isinstance(item, str | os.PathLike):
        raise CompareError(
            f"a {type(item).__name__} was given to compare; it takes modules and paths of .onnx, .pt2 and .pt files."
        )
    if Path(item).suffix not in (".onnx", ".pt2", ".pt"):
        raise CompareError(f"'{item}' was given to compare; files that it can run end in .onnx, .pt2 or .pt.")
    if mode == "train":
        raise CompareError(f"'{item}' has no train mode: compare it with mode='eval'.")
    return Session(item) if Path(item).suffix == ".onnx" else ProgramRunner(item)


def as_calls(inputs: Any) -> list[Call]:
    """What `compare` takes as inputs, as calls."""
    calls = []
    for item in inputs if isinstance(inputs, list) else [inputs]:
        if not isinstance(item, tuple | dict | torch.Tensor):
            raise CompareError(
                f"inputs hold a {type(item).__name__}; a tuple, a dict, a Call, a tensor, or a list of these is needed."
            )
        kwargs = item if isinstance(item, dict) else {}
        args = (item,) if isinstance(item, torch.Tensor) else () if isinstance(item, dict) else item
        calls.append(item if isinstance(item, Call) else Call(args, kwargs))
    return calls


def _dtype(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _number(value: float | None) -> str:
    return "-" if value is None else "0" if value == 0 else f"{value:.1e}" if math.isfinite(value) else str(value)
