"""x + a d + b z: the calls of the kernels, and derivatives of every order and in every mode."""

import torch
from torch import Tensor
from torch.compiler import is_compiling

from fastscore import backend as _backend
from fastscore import direct, random
from fastscore.compiling import allow_in_graph
from fastscore.ops import checks
from fastscore.ops.functions import contiguous, plain, quick

# Modes of the raw op noise_reduce.
LOSS, DOT = 0, 1


def in_plain_torch(
    x: Tensor | None, d: Tensor | None, a: float | Tensor, b: float | Tensor, z: Tensor
) -> Tensor:
    """The update in the compute dtype, rounded once; x and d may be None."""
    like = d if x is None else x
    dtype = checks.compute_dtype(like.dtype)
    z, d, wide = (t if t is None or t.dtype == dtype else t.to(dtype) for t in (z, d, x))
    y = checks.expand(b, like) * z
    if d is not None:
        y = checks.expand(a, like) * d + y
    if wide is not None:
        y = wide + y
    return y if y.dtype == like.dtype else y.to(like.dtype)


def run(
    x: Tensor | None,
    d: Tensor | None,
    a: float | Tensor,
    b: float | Tensor,
    key: Tensor | None,
    numbers: tuple[int, int, int, int],
    backend: str,
    out: Tensor | None = None,
) -> Tensor:
    """The op itself, with no derivative; into `out`, which autograd is told of."""
    door = direct.door if backend == "cpp" else direct.served.get(backend)
    if door is not None and key is None and not is_compiling():
        y = door.noisy_update(direct.TERMS, x, d, a, b, *numbers, out)
        if y is not None:
            return y

    like = x if x is not None else d
    y = torch.empty_like(like) if out is None else out
    if backend == "reference":
        z = random.normal_like(like, (key, *numbers), backend, checks.compute_dtype(like.dtype))
        return y.copy_(in_plain_torch(x, d, a, b, z))
    _backend.call(backend, "noisy_update", y, x, d, *_split(a), *_split(b), key, *numbers)
    if out is not None:
        torch.autograd.graph.increment_version(out)
    return y


def reduce(
    s: Tensor,
    sigma: float | Tensor,
    key: Tensor | None,
    numbers: tuple[int, int, int, int],
    backend: str,
    mode: int,
) -> Tensor:
    """½ Σ (σ s + z)² or Σ s z per sample, with no derivative: (B,) in the compute dtype."""
    door = direct.door if backend == "cpp" else direct.served.get(backend)
    if door is not None and key is None and not is_compiling():
        sums = door.noise_reduce(mode, s, sigma, *numbers)
        if sums is not None:
            return sums

    dtype = checks.compute_dtype(s.dtype)
    if backend == "reference":
        z = random.normal_like(s, (key, *numbers), backend, dtype)
        s = s.to(dtype)
        return checks.per_sample_sum(
            s * z if mode == DOT else 0.5 * (checks.expand(sigma, s) * s + z).square()
        )
    out = torch.empty(s.shape[0], dtype=dtype, device=s.device)
    _backend.call(backend, "noise_reduce", out, s, *_split(sigma), key, *numbers, mode)
    return out


def _split(c):
    """A coefficient as the raw ops take it: (tensor or None, number)."""
    return (contiguous(c), 0.0) if isinstance(c, torch.Tensor) else (None, c)


def update(
    x: Tensor | None,
    d: Tensor | None,
    a: float | Tensor,
    b: float | Tensor,
    key: Tensor | None,
    numbers: tuple[int, int, int, int],
    backend: str,
) -> Tensor:
    """x + a d + b z, differentiable where anything asks for it."""
    if _backend.derivative_possible(x, d, *(c for c in (a, b) if isinstance(c, torch.Tensor))):
        return _update_function(x, d, a, b, key, *numbers, backend)
    return run(x, d, a, b, key, numbers, backend)


@allow_in_graph
def _update_function(x, d, a, b, key, seed, step, stream, offset, backend):
    return _NoisyUpdate.apply(x, d, a, b, key, (seed, step, stream, offset), backend)


def noise_dot(
    s: Tensor,
    key: Tensor | None,
    numbers: tuple[int, int, int, int],
    backend: str,
) -> Tensor:
    """Σ s z per sample, differentiable."""
    return _NoiseDot.apply(s, key, numbers, backend)


