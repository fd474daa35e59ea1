"""The `rfclip` command, one file per group of commands.

PyTorch is imported only once the arguments that can be checked without it have been.
"""

from __future__ import annotations

import logging
import signal
import threading
from typing import Annotated

import typer

from rfclip import __version__
from rfclip.app.cli import calibrate, doctor, evaluate, explain, listings, registers, segment, serve
from rfclip.app.cli.common import out_console

__all__ = ["app"]

app = typer.Typer(
    help="RF-CLIP: training-free open-vocabulary segmentation with CLIP.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)
for command in (
    segment.segment,
    calibrate.calibrate,
    registers.registers,
    explain.explain,
    serve.serve,
    listings.models,
    listings.methods,
    doctor.info,
    doctor.doctor,
    evaluate.evaluate,
    evaluate.ablate,
    evaluate.prepare,
):
    app.command()(command)


def _version(wanted: bool) -> None:
    if wanted:
        out_console.print(f"rfclip {__version__}", highlight=False)
        raise typer.Exit


def _ended(number: int, frame: object) -> None:
    """End as after Ctrl-C, which removes temporary files and stops workers."""
    signal.signal(number, signal.SIG_IGN)
    raise SystemExit(128 + number)


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)):  # which Windows does not have
            if signal.getsignal(number) is signal.SIG_DFL:
                signal.signal(number, _ended)
    # What it says about each attempt to reach the hub, the error that ends them says once, in a sentence.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
