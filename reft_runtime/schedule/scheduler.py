"""Decides, step by step, which tokens of which sequences are computed. Knows no tensors.

Order of a step: running sequences decode (oldest first, the newest is preempted when KV runs
out), then running prompts go on, then waiting sequences are admitted in order of arrival, all
within one budget of tokens, which `StepPacer` makes smaller where streams would wait too long.

Of several tenants the one that was served least goes first in all of this (`TokenCounters`), and
within a tenant the lowest priority. The tenant whose turn is next gets its share of places and KV
by preemption, if another that was served more holds more than its own share. Once admitted, nobody
slows another beyond its share (`allot`).

What a prompt need not compute because others have, or are about to, says `PrefixReuse`.
"""

from __future__ import annotations

from collections.abc import Iterable

from reft_runtime.schedule.blocks import BLOCK_TOKENS
from reft_runtime.schedule.budget import BlockBudget
from reft_runtime.schedule.counters import DECODE_COST, PROMPT_COST, TokenCounters
from reft_runtime.schedule.pacing import StepPacer
from reft_runtime.schedule.plan import Chunk, StepPlan
from reft_runtime.schedule.prefix_cache import BlockCopy, StateCopy
from reft_runtime.schedule.reuse import PrefixReuse
from reft_runtime.schedule.sequence import Sequence, Status
from reft_runtime.schedule.shares import Share, allot
from reft_runtime.schedule.tenants import Tenants
from reft_runtime.schedule.waiting import WaitingQueue, turn

