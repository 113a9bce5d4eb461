"""The device that build_support/emulate.py makes of the CPU.

That it computes, and that it notices what a GPU would not forgive.
"""

import ctypes
import os
import shutil
import sys
from pathlib import Path

import children
import pytest
import torch

import fastscore
from fastscore import backend

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "build_support"))
import emulate  # noqa: E402


@pytest.fixture(scope="module", autouse=True)
def a_compiler():
    reason = emulate.why_not()
    if reason is not None:
        pytest.skip(reason)


@pytest.fixture
def device():
    with emulate.installed() as device, fastscore.use_backend("cuda"):
        emulate.launched()
        yield device


@pytest.fixture(scope="module")
def faulty():
    """run(kernel, how, out, blocks): what the launch says."""
    driver = emulate.HERE / "driver.cpp"
    source = Path(__file__).with_name("emulated_faults.cu")
    text = emulate.translate(source.read_text())
    objects = [
        emulate.compile_object(driver, driver.read_text(), ["-O2"], []),
        emulate.compile_object(
            source, text, emulate.CHECKS + ["-include", "on_host.h", "-Wno-unknown-pragmas"], []
        ),
    ]
    library = ctypes.CDLL(str(emulate.link(objects, "libfaulty.so")))
    library.run.restype = ctypes.c_char_p

    def run(kernel, how="", out=None, blocks=1):
        out = torch.zeros(64) if out is None else out
        fault = library.run(
            kernel.encode(), how.encode(), ctypes.c_void_p(out.data_ptr()), out.numel(), blocks
        )
        return fault and fault.decode()

    run.library = library
    return run


@pytest.mark.parametrize("order", [0, 1], ids=["first-to-last", "last-to-first"])
def test_shuffles_barriers_ballots_shared_memory_and_atomics(faulty, order):
    out = torch.zeros(65)
    faulty.library.emulated_order(order)
    assert faulty("right", out=out, blocks=3) is None
    faulty.library.emulated_order(0)
    expected = 31 * 32 / 2 + (32 + 63) * 32 / 2 + 1 + 10
    assert out[:3].tolist() == [expected] * 3 and out[64] == 3 * 64 and not out[3:64].any()


def test_memory_of_a_block_is_not_a_number_until_it_is_written(faulty):
    out = torch.zeros(64)
    assert faulty("never_written", out=out) is None and out.isnan().all()


@pytest.mark.parametrize(
    "kernel, words",
    [
        ("no_barrier", "a race"),
        ("one_barrier_of_two", "a race"),
        ("no_warp_barrier", "a race"),
        ("beyond", "lies in no tensor"),
        ("partly_beyond", "begin or end outside a tensor"),
        ("misaligned", "a misaligned address at emulated_faults.cu"),
        ("two_write", "a race"),
        ("wide_shift", "a shift by too much"),
        ("overflows", "a product that overflows"),
        ("own_array", "an index beyond an array"),
        ("barrier_in_a_branch", "different barriers"),
        ("some_have_ended", "a thread ended while others wait"),
        ("lanes_have_ended", "lane 21 of a warp's mask ffffffff has ended"),
        ("too_much_shared", "bytes of shared memory"),
    ],
)  # fmt: skip
def test_a_mistake_of_a_kernel_is_named(faulty, kernel, words):
    out = torch.zeros(66)[:63 if kernel == "partly_beyond" else 64]
    assert words in faulty(kernel, out=out)
    assert faulty("right", out=torch.zeros(64)) is None   # nothing is left of it


def test_blocks_that_write_one_place_race(faulty):
    assert faulty("blocks_write") is None and "a race: thread 0 of block 0" in faulty(
        "blocks_write", blocks=2
    )


def test_a_barrier_of_a_warp_orders_its_memory(faulty):
    out = torch.zeros(64)
    assert faulty("warp_barrier", out=out) is None and out.sum() == 32


@pytest.mark.parametrize(
    "how, words",
    [
        ("an input", "an input of the operator is written"),
        ("a stream of another device", "a stream of device 1 while device 0 is current"),
        ("no stream", "a launch without torch's current stream"),
        ("a read on the host", "the launcher itself"),
        ("many threads", "2048 threads in a block"),
        ("beyond its bounds", "128 threads in a block, its bounds are 64"),
    ],
)
def test_a_mistake_of_a_launch_is_named(faulty, how, words):
    assert words in faulty("right", how)
    assert "a grid of 0" in faulty("right", blocks=0)
    assert "50000 bytes" in faulty("warp_barrier", "much shared memory")


@pytest.mark.parametrize("order", [0, 1], ids=["first-to-last", "last-to-first"])
def test_blocks_of_a_cluster_see_the_shared_memory_of_each_other(faulty, order):
    out = torch.zeros(64)
    faulty.library.emulated_order(order)
    assert faulty("of_a_cluster", "in clusters", out=out, blocks=4) is None
    faulty.library.emulated_order(0)
    # Two clusters: 10 times the other's number, and the last one's.
    assert out[:4].tolist() == [22, 12, 44, 34] and not out[4:].any()


