"""The method in its plainest form: full singular value decompositions, loops, float64 NumPy.

Slow and obvious.
"""

import math

import numpy as np
import torch.nn as nn


def eigenvalues(weight):
    w = weight.detach().double().numpy()
    if w.ndim == 2:
        return np.sort(np.linalg.svd(w, compute_uv=False) ** 2)
    pooled = []
    for a in range(w.shape[2]):
        for b in range(w.shape[3]):
            singular = np.linalg.svd(math.sqrt(0.5) * w[:, :, a, b], compute_uv=False)
            pooled += [s * s for s in singular]
    return np.sort(np.array(pooled))


def hill(values, i, threshold):
    """alpha and D of the tail values[i:] over a threshold."""
    tail = values[i:]
    n = len(tail)
    alpha = 1 + n / sum(math.log(v / threshold) for v in tail)
    D = max(abs(1 - (v / threshold) ** (1 - alpha) - j / n) for j, v in enumerate(tail))
    return alpha, D


def fit(values, method="median"):
    """alpha, D, threshold."""
    N = len(values)
    if method == "median":
        i = N // 2
        return *hill(values, i, values[i]), values[i]
    if method == "median-paper":
        k = N // 2
        return *hill(values, N - k, values[N - k - 1]), values[N - k - 1]
    low, high = -math.inf, math.inf
    if method != "goodness-of-fit":
        logs = np.log10(values)
        counts, edges = np.histogram(logs, bins=100)
        peak = 10 ** edges[np.argmax(counts)]
        low = 0.95 * peak if method == "fix-finger" else math.log10(0.95 * peak)
        high = 1.5 * peak
    best = (math.inf, None, None)
    for i in range(N - 1):
        if low <= values[i] <= high and values[i] < values[-1]:  # an equal tail has no alpha
            alpha, D = hill(values, i, values[i])
            D = 1.0 if alpha <= 1 else D
            if D < best[0]:
                best = (D, alpha, values[i])
    return best[1], best[0], best[2]


def statistics(weight, gradient=None, method="median", values=None):
    values = eigenvalues(weight) if values is None else values
    alpha, D, _ = fit(values, method)
    total, greatest = sum(values), max(values)
    rank = sum(1 for v in values if math.sqrt(v) > 6e-5)
    p = [v / total + 6e-5 for v in values]
    gradnorm = 10.0 if gradient is None else math.sqrt(float((gradient.double() ** 2).sum()))
    x = alpha * math.log10(greatest)
    return {
        "alpha": alpha,
        "D": D,
        "alphahat": math.log(1 + math.exp(x)) if x < 500 else x,
        "spectral_norm": greatest,
        "fnorm": total,
        "stable_rank": total / greatest,
        "entropy": -sum(q * math.log(q) for q in p) / math.log(rank + 6e-5),
        "gradnorm": gradnorm,
        "gradnorm_d_weightnorm": gradnorm / (greatest + 1e-8),
    }


def reverse(scores):
    return [min(scores) + max(scores) - a for a in scores]


def decays(scores, eta, mapping, s1, s2, blocks):
    out = []
    for i, a in enumerate(scores):
        M = len(scores)
        if mapping == "tb_linear_map":
            out.append(eta * ((a - min(scores)) / (max(scores) - min(scores)) * (s2 - s1) + s1))
        elif mapping == "tb_quantile":
            places = [j for j, b in enumerate(sorted(scores)) if b == a]
            out.append(eta * (sum(places) / len(places) / (M - 1) * (s2 - s1) + s1))
        elif mapping == "tb_sqrt":
            out.append(eta * M * math.sqrt(a) / sum(math.sqrt(b) + 1e-8 for b in scores))
        elif mapping == "tb_log2":
            out.append(eta * M * math.log2(a) / sum(math.log2(b) + 1e-8 for b in scores))
        else:
            inside = [b for b, block in zip(scores, blocks, strict=True) if block == blocks[i]]
            mean = sum(inside) / len(inside)
            std = math.sqrt(sum((b - mean) ** 2 for b in inside) / len(inside))
            out.append(eta * 2 / (1 + math.exp(-4 * (a - mean) / (std + 1e-8))))
    return out


def balanced(model):
    """Return names and weights of the balanced modules, in the order of named_modules()."""
    found = [
        (n, m.weight) for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))
    ]
    return [(n, w) for n, w in found[1:-1] if np.prod(w.shape) // max(w.shape[:2]) >= 50]


def window_eigenvalues(weight):
    """Return the pooled eigenvalues of square windows of half the smaller side (FARMS)."""
    w = weight.detach().double().numpy()
    side = min(w.shape) // 2
    pooled = []
    rows, columns = (math.ceil(length / side) for length in w.shape)
    for i in range(rows):
        for j in range(columns):
            top, left = (
                round(i * (w.shape[0] - side) / (rows - 1)),
                round(j * (w.shape[1] - side) / (columns - 1)),
            )
            pooled += [
                s * s
                for s in np.linalg.svd(w[top : top + side, left : left + side], compute_uv=False)
            ]
    return np.sort(np.array(pooled))
