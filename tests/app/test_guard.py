"""`rfclip serve` and requests that its page does not make."""

import asyncio
import contextlib
import json
import signal
import socket
import time
from urllib.parse import quote

import pytest
from helpers import linux_only
from serving import Visitor, ask, form, free_port, leftovers, started, stopped, upload

from rfclip.towers.loading import tiny_folder

pytest.importorskip("gradio", reason='no Gradio: pip install "rfclip[serve]"')
from rfclip.app import guard  # noqa: E402

SCENE = (tiny_folder() / "scene.png").read_bytes()


@pytest.fixture(scope="module")
def port(tmp_path_factory):
    """A server that, whatever the tests send, never prints a traceback and leaves nothing."""
    folder, port = tmp_path_factory.mktemp("guard"), free_port()
    process = started(port, folder)
    yield port
    wrong = json.dumps({"fn_index": 99, "session_hash": "x", "data": []}).encode()
    ask(port, "POST", "/gradio_api/queue/join", wrong, content_type="application/json")  # Gradio stumbles over it
    status, said = stopped(process, signal.SIGTERM)
    assert status == 0
    assert [line for line in said.splitlines() if not line.startswith("bad request: ")] == []
    assert "bad request: " in said and leftovers(folder) == []


@pytest.mark.parametrize("name", ["localhost", "127.0.0.1", "[::1]", "LOCALHOST"])
def test_its_own_names(port, name):
    assert ask(port, "GET", "/config", host=f"{name}:{port}")[0] == 200
    assert ask(port, "GET", "/config", origin=f"http://{name}:{port}")[0] == 200


@pytest.mark.parametrize(
    "name",
    ["evil.example:{}", "127.0.0.1", "127.0.0.1:1", "localhost.evil.example:{}", "10.0.0.1:{}", "localhost@x:{}", ""],
)
@pytest.mark.parametrize("method, path", [("GET", "/"), ("POST", "/gradio_api/upload"), ("OPTIONS", "/config")])
def test_another_name(port, name, method, path):
    """DNS rebinding: a name that someone else points at this address."""
    status, headers, text = ask(port, method, path, host=name.format(port))
    assert status == 421 and len(text.splitlines()) == 1 and "not served under that name" in text
    assert headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize("origin", ["http://evil.example", "http://127.0.0.1:1", "https://127.0.0.1:{}", "null", ""])
@pytest.mark.parametrize("path", ["/", "/gradio_api/upload", "/gradio_api/queue/join"])
def test_another_page(port, origin, path):
    body, kind = form(SCENE)
    for method in ("POST", "OPTIONS", "GET"):
        status, _, text = ask(port, method, path, body, content_type=kind, origin=origin.format(port))
        assert status == 403 and len(text.splitlines()) == 1 and "other pages" in text


def test_names_for_other_machines():
    """Served to all addresses: any address may be the one they use, and of names only this machine's."""
    every, one, plain = guard.Hosts("0.0.0.0", 7860), guard.Hosts("box.example", 7860), guard.Hosts("127.0.0.1", 80)
    for name in ("192.168.1.7", "[fe80::1]", "localhost", socket.gethostname()):
        assert f"{name}:7860" in every
    for name in ("evil.example", "192.168.1.7.evil.example", "fe80::1", "[evil.example]", ""):
        assert f"{name}:7860" not in every
    assert "box.example:7860" in one and "192.168.1.7:7860" not in one
    assert "localhost" in plain and "localhost:80" in plain and "localhost:7860" not in plain


def test_headers(port):
    visitor = Visitor(port, SCENE)
    for path in (
        "/",
        "/config",
        f"/gradio_api/file={quote(visitor.file['path'])}",
        "/gradio_api/file=/etc/passwd",
        "/x",
    ):
        headers = ask(port, "GET", path)[1]
        assert headers["x-content-type-options"] == "nosniff" and headers["x-frame-options"] == "DENY"
        assert "frame-ancestors 'none'" in headers["content-security-policy"]
        assert "default-src 'self'" in headers["content-security-policy"]


