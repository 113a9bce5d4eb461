"""Instance norm ++ with its activation: a door to normalise.py, which holds the reference, the derivatives and the kernels."""

import torch

from fastscore.ops import checks
from fastscore.ops.normalise import check_form, check_image, check_tangents, normalise, normalise_dual, pack


def instance_norm_plus(x, gamma, alpha=None, beta=None, *, eps=1e-5, activation=None, backend=None):
    """Normalise each channel of each sample over its pixels, put the means back normalised over channels, and activate.

        y = f(γ (h + α m̂) + β),    h = (x - μ)/√(var_s x + eps),    m̂ = (μ - mean_c μ)/√(var_c μ + eps)

    with μ the mean over pixels, var_s biased and var_c unbiased. With one channel m̂ = 0 (other implementations give NaN); with
    one pixel h = 0.

    Args:
        x: (B, C, *) with one or more spatial dimensions; float32, float64, bfloat16 or float16; statistics in float32 or wider.
            Contiguous and channels-last tensors are read where they lie, others are copied first.
        gamma, alpha, beta: γ, α, β, each (C,) or (B, C), any float dtype; without alpha there is no channel term (plain instance norm).
        eps: added to both variances.
        activation: f: None, 'elu', 'silu', 'relu', 'gelu' or 'softplus'.
        backend: 'reference', 'cpp', 'triton' or 'cuda' instead of the automatic choice.

    Returns:
        y, like x. All tensors are differentiable, in every mode and order.

    Raises:
        ValueError: shapes or devices differ, eps is not positive, or the activation is unknown. TypeError: a dtype is no float dtype.

    Source: Song & Ermon 2019, appendix A.1 (arXiv:1907.05600).

    >>> instance_norm_plus(torch.tensor([[[1.0, 3.0]]]), torch.ones(1), eps=1e-12)
    tensor([[[-1.,  1.]]])
    """
    return normalise(x, *_columns("instance_norm_plus", x, gamma, alpha, beta, eps, activation), backend)


def conditional_instance_norm_plus(x, labels, weight, *, eps=1e-5, activation=None, bias=True, backend=None):
    """Instance norm ++ whose coefficients are rows of a table, one row per noise level, picked inside the kernel.

        y = f(γ_l (h + α_l m̂) + β_l),    l = labels    (see instance_norm_plus)

    Args:
        x: (B, C, *), any float dtype.
        labels: (B,) int64 in [0, L); looked at on the CPU, not on a GPU.
        weight: (L, 3C), columns γ, α, β; (L, 2C) without bias. Its gradient is summed in a fixed order.
        eps, activation, backend: as in `instance_norm_plus`.

    Raises:
        ValueError: shapes or devices differ, or a label is out of range. TypeError: a dtype is wrong.

    Source: Song & Ermon 2019, appendix A.1 (arXiv:1907.05600); columns as in its networks' checkpoints.

    >>> conditional_instance_norm_plus(torch.ones(2, 1, 4), torch.tensor([0, 1]), torch.tensor([[1.0, 1, 5], [1, 1, 7]])).flatten()[::4]
    tensor([5., 7.])
    """
    return normalise(x, *_rows("conditional_instance_norm_plus", x, labels, weight, eps, activation, bias), backend)


def instance_norm_plus_dual(x, t, gamma, alpha=None, beta=None, *, eps=1e-5, activation=None, backend=None):
    """Values and the tangents along M directions of x, in one pass: no forward-mode machinery, an ordinary backward.

        (y, ẏ_m) = (N(x), ∂N(x)/∂x · t_m)    with N = instance_norm_plus

    Args:
        x: (B, C, *). t: (M, B, C, *), dtype of x. The rest as in `instance_norm_plus`.

    Returns:
        y like x, and ẏ (M, B, C, *). Differentiable in x, t and the coefficients.

    Raises:
        ValueError, TypeError: as in `instance_norm_plus`, or t does not fit x.
    """
    op = "instance_norm_plus_dual"
    arguments = _columns(op, x, gamma, alpha, beta, eps, activation)
    check_tangents(op, t, x)
    return normalise_dual(x, t, *arguments, backend)


def conditional_instance_norm_plus_dual(x, t, labels, weight, *, eps=1e-5, activation=None, bias=True, backend=None):
    """Values and the tangents along M directions of x, as `instance_norm_plus_dual`; coefficients as `conditional_instance_norm_plus`."""
    op = "conditional_instance_norm_plus_dual"
    arguments = _rows(op, x, labels, weight, eps, activation, bias)
    check_tangents(op, t, x)
    return normalise_dual(x, t, *arguments, backend)


def _columns(op, x, gamma, alpha, beta, eps, activation):
    """(coef, no labels, form) from separate coefficients."""
    checks.check_float(op, "x", x)
    check_image(op, x)
    coefficients = {"gamma": gamma, "alpha": alpha, "beta": beta}
    columns = [_column(op, name, c, x) for name, c in coefficients.items() if c is not None or name == "gamma"]
    return pack(columns), None, check_form(op, x, 0, alpha is not None, beta is not None, eps, activation)


def _rows(op, x, labels, weight, eps, activation, bias):
    """(coef, labels, form) from a table."""
    checks.check_float(op, "x", x)
    check_image(op, x)
    checks.check_float(op, "weight", weight)
    bias = checks.flag(op, "bias", bias)
    wanted = (3 if bias else 2) * x.shape[1]
    if weight.dim() != 2 or weight.shape[1] != wanted:
        raise ValueError(f"{op}: weight must be (L, {wanted}) for {x.shape[1]} channels {'with' if bias else 'without'} bias; "
                         f"got {tuple(weight.shape)}.")  # fmt: skip
    checks.check_tensor(op, "labels", labels)
    if labels.dtype != torch.int64 or labels.shape != x.shape[:1]:
        raise ValueError(f"{op}: labels must be int64 ({x.shape[0]},); got {labels.dtype} {tuple(labels.shape)}.")
    for name, t in (("labels", labels), ("weight", weight)):
        if t.device != x.device:
            raise ValueError(f"{op}: {name} must be on the device of x, {x.device}; got {t.device}.")
        checks.check_as_real(op, name, t, x)
    if labels.device.type == "cpu" and labels.numel() and checks.readable():
        low, high = (v.item() for v in torch.aminmax(labels))
        if low < 0 or high >= len(weight):
            raise ValueError(f"{op}: labels must be in 0..{len(weight) - 1}; got {low if low < 0 else high}.")
    return weight.to(checks.compute_dtype(x.dtype)), labels, check_form(op, x, 0, True, bias, eps, activation)


def _column(op, name, c, x):
    checks.check_float(op, name, c)
    B, C = x.shape[:2]
    if c.shape != ((C,) if c.dim() == 1 else (B, C)):   # one comparison: two would tie a dynamic B to C where they are equal
        raise ValueError(f"{op}: {name} must be ({C},) or ({B}, {C}); got {tuple(c.shape)}.")
    if c.device != x.device:
        raise ValueError(f"{op}: {name} must be on the device of x, {x.device}; got {c.device}.")
    checks.check_as_real(op, name, c, x)
    dtype = checks.compute_dtype(x.dtype)
    return c if c.dtype == dtype else c.to(dtype)
