"""Where samplers start: a law from data, and what the first score says of a start."""

import contextlib
import math
import warnings
from collections.abc import Iterator

import torch

from fastscore import random
from fastscore.ops import checks
from fastscore.sampling.state import WATCH, number
from fastscore.scalars import integer

FALSE_ALARM = 1e-6


def start_like(data: torch.Tensor, n: int, *, sigma: float, seed: int | torch.Tensor, first_sample: int = 0) -> torch.Tensor:
    """Draw n starts for a ladder that begins at σ_1 from N(m, v + σ_1²), with the mean m and the variance v of each element of data.

    These are the mean and the variance of the data with that noise. Stream INIT: sample n is the same in every batch that holds it.

    Args:
        data: (N, *), any float dtype; that of the result, on the same device. sigma: σ_1. seed, first_sample: as in `sample`.

    >>> start_like(torch.full((5, 2), 100.0), 3, sigma=0.0, seed=0)[0]
    tensor([100., 100.])
    """
    op = "start_like"
    checks.check_float(op, "data", data)
    if data.dim() == 0 or not len(data):
        raise ValueError(f"{op}: data must hold samples, (N, *); got shape {tuple(data.shape)}.")
    n, first_sample = integer(op, "n", n, 0), integer(op, "first_sample", first_sample, 0)
    values = data.detach().to(checks.compute_dtype(data.dtype))
    variance, mean = torch.var_mean(values, 0, correction=0)
    offset = first_sample * mean.numel()
    z = random.normal((n, *mean.shape), seed=seed, stream=random.INIT, offset=offset, dtype=values.dtype, device=data.device)
    return (mean + (variance + number(op, "sigma", sigma) ** 2).sqrt() * z).to(data.dtype)


class First:
    """q = σ² ‖s‖²/d of the first score, on average over the batch; kept on the device until somebody reads it."""

    def __init__(self) -> None:
        self.q, self.seen = None, False

    def see(self, s: torch.Tensor, sigma: torch.Tensor | None) -> None:
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
        """Whether the state is finite, read together with q, which is warned about where it is beyond `limit`."""
        q, self.q = self.q, None
        if q is None:
            return bool(finite)
        q = float(torch.where(finite, q, -1.0))
        if q > limit(self.elements):
            warnings.warn(
                f"sample: the first score says that the start lies far outside the data with noise σ = {float(self.sigma[0]):g}: σ² ‖s‖²/d "
                f"is {q:.3g}, for starts of the right law at most 1 on average. Give x=sampling.start_like(data, n, sigma=..., seed=...), "
                "or begin with a larger sigma.",
                stacklevel=5,
            )
        return q != -1.0


def limit(n: int) -> float:
    """max(4, c), (c e^(1-c))^(n/2) = 1e-6, for n elements.

    The score at σ of any data is E[-z | x]/σ, so by Jensen's inequality σ ‖s‖ has no heavier exponential moments than ‖z‖, and Chernoff's
    bound for χ² with n degrees of freedom holds: independent starts of the right law exceed c with a probability below 1e-6.
    """
    excess, c = 2 * math.log(1 / FALSE_ALARM) / n, 4.0
    for _ in range(100):   # c - 1 - log c = excess: a contraction wherever c > 1
        c = 1 + excess + math.log(c)
    return max(4.0, c)
