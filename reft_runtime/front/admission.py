"""Turns what callers ask into checked engine requests: names to held versions, prompts to tokens.

Nothing is queued before a request is known to be sound. Nothing else in the project resolves the
names of a request, chooses how its prompts are written or compares its length with the model's.
"""

from __future__ import annotations

import random
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from numbers import Integral
from typing import TYPE_CHECKING, Any, Protocol, TypeGuard, cast

from reft_runtime.caller import ANYONE, Caller
from reft_runtime.errors import InvalidRequest, NotFound
from reft_runtime.front.bounds import bounded, check_labels, check_length, traced
from reft_runtime.front.labels import LabelTokens, labels_of
from reft_runtime.front.prepared import Prepared
from reft_runtime.front.prompt_form import Encoder, PromptForm
from reft_runtime.front.thoughts import behind, marked, thinking
from reft_runtime.grammar import GrammarCompiler
from reft_runtime.outputs import EngineInfo, Tracing
from reft_runtime.sampling import Grammar, SamplingParams
from reft_runtime.schedule.request import AppliedIntervention, Request
from reft_runtime.use import MAX_INTERVENTIONS, Use

if TYPE_CHECKING:
    from reft_runtime.interventions import Version
    from reft_runtime.interventions.registry.holding import Holding
    from reft_runtime.text import ChatOptions, Message

Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]]
"""A prompt: a text, token ids, or the messages of a chat.

A text is tokenised as it is, or counts as a user's message if a file of the request says so.
"""


_NO_TOKENS = SamplingParams(temperature=0, max_tokens=0)


class Versions(Protocol):
    """The part of the registry that requests need."""

    def resolve(self, ref: str) -> Version:
        """The version that a name stands for now; raises `NotFound`."""

    def acquire(self, refs: Sequence[str | Version]) -> Holding:
        """Begin to hold the versions that names stand for now, all together; never blocks long."""

    def hold(self, version: Version) -> None:
        """Begin a request on a version that is held: hold it once more, and count the request."""

    def release(self, version: Version) -> None:
        """Let go of a version that is held."""

    def meant(self, ref: str, sees: Callable[[str], bool]) -> str:
        """A question to append to the error for an unknown name; may be empty."""


