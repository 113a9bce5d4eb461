"""The denoising-score-matching loss per sample, with the noise regenerated in both passes."""

import torch
from torch import Tensor
from torch.compiler import is_compiling

from fastscore import backend as _backend
from fastscore import direct, random
from fastscore.compiling import allow_in_graph
from fastscore.ops import checks
from fastscore.ops.functions import plain, quick
from fastscore.ops.noisy_update_functions import LOSS, noise_dot, reduce, refuse_mapped_key, update


def denoising_loss(
    score: Tensor,
    sigma: float | Tensor,
    *,
    noise: Tensor | None = None,
    seed: int | Tensor | None = None,
    step: int | Tensor = 0,
    offset: int = 0,
    backend: str | None = None,
) -> Tensor:
    """Compare a score at x̃ = perturb(x, σ) with the noise that made x̃; z is regenerated from the
    key, never stored.

        L_b = ½ ‖σ_b s_b + z_b‖²     (= σ² times the denoising loss ½ ‖s + z/σ‖²)

    Args:
        score: s at x̃, (B, *), any float dtype and strides.
        sigma: σ >= 0, a float, 0-d or (B,).
        noise: z, same shape and dtype as score. If given, the call is deterministic and takes no
            seed.
        seed, step, offset: the key that was given to `perturb` (stream PERTURB). Needed: nothing
            else knows that noise.

    Returns:
        (B,), float32 (float64 for float64). Differentiable in score and σ.

    Raises:
        ValueError: neither noise nor seed, or both; shapes or devices differ; σ negative or not
            finite. TypeError: dtypes.

    Source: Vincent 2011; Song & Ermon 2019, equation 5 (arXiv:1907.05600).

    >>> denoising_loss(torch.ones(1, 2), 1.0, noise=torch.ones(1, 2))
    tensor([4.])
    """
    if backend is None and not is_compiling() and (door := direct.automatic) is not None:
        loss = door.noise_reduce(LOSS, score, sigma, seed, step, random.PERTURB, offset, noise)
        if loss is not None:
            return loss

    op = "denoising_loss"
    checks.check_float(op, "score", score)
    if score.dim() == 0:
        raise ValueError(f"{op}: score must be (B, *); got a 0-d tensor.")
    sigma = checks.in_graph(checks.coefficient(op, "sigma", sigma, score, minimum=0), score)
    if (noise is None) == (seed is None):
        raise ValueError(
            f"{op}: give either the noise or the seed that perturb used; got "
            f"{'neither' if noise is None else 'both'}."
        )
    chosen = _backend.choose(score.device, backend)
    if noise is not None:
        checks.check_like(op, "noise", noise, score, of="score")
        return denoising_loss_ref(score, sigma, noise)
    key, *numbers = random.noise_key(op, seed, step, random.PERTURB, 0, offset, score.device)
    return regenerated_loss(score, sigma, key, tuple(numbers), chosen)


def regenerated_loss(
    score: Tensor,
    sigma: float | Tensor,
    key: Tensor | None,
    numbers: tuple[int, int, int, int],
    backend: str,
) -> Tensor:
    """The loss under a checked key, σ in the compute dtype."""
    if _backend.derivative_possible(score, sigma if isinstance(sigma, torch.Tensor) else None):
        return _loss_function(score, sigma, key, *numbers, backend)
    return reduce(score, sigma, key, numbers, backend, LOSS)


def denoising_loss_ref(s: Tensor, sigma: float | Tensor, z: Tensor) -> Tensor:
    """The equation, in the compute dtype."""
    dtype = checks.compute_dtype(s.dtype)
    return checks.per_sample_sum(
        0.5 * (checks.expand(sigma, s) * s.to(dtype) + z.to(dtype)).square()
    )


