"""The normalisations.

Values against float64, every derivative against the reference, layouts, numerics, errors.
"""

import functools
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck

import fastscore
from fastscore import backend as backends
from fastscore.ops.activations import ACTIVATIONS, OF_NORMS
from fastscore.ops.normalise import Form, normalise
from fastscore.ops.normalise_core import (
    _dual_ref,
    _gradient_ref,
    _scatter_by_product,
    normalise_ref,
    run_backward,
    run_forward,
)
from fastscore.ops.normalise_functions import _normalise

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
FORMS = [
    (0, True, True),
    (0, True, False),
    (0, False, True),
    (0, False, False),
    (2, False, True),
    (1, False, False),
    (6, False, True),
]


def problem(form, shape=(3, 6, 5, 7), rows=None, dtype=torch.float64, seed=0):
    """x, coefficients (rows, KC) and a form.

    Means differ between channels, so the channel term matters.
    """
    groups, alpha, beta, activation = form
    generator = torch.Generator().manual_seed(seed)
    B, C = shape[:2]

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    x = draw(*shape) * 1.5 + draw(B, C, *[1] * (len(shape) - 2))
    coef = 1 + 0.5 * draw(B if rows is None else rows, C * (1 + alpha + beta))
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    return x, coef.to(compute), Form(groups, alpha, beta, 1e-5, activation), draw


def stock(x, coef, form):
    """What PyTorch's own layers give in x's dtype: the yardstick for rounding."""
    C = x.shape[1]
    gamma, *rest = (c.to(x.dtype).reshape(-1, C, *[1] * (x.dim() - 2)) for c in coef.split(C, -1))
    h = (
        F.group_norm(x, form.groups, eps=form.eps)
        if form.groups
        else F.instance_norm(x, eps=form.eps)
    )
    if form.alpha:
        means = x.flatten(2).mean(-1)
        m = (means - means.mean(1, keepdim=True)) / (means.var(1, keepdim=True) + form.eps).sqrt()
        h = h + rest.pop(0) * m.reshape(*m.shape, *[1] * (x.dim() - 2))
    y = gamma * h
    return ACTIVATIONS[form.activation].function(y + rest.pop(0) if rest else y)


def layouts(x):
    yield "contiguous", x
    yield "channels-last", x.movedim(1, -1).contiguous().movedim(-1, 1)
    yield "transposed", x.transpose(-1, -2).contiguous().transpose(-1, -2)
    yield "sliced", torch.cat([x, x], -1)[..., : x.shape[-1]]
    yield "offset", torch.cat([x[:1], x])[1:]


