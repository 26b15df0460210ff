"""The library's front door: one resident model, its interventions, and prompts in, answers out."""

from __future__ import annotations

import asyncio
import random
import uuid
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import Self, cast
from weakref import WeakKeyDictionary

import psutil
import torch
from tqdm.auto import tqdm
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from reft_runtime.assembly import Assembler, collect
from reft_runtime.demo import DEMO_NAME, demo_model
from reft_runtime.engine.blocks import BLOCK_TOKENS
from reft_runtime.engine.core import EngineConfig, EngineCore
from reft_runtime.engine.events import Event
from reft_runtime.engine.loader import LoadedModel, adopt_model, load_model
from reft_runtime.engine.loop import EngineLoop
from reft_runtime.engine.sequence import AppliedIntervention, Request
from reft_runtime.errors import ConfigError, InvalidRequest
from reft_runtime.interventions import BaseShape, Registry, Version
from reft_runtime.outputs import ChoiceDelta, EngineInfo, EngineStats, Generation
from reft_runtime.sampling import SamplingParams
from reft_runtime.streams import EventLoopSink, Stream
from reft_runtime.text import Message, Tokenizer

Prompt = str | Sequence[int] | Sequence[Message]
"""Text (taken as it is), token ids, or the messages of a chat (put through its template)."""

MAX_INTERVENTIONS = 16
KV_SHARE_OF_FREE_MEMORY = 0.3
WATCH_SECONDS = 2.0


