"""ScoreMLP: a residual multilayer perceptron for scores of vectors and small images."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from fastscore.messages import shown
from fastscore.models import conditions
from fastscore.ops import checks
from fastscore.ops.activations import ACTIVATIONS
from fastscore.scalars import DEPTH, SIZE, named
from fastscore.tensors import numbers

_NAMES = ("silu", "elu", "gelu", "relu", "softplus", "tanh")
_ACTIVATIONS = {name: ACTIVATIONS[name].function for name in _NAMES}
_FREQUENCIES = 16
_SMALLEST = 1e-30  # sigma; 1/σ is finite in float32


class Trunk(nn.Module):
    """What ScoreMLP and EnergyMLP share.

    The residual network of x and log σ, and the checks at its door.
    """

    dim: int
    activation: Callable[[Tensor], Tensor]
    log_range: tuple[float, float]
    sigma_range: tuple[float, float]
    context_size: int | None
    embed: nn.Linear
    context: nn.Linear
    first: nn.Linear
    blocks: nn.ModuleList
    last: nn.Linear

    def __init__(
        self,
        dim: int,
        outputs: int,
        width: int,
        depth: int,
        activation: str,
        sigmas: Tensor | Sequence[float] | None,
        context: int | None = None,
    ) -> None:
        super().__init__()
        if not named(activation, _ACTIVATIONS):
            raise ValueError(
                f"{self._name}: activation must be one of {', '.join(_ACTIVATIONS)}; got "
                f"{shown(activation)}."
            )

        dim = checks.integer(self._name, "dim", dim, 1, limit=2**31)
        width = checks.integer(self._name, "width", width, 1, limit=SIZE)
        depth = checks.integer(self._name, "depth", depth, 0, limit=DEPTH)
        self.dim = dim
        self.activation = _ACTIVATIONS[activation]
        self.log_range = None if sigmas is None else _log_range(self._name, sigmas)
        self.sigma_range = (
            None
            if sigmas is None
            else tuple(v.item() for v in numbers(self._name, "sigmas", sigmas).aminmax())
        )
        self.context_size = conditions.size(self._name, "context", context)
        features = None
        if sigmas is not None or context is not None:
            features = max(16, width // 4)
        if sigmas is not None:
            self.embed = nn.Linear(2 * _FREQUENCIES + 1, features)
        if context is not None:
            self.context = nn.Linear(context + 1, features)

        self.first = nn.Linear(dim, width)
        self.blocks = nn.ModuleList(_Block(width, features, self.activation) for _ in range(depth))
        self.last = nn.Linear(width, outputs)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    @property
    def _name(self):
        return type(self).__name__

    def check(self, x: Tensor, sigma: float | Tensor | None) -> Tensor | None:
        """sigma as (B, 1) or (1, 1) in the compute dtype, or None."""
        if x.dim() < 2 or math.prod(x.shape[1:]) != self.dim:
            raise ValueError(
                f"{self._name}: x must be (B, *) with {self.dim} values per sample; got "
                f"{tuple(x.shape)}."
            )
        if (sigma is None) != (self.log_range is None):
            case = (
                "without sigmas, but was called with sigma"
                if self.log_range is None
                else "with sigmas, but was called without sigma"
            )
            raise ValueError(
                f"{self._name}: sigma must be given if and only if the network was built with "
                f"sigmas; it was built {case}."
            )
        if sigma is None:
            return None

        sigma = checks.coefficient(self._name, "sigma", sigma, x, minimum=_SMALLEST)
        # Made on the device: a copy from the host would be waited for.
        if not isinstance(sigma, torch.Tensor):
            sigma = checks.as_tensor(sigma, x)

        return sigma.reshape(-1, 1)

    def inputs(self, x: Tensor, sigma: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """u (B, d), x to unit scale, and the embedding e of σ."""
        u = x.flatten(1)
        if sigma is None:
            return u, None
        e = self.activation(self.embed(self._fourier(sigma).to(x.dtype)))
        return (u * torch.rsqrt(sigma.square() + 0.25)).to(x.dtype), e

    def network(self, u: Tensor, e: Tensor | None) -> Tensor:
        h = self.first(u)
        for block in self.blocks:
            h = block(h, e)
        return self.last(self.activation(h))

    def _fourier(self, sigma):
        """t in [0, 1] along the ladder, and sin and cos of π k t."""
        low, high = self.log_range
        t = (sigma.log() - low) / (high - low)
        angle = t * torch.arange(1, _FREQUENCIES + 1, dtype=t.dtype, device=t.device) * math.pi
        return torch.cat([2 * t - 1, angle.sin(), angle.cos()], -1)


class ScoreMLP(Trunk):
    """A residual score network for data of about unit scale, such as images in [0, 1].

        s(x)    = f(x)
        s(x, σ) = f(x / √(σ² + 1/4), e(log σ)) / σ          with sigmas: f predicts -z

    Each block is h ← h + W₂ a((1 + c) W₁ a(h) + b), with c and b linear in e, a small network of
    Fourier features of log σ, to which a linear map of the context is added. The last layer starts
    at zero, so the untrained score is 0. Samples never mix.

    Args:
        dim: d, the number of values of a sample.
        width, depth: of the hidden layers, and how many residual blocks.
        activation: a, one of silu, elu, gelu, relu, softplus, tanh; relu has no second derivative
            (sliced score matching needs it).
        sigmas: a ladder; its range scales the embedding of log σ, and any sigma > 0 is accepted.
            None: no levels of noise.
        context: length of the context vector, such as an observation that the samples shall
            explain; None: no context.

    Shapes: forward(x[, sigma], context=..., dropped=...): x (B, *) with prod(*) = d, in the dtype
        of the parameters; sigma a float, 0-d or (B,); context (B, context), None drops all, and
        `dropped` (B,) bool that of some. Returns the score, like x.

    Raises:
        ValueError: an unknown activation, sigmas not positive, x of another dimension, sigma
            missing, superfluous or not positive, a context that does not fit.

    Source: Song & Ermon 2020, technique 3 (division by σ, arXiv:2006.09011);
        Karras et al. 2022, table 1 (input scale, arXiv:2206.00364).

    >>> ScoreMLP(64, width=8, depth=1, sigmas=[1.0, 0.01])(torch.rand(2, 1, 8, 8), 0.1).shape
    torch.Size([2, 1, 8, 8])
    """

    def __init__(
        self,
        dim: int,
        width: int = 512,
        depth: int = 4,
        activation: str = "silu",
        sigmas: Tensor | Sequence[float] | None = None,
        *,
        context: int | None = None,
    ) -> None:
        super().__init__(dim, dim, width, depth, activation, sigmas, context)

    def forward(
        self,
        x: Tensor,
        sigma: float | Tensor | None = None,
        context: Tensor | None = None,
        *,
        dropped: Tensor | None = None,
    ) -> Tensor:
        sigma = self.check(x, sigma)
        u, e = self.inputs(x, sigma)
        if self.context_size is not None or context is not None:
            found = conditions.context(self._name, self.context_size, x, context, dropped)
            c = self.activation(self.context(found))
            e = c if e is None else e + c
        s = self.network(u, e)
        return (s if sigma is None else (s / sigma).to(x.dtype)).view_as(x)


class _Block(nn.Module):
    def __init__(self, width, features, activation):
        super().__init__()
        self.activation = activation
        self.first = nn.Linear(width, width)
        self.second = nn.Linear(width, width)
        if features:
            self.modulate = nn.Linear(features, 2 * width)  # c and b

    def forward(self, h, e):
        r = self.first(self.activation(h))
        if e is not None:
            scale, shift = self.modulate(e).chunk(2, -1)
            r = (1 + scale) * r + shift
        return h + self.second(self.activation(r))


def _log_range(name, sigmas):
    sigmas = numbers(name, "sigmas", sigmas, torch.float64)
    if not sigmas.numel() or not bool((sigmas > 0).all() and sigmas.isfinite().all()):
        raise ValueError(
            f"{name}: sigmas must be positive and finite; got {shown(sigmas.tolist())}."
        )
    low = sigmas.log().min().item()
    high = sigmas.log().max().item()
    return low, max(high, low + 1)
