"""What `fastscore train` does beside the loop: files of options, saves that are kept, held-out
losses, precision, what is not finite."""

import functools
import importlib.util
import math
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load

from fastscore import cli, losses
from fastscore.cli import board, metrics, networks, run_folder, splits, train
from fastscore.cli import fit as fitting
from fastscore.cli.config import TrainConfig
from fastscore.cli.fit import fit
from fastscore.training import saves

SMALL = {"width": 8, "depth": 1, "levels": 3, "batch_size": 4, "steps": 12}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "x.npz"
    rng = np.random.default_rng(0)
    np.savez(path, images=rng.random((40, 4, 4), np.float32), labels=rng.integers(0, 3, 40))
    return str(path)


@pytest.fixture(autouse=True)
def often(monkeypatch):
    """Records and saves within few steps."""
    monkeypatch.setattr(fitting, "SAVE_EVERY", 2)
    monkeypatch.setattr(fitting, "RECORD_EVERY", 4)


def config(data, out, **options):
    return TrainConfig(**{**SMALL, "data": data, "out": out, **options})


def steps_of(out):
    return [save.step for save in saves.of_run(out)]


def command(monkeypatch, *words):
    """The config that a command line comes to."""
    seen = []
    recorded = functools.wraps(train.train)(lambda config: seen.append(config))
    monkeypatch.setattr(train, "train", recorded)
    monkeypatch.setattr(sys, "argv", ["fastscore", "train", *map(str, words)])
    cli.main()
    return seen[0]


def test_a_file_gives_options_and_the_command_line_comes_first(tmp_path, monkeypatch):
    """Also where a flag alone would not fit, and where it equals the default."""
    file = tmp_path / "run.toml"
    file.write_text(
        'network = "unet"\nlr = 1\nout = "runs/x"\nmultipliers = [1, 2, 2]\nflip = true\n'
        "width = 16\n"
    )
    words = [file, "--lr", "1e-4", "--label-drop", "0.2", "--width", "32"]
    found = command(monkeypatch, *words)
    wanted = {"network": "unet", "lr": 1e-4, "out": "runs/x", "multipliers": (1, 2, 2)}
    wanted |= {"flip": True, "width": 32, "label_drop": 0.2, "steps": 2000}
    assert {k: getattr(found, k) if k != "out" else str(found.out) for k in wanted} == wanted
    assert found.given == {*wanted, "resume"} - {"steps"}
    assert str(command(monkeypatch, file, "--out", "runs/digits").out) == "runs/digits"


