"""Instance norm ++ with its activation: a door to normalise.py, which holds the reference, the
derivatives and the kernels."""

import torch
from torch import Tensor
from torch.compiler import is_compiling

from fastscore import direct
from fastscore.ops import checks
from fastscore.ops.activations import ACTIVATIONS, code_of
from fastscore.ops.normalise import (
    check_form,
    check_image,
    check_tangents,
    normalise,
    normalise_dual,
    pack,
)


def instance_norm_plus(
    x: Tensor,
    gamma: Tensor,
    alpha: Tensor | None = None,
    beta: Tensor | None = None,
    *,
    eps: float = 1e-5,
    activation: str | None = None,
    backend: str | None = None,
) -> Tensor:
    """Normalise each channel of each sample over its pixels, put the means back normalised over
    channels, and activate.

        y = f(γ (h + α m̂) + β),    h = (x - μ)/√(var_s x + eps),    m̂ = (μ - mean_c μ)/√(var_c μ +
        eps)

    with μ the mean over pixels, var_s biased and var_c unbiased. With one channel m̂ = 0 (other
    implementations give NaN); with one pixel h = 0.

    Args:
        x: (B, C, *) with one or more spatial dimensions; float32, float64, bfloat16 or float16;
            statistics in float32 or wider. Contiguous and channels-last tensors are read where they
            lie, others are copied first.
        gamma, alpha, beta: γ, α, β, each (C,) or (B, C), any float dtype; without alpha there is no
            channel term (plain instance norm).
        eps: added to both variances.
        activation: f: None, 'elu', 'silu', 'relu', 'gelu' or 'softplus'.
        backend: 'reference', 'cpp', 'triton' or 'cuda' instead of the automatic choice.

    Returns:
        y, like x. All tensors are differentiable, in every mode and order.

    Raises:
        ValueError: shapes or devices differ, eps is not positive, or the activation is unknown.
            TypeError: a dtype is no float dtype.

    Source: Song & Ermon 2019, appendix A.1 (arXiv:1907.05600).

    >>> instance_norm_plus(torch.tensor([[[1.0, 3.0]]]), torch.ones(1), eps=1e-12)
    tensor([[[-1.,  1.]]])
    """
    if backend is None and not is_compiling() and (door := direct.automatic) is not None:
        code = code_of(activation)
        y = door.normalise(x, gamma, alpha, beta, None, None, 0, eps, code)
        if y is not None:
            return y

    arguments = _columns("instance_norm_plus", x, gamma, alpha, beta, eps, activation)
    return normalise(x, *arguments, backend)


def instance_norm_plus_ref(
    x: Tensor,
    gamma: Tensor,
    alpha: Tensor | None = None,
    beta: Tensor | None = None,
    *,
    eps: float = 1e-5,
    activation: str | None = None,
) -> Tensor:
    """The equation, in the dtype of its arguments."""
    pixels = tuple(range(2, x.dim()))

    def column(c):
        return c.reshape(*c.shape, *[1] * len(pixels))  # (C, 1, ...) or (B, C, 1, ...)

    mean = x.mean(pixels, keepdim=True)
    variance = x.var(pixels, correction=0, keepdim=True)
    h = (x - mean) / (variance + eps).sqrt()

    # Over one channel the deviation is 0, whatever it is divided by.
    if alpha is not None:
        deviation = mean - mean.mean(1, keepdim=True)
        of_means = deviation.square().sum(1, keepdim=True) / max(x.shape[1] - 1, 1)
        h = h + column(alpha) * deviation / (of_means + eps).sqrt()

    u = column(gamma) * h
    if beta is not None:
        u = u + column(beta)
    return ACTIVATIONS[activation].function(u)


def conditional_instance_norm_plus(
    x: Tensor,
    labels: Tensor,
    weight: Tensor,
    *,
    eps: float = 1e-5,
    activation: str | None = None,
    bias: bool = True,
    backend: str | None = None,
) -> Tensor:
    """Instance norm ++ whose coefficients are rows of a table, one row per noise level, picked
    inside the kernel.

        y = f(γ_l (h + α_l m̂) + β_l),    l = labels    (see instance_norm_plus)

    Args:
        x: (B, C, *), any float dtype.
        labels: (B,) int64 in [0, L); looked at on the CPU, not on a GPU.
        weight: (L, 3C), columns γ, α, β; (L, 2C) without bias. Its gradient is summed in a fixed
            order.
        eps, activation, backend: as in `instance_norm_plus`.

    Raises:
        ValueError: shapes or devices differ, or a label is out of range. TypeError: a dtype is
            wrong.

    Source: Song & Ermon 2019, appendix A.1 (arXiv:1907.05600); columns as in its networks'
    checkpoints.

    >>> x, labels = torch.ones(2, 1, 4), torch.tensor([0, 1])
    >>> weight = torch.tensor([[1.0, 1.0, 5.0], [1.0, 1.0, 7.0]])
    >>> conditional_instance_norm_plus(x, labels, weight).flatten()[::4]
    tensor([5., 7.])
    """
    if backend is None and not is_compiling() and (door := direct.automatic) is not None:
        code = code_of(activation)
        y = door.normalise(x, None, True, bias, labels, weight, 0, eps, code)
        if y is not None:
            return y

    arguments = _rows("conditional_instance_norm_plus", x, labels, weight, eps, activation, bias)
    return normalise(x, *arguments, backend)


