"""What a terminal shows of long works, and what nothing else does."""

from __future__ import annotations

import io
import re
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import nn
from torch.nn.utils.prune import L1Unstructured

import fxprune
from fxprune.progress import bars, quiet, working
from fxprune.progress_bars import Bars

CODES = re.compile(r"\x1b\[[?0-9;]*[A-Za-z]")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def seen(stream: io.StringIO) -> str:
    """The text that was written, without the codes that move the cursor."""
    return CODES.sub("", stream.getvalue())


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    stream = Terminal()
    monkeypatch.setattr("sys.stderr", stream)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    return stream


def console_of(stream: io.StringIO) -> Console:
    return Console(file=stream, force_terminal=True, width=100)


def test_a_work_that_is_done_at_once_writes_nothing(terminal: Terminal) -> None:
    with working("sensitivity", 2) as work:
        work.show("conv1")
        work.advance(2)
    assert terminal.getvalue() == ""


def test_a_long_work_shows_its_name_and_what_it_is_at_and_is_gone_at_the_end(terminal: Terminal) -> None:
    with bars(console_of(terminal), patience=0.05), working("sensitivity", 2) as work:
        work.show("blocks[0].conv1")
        time.sleep(0.4)
    assert "sensitivity blocks[0].conv1" in seen(terminal)
    assert terminal.getvalue().rstrip().endswith(("\x1b[2K", "\x1b[?25h"))  # the line is erased, the cursor is back


def test_works_inside_works_have_a_line_each(terminal: Terminal) -> None:
    with bars(console_of(terminal), patience=0.0), working("choose channels"), working("sensitivity", 3):
        time.sleep(0.3)
    lines = seen(terminal).splitlines()
    assert any(line.strip().startswith("choose channels") for line in lines)
    assert any(line.strip().startswith("sensitivity") for line in lines)


def test_an_error_leaves_no_line_and_a_cursor(terminal: Terminal) -> None:
    with pytest.raises(ZeroDivisionError), bars(console_of(terminal), patience=0.0), working("trace"):
        time.sleep(0.3)
        raise ZeroDivisionError
    assert "trace" in seen(terminal)
    assert terminal.getvalue().count("\x1b[?25l") == terminal.getvalue().count("\x1b[?25h") == 1


def test_nothing_is_written_where_it_is_no_terminal_or_quiet_was_asked_for(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    with quiet(), bars(console_of(terminal), patience=0.0) as asked, working("trace"):
        time.sleep(0.2)
    assert asked is None
    assert terminal.getvalue() == ""
    file = io.StringIO()
    monkeypatch.setattr("sys.stderr", file)
    with bars(patience=0.0) as shared, working("trace"):
        time.sleep(0.2)
    assert shared is None
    assert file.getvalue() == ""


@pytest.mark.parametrize("stream", [None, io.StringIO()])
def test_a_program_without_standard_error_runs(stream: io.StringIO | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr", stream)
    with working("trace") as work:
        work.advance(1)


def test_every_long_step_is_a_work(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    told: list[str] = []
    add = Bars.add_task

    def noted(self: Bars, description: str, *args: object, **kwargs: object) -> object:
        told.append(description)
        return add(self, description, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(Bars, "add_task", noted)
    model, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).eval(), torch.randn(64, 4)
    with bars(Console(file=io.StringIO(), force_terminal=True)):
        traced = fxprune.trace(model, (x,))
        fxprune.sensitivity(traced, x)
        fxprune.prune.channels(traced, macs=0.5)
        fxprune.reconstruct(traced, x)
        final = fxprune.finalize(traced)
        fxprune.export.to_onnx(final, tmp_path / "model.onnx")
        fxprune.compare(traced, final, inputs=x)
        fxprune.write_back(final, model)
        fxprune.prune.global_unstructured(traced, "*.weight", L1Unstructured, amount=0.1)
        fxprune.save(final, tmp_path / "model.fxp")
        fxprune.load(tmp_path / "model.fxp")
        fxprune.load_state(traced, traced.state_dict())
        fxprune.export.to_program(final, tmp_path / "model.pt2")
        fxprune.export.to_torchscript(final, tmp_path / "model.pt")
        fxprune.export.bench([tmp_path / "model.onnx"], rounds=1)
    ones = {"trace", "finalize", "compare", "reconstruct", "sensitivity"}
    assert ones | {"choose channels", "write ONNX", "write back"} <= set(told)
    assert {"choose entries", "save", "load", "load state", "write program", "write TorchScript"} <= set(told)
    assert "measure latencies" in told


def test_what_is_quiet_inside_shown_works_stays_so(terminal: Terminal) -> None:
    with bars(console_of(terminal), patience=0.0), quiet(), working("trace"):
        time.sleep(0.2)
    assert "trace" not in seen(terminal)
