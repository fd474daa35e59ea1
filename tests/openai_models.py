"""OpenAI's own package, and small models of it."""

import sys
from types import SimpleNamespace

import packaging.version
import torch
from small_models import small_clip
from torch import nn

# The package reads its PyTorch's version with a module that is gone from setuptools, or warns that it will be.
_present = sys.modules.get("pkg_resources")
sys.modules["pkg_resources"] = SimpleNamespace(packaging=packaging)
import clip  # noqa: E402

del sys.modules["pkg_resources"]
if _present is not None:
    sys.modules["pkg_resources"] = _present

SIZES = {"width": 128, "head_width": 64, "mlp_ratio": 4.0}  # the package has heads of 64 dimensions and wide MLPs only


def to_openai(model):
    """A `clip.model.CLIP` with the weights of an open_clip CLIP of such sizes, and its activation."""
    visual, texts = model.visual, model.transformer.resblocks
    made = clip.model.CLIP(
        visual.output_dim,
        *(visual.image_size[0], len(visual.transformer.resblocks), visual.conv1.out_channels, visual.patch_size[0]),
        *(model.context_length, model.vocab_size, model.ln_final.normalized_shape[0]),
        *(texts[0].attn.num_heads, len(texts)),
    )
    made.load_state_dict({name: value for name, value in model.state_dict().items() if name != "attn_mask"})
    for block in (*made.visual.transformer.resblocks, *made.transformer.resblocks):
        if isinstance(texts[0].mlp.gelu, nn.GELU):
            block.mlp.gelu = nn.GELU()
    return made.to(visual.conv1.weight.dtype).eval()


def small_openai(**options):
    """As `small_clip`, of OpenAI's package, which computes in float32 and float16."""
    return to_openai(small_clip(**{**SIZES, "quick_gelu": True, "dtype": torch.float32, **options}))