SHAPES = [
    pytest.param((3, 6, 5, 7), id="tails"),
    pytest.param((2, 48, 4, 8), id="whole-vectors"),
    pytest.param((2, 42, 9, 13), id="several-pieces-and-two-vectors-side-by-side"),
    pytest.param((1, 6, 70, 71), id="one-sample-in-phases"),
    pytest.param((2, 6, 1, 1), id="one-pixel"),
    pytest.param((5, 6, 3), id="one-dimension"),
    pytest.param((2, 18, 2, 3, 3), id="three-dimensions"),
    pytest.param((1, 6, 9000), id="several-chunks"),
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_value_is_as_close_to_float64_as_pytorch_is(backend, dtype, shape):
    if backend == "triton" and (dtype == torch.float16 or len(shape) == 5):
        pytest.skip("covered by the other dtypes and shapes; the interpreter is slow")
    # Several programs: two forms suffice.
    large = backend == "triton" and torch.Size(shape).numel() > 5000
    if large and dtype == torch.float64:
        pytest.skip("covered by float32; the interpreter is slow")
    for (groups, alpha, beta), activation in list(zip(FORMS, itertools.cycle(OF_NORMS)))[
        :: 4 if large else 1
    ]:
        x, coef, form, _ = problem((groups, alpha, beta, activation), shape, dtype=dtype)
        exact = normalise_ref(x.double(), coef.double(), None, form)
        theirs = exact if shape[2:] == (1, 1) and not groups else stock(x, coef, form).double()
        # Twice the error of stock layers in the same dtype; the floor is a rounding of the result
        # and 16 of float32 before it.
        bound = 2 * (theirs - exact).abs().amax() + torch.finfo(dtype).eps * exact.abs() + 2e-6
        # The others are copied to these two.
        for name, arranged in itertools.islice(layouts(x), 2 if backend == "triton" else None):
            y = normalise(arranged, coef, None, form, backend)
            assert y.dtype == dtype and y.shape == x.shape
            assert bool(((y.double() - exact).abs() <= bound).all()), (
                name,
                form,
                float((y.double() - exact).abs().amax()),
            )
            if name == "channels-last":
                assert y.movedim(1, -1).is_contiguous()


@pytest.mark.parametrize("activation", OF_NORMS, ids=str)
def test_activations_and_their_slopes_over_the_whole_range(backend, activation):
    u = torch.cat(
        [torch.linspace(-30, 30, 4001), torch.logspace(-9, 1, 300), -torch.logspace(-9, 1, 300)]
    ).double()
    spread, mean = u.var(correction=0).sqrt(), u.mean()
    # Gamma = std: u comes out again.
    x, coef = u.float()[None, None].requires_grad_(), torch.stack([spread, mean]).float()[None]
    form = Form(0, False, True, 1e-12, activation)
    y = normalise(x, coef, None, form, backend)
    exact = ACTIVATIONS[activation].function(u)
    # u itself is made in float32 from values up to 30.
    assert float((y[0, 0].double() - exact).abs().max()) < 8e-6
    # Not at the kink of relu.
    gy = torch.linspace(-1, 1, u.numel())[None, None] * (u.abs() > 1e-4)[None, None]
    (gx,) = torch.autograd.grad(y, x, gy)
    xd = u[None, None].requires_grad_()
    (expected,) = torch.autograd.grad(normalise_ref(xd, coef.double(), None, form), xd, gy.double())
    assert float((gx.double() - expected).abs().max()) < 1e-5


EVERY_MODE = [
    pytest.param(
        *form,
        activation,
        marks=() if activation == "silu" or form == FORMS[4] else pytest.mark.slow,
    )
    for form in FORMS
    for activation in OF_NORMS
]


# In every run each form and each activation, not each pair.
@pytest.mark.parametrize("groups, alpha, beta, activation", EVERY_MODE)
def test_derivatives_in_every_mode(backend, groups, alpha, beta, activation):
    # The interpreter is slow: a random direction instead of every one, and the forms that differ
    # most.
    fast = backend == "triton"
    if fast and (activation != "silu" or (groups, alpha, beta) not in (FORMS[0], FORMS[4])):
        pytest.skip(
            "the others meet the reference in test_dual_op_and_its_gradient_equal_the_reference"
        )
    x, coef, form, draw = problem(
        (groups, alpha, beta, activation), (2, 6, 2, 2), rows=1 if alpha else None
    )
    x, coef = x.requires_grad_(), coef.requires_grad_()

    def f(x, coef):
        return normalise(x, coef, None, form, backend)

    assert gradcheck(f, (x, coef), check_forward_ad=True, fast_mode=fast)
    assert gradgradcheck(
        f, (x, coef), check_fwd_over_rev=True, check_rev_over_rev=True, fast_mode=fast
    )
    forward, reverse = (
        torch.func.jacfwd(f, (0, 1))(x.detach(), coef.detach()),
        torch.func.jacrev(f, (0, 1))(x.detach(), coef.detach()),
    )
    # batched: vmap over jvp, vmap over vjp.
    assert all(torch.allclose(a, b, atol=1e-10) for a, b in zip(forward, reverse))
    labels, table = torch.tensor([2, 0]), draw(3, coef.shape[1]).requires_grad_()
    assert gradcheck(
        lambda x, c: normalise(x, c, labels, form, backend),
        (x, table),
        check_forward_ad=True,
        fast_mode=fast,
    )


@pytest.mark.parametrize("M", [1, 3])
@pytest.mark.parametrize("activation", [None, "elu", "gelu"], ids=str)
@pytest.mark.parametrize("groups, alpha, beta", FORMS[:5])
def test_dual_op_and_its_gradient_equal_the_reference(backend, groups, alpha, beta, activation, M):
    if backend == "reference":
        pytest.skip("it is the reference")
    if backend == "triton" and activation == "elu":
        pytest.skip("the interpreter is slow")
    for shape, last in (((2, 6, 3, 5), False), ((2, 6, 3, 5), True), ((1, 6, 4, 4), False)):
        x, coef, form, draw = problem((groups, alpha, beta, activation), shape)
        t, tcoef = draw(M, *shape), draw(M, *coef.shape)
        if last:
            x, t = (
                x.to(memory_format=torch.channels_last),
                t.movedim(2, -1).contiguous().movedim(-1, 2),
            )
        arguments = [a.requires_grad_() for a in (x, t, coef, tcoef)]
        y, ty, _ = _normalise(x, t, coef, tcoef, None, form, backend, True)
        assert torch.allclose(y, normalise_ref(x, coef, None, form), atol=1e-12)
        assert torch.allclose(ty, _dual_ref(x, t, coef, tcoef, None, form), atol=1e-11)
        gy, gty = draw(*shape), draw(M, *shape)
        got = torch.autograd.grad((y, ty), arguments, (gy, gty))
        for name, a, b in zip(
            ("x", "t", "coef", "tcoef"), got, _gradient_ref(x, t, coef, tcoef, None, gy, gty, form)
        ):
            assert torch.allclose(a, b, atol=1e-10), (name, float((a - b).abs().max()))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation", [None, "silu", "relu"], ids=str)
def test_gradients_of_several_pieces_of_memory_equal_the_reference(activation, dtype):
    """Pixels in several pieces, vectors of channels side by side and a rest of them, either order
    of memory; one thread's samples and one sample on all threads."""
    if backends.why_not("cpp", "cpu") is not None:
        pytest.skip("the pieces are those of the compiled kernels")
    for shape, M in (((2, 42, 9, 13), 0), ((2, 42, 9, 13), 2), ((1, 42, 30, 31), 0)):
        x, coef, form, draw = problem((6, False, True, activation), shape)
        gy = draw(*shape)
        t, gty = (draw(M, *shape), draw(M, *shape)) if M else (None, None)
        tcoef = draw(M, *coef.shape) if M else None
        given = (x, t, gy, gty)
        rounded = [None if a is None else a.to(dtype) for a in given]
        wide = [None if a is None else a.double() for a in rounded]
        none = torch.zeros(0, *shape, dtype=torch.float64)
        zero = torch.zeros(0, *coef.shape, dtype=torch.float64)
        expected = _gradient_ref(
            wide[0],
            none if t is None else wide[1],
            coef,
            zero if t is None else tcoef,
            None,
            wide[2],
            none if t is None else wide[3],
            form,
        )
        expected = expected if M else (expected[0], expected[2])
        eps = torch.finfo(dtype).eps
        half = coef.float() if dtype != torch.float64 else coef
        halves = None if tcoef is None else tcoef.to(half.dtype)
        for last in (False, True):
            arranged = [
                a if a is None or not last else a.movedim(-3, -1).contiguous().movedim(-1, -3)
                for a in rounded
            ]
            x1, t1, gy1, gty1 = arranged
            stats = run_forward(x1, t1, half, halves, None, form, "cpp", True)[-1]
            got = run_backward(x1, t1, stats, half, halves, None, gy1, gty1, form, "cpp")
            for a, b in zip(got, expected, strict=True):
                # A rounding of the result, and some of float32 in each of its terms.
                bound = 2 * eps + 64 * (1.2e-7 if dtype != torch.float64 else 2.3e-16)
                assert (a.double() - b).abs().max() <= bound * b.abs().max(), (shape, M, last)


def test_public_dual_ops_are_forward_mode_of_their_ops(backend):
    torch.manual_seed(0)
    x, t, table, labels = (
        torch.randn(2, 6, 3, 3),
        torch.randn(2, 2, 6, 3, 3),
        torch.randn(4, 18),
        torch.tensor([3, 1]),
    )
    gamma, alpha, beta = table[0].split(6)
    pairs = [
        (fastscore.instance_norm_plus, fastscore.ops.instance_norm_plus_dual, (gamma, alpha, beta)),
        (
            fastscore.conditional_instance_norm_plus,
            fastscore.ops.conditional_instance_norm_plus_dual,
            (labels, table),
        ),
        (
            fastscore.group_norm_modulate,
            fastscore.ops.group_norm_modulate_dual,
            (3, gamma, beta, table[:2, :6], table[:2, 6:12]),
        ),
    ]
    for op, dual, rest in pairs:
        y, ty = dual(x, t, *rest, activation="silu")
        for m in range(2):
            reference = functools.partial(op, activation="silu", backend="reference")
            expected = torch.func.jvp(lambda x: reference(x, *rest), (x,), (t[m],))  # noqa: B023
            assert torch.allclose(y, expected[0], atol=3e-6)
            assert torch.allclose(ty[m], expected[1], atol=1e-5)


def skip_without_interpreter():
    reason = backends.why_not("triton", "cpu")
    if reason is not None:
        pytest.skip(reason)


@pytest.mark.parametrize("channels_last", [False, True])
def test_long_rows_meet_the_reference_in_value_and_gradient(channels_last):
    """Triton: a row of pixels over several programs, whose moments are merged and whose sums are
    added up."""
    skip_without_interpreter()
    x, coef, form, draw = problem((0, True, True, "silu"), (1, 3, 35, 137))
    x, t, tcoef = x.requires_grad_(), draw(2, *x.shape).requires_grad_(), draw(2, *coef.shape)
    with torch.no_grad():
        x += torch.linspace(-3, 3, 137) + 100  # the parts of a row differ
    xs, ts = (
        (x.movedim(1, -1).contiguous().movedim(-1, 1), t.movedim(2, -1).contiguous().movedim(-1, 2))
        if channels_last
        else (x, t)
    )
    y, ty, _ = _normalise(xs, ts, coef.requires_grad_(), tcoef, None, form, "triton", True)
    assert torch.allclose(y, normalise_ref(x, coef, None, form), atol=1e-11)
    assert torch.allclose(ty, _dual_ref(x, t, coef, tcoef, None, form), atol=1e-10)
    gy, gty = draw(*x.shape), draw(2, *x.shape)
    got = torch.autograd.grad((y, ty), (x, t, coef), (gy, gty))
    for a, b in zip(got, _gradient_ref(x, t, coef, tcoef, None, gy, gty, form)):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-9)
    got = torch.autograd.grad(normalise(xs, coef, None, form, "triton"), x, gy)[0]
    assert torch.allclose(
        got, torch.autograd.grad(normalise_ref(x, coef, None, form), x, gy)[0], rtol=1e-9, atol=1e-9
    )


