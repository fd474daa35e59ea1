"""Pictures from the web."""

from __future__ import annotations

import http.client
import tempfile
from pathlib import Path
from typing import IO, Any
from urllib.parse import quote
from urllib.request import HTTPRedirectHandler, Request, build_opener

from PIL import Image

from rfclip import __version__
from rfclip.app.sources import is_url, result_name
from rfclip.images import to_rgb

LIMIT = 100_000_000  # bytes of a picture
TIMEOUT = 30.0  # seconds without an answer
CHUNK = 1 << 16


def read(source: str) -> Image.Image:
    """The picture at a path or an address, as `to_rgb` gives it; what is downloaded is not kept.

    Raises:
        ValueError: as `to_rgb`; or the address does not answer, answers with an error, with more than `LIMIT` bytes or
            with fewer than it says, or redirects to something else than http and https.
        FileNotFoundError: there is no such file.
    """
    name = result_name(source)
    if name is None:
        return to_rgb(source)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"picture{name.suffix}")
        _download(source, path)
        try:
            return to_rgb(path)
        except ValueError as error:
            raise ValueError(str(error).replace(str(path), source)) from error


def _download(url: str, path: Path) -> None:
    try:
        # Many servers refuse Python's own agent. Spaces and letters beyond ASCII are written as on the wire.
        request = Request(quote(url, safe="%/:=&?~#+!$,;'@()*[]"), headers={"User-Agent": f"rfclip/{__version__}"})
        with build_opener(_WebOnly).open(request, timeout=TIMEOUT) as answer, path.open("wb") as file:
            length = int(answer.headers.get("Content-Length") or 0)
            count = length if length > LIMIT else 0
            while count <= LIMIT and (chunk := answer.read(CHUNK)):
                count += file.write(chunk)
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise ValueError(f"{url} cannot be downloaded: {error}") from error
    if count > LIMIT:
        raise ValueError(f"{url} has more than {LIMIT // 1_000_000} MB: download and shrink it")
    if count < length:
        raise ValueError(f"{url} cannot be downloaded: it ended after {count} of {length} bytes")


class _WebOnly(HTTPRedirectHandler):
    def redirect_request(
        self, req: Request, fp: IO[bytes], code: int, msg: str, headers: Any, newurl: str
    ) -> Request | None:
        if not is_url(newurl):
            raise ValueError(f"it redirects to {newurl}, which is neither http nor https")
        return super().redirect_request(req, fp, code, msg, headers, newurl)
