"""Compile the GPU kernels without a GPU and count what their machine code does. `machine_code.py triton | cuda` prints JSON.

A row per kernel and target: instructions, how many of them per element where the kernel is straight-line, accesses to local
memory (spills), 128-bit accesses to global memory.
"""

import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)
sys.path.insert(0, str(Path(__file__).parent))

import native
import triton

THREADS = 128
BIN = Path(triton.__file__).parent / "backends/nvidia/bin"


def count(path, per_thread=None):
    """{kernel: figures} of one cubin or object file."""
    text = subprocess.run([BIN / "cuobjdump", "-sass", path], capture_output=True, text=True, check=True).stdout
    rows = {}
    for part in text.split("Function : ")[1:]:
        lines = [line for line in part.splitlines() if re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+\S", line) and "NOP" not in line]
        rows[part.split()[0]] = {
            "instructions": len(lines),
            "per_element": len(lines) / per_thread if per_thread else None,
            "local": sum(bool(re.search(r"\b(LDL|STL)", line)) for line in lines),
            "wide": sum(bool(re.search(r"(LDG|STG)\.E\.(128|ENL2\.256)", line)) for line in lines),
        }
    return rows


def triton_kernels():
    """(name, kernel, constants, types, aligned): the fast path of each launcher, an offset at a block's start."""
    from fastscore.kernels import BLOCK
    from fastscore.kernels.denoising_loss import noise_reduce_kernel
    from fastscore.kernels.langevin_step import noisy_update_kernel
    from fastscore.kernels.random import fill_kernel

    common = {"HAS_KEY": False, "BLOCK": BLOCK, "key_ptr": None}
    for dtype in ("fp32", "bf16", "fp16", "fp64"):
        wide = dtype == "fp64"
        pointers = {name: f"*{dtype}" for name in ("out_ptr", "x_ptr", "d_ptr", "s_ptr")}
        pointers |= {name: "*fp64" if wide else "*fp32" for name in ("a_ptr", "b_ptr", "sigma_ptr", "partial_ptr")}
        scalars = {"a": "fp32", "b": "fp32", "sigma": "fp32", "stream": "i32"}
        constants = common | {"HAS_X": True, "HAS_D": True, "A_KIND": int(wide), "B_KIND": int(wide), "WIDE": wide, "shift": 0}
        constants |= {} if wide else {"a_ptr": None, "b_ptr": None}
        yield f"noisy_update {dtype}", noisy_update_kernel, constants, pointers | scalars, ("out_ptr", "x_ptr", "d_ptr", "n")
        for kind, label in enumerate(("words", "uniform", "normal", "rademacher")):
            types = pointers | scalars | ({"out_ptr": "*i64"} if kind == 0 else {})
            if kind or dtype == "fp32":
                yield f"{label} {dtype}", fill_kernel, common | {"KIND": kind, "shift": 0}, types, ("out_ptr", "n")
        constants = common | {"DOT": False, "SIGMA_KIND": int(wide), "WIDE": wide, "ROWS": 1} | ({} if wide else {"sigma_ptr": None})
        yield f"noise_reduce {dtype}", noise_reduce_kernel, constants, pointers | scalars, ("partial_ptr", "s_ptr", "per_sample", "offset")


def compile_triton(entry, arch):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from fastscore.kernels import BLOCK

    name, kernel, constants, types, aligned = entry
    names = kernel.arg_names
    signature = {n: "constexpr" if n in constants else types.get(n, "i64") for n in names}
    attrs = {(names.index(n),): [["tt.divisibility", 16]] for n in aligned}
    source = ASTSource(kernel, signature, constexprs={k: v for k, v in constants.items() if k in names}, attrs=attrs)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": THREADS // 32})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        (row,) = count(file.name, 4 * BLOCK / THREADS).values()
    return f"{name} sm_{arch}", row


def compile_cuda(source, folder):
    """One .cu for every target; kernels by their demangled-enough names."""
    torch, cpp_extension = native.find_torch()
    nvcc, target = native.find_nvcc(), folder / f"{source.stem}.o"
    includes = [str(native.ROOT / "csrc"), *cpp_extension.include_paths(), str(Path(nvcc).resolve().parent.parent / "include")]
    subprocess.run([nvcc, *native.nvcc_flags(includes), *native.gencode(), "-c", source, "-o", target], check=True)
    rows = count(target)
    for name, row in rows.items():
        if "update_packs" in name:   # sixteen elements per thread, without a loop
            row["per_element"] = row["instructions"] / 16
    return rows


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as pool:
        if sys.argv[1] == "triton":
            rows = dict(compile_triton(entry, arch) for entry, arch in itertools.product(triton_kernels(), (80, 90, 100)))
        else:
            os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "9.0")
            results = pool.map(lambda source: compile_cuda(source, Path(folder)), sorted((native.ROOT / "csrc").glob("*.cu")))
            rows = {name: row for result in results for name, row in result.items()}
    json.dump(rows, sys.stdout)
