"""The network of `make demo`, which knows the classes of MNIST's 28x28 digits."""

import torch

from fastscore.cli import demo, evaluate, readers, run_folder, splits
from fastscore.cli.config import TrainConfig
from fastscore.cli.draw import FOLLOWED, prepare
from fastscore.cli.draw import draw as draw_job
from fastscore.cli.fit import fit

from gallery_tables import table

TINY = {"width": 8, "multipliers": (1,), "levels": 3, "batch_size": 8, "steps": 2}


def trained(folder, quick):
    """The run of the demo in this folder, trained unless it is there."""
    options = demo.OPTIONS | (TINY if quick else {})
    if not run_folder.is_saved(folder):
        for _ in fit(TrainConfig(data="mnist", out=folder, **options)):
            pass
    return run_folder.open_run(folder)


def draw_pictures(out, run):
    """Ten digits of each class, and the path of eight."""
    net, sigmas, shape, config = run
    asked = torch.arange(demo.EACH * config.classes) % config.classes
    options = {"labels": asked, "weight": evaluate.WEIGHT, "batch_size": 100} | demo.SAMPLER
    job = prepare(net, sigmas, shape, len(asked), **options)
    drawn = draw_job(job)
    names = [str(k) for k in range(config.classes)]
    demo.save_classes(out / "mnist.png", drawn.samples, asked, names)
    demo.save_path(out / "path.png", drawn.path, job, names[: FOLLOWED])


def draw(out, folder, quick):
    """Returns the lines of the section, and its rows."""
    run = trained(folder / "mnist", quick)
    draw_pictures(out, run)
    data = splits.source(run.config)
    parts = (splits.part(run.config, name, data) for name in ("training", "held_out"))
    real = evaluate.Real(*(t for part in parts for t in part))
    reader = readers.reader(real.images, real.labels, steps=3 if quick else readers.STEPS)
    sets = evaluate.drawn_sets(run, 10 if quick else 300, 0, evaluate.WEIGHT)
    report = evaluate.compare(sets, real, reader)

    titles = {"guided": f"guided, w = {evaluate.WEIGHT:g}", "held_out": "held-out real images"}
    rows = [
        {"samples": titles.get(name, name), **figures(report[name])}
        for name in (*sets, "held_out")
    ]
    pictures = [
        "![ten digits of each class, a row for each](gallery/mnist.png)\n",
        "The way of eight of them:\n",
        "![the state after some of the noise levels](gallery/path.png)\n",
    ]
    right = f"{100 * report['classifier_accuracy_held_out']:.1f} %"
    return [TEXT.format(right=right), *pictures, *table(rows)], rows


def figures(row):
    return {
        "recognised as asked": share(row.get("recognised")),
        "a classifier is at least 90 % sure of": share(row["sure"]),
        "images per class": ", ".join(map(str, row["per_class"])),
        "median distance to the nearest training image": row["nearest_training_distance"]["median"],
    }


def share(value):
    return "" if value is None else f"{100 * value:.0f} %"


TEXT = """## Digits as asked for

The network of `make demo`: a U-Net of 0.7 million parameters (`models.UNet.small`), 5,000 updates
on 32 of 4,500 MNIST digits each, told the class of 85 % of them. It draws by annealed Langevin
dynamics, 50 noise levels and four steps on each, with classifier-free guidance: `fastscore sample
demo --condition class=3 --weight 1`. A classifier of the same real digits, which is right on
{right} of those that were held out, reads what is drawn.
"""
