"""The steps of RF-CLIP by brute force: loops over single numbers in float64, sharing no code with the package."""

import math
import statistics
from itertools import product

import torch
from helpers import float64


def brute_weights(q, k, scale=None):
    B, H, T, D = q.shape
    scale = 1 / math.sqrt(D) if scale is None else scale
    q, k = q.tolist(), k.tolist()
    weights = torch.zeros(B, H, T, T, dtype=torch.float64)
    for b, h, i in product(range(B), range(H), range(T)):
        logits = [scale * sum(x * y for x, y in zip(q[b][h][i], k[b][h][j], strict=True)) for j in range(T)]
        top = max(logits)
        total = math.fsum(math.exp(z - top) for z in logits)
        weights[b, h, i] = float64([math.exp(z - top) / total for z in logits])
    return weights


def brute_apply(weights, v):
    """`weights` @ `v`, one number at a time."""
    B, H, rows, T = weights.shape
    D = v.shape[-1]
    weights, v = weights.tolist(), v.tolist()
    out = [
        [
            [[math.fsum(weights[b][h][i][j] * v[b][h][j][c] for j in range(T)) for c in range(D)] for i in range(rows)]
            for h in range(H)
        ]
        for b in range(B)
    ]
    return float64(out)


def brute_plain(q, k, v):
    return brute_apply(brute_weights(q, k), v)


def brute_refocused(q, k, v, distraction, target, beta):
    weights = brute_weights(q, k)
    B, H, T, _ = q.shape
    first = T - target.shape[1]  # 1 for a target over the patches, 0 for one over all tokens
    for b in range(B):
        taken = [j for j in range(1, T) if distraction[b, j - 1]]
        given_to = [j for j in range(first, T) if target[b, j - first] and j not in taken]
        for h, i in product(range(H), range(1, T)):
            row = weights[b, h, i].tolist()
            omega = beta * math.fsum(row[j] for j in taken)
            mass = math.fsum(row[j] for j in given_to)
            if omega > 0 and mass > 0:
                for j in taken:
                    weights[b, h, i, j] = (1 - beta) * row[j]
                for j in given_to:
                    weights[b, h, i, j] = row[j] + omega * row[j] / mass
    return brute_apply(weights, v)


def brute_proxy(keys, v):
    total = sum(brute_weights(k, k) for k in keys)
    return brute_apply(total[:, :, 1:, 1:] / len(keys), v[:, :, 1:])


def brute_scores(x, dims, shifted):
    scores = []
    for image in x.tolist():
        scores.append([])
        for f in image:
            low = min(f) if shifted else 0.0
            total = math.fsum(value - low for value in f)
            scores[-1].append(max((f[j] - low) / total for j in dims))
    return float64(scores)


def brute_redistributed(x, mask, dims, grid, size):
    gh, gw = grid
    before, after = x.tolist(), x.tolist()
    reach = size // 2
    for b, row, column, j in product(range(x.shape[0]), range(gh), range(gw), dims):
        near = [
            before[b][r * gw + c][j]
            for r in range(max(0, row - reach), min(gh, row + reach + 1))
            for c in range(max(0, column - reach), min(gw, column + reach + 1))
            if (r, c) != (row, column)
        ]
        if mask[b, row * gw + column] and near:
            after[b][row * gw + column][j] = math.fsum(near) / len(near)
    return float64(after)


def brute_clamped(x, mask, dims, shifted, tau):
    out = x.tolist()
    for b, i in product(range(x.shape[0]), range(x.shape[1])):
        token = x[b, i].tolist()
        low = min(token) if shifted else 0.0
        most = low + tau * math.fsum(value - low for value in token)
        for j in dims:
            if mask[b, i]:
                out[b][i][j] = min(token[j], most)
    return float64(out)


def brute_filtered(x, mask, grid, size, statistic):
    gh, gw = grid
    before, after = x.tolist(), x.tolist()
    reach = size // 2
    for b, row, column, j in product(range(x.shape[0]), range(gh), range(gw), range(x.shape[2])):
        window = [
            before[b][r * gw + c][j]
            for r in range(max(0, row - reach), min(gh, row + reach + 1))
            for c in range(max(0, column - reach), min(gw, column + reach + 1))
        ]
        if mask[b, row * gw + column]:
            after[b][row * gw + column][j] = getattr(statistics, statistic)(window)
    return float64(after)


def brute_blended(x, mask, grid):
    gh, gw = grid
    before, after = x.tolist(), x.tolist()
    for b, row, column, j in product(range(x.shape[0]), range(gh), range(gw), range(x.shape[2])):
        window = [
            before[b][r * gw + c][j]
            for r in range(max(0, row - 1), min(gh, row + 2))
            for c in range(max(0, column - 1), min(gw, column + 2))
        ]
        i = row * gw + column
        if mask[b, i]:
            after[b][i][j] = 0.6 * before[b][i][j] + 0.4 * math.fsum(window) / 9
    return float64(after)


def brute_cosines(guide):
    images = []
    for g in guide.tolist():
        length = [math.sqrt(math.fsum(value * value for value in token)) for token in g]
        products = [[math.fsum(x * y for x, y in zip(a, b, strict=True)) for b in g] for a in g]
        images.append(
            [
                [p / (m * n or 1) for p, n in zip(row, length, strict=True)]
                for row, m in zip(products, length, strict=True)
            ]
        )
    return float64(images)


