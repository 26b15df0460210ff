"""Decides, step by step, which tokens of which sequences are computed. Knows no tensors.

Order of a step: running sequences decode (oldest first, the newest is preempted when KV runs
out), then running prompts go on, then waiting sequences are admitted in order of arrival, all
within one budget of tokens, which `StepPacer` makes smaller where streams would wait too long.

Before each chunk of a prompt the prefix cache is asked for the blocks that come next. A prompt
whose next block is being computed for another prompt skips the step instead of computing it, too.
It waits only for a chunk of the same step: so whenever one prompt waits another one advances, and
if that one fails, is aborted or preempted, it is not in the next step and no prompt waits for it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from reft_runtime.schedule.blocks import BLOCK_TOKENS
from reft_runtime.schedule.budget import BlockBudget
from reft_runtime.schedule.pacing import StepPacer
from reft_runtime.schedule.prefix_cache import BlockCopy
from reft_runtime.schedule.sequence import Sequence, Status

MAX_SCORED_TOKENS = 512
"""Most tokens of a step behind which log-probabilities are asked for, decoding sequences aside:
each has a row of logits."""


@dataclass(slots=True)
class Chunk:
    """Tokens [start, start + length) of one sequence, to be computed in this step.

    `reused` are the kept blocks between what the sequence had and `start`, which it gets before
    the step. `forks` are further choices of the same request: they copy the prompt's keys and
    values from this sequence after the step (`shared` tokens), and sample their first token from
    the same logits, unless they have labels to score.
    """

    sequence: Sequence
    start: int
    length: int
    reused: list[BlockCopy] = field(default_factory=list)
    forks: list[Sequence] = field(default_factory=list)

    @property
    def stop(self) -> int:
        """End of the range, exclusive."""
        return self.start + self.length

    @property
    def shared(self) -> int:
        """Number of tokens whose keys and values the forks copy."""
        return min(self.stop, self.sequence.prompt_length)

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

    The first `decodes` chunks decode: one token each, or a few that a grammar forced. `kept` are
    blocks of preempted sequences to copy into the prefix cache, before their keys and values are
    freed and before any chunk is computed.
    """

    chunks: list[Chunk] = field(default_factory=list)
    decodes: int = 0
    preempted: list[Sequence] = field(default_factory=list)
    kept: list[BlockCopy] = field(default_factory=list)

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


