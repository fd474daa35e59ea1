"""docs/large.md: its commands and its Python run as they stand, on small clips and pictures."""

import re
import shlex
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from commands import run

from rfclip.tiny.scenes import make_scene

pytest.importorskip("av")
pytest.importorskip("rasterio")
from source_files import PLACE, make_clip, write_raster  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:rfclip-tiny is a demonstration")
PAGE = Path(__file__).parents[2].joinpath("docs/large.md").read_text("utf-8").replace("20_000", "200")
STEP = re.compile(r"^    rfclip (?P<command>(?:\\\n|[^\n])*)$|^```py\n(?P<code>.*?)^```$", re.DOTALL | re.MULTILINE)


@pytest.fixture
def web(folder):
    """A server of the folder."""

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=folder))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_the_page(web):
    pixels = make_scene(1).image
    make_scene(1).picture().save("photo.jpg")
    make_clip("clip.mp4", height=56, width=64)
    write_raster("field.tif", pixels, **PLACE)
    write_raster("slide.svs", np.kron(pixels, np.ones((2, 2, 1), np.uint8)), tiled=True, **PLACE)
    write_raster("sentinel.tif", np.dstack([pixels, pixels[..., 0]]).astype(np.uint16) * 12, **PLACE)
    done = []
    for step in STEP.finditer(PAGE):
        if step["code"]:
            exec(compile(step["code"], "docs/large.md", "exec"), {})
        elif "camera:0" not in step["command"]:  # there may be one
            command = shlex.split(step["command"].replace("\\\n", "").replace("https://example.org", web))
            result = run(*command, *([] if "--model" in command else ["--model", "rfclip-tiny"]))
            assert result.exit_code == 0, result.output
            done.append(step["command"].split()[1].rpartition("/")[2])
    assert done == ["photo.jpg", "clip.mp4", "field.tif", "sentinel.tif", "slide.svs", "big.tif"]
