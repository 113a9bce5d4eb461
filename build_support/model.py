"""What limits each Triton kernel on an H100, from its compiled code.

`model.py [RESULTS.json]` prints the table of docs/gpu.md.

A kernel takes at least as long as each of these, and is predicted to take as long as the longest:
- memory: the bytes that must move, at the rate of a copy;
- issue: its instructions at four warps a clock of each multiprocessor, of which 80 % are used;
- a pipe: the instructions that one of its pipes takes, at that pipe's rate;
- latency: with the warps that the registers leave room for, the bytes that all their loads ask for
  at once, a trip each.
No GPU is needed. RESULTS: a report of the benchmarks (benchmarks/results), whose rows in a graph
are put beside the predictions.
"""

import functools
import itertools
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import machine_code

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


def compiled(names) -> dict[str, tuple[dict, int]]:
    """{name: (figures, warps)} of the kernels for sm_90."""
    entries = {entry[0]: entry for entry in machine_code.triton_kernels(90) if entry[0] in names}
    with ThreadPoolExecutor() as pool:
        rows = pool.map(functools.partial(machine_code.compile_triton, arch=90), entries.values())
        return {name: (row, entry[-1]) for (name, entry), (_, row) in zip(entries.items(), rows)}


def measured(report: dict | None, row: tuple | None, dtype: str) -> float | None:
    """Share of a copy's rate that a benchmark found, in a CUDA graph."""
    for found in report["rows"] if report and row else ():
        if (found["op"], found["shape"], found["dtype"]) == (
            *row,
            TORCH[dtype],
        ) and "triton" in found["replayed"]:
            return found["replayed"]["ceiling"] / found["replayed"]["triton"]
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
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(json.loads(Path(sys.argv[1]).read_text()) if sys.argv[1:] else None))