class Scheduler:
    """The queues and the budget; every call is cheap and none touches a tensor.

    `max_running` bounds the sequences that hold KV, `max_step_tokens` the tokens of one step (it
    must be at least `max_running`, so that every running sequence can decode in every step).
    """

    def __init__(
        self,
        budget: BlockBudget,
        max_running: int,
        max_step_tokens: int,
        pacer: StepPacer | None = None,
    ) -> None:
        if max_step_tokens < max_running:
            raise ValueError("max_step_tokens must be at least max_running")
        self.budget = budget
        self.cache = budget.cache
        self.max_running = max_running
        self.max_step_tokens = max_step_tokens
        self.pacer = pacer or StepPacer()
        self.running: list[Sequence] = []
        self.waiting: deque[Sequence] = deque()
        self.preemptions = 0

    @property
    def idle(self) -> bool:
        """Whether there is nothing to compute."""
        return not self.running and not self.waiting

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence."""
        self.waiting.append(sequence)

    def requeue(self, sequences: Iterable[Sequence]) -> None:
        """Queue sequences of requests that came earlier; the queue stays in order of arrival."""
        self.waiting = deque(sorted((*sequences, *self.waiting), key=_arrival))

    def schedule(self) -> StepPlan:
        """Choose the next step's chunks; empty only when idle."""
        plan = StepPlan()
        self._schedule_decodes(plan)
        plan.decodes = len(plan.chunks)
        decode_tokens = plan.decode_tokens
        tokens_left = min(
            self.max_step_tokens - decode_tokens,
            self.pacer.prompt_tokens(decode_tokens, self._prompts()),
        )
        for sequence in list(self.running):  # a copy, because forks join
            if tokens_left and not sequence.decoding:
                tokens_left -= self._schedule_prompt(plan, sequence, tokens_left)
        for chunk in plan.chunks[: plan.decodes]:
            # Only now: forks of this step are neither preempted nor computed in it.
            self._fork(chunk)
        while tokens_left and self.waiting and self._admit(self.waiting[0], plan):
            sequence = self.waiting.popleft()
            tokens_left -= self._schedule_prompt(plan, sequence, tokens_left)
        return plan

    def after(self, sequences: Iterable[Sequence]) -> list[Chunk]:
        """Chunks of the step after one whose tokens are not known yet, for `sequences` that go on.

        Empty if something else has to be decided first: which sequence starts, which prompt goes
        on, which sequence is preempted, or which tokens a grammar allows.
        """
        if self.waiting and self._may_start(self.waiting[0]):
            return []
        if not all(sequence.decoding and not sequence.grammar for sequence in self.running):
            return []
        chunks = [Chunk(sequence, sequence.computed + 1, 1) for sequence in sequences]
        roomy = all(self.budget.reserve(chunk.sequence, chunk.stop) for chunk in chunks)
        return chunks if roomy else []

    def advance(self, plan: StepPlan) -> None:
        """Record that the plan's tokens have been computed."""
        for chunk in plan.chunks:
            if chunk.reused and self.cache is not None:
                first = chunk.sequence
                self.cache.count_hit(first.keys, first.computed, chunk.start)
                first.cached += max(0, min(chunk.start, first.prompt_length) - first.computed)
            chunk.sequence.computed = chunk.stop
            for fork in chunk.forks:
                fork.computed = chunk.shared

    def keep(self, sequence: Sequence) -> list[BlockCopy]:
        """Enter the computed blocks of a sequence in the prefix cache.

        Returns the copies that the caller must make. Blocks with edits are entered only once a
        token has come out of them: then they are finite.
        """
        if self.cache is None:
            return []
        keys = sequence.block_keys(sequence.computed)
        base = sequence.keys.base
        if not sequence.decoding:
            keys = keys[:base]
        placed = self.cache.add(keys, base, self.budget.free)
        return [BlockCopy(sequence, block, place) for block, place in placed]

    def finish(self, sequence: Sequence) -> None:
        """Remove a running or waiting sequence and free its blocks; it may be called again."""
        if sequence.status is Status.RUNNING:
            self.running.remove(sequence)
        elif sequence.status is Status.WAITING and sequence in self.waiting:
            self.waiting.remove(sequence)
        sequence.status = Status.FINISHED
        self.budget.release(sequence)

    def check_integrity(self, *, idle: bool = False) -> None:
        """Raise AssertionError if queues and budget disagree, or if `idle` and anything is left."""
        self.budget.check_integrity()
        if len(self.running) > self.max_running:
            raise AssertionError(f"{len(self.running)} sequences run, {self.max_running} may")
        if idle and not (self.idle and self.budget.used == 0):
            raise AssertionError(
                f"not empty: {len(self.running)} running, {len(self.waiting)} waiting, "
                f"{self.budget.used} blocks held"
            )

    def _schedule_decodes(self, plan: StepPlan) -> None:
        # Forced tokens are computed together as far as every sequence has room for one.
        spare = self.max_step_tokens - sum(sequence.decoding for sequence in self.running)
        for sequence in sorted(self.running, key=_arrival):
            if sequence.status is not Status.RUNNING or not sequence.decoding:
                continue
            while not self.budget.reserve(sequence, len(sequence.tokens)):
                victim = max(self.running, key=_arrival)
                self._preempt(victim, plan)
                if victim is sequence:
                    break
            else:
                length = min(sequence.remaining, 1 + spare)
                spare -= length - 1
                plan.chunks.append(Chunk(sequence, sequence.computed, length))

    def _prompts(self) -> int:
        """Number of sequences that could compute prompt tokens now if blocks suffice."""
        admissible = min(len(self.waiting), self.max_running - len(self.running))
        return admissible + sum(not sequence.decoding for sequence in self.running)

    def _schedule_prompt(self, plan: StepPlan, sequence: Sequence, limit: int) -> int:
        start, reused = sequence.computed, []
        if self.cache is not None and sequence.reusable:
            keys = sequence.block_keys(sequence.reusable)
            first = start // BLOCK_TOKENS
            reused = [
                BlockCopy(sequence, block, place)
                for block, place in enumerate(self.cache.find(keys[first:]), first)
            ]
            block = first + len(reused)
            if block < min(len(keys), self.budget.free) and any(
                _will_keep(chunk.sequence, block, keys[block]) for chunk in plan.prompts
            ):
                return 0
            start = max(start, block * BLOCK_TOKENS)
        if (begin := sequence.first_scored) is not None:
            scored = sum(chunk.scored for chunk in plan.prompts)
            limit = min(limit, max(0, begin - start) + MAX_SCORED_TOKENS - scored)
            if not limit:
                return 0
        chunk = Chunk(sequence, start, min(len(sequence.tokens) - start, limit), reused)
        plan.chunks.append(chunk)
        self._fork(chunk)
        return chunk.length

    def _fork(self, chunk: Chunk) -> None:
        """Admit the request's other choices at the end of the prompt's first computation.

        Those without room queue and compute on their own. Where they have labels to score, the
        rest waits to be forked from the first of them instead: all have the same prompt.
        """
        parent = chunk.sequence
        if not (chunk.completes and parent.unforked):
            return
        others, parent.unforked = parent.unforked, []
        admitted = 0
        while admitted < len(others) and self._make_room(others[admitted]):
            admitted += 1
        chunk.forks = others[:admitted]
        for fork in chunk.forks:
            fork.keys = parent.keys.copy(chunk.shared)
        rest = others[admitted:]
        if rest and parent.request.labels is not None:
            heir = others[0]
            heir.unforked = [other for other in rest if other is not heir]
            rest = [] if admitted else [heir]
        self.requeue(rest)

    def _admit(self, sequence: Sequence, plan: StepPlan) -> bool:
        # After a preemption in this step the freed blocks belong to the sequences that run.
        if plan.preempted:
            return False
        keys = []
        if self.cache is not None and sequence.reusable:
            keys = sequence.block_keys(sequence.reusable)
            self.cache.find(keys)  # marks them as used: making room must not evict them
        if not self._make_room(sequence):
            return False
        if self.cache is not None:
            self.cache.count_query(sequence.keys, len(keys) * BLOCK_TOKENS)
        return True

    def _make_room(self, sequence: Sequence) -> bool:
        if not self._may_start(sequence):
            return False
        self.budget.reserve(sequence, len(sequence.tokens) + 1)
        sequence.status = Status.RUNNING
        self.running.append(sequence)
        return True

    def _may_start(self, sequence: Sequence) -> bool:
        # Room for one token more, so that the first decode step does not preempt at once.
        return len(self.running) < self.max_running and self.budget.has_room(
            sequence, len(sequence.tokens) + 1
        )

    def _preempt(self, sequence: Sequence, plan: StepPlan) -> None:
        self.running.remove(sequence)
        self.budget.release(sequence)
        plan.kept += self.keep(sequence)
        sequence.status = Status.WAITING
        sequence.computed = sequence.cached = 0
        self.requeue([sequence])
        plan.preempted.append(sequence)
        self.preemptions += 1


def _will_keep(sequence: Sequence, block: int, key: bytes) -> bool:
    """Whether a prompt that is being computed brings the block with this key into the cache."""
    if block >= len(sequence.tokens) // BLOCK_TOKENS:
        return False
    keys = sequence.block_keys((block + 1) * BLOCK_TOKENS)
    no_token = sequence.request.sampling.max_tokens == 0
    return keys[block] == key and not (no_token and block >= sequence.keys.base)


def _arrival(sequence: Sequence) -> tuple[int, int]:
    return sequence.order, sequence.choice
