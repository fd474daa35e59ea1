"""ResCLIP's feedback once more: pair by pair, in float64."""

from collections import Counter
from fractions import Fraction
from math import exp

import numpy as np

from oracles.methods import distances, softmax


def agreement(labels):
    """M [N, N] of a grid of classes."""
    gh, gw = labels.shape
    places = [(r, c) for r in range(gh) for c in range(gw)]
    K, N = max(gh, gw) - 1, gh * gw
    M = np.zeros((N, N))
    for i, a in enumerate(places):
        for j, b in enumerate(places):
            far = max(abs(b[0] - a[0]), abs(b[1] - a[1]))
            if labels[a] != labels[b]:
                continue
            line = (
                [tuple(round(x + Fraction((y - x) * t, K)) for x, y in zip(a, b, strict=True)) for t in range(far + 1)]
                if K
                else [a]
            )
            M[i, j] = 1 if all(labels[place] == labels[a] for place in line) else exp(-far / K)
    taps = min(31, N if N % 2 else N - 1)
    blurred = np.zeros_like(M)
    for i in range(N):
        for j in range(N):
            for step in range(-(taps // 2), taps // 2 + 1):
                if 0 <= j + step < N:
                    blurred[i, j] += exp(-(step**2) / 50) * M[i, j + step]
    blurred /= sum(exp(-(step**2) / 50) for step in range(-(taps // 2), taps // 2 + 1))
    blurred /= blurred.sum(axis=1, keepdims=True) + 1e-8
    return blurred / blurred.max()


def patch_labels(pixels, grid):
    """The most frequent class of each patch, the smallest of equals."""
    gh, gw = grid
    height, width = pixels.shape[0] // gh, pixels.shape[1] // gw
    found = np.zeros(grid, int)
    for r in range(gh):
        for c in range(gw):
            counts = Counter(pixels[r * height : (r + 1) * height, c * width : (c + 1) * width].ravel().tolist())
            found[r, c] = min(counts, key=lambda label: (-counts[label], label))
    return found


def resclip(p, M, share, gain, mixed):
    """z of the second pass, of ResCLIP."""
    q, k, v = p.qkv(p.L, p.F[p.L - 1])
    R = 0
    for n in (6, 7, 8, 9):
        a, b, _ = p.qkv(n, p.F[n - 1])
        R = R + softmax(a @ b.transpose(0, 2, 1) / a.shape[-1] ** 0.5) / 4
    M = np.pad(M, ((1, 0), (1, 0)))
    S = gain * ((1 - mixed) * k @ k.transpose(0, 2, 1) / k.shape[-1] ** 0.5 + mixed * M)
    return p.out(p.L, 2 * ((1 - share) * softmax(S + distances(p)) + share * R) @ v)


def clearclip(p, M, gain, mixed):
    """z of the second pass, of ClearCLIP."""
    q, _, v = p.qkv(p.L, p.F[p.L - 1])
    S = gain * ((1 - mixed) * q @ q.transpose(0, 2, 1) / q.shape[-1] ** 0.5 + mixed * np.pad(M, ((1, 0), (1, 0))))
    return p.out(p.L, softmax(S) @ v)
