"""What the GPU would execute, checked without one."""

import importlib.util
import itertools
import json
import os
import sys
from pathlib import Path

import children
import pytest

ALGEBRA = ("merge", "coefficients", "cotangents ", "sum_splits")   # a few numbers
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]   # every kernel, for three targets
ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "build_support"))
import native  # noqa: E402


def count(what, target="9.0"):
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton, whose wheel carries cuobjdump, is not installed")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TORCH_CUDA_ARCH_LIST"] = target   # of CUDA C++; Triton compiles for all three
    script = ROOT / "build_support" / "machine_code.py"
    result = children.run([sys.executable, script, what], env=environment, seconds=800)
    assert result.returncode == 0, result.stderr[-2000:]
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def triton_rows():
    return count("triton")


@pytest.fixture(scope="module")
def cuda_rows():
    if native.find_nvcc() is None:
        pytest.skip("no nvcc was found")
    return count("cuda")


def test_every_triton_kernel_compiles_for_every_dtype_and_target_without_spills(triton_rows):
    noise = 4 + 3 + 4 * 4 + 1 + 3 * 4 + 2 * 3 * 4   # on every target; and on sm_90 more variants
    pixels, algebra, whole, stack, sums = 4 * 4, 2 * 3, 4, 4 * 4, 2
    assert (
        len(triton_rows)
        == 3 * (noise + pixels + algebra + whole + stack + sums) + 2 * 4 * 4 + 2 * 2 + 4 * 6
    )
    for name, row in triton_rows.items():
        assert row["local"] == 0, (name, row)
        assert row["wide"] >= 1 or name.startswith(ALGEBRA), (name, row)


def test_normalisation_reads_and_writes_what_its_docstrings_say(triton_rows):
    """Elements per thread and tensor, by 128-bit accesses.

    x is read twice forward, twice backward.
    """
    reads = {"moments": 1, "apply": 1, "cotangent_sums": 2, "gradient": 2}
    for name, row in triton_rows.items():
        kernel, *label, dtype, _ = name.split()
        # There the coefficients are vectors too.
        if kernel in reads and label != ["channels-last"]:
            size, tangent = (
                {"fp32": 4, "bf16": 2, "fp16": 2, "fp64": 8}[dtype],
                1 + (label == ["tangent"]),
            )
            elements = row["instructions"] / row["per_element"]
            assert row["read"] == reads[kernel] * tangent * size * elements, (name, row)
            assert (
                row["written"]
                == ("sums" not in kernel and kernel != "moments") * tangent * size * elements
            ), (name, row)


def test_a_second_pass_beyond_the_cache_leaves_there_what_it_has_yet_to_read(triton_rows):
    for name, row in triton_rows.items():
        second = name.startswith(("apply large", "gradient large"))
        assert row["streamed"] == (row["wide"] if second else 0), (name, row)


def test_activations_of_a_stack_move_every_tensor_once(triton_rows):
    """By 128-bit accesses.

    The stack in and out, and in the gradient its cotangents in, of relu's derivatives nothing but
    those.

    Bound by memory below 50 instructions for value and tangent; below 75 for a curve, which moves
    half as much again.
    """
    for name, row in triton_rows.items():
        if name.startswith(("activate_dual", "activate_jet")):
            kernel, activation, dtype, _ = name.split()
            parts = 3 if "jet" in kernel else 2
            part = (
                {"fp32": 4, "bf16": 2, "fp16": 2, "fp64": 8}[dtype]
                * row["instructions"]
                / row["per_element"]
            )
            # Besides those that are as many as are written.
            others = kernel.endswith("gradient") * (1 if activation == "relu" else parts)
            assert row["read"] == part * (parts + others) and row["written"] == part * parts, (
                name,
                row,
            )
            assert row["per_element"] <= {2: 50, 3: 60}[parts] * (1 + 1.2 * (dtype == "fp64")), (
                name,
                row,
            )
            # Half of an SM's threads at least.
            assert row["registers"] <= (128 if dtype == "fp64" else 64), (name, row)