def test_moments_of_more_splits_than_a_program_holds_are_merged():
    skip_without_interpreter()
    from fastscore.kernels.normalise import merge_kernel

    x, t = 1000 + torch.randn(2, 1234).double(), torch.randn(2, 1234).double()
    parts = [(a, b) for a, b in zip(x.split(100, 1), t.split(100, 1))]

    def moments(x, t):
        d = x - x.mean(1, keepdim=True)
        return torch.stack(
            [
                torch.stack([x.mean(1), d.square().mean(1)], -1),
                torch.stack([t.mean(1), (t * d).mean(1)], -1),
            ]
        )

    stats = torch.empty(2, 2, 2).double()
    inputs = torch.stack([moments(a, b) for a, b in parts], 2)
    merge_kernel[(1, 2)](stats, inputs, 2, 1234, len(parts), PIXELS=100, UNITS=4, SPLITS=4, STEPS=4)
    assert torch.allclose(stats, moments(x, t), rtol=1e-12, atol=1e-12)


def test_third_order_and_nested_forward_mode(backend):
    x, coef, form, draw = problem((0, True, True, "silu"), (2, 3, 2, 2))
    v, w = draw(*x.shape), draw(*x.shape)

    def f(x):
        return normalise(x, coef, None, form, backend)

    def g(x):
        return normalise_ref(x, coef, None, form)

    def second(f):
        return torch.func.jvp(lambda x: torch.func.jvp(f, (x,), (v,))[1], (x,), (w,))[1]

    assert torch.allclose(second(f), second(g), atol=1e-10)

    def energy(f):   # third derivatives: the gradient of a squared Hessian-vector product
        def hvp(x):
            return torch.func.jvp(torch.func.grad(lambda x: f(x).square().sum()), (x,), (v,))[1]

        return torch.func.grad(lambda x: hvp(x).square().sum())(x)

    assert torch.allclose(energy(f), energy(g), atol=1e-8)
    rows = torch.stack([x, x + 1])
    assert torch.allclose(torch.vmap(f)(rows)[1], g(x + 1), atol=1e-12)
    per_sample = torch.vmap(
        torch.func.grad(lambda c, x: normalise(x[None], c, None, form, backend).square().sum()),
        in_dims=(None, 0),
    )
    expected = torch.vmap(
        torch.func.grad(lambda c, x: normalise_ref(x[None], c, None, form).square().sum()),
        in_dims=(None, 0),
    )
    assert torch.allclose(per_sample(coef[:1], x), expected(coef[:1], x), atol=1e-11)


