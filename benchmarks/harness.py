"""Time a kernel beside its peers: same inputs, same process, one call of each in turn, medians.

`python benchmarks/harness.py results/*.json` prints the tables of benchmarks/README.md.
"""

import contextlib
import ctypes
import functools
import json
import platform
import statistics
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from fastscore import backend as backends

OURS = ("cpp", "cuda", "triton", "reference")


@dataclass
class Row:
    """One question put to every competitor.

    `ceiling` is a copy of as many bytes as the op must move.
    """

    op: str
    shape: list
    dtype: str
    elements: int
    bytes: int
    seconds: dict = field(default_factory=dict)
    # On a GPU: of one call in a CUDA graph, without the host's part.
    replayed: dict = field(default_factory=dict)
    # Of the tensors, taken in turn: with several, no call finds its own in the L2.
    copies: int = 1
    # Of each competitor, whatever else is measured of it.
    figures: dict = field(default_factory=dict)

    @property
    def ours(self):
        return min((name for name in self.seconds if name in OURS), key=self.seconds.get)


def describe_device(device):
    if device == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    isa = torch.backends.cpu.get_cpu_capability()
    return f"{names[0] if names else platform.machine()}, {isa}, {torch.get_num_threads()} threads"


def versions(device):
    found = {"python": platform.python_version(), "torch": torch.__version__.split("+")[0]}
    if device == "cuda":
        import triton

        found |= {"triton": triton.__version__, "cuda": torch.version.cuda}
    return found


def l2_of(device):
    """Bytes of a GPU's L2; None on a CPU."""
    return (
        torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
        if device == "cuda"
        else None
    )


def clock(call, repeats, device):
    """Seconds per call."""
    if device == "cuda":
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(repeats):
            call()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) / 1000 / repeats
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def interleave(calls, device, rounds, least):
    """Median seconds per call of each.

    A timing lasts at least `least` seconds, the competitors take turns.
    """
    repeats = {}
    for name, call in calls.items():
        call(), call()   # compilation, allocation, caches
        once = min(clock(call, 1, device) for _ in range(3)) if least else 1
        repeats[name] = max(1, int(least / once))
    samples = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            samples[name].append(clock(call, repeats[name], device))
    return {name: statistics.median(times) for name, times in samples.items()}


class InTurn:
    """A functools.partial, called with copies of its tensors in turn.

    Its results are kept for a round, or the next one would lie where the last one was.
    """

    def __init__(self, call, copies):
        arguments, options = call.args, call.keywords
        self.calls = [call] + [
            functools.partial(
                copied(call.func),
                *map(copied, arguments),
                **{name: copied(value) for name, value in options.items()},
            )
            for _ in range(copies - 1)
        ]
        self.results = [None] * copies
        self.next = 0

    def __call__(self):
        i = self.next
        self.next = (i + 1) % len(self.calls)
        self.results[i] = self.calls[i]()


def asked(backend, device, cuda=True):
    """The back end as a user asks for it: not at all where the automatic choice is that one, and a
    plain call goes directly. cuda: whether the op has a kernel in CUDA C++."""
    return None if backends._choose("auto", device.type, cuda) == backend else backend


def copied(value):
    """The tensors of an argument as copies in other memory."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone().requires_grad_(value.requires_grad)
    if isinstance(value, functools.partial):
        options = {name: copied(option) for name, option in value.keywords.items()}
        return functools.partial(copied(value.func), *map(copied, value.args), **options)
    return type(value)(map(copied, value)) if type(value) in (list, tuple) else value


def copies_for(total_bytes, l2):
    """So many that together they exceed twice the L2; one where one call exceeds it."""
    return 1 if not l2 or total_bytes > l2 else 2 * l2 // total_bytes + 1


REPLAYED = 20   # calls in a graph


def calls_in_a_graph(call):
    """All copies in turn at least once."""
    return max(REPLAYED, len(call.calls)) if isinstance(call, InTurn) else REPLAYED


def captured(call, times):
    """A CUDA graph of so many calls, after some outside it, which compile and load."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            for _ in range(times):
                call()
    except Exception:
        release_generator()
        raise
    return graph


def release_generator():
    """After a capture that failed, whose end PyTorch did not reach.

    Its default generator takes itself for captured, and every later draw, and every replay, ends in
    "Offset increment outside graph capture". A capture that succeeds releases it.
    """
    with contextlib.suppress(Exception):
        torch.cuda.synchronize()
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            torch.zeros(1, device="cuda")
        torch.cuda.synchronize()


