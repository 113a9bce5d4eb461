"""Odd arguments of every public op and loss.

The right values, or one sentence of ours, and the same on every back end.

A call is drawn from a number: good arguments, a few of which are then replaced by something odd. It
is run on every back end and judged: right (the float64 truth of the same arguments, dense and
contiguous), refused (one sentence that begins with the op's name), raw (any other exception) or
wrong. `python tests/test_odd_arguments.py OP N` prints the counts.
"""

import collections
import inspect
import math
import random as python_random
import sys
import warnings

import numpy as np
import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils import _pytree as pytree

import fastscore
from fastscore import backend as backends
from fastscore import losses, ops, random
from fastscore.losses.noise_conditional import METHODS
from fastscore.losses.projections import DISTRIBUTIONS
from fastscore.ops.activate import activate_dual, activate_jet

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class Sub(torch.Tensor):
    """A subclass without behaviour of its own."""


class Wrapper(torch.Tensor):
    """A subclass without memory: its values are in another tensor."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, dtype=inner.dtype, device=inner.device
        )

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise NotImplementedError(f"Wrapper: {func}")


# ---- layouts of a tensor with the same values


def stepped(t):
    wide = torch.full((*t.shape, 2), 7, dtype=t.dtype)
    wide[..., 0] = t
    return wide[..., 0]


def padded(t):
    wide = torch.full([n + 2 for n in t.shape], 7, dtype=t.dtype)
    inner = wide[tuple(slice(1, 1 + n) for n in t.shape)]
    return inner.copy_(t)


LAYOUTS = {
    "permuted": lambda t, rng: (
        t.permute(*(p := rng.sample(range(t.dim()), t.dim())))
        .contiguous()
        .permute(*map(p.index, range(t.dim())))
    ),
    "stepped": lambda t, rng: stepped(t),
    "padded": lambda t, rng: padded(t),
    "expanded": lambda t, rng: t[:1].expand(t.shape) if t.dim() and len(t) else t,
    "channels last": lambda t, rng: (
        t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t
    ),
    "negative bit": lambda t, rng: torch._neg_view(-t) if t.is_floating_point() else t,
    "imaginary part": lambda t, rng: torch.complex(t, t).imag if t.dtype in FLOATS[:2] else t,
    "zeros without memory": lambda t, rng: (
        torch._efficientzerotensor(t.shape, dtype=t.dtype) if t.is_floating_point() else t
    ),
    "parameter": lambda t, rng: torch.nn.Parameter(t, requires_grad=False),
    "subclass": lambda t, rng: t.as_subclass(Sub),
    "wants a gradient": lambda t, rng: t.clone().requires_grad_() if t.is_floating_point() else t,
}

# ---- other kinds of the same tensor, and what is no tensor at all


def nested(t, layout):
    return torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=layout)


def sparse(t, convert):
    flat = t.detach().float() if t.dim() == 2 else torch.ones(2, 2)
    return convert(flat)


def inference(t):
    with torch.inference_mode():
        return t.clone()


KINDS = {
    "nested": lambda t: nested(t, torch.strided),
    "jagged": lambda t: nested(t, torch.jagged),
    "coo": lambda t: t.detach().to_sparse() if t.dim() else torch.ones(2).to_sparse(),
    "csr": lambda t: sparse(t, torch.Tensor.to_sparse_csr),
    "csc": lambda t: sparse(t, torch.Tensor.to_sparse_csc),
    "mkldnn": lambda t: (
        t.detach().float().contiguous().to_mkldnn() if t.dim() else torch.ones(2).to_mkldnn()
    ),
    "float8": lambda t: t.detach().to(torch.float8_e4m3fn),
    "float8 scale": lambda t: t.detach().float().abs().to(torch.float8_e8m0fnu),
    "quantised": lambda t: torch.quantize_per_tensor(t.detach().float(), 0.1, 0, torch.quint8),
    "complex": lambda t: t.detach().to(torch.complex64),
    "integer": lambda t: t.detach().to(torch.int32),
    "long": lambda t: t.detach().to(torch.int64),
    "unsigned": lambda t: t.detach().to(torch.uint16),
    "bool": lambda t: t.detach() > 0,
    "another float": lambda t: t.detach().to(
        torch.float64 if t.dtype == torch.float32 else torch.float32
    ),
    "meta": lambda t: t.detach().to("meta"),
    "fake": lambda t: FakeTensorMode().from_tensor(t.detach()),
    "wrapper": lambda t: Wrapper(t.detach()),
    "masked": lambda t: torch.masked.masked_tensor(
        t.detach(), torch.ones_like(t, dtype=torch.bool)
    ),
    "lazy": lambda t: torch.nn.UninitializedParameter(),
    "inference": lambda t: inference(t.detach()),
    "one more dimension": lambda t: t.detach()[None],
    "one sample less": lambda t: t.detach()[1:] if t.dim() else t.detach(),
    "0-d": lambda t: torch.ones((), dtype=t.dtype),
    "(1,)": lambda t: torch.ones(1, dtype=t.dtype),
    "empty": lambda t: t.detach()[:0] if t.dim() else t.detach(),
}
NO_TENSORS = (
    None,
    True,
    0,
    -1,
    3,
    10**30,
    10**400,
    0.5,
    -0.5,
    0.0,
    math.nan,
    math.inf,
    -math.inf,
    1e300,
    1e-300,
    1 + 2j,
    "1",
    "none",
    b"1",
    [],
    [0.5],
    (0.5, 0.5),
    {},
    object(),
    np.float64(0.5),
    np.float32(0.5),
    np.int64(3),
    np.bool_(True),
    np.ones(3),
    np.ones((2, 3), np.float32),
    torch.float32,
    torch.device("cpu"),
    torch.Size([2]),
    slice(2),
    range(3),
    lambda x: x,
)
VALUES = (math.nan, math.inf, -math.inf, 3e4, -3e4, 1e-40, 0.0, -0.0)


def dense(t):
    """The same numbers, contiguous and in memory of their own; floats in float64."""
    if not isinstance(t, torch.Tensor):
        return t
    t = (
        t.detach()
        .as_subclass(torch.Tensor)
        .resolve_neg()
        .clone(memory_format=torch.contiguous_format)
    )
    return t.double() if t.is_floating_point() else t


class Draw:
    """The arguments of one call, from a random generator.

    Good ones, until `spoil` replaces some.
    """

    def __init__(self, seed):
        self.rng = python_random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.dtype = self.rng.choice(FLOATS)

    def tensor(self, *shape, dtype=None, positive=False):
        t = torch.randn(shape, generator=self.generator).to(dtype or self.dtype)
        return t.abs() if positive else t

    def shape(self, least=0):
        return [self.rng.choice((1, 2, 3, 5)) for _ in range(self.rng.choice(range(least, 4)))]

    def image(self):
        pixels = [self.rng.choice((1, 3, 4)) for _ in range(self.rng.choice((1, 2)))]
        return [self.rng.choice((1, 2, 3)), self.rng.choice((1, 2, 4)), *pixels]

    def coefficient(self, shape, positive=False):
        kind, dtype = self.rng.choice(("float", "0-d", "each")), self.rng.choice(FLOATS)
        if kind == "float":
            return self.rng.random()
        n = [] if kind == "0-d" else [shape[0] if shape else 1]
        return self.tensor(*n, dtype=dtype, positive=positive)

    def key(self):
        def number():
            return self.rng.choice((0, 7, -3, 2**40, torch.tensor(5), torch.tensor([6])))

        return {"seed": number(), "step": number(), "offset": self.rng.choice((0, 1, 6, 2**33 + 5))}

    def spoil(self, arguments):
        """Replace up to two arguments, or the values or the layout of tensors among them."""
        odd = []
        for name in self.rng.sample(
            sorted(arguments), min(len(arguments), self.rng.choice((0, 1, 1, 2)))
        ):
            value = arguments[name]
            if isinstance(value, torch.Tensor) and self.rng.random() < 0.75:
                made, word = self._other_tensor(value)
            else:
                made = word = self.rng.choice(NO_TENSORS)
            arguments[name] = made
            odd.append(f"{name}: {word}")
        return odd

    def _other_tensor(self, t):
        way = self.rng.choice(("layout", "kind", "value"))
        if way == "value" and t.numel() and t.is_floating_point():
            t = t.clone()
            word = self.rng.choice(VALUES)
            t[np.unravel_index(self.rng.randrange(t.numel()), t.shape)] = word
            return t, word
        word = self.rng.choice(sorted(LAYOUTS if way == "layout" else KINDS))
        try:
            return (LAYOUTS[word](t, self.rng) if way == "layout" else KINDS[word](t)), word
        except Exception:   # torch cannot make it of this tensor
            return t, "as it was"


# ---- the ops: how arguments are drawn, and the float64 truth of a call


def noisy(draw):
    shape = draw.shape()
    x, d = draw.tensor(*shape), draw.tensor(*shape)
    given = {
        "x": x,
        "direction": d,
        "drift": draw.coefficient(shape),
        "diffusion": draw.coefficient(shape),
    }
    return given | _noise(draw, x)


def _noise(draw, x):
    given = draw.key() if draw.rng.random() < 0.7 else {"noise": draw.tensor(*x.shape)}
    if draw.rng.random() < 0.4:
        turned = torch.empty(x.shape[::-1], dtype=x.dtype).permute([*range(x.dim())][::-1])
        given["out"] = draw.rng.choice(
            (
                x,
                torch.empty_like(x),
                padded(x),
                stepped(x),
                turned,
                torch._neg_view(torch.empty_like(x)),
            )
        )
    return given


def stepping(draw):
    shape = draw.shape()
    x = draw.tensor(*shape)
    return {
        "x": x,
        "score": draw.tensor(*shape),
        "step_size": draw.coefficient(shape, True),
    } | _noise(draw, x)


def perturbing(draw):
    shape = draw.shape()
    x = draw.tensor(*shape)
    return {"x": x, "sigma": draw.coefficient(shape, True)} | _noise(draw, x)


def update(x, d, a, b, noise=None, seed=None, step=0, stream=random.LANGEVIN, offset=0, out=None):
    z = _normal(x.shape, seed, step, stream, offset) if noise is None else noise
    return x + _each(a, x) * d + _each(b, x) * z


def _normal(shape, seed, step, stream, offset):
    key = {"seed": _whole(seed), "step": _whole(step), "stream": stream, "offset": offset}
    return random.normal(shape, dtype=torch.float64, backend="reference", **key)


def _whole(number):
    return random.draw_seed() if number is None else int(number)


def _each(c, x):
    c = torch.as_tensor(c, dtype=torch.float64)
    return c.reshape(c.shape + (1,) * (x.dim() - c.dim())) if c.dim() and x.dim() else c.reshape(())


def denoising(draw):
    shape = draw.shape(1)
    score = draw.tensor(*shape)
    given = draw.key() if draw.rng.random() < 0.7 else {"noise": draw.tensor(*shape)}
    return {"score": score, "sigma": draw.coefficient(shape, True)} | given


def denoising_truth(score, sigma, noise=None, seed=None, step=0, offset=0):
    z = _normal(score.shape, seed, step, random.PERTURB, offset) if noise is None else noise
    squares = 0.5 * (_each(sigma, score) * score + z).square()
    return squares.flatten(1).sum(1) if score.dim() > 1 else squares


ACTIVATIONS = (None, "elu", "silu", "relu", "gelu", "softplus")


def norm(draw):
    shape = draw.image()
    B, C = shape[:2]

    def column():
        return draw.tensor(*draw.rng.choice(((C,), (B, C))), dtype=draw.rng.choice(FLOATS))

    given = {
        "x": draw.tensor(*shape),
        "gamma": column(),
        "eps": draw.rng.choice((1e-5, 0.1)),
        "activation": draw.rng.choice(ACTIVATIONS),
    }
    return given | {name: column() for name in ("alpha", "beta") if draw.rng.random() < 0.6}


def conditional(draw):
    shape = draw.image()
    bias, levels = draw.rng.random() < 0.5, draw.rng.choice((1, 4))
    labels = torch.randint(levels, (shape[0],), generator=draw.generator)
    weight = draw.tensor(levels, (3 if bias else 2) * shape[1], dtype=draw.rng.choice(FLOATS))
    return {
        "x": draw.tensor(*shape),
        "labels": labels,
        "weight": weight,
        "bias": bias,
        "activation": draw.rng.choice(ACTIVATIONS),
    }


def groups(draw):
    shape = draw.image()
    B, C = shape[:2]
    given = {
        "x": draw.tensor(*shape),
        "num_groups": draw.rng.choice([g for g in (1, 2, 4) if C % g == 0]),
    }
    sizes = {"weight": (C,), "bias": (C,), "scale": (B, C), "shift": (B, C)}
    given |= {
        k: draw.tensor(*s, dtype=draw.rng.choice(FLOATS))
        for k, s in sizes.items()
        if draw.rng.random() < 0.5
    }
    return given | {"activation": draw.rng.choice(ACTIVATIONS)}


def with_tangents(make):
    def tangents(draw):
        given = make(draw)
        return given | {"t": draw.tensor(draw.rng.choice((1, 2)), *given["x"].shape)}

    return tangents


def reference(name):
    """The truth of a normalisation: the reference on dense float64 tensors."""
    return lambda **given: getattr(ops, name)(**given, backend="reference")


def curve(x):
    return (
        x.sin() + x * x.flatten(1).mean(1).reshape(-1, *(1,) * (x.dim() - 1))
        if x.dim() > 1
        else x.sin() + x * x
    )


def projecting(draw):
    return {"x": draw.tensor(*draw.shape(1)), "projections": draw.rng.choice((1, 3))} | draw.key()


def projected(x, projections=1, seed=None, step=0, offset=0):
    y, v, seed = curve(x), [], _whole(seed)
    for m in range(projections):
        key = {
            "seed": seed,
            "step": int(step),
            "offset": offset,
            "stream": random.PROJECTION,
            "substream": m,
        }
        v.append(random.rademacher(x.shape, dtype=torch.float64, backend="reference", **key))
    v = torch.stack(v)
    jv = torch.stack([torch.func.jvp(curve, (x,), (d,))[1] for d in v])
    return y, (v * jv).flatten(2).sum(-1) if x.dim() > 1 else v * jv


def jumping(draw):
    x = draw.tensor(*draw.shape(1))
    return {"x": x, "v": draw.tensor(*draw.rng.choice(((), (2,))), *x.shape)}


def jumped(x, v):
    many = v if v.dim() > x.dim() else v[None]
    jv = torch.stack([torch.func.jvp(curve, (x,), (d,))[1] for d in many])
    return curve(x), jv if v.dim() > x.dim() else jv[0]


def filling(draw):
    return {
        "shape": draw.rng.choice((3, (2, 3), [4], (), (0, 2))),
        "stream": draw.rng.choice((1024, 65535)),
        "substream": 2,
        "dtype": draw.rng.choice(FLOATS),
        "device": draw.rng.choice((None, "cpu")),
    } | draw.key()


def counting(draw):
    return {"n": draw.rng.choice((0, 3, 9)), "stream": 1024, "device": "cpu"} | draw.key()


def filled(kind):
    def truth(
        shape=None,
        n=None,
        seed=None,
        step=0,
        stream=None,
        substream=0,
        offset=0,
        dtype=None,
        device=None,
    ):
        shape = (
            (n,)
            if shape is None
            else (shape,)
            if isinstance(shape, int | np.integer)
            else tuple(shape)
        )
        key = random.noise_key(
            "truth", _whole(seed), int(step), stream, substream, offset, torch.device("cpu")
        )
        return random.fill_ref(
            kind,
            shape,
            key,
            torch.int64 if kind == random.WORDS else torch.float64,
            torch.device("cpu"),
        )

    return truth


def pull(x, *sigma):
    return -x * (
        1 + 0.25 * (x.flatten(1).mean(1).reshape(-1, *(1,) * (x.dim() - 1)) if x.dim() > 1 else x)
    )


def of_data(draw, **more):
    return {
        "x": draw.tensor(*draw.shape(1)),
        "step": draw.key()["step"],
        "first_sample": draw.rng.choice((0, 6)),
        "seed": 3,
    } | more


def slicing(draw):
    given = of_data(
        draw, projections=draw.rng.choice((1, 2)), distribution=draw.rng.choice(DISTRIBUTIONS)
    )
    given["variance_reduced"] = draw.rng.random() < 0.5
    if draw.rng.random() < 0.3:
        given["mask"] = (draw.tensor(*given["x"].shape) > 0).to(
            draw.rng.choice((torch.bool, torch.float32, torch.int64, draw.dtype))
        )
    if draw.rng.random() < 0.3:
        given["v"] = draw.tensor(*draw.rng.choice(((), (2,))), *given["x"].shape)
        del given["seed"], given["projections"]
    return given


def differences(draw):
    return slicing(draw) | {"radius": 0.1}


def exactly(draw):
    x = draw.tensor(*draw.shape(1))
    return {"x": x, "chunk": draw.rng.choice((1, 16))} | (
        {"target": draw.tensor(*x.shape)} if draw.rng.random() < 0.4 else {}
    )


def with_sigma(draw):
    given = of_data(draw)
    return given | {"sigma": draw.coefficient(given["x"].shape, True)}


def laddered(draw):
    given = of_data(
        draw, method=draw.rng.choice(METHODS), power=draw.rng.choice((2, 1.0)), projections=1
    )
    given["sigmas"] = draw.rng.choice((torch.tensor([2.0, 1.0, 0.5]), [1.0, 0.1], (1.0,)))
    if draw.rng.random() < 0.5:
        given["labels"] = torch.randint(
            len(given["sigmas"]), given["x"].shape[:1], generator=draw.generator
        )
    return given


def reporting(draw):
    return {"x": draw.tensor(2, *draw.shape()), "projections": (1, 2), "draws": 2, "seed": 3}


def by_reference(f):
    """The truth of a loss.

    Itself on dense float64 tensors with the reference, which other tests pin to closed forms.
    """
    def truth(**given):
        with fastscore.use_backend("reference"):
            return f(**given)

    return truth


def of_score(loss, score=pull):
    return lambda **given: loss(score, **given)


def truth_of_step(x, score, step_size, **key):
    e = torch.as_tensor(step_size, dtype=torch.float64)
    return update(x, score, e / 2, e.sqrt(), **key)


class Op:
    """name: with which messages begin.

    call(**arguments), truth(**float64 arguments), draw(Draw). tolerance: in units of ε of the
    dtype.
    """

    def __init__(self, name, call, draw, truth, tolerance=8):
        self.name, self.call, self.draw, self.truth, self.tolerance = (
            name,
            call,
            draw,
            truth,
            tolerance,
        )


def _ops():
    yield Op(
        "noisy_update",
        fastscore.noisy_update,
        noisy,
        lambda x, direction, drift, diffusion, **k: update(x, direction, drift, diffusion, **k),
    )
    yield Op("langevin_step", fastscore.langevin_step, stepping, truth_of_step)
    yield Op(
        "perturb",
        fastscore.perturb,
        perturbing,
        lambda x, sigma, **k: update(x, 0.0 * x, 0.0, sigma, stream=random.PERTURB, **k),
    )
    yield Op("denoising_loss", fastscore.denoising_loss, denoising, denoising_truth, 64)
    for name, draw in (
        ("instance_norm_plus", norm),
        ("conditional_instance_norm_plus", conditional),
        ("group_norm_modulate", groups),
    ):
        yield Op(name, getattr(ops, name), draw, reference(name), 400)
        yield Op(
            f"{name}_dual",
            getattr(ops, f"{name}_dual"),
            with_tangents(draw),
            reference(f"{name}_dual"),
            4000,
        )
    yield Op(
        "rademacher_jvp",
        lambda **given: fastscore.rademacher_jvp(curve, **given),
        projecting,
        projected,
        400,
    )
    yield Op("jvp", lambda **given: fastscore.jvp(curve, **given), jumping, jumped, 64)
    for kind, name in enumerate(("words", "uniform", "normal", "rademacher")):
        yield Op(name, getattr(random, name), filling if kind else counting, filled(kind))
    for name, draw in (
        ("sliced", slicing),
        ("finite_difference_sliced", differences),
        ("exact", exactly),
        ("denoising", with_sigma),
        ("noise_conditional", laddered),
    ):
        loss = of_score(getattr(losses, name))
        yield Op(
            name,
            loss,
            draw,
            by_reference(loss),
            20000 if name == "finite_difference_sliced" else 4000,
        )
    yield Op("variance_report", of_score(losses.variance_report), reporting, None)


OPS = {op.name: op for op in _ops()}


# ---- judging a call


class Verdict(collections.namedtuple("Verdict", "kind result")):
    """kind: right, refused, raw or wrong. result: tensors, or the message."""


def outcome(op, seed, backend):
    """(what came out, tensors or an exception; the arguments; what is odd about them)."""
    draw = Draw(seed)
    arguments = op.draw(draw)
    with warnings.catch_warnings():   # torch's, about some of the kinds
        warnings.simplefilter("ignore")
        odd = draw.spoil(arguments)

    # Before the call, which may write into one of them.
    given = {
        k: v.detach().as_subclass(torch.Tensor).clone()
        if type(v) in PLAIN and v.layout is torch.strided
        else v
        for k, v in arguments.items()
    }
    torch.manual_seed(seed)
    try:
        with warnings.catch_warnings(), fastscore.use_backend(backend):
            warnings.simplefilter("ignore")
            return op.call(**arguments), given, odd
    except Exception as error:
        return error, given, odd


PLAIN = (torch.Tensor, torch.nn.Parameter, Sub)


def judge(op, seed, backend):
    result, given, odd = outcome(op, seed, backend)
    if isinstance(result, Exception):
        return Verdict(
            "refused" if ours(op, result) else "raw", f"{type(result).__name__}: {result}"
        ), odd
    if op.truth is None or any(
        type(v) not in PLAIN for v in given.values() if isinstance(v, torch.Tensor)
    ):
        return Verdict("right", None), odd
    found = pytree.tree_leaves(result)
    if any(t.device.type == "meta" for t in found):
        return Verdict("right", None), odd
    torch.manual_seed(seed)
    try:
        expected = pytree.tree_leaves(op.truth(**{k: dense(v) for k, v in given.items()}))
    except Exception as error:
        return Verdict("wrong", f"taken, but the truth says {type(error).__name__}: {error}"), odd
    problem = next(
        (p for a, b in zip(found, expected, strict=True) if (p := difference(op, a, b, given))),
        None,
    )
    return (Verdict("wrong", problem) if problem else Verdict("right", found)), odd


def ours(op, error):
    """One sentence, in the op's own name, of a kind that users catch."""
    message = str(error)
    mine = message.startswith((f"{op.name}: ", "backend '"))
    return (
        isinstance(error, TypeError | ValueError)
        and mine
        and "\n" not in message
        and len(message) < 400
    )


