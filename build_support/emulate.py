"""The .cu files on the CPU.

Translated to C++, compiled with g++, run by the emulated driver of build_support/emulated/.

What a host compiler cannot read is translated here, line by line: launches, shared memory,
assembly, the doors to torch. `python build_support/emulate.py` builds; `installed()` makes the
result back end "cuda" of tensors on the CPU, with tests' `torch.cuda` if asked.
"""

import contextlib
import ctypes
import fcntl
import functools
import hashlib
import os
import re
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import native
import torch

HERE = Path(__file__).resolve().parent / "emulated"
BUILD = native.ROOT / "build" / "emulated"
NAMESPACE = "fastscore_emulated"
CHECKS = [
    "-fsanitize=kernel-address",
    "-fsanitize=alignment,bounds,shift,signed-integer-overflow,integer-divide-by-zero",
]
FLAGS = [
    "-O1",
    "-g",
    "-std=c++20",
    "-fPIC",
    "-fvisibility=hidden",
    "-Wno-attributes",
    f"-DTORCH_TARGET_VERSION={native.TORCH_TARGET}",
]
DEVICE_FLAGS = [
    *CHECKS,
    "-DUSE_CUDA",
    "-ffp-contract=fast",
    "-Wno-unknown-pragmas",
    "-include",
    "on_host.h",
    "-include",
    "checked.h",
]


class Untranslatable(Exception):
    """CUDA C++ that the translation does not know."""


def closing(text: str, start: int) -> int:
    """Index behind the bracket that closes the one at `start`."""
    pairs = {"(": ")", "[": "]", "{": "}", "<": ">"}
    opened, closed = text[start], pairs[text[start]]
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == opened) - (text[i] == closed)
        if depth == 0:
            return i + 1
    raise Untranslatable(f"no {closed} for {text[start : start + 60]!r}")


def opening(text: str, end: int) -> int:
    """Index of the bracket that text[end - 1] closes."""
    opened, closed = {">": "<>", ")": "()"}[text[end - 1]]
    depth = 0
    for i in range(end - 1, -1, -1):
        depth += (text[i] == closed) - (text[i] == opened)
        if depth == 0:
            return i
    raise Untranslatable(f"no {opened} for {text[max(0, end - 60) : end]!r}")


def translate(text: str) -> str:
    """CUDA C++ as C++ for the emulated driver; every line stays where it is."""
    lines = text.count("\n")
    text, bounds = _launch_bounds(text)
    text = _launches(text, bounds)
    text = _shared_memory(text)
    text = _assembly(text)
    text = re.sub(r"\b(\w+)\.get_device_index\(\)", r"on_host::device_index(\1)", text)
    text = re.sub(r"\b(\w+)\.mutable_data_ptr\(\)", r"on_host::writable(\1)", text)
    text = re.sub(r"\b(\w+)->mutable_data_ptr\(\)", r"on_host::writable(*\1)", text)
    text = re.sub(r"(\.|->)(grid|block)Dim\b", r"\1\2", text)   # of a launch's configuration
    text = text.replace("torch::stable::new_empty(", "on_host::new_empty(")
    text = text.replace("torch::stable::accelerator::DeviceGuard", "on_host::DeviceGuard")
    for key, here in (("CUDA", "CPU"), ("CompositeExplicitAutograd", "CompositeExplicitAutograd")):
        text = text.replace(
            f"STABLE_TORCH_LIBRARY_IMPL(fastscore, {key}, m)",
            f"STABLE_TORCH_LIBRARY_IMPL({NAMESPACE}, {here}, m)",
        )
    text = re.sub(r"TORCH_BOX\((&\w+)\)", r"TORCH_BOX(&on_host::checked<\1>::call)", text)
    text = re.sub(r"\b(\w+)\.device_id\b", r"on_host::device_index(\1)", text)
    text = re.sub(
        r"\b(cuda_launches\.\w+) = (&\w+)", r"\1 = &on_host::checked_direct<\2>::call", text
    )
    text = text.replace('"libtorch_cuda.so"', f'"{SONAME}"')
    assert text.count("\n") == lines
    return text


