"""ProxyCLIP: the last block's attention comes from a DINO."""

from __future__ import annotations

from typing import Any

import open_clip
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as TF

from rfclip.methods.base import Method
from rfclip.methods.cosines import cosines, positive_softmax
from rfclip.ops.numerics import matmul

DINO = "vit_base_patch8_224.dino"


class ProxyCLIP(Method):
    """z = O(P v), P = softmax(3 (W - 1.2 mean W)) over what is not negative, W the cosines of a DINO's patches.

    The patches are those of DINO ViT-B/8's last layer, on the picture normalized for ImageNet models; v is resized
    bilinearly to their grid, which is also the result's. The diagonal always stays [D].

    Args:
        dino: a timm model in place of DINO ViT-B/8.
    """

    def __init__(self, *args: Any, dino: nn.Module | None = None) -> None:
        super().__init__(*args)
        self.dino: Any = load_dino() if dino is None else dino

    def dense(self, patches: Tensor, images: Tensor | None = None) -> Tensor:
        from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

        if images is None:
            raise ValueError("images=None: ProxyCLIP looks at the pictures as well")
        self.tower.check_ready()
        _, (_, _, v) = self.last(patches)
        tower, last = self.tower, self.tower.blocks[-1]
        mean, std = (images.new_tensor(value)[:, None, None] for value in (tower.image_mean, tower.image_std))
        images = TF.normalize(images * std + mean, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD).to(v.dtype)
        side = self.dino.patch_embed.patch_size[0]
        grid = [max(1, round(length / side)) for length in images.shape[2:]]
        images = TF.resize(images, [side * length for length in grid], antialias=True)
        self.dino.to(v.device, v.dtype)  # the model may have been moved
        W = cosines(self.dino.forward_features(images)[:, self.dino.num_prefix_tokens :])
        P = positive_softmax(3 * (W - 1.2 * W.mean(dim=(1, 2), keepdim=True)))
        values = v[:, :, tower.prefix :].transpose(2, 3).flatten(1, 2)
        planes = values.unflatten(-1, patches.shape[2:])  # [B, H D, gh, gw]
        planes = F.interpolate(planes, size=grid, mode="bilinear", align_corners=False)
        values = planes.flatten(2).unflatten(1, (v.shape[1], -1)).transpose(2, 3)
        z = last.project(matmul(P[:, None], values).to(v.dtype))
        return tower.readout(z).mT.unflatten(-1, grid)


def load_dino() -> nn.Module:
    """DINO ViT-B/8 as timm loads it, for pictures of any size.

    Raises:
        ConnectionError: its weights could not be downloaded.
    """
    import timm  # slow to import, and needed by this method only

    try:
        # By itself timm would also take a pickle.
        weights = open_clip.factory.download_pretrained_from_hf(f"timm/{DINO}", filename="model.safetensors")
        dino = timm.create_model(
            DINO, pretrained=True, pretrained_cfg_overlay={"file": weights}, num_classes=0, dynamic_img_size=True
        )
    except (OSError, RuntimeError) as error:
        raise ConnectionError(
            f"the weights of DINO ViT-B/8 could not be downloaded ({error}); this needs a network once"
        ) from error
    return dino.eval()
