"""The command line: usage, errors and exit codes."""

import subprocess
import sys
from pathlib import Path

import pytest

import fxprune
from fxprune import cli


def outcome(capsys, *arguments):
    with pytest.raises(SystemExit) as exit_:
        cli.main(list(arguments))
    return exit_.value.code or 0, *capsys.readouterr()


def test_version_and_help(capsys):
    assert outcome(capsys, "--version") == (0, f"{fxprune.__version__}\n", "")
    code, out, _ = outcome(capsys, "--help")
    assert (code, "demo" in out) == (0, True)
    code, out, _ = outcome(capsys, "demo", "--help")
    assert code == 0
    assert all(option in out for option in ("--output", "--seed", "--epochs", "--quiet", "--json"))


@pytest.mark.parametrize(
    "arguments",
    [("unknown",), ("demo", "--epochs", "0"), ("demo", "--epochs", "some"), ("demo", "--seed", "-1"), ("demo", "more")],
)
def test_wrong_usage_exits_with_2(capsys, arguments, monkeypatch):
    monkeypatch.setattr(cli.demo_, "run", lambda *a, **k: pytest.fail("went on"))
    code, out, err = outcome(capsys, *arguments)
    assert (code, out) == (2, "")
    assert "Usage:" in err


def test_an_error_prints_its_message_alone(capsys, monkeypatch):
    def fail(*args, **kwargs):
        raise fxprune.FxpruneError("what was asked, what was found, what to do")

    monkeypatch.setattr(cli.demo_, "run", fail)
    assert outcome(capsys, "demo") == (1, "", "fxprune: what was asked, what was found, what to do\n")


def test_another_error_is_not_hidden(monkeypatch):
    monkeypatch.setattr(cli.demo_, "run", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli.main(["demo"])


PROGRAMS = """
import runpy, sys
for module in ("fxprune.cli", "fxprune"):  # as `python -m` runs them, after one import of torch
    sys.argv = [module, "--version"]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as exit:
        assert not exit.code, exit.code
"""


def test_it_runs_as_a_program():
    root = Path(fxprune.__file__).parents[1]
    run = subprocess.run([sys.executable, "-c", PROGRAMS], capture_output=True, text=True, check=False, cwd=root)
    assert (run.returncode, run.stdout, run.stderr) == (0, f"{fxprune.__version__}\n" * 2, "")
