"""Is anything slower than it was? The host's cost of small calls, here and in another checkout, one
CPU thread.

    python benchmarks/compare.py ../old                # every row
    python benchmarks/compare.py ../old -k "jvp|sliced" --rounds 60

Three processes, one with this checkout and two with the other, take short slices of a row in turn;
of each stands the least time of a call over all slices; the old one is the mean of two. "noise" is
the ratio of those two: differences that small say nothing.

glibc gives memory of more than 128 KiB back to the system at once, until something large was freed:
then page faults, which depend on what was imported before, cost up to a tenth of a row. Here it
keeps the memory.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parents[1]
SLICE = 0.02   # seconds


def rows():
    """{name: function that makes the call}; only names that both checkouts have."""
    import torch
    from torch import nn

    import fastscore
    from fastscore import likelihood, losses, models, sampling

    found, sigmas = {}, torch.logspace(0, -2, 10)

    def row(name):
        def keep(make):
            found[name] = make
            return make

        return keep

    def mlp(*widths, activation=nn.SiLU):
        torch.manual_seed(0)
        layers = []
        for a, b in zip(widths, widths[1:]):
            layers += [nn.Linear(a, b), activation()]
        return nn.Sequential(*layers[:-1])

    def conv():
        torch.manual_seed(0)
        layers = [
            nn.Conv2d(1, 16, 3, padding=1),
            nn.GroupNorm(4, 16),
            nn.SiLU(),
            nn.Conv2d(16, 16, 3, padding=1),
            nn.SiLU(),
        ]
        return nn.Sequential(*layers, nn.Conv2d(16, 1, 3, padding=1))

    def dropped():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Linear(2, 128),
            nn.SiLU(),
            nn.Dropout(0.1),
            nn.Linear(128, 128),
            nn.SiLU(),
            nn.Linear(128, 2),
        )

    def ncsn():
        torch.manual_seed(0)
        return models.NCSN(
            channels=1, ngf=8, sigmas=torch.logspace(0, -2, 4).tolist(), image_size=8
        )

    def conditional():
        torch.manual_seed(0)
        return models.ScoreMLP(2, width=64, depth=2, sigmas=sigmas.tolist())

    def energy(*widths):
        return models.EnergyScore(mlp(*widths, 1))

    def trained(net, loss):
        parameters = list(net.parameters())

        def call():
            value = loss(net).mean()
            torch.autograd.grad(value, parameters, allow_unused=True)

        return call

    def forward(net, loss):
        return lambda: loss(net)

    data = {
        "2-128-128-2": (lambda: mlp(2, 128, 128, 2), (2,)),
        "convolutions": (conv, (1, 8, 8)),
        "dropout": (dropped, (2,)),
        "NCSN": (ncsn, (1, 8, 8)),
    }
    kinds = {
        "sliced, reduced": lambda x: lambda s: losses.sliced(s, x, seed=0),
        "sliced": lambda x: lambda s: losses.sliced(s, x, seed=0, variance_reduced=False),
        "sliced, 4 gaussian": lambda x: (
            lambda s: losses.sliced(s, x, seed=0, projections=4, distribution="gaussian")
        ),
        "exact": lambda x: lambda s: losses.exact(s, x[:, :2]),
        "finite differences": lambda x: lambda s: losses.finite_difference_sliced(s, x, seed=0),
        "denoising": lambda x: lambda s: losses.denoising(s, x, 0.5, seed=0),
    }

    def shape_of(net, batch):
        return (batch, *data[net][1])

    def called(net, name, s):
        """The network with the arguments that it wants."""
        if net == "NCSN":
            return (lambda x, sigma: s(x, 1.0)) if name == "denoising" else lambda x: s(x, 1.0)
        return (lambda x, sigma: s(x)) if name == "denoising" else s

    def add(net, batch, name):
        make_net, _ = data[net]

        def make(wrap):
            model, x = make_net(), torch.rand(shape_of(net, batch))
            return wrap(model, lambda s: kinds[name](x)(called(net, name, s)))

        found[f"{name}, {net}, {batch}, no gradient"] = lambda: no_gradient(make(forward))
        found[f"{name}, {net}, {batch}, value"] = lambda: make(forward)
        found[f"{name}, {net}, {batch}, with backward"] = lambda: make(trained)

    def no_gradient(call):
        def quiet():
            with torch.no_grad():
                return call()

        return quiet

    for batch in (4, 64, 256):
        for name in kinds:
            add("2-128-128-2", batch, name)
    for net, batch in (("convolutions", 4), ("NCSN", 2), ("dropout", 4)):
        for name in kinds:
            if name != "exact" or net == "dropout":
                add(net, batch, name)

    for net, batch in (
        ("2-128-128-2", 4),
        ("2-128-128-2", 64),
        ("2-128-128-2", 256),
        ("convolutions", 4),
        ("dropout", 4),
    ):

        def jvp(net=net, batch=batch, graph=True):
            model, x = data[net][0](), torch.rand(shape_of(net, batch))
            v = torch.randn_like(x)
            call = lambda: fastscore.jvp(model, x, v)   # noqa: E731
            return call if graph else no_gradient(call)

        found[f"jvp, {net}, {batch}"] = jvp
        found[f"jvp, {net}, {batch}, no gradient"] = lambda jvp=jvp: jvp(graph=False)

    @row("jvp, lambda x: x.sin(), 4")
    def _():
        x = torch.rand(4, 2)
        return lambda: fastscore.jvp(lambda z: z.sin(), x, x)

    @row("jvp, 30 operations without matrices, 4")
    def _():
        x = torch.rand(4, 2)

        def f(z):
            for _ in range(10):
                z = (z * z + 1).sqrt()
            return z

        return lambda: fastscore.jvp(f, x, x)

    for batch in (8, 128):

        def noise_conditional(batch=batch, method="denoising"):
            net, x = conditional(), torch.rand(batch, 2)
            return trained(
                net, lambda s: losses.noise_conditional(s, x, sigmas, seed=0, method=method)
            )

        found[f"noise_conditional, ScoreMLP 2-64, {batch}, with backward"] = noise_conditional
        found[f"noise_conditional sliced, ScoreMLP 2-64, {batch}, with backward"] = (
            lambda f=noise_conditional: f(method="sliced")
        )

    for widths, batch in (((2, 128, 128), 256), ((2, 128, 128), 4), ((2, 32, 32), 64)):
        for name in ("sliced", "sliced, reduced", "denoising", "exact"):

            def energies(widths=widths, batch=batch, name=name):
                x = torch.rand(batch, widths[0])
                f = (
                    (lambda s: losses.denoising(lambda y, _: s(y), x, 0.5, seed=0))
                    if name == "denoising"
                    else kinds[name](x)
                )
                return trained(energy(*widths), f)

            found[f"energy {'-'.join(map(str, widths))}-1, {name}, {batch}, with backward"] = (
                energies
            )

        def score(widths=widths, batch=batch):
            s, x = energy(*widths), torch.rand(batch, widths[0])
            return no_gradient(lambda: s(x))

        found[f"energy {'-'.join(map(str, widths))}-1, score, {batch}, no gradient"] = score

        def differentiable(widths=widths, batch=batch):
            s, x = energy(*widths), torch.rand(batch, widths[0])
            return lambda: s(x)

        found[f"energy {'-'.join(map(str, widths))}-1, score, {batch}"] = differentiable

    def drained(run):
        for _ in run:
            pass

    for batch in (16, 512):

        def annealed(batch=batch):
            net, x = conditional(), torch.rand(batch, 2)
            return lambda: drained(
                sampling.annealed_langevin(
                    net, x, sigmas=sigmas, steps_per_level=5, step_size=2e-5, seed=0
                )
            )

        found[f"annealed_langevin, 50 steps, ScoreMLP 2-64, {batch}"] = annealed

        def corrector(batch=batch):
            net, x = conditional(), torch.rand(batch, 2)
            return lambda: drained(sampling.predictor_corrector(net, x, sigmas=sigmas, seed=0))

        found[f"predictor_corrector, 10 levels, ScoreMLP 2-64, {batch}"] = corrector

        def flow(batch=batch):
            net, x = conditional(), torch.rand(batch, 2)
            return lambda: drained(sampling.probability_flow(net, x, sigmas=sigmas))

        found[f"probability_flow, 10 levels, ScoreMLP 2-64, {batch}"] = flow

        def chain(batch=batch):
            net, x = mlp(2, 128, 128, 2), torch.rand(batch, 2)
            return lambda: drained(sampling.langevin(net, x, steps=50, step_size=0.01, seed=0))

        found[f"langevin, 50 steps, 2-128-128-2, {batch}"] = chain

        def mala(batch=batch):
            net, x = energy(2, 64), torch.rand(batch, 2)
            return lambda: drained(sampling.mala(net.f, x, steps=20, step_size=0.01, seed=0))

        found[f"mala, 20 steps, energy 2-64-1, {batch}"] = mala

        def density(batch=batch):
            net, x = conditional(), torch.rand(batch, 2)
            return lambda: likelihood.log_density(
                net, x, sigma_min=0.01, sigma_max=1.0, steps=5, method="heun"
            )

        found[f"log_density, ScoreMLP 2-64, {batch}"] = density

    @row("sample, 20 steps, 2-128-128-2, 16")
    def _():
        net = mlp(2, 128, 128, 2)
        return lambda: fastscore.sample(
            net, sampler="langevin", shape=(16, 2), steps=20, step_size=0.01, seed=0
        )

    for size in (8, 4096, 65536):

        x = torch.rand(max(1, size // 8), 8)
        z = torch.randn_like(x)
        e = torch.full((len(x),), 0.1)
        ops = {
            "langevin_step": lambda x=x, z=z: fastscore.langevin_step(x, z, 0.1, seed=0),
            "langevin_step, given noise": lambda x=x, z=z: fastscore.langevin_step(
                x, z, 0.1, noise=z
            ),
            "langevin_step, (B,)": lambda x=x, z=z, e=e: fastscore.langevin_step(x, z, e, seed=0),
            "noisy_update": lambda x=x, z=z: fastscore.noisy_update(x, z, 0.1, 0.2, seed=0),
            "perturb": lambda x=x, e=e: fastscore.perturb(x, e, seed=0),
            "denoising_loss": lambda x=x, e=e: fastscore.denoising_loss(x, e, seed=0),
            "normal": lambda x=x: fastscore.random.normal(x.shape, seed=0, stream=1024),
            "rademacher": lambda x=x: fastscore.random.rademacher(x.shape, seed=0, stream=1024),
        }
        for name, call in ops.items():
            found[f"{name}, {size}"] = lambda call=call: call

    for shape in ((1, 4, 2, 2), (4, 16, 8, 8), (8, 32, 16, 16)):
        size = "x".join(map(str, shape))
        x = torch.rand(shape)
        weights = [torch.rand(shape[1]) for _ in range(3)]
        learnt = [w.clone().requires_grad_() for w in weights]
        found[f"instance_norm_plus, {size}"] = lambda x=x, w=weights: (
            lambda: fastscore.instance_norm_plus(x, *w)
        )
        found[f"instance_norm_plus, {size}, graph"] = lambda x=x, w=learnt: (
            lambda: fastscore.instance_norm_plus(x, *w)
        )
        found[f"instance_norm_plus_dual, {size}"] = lambda x=x, w=weights: (
            lambda: fastscore.ops.instance_norm_plus_dual(x, x[None], *w)
        )
        found[f"rademacher_jvp, {size}"] = lambda x=x: (
            lambda: fastscore.rademacher_jvp(torch.sin, x, seed=0)
        )

    @row("training_loop, a step of denoising, ScoreMLP 2-64, 128")
    def _():
        from fastscore.training import training_loop

        net, batch = conditional(), torch.rand(128, 2)
        optimizer = torch.optim.SGD(net.parameters(), 1e-4)

        def endless():
            while True:
                yield batch

        def loss(net, x, step):
            return losses.noise_conditional(net, x, sigmas, seed=0, step=step)

        steps = training_loop(net, endless(), loss, steps=10**7, optimizer=optimizer)
        return lambda: next(steps)

    def plain_energy_loss(s, x):
        """Denoising of an energy as it is written by hand."""
        z = torch.randn_like(x)
        y = (x + 0.5 * z).requires_grad_()
        (g,) = torch.autograd.grad(s.f(y).sum(), y, create_graph=True)
        return 0.5 * (g + z / 0.5).square().sum(1)

    for widths, batch in (((2, 128, 128), 256), ((2, 32, 32), 64), ((2, 128, 128), 4)):

        def by_hand(widths=widths, batch=batch):
            x = torch.rand(batch, widths[0])
            return trained(energy(*widths), lambda s: plain_energy_loss(s, x))

        found[
            f"energy {'-'.join(map(str, widths))}-1, denoising by hand, {batch}, with backward"
        ] = by_hand

    @row("EnergyScore of convolutions, sliced, 4, with backward")
    def _():
        torch.manual_seed(0)
        f = nn.Sequential(
            nn.Conv2d(1, 8, 3),
            nn.SiLU(),
            nn.Conv2d(8, 8, 3),
            nn.SiLU(),
            nn.Flatten(),
            nn.Linear(128, 1),
        )
        x = torch.rand(4, 1, 8, 8)
        return trained(
            models.EnergyScore(f), lambda s: losses.sliced(s, x, seed=0, variance_reduced=False)
        )

    return found


def serve():
    """In a process of its own.

    Rows are asked for by lines of standard input, answered by lines of JSON.
    """
    import torch

    torch.set_num_threads(1)
    found, calls = rows(), {}
    print(json.dumps(list(found)), flush=True)
    for line in sys.stdin:
        name, duration = json.loads(line)
        try:
            if name not in calls:
                calls.clear()
                calls[name] = found[name]()
                for _ in range(3):
                    calls[name]()
            answer = least(calls[name], duration)
        except Exception as error:
            answer = f"{type(error).__name__}: {error}"[:200]
        print(json.dumps(answer), flush=True)


def least(call, duration):
    """The least CPU time of this thread for a call, in seconds."""
    clock = time.thread_time
    end, best = time.perf_counter() + duration, float("inf")
    while True:
        start = clock()
        call()
        best = min(best, clock() - start)
        if time.perf_counter() > end:
            return best


class Worker:
    def __init__(self, checkout):
        keep = {"MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1)}
        environment = os.environ | keep | {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, __file__, "--serve", str(checkout)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(
            command, env=environment, cwd=checkout, stderr=subprocess.DEVNULL, **pipes
        )
        self.names = self.read()

    def read(self):
        return json.loads(self.process.stdout.readline())

    def ask(self, name, duration):
        self.process.stdin.write(json.dumps([name, duration]) + "\n")
        self.process.stdin.flush()
        return self.read()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "other", type=Path, help="the checkout to compare with, its extension built"
    )
    parser.add_argument("-k", default="", help="a regular expression: rows to measure")
    parser.add_argument("--rounds", type=int, default=25, help="slices of each process per row")
    parser.add_argument(
        "--limit", type=float, default=1.05, help="ratio from which a row is marked"
    )
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        return serve()

    workers = {"old": Worker(options.other), "new": Worker(HERE), "again": Worker(options.other)}
    names = [name for name in workers["old"].names if re.search(options.k, name)]
    print("| row | old, µs | new, µs | new / old | noise |\n|---|---|---|---|---|", flush=True)
    slower = []
    for name in names:
        times = {who: [] for who in workers}
        for k in range(options.rounds):
            for who in sorted(workers, reverse=k % 2 == 1):
                times[who].append(workers[who].ask(name, SLICE))
        failed = {who: found[0] for who, found in times.items() if isinstance(found[0], str)}
        if failed:
            print(f"| {name} | {failed} ||||", flush=True)
            continue
        old, new, again = (min(times[who]) for who in ("old", "new", "again"))
        old, noise = (old + again) / 2, max(old, again) / min(old, again)
        ratio = new / old
        mark = " **" if ratio > options.limit else ""
        slower += [name] if mark else []
        print(
            f"| {name} | {old * 1e6:.1f} | {new * 1e6:.1f} | {ratio:.2f}{mark} | {noise:.2f} |",
            flush=True,
        )
    print(f"\n{len(slower)} of {len(names)} rows slower by more than {options.limit - 1:.0%}")
    return 1 if slower else 0


if __name__ == "__main__":
    sys.exit(main())
