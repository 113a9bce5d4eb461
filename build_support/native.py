"""Compile csrc/ into fastscore/_C with ninja.

Every C++ source once per instruction set, every .cu once if nvcc is there.

The environment decides, never a visible GPU: FASTSCORE_BUILD = auto | none | cpu | cuda,
FORCE_CUDA, TORCH_CUDA_ARCH_LIST, MAX_JOBS.
"""

import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TORCH_TARGET = "0x020a000000000000"  # LibTorch stable ABI of 2.10
ARCHITECTURES = "8.0;9.0;10.0;12.0+PTX"
COMMON = [
    "-O3",
    "-fPIC",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-ffp-contract=fast",
    "-DPy_LIMITED_API=0x030a0000",
]
COMMON += [f"-DTORCH_TARGET_VERSION={TORCH_TARGET}"]
ISA_FLAGS = {
    "baseline": ["-DFASTSCORE_REGISTER"],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": [
        "-mavx512f",
        "-mavx512dq",
        "-mavx512vl",
        "-mavx512bw",
        "-mfma",
        "-mf16c",
        "-mprefer-vector-width=512",
    ],
}
# The last word on a flag of COMMON.
SOURCE_FLAGS = {"given_noise": ["-ffp-contract=off"]}
REGISTER_ONLY = {"door", "door_stacks", "library"}  # no kernels inside: compiled once


class BuildError(Exception):
    """One sentence for the user."""


def mode() -> str:
    value = os.environ.get("FASTSCORE_BUILD", "auto")
    if value not in ("auto", "none", "cpu", "cuda"):
        raise BuildError(f"FASTSCORE_BUILD must be auto, none, cpu or cuda; got {value!r}.")
    return "cuda" if value == "auto" and os.environ.get("FORCE_CUDA", "0") == "1" else value


def find_torch():
    try:
        import torch
        from torch.utils import cpp_extension
    except ImportError:
        raise BuildError(
            "fastscore needs PyTorch to be installed first: "
            "pip install 'torch>=2.10', then install fastscore again."
        ) from None
    return torch, cpp_extension


def find_compiler() -> str:
    compiler = (
        os.environ.get("CXX")
        or shutil.which("c++")
        or shutil.which("g++")
        or shutil.which("clang++")
    )
    if not compiler or not shutil.which(compiler.split()[0]):
        raise BuildError(
            "no C++ compiler was found; install g++ or clang++ (or set CXX) and install fastscore "
            "again."
        )
    return compiler


