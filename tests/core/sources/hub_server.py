"""A hub of our own on this machine, which speaks the APIs of Hugging Face and of ModelScope."""

from __future__ import annotations

import hashlib
import json
import urllib.parse
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

COMMIT = "a" * 40
FILES = {
    "config.json": b'{"architectures": ["TinyForCausalLM"]}',
    "tokenizer.json": b"{}",
    "chat_template.jinja": b"hello",
    "model.safetensors": bytes(range(256)) * 5000,
    "pytorch_model.bin": b"pickle",
    "consolidated.safetensors": b"second copy",
    "README.md": b"read me",
}
WANTED = {"config.json", "tokenizer.json", "chat_template.jinja", "model.safetensors"}


@dataclass
class Hub:
    """A hub that speaks both APIs for one repository, ORG/Tiny.1, and remembers what it was asked."""

    files: dict[str, bytes] = field(default_factory=lambda: dict(FILES))
    status: int = 200
    error_code: str = ""
    break_after: int | None = None
    """Cut the connection once, after so many bytes of a file."""
    wrong_sha256: bool = False
    no_ranges: bool = False
    hidden_names: bool = False
    """Leave the names out of the model's description; the listing of files still has them."""
    asked: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)
    url: str = ""

    def served(self) -> set[str]:
        """Names of the files whose content was sent."""
        gets = [path for method, path, _ in self.asked if method == "GET"]
        names = {path.rpartition("/")[2] for path in gets if "/resolve/" in path}
        return names | {path.rpartition("FilePath=")[2] for path in gets if "FilePath=" in path}


def git_id(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


def make_handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def answer(self, *, body: bool) -> None:
            path = urllib.parse.unquote(self.path)
            hub.asked.append((self.command, path, dict(self.headers)))
            if hub.status != 200:
                self.send(hub.status, b"{}", {"X-Error-Code": hub.error_code} if hub.error_code else {})
            elif path.startswith("/api/models/ORG/Tiny.1/revision/main"):
                siblings = [{"rfilename": name} for name in hub.files if not hub.hidden_names]
                self.send_json({"id": "ORG/Tiny.1", "sha": COMMIT, "siblings": siblings, "private": False})
            elif path.startswith("/api/models/ORG/Tiny.1/tree/"):
                self.send_json(
                    [
                        {"type": "file", "path": name, "size": len(data), "oid": git_id(data)}
                        for name, data in hub.files.items()
                    ]
                )
            elif path.startswith("/ORG/Tiny.1/resolve/"):
                data = hub.files[path.rpartition("/")[2]]
                tag = {"ETag": f'"{git_id(data)}"', "X-Repo-Commit": COMMIT}
                self.send(200, data, tag, body=body)
            elif path.startswith("/api/v1/models/ORG/Tiny.1/repo/files?Revision=master"):
                self.send_json({"Code": 200, "Success": True, "Data": {"Files": self.modelscope_files()}})
            elif path.startswith("/api/v1/models/ORG/Tiny.1/repo?"):
                self.send_file(hub.files[path.rpartition("FilePath=")[2]])
            else:
                self.send(404, b'{"error": "not found"}', {"X-Error-Code": "RepoNotFound"})

        def modelscope_files(self) -> list[dict[str, Any]]:
            folder: dict[str, Any] = {"Path": "assets", "Type": "tree", "Size": 0, "Sha256": ""}
            return [folder] + [
                {
                    "Path": name,
                    "Type": "blob",
                    "Size": len(data),
                    "Sha256": "0" * 64 if hub.wrong_sha256 else hashlib.sha256(data).hexdigest(),
                }
                for name, data in hub.files.items()
            ]

        def send_file(self, data: bytes) -> None:
            start = int(self.headers.get("Range", "bytes=0-")[6:-1])
            if start and not hub.no_ranges:
                end = len(data) - 1
                self.send(206, data[start:], {"Content-Range": f"bytes {start}-{end}/{len(data)}"})
            elif hub.break_after is not None and len(data) > hub.break_after:
                cut, hub.break_after = hub.break_after, None
                self.send_response(200)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data[:cut])
                self.close_connection = True
            else:
                self.send(200, data)

        def send_json(self, value: Any) -> None:
            self.send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

        def send(
            self, status: int, data: bytes, headers: dict[str, str] | None = None, body: bool = True
        ) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.end_headers()
            if body and self.command != "HEAD":
                self.wfile.write(data)

    return Handler


def names(folder: Path) -> set[str]:
    """What lies in a fetched folder, without the hidden files of the cache."""
    return {entry.name for entry in folder.iterdir() if not entry.name.startswith(".")}
