"""`.ci/run` does every part, and fails if one does."""

import os
from pathlib import Path

import children
import pytest

SCRIPT = Path(__file__).parent.parent / ".ci" / "run"
PARTS = ["lint", "types", "test", "docs", "test-slow-sample"]
INSTALL = ".venv/.installed"


def ci(folder, failing):
    """The result of the script where `make` writes down its target, and fails for one of them."""
    make = folder / "make"
    make.write_text(
        f'#!/bin/sh\necho "$1" >> {folder}/targets\necho "7 passed of $1 in 1.0s"\n'
        f'[ "$1" != "{failing}" ]\n'
    )
    make.chmod(0o755)
    environment = os.environ | {"PATH": f"{folder}:{os.environ['PATH']}"}
    result = children.run([SCRIPT], env=environment, seconds=60)
    return result, (folder / "targets").read_text().split()


@pytest.mark.processes
@pytest.mark.parametrize("failing", ["none", *PARTS])
def test_every_part_runs_and_one_that_fails_is_said(tmp_path, failing):
    result, targets = ci(tmp_path, failing)
    assert targets == [INSTALL, *PARTS]
    assert result.returncode == (failing != "none")
    lines = result.stdout.splitlines()
    for part in PARTS:
        outcome = "FAILED" if part == failing else "passed"
        assert sum(line.startswith(f"ci: {part}: {outcome}, ") for line in lines) == 1
    assert lines[-1] == "7 passed of test in 1.0s"


@pytest.mark.processes
def test_nothing_runs_where_the_installation_failed(tmp_path):
    result, targets = ci(tmp_path, INSTALL)
    assert result.returncode == 1 and targets == [INSTALL]
