"""A run that a signal ends is saved between two steps, and goes on as if nothing had been."""

import contextlib
import random
import signal
import subprocess
import sys
import threading

import children
import numpy as np
import pytest
import torch
from commands import run_here

from fastscore.cli import fit as fitting
from fastscore.cli import held_out, metrics, pictures, progress, run_folder, train
from fastscore.cli.config import TrainConfig
from fastscore.cli.fit import fit
from fastscore.training import saves, signals

pytestmark = pytest.mark.processes

STEPS = 12


@pytest.fixture(autouse=True)
def often(monkeypatch):
    """Records and saves within few steps."""
    monkeypatch.setattr(fitting, "SAVE_EVERY", 5)
    monkeypatch.setattr(fitting, "RECORD_EVERY", 4)


@pytest.fixture(autouse=True)
def hangups():
    """Heeded, where the tests themselves run under nohup, too."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "x.npz"
    np.savez(path, images=np.random.default_rng(0).random((20, 3, 3), np.float32))
    return str(path)


def config(data, out, **options):
    options = {"width": 8, "depth": 1, "levels": 2, "batch_size": 4, "steps": STEPS, **options}
    return TrainConfig(data=data, out=out, **options)


def state_of(out):
    """What a run is at its end, the time that it took apart."""
    save = saves.of_run(out)[0]
    from safetensors.torch import load

    tensors = load(save.read("state.safetensors"))
    del tensors["metrics.seconds"]
    lines = metrics.read(out)
    seconds = [line.pop("seconds") for line in lines]
    assert seconds == sorted(seconds)
    return {**tensors, **run_folder.read_weights(out)}, lines


@pytest.fixture
def whole(tmp_path, data):
    list(fit(config(data, tmp_path / "whole")))
    return state_of(tmp_path / "whole")


def same(one, two):
    return (
        one[0].keys() == two[0].keys()
        and all(torch.equal(one[0][k], two[0][k]) for k in one[0])
        and one[1] == two[1]
    )


@contextlib.contextmanager
def at_line(number, action):
    """`action` when the number-th line of fastscore's or torch's Python begins, here."""
    left = [number]

    def trace(frame, event, argument):
        path = frame.f_code.co_filename
        if not ("/fastscore/" in path or "/torch/optim/" in path):
            return None
        if event == "line":
            left[0] -= 1
            if left[0] == 0:
                action()
        return trace

    sys.settrace(trace)
    try:
        yield left
    finally:
        sys.settrace(None)


def interrupted(config, number, which):
    """Train until the signal at that line; whether it was heeded before the end."""
    with at_line(number, lambda: signal.raise_signal(which)):
        try:
            train.train(config)
        except SystemExit as stop:
            assert stop.code == 128 + which
            return True
    return False


@pytest.mark.parametrize(
    "count", [15, pytest.param(150, marks=pytest.mark.slow(minutes=2), id="150-slow")]
)
def test_a_signal_at_any_line_changes_nothing(tmp_path, data, whole, monkeypatch, capsys, count):
    """0 of other weights, 0 of other records, 0 tracebacks; each exit status 128 + the signal."""
    monkeypatch.setattr(train, "_finish", lambda *_: None)
    with at_line(-1, None) as left:
        train.train(config(data, tmp_path / "counted"))
    lines = -1 - left[0]
    assert lines > 3000

    rng, differing, heeded = random.Random(0), [], 0
    for k in range(count):
        out = tmp_path / str(k)
        number = rng.randrange(lines // 20, lines - 50)
        heeded += interrupted(config(data, out), number, rng.choice(signals.ENDING))
        told = "interrupted; the run is saved, go on with --resume" in capsys.readouterr().out
        if told:
            train.train(TrainConfig(out=out, resume=True))
        if not same(state_of(out), whole):
            differing.append(number)
    print(f"{count} signals, {heeded} heeded: {len(differing)} differ")
    assert differing == [] and heeded > count / 2


@pytest.mark.parametrize("which", signals.ENDING)
def test_a_signal_is_heeded_whatever_the_parent_ignored(tmp_path, data, monkeypatch, which):
    """But for a SIGHUP under nohup."""
    monkeypatch.setattr(train, "_finish", lambda *_: None)
    before = {number: signal.signal(number, signal.SIG_IGN) for number in signals.ENDING}
    try:
        heeded = interrupted(config(data, tmp_path / "run"), 2000, which)
        assert all(signal.getsignal(number) == signal.SIG_IGN for number in signals.ENDING)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert heeded == (which != signal.SIGHUP)


@pytest.mark.parametrize("moment", ["save_loss_curve", "save_grid"])
def test_a_signal_during_the_last_pictures_leaves_without_a_traceback(
    tmp_path, data, monkeypatch, capsys, moment
):
    whole = getattr(pictures, moment)

    def ended(*arguments, **options):
        signal.raise_signal(signal.SIGTERM)
        return whole(*arguments, **options)

    monkeypatch.setattr(pictures, moment, ended)
    out = tmp_path / "run"
    with pytest.raises(SystemExit) as stop:
        train.train(config(data, out))
    assert stop.value.code == 143
    assert "the run is saved, its pictures are not all drawn" in capsys.readouterr().out
    assert saves.of_run(out)[0].step == STEPS and not (out / "levels.png").exists()


def test_ctrl_c_leaves_pictures_of_what_there_is(tmp_path, data):
    out = tmp_path / "run"
    assert interrupted(config(data, out), 5000, signal.SIGINT)
    assert 0 < saves.of_run(out)[0].step < STEPS and (out / "samples.png").exists()


def test_a_second_signal_ends_at_once(tmp_path, data):
    """What was saved before is there, and the run goes on from it."""
    program = f"""if True:
        import os, signal
        from fastscore.cli import fit, train
        from fastscore.cli.config import TrainConfig
        fit.SAVE_EVERY = 5
        whole = fit.run_folder.save
        def save(*arguments, **options):
            if arguments[4] == 10:
                os.kill(os.getpid(), signal.SIGTERM)
                os.kill(os.getpid(), signal.SIGTERM)
            return whole(*arguments, **options)
        fit.run_folder.save = save
        train.train(TrainConfig(data={data!r}, out={str(tmp_path / "run")!r}, width=8, depth=1,
            levels=2, batch_size=4, steps={STEPS}))
    """
    ended = children.run([sys.executable, "-c", program])
    assert ended.returncode == -signal.SIGTERM and "Traceback" not in ended.stderr, ended
    list(fit(TrainConfig(out=tmp_path / "run", resume=True)))
    list(fit(config(data, tmp_path / "whole")))
    one, two = (state_of(tmp_path / name) for name in ("run", "whole"))
    assert all(torch.equal(one[0][k], two[0][k]) for k in two[0])


def test_an_exception_in_the_middle_of_a_step_saves_no_half_step(
    tmp_path, data, whole, monkeypatch
):
    """Ctrl-C in a notebook, say: weights of one step and averages of another were saved as one."""
    out = tmp_path / "run"
    step = torch.optim.Adam.step

    def broken(self, *arguments, **options):
        found = step(self, *arguments, **options)
        if next(iter(self.state.values()))["step"] == 8:
            raise KeyboardInterrupt
        return found

    monkeypatch.setattr(torch.optim.Adam, "step", broken)
    with pytest.raises(KeyboardInterrupt):
        list(fit(config(data, out)))
    monkeypatch.undo()
    assert saves.of_run(out)[0].step == 5
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fitting, "RECORD_EVERY", 4)
        list(fit(TrainConfig(out=out, resume=True)))
    assert same(state_of(out), whole)


def test_a_loss_that_is_not_finite_saves_the_step_before(tmp_path, data, monkeypatch):
    out = tmp_path / "run"
    objective = fitting.objective
    monkeypatch.setattr(
        fitting,
        "objective",
        lambda *a, **o: objective(*a, **o) * (float("nan") if a[-1] == 7 else 1),
    )
    with pytest.raises(FloatingPointError, match="the loss is nan at step 7"):
        list(fit(config(data, out)))
    assert saves.of_run(out)[0].step == 7


def test_weights_that_are_not_finite_are_not_saved_and_hide_no_message(tmp_path, data, monkeypatch):
    out = tmp_path / "run"
    objective = fitting.objective

    def broken(config, net, *things, **options):
        if things[-1] == 7:
            next(net.parameters()).data.fill_(float("inf"))
        return objective(config, net, *things, **options)

    monkeypatch.setattr(fitting, "objective", broken)
    with pytest.raises(FloatingPointError, match=r"at step 7; the weights are not finite"):
        list(fit(config(data, out)))
    assert [save.step for save in saves.of_run(out)] == [5]


@pytest.mark.parametrize("which", signals.ENDING)
def test_a_job_of_drawing_that_a_signal_ends_goes_on(tmp_path, data, monkeypatch, which):
    list(fit(config(data, tmp_path / "run")))
    job = ("sample", tmp_path / "run", "-n", "6", "--batch-size", "2", "--out")
    assert run_here(*job, tmp_path / "whole.npz").returncode == 0
    reach, reached = progress.Progress.reach, []

    def signalled(self, done, loss=None):
        reached.append(done)
        if len(reached) == 5:
            signal.raise_signal(which)
        return reach(self, done, loss)

    monkeypatch.setattr(progress.Progress, "reach", signalled)
    ended = run_here(*job, tmp_path / "parts.npz")
    assert ended.returncode == 128 + which and not (tmp_path / "parts.npz").exists()
    assert "keeps the finished batches, the same command goes on" in ended.stderr
    # Of the first batch, all of it; of the second, what was there is drawn again.
    assert len(reached) == 5
    assert run_here(*job, tmp_path / "parts.npz").returncode == 0
    one, two = (np.load(tmp_path / name)["images"] for name in ("whole.npz", "parts.npz"))
    assert (one == two).all()
    assert not list(tmp_path.glob("*.parts"))


def test_ctrl_c_is_a_traceback_in_no_command(tmp_path, data, monkeypatch):
    list(fit(config(data, tmp_path / "run", held_out=5)))

    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(held_out, "density", interrupted)
    ended = run_here("evaluate", tmp_path / "run", "-n", "4", "--likelihood")
    assert (ended.returncode, ended.stderr) == (130, "interrupted\n")


def test_other_threads_have_no_signals_to_heed():
    found = []

    def enter():
        with signals.stop_on_signals() as stop:
            found.append(bool(stop))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert found == [False]


def test_the_command_ends_with_the_documented_status(tmp_path, data):
    """Started in a script's background, which ignores SIGINT."""
    out = tmp_path / "run"
    command = [sys.executable, "-m", "fastscore", "train", "--data", data, "--out", str(out)]
    options = ["--width", "8", "--depth", "1", "--levels", "2", "--steps", "1000000"]
    process = subprocess.Popen(
        [*command, *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
    )
    try:
        for _ in range(600):
            if (out / "metrics.jsonl").exists():
                break
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.1)
        process.terminate()
        printed, told = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 143, (printed, told)
    assert "interrupted; the run is saved" in printed and "Traceback" not in told
    assert saves.of_run(out)[0].step >= 100