def find_nvcc() -> str | None:
    """CUDA_HOME or CUDA_PATH decides alone where it is set, as it does for torch."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = Path(home or "/usr/local/cuda") / "bin/nvcc"
    if nvcc.exists():
        return str(nvcc)
    return None if home else shutil.which("nvcc")


def architectures() -> str:
    return os.environ.get("TORCH_CUDA_ARCH_LIST") or ARCHITECTURES


def gencode() -> list[str]:
    flags = []
    for arch in architectures().replace(" ", ";").split(";"):
        if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", arch):
            raise BuildError(
                f"TORCH_CUDA_ARCH_LIST must look like '9.0' or '8.0;9.0+PTX'; got {arch!r}."
            )
        number = arch.removesuffix("+PTX").replace(".", "")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if arch.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def isas() -> list[str]:
    return list(ISA_FLAGS) if platform.machine() in ("x86_64", "AMD64") else ["baseline"]


def nvcc_flags(include_paths: list[str]) -> list[str]:
    includes = [f"-I{path}" for path in include_paths]
    host = ["-Xcompiler", "-fPIC,-fvisibility=hidden", "-std=c++20"]
    return [
        "-O3",
        "-DUSE_CUDA",
        f"-DTORCH_TARGET_VERSION={TORCH_TARGET}",
        "--expt-relaxed-constexpr",
        *host,
        *includes,
    ]


def quoted(path) -> str:
    """For a command in build.ninja: the shell reads it after ninja."""
    return shlex.quote(str(path)).replace("$", "$$")


def escaped(path) -> str:
    """For a path in a `build` line, which ninja quotes itself."""
    return re.sub(r"([$ :])", r"$\1", str(path))


def write_ninja(
    build: Path, output: Path, compiler: str, nvcc: str | None, torch, cpp_extension
) -> None:
    # relative: a copied or moved tree keeps its objects.
    csrc = Path(os.path.relpath(ROOT / "csrc", build))
    includes = [str(csrc), *cpp_extension.include_paths(), sysconfig.get_path("include")]
    flags = [*COMMON, "-std=c++20", *(f"-I{quoted(path)}" for path in includes)]
    if platform.machine() in ("x86_64", "AMD64"):
        flags.append("-DFASTSCORE_X86")
    link = [f"-L{quoted(Path(torch.__file__).parent / 'lib')}", "-ltorch", "-ltorch_cpu", "-lc10"]
    if nvcc:
        link += [
            f"-L{quoted(Path(nvcc).resolve().parent.parent / 'lib64')}",
            "-lcudart_static",
            "-ldl",
            "-lrt",
            "-lpthread",
        ]
    lines = [
        "rule cxx",
        f"  command = {compiler} -MMD -MF $out.d {' '.join(flags)} $isa -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {compiler} -shared $in -o $out {' '.join(link)}",
    ]
    if nvcc:
        cuda = str(Path(nvcc).resolve().parent.parent / "include")
        command = [
            quoted(nvcc),
            "-MD -MF $out.d",
            *map(quoted, nvcc_flags([*includes, cuda])),
            *gencode(),
            "-c $in -o $out",
        ]
        lines += [
            "rule nvcc",
            f"  command = {' '.join(command)}",
            "  depfile = $out.d",
            "  deps = gcc",
        ]
    objects = []
    for source in sorted((ROOT / "csrc").glob("*.cpp")):
        for isa in ["baseline"] if source.stem in REGISTER_ONLY else isas():
            objects.append(f"{source.stem}.{isa}.o")
            lines.append(f"build {objects[-1]}: cxx {escaped(csrc / source.name)}")
            options = [*ISA_FLAGS[isa], *SOURCE_FLAGS.get(source.stem, [])]
            lines.append(f"  isa = -DFASTSCORE_ISA={isa} {' '.join(options)}")
    for source in sorted((ROOT / "csrc").glob("*.cu")) if nvcc else []:
        objects.append(f"{source.stem}.cuda.o")
        lines.append(f"build {objects[-1]}: nvcc {escaped(csrc / source.name)}")
    lines += [
        f"build {escaped(output)}: link {' '.join(objects)}",
        f"default {escaped(output)}",
        "",
    ]
    (build / "build.ninja").write_text("\n".join(lines))


def find_ninja() -> list[str]:
    try:
        import ninja  # noqa: F401

        return [sys.executable, "-m", "ninja"]
    except ImportError:
        if shutil.which("ninja"):
            return ["ninja"]
        raise BuildError(
            "ninja was not found; pip install ninja and install fastscore again."
        ) from None


def run_ninja(build: Path, output: Path, compiler: str, nvcc: str | None) -> None:
    build.mkdir(parents=True, exist_ok=True)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_ninja(build, output.resolve(), compiler, nvcc, *find_torch())
    jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
    process = subprocess.run(
        [*find_ninja(), "-C", str(build), *jobs], capture_output=True, text=True
    )
    if process.returncode:
        (build / "error.log").write_text(process.stdout + process.stderr)
        if mode() == "auto":
            raise BuildError(
                f"the extension did not compile with {compiler}; "
                "FASTSCORE_BUILD=cpu shows the compiler's message."
            )
        sys.stderr.write(process.stdout[-8000:] + process.stderr[-8000:])
        raise BuildError("the extension did not compile; the compiler's message is above.")


def choose_nvcc(wanted: str) -> tuple[str | None, str | None]:
    """nvcc, or why the CUDA kernels are not built."""
    if wanted == "cpu":
        return None, "FASTSCORE_BUILD=cpu"
    # A torch without CUDA cannot run the kernels, so `auto` does not build them for it; `cuda` does
    # as it is told.
    if wanted == "auto" and find_torch()[0].version.cuda is None:
        return None, "the installed torch has no CUDA"
    nvcc = find_nvcc()
    if wanted == "cuda" and not nvcc:
        raise BuildError(
            "FASTSCORE_BUILD=cuda was asked for but no nvcc was found; "
            "install the CUDA toolkit or set CUDA_HOME."
        )
    if nvcc:
        gencode()   # a wrong list is an error, never a reason to fall back
    return nvcc, None if nvcc else "no nvcc was found"


def compile_extension(build: Path, output: Path) -> dict:
    """Build and return what was built; raise BuildError where it cannot be."""
    wanted, compiler = mode(), find_compiler()
    nvcc, no_cuda = choose_nvcc(wanted)
    try:
        run_ninja(build, output, compiler, nvcc)
    except BuildError:
        if wanted != "auto" or not nvcc:
            raise
        # The C++ kernels may still.
        nvcc, no_cuda = None, f"the extension did not compile with {nvcc}"
        run_ninja(build, output, compiler, nvcc)
    return {
        "mode": wanted,
        "cpp": None,
        "cuda": no_cuda,
        "torch": find_torch()[0].__version__,
        "compiler": compiler,
        "instruction_sets": isas(),
        "architectures": architectures() if nvcc else None,
    }


def record(path: Path, outcome: dict) -> None:
    """`cpp` and `cuda` hold None where they were built, else the reason why not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(outcome, indent=2) + "\n")