@pytest.mark.parametrize("dual", [False, True], ids=["value", "tangent"])
@pytest.mark.parametrize(
    "nesting",
    ["".join(c) for k in (2, 3) for c in itertools.product("FRV", repeat=k)]
    + ["FFFF", "RFRF", "RRFF"],
)
def test_every_nesting_of_transforms(nesting, dual):
    """F: jvp, R: grad, V: vmap of jvp, inner to outer.

    A plain operation in a jvp rule would lose the tangents of the levels around it.
    """
    torch.manual_seed(0)
    x, c = torch.randn(2, 3, 4).double(), torch.randn(1, 9).double()
    v, form = torch.ones_like(x).cumsum(-1), Form(0, True, True, 1e-5, "silu")
    wrap = {
        "F": lambda f: lambda x: torch.func.jvp(f, (x,), (v * x.cos(),))[1],
        "R": lambda f: torch.func.grad(lambda x: f(x).sin().sum()),
        "V": lambda f: (
            lambda x: torch.vmap(lambda t: torch.func.jvp(f, (x,), (t,))[1])(
                torch.stack([v, v.flip(0)])
            ).sum(0)
        ),
    }

    def nested(backend):
        def f(x):
            if dual:
                return fastscore.ops.instance_norm_plus_dual(
                    x, (v * x)[None], *c[0].split(3), activation="silu", backend=backend
                )[1][0]
            return normalise(x, c, None, form, backend)

        for letter in nesting:
            f = wrap[letter](f)
        return f(x)

    expected = nested("reference")
    assert float((nested("cpp") - expected).abs().max()) <= 1e-8 * max(
        float(expected.abs().max()), 1e-8
    )


