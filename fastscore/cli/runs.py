"""A run folder: config.toml, metrics.jsonl, weights.safetensors (averaged), state.safetensors (to resume)."""

import contextlib
import json
import signal
import time
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import torch

from fastscore import datasets, losses, models, random, schedules, training
from fastscore.cli import checkpoint, splits
from fastscore.cli.drawing import draw_from
from fastscore.losses.noise_conditional import METHODS, draw_labels
from fastscore.losses.projections import DISTRIBUTIONS

BATCHES = 1024  # the stream that picks each step's images
SAVE_EVERY = 500  # steps: what a killed run may lose


def _unless_given(default):
    """An option that is None until `TrainConfig.given` is known: a value that equals the default is a value that was given."""
    return field(default=None, metadata={"default": default})


@dataclass
class TrainConfig:
    """Train a noise-conditional score network by denoising, sliced or exact score matching, or a classifier of noisy images.

    Options that are not given have their defaults; with resume, the values of the run. `given` holds the names of those that are.

    Args:
        task: score (unless given), or classifier (of noisy images; for sample --condition class=K).
        data: digits (unless given), mnist, fashion, a folder of images, an .npz file with an array named images, or an .npy file; what
            a file does not say is said behind its name, such as faces:rgb or x.npz:channels-last:max=16.
        out: run folder to create.
        network: mlp (residual ScoreMLP; unless given) or ncsn (convolutional RefineNet).
        loss: denoising (unless given), sliced, sliced-vr (variance reduced) or exact (the whole trace: small images only).
        projections: random directions per image, of the sliced losses; 1 unless given.
        distribution: of the directions, rademacher (unless given), gaussian or sphere.
        steps: number of updates; 9000 unless given.
        batch_size: images per update; 256 unless given.
        lr: Adam's learning rate, 2e-3 unless given; it rises over 100 steps and falls to zero along a cosine.
        levels: number of noise levels; 16 unless given.
        sigma_max: largest noise, in units of the [0, 1] pixel range; 1 unless given.
        sigma_min: smallest noise; 0.01 unless given.
        width: width of the mlp, or ngf of the ncsn; 256 unless given.
        depth: residual blocks of the mlp; 3 unless given.
        ema_decay: decay of the averaged weights; 0.999 unless given.
        held_out: images kept away from training, for evaluation; 0 unless given. The run remembers which.
        seed: of everything that is random; 0 unless given.
        resume: go on with the run in `out`, with its options; steps may be others.
    """

    task: str | None = _unless_given("score")
    data: str | None = _unless_given("digits")
    out: Path = Path("runs/digits")
    network: str | None = _unless_given("mlp")
    loss: str | None = _unless_given("denoising")
    projections: int | None = _unless_given(1)
    distribution: str | None = _unless_given("rademacher")
    steps: int | None = _unless_given(9000)
    batch_size: int | None = _unless_given(256)
    lr: float | None = _unless_given(2e-3)
    levels: int | None = _unless_given(16)
    sigma_max: float | None = _unless_given(1.0)
    sigma_min: float | None = _unless_given(0.01)
    width: int | None = _unless_given(256)
    depth: int | None = _unless_given(3)
    ema_decay: float | None = _unless_given(0.999)
    held_out: int | None = _unless_given(0)
    seed: int | None = _unless_given(0)
    resume: bool = False

    def __post_init__(self):
        self.given = frozenset(f.name for f in fields(self) if getattr(self, f.name) is not None)
        for f in fields(self):
            if f.name not in self.given:
                setattr(self, f.name, f.metadata["default"])


