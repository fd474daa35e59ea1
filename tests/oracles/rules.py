"""The rules of the methods' protocols once more: pixel by pixel, name by name and head by head in float64."""

import math

import numpy as np

from oracles.methods import softmax, unit
from oracles.released_evaluation import resize_planes


def class_probabilities(logits, class_of_name, size, scale):
    """[C, H, W] of the logits of names [K, h, w]."""
    names = softmax(scale * resize_planes(logits, *size).transpose(1, 2, 0))
    return np.stack([names[..., class_of_name == c].max(axis=-1) for c in range(max(class_of_name) + 1)])


def labels_by_area(probabilities, share, threshold):
    """SCLIP's and SC-CLIP's labels [H, W] on VOC21, -1 below the threshold."""
    classes, height, width = probabilities.shape
    area = [0] * classes
    for row in range(height):
        for column in range(width):
            area[probabilities[:, row, column].argmax()] += 1
    left = [c for c in range(classes) if c == 0 or area[c] > share * sum(area[1:])]
    labels = np.full((height, width), -1)
    for row in range(height):
        for column in range(width):
            best = max(left, key=lambda c: probabilities[c, row, column])
            if threshold is None or probabilities[best, row, column] >= threshold:
                labels[row, column] = best
    return labels


def stretched(plane):
    return (plane - plane.min()) / np.ptp(plane) if np.ptp(plane) else np.zeros_like(plane)


def surgery(patches, image, text, empty):
    """CLIP Surgery's maps [K, gh, gw] of patches [C, gh, gw]: whole vectors of features, as it is told."""
    K = len(text)
    maps = np.zeros((K, *patches.shape[1:]))
    w = softmax(2 * text @ image)
    w = w / w.mean()
    for row in range(patches.shape[1]):
        for column in range(patches.shape[2]):
            x = patches[:, row, column]
            features = np.stack([w[c] * x * text[c] for c in range(K)])
            common = features.mean(axis=0)
            for c in range(K):
                maps[c, row, column] = x @ (text[c] - empty) if K == 1 else (features[c] - common).sum()
    return np.stack([stretched(plane) for plane in maps])


def correlations(p):
    """E [N, N] of a plain tower `oracles.methods.Plain`."""
    total = 0
    for u in p.qkv(p.L - 1, p.F[p.L - 2]):
        for head in u:
            total = total + unit(head) @ unit(head).T / (3 * len(u))
    return np.maximum(total[1:, 1:] - total[0, 1:], 0)


def dbscan(points, eps, least):
    """The cluster of each row, from 0 in order of their first core point, and -1 for noise."""
    near = [np.flatnonzero(np.linalg.norm(points - point, axis=1) <= eps) for point in points]
    found, clusters = np.full(len(points), -1), 0
    for start in range(len(points)):
        if found[start] >= 0 or len(near[start]) < least:
            continue
        waiting = [start]
        while waiting:
            point = waiting.pop()
            if found[point] < 0:
                found[point] = clusters
                waiting += list(near[point]) if len(near[point]) >= least else []
        clusters += 1
    return found


def median7(plane):
    padded = np.pad(plane, 3, mode="symmetric")
    out = np.zeros_like(plane)
    for row in range(plane.shape[0]):
        for column in range(plane.shape[1]):
            out[row, column] = np.median(padded[row : row + 7, column : column + 7])
    return out


def labels_by_region(E, grid, labels):
    """CLIPtrase's labels [H, W]: those given, after the vote of the regions found in E [N, N]."""
    line = math.log(len(E) / 196) / math.log(441 / 196)
    eps = math.exp(math.log(0.7) + line * (math.log(1.1) - math.log(0.7)))
    least = max(2, round(math.exp(math.log(3) + line * (math.log(7) - math.log(3)))))
    cluster = dbscan(E, eps, least)
    maps = []
    for number in range(cluster.max() + 1):
        plane = E[cluster == number].mean(axis=0).reshape(1, *grid)
        plane = median7(resize_planes(plane, 4 * grid[0], 4 * grid[1])[0])
        maps.append(resize_planes(plane[None], *labels.shape)[0])
    if not maps:
        return labels
    region, voted = np.stack(maps).argmax(axis=0), labels.copy()
    for number in range(len(maps)):
        values, counts = np.unique(labels[region == number], return_counts=True)
        if len(values):
            voted[region == number] = values[counts.argmax()]
    return voted


def fused(z, B, text, background, scale, cut):
    """CLIPer's scores [K, gh, gw] of the embeddings [C, gh, gw] of all blocks and a map [N, N]."""
    K, grid = len(text), z[0].shape[1:]
    mean = np.mean([text[c] for c in range(K) if not background[c]], axis=0)
    names = np.stack([*text, mean / np.linalg.norm(mean)])
    total = np.zeros((K, grid[0] * grid[1]))
    for n, x in enumerate(z, 1):
        p = softmax(scale * unit(x.reshape(len(x), -1).T) @ names.T)[:, :K].T
        p[background] = 0
        if n == len(z):
            for c in range(K):
                p[c, p[c] < cut * p[c].max()] = 0
        total += p / len(z)
    for c in range(K):
        for j in range(len(B)):
            total[c, j] += sum(p[c, i] * B[i, j] for i in range(len(B)))
    return total.reshape(K, *grid)


def labels_by_score(scores, size, class_of_name, score, least, minimum_to_zero):
    """CLIPer's labels [H, W], -1 for none."""
    maps = resize_planes(scores, *size)
    for plane, patches in zip(maps, scores, strict=True):
        if patches.max() <= score:
            plane[:] = -np.inf
        elif minimum_to_zero and np.ptp(plane):
            plane[:] = patches.max() * stretched(plane)
        else:
            plane *= patches.max() / plane.max()
    labels = np.full(size, -1)
    for row in range(size[0]):
        for column in range(size[1]):
            best = maps[:, row, column].max()
            if best >= least:
                labels[row, column] = min(class_of_name[maps[:, row, column] == best])
    return labels
