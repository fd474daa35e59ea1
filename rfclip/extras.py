"""Packages that only some commands need, and the extra of this package that installs them."""

from __future__ import annotations

from importlib.util import find_spec


def require(what: str, extra: str, *packages: str) -> None:
    """Check that packages are installed, without importing them.

    Args:
        what: needs the packages.
        extra: installs them.
        packages: by the names that they are imported by.

    Raises:
        ValueError: some are missing; the message says how to install them.
    """
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        raise ValueError(f'{what} needs {" and ".join(missing)}: pip install "rfclip[{extra}]"')
