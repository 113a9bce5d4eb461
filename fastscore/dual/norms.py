"""PyTorch's normalisations as compositions whose forward mode is right.

Means, products and reciprocal roots.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils._python_dispatch


def _precise(composition):
    """Statistics of half precision in float32, and the input's dtype for the result, whatever
    the parameters' is: as PyTorch's own."""

    @functools.wraps(composition)
    def apply(input, *args, **kwargs):
        dtype = input.dtype
        h = composition(
            input.float() if dtype in (torch.bfloat16, torch.float16) else input, *args, **kwargs
        )
        return h if h.dtype == dtype else h.to(dtype)

    return apply


def _standardised(x, dims, eps):
    centred = x - x.mean(dims, keepdim=True)
    return centred * torch.rsqrt(centred.square().mean(dims, keepdim=True) + eps)


def _enough(op, x, dims):
    if math.prod(x.shape[d] for d in dims) == 1:
        raise ValueError(
            f"{op}: expected more than one value per channel when training; "
            f"got an input of shape {tuple(x.shape)}."
        )


def check_shape(op: str, x: Any, normalized_shape: Any) -> None:
    if tuple(x.shape[x.dim() - len(normalized_shape) :]) != tuple(normalized_shape):
        raise RuntimeError(
            f"{op}: expected an input that ends in {tuple(normalized_shape)}; got {tuple(x.shape)}."
        )


def _affine(h, weight, bias, dim=1):
    """weight and bias (C,) along dimension 1 of (B, C, *)."""
    shape = (-1, *(1,) * (h.dim() - 2))
    h = h if weight is None else h * weight.reshape(shape)
    return h if bias is None else h + bias.reshape(shape)


@_precise
def instance_norm(
    input: Any,
    running_mean: Any = None,
    running_var: Any = None,
    weight: Any = None,
    bias: Any = None,
    use_input_stats: bool = True,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    cudnn_enabled: Any = None,
) -> Any:
    if not use_input_stats:
        return _affine(
            (input - _column(running_mean, input)) * torch.rsqrt(_column(running_var, input) + eps),
            weight,
            bias,
        )

    dims = tuple(range(2, input.dim()))
    _enough("instance_norm", input, dims)
    if running_mean is not None:
        _update(
            running_mean,
            running_var,
            input.detach().transpose(0, 1).flatten(2),
            momentum,
            per_sample=True,
        )

    return _affine(_standardised(input, dims, eps), weight, bias)


@_precise
def batch_norm(
    input: Any,
    running_mean: Any,
    running_var: Any,
    weight: Any = None,
    bias: Any = None,
    training: bool = False,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    cudnn_enabled: Any = None,
) -> Any:
    if not training:
        return _affine(
            (input - _column(running_mean, input)) * torch.rsqrt(_column(running_var, input) + eps),
            weight,
            bias,
        )

    dims = (0, *range(2, input.dim()))
    _enough("batch_norm", input, dims)
    if running_mean is not None:
        _update(
            running_mean, running_var, input.detach().transpose(0, 1).flatten(1)[:, None], momentum
        )

    return _affine(_standardised(input, dims, eps), weight, bias)


@_precise
def layer_norm(
    input: Any,
    normalized_shape: Any,
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
    cudnn_enable: Any = None,
) -> Any:
    check_shape("layer_norm", input, normalized_shape)
    h = _standardised(input, tuple(range(-len(normalized_shape), 0)), eps)
    h = h if weight is None else h * weight
    return h if bias is None else h + bias


@_precise
def group_norm(
    input: Any,
    num_groups: int,
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
    cudnn_enabled: Any = None,
) -> Any:
    h = _standardised(input.reshape(input.shape[0], num_groups, -1), (2,), eps)
    return _affine(h.reshape(input.shape), weight, bias)


@_precise
def rms_norm(
    input: Any, normalized_shape: Any, weight: Any = None, eps: float | None = None
) -> Any:
    check_shape("rms_norm", input, normalized_shape)
    dims = tuple(range(-len(normalized_shape), 0))
    eps = torch.finfo(input.dtype).eps if eps is None else eps
    h = input * torch.rsqrt(input.square().mean(dims, keepdim=True) + eps)
    return h if weight is None else h * weight


def _column(c, x):
    return c.reshape(-1, *(1,) * (x.dim() - 2))


def _update(running_mean, running_var, x, momentum, per_sample=False):
    """Running statistics from x (C, B or 1, N), as PyTorch keeps them.

    The variance unbiased, momentum a number.
    """
    with torch.no_grad():
        mean = x.mean(-1).mean(-1)
        variance = x.var(-1).mean(-1)
        running_mean.lerp_(mean.to(running_mean.dtype), momentum)
        running_var.lerp_(variance.to(running_var.dtype), momentum)


COMPOSED: dict[Any, Any] = {
    F.instance_norm: instance_norm,
    F.batch_norm: batch_norm,
    F.layer_norm: layer_norm,
    F.group_norm: group_norm,
    F.rms_norm: rms_norm,
}


def _reordered(rule, names):
    """The rule for torch.<name>, whose arguments come in another order."""
    return lambda *args, **kwargs: rule(**dict(zip(names, args)), **kwargs)


_RUNNING = ("input", "weight", "bias", "running_mean", "running_var")
COMPOSED |= {
    torch.instance_norm: _reordered(
        instance_norm, (*_RUNNING, "use_input_stats", "momentum", "eps", "cudnn_enabled")
    ),
    torch.batch_norm: _reordered(
        batch_norm, (*_RUNNING, "training", "momentum", "eps", "cudnn_enabled")
    ),
    torch.layer_norm: layer_norm,
    torch.group_norm: group_norm,
    torch.rms_norm: rms_norm,
}
# Called by name they have no right forward mode and no composition here.
REFUSED = {
    getattr(torch, name): name
    for name in (
        "native_layer_norm", "native_batch_norm", "native_group_norm", "batch_norm_stats",
        "cudnn_batch_norm", "miopen_batch_norm", "_native_batch_norm_legit",
        "_batch_norm_with_update",
    )
    if hasattr(torch, name)
}


# By name, for not every build has all of them.
NATIVE_NORMS = {
    "native_layer_norm",
    "native_batch_norm",
    "_native_batch_norm_legit",
    "_native_batch_norm_legit_functional",
    "_batch_norm_with_update",
    "cudnn_batch_norm",
    "miopen_batch_norm",
}
# Their tangents are made from a factorisation that was saved as a constant, too, or have gradients
# that are NaN somewhere. Of eigenvectors the tangents depend on a phase, which only f as a whole
# shows to cancel.
FACTORISED = {
    "_linalg_solve_ex", "_linalg_det", "_linalg_slogdet", "linalg_householder_product",
    "cholesky_inverse", "_linalg_eigh", "linalg_eig", "_safe_softmax", "logcumsumexp", "cumprod",
    "scatter_reduce", "index_reduce",
}


class Refuse(torch.utils._python_dispatch.TorchDispatchMode):
    """Inside, operations of these names are refused.

    `RightNorms` does not see those of TorchScript and torch.ops.
    """

    met: Any

    def __init__(self, names: Any) -> None:
        super().__init__()
        self.names = names
        self.met = None

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        name = func._schema.name.removeprefix("aten::")
        # Batch norm with training=False has no statistics of x.
        harmless = any(a is False for a in args[:6])
        harmless = harmless or (name.endswith("_reduce") and "prod" not in args)
        if name in self.names and not harmless:
            self.met = name
            raise NotImplementedError(name)
        return func(*args, **(kwargs or {}))


class RightNorms(torch.overrides.TorchFunctionMode):
    """Inside, PyTorch's norms are their compositions.

    Stock forward mode is then right through any module.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func in REFUSED:
            raise NotImplementedError(
                f"fastscore.jvp: torch.{REFUSED[func]} has no right forward mode; "
                "call that of torch.nn.functional."
            )
        return COMPOSED.get(func, func)(*args, **(kwargs or {}))
