"""`quiet` silences one thread and leaves logging as it was; an export leaves no handler behind."""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Iterator

import pytest

from fxprune.export.quiet import quiet


class Heard(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


@pytest.fixture
def heard() -> Iterator[Heard]:
    handler = Heard()
    logging.root.addHandler(handler)
    yield handler
    logging.root.removeHandler(handler)


def test_warnings_of_this_thread_are_dropped_and_errors_and_other_threads_are_not(heard: Heard) -> None:
    with quiet():
        logging.getLogger("onnxscript.optimizer").warning("own warning")
        logging.getLogger("onnxscript.optimizer").error("own error")
        other = threading.Thread(target=logging.getLogger("application").warning, args=("other thread",))
        other.start()
        other.join()
    logging.getLogger("onnxscript.optimizer").warning("afterwards")
    assert heard.messages == ["own error", "other thread", "afterwards"]


def test_a_tools_own_handler_is_silent_too(heard: Heard) -> None:
    logger = logging.getLogger("onnxruntime.some.tool")
    own = Heard()
    logger.addHandler(own)
    logger.propagate = False
    with quiet():
        logger.warning("hidden")
    logger.warning("shown")
    logger.removeHandler(own)
    assert (own.messages, heard.messages) == (["shown"], [])


def test_blocks_that_overlap_leave_nothing_behind(heard: Heard) -> None:
    first, second = quiet(), quiet()
    filters = list(heard.filters)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    logging.warning("still silent")
    second.__exit__(None, None, None)
    logging.warning("loud")
    assert heard.messages == ["loud"]
    assert heard.filters == filters


def test_deprecations_of_the_tools_are_dropped_and_others_are_not() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with quiet():
            warnings.warn_explicit("old", DeprecationWarning, "f", 1, module="onnxscript.ir")
            warnings.warn_explicit("own", DeprecationWarning, "f", 1, module="application")
    assert [str(warning.message) for warning in caught] == ["own"]


def test_without_handlers_none_is_left_behind(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(logging.root, "handlers", [])
    with quiet():
        logging.warning("hidden")  # installs a handler for good where there is none
    assert logging.root.handlers == []
    logging.getLogger("application").warning("shown")
    assert capsys.readouterr().err == "shown\n"