@pytest.mark.parametrize(
    "text, message",
    [
        ("learning_rate = 1.0", "must name options of train, .* got learning_rate"),
        ("resume = true", "must name options of train, .* got resume"),
        ('lr = "fast"', "run.toml: lr must be of type float"),
        ("width = 1.5", "run.toml: width must be of type int"),
        ("flip = 1", "run.toml: flip must be of type bool"),
        ("out = 3", "run.toml: out must be of type str"),
        ("multipliers = [1, 2.5]", "run.toml: multipliers must be of type list of int"),
        ("[model]\nwidth = 3", "must name options of train, .* got model"),
        ("width 3", "must be a TOML file: .*"),
        ("lr = -1.0", "lr must be positive and finite; got -1.0"),
        (None, "run.toml cannot be read: no such file or directory"),
    ],
)
def test_a_file_that_is_wrong_is_refused_in_one_sentence(
    tmp_path, monkeypatch, capsys, text, message
):
    file = tmp_path / "run.toml"
    if text is not None:
        file.write_text(text)
    monkeypatch.setattr(sys, "argv", ["fastscore", "train", str(file)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    told = capsys.readouterr().err
    assert stop.value.code == 2 and told.count("\n") == 1, told
    with pytest.raises(ValueError, match=message):
        TrainConfig(file=file)


def test_the_config_of_a_run_is_such_a_file(tmp_path, data):
    """And makes the run again, elsewhere."""
    list(fit(config(data, tmp_path / "one", grad_clip=0.5)))
    list(fit(TrainConfig(file=tmp_path / "one" / "config.toml", out=tmp_path / "two")))
    one, two = (run_folder.read_weights(tmp_path / name) for name in ("one", "two"))
    assert all(torch.equal(one[k], two[k]) for k in one)
    with pytest.raises(ValueError, match=r"has grad_clip 0\.5, which --resume cannot change"):
        fit(TrainConfig(out=tmp_path / "one", grad_clip=0.0, resume=True))


def test_as_many_saves_as_wanted_are_kept(tmp_path, data):
    out = tmp_path / "run"
    list(fit(config(data, out, keep=3)))
    assert steps_of(out) == [12, 10, 8]
    list(fit(TrainConfig(out=out, steps=16, keep=2, resume=True)))
    assert steps_of(out) == [16, 14] and run_folder.read_config(out)[0].keep == 2
    with pytest.raises(ValueError, match="keep must be at least 2; got 1"):
        config(data, out, keep=1)


def held_out_loss(out, net, data):
    """Of images that a level each belongs to, the other way round: level by level."""
    options, _ = run_folder.read_config(out)
    images = splits.part(options, "held_out")[0]
    sigmas = networks.build(options, images.shape[1:], 3)[1]
    seed = options.seed + 1_000_003
    level = torch.arange(len(images)) % len(sigmas)
    with torch.no_grad():
        each = losses.noise_conditional(net, images, sigmas, labels=level, seed=seed) / 16
    return [float(each[level == k].double().mean()) for k in range(len(sigmas))]


def test_held_out_losses_are_in_the_records_and_the_best_save_is_kept(tmp_path, data, monkeypatch):
    out = tmp_path / "run"
    options = {"held_out": 10, "held_out_every": 4, "lr": 0.3, "ema_decay": 0.0}
    list(fit(config(data, out, **options)))
    records = [line for line in metrics.read(out) if "held_out" in line]
    assert [line["step"] for line in records] == [4, 8, 12]
    net = run_folder.open_run(out).net
    np.testing.assert_allclose(records[-1]["held_out_levels"], held_out_loss(out, net, data), 1e-5)
    for line in records:
        assert math.isclose(line["held_out"], np.dot(line["held_out_levels"], [4, 3, 3]) / 10)

    best = min(records, key=lambda line: line["held_out"])["step"]
    assert saves.of_run(out)[0].manifest()["best"]["step"] == best
    assert steps_of(out) == sorted({12, 10, best}, reverse=True)
    # Its network is there to be drawn from.
    save = out / f"step-{best:09d}"
    found = run_folder.open_run(save)
    assert found.config.out == str(out)
    assert all(map(torch.equal, found.net.state_dict().values(), load_weights(save).values()))

    # Another run in two parts says the same, and knows its best.
    other = tmp_path / "other"
    updates = fit(config(data, other, **options))
    for _ in range(9):
        next(updates)
    updates.close()
    list(fit(TrainConfig(out=other, resume=True)))
    assert [strip(line) for line in metrics.read(other)] == [strip(x) for x in metrics.read(out)]
    assert saves.of_run(other)[0].manifest()["best"] == saves.of_run(out)[0].manifest()["best"]


def strip(line):
    return {k: v for k, v in line.items() if k != "seconds"}


def load_weights(save):
    tensors = load((save / "weights.safetensors").read_bytes())
    net = run_folder.open_run(save).net
    return {k: tensors[k] for k in net.state_dict()}


@pytest.mark.parametrize(
    "options",
    [{"loss": "sliced"}, {"loss": "sliced-vr"}, {"loss": "exact"}, {"task": "classifier"}],
    ids=lambda options: next(iter(options.values())),
)
def test_every_loss_has_its_held_out_loss(tmp_path, data, options):
    out = tmp_path / "run"
    list(fit(config(data, out, held_out=2, steps=2, **options)))
    (line,) = metrics.read(out)
    # Two images on three levels.
    assert len(line["held_out_levels"]) == 3 and None not in line["held_out_levels"]


def test_bfloat16_is_computed_in_and_not_kept(tmp_path, data):
    seen = []
    for precision in ("float32", "bfloat16"):
        out = tmp_path / precision
        list(fit(config(data, out, precision=precision)))
        weights = run_folder.read_weights(out)
        state = load(saves.of_run(out)[0].read("state.safetensors"))
        assert {t.dtype for k, t in state.items() if k.startswith("net.")} == {torch.float32}
        seen.append(torch.cat([t.flatten() for _, t in sorted(weights.items())]))
    difference = float((seen[1] - seen[0]).abs().max())
    assert 0 < difference < 0.02
    with pytest.raises(ValueError, match="precision must be float32 or bfloat16; got 'half'"):
        config(data, tmp_path / "x", precision="half")


def nets_of(monkeypatch):
    nets = []
    build = networks.build

    def built(*arguments):
        nets.append(build(*arguments))
        return nets[-1]

    monkeypatch.setattr(networks, "build", built)
    return nets


def test_gradients_are_clipped(tmp_path, data, monkeypatch):
    nets = nets_of(monkeypatch)
    norms = []
    for name, clip in (("whole", 0.0), ("clipped", 0.01)):
        updates = fit(config(data, tmp_path / name, grad_clip=clip))
        next(updates)
        grads = [p.grad for p in nets[-1][0].parameters()]
        norms.append(float(torch.nn.utils.get_total_norm(grads)))
        updates.close()
    assert norms[0] > 0.1 and math.isclose(norms[1], 0.01, rel_tol=1e-3)


def test_channels_last_is_the_same_run_in_another_order_of_memory(tmp_path, data, monkeypatch):
    nets = nets_of(monkeypatch)
    options = {"network": "unet", "steps": 3, "batch_size": 8, "width": 8, "levels": 5}
    found = []
    for last in (False, True):
        out = tmp_path / str(last)
        given = {"data": data, "out": out, "channels_last": last, **options}
        list(fit(TrainConfig(**given)))
        weights = sorted(run_folder.read_weights(out).items())
        found.append(torch.cat([t.flatten() for _, t in weights]))
    wide = [p for p in nets[-1][0].parameters() if p.dim() == 4 and min(p.shape[:2]) > 1]
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in wide) and wide
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-4)
    with pytest.raises(ValueError, match="channels_last belongs to networks of convolutions"):
        config(data, tmp_path / "x", channels_last=True)


