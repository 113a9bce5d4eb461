"""A conditional job goes on after an interruption, shows its path and splits over ranks.

Its samples are the same, bit for bit.
"""

import io
import sys

import children
import numpy as np
import pytest
from PIL import Image

from fastscore import cli, sampling

CONDITIONS = {
    "inpainting": "inpaint=held-out:3,right-half --guidance replace --observation-noise 0.1",
    "super-resolution": "super_resolution=held-out:3,2",
    "a class and an observation": "class=3 deblur=held-out:3,0.8 --classifier CLASSES --scale 2 "
    "--observation-noise 0.1",
}
# Nine samples in five batches, of which the path needs four.
JOB = "-n 9 --batch-size 2 --steps-per-level 2 --seed 3"
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def command(folders, out, condition, *more):
    words = CONDITIONS[condition].replace("CLASSES", str(folders / "classes")).split()
    options = [*JOB.split(), "--out", out, "--condition", *words, *more]
    return ["sample", str(folders / "score"), *map(str, options)]


@pytest.fixture
def fastscore(monkeypatch):
    """The command line in this process; its exit status."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["fastscore", *words])
        try:
            cli.main()
        except SystemExit as stop:
            return stop.code or 0
        return 0

    return run


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    small = "--steps 40 --width 32 --depth 1 --levels 3 --held-out 300".split()
    for name, task in (("score", "score"), ("classes", "classifier")):
        words = ["fastscore", "train", "--task", task, "--out", str(folder / name), *small]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", words)
            cli.main()
    return folder


def images(path):
    return np.load(path)["images"]


@pytest.mark.parametrize("condition", CONDITIONS)
def test_an_interrupted_conditional_job_goes_on(
    tmp_path, folders, fastscore, monkeypatch, capsys, condition
):
    assert fastscore(*command(folders, tmp_path / "whole.npz", condition)) == 0
    begun, states = [], sampling.states

    def interrupted(*arguments, **options):
        if options["shape"][0]:   # not the one that only checks
            begun.append(options["first_sample"])
            if len(begun) == 3:
                raise KeyboardInterrupt
        return states(*arguments, **options)

    monkeypatch.setattr(sampling, "states", interrupted)
    stopped = fastscore(*command(folders, tmp_path / "parts.npz", condition))
    assert stopped == 130 and "the same command goes on" in capsys.readouterr().err
    assert not (tmp_path / "parts.npz").exists()
    assert fastscore(*command(folders, tmp_path / "parts.npz", condition)) == 0
    assert begun == [0, 2, 4, 4, 6, 8]
    assert (images(tmp_path / "parts.npz") == images(tmp_path / "whole.npz")).all()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["parts.npz", "whole.npz"]


@pytest.mark.parametrize("condition", CONDITIONS)
def test_a_conditional_job_shows_its_path(tmp_path, folders, fastscore, condition):
    """A row for each of the first eight samples, of whichever batches; the last column is it."""
    out, path = tmp_path / "x.npz", tmp_path / "path.png"
    assert fastscore(*command(folders, out, condition, "--path", path)) == 0
    strip = np.asarray(Image.open(io.BytesIO(path.read_bytes())))[::4, ::4]
    assert strip.shape == (8 * 9 + 1, 4 * 9 + 1)   # three levels and the last, noise-free step
    shown = np.stack([strip[9 * k + 1 :, 28:][:8, :8] for k in range(8)])
    assert (shown == (images(out)[:8, 0] * 255).round()).all()


@pytest.mark.processes
def test_a_conditional_job_on_two_ranks_draws_what_one_draws(tmp_path, folders, fastscore):
    condition = "a class and an observation"
    one = command(folders, tmp_path / "one.npz", condition, "--path", tmp_path / "one.png")
    assert fastscore(*one) == 0
    two = command(folders, tmp_path / "two.npz", condition, "--path", tmp_path / "two.png")
    done = children.run([*TORCHRUN, "-m", "fastscore", *two])
    assert done.returncode == 0 and done.stdout.count("9 samples") == 1, done.stderr

    one, two = (np.load(tmp_path / f"{name}.npz") for name in ("one", "two"))
    for name in ("images", "observation", "original"):
        assert (one[name] == two[name]).all()
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()
