"""An ASGI application that is called in this process, and whose answer is taken piece by piece."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from starlette.types import ASGIApp, Message, Scope

from server.cluster.calls import Call, Head

MAX_WAITING = 8
"""Messages of an application that wait to be taken; it goes on when they have been."""

_running: set[asyncio.Task[None]] = set()
"""The applications' tasks: the event loop alone would not keep them alive."""


async def answer(app: ASGIApp, call: Call) -> AsyncIterator[Head | bytes]:
    """Yield the application's answer: its `Head`, then the body's bytes as they come.

    What the application has sent meanwhile comes as one piece. When this iterator is closed or
    cancelled, the application is told that its client has left.
    """
    exchange = _Exchange(call)
    task = asyncio.ensure_future(app(_scope(call), exchange.receive, exchange.send))
    _running.add(task)
    task.add_done_callback(_running.discard)
    task.add_done_callback(exchange.end)
    head: Message | None = None
    try:
        while True:
            messages = await exchange.take()
            if head is None and messages:
                head = messages.pop(0)
                body = b"".join(message.get("body", b"") for message in messages)
                yield Head(head["status"], [*head.get("headers", [])], body)
            elif body := b"".join(message.get("body", b"") for message in messages):
                yield body
            if task.done() and not exchange.waiting:
                task.result()
                return
    finally:
        exchange.leave()


class _Exchange:
    """What passes between an application and who takes its answer."""

    def __init__(self, call: Call) -> None:
        self._parts = list(call.body)
        self._received = False
        self.waiting: list[Message] = []
        self._news, self._room, self._left = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def receive(self) -> Message:
        """The body, part by part; then wait until the client has left (ASGI)."""
        if not self._received:
            part = self._parts.pop(0) if self._parts else b""
            self._received = not self._parts
            body = part if isinstance(part, bytes) else await part
            return {"type": "http.request", "body": body, "more_body": not self._received}
        await self._left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        """Take a message of the answer (ASGI)."""
        self.waiting.append(message)
        self._news.set()
        if len(self.waiting) >= MAX_WAITING and not self._left.is_set():
            self._room.clear()
            await self._room.wait()

    async def take(self) -> list[Message]:
        """Wait for messages, or for the end, which may bring none."""
        await self._news.wait()
        self._news.clear()
        taken, self.waiting = self.waiting, []
        self._room.set()
        return taken

    def end(self, task: asyncio.Task[None]) -> None:
        """Note that the application has ended."""
        self._news.set()

    def leave(self) -> None:
        """Tell the application that nobody waits for its answer."""
        self._left.set()
        self._room.set()


def _scope(call: Call) -> Scope:
    scope: dict[str, Any] = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "http_version": "1.1",
        "method": call.method,
        "scheme": call.scheme,
        "path": call.path,
        "raw_path": call.raw_path,
        "query_string": call.query,
        "root_path": "",
        "headers": call.headers,
        "client": call.client,
        "server": None,
        "state": {},
    }
    return scope
