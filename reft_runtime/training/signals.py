"""SIGINT and SIGTERM while a training computes: they wait until a step is whole."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, Self

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class HeldSignals:
    """A block in which the first signal waits; the handler that was there gets it at the end.

    So a training can finish its step and keep a checkpoint before Python raises
    `KeyboardInterrupt`. A second signal goes to that handler at once. A signal that nobody handles
    in Python does what it does otherwise. Nothing is held outside the main thread, which alone may
    handle signals, and where several processes train together, which would not stop at one step.
    """

    def __init__(self) -> None:
        self._handlers: dict[int, Callable[[int, FrameType | None], Any]] = {}
        self._held: tuple[int, FrameType | None] | None = None

    @property
    def waiting(self) -> bool:
        """Whether a signal waits."""
        return self._held is not None

    def __enter__(self) -> Self:
        alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
        if alone and threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                handler = signal.getsignal(number)
                if callable(handler):
                    self._handlers[number] = handler
                    signal.signal(number, self._hold)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        if self._held is not None and error is None:
            self._handlers[self._held[0]](*self._held)

    def _hold(self, number: int, frame: FrameType | None) -> None:
        if self._held is None:
            self._held = (number, frame)
        else:
            self._handlers[number](number, frame)
