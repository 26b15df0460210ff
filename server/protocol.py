"""One connection: uvicorn's HTTP/1.1 protocol, with the deadlines and bounds that it does not have.

uvicorn's own settings bound the pause between two requests, not how long a head, a body or an
answer may take.
"""

from __future__ import annotations

import asyncio
import re
import socket
from typing import Any, cast

from uvicorn._types import ASGI3Application
from uvicorn.protocols.http.httptools_impl import (
    STATUS_LINE,
    HttpToolsProtocol,
    RequestResponseCycle,
)

from server.answers import WRITE_NOW
from server.connections import Connections
from server.errors import ApiError
from server.middleware import MAX_HEADER_BYTES, REFUSED

PROBE_SECONDS = 0.1

MAX_WAITING = 32
"""Most requests of one connection that wait behind another: a packet has room for thousands."""

STALLED_SECONDS = 1.0
"""A body that pauses for this long is not waited for by a server that stops."""

_OFFER = b"\r\nupgrade:"
_UPGRADE = re.compile(rb"\r\nupgrade(?=:)", re.IGNORECASE)

_CHUNKED = b"transfer-encoding: chunked\r\n\r\n"
"""End of the head of an answer in chunks."""

_STOPPING = ApiError(503, "The server is stopping.", code="draining", headers={"retry-after": "5"})

CLOSE_WAIT = 8
"""Linux' TCP state of a connection whose other side has said that it will send no more."""


