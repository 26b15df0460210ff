"""POST /v1/completions: continue a raw prompt."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from fastapi import APIRouter, Depends, Request

from reft_runtime.outputs import Choice, ChoiceDelta, FinishReason, TokenLogprob
from server.answers import Answer
from server.body import json_body
from server.choices import ChoiceWriter
from server.context import Current
from server.generation import Run
from server.logprobs import completion_logprobs, prompt_logprobs, prompt_offsets
from server.openapi import OF_GENERATION, answers, refuses, takes
from server.preparation import prepare
from server.schemas.answers.base import Error
from server.schemas.answers.completions import (
    Completion,
    CompletionChoice,
    CompletionChunk,
    CompletionLogprobs,
)
from server.schemas.completions import CompletionRequest

if TYPE_CHECKING:
    from reft_runtime.text import TextOffsets

router = APIRouter(tags=["openai"])

EXAMPLE = {"model": "SmolLM2-135M-Instruct", "prompt": "The sky is", "max_tokens": 16}


class CompletionWriter(ChoiceWriter):
    """Writes choices as `text`, with the prompt before it if `echo` asks for it."""

    prefix = "cmpl-"
    object = chunk_object = "text_completion"

    def __init__(self, body: CompletionRequest) -> None:
        super().__init__(body)
        self._body = body
        self._begun: set[int] = set()
        self._offsets: dict[int, TextOffsets] = {}

    @property
    def heavy(self) -> bool:
        """Whether log-probabilities, which are many numbers, are asked for."""
        return self._body.logprobs is not None or self._body.prompt_logprobs is not None

    def choice(self, run: Run, choice: Choice) -> CompletionChoice:
        """Write a finished choice."""
        written = self._written(
            run, choice.index, choice.text, choice.tokens, choice.logprobs, choice.finish_reason
        )
        count = self._body.prompt_logprobs
        if count is not None:
            scored = run.prompt_logprobs(choice.index)
            tokenizer = run.context.engine.tokenizer
            written["prompt_logprobs"] = prompt_logprobs(tokenizer, scored, count)
        return written

    def chunks(self, run: Run, index: int, delta: ChoiceDelta) -> list[CompletionChoice]:
        """Write one chunk, or none while there is nothing to show."""
        ids = delta.tokens if self._body.return_token_ids else ()
        scored = self._body.logprobs is not None and delta.logprobs
        shown = delta.text or scored or delta.finish_reason or ids
        if not shown and (index in self._begun or not self._body.echo):
            return []
        chunk = self._written(
            run, index, delta.text, list(delta.tokens), list(delta.logprobs), delta.finish_reason
        )
        return [chunk]

    def _written(
        self,
        run: Run,
        index: int,
        text: str,
        tokens: list[int],
        logprobs: list[TokenLogprob],
        finish_reason: FinishReason | None,
    ) -> CompletionChoice:
        """Write `text` as a choice; the first one of an index has the echoed prompt before it."""
        first = index not in self._begun
        self._begun.add(index)
        echoed = self._prompt_text(run, index) if first and self._body.echo else ""
        written: CompletionChoice = {
            "index": index,
            "text": echoed + text,
            "logprobs": None,
            "finish_reason": finish_reason,
        }
        if self._body.logprobs is not None:
            written["logprobs"] = self._logprobs(
                run, index, tokens, logprobs, echoed=echoed, first=first
            )
        if self._body.return_token_ids:
            written["token_ids"] = tokens
            written["prompt_token_ids"] = run.prompt(index) if first else None
        return written

    def _logprobs(
        self,
        run: Run,
        index: int,
        tokens: list[int],
        logprobs: list[TokenLogprob],
        *,
        echoed: str,
        first: bool,
    ) -> CompletionLogprobs:
        from reft_runtime.text import TextOffsets  # loads torch: only when needed

        tokenizer = run.context.engine.tokenizer
        entries: list[TokenLogprob | None] = list(logprobs)
        begins: list[int] = []
        if first:
            skip = self._body.skip_special_tokens
            prefix = run.job.form.completion_prefix
            self._offsets[index] = TextOffsets(
                tokenizer, skip_special_tokens=skip, completion_prefix=prefix
            )
            self._offsets[index].end = len(echoed)
        generated = [self._offsets[index].push(token) for token in tokens]
        if first and self._body.echo:
            prompt = run.prompt(index)
            begins = prompt_offsets(tokenizer, prompt, echoed)
            tokens = [*prompt, *tokens]
            entries = [*run.prompt_logprobs(index), *entries]
        count = self._body.logprobs or 0
        return completion_logprobs(tokenizer, tokens, entries, begins + generated, count)

    def _prompt_text(self, run: Run, index: int) -> str:
        prompt = self._body.prompts[index // self._body.n]
        if isinstance(prompt, str) and not run.job.form.texts:
            return prompt
        return run.context.engine.tokenizer.decode(
            run.prompt(index), skip_special_tokens=self._body.skip_special_tokens
        )


@router.post(
    "/v1/completions",
    summary="Continue a prompt",
    openapi_extra=takes(CompletionRequest, EXAMPLE),
    responses=answers(Completion, events=(CompletionChunk, Error), headers=OF_GENERATION)
    | refuses(429, 504),
)
async def create_completion(
    request: Request,
    context: Current,
    body: Annotated[CompletionRequest, Depends(json_body(CompletionRequest))],
) -> Answer:
    """Continue one prompt or several, each `n` times, whole or, with `stream`, in events.

    An event's data is a chunk, or an error that ends the stream; `[DONE]` is the last.
    """
    sampling = body.sampling()
    return Answer(
        context,
        body,
        CompletionWriter(body),
        lambda: prepare(
            context, body, sampling, lambda: body.prompts, prefix=CompletionWriter.prefix
        ),
        request.state.request_id,
    )
