"""The four official networks equal a plain evaluation of their state_dict.

Their files load, and wrong ones are refused in a sentence.
"""

import sys
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fastscore import cli, jvp, sample, schedules
from fastscore.models import NCSN, NCSNv2, NCSNv2Deeper, NCSNv2Deepest, load_official

# Most tests are of the published options, and do not state them.
pytestmark = pytest.mark.filterwarnings("ignore:load_official. the checkpoint does not tell")

V2 = [NCSNv2, NCSNv2Deeper, NCSNv2Deepest]
ALL = [NCSN, *V2]
LADDER = schedules.geometric(50.0, 0.01, 10)


def network(cls, ngf=4, channels=3, **options):
    """A small one in float32, its coefficients moved off their initial values."""
    torch.manual_seed(0)
    net = cls(channels=channels, ngf=ngf, sigmas=LADDER, **options).eval()
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return net


# --- an independent evaluation, straight from the names in the state_dict


NONLINEARITY = "elu"   # of the functions below; tests of others patch it


def act(x):
    return {
        "elu": lambda: torch.where(x > 0, x, torch.expm1(x.clamp_max(0))),
        "relu": lambda: x.clamp_min(0),
        "lrelu": lambda: torch.maximum(x, 0.2 * x),
        "swish": lambda: x * torch.sigmoid(x),
    }[NONLINEARITY]()


def official_norm(w, name, x, y):
    if f"{name}.embed.weight" in w:
        gamma, alpha, beta = (t[..., None, None] for t in w[f"{name}.embed.weight"][y].chunk(3, 1))
    elif f"{name}.alpha" in w:
        gamma, alpha, beta = (w[f"{name}.{k}"][:, None, None] for k in ("gamma", "alpha", "beta"))
    else:
        return x
    mu = x.mean((2, 3), keepdim=True)
    m = (mu - mu.mean(1, keepdim=True)) / (mu.var(1, keepdim=True) + 1e-5).sqrt()
    h = (x - mu) / (x.var((2, 3), keepdim=True, correction=0) + 1e-5).sqrt()
    return gamma * (h + alpha * m) + beta