def sliced_score_gradient(norm, weights, x, v, mode):
    """d/dweights of vᵀ(∂s/∂x)v + ½(vᵀs)² for s = conv(elu(norm(conv(x)))), by forward mode or by
    double backprop."""
    first, second, *coefficients = (w.requires_grad_() for w in weights)

    def score(x):
        return F.conv2d(
            F.elu(norm(F.conv2d(x, first, padding=1), *coefficients)), second, padding=1
        )

    if mode == "forward":
        s, js = torch.func.jvp(score, (x,), (v,))
    else:
        x = x.requires_grad_()
        s = score(x)
        js = torch.autograd.grad((s * v).sum(), x, create_graph=True)[0]
    loss = ((js * v).sum() + 0.5 * (s * v).flatten(1).sum(1).square().sum()) / len(x)
    return torch.autograd.grad(loss, [first, second, *coefficients])


def relative_difference(a, b):
    return float(
        torch.cat([(p - q).flatten() for p, q in zip(a, b)]).norm()
        / torch.cat([q.flatten() for q in b]).norm()
    )


def test_forward_mode_gradient_is_that_of_double_backprop_where_stock_layers_are_wrong(backend):
    """pytorch/pytorch#196699, #196700, #186256: saved statistics carry no tangent."""
    torch.manual_seed(0)
    weights = [
        torch.randn(8, 3, 3, 3).double(),
        torch.randn(3, 8, 3, 3).double() / 5,
        torch.randn(8).double(),
        torch.randn(8).double(),
    ]
    x, v = torch.randn(4, 3, 8, 8).double(), torch.randn(4, 3, 8, 8).double().sign()

    def ours(h, gamma, beta):
        return fastscore.instance_norm_plus(h, gamma, None, beta)

    def theirs(h, gamma, beta):
        return F.instance_norm(h, weight=gamma, bias=beta)

    right = sliced_score_gradient(theirs, weights, x, v, "double backprop")
    assert (
        relative_difference(sliced_score_gradient(ours, weights, x, v, "double backprop"), right)
        < 1e-10
    )
    assert relative_difference(sliced_score_gradient(ours, weights, x, v, "forward"), right) < 1e-10
    # When this fails PyTorch has mended its layers: rejoice, and change docs/derivatives.md.
    assert (
        relative_difference(sliced_score_gradient(theirs, weights, x, v, "forward"), right) > 1e-3
    )


