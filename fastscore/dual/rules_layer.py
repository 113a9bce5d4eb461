"""Layers: convolutions, linear layers, pooling, activations, dropout, normalisations."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastscore.dual import chains, norms
from fastscore.dual.functions import (
    activate_stack,
    add_bias,
    add_to_value,
    in_half,
    linear_in_half,
    normalise_stack,
)
from fastscore.dual.number import Dual, like, stack
from fastscore.dual.rules_math import add, mul
from fastscore.dual.rules_shape import reshape
from fastscore.dual.samples import alone, anyhow, at_least, by_parts, exactly
from fastscore.dual.stacks import is_dual
from fastscore.dual.table import rule
from fastscore.ops.activate import activate_jet
from fastscore.ops.activations import ACTIVATIONS
from fastscore.ops.normalise import Form, _columns, normalise, pack, rows


def _folded(function, x, *args, **kwargs):
    return like(x, _fold(function, stack(x), *args, **kwargs))


def _fold(function, s, batched_dims, *args, bias=None, **kwargs):
    if s.dim() == batched_dims:   # a value without batch dimension: the stack is the batch
        y = function(s, *args, **kwargs)
        return y if bias is None else add_bias(y, bias[0], 1)
    y = function(s.flatten(0, 1), *args, **kwargs)
    sizes = s.shape[:2]
    return torch.unflatten(y if bias is None else add_bias(y, bias, sizes[1]), 0, sizes)


def _convolution(function):
    def apply(input, weight, bias=None, *args, **kwargs):
        if is_dual(weight) or is_dual(bias):
            return NotImplemented

        s, dims = stack(input), weight.dim()
        bias = None if bias is None else bias.reshape(1, -1, *(1,) * (dims - 2))
        low = _without_instructions(s, weight)
        if (
            low is None
            and bias is not None
            and 4 * bias.numel() <= s.shape[1 - dims]
            and in_half(s)
        ):
            # By two calls, which costs little where there are few channels to write: the last layer
            # of an image's score.
            value = _fold(function, s[:1], dims, weight, bias.flatten(), *args, **kwargs)
            rest = _fold(function, s[1:], dims, weight, None, *args, **kwargs)
            return like(input, torch.cat([value, rest]))
        if low is None:
            return like(input, _fold(function, s, dims, weight, None, *args, bias=bias, **kwargs))

        with torch.autocast("cpu", enabled=False):
            s, weight, bias = (None if t is None else t.to(low).float() for t in (s, weight, bias))
            y = _fold(function, s, dims, weight, None, *args, bias=bias, **kwargs)
            return like(input, y.to(low))

    return apply


@alone
def _batched(rank, weight, *args, **kwargs):
    return rank == weight.dim()


def _without_instructions(s, weight):
    """The half precision of a convolution that this processor has no instructions for.

    None elsewhere.

    PyTorch's own loops then add up the weight's gradient in that precision, sample by sample: the
    longer the stack, the more is lost.
    """
    # The usual case.
    if s.dtype == weight.dtype == torch.float32 and not torch.is_autocast_enabled("cpu"):
        return None
    if s.device.type != "cpu" or torch.float64 in (s.dtype, weight.dtype):
        return None
    if torch.is_autocast_enabled("cpu"):
        low = torch.get_autocast_dtype("cpu")
    else:
        low = s.dtype if s.dtype == weight.dtype else None   # which PyTorch refuses
    return low if low in (torch.bfloat16, torch.float16) and not _has_instructions(low) else None


def _has_instructions(low):
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):
        return False
    ops = torch.ops.mkldnn
    return (
        ops._is_mkldnn_bf16_supported()
        if low == torch.bfloat16
        else ops._is_mkldnn_fp16_supported()
    )


for _name in (
    "conv1d",
    "conv2d",
    "conv3d",
    "conv_transpose1d",
    "conv_transpose2d",
    "conv_transpose3d",
):
    rule(_name, apart=_batched)(_convolution(getattr(F, _name)))


@rule("linear", apart=at_least(2))
def linear(input: Any, weight: Any, bias: Any = None) -> Any:
    kind = type(input)
    if kind is Dual:
        pending = chains.linear(input.pending or input.computed, weight, bias)
        if pending is not None:
            return Dual.later(pending)
    if is_dual(weight) or is_dual(bias):
        return NotImplemented

    s = stack(input)
    # Other kinds do not wait.
    if kind is not Dual and (pending := chains.linear(s, weight, bias)) is not None:
        return like(input, pending.stack())
    if bias is not None and weight.dim() == 2 and in_half(s):
        return like(input, linear_in_half(s, weight, bias))

    y = F.linear(s, weight)
    return like(input, y if bias is None else add_bias(y, bias, 1))


def _pooling(function, dims):
    return lambda input, *args, **kwargs: _folded(function, input, dims, *args, **kwargs)


for _name, _dims in (
    ("avg_pool1d", 3),
    ("avg_pool2d", 4),
    ("avg_pool3d", 5),
    ("adaptive_avg_pool1d", 3),
    ("adaptive_avg_pool2d", 4),
    ("adaptive_avg_pool3d", 5),
    ("pixel_shuffle", 4),
    ("pixel_unshuffle", 4),
    ("fold", 3),
):
    rule(_name, apart=exactly(_dims))(_pooling(getattr(F, _name), _dims))
rule(F.unfold, apart=exactly(4))(_pooling(F.unfold, 4))   # Tensor.unfold is another function


@rule("interpolate", apart=at_least(3))
def interpolate(input: Any, *args: Any, **kwargs: Any) -> Any:
    return _folded(F.interpolate, input, input.dim(), *args, **kwargs)


@rule("pad", apart=alone(lambda rank, pad, *args, **kwargs: len(pad) // 2 < rank))
def pad(input: Any, pad: Any, mode: str = "constant", value: Any = None) -> Any:
    if mode != "constant":
        return _folded(F.pad, input, input.dim(), pad, mode)
    y = F.pad(stack(input), pad)
    if value:
        y = add_to_value(y, value * (1 - F.pad(torch.ones_like(stack(input)[0]), pad)))
    return like(input, y)


def _activation(name, unless=None):
    step = chains.Step(name=name)

    def apply(input, *args, inplace=False, **kwargs):
        if unless is not None and unless(*args, **kwargs):
            return NotImplemented
        pending = input.pending   # which another thread may compute meanwhile
        if pending and type(input) is Dual:   # of a linear layer
            return Dual.later(chains.Pending(pending, step, pending.shape))
        s = stack(input)
        if input.order == 2:
            return like(input, activate_jet(s, input.directions, name))
        return like(input, activate_stack(s, name))

    return apply


for _name in ("relu", "silu", "tanh", "sigmoid"):
    rule(_name, apart=anyhow)(_activation(_name))
rule("elu", apart=anyhow)(_activation("elu", unless=lambda alpha=1.0: alpha != 1))
_GELUS = {"none": _activation("gelu"), "tanh": _activation("gelu_tanh")}
rule("softplus", apart=anyhow)(
    _activation("softplus", unless=lambda beta=1, threshold=20: beta != 1 or threshold < 20)
)


@rule("gelu", apart=anyhow)
def gelu(input: Any, *, approximate: str = "none") -> Any:
    return _GELUS[approximate](input) if approximate in _GELUS else NotImplemented


@rule("leaky_relu", apart=anyhow)
def leaky_relu(input: Any, negative_slope: float = 0.01, inplace: bool = False) -> Any:
    s = stack(input)
    return like(input, torch.where(s[:1] > 0, s, negative_slope * s))


def _dropout(function):
    """One mask for the value and its derivatives."""

    def apply(input, p=0.5, training=True, inplace=False):
        if p == 0 or (not training and 0 <= p <= 1):
            return input
        s = stack(input)
        return like(input, s * function(torch.ones_like(s[0]), p, training))

    return apply


for _function in (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d):
    rule(_function, apart=anyhow)(_dropout(_function))


def _fused(x, groups, weight, bias, eps):
    s = stack(x)   # asked instead of x, whose every answer is a call through `__torch_function__`
    dtype = torch.float64 if s.dtype == torch.float64 else torch.float32
    gamma = (
        torch.ones(s.shape[2], dtype=dtype, device=s.device) if weight is None else weight.to(dtype)
    )
    columns = [gamma] if bias is None else [gamma, bias.to(dtype)]
    form = Form(groups, False, bias is not None, eps, None)
    return like(x, normalise_stack(s, pack(columns), None, form, None))


def _composed(x, weight, bias):
    """Whether a norm is one of plain operations."""
    return not is_dual(x) or x.order == 2 or is_dual(weight) or is_dual(bias)


@rule("instance_norm", apart=by_parts)
def instance_norm(
    input: Any,
    running_mean: Any = None,
    running_var: Any = None,
    weight: Any = None,
    bias: Any = None,
    use_input_stats: bool = True,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
) -> Any:
    if (
        running_mean is not None
        or not use_input_stats
        or _composed(input, weight, bias)
        or stack(input).dim() < 4
    ):
        return norms.instance_norm(
            input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps
        )
    return _fused(input, 0, weight, bias, eps)


@rule("group_norm", apart=by_parts)
def group_norm(
    input: Any,
    num_groups: int,
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
    cudnn_enabled: Any = None,
) -> Any:
    if _composed(input, weight, bias) or stack(input).dim() < 4:
        return norms.group_norm(input, num_groups, weight, bias, eps)
    return _fused(input, num_groups, weight, bias, eps)


@rule("layer_norm", apart=by_parts)
def layer_norm(
    input: Any,
    normalized_shape: Any,
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
    cudnn_enable: Any = None,
) -> Any:
    norms.check_shape("layer_norm", input, normalized_shape)
    if not is_dual(input) or input.order == 2:
        return norms.layer_norm(input, normalized_shape, weight, bias, eps)

    lead = input.shape[: input.dim() - len(normalized_shape)]
    h = reshape(
        _fused(reshape(input, (math.prod(lead), 1, -1)), 1, None, None, eps), tuple(input.shape)
    )
    h = h if weight is None else mul(h, weight)
    h = h if bias is None else add(h, bias)
    return h if h.dtype == input.dtype else h.to(input.dtype)


rule(torch.instance_norm, apart=by_parts)(
    norms._reordered(
        instance_norm,
        (
            "input", "weight", "bias", "running_mean", "running_var", "use_input_stats",
            "momentum", "eps",
        ),
    )
)
rule(F.rms_norm, torch.rms_norm, apart=by_parts)(norms.rms_norm)


def _of_running_statistics(*args, training=False, **kwargs):
    """Those of the batch mix samples."""
    return not (args[5] if len(args) > 5 else training)


for _function in (F.batch_norm, torch.batch_norm):
    rule(_function, apart=_of_running_statistics)(norms.COMPOSED[_function])


@rule(normalise, apart=by_parts)
def own_norm(x: Any, coef: Tensor, labels: Tensor | None, form: Form, backend: str | None) -> Any:
    """Our normalisations' common door."""
    s = stack(x)
    if x.order == 2:
        return _own_norm_by_parts(x, coef, labels, form)
    return like(x, normalise_stack(s, coef, labels, form, backend))


def _own_norm_by_parts(x, coef, labels, form):
    B, C = x.shape[:2]
    u = x.to(coef.dtype).reshape(B, form.groups or C, -1)
    columns = _columns(rows(coef, labels), C, form)
    gamma, alpha, beta = (None if c is None else c[..., None] for c in columns)
    h = norms._standardised(u, (2,), form.eps).reshape(B, C, -1)
    if alpha is not None:
        mean = u.mean(2, keepdim=True)
        deviation = mean - mean.mean(1, keepdim=True)
        variance = deviation.square().sum(1, keepdim=True) / max(C - 1, 1)
        h = h + alpha * (deviation * torch.rsqrt(variance + form.eps))

    y = gamma * h if beta is None else gamma * h + beta
    return ACTIVATIONS[form.activation].function(y).to(x.dtype).reshape(tuple(x.shape))
