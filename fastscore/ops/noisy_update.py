"""x' = x + a d + b z with the noise made on the fly: noisy_update, and its two named cases langevin_step and perturb."""

import math

import torch
from torch.compiler import is_compiling

from fastscore import backend as _backend
from fastscore import direct, random
from fastscore.compiling import allow_in_graph
from fastscore.ops import checks
from fastscore.ops.functions import contiguous, plain, quick


def noisy_update(
    x, direction, drift, diffusion, *, noise=None, seed=None, step=0, stream=random.LANGEVIN, offset=0, out=None, backend=None
):
    """Add a scaled direction and scaled noise, without ever storing the noise.

        x' = x + a d + b z,    z ~ N(0, I)

    Args:
        x: state, (B, *), float32, float64, bfloat16 or float16, any strides; its memory format is kept.
        direction: d, same shape, dtype and device as x.
        drift, diffusion: a and b; floats, 0-d or (B,). All four inputs are differentiable.
        noise: z, same shape and dtype as x. If given, the call is deterministic, takes no seed and is plain PyTorch.
        seed, step, stream, offset: the noise key (see fastscore.random); seed and step may be int64 tensors on the device.
        out: where to write, x itself for an in-place step; only without gradients.
        backend: 'reference', 'cpp', 'triton' or 'cuda' instead of the automatic choice.

    Returns:
        x', like x. Computed in float32 (float64 for float64), rounded once.

    Raises:
        ValueError: shapes or devices differ, or a coefficient is not finite (checked for floats and CPU tensors).
        TypeError: a dtype differs or is no float dtype.

    >>> noisy_update(torch.ones(2), torch.ones(2), 0.5, 1.0, noise=torch.zeros(2))
    tensor([1.5000, 1.5000])
    """
    if noise is backend is None and not is_compiling() and (door := direct.automatic) is not None:
        seed = random.draw_seed() if seed is None else seed
        y = door.noisy_update(direct.UPDATE, x, direction, drift, diffusion, seed, step, stream, offset, out)
        if y is not None:
            return y

    checks.check_float("noisy_update", "x", x)
    a, b = checks.coefficient("noisy_update", "drift", drift, x), checks.coefficient("noisy_update", "diffusion", diffusion, x)
    a, b = checks.in_graph(a, x), checks.in_graph(b, x)
    return _door("noisy_update", x, direction, a, b, noise, seed, step, stream, offset, out, backend)


def langevin_step(
    x, score, step_size=None, *, step_lr=None, noise=None, seed=None, step=0, stream=random.LANGEVIN, offset=0, out=None, backend=None
):
    """Take one unadjusted Langevin step.

        x' = x + (ε/2) s + √ε z,    z ~ N(0, I)

    Args:
        x: state, (B, *), any float dtype and strides.
        score: s = ∇ log p(x), same shape, dtype and device as x.
        step_size: ε >= 0, a float, 0-d or (B,); or step_lr: η = ε/2, as in NCSN's code, torchebm and blackjax.
        noise, seed, step, stream, offset, out, backend: as in `noisy_update`.

    Raises:
        ValueError: shapes or devices differ, ε is negative or not finite, or not exactly one of step_size and step_lr is given.
        TypeError: dtypes differ.

    Source: Song & Ermon 2019, Algorithm 1, line 6 (arXiv:1907.05600).

    >>> langevin_step(torch.ones(1), -torch.ones(1), 0.5, noise=torch.zeros(1))
    tensor([0.7500])
    """
    if noise is step_lr is backend is None and not is_compiling() and (door := direct.automatic) is not None:
        seed = random.draw_seed() if seed is None else seed
        y = door.noisy_update(direct.LANGEVIN, x, score, step_size, None, seed, step, stream, offset, out)
        if y is not None:
            return y

    checks.check_float("langevin_step", "x", x)
    if (step_size is None) == (step_lr is None):
        found = "neither" if step_size is None else "both"
        raise ValueError(f"langevin_step: give either step_size (ε) or step_lr (η = ε/2); got {found}.")
    name, value = ("step_size", step_size) if step_lr is None else ("step_lr", step_lr)
    e = checks.coefficient("langevin_step", name, value, x, minimum=0)
    e = e if step_lr is None else 2 * e
    half, root = 0.5 * e, e.sqrt() if isinstance(e, torch.Tensor) else math.sqrt(e)
    half, root = checks.in_graph(half, x), checks.in_graph(root, x)
    return _door("langevin_step", x, score, half, root, noise, seed, step, stream, offset, out, backend, direction_name="score")


