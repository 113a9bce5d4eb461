"""The noise contract.

Words to the bit, normals against float64, moments at a false-alarm rate of 1e-6 each.
"""

import json
import math
import os
import sys
from pathlib import Path

import children
import numpy as np
import pytest
import torch

import fastscore
from fastscore import backend as backends
from fastscore import random

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "build_support"))
import native  # noqa: E402

ONES = [0xFFFFFFFF] * 6
PI = [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344, 0xA4093822, 0x299F31D0]
KNOWN = [
    ([0] * 6, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    (ONES, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (PI, [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]),
]


@pytest.mark.parametrize("inputs, expected", KNOWN, ids=["zeros", "ones", "pi"])
def test_known_answers_of_the_reference(inputs, expected):
    c0, c1, c2, c3, k0, k1 = inputs
    block = c1 << 32 | c0
    block = torch.tensor([block - 2**64 if block >= 2**63 else block])
    assert random.philox_ref(block, c2, c3, k0, k1).tolist() == [expected]


def test_words_match_the_independent_oracle(backend):
    randomgen = pytest.importorskip("randomgen")
    rng = np.random.default_rng(0)
    blocks = 1000 if backend != "triton" else 50
    for _ in range(250 if backend == "cpp" else 20):   # cpp: 10^6 words
        seed = int(rng.integers(2**63)) * 2 + 1
        step = int(rng.integers(2**32))
        stream = int(rng.integers(1, 2**16))
        substream = int(rng.integers(2**16))
        block = int(rng.integers(2**60))
        counter = block | step << 64 | (stream | substream << 16) << 96
        oracle = randomgen.Philox(counter=counter - 1, key=seed, number=4, width=32).random_raw(
            4 * blocks
        )
        got = random.words(
            4 * blocks, seed=seed, step=step, stream=stream, substream=substream, offset=4 * block
        )
        assert got.tolist() == oracle.tolist()


@pytest.mark.parametrize("offset", [0, 1, 3, 127, 2**31 - 5, 2**32 - 7, 2**34 - 9, 2**61 + 1])
@pytest.mark.parametrize("seed", [0, 2**32 + 1, -1, 2**64 + 5])
def test_words_equal_the_reference(backend, offset, seed):
    got = random.words(1000, seed=seed, step=7, stream=9, offset=offset)
    expected = random.words(1000, seed=seed, step=7, stream=9, offset=offset, backend="reference")
    assert torch.equal(got, expected)


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
@pytest.mark.processes
def test_words_equal_on_every_instruction_set(isa):
    program = "import torch, fastscore.random as r; "
    program += "w = r.words(5000, seed=11, step=3, stream=2, offset=2**34 - 77, backend='cpp'); "
    program += "print(torch.ops.fastscore.isa(0), hash(tuple(w.tolist())))"
    out = children.run([sys.executable, "-c", program], env={**os.environ, "FASTSCORE_ISA": isa})
    expected = random.words(5000, seed=11, step=3, stream=2, offset=2**34 - 77, backend="reference")
    assert out.stdout.split()[1] == str(hash(tuple(expected.tolist()))), out.stderr


def test_normals_have_the_same_bits_on_avx2_and_avx512():
    """Both round once in a * b + c, and each conversion of a word is exact or rounded once."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        pytest.skip("this processor has no avx512")
    normals = "r.normal((2**18,), seed=5, step=2, stream=1, offset=2**34 - 70_000, backend='cpp')"
    program = (
        "import hashlib, fastscore.random as r; "
        f"print(hashlib.sha256({normals}.numpy().tobytes()).hexdigest())"
    )
    printed = [
        children.run(
            [sys.executable, "-c", program], env={**os.environ, "FASTSCORE_ISA": isa}, check=True
        ).stdout
        for isa in ("avx2", "avx512")
    ]
    assert printed[0] == printed[1]


@pytest.mark.parametrize("threads", [1, 2, 7])
@pytest.mark.parametrize("parts", [1, 2, 3, 4, 5])
def test_words_and_normals_ignore_threads_and_splits(threads, parts):
    n, before = 100_003, torch.get_num_threads()
    whole = (
        random.normal((n,), seed=3, stream=4, backend="cpp"),
        random.words(n, seed=3, stream=4, backend="cpp"),
    )
    try:
        torch.set_num_threads(threads)
        edges = [round(n * i / parts) for i in range(parts + 1)]
        for draw, expected in zip((random.normal, random.words), whole):
            pieces = [
                draw(b - a, seed=3, stream=4, offset=a, backend="cpp")
                for a, b in zip(edges, edges[1:])
            ]
            assert torch.equal(torch.cat(pieces), expected)
    finally:
        torch.set_num_threads(before)


def test_compiled_words_equal_eager_words(backend):
    if backend == "triton":
        pytest.skip("the interpreter cannot be compiled")
    compiled = torch.compile(
        lambda: random.words(777, seed=5, step=2, stream=3, offset=9), fullgraph=True
    )
    assert torch.equal(compiled(), random.words(777, seed=5, step=2, stream=3, offset=9))


def test_device_tensors_stand_for_seed_and_step(backend):
    got = random.words(100, seed=torch.tensor(-3), step=torch.tensor(6), stream=3)
    assert torch.equal(got, random.words(100, seed=-3, step=6, stream=3))


def test_no_seed_follows_torch_manual_seed():
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(random.words(8, seed=None, stream=1024))
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


def test_normals_are_within_1e6_of_float64(backend):
    n = 2**20 if backend == "cpp" else 2**14
    z = random.normal((n,), seed=1, stream=1).double()
    w = random.words(n, seed=1, stream=1, backend="reference").double()
    radius = (-2 * ((w[0::2] + 0.5) * 2**-32).log()).sqrt()
    angle = w[1::2] * (2 * math.pi * 2**-32)
    exact = torch.stack([radius * angle.cos(), radius * angle.sin()], 1).flatten()
    error = (z - exact).abs()
    ulp = torch.finfo(torch.float32).eps * exact.abs()
    assert bool(((error <= 1e-6) | (error <= 4 * ulp)).all()), error.max()


@pytest.mark.parametrize(
    "stride",
    [257, pytest.param(1, marks=pytest.mark.slow(minutes=2))],
    ids=["every-257th-word", "every-word"],
)
@pytest.mark.parametrize("isa", native.isas())
def test_radius_and_uniform_of_every_word(isa, stride, tmp_path):
    """257 divides 2^32 - 1, so that both ends are among the words."""
    if native.isas().index(isa) > ("DEFAULT", "AVX2", "AVX512").index(
        torch.backends.cpu.get_cpu_capability()
    ):
        pytest.skip(f"this processor has no {isa}")
    try:
        compiler = native.find_compiler().split()
    except native.BuildError as error:
        pytest.skip(str(error))
    flags = [*native.COMMON, *native.ISA_FLAGS[isa], "-std=c++20", f"-I{ROOT / 'csrc'}"]
    program = tmp_path / "normal_error"
    children.run([*compiler, *flags, ROOT / "tests/normal_error.cpp", "-o", program], check=True)
    found = json.loads(children.run([program, stride], check=True, seconds=1500).stdout)
    print(f"{isa}: {found}")
    assert found["words"] == (2**32 - 1) // stride + 1
    assert found["radius_error"] <= 1e-6 and found["least"] > 0 and found["most"] > 6.66
    # Rounded once, half a unit of the last place.
    assert found["uniform_error"] <= 2**-25 and found["misrounded"] == 0


@pytest.mark.parametrize("sign", [-1, 0, 1])
def test_radius_and_words_of_a_gpu_within_the_bounds_of_its_hardware(sign, tmp_path):
    """A logarithm wrong by 2^-22 of itself moves a radius by half of that, up to 8e-7, and
    roundings add; a right one leaves 1e-6."""
    try:
        compiler = native.find_compiler().split()
    except native.BuildError as error:
        pytest.skip(str(error))
    program = tmp_path / "gpu_normal_error"
    flags = [*native.COMMON, *native.ISA_FLAGS["baseline"], "-std=c++20", f"-I{ROOT / 'csrc'}"]
    children.run(
        [*compiler, *flags, ROOT / "tests/gpu_normal_error.cpp", "-o", program], check=True
    )
    # Divides 2^32 - 1
    found = json.loads(children.run([program, "4369", sign], check=True).stdout)
    assert (
        found["near"] <= 1e-6
        and found["far"] <= (1.2e-6 if sign else 1e-6)
        and found["least"] > 0
        and found["wrong"] == 0
    )


def test_moments_and_tails():
    n = 2**24
    z = random.normal((n,), seed=2, stream=1, dtype=torch.float64)
    for power, expected, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(float((z**power).mean()) - expected) < 5 * math.sqrt(variance / n)
    # Poisson counts, five standard deviations and one.
    for bound, rate in ((4, 63_342e-9), (5, 573e-9)):
        assert abs(int((z.abs() > bound).sum()) - rate * n) < 5 * math.sqrt(rate * n) + 1
    cdf = 0.5 * (1 + torch.erf(z[: 2**20].sort().values / math.sqrt(2)))
    assert float((cdf - (torch.arange(2**20) + 0.5) / 2**20).abs().max()) < 2.69 / 2**10


@pytest.mark.parametrize(
    "other", [{"stream": 2}, {"step": 1}, {"substream": 1}, {"seed": 1}, {"seed": 2**32}]
)
def test_streams_are_independent(other):
    n, key = 2**20, {"seed": 0, "stream": 1}
    a = random.normal((n,), **key)
    b = random.normal((n,), **{**key, **other})
    assert abs(float((a * b).mean())) < 5.5 / math.sqrt(n)


@pytest.mark.parametrize("offset", [0, 1, 31, 127, 2**32 + 5])
def test_signs_are_the_bits_of_the_words(backend, offset):
    signs = random.rademacher((500,), seed=4, stream=3, offset=offset)
    w = random.words(
        4 * (offset % 128 + 500) // 128 + 8,
        seed=4,
        stream=3,
        offset=offset // 128 * 4,
        backend="reference",
    ).tolist()
    expected = [
        1 - 2 * (w[(offset % 128 + i) // 32] >> ((offset % 128 + i) % 32) & 1) for i in range(500)
    ]
    assert signs.tolist() == expected


def test_uniforms_are_the_upper_bits(backend):
    w = random.words(1000, seed=4, stream=3, backend="reference")
    assert torch.equal(
        random.uniform((1000,), seed=4, stream=3), (((w >> 8).double() + 0.5) * 2**-24).float()
    )


def test_raw_op_refuses_derivatives_and_passes_opcheck(backend):
    if backend == "reference":
        pytest.skip("plain PyTorch, no raw op")
    op = backends.raw(backend, "fill")
    x = torch.randn(3, 4)
    key = (None, 0, 0, 1, 0)
    torch.library.opcheck(
        op, (torch.empty(8, dtype=torch.int64), random.WORDS, torch.tensor([3, 1]), *key[1:])
    )
    for kind in (random.UNIFORM, random.NORMAL, random.RADEMACHER):
        torch.library.opcheck(op, (torch.empty_like(x), kind, *key))
    with pytest.raises(NotImplementedError, match="has no forward-mode rule"):
        torch.func.jvp(lambda out: (op(out, random.NORMAL, *key), out)[1], (x,), (x,))
    with pytest.raises(NotImplementedError, match="has no derivative rule"):
        op(x.clone().requires_grad_(), random.NORMAL, *key)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"stream": 0}, "stream must be an int in 1..65535; got 0"),
        ({"substream": -1}, "substream must be"),
        ({"offset": -1}, "offset must be"),
        ({"seed": 0.5}, "seed must be an int or an int64 tensor; got float"),
        ({"shape": (-1,)}, "shape must be non-negative"),
        ({"dtype": torch.int32}, "dtype must be"),
    ],
)
def test_bad_keys_are_refused(change, message):
    arguments = {"shape": (4,), "seed": 0, "stream": 1, **change}
    with pytest.raises((ValueError, TypeError), match=message):
        random.normal(arguments.pop("shape"), **arguments)


@pytest.mark.processes
def test_import_is_light():
    # torch's own compiler front end may import triton; fastscore adds neither its kernels, nor the
    # extension, nor the extras.
    program = "import sys, torch, fastscore; assert not hasattr(torch.ops.fastscore, 'fill'); "
    program += (
        "assert not {'fastscore.kernels', 'tyro', 'sklearn', 'matplotlib'} & set(sys.modules)"
    )
    children.run([sys.executable, "-c", program], check=True)
    assert fastscore.__version__
