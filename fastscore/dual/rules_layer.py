"""Layers: convolutions, linear layers, pooling, activations, dropout, normalisations."""

import math
from typing import Any

import torch
import torch.nn.functional as F

from fastscore.dual import chains, norms
from fastscore.dual.functions import (
    activate_stack,
    add_bias,
    add_to_value,
    in_half,
    linear_in_half,
    normalise_stack,
)
from fastscore.dual.number import Dual, dual, is_dual, stack
from fastscore.dual.rules_math import add, mul
from fastscore.dual.rules_shape import reshape
from fastscore.dual.table import RULES, rule
from fastscore.ops.normalise import Form, normalise, pack


def _folded(function, x, *args, **kwargs):
    return dual(_fold(function, stack(x), *args, **kwargs))


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
            return dual(
                torch.cat([value, _fold(function, s[1:], dims, weight, None, *args, **kwargs)])
            )
        if low is None:
            return dual(_fold(function, s, dims, weight, None, *args, bias=bias, **kwargs))

        with torch.autocast("cpu", enabled=False):
            s, weight, bias = (None if t is None else t.to(low).float() for t in (s, weight, bias))
            return dual(_fold(function, s, dims, weight, None, *args, bias=bias, **kwargs).to(low))

    return apply


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
    rule(_name)(_convolution(getattr(F, _name)))


@rule("linear")
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
        return dual(pending.stack())
    if bias is not None and weight.dim() == 2 and in_half(s):
        return dual(linear_in_half(s, weight, bias))

    y = F.linear(s, weight)
    return dual(y if bias is None else add_bias(y, bias, 1))


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
    ("unfold", 4),
    ("fold", 3),
):
    if _name != "unfold":
        rule(_name)(_pooling(getattr(F, _name), _dims))
RULES[F.unfold] = _pooling(F.unfold, 4)   # Tensor.unfold is another function


@rule("interpolate")
def interpolate(input: Any, *args: Any, **kwargs: Any) -> Any:
    return _folded(F.interpolate, input, input.dim(), *args, **kwargs)


@rule("pad")
def pad(input: Any, pad: Any, mode: str = "constant", value: Any = None) -> Any:
    if mode != "constant":
        return _folded(F.pad, input, input.dim(), pad, mode)
    y = F.pad(stack(input), pad)
    if value:
        y = add_to_value(y, value * (1 - F.pad(torch.ones_like(stack(input)[0]), pad)))
    return dual(y)


def _activation(name, unless=None):
    step = chains.Step(name=name)

    def apply(input, *args, inplace=False, **kwargs):
        if unless is not None and unless(*args, **kwargs):
            return NotImplemented
        pending = input.pending   # which another thread may compute meanwhile
        if pending and type(input) is Dual:   # of a linear layer
            return Dual.later(chains.Pending(pending, step, pending.shape))
        return dual(activate_stack(stack(input), name))

    return apply


for _name in ("relu", "silu", "tanh", "sigmoid"):
    rule(_name)(_activation(_name))
rule("elu")(_activation("elu", unless=lambda alpha=1.0: alpha != 1))
_GELUS = {"none": _activation("gelu"), "tanh": _activation("gelu_tanh")}
rule("softplus")(
    _activation("softplus", unless=lambda beta=1, threshold=20: beta != 1 or threshold < 20)
)


@rule("gelu")
def gelu(input: Any, *, approximate: str = "none") -> Any:
    return _GELUS[approximate](input) if approximate in _GELUS else NotImplemented


def _dropout(function):
    """One mask for the value and its tangents."""

    def apply(input, p=0.5, training=True, inplace=False):
        return dual(stack(input) * function(torch.ones_like(stack(input)[0]), p, training))

    return apply


for _name in ("dropout", "dropout1d", "dropout2d", "dropout3d"):
    RULES[getattr(F, _name)] = _dropout(getattr(F, _name))


def _fused(x, groups, weight, bias, eps):
    s = stack(x)   # asked instead of x, whose every answer is a call through `__torch_function__`
    dtype = torch.float64 if s.dtype == torch.float64 else torch.float32
    gamma = (
        torch.ones(s.shape[2], dtype=dtype, device=s.device) if weight is None else weight.to(dtype)
    )
    columns = [gamma] if bias is None else [gamma, bias.to(dtype)]
    return dual(
        normalise_stack(
            s, pack(columns), None, Form(groups, False, bias is not None, eps, None), None
        )
    )


def _dual_affine(x, weight, bias):
    return not is_dual(x) or is_dual(weight) or is_dual(bias)


@rule("instance_norm")
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
        or _dual_affine(input, weight, bias)
        or stack(input).dim() < 4
    ):
        return norms.instance_norm(
            input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps
        )
    return _fused(input, 0, weight, bias, eps)


@rule("group_norm")
def group_norm(
    input: Any,
    num_groups: int,
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
    cudnn_enabled: Any = None,
) -> Any:
    if _dual_affine(input, weight, bias) or stack(input).dim() < 4:
        return norms.group_norm(input, num_groups, weight, bias, eps)
    return _fused(input, num_groups, weight, bias, eps)


@rule("layer_norm")
def layer_norm(
    input: Any,
    normalized_shape: Any,
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
    cudnn_enable: Any = None,
) -> Any:
    norms.check_shape("layer_norm", input, normalized_shape)
    if not is_dual(input):
        return norms.layer_norm(input, normalized_shape, weight, bias, eps)

    lead = input.shape[: input.dim() - len(normalized_shape)]
    h = reshape(
        _fused(reshape(input, (math.prod(lead), 1, -1)), 1, None, None, eps), tuple(input.shape)
    )
    h = h if weight is None else mul(h, weight)
    h = h if bias is None else add(h, bias)
    return h if h.dtype == input.dtype else h.to(input.dtype)


# Batch norm, rms norm, and the forms of torch.
for _function, _composition in norms.COMPOSED.items():
    RULES.setdefault(_function, _composition)
RULES[torch.instance_norm] = norms._reordered(
    instance_norm,
    (
        "input", "weight", "bias", "running_mean", "running_var", "use_input_stats", "momentum",
        "eps",
    ),
)


def _own(x, coef, labels, form, backend):
    """Our normalisations' common door."""
    return dual(normalise_stack(stack(x), coef, labels, form, backend))


RULES[normalise] = _own
