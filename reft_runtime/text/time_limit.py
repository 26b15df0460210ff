"""A limit for the time that a program of somebody else's takes in a thread of this process."""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

WRITING_SECONDS = 5.0
"""What a chat template may take; usual ones write the longest chats in a hundredth of it."""

_LOOK_SECONDS = 0.5
"""How often somebody looks whether time is up."""


class TookTooLong(Exception):
    """What was to be done within a time was not."""


class _Watch:
    """Looks at the clock for all threads that are within a limit, in a thread of its own."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._ends: dict[int, float] = {}
        self._any = threading.Event()
        self._thread: threading.Thread | None = None

    def begin(self, seconds: float) -> None:
        """This thread's time is up in so many seconds."""
        with self._lock:
            if self._thread is None or not self._thread.is_alive():
                self._ends.clear()  # after a fork, those of threads that are not in this process
                self._thread = threading.Thread(target=self._run, name="reft-time", daemon=True)
                self._thread.start()
            self._ends[threading.get_ident()] = time.monotonic() + seconds
            self._any.set()

    def end(self) -> None:
        """This thread has done what it had to do."""
        with self._lock:
            # Not taken back: what is to be raised is raised here, if it has not been yet. CPython
            # 3.11 would look for one that was taken back at every step from then on.
            self._ends.pop(threading.get_ident(), None)

    def _run(self) -> None:
        while self._any.wait():
            time.sleep(_LOOK_SECONDS)
            with self._lock:
                late = [one for one, end in self._ends.items() if end < time.monotonic()]
                for thread in late:
                    del self._ends[thread]
                    _interrupt(thread)
                if not self._ends:
                    self._any.clear()


_watch = _Watch()


def _interrupt(thread: int) -> None:
    """Raise `TookTooLong` in a thread at its next step."""
    error = ctypes.py_object(TookTooLong)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), error)


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise `TookTooLong` in the block, within a second, when it has taken so many seconds.

    It is raised between two steps of Python: a single one, such as a huge power, is waited for.
    """
    _watch.begin(seconds)
    try:
        yield
    finally:
        _watch.end()
