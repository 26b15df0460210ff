"""The API key: a dependency of every router but the public one."""

from __future__ import annotations

import hashlib
import hmac

from fastapi import Request

from server.context import Current
from server.errors import ApiError
from server.settings import Settings


async def require_key(request: Request, context: Current) -> None:
    """Answer 401 unless the request carries the configured key, if one is configured.

    Keys are compared as SHA-256 digests in constant time, so the time taken tells neither the
    key's length nor how much of it was right.
    """
    key = context.settings.api_key
    if key is None:
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


def cache_salt(settings: Settings) -> bytes:
    """Salt of the prefix cache's block keys, made from the API key; empty without a key."""
    if settings.api_key is None:
        return b""
    return _digest(b"prefix cache of " + settings.api_key.get_secret_value().encode())


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
