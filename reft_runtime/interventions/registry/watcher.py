"""The thread that scans the sources again and again, and leaves time to the engine's."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

LOOK_SHARE = 0.05
"""At most this share of time is spent on looking for changes in the sources."""

WORK_SHARE = 0.25
"""At most this share of time is spent on reading what has changed."""

BREATH = 4
"""After files are looked at, a scan pauses this many times as long as that took."""

Rest = Callable[[float], bool]
Between = Callable[[float], object]

_log = logging.getLogger(__name__)


class Watcher:
    """Calls `scan` every `interval` seconds until it is closed.

    It runs less often if looking would take more than `LOOK_SHARE` of the time, and reading takes
    at most `WORK_SHARE` of it. What `scan` gets is for it to call, as `Registry.scan` says.
    """

    def __init__(self, scan: Callable[[Rest, Between], None], interval: float) -> None:
        self._scan = scan
        self._interval = interval
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="reft-registry", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop, and wait for the scan that is under way."""
        self._closed.set()
        self._thread.join()

    def _run(self) -> None:
        wait = self._interval
        while not self._closed.wait(wait):
            began, away = time.monotonic(), 0.0

            def rest(worked: float) -> bool:
                # A scan that computes in Python holds up the engine's thread, so it pauses.
                nonlocal away
                away += worked / WORK_SHARE
                return self._closed.wait(worked / WORK_SHARE - worked)

            def between(looked: float) -> None:
                nonlocal away
                away += BREATH * looked
                self._closed.wait(BREATH * looked)

            try:
                self._scan(rest, between)
            except Exception:  # the watch must outlive whatever one scan meets
                _log.exception("scanning the sources failed")
            wait = max(self._interval, (time.monotonic() - began - away) / LOOK_SHARE)
