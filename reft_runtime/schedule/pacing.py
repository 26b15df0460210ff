"""How many prompt tokens a step may take, from measured step times. Knows no tensors.

A step that computes prompts takes longer, and whoever decodes waits for it. So while sequences
decode, prompts may add a share of the time of a step without prompts: one long prompt slows the
streams a little. The share grows with the square of the number of prompts, for each of them waits
for all before it: where many come, the steps are theirs, and throughput does not suffer. Where
nobody decodes, nobody waits.
"""

from __future__ import annotations

SHARE = 0.75
"""Time that one prompt alone may add to a step, in steps without prompts: 1 would double what
streams wait for a token on average, and so pass that at the 95th percentile."""

LEAST_TOKENS = 8
"""Prompt tokens of a step, however long it takes: prompts go on. Of a CPU. Whole blocks would be
too coarse: 16 tokens after a long context can cost a decode step."""

GRAIN = 4
"""All numbers of prompt tokens are multiples of it."""

MIXED_TOKENS = 384
"""Most prompt tokens of a step in which sequences decode, and of one before anything is measured;
beyond this larger products are hardly faster, and all in a step wait for its end. Of a CPU."""

LONGEST_SECONDS = 5.0
"""Of a step in which nobody decodes; half of what the server's health check allows."""

MEASURED_EVERY = 32
"""Steps with prompts after which one goes without, so that the time of such steps stays known."""

MEASURED_TOKENS = 64
"""Prompt tokens from which on a step without decode rows tells what one takes: the weights are
read for a few as for many."""

WEIGHT = 0.3
"""Of the newest measurement in an estimate."""

OUTLIER = 2.0
"""A measurement counts at most this many times as much as the estimate, and at least its inverse:
what is beyond is hardly the step's own."""


class StepPacer:
    """Keeps estimates of the time of a step that only decodes, and of one prompt token.

    Exponentially weighted; the former by the number of rows, told apart by powers of two.
    """

    def __init__(self, mixed_tokens: int = MIXED_TOKENS, least_tokens: int = LEAST_TOKENS) -> None:
        self._mixed_tokens = mixed_tokens
        self._least_tokens = least_tokens
        self._decode_seconds: dict[int, float] = {}
        self._prompt_seconds: float | None = None
        self._unmeasured = 0

    def prompt_tokens(self, decodes: int, prompts: int) -> int:
        """Most prompt tokens for a step with `decodes` decode rows, `prompts` prompts at hand.

        0 now and then while sequences decode, else at least `least_tokens`.
        """
        prompt = self._prompt_seconds
        if not decodes:
            return self._rounded(LONGEST_SECONDS / prompt) if prompt else self._mixed_tokens
        if self._unmeasured >= MEASURED_EVERY:
            return 0
        decode = self._decode(decodes)
        if not decode or not prompt:
            return self._mixed_tokens
        return min(self._mixed_tokens, self._rounded(SHARE * prompts**2 * decode / prompt))

    def expected(self, decodes: int, prompt_tokens: int) -> float | None:
        """Seconds that a step is likely to take; None where nothing like it was measured."""
        decode = self._decode(decodes) if decodes else 0.0
        prompt = self._prompt_seconds if prompt_tokens else 0.0
        return None if decode is None or prompt is None else decode + prompt_tokens * prompt

    def record(self, decodes: int, prompt_tokens: int, seconds: float) -> None:
        """Learn from a step that took `seconds`."""
        if not prompt_tokens:
            self._unmeasured = 0
            known = self._decode_seconds.get(_size(decodes))
            self._decode_seconds[_size(decodes)] = _weighted(known, seconds)
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
        """Estimate for so many rows, or that of the nearest size that was measured."""
        size = _size(decodes)
        nearest = min(self._decode_seconds, key=lambda s: abs(s - size), default=None)
        return None if nearest is None else self._decode_seconds[nearest]


def _size(decodes: int) -> int:
    return (decodes - 1).bit_length()


def _weighted(known: float | None, measured: float) -> float:
    if not known:
        return measured
    return known + WEIGHT * (min(max(measured, known / OUTLIER), known * OUTLIER) - known)