def difference(op, found, expected, given):
    if found.shape != expected.shape:
        return f"shape {tuple(found.shape)} instead of {tuple(expected.shape)}"
    found, low = found.detach().as_subclass(torch.Tensor), found.dtype
    eps = torch.finfo(low).eps if low.is_floating_point else 0
    drawn = {
        v.dtype for v in given.values() if isinstance(v, torch.Tensor) and v.is_floating_point()
    }
    eps = max(
        [eps, torch.finfo(torch.float32).eps, *(torch.finfo(d).eps for d in drawn if d in FLOATS)]
    )
    expected = expected.double()
    if (
        not bool(expected.isfinite().all())
        or float(expected.abs().max() if expected.numel() else 0) > 1e4
    ):
        return None   # overflow is the dtype's; that back ends agree about it is judged below
    if isinstance(given.get("mask"), torch.Tensor) and not bool(curve(given["x"]).isfinite().all()):
        return None   # the score's own overflow, where the mask hides it from the truth
    error = (found.double() - expected).abs()
    inputs = [
        v.detach().double()
        for k, v in given.items()
        if type(v) in PLAIN and v.dtype in FLOATS and v.numel() and k != "out"
    ]
    largest = max([1.0, *(float(v.abs().nan_to_num(posinf=0).max()) for v in inputs)])
    bound = (
        op.tolerance
        * eps
        * (1 + expected.abs().amax() if expected.numel() else 1)
        * max(1, largest / 8) ** 2
    )
    if bool((error <= bound).all()):
        return None
    return f"differs by {float(error.nan_to_num(nan=math.inf).max()):.3g}, bound {float(bound):.3g}"


