"""A server that does exactly what it is told, for the client that measures servers."""

from __future__ import annotations

import asyncio
import json
import threading
from typing import Any

FIRST, GAP, PIECES = 0.06, 0.02, 5


class Server:
    """Answers any POST with `PIECES` pieces: the first after `FIRST` seconds, the others `GAP` apart.

    A prompt that is a text names a misbehaviour instead. bodies: what was sent. most: requests at one time.
    """

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.heads: list[str] = []
        self.now = self.most = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        start = asyncio.start_server(self._serve, "127.0.0.1", 0)
        self._server = asyncio.run_coroutine_threadsafe(start, self._loop).result()
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    def stop(self) -> None:
        async def close() -> None:
            self._server.close()
            for task in asyncio.all_tasks() - {asyncio.current_task()}:
                task.cancel()

        asyncio.run_coroutine_threadsafe(close(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                lengths = [line for line in head.lower().splitlines() if line.startswith("content-length:")]
                body = await reader.readexactly(int(lengths[0].partition(":")[2])) if lengths else b""
                self.heads.append(head)
                self.now += 1
                self.most = max(self.most, self.now)
                try:
                    await self._answer(head.split()[1], json.loads(body or b"{}"), writer)
                finally:
                    self.now -= 1
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def _answer(self, path: str, body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        if path == "/v1/models":
            return self._whole(writer, "200 OK", {"data": [{"id": "first"}, {"id": "second"}]})
        if path == "/server_info":
            return self._whole(writer, "404 Not Found", {})
        self.bodies.append(body)
        told = body.get("prompt") if isinstance(body.get("prompt"), str) else ""
        if told == "busy":
            return self._whole(writer, "429 Too Many", {"error": {"message": "the queue is full"}})
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n")
        await asyncio.sleep(FIRST)
        if told == "fails":
            writer.write(b'data: {"error": {"message": "out of pages"}}\n\n')
        elif told == "nonsense":
            writer.write(b"data: {no json\n\n")
        else:
            await self._pieces(writer, body, told)
        await writer.drain()
        writer.close()
        return None

    async def _pieces(self, writer: asyncio.StreamWriter, body: dict[str, Any], told: str) -> None:
        if "messages" in body:
            first, piece = {"delta": {"role": "assistant", "content": ""}}, {"delta": {"content": "é\u2028"}}
            writer.write(self._event({"choices": [first]}))
        else:
            piece = {"text": "" if told == "silent" else "é\u2028"}
        count = 2 if told == "cut" else PIECES
        for number in range(count):
            if number:
                await asyncio.sleep(GAP)
            reason = "length" if number == count - 1 else None
            writer.write(self._event({"choices": [{**piece, "finish_reason": reason}]}))
            await writer.drain()
        if told == "cut":
            return
        if told != "uncounted":
            tokens = 1 if told == "silent" else PIECES
            usage = {"prompt_tokens": len(body.get("prompt", "x")), "completion_tokens": tokens}
            writer.write(self._event({"choices": [], "usage": usage}))
        writer.write(b"data: [DONE]\n\n")

    @staticmethod
    def _event(body: dict[str, Any]) -> bytes:
        # Not escaped, as other servers do: U+2028 is no end of a line of an event stream.
        return b"data: " + json.dumps(body, ensure_ascii=False).encode() + b"\n\n"

    @staticmethod
    def _whole(writer: asyncio.StreamWriter, status: str, body: dict[str, Any]) -> None:
        data = json.dumps(body).encode()
        writer.write(f"HTTP/1.1 {status}\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data)
