"""PEARL's propagation once more: edge by edge, on dense matrices in float64."""

import math

import numpy as np

from oracles.methods import softmax
from oracles.released_evaluation import resize_planes


def cells(planes, height, width):
    """Means [K, h, w] of planes resized to height x width; what is beyond whole cells is left out."""
    planes = resize_planes(planes, height, width)
    down, across = max(1, round(height / 80)), max(1, round(width / 80))
    found = np.zeros((len(planes), height // down, width // across))
    for row in range(found.shape[1]):
        for column in range(found.shape[2]):
            part = planes[:, row * down : (row + 1) * down, column * across : (column + 1) * across]
            found[:, row, column] = part.mean(axis=(1, 2))
    return found


def propagated(logits, image, text, size):
    """u [K, h, w] of logits [K, h', w'], a normalized picture [3, H, W] and embeddings [K, C]."""
    logits, grey = cells(logits, *size), cells(image, *size).mean(axis=0)
    K, h, w = logits.shape
    g = [(softmax(text @ text.T / 0.5)[c, c] + 10) / 11 for c in range(K)]
    p = softmax(logits.reshape(K, -1).T)

    def agree(a, b):
        return sum(g[c] * p[a, c] * p[b, c] for c in range(K))

    A = np.diag([max(p[a].max(), 0.05) ** 2 * (1 + agree(a, a)) for a in range(h * w)])
    B = A.diagonal()[:, None] * logits.reshape(K, -1).T
    number = np.arange(h * w).reshape(h, w)
    for near, far in ((number[:-1], number[1:]), (number[:, :-1], number[:, 1:])):
        change = {(a, b): abs(grey.flat[a] - grey.flat[b]) for a, b in zip(near.flat, far.flat, strict=True)}
        mean = math.fsum(change.values()) / max(1, len(change))
        for (a, b), step in change.items():
            weight = min(1, math.exp(-5 * step / mean if mean else 0) * (1 + agree(a, b)))
            A[a, a] += weight
            A[b, b] += weight
            A[a, b] -= weight
            A[b, a] -= weight
    u = logits.reshape(K, -1).T.copy()
    residual = B - A @ u
    direction = residual
    for _ in range(25):
        left = np.vdot(residual, residual)
        if left < 1e-40:
            break
        length = left / np.vdot(direction, A @ direction)
        u = u + length * direction
        residual = residual - length * (A @ direction)
        direction = residual + np.vdot(residual, residual) / left * direction
    return u.T.reshape(K, h, w)