def brute_aggregated(cosines, x, cut):
    out, (B, N, e) = torch.zeros(x.shape, dtype=torch.float64), x.shape
    for b, i, c in product(range(B), range(N), range(e)):
        row = cosines[b, i].tolist()
        out[b, i, c] = math.fsum(row[j] * x[b, j, c].item() for j in range(N) if row[j] >= cut)
    return out


def brute_similarity(k, scale=None):
    weights = brute_weights(k, k, scale)
    B, H, T, _ = weights.shape
    rows = weights.tolist()
    return float64(
        [
            [[math.fsum(rows[b][h][i][j] for h in range(H)) / H for j in range(1, T)] for i in range(1, T)]
            for b in range(B)
        ]
    )


def brute_fiedler(similarity):
    """By another route: the unsymmetric problem Deg^-1 (Deg - W) y = lambda y, solved in full and sorted here."""
    vectors = []
    for S in similarity.double():
        N = len(S)
        W = float64([[(S[i, j].item() + S[j, i].item()) / 2 for j in range(N)] for i in range(N)])
        degree = [math.fsum(W[i].tolist()) for i in range(N)]
        matrix = float64([[((i == j) * degree[i] - W[i, j].item()) / degree[i] for j in range(N)] for i in range(N)])
        values, columns = torch.linalg.eig(matrix)
        second = sorted(range(N), key=lambda i: values[i].real.item())[1]
        y = columns[:, second].real.tolist()
        largest = max(y, key=abs)
        length = math.sqrt(math.fsum(value * value for value in y))
        vectors.append([value * math.copysign(1, largest) / length for value in y])
    return float64(vectors)


def between_class_variance(values, threshold):
    low, high = [y for y in values if y <= threshold], [y for y in values if y > threshold]
    if not low or not high:
        return 0.0
    gap = math.fsum(low) / len(low) - math.fsum(high) / len(high)
    return len(low) * len(high) * gap**2 / len(values) ** 2


def brute_otsu(values):
    threshold = max(sorted(values), key=lambda y: between_class_variance(values, y))
    return [y > threshold for y in values]


def brute_resized(plane, H, W):
    """Bilinear samples of the plane at the centres of H x W pixels; beyond its outermost centres, the plane repeats."""
    h, w = len(plane), len(plane[0])

    def taps(place, length, size):
        at = min(max((place + 0.5) * length / size - 0.5, 0.0), length - 1.0)
        low = min(int(at), max(length - 2, 0))
        return (low, 1 - (at - low)), (min(low + 1, length - 1), at - low)

    def sample(Y, X):
        rows, columns = taps(Y, h, H), taps(X, w, W)
        return math.fsum(a * b * plane[y][x] for (y, a), (x, b) in product(rows, columns))

    return [[sample(Y, X) for X in range(W)] for Y in range(H)]


def brute_averaged(logits, corners, window, size):
    h, w = size
    windows = [[brute_resized(plane, *window) for plane in planes] for planes in logits.tolist()]
    found = [[[[] for _ in range(w)] for _ in range(h)] for _ in range(logits.shape[1])]
    for (top, left), planes in zip(corners, windows, strict=True):
        for k, y, x in product(range(logits.shape[1]), *map(range, window)):
            found[k][top + y][left + x].append(planes[k][y][x])
    return float64([[[math.fsum(values) / len(values) for values in row] for row in plane] for plane in found])


def brute_probabilities(logits, size, scale, class_of_name, classes):
    planes = [brute_resized(plane, *size) for plane in logits.tolist()]
    out = torch.zeros(classes, *size, dtype=torch.float64)
    for y, x in product(range(size[0]), range(size[1])):
        values = [scale * plane[y][x] for plane in planes]
        shares = [math.exp(value - max(values)) for value in values]
        for share, c in zip(shares, class_of_name, strict=True):
            out[c, y, x] = max(out[c, y, x].item(), share / math.fsum(shares))
    return out


def brute_pamr(image, mask, iterations, dilations):
    B, channels, H, W = image.shape
    image, out = image.tolist(), mask.double().clone()

    def near(y, x):
        places = [(y + d * dy, x + d * dx) for d in dilations for dy, dx in product((-1, 0, 1), repeat=2) if dy or dx]
        return [(min(max(r, 0), H - 1), min(max(c, 0), W - 1)) for r, c in places]

    def weights(b, y, x):
        logits = [0.0 for _ in near(y, x)]
        for plane in image[b]:
            values = [plane[r][c] for r, c in near(y, x)]
            spread = 1e-8 + 0.1 * statistics.stdev([*values, *[plane[y][x]] * len(dilations)])
            logits = [z - abs(plane[y][x] - v) / spread / channels for z, v in zip(logits, values, strict=True)]
        shares = [math.exp(z - max(logits)) for z in logits]
        return [share / math.fsum(shares) for share in shares]

    for b in range(B):
        table = {(y, x): list(zip(weights(b, y, x), near(y, x), strict=True)) for y, x in product(range(H), range(W))}
        for _ in range(iterations):
            before = out[b].tolist()
            for c, (y, x) in product(range(out.shape[1]), table):
                out[b, c, y, x] = math.fsum(weight * before[c][r][q] for weight, (r, q) in table[y, x])
    return out
