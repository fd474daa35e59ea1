"""Videos and cameras, frame by frame."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageOps

from rfclip.app.sources import camera
from rfclip.segment.drawing import as_seen, with_legend
from rfclip.segment.result import Segmentation

if TYPE_CHECKING:
    import av

# What FFmpeg may take a file for: a playlist could name other files, and addresses.
FORMATS = "mov,matroska,webm,avi,mpeg,mpegts,mpegvideo,asf,flv,ogg,h264,hevc,ivf,mxf"
TICK = Fraction(1, 60_000)  # of a second: what timestamps are rounded to, which every encoder takes
CUT_OFF = 0.9  # of its length: a file whose frames end before that is not whole

Watch = Callable[[int, int | None], None]


def label_video(
    source: str, stride: int, segment: Callable[[Image.Image], Segmentation], path: Path, watch: Watch
) -> dict[str, Any]:
    """Write the labelled video, an MP4 without sound, and tell how the classes' shares change.

    Every frame is there, at its own time, upright and with square pixels, above a legend; sides are padded to be even.
    Frames between those that are segmented have the labels of the last one that was. A camera is labelled until
    KeyboardInterrupt.

    Args:
        source: a file, or what `camera` knows.
        stride: of the frames that are segmented.
        segment: what does it.
        path: of the video; its suffix does not matter.
        watch: is told the number of frames done, and of all if that is known.

    Returns:
        What the record says of the video: "over_time", of each segmented frame the seconds and then each class's share,
        and "shares", each class's mean over these frames.

    Raises:
        ValueError: the source cannot be read as a video, has none, or ends before it should.
        OSError: the labelled video cannot be written.
    """
    import av

    over_time: list[list[float]] = []  # of segmented frames the seconds, and each class's share
    done, last, end = 0, -1, 0.0
    first: float | None = None
    with _opened(source) as stream:
        rate = stream.average_rate or stream.guessed_rate
        try:
            with av.open(str(path), "w", format="mp4", options={"movflags": "+faststart"}) as sink:
                try:
                    for number, frame in enumerate(_frames(source, stream)):
                        image = _upright(frame, stream.sample_aspect_ratio)
                        if first is None:
                            size, first = image.size, frame.time or 0.0
                        image = image if image.size == size else image.resize(size)
                        time = number / rate if frame.time is None else frame.time - first
                        if number % stride == 0:
                            found = segment(image)
                            over_time.append([float(time), *found.shares.values()])
                        shown = _drawn(replace(found, image=image))
                        if number == 0:
                            out = sink.add_stream(_encoder(), rate)
                            out.width, out.height, out.pix_fmt = *shown.size, "yuv420p"
                            out.codec_context.time_base = TICK
                        labelled = av.VideoFrame.from_image(shown)
                        last = max(last + 1, round(time / TICK))
                        labelled.pts, labelled.time_base = last, TICK
                        sink.mux(out.encode(labelled))
                        end = time + (float(frame.duration * frame.time_base) if frame.duration else 1 / rate)
                        done += 1
                        watch(done, stream.frames or None)
                except KeyboardInterrupt:
                    if camera(source) is None or not done:
                        raise
                if not done:
                    raise ValueError(f"{source} cannot be read as a video: it has no frame that can be decoded")
                sink.mux(out.encode())
        except av.error.FFmpegError as error:
            raise OSError(error.errno, f"its labelled video cannot be written: {error}") from error
        length = stream.duration and float(stream.duration * stream.time_base)
        if length and end < CUT_OFF * length:
            raise ValueError(f"{source} ends after {end:.1f} of {length:.1f} seconds: it is cut off or damaged")
    shares = np.mean([row[1:] for row in over_time], axis=0)
    return {
        "width": size[0],
        "height": size[1],
        "frames": done,
        "frame_rate": float(rate),
        "duration": round(end, 3),
        "shares": dict(zip(found.classes, shares.tolist(), strict=True)),
        "over_time": [[round(time, 3), *(round(share, 4) for share in row)] for time, *row in over_time],
    }


@contextlib.contextmanager
def _opened(source: str) -> Iterator[av.VideoStream]:
    """The first video stream of a file or a camera."""
    import av

    device, options = camera(source), {"protocol_whitelist": "file", "format_whitelist": FORMATS}
    try:
        container = av.open(source, options=options) if device is None else av.open(*_device(device))
    except (av.error.FFmpegError, ValueError) as error:
        raise ValueError(f"{source} cannot be read as a video: {error}") from error
    with container:
        if not container.streams.video:
            raise ValueError(f"{source} cannot be read as a video: there is none in it")
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        yield stream


def _device(name: str) -> tuple[str, str, str]:
    """What `av.open` takes for a camera: file, mode and the format of the system's cameras."""
    if sys.platform == "darwin":
        return name, "r", "avfoundation"
    if sys.platform == "win32":
        if name.isdecimal():
            raise ValueError("Windows knows cameras by name, as in camera:Integrated Camera")
        return f"video={name}", "r", "dshow"
    return f"/dev/video{name}" if name.isdecimal() else name, "r", "v4l2"


def _frames(source: str, stream: av.VideoStream) -> Iterator[av.VideoFrame]:
    import av

    try:
        yield from stream.container.decode(stream)
    except av.error.FFmpegError as error:
        raise ValueError(f"{source} cannot be read as a video: {error}") from error


def _upright(frame: av.VideoFrame, ratio: Fraction | None) -> Image.Image:
    """A frame as it is to be seen; `ratio` is that of a pixel's sides."""
    image = frame.to_image()
    if ratio and ratio != 1:
        image = image.resize((max(1, round(image.width * ratio)), image.height))
    return image.rotate(frame.rotation, expand=True)


def _drawn(found: Segmentation) -> Image.Image:
    """A labelled frame above a legend of all classes, which stays the same, with even sides."""
    colours = map(as_seen, found.palette)
    picture = with_legend(found.overlay(legend=False), list(zip(found.classes, colours, strict=True)))
    return ImageOps.expand(picture, (0, 0, picture.width % 2, picture.height % 2), "white")


def _encoder() -> str:
    """H.264's encoder where FFmpeg has one, else MPEG-4's, which it always has."""
    import av

    with contextlib.suppress(ValueError):
        return av.codec.Codec("h264", "w").name
    return "mpeg4"
