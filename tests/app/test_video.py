"""Videos and cameras: small clips, made here, and a camera that is a clip."""

import json
import struct
from fractions import Fraction
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from commands import files_below, refused, segment, state
from miniatures import scene
from PIL import Image

from rfclip.app import video
from rfclip.app.sources import camera
from rfclip.app.video import label_video
from rfclip.files import write_whole
from rfclip.segment.result import Segmentation

av = pytest.importorskip("av")
pytest.importorskip("rasterio")
from source_files import make_clip  # noqa: E402

pytestmark = [pytest.mark.usefixtures("folder"), pytest.mark.filterwarnings("ignore:rfclip-tiny is a demonstration")]

CLASSES = ("dark", "light")
TIMES = [0, 2, 3, 7, 8, 10, 15, 16]  # in 1 / 25 seconds


def frames_of(path):
    with av.open(str(path)) as clip:
        return [(frame.time, np.asarray(frame.to_image())) for frame in clip.decode(video=0)]


class ByBrightness:
    """A segmenter of `CLASSES`, which remembers what it was shown."""

    def __init__(self, fail_at=None):
        self.shown, self.fail_at = [], fail_at

    def __call__(self, image):
        if len(self.shown) == self.fail_at:
            raise KeyboardInterrupt
        self.shown.append(image)
        return Segmentation(image, (np.asarray(image.convert("L")) > 128).astype(np.uint8), CLASSES)


def label(source, stride=1, by=None, out="out.mp4"):
    return label_video(str(source), stride, by or ByBrightness(), Path(out), lambda *_: None)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".avi"])
