"""Training on several processes: what one would have done, whatever ends them."""

import contextlib
import os
import random
import signal
import sys
import time

import children
import numpy as np
import pages
import pytest
import ranked
import torch
from safetensors.torch import load

from fastscore import distributed
from fastscore.cli import draw, metrics, networks, run_folder, train
from fastscore.cli import fit as fitting
from fastscore.cli.config import TrainConfig
from fastscore.cli.fit import fit
from fastscore.training import ranks, saves

pytestmark = pytest.mark.processes

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
SMALL = {"width": 16, "depth": 1, "levels": 3, "batch_size": 16, "steps": 60}


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    """Here, and in what torchrun starts."""
    monkeypatch.setattr(ranks, "_device", lambda: torch.device("cpu"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "x.npz"
    rng = np.random.default_rng(0)
    np.savez(path, images=rng.random((50, 3, 3), np.float32), labels=rng.integers(0, 3, 50))
    return str(path)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, data):
    """A run of two processes."""
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    assert ranked.run(2, trained, data, out) == [0, 0]
    return out


def trained(data, out, *, save_every=10, **options):
    """`fastscore train` without its pictures, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fitting, "SAVE_EVERY", save_every)
        patch.setattr(fitting, "RECORD_EVERY", 4)
        patch.setattr(train, "_finish", lambda *_: None)
        train.train(TrainConfig(**{"data": data, "out": out, **SMALL, **options}))


def state_of(out):
    """All that a run has saved, and its records, the time that it took apart."""
    state = load(saves.of_run(out)[0].read("state.safetensors"))
    del state["metrics.seconds"]
    lines = metrics.read(out)
    for line in lines:
        del line["seconds"]
    return {**run_folder.read_weights(out), **state}, lines


def same(one, two):
    one, two = state_of(one), state_of(two)
    return (
        one[0].keys() == two[0].keys()
        and all(torch.equal(one[0][k], two[0][k]) for k in one[0])
        and one[1] == two[1]
    )


def in_float64(data, out, accumulates, options, together=None):
    """Runs of every accumulation, and the gradient of the first step in float32."""
    nets = []
    build, varied = networks.build, fitting._varied

    def built(*arguments):
        nets.append(build(*arguments)[0].to(dtype))
        return nets[-1], build(*arguments)[1].to(dtype)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(networks, "build", built)
        patch.setattr(fitting, "_varied", lambda images, *a: varied(images.to(dtype), *a))
        for accumulate in accumulates:
            for dtype, steps in ((torch.float64, 100), (torch.float32, 1)):
                folder = out / f"{accumulate}-{dtype}"
                own = {"data": data, "out": folder, "steps": steps, "accumulate": accumulate}
                own |= {"depth": None} if "network" in options else {}
                list(fit(TrainConfig(**{**SMALL, **options, **own}), together))
            if together is None or together.leads:
                torch.save([p.grad for p in nets[-1].parameters()], out / f"{accumulate}.pt")


def in_float64_together(*arguments):
    with ranks.joined() as together:
        in_float64(*arguments, together)


@pytest.mark.parametrize(
    "number", [2, pytest.param(4, marks=pytest.mark.slow, id="4-slow")]
)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"loss": "sliced", "projections": 2},
        {"task": "classifier"},
        pytest.param(
            {"network": "unet", "width": 8, "label_drop": 0.5}, marks=pytest.mark.slow(minutes=1)
        ),
    ],
    ids=["denoising", "sliced", "classifier", "unet-slow"],
)
def test_a_run_is_the_same_on_any_number_of_processes_and_in_any_parts(
    tmp_path, data, number, options
):
    """After 100 steps to 1e-9 in float64; the gradient of the first step to 1e-5 in float32.

    Sums of 16 terms in another order differ by a few of 2^-53, which 100 updates of Adam, each of
    at most 2e-3, carry on.
    """
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir(), parts.mkdir()
    in_float64(data, whole, (1, 2, 4), options)
    assert ranked.run(number, in_float64_together, data, parts, (1, 2, 4), options) == [0] * number
    exact = run_folder.read_weights(whole / "1-torch.float64")
    expected = torch.load(whole / "1.pt")
    assert max(float(g.abs().max()) for g in expected) > 1e-3

    for folder in (whole, parts):
        for accumulate in (1, 2, 4):
            found = run_folder.read_weights(folder / f"{accumulate}-torch.float64")
            for name, t in exact.items():
                assert t.dtype == torch.float64 or not t.is_floating_point()
                assert float((found[name] - t).abs().max()) < 1e-9, (folder.name, accumulate, name)
            lines = [metrics.read(f / f"{accumulate}-torch.float64") for f in (whole, folder)]
            losses = [[line["levels"] for line in found] for found in lines]
            np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)
            for g, e in zip(torch.load(folder / f"{accumulate}.pt"), expected):
                assert float((g - e).norm()) <= 1e-5 * float(e.norm()), (folder.name, accumulate)


def test_torchrun_trains_and_samples(tmp_path, data, undisturbed):
    """The command as it is typed: one process writes and prints, and the samples are its."""
    out = tmp_path / "run"
    words = ["--data", data, "--out", out, "--width", "16", "--depth", "1", "--levels", "3"]
    words += ["--batch-size", "16", "--steps", "60"]
    done = children.run([*TORCHRUN, "-m", "fastscore", "train", *words], check=True)
    # The plan, once, and where things are.
    assert f"\nrun: {out}\npictures: " in done.stdout and done.stdout.count("\n") == 4
    # None where it takes less than a second.
    assert done.stderr.count("train: step 60 of 60") <= 1
    names = {"config.toml", "metrics.jsonl", "split.safetensors", "step-000000060"}
    pictures = {"levels.png", "loss.png", "samples.png"}
    assert {path.name for path in out.iterdir()} == names | pictures
    assert all(
        torch.equal(t, run_folder.read_weights(undisturbed)[k])
        for k, t in run_folder.read_weights(out).items()
    )

    words = ["sample", out, "-n", "5", "--batch-size", "2", "--out", tmp_path / "two.npz"]
    children.run([*TORCHRUN, "-m", "fastscore", *words], check=True)
    samples = draw.draw_run(out, 5, batch_size=2).samples
    assert (np.load(tmp_path / "two.npz")["images"] == samples.clamp(0, 1).numpy()).all()


KILLED = """
import os, signal, sys
sys.path.insert(0, {tests!r})
import test_processes as tests
objective = tests.fitting.objective

def killing(config, net, *things, **options):
    at = {kills}.get(os.environ["TORCHELASTIC_RESTART_COUNT"])
    if at == (int(os.environ["RANK"]), things[-1]):
        os.kill(os.getpid(), signal.SIGKILL)
    return objective(config, net, *things, **options)

tests.fitting.objective = killing
tests.trained({data!r}, {out!r})
"""


@pytest.mark.parametrize(
    "kills",
    [
        {"0": (1, 37)},
        pytest.param({"0": (0, 3), "1": (1, 37), "2": (0, 44)}, marks=pytest.mark.slow(minutes=1)),
    ],
    ids=["second", "either-three-times-slow"],
)
def test_ranks_that_are_killed_come_back_and_the_run_ends_as_if_nothing_had_been(
    tmp_path, data, undisturbed, kills
):
    """kill -9 of a rank at a step, for each start of torchrun's; also before the first save."""
    program = tmp_path / "killed.py"
    out = tmp_path / "run"
    tests = os.path.dirname(__file__)
    program.write_text(KILLED.format(tests=tests, data=data, out=str(out), kills=kills))
    done = children.run([*TORCHRUN, "--max-restarts", len(kills), program])
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("failed (exitcode: -9)") == len(kills), done.stderr
    assert same(out, undisturbed)
    assert sorted(path.name for path in out.iterdir()) == sorted(
        path.name for path in undisturbed.iterdir()
    )


def test_a_restart_does_not_go_on_with_the_run_of_another(tmp_path, data, monkeypatch):
    """The first start was refused: the folder held a run. So is the second."""
    for name, value in (("RUN_ID", "none"), ("RESTART_COUNT", "0")):
        monkeypatch.setenv(f"TORCHELASTIC_{name}", value)
    monkeypatch.setenv("GROUP_WORLD_SIZE", "1")
    monkeypatch.setattr(train, "_finish", lambda *_: None)
    out = tmp_path / "run"
    config = TrainConfig(**{**SMALL, "steps": 3}, data=data, out=out)
    train.train(config)
    for count in ("0", "1"):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", count)
        with pytest.raises(ValueError, match="exists already; choose another folder or pass --res"):
            train.train(config)

    # One that did not come to its end, of this torchrun and of another.
    with contextlib.closing(fit(TrainConfig(out=out, resume=True, steps=5))) as updates:
        next(updates)
    config = TrainConfig(**{**SMALL, "steps": 5}, data=data, out=out)
    job = ranks._job()
    monkeypatch.setattr(ranks, "_job", lambda: f"{job}0")
    with pytest.raises(ValueError, match="exists already"):
        train.train(config)
    monkeypatch.setattr(ranks, "_job", lambda: job)
    train.train(config)
    assert saves.of_run(out)[0].step == 5
    assert not (out / ranks.JOB).exists()


def signalled(data, out, rank, line, which):
    """A signal to one rank, at a line of its program."""
    from test_signals import at_line

    # As torchrun starts processes: what it sends on changes nothing.
    os.environ["TORCHELASTIC_RUN_ID"] = "test"
    own = int(os.environ["RANK"]) == rank

    def send():
        for _ in range(2):
            signal.raise_signal(which)

    with at_line(line, send) if own else contextlib.nullcontext():
        trained(data, out)


@pytest.mark.parametrize(
    "count, seed",
    [(2, 0), *(pytest.param(5, k, marks=pytest.mark.slow(minutes=1)) for k in range(1, 5))],
    ids=["2", *(f"5-of-20-slow-{k}" for k in range(4))],
)
def test_a_signal_to_any_rank_ends_all_between_the_same_two_steps(
    tmp_path, data, undisturbed, count, seed
):
    rng, differing, heeded = random.Random(seed), [], 0
    for k in range(count):
        out, which = tmp_path / str(k), rng.choice([signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
        line = rng.randrange(500, 20000)
        codes = ranked.run(2, signalled, data, out, rng.randrange(2), line, which)
        assert codes == [128 + which] * 2, (k, line, codes)
        heeded += saves.of_run(out)[0].step < SMALL["steps"]
        assert ranked.run(2, trained, data, out, resume=True) == [0, 0]
        if not same(out, undisturbed):
            differing.append(k)
    print(f"{count} signals, {heeded} heeded: {len(differing)} differ")
    assert differing == [] and heeded > count / 2


def failing(data, out, rank, error):
    """One rank fails in the middle of a step, or where it saves."""
    objective, save = fitting.objective, run_folder.save
    own = int(os.environ["RANK"]) == rank

    def broken(config, net, *things, **options):
        if own and things[-1] == 25:
            raise error
        return objective(config, net, *things, **options)

    def full(*arguments, **options):
        if arguments[4] == 30:
            raise OSError(28, "No space left on device")
        return save(*arguments, **options)

    if error is None:
        run_folder.save = full
    else:
        fitting.objective = broken
    with contextlib.redirect_stderr(open(out.with_suffix(f".{os.environ['RANK']}"), "w")):
        try:
            trained(data, out)
        except (ValueError, OSError) as found:
            print(found, file=sys.stderr)
            sys.exit(2)


@pytest.mark.parametrize(
    "rank, error",
    [(0, ValueError("no")), (1, ValueError("no")), (0, None)],
    ids=["first", "second", "disk-full"],
)
def test_what_one_rank_fails_at_ends_all_and_leaves_the_save_before(
    tmp_path, data, undisturbed, rank, error
):
    out = tmp_path / "run"
    begin = time.monotonic()
    assert ranked.run(2, failing, data, out, rank, error) == [2, 2]
    assert time.monotonic() - begin < 60
    told = [out.with_suffix(f".{k}").read_text().splitlines() for k in (0, 1)]
    assert told[rank][-1].endswith("no" if error else "No space left on device")
    assert told[1 - rank][-1].startswith(f"train: rank {1 - rank} has lost another process")
    # The first one's progress, if it came to a second, and nothing of the second but this.
    assert len(told[0]) <= 2 and len(told[1]) == 1
    assert saves.of_run(out)[0].step == 20
    assert ranked.run(2, trained, data, out, resume=True) == [0, 0]
    assert same(out, undisturbed)


def not_finite(data, out, rank):
    objective = fitting.objective

    def broken(config, net, *things, **options):
        found = objective(config, net, *things, **options)
        own = int(os.environ["RANK"]) == rank and things[-1] == 25
        return torch.where(torch.arange(len(found)) == 3, float("nan"), found) if own else found

    fitting.objective = broken
    with pytest.raises(FloatingPointError, match="the loss is nan at step 25") as told:
        trained(data, out)
    # Whose sample it was, tells.
    assert ("the first of them sample 3" in str(told.value)) == (int(os.environ["RANK"]) == rank)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_loss_that_is_not_finite_on_one_rank_is_seen_by_all(tmp_path, data, undisturbed, rank):
    out = tmp_path / "run"
    assert ranked.run(2, not_finite, data, out, rank) == [0, 0]
    assert saves.of_run(out)[0].step == 25
    assert ranked.run(2, trained, data, out, resume=True) == [0, 0]
    assert same(out, undisturbed)


def test_a_run_goes_on_on_another_number_of_processes(tmp_path, data, undisturbed):
    """Up to the order of sums: float32, 60 steps."""
    out = tmp_path / "run"
    assert ranked.run(2, stopped, data, out) == [0, 0]
    trained(data, out, resume=True)
    one, two = state_of(out), state_of(undisturbed)
    for name in one[0]:
        torch.testing.assert_close(
            one[0][name].reshape(-1).double(),
            two[0][name].reshape(-1)[: one[0][name].numel()].double(),
            rtol=1e-3,
            atol=1e-5,
        )
    for line, expected in zip(one[1], two[1], strict=True):
        np.testing.assert_allclose(line["levels"], expected["levels"], rtol=1e-4)


def stopped(data, out):
    """Between two records."""
    fitting.SAVE_EVERY, fitting.RECORD_EVERY = 10, 4
    with ranks.joined() as together:
        config = TrainConfig(**SMALL, data=data, out=out)
        with contextlib.closing(fit(config, together)) as updates:
            for step, _ in updates:
                if together.ends(15 if step == 25 else 0):
                    return


def page():
    pages.run(pages.ROOT / "docs/tutorials/several_processes.md", quick=True)


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")
def test_the_programs_of_the_tutorial_run_on_two_processes():
    assert ranked.run(2, page) == [0, 0]


def test_a_batch_that_has_no_equal_parts_is_refused(data, tmp_path):
    config = TrainConfig(**SMALL, data=data, out=tmp_path / "run", accumulate=3)
    with pytest.raises(ValueError, match=r"batch_size must be a multiple of .* 1 x 3; got 16"):
        fit(config)
    assert not (tmp_path / "run").exists()


def refused(data, out, told):
    """A second torchrun that meets the first in its folder."""
    try:
        trained(data, out, resume=True)
    except (ValueError, OSError) as error:
        told.with_suffix(f".{os.environ['RANK']}").write_text(str(error))
        sys.exit(2)


def test_a_folder_that_is_written_is_refused_to_all_processes_of_another(tmp_path, data):
    out = tmp_path / "run"
    updates = fit(TrainConfig(**{**SMALL, "depth": 1}, data=data, out=out))
    next(updates)
    assert ranked.run(2, refused, data, out, tmp_path / "told") == [2, 2]
    assert "is being written by another process" in (tmp_path / "told.0").read_text()
    assert "rank 1 has lost another process" in (tmp_path / "told.1").read_text()
    updates.close()
    assert ranked.run(2, trained, data, out, resume=True) == [0, 0]


def all_dropped(data, out):
    trained(data, out, network="unet", width=8, depth=None, label_drop=1.0, steps=3, accumulate=2)


def test_labels_that_are_dropped_in_all_of_a_part_leave_no_gradient_out(tmp_path, data):
    assert ranked.run(2, all_dropped, data, tmp_path / "run") == [0, 0]


def test_environment_is_that_of_one_process_within_alone(monkeypatch):
    monkeypatch.setenv("RANK", "1"), monkeypatch.setenv("WORLD_SIZE", "2")
    with distributed.alone():
        assert distributed.environment() == (0, 1)
    assert distributed.environment() == (1, 2)