def perturb(x, sigma, *, noise=None, seed=None, step=0, offset=0, out=None, backend=None):
    """Add Gaussian noise of standard deviation σ.

        x̃ = x + σ z,    z ~ N(0, I), stream PERTURB

    Args:
        x: clean data, (B, *), any float dtype and strides. sigma: σ >= 0, a float, 0-d or (B,).
        noise, seed, step, offset, out, backend: as in `noisy_update`.

    Raises:
        ValueError: σ is negative or not finite, or shapes or devices differ. TypeError: dtypes differ.

    Source: Vincent 2011, "A connection between score matching and denoising autoencoders".

    >>> perturb(torch.ones(1), 0.5, noise=torch.ones(1))
    tensor([1.5000])
    """
    if noise is backend is None and not is_compiling() and (door := direct.automatic) is not None:
        seed = random.draw_seed() if seed is None else seed
        y = door.noisy_update(direct.PERTURB, x, None, 0.0, sigma, seed, step, random.PERTURB, offset, out)
        if y is not None:
            return y

    checks.check_float("perturb", "x", x)
    b = checks.in_graph(checks.coefficient("perturb", "sigma", sigma, x, minimum=0), x)
    return _door("perturb", x, None, 0.0, b, noise, seed, step, random.PERTURB, offset, out, backend, direction_name=None)


def noisy_update_ref(x, d, a, b, z):
    """The equation, in the compute dtype, rounded once; x and d may be None."""
    like = x if x is not None else d
    dtype = checks.compute_dtype(like.dtype)
    y = checks.expand(b, like) * z.to(dtype)
    y = y if d is None else checks.expand(a, like) * d.to(dtype) + y
    return (y if x is None else x.to(dtype) + y).to(like.dtype)


