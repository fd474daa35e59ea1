"""The formula of every method, written once more image by image and head by head in float64."""

import copy

import numpy as np
import torch
import torch.nn.functional as F
from small_models import DIMS, REGISTERS


def softmax(logits):
    e = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


class Plain:
    """The plain tower on one image: open_clip's own blocks inside, NumPy outside."""

    def __init__(self, model, image, offset=0.0):
        self.visual = visual = model.visual
        x = visual.conv1(image[None])
        self.grid = tuple(x.shape[2:])
        positions = visual.positional_embedding
        if self.grid != tuple(visual.grid_size):
            planes = positions[1:].reshape(1, *visual.grid_size, -1).permute(0, 3, 1, 2)
            factors = [(side + offset) / old for side, old in zip(self.grid, visual.grid_size, strict=True)]
            size = {"scale_factor": factors} if offset else {"size": self.grid}
            planes = F.interpolate(planes, **size, mode="bicubic", align_corners=False)
            positions = torch.cat([positions[:1], planes[0].flatten(1).T])
        x = torch.cat([visual.class_embedding[None, None], x.flatten(2).transpose(1, 2)], dim=1) + positions
        self.F = [visual.ln_pre(x)]
        for block in visual.transformer.resblocks:
            self.F.append(block(self.F[-1]))
        self.F = [x[0].numpy() for x in self.F]
        self.L = len(self.F) - 1

    def block(self, n):
        return self.visual.transformer.resblocks[n - 1]

    def ln_1(self, n, x):
        return self.block(n).ln_1(torch.from_numpy(x)).numpy()

    def qkv(self, n, x):
        """q, k and v of every head, [3, H, T, D], from the input of block n."""
        attn = self.block(n).attn
        packed = self.ln_1(n, x) @ attn.in_proj_weight.numpy().T + attn.in_proj_bias.numpy()
        return packed.reshape(len(x), 3, attn.num_heads, -1).transpose(1, 2, 0, 3)

    def out(self, n, heads):
        out = self.block(n).attn.out_proj
        return heads.transpose(1, 0, 2).reshape(heads.shape[1], -1) @ out.weight.numpy().T + out.bias.numpy()

    def mlp(self, n, u):
        block = self.block(n)
        return u + block.mlp(block.ln_2(torch.from_numpy(u))).numpy()


def SS(u):
    return softmax(u @ u.transpose(0, 2, 1) / u.shape[-1] ** 0.5)


def clip(p):
    return p.F[p.L]


def maskclip(p):
    return p.out(p.L, p.qkv(p.L, p.F[p.L - 1])[2])


def sclip(p):
    x = p.F[p.L - 1]
    q, k, v = p.qkv(p.L, x)
    return p.mlp(p.L, x + p.out(p.L, SS(q) @ v + SS(k) @ v))


def cliptrase(p):
    x = p.F[p.L - 1]
    q, k, v = p.qkv(p.L, x)
    return p.mlp(p.L, x + p.out(p.L, (SS(q) + SS(k) + SS(v)) @ v))


def clearclip(p):
    q, k, v = p.qkv(p.L, p.F[p.L - 1])
    return p.out(p.L, SS(q) @ v)


def naclip(p):
    q, k, v = p.qkv(p.L, p.F[p.L - 1])
    return p.out(p.L, softmax(k @ k.transpose(0, 2, 1) / k.shape[-1] ** 0.5 + distances(p)) @ v)


def distances(p):
    places = [(r, c) for r in range(p.grid[0]) for c in range(p.grid[1])]
    G = np.zeros((len(places) + 1, len(places) + 1))
    for i, a in enumerate(places, 1):
        for j, b in enumerate(places, 1):
            G[i, j] = np.exp(-((a[0] - b[0]) ** 2 + (a[1] - b[1]) ** 2) / 50)
    return G


def resclip_rcs(p, share=0.3):
    q, k, v = p.qkv(p.L, p.F[p.L - 1])
    R = 0
    for n in (6, 7, 8, 9):
        a, b, _ = p.qkv(n, p.F[n - 1])
        R = R + softmax(a @ b.transpose(0, 2, 1) / a.shape[-1] ** 0.5) / 4
    own = softmax(k @ k.transpose(0, 2, 1) / k.shape[-1] ** 0.5 + distances(p))
    A = 2 * ((1 - share) * own + share * R)
    return p.out(p.L, A @ v)