def conditional_instance_norm_plus_ref(
    x: Tensor,
    labels: Tensor,
    weight: Tensor,
    *,
    eps: float = 1e-5,
    activation: str | None = None,
    bias: bool = True,
) -> Tensor:
    """The equation, in the dtype of its arguments: each sample takes its row of the table."""
    columns = weight[labels].chunk(3 if bias else 2, dim=1)  # (B, C) each
    return instance_norm_plus_ref(x, *columns, eps=eps, activation=activation)


def instance_norm_plus_dual(
    x: Tensor,
    t: Tensor,
    gamma: Tensor,
    alpha: Tensor | None = None,
    beta: Tensor | None = None,
    *,
    eps: float = 1e-5,
    activation: str | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Values and the tangents along M directions of x, in one pass: no forward-mode machinery, an
    ordinary backward.

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


def conditional_instance_norm_plus_dual(
    x: Tensor,
    t: Tensor,
    labels: Tensor,
    weight: Tensor,
    *,
    eps: float = 1e-5,
    activation: str | None = None,
    bias: bool = True,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Values and the tangents along M directions of x, as `instance_norm_plus_dual`; coefficients
    as `conditional_instance_norm_plus`."""
    op = "conditional_instance_norm_plus_dual"
    arguments = _rows(op, x, labels, weight, eps, activation, bias)
    check_tangents(op, t, x)
    return normalise_dual(x, t, *arguments, backend)


def _columns(op, x, gamma, alpha, beta, eps, activation):
    """(coef, no labels, form) from separate coefficients."""
    x = checks.stand_in(x)
    checks.check_float(op, "x", x)
    check_image(op, x)
    coefficients = {"gamma": gamma, "alpha": alpha, "beta": beta}
    columns = [
        _column(op, name, c, x)
        for name, c in coefficients.items()
        if c is not None or name == "gamma"
    ]
    return (
        pack(columns),
        None,
        check_form(op, x, 0, alpha is not None, beta is not None, eps, activation),
    )


def _rows(op, x, labels, weight, eps, activation, bias):
    """(coef, labels, form) from a table."""
    x = checks.stand_in(x)
    checks.check_float(op, "x", x)
    check_image(op, x)
    checks.check_float(op, "weight", weight)
    bias = checks.flag(op, "bias", bias)
    wanted = (3 if bias else 2) * x.shape[1]
    if weight.dim() != 2 or weight.shape[1] != wanted:
        raise ValueError(
            f"{op}: weight must be (L, {wanted}) for {x.shape[1]} channels "
            f"{'with' if bias else 'without'} bias; "
            f"got {tuple(weight.shape)}."
        )
    checks.check_tensor(op, "labels", labels)
    if labels.dtype != torch.int64 or labels.shape != x.shape[:1]:
        raise ValueError(
            f"{op}: labels must be int64 ({x.shape[0]},); got {labels.dtype} {tuple(labels.shape)}."
        )
    for name, t in (("labels", labels), ("weight", weight)):
        if t.device != x.device:
            raise ValueError(
                f"{op}: {name} must be on the device of x, {x.device}; got {t.device}."
            )
        checks.check_as_real(op, name, t, x)
    if labels.device.type == "cpu" and labels.numel() and checks.readable():
        low, high = (v.item() for v in torch.aminmax(labels))
        if low < 0 or high >= len(weight):
            raise ValueError(
                f"{op}: labels must be in 0..{len(weight) - 1}; got {low if low < 0 else high}."
            )
    return (
        weight.to(checks.compute_dtype(x.dtype)),
        labels,
        check_form(op, x, 0, True, bias, eps, activation),
    )


def _column(op, name, c, x):
    checks.check_float(op, name, c)
    B, C = x.shape[:2]
    # one comparison: two would tie a dynamic B to C where they are equal
    if c.shape != ((C,) if c.dim() == 1 else (B, C)):
        raise ValueError(f"{op}: {name} must be ({C},) or ({B}, {C}); got {tuple(c.shape)}.")
    if c.device != x.device:
        raise ValueError(f"{op}: {name} must be on the device of x, {x.device}; got {c.device}.")
    checks.check_as_real(op, name, c, x)
    dtype = checks.compute_dtype(x.dtype)
    return c if c.dtype == dtype else c.to(dtype)
