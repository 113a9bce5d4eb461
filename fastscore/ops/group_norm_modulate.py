"""Group norm with affine map, scale and shift, and activation: a door to normalise.py, where a
group is a wider channel."""

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


def group_norm_modulate(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    *,
    eps: float = 1e-5,
    activation: str | None = None,
    backend: str | None = None,
) -> Tensor:
    """Normalise groups of channels and modulate them: AdaGN, FiLM and the scale-shift residual
    blocks of diffusion networks.

        y = f((h w + b)(1 + scale) + shift),    h = (x - mean_g x)/√(var_g x + eps)

    with mean and (biased) variance over the channels of a group and all pixels.

    Args:
        x: (B, C, *) with one or more spatial dimensions, any float dtype; statistics in float32 or
            wider; layouts as in `instance_norm_plus`.
        num_groups: a divisor of C; C itself is instance norm, 1 is layer norm over channels and
            pixels.
        weight, bias: w and b, (C,); 1 and 0 unless given.
        scale, shift: (B, C); 0 unless given.
        eps, activation, backend: as in `instance_norm_plus`.

    Returns:
        y, like x. All tensors are differentiable, in every mode and order.

    Raises:
        ValueError: C is no multiple of num_groups, shapes or devices differ, or as in
            `instance_norm_plus`. TypeError: dtypes.

    Source: Wu & He 2018 (arXiv:1803.08494); scale and shift as in Dhariwal & Nichol 2021
    (arXiv:2105.05233).

    >>> x, shift = torch.tensor([[[1.0], [3.0]]]), torch.tensor([[0.0, 5.0]])
    >>> group_norm_modulate(x, 1, eps=1e-12, shift=shift).flatten()
    tensor([-1.,  6.])
    """
    plain = backend is scale is shift is None and weight is not None
    if plain and not is_compiling() and (door := direct.automatic) is not None:
        code = code_of(activation)
        # Coefficients of each sample are scale and shift.
        single = getattr(weight, "ndim", 0) == 1 and (bias is None or getattr(bias, "ndim", 0) == 1)
        if single and type(num_groups) is int and num_groups > 0:
            y = door.normalise(x, weight, None, bias, None, None, num_groups, eps, code)
            if y is not None:
                return y

    op = "group_norm_modulate"
    arguments = _arguments(op, x, num_groups, weight, bias, scale, shift, eps, activation)
    return normalise(x, *arguments, backend)


def group_norm_modulate_ref(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    *,
    eps: float = 1e-5,
    activation: str | None = None,
) -> Tensor:
    """The equation, in the dtype of its arguments."""

    def column(c):
        return c.reshape(*c.shape, *[1] * (x.dim() - 2))  # (C, 1, ...) or (B, C, 1, ...)

    groups = x.reshape(x.shape[0], num_groups, -1)
    mean = groups.mean(2, keepdim=True)
    variance = groups.var(2, correction=0, keepdim=True)
    u = ((groups - mean) / (variance + eps).sqrt()).reshape(x.shape)

    if weight is not None:
        u = u * column(weight)
    if bias is not None:
        u = u + column(bias)
    if scale is not None:
        u = u * (1 + column(scale))
    if shift is not None:
        u = u + column(shift)
    return ACTIVATIONS[activation].function(u)


def group_norm_modulate_dual(
    x: Tensor,
    t: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    *,
    eps: float = 1e-5,
    activation: str | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Values and the tangents along M directions of x, in one pass: see `instance_norm_plus_dual`.

    Args:
        x: (B, C, *). t: (M, B, C, *), dtype of x. The rest as in `group_norm_modulate`.

    Returns:
        y like x, and ẏ (M, B, C, *). Differentiable in all tensors.
    """
    op = "group_norm_modulate_dual"
    arguments = _arguments(op, x, num_groups, weight, bias, scale, shift, eps, activation)
    check_tangents(op, t, x)
    return normalise_dual(x, t, *arguments, backend)


def _arguments(op, x, num_groups, weight, bias, scale, shift, eps, activation):
    """(coef, no labels, form): the two affine maps as one."""
    x = checks.stand_in(x)
    checks.check_float(op, "x", x)
    check_image(op, x)
    B, C = x.shape[:2]
    if not checks.whole(num_groups) or num_groups < 1 or C % num_groups:
        raise ValueError(
            f"{op}: num_groups must be an int that divides {C} channels; got "
            f"{checks.shown(num_groups)}."
        )
    dtype = checks.compute_dtype(x.dtype)
    given = [
        ("weight", weight, (C,)),
        ("bias", bias, (C,)),
        ("scale", scale, (B, C)),
        ("shift", shift, (B, C)),
    ]
    for name, c, shape in given:
        if c is None:
            continue
        checks.check_float(op, name, c)
        if c.shape != shape:
            raise ValueError(f"{op}: {name} must be {shape}; got {tuple(c.shape)}.")
        if c.device != x.device:
            raise ValueError(
                f"{op}: {name} must be on the device of x, {x.device}; got {c.device}."
            )
        checks.check_as_real(op, name, c, x)
    weight, bias, scale, shift = (None if c is None else c.to(dtype) for _, c, _ in given)
    gamma = x.new_ones(C, dtype=dtype) if weight is None else weight
    beta = bias
    if scale is not None:
        gamma = gamma * (1 + scale)
        beta = None if beta is None else beta * (1 + scale)
    if shift is not None:
        beta = shift if beta is None else beta + shift
    columns = [gamma] if beta is None else [gamma, beta]
    return (
        pack(columns),
        None,
        check_form(op, x, num_groups, False, beta is not None, eps, activation),
    )
