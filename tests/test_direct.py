"""The direct way from Python to the CPU kernels.

It runs what is plain, as the checked way does, and refuses everything else.
"""

import math
import sys
import threading

import pytest
import torch
from torch.autograd import forward_ad

import fastscore
from fastscore import direct, random

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
LAYOUTS = {
    "contiguous": lambda t: t,
    "transposed": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
    "every-other-element": lambda t: torch.stack([t, t], -1)[..., 0],
    "expanded": lambda t: t[:1].expand(t.shape),
    "channels-last": lambda t: t.contiguous(memory_format=torch.channels_last),
}

fastscore.langevin_step(torch.ones(1), torch.ones(1), 0.1, seed=0)   # loads the extension
pytestmark = pytest.mark.skipif(
    direct.door is None,
    reason="the extension is not built, or PyTorch has no table of DLPack functions",
)


def checked(call):
    """The same call through PyTorch's dispatcher: asking for a back end closes the direct way."""
    with fastscore.use_backend("cpp"), pytest.MonkeyPatch.context() as patch:
        assert direct.automatic is None
        patch.setattr(direct, "door", None)
        return call()


def coefficients(dtype, n):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    each = torch.linspace(0.1, 2, n, dtype=wide)
    return {
        "float": 0.3,
        "int": 2,
        "0-d": torch.tensor(0.7, dtype=wide),
        "(B,)": each,
        "(B,)-strided": torch.stack([each, each], 1)[:, 0],
    }


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_plain_calls_go_directly_and_give_the_same_bits(dtype, layout):
    torch.manual_seed(0)
    x, d = (
        LAYOUTS[layout](torch.randn(5, 3, 4, 6, dtype=torch.float64).to(dtype)) for _ in range(2)
    )
    key = {"seed": -(2**70) + 5, "step": 2**33 + 9, "offset": 13}
    for c in coefficients(dtype, 5).values():
        calls = {
            "noisy_update": lambda c=c: fastscore.noisy_update(x, d, c, c, **key, stream=1030),
            "langevin_step": lambda c=c: fastscore.langevin_step(x, d, c, **key),
            "perturb": lambda c=c: fastscore.perturb(x, c, **key),
            "denoising_loss": lambda c=c: fastscore.denoising_loss(x, c, **key),
        }
        for name, call in calls.items():
            with counted() as seen:
                found = call()
            assert seen == [name], seen   # of our functions, only the public one ran
            wanted = checked(call)
            assert (
                found.dtype == wanted.dtype
                and found.stride() == wanted.stride()
                and torch.equal(found, wanted)
            ), name


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_calls_with_given_noise_give_the_bits_of_plain_pytorch(dtype, layout):
    torch.manual_seed(0)
    x, d, z = (
        LAYOUTS[layout](torch.randn(5, 3, 4, 6, dtype=torch.float64).to(dtype)) for _ in range(3)
    )
    out = torch.empty_like(x)
    dense = layout not in ("every-other-element", "expanded", "transposed")
    for c in coefficients(dtype, 5).values():
        calls = {
            "noisy_update": lambda o, c=c: fastscore.noisy_update(x, d, c, c, noise=z, out=o),
            "langevin_step": lambda o, c=c: fastscore.langevin_step(x, d, c, noise=z, out=o),
            "perturb": lambda o, c=c: fastscore.perturb(x, c, noise=z, out=o),
        }
        for name, call in calls.items():
            wanted = checked(lambda call=call: call(None))
            for given in (None, out):
                with counted() as seen:
                    found = call(given)
                assert seen == [name] or not dense, seen
                assert found.dtype == wanted.dtype and found.stride() == wanted.stride(), name
                assert torch.equal(found, wanted), name
            assert found is out


