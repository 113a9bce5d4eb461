"""The operators of the extension, called without the public functions that check for them.

Whatever does not fit is refused in one sentence, and nothing is written: by the CPU's, and by
those of the .cu files, which run on the emulated device.
"""

import sys
from pathlib import Path

import pytest
import torch

from fastscore import backend, random

sys.path.insert(0, str(Path(__file__).parent.parent / "build_support"))
import emulate

pytestmark = pytest.mark.skipif(
    backend.load_extension() is not None, reason="the extension is not built"
)

KEY = {"key": None, "seed": 1, "step": 0, "stream": random.LANGEVIN, "offset": 0}
HALF = torch.ones(6, 4).half()


def zeros(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)


def ones(*shape, dtype=torch.float32):
    return torch.ones(shape, dtype=dtype)


def long(*values):
    return torch.tensor(values, dtype=torch.int64)


def wide():
    """More dimensions than the kernels count."""
    return zeros(*[1] * 13)


def emptied(*shape):
    """A tensor whose memory has been given back."""
    t = ones(*shape)
    t.untyped_storage().resize_(0)
    return t


def norm():
    return {
        "y": zeros(2, 4, 5), "ty": None, "stats": zeros(1, 2, 4, 2), "x": ones(2, 4, 5), "t": None,
        "coef": ones(1, 12), "tcoef": None, "labels": None,
        "groups": 0, "alpha": True, "beta": True, "eps": 1e-5, "activation": 0,
    }  # fmt: skip


def norm_dual():
    return norm() | {"ty": zeros(3, 2, 4, 5), "stats": zeros(4, 2, 4, 2), "t": ones(3, 2, 4, 5)}


def norm_backward():
    given = norm()
    return {
        "gx": zeros(2, 4, 5), "gt": None, "gcoef": zeros(2, 12), "gtcoef": None,
        "x": given["x"], "t": None, "stats": ones(1, 2, 4, 2), "coef": ones(1, 12),
        "tcoef": None, "labels": None, "gy": ones(2, 4, 5), "gty": None,
        **{name: given[name] for name in ("groups", "alpha", "beta", "eps", "activation")},
    }  # fmt: skip


def norm_dual_backward():
    more = {
        "gt": zeros(3, 2, 4, 5), "gtcoef": zeros(3, 2, 12), "t": ones(3, 2, 4, 5),
        "stats": ones(4, 2, 4, 2), "gty": ones(3, 2, 4, 5),
    }  # fmt: skip
    return norm_backward() | more


# {name: (operator, arguments that fit)}
PLAIN = {
    "fill": ("fill", lambda: {"out": zeros(6, 4), "kind": random.NORMAL, **KEY}),
    "noisy_update": (
        "noisy_update",
        lambda: {
            "out": zeros(6, 4), "x": ones(6, 4), "direction": ones(6, 4),
            "drift_each": None, "drift": 0.1, "diffusion_each": None, "diffusion": 0.2, **KEY,
        },
    ),
    "noise_reduce": (
        "noise_reduce",
        lambda: {
            "out": zeros(6), "score": ones(6, 4), "sigma_each": None, "sigma": 0.1, **KEY,
            "reduction": 0,
        },
    ),
    "activate_dual": (
        "activate_dual",
        lambda: {"out": zeros(3, 8), "s": ones(3, 8), "g": None, "activation": 2},
    ),
    "activate_dual backward": (
        "activate_dual",
        lambda: {"out": zeros(3, 8), "s": ones(3, 8), "g": ones(3, 8), "activation": 2},
    ),
    "activate_jet": (
        "activate_jet",
        lambda: {"out": zeros(5, 8), "s": ones(3, 8), "g": None, "directions": 2, "activation": 2},
    ),
    "activate_jet backward": (
        "activate_jet",
        lambda: {
            "out": zeros(3, 8), "s": ones(3, 8), "g": ones(5, 8), "directions": 2, "activation": 2,
        },
    ),
    "rademacher_project": (
        "rademacher_project",
        lambda: {
            "vjv": zeros(2, 3), "vs": zeros(2, 3), "ss": zeros(3), "js": ones(2, 3, 5),
            "s": ones(3, 5), "projections": 2, **KEY,
        },
    ),
    "rademacher_spread": (
        "rademacher_spread",
        lambda: {
            "gjs": zeros(2, 3, 5), "gs": zeros(3, 5), "g_vjv": ones(2, 3), "g_vs": ones(2, 3),
            "g_ss": ones(3), "s": ones(3, 5), "projections": 2, **KEY,
        },
    ),
    "normalise": ("normalise", norm),
    "normalise with tangents": ("normalise", norm_dual),
    "normalise_backward": ("normalise_backward", norm_backward),
    "normalise_backward with tangents": ("normalise_backward", norm_dual_backward),
}  # fmt: skip

