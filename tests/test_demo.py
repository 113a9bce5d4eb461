"""The demo: its run, its pictures, what it does when it is called again."""

import functools
import json
import signal

import numpy as np
import pytest
import torch

from fastscore import guidance, sampling
from fastscore.cli import demo, evaluate, metrics, progress, readers, run_folder, train
from fastscore.cli.sampler_options import SamplerOptions
from fastscore.datasets import named
from fastscore.training import saves

PICTURES = ("classes.png", "path.png", "loss.png")


# Reading it takes two seconds.
mnist = functools.cache(named.NAMED["mnist"])


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    options = {"width": 8, "multipliers": (1,), "levels": 3, "batch_size": 8, "steps": 4}
    monkeypatch.setattr(demo, "OPTIONS", demo.OPTIONS | options)
    monkeypatch.setattr(demo, "EACH", 2)
    monkeypatch.setattr(demo, "SAMPLER", {"steps_per_level": 1})
    monkeypatch.setattr(readers, "STEPS", 4)
    monkeypatch.setitem(named.NAMED, "mnist", mnist)


def test_the_demo_trains_draws_each_class_and_judges(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(progress, "FIRST", 0.0)
    monkeypatch.setattr(progress, "EVERY", 0.0)
    out = tmp_path / "demo"
    demo.demo(out)

    _, _, shape, config = run_folder.open_run(out)
    assert shape == (1, 28, 28) and config.classes == 10 and config.data == "mnist"
    assert metrics.read(out)[-1]["step"] == 4
    report = json.loads((out / "report.json").read_text())
    guided = report["guided"]
    assert guided["n"] == 20 and sum(guided["per_class"]) == 20 and report["weight"] == 1
    assert guided["recognised"] == pytest.approx(np.mean(guided["recognised_per_class"]))
    for name in PICTURES:
        assert pixels(out / name).shape[1] >= 600
    told = capsys.readouterr()
    assert "recognised as the class asked for" in told.out
    assert all(name in told.out for name in PICTURES)
    for line in ("train: step 4 of 4", "digits: level 4 of 4", "demo: classifier: step 4 of 4"):
        assert line in told.err

    # With guidance, without, and of no class.
    few = functools.partial(evaluate.drawn_sets, steps_per_level=1)
    monkeypatch.setattr(evaluate, "drawn_sets", few)
    evaluate.evaluate(out, n=10, weight=3.0)
    report = json.loads((out / "report.json").read_text())
    sets = ("guided", "conditional", "unconditional", "held_out")
    assert [name for name in report if name in sets] == list(sets) and report["weight"] == 3
    assert [report[name]["n"] for name in sets] == [10, 10, 10, 500]
    assert [("recognised" in report[name]) for name in sets] == [True, True, False, True]
    assert "| | guided, w = 3 | conditional | unconditional |" in (out / "report.md").read_text()

    # Finished: nothing is trained, the same pictures are made again.
    weights = run_folder.read_weights(out)
    before = [(out / name).read_bytes() for name in PICTURES]
    (out / "classes.png").unlink()
    demo.demo(out)
    after = run_folder.read_weights(out)
    assert all(torch.equal(weights[name], after[name]) for name in weights)
    assert [(out / name).read_bytes() for name in PICTURES] == before

    # Further, where more steps are asked for.
    monkeypatch.setattr(demo, "show", lambda out, check: None)
    demo.demo(out, steps=6)
    assert saves.of_run(out)[0].step == 6


def test_samples_are_of_the_class_asked_for_and_led_by_the_weight(tmp_path, monkeypatch):
    """What `evaluate` draws is `classifier_free` of the run's network, by name."""
    monkeypatch.setattr(demo, "show", lambda out, check: None)
    demo.demo(tmp_path / "run")
    trained = run_folder.open_run(tmp_path / "run")
    # At the start a UNet knows nothing of its labels.
    with torch.no_grad():
        trained.net.last.weight.normal_(generator=torch.Generator().manual_seed(0))
        trained.net.requires_grad_(False)
    law = {"steps_per_level": 2, "initial_law": "gaussian"}
    sets = evaluate.drawn_sets(trained, 20, 5, 2.0, **law)
    asked = torch.arange(20) // 2
    assert torch.equal(sets["guided"].asked, asked) and sets["unconditional"].asked is None

    scores = {
        "guided": guidance.classifier_free(trained.net, asked, weight=2.0),
        "conditional": guidance.classifier_free(trained.net, asked, weight=0.0),
        "unconditional": trained.net,
    }
    options = SamplerOptions(**law).arguments(trained.sigmas, trained.net)
    for name, score in scores.items():
        expected = sampling.sample(score, shape=(20, 1, 28, 28), seed=5, **options)
        assert torch.equal(sets[name].samples, expected), name
    guided, conditional, unconditional = (sets[name].samples for name in scores)
    assert not torch.equal(guided, conditional) and not torch.equal(conditional, unconditional)


def test_a_weight_belongs_to_samples_of_a_run_that_knows_classes(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "QUICK", {"width": 8, "depth": 1, "steps": 2, "held_out": 300})
    monkeypatch.setattr(demo.evaluate, "evaluate", lambda out: None)
    demo.demo(tmp_path / "quick", quick=True)
    monkeypatch.undo()
    for options in ({}, {"likelihood": True}):
        with pytest.raises(ValueError, match="weight belongs to"):
            evaluate.evaluate(tmp_path / "quick", n=2, weight=1.0, **options)


@pytest.mark.parametrize("quick", [False, True])
def test_who_interrupts_a_demo_is_told_how_it_goes_on(tmp_path, monkeypatch, capsys, quick):
    monkeypatch.setattr(demo, "QUICK", {"width": 8, "depth": 1, "steps": 4, "held_out": 300})
    fit = train.fit

    def terminated(*arguments):
        for step, loss in (updates := fit(*arguments)):
            if step == 1:
                signal.raise_signal(signal.SIGTERM)
            yield step, loss
        updates.close()

    monkeypatch.setattr(train, "fit", terminated)
    with pytest.raises(SystemExit) as stop:
        demo.demo(tmp_path / "run", quick=quick)
    assert stop.value.code == 143
    told = capsys.readouterr().out
    assert "interrupted; the run is saved, go on with the same command" in told


def test_an_interrupted_demo_goes_on_where_it_was(tmp_path, monkeypatch):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    monkeypatch.setattr(demo, "show", lambda out, check: None)
    demo.demo(whole)
    fit = train.fit

    def broken_off(*arguments):
        updates = fit(*arguments)
        for _ in range(2):
            yield next(updates)
        updates.close()

    monkeypatch.setattr(train, "fit", broken_off)
    demo.demo(parts)
    assert saves.of_run(parts)[0].step == 2
    monkeypatch.setattr(train, "fit", fit)
    demo.demo(parts)
    one, other = (run_folder.read_weights(out) for out in (whole, parts))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_folder_of_the_other_demo_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "QUICK", {"width": 8, "depth": 1, "steps": 2, "held_out": 300})
    monkeypatch.setattr(demo.evaluate, "evaluate", lambda out: None)
    demo.demo(tmp_path / "quick", quick=True)
    assert run_folder.read_config(tmp_path / "quick")[0].data == "digits"
    message = "quick must be a new folder or hold a run of mnist; it holds one of digits"
    with pytest.raises(ValueError, match=message):
        demo.demo(tmp_path / "quick")


