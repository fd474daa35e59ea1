"""What stands in front of the page: who may ask, how much may be sent, and what every answer says to the browser."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import json
import socket
import tempfile
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import IO
from urllib.parse import parse_qs

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

UPLOAD_LIMIT = 20 << 20  # bytes of a file
UPLOADS_EACH = 200 << 20  # bytes that the files of one visitor may take at a time
UPLOADS_ALL = 1 << 30  # bytes that the files of all visitors may take at a time
LEAST = 1 << 16  # bytes that a file counts for, however small
FORM = 1 << 16  # bytes of an upload beside the file
REQUEST_LIMIT = 256 << 10  # bytes of any other request
STALLED = 10  # seconds without a byte, after which a request is dropped
LONGEST = 300  # seconds that sending a request may take
LISTENING = 5  # seconds after which a request that nobody listens for leaves the line
API = "/gradio_api/"
UPLOAD, JOIN, LISTEN = f"{API}upload", f"{API}queue/join", f"{API}queue/data"
SENT = (UPLOAD, JOIN, f"{API}cancel", f"{API}reset")  # all that the page sends anything to
HEADERS = {
    # Gradio's page has scripts and styles in line, and builds functions from text.
    "content-security-policy": "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; object-src 'none'; "
    "base-uri 'self'; form-action 'self'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "same-origin",
}


class Hosts:
    """The names under which the page is served, so that no other name can be pointed at it (DNS rebinding).

    Args:
        host: the address listened on. For all addresses (0.0.0.0 or ::), every IP address is accepted, since rebinding
            needs a name, and this machine's own name.
        port: the port.
    """

    def __init__(self, host: str, port: int) -> None:
        self._any = host in ("0.0.0.0", "::")
        self._names = {"localhost", "127.0.0.1", "::1", (socket.gethostname() if self._any else host).lower()}
        self._port = port

    def __contains__(self, authority: str) -> bool:
        name, _, port = authority.rpartition(":") if not authority.endswith("]") else (authority, "", "")
        if not name:
            name, port = port, ""
        if (port or "80") != str(self._port):
            return False
        name = name.lower()
        if name.startswith("[") and name.endswith("]"):
            name = name[1:-1]
        elif ":" in name:
            return False
        return name in self._names or (self._any and _is_ip(name))


def _is_ip(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


class Uploads:
    """What the uploads take, by visitor and in all, for as long as they are kept.

    Args:
        kept: seconds.
    """

    def __init__(self, kept: float) -> None:
        self._kept = kept
        self._taken: Counter[str] = Counter()
        self._stored: deque[tuple[float, str, int]] = deque()

    def take(self, visitor: str, size: int) -> bool:
        """Whether a visitor may send as many bytes more, which then count."""
        while self._stored and self._stored[0][0] < time.monotonic() - self._kept:
            self.give(*self._stored.popleft()[1:])
        fits = self._taken[visitor] + size <= UPLOADS_EACH and self._taken.total() + size <= UPLOADS_ALL
        if fits:
            self._taken[visitor] += size
        return fits

    def give(self, visitor: str, size: int) -> None:
        """These bytes no longer count."""
        self._taken[visitor] -= size
        self._taken += Counter()  # without visitors who have nothing here

    def store(self, visitor: str, size: int) -> None:
        """These bytes are a file now, which is kept."""
        self._stored.append((time.monotonic(), visitor, size))


class Refused(Exception):
    """An answer in one line, instead of the page's."""

    def __init__(self, status: int, line: str) -> None:
        super().__init__(line)
        self.status = status


