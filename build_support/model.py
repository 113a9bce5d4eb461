"""What limits each Triton kernel on an H100, from its compiled code.

`model.py [RESULTS.json]` prints the table of docs/gpu.md.

A kernel takes at least as long as each of these, and is predicted to take as long as the longest:
- memory: the bytes that must move, at the rate of a copy;
- issue: its instructions at four warps a clock of each multiprocessor, of which 80 % are used;
- a pipe: the instructions that one of its pipes takes, at that pipe's rate;
- latency: with the warps that the registers leave room for, the bytes that all their loads ask for
  at once, a trip each.
The norm in clusters (csrc/normalise.cu) is predicted from how its rows are cut: `in_clusters`.
No GPU is needed. RESULTS: a report of the benchmarks (benchmarks/results), whose rows in a graph
are put beside the predictions.
"""

import functools
import itertools
import json
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import machine_code
import native

SIZE = 2**26   # elements
COPY = 2.98e12   # bytes a second, measured on an H100 (build_support/ceilings.py)
PROCESSORS, WARPS, REGISTERS = 132, 64, 65_536
# At which ncu saw 29 % of the H100's issue slots taken by 63.3 million warp instructions in 262 µs.
CLOCK = 1.6e9
ISSUED = 0.8   # of the slots, at best
LATENCY = 0.8e-6   # seconds of a load from memory under load
# Results a clock of a multiprocessor.
LANES = {"fma": 128, "imad": 64, "alu": 64, "xu": 16, "lsu": 32, "fp64": 64}


class Shape(NamedTuple):
    """Tensors that must be read and written once, per element.

    The benchmark's row that shows the kernel alone.
    """

    read: int
    written: int
    row: tuple[str, list] | None = None


KERNELS = {
    "noisy_update": Shape(2, 1, ("langevin_step", [2**27])),
    "normal": Shape(0, 1, ("random.normal", [2**24])),
    "uniform": Shape(0, 1, ("random.uniform", [2**24])),
    "rademacher": Shape(0, 1, ("random.rademacher", [2**24])),
    "noise_reduce long": Shape(1, 0),
    "project long": Shape(2, 0),
    "spread long": Shape(1, 2),
    "moments elu": Shape(1, 0),
    "moments tangent": Shape(2, 0),
    "apply elu": Shape(1, 1),
    "apply tangent": Shape(2, 2),
    "cotangent_sums elu": Shape(2, 0),
    "cotangent_sums tangent": Shape(4, 0),
    "gradient elu": Shape(2, 1),
    "gradient tangent": Shape(4, 2),
    "activate_dual silu": Shape(2, 2),
    "activate_dual_gradient silu": Shape(4, 2),
    "activate_jet silu": Shape(3, 3),
    "activate_jet_gradient silu": Shape(6, 3),
}
WHOLE = {  # several kernels of one call: what must move for it, once
    "instance_norm_plus": (
        ("moments elu", "apply elu"),
        Shape(1, 1, ("instance_norm_plus", [128, 128, 32, 32])),
    ),
    "instance_norm_plus_dual": (
        ("moments tangent", "apply tangent"),
        Shape(2, 2, ("instance_norm_plus_dual", [128, 128, 32, 32])),
    ),
}
# The same in one kernel of CUDA C++: channels and pixels of a sample, which is a row of its own.
CLUSTERS = {
    "instance_norm_plus in clusters": (
        128,
        1024,
        ("instance_norm_plus in clusters", [128, 128, 32, 32]),
    ),
    "instance_norm_plus in clusters, 64×64": (128, 4096, None),
}
SHARED = 228 * 1024   # bytes of a multiprocessor's shared memory, of which a block takes 1 KiB more
GROUPS = 6 * [16] + 2 * [18]   # multiprocessors that a cluster may lie in, of those 132
EXCHANGE = 2e-6   # seconds from a block's last load to its first store: assumed
# Of an element, counted in a copy of the kernel that has no other activation than ELU.
IN_CLUSTERS = {"fp32": 30, "bf16": 31}
ITEM = {"fp32": 4, "bf16": 2}
TORCH = {"fp32": "float32", "bf16": "bfloat16"}


