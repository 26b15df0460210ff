"""Whether threads compute or wait for cores that others use. Knows no tensors."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

WINDOW_SECONDS = 10.0
"""Seconds of steps that are judged together: a single slow step says nothing."""

SHARE = 0.7
"""A thread whose workers have cores of their own is on a core for more than this share of its
steps' time. With two threads on busy cores the share was a half, and the steps took ten times as
long as with one thread."""

_log = logging.getLogger(__name__)


class StepWatch:
    """Logs one warning when steps wait for cores: then fewer threads are faster.

    The workers of a parallel operator wait busily for each other, and if other processes take the
    cores, they wait for a worker that does not run. `threads` is the number of workers; 1 is not
    watched. `wall` and `cpu` return seconds; `cpu` counts those that the calling thread was on a
    core.
    """

    def __init__(
        self,
        threads: int,
        wall: Callable[[], float] = time.perf_counter,
        cpu: Callable[[], float] = time.thread_time,
    ) -> None:
        self._threads = threads
        self._wall, self._cpu = wall, cpu
        self._watching = threads > 1
        self._seconds = self._computed = 0.0

    @contextmanager
    def step(self) -> Iterator[None]:
        """Watch one step, which begins and ends in the calling thread."""
        wall, cpu = self._wall(), self._cpu()
        yield
        if self._watching:
            self._add(self._wall() - wall, self._cpu() - cpu)

    def _add(self, seconds: float, computed: float) -> None:
        self._seconds += seconds
        self._computed += computed
        if self._seconds < WINDOW_SECONDS:
            return
        if self._computed < SHARE * self._seconds:
            self._watching = False
            _log.warning(
                "The cores are busy with other work: of %.0f s, a thread was on one for %.0f. Then"
                " several threads wait for each other, and fewer are often much faster: try"
                " --threads %d (there are %d).",
                self._seconds,
                self._computed,
                self._threads // 2,
                self._threads,
            )
        self._seconds = self._computed = 0.0