def kinds(t):
    """0 finite, 1 ∞, 2 -∞, 3 NaN."""
    t = t.detach().double()
    return t.isposinf() + 2 * t.isneginf() + 3 * t.isnan()


def alike(a, b):
    """Whether two back ends agree about a call.

    The same kind of result, not finite in the same places.
    """
    if any(
        str(v.result).endswith("runs on the CPU, not on meta.")
        or "runs on CUDA devices, not on meta" in str(v.result)
        for v in (a, b)
    ):
        return True   # a back end does not serve the device, and says so
    if a.kind != b.kind:
        return False
    if a.kind != "right" or a.result is None or b.result is None:
        return True
    return all(torch.equal(kinds(s), kinds(t)) for s, t in zip(a.result, b.result, strict=True))


def run(op, seeds, names, triton_every):
    """Counts, and the first examples of what is raw, wrong or differs between back ends."""
    counts, examples = collections.Counter(), []
    for seed in seeds:
        verdicts = {}
        for name in names:
            if name != "triton" or seed % triton_every == 0:
                verdicts[name], odd = judge(op, seed, name)
                counts[verdicts[name].kind] += 1
                if verdicts[name].kind in ("raw", "wrong"):
                    examples.append(
                        f"{op.name} {seed} {name} {verdicts[name].kind} {odd}: "
                        f"{str(verdicts[name].result)[:300]}"
                    )
        first = next(iter(verdicts.values()))
        for name, verdict in verdicts.items():
            if not alike(first, verdict) and "raw" not in (first.kind, verdict.kind):
                counts["unlike"] += 1
                pair = "; ".join(f"{v.kind} {str(v.result)[:200]}" for v in (first, verdict))
                examples.append(f"{op.name} {seed} {name} unlike {odd}: {pair}")
    return counts, examples


