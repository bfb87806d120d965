"""What arrives by bare sockets: heads without an end, requests one after another, upgrades that nobody offers."""

from __future__ import annotations

import contextlib
import json
import socket
import time

import pytest
from server_fakes import FakeEngine

from pymllm_server.protocol import MAX_HEAD_BYTES

REFUSED = "Invalid HTTP request received."
BODY = json.dumps({"prompt": "ab", "max_tokens": 2}).encode()
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
LENGTH = b"Content-Length: %d\r\n" % len(BODY)


@pytest.fixture
def server(serve):
    return serve(FakeEngine("xyz"))


def connect(server):
    return socket.create_connection(("127.0.0.1", server.port), timeout=5)


def read_to_end(sock):
    data = b""
    with contextlib.suppress(ConnectionError):  # what the server had not read when it closed
        while piece := sock.recv(65536):
            data += piece
    return data


def read_answer(sock):
    """(status, body) of an answer with a length."""
    data = b""
    while b"\r\n\r\n" not in data:
        data += sock.recv(65536)
    head, _, body = data.partition(b"\r\n\r\n")
    (length,) = [line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
    while len(body) < int(length.partition(b":")[2]):
        body += sock.recv(65536)
    return int(head.split()[1]), json.loads(body)


@pytest.mark.parametrize(
    "begin",
    [
        b"GET /",
        b"GET / HTTP/1.1\r\nX: ",
        b"GET / HTTP/1.1\r\nX",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n" % len(BODY) + BODY + b"\r\n0\r\nX: ",
    ],
    ids=["url", "value", "name", "trailer"],
)
def test_a_head_without_an_end_is_cut(server, caplog, begin):
    """The server has kept no more than the limit and the last read when it says so."""
    with connect(server) as sock:
        sock.sendall(begin)
        sent = 0
        with contextlib.suppress(ConnectionError):
            for _ in range(100):
                sock.sendall(b"a" * 8192)
                sent += 8192
                time.sleep(0.005)
                if REFUSED in caplog.text:
                    break
        assert sent <= MAX_HEAD_BYTES + 10 * 8192
        assert read_to_end(sock).startswith(b"HTTP/1.1 400 ")
    assert REFUSED in caplog.text
    assert not server.engine.submitted
    assert server.client.get("/health").status_code == 200


def test_many_fields_are_one_head(server):
    with connect(server) as sock:
        sock.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n")
        with contextlib.suppress(ConnectionError):
            for number in range(MAX_HEAD_BYTES):
                sock.sendall(b"X-%08d: abcdefgh\r\n" % number)
            sock.sendall(b"\r\n")
        assert read_to_end(sock).startswith(b"HTTP/1.1 400 ")


def test_long_heads_and_bodies_each_count_alone(server):
    """Heads of 10 KB and bodies of 300 KB, in small parts, on one connection."""
    prompt = json.dumps({"prompt": "ab", "max_tokens": 2, "user": "u" * 300_000}).encode()
    fields = b"X: " + b"a" * 10_000 + b"\r\nContent-Length: %d\r\n\r\n" % len(prompt)
    with connect(server) as sock:
        for _ in range(3):
            request = HEAD + fields + prompt
            for start in range(0, len(request), 8192):
                sock.sendall(request[start : start + 8192])
            status, answer = read_answer(sock)
            assert (status, answer["choices"][0]["text"]) == (200, "xy")


def test_requests_in_one_packet_are_answered_in_order(server):
    last = HEAD + b"Connection: close\r\n" + LENGTH + b"\r\n" + BODY
    one = json.dumps({"prompt": "ab", "max_tokens": 1}).encode()
    with connect(server) as sock:
        sock.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(one) + one + last)
        answers = read_to_end(sock)
    assert answers.count(b"HTTP/1.1 200 OK") == 2
    assert answers.index(b'"text":"x"') < answers.index(b'"text":"xy"')


def test_an_offer_to_speak_another_protocol_is_passed_over(server):
    """As curl --http2 and Java's client make it: RFC 9110, 7.8 lets a server ignore it."""
    offer = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\n"
    with connect(server) as sock:
        sock.sendall(HEAD + offer + LENGTH + b"\r\n" + BODY)
        status, answer = read_answer(sock)
    assert (status, answer["choices"][0]["text"]) == (200, "xy")


def test_an_offer_costs_nothing_that_comes_with_it(server):
    """A long body in parts, another request behind it, and the fields but for the offer."""
    prompt = json.dumps({"prompt": "ab", "max_tokens": 1, "user": "u" * 100_000}).encode()
    offer = b"Connection: keep-alive, Upgrade\r\nUpgrade: websocket\r\nX-Request-Id: mine\r\n"
    requests = HEAD + offer + b"Content-Length: %d\r\n\r\n" % len(prompt) + prompt
    requests += HEAD + b"Connection: close\r\n" + LENGTH + b"\r\n" + BODY
    with connect(server) as sock:
        for start in range(0, len(requests), 8192):
            sock.sendall(requests[start : start + 8192])
            time.sleep(0.001)
        answers = read_to_end(sock)
    assert answers.count(b"HTTP/1.1 200 OK") == 2
    assert answers.index(b"x-request-id: mine") < answers.index(b'"text":"x"') < answers.index(b'"text":"xy"')


def test_a_thousand_offers_in_one_packet(server):
    """Neither the depth of a call nor a copy each."""
    with connect(server) as sock:
        sock.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: upgrade\r\nUpgrade: a\r\n\r\n" * 2000)
        sock.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        assert read_to_end(sock).count(b"HTTP/1.1 200 OK") == 2001


@pytest.mark.parametrize(
    "noise",
    [b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc", b"GET\r\n\r\n", b"CONNECT x:1 HTTP/1.1\r\nHost: x\r\n\r\n"],
)
def test_what_is_no_request(server, noise):
    with connect(server) as sock:
        sock.sendall(noise)
        assert read_to_end(sock).startswith(b"HTTP/1.1 400 ")
    assert server.client.get("/health").status_code == 200
