"""`rfclip serve`: a page to try the methods on a picture in the browser, made with Gradio."""

from __future__ import annotations

import functools
import html
import io
import os
import shutil
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import gradio as gr
from matplotlib.figure import Figure
from PIL import Image
from torch import nn

from rfclip import evaluate, figures
from rfclip.config import PRESETS, TINY, RefocusConfig
from rfclip.explanation import explain
from rfclip.images import to_rgb
from rfclip.methods import METHODS, RFCLIP, find_method
from rfclip.models import load_model, load_tokenizer, tiny_folder
from rfclip.outputs import OUTPUTS, Job, save
from rfclip.scenes import CLASSES, make_scene
from rfclip.segmenter import Segmentation, Segmenter, palette, parse_classes, split_classes

UPLOAD_LIMIT = 20 << 20  # bytes
PIXEL_LIMIT = 25_000_000  # of an upload
ASPECT_LIMIT = 16  # long side over short side, of an upload
LONG_SIDE = 2048  # pixels, of the resized picture; with the aspect it bounds the number of windows
SHOWN_SIDE = 1600  # pixels, of the overlay in the page
NAME_LIMIT = 255  # class names with synonyms
KEPT = 3600  # seconds that the files and the state of a visit are kept
SCENES = ((11, "dog, banana"), (21, "bus, owl"), (35, "cat, guitar"))  # seeds, and classes that are not there


@dataclass(frozen=True)
class Checkpoint:
    """A choice of the page: names as for `rfclip.load_model`, and the config where one is given.

    As text, and in `shown`, it does not say where files of this machine are.
    """

    model: str
    pretrained: str | None
    config: RefocusConfig | None = None

    @property
    def names(self) -> tuple[str, str | None]:
        return self.model, self.pretrained

    @property
    def shown(self) -> tuple[str, str | None]:
        return _without_folder(self.model), self.pretrained and _without_folder(self.pretrained)

    def __str__(self) -> str:
        return ", ".join(filter(None, self.shown))


@dataclass(frozen=True)
class Seen:
    """What a click on a result needs: the picture as the tower saw it, and with what."""

    image: Image.Image
    layers: tuple[int, ...]
    checkpoint: Checkpoint
    config: RefocusConfig
    inject: float
    shown: tuple[int, int]


