"""ResNets and CoCa, read without refocusing: their pools written out, and the tokens beneath them."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import relative_error
from small_towers import small_coca, small_resnet
from torch import nn

import rfclip
from rfclip.methods import METHODS
from rfclip.towers import read_tower
from rfclip.towers.loading import find_tokenizer

pytestmark = pytest.mark.usefixtures("no_grad")


def images(height, width, dtype=torch.float64):
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(5)).to(dtype)


def softmax(logits):
    e = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def resized(position, old, new):
    """Positions [1 + N, d] on another grid, bicubically."""
    planes = position[1:].reshape(1, *old, -1).permute(0, 3, 1, 2)
    planes = F.interpolate(planes, size=new, mode="bicubic", align_corners=False)
    return torch.cat([position[:1], planes[0].flatten(1).T])


# ResNets --------------------------------------------------------------------------------------------------------------


class Pool:
    """The pool of a ResNet on one picture, in NumPy: all tokens ask."""

    def __init__(self, visual, image):
        pool = visual.attnpool
        x = visual.stem(image[None])
        for layer in (visual.layer1, visual.layer2, visual.layer3, visual.layer4):
            x = layer(x)
        self.grid = tuple(x.shape[2:])
        positions = pool.positional_embedding
        positions = positions if self.grid == (3, 3) else resized(positions, (3, 3), self.grid)
        x = x[0].flatten(1).T
        y = (torch.cat([x.mean(dim=0, keepdim=True), x]) + positions).numpy()
        self.q, self.k, self.v = (
            self.linear(layer, y).reshape(len(y), pool.num_heads, -1).transpose(1, 0, 2)
            for layer in (pool.q_proj, pool.k_proj, pool.v_proj)
        )
        self.pool = pool

    def linear(self, layer, x):
        return x @ layer.weight.numpy().T + layer.bias.numpy()

    def attention(self, u, w):
        return softmax(u @ w.transpose(0, 2, 1) / u.shape[-1] ** 0.5)

    def out(self, heads):
        z = self.linear(self.pool.c_proj, heads.transpose(1, 0, 2).reshape(heads.shape[1], -1))
        return torch.from_numpy(z)


READ = {
    "clip": lambda p: p.out(p.attention(p.q, p.k) @ p.v),
    "maskclip": lambda p: p.out(p.v),
    "clearclip": lambda p: p.out(p.attention(p.q, p.q) @ p.v),
    "kk": lambda p: p.out(p.attention(p.k, p.k)[..., 1:] @ p.v[:, 1:]),
    "sclip": lambda p: p.out((p.attention(p.q, p.q) + p.attention(p.k, p.k)) @ p.v),
}


@pytest.mark.parametrize("size", [(96, 96), (64, 160)], ids=["trained", "other"])
def test_a_resnet_against_its_pool(size):
    model, given = small_resnet(), images(*size)
    pools = [Pool(model.visual, image) for image in given]
    for name, formula in READ.items():
        want = torch.stack([formula(p)[1:].T.unflatten(-1, p.grid) for p in pools])
        assert relative_error(rfclip.dense_features(model, given, method=name), want) < 1e-10, name
    want = torch.stack([READ["clip"](p)[0] for p in pools])
    with rfclip.refocus(model, method="maskclip"):
        assert relative_error(model.encode_image(given), want) < 1e-10
    if size == (96, 96):
        assert relative_error(model.encode_image(given), want) < 1e-10


def test_methods_that_a_resnet_lacks_blocks_for():
    model, given = small_resnet(torch.float32), images(64, 96, torch.float32)
    for name, card in METHODS.items():
        if name == "proxyclip":
            continue
        words = (
            "ResNet is only read: it has no" if card.configured or card.registers else "blocks, and this tower has 1"
        )
        if card.configured or card.registers or card.blocks > 1:
            with pytest.raises(ValueError, match=f"method '{name}' needs .*{words}.*maskclip"):
                rfclip.dense_features(model, given, method=name)
        else:
            assert rfclip.dense_features(model, given, method=name).shape == (2, 20, 2, 3)


def test_a_resnets_parts_that_would_be_ignored():
    model = small_resnet()
    model.visual.attnpool.v_proj.register_forward_hook(lambda *given: None)
    with pytest.raises(ValueError, match="pool's v has the hook"):
        read_tower(model)
    model = small_resnet()
    model.visual.layer2.register_forward_hook(lambda module, args, output: 2 * output)
    given = images(96, 96)
    want = model.encode_image(given)
    with rfclip.refocus(model, method="maskclip"):
        assert relative_error(model.encode_image(given), want) < 1e-10


# CoCa -----------------------------------------------------------------------------------------------------------------


def alone(visual, tokens):
    """The pool's own forward on each token alone, all of whose queries see the same; [N, C]."""
    found = visual.ln_post(visual.attn_pool(tokens[:, None]))
    assert relative_error(found[:, 0], found[:, 3]) < 1e-12
    return found[:, 0] @ visual.proj