def pearl(p, share=0.08):
    """By the paper's own logits, not by changed queries."""
    q, k, v = p.qkv(p.L, p.F[p.L - 1])
    heads = []
    for Q, K, V in zip(q, k, v, strict=True):
        w = np.linalg.norm(Q, axis=1)
        w[0] = 0
        w = w / (w.sum() + 1e-6)
        C = (K - w @ K).T @ (Q - w @ Q)
        c = np.linalg.norm(C.T @ C)
        Y, Z = C.T @ C / c + 1e-6 * np.eye(len(C)), np.eye(len(C))
        for _ in range(5):
            step = (3 * np.eye(len(C)) - Z @ Y) / 2
            Y, Z = Y @ step, step @ Z
        centred = K - w @ K
        S = (Q @ (K @ (C @ Z / c**0.5)).T + share * centred @ centred.T) / Q.shape[1] ** 0.5
        heads.append(softmax(S) @ V)
    return p.out(p.L, np.stack(heads))


def itaclip(p):
    x = p.F[p.L - 1]
    A = 0
    for n, share in ((p.L, 1 / 2), (7, 1 / 6), (8, 1 / 6), (10, 1 / 6)):
        q, k, _ = p.qkv(n, p.F[n - 1])
        A = A + share * (SS(q) + SS(k))
    return x + p.out(p.L, A @ p.qkv(p.L, x)[2])


def cliper_rounds(p):
    """z_l [T, d] and A_l [H, T, T] after each round."""
    S = 0
    for n in range(1, p.L):
        q, k, _ = p.qkv(n, p.F[n - 1])
        S = S + softmax(q @ k.transpose(0, 2, 1) / q.shape[-1] ** 0.5)
    rounds = []
    for n in range(1, p.L + 1):
        S = S / S.sum(axis=1, keepdims=True)
        S = S / S.sum(axis=2, keepdims=True)
        A = (S + S.transpose(0, 2, 1)) / 2
        A = np.maximum(A - A.mean(axis=1, keepdims=True), 0)
        for head in A:
            for i, row in enumerate(head):
                row[i] += not row.any()
        A = A / A.sum(axis=2, keepdims=True)
        u = p.F[p.L - 1] if n == p.L else p.ln_1(n, p.F[n - 1])
        rounds.append((p.out(p.L, A @ p.qkv(p.L, u)[2]), A))
    return rounds


def cliper(p):
    return cliper_rounds(p)[-1][0]


def clip_surgery(p):
    z = p.F[p.L - 6]
    for n in range(p.L - 5, p.L + 1):
        v = p.qkv(n, p.F[n - 1])[2]
        z = z + p.out(n, SS(v) @ v)
    return z


def gem(p):
    z = p.F[p.L - 6]
    for n in range(p.L - 5, p.L + 1):
        q, k, v = p.qkv(n, p.F[n - 1])
        theta = np.linalg.norm(p.ln_1(n, p.F[n - 1]), axis=-1).mean() / v.shape[-1] ** 0.5
        total = 0
        for u in (q, k, v):
            u = unit(u)
            u = unit(softmax(theta * u @ u.transpose(0, 2, 1)) @ u)
            total = total + softmax(theta * u @ u.transpose(0, 2, 1)) @ v
        z = z + p.out(n, total / 3)
    return z


def around(p, i):
    r, c = divmod(i, p.grid[1])
    near = [(r + a, c + b) for a in (-1, 0, 1) for b in (-1, 0, 1) if a or b]
    return [a * p.grid[1] + b for a, b in near if 0 <= a < p.grid[0] and 0 <= b < p.grid[1]]


def mend(p, x, outliers):
    out = x.copy()
    for i in np.flatnonzero(outliers):
        good = [j for j in around(p, i) if not outliers[j]]
        if good:
            out[i] = x[good].mean(axis=0)
    return out


def norm4(W):
    W = np.where(W < 0.4, 0, W)
    return W / (W.sum(axis=1, keepdims=True) + 1e-6)


