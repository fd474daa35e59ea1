"""`rfclip serve`: a page for trying the methods on a picture in the browser, made with Gradio."""

from __future__ import annotations

import functools
import html
import re
import shutil
import socket
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import gradio as gr
import numpy as np
import uvicorn
from fastapi import FastAPI
from PIL import Image
from torch import nn

from rfclip.app import panels
from rfclip.app.guard import UPLOAD_LIMIT, Guard, Hosts, one_line
from rfclip.app.writer import described, save
from rfclip.config import POSTS, TINY, RefocusConfig
from rfclip.datasets.names import ClassNames
from rfclip.explanation import explain, figures
from rfclip.files import OUTPUTS
from rfclip.images import to_rgb
from rfclip.methods import METHODS, OWN, RF_CLIP, find_method
from rfclip.presets import PRESETS
from rfclip.segment.classes import Background, parse_classes, shipped_list, split_classes
from rfclip.segment.drawing import Colour, as_seen, class_colours, marked
from rfclip.segment.job import Job
from rfclip.segment.result import Segmentation
from rfclip.simulated_distraction import inject_distraction, injected, injected_registers
from rfclip.tiny.scenes import CLASSES, make_scene
from rfclip.towers import Tower, read_tower
from rfclip.towers.loading import tiny_folder

PIXEL_LIMIT = 25_000_000  # of an upload
ASPECT_LIMIT = 16  # long side over short side, of an upload
SHOWN_SIDE = 1600  # pixels, the most that is shown and seen; with the aspect ratio it bounds the number of windows
SEEN_ASPECT = 2  # beyond it, the maps are of no more patches: their cost grows with the square
NAME_LIMIT = 255  # class names with synonyms
KEPT = 3600  # seconds that the files and the state of a visit are kept
ACROSS = "Attend across all windows in the last block: the core of GLA-CLIP, not its published form with a DINO"
LINE = 100  # requests that wait; those that nobody listens for leave soon
STOPPING = 3  # seconds that answers may take to end when the page is stopped
SCENES = ((11, "dog, banana"), (21, "bus, owl"), (35, "cat, guitar"))  # seeds, and classes absent from the scene


@dataclass(frozen=True)
class Seen:
    """What a click on a result needs: the picture as the tower saw it, and the settings it was seen with."""

    image: Image.Image
    layers: tuple[int, ...]
    job: Job
    config: RefocusConfig
    shown: tuple[int, int]  # of the overlay
    size: tuple[int, int]  # of the picture that was uploaded
    short_side: int


