"""Draw many samples of a network, batch by batch: with pictures of the path, and with finished batches kept so that a long job goes on."""

import hashlib
import inspect
import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from fastscore import random, sampling
from fastscore.cli import checkpoint
from fastscore.ops import checks
from fastscore.sampling.sample import default_law

NAMES = ("annealed_langevin", "consistent_annealed", "predictor_corrector", "probability_flow")
STRIP = 64   # states of the path that are kept, at most twice as many


@dataclass
class SamplerOptions:
    """A sampler of the command line and its options; what is None has the sampler's default.

    Args:
        sampler: annealed_langevin, consistent_annealed (one network call per level), predictor_corrector or probability_flow.
        steps_per_level: Langevin steps at each noise level, of annealed_langevin; 20 unless given.
        step_size: ε at the smallest level, of annealed_langevin (0.2 σ_L² unless given) and consistent_annealed.
        step_lr: the same in the official configurations' unit, ε/2.
        denoise: take the last, noise-free step.
        temperature: scales the noise by its root; not of probability_flow.
        predictor: reverse_diffusion, ancestral, euler or none.
        corrector: langevin, annealed or none.
        corrector_steps: corrections at each level.
        snr: signal-to-noise ratio of a correction.
        method: of probability_flow, heun, euler or adaptive.
        initial_law: of the starts, uniform in [0, 1] or gaussian, N(0, σ_1²); unless given, gaussian where σ_1 > 1.146, and for
            predictor_corrector and probability_flow, else uniform.
    """

    sampler: str = "annealed_langevin"
    steps_per_level: int | None = None
    step_size: float | None = None
    step_lr: float | None = None
    denoise: bool = True
    temperature: float | None = None
    predictor: str | None = None
    corrector: str | None = None
    corrector_steps: int | None = None
    snr: float | None = None
    method: str | None = None
    initial_law: str | None = None


def arguments(sampler, sigmas, options):
    """The arguments of `sampling.states`: our defaults filled in, options of other samplers refused."""
    if sampler not in NAMES:
        raise ValueError(f"sample: sampler must be one of {', '.join(NAMES)}; got {sampler!r}.")
    options = {name: value for name, value in options.items() if value is not None}
    foreign = options.keys() - inspect.signature(getattr(sampling, sampler)).parameters.keys() - {"initial_law"}
    if foreign:
        raise ValueError(f"sample: {', '.join(sorted(foreign))} cannot be chosen for {sampler}.")
    if sampler == "annealed_langevin":
        options.setdefault("steps_per_level", 20)
        if options["steps_per_level"] < 1:
            raise ValueError(f"sample: steps_per_level must be at least 1; got {options['steps_per_level']}.")
        if "step_lr" not in options:
            options.setdefault("step_size", 0.2 * float(sigmas[-1]) ** 2)
    # By name, because it belongs to the job that goes on.
    options.setdefault("initial_law", default_law(sampler, float(sigmas[0])))
    return {"sampler": sampler, "sigmas": sigmas, **options}


def check_batches(n, batch_size):
    for name, value in (("n", n), ("batch_size", batch_size)):
        checks.integer("sample", name, value, 1)


def states_per_batch(sigmas, sampler="annealed_langevin", denoise=True):
    """How often a sampler reports."""
    return len(sigmas) + {"annealed_langevin": denoise, "probability_flow": denoise - 1}.get(sampler, 0)


def draw_from(
    net, sigmas, shape, n, *, seed=0, first_sample=0, batch_size=500, done=None, parts=None, sampler="annealed_langevin", **options
):
    """Samples (n, C, H, W) of a network, on its device, and the path of the first eight (states, 8, C, H, W), thinned where it is long.

    done: called with the number of states reported since. parts: a folder that keeps finished batches; those in it are not drawn again.
    The rest are arguments of the sampler.
    """
    given = arguments(sampler, sigmas, options)
    check_batches(n, batch_size)
    device = next(net.parameters()).device
    key = {"seed": random.draw_seed() if seed is None else seed, "device": device}
    sampling.states(net, shape=(0, *shape), first_sample=first_sample, **key, **given)   # refuses what it does before a folder is made
    if parts is not None:
        job = {**given, "seed": key["seed"], "first_sample": first_sample, "shape": shape, "batch_size": batch_size}
        job = _open_parts(Path(parts), net, job)
    images, path = [], None
    for start in range(0, n, batch_size):
        m = min(batch_size, n - start)
        file = None if parts is None else Path(parts) / f"{start}-{start + m}.safetensors"
        if file is not None and file.exists():
            batch = checkpoint.load(file)
            if done is not None:
                done(states_per_batch(sigmas, sampler, options.get("denoise", True)))
        else:
            run = sampling.states(net, shape=(m, *shape), first_sample=first_sample + start, **key, **given)
            batch = _followed(run, 8 if start == 0 else 0, done)
            if file is not None:
                _keep(file, batch, job)
        images.append(batch["images"])
        path = batch["path"] if path is None else path
    return torch.cat(images), path


def _followed(run, followed, done):
    """Exhaust a run: the last images, and the path of the first `followed` of them."""
    path, stride = [], 1
    for count, state in enumerate(run):
        if followed and count % stride == 0:
            if len(path) == 2 * STRIP:
                path, stride = path[::2], 2 * stride
            path.append((count, state.x[:followed].cpu()))
        if done is not None:
            done(1)
    if followed and path[-1][0] != count:
        path.append((count, state.x[:followed].cpu()))
    images = state.x.cpu()
    return {"images": images, "path": torch.stack([x for _, x in path]) if followed else images[:0]}


def _open_parts(folder, net, job):
    """This job as JSON has it; where the folder exists, its batches must be of this very job and network."""
    job = {k: list(v) if isinstance(v, tuple) else v.tolist() if isinstance(v, torch.Tensor) else v for k, v in job.items()}
    job["weights"] = digest(net)
    job = json.loads(json.dumps(job, default=repr))
    if not folder.exists():
        return job
    found = json.loads((folder / "job.json").read_text()) if (folder / "job.json").exists() else {}
    other = sorted(k for k in job.keys() | found.keys() if job.get(k) != found.get(k))
    if other:
        raise ValueError(f"sample: {folder} holds batches of another job ({', '.join(other)} differ); remove it or write elsewhere.")
    return job


def _keep(file, batch, job):
    """Write a finished batch; the first makes the folder, so that a job that ends without one leaves none behind."""
    if not file.parent.exists():
        file.parent.mkdir()
        checkpoint.write_atomic(file.parent / "job.json", json.dumps(job).encode())
    checkpoint.save(file, batch)


def digest(net):
    """SHA-256 of the names and bytes of a network's tensors."""
    total = hashlib.sha256()
    for name, t in net.state_dict().items():
        total.update(name.encode())
        total.update(t.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return total.hexdigest()


def remove_parts(folder):
    """Once the samples are written."""
    shutil.rmtree(folder)


def chosen(options: SamplerOptions):
    """As arguments of `draw_from`."""
    return asdict(options)