def test_compiled_equals_eager(backend):
    if backend == "triton":
        pytest.skip("the interpreter cannot be compiled")
    x, coef, form, draw = problem((0, True, True, "elu"), (2, 6, 4, 4), dtype=torch.float32)
    labels, table = torch.tensor([1, 0]), draw(3, 18).requires_grad_()
    x.requires_grad_()

    def f(x, table):
        return fastscore.conditional_instance_norm_plus(x.sin(), labels, table, activation="elu")

    torch._dynamo.reset()
    compiled = torch.compile(f, fullgraph=True)
    assert torch.allclose(compiled(x, table), f(x, table), atol=1e-6)
    gy = draw(*x.shape)
    for a, b in zip(
        torch.autograd.grad(compiled(x, table), (x, table), gy),
        torch.autograd.grad(f(x, table), (x, table), gy),
    ):
        assert torch.allclose(a, b, atol=1e-5)
    t = draw(*x.shape)
    tangent = torch.compile(
        lambda x, t: torch.func.jvp(lambda x: f(x, table), (x,), (t,))[1], fullgraph=True
    )
    expected = torch.func.jvp(lambda x: f(x, table), (x,), (t,))[1]
    assert float(expected.detach().abs().max()) > 0.1 and torch.allclose(
        tangent(x, t), expected, atol=1e-5
    )
    got = torch.autograd.grad(tangent(x, t).square().sum(), (x, table))
    for a, b in zip(got, torch.autograd.grad(expected.square().sum(), (x, table))):
        assert torch.allclose(a, b, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_mean_and_large_values(backend, dtype):
    big = 6e4 if dtype == torch.float16 else 1e4
    x = (big * 0.9 + 50 * torch.randn(2, 4, 300).double()).to(dtype)
    means = x.double().mean(-1)
    # A mean is rounded to float32: by big / 2^24, of the deviation of the pixels (50) or of the
    # channels' means.
    for form, spread in (
        (Form(0, False, False, 1e-5, None), 50.0),
        (Form(0, True, False, 1e-5, None), float(means.std(1).min())),
    ):
        coef = torch.ones(1, 4 + 4 * form.alpha)
        exact = normalise_ref(x.double(), coef.double(), None, form)
        y = normalise(x, coef.to(torch.promote_types(dtype, coef.dtype)), None, form, backend)
        assert bool(
            (
                (y.double() - exact).abs()
                <= torch.finfo(dtype).eps * exact.abs() + 3 * big * 2**-24 / spread + 2e-6
            ).all()
        )


def test_autocast_keeps_the_statistics_in_float32(backend):
    torch.manual_seed(0)
    x, weight, gamma, beta = (
        torch.randn(2, 3, 6, 6) + 100,
        torch.randn(4, 3, 1, 1),
        torch.rand(4),
        torch.rand(4),
    )
    with torch.autocast("cpu", torch.bfloat16):
        h = F.conv2d(x, weight)
        y = fastscore.instance_norm_plus(h, gamma, None, beta, activation="silu")
    exact = F.silu(F.instance_norm(h.double(), weight=gamma.double(), bias=beta.double()))
    assert h.dtype == y.dtype == torch.bfloat16
    assert bool(
        ((y.double() - exact).abs() <= torch.finfo(torch.bfloat16).eps * exact.abs() + 1e-4).all()
    )


def test_one_channel_and_constant_input_are_defined(backend):
    x = torch.randn(2, 1, 3, 3)
    y = fastscore.instance_norm_plus(x, torch.ones(1), torch.ones(1), torch.zeros(1))
    assert torch.allclose(y, F.instance_norm(x), atol=1e-6)
    assert torch.equal(
        fastscore.instance_norm_plus(torch.full((2, 3, 4), 7.0), torch.ones(3), torch.ones(3)),
        torch.zeros(2, 3, 4),
    )
    assert bool(
        fastscore.instance_norm_plus(
            torch.full((1, 1, 4), torch.nan), torch.ones(1), activation="elu"
        )
        .isnan()
        .all()
    )
    for shape in ((0, 3, 4), (2, 3, 0)):
        x = torch.zeros(shape, requires_grad=True)
        gamma = torch.ones(3, requires_grad=True)
        y = fastscore.instance_norm_plus(x, gamma)
        assert y.shape == shape
        assert torch.equal(torch.autograd.grad(y.sum(), (x, gamma))[1], torch.zeros(3))


def test_table_gradient_is_summed_per_label_and_repeatable(backend):
    x, _, _, draw = problem((0, True, True, None), (40, 5, 3, 3), dtype=torch.float32)
    labels, table = torch.arange(40) % 3, draw(4, 15).requires_grad_()
    runs = []
    for _ in range(2):
        y = fastscore.conditional_instance_norm_plus(x, labels, table)
        runs.append(torch.autograd.grad(y.square().sum(), table)[0])
    assert torch.equal(*runs) and bool((runs[0][3] == 0).all())
    expanded = torch.tensor(2).expand(40)  # one label for all, without memory of its own
    assert torch.equal(
        fastscore.conditional_instance_norm_plus(x, expanded, table),
        fastscore.instance_norm_plus(x, *table[2].split(5)),
    )
    each = torch.cat(
        [
            fastscore.conditional_instance_norm_plus(x[i : i + 1], labels[i : i + 1], table)
            for i in range(40)
        ]
    )
    assert torch.allclose(
        runs[0], torch.autograd.grad(each.square().sum(), table)[0], rtol=1e-4, atol=1e-4
    )


def test_threads_do_not_change_a_bit():
    x, coef, form, _ = problem((0, True, True, "elu"), (3, 40, 33, 33), dtype=torch.float32)
    before, values = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 7):
            torch.set_num_threads(threads)
            values.append(normalise(x, coef, None, form, "cpp"))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(values[0], values[1]) and torch.equal(values[0], values[2])


