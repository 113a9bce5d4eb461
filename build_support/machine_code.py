"""Compile noisy_update's Triton kernel for every dtype and target without a GPU, and count what its machine code does. Prints JSON."""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)

import triton
from fastscore.kernels import BLOCK
from fastscore.kernels.langevin_step import noisy_update_kernel
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

THREADS = 128


def compile_kernel(dtype, arch):
    """The fast path: both inputs, one coefficient each, an aligned offset."""
    wide = dtype == "fp64"
    constants = {"HAS_X": True, "HAS_D": True, "A_KIND": int(wide), "B_KIND": int(wide), "HAS_KEY": False, "WIDE": wide, "ROUND": False}
    constants |= {"BLOCK": BLOCK, "key_ptr": None, "shift": 0} | ({} if wide else {"a_ptr": None, "b_ptr": None})
    types = {name: f"*{dtype}" for name in ("out_ptr", "x_ptr", "d_ptr", "a_ptr", "b_ptr")} | {"a": "fp32", "b": "fp32", "stream": "i32"}
    names = noisy_update_kernel.arg_names
    signature = {name: "constexpr" if name in constants else types.get(name, "i64") for name in names}
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in ("out_ptr", "x_ptr", "d_ptr", "n")}
    source = ASTSource(noisy_update_kernel, signature, constexprs=constants, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": THREADS // 32}).asm["cubin"]


def count(cubin):
    """Instructions per element (the whole kernel over the elements of a thread), local accesses, 128-bit global accesses."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-sass", file.name], capture_output=True, text=True, check=True).stdout
    lines = [line for line in text.splitlines() if re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+\S", line) and "NOP" not in line]
    return {
        "per_element": len(lines) / (4 * BLOCK / THREADS),
        "local": sum(bool(re.search(r"\b(LDL|STL)", line)) for line in lines),
        "wide": sum(bool(re.search(r"(LDG|STG)\.E\.128", line)) for line in lines),
    }


if __name__ == "__main__":
    rows = {f"{d} sm_{a}": count(compile_kernel(d, a)) for a in (80, 90, 100) for d in ("fp32", "bf16", "fp16", "fp64")}
    json.dump(rows, sys.stdout)
