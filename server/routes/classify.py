"""POST /v1/classify: which label answers a prompt, and how likely each is."""

from __future__ import annotations

import asyncio
from typing import Annotated

from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response
from starlette.types import Receive, Scope, Send

from reft_runtime.outputs import Classification
from server.answers import AT_ONCE_TOKENS, EngineAnswer
from server.body import json_body
from server.context import Current
from server.generation import Job, Run, opened
from server.openapi import OF_GENERATION, answers, refuses, takes
from server.preparation import prepare_labels
from server.schemas.answers.completions import Classifications, ClassifiedPrompt
from server.schemas.classify import ClassifyRequest
from server.streaming import json_bytes

router = APIRouter(tags=["text"])

EXAMPLE = {"model": "sentiment", "input": "Review: a warm and funny film.\nSentiment:"}


class ClassifyAnswer(EngineAnswer):
    """The response of the route: an object with an entry for each prompt."""

    async def _respond(self, job: Job, scope: Scope, receive: Receive, send: Send) -> None:
        async with opened(self._context, job) as run:
            scope["state"]["run"] = run
            await run.collect()
        size = sum(len(one.labels) for one in job.prepared)
        large = size > AT_ONCE_TOKENS
        content = await asyncio.to_thread(_written, run) if large else _written(run)
        whole = Response(content, headers=run.headers(), media_type="application/json")
        await whole(scope, receive, send)


def _written(run: Run) -> bytes:
    labels = run.job.prepared[0].labels
    found = [
        Classification(labels, stream.label_logprobs, [*one.request.prompt])
        for one, stream in zip(run.job.prepared, run.streams, strict=True)
    ]
    data: list[ClassifiedPrompt] = [
        {"index": index, "label": one.label, "probs": one.probs, "num_classes": len(labels)}
        for index, one in enumerate(found)
    ]
    answer: Classifications = {
        "id": run.job.id,
        "object": "list",
        "created": run.created,
        "model": run.job.label,
        "labels": labels,
        "data": data,
        "usage": run.usage(),
    }
    return json_bytes(answer)


@router.post(
    "/v1/classify",
    summary="Choose a label",
    openapi_extra=takes(ClassifyRequest, EXAMPLE),
    responses=answers(Classifications, headers=OF_GENERATION) | refuses(429, 504),
)
async def classify(
    request: Request,
    context: Current,
    body: Annotated[ClassifyRequest, Depends(json_body(ClassifyRequest))],
) -> ClassifyAnswer:
    """Say which label answers each prompt, and how likely each label is; nothing is generated."""
    return ClassifyAnswer(context, lambda: prepare_labels(context, body), request.state.request_id)