FLOATS = "float32, float64, bfloat16 or float16"
SHARED = "must not share memory with"


def overlapping(a, b, shape=(6, 4)):
    """Two arguments in one memory, a few elements apart."""
    base = zeros(200)
    n = torch.Size(shape).numel()
    return {a: base[:n].view(shape), b: base[3 : 3 + n].view(shape)}


UPDATE = [
    ({"out": zeros(6, 4, dtype=torch.int64)}, f"out must be {FLOATS}; got int64"),
    ({"out": zeros(6, 4, dtype=torch.int32)}, f"out must be {FLOATS}; got dtype Int"),
    ({"x": HALF}, "x must be float32; got float16"),
    ({"x": ones(6, 4, dtype=torch.int64)}, "x must be float32; got int64"),
    ({"direction": ones(6, 4, dtype=torch.float64)}, "direction must be float32; got float64"),
    ({"x": ones(6, 3)}, r"x must be \(6, 4\); got \(6, 3\)"),
    ({"x": ones(24)}, r"x must be \(6, 4\); got \(24,\)"),
    ({"x": torch.ones(())}, r"x must be \(6, 4\); got \(\)"),
    ({"direction": ones(5, 4)}, r"direction must be \(6, 4\); got \(5, 4\)"),
    ({"x": emptied(6, 4)}, "x must have memory; its storage is empty"),
    ({"out": emptied(6, 4)}, "out must have memory; its storage is empty"),
    (
        {"out": wide(), "x": wide(), "direction": None},
        "out must have at most 12 dimensions; got 13",
    ),
    ({"out": zeros(1, 4).expand(6, 4)}, "out must not share memory between its elements"),
    (
        {"out": zeros(12).as_strided((6, 4), (1, 1))},
        "out must not share memory between its elements",
    ),
    (overlapping("out", "x"), f"out {SHARED} x, unless it is the same view"),
    (overlapping("direction", "out"), f"out {SHARED} direction, unless it is the same view"),
    ({"drift_each": ones(5)}, r"drift_each must hold one number or 6; got \(5,\)"),
    ({"drift_each": ones(0)}, r"drift_each must hold one number or 6; got \(0,\)"),
    ({"drift_each": ones(6, 1)}, r"drift_each must hold one number or 6; got \(6, 1\)"),
    ({"drift_each": ones(6, dtype=torch.float64)}, "drift_each must be float32; got float64"),
    ({"diffusion_each": ones(7)}, r"diffusion_each must hold one number or 6; got \(7,\)"),
    ({"diffusion_each": ones(6, 2)[:, 0]}, "diffusion_each must be contiguous"),
    ({"diffusion_each": long(1, 2, 3, 4, 5, 6)}, "diffusion_each must be float32; got int64"),
]
KEYS = [
    ({"key": long(1)}, r"key must be \(2,\); got \(1,\)"),
    ({"key": long(1, 2).int()}, "key must be int64; got dtype Int"),
    ({"key": long(1, 2, 3, 4)[::2]}, "key must be contiguous"),
    ({"stream": 0}, "stream must be one of 1..65535, and the substream times 65536; got 0"),
    ({"stream": 65536}, "stream must be one of 1..65535, .* got 65536"),
    ({"stream": 2**32 + 1}, "stream must be one of 1..65535, .* got 4294967297"),
    ({"offset": -1}, "offset must be at least 0; got -1"),
]
FILL = [
    ({"kind": 4}, r"kind must be in 0\.\.3; got 4"),
    ({"kind": -1}, r"kind must be in 0\.\.3; got -1"),
    ({"kind": random.WORDS}, "out must be int64; got float32"),
    ({"out": zeros(3, dtype=torch.int64)}, f"out must be {FLOATS}; got int64"),
    ({"out": zeros(3, dtype=torch.bool)}, f"out must be {FLOATS}; got dtype Bool"),
    ({"out": zeros(4, 6).T}, "out must be contiguous"),
    ({"out": emptied(6, 4)}, "out must have memory; its storage is empty"),
]
REDUCE = [
    ({"score": ones(6, 4, dtype=torch.int64)}, f"score must be {FLOATS}; got int64"),
    ({"score": torch.ones(())}, r"score must be \(B, \*\); got \(\)"),
    ({"out": zeros(6, dtype=torch.float64)}, "out must be float32; got float64"),
    ({"out": zeros(6, dtype=torch.float16), "score": HALF}, "out must be float32; got float16"),
    ({"out": zeros(5)}, r"out must be \(6,\); got \(5,\)"),
    ({"out": zeros(24)}, r"out must be \(6,\); got \(24,\)"),
    ({"out": zeros(12)[::2]}, "out must be contiguous"),
    ({"sigma_each": ones(4)}, r"sigma_each must hold one number or 6; got \(4,\)"),
    ({"reduction": 2}, r"reduction must be in 0\.\.1; got 2"),
    ((lambda s: {"score": s, "out": s[1:3].view(-1)[:6]})(zeros(6, 4)), f"out {SHARED} score"),
]
ACTIVATE = [
    ({"s": torch.ones(())}, r"s must be \(1 \+ M, \*\); got \(\)"),
    ({"s": ones(0, 8)}, r"s must be \(1 \+ M, \*\); got \(0, 8\)"),
    (
        {"s": ones(3, 8, dtype=torch.float64), "out": zeros(3, 8, dtype=torch.float64)},
        "s must be float32, bfloat16 or float16; got float64",
    ),
    ({"s": ones(3, 8, dtype=torch.int64)}, f"s must be {FLOATS}; got int64"),
    ({"out": zeros(3, 8, dtype=torch.float16)}, "out must be float32; got float16"),
    ({"out": zeros(3, 7)}, r"out must be \(3, 8\); got \(3, 7\)"),
    ({"out": zeros(24)}, r"out must be \(3, 8\); got \(24,\)"),
    ({"g": ones(3, 9)}, r"g must be \(3, 8\); got \(3, 9\)"),
    ({"g": ones(3, 8, dtype=torch.bfloat16)}, "g must be float32; got bfloat16"),
    ({"s": ones(8, 3).T}, "s must be contiguous"),
    ({"out": zeros(8, 3).T}, "out must be contiguous"),
    ({"activation": 0}, r"activation must be in 1\.\.8; got 0"),
    ({"activation": 9}, r"activation must be in 1\.\.8; got 9"),
    (overlapping("s", "out", (3, 8)), f"out {SHARED} s"),
    (overlapping("g", "out", (3, 8)), f"out {SHARED} g"),
]
JET = [
    ({"directions": 3}, r"s must be \(1 \+ M, \*\) or \(1 \+ 2M, \*\) with M = 3; got \(3, 8\)"),
    ({"directions": -1}, "directions must be in 0.*got -1"),
    ({"out": zeros(3, 8)}, r"out must be \(5, 8\); got \(3, 8\)"),
    ({"s": ones(5, 8), "out": zeros(3, 8)}, r"out must be \(5, 8\); got \(3, 8\)"),
    ({"g": ones(3, 8)}, r"g must be \(5, 8\); got \(3, 8\)"),
    ({"activation": 9}, r"activation must be in 1\.\.8; got 9"),
]
PROJECT = [
    ({"js": None, "s": None}, "either js or s must be given"),
    ({"js": ones(3, 3, 5)}, r"js must be \(2, B, \*\); got \(3, 3, 5\)"),
    ({"js": ones(2)}, r"js must be \(2, B, \*\); got \(2,\)"),
    ({"js": ones(2, 3, 5, dtype=torch.int64)}, f"js must be {FLOATS}; got int64"),
    ({"s": ones(3, 4)}, r"s must be \(3, 5\); got \(3, 4\)"),
    ({"s": ones(3, 5, dtype=torch.float64)}, "s must be float32; got float64"),
    ({"projections": 0}, r"projections must be in 1\.\.65536; got 0"),
    ({"stream": 1 | 65535 << 16}, r"projections must be in 1\.\.1; got 2"),
    ({"vjv": None}, "vjv must come with js"),
    ({"js": None}, "vjv must not come without js"),
    ({"s": None}, "vs must not come without s"),
    ({"ss": None}, "ss must come with s"),
    ({"vjv": zeros(2, 2)}, r"vjv must be \(2, 3\); got \(2, 2\)"),
    ({"vs": zeros(3, 2).T}, "vs must be contiguous"),
    ({"ss": zeros(3, dtype=torch.float64)}, "ss must be float32; got float64"),
    (
        (lambda s: {"s": s, "ss": s.view(-1)[:3]})(ones(3, 5)), f"ss {SHARED} s",
    ),
]  # fmt: skip
SPREAD = [
    ({"gjs": None, "gs": None}, "either gjs or gs must be given"),
    ({"gjs": zeros(3, 3, 5)}, r"gjs must be \(2, B, \*\); got \(3, 3, 5\)"),
    ({"gs": zeros(3, 6)}, r"gs must be \(3, 5\); got \(3, 6\)"),
    ({"gs": zeros(3, 5, dtype=torch.bfloat16)}, "gs must be float32; got bfloat16"),
    ({"g_vjv": None}, "g_vjv must come with gjs"),
    ({"gjs": None}, "g_vjv must not come without gjs"),
    ({"gs": None}, "g_vs must not come without gs"),
    ({"s": None}, "s must come with g_ss"),
    ({"s": ones(3, 4)}, r"s must be \(3, 5\); got \(3, 4\)"),
    ({"g_vs": ones(2, 4)}, r"g_vs must be \(2, 3\); got \(2, 4\)"),
    ({"g_ss": ones(3, dtype=torch.float64)}, "g_ss must be float32; got float64"),
    ({"g_vjv": ones(3, 2).T}, "g_vjv must be contiguous"),
    ({"gs": zeros(1, 5).expand(3, 5)}, "gs must not share memory between its elements"),
    (overlapping("gs", "s", (3, 5)), f"gs {SHARED} s"),
    ({"projections": 0}, r"projections must be in 1\.\.65536; got 0"),
]
NORM = [
    ({"x": ones(8)}, r"x must be \(B, C, \*\); got \(8,\)"),
    ({"x": ones(2, 4, 5, dtype=torch.int64)}, f"x must be {FLOATS}; got int64"),
    ({"x": ones(5, 4, 2).permute(2, 1, 0)}, "x must be contiguous or channels-last"),
    ({"x": emptied(2, 4, 5)}, "x must have memory; its storage is empty"),
    ({"coef": ones(1, 11)}, r"coef must be \(1, 12\); got \(1, 11\)"),
    ({"coef": ones(12)}, r"coef must be \(1, 12\); got \(12,\)"),
    ({"coef": ones(3, 12)}, "coef must have 1 or 2 rows; got 3"),
    ({"coef": ones(1, 12, dtype=torch.float64)}, "coef must be float32; got float64"),
    ({"coef": ones(12, 2).T}, "coef must be contiguous"),
    ({"tcoef": ones(1, 1, 12)}, "tcoef must not come without t"),
    ({"labels": long(0)}, r"labels must be \(2,\); got \(1,\)"),
    ({"labels": long(0, 0).int()}, "labels must be int64; got dtype Int"),
    ({"labels": long(0, 1)}, r"labels must be in 0\.\.0; got 1"),
    ({"labels": long(-1, 0)}, r"labels must be in 0\.\.0; got -1"),
    ({"groups": 5, "alpha": False, "coef": ones(1, 8)}, r"groups must be in 0\.\.4; got 5"),
    ({"groups": 3, "alpha": False, "coef": ones(1, 8)}, "groups must divide 4 channels; got 3"),
    ({"groups": 2}, "alpha must not come with groups"),
    ({"eps": 0.0}, "eps must be positive; got 0"),
    ({"eps": float("nan")}, "eps must be positive; got -?nan"),
    ({"activation": 9}, r"activation must be in 0\.\.8; got 9"),
]
NORM_FORWARD = [
    ({"y": zeros(2, 4, 6)}, r"y must be \(2, 4, 5\); got \(2, 4, 6\)"),
    ({"y": zeros(2, 4, 5, dtype=torch.float16)}, "y must be float32; got float16"),
    ({"y": zeros(2, 5, 4).transpose(1, 2)}, "y must lie in memory as x does"),
    ({"ty": zeros(1, 2, 4, 5)}, "ty must not come without t"),
    ({"stats": zeros(1, 2, 4)}, r"stats must be \(1, 2, 4, 2\); got \(1, 2, 4\)"),
    ({"stats": zeros(1, 2, 4, 2, dtype=torch.float64)}, "stats must be float32; got float64"),
    (overlapping("x", "y", (2, 4, 5)), f"y {SHARED} x"),
    (
        (lambda y: {"y": y, "stats": y.view(-1)[:16].view(1, 2, 4, 2)})(zeros(2, 4, 5)),
        f"stats {SHARED} y",
    ),
]
NORM_DUAL = [
    ({"t": torch.ones(())}, r"t must be \(M, B, C, \*\); got \(\)"),
    ({"t": ones(3, 2, 4, 4)}, r"t must be \(3, 2, 4, 5\); got \(3, 2, 4, 4\)"),
    ({"t": ones(3, 2, 4, 5, dtype=torch.float64)}, "t must be float32; got float64"),
    ({"t": ones(3, 2, 5, 4).transpose(2, 3)}, "t must lie in memory as x does"),
    ({"ty": zeros(2, 2, 4, 5)}, r"ty must be \(3, 2, 4, 5\); got \(2, 2, 4, 5\)"),
    ({"tcoef": ones(2, 1, 12)}, r"tcoef must be \(3, 1, 12\); got \(2, 1, 12\)"),
    ({"stats": zeros(1, 2, 4, 2)}, r"stats must be \(4, 2, 4, 2\); got \(1, 2, 4, 2\)"),
]
NORM_BACKWARD = [
    ({"gx": zeros(2, 4, 4)}, r"gx must be \(2, 4, 5\); got \(2, 4, 4\)"),
    ({"gy": None}, "gy must come with x alone"),
    ({"gy": ones(2, 5, 4).transpose(1, 2)}, "gy must lie in memory as x does"),
    ({"gcoef": zeros(1, 12)}, r"gcoef must be \(2, 12\); got \(1, 12\)"),
    ({"gt": zeros(1, 2, 4, 5)}, "gt must not come without t"),
    ({"gty": ones(1, 2, 4, 5)}, "gty must not come without t"),
    (overlapping("gx", "gy", (2, 4, 5)), f"gx {SHARED} gy"),
]
NORM_DUAL_BACKWARD = [
    ({"gt": None}, "gt must come with t"),
    ({"gty": None}, "gty must come with t"),
    ({"gtcoef": None}, "gtcoef must come with t"),
    ({"gtcoef": zeros(3, 1, 12)}, r"gtcoef must be \(3, 2, 12\); got \(3, 1, 12\)"),
    ({"stats": ones(1, 2, 4, 2)}, r"stats must be \(4, 2, 4, 2\); got \(1, 2, 4, 2\)"),
]
WRONG = {
    "fill": FILL + KEYS,
    "noisy_update": UPDATE + KEYS,
    "noise_reduce": REDUCE + KEYS,
    "activate_dual": [case for case in ACTIVATE if "g" not in case[0]],
    "activate_dual backward": ACTIVATE,
    "activate_jet": [case for case in JET if "g" not in case[0]],
    "activate_jet backward": [case for case in JET if "out" not in case[0]],
    "rademacher_project": PROJECT + KEYS,
    "rademacher_spread": SPREAD + KEYS,
    "normalise": NORM + NORM_FORWARD,
    "normalise with tangents": NORM_DUAL,
    "normalise_backward": NORM + NORM_BACKWARD,
    "normalise_backward with tangents": NORM_DUAL_BACKWARD,
}