class Guard:
    """ASGI middleware around the page.

    It refuses requests under another name or from another page, receives everything sent before Gradio sees it, within
    limits of size and time, takes requests that nobody listens for out of the line, adds security headers, and says in
    one line what Gradio stumbles over.

    Args:
        app: the page.
        hosts: the names it is served under.
        folder: where uploads wait until they are complete.
        kept: seconds that the page keeps uploads.
        uploaded: called after each upload.
        leave: takes the requests of a session out of the line.
        say: prints a line.
    """

    def __init__(
        self,
        app: ASGIApp,
        hosts: Hosts,
        folder: Path,
        kept: float,
        uploaded: Callable[[], None],
        leave: Callable[[str], Awaitable[None]],
        say: Callable[[str], None],
    ) -> None:
        self.app, self.hosts, self.folder, self.uploads = app, hosts, folder, Uploads(kept)
        self._uploaded, self._leave, self._say = uploaded, leave, say
        self._one = asyncio.Lock()
        self._listeners: Counter[str] = Counter()
        self._leaving: dict[str, asyncio.Task[None]] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = False

        async def marked(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        try:
            self._check(scope)
            await self._pass(scope, receive, marked)
        except Refused as error:
            # What is still being sent is not read.
            answer = PlainTextResponse(f"{error}\n", error.status, {"connection": "close"})
            await answer(scope, receive, marked)
        except Exception as error:
            self._say(f"bad request: {scope['method']} {ascii(scope['path'][:200])}: {one_line(error)}")
            if not started:
                await PlainTextResponse("bad request\n", 400)(scope, receive, marked)

    def _check(self, scope: Scope) -> None:
        """Refuse names and origins that are not the page's, and what the page never sends."""
        headers = Headers(scope=scope)
        given = headers.getlist("host")
        if len(given) != 1 or given[0] not in self.hosts:
            raise Refused(421, "this page is not served under that name; open the address that rfclip serve printed")
        for origin in headers.getlist("origin"):
            scheme, _, authority = origin.partition("://")
            if scheme != "http" or authority not in self.hosts:
                raise Refused(403, "requests from other pages are not answered")
        if scope["method"] not in ("GET", "HEAD", "OPTIONS") and scope["path"] not in SENT:
            raise Refused(403, "the page does not send anything there")

    async def _pass(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] == LISTEN:
            session = parse_qs(scope["query_string"].decode("latin-1")).get("session_hash", [""])[-1]
            self._listeners[session] += 1
            try:
                await self.app(scope, receive, send)
            finally:
                self._listeners[session] -= 1
                self._listeners += Counter()
                self._expect(session)
        elif scope["method"] not in ("GET", "HEAD", "OPTIONS"):
            with tempfile.SpooledTemporaryFile(max_size=1 << 20, dir=str(self.folder)) as body:
                if scope["path"] == UPLOAD:
                    await self._upload(scope, receive, send, body)
                else:
                    await self._receive(receive, body, REQUEST_LIMIT, lambda size: True)
                    if scope["path"] == JOIN:
                        self._expect(_session(body))
                    await self.app(scope, _replayed(body, receive), send)
        else:
            await self.app(scope, receive, send)

    async def _upload(self, scope: Scope, receive: Receive, send: Send, body: IO[bytes]) -> None:
        """Pass a complete upload on, so that one broken off leaves nothing."""
        visitor, taken = (scope["client"] or ("",))[0], 0

        def take(size: int) -> bool:
            nonlocal taken
            size = size if taken else max(size, LEAST)
            fits = self.uploads.take(visitor, size)
            taken += size if fits else 0
            return fits

        try:
            await self._receive(receive, body, UPLOAD_LIMIT + FORM, take)
        except BaseException:
            self.uploads.give(visitor, taken)
            raise
        self.uploads.store(visitor, taken)
        async with self._one:
            try:
                await self.app(scope, _replayed(body, receive), send)
            finally:
                self._uploaded()

    async def _receive(self, receive: Receive, body: IO[bytes], limit: int, take: Callable[[int], bool]) -> None:
        """Read a request to its end; Refused if it is too long, too slow, broken off, or `take` says no to a part."""
        size, fits, more, end = 0, True, True, time.monotonic() + LONGEST
        while more:
            try:
                message = await asyncio.wait_for(receive(), min(STALLED, end - time.monotonic()))
            except asyncio.TimeoutError as error:
                raise Refused(408, "nothing came for too long; send it again") from error
            if message["type"] == "http.disconnect":
                raise Refused(400, "broken off")
            part, more = message.get("body", b""), message.get("more_body", False)
            size += len(part)
            if size > limit:
                raise Refused(413, f"at most {limit >> 10} KB")
            fits = fits and take(len(part))
            if fits:  # else read on, since a browser shows no answer that comes before it has sent everything
                body.write(part)
        if not fits:
            raise Refused(429, "too many uploads; they are removed after about an hour")

    def _expect(self, session: str) -> None:
        """Take a session's requests out of the line unless somebody listens for them soon."""

        async def wait() -> None:
            await asyncio.sleep(LISTENING)
            if session not in self._listeners:
                await self._leave(session)
            self._leaving.pop(session)

        earlier = self._leaving.pop(session, None)
        if earlier is not None:
            earlier.cancel()  # it would take the newest request out too soon
        self._leaving[session] = asyncio.create_task(wait())


def one_line(error: Exception) -> str:
    """An error for the terminal: what a visitor wrote in it moves no cursor and fills no screen."""
    return f"{type(error).__name__} {ascii(str(error)[:200])}"


def _replayed(body: IO[bytes], receive: Receive) -> Receive:
    """What was received, in parts, and then the connection's own messages."""
    body.seek(0)
    done = False

    async def replay() -> Message:
        nonlocal done
        if done:
            return await receive()
        part = body.read(1 << 20)
        done = len(part) < 1 << 20
        return {"type": "http.request", "body": part, "more_body": not done}

    return replay


def _session(body: IO[bytes]) -> str:
    body.seek(0)
    with contextlib.suppress(ValueError, RecursionError, AttributeError):
        return str(json.load(body).get("session_hash"))
    return ""
