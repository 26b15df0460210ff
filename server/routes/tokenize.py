"""POST /tokenize and /detokenize."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter, Depends

from reft_runtime.errors import InvalidRequest
from server.body import json_body
from server.context import Server
from server.openapi import takes
from server.schemas.text import DetokenizeRequest, TokenizeRequest
from server.selection import select

router = APIRouter(tags=["text"])


@router.post("/tokenize", openapi_extra=takes(TokenizeRequest))
async def tokenize(
    server: Server, body: Annotated[TokenizeRequest, Depends(json_body(TokenizeRequest))]
) -> dict[str, Any]:
    """Token ids of a prompt, or of a conversation under the model's chat template."""
    engine = server.engine

    def work() -> list[int]:
        selection = select(engine, body.model or engine.info.model)
        if body.messages is None:
            return engine.tokenizer.encode(body.prompt or "")
        messages = [message.as_text() for message in body.messages]
        return engine.tokenizer.encode_chat(messages, selection.template)

    tokens = await asyncio.to_thread(work)
    return {
        "tokens": tokens,
        "count": len(tokens),
        "max_model_len": engine.info.max_model_len,
    }


@router.post("/detokenize", openapi_extra=takes(DetokenizeRequest))
async def detokenize(
    server: Server, body: Annotated[DetokenizeRequest, Depends(json_body(DetokenizeRequest))]
) -> dict[str, str]:
    """Text of token ids."""
    engine = server.engine
    size = engine.info.vocab_size
    if any(token >= size for token in body.tokens):
        raise InvalidRequest(f"tokens: ids must be below {size}.", param="tokens")

    def work() -> str:
        select(engine, body.model or engine.info.model)
        return engine.tokenizer.decode(body.tokens)

    return {"prompt": await asyncio.to_thread(work)}