def schema(op):
    return getattr(torch.ops.fastscore, op).default._schema


@pytest.mark.parametrize("name", PLAIN)
def test_arguments_that_fit_are_taken(name):
    op, arguments = PLAIN[name]
    given = arguments()
    assert list(given) == [argument.name for argument in schema(op).arguments]

    names = [argument.name for argument in schema(op).arguments if argument.alias_info is not None]
    outputs = [given[name].fill_(7) for name in names if given[name] is not None]
    getattr(torch.ops.fastscore, op)(*given.values())
    assert all((t != 7).any() and t.isfinite().all() for t in outputs)


CASES = [
    pytest.param(name, changed, words, id=f"{name}-{words[:50]}")
    for name, cases in WRONG.items()
    for changed, words in cases
]


@pytest.fixture(scope="module")
def of_gpu():
    """The operators of the .cu files."""
    reason = emulate.why_not()
    if reason is not None:
        pytest.skip(reason)
    emulate.driver()
    return torch.ops.fastscore_emulated


def refused(operators, name, changed, words):
    op, arguments = PLAIN[name]
    given = arguments() | changed
    tensors = [
        t for t in given.values() if isinstance(t, torch.Tensor) and t.untyped_storage().nbytes()
    ]
    before = [t.clone() for t in tensors]
    with pytest.raises(RuntimeError, match=f"^fastscore: {op}: {words}.?$") as error:
        getattr(operators, op)(*given.values())
    assert "\n" not in str(error.value)
    assert all(torch.equal(a, b) for a, b in zip(tensors, before))


