"""Whether threads compute or wait for cores that others use. Knows no tensors."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

WINDOW_SECONDS = 2.0
"""Seconds of steps that are judged together: a single slow step says nothing."""

SHARE = 0.7
"""A thread whose workers have cores of their own is on a core for more than this share of its
steps' time. With two threads on busy cores the share was a half, and the steps took ten times as
long as with one thread."""

FIRST_PAUSE, LONGEST_PAUSE = 4.0, 64.0
"""Seconds with fewer threads before all are tried again; each time in vain doubles them."""

_log = logging.getLogger(__name__)


class StepWatch:
    """Notices steps that wait for cores, says so once, and lets fewer threads compute.

    The workers of a parallel operator wait busily for each other, and if other processes take the
    cores, they wait for a worker that does not run. `threads` is the number of workers; 1 is not
    watched. `use` sets how many the calling thread's next steps have; without it their number stays
    as it is. After `window` seconds of steps it is judged. What is `quiet` says nothing. `wall` and
    `cpu` return seconds; `cpu` counts those that the calling thread was on a core.
    """

    def __init__(
        self,
        threads: int,
        use: Callable[[int], None] | None = None,
        wall: Callable[[], float] = time.perf_counter,
        cpu: Callable[[], float] = time.thread_time,
        *,
        window: float = WINDOW_SECONDS,
        quiet: bool = False,
    ) -> None:
        self._threads = self._now = threads
        self._use = use
        self._wall, self._cpu = wall, cpu
        self._window = window
        self._told = quiet
        self._seconds = self._computed = 0.0
        self._pause, self._until = FIRST_PAUSE / 2, 0.0

    @contextmanager
    def step(self) -> Iterator[None]:
        """Watch one step, which begins and ends in the calling thread."""
        wall, cpu = self._wall(), self._cpu()
        yield
        if self._threads > 1:
            self._add(self._wall() - wall, self._cpu() - cpu)

    def _add(self, seconds: float, computed: float) -> None:
        if self._now < self._threads and self._wall() >= self._until:
            self._change(self._threads)  # for a window: perhaps the others are gone
            return
        self._seconds += seconds
        self._computed += computed
        tried_in_vain = self._pause > FIRST_PAUSE
        if self._seconds < (self._window / 4 if tried_in_vain else self._window):
            return
        if self._computed >= SHARE * self._seconds:
            if self._now == self._threads:
                self._pause = FIRST_PAUSE / 2
        elif self._now > 1:
            self._tell()
            if self._use is not None:
                if self._now == self._threads:
                    self._pause = min(2 * self._pause, LONGEST_PAUSE)
                self._until = self._wall() + self._pause
                self._change(self._now // 2)
        self._seconds = self._computed = 0.0

    def _change(self, threads: int) -> None:
        assert self._use is not None
        self._now = threads
        self._use(threads)
        self._seconds = self._computed = 0.0

    def _tell(self) -> None:
        if self._told:
            return
        self._told = True
        what = (
            "fewer are often much faster: try --threads %d (there are %d)"
            if self._use is None
            else "from now on %d compute, and all %d are tried again from time to time"
        )
        _log.warning(
            "Other processes want the same cores: of %.0f s, a thread was on one for %.1f. Then"
            f" several threads wait for each other; {what}.",
            self._seconds,
            self._computed,
            self._now // 2,
            self._threads,
        )
