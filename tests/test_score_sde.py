"""NCSN++, DDPM++ and DDPM equal a plain evaluation of their state_dict.

The files of score_sde load, and wrong ones are refused in a sentence.
"""

import math
import sys
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastscore import cli, conversions, jvp, sample, schedules
from fastscore.models import NCSNpp, load_official

# Most tests are of the published options, and do not state them.
pytestmark = pytest.mark.filterwarnings("ignore:load_official. the checkpoint does not tell")

SMALL = {"nf": 8, "ch_mult": (1, 2, 2), "num_res_blocks": 1, "attention": (1,), "image_size": 16}
PLAIN = {"fir": False, "progressive_input": "none"}
DDPM = {
    **PLAIN, "nf": 32, "resblock_type": "ddpm", "skip_rescale": False, "groups": 32,
    "continuous": False,
}
NETWORKS = {
    "ncsnpp": {},
    "ncsnpp-levels": {"continuous": False, "num_scales": 10},
    "ncsnpp-vp": {"sde": "vp"},
    "ncsnpp-without-fir": {"fir": False},
    "lsun": {"progressive": "output_skip", "progressive_input": "input_skip"},
    "lsun-side-by-side": {
        "progressive": "output_skip",
        "progressive_input": "input_skip",
        "progressive_combine": "cat",
    },
    "ddpmpp": {**PLAIN, "sde": "vp"},
    "ddpmpp-steps": {**PLAIN, "sde": "vp", "continuous": False, "num_scales": 50, "beta_max": 10.0},
    "ddpmpp-subvp": {**PLAIN, "sde": "subvp", "num_res_blocks": 2},
    "ddpm": {**DDPM, "sde": "vp"},
    "ddpm-ve": {**DDPM, "num_scales": 10},
    "ddpm-unconditional": {
        **DDPM, "sde": "vp", "conditional": False, "ch_mult": (1,), "attention": (),
    },
    "elu": {"nonlinearity": "elu", "attention": ()},
    "lrelu": {"nonlinearity": "lrelu", "scale_by_sigma": False, "attention": (0, 2)},
}


def network(name="ncsnpp", **changes):
    """A small one in float32, its coefficients moved off their initial values."""
    torch.manual_seed(0)
    net = NCSNpp(**{**SMALL, **NETWORKS[name], **changes}).eval()
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return net


