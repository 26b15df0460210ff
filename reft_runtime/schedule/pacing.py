"""How many prompt tokens a step may take, from measured step times. Knows no tensors.

A step that computes prompts takes longer, and every sequence that decodes waits for it. So while
sequences decode, each prompt may add a moment that a reader hardly notices, or, on a slow machine,
a share of the time of a step without prompts. Many prompts add as many moments, up to
`PRESSED_SECONDS`: then streams stand still a few times and go on at full speed, where small pieces
of prompts would slow every token of theirs, and prompts do not wait for each other's pieces. If no
sequence decodes, none waits: only `LONGEST_SECONDS` bounds a step's time.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass

MOMENT_SECONDS = 0.25
"""Time that each prompt may add to a step."""

SHARE = 0.75
"""The same as a share of a step without prompts, if that is more. A share of 1 would double the
wait for a token on average, and more than double it at the 95th percentile."""

PRESSED_SECONDS = 2.0
"""Time that all prompts together may add to a step, however many they are."""

LEAST_TOKENS = 8
"""Least prompt tokens of a step on a CPU, however long they take, so that prompts always go on.
Whole blocks would be too coarse: 16 tokens after a long context can cost as much as a decode step.
"""

GRAIN = 4
"""The number of a step's prompt tokens is rounded down to a multiple of this."""

FIRST_TOKENS = 384
"""Most prompt tokens of a step before any is measured."""

LONGEST_SECONDS = 5.0
"""Longest step in which no sequence decodes: half of what the server's health check allows."""

MEASURED_EVERY = 32
"""Number of steps with prompts after which one has none, so that the time of a pure decode step
stays known."""

MEASURED_TOKENS = 64
"""Least prompt tokens of a step without decodes from which the time of one token is learned: the
weights are read for few tokens as for many."""

WEIGHT = 0.3
"""Weight of the newest measurement in an estimate."""

OUTLIER = 2.0
"""A measurement is clamped to at most this many times the estimate, and to at least the estimate
divided by this: anything beyond is hardly the step's own time."""


@dataclass(frozen=True, slots=True)
class StepTimes:
    """Estimated seconds of steps; `decodes` are numbers of sequences that were measured, rising.

    Between two of them a step's time is interpolated. With fewer it is that of the least, and each
    decode more than the most takes as long as a prompt token.
    """

    decodes: tuple[float, ...]
    seconds: tuple[float, ...]
    prompt_token: float

    def step(self, decodes: int, prompt_tokens: int) -> float:
        """Seconds of a step. One without decodes takes its prompts beside what one decode takes."""
        return self._decode(max(1, decodes)) + prompt_tokens * self.prompt_token

    def prompt_tokens(self, seconds: float) -> int:
        """Number of prompt tokens that take so long at most, in whole grains."""
        return max(0, int(seconds / self.prompt_token) // GRAIN * GRAIN)

    def _decode(self, decodes: int) -> float:
        above = bisect_left(self.decodes, decodes)
        if above == 0:
            return self.seconds[0]
        if above == len(self.decodes):
            return self.seconds[-1] + (decodes - self.decodes[-1]) * self.prompt_token
        low, high = self.decodes[above - 1], self.decodes[above]
        part = (decodes - low) / (high - low)
        return self.seconds[above - 1] * (1 - part) + self.seconds[above] * part


class StepPacer:
    """Keeps estimates of the seconds of a step that only decodes, and of one prompt token.

    They are exponentially weighted means. Decode steps are told apart by the number of their
    sequences, rounded up to a power of two.
    """

    def __init__(self, mixed_tokens: int = 2048, least_tokens: int = LEAST_TOKENS) -> None:
        self.mixed_tokens = mixed_tokens
        self._least_tokens = least_tokens
        self._decode_seconds: dict[int, float] = {}
        self._decode_counts: dict[int, float] = {}
        self._prompt_seconds: float | None = None
        self._unmeasured = 0

    def prompt_tokens(self, decodes: int, prompts: int) -> int:
        """Most prompt tokens of a step in which `decodes` sequences decode, of `prompts` prompts.

        0 now and then while sequences decode (see `MEASURED_EVERY`), else at least `least_tokens`.
        """
        prompt = self._prompt_seconds
        if not decodes:
            return self._rounded(LONGEST_SECONDS / prompt) if prompt else FIRST_TOKENS
        if self._unmeasured >= MEASURED_EVERY:
            return 0
        decode = self._decode(decodes)
        if not decode or not prompt:
            return FIRST_TOKENS
        moment = max(MOMENT_SECONDS, SHARE * decode)
        seconds = min(prompts * moment, max(moment, PRESSED_SECONDS))
        return min(self.mixed_tokens, self._rounded(seconds / prompt))

    def expected(self, decodes: int, prompt_tokens: int) -> float | None:
        """Seconds that a step is likely to take; None where nothing like it was measured."""
        decode = self._decode(decodes) if decodes else 0.0
        prompt = self._prompt_seconds if prompt_tokens else 0.0
        return None if decode is None or prompt is None else decode + prompt_tokens * prompt

    def times(self) -> StepTimes | None:
        """What was measured until now; None unless both kinds of steps were."""
        if not self._decode_seconds or not self._prompt_seconds:
            return None
        sizes = sorted(self._decode_seconds)
        seconds = tuple(self._decode_seconds[size] for size in sizes)
        counts = tuple(self._decode_counts[size] for size in sizes)
        return StepTimes(counts, seconds, self._prompt_seconds)

    def record(self, decodes: int, prompt_tokens: int, seconds: float) -> None:
        """Learn from a step that took `seconds`."""
        if not prompt_tokens:
            self._unmeasured = 0
            size = _size(decodes)
            self._decode_seconds[size] = _weighted(self._decode_seconds.get(size), seconds)
            self._decode_counts[size] = _weighted(self._decode_counts.get(size), decodes)
            return
        if not decodes:
            if prompt_tokens >= MEASURED_TOKENS:
                self._learn_prompt(seconds / prompt_tokens)
            return
        self._unmeasured += 1
        decode = self._decode(decodes)
        if decode is not None and prompt_tokens >= self._least_tokens:
            self._learn_prompt(max(0.0, seconds - decode) / prompt_tokens)

    def _rounded(self, tokens: float) -> int:
        return max(self._least_tokens, int(tokens) // GRAIN * GRAIN)

    def _learn_prompt(self, seconds: float) -> None:
        self._prompt_seconds = _weighted(self._prompt_seconds, seconds)

    def _decode(self, decodes: int) -> float | None:
        """Seconds of a step with this many decodes, or the nearest size measured; None at first."""
        size = _size(decodes)
        nearest = min(self._decode_seconds, key=lambda s: abs(s - size), default=None)
        return None if nearest is None else self._decode_seconds[nearest]


def _size(decodes: int) -> int:
    return (decodes - 1).bit_length()


def _weighted(known: float | None, measured: float) -> float:
    if not known:
        return measured
    return known + WEIGHT * (min(max(measured, known / OUTLIER), known * OUTLIER) - known)
