"""A lock that its threads get in order of arrival."""

from __future__ import annotations

import threading
from collections import deque
from types import TracebackType


class FifoLock:
    """A lock for `with`; who asks for it again does not get it before those that wait.

    Of `threading.Lock` a thread that takes it again and again can keep all others out for minutes.
    """

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._waiting: deque[threading.Lock] = deque()
        self._taken = False

    def __enter__(self) -> None:
        with self._guard:
            if not self._taken:
                self._taken = True
                return
            turn = threading.Lock()
            turn.acquire()
            self._waiting.append(turn)
        try:
            turn.acquire()
        except BaseException:  # Ctrl-C, in the main thread
            with self._guard:
                mine = turn not in self._waiting
                if not mine:
                    self._waiting.remove(turn)
            if mine:
                self._pass_on()
            raise

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._pass_on()

    def _pass_on(self) -> None:
        with self._guard:
            if self._waiting:
                self._waiting.popleft().release()
            else:
                self._taken = False
