"""The command `fastscore train`."""

import contextlib
import json
import signal
import sys
from pathlib import Path
from typing import Annotated

import torch
from tyro.conf import arg

from fastscore import distributed
from fastscore.cli import draw, evaluate, metrics, pictures, run_folder, splits
from fastscore.cli.config import TrainConfig
from fastscore.cli.fit import fit
from fastscore.cli.progress import Progress
from fastscore.training import files, signals


def train(config: Annotated[TrainConfig, arg(name="")]) -> None:
    """Train a noise-conditional score network, or a classifier of noisy images."""
    world_size = distributed.environment()[1]
    if world_size > 1:
        raise ValueError(
            f"train: runs as one process; got WORLD_SIZE {world_size} "
            "(only `sample` is split over processes)."
        )
    if config.resume:
        config = run_folder.resumed(config)
    out = Path(config.out)
    with signals.stop_on_signals() as stop:
        with contextlib.closing(fit(config)) as updates:
            _show_progress(updates, config, stop)
        if stop:
            print("\ninterrupted; the run is saved, go on with --resume", flush=True)
        # Whoever presses Ctrl-C wants to see what there is; a scheduler waits for the end.
        if not stop or stop.signal == signal.SIGINT:
            _finish(config, out, stop)
    if stop:
        sys.exit(stop.status)


def _finish(config, out, stop):
    """Pictures or a report; a signal that comes now leaves the rest out."""
    seen = stop.signal
    try:
        if config.task == "classifier":
            _report_classifier(out)
        else:
            _draw_pictures(out, lambda: stop.signal == seen or stop.check())
    except signals.Stopped:
        print("\ninterrupted; the run is saved, its pictures are not all drawn")


def _show_progress(updates, config, stop):
    with Progress("train", config.steps, "step", images=config.batch_size) as progress:
        for step, loss in updates:
            progress.reach(step + 1, loss)
            if stop:
                return


def _draw_pictures(out, check):
    """Of a score network: the loss of each level, 64 samples and the path of the first eight.

    check: called between states and pictures, to leave the rest out.
    """
    net, sigmas, shape, config = run_folder.open_run(out)
    records = metrics.read(out)
    if records:
        pictures.save_loss_curve(out / "loss.png", records, sigmas.tolist(), config.loss)
    check()
    # Of a run that knows classes, each in turn.
    labels = torch.arange(64) % config.classes if config.classes else None
    drawn = draw.draw_shown("pictures", draw.prepare(net, sigmas, shape, 64, labels=labels), check)
    pictures.save_grid(out / "samples.png", drawn.samples)
    check()
    pictures.save_strip(out / "levels.png", drawn.path)
    names = ", ".join(str(out / name) for name in ("samples.png", "levels.png", "loss.png"))
    print(f"run: {out}\npictures: {names}")


def _report_classifier(out):
    """Of a classifier: the fraction of held-out images that it gets right at each level."""
    net, sigmas, _, config = run_folder.open_run(out, "classifier")
    if config.held_out:
        held_out = splits.part(config, "held_out")
        found = evaluate.accuracy(net, *held_out, sigmas, seed=config.seed)
        report = {"sigmas": sigmas.tolist(), "accuracy_held_out": found}
        files.write_atomic(out / "report.json", json.dumps(report, indent=2).encode())
        print("noise level   held-out images classified rightly")
        for sigma, right in zip(sigmas.tolist(), found):
            print(f"{sigma:11.4f}   {100 * right:5.1f} %")
    print(f"run: {out}")