@pytest.mark.parametrize("target", ["8.0", "9.0", "10.0"])
def test_every_cuda_kernel_compiles_without_spills(target, request):
    if native.find_nvcc() is None:
        pytest.skip("no nvcc was found")
    cuda_rows = request.getfixturevalue("cuda_rows") if target == "9.0" else count("cuda", target)
    kernels = (
        "fill_elements",
        "fill_packs",
        "fill_signs",
        "update_packs",
        "update_strided",
        "reduce_samples",
        "sum_splits",
        "normalise_rows",
    )
    assert all(any(kernel in name for name in cuda_rows) for kernel in kernels)
    for name, row in cuda_rows.items():
        assert row["local"] == 0, (name, row)
        assert row["wide"] >= 4 or "update_packs" not in name, (name, row)


def test_a_norm_in_clusters_loads_every_element_once(cuda_rows):
    """By 128-bit accesses, where samples are aligned, with the warps of three blocks in a
    multiprocessor; what it writes beyond the L2 is the first to be evicted."""
    packed = {name: row for name, row in cuda_rows.items() if "normalise_rows" in name}
    assert len(packed) == 6   # float32, bfloat16, float16; packed or not
    for name, row in packed.items():
        assert row["local"] == 0 and row["registers"] <= 80, (name, row)
        # Of ELU 30 or 31 for an element; here stand six activations.
        assert row["instructions"] <= 6000, (name, row)
        if "Lb1E" not in name:
            assert row["wide"] == 0, (name, row)
            continue
        size = 4 if "normalise_rowsIf" in name else 2
        assert row["read"] == size * row["elements"], (name, row)
        assert 16 * row["streamed"] == size * row["elements"], (name, row)


def test_instructions_per_element_do_not_grow(triton_rows, request):
    """The goal is 30 for one coefficient per call.

    Today Triton stands at 32.6 (float32) and 33.0 (bfloat16), CUDA C++ at 30.3 and 31.9.

    With coefficients of each sample the goal is 34; Triton stands at 33.9 and 33.7 (16 or 32
    elements a thread), Triton 3.6 at 34.1 and 33.9. The loss is at its goal of 30 for whole tiles
    of long samples alone (docs/gpu.md says why).
    """
    for name, row in triton_rows.items():
        if "noisy_update" in name:
            # On sm_90 a thread takes 4 elements (8 of a 16-bit type), not 16 (32): more
            # instructions for each, in less time (kernels/tiles.py).
            limit = 39 if "fp64" in name else 34.2 if "each" in name else 33
            if name.endswith("sm_90"):
                limit = 57 if "fp64" in name else 43.3
            assert row["per_element"] <= limit, (name, row)
            assert row["registers"] <= 32 or not name.endswith("sm_90") or "fp64" in name, (
                name,
                row,
            )
        # Masks cost 1.7, the tree over a program's threads and the way to the first element 3, of
        # several tiles a part of that.
        if name.startswith("noise_reduce") and "fp64" not in name:
            limits = {"long": 31, "full": 33, "masked": 33.4, "masked-long": 31.5}
            limit = limits[name.split()[1]]
            # Ptxas takes 156 there for the loop over four tiles.
            registers = 160 if name.endswith("sm_100") else 128
            assert row["per_element"] <= limit and row["registers"] <= registers, (name, row)
        # Philox is ten rounds of four instructions for four words, of which a tile shares five;
        # Box-Muller 36 for a pair.
        fills = {"words": 20, "uniform": 19, "normal": 30.5, "rademacher": 6}
        if name.split()[0] in fills and "fp64" not in name:
            assert row["per_element"] <= fills[name.split()[0]] and row["registers"] <= 64, (
                name,
                row,
            )
        if name.startswith(("project", "spread")) and "fp64" not in name:
            # Each warp computes the 32 Philox blocks of a tile, 2 instructions an element; a sign
            # flip is 2, a sum 1, of bfloat16 a conversion 1 for each tensor that is read and half
            # of that for one that is written; three sums over a program's threads take 3, of
            # several tiles a part of that.
            limits = (
                {"long": 15, "full": 19, "masked": 20.5}
                if name.startswith("project")
                else {"long": 15, "full": 15, "masked": 16.5}
            )
            assert row["per_element"] <= limits[name.split()[1]] and row["registers"] <= 110, (
                name,
                row,
            )
        # Five sums over a program's threads, of 8 and 16 elements each, take 20 and 10
        if name.startswith("cotangent_sums tangent"):
            assert (
                row["per_element"] <= {"fp32": 57, "bf16": 44}[name.split()[2]]
                and row["registers"] <= 128
            ), (name, row)
        if name.startswith(("apply elu", "gradient elu")) and "fp64" not in name:
            assert row["per_element"] <= 25, (name, row)
    for name, row in request.getfixturevalue("cuda_rows").items():
        if "update_packs" in name and "Li0E" in name:   # Li0E: key and coefficients are numbers
            assert row["per_element"] <= 33, (name, row)
        # Coefficients of one sample per pack.
        if "update_packs" in name and "Li2EEE" in name and "update_packsId" not in name:
            assert row["per_element"] <= 34, (name, row)
        if "fill_signs" in name:
            assert row["per_element"] <= 6, (name, row)
        if "fill_packs" in name and "fill_packsId" not in name:
            assert row["per_element"] <= 30, (name, row)
        if "reduce_samples" in name and row["per_element"]:
            assert row["per_element"] <= 30.5 and row["registers"] <= 80, (name, row)


