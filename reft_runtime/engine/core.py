"""The loop's body: plan a step, run it, settle it. Single-threaded; token ids in, events out."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from reft_runtime.base.model import LoadedModel
from reft_runtime.base.stages import tell
from reft_runtime.engine.device import active, decoder_for, sampler_for, sizes_for, tables_for
from reft_runtime.engine.events import Event
from reft_runtime.engine.followers import Followers
from reft_runtime.engine.runner import Launched, Runner, StepResult
from reft_runtime.engine.settle import LiveRequests
from reft_runtime.kv.choice import Places, storage_for
from reft_runtime.machine.memory import is_out_of_memory, is_spoiling
from reft_runtime.schedule.budget import BlockBudget
from reft_runtime.schedule.pacing import StepPacer
from reft_runtime.schedule.plan import Chunk, StepPlan
from reft_runtime.schedule.prefix_cache import PrefixCache
from reft_runtime.schedule.request import Request
from reft_runtime.schedule.scheduler import Scheduler
from reft_runtime.schedule.sequence import Status
from reft_runtime.schedule.snapshots import Snapshots

SLOWER = 4.0
"""A step may take this many times what similar steps took: late chunks attend to more tokens."""

SLOWEST = 2e9
"""Multiplications and additions a second that every machine is assumed to reach."""


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """The engine's limits.

    `max_running` bounds the sequences that run at once, `max_step_tokens` the tokens of one step,
    and `kv_tokens` the tokens whose keys and values are held. With `prefix_cache` the part of
    these that no sequence uses keeps blocks for requests with an equal prefix. Of a model with
    recurrent layers `snapshots` states are kept beside them.
    """

    max_running: int
    max_step_tokens: int
    kv_tokens: int
    prefix_cache: bool = True
    snapshots: int = 64


@dataclass(slots=True)
class Step:
    """A step to compute, or one that the device is computing already (`launched`).

    `began` is the time from which it is measured, in seconds on the core's clock. `events` are
    the `Started` events of the requests that it starts.
    """

    plan: StepPlan
    began: float
    launched: Launched | None = None
    events: list[Event] = field(default_factory=list)


class Ahead:
    """The decode step that the device computes while the CPU settles the step before it.

    The order of calls: step 2 is launched before the tokens of step 1 are awaited (`put`); step 1
    is settled, and some of its sequences may end; `take` returns step 2 with the sequences that
    still run. Step 2 is discarded if none still runs, if the engine has become idle, or if step 1
    failed (`drop`). Only decode steps on a device are launched ahead: on a CPU this stays empty.
    """

    def __init__(self) -> None:
        self._launched: Launched | None = None

    def put(self, launched: Launched | None) -> None:
        """Keep the step that was launched, if one was."""
        self._launched = launched

    def take(self, began: float) -> Step | None:
        """Return the step with its sequences that still run; None if there is no such step.

        `began` is when the step before it ended.
        """
        launched, self._launched = self._launched, None
        chunks = [] if launched is None else launched.chunks
        running = [chunk for chunk in chunks if chunk.sequence.status is Status.RUNNING]
        return Step(StepPlan(running, decodes=len(running)), began, launched) if running else None

    def drop(self) -> None:
        """Forget the launched step: nobody waits for its tokens."""
        self._launched = None


class EngineCore:
    """Turns requests into tokens. Not thread safe: one thread owns it.

    `clock` returns seconds; the measured step times decide how large later steps are. `followers`
    are the other ranks of a model that several processes compute.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        config: EngineConfig,
        clock: Callable[[], float] = time.perf_counter,
        followers: Followers | None = None,
    ) -> None:
        self.loaded = loaded
        cached = config.prefix_cache
        budget = BlockBudget(
            config.kv_tokens,
            PrefixCache() if cached else None,
            Snapshots(config.snapshots if cached else 0) if loaded.mixers else None,
        )
        places: Places | None = budget.cache
        if followers is not None and places is not None:
            places = followers.seen_by(places)
        sizes = sizes_for(loaded.device)
        pacer = StepPacer(sizes.mixed_tokens, sizes.least_tokens)
        self.scheduler = Scheduler(budget, config.max_running, config.max_step_tokens, pacer)
        self.runner = Runner(
            loaded,
            storage_for(loaded, budget, config.max_running, places),
            tables_for(loaded, config.max_running),
            sampler_for(loaded, config.max_running),
            followers,
        )
        self.runner.decoder = decoder_for(self.runner, config.max_running)
        tell(active(self.runner))
        self.requests = LiveRequests(loaded, self.scheduler, self.runner)
        self.steps = 0
        self.allowance = 0.0
        """Seconds that the step in progress may take; 0 between steps."""
        self.spoiled = False
        """Whether the thread that calls `step` must hand over to a new one; see `is_spoiling`."""
        self._parameters: int = loaded.model.num_parameters()
        self._clock = clock
        self._ahead = Ahead()
        self._ended = 0.0

    def close(self) -> None:
        """Free the memory of keys and values; no step may follow. It may be called again."""
        self.runner.close()

    @property
    def idle(self) -> bool:
        """Whether there is nothing to compute."""
        return self.scheduler.idle

    def add(self, request: Request) -> None:
        """Queue a request. The caller has checked it; see `Engine.open`."""
        self.requests.add(request)

    def abort(self, request_id: str, choice: int | None = None) -> list[Event]:
        """End a request, or one of its choices, at once and without an event.

        Returns the event of the request's trace if that completes the trace. A request or choice
        that is not known is ignored.
        """
        return self.requests.abort(request_id, choice)

    def step(self) -> list[Event]:
        """Compute one step and return its events.

        On a device the next decode step is launched before this step's tokens are known, if
        possible. An exception means that the engine itself is broken.
        """
        step = self._ahead.take(self._ended) or self._plan()
        if step is None:
            return []
        result = self._run(step)
        if result is None:
            return step.events + self.requests.fail_last(step.plan)
        self.steps += 1
        events = step.events + self.requests.settle(step.plan, result)
        if self.idle:
            self._ahead.drop()
        return events

    def check_integrity(self) -> None:
        """Raise AssertionError if the bookkeeping disagrees, or anything is left while idle."""
        self.scheduler.check_integrity(idle=self.idle)
        self.runner.check_integrity(idle=self.idle)
        self.requests.check_integrity(idle=self.idle)

    def _plan(self) -> Step | None:
        """Plan the next step; None if there is nothing to compute, or no memory to keep blocks."""
        plan = self.scheduler.schedule()
        kept = self.requests.keep(plan.kept, plan.kept_states)
        self.runner.release(plan.preempted)
        if not plan.chunks or not kept:
            return None
        return Step(plan, self._clock(), events=self.requests.started(plan))

    def _run(self, step: Step) -> StepResult | None:
        """Run a step within its allowance of time; None if memory ran out."""
        plan = step.plan
        self.allowance = self._allowed(plan)
        result = self._compute(step)
        self._ended = self._clock()
        self.allowance = 0.0
        if result is not None:
            seconds = self._ended - step.began
            self.scheduler.pacer.record(plan.decode_tokens, plan.prompt_tokens, seconds)
        return result

    def _compute(self, step: Step) -> StepResult | None:
        try:
            begun = step.launched or self.runner.run(step.plan.chunks)
            if isinstance(begun, StepResult):
                return begun
            self._go_ahead(step, begun)
            return begun.result()
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            self._ahead.drop()
            self.spoiled |= is_spoiling(error)
        # Return outside of `except`: inside it, the exception would keep the step's tensors alive.
        return None

    def _go_ahead(self, step: Step, begun: Launched) -> None:
        """Launch the step after one that has begun, if possible.

        If memory runs out it begins later, in its turn: nobody's tokens depend on it.
        """
        going_on = [c.sequence for c in step.plan.chunks if self._goes_on(c)]
        if not (following := self.scheduler.after(going_on)):
            return
        try:
            self._ahead.put(self.runner.run_after(begun, following))
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise

    def _allowed(self, plan: StepPlan) -> float:
        expected = self.scheduler.pacer.expected(plan.decode_tokens, plan.prompt_tokens)
        if expected is not None:
            return SLOWER * expected
        return (plan.decode_tokens + plan.prompt_tokens) * self._parameters * 2 / SLOWEST

    def _goes_on(self, chunk: Chunk) -> bool:
        """Whether a decoding sequence may get another token after this chunk's."""
        length, most = chunk.stop + 1, chunk.sequence.request.sampling.max_tokens
        generated = length - chunk.sequence.prompt_length
        return length < self.loaded.max_model_len and generated != most