def sc_clip(p):
    x = p.F[p.L - 1][1:]
    N = len(x)
    squared = ((x[:, None] - x[None]) ** 2).sum(-1)
    others = [sorted((j for j in range(N) if j != i), key=lambda j: squared[i, j])[:30] for i in range(N)]
    outliers = np.zeros(N, bool)
    if N > 1:
        d = np.array([squared[i, near[-1]] for i, near in enumerate(others)])
        lof = np.array([np.mean(d[i] / d[near]) for i, near in enumerate(others)])
        outliers = lof > np.quantile(lof, 0.95)

    def guided(x, cls):
        q, k, v = p.qkv(p.L, x)
        return p.out(p.L, (P + SS(k)) / 2 @ v) + 0.3 * cls

    R = unit(mend(p, p.F[9][1:], outliers))
    W1 = R @ R.T
    P = W1 - W1.mean()
    P = softmax(np.where(P < 0, -np.inf, 3 * P))
    W2 = norm4(unit(p.F[4][1:]) @ unit(p.F[4][1:]).T)
    X = W2 @ guided(norm4(W1) @ mend(p, x, outliers), p.F[p.L - 1][0])
    Y = sum(p.F[4:11])
    z = X + W2 @ guided(Y[1:], Y[0])
    return np.concatenate([p.F[p.L][:1], z])


def sfp_outliers(p):
    q, k, _ = p.qkv(p.L - 1, p.F[p.L - 2])
    A = softmax(q @ k.transpose(0, 2, 1) / q.shape[-1] ** 0.5).mean(axis=0)
    chosen = [j for j in range(1, len(A)) if 1.5 * A[0, j] > A[j, j]]
    chosen = sorted(chosen, key=lambda j: -A[0, j])[:10]
    return np.isin(np.arange(1, len(A)), chosen)


def sfp(p):
    outliers = sfp_outliers(p)
    R = unit(mend(p, p.F[9][1:], outliers))
    W1 = R @ R.T
    W1[W1 < 0.4] = 0
    P = softmax(np.where(W1.mean() > W1, -np.inf, 3 * (W1 - W1.mean())))
    W2 = norm4(unit(p.F[4][1:]) @ unit(p.F[4][1:]).T)
    x = p.F[p.L - 1]
    q, k, v = p.qkv(p.L, norm4(W1) @ mend(p, x[1:], outliers))
    X = W2 @ (p.out(p.L, (SS(q) + SS(k) + P) @ v / 3) + 0.3 * x[0])
    y = sum(p.F[4:11])
    Y = W2 @ (p.out(p.L, P @ p.qkv(p.L, y[1:])[2]) + 0.3 * y[0])
    return np.concatenate([p.F[p.L][:1], X + Y])


def kk(p):
    q, k, v = p.qkv(p.L, p.F[p.L - 1])
    A = SS(k)
    A[:, :, 0] = 0
    return p.out(p.L, A @ v)


def kk_mean(p):
    A = sum(SS(p.qkv(n, p.F[n - 1])[1]) for n in range(1, p.L + 1)) / p.L
    A[:, :, 0] = 0
    return p.out(p.L, A @ p.qkv(p.L, p.F[p.L - 1])[2])


def with_register(p, neurons, per_neuron=False):
    """The tower with a register, which here is the last token."""
    r = copy.copy(p)
    zero = p.visual.ln_pre(torch.zeros(1, p.F[0].shape[1], dtype=torch.float64)).numpy()
    r.F = [np.concatenate([p.F[0], zero])]
    for n in range(1, p.L + 1):
        x, mlp = r.F[-1], p.block(n).mlp
        q, k, v = p.qkv(n, x)
        u = x + p.out(n, softmax(q @ k.transpose(0, 2, 1) / q.shape[-1] ** 0.5) @ v)
        h = mlp.gelu(mlp.c_fc(p.block(n).ln_2(torch.from_numpy(u)))).numpy()
        units = [unit for block, unit in neurons if block == n]
        for some in [[unit] for unit in units] if per_neuron else [units] * bool(units):
            values = h[:, some].ravel()
            h[-1, some] = values[np.abs(values).argmax()]
        h[1:-1, units] = 0
        r.F.append(u + mlp.c_proj(torch.from_numpy(h)).numpy())
    return r


def registers(p):
    r = with_register(p, REGISTERS)
    A = sum(SS(p.qkv(n, r.F[n - 1])[1]) for n in range(1, p.L + 1)) / p.L
    A[:, :, [0, -1]] = 0
    return p.out(p.L, A @ p.qkv(p.L, r.F[p.L - 1])[2])[:-1]


def released_stream(p):
    """The input of the first block and the outputs of all, as the released code computes them."""

    def denoise(x):
        out = x.copy()
        for i, f in enumerate(x[1:]):
            w = (f - f.min()) / max((f - f.min()).sum(), 1e-8)
            if w[list(DIMS)].max() > 5 / len(f):
                out[1 + i] = 0.6 * f + 0.4 * (f + x[1:][around(p, i)].sum(axis=0)) / 9
        return out

    x = [p.F[0]]
    for n in range(1, p.L + 1):
        x.append(denoise(p.block(n)(torch.from_numpy(x[-1])[None])[0].numpy()))
    return x


