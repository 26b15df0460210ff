"""Turns what callers ask into checked engine requests: names to held versions, prompts to tokens.

Nothing is queued before a request is known to be sound. Nothing else in the project has the names
of a request resolved, its prompts written, or its length compared with the model's.
"""

from __future__ import annotations

import random
import uuid
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from functools import partial
from itertools import zip_longest
from numbers import Integral
from typing import TYPE_CHECKING, Any

from reft_runtime.caller import ANYONE, Caller
from reft_runtime.errors import InvalidRequest
from reft_runtime.front.bounds import bounded, check_labels, check_length, traced
from reft_runtime.front.labels import LabelTokens, labels_of
from reft_runtime.front.prepared import Prepared
from reft_runtime.front.prompt_form import Encoder, PromptForm
from reft_runtime.front.prompts import Prompt, PromptWriter, field_of, is_chat
from reft_runtime.front.resolver import Resolver, Versions, applied
from reft_runtime.front.thoughts import behind, marked, thinking
from reft_runtime.grammar import GrammarCompiler
from reft_runtime.outputs import Tracing
from reft_runtime.sampling import Grammar, SamplingParams
from reft_runtime.schedule.request import AppliedIntervention, Request
from reft_runtime.stats import EngineInfo
from reft_runtime.use import Use

if TYPE_CHECKING:
    from reft_runtime.interventions import Version
    from reft_runtime.interventions.registry.holding import Holding
    from reft_runtime.reasoning import Thinking
    from reft_runtime.text import ChatOptions

_NO_TOKENS = SamplingParams(temperature=0, max_tokens=0)


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
        self._resolver = Resolver(versions)
        self._prompts = PromptWriter(tokenizer, info.vocab_size)
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
        return self._resolver.acquire(uses, caller)

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
        form = _form(self._resolver.resolved(uses, caller), uses)
        return self._prompts.written(form, prompt, options, add_special_tokens=add_special_tokens)

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
        _check_priority(priority)
        if trace not in (False, True, "along"):
            raise InvalidRequest(
                f"trace: give True, False or 'along', not {repr(trace)[:40]}.", param="trace"
            )
        asked = sampling.grammar
        grammar = None if asked is None else self._grammars.start(asked, caller.tenant)
        with self._resolver.held(uses, caller, holding) as versions:
            form = _form(versions, uses)
            encoded = []
            for prompt in prompts:  # of prompts that are too long none but the first is read
                tokens = self._prompts.checked(form, prompt, options)
                limit = self._info.max_model_len
                check_length(len(tokens), sampling.max_tokens, limit, field_of(prompt))
                encoded.append(tokens)
            interventions = applied(versions, uses)
            edited = traced(interventions, trace) if trace else []
            limits = bounded(
                [*map(len, encoded)],
                self._info.max_model_len,
                sampling,
                edited,
                most=caller.max_tokens,
                trace=bool(trace),
            )
            begun = _begun(encoded, interventions, caller, priority, request_id)
            thoughts = [
                thinking(self._tokenizer, form, prompt, options, tokens)
                if thinks and is_chat(prompt)
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
            return self._prepared(requests, versions, form, thoughts=thoughts)

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
        _check_priority(priority)
        with self._resolver.held(uses, caller, holding) as versions:
            form, names = _form(versions, uses), labels_of(labels, versions)
            encoded = [self._prompts.checked(form, prompt, options) for prompt in prompts]
            trees = []
            for prompt, tokens in zip(prompts, encoded, strict=True):
                chat = is_chat(prompt) or (isinstance(prompt, str) and form.texts)
                trees.append(self._labels.tree(names, tokens, form.completion_prefix, chat=chat))
            field = field_of(prompts[0]) if prompts else "prompt"
            check_labels([*map(len, encoded)], trees, self._info.max_model_len, field)
            interventions = applied(versions, uses)
            begun = _begun(encoded, interventions, caller, priority, request_id)
            requests = [
                request(sampling=_NO_TOKENS, seed=0, labels=tree)
                for request, tree in zip(begun, trees, strict=True)
            ]
            return self._prepared(requests, versions, form, names)

    def _prepared(
        self,
        requests: Sequence[Request],
        versions: Sequence[Version],
        form: PromptForm,
        labels: tuple[str, ...] = (),
        thoughts: Sequence[Thinking | None] = (),
    ) -> list[Prepared]:
        """Let each request hold the versions for itself."""
        names = tuple(f"{version.name}@{version.digest}" for version in versions)
        prepared = []
        with ExitStack() as undo:
            for request, thought in zip_longest(requests, thoughts):
                release = self._resolver.hold(versions)
                undo.callback(release)
                prepared.append(Prepared(request, names, form, release, labels, thought))
            undo.pop_all()
        return prepared

    def _check_sampling(self, sampling: SamplingParams) -> None:
        if not isinstance(sampling, SamplingParams):
            raise InvalidRequest(
                f"sampling: give SamplingParams(...), not {type(sampling).__name__}.",
                param="sampling",
            )
        self._prompts.check_ids("stop_token_ids", sampling.stop_token_ids)
        self._prompts.check_ids("logit_bias", sampling.logit_bias)


def _check_priority(priority: object) -> None:
    if not isinstance(priority, Integral):
        raise InvalidRequest(
            f"priority must be a whole number, not {repr(priority)[:40]}.", param="priority"
        )


def _form(versions: Sequence[Version], uses: Sequence[Use]) -> PromptForm:
    return PromptForm.of(
        [(version, use.strength) for version, use in zip(versions, uses, strict=True)]
    )


def _begun(
    prompts: Sequence[Sequence[int]],
    interventions: tuple[AppliedIntervention, ...],
    caller: Caller,
    priority: int,
    request_id: str | None,
) -> Iterator[partial[Request]]:
    """For each prompt, its request but for what is to be made of it."""
    for position, tokens in enumerate(prompts):
        yield partial(
            Request,
            id=uuid.uuid4().hex,
            prompt=tuple(tokens),
            interventions=interventions,
            salt=caller.salt,
            tenant=caller.tenant,
            weight=caller.weight,
            priority=priority,
            given_id=_numbered(request_id, position, len(prompts)),
        )


def _numbered(request_id: str | None, position: int, prompts: int) -> str | None:
    return request_id if request_id is None or prompts == 1 else f"{request_id}-{position}"