def _launch_bounds(text: str) -> tuple[str, dict[str, str]]:
    """Without the bounds, and those of each kernel that do not depend on its template's
    parameters."""
    bounds = {}
    while match := re.search(r"__launch_bounds__\s*\(", text):
        end = closing(text, match.end() - 1)
        bound = text[match.end() : end - 1].split(",")[0]
        name = re.match(r"\s*(\w+)", text[end:])
        template = re.search(r"\btemplate\s*<[^;{}]*$", text[: match.start()])
        parameters = template[0] if template else ""
        if name and not any(
            re.search(rf"\b{word}\b", parameters) for word in re.findall(r"[A-Za-z_]\w*", bound)
        ):
            bounds[name[1]] = bound
        text = text[: match.start()] + " " + text[end:]
    return text, bounds


def _launches(text: str, bounds: dict[str, str]) -> str:
    """kernel<...><<<grid, block, bytes, stream>>>( -> on_host::launcher(kernel<...>, {...})(."""
    while (at := text.find("<<<")) >= 0:
        end = text.find(">>>", at)
        # Of template arguments, or of a choice in brackets.
        start = opening(text, at) if text[at - 1] in ">)" else at
        while start > 0 and (text[start - 1].isalnum() or text[start - 1] in "_:"):
            start -= 1
        kernel, configuration = text[start:at], text[at + 3 : end]
        name = re.search(r"[\w:]+", kernel)[0]
        launcher = (
            f'on_host::launcher({kernel}, {{"{name}", {bounds.get(name, 0)}, {configuration}}})'
        )
        text = text[:start] + launcher + text[end + 3 :]
    return text


def _shared_memory(text: str) -> str:
    def declared(match):
        kind, name, dimensions = match[1], match[2], match[3]
        if match[0].startswith("extern"):
            return f"auto* {name} = static_cast<{kind}*>(on_host::dynamic_shared_memory());"
        alias = f"shared_type_of_{name}"
        shared = f"{alias}& {name} = on_host::shared<{alias}>([] {{}});"
        return f"using {alias} = {kind}{dimensions}; {shared}"

    scope = r"__shared__\s+(?:(?:__align__|alignas)\(\d+\)\s*)?"
    kind, rest = r"((?:typename\s+)?[\w:]+(?:<[^;]*?>)?(?:::\w+)*)", r"\s+(\w+)"
    text = re.sub(rf"extern\s+{scope}{kind}{rest}(\[\]);", declared, text)
    text = re.sub(rf"{scope}{kind}{rest}((?:\[[^\]]*\])*)\s*;", declared, text)
    if "__shared__" in text:
        line = text[: text.index("__shared__")].count("\n") + 1
        raise Untranslatable(
            f"line {line}: a declaration of shared memory that build_support/emulate.py does not "
            "know"
        )
    return text


def _assembly(text: str) -> str:
    """asm("opcode ..." : outputs : inputs) -> on_host::ptx_opcode(outputs, inputs)."""
    while match := re.search(r"\basm\s*(volatile)?\s*\(", text):
        end = closing(text, match.end() - 1)
        inside = text[match.end() : end - 1]
        templates = re.match(r'(\s*"(?:[^"\\]|\\.)*")+', inside)[0]
        code = "".join(re.findall(r'"((?:[^"\\]|\\.)*)"', templates)).strip()
        if not code:   # of the host: a barrier to the compiler, which the loop is not to find again
            text = text[: match.start()] + "__asm__" + text[match.start() + len("asm") :]
            continue
        opcode = re.match(r"\{?\s*([\w.:]+)", code)[1]
        operands = re.findall(
            r'"[=+]?\w+"\s*\(([^()]*(?:\([^()]*\)[^()]*)*)\)', inside[len(templates) :]
        )
        function = re.sub(r"\W+", "_", opcode)
        call = f"on_host::ptx_{function}({', '.join(operands)})"
        text = (
            text[: match.start()] + call + "\n" * text[match.start() : end].count("\n") + text[end:]
        )
    return text


