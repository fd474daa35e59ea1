"""The documented address of `read_masks`; the code is in `rfclip.app.outputs`."""

from rfclip.app.outputs import read_masks

__all__ = ["read_masks"]