def levels_of(net):
    """Two noise levels, which are levels of the ladder."""
    return net.sigmas[torch.tensor([1, len(net.sigmas) // 2])]


# --- an independent evaluation, straight from the numbers and names in the state_dict


class Plain:
    """F(u, c) of the weights w with the options of a config."""

    def __init__(self, w, **config):
        self.w = w
        self.i = 0
        self.config = {
            "ch_mult": (1, 2, 2), "num_res_blocks": 1, "attention": (1,), "fir": True,
            "skip_rescale": True, "progressive": "none", "progressive_input": "residual",
            "progressive_combine": "sum", "nonlinearity": "swish", "groups": None,
        } | config   # fmt: skip

    def __getattr__(self, name):
        return self.config[name]

    def act(self, x):
        return {
            "swish": lambda: x * torch.sigmoid(x),
            "elu": lambda: torch.where(x > 0, x, torch.expm1(x.clamp_max(0))),
            "lrelu": lambda: torch.maximum(x, 0.2 * x),
        }[self.nonlinearity]()

    def of(self, name, inside=""):
        return self.w[f"all_modules.{self.i}.{inside}{name}"]

    def has(self, name):
        return f"all_modules.{self.i}.{name}" in self.w

    def conv(self, x, inside="", stride=1, padding=None):
        weight = self.of("weight", inside)
        padding = weight.shape[-1] // 2 if padding is None else padding
        return F.conv2d(x, weight, self.of("bias", inside), stride, padding)

    def norm(self, x, inside=""):
        groups = self.groups or min(x.shape[1] // 4, 32)
        g = x.reshape(len(x), groups, -1)
        deviation = (g.var(2, correction=0, keepdim=True) + 1e-6).sqrt()
        h = ((g - g.mean(2, keepdim=True)) / deviation).reshape(x.shape)
        return h * self.of("weight", inside)[:, None, None] + self.of("bias", inside)[:, None, None]

    def nin(self, x, k):
        y = torch.einsum("bchw,cd->bdhw", x, self.of("W", f"NIN_{k}."))
        return y + self.of("b", f"NIN_{k}.")[:, None, None]

    def sum(self, x, h):
        return (x + h) / math.sqrt(2) if self.skip_rescale else x + h

    def filtered(self, x, up=1, down=1, pad=(0, 0)):
        """Zeros between, padded, filtered by (1, 3, 3, 1)/8 both ways, every `down`th kept."""
        b, c, h, w = x.shape
        z = x.new_zeros(b, c, h * up, w * up)
        z[:, :, ::up, ::up] = x
        z = F.pad(z, (*pad, *pad))
        k = torch.tensor([1.0, 3.0, 3.0, 1.0], dtype=x.dtype) / 8 * up
        rows = sum(k[j] * z[:, :, j : z.shape[2] - 3 + j] for j in range(4))
        both = sum(k[j] * rows[:, :, :, j : rows.shape[3] - 3 + j] for j in range(4))
        return both[:, :, ::down, ::down]

    def resampled(self, x, up):
        if self.fir and up:
            return self.filtered(x, up=2, pad=(2, 1))
        if self.fir:
            return self.filtered(x, down=2, pad=(1, 1))
        if up:
            return x.repeat_interleave(2, 2).repeat_interleave(2, 3)
        return (x[..., ::2, ::2] + x[..., 1::2, ::2] + x[..., ::2, 1::2] + x[..., 1::2, 1::2]) / 4

    def block(self, x, e, up=None):
        h = self.act(self.norm(x, "GroupNorm_0."))
        if up is not None:
            h, x = self.resampled(h, up), self.resampled(x, up)
        h = self.conv(h, "Conv_0.")
        if e is not None:
            dense = e @ self.of("weight", "Dense_0.").T + self.of("bias", "Dense_0.")
            h = h + dense[:, :, None, None]
        h = self.conv(self.act(self.norm(h, "GroupNorm_1.")), "Conv_1.")
        if self.has("Conv_2.weight"):
            x = self.conv(x, "Conv_2.")
        elif self.has("NIN_0.W"):
            x = self.nin(x, 0)
        self.i += 1
        return self.sum(x, h)

    def attended(self, x):
        h = self.norm(x, "GroupNorm_0.")
        q, k, v = (self.nin(h, j).flatten(2) for j in range(3))
        a = torch.softmax(torch.einsum("bci,bcj->bij", q, k) / math.sqrt(x.shape[1]), 2)
        h = torch.einsum("bij,bcj->bci", a, v).reshape(x.shape)
        h = self.nin(h, 3)
        self.i += 1
        return self.sum(x, h)

    def moved(self, x, e, up):
        """To the next level."""
        if self.has("GroupNorm_0.weight"):
            return self.block(x, e, up)
        if up:
            h = self.conv(x.repeat_interleave(2, 2).repeat_interleave(2, 3), "Conv_0.")
        else:
            h = self.conv(F.pad(x, (0, 1, 0, 1)), "Conv_0.", stride=2, padding=0)
        self.i += 1
        return h

    def linear(self, x):
        y = x @ self.of("weight").T + self.of("bias")
        self.i += 1
        return y

    def embedding(self, c, nf):
        if self.has("W"):
            angles = 2 * math.pi * c[:, None] * self.of("W")
            self.i += 1
        else:
            k = torch.arange(nf // 2, dtype=c.dtype)
            angles = c[:, None] * 10000 ** (-k / (nf // 2 - 1))
        e = torch.cat([angles.sin(), angles.cos()], 1)
        return self.act(self.linear(self.act(self.linear(e)))) if self.conditional else None

    def image(self, h):
        h = self.act(self.norm(h))
        self.i += 1
        h = self.conv(h)
        self.i += 1
        return h

    def __call__(self, u, c):
        self.i = 0
        nf = next(t for t in self.w.values() if t.dim() == 4).shape[0]
        e = self.embedding(c, nf)
        pyramid, h = u, self.conv(u)
        self.i += 1
        kept = [h]
        for level in range(len(self.ch_mult)):
            for _ in range(self.num_res_blocks):
                h = self.block(h, e)
                h = self.attended(h) if level in self.attention else h
                kept.append(h)
            if level < len(self.ch_mult) - 1:
                h = self.moved(h, e, up=False)
                if self.progressive_input == "input_skip":
                    pyramid = self.resampled(pyramid, up=False)
                    more = self.conv(pyramid, "Conv_0.")
                    h = torch.cat([more, h], 1) if self.progressive_combine == "cat" else more + h
                    self.i += 1
                elif self.progressive_input == "residual" and self.fir:
                    pyramid = self.conv(
                        self.filtered(pyramid, pad=(2, 2)), "Conv2d_0.", stride=2, padding=0
                    )
                    self.i += 1
                    h = pyramid = self.sum(pyramid, h)
                elif self.progressive_input == "residual":
                    h = pyramid = self.sum(self.moved(pyramid, e, up=False), h)
                kept.append(h)
        h = self.block(self.attended(self.block(h, e)), e)
        image = None
        for level in reversed(range(len(self.ch_mult))):
            for _ in range(self.num_res_blocks + 1):
                h = self.block(torch.cat([h, kept.pop()], 1), e)
            h = self.attended(h) if level in self.attention else h
            if self.progressive == "output_skip":
                image = (0 if image is None else self.resampled(image, up=True)) + self.image(h)
            h = self.moved(h, e, up=True) if level else h
        return self.image(h) if image is None else image


def plain(net, name, **changes):
    config = {"conditional": True, **SMALL, **NETWORKS[name], **changes}
    return Plain(net.state_dict(), **config)


def relative(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


# --- networks


def test_networks_have_the_official_tensors_and_parameters():
    with torch.device("meta"):
        net = NCSNpp()
        ddpm = NCSNpp(num_res_blocks=2, sde="vp", **{**DDPM, "nf": 128})
    state = net.state_dict()
    assert len(state) == 572 and sum(t.numel() for t in state.values()) - 1000 == 62_758_915
    assert state["all_modules.0.W"].shape == (128,) and len(net.sigmas) == 1000
    # google/ddpm-cifar10-32 has attention after each of the three blocks up, score_sde after one.
    attention = 4 * (256 * 256 + 256) + 2 * 256
    assert sum(p.numel() for p in ddpm.parameters()) == 35_746_307 - 2 * attention


def test_names_are_the_official_ones():
    shapes = {name: tuple(t.shape) for name, t in network().state_dict().items()}
    some = {
        "all_modules.1.weight": (32, 16),
        "all_modules.3.weight": (8, 3, 3, 3),
        "all_modules.4.GroupNorm_0.weight": (8,),
        "all_modules.4.Dense_0.weight": (8, 32),
        "all_modules.5.Conv_2.weight": (8, 8, 1, 1),
        "all_modules.6.Conv2d_0.weight": (8, 3, 3, 3),
        "all_modules.7.Conv_2.weight": (16, 8, 1, 1),
        "all_modules.8.NIN_3.W": (16, 16),
        "all_modules.10.Conv2d_0.bias": (16,),
    }
    assert {name: shapes.get(name) for name in some} == some
    assert "sigmas" not in network("ddpmpp").state_dict()


@pytest.mark.parametrize("name", NETWORKS)
def test_network_equals_the_plain_evaluation_of_its_state_dict(name):
    net = network(name).double()
    u = torch.randn(2, 3, 16, 24, dtype=torch.float64)
    c = torch.tensor([0.3, 4.0], dtype=torch.float64)
    torch.testing.assert_close(net.network(u, c), plain(net, name)(u, c), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", ["ncsnpp", "ncsnpp-levels", "ddpm-ve", "lrelu"])
def test_score_of_ve_is_the_networks_output_over_sigma(name):
    net = network(name).double()
    x = torch.rand(2, 3, 16, 16, dtype=torch.float64)
    sigma = levels_of(net)
    labels = torch.tensor([1.0, len(net.sigmas) // 2], dtype=torch.float64)
    condition = labels if name in ("ncsnpp-levels", "ddpm-ve") else sigma.log()
    expected = plain(net, name)(2 * x - 1, condition)
    if name != "lrelu":
        expected = expected / sigma[:, None, None, None]
    torch.testing.assert_close(net(x, sigma), expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", ["ddpmpp", "ddpmpp-subvp", "ncsnpp-vp"])
@pytest.mark.parametrize("centered", [True, False])
def test_score_of_vp_is_that_of_images_with_noise(name, centered):
    """score_sde's own formulas at its time t, then the change of variables by hand."""
    net = network(name, centered=centered).double()
    t = torch.tensor([0.03, 0.9], dtype=torch.float64)
    log_mean = -0.25 * t**2 * (20 - 0.1) - 0.5 * t * 0.1
    a = log_mean.exp()
    b = 1 - a.square()
    b = b if name == "ddpmpp-subvp" else b.sqrt()
    x = torch.rand(2, 3, 16, 16, dtype=torch.float64)

    column = (slice(None), None, None, None)
    data = 2 * x - 1 if centered else x
    u = a[column] * data
    f = plain(net, name)(u if centered else 2 * u - 1, 999 * t)
    score_of_u = -f / b[column]
    expected = a[column] * score_of_u * (2 if centered else 1)
    sigma = b / a / (2 if centered else 1)
    torch.testing.assert_close(net(x, sigma), expected, rtol=1e-8, atol=1e-10)

    if name != "ddpmpp-subvp":
        ve = conversions.vp_to_ve(score_of_u, a.square()) * (2 if centered else 1)
        torch.testing.assert_close(expected, ve)
    # And where its samplers evaluate it.
    assert len(net.sigmas) == 1000
    first = (1 - math.exp(-10.05)) / math.exp(-5.025)
    first = first if name == "ddpmpp-subvp" else math.sqrt(math.expm1(10.05))
    assert net.sigmas[0].item() == pytest.approx(first / (2 if centered else 1), rel=1e-6)


@pytest.mark.parametrize("name", ["ddpmpp-steps", "ddpm"])
def test_score_of_ddpm_is_at_its_steps(name):
    net = network(name).double()
    steps, most = (50, 10.0) if name == "ddpmpp-steps" else (1000, 20.0)
    table = np.cumprod(1 - np.linspace(0.1 / steps, most / steps, steps))
    label = torch.tensor([3, steps - 1])
    alphas = torch.from_numpy(table)[label]
    x = torch.rand(2, 3, 16, 16, dtype=torch.float64)
    root, b = (t.sqrt()[:, None, None, None] for t in (alphas, 1 - alphas))

    expected = -2 * root * plain(net, name)(root * (2 * x - 1), label.double()) / b
    sigma = ((1 - alphas) / alphas).sqrt() / 2
    torch.testing.assert_close(net(x, sigma), expected, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(
        net.sigmas, torch.from_numpy(((1 - table) / table) ** 0.5 / 2).flip(0), rtol=1e-6, atol=0
    )


def test_a_number_and_a_tensor_are_the_same_noise():
    for name in ("ncsnpp", "ddpmpp", "ddpm", "ncsnpp-levels", "ddpm-unconditional"):
        net = network(name)
        x, sigma = torch.rand(2, 3, 16, 16), net.sigmas[3]
        expected = net(x, sigma.expand(2))
        torch.testing.assert_close(net(x, sigma.item()), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(net(x, sigma), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["ncsnpp", "lsun", "ddpmpp", "ddpm"])
def test_forward_mode_equals_double_backprop(name):
    net = network(name, nf=32 if name == "ddpm" else 8).double()
    torch.manual_seed(1)
    x = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    v = torch.randn_like(x)
    sigma = levels_of(net)

    value, tangent = jvp(lambda x: net(x, sigma), x, v)
    loss = (v * tangent).sum() + value.square().sum()
    gradients = torch.autograd.grad(loss, [p for p in net.parameters()])

    x = x.requires_grad_()
    with sdpa_kernel(SDPBackend.MATH):   # the others have no second derivative
        s = net(x, sigma)
    u = torch.zeros_like(s, requires_grad=True)
    (pulled,) = torch.autograd.grad(s, x, u, create_graph=True)
    (expected,) = torch.autograd.grad(pulled, u, v, create_graph=True)
    torch.testing.assert_close(tangent, expected, rtol=1e-9, atol=1e-9)
    loss = (v * expected).sum() + s.square().sum()
    for found, right in zip(gradients, torch.autograd.grad(loss, [*net.parameters()])):
        assert (found - right).abs().max() <= 1e-9 * (1 + right.abs().max())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["ncsnpp", "ddpmpp"])
def test_network_runs_in_half_precision_with_exact_frequencies(name, dtype):
    net = network(name)
    x, sigma = torch.rand(2, 3, 16, 16), levels_of(net)
    expected = net(x, sigma)
    half = network(name).to(dtype)
    assert half.sigmas.dtype == torch.float32 and torch.equal(half.sigmas, net.sigmas)
    y = half(x.to(dtype), sigma)
    # Some twenty layers, each rounding to 2^-8 or 2^-11.
    bound = 20 * torch.finfo(dtype).eps
    assert y.dtype == dtype and relative(y.float(), expected) < bound
    assert half.double().sigmas.dtype == torch.float64


def test_networks_name_what_they_cannot_take():
    for options, message in [
        ({"sde": "sub"}, "sde must be one of ve, vp, subvp; got 'sub'"),
        ({"sde": "subvp", "continuous": False}, "subvp is always continuous"),
        ({"sde": "vp", "scale_by_sigma": True}, "scale_by_sigma is an option of sde ve"),
        ({"progressive": "residual"}, "progressive must be one of none, output_skip"),
        ({"nonlinearity": "tanh"}, "nonlinearity must be one of elu, relu, lrelu, swish"),
        ({"nf": 9}, "widths must be multiples of their 2 groups; got 9"),
        ({"attention": (3,)}, r"attention must be an int in 0\.\.2; got 3"),
        ({"ch_mult": ()}, "ch_mult must name one level at least"),
        ({"sde": "vp", "continuous": False, "num_scales": 9}, "beta_max must be below num_scales"),
        ({"sde": "vp", "sigmas": [90.0, 1.0]}, "process's range, 0 to 76.08; got 90"),
    ]:
        with pytest.raises(ValueError, match=f"^NCSNpp: .*{message}"):
            NCSNpp(**SMALL | options)

    x = torch.rand(2, 3, 16, 16)
    for name, sigma, message in [
        ("ncsnpp-levels", 0.3, "one of the 10 levels from 50 to 0.01, .*; got 0.3"),
        ("ddpmpp", 100.0, "process's range, 0 to 76.08; got 100"),
        ("ddpm", 1e-4, "process's range, 0.005 to 78.7; got 0.0001"),
        ("ncsnpp", 0.0, "sigma must be finite"),
    ]:
        with pytest.raises(ValueError, match=f"^NCSNpp: sigma .*{message}|{message}"):
            network(name)(x, sigma)
    with pytest.raises(ValueError, match=r"sides divisible by 4; got \(2, 3, 16, 18\)"):
        network()(torch.rand(2, 3, 16, 18), 1.0)


# --- checkpoints


def container(net, file_sigmas=None):
    """What score_sde saves: other weights, averages as a list, and numpy's learning rate."""
    model = {f"module.{name}": t.clone() for name, t in net.state_dict().items()}
    model["module.sigmas"] = torch.from_numpy(
        np.exp(np.linspace(np.log(50), np.log(0.01), net.process.num_scales))
    )
    averages = [p.detach() + 0.01 * torch.randn_like(p) for p in net.parameters()]
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-4 * np.minimum(0.3, 1.0))
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    return {
        "optimizer": optimizer.state_dict(),
        "model": model,
        "ema": {"decay": 0.999, "num_updates": 3, "shadow_params": averages},
        "step": 3,
    }


TOLD = {   # what must be given
    "ncsnpp-levels": {"sde": "ve"},
    "ncsnpp-vp": {"sde": "vp", "continuous": True},
    "ddpmpp": {"sde": "vp", "continuous": True},
    "ddpmpp-steps": {"sde": "vp", "continuous": False, "beta_max": 10.0},
    "ddpmpp-subvp": {"sde": "subvp"},
    "ddpm": {"sde": "vp", "continuous": False},
    "ddpm-ve": {"sde": "ve"},
    "ddpm-unconditional": {"sde": "vp", "continuous": False, "image_size": 16},
    "elu": {"nonlinearity": "elu", "image_size": 16},
    "lrelu": {"nonlinearity": "lrelu", "scale_by_sigma": False},
}


@pytest.mark.parametrize("name", NETWORKS)
def test_checkpoint_reproduces_the_forward_values(name, tmp_path):
    net = network(name)
    torch.manual_seed(2)
    saved = container(net)
    torch.save(saved, tmp_path / "checkpoint_8.pth")
    state = torch.random.get_rng_state()
    given = {"image_size": 16} | TOLD.get(name, {})
    loaded = load_official(tmp_path / "checkpoint_8.pth", **given)
    assert torch.equal(torch.random.get_rng_state(), state) and not loaded.training

    assert loaded.sample_shape == (3, 16, 16)
    torch.testing.assert_close(loaded.sigmas, net.sigmas, rtol=1e-6, atol=0)
    named = zip((name for name, _ in net.named_parameters()), saved["ema"]["shadow_params"])
    weights = {k.removeprefix("module."): t for k, t in saved["model"].items()} | dict(named)
    u, c = torch.rand(2, 3, 16, 16), torch.tensor([0.3, 4.0])
    expected = Plain(weights, **{"conditional": True, **SMALL, **NETWORKS[name]})(u, c)
    assert relative(loaded.network(u, c), expected) < 1e-4

    others = load_official(saved, ema=False, **given)
    weights = {k.removeprefix("module."): t for k, t in saved["model"].items()}
    for source in (others, load_official(saved["model"], **given)):
        assert all(torch.equal(p, weights[k]) for k, p in source.named_parameters())


def test_sides_follow_from_the_attention_at_sixteen_pixels():
    assert load_official(container(network())).sample_shape == (3, 32, 32)
    assert load_official(container(network("lrelu")), nonlinearity="lrelu").sample_shape[1] == 16


def test_loaded_network_shares_no_memory():
    saved = container(network())
    before = [t.clone() for t in saved["ema"]["shadow_params"]]
    net = load_official(saved)
    with torch.no_grad():
        for p in net.parameters():
            p.zero_()
    assert all(map(torch.equal, before, saved["ema"]["shadow_params"]))


def warned(*arguments, **options):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        load_official(*arguments, **options)
    return [str(w.message) for w in caught]


def test_what_the_file_does_not_tell_is_warned_about_unless_it_is_given():
    (message,) = warned(container(network()))
    assert "does not tell nonlinearity (swish), skip_rescale (True), centered (False), " in message
    assert "scale_by_sigma (True): these values" in message
    (message,) = warned(container(network("ddpmpp")), sde="vp", continuous=True)
    assert "skip_rescale (True), fir (False), centered (True), beta_min (0.1), beta_max" in message
    given = {
        "nonlinearity": "swish", "skip_rescale": True, "centered": False, "scale_by_sigma": True,
    }   # fmt: skip
    assert not warned(container(network()), **given)
    (message,) = warned(container(network("lsun")))
    assert "fir (True)" in message


def changed(name="ncsnpp", **changes):
    weights = {
        **network(name).state_dict(),
        **{f"all_modules.{k[1:].replace('__', '.')}": v for k, v in changes.items()},
    }
    return {k: v for k, v in weights.items() if v is not None}


ONE = torch.ones(1)


@pytest.mark.parametrize(
    "source, options, message",
    [
        (container(network("ddpmpp")), {}, "does not tell its process; pass sde, one of ve, vp"),
        (container(network("ddpmpp")), {"sde": "vp"}, "pass continuous, as training.continuous"),
        (container(network("ddpmpp")), {"sde": "ve", "continuous": True}, "is not continuous"),
        (container(network()), {"sde": "vp"}, "Fourier features of ln σ, so it is of sde ve"),
        (container(network()) | {"ema": None}, {}, "no averaged weights, .*; pass ema=False"),
        (
            container(network()) | {"ema": {"shadow_params": [ONE]}},
            {},
            r"shadow_params must have the \d+ parameters of the network; got 1",
        ),
        (container(network()) | {"model": 3}, {}, "a state_dict as model; got a int"),
        (container(network()), {"arch": "ncsn"}, "arch ncsnpp is that of score_sde's checkpoints"),
        (changed(_4__Conv_0__weight=None), {}, "does not fit|names must be those of"),
        (changed(_4__Conv_1__bias=None), {}, r"does not fit NCSNpp: 1 missing \(all_modules\.4"),
        (changed(_4__Conv_1__bias=ONE), {}, r"1 misshapen \(\S+ \(1,\) for \(8,\)\)\.$"),
        (changed(_4__more=ONE), {}, r"1 unexpected \(all_modules\.4\.more\)"),
        (changed(_99999__Conv_1__bias=ONE), {}, "those of part 26 are missing"),
        (changed(_x=ONE), {}, "names must be those of score_sde's networks"),
        ({"all_modules.0.W": ONE, "sigmas": torch.ones(3)}, {}, "names must be those of"),
        ({"all_modules.0.weight": torch.ones(8, 3, 3, 3)}, {}, "names must be those of"),
        (
            {f"all_modules.{i}.{k}": v for i in range(3) for k, v in {
                "GroupNorm_1.weight": ONE, "Conv_0.weight": torch.ones(8, 8, 3, 3),
            }.items()} | {"all_modules.3.weight": torch.ones(0, 3, 3, 3)},
            {},
            "fit no network of score_sde",
        ),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)   # fmt: skip
def test_wrong_checkpoints_are_refused_in_one_sentence(source, options, message):
    with pytest.raises(ValueError, match=f"^load_official: .*{message}") as error:
        load_official(source, **options)
    assert "\n" not in str(error.value) and len(str(error.value)) < 700


def test_unknown_hyper_parameters_are_named():
    with pytest.raises(TypeError, match=r"of ncsnpp are channels, nf, .*; got ngf"):
        load_official(container(network()), ngf=8)


def test_sample_from_a_checkpoint(tmp_path, monkeypatch):
    torch.save(container(network("ddpmpp")), tmp_path / "checkpoint_8.pth")

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["fastscore", "sample", *map(str, arguments)])
        try:
            cli.main()
        except SystemExit as end:
            return end.code or 0
        return 0

    file = tmp_path / "checkpoint_8.pth"
    options = (
        "--sde", "vp", "--continuous", "True", "--image-size", 16, "--sigma-max", 70,
        "--sigma-min", 0.01, "--levels", 4, "--steps-per-level", 1, "--seed", 5, "-n", 2, "--out",
        tmp_path / "x.npz",
    )   # fmt: skip
    assert run(file, *options) == 0
    images = np.load(tmp_path / "x.npz")["images"]
    assert images.shape == (2, 3, 16, 16)

    net = load_official(file, sde="vp", continuous=True, image_size=16)
    expected = sample(
        net.requires_grad_(False),
        shape=(2, 3, 16, 16),
        sigmas=schedules.geometric(70, 0.01, 4),
        steps_per_level=1,
        step_size=0.2 * 0.01**2,
        seed=5,
    )
    np.testing.assert_allclose(images, expected.clamp(0, 1).numpy(), atol=1e-6)
    assert run(file, *options[4:]) == 2
