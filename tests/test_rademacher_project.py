"""rademacher_jvp: signs, projections and their transpose, derivatives, exactness, variance."""

import math

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

import fastscore
from fastscore import backend as backends
from fastscore import random
from fastscore.ops.rademacher_project import _layout, project, project_ref, run_spread, signs

KEY = {"seed": 2**40 + 3, "step": 2}
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def numbers(offset=0):
    _, *rest = random.noise_key(
        "test", KEY["seed"], KEY["step"], random.PROJECTION, 0, offset, torch.device("cpu")
    )
    return tuple(rest)


def exact_signs(shape, projections, offset=0):
    key = KEY | {
        "stream": random.PROJECTION,
        "offset": offset,
        "dtype": torch.float64,
        "backend": "reference",
    }
    return torch.stack([random.rademacher(shape, substream=m, **key) for m in range(projections)])


def chosen():
    return backends.choose(torch.device("cpu"))


def layouts():
    x = torch.randn(2, 6, 3, 8, 10, generator=torch.Generator().manual_seed(0))
    yield pytest.param(x, id="contiguous")
    yield pytest.param(x.movedim(2, -1).contiguous().movedim(-1, 2), id="channels-last")
    yield pytest.param(x.transpose(2, 4), id="transposed")
    yield pytest.param(torch.cat([x, x], 1)[:, 3:, :, 1:], id="storage-offset")
    yield pytest.param(x[..., ::2], id="every-second")
    yield pytest.param(x[:1, :, :, :, :1].expand(3, 6, 3, 8, 10), id="expanded")
    yield pytest.param(torch.randn(3, 4), id="sample-of-no-dimension")
    yield pytest.param(torch.randn(2, 300, 2), id="runs-of-short-samples")
    yield pytest.param(torch.randn(2, 3, 1025), id="words-and-rest")
    yield pytest.param(torch.randn(1, 2, 20_000), id="several-chunks")
    yield pytest.param(torch.randn(2, 0, 4), id="no-samples")
    yield pytest.param(torch.randn(2, 3, 0), id="empty-samples")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("js", list(layouts()))
@pytest.mark.parametrize("offset", [0, 2**33 + 77, 2**34 - 7])
def test_value_and_transpose_equal_those_of_float64(backend, js, dtype, offset):
    if backend != "cpp" and offset != 2**34 - 7:
        pytest.skip("one offset is enough for what is slow")
    js = js.to(dtype)
    s, v, key = (
        js[0].flip(0) if len(js) > 1 else js[0] + 1,
        exact_signs(js.shape[1:], len(js), offset),
        (None, numbers(offset), backend),
    )
    assert torch.equal(signs(s, len(js), *key).double(), v)
    got, expected = project(s, js, *key), project_ref(s.double(), js.double(), v)
    # 16 running sums of at most 8192 / 16 terms in float32: each term is rounded as often, and 2e-7
    # is a rounding at 2.
    scale = js.double().abs().sum() / max(1, js.shape[0] * js.shape[1]) + 1
    for a, b in zip(got, expected):
        assert a.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert torch.allclose(a.double(), b, rtol=1e-6, atol=float(scale) * 2e-6)
    for a, b in zip(
        (project(None, js, *key)[0], *project(s, None, *key, projections=len(js))[1:]), got
    ):
        assert torch.equal(a, b)

    g = [torch.rand_like(o) - 0.5 for o in got]
    layout = (_layout(js), _layout(s))
    gjs, gs = run_spread(*g, s, layout, len(js), *key)
    exact = (
        g[0].double()[(...,) + (None,) * (s.dim() - 1)] * v if s.dim() > 1 else g[0].double() * v
    )
    assert torch.allclose(gjs.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-30)
    exact = torch.func.vjp(lambda s: project_ref(s, None, v)[1:], s.double())[1](
        tuple(t.double() for t in g[1:])
    )[0]
    assert torch.allclose(
        gs.double(),
        exact,
        rtol=torch.finfo(dtype).eps,
        atol=2e-6 if dtype != torch.float64 else 1e-12,
    )
    if js.is_contiguous():
        assert gjs.is_contiguous() and gs.is_contiguous()


@pytest.mark.parametrize("projections", [1, 2])
def test_derivatives_in_every_mode(backend, projections):
    torch.manual_seed(0)
    # Along one random direction: the interpreter takes seconds for all of them.
    fast = {"fast_mode": backend == "triton"}
    n = 2 if backend == "triton" else 5
    s = torch.randn(2, n, dtype=torch.float64, requires_grad=True)
    js = torch.randn(projections, 2, n, dtype=torch.float64, requires_grad=True)
    key = (None, numbers(3), backend)
    for f, inputs in (
        (lambda s, js: project(s, js, *key), (s, js)),
        (lambda js: project(None, js, *key)[0], (js,)),
        (lambda s: project(s, None, *key, projections=projections)[1:], (s,)),
    ):
        assert gradcheck(f, inputs, check_forward_ad=True, **fast)
        assert gradgradcheck(f, inputs, check_fwd_over_rev=True, check_rev_over_rev=True, **fast)


