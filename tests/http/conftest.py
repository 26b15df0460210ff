"""Fixtures of the HTTP tests; `engine` is the one place that says what the server runs on."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from functools import cache
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from server.app import create_app
from server.connections import Limits
from server.lifecycle import HttpServer
from server.settings import Settings
from tests.helpers.serving import client_of, listening
from tests.http.fake_engine import FakeEngine


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def settings() -> Settings:
    return _settings()


_settings = cache(Settings)
"""They are frozen: all tests have the same."""


@pytest.fixture
def app(engine: FakeEngine, settings: Settings) -> FastAPI:
    return create_app(engine, settings)


@pytest.fixture
async def client(app: FastAPI, engine: FakeEngine) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the app in this event loop, without a socket."""
    async with client_of(app) as client:
        yield client
    assert not engine.running
    assert not engine.held


@pytest.fixture
def limits() -> Limits:
    return Limits(100)


@pytest.fixture
def server_url(app: FastAPI, engine: FakeEngine, limits: Limits) -> Iterator[str]:
    """Address of the app on a real socket, served by a thread."""
    with listening(HttpServer(app, limits)) as address:
        yield address
    assert not engine.running
    assert not engine.held


def completion(**fields: Any) -> dict[str, Any]:
    """A body of /v1/completions."""
    return {"model": "tiny", "prompt": "Hi", "max_tokens": 4, **fields}


def chat(**fields: Any) -> dict[str, Any]:
    """A body of /v1/chat/completions."""
    messages = [{"role": "user", "content": "Hi"}]
    return {"model": "tiny", "messages": messages, "max_tokens": 4, **fields}