class Engine:
    """One resident base model that answers prompts, each through its own interventions.

    `model` is "demo", a hub id, a folder, or a transformers model (then `tokenizer` is needed).
    `interventions` is a folder of files; uploads are kept in `state_dir`, or in memory without
    one. `max_running` bounds the answers made at once, `max_queued` and `max_queued_tokens` what
    may wait, `max_step_tokens` the tokens of one step, `kv_tokens` the tokens whose keys and
    values are held (by default from free memory). `dtype` "auto" is the fast one for this
    machine. Loading blocks; everything else may be called from any thread.
    """

    def __init__(
        self,
        model: str | Path | PreTrainedModel = "demo",
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        interventions: str | Path | None = None,
        state_dir: str | Path | None = None,
        dtype: str = "auto",
        max_model_len: int | None = None,
        max_running: int = 64,
        max_queued: int = 1024,
        max_queued_tokens: int = 1_000_000,
        max_step_tokens: int = 512,
        kv_tokens: int | None = None,
        threads: int | None = None,
    ) -> None:
        if threads is not None:
            torch.set_num_threads(threads)
        name, loaded, tokenizer = _load(model, tokenizer, dtype, max_model_len)
        if kv_tokens is None:
            kv_tokens = _kv_tokens(loaded, max_running)
        elif kv_tokens < loaded.max_model_len + BLOCK_TOKENS:
            raise ConfigError(
                f"kv_tokens must be at least max_model_len + {BLOCK_TOKENS} "
                f"({loaded.max_model_len + BLOCK_TOKENS}), not {kv_tokens}.",
                param="kv_tokens",
            )
        self.tokenizer = Tokenizer(tokenizer, loaded.max_model_len)
        self.registry = Registry(
            BaseShape(
                model=name,
                architecture=loaded.architecture,
                hidden_size=loaded.hidden_size,
                num_layers=len(loaded.layers),
                vocab_size=loaded.vocab_size,
            ),
            sources=() if interventions is None else (interventions,),
            state_dir=state_dir,
        )
        if interventions is not None:
            self.registry.watch(WATCH_SECONDS)
        self.info = EngineInfo(
            model=name,
            architecture=loaded.architecture,
            dtype=str(loaded.dtype).removeprefix("torch."),
            device=str(loaded.model.device),
            threads=torch.get_num_threads(),
            max_model_len=loaded.max_model_len,
            max_running=max_running,
            vocab_size=loaded.vocab_size,
            parameters=loaded.model.num_parameters(),
            memory_bytes=loaded.weight_bytes + kv_tokens * loaded.kv_bytes_per_token,
            kv_tokens=kv_tokens,
        )
        config = EngineConfig(max_running, max(max_step_tokens, max_running), kv_tokens)
        self._loop = EngineLoop(EngineCore(loaded, config), max_queued, max_queued_tokens)
        self._sinks: WeakKeyDictionary[asyncio.AbstractEventLoop, EventLoopSink] = (
            WeakKeyDictionary()
        )

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
        intervention: str | Sequence[str | None] | None = None,
        progress: bool = True,
    ) -> list[Generation]:
        """Answer prompts, in their order; blocks, also inside a running event loop.

        `intervention` is a name for all prompts, or one for each (None: the base model). Any
        mistake in the arguments raises before anything is computed; a fault in one request raises
        `RequestFailed` and drops the others.
        """
        sampling = sampling or SamplingParams()
        requests = _pair(prompts, intervention)
        prepared = deque(
            (number, *self._prepare(self._tokens(prompt, name), sampling, _named(name)))
            for number, (prompt, name) in enumerate(requests)
        )
        answers: list[Generation | None] = [None] * len(requests)
        inbox: SimpleQueue[list[Event]] = SimpleQueue()
        live: dict[str, tuple[int, Assembler, list[ChoiceDelta], list[Version]]] = {}
        bar = tqdm(total=len(requests), disable=not progress, unit="prompt")
        try:
            while prepared or live:
                while prepared and len(live) < 2 * self.info.max_running:
                    number, request, versions = prepared.popleft()
                    live[request.id] = number, self._assembler(request), [], versions
                    self._loop.submit(request, inbox.put)
                for event in inbox.get():
                    if event.request_id not in live:
                        continue
                    number, assembler, deltas, versions = live[event.request_id]
                    if (delta := assembler.feed(event)) is not None:
                        deltas.append(delta)
                    if assembler.done:
                        del live[event.request_id]
                        self._release(versions)
                        answer = collect(assembler.prompt, sampling.n, deltas)
                        answer.prompt_logprobs = assembler.prompt_logprobs
                        answers[number] = answer
                        bar.update()
        finally:
            bar.close()
            for request_id, (_, _, _, versions) in live.items():
                self._loop.abort(request_id)
                self._release(versions)
            for _, _, versions in prepared:
                self._release(versions)
        return [answer for answer in answers if answer is not None]

    async def open(
        self,
        prompt: Sequence[int],
        sampling: SamplingParams,
        interventions: Sequence[tuple[str, float]] = (),
        *,
        request_id: str | None = None,
        salt: bytes = b"",
    ) -> Stream:
        """Start one request; `interventions` are names (or `name@digest`) with their strengths.

        Raises `InvalidRequest`, `NotFound`, `InvalidFile`, `Overloaded`, `Draining` or
        `EngineDead` before anything is queued.
        """
        request, versions = await asyncio.to_thread(
            self._prepare, prompt, sampling, interventions, request_id, salt
        )
        loop = asyncio.get_running_loop()
        sink = self._sinks.setdefault(loop, EventLoopSink(loop))

        def end() -> None:
            sink.streams.pop(request.id, None)
            self._release(versions)

        stream = Stream(
            request.id,
            self._assembler(request),
            [f"{version.name}@{version.digest}" for version in versions],
            on_end=end,
            abort=lambda: self._loop.abort(request.id),
            engine_alive=lambda: self._loop.alive,
        )
        sink.streams[request.id] = stream
        try:
            self._loop.submit(request, sink)
        except BaseException:
            end()
            raise
        return stream

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
        """Fail what is left and stop; safe to call twice."""
        self._loop.close()
        self.registry.close()

    def _tokens(self, prompt: Prompt, intervention: str | None) -> Sequence[int]:
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt)
        if prompt and isinstance(prompt[0], Mapping):
            template = None
            if intervention is not None:
                template = self.registry.resolve(intervention).manifest.template
            return self.tokenizer.encode_chat(cast(Sequence[Message], prompt), template)
        return cast(Sequence[int], prompt)

    def _prepare(
        self,
        prompt: Sequence[int],
        sampling: SamplingParams,
        interventions: Sequence[tuple[str, float]],
        request_id: str | None = None,
        salt: bytes = b"",
    ) -> tuple[Request, list[Version]]:
        """Check a request completely, and take hold of its interventions' versions."""
        sampling = self._checked(prompt, sampling)
        if len(interventions) > MAX_INTERVENTIONS:
            raise InvalidRequest(
                f"interventions: at most {MAX_INTERVENTIONS} in one request.",
                param="interventions",
            )
        held: list[Version] = []
        applied = []
        try:
            for ref, strength in interventions:
                version = self.registry.resolve(ref)
                self.registry.hold(version)
                held.append(version)
                applied.append(AppliedIntervention(version.digest, version.edits(), strength))
        except BaseException:
            self._release(held)
            raise
        request = Request(
            id=request_id or uuid.uuid4().hex,
            prompt=tuple(prompt),
            sampling=sampling,
            seed=random.getrandbits(63) if sampling.seed is None else sampling.seed,
            interventions=tuple(applied),
            salt=salt,
        )
        return request, held

    def _checked(self, prompt: Sequence[int], sampling: SamplingParams) -> SamplingParams:
        """Check what depends on the model; `max_tokens` None becomes what is left of its length."""
        vocabulary, limit = self.info.vocab_size, self.info.max_model_len
        if not prompt:
            raise InvalidRequest("prompt: it has no tokens; give at least one.", param="prompt")
        for name, ids in (
            ("prompt", prompt),
            ("stop_token_ids", sampling.stop_token_ids),
            ("logit_bias", sampling.logit_bias),
        ):
            if any(not 0 <= token < vocabulary for token in ids):
                raise InvalidRequest(
                    f"{name}: token ids must be from 0 to {vocabulary - 1}.", param=name
                )
        room = limit - len(prompt)
        if room < min(1, 1 if sampling.max_tokens is None else sampling.max_tokens):
            raise InvalidRequest(
                f"prompt: it has {len(prompt)} tokens, and this model's maximum length is {limit} "
                "tokens, prompt and answer together. Shorten the prompt.",
                param="prompt",
            )
        if sampling.max_tokens is None:
            return replace(sampling, max_tokens=room)
        if sampling.max_tokens > room:
            raise InvalidRequest(
                f"max_tokens: this model's maximum length is {limit} tokens; {len(prompt)} in the "
                f"prompt leave {room}, not {sampling.max_tokens}.",
                param="max_tokens",
            )
        return sampling

    def _assembler(self, request: Request) -> Assembler:
        def abort_choice(choice: int) -> None:
            self._loop.abort(request.id, choice)

        return Assembler(request.prompt, request.sampling, self.tokenizer, abort_choice)

    def _release(self, versions: Sequence[Version]) -> None:
        for version in versions:
            self.registry.release(version)