def available():
    return [
        name for name in ("reference", "cpp", "triton") if backends.why_not(name, "cpu") is None
    ]


@pytest.mark.parametrize("op", OPS)
def test_odd_arguments_are_right_or_refused_in_one_sentence(op):
    counts, examples = run(OPS[op], range(150), available(), 15)
    assert not examples, "\n".join(examples[:5])
    assert counts["right"] > 40 and counts["refused"] > 20   # the draw reaches both


FOUND = {  # by the long form below
    "nested tensors": [
        ("noisy_update", 9707),
        ("langevin_step", 4829),
        ("perturb", 7852),
        ("denoising_loss", 8418),
        ("exact", 4362),
    ],
    "small numbers": [
        ("perturb", 6450),
        ("instance_norm_plus_dual", 1182),
        ("finite_difference_sliced", 1684),
    ],
    "large numbers": [("finite_difference_sliced", 10197)],
    "tangents made in inference mode": [("conditional_instance_norm_plus_dual", 2722)],
}


@pytest.mark.parametrize("kind", FOUND)
def test_what_was_found_once(kind):
    assert not [
        example
        for name, seed in FOUND[kind]
        for example in run(OPS[name], [seed], available(), 1)[1]
    ]


@pytest.mark.parametrize("op", ["noisy_update", "langevin_step", "perturb", "denoising_loss"])
def test_nested_tensors_are_refused_wherever_they_stand(op):
    """Their shape is an error of torch's."""
    x = torch.ones(2, 3)
    for name in inspect.signature(getattr(fastscore, op)).parameters:
        given = {
            "x": x, "score": x, "direction": x, "drift": 1.0, "diffusion": 1.0, "step_size": 0.1,
            "sigma": 0.5, "seed": 1, "noise": x,
        }
        given = {
            k: v
            for k, v in given.items()
            if k in inspect.signature(getattr(fastscore, op)).parameters
        }
        given.pop("seed" if name == "noise" else "noise", None)
        if name in (*given, "out"):
            with pytest.raises((TypeError, ValueError), match=f"^{op}: "):
                getattr(fastscore, op)(**given | {name: nested(x, torch.strided)})


