"""Small random CLIPs with the phenomenon that RF-CLIP is about, and images that set it off in patches of their choice.

A patch that is bright in one colour over-activates the dimensions DIMS of its token, in the plain tower and in a
refocused one: blue at the input of block 1, red from block 2 on and green from block 3 on. The patches without
bright colours have no over-active dimension.
"""

import numpy as np
import open_clip
import torch
import transformers
from open_clip.model import CLIP
from open_clip.transformer import Attention, ResidualAttentionBlock
from PIL import Image

import rfclip

DIMS = (5, 17, 30)
BLUE_DIM, RED_DIM, GREEN_DIM = DIMS[0], 40, 41  # where the colours enter the residual stream
REGISTERS = ((1, 0), (2, 0), (2, 1), (2, 9))  # in a tower of two blocks or more; the third and the last are planted
PATCH = 8


class NextResidualAttentionBlock(ResidualAttentionBlock):
    """A stand-in for the default block of open_clip's next release, whose attention is open_clip's own class."""

    def attention(self, q_x, k_x=None, v_x=None, attn_mask=None):
        assert k_x is None and v_x is None
        return self.attn(q_x, attn_mask=attn_mask)


# Where it will be, which also pickle asks for.
NextResidualAttentionBlock.__module__ = ResidualAttentionBlock.__module__
open_clip.transformer.NextResidualAttentionBlock = NextResidualAttentionBlock