@quick
class _DenoisingLoss(torch.autograd.Function):
    """L = ½ σ² Σs² + σ D(s) + ½ Σz² with D(s) = Σ s z; ∂L/∂s = σ (σ s + z) is the noisy update
    again.

    Tangent: L̇ = σ² Σ s ṡ + σ D(ṡ) + σ̇ (σ Σs² + D(s)).
    """

    @staticmethod
    def forward(s, sigma, key, numbers, backend):
        return reduce(s, sigma, key, numbers, backend, LOSS)

    @staticmethod
    def setup_context(ctx, inputs, output):
        s, sigma, key, ctx.numbers, ctx.backend = inputs
        ctx.fixed, ctx.has_key = None if isinstance(sigma, torch.Tensor) else sigma, key is not None
        tensors = [t for t in (s, sigma, key) if isinstance(t, torch.Tensor)]
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def _saved(ctx):
        tensors = list(ctx.saved_tensors)
        s = tensors.pop(0)
        sigma = tensors.pop(0) if ctx.fixed is None else ctx.fixed
        return s, sigma, tensors.pop(0) if ctx.has_key else None

    @staticmethod
    def backward(ctx, g):
        s, sigma, key = _DenoisingLoss._saved(ctx)
        gs = (
            update(None, s, g * sigma**2, g * sigma, key, ctx.numbers, ctx.backend)
            if ctx.needs_input_grad[0]
            else None
        )
        gsigma = None
        if ctx.needs_input_grad[1]:
            gsigma = checks.sum_to(g * _slope(s, sigma, key, ctx), sigma)
        return gs, gsigma, None, None, None

    @staticmethod
    def jvp(ctx, ts, tsigma, *_):
        # One plain() for all sums and products: in a jvp rule ordinary operations lose the tangents
        # of the levels around it.
        s, sigma, key = _DenoisingLoss._saved(ctx)
        ts = torch.zeros_like(s) if ts is None else ts
        along = noise_dot(ts, key, ctx.numbers, ctx.backend)
        if tsigma is None:
            if isinstance(sigma, torch.Tensor):
                return plain(_tangent, s, ts, along, sigma)
            return plain(lambda s, ts, along: _tangent(s, ts, along, sigma), s, ts, along)
        return plain(
            _tangent, s, ts, along, sigma, tsigma, noise_dot(s, key, ctx.numbers, ctx.backend)
        )

    @staticmethod
    def vmap(info, in_dims, s, sigma, key, numbers, backend):
        refuse_mapped_key(in_dims[2])
        s = checks.batch_first(s, in_dims[0], info.batch_size)
        dtype = checks.compute_dtype(s.dtype)
        z = random.normal_like(s[0], (key, *numbers), backend, dtype)
        if isinstance(sigma, torch.Tensor):
            sigma = checks.batch_first(sigma, in_dims[1], info.batch_size)
            sigma = sigma.reshape(sigma.shape + (1,) * (s.dim() - sigma.dim()))
        return (0.5 * (sigma * s.to(dtype) + z).square()).reshape(*s.shape[:2], -1).sum(-1), 0


def _inner(a, b):
    dtype = checks.compute_dtype(a.dtype)
    return checks.per_sample_sum(a.to(dtype) * b.to(dtype))


def _tangent(s, ts, along, sigma, tsigma=None, dot=None):
    """σ² Σ s ṡ + σ D(ṡ) + σ̇ (σ Σs² + D(s)), given D(ṡ) and D(s)."""
    t = sigma**2 * _inner(s, ts) + sigma * along
    return t if tsigma is None else t + tsigma * (sigma * _inner(s, s) + dot)


def _slope(s, sigma, key, ctx):
    """∂L/∂σ = σ Σs² + D(s)."""
    return sigma * _inner(s, s) + noise_dot(s, key, ctx.numbers, ctx.backend)


@allow_in_graph
def _loss_function(s, sigma, key, seed, step, stream, offset, backend):
    return _DenoisingLoss.apply(s, sigma, key, (seed, step, stream, offset), backend)
