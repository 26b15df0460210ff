"""Logs what a start is doing: every stage logs its seconds, and none is silent for long."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

SILENT_SECONDS = 3.0
"""A stage that goes on logs a line after this many seconds, the next after twice as many."""

LONGEST_SILENCE = 60.0
"""The pauses between the lines double up to this many seconds."""

_log = logging.getLogger(__name__)


def tell(line: str) -> None:
    """Log one line among those of the stages."""
    _log.info(line)


@contextmanager
def stage(name: str) -> Iterator[None]:
    """Log the seconds that the block takes: at its end, and before after longer and longer pauses.

    A block that raises logs no end, because whoever catches the error reports it. The lines have
    level INFO, so that a library's user sees them only if logging is set up to show them.
    """
    began, ended = time.monotonic(), threading.Event()

    def watch() -> None:
        pause = SILENT_SECONDS
        while not ended.wait(pause):
            _log.info("%s: %.0f s so far", name, time.monotonic() - began)
            pause = min(2 * pause, LONGEST_SILENCE)

    watcher = threading.Thread(target=watch, name="reft-stage", daemon=True)
    if _log.isEnabledFor(logging.INFO):
        watcher.start()
    try:
        yield
    finally:
        ended.set()
        if watcher.ident is not None:
            watcher.join()
    _log.info("%s: %.1f s", name, time.monotonic() - began)
