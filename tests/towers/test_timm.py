"""Towers of timm's, read without refocusing, beside their last block written out from its parameters."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import relative_error
from small_models import pictures
from small_towers import TIMM, small_timm
from torch import nn

import rfclip
from rfclip.methods import METHODS
from rfclip.segment.windows import Windows
from rfclip.towers import read_tower

pytestmark = pytest.mark.usefixtures("no_grad")
kinds = pytest.mark.parametrize("kind", TIMM)
DIMS = rfclip.RefocusConfig((3,))


def images_of(model, rows, columns, count=2):
    """Noise on a grid of patches; where that is the trained one, at the trained size."""
    tower = read_tower(model)
    size = (rows * tower.patch_size[0], columns * tower.patch_size[1])
    size = tower.image_size if (rows, columns) == tower.grid_size else size
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(4)).double()


def resized(model, kind, grid):
    """The model as timm makes it for another grid; positions are resized without antialiasing."""
    embed = model.visual.trunk.patch_embed
    old = tuple(embed.grid_size)
    if old == tuple(grid):
        return model
    patch = read_tower(model).patch_size
    other = small_timm(kind, img_size=(grid[0] * patch[0], grid[1] * patch[1]))
    weights, position = model.visual.state_dict(), model.visual.trunk.pos_embed
    if position is not None:
        prefix = position.shape[1] - old[0] * old[1]
        planes = position[0, prefix:].reshape(1, *old, -1).permute(0, 3, 1, 2)
        planes = F.interpolate(planes, size=tuple(grid), mode="bicubic", align_corners=False)
        weights["trunk.pos_embed"] = torch.cat([position[:, :prefix], planes.flatten(2).mT], dim=1)
    other.visual.load_state_dict(weights)
    return other


def softmax(logits):
    e = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def norm(module, x):
    if isinstance(module, nn.Identity):
        return x
    x = x - x.mean(axis=-1, keepdims=True)
    x = x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + module.eps)
    return x * module.weight.numpy() + module.bias.numpy()


def linear(module, x):
    return x @ module.weight.numpy().T + (0 if module.bias is None else module.bias.numpy())


def gelu(x):
    return F.gelu(torch.from_numpy(x)).numpy()


class Last:
    """A trunk on one picture: its own blocks before the last one, and that one in NumPy."""

    def __init__(self, model, image):
        self.model, self.trunk = model, model.visual.trunk
        self.block, seen = self.trunk.blocks[-1], []
        hooks = [
            self.block.register_forward_pre_hook(lambda m, x, named: seen.append((x[0], named)), with_kwargs=True),
            self.block.register_forward_hook(lambda m, args, output: seen.append(output)),
        ]
        model.visual(image[None])
        for hook in hooks:
            hook.remove()
        self.x, self.output = seen[0][0][0].numpy(), seen[1][0].numpy()
        self.rope = seen[0][1].get("rope")
        self.prefix = self.trunk.num_prefix_tokens
        self.post = "Post" in type(self.block).__name__
        self.q, self.k, self.v = self.heads(self.x if self.post else norm(self.block.norm1, self.x))

    def heads(self, y):
        attn = self.block.attn
        if attn.qkv is None:
            parts = [linear(layer, y) for layer in (attn.q_proj, attn.k_proj, attn.v_proj)]
        else:
            packed = linear(attn.qkv, y)
            if getattr(attn, "q_bias", None) is not None:
                packed = packed + np.concatenate([attn.q_bias, 0 * attn.q_bias, attn.v_bias])
            parts = np.split(packed, 3, axis=-1)
        q, k, v = (part.reshape(len(y), attn.num_heads, -1).transpose(1, 0, 2) for part in parts)
        return self.rotated(norm(attn.q_norm, q)), self.rotated(norm(attn.k_norm, k)), v

    def rotated(self, u):
        """Pairs of dimensions as complex numbers, turned by the angle of their place."""
        if self.rope is None:
            return u
        sin, cos = np.split(self.rope.numpy(), 2, axis=-1)
        pairs = u[..., self.prefix :, 0::2] + 1j * u[..., self.prefix :, 1::2]
        pairs = pairs * (cos + 1j * sin)[:, ::2]
        u = u.copy()
        u[..., self.prefix :, 0::2], u[..., self.prefix :, 1::2] = pairs.real, pairs.imag
        return u

    def out(self, heads):
        y = linear(self.block.attn.proj, norm(self.block.attn.norm, heads.transpose(1, 0, 2).reshape(len(self.x), -1)))
        if self.post:
            return norm(self.block.norm1, y)
        scale = getattr(self.block, "ls1", None)
        return y * scale.gamma.numpy() if hasattr(scale, "gamma") else y

    def finished(self, heads):
        u, block = self.x + self.out(heads), self.block
        y = block.mlp(torch.from_numpy(u if self.post else norm(block.norm2, u))).numpy()
        y = norm(block.norm2, y) if self.post else y
        return u + (y * block.ls2.gamma.numpy() if hasattr(getattr(block, "ls2", None), "gamma") else y)

    def attention(self, u, w):
        return softmax(u @ w.transpose(0, 2, 1) / u.shape[-1] ** 0.5)

    def read(self, z, grid):
        """The readout of tokens: the pool's values, output projection and MLP, and what follows."""
        trunk, pool = self.trunk, self.trunk.attn_pool
        x = norm(trunk.norm, z[self.prefix :])
        if pool is not None:
            values = x @ pool.kv.weight.numpy()[48:].T + pool.kv.bias.numpy()[48:]
            x = linear(pool.proj, values)
            x = x + linear(pool.mlp.fc2, gelu(linear(pool.mlp.fc1, norm(pool.norm, x))))
        x = norm(trunk.fc_norm, x)
        x = x if isinstance(trunk.head, nn.Identity) else linear(trunk.head, x)
        return torch.from_numpy(x.T.reshape(-1, *grid))