@pytest.mark.parametrize("next_release", [False, True])
@pytest.mark.parametrize("vision", [{}, {"width": 20, "head_width": 10}], ids=["wide", "as-wide-as-the-pool"])
def test_cocas_tokens_are_read_by_its_pool(vision, next_release):
    model = small_coca(next_release=next_release, **vision)
    visual, given = model.visual, images(32, 32)
    blocks = visual.transformer.resblocks
    x = visual._embeds(given)
    for block in blocks[:-1]:
        x = block(x)
    last, d = blocks[-1], x.shape[-1]
    y = last.ln_1(x) @ last.attn.in_proj_weight.T + last.attn.in_proj_bias
    values = last.attn.out_proj(y[..., 2 * d :])
    for name, z in (("clip", last(x)), ("maskclip", values)):
        want = torch.stack([alone(visual, tokens[1:]).T.unflatten(-1, (4, 4)) for tokens in z])
        assert relative_error(rfclip.dense_features(model, given, method=name), want) < 1e-10


@pytest.mark.parametrize("size", [(32, 32), (24, 40)], ids=["trained", "other"])
def test_cocas_image_embedding_is_its_own(size):
    model, given = small_coca(), images(*size)
    own = small_coca()
    if size != (32, 32):
        grid = (size[0] // 8, size[1] // 8)
        own.visual.positional_embedding = nn.Parameter(resized(own.visual.positional_embedding, (4, 4), grid))
    want = own.encode_image(given, normalize=False)
    tower = read_tower(model)
    with rfclip.refocus(model, method="clearclip"):
        assert relative_error(tower.encode_image(model, given), want) < 1e-10
        assert relative_error(model.encode_image(given), F.normalize(want, dim=-1)) < 1e-10
        assert relative_error(model.visual.forward.image(tower.patches(given)), want) < 1e-10
    text = torch.randint(1, 31, (2, 8), generator=torch.Generator().manual_seed(1))
    found = tower.encode_text(model, text)
    assert relative_error(F.normalize(found, dim=-1), model.encode_text(text)) < 1e-10
    assert not torch.allclose(found.norm(dim=-1), torch.ones(2).double())


def test_coca_is_not_refocused():
    model = small_coca()
    with pytest.raises(ValueError, match=r"'rf-clip' needs .*attentional pool is only read: .*a pool over all tokens"):
        rfclip.refocus(model, rfclip.RefocusConfig((3,)))
    with pytest.raises(ValueError, match="CoCa knows 32 tokens"):
        find_tokenizer(model, read_tower(model))
    model.visual.attn_pool.attn.bias_k = nn.Parameter(torch.zeros(1, 1, 20))
    with pytest.raises(ValueError, match="pool attends by a MultiheadAttention of its own"):
        read_tower(model)
    model = small_coca()
    model.visual.attn_pool.register_forward_hook(lambda *given: None)
    with pytest.raises(ValueError, match="the pool has the hook"):
        read_tower(model)
