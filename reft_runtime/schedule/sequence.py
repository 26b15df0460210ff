"""The choices of a request on their way through the engine: tokens and progress."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import TYPE_CHECKING

from reft_runtime.schedule.block_keys import BlockKeys
from reft_runtime.schedule.blocks import BLOCK_TOKENS
from reft_runtime.schedule.request import AppliedIntervention, Request
from reft_runtime.schedule.token_counts import TokenCounts

if TYPE_CHECKING:
    from reft_runtime.grammar import GrammarState

MOST_FORCED = 8
"""Most tokens that are appended at once because a grammar leaves no choice."""


class Status(Enum):
    """Where a sequence is in its life."""

    WAITING = auto()
    RUNNING = auto()
    FINISHED = auto()


@dataclass(slots=True, eq=False)
class Sequence:
    """One choice of a request on its way through the engine.

    `tokens` are the prompt's and the generated ids; the keys and values of the first `computed`
    of them are stored, and `cached` prompt tokens of these came from the prefix cache. The first
    `charged` of them were computed before a preemption, and are not charged to the tenant again.
    `order` is the order of arrival. The choice that `leads` computes and scores the request's
    prompt; until then the other choices wait in its `unforked`, because they copy what it computed.
    `decode_edits` are the interventions that edit generated tokens, and `turns` where in the answer
    other edits of theirs begin to act, ascending. `grammar` says which token may
    come after `tokens`; None if any. The sequences of a request with labels begin with the tokens
    of a path each (see `LabelTree`) behind the prompt; these are computed and edited as generated
    tokens.
    """

    request: Request
    choice: int
    order: int
    tokens: list[int]
    computed: int = 0
    cached: int = 0
    charged: int = 0
    status: Status = Status.WAITING
    leads: bool = False
    unforked: list[Sequence] = field(default_factory=list)
    prompt_logprobs_sent: int = 0
    started: bool = False
    decode_edits: tuple[AppliedIntervention, ...] = field(init=False)
    turns: tuple[int, ...] = field(init=False)
    keys: BlockKeys = field(init=False)
    grammar: GrammarState | None = field(init=False)
    _counts: TokenCounts = field(init=False)

    def __post_init__(self) -> None:
        self._counts = TokenCounts(len(self.request.prompt))
        self.keys = BlockKeys(self.request)
        self.grammar = self.request.grammar and self.request.grammar.copy()
        self.decode_edits = tuple(
            applied
            for applied in self.request.interventions
            if self.request.touches(applied)
            and any(edit.positions.edits_decode for edit in applied.edits)
        )
        edits = (edit for applied in self.decode_edits for edit in applied.edits)
        self.turns = tuple(sorted(set().union(*(edit.positions.turns for edit in edits))))

    def pass_lead(self) -> Sequence:
        """Make the first of `unforked` lead in this one's place, from the beginning; returns it."""
        heir, *others = self.unforked
        self.unforked = []
        heir.leads, heir.unforked = True, others
        heir.started, heir.prompt_logprobs_sent = self.started, self.prompt_logprobs_sent
        return heir

    def block_keys(self, tokens: int) -> list[bytes]:
        """Keys of the whole blocks among the first `tokens` tokens."""
        return self.keys.upto(tokens // BLOCK_TOKENS, self.tokens)

    @property
    def prompt_length(self) -> int:
        """Number of prompt tokens, fixed at admission."""
        return len(self.request.prompt)

    def turns_before(self, offset: int) -> int:
        """How many of `turns` are at or before the token at this offset."""
        return bisect_right(self.turns, offset - self.prompt_length) if self.turns else 0

    @property
    def generated(self) -> SequenceOf[int]:
        """Ids generated so far."""
        return self.tokens[self.prompt_length :]

    @property
    def generated_length(self) -> int:
        """Number of ids generated so far."""
        return len(self.tokens) - self.prompt_length

    def counts(self) -> TokenCounts:
        """Count the tokens; only those that came since the last call take time."""
        self._counts.take(self.tokens)
        return self._counts

    @property
    def reusable(self) -> int:
        """Number of leading tokens whose keys and values may come from the prefix cache.

        The last token is always computed, and so are those behind which something is scored. A
        traced request reuses nothing.
        """
        if self.request.trace:
            return 0
        if (first := self.first_scored) is not None:
            return first
        return len(self.tokens) - 1

    @property
    def first_scored(self) -> int | None:
        """The first token whose logits are scored, with all behind it; None if none are.

        Of several choices the one that leads scores what all have in common.
        """
        if self.request.labels is not None:
            return self.prompt_length - self.leads
        if self.request.sampling.prompt_logprobs is not None and self.leads:
            return self.request.scored_from - 1
        return None

    @property
    def remaining(self) -> int:
        """Tokens whose keys and values are still to be computed."""
        return len(self.tokens) - self.computed

    @property
    def decoding(self) -> bool:
        """Whether only the newest tokens are left to compute, all of them generated: mostly one.

        There are more where a grammar forced some.
        """
        computed = self.computed  # asked for often: not by way of the properties above
        left = len(self.tokens) - computed
        return 0 < left <= 1 + MOST_FORCED and computed >= len(self.request.prompt)


def sequences_of(request: Request, order: int) -> Sequence:
    """Make the first choice's sequence; it carries the others as `unforked`."""
    paths = [()] * request.sampling.n if request.labels is None else request.labels.paths
    first, *others = (
        Sequence(request, choice, order, [*request.prompt, *path])
        for choice, path in enumerate(paths)
    )
    first.leads, first.unforked = True, others
    return first