def replays(calls):
    """Calls whose every run is `calls_in_a_graph` of theirs in a CUDA graph.

    Those that cannot be captured are left out.
    """
    graphs = {}
    for name, call in calls.items():
        try:
            graph = captured(call, calls_in_a_graph(call))
            graph.replay()
            torch.cuda.synchronize()
        except Exception as error:   # of a competitor: the others are measured all the same
            print(f"{name} is not captured: {type(error).__name__}: {error}"[:300], file=sys.stderr)
            torch.cuda.synchronize()
            continue
        graphs[name] = graph.replay
    return graphs


def keep_pages():
    """Let malloc keep what is freed (glibc).

    Else the system's first touch of fresh pages leads every time.

    The same for all competitors, who allocate their results (and eager its temporaries) as ever.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        trim_threshold, mmap_max = -1, -4
        mallopt(trim_threshold, 2**31 - 1), mallopt(mmap_max, 0)


def copy_of(total_bytes, device):
    """The ceiling: read half of the bytes and write half of them.

    Like its competitors it may be called with copies in turn (InTurn); if not, what fits in a
    GPU's L2 stays there for all of them.
    """
    source = torch.empty(max(1, total_bytes // 8), device=device).normal_()
    return functools.partial(torch.Tensor.copy_, torch.empty_like(source), source)


PEERS = "eager", "torch.compile"   # which most rows have


def number(value):
    return f"{value:.2f}" if value < 10 else f"{value:.0f}"


def table(report):
    """Markdown: a line per row, the best of ours, each peer as a multiple of its time.

    Those of few rows in one column.

    "(L2)": what must move fits in the GPU's L2, and every call takes the same tensors, so that it
    stays there: the ceiling is a copy of as much in the L2.
    """
    rows, l2 = [Row(**row) for row in report["rows"]], report.get("l2") or 0
    head = ["op", "shape", "dtype", "back end", "time", "G elements/s", "GB/s", "% of ceiling"]
    head += [*(f"vs {peer}" for peer in PEERS), "vs others"]
    graphs = any(row.replayed for row in rows)
    head += ["in a graph", "% of ceiling", "vs eager"] if graphs else []
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        for name in sorted((n for n in row.seconds if n in OURS), key=row.seconds.get):
            t = row.seconds[name]
            ratio = {
                peer: number(seconds / t) + "×"
                for peer, seconds in row.seconds.items()
                if peer not in ("ceiling", *OURS)
            }
            others = ", ".join(
                f"{peer} {ratio[peer]}" for peer in sorted(ratio.keys() - set(PEERS))
            )
            cells = [
                row.op,
                "×".join(map(str, row.shape)),
                row.dtype,
                name,
                f"{t * 1e6:.0f} µs",
                f"{row.elements / t / 1e9:.2f}",
            ]
            cached = " (L2)" if row.bytes <= l2 and row.copies == 1 else ""
            cells += [
                f"{row.bytes / t / 1e9:.0f}",
                f"{100 * row.seconds['ceiling'] / t:.0f}{cached}",
            ]
            cells += [*(ratio.get(p, "") for p in PEERS), others]
            cells += in_a_graph(row, name, cached) if graphs else []
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def in_a_graph(row, name, cached):
    """Time by replay, percent of the ceiling's and the multiple that eager takes."""
    t = row.replayed.get(name)
    if t is None:
        return ["", "", ""]
    ceiling, eager = (row.replayed.get(other) for other in ("ceiling", "eager"))
    return [
        f"{t * 1e6:.1f} µs",
        f"{100 * ceiling / t:.0f}{cached}" if ceiling else "",
        number(eager / t) + "×" if eager else "",
    ]


def report(rows, device):
    found = {"device": describe_device(device), "versions": versions(device)}
    found |= {"l2": l2_of(device)} if device == "cuda" else {}
    return found | {"rows": [asdict(row) for row in rows]}


def merged(path, new):
    """The report in the file with its rows replaced and added to.

    Of another device or other versions nothing is kept.
    """
    if not path.exists():
        return new
    old = json.loads(path.read_text())
    if (old["device"], old["versions"]) != (new["device"], new["versions"]):
        return new

    def question(row):
        return row["op"], tuple(row["shape"]), row["dtype"]

    asked = {question(row) for row in new["rows"]}   # tiny runs may ask one twice
    return new | {"rows": [row for row in old["rows"] if question(row) not in asked] + new["rows"]}


if __name__ == "__main__":
    for path in sys.argv[1:]:
        result = json.loads(Path(path).read_text())
        print(
            f"### {result['device']}\n\n"
            f"{', '.join(f'{k} {v}' for k, v in result['versions'].items())}\n\n"
            f"{table(result)}\n"
        )
