"""Every benchmark runs, verifies its competitors and writes a row that a table can be made of."""

import json
import os
import re
import sys
from pathlib import Path

import children
import pytest

from fastscore import backend

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
import harness  # noqa: E402


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_benchmark_runs_and_times_ours_a_ceiling_and_a_peer(tmp_path):
    if backend.why_not("cpp", "cpu") is not None:
        pytest.skip(backend.why_not("cpp", "cpu"))
    path = tmp_path / "results" / "smoke.json"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "benchmarks", "--smoke", "--results", str(path)]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    result = children.run(command, cwd=ROOT, env=environment, seconds=800)
    assert result.returncode == 0, result.stdout + result.stderr
    found = json.loads(path.read_text())
    rows = [harness.Row(**row) for row in found["rows"]]
    assert found["device"] and found["versions"]["torch"] and len(rows) == int(re.search(r"(\d+) passed", result.stdout)[1])
    for row in rows:
        peers = set(row.seconds) - {"ceiling", *harness.OURS}
        assert row.ours == "cpp" and "ceiling" in row.seconds and any(peer.startswith("eager") for peer in peers), row
        assert all(0 < seconds < 60 for seconds in row.seconds.values()) and row.bytes >= row.elements > 0, row
    lines = harness.table(found).splitlines()
    assert len(lines) == 2 + len(rows) and all(line.count("|") == lines[0].count("|") for line in lines)


def test_results_keep_the_rows_of_other_runs_of_the_same_machine(tmp_path):
    def row(op, seconds):
        return {"op": op, "shape": [2], "dtype": "float32", "seconds": {"cpp": seconds}}

    path, here = tmp_path / "r.json", {"device": "d", "versions": {"torch": "1"}}
    new = here | {"rows": [row("a", 2.0), row("c", 3.0)]}
    assert harness.merged(path, new) == new
    path.write_text(json.dumps(here | {"rows": [row("a", 1.0), row("b", 1.0)]}))
    assert harness.merged(path, new)["rows"] == [row("b", 1.0), row("a", 2.0), row("c", 3.0)]
    for other in ({"device": "e"}, {"versions": {"torch": "2"}}):
        assert harness.merged(path, new | other) == new | other