class Admission:
    """Resolves names, writes prompts and checks requests for one engine.

    It looks at files, so it blocks for a moment. Unknown names raise `NotFound`, whose `param` is
    `interventions.POSITION.name`; versions that cannot be read raise `Unavailable`. Where memory is
    full, a request waits for its turn: `acquire` says when that has come, without blocking. The
    other methods take what it returned; without it they wait themselves. Its caller lets go of it.
    `eos_ids` are the tokens that end the model's answers.
    """

    def __init__(
        self,
        versions: Versions,
        tokenizer: Encoder,
        grammars: GrammarCompiler,
        info: EngineInfo,
        eos_ids: Collection[int],
    ) -> None:
        self._versions = versions
        self._tokenizer = tokenizer
        self._grammars = grammars
        self._labels = LabelTokens(tokenizer, eos_ids)
        self._info = info

    def compiling(self, grammar: Grammar, caller: Caller = ANYONE) -> Future[Any]:
        """Begin to compile a grammar; when this is done, `prepare` will not wait for it.

        Raises `InvalidRequest` if it is too long, `Overloaded` if many of the caller's wait
        already; what else is wrong with it, `prepare` says.
        """
        return self._grammars.compiling(grammar, caller.tenant)

    def acquire(self, uses: Sequence[Use], caller: Caller = ANYONE) -> Holding:
        """Begin to hold the versions of `uses`, in order; the caller releases them.

        Raises the errors that the class names, and what `Registry.acquire` raises.
        """
        refs = self._seen(uses, caller)
        with self._naming(refs, caller):
            return self._versions.acquire(refs)

    def encode(
        self,
        prompt: Prompt,
        uses: Sequence[Use] = (),
        *,
        options: ChatOptions | None = None,
        add_special_tokens: bool | None = None,
        caller: Caller = ANYONE,
    ) -> Sequence[int]:
        """Token ids of a prompt, written as the files of `uses` ask for; needs no tensors."""
        refs = self._seen(uses, caller)
        with self._naming(refs, caller):
            versions = [
                self._versions.resolve(ref) if isinstance(ref, str) else ref for ref in refs
            ]
        return self._tokens(_form(versions, uses), prompt, options, add_special_tokens)

    def prepare(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingParams,
        uses: Sequence[Use] = (),
        *,
        options: ChatOptions | None = None,
        request_id: str | None = None,
        caller: Caller = ANYONE,
        priority: int = 0,
        trace: Tracing = False,
        thinks: bool = False,
        holding: Holding | None = None,
    ) -> list[Prepared]:
        """Make one request for each prompt; all are checked before the first is made.

        `uses` apply to all of them, in order. The bounds on log-probabilities and traces count all
        prompts together. `options` say how chats are written. `request_id` is the caller's own id;
        with several prompts each has it with a hyphen and the prompt's position. `caller` is who
        asks; of its waiting requests those of the lowest `priority` come first. `thinks` tells what
        the model thinks from its answer to a chat: a grammar is that of the answer. Raises
        `InvalidRequest` and the errors that the class names; then nothing is held.
        """
        self._check_sampling(sampling)
        if trace not in (False, True, "along"):
            raise InvalidRequest(
                f"trace: give True, False or 'along', not {repr(trace)[:40]}.", param="trace"
            )
        asked = sampling.grammar
        grammar = None if asked is None else self._grammars.start(asked, caller.tenant)
        with self._held(uses, caller, holding) as versions:
            form = _form(versions, uses)
            encoded = []
            for prompt in prompts:  # of prompts that are too long none but the first is read
                tokens = self._tokens(form, prompt, options)
                self._check_prompt(prompt, tokens)
                limit = self._info.max_model_len
                check_length(len(tokens), sampling.max_tokens, limit, _field(prompt))
                encoded.append(tokens)
            applied = tuple(map(_applied, range(len(uses)), versions, uses))
            edited = traced(applied, trace) if trace else []
            lengths = [len(tokens) for tokens in encoded]
            limits = bounded(
                lengths,
                self._info.max_model_len,
                sampling,
                edited,
                most=caller.max_tokens,
                trace=bool(trace),
            )
            begun = _begun(encoded, applied, caller, priority, request_id)
            thoughts = [
                thinking(self._tokenizer, form, prompt, options, tokens)
                if thinks and _is_chat(prompt)
                else None
                for prompt, tokens in zip(prompts, encoded, strict=True)
            ]
            requests = [
                request(
                    sampling=marked(settings, thought),
                    seed=random.getrandbits(63) if sampling.seed is None else sampling.seed,
                    trace=trace,
                    grammar=behind(thought, grammar),
                )
                for request, settings, thought in zip(begun, limits, thoughts, strict=True)
            ]
            prepared = self._holding_all(requests, versions, form)
            return [
                replace(one, thinking=thought)
                for one, thought in zip(prepared, thoughts, strict=True)
            ]

    def prepare_labels(
        self,
        prompts: Sequence[Prompt],
        labels: Sequence[str] | None,
        uses: Sequence[Use] = (),
        *,
        options: ChatOptions | None = None,
        request_id: str | None = None,
        caller: Caller = ANYONE,
        priority: int = 0,
        holding: Holding | None = None,
    ) -> list[Prepared]:
        """Make one request for each prompt that is to be classified, as `prepare` does.

        `labels` None means those that stand in the files of `uses`.
        """
        with self._held(uses, caller, holding) as versions:
            form, names = _form(versions, uses), labels_of(labels, versions)
            encoded = [self._tokens(form, prompt, options) for prompt in prompts]
            trees = []
            for prompt, tokens in zip(prompts, encoded, strict=True):
                self._check_prompt(prompt, tokens)
                chat = _is_chat(prompt) or (isinstance(prompt, str) and form.texts)
                trees.append(self._labels.tree(names, tokens, form.completion_prefix, chat=chat))
            field = _field(prompts[0]) if prompts else "prompt"
            check_labels([*map(len, encoded)], trees, self._info.max_model_len, field)
            applied = tuple(map(_applied, range(len(uses)), versions, uses))
            begun = _begun(encoded, applied, caller, priority, request_id)
            requests = [
                request(sampling=_NO_TOKENS, seed=0, labels=tree)
                for request, tree in zip(begun, trees, strict=True)
            ]
            return self._holding_all(requests, versions, form, names)

    def _seen(self, uses: Sequence[Use], caller: Caller) -> list[str | Version]:
        """What `uses` name, if these are not too many and the caller sees them all."""
        if len(uses) > MAX_INTERVENTIONS:
            raise InvalidRequest(
                f"interventions: at most {MAX_INTERVENTIONS} in one request.",
                param="interventions",
            )
        refs = [use.intervention for use in uses]
        for position, ref in enumerate(refs):
            if isinstance(ref, str) and not caller.sees(ref.partition("@")[0]):
                raise self._unknown(position, ref, caller)
        return refs

    @contextmanager
    def _held(
        self, uses: Sequence[Use], caller: Caller, holding: Holding | None
    ) -> Iterator[Sequence[Version]]:
        """Yield the versions that are used, in order, with their tensors in memory.

        Those that nobody has acquired yet are held for the length of the block.
        """
        own = self.acquire(uses, caller) if holding is None else holding
        try:
            with self._naming([use.intervention for use in uses], caller):
                own.ready.result()
            yield own.versions
        finally:
            if holding is None:
                own.release()

    @contextmanager
    def _naming(self, refs: Sequence[str | Version], caller: Caller) -> Iterator[None]:
        """If the block does not find one of the names, say which, and what may be meant."""
        try:
            yield
        except NotFound:
            for position, ref in enumerate(refs):
                if isinstance(ref, str):
                    try:
                        self._versions.resolve(ref)
                    except NotFound:
                        raise self._unknown(position, ref, caller) from None
            raise

    def _unknown(self, position: int, ref: str, caller: Caller) -> NotFound:
        return NotFound(
            f"The intervention `{ref}` does not exist.{self._versions.meant(ref, caller.sees)}",
            param=f"interventions.{position}.name",
        )

    def _holding_all(
        self,
        requests: Sequence[Request],
        versions: Sequence[Version],
        form: PromptForm,
        labels: tuple[str, ...] = (),
    ) -> list[Prepared]:
        names = tuple(f"{version.name}@{version.digest}" for version in versions)
        prepared = []
        with ExitStack() as undo:
            for request in requests:
                release = self._hold(versions)
                undo.callback(release)
                prepared.append(Prepared(request, names, form, release, labels))
            undo.pop_all()
        return prepared

    def _hold(self, versions: Sequence[Version]) -> Callable[[], None]:
        """Hold versions once more; returns what lets go of them, once."""
        with ExitStack() as held:
            for version in versions:
                self._versions.hold(version)
                held.callback(self._versions.release, version)
            return held.pop_all().close

    def _tokens(
        self,
        form: PromptForm,
        prompt: Prompt,
        options: ChatOptions | None,
        add_special_tokens: bool | None = None,
    ) -> Sequence[int]:
        if isinstance(prompt, str):
            return form.text(self._tokenizer, prompt, add_special_tokens=add_special_tokens)
        if not isinstance(prompt, Sequence) or isinstance(prompt, bytes):
            raise InvalidRequest(
                "prompt: give text, a list of token ids, or a list of messages, not "
                f"{type(prompt).__name__}.",
                param="prompt",
            )
        if _is_chat(prompt):
            if not all(_is_message(turn) for turn in prompt):
                raise InvalidRequest(
                    "messages: each needs a role and its content, both text, such as "
                    '{"role": "user", "content": "Hi"}.',
                    param="messages",
                )
            return form.chat(
                self._tokenizer, prompt, options, add_special_tokens=add_special_tokens
            )
        if any(type(token) is not int for token in prompt):
            raise InvalidRequest("prompt: token ids are whole numbers (int).", param="prompt")
        return cast("Sequence[int]", prompt)

    def _check_sampling(self, sampling: SamplingParams) -> None:
        if not isinstance(sampling, SamplingParams):
            raise InvalidRequest(
                f"sampling: give SamplingParams(...), not {type(sampling).__name__}.",
                param="sampling",
            )
        self._check_ids("stop_token_ids", sampling.stop_token_ids)
        self._check_ids("logit_bias", sampling.logit_bias)

    def _check_prompt(self, prompt: Prompt, tokens: Sequence[int]) -> None:
        if not tokens:
            raise InvalidRequest("prompt: it has no tokens; give at least one.", param="prompt")
        self._check_ids("prompt", tokens)

    def _check_ids(self, name: str, ids: Iterable[int]) -> None:
        vocabulary = self._info.vocab_size
        if any(not 0 <= token < vocabulary for token in ids):
            raise InvalidRequest(
                f"{name}: token ids must be from 0 to {vocabulary - 1}.", param=name
            )


