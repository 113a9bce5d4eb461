"""What is installed, which back end serves which op, and whether each agrees with the reference."""

import platform
from collections.abc import Iterator

import torch

import fastscore
from fastscore import backend, random
from fastscore.dual import rademacher_jvp
from fastscore.ops import (
    conditional_instance_norm_plus,
    denoising_loss,
    group_norm_modulate,
    instance_norm_plus,
    langevin_step,
    noisy_update,
    perturb,
)
from fastscore.ops.activate import activate_dual, activate_jet


def _version(package):
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _calls(device):
    """A small call of every op."""
    x = torch.linspace(-1, 1, 600, device=device).reshape(6, 100)
    image = x.reshape(2, 6, 5, 10)
    table = torch.linspace(0.5, 1.5, 36, device=device).reshape(2, 18)
    label = torch.tensor([1, 0], device=device)
    gamma, alpha, beta = table[0].split(6)
    key = {"seed": 2**40 + 7, "step": 3, "offset": 5}
    return {
        "words": lambda: random.words(1000, stream=1024, device=device, **key),
        "uniform": lambda: random.uniform((1000,), stream=1024, device=device, **key),
        "normal": lambda: random.normal((1000,), stream=1024, device=device, **key),
        "rademacher": lambda: random.rademacher((1000,), stream=1024, device=device, **key),
        "noisy_update": lambda: noisy_update(x, -x, 0.1, 0.2, **key),
        "langevin_step": lambda: langevin_step(x, -x, 0.1, **key),
        "perturb": lambda: perturb(x, 0.3, **key),
        "denoising_loss": lambda: denoising_loss(x, 0.3, **key),
        "instance_norm_plus": lambda: instance_norm_plus(
            image, gamma, alpha, beta, activation="elu"
        ),
        "conditional_instance_norm_plus": lambda: conditional_instance_norm_plus(
            image, label, table
        ),
        "group_norm_modulate": lambda: group_norm_modulate(
            image, 2, gamma, beta, activation="silu"
        ),
        "rademacher_jvp": lambda: rademacher_jvp(torch.sin, x, projections=2, **key)[1],
        "activate_dual": lambda: activate_dual(torch.stack([4 * x, x, -x]), "silu"),
        "activate_jet": lambda: activate_jet(torch.stack([4 * x, x, -x]), 1, "silu"),
    }


def self_test(name: str, op: str, device: str) -> str:
    """'ok', or how far back end `name` is from the reference on one small call of `op`."""
    call = _calls(device)[op]
    with backend.use_backend("reference"):
        expected = call()
    with backend.use_backend(name):
        got = call()
    if got.dtype == torch.int64:
        return "ok" if torch.equal(got, expected) else "WRONG: words differ"
    error = float((got - expected).abs().max())
    bound = 2e-6 * max(1.0, float(expected.abs().max()))
    return "ok" if error <= bound else f"WRONG: differs by {error:.2g}"


def lines() -> Iterator[str]:
    """The report, line by line."""
    system = f"{platform.system()} {platform.machine()}"
    yield f"fastscore {fastscore.__version__}, Python {platform.python_version()}, {system}"
    yield ", ".join(f"{p} {_version(p)}" for p in ("torch", "triton", "numpy"))
    if backend.load_extension() is None:
        instruction_set = ("baseline", "AVX2", "AVX-512")[torch.ops.fastscore.isa(0)]
        yield f"instruction set: {instruction_set}"

    yield f"cpu ({torch.get_num_threads()} threads)"
    yield from _lines_of("cpu")
    for i in range(torch.cuda.device_count()):
        yield f"cuda:{i} ({torch.cuda.get_device_name(i)})"
        yield from _lines_of(f"cuda:{i}")


def _lines_of(device):
    """A line for each op and back end of a device, or for a back end that is not there."""
    for name in backend.BACKENDS:
        reason = backend.why_not(name, torch.device(device).type)
        if reason is not None:
            yield f"  {'every op':30} {name:10} no   {reason}"
            continue
        for raw in backend.OPS.values():
            for op in raw.serves:
                if name == "cuda" and not raw.cuda:
                    verdict = "no   a GPU runs its Triton kernel"
                else:
                    verdict = f"yes  self-test {self_test(name, op, device)}"
                yield f"  {op:30} {name:10} {verdict}"


def main() -> int:
    """Print the report; 1 if a self-test failed."""
    text = list(lines())
    print("\n".join(text))
    return int(any("WRONG" in line for line in text))