def check(config: TrainConfig) -> None:
    for name in ("steps", "batch_size", "levels", "width", "depth", "projections"):
        if getattr(config, name) < 1:
            raise ValueError(f"train: {name} must be at least 1; got {getattr(config, name)}.")
    if config.task not in ("score", "classifier"):
        raise ValueError(f"train: task must be score or classifier; got {config.task!r}.")
    if not 0 < config.lr < float("inf"):
        raise ValueError(f"train: lr must be positive and finite; got {config.lr}.")
    if not 0 <= config.ema_decay < 1:
        raise ValueError(f"train: ema_decay must be in [0, 1); got {config.ema_decay}.")
    if config.network not in ("mlp", "ncsn"):
        raise ValueError(f"train: network must be mlp or ncsn; got {config.network!r}.")
    if config.loss not in METHODS:
        raise ValueError(f"train: loss must be one of {', '.join(METHODS)}; got {config.loss!r}.")
    if config.distribution not in DISTRIBUTIONS:
        raise ValueError(f"train: distribution must be one of {', '.join(DISTRIBUTIONS)}; got {config.distribution!r}.")
    if not config.loss.startswith("sliced") and (config.projections, config.distribution) != (1, "rademacher"):
        raise ValueError(f"train: projections and distribution belong to the sliced losses; the loss is {config.loss}.")
    schedules.geometric(config.sigma_max, config.sigma_min, config.levels)


def build(config: TrainConfig, shape):
    """The network for images of `shape` (C, H, W), and its ladder."""
    sigmas = schedules.geometric(config.sigma_max, config.sigma_min, config.levels)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        if config.network == "ncsn":
            return models.NCSN(channels=shape[0], ngf=config.width, sigmas=sigmas, image_size=shape[-1]), sigmas
        dim = shape[0] * shape[1] * shape[2]
        return models.ScoreMLP(dim, width=config.width, depth=config.depth, sigmas=sigmas), sigmas


def batches(images, config, first_step):
    """Each step's images: a function of the seed and the step, so that a resumed run sees what the whole one would."""
    for step in range(first_step, config.steps):
        w = random.words(config.batch_size, seed=config.seed, step=step, stream=BATCHES)
        yield images[(w * len(images)) >> 32]


@contextlib.contextmanager
def ended_like_interrupted():
    """Within: SIGTERM raises KeyboardInterrupt, so that a job that is ended saves like Ctrl-C."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)   # where SIGINT is ignored, too
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)


def train(config: TrainConfig):
    """Yield (step, mean loss) after each update; the folder is complete every SAVE_EVERY steps and when the generator is closed."""
    if config.resume:
        config = resumed(config)
    check(config)
    if config.task != "score":
        raise ValueError(f"train: classifier_training trains a {config.task}.")
    out = Path(config.out)
    if not config.resume and out.exists() and any(out.iterdir()):
        raise ValueError(f"train: {out} exists already; choose another folder or pass --resume.")
    data = datasets.load(config.data)
    images = data[0][splits.split(config, *data)[0]]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    net, sigmas = build(config, images.shape[1:])
    net.to(device)
    return _train(config, out, images.to(device), net, sigmas, splits.record(config, *data))


def _train(config, out, images, net, sigmas, split):
    optimizer = torch.optim.Adam(net.parameters(), lr=config.lr, fused=True)
    ema = training.averaged(net, config.ema_decay)
    first = restore(out, net, ema, optimizer) if config.resume else 0
    if first > config.steps:
        raise ValueError(f"train: {out} has done {first} steps already; steps must be at least that; got {config.steps}.")
    out.mkdir(parents=True, exist_ok=True)
    forget_after(first, out / "metrics.jsonl")
    write_config(out, config, images.shape[1:])
    splits.keep(out, split)
    labels = None
    objective = {"method": config.loss, "projections": config.projections, "distribution": config.distribution}

    def loss(model, batch, step):
        nonlocal labels
        for group in optimizer.param_groups:
            group["lr"] = config.lr * learning_rate(step, config.steps)
        labels = draw_labels(len(sigmas), len(batch), seed=config.seed, step=step, device=batch.device)
        return losses.noise_conditional(model, batch, sigmas, labels=labels, seed=config.seed, step=step, **objective)

    loop = training.training_loop(
        net, batches(images, config, first), loss, steps=config.steps, optimizer=optimizer, first_step=first, ema=ema
    )
    dim, sums, counts, done = images[0].numel(), torch.zeros(len(sigmas)), torch.zeros(len(sigmas)), first
    start = time.perf_counter()
    try:
        for state in loop:
            done = state.step + 1
            sums.index_add_(0, labels.cpu(), state.losses.cpu() / dim)
            counts += torch.bincount(labels.cpu(), minlength=len(sigmas))
            if done % 100 == 0 or done == config.steps:
                _record(out, done, sums, counts, time.perf_counter() - start)
                sums.zero_(), counts.zero_()
            if done % SAVE_EVERY == 0:
                save(out, net, ema, optimizer, done)
            yield state.step, float(state.losses.mean())
    finally:
        save(out, net, ema, optimizer, done)


def save(out, net, ema, optimizer, done):
    checkpoint.save(out / "weights.safetensors", ema.module.state_dict())
    state = {f"net.{k}": v for k, v in net.state_dict().items()} | {f"ema.{k}": v for k, v in ema.state_dict().items()}
    state |= checkpoint.optimizer_tensors(optimizer) | {"step": torch.tensor(done)}
    checkpoint.save(out / "state.safetensors", state)


def resumed(config: TrainConfig) -> TrainConfig:
    """The options of the run in `out`, with the steps that are asked for now; another value than the run's is refused."""
    out = Path(config.out)
    if not (out / "state.safetensors").exists():
        raise ValueError(f"train: {out} holds no run to resume.")
    stored = read_config(out)[0]
    for name in sorted(config.given - {"out", "resume", "steps"}):
        value, kept = getattr(config, name), getattr(stored, name)
        if value != kept:
            raise ValueError(f"train: the run in {out} has {name} {kept}, which --resume cannot change; got {value}.")
    steps = config.steps if "steps" in config.given else stored.steps
    return replace(stored, out=config.out, steps=steps, resume=True)