@pytest.mark.parametrize(
    "kernel, words",
    [
        ("no_cluster_barrier", "a race"),
        ("written_by_another", "a race"),
        ("may_have_ended", "it may have ended"),
        ("some_of_a_cluster_have_ended", "wait at a barrier of the cluster"),
        ("no_such_block", "there is no block 2 in a cluster of 2"),
        ("barrier_in_a_branch", "different barriers"),
        ("some_have_ended", "a thread ended while others wait at a barrier of the block"),
    ],
)
def test_a_mistake_of_a_cluster_is_named(faulty, kernel, words):
    assert words in faulty(kernel, "in clusters", blocks=2)
    assert faulty("of_a_cluster", "in clusters", blocks=2) is None


def test_a_mistake_of_a_launch_in_clusters_is_named(faulty):
    words = "clusters of 2 in a grid of 3 blocks"
    assert words in faulty("of_a_cluster", "in clusters", blocks=3)
    much = "in clusters of much shared memory", "in clusters, asked for"
    assert "50000 bytes" in faulty("of_a_cluster", much[0], blocks=2)
    assert faulty("of_a_cluster", much[1], blocks=2) is None


def calls(x, key=None):
    """Every operator that is there in CUDA C++, with its temporaries."""
    s, each = (
        torch.full_like(x, 0.5),
        torch.rand(len(x), generator=torch.Generator().manual_seed(0)),
    )
    options = {"seed": 5} if key is None else {"seed": 5, "step": key}
    yield lambda: fastscore.random.normal(x.shape, stream=9, **options)
    yield lambda: fastscore.random.rademacher(x.shape, stream=9, **options)
    yield lambda: fastscore.langevin_step(x, s, 0.1, **options)
    yield lambda: fastscore.langevin_step(x, s, each, **options)
    yield lambda: fastscore.denoising_loss(x, 0.3, **options)
    # In clusters.
    image, gamma = x.reshape(3, 20, 1000), each.new_full((20,), 0.5)
    yield lambda: fastscore.instance_norm_plus(image, gamma, gamma, gamma, activation="elu")


def test_the_order_of_threads_and_blocks_changes_nothing(device):
    x = torch.randn(3, 20_000)
    for call in calls(x):
        first = call()
        device.emulated_order(1)
        try:
            assert torch.equal(call(), first)
        finally:
            device.emulated_order(0)


@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_normals_hold_with_the_documented_errors_of_the_hardware(device, sign):
    expected = fastscore.random.normal(
        2**18, seed=1, stream=9, dtype=torch.float64, backend="reference"
    )
    device.emulated_approximation(sign)
    try:
        got = fastscore.random.normal(2**18, seed=1, stream=9, dtype=torch.float64)
    finally:
        device.emulated_approximation(0.0)
    assert float((got - expected).abs().max()) <= 2e-6


def test_kernels_run_on_the_device_and_the_current_stream_of_their_tensors(device):
    x = torch.randn(40, 150)
    expected = fastscore.langevin_step(x, x, 0.1, seed=5)
    assert {launch[-2:] for launch in emulate.launched()} == {(0, 0)}
    out = torch.empty_like(x)
    with emulate.on_device(x, out):
        device.emulated_use_stream(1, 1)
        try:
            fastscore.langevin_step(x, x, 0.1, seed=5, out=out)
        finally:
            device.emulated_use_stream(1, 0)
    launches = emulate.launched()
    assert (
        launches and {launch[-2:] for launch in launches} == {(1, 1)} and torch.equal(out, expected)
    )
    assert device.emulated_current_device() == 0   # as it was before


def test_every_operator_launches_on_the_device_and_the_current_stream_of_its_tensors(device):
    x, each = torch.randn(4, 20_000), torch.rand(4)
    out, sums = torch.empty_like(x), torch.empty(4)
    numbers = (None, 5, 0, 9, 0)  # key, seed, step, stream, offset
    image, normal = x.view(4, 20, 1000), out.view(4, 20, 1000)
    stats, coef = torch.empty(1, 4, 20, 2), torch.rand(1, 20)
    calls = {
        "fill": lambda: torch.ops.fastscore_emulated.fill(out, 2, *numbers),
        "noisy_update": lambda: torch.ops.fastscore_emulated.noisy_update(
            out, x, x, None, 0.1, each, 0.0, *numbers
        ),
        # With its partial sums.
        "noise_reduce": lambda: torch.ops.fastscore_emulated.noise_reduce(
            sums, x, each, 0.0, *numbers, 0
        ),
        "normalise": lambda: torch.ops.fastscore_emulated.normalise(
            normal, None, stats, image, None, coef, None, None, 0, False, False, 1e-5, 0
        ),
    }
    assert set(calls) == set(emulate.operators())
    with emulate.on_device(x, each, out, sums, stats, coef):
        device.emulated_use_stream(1, 1)
        try:
            for name, call in calls.items():
                call()
                launches = emulate.launched()
                assert launches and {launch[-2:] for launch in launches} == {(1, 1)}, name
                assert device.emulated_current_device() == 0
        finally:
            device.emulated_use_stream(1, 0)


