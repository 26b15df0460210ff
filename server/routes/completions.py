"""POST /v1/completions: a raw prompt, continued."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request

from reft_runtime.outputs import Choice, ChoiceDelta, TokenLogprob
from server.answers import Answer, Shape
from server.body import json_body
from server.context import Server
from server.generation import Run, prepare
from server.logprobs import completion_logprobs
from server.openapi import takes
from server.schemas.completions import CompletionRequest

router = APIRouter(tags=["openai"])


class CompletionShape(Shape):
    """Choices as `text`, with the prompt before it where `echo` asks for it."""

    prefix = "cmpl"
    object = chunk_object = "text_completion"

    def __init__(self, body: CompletionRequest) -> None:
        self._body = body
        self._offsets: dict[int, int] = {}

    def choice(self, run: Run, choice: Choice) -> dict[str, Any]:
        """A finished choice."""
        return self._written(
            run, choice.index, choice.text, choice.tokens, choice.logprobs, choice.finish_reason
        )

    def chunks(self, run: Run, index: int, delta: ChoiceDelta) -> list[dict[str, Any]]:
        """One chunk, or none while there is nothing to show."""
        shown = delta.text or delta.logprobs or delta.finish_reason
        if not shown and (index in self._offsets or not self._body.echo):
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
        finish_reason: str | None,
    ) -> dict[str, Any]:
        """`text` as a choice; the first of an index has the echoed prompt before it."""
        tokenizer = run.context.engine.tokenizer
        entries: list[TokenLogprob | None] = list(logprobs)
        if self._body.echo and index not in self._offsets:
            prompt = run.prompt(index)
            text = self._prompt_text(run, index) + text
            tokens = [*prompt, *tokens]
            entries = [*run.prompt_logprobs(index), *entries]
        offset = self._offsets.setdefault(index, 0)
        written = None
        if self._body.logprobs is not None:
            written = completion_logprobs(tokenizer, tokens, entries, offset)
            self._offsets[index] += sum(len(token) for token in written["tokens"])
        return {
            "index": index,
            "text": text,
            "logprobs": written,
            "finish_reason": finish_reason,
        }

    def _prompt_text(self, run: Run, index: int) -> str:
        prompt = self._body.prompts[index // self._body.n]
        return prompt if isinstance(prompt, str) else run.context.engine.tokenizer.decode(prompt)


@router.post("/v1/completions", openapi_extra=takes(CompletionRequest))
async def create_completion(
    request: Request,
    server: Server,
    body: Annotated[CompletionRequest, Depends(json_body(CompletionRequest))],
) -> Answer:
    """Continue one prompt or several, each `n` times."""
    sampling = body.sampling()
    return Answer(
        server,
        body,
        CompletionShape(body),
        lambda: prepare(
            server,
            body,
            sampling,
            lambda tokenizer, _: [
                tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
                for prompt in body.prompts
            ],
            prompt="prompt",
        ),
        request.state.request_id,
    )