def test_bad_requests(port):
    """Each is answered, and the server says at most a line about it: the fixture looks for more."""
    visitor = Visitor(port, SCENE)
    join, event = "/gradio_api/queue/join", {"fn_index": visitor.segment, "session_hash": visitor.session, "data": []}
    settings = [visitor.file, "dog", "rf-clip", "rfclip-tiny", 2.0, 0.3, "all", "own", 0.0]
    wrong = [{"fn_index": 99}, {"fn_index": "x"}, {"data": None}, {"data": [1, 2]}, {"session_hash": [1]}]
    wrong += [
        {"data": [{"path": path, "meta": {"_type": "gradio.FileData"}}, *settings[1:]]}
        for path in ("/etc/passwd", "\0")
    ]
    wrong += [
        {"data": [*settings[:place], value, *settings[place + 1 :]]} for place in range(9) for value in ([], {}, 1e999)
    ]
    for change in wrong:
        visitor.session = event["session_hash"]
        status = ask(port, "POST", join, json.dumps(event | change), content_type="application/json")[0]
        assert status in (200, 400, 422, 500), change
        if status == 200:
            visitor.listen()
    for body in ("", "{", "[]", "null", '"x"', "[" * 100_000, "\xff\xfe", "{" + " " * (300 << 10) + "}"):
        assert 400 <= ask(port, "POST", join, body.encode("latin-1"), content_type="application/json")[0] <= 500
    body, kind = form(SCENE, field="other")
    ask(port, "POST", "/gradio_api/upload", body, content_type=kind)
    ask(port, "POST", "/gradio_api/upload", body.replace(b'filename="picture.png"', b""), content_type=kind)
    assert ask(port, "POST", "/gradio_api/upload", body, content_type="multipart/form-data")[0] == 400
    assert ask(port, "POST", "/gradio_api/upload", form(b"", "../../x\r\n.png")[0], content_type="text/plain")[0] == 400
    for path in (
        "proxy=http://127.0.0.1:1/",
        "call/a/b",
        "queue/data?session_hash=none",
        "stream/a/b/c/x.ts",
        "file=%00",
    ):
        ask(port, "GET", f"/gradio_api/{path}")
    for path in ("run/segment", "call/segment", "component_server", "process_recording", "vibe-edit/"):
        assert ask(port, "POST", f"/gradio_api/{path}", "{}", content_type="application/json")[0] == 403
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(b"\x16\x03\x01 no HTTP\r\n\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.1 400")


def begun(port):
    """An upload, and what is missing at its end."""
    body, kind = form(SCENE * 30)
    connection = socket.create_connection(("127.0.0.1", port), timeout=60)
    head = f"POST /gradio_api/upload HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: {kind}\r\n"
    connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body[:-100])
    return connection


def test_uploads_that_stall_or_break_off(tmp_path):
    port = free_port()
    process = started(port, tmp_path)
    before = leftovers(tmp_path / "tmp")
    with contextlib.closing(begun(port)) as stalled:
        for _ in range(3):
            begun(port).close()
        began = time.monotonic()
        said = b"".join(iter(lambda: stalled.recv(1000), b""))
        assert said.startswith(b"HTTP/1.1 408") and said.endswith(b"send it again\n")
        assert guard.STALLED - 2 < time.monotonic() - began < guard.STALLED + 10
    assert leftovers(tmp_path / "tmp") == before
    body, kind = form(SCENE, field="other")  # complete, but nothing that Gradio takes
    ask(port, "POST", "/gradio_api/upload", body, content_type=kind)
    time.sleep(1)  # it is removed after the answer
    assert leftovers(tmp_path / "tmp") == before
    assert stopped(process, signal.SIGTERM) == (0, "")


@linux_only  # elsewhere this machine has one address
def test_uploads_are_bounded(tmp_path):
    """Twenty pictures of 19 MB: one visitor fills their own share, and another still has theirs."""
    port = free_port()
    process = started(port, tmp_path)
    statuses = [upload(port, bytes([number]) * (19 << 20))[0] for number in range(20)]
    assert statuses == [200] * 10 + [429] * 10
    assert upload(port, SCENE)[0] == 200, "there is room for a small one"
    assert upload(port, bytes([99]) * (19 << 20), source="127.0.0.2")[0] == 200
    assert upload(port, bytes(21 << 20), source="127.0.0.3")[0] == 413
    taken = sum(path.stat().st_size for path in leftovers(tmp_path / "tmp"))
    assert 11 * 19 << 20 < taken < guard.UPLOADS_EACH + (20 << 20)
    assert stopped(process, signal.SIGTERM) == (0, "") and leftovers(tmp_path / "tmp") == []


