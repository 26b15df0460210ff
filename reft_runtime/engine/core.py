"""The loop's body: schedule, run, postprocess. Single-threaded; token ids in, events out."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from reft_runtime.base.model import LoadedModel
from reft_runtime.engine.device import decoder_for, sampler_for, sizes_for, tables_for
from reft_runtime.engine.events import (
    Event,
    Failed,
    PromptReused,
    PromptScored,
    Started,
    TokenMade,
    Traced,
)
from reft_runtime.engine.runner import Launched, Runner, StepResult
from reft_runtime.engine.sampler import Sampled
from reft_runtime.kv.choice import storage_for
from reft_runtime.machine.memory import is_out_of_memory, is_spoiling
from reft_runtime.outputs import FinishReason
from reft_runtime.schedule.budget import BlockBudget
from reft_runtime.schedule.pacing import StepPacer
from reft_runtime.schedule.prefix_cache import BlockCopy, PrefixCache
from reft_runtime.schedule.request import Request
from reft_runtime.schedule.scheduler import Chunk, Scheduler, StepPlan
from reft_runtime.schedule.sequence import Sequence, Status, sequences_of

SLOWER = 4.0
"""Times what steps like it took that a step may take: one far into a prompt attends to more."""

SLOWEST = 2e9
"""Multiplications and additions a second that a machine is taken to do at least."""

OUT_OF_MEMORY = "memory ran out; send it again, or a shorter one"


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Limits: sequences at once, tokens a step, tokens whose keys and values may be held.

    With `prefix_cache` what is held but not in use is reused where it is equal.
    """

    max_running: int
    max_step_tokens: int
    kv_tokens: int
    prefix_cache: bool = True


