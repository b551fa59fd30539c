"""A reverse proxy for HTTP/1.1, between an S3 client and its server, that makes requests fail as a plan says."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import socket
import struct
import threading
import zlib
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Literal
from urllib.parse import urlsplit

Kind = Literal["latency", "reset", "status-503", "status-500", "truncate", "hang", "refuse"]

ERRORS = {
    "status-503": ("503 Service Unavailable", "SlowDown", "Please reduce your request rate."),
    "status-500": ("500 Internal Server Error", "InternalError", "We encountered an internal error. Please try again."),
}
#: Bytes read at once, and the longest head of a message.
CHUNK = 1 << 18


@dataclass(frozen=True)
class Fault:
    """What happens to a request.

    Parameters
    ----------
    kind : str
        ``latency``: it is forwarded ``delay`` seconds later.
        ``reset``: the server's answer, cut off by a connection reset in the middle of its body.
        ``truncate``: the same, cut off by an orderly end of the connection.
        ``status-503``, ``status-500``: S3's SlowDown or InternalError; the server does not see the request.
        ``hang``: no answer, until the client or the proxy goes.
        ``refuse``: the connection ends without an answer; the server does not see the request.
        With ``reset`` and ``truncate`` an answer without a body, such as that to PUT, is lost as a whole: the server
        has done what it was asked for, and the client does not know.
    delay : float, optional
        Seconds to wait before, for any kind.
    """

    kind: Kind
    delay: float = 0.0


#: Takes the method, the path with its query as sent, and the running number of the request, from 0.
Plan = Callable[[str, str, int], Fault | None]


def one_in(n: int, kind: Kind, methods: Iterable[str] = ("GET",), *, attempts: int = 1, delay: float = 0.0) -> Plan:
    """A plan by which one path in ``n`` fails, at its first attempts only.

    Which paths fail depends on the paths only, not on the order of requests. Each plan counts attempts anew.

    Parameters
    ----------
    n : int
        One path in so many fails; 1 for every path.
    kind : str
        How; see `Fault`.
    methods : iterable of str, optional
        Methods that fail.
    attempts : int, optional
        How many attempts at a path fail.
    delay : float, optional
        Delay of the fault.
    """
    chosen = frozenset(methods)
    seen: Counter[tuple[str, str]] = Counter()

    def plan(method: str, path: str, number: int) -> Fault | None:
        if method not in chosen or zlib.crc32(path.encode()) % n:
            return None
        seen[method, path] += 1
        return Fault(kind, delay) if seen[method, path] <= attempts else None

    return plan


@dataclass
class _Head:
    """The head of a request or an answer: its bytes, and what the proxy has to know of them."""

    raw: bytes
    first: list[str]
    fields: dict[str, str] = field(default_factory=dict)

    @classmethod
    async def read(cls, reader: asyncio.StreamReader) -> _Head:
        raw = await reader.readuntil(b"\r\n\r\n")
        first, *lines = raw[:-4].decode("latin-1").split("\r\n")
        head = cls(raw, first.split(" ", 2))
        for line in lines:
            name, _, value = line.partition(":")
            head.fields[name.lower()] = value.strip()
        return head

    @property
    def chunked(self) -> bool:
        return "chunked" in self.fields.get("transfer-encoding", "").lower()

    @property
    def length(self) -> int:
        return int(self.fields.get("content-length", 0))

    @property
    def has_body(self) -> bool:
        """Whether a request with this head has a body."""
        return self.chunked or self.length > 0

    @property
    def closes(self) -> bool:
        return self.fields.get("connection", "").lower() == "close" or "HTTP/1.0" in self.first


Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class FaultProxy:
    """A proxy in a thread of its own; a context manager.

    It leaves requests and answers as they are, and so the signatures of S3, which cover the header Host.

    Parameters
    ----------
    upstream : str
        Endpoint of the server: ``http://HOST:PORT``.
    plan : callable, optional
        What happens to which request. May be replaced at any time.
    delay_get : float, optional
        Seconds by which every GET is delayed. May be changed at any time.

    Attributes
    ----------
    endpoint : str
        That of the proxy, ``http://127.0.0.1:PORT``.
    log : list of (str, str, int)
        Method, path and status of each request whose answer has begun; status 0: there is none.
    """

    def __init__(self, upstream: str, plan: Plan | None = None, *, delay_get: float = 0.0) -> None:
        address = urlsplit(upstream)
        self.plan = plan
        self.delay_get = delay_get
        self.endpoint = ""
        self.log: list[tuple[str, str, int]] = []
        self._upstream = (address.hostname, address.port)
        self._counts: Counter[str] = Counter()
        self._numbers = itertools.count()
        self._lock = threading.Lock()
        self._tasks: set[asyncio.Task[None]] = set()
        self._error: Exception | None = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="faultproxy", daemon=True)

    @property
    def counts(self) -> Counter[str]:
        """Requests by method, and faults by kind, so far; each is counted when it begins."""
        with self._lock:
            return self._counts.copy()

    def clear(self) -> None:
        """Forget counts and log; requests are numbered from 0 again."""
        with self._lock:
            self._counts.clear()
            self.log.clear()
            self._numbers = itertools.count()

    def __enter__(self) -> FaultProxy:
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._open(), self._loop).result()
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        if self._error is not None:
            raise self._error

    async def _open(self) -> None:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0, limit=CHUNK, backlog=1024)
        self.endpoint = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def _close(self) -> None:
        self._server.close()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.sleep(0)  # transports close in the next round of the loop

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            await self._serve(reader, writer)
        except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass  # one of the two sides has gone, or the proxy closes
        except Exception as error:  # of a plan, or of ours: the test must hear of it
            self._error = self._error or error
        finally:
            writer.transport.abort()
            self._tasks.discard(task)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer the requests of one connection, one after another."""
        upstream: Connection | None = None
        try:
            while True:
                request = await _Head.read(reader)
                method, path, _ = request.first
                with self._lock:
                    number = next(self._numbers)
                    self._counts[method] += 1
                fault = self.plan(method, path, number) if self.plan else None
                if fault is not None:
                    with self._lock:
                        self._counts[fault.kind] += 1
                    if fault.delay:
                        await asyncio.sleep(fault.delay)
                if self.delay_get and method == "GET":
                    await asyncio.sleep(self.delay_get)
                exchange = _Exchange(request, reader, writer, self.log)
                try:
                    if fault is None or fault.kind in ("latency", "reset", "truncate"):
                        if upstream is None or upstream[0].at_eof() or upstream[1].is_closing():
                            upstream = await asyncio.open_connection(*self._upstream, limit=CHUNK)
                        if fault is None or fault.kind == "latency":
                            keep = await exchange.forward(upstream)
                        else:
                            keep = await exchange.cut(upstream, reset=fault.kind == "reset")
                    elif fault.kind in ERRORS:
                        keep = await exchange.answer_error(fault.kind)
                    else:
                        exchange.status(0)
                        while fault.kind == "hang" and await reader.read(CHUNK):
                            pass
                        keep = False
                finally:
                    exchange.status(0)
                if not keep:
                    return await _finish(writer)
        finally:
            if upstream is not None:
                upstream[1].transport.abort()