@pytest.mark.parametrize("n", [1, 7, 1000, 16385, 300_000])
@pytest.mark.parametrize("dtype", DTYPES)
def test_given_noise_in_samples_of_every_length(dtype, n):
    """Samples shorter and longer than a tile, and what is left behind the last whole vector."""
    torch.manual_seed(0)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for shape in ((n,), (1, n), (max(n // 3, 1), 3), (3, max(n // 3, 1))):
        x, d, z = (torch.randn(shape, dtype=torch.float64).to(dtype) for _ in range(3))
        for e in (0.3, torch.linspace(0.1, 2, shape[0], dtype=wide)):
            calls = (
                lambda x=x, d=d, z=z, e=e: fastscore.langevin_step(x, d, e, noise=z),
                lambda x=x, z=z, e=e: fastscore.perturb(x, e, noise=z),
            )
            for call in calls:
                assert torch.equal(call(), checked(call)), shape


@pytest.mark.parametrize("where", ["x", "score", "noise", "a part of x", "a part of noise"])
def test_out_may_be_what_is_read(where):
    base = torch.rand(3, 65, 4)
    x, s, z = base[0, :64], base[1, :64], base[2, :64]
    wanted = fastscore.langevin_step(x, s, 0.1, noise=z)
    out = {
        "x": x, "score": s, "noise": z, "a part of x": base[0, 1:], "a part of noise": base[2, 1:]
    }[where]  # fmt: skip
    fastscore.langevin_step(x, s, 0.1, noise=z, out=out)
    assert torch.equal(out, wanted)


@pytest.mark.parametrize("n", [1, 7, 1000, 16385])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_loss_of_given_noise_is_as_exact_as_plain_pytorch(dtype, n):
    """Against float64 at most twice its error, and one rounding of the sum."""
    torch.manual_seed(0)
    s, z = (torch.randn(6, n, dtype=torch.float64).to(dtype) for _ in range(2))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    sigma = torch.linspace(0.1, 2, 6, dtype=wide)
    exact = 0.5 * (sigma.double()[:, None] * s.double() + z.double()).square().sum(1)

    def call():
        return fastscore.denoising_loss(s, sigma, noise=z)

    found, plain = call(), checked(call)
    eps = torch.finfo(found.dtype).eps
    assert found.dtype == plain.dtype
    allowed = 2 * (plain.double() - exact).abs().max() + 2 * eps * exact
    assert ((found.double() - exact).abs() <= allowed).all()


def test_given_noise_that_is_not_plain_is_refused():
    x = torch.ones(4, 3)
    assert not refused(noise=x, seed=None)
    assert refused(noise=x)   # and a seed
    for odd in ODD_TENSORS.values():
        assert odd is None or refused(noise=odd, seed=None)
    assert refused(noise=torch.ones(3, 4).T, seed=None)   # lies in another order
    assert refused(kind=direct.TERMS, x=None, noise=x, seed=None)


class counted:
    """The names of functions of fastscore/ that run, the back end's own excepted."""

    def __enter__(self):
        self.names = []
        sys.setprofile(self.see)
        return self.names

    def see(self, frame, event, _):
        if event == "call" and "/fastscore/" in frame.f_code.co_filename:
            self.names.append(frame.f_code.co_name)

    def __exit__(self, *_):
        sys.setprofile(None)


@pytest.mark.parametrize("draw", [random.normal, random.uniform, random.rademacher])
@pytest.mark.parametrize("dtype", [None, *DTYPES])
def test_draws_go_directly_and_give_the_same_bits(draw, dtype):
    def call():
        return draw((3, 41), seed=7, step=3, stream=1024, substream=5, offset=2, dtype=dtype)

    with counted() as seen:
        found = call()
    through = [] if draw is random.normal else ["draw"]
    assert seen == [draw.__name__, *through]
    assert found.dtype == (dtype or torch.float32) and torch.equal(found, checked(call))


def test_words_go_directly_and_give_the_same_bits():
    def call():
        return random.words(130, seed=7, stream=1024, offset=3)

    with counted() as seen:
        found = call()
    assert (
        seen == ["words"]
        and found.dtype == torch.int64
        and torch.equal(found, checked(call))
    )


@pytest.mark.parametrize("n", [1, 16384, 16385, 300_000])
def test_sizes_of_one_and_of_many_threads(n):
    x, d = torch.rand(n), torch.rand(n)
    assert torch.equal(
        fastscore.langevin_step(x, d, 0.1, seed=1),
        checked(lambda: fastscore.langevin_step(x, d, 0.1, seed=1)),
    )
    assert torch.equal(
        fastscore.denoising_loss(x[None], 0.1, seed=1),
        checked(lambda: fastscore.denoising_loss(x[None], 0.1, seed=1)),
    )


OUTS = ("new", "x", "score", "channels-last", "beside")


def check_out(where):
    """Into what stands at `where`, directly, and nowhere else."""
    x, s = torch.rand(2, 3, 4, 5), torch.rand(2, 3, 4, 5)
    wide = torch.zeros(2, 3, 4, 10)
    wanted = fastscore.langevin_step(x, s, 0.1, seed=3)
    out = {
        "new": torch.empty_like(x),
        "x": x,
        "score": s,
        "channels-last": LAYOUTS["channels-last"](x * 0),
        "beside": wide[..., 5:],
    }[where]
    with counted() as seen:
        result = fastscore.langevin_step(x, s, 0.1, seed=3, out=out)
    assert seen == ["langevin_step"] and result is out and torch.equal(out, wanted)
    assert not wide[..., :5].any()


@pytest.mark.parametrize("where", OUTS)
def test_out_gives_the_same_bits_and_takes_the_same_way(where):
    check_out(where)


@pytest.mark.parametrize("way", ["direct", "checked"])
def test_autograd_sees_that_out_was_written(way):
    """What a graph has saved must not change in silence: its gradient would be another one."""
    x = torch.rand(4, 2, requires_grad=True)
    h = x.exp()   # whose derivative is itself
    loss = h.sum()
    with torch.no_grad():

        def call():
            return fastscore.langevin_step(h.detach(), h.detach(), 0.1, seed=0, out=h.detach())

        call() if way == "direct" else checked(call)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


class Mode(torch.utils._python_dispatch.TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class FunctionMode(torch.overrides.TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class Sub(torch.Tensor):
    pass


def refused(*changed, **given):
    """Whether the door refuses a plain update with one argument changed."""
    x = torch.ones(4, 3)
    names = ("kind", "x", "d", "a", "b", "seed", "step", "stream", "offset", "out", "noise")
    arguments = dict(zip(names, (direct.UPDATE, x, x, 0.1, 0.2, 0, 0, 1, 0, None, None))) | given
    return direct.door.noisy_update(*arguments.values()) is None


X = torch.ones(4, 3)
ODD_TENSORS = {
    "gradient": X.clone().requires_grad_(),
    "meta": X.to("meta"),
    "negative-bit": torch._neg_view(X),
    "zeros-without-memory": torch._efficientzerotensor((4, 3)),
    "sparse": X.to_sparse(),
    "int": X.int(),
    "long": X.long(),
    "bool": X.bool(),
    "complex": X + 0j,
    "subclass": X.as_subclass(Sub),
    "functional": torch._to_functional_tensor(X),
    "quantized": torch.quantize_per_tensor(X, 0.1, 0, torch.qint8),
    "dtype": X.double(),
    "shape": torch.ones(3, 4),
    "dims": torch.ones(1, 4, 3),
    "empty": torch.ones(0, 3),
    "many-dims": torch.ones([1] * 13),
    "numpy": X.numpy(),
    "none": None,
}


@pytest.mark.parametrize("name", ODD_TENSORS)
def test_tensors_that_are_not_plain_are_refused(name):
    odd = ODD_TENSORS[name]
    assert not refused() and refused(d=odd) and refused(x=odd)
    if odd is not None:
        assert refused(out=odd)
        assert refused(kind=direct.TERMS, x=None, d=odd) or name in ("dtype", "shape", "dims")


ODD_COEFFICIENTS = [
    math.nan,
    math.inf,
    -math.inf,
    1e39,
    10**400,
    True,
    "1",
    None,
    1j,
    torch.ones(3),
    torch.ones(4, 1),
    torch.ones(4).double(),
    torch.tensor([1.0, math.nan, 1, 1]),
    torch.tensor([1.0, 1, 1, math.inf]),
    torch.ones(4, requires_grad=True),
    torch.ones(4, device="meta"),
]


@pytest.mark.parametrize("odd", ODD_COEFFICIENTS, ids=range(len(ODD_COEFFICIENTS)))
def test_coefficients_that_are_not_plain_are_refused(odd):
    assert (
        refused(a=odd)
        and refused(b=odd)
        and refused(kind=direct.LANGEVIN, a=odd)
        and refused(kind=direct.PERTURB, d=None, b=odd)
    )


def test_negative_step_sizes_are_refused_and_negative_drifts_are_not():
    negative = torch.tensor([1.0, 1, -1, 1])
    for odd in (-1.0, negative):
        assert not refused(a=odd, b=odd)
        assert refused(kind=direct.LANGEVIN, a=odd) and refused(kind=direct.PERTURB, d=None, b=odd)


@pytest.mark.parametrize(
    ("part", "odd"),
    [
        ("seed", True),
        ("seed", 0.5),
        ("seed", torch.tensor(1)),
        ("step", None),
        ("step", 1.0),
        ("step", torch.tensor(1)),
        ("stream", 0),
        ("stream", 65536),
        ("stream", True),
        ("offset", -1),
        ("offset", 2**63),
        ("offset", 2**70),
        ("offset", 1.0),
    ],
)
def test_keys_that_are_not_plain_are_refused(part, odd):
    assert refused(**{part: odd})
    call = [random.NORMAL, (4, 3), 0, 0, 1, 0, 0, None, None]
    call[{"seed": 2, "step": 3, "stream": 4, "offset": 6}[part]] = odd
    assert direct.door.fill(*call) is None


@pytest.mark.parametrize(
    ("at", "odd"),
    [
        (1, (4, -3)),
        (1, (4, 0)),
        (1, [4, 3]),
        (1, (4, 3.0)),
        (1, (True,)),
        (1, (2**21, 2**21)),
        (1, None),
        (5, 65536),
        (5, -1),
        (7, torch.int64),
        (7, torch.int32),
        (7, torch.bool),
        (7, torch.complex64),
        (7, "float32"),
        (7, float),
        (8, "meta"),
        (8, "nowhere"),
        (8, 0.5),
    ],
)
def test_draws_that_are_not_plain_are_refused(at, odd):
    call = [random.NORMAL, (4, 3), 0, 0, 1, 0, 0, None, None]
    assert direct.door.fill(*call) is not None
    call[at] = odd
    assert direct.door.fill(*call) is None


def test_out_that_shares_memory_is_refused():
    base = torch.ones(9, 3)
    assert (
        refused(x=base[:4], out=base[1:5])
        and refused(d=base[:4], out=base[1:5])
        and not refused(x=base[:4], out=base[4:8])
    )
    assert refused(out=torch.ones(1, 3).expand(4, 3)) and refused(
        out=torch.ones(6).as_strided((4, 3), (1, 1))
    )
    with torch.inference_mode():
        made_inside = torch.ones(4, 3)
        assert not refused(out=made_inside)
    before = made_inside.clone()
    assert refused(out=made_inside) and refused(out=made_inside, noise=torch.ones(4, 3), seed=None)
    assert torch.equal(made_inside, before) and not refused(x=made_inside)


def test_modes_and_transforms_close_the_door():
    assert not refused()
    with Mode():
        assert refused()
    with FunctionMode():
        assert refused()
    with forward_ad.dual_level():
        assert refused()
    with torch.autograd.profiler.profile():
        assert refused()
    assert torch.vmap(lambda t: t * refused())(torch.ones(2)).tolist() == [1, 1]
    assert not refused()


def test_a_request_of_any_thread_closes_the_door_until_its_end():
    assert direct.automatic is direct.door
    entered, leave = threading.Event(), threading.Event()

    def other():
        with fastscore.use_backend("reference"):
            entered.set()
            leave.wait(30)

    thread = threading.Thread(target=other)
    thread.start()
    entered.wait(30)
    try:
        assert direct.automatic is None
        with fastscore.use_backend("cpp"):
            pass
        assert direct.automatic is None
    finally:
        leave.set()
        thread.join()
    assert direct.automatic is direct.door


def test_without_a_seed_the_draw_is_that_of_the_checked_way():
    x = torch.rand(3, 2)
    calls = [
        lambda: fastscore.langevin_step(x, x, 0.1),
        lambda: fastscore.perturb(x, 0.1),
        lambda: random.normal((3,), seed=None, stream=1024),
    ]
    for call in calls:
        torch.manual_seed(5)
        found, after = call(), torch.rand(1)
        torch.manual_seed(5)
        assert torch.equal(found, checked(call)) and torch.equal(after, torch.rand(1))


def test_what_is_refused_has_drawn_no_seed():
    before = torch.get_rng_state()
    assert refused(d=X.double(), seed=None) and refused(stream=0, seed=None)
    assert refused(x=X[:3], out=X[1:], d=X[:3], seed=None) and refused(a=math.nan, seed=None)
    for odd in ((7, "float32"), (7, torch.int32), (8, "meta"), (4, 0)):
        call = [random.NORMAL, (4, 3), None, 0, 1, 0, 0, None, None]
        call[odd[0]] = odd[1]
        assert direct.door.fill(*call) is None
    assert torch.equal(torch.get_rng_state(), before)
    assert not refused(seed=None) and not torch.equal(torch.get_rng_state(), before)


def norm_calls(dtype, layout, C=6):
    torch.manual_seed(1)
    x = LAYOUTS[layout](torch.randn(3, C, 4, 5, dtype=torch.float64).to(dtype))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    gamma, alpha, beta = (
        torch.randn(C, dtype=wide),
        torch.randn(3, C, dtype=wide),
        torch.randn(C, 2, dtype=wide)[:, 1],
    )
    labels, table = torch.tensor([1, 0, 1]), torch.randn(2, 3 * C, dtype=wide)
    narrow = table[:, : 2 * C].contiguous()
    return {
        "instance_norm_plus": [
            lambda: fastscore.instance_norm_plus(x, gamma),
            lambda: fastscore.instance_norm_plus(x, gamma, alpha, activation="elu"),
            lambda: fastscore.instance_norm_plus(
                x, gamma, None, beta, eps=0.1, activation="softplus"
            ),
            lambda: fastscore.instance_norm_plus(x, gamma, alpha, beta, activation="gelu"),
        ],
        "conditional_instance_norm_plus": [
            lambda: fastscore.conditional_instance_norm_plus(x, labels, table, activation="silu"),
            lambda: fastscore.conditional_instance_norm_plus(x, labels, narrow, bias=False),
        ],
        "group_norm_modulate": [
            lambda: fastscore.group_norm_modulate(x, 2, gamma),
            lambda: fastscore.group_norm_modulate(x, 3, gamma, beta, activation="relu"),
        ],
    }


@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_norms_go_directly_and_give_the_same_bits(dtype, layout):
    for name, calls in norm_calls(dtype, layout).items():
        for call in calls:
            with counted() as seen:
                found = call()
            assert seen == [name, "code_of"], seen
            wanted = checked(call)
            assert found.stride() == wanted.stride() and torch.equal(found, wanted), name


IMAGE, COLUMN, LABELS, TABLE = (
    torch.ones(2, 4, 3, 3),
    torch.ones(4),
    torch.tensor([0, 1]),
    torch.ones(2, 12),
)
COLUMNS = {
    "x": IMAGE, "gamma": COLUMN, "alpha": None, "beta": COLUMN, "labels": None, "table": None,
    "groups": 0, "eps": 1e-5, "code": 0,
}
ROWS = {**COLUMNS, "gamma": None, "alpha": True, "beta": True, "labels": LABELS, "table": TABLE}
ODD_NORMS = [
    (COLUMNS, {"x": torch.ones(2, 4)}),
    (COLUMNS, {"x": torch.ones(2, 0, 3)}),
    (COLUMNS, {"x": IMAGE.transpose(0, 3)}),
    (COLUMNS, {"x": IMAGE.clone().requires_grad_()}),
    (COLUMNS, {"gamma": None}),
    (COLUMNS, {"gamma": torch.ones(5)}),
    (COLUMNS, {"gamma": torch.ones(3, 4)}),
    (COLUMNS, {"gamma": COLUMN.double()}),
    (COLUMNS, {"beta": COLUMN.clone().requires_grad_()}),
    (COLUMNS, {"eps": 0.0}),
    (COLUMNS, {"eps": 1e-30}),
    (COLUMNS, {"eps": math.nan}),
    (COLUMNS, {"eps": 1}),
    (COLUMNS, {"groups": 3}),
    (COLUMNS, {"groups": -1}),
    (COLUMNS, {"groups": True}),
    (COLUMNS, {"code": None}),
    (ROWS, {"labels": torch.tensor([0, 2])}),
    (ROWS, {"labels": torch.tensor([-1, 0])}),
    (ROWS, {"labels": torch.tensor([0, 1, 1])}),
    (ROWS, {"labels": LABELS.int()}),
    (ROWS, {"beta": 1}),
    (ROWS, {"beta": False}),
    (ROWS, {"table": torch.ones(2, 13)}),
    (ROWS, {"table": torch.ones(12, 2).T}),
    (ROWS, {"table": TABLE.double()}),
    (ROWS, {"table": None}),
]


@pytest.mark.parametrize(("plain", "odd"), ODD_NORMS, ids=range(len(ODD_NORMS)))
def test_norms_that_are_not_plain_are_refused(plain, odd):
    assert direct.door.normalise(*plain.values()) is not None
    assert direct.door.normalise(*(plain | odd).values()) is None


def test_what_the_checks_refuse_is_refused_without_a_request():
    """Of the same arguments the reference says what is wrong."""
    x, each, one = torch.ones(2, 3, 4), torch.ones(2, 3), torch.ones(3)
    for weight, bias in ((each, None), (each, one), (one, each)):
        with pytest.raises(ValueError, match=r"must be \(3,\)"):
            fastscore.group_norm_modulate(x, 3, weight, bias)
    for draw in (random.normal, random.uniform, random.rademacher):
        with pytest.raises(TypeError, match="dtype must be float32"):
            draw((3,), seed=0, stream=1024, dtype=float)


def test_the_norms_of_a_network_at_one_level_go_directly(monkeypatch):
    """sigma as a number: labels of stride 0 would send all of its norms the long way."""
    from fastscore import backend, models

    net = models.NCSN(channels=1, ngf=8, sigmas=[1.0, 0.1], image_size=8)
    called = []
    plain = backend.call
    monkeypatch.setattr(backend, "call", lambda *args: called.append(args[1]) or plain(*args))
    with torch.no_grad():
        net(torch.rand(2, 1, 8, 8), 1.0)
    assert called == []
