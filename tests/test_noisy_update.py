"""noisy_update, langevin_step, perturb.

Value against float64, derivatives, layouts, laws, errors.
"""

import itertools
import math
import sys

import numpy as np
import pytest
import torch
import torch._dynamo.testing
from torch.autograd import gradcheck, gradgradcheck

import fastscore
from fastscore import backend as backends
from fastscore import random

KEY = {"seed": 2**33 + 1, "step": 5, "offset": 3}
# float64 draws z in float32
ULP = {torch.float32: 2**-23, torch.float64: 2**-23, torch.bfloat16: 2**-8, torch.float16: 2**-10}


def layouts(x):
    yield pytest.param(x, id="contiguous")
    yield pytest.param(x.to(memory_format=torch.channels_last), id="channels-last")
    yield pytest.param(x.transpose(1, 3), id="transposed")
    yield pytest.param(torch.cat([x, x])[3:, :, 1:], id="storage-offset")
    yield pytest.param(x[:1].expand(4, -1, -1, -1), id="expanded")
    yield pytest.param(x[:0], id="empty")


def exact(x, s, a, b, key=KEY, stream=random.LANGEVIN):
    z = random.normal(x.shape, stream=stream, dtype=torch.float64, backend="reference", **key)
    shape = (-1,) + (1,) * (x.dim() - 1)
    a, b = (
        c.double().reshape(shape) if isinstance(c, torch.Tensor) and c.dim() else c for c in (a, b)
    )
    return x.double() + a * s.double() + b * z


@pytest.mark.parametrize("dtype", ULP, ids=str)
@pytest.mark.parametrize("x", list(layouts(torch.randn(5, 3, 6, 7))))
@pytest.mark.parametrize("coefficient", ["float", "0-d", "per-sample"])
def test_value_on_every_layout(backend, dtype, x, coefficient):
    x = x.to(dtype)
    s = torch.randn_like(x)
    a, b = {"float": (0.3, 0.7), "0-d": (torch.tensor(0.3), 0.7)}.get(
        coefficient, (torch.rand(len(x)), torch.rand(len(x)))
    )
    y = fastscore.noisy_update(x, s, a, b, **KEY)
    assert y.dtype == dtype and y.stride() == torch.empty_like(x).stride()
    expected = exact(x, s, a, b)
    # Half a unit of the last place, and three float32 operations and 1e-6 of noise before it.
    bound = ULP[dtype] * expected.abs() + 3e-6
    assert bool(((y.double() - expected).abs() <= bound).all())


@pytest.mark.parametrize("d", [1, 2, 3, 127, 128, 1000, 4097])
def test_per_sample_coefficients_at_every_sample_size(backend, d):
    b = 40 if d < 1000 else 5
    x, s, e = torch.randn(b, d), torch.randn(b, d), torch.rand(b)
    y = fastscore.langevin_step(x, s, e, **KEY)
    assert torch.allclose(y.double(), exact(x, s, e / 2, e.sqrt()), rtol=1e-6, atol=3e-6)


def test_large_tensors_take_the_streaming_path():
    x, s = torch.randn(2**22 + 5), torch.randn(2**22 + 5)
    y = fastscore.noisy_update(x, s, 0.1, 0.2, backend="cpp", seed=1)
    assert torch.equal(
        y[:1000], fastscore.noisy_update(x[:1000], s[:1000], 0.1, 0.2, backend="cpp", seed=1)
    )
    assert torch.allclose(y.double(), exact(x, s, 0.1, 0.2, {"seed": 1}), atol=3e-6)