class Piled(torch.Tensor):
    def stack(self):
        raise AssertionError


class Table:
    """No tensor; pandas has such a method."""

    stack = Piled.stack


NORMS = {
    "group_norm_modulate": lambda x: ops.group_norm_modulate(x, 2),
    "instance_norm_plus": lambda x: ops.instance_norm_plus(x, torch.ones(4)),
    "conditional_instance_norm_plus": lambda x: ops.conditional_instance_norm_plus(
        x, torch.tensor([0, 1]), torch.ones(3, 12)
    ),
}


@pytest.mark.parametrize("op", NORMS)
def test_what_has_a_method_stack_is_no_dual_number(op):
    x = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    found = NORMS[op](x.as_subclass(Piled)).as_subclass(torch.Tensor)
    torch.testing.assert_close(found, NORMS[op](x))
    with pytest.raises(TypeError, match=f"^{op}: x must be a tensor; got Table"):
        NORMS[op](Table())


@pytest.mark.slow
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("start", range(1000, 11000, 500))
def test_ten_thousand_calls(op, start):
    counts, examples = run(OPS[op], range(start, start + 500), available(), 50)
    assert not examples, f"{counts}\n" + "\n".join(examples[:10])


@pytest.mark.parametrize(
    "call",
    [
        lambda n: fastscore.sample(
            pull, x=torch.ones(1, 2), sigmas=[1.0, 0.5], steps_per_level=n, step_size=0.1
        ),
        lambda n: fastscore.sample(
            pull, x=torch.ones(1, 2), sampler="langevin", steps=n, step_size=0.1
        ),
        lambda n: fastscore.sample(
            pull, x=torch.ones(1, 2), sampler="mala", steps=n, step_size=0.1
        ),
        lambda n: fastscore.sample(
            pull,
            x=torch.ones(1, 2),
            sampler="predictor_corrector",
            sigmas=[1.0, 0.5],
            corrector_steps=n,
        ),
    ],
)
def test_a_run_that_would_never_end_is_refused(call):
    for n in (10**30, 2**33):
        with pytest.raises(
            ValueError, match=r"a run has at most 2\^32 updates, whose noise differs; got"
        ):
            call(n)