def test_the_room_for_uploads(monkeypatch):
    now = 0.0
    monkeypatch.setattr(guard.time, "monotonic", lambda: now)
    uploads, full = guard.Uploads(kept=100), guard.UPLOADS_EACH
    for visitor in range(guard.UPLOADS_ALL // full):
        assert uploads.take(str(visitor), full) and not uploads.take(str(visitor), 1)
        uploads.store(str(visitor), full)
    left = guard.UPLOADS_ALL % full
    assert uploads.take("late", left) and not uploads.take("late", 1)
    uploads.give("late", left)
    assert uploads.take("later", left)
    now = 101.0
    assert uploads.take("0", full), "the old ones are gone"


def test_abandoned_requests(port):
    """Requests that nobody listens for leave the line: the next visitor waits for the one that runs, not for all."""
    visitor = Visitor(port, SCENE)
    for number in range(30):
        classes = ", ".join(f"name {number} {count}" for count in range(60))  # some seconds each
        assert visitor.join(classes, session=f"gone{number}") == 200
        if number % 2:  # these did listen
            with socket.create_connection(("127.0.0.1", port)) as connection:
                path = f"/gradio_api/queue/data?session_hash=gone{number}"
                connection.sendall(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n\r\n".encode())
                assert connection.recv(100).startswith(b"HTTP/1.1 200")
    began = time.monotonic()
    assert visitor.join("dog, grass, sky") == 200
    assert visitor.listen()["success"]
    assert time.monotonic() - began < 40


@pytest.mark.parametrize("number", ["SIGTERM", "SIGHUP", "SIGINT"])
def test_stopped_in_a_request(tmp_path, number):
    """It ends soon, says nothing, and leaves nothing, whatever signal stops it."""
    port = free_port()
    process = started(port, tmp_path)
    visitor = Visitor(port, SCENE)
    visitor.join(", ".join(f"name {count}" for count in range(255)))
    time.sleep(2)
    began = time.monotonic()
    assert stopped(process, getattr(signal, number)) == (0, "")
    assert time.monotonic() - began < 20
    assert [path for path in (tmp_path / "tmp").iterdir() if path.name.startswith("rfclip")] == []


def test_killed(tmp_path):
    """What a killed server leaves, uploads among it, goes when the next one starts."""
    first = started(free_port(), tmp_path)
    port = free_port()
    killed = started(port, tmp_path)
    upload(port, SCENE)
    killed.kill()
    killed.wait()
    folders = set((tmp_path / "tmp").glob("rfclip*"))
    assert len(folders) == 2
    second = started(free_port(), tmp_path)
    assert len(folders & set((tmp_path / "tmp").glob("rfclip*"))) == 1, "the first one lives"
    assert [stopped(process, signal.SIGTERM) for process in (first, second)] == [(0, "")] * 2
    assert list((tmp_path / "tmp").glob("rfclip*")) == []


def test_another_question_while_the_first_is_being_forgotten(monkeypatch):
    """A visitor who asks again just before their last connection is forgotten keeps their place."""
    monkeypatch.setattr(guard, "LISTENING", 0.2)
    left = []

    async def leave(session):
        left.append(session)

    async def talk():
        front = guard.Guard(None, guard.Hosts("127.0.0.1", 1), None, 1, None, leave, print)
        front._expect("a")
        front._expect("b")
        await asyncio.sleep(0.15)
        front._expect("a")
        await asyncio.sleep(0.1)
        assert left == ["b"]
        front._listeners["a"] += 1
        await asyncio.sleep(0.2)
        assert left == ["b"] and not front._leaving

    asyncio.run(talk())


def test_an_ipv6_host(tmp_path):
    if not socket.has_ipv6:
        pytest.skip("no IPv6")
    port = free_port()
    process = started(port, tmp_path, "--host", "::1", host="[::1]")
    with socket.create_connection(("::1", port), timeout=60) as connection:
        connection.sendall(f"GET /config HTTP/1.1\r\nHost: [::1]:{port}\r\n\r\n".encode())
        assert connection.recv(1000).startswith(b"HTTP/1.1 200")
    assert stopped(process, signal.SIGTERM) == (0, "")
