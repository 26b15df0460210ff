"""POST /v1/chat/completions: answer a conversation."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request

from reft_runtime.outputs import Choice, ChoiceDelta, TokenLogprob
from server.answers import Answer
from server.body import json_body
from server.choices import ChoiceWriter
from server.context import Context, Current
from server.generation import Job, Run
from server.logprobs import chat_logprobs, prompt_logprobs
from server.openapi import OF_GENERATION, answers, refuses, takes
from server.preparation import prepare
from server.schemas.answers.base import Error
from server.schemas.answers.chat import (
    ChatChoice,
    ChatChunkChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatEnd,
    ChatLogprobs,
    ChatMessage,
    ChatToolCall,
)
from server.schemas.chat import ChatRequest
from server.thoughts import Reader, reader_of
from server.tools import ToolPlan, ToolReader, whole

router = APIRouter(tags=["openai"])

EXAMPLE = {
    "model": "pirate",
    "messages": [{"role": "user", "content": "Who are you?"}],
    "temperature": 0,
    "max_tokens": 32,
}


class ChatWriter(ChoiceWriter):
    """Writes choices as messages of the assistant."""

    prefix = "chatcmpl-"
    object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def __init__(self, body: ChatRequest, plan: ToolPlan | None) -> None:
        super().__init__(body)
        self._body = body
        self._plan = plan
        self._begun: set[int] = set()
        self._thoughts: dict[int, Reader] = {}
        self._readers: dict[int, ToolReader] = {}

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

    def choice(self, run: Run, choice: Choice) -> ChatChoice:
        """Write a finished choice as a message."""
        text, thought = choice.text, ""
        if run.job.thinking is not None:
            thought, text = _read(reader_of(run.job.thinking), run, choice)
        content: str | None = text
        reason: ChatEnd | None = choice.finish_reason
        calls: list[ChatToolCall] = []
        if self._plan is not None:
            reader = self._plan.reader()
            content, calls = whole(reader, text)
            reason = reader.finish_reason(reason)
        assert reason is not None  # the choice is whole
        message: ChatMessage = {"role": "assistant", "content": content, "refusal": None}
        if thought:
            message |= {"content": content or None, "reasoning_content": thought}
        if calls:
            message["tool_calls"] = calls
        written: ChatChoice = {
            "index": choice.index,
            "message": message,
            "logprobs": self._logprobs(run, choice.logprobs),
            "finish_reason": reason,
        }
        if self._body.return_token_ids:
            written["token_ids"] = choice.tokens
        return written

    def chunks(self, run: Run, index: int, delta: ChoiceDelta) -> list[ChatChunkChoice]:
        """Write chunks with the new text and calls; a choice's first one has the role."""
        chunks = []
        if index not in self._begun:
            self._begun.add(index)
            said = "" if self._plan is None else None
            chunks.append(_chunk(index, {"role": "assistant", "content": said}, None, None))
        *gained, last = self._gained(run, index, delta)
        chunks += [_chunk(index, one, None, None) for one in gained]
        ids = list(delta.tokens) if self._body.return_token_ids else []
        scored = self._body.logprobs and delta.logprobs
        if last or scored or delta.finish_reason or ids:
            reason: ChatEnd | None = delta.finish_reason
            if index in self._readers:
                reason = self._readers[index].finish_reason(reason)
            logprobs = self._logprobs(run, list(delta.logprobs))
            chunk = _chunk(index, last, logprobs, reason)
            if self._body.return_token_ids:
                chunk["token_ids"] = ids
            chunks.append(chunk)
        return chunks

    def _gained(self, run: Run, index: int, delta: ChoiceDelta) -> list[dict[str, Any]]:
        """Deltas of a choice, at least one; the last is empty if nothing, or a call, came last."""
        text, gained = delta.text, list[dict[str, Any]]()
        if run.job.thinking is not None:
            if index not in self._thoughts:
                self._thoughts[index] = reader_of(run.job.thinking)
            thought, text = _read(self._thoughts[index], run, delta)
            gained += [{"reasoning_content": thought}] if thought else []
        if self._plan is None:
            gained += [{"content": text}] if text else []
        else:
            if index not in self._readers:
                self._readers[index] = self._plan.reader()
            reader = self._readers[index]
            gained += reader.push(text)
            if delta.finish_reason:
                gained += reader.finish()
        if not gained or (delta.finish_reason and "tool_calls" in gained[-1]):
            gained.append({})
        return gained

    def _logprobs(self, run: Run, logprobs: list[TokenLogprob]) -> ChatLogprobs | None:
        if not self._body.logprobs:
            return None
        return chat_logprobs(run.context.engine.tokenizer, logprobs)


def _read(reader: Reader, run: Run, gained: Choice | ChoiceDelta) -> tuple[str, str]:
    """What a choice gained: what was thought, and what was answered."""
    thought, text = reader.read(gained.text, ended=gained.finish_reason is not None)
    run.reasoning_tokens += reader.count(gained.tokens)
    return thought, text


def _chunk(
    index: int,
    delta: Any,
    logprobs: ChatLogprobs | None,
    finish_reason: ChatEnd | None,
) -> ChatChunkChoice:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}


async def plan_chat(context: Context, body: ChatRequest) -> ToolPlan | None:
    """What a conversation asks of tools; None if the model is told of none."""
    plan = partial(context.tools.plan, body, body.grammar)
    return await context.work(plan) if body.usable else None


async def prepare_chat(
    context: Context, body: ChatRequest, plan: ToolPlan | None, *, prefix: str
) -> Job:
    """Resolve, tokenise and check a conversation; raises what `prepare` raises."""
    tokenizer, sampling = context.engine.tokenizer, body.sampling()
    if plan is not None:
        sampling = plan.sampling(sampling)
    elif sampling.grammar is not None and not body.continue_final_message:
        framed = replace(sampling.grammar, frame=tokenizer.frame)
        sampling = replace(sampling, grammar=framed)
    switches = tokenizer.switches
    return await prepare(
        context,
        body,
        sampling,
        lambda: [[message.as_turn() for message in body.messages]],
        lambda: context.tools.options(body.options(switches), body.usable),
        prefix=prefix,
        thinks=True,
    )


@router.post(
    "/v1/chat/completions",
    summary="Answer a chat",
    openapi_extra=takes(ChatRequest, EXAMPLE),
    responses=answers(ChatCompletion, events=(ChatCompletionChunk, Error), headers=OF_GENERATION)
    | refuses(429, 504),
)
async def create_chat_completion(
    request: Request,
    context: Current,
    body: Annotated[ChatRequest, Depends(json_body(ChatRequest))],
) -> Answer:
    """Answer a conversation `n` times, whole or, with `stream`, in events as it is generated.

    An event's data is a chunk, or an error that ends the stream; `[DONE]` is the last.
    """
    plan = await plan_chat(context, body)
    return Answer(
        context,
        body,
        ChatWriter(body, plan),
        lambda: prepare_chat(context, body, plan, prefix=ChatWriter.prefix),
        request.state.request_id,
    )