class EngineCore:
    """Turns requests into tokens. Not thread safe: one thread owns it.

    `clock` gives seconds; how long steps take decides how large the next ones are.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        config: EngineConfig,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.loaded = loaded
        budget = BlockBudget(config.kv_tokens, PrefixCache() if config.prefix_cache else None)
        sizes = sizes_for(loaded.device)
        pacer = StepPacer(sizes.mixed_tokens, sizes.least_tokens)
        self.scheduler = Scheduler(budget, config.max_running, config.max_step_tokens, pacer)
        self.runner = Runner(
            loaded,
            storage_for(loaded, budget, config.max_running),
            tables_for(loaded, config.max_running),
            sampler_for(loaded, config.max_running),
        )
        self.runner.decoder = decoder_for(self.runner, config.max_running)
        self.steps = 0
        self.prompt_tokens = 0
        self.generation_tokens = 0
        self.allowance = 0.0
        """Seconds that the step in progress may take; 0 between steps."""
        self.spoiled = False
        """Whether the thread that calls `step` must hand over to another; see `is_spoiling`."""
        self._parameters: int = loaded.model.num_parameters()
        self._clock = clock
        self._arrivals = 0
        self._live: dict[str, list[Sequence]] = {}
        self._ahead: Launched | None = None
        self._ended = 0.0

    @property
    def idle(self) -> bool:
        """Whether there is nothing to compute."""
        return self.scheduler.idle

    def add(self, request: Request) -> None:
        """Queue a request. The caller has checked it; see `Engine.open`."""
        first = sequences_of(request, self._arrivals)
        self._arrivals += 1
        self._live[request.id] = [first, *first.unforked]
        self.scheduler.add(first)

    def abort(self, request_id: str, choice: int | None = None) -> None:
        """End a request, or one of its choices, at once and without an event; unknown is fine."""
        live = self._live.get(request_id, ())
        self._remove([s for s in reversed(live) if choice in (None, s.choice)])

    def step(self) -> list[Event]:
        """Compute one step. An exception from here means that the engine itself is broken.

        On a device the next step begins before this one's tokens are known, where it can.
        """
        ahead, self._ahead = self._ahead, None
        plan, began = _left(ahead), self._ended
        events: list[Event] = []
        if not plan.chunks:
            ahead = None
            plan = self.scheduler.schedule()
            kept = self._keep(plan.kept)
            self.runner.release(plan.preempted)
            if not plan.chunks or not kept:
                return []
            now = time.monotonic()
            events += [Started(s.request.id, now) for s in _newly_started(plan)]
            began = self._clock()
        self.allowance = self._allowed(plan)
        result = self._run(plan, ahead)
        self._ended = self._clock()
        self.allowance = 0.0
        if result is None:
            # What the others have computed is still there: their next step does this one again.
            newest = max((c.sequence for c in plan.chunks), key=lambda s: (s.order, s.choice))
            events.append(Failed(newest.request.id, OUT_OF_MEMORY, out_of_memory=True))
            self._remove(self._live[newest.request.id][::-1], keep=False)
            return events
        self.scheduler.pacer.record(plan.decodes, plan.prompt_tokens, self._ended - began)
        self.steps += 1
        self.prompt_tokens += sum(
            max(0, min(c.stop, c.sequence.prompt_length) - c.start) for c in plan.prompts
        )
        ended = [
            sequence
            for chunk in plan.prompts
            if chunk.completes and chunk.sequence.request.sampling.max_tokens == 0
            for sequence in (chunk.sequence, *chunk.forks)
        ]
        self.scheduler.advance(plan)
        self._fail(result, events)
        self._score_prompts(result, events)
        _trace(result, events)
        _tell_reused(plan, events)
        finished = []
        for sequence in ended:
            if sequence.status is Status.RUNNING:
                events.append(TokenMade(sequence.request.id, sequence.choice, None, None, "length"))
                finished.append(sequence)
        for sequence, sampled in result.sampled:
            if sequence.status is Status.RUNNING:
                event = self._append(sequence, sampled)
                events.append(event)
                if event.finish_reason:
                    finished.append(sequence)
        # Decoding sequences are kept when they end, so that their steps have nothing to copy.
        prompts = [c.sequence for c in plan.prompts if c.sequence.status is Status.RUNNING]
        lasting = [sequence for sequence in prompts if sequence not in finished]
        self._keep([copy for s in lasting for copy in self.scheduler.keep(s)])
        self._remove(finished)
        if self.idle:
            self._ahead = None  # all of it was in vain
        return events

    def check_integrity(self) -> None:
        """Raise AssertionError if the bookkeeping disagrees, or anything is left while idle."""
        self.scheduler.check_integrity(idle=self.idle)
        self.runner.check_integrity(idle=self.idle)
        if self.idle and self._live:
            raise AssertionError(f"requests left: {', '.join(self._live)}")

    def _run(self, plan: StepPlan, launched: Launched | None) -> StepResult | None:
        """Run a step, or wait for one that was launched; None where memory ran out."""
        try:
            begun = launched or self.runner.run(plan.chunks)
            if isinstance(begun, StepResult):
                return begun
            following = self.scheduler.after(c.sequence for c in plan.chunks if self._goes_on(c))
            if following:
                self._ahead = self.runner.run_after(begun, following)
            return begun.result()
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            self._ahead = None
            self.spoiled |= is_spoiling(error)
        # Out here nothing pins the failed step's tensors any more; inside, the exception would.
        return None

    def _allowed(self, plan: StepPlan) -> float:
        expected = self.scheduler.pacer.expected(plan.decodes, plan.prompt_tokens)
        if expected is not None:
            return SLOWER * expected
        return (plan.decodes + plan.prompt_tokens) * self._parameters * 2 / SLOWEST

    def _goes_on(self, chunk: Chunk) -> bool:
        """Whether a decoding sequence may get another token after this chunk's."""
        length, most = chunk.stop + 1, chunk.sequence.request.sampling.max_tokens
        generated = length - chunk.sequence.prompt_length
        return length < self.loaded.max_model_len and generated != most

    def _append(self, sequence: Sequence, sampled: Sampled) -> TokenMade:
        sequence.tokens.append(sampled.token)
        self.generation_tokens += 1
        reason, stop_id = self._finish_reason(sequence)
        return TokenMade(
            sequence.request.id, sequence.choice, sampled.token, sampled.logprob, reason, stop_id
        )

    def _finish_reason(self, sequence: Sequence) -> tuple[FinishReason | None, int | None]:
        sampling = sequence.request.sampling
        token, made = sequence.tokens[-1], sequence.generated_length
        if made >= sampling.min_tokens:
            if token in sampling.stop_token_ids:
                return "stop", token
            if token in self.loaded.eos_ids and not sampling.ignore_eos:
                return "stop", None
        if made == sampling.max_tokens or len(sequence.tokens) >= self.loaded.max_model_len:
            return "length", None
        return None, None

    def _fail(self, result: StepResult, events: list[Event]) -> None:
        for failed, reason in result.failed.items():
            request_id = failed.request.id
            if request_id not in self._live:
                continue  # another choice of it failed in this very step
            events.append(Failed(request_id, reason))
            self._remove(self._live[request_id][::-1], keep=False)

    def _score_prompts(self, result: StepResult, events: list[Event]) -> None:
        for sequence, first, values in result.prompt_logprobs:
            # A preempted prompt is computed again; what was sent already is not sent twice.
            sent = sequence.request.scored_from + sequence.prompt_logprobs_sent
            unsent = values[max(0, sent - first) :]
            if unsent and sequence.status is Status.RUNNING:
                sequence.prompt_logprobs_sent += len(unsent)
                events.append(PromptScored(sequence.request.id, tuple(unsent)))

    def _keep(self, copies: list[BlockCopy]) -> bool:
        """Copy blocks into the prefix cache; where memory runs out it is emptied, and False."""
        if not copies:
            return True
        try:
            self.runner.storage.keep(copies)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
        else:
            return True
        if self.scheduler.cache is not None:
            self.scheduler.cache.shrink(0)  # what it says of these blocks is not so
        return False

    def _remove(self, sequences: list[Sequence], *, keep: bool = True) -> None:
        """Take out choices. To end a request, go from the last to the one that leads."""
        for sequence in sequences:
            self.scheduler.finish(sequence)
        if keep:
            self._keep([copy for s in sequences for copy in self.scheduler.keep(s)])
        self.runner.release(sequences)
        for sequence in sequences:
            siblings = self._live[sequence.request.id]
            siblings.remove(sequence)
            for sibling in siblings:
                if sequence in sibling.unforked:
                    sibling.unforked.remove(sequence)
            if sequence.unforked:
                self.scheduler.requeue([sequence.pass_lead()])
            if not siblings:
                del self._live[sequence.request.id]