@pytest.mark.parametrize(("name", "changed", "words"), CASES)
def test_arguments_that_do_not_fit_are_refused_in_one_sentence(name, changed, words):
    refused(torch.ops.fastscore, name, changed, words)


# What labels in a GPU's memory hold, no launcher can look at: their samples are not a number.
ON_GPU = [
    case
    for case in CASES
    if PLAIN[case.values[0]][0] in emulate.operators() and "labels must be in" not in case.id
]


@pytest.mark.parametrize(("name", "changed", "words"), ON_GPU)
def test_arguments_that_do_not_fit_are_refused_on_a_gpu_in_the_same_sentence(
    of_gpu, name, changed, words
):
    refused(of_gpu, name, changed, words)


@pytest.mark.parametrize(
    ("name", "argument"),
    [
        ("fill", "key"),
        *(("noisy_update", a) for a in ("x", "direction", "drift_each", "diffusion_each", "key")),
        *(("noise_reduce", a) for a in ("out", "sigma_each", "key")),
        *(("normalise", a) for a in ("y", "stats", "coef", "labels")),
    ],
)
def test_a_tensor_of_another_device_is_refused(of_gpu, name, argument):
    more = {"key": long(1, 2), "labels": long(0, 0)}
    given = PLAIN[name][1]()
    there = given[argument] if given[argument] is not None else more.get(argument, ones(6))
    changed = {argument: there}
    here = {"noise_reduce": "score", "normalise": "x"}.get(name, "out")
    with emulate.on_device(there):
        words = f"{argument} must lie on the device of {here}, cpu; got cpu:1"
        refused(of_gpu, name, changed, words)


