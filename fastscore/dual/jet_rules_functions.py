"""What functions of one element, and normalisations, do to jets."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastscore.dual import norms
from fastscore.dual.jet_rules import RULES, is_jet, jet_rule, joined, kept
from fastscore.dual.slopes import SLOPES, function_of
from fastscore.ops import normalise as core
from fastscore.ops.activate import activate_jet
from fastscore.ops.activations import ACTIVATIONS

# ---- functions of one element


def elementwise(x: Any, function: Callable[..., Any], slope: Any, curvature: Any) -> Any:
    """f' from slope(u, f(u)), f'' from curvature(u, f(u), f'), or 0."""
    u, first, second = x.parts()
    y = function(u)
    d = slope(u, y)
    bend = torch.zeros_like(first) if curvature is None else curvature(u, y, d) * first.square()
    return joined(x, y, d * first, bend if second is None else bend + d * second)


def _elementwise(name):
    function = function_of(name)
    jet_rule(name)(lambda input: elementwise(input, function, *SLOPES[name]))


for _name in SLOPES:
    _elementwise(_name)
RULES[torch.Tensor.__abs__] = RULES[torch.abs]


@jet_rule("pow", "__pow__")
def power(x: Any, exponent: Any) -> Any:
    n = exponent
    if not is_jet(x) or not isinstance(n, int | float):
        return NotImplemented
    if n == 2:
        return x.square()
    # A factor of zero wins over x to a negative power at x = 0, as in PyTorch.
    first = (lambda u: n * u ** (n - 1)) if n else torch.zeros_like
    second = (lambda u: n * (n - 1) * u ** (n - 2)) if n not in (0, 1) else torch.zeros_like
    return elementwise(x, lambda u: u**n, lambda u, y: first(u), lambda u, y, d: second(u))


def _activation(name, same=lambda: True):
    def apply(input, *options, inplace=False, **named):
        return (
            kept(input, activate_jet(input.stack, input.directions, name))
            if same(*options, **named)
            else NotImplemented
        )

    return apply


for _name in ("relu", "silu", "tanh", "sigmoid"):
    jet_rule(_name)(_activation(_name))
jet_rule("elu")(_activation("elu", lambda alpha=1.0: alpha == 1))
jet_rule("softplus")(
    _activation("softplus", lambda beta=1, threshold=20: beta == 1 and threshold >= 20)
)
_GELUS = {"none": _activation("gelu"), "tanh": _activation("gelu_tanh")}


@jet_rule("gelu")
def gelu(input: Any, *, approximate: str = "none") -> Any:
    return _GELUS[approximate](input) if approximate in _GELUS else NotImplemented


@jet_rule("leaky_relu")
def leaky_relu(input: Any, negative_slope: float = 0.01, inplace: bool = False) -> Any:
    u = input.stack[:1]
    return kept(input, torch.where(u > 0, input.stack, negative_slope * input.stack))


@jet_rule("logsumexp")
def logsumexp(input: Any, dim: Any, keepdim: bool = False) -> Any:
    top = input.detach().amax(dim, keepdim=True)
    top = torch.where(top.isfinite(), top, 0)
    y = (input - top).exp().sum(dim, keepdim=True).log() + top
    return y if keepdim else y.squeeze(dim)


@jet_rule("log_softmax")
def log_softmax(
    input: Any, dim: Any = None, _stacklevel: int = 3, dtype: torch.dtype | None = None
) -> Any:
    if dim is None or dtype is not None:
        return NotImplemented
    return input - input.logsumexp(dim, keepdim=True)


@jet_rule("softmax")
def softmax(
    input: Any, dim: Any = None, _stacklevel: int = 3, dtype: torch.dtype | None = None
) -> Any:
    y = log_softmax(input, dim, dtype=dtype)
    return y if y is NotImplemented else y.exp()


# ---- normalisations, as compositions


def _norm(function):
    """Statistics in float32 or wider."""

    def apply(input, *args, **kwargs):
        if any(map(is_jet, (*args, *kwargs.values()))):
            return NotImplemented
        low = input.dtype in (torch.bfloat16, torch.float16)
        y = function(input.float() if low else input, *args, **kwargs)
        return y.to(input.dtype) if low else y

    return apply


for _function, _composition in norms.COMPOSED.items():
    RULES[_function] = _norm(_composition)


def _evaluated(function, place):
    """A batch norm that does not mix samples."""
    norm = _norm(norms.COMPOSED[function])

    def apply(*args, training=None, **kwargs):
        mixes = training if training is not None else len(args) > place and args[place]
        return NotImplemented if mixes else norm(*args, **kwargs)

    return apply


RULES[F.batch_norm], RULES[torch.batch_norm] = (
    _evaluated(F.batch_norm, 5),
    _evaluated(torch.batch_norm, 5),
)


def normalise(x: Any, coef: Tensor, labels: Tensor | None, form: Any, backend: str) -> Any:
    """ops.normalise on a jet."""
    B, C = x.shape[:2]
    u = x.to(coef.dtype).reshape(B, form.groups or C, -1)
    gamma, alpha, beta = (
        None if c is None else c[..., None] for c in core._columns(core.rows(coef, labels), C, form)
    )
    h = norms._standardised(u, (2,), form.eps).reshape(B, C, -1)
    if alpha is not None:
        mean = u.mean(2, keepdim=True)
        deviation = mean - mean.mean(1, keepdim=True)
        h = h + alpha * (
            deviation
            * torch.rsqrt(deviation.square().sum(1, keepdim=True) / max(C - 1, 1) + form.eps)
        )

    y = gamma * h if beta is None else gamma * h + beta
    return ACTIVATIONS[form.activation].function(y).to(x.dtype).reshape(tuple(x.shape))


RULES[core.normalise] = normalise
