"""How far one answer has come in its grammar."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Self

from llguidance import LLExecutor, LLMatcher

from reft_runtime.grammar.source import fault_of


@cache
def _executor(threads: int) -> LLExecutor:
    return LLExecutor(threads)


class GrammarState:
    """Says which tokens may come next in one answer. Not thread safe.

    Work is bounded at every step; where a grammar needs more, `fault` says so from then on.
    """

    def __init__(self, matcher: LLMatcher, param: str) -> None:
        self._matcher = matcher
        self.param = param
        """The field of the request that the grammar came from."""

        self.opens: int | None = None
        """A token that may be the answer's first, beside the grammar's; None after the first."""

        self.thinks = False
        """Whether the model thinks: any token may come but an end, and the grammar waits."""

        self._until: int | None = None

    def copy(self) -> Self:
        """A state of its own for another answer, at the same place."""
        copied = type(self)(self._matcher.deep_copy(), self.param)
        copied.opens, copied.thinks, copied._until = self.opens, self.thinks, self._until
        return copied

    def behind(self, begin: int, end: int, *, thinks: bool) -> Self:
        """A copy for an answer before which the model may think, between two tokens.

        `thinks` says that the prompt has the first of them already.
        """
        copied = self.copy()
        copied.opens, copied.thinks, copied._until = None if thinks else begin, thinks, end
        return copied

    def advance(self, token: int) -> None:
        """Go on with a token, which must be one of those allowed."""
        opens, self.opens = self.opens, None
        if self.thinks:
            self.thinks = token != self._until
        elif token == opens:
            self.thinks = True
        else:
            self._matcher.consume_token(token)

    def forced(self) -> list[int]:
        """The tokens that come next if only one text can, as a tokenizer writes it; often none.

        Of other tokens for the same text none are allowed.
        """
        if self.thinks or self.opens is not None:
            return []
        return self._matcher.compute_ff_tokens()

    @property
    def complete(self) -> bool:
        """Whether nothing but the answer's end may come; also after a fault."""
        return self._matcher.is_stopped()

    @property
    def fault(self) -> str:
        """Why the grammar cannot go on, in one line; empty if it can."""
        return fault_of(self._matcher)


def allow_each(states: Sequence[GrammarState], address: int, size: int, threads: int) -> None:
    """Write which tokens may come next after each state: one bit for each id, lowest bit first.

    At `address` there are `size` bytes for each, a multiple of 4 and enough for all ids. After a
    fault only the end token is allowed.
    """
    matchers = [state._matcher for state in states]
    if threads > 1 and len(matchers) > 1:
        numbered = list(zip(matchers, range(len(matchers)), strict=True))
        _executor(threads).unsafe_compute_mask_ptr(numbered, address, size, len(matchers))
        return
    for number, matcher in enumerate(matchers):
        matcher.unsafe_compute_mask_ptr(address + number * size, size)
