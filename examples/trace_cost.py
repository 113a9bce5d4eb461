"""What a training step costs in d dimensions.

The exact trace takes d derivatives, a projection takes one.
"""

import time

import torch
from matplotlib.figure import Figure

from fastscore import losses
from fastscore.models import ScoreMLP

from toy import run, save


def seconds(loss, net, x, repeats=2):
    """The fastest of a few runs of value and gradient."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        loss(net, x).mean().backward()
        times.append(time.perf_counter() - start)
    return min(times[1:])


def main(out, quick=False):
    """Returns {"exact": {d: seconds}, "sliced": {d: seconds}}."""
    dims = (2, 8, 32, 128) if quick else (2, 8, 32, 128, 512)
    objectives = {"exact": losses.exact, "sliced": lambda net, x: losses.sliced(net, x, seed=0)}
    result = {name: {} for name in objectives}
    for d in dims:
        net, x = ScoreMLP(d, width=128, depth=1), torch.randn(32, d)
        for name, loss in objectives.items():
            result[name][d] = seconds(loss, net, x)
    figure = Figure(figsize=(5, 3.6), layout="constrained")
    axes = figure.add_subplot(
        xlabel="dimensions", ylabel="seconds per training step", xscale="log", yscale="log"
    )
    for name, times in result.items():
        axes.plot(list(times), list(times.values()), "o-", label=name)
    axes.legend()
    save(figure, out, "trace_cost.png")
    return result


if __name__ == "__main__":
    run(main)