def test_conversions_take_the_pipe_that_their_schedule_shows():
    """Between two instructions of the ALU a warp waits two clocks, as it does between two of the
    half of the FMA pipe that multiplies integers; from one pipe to another it may go on in the
    next.

    What the XU computes is announced by a scoreboard.
    """
    found = count("schedule")
    pipe_of, rows = found["pipe_of"], found["rows"]
    boards, waits = {}, {}
    for function in (function for row in rows.values() for function in row["schedule"]):
        for name, _, board in function:
            boards.setdefault(name, set()).add(board)
        for (name, wait, _), (then, _, _) in itertools.pairwise(function):
            pipes = pipe_of.get(name), pipe_of.get(then)
            for pair in {(name, pipes[1]), (pipes[0], then), pipes}:
                waits.setdefault(pair, []).append(wait)

    # The ruler: instructions whose pipes nobody doubts.
    assert True in boards["MUFU"] and boards["LOP3"] == boards["FFMA"] == {False}
    assert min(waits["LOP3", "alu"]) == 2 and min(waits["LOP3", "fma"]) == 1
    assert min(waits["FFMA", "alu"]) == min(waits["FFMA", "fma"]) == 1

    for name in ("I2FP", "F2FP"):
        assert boards[name] == {False} and pipe_of[name] == "alu"
        assert min(waits[name, "alu"]) == min(waits["alu", name]) == 2, name
        assert min(waits[name, "fma"]) == min(waits["fma", name]) == 1, name
    assert True in boards["F2F"] and pipe_of["F2F"] == pipe_of["I2F"] == "xu"
    assert min(waits["alu", "alu"]) == min(waits["imad", "imad"]) == 2


def test_the_stream_is_found_in_a_torch_that_was_not_linked(tmp_path):
    try:
        compiler = native.find_compiler().split()
    except native.BuildError as error:
        pytest.skip(str(error))
    stub = (
        "int aoti_torch_get_current_cuda_stream(int device, long* s) "
        "{ *s = 40 + device; return 0; }"
    )
    call = "long stream() { void* s; return fastscore::torch_cuda_stream(2, &s) ? (long)s : -1; }"
    sources = {
        "libtorch_cuda.so": f'extern "C" {stub}',
        "ours.so": f'#include "cuda_stream.h"\nextern "C" {call}',
    }
    for name, text in sources.items():
        (tmp_path / "source.cpp").write_text(text)
        command = [
            *compiler,
            "-shared",
            "-fPIC",
            f"-I{ROOT / 'csrc'}",
            "source.cpp",
            "-o",
            name,
            f"-Wl,-soname,{name}",
            "-ldl",
        ]
        children.run(command, cwd=tmp_path, check=True)
    program = "import ctypes, sys; print([ctypes.CDLL(path) for path in sys.argv[1:]][-1].stream())"
    for libraries, stream in ((["ours.so"], "-1"), (["libtorch_cuda.so", "ours.so"], "42")):
        command = [sys.executable, "-c", program, *(f"./{name}" for name in libraries)]
        assert children.run(command, cwd=tmp_path).stdout.strip() == stream
