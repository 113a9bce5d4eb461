"""The command `fastscore train`."""

import contextlib
import copy
import json
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
from tyro.conf import arg

from fastscore import distributed
from fastscore.cli import draw, evaluate, metrics, pictures, plan, rows, run_folder, splits
from fastscore.cli.config import TrainConfig
from fastscore.cli.fit import fit, refuse_another_run
from fastscore.cli.progress import Progress
from fastscore.training import files, ranks, signals


def train(config: Annotated[TrainConfig, arg(name="")]) -> None:
    """Train a noise-conditional score network, or a classifier of noisy images."""
    run(config)


def run(
    config: TrainConfig,
    draw_pictures: Callable[[Path, Callable], object] | None = None,
    *,
    again: str = "--resume",
) -> None:
    """Train, then show what has been learnt, after Ctrl-C, too.

    draw_pictures: of a score network, called draw_pictures(out, check); check raises between states
    and pictures where a signal leaves the rest out. again: what an interrupted run goes on with.
    """
    with signals.stop_on_signals() as stop:
        with ranks.joined() as together:
            config = _planned(_going_on(config, together), together)
            out = Path(config.out)
            with contextlib.closing(_fitted(config, together)) as updates:
                _show_progress(updates, config, stop, together)
            # Also of a signal after the last step: all end in the same way.
            stop.signal = together.ends(stop.signal)
        if stop and together.leads:
            print(f"\ninterrupted; the run is saved, go on with {again}", flush=True)
        # Whoever presses Ctrl-C wants to see what there is; a scheduler waits for the end.
        if together.leads and (not stop or stop.signal == signal.SIGINT):
            with distributed.alone():
                _finish(config, out, stop, draw_pictures or _draw_pictures)
        # Nothing is left that a restart would have to do.
        if together.leads and not stop:
            ranks.release(out)
    if stop:
        sys.exit(stop.status)


def _going_on(config, together):
    """The options of the run; torchrun starts the same command again where a process has died."""
    again = together.leads and not config.resume and ranks.goes_on(Path(config.out))
    if together.highest(again) and run_folder.holds_run(config.out):
        config = copy.copy(config)
        config.resume = True
    return run_folder.resumed(config) if config.resume else config


def _planned(config, together):
    """The options of a run, those of a new one with what follows from data and budget, which is
    printed."""
    if config.resume:
        return config
    if together.leads:
        refuse_another_run(Path(config.out))
    made = plan.made(config, together)
    if together.leads:
        print(made, flush=True)
    return made.config


def _fitted(config, together):
    return fit(config) if together.size == 1 else fit(config, together)


def _finish(config, out, stop, draw_pictures):
    """Pictures or a report; a signal that comes now leaves the rest out."""
    seen = stop.signal
    try:
        if config.task == "classifier":
            _report_classifier(out)
        else:
            draw_pictures(out, lambda: stop.signal == seen or stop.check())
    except signals.Stopped:
        print("\ninterrupted; the run is saved, its pictures are not all drawn")


def _show_progress(updates, config, stop, together):
    told = {"images": config.batch_size, "shown": together.leads}
    with Progress("train", config.steps, "step", **told) as progress:
        for step, loss in updates:
            progress.reach(step + 1, loss)
            stop.signal = together.ends(stop.signal)
            if stop:
                return


def with_loss_curve(out: Path) -> run_folder.TrainedRun:
    """A run, whose loss of each level is drawn in its folder."""
    trained = run_folder.open_run(out)
    records = metrics.read(out)
    if records:
        told = trained.config.loss, trained.config.weighting
        pictures.save_loss_curve(out / "loss.png", records, trained.sigmas.tolist(), *told)
    return trained


def _draw_pictures(out, check):
    """Of a score network: the loss of each level, 64 samples and the path of the first eight.

    check: called between states and pictures, to leave the rest out.
    """
    net, sigmas, shape, config = with_loss_curve(out)
    check()
    # Of a run that knows classes, each in turn.
    labels = torch.arange(64) % config.classes if config.classes else None
    drawn = draw.draw_shown("pictures", draw.prepare(net, sigmas, shape, 64, labels=labels), check)
    units = splits.units(out)
    if units is not None:
        rows.write(out / "samples.csv", drawn.samples, units)
        print(f"run: {out}\nsamples: {out / 'samples.csv'}, {out / 'loss.png'}")
        return
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
