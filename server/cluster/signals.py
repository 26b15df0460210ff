"""The signals that end a cluster, also amid a call of Ray's, and the one that updates it."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

import psutil

logger = logging.getLogger("reft.server")


class Ended(Exception):
    """A signal has ended what was under way."""


class Signals:
    """SIGINT and SIGTERM, which end the cluster, and SIGHUP, which updates it."""

    def __init__(self) -> None:
        self._news = threading.Event()
        self.ended = self._again = self._ending = False
        self.install()

    def install(self) -> None:
        """Take the signals, from Ray too, which ends the process at a SIGTERM."""
        for sig in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(sig, self._handle)

    @contextmanager
    def ending(self) -> Iterator[None]:
        """A block that SIGINT and SIGTERM end, by `Ended`, as it waits for Ray by itself."""
        self._ending = True
        try:
            if self.ended:
                raise Ended
            yield
        except Exception:
            if self.ended:  # code in C that was under way has made another error of `Ended`
                raise Ended from None
            raise
        finally:
            self._ending = False

    def wait(self) -> bool:
        """Wait for a signal: True for an update, False for the end."""
        while not (self.ended or self._again):
            self._news.wait(1)
            self._news.clear()
        self._again = False
        return not self.ended

    def _handle(self, sig: int, frame: FrameType | None) -> None:
        if sig == signal.SIGHUP:
            self._again = True
        elif self.ended:
            _kill_descendants()
            os._exit(128 + sig)
        else:
            logger.info("%s: the cluster ends", signal.Signals(sig).name)
            self.ended = True
            if self._ending:
                raise Ended
        self._news.set()


def _kill_descendants() -> None:
    """End Ray's processes at once: its proxy would outlive them, and keep the port."""
    for process in psutil.Process().children(recursive=True):  # parents before their children
        with suppress(psutil.NoSuchProcess):
            process.kill()