def _left(ahead: Launched | None) -> StepPlan:
    """The step that was launched ahead, for the sequences that still run."""
    chunks = [] if ahead is None else ahead.chunks
    running = [chunk for chunk in chunks if chunk.sequence.status is Status.RUNNING]
    return StepPlan(running, decodes=len(running))


def _newly_started(plan: StepPlan) -> list[Sequence]:
    fresh = [c.sequence for c in plan.chunks if not c.sequence.started]
    for sequence in fresh:
        sequence.started = True
    # Choices that could not be forked queue again on their own: their request has started before.
    return [sequence for sequence in fresh if sequence.leads]


def _tell_reused(plan: StepPlan, events: list[Event]) -> None:
    for chunk in plan.prompts:
        sequence = chunk.sequence
        ends_prompt = chunk.stop == sequence.prompt_length and sequence.leads
        if ends_prompt and sequence.cached and sequence.status is Status.RUNNING:
            events.append(PromptReused(sequence.request.id, sequence.cached))


def _trace(result: StepResult, events: list[Event]) -> None:
    for sequence in {**result.traces, **result.first_logprobs}:
        if sequence.status is Status.RUNNING:
            edits = tuple(result.traces.get(sequence, ()))
            logprobs = result.first_logprobs.get(sequence)
            events.append(Traced(sequence.request.id, edits, logprobs))
