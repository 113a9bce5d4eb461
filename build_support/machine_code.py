"""Compile the GPU kernels without a GPU and count what their machine code does.

`machine_code.py triton | cuda | schedule` prints JSON.

A row per kernel and target: instructions, how many of them per element where the kernel is
straight-line, accesses to local memory (spills), 128-bit accesses to global memory, and the bytes
that these read and write per thread.
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
import torch
import triton

DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp64": torch.float64,
}
BIN = Path(triton.__file__).parent / "backends/nvidia/bin"


def disassembled(path):
    return subprocess.run(
        [BIN / "cuobjdump", "-sass", path], capture_output=True, text=True, check=True
    ).stdout


def count(path, per_thread=None, steps=1):
    """{kernel: figures} of one cubin or object file.

    A loop, if there is one, runs `steps` times over `per_thread` elements.
    """
    text = disassembled(path)
    usage = subprocess.run(
        [BIN / "cuobjdump", "-res-usage", path], capture_output=True, text=True, check=True
    ).stdout
    rows = {}
    for part in text.split("Function : ")[1:]:
        lines = [
            line
            for line in part.splitlines()
            if re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+\S", line) and "NOP" not in line
        ]
        executed = len(lines) + (steps - 1) * loop(lines)
        registers = re.search(rf"{re.escape(part.split()[0])}:\s+REG:(\d+)", usage)
        rows[part.split()[0]] = {
            "instructions": len(lines),
            "per_element": executed / (per_thread * steps) if per_thread else None,
            "loop": loop(lines),
            "registers": int(registers[1]),
            "local": sum(bool(re.search(r"\b(LDL|STL)", line)) for line in lines),
            "wide": sum(
                bool(re.search(r"(LDG|STG)\.E\.(EF\.)?(128|ENL2\.256)", line)) for line in lines
            ),
            "streamed": sum(bool(re.search(r"(LDG|STG)\.E\.EF\.", line)) for line in lines),
            "read": wide_bytes("LDG", lines),
            "written": wide_bytes("STG", lines),
            "pipes": pipes(lines),
        }
    return rows


# By their names without what follows a dot. On sm_90 the ALU and the half of the FMA pipe that
# multiplies integers start an instruction of a warp every other clock, and the XU's results are
# announced: so the compiler's own schedule tells that I2FP and F2FP (32-bit integers to floats,
# floats to 16 bits) are the ALU's, I2F and F2F (the rest) the XU's, VIADD that half's
# (tests/test_machine_code.py).
PIPES = {
    "fma": (
        "FFMA", "FMUL", "FADD", "FFMA2", "FMUL2", "FADD2", "FHFMA", "FHADD", "HFMA2", "HMUL2",
        "HADD2",
    ),
    "imad": ("IMAD", "IDP", "VIADD"),
    "alu": (
        "LOP3", "IADD3", "IADD", "VIADDMNMX", "SHF", "ISETP", "FSETP", "FSET", "HSETP2", "SEL",
        "FSEL", "FMNMX", "FMNMX3", "HMNMX2", "IMNMX", "VIMNMX", "VIMNMX3", "IABS", "SGXT", "BMSK",
        "PRMT", "LEA", "PLOP3", "MOV", "F2FP", "I2FP", "F2IP", "I2IP", "P2R", "R2P", "R2UR", "VOTE",
    ),
    "xu": ("MUFU", "I2F", "F2I", "F2F", "FRND", "POPC", "FLO", "BREV", "FCHK"),
    "lsu": (
        "LDG", "STG", "LDS", "STS", "LDL", "STL", "LD", "ST", "LDSM", "STSM", "SHFL", "LDC", "ATOM",
        "ATOMG", "ATOMS", "RED", "REDG", "REDUX",
    ),
    "fp64": ("DFMA", "DMUL", "DADD", "DSETP"),
    # What counts for the scheduler alone, beside the uniform datapath, whose names begin with U.
    "": (
        "BRA", "BRX", "CALL", "RET", "EXIT", "BSSY", "BSYNC", "BAR", "WARPSYNC", "NOP", "S2R",
        "S2UR", "CS2R", "LDCU", "LEPC", "MEMBAR", "ERRBAR", "CCTL", "DEPBAR", "NANOSLEEP", "YIELD",
        "CGAERRBAR", "ENDCOLLECTIVE", "VOTEU", "ACQBULK", "PREEXIT", "BREAK", "BPT",
    ),
}  # fmt: skip
PIPE_OF = {name: pipe for pipe, names in PIPES.items() for name in names}


def opcode(line):
    return re.search(r"\*/\s+(?:@!?U?P\w+\s+)?([A-Z]\w*)", line)[1]


def pipes(lines):
    """Instructions of each pipe, as they stand in the code.

    A move by IMAD goes through the FMA pipe, too.
    """
    names = [opcode(line) for line in lines]
    unknown = {name for name in names if name not in PIPE_OF and not name.startswith("U")}
    assert not unknown, f"of no pipe: {unknown}"
    found = [PIPE_OF.get(name) for name in names]
    return {pipe: found.count(pipe) for pipe in PIPES if pipe}


def schedule(text):
    """[(opcode, clocks to the next instruction, whether it sets a scoreboard)] of each function of
    `cuobjdump -sass`.

    An instruction is two words, of which the second tells the warp how long to wait after it (bits
    41 to 44), and by which of six scoreboards its result will be announced (46 to 48; 7: by none,
    for it takes a known time).
    """
    functions = []
    for part in text.split("Function : ")[1:]:
        found = re.findall(
            r"(/\*[0-9a-f]{4,}\*/\s+[^\n]*?)/\* 0x[0-9a-f]{16} \*/\s+/\* 0x([0-9a-f]{16}) \*/", part
        )
        words = [(opcode(line), int(word, 16)) for line, word in found]
        functions.append([(name, word >> 41 & 15, word >> 46 & 7 != 7) for name, word in words])
    return functions


def loop(lines):
    """Instructions of the longest loop: between a branch and what it goes back to."""
    at = [int(re.match(r"\s+/\*([0-9a-f]+)\*/", line)[1], 16) for line in lines]
    found = (
        (int(match[1], 16), here)
        for here, line in zip(at, lines)
        if (match := re.search(r"\bBRA.*?\s0x([0-9a-f]+)", line))
    )
    return max(
        (sum(start <= a <= here for a in at) for start, here in found if start < here), default=0
    )


def wide_bytes(instruction, lines):
    found = (re.search(rf"{instruction}\.E\.(?:EF\.)?(128|ENL2\.256)", line) for line in lines)
    return sum(16 if match[1] == "128" else 32 for match in found if match)


def noise_kernels():
    """(name, kernel, constants, types, aligned).

    The fast path of each launcher, an offset at a block's start.
    """
    from fastscore.kernels import tiles
    from fastscore.kernels.denoising_loss import noise_reduce_kernel
    from fastscore.kernels.noisy_update import noisy_update_kernel
    from fastscore.kernels.rademacher_project import project_kernel, spread_kernel
    from fastscore.kernels.random import fill_kernel

    BLOCK, REDUCED = (
        tiles.TABLE["default"][kernel]["BLOCK"] for kernel in ("fill", "noise_reduce")
    )
    common = {"HAS_KEY": False, "BLOCK": BLOCK, "key_ptr": None}
    for dtype in DTYPES:
        wide = dtype == "fp64"
        pointers = {name: f"*{dtype}" for name in ("out_ptr", "x_ptr", "d_ptr", "s_ptr")}
        pointers |= {
            name: "*fp64" if wide else "*fp32"
            for name in ("a_ptr", "b_ptr", "sigma_ptr", "partial_ptr")
        }
        scalars = {"a": "fp32", "b": "fp32", "sigma": "fp32", "stream": "i32"}
        constants = common | {
            "HAS_X": True,
            "HAS_D": True,
            "A_KIND": int(wide),
            "B_KIND": int(wide),
            "WIDE": wide,
            "shift": 0,
        }
        constants |= {
            "EACH": False,
            "CROSSES": False,
            "BLOCK": BLOCK * (2 if dtype in ("bf16", "fp16") else 1),
        }
        constants |= {} if wide else {"a_ptr": None, "b_ptr": None}
        yield (
            f"noisy_update {dtype}",
            noisy_update_kernel,
            constants,
            pointers | scalars,
            ("out_ptr", "x_ptr", "d_ptr", "n"),
        )
        if not wide:
            each = constants | {"A_KIND": 2, "B_KIND": 2, "EACH": True}
            each = {name: value for name, value in each.items() if name not in ("a_ptr", "b_ptr")}
            aligned = "out_ptr", "x_ptr", "d_ptr", "a_ptr", "b_ptr", "n"
            yield (
                f"noisy_update each {dtype}",
                noisy_update_kernel,
                each,
                pointers | scalars | {"n": "i32"},
                aligned,
            )
        for kind, label in enumerate(("words", "uniform", "normal")):
            types = pointers | scalars | ({"out_ptr": "*i64"} if kind == 0 else {})
            if kind or dtype == "fp32":
                constants = common | {"KIND": kind, "shift": 0, "CROSSES": False}
                yield f"{label} {dtype}", fill_kernel, constants, types, ("out_ptr", "n")
        constants = common | {
            "DOT": False,
            "SIGMA_KIND": int(wide),
            "WIDE": wide,
            "ROWS": 1,
            "BLOCK": REDUCED,
        }
        constants |= {"CROSSES": False, "ALIGNED": True} | ({} if wide else {"sigma_ptr": None})
        types = pointers | scalars | dict.fromkeys(("samples", "per_sample"), "i32")
        several = tiles.TABLE["default"]["noise_reduce"]["STEPS"]
        reduced = ("long", True, several), ("full", True, 1), ("masked", False, 1)
        for label, full, steps in (*reduced, ("masked-long", False, several)):
            more = {"FULL": full, "STEPS": steps}
            yield (
                f"noise_reduce {label} {dtype}",
                noise_reduce_kernel,
                constants | more,
                types,
                ("partial_ptr", "s_ptr", "per_sample"),
            )
        constants = {
            "HAS_KEY": False,
            "key_ptr": None,
            "WIDE": wide,
            "ALIGNED": True,
            "ROWS": 1,
            "BLOCKS": 16 if wide else 32,
        }
        several = 4 if dtype in ("bf16", "fp16") else 2
        forms = ("long", True, several), ("full", True, 1), ("masked", False, 1)
        pointers |= {name: f"*{dtype}" for name in ("js_ptr", "gjs_ptr", "gs_ptr")}
        pointers |= {
            f"{name}_ptr": "*fp64" if wide else "*fp32"
            for name in ("vjv", "vs", "ss", "gvjv", "gvs", "gss")
        }
        aligned = ("js_ptr", "s_ptr", "gjs_ptr", "gs_ptr", "samples")
        scalars |= dict.fromkeys(("samples", "projections"), "i32")
        flags = {"HAS_J": True, "HAS_S": True}, {"HAS_GJS": True, "HAS_GVS": True, "HAS_GSS": True}
        for label, full, steps in forms:
            form = {"FULL": full, "STEPS": steps}
            yield (
                f"project {label} {dtype}",
                project_kernel,
                constants | flags[0] | form,
                pointers | scalars,
                aligned,
            )
            form |= {"STEPS": 1} if dtype in ("bf16", "fp16") else {}
            yield (
                f"spread {label} {dtype}",
                spread_kernel,
                constants | flags[1] | form,
                pointers | scalars,
                aligned,
            )


def pixel_kernels(arch):
    """The normalisations' passes over 128 x 128 x 64 x 64, cut as the launchers do.

    The plainest variant for every dtype and target.
    """
    from fastscore.kernels import activation, normalise
    from fastscore.kernels.launch_normalise import tiles_of

    elu, none = activation.ELU.value, activation.IDENTITY.value
    plain = [("elu", elu, 0, False)]
    more = [
        ("large", elu, 0, False),
        ("none", none, 0, False),
        ("tangent", elu, 1, False),
        ("channels-last", elu, 0, True),
    ]
    kernels = (
        normalise.moments_kernel,
        normalise.apply_kernel,
        normalise.cotangent_sums_kernel,
        normalise.gradient_kernel,
    )
    variants = [
        (dtype, *v)
        for dtype in DTYPES
        for v in plain + (more if arch == 90 and dtype in ("fp32", "bf16") else [])
    ]
    for dtype, label, kind, M, last in variants:
        x = torch.empty((128, 128, 64, 64), dtype=DTYPES[dtype], device="meta")
        x = x.to(memory_format=torch.channels_last) if last else x
        pointers = {
            name: f"*{dtype}"
            for name in (
                "x_ptr", "t_ptr", "y_ptr", "ty_ptr", "gy_ptr", "gty_ptr", "gx_ptr", "gt_ptr",
            )
        }
        pointers |= {
            name: "*fp64" if dtype == "fp64" else "*fp32"
            for name in ("out_ptr", "table_ptr", "gtable_ptr")
        }
        for kernel in kernels:
            tiles = tiles_of(x, M)
            constants = {"KIND": kind, "HAS_Y": True, "HAS_GY": True, "M": M, "LAST": last}
            constants |= {"UNITS": tiles.UNITS, "PIXELS": tiles.PIXELS}
            constants["EVICT"] = "evict_first" if label == "large" else ""
            constants |= (
                {} if M else {"t_ptr": None, "ty_ptr": None, "gty_ptr": None, "gt_ptr": None}
            )
            constants |= {"splits": 1} if tiles.splits == 1 else {}
            types = pointers | dict.fromkeys(("units", "C", "S", "splits"), "i32")
            name = f"{kernel.fn.__name__.removesuffix('_kernel')} {label} {dtype}"
            yield (
                name,
                kernel,
                constants,
                types,
                (*pointers, "units", "C", "S", "splits"),
                tiles.UNITS * tiles.PIXELS,
                tiles.warps,
            )


def algebra_kernels(arch):
    """The normalisations' algebra for 128 channels in float32 and float64, with tangents and
    everything optional."""
    from fastscore.kernels import normalise, normalise_algebra

    forms = {"channels": (False, True, 2, 128)} | (
        {"groups": (True, False, 64, 4)} if arch == 90 else {}
    )
    for dtype in ("fp32", "fp64"):
        names = "table", "stats", "coef", "tcoef", "gtable", "gcoef", "gtcoef", "sums", "part"
        types = {f"{name}_ptr": f"*{dtype}" for name in names} | {"labels_ptr": "*i64"}
        types |= dict.fromkeys(
            ("B", "C", "S", "groups", "domain", "coef_rows", "units", "splits"), "i32"
        )
        constants = {"PIXELS": 4096, "UNITS": 16, "SPLITS": 64, "STEPS": 2}
        yield f"merge {dtype}", normalise.merge_kernel, constants, types, ("units", "S"), 1024, 4
        kernels = normalise_algebra.coefficients_kernel, normalise_algebra.cotangents_kernel
        for (label, (grouped, alpha, rows, D)), kernel in itertools.product(forms.items(), kernels):
            constants = {
                "EPS": 1e-5,
                "GROUPED": grouped,
                "ALPHA": alpha,
                "BETA": True,
                "HAS_LABELS": True,
                "ONE": False,
                "M": 2,
            }
            constants |= {"HAS_TCOEF": True, "ROWS": rows, "D": D}
            name = f"{kernel.fn.__name__.removesuffix('_kernel')} {label} {dtype}"
            yield name, kernel, constants, types, ("C",), rows * D, rows * D // 32


def whole_kernels():
    """The normalisation of a sample of 128 channels of 8 x 8 pixels (float64: 64) in one
    program, ELU, with everything optional."""
    from fastscore.kernels import activation, normalise_whole

    for dtype in DTYPES:
        compute = "fp64" if dtype == "fp64" else "fp32"
        types = {
            "x_ptr": f"*{dtype}",
            "y_ptr": f"*{dtype}",
            "stats_ptr": f"*{compute}",
            "coef_ptr": f"*{compute}",
            "labels_ptr": "*i64",
        }
        types |= dict.fromkeys(("B", "C", "S", "groups", "domain", "coef_rows"), "i32")
        constants = {
            "EPS": 1e-5,
            "GROUPED": False,
            "ALPHA": True,
            "BETA": True,
            "HAS_LABELS": True,
            "ONE": False,
        }
        D = 64 if dtype == "fp64" else 128
        constants |= {"KIND": activation.ELU.value, "D": D, "PIXELS": 64}
        yield (
            f"whole {dtype}",
            normalise_whole.whole_kernel,
            constants,
            types,
            ("x_ptr", "y_ptr", "S", "C"),
            D * 64,
            D // 8,
        )


def stack_kernels(arch):
    """Activations of a stack with one tangent, or of a curve; SiLU for every dtype and target."""
    from fastscore.kernels import activate, activation, tiles

    block = tiles.TABLE["default"]["activate_dual"]["BLOCK"]
    names = "elu", "relu", "gelu", "softplus", "tanh", "sigmoid"
    variants = [(dtype, "silu") for dtype in DTYPES] + (
        [("fp32", name) for name in names] if arch == 90 else []
    )
    for dtype, name in variants:
        pointers = {pointer: f"*{dtype}" for pointer in ("out_ptr", "s_ptr", "g_ptr")}
        constants = {
            "M": 1,
            "KIND": getattr(activation, name.upper()).value,
            "WIDE": dtype == "fp64",
            "BLOCK": block,
        }
        for kernel in (
            activate.activate_dual_kernel,
            activate.activate_dual_gradient_kernel,
        ):
            label = f"{kernel.fn.__name__.removesuffix('_kernel')} {name} {dtype}"
            yield label, kernel, constants, pointers | {"n": "i32"}, (*pointers, "n"), block, 4
        cut = tiles.TABLE["default"]["activate_jet"]
        constants |= {"STRAIGHT": False, "BLOCK": cut["BLOCK"]}
        for kernel in (activate.activate_jet_kernel, activate.activate_jet_gradient_kernel):
            label = f"{kernel.fn.__name__.removesuffix('_kernel')} {name} {dtype}"
            yield (
                label,
                kernel,
                constants,
                pointers | {"n": "i32"},
                (*pointers, "n"),
                cut["BLOCK"],
                cut["num_warps"],
            )


def sign_kernels():
    """Signs written to a large tensor."""
    from fastscore.kernels import tiles
    from fastscore.kernels.random import sign_kernel

    blocks, warps = tiles.TABLE["default"]["signs"].values()
    for dtype in DTYPES:
        constants = {"HAS_KEY": False, "key_ptr": None, "BLOCKS": blocks, "shift": 0}
        yield (
            f"rademacher {dtype}",
            sign_kernel,
            constants,
            {"out_ptr": f"*{dtype}"},
            ("out_ptr", "n"),
            128 * blocks,
            warps,
        )


def sum_kernels():
    """The last sums of a long sample's partial ones."""
    from fastscore.kernels import sum_splits

    for dtype in ("fp32", "fp64"):
        types = {f"{name}{i}_ptr": f"*{dtype}" for name in ("out", "partial") for i in range(3)}
        constants = {"ROWS": 1, "BLOCK": sum_splits.SIZE}
        yield (
            f"sum_splits {dtype}",
            sum_splits.sum_splits_kernel,
            constants,
            types,
            tuple(types),
            sum_splits.SIZE,
            4,
        )