def released(p):
    F = released_stream(p)
    keys = [p.qkv(n, F[n - 1])[1] for n in range(1, p.L)]
    g = sum(F[1:]) / p.L
    W = unit(g[1:]) @ unit(g[1:]).T
    W = np.where(W < 0.4, 0, W)
    z = 0
    for x in (F[p.L - 1], g):
        q, k, v = p.qkv(p.L, np.concatenate([x[:1], W @ x[1:]]))
        A = (sum(map(SS, keys)) + SS(k)) / p.L
        A[:, :, 0] = 0
        z = z + p.out(p.L, A @ v) / 2
    return z


FORMULAS = {
    "clip": clip,
    "maskclip": maskclip,
    "sclip": sclip,
    "clearclip": clearclip,
    "naclip": naclip,
    **dict.fromkeys(("resclip-rcs", "resclip"), resclip_rcs),  # which differ in what their protocols do after it
    "pearl": pearl,
    "itaclip": itaclip,
    "gem": gem,
    "clip-surgery": clip_surgery,
    "cliptrase": cliptrase,
    "cliper": cliper,
    "sc-clip": sc_clip,
    "registers": registers,
    "sfp": sfp,
    "kk": kk,
    "kk-mean": kk_mean,
    "released": released,
}  # RF-CLIP's is oracles/tower.py, those of ProxyCLIP and of ITACLIP's views are below


def formula(name, model, images, *constants):
    """Patch embeddings [B, C, gh, gw] in float64."""
    if name == "itaclip-views":
        return itaclip_views(model, images, 0.75)
    found = []
    for image in images:
        p = Plain(model, image, offset=0.1 if name == "released" else 0.0)
        z = torch.from_numpy(FORMULAS[name](p, *constants)[1:])
        found.append((model.visual.ln_post(z) @ model.visual.proj).T.reshape(-1, *p.grid))
    return torch.stack(found)


def itaclip_views(model, images, c):
    """The mean of normalized embeddings over views."""
    views = [images, gray(images), blurred(images), images.flip(2), images.flip(3)]
    found = [F.normalize(formula("itaclip", model, view), dim=1) for view in views]
    return c * sum(found[:3]) / 3 + (1 - c) * (found[3].flip(2) + found[4].flip(3)) / 2


def gray(images):
    red, green, blue = images.unbind(1)
    return (0.2989 * red + 0.587 * green + 0.114 * blue)[:, None].expand(-1, 3, -1, -1)


def blurred(images):
    weights = np.exp(-(np.arange(-5, 6) ** 2) / (2 * 5**2))
    weights = weights / weights.sum()
    x = np.pad(images.numpy(), ((0, 0), (0, 0), (5, 5), (5, 5)), mode="reflect")
    x = sum(w * x[:, :, n : n + images.shape[2]] for n, w in enumerate(weights))
    return torch.from_numpy(sum(w * x[..., n : n + images.shape[3]] for n, w in enumerate(weights)))


def proxyclip(model, images, dino):
    found = []
    for image in images:
        p = Plain(model, image)
        q, k, v = p.qkv(p.L, p.F[p.L - 1])
        mean, std, other_mean, other_std = (
            torch.tensor(value, dtype=image.dtype).view(3, 1, 1)
            for value in (
                *(model.visual.image_mean, model.visual.image_std),
                *([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
            )
        )
        pixels = (image * std + mean - other_mean) / other_std
        f = unit(dino.forward_features(pixels[None])[0, 1:].numpy())
        W = f @ f.T
        R = 3 * (W - 1.2 * W.mean())
        R = np.where((R < 0) & ~np.eye(len(R), dtype=bool), -np.inf, R)
        grid = [side // 4 for side in image.shape[1:]]
        planes = torch.from_numpy(v[:, 1:].transpose(0, 2, 1).reshape(1, -1, *p.grid))
        planes = F.interpolate(planes, size=grid, mode="bilinear", align_corners=False)
        v = planes.reshape(len(v), -1, len(R)).transpose(1, 2).numpy()
        z = torch.from_numpy(p.out(p.L, softmax(R) @ v))
        found.append((model.visual.ln_post(z) @ model.visual.proj).T.reshape(-1, *grid))
    return torch.stack(found)
