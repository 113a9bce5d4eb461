"""Where output is no terminal, a line now and then says how far a job is."""

import io
import re
import sys

import numpy as np
import pytest
from commands import run_here

from fastscore.cli import progress, train
from fastscore.cli.config import TrainConfig
from fastscore.cli.progress import Progress, duration


class Clock:
    """Time that passes when it is told to."""

    def __init__(self):
        self.now = 100.0

    def perf_counter(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def test_a_log_gets_its_first_line_early_and_one_every_ten_seconds(clock, capsys):
    with Progress("train", 9000, "step", images=256) as shown:
        for step in range(1, 721):
            clock.now += 0.125
            shown.reach(step, 1 / step)
    printed = capsys.readouterr().err.splitlines()
    assert printed[:2] == [
        "train: step 8 of 9000, loss 0.125, 2048 images/s, 18 min 44 s left",
        "train: step 88 of 9000, loss 0.011, 2048 images/s, 18 min 34 s left",
    ]
    assert len(printed) == 9
    # 90 s: at 1, 11, ..., 81 s.
    assert printed[-1].startswith("train: step 648 of 9000")


def test_a_step_that_takes_minutes_is_told_when_it_is_done(clock, capsys):
    with Progress("train", 3, "step", images=2) as shown:
        for step in (1, 2, 3):
            clock.now += 600
            shown.reach(step, 0.5)
    # The rate is that of the steps after the first, which may load and compile.
    assert capsys.readouterr().err.splitlines() == [
        "train: step 1 of 3, loss 0.500",
        "train: step 2 of 3, loss 0.500, 0.0033 images/s, 10 min 0 s left",
        "train: step 3 of 3, loss 0.500, 0.0033 images/s, 0 s left",
    ]


def test_a_short_job_prints_nothing_and_a_longer_one_its_end(clock, capsys):
    with Progress("sample", 17, "level") as shown:
        for _ in range(17):
            clock.now += 0.05
            shown.update()
    assert capsys.readouterr().err == ""
    with Progress("sample", 17, "level") as shown:
        for _ in range(17):
            clock.now += 0.5
            shown.update()
    assert capsys.readouterr().err.splitlines() == [
        "sample: level 2 of 17, 8 s left",
        "sample: level 17 of 17, 0 s left",
    ]


def test_other_processes_of_a_job_are_silent(clock, capsys):
    with Progress("sample", 2, "level", shown=False) as shown:
        for _ in range(2):
            clock.now += 50
            shown.update()
    assert capsys.readouterr().err == ""


def test_a_terminal_has_a_bar(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with Progress("train", 4, "step", images=8) as shown:
        for step in (1, 2, 3, 4):
            shown.reach(step, 0.25)
    assert "train: 100%" in terminal.getvalue() and "4/4" in terminal.getvalue()
    assert "loss=0.250" in terminal.getvalue() and "images_per_s=" in terminal.getvalue()
    assert "step 4 of 4" not in terminal.getvalue()


def test_times_in_words():
    assert [duration(t) for t in (0, 59.4, 59.6, 3599, 3600, 90061)] == [
        "0 s",
        "59 s",
        "1 min 0 s",
        "59 min 59 s",
        "1 h 0 min",
        "25 h 1 min",
    ]


def test_every_command_that_takes_long_says_how_far_it_is(tmp_path, monkeypatch, capsys):
    """With a line after every step: train and its pictures, sample, evaluate in both forms."""
    monkeypatch.setattr(progress, "FIRST", 0.0)
    monkeypatch.setattr(progress, "EVERY", 0.0)
    rng = np.random.default_rng(0)
    data = {"images": rng.random((30, 3, 3), np.float32), "labels": np.arange(30) % 3}
    np.savez(tmp_path / "x.npz", **data)
    out = tmp_path / "run"
    options = {"width": 8, "depth": 1, "levels": 2, "batch_size": 4, "held_out": 9, "steps": 3}
    train.train(TrainConfig(data=str(tmp_path / "x.npz"), out=out, **options))
    told = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"train: step 2 of 3, loss -?[\d.]+, [\d.]+ images/s, \d+ s left", told[1])
    assert [line.partition(",")[0] for line in told[3:]] == [
        f"pictures: level {k} of 3" for k in (1, 2, 3)
    ]

    told = run_here("sample", out, "-n", "4", "--batch-size", "2", "--out", tmp_path / "y.npz")
    assert "sample: level 6 of 6" in told.stderr and told.returncode == 0
    told = run_here("evaluate", out, "-n", "4")
    assert "evaluate: level 3 of 3" in told.stderr
    assert "evaluate: training a classifier on the real images" in told.stderr
    told = run_here("evaluate", out, "-n", "4", "--likelihood")
    assert "evaluate: batch 2 of 2" in told.stderr
