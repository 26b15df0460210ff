"""Apps as clients meet them: behind a socket, or in a test's own event loop."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import httpx
import uvicorn
from fastapi import FastAPI

from tests.helpers.published import check_published


@contextmanager
def listening(server: uvicorn.Server) -> Iterator[str]:
    """The address of a server, which a thread runs as long as the block lasts."""
    listener = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
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
