"""`rfclip serve`."""

from __future__ import annotations

import os
import signal
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from rfclip.app.cli import common
from rfclip.config import TINY, canonical_name
from rfclip.extras import require


def serve(
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 7860,
    model: common.Model = TINY,
    pretrained: common.Pretrained = None,
    device: common.Device = "cpu",
    backend: common.Backend = "auto",
    config: common.Config = None,
) -> None:
    """Serve a page to try it in the browser, until Ctrl-C."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the temporary folder is removed as well
    with common.clear_errors(), tempfile.TemporaryDirectory(prefix="rfclip-") as folder:
        require("the page", "serve", "gradio", "matplotlib")
        refocusing = common.read_config(config)
        # Set before Gradio is imported, which then makes the folder; files in it already are not copied.
        os.environ["GRADIO_TEMP_DIR"] = os.path.join(folder, "gradio")
        os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
        from rfclip.app import serve as page
        from rfclip.towers.loading import check_model

        common.available(device)
        name = canonical_name(model)
        if name != TINY:
            check_model(name, pretrained)
        page.serve(
            page.choices(name, pretrained, refocusing, device, backend),
            Path(folder),
            host,
            port,
            ready=lambda address: common.say(f"Open {address} ; Ctrl-C stops it."),
        )
