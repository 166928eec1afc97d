"""Silence for the tools that write and convert files: their warnings tell of each other and of steps done elsewhere."""

from __future__ import annotations

import contextlib
import logging
import threading
import warnings
from collections.abc import Iterator

_TOOLS = ("torch", "onnx", "onnxscript", "onnx_ir", "onnxruntime")


class _ThisThread(logging.Filter):
    """Drops what one thread logs below an error."""

    def __init__(self) -> None:
        super().__init__()
        self._thread = threading.get_ident()

    def filter(self, record: logging.LogRecord) -> bool:
        return record.thread != self._thread or record.levelno > logging.WARNING


class _LastResort(logging.Handler):
    """What logging does without a handler; with one, its functions install none of their own for good."""

    def emit(self, record: logging.LogRecord) -> None:
        if logging.lastResort is not None and record.levelno >= logging.lastResort.level:
            logging.lastResort.handle(record)


def _handlers() -> set[logging.Handler]:
    """Of the root and of the tools' own loggers."""
    found = set(logging.root.handlers)
    for name, logger in list(logging.root.manager.loggerDict.items()):
        if name.partition(".")[0] in _TOOLS and isinstance(logger, logging.Logger):
            found.update(logger.handlers)
    return found


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Drop what this thread logs below an error, and the tools' deprecation warnings.

    Other threads go on logging, and the handlers are as before afterwards. Python's warning filters belong to the
    whole process: other threads' deprecation warnings from these packages are dropped too meanwhile, and two threads
    that export at the same time may restore each other's filters.
    """
    spare = _LastResort()
    silence = _ThisThread()
    if not logging.root.handlers:
        logging.root.addHandler(spare)
    handlers = _handlers()
    for handler in handlers:
        handler.addFilter(silence)
    try:
        with warnings.catch_warnings():
            for category in (DeprecationWarning, FutureWarning):
                warnings.filterwarnings("ignore", category=category, module=r"(torch|onnx\w*|copyreg)(\.|$)")
            yield
    finally:
        for handler in handlers:
            handler.removeFilter(silence)
        logging.root.removeHandler(spare)
