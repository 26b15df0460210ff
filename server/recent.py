"""Recent durations and token rates, kept in bounded memory."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from reft_runtime.stats import EngineStats

DURATIONS_SECONDS = 60
"""Length of the past time, in seconds, of which percentiles are known."""

RATES_SECONDS = 10
"""Length of the past time, in seconds, over which tokens are counted."""

_STEP = math.log(1.05)
"""Width of a bin, as a logarithm: the durations of neighbouring bins differ by 5 percent."""

_SHORTEST, _LONGEST = 1e-5, 1e4


class Durations:
    """Percentiles of the last minute's durations, exact to 2.5 percent; safe for all threads.

    The durations of each second are a histogram of at most some 400 bins, whatever their number.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._seconds = [-1] * DURATIONS_SECONDS
        self._bins: list[Counter[int]] = [Counter() for _ in range(DURATIONS_SECONDS)]

    def observe(self, seconds: float) -> None:
        """Add a duration, in seconds, that ended now."""
        bin = round(math.log(min(max(seconds, _SHORTEST), _LONGEST)) / _STEP)
        now = int(self._clock())
        place = now % DURATIONS_SECONDS
        with self._lock:
            if self._seconds[place] != now:
                self._seconds[place] = now
                self._bins[place].clear()
            self._bins[place][bin] += 1

    def percentiles(self, *shares: float) -> tuple[int, list[float | None]]:
        """Number of durations, and for each share (0 to 1) the percentile in seconds.

        That share of the durations did not exceed the percentile, which is None if there were no
        durations.
        """
        after = int(self._clock()) - DURATIONS_SECONDS
        total: Counter[int] = Counter()
        with self._lock:
            for second, bins in zip(self._seconds, self._bins, strict=True):
                if second > after:
                    total.update(bins)
        count = total.total()
        return count, [_percentile(total, share * count) for share in shares]


def _percentile(bins: Counter[int], wanted: float) -> float | None:
    seen = 0
    for bin in sorted(bins):
        seen += bins[bin]
        if seen >= wanted:
            return math.exp(bin * _STEP)
    return None


class _Sample(NamedTuple):
    at: float
    prompt_tokens: int
    generation_tokens: int


class Rates:
    """Tokens per second over the last `RATES_SECONDS`, from the engine's own counters."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._samples: deque[_Sample] = deque(maxlen=RATES_SECONDS)

    async def watch(self, stats: Callable[[], EngineStats]) -> None:
        """Sample the counters every second, until cancelled."""
        while True:
            self.sample(stats())
            await asyncio.sleep(1)

    def sample(self, stats: EngineStats) -> None:
        """Keep the present values of the counters."""
        self._samples.append(_Sample(self._clock(), stats.prompt_tokens, stats.generation_tokens))

    def until(self, stats: EngineStats) -> tuple[float, float]:
        """Prompt tokens and generated tokens per second, from the oldest sample to `stats`."""
        now = self._clock()
        samples = list(self._samples)
        if not samples or now <= samples[0].at:
            return 0.0, 0.0
        first = samples[0]
        seconds = now - first.at
        return (
            (stats.prompt_tokens - first.prompt_tokens) / seconds,
            (stats.generation_tokens - first.generation_tokens) / seconds,
        )
