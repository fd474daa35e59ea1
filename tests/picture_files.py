"""Writers of picture files, byte by byte, for layouts that Pillow does not write."""

import struct
import zlib

import numpy as np

SAMPLE_FORMATS = {"u": 1, "i": 2, "f": 3}
TIFF_TYPES = {"H": 3, "I": 4, "B": 7}


def packed(values, bits, order):
    """The bytes of rows of samples [rows, n], each row padded to a whole byte."""
    if bits % 8 == 0:
        return values.astype(values.dtype.newbyteorder(order)).tobytes()
    places = (values[..., None].astype(np.int64) >> np.arange(bits)[::-1]) & 1
    return np.packbits(places.reshape(len(values), -1).astype(np.uint8), axis=1).tobytes()


def tiff(
    samples,
    photometric,
    bits=None,
    *,
    order="<",
    planar=1,
    deflate=False,
    predictor=1,
    rows=None,
    tile=None,
    fill_order=1,
    extra=(),
    tags=(),
):
    """A TIFF file of samples [H, W] or [H, W, n]: in strips of some rows, or in square tiles.

    `order` is "<" or ">"; `extra` are the kinds of the samples after the colours; `tags` are (tag, code, values).
    """
    samples = samples if samples.ndim == 3 else samples[..., None]
    height, width, count = samples.shape
    bits = bits or samples.dtype.itemsize * 8
    across, down = (tile, tile) if tile else (width, rows or height)
    planes = np.split(samples, count, axis=2) if planar == 2 else [samples]
    segments = []
    for plane in planes:
        for top in range(0, height, down):
            for left in range(0, width, across):
                block = plane[top : top + down, left : left + across]
                if tile:
                    block = np.pad(block, ((0, tile - block.shape[0]), (0, tile - block.shape[1]), (0, 0)))
                if predictor == 2:
                    block = np.concatenate([block[:, :1], np.diff(block, axis=1)], axis=1)
                data = packed(block.reshape(len(block), -1), bits, order)
                data = zlib.compress(data) if deflate else data
                if fill_order == 2:
                    data = np.packbits(np.unpackbits(np.frombuffer(data, np.uint8)), bitorder="little").tobytes()
                segments.append(data)
    entries = {
        256: ("I", [width]),
        257: ("I", [height]),
        258: ("H", [bits] * count),
        259: ("H", [8 if deflate else 1]),
        262: ("H", [photometric]),
        266: ("H", [fill_order]),
        277: ("H", [count]),
        284: ("H", [planar]),
        317: ("H", [predictor]),
        339: ("H", [SAMPLE_FORMATS[samples.dtype.kind]] * count),
    }
    sizes = [len(segment) for segment in segments]
    starts = list(8 + np.cumsum([0, *sizes[:-1]]))
    if tile:
        entries |= {322: ("I", [tile]), 323: ("I", [tile]), 324: ("I", starts), 325: ("I", sizes)}
    else:
        entries |= {273: ("I", starts), 278: ("I", [down]), 279: ("I", sizes)}
    if extra:
        entries[338] = ("H", list(extra))
    entries |= {tag: (code, list(values)) for tag, code, values in tags}
    data = b"".join(segments)
    data += bytes(len(data) % 2)
    directory, after = 8 + len(data), b""
    end = directory + 2 + 12 * len(entries) + 4
    table = struct.pack(order + "H", len(entries))
    for tag, (code, values) in sorted(entries.items()):
        raw = struct.pack(f"{order}{len(values)}{code}", *values)
        field = raw.ljust(4, b"\0")
        if len(raw) > 4:
            field = struct.pack(order + "I", end + len(after))
            after += raw + bytes(len(raw) % 2)
        table += struct.pack(order + "HHI", tag, TIFF_TYPES[code], len(values)) + field
    start = (b"II" if order == "<" else b"MM") + struct.pack(order + "HI", 42, directory)
    return start + data + table + bytes(4) + after
