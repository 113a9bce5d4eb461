"""What the GPU would execute, checked without one."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "build_support" / "machine_code.py"


@pytest.fixture(scope="module")
def rows():
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    result = subprocess.run([sys.executable, str(SCRIPT)], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    return json.loads(result.stdout)


def test_noisy_update_compiles_for_every_dtype_and_target(rows):
    assert len(rows) == 12


def test_no_local_memory_and_128_bit_accesses(rows):
    for name, row in rows.items():
        assert row["local"] == 0 and row["wide"] >= 3, (name, row)


def test_instructions_per_element_do_not_grow(rows):
    """The goal is 30; this version stands at 52 (float32) to 57 (bfloat16), counting prologue and masks. Lower it with the kernel."""
    for name, row in rows.items():
        assert row["per_element"] <= (62 if "fp64" in name else 58), (name, row)
