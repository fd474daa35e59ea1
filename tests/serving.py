"""`rfclip serve` as a process of its own, and requests to it that no browser makes."""

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import uuid

import pytest


def free_port():
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


def heed_signals():
    """A server started where a signal is ignored, as under nohup or in the background of a shell, ignores it too."""
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)


def started(port, folder, *options, host="127.0.0.1"):
    """The command, once it serves; its temporary files, caches and working directory are below the folder."""
    places = {name: folder / name for name in ("tmp", "home", "work")}
    for place in places.values():
        place.mkdir(exist_ok=True)
    environment = os.environ | {"TMPDIR": str(places["tmp"]), "HOME": str(places["home"]), "HF_HUB_OFFLINE": "1"}
    environment |= {"XDG_CACHE_HOME": str(places["home"]), "MPLCONFIGDIR": str(places["home"])}
    process = subprocess.Popen(
        [sys.executable, "-m", "rfclip", "serve", "--port", str(port), *options],
        cwd=places["work"],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heed_signals,
    )
    said = []
    for line in process.stderr:
        said.append(line)
        if f"Open http://{host}:{port}/" in line:
            return process
    pytest.fail("".join(said))


def stopped(process, number):
    """The exit status after a signal, and what was said since the start."""
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    return process.returncode, said


def leftovers(folder):
    """The files below the folder, other than Matplotlib's list of fonts."""
    return [path for path in folder.rglob("*") if path.is_file() and "fontlist" not in path.name]


def ask(port, method, path, body=None, source="127.0.0.1", **headers):
    """Status, headers and text of an answer, or of the part of it that came."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60, source_address=(source, 0))
    try:
        connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
        answer = connection.getresponse()
        try:
            text = answer.read()
        except http.client.IncompleteRead as error:
            text = error.partial
        return answer.status, answer.headers, text.decode("utf-8", "replace")
    finally:
        connection.close()


def form(content, name="picture.png", field="files"):
    """An upload's body and content type."""
    boundary = uuid.uuid4().hex
    head = f'--{boundary}\r\nContent-Disposition: form-data; name="{field}"; filename="{name}"\r\n\r\n'
    return head.encode() + content + f"\r\n--{boundary}--\r\n".encode(), f"multipart/form-data; boundary={boundary}"


def upload(port, content, **options):
    body, kind = form(content)
    return ask(port, "POST", "/gradio_api/upload", body, content_type=kind, **options)


class Visitor:
    """Asks as the page does, and listens or not."""

    def __init__(self, port, picture):
        self.port, self.session = port, uuid.uuid4().hex
        config = json.loads(ask(port, "GET", "/config")[2])
        self.segment = next(entry["id"] for entry in config["dependencies"] if entry["api_name"] == "segment")
        self.file = {"path": json.loads(upload(port, picture)[2])[0], "meta": {"_type": "gradio.FileData"}}

    def join(self, classes, session=None):
        data = [self.file, classes, "rf-clip", "rfclip-tiny", 2.0, 0.3, "all", "own", 0.0, False, False, None]
        body = {"fn_index": self.segment, "session_hash": session or self.session, "data": data}
        return ask(self.port, "POST", "/gradio_api/queue/join", json.dumps(body), content_type="application/json")[0]

    def listen(self):
        """The last message about what this visitor asked."""
        text = ask(self.port, "GET", f"/gradio_api/queue/data?session_hash={self.session}")[2]
        messages = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: ")]
        return next(message for message in messages if message["msg"] == "process_completed")