def cut_as_launched(entry, arch):
    """A kernel of noise with its elements and warps.

    noisy_update by the table's entry for the target.
    """
    from fastscore.kernels import tiles

    name, kernel, constants, *rest = entry
    warps = 4
    if name.startswith("noisy_update"):
        default, here = (
            tiles.TABLE.get(key, {}).get("noisy_update", {}) for key in ("default", f"sm_{arch}")
        )
        constants = constants | {
            "BLOCK": constants["BLOCK"] * (default | here)["BLOCK"] // default["BLOCK"]
        }
        warps = (default | here)["num_warps"]
    elements = 128 * constants["BLOCKS"] if "BLOCKS" in constants else 4 * constants["BLOCK"]
    return name, kernel, constants, *rest, elements, warps


def triton_kernels(arch):
    noise = (cut_as_launched(entry, arch) for entry in noise_kernels())
    fixed = whole_kernels(), sign_kernels(), sum_kernels()
    return itertools.chain(
        noise, pixel_kernels(arch), algebra_kernels(arch), stack_kernels(arch), *fixed
    )


def compile_triton(entry, arch, scheduled=False):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    name, kernel, constants, types, aligned, elements, warps = entry
    names = kernel.arg_names
    signature = {n: "constexpr" if n in constants else types.get(n, "i64") for n in names}
    # a launch would not tell the compiler.
    unknown = [p.name for p in kernel.params if p.do_not_specialize]
    assert not set(unknown) & set(aligned), (name, unknown)
    attrs = {
        (names.index(n),): [["tt.divisibility", 16]]
        for n in aligned
        if n in names and n not in constants
    }
    source = ASTSource(
        kernel,
        signature,
        constexprs={k: v for k, v in constants.items() if k in names},
        attrs=attrs,
    )
    compiled = triton.compile(
        source, target=GPUTarget("cuda", arch, 32), options={"num_warps": warps}
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        (row,) = count(file.name, elements / (32 * warps), constants.get("STEPS", 1)).values()
        if scheduled:
            row["schedule"] = schedule(disassembled(file.name))
    return f"{name} sm_{arch}", row


def compile_cuda(source, folder):
    """One .cu for every target; kernels by their demangled-enough names."""
    torch, cpp_extension = native.find_torch()
    nvcc, target = native.find_nvcc(), folder / f"{source.stem}.o"
    includes = [
        str(native.ROOT / "csrc"),
        *cpp_extension.include_paths(),
        str(Path(nvcc).resolve().parent.parent / "include"),
    ]
    subprocess.run(
        [nvcc, *native.nvcc_flags(includes), *native.gencode(), "-c", source, "-o", target],
        check=True,
    )
    rows = count(target)
    for name, row in rows.items():
        packs = 32 if "bfloat16" in name or "half" in name else 16   # elements of four packs
        if "update_packs" in name or "fill_packs" in name:   # that many per thread, without a loop
            row["per_element"] = row["instructions"] / packs
        elif "fill_signs" in name:
            row["per_element"] = row["instructions"] / 128
        # A warp's piece: the loads of all that it holds, its stores in two forms.
        elif "normalise_rows" in name:
            row["elements"] = 32
        # That many in each round of its loop.
        elif "reduce_samples" in name and "ReadingE1E" in name and "reduce_samplesId" not in name:
            row["per_element"] = row["loop"] / packs
    return rows


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as pool:
        if sys.argv[1] == "triton":
            rows = dict(
                compile_triton(entry, arch)
                for arch in (80, 90, 100)
                for entry in triton_kernels(arch)
            )
        elif sys.argv[1] == "schedule":   # of kernels with every kind of conversion
            scheduled = dict(
                compile_triton(entry, 90, True)
                for entry in triton_kernels(90)
                if re.match(r"(noisy_update|noise_reduce long|apply elu) (fp|bf)", entry[0])
            )
            rows = {"pipe_of": PIPE_OF, "rows": scheduled}
        else:
            os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "9.0")
            results = pool.map(
                lambda source: compile_cuda(source, Path(folder)),
                sorted((native.ROOT / "csrc").glob("*.cu")),
            )
            rows = {name: row for result in results for name, row in result.items()}
    json.dump(rows, sys.stdout)