def test_group_norm_modulate_is_group_norm_scaled_and_shifted(backend):
    torch.manual_seed(0)
    x, weight, bias = torch.randn(3, 8, 5, 5), torch.randn(8), torch.randn(8)
    scale, shift = torch.randn(3, 8), torch.randn(3, 8)
    h = F.group_norm(x, 4, weight, bias) * (1 + scale)[..., None, None] + shift[..., None, None]
    y = fastscore.group_norm_modulate(x, 4, weight, bias, scale, shift, activation="silu")
    assert torch.allclose(y, F.silu(h), atol=2e-6)
    assert torch.allclose(fastscore.group_norm_modulate(x, 2), F.group_norm(x, 2), atol=2e-6)
    assert torch.allclose(
        fastscore.group_norm_modulate(x, 2, scale=scale),
        F.group_norm(x, 2) * (1 + scale)[..., None, None],
        atol=4e-6,
    )
    arguments, fast = (
        [a.double().requires_grad_() for a in (x[:, :, :2, :2], weight, bias, scale, shift)],
        backend == "triton",
    )

    def f(*a):
        return fastscore.group_norm_modulate(a[0], 4, *a[1:], activation="silu")

    assert gradcheck(f, arguments, check_forward_ad=True, fast_mode=fast)


@pytest.mark.parametrize("bad", [5, -1])
def test_labels_out_of_range_are_never_read(bad):
    x, table = torch.randn(2, 3, 4), torch.randn(5, 9)

    def f(x, labels):
        return fastscore.conditional_instance_norm_plus(x, labels, table)

    labels = torch.tensor([0, bad])
    with pytest.raises(RuntimeError, match=r"labels must be in 0\.\.4; got"):
        torch.func.jvp(lambda x: f(x, labels), (x,), (x,))
    with pytest.raises(RuntimeError, match=r"labels must be in 0\.\.4; got"):
        torch.compile(f, backend="aot_eager")(x, labels)
    with pytest.raises(IndexError):
        torch.vmap(f, (None, 0))(x, labels[None])
    skip_without_interpreter()   # a GPU cannot raise: that sample is NaN
    with fastscore.use_backend("triton"):
        y = torch.func.jvp(lambda x: f(x, labels), (x,), (x,))[0]
        assert bool(y[1].isnan().all()) and torch.equal(y[0], f(x, labels * 0)[0])


def test_raw_ops_refuse_derivatives_and_pass_opcheck(backend):
    if backend == "reference":
        pytest.skip("it has no raw ops")
    x, coef = torch.randn(2, 3, 4), torch.ones(1, 6)
    stats = torch.empty(1, 2, 3, 2)
    forward = (torch.empty_like(x), None, stats, x, None, coef, None, None, 0, False, True, 1e-5, 1)
    op = backends.raw(backend, "normalise")
    torch.library.opcheck(op, forward)
    op(*forward)
    backward = (
        torch.empty_like(x),
        None,
        torch.empty(2, 6),
        None,
        x,
        None,
        stats,
        coef,
        None,
        None,
        x,
        None,
        0,
        False,
        True,
        1e-5,
        1,
    )
    torch.library.opcheck(backends.raw(backend, "normalise_backward"), backward)
    with pytest.raises(NotImplementedError, match="has no forward-mode rule"):
        torch.func.jvp(lambda x: (op(*forward[:3], x, *forward[4:]), x)[1], (x,), (x,))


