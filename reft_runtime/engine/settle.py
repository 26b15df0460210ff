"""What the result of a step means for requests: tokens appended, choices ended, events told."""

from __future__ import annotations

import time

from reft_runtime.base.model import LoadedModel
from reft_runtime.engine.events import (
    Event,
    Failed,
    PromptReused,
    PromptScored,
    Started,
    TokenMade,
    Traced,
)
from reft_runtime.engine.explain import Explanations
from reft_runtime.engine.labels import LabelScores
from reft_runtime.engine.runner import Runner, StepResult
from reft_runtime.engine.sampler import Sampled
from reft_runtime.grammar import GrammarState
from reft_runtime.machine.memory import is_out_of_memory
from reft_runtime.outputs import FinishReason, TokenLogprob
from reft_runtime.schedule.plan import StepPlan
from reft_runtime.schedule.prefix_cache import BlockCopy, StateCopy
from reft_runtime.schedule.request import Request
from reft_runtime.schedule.scheduler import Scheduler
from reft_runtime.schedule.sequence import MOST_FORCED, Sequence, Status, sequences_of

OUT_OF_MEMORY = "memory ran out; send it again, or a shorter one"


class LiveRequests:
    """The requests that the engine computes, from `add` to their last event.

    Sequences are removed here, and nowhere else, from the scheduler and the runner.
    """

    def __init__(self, loaded: LoadedModel, scheduler: Scheduler, runner: Runner) -> None:
        self.prompt_tokens = 0
        """Prompt tokens computed since the start."""
        self.generation_tokens = 0
        """Tokens generated since the start."""
        self._loaded = loaded
        self._scheduler = scheduler
        self._runner = runner
        self._explanations = Explanations()
        self._labels = LabelScores()
        self._arrivals = 0
        self._sequences: dict[str, list[Sequence]] = {}

    def add(self, request: Request) -> None:
        """Queue a request. The caller has checked it; see `Engine.open`."""
        first = sequences_of(request, self._arrivals)
        self._arrivals += 1
        self._sequences[request.id] = [first, *first.unforked]
        self._explanations.begin(request)
        self._scheduler.add(first)

    def abort(self, request_id: str, choice: int | None = None) -> list[Event]:
        """End a request, or one of its choices.

        Returns the event of the request's trace if that completes the trace. Nothing happens if
        the request, or the choice, has ended.
        """
        live = self._sequences.get(request_id, [])
        if choice is None:
            self._drop(request_id, keep=True)
        elif ended := [sequence for sequence in live if sequence.choice == choice]:
            return self._end(ended)
        return []

    def started(self, plan: StepPlan) -> list[Event]:
        """Return the `Started` events of requests whose first chunk is in a step about to run."""
        now, events = time.monotonic(), list[Event]()
        for chunk in plan.chunks:
            sequence = chunk.sequence
            # Choices that were not forked queue on their own: their request has started before.
            if sequence.leads and not sequence.started:
                events.append(Started(sequence.request.id, now))
            sequence.started = True
        return self._explanations.pass_on(events)

    def fail_last(self, plan: StepPlan) -> list[Event]:
        """End the request whose turn was last of a step for which memory ran out.

        Of one tenant that is the newest. What the other requests have computed is kept: their next
        step repeats this one. Recurrent states may have gone on in some layers, and cannot go back:
        sequences that have them begin again.
        """
        last = max((c.sequence for c in plan.chunks), key=self._scheduler.turn)
        events = self._fail(Failed(last.request.id, OUT_OF_MEMORY, out_of_memory=True))
        if self._loaded.mixers:
            touched = [s for c in plan.chunks for s in (c.sequence, *c.forks) if _runs(s)]
            self._scheduler.restart(touched)
            self._runner.release(touched)
        return events

    def settle(self, plan: StepPlan, result: StepResult) -> list[Event]:
        """Take in the result of a step; returns its events in order."""
        self.prompt_tokens += sum(
            max(0, min(c.stop, c.sequence.prompt_length) - c.start) for c in plan.prompts
        )
        self._scheduler.advance(plan)
        events: list[Event] = []
        for sequence, reason in result.failed.items():
            if sequence.request.id in self._sequences:  # else another choice of it failed just now
                events += self._fail(Failed(sequence.request.id, reason))
        scored, traced = self._scored(result), self._traced(result)
        tokens = _without_tokens(plan)
        for sequence, sampled in result.sampled:
            if _runs(sequence):
                tokens += ((sequence, event) for event in self._append(sequence, sampled))
        for sequence, _ in tokens:
            if _runs(sequence) and sequence.grammar is not None and sequence.grammar.fault:
                events += self._fail(_too_complex(sequence, sequence.grammar))
        tokens = [(sequence, event) for sequence, event in tokens if _runs(sequence)]
        finished = [sequence for sequence, event in tokens if event.finish_reason]
        # Decoding sequences are kept when they end, so that their steps have nothing to copy.
        lasting = [c for c in plan.prompts if _runs(c.sequence) and c.sequence not in finished]
        self.keep(
            [copy for c in lasting for copy in self._scheduler.keep(c.sequence)],
            [
                copy
                for c in lasting
                if c.ends_at_boundary
                for copy in self._scheduler.keep_state(c.sequence)
            ],
        )
        for sequence, logprobs in result.label_logprobs:
            if _runs(sequence):
                self._labels.take(sequence.request, logprobs)
        told = [event for sequence, event in tokens if sequence.request.labels is None]
        events += self._explanations.pass_on([*scored, *traced, *_reused(plan), *told])
        return events + self._end(finished)

    def keep(self, blocks: list[BlockCopy], states: list[StateCopy]) -> bool:
        """Copy blocks and recurrent states into the prefix cache.

        If memory runs out, empty it and return False.
        """
        try:
            self._runner.keep(blocks, states)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
        else:
            return True
        if self._scheduler.cache is not None:
            self._scheduler.cache.shrink(0)  # it has places for blocks that were not copied
        if self._scheduler.snapshots is not None:
            self._scheduler.snapshots.clear()
        return False

    def check_integrity(self, *, idle: bool) -> None:
        """Raise AssertionError if anything is left while nothing is to be computed."""
        if idle and self._sequences:
            raise AssertionError(f"requests left: {', '.join(self._sequences)}")
        if idle:
            self._explanations.check_integrity()
            self._labels.check_integrity()

    def _append(self, sequence: Sequence, sampled: Sampled) -> list[TokenMade]:
        """Append a token, and those that a grammar forces after it."""
        made = [self._append_one(sequence, sampled.token, sampled.logprob)]
        if sequence.grammar is None or not self._appends_forced(sequence):
            return made
        for token in sequence.grammar.forced()[:MOST_FORCED]:
            if made[-1].finish_reason is not None:
                break
            made.append(self._append_one(sequence, token))
        return made

    def _appends_forced(self, sequence: Sequence) -> bool:
        """Whether forced tokens are appended unsampled: a decoder takes one token at a time.

        Nobody would compute their log-probabilities. Sampled, they come out the same.
        """
        return self._runner.decoder is None and sequence.request.sampling.logprobs is None

    def _append_one(
        self, sequence: Sequence, token: int, logprob: TokenLogprob | None = None
    ) -> TokenMade:
        sequence.tokens.append(token)
        self.generation_tokens += 1
        reason, stop_id = self._finish_reason(sequence)
        complete = False
        if sequence.grammar is not None and reason != "stop":
            sequence.grammar.advance(token)
            if sequence.grammar.complete:
                reason, complete = "stop", True
        return TokenMade(
            sequence.request.id, sequence.choice, token, logprob, reason, stop_id, complete
        )

    def _finish_reason(self, sequence: Sequence) -> tuple[FinishReason | None, int | None]:
        sampling = sequence.request.sampling
        token, made = sequence.tokens[-1], sequence.generated_length
        if made >= sampling.min_tokens:
            if token in sampling.stop_token_ids:
                return "stop", token
            if token in self._loaded.eos_ids and not sampling.ignore_eos:
                return "stop", None
        if made == sampling.max_tokens or len(sequence.tokens) >= self._loaded.max_model_len:
            return "length", None
        return None, None

    def _scored(self, result: StepResult) -> list[Event]:
        events: list[Event] = []
        for sequence, first, values in result.prompt_logprobs:
            # A preempted prompt is computed again; what was sent already is not sent twice.
            sent = sequence.request.scored_from + sequence.prompt_logprobs_sent
            unsent = values[max(0, sent - first) :]
            if unsent and _runs(sequence):
                sequence.prompt_logprobs_sent += len(unsent)
                events.append(PromptScored(sequence.request.id, tuple(unsent)))
        return events

    def _traced(self, result: StepResult) -> list[Event]:
        for sequence, logprobs in result.first_logprobs.items():
            if _runs(sequence):
                self._explanations.first(sequence.request.id, logprobs)
        return [
            Traced(sequence.request.id, tuple(edits))
            for sequence, edits in result.traces.items()
            if _runs(sequence)
        ]

    def _fail(self, failed: Failed) -> list[Event]:
        """End a request that failed; a failed question also ends the traced request."""
        told = self._explanations.pass_on([failed])
        for event in (failed, *told):
            self._drop(event.request_id, keep=False)
        return told

    def _drop(self, request_id: str, *, keep: bool) -> None:
        """Remove a whole request, from its last choice to the one that leads."""
        for each in (*self._explanations.drop(request_id), request_id):
            self._remove(self._sequences.get(each, [])[::-1], keep=keep)
            self._labels.drop(each)

    def _end(self, sequences: list[Sequence]) -> list[Event]:
        """Remove choices that have ended; the questions of a traced request are queued."""
        self._remove(sequences)
        events: list[Event] = []
        for request_id, request in {s.request.id: s.request for s in sequences}.items():
            if request_id not in self._sequences:
                events += self._labels.ended(request)
                questions, told = self._explanations.choices_ended(request_id)
                events += told
                for question in questions:
                    self.add(question)
        return events

    def _remove(self, sequences: list[Sequence], *, keep: bool = True) -> None:
        """Remove choices; with `keep` the blocks that they have computed may be reused."""
        for sequence in sequences:
            self._scheduler.finish(sequence)
        if keep:
            self.keep(
                [copy for s in sequences for copy in self._scheduler.keep(s)],
                [copy for s in sequences for copy in self._scheduler.keep_state(s)],
            )
        self._runner.release(sequences)
        for sequence in sequences:
            siblings = self._sequences[sequence.request.id]
            siblings.remove(sequence)
            for sibling in siblings:
                if sequence in sibling.unforked:
                    sibling.unforked.remove(sequence)
            if sequence.unforked:
                self._scheduler.requeue([sequence.pass_lead()])
            if not siblings:
                del self._sequences[sequence.request.id]


def _too_complex(sequence: Sequence, grammar: GrammarState) -> Failed:
    reason = f"the grammar is too complex; make it smaller. {grammar.fault}"
    return Failed(sequence.request.id, reason, param=grammar.param)


def _runs(sequence: Sequence) -> bool:
    return sequence.status is Status.RUNNING


def _reused(plan: StepPlan) -> list[Event]:
    return [
        PromptReused(sequence.request.id, sequence.cached)
        for chunk in plan.prompts
        if (sequence := chunk.sequence).leads
        and chunk.start < sequence.prompt_length <= chunk.stop
        and (chunk.stop == sequence.prompt_length or sequence.request.labels is not None)
        and sequence.cached
        and _runs(sequence)
    ]


def _without_tokens(plan: StepPlan) -> list[tuple[Sequence, TokenMade]]:
    """The last events of choices with a max_tokens of 0 whose tokens are all computed."""
    return [
        (sequence, TokenMade(sequence.request.id, sequence.choice, None, None, "length"))
        for chunk in plan.chunks
        if chunk.completes and chunk.sequence.request.sampling.max_tokens == 0
        for sequence in (chunk.sequence, *chunk.forks)
        if _runs(sequence) and not sequence.remaining
    ]
