"""On a GPU: the same words, the same values, the same law.

Without one, the kernels in CUDA C++ run on the device that build_support/emulate.py makes of the
CPU. FASTSCORE_GPU_TESTS_ON=cpu runs the rest there, too, on Triton's interpreter and the C++
kernels, to find the mistakes of these tests early.
"""

import contextlib
import copy
import itertools
import os
import sys
from pathlib import Path

import pytest
import torch
from test_activate import close as near
from test_activate import exact, exact_gradient, problem
from torch.utils._python_dispatch import TorchDispatchMode

import fastscore
from fastscore import backend as backends
from fastscore import direct, losses, random
from fastscore.losses.noise_conditional import METHODS
from fastscore.models import EnergyMLP, EnergyScore, ScoreMLP
from fastscore.ops.activate import activate_dual, activate_jet, activate_jet_ref
from fastscore.ops.activations import ACTIVATIONS, OF_NORMS
from fastscore.ops.normalise import Form, normalise
from fastscore.ops.normalise_core import (
    _clusters,
    _dual_ref,
    _gradient_ref,
    in_clusters,
    normalise_ref,
)
from fastscore.ops.normalise_functions import _normalise
from fastscore.ops.rademacher_project import project, project_ref

pytestmark = pytest.mark.gpu
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


DEVICE = os.environ.get("FASTSCORE_GPU_TESTS_ON") or (
    "cuda" if torch.cuda.is_available() else "cpu"
)
if DEVICE == "cpu":
    sys.path.insert(0, str(Path(__file__).parent.parent / "build_support"))
    import emulate


def on_gpu_or(few, many):
    """How many elements, of a test whose many would take minutes without a GPU."""
    return many if DEVICE == "cuda" else few


def pairs(a, b):
    """All of them; without a GPU, where Triton's interpreter would take minutes, each of both at
    least once."""
    every = list(itertools.product(a, b))
    return (
        every
        if DEVICE == "cuda"
        else list(
            itertools.islice(zip(itertools.cycle(a), itertools.cycle(b)), max(len(a), len(b)))
        )
    )


@pytest.fixture(params=["triton", "cuda"] + ["cpp"] * (DEVICE == "cpu"), autouse=True)
def gpu_backend(request):
    with contextlib.ExitStack() as stack:
        if DEVICE == "cpu" and request.param == "cuda":
            reason = emulate.why_not()
            if reason is None:
                stack.enter_context(emulate.installed())
                stack.enter_context(emulate.torch_cuda())
        else:
            reason = backends.why_not(request.param, DEVICE)
        if reason is not None:
            pytest.skip(reason)
        stack.enter_context(fastscore.use_backend(request.param))
        yield request.param


def cpu(function, *args, **kwargs):
    with fastscore.use_backend("reference"):
        return function(
            *(a.detach().cpu() if isinstance(a, torch.Tensor) else a for a in args), **kwargs
        )


def close(got, expected, dtype):
    got, expected = got.double().cpu(), expected.double()
    return bool(((got - expected).abs() <= torch.finfo(dtype).eps * expected.abs() + 5e-6).all())


