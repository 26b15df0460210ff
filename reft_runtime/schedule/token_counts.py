"""How often each token occurs in a sequence, counted as it grows: what penalties depend on."""

from __future__ import annotations

from array import array
from collections.abc import Sequence


class TokenCounts:
    """The different tokens of a prompt of `prompt_length` tokens and of its answer.

    `ids` ("q") are the tokens in the order in which they first came, `times` ("q") how often the
    answer has each: 0 for one that only the prompt has.
    """

    def __init__(self, prompt_length: int) -> None:
        self.ids = array("q")
        self.times = array("q")
        self._prompt_length = prompt_length
        self._places: dict[int, int] = {}
        self._taken = 0

    def take(self, tokens: Sequence[int]) -> None:
        """Count `tokens`, which begin with those that were counted before."""
        for at in range(self._taken, len(tokens)):
            token = tokens[at]
            place = self._places.setdefault(token, len(self.ids))
            if place == len(self.ids):
                self.ids.append(token)
                self.times.append(0)
            if at >= self._prompt_length:
                self.times[place] += 1
        self._taken = len(tokens)
