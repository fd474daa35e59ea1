"""What each of open_clip's models can be used for, by its config: nothing is built or downloaded."""

from __future__ import annotations

from typing import Literal

import open_clip
from timm import model_entrypoint

Use = Literal["refocus", "readout", "neither"]

POOLED = "its image embedding comes from a pool over all tokens, and nobody has shown distraction in such a tower"
CONVOLUTIONAL = "it has no transformer blocks, only a pool that attends to the convolutions' last map"
TIMM = "it is one of timm's, and nobody has shown distraction there"

# Files of timm whose towers `rfclip.towers.timm` reads, and why it does not read the others that open_clip has.
READ = ("eva", "vision_transformer", "vision_transformer_hybrid", "vitamin")
UNREAD = {
    "convnext": "a ConvNeXt has no attention to read values from",
    "fastvit": "a FastViT ends in convolutions, without values to read",
    "swin_transformer": "a Swin transformer attends within windows, at a quarter of the patches",
    "vision_transformer_relpos": "its attention adds biases of relative positions, which no method here defines",
}


def use_of(name: str) -> tuple[Use, str]:
    """What one of open_clip's models can be used for, and why it is no more than that.

    Args:
        name: one of `open_clip.list_models()`.

    Returns:
        "refocus" (every method that its number of blocks allows, RF-CLIP among them), "readout" (methods that refocus
        nothing) or "neither"; and the reason, empty for "refocus".
    """
    vision = open_clip.get_model_config(name)["vision_cfg"]
    if vision.get("timm_model_name"):
        file = model_entrypoint(vision["timm_model_name"]).__module__.rpartition(".")[2]
        return ("readout", TIMM) if file in READ else ("neither", UNREAD.get(file, f"timm's {file} is not known here"))
    if not isinstance(vision.get("layers", 12), int):
        return "readout", CONVOLUTIONAL
    if vision.get("attentional_pool"):
        return ("readout", POOLED) if vision["attentional_pool"] is True else ("neither", "it has two pools")
    if vision.get("pool_type", "tok") not in ("tok", "avg"):
        return "neither", "it does not pool its tokens"
    return "refocus", ""