def official_conv(w, name, x, dilation=1):
    weight = w[f"{name}.weight"]
    return F.conv2d(
        x,
        weight,
        w.get(f"{name}.bias"),
        padding=dilation * (weight.shape[-1] // 2),
        dilation=dilation,
    )


def halved(x):
    return (x[:, :, ::2, ::2] + x[:, :, 1::2, ::2] + x[:, :, ::2, 1::2] + x[:, :, 1::2, 1::2]) / 4


def official_block(w, name, x, y, dilation):
    h = official_conv(
        w, f"{name}.conv1", act(official_norm(w, f"{name}.normalize1", x, y)), dilation
    )
    h = act(official_norm(w, f"{name}.normalize2", h, y))
    if f"{name}.conv2.conv.weight" in w:
        return halved(official_conv(w, f"{name}.shortcut.conv", x)) + halved(
            official_conv(w, f"{name}.conv2.conv", h)
        )
    h = official_conv(w, f"{name}.conv2", h, dilation)
    return h + (
        official_conv(w, f"{name}.shortcut", x, dilation) if f"{name}.shortcut.weight" in w else x
    )


def official_units(w, name, x, y):
    block = 1
    while f"{name}.{block}_1_conv.weight" in w:
        h = x
        for stage in (1, 2):
            h = official_conv(
                w,
                f"{name}.{block}_{stage}_conv",
                act(official_norm(w, f"{name}.{block}_{stage}_norm", h, y)),
            )
        x, block = x + h, block + 1
    return x


def official_refine(w, name, xs, y):
    hs = [official_units(w, f"{name}.adapt_convs.{i}", x, y) for i, x in enumerate(xs)]
    if len(hs) > 1:
        hs = [
            official_conv(
                w, f"{name}.msf.convs.{i}", official_norm(w, f"{name}.msf.norms.{i}", h, y)
            )
            for i, h in enumerate(hs)
        ]
        hs = [
            F.interpolate(h, size=xs[0].shape[2:], mode="bilinear", align_corners=True) for h in hs
        ]
    x = path = act(sum(hs))
    for i in (0, 1):
        # Conditional networks take the mean, of 25 also at the border.
        if f"{name}.crp.norms.{i}.embed.weight" in w:
            path = (
                F.pad(official_norm(w, f"{name}.crp.norms.{i}", path, y), (2, 2, 2, 2))
                .unfold(2, 5, 1)
                .unfold(3, 5, 1)
                .mean((-1, -2))
            )
        else:
            path = (
                F.pad(path, (2, 2, 2, 2), value=-torch.inf)
                .unfold(2, 5, 1)
                .unfold(3, 5, 1)
                .amax((-1, -2))
            )
        path = official_conv(w, f"{name}.crp.convs.{i}", path)
        x = x + path
    return official_units(w, f"{name}.output_convs", x, y)


DILATIONS = {
    NCSN: (1, 1, 2, 4),
    NCSNv2: (1, 1, 2, 4),
    NCSNv2Deeper: (1, 1, 1, 2, 4),
    NCSNv2Deepest: (1, 1, 1, 1, 2, 4),
}


def official(cls, w, x, y, *, centre=True, dilations=None):
    """f(x) of the labels y: the official networks before any division by σ."""
    deepest = cls is NCSNv2Deepest
    stages = ["res1", "res2", "res3", *["res31"] * deepest, "res4", "res5"]
    h, layers = official_conv(w, "begin_conv", 2 * x - 1 if centre else x), []
    for stage, dilation in zip(stages, dilations or DILATIONS[cls]):
        h = official_block(
            w, f"{stage}.1", official_block(w, f"{stage}.0", h, y, dilation), y, dilation
        )
        layers.append(h)
    refines = [
        "refine1",
        "refine2",
        *["refine31"] * deepest,
        "refine3",
        "refine4",
        *["refine5"] * (len(layers) > 4),
    ]
    h = official_refine(w, refines[0], [layers[-1]], y)
    for name, layer in zip(refines[1:], layers[-2::-1]):
        h = official_refine(w, name, [layer, h], y)
    return official_conv(w, "end_conv", act(official_norm(w, "normalizer", h, y)))


def relative(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


# --- networks


@pytest.mark.parametrize(
    "cls, tensors, parameters, unscaled",
    [
        (NCSN, 173, 30_117_635, None),
        (NCSNv2, 154, 29_694_083, 153),
        (NCSNv2Deeper, 192, 83_445_379, 191),
        (NCSNv2Deepest, 230, 94_132_611, 229),
    ],
)
def test_network_has_the_official_tensors_and_parameters(cls, tensors, parameters, unscaled):
    with torch.device("meta"):
        net = cls()
        assert unscaled is None or len(cls(scale_by_sigma=False).state_dict()) == unscaled
    assert (
        len(net.state_dict()) == tensors and sum(p.numel() for p in net.parameters()) == parameters
    )
    assert ("sigmas" in net.state_dict()) == (cls is not NCSN)


def test_v2_keys_and_shapes_follow_the_official_grammar():
    n = 6
    shapes = {
        cls: {k: tuple(v.shape) for k, v in cls(ngf=n, sigmas=LADDER).state_dict().items()}
        for cls in V2
    }
    expected = {
        NCSNv2: {
            "sigmas": (10,),
            "normalizer.gamma": (n,),
            "res2.0.normalize2.beta": (n,),
            "res2.0.conv2.conv.weight": (2 * n, n, 3, 3),
            "res3.0.shortcut.weight": (2 * n, 2 * n, 3, 3),
            "refine3.msf.convs.1.bias": (n,),
            "refine4.output_convs.3_2_conv.weight": (n, n, 3, 3),
        },
        NCSNv2Deeper: {
            "res3.0.conv2.conv.bias": (2 * n,),
            "res3.0.shortcut.conv.weight": (2 * n, 2 * n, 1, 1),
            "res4.0.conv1.weight": (2 * n, 2 * n, 3, 3),
            "res4.0.shortcut.weight": (4 * n, 2 * n, 3, 3),
            "res4.1.normalize1.alpha": (4 * n,),
            "res5.1.conv2.weight": (4 * n, 4 * n, 3, 3),
            "refine1.output_convs.1_2_conv.weight": (4 * n, 4 * n, 3, 3),
            "refine2.msf.convs.0.weight": (2 * n, 4 * n, 3, 3),
            "refine3.msf.convs.1.weight": (2 * n, 2 * n, 3, 3),
            "refine4.crp.convs.0.weight": (n, n, 3, 3),
            "refine5.output_convs.3_1_conv.weight": (n, n, 3, 3),
        },
        NCSNv2Deepest: {
            "res31.0.shortcut.conv.weight": (2 * n, 2 * n, 1, 1),
            "res4.0.shortcut.weight": (4 * n, 2 * n, 3, 3),
            "refine2.msf.convs.1.weight": (2 * n, 4 * n, 3, 3),
            "refine31.msf.convs.1.weight": (2 * n, 2 * n, 3, 3),
            "refine3.adapt_convs.1.2_1_conv.weight": (2 * n, 2 * n, 3, 3),
        },
    }
    for cls, some in expected.items():
        assert {k: shapes[cls].get(k) for k in some} == some
        assert not [
            k
            for k in shapes[cls]
            if ("norm" in k and k.startswith("refine"))
            or "refine1.msf" in k
            or "res1.0.shortcut" in k
        ]


@pytest.mark.parametrize("cls", ALL)
def test_network_equals_the_plain_evaluation_of_its_state_dict(cls):
    """In float64, so that also a rounding to float32 on the way, as in the original's
    accumulator, would show."""
    net = network(cls).double()
    x, y = torch.rand(2, 3, 16, 24, dtype=torch.float64), torch.tensor([0, 7])
    expected = official(cls, net.state_dict(), x, y)
    sigma = LADDER.double()[y]
    torch.testing.assert_close(
        net(x, sigma),
        expected if cls is NCSN else expected / sigma[:, None, None, None],
        rtol=1e-9,
        atol=1e-11,
    )


@pytest.mark.parametrize("cls", ALL)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_network_runs_in_half_precision(cls, dtype):
    """About sixty roundings in a row of values of order one, each eps/2 at most, adding up like
    a random walk: 8 eps of the norm."""
    net = network(cls, ngf=8)
    x, sigma = torch.rand(2, 3, 16, 16), LADDER[[5, 5]]
    expected = net(x, sigma)
    s = net.to(dtype)(x.to(dtype), sigma)
    assert s.dtype == dtype and (s - expected).norm() < 8 * torch.finfo(dtype).eps * expected.norm()


@pytest.mark.parametrize("cls", ALL)
def test_network_keeps_channels_last(cls):
    net = network(cls)
    x, sigma = torch.rand(2, 3, 16, 16), LADDER[[0, 9]]
    expected = net(x, sigma)
    s = net.to(memory_format=torch.channels_last)(
        x.contiguous(memory_format=torch.channels_last), sigma
    )
    assert s.is_contiguous(memory_format=torch.channels_last) and relative(s, expected) < 1e-4


def test_v2_scores_at_any_sigma_and_cas_predicts_sigma_times_the_score():
    net, raw = network(NCSNv2), network(NCSNv2, scale_by_sigma=False)
    x, sigma = torch.rand(3, 3, 8, 8), torch.tensor([0.37, 2.0, 2e-3])  # no levels of the ladder
    f = raw(x)
    torch.testing.assert_close(net(x, sigma), f / sigma[:, None, None, None])
    torch.testing.assert_close(net(x, 0.37), f / 0.37)
    assert torch.equal(raw(x, sigma), f)
    raw.load_state_dict({k: v for k, v in net.state_dict().items() if k != "sigmas"})
    assert torch.equal(raw(x), f)


def test_v2_ladders_are_the_published_ones():
    for cls, first, levels, size in (
        (NCSNv2, 50, 232, 32),
        (NCSNv2Deeper, 190, 1086, 128),
        (NCSNv2Deepest, 348, 2311, 256),
    ):
        net = cls(ngf=1)
        expected = torch.from_numpy(
            np.exp(np.linspace(np.log(first), np.log(0.01), levels))
        ).float()
        torch.testing.assert_close(net.sigmas, expected, rtol=1e-6, atol=0)
        assert net.sample_shape == (3, size, size)


@pytest.mark.parametrize(
    "cls, side",
    [(NCSN, "even sides"), (NCSNv2, "even sides"), (NCSNv2Deeper, "by 4"), (NCSNv2Deepest, "by 8")],
)
def test_network_names_what_it_cannot_take(cls, side):
    net = network(cls)
    with pytest.raises(
        ValueError,
        match=rf"{cls.__name__}: x must be \(B, 3, H, W\) with .*{side}; got \(1, 3, 8, 9\)",
    ):
        net(torch.zeros(1, 3, 8, 9), 0.01)
    with pytest.raises(ValueError, match=f"{cls.__name__}: sigma must be"):
        net(torch.zeros(1, 3, 8, 8), 0.0)
    with pytest.raises(ValueError, match="descending ladder"):
        cls(ngf=4, sigmas=[0.1, 1.0])


def test_compiled_v2_equals_eager():
    net, x, sigma = (
        network(NCSNv2).double(),
        torch.rand(2, 3, 8, 8, dtype=torch.float64),
        LADDER.double()[[1, 8]],
    )
    with torch.no_grad():  # gradients: test_compiled_ncsn_equals_eager_in_value_and_gradient
        torch.testing.assert_close(
            torch.compile(net, backend="aot_eager", fullgraph=True)(x, sigma),
            net(x, sigma),
            rtol=1e-10,
            atol=1e-10,
        )


def test_v2_sliced_gradient_through_forward_mode_equals_double_backward():
    net, x = network(NCSNv2).double(), torch.rand(2, 3, 8, 8, dtype=torch.float64)
    v = torch.randint(0, 2, x.shape, dtype=torch.float64) * 2 - 1
    _, jv = torch.func.jvp(lambda x: net(x, 0.5), (x,), (v,))
    forward = torch.autograd.grad(
        (v * jv).sum(), list(net.parameters()), allow_unused=True, materialize_grads=True
    )
    x.requires_grad_()
    (jv,) = torch.autograd.grad((net(x, 0.5) * v).sum(), x, create_graph=True)
    reverse = torch.autograd.grad(
        (v * jv).sum(), list(net.parameters()), allow_unused=True, materialize_grads=True
    )
    error, size = (
        sum(t.square().sum() for t in ts).sqrt()
        for ts in ([a - b for a, b in zip(forward, reverse)], reverse)
    )
    assert error < 1e-11 * size


# --- checkpoints


def prefixed(net):
    return {f"module.{k}": v.clone() for k, v in net.state_dict().items()}


def averaged(net):
    """What the official EMA stores: parameters, no buffers, no prefix; here twice the others."""
    return {k: 2 * v.detach() for k, v in net.named_parameters()}


def container(cls, layout=None):
    """A checkpoint in the layout of ermongroup/ncsn (a list of two), ncsnv2 or CAS (lists of
    five)."""
    net = network(cls, **({"scale_by_sigma": False} if layout == "cas" else {}))
    optimizer = torch.optim.Adam(net.parameters())
    net(torch.rand(1, 3, 8, 8), 50.0).sum().backward()
    optimizer.step()
    if cls is NCSN:
        return [prefixed(net), optimizer.state_dict()]
    return [prefixed(net), optimizer.state_dict(), 17, 300_000, averaged(net)]


@pytest.mark.parametrize(
    "cls, layout", [(NCSN, "ncsn"), *((cls, layout) for cls in V2 for layout in ("ncsnv2", "cas"))]
)
def test_checkpoint_reproduces_the_forward_values(cls, layout, tmp_path):
    saved = container(cls, layout)
    torch.save(saved, tmp_path / "checkpoint.pth")
    ladder = {} if layout == "ncsnv2" else {"sigmas": LADDER}
    state = torch.random.get_rng_state()
    net = load_official(tmp_path / "checkpoint.pth", **ladder)
    assert (
        torch.equal(torch.random.get_rng_state(), state) and type(net) is cls and not net.training
    )
    torch.testing.assert_close(net.sigmas, LADDER, rtol=0, atol=0)
    weights = (
        {k.removeprefix("module."): v for k, v in saved[0].items()} if cls is NCSN else saved[4]
    )
    x, y = torch.rand(2, 3, 16, 16), torch.tensor([2, 9])
    expected = official(cls, weights, x, y) / (1 if cls is NCSN else LADDER[y][:, None, None, None])
    assert relative(net(x, LADDER[y]), expected) < 1e-4
    if layout == "cas":
        raw = load_official(saved, scale_by_sigma=False)
        assert relative(raw(x), official(cls, weights, x, y)) < 1e-4 and len(
            raw.state_dict()
        ) == len(saved[0])


def test_averaged_weights_are_taken_unless_told_otherwise():
    saved = container(NCSNv2)
    for source, ema, expected in (
        (saved, True, saved[4]),
        (saved, False, saved[0]),
        (saved[:4], False, saved[0]),
        ([*saved[:4], None], False, saved[0]),
        ([*saved, {"of the": "discriminator"}], True, saved[4]),
        (saved[0], True, saved[0]),
        (saved[:2], True, saved[0]),
    ):
        weight = load_official(source, ema=ema).end_conv.weight
        assert torch.equal(
            weight,
            expected[
                "end_conv.weight" if "end_conv.weight" in expected else "module.end_conv.weight"
            ],
        )
    assert torch.equal(
        load_official(saved[4], sigmas=LADDER).end_conv.weight, saved[4]["end_conv.weight"]
    )
    for source in (saved[:4], [*saved[:4], None]):
        with pytest.raises(ValueError, match="no averaged weights; pass ema=False"):
            load_official(source)


def test_loaded_network_shares_no_memory_and_takes_hyper_parameters():
    saved = container(NCSNv2)
    before = saved[4]["begin_conv.weight"].clone()
    net = load_official(saved, sigmas=[3.0, 1.0], image_size=8, ngf=4, channels=3)
    assert net.sigmas.tolist() == [3.0, 1.0] and net.sample_shape == (3, 8, 8)
    torch.nn.init.zeros_(net.begin_conv.weight)
    assert torch.equal(saved[4]["begin_conv.weight"], before)


class Foreign:
    pass


def test_unreadable_files_are_refused(tmp_path):
    path = tmp_path / "x.pth"
    torch.save([{"a": torch.ones(1)}, Foreign()], path)
    with pytest.raises(ValueError, match=r"x.pth is damaged, or no checkpoint of tensors alone"):
        load_official(path)
    torch.save(container(NCSNv2), path)
    whole = path.read_bytes()
    for size in (0, 1, 10, 1000, len(whole) // 2, len(whole) - 10):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"x\.pth is damaged"):
            load_official(str(path))
    with pytest.raises(ValueError, match=r"nowhere\.pth cannot be read: No such file"):
        load_official(tmp_path / "nowhere.pth")


def changed(**changes):
    """The weights of a small NCSNv2 with some entries replaced, or removed (None)."""
    weights = {
        **network(NCSNv2).state_dict(),
        **{k.replace("__", "."): v for k, v in changes.items()},
    }
    return {k: v for k, v in weights.items() if v is not None}


ONE = torch.ones(1)


@pytest.mark.parametrize(
    "source, options, message",
    [
        (3, {}, "must be a list .* or a dict of tensors; got a int"),
        ([3, 4], {}, "got a list of int, int"),
        ({"net": {}, "step": 3}, {}, "got a dict with 'net', 'step'"),
        ({0: ONE}, {}, "got a dict with 0"),
        ({"a": ONE}, {}, r"must have begin_conv.weight .*; its 1 names are a"),
        (
            changed(sigmas=None),
            {},
            r"stores no ladder; pass sigmas, such as .* sigma_max=50, sigma_min=0.01, levels=232",
        ),
        (changed(end_conv__bias=None), {}, r"does not fit NCSNv2: 1 missing \(end_conv.bias\)\.$"),
        (changed(extra=ONE), {}, r"does not fit NCSNv2: 1 unexpected \(extra\)\.$"),
        (
            changed(end_conv__bias=ONE),
            {},
            r"does not fit NCSNv2: 1 misshapen \(end_conv.bias \(1,\) for \(3,\)\)\.$",
        ),
        (
            changed(),
            {"arch": "ncsnv2deeper"},
            r"NCSNv2Deeper: 46 missing \(\S+, \S+, \S+, \.\.\.\); 8 unexpected \(.*\); "
            r"50 misshapen \(.*\.\.\.\)\.$",
        ),
        (
            changed(),
            {"arch": "unet"},
            "arch must be one of ncsn, ncsnv2, ncsnv2deeper, ncsnv2deepest, ncsnpp; got 'unet'",
        ),
        (changed(sigmas=torch.tensor([1.0, 2.0])), {}, "sigmas must be a descending ladder"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_wrong_checkpoints_are_refused_in_one_sentence(source, options, message):
    with pytest.raises(ValueError, match=message) as error:
        load_official(source, **options)
    assert "\n" not in str(error.value) and len(str(error.value)) < 700


def test_ncsn_asks_for_its_ladder_and_unknown_hyper_parameters_are_named():
    saved = container(NCSN)
    with pytest.raises(ValueError, match=r"sigma_max=1, sigma_min=0\.01, levels=10"):
        load_official(saved)
    with pytest.raises(ValueError, match="sigmas must have the 10 levels of the checkpoint; got 2"):
        load_official(saved, sigmas=[1.0, 0.1])
    with pytest.raises(
        TypeError,
        match=r"the hyper-parameters of ncsn are channels, ngf, sigmas, .*nonlinearity, .*; "
              r"got levels",
    ):
        load_official(saved, levels=10)


# --- options that change the function


OTHERS = ["relu", "lrelu", "swish"]


@pytest.fixture
def nonlinearity(request, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "NONLINEARITY", request.param)
    return request.param


def images(batch=2, side=16):
    return torch.rand(batch, 3, side, side, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("nonlinearity", OTHERS, indirect=True)
@pytest.mark.parametrize("cls", ALL)
def test_every_nonlinearity_is_the_official_one(cls, nonlinearity):
    saved, x, y = prefixed(network(cls)), images(), torch.tensor([2, 9])
    net = load_official(saved, sigmas=LADDER, nonlinearity=nonlinearity)
    weights = {k.removeprefix("module."): v for k, v in saved.items()}
    expected = official(cls, weights, x, y) / (1 if cls is NCSN else LADDER[y][:, None, None, None])
    assert relative(net(x, LADDER[y]), expected) < 1e-4
    assert relative(load_official(saved, sigmas=LADDER)(x, LADDER[y]), expected) > 0.1


@pytest.mark.parametrize("nonlinearity", OTHERS, indirect=True)
@pytest.mark.parametrize("cls", [NCSN, NCSNv2])
def test_derivatives_of_every_nonlinearity_equal_double_backprop(cls, nonlinearity):
    net, x = network(cls, nonlinearity=nonlinearity).double(), images(side=8).double()
    v = torch.randint(0, 2, x.shape, generator=torch.Generator().manual_seed(4)).double() * 2 - 1
    _, jv = jvp(lambda x: net(x, LADDER[5]), x, v)
    forward = torch.autograd.grad(
        (v * jv).sum(), list(net.parameters()), allow_unused=True, materialize_grads=True
    )
    x.requires_grad_()
    (jv,) = torch.autograd.grad((net(x, LADDER[5]) * v).sum(), x, create_graph=True)
    reverse = torch.autograd.grad(
        (v * jv).sum(), list(net.parameters()), allow_unused=True, materialize_grads=True
    )
    error, size = (
        sum(t.square().sum() for t in ts).sqrt()
        for ts in ([a - b for a, b in zip(forward, reverse)], reverse)
    )
    assert error < 1e-11 * size


@pytest.mark.parametrize("cls", [NCSN, NCSNv2])
@pytest.mark.parametrize("option", ["rescaled", "logit_transform"])
def test_data_of_another_range_are_taken_as_they_are(cls, option):
    saved, x, y = prefixed(network(cls)), images(), torch.tensor([2, 9])
    weights = {k.removeprefix("module."): v for k, v in saved.items()}
    net = load_official(saved, sigmas=LADDER, **{option: True})
    u = net.from_images(x)
    inside = 1e-6 + (1 - 2e-6) * x.double()
    transformed = (
        2 * x.double() - 1 if option == "rescaled" else inside.log() - torch.log1p(-inside)
    )
    torch.testing.assert_close(u.double(), transformed, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(net.to_images(u), x, rtol=0, atol=1e-6)
    expected = official(cls, weights, u, y, centre=False) / (
        1 if cls is NCSN else LADDER[y][:, None, None, None]
    )
    assert relative(net(u, LADDER[y]), expected) < 1e-4
    plain = load_official(saved, sigmas=LADDER)
    assert torch.equal(plain.to_images(x), x) and torch.equal(plain.from_images(x), x)


@pytest.mark.parametrize("std", [False, True])
@pytest.mark.parametrize("target", ["gaussian", "dae"])
def test_cas_options_are_the_score_that_its_sampler_takes(std, target):
    saved, x, y = prefixed(network(NCSNv2, scale_by_sigma=False)), images(), torch.tensor([2, 9])
    weights, sigma = (
        {k.removeprefix("module."): v for k, v in saved.items()},
        LADDER[y][:, None, None, None],
    )
    output = official(NCSNv2, weights, x, y)
    output = torch.sigmoid(2 * output) if target == "dae" else output
    output = output / (output.flatten().var() + 1e-10) if std else output   # of the batch, as there
    score = (output - x) / sigma**2 if target == "dae" else output / sigma
    net = load_official(saved, sigmas=LADDER, std=std, target=target)
    assert relative(net(x, LADDER[y]), score) < 1e-4
    raw = load_official(saved, scale_by_sigma=False, std=std, target=target)
    assert relative(raw(x), output) < 1e-4
    if (std, target) != (False, "gaussian"):
        assert relative(load_official(saved, sigmas=LADDER)(x, LADDER[y]), score) > 0.1


@pytest.mark.parametrize("cls", V2)
def test_networks_without_dilation_are_seen_in_the_names(cls):
    saved, y = prefixed(network(cls, scale_by_sigma=False, dilated=False)), torch.tensor([2, 9])
    x = images(side=32)
    weights = {k.removeprefix("module."): v for k, v in saved.items()}
    assert weights["res4.0.conv2.conv.weight"].shape[2:] == (3, 3) and weights[
        "res4.0.shortcut.conv.weight"
    ].shape[2:] == (1, 1)
    net = load_official(saved, scale_by_sigma=False)
    assert (
        relative(net(x), official(cls, weights, x, y, dilations=[1] * len(DILATIONS[cls]))) < 1e-4
    )
    with pytest.raises(ValueError, match=f"sides divisible by {net.side}"):
        net(images(side=net.side + 2))


def warned(*arguments, **options):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        load_official(*arguments, **options)
    assert all(w.filename == __file__ or "fastscore" in w.filename for w in caught)
    return [str(w.message) for w in caught]


def test_what_the_file_does_not_tell_is_warned_about_unless_it_is_given():
    common = "nonlinearity (elu), rescaled (False), logit_transform (False)"
    given = {"nonlinearity": "elu", "rescaled": False, "logit_transform": False}
    cas = {"std": False, "target": "gaussian"}
    for layout, source in (
        ("ncsn", container(NCSN)),
        ("v2", container(NCSNv2)),
        ("cas", container(NCSNv2, "cas")),
    ):
        ladder = {} if layout == "v2" else {"sigmas": LADDER}
        listed = common + (", std (False), target (gaussian)" if layout == "cas" else "")
        (message,) = warned(source, **ladder)
        assert message.startswith(
            f"load_official: the checkpoint does not tell {listed}: these values are taken"
        )
        (message,) = warned(source, **ladder, nonlinearity="relu", rescaled=False)
        assert "does not tell logit_transform (False)" in message
        assert not warned(source, **ladder, **given, **(cas if layout == "cas" else {}))


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"nonlinearity": "tanh"},
            "NCSNv2: nonlinearity must be one of elu, relu, lrelu, swish; got 'tanh'",
        ),
        (
            {"rescaled": True, "logit_transform": True},
            "at most one of rescaled and logit_transform",
        ),
        (
            {"target": "noise"},
            "std and target are options of CAS; the checkpoint stores a ladder, so it is NCSNv2's",
        ),
        ({"std": True}, "std and target are options of CAS"),
    ],
)
def test_wrong_options_are_one_sentence(options, message):
    with pytest.raises(ValueError, match=message):
        load_official(container(NCSNv2), **options)
    with pytest.raises(ValueError, match="target must be gaussian or dae; got 'noise'"):
        load_official(container(NCSNv2, "cas"), sigmas=LADDER, target="noise")


def renamed(*changes, cls=NCSNv2, drop=()):
    """Weights whose names have some words replaced, as other options of the official code have
    them."""
    weights = {
        k: v for k, v in network(cls).state_dict().items() if not any(word in k for word in drop)
    }
    for old, new in changes:
        weights = {k.replace(old, new): v for k, v in weights.items()}
    return weights


def halved_tables():
    return {
        k: v[:, : 2 * v.shape[1] // 3] if k.endswith("embed.weight") else v
        for k, v in network(NCSN).state_dict().items()
    }


NORMS = ("gamma", "alpha", "beta")
UNSUPPORTED = {
    "spectral-norm": (renamed(("conv1.weight", "conv1.weight_orig")), "spec_norm"),
    "batch-norm": (
        renamed((".gamma", ".weight"), (".beta", ".bias"), (".alpha", ".running_mean")),
        "normalization",
    ),
    "instance-norm": (renamed(drop=NORMS), "normalization"),
    "variance-norm": (renamed(drop=("gamma", "beta")), "normalization"),
    "conditional-instance-norm": (halved_tables(), "normalization"),
    "deeper-ncsn": (
        {**network(NCSN).state_dict(), "res5.0.conv1.weight": torch.ones(1)},
        "model NCSNdeeper",
    ),
    "baseline": (
        {**renamed(), "refine1.adapt_convs.0.1_1_norm.alpha": torch.ones(1)},
        "model RefineNetDilated",
    ),
    "padded": (
        renamed(("res4.0.conv2.weight", "res4.0.conv2.conv.1.weight")),
        "--no_dilation with images of 28 pixels",
    ),
    "unet": (
        {"downblocks.0.weight": torch.ones(8, 3, 3, 3), "out.bias": torch.ones(3)},
        "unet of CAS",
    ),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_unsupported_options_are_named(name):
    weights, option = UNSUPPORTED[name]
    for source in (weights, [{f"module.{k}": v for k, v in weights.items()}, {}]):
        with pytest.raises(
            ValueError, match=f"load_official: unsupported option {option}"
        ) as error:
            load_official(source, sigmas=LADDER)
        assert "missing" not in str(error.value) and "\n" not in str(error.value)


# --- the command line


def fastscore_sample(monkeypatch, *arguments):
    """Exit code of `fastscore sample ...`, in this process."""
    monkeypatch.setattr(sys, "argv", ["fastscore", "sample", *map(str, arguments)])
    try:
        cli.main()
    except SystemExit as end:
        return end.code or 0
    return 0


def test_sample_from_a_checkpoint(tmp_path, monkeypatch):
    torch.save(container(NCSNv2), tmp_path / "checkpoint.pth")
    options = (
        "--arch", "ncsnv2", "--image-size", "8", "--steps-per-level", "1", "--seed", "5", "-n", "3",
        "--batch-size", "2",
    )
    assert (
        fastscore_sample(
            monkeypatch, tmp_path / "checkpoint.pth", *options, "--out", tmp_path / "x.npz"
        )
        == 0
    )
    net = load_official(tmp_path / "checkpoint.pth", image_size=8)
    expected = sample(
        net,
        shape=(3, *net.sample_shape),
        sigmas=net.sigmas,
        steps_per_level=1,
        step_size=0.2 * 0.01**2,
        seed=5,
    )
    images = torch.from_numpy(np.load(tmp_path / "x.npz")["images"])
    assert torch.allclose(images, expected.clamp(0, 1), atol=1e-3) and images.std() > 0.1


def test_ladder_of_a_checkpoint_comes_from_the_command_line(tmp_path, monkeypatch):
    torch.save(container(NCSN), tmp_path / "checkpoint.pth")
    ladder = ("--sigma-max", "50", "--sigma-min", "0.01", "--levels", "10")
    options = (
        "--image-size", "8", "--steps-per-level", "1", "-n", "1", "--out", tmp_path / "x.npz",
    )
    assert fastscore_sample(monkeypatch, tmp_path / "checkpoint.pth", *ladder, *options) == 0
    net = load_official(tmp_path / "checkpoint.pth", image_size=8, sigmas=LADDER)
    expected = sample(
        net,
        shape=(1, *net.sample_shape),
        sigmas=LADDER,
        steps_per_level=1,
        step_size=0.2 * 0.01**2,
        seed=0,
    )
    images = torch.from_numpy(np.load(tmp_path / "x.npz")["images"])
    assert torch.allclose(images, expected.clamp(0, 1), atol=1e-3) and images.std() > 0.1


def test_samples_of_other_data_are_written_as_images(tmp_path, monkeypatch):
    torch.save(container(NCSNv2), tmp_path / "checkpoint.pth")
    options = (
        "--image-size", "8", "--steps-per-level", "1", "-n", "2", "--out", tmp_path / "x.npz",
        "--logit-transform", "True",
    )
    assert (
        fastscore_sample(
            monkeypatch, tmp_path / "checkpoint.pth", *options, "--nonlinearity", "swish"
        )
        == 0
    )
    net = load_official(
        tmp_path / "checkpoint.pth", image_size=8, logit_transform=True, nonlinearity="swish"
    )
    x = sample(
        net,
        shape=(2, *net.sample_shape),
        sigmas=net.sigmas,
        steps_per_level=1,
        step_size=0.2 * 0.01**2,
        seed=0,
    )
    found = torch.from_numpy(np.load(tmp_path / "x.npz")["images"])
    assert torch.allclose(found, torch.sigmoid(x).clamp(0, 1), atol=1e-3) and found.std() > 0.1


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("NCSN",), "stores no ladder"),
        (("FOLDER", "--nonlinearity", "relu"), "std and target are for checkpoints"),
        (
            ("V2", "--rescaled", "True", "--condition", "colourise=IMAGE"),
            "not for rescaled or logit-transformed ones",
        ),
        (("NCSN", "--sigma-max", "1"), "sigma_max, sigma_min and levels are given together"),
        (("NCSN", "--arch", "unet"), "arch must be one of ncsn, ncsnv2"),
        (("NCSN", "--batch-size", "0"), "n and batch_size must be at least 1; got 100 and 0"),
        (("missing.pth",), "cannot be read: No such file"),
        (("FOLDER", "--arch", "ncsn"), "are for checkpoints"),
    ],
)
def test_a_wrong_value_is_one_sentence(tmp_path, monkeypatch, capsys, arguments, message):
    torch.save([prefixed(network(NCSN)), {}], tmp_path / "ncsn.pth")
    torch.save(container(NCSNv2), tmp_path / "v2.pth")
    np.save(tmp_path / "y.npy", np.ones((8, 8)))
    places = {"NCSN": tmp_path / "ncsn.pth", "V2": tmp_path / "v2.pth", "FOLDER": tmp_path,
              "colourise=IMAGE": f"colourise={tmp_path}/y.npy"}  # fmt: skip
    assert (
        fastscore_sample(
            monkeypatch, *(places.get(a, a) for a in arguments), "--out", tmp_path / "x.png"
        )
        == 2
    )
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not (tmp_path / "x.png").exists()


@pytest.mark.parametrize(
    "wrap", ["_orig_mod.{}", "module._orig_mod.{}", "_orig_mod.module.{}", "module.module.{}"]
)
def test_names_of_wrapped_networks_are_those_of_the_network(wrap):
    net = NCSNv2(channels=1, ngf=4)
    x, sigma = torch.rand(2, 1, 8, 8), torch.tensor([1.0, 0.1])
    loaded = load_official({wrap.format(k): v for k, v in net.state_dict().items()})
    assert torch.equal(loaded(x, sigma), net(x, sigma))


def test_a_checkpoint_of_a_compiled_network_loads():
    net = NCSNv2(channels=1, ngf=4)
    compiled = torch.compile(net)
    net.res1 = torch.compile(net.res1)   # and of compiled parts
    names = list(compiled.state_dict())
    assert names[0].startswith("_orig_mod.") and any(".res1._orig_mod." in name for name in names)
    plain = load_official(compiled.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), net.parameters()))


def test_two_networks_in_one_checkpoint_are_refused():
    state = NCSNv2(channels=1, ngf=4).state_dict()
    with pytest.raises(ValueError, match=r"must hold one network; it has begin_conv\.weight twice"):
        load_official({**state, "module.begin_conv.weight": state["begin_conv.weight"]})
