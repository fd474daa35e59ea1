"""The vision transformers of OpenAI's own package, `clip`."""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor, nn

from rfclip.towers.open_clip import OpenCLIPTower


class OpenAITower(OpenCLIPTower):
    """The `.visual` of a ready `clip.model.CLIP`, whose parts are named as in open_clip, which grew from it.

    Its weights are pickles, so that none is loaded by name; open_clip has the same ones as safetensors.
    """

    library = "clip"

    @classmethod
    def find(cls, model: nn.Module) -> nn.Module | None:
        visual: Any = getattr(model, "visual", None)
        kind = getattr(sys.modules.get("clip.model"), "VisionTransformer", ())  # imported if there is a model of it
        return visual if isinstance(visual, kind) else None

    @classmethod
    def takes(cls, name: str) -> bool:
        return False

    def __init__(self, model: Any) -> None:
        size, patch = model.visual.input_resolution, model.visual.conv1.kernel_size[0]
        self.image_size, self.patch_size, self.grid_size = (size,) * 2, (patch,) * 2, (size // patch,) * 2
        self._take(model.visual)

    def pool(self, x: Tensor) -> Tensor:
        return self.readout(x[:, 0])