def test_hessian_and_vmap(backend):
    s, v = torch.randn(2, 3, dtype=torch.float64), exact_signs((2, 3), 2)
    key = (None, numbers(), backend)

    def loss(s):
        _, vs, ss = project(s, None, *key, projections=2)
        return vs.square().sum() / 2 + ss.sum() / 2

    expected = torch.einsum("mbi,mbj->bij", v, v) + torch.eye(3, dtype=torch.float64)
    forward, reverse = torch.func.jacfwd, torch.func.jacrev
    for outer, inner in (
        (forward, reverse),
        (reverse, reverse),
        (forward, forward),
        (reverse, forward),
    ):
        got = outer(inner(loss))(s)
        assert torch.allclose(torch.stack([got[b, :, b] for b in range(2)]), expected)
        assert not got[0, :, 1].any()
    rows = torch.vmap(lambda s: project(s, torch.stack([s, -s]), *key))(torch.stack([s, 3 * s]))
    for row, one, three in zip(
        rows, *(project_ref(t, torch.stack([t, -t]), v) for t in (s, 3 * s))
    ):
        assert torch.allclose(row, torch.stack([one, three]))


def test_forward_mode_nests(backend):
    """Plain operations in a jvp rule would drop what the outer levels ask for."""
    s, t, v = (
        torch.randn(2, 3, dtype=torch.float64),
        torch.randn(2, 3, dtype=torch.float64),
        exact_signs((2, 3), 2),
    )

    def third(project):
        def f(s):
            vjv, vs, ss = project(s.sin(), torch.stack([s.exp(), s * s]))
            return (vjv * vs).sum() * ss.sum()

        def along(f, times):
            return f if times == 0 else along(lambda s: torch.func.jvp(f, (s,), (t,))[1], times - 1)

        return along(f, 3)(s), torch.func.grad(along(f, 2))(s), along(torch.func.grad(f), 2)(s)

    got = third(lambda s, js: project(s, js, None, numbers(), backend))
    for a, b in zip(got, third(lambda s, js: project_ref(s, js, v))):
        assert torch.allclose(a, b)


def test_compiled_products_equal_eager_products(backend):
    if backend == "triton":
        pytest.skip("the interpreter cannot be compiled")
    x = torch.randn(4, 6, requires_grad=True)

    def loss(x, step):
        key, *rest = random.noise_key("test", 5, step, random.PROJECTION, 0, 0, x.device)
        vjv, vs, ss = project(x.sin(), torch.stack([x.cos(), x]), key, tuple(rest), chosen())
        return (vjv * vs).sum() + (ss * vs[0]).sum()

    compiled = torch.compile(loss, fullgraph=True)
    for step in range(3):
        a, b = (torch.autograd.grad(f(x, step), x)[0] for f in (compiled, loss))
        assert torch.allclose(a, b, atol=1e-5)


def test_compiled_estimate_equals_eager_estimate(backend):
    if backend == "triton":
        pytest.skip("the interpreter cannot be compiled")
    net, x = (
        torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3)),
        torch.randn(4, 3),
    )
    f = lambda x: fastscore.rademacher_jvp(net, x, seed=4)  # noqa: E731
    for a, b in zip(torch.compile(f)(x), f(x)):   # the network runs eagerly, between two graphs
        assert torch.allclose(a, b, atol=1e-6)


def test_no_signs_and_no_products_are_kept_for_the_backward_pass(backend):
    s, js, kept = (
        torch.randn(4, 50, requires_grad=True),
        torch.randn(2, 4, 50, requires_grad=True),
        [],
    )
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        project(s, js, None, numbers(), backend)
    assert [t.data_ptr() for t in kept] == [s.data_ptr()]


def test_gradients_have_the_layout_of_their_inputs(backend):
    s = torch.randn(3, 4, 5, 6).to(memory_format=torch.channels_last).requires_grad_()
    js = torch.randn(2, 3, 5, 6, 4).movedim(-1, 2).requires_grad_()
    vjv, vs, ss = project(s, js, None, numbers(), backend)
    gs, gjs = torch.autograd.grad(vjv.sum() + vs.sum() + ss.sum(), (s, js))
    assert gs.stride() == s.stride() and gjs.stride() == js.stride()


def linear(a):
    return lambda x: x @ a.to(x.dtype).T