class Connection(HttpToolsProtocol):
    """One connection of a client.

    `since` is when its present activity began, in seconds on the event loop's clock.
    """

    def __init__(self, connections: Connections, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._all = connections
        self._limits = connections.limits
        self.since = self.loop.time()
        self._head_bytes = 0
        """Bytes received of a request's incomplete head; 0 if no head is being received."""
        self._header_bytes = 0
        self._body_bytes = 0
        self._held = b""
        """Last bytes received of a head, held back: an `Upgrade` header may begin in them."""
        self._pieces: list[bytes] = []
        """Pieces of the body, joined once all received data is parsed: chunks may be very small."""
        self._last_byte = 0.0
        self._keep_alive = True
        self._stopping = False
        self._answered: RequestResponseCycle | None = None
        """The request that is, or was last, being answered; others may wait behind it."""
        self._write_paused_at: float | None = None
        self._half_closed = False
        self._discarding = False
        self._cut = False

    @property
    def idle(self) -> bool:
        """Whether no request is under way; one whose head is incomplete does not count yet."""
        return self._answered is None or self._answered.response_complete

    def cut(self, reason: str) -> None:
        """End the connection now, and count the reason in the metrics."""
        self._cut = True
        self._all.metrics.cut(reason)
        self.transport.abort()

    def look(self, now: float) -> None:
        """Cut the connection off if its client has taken too long."""
        limits, paused = self._limits, self._write_paused_at
        if paused is not None and now - paused > limits.reader:
            self.cut("reader")
        elif self._discarding or self.transport.is_closing():
            if now - self.since > max(limits.linger, limits.reader * self.transport.is_closing()):
                self.transport.abort()
        elif self.idle:
            if self._head_bytes and now - self.since > limits.head:
                self._refuse(ApiError(408, "The request's head took too long."), "head")
            elif not self._head_bytes and now - self.since > limits.idle:
                self.transport.close()
        elif self.cycle.more_body and not self.flow.read_paused:
            if self._stopping and now - self._last_byte > STALLED_SECONDS:
                self._refuse(_STOPPING, "shutdown")
                self.transport.close()
                return
            late = now - self.since - limits.body
            if now - self._last_byte > limits.body or late * limits.body_rate > self._body_bytes:
                self._refuse(ApiError(408, "The request's body came too slowly."), "body")

    # What uvicorn and the event loop call

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin the connection, or answer 503 if there is no room for it."""
        super().connection_made(transport)
        if not self._all.admit(self):
            full = ApiError(
                503,
                "The server has no room for more connections; try again later.",
                code="overloaded",
                headers={"retry-after": "1"},
            )
            self._write(full)
            self._linger()

    def connection_lost(self, exc: Exception | None) -> None:
        """End the connection; a client that left before its answer is counted, not logged."""
        self._all.open.discard(self)
        if not self.idle and not self._cut:
            self._all.metrics.cut("left")
        self._forget_answer()
        super().connection_lost(exc)
        self._unset_keepalive_if_required()

    def data_received(self, data: bytes) -> None:
        """Parse the received data, unless the connection is closing or discards what it reads."""
        if self._discarding or self.transport.is_closing():
            return
        if self._head_bytes or self.cycle is None or not self.cycle.more_body:
            data, self._held = _whole_offers(self._held + data)
            data = _without_upgrade(data)
        if self._head_bytes:
            self._head_bytes += len(data)
        else:
            self._last_byte = self.loop.time()
        super().data_received(data)
        self._join_pieces()
        if self._head_bytes > 2 * MAX_HEADER_BYTES and not self._discarding:
            self.send_400_response("")

    def eof_received(self) -> bool | None:  # type: ignore[override]
        """Answer a client that has closed only its sending half: it may wait for the answer."""
        over = self._discarding or self.transport.is_closing()
        if over or self.idle or self.cycle.more_body or not hasattr(socket, "TCP_INFO"):
            return None
        self._half_closed = True
        assert self._answered is not None
        # A client that has left for good answers any byte with a reset. For one that has not, the
        # bytes are part of its answer: every answer begins with H, and a stream may have comments.
        if not self._answered.response_started:
            self.transport.write(b"H")
            cast(_Answered, self._answered.transport).skip = 1
        elif cast(_Answered, self._answered.transport).may_have_comments:
            self._answered.transport.write(b"3\r\n:\n\n\r\n")
        self.loop.call_later(PROBE_SECONDS, self._probe)
        return True

    def _probe(self) -> None:
        if self.transport.is_closing():
            return
        connection = self.transport.get_extra_info("socket")
        if connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] != CLOSE_WAIT:
            self.transport.abort()
        else:
            self.loop.call_later(PROBE_SECONDS, self._probe)

    def pause_writing(self) -> None:
        """Note when the client stopped reading what is written."""
        self._write_paused_at = self.loop.time()
        super().pause_writing()

    def resume_writing(self) -> None:
        """Note that the client reads again."""
        self._write_paused_at = None
        super().resume_writing()

    def shutdown(self) -> None:
        """Close the connection once the answer under way is complete."""
        self._keep_alive, self._stopping = False, True
        super().shutdown()

    # What the parser calls

    def on_message_begin(self) -> None:
        """Note that the first byte of a request has been received."""
        self._head_bytes, self._header_bytes = 1, 0
        self.since = self.loop.time()
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        """Take a piece of the request's URL."""
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take a header; a trailer (a header after a chunked body) is only counted."""
        self._count(len(name) + len(value))
        if self._head_bytes:
            super().on_header(name, value)

    def _count(self, size: int) -> None:
        self._header_bytes += size
        if self._header_bytes > 2 * MAX_HEADER_BYTES:
            raise ValueError("too many headers")

    def on_headers_complete(self) -> None:
        """Begin to answer a request; raises `ValueError` for a head that is refused."""
        if self.parser.get_http_version() not in ("1.0", "1.1"):
            raise ValueError("another version of HTTP")
        names = [name for name, _ in self.headers]
        if {b"content-length", b"transfer-encoding"} <= set(names):
            # A proxy may read as the next request what this server reads as the body.
            raise ValueError("two lengths")
        codings = [value for name, value in self.headers if name == b"transfer-encoding"]
        if codings and (len(codings) > 1 or codings[0].strip().lower() != b"chunked"):
            raise ValueError("another transfer coding")  # of which proxies read another length
        hosts = names.count(b"host")
        if hosts > 1 or (hosts == 0 and self.parser.get_http_version() == "1.1"):
            raise ValueError("two hosts, or none")
        if len(self.pipeline) >= MAX_WAITING:
            raise ValueError("too many requests at once")
        super().on_headers_complete()
        self._head_bytes, self._body_bytes = 0, 0
        self.since = self._last_byte = self.loop.time()
        # An answer that begins before the whole request has come is the connection's last.
        self._keep_alive, self.cycle.keep_alive = self.cycle.keep_alive, False
        self.cycle.transport = cast(asyncio.Transport, _Answered(self))

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        self._answered = cycle
        cycle.scope["extensions"] = {WRITE_NOW: {"write": self._write_now}}
        super()._start_asgi_task(cycle, app)

    def _write_now(self, piece: bytes) -> bool:
        """Write a piece of a chunked answer that has begun; False if its `send` has to."""
        cycle = self._answered
        if cycle is None or cycle.disconnected or cycle.response_complete:
            return False
        if self.flow.write_paused or not cycle.chunked_encoding:
            return False
        cycle.transport.write(b"%x\r\n%b\r\n" % (len(piece), piece))
        return True

    def on_body(self, body: bytes) -> None:
        """Take a piece of the body."""
        self._pieces.append(body)

    def _join_pieces(self) -> None:
        if self._pieces:
            body = b"".join(self._pieces)
            self._pieces.clear()
            self._body_bytes += len(body)
            super().on_body(body)

    def on_message_complete(self) -> None:
        """Note that the whole request has been received."""
        self._join_pieces()
        if not self.cycle.response_started:
            self.cycle.keep_alive = self._keep_alive
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """Wait for the next request, or close if the client has closed its sending half."""
        super().on_response_complete()
        self.since = self._last_byte = self.loop.time()
        if self._half_closed and self.idle:
            self.transport.close()

    def send_400_response(self, msg: str) -> None:
        """Answer 431 if the head is too large, else 400 for what is not valid HTTP."""
        if max(self._head_bytes, self._header_bytes) > 2 * MAX_HEADER_BYTES:
            self._refuse(ApiError(431, f"The headers are larger than {MAX_HEADER_BYTES} bytes."))
        else:
            self._refuse(ApiError(400, "This is not a valid HTTP request."))

    def _refuse(self, error: ApiError, reason: str | None = None) -> None:
        """Answer with `error`, unless an answer has begun, and end the connection."""
        if self.idle or not (self._answered and self._answered.response_started):
            self._write(error)
            if self._answered is not None:
                self._answered.scope["state"][REFUSED] = error.status
        if reason is not None:
            self._all.metrics.cut(reason)
        self._cut = True
        self.pipeline.clear()
        self._forget_answer()
        self._linger()

    def _forget_answer(self) -> None:
        """Tell the application to write no more: nobody waits for its answer."""
        if self._answered is not None and not self._answered.response_complete:
            self._answered.disconnected = True
            self._answered.message_event.set()

    def _write(self, error: ApiError) -> None:
        response = error.response()
        lines = [STATUS_LINE[error.status]]
        for name, value in response.raw_headers:
            lines += [name, b": ", value, b"\r\n"]
        self.transport.write(b"".join([*lines, b"connection: close\r\n\r\n", response.body]))

    def _linger(self) -> None:
        """Send no more but read on for a while: a reset could take the answer from the client."""
        self._discarding = True
        self.since = self.loop.time()
        self.flow.resume_reading()
        if self.transport.can_write_eof():
            self.transport.write_eof()

    def end_answer(self) -> None:
        """Close the connection after an answer, once the client has had time to read it."""
        if self.cycle.more_body and not self.transport.is_closing():
            self._linger()
        else:
            self.transport.close()


def _whole_offers(data: bytes) -> tuple[bytes, bytes]:
    """Split `data` of a head into what can be parsed now and a tail that has to wait for more.

    An `Upgrade` header, or the empty line that ends the head, may begin in the tail.
    """
    if b"\r\n\r\n" not in data:
        for start in range(max(0, len(data) - len(_OFFER)), len(data)):
            if any(end.startswith(data[start:].lower()) for end in (_OFFER, b"\r\n\r\n")):
                return data[:start], data[start:]
    return data, b""


def _without_upgrade(data: bytes) -> bytes:
    """Rename the `Upgrade` header, the offer of another protocol, of the head that begins `data`.

    The parser would take all that follows, the request's body included, for the other protocol.
    Java's own client offers HTTP/2 with every first request.
    """
    head, end, after = data.partition(b"\r\n\r\n")
    return _UPGRADE.sub(b"\r\nignored", head) + end + after if _UPGRADE.search(head) else data


class _Answered:
    """Transport that an answer is written to; its first `skip` bytes have been sent already.

    To a client of HTTP/1.0, which knows no chunks, those of an answer are written without their
    marks: the answer ends with its connection.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._may_have_chunks = connection.parser.get_http_version() != "1.0"
        self._in_chunks = False
        self.skip = 0
        self.may_have_comments = False
        """Whether it is a stream of events: in JSON, in pieces too, a comment is a fault."""

    def write(self, data: bytes) -> None:
        """Write the next bytes of the answer."""
        if data.startswith(b"HTTP/") and b"\r\ncontent-type: text/event-stream" in data:
            self.may_have_comments = True
        if not self._may_have_chunks:
            data = self._without_marks(data)
        self._connection.transport.write(data[self.skip :])
        self.skip = 0

    def _without_marks(self, data: bytes) -> bytes:
        """What uvicorn writes at one time: the head, or a chunk, which the last one may follow."""
        if self._in_chunks:
            size, _, chunk = data.partition(b"\r\n")
            return chunk[: int(size or b"0", 16)]
        head = data.removesuffix(_CHUNKED)
        self._in_chunks = head != data
        return head + b"\r\n" if self._in_chunks else data

    def close(self) -> None:
        """End the connection after the answer."""
        self._connection.end_answer()

    def is_closing(self) -> bool:
        """Whether the connection is closing or has ended."""
        return self._connection.transport.is_closing()