@pytest.mark.parametrize("activation", [None, "elu", "silu", "relu", "gelu", "softplus"])
@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["gamma", "alpha", "beta"])
def test_a_coefficient_that_is_not_finite_makes_its_channel_nan(backend, activation, odd, name):
    """And no other channel.

    Values and tangents, whose products would otherwise depend on their order.
    """
    x, t = torch.randn(2, 3, 5), torch.randn(2, 2, 3, 5)
    given = {"gamma": torch.rand(3), "alpha": torch.rand(3), "beta": torch.rand(3)}
    given[name][1] = odd
    y, ty = ops.instance_norm_plus_dual(x, t, **given, activation=activation)
    for result in (y, ty, ops.instance_norm_plus(x, **given, activation=activation)):
        assert bool(result.isnan()[..., 1, :].all()) and bool(
            result.isfinite()[..., [0, 2], :].all()
        )


@pytest.mark.parametrize("activation", [None, "elu", "silu", "relu", "gelu", "softplus"])
@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["instance_norm", "instance_norm_plus", "groups"])
def test_a_direction_that_is_not_finite_makes_what_it_reaches_nan(backend, activation, odd, name):
    """Its channel or group, or with alpha its sample, whatever order infinities are added in.

    A mask hides them still.
    """
    x, t = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(0)), torch.ones(2, 2, 4, 5)
    t[1, 0, 1, 3] = odd
    given = {
        "activation": activation,
        "alpha": torch.tensor([0.5, 0.0, -1.0, 2.0]) if name == "instance_norm_plus" else None,
    }
    if name == "groups":
        y, ty = ops.group_norm_modulate_dual(x, t, 2, activation=activation)
    else:
        y, ty = ops.instance_norm_plus_dual(x, t, torch.tensor([1.0, 0.5, 0.0, -2.0]), **given)

    reached = torch.zeros_like(t, dtype=torch.bool)
    reached[
        1,
        0,
        {"instance_norm": slice(1, 2), "instance_norm_plus": slice(None), "groups": slice(0, 2)}[
            name
        ],
    ] = True
    if activation == "relu":
        reached[1] &= y > 0
    assert (
        torch.equal(ty.isnan(), reached)
        and bool(ty[~reached].isfinite().all())
        and bool(y.isfinite().all())
    )