@pytest.mark.parametrize("name", ["fill", "noisy_update", "noise_reduce"])
def test_arguments_that_fit_are_taken_on_a_gpu(of_gpu, name):
    op, arguments = PLAIN[name]
    given, expected = arguments(), arguments()
    (out,) = (a.name for a in schema(op).arguments if a.alias_info is not None)
    getattr(of_gpu, op)(*given.values())
    getattr(torch.ops.fastscore, op)(*expected.values())
    assert (given[out] != 0).any() and torch.allclose(given[out], expected[out], atol=1e-5)


def test_empty_tensors_fit_on_a_gpu(of_gpu):
    zero = torch.zeros(0, 4)
    of_gpu.noisy_update(zero, zero.clone(), None, ones(0), 0.0, None, 1.0, None, 1, 0, 1, 0)
    of_gpu.fill(zero, random.NORMAL, None, 1, 0, 1, 0)
    of_gpu.noise_reduce(zeros(0), zero, None, 1.0, None, 1, 0, 1, 0, 0)
    sums = ones(3)
    of_gpu.noise_reduce(sums, zeros(3, 0), None, 1.0, None, 1, 0, 1, 0, 0)
    assert not sums.any()


def test_an_argument_that_fits_may_be_the_output_itself_or_lie_beside_it():
    base = torch.rand(7, 4)
    x, s = base[:6], torch.rand(6, 4)
    numbers = 1, 0, random.LANGEVIN, 0
    expected = torch.empty(6, 4)
    update = torch.ops.fastscore.noisy_update
    update(expected, x, s, None, 0.1, None, 0.2, None, *numbers)

    update(x, x, s, None, 0.1, None, 0.2, None, *numbers)
    assert torch.equal(x, expected)

    both = torch.rand(6, 8)
    left, right = both[:, :4], both[:, 4:]
    with pytest.raises(RuntimeError, match="unless it is the same view"):   # their bytes interleave
        update(left, right, s, None, 0.1, None, 0.2, None, *numbers)


