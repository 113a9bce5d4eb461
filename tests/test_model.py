"""The model of docs/gpu.md: its arithmetic by hand, and its table from the compiled code."""

import importlib.util
import os
import sys
from pathlib import Path

import children
import pytest

ROOT = Path(__file__).parent.parent


def run(program):
    """In a process of its own: Triton's interpreter is on in this one."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "build_support")))
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {
        "PYTHONPATH": paths
    }
    result = children.run([sys.executable, "-c", program], env=environment, seconds=800)
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout


def test_occupancy_and_limits_are_those_of_the_hardware():
    run("""
import model
cases = (32, 4), (64, 4), (65, 4), (128, 4), (168, 4), (255, 8)
assert [model.occupancy(*case) for case in cases] == [1, 0.5, 0.4375, 0.25, 0.1875, 0.125]
pipes = {"fma": 240, "xu": 32}
row = {"per_element": 30.0, "instructions": 480, "registers": 64, "read": 128, "pipes": pipes}
found = model.limits(row, 4, model.Shape(2, 1), 4, 2**26)
near = lambda a, b: abs(a / b - 1) < 1e-12
assert near(found["memory"], 2**26 * 12 / 2.98e12)
assert near(found["issue"], 2**26 * 30 / (132 * 128 * 1.6e9 * 0.8))
assert near(found["fma"], 2**26 * 15 / (132 * 128 * 1.6e9))
assert near(found["xu"], 2**26 * 2 / (132 * 16 * 1.6e9))
# 32 warps of 32 lanes, 128 bytes each.
assert near(found["latency"], 2**26 * 8 * 0.8e-6 / (132 * 128 * 32 * 32))
assert max(found, key=found.get) == "memory"
replayed = {"triton": 2.0, "ceiling": 1.5}
report = {"rows": [{"op": "a", "shape": [4], "dtype": "float32", "replayed": replayed}]}
assert model.measured(report, ("a", [4]), "fp32") == 0.75
assert model.measured(report, ("a", [4]), "bf16") is None
assert model.said(0.98, None) == "predicted 98"
assert model.said(0.98, 0.75) == "predicted 98, measured 75"
""")


def test_an_instruction_counts_for_one_pipe():
    run("""
import machine_code
line = "        /*0630*/   {} ;   /* 0x0000001200137245 */"
code = "I2FP.F32.U32 R19, R18|F2FP.BF16.F32.PACK_AB R1, R2, R3|I2F.F64.U32 R2, R5"
code += "|F2F.F32.F64 R2, R4|@!P0 LOP3.LUT R16, R16, 0xff, RZ, 0xc0, !PT|MUFU.LG2 R3, R4"
code += "|@P1 IMAD.MOV.U32 R1, RZ, RZ, R2|HFMA2.MMA R24, -RZ, RZ, 0.1, 1|ULDC UR4, c[0x0][0x244]"
code += "|@UP0 UIADD3 UR4, UR4, 1, URZ|EXIT"
pipes = machine_code.pipes([line.format(text) for text in code.split("|")])
assert pipes == {"fma": 1, "imad": 1, "alu": 3, "xu": 3, "lsu": 0, "fp64": 0}, pipes
assert len(machine_code.PIPE_OF) == sum(map(len, machine_code.PIPES.values()))
try:
    machine_code.pipes([line.format("NEWOP R1, R2")])
except AssertionError as error:
    assert "NEWOP" in str(error)
else:
    raise SystemExit("an instruction of no pipe was left out")
""")


def test_a_norm_in_clusters_is_predicted_from_how_its_rows_are_cut():
    run("""
import model
# 128 pieces of 1024 pixels: 16 in each of 8 blocks, with a table of them and four of channels.
assert model.cut(128, 1024, 4) == (8, 16, 128 + 4 * 512 + 16 * 4096)
assert model.cut(128, 1024, 2) == (4, 32, 256 + 4 * 512 + 32 * 2048)
# Pieces of 520 and 505 pixels.
assert model.cut(18, 1025, 4) == (1, 36, 288 + 4 * 80 + 36 * 2080)
assert model.cut(128, 4096, 2) == (8, 64, 512 + 4 * 512 + 64 * 2048)
# Too large; what one program keeps; too few pixels.
assert model.cut(128, 4096, 4) is model.cut(16, 1024, 4) is model.cut(1024, 64, 4) is None
found = model.in_clusters(128, 1024, 4, 2**26)
near = lambda a, b: abs(a / b - 1) < 1e-12
assert near(found["memory"], 2**26 * 8 / 2.98e12)
# Three blocks of 66 KiB in a multiprocessor: 6 clusters in 16 of them and in 18.
rounds = -(-4096 // 384)
assert near(found["rounds"], rounds * (2 * 0.8e-6 + 2e-6 + 3 * 16 * 4096 / (64 * 1.6e9)))
assert found["memory"] > found["rounds"]
""")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_kernel_of_the_table_is_compiled_and_every_figure_says_what_it_is():
    lines = run("import model; print(model.table())").splitlines()
    head, *_ = ([cell.strip() for cell in line.split("|")[1:-1]] for line in lines)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:]]
    expected = run(
        "import model; print(*(f'{k} {d}' for k in [*model.KERNELS, *model.WHOLE] for d in "
        "model.ITEM), *(line.split('|')[1].strip() for line in model.of_clusters(None)), sep='\\n')"
    ).splitlines()
    assert [row[0] for row in rows] == expected
    for row in rows:
        assert (
            row[-1].startswith("predicted")
            and row[-2].startswith("predicted")
            and len(row) == len(head)
        ), row
    page = (ROOT / "docs" / "gpu.md").read_text()
    assert lines[0] in page and all(f"| {name} |" in page for name in expected)
