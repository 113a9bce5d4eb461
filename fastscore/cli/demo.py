"""The command `fastscore demo`: from images to samples that were asked for, in one go."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from fastscore.cli import draw, evaluate, pictures, run_folder, splits, train
from fastscore.cli.config import TrainConfig

# Of the U-Net, 5 minutes on two cores.
OPTIONS = {"network": "unet", "steps": 5000, "held_out": 500, "shift": 1, "label_drop": 0.15}
# Of the perceptron, 2 minutes.
QUICK = {"held_out": 300}
SAMPLER = {"steps_per_level": 4}
EACH = 10   # digits of each class
_AGAIN = "the same command"
_COLUMNS = 10   # states of the path that are shown


def demo(
    out: Path = Path("demo"),
    quick: bool = False,
    steps: int | None = None,
) -> None:
    """Train a small U-Net that knows the classes on MNIST's digits, and draw each digit as asked.

    It draws by annealed Langevin dynamics with classifier-free guidance, and has a classifier of
    real digits read what it drew. `fastscore evaluate demo -n 300` says more.

    Args:
        out: run folder; of a finished run the pictures and the report are made again, an
            interrupted one goes on.
        quick: take a perceptron and scikit-learn's 8x8 digits, which takes two minutes.
        steps: number of updates; 5000 unless given (9000 if quick), or those of the run that goes
            on.
    """
    data = "digits" if quick else "mnist"
    options = QUICK if quick else OPTIONS
    if (out / run_folder.CONFIG).exists():
        _check_data(out, data)
        options = {"resume": True}
    if steps is not None:
        options = options | {"steps": steps}

    config = TrainConfig(data=data, out=out, **options)
    if quick:
        train.run(config, again=_AGAIN)
        evaluate.evaluate(out)
    else:
        train.run(config, show, again=_AGAIN)


def _check_data(out, data):
    found = run_folder.read_config(out)[0].data
    if found != data:
        raise ValueError(
            f"demo: {out} must be a new folder or hold a run of {data}; it holds one of {found}."
        )


def show(out: Path, check: Callable[[], object]) -> None:
    """Draw ten samples of each class of a run, and write its pictures and its report.

    check: called between states and pictures, to leave the rest out.
    """
    net, sigmas, shape, config = train.with_loss_curve(out)
    check()

    # Each class in turn, so that the first eight, whose path is shown, are of eight classes.
    asked = torch.arange(EACH * config.classes) % config.classes
    options = {"labels": asked, "weight": evaluate.WEIGHT, "batch_size": 100} | SAMPLER
    job = draw.prepare(net, sigmas, shape, len(asked), **options)
    drawn = draw.draw_shown("digits", job, check)
    names = [str(k) for k in range(config.classes)]
    save_classes(out / "classes.png", drawn.samples, asked, names)
    save_path(out / "path.png", drawn.path, job, [names[k] for k in asked[: draw.FOLLOWED]])
    check()

    data = splits.source(config)
    parts = (splits.part(config, name, data) for name in ("training", "held_out"))
    real = evaluate.Real(*(t for part in parts for t in part))
    check()
    reader = evaluate.reader_shown("demo", real)
    guided = {"guided": evaluate.Drawn(drawn.samples, asked)}
    report = evaluate.compare(guided, real, reader) | {"weight": evaluate.WEIGHT}
    evaluate.write(out, "report", report, evaluate.markdown(report))
    shown = ", ".join(str(out / name) for name in ("classes.png", "path.png", "loss.png"))
    print(f"run: {out}\npictures: {shown}\nmore samples, guided and not: fastscore evaluate {out}")


def save_classes(path: Path, samples: Tensor, asked: Tensor, names: Sequence[str]) -> None:
    """Write samples as PNG, a row for each class."""
    order = asked.argsort(stable=True)
    title = "Digits as asked for: annealed Langevin dynamics, classifier-free guidance"
    pictures.save_labelled(path, samples[order], title, names)


def save_path(path: Path, states: Tensor, job: draw.Job, names: Sequence[str]) -> None:
    """Write the way of some samples of a job, (states, N, C, H, W), from noise to image as PNG."""
    places = torch.linspace(0, len(states) - 1, min(_COLUMNS, len(states))).round().long()
    levels = torch.tensor(draw.shown_states(job.states))[places].tolist()
    sigmas = [f"σ = {sigma:.2g}" for sigma in job.sampler["sigmas"].tolist()]
    heads = [*sigmas, "at last"]
    title = "From noise to digits: the state after some of the noise levels"
    shown = states[places].transpose(0, 1).flatten(0, 1)
    pictures.save_labelled(path, shown, title, names, [heads[level] for level in levels])
