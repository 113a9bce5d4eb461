"""The command line: a small run, resuming, and one-sentence errors that leave nothing behind."""

import contextlib
import json
import signal
import sys

import children
import numpy as np
import pytest
import torch
from commands import run_here

from fastscore import datasets, sampling
from fastscore.cli import draw, metrics, run_folder, sample, train
from fastscore.cli.config import TrainConfig
from fastscore.cli.fit import fit
from fastscore.cli.parts import Parts
from fastscore.cli.sampler_options import SamplerOptions
from fastscore.training import checkpoint


def run(*arguments):
    return children.run([sys.executable, "-m", "fastscore", *arguments])


SMALL = ("--steps", "200", "--width", "32", "--depth", "1", "--levels", "4")


@pytest.mark.processes
def test_train_sample_evaluate(tmp_path):
    out = tmp_path / "run"
    assert (
        run("train", "--data", "digits", "--out", out, "--held-out", "300", *SMALL).returncode == 0
    )
    for name in (
        "config.toml",
        "metrics.jsonl",
        "step-000000200/weights.safetensors",
        "samples.png",
        "levels.png",
        "loss.png",
    ):
        assert (out / name).stat().st_size > 0
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert records[-1]["step"] == 200 and records[-1]["loss"] < records[0]["loss"]
    assert run_here("sample", out, "-n", "4", "--out", tmp_path / "four.npz").returncode == 0
    assert (
        run_here(
            "sample", out, "-n", "2", "--first-sample", "2", "--out", tmp_path / "two.npz"
        ).returncode
        == 0
    )
    four, two = (np.load(tmp_path / f"{name}.npz")["images"] for name in ("four", "two"))
    assert np.allclose(four[2:], two, atol=1e-4)
    assert "nearest training image" in run_here("evaluate", out, "-n", "50").stdout
    again = run_here("train", "--data", "digits", "--out", out, *SMALL)
    assert again.returncode == 2 and "exists already" in again.stderr


@pytest.mark.parametrize("task", ["score", "classifier"])
@pytest.mark.processes
def test_sigterm_saves_like_ctrl_c(tmp_path, monkeypatch, capsys, task):
    """At once, even if Ctrl-C is ignored, as in a script's background; the handler goes."""
    options = {"width": 16, "depth": 1, "levels": 2, "batch_size": 8, "held_out": 0}
    config = TrainConfig(out=tmp_path / "run", task=task, steps=50, **options)

    def terminated(config):
        with contextlib.closing(fit(config)) as loop:
            for step, loss in loop:
                if step == 4:
                    signal.raise_signal(signal.SIGTERM)
                yield step, loss

    monkeypatch.setattr(train, "fit", terminated)
    # Without the handler the run would go on to its end.
    before = signal.signal(
        signal.SIGTERM, signal.SIG_IGN
    )
    interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with pytest.raises(SystemExit) as stop:
            train.train(config)
        assert stop.value.code == 143
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)
        signal.signal(signal.SIGINT, interrupt)
    assert "interrupted; the run is saved" in capsys.readouterr().out
    with contextlib.closing(fit(TrainConfig(out=tmp_path / "run", task=task, resume=True))) as loop:
        assert next(loop)[0] == 5


def test_a_resumed_run_ends_where_the_whole_run_ends(tmp_path):
    def config(folder, steps, resume=False):
        return TrainConfig(
            out=tmp_path / folder,
            steps=steps,
            width=16,
            depth=1,
            levels=3,
            batch_size=32,
            resume=resume,
        )

    for _ in fit(config("whole", 40)):
        pass
    interrupted = fit(config("parts", 40))
    for _ in range(15):
        next(interrupted)
    interrupted.close()
    for _ in fit(config("parts", 40, resume=True)):
        pass
    whole, parts = (
        run_folder.read_weights(tmp_path / f) for f in ("whole", "parts")
    )
    assert all(torch.equal(whole[k], parts[k]) for k in whole)

    # A record is of all steps since the last, those before the interruption among them.
    lines = [metrics.read(tmp_path / f) for f in ("whole", "parts")]
    assert all(line.pop("seconds") >= 0 for line in lines[0] + lines[1])
    assert lines[0] == lines[1] and len(lines[0]) == 1