def test_every_frame_at_its_time(suffix):
    """Frames that are not segmented have the labels before; sides become even."""
    times = range(8) if suffix == ".avi" else TIMES  # which has no times of its own
    make_clip(f"clip{suffix}", times)
    by, told = ByBrightness(), []
    facts = label_video(f"clip{suffix}", 3, by, Path("out.mp4"), lambda *args: told.append(args))
    source, out = frames_of(f"clip{suffix}"), frames_of("out.mp4")
    assert len(out) == len(source) == facts["frames"] == len(told) == 8
    assert np.allclose([time for time, _ in out], [time / 25 for time in times], atol=1e-3)
    assert len(by.shown) == 3
    for number, (_, pixels) in enumerate(out):
        assert pixels.shape[0] % 2 == pixels.shape[1] % 2 == 0 and pixels.shape[0] > 41
        left = (pixels.shape[1] - 63) // 2
        found = by(by.shown[number // 3])
        image = Image.fromarray(source[number][1])
        want = np.asarray(Segmentation(image, found.labels, CLASSES).overlay(legend=False)).astype(int)
        assert (
            np.abs(pixels[:41, left : left + 63].astype(int) - want).mean() < 12
        )  # what compression changes; a wrong frame: 20
    wanted = [[time / 25, *by(i).shares.values()] for time, i in zip(list(times)[::3], by.shown[:3], strict=True)]
    assert np.allclose(facts["over_time"], wanted, atol=1e-3)
    assert np.allclose(list(facts["shares"].values()), np.mean(wanted, axis=0)[1:])
    assert (facts["width"], facts["height"]) == (63, 41)


def test_without_an_encoder_of_h264(monkeypatch):
    monkeypatch.setattr(av.codec, "Codec", lambda *_: (_ for _ in ()).throw(ValueError("no such codec")))
    make_clip("clip.mkv", TIMES)
    label("clip.mkv")
    with av.open("out.mp4") as clip:
        assert clip.streams.video[0].codec_context.name == "mpeg4"
    assert np.allclose([time for time, _ in frames_of("out.mp4")], [time / 25 for time in TIMES], atol=1e-3)


def test_legend_names_every_class_below():
    make_clip("clip.mp4", range(1), 120, 241)
    label("clip.mp4")
    ((_, pixels),) = frames_of("out.mp4")
    strip = pixels[121:]
    assert pixels.shape[1] == 242 and len(strip) > 15
    assert (strip < 100).any() and (strip > 240).mean() > 0.5


@pytest.mark.parametrize("turned, angle", [(90, 0x00010000), (-90, -0x00010000)])
def test_turned_clips_come_out_upright(turned, angle):
    """As telephones write them: the picture as the sensor has it, and how to turn it."""
    make_clip("clip.mp4", range(1), 48, 64)
    data = bytearray(Path("clip.mp4").read_bytes())
    matrix = data.index(b"tkhd") + 4 + 4 + 20 + 16
    data[matrix : matrix + 36] = struct.pack(">9i", 0, -angle, 0, angle, 0, 0, 0, 0, 0x40000000)
    Path("turned.mp4").write_bytes(data)
    by = ByBrightness()
    facts = label("turned.mp4", by=by)
    ((_, plain),) = frames_of("clip.mp4")
    assert (facts["width"], facts["height"]) == (48, 64)
    assert np.array_equal(np.asarray(by.shown[0]), np.rot90(plain, turned // 90))


def test_pixels_become_square():
    make_clip("clip.mkv", range(1), 40, 60, Fraction(3, 2))
    facts = label("clip.mkv")
    assert (facts["width"], facts["height"]) == (90, 40)


def cut(name, share):
    data = Path(name).read_bytes()
    Path(name).write_bytes(data[: int(len(data) * share)])


@pytest.mark.parametrize(
    "suffix, share, reason",
    [
        (".mp4", 0.6, "cannot be read"),
        (".avi", 0.6, "cannot be read"),
        (".mov", 0.6, "ends after .* seconds: it is cut"),
    ],
)
def test_what_is_cut_off(suffix, share, reason):
    make_clip(f"clip{suffix}", range(40), options={"movflags": "faststart"} if suffix == ".mov" else None)
    cut(f"clip{suffix}", 0.6)
    with pytest.raises(ValueError, match=f"^clip{suffix} {reason}"):
        label(f"clip{suffix}")


def test_what_is_no_video(folder):
    with av.open("sound.mkv", "w") as clip:
        stream = clip.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), layout="mono")
        frame.sample_rate = 8000
        clip.mux(stream.encode(frame))
    Path("text.mp4").write_text("no video")
    Path("list.mp4").write_text(
        f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{folder / 'clip.mp4'}\n#EXT-X-ENDLIST\n"
    )
    make_clip("clip.mp4")
    Path("files.mp4").write_text("ffconcat version 1.0\nfile clip.mp4\n")
    for name in ("sound.mkv", "text.mp4", "list.mp4", "files.mp4"):
        with pytest.raises(ValueError, match=f"^{name} cannot be read as a video"):
            label(name)
    with pytest.raises(ValueError, match="^none.mp4 cannot be read as a video: .*No such file"):
        label("none.mp4")


def test_an_interrupted_run_leaves_nothing():
    make_clip("clip.mp4")
    saves = {Path("out/clip.mp4"): partial(label_video, "clip.mp4", 1, ByBrightness(3), watch=lambda *_: None)}
    Path("out").mkdir()
    with pytest.raises(KeyboardInterrupt):
        write_whole({path: lambda part, save=save: save(path=part) for path, save in saves.items()})
    assert not files_below(Path("out"))


def test_a_disk_that_is_full_is_no_bad_video():
    make_clip("clip.mp4")
    with pytest.raises(OSError, match="its labelled video cannot be written"):
        label("clip.mp4", out="none/out.mp4")


# Cameras --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "platform, name, expected",
    [
        ("linux", "camera:1", ("/dev/video1", "r", "v4l2")),
        ("linux", "camera:/dev/v4l/by-id/x", ("/dev/v4l/by-id/x", "r", "v4l2")),
        ("darwin", "camera:0", ("0", "r", "avfoundation")),
        ("win32", "camera:Integrated Camera", ("video=Integrated Camera", "r", "dshow")),
    ],
)
def test_a_camera_is_labelled_until_it_is_stopped(monkeypatch, platform, name, expected):
    make_clip("clip.mkv", [1000 + time for time in TIMES])
    open_file, asked = av.open, []

    def opened(file, mode="r", format=None, **options):
        if format == "mp4":
            return open_file(file, mode, format, **options)
        asked.append((file, mode, format))
        return open_file("clip.mkv")

    with monkeypatch.context() as patch:
        patch.setattr(av, "open", opened)
        patch.setattr(video.sys, "platform", platform)
        facts = label(name, by=ByBrightness(5))
    assert asked == [expected]
    assert facts["frames"] == 5
    assert np.allclose([time for time, _ in frames_of("out.mp4")], [time / 25 for time in TIMES[:5]], atol=1e-3)


def test_cameras_by_name(monkeypatch):
    assert (camera("camera:0"), camera("camera:"), camera("camera.mp4"), camera(Path("camera:0"))) == ("0",) + (
        None,
    ) * 3
    monkeypatch.setattr(video.sys, "platform", "win32")
    with pytest.raises(ValueError, match="camera:0 cannot be read as a video: Windows knows cameras by name"):
        label("camera:0")


def test_a_camera_that_is_not_there():
    result = segment("camera:/dev/none", "--out", "out")
    assert result.exit_code == 1
    assert "failed: camera:/dev/none: cannot be read as a video" in result.stderr
    assert not files_below(Path("out"))


# The command ----------------------------------------------------------------------------------------------------------


def test_videos_beside_pictures():
    make_clip("clip.mp4", height=56, width=64)
    make_clip("cut.mp4")
    cut("cut.mp4", 0.5)
    scene(1).save("a.png")
    result = segment("*.mp4", "a.png", "--stride", "4", "--threshold", "0.2")
    assert result.exit_code == 1
    assert "failed: cut.mp4: cannot be read as a video" in result.stderr
    assert "2 segmented" in result.stderr
    names = {f"a{suffix}" for suffix in (".mask.png", ".overlay.png", ".json")} | {"clip.overlay.mp4", "clip.json"}
    assert files_below(Path("rfclip-out")) == names
    record = json.loads(Path("rfclip-out/clip.json").read_text())
    assert (record["kind"], record["frame_stride"], record["frames"]) == ("video", 4, 6)
    assert (record["image"], record["threshold"], record["window"]) == ("clip.mp4", 0.2, 112)
    assert np.shape(record["over_time"]) == (2, 1 + len(record["classes"]))
    assert np.allclose([c["share"] for c in record["classes"]], np.mean(record["over_time"], axis=0)[1:], atol=1e-4)
    assert len(frames_of("rfclip-out/clip.overlay.mp4")) == 6
    before = state(Path("rfclip-out"))
    result = segment("clip.mp4", "rfclip-out/*.mp4", "--stride", "4", "--threshold", "0.2")
    assert "1 skipped" in result.stderr and "1 failed" in result.stderr
    refused(segment("clip.mp4", "--threshold", "0.2"), "clip.json was made with other frame_stride")
    assert state(Path("rfclip-out")) == before


def test_what_goes_with_videos_only(monkeypatch):
    scene(1).save("a.png")
    refused(segment("a.png", "--stride", "2"), "--stride", "no video")
    make_clip("clip.mp4")
    pytest.importorskip("pyarrow")
    result = segment("clip.mp4", "a.png", "--format", "parquet")
    assert result.exit_code == 1
    assert "failed: clip.mp4: only plain pictures become masks in Parquet" in result.stderr
