"""POST /tokenize and /detokenize, GET /tokenizer_info."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Annotated

from fastapi import APIRouter, Depends
from fastapi.responses import Response

from reft_runtime.errors import InvalidRequest
from server.auth import caller_of
from server.body import json_body
from server.context import Current
from server.openapi import answers, takes
from server.schemas.answers.text import Detokenized, TokenizerInfo, Tokens
from server.schemas.text import DetokenizeRequest, TokenizeRequest
from server.selection import find_model, selected
from server.streaming import json_answer

if TYPE_CHECKING:
    from reft_runtime.front.prompts import Prompt

router = APIRouter(tags=["text"])


@router.post(
    "/tokenize",
    summary="Turn a text or a chat into token ids",
    openapi_extra=takes(TokenizeRequest, {"prompt": "Who are you?"}),
    responses=answers(Tokens),
)
async def tokenize(
    context: Current, body: Annotated[TokenizeRequest, Depends(json_body(TokenizeRequest))]
) -> Response:
    """Token ids of a prompt, or of a conversation under the model's chat template."""
    engine = context.engine

    def work() -> Response:
        tokenizer = engine.tokenizer
        options = None
        asked: Prompt = body.prompt or ""
        if body.messages is not None:
            asked = [message.as_turn() for message in body.messages]
            options = context.tools.options(body.options(tokenizer.switches), body.tools)
        with selected(context, body.model or engine.info.model) as uses:
            tokens = engine.admission.encode(
                asked,
                uses,
                options=options,
                add_special_tokens=body.add_special_tokens,
                caller=caller_of(context),
            )
        written: Tokens = {
            "tokens": tokens,
            "count": len(tokens),
            "max_model_len": engine.info.max_model_len,
        }
        if body.return_token_strs:
            written["token_strs"] = tokenizer.token_strings(tokens)
        # In the thread that made it: it may have megabytes.
        return json_answer(written)

    return await context.work(work)


@router.get(
    "/tokenizer_info",
    summary="Get the special tokens and the chat template",
    responses=answers(TokenizerInfo),
)
async def tokenizer_info(context: Current) -> Response:
    """Special tokens and chat template, for clients that lay prompts out themselves."""
    return json_answer(await asyncio.to_thread(context.engine.tokenizer.describe))


@router.post(
    "/detokenize",
    summary="Turn token ids into text",
    openapi_extra=takes(DetokenizeRequest, {"tokens": [14735, 359, 346]}),
    responses=answers(Detokenized),
)
async def detokenize(
    context: Current, body: Annotated[DetokenizeRequest, Depends(json_body(DetokenizeRequest))]
) -> Response:
    """Text of token ids."""
    engine = context.engine

    def work() -> Response:
        size = engine.info.vocab_size
        if any(token >= size for token in body.tokens):
            raise InvalidRequest(f"tokens: ids must be below {size}.", param="tokens")
        find_model(context, body.model or engine.info.model)
        special = body.skip_special_tokens
        text = engine.tokenizer.decode(body.tokens, skip_special_tokens=special)
        written: Detokenized = {"prompt": text}
        return json_answer(written)

    return await context.work(work)
