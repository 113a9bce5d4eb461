"""Memory of the sliced-score gradient, against double backprop.

`python benchmarks/memory.py` (Linux).

"saved" is what the graph holds for the backward pass, each storage once, parameters and data left
out; "peak" is the largest resident size of a fresh process during loss and gradient, less what it
was before.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
import bench_sliced

SHAPE = (64, 64, 32, 32)
NAMES = ("fastscore", "double backprop", "double backprop of ours")


def networks():
    torch.manual_seed(0)
    ours, stock = (
        nn.Sequential(*[bench_sliced.Block(SHAPE[1], True, stock) for _ in range(3)])
        for stock in (False, True)
    )
    stock.load_state_dict(ours.state_dict())
    return ours, stock


def call(name, batch):
    """Loss and gradient on `batch` images."""
    ours, stock = networks()
    x = torch.randn(batch, *SHAPE[1:])
    v = torch.randn(1, *x.shape).sign()
    if name == "fastscore":
        return lambda: bench_sliced.ours_loss(ours, x, 1), ours, x
    net = ours if name.endswith("ours") else stock
    return lambda: bench_sliced.double_backprop(net, x, v), net, x


def saved_bytes(name):
    """Bytes of the storages that are saved and alive at once, at most.

    None is let go before the backward pass ends.
    """
    run, net, x = call(name, SHAPE[0])
    own, kept = {t.untyped_storage().data_ptr() for t in (x, *net.parameters())}, {}

    def keep(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            # Holding it keeps its address from being used again.
            kept[storage.data_ptr()] = storage
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        run()
    return sum(storage.nbytes() for storage in kept.values())


def status(field):
    line = next(
        line
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith(field)
    )
    return int(line.split()[1]) * 1024


def peak_bytes(name):
    call(name, 1)[0]()   # threads, kernels
    run, *_ = call(name, SHAPE[0])
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")   # the high-water mark starts anew
    run()
    return status("VmHWM") - before


def measure(name):
    """In a fresh process whose malloc gives large blocks back at once."""
    environment = os.environ | {
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "65536",
    }
    result = subprocess.run(
        [sys.executable, __file__, name],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(result.stdout)


def main():
    shape, rows = "×".join(map(str, SHAPE)), {name: measure(name) for name in NAMES}
    print(
        f"torch {torch.__version__.split('+')[0]}, conv blocks on {shape}; "
        f"the input has {SHAPE[0] * 64 * 32 * 32 * 4 / 2**20:.0f} MiB\n"
    )
    print("| | saved | | peak | |\n|---|---|---|---|---|")
    base = rows["double backprop"]
    for name, row in rows.items():
        print(
            f"| {name} |",
            " | ".join(
                f"{row[k] / 2**20:.0f} MiB | {row[k] / base[k]:.2f}×" for k in ("saved", "peak")
            ),
            "|",
        )


if __name__ == "__main__":
    if len(sys.argv) == 1:
        main()
    else:
        torch.set_num_threads(1)
        print(json.dumps({"peak": peak_bytes(sys.argv[1]), "saved": saved_bytes(sys.argv[1])}))