def test_out_may_be_the_state_another_layout_or_an_overlapping_view(backend):
    base = torch.randn(6, 4)
    expected = fastscore.langevin_step(base, -base, 0.1, **KEY)
    x = base.clone()
    assert fastscore.langevin_step(x, -x, 0.1, out=x, **KEY) is x and torch.equal(x, expected)
    out = torch.empty(4, 6).t()
    assert torch.equal(fastscore.langevin_step(base, -base, 0.1, out=out, **KEY), expected)
    storage = torch.cat([base.flatten(), torch.zeros(1)])
    shifted = fastscore.langevin_step(
        storage[:24].view(6, 4), -base, 0.1, out=storage[1:].view(6, 4), **KEY
    )
    assert torch.equal(shifted, expected)


def test_out_may_overlap_anything(backend):
    n = 300 if backend == "triton" else 3000
    memory, x = torch.rand(4 * n), torch.randn(4, n)
    expected = fastscore.perturb(x, memory[:4].clone(), seed=1)
    assert torch.equal(fastscore.perturb(x, memory[:4], seed=1, out=memory.view(4, n)), expected)
    array = np.random.default_rng(0).standard_normal(n + 1, dtype=np.float32)
    x, out = torch.from_numpy(array[:n]), torch.from_numpy(array[1:])   # one memory, two storages
    expected = fastscore.perturb(x.clone(), 0.3, seed=1)
    assert torch.equal(fastscore.perturb(x, 0.3, seed=1, out=out), expected)
    with pytest.raises(ValueError, match="out must not share memory between its elements"):
        fastscore.perturb(torch.zeros(4, 4), 0.3, seed=1, out=torch.zeros(7).unfold(0, 4, 1))


@pytest.mark.parametrize("terms", ["x", "direction", "both"])
def test_a_split_batch_is_the_whole_batch_to_the_bit(terms):
    """Whole groups and pieces of groups take different loops.

    So do -0 and terms that are not there.
    """
    step = sys.modules["fastscore.ops.noisy_update"]
    x, d = torch.randn(1000), torch.randn(1000)
    x[::7], d[::5] = -0.0, -0.0
    x, d = x if terms != "direction" else None, d if terms != "x" else None
    a = 0.3 if terms != "x" else 0.0   # without a direction there is no drift
    for b in (0.7, 0.0):
        whole = step.run(x, d, a, b, None, (1, 0, 2, 5), "cpp")
        for size in (1, 16, 100, 300):
            parts = [
                step.run(
                    *(None if t is None else t[i : i + size] for t in (x, d)),
                    a,
                    b,
                    None,
                    (1, 0, 2, 5 + i),
                    "cpp",
                )
                for i in range(0, 1000, size)
            ]
            assert torch.equal(torch.cat(parts).view(torch.int32), whole.view(torch.int32)), (
                b,
                size,
            )