def test_gpus_get_triton_and_a_request_for_cuda_is_refused(monkeypatch):
    monkeypatch.setattr(backends, "why_not", lambda name, device: None)
    choose = backends._choose.__wrapped__
    assert choose("auto", "cuda", False) == "triton" and choose("auto", "cuda", True) == "cuda"
    with pytest.raises(ValueError, match="this op has no CUDA C\\+\\+ kernel"):
        choose("cuda", "cuda", False)


X = torch.zeros(2, 4, 3, 3)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: fastscore.instance_norm_plus(X[0, 0], torch.ones(4)), r"x must be \(B, C, \*\)"),
        (
            lambda: fastscore.instance_norm_plus(X, torch.ones(3)),
            r"gamma must be \(4,\) or \(2, 4\); got \(3,\)",
        ),
        (
            lambda: fastscore.instance_norm_plus(
                X, torch.ones(4), beta=torch.ones(4, device="meta")
            ),
            "beta must be on the device",
        ),
        (
            lambda: fastscore.instance_norm_plus(X, torch.ones(4, dtype=torch.int64)),
            "gamma must be float32",
        ),
        (
            lambda: fastscore.instance_norm_plus(X, torch.ones(4), eps=0),
            "eps must be a finite number > 0",
        ),
        (
            lambda: fastscore.instance_norm_plus(X, torch.ones(4), activation="tanh"),
            "activation must be one of None, 'elu'",
        ),
        (
            lambda: fastscore.ops.instance_norm_plus_dual(X, X, torch.ones(4)),
            r"t must be \(M, 2, 4, 3, 3\); got \(2, 4, 3, 3\)",
        ),
        (
            lambda: fastscore.conditional_instance_norm_plus(
                X, torch.tensor([0, 5]), torch.ones(5, 12)
            ),
            r"labels must be in 0..4; got 5",
        ),
        (
            lambda: fastscore.conditional_instance_norm_plus(
                X, torch.tensor([0]), torch.ones(5, 12)
            ),
            r"labels must be int64 \(2,\)",
        ),
        (
            lambda: fastscore.conditional_instance_norm_plus(
                X, torch.tensor([0, 1]), torch.ones(5, 8)
            ),
            r"weight must be \(L, 12\)",
        ),
        (
            lambda: fastscore.instance_norm_plus(X, None, torch.ones(4)),
            "gamma must be a tensor; got NoneType",
        ),
        (
            lambda: fastscore.instance_norm_plus(X, torch.ones(4), eps=1e-30),
            "eps must be at least 2.05e-26, or derivatives of constant ch",
        ),
        (
            lambda: fastscore.instance_norm_plus(X, torch.ones(4), eps="a"),
            "eps must be a finite number > 0; got 'a'",
        ),
        (
            lambda: fastscore.instance_norm_plus(X, torch.ones(4), activation=["elu"]),
            "activation must be one of",
        ),
        (
            lambda: fastscore.group_norm_modulate(X, 3),
            "num_groups must be an int that divides 4 channels; got 3",
        ),
        (
            lambda: fastscore.group_norm_modulate(X, 2, scale=torch.ones(4)),
            r"scale must be \(2, 4\); got \(4,\)",
        ),
    ],
)
def test_bad_arguments_are_refused_in_one_sentence(call, message):
    with pytest.raises((ValueError, TypeError), match=message) as error:
        call()
    assert "\n" not in str(error.value)


def test_gradients_of_a_table_keep_float32_under_autocast():
    """A GPU adds them up by a matrix product, which autocast would take to bfloat16.

    Three digits.
    """
    g, labels = (
        torch.randn(64, 12, generator=torch.Generator().manual_seed(0)),
        torch.arange(64) % 5,
    )
    with torch.autocast("cpu", torch.bfloat16):
        found = _scatter_by_product(g, labels, 6)
    expected = torch.zeros(6, 12, dtype=torch.float64).index_add(0, labels, g.double())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-7, atol=1e-7)