class _Exchange:
    """A request that was read, and what becomes of it."""

    def __init__(
        self,
        request: _Head,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        log: list[tuple[str, str, int]],
    ) -> None:
        self._request = request
        self._reader = reader
        self._writer = writer
        self._log = log
        self._logged = False

    def status(self, status: int) -> None:
        """Log how it ends, unless that is known already: before the client can see it, for tests to rely on it."""
        if not self._logged:
            self._log.append((self._request.first[0], self._request.first[1], status))
            self._logged = True

    async def forward(self, upstream: Connection) -> bool:
        """Forward the request and its answer; whether the connection may be used again."""
        sending = await self._send(upstream)
        try:
            answer = await self._answer(upstream[0])
            self.status(int(answer.first[1]))
            self._writer.write(answer.raw)
            whole = not self._has_body(answer) or await _relay(answer, upstream[0], self._writer)
            await self._writer.drain()
            sent = True
            if sending is not None:
                # A server may refuse a request before it has read all of it.
                await asyncio.wait([sending], timeout=0.1)
                sent = sending.done() and sending.result()
        finally:
            if sending is not None:
                sending.cancel()
        return whole and sent and not answer.closes and not self._request.closes

    async def _send(self, upstream: Connection) -> asyncio.Task[bool] | None:
        """Send the request; if it has a body, as a task, for the answer may come before its end."""
        upstream[1].write(self._request.raw)
        if not self._request.has_body:
            return None

        async def send() -> bool:
            try:
                return await _relay(self._request, self._reader, upstream[1])
            except (OSError, asyncio.IncompleteReadError):
                upstream[1].transport.abort()  # or whoever waits for the answer would wait for ever
                return False

        return asyncio.ensure_future(send())

    async def _answer(self, reader: asyncio.StreamReader) -> _Head:
        """Read the head of the answer; one before it, that says 100, lets the client send its body."""
        while True:
            answer = await _Head.read(reader)
            if not answer.first[1].startswith("1"):
                return answer
            self._writer.write(answer.raw)

    def _has_body(self, answer: _Head) -> bool:
        return self._request.first[0] != "HEAD" and answer.first[1] not in ("204", "304")

    async def cut(self, upstream: Connection, *, reset: bool) -> bool:
        """Forward the request, and half of its answer; reset the connection, or leave it to be ended."""
        sending = await self._send(upstream)
        answer = await self._answer(upstream[0])
        if sending is not None:
            await sending
        body = _Body()
        if self._has_body(answer):
            await _relay(answer, upstream[0], body)
        content = body.content(chunked=answer.chunked)
        self.status(int(answer.first[1]) if content else 0)
        if content:
            framing = (b"transfer-encoding:", b"content-length:")
            lines = [line for line in answer.raw.split(b"\r\n") if not line.lower().startswith(framing)]
            lines.insert(1, b"Content-Length: %d" % len(content))
            self._writer.write(b"\r\n".join(lines) + content[: len(content) // 2])
            self._writer.transport.set_write_buffer_limits(0)
            await self._writer.drain()
        if reset:
            await asyncio.sleep(0.05)  # a reset also takes away what the client has not read yet
            raw: socket.socket = self._writer.get_extra_info("socket")
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self._writer.transport.abort()
        return False

    async def answer_error(self, kind: str) -> bool:
        """Take the request's body, and answer with an S3 error; whether the connection may be used again."""
        if self._request.fields.get("expect", "").lower() == "100-continue":
            self._writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        if self._request.has_body:
            await _relay(self._request, self._reader, _Body())
        status, code, message = ERRORS[kind]
        body = (
            '<?xml version="1.0" encoding="UTF-8"?>\n'
            f"<Error><Code>{code}</Code><Message>{message}</Message><RequestId>faultproxy</RequestId></Error>"
        )
        if self._request.first[0] == "HEAD":
            body = ""
        self.status(int(status[:3]))
        self._writer.write(
            f"HTTP/1.1 {status}\r\nContent-Type: application/xml\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode()
        )
        await self._writer.drain()
        return not self._request.closes


async def _relay(head: _Head, reader: asyncio.StreamReader, writer: asyncio.StreamWriter | _Body) -> bool:
    """Relay a body as it is; whether its end is known by anything but the end of the connection."""
    if head.chunked:
        while True:
            line = await reader.readuntil(b"\r\n")
            writer.write(line)
            size = int(line.split(b";")[0], 16)
            if size:
                await _relay_bytes(size + 2, reader, writer)
                continue
            while line != b"\r\n":  # trailers, and an empty line
                line = await reader.readuntil(b"\r\n")
                writer.write(line)
            await writer.drain()
            return True
    if "content-length" in head.fields:
        await _relay_bytes(head.length, reader, writer)
        return True
    while data := await reader.read(CHUNK):
        writer.write(data)
        await writer.drain()
    return False


async def _relay_bytes(size: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter | _Body) -> None:
    while size:
        data = await reader.read(min(size, CHUNK))
        if not data:
            raise asyncio.IncompleteReadError(b"", size)
        size -= len(data)
        writer.write(data)
        await writer.drain()


class _Body:
    """Takes the place of a writer, and keeps what it is given."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []

    def write(self, data: bytes) -> None:
        self._parts.append(data)

    async def drain(self) -> None:
        pass

    def content(self, *, chunked: bool) -> bytes:
        """The body, without the frames of chunks."""
        raw = b"".join(self._parts)
        if not chunked:
            return raw
        content = b""
        while raw:
            line, raw = raw.split(b"\r\n", 1)
            size = int(line.split(b";")[0], 16)
            if not size:
                break
            content, raw = content + raw[:size], raw[size + 2 :]
        return content


async def _finish(writer: asyncio.StreamWriter) -> None:
    """End a connection in order, once all is written."""
    with contextlib.suppress(OSError):
        writer.close()
        await writer.wait_closed()