def forget_after(step, path):
    """Drop the lines of steps that were done after the last save, and are done again."""
    if path.exists():
        kept = [line for line in path.read_text().splitlines() if json.loads(line)["step"] <= step]
        checkpoint.write_atomic(path, "".join(line + "\n" for line in kept).encode())


def learning_rate(step, steps):
    """Factor on the learning rate: a linear rise over 100 steps, then a cosine to zero."""
    return min(1.0, (step + 1) / 100) * 0.5 * (1 + torch.cos(torch.tensor(torch.pi * step / steps)).item())


def restore(out, net, ema, optimizer):
    state = checkpoint.load(out / "state.safetensors")
    net.load_state_dict({k[4:]: v for k, v in state.items() if k.startswith("net.")})
    ema.load_state_dict({k[4:]: v for k, v in state.items() if k.startswith("ema.")})
    checkpoint.restore_optimizer(optimizer, state)
    return int(state["step"])


def _record(out, step, sums, counts, seconds):
    levels = [s / c if c else None for s, c in zip(sums.tolist(), counts.tolist())]
    line = {"step": step, "loss": float(sums.sum() / counts.sum()), "levels": levels, "seconds": round(seconds, 2)}
    with open(out / "metrics.jsonl", "a") as file:
        file.write(json.dumps(line) + "\n")


def write_config(out, config, shape):
    import tomli_w

    options = {k: str(v) if isinstance(v, Path) else v for k, v in asdict(config).items() if k != "resume"}
    text = tomli_w.dumps({**options, "shape": list(shape)})
    checkpoint.write_atomic(out / "config.toml", text.encode())


def read_config(folder):
    """(options, sample shape (C, H, W)) of a run folder."""
    try:
        import tomllib
    except ImportError:
        import tomli as tomllib
    folder = Path(folder)
    if not (folder / "config.toml").exists():
        raise ValueError(f"{folder} is not a run folder: it has no config.toml.")
    values = tomllib.loads((folder / "config.toml").read_text())
    known = {f.name for f in fields(TrainConfig)}
    options = {k: v for k, v in values.items() if k in known}
    return TrainConfig(**{**options, "out": str(folder)}), tuple(values["shape"])   # wherever the folder has been moved to


def open_run(folder):
    """(averaged network, sigmas, sample shape (C, H, W), config) of a run folder."""
    config, shape = read_config(folder)
    if config.task != "score":
        raise ValueError(f"{folder} holds a {config.task}, not a score network; sample takes it as --classifier.")
    net, sigmas = build(config, shape)
    net.load_state_dict(checkpoint.load(Path(folder) / "weights.safetensors"))
    return net.eval().requires_grad_(False), sigmas, shape, config


def draw(folder, n, **options):
    """Samples (n, C, H, W) of a run, and the path of the first eight (states, 8, C, H, W); options as in `draw_from`."""
    net, sigmas, shape, _ = open_run(folder)
    return draw_from(net, sigmas, shape, n, **options)
