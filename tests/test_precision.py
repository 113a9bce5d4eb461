"""jvp keeps the dtypes that PyTorch's own promotion gives, in every precision, and its values
are those of float64 rounded."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastscore import jvp

WIDER = {
    d: torch.float64 if d == torch.float64 else torch.float32
    for d in (torch.float64, torch.float32, torch.bfloat16, torch.float16)
}

# Values without dimensions beside Python's numbers, beside tensors of other dtypes, and norms whose
# parameters are wider than their input.
FUNCTIONS = {
    "std": lambda x: x / (x.std() + 1e-6),
    "mean-times-number": lambda x: x * (x.mean() * 0.3),
    "power-of-a-sum": lambda x: x + (x.sum() ** 2 + 1.5),
    "number-minus": lambda x: x / (3.0 - x.mean()),
    "number-over": lambda x: x * (2.0 / (x.square().mean() + 1)),
    "chain-of-numbers": lambda x: x * torch.clamp(x.mean() * 2.0 + 1, min=0.1).sqrt(),
    "int-power": lambda x: x * x.norm().pow(2).add(1),
    "in-place": lambda x: x * x.mean().mul_(0.5).add_(2.0),
    "where-number": lambda x: x * torch.where(x.mean() > 5, x.mean(), 1.5),
    "logaddexp": lambda x: x * torch.logaddexp(x.mean(), x.sum()).mul(0.5),
    "hypot-number": lambda x: x * torch.hypot(x.mean(), torch.ones_like(x.mean())).remainder(7.5),
    "xlogy": lambda x: x * torch.xlogy(x.square().mean(), 3.0),
    "wide-scalar": lambda x: x * x.float().mean(),
    "wide-scalar-first": lambda x: x.float().mean() * x + 1,
    "wide-scalar-quotient": lambda x: x / (x.double().square().mean() + 1),
    "wide-constant": lambda x: (
        x * torch.tensor(0.3, dtype=torch.float64) + torch.tensor(1.0, dtype=torch.float64)
    ),
    "wide-vector": lambda x: x * torch.full((x.shape[-1],), 0.5, dtype=torch.float64),
    "scalar-meets-wide-constant": lambda x: x.mean() * torch.tensor(0.3, dtype=torch.float64),
    "scalar-plus-wide-constant": lambda x: x.mean() + torch.tensor(0.3, dtype=torch.float64),
    "scalar-times-narrow-vector": lambda x: x.float().mean() * torch.full((3,), 0.5, dtype=x.dtype),
    "integers": lambda x: x * torch.arange(4) + torch.tensor(2),
    "booleans": lambda x: x * (x > 0) + x.mean() * True,
    "lerp": lambda x: torch.lerp(x, x.cos(), 0.3) + torch.lerp(x.mean(), x.sum(), 0.3),
    "addcmul": lambda x: torch.addcmul(x, x, x.mean(), value=0.5),
    "softmax-as-double": lambda x: x.softmax(-1, dtype=torch.float64) * x,
    "to-and-back": lambda x: x.double().sin().to(x.dtype) + x.to(torch.float32).cos().type_as(x),
    "batch-norm": lambda x: F.batch_norm(
        x, None, None, *torch.ones(2, 4, dtype=WIDER[x.dtype]), True
    ),
    "layer-norm-wide-weight": lambda x: F.layer_norm(
        x, (4,), *torch.ones(2, 4, dtype=WIDER[x.dtype])
    ),
    "rms-norm": lambda x: F.rms_norm(x, (4,)),
    "group-norm": lambda x: F.group_norm(x, 2),
    "layer-norm": lambda x: F.layer_norm(x, (4,)),
    "silu-of-a-scalar": lambda x: (
        x * F.silu(x.sum()) + F.softplus(x.mean()) + torch.tanh(x.mean() + 0.5)
    ),
    "dropout-off": lambda x: F.dropout(x, 0.5, False) * F.dropout(x.mean(), 0.5, False),
    "cumulative": lambda x: x.cumsum(1) * x.mean().exp() + x.logsumexp(1, keepdim=True) * 0.1,
    "one-sample": lambda x: torch.stack([row * (row.norm() + 1e-6) for row in x]),
    "einsum": lambda x: torch.einsum("bi,bj->b", x, x)[:, None] * (x.mean() * 0.1) + x,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_dtypes_and_values(name, dtype):
    """Within 64 roundings, for each of these makes at most a dozen steps at unit size, whose
    slopes stay below five."""
    f = FUNCTIONS[name]
    torch.manual_seed(0)
    x, v = (torch.randn(3, 4, dtype=torch.float64).to(dtype) for _ in range(2))
    y, jv = jvp(f, x, v)
    assert y.dtype == jv.dtype == f(x).dtype
    wide = torch.autograd.functional.jvp(f, x.double(), v.double())
    for got, right in zip((y, jv), wide):
        assert float((got.double() - right).abs().max()) <= 64 * torch.finfo(dtype).eps * (
            1 + float(right.abs().max())
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_scale_feeds_a_layer(dtype):
    """It raised: the quotient was float64, the layer was not."""
    torch.manual_seed(0)
    net, x = nn.Linear(3, 3).to(dtype), torch.randn(2, 3).to(dtype)
    y, jv = jvp(lambda x: net(x / (x.std() + 1e-6)), x, torch.ones_like(x))
    assert y.dtype == jv.dtype == dtype


def test_rms_norm_in_half_precision_has_the_floor_of_pytorch():
    """Without eps= it is that of float32 there, which tiny inputs feel."""
    x = torch.full((2, 4), 1e-3).bfloat16()
    y = jvp(lambda x: F.rms_norm(x, (4,), torch.ones(4)), x, torch.ones_like(x))[0]
    assert y.dtype == torch.bfloat16 and torch.allclose(
        y.float(), F.rms_norm(x, (4,)).float(), rtol=2**-8
    )


@pytest.fixture
def without_onednn():
    # torch.testing's own modules, once imported, forbid to set it otherwise.
    with torch.backends.mkldnn.flags(enabled=False):
        yield


@pytest.mark.usefixtures("without_onednn")
@pytest.mark.parametrize("autocast", [False, True], ids=["network", "autocast"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "name",
    ["conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"],
)
def test_convolution_without_instructions_rounds_its_gradient_once(name, dtype, autocast):
    """PyTorch's own loops added the weight's gradient up in half precision, sample by sample.

    1 % off in bfloat16.
    """
    dims, generator = int(name[-2]), torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    x, v, weight, bias = (
        draw(64, 4, *(4,) * dims),
        draw(64, 4, *(4,) * dims),
        draw(4, 4, *(3,) * dims),
        draw(4),
    )
    cotangents = draw(2, 64, 4, *(4,) * dims)

    def gradients(*arguments):
        x, v, *leaves = arguments
        leaves = [t.requires_grad_() for t in leaves]
        results = jvp(lambda x: getattr(F, name)(x, *leaves, padding=1), x, v)
        return [y.dtype for y in results], torch.autograd.grad(
            results, leaves, tuple(c.to(y.dtype) for c, y in zip(cotangents, results))
        )

    _, right = gradients(*(t.double() for t in (x, v, weight, bias)))
    with torch.autocast("cpu", dtype, enabled=autocast):
        dtypes, found = gradients(*(t.float() if autocast else t for t in (x, v, weight, bias)))
    assert dtypes == [dtype] * 2
    # One rounding, of relative size eps/2, beside sums in float32
    for g, truth in zip(found, right):
        assert float((g.double() - truth).norm()) <= (0.5 * torch.finfo(dtype).eps + 1e-5) * float(
            truth.norm()
        )


@pytest.mark.parametrize("mode", ["bfloat16", "autocast"])
@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_a_bias_is_rounded_once(kind, mode):
    """Values in [1, 2) have the spacing 2^-7; 4,096 of them rounded at random have a mean that is
    right to 2^-7 / √12 / 64 = 3.5e-5.

    Rounded before 0.0137 is added and after it, each of them is off by 0.0019.
    """
    torch.manual_seed(0)
    net = nn.Linear(8, 1) if kind == "linear" else nn.Conv2d(8, 1, 1)
    with torch.no_grad():
        net.weight.fill_(0.125)
        net.bias.fill_(0.0137)
    net = net.bfloat16()
    x = (1.1 + 0.8 * torch.rand(4096, 8)).bfloat16()
    exact = x.double().mean(1) + float(net.bias)
    x = x if kind == "linear" else x[:, :, None, None]
    if mode == "autocast":
        net, x = net.float(), x.float()
    with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
        y, jv = jvp(net, x, torch.ones_like(x))
    assert y.dtype == jv.dtype == torch.bfloat16 and torch.equal(jv, torch.ones_like(jv))
    assert abs(float((y.double().flatten() - exact).mean())) < 5 * 3.5e-5