def occupancy(registers: int, warps: int) -> float:
    """Share of a multiprocessor's warps that the registers leave room for.

    They are given out in units of 256 to a warp.
    """
    each = -(-registers * 32 // 256) * 256
    return min(WARPS // warps, REGISTERS // (each * warps), 32) * warps / WARPS


def limits(row: dict, warps: int, shape: Shape, item: int, size: int) -> dict[str, float]:
    """Seconds of each limit; `row` as machine_code.count makes it."""
    per_element = row["per_element"]
    # What stands in the code once, per element; of a loop as if all of it were.
    share = per_element / row["instructions"]
    pipes = {
        pipe: size * n * share / (PROCESSORS * LANES[pipe] * CLOCK)
        for pipe, n in row["pipes"].items()
    }
    found = {
        "memory": size * (shape.read + shape.written) * item / COPY,
        "issue": size * per_element / (PROCESSORS * 128 * CLOCK * ISSUED),
        **pipes,
    }
    if shape.read:
        # Bytes of a multiprocessor.
        in_flight = row["read"] * 32 * WARPS * occupancy(row["registers"], warps)
        found["latency"] = size * shape.read * item * LATENCY / (PROCESSORS * in_flight)
    return found


@functools.cache
def cut_numbers() -> dict[str, int]:
    """The constants of csrc/tiles.h."""
    text = (native.ROOT / "csrc" / "tiles.h").read_text()
    found = re.findall(r"\b(k\w+) = ([\d *]+)[,;]", text)
    numbers = ((name, value.split("*")) for name, value in found)
    return {name: functools.reduce(lambda a, b: a * int(b), value, 1) for name, value in numbers}


def cut(channels: int, pixels: int, item: int) -> tuple[int, int, int] | None:
    """(blocks, pieces of a block, bytes of its shared memory) of a row, as cut_row in
    csrc/normalise.cu has them; None where Triton's kernels take it."""
    n = cut_numbers()
    size = channels * pixels
    if pixels < n["kLeastOfChannel"] or size <= n["kOfOneProgram"]:
        return None

    length = -(-pixels // -(-pixels // n["kPiece"]))
    length = -(-length // 8) * 8
    for blocks in (1, 2, 4, n["kMostBlocks"]):
        pieces = -(-channels * -(-pixels // length) // blocks)
        tables = -(-pieces * 8 // 16) * 16 + 4 * -(-channels // 4) * 16
        bytes_ = tables + pieces * length * item
        if bytes_ <= n["kGoodShared"]:
            return blocks, pieces, bytes_
    return (blocks, pieces, bytes_) if bytes_ <= n["kMostShared"] else None


def in_clusters(channels: int, pixels: int, item: int, size: int) -> dict[str, float]:
    """Seconds of each limit for `size` elements: memory, which is read once and written once;
    issue; rounds of blocks, each of which loads, meets its cluster and stores.

    What a multiprocessor stores is 64 bytes a clock at most.
    """
    n = cut_numbers()
    blocks, pieces, bytes_ = cut(channels, pixels, item)
    resident = min(3, SHARED // (bytes_ + 1024))
    at_once = blocks * sum(group * resident // blocks for group in GROUPS)
    loads = -(-pieces * 32 // n["kThreads"]) * LATENCY
    stores = pieces * min(pixels, n["kPiece"]) * item / (64 * CLOCK)
    rounds = -(-(size // (channels * pixels)) * blocks // at_once)
    instructions = IN_CLUSTERS["fp32" if item == 4 else "bf16"]
    return {
        "memory": 2 * size * item / COPY,
        "issue": size * instructions / (PROCESSORS * 128 * CLOCK * ISSUED),
        "rounds": rounds * (loads + EXCHANGE + resident * stores),
    }


def compiled(names) -> dict[str, tuple[dict, int]]:
    """{name: (figures, warps)} of the kernels for sm_90."""
    entries = {entry[0]: entry for entry in machine_code.triton_kernels(90) if entry[0] in names}
    with ThreadPoolExecutor() as pool:
        rows = pool.map(functools.partial(machine_code.compile_triton, arch=90), entries.values())
        return {name: (row, entry[-1]) for (name, entry), (_, row) in zip(entries.items(), rows)}


def measured(
    report: dict | None, row: tuple | None, dtype: str, backend: str = "triton"
) -> float | None:
    """Share of a copy's rate that a benchmark found, in a CUDA graph."""
    for found in report["rows"] if report and row else ():
        if (found["op"], found["shape"], found["dtype"]) == (
            *row,
            TORCH[dtype],
        ) and backend in found["replayed"]:
            return found["replayed"]["ceiling"] / found["replayed"][backend]
    return None


def said(predicted: float, seen: float | None) -> str:
    return f"predicted {100 * predicted:.0f}" + (f", measured {100 * seen:.0f}" if seen else "")


def table(report: dict | None = None) -> str:
    head = [
        "kernel",
        "bytes",
        "instructions",
        "FMA / IMAD / ALU / MUFU / memory",
        "registers",
        "occupancy",
        "bound by",
    ]
    head += ["µs for 2^26 elements", "% of a copy"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    figures, seconds = compiled({f"{kernel} {dtype}" for kernel in KERNELS for dtype in ITEM}), {}
    for (kernel, shape), (dtype, item) in itertools.product(KERNELS.items(), ITEM.items()):
        name = f"{kernel} {dtype}"
        if name not in figures:   # renamed, or no longer there
            continue
        row, warps = figures[name]
        found = limits(row, warps, shape, item, SIZE)
        binds = max(found, key=found.get)
        seconds[name] = found[binds]
        share = row["per_element"] / row["instructions"]
        parts = " / ".join(
            f"{row['pipes'][pipe] * share:.1f}" for pipe in ("fma", "imad", "alu", "xu", "lsu")
        )
        cells = [name, f"{(shape.read + shape.written) * item}", f"{row['per_element']:.1f}", parts]
        cells += [str(row["registers"]), f"{100 * occupancy(row['registers'], warps):.0f} %", binds]
        share = said(found["memory"] / found[binds], measured(report, shape.row, dtype))
        lines.append(
            "| " + " | ".join([*cells, f"predicted {1e6 * found[binds]:.0f}", share]) + " |"
        )

    for (name, (kernels, shape)), (dtype, item) in itertools.product(WHOLE.items(), ITEM.items()):
        parts = [seconds.get(f"{kernel} {dtype}") for kernel in kernels]
        if all(parts):
            moved = (shape.read + shape.written) * item
            share = said(SIZE * moved / COPY / sum(parts), measured(report, shape.row, dtype))
            cells = [
                f"{name} {dtype}",
                str(moved),
                "",
                "",
                "",
                "",
                "its kernels",
                f"predicted {1e6 * sum(parts):.0f}",
                share,
            ]
            lines.append("| " + " | ".join(cells) + " |")
    lines += of_clusters(report)
    return "\n".join(lines)


def of_clusters(report: dict | None) -> list[str]:
    lines = []
    for (name, (C, S, row)), (dtype, item) in itertools.product(CLUSTERS.items(), ITEM.items()):
        if cut(C, S, item) is None:   # two passes
            continue
        found = in_clusters(C, S, item, SIZE)
        binds = max(found, key=found.get)
        share = said(found["memory"] / found[binds], measured(report, row, dtype, "cuda"))
        _, _, bytes_ = cut(C, S, item)
        occupied = min(3, SHARED // (bytes_ + 1024)) * 8 / WARPS
        cells = [f"{name} {dtype}", str(2 * item), str(IN_CLUSTERS[dtype]), "", "≤ 80"]
        cells += [f"{100 * occupied:.0f} %"]
        cells += [binds, f"predicted {1e6 * found[binds]:.0f}", share]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


if __name__ == "__main__":
    print(table(json.loads(Path(sys.argv[1]).read_text()) if sys.argv[1:] else None))
