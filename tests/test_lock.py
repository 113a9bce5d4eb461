"""Two processes never write one run folder."""

import os
import signal
import time

import numpy as np
import pytest
from commands import run_here

from fastscore.cli import run_folder
from fastscore.cli.config import TrainConfig
from fastscore.cli.fit import fit
from fastscore.training import lock

pytestmark = pytest.mark.processes


def child(action):
    """The number of a process that does something."""
    number = os.fork()
    if number == 0:
        try:
            action()
            os._exit(0)
        finally:
            os._exit(1)
    return number


def status(number):
    return os.waitstatus_to_exitcode(os.waitpid(number, 0)[1])


@pytest.fixture
def options(tmp_path):
    np.savez(tmp_path / "x.npz", images=np.random.default_rng(0).random((20, 3, 3), np.float32))
    options = {"data": str(tmp_path / "x.npz"), "out": tmp_path / "run", "steps": 9}
    return {**options, "width": 8, "depth": 1, "levels": 2, "batch_size": 4}


def test_a_second_resume_is_told_in_one_sentence(options):
    list(fit(TrainConfig(**options)))
    first = fit(TrainConfig(out=options["out"], resume=True, steps=50))
    next(first)

    told = run_here("train", "--resume", "--out", options["out"], "--steps", "60")
    assert told.returncode == 2 and told.stderr == (
        f"error: the run in {options['out']} is being written by another process ({os.getpid()}); "
        "wait for its end, or end it.\n"
    )
    # Nothing of the second has come to the run.
    assert run_folder.read_config(options["out"])[0].steps == 50
    first.close()
    assert not (options["out"] / lock.NAME).exists()
    assert len(list(fit(TrainConfig(out=options["out"], resume=True)))) == 40


def test_two_runs_that_begin_at_once_are_one_run(options):
    first, second = fit(TrainConfig(**options)), fit(TrainConfig(**options))
    next(first)
    with pytest.raises(ValueError, match="is being written by another process"):
        next(second)
    third = fit(TrainConfig(**{**options, "resume": True}))
    first.close()
    assert next(third)[0] == 1
    third.close()


def test_one_that_waited_for_the_folder_does_not_begin_over_the_other(options):
    second = fit(TrainConfig(**options))
    list(fit(TrainConfig(**options)))
    with pytest.raises(ValueError, match="exists already; choose another folder or pass --resume"):
        next(second)


def test_the_lock_of_a_process_that_was_killed_is_no_obstacle(tmp_path):
    def hold_for_ever():
        with lock.only_writer(tmp_path):
            time.sleep(60)

    owner = child(hold_for_ever)
    while not ((tmp_path / lock.NAME).exists() and (tmp_path / lock.NAME).read_bytes()):
        time.sleep(0.001)
    with pytest.raises(ValueError, match=rf"by another process \({owner}\)"):
        with lock.only_writer(tmp_path):
            pass
    os.kill(owner, signal.SIGKILL)
    os.waitpid(owner, 0)
    assert (tmp_path / lock.NAME).exists()
    with lock.only_writer(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


def test_of_many_processes_one_is_within(tmp_path):
    """Four processes, 100 entries each, of which some find a lock that is being removed."""
    (tmp_path / "run").mkdir()

    def enter_again_and_again():
        entered = 0
        while entered < 100:
            try:
                with lock.only_writer(tmp_path / "run"):
                    # Fails where another is within.
                    (tmp_path / "inside").mkdir()
                    (tmp_path / "inside").rmdir()
                    entered += 1
            except ValueError:
                pass

    children = [child(enter_again_and_again) for _ in range(4)]
    assert [status(number) for number in children] == [0] * 4
