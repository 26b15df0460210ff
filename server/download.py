"""An intervention's file as an answer, sent in parts as its client takes them."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, BinaryIO

from fastapi.responses import Response
from starlette.types import Receive, Scope, Send

from reft_runtime.errors import Overloaded
from reft_runtime.front.hop import unless_left
from server.context import Context
from server.disconnect import ClientDisconnected, run_unless_disconnected

if TYPE_CHECKING:
    from reft_runtime.interventions import Version

logger = logging.getLogger("reft.server")

PART_BYTES = 256 * 2**10
"""Bytes of a file that are in memory for one client."""


class Download(Response):
    """The file of one intervention, verified before the first byte of the answer is sent.

    Only one part of it is in memory, whatever the file's size; it counts as a body under way.
    """

    media_type = "application/octet-stream"

    def __init__(self, context: Context, ref: str) -> None:
        super().__init__()
        self._context = context
        self._ref = ref

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the answer (ASGI); raises `Overloaded` if too much is being sent already."""
        if self._context.downloads.locked():
            raise Overloaded("Too many files are being sent; try again later.")
        async with self._context.downloads:
            try:
                await run_unless_disconnected(receive, self._send(scope, send))
            except ClientDisconnected:
                logger.debug("The client left while %s was sent", self._ref)

    async def _send(self, scope: Scope, send: Send) -> None:
        version, file = await self._opened()
        with file:
            size = version.size_bytes
            if not self._context.bodies.take(scope, min(size, PART_BYTES)):
                raise Overloaded("Too many large bodies are under way; try again later.")
            self.init_headers(
                {
                    "content-length": str(size),
                    "etag": f'"{version.digest}"',
                    # A name has no character that would need to be escaped.
                    "content-disposition": f'attachment; filename="{version.name}.safetensors"',
                }
            )
            start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
            await send(start)
            await self._send_parts(file, size, send)

    async def _opened(self) -> tuple[Version, BinaryIO]:
        """Open the version's file; the file is closed again if the client leaves meanwhile."""
        opening = self._context.change(self._context.registry.open, self._ref)
        return await unless_left(opening, lambda opened: opened[1].close())

    async def _send_parts(self, file: BinaryIO, size: int, send: Send) -> None:
        left = size
        while left:
            part = await self._context.administer(file.read, min(PART_BYTES, left))
            if not part:
                raise OSError(f"the file of {self._ref} became shorter while it was sent")
            left -= len(part)
            await send({"type": "http.response.body", "body": part, "more_body": left > 0})
