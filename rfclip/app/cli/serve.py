"""`rfclip serve`."""

from __future__ import annotations

import os
import signal
import sys
from typing import Annotated

import typer

from rfclip.app.cli import common
from rfclip.app.folder import temporary_folder
from rfclip.config import TINY
from rfclip.extras import require
from rfclip.methods import OWN, RF_CLIP, find_protocol


def serve(
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 7860,
    model: common.Model = TINY,
    pretrained: common.Pretrained = None,
    device: common.Device = "cpu",
    backend: common.Backend = "auto",
    config: common.Config = None,
    protocol: common.ProtocolName = OWN,
) -> None:
    """Serve a page to try it in the browser, until Ctrl-C."""
    signals = [signal.SIGINT, signal.SIGTERM]
    if sys.platform != "win32":
        signals.append(signal.SIGHUP)
    signals = [number for number in signals if signal.getsignal(number) is not signal.SIG_IGN]  # nohup ignores some

    def stop(*_: object) -> None:
        for number in signals:
            signal.signal(number, signal.SIG_IGN)  # a second one would keep the temporary folder
        raise KeyboardInterrupt

    for number in signals:
        signal.signal(number, stop)
    with common.clear_errors(), temporary_folder() as folder:
        require("the page", "serve", "gradio", "matplotlib", "scipy", "sklearn")
        refocusing = common.read_config(config)
        find_protocol(protocol, RF_CLIP)
        # Set before Gradio is imported, which then makes the folder; files in it already are not copied.
        os.environ["GRADIO_TEMP_DIR"] = str(folder / "gradio")
        os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
        from rfclip.app import serve as page
        from rfclip.towers.loading import check_model, find_model

        common.available(device)
        name, pretrained = find_model(model, pretrained)
        if name != TINY:
            check_model(name, pretrained, refocused=True)
        jobs = page.choices(name, pretrained, refocusing, device, backend, protocol)
        page.serve(jobs, folder, host, port, common.say)
    os._exit(0)  # Python's own end aborts if a thread is still inside torch, in a request
