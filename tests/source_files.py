"""Clips and raster files for tests of what `rfclip segment` takes beside pictures; they need av and rasterio."""

import warnings
from fractions import Fraction

import av
import numpy as np
import rasterio

PLACE = {"crs": "EPSG:32632", "transform": rasterio.Affine(0.5, 0, 500_000, 0, -0.25, 5_400_000)}


def make_clip(path, times=range(6), height=41, width=63, ratio=None, codec="mpeg4", options=None):
    """A clip that is dark at the left, up to a border that moves right by eight pixels a frame."""
    with av.open(str(path), "w", options=options or {}) as clip:
        stream = clip.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = width, height, "yuv420p", 4
        stream.codec_context.sample_aspect_ratio = ratio or Fraction(1)
        for number, time in enumerate(times):
            pixels = np.full((height, width, 3), 230, np.uint8)
            pixels[:, : 8 * number] = 20
            frame = av.VideoFrame.from_ndarray(pixels)
            frame.pts, frame.time_base = time, Fraction(1, 25)
            clip.mux(stream.encode(frame))
        clip.mux(stream.encode())


def write_raster(path, array, colours=None, driver="GTiff", **options):
    """Write an array [H, W] or [H, W, bands]."""
    array = array[..., None] if array.ndim == 2 else array
    height, width, count = array.shape
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        with rasterio.open(
            path, "w", driver=driver, width=width, height=height, count=count, dtype=array.dtype, **options
        ) as file:
            file.write(array.transpose(2, 0, 1))
            if colours is not None:
                file.write_colormap(1, colours)
