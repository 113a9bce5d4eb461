"""`fastscore train --task classifier`: a classifier of noisy images, in a run folder like the others."""

import json
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from fastscore import datasets, models, perturb, random, schedules, training
from fastscore.cli import checkpoint, runs, splits
from fastscore.losses.noise_conditional import draw_labels

_HELD_OUT = 1025  # the stream of the noise on held-out images


def train(config):
    """Yield (step, mean cross-entropy) after each update; the folder is complete every 500 steps and when the generator is closed.

        L_b = -log p(label_b | x_b + σ_b z, σ_b),    σ_b uniform on the ladder

    Raises:
        ValueError: as `runs.train`; the data have no labels; an option belongs to score networks.
    """
    if config.resume:
        config = runs.resumed(config)
    check(config)
    out = Path(config.out)
    if not config.resume and out.exists() and any(out.iterdir()):
        raise ValueError(f"train: {out} exists already; choose another folder or pass --resume.")
    data = datasets.load(config.data)
    images, labels = training_images(config, data)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    net, sigmas = build(config, images.shape[1:], int(labels.max()) + 1)
    return _train(config, out, images.to(device), labels.to(device), net.to(device), sigmas.to(device), splits.record(config, *data))


def check(config):
    runs.check(config)
    for name, value in (("network", "mlp"), ("loss", "denoising")):
        if getattr(config, name) != value:
            raise ValueError(f"train: {name} belongs to task score; a classifier is an mlp trained by cross-entropy.")


def training_images(config, data=None, *, held_out=False):
    """(images, labels) that the run trains on, or those it keeps away; data is what datasets.load(config.data) returned."""
    images, labels = datasets.load(config.data) if data is None else data
    if labels is None:
        raise ValueError(f"train: a classifier needs labels; {config.data} has none.")
    chosen = splits.split(config, images, labels)[1 if held_out else 0]
    return images[chosen], labels[chosen]


def build(config, shape, num_classes):
    """The classifier of images of `shape`, and its ladder."""
    sigmas = schedules.geometric(config.sigma_max, config.sigma_min, config.levels)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        dim = shape[0] * shape[1] * shape[2]
        return models.NoiseClassifier(dim, num_classes, width=config.width, depth=config.depth, sigmas=sigmas), sigmas


def _train(config, out, images, labels, net, sigmas, split):
    optimizer = torch.optim.Adam(net.parameters(), lr=config.lr, fused=True)
    ema = training.averaged(net, config.ema_decay)
    first = runs.restore(out, net, ema, optimizer) if config.resume else 0
    if first > config.steps:
        raise ValueError(f"train: {out} has done {first} steps already; steps must be at least that; got {config.steps}.")
    out.mkdir(parents=True, exist_ok=True)
    runs.forget_after(first, out / "metrics.jsonl")
    runs.write_config(out, config, images.shape[1:])
    splits.keep(out, split)

    def loss(model, batch, step):
        for group in optimizer.param_groups:
            group["lr"] = config.lr * runs.learning_rate(step, config.steps)
        level = draw_labels(len(sigmas), len(batch), seed=config.seed, step=step, device=batch.device)
        noisy = perturb(images[batch], sigmas[level], seed=config.seed, step=step)
        return F.cross_entropy(model(noisy, sigmas[level]), labels[batch], reduction="none")

    numbers = runs.batches(torch.arange(len(images), device=images.device), config, first)
    loop = training.training_loop(net, numbers, loss, steps=config.steps, optimizer=optimizer, first_step=first, ema=ema)
    done, begin, recent = first, time.perf_counter(), []
    try:
        for state in loop:
            done = state.step + 1
            recent.append(float(state.losses.mean()))
            if done % 100 == 0 or done == config.steps:
                line = {"step": done, "loss": sum(recent) / len(recent), "seconds": round(time.perf_counter() - begin, 2)}
                with open(out / "metrics.jsonl", "a") as file:
                    file.write(json.dumps(line) + "\n")
                recent = []
            if done % runs.SAVE_EVERY == 0:
                runs.save(out, net, ema, optimizer, done)
            yield state.step, float(state.losses.mean())
    finally:
        runs.save(out, net, ema, optimizer, done)


def open_classifier(folder):
    """(averaged network, sigmas, sample shape (C, H, W), config) of a classifier's run folder.

    Raises:
        ValueError: it is no run folder, or one of a score network.
    """
    config, shape = runs.read_config(folder)
    if config.task != "classifier":
        raise ValueError(f"{folder} holds a score network, not a classifier (train --task classifier).")
    weights = checkpoint.load(Path(folder) / "weights.safetensors")
    net, sigmas = build(config, shape, len(weights["last.bias"]))
    net.load_state_dict(weights)
    return net.eval().requires_grad_(False), sigmas, shape, config


@torch.no_grad()
def accuracy(net, images, labels, sigmas, *, seed=0):
    """The fraction of images whose label the classifier finds, at each noise level: a list like sigmas."""
    found = []
    for level, sigma in enumerate(sigmas.tolist()):
        z = random.normal(images.shape, seed=seed, step=level, stream=_HELD_OUT, device=images.device)
        found.append(float((net(images + sigma * z, sigma).argmax(1) == labels).double().mean()))
    return found


def command(config):
    """Train, then print and keep (report.json) the accuracy on held-out images at each level."""
    from tqdm import tqdm

    loop = train(config)
    try:
        with runs.ended_like_interrupted(), tqdm(total=config.steps, unit="step", desc="train", disable=None) as bar:
            for step, loss in loop:
                bar.n = step + 1
                bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
                bar.update(0)
    except KeyboardInterrupt:
        print("\ninterrupted; the run is saved, go on with --resume")
    finally:
        loop.close()
    net, sigmas, _, config = open_classifier(config.out)
    if config.held_out:
        found = accuracy(net, *training_images(config, held_out=True), sigmas, seed=config.seed)
        report = json.dumps({"sigmas": sigmas.tolist(), "accuracy_held_out": found}, indent=2)
        checkpoint.write_atomic(Path(config.out) / "report.json", report.encode())
        print("noise level   held-out images classified rightly")
        print("\n".join(f"{sigma:11.4f}   {100 * a:5.1f} %" for sigma, a in zip(sigmas.tolist(), found)))
    print(f"run: {config.out}")
