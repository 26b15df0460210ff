"""What happened lately, in bounded memory: how long things took, and tokens a second."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from reft_runtime.outputs import EngineStats

DURATIONS_SECONDS = 60
"""The time of which percentiles are known."""

RATES_SECONDS = 10
"""The time over which tokens are counted."""

_STEP = math.log(1.05)
"""Durations are kept to 5 percent: logarithms of neighbouring bins differ by this."""

_SHORTEST, _LONGEST = 1e-5, 1e4


class Durations:
    """Percentiles of the last minute's durations, exact to 2.5 percent; for all threads.

    A second of them is a histogram of at most some 400 bins, whatever their number.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._seconds = [-1] * DURATIONS_SECONDS
        self._bins: list[Counter[int]] = [Counter() for _ in range(DURATIONS_SECONDS)]

    def observe(self, seconds: float) -> None:
        """Something took so long, and ended now."""
        bin = round(math.log(min(max(seconds, _SHORTEST), _LONGEST)) / _STEP)
        now = int(self._clock())
        place = now % DURATIONS_SECONDS
        with self._lock:
            if self._seconds[place] != now:
                self._seconds[place] = now
                self._bins[place].clear()
            self._bins[place][bin] += 1

    def percentiles(self, *shares: float) -> tuple[int, list[float | None]]:
        """How many there were, and the durations that such shares of them did not exceed.

        None where there were none.
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
    """Tokens a second over the last `RATES_SECONDS`, by the engine's own counters."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._samples: deque[_Sample] = deque(maxlen=RATES_SECONDS)

    async def watch(self, stats: Callable[[], EngineStats]) -> None:
        """Look at the counters every second."""
        while True:
            self.sample(stats())
            await asyncio.sleep(1)

    def sample(self, stats: EngineStats) -> None:
        """Keep the counters of this moment."""
        self._samples.append(_Sample(self._clock(), stats.prompt_tokens, stats.generation_tokens))

    def until(self, stats: EngineStats) -> tuple[float, float]:
        """Prompt tokens and generated tokens a second, from the oldest sample to these counters."""
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
