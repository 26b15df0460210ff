"""The library's front door: one resident model, its interventions, and prompts in, answers out."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from types import TracebackType
from typing import Concatenate, ParamSpec, Self, cast

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from reft_runtime.base.model import LoadedModel
from reft_runtime.base.shape import shape_of
from reft_runtime.base.stages import stage
from reft_runtime.engine.core import EngineConfig, EngineCore
from reft_runtime.engine.device import sizes_for
from reft_runtime.engine.kv_budget import kv_budget, kv_bytes, memory_bytes
from reft_runtime.engine.loop import EngineLoop
from reft_runtime.errors import InvalidRequest
from reft_runtime.front.admission import Admission, Prompt
from reft_runtime.front.assembly import Assembler
from reft_runtime.front.blocking import Call, run_calls
from reft_runtime.front.streams import EventLoopSink, Stream
from reft_runtime.interventions import Registry, Version
from reft_runtime.interventions.registry.registry import MEMORY_BYTES, check_folders
from reft_runtime.interventions.registry.store import STATE_BYTES
from reft_runtime.loading.base import load_base
from reft_runtime.machine.cores import releasing_workers, use_threads
from reft_runtime.machine.dtypes import name_of
from reft_runtime.outputs import Comparison, Comparisons, EngineInfo, EngineStats, Generation
from reft_runtime.sampling import SamplingParams
from reft_runtime.schedule.request import Request
from reft_runtime.text import Tokenizer
from reft_runtime.use import Use, completion_prefix

Applied = str | Use | tuple[str | Use, ...] | None
"""What to apply to a prompt: one intervention, several in order, or (None) the base model."""

WATCH_SECONDS = 2.0

_P = ParamSpec("_P")


def _giving_back(
    init: Callable[Concatenate[Engine, _P], None],
) -> Callable[Concatenate[Engine, _P], None]:
    """Decorate `Engine.__init__`: where it fails, the caller has the model back."""

    @wraps(init)
    def wrapper(self: Engine, /, *args: _P.args, **kwargs: _P.kwargs) -> None:
        try:
            init(self, *args, **kwargs)
        except BaseException:
            self._give_back()
            raise

    return wrapper


class Engine:
    """One resident base model that answers prompts, each through its own interventions.

    `model` is "demo", a hub id, a folder, or a transformers model (then `tokenizer` is needed).
    `interventions` is a folder of files; uploads are kept in `state_dir`, or in memory without
    one; `allow_base` is a shell pattern for the names of base models whose files fit this one;
    `intervention_bytes` bounds the memory of interventions, `state_bytes` the uploads on disk.
    `max_running` bounds the answers made at once (64, on a CUDA device 256), `max_queued` and
    `max_queued_tokens` what may wait, `max_step_tokens` the tokens of one step (2,048, on a CUDA
    device 8,192; measured times bound them too), `kv_tokens`
    the tokens whose keys and values are held (by default from free memory); with `prefix_cache`
    those that nobody uses are kept, and reused where prompts begin alike and are edited alike.
    `threads` is by default one a core that this process may use, `device` is cpu, cuda or
    cuda:N (a model in memory stays where it is), `dtype` "auto" the fast one for the device.
    A transformers model is this engine's until `close`, which makes it again what it was.
    Loading blocks; everything else may be called from any thread.
    """

    _lent: LoadedModel | None = None
    """A model object that was handed in; None where the engine loaded one itself."""

    @releasing_workers
    @_giving_back
    def __init__(
        self,
        model: str | Path | PreTrainedModel = "demo",
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        interventions: str | Path | None = None,
        state_dir: str | Path | None = None,
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
    ) -> None:
        use_threads(threads)
        sources = () if interventions is None else (interventions,)
        check_folders(sources, state_dir)
        name, loaded, tokenizer = load_base(model, tokenizer, dtype, max_model_len, device=device)
        self._lent = loaded if isinstance(model, PreTrainedModel) else None
        sizes = sizes_for(loaded.device)
        max_running = sizes.max_running if max_running is None else max_running
        max_step_tokens = sizes.max_step_tokens if max_step_tokens is None else max_step_tokens
        kv_tokens = kv_budget(loaded, max_running, kv_tokens)
        config = EngineConfig(
            max_running, max(max_step_tokens, max_running), kv_tokens, prefix_cache
        )
        with stage("Setting up the cache"):
            core = EngineCore(loaded, config)
        self.tokenizer = Tokenizer(tokenizer, loaded.max_model_len)
        with stage("Reading the interventions"):
            self.registry = Registry(
                shape_of(name, loaded),
                sources=sources,
                state_dir=state_dir,
                check_site=core.runner.sites.check,
                allow_base=allow_base,
                memory_bytes=intervention_bytes,
                state_bytes=state_bytes,
            )
        if interventions is not None or state_dir is not None:
            self.registry.watch(WATCH_SECONDS)
        self.info = EngineInfo(
            model=name,
            architecture=loaded.architecture,
            dtype=name_of(loaded.dtype),
            device=str(loaded.device),
            threads=torch.get_num_threads(),
            max_model_len=loaded.max_model_len,
            max_running=max_running,
            vocab_size=loaded.vocab_size,
            parameters=loaded.model.num_parameters(),
            memory_bytes=memory_bytes(loaded, kv_tokens, max_running, config.max_step_tokens),
            intervention_bytes=intervention_bytes,
            kv_bytes=kv_bytes(loaded, kv_tokens, max_running),
            kv_tokens=kv_tokens,
        )
        self._admission = Admission(self.registry, self.tokenizer, self.info)
        self._loop = EngineLoop(core, max_queued, max_queued_tokens)
        self._sinks: dict[asyncio.AbstractEventLoop, EventLoopSink] = {}

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
        sampling: SamplingParams | None = None,
        *,
        intervention: Applied | list[Applied] | list[str] = None,
        progress: bool = True,
    ) -> list[Generation]:
        """Answer prompts, in their order; blocks, also inside a running event loop.

        `intervention` is a name (or a `Use`, or a tuple of them to compose) for all prompts, or a
        list with one for each; None is the base model. Any mistake in the arguments raises before
        anything is computed; a fault in one request raises `RequestFailed` and drops the others.
        """
        with self._calls(_pair(prompts, intervention), sampling or SamplingParams()) as calls:
            self._run(calls, progress=progress)
            return [call.answer() for call in calls]

    def compare(
        self,
        prompt: Prompt,
        interventions: Sequence[Applied],
        sampling: SamplingParams | None = None,
    ) -> Comparisons:
        """Answer one prompt with the base model and with each of `interventions`, and say why.

        The base model comes first. Each trace says how far every edit moved every row, and how far
        the answer's tokens are from what the base model would say after the same ones. Greedy
        unless `sampling` says otherwise.
        """
        if not isinstance(interventions, list):  # a tuple would be one composition
            raise InvalidRequest(
                "interventions: give a list with one entry for each answer; an entry is what "
                "`generate` takes as its intervention.",
                param="interventions",
            )
        sampling = sampling or SamplingParams(temperature=0, max_tokens=64)
        columns = [_uses(applied) for applied in (None, *interventions)]
        with self._calls([(prompt, uses) for uses in columns], sampling, trace=True) as calls:
            self._run(calls)
        return Comparisons(
            Comparison(tuple(use.label for use in uses), call.answer(), call.assembler.trace())
            for uses, call in zip(columns, calls, strict=True)
        )

    def encode(self, prompt: Prompt, uses: Sequence[Use] = ()) -> Sequence[int]:
        """Token ids of a prompt for `open`; a chat goes through the template of what is used."""
        return self._admission.tokens(prompt, uses)

    async def open(
        self,
        prompt: Sequence[int],
        sampling: SamplingParams,
        uses: Sequence[Use] = (),
        *,
        request_id: str | None = None,
        salt: bytes = b"",
        trace: bool = False,
    ) -> Stream:
        """Start one request, with `uses` applied in order; a `trace` is for `Stream.trace`.

        Requests of different `salt` share nothing in the prefix cache.

        Raises `InvalidRequest`, `NotFound`, `InvalidFile`, `Overloaded`, `Draining` or
        `EngineDead` before anything is queued.
        """
        preparing = asyncio.ensure_future(
            asyncio.to_thread(
                self._admission.prepare,
                prompt,
                sampling,
                uses,
                request_id=request_id,
                salt=salt,
                trace=trace,
            )
        )
        try:
            request, versions = await asyncio.shield(preparing)
        except asyncio.CancelledError:
            # The thread goes on, and what it takes hold of must be let go.
            preparing.add_done_callback(self._drop_prepared)
            raise
        return self._start(self._assembler(request, versions, uses), versions)

    def stats(self) -> EngineStats:
        """A snapshot of load and counters."""
        return self._loop.stats()

    def begin_drain(self) -> None:
        """Take no new request from now on; those that run or wait go on."""
        self._loop.begin_drain()

    async def drained(self) -> None:
        """Wait until no request is left."""
        await asyncio.to_thread(self._loop.wait_empty)

    def check_integrity(self) -> None:
        """Raise AssertionError if an idle engine still holds anything, or its books disagree."""
        self._loop.check_integrity()

    def close(self) -> None:
        """Fail what is left and stop; a model object works as before then. Safe to call twice."""
        self._loop.close()
        self.registry.close()
        self._give_back()

    def _give_back(self) -> None:
        if self._lent is not None:
            self._lent.give_back()

    @contextmanager
    def _calls(
        self,
        asked: Iterable[tuple[Prompt, Sequence[Use]]],
        sampling: SamplingParams,
        *,
        trace: bool = False,
    ) -> Iterator[list[Call]]:
        """Calls that hold their versions for the length of the block."""
        calls: list[Call] = []
        held: list[Version] = []
        try:
            for prompt, uses in asked:
                tokens = self._admission.tokens(prompt, uses)
                request, versions = self._admission.prepare(tokens, sampling, uses, trace=trace)
                held += versions
                calls.append(Call(self._assembler(request, versions, uses)))
            yield calls
        finally:
            self._admission.release(held)

    def _run(self, calls: Sequence[Call], *, progress: bool = False) -> None:
        run_calls(self._loop, calls, 2 * self.info.max_running, progress=progress)

    def _start(self, assembler: Assembler, versions: Sequence[Version]) -> Stream:
        """Submit a request; its versions are let go when it is over, or here if it is refused."""
        request = assembler.request
        loop = asyncio.get_running_loop()
        for gone in [other for other in self._sinks if other.is_closed()]:
            del self._sinks[gone]
        sink = self._sinks.get(loop) or EventLoopSink(loop)

        def end() -> None:
            sink.streams.pop(request.id, None)
            if not sink.streams:
                self._sinks.pop(loop, None)

        stream = Stream(
            assembler,
            [f"{version.name}@{version.digest}" for version in versions],
            on_end=end,
            abort=lambda: self._loop.abort(request.id),
            engine_alive=lambda: self._loop.alive,
        )
        try:
            self._loop.submit(request, sink, lambda: self._admission.release(versions))
        except BaseException:
            self._admission.release(versions)
            raise
        # The sink delivers on this event loop: not before this returns.
        sink.streams[request.id] = stream
        self._sinks[loop] = sink
        return stream

    def _drop_prepared(self, done: asyncio.Future[tuple[Request, list[Version]]]) -> None:
        if not done.cancelled() and done.exception() is None:
            self._admission.release(done.result()[1])

    def _assembler(
        self, request: Request, versions: Sequence[Version], uses: Sequence[Use]
    ) -> Assembler:
        def abort_choice(choice: int) -> None:
            self._loop.abort(request.id, choice)

        begins = completion_prefix(
            (version, use.strength) for version, use in zip(versions, uses, strict=True)
        )
        return Assembler(request, self.tokenizer, abort_choice, begins)


def _uses(applied: Applied) -> tuple[Use, ...]:
    if applied is None:
        return ()
    several = applied if isinstance(applied, tuple) else (applied,)
    for use in several:
        if not isinstance(use, str | Use):
            raise InvalidRequest(
                "intervention: give a name, a Use, a tuple of them, or None, not "
                f"{type(use).__name__}.",
                param="intervention",
            )
    return tuple(use if isinstance(use, Use) else Use(use) for use in several)


def _pair(
    prompts: Prompt | Sequence[Prompt], intervention: Applied | list[Applied] | list[str]
) -> list[tuple[Prompt, tuple[Use, ...]]]:
    """Prompts with what applies to them; a single prompt counts as a list of one."""
    if not isinstance(prompts, str | list | tuple) or (not prompts and prompts != ""):
        raise InvalidRequest(
            "prompts: give text, a list of token ids, a list of messages, or a list of these, not "
            f"{repr(prompts)[:40]}.",
            param="prompts",
        )
    single = isinstance(prompts, str) or isinstance(prompts[0], int | Mapping)
    several = cast(Sequence[Prompt], [prompts] if single else prompts)
    if not isinstance(intervention, list):
        return [(prompt, _uses(intervention)) for prompt in several]
    if len(intervention) != len(several):
        raise InvalidRequest(
            f"intervention: {len(intervention)} for {len(several)} prompts; give one, or a list "
            "with one for each prompt.",
            param="intervention",
        )
    return [(p, _uses(applied)) for p, applied in zip(several, intervention, strict=True)]