def _form(versions: Sequence[Version], uses: Sequence[Use]) -> PromptForm:
    return PromptForm.of(
        [(version, use.strength) for version, use in zip(versions, uses, strict=True)]
    )


def _begun(
    prompts: Sequence[Sequence[int]],
    applied: tuple[AppliedIntervention, ...],
    caller: Caller,
    priority: int,
    request_id: str | None,
) -> Iterator[partial[Request]]:
    """For each prompt, its request but for what is to be made of it. Raises `InvalidRequest`."""
    if not isinstance(priority, Integral):
        raise InvalidRequest(
            f"priority must be a whole number, not {repr(priority)[:40]}.", param="priority"
        )
    for position, tokens in enumerate(prompts):
        yield partial(
            Request,
            id=uuid.uuid4().hex,
            prompt=tuple(tokens),
            interventions=applied,
            salt=caller.salt,
            tenant=caller.tenant,
            weight=caller.weight,
            priority=priority,
            given_id=_numbered(request_id, position, len(prompts)),
        )


def _numbered(request_id: str | None, position: int, prompts: int) -> str | None:
    return request_id if request_id is None or prompts == 1 else f"{request_id}-{position}"


def _applied(position: int, version: Version, use: Use) -> AppliedIntervention:
    edits = version.edits()
    if use.subspace is not None:
        try:
            edits = tuple(edit.subset(use.subspace) for edit in edits)
        except InvalidRequest as error:
            error.param = f"interventions.{position}.subspace"
            raise
    return AppliedIntervention(version.digest, edits, use.strength, use.subspace)


def _field(prompt: Prompt) -> str:
    return "messages" if _is_chat(prompt) else "prompt"


def _is_chat(prompt: Prompt) -> TypeGuard[Sequence[Message]]:
    return bool(prompt) and isinstance(prompt[0], Mapping)


def _is_message(turn: object) -> bool:
    """Whether a turn has a role and a content; a turn that calls tools needs no content."""
    if not isinstance(turn, Mapping) or not isinstance(turn.get("role"), str):
        return False
    content = turn.get("content")
    return isinstance(content, str) or (content is None and bool(turn.get("tool_calls")))
