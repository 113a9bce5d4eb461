"""No child hangs the suite."""

import sys

import pytest
from children import run

HANGS = """
import subprocess, sys, threading
grandchild = "def grandchild_waits(): threading.Event().wait()\\n"
grandchild = "import threading\\n" + grandchild + "grandchild_waits()"
subprocess.Popen([sys.executable, "-c", grandchild])
def child_waits(): threading.Event().wait()
child_waits()
"""


@pytest.mark.processes
def test_a_child_that_hangs_ends_with_the_stacks_of_all_its_processes():
    with pytest.raises(AssertionError, match="not done after 3 s") as caught:
        run([sys.executable, "-c", HANGS], seconds=3)
    assert "child_waits" in str(caught.value) and "grandchild_waits" in str(caught.value)


@pytest.mark.processes
def test_a_child_that_fails_shows_its_output():
    with pytest.raises(AssertionError, match=r"exit status 3.*\n*said"):
        run([sys.executable, "-c", "print('said'); raise SystemExit(3)"], check=True)