def test_compile_compiles_the_network(tmp_path, data, monkeypatch):
    compiled = []
    whole = torch.compile

    def compiling(net):
        compiled.append(net)
        return whole(net, backend="eager")

    monkeypatch.setattr(torch, "compile", compiling)
    list(fit(config(data, tmp_path / "one", compile=True)))
    list(fit(config(data, tmp_path / "two")))
    one, two = (run_folder.read_weights(tmp_path / name) for name in ("one", "two"))
    assert len(compiled) == 1 and one.keys() == two.keys()
    assert all(torch.allclose(one[k], two[k], atol=1e-5) for k in one)
    with pytest.raises(ValueError, match="compile belongs to the denoising loss"):
        config(data, tmp_path / "x", compile=True, loss="sliced")


def test_tensorboard_shows_records_and_samples(tmp_path, data, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = tmp_path / "run"
    list(fit(config(data, out, tensorboard=True, held_out=5, held_out_every=4)))
    events = EventAccumulator(str(out / board.FOLDER))
    events.Reload()
    for name in ("loss", "held_out"):
        found = [(e.step, e.value) for e in events.Scalars(name)]
        wanted = [(line["step"], line[name]) for line in metrics.read(out)]
        np.testing.assert_allclose(found, wanted, rtol=1e-6)
    assert {f"level/{k}" for k in range(3)} <= set(events.Tags()["scalars"])
    assert [e.step for e in events.Images("samples")] == [2, 4, 8]

    whole = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "tensorboard" else whole(name)
    )
    with pytest.raises(ValueError, match=r"tensorboard needs the package .* pip install 'fastsc"):
        fit(config(data, tmp_path / "x", tensorboard=True))
    assert not (tmp_path / "x").exists()


