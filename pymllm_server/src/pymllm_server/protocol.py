"""HTTP/1.1: uvicorn's protocol by httptools, held to two things that h11 does of itself.

httptools (Node's llhttp) takes a third less of a short request's time than h11, but keeps heads and trailers of any
length, and takes what follows an offer to speak another protocol for that one: the body of such a POST would be lost,
which curl --http2 and Java's client send by default. RFC 9110, 7.8 lets a server pass the offer over.
"""

from __future__ import annotations

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD_BYTES = 16 * 1024
"""Of a request's line, fields and trailers together; as h11 has it."""


class HttpProtocol(HttpToolsProtocol):
    """One connection."""

    # Bytes of fields that were read, and bytes received since the parser last told of anything but fields.
    _fields = 0
    _untold = 0

    def data_received(self, data: bytes) -> None:
        """Parse what came; what is no HTTP, or has too long a head, is answered with 400 and the connection closed."""
        self._unset_keepalive_if_required()
        self._untold += len(data)
        rest = memoryview(data)
        try:
            while rest:
                try:
                    self.parser.feed_data(rest)
                    break
                except httptools.HttpParserUpgrade as offer:
                    rest = rest[offer.args[0] :]
                    self._pass_over()
        except httptools.HttpParserError:
            self._refuse()
        else:
            if self._untold > MAX_HEAD_BYTES:
                self._refuse()

    def on_message_begin(self) -> None:
        self._fields = 0
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        self._count(url)
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count(name, value)
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._untold = 0
        if not self.parser.should_upgrade():
            super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._untold = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._untold = 0
        if not self.parser.should_upgrade():
            super().on_message_complete()

    def _count(self, *parts: bytes) -> None:
        self._fields += sum(map(len, parts))
        if self._fields > MAX_HEAD_BYTES:
            raise ValueError("the head is too long")  # which feed_data raises as an HttpParserError

    def _pass_over(self) -> None:
        """Read the head again without its offer. Raises HttpParserError for CONNECT, which asks for a tunnel."""
        method, version = self.parser.get_method(), self.parser.get_http_version().encode()
        if method == b"CONNECT":
            raise httptools.HttpParserInvalidMethodError("no tunnels")
        fields = [b"%s: %s\r\n" % field for field in self.headers if field[0] != b"upgrade"]
        self.parser = httptools.HttpRequestParser(self)
        self.parser.feed_data(b"%s %s HTTP/%s\r\n%s\r\n" % (method, self.url, version, b"".join(fields)))

    def _refuse(self) -> None:
        message = "Invalid HTTP request received."
        self.logger.warning(message)
        self.send_400_response(message)
