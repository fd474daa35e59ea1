"""`rfclip segment URL`, from a server in this process."""

import io
import json
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from commands import check_result, files_below, refused, run, segment, state
from miniatures import scene
from PIL import Image

from rfclip.app import fetch
from rfclip.app.sources import result_name

pytestmark = [pytest.mark.usefixtures("folder"), pytest.mark.filterwarnings("ignore:rfclip-tiny is a demonstration")]
PNG, JPEG = io.BytesIO(), io.BytesIO()
scene(1).save(PNG, format="PNG")
scene(2, 40, 64).save(JPEG, format="JPEG")
FILES = {
    "/photo.png": PNG.getvalue(),
    "/deep/ein%20Bild.jpg": JPEG.getvalue(),
    "/thumb": JPEG.getvalue(),
    "/page.html": b"<html>",
}
ELSEWHERE = {
    "/moved.png": "/photo.png",
    "/file.png": "file:///etc/hosts",
    "/ftp.png": "ftp://127.0.0.1/photo.png",
    "/round.png": "/round.png",
}


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        path, _, query = self.path.partition("?")
        self.server.asked.append((self.path, self.headers["User-Agent"]))
        if path in ELSEWHERE:
            self.send_response(302)
            self.send_header("Location", ELSEWHERE[path])
            self.end_headers()
        elif path not in FILES:
            self.send_error(404)
        else:
            if query == "slow":
                time.sleep(0.3)
            data = FILES[path]
            self.send_response(200)
            if query != "endless":
                self.send_header("Content-Length", str(len(data) + (query == "cut") + 10**9 * (query == "large")))
            self.end_headers()
            self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def web():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.asked = []
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    server.url = f"http://127.0.0.1:{server.server_port}"
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_addresses_beside_files(web):
    """Each once, named after the last part of its path, and read with the picture's own decoder."""
    scene(3).save("mine.png")
    given = [f"{web.url}/moved.png?size=2", "mine.png", f"{web.url}/deep/ein Bild.jpg", f"{web.url}/thumb"]
    result = segment(*given, given[0])
    assert result.exit_code == 0, result.output
    assert "4 segmented" in result.stderr
    names = [["cat"], ["grass"], ["sky"]]
    _, record = check_result("rfclip-out/moved", scene(1), names)
    assert (record["image"], record["path"]) == (given[0], given[0])
    check_result("rfclip-out/ein Bild", scene(2, 40, 64), names)
    check_result("rfclip-out/thumb", scene(2, 40, 64), names)
    labels, _ = check_result("rfclip-out/mine", scene(3), names)
    assert len(files_below(Path("rfclip-out"))) == 12
    assert [path for path, _ in web.asked] == ["/moved.png?size=2", "/photo.png", "/deep/ein%20Bild.jpg", "/thumb"]
    assert all(agent.startswith("rfclip/") for _, agent in web.asked)
    scene(1).save("moved.png")
    assert segment("moved.png", "--out", "again").exit_code == 0
    assert np.array_equal(np.asarray(Image.open("again/moved.mask.png")), Image.open("rfclip-out/moved.mask.png"))


def test_results_of_an_address_are_kept(web):
    url = f"{web.url}/photo.png"
    assert segment(url).exit_code == 0
    before, asked = state(Path("rfclip-out")), len(web.asked)
    result = segment(url)
    assert (result.exit_code, len(web.asked)) == (0, asked)
    assert "1 skipped" in result.stderr
    result = segment(f"{url}?other")
    assert result.exit_code == 1
    assert "another picture's results" in result.stderr
    assert state(Path("rfclip-out")) == before
    assert segment(f"{url}?other", "--overwrite").exit_code == 0
    assert json.loads(Path("rfclip-out/photo.json").read_text())["path"] == f"{url}?other"


def test_an_address_in_parquet(web):
    pytest.importorskip("pyarrow")
    from rfclip.outputs import read_masks

    url = f"{web.url}/photo.png"
    assert segment(url, "--format", "parquet").exit_code == 0
    ((path, _),) = read_masks("rfclip-out")
    assert path == url
    assert "1 skipped" in segment(url, "--format", "parquet").stderr


@pytest.mark.parametrize(
    "asked, reason",
    [
        ("/none.png", "cannot be downloaded: HTTP Error 404: Not Found"),
        ("/page.html", "cannot be read as an image: its format is none of Pillow's"),
        ("/photo.png?large", "has more than 100 MB"),
        ("/photo.png?cut", r"cannot be downloaded: it ended after (\d+) of \d+ bytes"),
        ("/file.png", "cannot be downloaded: HTTP Error 302: .*'file:///etc/hosts' is not allowed"),
        ("/ftp.png", "cannot be downloaded: it redirects to ftp://127.0.0.1/photo.png, which is neither"),
        ("/round.png", "cannot be downloaded: HTTP Error 302: .*infinite loop"),
        ("/photo.png?slow", "cannot be downloaded: .*timed out"),
        ("/photo.png?endless", r"has more than \d+ MB"),
    ],
)
def test_addresses_that_fail(web, monkeypatch, asked, reason):
    monkeypatch.setattr(fetch, "TIMEOUT", 0.1)
    if "endless" in asked:
        monkeypatch.setattr(fetch, "LIMIT", 100)
        monkeypatch.setattr(fetch, "CHUNK", 10)
    url = f"{web.url}{asked}"
    with pytest.raises(ValueError, match=f"^{re.escape(url)} {reason}"):
        fetch.read(url)


@pytest.mark.parametrize("url", ["http://127.0.0.1:1/a.png", "http://user:word@127.0.0.1/a.png", "https:///a.png"])
def test_no_server(url):
    with pytest.raises(ValueError, match=f"^{re.escape(url)} cannot be downloaded: "):
        fetch.read(url)


def test_the_others_go_on(web):
    scene(3).save("mine.png")
    result = segment(f"{web.url}/none.png", "mine.png")
    assert result.exit_code == 1
    assert f"failed: {web.url}/none.png: cannot be downloaded: HTTP Error 404: Not Found" in result.stderr
    assert {path.partition(".")[0] for path in files_below(Path("rfclip-out"))} == {"mine"}


def test_an_address_that_is_none():
    refused(segment("http://[::1/a.png"), "http://[::1/a.png", "not an address")


def test_other_commands_say_that_they_read_files():
    refused(
        run("calibrate", "https://example.org/a.png"), "https://example.org/a.png", "only `rfclip segment` takes it"
    )


@pytest.mark.parametrize(
    "url, name",
    [
        ("https://example.org/a/b.c.JPG?x=/y.png#z", "b.c.JPG"),
        ("HTTP://example.org", "example.org"),
        ("https://example.org/%2e%2e", "picture"),
        ("https://example.org/a%2Fb%5Cc:d.png", "b_c_d.png"),
        (f"https://example.org/{'n' * 300}.png", f"{'n' * 96}.png"),
        ("photo.jpg", None),
        ("ftp://example.org/a.png", None),
    ],
)
def test_names(url, name):
    found = result_name(url)
    assert found == (None if name is None else Path(name))
