"""The evaluation that RF-CLIP's authors released, from its formulas alone: by window, head and name in float64."""

import math

import cv2
import numpy as np
import torch
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import squareform

from oracles.methods import Plain, around, softmax, unit


@torch.no_grad()
def released_labels(
    model,
    picture,
    named,
    text,
    *,
    dims,
    tau,
    short_side,
    window,
    stride,
    share,
    shift,
    distance,
    threshold,
    own_image=False,
    scale=40.0,
    long_side=2048,
):
    """(labels [H, W], class probabilities [C, H, W]) of an RGB picture, before the threshold in the probabilities.

    `named` has the names of each class, `text` [K, d] their normalized embeddings in order. `window` None is the whole
    picture at once. `share` is w, `shift` is mu and `distance` is theta.
    """
    text = np.asarray(text, dtype=np.float64)
    pixels = np.asarray(picture)
    H, W = pixels.shape[:2]
    resized = cv2.resize(pixels, resized_size(H, W, short_side, long_side)[::-1])
    x = (resized / 255 - np.array(model.visual.image_mean)) / np.array(model.visual.image_std)
    h, w = x.shape[:2]
    clusters = clusters_of_names(text, distance)

    whole = Tower(model, x, dims, tau)
    total, count = np.zeros((len(text), h, w)), np.zeros((h, w))
    for top, bottom in windows(h, window, stride):
        for left, right in windows(w, window, stride):
            tower = Tower(model, x[top:bottom, left:right], dims, tau)
            sim = text @ (tower if own_image else whole).image_embedding()
            patches = tower.patch_embeddings()
            adjusted = adjusted_names(text, sim, clusters, patches, shift)
            logits = np.zeros((len(text), len(patches)))
            for c in range(len(text)):
                for p in range(len(patches)):
                    logits[c, p] = (1 - share) * (patches[p] @ adjusted[c]) + share * sim[c]
            logits = logits.reshape(-1, *tower.grid)
            total[:, top:bottom, left:right] += resize_planes(logits, bottom - top, right - left)
            count[top:bottom, left:right] += 1

    logits = resize_planes(total / count, H, W)
    names = softmax(scale * logits.transpose(1, 2, 0)).transpose(2, 0, 1)
    classes, first = [], 0
    for group in named:
        classes.append(names[first : first + len(group)].max(axis=0))
        first += len(group)
    assert first == len(text)
    classes = np.stack(classes)
    labels = classes.argmax(axis=0)
    if threshold:
        labels[classes.max(axis=0) < threshold] = 0
    return labels, classes


def resized_size(height, width, short_side, long_side):
    f = min(long_side / max(height, width), short_side / min(height, width))
    return int(height * f + 0.5), int(width * f + 0.5)


def bilinear(new, old):
    """The matrix [new, old] of bilinear resizing at pixel centres, without antialiasing."""
    matrix = np.zeros((new, old))
    for i in range(new):
        source = (i + 0.5) * old / new - 0.5
        low = math.floor(source)
        matrix[i, max(low, 0)] += 1 - (source - low)
        matrix[i, min(low + 1, old - 1)] += source - low
    return matrix


def resize_planes(planes, height, width):
    return bilinear(height, planes.shape[1]) @ planes @ bilinear(width, planes.shape[2]).T


def bicubic(new, old, factor):
    """The matrix [new, old] of bicubic resizing by a factor: borders repeated, no antialiasing."""
    a, matrix = -0.75, np.zeros((new, old))
    for i in range(new):
        source = (i + 0.5) / factor - 0.5
        for tap in range(math.floor(source) - 1, math.floor(source) + 3):
            t = abs(source - tap)
            near = (a + 2) * t**3 - (a + 3) * t**2 + 1
            far = a * t**3 - 5 * a * t**2 + 8 * a * t - 4 * a
            matrix[i, min(max(tap, 0), old - 1)] += near if t <= 1 else far
    return matrix