def _load(
    model: str | Path | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    dtype: str,
    max_model_len: int | None,
) -> tuple[str, LoadedModel, PreTrainedTokenizerBase]:
    if isinstance(model, PreTrainedModel):
        if tokenizer is None:
            raise ConfigError(
                "tokenizer: a model in memory needs its tokenizer.", param="tokenizer"
            )
        name = Path(model.name_or_path or "").name or type(model).__name__
        return name, adopt_model(model, max_model_len), tokenizer
    path, name = str(model), str(model)
    if path == "demo":
        path, name = str(demo_model()), DEMO_NAME
    elif Path(path).is_dir():
        name = Path(path).resolve().name
    loaded = load_model(path, dtype, max_model_len)
    return name, loaded, tokenizer or AutoTokenizer.from_pretrained(path)


def _kv_tokens(loaded: LoadedModel, max_running: int) -> int:
    """As many tokens as all running answers can need, but only a share of the memory there is.

    Rows round up to twice what they hold at most, hence the 2.
    """
    affordable = KV_SHARE_OF_FREE_MEMORY * _free_memory() / (2 * loaded.kv_bytes_per_token)
    longest = loaded.max_model_len + BLOCK_TOKENS
    return max(longest, min(max_running * longest, int(affordable)))


def _free_memory() -> int:
    """Bytes that may still be taken: the machine's, or less where a container has a limit."""
    free: int = psutil.virtual_memory().available
    with suppress(OSError, ValueError):
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text())  # "max" where there is none
        free = min(free, limit - int((group / "memory.current").read_text()))
    return free


def _named(intervention: str | None) -> list[tuple[str, float]]:
    return [] if intervention is None else [(intervention, 1.0)]


def _pair(
    prompts: Prompt | Sequence[Prompt], intervention: str | Sequence[str | None] | None
) -> list[tuple[Prompt, str | None]]:
    """Prompts with their interventions; a single prompt counts as a list of one."""
    single = isinstance(prompts, str) or (prompts and isinstance(prompts[0], int | Mapping))
    several = cast(Sequence[Prompt], [prompts] if single else prompts)
    if intervention is None or isinstance(intervention, str):
        return [(prompt, intervention) for prompt in several]
    if len(intervention) != len(several):
        raise InvalidRequest(
            f"intervention: {len(intervention)} names for {len(several)} prompts; give one name, "
            "or one a prompt.",
            param="intervention",
        )
    return list(zip(several, intervention, strict=True))