def test_the_quick_demo_is_the_run_that_it_always_was(tmp_path):
    """9,000 steps of the perceptron that `train` has by default, 300 digits held out, seed 0."""
    config = demo.TrainConfig(data="digits", out=tmp_path, **demo.QUICK)
    plain = demo.TrainConfig(data="digits", out=tmp_path, held_out=300)
    assert config == plain
    found = config.network, config.width, config.depth, config.levels, config.steps
    assert found == ("mlp", 256, 3, 16, 9000)


def test_classes_stand_in_rows_and_levels_above_columns(tmp_path, monkeypatch):
    """Samples drawn in turn are sorted; the path shows the first state and the last."""
    saved = {}

    def save(path, images, title, rows, columns=None):
        saved[path.name] = images, list(rows), columns

    monkeypatch.setattr(demo.pictures, "save_labelled", save)
    asked = torch.arange(6) % 3
    samples = asked.reshape(-1, 1, 1, 1).float()
    demo.save_classes(tmp_path / "classes.png", samples, asked, ["a", "b", "c"])
    assert saved["classes.png"][0].flatten().tolist() == [0, 0, 1, 1, 2, 2]

    class Job:
        states = 5
        sampler = {"sigmas": torch.tensor([1.0, 0.5, 0.25, 0.125])}

    states = torch.arange(10.0).reshape(5, 2, 1, 1, 1)
    monkeypatch.setattr(demo, "_COLUMNS", 3)
    demo.save_path(tmp_path / "path.png", states, Job, ["a", "b"])
    images, rows, columns = saved["path.png"]
    assert images.flatten().tolist() == [0, 4, 8, 1, 5, 9]
    assert rows == ["a", "b"] and columns == ["σ = 1", "σ = 0.25", "at last"]


def pixels(path):
    from PIL import Image

    return np.asarray(Image.open(path).convert("L"))
