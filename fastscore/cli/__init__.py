"""fastscore train | sample | evaluate | recipe | demo | doctor."""

import importlib.util
import json
import sys
import time
from pathlib import Path
from typing import Annotated

from fastscore.cli.conditions import UNCONDITIONAL, ConditionOptions
from fastscore.cli.drawing import SamplerOptions

try:
    from tyro.conf import arg
except ImportError:   # main() says what to install; `doctor` works without

    def arg(**options):
        return None


PACKAGES = {"tyro": "tyro", "tqdm": "tqdm", "PIL": "pillow", "matplotlib": "matplotlib", "safetensors": "safetensors", "tomli_w": "tomli-w"}


def train(config) -> None:
    from tqdm import tqdm

    from fastscore.cli import pictures, ranks, runs

    ranks.one_process("train")
    if config.resume:
        config = runs.resumed(config)
    if config.task == "classifier":
        from fastscore.cli import classifier_training

        return classifier_training.command(config)
    loop = runs.train(config)
    try:
        with runs.ended_like_interrupted(), tqdm(total=config.steps, unit="step", desc="train", disable=None) as bar:
            start, begin = time.perf_counter(), None
            for step, loss in loop:
                begin = step if begin is None else begin
                bar.n = step + 1
                rate = (step + 1 - begin) * config.batch_size / (time.perf_counter() - start)
                bar.set_postfix(loss=f"{loss:.3f}", images_per_s=f"{rate:.0f}", refresh=False)
                bar.update(0)
    except KeyboardInterrupt:
        print("\ninterrupted; the run is saved, go on with --resume")
    finally:
        loop.close()
    out = Path(config.out)
    _, sigmas, _, _ = runs.open_run(out)
    if (out / "metrics.jsonl").exists():
        records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        pictures.save_loss_curve(out / "loss.png", records, sigmas.tolist(), config.loss)
    samples, strip = runs.draw(out, 64)
    pictures.save_grid(out / "samples.png", samples)
    pictures.save_strip(out / "levels.png", strip)
    print(f"run: {out}\npictures: {out / 'samples.png'}, {out / 'levels.png'}, {out / 'loss.png'}")


