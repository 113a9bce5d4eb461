"""Where samplers start: a law from the ladder or from data, and what the first score says of a
start."""

import contextlib
import math
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastscore import random
from fastscore.ops import checks
from fastscore.sampling.run import WATCH, number
from fastscore.scalars import SQUARE, choice, integer, offset

FALSE_ALARM = 1e-6
LAWS = ("uniform", "gaussian")

# √(1/3 + σ² - σ/√π) = 1, see `start_law`.
LONG = (math.sqrt(1 / math.pi) + math.sqrt(1 / math.pi + 8 / 3)) / 2


def start_law(sigma: float | None) -> str:
    """The law of a start x (B, *) of which only σ_1 is known: "gaussian", N(0, σ_1² I), where
    σ_1 > 1.146, else "uniform" in [0, 1].

    It is the law whose largest distance from that of x₀ + σ_1 z, over all data x₀ in [0, 1], is the
    smaller one. Distances are W₂ per element, which a Langevin step multiplies by 1 - ε/(2σ_1²)
    where x₀ is a point: what is nearer at the start is nearer after every step. W₂² is convex in
    the law of x₀, so the worst x₀ are all 0 or all 1:

        gaussian: 1,    uniform: √(1/3 + σ_1² - σ_1/√π),
        equal at σ_1 = (√(1/π) + √(1/π + 8/3))/2 = 1.146

    At NCSN's σ_1 = 1 the start is NCSN's. At NCSNv2's σ_1 = 50 a uniform start lacks all of the
    variance σ_1², which a run of many levels makes up for. Without a σ_1 (None) the start is
    uniform. For data elsewhere draw x by `start_like`, or choose the law.

    Source: Song & Ermon 2019 (uniform), Song et al. 2021 (gaussian); the bound is ours.
    """
    return (
        "gaussian"
        if sigma is not None and number("start_law", "sigma", sigma) > LONG
        else "uniform"
    )


def initial(
    shape: tuple[int, ...],
    *,
    law: str | None = None,
    sigma: float | None = None,
    seed: int | torch.Tensor | None = None,
    first_sample: int = 0,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> torch.Tensor:
    """The initial draw of a sampler, stream INIT: sample n is the same in every batch that holds
    it.

    Args:
        shape: (B, *). law: "uniform" in [0, 1], or "gaussian", N(0, σ² I), with sigma σ; unless
            given, `start_law` of sigma.

    Raises:
        ValueError: the law is unknown, gaussian without a sigma, or such that dtype cannot hold it.
    """
    return draw_start("initial", "law", shape, law, sigma, seed, first_sample, dtype, device)


def draw_start(
    op: str,
    name: str,
    shape: Any,
    law: Any,
    sigma: Any,
    seed: int | Tensor | None,
    first_sample: Any,
    dtype: torch.dtype | None,
    device: torch.device,
) -> Any:
    """`initial` for the op that draws it, and calls the law by its name."""
    sigma = None if sigma is None else number(op, "sigma", sigma)
    law = start_law(sigma) if law is None else law
    choice(op, name, law, LAWS)
    shape = random.sizes(op, shape)
    if not shape:
        raise ValueError(f"{op}: shape must be (B, *); got ().")
    begin = offset(op, first_sample, math.prod(shape[1:]))
    key = {"seed": seed, "stream": random.INIT, "offset": begin, "device": device}
    if law == "uniform":
        return random.draw(op, random.UNIFORM, shape, dtype=dtype, **key)
    if sigma is None:
        raise ValueError(f"{op}: {name} gaussian needs a sigma.")
    dtype = random.check_dtype(op, dtype)
    if sigma * random.LARGEST > torch.finfo(dtype).max:
        raise ValueError(
            f"{op}: sigma must leave what is drawn from N(0, σ² I) finite in {dtype}; got "
            f"{sigma:g}."
        )
    return (
        sigma * random.draw(op, random.NORMAL, shape, dtype=checks.compute_dtype(dtype), **key)
    ).to(dtype)


def start_like(
    data: torch.Tensor,
    n: int,
    *,
    sigma: float,
    seed: int | torch.Tensor | None = None,
    first_sample: int = 0,
) -> torch.Tensor:
    """Draw n starts for a ladder that begins at σ_1 from N(m, v + σ_1²), with the mean m and the
    variance v of each element of data.

    These are the mean and the variance of the data with that noise. Stream INIT: sample n is the
    same in every batch that holds it.

    Args:
        data: (N, *), any float dtype; that of the result, on the same device. sigma: σ_1. seed,
            first_sample: as in `sample`.

    >>> start_like(torch.full((5, 2), 100.0), 3, sigma=0.0, seed=0)[0]
    tensor([100., 100.])
    """
    op = "start_like"
    checks.check_float(op, "data", data)
    if data.dim() == 0 or not len(data):
        raise ValueError(f"{op}: data must hold samples, (N, *); got shape {tuple(data.shape)}.")
    n, sigma = integer(op, "n", n, 0, limit=2**40), number(op, "sigma", sigma, SQUARE)
    begin = offset(op, first_sample, data[0].numel())
    values = data.detach().to(checks.compute_dtype(data.dtype))
    variance, mean = torch.var_mean(values, 0, correction=0)
    key = {
        "seed": seed,
        "stream": random.INIT,
        "offset": begin,
        "dtype": values.dtype,
        "device": data.device,
    }
    z = random.draw(op, random.NORMAL, (n, *mean.shape), **key)
    return (mean + (variance + sigma**2).sqrt() * z).to(data.dtype)


class First:
    """q = σ² ‖s‖²/d of the first score, on average over the batch; kept on the device until
    somebody reads it."""

    q: Any
    seen: bool
    sigma: Tensor
    elements: int

    def __init__(self) -> None:
        self.q, self.seen = None, False

    def see(self, s: torch.Tensor, sigma: torch.Tensor | None = None) -> None:
        if not self.seen and sigma is not None and s.numel():
            self.seen, self.sigma, self.elements = True, sigma, s.numel()
            self.q = (checks.expand(sigma, s) * s.detach().to(sigma.dtype)).square().mean()

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """The sampler that begins here shows its first score."""
        token = WATCH.set(self)
        try:
            yield
        finally:
            WATCH.reset(token)

    def judge(self, finite: torch.Tensor) -> bool:
        """Whether the state is finite, read together with q, which is warned about where it is
        beyond `limit`."""
        q, self.q = self.q, None
        if q is None:
            return bool(finite)
        q = float(torch.where(finite, q, -1.0))
        if q > limit(self.elements):
            warnings.warn(
                "sample: the first score says that the start lies far outside the data with noise "
                f"σ = {float(self.sigma[0]):g}: σ² ‖s‖²/d "
                f"is {q:.3g}, for starts of the right law at most 1 on average. Give "
                "x=sampling.start_like(data, n, sigma=..., seed=...), "
                "or begin with a larger sigma.",
                stacklevel=5,
            )
        return q != -1.0


def limit(n: int) -> float:
    """max(4, c), (c e^(1-c))^(n/2) = 1e-6, for n elements.

    The score at σ of any data is E[-z | x]/σ, so by Jensen's inequality σ ‖s‖ has no heavier
    exponential moments than ‖z‖, and Chernoff's
    bound for χ² with n degrees of freedom holds: independent starts of the right law exceed c with
    a probability below 1e-6.
    """
    excess, c = 2 * math.log(1 / FALSE_ALARM) / n, 4.0
    for _ in range(100):  # c - 1 - log c = excess: a contraction wherever c > 1
        c = 1 + excess + math.log(c)
    return max(4.0, c)