def test_relu_takes_nothing_from_a_cotangent_that_it_hides(backend):
    """As PyTorch's: a mask, not a product with zero."""
    s = torch.tensor([[-1.0, 2.0, -3.0], [math.inf, 1.0, math.nan]])
    assert activate_dual(s, "relu").tolist() == [[0.0, 2.0, 0.0], [0.0, 1.0, 0.0]]
    s.requires_grad_()
    (g,) = torch.autograd.grad(
        activate_dual(s, "relu"),
        s,
        torch.tensor([[math.inf, 1.0, math.nan], [-math.inf, 2.0, 0.0]]),
    )
    assert g.tolist() == [[0.0, 1.0, 0.0], [0.0, 2.0, 0.0]]
    jet = activate_jet(torch.cat([s, s[1:]]), 1, "relu")
    assert jet.tolist() == [[0.0, 2.0, 0.0], [0.0, 1.0, 0.0], [0.0, 1.0, 0.0]]
    x, gy = (
        torch.tensor([[[-1.0, 3.0, -2.0]]], requires_grad=True),
        torch.tensor([[[math.inf, 1.0, math.nan]]]),
    )
    (g,) = torch.autograd.grad(ops.instance_norm_plus(x, torch.ones(1), activation="relu"), x, gy)
    (expected,) = torch.autograd.grad(torch.relu(torch.nn.functional.instance_norm(x)), x, gy)
    assert torch.allclose(g, expected, atol=1e-5) and bool(g.isfinite().all())


