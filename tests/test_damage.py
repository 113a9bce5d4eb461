"""Damage to any file of a run is told in one sentence, and never read in silence."""

import contextlib
import random
import shutil
import tempfile
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import run_here
from test_saves import Run, in_old_form

from fastscore import training
from fastscore.cli import fit as fitting
from fastscore.cli import metrics, run_folder, splits
from fastscore.cli.config import TrainConfig
from fastscore.cli.fit import fit
from fastscore.training import checkpoint


@contextlib.contextmanager
def copied(folder):
    """A copy, which goes."""
    out = folder.with_name("copy")
    shutil.copytree(folder, out)
    try:
        yield out
    finally:
        shutil.rmtree(out)


@pytest.fixture(scope="module")
def memory():
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared if shared.is_dir() else None) as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def whole(memory):
    """A run of two saves, with images held out and several records."""
    images = np.random.default_rng(0).random((20, 3, 3), np.float32)
    np.savez(memory / "x.npz", images=images)
    options = {"data": str(memory / "x.npz"), "width": 8, "depth": 1, "levels": 2, "held_out": 5}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fitting, "SAVE_EVERY", 4)
        patch.setattr(fitting, "RECORD_EVERY", 1)
        list(fit(TrainConfig(out=memory / "run", steps=8, batch_size=4, **options)))
    return memory / "run"


def files_of(folder):
    return sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())


def tensors(net, ema, optimizer):
    state = [t for _, t in sorted(checkpoint.optimizer_tensors(optimizer).items())]
    return [*net.state_dict().values(), *ema.state_dict().values(), *state]


def resumed(out):
    """The tensors and the step with which a run goes on."""
    config, shape = run_folder.read_config(out)
    run_folder.resumed(TrainConfig(out=out, resume=True))
    net, _ = run_folder.build(config, shape)
    ema = training.averaged(net, config.ema_decay)
    optimizer = torch.optim.Adam(net.parameters())
    done = run_folder.restore(out, net, ema, optimizer).steps_done
    return done, tensors(net, ema, optimizer)


def sentences(out):
    """What a user is told by everything that reads a run, and what resuming finds."""
    told, found = [], None

    def resume():
        nonlocal found
        found = resumed(out)

    readers = (
        lambda: run_folder.open_run(out),
        lambda: metrics.read(out),
        lambda: splits.part(run_folder.read_config(out)[0], "held_out"),
        resume,
    )
    for reader in readers:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            try:
                reader()
            except ValueError as error:
                assert type(error) is ValueError, repr(error)
                told.append(str(error))
        told.extend(str(warning.message) for warning in warned)
    assert all("\n" not in told_once and len(told_once) < 700 for told_once in told), told
    return told, found


def changed(data, rng):
    """One byte has another value."""
    place = rng.randrange(len(data))
    other = (data[place] + rng.randrange(1, 256)) % 256
    return data[:place] + bytes([other]) + data[place + 1 :]


def flipped(data, rng):
    place = rng.randrange(len(data))
    return data[:place] + bytes([data[place] ^ 1 << rng.randrange(8)]) + data[place + 1 :]


def truncated(data, rng):
    return data[: rng.randrange(len(data))]


LONG = pytest.mark.slow(minutes=1)


@pytest.mark.parametrize(
    "damage, count",
    [
        pytest.param(changed, 100, id="changed-bytes"),
        pytest.param(flipped, 60, id="flipped-bits"),
        pytest.param(truncated, 60, id="truncations"),
        pytest.param(changed, 1000, id="changed-bytes-1000", marks=LONG),
        pytest.param(flipped, 1000, id="flipped-bits-1000", marks=LONG),
        pytest.param(truncated, 300, id="truncations-300", marks=LONG),
    ],
)
def test_no_damage_is_silent(whole, damage, count):
    """Of any file of a run; what goes on in spite of it goes on from one of its saves."""
    rng = random.Random(count)
    of_step = {8: resumed(whole)[1]}
    with copied(whole) as older:
        shutil.rmtree(older / "step-000000008")
        of_step[4] = resumed(older)[1]

    silent = 0
    names = files_of(whole)
    assert len(names) == 9
    for _ in range(count):
        name = rng.choice(names)
        with copied(whole) as out:
            (out / name).write_bytes(damage((out / name).read_bytes(), rng))
            told, found = sentences(out)
        silent += not told
        if found is not None:
            assert all(map(torch.equal, found[1], of_step[found[0]])), name
    print(f"{count} {damage.__name__}: {silent} silent")
    assert silent == 0


def test_a_missing_file_is_told_too(whole):
    for name in files_of(whole):
        if name.name == "split.safetensors":
            continue  # the data give it; test_a_run_without_a_record_says_that_it_has_none
        with copied(whole) as out:
            (out / name).unlink()
            assert sentences(out)[0], name


@pytest.mark.parametrize("name", ["config.toml", "step-000000008/weights.safetensors"])
def test_the_command_refuses_in_one_line(whole, tmp_path, name):
    with copied(whole) as out:
        (out / name).write_bytes((out / name).read_bytes()[:-3] + b"x")
        done = run_here("sample", out, "-n", "2", "--out", tmp_path / "x.png")
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "is damaged" in done.stderr and name in done.stderr


def refusals(out, run):
    """What is said by whatever reads a folder of an earlier version."""
    told = []
    readers = (
        lambda: run_folder.read_config(out),
        lambda: run_folder.read_weights(out),
        lambda: run.restored(out),
        lambda: checkpoint.load(out / splits.FILE),
    )
    for reader in readers:
        try:
            reader()
        except ValueError as error:
            assert type(error) is ValueError, repr(error)
            told.append(error)
    return told


def test_damage_to_folders_of_earlier_versions_is_never_a_parser_s_error(memory):
    """Their config and metrics carry no digest: what reads as another value is told by nobody."""
    run = Run()
    old = memory / "old"
    in_old_form(old, run, 3)
    rng = random.Random(0)
    silent = dict.fromkeys(files_of(old), 0)
    for name in silent:
        for damage in (changed, truncated) * 15:
            with copied(old) as out:
                (out / name).write_bytes(damage((out / name).read_bytes(), rng))
                silent[name] += not refusals(out, run)
    print({str(name): count for name, count in silent.items()})
    undigested = ("config.toml", "metrics.jsonl")
    assert {n.name for n, count in silent.items() if count} <= {*undigested, *BESIDE}


def test_a_config_of_another_network_is_told(memory):
    """By hand, in a folder of an earlier version."""
    in_old_form(memory / "other", Run(), 3)
    text = (memory / "other" / "config.toml").read_text()
    (memory / "other" / "config.toml").write_text(text.replace("width = 16", "width = 8"))
    with pytest.raises(ValueError, match=r"its weights are not those of the network in its conf"):
        run_folder.open_run(memory / "other")
    with pytest.raises(ValueError, match=r"its state is not that of the network in its config"):
        resumed(memory / "other")


# A changed byte in "bytes" of such a file, which nothing reads, is no damage.
BESIDE = ("weights.safetensors.json", "state.safetensors.json")
