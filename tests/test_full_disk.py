"""A full disk: what was there before is whole, nothing is truncated, and one sentence says what."""

import builtins
import contextlib
import errno
import os
import re
import resource
import shutil
import subprocess

import numpy as np
import pytest
import torch
from commands import run_here
from killing import Around
from test_saves import Run, begun, going_on, lines

from fastscore.cli import draw, pictures, run_folder, sample
from fastscore.cli import fit as fitting
from fastscore.cli.config import TrainConfig
from fastscore.cli.fit import fit
from fastscore.training import checkpoint, files, saves

FULL = r"could not be written: no space left on device; .* are free\. What was saved before is"


class Short(Around):
    """A file of a disk that has room for the first half of what is written."""

    def __init__(self, file, fail):
        super().__init__(file)
        self.fail = fail

    def write(self, data):
        data = bytes(data)
        if self.fail():
            self.file.write(data[: len(data) // 2])
            self.file.flush()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self.file.write(data)


@contextlib.contextmanager
def full_at(number):
    """The number-th write or fsync, and no other, finds the disk full; yields what is left."""
    left = [number]

    def fail():
        left[0] -= 1
        return left[0] == 0

    def opened(path, mode="r", *arguments, **options):
        file = whole_open(path, mode, *arguments, **options)
        return file if mode in ("r", "rb") else Short(file, fail)

    def fsync(descriptor):
        if fail():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return whole_fsync(descriptor)

    whole_open, whole_fsync = builtins.open, os.fsync
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builtins, "open", opened)
        patch.setattr(os, "fsync", fsync)
        yield left


def test_a_save_that_finds_the_disk_full_anywhere_leaves_the_one_before(tmp_path):
    run, number, left = Run(), 0, [0]
    while left[0] <= 0:
        number += 1
        out = tmp_path / str(number)
        begun(out)
        going_on(run, out, 2, lambda step: None)
        told = None
        with full_at(number) as left:
            try:
                going_on(run, out, 1, lambda step: None)
            except OSError as error:
                told = error
        if left[0] > 0:
            assert told is None
            break
        assert type(told) is OSError and told.errno == errno.ENOSPC, number
        assert re.search(FULL, str(told)), (number, told)
        assert str(out) in str(told) and "\n" not in str(told)

        # Without a start that sweeps.
        assert not [path for path in out.rglob("*") if files.is_temporary(path)], number
        assert (out / "metrics.jsonl").read_bytes()[-1:] == b"\n"
        done = run.restored(out).steps_done
        assert done in (2, 3) and run.steps() == {float(done)}
        assert [line["step"] for line in lines(out)] == list(range(1, done + 1))
        shutil.rmtree(out)
    print(f"{number - 1} points; 0 wrong")
    assert number > 10


def small_tmpfs(folder, kilobytes):
    folder.mkdir()
    options = ["-o", f"size={kilobytes}k", "none", str(folder)]
    made = subprocess.run(["mount", "-t", "tmpfs", *options], capture_output=True)
    if made.returncode:
        pytest.skip("mounting a small disk needs root; the other tests need none")
    return folder


@pytest.mark.processes
def test_training_and_sampling_on_a_small_disk(tmp_path, monkeypatch):
    """A real one, of 128 kB."""
    np.savez(tmp_path / "x.npz", images=np.random.default_rng(0).random((20, 3, 3), np.float32))
    monkeypatch.setattr(fitting, "SAVE_EVERY", 5)
    disk = small_tmpfs(tmp_path / "disk", 128)
    try:
        options = {"width": 12, "depth": 1, "levels": 2, "batch_size": 4, "steps": 5}
        out = disk / "run"
        list(fit(TrainConfig(data=str(tmp_path / "x.npz"), out=out, **options)))
        before = run_folder.read_weights(out)
        (disk / "ballast").write_bytes(bytes(os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize))
        told = run_here("train", "--resume", "--out", out, "--steps", "20")
        assert told.returncode == 2 and told.stderr.count("\n") == 1, told
        assert "could not be written: no space left on device; it needs" in told.stderr
        assert "0 bytes are free" in told.stderr, told.stderr

        for name in ("x.npz", "x.png"):
            told = run_here("sample", out, "-n", "64", "--out", disk / name)
            assert told.returncode == 2 and told.stderr.count("\n") == 1, told.stderr
            assert f"{disk / name} could not be written: no space left" in told.stderr
            assert not (disk / name).exists()

        (disk / "ballast").unlink()
        after = run_folder.read_weights(out)
        assert all(torch.equal(before[k], after[k]) for k in before)
        assert not [path for path in disk.rglob("*") if files.is_temporary(path)]
        list(fit(TrainConfig(out=out, resume=True, steps=6)))
        assert saves.of_run(out)[0].step == 6
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.fixture
def limited():
    """No file may be longer than 1,000 bytes, as the kernel sees to it."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    @contextlib.contextmanager
    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return limit


@pytest.mark.parametrize("kind", ["weights", "npz", "png", "save"])
def test_a_file_that_is_too_long_is_not_there_in_part(tmp_path, limited, kind):
    x = torch.rand(16, 1, 8, 8)
    names = {"weights": "w", "npz": "x.npz", "png": "x.png", "save": "step-000000001"}
    path = tmp_path / names[kind]
    write = {
        "weights": lambda: checkpoint.save(path, {"x": x}),
        "npz": lambda: sample.write(path, draw.Drawn(x, x[None], {})),
        "png": lambda: pictures.save_grid(path, x),
        "save": lambda: saves.commit(tmp_path, 1, {"w": bytes(2000)}),
    }[kind]
    with limited(), pytest.raises(OSError) as told:
        write()
    assert told.value.errno == errno.EFBIG and str(told.value).startswith(
        f"{path} could not be written: file too large; it needs "
    )
    assert list(tmp_path.iterdir()) == []
    write()
    assert path.exists()