@quick
class _NoisyUpdate(torch.autograd.Function):
    """y = x + a d + b z. Its derivatives are sums, products, itself and _NoiseDot, so every order
    and nesting is right.

    Tangent: ẏ = (ẋ + a ḋ) + ȧ d + ḃ z, which is the op again.
    """

    @staticmethod
    def forward(x, d, a, b, key, numbers, backend):
        return run(x, d, a, b, key, numbers, backend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, d, a, b, key, ctx.numbers, ctx.backend = inputs
        ctx.fixed = [None if isinstance(t, torch.Tensor) else t for t in (d, a, b, key)]
        ctx.present = [isinstance(t, torch.Tensor) for t in (d, a, b, key)]
        tensors = [t for t in (d, a, b, key) if isinstance(t, torch.Tensor)]
        ctx.like = (output.shape, output.dtype)
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx, g):
        d, a, b, key = _restore(ctx)
        needs = ctx.needs_input_grad
        gd = _scaled(g, a) if needs[1] else None
        ga = gb = None
        if needs[2]:
            dtype = checks.compute_dtype(g.dtype)
            ga = checks.sum_to(checks.per_sample_sum(g.to(dtype) * d.to(dtype)), a)
        if needs[3]:
            gb = checks.sum_to(noise_dot(g, key, ctx.numbers, ctx.backend), b)
        return (g if needs[0] else None), gd, ga, gb, None, None, None

    @staticmethod
    def jvp(ctx, tx, td, ta, tb, *_):
        # Sums and products through plain(): in a jvp rule ordinary operations lose the tangents of
        # the levels around it.
        d, a, b, key = _restore(ctx)
        shape, dtype = ctx.like
        t = tx
        if td is not None:
            ad = (
                plain(_scaled, td, a)
                if isinstance(a, torch.Tensor)
                else plain(lambda td: _scaled(td, a), td)
            )
            t = ad if t is None else plain(torch.add, t, ad)
        if ta is None and tb is None:
            # a view of an input tangent may not be returned
            return plain(torch.clone, t) if t is tx else t
        ta, tb = (0.0 if c is None else c for c in (ta, tb))
        if t is None:
            like = next(c for c in (d, ta, tb) if isinstance(c, torch.Tensor))
            t = torch.zeros(shape, dtype=dtype, device=like.device)
        return update(t, d, ta, tb, key, ctx.numbers, ctx.backend)

    @staticmethod
    def vmap(info, in_dims, x, d, a, b, key, numbers, backend):
        return _mapped(info, in_dims, (x, d, a, b, key), numbers, backend), 0


@quick
class _NoiseDot(torch.autograd.Function):
    """D(s) = Σ s z per sample, (B,). Linear in s: Dᵀ(g) = g z."""

    @staticmethod
    def forward(s, key, numbers, backend):
        return reduce(s, 0.0, key, numbers, backend, DOT)

    @staticmethod
    def setup_context(ctx, inputs, output):
        s, key, ctx.numbers, ctx.backend = inputs
        tensors = [t for t in (s, key) if isinstance(t, torch.Tensor)]
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx, g):
        s, *key = ctx.saved_tensors
        return (
            update(None, s, 0.0, g, key[0] if key else None, ctx.numbers, ctx.backend),
            None,
            None,
            None,
        )

    @staticmethod
    def jvp(ctx, ts, *_):
        _, *key = ctx.saved_tensors
        return noise_dot(ts, key[0] if key else None, ctx.numbers, ctx.backend)

    @staticmethod
    def vmap(info, in_dims, s, key, numbers, backend):
        refuse_mapped_key(in_dims[1])
        s = checks.batch_first(s, in_dims[0], info.batch_size)
        dtype = checks.compute_dtype(s.dtype)
        z = random.normal_like(s[0], (key, *numbers), backend, dtype)
        return (s.to(dtype) * z).reshape(*s.shape[:2], -1).sum(-1), 0


def _scaled(d, a):
    """a d in the compute dtype, rounded once."""
    return in_plain_torch(None, d, a, 0.0, torch.zeros((), device=d.device))


def _restore(ctx):
    """Direction, drift, diffusion and key as they were given, tensor or not."""
    tensors = iter(ctx.saved_tensors)
    return [next(tensors) if present else fixed for fixed, present in zip(ctx.fixed, ctx.present)]


def refuse_mapped_key(dim: int | None) -> None:
    if dim is not None:
        raise NotImplementedError(
            "fastscore: vmap over seed or step is not supported; the noise of all mapped calls is "
            "the same."
        )


def _mapped(info, in_dims, args, numbers, backend):
    """vmap: every mapped call sees the same noise, as separate calls with this key would."""
    x, d, a, b, key = args
    refuse_mapped_key(in_dims[4])
    x, d = (
        t if t is None else checks.batch_first(t, dim, info.batch_size)
        for t, dim in zip((x, d), in_dims)
    )
    like = x if x is not None else d
    z = random.normal_like(like[0], (key, *numbers), backend, checks.compute_dtype(like.dtype))

    def lift(c, dim):
        if not isinstance(c, torch.Tensor):
            return c
        c = checks.batch_first(c, dim, info.batch_size)  # (N,) or (N, B)
        return c.reshape(c.shape + (1,) * (like.dim() - c.dim()))

    return in_plain_torch(x, d, lift(a, in_dims[2]), lift(b, in_dims[3]), z)