def test_derivatives_of_every_input_in_every_mode(backend):
    x, s = (torch.randn(2, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    a, b = (torch.rand(2, dtype=torch.float64, requires_grad=True) for _ in range(2))

    def f(x, s, a, b):
        return fastscore.noisy_update(x, s, a, b, **KEY)

    assert gradcheck(f, (x, s, a, b), check_forward_ad=True)
    assert gradgradcheck(f, (x, s, a, b), check_fwd_over_rev=True)


@pytest.mark.parametrize(
    "nesting", ["".join(c) for k in (2, 3) for c in itertools.product("FR", repeat=k)]
)
def test_every_nesting_of_transforms(backend, nesting):
    """F: jvp, R: grad, inner to outer, against plain PyTorch on the given noise, to the noise in
    float32 that higher orders amplify."""
    torch.manual_seed(0)
    x = torch.randn(3, 4).double()
    v, z = (
        torch.ones_like(x).cumsum(-1) / 4,
        random.normal((3, 4), stream=random.LANGEVIN, dtype=torch.float64, **KEY),
    )

    def nested(key):
        def f(x):
            return fastscore.noisy_update(
                x.sin(), x.cos() * x, x.sum(1).sin(), x.sum(1).cos(), **key
            )

        wrap = {
            "F": lambda f: lambda x: torch.func.jvp(f, (x,), (v * x.cos(),))[1],
            "R": lambda f: torch.func.grad(lambda x: f(x).sin().sum()),
        }
        for letter in nesting:
            f = wrap[letter](f)
        return f(x)

    expected = nested({"noise": z})
    assert float((nested(KEY) - expected).abs().max()) < 1e-3 * float(expected.abs().max())


def test_transforms_agree_with_plain_pytorch(backend):
    x, z = torch.randn(4, 3, 5), random.normal((3, 5), stream=1, dtype=torch.float32, **KEY)
    rows = torch.vmap(lambda x: fastscore.langevin_step(x, x.sin(), 0.1, **KEY))(x)
    assert torch.allclose(rows, x + 0.05 * x.sin() + 0.1**0.5 * z, atol=2e-6)
    jacobian = torch.func.jacfwd(lambda x: fastscore.langevin_step(x, x.sin(), 0.1, **KEY))(x[0])
    assert torch.allclose(
        jacobian.reshape(15, 15), torch.diag(1 + 0.05 * x[0].cos().flatten()), atol=1e-6
    )
    hessian = torch.func.hessian(lambda x: fastscore.langevin_step(x, x.sin(), 0.1, **KEY).sum())(
        x[0]
    )
    assert torch.allclose(
        hessian.reshape(15, 15), torch.diag(-0.05 * x[0].sin().flatten()), atol=1e-6
    )


def test_compiled_equals_eager_for_many_steps_without_recompiling_each(backend):
    if backend == "triton":
        pytest.skip("the interpreter cannot be compiled")
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("inductor")

    @torch.compile(fullgraph=True, backend=counter)
    def f(x, s, step):
        return fastscore.langevin_step(x, s, 0.1, seed=4, step=step)

    for step in range(12):
        x, s = torch.randn(3, 5, requires_grad=True), torch.randn(3, 5, requires_grad=True)
        y = f(x, s, step)
        assert torch.allclose(y, fastscore.langevin_step(x, s, 0.1, seed=4, step=step), atol=2e-6)
        assert torch.allclose(torch.autograd.grad(y.sum(), s)[0], torch.full((3, 5), 0.05))
    assert counter.frame_count <= 2
    tangent = torch.compile(
        lambda x, t: torch.func.jvp(lambda x: fastscore.perturb(x.sin(), 0.3, **KEY), (x,), (t,))[
            1
        ],
        fullgraph=True,
    )
    assert torch.allclose(tangent(x, s), x.cos() * s)


def raw_arguments(x):
    return torch.empty_like(x), x, x, None, 0.1, None, 0.1, None, 0, 0, 1, 0


def test_raw_op_refuses_derivatives_and_passes_opcheck(backend):
    if backend == "reference":
        pytest.skip("plain PyTorch, no raw op")
    op, x = backends.raw(backend, "noisy_update"), torch.randn(3, 4)
    torch.library.opcheck(op, raw_arguments(x))
    with pytest.raises(NotImplementedError, match="has no forward-mode rule"):
        torch.func.jvp(lambda x: (op(*raw_arguments(x)), x)[1], (x,), (x,))
    with pytest.raises(NotImplementedError, match="has no derivative rule"):
        op(*raw_arguments(x.clone().requires_grad_()))


def test_given_noise_makes_the_step_deterministic(backend):
    x, s = torch.randn(4, 5), torch.randn(4, 5)
    z = random.normal((4, 5), stream=1, **KEY)
    got = fastscore.langevin_step(x, s, 0.2, noise=z)
    assert torch.allclose(got, fastscore.langevin_step(x, s, 0.2, **KEY), atol=2e-6)


def test_perturb_uses_its_own_stream(backend):
    z = fastscore.perturb(torch.zeros(50), 1.0, **KEY)
    assert torch.allclose(z, random.normal((50,), stream=random.PERTURB, **KEY), atol=1e-6)


@pytest.mark.parametrize("ratio", [0.05, 0.5, 2.0])
def test_stationary_variance_matches_closed_form(backend, ratio):
    n, steps = (2**20, 60 if ratio >= 0.5 else 120) if backend == "cpp" else (2**14, 30)
    variance = 2.25
    epsilon, target = ratio * variance, variance / (1 - ratio / 4)
    # Start in the stationary law (any backend), so that few steps are enough; a wrong drift or
    # noise moves it at once.
    x = math.sqrt(target) * random.normal((n,), seed=9, stream=1024, backend="cpp")
    for step in range(steps):
        fastscore.langevin_step(x, -x / variance, epsilon, seed=7, step=step, out=x)
    assert abs(float(x.double().var()) - target) < 5 * target * math.sqrt(2 / n)


X = torch.zeros(4, 3)


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda: fastscore.langevin_step(X, X[:2], 0.1),
            r"score must have the shape of x, \(4, 3\); got \(2, 3\)",
        ),
        (lambda: fastscore.langevin_step(X, X.double(), 0.1), "score must have the dtype of x"),
        (lambda: fastscore.langevin_step(X, X.to("meta"), 0.1), "score must be on the device of x"),
        (
            lambda: fastscore.langevin_step(X, X, -0.1),
            "step_size must be finite and >= 0; got -0.1",
        ),
        (lambda: fastscore.langevin_step(X, X, math.nan), "step_size must be finite"),
        (lambda: fastscore.noisy_update(X, X, 1e300, 0.1), "drift must be finite"),
        (
            lambda: fastscore.langevin_step(X, X, torch.tensor([1, 1, 1, math.inf])),
            "step_size must be finite",
        ),
        (lambda: fastscore.langevin_step(X, X, torch.ones(3)), r"must be a number, 0-d or \(4,\)"),
        (lambda: fastscore.langevin_step(X.int(), X, 0.1), "x must be float32"),
        (lambda: fastscore.perturb(X, -1.0), "sigma must be finite and >= 0"),
        (
            lambda: fastscore.noisy_update(X, X, 0.1, 0.1, noise=X, seed=1),
            "give noise or seed, not both",
        ),
        (
            lambda: fastscore.noisy_update(
                X.clone().requires_grad_(), X, 0.1, 0.1, out=torch.zeros(4, 3)
            ),
            "out= cannot be",
        ),
        (
            lambda: fastscore.noisy_update(X, X, 0.1, 0.1, out=torch.zeros(1, 3).expand(4, 3)),
            "out must not share memory",
        ),
        (lambda: fastscore.noisy_update(X, X, 0.1, 0.1, backend="tpu"), "backend must be one of"),
        (
            lambda: fastscore.noisy_update(X, X, 0.1, 0.1, backend="cuda"),
            "'cuda' was requested for a tensor on cpu but",
        ),
    ],
)
def test_bad_arguments_are_refused_in_one_sentence(call, message):
    with pytest.raises((ValueError, TypeError), match=message) as error:
        call()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "block", [2**32 - 3, 2**32 - 600, 2**32, 2**33 + 512, 5 * 2**32 + 7], ids=hex
)
def test_blocks_beyond_two_to_the_32(backend, dtype, block):
    """Inside a program of 512 or 1024 blocks, before it, at its start.

    The counter's upper half is carried to.
    """
    x, s = torch.zeros(5000, dtype=dtype), torch.ones(5000, dtype=dtype)
    z = random.normal(
        5000,
        seed=9,
        stream=random.LANGEVIN,
        offset=4 * block + 1,
        dtype=torch.float64,
        backend="reference",
    )
    got = fastscore.langevin_step(x, s, 0.5, seed=9, offset=4 * block + 1).double()
    assert bool(
        ((got - (0.25 + 0.5**0.5 * z)).abs() <= torch.finfo(dtype).eps * got.abs() + 2e-6).all()
    )
