"""A stand-in of Google Cloud Storage in memory: what gcsfs, TensorStore and Orbax ask of it.

It speaks the part of the JSON API (https://cloud.google.com/storage/docs/json_api/v1) that they
use, with the promises that they build on: an object is there in full or not at all, each write
gives it a new generation, and a write may be bound to the generation that was read.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

BUCKET = "stand-in"  # names shorter than three letters are refused by TensorStore


@dataclasses.dataclass(frozen=True)
class Object:
    """An object: its bytes, and the number of the write that made it."""

    content: bytes
    generation: int


class Bucket:
    """Objects by name, which threads share.

    Attributes:
      objects: what is there now.
      url: of its server.
      uploads: what has come so far of objects that are sent in parts, by name.
      reached: set when a write has come that is held.
      closed: set when the server ends.
    """

    def __init__(self) -> None:
        self.objects: dict[str, Object] = {}
        self.url = ""
        self.uploads: dict[str, bytes] = {}
        self._held = ""
        self.reached = threading.Event()
        self.closed = threading.Event()
        self._changes = threading.RLock()
        self._generations = itertools.count(1)

    def environment(self) -> dict[str, str]:
        """Return the variables by which programs take it for Google's."""
        return {
            "STORAGE_EMULATOR_HOST": self.url,  # gcsfs, and Google's own client, which Orbax asks
            "TENSORSTORE_GCS_HTTP_URL": self.url,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",  # else TensorStore looks for a metadata server
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # asks Google by gRPC at each call
        }

    def path(self, name: str) -> str:
        """Return the name of an object for programs."""
        return f"gs://{BUCKET}/{name}"

    def hold(self, name: str) -> None:
        """Let the writes of an object never come to their end; "": of none."""
        self._held = name
        self.reached.clear()

    def names(self, prefix: str) -> list[str]:
        """Return the names of objects that start with `prefix`, less that."""
        with self._changes:
            return sorted(n.removeprefix(prefix) for n in self.objects if n.startswith(prefix))

    def copy_to(self, prefix: str, folder: Path) -> None:
        """Write the objects that start with `prefix` as files of a folder."""
        for name in self.names(prefix):
            file = folder / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(self.objects[prefix + name].content)

    def write(self, name: str, content: bytes, *, only_if: int | None = None) -> Object | None:
        """Make or replace an object; `only_if`: of this generation, 0 for none, else None comes."""
        if name == self._held:
            self.reached.set()
            self.closed.wait()
            return None
        with self._changes:
            before = self.objects.get(name)
            if only_if is not None and only_if != (before.generation if before else 0):
                return None
            self.objects[name] = Object(content, next(self._generations))
            return self.objects[name]

    def move(self, name: str, other: str) -> Object:
        """Rename an object."""
        with self._changes:
            written = self.write(other, self.objects[name].content)
            assert written is not None
            del self.objects[name]
            return written


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of a program that was killed; what fails here fails there too."""


@contextlib.contextmanager
def served() -> Iterator[Bucket]:
    """Serve an empty bucket on a free port of this machine, as long as the context lasts."""
    bucket = Bucket()
    handler = type("Handler", (_Handler,), {"bucket": bucket})
    with _Server(("127.0.0.1", 0), handler) as server:
        bucket.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield bucket
        finally:
            bucket.closed.set()
            server.shutdown()
            thread.join()


OBJECT = re.compile(rf"(?:/download)?/storage/v1/b/{BUCKET}/o/([^/]+)(?:/moveTo/o/([^/]+))?")
LIST = f"/storage/v1/b/{BUCKET}/o"
UPLOAD = f"/upload/storage/v1/b/{BUCKET}/o"


class _Handler(BaseHTTPRequestHandler):
    """Answers one request."""

    bucket: Bucket
    protocol_version = "HTTP/1.1"  # connections stay open
    wbufsize = -1  # head and body in one packet: two would wait for each other

    def log_message(self, *_: Any) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        """Describe the bucket, list it, or describe or send an object."""
        path, query = self._asked()
        if path == f"/storage/v1/b/{BUCKET}":
            self._send_json({"kind": "storage#bucket", "name": BUCKET})
        elif path == LIST:
            self._send_json(self._listing(query))
        elif query.get("alt") == "media" or path.startswith("/download"):
            self._send_content(query)
        else:
            found = self._found()
            if found is not None:
                self._send_json(_described(*found))

    def do_POST(self) -> None:
        """Make an object, or rename one."""
        path, query = self._asked()
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if path == UPLOAD:
            self._upload(query, body)
            return
        match = OBJECT.fullmatch(urlsplit(self.path).path)
        found = self._found()
        if match is None or found is None:
            return
        target = unquote(match[2])
        self._send_json(_described(target, self.bucket.move(found[0], target)))

    def do_DELETE(self) -> None:
        """Delete an object."""
        found = self._found()
        if found is not None:
            self.bucket.objects.pop(found[0], None)
            self._send(204, b"")

    def _asked(self) -> tuple[str, dict[str, str]]:
        parts = urlsplit(self.path)
        return parts.path, {name: values[0] for name, values in parse_qs(parts.query).items()}

    def _found(self) -> tuple[str, Object] | None:
        """Return name and object of the request; None: there is none, and that was answered."""
        match = OBJECT.fullmatch(urlsplit(self.path).path)
        name = unquote(match[1]) if match else ""
        found = self.bucket.objects.get(name)
        if found is None:
            self._send_json({"error": {"code": 404, "message": f"no object {name}"}}, status=404)
            return None
        return name, found

    def _listing(self, query: dict[str, str]) -> dict[str, Any]:
        """Return the objects whose names start with a prefix, cut at a delimiter, on one page."""
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        first, end = query.get("startOffset", ""), query.get("endOffset", "")
        items, prefixes = [], set()
        for name in self.bucket.names(""):
            if not name.startswith(prefix) or name < first or (end and name >= end):
                continue
            rest = name.removeprefix(prefix)
            if delimiter and delimiter in rest:
                prefixes.add(prefix + rest.partition(delimiter)[0] + delimiter)
            else:
                items.append(_described(name, self.bucket.objects[name]))
        return {"kind": "storage#objects", "items": items, "prefixes": sorted(prefixes)}

    def _send_content(self, query: dict[str, str]) -> None:
        found = self._found()
        if found is None:
            return
        content, generation = found[1].content, found[1].generation
        if query.get("ifGenerationNotMatch") == str(generation):
            self._send(304, b"")
            return
        if query.get("ifGenerationMatch", str(generation)) != str(generation):
            self._send(412, b"")
            return
        headers = {"x-goog-generation": str(generation)}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not asked:
            self._send(200, content, headers)
            return
        start, end = int(asked[1]), int(asked[2] or len(content)) + 1
        if start >= len(content):
            self._send(416, b"")
            return
        part = content[start:end]
        headers["Content-Range"] = f"bytes {start}-{start + len(part) - 1}/{len(content)}"
        self._send(206, part, headers)

    def _upload(self, query: dict[str, str], body: bytes) -> None:
        kind = query.get("uploadType")
        if "upload_id" in query:
            self._go_on(query, body)
        elif kind == "media":
            self._write(query["name"], body, query)
        elif kind == "multipart":
            self._write(*_parts(body, self.headers["Content-Type"]), query)
        else:
            name = query["name"]
            self.bucket.uploads[name] = b""
            self._send(200, b"", {"Location": f"{self.bucket.url}{self.path}&upload_id={name}"})

    def _go_on(self, query: dict[str, str], body: bytes) -> None:
        """Take the next part of an upload; the object is there with the last one."""
        name = query["name"]
        content = self.bucket.uploads[name] = self.bucket.uploads[name] + body
        if self.headers["Content-Range"].endswith("/*"):
            self._send(308, b"", {"Range": f"bytes=0-{len(content) - 1}"})
        else:
            self._write(name, self.bucket.uploads.pop(name), query)

    def _write(self, name: str, content: bytes, query: dict[str, str]) -> None:
        only_if = query.get("ifGenerationMatch")
        written = self.bucket.write(name, content, only_if=int(only_if) if only_if else None)
        if written is None:
            self._send_json({"error": {"code": 412, "message": "another generation"}}, status=412)
        else:
            self._send_json(_described(name, written))

    def _send_json(self, value: dict[str, Any], status: int = 200) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def _described(name: str, found: Object) -> dict[str, Any]:
    return {
        "kind": "storage#object",
        "name": name,
        "bucket": BUCKET,
        "generation": str(found.generation),
        "metageneration": "1",
        "size": str(len(found.content)),
        "updated": "2026-01-01T00:00:00.000Z",
        "timeCreated": "2026-01-01T00:00:00.000Z",
    }


def _parts(body: bytes, content_type: str) -> tuple[str, bytes]:
    """Return name and bytes of an upload in two parts: what describes it, and the content."""
    boundary = b"--" + content_type.partition("boundary=")[2].strip('"').encode()
    described, content = body.split(b"\n" + boundary)[0:2]
    _, _, text = described.partition(b"\n\n")
    return json.loads(text)["name"], content.partition(b"\n\n")[2]
