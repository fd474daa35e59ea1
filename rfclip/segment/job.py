"""A model with its settings, by name, so that a command, a page or a worker elsewhere can make the same one."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from rfclip import __version__
from rfclip.config import TINY, RefocusConfig, RegisterConfig
from rfclip.methods import OWN, RF_CLIP, Protocol, find_protocol
from rfclip.segment.segmenter import Segmenter
from rfclip.simulated_distraction import inject_distraction
from rfclip.towers.loading import absolute_names, find_model, load_model

# Of a protocol, what is not stated on its own.
PROTOCOL = (
    "resizing",
    "padding",
    "position_offset",
    "imagenet",
    "templates",
    "refined",
    "rule",
    "options",
    "constants",
)


@dataclass(frozen=True)
class Job:
    """A model with its settings; fields as on the command line.

    Attributes:
        model, pretrained: as `find_model` finds them.
        post: as for a call of a `Segmenter`.
        inject: the share of patch tokens in which distraction is simulated, see `inject_distraction`.
        protocol: as `find_protocol` takes it.
        across_windows: as for a `Segmenter`.
    """

    model: str = TINY
    pretrained: str | None = None
    config: RefocusConfig | None = None
    method: str = RF_CLIP
    backend: str = "auto"
    device: str = "cpu"
    precision: str = "fp32"
    batch: int | None = None
    post: str | None = None
    inject: float = 0.0
    protocol: str = OWN
    across_windows: bool = False
    registers: RegisterConfig | None = None

    def __post_init__(self) -> None:
        for field, value in zip(("model", "pretrained"), find_model(self.model, self.pretrained), strict=True):
            object.__setattr__(self, field, value)

    @property
    def shown(self) -> tuple[str, str | None]:
        """Model and weights without the folders of this machine."""
        return _without_folder(self.model), self.pretrained and _without_folder(self.pretrained)

    def __str__(self) -> str:
        return ", ".join(filter(None, self.shown))

    def load(self, device: str | None = None) -> Any:
        """The model, on the job's device or on another."""
        return load_model(self.model, self.pretrained, device=device or self.device, precision=self.precision)

    @contextlib.contextmanager
    def segmenter(
        self,
        model: nn.Module | None = None,
        *,
        device: str | None = None,
        protocol: Protocol | None = None,
        **options: Any,
    ) -> Iterator[Segmenter]:
        """A segmenter, and with it the simulated distraction, until the `with` statement ends.

        Args:
            model: the job's model if it is loaded already.
            device: where the model is or will be; if that is not the job's device, the backend is "auto".
            protocol: in place of the job's own, as for `Segmenter`.
            options: as for `Segmenter`.
        """
        there = device or self.device
        segmenter = Segmenter(
            self.model if model is None else model,
            self.pretrained if model is None else None,
            config=self.config,
            registers=self.registers,
            method=self.method,
            protocol=protocol or find_protocol(self.protocol, self.method),
            backend=self.backend if there == self.device else "auto",
            device=there,
            precision=self.precision,
            batch=self.batch,
            across_windows=self.across_windows,
            **options,
        )
        with segmenter, inject_distraction(segmenter.model, self.inject):
            segmenter.check_post(self.post)
            yield segmenter

    def elsewhere(self) -> Job:
        """The same for a process with another working directory."""
        model, pretrained = absolute_names(self.model, self.pretrained)
        return replace(self, model=model, pretrained=pretrained)

    def described(self, segmenter: Segmenter, weights: str | None = None) -> dict[str, object]:
        """What a result depends on; `weights` is the segmenter's digest if that is known."""
        windows, protocol = segmenter.windows, asdict(segmenter.protocol)
        return {
            "model": self.model,
            "pretrained": self.pretrained,
            "weights": weights or segmenter.digest(),
            "method": segmenter.method,
            "config": segmenter.config and json.loads(segmenter.config.to_json()),
            "registers": segmenter.registers and json.loads(segmenter.registers.to_json()),
            "backend": self.backend,
            "precision": self.precision,
            "short_side": windows.short_side,
            "long_side": windows.long_side,
            "window": windows.window,
            "stride": windows.stride,
            "logit_scale": segmenter.logit_scale,
            "post": segmenter.protocol.post if self.post is None else self.post,
            "protocol": {"name": self.protocol} | {key: protocol[key] for key in PROTOCOL},
            "across_windows": self.across_windows,
            "inject_distraction": self.inject,
            "rfclip": __version__,
        }


def differing(keys: Iterable[str], before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The settings among `keys` in which results differ; the development versions before a release are one version."""

    def value(settings: Mapping[str, Any], key: str) -> Any:
        found = settings.get(key)
        return re.sub(r"\.dev.*", ".dev", found) if key == "rfclip" and isinstance(found, str) else found

    return [key for key in keys if value(before, key) != value(now, key)]


def _without_folder(name: str) -> str:
    source, colon, path = ("", "", name) if os.path.exists(name) else name.partition(":")  # C:/ has a colon as well
    return f"{source}{colon}{Path(path).name}" if os.path.exists(path) else name