def test_trace_is_exact_for_every_draw_when_jacobian_is_diagonal(backend):
    d = torch.tensor([1.5, -2.0, 0.25, 8.0])
    y, vjv = fastscore.rademacher_jvp(lambda x: d * x, torch.ones(10, 4), projections=20, seed=0)
    assert torch.equal(y, d.expand(10, 4)) and torch.equal(vjv, torch.full((20, 10), 7.75))


def test_mean_is_the_trace_and_variance_is_that_of_the_off_diagonal_part(backend):
    """Within 5 standard errors each (5.7e-7), seed 1.

    The fourth moment is exact, from all 2^4 sign patterns.
    """
    a = torch.tensor(
        [[1.0, 0.3, -0.8, 0.1], [0.5, -2.0, 0.4, 0.0], [0.2, 0.9, 0.5, -0.7], [0.0, 0.6, 0.3, 1.5]],
        dtype=torch.float64,
    )
    n, symmetric = (2**20 if backend == "cpp" else 2**10), (a + a.T) / 2
    off = symmetric - symmetric.diagonal().diag()
    variance = 2 * float(off.square().sum())
    patterns = torch.tensor(
        [[1.0 - 2 * (k >> i & 1) for i in range(4)] for k in range(16)], dtype=torch.float64
    )
    fourth = float(torch.einsum("ki,ij,kj->k", patterns, off, patterns).pow(4).mean())
    estimates = fastscore.rademacher_jvp(
        linear(a), torch.zeros(n, 4, dtype=torch.float64), projections=2, seed=1
    )[1].flatten()
    assert abs(float(estimates.mean() - a.trace())) < 5 * math.sqrt(variance / (2 * n))
    assert abs(float((estimates - a.trace()).square().mean()) - variance) < 5 * math.sqrt(
        (fourth - variance**2) / (2 * n)
    )


def test_projections_are_uncorrelated():
    """Correlation of two projections of 2^20 samples: its standard error is 2^-10."""
    a = torch.tensor([[0.0, 1.0], [0.0, 0.0]])
    one, two = fastscore.rademacher_jvp(linear(a), torch.zeros(2**20, 2), projections=2, seed=2)[1]
    assert abs(float((one * two).mean())) < 5 * 2**-10


def net(width=6):
    torch.manual_seed(3)
    return torch.nn.Sequential(
        torch.nn.Linear(width, 16), torch.nn.Tanh(), torch.nn.Linear(16, width)
    ).double()


def test_estimate_and_its_gradient_equal_double_backprop(backend):
    f, x = net(), torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    v = exact_signs((5, 6), 3, 7)
    y, vjv = fastscore.rademacher_jvp(f, x, projections=3, offset=7, **KEY)
    rows = [torch.autograd.grad(f(x), x, u, create_graph=True)[0] for u in v]
    expected = torch.stack([(row * u).sum(1) for row, u in zip(rows, v)])
    assert torch.allclose(y, f(x)) and torch.allclose(vjv, expected)
    inputs = (x, *f.parameters())
    found, wanted = (
        torch.autograd.grad((t.square() + t).sum(), inputs, retain_graph=True, allow_unused=True)
        for t in (vjv, expected)
    )
    for a, b in zip(found, wanted):
        assert (a is None) == (b is None) or not (b if a is None else a).any()
        assert a is None or b is None or torch.allclose(a, b)


def test_given_directions_are_deterministic_plain_products(backend):
    f, x, v = (
        net(),
        torch.randn(5, 6, dtype=torch.float64),
        torch.randn(2, 5, 6, dtype=torch.float64),
    )
    jacobian = torch.func.vmap(torch.func.jacrev(f))(x)
    expected = torch.einsum("mbi,bij,mbj->mb", v, jacobian, v)
    assert torch.allclose(fastscore.rademacher_jvp(f, x, v=v)[1], expected)
    assert torch.allclose(fastscore.rademacher_jvp(f, x, v=v[0])[1], expected[:1])


def test_any_split_of_a_batch_gives_the_same_bits(backend):
    f, x = linear(torch.randn(7, 7)), torch.randn(50, 7)
    whole = fastscore.rademacher_jvp(f, x, projections=2, **KEY)[1]
    edges = ((0, 1), (1, 20), (20, 50))
    parts = [
        fastscore.rademacher_jvp(f, x[a:b], projections=2, offset=7 * a, **KEY)[1] for a, b in edges
    ]
    # The product of matrices is not the same to the bit.
    assert torch.allclose(torch.cat(parts, 1), whole, atol=1e-5)


@pytest.mark.parametrize("d", [1, 7, 17, 31, 32, 100])
def test_any_split_sums_the_same_bits(backend, d):
    """One sample alone and many, shorter than a vector and longer."""
    x, js, edges = torch.randn(50, d), torch.randn(2, 50, d), ((0, 1), (1, 20), (20, 49), (49, 50))
    for s in (x, None):
        whole = project(s, js, None, numbers(), backend)
        parts = [
            project(None if s is None else s[a:b], js[:, a:b], None, numbers(d * a), backend)
            for a, b in edges
        ]
        for w, p in zip(whole, zip(*parts)):
            assert w is None or torch.equal(w, torch.cat(p, -1))


