"""What becomes of the masked module when training ends: the small module, its files, and how these compare."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fxprune import driver, export
from fxprune.checkpoints.checkpoint import save
from fxprune.errors import ArgumentError, ArgumentTypeError, ShardingError
from fxprune.graph.calls import Call
from fxprune.graph.names import parameter_count
from fxprune.graph.spread_modules import is_spread
from fxprune.graph.traced import TracedModule
from fxprune.reports import Readable, change, plain

Options = bool | Mapping[str, Any]


@dataclass(frozen=True, repr=False)
class Finished(Readable):
    """What came of a training with pruning; `str` says what is left.

    Attributes:
        final: the small module, in eval mode.
        macs: multiply-accumulates of one sample, dense and left; None where no channel went.
        parameters: dense and left.
        files: by "module" and "onnx" the paths of what was written.
        comparison: of the masked module with the small one and the ONNX file, where it was asked for.
    """

    final: TracedModule
    macs: tuple[int, int] | None
    parameters: tuple[int, int]
    files: Mapping[str, Path] = field(default_factory=dict)
    comparison: export.Report | None = None

    @property
    def shares(self) -> dict[str, float]:
        """What is left of the dense module, of MACs and of parameters."""
        macs, parameters = (after / max(before, 1) for before, after in (self.macs or (1, 1), self.parameters))
        return {"macs": macs, "parameters": parameters}

    def __str__(self) -> str:
        lines = [f"MACs {change(*self.macs)}" if self.macs else "MACs as they were: no channel went"]
        lines[0] += f", parameters {change(*self.parameters)}"
        lines += [f"{name}: {path}" for name, path in self.files.items()]
        if self.comparison is not None:
            lines.append(f"compared: {str(self.comparison).partition(chr(10))[0]}")
        return "\n".join(lines)

    def table(self) -> str:
        """The sums, and the table of the comparison."""
        return str(self) if self.comparison is None else f"{self}\n\n{self.comparison.table()}"

    def to_dict(self) -> dict[str, Any]:
        """Sizes, shares, paths and the comparison, in JSON's types."""
        compared = None if self.comparison is None else self.comparison.to_dict()
        sizes = {"macs": self.macs, "parameters": self.parameters, "shares": self.shares}
        found: dict[str, Any] = plain(sizes | {"files": {name: str(path) for name, path in self.files.items()}})
        return found | {"comparison": compared}


@dataclass(frozen=True)
class Ending:
    """What is to be made of the masked module.

    Attributes:
        finalize: options of `fxprune.finalize`; None where nothing is made.
        folder: for the files; None where none are written.
        onnx: options of `fxprune.export.to_onnx`; None where no such file is written.
        compare: inputs that masked and small module and the ONNX file are compared on; True: the sample inputs; None:
            they are not compared.
    """

    finalize: Mapping[str, Any] | None
    folder: Path | None
    onnx: Mapping[str, Any] | None
    compare: Any

    @classmethod
    def of(cls, finalize: Options, folder: str | os.PathLike[str] | None, onnx: Options, compare: Any) -> Ending:
        """As users ask for it.

        Raises:
            ArgumentError, ArgumentTypeError: an option that cannot be used, or without another that it needs.
        """
        if folder is not None and not isinstance(folder, str | os.PathLike):
            raise ArgumentTypeError(f"folder is a {type(folder).__name__}; the path of a folder is needed.")
        ending = cls(
            _options("finalize", finalize),
            None if folder is None else Path(folder),
            _options("onnx", onnx),
            None if compare is False else compare,
        )
        if ending.onnx is not None and folder is None:
            raise ArgumentError("onnx was asked for without a folder: give folder='out', where model.onnx is written.")
        asked = [name for name in ("folder", "compare") if getattr(ending, name) is not None]
        if asked and ending.finalize is None:
            raise ArgumentError(f"{' and '.join(asked)} with finalize=False: they are for what it makes. Leave it out.")
        return ending

    def carried_out(self, traced: TracedModule, *, write: bool) -> Finished | None:
        """Make it of a masked module, which stays as it is; None where nothing is to be made.

        Args:
            traced: the module.
            write: whether this process writes the files, and compares.
        """
        if self.finalize is None:
            return None
        is_shared = is_spread(traced)
        if is_shared and self.compare is not None:
            raise ShardingError(
                "compare was asked for of a module that is spread over processes; it is for one that one process has "
                "whole. Leave it out: onnx=True has the file compared before it is written, whoever writes it."
            )
        write |= is_shared  # the first process writes, and the others give it their parts
        # a trainer may have put a forward of another precision on the module: a copy has its own
        masked = traced if is_shared else copy.deepcopy(traced).eval()
        final = driver.finalize(masked, **self.finalize).eval()
        files: dict[str, Path] = {}
        comparison = None
        if self.folder is not None and write:
            self.folder.mkdir(parents=True, exist_ok=True)
            files["module"] = self.folder / "model.fxp"
            save(final, files["module"])
            if self.onnx is not None:
                files["onnx"] = self.folder / "model.onnx"
                export.to_onnx(final, files["onnx"], **self.onnx)
        if self.compare is not None and write:
            sample = Call(masked.example_args, masked.example_kwargs)
            inputs = sample if self.compare is True else self.compare
            comparison = export.compare(masked, final, *([files["onnx"]] if "onnx" in files else []), inputs=inputs)
        plan = final.plan
        macs = None if plan is None or not plan.macs[0] else (int(plan.macs[0]), int(plan.macs[1]))
        return Finished(final, macs, (parameter_count(masked), parameter_count(final)), files, comparison)


def _options(name: str, given: Any) -> Mapping[str, Any] | None:
    if isinstance(given, Mapping):
        return dict(given)
    if not isinstance(given, bool):
        raise ArgumentTypeError(f"{name}={given!r}: True, False or a dictionary of options is needed.")
    return {} if given else None