@pytest.mark.parametrize(
    "options, message",
    [
        ({"loss": "sliced", "projections": 0}, "projections must be at least 1"),
        (
            {"loss": "sliced", "distribution": "uniform"},
            "distribution must be one of rademacher, gaussian, sphere",
        ),
        (
            {"projections": 4},
            "projections and distribution belong to the sliced losses; the loss is denoising",
        ),
    ],
)
def test_options_of_a_loss_are_checked_before_anything_is_written(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        fit(TrainConfig(out=tmp_path / "run", **options))
    assert not (tmp_path / "run").exists()


def test_the_loss_is_trained_and_recorded(tmp_path):
    """Each sliced or exact loss falls below zero, where an untrained score stands.

    What was asked for is in config.toml.
    """
    for loss in ("sliced", "sliced-vr", "exact"):
        options = {"projections": 2, "distribution": "sphere"} if loss != "exact" else {}
        np.savez(
            tmp_path / "x.npz",
            images=np.random.default_rng(0).uniform(0.4, 0.6, (64, 2, 2)).astype(np.float32),
        )
        config = TrainConfig(
            data=str(tmp_path / "x.npz"),
            out=tmp_path / loss,
            loss=loss,
            steps=120,
            width=16,
            depth=1,
            levels=3,
            batch_size=64,
            **options,
        )
        for _ in fit(config):
            pass
        assert (
            json.loads((tmp_path / loss / "metrics.jsonl").read_text().splitlines()[-1])["loss"]
            < -0.05
        )
        recorded = run_folder.open_run(tmp_path / loss).config
        assert [getattr(recorded, k) for k in ("loss", "projections", "distribution")] == [
            loss,
            config.projections,
            config.distribution,
        ]


def test_resuming_keeps_the_options_of_the_run_and_refuses_others(tmp_path):
    options = {
        "out": tmp_path / "run",
        "width": 16,
        "depth": 1,
        "levels": 3,
        "batch_size": 32,
        "held_out": 300,
        "loss": "sliced",
    }
    for _ in fit(TrainConfig(steps=5, **options)):
        pass
    # 9: done after the last save, by a run that was killed.
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
        file.write('{"step": 9}\n')
    for _ in fit(TrainConfig(out=tmp_path / "run", steps=8, resume=True)):
        pass
    config, _ = run_folder.read_config(tmp_path / "run")
    assert config == TrainConfig(**{**options, "out": str(options["out"])}, steps=8)
    assert [
        json.loads(line)["step"]
        for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ] == [5, 8]
    with pytest.raises(ValueError, match="has held_out 300, which --resume cannot change; got 10"):
        fit(TrainConfig(out=tmp_path / "run", held_out=10, resume=True))
    with pytest.raises(
        ValueError, match="has done 8 steps already; steps must be at least that; got 3"
    ):
        next(fit(TrainConfig(out=tmp_path / "run", steps=3, resume=True)))
    with pytest.raises(FloatingPointError, match="the state is not finite after level"):
        draw.draw_run(tmp_path / "run", 2, step_size=1e6)
    with pytest.raises(ValueError, match="steps_per_level must be at least 1; got 0"):
        draw.draw_run(tmp_path / "run", 2, steps_per_level=0)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run folder, barely trained."""
    out = tmp_path_factory.mktemp("runs") / "run"
    for _ in fit(TrainConfig(out=out, width=16, depth=1, levels=3, batch_size=32, steps=20)):
        pass
    return out


def job_of(run, n, **options):
    return draw.prepare(*run_folder.open_run(run)[:3], n, **options)


def drawn(job, parts=None, done=None):
    """(samples, path)."""
    return draw.draw(job, done=done, parts=None if parts is None else Parts(parts, job.depends_on))[
        :2
    ]


@pytest.mark.parametrize(
    "sampler, options, states",
    [
        ("annealed_langevin", {"steps_per_level": 2}, 4),
        ("annealed_langevin", {"steps_per_level": 2, "denoise": False, "temperature": 0.5}, 3),
        ("consistent_annealed", {}, 3),
        ("predictor_corrector", {"snr": 0.1, "predictor": "ancestral"}, 3),
        ("probability_flow", {"method": "euler"}, 3),
        ("probability_flow", {"denoise": False}, 2),
    ],
)
def test_an_interrupted_job_goes_on_and_ends_where_the_whole_one_ends(
    tmp_path, trained, sampler, options, states
):
    """Finished batches are not drawn again; path and count of states are the same, too."""
    options = {"sampler": sampler, "batch_size": 4, "seed": 3, **options}
    job, seen = job_of(trained, 10, **options), []
    whole, path = drawn(job, done=seen.append)
    assert sum(seen) == 3 * states == job.batches * job.states
    assert path.shape[:2] == (states, 8) and torch.equal(path[-1], whole[:8])

    def interrupt(count):
        seen.append(count)
        if len(seen) == states + 1:   # in the second batch
            raise KeyboardInterrupt

    seen.clear()
    with pytest.raises(KeyboardInterrupt):
        drawn(job, tmp_path / "parts", interrupt)
    assert sorted(p.name for p in (tmp_path / "parts").glob("*.safetensors")) == ["0-4.safetensors"]
    seen.clear()
    rest, path2 = drawn(job, tmp_path / "parts", seen.append)
    assert (
        torch.equal(rest, whole)
        and torch.equal(path2, path)
        and seen == [states] + [1] * 2 * states
    )
    assert [p.name for p in tmp_path.iterdir()] == ["parts"]


@pytest.mark.parametrize(
    "other", [{"seed": 4}, {"initial_law": "gaussian"}, {"batch_size": 5}, {"denoise": False}]
)
def test_batches_of_another_job_are_not_taken(tmp_path, trained, other):
    options = {"batch_size": 4, "seed": 3, "steps_per_level": 1}
    drawn(job_of(trained, 10, **options), tmp_path / "parts")
    (name,) = other
    with pytest.raises(
        ValueError,
        match=rf"holds batches of another job \({name} differ\); remove it or write elsewhere",
    ):
        drawn(job_of(trained, 10, **{**options, **other}), tmp_path / "parts")


def test_ranks_that_finish_a_batch_at_once_share_a_folder(tmp_path):
    one, two = (Parts(tmp_path / "parts", {"seed": 3}) for _ in range(2))
    one.save(0, 2, {"x": torch.zeros(2)})
    two.save(2, 4, {"x": torch.ones(2)})
    assert torch.equal(one.load(2, 4)["x"], torch.ones(2)) and one.load(4, 6) is None
    late = Parts(tmp_path / "parts2", {"seed": 4})
    Parts(tmp_path / "parts2", {"seed": 3}).save(0, 2, {"x": torch.zeros(2)})
    with pytest.raises(ValueError, match="seed differ"):
        late._claim()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["parts", "parts2"]


def test_the_start_can_be_chosen_on_the_command_line(tmp_path, trained):
    options = (
        "-n",
        "3",
        "--sampler",
        "annealed_langevin",
        "--steps-per-level",
        "1",
        "--out",
        tmp_path / "x.npz",
    )
    done = run_here("sample", trained, *options, "--initial-law", "gaussian")
    assert done.returncode == 0, done.stderr
    expected = draw.draw_run(trained, 3, steps_per_level=1, initial_law="gaussian", seed=0).samples
    unlike = draw.draw_run(trained, 3, steps_per_level=1, seed=0).samples
    found = torch.from_numpy(np.load(tmp_path / "x.npz")["images"])
    assert torch.equal(found, expected.clamp(0, 1)) and not torch.equal(found, unlike.clamp(0, 1))
    done = run_here("sample", trained, *options, "--initial-law", "normal")
    assert (
        done.returncode == 2
        and done.stderr
        == "error: sample: initial_law must be one of uniform, gaussian; got 'normal'.\n"
    )


@pytest.mark.processes
def test_sample_takes_a_sampler_and_leaves_nothing_but_its_files(tmp_path, trained):
    out = tmp_path / "x.npz"
    done = run(
        "sample",
        trained,
        "-n",
        "5",
        "--batch-size",
        "2",
        "--sampler",
        "predictor_corrector",
        "--snr",
        "0.1",
        "--out",
        out,
        "--path",
        tmp_path / "path.png",
    )
    assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["path.png", "x.npz"]
    expected = draw.draw_run(
        trained, 5, sampler="predictor_corrector", snr=0.1, batch_size=2
    ).samples
    assert np.allclose(np.load(out)["images"], expected.clamp(0, 1).numpy(), atol=1e-6)


def test_an_interrupted_sample_says_what_it_keeps(tmp_path, trained, monkeypatch, capsys):
    def interrupted(*_, parts, **__):
        parts.folder.mkdir()
        raise KeyboardInterrupt

    monkeypatch.setattr(draw, "draw", interrupted)
    with pytest.raises(SystemExit, match="130"):
        sample.sample(sample.SampleOptions(trained, n=3, batch_size=1, out=tmp_path / "x.npz"))
    kept = "x.npz.parts keeps the finished batches, the same command goes on"
    assert kept in capsys.readouterr().err
    assert not (tmp_path / "x.npz").exists()


@pytest.mark.parametrize(
    "options, error",
    [
        ({"corrector_steps": -1, "sampler": "predictor_corrector"}, ValueError),
        ({"step_size": 1e30}, FloatingPointError),
    ],
    ids=["refused", "diverged"],
)
def test_a_job_that_ends_without_a_batch_leaves_nothing_that_a_better_one_could_trip_over(
    tmp_path, trained, options, error
):
    job = {"n": 3, "batch_size": 1, "out": tmp_path / "x.npz"}
    with pytest.raises(error):
        sample.sample(sample.SampleOptions(trained, SamplerOptions(**options), **job))
    assert not list(tmp_path.iterdir())
    sample.sample(sample.SampleOptions(trained, **job))
    assert [p.name for p in tmp_path.iterdir()] == ["x.npz"]


def test_an_output_that_is_a_folder_is_refused_before_anything_is_drawn(tmp_path, trained):
    (tmp_path / "x.npz").mkdir()
    with pytest.raises(ValueError, match="is a folder; it must be the name of a file"):
        sample.SampleOptions(trained, out=tmp_path / "x.npz")


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"sampler": "magic"},
            "sampler must be one of annealed_langevin, consistent_annealed, predictor_corrector, "
            "probability_flow",
        ),
        ({"sampler": "probability_flow", "snr": 0.1}, "snr cannot be chosen for probability_flow"),
        ({"method": "heun"}, "method cannot be chosen for annealed_langevin"),
        ({"sampler": "consistent_annealed", "step_size": 1.0}, "step_size must lie between"),
        ({"step_size": 1e-3, "step_lr": 1e-3}, "give either step_size"),
    ],
)
def test_options_of_another_sampler_are_refused(trained, options, message):
    with pytest.raises(ValueError, match=message):
        draw.draw_run(trained, 2, **options)


def test_a_long_path_is_thinned(trained):
    def run(count):
        for step in range(count):
            yield sampling.State(step, 1.0, torch.full((9, 1, 2, 2), float(step)), step + 1)

    for count in (1, 128, 129, 1000):
        path = draw.followed(run(count), count, 8, lambda states: None)[1][:, 0, 0, 0, 0]
        assert (
            len(path) <= 129
            and path[0] == 0
            and path[-1] == count - 1
            and bool((path.diff() > 0).all())
        )


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--data", "nope"), "data must be digits, mnist, fashion"),
        (("--data", "EMPTY"), "holds no images"),
        (("--data", "BROKEN"), "is not a readable PNG or JPEG image"),
        (("--levels", "1"), "n must be an int of at least 2"),
        (("--sigma-min", "2"), "sigma_max > sigma_min > 0"),
        (("--lr", "nan"), "lr must be positive and finite"),
        (("--steps", "0"), "steps must be at least 1"),
        (("--ema-decay", "2"), r"ema_decay must be in [0, 1); got 2.0"),
        (("--network", "cnn"), "network must be one of mlp, ncsn, unet"),
        (("--loss", "ssm"), "loss must be one of denoising, denoising-vr, sliced, sliced-vr, "),
    ],
)
def test_a_wrong_value_is_one_sentence_and_leaves_nothing(tmp_path, arguments, message):
    (tmp_path / "EMPTY").mkdir()
    (tmp_path / "BROKEN").mkdir()
    (tmp_path / "BROKEN" / "a.png").write_bytes(b"no image")
    arguments = [tmp_path / a if a in ("EMPTY", "BROKEN") else a for a in arguments]
    result = run_here("train", "--out", tmp_path / "run", *arguments)
    assert result.returncode == 2 and message in result.stderr and result.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_damaged_weights_are_refused_and_nan_is_never_saved(tmp_path):
    checkpoint.save(tmp_path / "w", {"a": torch.ones(3)})
    with pytest.raises(ValueError, match="must be finite"):
        checkpoint.save(tmp_path / "w", {"a": torch.tensor([float("nan")])})
    assert torch.equal(checkpoint.load(tmp_path / "w")["a"], torch.ones(3))
    (tmp_path / "plain").write_bytes(b"")
    assert (tmp_path / "w").stat().st_mode == (
        tmp_path / "plain"
    ).stat().st_mode  # readable by whom it would be
    data = bytearray((tmp_path / "w").read_bytes())
    data[-1] ^= 1
    (tmp_path / "w").write_bytes(bytes(data))
    with pytest.raises(ValueError, match="is damaged"):
        checkpoint.load(tmp_path / "w")


def test_folders_and_archives_of_images(tmp_path):
    from PIL import Image

    for i in range(3):
        Image.fromarray(np.full((4, 4), 51 * i, np.uint8)).save(tmp_path / f"{i}.png")
    images, labels = datasets.load(tmp_path)
    assert (
        images.shape == (3, 1, 4, 4)
        and labels is None
        and torch.allclose(images[:, 0, 0, 0], torch.tensor([0, 0.2, 0.4]))
    )
    np.savez(tmp_path / "x.npz", images=np.zeros((2, 6, 5, 3), np.uint8), labels=np.array([1, 2]))
    images, labels = datasets.load(tmp_path / "x.npz")
    assert images.shape == (2, 3, 6, 5) and labels.tolist() == [1, 2]


@pytest.mark.processes
def test_doctor_passes():
    result = run("doctor")
    assert (
        result.returncode == 0
        and "denoising_loss                 cpp        yes  self-test ok" in result.stdout
    )


@pytest.mark.processes
def test_help_loads_what_it_shows_and_nothing_heavy():
    """`fastscore --help` takes 1.2 times the processor time of `import torch`."""
    heavy = (
        "torch._dynamo",
        "PIL",
        "matplotlib",
        "sklearn",
        "mlxtend",
        "safetensors",
        "diffusers",
        "scipy",
        "tomli_w",
    )
    program = f"""if True:
        import sys
        from fastscore.cli import main
        sys.argv = ["fastscore", "--help"]
        try:
            main()
        finally:
            print([name for name in {heavy} if name in sys.modules], file=sys.stderr)
    """
    result = children.run([sys.executable, "-c", program])
    assert result.returncode == 0 and "{train,sample,evaluate,recipe,demo,doctor}" in result.stdout
    assert result.stderr.strip() == "[]"