@pytest.mark.parametrize("shape", [(2, 100_000), (5000, 2), (300, 100)], ids=str)
def test_threads_do_not_change_a_bit(shape):
    s, js, before, values = torch.randn(shape), torch.randn(2, *shape), torch.get_num_threads(), []
    backends.choose(s.device, "cpp")
    try:
        for threads in (1, 2, 7):
            torch.set_num_threads(threads)
            sums = project(s, js, None, numbers(9), "cpp")
            values.append(
                (
                    *sums,
                    *run_spread(*sums, s, (_layout(js), _layout(s)), 2, None, numbers(9), "cpp"),
                )
            )
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in values[1:] for a, b in zip(values[0], other))


def test_key_may_be_a_tensor_and_no_seed_follows_torch_manual_seed(backend):
    f, x = linear(torch.randn(3, 3)), torch.randn(4, 3)
    tensors = {"seed": torch.tensor(KEY["seed"]), "step": torch.tensor(KEY["step"])}
    assert torch.equal(
        fastscore.rademacher_jvp(f, x, **tensors)[1], fastscore.rademacher_jvp(f, x, **KEY)[1]
    )
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(fastscore.rademacher_jvp(f, x, projections=8)[1])
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


def test_raw_ops_refuse_derivatives_and_pass_opcheck(backend):
    if backend == "reference":
        pytest.skip("plain PyTorch, no raw op")
    s, js, key = torch.randn(3, 4), torch.randn(2, 3, 4), (2, None, 0, 0, random.PROJECTION, 0)
    forward, backward = (
        backends.raw(backend, "rademacher_project"),
        backends.raw(backend, "rademacher_spread"),
    )
    outputs, cotangents = (
        (torch.empty(2, 3), torch.empty(2, 3), torch.empty(3)),
        (torch.rand(2, 3), torch.rand(2, 3), torch.rand(3)),
    )
    torch.library.opcheck(forward, (*outputs, js, s, *key))
    torch.library.opcheck(
        forward, (outputs[0], None, None, js, None, *key[:1], torch.tensor([3, 1]), *key[2:])
    )
    torch.library.opcheck(
        backward, (torch.empty_like(js), torch.empty_like(s), *cotangents, s, *key)
    )
    torch.library.opcheck(
        backward, (torch.empty_like(js), None, cotangents[0], None, None, None, *key)
    )
    for op, arguments, at in (
        (forward, (*outputs, js, s, *key), (3, 4)),
        (backward, (js, s, *cotangents, s.clone(), *key), (2, 3, 4, 5)),
    ):
        for i in at:
            before, x, after = arguments[:i], arguments[i], arguments[i + 1 :]
            with pytest.raises(NotImplementedError, match="has no forward-mode rule"):
                torch.func.jvp(
                    lambda x, op=op, a=before, b=after: (op(*a, x, *b), a[0])[1], (x,), (x,)
                )
            with pytest.raises(NotImplementedError, match="has no derivative rule"):
                op(*before, x.clone().requires_grad_(), *after)


X = torch.zeros(2, 3)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (
            lambda: fastscore.rademacher_jvp(torch.sin, torch.zeros(())),
            ValueError,
            r"x must be \(B, \*\)",
        ),
        (
            lambda: fastscore.rademacher_jvp(torch.sin, torch.zeros(2, dtype=torch.int64)),
            TypeError,
            "x must be float32",
        ),
        (
            lambda: fastscore.rademacher_jvp(torch.sin, X, v=X, seed=1),
            ValueError,
            "give v or seed, not both",
        ),
        (
            lambda: fastscore.rademacher_jvp(torch.sin, X, v=X[:1]),
            ValueError,
            r"v must have the shape of x, \(2, 3\), or \(M, \*\)",
        ),
        (
            lambda: fastscore.rademacher_jvp(torch.sin, X, v=X.double()),
            ValueError,
            "v must be torch.float32",
        ),
        (
            lambda: fastscore.rademacher_jvp(torch.sin, X, projections=0),
            ValueError,
            "projections must be an int in 1..65536; got 0",
        ),
        (
            lambda: fastscore.rademacher_jvp(torch.sin, X, offset=-1),
            ValueError,
            "offset must be an int",
        ),
        (
            lambda: fastscore.rademacher_jvp(lambda x: x.sum(1), X),
            ValueError,
            r"f\(x\) must have the shape of x, \(2, 3\); got \(2,\)",
        ),
    ],
)
def test_bad_arguments(call, error, message):
    with pytest.raises(error, match=f"^(rademacher_jvp|jvp): {message}"):
        call()
