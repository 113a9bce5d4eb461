"""A save is there whole or not at all, wherever a process is killed, and damage is seen."""

import functools
import hashlib
import json
import random
import shutil
import tempfile
import warnings
from pathlib import Path

import killing
import numpy as np
import pytest
import torch

from fastscore import averages
from fastscore.cli import draw, metrics, run_folder, sample, splits
from fastscore.cli import fit as fitting
from fastscore.cli.config import TrainConfig
from fastscore.cli.fit import fit
from fastscore.cli.parts import Parts
from fastscore.training import checkpoint, files, saves

torch.set_num_threads(1)


class Run:
    """The tensors of a run, all of which tell its step."""

    def __init__(self):
        self.net = torch.nn.Linear(3, 2)
        self.ema = averages.averaged(self.net, 0.9)
        self.optimizer = torch.optim.Adam(self.net.parameters())
        self.net(torch.ones(3)).sum().backward()
        self.optimizer.step()
        self.sums = torch.zeros(2)

    def tensors(self):
        moments = (t for state in self.optimizer.state.values() for t in state.values())
        return [*self.net.state_dict().values(), *self.ema.state_dict().values(), *moments]

    def be(self, step):
        with torch.no_grad():
            for t in [*self.tensors(), self.sums]:
                t.fill_(step)

    def steps(self):
        return {float(value) for t in self.tensors() for value in t.flatten()}

    def save(self, out, step, last):
        self.be(step)
        metrics.add(out, {"step": step, "loss": 1.0})
        sums = {"sums": self.sums, "counts": self.sums}
        return run_folder.save(out, self.net, self.ema, self.optimizer, step, sums, last=last)

    def restored(self, out):
        return run_folder.restore(out, self.net, self.ema, self.optimizer)


@pytest.fixture(scope="module")
def run():
    return Run()


CONFIG = TrainConfig(steps=9, width=16, depth=1, levels=3, batch_size=8)


def begun(out):
    """As `fit` begins a run."""
    out.mkdir(parents=True, exist_ok=True)
    files.sweep(out)
    splits.keep(out, {name: torch.zeros(2, 16).byte() for name in ("training", "held_out")})
    run_folder.write_config(out, CONFIG, (1, 8, 8))


def going_on(run, out, steps, acknowledge):
    files.sweep(out)
    last, done, _ = run.restored(out)
    run_folder.write_config(out, CONFIG, (1, 8, 8))
    for step in range(done + 1, done + 1 + steps):
        last = run.save(out, step, last)
        acknowledge(step)


def in_old_form(out, run, step):
    """What earlier versions left, which had no step-N."""
    begun(out)
    text = (out / "config.toml").read_text().partition("\n")[2].replace("format = 2\n", "")
    (out / "config.toml").write_text(text)
    run.be(step)
    weights = run.ema.module.state_dict()
    state = checkpoint.state_of(run.net, run.ema, run.optimizer, step)["state"]
    state |= {f"ema.module.{k}": v for k, v in weights.items()}
    state |= {"metrics.sums": run.sums, "metrics.counts": run.sums}
    from safetensors.torch import save

    for name, tensors in (("weights", weights), ("state", state)):
        data = save({k: torch.as_tensor(v).clone() for k, v in tensors.items()})
        (out / f"{name}.safetensors").write_bytes(data)
        manifest = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
        (out / f"{name}.safetensors.json").write_text(json.dumps(manifest))
    lines = [json.dumps({"step": k, "loss": 1.0}) for k in range(1, step + 1)]
    (out / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))


def found(run, out, acknowledged):
    """What is wrong with a folder whose process was killed: "" where nothing is."""
    if not (out / "config.toml").exists():
        fitting.refuse_another_run(out)
        return "lost" if acknowledged else ""
    run.be(255)
    try:
        run_folder.read_config(out)
        if run_folder.is_saved(out):
            weights = {float(v) for t in run_folder.read_weights(out).values() for v in t.flatten()}
        files.sweep(out)
        done = run.restored(out).steps_done
    except Exception as error:
        return f"unusable: {error}"

    if done < max(acknowledged, default=0):
        return "lost"
    if done and (run.steps() != {float(done)} or weights != {float(done)}):
        return "disagreeing"
    if [line["step"] for line in lines(out)] != list(range(1, done + 1)):
        return "records of other steps"
    left = [p.name for p in out.rglob("*") if files.is_temporary(p)]
    return f"left: {left}" if left else ""


