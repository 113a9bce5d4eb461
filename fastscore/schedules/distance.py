"""NCSNv2's technique 1.

The largest noise is the largest distance within the data, exactly or between bounds.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fastscore import random
from fastscore.ops import checks

_SUBSET = 1024  # stream of the random subset


class DistanceBounds(NamedTuple):
    """lower <= max_pairwise_distance(data) <= upper; lower is the distance of a pair of samples."""

    lower: float
    upper: float


def max_pairwise_distance(data: Tensor, *, chunk: int | None = None) -> float:
    """Technique 1: the largest Euclidean distance between two samples, the NCSNv2 choice of σ_max.

        max_{i<j} ‖x_i - x_j‖

    Candidates come from ‖a‖² + ‖b‖² - 2 a·b in float64 on centred data, tile by tile, over one half
    of the symmetric matrix; the distance of the winning pair is then computed from its difference.
    Since ‖a‖, ‖b‖ <= max distance after centring, nothing cancels at the maximum: the result is the
    distance of a real pair, and short of the maximum by a relative (d + 4)·2^-51 at most.

    Cost: n²d multiply-adds in float64, halved by symmetry (50,000 CIFAR images: 3.8e12); memory:
    two blocks of `chunk` samples and one chunk × chunk tile beside the data. `distance_bounds`
    costs n·d.

    Args:
        data: (n, *), float, n >= 2. chunk: samples per block; unless given 1024, fewer where
            samples are large.

    Returns:
        a float.

    Raises:
        TypeError: data is not a float tensor. ValueError: fewer than 2 samples, or values that are
            not finite.

    Source: Song & Ermon 2020, technique 1 (arXiv:2006.09011).

    >>> max_pairwise_distance(torch.tensor([[0.0, 0.0], [3.0, 4.0], [3.0, 0.0]]))
    5.0
    """
    op = "max_pairwise_distance"
    x, centre, chunk = _prepare(op, data, chunk)
    best, pair = -1.0, (0, 1)
    for i in range(0, len(x), chunk):
        a, norms_a = _block(x, centre, i, chunk)
        for j in range(i, len(x), chunk):
            b, norms_b = (a, norms_a) if i == j else _block(x, centre, j, chunk)
            tile = torch.addmm(norms_a[:, None] + norms_b, a, b.T, alpha=-2)
            value, at = tile.flatten().max(0)
            if value.item() > best:
                best = value.item()
                pair = (i + at.item() // len(b), j + at.item() % len(b))

    return _distance(x, *pair)


def distance_bounds(
    data: Tensor, *, samples: int = 1024, seed: int | Tensor | None = None, chunk: int | None = None
) -> DistanceBounds:
    """Bound the largest pairwise distance in n·d operations.

    Lower: the largest of the distances within a random subset, and of those from the sample
    farthest from the mean to all, and from the farthest of those to all. Upper: r₁ + r₂, the two
    largest distances to the mean (triangle inequality). Always upper <= 2 lower.

    Args:
        data: (n, *), float, n >= 2. samples: size of the random subset, at least 2, drawn without
            replacement; all of the data if there are fewer, and lower is then exact. seed: of the
            draw (None: one draw from torch's default generator).

    Returns:
        DistanceBounds(lower, upper), floats.

    Raises:
        as max_pairwise_distance; ValueError: samples < 2.

    >>> distance_bounds(torch.tensor([[0.0], [1.0], [4.0]]), seed=0).lower
    4.0
    """
    op = "distance_bounds"
    samples = checks.integer(op, "samples", samples, 2)
    x, centre, chunk = _prepare(op, data, chunk)
    radii = _distances_to(x, centre, chunk)
    r1, r2 = radii.topk(2).values.tolist()
    subset = random.draw(
        op, random.WORDS, (len(x),), seed, stream=_SUBSET, device=x.device
    ).argsort(stable=True)[:samples]
    sweep = radii.argmax().item()
    lower = [max_pairwise_distance(x[subset], chunk=chunk)]
    for _ in range(2):
        far = _distances_to(x, x[sweep].double(), chunk)
        sweep = far.argmax().item()
        lower.append(far[sweep].item())

    return DistanceBounds(max(lower), max(*lower, r1 + r2))


def _prepare(op, data, chunk):
    """Checked data as (n, d), its mean in float64, and the block size."""
    checks.check_float(op, "data", data)
    if data.dim() < 1 or len(data) < 2 or data[0].numel() == 0:
        raise ValueError(
            f"{op}: data must hold at least 2 samples, (n, *); got shape {tuple(data.shape)}."
        )
    if data.is_meta:
        raise ValueError(f"{op}: data must have values; it is on the meta device.")

    if chunk is not None:
        chunk = checks.integer(op, "chunk", chunk, 1)

    x = data.detach().flatten(1) if data.dim() > 1 else data.detach()[:, None]
    chunk = chunk or max(64, min(1024, 2**24 // x.shape[1]))
    centre = sum(x[i : i + chunk].double().sum(0) for i in range(0, len(x), chunk)) / len(x)
    # a sum of finite float32 values is finite in float64
    if not math.isfinite(centre.sum().item()):
        raise ValueError(f"{op}: data must be finite; it holds NaN or infinite values.")

    return x, centre, chunk


def _block(x, centre, start, chunk):
    block = x[start : start + chunk].double() - centre
    return block, block.square().sum(1)


def _distances_to(x, point, chunk):
    """(n,) float64, from differences."""
    return torch.cat(
        [(x[i : i + chunk].double() - point).norm(dim=1) for i in range(0, len(x), chunk)]
    )


def _distance(x, i, j):
    return (x[i].double() - x[j].double()).norm().item()