def naclip(p, grid):
    places = np.stack(np.meshgrid(*map(np.arange, grid), indexing="ij"), axis=-1).reshape(-1, 2)
    G = np.zeros((len(p.x),) * 2)
    G[p.prefix :, p.prefix :] = np.exp(-((places[:, None] - places) ** 2).sum(axis=-1) / 50)
    return p.out(softmax(p.k @ p.k.transpose(0, 2, 1) / p.k.shape[-1] ** 0.5 + G) @ p.v)


def patches_only(p, A):
    A, v = A.copy(), p.v
    A[..., : p.prefix] = 0
    return p.out(A @ v)


FORMULAS = {
    "clip": lambda p, grid: p.output,
    "maskclip": lambda p, grid: p.out(p.v),
    "clearclip": lambda p, grid: p.out(p.attention(p.q, p.q) @ p.v),
    "naclip": naclip,
    "kk": lambda p, grid: patches_only(p, p.attention(p.k, p.k)),
    "sclip": lambda p, grid: p.finished((p.attention(p.q, p.q) + p.attention(p.k, p.k)) @ p.v),
}


@pytest.mark.parametrize("other_grid", [False, True], ids=["trained", "other"])
@kinds
def test_every_family_against_its_last_block(kind, other_grid):
    """Also that the NumPy block is the block: with its own attention it gives what the block gives."""
    model = small_timm(kind)
    grid = (3, 5) if other_grid else read_tower(model).grid_size
    images = images_of(model, *grid)
    own = resized(model, kind, grid)
    last = [Last(own, image) for image in images]
    for p in last:
        np.testing.assert_allclose(p.finished(p.attention(p.q, p.k) @ p.v), p.output, rtol=1e-9, atol=1e-9)
    whole = read_tower(model).images(images)
    for name, formula in FORMULAS.items():
        want = torch.stack([p.read(formula(p, grid), grid) for p in last])
        got = rfclip.dense_features(model, whole, method=name)
        assert relative_error(got, want) < 1e-9, name
        assert relative_error(rfclip.dense_features(model, whole[1:], method=name), got[1:]) < 1e-12


@pytest.mark.parametrize("other_grid", [False, True], ids=["trained", "other"])
@kinds
def test_image_embeddings_are_the_models_own(kind, other_grid):
    model = small_timm(kind)
    grid = (5, 3) if other_grid else read_tower(model).grid_size
    images = images_of(model, *grid)
    want = resized(model, kind, grid).encode_image(images)
    with rfclip.refocus(model, method="maskclip"):
        assert relative_error(model.encode_image(images), want) < 1e-9
        tower = read_tower(model)
        method = model.visual.forward
        assert relative_error(method.image(tower.patches(tower.images(images))), want) < 1e-9
    assert "forward" not in vars(model.visual)


@kinds
def test_the_prefix(kind):
    tower = read_tower(small_timm(kind))
    assert (tower.prefix, tower.has_cls) == (TIMM[kind][2], TIMM[kind][2] > 0)


@pytest.mark.parametrize("backend", ["eager", "reference"])
@kinds
def test_every_method_reads_it_or_says_why_not(kind, backend):
    model = small_timm(kind, torch.float32, **({} if kind in ("mobileclip", "vitamin") else {"depth": 12}))
    tower = read_tower(model)
    images, blocks = images_of(model, 2, 3).float(), len(tower.blocks)
    for name, card in METHODS.items():
        if name == "proxyclip":  # which would download a DINO
            continue
        words = None
        if card.configured or card.registers:
            words = f"method '{name}' needs a tower that can be refocused, and timm's .* is only read: .*maskclip"
        elif blocks < card.blocks:
            words = f"method '{name}' needs {card.blocks} blocks, and this tower has {blocks}; 'maskclip'"
        elif card.cls and not tower.has_cls:
            words = f"method '{name}' looks at a class token, which timm's .* does not have; 'maskclip'"
        if words:
            with pytest.raises(ValueError, match=words):
                rfclip.refocus(model, DIMS if card.configured else None, method=name, backend=backend)
            continue
        with rfclip.refocus(model, method=name, backend=backend):
            found = rfclip.dense_features(model, images)
            singles = torch.cat([rfclip.dense_features(model, image[None]) for image in images])
        assert found.shape[2:] == (2, 3) and found.isfinite().all()
        assert relative_error(singles, found) < 1e-4