def windows(side, window, stride):
    """The first pixel of each window along an axis and the one after its last."""
    if window is None:
        return [(0, side)]
    found = []
    for i in range(max(side - window + stride - 1, 0) // stride + 1):
        end = min(i * stride + window, side)
        found.append((max(end - window, 0), end))
    return found


def clusters_of_names(text, distance):
    """Lists of the rows of `text` that belong together, by complete linkage of cosine distances."""
    if len(text) == 1:
        return [[0]]
    distances = squareform(1 - text @ text.T, checks=False)
    numbers = fcluster(linkage(distances, "complete"), distance, criterion="distance")
    return [np.flatnonzero(numbers == number).tolist() for number in np.unique(numbers)]


def adjusted_names(text, sim, clusters, patches, shift):
    """The text embeddings, the best name of each cluster moved towards the two patches of the window nearest to it."""
    adjusted = text.copy()
    for members in clusters:
        best = max(members, key=lambda c: sim[c])
        nearest = np.argsort(-(patches @ text[best]), kind="stable")[:2]
        m = unit(patches[nearest].mean(axis=0))
        adjusted[best] = unit((1 - shift) * text[best] + shift * m)
    return adjusted


class Tower(Plain):
    """The released tower on normalized pixels [h, w, 3]: F[0] enters block 1, F[n] is block n's denoised output."""

    def __init__(self, model, x, dims, tau):
        self.visual = visual = model.visual
        patches = visual.conv1(torch.from_numpy(x.transpose(2, 0, 1).copy())[None])[0]
        self.grid = tuple(patches.shape[1:])
        tokens = torch.cat([visual.class_embedding[None], patches.flatten(1).T]) + torch.from_numpy(self.positions())
        self.F = [visual.ln_pre(tokens[None])[0].numpy()]
        for block in visual.transformer.resblocks:
            out = block(torch.from_numpy(self.F[-1])[None])[0].numpy()
            self.F.append(self.denoised(out, list(dims), tau))
        self.L = len(self.F) - 1

    def positions(self):
        positions, (gh, gw) = self.visual.positional_embedding.numpy(), self.grid
        nh, nw = self.visual.grid_size
        if (gh, gw) == (nh, nw):
            return positions
        rows, columns = bicubic(gh, nh, (gh + 0.1) / nh), bicubic(gw, nw, (gw + 0.1) / nw)
        planes = positions[1:].reshape(nh, nw, -1)
        resized = [rows @ planes[:, :, j] @ columns.T for j in range(planes.shape[2])]
        return np.concatenate([positions[:1], np.stack(resized, axis=2).reshape(gh * gw, -1)])

    def denoised(self, x, dims, tau):
        out = x.copy()
        for i, token in enumerate(x[1:]):
            f = token - token.min()
            if dims and max(f[dims] / max(f.sum(), 1e-8)) > tau / len(f):
                box = (token + x[1:][around(self, i)].sum(axis=0)) / 9
                out[1 + i] = 0.6 * token + 0.4 * box
        return out

    def image_embedding(self):
        return self.embedded(self.F[self.L][:1])[0]

    def patch_embeddings(self):
        """[N, C], normalized: the last block on the aggregated input and on the aggregated guide."""
        keys = [self.qkv(n, self.F[n - 1])[1] for n in range(1, self.L)]
        g = sum(self.F[1:]) / self.L
        cosines = unit(g[1:]) @ unit(g[1:]).T
        cosines[cosines < 0.4] = 0
        z = []
        for x in (self.F[self.L - 1], g):
            q, k, v = self.qkv(self.L, np.concatenate([x[:1], cosines @ x[1:]]))
            heads = []
            for head in range(len(v)):
                A = sum(self_attention(u[head]) for u in [*keys, k]) / self.L
                heads.append(A[1:, 1:] @ v[head, 1:])
            z.append(self.out(self.L, np.stack(heads)))
        return self.embedded((z[0] + z[1]) / 2)

    def embedded(self, tokens):
        return unit((self.visual.ln_post(torch.from_numpy(tokens)) @ self.visual.proj).numpy())


def self_attention(u):
    return softmax(u @ u.T / math.sqrt(u.shape[1]))
