"""Read any picture, from a path, Pillow, NumPy or PyTorch, as 8-bit RGB."""

from __future__ import annotations

import io
import os
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias, cast

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from rfclip import formats

if TYPE_CHECKING:
    from torch import Tensor

ImageLike: TypeAlias = "str | os.PathLike[str] | Image.Image | np.ndarray | Tensor"


def is_image(value: object) -> bool:
    """Whether a value is of a class that `to_rgb` takes."""
    torch = sys.modules.get("torch")  # imported already if this is a tensor
    tensor = torch is not None and isinstance(value, torch.Tensor)
    return tensor or isinstance(value, str | os.PathLike | Image.Image | np.ndarray)


def to_rgb(image: ImageLike) -> Image.Image:
    """An RGB picture of 8 bits per channel, upright according to its EXIF orientation.

    Transparent pixels are composited over white; colours with an ICC profile, and Lab, are converted to sRGB; integers
    of more than 8 bits are scaled to 8.

    Args:
        image: a path; a Pillow image, best not loaded yet; an array [H, W], [H, W, 1], [H, W, 3] or [H, W, 4]; or a
            tensor [H, W], [1, H, W], [3, H, W] or [4, H, W]. Arrays and tensors are uint8, uint16, or float in [0, 1],
            not normalized, and their colours are in the order RGB. OpenCV's are BGR, which no picture shows by itself:
            give `cv2.cvtColor(image, cv2.COLOR_BGR2RGB)`.

    Raises:
        ValueError: the file is not a picture, is damaged, of a layout that would be read wrongly, or needs an extra;
            the picture exceeds Pillow's limit of pixels; or an array or tensor has another shape, dtype or range.
        FileNotFoundError: there is no such file.

    Warns:
        UserWarning: an ICC profile is broken or belongs to another kind of picture, and is ignored.
    """
    torch = sys.modules.get("torch")  # imported already if this is a tensor
    if torch is not None and isinstance(image, torch.Tensor):
        array = image.detach().cpu()
        if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[0] not in (1, 3, 4)) or not array.numel():
            what_to_do = ""
            if array.ndim == 4:
                what_to_do = f"; {formats.BATCH}"
            elif array.ndim == 3 and array.shape[-1] in (1, 3, 4):
                what_to_do = "; channels come first: tensor.permute(2, 0, 1)"
            raise ValueError(
                f"image: got a tensor {tuple(array.shape)}, expected [H, W], [1, H, W], [3, H, W] or [4, H, W], "
                f"not empty{what_to_do}"
            )
        array = array.movedim(0, -1) if array.ndim == 3 else array
        return _from_pillow(formats.from_array((array.float() if array.is_floating_point() else array).numpy()))
    if isinstance(image, np.ndarray):
        return _from_pillow(formats.from_array(image))
    if isinstance(image, Image.Image):
        return _from_pillow(formats.corrected(image))
    if not isinstance(image, str | os.PathLike):
        what_to_do = f"; {formats.BATCH}" if isinstance(image, list | tuple) else ""
        raise ValueError(
            f"image: got an object of class {type(image).__name__}, expected one picture: a path, a Pillow image, an "
            f"array or a tensor{what_to_do}"
        )
    path = Path(image)
    if not path.is_file():
        raise FileNotFoundError(f"no such image: {path}")
    try:
        with warnings.catch_warnings():
            # Warnings about odd metadata, and about many pixels, which is an error below.
            warnings.filterwarnings("ignore", module="PIL")
            # Opened here: given a path, Pillow maps the file into memory and mixes up the rows of a turned gray TIFF.
            with path.open("rb") as file:
                return _from_pillow(formats.read(file, path.suffix.lower()), str(path))
    except MemoryError:
        raise
    except UnidentifiedImageError as error:
        raise ValueError(
            f"{path} cannot be read as an image: its format is none of Pillow's, or EPS or FITS, which are not read"
        ) from error
    except Exception as error:  # Pillow raises whatever a damaged file makes it stumble over, struct.error for one
        raise ValueError(f"{path} cannot be read as an image: {error}") from error


def _from_pillow(image: Image.Image, name: str = "image") -> Image.Image:
    formats.check_size(image.width, image.height)
    kind, image = image.format, ImageOps.exif_transpose(image)
    profile = image.info.get("icc_profile", b"")
    if profile is None and kind in ("PNG", "JPEG", "MPO"):
        _ignored(name, "it is damaged")
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        values = np.asarray(image)
        if image.mode != "F":
            if "transparency" in image.info:
                values = np.where(values == image.info["transparency"], 65535, values)
            values = formats.to_uint16(values)
        image = formats.from_array(values)
    if image.mode == "La":
        image = image.convert("LA")
    if image.mode not in ("RGBA", "LA", "PA", "RGBa") and "transparency" not in image.info:
        return _to_srgb(image, profile, name)
    gray = image.mode in ("1", "L", "LA")
    image = image.convert("LA" if gray else "RGBA")
    colours = _to_srgb(image.convert("L" if gray else "RGB"), profile, name).convert("RGBA")
    colours.putalpha(image.getchannel("A"))
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), colours).convert("RGB")


def _to_srgb(image: Image.Image, profile: bytes | None, name: str) -> Image.Image:
    """The picture in sRGB, by its ICC profile if it has one that fits; Lab, which has no other meaning, without one."""
    if image.mode not in ("L", "CMYK", "LAB"):
        image = image.convert("L" if image.mode == "1" else "RGB")
    if not profile and image.mode != "LAB":
        return image.convert("RGB")
    from PIL import ImageCms

    srgb = ImageCms.createProfile("sRGB")
    if image.mode == "LAB":
        lab = ImageCms.createProfile("LAB")
        return cast(Image.Image, ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB"))
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile or b""))
        space = source.profile.xcolor_space.strip()
        if space == "RGB" and image.mode == "L":
            image = image.convert("RGB")
        if space != {"L": "GRAY"}.get(image.mode, image.mode):
            raise ValueError(f"it is for {space}, and the picture is {image.mode}")
        return cast(Image.Image, ImageCms.profileToProfile(image, source, srgb, outputMode="RGB"))
    except (ValueError, OSError, ImageCms.PyCMSError) as error:
        _ignored(name, str(error))
        return image.convert("RGB")


def _ignored(name: str, reason: str) -> None:
    warnings.warn(f"{name}: its ICC profile is ignored: {reason}", stacklevel=3)