@quick
class _NoisyUpdate(torch.autograd.Function):
    """y = x + a d + b z. Its derivatives are sums, products, itself and _NoiseDot, so every order and nesting is right.

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
        # Sums and products through plain(): in a jvp rule ordinary operations lose the tangents of the levels around it.
        d, a, b, key = _restore(ctx)
        shape, dtype = ctx.like
        t = tx
        if td is not None:
            ad = plain(_scaled, td, a) if isinstance(a, torch.Tensor) else plain(lambda td: _scaled(td, a), td)
            t = ad if t is None else plain(torch.add, t, ad)
        if ta is None and tb is None:
            return plain(torch.clone, t) if t is tx else t   # a view of an input tangent may not be returned
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
        return update(None, s, 0.0, g, key[0] if key else None, ctx.numbers, ctx.backend), None, None, None

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


LOSS, DOT = 0, 1  # modes of the raw op noise_reduce


def _scaled(d, a):
    """a d in the compute dtype, rounded once."""
    return noisy_update_ref(None, d, a, 0.0, torch.zeros((), device=d.device))


def _restore(ctx):
    """Direction, drift, diffusion and key as they were given, tensor or not."""
    tensors = iter(ctx.saved_tensors)
    return [next(tensors) if present else fixed for fixed, present in zip(ctx.fixed, ctx.present)]


def refuse_mapped_key(dim):
    if dim is not None:
        raise NotImplementedError("fastscore: vmap over seed or step is not supported; the noise of all mapped calls is the same.")


def _mapped(info, in_dims, args, numbers, backend):
    """vmap: every mapped call sees the same noise, as separate calls with this key would."""
    x, d, a, b, key = args
    refuse_mapped_key(in_dims[4])
    x, d = (t if t is None else checks.batch_first(t, dim, info.batch_size) for t, dim in zip((x, d), in_dims))
    like = x if x is not None else d
    z = random.normal_like(like[0], (key, *numbers), backend, checks.compute_dtype(like.dtype))

    def lift(c, dim):
        if not isinstance(c, torch.Tensor):
            return c
        c = checks.batch_first(c, dim, info.batch_size)   # (N,) or (N, B)
        return c.reshape(c.shape + (1,) * (like.dim() - c.dim()))

    return noisy_update_ref(x, d, lift(a, in_dims[2]), lift(b, in_dims[3]), z)


def run(x, d, a, b, key, numbers, backend, out=None):
    """The op itself, with no derivative; into `out`, which autograd is told of."""
    if backend == "cpp" and key is None and direct.door is not None and not is_compiling():
        y = direct.door.noisy_update(direct.TERMS, x, d, a, b, *numbers, out)
        if y is not None:
            return y

    like = x if x is not None else d
    y = torch.empty_like(like) if out is None else out
    if backend == "reference":
        z = random.normal_like(like, (key, *numbers), backend, checks.compute_dtype(like.dtype))
        return y.copy_(noisy_update_ref(x, d, a, b, z))
    _backend.call(backend, "noisy_update", y, x, d, *_split(a), *_split(b), key, *numbers)
    if out is not None:
        torch.autograd.graph.increment_version(out)
    return y


def reduce(s, sigma, key, numbers, backend, mode):
    """½ Σ (σ s + z)² or Σ s z per sample, with no derivative: (B,) in the compute dtype."""
    dtype = checks.compute_dtype(s.dtype)
    if backend == "reference":
        z = random.normal_like(s, (key, *numbers), backend, dtype)
        s = s.to(dtype)
        return checks.per_sample_sum(s * z if mode == DOT else 0.5 * (checks.expand(sigma, s) * s + z).square())
    out = torch.empty(s.shape[0], dtype=dtype, device=s.device)
    _backend.call(backend, "noise_reduce", out, s, *_split(sigma), key, *numbers, mode)
    return out


def _split(c):
    """A coefficient as the raw ops take it: (tensor or None, number)."""
    return (contiguous(c), 0.0) if isinstance(c, torch.Tensor) else (None, c)


@allow_in_graph
def _update_function(x, d, a, b, key, seed, step, stream, offset, backend):
    return _NoisyUpdate.apply(x, d, a, b, key, (seed, step, stream, offset), backend)


def update(x, d, a, b, key, numbers, backend):
    """x + a d + b z, differentiable where anything asks for it."""
    if _backend.derivative_possible(x, d, *(c for c in (a, b) if isinstance(c, torch.Tensor))):
        return _update_function(x, d, a, b, key, *numbers, backend)
    return run(x, d, a, b, key, numbers, backend)


def noise_dot(s, key, numbers, backend):
    """Σ s z per sample, differentiable."""
    return _NoiseDot.apply(s, key, numbers, backend)


def _door(op, x, d, a, b, noise, seed, step, stream, offset, out, backend, direction_name="direction"):
    """x and the coefficients have been checked. Without a name for d there is none."""
    if direction_name is not None:
        checks.check_like(op, direction_name, d, x)
    chosen = _backend.choose(x.device, backend)
    if out is not None:
        _check_out(op, out, (x, d, noise, a, b))
    if noise is not None:
        checks.check_like(op, "noise", noise, x)
        if seed is not None:
            raise ValueError(f"{op}: give noise or seed, not both.")
        y = noisy_update_ref(x, d, a, b, noise)
        return y if out is None else out.copy_(y)
    key, *numbers = random.noise_key(op, seed, step, stream, 0, offset, x.device)
    if out is None:
        return update(x, d, a, b, key, tuple(numbers), chosen)
    if torch.compiler.is_compiling() or out.is_neg() or any(_overlaps(out, t) for t in (x, d, a, b)):
        return out.copy_(update(x, d, a, b, key, tuple(numbers), chosen))
    return run(x, d, a, b, key, tuple(numbers), chosen, out)


def _check_out(op, out, inputs):
    checks.check_like(op, "out", out, inputs[0])
    tensors = [t for t in (*inputs, out) if isinstance(t, torch.Tensor)]
    if not torch.compiler.is_compiling() and _backend.derivative_possible(*tensors):
        raise ValueError(f"{op}: out= cannot be differentiated; call it under torch.no_grad() or without out.")
    if out.is_inference() and not torch.is_inference_mode_enabled():
        raise ValueError(f"{op}: out must not be an inference tensor, which can be written to in inference mode alone; clone it.")
    if not torch.compiler.is_compiling() and out._is_zerotensor():
        raise ValueError(f"{op}: out must have memory of its own; got an immutable tensor of zeros; clone it.")
    extent = 1
    for stride, size in sorted((stride, size) for size, stride in zip(out.shape, out.stride()) if size > 1):
        if stride < extent:
            raise ValueError(f"{op}: out must not share memory between its elements; got shape {tuple(out.shape)}, strides {out.stride()}.")
        extent = stride * (size - 1) + extent


def _overlaps(out, t):
    """Whether t lies in memory that out occupies without being the same view of it."""
    if not isinstance(t, torch.Tensor) or t.numel() == 0 or out.numel() == 0 or t.device != out.device:
        return False
    if (t.data_ptr(), t.shape, t.stride(), t.dtype) == (out.data_ptr(), out.shape, out.stride(), out.dtype):
        return False
    (first, last), (begin, end) = _bytes(out), _bytes(t)
    return first < end and begin < last


def _bytes(t):
    return t.data_ptr(), t.data_ptr() + (sum((n - 1) * s for n, s in zip(t.shape, t.stride())) + 1) * t.element_size()
