"""What one step computes: chunks of sequences. Knows no tensors."""

from __future__ import annotations

from dataclasses import dataclass, field

from reft_runtime.schedule.prefix_cache import BlockCopy, StateCopy
from reft_runtime.schedule.sequence import Sequence


@dataclass(slots=True)
class Chunk:
    """Tokens [start, start + length) of one sequence, to be computed in this step.

    `reused` are the kept blocks between what the sequence had and `start`, which it gets before
    the step; `restored` is the place of the kept recurrent state that it gets with them, its state
    after `start` tokens (None where the sequence goes on from its own, or begins). `boundary` is
    where the sequence's state will be kept next, at this chunk's end or behind it. `forks` are
    further choices of the same request: they copy the prompt's keys and values from this sequence
    after the step (`shared` tokens), and sample their first token from the same logits, unless they
    have labels to score.
    """

    sequence: Sequence
    start: int
    length: int
    reused: list[BlockCopy] = field(default_factory=list)
    forks: list[Sequence] = field(default_factory=list)
    restored: int | None = None
    boundary: int | None = None

    @property
    def stop(self) -> int:
        """End of the range, exclusive."""
        return self.start + self.length

    @property
    def shared(self) -> int:
        """Number of tokens whose keys and values the forks copy."""
        return min(self.stop, self.sequence.prompt_length)

    @property
    def ends_at_boundary(self) -> bool:
        """Whether the sequence's recurrent state is to be kept as it is after this chunk."""
        return self.stop == self.boundary

    @property
    def scored(self) -> int:
        """Number of the chunk's tokens behind which log-probabilities are asked for."""
        first = self.sequence.first_scored
        return 0 if first is None else max(0, self.stop - max(self.start, first))

    @property
    def completes(self) -> bool:
        """Whether the chunk reaches the sequence's end, so that a token is sampled."""
        return self.stop == len(self.sequence.tokens)


@dataclass(slots=True)
class StepPlan:
    """One step: the chunks to compute, decoding ones first, and the sequences preempted for them.

    The first `decodes` chunks decode: one token each, or a few that a grammar forced. `kept` and
    `kept_states` are blocks and recurrent states of preempted sequences to copy into the prefix
    cache, before what they hold is freed and before any chunk is computed.
    """

    chunks: list[Chunk] = field(default_factory=list)
    decodes: int = 0
    preempted: list[Sequence] = field(default_factory=list)
    kept: list[BlockCopy] = field(default_factory=list)
    kept_states: list[StateCopy] = field(default_factory=list)

    @property
    def prompts(self) -> list[Chunk]:
        """All chunks but the decoding ones."""
        return self.chunks[self.decodes :]

    @property
    def decode_tokens(self) -> int:
        """Tokens of the decoding chunks."""
        return sum(chunk.length for chunk in self.chunks[: self.decodes])

    @property
    def prompt_tokens(self) -> int:
        """Tokens of all chunks but the decoding ones."""
        return sum(chunk.length for chunk in self.prompts)
