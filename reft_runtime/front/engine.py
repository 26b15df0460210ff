"""The library's entry point: one resident model and its interventions, prompts in, answers out."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from reft_runtime.base.stages import stage
from reft_runtime.caller import ANYONE, Caller
from reft_runtime.engine.loop import EngineLoop
from reft_runtime.engine.sizing import Limits
from reft_runtime.errors import InvalidRequest
from reft_runtime.front.admission import Admission
from reft_runtime.front.asked import Uses, for_each, pairs, uses_of
from reft_runtime.front.assembly import Assembler
from reft_runtime.front.blocking import BlockingCalls, Todo
from reft_runtime.front.hop import in_turn
from reft_runtime.front.limits import check_limits
from reft_runtime.front.prepared import Prepared, release_all
from reft_runtime.front.prompts import Prompt
from reft_runtime.front.resident import ResidentModel
from reft_runtime.front.streams import EventLoopSink, Stream
from reft_runtime.grammar import GrammarCompiler
from reft_runtime.interventions import Registry
from reft_runtime.interventions.registry.holding import Holding
from reft_runtime.interventions.registry.registry import MEMORY_BYTES, check_folders
from reft_runtime.interventions.registry.store import STATE_BYTES
from reft_runtime.machine.cores import releasing_workers, use_threads
from reft_runtime.outputs import Classification, Comparison, Comparisons, Generation, Tracing
from reft_runtime.parallel.launch import Launcher
from reft_runtime.sampling import SamplingParams
from reft_runtime.stats import EngineStats
from reft_runtime.use import Use

WATCH_SECONDS = 2.0


class Engine:
    """One resident base model that answers prompts, each through its own interventions.

    - `model` is "demo", a hub id, a folder, or a transformers model (then `tokenizer` is needed). A
      transformers model belongs to this engine until `close`, which restores it.
    - `interventions` is a folder of files, a URL that fsspec knows (s3://bucket/folder), or a list
      of these.
    - `state_dir` is a folder or URL that keeps uploads; without one they last until `close`. With
      `shared_state` the folder may be one that other servers share, as they may a URL.
    - `allow_base` is a shell pattern for the names of base models whose files fit this one.
    - `intervention_bytes` bounds the memory of interventions, `state_bytes` the uploads on disk.
    - `device` is cpu, cuda or cuda:N (a model in memory stays where it is); `dtype` "auto" is the
      fast one for the device.
    - `max_model_len` is the longest prompt plus answer (by default the model's own limit).
    - `max_running` bounds the answers made at once (64, on a CUDA device 256), `max_queued` and
      `max_queued_tokens` what may wait.
    - `max_step_tokens` bounds the tokens of one step (2,048, on a CUDA device 8,192), as measured
      times do.
    - `kv_tokens` is how many tokens' keys and values are held (by default from free memory).
    - With `prefix_cache`, keys and values that no request uses are kept, and reused for prompts
      that begin alike and are edited alike.
    - `threads` is by default one for each core that this process may use.
    - With `tensor_parallel` above 1 that many processes, on as many devices, compute one model
      together (see docs/tensor_parallel.md); a process can have one such engine. `launcher` starts
      them elsewhere than on this machine, and `threads` are then those of each.

    Loading blocks; everything else may be called from any thread.
    """

    @releasing_workers
    def __init__(
        self,
        model: str | Path | PreTrainedModel = "demo",
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        interventions: str | Path | Sequence[str | Path] | None = None,
        state_dir: str | Path | None = None,
        shared_state: bool = False,
        allow_base: str | None = None,
        intervention_bytes: int = MEMORY_BYTES,
        state_bytes: int = STATE_BYTES,
        device: str = "cpu",
        dtype: str = "auto",
        max_model_len: int | None = None,
        max_running: int | None = None,
        max_queued: int = 1024,
        max_queued_tokens: int = 1_000_000,
        max_step_tokens: int | None = None,
        kv_tokens: int | None = None,
        prefix_cache: bool = True,
        threads: int | None = None,
        tensor_parallel: int = 1,
        launcher: Launcher | None = None,
    ) -> None:
        check_limits(
            max_model_len=max_model_len,
            max_running=max_running,
            max_queued=max_queued,
            max_queued_tokens=max_queued_tokens,
            max_step_tokens=max_step_tokens,
            kv_tokens=kv_tokens,
            threads=threads,
            tensor_parallel=tensor_parallel,
        )
        use_threads(threads, tensor_parallel if launcher is None else 1)
        if interventions is None or isinstance(interventions, str | Path):
            interventions = () if interventions is None else (interventions,)
        sources = tuple(interventions)
        check_folders(sources, state_dir, shared_state=shared_state)
        limits = Limits(max_model_len, max_running, max_step_tokens, kv_tokens, prefix_cache)
        with ExitStack() as started:  # what a failure ends again, in reverse order, as `close` does
            resident = ResidentModel(
                model,
                tokenizer,
                limits,
                device=device,
                dtype=dtype,
                ranks=tensor_parallel,
                launcher=launcher,
            )
            started.callback(resident.close)
            core, loaded, self.tokenizer = resident.core, resident.core.loaded, resident.tokenizer
            with stage("Reading the interventions"):
                self.registry = Registry(
                    resident.shape,
                    sources=sources,
                    state_dir=state_dir,
                    check_site=core.runner.sites.check,
                    allow_base=allow_base,
                    memory_bytes=intervention_bytes,
                    state_bytes=state_bytes,
                    device_bytes=None if core.runner.tables is None else core.runner.tables.budget,
                    max_waiting=max_queued,
                    shared_state=shared_state,
                )
            started.callback(self.registry.close)
            if sources or state_dir is not None:
                self.registry.watch(WATCH_SECONDS)
            self.info = resident.info(intervention_bytes)
            self.grammars = GrammarCompiler(
                self.tokenizer.definition, loaded.vocab_size, loaded.eos_ids
            )
            started.callback(self.grammars.close)
            self.admission = Admission(
                self.registry, self.tokenizer, self.grammars, self.info, loaded.eos_ids
            )
            yield_cores = threads is None and tensor_parallel == 1
            self._loop = EngineLoop(core, max_queued, max_queued_tokens, yield_cores=yield_cores)
            started.callback(self._loop.close)
            self._calls = BlockingCalls(
                self.admission, self.tokenizer, self._loop, 2 * self.info.max_running
            )
            self._sinks: dict[asyncio.AbstractEventLoop, EventLoopSink] = {}
            resident.serve(self._loop.fail)
            self._started = started.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def alive(self) -> bool:
        """Whether the engine can answer; once False it stays so."""
        return self._loop.alive

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling: SamplingParams | list[SamplingParams] | None = None,
        *,
        intervention: Uses | list[Uses] | list[str] = None,
        progress: bool = True,
    ) -> list[Generation]:
        """Answer prompts, in their order; blocks, also inside a running event loop.

        `sampling` is for all prompts, or a list with one for each. `intervention` is a name (or a
        `Use`, or a tuple of them to compose) for all prompts, or a list with one for each; None is
        the base model. Any mistake in the arguments raises before anything is computed, unless the
        interventions do not fit into memory together: then the prompts are answered in parts. A
        fault in one request raises `RequestFailed` and drops the others.
        """
        asked = pairs(prompts, intervention)
        each = zip(asked, for_each(sampling, len(asked)), strict=True)
        todo = [
            Todo(uses, partial(self.admission.prepare, [one], own, uses))
            for (one, uses), own in each
        ]
        return [call.answer() for call in self._calls.answered(todo, progress=progress)]

    def classify(
        self,
        prompts: Prompt | Sequence[Prompt],
        labels: Sequence[str] | None = None,
        *,
        intervention: Uses | list[Uses] | list[str] = None,
        progress: bool = True,
    ) -> list[Classification]:
        """Say which of `labels` answers each prompt, and how likely each is; blocks.

        Nothing is generated: the labels are scored after one computation of the prompt. Without
        `labels` those of the intervention's file are taken. The other arguments, and what is
        raised, are as for `generate`.
        """
        admit = self.admission.prepare_labels
        todo = [
            Todo(uses, partial(admit, [one], labels, uses))
            for one, uses in pairs(prompts, intervention)
        ]
        return [call.classification() for call in self._calls.answered(todo, progress=progress)]

    def compare(
        self,
        prompt: Prompt,
        interventions: Sequence[Uses],
        sampling: SamplingParams | None = None,
        *,
        trace: Literal[True, "along"] = True,
    ) -> Comparisons:
        """Answer one prompt with the base model and with each of `interventions`, and trace each.

        The base model comes first. Each trace says how far every edit moved every row, and how far
        the answer's tokens are from what the base model would say after the same ones. Decoding is
        greedy unless `sampling` says otherwise. A trace `along` also has each row's coordinates on
        the edit's directions (`EditAlong`), and reads the rows of interventions of strength 0.
        """
        if not isinstance(interventions, list):  # a tuple would be one composition
            raise InvalidRequest(
                "interventions: give a list with one entry for each answer; an entry is what "
                "`generate` takes as its intervention.",
                param="interventions",
            )
        settings = sampling or SamplingParams(temperature=0, max_tokens=64)
        admit = self.admission.prepare
        columns = [uses_of(applied) for applied in (None, *interventions)]
        todo = [
            Todo(uses, partial(admit, [prompt], settings, uses, trace=trace)) for uses in columns
        ]
        return Comparisons(
            Comparison(tuple(use.label for use in uses), call.answer(), call.assembler.trace())
            for uses, call in zip(columns, self._calls.answered(todo), strict=True)
        )

    async def open(
        self,
        prompt: Prompt,
        sampling: SamplingParams,
        uses: Sequence[Use] = (),
        *,
        request_id: str | None = None,
        caller: Caller = ANYONE,
        priority: int = 0,
        trace: Tracing = False,
    ) -> Stream:
        """Start one request, with `uses` applied in order; a `trace` is for `Stream.trace`.

        Of a `caller`'s waiting requests those of the lowest `priority` come first. The versions
        that the request applies are held from here until it ends. Raises before anything is queued.
        This is `Admission.acquire`, `Admission.prepare` in a worker thread and then `start`; it
        raises what these do.
        """
        acquire = partial(self.admission.acquire, uses, caller)

        def prepare(holding: Holding) -> list[Prepared]:
            return self.admission.prepare(
                [prompt],
                sampling,
                uses,
                request_id=request_id,
                caller=caller,
                priority=priority,
                trace=trace,
                holding=holding,
            )

        [prepared] = await in_turn(acquire, prepare, release_all)
        return self.start(prepared)

    def start(self, prepared: Prepared) -> Stream:
        """Queue a request that was prepared; its stream is for the running event loop.

        The versions that the request holds are released when it is over, or at once if it is
        refused. Raises `InvalidRequest` if another request of its caller's id is not over,
        `Overloaded`, `Draining` or `EngineDead`.
        """
        request = prepared.request
        loop = asyncio.get_running_loop()
        for other in list(self._sinks):  # a copy, because other threads have event loops of theirs
            if other.is_closed():
                self._sinks.pop(other, None)
        sink = self._sinks.get(loop) or EventLoopSink(loop)

        def end() -> None:
            sink.streams.pop(request.id, None)
            if not sink.streams:
                self._sinks.pop(loop, None)

        stream = Stream(
            Assembler.of(prepared, self.tokenizer, self._loop.abort),
            list(prepared.versions),
            on_end=end,
            abort=lambda: self._loop.abort(request.id),
            engine_alive=lambda: self._loop.alive,
        )
        try:
            self._loop.submit(request, sink, prepared.release)
        except BaseException:
            prepared.release()
            raise
        # The sink delivers on this event loop: not before this returns.
        sink.streams[request.id] = stream
        self._sinks[loop] = sink
        return stream

    def stats(self) -> EngineStats:
        """A snapshot of load and counters."""
        return self._loop.stats()

    def begin_drain(self) -> None:
        """Take no new requests from now on; those that run or wait go on."""
        self._loop.begin_drain()

    async def drained(self) -> None:
        """Wait until no request is left."""
        await asyncio.to_thread(self._loop.wait_empty)

    def check_integrity(self) -> None:
        """Raise `AssertionError` if an idle engine still holds anything, or its counts disagree."""
        self._loop.check_integrity()

    def stop(self) -> None:
        """Fail the requests that are left, and take no more. Interventions can still be changed."""
        self._loop.close()
        self.registry.stop()

    def close(self) -> None:
        """Fail the requests that are left, stop, and restore a model object. Safe to call twice.

        A model that the engine loaded itself is freed at once, so that there is room for another.
        """
        self._started.close()
