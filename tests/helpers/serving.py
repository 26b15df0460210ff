"""Apps as clients meet them: behind a socket, or in a test's own event loop."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import httpx
import uvicorn
import uvicorn.server
from fastapi import FastAPI

from tests.helpers.published import check_published


def _look_often(seconds: float) -> Any:
    """What uvicorn sleeps for before it looks again whether it is to end: a tenth of its own."""
    return asyncio.sleep(seconds / 10)


_waits = SimpleNamespace(**{**vars(asyncio), "sleep": _look_often})


@contextmanager
def listening(server: uvicorn.Server) -> Iterator[str]:
    """The address of a server, which a thread runs as long as the block lasts."""
    listener = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    with patch.object(uvicorn.server, "asyncio", _waits):
        thread.start()
        try:
            while not server.started:
                time.sleep(0.01)
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


@asynccontextmanager
async def client_of(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the app in this event loop, without a socket; its answers are as published."""
    hooks: dict[str, list[Callable[..., Any]]] = {"response": [check_published]}
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://test", event_hooks=hooks) as client,
    ):
        yield client


async def ask_chat(http: httpx.AsyncClient, **fields: Any) -> dict[str, Any]:
    """The answer of the base model to a chat that says "Hi", with its token ids."""
    body = {
        "model": (await http.get("/v1/models")).json()["data"][0]["id"],
        "messages": [{"role": "user", "content": "Hi"}],
        "return_token_ids": True,
        **fields,
    }
    response = await http.post("/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer
