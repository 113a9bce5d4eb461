"""The direct way from Python to a GPU's kernels, on the device that build_support/emulate.py makes
of the CPU and on Triton's interpreter.

It runs what is plain, as the checked way does, and refuses everything else.
"""

import contextlib
import math
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import children
import pytest
import test_direct
import torch
from test_direct import DTYPES, LAYOUTS, OUTS, check_out, coefficients, counted, norm_calls
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

import fastscore
from fastscore import backend, direct, random

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "build_support"))
import emulate  # noqa: E402

pytestmark = pytest.mark.skipif(
    direct.door is None,
    reason="the extension is not built, or PyTorch has no table of DLPack functions",
)
KEY = {"seed": -(2**70) + 5, "step": 2**33 + 9, "offset": 13}


@pytest.fixture
def device():
    reason = emulate.why_not()
    if reason is not None:
        pytest.skip(reason)
    with emulate.installed() as device, emulate.served():
        emulate.launched()
        yield device


@contextlib.contextmanager
def by_triton():
    """Within: direct calls on the CPU's tensors go to Triton's launchers."""
    pytest.importorskip("triton")
    if not backend.interpreting():
        pytest.skip("Triton's interpreter is off")
    assert backend.load_triton() is None
    from fastscore.kernels.direct import LAUNCHERS

    direct.door.serve(direct.CPU, 0, LAUNCHERS)
    try:
        yield
    finally:
        direct.door.serve(direct.CPU, 0, None)


def checked(call, name="cuda"):
    """The same call through PyTorch's dispatcher."""
    with fastscore.use_backend(name), pytest.MonkeyPatch.context() as patch:
        patch.setattr(direct, "served", {})
        return call()


def same(found, wanted):
    return (
        found.dtype == wanted.dtype
        and found.stride() == wanted.stride()
        and torch.equal(found, wanted)
    )


def noisy_calls(x, d, c):
    return {
        "noisy_update": lambda: fastscore.noisy_update(x, d, c, c, **KEY, stream=1030),
        "langevin_step": lambda: fastscore.langevin_step(x, d, c, **KEY),
        "perturb": lambda: fastscore.perturb(x, c, **KEY),
        "denoising_loss": lambda: fastscore.denoising_loss(x, c, **KEY),
    }


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_plain_calls_are_launched_directly_and_give_the_same_bits(device, dtype, layout):
    torch.manual_seed(0)
    x, d = (
        LAYOUTS[layout](torch.randn(5, 3, 4, 6, dtype=torch.float64).to(dtype)) for _ in range(2)
    )
    each = coefficients(dtype, 5)
    # The values of these are not looked at; the root of a step size is PyTorch's to take.
    for kind in ("float", "int", "0-d", "(B,)"):
        for name, call in noisy_calls(x, d, each[kind]).items():
            emulate.launched()
            with counted() as seen:
                found = call()
            launches = emulate.launched()
            if name == "langevin_step" and kind in ("0-d", "(B,)"):
                continue   # below
            assert seen == [name] and launches, (name, kind, seen)
            assert same(found, checked(call)) and emulate.launched() == launches, name


def test_a_step_size_in_memory_goes_the_checked_way(device):
    x = torch.ones(4, 3)
    arguments = (direct.LANGEVIN, x, x, torch.tensor(0.1), None, 0, 0, 1, 0, None)
    assert direct.door.noisy_update(*arguments) is None
    assert direct.door.noisy_update(*arguments[:3], 0.1, *arguments[4:]) is not None
    with fastscore.use_backend("cuda"):
        found = fastscore.langevin_step(x, x, torch.tensor(0.1), seed=3)
    assert torch.equal(found, fastscore.langevin_step(x, x, torch.tensor(0.1).item(), seed=3))


@pytest.mark.parametrize("draw", [random.normal, random.uniform, random.rademacher])
@pytest.mark.parametrize("dtype", [None, *DTYPES])
def test_draws_are_launched_directly_and_give_the_same_bits(device, draw, dtype):
    def call():
        return draw((3, 41), seed=7, step=3, stream=1024, substream=5, offset=2, dtype=dtype)

    with counted() as seen:
        found = call()
    launches = emulate.launched()
    through = [] if draw is random.normal else ["draw"]
    assert seen == [draw.__name__, *through] and launches
    assert same(found, checked(call)) and emulate.launched() == launches


def test_words_are_launched_directly_and_give_the_same_bits(device):
    def call():
        return random.words(130, seed=7, stream=1024, offset=3)

    with counted() as seen:
        found = call()
    assert seen == ["words"] and emulate.launched() and same(found, checked(call))


def test_sums_that_need_memory_go_the_checked_way(device):
    """Of a sample of several splits."""
    s = torch.randn(2, 40_000)
    assert direct.door.noise_reduce(0, s, 0.5, 3, 0, 2, 0) is None
    assert direct.door.noise_reduce(0, s[:, :16], 0.5, 3, 0, 2, 0) is not None


@pytest.mark.parametrize("where", OUTS)
def test_out_gives_the_same_bits_and_takes_the_same_way(device, where):
    emulate.launched()
    check_out(where)
    assert emulate.launched()


def test_autograd_sees_that_out_was_written(device):
    x = torch.rand(4, 2, requires_grad=True)
    h = x.exp()   # whose derivative is itself
    loss = h.sum()
    with torch.no_grad(), counted() as seen:
        fastscore.langevin_step(h.detach(), h.detach(), 0.1, seed=0, out=h.detach())
    assert seen == ["langevin_step"]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


refused = test_direct.refused


@pytest.mark.parametrize("name", test_direct.ODD_TENSORS)
def test_tensors_that_are_not_plain_are_refused(device, name):
    test_direct.test_tensors_that_are_not_plain_are_refused(name)


X = torch.ones(4, 3)


@pytest.mark.parametrize(
    "odd",
    [
        math.nan,
        math.inf,
        1e39,
        10**400,
        True,
        "1",
        None,
        1j,
        torch.ones(3),
        torch.ones(4, 1),
        torch.ones(4).double(),
        torch.ones(4, requires_grad=True),
        torch.ones(4, device="meta"),
        torch.ones(4, 2)[:, 0],
        X[:, 0],
    ],
    ids=range(15),
)
def test_coefficients_that_are_not_plain_are_refused(device, odd):
    assert refused(a=odd)
    assert refused(b=odd)
    assert refused(kind=direct.LANGEVIN, a=odd)
    assert refused(kind=direct.PERTURB, d=None, b=odd)


def test_negative_step_sizes_are_refused_and_negative_drifts_are_not(device):
    assert not refused(a=-1.0, b=-1.0)
    assert refused(kind=direct.LANGEVIN, a=-1.0)
    assert refused(kind=direct.PERTURB, d=None, b=-1.0)


def test_out_that_shares_memory_is_refused(device):
    test_direct.test_out_that_shares_memory_is_refused()
    each = torch.ones(12)
    assert refused(out=each.view(4, 3), a=each[:4])
    assert not refused(out=torch.ones(4, 3), a=each[:4])


def fake_call():
    with FakeTensorMode() as mode:
        x = mode.from_tensor(torch.ones(4, 3))
    return refused(x=x, d=x)


def test_modes_transforms_and_fake_tensors_close_the_door(device):
    test_direct.test_modes_and_transforms_close_the_door()
    assert fake_call()
    with FakeTensorMode():
        assert refused()
    with torch.no_grad():
        assert not refused(x=torch.ones(4, 3, requires_grad=True))
    assert emulate.launched()


def test_gradients_transforms_and_tangents_go_the_long_way(device):
    """And are those of the reference, while the device serves what is plain."""
    x, s = torch.rand(3, 4), torch.rand(3, 4)

    def step(x):
        return fastscore.langevin_step(x, 2 * s + x, 0.1, seed=4)

    def results():
        leaf = x.clone().requires_grad_()
        yield torch.autograd.grad(step(leaf).sum(), leaf)[0]
        yield torch.func.jvp(step, (x,), (s,))[1]
        yield torch.vmap(step)(torch.stack([x, x]))
        with forward_ad.dual_level():
            yield forward_ad.unpack_dual(step(forward_ad.make_dual(x, s))).tangent

    with fastscore.use_backend("cuda"):
        found = list(results())
    with fastscore.use_backend("reference"):
        wanted = list(results())
    for a, b in zip(found, wanted, strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_compiled_functions_do_not_come_to_the_door(device, monkeypatch):
    x = torch.rand(3, 4)

    def refuse(*arguments):
        raise AssertionError("a compiled graph would hold one launch of it")

    closed = SimpleNamespace(noisy_update=refuse, fill=refuse, noise_reduce=refuse)
    wanted = fastscore.langevin_step(x, x, 0.1, seed=4)
    monkeypatch.setattr(direct, "automatic", closed)
    monkeypatch.setattr(direct, "served", {"cuda": closed})

    @torch.compile(backend="eager", fullgraph=True)
    def step(x):
        return fastscore.langevin_step(x, x, 0.1, seed=4, backend="cuda")

    assert torch.equal(step(x), wanted)


def test_launches_are_on_the_device_and_the_current_stream_of_their_tensors(device):
    x, each = torch.randn(40, 150), torch.rand(40)
    out = torch.empty_like(x)
    wanted = fastscore.noisy_update(x, x, 0.1, each, seed=5)
    assert {launch[-2:] for launch in emulate.launched()} == {(0, 0)}
    with emulate.on_device(x, each, out):
        device.emulated_use_stream(1, 1)
        try:
            fastscore.noisy_update(x, x, 0.1, each, seed=5, out=out)
        finally:
            device.emulated_use_stream(1, 0)
    launches = emulate.launched()
    assert launches and {launch[-2:] for launch in launches} == {(1, 1)}
    assert torch.equal(out, wanted)
    assert device.emulated_current_device() == 0   # as it was before


def test_a_launch_that_fails_says_what_the_checked_way_says(device):
    """Here that a coefficient is read from an odd address."""
    x, each = torch.randn(4, 1500), torch.rand(4)

    def call(each):
        return fastscore.perturb(x, each, seed=5)

    odd = emulate.misaligned(each)
    words = "noisy_update could not be launched: a misaligned address"
    for way in (call, lambda each: checked(lambda: call(each))):
        with pytest.raises(RuntimeError, match=words):
            way(odd)
        assert device.emulated_current_device() == 0
    call(each)


def test_a_captured_direct_call_is_replayed(device):
    """As a CUDA graph holds it: a launch on the stream that is captured."""
    x, s = torch.rand(3, 40), torch.rand(3, 40)
    out = torch.zeros_like(x)
    first = device.emulated_captured()
    device.emulated_capture(1)
    try:
        with counted() as seen:
            fastscore.langevin_step(x, s, 0.1, seed=5, out=out)
    finally:
        device.emulated_capture(0)
    assert seen == ["langevin_step"] and not out.any()   # nothing has run
    for _ in range(2):
        x.mul_(0.9)
        assert device.emulated_replay(first, device.emulated_captured()) is None
        assert torch.equal(out, fastscore.langevin_step(x, s, 0.1, seed=5))


def test_a_key_on_the_device_goes_the_checked_way(device):
    assert refused(seed=torch.tensor(5)) and refused(step=torch.tensor(5))


def test_samplers_launch_directly_where_the_device_was_chosen(device):
    x = torch.rand(4, 6)

    def run():
        states = fastscore.sampling.langevin(lambda x: -x, x, step_size=1e-3, steps=3, seed=3)
        return [state.x for state in states][-1]

    called = []
    with fastscore.use_backend("cuda"), pytest.MonkeyPatch.context() as patch:
        plain = backend.call
        patch.setattr(backend, "call", lambda *args: called.append(args[1]) or plain(*args))
        found = run()
        assert called == [] and emulate.launched()
        patch.setattr(direct, "served", {})
        assert torch.equal(found, run()) and called == ["noisy_update"] * 3


# The choice.


@pytest.fixture
def a_gpu(monkeypatch):
    """The calls of a door that serves a GPU, once the automatic choice has been made on a machine
    where `there` back ends are."""
    pytest.importorskip("triton")
    calls = []
    door = SimpleNamespace(launches=lambda: 5, serve=lambda *arguments: calls.append(arguments))

    def choose(there, environment="auto"):
        def why_not(name, device):
            return None if name in there or name == "reference" else "it is not there"

        monkeypatch.setattr(backend, "why_not", why_not)
        monkeypatch.setattr(backend, "interpreting", lambda: False)
        monkeypatch.setattr(backend, "_environment", lambda: environment)
        monkeypatch.setattr(direct, "door", door)
        monkeypatch.setattr(direct, "_allowed", environment in ("auto", "cpp"))
        monkeypatch.setattr(direct, "served", {})
        backend._choose.cache_clear(), backend._open_for_gpu.cache_clear()
        with contextlib.suppress(UserWarning):
            backend._choose("auto", "cuda", True)
        return calls, direct.served

    yield choose
    monkeypatch.undo()
    backend._choose.cache_clear(), backend._open_for_gpu.cache_clear()


def test_the_door_serves_a_gpu_as_the_automatic_choice_says(a_gpu):
    from fastscore.kernels.direct import LAUNCHERS

    calls, served = a_gpu(("cuda", "triton"))
    assert calls == [(direct.CUDA, 5, LAUNCHERS)] and list(served) == ["cuda"]
    calls.clear()
    calls, served = a_gpu(("triton",))
    assert calls == [(direct.CUDA, 0, LAUNCHERS)] and list(served) == ["triton"]
    calls.clear()
    calls, served = a_gpu(("cuda",))
    assert calls == [(direct.CUDA, 5, None)] and list(served) == ["cuda"]


@pytest.mark.filterwarnings("ignore:fastscore runs on the slow reference")
def test_the_door_serves_no_gpu_without_kernels(a_gpu):
    assert a_gpu(()) == ([(direct.CUDA, 0, None)], {})


@pytest.mark.parametrize("environment", ["cpp", "cuda", "triton", "reference"])
def test_the_door_serves_no_gpu_where_the_environment_asks_for_a_back_end(a_gpu, environment):
    """What was asked for is served, or refused in one sentence."""
    assert a_gpu(("cuda", "triton"), environment) == ([], {})


def test_the_door_takes_a_tuple_of_launchers():
    for wrong, error in (
        ((0, 0, None), ValueError),
        ((3, 0, None), ValueError),
        ((1, "0", None), TypeError),
        ((1, 0, [print] * 4), TypeError),
        ((1, 0, (print,)), TypeError),
    ):
        with pytest.raises(error):
            direct.door.serve(*wrong)
    assert not refused()   # the CPU's own kernels


# Triton's launchers, on its interpreter.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_triton_gives_the_same_bits_directly(dtype):
    torch.manual_seed(0)
    x, d = torch.randn(2, 2, 3, 5).to(dtype)
    each = coefficients(dtype, 2)
    with by_triton():
        for kind in ("float", "0-d", "(B,)"):
            for name, call in noisy_calls(x, d, each[kind]).items():
                if name == "langevin_step" and kind != "float":
                    continue
                with counted() as seen:
                    found = call()
                assert not {"choose", "call", "check_float"} & set(seen), (name, kind, seen)
                assert same(found, checked(call, "triton")), (name, kind)


def test_what_triton_would_copy_first_goes_the_checked_way():
    x = torch.rand(2, 3, 4, 5)
    with by_triton():
        for layout, make in LAYOUTS.items():
            t = make(x)
            plain = layout == "contiguous"
            assert refused(x=t, d=t) == (not plain), layout
            assert refused(x=x, d=t) == (not plain) and refused(x=x, d=x, out=make(x * 0)) == (
                not plain
            )
            assert (direct.door.noise_reduce(0, t, 0.3, 3, 0, 2, 0) is None) == (not plain)


@pytest.mark.parametrize("draw", [random.normal, random.uniform, random.rademacher])
def test_triton_draws_the_same_bits_directly(draw):
    def call():
        return draw((3, 41), seed=7, step=3, stream=1024, substream=5, offset=2)

    with by_triton():
        with counted() as seen:
            found = call()
        assert "filled" not in seen and same(found, checked(call, "triton"))


@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_triton_normalises_to_the_same_bits_directly(dtype, layout):
    with by_triton():
        for name, calls in norm_calls(dtype, layout).items():
            for call in calls:
                with counted() as seen:
                    found = call()
                assert not {"choose", "call", "check_float"} & set(seen), seen
                assert same(found, checked(call, "triton")), name


def test_coefficients_that_a_launch_of_triton_would_lose_go_the_checked_way():
    """A Python float travels as a normal float32."""
    x = torch.ones(4, 3)
    with by_triton():
        assert refused(a=1e-39) and refused(b=1e-39) and refused(x=x.double(), d=x.double())
        assert direct.door.noise_reduce(0, x, 1e-39, 3, 0, 2, 0) is None
        assert not refused(a=0.0, b=0.0)


def test_norms_that_are_not_plain_are_refused():
    with by_triton():
        for plain, odd in test_direct.ODD_NORMS:
            # A GPU's labels are not looked at.
            looked_at = "labels" in odd and odd["labels"].dtype == torch.int64 and len(odd) == 1
            if not looked_at or odd["labels"].numel() != 2:
                assert direct.door.normalise(*(plain | odd).values()) is None, odd
            assert direct.door.normalise(*plain.values()) is not None


def test_norms_in_clusters_go_the_checked_way(device):
    """Which launches CUDA C++: with and without a gradient a sample has the same bits."""
    with by_triton():   # a GPU has both
        from fastscore.kernels.direct import LAUNCHERS

        direct.door.serve(direct.CPU, emulate.driver().emulated_launches(), LAUNCHERS)
        gamma = torch.ones(20)
        arguments = gamma, None, gamma, None, None, 0, 1e-5, 0
        large, small = torch.randn(1, 20, 30, 30), torch.randn(1, 20, 28, 29)
        assert direct.door.normalise(large, *arguments) is None
        assert direct.door.normalise(small, *arguments) is not None
        last = large.to(memory_format=torch.channels_last)
        assert direct.door.normalise(last, *arguments) is not None
        device.emulated_clusters(0)
        device.emulated_forget()
        try:
            assert direct.door.normalise(large, *arguments) is not None
        finally:
            device.emulated_clusters(16)
            device.emulated_forget()


def test_a_device_is_asked_once_for_the_clusters_of_a_size(device):
    """By the driver that takes microseconds, and every call of the door has to know."""
    ask = torch.ops.fastscore_emulated.norm_clusters
    with by_triton():
        from fastscore.kernels.direct import LAUNCHERS

        direct.door.serve(direct.CPU, emulate.driver().emulated_launches(), LAUNCHERS)
        gamma = torch.ones(20)
        arguments = gamma, None, gamma, None, None, 0, 1e-5, 0

        def asked(call):
            before = device.emulated_questions()
            call()
            return device.emulated_questions() - before

        device.emulated_forget()
        x, other = torch.randn(1, 20, 30, 30), torch.randn(1, 20, 40, 40)
        counts = [asked(lambda: direct.door.normalise(x, *arguments)) for _ in range(3)]
        assert counts == [1, 0, 0]
        assert asked(lambda: direct.door.normalise(other, *arguments)) == 1
        assert asked(lambda: direct.door.normalise(x.repeat(2, 1, 1, 1), *arguments)) == 0
        assert asked(lambda: ask(0, 20, 900, 0, False, 4)) == 0
        assert asked(lambda: ask(0, 20, 900, 0, False, 2)) == 1   # another kernel
        assert asked(lambda: ask(1, 20, 900, 0, False, 4)) == 1   # another device

        # The answer is the device's, not that of the size alone.
        device.emulated_clusters(0)
        try:
            assert ask(0, 20, 1600, 0, False, 2) == 0 < ask(0, 20, 1600, 0, False, 4)
        finally:
            device.emulated_clusters(16)
            device.emulated_forget()
        assert ask(0, 20, 1600, 0, False, 2) == 16


def test_an_error_of_a_launcher_is_that_of_the_call():
    def fail(*arguments):
        raise MemoryError("no room")

    direct.door.serve(direct.CPU, 0, (fail,) * 4)
    try:
        for call in (
            lambda: fastscore.langevin_step(X, X, 0.1, seed=0),
            lambda: fastscore.denoising_loss(X, 0.1, seed=0),
            lambda: random.normal(3, seed=0, stream=1024),
            lambda: fastscore.instance_norm_plus(X[None], torch.ones(4)),
        ):
            with pytest.raises(MemoryError, match="no room"):
                call()
    finally:
        direct.door.serve(direct.CPU, 0, None)


@pytest.mark.processes
def test_a_kept_launch_is_the_launch_that_the_launcher_makes():
    """The same compiled kernel, grid and arguments, whatever was called before."""
    pytest.importorskip("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {
        "PYTHONPATH": str(ROOT)
    }
    program = Path(__file__).with_name("kept_launches.py")
    result = children.run(
        [sys.executable, str(program)], cwd=ROOT, env=environment, seconds=100
    )
    assert result.returncode == 0, result.stderr[-3000:]
