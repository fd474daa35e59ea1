"""The refocused image tower by brute force: plain loops over images, blocks and heads in float64.

It takes its weights from the state dict and shares no code with the package or with open_clip.
"""

import math
import statistics

import torch

from rfclip import RefocusConfig


def brute_tower(model, images, config, *, quick_gelu=False, trace=None, stream=None):
    """(dense features [B, C, gh, gw], image embeddings [B, C]).

    `trace` collects the distraction tokens of every image and block, `stream` the tokens that enter the block.
    """
    visual = model.visual
    weights = {name: value.double() for name, value in visual.state_dict().items()}
    tower = BruteTower(weights, visual, config, quick_gelu)
    outputs = [tower.run(image.double()) for image in images]
    for collected, into in ((tower.trace, trace), (tower.stream, stream)):
        if into is not None:
            into.extend(collected)
    return tuple(torch.stack(parts) for parts in zip(*outputs, strict=True))


class BruteTower:
    def __init__(self, weights, visual, config, quick_gelu):
        self.weights, self.config, self.quick_gelu = weights, config, quick_gelu
        self.trace, self.stream = [], []
        self.patch, self.trained = visual.patch_size, visual.grid_size
        self.blocks, self.heads = visual.transformer.layers, visual.transformer.resblocks[0].attn.num_heads
        self.average, self.pool_first = visual.pool_type == "avg", visual.final_ln_after_pool

    def run(self, image):
        config, grid = self.config, [side // patch for side, patch in zip(image.shape[1:], self.patch, strict=True)]
        x = self.norm("ln_pre", self.embed(image, grid))
        kk = []  # per block, softmax(k k^T) of each head
        for number in range(1, self.blocks + 1):
            name = f"transformer.resblocks.{number - 1}."
            self.stream.append(x)
            chosen, taken = config.layers is None or number in config.layers, []
            if config.distraction_dims and chosen:
                taken = self.distraction_tokens(x, number, name, grid)
                self.trace.append(taken)
                x = self.repair(x, taken, grid)
            heads = self.qkv(x, name)
            kk.append([softmax(k, k) for _, k, _ in heads])
            before, attention = x, [softmax(q, k) for q, k, _ in heads]
            if number < self.blocks and taken and config.beta:
                receivers = self.receivers(taken, heads, kk)
                attention = [move_budget(A, taken, receivers, config.beta) for A in attention]
            gathered = torch.cat([A @ v for A, (_, _, v) in zip(attention, heads, strict=True)], dim=1)
            x = self.finish(before, self.project(gathered, name), name)
        return self.dense(x, heads, kk, name, grid), self.pooled(x)

    def embed(self, image, grid):
        patches = [
            image[:, r * self.patch[0] : (r + 1) * self.patch[0], c * self.patch[1] : (c + 1) * self.patch[1]].flatten()
            for r in range(grid[0])
            for c in range(grid[1])
        ]
        patches = torch.stack(patches) @ self.weights["conv1.weight"].flatten(1).T
        position = self.weights["positional_embedding"]
        rows, columns = (bicubic(new, old) for new, old in zip(grid, self.trained, strict=True))
        planes = torch.einsum("ri,cj,ijd->rcd", rows, columns, position[1:].unflatten(0, self.trained))
        cls = self.weights["class_embedding"] + position[0]
        return torch.cat([cls[None], patches + planes.flatten(0, 1)])

    def norm(self, name, x):
        if f"{name}.weight" not in self.weights:
            return x
        x = x - x.mean(dim=-1, keepdim=True)
        x = x / (x.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt()
        return x * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]

    def linear(self, name, x):
        return x @ self.weights[f"{name}.weight"].T + self.weights[f"{name}.bias"]

    def qkv(self, x, name):
        packed = self.norm(f"{name}ln_1", x) @ self.weights[f"{name}attn.in_proj_weight"].T
        packed = packed + self.weights[f"{name}attn.in_proj_bias"]
        return list(zip(*(part.chunk(self.heads, dim=1) for part in packed.chunk(3, dim=1)), strict=True))

    def project(self, gathered, name):
        out = self.norm(f"{name}ln_attn", self.linear(f"{name}attn.out_proj", gathered))
        return out * self.weights.get(f"{name}ls_1.gamma", 1)

    def finish(self, x, branch, name):
        x = x + branch
        hidden = self.linear(f"{name}mlp.c_fc", self.norm(f"{name}ln_2", x))
        gate = 1 / (1 + (-1.702 * hidden).exp()) if self.quick_gelu else (1 + (hidden / math.sqrt(2)).erf()) / 2
        hidden = self.norm(f"{name}mlp.ln", hidden * gate)
        return x + self.linear(f"{name}mlp.c_proj", hidden) * self.weights.get(f"{name}ls_2.gamma", 1)

    def distraction_tokens(self, x, number, name, grid):
        """T_dis, as numbers of patches, counted from 0."""
        config, (N, d) = self.config, (len(x) - 1, x.shape[1])
        found = []
        received = sum(softmax(q, k)[1:].mean(dim=0) for q, k, _ in self.qkv(x, name)) / self.heads
        for i, token in enumerate(x[1:]):
            f = token - token.min() if config.shifted else token
            score = max(f[j] / f.sum() for j in config.distraction_dims)
            attended = config.tau_attn is None or received[i + 1] > config.tau_attn / N
            if score > config.tau / d and attended:
                found.append(i)
        if config.tokens == "random":  # as many, the first of an order that belongs to the block
            order = torch.randperm(N, generator=torch.Generator().manual_seed(number)).tolist()
            found = [i for i in range(N) if order[i] < len(found)]
        return found

    def repair(self, x, taken, grid):
        config, (gh, gw), reach = self.config, grid, self.config.neighbourhood // 2
        out = x.clone()
        for i in taken:
            window = [
                1 + r * gw + c
                for r in range(max(0, i // gw - reach), min(gh, i // gw + reach + 1))
                for c in range(max(0, i % gw - reach), min(gw, i % gw + reach + 1))
            ]
            others = [n for n in window if n != 1 + i]
            dims = list(config.distraction_dims)
            if config.embedding == "redistribute" and others:
                out[1 + i, dims] = x[others][:, dims].mean(dim=0)
            elif config.embedding == "mean":
                out[1 + i] = x[window].mean(dim=0)
            elif config.embedding == "median":
                columns = x[window].T.tolist()
                out[1 + i] = torch.tensor([statistics.median(column) for column in columns], dtype=torch.float64)
            elif config.embedding == "clamp":
                low = x[1 + i].min() if config.shifted else 0.0
                most = low + config.tau / x.shape[1] * (x[1 + i] - low).sum()
                out[1 + i, dims] = x[1 + i, dims].clamp(max=most)
        return out

    def receivers(self, taken, heads, kk):
        """The tokens that receive the budget; CLS is 0."""
        config, N = self.config, len(kk[0][0]) - 1
        rest = [1 + i for i in range(N) if i not in taken]
        if config.target != "defocused":
            return {"non-distraction": rest, "cls": [0], "rest": [0, *rest]}[config.target]
        index = {"qq": 0, "kk": 1, "vv": 2}.get(config.similarity)
        layers = kk if index is None else [[softmax(parts[index], parts[index]) for parts in heads]]
        S = sum(sum(layer) / len(layer) for layer in layers) / len(layers)
        y = second_eigenvector(S[1:, 1:])
        cut = sum(y) / N if config.cut_threshold == "mean" else otsu(y)
        return [i for i in rest if y[i - 1] > cut]

    def dense(self, x, heads, kk, name, grid):
        """Dense features from the output x of the last block, its q, k and v, and the similarities of all blocks."""
        if self.config.proxy == "none":
            out = x[1:]
        else:
            gathered = []
            for h, (q, k, v) in enumerate(heads):
                if self.config.proxy == "kk-mean":
                    A = sum(layer[h] for layer in kk) / self.blocks
                else:
                    parts = {"q": q, "k": k, "v": v}
                    A = softmax(*(parts[letter] for letter in self.config.proxy))
                gathered.append(A[1:, 1:] @ v[1:])
            out = self.project(torch.cat(gathered, dim=1), name)
        return (self.norm("ln_post", out) @ self.weights["proj"]).T.unflatten(1, grid)

    def pooled(self, x):
        x = x if self.pool_first else self.norm("ln_post", x)
        x = x[1:].mean(dim=0) if self.average else x[0]
        return (self.norm("ln_post", x) if self.pool_first else x) @ self.weights["proj"]


def softmax(q, k):
    logits = (q @ k.T / math.sqrt(q.shape[1])).exp()
    return logits / logits.sum(dim=1, keepdim=True)


def move_budget(A, taken, receivers, beta):
    """Equations 9 to 12, row by row: `taken` counts patches from 0, `receivers` tokens."""
    taken, A = [1 + i for i in taken], A.clone()
    for row in A[1:]:
        omega, mass = beta * row[taken].sum(), row[receivers].sum()
        if mass > 0:
            row[taken] *= 1 - beta
            row[receivers] *= 1 + omega / mass
    return A


def second_eigenvector(S):
    """The second eigenvector of (Deg - W) y = lambda Deg y, by the general solver on Deg^-1 (Deg - W)."""
    if len(S) == 1:
        return [0.0]
    W = (S + S.T) / 2
    degree = W.sum(dim=1)
    values, vectors = torch.linalg.eig((degree.diag() - W) / degree[:, None])
    y = vectors[:, values.real.argsort()[1]].real.tolist()
    return [value * math.copysign(1, max(y, key=abs)) for value in y]


def otsu(y):
    def between(cut):
        low, high = [v for v in y if v <= cut], [v for v in y if v > cut]
        return len(low) * len(high) * (statistics.fmean(low) - statistics.fmean(high)) ** 2 if low and high else 0

    return max(sorted(y), key=between)


def bicubic(new, old):
    """The matrix [new, old] of bicubic resizing: half-pixel centres, no antialiasing, borders repeated."""
    a, matrix = -0.75, torch.zeros(new, old, dtype=torch.float64)
    for i in range(new):
        centre = (i + 0.5) * old / new - 0.5
        for tap in range(math.floor(centre) - 1, math.floor(centre) + 3):
            t = abs(centre - tap)
            near = (a + 2) * t**3 - (a + 3) * t**2 + 1
            far = a * t**3 - 5 * a * t**2 + 8 * a * t - 4 * a
            matrix[i, min(max(tap, 0), old - 1)] += near if t <= 1 else far
    return matrix


def brute_profile(model, images):
    """The mean of w over images, blocks and the patch tokens that enter them."""
    stream, weights = [], []
    brute_tower(model, images, RefocusConfig((), proxy="none"), stream=stream)
    for token in torch.cat([x[1:] for x in stream]):
        f = token - token.min()
        weights.append(f / f.sum())
    return torch.stack(weights).mean(dim=0)