MAX_SCORED_TOKENS = 512
"""Most tokens of a step behind which log-probabilities are asked for, decoding sequences aside:
each has a row of logits."""


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
        self.snapshots = budget.snapshots
        self.max_running = max_running
        self.max_step_tokens = max_step_tokens
        self.pacer = pacer or StepPacer()
        self.running: list[Sequence] = []
        self.counters = TokenCounters()
        self.waiting = WaitingQueue(self.counters)
        self.preemptions = 0
        self._allotted: dict[str, Share] | None = None
        self._reuse = PrefixReuse(budget)
        self._tenants = Tenants(self.running, self.waiting, budget, max_running)

    @property
    def idle(self) -> bool:
        """Whether there is nothing to compute."""
        return not self.running and not self.waiting

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence."""
        self.waiting.push(sequence)

    def requeue(self, sequences: Iterable[Sequence]) -> None:
        """Queue sequences of requests that came earlier; each gets its turn by its arrival."""
        for sequence in sequences:
            self.waiting.push(sequence)

    def turn(self, sequence: Sequence) -> tuple[float, int, int, int]:
        """What sorts sequences of all tenants, the one that goes first to the front."""
        return self.counters.served(sequence.request.tenant), *turn(sequence)

    def schedule(self) -> StepPlan:
        """Choose the next step's chunks; empty only when idle."""
        plan = StepPlan()
        order = list(self.running)  # a copy, because forks join
        self._allotted = None
        self._tenants.begin_step()
        if self._tenants.several:
            self._seat(plan)
            self._allotted = self._allot()
            order = sorted(self.running, key=self.turn)
        self._schedule_decodes(plan)
        plan.decodes = len(plan.chunks)
        decode_tokens = plan.decode_tokens
        tokens_left = min(
            self.max_step_tokens - decode_tokens,
            self.pacer.prompt_tokens(decode_tokens, self._prompts()),
        )
        for sequence in order:
            if sequence.status is not Status.RUNNING or sequence.decoding:
                continue
            if limit := self._prompt_limit(sequence, tokens_left):
                tokens_left -= self._schedule_prompt(plan, sequence, limit)
        for chunk in plan.chunks[: plan.decodes]:
            # Only now: forks of this step are neither preempted nor computed in it.
            self._fork(chunk)
        # After a preemption in this step the freed blocks belong to the sequences that run.
        while not plan.preempted and (head := self.waiting.head) is not None:
            limit = self._prompt_limit(head, tokens_left)
            if not limit or not self._admit(head):
                break
            tokens_left -= self._schedule_prompt(plan, head, limit)
        return plan

    def after(self, sequences: Iterable[Sequence]) -> list[Chunk]:
        """Chunks of the step after one whose tokens are not known yet, for `sequences` that go on.

        Empty if something else has to be decided first: which sequence starts, which prompt goes
        on, which sequence is preempted or rests, or which tokens a grammar allows.
        """
        head = self.waiting.head
        if head is not None and self._may_start(head):
            return []
        if self._tenants.several and (
            self._allotted is not None
            or (head is not None and self._tenants.displaced_by(head) is not None)
            or self._allot() is not None
        ):
            return []
        if not all(sequence.decoding and not sequence.grammar for sequence in self.running):
            return []
        chunks = [Chunk(sequence, sequence.computed + 1, 1) for sequence in sequences]
        roomy = all(self.budget.reserve(chunk.sequence, chunk.stop) for chunk in chunks)
        return chunks if roomy else []

    def advance(self, plan: StepPlan) -> None:
        """Record that the plan's tokens have been computed, and charge them to their tenants.

        Tokens that were reused are not charged, nor those that a preemption made necessary again.
        """
        for index, chunk in enumerate(plan.chunks):
            sequence, stop = chunk.sequence, chunk.stop
            if (tokens := stop - max(chunk.start, sequence.charged)) > 0:
                cost = DECODE_COST if index < plan.decodes else PROMPT_COST
                self.counters.charge(sequence.request.tenant, tokens * cost)
            if chunk.reused and self.cache is not None:
                self.cache.count_hit(sequence.keys, sequence.computed, chunk.start)
                reused = min(chunk.start, sequence.prompt_length) - sequence.computed
                sequence.cached += max(0, reused)
            if chunk.restored is not None and self.snapshots is not None:
                self.snapshots.count_hit()
            sequence.computed = stop
            for fork in chunk.forks:
                fork.computed = chunk.shared

    def keep(self, sequence: Sequence) -> list[BlockCopy]:
        """See `PrefixReuse.keep`."""
        return self._reuse.keep(sequence)

    def keep_state(self, sequence: Sequence) -> list[StateCopy]:
        """See `PrefixReuse.keep_state`."""
        return self._reuse.keep_state(sequence)

    def restart(self, sequences: Iterable[Sequence]) -> None:
        """Preempt running sequences whose last step failed halfway; nothing of them is kept."""
        for sequence in sequences:
            self._begin_again(sequence)

    def finish(self, sequence: Sequence) -> None:
        """Remove a running or waiting sequence and free its blocks; it may be called again."""
        if sequence.status is Status.RUNNING:
            self.running.remove(sequence)
        elif sequence.status is Status.WAITING:
            self.waiting.discard(sequence)
        sequence.status = Status.FINISHED
        self.budget.release(sequence)
        self._reuse.leaves(sequence)
        if self.idle:
            self.counters.clear()
            self._tenants.clear()

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
        key = self.turn if self._tenants.several else turn
        for sequence in sorted(self.running, key=key):
            if sequence.status is not Status.RUNNING or not sequence.decoding:
                continue
            if self._allotted is not None:
                share = self._allotted[sequence.request.tenant]
                if not share.decodes:
                    continue  # it rests
                share.decodes -= 1
            while not self.budget.reserve(sequence, len(sequence.tokens)):
                victim = max(self.running, key=self.turn)
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

    def _prompt_limit(self, sequence: Sequence, tokens_left: int) -> int:
        """The most prompt tokens that a sequence may compute of those that the step has left."""
        if self._allotted is None:
            return tokens_left
        share = self._allotted.get(sequence.request.tenant)
        return 0 if share is None else min(tokens_left, share.prompt_tokens)

    def _schedule_prompt(self, plan: StepPlan, sequence: Sequence, limit: int) -> int:
        chunk = self._reuse.next_chunk(sequence, plan.prompts)
        if chunk is None:
            return 0
        if (begin := sequence.first_scored) is not None:
            scored = sum(other.scored for other in plan.prompts)
            limit = min(limit, max(0, begin - chunk.start) + MAX_SCORED_TOKENS - scored)
            if not limit:
                return 0
        self._reuse.cut(chunk, limit)
        plan.chunks.append(chunk)
        if self._allotted is not None:
            self._allotted[sequence.request.tenant].prompt_tokens -= chunk.length
        self._fork(chunk)
        return chunk.length

    def _fork(self, chunk: Chunk) -> None:
        """Admit the request's other choices at the end of the prompt's first computation.

        Those without room queue and compute on their own. Where they have labels to score, the
        rest waits to be forked from the first of them instead: all have the same prompt. A
        recurrent state is forked as it is: by a chunk that ends where the prompt does.
        """
        parent, recurrent = chunk.sequence, self.snapshots is not None
        reaches = chunk.stop == parent.prompt_length if recurrent else chunk.completes
        if not (reaches and parent.unforked):
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
            heir = rest[0] if recurrent else others[0]
            heir.unforked = [other for other in rest if other is not heir]
            rest = [heir] if heir in rest else []
        self.requeue(rest)

    def _admit(self, sequence: Sequence) -> bool:
        """Let the sequence whose turn is next run, if there is room."""
        keys = []
        if self.cache is not None and sequence.reusable:
            keys = sequence.block_keys(sequence.reusable)
            self.cache.find(keys)  # marks them as used: making room must not evict them
        if not self._make_room(sequence):
            return False
        self.waiting.pop(sequence)
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

    def _allot(self) -> dict[str, Share] | None:
        """What each tenant may take of the next step; None if all get what they want."""
        times = self.pacer.times()
        if times is None:
            return None
        head = self.waiting.head
        places = self.max_running - len(self.running) if head and self._may_start(head) else 0
        wanted = self._tenants.wanted(places, self.pacer.mixed_tokens)
        decodes = sum(share.decodes for share in wanted.values())
        return allot(wanted, self.pacer.prompt_tokens(decodes, self._prompts()), times)

    def _seat(self, plan: StepPlan) -> None:
        """Admit sequences of tenants below their share before the others go on."""
        while (head := self.waiting.head) is not None and self._tenants.below_share(head):
            while not self._may_start(head):
                displaced = self._tenants.displaced_by(head)
                if displaced is None:
                    return
                self._preempt(displaced, plan)
            self._admit(head)

    def _preempt(self, sequence: Sequence, plan: StepPlan) -> None:
        self.budget.release(sequence)
        sequence.status = Status.WAITING
        plan.kept += self.keep(sequence)
        plan.kept_states += self.keep_state(sequence)
        self._begin_again(sequence)
        plan.preempted.append(sequence)

    def _begin_again(self, sequence: Sequence) -> None:
        """Let a running sequence wait, with nothing computed."""
        self.running.remove(sequence)
        self.budget.release(sequence)
        sequence.status = Status.WAITING
        self._reuse.leaves(sequence)
        sequence.charged = max(sequence.charged, sequence.computed)
        sequence.computed = sequence.cached = 0
        self.requeue([sequence])
        self.preemptions += 1
