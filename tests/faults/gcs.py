"""A bucket that misbehaves: the part of Google's JSON API that gcsfs speaks, in memory, with faults by the request.

`answer` is a plain function from a request to what a good server would say; a fault is what becomes of the two on their way.
The server runs in a thread of the test's process and listens on this machine alone.
"""

import asyncio
import base64
import hashlib
import itertools
import json
import threading
from collections.abc import Callable, Mapping
from typing import NamedTuple
from urllib.parse import unquote

import google_crc32c
from aiohttp import web


class Answer(NamedTuple):
    """Of the server."""

    status: int = 200
    body: bytes = b""
    headers: Mapping[str, str] = {}


ACTIONS = ("503", "429", "reset", "hang", "slow", "truncate", "corrupt", "commit-then-reset")
HANG = 10.0  # seconds: above the limits that tests set
WORDS = {
    401: "Anonymous caller does not have storage.objects.create access",
    403: "account@example does not have storage.objects.create access",
    404: "The specified bucket does not exist.",
}


def problem(status: int, message: str = "") -> Answer:
    """An error as the API words it."""
    message = message or WORDS.get(status, f"injected {status}")
    return Answer(status, json.dumps({"error": {"code": status, "message": message}}).encode(), {"Content-Type": "application/json"})


class FakeGcs:
    """`buckets` maps a bucket's name to its objects; `fault(method, path)` names what happens to a request, or a status, or None."""

    def __init__(self, *names: str):
        self.buckets: dict[str, dict[str, bytes]] = {name: {} for name in names}
        self.fault: Callable[[str, str], str | None] = lambda method, path: None
        self.log: list[tuple[str, str]] = []
        self.slow = 0.02
        self._uploads: dict[str, tuple[str, str, bytearray]] = {}
        self._ids = itertools.count(1)
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        threading.Thread(target=self._serve, daemon=True).start()
        assert self._ready.wait(30)

    @property
    def url(self) -> str:
        """For STORAGE_EMULATOR_HOST."""
        return f"http://127.0.0.1:{self.port}"

    def reset(self) -> None:
        """Empty buckets, no faults, no log."""
        self.fault = lambda method, path: None
        for objects in self.buckets.values():
            objects.clear()
        self.log.clear()

    def close(self) -> None:
        """End the server."""

        def end() -> None:
            for task in asyncio.all_tasks(self._loop):
                task.cancel()
            self._loop.call_later(0.1, self._loop.stop)

        self._loop.call_soon_threadsafe(end)

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        app = web.Application(client_max_size=1 << 30)
        app.router.add_route("*", "/{path:.*}", self._handle)

        async def start() -> None:
            runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
            await runner.setup()
            site = web.TCPSite(runner, "127.0.0.1", 0)
            await site.start()
            self.port = site._server.sockets[0].getsockname()[1]

        self._loop.run_until_complete(start())
        self._ready.set()
        self._loop.run_forever()

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        self.log.append((request.method, request.raw_path))
        action = self.fault(request.method, request.raw_path)
        if action == "reset":
            return self._cut(request)
        if action == "hang":
            await asyncio.sleep(HANG)
            return self._cut(request)
        if action == "slow":
            await asyncio.sleep(self.slow)
        if action is not None and action.isdigit():
            return self._said(problem(int(action)))
        if action == "corrupt" and request.method != "GET" and len(body) > 300:
            body = flipped(body, at=len(body) - 40)  # in the content, behind the names
        answer = self.answer(request.method, request.raw_path, request.headers, body, query=dict(request.query))
        if action == "commit-then-reset":
            return self._cut(request)
        if action == "corrupt" and request.method == "GET" and answer.body:
            answer = answer._replace(body=flipped(answer.body, at=len(answer.body) // 2))
        if action == "truncate" and len(answer.body) > 1:
            response = web.StreamResponse(status=answer.status, headers={**answer.headers, "Content-Length": str(len(answer.body))})
            await response.prepare(request)
            await response.write(answer.body[: len(answer.body) // 2])
            return self._cut(request)
        return self._said(answer)

    def _cut(self, request: web.Request) -> web.Response:
        if request.transport is not None:
            request.transport.abort()
        return web.Response(status=500)

    def _said(self, answer: Answer) -> web.Response:
        return web.Response(status=answer.status, body=answer.body, headers=answer.headers)

    def answer(self, method: str, path: str, headers: Mapping[str, str], body: bytes, *, query: Mapping[str, str]) -> Answer:
        """What a good server says to a request, and does."""
        parts = [unquote(p) for p in path.partition("?")[0].strip("/").split("/")]
        place = parts[parts.index("b") + 1 :]  # bucket, "o", name
        bucket, name = place[0], "/".join(place[2:])
        if bucket not in self.buckets:
            return problem(404)
        if parts[0] == "upload":
            return self._upload(bucket, headers, body, query=query)
        objects = self.buckets[bucket]
        if not name:
            return self._list(bucket, query)
        if name not in objects:
            return problem(404, f"No such object: {bucket}/{name}")
        if method == "DELETE":
            del objects[name]
            return Answer(204)
        if query.get("alt") != "media":
            return described(bucket, name, objects[name])
        return sent(objects[name], headers.get("Range"))

    def _list(self, bucket: str, query: Mapping[str, str]) -> Answer:
        prefix, after = query.get("prefix", ""), query.get("pageToken", "")
        names = sorted(n for n in self.buckets[bucket] if n.startswith(prefix) and n > after)
        size = int(query.get("maxResults", 1000))
        page = {"kind": "storage#objects", "items": [facts(bucket, n, self.buckets[bucket][n]) for n in names[:size]]}
        if len(names) > size:
            page["nextPageToken"] = names[size - 1]
        return Answer(200, json.dumps(page).encode(), {"Content-Type": "application/json"})

    def _upload(self, bucket: str, headers: Mapping[str, str], body: bytes, *, query: Mapping[str, str]) -> Answer:
        if query["uploadType"] == "multipart":
            mark = b"--" + headers["Content-Type"].split('boundary="')[1].rstrip('"').encode()
            _, about, rest = body.split(mark, 2)
            content = rest[: rest.rindex(b"\n" + mark + b"--")].split(b"\n\n", 1)[1]
            return self._put(bucket, json.loads(about.split(b"\n\n", 1)[1])["name"], content)
        if "upload_id" not in query:
            key = str(next(self._ids))
            self._uploads[key] = (bucket, query["name"], bytearray())
            return Answer(200, b"", {"Location": f"{self.url}/upload/storage/v1/b/{bucket}/o?uploadType=resumable&upload_id={key}"})
        bucket, name, data = self._uploads[query["upload_id"]]
        if "Content-Range" not in headers:
            return Answer(499)  # given up
        span, total = headers["Content-Range"].removeprefix("bytes ").split("/")
        start = int(span.split("-")[0])
        data[start:] = body
        if len(data) < int(total):
            return Answer(308, b"", {"Range": f"bytes=0-{len(data) - 1}"})
        return self._put(bucket, name, bytes(data))

    def _put(self, bucket: str, name: str, content: bytes) -> Answer:
        self.buckets[bucket][name] = content
        return described(bucket, name, content)


def sent(content: bytes, asked: str | None) -> Answer:
    """An object, or the range of its bytes that was asked for."""
    headers = {"X-Goog-Hash": f"crc32c={crc(content)},md5={md5(content)}"}
    if asked is None:
        return Answer(200, content, headers)
    first, last = asked.removeprefix("bytes=").split("-")
    start, stop = int(first), min(int(last) + 1 if last else len(content), len(content))
    if start >= len(content):
        return problem(416, "Requested range not satisfiable")
    return Answer(206, content[start:stop], {**headers, "Content-Range": f"bytes {start}-{stop - 1}/{len(content)}"})


def described(bucket: str, name: str, content: bytes) -> Answer:
    """What is known of an object, as an answer."""
    return Answer(200, json.dumps(facts(bucket, name, content)).encode(), {"Content-Type": "application/json"})


def facts(bucket: str, name: str, content: bytes) -> dict[str, str]:
    """What is known of an object."""
    return {"name": name, "bucket": bucket, "size": str(len(content)), "crc32c": crc(content), "md5Hash": md5(content), "generation": "1"}


def crc(content: bytes) -> str:
    """As the API writes it."""
    return base64.b64encode(google_crc32c.Checksum(content).digest()).decode()


def md5(content: bytes) -> str:
    """As the API writes it."""
    return base64.b64encode(hashlib.md5(content).digest()).decode()


def flipped(data: bytes, *, at: int) -> bytes:
    """With one bit changed."""
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
