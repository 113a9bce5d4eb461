"""Child processes that cannot hang a suite: at the limit all of a group show their stacks."""

import contextlib
import os
import signal
import subprocess
from pathlib import Path

# Less than pytest's own limit of a test (pyproject.toml), so that the child's stacks are seen.
SECONDS = float(os.environ.get("FASTSCORE_CHILD_SECONDS", 200))


def run(
    command: list,
    *,
    seconds: float = SECONDS,
    check: bool = False,
    cwd: Path | str | None = None,
    env: dict | None = None,
) -> subprocess.CompletedProcess:
    """subprocess.run with text output captured.

    A child that is not done in time is aborted, which prints its stacks.

    Raises:
        AssertionError: the child was not done in time, or (check) ended with another status than 0;
            with its whole output.
    """
    environment = {**(os.environ if env is None else env), "PYTHONFAULTHANDLER": "1"}
    process = subprocess.Popen(
        list(map(str, command)),
        cwd=cwd,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        _signal(process, signal.SIGABRT)
        try:
            out, err = process.communicate(timeout=10)
        except subprocess.TimeoutExpired:
            _signal(process, signal.SIGKILL)
            out, err = process.communicate()
        raise AssertionError(f"not done after {seconds} s: {command}\n{out}\n{err}") from None
    except BaseException:   # pytest's limit, Ctrl-C: no orphans
        _signal(process, signal.SIGKILL)
        raise
    if check and process.returncode:
        raise AssertionError(f"exit status {process.returncode}: {command}\n{out}\n{err}")
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def _signal(process: subprocess.Popen, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)
