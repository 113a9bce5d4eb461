"""The door to forward mode."""

import torch

from fastscore.ops import checks


def jvp(f, x, v):
    """Evaluate f and its Jacobian-vector products along one or several directions in one forward pass.

        (f(x), J v_m),    J = ∂f/∂x

    Args:
        f: any function or module of x alone; f(x) may have any shape that starts with B.
        x: (B, *), any float dtype.
        v: directions, (B, *) like x, or (M, B, *).

    Returns:
        f(x), and J v: like f(x), or (M, *f(x).shape). Both are differentiable in x, v and whatever parameters f holds.

    Raises:
        ValueError: v does not fit x. TypeError: x is no float tensor.

    >>> jvp(torch.sin, torch.zeros(1, 2), torch.ones(3, 1, 2))[1].shape
    torch.Size([3, 1, 2])
    """
    checks.check_float("jvp", "x", x)
    checks.check_float("jvp", "v", v)
    if v.shape != x.shape and v.shape[1:] != x.shape:
        raise ValueError(f"jvp: v must have the shape of x, {tuple(x.shape)}, or (M, *) of it; got {tuple(v.shape)}.")
    if v.dtype != x.dtype or v.device != x.device:
        raise ValueError(f"jvp: v must be {x.dtype} on {x.device} like x; got {v.dtype} on {v.device}.")
    if v.shape == x.shape:
        return torch.func.jvp(f, (x,), (v,))
    return _stacked(f, x, v)


def _stacked(f, x, v):
    pairs = [torch.func.jvp(f, (x,), (d,)) for d in v]
    return pairs[0][0], torch.stack([t for _, t in pairs])
