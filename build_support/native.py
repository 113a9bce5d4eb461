"""Compile csrc/ into fastscore/_C with ninja: every C++ source once per instruction set, every .cu once if nvcc is there.

The environment decides, never a visible GPU: FASTSCORE_BUILD = auto | none | cpu | cuda, FORCE_CUDA, TORCH_CUDA_ARCH_LIST, MAX_JOBS.
"""

import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TORCH_TARGET = "0x020a000000000000"  # LibTorch stable ABI of 2.10
ARCHITECTURES = "8.0;9.0;10.0;12.0+PTX"
COMMON = ["-O3", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-ffp-contract=fast", "-DPy_LIMITED_API=0x030a0000"]
COMMON += [f"-DTORCH_TARGET_VERSION={TORCH_TARGET}"]
ISA_FLAGS = {
    "baseline": ["-DFASTSCORE_REGISTER"],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx512f", "-mavx512dq", "-mavx512vl", "-mavx512bw", "-mfma", "-mf16c", "-mprefer-vector-width=512"],
}
REGISTER_ONLY = {"library"}  # no kernels inside: compiled once


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
            "fastscore needs PyTorch to be installed first: pip install 'torch>=2.10', then install fastscore again."
        ) from None
    return torch, cpp_extension


def find_compiler() -> str:
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if not compiler or not shutil.which(compiler.split()[0]):
        raise BuildError("no C++ compiler was found; install g++ or clang++ (or set CXX) and install fastscore again.")
    return compiler


def find_nvcc() -> str | None:
    for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"):
        if home and (Path(home) / "bin/nvcc").exists():
            return str(Path(home) / "bin/nvcc")
    return shutil.which("nvcc")


def gencode() -> list[str]:
    flags = []
    for arch in os.environ.get("TORCH_CUDA_ARCH_LIST", ARCHITECTURES).replace(" ", ";").split(";"):
        number = arch.removesuffix("+PTX").replace(".", "")
        if not number.rstrip("af").isdigit():
            raise BuildError(f"TORCH_CUDA_ARCH_LIST must look like '9.0' or '8.0;9.0+PTX'; got {arch!r}.")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if arch.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def isas() -> list[str]:
    return list(ISA_FLAGS) if platform.machine() in ("x86_64", "AMD64") else ["baseline"]


def nvcc_flags(include_paths: list[str]) -> list[str]:
    includes = [f"-I{path}" for path in include_paths]
    host = ["-Xcompiler", "-fPIC,-fvisibility=hidden", "-std=c++20"]
    return ["-O3", "-DUSE_CUDA", f"-DTORCH_TARGET_VERSION={TORCH_TARGET}", "--expt-relaxed-constexpr", *host, *includes]


def write_ninja(build: Path, output: Path, compiler: str, nvcc: str | None, torch, cpp_extension) -> None:
    includes = [str(ROOT / "csrc"), *cpp_extension.include_paths(), sysconfig.get_path("include")]
    if nvcc:
        includes.append(str(Path(nvcc).resolve().parent.parent / "include"))
    flags = [*COMMON, "-std=c++20", *(f"-I{path}" for path in includes)]
    if platform.machine() in ("x86_64", "AMD64"):
        flags.append("-DFASTSCORE_X86")
    lib = Path(torch.__file__).parent / "lib"
    link = [f"-L{lib}", "-ltorch", "-ltorch_cpu", "-lc10"]
    if nvcc:
        cuda = Path(nvcc).resolve().parent.parent
        link += [f"-L{cuda / 'lib64'}", "-lcudart_static", "-ldl", "-lrt", "-lpthread"]
    lines = [
        "rule cxx",
        f"  command = {compiler} -MMD -MF $out.d {' '.join(flags)} $isa -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {compiler} -shared $in -o $out {' '.join(link)}",
    ]
    if nvcc:
        command = f"{nvcc} -MD -MF $out.d {' '.join(nvcc_flags(includes))} {' '.join(gencode())} -c $in -o $out"
        lines += ["rule nvcc", f"  command = {command}", "  depfile = $out.d", "  deps = gcc"]
    objects = []
    for source in sorted((ROOT / "csrc").glob("*.cpp")):
        for isa in ["baseline"] if source.stem in REGISTER_ONLY else isas():
            objects.append(f"{source.stem}.{isa}.o")
            lines += [f"build {objects[-1]}: cxx {source}", f"  isa = -DFASTSCORE_ISA={isa} {' '.join(ISA_FLAGS[isa])}"]
    for source in sorted((ROOT / "csrc").glob("*.cu")) if nvcc else []:
        objects.append(f"{source.stem}.cuda.o")
        lines.append(f"build {objects[-1]}: nvcc {source}")
    lines += [f"build {output}: link {' '.join(objects)}", f"default {output}", ""]
    (build / "build.ninja").write_text("\n".join(lines))


def find_ninja() -> list[str]:
    try:
        import ninja  # noqa: F401

        return [sys.executable, "-m", "ninja"]
    except ImportError:
        if shutil.which("ninja"):
            return ["ninja"]
        raise BuildError("ninja was not found; pip install ninja and install fastscore again.") from None


def compile_extension(build: Path, output: Path) -> dict:
    """Build and return what was built; raise BuildError where it cannot be."""
    wanted = mode()
    torch, cpp_extension = find_torch()
    compiler = find_compiler()
    nvcc = find_nvcc() if wanted in ("auto", "cuda") else None
    # A torch without CUDA cannot run the kernels, so `auto` does not build them for it; `cuda` does as it is told.
    if wanted == "auto" and torch.version.cuda is None:
        nvcc, no_cuda = None, "the installed torch has no CUDA"
    else:
        no_cuda = None if nvcc else ("no nvcc was found" if wanted != "cpu" else "FASTSCORE_BUILD=cpu")
    if wanted == "cuda" and not nvcc:
        raise BuildError("FASTSCORE_BUILD=cuda was asked for but no nvcc was found; install the CUDA toolkit or set CUDA_HOME.")
    build.mkdir(parents=True, exist_ok=True)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_ninja(build, output.resolve(), compiler, nvcc, torch, cpp_extension)
    jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
    process = subprocess.run([*find_ninja(), "-C", str(build), *jobs], capture_output=True, text=True)
    if process.returncode:
        (build / "error.log").write_text(process.stdout + process.stderr)
        if wanted != "auto":
            sys.stderr.write(process.stdout[-8000:] + process.stderr[-8000:])
        raise BuildError(f"the C++ extension did not compile with {compiler}; FASTSCORE_BUILD=cpu shows the compiler's message.")
    return {
        "mode": wanted,
        "cpp": None,
        "cuda": no_cuda,
        "torch": torch.__version__,
        "compiler": compiler,
        "instruction_sets": isas(),
        "architectures": os.environ.get("TORCH_CUDA_ARCH_LIST", ARCHITECTURES) if nvcc else None,
    }


def record(path: Path, outcome: dict) -> None:
    """`cpp` and `cuda` hold None where they were built, else the reason why not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(outcome, indent=2) + "\n")