CSRC = Path(os.environ.get("FASTSCORE_EMULATED_CSRC") or native.ROOT / "csrc")
SONAME = "libemulated_cuda.so"   # csrc/cuda_stream.h finds torch's by its name


# Where the launches stand that csrc/door.cpp calls, and the device's answers, which tests change.
LAUNCHES = """
#include "asked_once.h"
#include "direct.h"
extern "C" __attribute__((visibility("default"))) const void* emulated_launches() {
  return &fastscore::cuda_launches;
}
extern "C" __attribute__((visibility("default"))) void emulated_forget() {
  fastscore::asked_once.forget();
}
"""


def digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


@functools.cache
def processor() -> list[str]:
    """fma in one instruction where this machine has it.

    Else the C library's, the same to the bit.
    """
    info = Path("/proc/cpuinfo")
    return (
        ["-mfma"] if info.exists() and re.search(r"^flags.*\bfma\b", info.read_text(), re.M) else []
    )


def compile_object(source: Path, text: str, flags: list[str], headers: list[Path]) -> Path:
    """An object of a text; at once where nothing that it depends on has changed."""
    compiler = native.find_compiler().split()
    _, cpp_extension = native.find_torch()
    command = [
        *compiler,
        *FLAGS,
        *flags,
        *(f"-I{path}" for path in (HERE, *cpp_extension.include_paths())),
    ]
    ours = [path.read_text() for path in sorted(HERE.glob("*.h"))]
    hashed = digest(
        torch.__version__, *command, text, *ours, *(translate(path.read_text()) for path in headers)
    )
    target = BUILD / f"{source.stem}-{hashed}.o"
    if target.exists():
        return target

    folder = BUILD / hashed
    folder.mkdir(parents=True, exist_ok=True)
    for path in headers:
        (folder / path.name).write_text(f'#line 1 "{path.name}"\n{translate(path.read_text())}')
    translated = folder / f"{source.stem}.cpp"
    translated.write_text(f'#line 1 "{source.name}"\n{text}')
    result = subprocess.run(
        [*command, f"-I{folder}", "-c", translated, "-o", folder / "new.o"],
        capture_output=True,
        text=True,
    )
    if result.returncode:
        raise native.BuildError(
            f"{source.name} does not compile for the emulated device:\n{result.stderr[-6000:]}"
        )
    (folder / "new.o").replace(target)
    return target


def link(objects: list[Path], soname: str = SONAME) -> Path:
    target = BUILD / f"emulated-{digest(soname, *map(str, objects))}.so"
    if not target.exists():
        libraries = [
            f"-L{Path(torch.__file__).parent / 'lib'}",
            "-ltorch",
            "-ltorch_cpu",
            "-lc10",
            "-ldl",
        ]
        options = ["-shared", "-Wl,-z,defs", f"-Wl,-soname,{soname}"]
        new = target.with_suffix(f".{os.getpid()}")
        subprocess.run(
            [*native.find_compiler().split(), *options, *objects, "-o", new, *libraries], check=True
        )
        new.replace(target)
    return target


def build() -> Path:
    """The library of all .cu files; one process builds, others wait for it."""
    BUILD.mkdir(parents=True, exist_ok=True)
    driver_source, headers = HERE / "driver.cpp", sorted(CSRC.glob("*.h"))
    tasks = [(driver_source, driver_source.read_text(), ["-O2"], [])]
    tasks.append((HERE / "launches.cpp", LAUNCHES, DEVICE_FLAGS, headers))
    tasks += [
        (path, translate(path.read_text()), DEVICE_FLAGS + processor(), headers)
        for path in sorted(CSRC.glob("*.cu"))
    ]
    with (
        (BUILD / "lock").open("w") as lock,
        ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool,
    ):
        fcntl.flock(lock, fcntl.LOCK_EX)
        return link(list(pool.map(lambda task: compile_object(*task), tasks)))


