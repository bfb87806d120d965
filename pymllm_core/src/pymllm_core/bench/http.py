"""HTTP/1.1 as far as a load test needs it: a POST on a kept connection, and its answer as it comes.

httpx, which every other client here uses, takes some 90 microseconds for each piece of an answer, and for a request a
time that grows with the square of those under way: more than the servers that are to be measured.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator, Mapping
from urllib.parse import urlsplit

_MOST = 1 << 18
"""Bytes that are read at once, and the longest head of an answer."""


class ProtocolError(Exception):
    """The answer is no HTTP/1.1, or ended early; says what was found."""


class _Incoming:
    """Reads one answer, and fails with TimeoutError after so many seconds without a byte.

    One timer an answer: `asyncio.wait_for` would make a task for each read.
    """

    def __init__(self, reader: asyncio.StreamReader, timeout: float) -> None:
        self._reader = reader
        self._timeout = timeout
        self._loop = asyncio.get_running_loop()
        self._last = self._loop.time()
        self._timer = self._loop.call_later(timeout, self._look)

    async def some(self, most: int = _MOST) -> bytes:
        """What has arrived, at least one byte; none at the end."""
        data = await self._reader.read(most)
        self._last = self._loop.time()
        return data

    async def head(self) -> bytes:
        """Status line and headers."""
        try:
            return await self._reader.readuntil(b"\r\n\r\n")
        except asyncio.IncompleteReadError as error:
            raise ProtocolError("the connection ended before an answer") from error
        except asyncio.LimitOverrunError as error:
            raise ProtocolError(f"the answer's head is longer than {_MOST} bytes") from error
        finally:
            self._last = self._loop.time()

    def stop(self) -> None:
        """Wait no more."""
        self._timer.cancel()

    def _look(self) -> None:
        left = self._last + self._timeout - self._loop.time()
        if left > 0:
            self._timer = self._loop.call_later(left, self._look)
        else:
            self._reader.set_exception(TimeoutError(f"no news for {self._timeout:g} s"))


class Answer:
    """Status, headers (names in lower case) and, by `pieces`, the body of one answer."""

    def __init__(self, incoming: _Incoming, head: bytes) -> None:
        first, *lines = head.decode("latin-1").split("\r\n")
        version, _, rest = first.partition(" ")
        if not (version.startswith("HTTP/1.") and rest[:3].isdigit()):
            raise ProtocolError(f"the answer begins with {first[:80]!r}, which is no status line")
        self.status = int(rest[:3])
        fields = (line.partition(":") for line in lines if line)
        self.headers = {name.strip().lower(): value.strip() for name, _, value in fields}
        self.complete = False
        self._incoming = incoming

    @property
    def keeps(self) -> bool:
        """Whether the connection can serve another request."""
        return self.complete and self.headers.get("connection", "").lower() != "close"

    async def pieces(self) -> AsyncIterator[bytes]:
        """The body as it arrives. Raises ProtocolError where it is cut off."""
        if self.headers.get("transfer-encoding", "").lower() == "chunked":
            async for piece in self._chunked():
                yield piece
        elif "content-length" in self.headers:
            left = int(self.headers["content-length"])
            while left:
                piece = await self._incoming.some(min(left, _MOST))
                if not piece:
                    raise ProtocolError("the answer ended before its declared length")
                left -= len(piece)
                yield piece
            self.complete = True
        else:
            while piece := await self._incoming.some():
                yield piece

    async def _chunked(self) -> AsyncIterator[bytes]:
        """RFC 9112, 7.1: lines of a hexadecimal length, each followed by so many bytes; the last has length 0."""
        rest, done = b"", False
        while True:
            data, at = [], 0
            while (line := rest.find(b"\r\n", at)) >= 0:
                size = _size(rest[at:line])
                end = line + 2 + size
                if not size:
                    # Trailers may follow (7.1.2), which were not asked for; an empty line ends them.
                    done = rest.find(b"\r\n\r\n", line) >= 0
                if not size or end + 2 > len(rest):
                    break
                data.append(rest[line + 2 : end])
                at = end + 2
            rest = rest[at:]
            if data:
                yield b"".join(data)
            if done:
                self.complete = True
                return
            more = await self._incoming.some()
            if not more:
                raise ProtocolError("the answer ended before its last chunk")
            rest += more


def _size(line: bytes) -> int:
    digits = line.partition(b";")[0].strip()
    if not digits or digits.strip(b"0123456789abcdefABCDEF"):
        raise ProtocolError(f"a chunk begins with {digits[:20]!r}, which is no length")
    return int(digits, 16)


class Connections:
    """Connections to one server, as many as requests are under way; each is used again.

    headers: sent with every request. timeout: seconds without a byte after which an answer has failed.
    """

    def __init__(self, url: str, headers: Mapping[str, str], timeout: float) -> None:
        parts = urlsplit(url)
        self._host, self._port = parts.hostname or "", parts.port
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._path = parts.path.rstrip("/")
        fields = {"Host": parts.netloc.rpartition("@")[2], "Content-Type": "application/json", **headers}
        self._head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
        self._timeout = timeout
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    @contextlib.asynccontextmanager
    async def post(self, route: str, body: bytes) -> AsyncIterator[Answer]:
        """The answer to a POST. Raises OSError, TimeoutError (asyncio's before Python 3.11) and ProtocolError."""
        reader, writer = await self._connection()
        incoming = _Incoming(reader, self._timeout)
        keep = False
        try:
            head = f"POST {self._path}{route} HTTP/1.1\r\n{self._head}Content-Length: {len(body)}\r\n\r\n"
            writer.write(head.encode("latin-1") + body)
            answer = Answer(incoming, await incoming.head())
            yield answer
            keep = answer.keeps
        finally:
            incoming.stop()
            if keep:
                self._idle.append((reader, writer))
            else:
                writer.close()

    async def _connection(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        while self._idle:
            reader, writer = self._idle.pop()
            if not (reader.at_eof() or writer.is_closing()):
                return reader, writer
            writer.close()
        port = self._port or (443 if self._tls else 80)
        opening = asyncio.open_connection(self._host, port, ssl=self._tls, limit=_MOST)
        return await asyncio.wait_for(opening, self._timeout)

    async def aclose(self) -> None:
        """Close what is idle."""
        writers = [writer for _, writer in self._idle]
        self._idle.clear()
        for writer in writers:
            writer.close()
        await asyncio.gather(*(writer.wait_closed() for writer in writers), return_exceptions=True)
        await asyncio.sleep(0)  # for those that were closed just before
