"""The command `fastscore` without a process of its own, whose imports take seconds."""

import contextlib
import io
import subprocess
import sys

import pytest

from fastscore import cli


def command(*words):
    """(exit status, stdout, stderr)."""
    out, err = io.StringIO(), io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        patch.setattr(sys, "argv", ["fastscore", *map(str, words)])
        try:
            code = cli.main() or 0
        except SystemExit as stop:
            code = stop.code or 0
    return code, out.getvalue(), err.getvalue()


def run_here(*words):
    """The same, as `subprocess.run` returns it."""
    return subprocess.CompletedProcess(words, *command(*words))
