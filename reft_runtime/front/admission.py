"""Makes engine requests of what callers ask, and refuses, before anything is queued."""

from __future__ import annotations

import random
import uuid
from collections.abc import Mapping, Sequence
from typing import cast

from reft_runtime.errors import InvalidRequest, NotFound
from reft_runtime.front.bounds import bound_scores, bound_trace
from reft_runtime.front.prompt_form import PromptForm
from reft_runtime.interventions import Registry, Version
from reft_runtime.outputs import EngineInfo
from reft_runtime.sampling import SamplingParams
from reft_runtime.schedule.request import AppliedIntervention, Request
from reft_runtime.text import Message, Tokenizer
from reft_runtime.use import MAX_INTERVENTIONS, Use

Prompt = str | Sequence[int] | Sequence[Message]
"""Text (as it is, or a message where a file says so), token ids, or the messages of a chat."""


class Admission:
    """Checks requests completely, and takes hold of the versions that they use."""

    def __init__(self, registry: Registry, tokenizer: Tokenizer, info: EngineInfo) -> None:
        self._registry = registry
        self._tokenizer = tokenizer
        self._info = info

    def tokens(self, prompt: Prompt, uses: Sequence[Use]) -> Sequence[int]:
        """Token ids of a prompt, written in the form that what is used asks for."""
        if isinstance(prompt, str):
            return self._form(uses).text(self._tokenizer, prompt)
        if not isinstance(prompt, Sequence) or isinstance(prompt, bytes):
            raise InvalidRequest(
                "prompt: give text, a list of token ids, or a list of messages, not "
                f"{type(prompt).__name__}.",
                param="prompt",
            )
        if prompt and isinstance(prompt[0], Mapping):
            if not all(_is_message(turn) for turn in prompt):
                raise InvalidRequest(
                    "messages: each needs a role and its content, both text, such as "
                    '{"role": "user", "content": "Hi"}.',
                    param="messages",
                )
            return self._form(uses).chat(self._tokenizer, cast(Sequence[Message], prompt))
        if any(type(token) is not int for token in prompt):
            raise InvalidRequest("prompt: token ids are whole numbers (int).", param="prompt")
        return cast(Sequence[int], prompt)

    def _form(self, uses: Sequence[Use]) -> PromptForm:
        return PromptForm.of([(self._resolve(use), use.strength) for use in uses])

    def _resolve(self, use: Use) -> Version:
        if isinstance(use.intervention, Version):
            return use.intervention
        try:
            return self._registry.ready(use.intervention)
        except NotFound as error:
            meant = self._registry.meant(use.intervention)
            raise NotFound(f"{error.message}{meant}", param=error.param) from None

    def prepare(
        self,
        prompt: Sequence[int],
        sampling: SamplingParams,
        uses: Sequence[Use],
        *,
        request_id: str | None = None,
        salt: bytes = b"",
        trace: bool = False,
    ) -> tuple[Request, list[Version]]:
        """Check a request completely, and take hold of its interventions' versions."""
        given = isinstance(sampling, SamplingParams) and sampling.max_tokens is not None
        sampling = self._checked(prompt, sampling, trace=trace)
        if len(uses) > MAX_INTERVENTIONS:
            raise InvalidRequest(
                f"interventions: at most {MAX_INTERVENTIONS} in one request.",
                param="interventions",
            )
        held: list[Version] = []
        applied = []
        try:
            for position, use in enumerate(uses):
                version = self._resolve(use)
                self._registry.hold(version)
                held.append(version)
                edits = version.edits()
                if use.subspace is not None:
                    try:
                        edits = tuple(edit.subset(use.subspace) for edit in edits)
                    except InvalidRequest as error:
                        error.param = f"interventions.{position}.subspace"
                        raise
                applied.append(
                    AppliedIntervention(version.digest, edits, use.strength, use.subspace)
                )
            rows = 0
            if trace:
                edited = [e.positions for one in applied if one.strength for e in one.edits]
                rows, sampling = bound_trace(edited, len(prompt), sampling, given=given)
        except BaseException:
            self.release(held)
            raise
        request = Request(
            id=request_id or uuid.uuid4().hex,
            prompt=tuple(prompt),
            sampling=sampling,
            seed=random.getrandbits(63) if sampling.seed is None else sampling.seed,
            interventions=tuple(applied),
            salt=salt,
            trace=trace,
            traced_rows=rows,
        )
        return request, held

    def _checked(
        self, prompt: Sequence[int], sampling: SamplingParams, *, trace: bool
    ) -> SamplingParams:
        """Check what depends on the model; `max_tokens` None becomes what is left of its length."""
        if not isinstance(sampling, SamplingParams):
            raise InvalidRequest(
                f"sampling: give SamplingParams(...), not {type(sampling).__name__}.",
                param="sampling",
            )
        vocabulary, limit = self._info.vocab_size, self._info.max_model_len
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
        if sampling.max_tokens is not None and sampling.max_tokens > room:
            raise InvalidRequest(
                f"max_tokens: this model's maximum length is {limit} tokens; {len(prompt)} in the "
                f"prompt leave {room}, not {sampling.max_tokens}.",
                param="max_tokens",
            )
        return bound_scores([len(prompt)], sampling, room, trace=trace)

    def release(self, versions: Sequence[Version]) -> None:
        """Let go of what `prepare` took hold of."""
        for version in versions:
            self._registry.release(version)


def _is_message(turn: object) -> bool:
    return isinstance(turn, Mapping) and all(
        isinstance(turn.get(name), str) for name in ("role", "content")
    )
