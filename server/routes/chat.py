"""POST /v1/chat/completions: answer a conversation."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request

from reft_runtime.outputs import Choice, ChoiceDelta, TokenLogprob
from server.answers import Answer, Writer
from server.body import json_body
from server.context import Current
from server.generation import Run, prepare
from server.logprobs import chat_logprobs, prompt_logprobs
from server.openapi import takes
from server.schemas.chat import ChatRequest

router = APIRouter(tags=["openai"])


class ChatWriter(Writer):
    """Writes choices as messages of the assistant."""

    prefix = "chatcmpl"
    object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def __init__(self, body: ChatRequest) -> None:
        self._body = body
        self._begun: set[int] = set()

    @property
    def heavy(self) -> bool:
        """Whether log-probabilities, which are many numbers, are asked for."""
        return self._body.logprobs or self._body.prompt_logprobs is not None

    def whole(self, run: Run) -> dict[str, Any]:
        """vLLM's fields on the prompt, if asked for: token ids and log-probabilities."""
        said: dict[str, Any] = {}
        if self._body.return_token_ids:
            said["prompt_token_ids"] = run.prompt(0)
        count = self._body.prompt_logprobs
        if count is not None:
            tokenizer = run.context.engine.tokenizer
            said["prompt_logprobs"] = prompt_logprobs(tokenizer, run.prompt_logprobs(0), count)
        return said

    def choice(self, run: Run, choice: Choice) -> dict[str, Any]:
        """Write a finished choice as a message."""
        written = {
            "index": choice.index,
            "message": {"role": "assistant", "content": choice.text, "refusal": None},
            "logprobs": self._logprobs(run, choice.logprobs),
            "finish_reason": choice.finish_reason,
        }
        return written | {"token_ids": choice.tokens} if self._body.return_token_ids else written

    def chunks(self, run: Run, index: int, delta: ChoiceDelta) -> list[dict[str, Any]]:
        """Write a chunk with the new text, and before a choice's first one, one with the role."""
        chunks = []
        if index not in self._begun:
            self._begun.add(index)
            chunks.append(_chunk(index, {"role": "assistant", "content": ""}, None, None))
        ids = list(delta.tokens) if self._body.return_token_ids else []
        scored = self._body.logprobs and delta.logprobs
        if delta.text or scored or delta.finish_reason or ids:
            content = {"content": delta.text} if delta.text else {}
            logprobs = self._logprobs(run, list(delta.logprobs))
            chunk = _chunk(index, content, logprobs, delta.finish_reason)
            chunks.append(chunk | {"token_ids": ids} if self._body.return_token_ids else chunk)
        return chunks

    def _logprobs(self, run: Run, logprobs: list[TokenLogprob]) -> dict[str, Any] | None:
        if not self._body.logprobs:
            return None
        return chat_logprobs(run.context.engine.tokenizer, logprobs)


def _chunk(
    index: int,
    delta: dict[str, str],
    logprobs: dict[str, Any] | None,
    finish_reason: str | None,
) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}


@router.post("/v1/chat/completions", openapi_extra=takes(ChatRequest))
async def create_chat_completion(
    request: Request,
    context: Current,
    body: Annotated[ChatRequest, Depends(json_body(ChatRequest))],
) -> Answer:
    """Answer a conversation `n` times."""
    sampling = body.sampling()
    return Answer(
        context,
        body,
        ChatWriter(body),
        lambda: prepare(
            context,
            body,
            sampling,
            lambda: [[message.as_text() for message in body.messages]],
            lambda: body.options(context.engine.tokenizer.switches),
            prefix=ChatWriter.prefix,
        ),
        request.state.request_id,
    )