def test_empty_tensors_fit():
    zero = torch.zeros(0, 4)
    torch.ops.fastscore.noisy_update(
        zero, zero.clone(), None, torch.ones(0), 0.0, None, 1.0, None, 1, 0, 1, 0
    )
    torch.ops.fastscore.fill(zero, random.NORMAL, None, 1, 0, 1, 0)
    torch.ops.fastscore.noise_reduce(torch.zeros(0), zero, None, 1.0, None, 1, 0, 1, 0, 0)
    sums = torch.ones(3)
    torch.ops.fastscore.noise_reduce(sums, torch.zeros(3, 0), None, 1.0, None, 1, 0, 1, 0, 0)
    assert not sums.any()


def test_outputs_may_take_turns_in_memory():
    """As the parts of a gradient do whose stack is its last dimension."""
    s, numbers = torch.rand(3, 5), (None, 1, 0, random.PROJECTION, 0)
    g = torch.zeros(3, 5, 3).movedim(-1, 0)
    apart = torch.zeros(2, 3, 5), torch.zeros(3, 5)
    for gjs, gs in ((g[1:], g[0]), apart):
        torch.ops.fastscore.rademacher_spread(
            gjs, gs, torch.rand(2, 3).fill_(0.5), torch.ones(2, 3), torch.ones(3), s, 2, *numbers
        )
    assert torch.equal(g[1:], apart[0]) and torch.equal(g[0], apart[1])
