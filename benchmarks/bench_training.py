"""A step of training on images, one CPU thread: noise, network, loss, gradient, Adam, average.

`models.UNet` beside diffusers' UNet2DModel of the same widths, and `models.NCSN` beside the
official layers with the same weights. Ours is `training_loop` with `losses.denoising`; the peer is
the loop that its users write. The ceiling is our step's convolutions with their gradients alone.

Of each stand, beside its time, the products that FlopCounterMode counts, the processor's time of
its convolutions and of its norms and activations, and the memory at its peak: how much the largest
resident size of a fresh process during a step exceeds the size before it, with weights, averages
and Adam's state made and malloc giving large blocks back at once. `python
benchmarks/bench_training.py CASE SIDE NAME` prints it (Linux).
"""

import copy
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parent))
from memory import status
from networks import RefineNet

import fastscore
from fastscore import losses, random
from fastscore.models import NCSN, UNet
from fastscore.training import training_loop

BATCH = 32
CASES = {
    "UNet, widths 32 and 64": ((1, 28), (3, 32)),
    "UNet.small": ((1, 28), (3, 32)),
    "NCSN, ngf 32": ((1, 28),),
}
PARTS = {
    "convolutions": re.compile(r"aten\.convolution"),
    "norms and activations": re.compile(r"fastscore\.normalise|native_\w+_norm|\.silu|\.elu"),
}


def networks(case: str, channels: int, side: int, small: bool) -> tuple[nn.Module, nn.Module]:
    """Ours and the peer."""
    torch.manual_seed(0)
    if case.startswith("NCSN"):
        net = NCSN(channels, 4 if small else 32, image_size=side)
        peer = RefineNet(channels, 4 if small else 32, levels=len(net.sigmas))
        peer.load_state_dict({_official(k): v for k, v in net.state_dict().items()})
        return net, peer

    diffusers = pytest.importorskip("diffusers")
    widths = (8, 16) if small else (32, 64)
    options = {"width": widths[0], "multipliers": (1, 2), "blocks": 1}
    make = UNet.small if case == "UNet.small" else UNet
    peer = diffusers.UNet2DModel(
        sample_size=side,
        in_channels=channels,
        out_channels=channels,
        layers_per_block=1,
        block_out_channels=widths,
        norm_num_groups=4 if small else 8,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        add_attention=False,
    )
    return make(2, channels, **options), peer


def _official(name: str) -> str:
    """The name in networks.py of a parameter of NCSN."""
    for pattern, other in (
        (r"^(begin|end)_conv", r"\1"),
        (r"^normalizer", "normalizer.norm"),
        (r"^res(\d)", lambda m: f"stages.{int(m[1]) - 1}"),
        (r"^refine(\d)", lambda m: f"refines.{int(m[1]) - 1}"),
        (r"normalize(\d)", r"norm\1.norm"),
        (r"(\d)_(\d)_norm", lambda m: f"norms.{2 * int(m[1]) + int(m[2]) - 3}.norm"),
        (r"(\d)_(\d)_conv", lambda m: f"convs.{2 * int(m[1]) + int(m[2]) - 3}"),
        (r"(msf|crp)\.norms\.(\d)", r"\1.norms.\2.norm"),
        ("msf", "fusion"),
        ("crp", "pooling"),
        ("adapt_convs", "adapt"),
        ("output_convs", "output"),
    ):
        name = re.sub(pattern, other, name)
    return name


def levels(net: nn.Module, batch: int, step: int) -> torch.Tensor:
    """σ (B,) of a step: of the ladder, or log-normal."""
    if isinstance(net, NCSN):
        return net.sigmas[(torch.arange(batch) * 7 + step) % len(net.sigmas)]
    z = random.normal((batch,), seed=1, step=step, stream=random.LEVEL)
    return (1.3 * z - 1.4).exp()


def ours_loss(net: nn.Module, x: torch.Tensor, step: int) -> torch.Tensor:
    sigma = levels(net, len(x), step)
    return losses.denoising(net, x, sigma, seed=0, step=step) * sigma**2


def peer_loss(
    net: nn.Module, ladder: torch.Tensor | None, x: torch.Tensor, z: torch.Tensor
) -> torch.Tensor:
    """½ ‖σ s + z‖², as in the networks' own repositories."""
    if ladder is not None:
        labels = torch.randint(len(ladder), (len(x),))
        return official_loss(net, ladder[labels], labels, x, z)

    sigma = (1.3 * torch.randn(len(x)) - 1.4).exp()
    column = sigma[:, None, None, None]
    noisy = (x + column * z - 0.5) / (column**2 + 0.25).sqrt()
    noise = net(noisy, sigma.log()).sample
    return 0.5 * (noise - z).square().flatten(1).sum(1)


def official_loss(net, sigma, labels, x, z):
    column = sigma[:, None, None, None]
    score = net(x + column * z, labels)
    return 0.5 * (score * column + z).square().flatten(1).sum(1)


def ours(net: nn.Module, x: torch.Tensor) -> Callable[[], None]:
    loop = training_loop(net, [x], ours_loss, steps=10**6)
    return lambda: next(loop)