class Page:
    """The work behind the page. A model is refocused in place, so one visitor is served at a time.

    Args:
        checkpoints: the models to choose from.
        folder: for all files of the page; whoever made it removes it.
        device, backend: as for `rfclip.Segmenter`.
    """

    def __init__(self, checkpoints: list[Checkpoint], folder: Path, device: str = "cpu", backend: str = "auto"):
        self.checkpoints = {str(checkpoint): checkpoint for checkpoint in checkpoints}
        self.folder, self.device, self.backend = folder, device, backend
        self._load = functools.lru_cache(maxsize=2)(lambda checkpoint: load_model(*checkpoint.names, device=device))
        self.scenes = self._scenes()
        self._weights: dict[Checkpoint, str] = {}  # digests

    def segment(
        self,
        file: str | None,
        classes: str,
        method: str,
        chosen: str,
        tau: float,
        beta: float,
        layers: str,
        pamr: bool,
        inject: float,
        progress: gr.Progress = gr.Progress(),  # noqa: B008  how Gradio hands it over
    ) -> Iterator[tuple[object, ...]]:
        """Overlay, legend, summary, mask, JSON and maps, for the page, and what a click on the overlay needs."""
        with _in_words():
            if file is None:
                raise ValueError("no picture: upload one, or pick a scene")
            rgb = _read(file)
            named, checkpoint = _class_names(classes), self.checkpoints[chosen]
            downloaded = "" if checkpoint.model == TINY else " (the first time, its weights are downloaded)"
            progress(0, desc=f"loading {checkpoint}{downloaded}")
            model = self._load(checkpoint)
            config = checkpoint.config or model.refocus_config
            if config is not None:
                config = replace(config, tau=tau, beta=beta, layers=_numbers(layers))
                config = evaluate.injected(config) if inject else config
            own = config if find_method(method).configured else None
            job = Job(named, *checkpoint.shown, own, method, self.backend, self.device, "fp32", None, pamr)
            with (
                evaluate.inject_distraction(model, inject),
                Segmenter(
                    model,
                    method=method,
                    config=own,
                    backend=self.backend,
                    tokenizer=load_tokenizer(checkpoint.model),
                    long_side=LONG_SIDE,
                    cache=self.folder / "text",
                ) as segmenter,
            ):
                with warnings.catch_warnings(action="ignore"):  # segmenting says it of all names at once
                    for name in progress.tqdm([name for names in named for name in names], desc="class names"):
                        segmenter.text_embeddings((name,))
                progress(0.4, desc="segmenting")
                began = time.perf_counter()
                found = segmenter.segment(rgb, named, pamr=pamr)
                seconds = round(time.perf_counter() - began, 3)
                weights = self._weights[checkpoint] = self._weights.get(checkpoint) or segmenter.digest()
                record = job.described(segmenter, weights) | {"model": job.model, "pretrained": job.pretrained}
            progress(0.7, desc="looking into the tower")
            overlay = _shrunk(found.overlay(legend=False))
            maps, seen, about = self._maps(rgb, model, checkpoint, config, inject, overlay.size)
        (width, height), name = rgb.size, Path(file).stem
        row = {"image": Path(file).name, "width": width, "height": height, "seconds": seconds}
        summary = f"{width} x {height} pixels: **{seconds:.2f} s** with {method} on {checkpoint}. {about}"
        # Gradio copies the files while this waits to go on, and removes its copies when they are old.
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            files = {output: Path(folder, f"{name}{output}") for output in (OUTPUTS[0], OUTPUTS[2])}
            save(found, row | record, files)
            downloads = (gr.DownloadButton(value=str(path), interactive=True) for path in files.values())
            yield overlay, _legend(found), summary, *downloads, maps, None, seen

    def _maps(
        self,
        rgb: Image.Image,
        model: nn.Module,
        checkpoint: Checkpoint,
        config: RefocusConfig | None,
        inject: float,
        shown: tuple[int, int],
    ) -> tuple[Image.Image | None, Seen | None, str]:
        """What RF-CLIP finds in the picture as a whole, whatever the method, and a sentence of it."""
        if config is None:
            return None, None, "Its distraction dimensions are not known, so there are no maps; `rfclip calibrate`."
        try:
            with evaluate.inject_distraction(model, inject):
                found = explain(model, rgb, config, backend=self.backend)
        except ValueError as error:  # as where the layers go beyond the tower
            return None, None, f"No maps: {error}."
        seen = Seen(found.image, found.layers, checkpoint, config, inject, shown)
        return _picture(figures.draw_maps(found)), seen, figures.describe(found)

    def point(self, seen: Seen | None, event: gr.SelectData) -> Image.Image:
        """What the place that was clicked in the overlay attends to."""
        with _in_words():
            if seen is None:
                raise ValueError("no attention to show: the line above says why, or segment the picture again")
            model = self._load(seen.checkpoint)
            sides = zip(event.index, seen.image.size, seen.shown, strict=True)
            place = tuple(min(clicked, shown - 1) * side / shown for clicked, side, shown in sides)
            with evaluate.inject_distraction(model, seen.inject):
                found = explain(
                    model, seen.image, seen.config, points=[place], layers=seen.layers, backend=self.backend
                )
            return _picture(figures.draw_attention(found))

    def blocks(self) -> gr.Blocks:
        """The page itself."""
        title = "RF-CLIP: segment a picture by class names"
        start = next(iter(self.checkpoints.values())).config or RefocusConfig(())  # of --config, if given
        with gr.Blocks(title=title, analytics_enabled=False, delete_cache=(KEPT // 6, KEPT)) as page:
            gr.Markdown(f"# {title}")
            seen = gr.State(time_to_live=KEPT)
            with gr.Row():
                with gr.Column(scale=2, min_width=320):
                    file = gr.File(
                        label="Picture; or one of the scenes below", file_types=["image"], height=140, elem_id="file"
                    )
                    preview = gr.Image(
                        show_label=False, format="png", interactive=False, height=240, elem_id="preview", buttons=[]
                    )
                    scenes = gr.Gallery(
                        [path for path, _ in self.scenes],
                        columns=4,
                        height=130,
                        interactive=False,
                        allow_preview=False,
                        elem_id="scenes",
                        show_label=False,
                        buttons=[],
                    )
                    classes = gr.Textbox(
                        label="Class names",
                        placeholder="cat, grass, sky; or with synonyms: cat, kitten; grass",
                        lines=2,
                    )
                    button = gr.Button("Segment", variant="primary")
                    with gr.Row():
                        method = gr.Dropdown(list(METHODS), value=RFCLIP.name, label="Method")
                        model = gr.Dropdown(list(self.checkpoints), label="Model")
                    with gr.Group():
                        tau = gr.Slider(
                            0, max(20, start.tau), start.tau, step=0.1, label="tau: distraction over tau / d"
                        )
                        beta = gr.Slider(0, 1, start.beta, step=0.05, label="beta: attention taken away")
                        layers = gr.Textbox(
                            ", ".join(map(str, start.layers or ())) or "all",
                            label='Layers that refocus: "all", or 3, 4, 5',
                        )
                        pamr = gr.Checkbox(label="PAMR: refine along the picture's edges")
                        inject = gr.Slider(
                            0, 0.5, 0, step=0.05, label="Simulate distraction in this share of the tokens"
                        )
                with gr.Column(scale=3, min_width=320):
                    overlay = _shown("overlay", "Segmentation: click a point to see what it attends to")
                    legend = gr.HTML(elem_id="legend")
                    summary = gr.Markdown(elem_id="summary")
                    with gr.Row():
                        mask = gr.DownloadButton("Mask (PNG)", interactive=False)
                        record = gr.DownloadButton("JSON", interactive=False)
                    maps = _shown("maps", "What RF-CLIP finds in the picture, by block")
                    attention = _shown("attention", "What the point attends to, plain (before) and refocused, by block")
            one = {"concurrency_limit": 1, "concurrency_id": "tower", "api_visibility": "private"}
            file.change(_preview, file, preview, **one)
            scenes.select(self._pick, None, [file, classes], api_visibility="private")
            settings = [file, classes, method, model, tau, beta, layers, pamr, inject]
            results = [overlay, legend, summary, mask, record, maps, attention, seen]
            button.click(self.segment, settings, results, show_progress_on=[overlay], scroll_to_output=True, **one)
            overlay.select(self.point, seen, attention, **one)
        return page.queue(max_size=20)

    def _scenes(self) -> list[tuple[str, str]]:
        """Pictures that come with the package, where Gradio may read them, and class names that go with each."""
        first = shutil.copy(tiny_folder() / "scene.png", self.folder)
        scenes = [(str(first), "dog, cactus, octopus, sailboat, cat, bus, grass, sky")]
        for seed, absent in SCENES:
            scene, path = make_scene(seed), self.folder / f"scene-{seed}.png"
            Image.fromarray(scene.image).save(path)
            scenes.append((str(path), ", ".join([*(CLASSES[index] for index in scene.present(100)), absent])))
        return scenes

    def _pick(self, event: gr.SelectData) -> tuple[str, str]:
        return self.scenes[event.index]


def _read(file: str) -> Image.Image:
    """An upload, read as everywhere in this package; errors have its name, not where it is kept."""
    try:
        rgb = to_rgb(file)
    except FileNotFoundError as error:
        raise ValueError(f"{Path(file).name} is no longer kept here: upload it again") from error
    except (ValueError, OSError) as error:
        raise ValueError(str(error).replace(file, Path(file).name)) from error
    if max(rgb.size) > ASPECT_LIMIT * min(rgb.size):
        raise ValueError(
            f"a strip of {rgb.width} x {rgb.height} pixels: at most {ASPECT_LIMIT} times as long as wide here"
        )
    return rgb


def _preview(file: str | None) -> Image.Image | None:
    with _in_words():
        return None if file is None else _shrunk(_read(file))


def _shrunk(picture: Image.Image) -> Image.Image:
    picture.thumbnail((SHOWN_SIDE, SHOWN_SIDE))
    return picture


class _in_words:
    """What goes wrong becomes a message on the page, and the package's warnings do, too.

    One at a time: models are refocused in place, and Python catches warnings for all threads at once. Gradio's line
    alone does not do, for it lets requests by that are sent to its server directly.
    """

    _lock = threading.Lock()

    def __enter__(self) -> None:
        self._lock.acquire()
        self._caught = warnings.catch_warnings(record=True)
        self._warned = self._caught.__enter__()
        warnings.simplefilter("always", UserWarning)

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        self._caught.__exit__(kind, error, trace)
        self._lock.release()
        for message in {str(warned.message) for warned in self._warned if warned.category is UserWarning}:
            gr.Warning(html.escape(message))
        if isinstance(error, ValueError | OSError | RuntimeError | MemoryError):  # torch's lack of memory is the third
            raise gr.Error(html.escape(str(error)), duration=None, print_exception=False) from error


def _without_folder(name: str) -> str:
    source, colon, path = name.rpartition(":")
    return f"{source}{colon}{Path(path).name}" if os.path.exists(path) else name


def _class_names(text: str) -> list[tuple[str, ...]]:
    if not text.strip(" ,;\n"):
        raise ValueError('no class names: type some, such as "cat, grass, sky"')
    named = parse_classes(split_classes(text.strip(" ,;\n")))  # never as a file of this machine
    if sum(map(len, named)) > NAME_LIMIT:
        raise ValueError(f"{sum(map(len, named))} class names: at most {NAME_LIMIT} here")
    return named


def _numbers(text: str) -> tuple[int, ...] | None:
    if text.strip().lower() in ("", "all"):
        return None
    try:
        return tuple(int(number) for number in text.split(","))
    except ValueError as error:
        raise ValueError(f'layers {text!r}: expected "all", or numbers such as 3, 4, 5') from error


def _shown(name: str, title: str) -> gr.Image:
    gr.Markdown(f"### {title}")  # a label would lie on the picture
    buttons = ["download", "fullscreen"]
    return gr.Image(label=title, show_label=False, format="png", interactive=False, elem_id=name, buttons=buttons)


def _picture(figure: Figure) -> Image.Image:
    return Image.open(io.BytesIO(figures.png(figure)))


def _legend(found: Segmentation) -> str:
    """Each class with its colour and share, largest first, as HTML."""
    rows = sorted(zip(found.shares.items(), palette(len(found.classes)), strict=True), key=lambda row: -row[0][1])
    cells = (
        f'<li><span style="background:rgb{colour}"></span>{html.escape(name)} <b>{100 * share:.1f} %</b></li>'
        for (name, share), colour in rows
    )
    return f"<ul>{''.join(cells)}</ul>"


STYLE = """
#legend ul {display: flex; flex-wrap: wrap; gap: .3em 1.2em; list-style: none; padding: 0; margin: 0}
#legend li span {display: inline-block; width: 1em; height: 1em; margin-right: .4em; border: 1px solid}
"""


def checkpoints(model: str, pretrained: str | None, config: RefocusConfig | None) -> list[Checkpoint]:
    """The model given, the one in the package, and those whose distraction dimensions are known."""
    known = [(name, tag) for name, tag in PRESETS if tag is not None]
    others = [(name, tag) for name, tag in [(TINY, None), *known] if (name, tag) != (model, pretrained)]
    return [Checkpoint(model, pretrained, config), *(Checkpoint(*names) for names in others)]


def serve(
    choices: list[Checkpoint],
    folder: Path,
    host: str,
    port: int,
    device: str,
    backend: str,
    ready: Callable[[str], None],
) -> None:
    """Serve the page until the process is interrupted or terminated; `ready` is told its address.

    Files are below `folder`, and Gradio's where GRADIO_TEMP_DIR said when it was imported.

    Raises:
        OSError: the port is taken, or the host is not an address of this machine.
        ValueError: the host is an IPv6 address, of which Gradio makes no address of a page.
    """
    if ":" in host:
        raise ValueError(f"--host {host}: expected an IPv4 address or a name")
    Image.MAX_IMAGE_PIXELS = PIXEL_LIMIT
    page = Page(choices, folder, device, backend).blocks()
    options = {"max_file_size": UPLOAD_LIMIT, "css": STYLE, "footer_links": [], "run_history": False, "quiet": True}
    options["theme"] = gr.themes.Default(font="sans-serif", font_mono="monospace")  # no font from the network
    try:
        try:
            launched = page.launch(server_name=host, server_port=port, prevent_thread_lock=True, **options)
        except OSError as error:
            raise OSError(f"--host {host} --port {port}: cannot listen there; the port may be taken") from error
        ready(launched[1])
        threading.Event().wait()
    except KeyboardInterrupt:
        pass
    finally:
        page.close(verbose=False)