# The last two: of blocks across 2^32
@pytest.mark.parametrize("offset", [0, 3, 2**31 - 2, 2**32 + 5, 2**34 - 4002, 2**39 - 3000])
@pytest.mark.parametrize("kind", ["words", "uniform", "normal", "rademacher"])
def test_noise_equals_that_of_the_cpu(kind, offset):
    key = {"seed": -(2**40) - 1, "step": 3, "stream": 9, "substream": 2, "offset": offset}
    got, expected = (
        getattr(random, kind)(10_007, device=DEVICE, **key).cpu(),
        cpu(getattr(random, kind), 10_007, **key),
    )
    assert (
        torch.equal(got, expected)
        if kind != "normal"
        else torch.allclose(got, expected, atol=1e-6, rtol=5e-7)
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offset, n", [(0, 16_384), (16, 20_000), (5, 9_001)])
def test_noise_of_every_type_and_size_equals_that_of_the_cpu(
    gpu_backend, monkeypatch, dtype, offset, n
):
    """Signs as of a large tensor, too."""
    for large in (False, True) if gpu_backend == "triton" else (False,):
        if large:
            monkeypatch.setattr("fastscore.kernels.MANY_SIGNS", 0)
        for kind in ("uniform", "normal", "rademacher"):
            key = {"seed": 7, "stream": 9, "offset": offset, "dtype": dtype}
            got, expected = (
                getattr(random, kind)(n, device=DEVICE, **key).cpu(),
                cpu(getattr(random, kind), n, **key),
            )
            assert close(got, expected, dtype) if kind == "normal" else torch.equal(got, expected)


def test_normals_are_within_a_millionth_or_four_ulp():
    """2^30 of them: half a billion radii, up to about 6.3. Without a GPU 2^20."""
    worst = 0.0
    for step in range(64):
        key = {"seed": 1, "step": step, "stream": 9, "device": DEVICE, "dtype": torch.float64}
        n = on_gpu_or(2**14, 2**24)
        worst = max(
            worst,
            float(
                (random.normal(n, **key) - random.normal(n, backend="reference", **key)).abs().max()
            ),
        )
    assert worst <= 4 * 2**-21   # four units of the last place of a normal in [4, 8)


def layouts():
    x = torch.randn(6, 3, 8, 10)
    yield pytest.param(x, id="contiguous")
    yield pytest.param(torch.randn(3, 4096, 3), id="whole-tiles")
    yield pytest.param(torch.randn(2, 4099), id="tile-and-tail")
    yield pytest.param(x.to(memory_format=torch.channels_last), id="channels-last")
    yield pytest.param(x.transpose(1, 3), id="transposed")
    yield pytest.param(torch.cat([x, x])[3:, :, 1:], id="storage-offset")
    yield pytest.param(x[:0], id="empty")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("x", list(layouts()))
@pytest.mark.parametrize("offset", [0, 3])
def test_ops_equal_those_of_the_cpu(dtype, x, offset):
    x = x.to(DEVICE, dtype)
    s, each = torch.randn_like(x), torch.rand(len(x), device=DEVICE)
    for e in (0.3, each, torch.tensor(0.3, device=DEVICE)):
        key = {"seed": 5, "offset": offset}
        got = fastscore.langevin_step(x, s, e, **key)
        assert got.stride() == torch.empty_like(x).stride()
        assert close(got, cpu(fastscore.langevin_step, x, s, e, **key), dtype)
        assert close(fastscore.perturb(x, e, **key), cpu(fastscore.perturb, x, e, **key), dtype)
        loss = fastscore.denoising_loss(s, e, **key).double().cpu()
        assert torch.allclose(loss, cpu(fastscore.denoising_loss, s, e, **key).double(), rtol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("B, d", [(40, 150), (64, 64), (700, 24)])
def test_samples_do_not_depend_on_how_the_batch_is_split(dtype, B, d):
    """Bit for bit on one back end: whole tiles, tails and strided elements compute one formula."""
    x, s, e = (
        torch.randn(B, d).to(DEVICE, dtype),
        torch.randn(B, d).to(DEVICE, dtype),
        torch.rand(B, device=DEVICE),
    )
    for step_size in (0.3, e):
        whole = fastscore.langevin_step(x, s, step_size, seed=5)
        for k in (B // 2, B // 2 - 3):
            parts = [
                fastscore.langevin_step(
                    x[i:j],
                    s[i:j],
                    step_size if step_size is not e else e[i:j],
                    seed=5,
                    offset=i * d,
                )
                for i, j in ((0, k), (k, B))
            ]
            assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("B, d", [(10, 150), (6, 640), (13, 24), (3, 4100), (3, 8192)])
def test_sums_over_a_sample_do_not_depend_on_how_the_batch_is_split(gpu_backend, dtype, B, d):
    """Bit for bit: neither the order of a sum nor its formula may depend on where a part of a
    batch lies in memory."""
    s, js = torch.randn(B, d).to(DEVICE, dtype), torch.randn(2, B, d).to(DEVICE, dtype)

    def sums(i, j):
        loss = fastscore.denoising_loss(s[i:j], 0.3, seed=5, offset=i * d)
        if gpu_backend == "cuda":   # projections on a GPU are Triton's
            return [loss[None]]
        vjv, vs, ss = project(
            s[i:j], js[:, i:j], None, (5, 0, random.PROJECTION, i * d), gpu_backend
        )
        return loss[None], vjv, vs, ss[None]

    for k in (B // 2, B // 2 - 1):
        for whole, *parts in zip(sums(0, B), sums(0, k), sums(k, B)):
            assert torch.equal(torch.cat(parts, 1), whole)


@pytest.mark.parametrize("M", [0, 1])
def test_normalisation_beyond_the_cache_is_the_same(norm_backend, monkeypatch, M):
    """Bit for bit: how long the caches keep something is no part of a result, for it depends on
    the batch."""
    form = Form(0, True, True, 1e-5, "silu")
    (x, t, coef, tcoef, gy, gty), _ = norm_problem(form, (3, 40, 20, 20), torch.float32, M)

    def run():
        leaves = [a.detach().requires_grad_() for a in ((x, t, coef, tcoef) if M else (x, coef))]
        x_, t_, coef_, tcoef_ = leaves if M else (leaves[0], None, leaves[1], None)
        outputs = (
            _normalise(x_, t_, coef_, tcoef_, None, form, norm_backend, True)[:2]
            if M
            else [normalise(x_, coef_, None, form, None)]
        )
        return [*outputs, *torch.autograd.grad(outputs, leaves, [gy, gty] if M else [gy])]

    within = run()
    monkeypatch.setattr("fastscore.kernels.launch_normalise.cache_bytes", lambda device: 0)
    assert all(torch.equal(a, b) for a, b in zip(within, run(), strict=True))


@pytest.mark.parametrize("shape", [(2, 64, 8, 8), (3, 6, 7, 9), (5, 128, 4, 4)], ids=str)
def test_a_normalised_sample_does_not_depend_on_its_batch(norm_backend, shape):
    x, labels = torch.randn(shape, device=DEVICE), torch.arange(shape[0], device=DEVICE)
    table = torch.randn(shape[0], 3 * shape[1], device=DEVICE)
    whole = fastscore.conditional_instance_norm_plus(x, labels, table, activation="elu")
    for i in range(shape[0]):
        alone = fastscore.conditional_instance_norm_plus(
            x[i : i + 1], labels[i : i + 1], table, activation="elu"
        )
        assert torch.equal(alone, whole[i : i + 1])


@pytest.mark.parametrize("shape", [(4, 1), (300, 2), (7, 33), (3, 1025), (2, 100_000)], ids=str)
def test_loss_at_every_group_size(shape):
    s = torch.randn(shape, device=DEVICE, requires_grad=True)
    loss = fastscore.denoising_loss(s, 0.5, seed=5)
    assert torch.allclose(
        loss.cpu(), cpu(fastscore.denoising_loss, s.detach(), 0.5, seed=5), rtol=1e-5
    )
    z = random.normal(shape, seed=5, stream=random.PERTURB, device=DEVICE)
    assert torch.allclose(
        torch.autograd.grad(loss.sum(), s)[0], 0.5 * (0.5 * s + z).detach(), atol=3e-6
    )


@pytest.mark.parametrize("splits", [2, 37, 1024, 2500])
def test_partial_sums_are_summed_whatever_their_number(norm_backend, splits):
    """Of one call up to three results, each sum in an order that does not depend on how many
    there are."""
    if norm_backend != "triton":
        pytest.skip("a kernel of Triton's")
    from fastscore.kernels.sum_splits import sum_splits

    for shapes in ([(70,)], [(3, 5), (5,)], [(2, 3), (2, 3), (3,)]):
        partials = [torch.randn(*shape, splits, device=DEVICE) for shape in shapes]
        outputs = [torch.empty(shape, device=DEVICE) for shape in shapes]
        sum_splits(outputs, partials, splits)
        # Of terms of size 1, at random: the rounding of log2(2500) + 3 sums.
        for total, partial in zip(outputs, partials):
            assert torch.allclose(
                total.double(), partial.double().sum(-1), rtol=1e-6, atol=1e-7 * splits
            )
            alone = torch.empty_like(total.flatten()[-1:])
            sum_splits([alone], [partial.flatten(0, -2)[-1:].clone()], splits)
            assert torch.equal(alone, total.flatten()[-1:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "n", [65_536, 65_544, 70_832, 3072], ids=["whole", "a-block-more", "a-tile-more", "one-tile"]
)
def test_the_loss_of_samples_that_fill_their_tiles_or_not(gpu_backend, dtype, n):
    """Of 65,536 elements and more Triton's programs take four tiles each."""
    s = torch.randn(2, n, device=DEVICE).to(dtype)
    e = torch.tensor([0.3, 0.7], device=DEVICE)
    loss = fastscore.denoising_loss(s, e, seed=5)
    assert torch.allclose(loss.cpu(), cpu(fastscore.denoising_loss, s, e, seed=5), rtol=1e-6)


def test_sums_over_long_samples_take_two_launches(norm_backend, monkeypatch):
    if norm_backend != "triton":
        pytest.skip("a matter of Triton's launchers")
    from fastscore import kernels

    launched, operations = [], []

    class Recorded(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            operations.append(str(function))
            return function(*args, **kwargs or {})

    for module in (kernels, kernels.launch_rademacher_project, kernels.sum_splits):
        real = module.launch
        monkeypatch.setattr(
            module,
            "launch",
            lambda *args, real=real, **named: (launched.append(args[0]), real(*args, **named)),
        )
    s, js = torch.randn(2, 20_000, device=DEVICE), torch.randn(2, 2, 20_000, device=DEVICE)
    vjv, vs = (torch.empty(2, 2, device=DEVICE) for _ in range(2))
    with Recorded():
        kernels.LAUNCHERS["noise_reduce"](vs[0], s, None, 0.3, None, 5, 0, 1, 0, 0)
        assert len(launched) == 2
        kernels.LAUNCHERS["rademacher_project"](vjv, vs, vs[0].clone(), js, s, 2, None, 5, 0, 1, 0)
        assert len(launched) == 4
    # By the interpreter.
    made = {"empty", "select", "clone"} | (
        {"new_empty", "copy_", "set_"} if DEVICE == "cpu" else set()
    )
    assert {name.split(".")[1] for name in operations} <= made, operations


def test_derivatives_in_every_mode():
    s = torch.randn(2, 5, dtype=torch.float64, device=DEVICE, requires_grad=True)
    e = torch.rand(2, dtype=torch.float64, device=DEVICE).add(0.1).requires_grad_()
    for f in (
        lambda s, e: fastscore.langevin_step(s.sin(), s, e, seed=3),
        lambda s, e: fastscore.denoising_loss(s, e, seed=3),
    ):
        assert torch.autograd.gradcheck(f, (s, e), check_forward_ad=True)
        assert torch.autograd.gradgradcheck(f, (s, e), check_fwd_over_rev=True)


def test_compiled_equals_eager():
    x = torch.randn(64, 100, device=DEVICE, requires_grad=True)
    f = torch.compile(
        lambda x, step: fastscore.langevin_step(x, x.sin(), 0.1, seed=4, step=step), fullgraph=True
    )
    for step in range(3):
        assert torch.allclose(
            f(x, step), fastscore.langevin_step(x, x.sin(), 0.1, seed=4, step=step), atol=2e-6
        )
    assert torch.allclose(torch.autograd.grad(f(x, 0).sum(), x)[0], 1 + 0.05 * x.cos(), atol=1e-6)


def test_stationary_variance_matches_closed_form():
    n = on_gpu_or(2**14, 2**20)
    x = random.normal((n,), seed=9, stream=1024, device=DEVICE) * (8 / 7) ** 0.5
    for step in range(60):
        fastscore.langevin_step(x, -x, 0.5, seed=7, step=step, out=x)
    assert abs(float(x.double().var()) - 8 / 7) < 5 * 8 / 7 * (2 / n) ** 0.5


def test_a_captured_graph_advances_with_its_step(gpu_backend):
    if DEVICE == "cpu" and gpu_backend != "cuda":
        pytest.skip("nothing of this device can be captured")
    x, step = torch.zeros(5000, device=DEVICE), torch.zeros((), dtype=torch.int64, device=DEVICE)
    fastscore.langevin_step(x, x, 0.1, seed=1, step=step)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = fastscore.langevin_step(x, x, 0.1, seed=1, step=step)
        step += 1
    for k in range(3):
        graph.replay()
        assert torch.equal(y, fastscore.langevin_step(x, x, 0.1, seed=1, step=k))


FORMS = [(0, True, True), (0, True, False), (0, False, False), (2, False, True), (6, False, True)]
IMAGES = [
    pytest.param((5, 6, 7, 9), id="scalar-loads"),
    pytest.param((3, 48, 16, 16), id="vector-loads"),
    pytest.param((on_gpu_or(40, 700), 6, 1, 1), id="one-pixel"),
    pytest.param(on_gpu_or((1, 6, 95, 96), (2, 6, 300, 301)), id="rows-in-splits"),
    pytest.param((3, 6, 2, 3, 5), id="three-dimensions"),
]


@pytest.fixture
def norm_backend(gpu_backend):
    if gpu_backend == "cuda":
        pytest.skip("these kernels for GPUs are Triton's")
    return gpu_backend


def norm_problem(form, shape, dtype, M=0, channels_last=False):
    """x, t, coef, tcoef and the cotangents of x and t, on the GPU and as float64 on the CPU."""
    generator = torch.Generator().manual_seed(0)
    KC = shape[1] * (1 + form.alpha + form.beta)

    def draw(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    x = draw(*shape) * 1.5 + draw(*shape[:2], *[1] * (len(shape) - 2))
    images = [x, draw(M, *shape), draw(*shape), draw(M, *shape)]
    compute = torch.promote_types(dtype, torch.float32)
    coefficients = [(1 + 0.5 * draw(shape[0], KC)).to(compute), draw(M, shape[0], KC).to(compute)]
    x, t, gy, gty = (
        (_last(a, a.dim() - len(shape) + 1) if channels_last else a).to(DEVICE) for a in images
    )
    coef, tcoef = (c.to(DEVICE) for c in coefficients)
    tensors = x, t, coef, tcoef, gy, gty
    return tensors, [a.cpu().double() for a in tensors]


def _last(a, channel):
    return a.movedim(channel, -1).contiguous().movedim(-1, channel)


@pytest.mark.parametrize("shape", IMAGES)
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels-last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_normalisation_and_its_gradient_equal_those_of_the_cpu(
    norm_backend, dtype, channels_last, shape
):
    for activation, (groups, alpha, beta) in pairs(OF_NORMS, FORMS):
        form = Form(groups, alpha, beta, 1e-5, activation)
        (x, _, coef, _, gy, _), (x_, _, coef_, _, gy_, _) = norm_problem(
            form, shape, dtype, channels_last=channels_last
        )
        exact = normalise_ref(x_.requires_grad_(), coef_.requires_grad_(), None, form)
        y = normalise(x.requires_grad_(), coef.requires_grad_(), None, form, None)
        assert y.dtype == dtype and close(y.detach(), exact.detach(), dtype), form
        assert y.movedim(1, -1).is_contiguous() == x.movedim(1, -1).is_contiguous()
        scale = cancelling(x_, coef_, gy_, form)
        # Of relu.
        off_the_kink = (
            normalise_ref(x_.detach(), coef_.detach(), None, form._replace(activation=None)).abs()
            > 1e-4
        )
        gy, gy_ = gy * off_the_kink.to(gy), gy_ * off_the_kink
        got, expected = (
            torch.autograd.grad(y, (x, coef), gy),
            torch.autograd.grad(exact, (x_, coef_), gy_),
        )
        # float32 sums of up to 90300 pixels, after float32 or float64 arithmetic.
        for a, b, least in zip(got, expected, (scale, 0)):
            assert relative(a, b, least) <= max(
                torch.finfo(dtype).eps, 1e-5 if dtype != torch.float64 else 1e-10
            ), form


@pytest.fixture
def clusters(gpu_backend):
    """CUDA C++ where it has the norms: their values, of samples that fit in a cluster of blocks."""
    if gpu_backend != "cuda":
        pytest.skip("of CUDA C++")
    if not in_clusters(torch.empty(1, 20, 30, 30, device=DEVICE), Form(0, True, True, 1e-5, None)):
        pytest.skip("this device has no clusters of blocks, or Triton is not there for gradients")


IN_CLUSTERS = [
    pytest.param((3, 48, 20, 20), 2, id="rows-of-a-few-channels"),
    pytest.param((1, 5, 67, 83), 2, id="odd"),
    pytest.param((2, 18, 1, 1025), 1, id="a-pixel-more-than-a-piece"),
    pytest.param((1, 6, 129, 130), 8, id="rows-in-pieces"),
    pytest.param((1, 18, 9, 10, 13), 2, id="three-dimensions"),
    pytest.param((1, 128, 32, 32), 8, id="image-of-ncsn"),
    # One block alone in a multiprocessor; without a GPU, two.
    pytest.param(on_gpu_or((1, 6, 150, 170), (1, 6, 300, 250)), 8, id="nearly-too-large"),
]


@pytest.mark.parametrize("shape, blocks", IN_CLUSTERS)
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_normalisation_in_clusters_equals_that_of_the_cpu(clusters, dtype, shape, blocks):
    forms = [form for form in FORMS if form[0] == 0]
    if dtype == torch.float32 or DEVICE == "cuda":
        forms += [(2, False, True)] * (shape[1] % 2 == 0) + [(1, False, True)]
    for activation, (groups, alpha, beta) in pairs(OF_NORMS, forms):
        form = Form(groups, alpha, beta, 1e-5, activation)
        (x, _, coef, *_), (x_, _, coef_, *_) = norm_problem(form, shape, dtype)
        if not in_clusters(x, form):
            assert groups == 2 and x[0].numel() <= 2 * 16384
            continue
        y, stats = _normalise(x, None, coef, None, None, form, "cuda", True)
        assert y.dtype == dtype and close(y, normalise_ref(x_, coef_, None, form), dtype), form
        x_ = x_.flatten(2)
        assert close(stats[0, ..., 0], x_.mean(-1), torch.float32)
        assert close(stats[0, ..., 1], x_.var(-1, correction=0), torch.float32)


@pytest.mark.parametrize("shape, blocks", IN_CLUSTERS)
def test_a_row_has_no_more_blocks_than_leave_room_for_three(clusters, shape, blocks):
    if DEVICE == "cuda":
        pytest.skip("the emulated device keeps a log")
    form = Form(0, True, True, 1e-5, None)
    (x, _, coef, *_), _ = norm_problem(form, shape, torch.float32)
    emulate.launched()
    normalise(x, coef, None, form, None)
    assert emulate.launched() == [("normalise_rows", shape[0] * blocks, 256, 0, 0)]


@pytest.mark.parametrize("shape", [(4, 20, 30, 30), (3, 7, 59, 61), (3, 128, 17, 16)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_a_sample_normalised_in_clusters_depends_on_nothing_but_itself(clusters, dtype, shape):
    """Neither on its batch nor on where it lies, which decides how wide its loads are."""
    form = Form(0, True, True, 1e-5, "silu")
    (x, _, coef, *_), _ = norm_problem(form, shape, dtype)
    whole = normalise(x, coef, None, form, None)
    elsewhere = torch.empty(x.numel() + 1, dtype=dtype, device=DEVICE)[1:].view(shape).copy_(x)
    assert torch.equal(normalise(elsewhere, coef, None, form, None), whole)
    for i in range(len(x)):
        part = slice(i, i + 1)
        assert torch.equal(normalise(x[part], coef[part], None, form, None), whole[part])
    strided = torch.stack([x, x], -1)[..., 0]
    assert not strided.is_contiguous()
    assert torch.equal(normalise(strided, coef, None, form, None), whole)


def test_a_large_mean_costs_a_norm_in_clusters_nothing(clusters):
    """Its variance by two passes, of pieces and then of channels: E[x²] - E[x]² would be noise."""
    form = Form(0, False, False, 1e-5, None)
    (x, _, coef, *_), _ = norm_problem(form, (2, 18, 60, 61), torch.float32)
    x = x + 4096
    exact = normalise_ref(x.cpu().double(), coef.cpu().double(), None, form)
    # Half an ulp of 4096 to each pixel and mean, over the deviation of 1.5.
    assert float((normalise(x, coef, None, form, None).cpu() - exact).abs().max()) < 1e-3


def test_labels_and_coefficients_of_a_norm_in_clusters(clusters):
    x = torch.randn(4, 20, 30, 30, device=DEVICE)
    table, labels = torch.randn(3, 60, device=DEVICE), torch.tensor([2, 0, 1, 2], device=DEVICE)
    form = Form(0, True, True, 1e-5, "elu")
    y = normalise(x, table, labels, form, None)
    exact = normalise_ref(*(a.cpu().double() for a in (x, table)), labels.cpu(), form)
    assert close(y, exact, torch.float32)
    # A kernel cannot raise.
    for wrong in (3, -1):
        labels[1] = wrong
        y = normalise(x, table, labels, form, None)
        assert y[1].isnan().all() and not y[[0, 2, 3]].isnan().any()
    for column in (4, 24, 44):   # of each coefficient
        broken = table.clone()
        broken[:, column] = float("inf")
        y = normalise(x, broken, labels.clamp(0), form, None)
        nan = y.isnan().flatten(2)
        assert nan[:, 4].all() and nan.sum() == 4 * 900
    x[2, 3, 4, 5] = float("nan")   # reaches all of a sample, through its channels' means
    nan = normalise(x, table, labels.clamp(0), form, None).isnan().flatten(1)
    assert nan[2].all() and not nan[[0, 1, 3]].any()


def test_derivatives_of_a_norm_in_clusters_are_triton_s(clusters):
    """Gradient, tangent, and what vmap makes of it, from the same statistics."""
    form = Form(0, True, True, 1e-5, "silu")
    (x, t, coef, _, gy, _), exact = norm_problem(form, (1, 18, 31, 30), torch.float32, M=1)
    x_, t_, coef_, _, gy_, _ = exact

    def f(x):
        return normalise(x, coef.to(x), None, form, None)

    def f_(x):
        return normalise_ref(x, coef_, None, form)

    leaf, leaf_ = x.clone().requires_grad_(), x_.clone().requires_grad_()
    gx, gx_ = torch.autograd.grad(f(leaf), leaf, gy)[0], torch.autograd.grad(f_(leaf_), leaf_, gy_)
    assert relative(gx, gx_[0]) < 1e-5
    ty, ty_ = torch.func.jvp(f, (x,), (t[0],))[1], torch.func.jvp(f_, (x_,), (t_[0],))[1]
    assert relative(ty, ty_) < 1e-5
    # Each sample has its row of coefficients.
    each = torch.func.vmap(lambda x, c: normalise(x[None], c[None], None, form, None)[0])
    x, coef = torch.cat([x, t[0]]), torch.cat([coef, coef.flip(1)])
    assert torch.equal(each(x, coef), f(x))


def test_what_no_cluster_takes_goes_to_triton_or_is_refused(clusters, monkeypatch):
    form = Form(0, True, True, 1e-5, "elu")

    def taken(shape, dtype=torch.float32, form=form, last=False):
        x = torch.empty(shape, dtype=dtype, device=DEVICE)
        return in_clusters(_last(x, 1) if last else x, form)

    assert taken((2, 20, 30, 30)) and taken((2, 20, 30, 30), torch.bfloat16)
    refused = [
        {"dtype": torch.float64},
        {"last": True},
        {"shape": (0, 20, 30, 30)},
        {"shape": (2, 18, 30, 30)},   # one program of Triton's keeps 16,384 elements
        {"shape": (2, 300, 15, 15)},   # few pixels for a warp
        {"shape": (1, 128, 64, 64)},   # 2 MiB a sample
        {"form": form._replace(groups=4, alpha=False)},
    ]
    for case in refused:
        assert not taken(**{"shape": (2, 20, 30, 30), **case}), case
    assert taken((1, 128, 64, 64), torch.bfloat16)
    # Whose channels meet nowhere: each is a row.
    assert taken((1, 64, 200, 200), form=form._replace(alpha=False))

    x = _last(torch.randn(2, 20, 30, 30, device=DEVICE), 1)
    coef = torch.rand(1, 60, device=DEVICE)
    with pytest.raises(ValueError, match=r"no CUDA C\+\+ kernel. Use 'triton'"):
        normalise(x, coef, None, form, None)
    # The automatic choice: what the C++ back end does not take, Triton does.
    whole = normalise(x.contiguous(), coef, None, form, "triton")
    y, _ = _normalise(x, None, coef, None, None, form, "cuda", True)
    assert y.movedim(1, -1).is_contiguous()
    assert close(y, whole.double().cpu(), torch.float32)


def test_a_device_without_clusters_takes_triton_s_passes(clusters):
    if DEVICE == "cuda":
        pytest.skip("this one has them")
    x, form = torch.randn(2, 20, 30, 30), Form(0, True, True, 1e-5, "elu")
    coef = torch.rand(1, 60)
    emulate.driver().emulated_clusters(0)
    emulate.driver().emulated_forget()
    _clusters.cache_clear()
    try:
        assert not in_clusters(x, form)
        emulate.launched()
        y, _ = _normalise(x, None, coef, None, None, form, "cuda", True)
        assert emulate.launched() == []
    finally:
        emulate.driver().emulated_clusters(16)
        emulate.driver().emulated_forget()
        _clusters.cache_clear()
    assert torch.equal(y, normalise(x, coef, None, form, "triton"))
    assert in_clusters(x, form)


def cancelling(x, coef, gy, form):
    """The norm of γ gy / σ, whose means are subtracted in the gradient of x.

    Of one pixel per channel they leave zero, up to rounding of terms 1/√ε = 316 times as large as
    gy.
    """
    B, C = x.shape[:2]
    grouped = x.detach().reshape(B, form.groups or C, -1)
    # (B, C).
    r = torch.rsqrt(grouped.var(-1, unbiased=False) + form.eps).repeat_interleave(
        C // (form.groups or C), 1
    )
    gamma = coef.detach()[:, :C].expand(B, C)
    return (gy * (gamma * r).reshape(B, C, *[1] * (x.dim() - 2))).norm()


def relative(a, b, least=0):
    return float((a.cpu().double() - b).norm() / max(float(b.norm()), float(least), 1e-3))


@pytest.mark.parametrize("M", [1, 3])
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels-last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tangents_and_their_gradient_equal_those_of_the_cpu(norm_backend, dtype, channels_last, M):
    bound = max(4 * torch.finfo(dtype).eps, 2e-5 if dtype != torch.float64 else 1e-9)
    for (groups, alpha, beta), activation in pairs(FORMS, (None, "silu", "gelu")):
        for shape in ((3, 6, 7, 9), on_gpu_or((1, 6, 48, 49), (2, 6, 90, 91))):
            form = Form(groups, alpha, beta, 1e-5, activation)
            on_gpu, on_cpu = norm_problem(form, shape, dtype, M, channels_last)
            x, t, coef, tcoef = (a.requires_grad_() for a in on_gpu[:4])
            y, ty, _ = _normalise(x, t, coef, tcoef, None, form, "triton", True)
            assert close(y.detach(), normalise_ref(on_cpu[0], on_cpu[2], None, form), dtype)
            assert relative(ty.detach(), _dual_ref(*on_cpu[:4], None, form)) <= bound
            got = torch.autograd.grad((y, ty), (x, t, coef, tcoef), on_gpu[4:])
            for a, b in zip(got, _gradient_ref(*on_cpu[:4], None, *on_cpu[4:], form)):
                assert relative(a, b) <= bound, form


def test_normalisation_has_every_derivative(norm_backend):
    form = Form(0, True, True, 1e-5, "silu")
    (x, _, table, *_), _ = norm_problem(form, on_gpu_or((2, 2, 2, 1), (3, 6, 2, 2)), torch.float64)
    x, table, labels = (
        x.requires_grad_(),
        table.requires_grad_(),
        torch.tensor([2, 0, 2][-len(x) :], device=DEVICE) % len(x),
    )

    def f(x, table):
        return fastscore.conditional_instance_norm_plus(x, labels, table, activation="silu")

    assert torch.autograd.gradcheck(f, (x, table), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(f, (x, table), check_fwd_over_rev=True)


def test_compiled_normalisation_equals_eager(norm_backend):
    form = Form(0, True, True, 1e-5, "elu")
    (x, t, table, _, gy, _), _ = norm_problem(form, (4, 6, 8, 8), torch.float32, 1)
    x, table, labels = (
        x.requires_grad_(),
        table.requires_grad_(),
        torch.tensor([1, 0, 3, 1], device=DEVICE),
    )

    def f(x, table):
        return fastscore.conditional_instance_norm_plus(x.sin(), labels, table, activation="elu")

    compiled = torch.compile(f, fullgraph=True)
    assert torch.allclose(compiled(x, table), f(x, table), atol=1e-6)
    for a, b in zip(
        torch.autograd.grad(compiled(x, table), (x, table), gy),
        torch.autograd.grad(f(x, table), (x, table), gy),
    ):
        assert torch.allclose(a, b, atol=1e-5, rtol=1e-5)
    tangent = torch.compile(
        lambda x, t: torch.func.jvp(lambda x: f(x, table), (x,), (t,))[1], fullgraph=True
    )
    assert torch.allclose(
        tangent(x, t[0]), torch.func.jvp(lambda x: f(x, table), (x,), (t[0],))[1], atol=1e-5
    )


def test_gradients_of_a_table_and_of_split_rows_are_repeatable(norm_backend):
    x = torch.randn(*on_gpu_or((4, 5, 70, 70), (64, 5, 200, 200)), device=DEVICE)
    labels = torch.arange(len(x), device=DEVICE) % 3
    table = torch.randn(4, 15, device=DEVICE, requires_grad=True)

    def gradient():
        y = fastscore.conditional_instance_norm_plus(x, labels, table, activation="elu")
        return torch.autograd.grad(y.square().sum(), table)[0]

    assert torch.equal(gradient(), gradient())


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels-last"])
def test_normalisation_of_more_than_two_to_the_31_elements(norm_backend, channels_last):
    """The last sample of a large tensor equals that sample on its own; 12 GB in float16."""
    large = DEVICE == "cuda" and torch.cuda.get_device_properties(0).total_memory >= 24 * 2**30
    x = torch.empty(
        (2**15 + 1 if large else on_gpu_or(3, 9), 64, 32, 32), dtype=torch.float16, device=DEVICE
    )
    x = x.to(memory_format=torch.channels_last) if channels_last else x
    for part in x.split(4096):   # in place, so that memory is needed twice and not four times
        part.normal_()
    gamma = torch.ones(64, device=DEVICE, requires_grad=True)
    y, last = fastscore.instance_norm_plus(x, gamma, gamma, activation="elu"), x[-1:].clone()
    alone = fastscore.instance_norm_plus(last, gamma, gamma, activation="elu")
    assert torch.equal(y[-1:], alone), (
        f"{int((y[-1:] != alone).sum())} differ by up to {float((y[-1:] - alone).abs().max())}"
    )


SAMPLER_OPTIONS = {
    "annealed_langevin": {"sigmas": [1.0, 0.5, 0.2], "steps_per_level": 3, "step_size": 2e-3},
    "consistent_annealed": {"sigmas": [1.0, 0.5, 0.2]},
    "predictor_corrector": {"sigmas": [1.0, 0.5, 0.2]},
    "probability_flow": {"sigmas": [1.0, 0.5, 0.2]},
    "langevin": {"steps": 5, "step_size": 0.01, "sigma": 0.5},
    "mala": {"steps": 5, "step_size": 0.01},
}


@pytest.mark.parametrize("sampler", SAMPLER_OPTIONS)
def test_samplers_draw_what_the_cpu_draws_and_never_wait_for_the_device(sampler):
    def score(x, sigma):
        return (0.7 - x) / (0.04 + sigma[:, None] ** 2)

    def log_prob(x):
        return -0.5 * (x - 0.7).square().sum(1) / 0.04

    def states(x):
        f = log_prob if sampler == "mala" else score
        return getattr(fastscore.sampling, sampler)(
            f, x, seed=1, diagnostics=True, **SAMPLER_OPTIONS[sampler]
        )

    start = random.normal((32, 12), seed=2, stream=1024, device=DEVICE)
    list(states(start))   # kernels are compiled
    run, debug = states(start), torch.cuda.set_sync_debug_mode if DEVICE == "cuda" else str
    debug("error")
    try:
        *_, last = run
    finally:
        debug("default")
    *_, expected = cpu(lambda x: list(states(x)), start)
    assert torch.allclose(last.x.cpu(), expected.x, atol=1e-4)


@pytest.mark.parametrize("name", [name for name in ACTIVATIONS if name])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_activation_of_a_stack_and_its_gradient(norm_backend, dtype, name):
    for shape, M in (((3, 5, 7), 1), ((8, 1024), 3), ((1024,), 2), ((2, 0), 1)):
        s, g, s_, g_ = problem(shape, M, dtype, name)
        s = s.to(DEVICE).requires_grad_()
        y = activate_dual(s, name)
        assert y.dtype == dtype and near(y.detach().cpu(), exact(name, s_), dtype)
        assert near(
            torch.autograd.grad(y, s, g.to(DEVICE))[0].cpu(),
            exact_gradient(name, s_, g_),
            dtype,
            60,
        )


@pytest.mark.parametrize("straight", [True, False], ids=["straight", "bent"])
@pytest.mark.parametrize("name", [name for name in ACTIVATIONS if name])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_activation_of_curves_and_its_gradient(norm_backend, dtype, name, straight):
    """Against the equations in float64.

    Slopes are within a few ulp of 1, which u'^2 and u'' multiply, and g in reverse.
    """
    generator = torch.Generator().manual_seed(0)
    for shape, M in (((3, 5, 7), 1), ((8, 1024), 3), ((1024,), 2), ((2, 0), 1)):
        s, g = (
            torch.randn(1 + k * M, *shape, generator=generator).to(dtype)
            for k in (1 if straight else 2, 2)
        )
        s[0] = 4 * s[0] + 0.125 * s[0].sign()   # away from the kink of relu
        wide, leaf = s.double().requires_grad_(), s.to(DEVICE).requires_grad_()
        room = 1 + wide[1:].detach().square().sum(0) + wide[1:].detach().abs().sum(0)
        y, got = activate_jet_ref(wide, M, name), activate_jet(leaf, M, name)
        (right,), (found,) = (
            torch.autograd.grad(y, wide, g.double()),
            torch.autograd.grad(got, leaf, g.to(DEVICE)),
        )
        assert got.dtype == dtype and found.dtype == dtype
        eps, least = (
            torch.finfo(dtype).eps,
            torch.finfo(torch.promote_types(dtype, torch.float32)).eps,
        )
        for a, b, scale in ((got, y, room), (found, right, room * (1 + g.double().abs().sum(0)))):
            assert bool(((a.cpu().double() - b).abs() <= eps * b.abs() + 20 * least * scale).all())


def test_curves_of_more_than_two_to_the_31_elements(norm_backend):
    large = DEVICE == "cuda" and torch.cuda.get_device_properties(0).total_memory >= 24 * 2**30
    s = torch.zeros((2, 2**30 + 2**16 if large else 5000), dtype=torch.float16, device=DEVICE)
    s[:, -3000:] = torch.randn(2, 3000)
    assert torch.equal(
        activate_jet(s, 1, "silu")[:, -3000:], activate_jet(s[:, -3000:].contiguous(), 1, "silu")
    )


def test_stack_of_more_than_two_to_the_31_elements(norm_backend):
    large = DEVICE == "cuda" and torch.cuda.get_device_properties(0).total_memory >= 24 * 2**30
    s = torch.zeros((2, 2**30 + 2**16 if large else 5000), dtype=torch.float16, device=DEVICE)
    s[:, -3000:] = torch.randn(2, 3000)
    assert torch.equal(
        activate_dual(s, "silu")[:, -3000:], activate_dual(s[:, -3000:].contiguous(), "silu")
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape, M, offset",
    [
        pytest.param((5, 7), 3, 2**33 + 5, id="short"),
        pytest.param((3, 4, 33, 5), 3, 2**33 + 5, id="unaligned"),
        pytest.param((2, 20_000), 3, 2**33 + 5, id="splits"),
        pytest.param((700, 2), 3, 2**33 + 5, id="many-rows-per-program"),
        pytest.param((3, 8192), 2, 2**33 + 128, id="whole-tiles"),
        # And blocks on both sides of 2^32
        pytest.param((2, 2**18), 1, 2**39 - 2**18, id="several-tiles-per-program"),
    ],
)
def test_projections_and_their_gradient_equal_those_of_the_cpu(
    norm_backend, dtype, shape, M, offset
):
    numbers = 2**40 + 7, 3, random.PROJECTION, offset
    js, s = (
        torch.randn(M, *shape).to(DEVICE, dtype).requires_grad_(),
        torch.randn(shape).to(DEVICE, dtype).requires_grad_(),
    )
    key = {
        "seed": numbers[0],
        "step": numbers[1],
        "stream": numbers[2],
        "offset": numbers[3],
        "dtype": torch.float64,
    }
    v = torch.stack(
        [random.rademacher(shape, substream=m, backend="reference", **key) for m in range(M)]
    )
    got = project(s, js, None, numbers, norm_backend)
    wide = [t.detach().cpu().double().requires_grad_() for t in (s, js)]
    expected = project_ref(*wide, v)
    for a, b in zip(got, expected):  # sums of up to 2^18 terms of size 1, at random
        assert torch.allclose(
            a.detach().cpu().double(),
            b.detach(),
            rtol=1e-5,
            atol=1e-3 if dtype != torch.float64 else 1e-9,
        )
    weights = [torch.randn(a.shape) for a in got]
    gradients = torch.autograd.grad([(a * w.to(a)).sum() for a, w in zip(got, weights)], (s, js))
    for a, b in zip(
        gradients,
        torch.autograd.grad([(a * w.to(a)).sum() for a, w in zip(expected, weights)], wide),
    ):
        assert near(a.cpu(), b, dtype, 60)


def mlp():
    nn = torch.nn
    return nn.Sequential(
        nn.Linear(12, 40), nn.Tanh(), nn.Linear(40, 40), nn.Softplus(), nn.Linear(40, 12)
    )


def conv_net():
    conv, nn = (lambda a, b: torch.nn.Conv2d(a, b, 3, padding=1)), torch.nn
    norms = nn.InstanceNorm2d(8, affine=True), nn.GroupNorm(2, 8), nn.BatchNorm2d(8)
    return nn.Sequential(
        conv(3, 8),
        norms[0],
        nn.ELU(),
        conv(8, 8),
        norms[1],
        nn.SiLU(),
        conv(8, 8),
        norms[2],
        nn.GELU(),
        conv(8, 3),
    )


def double_backprop(net, x, v):
    """Gradients of Σ vᵀJv + ½ Σ ‖s‖² to every parameter, in float64 on the CPU."""
    wide, leaf = copy.deepcopy(net).cpu().double(), x.cpu().double().requires_grad_()
    y, total = wide(leaf), 0
    for d in v.cpu().double():
        total = total + (torch.autograd.grad((y * d).sum(), leaf, create_graph=True)[0] * d).sum()
    return torch.autograd.grad(
        total + 0.5 * y.square().sum(), list(wide.parameters()), allow_unused=True
    )


def worst(gradients, expected):
    """Relative to the gradient as a whole."""
    pairs = [
        (torch.zeros_like(b) if a is None else a.cpu().double(), b)
        for a, b in zip(gradients, expected)
        if b is not None
    ]
    return float(
        torch.cat([(a - b).flatten() for a, b in pairs]).norm()
        / torch.cat([b.flatten() for _, b in pairs]).norm()
    )


@pytest.fixture
def full_float32():
    """Convolutions and products without TensorFloat-32, which keeps three digits."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@pytest.mark.parametrize("M", [1, 4])
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels-last"])
@pytest.mark.parametrize(
    "make, shape", [(mlp, (32, 12)), (conv_net, (6, 3, 8, 8))], ids=["mlp", "conv-net"]
)
def test_jvp_of_a_network_and_its_gradient_equal_double_backprop(
    norm_backend, full_float32, make, shape, channels_last, M
):
    if channels_last and make is mlp:
        pytest.skip("no images")
    torch.manual_seed(0)
    net, x, v = (
        make().to(DEVICE),
        torch.randn(shape).to(DEVICE),
        torch.randn(M, *shape).sign().to(DEVICE),
    )
    if channels_last:
        net, x = net.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    y, jv = fastscore.jvp(net, x, v)
    assert torch.allclose(y, net(x), atol=1e-5)
    got = torch.autograd.grad(
        (jv * v).sum() + 0.5 * y.square().sum(), list(net.parameters()), allow_unused=True
    )
    assert worst(got, double_backprop(net, x, v)) < 1e-5


LOSSES = {
    "sliced": lambda s, x: losses.sliced(s, x, projections=2, seed=3),
    "sliced-plain": lambda s, x: losses.sliced(s, x, variance_reduced=False, seed=3),
    "sliced-gaussian": lambda s, x: losses.sliced(s, x, distribution="gaussian", seed=3),
    "sliced-sphere": lambda s, x: losses.sliced(s, x, distribution="sphere", seed=3),
    "exact": lambda s, x: losses.exact(s, x, chunk=5),
    "explicit": lambda s, x: losses.exact(s, x, target=lambda x: -2 * x),
    "finite-difference": lambda s, x: losses.finite_difference_sliced(s, x, seed=3, projections=2),
}
CONDITIONAL = {
    method: lambda s, x, sigmas, method=method: losses.noise_conditional(
        s, x, sigmas, method=method, seed=3, step=2
    )
    for method in METHODS
} | {
    "denoising-number": lambda s, x, sigmas: losses.denoising(s, x, 0.5, seed=3),
    "labels": lambda s, x, sigmas: losses.noise_conditional(
        s, x, sigmas, labels=torch.arange(len(x), device=x.device) % 3, seed=3
    ),
}


def score(kind, conditional):
    torch.manual_seed(1)
    sigmas = torch.tensor([1.0, 0.5, 0.1]) if conditional else None
    if kind == "mlp":
        net = ScoreMLP(12, 16, 1, sigmas=sigmas)
        torch.nn.init.normal_(net.last.weight)
        return net
    return EnergyScore(EnergyMLP(12, 16, 1, sigmas=sigmas))


def value_and_gradient(loss, net, *args):
    value = loss(net, *args)
    return value.detach(), torch.autograd.grad(
        value.sum(), list(net.parameters()), allow_unused=True
    )


@pytest.mark.parametrize("kind", ["mlp", "energy"])
@pytest.mark.parametrize("name", [*LOSSES, *CONDITIONAL])
def test_losses_equal_those_of_the_cpu(norm_backend, full_float32, name, kind):
    """The same seed draws the same noise and the same signs; the CPU's are float64.

    The GPU is never waited for.
    """
    loss, rest = (
        (LOSSES[name], ())
        if name in LOSSES
        else (CONDITIONAL[name], (torch.tensor([1.0, 0.5, 0.1]),))
    )
    x, net = torch.randn(7, 12), score(kind, bool(rest))
    on_gpu = copy.deepcopy(net).to(DEVICE), x.to(DEVICE), *(t.to(DEVICE) for t in rest)
    value_and_gradient(loss, *on_gpu)   # kernels are loaded, which may wait
    with not_waiting():
        value, gradients = value_and_gradient(loss, *on_gpu)
    with fastscore.use_backend("reference"):
        expected, exact_gradients = value_and_gradient(loss, net.double(), x.double(), *rest)
    # Differences of scores over 2h, h = 0.1/sqrt(12), lose a factor 20.
    bound = 2e-4 if name == "finite-difference" else 2e-5
    assert (
        float((value.cpu().double() - expected).norm() / expected.norm()) < bound
        and worst(gradients, exact_gradients) < 10 * bound
    )


@contextlib.contextmanager
def not_waiting():
    if DEVICE == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if DEVICE == "cuda":
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("kind", ["mlp", "energy"])
def test_score_of_an_energy_and_its_products(norm_backend, full_float32, kind):
    net, x, v = score(kind, False), torch.randn(5, 12), torch.randn(2, 5, 12)
    wide = copy.deepcopy(net).double()
    expected = torch.stack([torch.func.jvp(wide, (x.double(),), (d,))[1] for d in v.double()])
    net, x, v = net.to(DEVICE), x.to(DEVICE), v.to(DEVICE)
    s, hv = net.jvp(x, v) if kind == "energy" else fastscore.jvp(net, x, v)
    assert torch.allclose(s.cpu().double(), wide(x.cpu().double()), atol=1e-5)
    assert torch.allclose(hv.detach().cpu().double(), expected, atol=1e-4, rtol=1e-4)
    y, vjv = fastscore.rademacher_jvp(net, x, projections=2, seed=4)
    key = {"seed": 4, "stream": random.PROJECTION, "dtype": torch.float64}
    signs = torch.stack([cpu(random.rademacher, (5, 12), substream=m, **key) for m in range(2)])
    exact = [(torch.func.jvp(wide, (x.cpu().double(),), (d,))[1] * d).sum(1) for d in signs]
    assert torch.allclose(vjv.detach().cpu().double(), torch.stack(exact), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["sliced", "denoising", "sliced-vr"])
def test_losses_under_autocast_stay_near_float64(norm_backend, name):
    """bfloat16 keeps two to three digits."""
    loss, rest = (
        (LOSSES[name], ())
        if name in LOSSES
        else (CONDITIONAL[name], (torch.tensor([1.0, 0.5, 0.1]),))
    )
    x, net = torch.randn(64, 12), score("mlp", bool(rest))
    with torch.autocast(DEVICE, torch.bfloat16):
        value, gradients = value_and_gradient(
            loss, copy.deepcopy(net).to(DEVICE), x.to(DEVICE), *(t.to(DEVICE) for t in rest)
        )
    assert value.dtype == torch.float32
    with fastscore.use_backend("reference"):
        expected, exact_gradients = value_and_gradient(loss, net.double(), x.double(), *rest)
    assert (
        float((value.cpu().double() - expected).norm() / expected.norm()) < 0.03
        and worst(gradients, exact_gradients) < 0.03
    )


def test_compiled_stack_and_projection_equal_eager(norm_backend):
    if DEVICE == "cpu" and norm_backend == "triton":
        pytest.skip("the interpreter cannot be compiled")
    x = torch.randn(3, 4, 50, device=DEVICE, requires_grad=True)

    def f(x):
        y = activate_dual(x.sin(), "gelu")
        vjv, vs, ss = project(y[0], y[1:], None, (5, 0, random.PROJECTION, 0), norm_backend)
        return (vjv + vs).sum() + ss.sum()

    compiled = torch.compile(f, fullgraph=True)
    assert torch.allclose(compiled(x), f(x), rtol=1e-5)
    assert torch.allclose(
        torch.autograd.grad(compiled(x), x)[0], torch.autograd.grad(f(x), x)[0], atol=1e-4
    )


def test_compiled_loss_equals_eager(norm_backend):
    if DEVICE == "cpu" and norm_backend == "triton":
        pytest.skip("the interpreter cannot be compiled")
    net, x = score("mlp", False).to(DEVICE), torch.randn(7, 12, device=DEVICE)
    compiled = torch.compile(lambda x: losses.sliced(net, x, seed=3))   # a graph break at jvp
    assert torch.allclose(compiled(x), losses.sliced(net, x, seed=3), atol=1e-4)


@pytest.fixture
def only_direct(gpu_backend, monkeypatch):
    """Calls without a request go from Python to the launch of this back end, or are an error."""
    if backends.load_extension() is not None or direct.door is None:
        pytest.skip("no extension, or PyTorch has no table of DLPack functions")
    launches, launchers = 0, None
    if gpu_backend == "cuda":
        emulated = DEVICE == "cpu"
        launches = emulate.driver().emulated_launches() if emulated else direct.door.launches()
    elif gpu_backend == "triton":
        from fastscore.kernels.direct import LAUNCHERS as launchers

    def chosen(*arguments):
        raise AssertionError("the call was not plain")

    number = direct.CUDA if DEVICE == "cuda" else direct.CPU
    direct.door.serve(number, launches, launchers)
    monkeypatch.setattr(direct, "automatic", direct.door)
    monkeypatch.setattr(backends, "_resolve", chosen)
    yield monkeypatch
    direct.door.serve(number, 0, None)
    backends._choose.cache_clear(), backends._open_for_gpu.cache_clear()   # serves again


def test_direct_calls_have_the_bits_of_checked_ones(gpu_backend, only_direct):
    x, s = torch.randn(2, 4, 150, device=DEVICE)
    image, gamma = torch.randn(2, 3, 4, 4, device=DEVICE), torch.rand(3, device=DEVICE)
    each, out = torch.rand(4, device=DEVICE), torch.empty_like(x)
    calls = [
        lambda: fastscore.langevin_step(x, s, 0.1, seed=5, step=3),
        lambda: fastscore.langevin_step(x, s, 0.1, seed=6, step=4, out=out),
        lambda: fastscore.noisy_update(x, s, each, each, seed=5),
        lambda: fastscore.perturb(x, 0.3, seed=5),
        lambda: fastscore.denoising_loss(x, 0.3, seed=5),
        lambda: random.normal((3, 41), seed=5, stream=1024, device=DEVICE),
        lambda: random.rademacher((3, 41), seed=5, stream=1024, device=DEVICE),
    ]
    if gpu_backend != "cuda":
        calls.append(lambda: fastscore.instance_norm_plus(image, gamma, activation="elu"))
    found = [[call().clone() for call in calls] for _ in range(2)]   # kept launches, too

    only_direct.undo()
    only_direct.setattr(direct, "served", {})
    only_direct.setattr(direct, "automatic", None)
    for call, direct_ones in zip(calls, zip(*found), strict=True):
        wanted = call()
        assert all(torch.equal(one, wanted) for one in direct_ones)