def test_an_operator_says_what_its_kernels_did_wrong(device):
    """Here that they read a key or a coefficient from an odd address."""
    x, key, each = torch.randn(4, 20_000), torch.tensor([5, 0]), torch.rand(4)
    out, sums = torch.empty_like(x), torch.empty(4)
    numbers = (5, 0, 9, 0)  # seed, step, stream, offset
    image, normal = x.view(4, 20, 1000), out.view(4, 20, 1000)
    stats, coef = torch.empty(1, 4, 20, 2), torch.rand(1, 20)
    calls = {
        "fill": lambda t: torch.ops.fastscore_emulated.fill(out, 2, t, *numbers),
        "noisy_update": lambda t: torch.ops.fastscore_emulated.noisy_update(
            out, x, None, None, 0.0, t, 0.0, None, *numbers
        ),
        "noise_reduce": lambda t: torch.ops.fastscore_emulated.noise_reduce(
            sums, x, t, 0.0, None, *numbers, 0
        ),
        "normalise": lambda t: torch.ops.fastscore_emulated.normalise(
            normal, None, stats, image, None, t, None, None, 0, False, False, 1e-5, 0
        ),
    }
    given = {"fill": key, "noisy_update": each, "noise_reduce": each, "normalise": coef}
    assert set(calls) == set(given) == set(emulate.operators())
    for name, call in calls.items():
        call(given[name])
        words = f"{name} could not be launched: a misaligned address"
        with pytest.raises(RuntimeError, match=words):
            call(emulate.misaligned(given[name]))
        assert device.emulated_current_device() == 0


def test_captured_calls_are_those_of_the_step_that_they_find(device):
    x = torch.randn(3, 20_000)
    for number, _ in enumerate(calls(x)):
        step = torch.zeros((), dtype=torch.int64)
        call = list(calls(x, step))[number]
        with emulate.torch_cuda():
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                y = call()
                step += 1
        for k in range(3):
            x.mul_(0.9)   # read when the graph is replayed
            graph.replay()
            assert torch.equal(y, list(calls(x, k))[number]())


@pytest.mark.parametrize(
    "text, instead",
    [
        ("__syncthreads();", ""),
        ("const torch::stable::accelerator::DeviceGuard guard(out.get_device_index());", ""),
        ('check_launch("noisy_update");', ""),
        (", stream>>>", ", nullptr>>>"),
        ("return {r, c, a * s};", "return {r, a * s, c};"),
        ("static_cast<uint32_t>(tensor[1])", "static_cast<uint32_t>(tensor[0])"),
        ("each[per_sample ? sample : 0]", "each[per_sample ? sample + 1 : 0]"),
    ],
    ids=["barrier", "guard", "check", "stream", "formula", "key", "index"],
)  # fmt: skip
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_broken_kernel_fails_the_tests_that_run_on_it(tmp_path, text, instead):
    csrc = tmp_path / "csrc"
    shutil.copytree(ROOT / "csrc", csrc)
    found = [
        path for path in csrc.iterdir() if path.suffix in (".cu", ".h") and text in path.read_text()
    ]
    assert found, text
    for path in found:
        path.write_text(path.read_text().replace(text, instead))
    environment = os.environ | {"FASTSCORE_EMULATED_CSRC": str(csrc)}
    tests = [
        "tests/test_gpu.py",
        "tests/test_emulation.py",
        "-k",
        "cuda and not compiled and not derivatives or emulation and not broken",
    ]
    result = children.run(
        [sys.executable, "-m", "pytest", "-q", "-x", *tests], cwd=ROOT, env=environment, seconds=800
    )
    said = result.stdout[-3000:] + result.stderr[-1000:]
    assert result.returncode == 1 and "1 failed" in result.stdout, said
    # It ran.
    assert "BuildError" not in result.stdout and "Untranslatable" not in result.stdout, said


def test_operators_with_open_offsets_are_defined_once():
    """Those that a compiled graph calls: a second definition of a name is an error."""
    cpp = backend._symbolic("cpp", "fill")
    for _ in range(2):
        with emulate.installed():
            assert backend._symbolic("cpp", "fill") is cpp
            backend._symbolic("cuda", "fill")
    assert backend._symbolic("cpp", "fill") is cpp