def test_zeros_without_memory_are_read_as_zeros(backend):
    """What autograd passes as the tangent of an input that has none.

    A kernel read beyond the one element that they become.
    """
    x, t = torch._efficientzerotensor((2, 3, 4)), torch._efficientzerotensor((1, 2, 3, 4))
    gamma, dense = torch.rand(3), torch.zeros(2, 3, 4)
    assert torch.equal(ops.instance_norm_plus(x, gamma), ops.instance_norm_plus(dense, gamma))
    assert not ops.instance_norm_plus_dual(torch.randn(2, 3, 4), t, gamma)[1].any()
    assert torch.equal(activate_dual(x, "gelu"), torch.zeros(2, 3, 4))


@pytest.mark.parametrize(
    "coefficient", [torch.tensor([0.5]), torch.tensor(0.5), 0.5], ids=["(1,)", "0-d", "a number"]
)
def test_a_sample_without_dimensions_takes_a_coefficient_per_sample(backend, coefficient):
    x, z = torch.tensor(2.0), torch.tensor(-1.0)
    assert fastscore.perturb(x, coefficient, noise=z).item() == 1.5
    y = fastscore.noisy_update(x, z, coefficient, 0.0, seed=0)
    assert y.shape == () and y.item() == 1.5


@pytest.mark.parametrize("op", OPS)
def test_tensors_with_the_negative_bit_are_read_as_what_they_are(backend, op):
    """Every tensor of a call, `out` too.

    PyTorch's dispatcher, which takes the bit away, is left out of a launch on Triton.
    """
    for seed in range(6):
        draw, plain = (OPS[op].draw(Draw(seed)) for _ in range(2))
        negative = {
            k: torch._neg_view(-v) if isinstance(v, torch.Tensor) and v.is_floating_point() else v
            for k, v in draw.items()
        }
        torch.manual_seed(seed)
        found = pytree.tree_leaves(OPS[op].call(**negative))
        torch.manual_seed(seed)
        expected = pytree.tree_leaves(OPS[op].call(**plain))
        assert all(
            torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
            for a, b in zip(found, expected, strict=True)
        )


def test_out_may_have_the_negative_bit(backend):
    x, out = torch.randn(3, 4), torch._neg_view(torch.zeros(3, 4))
    assert (
        torch.equal(fastscore.perturb(x, 0.5, seed=1, out=out), fastscore.perturb(x, 0.5, seed=1))
        and out.is_neg()
    )


if __name__ == "__main__":
    for name in sys.argv[1].split(",") if sys.argv[1] != "all" else OPS:
        counts, examples = run(OPS[name], range(int(sys.argv[2])), available(), 50)
        print(name, dict(counts))
        print("\n".join(examples[: int(sys.argv[3]) if len(sys.argv) > 3 else 12]))
