"""Small random towers that are read without refocusing, in open_clip's models: timm's, ResNets and CoCa."""

import timm
import torch
from open_clip.coca_model import CoCa
from open_clip.model import CLIP, CustomTextCLIP
from torch import nn

TEXT = {"context_length": 8, "vocab_size": 32, "width": 16, "heads": 2, "layers": 1}
SMALL = {"embed_dim": 48, "depth": 3, "num_heads": 3, "img_size": 32, "patch_size": 8}
HYBRID = {"depth": 2, "img_size": 64}  # whose convolutions say how wide the blocks are
MAP, TOKEN, AVERAGE = ({"global_pool": pool, "num_classes": 20} for pool in ("map", "token", "avg"))
# The name of a timm model, what makes it small, and the tokens in front of its patches.
TIMM = {
    "siglip": ("vit_base_patch16_siglip_224", SMALL | MAP | {"num_classes": 0}, 0),
    "siglip-odd": ("vit_base_patch16_siglip_224", SMALL | MAP | {"num_classes": 0, "img_size": 35}, 0),
    "pe-core": ("vit_pe_core_base_patch16_224", SMALL | MAP, 1),
    "pe-core-without-cls": ("vit_pe_core_gigantic_patch14_448", SMALL | MAP, 0),
    "eva02": ("eva02_base_patch16_clip_224", SMALL | TOKEN, 1),
    "eva01": ("eva_giant_patch14_224", SMALL | TOKEN, 1),
    "eva02-post-norm": ("eva02_enormous_patch14_clip_224", SMALL | TOKEN, 1),
    "clip": ("vit_large_patch14_clip_224", SMALL | TOKEN, 1),
    "average": ("vit_medium_patch16_gap_256", SMALL | AVERAGE, 0),
    "registers": ("vit_small_patch14_reg4_dinov2", SMALL | TOKEN, 5),
    "query-norm": ("vit_base_patch16_siglip_224", SMALL | MAP | {"qk_norm": True}, 0),
    "no-positions": ("vit_base_patch16_siglip_224", SMALL | MAP | {"pos_embed": "none"}, 0),
    "mobileclip": ("vit_base_mci_224", HYBRID | TOKEN, 1),
    "vitamin": ("vitamin_small_224", HYBRID | AVERAGE, 0),
}


def small_timm(kind, dtype=torch.float64, **changes):
    """An open_clip model around a small tower of timm's, in eval mode."""
    name, sizes, _ = TIMM[kind]
    sizes = sizes | changes
    config = {"timm_model_name": "test_vit", "timm_pool": "avg", "timm_proj": "linear", "image_size": sizes["img_size"]}
    torch.manual_seed(0)
    model = CustomTextCLIP(20, config, TEXT)
    model.visual.trunk = timm.create_model(name, **sizes)
    model.visual.head = nn.Sequential()
    return randomized(model.to(dtype)).eval()


def randomized(model):
    """The model with norms and biases that are not those of a new one, and attention that is far from uniform."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in sorted(model.visual.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                parameter.copy_((parameter if "norm" in name and name.endswith("weight") else 0) + 0.1 * noise)
            elif parameter.ndim == 2:
                parameter.copy_(1.5 * parameter.shape[1] ** -0.5 * noise)
            else:
                parameter.copy_(0.3 * noise if parameter.ndim == 3 else parameter)
    return model


def small_resnet(dtype=torch.float64):
    """An open_clip model with a ResNet of 20 embeddings and 3 x 3 places, in eval mode."""
    torch.manual_seed(0)
    vision = {"layers": [1, 1, 1, 1], "width": 8, "head_width": 32, "image_size": 96}
    model = CLIP(20, vision, TEXT).to(dtype)
    for part in model.visual.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.running_mean.normal_(0, 0.1)
            part.running_var.uniform_(0.5, 2)
            nn.init.normal_(part.weight, 1, 0.1)
    return model.eval()


def small_coca(dtype=torch.float64, **vision):
    """An open_clip CoCa of 4 blocks of width 48, whose pool has 5 queries, in eval mode."""
    torch.manual_seed(0)
    pool = {"attentional_pool": True, "attn_pooler_queries": 5, "attn_pooler_heads": 2, "output_tokens": True}
    tower = {"image_size": 32, "patch_size": 8, "width": 48, "head_width": 16, "layers": 4, "mlp_ratio": 2.0}
    text = TEXT | {"embed_cls": True, "output_tokens": True}
    decoder = {"context_length": 8, "vocab_size": 32, "width": 20, "heads": 2, "layers": 1}
    model = CoCa(20, decoder, text, tower | pool | vision)
    return randomized(model.to(dtype)).eval()