def small_clip(
    *,
    seed=0,
    planted=True,
    dtype=torch.float64,
    quick_gelu=False,
    batch_first=True,
    next_release=False,
    lp_norms=False,
    **vision,
):
    """An open_clip CLIP of 4 blocks of width 48, in eval mode, its image tower for 32 x 32 pixels in 4 x 4 patches.

    Weights depend on `seed` and the names and shapes of the parameters only. `vision` goes into open_clip's vision
    config, `lp_norms` asks for the layer norms that open_clip builds for its fp16 and bf16 models.
    """
    config = {"image_size": 32, "patch_size": PATCH, "width": 48, "head_width": 16, "layers": 4, "mlp_ratio": 2.0}
    text = {"context_length": 8, "vocab_size": 32, "width": 16, "heads": 2, "layers": 1}
    cast_dtype = torch.bfloat16 if lp_norms else None
    model = CLIP(20, config | vision, text, quick_gelu=quick_gelu, cast_dtype=cast_dtype)
    visual = model.visual
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(visual.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("gamma") or (".ln" in f".{name}" and name.endswith("weight")):
                parameter.copy_(0.8 + 0.1 * noise)
            elif noise.ndim == 1 or name == "positional_embedding":
                parameter.copy_(0.1 * noise)
            else:
                fan_in = noise.shape[0] if name == "proj" else noise[0].numel()
                gain = 1.5 if name.endswith("in_proj_weight") else 1.0  # attention that is far from uniform
                parameter.copy_(gain * fan_in**-0.5 * noise)
        if planted:
            _plant(visual)
    for block in visual.transformer.resblocks:
        if next_release:
            _to_next_release(block)
        elif not batch_first:
            block.attn.batch_first = False
    visual.transformer.batch_first = batch_first
    neurons = {(min(block, visual.transformer.layers), unit) for block, unit in REGISTERS}
    model.register_config = rfclip.RegisterConfig(tuple(neurons))
    return model.eval().to(dtype)


def _plant(visual):
    blocks = visual.transformer.resblocks
    for channel, dim, gain in ((0, RED_DIM, 5.0), (1, GREEN_DIM, 5.0), (2, BLUE_DIM, 20.0)):
        visual.conv1.weight[dim] = 0
        visual.conv1.weight[dim, channel] = gain / PATCH**2  # the patch's mean in that colour
        visual.positional_embedding[:, dim] = 0
        visual.class_embedding[dim] = 0
    for number, block in enumerate(blocks):
        for unit, dim in enumerate((RED_DIM, GREEN_DIM)):
            block.attn.out_proj.weight[dim] = block.mlp.c_proj.weight[dim] = 0  # the colour stays in the stream
            if number >= unit:  # this unit fires on the colour and writes to DIMS
                block.mlp.c_fc.weight[unit], block.mlp.c_fc.bias[unit] = 0, -8.0
                block.mlp.c_fc.weight[unit, dim] = 6.0
                block.mlp.c_proj.weight[DIMS, unit] = torch.tensor([15.0, 20.0, 10.0])


def _to_next_release(block):
    attn = Attention(block.attn.embed_dim, block.attn.num_heads)
    attn.load_state_dict(block.attn.state_dict())
    block.attn = attn
    block.__class__ = NextResidualAttentionBlock


NAMES = {  # parameters of open_clip's, in order of replacement, as Hugging Face names them
    "visual.conv1": "vision_model.embeddings.patch_embedding",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.ln_pre": "vision_model.pre_layrnorm",
    "visual.ln_post": "vision_model.post_layernorm",
    "visual.transformer.resblocks": "vision_model.encoder.layers",
    "token_embedding": "text_model.embeddings.token_embedding",
    "ln_final": "text_model.final_layer_norm",
    "transformer.resblocks": "text_model.encoder.layers",
    ".attn.": ".self_attn.",
    ".ln_": ".layer_norm",
    ".c_fc.": ".fc1.",
    ".c_proj.": ".fc2.",
}


def to_hugging_face(model, hidden_act="gelu"):
    """A transformers CLIPModel with the weights of an open_clip CLIP, and the activation of that name."""
    visual, texts = model.visual, model.transformer.resblocks
    heads = {"vision_config": visual.transformer.resblocks[0].attn.num_heads, "text_config": texts[0].attn.num_heads}
    sizes = {
        "vision_config": {
            **{"hidden_size": visual.conv1.out_channels, "num_hidden_layers": len(visual.transformer.resblocks)},
            **{"image_size": visual.image_size[0], "patch_size": visual.patch_size[0]},
        },
        "text_config": {
            **{"hidden_size": model.ln_final.normalized_shape[0], "num_hidden_layers": len(texts)},
            **{"vocab_size": model.vocab_size, "max_position_embeddings": model.context_length},
            **{"eos_token_id": 2},  # the position of the highest token, as open_clip has it
        },
    }
    state = {}
    for name, value in model.state_dict().items():
        for old, new in NAMES.items():
            name = name.replace(old, new) if name.startswith(old) or old.startswith(".") else name
        if name == "positional_embedding":
            state["text_model.embeddings.position_embedding.weight"] = value
        elif name in ("visual.proj", "text_projection"):
            state["visual_projection.weight" if name == "visual.proj" else "text_projection.weight"] = value.T
        elif "in_proj_" in name:
            for letter, part in zip("qkv", value.chunk(3), strict=True):
                state[name.replace("in_proj_", f"{letter}_proj.")] = part
        elif name != "attn_mask":
            state[name] = value
    for part, values in sizes.items():
        prefix = part.replace("config", "model.encoder.layers.0.mlp.fc1.bias")
        values |= {"intermediate_size": len(state[prefix]), "num_attention_heads": heads[part]}
        values |= {"hidden_act": hidden_act}
    made = transformers.CLIPModel(transformers.CLIPConfig(projection_dim=visual.output_dim, **sizes))
    made.load_state_dict(state)
    made.register_config = model.register_config
    return made.eval().to(visual.proj.dtype)


class Dense(torch.nn.Module):
    """Dense features as a module's forward, which exporters need."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images):
        return rfclip.dense_features(self.model, images)


MEAN, STD = (0.3, 0.35, 0.25), (0.2, 0.25, 0.2)  # of the pictures that `photographic_clip` takes


def photographic_clip(dtype=torch.float64, **vision):
    """A `small_clip` whose pictures are normalized so that bright colours of 8 bits are bright enough."""
    model = small_clip(dtype=dtype, **vision)
    model.visual.image_mean, model.visual.image_std = MEAN, STD
    return model


def photograph(height, width, seed):
    """Noise on two grounds with bright squares of one colour, over which some tokens become distraction."""
    generator = np.random.default_rng(seed)
    x = 0.5 * generator.standard_normal((height, width, 3))
    x[:, width // 2 :] += np.sin(np.arange(width - width // 2) / 3)[:, None]
    for number in range(6):
        side = min(height, width) // 3
        top, left = generator.integers(height - side), generator.integers(width - side)
        x[top : top + side, left : left + side, number % 3] += 2.5
    return Image.fromarray((255 * (x * STD + MEAN).clip(0, 1)).astype(np.uint8))


def pictures(*, count=3, height=32, width=32, seed=0, bright=0.5, colours=(0, 1, 2), dtype=torch.float64):
    """Images [count, 3, height, width]: noise on a ground of two textures, and each patch, with the probability
    `bright`, bright in one of the colours: the first is (unless that is 0) and the last is not (unless that is 1).
    """
    generator = torch.Generator().manual_seed(seed)
    rows, columns = height // PATCH, width // PATCH
    textures = torch.randn(2, 3, PATCH, PATCH, generator=generator)
    textures -= textures.mean(dim=(-1, -2), keepdim=True)
    right = (torch.arange(columns) >= columns / 2).long()
    ground = textures[right].permute(1, 2, 0, 3).flatten(2).repeat(1, rows, 1)  # [3, height, width]
    chance = torch.rand(count, rows * columns, generator=generator)
    if 0 < bright < 1 and rows * columns > 1:
        chance[:, 0], chance[:, -1] = 0, 1
    colour = torch.tensor(colours)[torch.randint(len(colours), chance.shape, generator=generator)]
    lit = torch.stack([(chance < bright) & (colour == channel) for channel in range(3)], dim=1)
    lit = lit.unflatten(-1, (rows, columns)).repeat_interleave(PATCH, 2).repeat_interleave(PATCH, 3)
    return (0.5 * torch.randn(count, 3, height, width, generator=generator) + ground + 2.5 * lit).to(dtype)