def lines(out):
    path = out / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def a_new_run(run, out, acknowledge):
    begun(out)
    going_on(run, out, 3, acknowledge)


def a_run_that_goes_on(run, out, acknowledge):
    going_on(run, out, 2, acknowledge)


@pytest.fixture
def in_memory():
    """A folder whose fsync takes no time: what is killed is the process, not the machine."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        yield Path(folder)


@pytest.mark.processes
@pytest.mark.parametrize(
    "action, form",
    [(a_new_run, None), (a_run_that_goes_on, "new"), (a_run_that_goes_on, "old")],
    ids=["begins", "goes-on", "goes-on-from-an-earlier-version"],
)
def test_a_kill_between_any_two_file_operations_loses_nothing(in_memory, run, action, form):
    """0 lost, 0 unusable, 0 of disagreeing steps, 0 temporary files after the next start."""
    tmp_path = in_memory
    start = tmp_path / "start"
    if form == "old":
        in_old_form(start, run, 3)
    elif form == "new":
        begun(start)
        going_on(run, start, 3, lambda step: None)

    wrong = {}
    number, killed = 0, True
    while killed:
        number += 1
        out = tmp_path / str(number)
        if start.exists():
            shutil.copytree(start, out)
        acting = functools.partial(action, run, out)
        acknowledged, killed = killing.killed_before(number, acting)
        before = [3] if start.exists() else []
        wrong[number] = found(run, out, [*before, *acknowledged])
        # And it goes on from there.
        if number % 3 == 0 and (out / "config.toml").exists():
            going_on(run, out, 1, lambda step: None)
            assert found(run, out, []) == ""
        shutil.rmtree(out, ignore_errors=True)
    print(f"{number - 1} points; {sum(map(bool, wrong.values()))} wrong")
    assert {n: w for n, w in wrong.items() if w} == {} and number > 40


@pytest.mark.processes
@pytest.mark.parametrize(
    "kills", [50, pytest.param(200, marks=pytest.mark.slow(minutes=1), id="200-slow")]
)
def test_a_kill_at_any_time_loses_nothing_that_was_saved(in_memory, run, kills):
    rng = random.Random(0)
    out = in_memory / "run"
    begun(out)
    wrong, done = [], 0
    for _ in range(kills):
        acting = functools.partial(going_on, run, out, 100)
        acknowledged = killing.killed_after(rng.uniform(0.005, 0.06), acting)
        wrong.append(found(run, out, [done, *acknowledged]))
        done = run.restored(out).steps_done
        if done > 150:
            shutil.rmtree(out)
            begun(out)
            done = 0
    print(f"{kills} kills; {sum(map(bool, wrong))} wrong")
    assert [w for w in wrong if w] == []


def a_job(out, acknowledge):
    """Of two batches, as `fastscore sample` draws it."""
    parts = Parts(out.with_name("x.npz.parts"), {"seed": 3})
    batches = []
    for start in (0, 2):
        batch = parts.load(start, start + 2) or {"samples": torch.full((2, 1, 1, 1), start / 2)}
        parts.save(start, start + 2, batch)
        batches.append(batch["samples"])
    sample.write(out, draw.Drawn(torch.cat(batches), None, {}))
    parts.remove()
    acknowledge(1)


@pytest.mark.processes
def test_a_job_of_drawing_that_was_killed_anywhere_goes_on(in_memory):
    """0 refused, 0 unreadable, and nothing but the samples afterwards."""
    number, killed = 0, True
    while killed:
        number += 1
        out = in_memory / str(number) / "x.npz"
        out.parent.mkdir()
        done, killed = killing.killed_before(number, functools.partial(a_job, out))
        assert not out.exists() or len(np.load(out)["images"]) == 4
        a_job(out, lambda value: None)
        assert np.load(out)["images"].flatten().tolist() == [0, 0, 1, 1]
        assert [path.name for path in out.parent.iterdir()] == ["x.npz"], number
    print(f"{number - 1} points; 0 wrong")
    assert number > 20


def test_two_saves_are_kept_and_the_newest_intact_one_is_found(tmp_path, run):
    begun(tmp_path)
    going_on(run, tmp_path, 4, lambda step: None)
    assert [save.step for save in saves.of_run(tmp_path)] == [4, 3]

    state = tmp_path / "step-000000004" / "state.safetensors"
    state.write_bytes(state.read_bytes()[:-1])
    with pytest.warns(UserWarning, match=r"goes on from its save of step 3; that of step 4 is not"):
        assert run.restored(tmp_path).steps_done == 3
    assert run.steps() == {3.0}
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3]

    # The damaged one goes when the run has come as far again.
    with pytest.warns(UserWarning, match="is not used"):
        going_on(run, tmp_path, 1, lambda step: None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert run.restored(tmp_path).steps_done == 4

    for save in saves.of_run(tmp_path):
        (save.folder / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"no save of the run in .* is intact: .* it is missing"):
        run.restored(tmp_path)


def test_samples_are_not_drawn_from_an_older_save_in_silence(tmp_path, run):
    begun(tmp_path)
    going_on(run, tmp_path, 2, lambda step: None)
    (tmp_path / "step-000000002" / "weights.safetensors").write_bytes(b"")
    with pytest.raises(
        ValueError, match=r"0 bytes are there, .* train --resume goes on from step 1, which is"
    ):
        run_folder.read_weights(tmp_path)


def test_folders_of_earlier_versions_are_read_and_go_on_in_the_new_form(tmp_path, run):
    in_old_form(tmp_path, run, 3)
    assert run_folder.is_saved(tmp_path)
    assert all((t == 3).all() for t in run_folder.read_weights(tmp_path).values())
    assert run_folder.read_config(tmp_path)[0].steps == 9
    going_on(run, tmp_path, 1, lambda step: None)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "config.toml",
        "metrics.jsonl",
        "split.safetensors",
        "step-000000004",
    ]
    assert run.restored(tmp_path).steps_done == 4
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4]


def test_a_run_that_was_killed_before_its_first_save_begins_again(tmp_path):
    np.savez(tmp_path / "x.npz", images=np.random.default_rng(0).random((20, 4, 4), np.float32))
    options = {"data": str(tmp_path / "x.npz"), "width": 8, "depth": 1, "levels": 2, "steps": 3}
    out = tmp_path / "run"
    list(fit(TrainConfig(out=tmp_path / "whole", **options)))
    list(fit(TrainConfig(out=out, **options)))
    shutil.rmtree(saves.of_run(out)[0].folder)
    list(fit(TrainConfig(out=out, resume=True)))
    one, two = (run_folder.read_weights(tmp_path / f) for f in ("run", "whole"))
    assert all(torch.equal(one[k], two[k]) for k in two) and len(lines(out)) == 1
    shutil.rmtree(saves.of_run(out)[0].folder)
    with pytest.raises(ValueError, match="has not been saved yet"):
        run_folder.open_run(out)


def test_a_record_of_images_without_a_run_is_not_taken(tmp_path):
    """Of a process that was killed between it and the config."""
    np.savez(tmp_path / "x.npz", images=np.random.default_rng(0).random((20, 4, 4), np.float32))
    out = tmp_path / "run"
    out.mkdir()
    splits.keep(out, {name: torch.zeros(2, 16).byte() for name in ("training", "held_out")})
    config = TrainConfig(
        data=str(tmp_path / "x.npz"), out=out, width=8, depth=1, levels=2, steps=2, held_out=5
    )
    list(fit(config))
    assert len(splits.part(config, "held_out")[0]) == 5


def test_what_killed_processes_left_is_swept_and_what_is_being_written_is_not(tmp_path):
    left = tmp_path / f".x.npz.{'0' * 16}"
    left.write_bytes(b"half")
    (tmp_path / f".step-000000003.{'0' * 16}").mkdir()
    with files.replacing(tmp_path / "x.npz") as file:
        file.write(b"whole")
        files.sweep(tmp_path)
        assert len(list(tmp_path.iterdir())) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["x.npz"]