class Spoilt:
    """One thing that is not finite, in the sixth step or after it."""

    def __init__(self, where, monkeypatch):
        self.where = where
        for module, name in (
            (fitting, "_varied"),
            (fitting, "objective"),
            (fitting, "learning_rate"),
            (fitting.Run, "step"),
        ):
            around = getattr(self, name.strip("_"))
            monkeypatch.setattr(module, name, around(getattr(module, name)))

    def varied(self, whole):
        def varied(images, config, step, first):
            images = whole(images, config, step, first).clone()
            if (self.where, step) == ("batch", 5):
                images[1, 0, 0, 0] = math.nan
            return images

        return varied

    def objective(self, whole):
        def objective(config, net, *things, **options):
            where = self.where if things[-1] == 5 else None
            if where == "weights":
                next(net.parameters()).data.view(-1)[0] = math.inf

            called = net
            if where == "output":

                def called(x, sigma):
                    return net(x, sigma) * math.inf

            found = whole(config, called, *things, **options)
            if where == "loss":
                found = torch.where(torch.arange(len(found)) == 2, math.nan, found)
            if where == "gradient":
                found.register_hook(lambda g: g * math.nan)
            return found

        return objective

    def learning_rate(self, whole):
        def rate(step, steps):
            return math.nan if (self.where, step) == ("learning rate", 5) else whole(step, steps)

        return rate

    def step(self, whole):
        def step(run, done, sums):
            if done == 5:
                moments = next(iter(run.optimizer.state.values()))
                things = {
                    "average": next(run.ema.module.parameters()).data,
                    "first moment": moments["exp_avg"],
                    "second moment": moments["exp_avg_sq"],
                    "sums": sums.sums,
                }
                if self.where in things:
                    things[self.where].view(-1)[0] = math.nan
            return whole(run, done, sums)

        return step


UNSAVED = r"the (averages|state) after 6 steps cannot be saved: checkpoint: .* must be finite"
POINTS = {
    "batch": r"the loss is nan at step 5; the batch holds NaN .*; it is that of 1 of 4 samples, "
    r"the first of them sample 1 \(training image \d+ at noise level \d, σ = ",
    "output": "the loss is inf at step 5; the data and the weights are finite",
    "loss": r"the loss is nan at step 5; .* sample 2 \(training image \d+ at noise level \d, σ = ",
    "gradient": r"the gradient is not finite at step 5, where the loss is \d",
    "weights": "the loss is nan at step 5; the weights are not finite",
    "learning rate": UNSAVED,
    "average": UNSAVED,
    "first moment": UNSAVED,
    "second moment": UNSAVED,
    "sums": "the state after 6 steps cannot be saved: checkpoint: metrics.sums must be finite",
}


@pytest.mark.parametrize("where", POINTS)
def test_what_is_not_finite_is_named_and_never_saved(tmp_path, data, monkeypatch, where):
    """And the run goes on from before it, to the weights of one in which it was not."""
    out, whole = tmp_path / "run", tmp_path / "whole"
    list(fit(config(data, whole)))
    with pytest.MonkeyPatch.context() as patch:
        Spoilt(where, patch)
        with pytest.raises((FloatingPointError, ValueError), match=POINTS[where]) as told:
            list(fit(config(data, out)))
    assert "\n" not in str(told.value)
    found = saves.of_run(out)
    assert found[0].step in (4, 5)
    for save in found:
        for name in ("weights", "state"):
            tensors = load(save.read(f"{name}.safetensors"))
            assert all(bool(t.isfinite().all()) for t in tensors.values())
    for line in metrics.read(out):
        assert math.isfinite(line["loss"])

    list(fit(TrainConfig(out=out, resume=True)))
    one, two = (run_folder.read_weights(path) for path in (out, whole))
    assert all(torch.equal(one[k], two[k]) for k in two)


def test_updates_that_are_not_finite_are_skipped_and_counted(tmp_path, data, monkeypatch):
    """In the records and over a resume; the last one that may be skipped is not one more."""
    objective = fitting.objective

    def spoilt(*things, **options):
        found = objective(*things, **options)
        return found * (math.nan if things[-1] in (3, 7) else 1)

    monkeypatch.setattr(fitting, "objective", spoilt)
    out = tmp_path / "run"
    updates = fit(config(data, out, skip=2))
    with pytest.warns(UserWarning, match=r"step 3 is skipped \(1 of 2\): the loss is nan"):
        for _ in range(6):
            next(updates)
    updates.close()
    with pytest.warns(UserWarning, match=r"step 7 is skipped \(2 of 2\)"):
        list(fit(TrainConfig(out=out, resume=True)))
    assert [line.get("skipped") for line in metrics.read(out)] == [1, 2, 2]
    # The mean of what there was.
    assert all(math.isfinite(line["loss"]) for line in metrics.read(out))

    with pytest.raises(FloatingPointError, match="the loss is nan at step 3"):
        list(fit(config(data, tmp_path / "none")))
    with pytest.warns(UserWarning, match=r"step 3 is skipped \(1 of 1\)"):
        with pytest.raises(FloatingPointError, match="the loss is nan at step 7"):
            list(fit(TrainConfig(out=tmp_path / "none", resume=True, skip=1)))