def operators() -> list[str]:
    """Those that some .cu registers."""
    return _registered("CUDA")


def questions() -> list[str]:
    """Operators that ask the device, and have no tensors."""
    return _registered("CompositeExplicitAutograd")


def _registered(key: str) -> list[str]:
    text = "".join(path.read_text() for path in CSRC.glob("*.cu"))
    return re.findall(rf'LIBRARY_IMPL\(fastscore, {key}, m\) \{{ m\.impl\("(\w+)"', text)


def why_not() -> str | None:
    """Why there is no emulated device here, or None."""
    try:
        native.find_compiler()
    except native.BuildError as error:
        return str(error)
    from fastscore import backend

    return backend.load_extension()   # for its schemas


_definitions = []


@functools.cache
def driver() -> ctypes.CDLL:
    """The library, built and registered as torch.ops.fastscore_emulated."""
    from fastscore import backend

    reason = backend.load_extension()
    assert reason is None, reason
    define = torch.library.Library(NAMESPACE, "DEF")
    for name in operators() + questions():
        define.define(
            str(getattr(torch.ops.fastscore, name).default._schema).removeprefix("fastscore::")
        )
    path = str(build())
    torch.ops.load_library(path)
    loaded = ctypes.CDLL(path)
    for name in operators():
        backend._finish(f"{NAMESPACE}::{name}")
    _definitions.append(define)
    for name in ("log", "replay"):
        getattr(loaded, f"emulated_{name}").restype = ctypes.c_char_p
    for name in ("captured", "accesses", "questions"):
        getattr(loaded, f"emulated_{name}").restype = ctypes.c_long
    loaded.emulated_launches.restype = ctypes.c_void_p
    loaded.emulated_approximation.argtypes = [ctypes.c_float]
    loaded.emulated_replay.argtypes = [ctypes.c_long, ctypes.c_long]
    loaded.emulated_place.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return loaded


@contextlib.contextmanager
def installed():
    """Within: tensors on the CPU are served by back end "cuda", which is the emulated device."""
    from fastscore import backend, direct

    driver()
    why_not, raw = backend.why_not, backend.raw

    def why_not_here(name, device):
        return None if (name, device) == ("cuda", "cpu") else why_not(name, device)

    def raw_here(name, op):
        return (
            getattr(getattr(torch.ops, NAMESPACE), op).default
            if name == "cuda" and op in operators() + questions()
            else raw(name, op)
        )

    served = {} if direct.door is None else {"cuda": Door()}
    backend._choose.cache_clear()
    try:
        with (
            mock.patch.multiple(backend, why_not=why_not_here, raw=functools.cache(raw_here)),
            mock.patch.object(direct, "served", served),
        ):
            yield driver()
    finally:
        backend._choose.cache_clear()


_serving = threading.RLock()
_depth = 0


@contextlib.contextmanager
def served():
    """Within: what goes directly from Python to the CPU's kernels goes to the device's."""
    global _depth
    from fastscore import direct

    with _serving:
        _depth += 1
        direct.door.serve(direct.CPU, driver().emulated_launches(), None)
        try:
            yield
        finally:
            _depth -= 1
            if _depth == 0:
                direct.door.serve(direct.CPU, 0, None)


class Door:
    """fastscore.direct's, for a back end "cuda" that is the emulated device."""

    def __getattr__(self, name):
        from fastscore import direct

        function = getattr(direct.door, name)

        def call(*arguments):
            with served():
                return function(*arguments)

        return call