class Page:
    """The work behind the page. A model is refocused in place, so one visitor is served at a time.

    Args:
        jobs: the models to choose from, with a config if one is given.
        folder: for all files of the page; whoever made it removes it.
    """

    def __init__(self, jobs: list[Job], folder: Path) -> None:
        self.jobs = {str(job): job for job in jobs}
        self.folder = folder
        self._load = functools.lru_cache(maxsize=2)(lambda job: job.load())
        self.scenes = self._scenes()
        self.stopping = threading.Event()  # when set, nothing more is written to the folder
        self._weights: dict[Job, str] = {}  # digests

    def segment(
        self,
        file: str | None,
        classes: str,
        method: str,
        chosen: str,
        tau: float,
        beta: float,
        layers: str,
        post: str,
        inject: float,
        contours: bool,
        across: bool,
        known: tuple[str, ...],
        progress: gr.Progress = gr.Progress(),  # noqa: B008  as Gradio requires
    ) -> Iterator[tuple[object, ...]]:
        """The results for the page, a point to look at, and the names that have colours; after an error, none."""
        try:
            with ErrorsOnPage():
                if file is None:
                    raise ValueError("no picture: upload one, or pick a scene")
                rgb = _read(file)
                named, offered = _class_names(classes), self.jobs[chosen]
                downloaded = "" if offered.model == TINY else " (its weights are downloaded the first time)"
                progress(0, desc=f"loading {offered}{downloaded}")
                model = self._load(offered)
                config = offered.config or model.refocus_config
                if config is not None:
                    config = replace(config, tau=tau, beta=beta, layers=_numbers(layers))
                    config = injected(config) if inject else config
                card = find_method(method)
                own = config if card.configured else None
                neurons = injected_registers(model) if inject and card.registers else None
                job = replace(
                    offered,
                    config=own,
                    method=method,
                    post=None if post == OWN else post,
                    inject=inject,
                    registers=neurons,
                    across_windows=across,
                )
                with job.segmenter(model, long_side=SHOWN_SIDE, cache=self.folder / "text") as segmenter:
                    named = segmenter.with_background(named, None)
                    with warnings.catch_warnings():
                        warnings.simplefilter("ignore")  # segmenting warns about all names at once
                        for name in progress.tqdm([name for names in named for name in names], desc="class names"):
                            if self.stopping.is_set():
                                raise ValueError("the page is being stopped")
                            segmenter.text_embeddings((name,))
                    progress(0.4, desc="segmenting")
                    began = time.perf_counter()
                    drawn = segmenter.segment(_shrunk(rgb), named, confidence=True, post=job.post)
                    seconds = round(time.perf_counter() - began, 3)
                    self._weights[offered] = self._weights.get(offered) or segmenter.digest()
                    record = described(job, segmenter, named, None, self._weights[offered])
                    record |= dict(zip(("model", "pretrained"), job.shown, strict=True))
                progress(0.7, desc="looking into the tower")
                colours = _colours(known, drawn.classes)
                drawn = replace(drawn, colours=tuple(colours[name] for name in drawn.classes))
                overlay = drawn.overlay(legend=False, contours=contours)
                maps, seen, about = self._maps(drawn.image, rgb.size, model, offered, config, inject)
                labels = Image.fromarray(drawn.labels).resize(rgb.size, Image.Resampling.NEAREST)
                found = replace(drawn, image=rgb, labels=np.asarray(labels))
                (width, height), name = rgb.size, Path(file).stem
                row = {"image": Path(file).name, "width": width, "height": height, "seconds": seconds}
                summary = f"{width} x {height} pixels: **{seconds:.2f} s** with {method} on {offered}. {about}"
                if isinstance(named[-1], Background):
                    summary += f" One class would cover every picture: background is {', '.join(named[-1])}."
                places = (gr.Number(side // 2, maximum=side - 1) for side in rgb.size)
                # Gradio copies the files while this is suspended, and removes its copies when they are old.
                with tempfile.TemporaryDirectory(dir=self.folder) as folder:
                    files = {output: Path(folder, f"{name}{output}") for output in (OUTPUTS[0], OUTPUTS[2])}
                    save(found, row | record, files)
                    downloads = (gr.DownloadButton(value=str(path)) for path in files.values())
                    shown = gr.Image(overlay, alt_text=f"The picture in colours: {', '.join(_rows(found))}")
                    pointing = gr.Column(visible=seen is not None)
                    yield (
                        *(
                            shown,
                            overlay,
                            _legend(found),
                            summary,
                            gr.Row(visible=True),
                            *downloads,
                            pointing,
                            "",
                            maps,
                        ),
                        *(seen, *places, tuple(colours)),
                    )
        except gr.Error:
            yield *_nothing(), gr.skip(), gr.skip(), gr.skip()
            raise

    def _maps(
        self,
        rgb: Image.Image,
        size: tuple[int, int],
        model: nn.Module,
        offered: Job,
        config: RefocusConfig | None,
        inject: float,
    ) -> tuple[str, Seen | None, str]:
        """What RF-CLIP finds in the picture as a whole, whatever the method, and a sentence about it."""
        if config is None:
            return "", None, "This model's distraction dimensions are not known, so there are no maps."
        short_side = _short_side(rgb, read_tower(model))
        try:
            with inject_distraction(model, inject):
                found = explain(model, rgb, config, short_side=short_side, backend=offered.backend)
        except ValueError as error:  # for instance, layers beyond the tower
            return "", None, f"No maps: {for_page(str(error))}"
        seen = Seen(found.image, found.layers, replace(offered, inject=inject), config, rgb.size, size, short_side)
        about = figures.describe(found)
        if offered.model == TINY and not found.distraction.any():
            about += " This small model has none of its own; the settings can simulate some."
        return panels.maps_of(found), seen, about

    def place(self, seen: Seen | None, event: gr.SelectData) -> tuple[int, int]:
        """The pixel of the picture that was clicked in the overlay."""
        with ErrorsOnPage():
            sides = zip(event.index, _seen(seen).shown, _seen(seen).size, strict=True)
            x, y = (min(clicked, shown - 1) * side // shown for clicked, shown, side in sides)
            return x, y

    def point(
        self, plain: Image.Image, seen: Seen | None, x: float | None, y: float | None
    ) -> Iterator[tuple[Image.Image | None, str]]:
        """The overlay with a mark at a pixel of the picture, and what that place attends to."""
        try:
            with ErrorsOnPage():
                seen = _seen(seen)
                width, height = seen.size
                if x is None or y is None or not (0 <= x < width and 0 <= y < height):
                    raise ValueError(f"X and Y: expected from 0 to {width - 1} and from 0 to {height - 1}")
                right, down = (x + 0.5) / width, (y + 0.5) / height
                model = self._load(replace(seen.job, inject=0.0))
                with inject_distraction(model, seen.job.inject):
                    found = explain(
                        model,
                        seen.image,
                        seen.config,
                        points=[(right * seen.image.width, down * seen.image.height)],
                        layers=seen.layers,
                        short_side=seen.short_side,
                        backend=seen.job.backend,
                    )
                yield marked(plain, right, down), panels.attention_of(found)
        except gr.Error:
            yield plain, ""
            raise

    def blocks(self, say: Callable[[str], None]) -> gr.Blocks:
        """The page itself; `say` prints a line for each request that cannot be understood."""
        title = "RF-CLIP: segment a picture by class names"
        start = next(iter(self.jobs.values())).config or RefocusConfig(())  # from --config, if given
        with _Blocks(say, title=title, analytics_enabled=False, delete_cache=(KEPT // 6, KEPT)) as page:
            gr.Markdown(f"# {title}")
            seen, known = gr.State(time_to_live=KEPT), gr.State((), time_to_live=KEPT)
            with gr.Row():
                with gr.Column(scale=2, min_width=320):
                    gr.Markdown("## Picture")  # a label would cover what is in the box
                    file = gr.File(label="Picture", show_label=False, file_types=["image"], height=140, elem_id="file")
                    preview = _shown("preview", "The picture", height=240, visible=False, buttons=[])
                    gr.Markdown("or one of these scenes:")
                    scenes = gr.Gallery(
                        [(path, names) for path, names in self.scenes],
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
                        lines=1,  # so that Enter submits
                        max_lines=6,
                    )
                    button = gr.Button("Segment", variant="primary")
                    with gr.Row():
                        method = gr.Dropdown(list(METHODS), value=RF_CLIP, label="Method")
                        model = gr.Dropdown(list(self.jobs), label="Model")
                    with gr.Accordion("Settings", open=False):
                        inject = gr.Slider(
                            0, 0.5, 0, step=0.05, label="Simulate distraction in this share of the tokens"
                        )
                        contours = gr.Checkbox(label="Contours: lines between the classes")
                        across = gr.Checkbox(label=ACROSS, visible=_crosses(RF_CLIP))
                        post = gr.Dropdown(
                            [("as the method does", OWN), *POSTS],
                            value=OWN,
                            label="What happens to the logits of pixels",
                        )
                        tau = gr.Slider(
                            0, max(20, start.tau), start.tau, step=0.1, label="tau: tokens over tau / d distract"
                        )
                        beta = gr.Slider(0, 1, start.beta, step=0.05, label="beta: share of attention taken away")
                        layers = gr.Textbox(
                            ", ".join(map(str, start.layers or ())) or "all",
                            label='Layers that refocus: "all", or 3, 4, 5',
                        )
                with gr.Column(scale=3, min_width=320, elem_id="results"):
                    gr.Markdown("## Segmentation")
                    overlay = _shown("overlay", "The segmented picture", buttons=["download", "fullscreen"])
                    plain = gr.Image(visible="hidden", format="png", type="pil", alt_text="The segmented picture")
                    legend = gr.HTML(elem_id="legend")
                    summary = gr.Markdown(elem_id="summary")
                    with gr.Row(visible=False) as saving:
                        mask = gr.DownloadButton("Mask (PNG)")
                        record = gr.DownloadButton("JSON")
                    with gr.Column(visible=False) as pointing:
                        gr.Markdown("To see what a place attends to, click it in the segmentation, or give its pixel:")
                        with gr.Row():
                            x = gr.Number(label="X, from the left", minimum=0, precision=0, min_width=100)
                            y = gr.Number(label="Y, from the top", minimum=0, precision=0, min_width=100)
                            look = gr.Button("Show attention", elem_id="look")
                    attention = gr.HTML(elem_id="attention")
                    maps = gr.HTML(elem_id="maps")
            one = {"concurrency_limit": 1, "concurrency_id": "tower", "api_visibility": "private"}
            results = [overlay, plain, legend, summary, saving, mask, record, pointing, attention, maps, seen]
            file.change(_preview, file, [preview, *results], **one)
            method.change(_across, method, across, api_visibility="private")
            scenes.select(self._pick, None, [file, classes], api_visibility="private")
            settings = [file, classes, method, model, tau, beta, layers, post, inject, contours, across, known]
            asked = [button.click, classes.submit]
            gr.on(asked, self.segment, settings, [*results, x, y, known], show_progress_on=[overlay], **one)
            gr.on(asked, js=IN_VIEW.format(name="results", block="start"))
            answer = {"outputs": [overlay, attention], "show_progress_on": [overlay], **one}
            for asked in (overlay.select(self.place, seen, [x, y], **one).success, look.click):
                answered = asked(self.point, [plain, seen, x, y], **answer)
                answered.success(js=IN_VIEW.format(name="attention", block="nearest"))
        return page.queue(max_size=LINE)

    def _scenes(self) -> list[tuple[str, str]]:
        """The bundled pictures, copied to where Gradio may read them, and class names for each."""
        first = shutil.copy(tiny_folder() / "scene.png", self.folder)
        scenes = [(str(first), "tiger, mushroom, pizza, cake, cat, bus, grass, sky")]
        for seed, absent in SCENES:
            scene, path = make_scene(seed), self.folder / f"scene-{seed}.png"
            scene.save(path)
            scenes.append((str(path), ", ".join([*(CLASSES[index] for index in scene.present(100)), absent])))
        return scenes

    def _pick(self, event: gr.SelectData) -> tuple[str, str]:
        return self.scenes[event.index]


class _Blocks(gr.Blocks):
    """Says in one line what Gradio prints as a traceback: requests that are not what the page sends."""

    def __init__(self, say: Callable[[str], None], **options: Any) -> None:
        super().__init__(**options)
        self._say = say

    async def process_api(self, *given: Any, **named: Any) -> Any:
        try:
            return await super().process_api(*given, **named)
        except Exception as error:
            if isinstance(error, gr.Error) and not error.print_exception:
                raise
            self._say(f"bad request: {one_line(error)}")
            raise gr.Error("bad request", print_exception=False) from error


def _read(file: str) -> Image.Image:
    """An upload, read as everywhere in this package; errors give its name, not its path."""
    try:
        rgb = to_rgb(file)
    except FileNotFoundError as error:
        raise ValueError(f"{Path(file).name} is no longer kept here: upload it again") from error
    except (ValueError, OSError) as error:
        raise ValueError(str(error).replace(file, Path(file).name)) from error
    if max(rgb.size) > ASPECT_LIMIT * min(rgb.size):
        raise ValueError(
            f"a strip of {rgb.width} x {rgb.height} pixels: at most {ASPECT_LIMIT} times as long as it is wide"
        )
    return rgb


def _preview(file: str | None) -> Iterator[tuple[object, ...]]:
    """The picture chosen, and no results, which would be those of another one."""
    try:
        with ErrorsOnPage():
            shown = gr.Image(visible=False) if file is None else gr.Image(_shrunk(_read(file)), visible=True)
            yield shown, *_nothing()
    except gr.Error:
        yield gr.Image(None, visible=False), *_nothing()
        raise


def _nothing() -> tuple[object, ...]:
    """For the results on the page, when there are none."""
    hidden = gr.Row(visible=False), None, None, gr.Column(visible=False)
    return None, None, "", "", *hidden, "", "", None


def _crosses(method: str) -> bool:
    """Whether the method may attend across windows; for those of RF-CLIP's tower, only their settings tell."""
    return bool(find_method(method).load().crosses)


def _across(method: str) -> gr.Checkbox:
    """The checkbox, unticked, where the method allows it."""
    return gr.Checkbox(False, visible=_crosses(method))


def _seen(seen: Seen | None) -> Seen:
    if seen is None:
        raise ValueError("no attention to show: the line below the picture says why, or segment the picture again")
    return seen


def _colours(known: Iterable[str], classes: tuple[str, ...]) -> dict[str, Colour]:
    """Of the classes, and of names that had colours before and keep them, as long as there are enough."""
    names = dict.fromkeys([*known, *classes])
    return class_colours(names if len(names) <= NAME_LIMIT else classes)


def _shrunk(picture: Image.Image) -> Image.Image:
    """A copy at the size shown."""
    small = picture.copy()
    small.thumbnail((SHOWN_SIDE, SHOWN_SIDE))
    return small


def _short_side(picture: Image.Image, tower: Tower) -> int:
    """Of the picture in the maps: as the tower was trained, or less if it is long."""
    trained, aspect = min(tower.image_size), max(picture.size) / min(picture.size)
    return max(round(trained * min(1, SEEN_ASPECT / aspect) ** 0.5), max(tower.patch_size))


class ErrorsOnPage:
    """Turns errors, and the package's warnings, into messages on the page.

    One request at a time: models are refocused in place, and Python catches warnings for all threads at once. Gradio's
    queue alone is not enough, since requests sent directly to its server bypass it.
    """

    _lock = threading.Lock()

    def __enter__(self) -> None:
        self._lock.acquire()
        self._caught = warnings.catch_warnings(record=True)
        self._warned = self._caught.__enter__()
        warnings.simplefilter("always", UserWarning)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._caught.__exit__(kind, error, trace)
        self._lock.release()
        said = {str(warned.message) for warned in self._warned if warned.category is UserWarning}
        for message in (
            said if kind is not GeneratorExit else ()
        ):  # then the visitor has left, and Gradio would print it
            gr.Warning(html.escape(for_page(message)))
        if isinstance(error, ValueError | OSError | RuntimeError | MemoryError):  # torch out of memory: RuntimeError
            raise gr.Error(html.escape(for_page(str(error))), duration=None, print_exception=False) from error


def _class_names(text: str) -> ClassNames:
    if not text.strip(" ,;\n"):
        raise ValueError('no class names: type some, such as "cat, grass, sky"')
    text = text.strip(" ,;\n")
    named = shipped_list(text) or parse_classes(split_classes(text))  # never taken as a file of this machine
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


def _shown(name: str, alt: str, **options: Any) -> gr.Image:
    """A picture for looking at. A label would cover part of it."""
    return gr.Image(alt_text=alt, show_label=False, format="png", interactive=False, elem_id=name, **options)


def _rows(found: Segmentation) -> dict[str, Colour]:
    """Each class with its share, largest first, and its colour as seen in the overlay."""
    rows = sorted(zip(found.shares.items(), found.palette, strict=True), key=lambda row: -row[0][1])
    return {f"{name} {100 * share:.1f} %": as_seen(colour) for (name, share), colour in rows}


def _legend(found: Segmentation) -> str:
    cells = (
        f'<li><span style="background:rgb{colour}"></span>{html.escape(text)}</li>'
        for text, colour in _rows(found).items()
    )
    return f"<ul>{''.join(cells)}</ul>"


def for_page(message: str) -> str:
    """An error or a warning without its sentences about the command line or Python, which are no help on a page."""
    sentences = re.split(r"(?<=\.)\s+|\n", message)
    kept = [sentence for sentence in sentences if not ELSEWHERE.search(sentence)]
    if not kept or kept == sentences:
        return message
    return f"{' '.join(kept)} Choose another model on this page."


ELSEWHERE = re.compile(r"(?<![\w-])--[a-z]|\brfclip [a-z]|\bin Python\b")
IN_VIEW = """() => {{
    const shown = document.getElementById("{name}"), top = shown.getBoundingClientRect().top;
    const behavior = matchMedia("(prefers-reduced-motion: reduce)").matches ? "auto" : "smooth";
    if (top < 0 || top > innerHeight / 2) shown.scrollIntoView({{behavior, block: "{block}"}});
}}"""

STYLE = (
    """
#legend ul {display: flex; flex-wrap: wrap; gap: .3em 1.2em; list-style: none; padding: 0; margin: 0}
#legend li span {display: inline-block; width: 1em; height: 1em; margin-right: .4em; border: 1px solid}
#results, #attention {scroll-margin: 1rem}
#results .html-container {padding: 0}
#look {flex: 1 0 11rem; align-self: end}
#scenes .grid-container {grid-template-columns: repeat(4, minmax(0, 1fr))}
#file .or {color: inherit}
#scenes .caption-label {display: none}  /* it names the picture for those who do not see it */
"""
    + panels.STYLE
)


def _theme() -> gr.themes.Base:
    """Gradio's own, with a contrast of at least 4.5 to 1 where it has less, and no font from the network."""
    button = {
        f"button_primary_background_fill{state}{mode}": f"*primary_{shade}"
        for state, shade in (("", 700), ("_hover", 800))
        for mode in ("", "_dark")
    }
    placeholder = {"input_placeholder_color": "*neutral_500", "input_placeholder_color_dark": "*neutral_400"}
    return gr.themes.Default(font="sans-serif", font_mono="monospace").set(**button, **placeholder)


def choices(
    model: str,
    pretrained: str | None,
    config: RefocusConfig | None,
    device: str = "cpu",
    backend: str = "auto",
    protocol: str = OWN,
) -> list[Job]:
    """The model given, the bundled one, and those whose distraction dimensions are known."""
    first = Job(model, pretrained, config, device=device, backend=backend, protocol=protocol)
    known = [(name, tag) for name, tag in PRESETS if tag is not None]
    others = [(name, tag) for name, tag in [(TINY, None), *known] if (name, tag) != (model, pretrained)]
    return [first, *(replace(first, model=name, pretrained=tag, config=None) for name, tag in others)]


def serve(jobs: list[Job], folder: Path, host: str, port: int, say: Callable[[str], None]) -> None:
    """Serve the page until the process is interrupted; `say` prints its address, and a line for each bad request.

    Files go below `folder`, and Gradio's to where GRADIO_TEMP_DIR pointed when it was imported. A thread may still work
    on a request afterwards, and only the end of the process stops it.

    Raises:
        OSError: the port is taken, or the host is not an address of this machine.
    """
    Image.MAX_IMAGE_PIXELS = PIXEL_LIMIT
    work = Page(jobs, folder)
    page = work.blocks(say)
    options = {"max_file_size": UPLOAD_LIMIT, "css": STYLE, "footer_links": [], "run_history": False}
    options["theme"] = _theme()
    app = gr.mount_gradio_app(FastAPI(openapi_url=None), page, "/", ssr_mode=False, show_error=False, **options)
    uploaded = Path(page.app.uploaded_file_dir)

    def swept() -> None:
        for path in uploaded.glob("tmp*"):  # parts of an upload that Gradio did not take
            if path.is_file():
                path.unlink()

    async def leave(session: str) -> None:
        await page._queue.clean_events(session_hash=session)

    guard = Guard(app, Hosts(host, port), folder, KEPT + KEPT // 6, swept, leave, say)
    # Not its own messages: a line tells of a bad request, and an end in the middle of a request is none.
    config = uvicorn.Config(guard, log_level="critical", ws="none", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listening = socket.create_server((host, port), family=family)
    except OSError as error:
        raise OSError(f"--host {host} --port {port}: cannot listen there; the port may be taken") from error
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    try:
        thread.start()
        shown = {"0.0.0.0": "localhost", "::": "localhost"}.get(host, f"[{host}]" if ":" in host else host)
        say(f"Open http://{shown}:{port}/ ; Ctrl-C stops it.")
        while thread.is_alive():  # an Event's wait() is deaf to Ctrl-C on Windows
            time.sleep(1)
    except KeyboardInterrupt:
        pass
    work.stopping.set()
    page.app.stop_event.set()
    server.should_exit = True
    thread.join(STOPPING)
