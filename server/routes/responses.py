"""POST /v1/responses: answer a text or a conversation, in OpenAI's newer form."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Request

from server.answers import Answer
from server.body import body_as
from server.context import Current
from server.errors import ApiError
from server.generation import Job
from server.openapi import OF_GENERATION, answers, refuses, takes
from server.response_events import ResponseWriter
from server.routes.chat import ChatWriter, plan_chat, prepare_chat
from server.schemas.answers.response_events import RESPONSE_EVENTS
from server.schemas.answers.responses import ResponseObject
from server.schemas.responses import ResponsesRequest
from server.translation import Translation, translated

router = APIRouter(tags=["openai"])

EXAMPLE = {"model": "pirate", "input": "Who are you?", "max_output_tokens": 32}


@router.post(
    "/v1/responses",
    summary="Answer in OpenAI's newer form",
    openapi_extra=takes(ResponsesRequest, EXAMPLE),
    responses=answers(ResponseObject, events=RESPONSE_EVENTS, headers=OF_GENERATION)
    | refuses(429, 504),
)
async def create_response(
    request: Request,
    context: Current,
    asked: Annotated[Translation, Depends(body_as(translated))],
) -> Answer:
    """Answer a text or a conversation, whole or, with `stream`, in events. Nothing is stored.

    An event's name is the `type` of its data.
    """
    chat = asked.chat
    with asked.errors():
        plan = await plan_chat(context, chat)

    async def prepare() -> Job:
        with asked.errors():
            return await prepare_chat(context, chat, plan, prefix=ResponseWriter.prefix)

    writer = ResponseWriter(asked, ChatWriter(chat, plan))
    return Answer(context, chat, writer, prepare, request.state.request_id)


@router.get(
    "/v1/responses/{response_id}",
    status_code=404,
    summary="Look for a stored answer",
    responses=refuses(404),
)
@router.delete(
    "/v1/responses/{response_id}",
    status_code=404,
    summary="Look for a stored answer, to delete it",
    operation_id="delete_response",
    responses=refuses(404),
)
async def find_response(response_id: str) -> None:
    """Say that there is none: answers are not stored."""
    raise ApiError(
        404,
        f"There is no response {response_id}: this server stores none. Keep the answers that you"
        " need, and send them back in input.",
        param="response_id",
        code="not_found",
    )
