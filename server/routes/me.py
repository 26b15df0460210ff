"""GET /v1/me: who the key's tenant is, what it may do, and which model answers it."""

from __future__ import annotations

from fastapi import APIRouter
from fastapi.responses import Response

from server.context import Current
from server.openapi import answers
from server.schemas.answers.operations import Me
from server.streaming import json_answer

router = APIRouter(tags=["operations"])


@router.get("/v1/me", summary="Say who asks", responses=answers(Me))
async def get_me(context: Current) -> Response:
    """The tenant of the key: what it sees, may change and may use; and the base model.

    `prefix` is what the names that it may change begin with; null means any that it sees.
    `sees_server` says whether it may read `/v1/stats`, `/metrics` and everybody's `/v1/usage`.
    """
    tenant, limits = context.tenant, context.tenant.limits
    admin = tenant.role == "admin"
    me: Me = {
        "object": "tenant",
        "tenant": tenant.name,
        "role": tenant.role,
        "interventions": list(tenant.patterns),
        "upload": admin or tenant.upload,
        "prefix": None if admin else tenant.prefix,
        "sees_server": tenant.sees_server,
        "weight": tenant.weight,
        "requests_per_minute": tenant.requests_per_minute,
        "tokens_per_minute": tenant.tokens_per_minute,
        "concurrent_requests": tenant.concurrent_requests,
        "limits": {"max_tokens": limits.max_tokens, "n": limits.n},
        "model": context.engine.info.model,
    }
    return json_answer(me)
