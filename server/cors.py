"""Headers by which a browser shows an answer to pages of other origins (CORS)."""

from __future__ import annotations

from collections.abc import Sequence

from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

EXPOSED = [
    *("retry-after", "x-request-id", "x-intervention", "x-prompt-tokens", "x-queue-time"),
    "x-replicas-behind",
    *(
        f"x-ratelimit-{what}-{of}"
        for what in ("limit", "remaining", "reset")
        for of in ("requests", "tokens")
    ),
]
"""Response headers that a page of another origin may read."""


def with_cors(app: ASGIApp, origins: Sequence[str]) -> ASGIApp:
    """`app` with the headers that pages of `origins` need to read its answers, errors too."""
    if not origins:
        return app
    return CORSMiddleware(
        app,
        allow_origins=origins,
        allow_methods=["*"],
        allow_headers=["*"],
        expose_headers=EXPOSED,
    )
