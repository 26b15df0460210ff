"""A thread that looks at a place again and again, less often while it cannot be reached."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

POLL_SECONDS = 10.0
"""Time between two looks at a place that answers."""

LONGEST_SECONDS = 60.0
"""Longest time between two looks at a place that does not answer; it doubles up to this."""

POLL_SHARE = 0.1
"""At most this share of time is spent on looking."""

_log = logging.getLogger(__name__)


class Poller:
    """Calls `poll`, which says whether it reached the place, until it is closed."""

    def __init__(self, poll: Callable[[], bool], name: str) -> None:
        self._poll = poll
        self._closed = threading.Event()
        # It may be in the middle of a call over the network when the process ends.
        self._thread = threading.Thread(target=self._run, name=f"reft-poll-{name}", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop; a call over the network that is under way is left to end by itself."""
        self._closed.set()
        self._thread.join(timeout=1)

    def _run(self) -> None:
        wait = POLL_SECONDS
        while not self._closed.wait(wait):
            began = time.monotonic()
            try:
                reached = self._poll()
            except Exception:  # the thread must outlive whatever one look meets
                if self._closed.is_set():  # what it works with was closed meanwhile
                    return
                _log.exception("looking at a URL failed")
                reached = False
            took = time.monotonic() - began
            if reached:
                wait = max(POLL_SECONDS, took / POLL_SHARE - took)
            else:
                wait = min(2 * wait, LONGEST_SECONDS)
