"""The tables of the README and of docs/performance.md, from benchmarks/results.

`python docs/tables.py`.
"""

import json
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "docs/performance.md"]
TABLE = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)

# Five rows say what kinds of gain there are.
README_ROWS = [
    ("langevin_step", [2**24]),
    ("perturb + denoising_loss", [64, 65536]),
    ("instance_norm_plus + backward", [32, 128, 32, 32]),
    ("instance_norm_plus_dual", [32, 128, 32, 32]),
    ("annealed_langevin, a step", [64, 3, 32, 32]),
]


def results(name: str) -> dict:
    return json.loads((ROOT / "benchmarks/results" / name).read_text())


def machine(report: dict) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    return f"{report['device']}; {versions}."


def markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def time(seconds: float) -> str:
    if seconds < 1e-3:
        return f"{seconds * 1e6:.0f}\u00a0µs"
    return f"{seconds * 1e3:.3g}\u00a0ms"


def times(value: float) -> str:
    return f"{value:.2f}×" if value < 10 else f"{value:.0f}×"


def against(row: dict, peer: str) -> str:
    """The peer's time, divided by ours."""
    seconds = row["seconds"]
    return times(seconds[peer] / seconds["cpp"]) if peer in seconds else ""


def others(row: dict) -> str:
    known = "cpp", "eager", "torch.compile", "ceiling"
    return ", ".join(f"{peer} {against(row, peer)}" for peer in row["seconds"] if peer not in known)


def speed() -> str:
    """Five rows for the README."""
    rows = results("cpu.json")["rows"]
    lines = []

    for op, shape in README_ROWS:
        (row,) = [r for r in rows if (r["op"], r["shape"], r["dtype"]) == (op, shape, "float32")]
        peers = [against(row, peer) for peer in ("eager", "torch.compile")]
        lines.append([op, "×".join(map(str, shape)), time(row["seconds"]["cpp"]), *peers])

    return markdown(["op", "shape, float32", "time", "vs eager", "vs torch.compile"], lines)


def cpu() -> str:
    report = results("cpu.json")
    head = [
        "op",
        "shape",
        "dtype",
        "time",
        "% of ceiling",
        "vs eager",
        "vs torch.compile",
        "vs others",
    ]
    lines = []

    for row in report["rows"]:
        ours = row["seconds"]["cpp"]
        shape = "×".join(map(str, row["shape"]))
        ceiling = row["seconds"]["ceiling"] / ours
        peers = [against(row, "eager"), against(row, "torch.compile"), others(row)]

        # A ceiling far above is that of bytes which nothing but the input moves.
        shown = f"{ceiling:.0%}" if ceiling > 0.005 else ""
        lines.append([row["op"], shape, row["dtype"], time(ours), shown, *peers])

    return f"{machine(report)}\n\n{markdown(head, lines)}"


def networks() -> str:
    """How many times as fast as double backprop."""
    report = results("networks.json")
    lines = []

    for row in report["rows"]:
        name = row["op"].removeprefix("sliced loss + gradient, ").removesuffix(", 1 thread")
        shape = "×".join(map(str, row["shape"]))
        untouched = row["seconds"]["eager"] / row["seconds"]["cpp, stock norms"]
        replaced = row["seconds"]["eager"] / row["seconds"]["cpp"]
        lines.append([name, shape, times(untouched), times(replaced)])

    table = markdown(["network", "batch", "untouched", "after `replace_norms`"], lines)
    return f"{machine(report)}\n\n{table}"


def training() -> str:
    """A step beside the peer's, and where the time goes."""
    report = results("training.json")
    head = [
        "network",
        "batch",
        "images a second",
        "vs peer",
        "per product",
        "peak memory",
        "convolutions",
        "norms, activations",
        "rest",
    ]
    lines = []

    for row in report["rows"]:
        name = row["op"].removeprefix("training step, ").removesuffix(", 1 thread")
        shape = "×".join(map(str, row["shape"]))
        seconds, figures = row["seconds"], row["figures"]
        ours, peer = figures["cpp"], figures["eager"]
        gain = seconds["eager"] / seconds["cpp"]
        each = gain * ours["products"] / peer["products"]
        memory = f"{ours['peak'] / 2**20:.0f}\u00a0MiB, {times(ours['peak'] / peer['peak'])}"
        speed = f"{row['shape'][0] / seconds['cpp']:.0f}"
        shares = [f"{a:.0%} ({b:.0%})" for a, b in zip(parts(ours), parts(peer))]
        lines.append([name, shape, speed, times(gain), times(each), memory, *shares])

    return f"{machine(report)}\n\n{markdown(head, lines)}"


def parts(figures: dict) -> list[float]:
    """Shares of the processor's time: convolutions, norms and activations, the rest."""
    whole = figures["parts"]["whole"]
    known = [figures["parts"][part] / whole for part in ("convolutions", "norms and activations")]
    return [*known, max(0.0, 1 - sum(known))]


TABLES = {"speed": speed, "cpu": cpu, "networks": networks, "training": training}


def updated(text: str) -> str:
    return TABLE.sub(lambda found: f"{found[1]}{TABLES[found[2]]()}\n{found[3]}", text)


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(updated(page.read_text()))