@contextlib.contextmanager
def on_device(*tensors: torch.Tensor, device: int = 1):
    """Within: the tensors lie on another of the two emulated devices."""
    for t in tensors:
        driver().emulated_place(t.data_ptr(), t.untyped_storage().nbytes(), device)
    try:
        yield
    finally:
        for t in tensors:
            driver().emulated_place(t.data_ptr(), 0, 0)


def misaligned(t: torch.Tensor) -> torch.Tensor:
    """Its values at an address from which no GPU would read them: no launcher looks at it."""
    memory = bytearray(t.numel() * t.element_size() + 2)
    return torch.frombuffer(memory, dtype=t.dtype, offset=2).view(t.shape).copy_(t)


def launched() -> list[tuple[str, int, int, int, int]]:
    """(kernel, blocks, threads, device, stream) since the last call."""
    lines = driver().emulated_log().decode().splitlines()
    driver().emulated_clear_log()
    return [(name, *map(int, numbers)) for name, *numbers in (line.split() for line in lines)]


class Graph(torch.utils._python_dispatch.TorchDispatchMode):
    """torch.cuda.CUDAGraph and torch.cuda.graph in one.

    Our launches are captured by the driver, the rest is done again at each replay.
    """

    def __init__(self):
        super().__init__()
        self.tasks = []

    def __enter__(self):
        driver().emulated_capture(1)
        return super().__enter__()

    def __exit__(self, *error):
        driver().emulated_capture(0)
        return super().__exit__(*error)

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        options = options or {}
        first = driver().emulated_captured()
        if function.namespace == NAMESPACE:
            function(*arguments, **options)
            last = driver().emulated_captured()
            self.tasks.append(functools.partial(self.launch, first, last))
            return None
        if function._schema.is_mutable:   # happens at a replay
            self.tasks.append(functools.partial(function, *arguments, **options))
            return arguments[0] if function._schema.returns else None
        results = function(*arguments, **options)
        self.tasks.append(functools.partial(self.again, function, arguments, options, results))
        return results

    @staticmethod
    def launch(first, last):
        fault = driver().emulated_replay(first, last)
        assert fault is None, fault.decode()

    @staticmethod
    def again(function, arguments, options, results):
        new = function(*arguments, **options)
        for old, value in zip(
            *(torch.utils._pytree.tree_leaves(values) for values in (results, new))
        ):
            if isinstance(old, torch.Tensor) and old.data_ptr() != value.data_ptr():
                old.copy_(value)

    def replay(self):
        for task in self.tasks:
            task()


class Event:
    def __init__(self, enable_timing=False):
        self.at = 0.0

    def record(self, *stream):
        self.at = time.perf_counter()

    def synchronize(self):
        pass

    def elapsed_time(self, other):
        return max(1e-6, 1000 * (other.at - self.at))


class Stream:
    def wait_stream(self, other):
        pass


class Properties:
    total_memory = 2**30
    L2_cache_size = 2**15
    multi_processor_count = 2
    name = "emulated"
    gcnArchName = name   # which torch.compile asks for in a build without CUDA


@contextlib.contextmanager
def torch_cuda():
    """Within: the functions of torch.cuda that tests and benchmarks call are those of the
    emulated device."""
    fakes = {
        "CUDAGraph": Graph,
        "Event": Event,
        "Stream": Stream,
        "current_device": lambda: 0,
        "current_stream": lambda *device: Stream(),
        "get_device_capability": lambda *device: (9, 0),
        "get_device_name": lambda *device: "emulated",
        "get_device_properties": lambda *device: Properties,
        "graph": lambda graph, **options: graph,
        "set_sync_debug_mode": lambda mode: None,
        "stream": lambda stream: contextlib.nullcontext(),
        "synchronize": lambda *device: None,
    }
    with mock.patch.multiple(torch.cuda, **fakes):
        yield


if __name__ == "__main__":
    sys.path.insert(0, str(native.ROOT))
    start = time.monotonic()
    print(build(), f"{time.monotonic() - start:.0f} s")