def test_what_needs_refocusing_refuses_by_name():
    model, images = small_timm("siglip", torch.float32), pictures(dtype=torch.float32)
    calls = {
        "calibration": lambda: rfclip.calibrate(model, images),
        "method 'rf-clip'": lambda: rfclip.dense_features(model, images, method="rf-clip"),
        "an explanation": lambda: rfclip.explain(model, np.zeros((40, 40, 3), np.uint8)),
    }
    for what, call in calls.items():
        with pytest.raises(ValueError, match=f"{what} needs a tower that can be refocused.*nobody has shown"):
            call()


def test_blocks_know_their_grid():
    """Queries and keys with rotary embeddings are not to be had without it."""
    tower = read_tower(small_timm("eva02"))
    y = torch.randn(1, 7, 48).double()
    with pytest.raises(RuntimeError, match="depend on the grid"):
        tower.blocks[-1].heads_of(y)
    q, k, v = tower.blocks_on((2, 3))[-1].heads_of(y)
    for got, want in zip(tower.blocks_on((2, 3))[-1].key_value(y), (k, v), strict=True):
        torch.testing.assert_close(got, want)
    assert not torch.allclose(tower.blocks_on((3, 2))[-1].heads_of(y)[0], q)


@pytest.mark.parametrize("kind", ["siglip", "eva02"])
def test_a_traced_tower(kind):
    """Compiled and exported before anything is kept of its positions; an exported one takes any size."""
    model = small_timm(kind, torch.float32)
    given = images_of(model, 2, 5).float()

    class Dense(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, images):
            return rfclip.dense_features(self.model, images)

    with rfclip.refocus(model, method="clearclip", cuda_graphs=False):
        compiled = torch.compile(Dense(), fullgraph=True, backend="eager")(given)
        sides = {axis: 8 * torch.export.Dim(f"side_{axis}", min=2, max=20) for axis in (2, 3)}
        exported = torch.export.export(Dense(), (given,), strict=False, dynamic_shapes={"images": sides}).module()
        assert relative_error(compiled, Dense()(given)) < 1e-5
        for grid in ((2, 5), (4, 4), (6, 3)):
            other = torch.randn(2, 3, 8 * grid[0], 8 * grid[1])
            assert relative_error(exported(other), Dense()(other)) < 1e-5


def test_windows_of_a_tower_that_looks_beyond_its_patches():
    """Each window is seen by itself, as the tower would see it."""
    tower = read_tower(small_timm("vitamin", torch.float32))
    windows = Windows(window=64, stride=32, short_side=64, long_side=None, patch=16)
    x = torch.randn(3, 64, 128)
    found = windows.patches(tower, x, [(0, 0), (0, 32), (0, 64)])
    for patches, left in zip(found, (0, 32, 64), strict=True):
        torch.testing.assert_close(patches, tower.patches(x[None, :, :, left : left + 64])[0])


def gated(trunk):
    trunk.blocks[1].attn.gate = nn.Linear(48, 48)


def scaled(trunk):
    trunk.blocks[1].gamma_1 = nn.Parameter(torch.ones(48))


def other_pool(trunk):
    trunk.attn_pool = nn.Identity()


def no_pool(trunk):
    trunk.global_pool = ""


def other_block(trunk):
    trunk.blocks[1].attn = nn.MultiheadAttention(48, 3)


def other_positions(trunk):
    trunk.rope = nn.Identity()


def normed_patches(trunk):
    trunk.patch_embed.norm = nn.LayerNorm(48)


@pytest.mark.parametrize(
    "change, words",
    [
        (gated, "attention has gates"),
        (scaled, "scale their branches"),
        (other_pool, "its pool is a Identity"),
        (no_pool, "pools by 'nothing'"),
        (other_block, "blocks of class Block with attention of class MultiheadAttention"),
        (other_positions, "its positions are a Identity"),
        (normed_patches, "patches have a norm"),
    ],
)
def test_trunks_that_do_more_are_refused(change, words):
    model = small_timm("siglip")
    change(model.visual.trunk)
    with pytest.raises(ValueError, match=f"TimmModel around timm's VisionTransformer, which cannot be read: .*{words}"):
        read_tower(model)


def test_hooks_are_refused():
    for part in ("trunk", "trunk.blocks.1", "trunk.blocks.1.attn", "trunk.attn_pool"):
        model = small_timm("siglip")
        model.visual.get_submodule(part).register_forward_hook(lambda *given: None)
        with pytest.raises(ValueError, match=r"has the hook .*only timm's own modules"):
            read_tower(model)
