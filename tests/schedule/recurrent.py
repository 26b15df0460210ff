"""A scheduler of a model with recurrent layers, whose states are made of what they have seen."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from reft_runtime.sampling import SamplingParams
from reft_runtime.schedule.blocks import BLOCK_TOKENS
from reft_runtime.schedule.budget import BlockBudget
from reft_runtime.schedule.labels import LabelTree, Tokens
from reft_runtime.schedule.plan import Chunk, StepPlan
from reft_runtime.schedule.prefix_cache import BlockCopy, PrefixCache, StateCopy
from reft_runtime.schedule.request import AppliedIntervention, Request
from reft_runtime.schedule.scheduler import Scheduler
from reft_runtime.schedule.sequence import Sequence, Status, sequences_of
from reft_runtime.schedule.snapshots import Snapshots

POISON = "poison"
"""Digest of an intervention behind which nothing is finite."""


class RecurrentSimulation:
    """Each sequence has a state, each place a copy of one; every chunk must begin with the right.

    A state is a number made of the tokens before it and the edits that fell on them, one by one.
    What `LiveRequests` does after a step is done here in its order.
    """

    def __init__(
        self,
        max_running: int = 8,
        max_step_tokens: int = 512,
        kv_tokens: int = 10_000,
        places: int = 20,
        *,
        cached: bool = True,
    ) -> None:
        self.cache = PrefixCache() if cached else None
        self.snapshots = Snapshots(places)
        budget = BlockBudget(kv_tokens, self.cache, self.snapshots)
        self.scheduler = Scheduler(budget, max_running, max_step_tokens)
        self.blocks: dict[int, bytes] = {}
        self.states: dict[Sequence, int] = {}
        self.places: dict[int, int] = {}
        self.poisoned: set[int] = set()
        self.computed = 0
        self.scored: dict[Sequence, set[int]] = {}
        self.sequences: list[Sequence] = []
        self.failed: set[str] = set()
        self._expected: dict[Sequence, list[int]] = {}
        self._arrived = 0

    def add(
        self,
        tokens: tuple[int, ...],
        *interventions: AppliedIntervention,
        labels: tuple[Tokens, ...] = (),
        trace: bool = False,
        tenant: str = "",
        **sampling: Any,
    ) -> Sequence:
        params = SamplingParams(**{"max_tokens": 0 if labels else 4, **sampling})
        request = Request(
            f"{self._arrived}",
            tokens,
            params,
            0,
            interventions,
            salt=tenant.encode(),
            tenant=tenant,
            trace=trace,
            labels=LabelTree.of(labels) if labels else None,
        )
        sequence = sequences_of(request, self._arrived)
        self.sequences += [sequence, *sequence.unforked]
        self._arrived += 1
        self.scheduler.add(sequence)
        return sequence

    def abort(self, sequence: Sequence) -> None:
        """End a whole request; what it has computed is kept."""
        self._end([s for s in self.sequences if s.request is sequence.request][::-1], keep=True)

    def preempt(self, sequence: Sequence) -> None:
        plan = StepPlan()
        self.scheduler._preempt(sequence, plan)
        self._preempted(plan)

    def step(self) -> StepPlan:
        """Plan a step, check every copy and every state, and pretend to compute it."""
        plan = self.scheduler.schedule()
        assert plan.chunks or self.scheduler.idle, "something is computed while there is something"
        self._preempted(plan)
        for chunk in plan.chunks:
            self._compute(chunk)
        self.scheduler.advance(plan)
        failed = [c.sequence for c in plan.chunks if self._fails(c)]
        for sequence in failed:
            self.failed.add(sequence.request.id)
            same = [s for s in self.sequences if s.request is sequence.request]
            self._end(same[::-1], keep=False)
        ended = [s for chunk in plan.chunks for s in self._tokens(chunk)]
        lasting = [c for c in plan.prompts if _runs(c.sequence) and c.sequence not in ended]
        self._keep(copy for c in lasting for copy in self.scheduler.keep(c.sequence))
        self._keep_states(
            copy
            for c in lasting
            if c.ends_at_boundary
            for copy in self.scheduler.keep_state(c.sequence)
        )
        self._end(ended, keep=True)
        self.scheduler.check_integrity(idle=self.scheduler.idle)
        kept = self.snapshots._kept.values()
        assert self.poisoned.isdisjoint(self.places[place] for place in kept)
        return plan

    def finish(self) -> None:
        for _ in range(10_000):
            if self.scheduler.idle:
                break
            self.step()
        assert self.scheduler.idle
        assert all(s.status is Status.FINISHED for s in self.sequences)
        assert not self.snapshots._pending
        assert not self.states

    def shapes(self) -> list[tuple[int, int, int]]:
        """Order of arrival, start and length of the next step's chunks of prompts."""
        return [(c.sequence.order, c.start, c.length) for c in self.step().prompts]

    def state(self, sequence: Sequence, tokens: int) -> int:
        """What the state of a sequence must be after so many tokens."""
        states = self._expected.setdefault(sequence, [hash(sequence.request.salt)])
        for at in range(len(states) - 1, tokens):
            edits = [
                (applied.digest, applied.strength)
                for applied in sequence.request.interventions
                for edit in applied.edits
                if edit.positions.offsets(sequence.prompt_length, at, at + 1)
            ]
            states.append(hash((states[-1], sequence.tokens[at], *edits)))
            if states[-2] in self.poisoned or any(digest == POISON for digest, _ in edits):
                self.poisoned.add(states[-1])
        return states[tokens]

    def _compute(self, chunk: Chunk) -> None:
        sequence = chunk.sequence
        assert chunk.length > 0
        self._check_blocks(chunk)
        if chunk.restored is not None:
            assert chunk.start % BLOCK_TOKENS == 0
            self.states[sequence] = self.places[chunk.restored]
        elif chunk.start == 0:
            self.states[sequence] = self.state(sequence, 0)
        assert self.states[sequence] == self.state(sequence, chunk.start), "its own state"
        self.states[sequence] = self.state(sequence, chunk.stop)
        for fork in chunk.forks:
            assert chunk.shared == chunk.stop, "a state is copied as it is"
            self.states[fork] = self.states[sequence]
        if (first := sequence.first_scored) is not None:
            at = range(max(first, chunk.start), chunk.stop)
            self.scored.setdefault(sequence, set()).update(at)
        self.computed += chunk.length

    def _check_blocks(self, chunk: Chunk) -> None:
        sequence = chunk.sequence
        assert (chunk.restored is not None) == bool(chunk.reused)
        if not chunk.reused:
            assert chunk.start == sequence.computed
            return
        blocks = [copy.block for copy in chunk.reused]
        assert blocks == list(range(sequence.computed // BLOCK_TOKENS, chunk.start // BLOCK_TOKENS))
        assert sequence.computed < chunk.start <= sequence.reusable
        keys = sequence.block_keys(chunk.start)
        assert [self.blocks[copy.place] for copy in chunk.reused] == [keys[b] for b in blocks]

    def _fails(self, chunk: Chunk) -> bool:
        """Whether logits are read that are not finite."""
        reads = chunk.scored or (chunk.completes and chunk.sequence.request.sampling.max_tokens)
        return bool(reads) and self.states.get(chunk.sequence) in self.poisoned

    def _tokens(self, chunk: Chunk) -> list[Sequence]:
        """Append tokens; returns the sequences that have ended."""
        ended = []
        for sequence in (chunk.sequence, *chunk.forks) if chunk.completes else ():
            most = sequence.request.sampling.max_tokens
            if _runs(sequence) and most:
                sequence.tokens.append(sequence.choice)
            if _runs(sequence) and (sequence.generated_length == most if most else True):
                ended.append(sequence)
        return ended

    def _end(self, sequences: list[Sequence], *, keep: bool) -> None:
        sequences = [s for s in sequences if s.status is not Status.FINISHED]
        for sequence in sequences:
            self.scheduler.finish(sequence)
        if keep:
            self._keep(copy for s in sequences for copy in self.scheduler.keep(s))
            self._keep_states(copy for s in sequences for copy in self.scheduler.keep_state(s))
        for sequence in sequences:
            self.states.pop(sequence, None)
            for other in self.sequences:
                if sequence in other.unforked:
                    other.unforked.remove(sequence)
            if sequence.unforked:
                self.scheduler.requeue([sequence.pass_lead()])

    def _preempted(self, plan: StepPlan) -> None:
        self._keep(plan.kept)
        self._keep_states(plan.kept_states, preempted=True)
        for sequence in plan.preempted:
            self.states.pop(sequence, None)

    def _keep(self, copies: Iterable[BlockCopy]) -> None:
        for copy in copies:
            keys = copy.sequence.keys.upto(copy.block + 1, copy.sequence.tokens)
            self.blocks[copy.place] = keys[copy.block]

    def _keep_states(self, copies: Iterable[StateCopy], *, preempted: bool = False) -> None:
        for copy in copies:
            sequence, state = copy.sequence, self.states[copy.sequence]
            assert preempted or state == self.state(sequence, sequence.computed)
            assert state in self._expected[sequence][::BLOCK_TOKENS]
            self.places[copy.place] = state


def _runs(sequence: Sequence) -> bool:
    return sequence.status is Status.RUNNING
