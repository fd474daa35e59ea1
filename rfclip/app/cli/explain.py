"""`rfclip explain`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import typer

from rfclip.app.cli import common
from rfclip.config import TINY
from rfclip.extras import require
from rfclip.files import printable, write_whole
from rfclip.methods import OWN, RF_CLIP, find_protocol


def explain(
    images: common.Images,
    points: Annotated[
        list[str] | None, typer.Option(metavar="X,Y", help="A point to follow, in pixels; may be repeated.")
    ] = None,
    layers: Annotated[str | None, typer.Option(help='Blocks to show, from 1: "3,6,9"; four by default.')] = None,
    classes: Annotated[
        list[str] | None,
        typer.Option("--classes", "-c", help=f"As for segment; by default those of {TINY}, and none for other models."),
    ] = None,
    method: Annotated[str, typer.Option(help="What segments: rf-clip, or released, the authors' own code.")] = RF_CLIP,
    protocol: common.ProtocolName = OWN,
    post: common.Post = None,
    model: common.Model = TINY,
    pretrained: common.Pretrained = None,
    device: common.Device = "cpu",
    backend: common.Backend = "auto",
    config: common.Config = None,
    compare: Annotated[
        Literal["registers"] | None,
        typer.Option(help="Show beside the distraction tokens what test-time registers call outliers."),
    ] = None,
    registers: common.Registers = None,
    inject_distraction: common.Inject = 0.0,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the results.")] = Path("rfclip-explained"),
    overwrite: common.Overwrite = False,
) -> None:
    """Show what refocusing changes in pictures: PNG figures and an HTML report for each, and a profile over all."""
    with common.clear_errors():
        require("explain", "explain", "matplotlib")
        found, failed = common.some_images(images)
        # Windows drops dots and spaces at the end of a folder's name.
        found = [(file, result.with_name(result.name.rstrip(" .") or "_")) for file, result in found]
        found, clashing = common.distinct(found)
        failed += clashing
        from rfclip.segment.classes import parse_lists

        places, numbers = _places(points or []), _numbers(layers)
        names = (classes[0] if len(classes) == 1 else parse_lists(classes)) if classes else None
        if method not in (RF_CLIP, "released"):
            raise ValueError(f"--method {method}: expected {RF_CLIP} or released")
        find_protocol(protocol, method)
        common.check_folder(out)
        given, neurons = common.read_config(config), common.read_registers(registers, [compare] if compare else [])
        from rfclip import simulated_distraction
        from rfclip.explanation import explain as look
        from rfclip.explanation import figures
        from rfclip.explanation.registers import compare_registers
        from rfclip.plugin import refocus

        found = _without_results(found, out, set(figures.CAPTIONS))
        clip, refocusing = common.load(model, pretrained, device, given, ["rf-clip"])
        assert refocusing is not None
        if inject_distraction:
            refocusing = simulated_distraction.injected(refocusing)
            neurons = simulated_distraction.injected_registers(clip, neurons)
        if compare:
            refocus(clip, method=compare, registers=neurons, backend=backend).remove()
        profiles, done = [], []
        with common.progress() as progress:
            for file, result in progress.track(found, description="explaining"):
                folder = out / result
                try:
                    common.check_new(folder / "report.html", overwrite)
                    with simulated_distraction.inject_distraction(clip, inject_distraction):
                        seen = look(
                            clip,
                            file,
                            refocusing,
                            points=places or None,
                            layers=numbers,
                            classes=names or clip.trained_on,
                            method=method,
                            protocol=protocol,
                            post=post,
                            backend=backend,
                        )
                        drawn, beside = figures.draw(seen), None
                        if compare:
                            beside = compare_registers(clip, file, refocusing, neurons, backend=backend)
                            drawn["registers"] = figures.draw_registers(beside)
                    pictures = {name: figures.png(figure) for name, figure in drawn.items()}
                    facts = {
                        "model": model,
                        "weights": pretrained or "its own",
                        "method": method,
                        "protocol": protocol,
                        "post": post or "as the protocol does",
                        "injected distraction": inject_distraction,
                    }
                    page = figures.report(seen, pictures, printable(file.name), facts)
                    folder.mkdir(parents=True, exist_ok=True)
                    saves = {folder / f"{name}.png": partial(_write_bytes, data) for name, data in pictures.items()}
                    if beside is not None:
                        saves[folder / "registers.json"] = partial(_write_bytes, beside.to_json().encode())
                    write_whole(saves | {folder / "report.html": partial(_write_bytes, page.encode())})
                except (ValueError, OSError) as error:
                    failed.append((str(file), str(error)))
                    continue
                profiles.append(seen.before.profile)
                done.append(folder)
        if len(done) > 1:
            mean = sum(profiles[1:], profiles[0]) / len(profiles)
            picture = figures.png(figures.draw_profile(mean, refocusing.distraction_dims))
            try:
                common.check_new(out / "profile.png", overwrite)
                write_whole({out / "profile.png": partial(_write_bytes, picture)})
            except (ValueError, OSError) as error:
                failed.append((str(out / "profile.png"), str(error)))
    common.print_failed(failed)
    for folder in done:
        common.say(f"written: {folder / 'report.html'}")
    raise typer.Exit(1 if failed else 0)


def _places(points: list[str]) -> list[tuple[float, float]]:
    places = []
    for point in points:
        try:
            x, y = map(float, point.split(","))
        except ValueError as error:
            raise ValueError(f"--points {point}: expected X,Y") from error
        places.append((x, y))
    return places


def _numbers(layers: str | None) -> list[int] | None:
    try:
        return None if layers is None else [int(number) for number in layers.split(",")]
    except ValueError as error:
        raise ValueError(f"--layers {layers}: expected numbers such as 3,6,9") from error


def _without_results(found: list[tuple[Path, Path]], out: Path, figures: set[str]) -> list[tuple[Path, Path]]:
    """Leave out the figures of earlier runs."""
    figured = [out / "profile.png"] + [
        file for file, _ in found if file.stem in figures and (file.parent / "report.html").exists()
    ]
    earlier = {file.resolve() for file in figured}
    return [(file, result) for file, result in found if file.resolve() not in earlier]


def _write_bytes(data: bytes, path: Path) -> None:
    path.write_bytes(data)