def peer(net: nn.Module, ladder: torch.Tensor | None, x: torch.Tensor) -> Callable[[], None]:
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    average = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.999))

    def step():
        loss = peer_loss(net, ladder, x, torch.randn_like(x)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        average.update_parameters(net)

    return step


def steps(case: str, channels: int, side: int, small: bool) -> dict[str, Callable[[], None]]:
    net, other = networks(case, channels, side, small)
    x = torch.rand(2 if small else BATCH, channels, side, side)
    ladder = net.sigmas if isinstance(net, NCSN) else None
    return {"cpp": ours(net, x), "eager": peer(other, ladder, x)}


def check_gradient(net: nn.Module, x: torch.Tensor) -> None:
    """Ours in float32, against the reference in float64."""
    with torch.no_grad():
        for p in net.parameters():   # off the zeros that they start with
            p.add_(0.02 * torch.randn_like(p))

    exact = copy.deepcopy(net).double()
    found = torch.autograd.grad(ours_loss(net, x, 0).mean(), [*net.parameters()])
    sigma = levels(net, len(x), 0)
    z = random.normal(x.shape, seed=0, stream=random.PERTURB).double()
    with fastscore.use_backend("reference"):
        column = sigma.double()[:, None, None, None]
        s = exact(x.double() + column * z, sigma.double())
        loss = 0.5 * (column * s + z).square().flatten(1).sum(1)
        expected = torch.autograd.grad(loss.mean(), [*exact.parameters()])
    for a, b in zip(found, expected, strict=True):
        # float32, through up to 70 layers.
        assert float((a - b).norm()) <= 1e-3 * float(b.norm()) + 1e-5


def check_curve(net: nn.Module, other: nn.Module, x: torch.Tensor, count: int) -> None:
    """NCSN and the official layers, of the same weights and noise: the losses of so many steps."""
    net, other = copy.deepcopy(net), copy.deepcopy(other)
    optimizer = torch.optim.Adam(other.parameters(), lr=1e-3)
    for step, state in enumerate(training_loop(net, [x], ours_loss, steps=count)):
        sigma = levels(net, len(x), step)
        labels = (torch.arange(len(x)) * 7 + step) % len(net.sigmas)
        z = random.normal(x.shape, seed=0, step=step, stream=random.PERTURB)
        loss = official_loss(other, sigma, labels, x, z)
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
        # Adam's first steps take a gradient's sign, and a rounding can turn that of a small one.
        torch.testing.assert_close(state.losses.mean(), loss.mean().detach(), rtol=1e-2, atol=0)


class Clock(TorchDispatchMode):
    """The processor's time of each op, and the calls of the convolutions."""

    def __init__(self):
        super().__init__()
        self.seconds, self.convolutions = {}, []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        start = time.thread_time()
        result = op(*args, **kwargs)
        took = time.thread_time() - start
        self.seconds[str(op)] = self.seconds.get(str(op), 0.0) + took
        if PARTS["convolutions"].match(str(op)):
            self.convolutions.append((op, args, kwargs))
        return result


def parts(step: Callable[[], None], rounds: int) -> dict[str, float]:
    """Seconds of the processor, the least of some rounds: the kinds of PARTS, and the whole."""
    found = []
    for _ in range(rounds):
        start = time.thread_time()
        step()
        whole = time.thread_time() - start
        with Clock() as clock:
            step()
        of = {
            part: sum(s for op, s in clock.seconds.items() if names.search(op))
            for part, names in PARTS.items()
        }
        found.append(of | {"whole": whole})
    return {part: min(of[part] for of in found) for part in found[0]}


def convolutions_of(step: Callable[[], None]) -> Callable[[], None]:
    """The same convolutions with their gradients, and nothing else."""
    with Clock() as clock:
        step()
    calls = clock.convolutions

    def run():
        with torch.no_grad():
            for op, args, kwargs in calls:
                op(*args, **kwargs)

    return run


def products(step: Callable[[], None]) -> int:
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


QUESTIONS = [
    pytest.param(case, *size, id=f"{case}, {size[0]}x{size[1]}x{size[1]}")
    for case, sizes in CASES.items()
    for size in sizes
]


@pytest.fixture(autouse=True)
def one_thread(threads):
    torch.set_num_threads(1)


@pytest.mark.parametrize("case, channels, side", QUESTIONS)
def bench_training(compare, device, ours, request, case, channels, side):
    if device != "cpu" or "cpp" not in ours:
        pytest.skip("a step on a CPU")
    small = request.config.option.smoke
    side = 8 if small else side
    net, other = networks(case, channels, side, small)
    x = torch.rand(2 if small else 4, channels, side, side)
    if isinstance(net, NCSN):
        check_curve(net, other, x, 3 if small else 20)
    check_gradient(net, x)

    found = steps(case, channels, side, small)
    x = torch.rand(2 if small else BATCH, channels, side, side)
    row = compare(
        f"training step, {case}, 1 thread",
        x,
        2 * x.nbytes,
        found,
        ceiling=convolutions_of(found["cpp"]),
        figures={
            name: {
                "products": products(step),
                "parts": parts(step, 1 if small else 5),
                "peak": peak(case, channels, side, name, small),
            }
            for name, step in found.items()
        },
    )
    assert set(row.figures) == set(found)


def peak(case: str, channels: int, side: int, name: str, small: bool) -> int:
    """In a fresh process whose malloc gives large blocks back at once."""
    environment = os.environ | {
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "65536",
    }
    command = [sys.executable, __file__, case, channels, side, name, int(small)]
    result = subprocess.run(
        [*map(str, command)], env=environment, capture_output=True, text=True, check=True
    )
    return json.loads(result.stdout.splitlines()[-1])


def peak_here(case: str, channels: int, side: int, name: str, small: bool) -> int:
    step = steps(case, channels, side, small)[name]
    for _ in range(2):   # kernels, averages, Adam's state
        step()
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")   # the high-water mark starts anew
    step()
    return status("VmHWM") - before


if __name__ == "__main__":
    torch.set_num_threads(1)
    case, channels, side, name, small = sys.argv[1:]
    print(json.dumps(peak_here(case, int(channels), int(side), name, bool(int(small)))))
