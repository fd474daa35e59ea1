"""What is given in place of a picture's path: addresses on the web."""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlsplit


def is_url(given: object) -> bool:
    """Whether this is the address of something on the web."""
    return isinstance(given, str) and given.lower().startswith(("http://", "https://"))


def result_name(given: str) -> Path | None:
    """The name, with its suffix, that the results of an address are called by; None if it is a path."""
    if not is_url(given):
        return None
    try:
        address = urlsplit(given)
    except ValueError as error:
        raise ValueError(f"{given}: not an address: {error}") from error
    name = PurePosixPath(unquote(address.path)).name or address.hostname or ""
    # Without what Windows does not allow in a name.
    return Path(re.sub(r'[\x00-\x1f\x7f<>:"/\\|?*]', "_", name)[-100:].strip(". ") or "picture")
