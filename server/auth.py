"""The API key: a dependency of every router but the public one."""

from __future__ import annotations

import hashlib
import hmac

from fastapi import Request

from reft_runtime.caller import Caller
from server.context import Context
from server.errors import ApiError
from server.settings import Settings
from server.tenants.tenant import OWNER


async def require_key(request: Request) -> None:
    """Note whose key the request carries; answer 401 unless it is known, if one is configured.

    Keys are compared as SHA-256 digests in constant time, so the time taken tells neither the
    key's length nor how much of it was right.
    """
    context: Context = request.app.state.context
    key = context.settings.api_key
    if key is None:
        request.state.tenant = OWNER
        return
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    # Starlette decodes headers as latin-1; the key's bytes are what the client sent.
    matches = hmac.compare_digest(
        _digest(given.strip().encode("latin-1")), _digest(key.get_secret_value().encode())
    )
    if scheme.lower() != "bearer" or not matches:
        raise ApiError(
            401,
            "A valid API key is needed: send it as 'Authorization: Bearer KEY'.",
            code="invalid_api_key",
            headers={"www-authenticate": "Bearer"},
        )
    request.state.tenant = OWNER


def caller_of(context: Context) -> Caller:
    """The context's tenant, as the engine knows it."""
    tenant = context.tenant
    return Caller(tenant.name, tenant.weight, cache_salt(context.settings), tenant.sees)


def cache_salt(settings: Settings) -> bytes:
    """Salt of the prefix cache's block keys, made from the API key; empty without a key."""
    if settings.api_key is None:
        return b""
    return _digest(b"prefix cache of " + settings.api_key.get_secret_value().encode())


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