def sample(run: Path, /, options: Annotated[SamplerOptions, arg(name="")], asked: Annotated[ConditionOptions, arg(name="")] = UNCONDITIONAL,
           n: Annotated[int, arg(aliases=["-n"])] = 100, out: Path = Path("grid.png"), seed: int = 0, first_sample: int = 0,
           batch_size: int = 100, path: Path | None = None, arch: str | None = None, ema: bool = True,
           sigma_max: float | None = None, sigma_min: float | None = None, levels: int | None = None,
           image_size: int | None = None, nonlinearity: str | None = None, rescaled: bool | None = None,
           logit_transform: bool | None = None, std: bool | None = None, target: str | None = None) -> None:  # fmt: skip
    """Draw samples of a trained run, or of an official NCSN, NCSNv2 or CAS checkpoint, and write them as a grid.

    Started by torchrun, every process draws its share, and one writes the samples that a single process would have drawn.

    Args:
        run: run folder, or a checkpoint (.pth).
        options: the sampler.
        asked: conditions on the samples.
        n: number of samples.
        out: a .png for a grid, or a .npz for the samples themselves (array `images`).
        seed: of the sampler.
        first_sample: global number of the first sample; splits of one run agree.
        batch_size: samples computed at a time; a job of several goes on where it was interrupted when the command is given again.
        path: a .png for the way of the first eight samples through the noise levels.
        arch: of a checkpoint, ncsn, ncsnv2, ncsnv2deeper or ncsnv2deepest; unless given it follows from the names in the file.
        ema: take a checkpoint's averaged weights.
        sigma_max: largest noise, for checkpoints that store no ladder (NCSN, CAS).
        sigma_min: smallest noise, likewise.
        levels: number of noise levels, likewise.
        image_size: of a checkpoint's samples; 32, 128 (ncsnv2deeper) or 256 (ncsnv2deepest) unless given.
        nonlinearity: of a checkpoint's config, which the file does not tell: elu, relu, lrelu or swish.
        rescaled: likewise: its data were in [-1, 1].
        logit_transform: likewise: its data were logits.
        std: likewise, of CAS.
        target: likewise, of CAS: gaussian or dae.
    """
    from tqdm import tqdm

    from fastscore import distributed
    from fastscore.cli import conditions, drawing, ranks

    if n < 1 or batch_size < 1:
        raise ValueError(f"sample: n and batch_size must be at least 1; got {n} and {batch_size}.")
    if out.suffix not in (".png", ".npz"):
        raise ValueError(f"sample: out must end in .png or .npz; got {out}.")
    if path is not None and path.suffix != ".png":
        raise ValueError(f"sample: path must end in .png; got {path}.")
    if not out.parent.is_dir():
        raise ValueError(f"sample: the folder {out.parent} does not exist.")
    for file in (out, path):
        if file is not None and file.is_dir():
            raise ValueError(f"sample: {file} is a folder; it must be the name of a file.")
    condition = conditions.prepare(run, asked)
    if condition and path is not None:
        raise ValueError("sample: path shows samples without a condition; leave it out.")
    options_of_file = {"image_size": image_size, "nonlinearity": nonlinearity, "rescaled": rescaled,
                       "logit_transform": logit_transform, "std": std, "target": target}  # fmt: skip
    net, sigmas, shape = open_network(run, arch, ema, (sigma_max, sigma_min, levels), options_of_file)
    if condition and (rescaled or logit_transform):
        raise ValueError("sample: conditions are for networks of images in [0, 1], not for rescaled or logit-transformed ones.")
    net.to(ranks.device())
    (rank, _), (_, count) = distributed.environment(), distributed.share(n)
    parts = ranks.own(out.with_name(f"{out.name}.parts")) if count > batch_size and not condition else None
    total = -(-count // batch_size) * drawing.states_per_batch(sigmas, options.sampler, options.denoise)
    job = {"seed": seed, "first_sample": first_sample, "batch_size": batch_size, **drawing.chosen(options)}
    try:
        with tqdm(total=total, unit="level", desc="sample", disable=rank > 0 or None) as bar:
            if condition:
                result = conditions.draw_shared(net, sigmas, shape, n=n, done=bar.update, **condition, **job)
            else:
                samples, strip = ranks.draw(net, sigmas, shape, n, done=bar.update, parts=parts, **job)
    except KeyboardInterrupt:
        kept = f"; {parts} keeps the finished batches, the same command goes on" if parts is not None and parts.exists() else ""
        sys.exit("interrupted" + kept)
    if rank == 0:
        if condition:
            conditions.save(out, result)
        else:
            to_images = getattr(net, "to_images", lambda x: x)   # official networks may have other data
            write_samples(out, path, to_images(samples), to_images(strip))
    if parts is not None:
        drawing.remove_parts(parts)
    if rank == 0:
        print(f"{n} samples: {out}" + (f" ({conditions.described(result)})" if condition else ""))


def write_samples(out, path, samples, strip):
    import numpy as np

    from fastscore.cli import pictures

    if out.suffix == ".npz":
        np.savez(out, images=samples.clamp(0, 1).numpy())
    else:
        pictures.save_grid(out, samples)
    if path is not None:
        pictures.save_strip(path, strip)


def open_network(run, arch, ema, ladder, options):
    """The network, ladder and sample shape of a run folder or an official checkpoint."""
    from fastscore import models, schedules
    from fastscore.cli import runs

    given = [value is not None for value in ladder]
    if not (run.is_file() or run.suffix == ".pth"):
        if arch or not ema or any(given) or any(value is not None for value in options.values()):
            names = ", ".join(("arch, ema, sigma_max, sigma_min, levels", *list(options)[:-1]))
            raise ValueError(f"sample: {names} and {list(options)[-1]} are for checkpoints; {run} is none.")
        return runs.open_run(run)[:3]
    if any(given) and not all(given):
        raise ValueError("sample: sigma_max, sigma_min and levels are given together or not at all.")
    sigmas = schedules.geometric(*ladder) if all(given) else None
    net = models.load_official(run, ema=ema, arch=arch, sigmas=sigmas, **options).requires_grad_(False)
    return net, net.sigmas, net.sample_shape


def evaluate(run: Path, /, n: Annotated[int, arg(aliases=["-n"])] = 500, seed: int = 0, likelihood: bool = False,
             grey_levels: int | None = None) -> None:  # fmt: skip
    """Compare samples of a run with held-out real images: classifier and nearest neighbours; or the log-density of held-out images.

    Args:
        run: run folder, trained with held_out > 0; of a data set with labels, except with --likelihood.
        n: number of samples, or of images whose density is computed.
        seed: of the sampler, or of noise and projections.
        likelihood: report the log-density of held-out and of training images.
        grey_levels: also their bits per dimension, dequantised: 17 for the digits, 256 for 8-bit images.
    """
    if likelihood:
        return evaluate_likelihood(run, n, seed, grey_levels)
    if grey_levels is not None:
        raise ValueError("evaluate: grey_levels belongs to --likelihood.")
    from fastscore import datasets
    from fastscore.cli import checkpoint, evaluation, runs, splits

    if n < 1:
        raise ValueError(f"evaluate: n must be at least 1; got {n}.")
    _, _, _, config = runs.open_run(run)
    images, labels = datasets.load(config.data)
    if labels is None or config.held_out == 0:
        raise ValueError("evaluate: the run must be of labelled data and keep images apart (train --held-out 300).")
    train_set, held_out = splits.split(config, images, labels)
    samples, _ = runs.draw(run, n, seed=seed)
    result = evaluation.report(samples, images[train_set], labels[train_set], images[held_out], labels[held_out])
    checkpoint.write_atomic(run / "report.json", json.dumps(result, indent=2).encode())
    checkpoint.write_atomic(run / "report.md", evaluation.markdown(result).encode())
    print(evaluation.markdown(result) + f"report: {run / 'report.md'}")


def evaluate_likelihood(run, n, seed, grey_levels):
    from fastscore.cli import checkpoint, held_out

    result = held_out.report(run, n, seed=seed, grey_levels=grey_levels)
    checkpoint.write_atomic(run / "likelihood.json", json.dumps(result, indent=2).encode())
    checkpoint.write_atomic(run / "likelihood.md", held_out.markdown(result).encode())
    print(held_out.markdown(result) + f"report: {run / 'likelihood.md'}")


def demo(out: Path = Path("demo"), steps: int | None = None) -> None:
    """Train on the 8x8 digits, sample, and report.

    Args:
        out: run folder; a finished one is only evaluated again, an interrupted one goes on.
        steps: number of updates; 9000 unless given, or those of the run that goes on.
    """
    from fastscore.cli import runs

    resume = (out / "state.safetensors").exists()
    train(runs.TrainConfig(data="digits", out=out, held_out=300, steps=steps, resume=resume))
    evaluate(out)


def _doctor() -> None:
    """Print versions, devices, which back end serves which op and why not, and a self-test of each."""
    from fastscore.cli.doctor import main

    sys.exit(main())


def main() -> None:
    """The command `fastscore`; every wrong value is one sentence and exit code 2."""
    if sys.argv[1:] == ["doctor"]:
        _doctor()
    missing = [package for module, package in PACKAGES.items() if importlib.util.find_spec(module) is None]
    if missing:
        sys.exit(f"error: the command line needs {', '.join(missing)}: pip install 'fastscore[cli]'.")
    import tyro

    from fastscore.cli import recipe, runs

    app = tyro.extras.SubcommandApp()

    @app.command(name="train")
    def _train(config: tyro.conf.OmitArgPrefixes[runs.TrainConfig]) -> None:
        """Train a noise-conditional score network, or a classifier of noisy images."""
        train(config)

    for function in (sample, evaluate, recipe.recipe, demo):
        app.command(function)
    app.command(_doctor, name="doctor")
    try:
        app.cli(prog="fastscore")
    except (ValueError, TypeError, FloatingPointError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
