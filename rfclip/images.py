"""Read any picture, from a path, Pillow, NumPy or PyTorch, as 8-bit RGB."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias, cast

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

if TYPE_CHECKING:
    from torch import Tensor

ImageLike: TypeAlias = "str | os.PathLike[str] | Image.Image | np.ndarray | Tensor"


def to_rgb(image: ImageLike) -> Image.Image:
    """An RGB picture of 8 bits per channel, upright according to its EXIF orientation.

    Transparent pixels are composited over white; 16-bit grayscale, as uint16 or as a Pillow image, is scaled to 8 bits.

    Args:
        image: a path; a Pillow image; an array [H, W], [H, W, 1], [H, W, 3] or [H, W, 4]; or a tensor [H, W],
            [1, H, W], [3, H, W] or [4, H, W]. Arrays and tensors are uint8, uint16, or float in [0, 1].

    Raises:
        ValueError: the file is not a picture or is damaged, the picture exceeds Pillow's limit of pixels, or an array
            or tensor has another shape, dtype or range.
        FileNotFoundError: there is no such file.
    """
    torch = sys.modules.get("torch")  # imported already if this is a tensor
    if torch is not None and isinstance(image, torch.Tensor):
        array = image.detach().cpu()
        if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[0] not in (1, 3, 4)) or not array.numel():
            raise ValueError(
                f"image: got a tensor {tuple(array.shape)}, expected [H, W], [1, H, W], [3, H, W] or [4, H, W], "
                "not empty and without a batch"
            )
        array = array.movedim(0, -1) if array.ndim == 3 else array
        return _from_array((array.float() if array.is_floating_point() else array).numpy())
    if isinstance(image, np.ndarray):
        return _from_array(image)
    if isinstance(image, Image.Image):
        return _from_pillow(image)
    path = Path(cast("str | os.PathLike[str]", image))  # nothing else is left
    if not path.is_file():
        raise FileNotFoundError(f"no such image: {path}")
    try:
        with warnings.catch_warnings():
            # Warnings about odd metadata, and about many pixels, which is an error below.
            warnings.filterwarnings("ignore", module="PIL")
            Image.init()
            formats = [name for name in Image.ID if name != "EPS"]  # a program that Ghostscript would run
            # Opened here: given a path, Pillow maps the file into memory and mixes up the rows of a turned gray TIFF.
            with path.open("rb") as file, Image.open(file, formats=formats) as opened:
                return _from_pillow(opened)
    except MemoryError:
        raise
    except UnidentifiedImageError as error:
        raise ValueError(f"{path} cannot be read as an image: its format is none of Pillow's, or EPS") from error
    except Exception as error:  # Pillow raises whatever a damaged file makes it stumble over, struct.error for one
        raise ValueError(f"{path} cannot be read as an image: {error}") from error


def _from_pillow(image: Image.Image) -> Image.Image:
    if 0 in image.size:
        raise ValueError(f"image of {image.width} x {image.height} pixels: expected at least one")
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and image.width * image.height > limit:
        raise ValueError(
            f"image of {image.width} x {image.height} pixels: the limit is {limit} (PIL.Image.MAX_IMAGE_PIXELS); "
            "shrink it"
        )
    image = ImageOps.exif_transpose(image)
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        values = np.asarray(image)
        if image.mode == "F":
            return _from_array(values)
        if "transparency" in image.info:
            values = np.where(values == image.info["transparency"], 65535, values)
        return _from_array(np.clip(values, 0, 65535).astype(np.uint16))
    if image.mode == "La":
        image = image.convert("LA")
    if image.mode in ("RGBA", "LA", "PA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _from_array(array: np.ndarray) -> Image.Image:
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))) or 0 in array.shape:
        raise ValueError(f"image: got an array {array.shape}, expected [H, W], [H, W, 1], [H, W, 3] or [H, W, 4]")
    if array.dtype.newbyteorder("=") == np.uint16:
        array = (array.astype(np.uint32) * 255 + 32767) // 65535
    elif array.dtype.kind == "f":
        if not (np.isfinite(array).all() and array.min() >= 0 and array.max() <= 1):
            raise ValueError(
                f"image: floats must lie in [0, 1], got values from {array.min():.4g} to {array.max():.4g}; "
                "divide by 255, and do not normalize: the segmenter does"
            )
        array = (array * 255).round()
    elif array.dtype != np.uint8:
        raise ValueError(f"image: got {array.dtype}, expected uint8, uint16, or float in [0, 1]")
    return _from_pillow(Image.fromarray(np.ascontiguousarray(array.astype(np.uint8))))
